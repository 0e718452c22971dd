"""The files at the root describe the 8B: its config, its weights by name, its prompts."""

import json
import shutil

import jinja2
import pytest
import torch
from nemotron_vl.configuration_nemotron_vl import NemotronVLConfig
from nemotron_vl.image_processing import NemotronVLImageProcessor
from nemotron_vl.modeling_nemotron_vl import Llama_Nemotron_Nano_VL
from nemotron_vl.prompts import flatten_content
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from tools import ROOT
from tools.build_index import build_index, main
from tools.tiny_checkpoint import IMAGE_TOKENS, make_tokenizer

TOWER = "vision_model.radio_model.model."
BLOCK = TOWER + "blocks.{layer}."
LAYER = "language_model.model.layers.{layer}."
# Name and shape of every published tensor; {layer} runs over 32 in the tower and in the language model alike.
PUBLISHED_SHAPES = {
    TOWER + "patch_generator.embedder.weight": (1280, 768),
    TOWER + "patch_generator.pos_embed": (1, 16384, 1280),
    TOWER + "patch_generator.cls_token.token": (8, 1280),
    "vision_model.radio_model.input_conditioner.norm_mean": (3, 1, 1),
    "vision_model.radio_model.input_conditioner.norm_std": (3, 1, 1),
    BLOCK + "norm1.weight": (1280,),
    BLOCK + "norm1.bias": (1280,),
    BLOCK + "norm2.weight": (1280,),
    BLOCK + "norm2.bias": (1280,),
    BLOCK + "attn.qkv.weight": (3840, 1280),
    BLOCK + "attn.qkv.bias": (3840,),
    BLOCK + "attn.proj.weight": (1280, 1280),
    BLOCK + "attn.proj.bias": (1280,),
    BLOCK + "mlp.fc1.weight": (5120, 1280),
    BLOCK + "mlp.fc1.bias": (5120,),
    BLOCK + "mlp.fc2.weight": (1280, 5120),
    BLOCK + "mlp.fc2.bias": (1280,),
    "mlp1.0.weight": (5120,),
    "mlp1.0.bias": (5120,),
    "mlp1.1.weight": (4096, 5120),
    "mlp1.1.bias": (4096,),
    "mlp1.3.weight": (4096, 4096),
    "mlp1.3.bias": (4096,),
    "language_model.model.embed_tokens.weight": (128512, 4096),
    "language_model.lm_head.weight": (128512, 4096),
    "language_model.model.norm.weight": (4096,),
    LAYER + "self_attn.q_proj.weight": (4096, 4096),
    LAYER + "self_attn.k_proj.weight": (1024, 4096),
    LAYER + "self_attn.v_proj.weight": (1024, 4096),
    LAYER + "self_attn.o_proj.weight": (4096, 4096),
    LAYER + "mlp.gate_proj.weight": (14336, 4096),
    LAYER + "mlp.up_proj.weight": (14336, 4096),
    LAYER + "mlp.down_proj.weight": (4096, 14336),
    LAYER + "input_layernorm.weight": (4096,),
    LAYER + "post_attention_layernorm.weight": (4096,),
}
PUBLISHED_TEMPLATE = """\
{{- bos_token }}{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>

' + message['content'] | trim + '<|eot_id|>' }}{%- endfor %}{%- if add_generation_prompt %}{{- \
'<|start_header_id|>assistant<|end_header_id|>

' }}{%- endif %}"""


def read(name: str) -> dict:
    return json.loads((ROOT / name).read_text(encoding="utf-8"))


def render(messages: list[dict], template: str | None = None, **options) -> str:
    template = template or (ROOT / "chat_template.jinja").read_text(encoding="utf-8")
    options = {"bos_token": "<|begin_of_text|>", **options}
    return render_jinja_template(conversations=[messages], chat_template=template, **options)[0][0]


@pytest.fixture(scope="module")
def full_size_model() -> Llama_Nemotron_Nano_VL:
    with torch.device("meta"):
        return Llama_Nemotron_Nano_VL(NemotronVLConfig.from_pretrained(ROOT))


def test_the_root_config_builds_the_published_parameters(full_size_model):
    parameters = list(full_size_model.parameters())
    assert len(parameters) == 684
    assert sum(parameter.numel() for parameter in parameters) == 8_721_768_448
    assert sum(parameter.numel() for parameter in full_size_model.vision_model.parameters()) == 651_642_880


def test_every_tensor_has_its_published_name_and_shape(full_size_model):
    published = {name.format(layer=n): shape for name, shape in PUBLISHED_SHAPES.items() for n in range(32)}
    assert {name: tuple(tensor.shape) for name, tensor in full_size_model.state_dict().items()} == published


