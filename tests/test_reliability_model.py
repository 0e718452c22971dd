"""The model under pressure: the context window, many tiles, many threads, interruptions, extreme numbers."""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from nemotron_vl.configuration_nemotron_vl import NemotronVLConfig
from nemotron_vl.modeling_nemotron_vl import Llama_Nemotron_Nano_VL
from transformers import GenerationConfig, TextStreamer

from tests.prompts import picture

GREEDY = {"max_new_tokens": 4, "do_sample": False}
WINDOW = 2048  # of the tiny checkpoint


def encode(processor, *conversations, **options):
    messages = [
        [{"role": "user", "content": [*({"type": "image", "image": image} for image in images), "?" * words]}]
        for images, words in conversations
    ]
    return processor.apply_chat_template(
        messages,
        **{"tokenize": True, "return_dict": True, "add_generation_prompt": True, "padding": True, **options},
        return_tensors="pt",
    )


# Context -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["text", "images", "history"])
def test_a_prompt_beyond_the_window_is_refused_with_the_numbers_before_the_tower_runs(model, processor, what):
    features = processor.image_processor([picture(60, 20)] * 120) if what == "images" else {}
    call = {"question": "<image>" * 120} if what == "images" else {"question": "x" * 2100}
    if what == "history":
        call = {"question": "Hi", "history": [("x" * 700, "y" * 700)] * 2}
    called = []
    hook = model.vision_model.register_forward_pre_hook(lambda *_: called.append(1))
    try:
        with pytest.raises(ValueError, match=r"The prompt has \d{4} tokens; the context of 2048 tokens"):
            model.chat(processor, generation_config=GREEDY, **call, **features)
    finally:
        hook.remove()
    assert not called


def test_prompt_embeddings_beyond_the_window_are_refused(model):
    with pytest.raises(ValueError, match="The prompt has 2048 tokens; the context of 2048"):
        model.generate(inputs_embeds=torch.zeros(1, WINDOW, 64), max_new_tokens=1)


@pytest.mark.parametrize("given", ["max_new_tokens", "max_length", "inputs_embeds"])
def test_no_way_of_generating_leaves_the_window(model, caplog, given):
    ids = torch.randint(40, 90, (1, WINDOW - 3))
    options = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 10**9}
    inputs = {"input_ids": ids}
    if given == "max_length":
        del options["max_new_tokens"]
        options["max_length"] = 10**9
    elif given == "inputs_embeds":
        inputs = {"inputs_embeds": model.get_input_embeddings()(ids)}
    with caplog.at_level("WARNING", "nemotron_vl.modeling_nemotron_vl"):
        out = model.generate(**inputs, **options)
    assert out.shape[1] == (3 if given == "inputs_embeds" else WINDOW)
    assert "is cut to 3: the prompt has 2045 tokens and the context of 2048" in caplog.text


def test_a_length_given_as_max_length_counts(model, processor):
    prompt = processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    limit = len(processor.tokenizer.encode(prompt, add_special_tokens=False)) + 3
    options = {"max_length": limit, "do_sample": False, "eos_token_id": None}
    three = model.chat(processor, None, "Hi", {**options, "max_new_tokens": 3})
    assert model.chat(processor, None, "Hi", options) == three
    options["eos_token_id"] = processor.tokenizer.eos_token_id
    assert model.chat(processor, None, "Hi", GenerationConfig(**options)) == three


def test_an_answer_as_long_as_the_window_cannot_say_which_turns_fit(model, processor):
    with pytest.raises(ValueError, match="max_new_tokens=2048 leaves no room .* 2048 tokens"):
        model.chat(processor, None, "Hi", {"max_new_tokens": WINDOW}, history=[("a", "b")], truncation="oldest_turns")


# Inputs of the wrong kind ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pixel_values",
    [
        *(3, "x", [torch.rand(3, 64, 64)], np.zeros((1, 3, 64, 64), np.float32), torch.rand(3, 64, 64)),
        *(torch.rand(1, 1, 3, 64, 64), torch.rand(1, 4, 64, 64), torch.rand(1, 3, 0, 0), torch.rand(1, 3, 40, 64)),
        *(torch.zeros(1, 3, 64, 64, dtype=torch.int64), torch.full((1, 3, 64, 64), float("nan"))),
        *(torch.full((1, 3, 64, 64), float("inf")), torch.full((1, 3, 64, 64), 255.0)),
    ],
    ids=lambda value: f"{type(value).__name__} {tuple(getattr(value, 'shape', ()))}",
)
def test_tiles_that_are_none_are_refused(model, processor, pixel_values):
    with pytest.raises((ValueError, TypeError)):
        model.chat(processor, pixel_values, "Hi", GREEDY)


