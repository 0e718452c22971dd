"""Reading PDFs: pages, passwords, text layers, damage; the same text as from images of the pages."""

from pathlib import Path
from typing import Any

import pytest
from nemotron_vl.image_processing import render_page
from nemotron_vl.pictures import open_document
from nemotron_vl.reading.engines import InProcess, Transformers
from nemotron_vl.reading.pages import Task, page_ranges
from nemotron_vl.reading.run import read

from tests.test_reading_run import Pixel
from tools import ROOT
from tools.chat import load

pytest.importorskip("pypdfium2", reason="pip install pypdfium2")
fpdf = pytest.importorskip("fpdf", reason="pip install fpdf2")

INVOICE = ROOT / "examples" / "invoice.pdf"
LONG = "The goods were delivered to the address above on the day of this invoice."


def write(file: Path, *texts: str, password: str | None = None) -> Path:
    """A PDF with a page for each text."""
    pdf = fpdf.FPDF()
    pdf.set_font("Helvetica")
    for text in texts:
        pdf.add_page()
        pdf.text(20, 20, text)
    if password:
        pdf.set_encryption("owner", password)
    pdf.output(file)
    return file


def statuses(*inputs: Path, **task: Any) -> list[tuple[int | None, str]]:
    return [(row["page"], row["status"]) for row in read(inputs, InProcess(Pixel()), **task)]


def test_a_pdf_gives_the_text_of_images_of_its_pages(tmp_path):
    nano = Transformers(*load(ROOT / "nano"), "nano")
    with open_document(INVOICE) as document:
        for index in range(len(document)):
            render_page(document[index], nano.tiling).save(tmp_path / f"{index}.png")
    pages, images = read(INVOICE, InProcess(nano)), read(tmp_path, InProcess(nano))
    assert [row["answer"] for row in pages] == [row["answer"] for row in images]
    assert [row["page"] for row in pages] == [1, 2, 3] and pages[2]["answer"].splitlines()[2].endswith(" 320.76")


def test_pages_are_chosen_in_every_document_and_those_that_one_lacks_are_left_out(tmp_path):
    short, long = write(tmp_path / "a.pdf", "a"), write(tmp_path / "b.pdf", *"abcde")
    assert statuses(short, long, pages="1,4-") == [(1, "read"), (1, "read"), (4, "read"), (5, "read")]
    assert statuses(short, long, pages="5,2,2-3") == [(None, "failed"), (2, "read"), (3, "read"), (5, "read")]
    assert "none of the pages 1 to 1 of a.pdf" in read(short, InProcess(Pixel()), pages="2")[0]["error"]


@pytest.mark.parametrize("pages", ["", "0", "1-3-5", "3-1", "a", "1,,2", "-2", "1;2", "0-3"])
def test_pages_in_another_form_are_refused(pages):
    with pytest.raises(ValueError, match="pages must look like '1-3,7'"):
        Task(pages=pages)


def test_a_range_of_pages_costs_nothing_however_long_it_is():
    assert page_ranges("1-999999999") == [(1, 999999999)]


def test_a_password_opens_what_it_fits_and_hinders_nothing_else(tmp_path):
    locked, plain = write(tmp_path / "a.pdf", "a", "b", password="secret"), write(tmp_path / "b.pdf", "a")
    image = tmp_path / "c.png"
    image.write_bytes((ROOT / "examples" / "receipt.png").read_bytes())
    assert statuses(tmp_path, password="secret") == [(1, "read"), (2, "read"), (1, "read"), (1, "read")]
    for password in (None, "wrong"):
        rows = read([locked, plain, image], InProcess(Pixel()), password=password)
        assert [row["status"] for row in rows] == ["failed", "read", "read"] and "password" in rows[0]["error"]


def test_a_text_layer_answers_only_where_it_is_asked_for_and_where_it_is_a_text(tmp_path):
    file = write(tmp_path / "a.pdf", LONG, "Page 2", LONG)
    assert statuses(file) == [(1, "read"), (2, "read"), (3, "read")]
    backend = Pixel()
    rows = read(file, InProcess(backend), text_layer=True)
    assert [row["status"] for row in rows] == ["text layer", "read", "text layer"] and backend.calls == [1]
    assert rows[0]["answer"] == LONG and (rows[0]["prompt"], rows[0]["tokens"], rows[0]["tiles"]) == (None, 0, 0)
    image = tmp_path / "b.png"
    image.write_bytes((ROOT / "examples" / "receipt.png").read_bytes())
    assert statuses(image, text_layer=True) == [(1, "read")]


def test_damage_fails_by_itself(tmp_path):
    whole = write(tmp_path / "whole.pdf", "a", "b").read_bytes()
    for name, content in {
        "empty": b"",
        "text": b"no pdf",
        "cut": whole[: len(whole) // 3],
        "head": b"%PDF-1.4",
    }.items():
        (tmp_path / f"{name}.pdf").write_bytes(content)
    rows = read(tmp_path, InProcess(Pixel()))
    found = {Path(row["file"]).stem: row for row in rows}
    assert {name for name, row in found.items() if row["status"] == "read"} >= {"whole"}
    assert all(found[name]["status"] == "failed" and found[name]["error"] for name in ("empty", "text", "head"))


def test_the_number_of_tiles_that_fits_leaves_room_for_the_answer(tmp_path):
    class Small(Pixel):
        window = 4096

    file = write(tmp_path / "a.pdf", "a")
    tiles = {number: read(file, InProcess(Small()), max_num_tiles=number)[0]["tiles"] for number in (None, "fit", 2)}
    assert tiles[None] == 13 and tiles[2] == 3
    assert tiles[2] < tiles["fit"] * 256 <= 4096 // 2
    with pytest.raises(ValueError, match="max_num_tiles must be a number or 'fit', got 'most'"):
        Task(max_num_tiles="most")
