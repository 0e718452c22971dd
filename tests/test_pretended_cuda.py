"""The main paths on a pretended CUDA device: no mixed devices, no new waits of the host, the CPU's tokens."""

import copy

import pytest
import torch
from nemotron_vl import decode_attention
from nemotron_vl.modeling_nemotron_vl import Llama_Nemotron_Nano_VL, NemotronH_Nano_VL_V2, NemotronHForCausalLM
from nemotron_vl.processing_nemotron_vl import NemotronVLV2Processor
from nemotron_vl.quantization_nemotron_vl import packed_linears
from PIL import Image
from transformers import DynamicCache

from tests.conftest import golden_parameters
from tests.pretended_cuda import OnDevice, pretended_cuda

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
IMAGES = [Image.new("RGB", (120, 60), (200, 30, 90)), Image.effect_noise((64, 64), 90).convert("RGB")]


@pytest.fixture(scope="module")
def attending(tiny_checkpoint):
    """The tiny model with the attention that it has where Triton is installed."""
    options = {"attn_implementation": {"text_config": decode_attention.NAME, "vision_config": "sdpa"}}
    return Llama_Nemotron_Nano_VL.from_pretrained(tiny_checkpoint, **options).eval()


@pytest.fixture
def cuda():
    with pretended_cuda() as device:
        yield device


@pytest.fixture
def placed(attending, cuda):
    return cuda.place(copy.deepcopy(attending))


@pytest.fixture
def tiles(processor):
    return dict(processor.image_processor(IMAGES))


def prompt(processor, *questions, images=IMAGES[:1]):
    conversations = [
        [
            {
                "role": "user",
                "content": [*({"type": "image", "image": image} for image in own), {"type": "text", "text": text}],
            }
        ]
        for text, own in zip(questions, [images, *[[]] * (len(questions) - 1)], strict=True)
    ]
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True, "return_tensors": "pt"}
    return dict(processor.apply_chat_template(conversations, padding=True, **options))


def test_devices_do_not_mix(cuda):
    there, here = torch.ones(2).to("cuda"), torch.ones(2)
    assert there.device == torch.device("cuda", 0) and isinstance(there, OnDevice)
    with pytest.raises(RuntimeError, match="same device: add got shapes"):
        there + here
    assert (there + torch.tensor(1.0)).tolist() == [2, 2]
    assert sum(cuda.waits.values()) == 1 and next(iter(cuda.waits)).startswith("test_pretended_cuda.py")
    assert list(cuda.copies) == ["(2,) torch.float32, waited for"]
    there[0] = 5
    assert int(there.sum()) == 6 and torch.zeros(3, device="cuda").device.type == "cuda"


def on_cpu(result):
    return result.numbers if isinstance(result, OnDevice) else result


CASES = {
    "forward": lambda model, inputs: model(**inputs).logits,
    "generate": lambda model, inputs: model.generate(**inputs, **GREEDY),
    "a dynamic cache": lambda model, inputs: model.generate(**inputs, **GREEDY, disable_compile=True),
    "a kept cache": lambda model, inputs: model.generate(**inputs, **GREEDY, past_key_values=DynamicCache()),
    "no cache": lambda model, inputs: model.generate(**inputs, **GREEDY, use_cache=False),
    "beams": lambda model, inputs: model.generate(**inputs, **{**GREEDY, "num_beams": 2}),
}


@pytest.mark.parametrize(
    "case, where",
    [
        *[(case, "all on the CPU") for case in CASES],
        *[(case, "all on the device") for case in CASES],
        *[(case, where) for case in ("forward", "generate") for where in ("tiles on the CPU", "ids on the CPU")],
    ],
)
def test_the_numbers_are_those_of_the_cpu(attending, placed, cuda, processor, case, where):
    inputs = prompt(processor, "What?", "Hello, who are you?")
    expected = CASES[case](attending, inputs)
    there = cuda.place(inputs)
    kept = {"tiles": ("pixel_values", "num_patches"), "ids": ("input_ids", "attention_mask"), "all": tuple(inputs)}
    if where != "all on the device":
        there |= {key: inputs[key] for key in kept[where.split()[0]]}
    with torch.no_grad():
        got = on_cpu(CASES[case](placed, there))
    torch.testing.assert_close(got, expected)


def test_the_host_waits_once_for_a_prompt_with_images_and_never_in_a_step(placed, cuda, processor):
    """transformers itself waits once in every step, for its stopping criteria; that is not counted here."""
    inputs = cuda.place(prompt(processor, "What?"))
    waits = {}
    for num_tokens in (1, 5):
        cuda.reset()
        options = {**GREEDY, "max_new_tokens": num_tokens, "min_new_tokens": num_tokens}
        placed.generate(**inputs, **options)
        waits[num_tokens] = cuda.own_waits()
    assert sum(waits[1].values()) == 1 and waits[1] == waits[5]
    cuda.reset()
    with torch.no_grad():
        placed(**inputs)
    assert sum(cuda.own_waits().values()) == 1


