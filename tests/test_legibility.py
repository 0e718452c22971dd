"""The estimate of the size of type, and what commands say of it."""

from types import SimpleNamespace

import pytest
import torch
from nemotron_vl.image_processing import Tiling
from PIL import Image

from documents.contents import make_page
from documents.drawing import draw
from documents.typesetting import Look, set_page
from pretraining.cells import cells_of
from pretraining.tower import sample_tiles
from tools.legibility import type_height, warning

TILING = Tiling(max_num_tiles=2, use_thumbnail=False)


def model(limits) -> SimpleNamespace:
    return SimpleNamespace(config=SimpleNamespace(**({"readable_type_height": limits} if limits else {})))


def page_image(seed: int, size: float = 20) -> Image.Image:
    look = Look(size=(size, size))
    return draw(set_page(make_page(seed, kind="receipt"), seed, look=look), seed)


@pytest.mark.parametrize("seed", range(8))
def test_the_size_of_type_is_estimated_in_every_look(seed):
    tiles, cells = sample_tiles(seed, "heldout", 2, Look())
    assert type_height(tiles.float() / 255) == pytest.approx(cells.type_height, rel=0.3)


def test_light_type_on_dark_paper_is_seen_as_well():
    tiles = sample_tiles(3, "heldout", 1, Look())[0].float() / 255
    assert type_height(1 - tiles) == pytest.approx(type_height(tiles), rel=0.1)


def test_an_empty_page_has_no_type():
    assert type_height(torch.ones(1, 3, 512, 512)) is None
    assert "far smaller than 15 px" in warning(model([15, 70]), TILING, Image.new("RGB", (300, 400), "white"))


def test_small_type_is_named_with_what_to_do():
    note = warning(model([200, 300]), TILING, page_image(1))
    assert "too small for this model, which reads 200 to 300 px" in note and "Cut out less" in note


def test_large_type_is_named():
    setting = set_page(make_page(1, kind="receipt"), 1, look=Look(tilted=0, photographed=0))
    image = draw(setting, 1, degradation=0)
    height = cells_of(setting, 2).type_height
    note = warning(model([2, height / 3]), TILING, image)
    assert "too large" in note and "Cut out more" in note


def test_readable_pages_and_models_without_limits_get_no_note():
    assert warning(model([15, 70]), TILING, page_image(2)) is None
    assert warning(model(None), TILING, Image.new("RGB", (300, 400))) is None
