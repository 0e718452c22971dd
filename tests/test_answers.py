"""The confidence of an answer is what its tokens say, and answers that run in circles end, but long tables do not."""

import random

import pytest
import torch
from nemotron_vl.answers import LoopCriteria, TokenProbabilities, confidence
from nemotron_vl.chat import Answer
from transformers import LogitsProcessor

from tools.tiny_checkpoint import make_tokenizer

OPTIONS = {"max_new_tokens": 12}
QUESTION = "What is this?"


class Forced(LogitsProcessor):
    """Makes each row of a batch write given ids, and then its end token."""

    def __init__(self, rows, eos):
        self.rows, self.eos, self.start = rows, eos, None

    def __call__(self, input_ids, scores):
        self.start = self.start if self.start is not None else input_ids.shape[1]
        step = input_ids.shape[1] - self.start
        forced = torch.full_like(scores, -torch.inf)
        for row, ids in enumerate(self.rows):
            forced[row, ids[step] if step < len(ids) else self.eos] = 0
        return forced


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def stop_of(tokenizer, ids, **options) -> int | None:
    """How many of these ids an answer has when it is stopped; None if it is not."""
    criteria = LoopCriteria(tokenizer, **options)
    sequence = torch.tensor([[1, 2, 3, *ids]])
    for length in range(1, len(ids) + 1):
        if criteria(sequence[:, : 3 + length], None).item():
            return length
    return None


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def forced_loop(rng, period, with_separators) -> tuple[str, str]:
    """A beginning, and a cycle of characters, each of which is a token."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    cycle = rng.choices(letters + "|,;\n0123" * with_separators, k=period)
    if with_separators:
        cycle[rng.randrange(period)] = rng.choice("\n|,")
    return "".join(rng.choices(letters, k=rng.randint(0, 30))), "".join(cycle)


@pytest.mark.parametrize("with_separators", [False, True])
@pytest.mark.parametrize("period", [1, 2, 3, 5, 8, 13, 30, 79, 80, 81, 200, 500, 1024])
def test_every_forced_loop_ends_within_the_stated_number_of_tokens(tokenizer, period, with_separators):
    beginning, cycle = forced_loop(random.Random(period), period, with_separators)
    longest = max(258, 202 * period) if period <= 80 else max(2048, 6 * period) + period
    if not with_separators:
        longest = min(longest, max(258, 5 * period))
    stop = stop_of(tokenizer, ids_of(tokenizer, beginning + cycle * (longest // period + 2)))
    assert stop is not None and stop - len(beginning) <= longest, (stop, longest)


ROWS = {
    "markdown": "| Milk | 1 | 1.20 |\n",
    "html": "<tr><td>Milk</td><td>1.20</td></tr>",
    "latex": "Milk & 1.20 \\\\\n",
    "text": "Milk 1.20\n",
    "csv": "Milk;1;1.20\n",
    "empty cells": "| | | |\n",
    "json": '{"name": "Milk", "price": 1.20}, ',
    "a number": "0, ",
    "a digit": "0\n",
    "dashes": "-" * 60 + "\n",
    "dotted leaders": "Sum " + "." * 70 + " 7\n",
}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_a_table_of_200_equal_rows_does_not_end(tokenizer, row):
    before, after = (ids_of(tokenizer, text) for text in ("Item\n", "\nTotal 240.00"))
    ids = ids_of(tokenizer, row)
    assert stop_of(tokenizer, before + ids * 200 + after) is None
    assert stop_of(tokenizer, before + ids * 203) is not None


@pytest.mark.parametrize(
    "text",
    [
        "".join(f"{number}. Milk\n" for number in range(1, 400)),  # equal but for the number
        "Contents " + "." * 240 + " 12\n" + "_" * 240 + "\n",
        "\n".join("=" * 60 for _ in range(150)),
        "ha " * 60 + "\n",
        "".join(chr(ord("a") + number * number % 23) for number in range(4000)),
    ],
    ids=["numbered list", "leaders and lines", "rules", "laughter", "squares"],
)
def test_what_only_looks_like_a_loop_does_not_end(tokenizer, text):
    ids = ids_of(tokenizer, text)
    if text.startswith("abe"):  # squares modulo 23 do repeat: every 23 tokens
        ids = ids[:90]
    assert stop_of(tokenizer, ids) is None


def test_fewer_equal_rows_may_be_a_loop(tokenizer):
    ids = ids_of(tokenizer, "Milk 1.20\n")
    stop = stop_of(tokenizer, ids * 60, max_equal_rows=50)
    assert 50 * len(ids) < stop <= 52 * len(ids)
    for wrong in (0, -1, True, 1.5, "many"):
        with pytest.raises(ValueError, match="whole number"):
            LoopCriteria(tokenizer, wrong)


def test_rows_of_a_batch_end_for_themselves(model, processor):
    tokenizer = processor.tokenizer
    text = ids_of(tokenizer, "All is well. " * 3)
    rows = [ids_of(tokenizer, "a" * 600), text, ids_of(tokenizer, "xyz" * 200)]
    found = model.chat(
        processor,
        question=[QUESTION] * 3,
        generation_config={"max_new_tokens": 500, "logits_processor": [Forced(rows, tokenizer.eos_token_id)]},
        stop_loops=True,
        return_dict=True,
    )
    assert [answer.finish_reason for answer in found] == ["loop", "stop", "loop"]
    assert [len(answer.token_ids) for answer in found] == [257, len(text), 257]
    assert [answer.text for answer in found] == ["a" * 257, ("All is well. " * 3).strip(), ("xyz" * 86)[:257]]


def test_a_loop_is_not_stopped_unless_asked_for(model, processor):
    forced = [Forced([ids_of(processor.tokenizer, "a" * 600)], processor.tokenizer.eos_token_id)]
    options = {"max_new_tokens": 300, "logits_processor": forced}
    answer = model.chat(processor, question=QUESTION, generation_config=options, return_dict=True)
    assert (answer.finish_reason, len(answer.token_ids)) == ("length", 300)


@pytest.mark.parametrize("cache", ["dynamic", "static", "chat"])
def test_a_stream_ends_with_the_loop_whatever_the_cache(model, processor, cache):
    forced = [Forced([ids_of(processor.tokenizer, "ab" * 600)], processor.tokenizer.eos_token_id)]
    options = {"max_new_tokens": 500, "logits_processor": forced}
    if cache == "static":
        options["cache_implementation"] = "static"
    kept = {"past_key_values": model.chat_cache()} if cache == "chat" else {}
    pieces = model.chat_stream(processor, question=QUESTION, generation_config=options, stop_loops=True, **kept)
    assert "".join(pieces) == ("ab" * 129)[:257]


def probabilities_by_one_forward(model, processor, answer, question):
    """Of the tokens of an answer to a text: computed from the logits of the whole prompt and answer at once."""
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        tokenize=True,
        return_tensors="pt",
        return_dict=True,
    )["input_ids"]
    ids = torch.cat([prompt, torch.tensor([answer.token_ids])], 1)
    with torch.no_grad():
        chances = model(input_ids=ids).logits.float().softmax(-1)[0, prompt.shape[1] - 1 : -1]
    return chances.gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "temperature": 2.0, "top_k": 3}])
def test_the_confidence_is_the_product_of_the_probabilities_of_the_tokens(model, processor, sampling):
    torch.manual_seed(0)
    answer = model.chat(
        processor,
        question=QUESTION,
        generation_config={**OPTIONS, **sampling},
        return_dict=True,
        return_confidence=True,
    )
    expected = probabilities_by_one_forward(model, processor, answer, QUESTION)
    torch.testing.assert_close(torch.tensor(answer.probabilities), expected, atol=1e-5, rtol=1e-4)
    assert answer.confidence == pytest.approx(float(expected.double().prod()), rel=1e-3)


def test_a_batch_has_the_confidences_of_single_answers(model, processor):
    questions = ["What is this?", "And what is the total of all the items on this page?"]
    texts, confidences = model.chat(processor, question=questions, generation_config=OPTIONS, return_confidence=True)
    for question, text, value in zip(questions, texts, confidences, strict=True):
        alone = model.chat(processor, question=question, generation_config=OPTIONS, return_confidence=True)
        assert alone == (text, pytest.approx(value, rel=1e-3))


def test_what_chat_returns_follows_from_what_is_asked_for(model, processor):
    def ask(question, **options):
        return model.chat(processor, question=question, generation_config=OPTIONS, **options)

    text = ask(QUESTION)
    value = ask(QUESTION, return_confidence=True)[1]
    assert isinstance(text, str) and 0 < value < 1
    history = [(QUESTION, text)]
    assert ask(QUESTION, return_history=True) == (text, history)
    assert ask(QUESTION, return_history=True, return_confidence=True) == (text, history, pytest.approx(value))
    assert ask([QUESTION], return_confidence=True) == ([text], [pytest.approx(value)])
    answer = ask(QUESTION, return_dict=True)
    assert isinstance(answer, Answer) and (answer.text, answer.history) == (text, history)
    assert answer.confidence is None and answer.probabilities is None
    assert ask([QUESTION], return_dict=True) == [answer]


def test_the_temperature_of_a_checkpoint_or_a_call_bends_the_confidence(model, processor, monkeypatch):
    def ask(**options):
        return model.chat(
            processor, question=QUESTION, generation_config={**OPTIONS, **options}, return_confidence=True
        )[1]

    plain = ask()
    assert ask(confidence_temperature=2.0) == pytest.approx(plain**0.5)
    monkeypatch.setattr(model.generation_config, "confidence_temperature", 4.0, raising=False)
    assert ask() == pytest.approx(plain**0.25)
    assert ask(confidence_temperature=2.0) == pytest.approx(plain**0.5)
    with pytest.raises(ValueError, match="above 0"):
        ask(confidence_temperature=-1)


def test_the_temperature_is_saved_and_loaded(model, tmp_path, monkeypatch):
    monkeypatch.setattr(model.generation_config, "confidence_temperature", 1.7, raising=False)
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path).generation_config.confidence_temperature == 1.7


def test_reasoning_does_not_count_for_the_confidence(processor):
    from nemotron_vl.chat import ChatPrompt, _finished_answer
    from transformers import GenerationConfig

    tokenizer = processor.tokenizer
    thought, rest = (ids_of(tokenizer, text) for text in ("Hm.</think>", "42"))
    prompt = ChatPrompt([], [], [], QUESTION, [], "<think>\n")
    options = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    chances = [0.1] * len(thought) + [0.5] * len(rest)
    answer = _finished_answer(tokenizer, prompt, thought + rest, chances, None, options=options, limit=99)
    assert answer.confidence == pytest.approx(0.5 ** len(rest))
    assert answer.history == [(QUESTION, "42")]


@pytest.mark.parametrize("watched", ["return_confidence", "stop_loops"])
@pytest.mark.parametrize("options", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 3}])
def test_beams_and_drafts_cannot_be_watched(model, processor, watched, options):
    with pytest.raises(ValueError, match=rf"{watched} follows an answer.*assisted"):
        model.chat(processor, question=QUESTION, generation_config={**OPTIONS, **options}, **{watched: True})


def test_the_scores_are_not_changed():
    scores = torch.randn(2, 7)
    before = scores.clone()
    kept = TokenProbabilities()
    assert kept(torch.zeros(2, 3, dtype=torch.long), scores) is scores and torch.equal(scores, before)
    expected = scores.softmax(-1)[:, 4:5]
    assert kept.of(torch.tensor([[0, 0, 0, 4], [0, 0, 0, 4]])) == [pytest.approx(row) for row in expected.tolist()]
    assert TokenProbabilities().of(torch.zeros(2, 3, dtype=torch.long)) == [[], []]


def test_the_confidence_of_texts():
    assert confidence([]) == 1
    assert confidence([0.5, 0.5]) == pytest.approx(0.25)
    assert confidence([0.5, 0.0]) == 0
    assert confidence([0.25], temperature=2) == pytest.approx(0.5)
