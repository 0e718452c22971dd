"""How large the type of an image is in its tiles, so that a command can say when it is outside what a model has learned.

A small model reads type of some heights only; its config names them as `readable_type_height`.
"""

from typing import Any

import torch
from nemotron_vl.image_processing import Tiling, cut_tiles
from PIL import Image

BAND = 64  # px; a page tilted by two degrees shifts its lines by two pixels across a band
SIZE_OF_INK = 1.3  # size of type by the height of the ink of its lines, which seldom has all of it


def warning(model: Any, tiling: Tiling, image: Image.Image) -> str | None:
    """Return a sentence if the type of an image is smaller or larger than the model has learned to read, else None.

    There is one only for a model whose config names its limits (`readable_type_height`).

    Args:
        model: that will read the image.
        tiling: how the image is cut for it.
        image: a page.
    """
    limits = getattr(model.config, "readable_type_height", None)
    if limits is None:
        return None
    height = type_height(torch.stack(cut_tiles(image.convert("RGB"), tiling, use_thumbnail=False)).float() / 255)
    if height is None:
        return (
            f"No lines of type are seen on this image, or they are far smaller than {limits[0]} px in the tiles. This model "
            "reads printed pages only: answers will be wrong."
        )
    if limits[0] <= height <= limits[1]:
        return None
    size = "small" if height < limits[0] else "large"
    return (
        f"The type is about {height:.0f} px high in the tiles. That is too {size} for this model, which reads "
        f"{limits[0]} to {limits[1]} px: answers will be wrong. Cut out {'less' if size == 'small' else 'more'} of the page."
    )


def type_height(tiles: torch.Tensor) -> float | None:
    """Estimate the size of the type on a page, in pixels of the tiles.

    Args:
        tiles: of one image, `(num_tiles, 3, height, width)`, 0 to 1, dark on light or light on dark.

    Returns:
        The median over lines, weighted by their ink, or None where no lines are seen.
    """
    gray = tiles.float().mean(1)
    ink = (gray - torch.nn.functional.interpolate(_paper(gray)[:, None], gray.shape[1:], mode="bilinear")[:, 0]).abs()
    contrast = torch.quantile(ink.flatten()[:: max(1, ink.numel() // 100_000)], 0.99)
    if contrast < 0.1:
        return None
    is_ink = (ink > 0.45 * contrast).float()
    profile = is_ink.unflatten(2, (-1, BAND)).mean(3).permute(0, 2, 1).flatten(0, 1)  # (bands, rows)
    heights = []
    for band, share in zip(profile > 0.02, profile, strict=True):
        edges = torch.diff(band.int(), prepend=torch.zeros(1, dtype=torch.int), append=torch.zeros(1, dtype=torch.int))
        starts, ends = (edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist()
        heights += [
            (end - start, share[start:end].sum().item())
            for start, end in zip(starts, ends, strict=True)
            if 4 <= end - start <= BAND * 2 and share[start:end].max() < 0.9  # neither specks nor rules and bars
        ]
    if not heights:
        return None
    heights.sort()
    half = sum(weight for _, weight in heights) / 2
    for height, weight in heights:
        half -= weight
        if half <= 0:
            return SIZE_OF_INK * height
    return None


def _paper(gray: torch.Tensor, size: int = 32) -> torch.Tensor:
    """Return the colour of the paper around each block of `size` pixels, `(num_tiles, rows, columns)`."""
    blocks = gray.unfold(1, size, size).unfold(2, size, size).flatten(3)
    return blocks.median(-1).values
