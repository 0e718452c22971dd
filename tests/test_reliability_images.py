"""The rows of the table in docs/reliability.md that tests/test_image_processing.py does not hold already."""

import io
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from nemotron_vl.image_processing import NemotronVLImageProcessor, cut_tiles, select_tile_grid
from PIL import Image, ImageCms

from tools import ROOT

RED, BLUE = Image.new("RGB", (20, 20), (255, 0, 0)), Image.new("RGB", (20, 20), (0, 0, 255))


def tiles_of(image) -> torch.Tensor:
    return NemotronVLImageProcessor(image_size=64, max_num_tiles=6)(image)["pixel_values"]


def saved(image: Image.Image, image_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG file that promises `width` x `height` grey pixels and holds a few bytes of them."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def test_thirty_thousand_pixels_squared_are_refused_before_decoding(monkeypatch):
    monkeypatch.setattr(Image.Image, "load", None)  # decoding would be a TypeError of its own
    with pytest.raises(ValueError, match="900000000 pixels.*decompression bomb"):
        tiles_of(png_header(30000, 30000))


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "TIFF", "PNG"])
def test_the_first_frame_of_a_file_counts_and_the_current_one_of_an_image(image_format):
    options = {"lossless": True} if image_format == "WEBP" else {}
    data = saved(RED, image_format, save_all=True, append_images=[BLUE], **options)
    assert tiles_of(data)[0, :, 0, 0].tolist() == [1, 0, 0]
    image = Image.open(io.BytesIO(data))
    image.seek(1)
    assert tiles_of(image)[0, :, 0, 0].tolist() == [0, 0, 1]


@pytest.mark.parametrize("orientation", range(9))
def test_every_orientation_of_a_file_is_turned_upright(orientation):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 50, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(pixels)
    turns = [None, None, "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE"]
    turn = [*turns, "ROTATE_90"][orientation]
    upright = stored.transpose(Image.Transpose[turn]) if turn else stored
    assert torch.equal(tiles_of(saved(stored, "PNG", exif=exif)), tiles_of(upright))


def test_colour_profiles_are_ignored():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    assert torch.equal(tiles_of(saved(RED, "PNG", icc_profile=profile)), tiles_of(RED))


def test_a_file_is_read_by_its_content_whatever_its_name_says(tmp_path):
    path = tmp_path / "page.jpg"
    path.write_bytes(saved(RED, "PNG"))
    assert torch.equal(tiles_of(path), tiles_of(RED))


WHOLE_PROCESS = """
import gc, sys
from pathlib import Path
import numpy as np
from PIL import Image
import tools
from nemotron_vl.image_processing import cut_tiles

def resident(kind):  # bytes in main memory: VmRSS now, VmHWM at most since it was reset
    return 1024 * int(Path("/proc/self/status").read_text().split(kind + ":")[1].split()[0])

image = np.random.default_rng(0).integers(0, 256, (6000, 4300, 3), np.uint8)
if sys.argv[1] == "pil":
    image = Image.fromarray(image)
cut_tiles(np.zeros((64, 64, 3), np.uint8))  # allocates what stays
gc.collect()
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
tiles = cut_tiles(image)
print(resident("VmHWM") - before, sum(tile.numel() for tile in tiles))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak of memory from Linux' /proc")
@pytest.mark.parametrize("kind", ["array", "pil"])
def test_doubling_a_large_scan_keeps_the_whole_process_within_the_stated_memory(kind):
    """What the allocators of torch and Pillow take is counted here, too; a fresh process has nothing to reuse."""
    height, width = 6000, 4300
    ended = subprocess.run(
        [sys.executable, "-c", WHOLE_PROCESS, kind], cwd=ROOT, capture_output=True, text=True, check=True
    )
    peak, held = map(int, ended.stdout.split())
    _, columns = select_tile_grid(height, width)
    assert held < peak < held + 8 * height * 512 * (columns + 1) + 80e6
    assert peak < 4 * height * width * 3  # the doubled image alone


@pytest.mark.parametrize(("height", "width"), [(4200, 2970), (600, 6000), (6000, 600)])
def test_doubling_a_large_scan_takes_no_more_than_the_stated_memory(height, width):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    cut_tiles(image[:64, :64])  # allocates what stays
    _, columns = select_tile_grid(height, width)
    tracemalloc.start()
    tiles = cut_tiles(image)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    held = sum(tile.numel() for tile in tiles)
    assert peak - held < 8 * height * 512 * (columns + 1) + 24e6
    assert peak > held  # it did count
