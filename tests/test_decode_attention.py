"""Decode attention against transformers' sdpa: on a GPU, or in Triton's interpreter on a CPU; and its compilation.

In the interpreter (`pip install --no-deps triton`), in a process of its own, because Triton asks once, when imported:

    TRITON_INTERPRET=1 python -m pytest -q tests/test_decode_attention.py
"""

import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from nemotron_vl import decode_attention, packed_matmul
from nemotron_vl.modeling_nemotron_vl import Llama_Nemotron_Nano_VL
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tools import ROOT
from tools.tiny_checkpoint import make_config, make_tokenizer

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_kernel = pytest.mark.skipif(
    not (HAS_TRITON and (INTERPRETED or torch.cuda.is_available())),
    reason="needs Triton (pip install --no-deps triton) and a GPU or TRITON_INTERPRET=1",
)
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}  # of values around 1
if INTERPRETED:
    del TOLERANCE[torch.bfloat16]  # which NumPy does not know: the interpreter multiplies the bits as integers
GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


@pytest.fixture
def kernel_on_this_device(monkeypatch):
    monkeypatch.setattr(decode_attention, "KERNEL_DEVICES", (DEVICE,))


def states(num_rows=1, num_heads=8, num_key_heads=2, num_places=100, head_size=16, dtype=torch.float32):
    """Query, keys and values of one step."""
    generator = torch.Generator().manual_seed(num_places)
    shapes = [(num_rows, num_heads, 1, head_size), *[(num_rows, num_key_heads, num_places, head_size)] * 2]
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


def visible(num_places: int, *ranges: tuple[int, int]) -> torch.Tensor:
    """The mask of a batch whose rows see the places of these ranges."""
    place = torch.arange(num_places)
    rows = [(place >= first) & (place < end) for first, end in ranges]
    return torch.stack(rows)[:, None, None, :].to(DEVICE)


def attend(function, query, key, value, mask, **options) -> torch.Tensor:
    module = SimpleNamespace(num_key_value_groups=query.shape[1] // key.shape[1], is_causal=True)
    with torch.no_grad():
        return function(module, query, key, value, mask, scaling=0.3, **options)[0]


@needs_kernel
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "num_places, ranges",
    [
        (5, [(0, 5)]),
        (64, [(0, 1)]),
        (100, [(0, 40), (7, 90)]),  # left padding in the second row
        (3000, [(0, 2100), (2050, 2051), (64, 2999)]),  # more blocks than parts; one place alone, in a late block
    ],
)
def test_kernel_equals_sdpa(kernel_on_this_device, num_places, ranges, dtype):
    mask = visible(num_places, *ranges)
    query, key, value = states(len(ranges), num_places=num_places, dtype=dtype)
    assert decode_attention.has_kernel(query, key, value, mask)
    expected = attend(sdpa_attention_forward, query, key, value, mask)
    output = attend(decode_attention.decode_attention_forward, query, key, value, mask)
    assert output.shape == expected.shape and output.dtype == dtype
    torch.testing.assert_close(output.float(), expected.float(), rtol=0, atol=TOLERANCE[dtype])


@needs_kernel
@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (32, 2)], ids=str)
def test_any_number_of_queries_shares_a_key(kernel_on_this_device, heads):
    query, key, value = states(2, *heads, num_places=70, head_size=32)
    mask = visible(70, (0, 65), (3, 70))
    expected = attend(sdpa_attention_forward, query, key, value, mask)
    output = attend(decode_attention.decode_attention_forward, query, key, value, mask)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


@needs_kernel
def test_places_that_the_mask_leaves_out_are_not_read(kernel_on_this_device):
    """NaN there would spread through any product, and a mask of numbers added to it would not help."""
    query, key, value = states(num_places=200)
    mask = visible(200, (10, 90))
    expected = attend(sdpa_attention_forward, query, key, value, mask)
    for stored in (key, value):
        stored[:, :, :10] = stored[:, :, 90:] = float("nan")
    output = attend(decode_attention.decode_attention_forward, query, key, value, mask)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


