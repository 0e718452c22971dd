"""The drawn documents: what is printed, where it stands, what is asked about it."""

import ast
import random
import re

import numpy as np
import pytest

from documents import contents, drawing, fonts, questions
from documents.contents import KINDS, NUM_HELD_OUT, NUM_LAYOUTS, make_page
from documents.drawing import draw
from documents.example import LOOK, SEED, example_page
from documents.fonts import TYPEFACES
from documents.pages import Line, Page, Piece
from documents.questions import (
    ABSENT,
    QuestionMaker,
    amount_of,
    ask,
    compare,
    read_out,
    table_as_html,
    training_conversation,
    verdict_of,
)
from documents.typesetting import Look, set_page
from documents.values import split_of
from documents.wording import LABELS, MAKERS
from pretraining.cells import NONE, TOKENS_PER_TILE, cells_of, patch_classes, token_classes
from pretraining.random_text import copying, looking_up, random_page, understanding
from tools import ROOT

SEEDS = range(30)
LABELS_OF = {label: name for name, labels in LABELS.items() for label in labels[:-1]}  # without the held-out ones
FLAT = Look(tilted=0.0, photographed=0.0, degradation=0.0)


def printed(page: Page) -> str:
    """Return the text with lines joined: a letter may break a value."""
    return " ".join(page.text.split("\n"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_price_and_label_is_printed_exactly(kind):
    for seed in SEEDS:
        page = make_page(seed, "heldout" if seed % 2 else "train", kind)
        values = [value for name, value in page.fields.items() if name not in ("highest", "lowest")]
        for value in [*values, *page.prices.values(), *page.labels.values()]:
            assert value.lower() in printed(page).lower(), (seed, value)
        assert 0 < len(page.lines) <= contents.MAX_LINES


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_always_gives_the_same_page_and_image(kind):
    first, second = (make_page(3, kind=kind) for _ in range(2))
    assert first == second
    images = [draw(set_page(page, 3), 3).tobytes() for page in (first, second)]
    assert images[0] == images[1]
    assert make_page(4, kind=kind) != first


@pytest.mark.parametrize("kind", KINDS)
def test_two_layouts_of_a_kind_are_held_out(kind):
    seen = range(NUM_LAYOUTS - NUM_HELD_OUT)
    assert {make_page(seed, "train", kind).layout for seed in range(60)} == set(seen)
    heldout = [make_page(seed, "heldout", kind) for seed in range(60)]
    assert {page.layout for page in heldout} == set(range(NUM_LAYOUTS))
    assert all(page.is_seen == (page.layout in seen) for page in heldout)


def test_the_last_spelling_of_a_label_is_held_out():
    def labels(split: str) -> set[tuple[str, str]]:
        pages = [make_page(seed, split) for seed in range(200)]
        return {(name, label.lower()) for page in pages for name, label in page.labels.items()}

    unseen = {(name, spellings[-1].lower()) for name, spellings in LABELS.items()}
    assert not labels("train") & unseen
    assert labels("heldout") & unseen


def test_made_up_values_of_the_splits_differ():
    values = {
        split: {(name, value) for seed in range(150) for name, value in make_page(seed, split).fields.items()}
        for split in ("train", "heldout")
    }
    shared = {name for name, _ in values["train"] & values["heldout"]}
    # sums are computed, small numbers are few, these others are chosen from short lists
    assert shared <= {"total", "subtotal", "tax", "tip", "change", "amount given", "discount", "payment", "title",
                      "subject", "number of items", "register", "highest", "lowest"}  # fmt: skip
    assert {"supplier", "date", "receipt number", "address"} <= set(MAKERS) - shared


def test_at_least_four_typefaces_are_held_out():
    assert len(fonts.TYPEFACES["heldout"]) >= 4
    assert not set(fonts.TYPEFACES["heldout"]) & set(fonts.TYPEFACES["train"])


def test_missing_typefaces_are_named_with_the_command_that_installs_them(monkeypatch):
    monkeypatch.setattr(fonts, "is_installed", lambda face: False)
    with pytest.raises(ImportError, match=r"pip install .*font-roboto"):
        fonts.require("train")


@pytest.mark.parametrize("look", [FLAT, Look(tilted=1.0, photographed=0.0), Look(photographed=1.0)])
def test_characters_stand_where_the_image_has_ink(look):
    for seed in range(6):
        setting = set_page(make_page(seed, kind="receipt"), seed, look=look)
        image = np.asarray(draw(setting, seed, degradation=0.0).convert("L"), float)
        assert image.shape == (setting.height, setting.width)
        wide, high = max(2, round(setting.size / 5)), max(3, round(setting.size / 3))

        def ink(x: float, y: float, image=image, wide=wide, high=high) -> float:
            x, y = round(x), round(y)
            return float(np.ptp(image[max(0, y - high) : y + high, max(0, x - wide) : x + wide]))

        letters = [ink(glyph.x, glyph.y) for glyph in setting.glyphs if glyph.character.isalnum()]
        assert np.mean(np.array(letters) > 60) > 0.98


def test_characters_of_a_line_stand_in_order_and_spell_the_text():
    page = make_page(5, kind="bill")
    setting = set_page(page, 5, look=FLAT)
    lines: dict[int, str] = {}
    for glyph in setting.glyphs:
        lines[glyph.line] = lines.get(glyph.line, "") + glyph.character
    assert "\n".join(lines[index].strip() for index in sorted(lines)) == page.text
    for index in lines:
        places = [glyph.x for glyph in setting.glyphs if glyph.line == index]
        assert places == sorted(places)


def test_pieces_of_a_line_never_touch():
    page = Page("table", 0, [Line([Piece("a long left side"), Piece("12.40", 0.4, "r"), Piece("and more", 0.45)])])
    setting = set_page(page, 1, look=FLAT)
    runs = setting.runs
    for left, right in zip(runs, runs[1:], strict=False):
        font = fonts.load(setting.typeface, left.bold, left.size)
        assert right.x > left.x + font.getlength(left.text)


def test_cells_list_every_character_once_in_reading_order():
    page = Page("letter", 0, [Line([Piece("Dear Anna,")]), Line([]), Line([Piece("come on 3 May.")])])
    cells = cells_of(set_page(page, 2, look=FLAT), max_num_tiles=1)
    assert cells.grid == (1, 1)
    text = "".join(character for token in sorted(cells.glyphs) for character, _, _ in cells.glyphs[token])
    assert text == "Dear Anna, come on 3 May. "


def test_cells_of_two_tiles_lie_in_the_tile_that_shows_them():
    page = Page("form", 0, [Line([Piece(str(number))]) for number in range(20)])
    cells = cells_of(set_page(page, 1, look=FLAT), max_num_tiles=2)
    assert cells.grid == (2, 1) and cells.num_tokens == 2 * TOKENS_PER_TILE
    first, last = ("".join(c for found in cells.tile(i).values() for c, _, _ in found) for i in (0, 1))
    assert "0" in first and "19" in last


def test_classes_of_tokens_and_patches_hold_the_same_characters():
    cells = cells_of(set_page(random_page(3), 3, look=FLAT), max_num_tiles=1)
    tokens, patches = token_classes(cells.tile(0), 6), patch_classes(cells.tile(0), 4)
    assert sorted(tokens[tokens != NONE].tolist()) == sorted(patches[patches != NONE].tolist())


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_on_the_page_and_absent_things_are_not(kind):
    for seed in SEEDS:
        page = make_page(seed, "train", kind)
        text = printed(page)
        for turn in ask(seed, "train", page, 9).turns:
            if turn.task in ("field", "price", "cell"):
                assert turn.answer in text
            elif turn.task == "chart":
                assert turn.answer.split(" (")[0] in text
            elif turn.task == "absent":
                assert turn.answer == ABSENT
            else:
                assert turn.task == "yes/no" and turn.answer in ("Yes.", "No.")
        assert read_out(seed, "train", page).turns[0].answer


def test_yes_no_questions_name_the_true_value_or_another():
    for seed in range(60):
        page = make_page(seed)
        turn = questions.QuestionMaker(random.Random(seed), "train").check(page)
        values = [value for value in page.fields.values() if value in turn.question]
        assert values or turn.answer == "No."


def test_the_last_phrasing_is_held_out():
    for split, expected in (("train", {True}), ("heldout", {True, False})):
        turns = [turn for seed in range(60) for turn in ask(seed, split, make_page(seed, split), 5).turns]
        assert {turn.seen for turn in turns} == expected


def test_comparisons_give_both_values_and_the_right_verdict():
    verdicts = set()
    for seed in range(60):
        for turn in compare(seed, "train", 3).turns:
            first, second = turn.answer.removesuffix(f" {verdict_of(turn.answer)}").rstrip(".").split(" and ", 1)
            verdicts.add(verdict_of(turn.answer))
            if "higher" in turn.question:
                wanted = "The second." if amount_of(second) > amount_of(first) else "The first."
                assert verdict_of(turn.answer) == wanted
            elif verdict_of(turn.answer) in ("Yes.", "No."):
                assert (first == second) == (verdict_of(turn.answer) == "Yes.")
    assert verdicts == {"Yes.", "No.", "The first.", "The second."}


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("12.40", 12.4),
        ("$1,240.50", 1240.5),
        ("1.240,50 EUR", 1240.5),
        ("-\u20ac3,20", -3.2),
        ("7", 7.0),
        ("GBP 0.05", 0.05),
    ],
)
def test_amounts_are_read_in_every_form_that_pages_print(text, amount):
    assert amount_of(text) == pytest.approx(amount)


