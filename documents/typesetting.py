"""Sets the lines of pages in type: where every character stands, tilt and perspective included.

`documents.drawing` makes images of it; training on characters without images needs no more than this. A seed always
gives the same print.
"""

import math
import random
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from documents import fonts
from documents.fonts import Typeface
from documents.pages import Line, Page


class Glyph(NamedTuple):
    """A printed character.

    Attributes:
        character: a space follows every word.
        x, y: middle of the ink and half the height of a capital above the baseline, in pixels of the image.
        line: index of the line that it belongs to; a page's lines are counted from the top.
    """

    character: str
    x: float
    y: float
    line: int


@dataclass(frozen=True)
class Look:
    """How pages may look: ranges to draw from.

    Attributes:
        size: of the type, in pixels of the image before it is cut into tiles.
        leading: distance of baselines, in sizes.
        narrowest: least width of the text, in sizes.
        tilted: share of pages that are tilted by up to `degrees`.
        degrees: likewise.
        photographed: share of pages seen in perspective on a desk.
        degradation: strength of blur, noise, shade and compression, 0 to 1.
    """

    size: tuple[float, float] = (14, 32)
    leading: tuple[float, float] = (1.15, 1.65)
    narrowest: tuple[float, float] = (8, 14)
    tilted: float = 0.3
    degrees: float = 2.0
    photographed: float = 0.15
    degradation: float = 1.0


@dataclass
class Run:
    """A string in one cut at one place: what `draw` prints."""

    text: str
    x: float
    baseline: float
    size: int
    bold: bool


@dataclass
class Print:
    """A page set in type.

    Attributes:
        width, height: of the image, in pixels.
        glyphs: every character with its place in the image, tilt and perspective included.
        typeface: of the page.
        size: of the type in pixels.
        runs: strings, rules (left, top, right, bottom) and logos, in the flat page, before tilt and perspective.
        matrix: that maps places of the image to places of the flat page, eight numbers as in
            `PIL.Image.Transform.PERSPECTIVE`, or None.
        flat: width and height of the flat page.
    """

    width: int
    height: int
    glyphs: list[Glyph]
    typeface: Typeface
    size: float
    runs: list[Run] = field(default_factory=list)
    rules: list[tuple[float, float, float, float]] = field(default_factory=list)
    logo: tuple[float, float, float] | None = None
    matrix: tuple[float, ...] | None = None
    flat: tuple[int, int] = (0, 0)


def set_page(page: Page, seed: int, split: str = "train", look: Look = Look()) -> Print:  # noqa: B008
    """Set a page in the type of a seed; "heldout" pages have typefaces that training lacks half of the time."""
    rng = random.Random(f"type {split} {seed}")
    faces = fonts.installed("heldout" if split == "heldout" and rng.random() < 0.5 else "train")
    fixed = [face for face in faces if face.fixed_pitch]
    narrow = page.kind in ("receipt", "bill")
    face = rng.choice(fixed) if fixed and rng.random() < (0.45 if narrow else 0.15) else rng.choice(faces)
    setting = Setting(rng, page, face, look)
    setting.compose()
    printed = setting.printed
    printed.flat = (printed.width, printed.height)
    if rng.random() < look.photographed:
        photograph(printed, rng, look.degrees)
    elif rng.random() < look.tilted:
        tilt(printed, rng.uniform(-look.degrees, look.degrees))
    return printed


