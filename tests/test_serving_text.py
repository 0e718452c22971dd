"""From tokens to the parts of an answer: text, stops, calls of tools in both formats, reasoning and log-probabilities."""

import json
import random

import pytest
import torch

from tests.served import OTHER, RATE
from tools import ROOT
from tools.chat import load

NAMES = ["rate", "now"]
ARGUMENTS = {"currency": "EUR", "note": 'a "quoted" }{ text\n, ä'}
BARE = json.dumps({"name": "rate", "parameters": ARGUMENTS}, ensure_ascii=False)
NOW = '{"name": "now", "parameters": {}}'
MARKED = json.dumps([{"name": "rate", "arguments": ARGUMENTS}, {"name": "now", "arguments": {}}], ensure_ascii=False)


def parts_of(pieces, with_marks=False, names=NAMES, thinking=False):
    """What the parts of an answer are that comes in these pieces: its text, its reasoning and its calls."""
    from nemotron_vl.serving.calls import AnswerParts

    parts = AnswerParts(names, with_marks, thinking)
    found = [part for index, piece in enumerate(pieces) for part in parts.add(piece, index == len(pieces) - 1)]
    texts = {kind: "".join(part.value for part in found if part.kind == kind) for kind in ("text", "reasoning")}
    calls = [(part.value.name, json.loads(part.value.arguments)) for part in found if part.kind == "call"]
    return texts["text"], texts["reasoning"], calls


def all_ways(text, **options):
    """The parts of a text that comes at once, letter by letter, and in random pieces: always the same."""
    expected = parts_of([text], **options)
    assert parts_of([*text, ""], **options) == expected
    generator = random.Random(0)
    for _ in range(20):
        cuts = sorted(generator.sample(range(len(text) + 1), min(4, len(text))))
        pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert parts_of(pieces, **options) == expected
    return expected


RATED, NOW_CALLED = ("rate", ARGUMENTS), ("now", {})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (BARE, ("", [RATED])),
        (f"\n {BARE}\n", ("", [RATED])),
        (f"I will look.\n{BARE}\n{NOW}", ("I will look.", [RATED, NOW_CALLED])),
        (f"{BARE}; {NOW}", ("", [RATED, NOW_CALLED])),
        (f"{NOW} and so on", (" and so on", [NOW_CALLED])),
        (BARE.replace("parameters", "arguments"), ("", [RATED])),
        ("The total is 5.", ("The total is 5.", [])),
        ("Two lines:\n  and {braces}\n{", ("Two lines:\n  and {braces}\n{", [])),
        (f"In a line {NOW}", (f"In a line {NOW}", [])),
        ('{"name": "other", "parameters": {}}', ('{"name": "other", "parameters": {}}', [])),
        ('{"name": "now"}\n', ('{"name": "now"}\n', [])),
        ('{"total": 5}', ('{"total": 5}', [])),
        (BARE[:-2], (BARE[:-2], [])),
        ("{'name': 'now'}", ("{'name': 'now'}", [])),
        ("", ("", [])),
        ("\n \n", ("\n \n", [])),
    ],
)
def test_calls_of_the_8b_are_json_on_lines_of_their_own(text, expected):
    found, _, calls = all_ways(text)
    assert (found, calls) == expected
    assert all_ways(text, names=[]) == (text, "", [])  # without tools, all is text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"<TOOLCALL>{MARKED}</TOOLCALL>", ("", [RATED, NOW_CALLED])),
        (f"Look:\n<TOOLCALL>{MARKED}</TOOLCALL>\n", ("Look:", [RATED, NOW_CALLED])),
        (f"<TOOLCALL>{MARKED}", ("", [RATED, NOW_CALLED])),  # the mark at the end may be missing
        (f"<TOOLCALL>[{NOW}]</TOOLCALL><TOOLCALL>[{NOW}]</TOOLCALL>", ("", [NOW_CALLED, NOW_CALLED])),
        (f"a <TOOLCALL>[{NOW}]</TOOLCALL> b", ("a  b", [NOW_CALLED])),
        (BARE, (BARE, [])),
        ("a <TOOL> b <TOOLCAL", ("a <TOOL> b <TOOLCAL", [])),
        ("<TOOLCALL>[1]</TOOLCALL>", ("<TOOLCALL>[1]</TOOLCALL>", [])),
        ("<TOOLCALL>[]</TOOLCALL>.", ("<TOOLCALL>[]</TOOLCALL>.", [])),
        ('<TOOLCALL>[{"name": "x", "arguments": {}}]</TOOLCALL>', ('<TOOLCALL>[{"name": "x", "arguments": {}}]</TOOLCALL>', [])),
        (f"<TOOLCALL>{MARKED[:-9]}", (f"<TOOLCALL>{MARKED[:-9]}", [])),
    ],
)  # fmt: skip
def test_calls_of_the_12b_stand_between_marks(text, expected):
    found, _, calls = all_ways(text, with_marks=True)
    assert (found, calls) == expected


def test_reasoning_is_apart_from_the_text_and_the_calls():
    text = f"Which < rate?</think>\n\nLook:\n<TOOLCALL>{MARKED}</TOOLCALL>"
    assert all_ways(text, with_marks=True, thinking=True) == ("Look:", "Which < rate?", [RATED, NOW_CALLED])
    assert all_ways("Never ends </thin", with_marks=True, thinking=True) == ("", "Never ends </thin", [])
    assert all_ways("a</think>b", names=[]) == ("a</think>b", "", [])


