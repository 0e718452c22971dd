"""Documents as input: PDFs and image files with several frames, and how many tiles their pages get."""

import base64
import builtins
import gc
import io
import threading
import tracemalloc
from dataclasses import replace

import fpdf
import numpy as np
import pikepdf
import pytest
import torch
from nemotron_vl.image_processing import (
    V1_TILING,
    V2_TILING,
    NemotronVLImageProcessor,
    count_tiles,
    page_tiling,
    plan_pages,
    render_page,
    select_tile_grid,
)
from nemotron_vl.pictures import Document, load_image, open_document
from PIL import Image
from transformers import AutoModel, AutoProcessor

from tests.conftest import ROOT

A4 = (1754, 1240)  # height and width at 150 dpi


def make_pdf(num_pages: int = 3, size: tuple[float, float] = (210, 297)) -> bytes:
    """A PDF whose page number N says "Page N"; the size in millimetres."""
    pdf = fpdf.FPDF(format=size)
    pdf.set_font("helvetica", size=16)
    for number in range(1, num_pages + 1):
        pdf.add_page()
        pdf.cell(text=f"Page {number}")
    return bytes(pdf.output())


def changed(data: bytes, change, **save_options) -> bytes:
    """A PDF after `change` has been applied to its pikepdf form."""
    out = io.BytesIO()
    with pikepdf.open(io.BytesIO(data)) as pdf:
        change(pdf)
        pdf.save(out, **save_options)
    return out.getvalue()


def marked_pdf(**keys) -> bytes:
    """A page of 200 x 100 points, red but for a blue square at its top left; `keys` are set on the page."""
    pdf = pikepdf.new()
    pdf.add_blank_page(page_size=(200, 100))
    page = pdf.pages[0]
    page.Contents = pdf.make_stream(b"1 0 0 rg 0 0 200 100 re f 0 0 1 rg 0 50 50 50 re f")
    for name, value in keys.items():
        page[f"/{name}"] = value
    out = io.BytesIO()
    pdf.save(out)
    return out.getvalue()


def colour(image: Image.Image, x: float, y: float) -> str:
    red, green, blue = image.getpixel((int(x * image.width), int(y * image.height)))
    return "blue" if blue > 200 > red else "red" if red > 200 > blue else "other"


# --- Opening ---------------------------------------------------------------------------------------------------------


def test_a_pdf_opens_from_everything_that_names_or_holds_it(tmp_path):
    data = make_pdf()
    path = tmp_path / "ein Bericht ä.pdf"
    path.write_bytes(data)
    sources = [path, str(path), path.as_uri(), data, bytearray(data), io.BytesIO(data), path.open("rb")]
    sources += [f"data:application/pdf;base64,{base64.b64encode(data).decode()}", b"\n%junk\n" + data]
    for source in sources:
        with open_document(source) as document:
            assert len(document) == document.num_pages == 3
            assert [page.text for page in document] == ["Page 1", "Page 2", "Page 3"]
    assert open_document(path).name == "ein Bericht ä.pdf" and open_document(data).name == "document"
    assert open_document(open_document(data), pages="2")[0].text == "Page 2"


@pytest.mark.parametrize(
    ("pages", "numbers"),
    [("1-2", (1, 2)), ("3,1", (3, 1)), (" 2 - ", (2, 3)), ([3, 3], (3, 3)), (2, (2,)), (np.array([1, 3]), (1, 3))],
)
def test_pages_are_chosen_by_numbers_and_spans(pages, numbers):
    document = open_document(make_pdf(), pages=pages)
    assert document.page_numbers == numbers
    assert [page.text for page in document] == [f"Page {number}" for number in numbers]
    assert document[-1].number == numbers[-1] and [page.number for page in document[:1]] == [numbers[0]]


@pytest.mark.parametrize("pages", ["0", "4", "2-9", "3-2", "-1", "", "one", "1;2", [], [0], "1-2-3", "9" * 30])
def test_pages_that_a_document_lacks_are_refused(pages):
    with pytest.raises(ValueError, match="page"):
        open_document(make_pdf(), pages=pages)


def test_pages_of_another_kind_are_refused():
    for pages in ([1.5], [True], ["1"]):
        with pytest.raises(TypeError, match="whole numbers"):
            open_document(make_pdf(), pages=pages)


