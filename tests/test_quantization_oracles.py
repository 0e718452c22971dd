"""Our formats against the libraries that invented them, and other quantisers on our BF16 checkpoint.

Slow, and optional: each test skips where its library is not installed. For all of them, in an environment of its own:

    pip install torch==2.13.0 transformers==5.23.0 pytest accelerate pillow \
        peft bitsandbytes torchao compressed-tensors nvidia-modelopt requests
    python -m pytest -q tests/test_quantization_oracles.py
"""

from pathlib import Path

import pytest
import torch
from nemotron_vl.configuration_nemotron_vl import modelopt_quantization_config
from nemotron_vl.modeling_nemotron_vl import Llama_Nemotron_Nano_VL
from nemotron_vl.quantization_nemotron_vl import (
    PackedLinear,
    decode_awq_gemm,
    decode_fp8,
    decode_nvfp4,
    decode_w4a16_awq,
)
from torch import nn

from tools import quantize

pytestmark = pytest.mark.slow

GROUP_SIZE = 16
DOWN_PROJ = "language_model.model.layers.1.mlp.down_proj"
KEPT = ("vision_model", "mlp1", "language_model.lm_head")


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def weight(request: pytest.FixtureRequest) -> torch.Tensor:
    """Random, with an empty block, tiny blocks and exact ties in it."""
    weight = torch.randn(96, 256, generator=torch.Generator().manual_seed(0)) * 0.05
    weight[3, :16] = 0
    weight[4, :64] *= 1e-5
    weight[5, :16] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]).repeat(2) * 0.01
    return weight.to(request.param)


def same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    left, right = left.detach().reshape(-1), right.detach().reshape(-1)
    return left.dtype == right.dtype and torch.equal(left.view(torch.uint8), right.view(torch.uint8))


def test_nvfp4_bytes_and_weights_equal_modelopt(weight: torch.Tensor):
    qtensor = pytest.importorskip("modelopt.torch.quantization.qtensor")
    reference, scale, scale_2 = qtensor.NVFP4QTensor.quantize(weight.clone(), 16)
    tensors = quantize.encode_nvfp4(weight)
    assert same_bytes(tensors["weight"], reference._quantized_data)
    assert same_bytes(tensors["weight_scale"], scale)
    assert same_bytes(tensors["weight_scale_2"], scale_2)
    for dtype in (torch.float32, torch.bfloat16):
        expected = reference.dequantize(dtype, scale=scale, double_scale=scale_2, block_sizes={-1: 16})
        assert torch.equal(decode_nvfp4(tensors, dtype), expected)


def test_nvfp4_with_a_shared_global_scale_equals_modelopt(weight: torch.Tensor):
    qtensor = pytest.importorskip("modelopt.torch.quantization.qtensor")
    amax = weight.abs().amax() * 3
    shared = amax.float() / 2688
    reference, scale, _ = qtensor.NVFP4QTensor.quantize(weight.clone(), 16, weights_scaling_factor_2=shared)
    tensors = quantize.encode_nvfp4(weight, amax)
    assert same_bytes(tensors["weight"], reference._quantized_data)
    assert same_bytes(tensors["weight_scale"], scale)


def test_fp8_bytes_and_weights_equal_modelopts_export(weight: torch.Tensor):
    export = pytest.importorskip("modelopt.torch.export.quant_utils")
    qtensor = pytest.importorskip("modelopt.torch.quantization.qtensor")
    tensors = quantize.encode_fp8(weight)
    reference = export.to_quantized_weight(weight, tensors["weight_scale"], export.QUANTIZATION_FP8)
    assert same_bytes(tensors["weight"], reference)
    wrapped = qtensor.FP8QTensor(weight.shape, weight.dtype, reference)
    expected = wrapped.dequantize(torch.float32, scale=tensors["weight_scale"])
    assert torch.equal(decode_fp8(tensors, torch.float32), expected)


def test_w4a16_awq_reads_what_modelopt_packs(weight: torch.Tensor):
    export = pytest.importorskip("modelopt.torch.export.quant_utils")
    scale = weight.float().unflatten(1, (-1, 128)).abs().amax(-1) / 7
    packed = export.pack_int4_in_uint8(weight.float(), scale, 128)
    codes = (weight.float().unflatten(1, (-1, 128)) / scale.unsqueeze(-1)).round().clamp(-8, 7)
    expected = (codes * scale.unsqueeze(-1)).flatten(1)
    assert torch.equal(decode_w4a16_awq({"weight": packed, "weight_scale": scale}, torch.float32), expected)


def test_the_config_block_equals_modelopts():
    convert = pytest.importorskip("modelopt.torch.export.convert_hf_config")
    for algorithm, extra in (("NVFP4", {"group_size": 16}), ("FP8", {}), ("FP8", {"kv_cache_quant_algo": "FP8"})):
        described = {
            "producer": {"name": "modelopt", "version": "0.47.0"},
            "quantization": {"quant_algo": algorithm, "exclude_modules": ["lm_head"], **extra},
        }
        expected = convert.convert_hf_quant_config_format(described)
        found = modelopt_quantization_config(described)
        assert found.pop("quant_method") == "modelopt"
        expected.pop("quant_method", None)
        assert found == expected


def test_nvfp4_weights_equal_torchao(weight: torch.Tensor):
    nvfp4 = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    tensors = quantize.encode_nvfp4(weight)
    reference = nvfp4.NVFP4Tensor(
        tensors["weight"],
        tensors["weight_scale"],
        16,
        torch.float32,
        per_tensor_scale=tensors["weight_scale_2"],
    )
    assert torch.equal(decode_nvfp4(tensors, torch.float32), reference.dequantize(torch.float32))


