"""Pictures to tiles: any picture -> `pixel_values` float32 `(num_tiles, 3, image_size, image_size)` in 0..1.

The recipe is that of the released 8B V1 processor, bit for bit: double the picture (bilinear), choose a grid of
tiles for it, resize the doubled picture to that grid (bilinear, antialiased, on uint8), cut the tiles row by row,
append a thumbnail as the last tile unless the grid is 1x1, divide by 255. There is no mean/std: the tower normalises.

The 12B V2 has another recipe, `V2_RECIPE`: no doubling, the grid of the closest aspect ratio, bicubic and antialiased
on float32, and normalised at the end because its tower does not.

The surprise: a doubled picture is never held as a whole. Bands of rows are doubled and at once reduced in width, so
that besides the picture and its tiles about `8 * height * image_size * (columns + 1)` bytes and 24 MB are used.
That gives the numbers of the whole-picture recipe because every bilinear pass works on width first, then on height,
and rounds to uint8 in between; and it needs torch alone (torch's uint8 kernel is the one torchvision calls).
"""

import base64
import copy
import inspect
import io
import math
import operator
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.processing_utils import ImagesKwargs

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# What the published preprocessor_config.json of the 12B V2, told by its norm_mean, leaves to NVIDIA's class.
V2_RECIPE = {
    "upscale": 1,
    "grid_rule": "closest_ratio",
    "interpolation": "bicubic",
    "do_normalize": True,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
}
COVERAGE_CAP = 0.6  # published score: a grid gains nothing by holding more than 60 % of the doubled picture's pixels
MAX_NUM_TILES = 1024  # the candidate list, and with it an absurd configuration, stays small
BAND_BYTES = 1 << 22  # source pixels doubled at once: more leaves the caches, less repeats the filter set-up too often
MAX_NESTING = 100  # lists inside lists of pictures
MAX_TILE_PIXELS = 1 << 30  # of the tiles of one picture: 12.9 GB as float32, before a wrong option takes all memory
MAX_SIDE = 100_000  # pixels; a 1 x 100,000,000 picture passes every limit on area and needs 800 GB on the way

# What Pillow's decoders raise on broken files.
DECODING_ERRORS = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, EOFError),
    *(RuntimeError, AssertionError, struct.error, zlib.error, Image.DecompressionBombError),
)


class NemotronVLImageProcessorKwargs(ImagesKwargs, total=False):
    """Options of one call, beyond transformers' own; `NemotronVLImageProcessor` says what they mean."""

    image_size: int
    max_num_tiles: int
    use_thumbnail: bool
    upscale: int
    grid_rule: str
    interpolation: str
    do_convert_rgb: bool
    patch_size: int
    downsample_ratio: float