def grouped_model(attention: str | None) -> Llama_Nemotron_Nano_VL:
    """A tiny model with heads as wide as the kernel needs them."""
    config = make_config(make_tokenizer())
    config.text_config.update({"head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2})
    config.text_config._attn_implementation = attention
    torch.manual_seed(0)
    return Llama_Nemotron_Nano_VL(config).eval().to(DEVICE)


@needs_kernel
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_generation_over_a_static_cache_gives_the_tokens_of_sdpa(kernel_on_this_device, monkeypatch, compiled):
    ids = torch.randint(10, 60, (2, 9), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0  # left padding
    calls, launch = [], decode_attention._launch

    def counted(*args):
        calls.append(args)
        return launch(*args)

    monkeypatch.setattr(decode_attention, "_launch", counted)
    options = {**GREEDY, "attention_mask": mask, "cache_implementation": "static", "disable_compile": True}
    expected = grouped_model("sdpa").generate(ids, **options)
    assert not calls
    model = grouped_model(None)
    assert model.language_model.config._attn_implementation == decode_attention.NAME
    if compiled:
        model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    assert torch.equal(model.generate(ids, **options), expected)
    assert compiled or len(calls) == 3 * model.config.text_config.num_hidden_layers


def test_everything_else_goes_to_sdpa(monkeypatch):
    monkeypatch.setattr(decode_attention, "triton", object())
    monkeypatch.setattr(decode_attention, "KERNEL_DEVICES", ("cpu",))
    query, key, value = (tensor.cpu() for tensor in states(num_places=10))
    mask = visible(10, (0, 7)).cpu()
    assert decode_attention.has_kernel(query, key, value, mask)
    assert not decode_attention.has_kernel(query, key, value, None)
    assert not decode_attention.has_kernel(query, key, value, mask.float())
    assert not decode_attention.has_kernel(query, key, value, mask[..., :9])
    assert not decode_attention.has_kernel(query.expand(-1, -1, 2, -1), key, value, mask)
    assert not decode_attention.has_kernel(*(state[..., :8] for state in (query, key, value)), mask)
    assert not decode_attention.has_kernel(*(state[..., :12] for state in (query, key, value)), mask)
    assert not decode_attention.has_kernel(query.requires_grad_(), key, value, mask)
    query = query.detach()
    monkeypatch.setattr(decode_attention, "_launch", lambda *args: pytest.fail("the kernel was called"))
    for others in ({"dropout": 0.5}, {"cache": object()}):
        attend(decode_attention.decode_attention_forward, query, key, value, mask, **others)
    monkeypatch.setattr(decode_attention, "KERNEL_DEVICES", ("cuda",))
    output = attend(decode_attention.decode_attention_forward, query, key, value, mask)
    assert torch.equal(output, attend(sdpa_attention_forward, query, key, value, mask))


def test_the_default_needs_triton_and_yields_to_a_choice(monkeypatch):
    monkeypatch.setattr(decode_attention, "triton", object())
    assert grouped_model(None).language_model.config._attn_implementation == decode_attention.NAME
    for chosen in ("sdpa", "eager"):
        assert grouped_model(chosen).language_model.config._attn_implementation == chosen
    monkeypatch.setattr(decode_attention, "triton", None)
    assert grouped_model(None).language_model.config._attn_implementation == "sdpa"


def test_the_name_can_be_chosen_anywhere():
    """Without Triton, and on a CPU, it is sdpa."""
    ids = torch.arange(3, 12)[None]
    options = {**GREEDY, "attention_mask": torch.ones_like(ids)}
    chosen = grouped_model(decode_attention.NAME).cpu().generate(ids, **options)
    assert torch.equal(chosen, grouped_model("sdpa").cpu().generate(ids, **options))


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON or INTERPRETED, reason="needs Triton (pip install --no-deps triton)")
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_the_kernels_compile_for_an_h100(dtype):
    """To machine code, by Triton's own assembler: no GPU is needed for that."""
    import triton
    from triton.backends.compiler import GPUTarget

    def compile_kernel(kernel, pointers: dict[str, str], constants: dict[str, int]) -> None:
        kinds = dict.fromkeys(kernel.arg_names, "i32") | pointers | dict.fromkeys(constants, "constexpr")
        signature = {name: kinds[name] for name in kernel.arg_names}
        source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants)
        assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]

    states_of = dict.fromkeys(("query", "key", "value"), f"*{dtype}") | {"mask": "*u8", "scaling": "fp32"}
    parts = dict.fromkeys(("sums", "totals", "peaks"), "*fp32")
    sizes = {"HEAD_SIZE": 128, "NUM_PARTS": decode_attention.NUM_PARTS}
    partial = {"NUM_SHARED": 4, "BLOCK_PLACES": decode_attention.BLOCK_PLACES, "SHARED_QUERIES": 16, **sizes}
    compile_kernel(decode_attention._partial_kernel, {**states_of, **parts}, partial)
    compile_kernel(decode_attention._join_kernel, {**parts, "outputs": f"*{dtype}"}, sizes)
    rows = {"inputs": f"*{dtype}", "outputs": f"*{dtype}", "weight": "*u8", "scale": "*fp32", "block_scales": "*u8"}
    blocks = {name: getattr(packed_matmul, name) for name in ("BLOCK_OUTPUTS", "BLOCK_BYTES")}
    for kernel in (packed_matmul._fp8_kernel, packed_matmul._nvfp4_kernel):
        compile_kernel(kernel, rows, blocks)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON or INTERPRETED, reason="needs Triton (pip install --no-deps triton), once")
def test_the_kernel_in_the_interpreter():
    """Runs the tests above once more, where Triton's interpreter stands in for a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-3000:]
