"""Where Triton's kernels run and where they do not; and that they compile for GPUs, without one."""

import json
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from nemotron_vl import decode_attention, packed_matmul, triton_kernels
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.kernel_runs import DEVICE, needs_compiler, needs_kernels
from tests.machine_code import ARCHITECTURES, compile_kernel
from tests.processes import run


class Kernel:
    """Stands in for a Triton kernel, which is called as `kernel[grid](*arguments)`."""

    def __init__(self, call):
        self.call = call

    def __getitem__(self, grid):
        return self.call


@pytest.fixture
def pretended_triton(monkeypatch):
    """Install kernels that do what `call` does, as if the CPU were a GPU."""
    monkeypatch.setattr(triton_kernels, "_working", set())
    monkeypatch.setattr(triton_kernels, "_failed", {})
    monkeypatch.setattr(triton_kernels, "triton", object())
    monkeypatch.setattr(triton_kernels, "KERNEL_DEVICES", ("cpu",))

    def install(call) -> None:
        for module, names in (
            (triton_kernels, ["_count_kernel"]),
            (decode_attention, ["_partial_kernel", "_join_kernel"]),
            (packed_matmul, ["_fp8_kernel", "_nvfp4_kernel", "_awq_kernel", "_gemm_kernel", "_join_kernel"]),
        ):
            for name in names:
                monkeypatch.setattr(module, name, Kernel(call), raising=False)

    return install


@pytest.fixture
def said(monkeypatch):
    """What the trial logs."""
    warnings = []
    monkeypatch.setattr(triton_kernels.logger, "warning", warnings.append)
    return warnings


CPU = torch.device("cpu")


def test_a_trial_that_succeeds_decides_once_for_each_device(pretended_triton):
    calls = []
    pretended_triton(lambda number: calls.append(number.add_(1)))
    assert all(triton_kernels.runs_kernels(CPU) for _ in range(3)) and len(calls) == 1
    assert not triton_kernels.runs_kernels(torch.device("meta"))


@pytest.mark.parametrize("broken", [RuntimeError("Failed to find C compiler."), None], ids=["raises", "does nothing"])
def test_triton_that_cannot_run_is_left_alone_and_said_once(pretended_triton, said, broken):
    calls = []

    def call(number):
        calls.append(number)
        if broken is not None:
            raise broken

    pretended_triton(call)
    assert not any(triton_kernels.runs_kernels(CPU) for _ in range(3))
    assert len(said) == len(calls) == 1
    assert str(broken or "another number") in said[0] and "gcc" in said[0] and "headers of Python" in said[0]


def test_triton_that_runs_again_is_used_again(pretended_triton, said, monkeypatch):
    """A full disk, for one, fails the compiler for a while."""
    clock = [0.0]
    monkeypatch.setattr(triton_kernels.time, "monotonic", lambda: clock[0])

    def full_disk(_):
        raise OSError("No space left on device")

    pretended_triton(full_disk)
    assert not triton_kernels.runs_kernels(CPU)
    pretended_triton(lambda number: number.add_(1))
    assert not triton_kernels.runs_kernels(CPU)  # not tried in every layer of every step
    clock[0] = triton_kernels.SECONDS_TO_NEXT_TRIAL + 1
    assert triton_kernels.runs_kernels(CPU) and len(said) == 1


@pytest.mark.parametrize("error", triton_kernels.CALLERS_ERRORS, ids=lambda error: error.__name__)
def test_errors_of_the_callers_program_are_not_blamed_on_triton(pretended_triton, said, error):
    def call(_):
        raise error("out of memory")

    pretended_triton(call)
    with pytest.raises(error, match="out of memory"):
        triton_kernels.runs_kernels(CPU)
    pretended_triton(lambda number: number.add_(1))
    assert triton_kernels.runs_kernels(CPU) and not said


