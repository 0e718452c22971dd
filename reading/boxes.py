"""Boxes that a model writes, mapped to pixels of the original page, and drawn over it.

Three forms are understood. The family's tokenizer has tokens for the first two:

    <ref>total</ref><box>(100,200),(300,250)</box>      also [[100, 200, 300, 250], ...], several boxes of one name
    <quad>(100,200),(300,200),(300,250),(100,250)</quad>
    [100, 200, 300, 250]                                 plain, or as a value in JSON: {"total": [100, 200, 300, 250]}

Coordinates are whole numbers from 0 to 1000: thousandths of the width and height of the image as the model saw it,
from its upper left corner. So they do not depend on the grid of tiles, nor on the doubling of small images.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

SCALE = 1000
COLOUR = (220, 30, 30)
CORNERS = {"box": 2, "quad": 4}
# Keys under which JSON answers keep a box; other keys are its name.
BOX_KEYS = ("box", "bbox", "bbox_2d", "bounding_box")
_MARKED = re.compile(r"<ref>(?P<name>.*?)</ref>|<(?P<kind>box|quad)>(?P<numbers>.*?)</(?P=kind)>", re.DOTALL)
_UNCLOSED = re.compile(r"</?(?:ref|box|quad)>")
_NUMBERS = re.compile(r"[\s()\[\],\d]*")
_LIST = re.compile(
    r'(?:"(?P<key>(?:[^"\\]|\\.)*)"\s*:\s*)?'
    r"(?P<lists>\[\s*\[[\s\d,\[\]]*\]\s*\]|\[\s*\d+(?:\s*,\s*\d+){3}\s*\])"
)


@dataclass(frozen=True)
class Box:
    """One region of a page.

    Args:
        points: corners `(x, y)` in pixels: two opposite ones of a box, the four of a quad in the order of the answer.
        name: what the model says is there; None if it says nothing.
    """

    points: tuple[tuple[float, float], ...]
    name: str | None = None

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """The upright rectangle around the points: left, top, right, bottom, in pixels."""
        xs, ys = zip(*self.points, strict=True)
        return min(xs), min(ys), max(xs), max(ys)


def parse_boxes(answer: str, width: int, height: int, rotation: int = 0) -> list[Box]:
    """Return the boxes of an answer in pixels of the original page.

    Args:
        answer: what the model wrote.
        width, height: of the original page in pixels, before it was rotated.
        rotation: degrees by which the page was turned clockwise to make the image that the model saw: 0, 90, 180, 270.

    Returns:
        in the order of the answer; empty if it holds none. A plain list counts if it holds four numbers up to 1000, the
        corners in order; other lists of numbers are taken for text.

    Raises:
        ValueError: if what stands between marks is no box, or a mark is not closed.
    """
    if rotation not in (0, 90, 180, 270):
        raise ValueError(f"rotation must be 0, 90, 180 or 270 degrees, got {rotation!r}.")
    if min(width, height) < 1:
        raise ValueError(f"width and height must be at least 1 pixel, got {width} x {height}.")
    found = [*_marked_boxes(answer)] if _UNCLOSED.search(answer) else [*_listed_boxes(answer)]
    return [
        Box(tuple(_on_page(x / SCALE, y / SCALE, width, height, rotation) for x, y in points), name)
        for points, name in found
    ]


def _on_page(x: float, y: float, width: int, height: int, rotation: int) -> tuple[float, float]:
    """Map a place in the turned image, as shares of its sides, to pixels of the page before it was turned."""
    x, y = {0: (x, y), 90: (y, 1 - x), 180: (1 - x, 1 - y), 270: (1 - y, x)}[rotation]
    return x * width, y * height


def _marked_boxes(answer: str) -> Iterator[tuple[list[tuple[int, int]], str | None]]:
    """Yield the corners and the name of each box between marks."""
    name, last_end = None, 0
    for match in _MARKED.finditer(answer):
        between = answer[last_end : match.start()]
        _check_closed(between)
        last_end = match.end()
        if match["kind"] is None:
            name = match["name"].strip()
            continue
        if between.strip(" ,;\n"):
            name = None  # words between a name and a box part them
        for points in _corners(match["numbers"], CORNERS[match["kind"]]):
            yield points, name
    _check_closed(answer[last_end:])


def _check_closed(text: str) -> None:
    mark = _UNCLOSED.search(text)
    if mark:
        raise ValueError(
            f"The mark {mark[0]} has no counterpart, at {text[mark.start() :][:60]!r}. The answer may be cut off."
        )


def _corners(text: str, number: int) -> Iterator[list[tuple[int, int]]]:
    """Yield groups of `number` points out of the numbers between marks."""
    numbers = [int(digits) for digits in re.findall(r"\d{1,9}", text)]
    if not _NUMBERS.fullmatch(text) or not numbers or len(numbers) % (2 * number) or max(numbers) > SCALE:
        raise ValueError(f"{text[:80]!r} is not {number} points (x,y) of whole numbers from 0 to {SCALE}.")
    for start in range(0, len(numbers), 2 * number):
        group = numbers[start : start + 2 * number]
        yield list(zip(group[::2], group[1::2], strict=True))


def _listed_boxes(answer: str) -> Iterator[tuple[list[tuple[int, int]], str | None]]:
    """Yield the corners and the name of each plain list of four numbers."""
    for match in _LIST.finditer(answer):
        name = None if match["key"] in (None, *BOX_KEYS) else match["key"]
        for group in re.findall(r"\[([\s\d,]*)\]", match["lists"]):
            numbers = [int(digits) for digits in re.findall(r"\d{1,9}", group)]
            if len(numbers) == 4 and max(numbers) <= SCALE and numbers[0] <= numbers[2] and numbers[1] <= numbers[3]:
                yield [(numbers[0], numbers[1]), (numbers[2], numbers[3])], name


def draw_boxes(image: Image.Image, boxes: Sequence[Box], colour: tuple[int, int, int] = COLOUR) -> Image.Image:
    """Return a copy of the page, as RGB, with the boxes and their names drawn over it."""
    page = image.convert("RGB")
    canvas = ImageDraw.Draw(page)
    side = max(page.size)
    line_width, font_size = max(2, side // 500), max(10, side // 60)
    for box in boxes:
        left, top, right, bottom = box.bounds
        if len(box.points) == 2:
            canvas.rectangle((left, top, right, bottom), outline=colour, width=line_width)
        else:
            canvas.polygon(box.points, outline=colour, width=line_width)
        if box.name:
            anchor, place = ("lb", top - line_width) if top > font_size * 1.3 else ("lt", bottom + line_width)
            canvas.text((left, place), box.name, fill=colour, font_size=font_size, anchor=anchor)
    return page
