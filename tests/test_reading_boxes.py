"""Boxes in answers are found and lie on the original page where the model saw them."""

import itertools

import numpy as np
import pytest
import torch
from nemotron_vl.image_processing import candidate_grids, cut_tiles, select_tile_grid
from nemotron_vl.reading import Box, draw_boxes, parse_boxes
from PIL import Image

WIDTH, HEIGHT = 800, 400
TILE = 64
SHARES = (0.2, 0.3, 0.6, 0.5)  # left, top, right, bottom of what is drawn on a page


def seen_by_the_model(page: Image.Image, upscale: int) -> np.ndarray:
    """All tiles of a page put together again, without the thumbnail: `(height, width)`, 0..1."""
    options = {"image_size": TILE, "upscale": upscale}
    rows, columns = select_tile_grid(page.height, page.width, **options)
    tiles = torch.stack([torch.as_tensor(tile).float() for tile in cut_tiles(page, **options)])[: rows * columns]
    grey = tiles.mean(1 if tiles.shape[1] == 3 else -1).reshape(rows, columns, TILE, TILE)
    return grey.permute(0, 2, 1, 3).reshape(rows * TILE, columns * TILE).numpy()


@pytest.mark.parametrize("upscale", [1, 2])
@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
@pytest.mark.parametrize("grid", sorted(candidate_grids(12)))
def test_a_box_comes_back_to_where_it_was_drawn(grid, rotation, upscale):
    rows, columns = grid
    # A page of the grid's shape, which is resized before it is cut; a small one is doubled before that.
    height, width = (round(side * TILE * 0.95 / upscale) for side in (grid if rotation in (0, 180) else grid[::-1]))
    left, top, right, bottom = (round(side * share) for side, share in zip((width, height) * 2, SHARES, strict=True))
    page = Image.new("RGB", (width, height), "white")
    page.paste((0, 0, 0), (left, top, right, bottom))
    turned = page.rotate(-rotation, expand=True)  # Pillow turns counter-clockwise
    seen = seen_by_the_model(turned, upscale)
    assert seen.shape == (rows * TILE, columns * TILE)
    dark_rows, dark_columns = np.nonzero(seen < seen.max() / 2)
    x1, x2 = (round(1000 * place / seen.shape[1]) for place in (dark_columns.min(), dark_columns.max() + 1))
    y1, y2 = (round(1000 * place / seen.shape[0]) for place in (dark_rows.min(), dark_rows.max() + 1))
    (box,) = parse_boxes(f"<box>({x1},{y1}),({x2},{y2})</box>", width, height, rotation)
    for found, drawn, side in zip(box.bounds, (left, top, right, bottom), (width, height) * 2, strict=True):
        # Half a thousandth by rounding, and a pixel of the tiles by resizing.
        assert abs(found - drawn) <= side * 0.0005 + 1


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("<box>(100,200),(300,250)</box>", [((80, 80, 240, 100), None)]),
        ("<ref>total</ref><box>(100,200),(300,250)</box>", [((80, 80, 240, 100), "total")]),
        ("<ref> a b </ref>\n<box>[[0, 0, 1000, 1000], [0,0,500,500]]</box>", [((0, 0, 800, 400), "a b"), ((0, 0, 400, 200), "a b")]),
        ("<ref>x</ref> is here, not <box>(0,0),(1,1)</box>", [((0, 0, 0.8, 0.4), None)]),
        ("<quad>(0,0),(1000,0),(1000,500),(0,500)</quad>", [((0, 0, 800, 200), None)]),
        ("The total is at [100, 200, 300, 250].", [((80, 80, 240, 100), None)]),
        ('{"total": [100, 200, 300, 250], "date": [0,0,10,10]}', [((80, 80, 240, 100), "total"), ((0, 0, 8, 4), "date")]),
        ('[{"bbox_2d": [100, 200, 300, 250]}]', [((80, 80, 240, 100), None)]),
        ("[[100, 200, 300, 250], [0, 0, 10, 10]]", [((80, 80, 240, 100), None), ((0, 0, 8, 4), None)]),
        ("The years [2019, 2020, 1, 2], the list [1, 2, 3] and [5, 4, 3, 2] are no boxes.", []),
        ("No box.", []),
        ("", []),
    ],
)  # fmt: skip
def test_the_forms_of_the_family_are_understood(answer, expected):
    found = [(box.bounds, box.name) for box in parse_boxes(answer, WIDTH, HEIGHT)]
    assert [name for _, name in found] == [name for _, name in expected]
    for (bounds, _), (wanted, _) in zip(found, expected, strict=True):
        assert bounds == pytest.approx(wanted)


@pytest.mark.parametrize(
    "answer",
    [
        "<box>(100,200),(300,1001)</box>", "<box>(100,200)</box>", "<box></box>", "<box>(a,b),(1,2)</box>",
        "<quad>(1,2),(3,4)</quad>", "<box>(100,200),(300,", "<ref>total", "<box>(-1,2),(3,4)</box>", "a</box>",
        "<box>(1.5,2),(3,4)</box>",
    ],
)  # fmt: skip
def test_a_broken_box_is_an_error(answer):
    with pytest.raises(ValueError, match="0 to 1000|no counterpart"):
        parse_boxes(answer, WIDTH, HEIGHT)


def test_a_page_that_cannot_be_is_an_error():
    with pytest.raises(ValueError, match="rotation"):
        parse_boxes("", WIDTH, HEIGHT, 45)
    with pytest.raises(ValueError, match="pixel"):
        parse_boxes("", 0, HEIGHT)


def test_boxes_are_drawn_where_they_are():
    page = Image.new("L", (200, 100), 255)
    drawn = draw_boxes(page, [Box(((20, 30), (80, 60)), "total"), Box(((100, 10), (150, 20), (140, 90), (100, 80)))])
    assert drawn.mode == "RGB" and drawn.size == page.size
    assert page.getextrema() == (255, 255)  # the caller's page is as it was
    red = [place for place in itertools.product(range(200), range(100)) if drawn.getpixel(place) == (220, 30, 30)]
    assert {(20, 30), (80, 60), (20, 60), (80, 30), (100, 10), (140, 90)} <= set(red)
    assert drawn.crop((20, 10, 60, 28)).getextrema() != ((255, 255),) * 3  # the name stands above
    assert drawn.getpixel((50, 45)) == (255, 255, 255)