@pytest.mark.parametrize(
    ("low", "high", "fits"),
    [(-0.01, 1.01, True), (0.0, 1.0, True), (-0.011, 1.0, False), (0.0, 1.011, False), (-0.02, 1.02, False)],
)
def test_pixels_may_leave_0_to_1_by_a_hundredth(model, processor, low, high, fits):
    """Rounding of bfloat16 tiles is below 0.01; what a normalisation leaves behind is above."""
    pixel_values = torch.linspace(low, high, 3 * 64 * 64, dtype=torch.float64).view(1, 3, 64, 64)
    if fits:
        model.chat(processor, pixel_values.clamp(-0.00999, 1.00999).float(), "Hi", GREEDY)
    else:
        with pytest.raises(ValueError, match=f"pixel_values lie in {low:.3f}..{high:.3f}"):
            model.chat(processor, pixel_values.float(), "Hi", GREEDY)


@pytest.mark.parametrize("shape", [(1, 4, 7), (4, 128), (1, 1, 4, 128)])
def test_features_of_the_wrong_shape_are_refused_with_the_right_one(model, processor, shape):
    with pytest.raises(ValueError, match=r"visual_features must be a tensor .* width of 128, got the shape"):
        model.chat(processor, None, "Hi", GREEDY, visual_features=torch.rand(shape))


# Tower batches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 5, 100])
def test_tower_batches_give_equal_results(tiny_checkpoint, model, processor, size):
    batch = encode(processor, ([picture(60, 20), picture(16, 16)], 1), ([picture(50, 40)], 5))
    assert len(batch["pixel_values"]) == 12
    sizes = []
    small = Llama_Nemotron_Nano_VL.from_pretrained(tiny_checkpoint, vision_batch_size=size).eval()
    small.vision_model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(args[0])), with_kwargs=True
    )
    with torch.no_grad():
        torch.testing.assert_close(small(**batch).logits, model(**batch).logits, rtol=0, atol=1e-4)
        options = {"output_hidden_states": True}
        whole = model.get_image_features(batch["pixel_values"], batch["num_patches"], **options)
        parts = small.get_image_features(batch["pixel_values"], batch["num_patches"], **options)
    assert max(sizes) == min(size, 12) and sum(sizes) == 24
    for name in ("pooler_output", "hidden_states"):
        torch.testing.assert_close(parts[name], whole[name], rtol=0, atol=1e-4)
    torch.testing.assert_close(parts.last_hidden_state, whole.last_hidden_state, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [0, -1, True])
def test_a_batch_size_set_later_is_checked_as_well(tiny_checkpoint, size):
    model = Llama_Nemotron_Nano_VL.from_pretrained(tiny_checkpoint)
    model.config.vision_batch_size = size
    with pytest.raises(ValueError, match=f"vision_batch_size must be a whole number above 0, or None, got {size}"):
        model.get_image_features(torch.rand(2, 3, 64, 64))


def test_tower_batches_train_alike(tiny_checkpoint, processor):
    batch = encode(processor, ([picture(60, 20)], 1))
    gradients = []
    for size in (None, 2):
        model = Llama_Nemotron_Nano_VL.from_pretrained(tiny_checkpoint, vision_batch_size=size)
        model(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append(model.vision_model.radio_model.model.blocks[0].mlp.fc1.weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_the_batch_size_is_a_setting_that_is_saved_only_when_given(tmp_path):
    assert "vision_batch_size" not in NemotronVLConfig().to_diff_dict()
    NemotronVLConfig(vision_batch_size=4).save_pretrained(tmp_path)
    assert NemotronVLConfig.from_pretrained(tmp_path).vision_batch_size == 4
    for wrong in (0, -1, 2.0, "4"):
        with pytest.raises(ValueError, match="vision_batch_size must be a whole number"):
            NemotronVLConfig(vision_batch_size=wrong)


# Threads and interruptions ---------------------------------------------------------------------------------------------


def questions(processor, number: int) -> list[dict]:
    pictures = [picture(16 + 8 * (i % 4), 20, i) for i in range(number)]
    return [
        {"question": f"Question {i}", **processor.image_processor(pictures[i])} if i % 2 else {"question": f"No {i}"}
        for i in range(number)
    ]


def test_eight_threads_get_the_answers_of_one(model, processor):
    def ask(call):
        return model.chat(processor, generation_config=GREEDY, return_history=True, **call)

    calls = questions(processor, 8)
    expected = [ask(call) for call in calls]
    assert len({answer for answer, _ in expected}) > 4
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, calls * 2)) == expected * 2


