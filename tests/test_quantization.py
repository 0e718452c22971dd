"""Quantised checkpoints: what is read, what it computes, what is refused, and what is written back."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nemotron_vl.checkpoint import read_headers
from nemotron_vl.configuration_nemotron_vl import NemotronVLConfig, modelopt_quantization_config
from nemotron_vl.modeling_nemotron_vl import Llama_Nemotron_Nano_VL
from nemotron_vl.quantization_nemotron_vl import (
    FORMATS,
    QUANT_METHOD,
    PackedLinear,
    decode,
    decode_awq_gemm,
    decode_fp8,
    decode_nvfp4,
    decode_w4a16_awq,
    packed_linears,
)
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, FineGrainedFP8Config, PreTrainedTokenizerFast
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import AwqConfig

from tests.conftest import golden_formats, golden_inputs, load_weights, read_golden_cases
from tools import ROOT, chat, quantize

FORMAT_NAMES = ("nvfp4", "fp8", "awq")
GROUP_SIZE = 16
Q_PROJ = "language_model.model.layers.0.self_attn.q_proj"
K_PROJ = "language_model.model.layers.1.self_attn.k_proj"
PACKED_KEYS = {
    "nvfp4": {"weight": torch.uint8, "weight_scale": torch.float8_e4m3fn, "weight_scale_2": torch.float32},
    "fp8": {"weight": torch.float8_e4m3fn, "weight_scale": torch.float32},
    "awq": {"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors are tiny here: on a busy machine threads only wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def quantised(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, inputs: dict) -> dict[str, Path]:
    """The tiny checkpoint in every format, as `tools.quantize` writes it."""
    folders = {}
    for name in FORMAT_NAMES:
        model = Llama_Nemotron_Nano_VL.from_pretrained(tiny_checkpoint)
        statistics = quantize.calibrate(model, [inputs])
        quantize.quantize_model(model, name, statistics, GROUP_SIZE)
        folders[name] = tmp_path_factory.mktemp(f"tiny-{name}")
        quantize.save(model, tiny_checkpoint, folders[name])
    return folders


def load(folder: Path, **kwargs) -> Llama_Nemotron_Nano_VL:
    return Llama_Nemotron_Nano_VL.from_pretrained(folder, **kwargs)


@torch.no_grad()
def logits_of(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**inputs).logits


def edited(source: Path, folder: Path, change, config_change=None) -> Path:
    """Copy a checkpoint of one file to `folder`, with `change(tensors)` and `config_change(config)` applied."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if config_change:
        config = json.loads((folder / "config.json").read_text())
        config_change(config)
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def assert_same_bytes(left: torch.Tensor, right: torch.Tensor) -> None:
    assert (left.dtype, left.shape) == (right.dtype, right.shape)
    assert torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))


def without_description(config: dict) -> None:
    config.pop("quantization_config")


# --- formats, against plain loops over the specification ---


