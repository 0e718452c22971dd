"""Draws a document as an image: fonts, inks, papers, and the marks that scanners and cameras leave.

    python -m documents.drawing docs/images/documents.jpg      # a contact sheet of training and held-out documents

The fonts come from permissively licensed packages: `pip install ".[nano]"` installs them all. Characters are set at a
fixed pitch, one in a cell, as receipt printers and typewriters set them; everything else varies with the seed.
"""

import argparse
import importlib.util
import io
import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from documents.generator import COLUMNS, KINDS, Document, document

# (package that carries it, path within, licence)
FONTS = {
    "train": (
        ("matplotlib", "mpl-data/fonts/ttf/DejaVuSansMono.ttf", "Bitstream Vera"),
        ("matplotlib", "mpl-data/fonts/ttf/DejaVuSansMono-Bold.ttf", "Bitstream Vera"),
        ("matplotlib", "mpl-data/fonts/ttf/DejaVuSans.ttf", "Bitstream Vera"),
        ("matplotlib", "mpl-data/fonts/ttf/DejaVuSerif.ttf", "Bitstream Vera"),
        ("matplotlib", "mpl-data/fonts/ttf/DejaVuSans-Bold.ttf", "Bitstream Vera"),
        ("matplotlib", "mpl-data/fonts/ttf/DejaVuSans-Oblique.ttf", "Bitstream Vera"),
        ("matplotlib", "mpl-data/fonts/ttf/DejaVuSerif-Italic.ttf", "Bitstream Vera"),
        ("matplotlib", "mpl-data/fonts/ttf/STIXGeneral.ttf", "OFL 1.1"),
        ("font_roboto", "files/Roboto-Italic.ttf", "Apache 2.0"),
        ("font_roboto", "files/Roboto-Bold.ttf", "Apache 2.0"),
        ("font_source_sans_pro", "files/SourceSansPro-It.ttf", "OFL 1.1"),
        ("font_roboto", "files/Roboto-Regular.ttf", "Apache 2.0"),
        ("font_roboto", "files/Roboto-Medium.ttf", "Apache 2.0"),
        ("font_source_sans_pro", "files/SourceSansPro-Regular.ttf", "OFL 1.1"),
        ("font_source_sans_pro", "files/SourceSansPro-Semibold.ttf", "OFL 1.1"),
        ("font_hanken_grotesk", "files/HankenGrotesk-Regular.otf", "OFL 1.1"),
        ("font_hanken_grotesk", "files/HankenGrotesk-SemiBold.otf", "OFL 1.1"),
        ("font_hanken_grotesk", "files/HankenGrotesk-Italic.otf", "OFL 1.1"),
        ("font_source_serif_pro", "files/SourceSerifPro-Regular.ttf", "OFL 1.1"),
        ("font_source_serif_pro", "files/SourceSerifPro-Bold.ttf", "OFL 1.1"),
        ("font_caladea", "files/Caladea-Regular.ttf", "Apache 2.0"),
    ),
    # These were added later: "heldout" images do not use them, so that the evaluation's images stay what they are.
    "training only": (
        ("ttf_opensans", "ttf/OpenSans-Regular.ttf", "Apache 2.0"),
        ("ttf_opensans", "ttf/OpenSans-SemiBold.ttf", "Apache 2.0"),
        ("ttf_opensans", "ttf/OpenSans-Italic.ttf", "Apache 2.0"),
        ("font_lato", "files/Lato-Regular.ttf", "OFL 1.1"),
        ("font_lato", "files/Lato-Bold.ttf", "OFL 1.1"),
        ("font_lato", "files/Lato-Italic.ttf", "OFL 1.1"),
        ("captcha", "data/DroidSansMono.ttf", "Apache 2.0"),  # Droid Sans Mono comes with it
    ),
    "heldout": (
        ("font_manrope", "files/Manrope-Medium.ttf", "OFL 1.1"),
        ("matplotlib", "mpl-data/fonts/ttf/DejaVuSansMono-Oblique.ttf", "Bitstream Vera"),
    ),
}
INKS = ((20, 20, 20), (45, 45, 50), (20, 30, 90), (80, 20, 30), (25, 70, 40))
PAPERS = ((255, 255, 255), (250, 250, 245), (252, 246, 228), (236, 242, 248), (242, 242, 242), (250, 236, 236))


