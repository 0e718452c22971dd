"""The 12B V2: what it does otherwise than the 8B V1, and that it equals the published model.

Everything it shares with the 8B V1 is tested there. References: the stored outputs in `tests/golden/12b-v2`, and plain
restatements of the published recipe.
"""

import json
import os
import re
import shutil
import subprocess

import jinja2
import nemotron_vl.configuration_nemotron_vl as configuration
import numpy as np
import pytest
import torch
import transformers
from nemotron_vl.checkpoint import PREFIX_TOKENS_KEY
from nemotron_vl.configuration_nemotron_vl import NemotronVLV2Config
from nemotron_vl.image_processing import (
    CLIP_MEAN,
    CLIP_STD,
    V2_RECIPE,
    NemotronVLImageProcessor,
    candidate_grids,
    count_tiles,
    select_tile_grid,
)
from nemotron_vl.modeling_nemotron_vl import (
    Llama_Nemotron_Nano_VL,
    NemotronH_Nano_VL_V2,
    NemotronVLForConditionalGeneration,
    ProjectorRMSNorm,
)
from nemotron_vl.processing_nemotron_vl import NemotronVLProcessor, NemotronVLV2Processor
from nemotron_vl.prompts import V2_FORMAT, flatten_content, split_reasoning
from nemotron_vl.quantization_nemotron_vl import packed_linears
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor, AutoTokenizer, GenerationConfig
from transformers.utils.chat_template_utils import render_jinja_template

from tests.conftest import golden_cases, golden_inputs, load_weights, read_golden_cases
from tests.prompts import picture
from tools import ROOT, adopt, chat
from tools.build_index import build_index
from tools.quantize import make_packed_linear, quantize_model
from tools.tiny_checkpoint import IMAGE_TOKENS, make_v2_tokenizer

needs_nemotron_h = pytest.mark.skipif(
    not hasattr(transformers, "NemotronHForCausalLM"), reason="transformers 4.57 has no NemotronH"
)
FOLDER = ROOT / "v2"
TEMPLATE = (FOLDER / "chat_template.jinja").read_text(encoding="utf-8")
GREEDY = {"max_new_tokens": 8, "do_sample": False}


def read(name: str) -> dict:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


# The config


PUBLISHED = {
    "model_type": "NemotronH_Nano_VL_V2",
    "auto_map": {"AutoConfig": "configuration.NemotronH_Nano_VL_V2_Config"},
    "force_image_size": 64,
    "projector_hidden_size": 48,
    "vision_config": {
        "args": {
            "model": "vit_huge_patch16_224",
            "model_kwargs": {"embed_dim": 32, "depth": 2, "num_heads": 2},
            "cpe_max_size": 256,
            "teachers": [{"name": name} for name in ("clip", "siglip", "dino_v2", "sam")],
            "register_multiple": 16,
        },
        "auto_map": {"AutoModel": "nvidia/C-RADIOv2-H--hf_model.RADIOModel"},
    },
}
LANGUAGE_MODEL = {
    "model_type": "nemotron_h",
    "vocab_size": 300,
    "hidden_size": 64,
    "hybrid_override_pattern": "M-*",
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "time_step_limit": [0.0, float("inf")],
}


@needs_nemotron_h
@pytest.mark.parametrize("language_key", ["llm_config", "text_config"])
@pytest.mark.parametrize("image_key", ["img_context_token_id", "image_context_token_id"])
def test_both_spellings_of_the_published_config_are_read(tmp_path, language_key, image_key):
    (tmp_path / "config.json").write_text(json.dumps({**PUBLISHED, language_key: LANGUAGE_MODEL, image_key: 7}))
    config = NemotronVLV2Config.from_pretrained(tmp_path)
    assert config.image_token_id == 7 and config.vision_config.num_prefix_tokens == 16
    assert config.text_config.layers_block_type == ["linear_attention", "mlp", "full_attention"]
    assert config.vision_config.external_normalization and config.norm_mean == list(CLIP_MEAN)
    assert config.max_sequence_length == 131072
    config.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved/config.json").read_text())
    assert saved["img_context_token_id"] == 7 and "image_context_token_id" not in saved
    assert saved["llm_config"]["hybrid_override_pattern"] == "M-*" and saved["llm_config"]["num_hidden_layers"] == 3
    # NVIDIA's and vLLM's NemotronHConfig cannot set this one; infinity would be written as a dict.
    assert not {"layers_block_type", "layer_types", "time_step_limit"} & saved["llm_config"].keys()
    assert saved["vision_config"]["args"] == PUBLISHED["vision_config"]["args"]
    reloaded = NemotronVLV2Config.from_pretrained(tmp_path / "saved")
    assert reloaded.text_config.to_dict() == config.text_config.to_dict()


@needs_nemotron_h
def test_a_vision_config_of_the_caller_is_not_changed():
    vision_config = configuration.RADIOConfig(num_registers=12)
    assert NemotronVLV2Config(vision_config=vision_config).vision_config.external_normalization
    assert vision_config.external_normalization is False


@needs_nemotron_h
def test_a_mixture_of_experts_with_the_same_architecture_is_refused():
    llm_config = {**LANGUAGE_MODEL, "hybrid_override_pattern": "MEM*E"}
    with pytest.raises(ValueError, match="pre-release of the omni model"):
        NemotronVLV2Config(**{**PUBLISHED, "llm_config": llm_config})


@needs_nemotron_h
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hybrid_override_pattern": "M-X"}, "write the layers with M"),
        ({"num_hidden_layers": 4}, "length of llm_config.hybrid_override_pattern says 3.*num_hidden_layers says 4"),
        ({"mamba_num_heads": 10**9}, "mamba_num_heads must be a whole number"),
        ({"model_type": "llama"}, "has a 'nemotron_h' language model"),
    ],
)
def test_a_broken_language_config_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        NemotronVLV2Config(**{**PUBLISHED, "llm_config": {**LANGUAGE_MODEL, **changes}})


