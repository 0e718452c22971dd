"""The image processor against the published recipe restated plainly, and against whatever the world sends."""

import base64
import hashlib
import inspect
import io
import json
import math
import struct
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nemotron_vl import image_processing
from nemotron_vl.image_processing import (
    V1_TILING,
    V2_RECIPE,
    V2_TILING,
    NemotronVLImageProcessor,
    Tiling,
    candidate_grids,
    count_tiles,
    cut_tiles,
    select_tile_grid,
    undo_normalization,
)
from PIL import Image
from transformers import AutoImageProcessor
from transformers.dynamic_module_utils import get_imports, get_relative_imports

from tests.conftest import read_golden_cases

ROOT = Path(__file__).resolve().parents[1]
TILE = 32
SMALL = {"image_size": TILE}


def noise(width, height, channels=3, seed=0):
    shape = (height, width, channels) if channels else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image, image_format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def published_grids(max_num_tiles):
    """The published enumeration, word for word in its loops; (columns, rows)."""
    grids = {
        (i, j)
        for n in range(1, max_num_tiles + 1)
        for i in range(1, n + 1)
        for j in range(1, n + 1)
        if i * j <= max_num_tiles
    }
    return sorted(grids, key=lambda grid: grid[0] * grid[1])


def published_grid(height, width, tile, max_num_tiles, upscale):
    """The published score; (rows, columns)."""
    height, width = height * upscale, width * upscale
    best, chosen = float("-inf"), None
    for columns, rows in published_grids(max_num_tiles):
        coverage = min((columns * rows * tile * tile) / (width * height), 0.6)
        closeness = min((columns / rows) / (width / height), (width / height) / (columns / rows))
        if coverage * closeness > best:
            best, chosen = coverage * closeness, (rows, columns)
    return chosen


def published_tiles(image, tile=TILE, max_num_tiles=12, use_thumbnail=True, upscale=2):
    """The published recipe on whole images: PIL doubling, torch's planar uint8 resize, plain loops."""
    rows, columns = published_grid(image.height, image.width, tile, max_num_tiles, upscale)
    doubled = image.resize((upscale * image.width, upscale * image.height), Image.Resampling.BILINEAR)
    planar = torch.from_numpy(np.array(doubled)).permute(2, 0, 1).contiguous()[None]

    def resize(height, width):
        return torch.nn.functional.interpolate(planar, size=(height, width), mode="bilinear", antialias=True)[0]

    whole = resize(tile * rows, tile * columns)
    tiles = []
    for row in range(rows):
        for column in range(columns):
            tiles.append(whole[:, row * tile : (row + 1) * tile, column * tile : (column + 1) * tile])
    if use_thumbnail and len(tiles) > 1:
        tiles.append(resize(tile, tile))
    return torch.stack(tiles) * (1 / 255)


def tiles_of(image, **options):
    return NemotronVLImageProcessor(**{**SMALL, **options})(image)["pixel_values"]


# Which grid ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_num_tiles", [*range(1, 26), 40])
def test_candidates_come_in_the_published_order_for_every_maximum(max_num_tiles):
    assert list(candidate_grids(max_num_tiles)) == published_grids(max_num_tiles)


@pytest.mark.parametrize(
    ("max_num_tiles", "order"),
    [
        (6, "11 12 21 31 13 41 14 22 15 51 61 23 16 32"),
        (7, "11 12 21 31 13 41 14 22 15 51 61 23 16 32 71 17"),
    ],
)
def test_order_of_ties_is_that_of_cpython(max_num_tiles, order):
    assert candidate_grids(max_num_tiles) == tuple((int(grid[0]), int(grid[1])) for grid in order.split())


def test_order_of_ties_for_twelve_tiles():
    order = (
        "1,1 1,2 2,1 3,1 1,3 2,2 4,1 1,4 5,1 1,5 1,6 6,1 3,2 2,3 7,1 1,7 4,2 2,4 1,8 8,1 1,9 3,3 9,1 2,5 5,2 10,1 1,10 "
        "11,1 1,11 12,1 3,4 4,3 1,12 6,2 2,6"
    )
    assert candidate_grids(12) == tuple(tuple(map(int, grid.split(","))) for grid in order.split())


@settings(max_examples=300, deadline=None)
@given(
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    square=st.booleans(),
    max_num_tiles=st.sampled_from([1, 2, 4, 6, 7, 12, 12, 12, 24]),
    upscale=st.sampled_from([1, 2]),
)
def test_grid_is_the_published_one_for_any_size(height, width, square, max_num_tiles, upscale):
    width = height if square else width  # squares are where ties are
    chosen = select_tile_grid(height, width, max_num_tiles=max_num_tiles, upscale=upscale)
    assert chosen == published_grid(height, width, 512, max_num_tiles, upscale)


@pytest.mark.parametrize(
    ("width", "height", "doubled", "undoubled"),
    [
        (32, 32, 1, 1),
        (330, 330, 1, 1),
        (331, 331, 5, 1),
        (661, 661, 10, 5),
        (1148, 1148, 13, 5),
        (2000, 2000, 10, 10),
        (640, 480, 13, 13),
        (481, 202, 11, 11),
        (400, 1600, 13, 5),
        (1240, 1754, 13, 7),
        (1920, 1080, 13, 9),
    ],
)
def test_doubling_happens_and_can_be_switched_off(width, height, doubled, undoubled):
    assert count_tiles(height, width) == doubled
    assert count_tiles(height, width, upscale=1) == undoubled
    processor = NemotronVLImageProcessor()
    assert processor.get_number_of_image_patches(height, width) == doubled
    assert processor.get_number_of_image_patches(height, width, {"upscale": 1}) == undoubled
    assert processor.get_number_of_image_tokens(height, width) == 256 * doubled


