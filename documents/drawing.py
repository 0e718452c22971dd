"""Draws pages set in type as images, with the marks that printers, scanners and cameras leave.

    python -m documents.drawing docs/images/documents.jpg      # a contact sheet of training and held-out pages

A seed always gives the same image.
"""

import argparse
import io
import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from documents import fonts
from documents.contents import KINDS, make_page
from documents.pages import Page
from documents.typesetting import Look, Print, set_page

INKS = ((20, 20, 20), (20, 20, 20), (45, 45, 50), (70, 70, 75), (20, 30, 90), (80, 20, 30), (25, 70, 40), (60, 40, 90))
PAPERS = ((255, 255, 255), (255, 255, 255), (250, 250, 245), (252, 246, 228), (236, 242, 248), (242, 242, 242),
          (250, 236, 236), (225, 225, 220))  # fmt: skip
DESKS = ((60, 50, 45), (120, 100, 80), (180, 180, 185), (90, 95, 100), (30, 30, 35), (200, 190, 170), (150, 160, 150))


@dataclass(frozen=True)
class Wear:
    """Ink, paper and what printers, scanners and cameras do to a page."""

    ink: tuple[int, int, int]
    paper: tuple[int, int, int]
    desk: tuple[int, int, int]
    weight: float  # of strokes; 1 is a pixel wider on each side, -1 a pixel narrower
    blur: float  # radius in shares of the type's size
    noise: float  # standard deviation, in units of 0..255
    shade: float  # strength of uneven light
    jpeg_quality: int  # 0 for no compression


def random_wear(seed: int, split: str, degradation: float) -> Wear:
    rng = random.Random(f"wear {split} {seed}")
    return Wear(
        ink=rng.choice(INKS),
        paper=rng.choice(PAPERS),
        desk=rng.choice(DESKS),
        weight=rng.choice((0.0, 0.0, rng.uniform(-0.5, 0.6))) * degradation,
        blur=rng.choice((0.0, 0.0, rng.uniform(0.01, 0.045))) * degradation,
        noise=rng.choice((0.0, rng.uniform(2, 14))) * degradation,
        shade=rng.choice((0.0, rng.uniform(0.0, 0.35))) * degradation,
        jpeg_quality=rng.choice((0, rng.randint(40, 95))) if degradation else 0,
    )


def draw(printed: Print, seed: int, split: str = "train", degradation: float = 1.0) -> Image.Image:
    """Return the image of a print, RGB."""
    wear = random_wear(seed, split, degradation)
    ink = Image.new("L", printed.flat)
    canvas = ImageDraw.Draw(ink)
    for run in printed.runs:
        font = fonts.load(printed.typeface, run.bold, run.size)
        canvas.text((run.x, run.baseline), run.text, fill=255, font=font, anchor="ls")
    for rule in printed.rules:
        canvas.rectangle(rule, fill=150)
    if printed.logo:
        draw_logo(canvas, printed.logo, random.Random(f"logo {seed}"))
    if wear.weight and printed.size > 16:
        other = ink.filter(ImageFilter.MaxFilter(3) if wear.weight > 0 else ImageFilter.MinFilter(3))
        ink = Image.blend(ink, other, abs(wear.weight) * 0.6)
    flat = Image.composite(Image.new("RGB", ink.size, wear.ink), Image.new("RGB", ink.size, wear.paper), ink)
    image = flat
    if printed.matrix:
        is_photo = printed.width * printed.height > 1.03 * ink.width * ink.height
        image = flat.transform(
            (printed.width, printed.height),
            Image.Transform.PERSPECTIVE,
            printed.matrix,
            Image.Resampling.BILINEAR,
            fillcolor=wear.desk if is_photo else wear.paper,
        )
    if wear.blur:
        image = image.filter(ImageFilter.GaussianBlur(wear.blur * printed.size))
    if wear.noise or wear.shade:
        image = add_noise_and_shade(image, wear, seed)
    if wear.jpeg_quality:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=wear.jpeg_quality)
        image = Image.open(buffer).convert("RGB")
    return image


def draw_page(page: Page, seed: int, split: str = "train", look: Look = Look()) -> Image.Image:  # noqa: B008
    """Set a page in type by a seed, and return its image, RGB."""
    return draw(set_page(page, seed, split, look), seed, split, look.degradation)


def draw_logo(canvas: ImageDraw.ImageDraw, logo: tuple[float, float, float], rng: random.Random) -> None:
    """Draw a mark that is no character."""
    x, y, size = logo
    for _ in range(rng.randint(1, 4)):
        radius = size * rng.uniform(0.5, 1.1)
        box = (x - radius, y - radius, x + radius, y + radius)
        shape = rng.choice((canvas.ellipse, canvas.rectangle))
        if rng.random() < 0.5:
            shape(box, fill=rng.choice((120, 200)))
        else:
            shape(box, outline=220, width=max(1, round(size / 8)))
        x += size * rng.uniform(-1, 1)


@lru_cache
def noise_field() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 1, (1024, 1024, 1)).astype(np.float32)


def add_noise_and_shade(image: Image.Image, wear: Wear, seed: int) -> Image.Image:
    """Add sensor noise, cut from a fixed field, and uneven light."""
    rng = np.random.default_rng(seed)
    pixels = np.asarray(image, np.float32)
    height, width, _ = pixels.shape
    if wear.shade:
        slope = np.linspace(-1, 1, width, dtype=np.float32) * rng.uniform(-1, 1)
        slope = slope + np.linspace(-1, 1, height, dtype=np.float32)[:, None] * rng.uniform(-1, 1)
        pixels = pixels * (1 - wear.shade * np.abs(slope))[..., None]
    if wear.noise:
        top, left = rng.integers(0, 1024, 2)
        rows, columns = (np.arange(height) + top) % 1024, (np.arange(width) + left) % 1024
        pixels = pixels + wear.noise * noise_field()[rows[:, None], columns[None]]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def contact_sheet(num_columns: int = 7, num_rows: int = 3) -> Image.Image:
    """Draw one column for each kind of page, with held-out ones in the last row."""
    width, height, gap = 230, 330, 8
    sheet = Image.new("RGB", (num_columns * (width + gap) + gap, num_rows * (height + gap) + gap), (120, 124, 130))
    for column, kind in enumerate(KINDS):
        for row in range(num_rows):
            split = "heldout" if row == num_rows - 1 else "train"
            seed = 100 * column + row
            image = draw_page(make_page(seed, split, kind), seed, split)
            scale = min(width / image.width, height / image.height)
            image = image.resize((round(scale * image.width), round(scale * image.height)), Image.Resampling.LANCZOS)
            left, top = gap + column * (width + gap), gap + row * (height + gap)
            sheet.paste(image, (left + (width - image.width) // 2, top + (height - image.height) // 2))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path)
    path = parser.parse_args().image
    fonts.require("train", "heldout")
    path.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet().save(path, quality=80)
    print(path)


if __name__ == "__main__":
    main()