def test_older_transformers_is_told_what_is_needed(monkeypatch):
    monkeypatch.setattr(configuration, "NemotronHConfig", None)
    with pytest.raises(ImportError, match=r"needs transformers 5\.23 or later.* this is \d+\.\d+"):
        NemotronVLV2Config()


# The files of v2/

BACKBONE = "language_model.backbone."
MAMBA, ATTENTION, MLP = (
    [layer for layer, kind in enumerate(6 * "M-M-M-M*-" + "M-M-M-M-") if kind == wanted] for wanted in "M*-"
)
LANGUAGE_SHAPES = {
    BACKBONE + "embeddings.weight": (132096, 5120),
    "language_model.lm_head.weight": (132096, 5120),
    BACKBONE + "norm_f.weight": (5120,),
    **{f"{BACKBONE}layers.{layer}.norm.weight": (5120,) for layer in range(62)},
}
for layers, shapes in (
    (
        MAMBA,
        {
            **dict.fromkeys(("A_log", "D", "dt_bias"), (128,)),
            "conv1d.weight": (12288, 1, 4),
            "conv1d.bias": (12288,),
            "in_proj.weight": (22656, 5120),
            "norm.weight": (10240,),
            "out_proj.weight": (5120, 10240),
        },
    ),
    (MLP, {"up_proj.weight": (20480, 5120), "down_proj.weight": (5120, 20480)}),
    (
        ATTENTION,
        {
            **dict.fromkeys(("q_proj.weight", "o_proj.weight"), (5120, 5120)),
            **dict.fromkeys(("k_proj.weight", "v_proj.weight"), (1024, 5120)),
        },
    ),
):
    LANGUAGE_SHAPES |= {
        f"{BACKBONE}layers.{layer}.mixer.{name}": shape for layer in layers for name, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def full_size_model() -> NemotronH_Nano_VL_V2:
    with torch.device("meta"):
        return NemotronH_Nano_VL_V2(NemotronVLV2Config.from_pretrained(ROOT, subfolder="v2"))


@needs_nemotron_h
def test_the_full_size_has_the_published_names_and_shapes(full_size_model):
    shapes = {name: tuple(tensor.shape) for name, tensor in full_size_model.state_dict().items()}
    assert {name: shape for name, shape in shapes.items() if name.startswith("language_model.")} == LANGUAGE_SHAPES
    assert len(LANGUAGE_SHAPES) == 369 and len(shapes) == 761
    assert {name: shape for name, shape in shapes.items() if name.startswith("mlp1.")} == {
        "mlp1.0.weight": (5120,),
        "mlp1.1.weight": (20480, 5120),
        "mlp1.3.weight": (5120, 20480),
    }
    assert shapes[PREFIX_TOKENS_KEY] == (16, 1280)
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in full_size_model.named_children()}
    assert sizes == {"language_model": 12_320_486_912, "vision_model": 651_653_120, "mlp1": 209_720_320}


@needs_nemotron_h
def test_the_index_is_what_its_script_writes(full_size_model):
    index = read("model.safetensors.index.json")
    assert build_index(full_size_model.config) == index
    assert index["metadata"]["total_size"] == 2 * (13_181_860_352 + 6)


@needs_nemotron_h
def test_the_shipped_config_says_what_the_default_config_says(full_size_model):
    shipped, default = (
        json.loads(full_size_model.config.to_json_string()),
        json.loads(NemotronVLV2Config(video_context_token_id=131081).to_json_string()),
    )
    described = {"architectures", "torch_dtype", "transformers_version", "_name_or_path"}
    for part in (shipped, default, shipped["llm_config"], default["llm_config"]):
        for name in described & part.keys():
            del part[name]
    vision, default_vision = shipped.pop("vision_config"), default.pop("vision_config")
    assert shipped == default
    assert {name for name in default_vision if vision[name] != default_vision[name]} <= {"args", *described}


def test_the_shipped_text_files_fit_the_published_tokens(tmp_path):
    assert (
        read("preprocessor_config.json").items()
        >= {
            **V2_RECIPE,
            "image_mean": list(CLIP_MEAN),
            "image_std": list(CLIP_STD),
        }.items()
    )
    assert read("processor_config.json")["processor_class"] == "NemotronVLV2Processor"
    generation = GenerationConfig.from_pretrained(FOLDER)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 12, 999)
    make_v2_tokenizer().save_pretrained(tmp_path / "vocabulary")
    for name in ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "config.json"):
        shutil.copy(FOLDER / name, tmp_path / name)
    shutil.copy(tmp_path / "vocabulary/tokenizer.json", tmp_path / "tokenizer.json")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "<SPECIAL_12>", "<SPECIAL_999>")
    assert tokenizer.padding_side == "left" and tokenizer.model_max_length == 131072
    special = [token for token in tokenizer.all_special_tokens if token in (*IMAGE_TOKENS, "<video>")]
    assert special == [*IMAGE_TOKENS, "<video>"]


# Equal to the published model


@pytest.fixture(scope="module")
def golden_model(golden_12b) -> NemotronH_Nano_VL_V2:
    return NemotronH_Nano_VL_V2.from_pretrained(golden_12b / "checkpoint").eval()


@pytest.fixture(scope="module")
def golden(golden_12b) -> dict[str, torch.Tensor]:
    return load_file(golden_12b / "expected.safetensors")