@pytest.mark.parametrize(("height", "width"), [(0, 5), (5, 0), (-1, 5)])
def test_size_without_pixels_is_an_error(height, width):
    with pytest.raises(ValueError, match=f"height={height}, width={width}"):
        count_tiles(height, width)


def test_the_tiling_of_a_processor_is_one_value_that_every_function_takes():
    image = Image.fromarray(noise(200, 130))
    for options in (SMALL, {**SMALL, "max_num_tiles": 4, "use_thumbnail": False}, {**SMALL, **V2_RECIPE}):
        processor = NemotronVLImageProcessor(**{**options, "do_rescale": False, "do_normalize": False})
        tiles = processor(image)["pixel_values"]
        assert torch.equal(torch.stack(cut_tiles(image, processor.tiling)), tiles)
        assert count_tiles(130, 200, processor.tiling) == len(tiles) == processor.get_number_of_image_patches(130, 200)
        rows, columns = select_tile_grid(130, 200, processor.tiling)
        assert len(tiles) - rows * columns == processor.use_thumbnail


def test_options_of_a_call_replace_those_of_the_tiling():
    assert count_tiles(1754, 1240, V2_TILING, max_num_tiles=4, use_thumbnail=False) == 2
    assert count_tiles(1754, 1240, V2_TILING, upscale=2) == count_tiles(1754, 1240, V2_TILING)
    frame = Image.fromarray(noise(640, 360))
    (tile,) = cut_tiles(frame, V2_TILING, image_size=TILE, max_num_tiles=1)  # as frames of a video are cut
    assert tile.shape == (3, TILE, TILE) and tile.dtype == torch.float32
    with pytest.raises(TypeError, match="max_tiles"):
        select_tile_grid(1754, 1240, max_tiles=4)


def test_the_recipes_of_both_models_are_values_and_the_defaults_are_those_of_the_8b():
    assert V1_TILING == Tiling() == NemotronVLImageProcessor().tiling
    assert NemotronVLImageProcessor(**V2_RECIPE).tiling == V2_TILING
    assert Tiling(512, 12, True, 1, "closest_ratio", "bicubic") == V2_TILING
    with pytest.raises(AttributeError):
        V1_TILING.max_num_tiles = 4


def test_a_tiling_with_an_impossible_option_cannot_be_made():
    for options, error in (
        ({"image_size": 0}, ValueError),
        ({"image_size": "64"}, TypeError),
        ({"max_num_tiles": 1025}, ValueError),
        ({"use_thumbnail": 1}, TypeError),
        ({"upscale": 3}, ValueError),
        ({"grid_rule": "best"}, ValueError),
        ({"interpolation": "nearest"}, ValueError),
    ):
        with pytest.raises(error, match=next(iter(options))):
            Tiling(**options)
        with pytest.raises(error, match=next(iter(options))):
            count_tiles(20, 20, **options)