def test_an_encrypted_pdf_needs_its_password():
    def encrypted(**passwords):
        return changed(make_pdf(), lambda pdf: None, encryption=pikepdf.Encryption(**passwords))

    data = encrypted(owner="chief", user="öffne")
    for password, problem in ((None, "needs a password"), ("wrong", "password is wrong")):
        with pytest.raises(ValueError, match=problem):
            open_document(data, password=password)
    assert open_document(data, password="öffne")[0].text == "Page 1"
    with pytest.raises(TypeError, match="password must be a text"):
        open_document(data, password=5)
    assert open_document(encrypted(owner="chief", user=""))[0].text == "Page 1"  # many are "encrypted" so


def test_damaged_and_empty_files_are_refused_with_one_error(tmp_path):
    data = make_pdf()
    empty = pikepdf.new()
    out = io.BytesIO()
    empty.save(out)
    (tmp_path / "folder.pdf").mkdir()
    for source, problem in (
        (b"", "it is empty"),
        (data[:60], "damaged"),
        (b"%PDF-1.7\n" + bytes(500), "damaged"),
        (out.getvalue(), "damaged|no pages"),
        (b"no document", "cannot identify image file"),
        (tmp_path / "nosuch.pdf", "there is no such file"),
        (tmp_path / "folder.pdf", "it is a directory"),
        ("https://example.org/a.pdf", "not fetched from the network"),
        (io.StringIO("text"), "text mode"),
    ):
        with pytest.raises(ValueError, match=problem):
            open_document(source)
    for source in (None, 5, np.zeros((4, 4))):
        with pytest.raises(TypeError, match="A document is a path"):
            open_document(source)