def test_the_index_names_exactly_the_tensors_of_the_model(full_size_model):
    index = read("model.safetensors.index.json")
    assert index["weight_map"].keys() == full_size_model.state_dict().keys()
    assert len(index["weight_map"]) == 686
    assert index["metadata"]["total_size"] == 17_443_536_908
    assert index["metadata"]["total_size"] == sum(2 * t.numel() for t in full_size_model.state_dict().values())


def test_the_index_is_what_its_script_writes():
    assert build_index(NemotronVLConfig.from_pretrained(ROOT)) == read("model.safetensors.index.json")


def test_the_index_script_fills_files_up_to_the_size_asked_for(tiny_checkpoint, tmp_path, capsys):
    shutil.copy(tiny_checkpoint / "config.json", tmp_path)
    assert main([str(tmp_path), "--max-shard-size", "0.0005", "--dtype", "F32"]) == 0
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    model = Llama_Nemotron_Nano_VL.from_pretrained(tiny_checkpoint)
    sizes = {name: tensor.numel() * 4 for name, tensor in model.state_dict().items()}
    assert index["weight_map"].keys() == sizes.keys()
    assert index["metadata"]["total_size"] == sum(sizes.values())
    for file in set(index["weight_map"].values()):
        held = [sizes[name] for name, place in index["weight_map"].items() if place == file]
        assert len(held) == 1 or sum(held) <= 500_000
    assert f"{len(sizes)} tensors" in capsys.readouterr().out


def test_the_root_config_says_what_the_default_config_says():
    root, default = NemotronVLConfig.from_pretrained(ROOT).to_dict(), NemotronVLConfig().to_dict()
    described = {"architectures", "torch_dtype", "dtype", "transformers_version", "_name_or_path"}
    for config in (root, default, *(each[name] for each in (root, default) for name in ("llm_config",))):
        for name in described & config.keys():
            del config[name]
    root_vision, vision = root.pop("vision_config"), default.pop("vision_config")
    assert root == default
    # The root also states the published training arguments; the sizes that follow from them are the defaults.
    differing = {name for name in vision if root_vision[name] != vision[name]}
    assert differing <= {"args", *described}


def test_the_root_config_states_what_other_engines_read():
    config = read("config.json")
    assert config["architectures"] == ["Llama_Nemotron_Nano_VL"] == [config["model_type"]]
    assert config["torch_dtype"] == "bfloat16"
    assert config["llm_config"]["rope_theta"] == 500000.0 and "rope_parameters" not in config["llm_config"]
    assert config["vision_config"]["args"]["model"] == "vit_huge_patch16_224"
    doors = {"AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText"}
    assert doors <= config["auto_map"].keys()
    assert "attn_implementation" not in config


def test_the_root_config_survives_saving(tmp_path):
    config = NemotronVLConfig.from_pretrained(ROOT)
    config.save_pretrained(tmp_path)
    reloaded = NemotronVLConfig.from_pretrained(tmp_path)
    assert {**reloaded.to_dict(), "transformers_version": ""} == {**config.to_dict(), "transformers_version": ""}
    written, root = json.loads((tmp_path / "config.json").read_text()), read("config.json")
    assert written["vision_config"]["args"] == root["vision_config"]["args"]
    assert root.keys() == written.keys()


def test_greedy_generation_ends_at_every_end_token_of_llama():
    generation = GenerationConfig.from_pretrained(ROOT)
    assert (generation.bos_token_id, generation.pad_token_id) == (128000, 128004)
    assert generation.eos_token_id == [128009, 128001, 128008]
    assert generation.do_sample is False


def test_the_root_image_processor_has_the_published_recipe():
    preprocessor = read("preprocessor_config.json")
    for name in ("auto_map", "processor_class"):
        value = preprocessor.pop(name)
        assert value
    default = NemotronVLImageProcessor().to_dict()
    default.pop("auto_map")
    assert preprocessor == default
    assert read("preprocessor_config.json")["auto_map"] == {
        "AutoImageProcessor": "image_processing.NemotronVLImageProcessor",
        "AutoProcessor": "processing_nemotron_vl.NemotronVLProcessor",
        "AutoVideoProcessor": "video_processing.NemotronVLVideoProcessor",
    }


def test_the_root_tokenizer_files_need_only_the_vocabulary_beside_them(tmp_path):
    make_tokenizer().save_pretrained(tmp_path / "vocabulary")
    for name in ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "config.json"):
        shutil.copy(ROOT / name, tmp_path / name)
    for module in ROOT.glob("*.py"):
        shutil.copy(module, tmp_path)
    shutil.copy(tmp_path / "vocabulary/tokenizer.json", tmp_path / "tokenizer.json")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(tokenizer) is PreTrainedTokenizerFast
    tokenizer.save_pretrained(tmp_path / "saved")  # without our code, so it must name none
    assert type(AutoTokenizer.from_pretrained(tmp_path / "saved")) is PreTrainedTokenizerFast
    assert tokenizer.bos_token == "<|begin_of_text|>"
    assert tokenizer.eos_token == "<|eot_id|>"
    assert tokenizer.pad_token == "<|finetune_right_pad_id|>"
    assert tokenizer.model_max_length == 16384
    assert tokenizer.padding_side == "left"
    assert tokenizer.model_input_names == ["input_ids", "attention_mask"]
    assert [token for token in tokenizer.all_special_tokens if token in IMAGE_TOKENS] == IMAGE_TOKENS
    assert len(tokenizer) == len(make_tokenizer())
    assert tokenizer.decode(tokenizer.encode("No . , 's", add_special_tokens=False)) == "No . , 's"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == render(
        [{"role": "user", "content": "Hi"}]
    )