@needs_nemotron_h
@pytest.mark.parametrize("name", golden_cases("12b-v2"))
def test_features_and_logits_equal_the_golden(golden_12b, golden_model, golden, name):
    inputs = golden_inputs(golden_12b, name)
    with torch.no_grad():
        logits, last = golden_model(**inputs).logits, golden[f"{name}.logits_last"]
        torch.testing.assert_close(logits[:, -last.shape[1] :], last, atol=1e-4, rtol=0)
        if "pixel_values" in inputs:
            features = golden_model.get_image_features(inputs["pixel_values"])
            tower, image = golden[f"{name}.tower_features"], golden[f"{name}.image_features"]
            torch.testing.assert_close(features.last_hidden_state[: len(tower)], tower, atol=1e-4, rtol=0)
            torch.testing.assert_close(torch.cat(features.pooler_output).view_as(image), image, atol=1e-4, rtol=0)


def greedy(num_tokens: int) -> dict:
    """Options that generate so many tokens; end tokens do not stop them."""
    return {"max_new_tokens": num_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@needs_nemotron_h
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", golden_cases("12b-v2"))
def test_greedy_ids_equal_the_golden(golden_12b, golden_model, golden, name, use_cache):
    inputs, stored = golden_inputs(golden_12b, name), golden[f"{name}.output_ids"]
    output = golden_model.generate(**inputs, use_cache=use_cache, **greedy(stored.shape[1]))
    assert torch.equal(output[:, inputs["input_ids"].shape[1] :], stored)


@needs_nemotron_h
def test_left_padded_batches_give_the_golden(golden_12b, golden_model, golden):
    """Prompts of different lengths: the Mamba states must not see the padding."""
    names = list(read_golden_cases(golden_12b))
    cases = [golden_inputs(golden_12b, name) for name in names]
    lengths = [case["input_ids"].shape[1] for case in cases]
    width = max(lengths)
    rows = [torch.nn.functional.pad(case["input_ids"][0], (width, 0), value=5)[-width:] for case in cases]
    mask = torch.tensor([[0] * (width - length) + [1] * length for length in lengths])
    inputs = {"input_ids": torch.stack(rows), "attention_mask": mask}
    if pixels := [case["pixel_values"] for case in cases if "pixel_values" in case]:
        inputs["pixel_values"] = torch.cat(pixels)
    last = torch.cat([golden[f"{name}.logits_last"] for name in names])
    with torch.no_grad():
        logits = golden_model(**inputs).logits[:, -last.shape[1] :]
    torch.testing.assert_close(logits, last, atol=1e-4, rtol=0)
    stored = [golden[f"{name}.output_ids"][0] for name in names]
    output = golden_model.generate(**inputs, **greedy(max(len(ids) for ids in stored)))
    assert all(torch.equal(new[: len(ids)], ids) for new, ids in zip(output[:, width:], stored, strict=True))


@needs_nemotron_h
@pytest.mark.parametrize("name", golden_cases("12b-v2"))
def test_chat_writes_the_golden_prompts(golden_12b, golden_model, golden, name, monkeypatch):
    processor = NemotronVLV2Processor.from_pretrained(golden_12b / "checkpoint", chat_template=TEMPLATE)
    processor.tokenizer.chat_template = TEMPLATE
    prompts = []
    monkeypatch.setattr(golden_model, "generate", lambda **inputs: prompts.append(inputs) or inputs["input_ids"])
    turns = r"System\n(.*)\n<SPECIAL_11>User\n(?:<img>.*</img>\n)?(.*)\n<SPECIAL_11>Assistant\n"
    system, question = re.search(
        turns, read_golden_cases(golden_12b)[name]["text_after_expansion"], re.DOTALL
    ).groups()
    pixel_values = golden_inputs(golden_12b, name).get("pixel_values")
    golden_model.chat(processor, pixel_values, question, GREEDY, system_prompt=system or None)
    assert torch.equal(prompts[-1]["input_ids"], golden[f"{name}.input_ids"])


@needs_nemotron_h
def test_the_golden_checkpoint_is_saved_under_its_published_names(golden_12b, golden_model, tmp_path):
    published = load_weights(golden_12b / "checkpoint")
    golden_model.save_pretrained(tmp_path)
    saved = load_weights(tmp_path)
    published.pop("vision_model.radio_model.summary_idxs", None)  # a constant of the config
    assert saved.keys() == published.keys()
    assert all(torch.equal(saved[name], published[name]) for name in saved)


# The model


@pytest.fixture(scope="module")
def model(tiny_v2_checkpoint) -> NemotronH_Nano_VL_V2:
    return NemotronH_Nano_VL_V2.from_pretrained(tiny_v2_checkpoint).eval()


@pytest.fixture(scope="module")
def processor(tiny_v2_checkpoint) -> NemotronVLV2Processor:
    return NemotronVLV2Processor.from_pretrained(tiny_v2_checkpoint)


PAGE = Image.new("RGB", (120, 70), (200, 30, 90))


@pytest.fixture(scope="module")
def inputs(processor):
    content = [{"type": "text", "text": "What is the total of this receipt?"}, {"type": "image", "image": PAGE}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        return_tensors="pt",
    )


def test_the_shared_class_is_no_model_by_itself():
    for method in (
        NemotronVLForConditionalGeneration._build_language_model,
        NemotronVLForConditionalGeneration._build_projector,
    ):
        with pytest.raises(NotImplementedError, match="one of its two members"):
            method(*[None] * method.__code__.co_argcount)


@needs_nemotron_h
def test_the_conditioner_of_the_tower_is_not_applied(model, inputs):
    pixel_values = inputs["pixel_values"]
    conditioner = model.vision_model.radio_model.input_conditioner
    assert torch.equal(conditioner(pixel_values), pixel_values)
    assert not torch.equal(conditioner.norm_std, torch.ones(3, 1, 1))  # it is there, as in the checkpoint


@needs_nemotron_h
@torch.no_grad()
def test_prefill_in_chunks_gives_equal_logits(model, inputs):
    whole = model(**inputs, use_cache=True)
    features = torch.cat(model.get_image_features(inputs["pixel_values"]).pooler_output)
    embeds = model._embed_prompt(inputs["input_ids"], features, None)
    pieces, cache = [], None
    for piece in embeds.split([7, 1, 20, embeds.shape[1] - 28], dim=1):
        output = model(inputs_embeds=piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole.logits, atol=1e-4, rtol=1e-4)
    expected = model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, prefill_chunk_size=9, **GREEDY), expected)