@dataclass
class Style:
    """How one image looks; a seed always gives the same style.

    Attributes:
        font: of `FONTS`.
        cell_width: pixels of a character's cell.
        cell_height: likewise.
        size: of the font, as a share of `cell_height`.
        ink: RGB, 0 to 255.
        paper: likewise.
        shift: (right, down) of the print, in pixels.
        degrees: of rotation.
        blur: radius in pixels.
        noise: standard deviation, in units of 0..255.
        shade: strength of uneven light, 0 for none.
        jpeg_quality: 0 for no compression.
        weight: of strokes; 1 is a pixel wider on each side, -1 a pixel narrower.
        stretch: of the characters' width.
    """

    font: tuple[str, str, str]
    cell_width: int
    cell_height: int
    size: float
    ink: tuple[int, int, int]
    paper: tuple[int, int, int]
    shift: tuple[int, int]
    degrees: float
    blur: float
    noise: float
    shade: float
    jpeg_quality: int
    weight: float = 0.0
    stretch: float = 1.0


def random_style(seed: int, split: str = "train", degradation: float = 1.0) -> Style:
    """Return the style of a seed.

    Args:
        seed: any integer.
        split: "train", or "heldout", which uses fonts that are not in training for half of its images.
        degradation: 0 for clean prints on the exact grid, 1 for the full range of skew, blur, noise and compression.
    """
    rng = random.Random(f"style {split} {seed}")
    fonts = FONTS["heldout"] if split == "heldout" and rng.random() < 0.5 else FONTS["train"]
    fonts += FONTS["training only"] if split == "train" else ()
    fonts = [font for font in fonts if font_path(font)] or [("", "", "")]
    cell_height = rng.choice((24, 28, 32, 32, 36))
    return Style(
        font=rng.choice(fonts),
        cell_width=round(cell_height * rng.uniform(0.76, 0.95)),
        cell_height=cell_height,
        size=rng.uniform(0.72, 0.9),
        ink=rng.choice(INKS),
        paper=rng.choice(PAPERS),
        shift=(round(rng.uniform(-3, 3) * degradation), round(rng.uniform(-3, 3) * degradation)),
        degrees=rng.choice((0.0, rng.uniform(-0.7, 0.7))) * degradation,
        blur=rng.choice((0.0, 0.0, rng.uniform(0.3, 0.9))) * degradation,
        noise=rng.choice((0.0, rng.uniform(2, 14))) * degradation,
        shade=rng.choice((0.0, rng.uniform(0.0, 0.2))) * degradation,
        jpeg_quality=rng.choice((0, rng.randint(45, 95))) if degradation else 0,
        # Varied strokes and widths stand in for fonts that training does not have.
        weight=rng.choice((0.0, rng.uniform(-0.5, 0.6))) * degradation if split == "train" else 0.0,
        stretch=rng.choice((0.85, 0.92, 1.0, 1.0, 1.08, 1.15)) if split == "train" and degradation else 1.0,
    )


@lru_cache
def font_path(font: tuple[str, str, str]) -> str | None:
    """Return the file of a font, or None if its package is not installed."""
    package, path, _ = font
    spec = importlib.util.find_spec(package) if package else None
    if spec is None:
        return None
    found = Path(list(spec.submodule_search_locations)[0]) / path
    return str(found) if found.exists() else None


def require_fonts(split: str = "train") -> None:
    """Check that the fonts of a split are installed, for work whose numbers depend on them.

    Raises:
        ImportError: with the command that installs what is missing.
    """
    drawn = [font for name, fonts in FONTS.items() if name != "training only" or split == "train" for font in fonts]
    missing = sorted({font[0] for font in drawn if not font_path(font)})
    if missing:
        packages = " ".join(package.replace("_", "-") for package in missing)
        raise ImportError(
            f"Fonts are missing: pip install {packages}. Without them documents are drawn in Pillow's own font, which "
            "is enough for tests only."
        )


@lru_cache(maxsize=64)
def load_font(font: tuple[str, str, str], size: int) -> ImageFont.FreeTypeFont:
    """Return the font at a size in pixels, or Pillow's own if the font's package is missing."""
    path = font_path(font) if font[0] else None
    return ImageFont.truetype(path, size) if path else ImageFont.load_default(size)


@lru_cache(maxsize=20000)
def glyph(
    font: tuple[str, str, str], size: int, character: str, cell_width: int, cell_height: int, stretch: float = 1.0
) -> np.ndarray:
    """Return the ink of one character, `(cell_height, cell_width)`, 0 to 255; too wide a character is narrowed."""
    loaded = load_font(font, size)
    ascent, descent = loaded.getmetrics()
    width = max(1, round(loaded.getlength(character)))
    cell = Image.new("L", (max(width, round(cell_width / stretch)), cell_height))
    left = (cell.width - width) / 2
    ImageDraw.Draw(cell).text((left, (cell_height - ascent - descent) / 2), character, fill=255, font=loaded)
    return np.asarray(cell if cell.width == cell_width else cell.resize((cell_width, cell_height)))


