"""The typefaces that documents are printed in, and their metrics.

All come from permissively licensed packages that `pip install ".[nano]"` installs; nothing is downloaded at run time,
and no typeface of the system is used, so that a seed gives the same page on every machine.
"""

import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import ImageFont

CHARACTERS = [chr(code) for code in range(32, 127)] + ["\u20ac", "\u00a3"]  # printed ones: ASCII, euro, pound


@dataclass(frozen=True)
class Typeface:
    """A family of which documents use a regular and a bold cut.

    Attributes:
        package: that carries it.
        regular: path of the regular cut within the package.
        bold: likewise of the bold one.
        licence: of the typeface.
        fixed_pitch: whether all characters have the same width.
    """

    package: str
    regular: str
    bold: str
    licence: str
    fixed_pitch: bool = False


def _matplotlib(regular: str, bold: str, fixed_pitch: bool = False) -> Typeface:
    folder = "mpl-data/fonts/ttf"
    licence = "OFL 1.1" if regular.startswith("STIX") else "Bitstream Vera"
    return Typeface("matplotlib", f"{folder}/{regular}.ttf", f"{folder}/{bold}.ttf", licence, fixed_pitch)


TYPEFACES = {
    "train": (
        _matplotlib("DejaVuSansMono", "DejaVuSansMono-Bold", fixed_pitch=True),
        _matplotlib("DejaVuSansMono-Bold", "DejaVuSansMono-Bold", fixed_pitch=True),
        Typeface("captcha", "data/DroidSansMono.ttf", "data/DroidSansMono.ttf", "Apache 2.0", fixed_pitch=True),
        _matplotlib("DejaVuSans", "DejaVuSans-Bold"),
        _matplotlib("DejaVuSerif", "DejaVuSerif-Bold"),
        _matplotlib("DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
        _matplotlib("STIXGeneral", "STIXGeneralBol"),
        _matplotlib("STIXGeneralItalic", "STIXGeneralBolIta"),
        Typeface("font_roboto", "files/Roboto-Regular.ttf", "files/Roboto-Bold.ttf", "Apache 2.0"),
        Typeface("font_roboto", "files/Roboto-Light.ttf", "files/Roboto-Medium.ttf", "Apache 2.0"),
        Typeface("font_roboto", "files/Roboto-Italic.ttf", "files/Roboto-BoldItalic.ttf", "Apache 2.0"),
        Typeface("font_source_sans_pro", "files/SourceSansPro-Regular.ttf", "files/SourceSansPro-Bold.ttf", "OFL 1.1"),
        Typeface("font_source_sans_pro", "files/SourceSansPro-It.ttf", "files/SourceSansPro-Semibold.ttf", "OFL 1.1"),
        Typeface(
            "font_source_serif_pro", "files/SourceSerifPro-Regular.ttf", "files/SourceSerifPro-Bold.ttf", "OFL 1.1"
        ),
        Typeface("font_hanken_grotesk", "files/HankenGrotesk-Regular.otf", "files/HankenGrotesk-Bold.otf", "OFL 1.1"),
        Typeface("ttf_opensans", "ttf/OpenSans-Regular.ttf", "ttf/OpenSans-Bold.ttf", "Apache 2.0"),
        Typeface("ttf_opensans", "ttf/OpenSans-SemiBold.ttf", "ttf/OpenSans-ExtraBold.ttf", "Apache 2.0"),
        Typeface("font_lato", "files/Lato-Regular.ttf", "files/Lato-Bold.ttf", "OFL 1.1"),
        Typeface("font_lato", "files/Lato-Italic.ttf", "files/Lato-Black.ttf", "OFL 1.1"),
        Typeface("font_caladea", "files/Caladea-Regular.ttf", "files/Caladea-Bold.ttf", "Apache 2.0"),
    ),
    "heldout": (
        _matplotlib("DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique", fixed_pitch=True),
        Typeface("font_manrope", "files/Manrope-Medium.ttf", "files/Manrope-Bold.ttf", "OFL 1.1"),
        Typeface("font_rhd", "files/RedHatDisplay-Regular.ttf", "files/RedHatDisplay-Bold.ttf", "OFL 1.1"),
        Typeface("font_fjallaone", "files/FjallaOne-Regular.ttf", "files/FjallaOne-Regular.ttf", "OFL 1.1"),
    ),
}
PILLOWS = Typeface("", "", "", "")  # stands in where packages are missing; enough for tests


@dataclass(frozen=True)
class Metrics:
    """Measures of a cut at a size, in pixels.

    Attributes:
        advance: distance to the next character, by character.
        centre: horizontal middle of the ink, from the start of the character.
        cap_height: of a capital above the baseline.
    """

    advance: dict[str, float]
    centre: dict[str, float]
    cap_height: float


@lru_cache
def folder_of(package: str) -> Path | None:
    """Return the folder of an installed package, or None."""
    spec = importlib.util.find_spec(package) if package else None
    return Path(list(spec.submodule_search_locations)[0]) if spec else None


def is_installed(typeface: Typeface) -> bool:
    folder = folder_of(typeface.package)
    return folder is not None and all((folder / path).exists() for path in (typeface.regular, typeface.bold))


@lru_cache
def installed(split: str) -> tuple[Typeface, ...]:
    """Return the installed typefaces of a split ("train" or "heldout"), or Pillow's own if there are none."""
    return tuple(filter(is_installed, TYPEFACES[split])) or (PILLOWS,)


def require(*splits: str) -> None:
    """Check that the typefaces of splits are installed, for work whose numbers depend on them.

    Raises:
        ImportError: with the command that installs what is missing.
    """
    missing = {face.package for split in splits for face in TYPEFACES[split] if not is_installed(face)}
    if missing:
        packages = " ".join(sorted(package.replace("_", "-") for package in missing))
        raise ImportError(
            f"Fonts are missing: pip install {packages}. Without them documents are drawn in Pillow's own font, which "
            "is enough for tests only."
        )


@lru_cache(maxsize=512)
def load(typeface: Typeface, bold: bool, size: int) -> ImageFont.FreeTypeFont:
    """Return a cut at a size in pixels."""
    folder = folder_of(typeface.package)
    if folder is None:
        return ImageFont.load_default(size)
    path = folder / (typeface.bold if bold else typeface.regular)
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=512)
def metrics(typeface: Typeface, bold: bool, size: int) -> Metrics:
    """Return the measures of a cut at a size in pixels."""
    font = load(typeface, bold, size)
    advance = {character: font.getlength(character) for character in CHARACTERS}
    centre = {}
    for character in CHARACTERS:
        left, _, right, _ = font.getbbox(character, anchor="ls")
        centre[character] = (left + right) / 2 if right > left else advance[character] / 2
    return Metrics(advance, centre, -font.getbbox("H", anchor="ls")[1])
