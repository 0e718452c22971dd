"""Time to cut one image into tiles on one thread: our image processor beside the published recipe written plainly.

    python -m benchmarks.tiling                              # 1275x1650, 2048x1536 and 4000x3000
    python -m benchmarks.tiling --sizes 1240x1754 --rounds 21

The peer does what the published processor does, step by step on whole images: PIL bilinear doubling, a planar uint8
tensor, `F.interpolate` (bilinear, antialias) to the grid and to the thumbnail, split, stack, times 1/255. "ours" gives
the same float32 tiles, "ours_uint8" (`do_rescale=False`) the same tiles before the last step, for those who rescale on
the device. Rounds are interleaved; every result is compared with the peer's, bit for bit, before anything is timed.
The last line of the output is one JSON object: milliseconds of processor time of the one thread (median, quartiles;
other load on the machine disturbs it less than the clock), the ratio of the medians, and the peak of memory used
beyond the image, result included (Linux with glibc only, otherwise null).
"""

import argparse
import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from nemotron_vl.image_processing import NemotronVLImageProcessor, select_tile_grid
from PIL import Image

from benchmarks.common import compare, report

try:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
except ImportError:  # transformers 4.57 has it for torchvision alone
    GotOcr2ImageProcessorPil = None

TILE = 512


def published_recipe(image: Image.Image) -> torch.Tensor:
    """The published steps for one RGB image -> float32 `(num_tiles, 3, 512, 512)` in 0..1."""
    rows, columns = select_tile_grid(image.height, image.width)
    doubled = image.resize((2 * image.width, 2 * image.height), Image.Resampling.BILINEAR)
    planar = torch.from_numpy(np.array(doubled)).permute(2, 0, 1).contiguous()[None]

    def resize(height: int, width: int) -> torch.Tensor:
        return torch.nn.functional.interpolate(planar, size=(height, width), mode="bilinear", antialias=True)[0]

    strips = resize(TILE * rows, TILE * columns).split(TILE, dim=1)
    tiles = [tile for strip in strips for tile in strip.split(TILE, dim=2)]
    if len(tiles) > 1:
        tiles.append(resize(TILE, TILE))
    return torch.stack(tiles) * (1 / 255)


def drawn_page(width: int, height: int) -> Image.Image:
    """An image that is neither flat nor pure noise: gradients with a fine pattern, RGB."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 255 // width, y * 255 // height, (x * 7 + y * 3) % 256], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def peak_extra_mib(call: Callable[[], object]) -> float | None:
    """Peak resident memory of `call` above what was resident before it, result included, in MiB."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    c_library = ctypes.CDLL(None)
    if not hasattr(c_library, "malloc_trim") or not os.access(reset, os.W_OK):
        return None

    def resident(key: str) -> int:
        return int(next(line.split()[1] for line in status.read_text().splitlines() if line.startswith(key)))

    c_library.malloc_trim(0)  # so that memory freed by earlier calls does not hide what this one needs
    reset.write_text("5")  # resets the peak
    before = resident("VmRSS")
    call()
    return round((resident("VmHWM") - before) / 1024, 1)


def measure(width: int, height: int, num_rounds: int) -> dict[str, object]:
    """Compare, then time, the variants on one image."""
    image = drawn_page(width, height)
    processor = NemotronVLImageProcessor()
    variants: dict[str, Callable[[], torch.Tensor]] = {
        "published": lambda: published_recipe(image),
        "ours": lambda: processor(image)["pixel_values"],
        "ours_uint8": lambda: processor(image, do_rescale=False)["pixel_values"],
    }
    expected = variants["published"]()
    if not torch.equal(variants["ours"](), expected) or not torch.equal(
        variants["ours_uint8"]() * (1 / 255), expected
    ):
        raise ValueError(f"Tiles of a {width}x{height} image differ from the published recipe's: nothing to time.")
    if GotOcr2ImageProcessorPil is not None:
        # InternVL's tiling: no doubling, bicubic, mean and std. It gives as many tiles, with other pixels.
        other = GotOcr2ImageProcessorPil(crop_to_patches=True, max_patches=12, size={"height": TILE, "width": TILE})
        variants["got_ocr2_pil"] = lambda: other(image, return_tensors="pt")["pixel_values"]
    timed = compare(variants, peer="published", rounds=num_rounds)
    for name, variant in variants.items():
        timed[name]["peak_extra_mib"] = peak_extra_mib(variant)
    return {"case": f"{width}x{height}", "num_tiles": len(expected), "bit_exact": True, **timed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["1275x1650", "2048x1536", "4000x3000"], help="WIDTHxHEIGHT")
    parser.add_argument("--rounds", type=int, default=11)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sizes = [tuple(map(int, size.split("x"))) for size in arguments.sizes]
    report("tiling", [measure(*size, arguments.rounds) for size in sizes], rounds=arguments.rounds)


if __name__ == "__main__":
    main()
