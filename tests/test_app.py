"""What the page of `tools.app` does with a document, without a browser; tests/test_app_browser.py opens it in one."""

import json
import re
import subprocess
import sys
import threading
import time
from importlib import metadata
from pathlib import Path

import fpdf
import numpy as np
import pikepdf
import pytest
import transformers
from PIL import Image

from tools import ROOT, app, space
from tools.chat import load, percent
from tools.session import BOXES, PAGE, TILES, Reader, Session, fields_of_text, shown, words_of

RECEIPT = ROOT / "examples" / "receipt.png"
INVOICE = ROOT / "examples" / "invoice.pdf"
# nano was not trained on boxes, so the schema leaves it no choice.
CORNERS = [100, 600, 900, 700]
BOX = {"type": "array", "prefixItems": [{"const": number} for number in CORNERS], "minItems": 4, "maxItems": 4}
BOX_SCHEMA = json.dumps({"type": "object", "properties": {"total": {**BOX, "items": False}}, "required": ["total"]})


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader(*load(ROOT / "nano"), "nano")


@pytest.fixture
def slow_steps(reader):
    """Let every step of the language model take a while; yields the list of the times of the steps."""
    times: list[float] = []

    def step(*_):
        times.append(time.monotonic())
        time.sleep(0.05)

    handle = reader.model.language_model.register_forward_pre_hook(step)
    yield times
    handle.remove()


def long_pdf(path: Path, num_pages: int) -> Path:
    pdf = fpdf.FPDF()
    for _ in range(num_pages):
        pdf.add_page()
    pdf.output(path)
    return path


def red_pixels(image: Image.Image) -> int:
    pixels = np.asarray(image).astype(int)
    return int(((pixels[..., 0] > 200) & (pixels[..., 1:] < 60).all(-1)).sum())


# --- the document ---


def test_a_document_is_shown_with_its_tiles_and_what_they_cost(reader):
    session = Session(reader, RECEIPT)
    assert session.costs(0) == "357 × 540 px → 1 × 2 tiles → 514 tokens, 13 % of the context."
    assert session.views(0) == [PAGE, TILES] and session.cautions(0) == []
    page, tiles = session.picture(0, PAGE), session.picture(0, TILES)
    assert page.size == tiles.size == (357, 540) and red_pixels(page) == 0 < red_pixels(tiles)


def test_fewer_tiles_cost_less(reader, tmp_path):
    tall = tmp_path / "tall.png"
    Image.new("RGB", (500, 1000), "white").save(tall)
    assert "1 × 2 tiles → 514 tokens" in Session(reader, tall).costs(0)
    assert "1 × 1 tiles → 258 tokens" in Session(reader, tall, max_num_tiles=1).costs(0)


def test_pages_are_named_by_their_numbers_in_the_file(reader):
    session = Session(reader, INVOICE, pages="3,1-2")
    assert session.page_range() == "3,1-2"
    assert session.costs(0).startswith("Page 3 of 3: 512 × 1024 px → 1 × 2 tiles → 514 tokens, 13 % of the context. ")
    assert session.costs(0).endswith("The pages 3,1-2 together: 1,542 tokens, 38 % of the context.")


def test_of_a_long_document_those_pages_are_chosen_that_fit_a_question(reader, tmp_path):
    path = long_pdf(tmp_path / "long.pdf", 30)
    session = Session(reader, path)
    assert session.page_range() == "1-5" and session.fits
    assert "5 of 30 pages fit into a question with up to 2 tiles each." in session.cautions(0)[0]
    assert Session(reader, path, max_num_tiles=1).page_range() == "1-10"


def test_pages_that_do_not_fit_are_named_before_and_when_a_question_is_asked(reader, tmp_path):
    session = Session(reader, long_pdf(tmp_path / "long.pdf", 30), pages="1-30")
    assert "These pages take 15,420 tokens, and the context leaves 2,816" in session.cautions(0)[0]
    with pytest.raises(ValueError, match="30 pages or images take"):
        list(session.ask("What is the total?"))
    assert not session.is_busy


def test_type_that_the_model_cannot_read_is_named(reader, monkeypatch):
    monkeypatch.setattr(reader.model.config, "readable_type_height", [200, 300], raising=False)
    (caution,) = Session(reader, RECEIPT).cautions(0)
    assert "too small for this model, which reads 200 to 300 px" in caution