def test_nvfp4_weights_equal_compressed_tensors_after_the_bf16_cast(weight: torch.Tensor):
    nvfp4 = pytest.importorskip("compressed_tensors.compressors.nvfp4.base")
    from compressed_tensors.quantization import preset_name_to_scheme

    tensors = quantize.encode_nvfp4(weight)
    packed = {
        "weight_packed": tensors["weight"],
        "weight_scale": tensors["weight_scale"],
        "weight_global_scale": (1 / tensors["weight_scale_2"]).reshape(1),
    }
    scheme = preset_name_to_scheme("NVFP4", ["Linear"])
    expected = nvfp4.NVFP4PackedCompressor.decompress(packed, scheme)["weight"]
    # 1 / scale is rounded once more there, so a few weights fall to the neighbouring bfloat16 number.
    torch.testing.assert_close(decode_nvfp4(tensors, torch.bfloat16), expected.bfloat16(), rtol=2**-7, atol=0)


def test_awq_weights_equal_compressed_tensors_converter(weight: torch.Tensor):
    convert = pytest.importorskip("compressed_tensors.entrypoints.convert.converters.autoawq")
    tensors = quantize.encode_awq_gemm(weight, 128)
    converter = convert.AutoAWQConverter(group_size=128)
    codes, scales, zeros = converter._convert_gemm_module(tensors["qweight"], tensors["scales"], tensors["qzeros"])
    difference = (codes.float().unflatten(1, (-1, 128)) - zeros.float().unsqueeze(-1)) * scales.float().unsqueeze(-1)
    assert torch.equal(decode_awq_gemm(tensors, torch.float32), difference.flatten(1))


# --- adapters and other quantisers ---


@pytest.mark.parametrize("name", ["nvfp4", "fp8", "awq"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lora_trains_on_packed_weights(
    tiny_checkpoint: Path, inputs: dict, tmp_path: Path, name: str, dtype: torch.dtype
):
    peft = pytest.importorskip("peft")
    model = Llama_Nemotron_Nano_VL.from_pretrained(tiny_checkpoint)
    quantize.quantize_model(model, name, group_size=GROUP_SIZE)
    quantize.save(model, tiny_checkpoint, tmp_path / "packed")

    def adapted() -> nn.Module:
        base = Llama_Nemotron_Nano_VL.from_pretrained(tmp_path / "packed", torch_dtype=dtype)
        return base

    options = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(adapted(), options, autocast_adapter_dtype=False)
    adapters = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert adapters
    assert all("lora_" in key and parameter.dtype == dtype for key, parameter in adapters.items())
    layer = model.get_submodule(f"base_model.model.{DOWN_PROJ}")
    assert isinstance(layer.base_layer, PackedLinear)
    before = {key: tensor.clone() for key, tensor in layer.base_layer.packed_tensors().items()}
    batch = {**inputs, "pixel_values": inputs["pixel_values"].to(dtype)}
    optimizer = torch.optim.AdamW(adapters.values(), lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(**batch, labels=inputs["input_ids"]).loss
        loss.backward()
        assert all(parameter.grad is not None for parameter in adapters.values())
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.5
    after = layer.base_layer.packed_tensors()
    assert all(same_bytes(before[key], after[key]) for key in before)
    with pytest.raises((RuntimeError, AttributeError)):  # there is no plain weight to merge into
        model.merge_adapter()
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(adapted(), tmp_path / "adapter", autocast_adapter_dtype=False)
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, model.eval()(**batch).logits, rtol=0, atol=1e-5)


def linear_kinds(model: nn.Module) -> dict[str, set[str]]:
    kinds: dict[str, set[str]] = {"kept": set(), "decoder": set()}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            kinds["kept" if name.startswith(KEPT) else "decoder"].add(type(module).__name__)
    return kinds


def test_bitsandbytes_4bit_leaves_tower_projector_and_head_alone(tiny_checkpoint: Path, inputs: dict, tmp_path: Path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = Llama_Nemotron_Nano_VL.from_pretrained(tiny_checkpoint, quantization_config=options)
    assert linear_kinds(model) == {"kept": {"Linear"}, "decoder": {"Linear4bit"}}
    assert options.llm_int8_skip_modules is None  # the caller's object stays as it is
    with torch.no_grad():
        logits = model(**inputs).logits
        plain = Llama_Nemotron_Nano_VL.from_pretrained(tiny_checkpoint)(**inputs).logits
    assert torch.isfinite(logits).all()
    assert float((logits - plain).norm() / plain.norm()) < 0.5
    model.save_pretrained(tmp_path)
    again = Llama_Nemotron_Nano_VL.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, logits, rtol=0, atol=1e-4)


def test_torchao_int8_leaves_tower_projector_and_head_alone(tiny_checkpoint: Path, inputs: dict):
    torchao = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    options = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    model = Llama_Nemotron_Nano_VL.from_pretrained(tiny_checkpoint, quantization_config=options)
    kinds = {"kept": set(), "decoder": set()}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            kinds["kept" if name.startswith(KEPT) else "decoder"].add(type(module.weight.data).__name__)
    assert kinds["kept"] == {"Tensor"}
    assert "Tensor" not in kinds["decoder"]
    with torch.no_grad():
        logits = model(**inputs).logits
        plain = Llama_Nemotron_Nano_VL.from_pretrained(tiny_checkpoint)(**inputs).logits
    assert float((logits - plain).norm() / plain.norm()) < 0.1
