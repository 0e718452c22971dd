"""Which characters each visual token and each patch of a printed page covers: what tower and language model learn from.

A visual token covers 32x32 px of a tile, a patch 16x16 px. A character belongs to the one in which the middle of its ink
lies, with its line's height in the vertical. No image is drawn for this.
"""

from dataclasses import dataclass

import torch
from nemotron_vl.image_processing import select_tile_grid

from documents.fonts import CHARACTERS
from documents.typesetting import Glyph, Print

SIDE = 16  # visual tokens along a tile
TOKENS_PER_TILE = SIDE * SIDE
CLASS_OF = {character: index for index, character in enumerate(CHARACTERS)}
SPACE, NONE = CLASS_OF[" "], len(CHARACTERS)
NUM_CLASSES = NONE + 1


@dataclass
class Cells:
    """What the visual tokens of a page cover.

    Attributes:
        grid: rows and columns of tiles.
        glyphs: by index of the visual token (tile by tile, row by row): its characters in reading order with their
            places in the token, 0 to 1 across and down.
        type_height: of the page's type in the tiles, in pixels.
        max_num_tiles: with which the grid was chosen.
    """

    grid: tuple[int, int]
    glyphs: dict[int, list[tuple[str, float, float]]]
    type_height: float
    max_num_tiles: int

    @property
    def num_tokens(self) -> int:
        return TOKENS_PER_TILE * self.grid[0] * self.grid[1]

    def tile(self, index: int) -> dict[int, list[tuple[str, float, float]]]:
        """Return the glyphs of one tile, by index of the visual token in the tile."""
        first = TOKENS_PER_TILE * index
        return {token - first: found for token, found in self.glyphs.items() if 0 <= token - first < TOKENS_PER_TILE}


def cells_of(printed: Print, max_num_tiles: int, jitter: float = 0.0, rng=None) -> Cells:
    """Return what the visual tokens of a print cover, by the published choice of tiles with doubling.

    Args:
        printed: a page set in type.
        max_num_tiles: at most so many tiles.
        jitter: standard deviation of errors in the places of characters, in visual tokens: a tower is unsure of
            characters that lie on a border.
        rng: for the jitter.
    """
    rows, columns = select_tile_grid(printed.height, printed.width, max_num_tiles=max_num_tiles, upscale=2)
    across, down = columns * SIDE / printed.width, rows * SIDE / printed.height
    found: dict[int, list[tuple[int, float, Glyph, float, float]]] = {}
    for glyph in printed.glyphs:
        x, y = glyph.x * across, glyph.y * down
        if jitter:
            x, y = x + rng.gauss(0, jitter), y + rng.gauss(0, jitter)
        column, row = min(max(int(x), 0), columns * SIDE - 1), min(max(int(y), 0), rows * SIDE - 1)
        token = ((row // SIDE) * columns + column // SIDE) * TOKENS_PER_TILE + (row % SIDE) * SIDE + column % SIDE
        found.setdefault(token, []).append((glyph.line, x, glyph, x - column, y - row))
    glyphs = {}
    for token, entries in found.items():
        entries.sort(key=lambda entry: entry[:2])
        glyphs[token] = [(glyph.character, x, y) for _, _, glyph, x, y in entries]
    return Cells((rows, columns), glyphs, printed.size * down * 2 * SIDE, max_num_tiles)


def token_classes(glyphs: dict[int, list[tuple[str, float, float]]], num_slots: int) -> torch.Tensor:
    """Return the classes of the characters of each visual token of a tile, `(256, num_slots)`, `NONE` for no more."""
    classes = [[NONE] * num_slots for _ in range(TOKENS_PER_TILE)]
    for token, found in glyphs.items():
        for slot, (character, _, _) in enumerate(found[:num_slots]):
            classes[token][slot] = CLASS_OF[character]
    return torch.tensor(classes)


def patch_classes(glyphs: dict[int, list[tuple[str, float, float]]], num_slots: int) -> torch.Tensor:
    """Return the classes of the characters of each patch of a tile, `(1024, num_slots)`, `NONE` for no more."""
    classes = [[NONE] * num_slots for _ in range(4 * TOKENS_PER_TILE)]
    used = [0] * len(classes)
    for token, found in glyphs.items():
        for character, x, y in found:
            patch = (token // SIDE * 2 + (y >= 0.5)) * 2 * SIDE + token % SIDE * 2 + (x >= 0.5)
            if used[patch] < num_slots:
                classes[patch][used[patch]] = CLASS_OF[character]
                used[patch] += 1
    return torch.tensor(classes)
