"""The kernels for packed weights against the layer that unpacks; where they run, see kernel_runs.py."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from nemotron_vl import packed_matmul
from nemotron_vl.checkpoint import TensorHeader
from nemotron_vl.modeling_nemotron_vl import Llama_Nemotron_Nano_VL
from nemotron_vl.quantization_nemotron_vl import FORMATS, PackedLinear
from torch import nn

from tests.conftest import golden_parameters
from tests.kernel_runs import DEVICE, INTERPRETED, needs_kernels
from tools.quantize import quantize_model

pytestmark = pytest.mark.usefixtures("kernels_on_this_device")
# Of the largest output: one rounding. The interpreter cuts off bits in a cast to bfloat16, GPUs round.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2 if INTERPRETED else 8e-3, torch.float16: 1e-3}


def checkpoints_with_kernels(folder: Path) -> list[str]:
    names = [name for name in ("checkpoint_nvfp4", "checkpoint_fp8") if (folder / name).is_dir()]
    config = folder / "checkpoint_awq" / "config.json"
    if config.exists():
        stored = json.loads(config.read_text(encoding="utf-8"))["quantization_config"]
        names += ["checkpoint_awq"] * (stored["group_size"] in packed_matmul.AWQ_GROUPS)
    return names


def random_bytes(*shape: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def packed_layer(name: str, rows: int, columns: int, pre_quant_scale: bool = False) -> PackedLinear:
    """A layer whose stored bytes take every value that the format has."""
    generator = torch.Generator().manual_seed(rows + columns)

    def finite_e4m3(*shape: int) -> torch.Tensor:
        byte = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        byte[(byte & 127) == 127] = 0x7E  # the two codes of NaN
        return byte

    if name == "NVFP4":
        stored = {
            "weight": random_bytes(rows, columns // 2, generator=generator),
            "weight_scale": (finite_e4m3(rows, columns // 16) & 127).view(torch.float8_e4m3fn),
            "weight_scale_2": torch.tensor(3e-4),
        }
    elif name == "FP8":
        weight = finite_e4m3(rows, columns).view(torch.float8_e4m3fn)
        stored = {"weight": weight, "weight_scale": torch.tensor([2e-3])}
    elif name == "W4A16_AWQ":
        stored = {
            "weight": random_bytes(rows // 2, columns, generator=generator),
            "weight_scale": torch.rand(rows, columns // 32, generator=generator) / 100,
        }
    else:
        stored = {
            "qweight": random_bytes(columns, rows // 2, generator=generator).view(torch.int32),
            "qzeros": random_bytes(columns // 32, rows // 2, generator=generator).view(torch.int32),
            "scales": (torch.rand(columns // 32, rows, generator=generator) / 100).half(),
        }
    if pre_quant_scale:
        stored["pre_quant_scale"] = torch.rand(columns, generator=generator) + 0.5
    dtypes = {torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3", torch.float32: "F32"}
    dtypes |= {torch.int32: "I32", torch.float16: "F16"}
    headers = {key: TensorHeader(dtypes[t.dtype], tuple(t.shape), "") for key, t in stored.items()}
    layer = PackedLinear(nn.Linear(columns, rows, bias=True, device="meta"), FORMATS[name], headers)
    for key, tensor in stored.items():
        layer.register_parameter(key, nn.Parameter(tensor.to(DEVICE), requires_grad=False))
    layer.bias = nn.Parameter(torch.randn(rows, generator=generator).to(DEVICE))
    return layer


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows, columns", [(8, 32), (40, 544), (64, 2080)])
@pytest.mark.parametrize("name", packed_matmul.FORMATS)
def test_kernel_equals_the_unpacked_layer(monkeypatch, name, rows, columns, dtype):
    layer = packed_layer(name, rows, columns)
    exact = layer.dequantized_weight(torch.float32).double().cpu()
    for shape in ((columns,), (1, 2, columns), (3, columns), (packed_matmul.MAX_ROWS, columns)):
        inputs = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
        with torch.no_grad():
            assert packed_matmul.has_kernel(name, inputs, layer._parameters)
            output = layer(inputs)
            with monkeypatch.context() as patch:
                patch.setattr(packed_matmul, "runs_kernels", lambda device: False)
                expected = layer(inputs)
        assert output.dtype == expected.dtype == dtype and output.shape == expected.shape
        largest = expected.float().abs().max()
        assert (output.float() - expected.float()).abs().max() <= TOLERANCE[dtype] * largest
        if dtype != torch.bfloat16:
            error = (output.cpu().double() - (inputs.cpu().double() @ exact.T + layer.bias.cpu().double())).abs().max()
            assert error <= TOLERANCE[dtype] * largest.cpu()


@needs_kernels
@pytest.mark.parametrize("name", ["NVFP4", "W4A16_AWQ"])
def test_scales_of_the_inputs_are_applied(monkeypatch, name):
    layer = packed_layer(name, 40, 544, pre_quant_scale=True)
    inputs = torch.randn(2, 544, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    with torch.no_grad():
        output = layer(inputs)
        monkeypatch.setattr(packed_matmul, "runs_kernels", lambda device: False)
        torch.testing.assert_close(output, layer(inputs), rtol=0, atol=2e-6 * float(output.abs().max()))


def run_assembly(word: int) -> list[float]:
    """Do what the instructions of E2M1_ASSEMBLY do, as NVIDIA's manual of PTX defines them."""
    registers: dict[str, float] = {"$8": word}

    def two_halves(target: str) -> list[str]:
        return target.strip("{}").split(", ")

    for line in packed_matmul.E2M1_ASSEMBLY.strip("{}\n").splitlines():
        if line.startswith(".reg"):
            continue
        operation, _, rest = line.rstrip(";").partition(" ")
        target, *sources = re.findall(r"\{.*?\}|[^, ]+", rest)
        read = [registers[source] if source in registers else int(source, 0) for source in sources]
        if operation == "and.b32":
            registers[target] = read[0] & read[1]
        elif operation == "or.b32":
            registers[target] = read[0] | read[1]
        elif operation == "shl.b32":
            registers[target] = (read[0] << read[1]) & 0xFFFFFFFF
        elif operation == "shr.u32":
            registers[target] = read[0] >> read[1]
        elif operation == "mov.b32":
            low, high = two_halves(target)
            registers[low], registers[high] = read[0] & 0xFFFF, read[0] >> 16
        elif operation == "cvt.rn.f16x2.e4m3x2":
            pair = torch.tensor([read[0] & 255, read[0] >> 8], dtype=torch.uint8).view(torch.float8_e4m3fn).half()
            registers[target] = int(pair.view(torch.int32)) & 0xFFFFFFFF
        elif operation == "cvt.f32.f16":
            registers[target] = float(torch.tensor(read[0], dtype=torch.int32).to(torch.int16).view(torch.float16))
        else:
            raise ValueError(operation)
    return [registers[f"${place}"] for place in range(8)]