def test_a_broken_file_is_an_error_in_words_without_its_folder(reader, tmp_path):
    for name, content in {
        "broken.png": RECEIPT.read_bytes()[:3000],
        "text.png": b"Hello",
        "a.pdf": b"%PDF-1.7",
    }.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match="cannot be used") as error:
            Session(reader, path).picture(0, PAGE)
        words = words_of(error.value, path)
        assert name in words and str(tmp_path) not in words


def test_an_encrypted_pdf_asks_for_its_password(reader, tmp_path):
    path = tmp_path / "secret.pdf"
    with pikepdf.open(INVOICE) as pdf:
        pdf.save(path, encryption=pikepdf.Encryption(owner="owner", user="sesame"))
    with pytest.raises(ValueError, match="needs a password"):
        Session(reader, path)
    with pytest.raises(ValueError, match="password is wrong"):
        Session(reader, path, password="shut")
    session = Session(reader, path, password="sesame")
    assert session.page_range() == "1-3" and "sesame" not in repr(session)


# --- questions ---


def test_an_answer_grows_and_says_how_sure_it_is(reader):
    *growing, last = Session(reader, RECEIPT).ask("Transcribe the page.")
    texts = [reply.text for reply in growing]
    assert len(set(texts)) > 10 and all(text.startswith(texts[index]) for index, text in enumerate(texts[1:]))
    assert last.text.startswith("Claisaid Tools\n139 Traind Road\n") and last.text == texts[-1].strip()
    assert re.fullmatch(r"Confidence [\d.]+ %, \d+ tokens, [\d.]+ s\.", last.note)


def test_the_conversation_goes_on_and_equals_that_of_chat(reader):
    session = Session(reader, RECEIPT)
    questions = ["Who is the seller?", "What is the date?"]
    answers = [[*session.ask(question)][-1].text for question in questions]
    options, history, expected = {"max_new_tokens": 64, "do_sample": False}, None, []
    for question in questions:
        answer, history = reader.model.chat(
            reader.processor, None, question, options, history, return_history=True, document=RECEIPT
        )
        expected.append(answer)
    assert answers == expected and session.history == history


def test_a_question_about_pages_is_answered_from_all_of_them(reader):
    assert [*Session(reader, INVOICE).ask("What is the total?")][-1].text == "320.76"


def test_an_answer_that_is_cut_off_says_so(reader, monkeypatch):
    monkeypatch.setattr("tools.session.MAX_NEW_TOKENS", 3)
    assert "The answer was cut off" in [*Session(reader, RECEIPT).ask("Who is the seller?")][-1].note


def test_a_stopped_answer_ends_within_a_step_and_is_no_part_of_the_conversation(reader, slow_steps):
    session = Session(reader, RECEIPT)
    replies = session.ask("Transcribe the page.")
    while not next(replies).text:
        pass
    assert session.is_busy
    session.stop()
    num_steps = len(slow_steps)
    last = [*replies][-1]
    assert "Stopped" in last.note and last.text and session.history is None and not session.is_busy
    assert len(slow_steps) <= num_steps + 2
    assert [*session.ask("What is the total?")][-1].text == "72.13"


def test_who_leaves_an_answer_ends_it(reader, slow_steps):
    replies = Session(reader, RECEIPT).ask("Transcribe the page.")
    while not next(replies).text:
        pass
    replies.close()
    num_steps = len(slow_steps)
    assert [*Session(reader, RECEIPT).ask("What is the total?")][-1].text == "72.13"
    assert len(slow_steps) <= num_steps + 2 + 6  # 5 tokens and the end


def test_a_question_that_is_stopped_while_it_waits_is_not_generated(reader, slow_steps):
    first, second = Session(reader, RECEIPT), Session(reader, INVOICE)
    replies = first.ask("Transcribe the page.")
    next(replies)
    found = []
    waiting = threading.Thread(target=lambda: found.extend(second.ask("What is the total?")))
    waiting.start()
    while not second.is_busy:
        time.sleep(0.01)
    second.stop()
    first.stop()
    list(replies)
    waiting.join()
    assert [reply.text for reply in found] == [""] and "Stopped" in found[0].note


