"""Products with packed weights on a CPU, by C code and by torch's int4 operator, against a plain restatement."""

import copy
import logging
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from nemotron_vl import c_compiler, cpu_matmul, torch_int4
from nemotron_vl.checkpoint import SAFETENSORS_DTYPES, TensorHeader
from nemotron_vl.quantization_nemotron_vl import FORMATS, PackedLinear
from torch import nn

from tools import ROOT

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # column i of a word is its nibble AWQ_ORDER[i]
# Name, outputs, inputs, group: one and no full step of the C code, odd sizes, every rest.
SHAPES = [
    *(("NVFP4", *sizes) for sizes in ((1, 16, 16), (3, 80, 16), (37, 528, 16), (64, 192, 16))),
    *(("FP8", *sizes) for sizes in ((1, 1, 1), (3, 7, 7), (5, 64, 64), (37, 529, 529), (8, 130, 130))),
    *(("W4A16_AWQ", *sizes) for sizes in ((2, 8, 8), (6, 200, 40), (10, 384, 128), (4, 72, 24))),
    *(("AWQ GEMM", *sizes) for sizes in ((8, 1, 1), (8, 35, 5), (72, 96, 96), (640, 100, 20), (136, 256, 128))),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}

needs_compiler = pytest.mark.skipif(not cpu_matmul.runs_on_cpu(), reason="needs a C compiler (gcc, clang or ziglang)")


