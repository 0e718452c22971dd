"""The drawn documents, their questions and the sequences made of them."""

import ast
import random
import re
from collections import Counter

import pytest
import torch

from documents import drawing
from documents.drawing import FONTS, draw, random_style
from documents.fonts import TYPEFACES
from documents.generator import COLUMNS, KINDS, LONG_KINDS, NUM_LAYOUTS, ROWS_PER_PAGE, Draft, document, in_order
from documents.questions import (
    ABSENT,
    CELL_PHRASINGS,
    CHECK_PHRASINGS,
    COMPARE_PHRASINGS,
    FIELD_PHRASINGS,
    HTML_PHRASINGS,
    PEOPLE,
    PRICE_PHRASINGS,
    SYNONYMS,
    TRANSCRIBE_PHRASINGS,
    VALUE_PHRASINGS,
    QuestionMaker,
    ask,
    compare,
    instruction_texts,
    read_out,
    text_only,
    training_conversation,
    verdict_of,
)
from documents.values import Values, split_of
from pretraining.batches import IGNORE_INDEX, Encoder
from pretraining.nano import load_tokenizer, tiles_of
from pretraining.random_pages import (
    PRINTED_AS,
    _list,
    random_page_conversation,
    value_first_conversation,
    verdict_conversation,
)
from tools import ROOT

SEEDS = range(40)
WORDS = {word.lower() for text in instruction_texts() for word in re.findall("[A-Za-z]+", text)}


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(load_tokenizer())


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_always_gives_the_same_document_and_image(kind):
    first, second = (document(3, kind=kind) for _ in range(2))
    assert first == second
    pixels = [draw(page, random_style(5), seed=7).tobytes() for page in (first, second)]
    assert pixels[0] == pixels[1]
    assert document(4, kind=kind) != first


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_is_printed_exactly_and_the_page_is_filled(kind):
    for seed in SEEDS:
        page = document(seed, kind=kind)
        assert len(page.lines) == ROWS_PER_PAGE
        assert max(map(len, page.lines)) <= COLUMNS
        for value in [*page.fields.values(), *page.prices.values()]:
            assert value in page.text or value in "\n".join(page.lines)


@pytest.mark.parametrize("kind", LONG_KINDS)
def test_long_documents_fill_two_tiles(kind):
    page = document(1, kind=kind, num_pages=2)
    assert len(page.lines) == 2 * ROWS_PER_PAGE
    assert len(tiles_of([draw(page, random_style(1))])) == 2


def test_one_page_is_one_tile_in_every_style():
    images = [draw(document(seed), random_style(seed)) for seed in range(12)]
    assert tiles_of(images).shape == (12, 3, 512, 512)