@needs_nemotron_h
@torch.no_grad()
def test_small_time_steps_are_the_same_in_a_prompt_and_after_it(tiny_v2_checkpoint, inputs):
    """transformers limits them to `time_step_min`, but only in prompts."""
    model = NemotronH_Nano_VL_V2.from_pretrained(tiny_v2_checkpoint).eval()
    for block in model.language_model.backbone.layers:
        if block.block_type == "linear_attention":
            block.mixer.dt_bias.fill_(-12.0)
            block.mixer.in_proj.weight[-block.mixer.num_heads :].zero_()
            block.mixer.D.zero_()
    ids = inputs["input_ids"][:, -24:]
    whole = model(input_ids=ids).logits
    cache = model(input_ids=ids[:, :-8], use_cache=True).past_key_values
    for position in range(ids.shape[1] - 8, ids.shape[1]):
        logits = model(input_ids=ids[:, position : position + 1], past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(logits[:, 0], whole[:, position], atol=1e-5, rtol=0)


@needs_nemotron_h
@pytest.mark.parametrize("options", [{"num_beams": 2}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_ways_to_generate(model, inputs, options):
    output = model.generate(**inputs, **{**GREEDY, **options, "max_new_tokens": 4})
    assert output.shape[1] == inputs["input_ids"].shape[1] + 4 or output[0, -1] == model.generation_config.eos_token_id
    if "num_beams" not in options:
        assert torch.equal(output, model.generate(**inputs, **{**GREEDY, "max_new_tokens": 4}))


@needs_nemotron_h
def test_every_part_learns_with_and_without_gradient_checkpointing(tiny_v2_checkpoint, inputs):
    model = NemotronH_Nano_VL_V2.from_pretrained(tiny_v2_checkpoint).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert len(gradients[0]) == len(list(model.parameters()))
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_the_projector_norm_works_in_float32():
    norm = ProjectorRMSNorm(8).to(torch.bfloat16)
    norm.weight.data = torch.linspace(0.3, 3, 8).to(torch.bfloat16)
    features = torch.linspace(-40, 55, 16).view(2, 8).to(torch.bfloat16)
    wide = features.double()
    expected = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
    assert torch.equal(norm(features), expected.to(torch.bfloat16))


@needs_nemotron_h
@pytest.mark.parametrize("factor", [255, float("nan")])
def test_tiles_of_another_scale_are_refused(model, inputs, factor):
    with pytest.raises(ValueError, match=r"this model takes normalised tiles"):
        model.generate(**{**inputs, "pixel_values": inputs["pixel_values"] * factor}, **GREEDY)


@needs_nemotron_h
def test_a_wrong_number_of_prefix_tokens_is_named_with_both_counts(tiny_v2_checkpoint, tmp_path, capsys):
    folder = tmp_path / "ten"
    shutil.copytree(tiny_v2_checkpoint, folder)
    weights = load_file(folder / "model.safetensors")
    weights[PREFIX_TOKENS_KEY] = weights[PREFIX_TOKENS_KEY][:10].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"cls_token\.token holds 10 class and register tokens, but .* counts 16"):
        NemotronH_Nano_VL_V2.from_pretrained(folder)
    assert adopt.main([str(folder), "--out", str(tmp_path / "adopted")]) == 0
    assert "holds 10 tokens, the config counts 16; the tensor is right" in capsys.readouterr().out
    model = NemotronH_Nano_VL_V2.from_pretrained(tmp_path / "adopted")
    assert model.config.vision_config.num_prefix_tokens == 10


@needs_nemotron_h
def test_experts_among_the_weights_are_recognised(tiny_v2_checkpoint, tmp_path, capsys):
    folder = tmp_path / "omni"
    shutil.copytree(tiny_v2_checkpoint, folder)
    weights = load_file(folder / "model.safetensors")
    weights[BACKBONE + "layers.1.mixer.experts.0.up_proj.weight"] = torch.ones(2, 2)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert adopt.main([str(folder), "--check"]) == 1
    assert "pre-release of the omni model" in capsys.readouterr().out
    with pytest.raises(ValueError, match="pre-release of the omni model"):
        NemotronH_Nano_VL_V2.from_pretrained(folder)


# The doors


@needs_nemotron_h
def test_a_subfolder_opens_every_door(tiny_v2_checkpoint, tmp_path, model, inputs):
    repository = tmp_path / "repo.with-v2"
    shutil.copytree(tiny_v2_checkpoint, repository / "v2", ignore=shutil.ignore_patterns("*.py"))
    for file in [*ROOT.glob("*.py"), ROOT / "processor_config.json", ROOT / "preprocessor_config.json"]:
        shutil.copy(file, repository)
    where = {"subfolder": "v2", "trust_remote_code": True}
    opened = AutoModel.from_pretrained(repository, **where).eval()
    assert type(opened).__name__ == "NemotronH_Nano_VL_V2" and opened.__module__.startswith("transformers_modules")
    opened_processor = AutoProcessor.from_pretrained(repository, **where)
    assert type(opened_processor).__name__ == "NemotronVLV2Processor"
    assert AutoTokenizer.from_pretrained(repository, **where).chat_template == TEMPLATE
    with torch.no_grad():
        torch.testing.assert_close(opened(**inputs).logits, model(**inputs).logits)
    opened.save_pretrained(tmp_path / "flat")
    opened_processor.save_pretrained(tmp_path / "flat")
    assert (tmp_path / "flat/quantization_nemotron_vl.py").exists()
    assert json.loads((tmp_path / "flat/config.json").read_text())["architectures"] == ["NemotronH_Nano_VL_V2"]
    with torch.no_grad():
        again = AutoModel.from_pretrained(tmp_path / "flat", trust_remote_code=True).eval()
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)


@needs_nemotron_h
def test_a_published_directory_is_adopted_and_chats(golden_12b, golden_model, tmp_path, capsys):
    assert adopt.main([str(golden_12b / "checkpoint"), "--out", str(tmp_path / "out"), "--copy"]) == 0
    assert "Every tensor fits the model." in capsys.readouterr().out
    model = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    image_processor = processor.image_processor
    assert (image_processor.grid_rule, image_processor.upscale) == ("closest_ratio", 1)
    assert processor.tokenizer.pad_token == "<unk>"  # not the end token
    features = image_processor(PAGE)
    options = {"generation_config": GREEDY, "question": "Total?", **features}
    assert model.chat(processor, **options) == golden_model.chat(processor, **options)


@needs_nemotron_h
def test_the_chat_tool_talks_to_it(tiny_v2_checkpoint, tmp_path, capsys):
    PAGE.save(tmp_path / "page.png")
    command = [str(tmp_path / "page.png"), "--model", str(tiny_v2_checkpoint), "--question", "Total?", "Date?"]
    assert chat.main(command) == 0
    assert "120 x 70 px -> 3 x 2 tiles and a thumbnail -> 30 tokens" in capsys.readouterr().out


# Tiles


def restated_grid(width: int, height: int, max_num_tiles: int = 12, size: int = 512) -> tuple[int, int]:
    """The published rule in plain words: columns and rows."""
    best, best_difference = (1, 1), float("inf")
    for columns, rows in candidate_grids(max_num_tiles):
        difference = abs(width / height - columns / rows)
        if difference < best_difference:
            best, best_difference = (columns, rows), difference
        elif difference == best_difference and width * height > 0.5 * size * size * columns * rows:
            best = (columns, rows)
    return best


def restated_tiles(image: Image.Image, size: int, max_num_tiles: int = 12) -> torch.Tensor:
    """The published recipe in plain words, on the picture as a whole."""
    pixels = torch.from_numpy(np.array(image)).float() / 255

    def resized(height: int, width: int) -> torch.Tensor:
        planes = pixels.permute(2, 0, 1)[None].contiguous()
        options = {"mode": "bicubic", "antialias": True, "align_corners": False}
        return torch.nn.functional.interpolate(planes, (height, width), **options)[0]

    columns, rows = restated_grid(*image.size, max_num_tiles, size)
    page = resized(rows * size, columns * size)
    tiles = [
        page[:, row * size : (row + 1) * size, column * size : (column + 1) * size]
        for row in range(rows)
        for column in range(columns)
    ]
    tiles += [resized(size, size)] if len(tiles) > 1 else []
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (torch.stack(tiles) - mean) / std


@pytest.mark.parametrize(
    ("width", "height", "grid", "tiles"),
    [
        (481, 202, (5, 2), 11),
        (1178, 1779, (2, 3), 7),
        (724, 724, (1, 1), 1),
        (725, 725, (2, 2), 5),
        (1147, 1147, (3, 3), 10),
        (1920, 1080, (4, 2), 9),
        (640, 480, (4, 3), 13),
        (400, 1600, (1, 4), 5),
    ],
)
def test_grids_of_the_published_table(width, height, grid, tiles):
    rows, columns = select_tile_grid(height, width, upscale=1, grid_rule="closest_ratio")
    assert (columns, rows) == grid == restated_grid(width, height)
    assert count_tiles(height, width, upscale=1, grid_rule="closest_ratio") == tiles


def test_grids_and_tokens_of_sampled_sizes():
    processor = NemotronVLImageProcessor(**V2_RECIPE)
    assert processor.get_number_of_image_tokens(202, 481) == 2816
    assert processor.get_number_of_image_patches(1779, 1178, {"max_num_tiles": 8}) == 7
    assert processor.get_number_of_image_patches(1779, 1178, {"max_num_tiles": 4}) == 3
    for width in range(40, 3000, 97):
        for height in range(30, 3000, 131):
            columns, rows = restated_grid(width, height)
            expected = columns * rows + (columns * rows > 1)
            assert processor.get_number_of_image_patches(height, width) == expected


@pytest.mark.parametrize("size", [(481, 202), (30, 200), (97, 97), (640, 471), (33, 32)])
def test_tiles_equal_the_restated_recipe(size):
    image = picture(*size, 3)
    found = NemotronVLImageProcessor(image_size=64, **V2_RECIPE)(image)
    expected = restated_tiles(image, 64)
    assert found["num_patches"] == [len(expected)]
    # The processor scales levels after the resize, the recipe before it: the last bits of float32 differ.
    torch.testing.assert_close(found["pixel_values"], expected, atol=5e-6, rtol=0)


def test_a_published_tile_count_at_full_size():
    found = NemotronVLImageProcessor(**V2_RECIPE)(picture(481, 202, 1), return_tensors="pt")
    assert found["pixel_values"].shape == (11, 3, 512, 512) and found["num_patches"].tolist() == [11]


def test_a_picture_in_bands_equals_the_whole(monkeypatch):
    image = picture(300, 500, 2)
    whole = NemotronVLImageProcessor(image_size=64, **V2_RECIPE)(image)["pixel_values"]
    monkeypatch.setattr("nemotron_vl.image_processing.BAND_BYTES", 300 * 4 * 7)
    assert torch.equal(NemotronVLImageProcessor(image_size=64, **V2_RECIPE)(image)["pixel_values"], whole)


def test_the_published_file_is_read_as_the_recipe(tmp_path):
    published = {
        "image_processor_type": "NemotronNanoVLV2ImageProcessor",
        "auto_map": {"AutoImageProcessor": "image_processing.NemotronNanoVLV2ImageProcessor"},
        "image_size": 64,
        "max_num_tiles": 12,
        "norm_mean": [0.5, 0.4, 0.3],
        "norm_std": [0.2, 0.25, 0.3],
        "do_rescale": True,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(published))
    processor = NemotronVLImageProcessor.from_pretrained(tmp_path)
    assert (processor.grid_rule, processor.interpolation, processor.upscale) == ("closest_ratio", "bicubic", 1)
    assert processor.do_normalize and processor.image_mean == [0.5, 0.4, 0.3]
    processor.save_pretrained(tmp_path / "saved")
    assert NemotronVLImageProcessor.from_pretrained(tmp_path / "saved").to_dict() == processor.to_dict()


def test_levels_stay_levels_without_rescaling():
    options = {**V2_RECIPE, "do_normalize": False, "do_rescale": False}
    levels = NemotronVLImageProcessor(image_size=64, **options)(picture(97, 97, 3))["pixel_values"]
    scaled = NemotronVLImageProcessor(image_size=64, **{**options, "do_rescale": True})(picture(97, 97, 3))
    assert levels.dtype == torch.float32
    torch.testing.assert_close(levels / 255, scaled["pixel_values"])


@pytest.mark.parametrize("options", [{"grid_rule": "best"}, {"interpolation": "nearest"}])
def test_unknown_recipes_are_refused(options):
    with pytest.raises(ValueError, match="8B V1.*12B V2"):
        NemotronVLImageProcessor(**options)


VLLM_TILES = """
import json, os, sys
os.environ["VLLM_NO_USAGE_STATS"] = "1"
import numpy as np
from PIL import Image
from vllm import ModelRegistry
from vllm.config import ModelConfig
from vllm.multimodal import MULTIMODAL_REGISTRY

assert "NemotronH_Nano_VL_V2" in ModelRegistry.get_supported_archs()
config = ModelConfig(model=sys.argv[1], trust_remote_code=True, dtype="float32", max_model_len=2048)
assert config.is_hybrid and config.hf_text_config.hybrid_override_pattern == "M-*M*-"
processor = MULTIMODAL_REGISTRY.create_processor(config).info.get_hf_processor()
pictures = [Image.open(path) for path in sys.argv[3:]]
tiles = [processor(text="<s><image>", images=[one], return_tensors="pt")["pixel_values_flat"] for one in pictures]
np.savez(sys.argv[2], *[own.float().numpy() for own in tiles])
"""


@needs_nemotron_h
@pytest.mark.slow
def test_vllm_reads_the_config_and_cuts_the_same_tiles(tiny_v2_checkpoint, tmp_path):
    """vLLM's own `NemotronH_Nano_VL_V2`; see test_vllm.py for its environment."""
    python = os.environ.get("NEMOTRON_VL_VLLM")
    if not python:
        pytest.skip("NEMOTRON_VL_VLLM names no python with vLLM")
    pictures = [picture(*size, 1) for size in ((120, 70), (64, 64), (300, 443))]
    files = [tmp_path / f"{number}.png" for number in range(len(pictures))]
    for image, file in zip(pictures, files, strict=True):
        image.save(file)
    subprocess.run([python, "-c", VLLM_TILES, tiny_v2_checkpoint, tmp_path / "tiles.npz", *files], check=True)
    theirs = np.load(tmp_path / "tiles.npz")
    for image, name in zip(pictures, theirs.files, strict=True):
        ours = NemotronVLImageProcessor(image_size=64, **V2_RECIPE)(image)["pixel_values"]
        torch.testing.assert_close(torch.from_numpy(theirs[name]), ours, atol=5e-6, rtol=0)


# Prompts


def render(messages: list[dict], **options) -> str:
    return render_jinja_template(conversations=[messages], chat_template=TEMPLATE, bos_token="<s>", **options)[0][0]


def user(content) -> dict:
    return {"role": "user", "content": content}


IMAGE = {"type": "image", "image": "page.png"}
EMPTY_SYSTEM = "<s><SPECIAL_10>System\n\n"
ANSWER = "<SPECIAL_11>Assistant\n<think></think>"
THOUGHT = "<SPECIAL_11>Assistant\n<think>\n"


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], "<SPECIAL_11>User\n\n" + ANSWER),
        ([user("<image>\nTotal?")], "<SPECIAL_11>User\n<image>\nTotal?\n" + ANSWER),
        ([user([{"type": "text", "text": "\n\nTotal?"}, IMAGE])], "<SPECIAL_11>User\n<image>\nTotal?\n" + ANSWER),
        ([user([IMAGE, "A", IMAGE, "B"])], "<SPECIAL_11>User\n<image 1><image> <image 2><image>\nAB\n" + ANSWER),
        ([user([IMAGE, "Here: <image>"])], "<SPECIAL_11>User\nHere: <image>\n" + ANSWER),
        ([user("a /think b")], "<SPECIAL_11>User\na  b\n" + THOUGHT),
        ([user("/think a /no_think")], "<SPECIAL_11>User\n a \n" + ANSWER),
        ([user("/no_think a /think")], "<SPECIAL_11>User\n a \n" + THOUGHT),
        ([user("a </think> b")], "<SPECIAL_11>User\na </think> b\n" + ANSWER),
        (
            [user("1 /think"), {"role": "assistant", "content": "2 /no_think"}, user("3")],
            "<SPECIAL_11>User\n1 \n<SPECIAL_11>Assistant\n2 /no_think\n<SPECIAL_12>\n<SPECIAL_11>User\n3\n" + THOUGHT,
        ),
    ],
)
def test_prompts_have_the_published_format(messages, expected):
    assert render(messages, add_generation_prompt=True) == EMPTY_SYSTEM + expected