class Setting:
    """Composes the lines of one page."""

    def __init__(self, rng: random.Random, page: Page, face: Typeface, look: Look):
        self.rng, self.page, self.face = rng, page, face
        self.size = rng.uniform(*look.size)
        self.pitch = self.size * rng.uniform(*look.leading)
        self.bold_words = rng.random() < 0.12  # a page in the bold cut
        self.margin = self.size * rng.uniform(0.3, 2.2)
        self.space = fonts.metrics(face, False, max(8, round(self.size))).advance[" "]
        needed = max((self.needed(line) for line in page.lines), default=0)
        loose = rng.choice((1.0, 1.05, rng.uniform(1.0, 1.3), rng.uniform(1.0, 1.6)))
        least = self.size * rng.uniform(*look.narrowest)
        self.text_width = max(needed * loose, least)
        self.printed = Print(0, 0, [], face, self.size)

    def cut(self, line: Line) -> tuple[int, bool]:
        return max(8, round(self.size * line.scale)), line.bold or self.bold_words

    def length(self, text: str, size: int, bold: bool) -> float:
        advance = fonts.metrics(self.face, bold, size).advance
        return sum(advance[character] for character in text)

    def needed(self, line: Line) -> float:
        """Return the least width of the text on which the pieces of a line do not touch."""
        size, bold = self.cut(line)
        lengths = [self.length(piece.text, size, bold) for piece in line.pieces]
        needed = sum(lengths) + 2 * self.space * max(0, len(lengths) - 1)
        for piece, length in zip(line.pieces, lengths, strict=True):  # pieces that begin or end at a stop
            if piece.align == "l" and piece.stop > 0:
                needed = max(needed, length / (1 - piece.stop))
            if piece.align == "r" and 0 < piece.stop < 1:
                needed = max(needed, length / piece.stop)
        for left, right, wide in zip(line.pieces, line.pieces[1:], lengths, strict=False):
            if left.align == "l" and right.align == "l":
                needed = max(needed, (wide + 2 * self.space) / (right.stop - left.stop))
            if left.align == "l" and right.align == "r" and right.stop < 1:
                other = lengths[line.pieces.index(right)]
                needed = max(needed, (wide + other + 2 * self.space) / (right.stop - left.stop))
            if left.align == "r" and right.align == "r":
                other = lengths[line.pieces.index(right)]
                needed = max(needed, (other + 2 * self.space) / (right.stop - left.stop))
        return needed

    def compose(self) -> None:
        rng, printed = self.rng, self.printed
        blank = rng.uniform(0.4, 1.0)
        y = self.margin * rng.uniform(0.5, 1.5)
        if self.page.kind in ("receipt", "bill", "invoice") and rng.random() < 0.12:
            printed.logo = (self.margin + self.text_width * rng.choice((0.1, 0.5, 0.9)), y + self.size, self.size)
            y += 2.4 * self.size
        for index, line in enumerate(self.page.lines):
            step = self.pitch * max(1.0, line.scale)
            if line.rule:
                y += self.rule(line, y) * self.pitch
            elif line.bar:
                printed.rules.append(
                    (self.margin, y + 0.25 * step, self.margin + line.bar * self.text_width, y + 0.7 * step)
                )
                y += step
            elif not line.pieces:
                y += blank * self.pitch
            else:
                self.print_line(index, line, y + (step - self.pitch) * 0.7 + self.size)
                y += step
        printed.width = round(self.text_width + 2 * self.margin)
        printed.height = round(y + self.margin * rng.uniform(0.5, 1.5))

    def rule(self, line: Line, y: float) -> float:
        """Print a rule and return how many lines it takes."""
        left, right = self.margin, self.margin + self.text_width
        if line.rule == "_":
            middle = y + 0.35 * self.pitch
            self.printed.rules.append((left, middle, right, middle + max(1.0, self.size / 16)))
            return 0.6
        size = self.cut(line)[0]
        count = int(self.text_width / self.length(line.rule, size, False))
        self.printed.runs.append(Run(line.rule * count, left, y + self.size, size, False))
        return 0.9

    def print_line(self, index: int, line: Line, baseline: float) -> None:
        size, bold = self.cut(line)
        metrics = fonts.metrics(self.face, bold, size)
        end = -math.inf
        for piece in line.pieces:
            length = self.length(piece.text, size, bold)
            share = {"l": 0.0, "c": 0.5, "r": 1.0}[piece.align]
            x = max(piece.stop * self.text_width - share * length, end + 1.5 * self.space, 0.0)
            end = x + length
            self.printed.runs.append(Run(piece.text, self.margin + x, baseline, size, bold))
            at = self.margin + x
            for character in piece.text + " ":
                middle = at + metrics.centre[character]
                self.printed.glyphs.append(Glyph(character, middle, baseline - metrics.cap_height / 2, index))
                at += metrics.advance[character]


def place(printed: Print, forward: np.ndarray, width: int, height: int) -> None:
    """Move a print by a projective map of the flat page into a larger image."""
    if printed.glyphs:
        places = np.array([(glyph.x, glyph.y, 1.0) for glyph in printed.glyphs]) @ forward.T
        places = places[:, :2] / places[:, 2:]
        printed.glyphs = [
            glyph._replace(x=x, y=y) for glyph, (x, y) in zip(printed.glyphs, places.tolist(), strict=True)
        ]
    backward = np.linalg.inv(forward)
    printed.matrix = tuple((backward / backward[2, 2]).flatten()[:8].tolist())
    printed.width, printed.height = width, height


def tilt(printed: Print, degrees: float) -> None:
    """Turn a print about its middle; the image grows with it."""
    width, height = printed.flat
    angle = math.radians(degrees)
    cos, sin = math.cos(angle), math.sin(angle)
    new_width, new_height = abs(width * cos) + abs(height * sin), abs(width * sin) + abs(height * cos)
    turn = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1.0]])
    to_middle = np.array([[1, 0, -width / 2], [0, 1, -height / 2], [0, 0, 1.0]])
    back = np.array([[1, 0, new_width / 2], [0, 1, new_height / 2], [0, 0, 1.0]])
    place(printed, back @ turn @ to_middle, round(new_width), round(new_height))


def photograph(printed: Print, rng: random.Random, degrees: float) -> None:
    """Lay a print on a desk, a little turned and seen a little from the side."""
    width, height = printed.flat
    border = [rng.uniform(0.02, 0.12) for _ in range(4)]
    left, top = border[0] * width, border[1] * height
    new_width, new_height = width + left + border[2] * width, height + top + border[3] * height
    angle = math.radians(rng.uniform(-degrees, degrees))
    corners = []
    for x, y in ((0, 0), (width, 0), (width, height), (0, height)):
        dx, dy = x - width / 2, y - height / 2
        turned = (dx * math.cos(angle) - dy * math.sin(angle), dx * math.sin(angle) + dy * math.cos(angle))
        away = 1 + rng.uniform(-0.02, 0.02)
        corners.append((turned[0] * away + width / 2 + left, turned[1] * away + height / 2 + top))
    place(
        printed,
        projection(((0, 0), (width, 0), (width, height), (0, height)), corners),
        round(new_width),
        round(new_height),
    )


def projection(sources, targets) -> np.ndarray:
    """Return the projective map, `(3, 3)`, that takes four points to four others."""
    rows, right = [], []
    for (x, y), (u, v) in zip(sources, targets, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        right += [u, v]
    return np.append(np.linalg.solve(np.array(rows, float), np.array(right, float)), 1.0).reshape(3, 3)