def test_a_half_of_a_pdf_that_can_be_repaired_is_read_or_refused_and_never_wrong():
    data = make_pdf(9)
    for length in range(100, len(data), len(data) // 40):
        try:
            texts = [page.text for page in open_document(data[:length])]
        except ValueError:
            continue
        assert all(text in {f"Page {number}" for number in range(1, 10)} | {""} for text in texts)


def test_pdfs_without_pypdfium2_name_the_installation(monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "pypdfium2":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install pypdfium2"):
        open_document(make_pdf(1))


def test_a_file_object_is_read_from_its_start_and_stays_where_it_was():
    file = io.BytesIO(make_pdf())
    file.seek(7)
    assert len(open_document(file)) == 3 and file.tell() == 7


def test_a_closed_document_says_so_and_pdfs_are_closed_when_they_go():
    document = open_document(make_pdf(1))
    document.close()
    document.close()
    with pytest.raises(ValueError, match="is closed"):
        document[0].render()
    page = open_document(make_pdf(1))[0]  # a page keeps its document
    gc.collect()
    assert page.text == "Page 1"


# --- Drawing ---------------------------------------------------------------------------------------------------------


def test_rotation_and_crop_box_are_those_that_a_reader_sees():
    plain = open_document(marked_pdf())[0]
    assert plain.size == (200, 100) and colour(plain.render(), 0.1, 0.2) == "blue"
    turned = open_document(marked_pdf(Rotate=90))[0]
    assert turned.size == (100, 200)
    image = turned.render()
    assert image.width < image.height and colour(image, 0.9, 0.1) == "blue" and colour(image, 0.1, 0.1) == "red"
    cropped = open_document(marked_pdf(CropBox=[100, 0, 200, 100]))[0]
    assert cropped.size == (100, 100) and colour(cropped.render(), 0.1, 0.2) == "red"


def test_annotations_and_form_values_are_drawn():
    pdf = fpdf.FPDF()
    pdf.add_page()
    pdf.ink_annotation([(20, 20), (150, 20), (150, 200)], title="me", border_width=9, color=(1, 0, 0))
    page = open_document(bytes(pdf.output()))[0]
    assert min(page.render().getchannel("G").get_flattened_data()) < 100

    form = pikepdf.new()
    form.add_blank_page(page_size=(200, 100))
    font = pikepdf.Dictionary(Type=pikepdf.Name.Font, Subtype=pikepdf.Name.Type1, BaseFont=pikepdf.Name.Helvetica)
    field = pikepdf.Dictionary(
        Type=pikepdf.Name.Annot,
        Subtype=pikepdf.Name.Widget,
        FT=pikepdf.Name.Tx,
        T="total",
        V="MMMMMMM",
        F=4,
        Rect=[10, 10, 190, 90],
        DA="/F 40 Tf 0 0 0 rg",
    )
    form.pages[0].Annots = form.make_indirect([form.make_indirect(field)])
    resources = pikepdf.Dictionary(Font=pikepdf.Dictionary(F=form.make_indirect(font)))
    form.Root.AcroForm = pikepdf.Dictionary(Fields=form.pages[0].Annots, NeedAppearances=True, DR=resources)
    out = io.BytesIO()
    form.save(out)
    assert min(open_document(out.getvalue())[0].render().convert("L").get_flattened_data()) < 100


def test_an_absurd_page_costs_no_more_than_its_tiles():
    def resize(box):
        return lambda pdf: setattr(pdf.pages[0], "MediaBox", box)

    for box in ([0, 0, 1_000_000, 1_000_000], [0, 0, 1_000_000, 10], [0, 0, 1, 1], [0, 0, 14400, 3]):
        page = open_document(changed(make_pdf(1), resize(box)))[0]
        (height, width), tiling = page_tiling(page)
        assert height * width <= 12 * 512 * 512
        image = render_page(page)
        assert (image.height, image.width) == (height, width)
        assert count_tiles(*page.natural_size) == count_tiles(height, width, tiling)


def test_a_page_without_size_is_refused_alone():
    data = changed(make_pdf(2), lambda pdf: setattr(pdf.pages[0], "MediaBox", [0, 0, 0, 700]))
    document = open_document(data)
    try:
        image = document[0].render(64, 64)
    except ValueError as error:
        assert "Page 1 of document cannot be used" in str(error)
    else:
        assert image.size == (64, 64)  # PDFium takes Letter in its place
    assert document[1].text == "Page 2"


def test_a_crop_box_outside_of_its_page_is_refused_alone():
    data = changed(make_pdf(2), lambda pdf: setattr(pdf.pages[0], "CropBox", [9000, 9000, 9100, 9100]))
    with pytest.raises(ValueError, match="Page 1 of document cannot be used: its size is 0 x 0 points"):
        open_document(data)[0].render()
    assert open_document(data)[1].text == "Page 2"


def test_threads_may_draw_at_the_same_time():
    document, found = open_document(make_pdf(8)), {}
    expected = {page.number: np.asarray(page.render()) for page in document}

    def draw(pages):
        for page in pages:
            found[page.number, threading.get_ident()] = np.asarray(page.render())

    threads = [threading.Thread(target=draw, args=(document[start:],)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 + 7 + 6 + 5
    assert all((image == expected[number]).all() for (number, _), image in found.items())


def test_a_long_document_is_read_page_by_page(tmp_path):
    """Opening is cheap, and memory does not grow from page to page."""
    path = tmp_path / "long.pdf"
    pdf = pikepdf.new()
    for _ in range(5000):
        pdf.add_blank_page(page_size=(200, 200))
    pdf.save(path)
    document = open_document(path)
    assert len(document) == 5000
    tracemalloc.start()
    try:
        for page in document[:50]:
            page.render()
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        for page in document[4800:]:
            page.render()
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] - before < 500_000
    finally:
        tracemalloc.stop()


# --- Image files with several frames -----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["tiff", "gif", "webp"])
def test_frames_of_an_image_file_are_its_pages(tmp_path, suffix):
    frames = [Image.new("RGB", (40, 30), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    path = tmp_path / f"scan.{suffix}"
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    document = open_document(path)
    assert len(document) == 3 and not document[0].is_scalable and document[0].text is None
    for page, frame in [*zip(document, frames, strict=True), (document[0], frames[0])]:
        assert page.natural_size == (30, 40)
        assert page.render().getpixel((5, 5)) == frame.getpixel((0, 0))
    with pytest.raises(ValueError, match="pixels of its own"):
        document[0].render(10, 10)
    # As an image, the file is its first frame, as published.
    assert load_image(path).getpixel((5, 5)) == (255, 0, 0)


def test_frames_that_are_no_pages_are_left_out():
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "MPO", save_all=True, append_images=[Image.new("RGB", (16, 16))])
    assert Image.open(buffer).n_frames == 2 and len(open_document(buffer.getvalue())) == 1


@pytest.mark.parametrize("tags", [{262: 0}, {262: 1}, {274: 6}, {262: 0, 274: 8}])
def test_a_page_of_a_tiff_is_what_the_file_is_as_an_image(tags):
    """Its tags say which end of its grey is white, and how it is turned."""
    deep = Image.fromarray((np.arange(32 * 128, dtype=np.uint16) * 16).reshape(32, 128))
    buffer = io.BytesIO()
    deep.save(buffer, "TIFF", save_all=True, append_images=[deep], tiffinfo=tags)
    for page in open_document(buffer.getvalue()):
        expected = np.asarray(load_image(buffer.getvalue()))
        assert page.natural_size == expected.shape[:2]
        assert np.array_equal(page.render(), expected)


@pytest.mark.parametrize("suffix", ["tiff", "webp", "png", "jpeg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pages_stand_upright_as_images_do(suffix, orientation):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 48, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    frames = {} if suffix == "jpeg" else {"save_all": True, "append_images": [image.rotate(180)]}
    buffer = io.BytesIO()
    image.save(buffer, suffix, exif=exif, **frames)
    document, expected = open_document(buffer.getvalue()), np.asarray(load_image(buffer.getvalue()))
    assert len(document) == 1 + bool(frames)
    for page in (document[0], document[0], document[-1], document[0]):  # there and back
        assert page.natural_size == page.render().size[::-1] == expected.shape[:2]
    assert np.array_equal(document[0].render(), expected)


def test_a_callers_image_stays_at_its_frame():
    buffer = io.BytesIO()
    Image.new("L", (8, 8), 10).save(buffer, "TIFF", save_all=True, append_images=[Image.new("L", (8, 8), 200)])
    image = Image.open(buffer)
    image.seek(1)
    document = open_document(image)
    assert [page.render().getpixel((0, 0))[0] for page in document] == [10, 200]
    assert image.tell() == 1
    image.putpixel((0, 0), 77)
    open_document(image)[0].render()
    assert image.getpixel((0, 0)) == 77
    assert len(open_document(Image.new("RGB", (8, 8)))) == 1


def test_an_upright_frame_has_the_size_that_is_counted():
    image, buffer = Image.new("RGB", (600, 300)), io.BytesIO()
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(buffer, "JPEG", exif=exif)
    page = open_document(buffer.getvalue())[0]
    assert page.natural_size == (600, 300) == page.render().size[::-1]


# --- Tiles -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiling", [V1_TILING, V2_TILING, replace(V1_TILING, upscale=1, max_num_tiles=2)])
def test_every_page_gets_the_tiles_of_its_size_and_is_drawn_as_large(tiling):
    class Sized:
        is_scalable = True

        def __init__(self, height, width):
            self.natural_size = height, width

    for height in range(50, 3000, 330):
        for width in range(50, 3000, 330):
            drawn, own = page_tiling(Sized(height, width), tiling)
            grid = select_tile_grid(height, width, tiling)
            assert select_tile_grid(*drawn, own) == grid
            assert drawn == (grid[0] * 512, grid[1] * 512)


def test_tiles_of_a_document_are_those_of_its_page_images():
    processor = NemotronVLImageProcessor()
    document = open_document(make_pdf(2))
    by_document = processor(document)
    images = [render_page(page) for page in document]
    assert images[0].size == (1536, 2048)  # one to one
    by_images = processor(images)
    assert by_document["num_patches"] == by_images["num_patches"] == [13, 13]
    assert torch.equal(by_document["pixel_values"], by_images["pixel_values"])
    mixed = processor([images[0], open_document(make_pdf(2)), document[1]])
    assert mixed["num_patches"] == [13] * 4
    first, second = by_images["pixel_values"].split(13)
    assert torch.equal(mixed["pixel_values"], torch.cat([first, first, second, second]))


@pytest.mark.parametrize(("tiles", "pages"), [(12, 4), (9, 5), (6, 8), (4, 11), (2, 19), (1, 59)])
def test_so_many_a4_pages_fit_the_context_of_the_8b(tiles, pages):
    tiling = replace(V1_TILING, max_num_tiles=tiles)
    plan = plan_pages([A4] * pages, tiling)
    assert plan.fits and plan.max_num_tiles == tiles and len(plan.tiles) == pages
    more = plan_pages([A4] * (pages + 1), tiling)
    assert not (more.fits and more.max_num_tiles == tiles)


def test_the_12b_holds_39_full_pages():
    assert plan_pages([A4] * 39, context_length=131_072).max_num_tiles == 12
    assert plan_pages([A4] * 40, context_length=131_072).max_num_tiles < 12


def test_a_plan_counts_what_it_says():
    plan = plan_pages([A4, (300, 400), (100, 3000)], prompt_tokens=9000)
    assert plan.tiles == [
        count_tiles(*size, max_num_tiles=plan.max_num_tiles) for size in (A4, (300, 400), (100, 3000))
    ]
    assert plan.num_tokens == sum(256 * tiles + 2 for tiles in plan.tiles) <= 16_384 - 1024 - 9000
    assert not plan_pages([A4] * 100).fits


# --- Messages, processor, chat -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nano():
    where = {"subfolder": "nano", "trust_remote_code": True}
    return AutoModel.from_pretrained(ROOT, **where).eval(), AutoProcessor.from_pretrained(ROOT, **where)


def receipt_pdf(copies: int = 2) -> bytes:
    """The bundled receipt, once on each page."""
    pdf = fpdf.FPDF(unit="pt", format=(480, 576))
    for _ in range(copies):
        pdf.add_page()
        pdf.image(ROOT / "examples" / "receipt.png", 0, 0, 480, 576)
    return bytes(pdf.output())


def document_part(data: bytes, **keys) -> dict:
    return {"type": "document", "document": data, **keys}


def encode(processor, *parts, **options):
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "What is the total?"}]}]
    return processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True, **options
    )


def test_a_document_in_a_message_is_its_pages_given_one_by_one(nano):
    _, processor = nano
    data = make_pdf()
    pages = [render_page(page, processor.image_processor.tiling) for page in open_document(data, pages="1,3")]
    expected = encode(processor, *({"type": "image", "image": page} for page in pages))
    file = {"file_data": f"data:application/pdf;base64,{base64.b64encode(data).decode()}", "filename": "a.pdf"}
    for part in (document_part(data, pages="1,3"), {"type": "file", "file": file | {"pages": [1, 3]}}):
        found = encode(processor, part)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    text = processor.apply_chat_template([{"role": "user", "content": [document_part(data)]}])
    assert text.count("<image>") == 3
    by_call = processor(text=text, images=open_document(data), return_tensors="pt")
    assert by_call["num_patches"].tolist() == processor(text=text, images=[*open_document(data)])["num_patches"]


def test_documents_are_given_with_a_text_or_with_several(nano):
    _, processor = nano
    first, second = open_document(make_pdf(1)), open_document(make_pdf(2))
    one = processor(text="<image>" * 3, images=[first, second])
    assert one["num_patches"] == [2, 2, 2]
    for images in ([first, second], [[first], [second]], [[first], second]):
        batch = processor(text=["<image>", "<image>" * 2], images=images, padding=True)
        assert torch.equal(batch["pixel_values"], one["pixel_values"])
    with pytest.raises(ValueError, match="one per image"):
        processor(text=["<image>" * 2, "<image>"], images=[[first], [second]])


def test_documents_of_another_copy_of_the_code_are_taken(nano):
    """transformers runs a copy of pictures.py, whose Document is another class."""
    _, processor = nano
    document = open_document(make_pdf(2))
    own = processor.open_document(make_pdf(2))
    assert type(own) is not type(document)
    for images in (document, [document], own, list(document)):
        assert processor.image_processor(images)["num_patches"] == [2, 2]
    assert document[0].document._source._lock is own[0].document._source._lock  # one PDFium, one lock


def test_file_data_never_names_a_file_of_this_machine(nano, tmp_path):
    path = tmp_path / "private.pdf"
    path.write_bytes(make_pdf())
    for name in (str(path), path.as_uri()):
        with pytest.raises(ValueError, match="file_data must be a URL like 'data:"):
            encode(nano[1], {"type": "file", "file": {"file_data": name}})


def test_documents_between_texts_keep_their_place(nano):
    _, processor = nano
    parts = [{"type": "text", "text": "First: "}, document_part(make_pdf(2)), {"type": "text", "text": "\nThen."}]
    flat = [parts[0], *[{"type": "image", "image": page} for page in open_document(make_pdf(2))], parts[2]]
    assert torch.equal(encode(processor, *parts)["input_ids"], encode(processor, *flat)["input_ids"])


@pytest.mark.parametrize(
    "part",
    [
        {"type": "document"},
        {"type": "file", "file": {"file_id": "file-1"}},
        {"type": "file"},
        {"type": "file", "file": 3},
    ],
)
def test_a_part_without_its_document_is_refused(nano, part):
    with pytest.raises(ValueError, match="needs .* with the file"):
        encode(nano[1], part)


def test_an_error_of_a_page_names_document_and_page(nano):
    with pytest.raises(ValueError, match="document has the pages 1 to 3, so there is no page 7"):
        encode(nano[1], document_part(make_pdf(), pages="7"))


def test_pages_that_do_not_fit_name_the_number_of_tiles_that_does(nano):
    model, processor = nano
    window = processor.tokenizer.model_max_length
    assert window == model.config.max_sequence_length
    tokens = 2 * processor.tokens_per_tile + 2  # an A4 page in nano's two tiles
    many = make_pdf(1 + window // tokens)
    fitted = encode(processor, document_part(many), max_num_tiles="fit")
    assert fitted["input_ids"].shape[1] <= window - 1024
    assert set(fitted["num_patches"].tolist()) == {1}
    with pytest.raises(ValueError, match="Ask about fewer"):
        encode(processor, document_part(make_pdf(60)), max_num_tiles="fit")
    few = encode(processor, document_part(make_pdf(1)), max_num_tiles="fit")
    assert torch.equal(few["input_ids"], encode(processor, document_part(make_pdf(1)))["input_ids"])
    with pytest.raises(ValueError, match=r"fit with max_num_tiles=1; max_num_tiles='fit'"):
        model.chat(processor, question="Total?", document=many, generation_config={"max_new_tokens": 4})
    with pytest.raises(ValueError, match="needs the prompts"):
        processor(images=open_document(many), max_num_tiles="fit")


def test_pages_that_do_not_fit_are_refused_before_they_are_drawn(nano, monkeypatch):
    _, processor = nano
    drawn = []
    data = make_pdf(9)
    document = open_document(data)
    monkeypatch.setattr(type(document._source), "image", lambda *args: drawn.append(args))
    text = "<image>" * 9
    with pytest.raises(
        ValueError, match=r"9 pages .* at most 2 tiles .* They fit with max_num_tiles=1; .*'fit' takes"
    ):
        processor(text=text, images=document)
    with pytest.raises(ValueError, match=r"180 pages .* one tile each.* Ask about fewer .* so small, \d+ fit"):
        processor(text=text * 20, images=[document] * 20)
    assert not drawn


def test_the_answer_and_the_context_of_a_plan_are_the_callers(nano):
    _, processor = nano
    document, text = open_document(make_pdf(7)), "<image>" * 7
    assert set(processor(text=text, images=document, max_num_tiles="fit")["num_patches"]) == {1}
    for options in ({"answer_tokens": 8}, {"context_length": 16_384}):
        assert set(processor(text=text, images=document, **options)["num_patches"]) == {2}
    with pytest.raises(ValueError, match="They fit with max_num_tiles=1"):
        processor(text=text, images=document, answer_tokens=2000)


def test_fit_counts_with_the_options_of_the_call(nano):
    """Without the doubling and with a thumbnail, another number of tiles fits."""
    _, processor = nano
    document, text = open_document(make_pdf(5)), "<image>" * 5
    for options in ({"use_thumbnail": True}, {"upscale": 2}):
        fitted = processor(text=text, images=document, max_num_tiles="fit", context_length=3600, **options)
        assert len(fitted["input_ids"][0]) <= 3600 - 1024
        largest = max(
            number
            for number in (1, 2)
            if sum(processor.image_processor(document, max_num_tiles=number, **options)["num_patches"]) * 256 + 12
            <= 3600 - 1024
        )
        assert (
            fitted["num_patches"]
            == processor.image_processor(document, max_num_tiles=largest, **options)["num_patches"]
        )


def test_fit_leaves_no_tile_that_the_context_has_room_for(nano):
    """Each context from one to two tiles a page, to the token."""
    _, processor = nano
    document, text = open_document(make_pdf(3)), "<image>\n" * 3 + "What?"
    needed = {
        number: processor(text=text, images=document, max_num_tiles=number, return_tensors="np")["input_ids"].size
        for number in (1, 2)
    }
    for spare, tiles in ((-1, 1), (0, 2)):
        fitted = processor(
            text=text, images=document, max_num_tiles="fit", context_length=needed[2] + 50 + spare, answer_tokens=50
        )
        assert fitted["num_patches"] == [tiles] * 3
    with pytest.raises(ValueError, match="Ask about fewer"):
        processor(text=text, images=document, max_num_tiles="fit", context_length=needed[1] + 49, answer_tokens=50)


def test_pages_fit_beside_a_video(nano):
    """The frames of a video take room, which is counted to the token."""
    _, processor = nano
    document, video = open_document(make_pdf(2)), [Image.new("RGB", (512, 512))] * 3
    inputs = {"text": "<video><image><image>Total?", "images": document, "videos": [video], "answer_tokens": 50}
    length = len(processor(**inputs)["input_ids"][0])
    for spare, tiles in ((0, 2), (-1, 1)):
        fitted = processor(**inputs, max_num_tiles="fit", context_length=length + 50 + spare)
        assert fitted["num_patches"] == [tiles] * 2


def test_a_batch_gets_one_number_of_tiles_that_fits_its_longest_prompt(nano):
    _, processor = nano
    short, long = open_document(make_pdf(1)), open_document(make_pdf(8))
    batch = processor(
        text=["<image>", "<image>" * 8], images=[short, long], max_num_tiles="fit", padding=True, context_length=4096
    )
    assert batch["num_patches"] == [1] * 9


def test_chat_fits_pages_to_the_token(nano):
    model, processor = nano
    seen = []

    class Seen(Exception):
        pass

    def stop(*_, pixel_values, input_ids, **__):
        seen.append((len(pixel_values), input_ids.shape[1]))
        raise Seen

    def ask(answer_tokens, number="fit"):
        options = {"max_new_tokens": answer_tokens}
        with pytest.raises(Seen):
            model.chat(processor, question="Total?", document=data, max_num_tiles=number, generation_config=options)
        return seen[-1]

    data, own = make_pdf(5), model.generate
    model.generate = stop
    try:
        num_tiles, length = ask(1, number=2)
        assert num_tiles == 10
        left = model.config.max_sequence_length - length
        assert ask(left)[0] == 10 and ask(left + 1)[0] == 5
    finally:
        del model.generate
    assert model.generate == own


def test_chat_answers_about_a_document_as_about_its_pages(nano):
    model, processor = nano
    options = {"max_new_tokens": 12, "do_sample": False}
    data = receipt_pdf(1)
    pages = [render_page(page, processor.image_processor.tiling) for page in open_document(data)]
    features = processor.image_processor(pages)
    question = "What is the total?"
    expected, history = model.chat(
        processor, question=question, generation_config=options, return_history=True, **features
    )
    assert model.chat(processor, question=question, generation_config=options, document=data) == expected
    assert (
        model.chat(processor, question=question, generation_config=options, document=receipt_pdf(2), pages="2")
        == expected
    )
    again = model.chat(
        processor, question="What is the date?", generation_config=options, document=data, history=history
    )
    assert again == model.chat(
        processor, question="What is the date?", generation_config=options, history=history, **features
    )
    with pytest.raises(TypeError, match="needs the processor"):
        model.chat(processor.tokenizer, question=question, document=data)
    for given in (features, {"num_patches": [1]}, {"num_patches_list": [1]}):
        with pytest.raises(ValueError, match="takes the place of pixel_values"):
            model.chat(processor, question=question, document=data, **given)
    with pytest.raises(ValueError, match="options of document="):
        model.chat(processor, question=question, pages="1")


def test_a_pdf_given_as_an_image_says_that_it_is_a_document():
    with pytest.raises(ValueError, match="a PDF is a document, see open_document"):
        load_image(make_pdf(1))
    assert isinstance(open_document(make_pdf(1)), Document)