def test_a_system_text_is_printed_and_can_switch():
    messages = [{"role": "system", "content": "Be brief. /think"}, user("Hi")]
    expected = "<s><SPECIAL_10>System\nBe brief. \n<SPECIAL_11>User\nHi\n"
    assert render(messages, add_generation_prompt=True) == expected + THOUGHT
    assert render(messages, add_generation_prompt=True, enable_thinking=False) == expected + ANSWER
    assert render([user("Hi /no_think")], add_generation_prompt=True, enable_thinking=True).endswith(THOUGHT)


def test_tools_are_described_called_and_answered():
    tool = {"type": "function", "function": {"name": "rate", "parameters": {}}}
    messages = [
        {"role": "system", "content": "Help."},
        user("In euros?"),
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "rate", "arguments": {"a": "EUR"}}}],
        },
        {"role": "tool", "content": "0.9"},
        {"role": "tool", "content": "1.1"},
        user("And?"),
    ]
    assert render(messages, tools=[tool, tool], add_generation_prompt=True) == (
        "<s><SPECIAL_10>System\nHelp.\n\nThese functions can be called:\n"
        '<AVAILABLE_TOOLS>[{"name": "rate", "parameters": {}}, {"name": "rate", "parameters": {}}]</AVAILABLE_TOOLS>\n\n'
        'To call some, answer with <TOOLCALL>[{"name": "the name", "arguments": {"the argument": "its value"}}]'
        "</TOOLCALL>. What they return comes as <TOOL_RESPONSE>[...]</TOOL_RESPONSE>.\n"
        "<SPECIAL_11>User\nIn euros?\n"
        '<SPECIAL_11>Assistant\n<TOOLCALL>[{"name": "rate", "arguments": {"a": "EUR"}}]</TOOLCALL>\n<SPECIAL_12>\n'
        "<SPECIAL_11>User\n<TOOL_RESPONSE>[0.9, 1.1]</TOOL_RESPONSE>\n"
        "<SPECIAL_11>User\nAnd?\n" + ANSWER
    )
    assert render(messages[:5], tools=[tool]).endswith("[0.9, 1.1]</TOOL_RESPONSE>\n")