def test_exercises_ask_for_what_is_printed():
    for seed in range(60):
        talk = copying(seed, 6, 30)
        assert [turn.answer for turn in talk.turns] == [talk.documents[0].text]
        assert talk.turns[0].question in questions.TRANSCRIBE_PHRASINGS
        talk = looking_up(seed, 6, 30)
        for turn in talk.turns:
            assert turn.answer in talk.documents[0].text or turn.answer in (ABSENT, "Yes.", "No.")


def test_meanings_of_labels_are_asked_for_on_lists_that_print_them():
    for seed in range(60):
        conversation = understanding(seed, 6, 30)
        values = conversation.documents[0].fields
        assert all(label in LABELS_OF and value for label, value in values.items())
        for turn in conversation.turns:
            if turn.task == "field":
                assert turn.answer in values.values()
        assert not any(turn.task == "absent" and turn.answer != ABSENT for turn in conversation.turns)


def test_a_bad_kind_is_refused():
    with pytest.raises(ValueError, match="kind must be one of receipt"):
        make_page(1, kind="novel")


def test_jpeg_noise_and_shade_change_the_image_only_with_degradation():
    setting = set_page(make_page(1), 1, look=FLAT)
    assert draw(setting, 1, degradation=0.0).tobytes() == draw(setting, 1, degradation=0.0).tobytes()
    assert any(draw(setting, seed, degradation=0.0).tobytes() != draw(setting, seed).tobytes() for seed in range(5))
    assert drawing.random_wear(1, "train", 0.0).jpeg_quality == 0