def draw(page: Document, style: Style, seed: int = 0) -> Image.Image:
    """Return the image of a document: `cell_width` * 16 by `cell_height` * rows pixels, RGB.

    Args:
        page: the document to print.
        style: fonts, colours and degradation.
        seed: of the noise.
    """
    ink = _print_characters(page, style)
    _draw_lines(page, style, ink)
    image = Image.composite(Image.new("RGB", ink.size, style.ink), Image.new("RGB", ink.size, style.paper), ink)
    if style.degrees:
        image = image.rotate(style.degrees, Image.Resampling.BILINEAR, fillcolor=style.paper)
    if style.blur:
        image = image.filter(ImageFilter.GaussianBlur(style.blur))
    if style.noise or style.shade:
        image = _add_noise_and_shade(image, style, seed)
    if style.jpeg_quality:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=style.jpeg_quality)
        image = Image.open(buffer).convert("RGB")
    return image


def _print_characters(page: Document, style: Style) -> Image.Image:
    width, height = style.cell_width, style.cell_height
    ink = np.zeros((height * len(page.lines), width * COLUMNS), np.uint8)
    size = round(height * style.size)
    for row, line in enumerate(page.lines):
        for column, character in enumerate(line):
            if character != " ":
                cell = ink[row * height : (row + 1) * height, column * width : (column + 1) * width]
                cell[:] = glyph(style.font, size, character, width, height, style.stretch)
    printed = Image.fromarray(np.roll(ink, style.shift[::-1], (0, 1)))
    if style.weight:
        other = printed.filter(ImageFilter.MaxFilter(3) if style.weight > 0 else ImageFilter.MinFilter(3))
        printed = Image.blend(printed, other, abs(style.weight))
    return printed


def _draw_lines(page: Document, style: Style, ink: Image.Image) -> None:
    """Draw rules, bars and the line of a chart; their places are given in cells."""
    canvas = ImageDraw.Draw(ink)
    width, height = style.cell_width, style.cell_height
    for row in page.rules:
        middle = row * height + height // 2
        canvas.line((width // 2, middle, width * COLUMNS - width // 2, middle), fill=160, width=2)
    for row, length in page.bars:
        canvas.rectangle((2, row * height + 8, length * width, (row + 1) * height - 8), fill=110)
    points = [((column + 0.5) * width, row * height + height - 6) for row, column in page.points]
    canvas.line(points, fill=130, width=2)
    for left, top in points:
        canvas.ellipse((left - 3, top - 3, left + 3, top + 3), fill=200)


def _add_noise_and_shade(image: Image.Image, style: Style, seed: int) -> Image.Image:
    """Add sensor noise and uneven light."""
    rng = np.random.default_rng(seed)
    pixels = np.asarray(image, np.float32)
    height, width, _ = pixels.shape
    if style.shade:
        slope = np.linspace(-1, 1, width, dtype=np.float32) * rng.uniform(-1, 1)
        slope = slope + np.linspace(-1, 1, height, dtype=np.float32)[:, None] * rng.uniform(-1, 1)
        pixels = pixels * (1 - style.shade * np.abs(slope))[..., None]
    if style.noise:
        pixels = pixels + rng.normal(0, style.noise, (height, width, 1)).astype(np.float32)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def contact_sheet(num_columns: int = 7, num_rows: int = 3) -> Image.Image:
    """Draw one column for each kind of document, with held-out ones in the last row."""
    width, height, gap = 200, 254, 8
    sheet = Image.new("RGB", (num_columns * (width + gap) + gap, num_rows * (height + gap) + gap), (120, 124, 130))
    for column, kind in enumerate(KINDS):
        for row in range(num_rows):
            split = "heldout" if row == num_rows - 1 else "train"
            seed = 100 * column + row
            image = draw(document(seed, split, kind), random_style(seed, split), seed)
            image = image.resize((width, height), Image.Resampling.LANCZOS)
            sheet.paste(image, (gap + column * (width + gap), gap + row * (height + gap)))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path)
    path = parser.parse_args().image
    require_fonts()
    path.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet().save(path, quality=80)
    print(path)


if __name__ == "__main__":
    main()
