"""Prints the receipt of the demo, which no training has seen: its shop, its number and its typeface are held out.

python -m documents.example examples/receipt.png
"""

import argparse
from pathlib import Path

from PIL import Image

from documents import fonts
from documents.drawing import draw_page
from documents.pages import Line, Page, Piece
from documents.typesetting import Look

SEED = 4  # a typeface that training lacks
LOOK = Look(size=(22, 22), leading=(1.35, 1.35), tilted=1.0, degrees=0.6, photographed=0.0, degradation=0.5)


def example_page() -> Page:
    """Return the receipt of Claisaid Tools."""

    def pair(label: str, value: str, **how) -> Line:
        return Line([Piece(label), Piece(value, 1.0, "r")], **how)

    def centred(text: str, **how) -> Line:
        return Line([Piece(text, 0.5, "c")], **how)

    lines = [
        centred("Claisaid Tools", scale=1.5, bold=True),
        centred("139 Traind Road"),
        centred("Tel 059-354274"),
        Line([]),
        pair("3 Oct 2029", "06:41"),
        pair("Receipt no.", "606543"),
        Line([], rule="-"),
        pair("Vase", "64.94"),
        pair("Flour", "2.13"),
        Line([], rule="-"),
        pair("Subtotal", "67.07"),
        pair("VAT", "5.06"),
        pair("Total", "72.13", scale=1.3, bold=True),
        Line([]),
        pair("Paid by", "Cheque"),
        Line([]),
        centred("Thank you for your visit"),
    ]
    return Page("receipt", 0, lines)


def example() -> Image.Image:
    """Return the image of the receipt."""
    return draw_page(example_page(), SEED, "heldout", LOOK)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path)
    path = parser.parse_args().image
    fonts.require("heldout")
    example().save(path)
    print(path)


if __name__ == "__main__":
    main()
