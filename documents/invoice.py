"""Draws the invoice of three pages that the examples read, as a PDF.

    pip install fpdf2
    python -m documents.invoice examples/invoice.pdf

nano reads pages whose characters stand in a grid of 16 columns and 16 rows, so these do. They are small, 79 x 96 mm,
so that each is one tile.
"""

import argparse
import datetime
from pathlib import Path

from documents.generator import COLUMNS, ROWS_PER_PAGE

CELL = (14, 17)  # width and height of a character, in points
FONT_SIZE = 14
BASELINE = 0.78  # of a row, from its top
PAGES = (
    (
        "Invoice A20471",
        "Date 14.03.2026",
        "Due  13.04.2026",
        "",
        "From:",
        "Merlan Supply",
        "21 Dock Road",
        "040-556281",
        "",
        "To:",
        "Tova Lindner",
    ),
    (
        "Paper      12.40",
        "Lamp       64.90",
        "Chair     149.00",
        "Glue        3.75",
        "Pen         8.30",
        "Vase       31.20",
        "",
        "Subtotal  269.55",
    ),
    (
        "Subtotal  269.55",
        "VAT        51.21",
        "Total     320.76",
        "",
        "Paid by CARD",
        "Thank you!",
    ),
)


def draw_invoice(path: Path) -> None:
    """Write the PDF; the same bytes every time."""
    from fpdf import FPDF

    width, height = CELL
    pdf = FPDF(unit="pt", format=(width * COLUMNS, height * ROWS_PER_PAGE))
    pdf.set_creation_date(datetime.datetime(2026, 3, 14, tzinfo=datetime.UTC))
    pdf.set_title("Invoice A20471")
    pdf.set_auto_page_break(False)
    pdf.set_margin(0)
    pdf.set_font("Helvetica", size=FONT_SIZE)
    for lines in PAGES:
        pdf.add_page()
        for row, line in enumerate(lines):
            for column, character in enumerate(line):
                left = column * width + (width - pdf.get_string_width(character)) / 2
                pdf.text(left, row * height + height * BASELINE, character)
    pdf.output(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pdf", type=Path)
    path = parser.parse_args().pdf
    draw_invoice(path)
    print(path)


if __name__ == "__main__":
    main()
