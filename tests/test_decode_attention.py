"""Decode attention against transformers' sdpa; where the kernel runs, see kernel_runs.py."""

from types import SimpleNamespace

import pytest
import torch
from nemotron_vl import decode_attention
from nemotron_vl.modeling_nemotron_vl import Llama_Nemotron_Nano_VL
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tests.kernel_runs import DEVICE, INTERPRETED, needs_kernels
from tools.tiny_checkpoint import make_config, make_tokenizer

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}  # of values around 1
if INTERPRETED:
    del TOLERANCE[torch.bfloat16]  # which NumPy does not know: the interpreter multiplies the bits as integers
GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


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


@needs_kernels
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
def test_kernel_equals_sdpa(kernels_on_this_device, num_places, ranges, dtype):
    mask = visible(num_places, *ranges)
    query, key, value = states(len(ranges), num_places=num_places, dtype=dtype)
    assert decode_attention.has_kernel(query, key, value, mask)
    expected = attend(sdpa_attention_forward, query, key, value, mask)
    output = attend(decode_attention.decode_attention_forward, query, key, value, mask)
    assert output.shape == expected.shape and output.dtype == dtype
    torch.testing.assert_close(output.float(), expected.float(), rtol=0, atol=TOLERANCE[dtype])


@needs_kernels
@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (32, 2)], ids=str)
def test_any_number_of_queries_shares_a_key(kernels_on_this_device, heads):
    query, key, value = states(2, *heads, num_places=70, head_size=32)
    mask = visible(70, (0, 65), (3, 70))
    expected = attend(sdpa_attention_forward, query, key, value, mask)
    output = attend(decode_attention.decode_attention_forward, query, key, value, mask)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


@needs_kernels
def test_places_that_the_mask_leaves_out_are_not_read(kernels_on_this_device):
    """NaN there would spread through any product, and a mask of numbers added to it would not help."""
    query, key, value = states(num_places=200)
    mask = visible(200, (10, 90))
    expected = attend(sdpa_attention_forward, query, key, value, mask)
    for stored in (key, value):
        stored[:, :, :10] = stored[:, :, 90:] = float("nan")
    output = attend(decode_attention.decode_attention_forward, query, key, value, mask)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


@needs_kernels
def test_a_row_that_sees_nothing_gets_zeros(kernels_on_this_device):
    mask = visible(100, (0, 0), (3, 80))
    states_of_both = states(2, num_places=100)
    output = attend(decode_attention.decode_attention_forward, *states_of_both, mask)
    assert torch.equal(output[0], torch.zeros_like(output[0])) and output[1].all()


def grouped_model(attention: str | None) -> Llama_Nemotron_Nano_VL:
    """A tiny model with heads as wide as the kernel needs them."""
    config = make_config(make_tokenizer())
    config.text_config.update({"head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2})
    config.text_config._attn_implementation = attention
    torch.manual_seed(0)
    return Llama_Nemotron_Nano_VL(config).eval().to(DEVICE)


@needs_kernels
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_generation_over_a_static_cache_gives_the_tokens_of_sdpa(kernels_on_this_device, monkeypatch, compiled):
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
    monkeypatch.setattr(decode_attention, "runs_kernels", lambda device: device.type == "cpu")
    query, key, value = (tensor.cpu() for tensor in states(num_places=10))
    mask = visible(10, (0, 7)).cpu()
    assert decode_attention.has_kernel(query, key, value, mask)
    assert not decode_attention.has_kernel(query, key, value, None)
    assert not decode_attention.has_kernel(query, key, value, mask.float())
    assert not decode_attention.has_kernel(query, key, value, mask[..., :9])
    assert not decode_attention.has_kernel(query.expand(-1, -1, 2, -1), key, value, mask)
    assert not decode_attention.has_kernel(*(state[..., :8] for state in (query, key, value)), mask)
    assert not decode_attention.has_kernel(*(state[..., :12] for state in (query, key, value)), mask)
    assert not decode_attention.has_kernel(*(state.double() for state in (query, key, value)), mask)
    wide = [state.repeat(1, 1, 1, 16) for state in (query, key, value)]  # 256 channels
    assert not decode_attention.has_kernel(*wide, mask)
    for place in (1, 2):  # a copy of the whole cache in every step would cost more than the kernel saves
        strided = [query, key, value]
        strided[place] = strided[place].transpose(1, 2).contiguous().transpose(1, 2)
        assert strided[place].shape == key.shape and not decode_attention.has_kernel(*strided, mask)
    with monkeypatch.context() as old:
        old.setattr(decode_attention, "capability", lambda device: (7, 5))
        assert not decode_attention.has_kernel(query, key, value, mask)
    assert not decode_attention.has_kernel(*(state.to("meta") for state in (query, key, value)), mask)
    for place in range(3):
        trained = [state.detach().requires_grad_(place == n) for n, state in enumerate((query, key, value))]
        assert not decode_attention.has_kernel(*trained, mask)
        with torch.no_grad():
            assert decode_attention.has_kernel(*trained, mask)
    monkeypatch.setattr(decode_attention, "_launch", lambda *args: pytest.fail("the kernel was called"))
    for others in ({"dropout": 0.5}, {"cache": object()}):
        attend(decode_attention.decode_attention_forward, query, key, value, mask, **others)
    monkeypatch.setattr(decode_attention, "runs_kernels", lambda device: False)
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