def test_tile_counts_and_statistics_equal_the_golden(golden_8b):
    from PIL import ImageDraw

    processor = NemotronVLImageProcessor.from_pretrained(golden_8b / "checkpoint")
    expected = json.loads((golden_8b / "expected.json").read_text())["tiles"]
    for size, reference in expected.items():
        width, height = map(int, size.split("x"))
        assert processor.get_number_of_image_patches(height, width) == reference["num_patches"], size
        if height * width > 300_000:
            continue  # drawing the picture takes longer than the check is worth
        y, x = np.mgrid[0:height, 0:width]
        levels = [x * 255 // max(width - 1, 1), y * 255 // max(height - 1, 1), x * 7 + y * 3 + 31]
        image = Image.fromarray(np.stack([level % 256 for level in levels], -1).astype(np.uint8))
        draw = ImageDraw.Draw(image)
        box = [width // 5, height // 5, width // 2, height // 2]
        draw.rectangle(box, outline=(255, 0, 0), width=max(1, width // 60))
        draw.text((width // 8, height // 8), "TOTAL 1.50", fill=(0, 0, 0))
        pixel_values = processor(image)["pixel_values"]
        assert len(pixel_values) == reference["num_patches"], size
        assert pixel_values.mean().item() == pytest.approx(reference["mean"], abs=0.02), size
        assert pixel_values.std().item() == pytest.approx(reference["std"], abs=0.02), size


def test_pixels_equal_the_golden(golden_8b):
    """A set may hold the pixels or their digest. Where it holds neither, only the counts are compared here."""
    from safetensors.torch import load_file

    processor = NemotronVLImageProcessor.from_pretrained(golden_8b / "checkpoint")
    stored = load_file(golden_8b / "expected.safetensors")
    for name, case in read_golden_cases(golden_8b).items():
        if case["images"]:
            output = processor([Image.open(golden_8b / file) for file in case["images"]])
            pixel_values = output["pixel_values"]
            assert output["num_patches"] == case["num_patches"], name
            assert torch.equal(pixel_values, stored.get(f"{name}.pixel_values", pixel_values)), name
            digest = hashlib.sha256(pixel_values.numpy().tobytes()).hexdigest()
            assert digest == case.get("pixel_values_sha256", digest), name


# Pixels --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("upscale", [1, 2])
@pytest.mark.parametrize(
    "size", [(1, 1), (1, 50), (50, 1), (20, 21), (40, 30), (97, 61), (64, 64), (33, 200), (300, 7)]
)
def test_pixels_equal_the_published_recipe(size, upscale):
    pixels = noise(*size)
    expected = published_tiles(Image.fromarray(pixels), upscale=upscale)
    assert torch.equal(tiles_of(Image.fromarray(pixels), upscale=upscale), expected)
    processor = NemotronVLImageProcessor(**SMALL, upscale=upscale)
    assert torch.equal(processor(pixels, input_data_format="channels_last")["pixel_values"], expected)


@pytest.mark.parametrize("band_height", [1, 2, 3, 7, 60])
def test_bands_do_not_change_the_pixels(monkeypatch, band_height):
    pixels = noise(97, 61)
    monkeypatch.setattr(image_processing, "BAND_BYTES", band_height * 4 * 97)
    for upscale in (1, 2):
        expected = published_tiles(Image.fromarray(pixels), upscale=upscale)
        assert torch.equal(tiles_of(Image.fromarray(pixels), upscale=upscale), expected)
        assert torch.equal(tiles_of(pixels, upscale=upscale), expected)


def test_pixels_equal_the_published_recipe_at_full_size():
    image = Image.fromarray(noise(1275, 1650))
    assert torch.equal(NemotronVLImageProcessor()(image)["pixel_values"], published_tiles(image, tile=512))


@settings(max_examples=30, deadline=None)
@given(
    width=st.integers(1, 120),
    height=st.integers(1, 120),
    max_num_tiles=st.integers(1, 12),
    use_thumbnail=st.booleans(),
    upscale=st.sampled_from([1, 2]),
)
def test_pixels_equal_the_published_recipe_under_any_option(width, height, **options):
    image = Image.fromarray(noise(width, height, seed=width * height))
    assert torch.equal(tiles_of(image, **options), published_tiles(image, **options))


def test_thumbnail_is_last_and_single_tiles_have_none():
    image = Image.fromarray(noise(60, 30))
    with_thumbnail, without = tiles_of(image), tiles_of(image, use_thumbnail=False)
    assert len(with_thumbnail) == len(without) + 1
    assert torch.equal(with_thumbnail[:-1], without)
    assert len(tiles_of(image, max_num_tiles=1)) == 1


@pytest.mark.parametrize("size", [(1, 20000), (20000, 1)])
def test_extreme_shapes_work(size):
    assert tiles_of(Image.new("RGB", size, "red"))[:, 0].min() == 1


@pytest.mark.parametrize("shape", [(100_001, 1), (1, 100_001)])
def test_absurdly_long_sides_are_refused_before_decoding(monkeypatch, shape):
    with pytest.raises(ValueError, match="1..100000 pixels"):
        tiles_of(np.zeros(shape, np.uint8))
    data = encoded(Image.new("1", shape))
    monkeypatch.setattr(Image.Image, "load", None)
    with pytest.raises(ValueError, match="1..100000 pixels"):
        tiles_of(data)


# PIL images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16"])
def test_opaque_modes_are_read_as_pillow_shows_them(mode):
    image = Image.new(mode, (40, 30))
    if mode not in ("I", "F", "I;16"):  # whose white point Pillow does not have; see below
        image.frombytes(noise(40, 30, 8).tobytes()[: len(image.tobytes())])
    assert torch.equal(tiles_of(image), tiles_of(image.convert("RGB")))


def test_palettes_with_an_alpha_for_each_colour_are_composited_on_white():
    image = Image.new("P", (30, 20))
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 0, 255])
    image.paste(1, (10, 0, 20, 20))
    image.paste(2, (20, 0, 30, 20))
    image.info["transparency"] = bytes([0, 102, 255])  # invisible black, 40 % red, blue
    expected = np.empty((20, 30, 3), np.uint8)
    expected[:, :10], expected[:, 10:20], expected[:, 20:] = (255, 255, 255), (255, 153, 153), (0, 0, 255)
    for given_as in (image, encoded(image, transparency=image.info["transparency"])):
        assert torch.equal(tiles_of(given_as), tiles_of(expected))


@pytest.mark.parametrize("mode", ["LA", "La", "PA", "RGBA", "RGBa"])
def test_transparent_pixels_become_white(mode):
    assert tiles_of(Image.new(mode, (40, 30))).min() == 1


def test_half_transparent_pixels_are_mixed_with_white_and_opaque_ones_kept():
    assert tiles_of(Image.new("RGBA", (40, 30), (0, 0, 0, 102))).unique().item() == pytest.approx(0.6, abs=0.5 / 255)
    pixels = noise(40, 30, 4)
    pixels[..., 3] = 255
    assert torch.equal(tiles_of(Image.fromarray(pixels)), tiles_of(pixels[..., :3]))


def drawing(paper, ink, ink_alpha=255, paper_alpha=0):
    """Ink in the middle of a sheet; both are grey levels."""
    pixels = np.full((30, 40, 4), (paper, paper, paper, paper_alpha), np.uint8)
    pixels[10:20, 10:30] = (ink, ink, ink, ink_alpha)
    return pixels


def test_ink_that_white_would_hide_is_seen_on_black():
    for ink, ink_alpha, paper in ((255, 255, 0), (255, 255, 255), (250, 255, 0), (255, 128, 255)):
        pixels = drawing(paper, ink, ink_alpha)
        seen = np.zeros((30, 40, 3), np.uint8)
        seen[10:20, 10:30] = round(ink * ink_alpha / 255)
        for given_as in (pixels, Image.fromarray(pixels), encoded(Image.fromarray(pixels))):
            assert torch.equal(tiles_of(given_as), tiles_of(seen)), (ink, ink_alpha, paper)
    white_text = Image.fromarray(drawing(0, 255)).convert("LA")
    assert torch.equal(tiles_of(white_text), tiles_of(drawing(0, 255)))


@pytest.mark.parametrize("image_format", ["PNG", "TGA", "TIFF", "WEBP"])
def test_an_alpha_that_is_zero_everywhere_is_no_alpha(image_format):
    pixels = noise(40, 30, 4)
    pixels[..., 3] = 0
    options = {"lossless": True, "exact": True} if image_format == "WEBP" else {}
    data = encoded(Image.fromarray(pixels), image_format, **options)
    assert torch.equal(tiles_of(data), tiles_of(pixels[..., :3]))
    assert torch.equal(tiles_of(pixels), tiles_of(pixels[..., :3]))


def test_a_screen_grab_in_a_bmp_of_32_bits_with_an_empty_alpha_is_seen():
    pixels = noise(40, 30, 4)
    pixels[..., 3] = 0
    rows = pixels[::-1, :, [2, 1, 0, 3]].tobytes()
    masks = (0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    info = struct.pack("<IiiHHIIiiIIIIII", 108, 40, 30, 1, 32, 3, len(rows), 0, 0, 0, 0, *masks) + b"BGRs" + bytes(48)
    data = b"BM" + struct.pack("<IHHI", 14 + len(info) + len(rows), 0, 0, 14 + len(info)) + info + rows
    assert Image.open(io.BytesIO(data)).mode == "RGBA"
    assert torch.equal(tiles_of(data), tiles_of(pixels[..., :3]))


def test_a_transparent_image_that_shows_something_on_white_stays_on_white():
    for pixels in (
        drawing(0, 0),
        drawing(255, 200),
        drawing(0, 238),
        drawing(255, 0, 128),
        drawing(255, 255, 255, 255),
    ):
        white = np.asarray(Image.new("RGBA", (40, 30), "white"))
        on_white = Image.alpha_composite(Image.fromarray(white), Image.fromarray(pixels)).convert("RGB")
        assert torch.equal(tiles_of(pixels), tiles_of(on_white))


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_transparent_colours_of_files_become_white(mode):
    image = Image.new(mode, (40, 30), 0)
    data = encoded(image, transparency=0 if mode != "RGB" else (0, 0, 0))
    assert tiles_of(data).min() == 1
    assert tiles_of(Image.open(io.BytesIO(data))).min() == 1


@pytest.mark.parametrize(
    ("dtype", "level", "expected"),
    [
        (np.uint16, 65535, 1),
        (np.uint16, 257, 1 / 255),
        (np.int32, 65535, 1),
        (np.int32, 255, 1),
        (np.float32, 1, 1),
        (np.float32, 255, 1),
        (np.float32, 0.2, 0.2),
    ],
)
def test_deep_grey_is_scaled_by_its_white_point(dtype, level, expected):
    image = Image.fromarray(np.full((30, 40), level, dtype))
    assert image.mode in ("I;16", "I", "F")
    assert tiles_of(image).unique().item() == pytest.approx(expected)


@pytest.mark.parametrize(
    "pixels",
    [np.array([[-1]], np.int32), np.array([[65536]], np.int32), np.float32([[math.nan]]), np.float32([[256]])],
)
def test_deep_grey_out_of_range_is_an_error(pixels):
    with pytest.raises(ValueError, match="needs values in 0"):
        tiles_of(Image.fromarray(pixels))


def test_orientation_is_applied_to_files_but_not_to_pil_images():
    stored = Image.fromarray(noise(60, 30))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show the image rotated clockwise
    data = encoded(stored, exif=exif)
    assert torch.equal(tiles_of(Image.open(io.BytesIO(data))), tiles_of(stored))
    assert torch.equal(tiles_of(data), tiles_of(stored.transpose(Image.Transpose.ROTATE_270)))


def test_first_frame_of_a_file_is_used():
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert tiles_of(data)[0, :, 0, 0].tolist() == [1, 0, 0]


def test_do_convert_rgb_false_refuses_other_modes():
    for image in (Image.new("L", (9, 9)), noise(9, 9, 0), noise(9, 9, 4)):
        with pytest.raises(ValueError, match="takes RGB"):
            tiles_of(image, do_convert_rgb=False)
    assert len(tiles_of(Image.new("RGB", (9, 9)), do_convert_rgb=False)) == 1


# Files ---------------------------------------------------------------------------------------------------------------


def test_every_way_to_name_a_file_gives_the_same_tiles(tmp_path):
    image = Image.fromarray(noise(60, 30))
    data = encoded(image)
    path = tmp_path / "an image.png"
    path.write_bytes(data)
    text = base64.b64encode(data).decode()
    ways = [path, str(path), path.as_uri(), data, bytearray(data), memoryview(data), text]
    ways += [f"data:image/png;base64,{text}", "\n".join([text[:76], text[76:]])]
    for way in ways:
        assert torch.equal(tiles_of(way), tiles_of(image))


@pytest.mark.parametrize(("image_format", "compression"), [("PNG", None), ("JPEG", None), ("TIFF", "tiff_lzw")])
@pytest.mark.parametrize("position", [0, 7, "end"])
def test_open_files_are_read_from_their_start_and_left_as_they_were(tmp_path, image_format, compression, position):
    data = encoded(
        Image.fromarray(noise(60, 30)), image_format, **({"compression": compression} if compression else {})
    )
    (tmp_path / "image").write_bytes(data)
    with open(tmp_path / "image", "rb") as on_disk, tempfile.SpooledTemporaryFile() as spooled:
        spooled.write(data)
        for file in (io.BytesIO(data), on_disk, spooled):
            place = len(data) if position == "end" else position
            file.seek(place)
            assert torch.equal(tiles_of([file, file]), tiles_of([data, data]))
            assert file.tell() == place and not file.closed
            assert file.read() == data[place:]


def test_open_files_that_are_no_images_say_why():
    class Stream(io.BytesIO):
        def seekable(self):
            return False

    closed, data = io.BytesIO(b"x"), encoded(Image.new("RGB", (9, 9)))
    closed.close()
    for file, words in {
        io.StringIO("text"): "text mode",
        Stream(data): "cannot be read twice",
        closed: "closed file",
        io.BytesIO(data[:40]): "",
        io.BytesIO(): "cannot identify",
    }.items():
        with pytest.raises(ValueError, match=f"cannot be used.*{words}"):
            tiles_of(file)


@pytest.mark.parametrize(
    "source",
    [
        b"",
        b"no image",
        "",
        "/no/such/file.png",
        "no such file",
        "data:image/png;base64,###",
        "data:",
        "a\0b",
        "\ud800",
    ],
)
def test_what_is_no_image_is_a_value_error(source):
    with pytest.raises(ValueError, match="cannot be used"):
        tiles_of(source)


def test_a_directory_is_not_called_a_file_that_is_absent(tmp_path):
    with pytest.raises(ValueError, match="it is a directory"):
        tiles_of(tmp_path)


def test_nothing_is_fetched_from_the_network():
    with pytest.raises(ValueError, match="network"):
        tiles_of("https://example.com/image.png")


def test_postscript_is_not_run():
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n%%EOF\n"
    for source in (data, Image.open(io.BytesIO(data))):
        with pytest.raises(ValueError, match="Ghostscript"):
            tiles_of(source)


def test_decompression_bombs_are_refused_before_decoding(monkeypatch):
    data = encoded(Image.new("1", (3000, 3000)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    monkeypatch.setattr(Image.Image, "load", None)  # decoding would be a TypeError of its own
    with pytest.raises(ValueError, match="decompression bomb"):
        tiles_of(data)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "PPM"])
def test_truncated_files_are_value_errors(image_format):
    data = encoded(Image.fromarray(noise(60, 40)), image_format)
    assert len(tiles_of(data)) > 1
    for length in (10, len(data) // 3, len(data) // 2, len(data) - len(data) // 4):
        with pytest.raises(ValueError, match="cannot be used"):
            tiles_of(data[:length])


def test_truncated_pil_images_are_value_errors():
    data = encoded(Image.fromarray(noise(60, 40)))
    with pytest.raises(ValueError, match="cannot be used"):
        tiles_of(Image.open(io.BytesIO(data[: len(data) // 2])))


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_files_give_tiles_or_a_value_error(data):
    image_format = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "ICO", "TGA"]))
    damaged = bytearray(encoded(Image.fromarray(noise(24, 20)), image_format))
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, min(len(damaged) - 1, 200)))] = data.draw(st.integers(0, 255))
    try:
        tiles_of(bytes(damaged))
    except ValueError as error:
        assert "cannot be used" in str(error)


# Arrays --------------------------------------------------------------------------------------------------------------


def test_arrays_of_every_layout_equal_the_pil_image():
    pixels = noise(60, 30)
    expected = tiles_of(Image.fromarray(pixels))
    tensor = torch.from_numpy(pixels)
    read_only = pixels.copy()
    read_only.flags.writeable = False
    for same in (
        pixels.transpose(2, 0, 1),
        tensor,
        tensor.permute(2, 0, 1).contiguous(),
        read_only,
        np.asfortranarray(pixels),
        pixels[::-1, :, ::-1].copy()[::-1, :, ::-1],
        pixels / 255,
        (pixels / 255).astype(np.float32),
        (pixels / 255).astype(">f4"),
        (tensor / 255).requires_grad_(),
        (tensor.double() / 255).half(),
    ):
        assert torch.equal(tiles_of(same), expected)
    assert torch.equal(tiles_of(pixels[None]), expected)
    assert (tiles_of((tensor / 255).bfloat16()) - expected).abs().max() <= 1 / 255


def test_grey_and_four_channel_arrays():
    grey, colour = noise(60, 30, 0), noise(60, 30, 4)
    expected = tiles_of(Image.fromarray(grey))
    for same in (grey, grey[..., None], grey[None], torch.from_numpy(grey)):
        assert torch.equal(tiles_of(same), expected)
    assert torch.equal(tiles_of(colour), tiles_of(Image.fromarray(colour)))
    assert torch.equal(tiles_of(colour.transpose(2, 0, 1) / 255), tiles_of(Image.fromarray(colour)))


def test_ambiguous_layout_needs_input_data_format():
    pixels = noise(40, 3)
    pixels = pixels[:, :3].transpose(1, 0, 2)[:3]  # (3, 3, 3)
    with pytest.raises(ValueError, match=r"\(3, 3, 3\) can be read either way"):
        tiles_of(pixels)
    processor = NemotronVLImageProcessor(**SMALL)
    last = processor(pixels, input_data_format="channels_last")["pixel_values"]
    first = processor(pixels.transpose(2, 0, 1), input_data_format="channels_first")["pixel_values"]
    assert torch.equal(last, tiles_of(Image.fromarray(np.ascontiguousarray(pixels))))
    assert torch.equal(first, last)


@pytest.mark.parametrize("shape", [(7,), (5, 6, 7), (2, 3, 4, 5, 3), (), (5, 6, 2), (6, 0, 3), (0, 0), (3, 9, 0)])
def test_arrays_of_wrong_shape_are_value_errors(shape):
    with pytest.raises(ValueError):
        tiles_of(np.zeros(shape, np.uint8))


@pytest.mark.parametrize("low_high", [(0, 255), (-1, 1), (0, math.nan), (0, math.inf), (-math.inf, 1), (0, 1.1)])
def test_floats_outside_0_to_1_are_an_error_with_a_remedy(low_high):
    pixels = np.resize(np.array(low_high, np.float32), (6, 7))
    with pytest.raises(ValueError, match=r"0\.\.1.*(Divide|uint8).*undo_normalization"):
        tiles_of(pixels)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_half_a_level_of_overshoot_is_rounding_and_more_is_an_error(dtype):
    for level, expected in (
        (-0.499 / 255, 0),
        (1 + 0.499 / 255, 1),
        (np.nextafter(dtype(1 + 0.5 / 255), dtype(0)), 1),
    ):
        assert tiles_of(np.full((6, 7), level, dtype)).unique().item() == expected
    assert tiles_of(np.full((6, 7), 1 + 0.5 / 255)).unique().item() == 1  # rounds to 256
    for level in (-0.51 / 255, 1 + 0.51 / 255):
        with pytest.raises(ValueError, match="must lie in 0..1"):
            tiles_of(np.full((6, 7), level, dtype))


def test_the_largest_options_are_taken_and_one_more_is_not():
    assert len(candidate_grids(1024)) > 1024
    with pytest.raises(ValueError, match="1..1024, got 1025"):
        candidate_grids(1025)
    NemotronVLImageProcessor(image_size=1 << 15, max_num_tiles=1)  # 2^30 pixels
    with pytest.raises(ValueError, match="have more than 1073741824 pixels"):
        NemotronVLImageProcessor(image_size=1 << 15, max_num_tiles=2)


def test_lists_may_be_nested_a_hundred_levels_deep_and_no_deeper():
    nested = noise(9, 9)
    for _ in range(100):
        nested = [nested]
    assert len(tiles_of(nested)) == 1
    with pytest.raises(ValueError, match="100 levels deep"):
        tiles_of([nested])


def test_base64_text_with_stray_characters_is_refused():
    text = base64.b64encode(encoded(Image.new("RGB", (9, 9)))).decode()
    with pytest.raises(ValueError, match="neither an existing file nor base64"):
        tiles_of(text[:40] + "*" + text[40:])


@pytest.mark.parametrize("dtype", [np.int64, np.uint16, np.int8, bool, object, complex, "U3"])
def test_other_dtypes_are_type_errors(dtype):
    with pytest.raises(TypeError, match="uint8 in 0..255 or float in 0..1"):
        tiles_of(np.zeros((6, 7), dtype))


@pytest.mark.parametrize("number", [np.int64(4), np.uint8(4), torch.tensor(4)])
def test_whole_numbers_of_every_kind_are_taken_and_saved_as_ints(number):
    pixels = noise(60, 30)
    expected = tiles_of(pixels, max_num_tiles=4)
    assert torch.equal(NemotronVLImageProcessor(**SMALL)(pixels, max_num_tiles=number)["pixel_values"], expected)
    processor = NemotronVLImageProcessor(**SMALL, max_num_tiles=number)
    assert type(processor.max_num_tiles) is int
    processor.max_num_tiles = number  # as users do
    assert torch.equal(processor(pixels)["pixel_values"], expected)
    assert json.loads(processor.to_json_string())["max_num_tiles"] == 4


def test_sizes_of_every_kind_of_whole_number_are_counted_alike():
    for kind in (np.int32, np.uint16, torch.tensor):
        assert count_tiles(kind(60000), kind(50000)) == count_tiles(60000, 50000)
    with pytest.raises(TypeError):
        count_tiles(3.5, 4)


@pytest.mark.parametrize("image", [None, 3, {"image": 1}, object(), [None], [[1, 2], [3, 4]]])
def test_other_kinds_are_type_errors(image):
    with pytest.raises(TypeError, match="An image is a PIL image"):
        tiles_of(image)


# Calls ---------------------------------------------------------------------------------------------------------------


def test_nested_lists_are_taken_in_order():
    images = [Image.fromarray(noise(60, 30, seed=seed)) for seed in range(3)]
    batch = NemotronVLImageProcessor(**SMALL)([[images[0]], [images[1], (images[2],)]])
    assert torch.equal(batch["pixel_values"], torch.cat([tiles_of(image) for image in images]))
    assert batch["num_patches"] == [len(tiles_of(image)) for image in images]


@pytest.mark.parametrize("images", [[], [[], []], ()])
def test_no_images_give_an_empty_result(images):
    processor = NemotronVLImageProcessor(**SMALL)
    output = processor(images)
    assert output["pixel_values"].shape == (0, 3, TILE, TILE)
    assert output["num_patches"] == []
    assert processor(images, return_tensors="pt")["num_patches"].dtype == torch.int64


def test_output_types_follow_return_tensors():
    processor, image = NemotronVLImageProcessor(**SMALL), Image.new("RGB", (60, 30))
    plain, torch_output, numpy_output = (processor(image, return_tensors=kind) for kind in (None, "pt", "np"))
    assert type(plain["num_patches"]) is list and plain["pixel_values"].dtype == torch.float32
    assert plain["pixel_values"].is_contiguous()
    assert torch_output["num_patches"].tolist() == plain["num_patches"]
    assert isinstance(numpy_output["pixel_values"], np.ndarray) and numpy_output["num_patches"].dtype == np.int64
    assert list(plain) == ["pixel_values", "num_patches"] == processor.model_input_names
    with pytest.raises(ValueError, match="'tf'"):
        processor(image, return_tensors="tf")


def test_options_may_be_given_per_call_without_being_kept():
    processor, image = NemotronVLImageProcessor(), Image.fromarray(noise(60, 30))
    before = processor.to_dict()
    options = {"image_size": TILE, "max_num_tiles": 3, "use_thumbnail": False, "upscale": 1}
    per_call = processor(image, **options)["pixel_values"]
    assert torch.equal(per_call, tiles_of(image, **options))
    assert processor.to_dict() == before


def test_legacy_and_unset_options_change_nothing():
    processor, image = NemotronVLImageProcessor(**SMALL), Image.fromarray(noise(60, 30))
    legacy = {
        "use_fast": True,
        "disable_grouping": True,
        "data_format": "channels_first",
        "size": None,
        "device": None,
    }
    assert torch.equal(processor.preprocess(image, **legacy)["pixel_values"], processor(image)["pixel_values"])


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"max_tiles": 3}, TypeError),
        ({"size": 3}, TypeError),
        ({"do_resize": False}, TypeError),
        ({"data_format": "channels_last"}, ValueError),
        ({"image_size": 40}, ValueError),
        ({"image_size": 0}, ValueError),
        ({"image_size": 32.0}, TypeError),
        ({"max_num_tiles": 0}, ValueError),
        ({"max_num_tiles": 10**9}, ValueError),
        ({"max_num_tiles": True}, TypeError),
        ({"max_num_tiles": "4"}, TypeError),
        ({"max_num_tiles": np.float64(4)}, TypeError),
        ({"upscale": 3}, ValueError),
        ({"use_thumbnail": "no"}, TypeError),
        ({"rescale_factor": 0}, ValueError),
        ({"rescale_factor": math.nan}, ValueError),
        ({"do_normalize": True}, ValueError),
        ({"do_normalize": True, "image_mean": [0, 0, 0], "image_std": [1, 0, 1]}, ValueError),
        ({"do_normalize": True, "image_mean": [0, math.nan, 0], "image_std": [1, 1, 1]}, ValueError),
    ],
)
def test_wrong_options_are_errors(options, error):
    with pytest.raises(error, match=next(iter(options)).replace("do_normalize", "image_")):
        NemotronVLImageProcessor(**SMALL)(Image.new("RGB", (9, 9)), **options)
    if error is ValueError and "data_format" not in options:
        with pytest.raises(error):
            NemotronVLImageProcessor(**options)


