"""Draws the invoice of three pages that the examples read, as a PDF.

    pip install fpdf2
    python -m documents.invoice examples/invoice.pdf

The pages are as small as receipts, so that their type is large enough for nano.
"""

import argparse
import datetime
from pathlib import Path
from typing import NamedTuple

WIDTH, HEIGHT, MARGIN = 236, 380, 20  # in points
SIZE, PITCH = 12, 19  # of the type, and from line to line


class Row(NamedTuple):
    """A printed line: what stands at its left and at its right end."""

    left: str = ""
    right: str = ""
    bold: bool = False


PAGES = (
    (
        Row("Merlan Supply", bold=True),
        Row("21 Dock Road"),
        Row("Tel 040-556281"),
        Row(),
        Row("Invoice no.", "A20471"),
        Row("Date", "14.03.2026"),
        Row("Due date", "13.04.2026"),
        Row(),
        Row("Bill to", "Tova Lindner"),
    ),
    (
        Row("Paper", "12.40"),
        Row("Lamp", "64.90"),
        Row("Chair", "149.00"),
        Row("Glue", "3.75"),
        Row("Pen", "8.30"),
        Row("Vase", "31.20"),
        Row(),
        Row("Subtotal", "269.55"),
    ),
    (
        Row("Subtotal", "269.55"),
        Row("VAT", "51.21"),
        Row("Total", "320.76", bold=True),
        Row(),
        Row("Paid by", "Card"),
        Row(),
        Row("Thank you!"),
    ),
)


def draw_invoice(path: Path) -> None:
    """Write the PDF; the same bytes every time."""
    from fpdf import FPDF

    pdf = FPDF(unit="pt", format=(WIDTH, HEIGHT))
    pdf.set_creation_date(datetime.datetime(2026, 3, 14, tzinfo=datetime.UTC))
    pdf.set_title("Invoice A20471")
    pdf.set_auto_page_break(False)
    pdf.set_margin(0)
    for rows in PAGES:
        pdf.add_page()
        baseline = MARGIN + SIZE
        for row in rows:
            pdf.set_font("Helvetica", "B" if row.bold else "", SIZE)
            pdf.text(MARGIN, baseline, row.left)
            pdf.text(WIDTH - MARGIN - pdf.get_string_width(row.right), baseline, row.right)
            baseline += PITCH
    pdf.output(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pdf", type=Path)
    path = parser.parse_args().pdf
    draw_invoice(path)
    print(path)


if __name__ == "__main__":
    main()