def test_the_template_marks_what_the_assistant_writes():
    messages = [user("One?"), {"role": "assistant", "content": "1"}, user("Two?")]
    prompts, spans = render_jinja_template(
        conversations=[messages], chat_template=TEMPLATE, return_assistant_tokens_mask=True, bos_token="<s>"
    )
    assert [prompts[0][begin:end] for begin, end in spans[0]] == ["1\n<SPECIAL_12>"]
    assert render(messages[:2], continue_final_message=True).endswith("<SPECIAL_11>Assistant\n1")


@pytest.mark.parametrize(
    "messages",
    [
        [user("Hi"), {"role": "system", "content": "late"}],
        [{"role": "critic", "content": "?"}],
        [user([{"type": "audio", "audio": "a.mp3"}])],
        [user({"type": "text"})],
    ],
)
def test_the_template_refuses_what_it_cannot_write(messages):
    with pytest.raises(jinja2.TemplateError):
        render(messages)


@pytest.mark.parametrize(
    "content", [None, "", "\na", [], [IMAGE], ["a"], [IMAGE, "\n\na"], ["a", IMAGE, "\nb", IMAGE], [IMAGE, "<image>b"]]
)
def test_the_template_flattens_parts_as_the_processor_does(content):
    flattened, _ = flatten_content(content, prompt_format=V2_FORMAT)
    assert render([user(content)]) == render([user(flattened)])