def test_the_receipt_of_the_demo_is_held_out():
    page = example_page()
    setting = set_page(page, SEED, "heldout", LOOK)
    assert not fonts.installed("train")[0].package or setting.typeface in fonts.TYPEFACES["heldout"]
    assert split_of("Claisaid Tools") == split_of("606543") == "heldout"
    amounts = {line.pieces[0].text: amount_of(line.pieces[1].text) for line in page.lines if "." in line.text[-3:]}
    assert amounts["Vase"] + amounts["Flour"] == pytest.approx(amounts["Subtotal"])
    assert amounts["Subtotal"] + amounts["VAT"] == pytest.approx(amounts["Total"])


def test_the_contact_sheet_has_a_column_for_each_kind():
    assert drawing.contact_sheet(num_rows=1).width > 200 * len(KINDS)


def test_the_extra_nano_installs_the_package_of_every_font():
    extra = re.search(r"^nano = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL).group(1)
    packages = {face.package for faces in TYPEFACES.values() for face in faces}
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


def test_a_table_becomes_html_cell_by_cell():
    assert table_as_html([["A", "B"], ["1", "2"]]) == (
        "<table><tr><th>A</th><th>B</th></tr><tr><td>1</td><td>2</td></tr></table>"
    )
    page = make_page(2, kind="table")
    assert QuestionMaker(random.Random(0), "train").html(page).answer == table_as_html(page.table)


def test_training_conversations_are_those_of_their_seed_and_have_all_tasks():
    conversations = [training_conversation(seed) for seed in range(300)]
    assert conversations[7] == training_conversation(7)
    tasks = {turn.task for conversation in conversations for turn in conversation.turns}
    assert tasks == {"field", "price", "cell", "chart", "yes/no", "absent", "transcription", "html", "compare", "text"}
    forms = [training_conversation(seed, pairs=0, kinds=("form",)) for seed in range(40)]
    assert {page.kind for conversation in forms for page in conversation.documents} == {"form"}