def test_rescaling_can_be_left_to_the_device():
    pixels = noise(60, 30)
    raw = tiles_of(pixels, do_rescale=False)
    assert raw.dtype == torch.uint8
    assert torch.equal(raw * (1 / 255), tiles_of(pixels))


def test_normalisation_is_honoured_and_can_be_undone():
    pixels, mean, std = noise(60, 30), [0.48, 0.45, 0.40], [0.26, 0.25, 0.27]
    plain = tiles_of(pixels)
    normalised = tiles_of(pixels, do_normalize=True, image_mean=mean, image_std=std)
    expected = (plain - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.equal(normalised, expected)
    torch.testing.assert_close(undo_normalization(normalised, mean, std), plain, atol=1e-6, rtol=0)
    imagenet = (plain - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(
        3, 1, 1
    )
    restored = undo_normalization(imagenet.bfloat16())
    assert restored.dtype == torch.bfloat16
    assert restored.min() >= 0 and restored.max() <= 1
    torch.testing.assert_close(restored.float(), plain, atol=0.02, rtol=0)


def test_result_lives_on_the_device_asked_for():
    output = NemotronVLImageProcessor(**SMALL)(Image.new("RGB", (60, 30)), device="meta")["pixel_values"]
    assert output.device.type == "meta"
    assert output.shape == tiles_of(Image.new("RGB", (60, 30))).shape


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_numbers():
    pixels = noise(60, 30)
    assert torch.equal(tiles_of(pixels, device="cuda").cpu(), tiles_of(pixels))


def test_nothing_of_the_callers_is_changed():
    array, image, nested = noise(60, 30), Image.fromarray(noise(60, 30, 4)), [[noise(9, 9)]]
    copies = array.copy(), image.copy(), nested[0][0].copy()
    tiles_of([array, image, nested])
    assert np.array_equal(array, copies[0]) and image == copies[1] and np.array_equal(nested[0][0], copies[2])


def test_eight_threads_get_the_single_thread_result():
    processor = NemotronVLImageProcessor(**SMALL)
    images = [Image.fromarray(noise(150 + seed, 130, seed=seed)) for seed in range(8)]
    expected = [processor(image)["pixel_values"] for image in images]
    failures = []

    def work(index):
        for _ in range(5):
            if not torch.equal(processor(images[index])["pixel_values"], expected[index]):
                failures.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# Configuration and files ---------------------------------------------------------------------------------------------

PUBLISHED = {
    "auto_map": {"AutoImageProcessor": "image_processing.LlamaNemotronNanoVLImageProcessor"},
    "image_processor_type": "LlamaNemotronNanoVLImageProcessor",
    "do_rescale": True,
    "do_normalize": None,
    "do_convert_rgb": None,
    "rescale_factor": 0.00392156862745098,
    "image_size": 64,
    "max_num_tiles": 6,
    "size": None,
    "some_future_key": {"a": [1]},
}


def test_public_contract_is_frozen():
    assert str(inspect.signature(NemotronVLImageProcessor)) == (
        "(image_size: int = 512, max_num_tiles: int = 12, use_thumbnail: bool = True, upscale: int = 2, "
        "do_rescale: bool = True, rescale_factor: float = 0.00392156862745098, do_normalize: bool = False, "
        "image_mean: collections.abc.Sequence[float] | None = None, "
        "image_std: collections.abc.Sequence[float] | None = None, do_convert_rgb: bool = True, "
        "device: str | torch.device | None = None, patch_size: int = 16, downsample_ratio: float = 0.5, "
        "grid_rule: str = 'area', interpolation: str = 'bilinear', **kwargs: Any)"
    )
    assert NemotronVLImageProcessor.model_input_names == ["pixel_values", "num_patches"]


def test_published_configuration_is_read_and_saved_as_ours(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PUBLISHED))
    processor = NemotronVLImageProcessor.from_pretrained(tmp_path)
    assert (processor.image_size, processor.max_num_tiles) == (64, 6)
    assert processor.do_normalize is False and processor.do_convert_rgb is True
    processor.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "preprocessor_config.json").read_text())
    assert saved["auto_map"] == {"AutoImageProcessor": "image_processing.NemotronVLImageProcessor"}
    assert saved["some_future_key"] == {"a": [1]}
    assert "image_processor_type" not in saved and "device" not in saved