def decoded(processor, messages, **options) -> str:
    encoded = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, add_generation_prompt=True, **options
    )
    return processor.tokenizer.decode(encoded["input_ids"][0])


@pytest.fixture(scope="module")
def light_processor() -> NemotronVLV2Processor:
    """Needs no model, so it works on every transformers."""
    return NemotronVLV2Processor(NemotronVLImageProcessor(image_size=64, **V2_RECIPE), make_v2_tokenizer())


def test_images_come_first_and_user_text_is_data(light_processor):
    small = {"type": "image", "image": PAGE.resize((40, 40))}
    text = {"type": "text", "text": "\nIs <image> <SPECIAL_12> text?"}
    found = decoded(light_processor, [user([text, small, small])])
    run = "<img>" + 4 * "<image>" + "</img>"
    question = "Is <image> <SPECIAL_12> text?"
    assert found == f"{EMPTY_SYSTEM}<SPECIAL_11>User\n<image 1>{run} <image 2>{run}\n{question}\n{ANSWER}"
    ids = light_processor.apply_chat_template([user([text, small, small])], tokenize=True)[0]
    assert ids.count(light_processor.image_token_id) == 8
    assert ids.count(light_processor.tokenizer.eos_token_id) == 0


def test_the_processor_asks_for_reasoning(light_processor):
    assert decoded(light_processor, [user("Hi")], enable_thinking=True).endswith(THOUGHT)
    assert decoded(light_processor, [user("Hi /think")], enable_thinking=False).endswith("Hi \n" + ANSWER)
    assert light_processor.split_reasoning("Hm.</think>\n\n12") == ("Hm.", "12")


@pytest.mark.parametrize(
    ("text", "thinking", "parts"),
    [
        ("I add up.\n</think>\n\nIt is 12.", True, ("I add up.", "It is 12.")),
        ("<think>\nI add up.</think>It is 12.", False, ("I add up.", "It is 12.")),
        ("It is 12.", False, ("", "It is 12.")),
        ("I add up and was cut", True, ("I add up and was cut", "")),
        ("<think>I add up and was cut", False, ("I add up and was cut", "")),
        ("</think>12 </think>", True, ("", "12 </think>")),
    ],
)
def test_reasoning_and_answer_are_told_apart(text, thinking, parts):
    assert split_reasoning(text, thinking) == parts


