"""The page of `tools.app` in a real browser: chromium, driven by playwright."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pikepdf
import pytest

from tests.test_app import BOX_SCHEMA, INVOICE, RECEIPT
from tools import ROOT, space

pytestmark = pytest.mark.slow
pytest.importorskip("gradio", reason="pip install gradio pypdfium2 llguidance jsonschema")
playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
CHROMIUM = os.environ.get("NEMOTRON_VL_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("apt install chromium, or NEMOTRON_VL_CHROMIUM names a browser", allow_module_level=True)

LONG = "Transcribe the page."  # which nano answers in about 130 tokens
TIMEOUT = 60_000  # ms, for a machine that is busy
NARROW = {"width": 390, "height": 844}


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


@contextlib.contextmanager
def running(command: list[str], folder: Path, **environment: str) -> Iterator[str]:
    """Start a command that serves the page, and yield its address once it answers."""
    port = free_port()
    address = {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    log = folder / f"log-{port}.txt"
    environment = {**os.environ, **address, **environment}
    with log.open("w") as output:
        process = subprocess.Popen([sys.executable, *command], env=environment, stdout=output, stderr=output)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), urllib.request.urlopen(url):
                break
            if process.poll() is not None:
                break
            time.sleep(0.2)
        else:
            pytest.fail(f"no page after two minutes: {log.read_text()}")
        assert process.poll() is None, log.read_text()
        yield url
    finally:
        process.terminate()
        process.wait()


# The steps of the model take 50 ms here, so that there is time to look at an answer that grows, and to stop it. Each
# step writes a byte into a file, which counts them.
SLOW_APP = """
import sys, time
from tools import chat
load, steps = chat.load, open(sys.argv[1], "wb", buffering=0)

def step(*_):
    steps.write(b".")
    time.sleep(0.05)

def slow_load(*args, **options):
    model, processor = load(*args, **options)
    model.language_model.register_forward_pre_hook(step)
    return model, processor