# ---------------------------------------------------------------------------------------------------------------------
# Which grid: pure functions of the picture's size
# ---------------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=32)
def candidate_grids(max_num_tiles: int) -> tuple[tuple[int, int], ...]:
    """All grids `(columns, rows)` of at most `max_num_tiles` tiles, in the order that the published code tries.

    That order settles ties: by number of tiles and, within one number, as CPython iterates over the set of all
    grids. It depends on the maximum, so a shorter list is not a prefix of a longer one.

    Raises:
        ValueError: if `max_num_tiles` is not in 1..1024.
    """
    if not 1 <= max_num_tiles <= MAX_NUM_TILES:
        raise ValueError(f"max_num_tiles must be in 1..{MAX_NUM_TILES}, got {max_num_tiles}.")
    grids = set()
    for longer in range(1, max_num_tiles + 1):  # the published triple loop, without the insertions that change nothing
        for shorter in range(1, min(longer, max_num_tiles // longer + 1)):
            grids.add((shorter, longer))
        for shorter in range(1, min(longer, max_num_tiles // longer) + 1):
            grids.add((longer, shorter))
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


def _largest_area(height: int, width: int, image_size: int, grids: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The rule of the 8B V1: coverage of the pixels, capped, times how close the aspect ratios are.

    Evaluated in double precision in the published association: rounding breaks ties.
    """
    area, aspect = width * height, width / height
    best_score, best_grid = -math.inf, (1, 1)
    for columns, rows in grids:
        ratio = columns / rows
        score = min((columns * rows * image_size * image_size) / area, COVERAGE_CAP) * min(
            ratio / aspect, aspect / ratio
        )
        if score > best_score:
            best_score, best_grid = score, (rows, columns)
    return best_grid


def _closest_ratio(height: int, width: int, image_size: int, grids: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The rule of the 12B V2: the closest aspect ratio; of equally close ones a larger grid for a larger picture."""
    area, aspect = width * height, width / height
    smallest_difference, best_grid = math.inf, (1, 1)
    for columns, rows in grids:
        difference = abs(aspect - columns / rows)
        is_large = area > 0.5 * image_size * image_size * columns * rows
        if difference < smallest_difference or (difference == smallest_difference and is_large):
            smallest_difference, best_grid = difference, (rows, columns)
    return best_grid


GRID_RULES = {"area": _largest_area, "closest_ratio": _closest_ratio}


def select_tile_grid(
    height: int,
    width: int,
    *,
    image_size: int = 512,
    max_num_tiles: int = 12,
    upscale: int = 2,
    grid_rule: str = "area",
) -> tuple[int, int]:
    """Choose the grid of tiles for a picture of `height` x `width` pixels.

    Args:
        height, width: size of the picture as given, before the doubling.
        image_size: side of a tile in pixels.
        max_num_tiles: largest number of tiles, thumbnail not counted.
        upscale: 2 doubles the picture first (published), 1 does not (12B V2, vLLM, Megatron-LM).
        grid_rule: "area" (8B V1) or "closest_ratio" (12B V2).

    Returns:
        `(rows, columns)` of the candidate that the rule prefers.

    Raises:
        ValueError: if a side is not positive.
        TypeError: if a side is no whole number.
    """
    height, width = operator.index(height), operator.index(width)  # the area of NumPy's int32 would overflow
    if height < 1 or width < 1:
        raise ValueError(f"A picture needs at least 1x1 pixels, got height={height}, width={width}.")
    return GRID_RULES[grid_rule](upscale * height, upscale * width, image_size, candidate_grids(max_num_tiles))


def count_tiles(
    height: int,
    width: int,
    *,
    image_size: int = 512,
    max_num_tiles: int = 12,
    use_thumbnail: bool = True,
    upscale: int = 2,
    grid_rule: str = "area",
) -> int:
    """Number of tiles of a picture of `height` x `width` pixels, thumbnail included; see `select_tile_grid`."""
    rows, columns = select_tile_grid(
        height, width, image_size=image_size, max_num_tiles=max_num_tiles, upscale=upscale, grid_rule=grid_rule
    )
    return rows * columns + int(use_thumbnail and rows * columns > 1)


def undo_normalization(
    pixel_values: torch.Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> torch.Tensor:
    """Turn tiles normalised as `(pixels - mean) / std` back to 0..1, what the 8B V1 expects.

    InternVL clients send ImageNet-normalised tiles, hence the defaults.

    Args:
        pixel_values: `(..., 3, height, width)`, any float dtype, on any device; not changed.
        mean, std: per channel, in the order red, green, blue.

    Returns:
        A new tensor of the same shape, dtype and device, clamped to 0..1 (half precision overshoots a little).
    """
    scale, shift = (
        torch.tensor(v, dtype=torch.float32, device=pixel_values.device).view(3, 1, 1) for v in (std, mean)
    )
    return (pixel_values.float() * scale + shift).clamp(0, 1).to(pixel_values.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Any input -> an RGB picture: a PIL image of mode RGB, or a uint8 array (height, width, 3)
# ---------------------------------------------------------------------------------------------------------------------


def flatten_images(images: Any, depth: int = 0) -> Iterator[Any]:
    """Yield the pictures of a picture, a list, nested lists or a batched 4-dimensional array, in order.

    Raises:
        ValueError: if lists are nested more than 100 levels deep.
    """
    if depth > MAX_NESTING:
        raise ValueError(f"Lists of pictures may be nested {MAX_NESTING} levels deep, these go deeper. Flatten them.")
    if isinstance(images, (list, tuple)) or (isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4):
        for image in images:
            yield from flatten_images(image, depth + 1)
    else:
        yield images


def load_picture(
    image: Any, *, do_convert_rgb: bool = True, input_data_format: str | None = None
) -> Image.Image | np.ndarray:
    """Read whatever a caller gives as a picture into RGB; see `NemotronVLImageProcessor` for the rules.

    Returns:
        A decoded PIL image of mode RGB, or a uint8 array `(height, width, 3)`, perhaps a view of the caller's.

    Raises:
        ValueError: if a file cannot be decoded completely, or an array is ambiguous, out of range or empty.
        TypeError: if `image` is of no supported kind.
    """
    if isinstance(image, (np.ndarray, torch.Tensor)):
        picture = _array_to_rgb(image, do_convert_rgb, input_data_format)
    elif isinstance(image, (str, os.PathLike, bytes, bytearray, memoryview, Image.Image)) or hasattr(image, "read"):
        try:
            picture = _decode(image) if isinstance(image, Image.Image) else _decode_file(image)
            picture = _pil_to_rgb(picture, do_convert_rgb)
        except DECODING_ERRORS as error:
            shown = f"{image[:60]!r}..." if isinstance(image, (str, bytes)) and len(image) > 60 else repr(image)
            raise ValueError(
                f"The picture {shown} cannot be used: {str(error) or type(error).__name__}. Give a complete picture "
                "that Pillow decodes (PNG, JPEG, WebP, TIFF, ...); render the pages of a PDF to pictures first."
            ) from error
    else:
        raise TypeError(
            f"A picture is a PIL image, a NumPy array, a torch tensor, a path, a file opened in binary mode, the bytes "
            f"or the base64 text of a picture file, or a list of those; got {type(image).__name__}."
        )
    _check_size(*_picture_size(picture))
    return picture


def _check_size(height: int, width: int) -> None:
    if not (0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE):
        raise ValueError(
            f"The sides of a picture must be in 1..{MAX_SIDE} pixels, got height={height}, width={width}. "
            "Cut a longer one into pages."
        )


def _picture_size(picture: Image.Image | np.ndarray) -> tuple[int, int]:
    return (picture.height, picture.width) if isinstance(picture, Image.Image) else picture.shape[:2]


def _decode(image: Image.Image) -> Image.Image:
    if image.format == "EPS":
        raise ValueError("EPS is a program for Ghostscript, which is not run; convert it to PNG first")
    _check_size(image.height, image.width)
    image.load()
    return image


def _decode_file(source: Any) -> Image.Image:
    """Decode a path, `file:` or `data:` URL, base64 text, bytes or file; first frame, upright by its EXIF tag."""
    if isinstance(source, str):
        if source.startswith(("http://", "https://")):
            raise ValueError("pictures are not fetched from the network; download it and pass the path or the bytes")
        if source.startswith("file://"):
            source = url2pathname(urlsplit(source).path)
        elif source.startswith("data:") or not os.path.isfile(source):
            encoded = source.partition(",")[2] if source.startswith("data:") else source
            try:
                source = base64.b64decode("".join(encoded.split()), validate=True)
            except ValueError as error:
                raise ValueError("it is neither an existing file nor base64 text") from error
    if isinstance(source, str | os.PathLike) and not os.path.isfile(source):  # a pipe or device would never end
        raise ValueError("there is no such file")
    if hasattr(source, "read"):
        return _decode_open_file(source)
    return _decode_upright(source if isinstance(source, str | os.PathLike) else io.BytesIO(source))


def _decode_open_file(file: Any) -> Image.Image:
    """Decode a file object from its start, and leave its position as it was."""
    if not isinstance(file.read(0), bytes):
        raise ValueError("the file is open in text mode; open it in binary mode, 'rb'")
    if not file.seekable():  # a pipe or socket might never end
        raise ValueError("the file is a stream that cannot be read twice; pass what it held: file.read()")
    position = file.tell()
    try:
        return _decode_upright(file)
    finally:
        file.seek(position)


def _decode_upright(file: Any) -> Image.Image:
    with Image.open(file) as image:
        ImageOps.exif_transpose(_decode(image), in_place=True)
    return image


def _pil_to_rgb(image: Image.Image, do_convert_rgb: bool) -> Image.Image | np.ndarray:
    transparent = image.has_transparency_data
    if image.mode == "RGB" and not (transparent and do_convert_rgb):
        return image
    if not do_convert_rgb:
        raise ValueError(f"the model takes RGB, its mode is {image.mode!r} and do_convert_rgb is False")
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return _deep_grey_to_rgb(np.asarray(image), image.mode)
    if not transparent:
        return image.convert("RGB")
    if image.mode == "La":  # Pillow leaves premultiplied grey in two steps only
        image = image.convert("LA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _deep_grey_to_rgb(values: np.ndarray, mode: str) -> np.ndarray:
    """Scale 16-bit, 32-bit and float grey `(height, width)` to 0..255; the white point is that of the mode."""
    low, high = (values.min(), values.max()) if values.size else (0, 0)
    white = 255 if mode == "I" and high <= 255 else 65535
    if mode == "F":
        white = 1 if high <= 1 else 255
    if not (low >= 0 and high <= white):
        raise ValueError(f"its mode {mode!r} needs values in 0..{white}, got {low}..{high}; rescale it to 0..255")
    grey = np.rint(values * np.float32(255 / white)).astype(np.uint8)
    return np.broadcast_to(grey[..., None], (*grey.shape, 3))


def _array_to_rgb(array: np.ndarray | torch.Tensor, do_convert_rgb: bool, input_data_format: str | None) -> np.ndarray:
    """Grey `(H, W)`, or `(H, W, C)` or `(C, H, W)` with 1, 3 or 4 channels; uint8, or float in 0..1 -> uint8 RGB."""
    if isinstance(array, torch.Tensor):
        if array.is_meta or array.is_nested:
            raise TypeError("A picture tensor must hold its pixels; this one is on the meta device, or nested.")
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()
    array = _channels_last_view(array, input_data_format)
    if np.issubdtype(array.dtype, np.floating) and array.size:
        low, high = float(array.min()), float(array.max())
        if not (low >= -0.5 / 255 and high <= 1 + 0.5 / 255):  # not: so that NaN is refused as well
            raise ValueError(
                f"A float picture must lie in 0..1, got {low:g}..{high:g}. Divide levels in 0..255 by 255 or pass them "
                "as uint8; undo_normalization takes a mean and standard deviation off again."
            )
        array = np.rint(array * 255).clip(0, 255).astype(np.uint8)
    elif array.dtype != np.uint8 and array.size:
        raise TypeError(
            f"A picture array must be uint8 in 0..255 or float in 0..1, got {array.dtype}. Convert it, for example "
            "16-bit levels with (array // 257).astype('uint8')."
        )
    num_channels = array.shape[-1]
    if num_channels == 4 and array.size:
        return np.asarray(_pil_to_rgb(Image.fromarray(np.ascontiguousarray(array)), do_convert_rgb))
    if num_channels == 1 and not do_convert_rgb:
        raise ValueError("The model takes RGB, the array has 1 channel and do_convert_rgb is False.")
    return np.broadcast_to(array, (*array.shape[:2], 3)) if num_channels == 1 else array


def _channels_last_view(array: np.ndarray, input_data_format: str | None) -> np.ndarray:
    """View an array as `(height, width, channels)`, channels 1, 3 or 4, or say why that is not possible."""
    if array.ndim == 2:
        return array[..., None]
    fits = [array.ndim == 3 and array.shape[axis] in (1, 3, 4) for axis in (0, -1)]
    wanted = {"channels_first": (True, False), "channels_last": (False, True), None: (True, True)}
    name = getattr(input_data_format, "value", input_data_format)
    if name not in wanted:
        raise ValueError(f"input_data_format must be 'channels_first' or 'channels_last', got {input_data_format!r}.")
    first, last = (fit and want for fit, want in zip(fits, wanted[name], strict=True))
    if first == last:
        problem = "can be read either way" if first else f"does not fit input_data_format={name!r}"
        raise ValueError(
            f"A picture array of shape {array.shape} {problem}. It must be (height, width), or 1, 3 or 4 channels "
            "first or last; input_data_format='channels_first' or 'channels_last' says which."
        )
    return array.transpose(1, 2, 0) if first else array


# ---------------------------------------------------------------------------------------------------------------------
# An RGB picture -> uint8 tiles
# ---------------------------------------------------------------------------------------------------------------------


def _channels_last_empty(height: int, width: int, num_channels: int, dtype: type = np.uint8) -> torch.Tensor:
    # NumPy asks the kernel for huge pages, torch does not: first touch of a big buffer costs a third.
    return torch.from_numpy(np.empty((1, height, width, num_channels), dtype)).permute(0, 3, 1, 2)


def _resize_into(out: torch.Tensor, image: torch.Tensor, interpolation: str = "bilinear") -> torch.Tensor:
    """Resize `(1, channels, height, width)`, antialiased, to the size of `out`.

    uint8 or float32, as both are; the kernels are fast if both are channels-last.
    """
    kernel = torch.ops.aten._upsample_bilinear2d_aa
    if interpolation == "bicubic":
        kernel = torch.ops.aten._upsample_bicubic2d_aa
    kernel.out(image, out.shape[2:], False, None, None, out=out)
    return out


def _upscaled_bands(picture: Image.Image | np.ndarray, upscale: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield `(first row, band)` of the upscaled picture, top to bottom; a band lives until the next one is asked for.

    Doubling needs one row above and one below a band; what those rows double to is left out. Bands of a PIL image
    have a meaningless fourth channel: Pillow stores it, and copying it is cheaper than dropping it.
    """
    height, width = _picture_size(picture)
    num_channels = 4 if isinstance(picture, Image.Image) else 3
    band_height = min(height, max(1, BAND_BYTES // (num_channels * width)))
    margin = 1 if upscale > 1 else 0
    source = _channels_last_empty(band_height + 2 * margin, width, num_channels)
    upscaled = _channels_last_empty(upscale * source.shape[2], upscale * width, num_channels) if margin else source
    for start in range(0, height, band_height):
        stop = min(start + band_height, height)
        top, bottom = max(start - margin, 0), min(stop + margin, height)
        rows = source[:, :, : bottom - top]
        _copy_rows(picture, top, rows[0].permute(1, 2, 0).numpy())
        band = _resize_into(upscaled[:, :, : upscale * (bottom - top)], rows) if margin else rows
        yield upscale * start, band[:, :, upscale * (start - top) : upscale * (stop - top)]


def _copy_rows(picture: Image.Image | np.ndarray, top: int, out: np.ndarray) -> None:
    """Copy the rows of a PIL image with 4 channels, from `top` on, to `out`, uint8 `(num_rows, width, 3)`."""
    num_rows, width, _ = out.shape
    if isinstance(picture, np.ndarray):
        out[...] = picture[top : top + num_rows]
        return
    # Pillow pastes straight into our memory; its public ways to read pixels copy them three or four times.
    target = Image.frombuffer("RGBX", (width, num_rows), out, "raw", "RGBX", 0, 1)
    target.im.paste(picture.im, (0, -top, width, picture.height - top))


def cut_tiles(
    picture: Image.Image | np.ndarray,
    *,
    image_size: int = 512,
    max_num_tiles: int = 12,
    use_thumbnail: bool = True,
    upscale: int = 2,
    grid_rule: str = "area",
    interpolation: str = "bilinear",
) -> list[torch.Tensor]:
    """Cut an RGB picture into tiles.

    Args:
        picture: PIL image of mode RGB or uint8 array `(height, width, 3)`.
        image_size, max_num_tiles, upscale, grid_rule: see `select_tile_grid`.
        use_thumbnail: append the whole picture as the last tile unless the grid is 1x1.
        interpolation: "bilinear" rounds to uint8, "bicubic" stays float32 and may overshoot 0..255.

    Returns:
        tiles `(3, image_size, image_size)` of levels on the CPU, row by row; views of shared buffers, not contiguous.
    """
    height, width = _picture_size(picture)
    rows, columns = select_tile_grid(
        height, width, image_size=image_size, max_num_tiles=max_num_tiles, upscale=upscale, grid_rule=grid_rule
    )
    grids = [(rows, columns)] + ([(1, 1)] if use_thumbnail and rows * columns > 1 else [])
    dtype = np.float32 if interpolation == "bicubic" else np.uint8
    narrowed = []
    for first_row, band in _upscaled_bands(picture, upscale):
        band = band.float() if dtype is np.float32 else band
        if not narrowed:
            shapes = [(upscale * height, image_size * own_columns, band.shape[1]) for _, own_columns in grids]
            narrowed = [_channels_last_empty(*shape, dtype) for shape in shapes]
        for target in narrowed:
            _resize_into(target[:, :, first_row : first_row + band.shape[2]], band, interpolation)
    tiles = []
    for (rows, columns), image in zip(grids, narrowed, strict=True):
        canvas = _channels_last_empty(image_size * rows, image_size * columns, image.shape[1], dtype)
        for strip in _resize_into(canvas, image, interpolation)[0, :3].split(image_size, dim=1):
            tiles += strip.split(image_size, dim=2)
    return tiles


# ---------------------------------------------------------------------------------------------------------------------
# The processor
# ---------------------------------------------------------------------------------------------------------------------


class NemotronVLImageProcessor(BaseImageProcessor):
    """Turns pictures into the tiles of a Nemotron Nano VL model. Every option can be given here and per call.

    What counts as a picture, alone, in a list or in nested lists (taken in order):

    * PIL images of every mode, as the pixels they hold: like the published code, no EXIF orientation is applied
      (`PIL.ImageOps.exif_transpose` does), and of several frames the current one is used. Transparency is composited
      on white. I;16 is read as 0..65535; I too, or as 0..255 if nothing is above 255; F as 0..1, or as 0..255 if
      something is above 1. An image that was not decoded yet is decoded here, so decode it before sharing it
      between threads.
    * Files: a path, a `file:` or `data:` URL, base64 text, bytes, or a file object (binary and seekable; it is read
      from its start, its position stays). First frame, turned upright by the EXIF orientation, as transformers' own
      `load_image` does. Nothing is fetched from the network, EPS is not run; Pillow's limit on the number of pixels
      and ours of 100,000 on a side hold before anything is decoded.
    * NumPy arrays and torch tensors `(H, W)`, `(H, W, C)` or `(C, H, W)`, also batched in four dimensions, with 1, 3
      or 4 channels (RGBA); uint8 in 0..255 or float in 0..1. Shapes that can be read either way need
      `input_data_format`.

    Args:
        image_size: side of a tile in pixels, a multiple of `patch_size / downsample_ratio`.
        max_num_tiles: most tiles of one picture, thumbnail not counted.
        use_thumbnail: append the whole picture as one more tile when it was cut into several.
        upscale: 2 doubles every picture first, as published; 1 does not, as in the 12B V2, vLLM and Megatron-LM.
        do_rescale: multiply the levels 0..255 by `rescale_factor`; False returns them as they are, as uint8 (unless
            `do_normalize` makes them float32), a quarter of the bytes to carry.
        rescale_factor: 1/255 gives 0..1.
        do_normalize: subtract `image_mean` and divide by `image_std` (per channel), for models whose tower does not.
        image_mean, image_std: three numbers each, on the scale of the rescaled values.
        do_convert_rgb: convert what is not RGB; False raises a ValueError for such a picture.
        device: where the result lives; tiles travel there as uint8. Not saved.
        patch_size, downsample_ratio: of the model, for counting its image tokens.
        grid_rule: "area" prefers grids that hold the picture's pixels (8B V1), "closest_ratio" its aspect ratio (12B
            V2).
        interpolation: "bilinear" on uint8 (8B V1) or "bicubic" on float32 (12B V2), which overshoots a little.
        kwargs: unknown configuration keys are kept and saved again.
    """

    model_input_names = ["pixel_values", "num_patches"]
    valid_kwargs = NemotronVLImageProcessorKwargs

    def __init__(
        self,
        image_size: int = 512,
        max_num_tiles: int = 12,
        use_thumbnail: bool = True,
        upscale: int = 2,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = False,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
        do_convert_rgb: bool = True,
        device: str | torch.device | None = None,
        patch_size: int = 16,
        downsample_ratio: float = 0.5,
        grid_rule: str = "area",
        interpolation: str = "bilinear",
        **kwargs: Any,
    ):
        # A published checkpoint names its own class here; `to_dict` names ours.
        kept = {name: value for name, value in kwargs.items() if name not in ("auto_map", "image_processor_type")}
        hidden = [name for name in kept if callable(getattr(type(self), name, None)) or name.startswith("__")]
        if hidden:
            raise ValueError(f"The configuration keys {hidden} would hide methods of this class; remove them.")
        super().__init__(**kept)
        self.image_size = image_size
        self.max_num_tiles = max_num_tiles
        self.use_thumbnail = use_thumbnail
        self.upscale = upscale
        self.grid_rule = grid_rule
        self.interpolation = interpolation
        self.do_rescale = do_rescale
        self.rescale_factor = rescale_factor
        self.do_normalize = do_normalize
        self.image_mean = image_mean
        self.image_std = image_std
        self.do_convert_rgb = do_convert_rgb
        self.device = device
        self.patch_size = patch_size
        self.downsample_ratio = downsample_ratio
        checked = self._options({})
        for name in WHOLE_NUMBERS:
            setattr(self, name, checked[name])

    def __call__(self, images: Any, **kwargs: Any) -> BatchFeature:
        """See `preprocess`."""
        return self.preprocess(images, **kwargs)

    def preprocess(
        self,
        images: Any,
        *,
        return_tensors: str | None = None,
        input_data_format: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Cut pictures into tiles.

        Args:
            images: a picture or (nested) lists of pictures; an empty list gives an empty result.
            return_tensors: None, "pt" or "np".
            input_data_format: "channels_first" or "channels_last", for arrays.
            kwargs: options of this call; None means the processor's own value. `use_fast`, `disable_grouping`,
                `data_format="channels_first"` and InternVL's `crop_to_patches=True` are accepted from other clients
                and change nothing.

        Returns:
            `pixel_values`: `(num_tiles, 3, image_size, image_size)`, float32 in 0..1 by default, the tiles of all
            pictures one after the other, stacked whatever `return_tensors` says. `num_patches`: tiles of each
            picture, thumbnail included: a list, or with `return_tensors` an int64 tensor or array.

        Raises:
            ValueError, TypeError: for unreadable pictures (see `load_picture`) and wrong options.
        """
        options = self._options(kwargs)
        return_tensors = getattr(return_tensors, "value", return_tensors)
        if return_tensors not in (None, "pt", "np"):
            raise ValueError(f"return_tensors must be None, 'pt' or 'np', got {return_tensors!r}.")
        pictures = [
            load_picture(image, do_convert_rgb=options["do_convert_rgb"], input_data_format=input_data_format)
            for image in flatten_images(images)
        ]
        tiling = {**_grid_options(options), "interpolation": options["interpolation"]}
        num_patches = [count_tiles(*_picture_size(picture), **_grid_options(options)) for picture in pictures]
        pixel_values = self._allocate(sum(num_patches), options)
        targets = pixel_values.split(num_patches) if pictures else ()
        for picture, target in zip(pictures, targets, strict=True):
            self._fill(target, cut_tiles(picture, **tiling), options)
        if return_tensors == "np":
            pixel_values, num_patches = pixel_values.cpu().numpy(), np.array(num_patches, np.int64)
        elif return_tensors == "pt":
            num_patches = torch.tensor(num_patches, dtype=torch.int64)
        return BatchFeature({"pixel_values": pixel_values, "num_patches": num_patches})

    @staticmethod
    def _allocate(num_tiles: int, options: dict[str, Any]) -> torch.Tensor:
        shape = (num_tiles, 3, options["image_size"], options["image_size"])
        is_float = options["do_rescale"] or options["do_normalize"] or options["interpolation"] == "bicubic"
        dtype = torch.float32 if is_float else torch.uint8
        if options["device"].type == "cpu":  # huge pages, as in _channels_last_empty
            return torch.from_numpy(np.empty(shape, np.float32 if dtype == torch.float32 else np.uint8))
        return torch.empty(shape, dtype=dtype, device=options["device"])

    @staticmethod
    def _fill(target: torch.Tensor, tiles: Sequence[torch.Tensor], options: dict[str, Any]) -> None:
        """Write the tiles of one picture to their place, rescaled there: the same float32 products on every device."""
        levels = torch.stack(list(tiles)).to(target.device) if target.device.type != "cpu" else tiles
        for tile, tile_levels in zip(target, levels, strict=True):
            tile.copy_(tile_levels)
            if options["do_rescale"]:
                tile.mul_(options["rescale_factor"])
        if options["do_normalize"]:
            mean, std = (torch.tensor(options[name], dtype=torch.float32) for name in ("image_mean", "image_std"))
            target.sub_(mean.view(3, 1, 1).to(target.device)).div_(std.view(3, 1, 1).to(target.device))

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict[str, Any] | None = None) -> int:
        """Tiles of a picture of `height` x `width` pixels, thumbnail included, under the options of a call."""
        options = self._options(images_kwargs or {})
        return count_tiles(height, width, **_grid_options(options))

    def get_number_of_image_tokens(self, height: int, width: int, images_kwargs: dict[str, Any] | None = None) -> int:
        """Image tokens of a picture of `height` x `width` pixels, the `<img>` and `</img>` around them not counted."""
        options = self._options(images_kwargs or {})
        tokens_per_side = options["image_size"] // _pixels_per_token(options)
        return self.get_number_of_image_patches(height, width, images_kwargs) * tokens_per_side**2

    def _options(self, given: dict[str, Any]) -> dict[str, Any]:
        """The processor's options with those of one call put over them, checked; `device` becomes a torch.device."""
        given = {name: value for name, value in given.items() if value is not None}
        for name in ("use_fast", "disable_grouping", "return_tensors", "input_data_format"):
            given.pop(name, None)
        if given.pop("crop_to_patches", True) is not True:
            raise ValueError("Pictures are always cut into tiles; for one tile a picture pass max_num_tiles=1.")
        data_format = given.pop("data_format", "channels_first")
        if getattr(data_format, "value", data_format) != "channels_first":
            raise ValueError(f"pixel_values are channels_first, data_format={data_format!r} is not supported.")
        unknown = sorted(set(given) - set(OPTIONS))
        if unknown:
            raise TypeError(f"Unknown options {unknown} for {type(self).__name__}. It knows {sorted(OPTIONS)}.")
        options = {name: given.get(name, getattr(self, name)) for name in OPTIONS}
        options |= {name: _whole_number(name, options[name]) for name in WHOLE_NUMBERS}
        _check_options(options)
        options["device"] = torch.device(options["device"] or "cpu")
        return options

    @classmethod
    def get_image_processor_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Read preprocessor_config.json as transformers does, and say so if it holds something else than a dict."""
        try:
            values, unused = super().get_image_processor_dict(pretrained_model_name_or_path, **kwargs)
        except (AttributeError, LookupError, TypeError, RecursionError) as error:
            raise ValueError(f"The preprocessor_config.json of {pretrained_model_name_or_path} is damaged.") from error
        if not isinstance(values, dict):
            raise ValueError(f"The preprocessor_config.json of {pretrained_model_name_or_path} holds no dict.")
        return values, unused

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build a processor from a configuration and overriding options, alike on every version of transformers.

        A published file of the 12B V2 says `norm_mean` and `norm_std`; it gets `V2_RECIPE`.

        Returns:
            The processor, or `(processor, unused kwargs)` with `return_unused_kwargs=True`. Options that are null in
            the configuration take their defaults.
        """
        return_unused = kwargs.pop("return_unused_kwargs", False)
        image_processor_dict = _read_published(image_processor_dict)
        given = {**image_processor_dict, **{name: value for name, value in kwargs.items() if name in OPTIONS}}
        processor = cls(**{name: value for name, value in given.items() if value is not None or name not in OPTIONS})
        unused = {name: value for name, value in kwargs.items() if name not in OPTIONS}
        return (processor, unused) if return_unused else processor

    def to_dict(self) -> dict[str, Any]:
        """The configuration to save.

        `image_processor_type` is left out: it makes AutoImageProcessor of transformers 4.57 ask for torchvision.
        """
        saved = {name: value for name, value in self.__dict__.items() if not name.startswith("_") and name != "device"}
        saved = {name: value for name, value in saved.items() if value is not None or name not in OPTIONS}
        saved |= {name: _whole_number(name, saved[name]) for name in WHOLE_NUMBERS}  # may be set on the object, too
        own_code = {"AutoImageProcessor": "image_processing.NemotronVLImageProcessor"}
        saved["auto_map"] = {**own_code, **saved.get("auto_map", {})}  # a processor adds its own entry while saving
        return {n: list(value) if isinstance(value, tuple) else copy.deepcopy(value) for n, value in saved.items()}


OPTIONS = tuple(inspect.signature(NemotronVLImageProcessor).parameters)[:-1]  # all but **kwargs
CHOICES: dict[str, dict[Any, str]] = {
    "upscale": {2: "2 (published)", 1: "1 (no doubling)"},
    "grid_rule": {"area": "'area' (8B V1)", "closest_ratio": "'closest_ratio' (12B V2)"},
    "interpolation": {"bilinear": "'bilinear' (8B V1)", "bicubic": "'bicubic' (12B V2)"},
}
WHOLE_NUMBERS = ("image_size", "max_num_tiles", "upscale", "patch_size")
GRID_OPTIONS = ("image_size", "max_num_tiles", "use_thumbnail", "upscale", "grid_rule")


def _read_published(configuration: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration with what a published file of the 12B V2 leaves out, in transformers' words."""
    if "norm_mean" not in configuration:
        return configuration
    spelled = {"norm_mean": "image_mean", "norm_std": "image_std"}
    stated = {spelled.get(name, name): value for name, value in configuration.items() if value is not None}
    return {**V2_RECIPE, **stated}


def _grid_options(options: dict[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in GRID_OPTIONS}


def _pixels_per_token(options: dict[str, Any]) -> int:
    return options["patch_size"] * round(1 / options["downsample_ratio"])


def _whole_number(name: str, value: Any) -> int:
    """Return an int for what stands for one, NumPy's integers included; True and False do not."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:  # the same answer
        pass
    raise TypeError(f"{name} must be an int, got {value!r}.")


def _check_options(options: dict[str, Any]) -> None:
    """Raise TypeError or ValueError for options that cannot be honoured."""
    for name in ("use_thumbnail", "do_rescale", "do_normalize", "do_convert_rgb"):
        if type(options[name]) is not bool:
            raise TypeError(f"{name} must be True or False, got {options[name]!r}.")
    ratio, factor = options["downsample_ratio"], options["rescale_factor"]
    if not isinstance(ratio, (int, float)) or not 1e-9 < ratio <= 1:
        raise ValueError(f"downsample_ratio must be a number above 1e-9 and at most 1, got {ratio!r}.")
    if not isinstance(factor, (int, float)) or not 1e-9 < abs(factor) <= 1e9:
        raise ValueError(f"rescale_factor must be a number of a size between 1e-9 and 1e9, got {factor!r}.")
    _check_choices(options)
    candidate_grids(options["max_num_tiles"])
    if options["max_num_tiles"] * options["image_size"] ** 2 > MAX_TILE_PIXELS:
        raise ValueError(
            f"max_num_tiles={options['max_num_tiles']} tiles of image_size={options['image_size']} px have more than "
            f"{MAX_TILE_PIXELS} pixels. Use fewer or smaller tiles."
        )
    if options["patch_size"] < 1 or options["image_size"] < 1 or options["image_size"] % _pixels_per_token(options):
        raise ValueError(
            f"image_size={options['image_size']} must be a positive multiple of patch_size / downsample_ratio = "
            f"{options['patch_size']} / {options['downsample_ratio']} pixels per image token."
        )
    if options["do_normalize"]:
        _check_statistics(options["image_mean"], options["image_std"])


def _check_choices(options: dict[str, Any]) -> None:
    for name, choices in CHOICES.items():
        if options[name] not in tuple(choices):
            raise ValueError(f"{name} must be {' or '.join(choices.values())}, got {options[name]!r}.")


def _check_statistics(mean: Any, std: Any) -> None:
    for name, values in (("image_mean", mean), ("image_std", std)):
        if not isinstance(values, (list, tuple)) or len(values) != 3 or not all(map(math.isfinite, values)):
            raise ValueError(f"do_normalize needs {name} as three numbers, got {values!r}.")
    if not all(std):
        raise ValueError(f"image_std must not contain 0, got {std!r}.")


NemotronVLImageProcessor.register_for_auto_class("AutoImageProcessor")