@needs_nemotron_h
def test_chat_asks_for_reasoning_and_forgets_it(model, processor, monkeypatch):
    written = processor.tokenizer("Hm.</think>\n12", add_special_tokens=False, return_tensors="pt")["input_ids"]
    prompts = []

    def generate(input_ids, **_):
        prompts.append(processor.tokenizer.decode(input_ids[0]))
        return torch.cat([input_ids, written], dim=1)

    monkeypatch.setattr(model, "generate", generate)
    answer, history = model.chat(processor, None, "Sum?", GREEDY, return_history=True, enable_thinking=True)
    assert prompts[-1].endswith("Sum?\n" + THOUGHT)
    assert answer == "Hm.</think>\n12" and history == [("Sum?", "12")]
    _, history = model.chat(processor, None, "Sum?", GREEDY, history, return_history=True)
    assert prompts[-1].endswith("<SPECIAL_11>Assistant\n12\n<SPECIAL_12>\n<SPECIAL_11>User\nSum?\n" + ANSWER)
    assert history[-1] == ("Sum?", "Hm.</think>\n12")  # nobody asked for reasoning: it is an answer


@needs_nemotron_h
def test_chat_numbers_several_images(model, processor):
    features = processor.image_processor([PAGE, PAGE])
    _, history = model.chat(processor, question="Sum?", generation_config=GREEDY, return_history=True, **features)
    assert history[0][0] == "<image 1><image> <image 2><image>\nSum?"


def test_the_8b_does_not_think(tiny_checkpoint):
    model = Llama_Nemotron_Nano_VL.from_pretrained(tiny_checkpoint)
    processor = NemotronVLProcessor.from_pretrained(tiny_checkpoint)
    with pytest.raises(ValueError, match="enable_thinking=True has no effect"):
        model.chat(processor, None, "Hi", GREEDY, enable_thinking=True)


# Quantised

SUBSETS = {
    "everything": (),
    "only the MLPs": ("q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "out_proj"),
    "all but what feeds attention": ("q_proj", "in_proj", "out_proj"),
}


@needs_nemotron_h
@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("format_name", ["nvfp4", "fp8", "awq"])
@torch.no_grad()
def test_any_quantised_subset_loads_packed_and_plain(tiny_v2_checkpoint, tmp_path, inputs, format_name, subset):
    model = NemotronH_Nano_VL_V2.from_pretrained(tiny_v2_checkpoint).eval()
    quantize_model(model, format_name, group_size=32, keep=SUBSETS[subset])
    kinds = {name.rsplit(".", 1)[-1] for name, _ in packed_linears(model)}
    everything = {"q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "out_proj", "up_proj", "down_proj"}
    left = everything - set(SUBSETS[subset])
    assert kinds == (left - {"k_proj", "v_proj"} if "q_proj" in SUBSETS[subset] else left)
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert sum(tensor.element_size() == 1 or name.endswith("qweight") for name, tensor in stored.items()) >= 4
    for dequantize in (False, True):
        loaded = NemotronH_Nano_VL_V2.from_pretrained(tmp_path, dequantize=dequantize).eval()
        assert len(list(packed_linears(loaded))) == (0 if dequantize else len(list(packed_linears(model))))
        torch.testing.assert_close(loaded(**inputs).logits, expected, atol=1e-5, rtol=1e-5)


@needs_nemotron_h
@pytest.mark.parametrize("quantised", [True, False])
@torch.no_grad()
def test_cache_scales_under_the_mixer_are_kept(tiny_v2_checkpoint, tmp_path, inputs, quantised, capsys):
    """As modelopt exports them with an FP8 cache, beside quantised and beside plain projections; old description."""
    model = NemotronH_Nano_VL_V2.from_pretrained(tiny_v2_checkpoint).eval()
    attention = [layer for layer, kind in enumerate("M-*M*-") if kind == "*"]
    quantize_model(model, "fp8", keep=() if quantised else ("q_proj",))
    expected = model(**inputs).logits
    source = tmp_path / "source"
    shutil.copytree(tiny_v2_checkpoint, source)
    model.save_pretrained(source)
    weights = load_file(source / "model.safetensors")
    scales = {
        f"{BACKBONE}layers.{layer}.mixer.{kind}_proj.{kind}_scale": torch.tensor(0.5)
        for layer in attention
        for kind in "kv"
    }
    save_file({**weights, **scales}, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (source / "config.json").write_text(json.dumps(config))
    quantization = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["model.layers.backbone*"]}
    (source / "hf_quant_config.json").write_text(
        json.dumps({"producer": {"name": "modelopt"}, "quantization": quantization})
    )
    assert adopt.main([str(source), "--check"]) == 0
    assert f"{len(list(packed_linears(model)))} layers are FP8" in capsys.readouterr().out
    loaded = NemotronH_Nano_VL_V2.from_pretrained(source).eval()
    torch.testing.assert_close(loaded(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
    loaded.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved/model.safetensors")
    assert saved.keys() == weights.keys() | scales.keys() and float(saved[next(iter(scales))]) == 0.5


@needs_nemotron_h
def test_packed_layers_equal_layers_of_their_dequantised_weights(model, inputs):
    """Mamba, attention and MLP projections are all called as layers, none reads a packed weight."""
    for block in model.language_model.backbone.layers:
        for name, linear in block.named_modules():
            if isinstance(linear, torch.nn.Linear):
                tensors = {"weight": linear.weight.to(torch.float8_e4m3fn), "weight_scale": torch.tensor(1.0)}
                packed = make_packed_linear(linear, "FP8", tensors)
                hidden_states = torch.randn(2, 3, linear.in_features)
                expected = hidden_states @ tensors["weight"].float().T
                torch.testing.assert_close(packed(hidden_states), expected, msg=name)
