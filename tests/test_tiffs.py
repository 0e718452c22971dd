"""Grey TIFFs of every bit depth, written here byte by byte: right grey levels, or an error that says what to do."""

import io
import itertools
import struct
import zlib

import numpy as np
import pytest
import torch
from nemotron_vl.image_processing import NemotronVLImageProcessor, load_image
from PIL import Image

UNSIGNED, SIGNED, FLOAT = 1, 2, 3
REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
ROW, HEIGHT, WIDTH = 5, 11, 19  # no multiple of a strip, a tile or a byte
RAMP = np.linspace(0, 1, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)


def packed(row: np.ndarray, bits: int, order: str) -> bytes:
    """A row of whole numbers as samples of `bits` bits; whole bytes in byte order `order`, others from the left."""
    if bits % 8 == 0:
        return b"".join(int(value).to_bytes(bits // 8, "little" if order == "<" else "big") for value in row)
    text = "".join(f"{int(value):0{bits}b}" for value in row)
    return int(text.ljust(-(-len(text) // 8) * 8, "0"), 2).to_bytes(-(-len(text) // 8), "big")


def tiff(samples: np.ndarray, bits: int, **options) -> bytes:
    """A grey TIFF of the whole numbers `samples`, `(height, width)`.

    Options: `sample_format`, `white_is_zero`, `order` ("<" or ">"), `tiled`, `compressed`, `fill_order`, `planar`.
    """
    order, height, width = options.get("order", "<"), *samples.shape
    if options.get("tiled"):
        padded = np.zeros((-(-height // 16) * 16, -(-width // 16) * 16), samples.dtype)
        padded[:height, :width] = samples
        corners = itertools.product(range(0, padded.shape[0], 16), range(0, padded.shape[1], 16))
        blocks = [padded[y : y + 16, x : x + 16] for y, x in corners]
    else:
        blocks = [samples[y : y + ROW] for y in range(0, height, ROW)]
    data = [b"".join(packed(row, bits, order) for row in block) for block in blocks]
    data = [zlib.compress(block) for block in data] if options.get("compressed") else data
    data = [block.translate(REVERSED) for block in data] if options.get("fill_order") == 2 else data
    offsets = [8 + sum(map(len, data[:index])) for index in range(len(data))]
    sizes = [len(block) for block in data]
    tags = {
        **{256: [width], 257: [height], 258: [bits], 259: [8 if options.get("compressed") else 1]},
        **{262: [0 if options.get("white_is_zero") else 1], 266: [options.get("fill_order", 1)], 277: [1]},
        **{284: [options.get("planar", 1)], 339: [options.get("sample_format", UNSIGNED)]},
        **({322: [16], 323: [16], 324: offsets, 325: sizes} if options.get("tiled") else {}),
        **({} if options.get("tiled") else {273: offsets, 278: [ROW], 279: sizes}),
    }
    start = 8 + sum(sizes)
    directory, beyond = struct.pack(order + "H", len(tags)), b""
    for tag, values in sorted(tags.items()):
        value = struct.pack(f"{order}{len(values)}I", *values)
        if len(values) > 1:
            value, beyond = struct.pack(order + "I", start + 6 + 12 * len(tags) + len(beyond)), beyond + value
        directory += struct.pack(order + "HHI", tag, 4, len(values)) + value
    header = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", start)
    return header + b"".join(data) + directory + bytes(4) + beyond


def as_samples(levels: np.ndarray, bits: int, sample_format: int) -> np.ndarray:
    """Levels in 0..1 as the whole numbers that a file of this kind holds; signed ones from 0 on."""
    if sample_format == FLOAT:
        return levels.astype(f"f{bits // 8}").view(f"u{bits // 8}")
    return np.rint(levels * (2 ** (bits - (sample_format == SIGNED)) - 1)).astype(np.uint64)


def grey_levels(data: bytes) -> np.ndarray:
    """What we read, 0..255; all three channels are the same."""
    pixels = np.asarray(load_image(data))
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0].astype(float)


LAYOUTS = [
    dict(zip(("white_is_zero", "order", "tiled", "compressed", "fill_order", "planar"), values, strict=True))
    for values in itertools.product((False, True), "<>", (False, True), (False, True), (1, 2), (1, 2))
]
KINDS = [
    *((bits, UNSIGNED) for bits in range(1, 33)),
    *((bits, SIGNED) for bits in (8, 16, 24, 32)),
    *((bits, FLOAT) for bits in (16, 32, 64)),
]


@pytest.mark.parametrize(("bits", "sample_format"), KINDS)
def test_a_grey_tiff_of_any_layout_is_read_right_or_refused_with_what_to_do(bits, sample_format):
    samples = as_samples(RAMP, bits, sample_format)
    num_levels = 2 if bits == 1 else 2.0**bits if sample_format == UNSIGNED else np.inf
    expected = np.rint(RAMP * (num_levels - 1)) / (num_levels - 1) * 255 if np.isfinite(num_levels) else RAMP * 255
    for layout in LAYOUTS:
        data = tiff(samples, bits, sample_format=sample_format, **layout)
        try:
            levels = grey_levels(data)
        except ValueError as error:
            assert "unsigned 8-bit samples" in str(error) or "rescale it to 0..255" in str(error), layout
        else:
            error = np.abs(levels - (255 - expected if layout["white_is_zero"] else expected)).max()
            assert error <= 0.51, layout  # half a level, from rounding


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize(
    ("bits", "sample_format", "order", "white_is_zero"),
    [
        *((bits, UNSIGNED, order, white) for bits in (1, 2, 4, 8) for order in "<>" for white in (False, True)),
        (12, UNSIGNED, "<", False),
        *((16, UNSIGNED, *case) for case in (("<", False), ("<", True), (">", False))),
        (32, UNSIGNED, "<", False),
        (32, FLOAT, "<", False),
        (32, FLOAT, "<", True),
    ],
)
def test_grey_tiffs_that_must_be_read(bits, sample_format, order, white_is_zero, tiled, compressed):
    ends = np.array([[0.0, 1.0]] * 3)
    data = tiff(
        as_samples(ends, bits, sample_format),
        bits,
        sample_format=sample_format,
        order=order,
        white_is_zero=white_is_zero,
        tiled=tiled,
        compressed=compressed,
    )
    assert grey_levels(data).tolist() == [[255.0, 0.0] if white_is_zero else [0.0, 255.0]] * 3


def test_sixteen_bits_where_zero_is_white_are_no_negative():
    data = tiff(np.array([[0, 257, 65535]]), 16, white_is_zero=True)
    assert grey_levels(data).tolist() == [[255, 254, 0]]
    image = Image.open(io.BytesIO(data))  # as a PIL image, too
    assert np.asarray(load_image(image))[0, :, 0].tolist() == [255, 254, 0]
    tiles = NemotronVLImageProcessor(image_size=32)([data, np.uint8([[255, 254, 0]])])["pixel_values"]
    assert torch.equal(*tiles.chunk(2))


def test_twelve_bits_are_not_nearly_black():
    assert grey_levels(tiff(np.array([[0, 2048, 4095]]), 12)).tolist() == [[0, 128, 255]]


def test_the_page_of_a_tiff_counts_not_its_first():
    first, second = (tiff(np.array([[0, 65535]]), 16, white_is_zero=white) for white in (False, True))
    one = Image.open(io.BytesIO(first))
    pages = io.BytesIO()
    one.save(pages, "TIFF", save_all=True, append_images=[Image.new("L", (2, 1), 9)])
    image = Image.open(pages)
    assert np.asarray(load_image(image))[0, :, 0].tolist() == [0, 255]
    image.seek(1)
    assert np.asarray(load_image(image))[0, :, 0].tolist() == [9, 9]
    assert np.asarray(load_image(Image.open(io.BytesIO(second))))[0, :, 0].tolist() == [255, 0]


@pytest.mark.parametrize("top", [200, 40_000, 2**32 - 1])
def test_unsigned_32_bits_take_the_smallest_white_that_holds_them(top):
    white = next(white for white in (255, 65535, 2**32 - 1) if top <= white)
    assert grey_levels(tiff(np.array([[0, top]], np.uint64), 32)).tolist() == [[0, np.rint(top * 255 / white)]]


def test_what_pillow_decodes_into_other_pixels_is_refused():
    one = np.array([[1, 2]])
    for options, said in (
        ({"bits": 8, "sample_format": SIGNED}, "signed 8-bit"),
        ({"bits": 16, "sample_format": SIGNED}, "signed 16-bit"),
        ({"bits": 32, "sample_format": FLOAT, "order": ">", "compressed": True}, "bytes of compressed 32-bit"),
        ({"bits": 32, "sample_format": SIGNED, "order": ">", "compressed": True}, "bytes of compressed 32-bit"),
        ({"bits": 8, "planar": 2, "white_is_zero": True}, "separate planes"),
        ({"bits": 1, "planar": 2, "white_is_zero": True}, "separate planes"),
        ({"bits": 10}, "Pillow does not decode this TIFF"),
        ({"bits": 24}, "Pillow does not decode this TIFF"),
        ({"bits": 64, "sample_format": FLOAT}, "Pillow does not decode this TIFF"),
    ):
        with pytest.raises(ValueError, match=f"{said}.*unsigned 8-bit samples"):
            grey_levels(tiff(one, **options))


def test_a_tiff_on_disk_that_pillow_does_not_know_gets_the_same_sentence(tmp_path):
    path = tmp_path / "page.tif"
    path.write_bytes(tiff(np.array([[1, 2]]), 10))
    with open(path, "rb") as file:
        for given in (path, str(path), file):
            with pytest.raises(ValueError, match="does not decode this TIFF.*unsigned 8-bit samples"):
                load_image(given)


def test_signed_32_bits_as_pillow_writes_its_mode_i_are_read_as_before():
    file = io.BytesIO()
    Image.fromarray(np.array([[0, 65535]], np.int32)).save(file, "TIFF")
    assert grey_levels(file.getvalue()).tolist() == [[0, 255]]