def test_eight_threads_encode_with_one_processor(processor):
    def one(number: int):
        return encode(
            processor, ([picture(40, 20, number)], number), ([], 3 * number), padding=bool(number % 2) or True
        )

    expected = [one(number) for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for got, wanted in zip(pool.map(one, range(8)), expected, strict=True):
            assert all(torch.equal(got[name], wanted[name]) for name in wanted)


class Interrupts(TextStreamer):
    """Behaves as Ctrl-C does after a few tokens."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.seen = getattr(self, "seen", 0) + 1
        if self.seen == 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["tower", "decoding"])
def test_an_interrupted_model_goes_on_as_if_nothing_had_been(model, processor, where):
    call = {"tokenizer": processor, "question": "Hi", "generation_config": GREEDY}
    call |= processor.image_processor(picture(60, 20))
    state = {name: dict(vars(module)) for name, module in model.named_modules()}
    expected = model.chat(**call)

    def interrupt(*_):
        raise KeyboardInterrupt

    block = model.vision_model.radio_model.model.blocks[1]
    hook = block.register_forward_hook(interrupt) if where == "tower" else None
    with pytest.raises(KeyboardInterrupt):
        model.chat(**call, streamer=Interrupts(processor.tokenizer))
    if hook:
        hook.remove()
    assert model.chat(**call) == expected
    for name, module in model.named_modules():
        assert set(vars(module)) == set(state[name]), name


def test_a_stream_is_the_answer_in_pieces(model, processor):
    call = {"question": "What is this?", "generation_config": {**GREEDY, "max_new_tokens": 24}}
    for features in ({}, dict(processor.image_processor(picture(60, 20)))):
        pieces = list(model.chat_stream(processor, **call, **features))
        assert len(pieces) > 1
        assert "".join(pieces).strip() == model.chat(processor, **call, **features)


def test_a_stream_hides_the_end_token(model, processor):
    first = model.chat(processor, None, "Hi", {"max_new_tokens": 1, "do_sample": False, "eos_token_id": None})
    token = processor.tokenizer.encode(first, add_special_tokens=False)[0]
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": [token]}
    assert "".join(model.chat_stream(processor, None, "Hi", options)) == ""


def stream_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("chat_stream")]


@pytest.mark.parametrize("leaving", ["break", "close", "error", "forgotten"])
def test_a_consumer_that_goes_away_ends_the_generation(model, processor, leaving):
    steps = []
    hook = model.language_model.register_forward_pre_hook(lambda *_: steps.append(1))
    endless = {"max_new_tokens": 1500, "do_sample": False, "eos_token_id": None}
    stream = model.chat_stream(processor, None, "Hi", endless)
    try:
        if leaving == "break":
            for _ in stream:
                break
        elif leaving == "error":
            with pytest.raises(ZeroDivisionError):
                for _ in stream:
                    1 / 0  # noqa: B018
        else:
            next(stream)
        if leaving == "close":
            stream.close()
        del stream
        gc.collect()
        assert not stream_threads()
    finally:
        hook.remove()
    assert len(steps) < 1000


def test_an_error_reaches_the_reader_of_a_stream_instead_of_silence(model, processor):
    with pytest.raises(ValueError, match="1 <image> placeholders but 0 images"):
        list(model.chat_stream(processor, None, "<image>", GREEDY))
    with pytest.raises(ValueError, match="context of 2048"):
        list(model.chat_stream(processor, None, "x" * 3000, GREEDY))
    assert not stream_threads()


# Numbers -------------------------------------------------------------------------------------------------------------

PICTURES = {
    "black": np.zeros((40, 60, 3), np.uint8),
    "white": np.full((40, 60, 3), 255, np.uint8),
    "constant": np.full((40, 60, 3), 97, np.uint8),
    "noise": np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8),
    "checkers": (np.indices((40, 60)).sum(0) % 2 * 255).astype(np.uint8),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_picture_gives_finite_numbers_in_every_dtype(tiny_checkpoint, processor, dtype):
    model = Llama_Nemotron_Nano_VL.from_pretrained(tiny_checkpoint, torch_dtype=dtype).eval()
    for name, levels in PICTURES.items():
        batch = encode(processor, ([levels], 1))
        with torch.no_grad():
            out = model(**batch)
        assert out.logits.dtype == dtype
        assert torch.isfinite(out.logits).all() and torch.isfinite(out.image_hidden_states).all(), name


def test_a_batch_changes_logits_by_less_than_the_stated_tolerance(model, processor):
    """Float32, CPU: 1e-4 on logits of standard deviation 1.5, left padding and neighbours included."""
    rows = [([picture(60, 20)], 3), ([], 40), ([picture(16, 16, 2), picture(30, 60, 3)], 1)]
    batch = encode(processor, *rows)
    with torch.no_grad():
        positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        together = model(**batch, position_ids=positions).logits
        for row, conversation in enumerate(rows):
            alone = model(**encode(processor, conversation)).logits[0]
            torch.testing.assert_close(together[row, -len(alone) :], alone, rtol=0, atol=1e-4)


def test_the_same_input_gives_the_same_numbers(model, processor):
    batch = encode(processor, ([picture(60, 20)], 3))
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, model(**batch).logits)