def test_the_answers_of_several_people_follow_one_another_and_belong_to_their_documents(reader, monkeypatch):
    order = []
    stream = type(reader.model).chat_stream

    def watched(self, *args, **kwargs):
        order.append("begins")
        result = yield from stream(self, *args, **kwargs)
        order.append("ends")
        return result

    monkeypatch.setattr(type(reader.model), "chat_stream", watched)
    found = {}

    def ask(number: int) -> None:
        path = (RECEIPT, INVOICE)[number % 2]
        found[number] = [*Session(reader, path).ask("What is the total?")][-1].text

    threads = [threading.Thread(target=ask, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: ("72.13", "320.76")[number % 2] for number in range(4)}
    assert order == ["begins", "ends"] * 4


@pytest.mark.parametrize("checkpoint", ["tiny_checkpoint", "tiny_v2_checkpoint"])
def test_any_checkpoint_of_the_family_is_asked(checkpoint, request, monkeypatch):
    if checkpoint == "tiny_v2_checkpoint" and not hasattr(transformers, "NemotronHForCausalLM"):
        pytest.skip("transformers 4.57 has no NemotronH")
    monkeypatch.setattr("tools.session.MAX_NEW_TOKENS", 4)
    folder = request.getfixturevalue(checkpoint)
    session = Session(Reader(*load(folder), folder.name), RECEIPT)
    for turn in (1, 2):
        assert [*session.ask("What is the total?")][-1].note.startswith("Confidence ")
        assert len(session.history) == turn
    assert session.reader.describe().startswith(folder.name)


def test_an_error_leaves_nothing_behind_for_the_next_question(reader, monkeypatch):
    session = Session(reader, RECEIPT)
    with monkeypatch.context() as patched:
        patched.setattr(reader.model, "generate", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            list(session.ask("What is the total?"))
    assert [*session.ask("What is the total?")][-1].text == "72.13"


# --- fields ---


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("total", ["total"]),
        (" total,due date ,\n\nsupplier", ["total", "due date", "supplier"]),
        ('["total", "a, b"]', ["total", "a, b"]),
        (' {"type": "object"}', {"type": "object"}),
    ],
)
def test_fields_are_names_or_a_schema(text, fields):
    assert fields_of_text(text) == fields


def test_fields_that_are_neither_are_an_error():
    with pytest.raises(ValueError, match="in line 2, column 9. Write a JSON Schema, or names"):
        fields_of_text('{\n"type": }')
    with pytest.raises(ValueError, match="Name the fields"):
        fields_of_text(" , \n")


def test_fields_have_a_confidence_and_the_number_of_their_page(reader):
    pytest.importorskip("llguidance", reason="pip install 'nemotron-vl[fields]'")
    (found,) = Session(reader, INVOICE, pages="2-3").extract("total, discount")
    assert [[row[0], row[1], row[3]] for row in found.rows] == [
        ["total", "320.76", "3"],
        ["discount", "not found", ""],
    ]
    assert all(re.fullmatch(r"[\d.]+ %", row[2]) for row in found.rows) and found.note == ""
    assert found.json["fields"] == {"total": "320.76", "discount": None}
    assert found.json["values"]["total"]["page"] == 3 and found.json["error"] is None
    json.dumps(found.json)


def test_what_is_downloaded_has_the_form_that_the_reading_command_writes(reader, tmp_path):
    pytest.importorskip("llguidance", reason="pip install 'nemotron-vl[fields]'")
    from nemotron_vl.reading import InProcess, read
    from nemotron_vl.reading.engines import Transformers

    schema = {"type": "object", "properties": {"total": {"type": "string"}}, "required": ["total"]}
    (found,) = Session(reader, RECEIPT).extract(json.dumps(schema))
    read([str(RECEIPT)], InProcess(Transformers(reader.model, reader.processor, "nano")), schema=schema, out=tmp_path)
    (written,) = tmp_path.rglob("receipt*.json")
    expected = json.loads(written.read_text())
    assert {**expected, "file": RECEIPT.name} == found.json


def test_boxes_are_drawn_over_the_page_of_the_answer(reader):
    pytest.importorskip("llguidance", reason="pip install 'nemotron-vl[fields]'")
    session = Session(reader, RECEIPT)
    assert session.first_page_with_boxes is None
    (found,) = session.extract(BOX_SCHEMA)
    assert found.json["fields"] == {"total": CORNERS} and found.note == "The boxes are drawn over the page."
    assert session.first_page_with_boxes == 0 and session.views(0) == [PAGE, TILES, BOXES]
    pixels = np.asarray(session.picture(0, BOXES)).astype(int)
    rows, columns = np.nonzero((pixels[..., 0] > 200) & (pixels[..., 1:] < 60).all(-1))
    assert columns.min() == pytest.approx(0.1 * 357, abs=2) and columns.max() == pytest.approx(0.9 * 357, abs=2)
    assert rows.max() == pytest.approx(0.7 * 540, abs=2)
    list(session.ask("What is the total?"))
    assert session.first_page_with_boxes is None  # of the last answer