def test_nvfp4_weight_is_code_times_product_of_both_scales():
    generator = torch.Generator().manual_seed(0)
    packed = torch.randint(0, 256, (6, 16), dtype=torch.uint8, generator=generator)
    scale = torch.rand(6, 2, generator=generator).to(torch.float8_e4m3fn)
    scale_2 = torch.tensor(0.0137)
    weight = decode_nvfp4({"weight": packed, "weight_scale": scale, "weight_scale_2": scale_2}, torch.float32)
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    for row in range(6):
        for column in range(32):
            code = int(packed[row, column // 2]) >> (4 if column % 2 else 0) & 15
            expected = (scale[row, column // 16].float() * scale_2) * values[code & 7] * (-1 if code & 8 else 1)
            assert weight[row, column] == expected


def test_fp8_weight_is_value_times_scale_for_every_byte():
    stored = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(16, 16)
    for scale in (torch.tensor(0.0031), torch.tensor([0.0031])):
        weight = decode_fp8({"weight": stored, "weight_scale": scale}, torch.float32)
        torch.testing.assert_close(weight, stored.float() * scale, rtol=0, atol=0, equal_nan=True)


def test_w4a16_awq_holds_two_rows_in_a_byte_and_scales_the_columns():
    generator = torch.Generator().manual_seed(0)
    packed = torch.randint(0, 256, (3, 256), dtype=torch.uint8, generator=generator)
    scale, pre_quant = torch.rand(6, 2, generator=generator), torch.rand(256, generator=generator)
    tensors = {"weight": packed, "weight_scale": scale, "pre_quant_scale": pre_quant}
    weight = decode_w4a16_awq(tensors, torch.float32)
    for row in range(6):
        for column in range(0, 256, 17):
            nibble = int(packed[row // 2, column]) >> (4 if row % 2 else 0) & 15
            signed = nibble - 16 if nibble > 7 else nibble
            expected = signed * scale[row, column // 128] * pre_quant[column]
            torch.testing.assert_close(weight[row, column], expected)


def test_awq_gemm_weight_is_code_minus_zero_times_scale():
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(-(2**31), 2**31, (32, 2), generator=generator).to(torch.int32)
    zero_words = torch.randint(-(2**31), 2**31, (2, 2), generator=generator).to(torch.int32)
    scales = torch.rand(2, 16, generator=generator).half()
    weight = decode_awq_gemm({"qweight": words, "qzeros": zero_words, "scales": scales}, torch.float32)
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def unpack(word: int) -> dict[int, int]:
        return {order[i]: (word & 0xFFFFFFFF) >> 4 * i & 15 for i in range(8)}

    for k in range(32):
        for n in range(16):
            code = unpack(int(words[k, n // 8]))[n % 8]
            zero = unpack(int(zero_words[k // 16, n // 8]))[n % 8]
            assert weight[n, k] == (code - zero) * scales[k // 16, n].float()


def test_nvfp4_encoder_keeps_representable_weights_and_rounds_ties_to_even():
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    assert quantize.encode_e2m1(values).tolist() == list(range(8))
    assert quantize.encode_e2m1(-values).tolist() == [0, *range(9, 16)]  # no negative zero from a zero
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 9.0])
    assert quantize.encode_e2m1(ties).tolist() == [0, 2, 2, 4, 4, 6, 6, 7]
    weight = torch.cat((values, -values)).repeat(4, 2)
    assert torch.equal(decode_nvfp4(quantize.encode_nvfp4(weight), torch.float32), weight)


def test_rounding_to_e2m1_is_encoding_and_decoding():
    values = torch.cat((torch.linspace(-8, 8, 4097), torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])))
    codes = quantize.encode_e2m1(values).int()
    expected = torch.tensor(quantize.E2M1_VALUES)[codes & 7] * torch.where(codes > 7, -1.0, 1.0)
    assert torch.equal(quantize.round_to_e2m1(values), expected)


def test_block_scales_of_nvfp4_have_the_least_error_of_the_outputs():
    """Against a plain search over the same scales, block by block."""
    generator = torch.Generator().manual_seed(0)
    weight, rows = (torch.randn(shape, generator=generator) for shape in ((12, 32), (50, 32)))
    rows *= torch.randn(32, generator=generator).exp()
    weight[3, :16] = 0
    plain, chosen = quantize.encode_nvfp4(weight), quantize.encode_nvfp4(weight, rows=rows)
    assert torch.equal(chosen["weight_scale_2"], plain["weight_scale_2"])
    assert (chosen["weight_scale"].float() >= plain["weight_scale"].float()).all()
    decoded, unit = decode_nvfp4(chosen, torch.float32), float(plain["weight_scale_2"])
    changed = 0
    for output in range(12):
        for block, columns in enumerate((slice(0, 16), slice(16, 32))):
            part, inputs, errors = weight[output, columns], rows[:, columns], []
            byte = int(plain["weight_scale"][output, block].view(torch.uint8))
            for code in range(byte, min(byte + 6, 126) + 1):
                factor = float(torch.tensor(code, dtype=torch.uint8).view(torch.float8_e4m3fn).float()) * unit
                tried = quantize.round_to_e2m1(part / factor) * factor
                errors.append(float((inputs @ (tried - part)).square().sum()))
            found = float((inputs @ (decoded[output, columns] - part)).square().sum())
            assert found == pytest.approx(min(errors), rel=1e-3, abs=1e-9)
            changed += found < 0.99 * errors[0]
    assert changed > 12


@pytest.mark.parametrize(("name", "expected"), [("nvfp4", 0.096), ("fp8", 0.026), ("awq", 0.1)])
def test_encoders_have_the_error_of_their_format(name: str, expected: float):
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    tensors = quantize.encode(weight, name, weight.abs().amax(), 128)
    decoded = FORMATS[quantize.FORMAT_NAMES[name]].decode(tensors, torch.float32)
    assert float((decoded - weight).norm() / weight.norm()) == pytest.approx(expected, rel=0.1)


# --- the published outputs ---


@pytest.mark.parametrize("dequantize", [False, True])
@pytest.mark.parametrize("name", golden_formats())
def test_logits_ids_and_answers_equal_the_golden(golden_8b: Path, name: str, dequantize: bool):
    expected = load_file(golden_8b / f"expected_{name}.safetensors")
    answers = json.loads((golden_8b / f"expected_{name}.json").read_text())
    source = golden_8b / f"checkpoint_{name}"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
    model = load(source, dequantize=dequantize)
    stored = [key for key in load_weights(source) if key.endswith((".weight_scale", ".qweight"))]
    assert stored and len(list(packed_linears(model))) == (0 if dequantize else len(stored))
    for case, options in read_golden_cases(golden_8b).items():
        inputs = golden_inputs(golden_8b, case) | {"input_ids": expected[f"{case}.input_ids"]}
        logits, last = logits_of(model, inputs), expected[f"{case}.logits_last"]
        torch.testing.assert_close(logits[:, -last.shape[1] :], last, rtol=0, atol=1e-4)
        output = model.generate(
            **inputs,
            attention_mask=torch.ones_like(inputs["input_ids"]),
            max_new_tokens=options["max_new_tokens"],
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
        new_ids = output[:, inputs["input_ids"].shape[1] :]
        assert torch.equal(new_ids, expected[f"{case}.output_ids"])
        assert tokenizer.decode(new_ids[0]).strip() == answers[case]


@pytest.mark.parametrize("name", golden_formats())
def test_a_golden_checkpoint_is_saved_as_it_was(golden_8b: Path, tmp_path: Path, name: str):
    source = golden_8b / f"checkpoint_{name}"
    load(source).save_pretrained(tmp_path)
    before, after = load_weights(source), load_weights(tmp_path)
    assert before.keys() == after.keys()
    assert all(before[key].dtype == after[key].dtype and torch.equal(before[key], after[key]) for key in before)
    block = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    published = json.loads((source / "config.json").read_text()).get("quantization_config")
    assert block == (
        published or modelopt_quantization_config(json.loads((source / "hf_quant_config.json").read_text()))
    )


@pytest.mark.parametrize("name", golden_formats())
def test_encoders_write_the_golden_bytes(golden_8b: Path, name: str):
    plain, stored = load_weights(golden_8b / "checkpoint"), load_weights(golden_8b / f"checkpoint_{name}")
    config = json.loads((golden_8b / f"checkpoint_{name}" / "config.json").read_text())
    group_size = config.get("quantization_config", {}).get("group_size", GROUP_SIZE)  # only AWQ has it there
    for layer in range(config["llm_config"]["num_hidden_layers"]):
        for names, _ in quantize.LLAMA_GROUPS:
            keys = [f"language_model.model.layers.{layer}.{module}" for module in names]
            amax = torch.stack([plain[f"{key}.weight"].abs().amax() for key in keys]).amax()
            for key in keys:
                for part, tensor in quantize.encode(plain[f"{key}.weight"], name, amax, group_size).items():
                    assert_same_bytes(tensor, stored[f"{key}.{part}"])


def test_the_form_of_the_old_golden_file_becomes_the_form_of_the_new(golden_8b: Path):
    compared = []
    for file in golden_8b.glob("checkpoint_*/hf_quant_config.json"):
        block = json.loads(file.with_name("config.json").read_text()).get("quantization_config")
        if block is not None:
            assert modelopt_quantization_config(json.loads(file.read_text())) == block
            compared.append(file.parent.name)
    if not compared:
        pytest.skip("no quantised checkpoint of this golden set is described in both forms")


# --- loading and saving ---


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_packed_and_dequantised_models_compute_the_same(quantised: dict, inputs: dict, name: str):
    packed, plain = load(quantised[name]), load(quantised[name], dequantize=True)
    layer = packed.get_submodule(Q_PROJ)
    assert isinstance(layer, PackedLinear)
    for key, dtype in PACKED_KEYS[name].items():
        assert getattr(layer, key).dtype == dtype
        assert not getattr(layer, key).requires_grad
    assert type(plain.get_submodule(Q_PROJ)) is nn.Linear
    assert not any(isinstance(module, PackedLinear) for module in plain.modules())
    torch.testing.assert_close(logits_of(packed, inputs), logits_of(plain, inputs), rtol=0, atol=1e-5)
    # The same, once loaded.
    packed.dequantize()
    assert torch.equal(packed.get_submodule(Q_PROJ).weight, plain.get_submodule(Q_PROJ).weight)


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_a_packed_model_reloads_equal_and_keeps_its_layout(quantised: dict, inputs: dict, tmp_path: Path, name: str):
    model = load(quantised[name])
    model.save_pretrained(tmp_path)
    before, after = load_file(quantised[name] / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(before[key].dtype == after[key].dtype and torch.equal(before[key], after[key]) for key in before)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (quantised[name], tmp_path)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert configs[1]["quantization_config"]["quant_method"] == ("awq" if name == "awq" else "modelopt")
    assert str(tmp_path.parent) not in json.dumps(configs[1]["quantization_config"])
    assert torch.equal(logits_of(load(tmp_path), inputs), logits_of(model, inputs))


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_a_packed_model_is_saved_in_shards(quantised: dict, inputs: dict, tmp_path: Path, name: str):
    model = load(quantised[name])
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(logits_of(load(tmp_path), inputs), logits_of(model, inputs))


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_a_dequantised_model_is_saved_as_a_plain_one(quantised: dict, inputs: dict, tmp_path: Path, name: str):
    model = load(quantised[name], dequantize=True)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    tensors = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert not [key for key in tensors if "scale" in key or "qweight" in key]
    assert torch.equal(logits_of(load(tmp_path), inputs), logits_of(model, inputs))


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_tensors_decide_when_the_config_says_nothing(quantised: dict, inputs: dict, tmp_path: Path, name: str):
    silent = edited(quantised[name], tmp_path / "silent", lambda tensors: None, without_description)
    (silent / "hf_quant_config.json").unlink(missing_ok=True)
    model = load(silent)
    assert torch.equal(logits_of(model, inputs), logits_of(load(quantised[name]), inputs))
    model.save_pretrained(tmp_path / "saved")
    block = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert block["quant_method"] == ("awq" if name == "awq" else "modelopt")
    assert torch.equal(logits_of(load(tmp_path / "saved"), inputs), logits_of(model, inputs))


def test_exclude_lists_are_not_believed(quantised: dict, inputs: dict, tmp_path: Path):
    def exclude_all(config: dict) -> None:
        config["quantization_config"]["ignore"] = ["*", "model.layers.language_model*"]

    folder = edited(quantised["fp8"], tmp_path, lambda tensors: None, exclude_all)
    assert torch.equal(logits_of(load(folder), inputs), logits_of(load(quantised["fp8"]), inputs))


@pytest.mark.parametrize("place", ["hf_quant_config.json", "llm_config"])
def test_the_description_is_found_where_exporters_put_it(quantised: dict, inputs: dict, tmp_path: Path, place: str):
    def move(config: dict) -> None:
        block = config.pop("quantization_config")
        if place == "llm_config":
            config["llm_config"]["quantization_config"] = block

    folder = edited(quantised["fp8"], tmp_path, lambda tensors: None, move)
    if place == "llm_config":
        (folder / "hf_quant_config.json").unlink()
    assert NemotronVLConfig.from_pretrained(folder).quantization_config["quant_algo"] == "FP8"
    assert torch.equal(logits_of(load(folder), inputs), logits_of(load(quantised["fp8"]), inputs))
    plain = load(folder, dequantize=True)
    assert "quantization_config" not in json.dumps(plain.config.to_dict())


def test_a_description_without_quantised_tensors_is_dropped_with_a_warning(
    tiny_checkpoint: Path, inputs: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    def claim(config: dict) -> None:
        config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "FP8"}

    folder = edited(tiny_checkpoint, tmp_path, lambda tensors: None, claim)
    model = load(folder)
    assert not hasattr(model.config, "quantization_config")
    assert torch.equal(logits_of(model, inputs), logits_of(load(tiny_checkpoint), inputs))


def test_layers_of_one_checkpoint_may_differ_in_format(quantised: dict, inputs: dict, tmp_path: Path):
    plain = load(quantised["nvfp4"], dequantize=True).get_submodule(K_PROJ)

    def mix(tensors: dict) -> None:
        for key in [key for key in tensors if key.startswith(K_PROJ)]:
            del tensors[key]
        tensors[f"{K_PROJ}.weight"] = plain.weight.detach()
        for key, tensor in quantize.encode_fp8(torch.eye(64)).items():
            tensors[f"{Q_PROJ}.{key}"] = tensor
        del tensors[f"{Q_PROJ}.weight_scale_2"]

    model = load(edited(quantised["nvfp4"], tmp_path, mix))
    assert type(model.get_submodule(K_PROJ)) is nn.Linear
    assert model.get_submodule(Q_PROJ).format.name == "FP8"
    assert torch.allclose(model.get_submodule(Q_PROJ).dequantized_weight(torch.float32), torch.eye(64))


def test_a_quantised_tower_projector_and_head_load_too(quantised: dict, tmp_path: Path):
    names = ("vision_model.radio_model.model.blocks.0.attn.qkv", "mlp1.1", "language_model.lm_head")

    def pack(tensors: dict) -> None:
        for name in names:
            for key, tensor in quantize.encode_fp8(tensors[f"{name}.weight"]).items():
                tensors[f"{name}.{key}"] = tensor

    folder = edited(quantised["fp8"], tmp_path, pack)
    packed, plain = load(folder), load(folder, dequantize=True)
    assert all(isinstance(packed.get_submodule(name), PackedLinear) for name in names)
    pixel_values = torch.rand(2, 3, 64, 64)
    features = [torch.cat(list(model.get_image_features(pixel_values).pooler_output)) for model in (packed, plain)]
    torch.testing.assert_close(*features, rtol=0, atol=1e-5)


def test_scales_of_the_cache_and_of_activations_are_kept_and_change_nothing(
    quantised: dict, inputs: dict, tmp_path: Path
):
    def add(tensors: dict) -> None:
        tensors[f"{K_PROJ}.k_scale"] = torch.tensor(0.02)
        tensors[f"{K_PROJ.replace('k_proj', 'v_proj')}.v_scale"] = torch.tensor([0.03])
        tensors[f"{Q_PROJ}.input_scale"] = torch.tensor([5.0])

    folder = edited(quantised["fp8"], tmp_path / "kv", add)
    model = load(folder)
    assert torch.equal(logits_of(model, inputs), logits_of(load(quantised["fp8"]), inputs))
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved[f"{K_PROJ}.k_scale"] == 0.02
    assert saved[f"{Q_PROJ}.input_scale"].shape == (1,)


def test_cache_scales_of_an_unquantised_layer_are_kept(tiny_checkpoint: Path, inputs: dict, tmp_path: Path):
    def add(tensors: dict) -> None:
        tensors[f"{K_PROJ}.k_scale"] = torch.tensor(0.02)

    model = load(edited(tiny_checkpoint, tmp_path / "kv", add), torch_dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "saved")
    scale = load_file(tmp_path / "saved" / "model.safetensors")[f"{K_PROJ}.k_scale"]
    assert scale.dtype == torch.float32
    assert scale == torch.tensor(0.02)


@pytest.mark.parametrize("dequantize", [False, True])
@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_the_auto_classes_load_quantised_checkpoints(quantised: dict, inputs: dict, name: str, dequantize: bool):
    model = AutoModel.from_pretrained(quantised[name], trust_remote_code=True, dequantize=dequantize)
    packed = [module for module in model.modules() if type(module).__name__ == "PackedLinear"]
    assert len(packed) == (0 if dequantize else 14)
    expected = logits_of(load(quantised[name], dequantize=dequantize), inputs)
    assert torch.equal(logits_of(model, inputs), expected)


def test_the_names_of_transformers_stay_transformers_own():
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["awq"] is AwqConfig
    assert "modelopt" not in AUTO_QUANTIZATION_CONFIG_MAPPING
    assert AUTO_QUANTIZER_MAPPING[QUANT_METHOD].__name__ == "PackedQuantizer"


def test_engines_see_the_method_they_know(quantised: dict):
    assert NemotronVLConfig.from_pretrained(quantised["awq"]).quantization_config["quant_method"] == "awq"
    assert NemotronVLConfig.from_pretrained(quantised["nvfp4"]).quantization_config["quant_method"] == "modelopt"


def test_arguments_that_override_the_config_still_do(quantised: dict):
    model = load(quantised["fp8"], max_sequence_length=77, attn_implementation="eager")
    assert model.config.max_sequence_length == 77
    assert model.config.get_text_config()._attn_implementation == "eager"


def test_the_config_of_a_packed_model_loads_it_again(quantised: dict, inputs: dict):
    model = load(quantised["awq"])
    again = load(quantised["awq"], config=model.config)
    assert torch.equal(logits_of(model, inputs), logits_of(again, inputs))
    assert again.config.to_dict()["quantization_config"]["quant_method"] == "awq"


# --- devices, dtypes, training ---


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_bfloat16_computes_with_the_stored_scales(quantised: dict, inputs: dict, name: str, tmp_path: Path):
    packed = load(quantised[name], torch_dtype=torch.bfloat16)
    plain = load(quantised[name], torch_dtype=torch.bfloat16, dequantize=True)
    exact = load(quantised[name], dequantize=True).get_submodule(Q_PROJ).weight
    for key, dtype in PACKED_KEYS[name].items():
        assert getattr(packed.get_submodule(Q_PROJ), key).dtype == dtype
    assert torch.equal(plain.get_submodule(Q_PROJ).weight, exact.bfloat16())
    assert packed.dtype == torch.bfloat16
    batch = {**inputs, "pixel_values": inputs["pixel_values"].bfloat16()}
    reference = logits_of(load(quantised[name], dequantize=True), inputs)
    # A product of few rows does not round its weights to bfloat16, so the two differ, but not in their error.
    errors = [float((logits_of(model, batch) - reference).norm() / reference.norm()) for model in (packed, plain)]
    assert max(errors) < 0.03 and errors[0] < 1.1 * errors[1]
    packed.save_pretrained(tmp_path)
    before, after = load_file(quantised[name] / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before if key.startswith(Q_PROJ))


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_casting_a_packed_model_leaves_its_stored_tensors_alone(quantised: dict, inputs: dict, name: str):
    model = load(quantised[name])
    before = {key: tensor.clone() for key, tensor in model.get_submodule(Q_PROJ).packed_tensors().items()}
    model.to(torch.bfloat16)
    after = model.get_submodule(Q_PROJ).packed_tensors()
    assert all(before[key].dtype == after[key].dtype and torch.equal(before[key], after[key]) for key in before)
    assert logits_of(model, {**inputs, "pixel_values": inputs["pixel_values"].bfloat16()}).dtype == torch.bfloat16


@pytest.mark.parametrize("dequantize", [False, True])
@pytest.mark.parametrize(
    ("name", "device_map"), [("nvfp4", "cpu"), ("fp8", "auto"), *((name, "disk") for name in FORMAT_NAMES)]
)
def test_device_maps_and_offloading_compute_the_same(
    quantised: dict, inputs: dict, tmp_path: Path, name: str, device_map: str, dequantize: bool
):
    expected = logits_of(load(quantised[name], dequantize=dequantize, torch_dtype=torch.bfloat16), inputs)
    if device_map == "disk":
        parts = ("vision_model", "mlp1", "language_model.lm_head", "language_model.model.embed_tokens")
        parts += ("language_model.model.norm", "language_model.model.rotary_emb", "language_model.model.layers.0")
        device_map = {**dict.fromkeys(parts, "cpu"), "language_model.model.layers.1": "disk"}
    model = load(
        quantised[name],
        device_map=device_map,
        offload_folder=tmp_path,
        dequantize=dequantize,
        torch_dtype=torch.bfloat16,
    )
    if isinstance(device_map, dict):
        assert all(parameter.device.type == "meta" for parameter in model.get_submodule(K_PROJ).parameters())
    assert torch.equal(logits_of(model, inputs), expected)


def test_offloaded_layers_are_not_dequantised_in_place(quantised: dict, tmp_path: Path):
    device_map = {"vision_model": "cpu", "mlp1": "cpu", "language_model": "disk"}
    model = load(quantised["fp8"], device_map=device_map, offload_folder=tmp_path)
    with pytest.raises(ValueError, match="dequantize=True"):
        model.dequantize()


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_gradients_pass_through_packed_weights_and_do_not_change_them(quantised: dict, inputs: dict, name: str):
    gradients = []
    for dequantize in (False, True):
        model = load(quantised[name], dequantize=dequantize).train()
        model.requires_grad_(False)
        model.get_input_embeddings().weight.requires_grad_(True)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append(model.get_input_embeddings().weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "plain torch"])
@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_a_large_layer_is_dequantised_in_parts(
    quantised: dict, inputs: dict, name: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
):
    if not compiled:
        monkeypatch.setattr("nemotron_vl.cpu_matmul._library", lambda: None)
    model = load(quantised[name])
    layer = model.get_submodule("language_model.model.layers.0.mlp.gate_proj")  # 96 x 64
    hidden_states = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0))
    whole, logits = layer(hidden_states), logits_of(model, inputs)
    sizes = []

    def watched(*args) -> torch.Tensor:
        weight = decode(*args)
        sizes.append(tuple(weight.shape))
        return weight

    monkeypatch.setattr("nemotron_vl.quantization_nemotron_vl.CPU_CHUNK_WEIGHTS", 1600)
    monkeypatch.setattr("nemotron_vl.quantization_nemotron_vl.decode", watched)
    torch.testing.assert_close(layer(hidden_states), whole, rtol=0, atol=1e-6)
    assert sizes == [(24, 64)] * 4
    torch.testing.assert_close(logits_of(model, inputs), logits, rtol=0, atol=1e-5)


def test_the_backward_pass_keeps_the_packed_weight_only(quantised: dict):
    layer = load(quantised["nvfp4"]).get_submodule(Q_PROJ)
    hidden_states = torch.randn(2, 3, 64, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.shape), lambda _: None):
        output = layer(hidden_states)
    assert output.requires_grad
    assert (64, 64) not in [tuple(shape) for shape in saved]


def test_gradient_checkpointing_and_autocast_run_on_packed_weights(quantised: dict, inputs: dict):
    model = load(quantised["nvfp4"]).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert torch.isfinite(model.get_input_embeddings().weight.grad).all()


def test_packed_layers_have_shapes_on_the_meta_device(quantised: dict):
    """As tools that count memory or operations without any weights run a model."""
    layer = load(quantised["fp8"]).get_submodule(Q_PROJ).to("meta")
    assert layer(torch.empty(2, 3, layer.in_features, device="meta")).shape == (2, 3, layer.out_features)


# --- what is refused ---


def _drop(key):
    return lambda tensors: tensors.pop(key)


def _replace(key, make):
    return lambda tensors: tensors.__setitem__(key, make(tensors[key]))


DAMAGE = {
    "fp8 without scale": ("fp8", _drop(f"{Q_PROJ}.weight_scale"), "weight_scale.*F8_E4M3"),
    "fp8 scale per row": ("fp8", _replace(f"{Q_PROJ}.weight_scale", lambda t: t.expand(64).clone()), r"F32 \[64\]"),
    "fp8 scale in half": ("fp8", _replace(f"{Q_PROJ}.weight_scale", lambda t: t.half()), "weight_scale is F16"),
    "fp8 of another size": ("fp8", _replace(f"{Q_PROJ}.weight", lambda t: t[:32].clone()), r"F8_E4M3 \[32, 64\]"),
    "fp8 e5m2": (
        "fp8",
        _replace(f"{Q_PROJ}.weight", lambda t: t.float().to(torch.float8_e5m2)),
        r"F8_E5M2 \[64, 64\]",
    ),
    "nvfp4 without global scale": ("nvfp4", _drop(f"{Q_PROJ}.weight_scale_2"), "without weight_scale_2"),
    "nvfp4 without block scale": ("nvfp4", _drop(f"{Q_PROJ}.weight_scale"), "without weight_scale"),
    "nvfp4 with blocks of 32": (
        "nvfp4",
        _replace(f"{Q_PROJ}.weight_scale", lambda t: t[:, ::2].clone()),
        r"weight_scale is F8_E4M3 \[64, 2\]",
    ),
    "nvfp4 scales as bytes": (
        "nvfp4",
        _replace(f"{Q_PROJ}.weight_scale", lambda t: t.view(torch.uint8)),
        "weight_scale is U8",
    ),
    "scale without weight": ("nvfp4", _drop(f"{Q_PROJ}.weight"), "scales without a weight"),
    "awq without zeros": ("awq", _drop(f"{Q_PROJ}.qzeros"), "without qzeros"),
    "awq transposed (gemv)": (
        "awq",
        _replace(f"{Q_PROJ}.qweight", lambda t: t.t().contiguous()),
        r"qweight is I32 \[8, 64\]",
    ),
    "awq int16 (gemv_fast)": ("awq", _replace(f"{Q_PROJ}.qweight", lambda t: t.to(torch.int16)), r"I16 \[64, 8\]"),
    "compressed-tensors": (
        "nvfp4",
        lambda tensors: tensors.__setitem__(f"{Q_PROJ}.weight_packed", tensors.pop(f"{Q_PROJ}.weight")),
        "the layout of compressed-tensors",
    ),
    "gptq": (
        "awq",
        lambda tensors: tensors.__setitem__(f"{Q_PROJ}.g_idx", torch.zeros(64, dtype=torch.int32)),
        "g_idx",
    ),
    "awq groups": ("awq", _replace(f"{Q_PROJ}.scales", lambda t: t[:3].clone()), "do not divide"),
    "another name": (
        "fp8",
        lambda tensors: tensors.__setitem__(f"{Q_PROJ}.weight_zero_point", torch.zeros(1)),
        "weight_zero_point does not belong to FP8",
    ),
    "quantised norm": (
        "fp8",
        _replace("language_model.model.norm.weight", lambda t: t.to(torch.float8_e4m3fn)),
        "only Linear layers",
    ),
    "quantised table": (
        "fp8",
        _replace("language_model.model.embed_tokens.weight", lambda t: t.to(torch.float8_e4m3fn)),
        "only Linear layers",
    ),
    "unknown module": (
        "fp8",
        lambda tensors: tensors.__setitem__("language_model.model.layers.9.mlp.up_proj.weight_scale", torch.ones(())),
        "no such module",
    ),
    "int8": ("fp8", _replace(f"{Q_PROJ}.weight", lambda t: t.float().to(torch.int8)), r"I8 \[64, 64\]"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_unknown_and_incomplete_layouts_raise(quantised: dict, tmp_path: Path, damage: str):
    name, change, message = DAMAGE[damage]
    folder = edited(quantised[name], tmp_path, change)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_fp8_without_any_scale_or_description_is_never_loaded_as_plain_numbers(quantised: dict, tmp_path: Path):
    def strip(tensors: dict) -> None:
        for key in [key for key in tensors if key.endswith("_scale")]:
            del tensors[key]

    folder = edited(quantised["fp8"], tmp_path, strip, without_description)
    (folder / "hf_quant_config.json").unlink()
    for kwargs in ({}, {"dequantize": True}, {"ignore_mismatched_sizes": True}, {"output_loading_info": True}):
        with pytest.raises(ValueError, match=r"FP8 without weight_scale.*weight F8_E4M3 \["):
            load(folder, **kwargs)


def test_a_packed_state_dict_is_refused(quantised: dict):
    config = NemotronVLConfig.from_pretrained(quantised["fp8"])
    state_dict = load_file(quantised["fp8"] / "model.safetensors")
    with pytest.raises(ValueError, match="from its directory"):
        Llama_Nemotron_Nano_VL.from_pretrained(None, config=config, state_dict=state_dict)


def test_pickles_of_llm_awq_are_refused_with_the_way_out(tiny_checkpoint: Path, tmp_path: Path):
    for file in tiny_checkpoint.glob("*.json"):
        shutil.copy(file, tmp_path)
    torch.save({}, tmp_path / "nano-vl-w4-g128-awq-v2.pt")
    for path in (tmp_path, tmp_path / "nano-vl-w4-g128-awq-v2.pt"):
        with pytest.raises(ValueError, match=r"llm-awq.*tools\.quantize DIR --format awq"):
            load(path)


def test_a_quantised_checkpoint_is_not_quantised_again(quantised: dict):
    with pytest.raises(ValueError, match="quantised already"):
        load(quantised["fp8"], quantization_config=FineGrainedFP8Config())
    with pytest.raises(ValueError, match="quantised already"):
        quantize.quantize_model(load(quantised["fp8"]), "nvfp4")


def test_checkpoints_of_other_quantisers_are_left_to_transformers(quantised: dict, tmp_path: Path):
    def foreign(config: dict) -> None:
        config["quantization_config"] = {"quant_method": "gptq", "bits": 4}

    folder = edited(quantised["awq"], tmp_path, lambda tensors: None, foreign)
    with pytest.raises(ValueError, match="dequantize=True is for modelopt and AWQ"):
        load(folder, dequantize=True)
    with pytest.raises((ImportError, ValueError)):  # transformers' own quantiser answers
        load(folder)


def test_damaged_files_are_named(quantised: dict, tmp_path: Path):
    load(quantised["fp8"]).save_pretrained(tmp_path, max_shard_size="100KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    content = shards[1].read_bytes()
    for broken in (content[:-10], content[:100], b"version https://git-lfs"):
        shards[1].write_bytes(broken)
        with pytest.raises(ValueError, match=f"{shards[1].name}.*Download it again"):
            load(tmp_path)
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=f"{shards[1].name} is not there"):
        load(tmp_path)


def test_headers_are_read_without_the_safetensors_package(quantised: dict):
    headers = read_headers([str(quantised["nvfp4"] / "model.safetensors")])
    stored = load_file(quantised["nvfp4"] / "model.safetensors")
    assert headers.keys() == stored.keys()
    assert str(headers[f"{Q_PROJ}.weight"]) == "U8 [64, 32]"
    for key in (f"{Q_PROJ}.weight_scale_2", f"{Q_PROJ}.weight_scale", "language_model.model.norm.weight"):
        assert torch.equal(headers[key].read().float(), stored[key].float())


# --- tools.quantize ---


def test_quantize_keeps_tower_projector_head_and_norms(tiny_checkpoint: Path, quantised: dict):
    plain = load_file(tiny_checkpoint / "model.safetensors")
    for name in FORMAT_NAMES:
        stored = load_file(quantised[name] / "model.safetensors")
        kept = [key for key in plain if ".layers." not in key or (name != "awq" and "layernorm" in key)]
        assert all(torch.equal(plain[key], stored[key]) for key in kept)


def test_grouped_layers_share_their_scales(quantised: dict):
    stored = load_file(quantised["nvfp4"] / "model.safetensors")
    for part in ("weight_scale_2", "input_scale"):
        assert len({float(stored[f"{Q_PROJ[:-6]}{name}_proj.{part}"]) for name in "qkv"}) == 1


def test_awq_scaling_changes_nothing_but_the_error(tiny_checkpoint: Path, inputs: dict):
    model = load(tiny_checkpoint)
    # Some channels much louder than others: what AWQ is made for.
    with torch.no_grad():
        model.get_submodule("language_model.model.layers.0.input_layernorm").weight[:4] *= 30
    expected = logits_of(model, inputs)
    statistics = quantize.calibrate(model, [inputs])
    rows = statistics[Q_PROJ].rows.float()
    weight = model.get_submodule(Q_PROJ).weight.detach().clone()
    plain_error = float((rows @ (quantize._round_trip(weight, GROUP_SIZE) - weight).T).norm())
    factors = quantize.awq_input_scales([model.get_submodule(Q_PROJ)], statistics[Q_PROJ], GROUP_SIZE)
    scaled = quantize._round_trip(weight * factors, GROUP_SIZE) / factors
    assert float((rows @ (scaled - weight).T).norm()) < 0.8 * plain_error
    quantize.scale_for_awq(model, statistics, GROUP_SIZE)
    torch.testing.assert_close(logits_of(model, inputs), expected, rtol=1e-3, atol=1e-3)


def test_awq_clipping_lowers_the_error_of_every_output():
    """Against a plain search over the same ranges, group by group."""
    generator = torch.Generator().manual_seed(0)
    weight, rows = (torch.randn(shape, generator=generator) for shape in ((24, 64), (100, 64)))
    weight[::2, ::16] *= 5  # what is worth cutting off
    clipped = quantize.clip_for_awq(weight, rows, 32)
    rounded = quantize._round_trip(clipped, 32)
    for output in range(24):
        for columns in (slice(0, 32), slice(32, 64)):
            group, inputs = weight[output, columns], rows[:, columns]
            errors = []
            for step in range(quantize.AWQ_CLIP_STEPS):
                shrunk = 1 - step / (2 * quantize.AWQ_CLIP_STEPS)
                limited = group.clamp(group.min() * shrunk, group.max() * shrunk)
                tried = quantize._round_trip(limited[None], 32)[0]
                errors.append(float((inputs @ (tried - group)).square().sum()))
            found = float((inputs @ (rounded[output, columns] - group)).square().sum())
            assert found == pytest.approx(min(errors), rel=1e-3)
            assert found < errors[0] or min(errors) == errors[0]
    assert (rounded - weight)[::2].abs().max() > 0.5  # something was cut off


def test_awq_clipping_sees_the_inputs_of_the_scaled_model(tiny_checkpoint: Path, inputs: dict):
    model = load(tiny_checkpoint)
    statistics = quantize.calibrate(model, [inputs])
    before = {name: value.rows.clone() for name, value in statistics.items()}
    scaled = quantize.scale_for_awq(model, statistics, GROUP_SIZE)
    expected = quantize.calibrate(model, [inputs])
    for name in statistics:
        torch.testing.assert_close(scaled[name].rows, expected[name].rows, rtol=1e-3, atol=1e-3)
        assert torch.equal(statistics[name].rows, before[name])  # the caller's


def test_layers_that_do_not_divide_are_refused(tiny_checkpoint: Path):
    with pytest.raises(ValueError, match="multiples of 128 and 8.*--group-size"):
        quantize.quantize_model(load(tiny_checkpoint), "awq", group_size=128)


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_a_layer_of_zeros_stays_one(tiny_checkpoint: Path, name: str):
    """As blocks have that were added and never trained; a scale of 0 would make NaN of them."""
    model = load(tiny_checkpoint)
    with torch.no_grad():
        for projection in "qkv":  # the whole group, which shares a scale
            model.get_submodule(f"{Q_PROJ[:-6]}{projection}_proj").weight.zero_()
    report = quantize.quantize_model(model, name, group_size=GROUP_SIZE)
    assert not model.get_submodule(Q_PROJ).dequantized_weight(torch.float32).any() and report.errors[Q_PROJ] == 0
    assert all(math.isfinite(error) for error in report.errors.values())


def test_calibration_statistics_hold_the_inputs_of_a_layer(tiny_checkpoint: Path, inputs: dict):
    model = load(tiny_checkpoint)
    seen = []
    handle = model.get_submodule(Q_PROJ).register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    statistics = quantize.calibrate(model, [inputs, inputs])[Q_PROJ]
    handle.remove()
    tokens = torch.cat(seen)
    assert statistics.num_tokens == len(tokens) == 2 * inputs["input_ids"].shape[1]
    torch.testing.assert_close(statistics.amax, tokens.abs().amax())
    torch.testing.assert_close(statistics.mean, tokens.abs().mean(0))


def test_a_quantised_subfolder_loads_with_its_processor(tmp_path: Path):
    out, receipt = tmp_path / "nano-fp8", ROOT / "examples" / "receipt.png"
    assert (
        quantize.main([str(ROOT / "nano"), "--format", "fp8", "--calibration", str(receipt), "--out", str(out)]) == 0
    )
    model, processor = chat.load(out)
    features = processor.image_processor(receipt)
    options = {"max_new_tokens": 16, "do_sample": False}
    assert model.chat(processor, question="What is the total?", generation_config=options, **features) == "72.13"


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_the_command_writes_a_checkpoint_that_answers(tiny_checkpoint: Path, tmp_path: Path, name: str):
    pictures = []
    for number in range(2):
        image = Image.new("RGB", (90, 70), "white")
        ImageDraw.Draw(image).text((5, 20), f"TOTAL {number}.50", fill="black")
        pictures.append(tmp_path / f"{number}.png")
        image.save(pictures[-1])
    out = tmp_path / "out"
    command = [sys.executable, "-m", "tools.quantize", tiny_checkpoint, "--format", name, "--out", out]
    command += ["--group-size", str(GROUP_SIZE), "--calibration", *pictures]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout.splitlines()[-1])
    assert summary["num_layers"] == 14
    assert summary["bytes_after"] < summary["bytes_before"]
    model = AutoModel.from_pretrained(out, trust_remote_code=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    assert isinstance(model.chat(tokenizer, None, "Hello", {"max_new_tokens": 3}), str)