def test_the_decode_steps_run_the_attention_kernel_and_nothing_is_copied_to_the_device(placed, cuda, processor):
    placed.generate(**cuda.place(prompt(processor, "What?")), **{**GREEDY, "max_new_tokens": 1, "min_new_tokens": 1})
    assert not cuda.launches
    inputs = cuda.place(prompt(processor, "What?"))
    cuda.reset()
    placed.generate(**inputs, **GREEDY)
    assert cuda.launches == {"attention": 4 * placed.config.text_config.num_hidden_layers}
    assert not cuda.copies, cuda.copies


def test_tiles_and_ids_of_a_chat_are_copied_without_waiting(placed, cuda, processor, tiles):
    cuda.reset()
    placed.chat(processor, question="<image> and <image>?", generation_config=GREEDY, **tiles)
    assert sum(cuda.copies.values()) == 3 and not any("waited" in copy for copy in cuda.copies), cuda.copies
    assert [line.split()[1] for line in cuda.own_waits()] == ["_answer"]  # which reads the tokens in the end


CHATS = {
    "two images": lambda model, processor, tiles, options: model.chat(
        processor, question="<image> and <image>?", generation_config=options, **tiles
    ),
    "a batch": lambda model, processor, tiles, options: model.chat(
        processor, question=["One?", "Another question, longer?"], generation_config=options, **tiles
    ),
    "text": lambda model, processor, tiles, options: model.chat(processor, None, "Hello", options),
    "a history": lambda model, processor, tiles, options: model.chat(
        processor, question="And?", generation_config=options, history=[("<image>, <image>?", "x")], **tiles
    ),
    "stop strings": lambda model, processor, tiles, options: model.chat(
        processor, None, "Hello", {**options, "stop_strings": ["zzz"]}
    ),
    "a stream": lambda model, processor, tiles, options: "".join(
        model.chat_stream(processor, None, "Hello", options)
    ).strip(),
    "a kept cache": lambda model, processor, tiles, options: two_turns(model, processor, tiles, options),
}


def two_turns(model, processor, tiles, options):
    cache = model.chat_cache()
    shared = {"generation_config": options, "past_key_values": cache, **tiles}
    answer, history = model.chat(processor, question="<image>, <image>?", return_history=True, **shared)
    return answer, model.chat(processor, question="More?", history=history, **shared)


@pytest.mark.parametrize("where", ["cpu", "cuda"])
@pytest.mark.parametrize("case", CHATS)
def test_chats_give_the_answers_of_the_cpu(attending, placed, cuda, processor, tiles, case, where):
    expected = CHATS[case](attending, processor, tiles, GREEDY)
    there = tiles if where == "cpu" else cuda.place(tiles)
    assert CHATS[case](placed, processor, there, GREEDY) == expected


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_rescale": False},
        {"do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.2] * 3},
        {"interpolation": "bicubic"},
    ],
    ids=str,
)
def test_tiles_made_on_the_device_are_those_of_the_cpu(cuda, processor, options):
    expected = processor.image_processor(IMAGES, **options)["pixel_values"]
    cuda.reset()
    made = processor.image_processor(IMAGES, device="cuda", **options)["pixel_values"]
    assert isinstance(made, OnDevice) and torch.equal(made.numbers, expected)
    assert not cuda.waits and not any("uint8, waited" in copy for copy in cuda.copies)


def test_flags_and_positions_may_lie_on_the_cpu(attending, placed, cuda, tiles):
    flags = torch.tensor([1] * (len(tiles["pixel_values"]) - 1) + [0])
    expected = torch.cat(attending.get_image_features(**tiles, image_flags=flags).pooler_output)
    features = placed.get_image_features(**cuda.place(tiles), image_flags=flags).pooler_output
    torch.testing.assert_close(torch.cat(features).numbers, expected)
    ids = torch.arange(10, 30)[None]
    with torch.no_grad():
        logits = placed(ids, position_ids=torch.arange(20)[None]).logits
        torch.testing.assert_close(logits.numbers, attending(ids).logits)


@pytest.mark.parametrize("checkpoint", golden_parameters("8b-v1", lambda folder: ["fp8", "nvfp4"]))
def test_packed_weights_stay_packed_in_a_step(golden_8b, cuda, checkpoint):
    folder = golden_8b / f"checkpoint_{checkpoint}"
    ids = torch.arange(3, 20)[None]
    load = Llama_Nemotron_Nano_VL.from_pretrained
    expected = load(folder).eval().generate(ids, **GREEDY)
    model = cuda.place(load(folder).eval())
    got = model.generate(ids.to("cuda"), **GREEDY)
    assert torch.equal(got.numbers, expected)
    assert cuda.launches["packed"] == 4 * len(list(packed_linears(model)))


@pytest.mark.skipif(NemotronHForCausalLM is None, reason="the 12B V2 needs transformers 5")
def test_the_12b_v2_gives_the_numbers_of_the_cpu(tiny_v2_checkpoint, cuda):
    processor = NemotronVLV2Processor.from_pretrained(tiny_v2_checkpoint)
    model = NemotronH_Nano_VL_V2.from_pretrained(tiny_v2_checkpoint).eval()
    inputs = prompt(processor, "What?")
    expected = model.generate(**inputs, **GREEDY)
    cuda.place(model)
    for given in (inputs, cuda.place(inputs)):
        cuda.reset()
        assert torch.equal(model.generate(**given, **GREEDY).numbers, expected)
    assert sum(cuda.own_waits().values()) == 1