def stored(name: str, rows: int, columns: int, group: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors in a format, with every code in them."""
    generator = torch.Generator().manual_seed(seed)

    def integers(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        low, high = (0, 256) if dtype == torch.uint8 else (-(2**31), 2**31)
        return torch.randint(low, high, shape, generator=generator).to(dtype)

    def finite_e4m3(*shape: int) -> torch.Tensor:
        byte = integers(*shape)
        return torch.where((byte & 127) == 127, 0, byte).view(torch.float8_e4m3fn)

    if name == "NVFP4":
        scale = finite_e4m3(rows, columns // 16)
        return {"weight": integers(rows, columns // 2), "weight_scale": scale, "weight_scale_2": torch.tensor(3e-4)}
    if name == "FP8":
        return {"weight": finite_e4m3(rows, columns), "weight_scale": torch.tensor([2e-3])}
    if name == "W4A16_AWQ":
        scale = torch.rand(rows, columns // group, generator=generator)
        return {"weight": integers(rows // 2, columns), "weight_scale": scale}
    return {
        "qweight": integers(columns, rows // 8, dtype=torch.int32),
        "qzeros": integers(columns // group, rows // 8, dtype=torch.int32),
        "scales": torch.rand(columns // group, rows, generator=generator).half(),
    }


def restated(name: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The weight in float64, as the specification says it."""
    if name == "FP8":
        return tensors["weight"].float().double() * tensors["weight_scale"].double()
    if name == "NVFP4":
        codes = torch.stack((tensors["weight"] & 15, tensors["weight"] >> 4), -1).flatten(1).int()
        scales = tensors["weight_scale"].float().double().repeat_interleave(16, 1) * tensors["weight_scale_2"].double()
        weight = E2M1[codes] * scales
    elif name == "W4A16_AWQ":
        codes = torch.stack((tensors["weight"] & 15, tensors["weight"] >> 4), 1).flatten(0, 1).double()
        scales = tensors["weight_scale"].double()
        weight = (codes - 16 * (codes > 7)) * scales.repeat_interleave(codes.shape[1] // scales.shape[1], 1)
    else:

        def unpack(words: torch.Tensor) -> torch.Tensor:
            return torch.stack([words >> 4 * nibble & 15 for nibble in AWQ_ORDER], -1).flatten(1).double()

        codes, scales = unpack(tensors["qweight"]), tensors["scales"].double()
        group = len(codes) // len(scales)
        zeros, scales = (part.repeat_interleave(group, 0) for part in (unpack(tensors["qzeros"]), scales))
        weight = ((codes - zeros) * scales).t()
    return weight * tensors["pre_quant_scale"].double() if "pre_quant_scale" in tensors else weight


def packed_layer(name: str, tensors: dict[str, torch.Tensor], rows: int, columns: int) -> PackedLinear:
    headers = {key: TensorHeader(SAFETENSORS_DTYPES[t.dtype], tuple(t.shape), "") for key, t in tensors.items()}
    layer = PackedLinear(nn.Linear(columns, rows, bias=False, device="meta"), FORMATS[name], headers)
    for key, tensor in tensors.items():
        layer.register_parameter(key, nn.Parameter(tensor, requires_grad=False))
    layer.compute_dtype = torch.bfloat16
    return layer


def assert_product(outputs: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor) -> None:
    """Exact products, sums in float32, one rounding."""
    exact = inputs.double() @ weight.t()
    magnitude = inputs.double().abs() @ weight.abs().t()
    bound = exact.abs() * ROUNDING[outputs.dtype] + magnitude * 2.0**-21 + torch.finfo(outputs.dtype).tiny
    special = ~exact.isfinite()
    assert torch.equal(outputs.double()[special].nan_to_num(), exact[special].nan_to_num())
    assert (outputs.isnan() == exact.isnan()).all()
    assert ((outputs.double() - exact).abs() <= bound)[~special].all()


@needs_compiler
@pytest.mark.parametrize(("name", "rows", "columns", "group"), SHAPES)
def test_products_are_exact_but_for_the_sums(name: str, rows: int, columns: int, group: int):
    tensors = stored(name, rows, columns, group)
    weight = restated(name, tensors)
    for dtype in DTYPES:
        for num_rows in (1, 2, 3, 4, 7, cpu_matmul.MAX_ROWS[name]):
            inputs = torch.randn(num_rows, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
            assert cpu_matmul.has_product(name, inputs, tensors)
            outputs = cpu_matmul.multiply_on_cpu(name, inputs, tensors)
            assert outputs.dtype == dtype
            assert_product(outputs, inputs, weight)
            alone = cpu_matmul.multiply_on_cpu(name, inputs[-1], tensors)  # the same bits, whatever the other rows
            assert torch.equal(alone, outputs[-1])


@needs_compiler
@pytest.mark.parametrize(("name", "rows", "columns", "group"), SHAPES)
def test_unpacking_gives_the_numbers_of_plain_torch(name: str, rows: int, columns: int, group: int):
    tensors = stored(name, rows, columns, group)
    for dtype in DTYPES:
        expected = FORMATS[name].decode(tensors, dtype)
        assert torch.equal(cpu_matmul.unpack_on_cpu(name, tensors, dtype, range(rows)), expected)
        part = range(rows // 16 * 8, rows)
        out = torch.full((len(part), columns), 5, dtype=dtype)
        assert torch.equal(cpu_matmul.unpack_on_cpu(name, tensors, dtype, part, out), expected[part.start :])


@needs_compiler
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize(("name", "rows", "columns", "group"), [SHAPES[2], SHAPES[7], SHAPES[10], SHAPES[17]])
def test_nan_and_infinity_go_where_they_do_in_a_plain_product(name, rows, columns, group, value):
    tensors = stored(name, rows, columns, group)
    inputs = torch.randn(3, columns, generator=torch.Generator().manual_seed(1))
    inputs[1, columns // 2] = value
    assert_product(cpu_matmul.multiply_on_cpu(name, inputs, tensors), inputs, restated(name, tensors))


@needs_compiler
@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_codes_of_nan_stay_nan(code: int):
    for name, rows, columns, key in (("FP8", 5, 130, "weight"), ("NVFP4", 5, 144, "weight_scale")):
        tensors = stored(name, rows, columns, 16)
        tensors[key].view(torch.uint8)[3, -1] = code
        weight = restated(name, tensors)
        inputs = torch.ones(2, columns)
        assert_product(cpu_matmul.multiply_on_cpu(name, inputs, tensors), inputs, weight)
        for dtype in (torch.float32, torch.bfloat16):
            unpacked = cpu_matmul.unpack_on_cpu(name, tensors, dtype, range(rows))
            torch.testing.assert_close(unpacked, FORMATS[name].decode(tensors, dtype), rtol=0, atol=0, equal_nan=True)


@needs_compiler
@pytest.mark.parametrize(("name", "rows", "columns", "group"), [SHAPES[3], SHAPES[8], SHAPES[10], SHAPES[16]])
def test_strided_offset_and_unaligned_tensors(name: str, rows: int, columns: int, group: int):
    tensors = stored(name, rows, columns, group)
    weight = restated(name, tensors)
    wide = torch.randn(6, 2 * columns + 3, generator=torch.Generator().manual_seed(1))
    for inputs in (wide[1::2, 3::2], wide[:, 1 : columns + 1], wide[:1, :columns].expand(4, -1), wide[0, :columns]):
        assert_product(cpu_matmul.multiply_on_cpu(name, inputs, tensors), inputs, weight)

    def shifted(tensor: torch.Tensor) -> torch.Tensor:  # as in a file whose header has an odd length
        content = bytearray(b"x" + tensor.contiguous().view(torch.uint8).numpy().tobytes())
        return torch.frombuffer(content, dtype=torch.uint8)[1:].view(torch.uint8)

    strided = {
        key: torch.stack((tensor.view(torch.uint8), tensor.view(torch.uint8)), -1)[..., 0].view(tensor.dtype)
        if tensor.element_size() == 1
        else torch.stack((tensor, tensor), -1)[..., 0]
        for key, tensor in tensors.items()
    }
    offset = {
        key: shifted(tensor).view(tensor.shape).view(tensor.dtype) if tensor.element_size() == 1 else tensor
        for key, tensor in tensors.items()
    }
    inputs = wide[:3, :columns]
    expected = cpu_matmul.multiply_on_cpu(name, inputs, tensors)
    for other in (strided, offset):
        assert torch.equal(cpu_matmul.multiply_on_cpu(name, inputs, other), expected)
        unpacked = cpu_matmul.unpack_on_cpu(name, other, torch.float32, range(rows))
        assert torch.equal(unpacked, FORMATS[name].decode(tensors, torch.float32))


@needs_compiler
@pytest.mark.parametrize("name", ["NVFP4", "W4A16_AWQ"])
def test_inputs_are_scaled_where_the_file_says_so(name: str):
    tensors = stored(name, 6, 96, 32) | {"pre_quant_scale": torch.rand(96).bfloat16()}
    inputs = torch.randn(2, 96)
    assert_product(cpu_matmul.multiply_on_cpu(name, inputs, tensors), inputs, restated(name, tensors))
    for dtype in (torch.float32, torch.bfloat16):
        unpacked = cpu_matmul.unpack_on_cpu(name, tensors, dtype, range(6))
        assert torch.equal(unpacked, FORMATS[name].decode(tensors, dtype))


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "plain torch"])
@pytest.mark.parametrize(("name", "rows", "columns", "group"), [*SHAPES[1::4], ("W4A16_AWQ", 4, 12, 3)])
def test_a_layer_takes_any_number_of_rows(monkeypatch, name, rows, columns, group, compiled):
    if not compiled:
        monkeypatch.setattr(cpu_matmul, "_library", lambda: None)
    tensors = stored(name, rows, columns, group)
    layer, weight = packed_layer(name, tensors, rows, columns), restated(name, tensors)
    for shape in ((0,), (2, 0), (), (1,), (1, 1), (2, 3), (cpu_matmul.MAX_ROWS[name] + 1,)):
        inputs = torch.randn(*shape, columns, generator=torch.Generator().manual_seed(1))
        outputs = layer(inputs)
        assert outputs.shape == (*shape, rows)
        assert_product(outputs.reshape(-1, rows), inputs.reshape(-1, columns), weight)
    assert layer(torch.zeros(1, columns, dtype=torch.float64)).dtype == torch.float64


@needs_compiler
@pytest.mark.parametrize("name", cpu_matmul.FORMATS)
def test_a_compiled_layer_is_one_graph_with_the_same_numbers(name: str):
    layer = packed_layer(name, stored(name, 64, 64, 32), 64, 64)
    inputs = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)(inputs)
        assert torch.equal(compiled, layer(inputs))


# --- threads and processes ---


@pytest.fixture
def four_threads():
    num_threads = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(num_threads)


def large_product(name: str) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Tensors and inputs of a product that consists of several tasks, and its result on one thread."""
    tensors = stored(name, 1024, 512, 128)
    inputs = torch.randn(3, 512, generator=torch.Generator().manual_seed(1))
    torch.set_num_threads(1)
    return tensors, inputs, cpu_matmul.multiply_on_cpu(name, inputs, tensors)


@needs_compiler
@pytest.mark.parametrize("name", cpu_matmul.FORMATS)
def test_threads_and_concurrent_callers_compute_the_same_bits(four_threads, name: str):
    tensors, inputs, expected = large_product(name)
    torch.set_num_threads(4)
    found = []

    def call() -> None:
        found.extend(torch.equal(cpu_matmul.multiply_on_cpu(name, inputs, tensors), expected) for _ in range(5))

    call()
    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 20


def _multiply_in_child(connection, inputs, tensors) -> None:
    connection.send(cpu_matmul.multiply_on_cpu("FP8", inputs, tensors).numpy())


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_multiplies_although_it_has_lost_the_threads(four_threads):
    tensors, inputs, expected = large_product("FP8")
    torch.set_num_threads(4)
    cpu_matmul.multiply_on_cpu("FP8", inputs, tensors)
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_multiply_in_child, args=(theirs, inputs, tensors))
    process.start()
    assert ours.poll(60)
    assert torch.equal(torch.from_numpy(ours.recv()), expected)
    process.join()


def test_a_worker_of_a_data_loader_uses_one_thread(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert cpu_matmul._num_threads() == 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert cpu_matmul._num_threads() == 3
    monkeypatch.setattr(cpu_matmul, "_PROCESS", -1)  # forked
    assert cpu_matmul._num_threads() == 1


# --- the compiler ---

SOURCE = "int twice(int number) { return 2 * number; }"


@pytest.fixture
def empty_cache(monkeypatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    c_compiler.find_compiler.cache_clear()
    yield tmp_path / "nemotron_vl"
    c_compiler.find_compiler.cache_clear()


@needs_compiler
def test_code_is_compiled_once(empty_cache: Path):
    assert c_compiler.load_library(SOURCE).twice(21) == 42
    (library,) = empty_cache.iterdir()  # nothing else stays behind
    assert empty_cache.stat().st_mode & 0o077 == 0
    compiled = library.stat().st_mtime_ns
    assert c_compiler.load_library(SOURCE).twice(4) == 8
    assert library.stat().st_mtime_ns == compiled
    c_compiler.load_library(SOURCE + "\n")
    assert len(list(empty_cache.iterdir())) == 2


@needs_compiler
def test_a_folder_that_others_can_write_to_is_not_trusted(empty_cache: Path):
    empty_cache.mkdir()
    empty_cache.chmod(0o777)
    assert c_compiler.load_library(SOURCE).twice(21) == 42
    assert not list(empty_cache.iterdir())


@needs_compiler
def test_processes_that_compile_at_the_same_time_do_not_disturb_each_other(empty_cache: Path):
    code = "from tools import ROOT; from nemotron_vl import c_compiler; "
    code += f"print(c_compiler.load_library({SOURCE!r}).twice(21))"
    command = [sys.executable, "-c", code]
    started = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0] for process in started] == ["42\n"] * 2
    assert len(list(empty_cache.iterdir())) == 1


def test_importing_compiles_nothing(empty_cache: Path):
    code = "from tools import ROOT; from nemotron_vl import quantization_nemotron_vl, modeling_nemotron_vl"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert not empty_cache.exists()


@pytest.mark.parametrize("reason", ["no compiler", "fails", "writes nonsense"])
def test_without_a_compiler_one_notice_says_what_is_missing(
    empty_cache: Path, monkeypatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, reason: str
):
    if reason == "no compiler":
        monkeypatch.setattr(c_compiler, "COMPILERS", ())
        monkeypatch.setattr(c_compiler.importlib.util, "find_spec", lambda name: None)
    else:
        compiler = tmp_path / "compiler"
        write = (
            'for last; do :; done; echo nonsense > "$last"'
            if reason == "writes nonsense"
            else "echo broken >&2; exit 3"
        )
        compiler.write_text(f"#!/bin/sh\n{write}\n")
        compiler.chmod(0o700)
        monkeypatch.setenv("CC", str(compiler))
    cpu_matmul._library.cache_clear()
    try:
        tensors = stored("FP8", 5, 64, 64)
        layer = packed_layer("FP8", tensors, 5, 64)
        inputs = torch.randn(1, 64)
        with caplog.at_level(logging.WARNING):
            monkeypatch.setattr(cpu_matmul.logger, "propagate", True)
            logging.getLogger("transformers").propagate, before = True, logging.getLogger("transformers").propagate
            for _ in range(2):
                assert_product(layer(inputs), inputs, restated("FP8", tensors))
            logging.getLogger("transformers").propagate = before
        (message,) = [record.getMessage() for record in caplog.records if "slow way" in record.getMessage()]
        assert "pip install ziglang" in message
        assert {"no compiler": "there is no C compiler", "fails": "broken", "writes nonsense": ""}[reason] in message
    finally:
        cpu_matmul._library.cache_clear()


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs cc")
def test_the_code_has_no_warnings(tmp_path: Path):
    code = tmp_path / "code.c"
    code.write_text(cpu_matmul.SOURCE)
    flags = ["-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-O1", "-shared", "-fPIC", "-o", str(tmp_path / "code.so")]
    subprocess.run(["cc", *flags, str(code)], check=True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs cc")
def test_the_portable_code_computes_the_same(empty_cache: Path, monkeypatch):
    """Without AVX2, as on an old processor or one of another kind."""
    monkeypatch.setattr(c_compiler, "FLAGS", (*c_compiler.FLAGS, "-DPORTABLE"))
    cpu_matmul._library.cache_clear()
    try:
        for name, rows, columns, group in SHAPES:
            tensors = stored(name, rows, columns, group)
            inputs = torch.randn(3, columns, generator=torch.Generator().manual_seed(1))
            assert_product(cpu_matmul.multiply_on_cpu(name, inputs, tensors), inputs, restated(name, tensors))
            unpacked = cpu_matmul.unpack_on_cpu(name, tensors, torch.bfloat16, range(rows))
            assert torch.equal(unpacked, FORMATS[name].decode(tensors, torch.bfloat16))
    finally:
        cpu_matmul._library.cache_clear()


# --- torch's int4 operator, for AWQ without a C compiler ---


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr(cpu_matmul, "_library", lambda: None)


@pytest.mark.parametrize(("rows", "columns", "group"), [(64, 64, 32), (192, 256, 128), (128, 768, 256)])
def test_converted_codes_multiply_and_come_back_bit_for_bit(no_compiler, rows: int, columns: int, group: int):
    tensors = stored("AWQ GEMM", rows, columns, group)
    layer, weight = packed_layer("AWQ GEMM", tensors, rows, columns), restated("AWQ GEMM", tensors)
    expected = layer.dequantized_weight(torch.float32)
    layer.convert()
    assert layer.int4_scales is not None and not torch.equal(layer.qweight, tensors["qweight"])
    assert (layer.qweight.dtype, layer.qweight.shape) == (torch.int32, tensors["qweight"].shape)
    inputs = torch.randn(3, columns, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = inputs.double() @ weight.t()
    errors = [
        (product.double() - exact).norm() / exact.norm()
        for product in (layer(inputs), nn.functional.linear(inputs, weight.bfloat16()))
    ]
    assert errors[0] < 1.15 * errors[1]  # of few numbers; benchmarks.quantized compares large layers
    for rest in (layer, copy.deepcopy(layer)):
        assert torch.equal(rest.dequantized_weight(torch.float32), expected)
        assert torch.equal(rest(inputs), layer(inputs))
        assert torch.equal(rest.state_dict()["qweight"], tensors["qweight"])
    many = torch.randn(torch_int4.MAX_ROWS + 1, columns, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert torch.equal(layer(many), nn.functional.linear(many, expected.bfloat16()))
    assert_product(layer(inputs.float()), inputs.float(), weight)  # float32 is not the operator's


def test_a_converted_layer_loads_a_state_dict_and_moves(no_compiler):
    first, second = (stored("AWQ GEMM", 64, 64, 32, seed) for seed in (0, 1))
    layer = packed_layer("AWQ GEMM", first, 64, 64)
    layer.convert()
    layer.load_state_dict(second)
    assert layer.int4_scales is not None
    assert torch.equal(layer.dequantized_weight(torch.float32), FORMATS["AWQ GEMM"].decode(second, torch.float32))
    assert torch.equal(copy.deepcopy(layer).to(torch.float32).qweight, second["qweight"])
    assert layer.to("meta").int4_scales is None


def test_gradients_pass_through_a_converted_layer(no_compiler):
    tensors = stored("AWQ GEMM", 64, 64, 32)
    layer = packed_layer("AWQ GEMM", tensors, 64, 64)
    layer.convert()
    inputs = torch.randn(2, 64).bfloat16().requires_grad_()
    layer(inputs).sum().backward()
    expected = torch.ones(2, 64).bfloat16() @ FORMATS["AWQ GEMM"].decode(tensors, torch.bfloat16)
    assert torch.equal(inputs.grad, expected)


@pytest.mark.parametrize(("rows", "columns", "group"), [(72, 64, 32), (64, 60, 20), (64, 64, 16)])
def test_shapes_that_the_operator_does_not_take_stay_as_they_are(no_compiler, rows, columns, group):
    tensors = stored("AWQ GEMM", rows, columns, group)
    layer = packed_layer("AWQ GEMM", tensors, rows, columns)
    layer.convert()
    assert layer.int4_scales is None