def test_configuration_survives_a_round_trip(tmp_path):
    processor = NemotronVLImageProcessor(
        image_size=64,
        upscale=1,
        do_normalize=True,
        image_mean=(0, 0.5, 1),
        image_std=[1, 2, 3],
        device="meta",
        new=[1],
    )
    assert NemotronVLImageProcessor.from_dict(processor.to_dict()).to_dict() == processor.to_dict()
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "image_processing.py").read_bytes() == (ROOT / "image_processing.py").read_bytes()
    reloaded = NemotronVLImageProcessor.from_pretrained(tmp_path)
    assert reloaded.to_dict() == processor.to_dict()
    assert reloaded.device is None
    reloaded.to_dict()["new"].append(2)
    assert reloaded.new == [1]


@pytest.mark.parametrize("use_fast", [None, True, False])
def test_auto_class_loads_a_saved_processor_with_client_options(tmp_path, use_fast):
    NemotronVLImageProcessor(image_size=64).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(
        tmp_path, trust_remote_code=True, use_fast=use_fast, device="cpu", max_num_tiles=4
    )
    assert type(processor).__name__ == "NemotronVLImageProcessor"
    assert (processor.image_size, processor.max_num_tiles, processor.device) == (64, 4, "cpu")
    assert torch.equal(
        processor(noise(60, 30))["pixel_values"], tiles_of(noise(60, 30), image_size=64, max_num_tiles=4)
    )