def test_the_assembly_means_the_codes_of_the_format():
    """The interpreter runs no assembly, so a test reads it: each of 16 codes in each of the eight places."""
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]
    for code in range(16):
        for place in range(8):
            others = (code + 5) % 16
            codes = [others] * 8
            codes[place] = code
            word = sum(each << 4 * position for position, each in enumerate(codes))
            assert [64 * value for value in run_assembly(word)] == [values[each] for each in codes]


@needs_kernels
def test_all_codes_mean_what_the_format_says():
    """A row of ones on the diagonal reads single weights: every byte of both formats, exactly."""
    byte = torch.arange(256, dtype=torch.uint8)
    weight = byte.view(torch.float8_e4m3fn)[:, None].repeat(1, 16).to(DEVICE)
    stored = {"weight": weight, "weight_scale": torch.tensor(1.0, device=DEVICE)}
    one = torch.zeros(16, device=DEVICE)
    one[3] = 1
    # 0 * NaN is NaN, so the two codes of NaN stand for their rows.
    read = packed_matmul.multiply_packed("FP8", one, stored).cpu()
    assert torch.equal(read.nan_to_num(-1), byte.view(torch.float8_e4m3fn).float().nan_to_num(-1))
    codes = {
        "weight": byte[:, None].repeat(1, 8).to(DEVICE),
        "weight_scale": torch.ones(256, 1, device=DEVICE).to(torch.float8_e4m3fn),
        "weight_scale_2": torch.tensor(1.0, device=DEVICE),
    }
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    for column, nibble in ((2, byte & 15), (3, byte >> 4)):
        one = torch.zeros(16, device=DEVICE)
        one[column] = 1
        assert torch.equal(packed_matmul.multiply_packed("NVFP4", one, codes).cpu(), values[nibble.int()])


@needs_kernels
@pytest.mark.parametrize("checkpoint", golden_parameters("8b-v1", checkpoints_with_kernels))
def test_generation_with_kernels_gives_the_tokens_without(golden_8b, monkeypatch, checkpoint):
    check_generation(golden_8b / checkpoint, monkeypatch)


@needs_kernels
def test_generation_with_the_kernel_of_awq_gives_the_tokens_without(tiny_checkpoint, tmp_path, monkeypatch):
    model = Llama_Nemotron_Nano_VL.from_pretrained(tiny_checkpoint)
    quantize_model(model, "awq", group_size=32)
    model.save_pretrained(tmp_path)
    check_generation(tmp_path, monkeypatch)


def check_generation(checkpoint, monkeypatch):
    model = Llama_Nemotron_Nano_VL.from_pretrained(checkpoint).eval().to(DEVICE)
    ids = torch.arange(3, 20, device=DEVICE)[None]
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    options["disable_compile"] = True
    calls, multiply = [], packed_matmul.multiply_packed
    monkeypatch.setattr(
        sys.modules[PackedLinear.__module__], "multiply_packed", lambda *args: calls.append(args[0]) or multiply(*args)
    )
    with_kernels = model.generate(ids, **options)
    assert calls
    monkeypatch.setattr(packed_matmul, "runs_kernels", lambda device: False)
    assert torch.equal(with_kernels, model.generate(ids, **options))


@needs_kernels
@pytest.mark.parametrize("name", packed_matmul.FORMATS)
def test_a_compiled_layer_is_one_graph_with_the_same_numbers(name):
    layer = packed_layer(name, 24, 64)
    inputs = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    with torch.no_grad():
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)(inputs)
        assert torch.equal(compiled, layer(inputs))


def test_prompts_and_other_formats_are_unpacked(monkeypatch):
    monkeypatch.setattr(packed_matmul, "runs_kernels", lambda device: device.type == "cpu")
    row = torch.zeros(packed_matmul.MAX_ROWS, 64)
    assert packed_matmul.has_kernel("NVFP4", row, {})
    assert not packed_matmul.has_kernel("NVFP4", torch.zeros(packed_matmul.MAX_ROWS + 1, 64), {})
    assert not packed_matmul.has_kernel("NVFP4", torch.zeros(0, 64), {})
    assert not packed_matmul.has_kernel("GPTQ", row, {})
    assert not packed_matmul.has_kernel("NVFP4", row.to("meta"), {})
    for groups, has_kernel in ((2, True), (1, True), (64, False), (4, False)):
        assert packed_matmul.has_kernel("W4A16_AWQ", row, {"weight_scale": torch.ones(8, groups)}) is has_kernel
        assert packed_matmul.has_kernel("AWQ GEMM", row, {"scales": torch.ones(groups, 8)}) is has_kernel