def test_boxes_that_cannot_be_drawn_are_named(reader):
    assert "has no counterpart" in Session(reader, RECEIPT)._keep_boxes({0: "<box>(1,2)"})
    about_all = Session(reader, INVOICE)
    assert "about several pages" in about_all._keep_boxes({0: "<box>(1,2),(3,4)</box>"})
    assert about_all.first_page_with_boxes is None


def test_fields_that_make_no_valid_object_show_what_was_read(reader, monkeypatch):
    pytest.importorskip("llguidance", reason="pip install 'nemotron-vl[fields]'")
    monkeypatch.setattr("tools.session.MAX_NEW_TOKENS", 2)
    schema = {
        "type": "object",
        "properties": {"supplier": {"type": "string", "minLength": 9}},
        "required": ["supplier"],
    }
    (found,) = Session(reader, RECEIPT).extract(json.dumps(schema))
    assert found.json["fields"] is None and "cut off after 2 tokens" in found.note == found.json["error"]


def test_reading_fields_is_stopped_within_a_step(reader, slow_steps):
    pytest.importorskip("llguidance", reason="pip install 'nemotron-vl[fields]'")
    session = Session(reader, INVOICE)
    found: list[object] = []
    working = threading.Thread(target=lambda: found.extend(session.extract("supplier, date, total")))
    working.start()
    while not slow_steps:
        time.sleep(0.01)
    session.stop()
    num_steps = len(slow_steps)
    working.join()
    assert found == [] and len(slow_steps) <= num_steps + 2


def test_confidences_and_values_are_written_for_people():
    assert [percent(value) for value in (None, 0.0, 0.5, 0.99999, 1)] == ["", "0.0 %", "50.0 %", "99.9 %", "100 %"]
    assert [shown(value) for value in (None, "a", 1.5, True)] == ["not found", "a", "1.5", "true"]


# --- the command and the Space ---


def test_the_command_without_gradio_names_what_to_install():
    code = "import sys; sys.modules['gradio'] = None; from tools.app import main; main(['--port', '1'])"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1
    assert "The page needs packages that are not installed: pip install gradio pypdfium2" in ended.stderr


@pytest.fixture
def installed(monkeypatch):
    """Pretend that all packages of a Space are installed."""
    monkeypatch.setattr(metadata, "version", lambda name: "2.13.0+cpu" if name == "torch" else "1.2.3")


def test_a_space_has_what_the_hub_reads_and_all_code(tmp_path, installed, capsys):
    folder = tmp_path / "space"
    assert app.main(["--space", str(folder)]) == 0
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "app.py", "requirements.txt", ".gitattributes", "nemotron_vl"
    }  # fmt: skip
    _, block, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    keys = dict(line.split(": ", 1) for line in block.splitlines())
    assert (keys["sdk"], keys["sdk_version"], keys["app_file"], keys["license"]) == (
        "gradio", "1.2.3", "app.py", "apache-2.0"
    )  # fmt: skip
    assert len(keys["short_description"]) <= 60
    assert "torch==2.13.0\n" in (folder / "requirements.txt").read_text()
    code = folder / "nemotron_vl"
    for file in [*ROOT.glob("*.py"), *(ROOT / "tools").glob("*.py"), *(ROOT / "reading").glob("*.py")]:
        assert (code / file.relative_to(ROOT)).read_bytes() == file.read_bytes()
    assert (code / "nano" / "model.safetensors").exists() and (code / "examples" / "invoice.pdf").exists()
    with pytest.raises(ValueError, match="already has files"):
        space.write_space(folder, ROOT / "nano")


def test_a_space_holds_any_checkpoint_and_no_links(tiny_checkpoint, tmp_path, installed):
    linked = tmp_path / "tools"  # a name that the code has, too
    linked.mkdir()
    for file in tiny_checkpoint.iterdir():
        (linked / file.name).symlink_to(file)
    space.write_space(tmp_path / "space", linked)
    copied = tmp_path / "space" / "nemotron_vl" / "tools-checkpoint"
    assert {file.name for file in copied.iterdir()} == {
        file.name for file in tiny_checkpoint.iterdir() if file.is_file()
    }
    assert not any(path.is_symlink() for path in (tmp_path / "space").rglob("*"))
    assert "license: other" in (tmp_path / "space" / "README.md").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="inside the checkpoint"):
        space.write_space(linked / "space", linked)


def test_a_space_needs_the_packages_that_it_names(tmp_path, monkeypatch):
    def version(name):
        if name == "gradio":
            raise metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(ImportError, match="pip install gradio"):
        space.write_space(tmp_path / "space", ROOT / "nano")
    assert not (tmp_path / "space").exists()