def test_text_that_is_certain_comes_at_once():
    from nemotron_vl.serving.calls import AnswerParts

    parts = AnswerParts(NAMES, False, False)
    assert [part.value for part in parts.add("The total")] == ["The total"]
    assert list(parts.add("\n")) == [] and [part.value for part in parts.add("is")] == ["\nis"]
    assert list(parts.add('\n{"na')) == []
    assert [part.value for part in parts.add("x: 5}")] == []  # a key may go on
    assert "".join(part.value for part in parts.add("", True)) == '\n{"nax: 5}'
    marked = AnswerParts(NAMES, True, False)
    assert [part.value for part in marked.add("a <b")] == ["a <b"] and list(marked.add("<TOOL")) == []


# --- grammars of calls ---


@pytest.fixture(scope="module")
def nano():
    return load(ROOT / "nano")


@pytest.mark.parametrize("with_marks", [False, True])
@pytest.mark.parametrize("tools", [[RATE], [OTHER], [OTHER, RATE]])
def test_an_answer_that_is_held_to_a_call_is_one(nano, tools, with_marks):
    pytest.importorskip("llguidance")
    from nemotron_vl.reading.grammar import Grammar, grammar_tokenizer
    from nemotron_vl.serving.calls import call_grammar

    model, processor = nano
    tokenizer = processor.tokenizer
    guide = grammar_tokenizer(tokenizer, model.config.text_config.vocab_size)
    for seed in range(5):
        grammar = Grammar(guide, [call_grammar(tools, with_marks)])
        generator, ids = torch.Generator().manual_seed(seed), torch.tensor([[1]])
        while ids[0, -1] != tokenizer.eos_token_id and ids.shape[1] < 300:
            scores = grammar(ids, torch.zeros(1, model.config.text_config.vocab_size))
            ids = torch.cat([ids, torch.multinomial(scores.softmax(-1), 1, generator=generator)], 1)
        text = tokenizer.decode(ids[0, 1:-1])
        names = [tool["function"]["name"] for tool in tools]
        found, _, ((name, arguments),) = parts_of([text], with_marks, names)
        assert found == "" and name in names
        if name == "rate":
            assert arguments["currency"] in ("EUR", "USD") and arguments.get("day", "today") in ("today", "yesterday")
        else:
            assert arguments == {}


# --- tokens ---


def written(tokenizer, ids, stops=(), limit=1000, logprobs=False):
    from nemotron_vl.serving.calls import AnswerParts
    from nemotron_vl.serving.writing import LogProbabilities, Writer

    probabilities = LogProbabilities() if logprobs else None
    writer = Writer(tokenizer, 0, [tokenizer.eos_token_id], limit, stops, AnswerParts([], False, False), probabilities)
    pieces = []
    for token in ids:
        if probabilities is not None:
            probabilities(torch.zeros(1, 1), torch.zeros(1, len(tokenizer)))
        pieces.append(writer.add(token))
        if writer.finish_reason is not None:
            break
    else:
        pieces.append(writer.finish("length"))
    entries = [entry for piece in pieces for entry in piece.logprobs]
    return "".join(part.value for piece in pieces for part in piece.parts), writer, entries


def test_the_text_is_that_of_the_tokenizer_whatever_the_tokens(nano):
    tokenizer = nano[1].tokenizer
    generator = random.Random(0)
    for length in [0, 1, 2, *range(3, 40)] * 5:
        ids = [generator.randrange(len(tokenizer)) for _ in range(length)]
        ids = [token for token in ids if token != tokenizer.eos_token_id]
        text, writer, entries = written(tokenizer, ids, logprobs=True)
        assert text == tokenizer.decode(ids) and writer.num_tokens == len(ids) == len(entries)
        assert b"".join(bytes(entry["bytes"]) for entry in entries).decode(errors="replace") == text


def test_a_character_of_several_tokens_comes_whole(nano):
    tokenizer = nano[1].tokenizer
    ids = tokenizer("5 € 学", add_special_tokens=False)["input_ids"]
    assert len(ids) > 5
    text, _, _ = written(tokenizer, ids)
    assert text.strip() == "5 € 学"
    assert written(tokenizer, ids[:-1])[0].endswith("\ufffd")


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["three", "two"], "one "),
        ("one two three", ["e two t", "never"], "on"),
        ("one tw", ["two"], "one tw"),
        ("ababac", ["abac"], "ab"),
        ("one", ["one"], ""),
        ("5 € x", ["€"], "5 "),
    ],
)
def test_an_answer_ends_before_its_stop(nano, text, stops, expected):
    tokenizer = nano[1].tokenizer
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found, writer, entries = written(tokenizer, ids, stops, logprobs=True)
    shift = len(tokenizer.decode(ids)) - len(text)  # nano's tokenizer puts a space in front
    assert found[shift:] == expected
    is_stopped = any(stop in text for stop in stops)
    assert writer.finish_reason == ("stop" if is_stopped else "length")
    named = b"".join(bytes(entry["bytes"]) for entry in entries).decode(errors="replace")
    assert named.startswith(found) and (len(entries) < len(ids) or not is_stopped or text.endswith(tuple(stops)))


def test_an_answer_ends_with_its_end_token_or_its_limit(nano):
    tokenizer = nano[1].tokenizer
    ids = tokenizer("one two", add_special_tokens=False)["input_ids"]
    text, writer, _ = written(tokenizer, [*ids, tokenizer.eos_token_id, *ids])
    assert (text.strip(), writer.finish_reason, writer.num_tokens) == ("one two", "stop", len(ids) + 1)
    _, writer, _ = written(tokenizer, ids, limit=2)
    assert (writer.finish_reason, writer.num_tokens) == ("length", 2)
