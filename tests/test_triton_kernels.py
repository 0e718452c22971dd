"""Where Triton's kernels run and where they do not; and that they compile for GPUs, without one."""

import sys
from contextlib import contextmanager

import pytest
import torch
from nemotron_vl import decode_attention, packed_matmul, triton_kernels

from tests.kernel_runs import DEVICE, needs_compiler, needs_kernels
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
    triton_kernels._runs_trial.cache_clear()
    monkeypatch.setattr(triton_kernels, "triton", object())
    monkeypatch.setattr(triton_kernels, "KERNEL_DEVICES", ("cpu",))

    def install(call) -> None:
        for module, names in (
            (triton_kernels, ["_count_kernel"]),
            (decode_attention, ["_partial_kernel", "_join_kernel"]),
            (packed_matmul, ["_fp8_kernel", "_nvfp4_kernel"]),
        ):
            for name in names:
                monkeypatch.setattr(module, name, Kernel(call), raising=False)

    yield install
    triton_kernels._runs_trial.cache_clear()


def test_a_trial_decides_once_for_each_device(pretended_triton):
    calls = []
    pretended_triton(lambda number: calls.append(number.add_(1)))
    assert all(triton_kernels.runs_kernels(torch.device("cpu")) for _ in range(3)) and len(calls) == 1
    assert not triton_kernels.runs_kernels(torch.device("meta"))


@pytest.mark.parametrize("broken", [RuntimeError("Failed to find C compiler."), None], ids=["raises", "does nothing"])
def test_triton_that_cannot_run_is_left_alone_and_said_once(pretended_triton, monkeypatch, broken):
    def call(number):
        if broken is not None:
            raise broken

    said = []
    monkeypatch.setattr(triton_kernels.logger, "warning", said.append)
    pretended_triton(call)
    assert not any(triton_kernels.runs_kernels(torch.device("cpu")) for _ in range(3))
    assert len(said) == 1 and str(broken or "another number") in said[0] and "gcc" in said[0]


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
    byte, scale = torch.zeros(8, 16, dtype=torch.uint8), torch.ones(())
    for block_scales in (None, byte[:, :1]):
        packed_matmul._launch(torch.zeros(1, 16), byte, scale, block_scales)
    assert len(launched) == 5 and all(devices == [torch.device("cpu")] for devices in launched)


@needs_kernels
def test_the_trial_runs(kernels_on_this_device):
    triton_kernels._runs_trial.cache_clear()
    assert triton_kernels.runs_kernels(torch.zeros(1, device=DEVICE).device)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_the_kernels_compile_for_an_h100(dtype):
    """To machine code, by Triton's own assembler: no GPU is needed for that."""
    import triton
    from triton.backends.compiler import GPUTarget

    def compile_kernel(kernel, pointers: dict[str, str], constants: dict[str, int]) -> None:
        kinds = dict.fromkeys(kernel.arg_names, "i32") | pointers | dict.fromkeys(constants, "constexpr")
        signature = {name: kinds[name] for name in kernel.arg_names}
        source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
        assert compiled.asm["cubin"] and compiled.metadata.shared <= 64 * 1024  # which every GPU has

    states_of = dict.fromkeys(("query", "key", "value"), f"*{dtype}") | {"mask": "*u8", "scaling": "fp32"}
    parts = dict.fromkeys(("sums", "totals", "peaks"), "*fp32")
    widest = decode_attention.MAX_HEAD_BYTES // (4 if dtype == "fp32" else 2)
    sizes = {"HEAD_SIZE": widest, "NUM_PARTS": decode_attention.NUM_PARTS}
    partial = {"NUM_SHARED": 4, "BLOCK_PLACES": decode_attention.BLOCK_PLACES, "SHARED_QUERIES": 16, **sizes}
    compile_kernel(decode_attention._partial_kernel, {**states_of, **parts}, partial)
    compile_kernel(decode_attention._join_kernel, {**parts, "outputs": f"*{dtype}"}, sizes)
    rows = {"inputs": f"*{dtype}", "outputs": f"*{dtype}", "weight": "*u8", "scale": "*fp32", "block_scales": "*u8"}
    blocks = {name: getattr(packed_matmul, name) for name in ("BLOCK_OUTPUTS", "BLOCK_BYTES")}
    for kernel in (packed_matmul._fp8_kernel, packed_matmul._nvfp4_kernel):
        compile_kernel(kernel, rows, blocks)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("name", ["triton_kernels", "decode_attention", "packed_matmul"])
def test_the_kernels_in_the_interpreter(name):
    """Runs the tests of the kernels once more, where Triton's interpreter stands in for a GPU."""
    run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/test_{name}.py", TRITON_INTERPRET="1")