chat.load = slow_load
from tools.app import main
main([])
"""


@pytest.fixture(scope="module")
def steps(tmp_path_factory) -> Path:
    """A file with a byte for each step of the model."""
    return tmp_path_factory.mktemp("app") / "steps"


@pytest.fixture(scope="module")
def url(steps):
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with running(["-c", SLOW_APP, str(steps)], steps.parent, PYTHONPATH=paths) as address:
        yield address


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextlib.contextmanager
def tab_of(chromium, url: str, **options) -> Iterator:
    """Open the page in a tab; afterwards nothing may have been fetched from elsewhere, and no script have failed."""
    context = chromium.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
    context.set_default_timeout(TIMEOUT)
    tab, foreign, failed = context.new_page(), [], []
    tab.on(
        "request",
        lambda request: request.url.startswith(("http://127.0.0.1:", "data:", "blob:")) or foreign.append(request.url),
    )
    tab.on("pageerror", lambda error: failed.append(str(error)))
    tab.goto(url)
    yield tab
    context.close()
    assert foreign == [] and failed == []


@pytest.fixture
def tab(chromium, url):
    with tab_of(chromium, url) as opened:
        yield opened


def upload(tab, path: Path) -> None:
    tab.locator("#file input[type=file]").set_input_files(path)


def image_of(tab):
    return tab.locator("#page img")


def ask(tab, question: str) -> None:
    tab.locator("#question textarea").fill(question)
    tab.locator("#ask").click()


def answers(tab) -> list[str]:
    return [text.strip() for text in tab.locator("#chat .bot.message").all_inner_texts()]


def wait_for_note(tab, text: str, place: str = "#note") -> str:
    found = tab.locator(place).get_by_text(text)
    found.wait_for()
    return found.inner_text()


def test_an_image_is_uploaded_and_asked_about_twice(tab):
    upload(tab, RECEIPT)
    image_of(tab).wait_for()
    assert "357 × 540 px → 1 × 2 tiles → 514 tokens, 13 % of the context" in tab.locator("#costs").inner_text()
    ask(tab, "What is the total?")
    assert "5 tokens" in wait_for_note(tab, "Confidence 99")
    assert answers(tab) == ["72.13"]
    tab.locator("#question textarea").fill("Who is the seller?")
    tab.locator("#question textarea").press("Enter")
    wait_for_note(tab, "14 tokens")
    assert answers(tab) == ["72.13", "Claisaid Tools"]
    tab.locator("#again").click()
    tab.locator("#chat .bot.message").first.wait_for(state="detached")
    assert image_of(tab).is_visible()


def test_an_answer_grows(tab):
    tab.get_by_role("button", name="A receipt").click()
    image_of(tab).wait_for()
    ask(tab, LONG)
    lengths = set()
    while not tab.locator("#note").get_by_text("Confidence").is_visible():
        lengths.update(len(text) for text in answers(tab))
        time.sleep(0.02)
    assert len(lengths) > 5
    assert answers(tab)[0].startswith("Claisaid Tools\n139 Traind Road\n")


def test_an_example_and_a_question_are_one_click_each(tab):
    tab.get_by_role("button", name="An invoice, 3 pages").click()
    image_of(tab).wait_for()
    tab.get_by_role("button", name="What is the total?").click()
    wait_for_note(tab, "Confidence")
    assert answers(tab) == ["320.76"]


def test_pages_of_a_pdf_are_chosen_and_shown(tab):
    upload(tab, INVOICE)
    image_of(tab).wait_for()
    costs = tab.locator("#costs")
    assert "Page 1 of 3" in costs.inner_text() and "The pages 1-3 together: 1,542 tokens" in costs.inner_text()
    tab.locator("#index input").click()
    tab.get_by_role("option", name="3").click()
    costs.get_by_text("Page 3 of 3").wait_for()
    first = image_of(tab).get_attribute("src")
    tab.locator("#view").get_by_text("Page", exact=True).click()
    tab.wait_for_function("src => document.querySelector('#page img').src != src", arg=first)
    tab.locator("#pages input, #pages textarea").first.fill("2")
    tab.locator("#pages input, #pages textarea").first.press("Enter")
    costs.get_by_text("Page 2 of 3").wait_for()
    assert "together" not in costs.inner_text()
    tab.locator("#pages input, #pages textarea").first.fill("4")
    tab.locator("#pages input, #pages textarea").first.press("Enter")
    tab.locator("#problem").get_by_text("invoice.pdf has the pages 1 to 3, so there is no page 4.").wait_for()


def test_an_encrypted_pdf_asks_for_its_password(tab, tmp_path):
    with pikepdf.open(INVOICE) as pdf:
        pdf.save(tmp_path / "secret.pdf", encryption=pikepdf.Encryption(owner="owner", user="open"))
    upload(tab, tmp_path / "secret.pdf")
    tab.locator("#problem").get_by_text("it is encrypted, and needs a password").wait_for()
    password = tab.locator("#password input")
    for text in ("shut", "open"):
        password.fill(text)
        password.press("Enter")
        tab.locator("#problem").get_by_text("the password is wrong").wait_for(
            state="visible" if text == "shut" else "hidden"
        )
    image_of(tab).wait_for()


def test_a_broken_file_is_an_error_in_words_and_the_next_file_works(tab, tmp_path):
    (tmp_path / "broken <b>.png").write_bytes(RECEIPT.read_bytes()[:3000])
    upload(tab, tmp_path / "broken <b>.png")
    words = tab.locator("#problem [role=alert]")
    words.wait_for()
    assert "cannot be used" in words.inner_text() and "gradio" not in words.inner_text()
    assert not image_of(tab).is_visible()
    ask(tab, "What is the total?")
    wait_for_note(tab, "Choose a document first")
    tab.get_by_role("button", name="A receipt").click()
    image_of(tab).wait_for()
    assert not words.is_visible()


def test_fields_come_as_a_table_and_as_json(tab, tmp_path):
    tab.get_by_role("button", name="An invoice, 3 pages").click()
    image_of(tab).wait_for()
    tab.get_by_role("tab", name="Fields").click()
    tab.locator("#wanted textarea").fill("date, total, discount")
    tab.locator("#read").click()
    with tab.expect_download() as download:
        tab.locator("#download").click()
    cells = [cell.strip() for cell in tab.locator("#fields [role=gridcell]").all_inner_texts()]
    rows = [cells[start : start + 4] for start in range(0, len(cells), 4)]
    assert [row[:2] for row in rows] == [["date", "14.03.2026"], ["total", "320.76"], ["discount", "not found"]]
    assert [row[3] for row in rows] == ["1", "3", ""] and all(row[2].endswith(" %") for row in rows)
    assert download.value.suggested_filename == "invoice.fields.json"
    download.value.save_as(tmp_path / "fields.json")
    found = json.loads((tmp_path / "fields.json").read_text(encoding="utf-8"))
    assert found["file"] == "invoice.pdf" and found["fields"] == {
        "date": "14.03.2026",
        "total": "320.76",
        "discount": None,
    }
    assert found["values"]["total"]["page"] == 3 and 0.8 < found["values"]["total"]["confidence"] <= 1


def test_boxes_are_shown_and_a_wrong_schema_is_named(tab):
    tab.get_by_role("button", name="A receipt").click()
    image_of(tab).wait_for()
    tab.get_by_role("tab", name="Fields").click()
    tab.locator("#wanted textarea").fill('{"type": "object"')
    tab.locator("#read").click()
    wait_for_note(tab, "begin like JSON, but are none", "#field-note")
    tab.locator("#wanted textarea").fill(BOX_SCHEMA)
    tab.locator("#read").click()
    wait_for_note(tab, "The boxes are drawn over the page", "#field-note")
    assert tab.locator("#view").get_by_label("Boxes").is_checked()


def test_stop_ends_an_answer_and_the_conversation_goes_on(tab):
    tab.get_by_role("button", name="A receipt").click()
    image_of(tab).wait_for()
    ask(tab, LONG)
    tab.wait_for_function("document.querySelector('#chat .bot.message')?.innerText.length > 5")
    tab.locator("#stop").click()
    wait_for_note(tab, "Stopped")
    (stopped,) = answers(tab)
    time.sleep(1)
    assert answers(tab) == [stopped] and "Cheque" not in stopped
    ask(tab, "What is the total?")
    wait_for_note(tab, "Confidence")
    assert answers(tab)[-1] == "72.13"


def test_a_second_tab_waits_for_its_turn_and_keeps_its_own_conversation(chromium, url):
    with tab_of(chromium, url) as first, tab_of(chromium, url) as second:
        first.get_by_role("button", name="A receipt").click()
        second.get_by_role("button", name="An invoice, 3 pages").click()
        for tab in (first, second):
            image_of(tab).wait_for()
        ask(first, LONG)
        first.wait_for_function("document.querySelector('#chat .bot.message')?.innerText.length > 5")
        ask(second, "What is the total?")
        wait_for_note(second, "Waiting")
        assert not answers(second) and first.locator("#stop").is_visible()
        wait_for_note(second, "Confidence")
        assert first.locator("#note").get_by_text("Confidence").is_visible()
        assert answers(second) == ["320.76"]
        assert len(answers(first)) == 1 and answers(first)[0].endswith("visit")


def test_closing_a_tab_ends_its_answer_and_the_next_one_begins(chromium, url, steps, tab):
    tab.get_by_role("button", name="A receipt").click()
    image_of(tab).wait_for()
    num_steps = steps.stat().st_size
    with tab_of(chromium, url) as closed:
        closed.get_by_role("button", name="A receipt").click()
        image_of(closed).wait_for()
        ask(closed, LONG)
        closed.wait_for_function("document.querySelector('#chat .bot.message')?.innerText.length > 5")
        ask(tab, "What is the total?")
        wait_for_note(tab, "Waiting")
    wait_for_note(tab, "Confidence")
    assert answers(tab) == ["72.13"]
    assert steps.stat().st_size - num_steps < 100  # the long answer alone takes more


def test_nothing_is_cut_off_in_a_narrow_window(chromium, url):
    with tab_of(chromium, url, viewport=NARROW, has_touch=True) as tab:
        tab.get_by_role("button", name="An invoice, 3 pages").click()
        image_of(tab).wait_for()
        ask(tab, "Who is the seller of all these things, and " * 5 + "what is the total?")
        wait_for_note(tab, "Confidence")
        assert_nothing_is_cut_off(tab)
        tab.get_by_role("tab", name="Fields").click()
        tab.locator("#read").click()
        tab.locator("#download").wait_for()
        assert_nothing_is_cut_off(tab)


def assert_nothing_is_cut_off(tab) -> None:
    """Check that no element that people see reaches beyond the window, and that nothing scrolls sideways."""
    beyond = tab.evaluate(
        """() => [...document.querySelectorAll('main button, main input, main textarea, main img, main p, main th, main [role=gridcell]')]
            .filter(element => element.checkVisibility())
            .filter(element => { const box = element.getBoundingClientRect();
                                 return box.width > 1 && (box.right > innerWidth + 1 || box.left < -1); })
            .map(element => element.outerHTML.slice(0, 100))"""
    )
    assert beyond == []
    assert tab.evaluate("document.documentElement.scrollWidth") == NARROW["width"]


def test_files_of_the_machine_are_not_served(url):
    for name in ("README.md", "nano/config.json", "../etc/passwd"):
        path = (ROOT / name).resolve()
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(f"{url}/gradio_api/file={path}")
        assert error.value.code in (403, 404)


def test_a_space_runs_from_its_own_folder(chromium, tmp_path):
    folder = tmp_path / "space"
    space.write_space(folder, ROOT / "nano")
    with running([str(folder / "app.py")], tmp_path) as address, tab_of(chromium, address) as tab:
        tab.get_by_role("button", name="A receipt").click()
        image_of(tab).wait_for()
        tab.get_by_role("button", name="What is the total?").click()
        wait_for_note(tab, "Confidence")
        assert answers(tab) == ["72.13"]