def test_overriding_options_are_checked_on_loading():
    with pytest.raises(ValueError, match="max_num_tiles"):
        NemotronVLImageProcessor.from_dict({}, max_num_tiles=0)
    processor, unused = NemotronVLImageProcessor.from_dict({}, upscale=1, other=3, return_unused_kwargs=True)
    assert processor.upscale == 1 and unused == {"other": 3}


@pytest.mark.parametrize("text", ["3", '"words"', "[]"])
def test_a_configuration_that_is_no_dict_is_named_as_damaged(tmp_path, text):
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(ValueError, match="preprocessor_config.json of .* is damaged: .* Download it again"):
        NemotronVLImageProcessor.from_pretrained(tmp_path)


def test_module_needs_one_sibling_and_no_torchvision():
    path = ROOT / "image_processing.py"
    assert get_relative_imports(path) == ["pictures"]
    needed = {name.split(".")[0] for name in get_imports(path)} - set(sys.stdlib_module_names)
    assert needed == {"numpy", "PIL", "torch", "transformers"}


def test_internvls_switch_for_cutting_is_understood():
    """TRL's GRPO asks for the counts of tiles with it."""
    processor = NemotronVLImageProcessor(image_size=64)
    image = Image.new("RGB", (200, 100))
    assert processor([[image]], crop_to_patches=True)["num_patches"] == processor(image)["num_patches"]
    with pytest.raises(ValueError, match="max_num_tiles=1"):
        processor(image, crop_to_patches=False)