CONVERSATIONS = [
    [],
    [{"role": "user", "content": "<image>\nWhat is the total?"}],
    [{"role": "system", "content": " Answer.\n"}, {"role": "user", "content": "\n\tHello {{ x }} "}],
    [{"role": "user", "content": ""}, {"role": "assistant", "content": " 12.50 \n"}, {"role": "user", "content": "?"}],
    [
        {"role": "user", "content": "<|eot_id|>"},
        {"role": "assistant", "content": "a"},
        {"role": "tool", "content": "b"},
    ],
]


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_string_contents_render_as_published(messages, add_generation_prompt):
    options = {"add_generation_prompt": add_generation_prompt}
    assert render(messages, **options) == render(messages, PUBLISHED_TEMPLATE, **options)


def test_the_published_template_is_the_golden_one(golden_8b):
    assert (golden_8b / "checkpoint/chat_template.jinja").read_text() == PUBLISHED_TEMPLATE


IMAGE = {"type": "image", "image": "page.png"}
URL = {"type": "image_url", "image_url": {"url": "data:,"}}
TEXTS = [{"type": "text", "text": text} for text in ("Read this.", "\nAnd this.", "", " \n", "\n")]
CONTENTS = [
    None,
    "A string with <image>",
    [],
    [IMAGE],
    [URL, {"type": "image_url", "image_url": "data:,"}],
    [TEXTS[0], "plain", TEXTS[1]],
    [TEXTS[0], IMAGE],
    *[[IMAGE, text, URL] for text in [*TEXTS, "plain", "\nplain"]],
    *[[text, IMAGE, IMAGE, text] for text in TEXTS],
]


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("role", ["user", "assistant", "tool"])
def test_the_template_flattens_parts_as_the_processor_does(content, role):
    flattened, _ = flatten_content(content)
    assert render([{"role": role, "content": content}]) == render([{"role": role, "content": flattened}])


def test_an_image_stands_on_a_line_of_its_own():
    rendered = render([{"role": "user", "content": [IMAGE, IMAGE, TEXTS[0]]}])
    assert rendered.endswith("<|end_header_id|>\n\n<image>\n<image>\nRead this.<|eot_id|>")


@pytest.mark.parametrize("content", [[{"type": "file", "file": {}}], [{"text": "no type"}], {"type": "text"}])
def test_the_template_refuses_what_it_cannot_write(content):
    with pytest.raises(jinja2.TemplateError, match="content"):
        render([{"role": "user", "content": content}])


def test_the_template_marks_what_the_assistant_writes():
    messages = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": " 1 "},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": [{"type": "text", "text": "2"}]},
    ]
    template = (ROOT / "chat_template.jinja").read_text(encoding="utf-8")
    prompts, spans = render_jinja_template(
        conversations=[messages], chat_template=template, return_assistant_tokens_mask=True, bos_token="<s>"
    )
    assert [prompts[0][begin:end] for begin, end in spans[0]] == ["1<|eot_id|>", "2<|eot_id|>"]


def test_an_open_last_message_can_be_continued():
    messages = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "The"}]
    assert render(messages, continue_final_message=True).endswith("<|end_header_id|>\n\nThe")


@pytest.mark.parametrize("system", ["Answer.", None])
def test_tools_are_described_in_one_system_block(system):
    tools = [{"type": "function", "function": {"name": "total", "parameters": {}}}]
    call = {"type": "function", "function": {"name": "total", "arguments": {"page": 1}}}
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": "user", "content": "Sum"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    messages += [{"role": "tool", "content": "12.50"}]
    prompt = render(messages, tools=tools, add_generation_prompt=True)
    header, user, assistant, tool, _ = prompt.split("<|eot_id|>")
    assert header.count("system") == 1 and '"name": "total"' in header
    assert header.endswith("\n\nAnswer.") or not system
    assert user == "<|start_header_id|>user<|end_header_id|>\n\nSum"
    assert assistant.endswith('<|end_header_id|>\n\n{"name": "total", "parameters": {"page": 1}}')
    assert tool == "<|start_header_id|>tool<|end_header_id|>\n\n12.50"