def test_there_is_no_trial_while_a_graph_is_captured_or_tensors_are_fake(pretended_triton, said, monkeypatch):
    pretended_triton(lambda number: number.add_(1))
    with FakeTensorMode():
        assert not triton_kernels.runs_kernels(CPU)
    monkeypatch.setattr(triton_kernels, "KERNEL_DEVICES", ("cuda",))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not triton_kernels.runs_kernels(torch.device("cuda", 0))
    assert not said and not triton_kernels._failed


def test_the_message_names_what_the_machine_lacks(pretended_triton, said, monkeypatch, tmp_path):
    """gcc says "fatal error: Python.h", but what arrives here is a CalledProcessError with its command."""
    monkeypatch.setattr(triton_kernels.sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setattr(triton_kernels.shutil, "which", lambda name: f"bin/{name}" if name == "gcc" else None)

    def call(_):
        raise subprocess.CalledProcessError(1, ["gcc", "main.c"])

    pretended_triton(call)
    triton_kernels.runs_kernels(CPU)
    assert (
        "lacks Python.h, the headers of Python (apt install python3" in said[0] and "a C compiler (apt" not in said[0]
    )
    monkeypatch.setattr(triton_kernels.shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    assert "lacks a C compiler (apt install gcc) and Python.h" in triton_kernels._requirements()
    (tmp_path / "Python.h").touch()
    assert "and Python.h" not in triton_kernels._requirements()


def test_rocm_is_left_to_plain_torch(pretended_triton, monkeypatch):
    pretended_triton(lambda number: number.add_(1))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not triton_kernels.runs_kernels(CPU)


def test_without_triton_nothing_runs(monkeypatch):
    monkeypatch.setattr(triton_kernels, "triton", None)
    assert not triton_kernels.runs_kernels(torch.device("cuda"))


def test_kernels_are_launched_on_the_device_of_their_tensors(pretended_triton, monkeypatch):
    """Triton launches on torch's current device, which is not that of a model on the second GPU."""
    current, launched = [], []

    @contextmanager
    def device_of(tensor):
        current.append(tensor.device)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    pretended_triton(lambda *_: launched.append(list(current)))
    triton_kernels._runs_trial(torch.device("cpu"))
    states = [torch.zeros(1, 2, places, 16) for places in (1, 5, 5)]
    decode_attention._launch(*states, torch.ones(1, 1, 1, 5, dtype=torch.bool), 1.0)
    words = torch.zeros(32, 8, dtype=torch.int32)
    for format_name, stored in {
        "FP8": [words.view(torch.uint8), torch.ones(())],
        "NVFP4": [words, words.view(torch.uint8)[:, :4], torch.ones(())],
        "W4A16_AWQ": [words, torch.ones(64, 1)],
        "AWQ GEMM": [words, words[:1], torch.ones(1, 64)],
    }.items():
        packed_matmul._launch(format_name, torch.zeros(1, 32), stored)
    assert len(launched) == 8 and all(devices == [torch.device("cpu")] for devices in launched)


@needs_kernels
def test_the_trial_runs(kernels_on_this_device, monkeypatch):
    monkeypatch.setattr(triton_kernels, "_working", set())
    assert triton_kernels.runs_kernels(torch.zeros(1, device=DEVICE).device)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_machine_code_of_the_attention_spills_no_registers(dtype):
    """Compiled by Triton's own assembler: no GPU is needed for that."""
    number_bytes = 4 if dtype == "fp32" else 2
    states_of = dict.fromkeys(("query", "key", "value"), f"*{dtype}") | {"mask": "*u8", "scaling": "fp32"}
    parts = dict.fromkeys(("sums", "totals", "peaks"), "*fp32")
    sizes = {"HEAD_SIZE": decode_attention.MAX_HEAD_BYTES // number_bytes, "NUM_PARTS": decode_attention.NUM_PARTS}
    partial = {"NUM_SHARED": 4, "BLOCK_PLACES": decode_attention.BLOCK_PLACES[number_bytes], "SHARED_QUERIES": 16}
    for architecture in ARCHITECTURES:
        for kernel, pointers, constants in (
            (decode_attention._partial_kernel, states_of | parts, sizes | partial),
            (decode_attention._join_kernel, parts | {"outputs": f"*{dtype}"}, sizes),
        ):
            code = compile_kernel(kernel, pointers, constants, ("num_places",), architecture)
            assert not code.spilled, (kernel, architecture, code.spilled)
            assert code.shared <= 48 * 1024  # which every GPU has
            products = sum("HMMA" in instruction for loop in code.loops for instruction in loop)
            assert products or dtype == "fp32" or kernel is decode_attention._join_kernel


PACKED = {
    "NVFP4": (packed_matmul._nvfp4_kernel, packed_matmul.NVFP4_TILES, {"words": "*i32", "block_scales": "*u8"}),
    "FP8": (packed_matmul._fp8_kernel, packed_matmul.FP8_TILES, {"weight": "*u8"}),
} if triton_kernels.triton is not None else {}  # fmt: skip
SIZES = ("num_inputs", "num_outputs")
AWQ = {"words": "*i32", "scales": "*fp32"}
GEMM = {"words": "*i32", "zeros": "*i32", "scales": "*fp16", "partial": "*fp32"}


def awq_constants(rows, pairs, inputs):
    return {"ROWS": rows, "PAIRS": pairs, "GROUP": 128, "GROUPS": inputs // 128}


def gemm_constants(rows):
    inputs, words = packed_matmul.GEMM_TILES[rows]
    return {"ROWS": rows, "INPUTS": inputs, "WORDS": words, "GROUP": 128}


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("name, most", [("NVFP4", 4.5), ("FP8", 4.2)])
def test_machine_code_of_packed_products_takes_few_instructions_a_weight(name, most):
    """More, and a decode step of an H100 waits for instructions instead of memory. Up to four rows share a decoding."""
    kernel, tiles, pointers = PACKED[name]
    pointers = {"inputs": "*bf16", "outputs": "*bf16", "scale": "*fp32", **pointers}
    single = None
    for rows, (outputs, inputs) in tiles.items():
        constants = {"ROWS": rows, "OUTPUTS": outputs, "INPUTS": inputs, "HARDWARE": True}
        code = compile_kernel(kernel, pointers, constants, SIZES, 90)
        counted = code.per_item(outputs * inputs)
        single = single or counted
        assert not code.spilled and counted <= (most if rows == 1 else rows * single), (rows, counted)
    longest = max(code.loops, key=len)
    assert sum("STG" in instruction or "ATOM" in instruction for instruction in longest) == 0


@pytest.mark.slow
@needs_compiler
def test_machine_code_of_awq_takes_few_instructions_a_weight_at_the_shapes_of_the_8b():
    """Where outputs are too few for the multiprocessors, a program takes fewer of them, and more inputs at once."""
    pointers = {"inputs": "*bf16", "outputs": "*bf16"}
    for num_outputs, num_inputs, most in ((14336, 4096, 5.8), (4096, 14336, 6.0), (1024, 4096, 7.0)):
        single = None
        for rows, (pairs, inputs) in packed_matmul.AWQ_TILES.items():
            own = packed_matmul.outputs_per_program(num_outputs // 2, pairs, 132)
            groups = packed_matmul.groups_at_once(num_inputs // 128, pairs // own * inputs // 128)
            constants = awq_constants(rows, own, 128 * groups)
            code = compile_kernel(packed_matmul._awq_kernel, pointers | AWQ, constants, SIZES, 90)
            counted = code.per_item(2 * own * 128 * groups)
            single = single or counted
            assert not code.spilled and counted <= (most if rows == 1 else 0.8 * rows * single), (constants, counted)
    for rows, (inputs, words) in packed_matmul.GEMM_TILES.items():
        code = compile_kernel(packed_matmul._gemm_kernel, pointers | GEMM, gemm_constants(rows), SIZES, 90)
        inner, outer = sorted(map(len, code.loops))
        rounds = 128 // inputs  # of the inner loop in one of the outer
        counted = (outer + (rounds - 1) * inner) * code.num_threads / (8 * words * 128)
        assert not code.spilled and counted <= {1: 6.7, 2: 8.6, 4: 12.4}[rows], (rows, counted)


@pytest.mark.slow
@needs_compiler
def test_machine_code_of_packed_products_spills_no_registers():
    """With the instruction for e4m3 and without; in float32, whose inputs take most registers, on one of them."""
    for architecture, dtypes in {
        75: ["fp16"],
        80: ["bf16"],
        89: ["bf16"],
        90: ["bf16", "fp32"],
        120: ["bf16"],
    }.items():
        for dtype in dtypes:
            shared = {"inputs": f"*{dtype}", "outputs": f"*{dtype}", "scale": "*fp32"}
            halved = 2 if dtype == "fp32" else 1
            cases = [
                (
                    kernel,
                    pointers,
                    {"ROWS": rows, "OUTPUTS": outputs, "INPUTS": inputs // halved, "HARDWARE": architecture >= 89},
                )
                for kernel, tiles, pointers in PACKED.values()
                for rows, (outputs, inputs) in tiles.items()
                if rows != 2
            ]
            cases += [
                (packed_matmul._awq_kernel, AWQ, awq_constants(rows, *tile))
                for rows, tile in packed_matmul.AWQ_TILES.items()
                if rows != 2
            ]
            cases += [
                (packed_matmul._gemm_kernel, GEMM, gemm_constants(rows))
                for rows in packed_matmul.GEMM_TILES
                if rows != 2
            ]
            for kernel, pointers, constants in cases:
                code = compile_kernel(kernel, shared | pointers, constants, SIZES, architecture)
                assert not code.spilled, (architecture, dtype, kernel, constants, code.spilled)
                assert code.shared <= 48 * 1024


@pytest.mark.slow
@pytest.mark.skipif(torch.version.cuda is None, reason="needs a CUDA build of torch, no GPU")
def test_machine_code_of_a_compiled_step_has_no_matmul_of_another_library(tmp_path):
    """Two layers. With Inductor's defaults they are 15 launches and 15 matmuls of cuBLAS."""
    script = "import tools; from tests.compiled_step import main; main()"
    counted = json.loads(
        run(sys.executable, "-c", script, "ours", TORCHINDUCTOR_CACHE_DIR=str(tmp_path)).splitlines()[-1]
    )
    assert counted["others"] == {"torch.ops.nemotron_vl.decode_attention_nemotron_vl_decode_attention.default": 2}
    assert counted["launches"] <= 22


@pytest.mark.parametrize("num_multiprocessors", [40, 108, 132])
def test_every_multiprocessor_gets_programs_at_the_shapes_of_the_8b(num_multiprocessors):
    """Key and value projections have 1,024 outputs, and so too few programs of the largest size."""
    for num_outputs in (1024, 4096, 14336):
        for most in (8, 4, *(pairs for pairs, _ in packed_matmul.AWQ_TILES.values())):
            count = packed_matmul.outputs_per_program(num_outputs, most, num_multiprocessors)
            assert num_outputs / count >= 2 * num_multiprocessors and (count == most or most % count == 0)
        parts = packed_matmul.parts_of_inputs(num_outputs // 8, 32, num_multiprocessors)
        assert num_outputs // 128 * parts >= 2 * num_multiprocessors or parts == 32


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("name", ["triton_kernels", "decode_attention", "packed_matmul"])
def test_the_kernels_in_the_interpreter(name):
    """Runs the tests of the kernels once more, where Triton's interpreter stands in for a GPU."""
    run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/test_{name}.py", TRITON_INTERPRET="1")
