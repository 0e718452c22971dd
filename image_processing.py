"""Images to tiles: any image -> `pixel_values` float32 `(num_tiles, 3, image_size, image_size)` in 0..1.

The recipe is that of the released 8B V1 processor, bit for bit: double the image (bilinear), choose a grid of tiles
for it, resize the doubled image to that grid (bilinear, antialiased, on uint8), cut the tiles row by row, append a
thumbnail as the last tile unless the grid is 1x1, divide by 255. There is no mean/std: the tower normalises.

The 12B V2 has another recipe: no doubling, the grid of the closest aspect ratio, bicubic and antialiased on float32,
and normalised at the end because its tower does not normalise.
"""

import contextlib
import copy
import inspect
import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

from .pictures import Page, RGBImage, flatten_images, height_and_width, is_page, load_image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
COVERAGE_CAP = 0.6  # published score: a grid gains nothing by holding more than 60 % of the doubled image's pixels
MAX_NUM_TILES = 1024  # the candidate list, and with it an absurd configuration, stays small
MAX_TILE_PIXELS = 1 << 30  # of the tiles of one image: 12.9 GB as float32, before a wrong option takes all memory
TOKENS_AROUND_IMAGE = 2  # <img> and </img>
BAND_BYTES = 1 << 22  # source pixels doubled at once: more leaves the caches, less repeats the filter set-up too often

# The values of the 8B V1 and of the 12B V2; there are no others.
CHOICES = {"upscale": (2, 1), "grid_rule": ("area", "closest_ratio"), "interpolation": ("bilinear", "bicubic")}


# ---------------------------------------------------------------------------------------------------------------------
# The tiling options, and the grid they give: pure functions of the image's size
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tiling:
    """How an image is cut into tiles. The defaults are the recipe of the 8B V1.

    Args:
        image_size: side of a tile in pixels.
        max_num_tiles: largest number of tiles of one image, thumbnail not counted.
        use_thumbnail: append the whole image as one more tile when it was cut into several.
        upscale: 2 doubles every image first, as published; 1 does not, as in the 12B V2, vLLM and Megatron-LM.
        grid_rule: "area" prefers grids that hold the image's pixels (8B V1), "closest_ratio" its proportions (12B V2).
        interpolation: "bilinear" on uint8 (8B V1) or "bicubic" on float32 (12B V2), which overshoots a little.

    Raises:
        TypeError, ValueError: for an option of the wrong type, or out of range.
    """

    image_size: int = 512
    max_num_tiles: int = 12
    use_thumbnail: bool = True
    upscale: int = 2
    grid_rule: str = "area"
    interpolation: str = "bilinear"

    def __post_init__(self):
        for name in ("image_size", "max_num_tiles", "upscale"):  # to int: products of NumPy's int32 overflow
            object.__setattr__(self, name, _whole_number(name, getattr(self, name)))
        _check_bool("use_thumbnail", self.use_thumbnail)
        candidate_grids(self.max_num_tiles)
        for name, (v1, v2) in CHOICES.items():
            if getattr(self, name) not in (v1, v2):
                raise ValueError(f"{name} must be {v1!r} (8B V1) or {v2!r} (12B V2), got {getattr(self, name)!r}.")
        if self.image_size < 1 or self.max_num_tiles * self.image_size**2 > MAX_TILE_PIXELS:
            raise ValueError(
                f"max_num_tiles={self.max_num_tiles} tiles of image_size={self.image_size} px have more than "
                f"{MAX_TILE_PIXELS} pixels, or none. Use fewer or smaller tiles of at least 1 px."
            )