def test_the_extra_nano_installs_the_package_of_every_font():
    extra = re.search(r"^nano = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL).group(1)
    packages = {font[0] for fonts in FONTS.values() for font in fonts}
    packages |= {face.package for faces in TYPEFACES.values() for face in faces}
    packages = {package.replace("_", "-") for package in packages}
    assert set(re.findall(r'"([^"]+)"', extra)) == packages


@pytest.mark.parametrize(
    ("folder", "imports"),
    [
        ("documents", {"tools"}),  # what all commands share
        ("evaluation", {"documents", "tools", "nemotron_vl"}),
        ("pretraining", {"documents", "tools", "nemotron_vl"}),
        ("training", {"documents", "tools", "nemotron_vl"}),
    ],
)
def test_folders_import_each_other_in_one_direction(folder, imports):
    of_files = {}
    for file in (ROOT / folder).glob("*.py"):
        nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
        names = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
        names += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        of_files[file.name] = {name.split(".")[0] for name in names}
    ours = {"documents", "evaluation", "pretraining", "training", "tools", "nemotron_vl", "benchmarks", "tests"}
    assert set().union(*of_files.values()) & ours - {folder} <= imports
    if folder == "training":  # fine-tuning needs drawn documents for one kind of recipe only
        assert [name for name, found in of_files.items() if "documents" in found] == ["drawn_documents.py"]


def test_stretched_characters_are_as_much_wider():
    def width(stretch: float) -> int:
        ink = drawing.glyph(("", "", ""), 60, "m", 120, 80, stretch).max(0) > 127
        return int(ink.nonzero()[0].max() - ink.nonzero()[0].min()) + 1

    assert [round(width(stretch) / width(1.0), 1) for stretch in (0.8, 1.0, 1.2)] == [0.8, 1.0, 1.2]


def test_splits_share_no_values_and_the_last_layout_is_held_out():
    for seed in SEEDS:
        for split in ("train", "heldout"):
            page = document(seed, split)
            values = [page.fields[name] for name in ("supplier", "date", "address") if name in page.fields]
            if not any(value.isupper() for value in values):
                assert {split_of(value) for value in values} <= {split}
            assert split == "heldout" or page.layout < NUM_LAYOUTS - 1
    assert any(document(seed, "heldout").layout == NUM_LAYOUTS - 1 for seed in SEEDS)


def test_shuffled_pages_never_begin_as_the_held_out_order_does():
    blocks = [["a"], ["b"], [], ["c"], ["d"]]
    a, b, none, c, d = blocks
    orders = ([a, b, none, c, d], [b, a, none, c, d], [c, a, none, b, d], [none, d, c, b, a])
    seen = {"train": set(), "heldout": set()}
    for split, found in seen.items():
        for seed in range(300):
            rng = random.Random(seed)
            layout = seed % (3 if split == "train" else 4)
            order = in_order(Draft(rng, Values(rng, split)), orders, layout)
            assert sorted(order) == [a, b, c, d]
            found.add("".join(block[0] for block in order))
    assert seen["heldout"] == {"abcd", "bacd", "cabd", "dcba"}
    assert {"abcd", "bacd", "cabd"} < seen["train"] and len(seen["train"]) > 8
    assert all(order[0] != "d" and order[1] != "c" for order in seen["train"])
    # Receipts: the first block of the held-out order, the header, is the first of two others too.
    header, meta, bought, sums = [["h"], ["m"], ["b"], ["s"]]
    orders = ([header, meta, bought, sums], [meta, header, bought, sums], [header, bought, sums, meta])
    found = set()
    for seed in range(300):
        rng = random.Random(seed)
        order = in_order(Draft(rng, Values(rng)), (*orders, [header, sums, meta, bought]), seed % 3)
        found.add("".join(block[0] for block in order))
    assert len(found) > 8 and not any(order.startswith("hs") for order in found)
    assert {order for order in found if order.startswith("h")} == {"hmbs", "hbsm"}


def test_held_out_fonts_and_phrasings_are_never_drawn_for_training(monkeypatch):
    monkeypatch.setattr(drawing, "font_path", lambda font: "as if all were installed")
    drawn = {split: {random_style(seed, split).font for seed in range(400)} for split in ("train", "heldout")}
    assert drawn == {
        "train": {*FONTS["train"], *FONTS["training only"]},
        "heldout": {*FONTS["train"], *FONTS["heldout"]},
    }
    for seed in SEEDS:
        assert all(turn.seen for turn in ask(seed, "train", document(seed), 6).turns)
    assert any(not turn.seen for seed in SEEDS for turn in ask(seed, "heldout", document(seed, "heldout"), 6).turns)


def test_answers_come_from_the_page_and_absent_fields_do_not():
    for seed in SEEDS:
        page = document(seed)
        printed = "\n".join(page.lines)
        for turn in ask(seed, "train", page, 8).turns:
            if turn.task == "chart" and " (" in turn.answer:
                value, name = turn.answer.removesuffix(")").split(" (")
                judge = max if re.search("highest|largest", turn.question, re.IGNORECASE) else min
                assert page.prices[name] == value == str(judge(map(int, page.prices.values())))
            else:
                assert turn.answer in (ABSENT, "Yes.", "No.") or turn.answer in printed


def test_who_somebody_is_is_asked_in_training_only():
    asked = {
        split: [
            (turn.question, turn.answer, page)
            for seed in range(200)
            for page in [document(seed, split)]
            for turn in ask(seed, split, page, 6).turns
            if turn.question.startswith("Who")
        ]
        for split in ("train", "heldout")
    }
    assert not asked["heldout"]
    names = {synonym: name for name in PEOPLE for synonym in SYNONYMS.get(name, (name,))}
    for question, answer, page in asked["train"]:
        name = names[question.removeprefix("Who is the ").removesuffix("?")]
        assert answer == page.fields.get(name, ABSENT)
    assert {answer == ABSENT for _, answer, _ in asked["train"]} == {True, False}


def test_what_looks_back_stands_before_its_name():
    labels = {"abc": "ABC", "def": "Def", "ghi": "ghi"}
    for seed in range(100):
        page, known = _list(random.Random(seed), labels, 9, form="before")
        assert [f"{value} {labels[name]}" for name, value in known.items()] == [line for line in page.lines if line]
        page, known = _list(random.Random(seed), labels, 9, form="above")
        for name, value in known.items():
            row = next(row for row, line in enumerate(page.lines) if re.fullmatch(rf"[\W_]{labels[name]}[\W_]", line))
            assert page.lines[row - 1] == value and page.lines[row][0] != "("
        assert len(known) == 3


def test_a_table_becomes_html_cell_by_cell():
    page = document(2, kind="table")
    html = QuestionMaker(random.Random(0), "train").html(page).answer
    assert html.count("<tr>") == len(page.table)
    assert "".join(f"<td>{cell}</td>" for cell in page.table[1]) in html


def test_comparisons_are_right():
    for seed in SEEDS:
        conversation = compare(seed, "train", 3)
        first, second = conversation.documents
        for turn in conversation.turns:
            values, verdict = turn.answer.removesuffix(verdict_of(turn.answer)).rstrip(". "), verdict_of(turn.answer)
            pairs = {f"{value} and {second.fields.get(name)}": name for name, value in first.fields.items()}
            name = pairs[values]
            if "higher" in turn.question:
                amounts = [
                    float(page.fields["total"].lstrip("$\u20ac\u00a3").replace(",", ".")) for page in (first, second)
                ]
                assert name == "total"
                assert verdict == ("The first." if amounts[0] > amounts[1] else "The second.")
            elif " from " in turn.question:
                asked = [page.fields["supplier"] in turn.question for page in (first, second)]
                assert asked.count(True) == 1
                assert verdict == ("The first." if asked[0] else "The second.")
            else:
                assert verdict == ("Yes." if first.fields[name] == second.fields[name] else "No.")


def test_only_answers_carry_loss(encoder):
    conversation = training_conversation(5)
    ids, labels = encoder.conversation(conversation)
    learned = encoder.tokenizer.decode([label for label in labels if label != IGNORE_INDEX])
    assert learned == "".join(f"{turn.answer}<|eot_id|>" for turn in conversation.turns)
    assert ids[: len(encoder.prompt(conversation))] == encoder.prompt(conversation)


def test_what_stands_on_a_page_is_spelled_and_what_does_not_is_said_in_words(encoder):
    tokens_of = lambda text: encoder.tokenizer.convert_ids_to_tokens(encoder.answer(text))  # noqa: E731
    assert tokens_of("Total 5\nTo") == ["T", "o", "t", "a", "l", "\u0120", "5", "\u010a", "T", "o"]
    assert tokens_of("<tr><td>No</td></tr>") == ["<tr>", "<td>", "N", "o", "</td>", "</tr>"]
    assert tokens_of("1. The first.") == ["1", ".", "\u0120", "T", "h", "e", "\u0120first", "."]
    assert encoder.answer("\u00e9") == encoder.encode("\u00e9")  # on no drawn page
    assert encoder.answer(ABSENT) == encoder.encode(ABSENT)


@pytest.mark.parametrize("num_lines", [3, 9, ROWS_PER_PAGE])
def test_random_pages_ask_for_what_is_printed(num_lines):
    tasks = Counter()
    for seed in range(300):
        conversation = random_page_conversation(seed, num_lines, share_of_lookups=0.7)
        tasks.update(turn.task for turn in conversation.turns)
        for page in conversation.documents:
            assert len(page.lines) == ROWS_PER_PAGE
            assert max(map(len, page.lines)) <= COLUMNS
            assert 1 <= sum(map(bool, page.lines)) <= num_lines
        printed = "\n".join(page.text for page in conversation.documents)
        for turn in conversation.turns:
            if turn.task == "html":
                rows = [re.findall(r"<t[hd]>(.*?)</t", row) for row in turn.answer.split("<tr>")[1:]]
                assert rows == [line.split() for line in conversation.documents[0].lines if line]
            elif turn.task == "chart":
                numbers = [int(number) for number in re.findall(r"\b\d+\b", printed)]
                value, name = turn.answer.removesuffix(")").split(" (")
                judge = max if re.search("highest|largest", turn.question, re.IGNORECASE) else min
                assert int(value) == judge(numbers)
                assert re.search(rf"^(.*\b{name}\b:? {value}|{value} {name})$", printed, re.MULTILINE)
            elif turn.task in ("field", "cell") and turn.answer != ABSENT:
                assert turn.answer in printed
    assert set(tasks) == {"transcription", "field", "cell", "compare", "html", "chart"}


def test_many_copies_have_lines_that_begin_alike():
    alike = 0
    for seed in range(100):
        beginnings = [line.lstrip()[:4] for line in random_page_conversation(seed, 12).documents[0].lines if line]
        alike += len(set(beginnings)) < len(beginnings)
    assert 30 < alike < 55


def test_captions_are_asked_for_as_names_of_documents_are():
    questions = [turn.question for seed in range(200) for turn in random_page_conversation(seed, 12, 1.0).turns]
    assert {"Due date?", "Customer number?", "Total?"} <= set(questions)


def test_what_random_pages_call_absent_is_not_printed():
    found = Counter()
    for seed in range(300):
        conversation = random_page_conversation(seed, 10, share_of_lookups=1.0)
        words = {word.lower() for page in conversation.documents for word in re.split(r"[^A-Za-z]+", page.text)}
        for turn in conversation.turns:
            if turn.answer == ABSENT:
                found[turn.task] += 1
                asked = [name for name in PRINTED_AS if re.search(rf"\b{name}\b", turn.question, re.IGNORECASE)]
                names = (
                    {PRINTED_AS[max(asked, key=len)].lower()}
                    if asked
                    else {
                        word.lower() for word in re.findall(r"[A-Za-z]+", turn.question) if word.lower() not in WORDS
                    }
                )
                if turn.task == "cell":  # the column is there, the row is not
                    rows = [cell for page in conversation.documents for row in page.table[1:] for cell in row]
                    assert not set(re.findall(r"[A-Za-z]+", turn.question)) & set(rows) - WORDS
                else:
                    assert not words & names
    assert min(found["field"], found["cell"]) > 20


def test_random_pages_keep_held_out_phrasings_and_layouts_out():
    lists = (FIELD_PHRASINGS, VALUE_PHRASINGS, PRICE_PHRASINGS, CELL_PHRASINGS, HTML_PHRASINGS, TRANSCRIBE_PHRASINGS)
    lists += (CHECK_PHRASINGS, *COMPARE_PHRASINGS.values())
    taught = {phrasing for phrasings in lists for phrasing in phrasings[:-1]}
    held_out = [phrasings[-1] for phrasings in lists]
    assert not taught & set(held_out)
    taught_fields = {phrasing.format(name) for phrasing in FIELD_PHRASINGS[:-1] for name in PRINTED_AS}
    taught_fields -= {phrasing.format(name) for phrasing in held_out[:3] for name in PRINTED_AS}
    patterns = [re.compile(re.sub(r"\\\{\d?\\\}", "(.+)", re.escape(phrasing))) for phrasing in held_out]
    for seed in range(300):
        for conversation in (
            random_page_conversation(seed, 10, 0.8),
            value_first_conversation(seed, 9),
            verdict_conversation(seed),
            verdict_conversation(seed, 4),
        ):
            for turn in conversation.turns:
                if turn.question not in taught_fields:  # "Give the date of birth, please." is no cell of a table
                    assert not any(pattern.fullmatch(turn.question) for pattern in patterns)
            for page in conversation.documents:
                assert not any(re.fullmatch(r"\(\w[\w ]*\)", line) for line in page.lines)  # forms
                for row in page.table or ():
                    assert [cell.isdigit() for cell in row] != [True, False, True]  # tables


def test_comparisons_of_random_values_are_right():
    verdicts = Counter()
    for seed in range(400):
        for conversation in (
            random_page_conversation(seed, 10, share_of_lookups=1.0),
            verdict_conversation(seed),
            verdict_conversation(seed, 4),
        ):
            for turn in conversation.turns:
                if turn.task == "compare":
                    values = given_values(conversation.documents, turn)
                    verdict = true_verdict(turn.question, values)
                    assert turn.answer == f"{values[0]} and {values[1]}. {verdict}"
                    verdicts[bool(conversation.documents), verdict] += 1
    assert len(verdicts) == 8 and min(verdicts.values()) > 20


def true_verdict(question: str, values: list[str]) -> str:
    """What a person would say about two values."""
    if "higher" in question:
        amounts = [float(value.lstrip("$\u20ac\u00a3")) for value in values]
        assert amounts[0] != amounts[1]
        return "The first." if amounts[0] > amounts[1] else "The second."
    if " from " in question:
        asked = question[:-1].split(" from ", 1)[1]
        assert asked in values and values[0] != values[1]
        return "The first." if asked == values[0] else "The second."
    return "Yes." if values[0] == values[1] else "No."


def test_values_that_are_given_carry_no_loss(encoder):
    conversation = verdict_conversation(1)
    ids, labels = encoder.conversation(conversation)
    learned = encoder.tokenizer.decode([label for label in labels if label != IGNORE_INDEX])
    assert learned == f" {verdict_of(conversation.turns[0].answer)}<|eot_id|>"
    assert conversation.turns[0].answer in encoder.tokenizer.decode(ids)


def given_values(pages: list, turn) -> list[str]:
    """The two values of a comparison, as the answer is given or as the pages have them."""
    written = turn.answer.removesuffix(f". {verdict_of(turn.answer)}").split(" and ")
    if not pages:
        assert turn.given == f"{written[0]} and {written[1]}."
        return written
    name = re.search(r"(?:the|both|higher|same|Which) (\w{3,6})(?: the same| higher|\?|\.| is)", turn.question)
    if " from " not in turn.question:
        return [printed_value(page, name[1]) for page in pages]
    for page, value in zip(pages, written, strict=True):
        lines = [line.strip() for line in page.lines]
        assert any(line == value or line.endswith(f" {value}") or line.startswith(f"{value} ") for line in lines)
    return written


def printed_value(page, name: str) -> str:
    """What stands above a name in brackets, before one at the end of a line, after others, or below."""
    text = "\n".join(line for line in page.lines if line)
    ways = (rf"^(.*)\n[\W_]{name}[\W_]$", rf"^(.+) {name}$", rf"^ *{name}:?\s+(.*)$")
    return next(filter(None, (re.search(way, text, re.MULTILINE) for way in ways)))[1].strip()


def test_training_prompts_equal_the_chat_template(encoder):
    page = document(1)
    conversation = ask(1, "train", page, 2)
    messages = []
    for index, turn in enumerate(conversation.turns):
        messages.append({"role": "user", "content": ("<image>\n" if index == 0 else "") + turn.question})
        messages.append({"role": "assistant", "content": turn.answer})
    text = encoder.tokenizer.apply_chat_template(messages, tokenize=False)
    image = "<img>" + "<image>" * ROWS_PER_PAGE * COLUMNS + "</img>"
    assert encoder.tokenizer.decode(encoder.conversation(conversation)[0]) == text.replace("<image>", image)


def test_the_tokenizer_gives_every_printed_character_one_token(encoder):
    page = document(3, kind="receipt")
    for value in page.fields.values():
        if " " not in value:
            assert len(encoder.encode(value)) <= len(value)
    assert encoder.tokenizer.decode(encoder.encode(page.text)) == page.text
    assert len(encoder.cells(page)) == ROWS_PER_PAGE * COLUMNS


def test_batches_pad_right_and_name_each_visual_token(encoder):
    batch = encoder.batch(
        [random_page_conversation(1, 3), read_out(2, "train", document(2)), text_only(3, "train", 1)]
    )
    assert batch.input_ids.shape == batch.labels.shape
    assert (batch.input_ids == encoder.image_token_id).sum() == sum(len(encoder.cells(page)) for page in batch.pages)
    assert torch.equal(batch.labels[batch.labels != IGNORE_INDEX], batch.input_ids[batch.labels != IGNORE_INDEX])
