"""A kept cache changes the time of an answer, never the answer."""

import copy

import pytest
import torch
from nemotron_vl.chat import ChatCache
from nemotron_vl.modeling_nemotron_vl import Llama_Nemotron_Nano_VL
from nemotron_vl.processing_nemotron_vl import NemotronVLProcessor
from transformers import DynamicCache

from tests.test_modeling import GREEDY, ONE, WIDE, encode


@pytest.fixture(scope="module")
def model(tiny_checkpoint) -> Llama_Nemotron_Nano_VL:
    return Llama_Nemotron_Nano_VL.from_pretrained(tiny_checkpoint).eval()


@pytest.fixture(scope="module")
def processor(tiny_checkpoint) -> NemotronVLProcessor:
    return NemotronVLProcessor.from_pretrained(tiny_checkpoint)


def work_of(model, call, *arguments, **options) -> tuple[object, int, int]:
    """What a call returns, how many positions its prompt ran through the language model, and tiles through the tower."""
    positions, tiles = [], []
    # The first layer sees ids and embeddings alike.
    layer = model.language_model.model.layers[0]
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: positions.append(args[0].shape[1])),
        model.vision_model.register_forward_pre_hook(lambda _, args: tiles.append(len(args[0]))),
    ]
    try:
        return call(*arguments, **options), positions[0], sum(tiles)
    finally:
        for hook in hooks:
            hook.remove()


def ask(model, processor, question, images=None, cache=None, **options):
    pictures = dict(processor.image_processor(images)) if images else {}
    arguments = {"generation_config": GREEDY, "return_history": True, **pictures, **options}
    return model.chat(processor, question=question, past_key_values=cache, **arguments)


def test_turns_over_a_kept_cache_answer_as_without_and_compute_what_is_new(model, processor):
    """Two pictures; the second question and the third, which brings another picture, read their own tokens alone."""
    cache, history, images = model.chat_cache(), None, [ONE, WIDE]
    num_tiles = [len(processor.image_processor(images)["pixel_values"]), 0, 1]
    for turn, question in enumerate(["<image> and <image>?", "And now?", "<image> too?"]):
        images = [*images, ONE] if turn == 2 else images
        plain, length, _ = work_of(model, ask, model, processor, question, images, history=history)
        kept, new_length, new_tiles = work_of(model, ask, model, processor, question, images, cache, history=history)
        assert kept == plain
        assert new_tiles == num_tiles[turn]
        assert new_length == length if turn == 0 else new_length < length / 2
        history = kept[1]
    assert cache.get_seq_length() == len(cache.input_ids)


def test_another_first_question_keeps_the_picture(model, processor):
    cache = model.chat_cache()
    ask(model, processor, "<image>\nWhat is this?", [WIDE], cache)
    branch = copy.deepcopy(cache)
    for own in (cache, branch):
        plain = ask(model, processor, "<image>\nHow much?", [WIDE])
        kept, _, tiles = work_of(model, ask, model, processor, "<image>\nHow much?", [WIDE], own)
        assert kept == plain and tiles == 0


@pytest.mark.parametrize("other", [[ONE, ONE], [WIDE], [WIDE, WIDE], [ONE]], ids=["first", "one", "last", "shorter"])
def test_other_pictures_under_the_same_words_are_seen(model, processor, other):
    cache = model.chat_cache()
    ask(model, processor, "<image><image>", [ONE, WIDE], cache)
    question = "<image>" * len(other)
    assert ask(model, processor, question, other, cache) == ask(model, processor, question, other)


def test_same_prompt_again_and_text_alone(model, processor):
    cache = model.chat_cache()
    for question, images in (("<image>?", [ONE]), ("<image>?", [ONE]), ("Hello", None), ("Hello", None)):
        assert ask(model, processor, question, images, cache) == ask(model, processor, question, images)


def test_kept_features_stand_for_pictures(model, processor):
    features = torch.rand(
        2, 4, model.config.vit_hidden_size * model.config.merge_size**2, generator=torch.Generator().manual_seed(0)
    )
    cache = model.chat_cache()
    for question in ("<image>?", "<image>!"):
        options = {"visual_features": features}
        assert ask(model, processor, question, None, cache, **options) == ask(model, processor, question, **options)


def test_a_stream_that_was_left_does_not_spoil_the_cache(model, processor):
    cache, pixels = model.chat_cache(), processor.image_processor([ONE])["pixel_values"]
    stream = model.chat_stream(processor, pixels, "<image>?", {**GREEDY, "max_new_tokens": 40}, past_key_values=cache)
    next(stream)
    stream.close()
    assert cache.get_seq_length() > len(cache.input_ids)
    assert ask(model, processor, "<image>?", [ONE], cache) == ask(model, processor, "<image>?", [ONE])


def test_caches_and_calls_that_do_not_fit_are_refused(model, processor):
    cache = model.chat_cache()
    with pytest.raises(TypeError, match="chat_cache.*got DynamicCache"):
        ask(model, processor, "Hello", cache=DynamicCache())
    with pytest.raises(ValueError, match="one conversation"):
        ask(model, processor, ["Hello", "Hi"], cache=cache)
    with pytest.raises(ValueError, match="num_beams=2"):
        ask(model, processor, "Hello", cache=cache, generation_config={**GREEDY, "num_beams": 2})
    assert cache.get_seq_length() == 0
    ask(model, processor, "Hello", cache=cache)
    cache.crop(-3)
    with pytest.raises(ValueError, match=r"holds \d+ positions, but chat\(\) left \d+"):
        ask(model, processor, "Hello", cache=cache)


def test_a_state_that_cannot_go_back_is_not_kept(model, monkeypatch):
    assert isinstance(model.chat_cache(), ChatCache)
    monkeypatch.setattr(type(model), "_is_stateful", True)
    with pytest.raises(ValueError, match="Mamba"):
        model.chat_cache()


def test_generate_refuses_a_new_picture_without_pixels_over_a_kept_cache(model, processor):
    turn, cache = encode(processor, [ONE]), DynamicCache()
    first = model.generate(**turn, past_key_values=cache, **GREEDY)
    ids = torch.cat([first, turn["input_ids"]], dim=1)
    with pytest.raises(ValueError, match=r"has 4 image tokens, but the images give 0 features"):
        model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **GREEDY)


def test_generate_refuses_ids_that_the_cache_holds_already(model, processor):
    turn, cache = encode(processor, [ONE]), DynamicCache()
    model.generate(**turn, past_key_values=cache, **GREEDY)
    new = encode(processor, [])["input_ids"]
    with pytest.raises(ValueError, match=r"past_key_values holds \d+ positions, but input_ids has \d+ tokens"):
        model.generate(new, attention_mask=torch.ones_like(new), past_key_values=cache, **GREEDY)
