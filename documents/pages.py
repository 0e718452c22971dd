"""The content of pages: lines of text with places, sizes and weights, and what a document knows about itself.

`documents.contents` fills pages, `documents.typesetting` prints them.
"""

from dataclasses import dataclass, field


@dataclass
class Piece:
    """A run of text on a line.

    Attributes:
        text: one line, single spaces.
        stop: where it stands on the line, as a share of the width of the text, 0 to 1.
        align: which part of the run stands there: "l" its start, "c" its middle, "r" its end.
    """

    text: str
    stop: float = 0.0
    align: str = "l"


@dataclass
class Line:
    """A printed line.

    Attributes:
        pieces: from left to right; an empty list for a blank line.
        scale: size relative to the page's type.
        bold: in the bold cut.
        rule: "" or how a rule fills the line: "-", "=", "." or "*" repeated, "_" for a drawn line.
        bar: length of a chart's bar that is drawn from the left, as a share of the width; 0 for none.
    """

    pieces: list[Piece]
    scale: float = 1.0
    bold: bool = False
    rule: str = ""
    bar: float = 0.0

    @property
    def text(self) -> str:
        return " ".join(piece.text for piece in self.pieces)


@dataclass
class Page:
    """One page.

    Attributes:
        kind: of `documents.contents.KINDS`.
        layout: index of the arrangement; some are held out from training.
        lines: from top to bottom.
        fields: values that questions can be about, by name; each is printed exactly so.
        labels: how the page names a field, for those that it names.
        prices: price (or chart value, or table cell) of each thing named on the page.
        table: header and body rows for tables.
        is_seen: False if training has no such layout.
    """

    kind: str
    layout: int
    lines: list[Line]
    fields: dict[str, str] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    prices: dict[str, str] = field(default_factory=dict)
    table: list[list[str]] | None = None
    is_seen: bool = True

    @property
    def text(self) -> str:
        """The transcription: printed lines without blank ones and rules, the pieces of a line joined by a space."""
        return "\n".join(line.text for line in self.lines if line.pieces)
