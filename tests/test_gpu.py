"""On a GPU the default way gives the tokens of the CPU, with heads that reach the attention kernel.

    python -m pytest -m gpu

Without a GPU, the same command runs these tests on the pretended device, where nothing is compiled.
"""

import copy

import pytest
import torch
from nemotron_vl import decode_attention, packed_matmul
from nemotron_vl.modeling_nemotron_vl import Llama_Nemotron_Nano_VL
from nemotron_vl.quantization_nemotron_vl import FORMATS, PackedLinear, packed_linears

from tests.conftest import golden_parameters
from tests.pretended_cuda import pretended_cuda
from tests.prompts import ONE, WIDE, encode

pytestmark = pytest.mark.gpu
IS_REAL = torch.cuda.is_available()
GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}


@pytest.fixture
def place():
    """A function that puts a copy of a model, or the tensors of a mapping, on the device."""
    if IS_REAL:
        yield (
            lambda tree: (
                copy.deepcopy(tree).to("cuda")
                if isinstance(tree, torch.nn.Module)
                else {
                    key: value.to("cuda") if isinstance(value, torch.Tensor) else value for key, value in tree.items()
                }
            )
        )
        return
    with pretended_cuda() as cuda:
        yield lambda tree: cuda.place(copy.deepcopy(tree) if isinstance(tree, torch.nn.Module) else tree)


@pytest.fixture(scope="module")
def attending(tiny_checkpoint):
    """The tiny model, whose heads of 16 channels the attention kernel takes; those of nano, of 48, it does not."""
    options = {"attn_implementation": {"text_config": decode_attention.NAME, "vision_config": "sdpa"}}
    return Llama_Nemotron_Nano_VL.from_pretrained(tiny_checkpoint, **options).eval()


def tokens(output: torch.Tensor) -> list:
    return output.tolist()


def test_the_default_way_gives_the_tokens_of_the_cpu(attending, place, processor):
    """Static cache, attention kernel, and on a real device a compiled step; several prompts in turn, and a batch."""
    model = place(attending)
    for images in ([ONE], [WIDE], [ONE, WIDE], [ONE]):
        inputs = dict(encode(processor, images))
        expected = tokens(attending.generate(**inputs, **GREEDY))
        assert tokens(model.generate(**place(inputs), **GREEDY)) == expected
        assert tokens(model.generate(**inputs, **GREEDY, disable_compile=True)) == expected


def test_the_attention_kernel_is_what_a_step_calls(attending, place, processor, monkeypatch):
    calls, launch = [], decode_attention._launch
    monkeypatch.setattr(decode_attention, "_launch", lambda *args: calls.append(1) or launch(*args))
    options = {**GREEDY, "cache_implementation": "static", "disable_compile": True}
    place(attending).generate(**place(dict(encode(processor, [ONE]))), **options)
    assert len(calls) == 7 * attending.config.text_config.num_hidden_layers


def test_answers_in_turn_compile_one_graph(attending, place, processor):
    from torch._dynamo.utils import counters

    model = place(attending)
    before = counters["stats"]["unique_graphs"]
    for images in ([ONE], [WIDE], [ONE]):
        model.generate(**place(dict(encode(processor, images))), **GREEDY)
    assert counters["stats"]["unique_graphs"] - before <= 1


@pytest.mark.parametrize("checkpoint", golden_parameters("8b-v1", lambda folder: ["fp8", "nvfp4", "awq"]))
def test_packed_weights_give_the_tokens_of_the_cpu(golden_8b, place, checkpoint):
    cpu = Llama_Nemotron_Nano_VL.from_pretrained(golden_8b / f"checkpoint_{checkpoint}").eval()
    assert all(layer.format.name in packed_matmul.FORMATS for _, layer in packed_linears(cpu))
    ids = {"input_ids": torch.arange(3, 20)[None], "attention_mask": torch.ones(1, 17, dtype=torch.long)}
    expected = tokens(cpu.generate(**ids, **GREEDY))
    model = place(cpu)
    assert tokens(model.generate(**place(ids), **GREEDY)) == expected
    assert all(
        isinstance(layer, PackedLinear) and layer.format in FORMATS.values() for _, layer in packed_linears(model)
    )


def test_chats_and_streams_give_the_answers_of_the_cpu(attending, place, processor):
    model = place(attending)
    tiles = dict(processor.image_processor([ONE, WIDE]))
    options = {"max_new_tokens": 8, "do_sample": False}
    for there in (tiles, place(tiles)):
        question = {"question": "<image>, <image>?", "generation_config": options}
        answer = attending.chat(processor, **question, **tiles)
        assert model.chat(processor, **question, **there) == answer
        assert "".join(model.chat_stream(processor, **question, **there)).strip() == answer


def test_half_precision_stays_finite_and_near(attending, place, processor):
    inputs = dict(encode(processor, [WIDE]))
    with torch.no_grad():
        expected = attending(**inputs).logits
        for dtype in (torch.float16, torch.bfloat16):
            model = place(copy.deepcopy(attending).to(dtype))
            logits = torch.tensor(tokens(model(**place(inputs)).logits.float()))
            assert logits.isfinite().all()
            assert (logits - expected).abs().max() < 0.05 * expected.abs().max() + 0.05