def _whole_number(name: str, value: Any) -> int:
    """Return an int for what stands for one, NumPy's integers included; True and False do not."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:  # the same answer
        pass
    raise TypeError(f"{name} must be an int, got {value!r}.")


def _check_bool(name: str, value: Any) -> None:
    if type(value) is not bool:
        raise TypeError(f"{name} must be True or False, got {value!r}.")


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
    """The rule of the 12B V2: the closest aspect ratio; of equally close ones a larger grid for a larger image."""
    area, aspect = width * height, width / height
    smallest_difference, best_grid = math.inf, (1, 1)
    for columns, rows in grids:
        difference = abs(aspect - columns / rows)
        is_large = area > 0.5 * image_size * image_size * columns * rows
        if difference < smallest_difference or (difference == smallest_difference and is_large):
            smallest_difference, best_grid = difference, (rows, columns)
    return best_grid


GRID_RULES = {"area": _largest_area, "closest_ratio": _closest_ratio}
V1_TILING = Tiling()
V2_TILING = Tiling(upscale=1, grid_rule="closest_ratio", interpolation="bicubic")
# The options in which the 12B V2 differs. Its published preprocessor_config.json leaves them to NVIDIA's class.
V2_RECIPE = {name: getattr(V2_TILING, name) for name in CHOICES}
V2_RECIPE |= {"do_normalize": True, "image_mean": CLIP_MEAN, "image_std": CLIP_STD}


def recipe_of(config: Any) -> dict[str, Any]:
    """Return the options of an image processor for the model that a config describes, where they are not the defaults.

    Args:
        config: a `NemotronVLConfig`, or that of the 12B V2, whose tower takes normalised tiles.
    """
    recipe = {"image_size": config.force_image_size, "patch_size": config.patch_size}
    recipe["downsample_ratio"] = config.downsample_ratio
    if config.vision_config.external_normalization:
        recipe |= {**V2_RECIPE, "image_mean": config.norm_mean, "image_std": config.norm_std}
    return recipe


def select_tile_grid(height: int, width: int, tiling: Tiling = V1_TILING, **changes: Any) -> tuple[int, int]:
    """Choose the grid of tiles for an image of `height` x `width` pixels.

    Args:
        height, width: size of the image as given, before the doubling.
        tiling: how images are cut into tiles.
        changes: options of `tiling` to replace, for example `max_num_tiles=4`.

    Returns:
        `(rows, columns)` of the candidate that the rule prefers.

    Raises:
        ValueError: if a side is not positive, or an option is out of range.
        TypeError: if a side is not a whole number, or for an unknown option.
    """
    tiling = replace(tiling, **changes) if changes else tiling
    height, width = operator.index(height), operator.index(width)  # the area of NumPy's int32 would overflow
    if height < 1 or width < 1:
        raise ValueError(f"An image needs at least 1x1 pixels, got height={height}, width={width}.")
    rule, grids = GRID_RULES[tiling.grid_rule], candidate_grids(tiling.max_num_tiles)
    return rule(tiling.upscale * height, tiling.upscale * width, tiling.image_size, grids)


def count_tiles(height: int, width: int, tiling: Tiling = V1_TILING, **changes: Any) -> int:
    """Number of tiles of an image of `height` x `width` pixels, thumbnail included; see `select_tile_grid`."""
    tiling = replace(tiling, **changes) if changes else tiling
    return sum(rows * columns for rows, columns in _grids(height, width, tiling))


def _grids(height: int, width: int, tiling: Tiling) -> list[tuple[int, int]]:
    """The grid of an image, `(rows, columns)`, and that of its thumbnail, `(1, 1)`, if it gets one."""
    rows, columns = select_tile_grid(height, width, tiling)
    return [(rows, columns), (1, 1)] if tiling.use_thumbnail and rows * columns > 1 else [(rows, columns)]


def page_tiling(page: Page, tiling: Tiling = V1_TILING) -> tuple[tuple[int, int], Tiling]:
    """Return height and width in pixels at which a page of a document is drawn, and the tiling for that image.

    A page of a PDF is drawn as large as the grid of its tiles, which is chosen for the page at 150 dpi: A4 fills 12
    tiles, 1536 x 2048 pixels, and no pixel is drawn that is not used. Such an image would get more tiles than the page
    if the page is small, so the tiling is held to those of the page.
    """
    if not page.is_scalable:
        return page.natural_size, tiling
    rows, columns = select_tile_grid(*page.natural_size, tiling)
    return (rows * tiling.image_size, columns * tiling.image_size), replace(tiling, max_num_tiles=rows * columns)


def render_page(page: Page, tiling: Tiling = V1_TILING) -> RGBImage:
    """Return the image of a page of a document that its tiles are cut from; see `page_tiling`."""
    return page.render(*page_tiling(page, tiling)[0]) if page.is_scalable else page.render()


def natural_size(image: RGBImage | Page) -> tuple[int, int]:
    """Return the height and width in pixels by which the tiles of an image, or of a page, are chosen."""
    return image.natural_size if is_page(image) else height_and_width(image)


class PagePlan(NamedTuple):
    """How images share a context.

    Attributes:
        max_num_tiles: of each image.
        tiles: of each image, thumbnail included.
        num_tokens: of all images, with the two tokens around each.
        fits: whether that leaves room for prompt and answer.
    """

    max_num_tiles: int
    tiles: list[int]
    num_tokens: int
    fits: bool


def plan_pages(
    sizes: Sequence[tuple[int, int]],
    tiling: Tiling = V1_TILING,
    *,
    context_length: int = 16_384,
    answer_tokens: int = 1024,
    prompt_tokens: int = 0,
    tokens_per_tile: int = 256,
    tokens_around_image: int = TOKENS_AROUND_IMAGE,
) -> PagePlan:
    """Plan how many tiles each of several images gets, so that all fit a context with the prompt and the answer.

    Args:
        sizes: `(height, width)` in pixels of each image; for pages of a PDF their `natural_size`.
        tiling: how images are cut; its `max_num_tiles` is the sharpness that is wished.
        context_length: of the model in tokens: 16,384 for the 8B V1, 131,072 for the 12B V2.
        answer_tokens, prompt_tokens: to leave room for.
        tokens_per_tile: 256 for tiles of 512 px.
        tokens_around_image: further tokens of each image, `<img>` and `</img>`.

    Returns:
        the plan with the largest number of tiles, at most the wished one, with which all images fit; if they do not
        even fit with one tile each, that plan, whose `fits` is False.
    """
    room = context_length - answer_tokens - prompt_tokens
    plan = None
    for max_num_tiles in range(tiling.max_num_tiles, 0, -1):
        smaller = replace(tiling, max_num_tiles=max_num_tiles)
        tiles_of = {size: count_tiles(*size, smaller) for size in set(sizes)}
        tiles = [tiles_of[size] for size in sizes]
        num_tokens = sum(count * tokens_per_tile + tokens_around_image for count in tiles)
        plan = PagePlan(max_num_tiles, tiles, num_tokens, num_tokens <= room)
        if plan.fits:
            break
    return plan


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
# An RGB image -> tiles
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


def _upscaled_bands(image: RGBImage, upscale: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield `(first row, band)` of the upscaled image, top to bottom; a band is valid until the next one is made.

    Doubling needs one row above and one below a band; what those rows double to is left out. Bands of a PIL image
    have a meaningless fourth channel: Pillow stores it, and copying it is cheaper than dropping it.
    """
    height, width = height_and_width(image)
    num_channels = 4 if isinstance(image, Image.Image) else 3
    band_height = min(height, max(1, BAND_BYTES // (num_channels * width)))
    margin = 1 if upscale > 1 else 0
    source = _channels_last_empty(band_height + 2 * margin, width, num_channels)
    upscaled = _channels_last_empty(upscale * source.shape[2], upscale * width, num_channels) if margin else source
    for start in range(0, height, band_height):
        stop = min(start + band_height, height)
        top, bottom = max(start - margin, 0), min(stop + margin, height)
        rows = source[:, :, : bottom - top]
        _copy_rows(image, top, rows[0].permute(1, 2, 0).numpy())
        band = _resize_into(upscaled[:, :, : upscale * (bottom - top)], rows) if margin else rows
        yield upscale * start, band[:, :, upscale * (start - top) : upscale * (stop - top)]


def _copy_rows(image: RGBImage, top: int, out: np.ndarray) -> None:
    """Copy rows of an image, from `top` on, to `out`, uint8 `(num_rows, width, num_channels)`, 4 for a PIL image."""
    num_rows, width, _ = out.shape
    if isinstance(image, np.ndarray):
        out[...] = image[top : top + num_rows]
        return
    # `.im` is private, but pastes straight into our memory; Pillow's public ways copy the pixels three or four times.
    target = Image.frombuffer("RGBX", (width, num_rows), out, "raw", "RGBX", 0, 1)
    target.im.paste(image.im, (0, -top, width, image.height - top))


def cut_tiles(image: RGBImage, tiling: Tiling = V1_TILING, **changes: Any) -> list[torch.Tensor]:
    """Cut an RGB image into tiles.

    The doubled image is never held as a whole. Bands of rows are doubled and at once reduced in width, so that besides
    the image and its tiles about `8 * height * image_size * (columns + 1)` bytes and 24 MB are used. That gives the
    numbers of the whole-image recipe because every bilinear pass works on width first, then on height, and rounds to
    uint8 in between. The kernels are torch's own, the ones that torchvision calls.

    Args:
        image: PIL image of mode RGB or uint8 array `(height, width, 3)`.
        tiling: how images are cut into tiles.
        changes: options of `tiling` to replace, for example `max_num_tiles=1`.

    Returns:
        Tiles `(3, image_size, image_size)` on the CPU, row by row, the thumbnail last; views of shared buffers, not
        contiguous. uint8 in 0..255, with bicubic interpolation float32 that may overshoot 0..255.
    """
    tiling = replace(tiling, **changes) if changes else tiling
    image_size, upscale, interpolation = tiling.image_size, tiling.upscale, tiling.interpolation
    height, width = height_and_width(image)
    grids = _grids(height, width, tiling)
    dtype = np.float32 if interpolation == "bicubic" else np.uint8
    narrowed = []
    for first_row, band in _upscaled_bands(image, upscale):
        band = band.float() if dtype is np.float32 else band
        if not narrowed:
            shapes = [(upscale * height, image_size * columns, band.shape[1]) for _, columns in grids]
            narrowed = [_channels_last_empty(*shape, dtype) for shape in shapes]
        for target in narrowed:
            _resize_into(target[:, :, first_row : first_row + band.shape[2]], band, interpolation)
    tiles = []
    for (rows, columns), narrow in zip(grids, narrowed, strict=True):
        canvas = _channels_last_empty(image_size * rows, image_size * columns, narrow.shape[1], dtype)
        for strip in _resize_into(canvas, narrow, interpolation)[0, :3].split(image_size, dim=1):
            tiles += strip.split(image_size, dim=2)
    return tiles


# ---------------------------------------------------------------------------------------------------------------------
# The processor
# ---------------------------------------------------------------------------------------------------------------------


class NemotronVLImageProcessor(BaseImageProcessor):
    """Turns images into the tiles of a Nemotron Nano VL model. Every option can be given here and per call.

    What counts as an image, alone, in a list or in nested lists (taken in order):

    * PIL images of every mode, as the pixels they hold: like the published code, no EXIF orientation is applied
      (`PIL.ImageOps.exif_transpose` does), and of several frames the current one is used. Transparency is composited
      on white; on black where white hides what the image shows; an alpha of 0 everywhere is ignored. I;16 is read as
      0..65535; I too, or as 0..255 if nothing is above 255; F as 0..1, or as 0..255 if something is above 1. A TIFF
      that was not copied or converted is read by its own tags instead: 12 bits as 0..4095, unsigned 32 bits up to
      2^32 - 1, and WhiteIsZero with 0 as white. An image that was not decoded yet is decoded here, so decode it before
      sharing it between threads.
    * Files: a path, a `file:` or `data:` URL, base64 text, bytes, or a file object (binary and seekable; it is read
      from its start, its position stays). First frame, turned upright by the EXIF orientation, as transformers' own
      `load_image` does. Nothing is fetched from the network, EPS is not run; Pillow's limit on the number of pixels
      and ours of 100,000 on a side hold before anything is decoded.
    * NumPy arrays and torch tensors `(H, W)`, `(H, W, C)` or `(C, H, W)`, also batched in four dimensions, with 1, 3
      or 4 channels (RGBA); uint8 in 0..255 or float in 0..1. Shapes that can be read either way need
      `input_data_format`.

    Args:
        image_size, max_num_tiles, use_thumbnail, upscale, grid_rule, interpolation: see `Tiling`; `image_size` must be
            a multiple of `patch_size / downsample_ratio`.
        do_rescale: multiply the values 0..255 by `rescale_factor`; False returns them as they are, as uint8 (unless
            `do_normalize` makes them float32), a quarter of the bytes to carry.
        rescale_factor: 1/255 gives 0..1.
        do_normalize: subtract `image_mean` and divide by `image_std` (per channel), for models whose tower does not.
        image_mean, image_std: three numbers each, on the scale of the rescaled values.
        do_convert_rgb: convert what is not RGB; False raises a ValueError for such an image.
        device: where the result lives; tiles travel there as uint8. Not saved.
        patch_size, downsample_ratio: of the model, for counting its image tokens.
        kwargs: unknown configuration keys are kept and saved again.
    """

    model_input_names = ["pixel_values", "num_patches"]

    def __init__(
        self,
        image_size: int = V1_TILING.image_size,
        max_num_tiles: int = V1_TILING.max_num_tiles,
        use_thumbnail: bool = V1_TILING.use_thumbnail,
        upscale: int = V1_TILING.upscale,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = False,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
        do_convert_rgb: bool = True,
        device: str | torch.device | None = None,
        patch_size: int = 16,
        downsample_ratio: float = 0.5,
        grid_rule: str = V1_TILING.grid_rule,
        interpolation: str = V1_TILING.interpolation,
        **kwargs: Any,
    ):
        # A published checkpoint names its own class here; `to_dict` names ours.
        kept = {name: value for name, value in kwargs.items() if name not in ("auto_map", "image_processor_type")}
        tiling = Tiling(image_size, max_num_tiles, use_thumbnail, upscale, grid_rule, interpolation)
        super().__init__(**kept, **asdict(tiling))  # sets them all as attributes
        self.do_rescale, self.rescale_factor = do_rescale, rescale_factor
        self.do_normalize, self.image_mean, self.image_std = do_normalize, image_mean, image_std
        self.do_convert_rgb, self.device = do_convert_rgb, device
        self.patch_size, self.downsample_ratio = _whole_number("patch_size", patch_size), downsample_ratio
        self.with_options({})  # checks them

    @property
    def tiling(self) -> Tiling:
        """The six tiling options as one value."""
        return Tiling(**{field.name: getattr(self, field.name) for field in fields(Tiling)})

    @property
    def tokens_per_tile(self) -> int:
        """Image tokens of one tile: 256 for 512 px."""
        return (self.image_size // self._pixels_per_token) ** 2

    @property
    def _pixels_per_token(self) -> int:
        return self.patch_size * round(1 / self.downsample_ratio)

    def __call__(self, images: Any, **kwargs: Any) -> BatchFeature:
        """See `preprocess`."""
        return self.preprocess(images, **kwargs)

    def preprocess(
        self, images: Any, *, return_tensors: str | None = None, input_data_format: str | None = None, **kwargs: Any
    ) -> BatchFeature:
        """Cut images into tiles.

        Args:
            images: an image, a document (see `open_document`), or (nested) lists of images and pages; an empty list
                gives an empty result.
            return_tensors: None, "pt" or "np".
            input_data_format: "channels_first" or "channels_last", for arrays.
            kwargs: options of this call; None means the processor's own value. `use_fast`, `disable_grouping`,
                `data_format="channels_first"` and InternVL's `crop_to_patches=True` are accepted from other clients
                and change nothing.

        Returns:
            `pixel_values`: `(num_tiles, 3, image_size, image_size)`, float32 in 0..1 by default, the tiles of all
            images one after the other, stacked whatever `return_tensors` says. `num_patches`: tiles of each image,
            thumbnail included: a list, or with `return_tensors` an int64 tensor or array.

        Raises:
            ValueError, TypeError: for unreadable images (see `load_image`) and wrong options.
        """
        options = self.with_options(kwargs)
        return_tensors = getattr(return_tensors, "value", return_tensors)
        if return_tensors not in (None, "pt", "np"):
            raise ValueError(f"return_tensors must be None, 'pt' or 'np', got {return_tensors!r}.")
        loaded = options.load_images(images, input_data_format)
        tiling = options.tiling
        num_patches = [count_tiles(*natural_size(image), tiling) for image in loaded]
        pixel_values = options._allocate(sum(num_patches))
        targets = pixel_values.split(num_patches) if loaded else ()
        for image, target in zip(loaded, targets, strict=True):
            if is_page(image):
                options._fill(target, cut_tiles(render_page(image, tiling), page_tiling(image, tiling)[1]))
            else:
                options._fill(target, cut_tiles(image, tiling))
        if return_tensors == "np":
            pixel_values, num_patches = pixel_values.cpu().numpy(), np.array(num_patches, np.int64)
        elif return_tensors == "pt":
            num_patches = torch.tensor(num_patches, dtype=torch.int64)
        return BatchFeature({"pixel_values": pixel_values, "num_patches": num_patches})

    def load_images(self, images: Any, input_data_format: str | None = None) -> list[RGBImage | Page]:
        """Read images and nested lists of them; the pages of documents stay pages, which are drawn one after the other.

        Raises:
            ValueError, TypeError: for unreadable images (see `load_image`).
        """
        return [
            image
            if is_page(image)
            else load_image(image, do_convert_rgb=self.do_convert_rgb, input_data_format=input_data_format)
            for image in flatten_images(images)
        ]

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict[str, Any] | None = None) -> int:
        """Tiles of an image of `height` x `width` pixels, thumbnail included, under the options of a call."""
        return count_tiles(height, width, self.with_options(images_kwargs or {}).tiling)

    def get_number_of_image_tokens(self, height: int, width: int, images_kwargs: dict[str, Any] | None = None) -> int:
        """Image tokens of an image of `height` x `width` pixels, the `<img>` and `</img>` around them not counted."""
        options = self.with_options(images_kwargs or {})
        return count_tiles(height, width, options.tiling) * options.tokens_per_tile

    def with_options(self, given: dict[str, Any]) -> "NemotronVLImageProcessor":
        """A copy of this processor with the options of one call put over its own, checked."""
        ignored = ("use_fast", "disable_grouping", "return_tensors", "input_data_format")
        given = {name: value for name, value in given.items() if value is not None and name not in ignored}
        if given.pop("crop_to_patches", True) is not True:
            raise ValueError("Images are always cut into tiles; for one tile an image pass max_num_tiles=1.")
        data_format = given.pop("data_format", "channels_first")
        if getattr(data_format, "value", data_format) != "channels_first":
            raise ValueError(f"pixel_values are channels_first, data_format={data_format!r} is not supported.")
        unknown = sorted(set(given) - set(OPTIONS))
        if unknown:
            raise TypeError(f"Unknown options {unknown} for {type(self).__name__}. It knows {sorted(OPTIONS)}.")
        options = copy.copy(self)
        vars(options).update(given)
        vars(options).update(asdict(options.tiling))  # checked, and plain ints
        options.patch_size = _whole_number("patch_size", options.patch_size)
        options.device = torch.device(options.device or "cpu")
        options._check_options()
        return options

    def _check_options(self) -> None:
        """Raise TypeError or ValueError for options other than the tiling that cannot be honoured."""
        for name in ("do_rescale", "do_normalize", "do_convert_rgb"):
            _check_bool(name, getattr(self, name))
        ratio, factor = self.downsample_ratio, self.rescale_factor
        if not isinstance(ratio, (int, float)) or not 1e-9 < ratio <= 1:
            raise ValueError(f"downsample_ratio must be a number above 1e-9 and at most 1, got {ratio!r}.")
        if not isinstance(factor, (int, float)) or not 1e-9 < abs(factor) <= 1e9:
            raise ValueError(f"rescale_factor must be a number of a size between 1e-9 and 1e9, got {factor!r}.")
        if self.patch_size < 1 or self.image_size % self._pixels_per_token:
            raise ValueError(
                f"image_size={self.image_size} must be a positive multiple of patch_size / downsample_ratio = "
                f"{self.patch_size} / {self.downsample_ratio} pixels per image token."
            )
        for name in ("image_mean", "image_std") if self.do_normalize else ():
            values = getattr(self, name)
            if not isinstance(values, (list, tuple)) or len(values) != 3 or not all(map(math.isfinite, values)):
                raise ValueError(f"do_normalize needs {name} as three numbers, got {values!r}.")
        if self.do_normalize and not all(self.image_std):
            raise ValueError(f"image_std must not contain 0, got {self.image_std!r}.")

    def _allocate(self, num_tiles: int) -> torch.Tensor:
        shape = (num_tiles, 3, self.image_size, self.image_size)
        is_float = self.do_rescale or self.do_normalize or self.interpolation == "bicubic"
        if self.device.type == "cpu":  # huge pages, as in _channels_last_empty
            return torch.from_numpy(np.empty(shape, np.float32 if is_float else np.uint8))
        return torch.empty(shape, dtype=torch.float32 if is_float else torch.uint8, device=self.device)

    def _fill(self, target: torch.Tensor, tiles: Sequence[torch.Tensor]) -> None:
        """Write the tiles of one image to their place, rescaled there: the same float32 products on every device."""
        if target.device.type != "cpu":  # from pinned memory, so that the next image is cut while this one is copied
            shape = (len(tiles), *target.shape[1:])
            pinned = torch.empty(shape, dtype=tiles[0].dtype, pin_memory=target.device.type == "cuda")
            tiles = torch.stack(list(tiles), out=pinned).to(target.device, non_blocking=True)
        for place, tile in zip(target, tiles, strict=True):
            place.copy_(tile)
            if self.do_rescale:
                place.mul_(self.rescale_factor)
        if self.do_normalize:
            mean, std = (torch.tensor(values, dtype=torch.float32) for values in (self.image_mean, self.image_std))
            target.sub_(mean.view(3, 1, 1).to(target.device)).div_(std.view(3, 1, 1).to(target.device))

    @classmethod
    def get_image_processor_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Read preprocessor_config.json as transformers does, and say so if it is damaged."""
        with explain_damage("preprocessor_config.json", pretrained_model_name_or_path):
            values, unused = super().get_image_processor_dict(pretrained_model_name_or_path, **kwargs)
            if not isinstance(values, dict):
                raise TypeError(f"it holds {values!r:.80} instead of a dict")
        return values, unused

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build a processor from a configuration and overriding options, alike on every version of transformers.

        A published file of the 12B V2 gets `V2_RECIPE`; only such a file has the key `norm_mean`.

        Returns:
            The processor, or `(processor, unused kwargs)` with `return_unused_kwargs=True`. Options that are null in
            the configuration take their defaults.
        """
        return_unused = kwargs.pop("return_unused_kwargs", False)
        if "norm_mean" in image_processor_dict:
            names = {"norm_mean": "image_mean", "norm_std": "image_std"}
            stated = {
                names.get(name, name): value for name, value in image_processor_dict.items() if value is not None
            }
            image_processor_dict = {**V2_RECIPE, **stated}
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
        for name in ("image_size", "max_num_tiles", "upscale", "patch_size"):  # users may have set NumPy's integers
            saved[name] = _whole_number(name, saved[name])
        own_code = {"AutoImageProcessor": "image_processing.NemotronVLImageProcessor"}
        saved["auto_map"] = {**own_code, **saved.get("auto_map", {})}  # a processor adds its own entry while saving
        return {n: list(value) if isinstance(value, tuple) else copy.deepcopy(value) for n, value in saved.items()}


OPTIONS = tuple(inspect.signature(NemotronVLImageProcessor).parameters)[:-1]  # all but **kwargs


@contextlib.contextmanager
def explain_damage(file: str, folder: Any) -> Iterator[None]:
    """Turn what transformers raises about a JSON file of another form than it expects into a clear ValueError."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"The {file} of {folder} is damaged: {error}. Download it again.") from error


NemotronVLImageProcessor.register_for_auto_class("AutoImageProcessor")
