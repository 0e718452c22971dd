"""Random hostile inputs, a bounded number of them; `make fuzz` goes on for as long as wanted (tests/fuzz.py)."""

import os
import random

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests import fuzz, hostile, hostile_files
from tests.hostile import Source, tiny_processor

BOUNDED = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


def source_of(data: st.DataObject) -> Source:
    return Source(lambda low, high: data.draw(st.integers(low, high)))


@pytest.mark.filterwarnings("ignore")
@BOUNDED
@given(data=st.data())
def test_pictures_give_tiles_or_a_refusal(data):
    source = source_of(data)
    hostile.check_pictures(hostile.pictures(source), hostile.image_options(source))


@BOUNDED
@given(data=st.data())
def test_messages_give_honest_prompts_or_a_refusal(data):
    source = source_of(data)
    hostile.check_messages(hostile.conversation(source), hostile.template_options(source))


@BOUNDED
@given(data=st.data())
def test_chats_give_honest_prompts_or_a_refusal(data):
    hostile.check_chat(hostile.chat_arguments(source_of(data)))


@BOUNDED
@given(data=st.data())
def test_configs_are_built_or_refused(data):
    hostile.check_config(hostile.config_dict(source_of(data)), (StrictDataclassError,))


@settings(BOUNDED, max_examples=5)
@given(data=st.data())
def test_damaged_checkpoints_are_loaded_or_refused_and_run_nothing(data):
    hostile_files.check_files(hostile_files.damages(source_of(data)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "inputs"), [("pictures", 400), ("prompts", 400), ("configs", 400)])
def test_the_first_inputs_of_the_long_run_break_nothing_and_are_not_all_refused(kind, inputs):
    counts = fuzz.Counter()
    assert not [finding for number in range(inputs) if (finding := fuzz.run(number, kind, counts))]
    assert counts["accepted"] > inputs / 10 < counts["refused"]


@pytest.mark.slow
def test_the_first_damaged_checkpoints_break_nothing_and_are_not_all_refused():
    counts = fuzz.Counter()
    assert not [finding for number in range(100) if (finding := fuzz.run(number, "files", counts))]
    assert counts["accepted"] > 10 < counts["refused"]


def test_an_input_is_made_from_its_number_alone():
    for pairs in fuzz.TARGETS.values():
        for _, generate in pairs:
            assert repr(fuzz.make(7, generate))[:40] == repr(fuzz.make(7, generate))[:40]


def test_the_checks_of_a_long_run_find_a_forged_turn(monkeypatch):
    """Without the guard the generators do find forgeries: the long run is not blind."""
    monkeypatch.setattr("nemotron_vl.prompts.ControlTokenGuard.protect", lambda self, data, *_: data)
    findings = [fuzz.run(number, "prompts", fuzz.Counter()) for number in range(100)]
    assert sum(finding is not None for finding in findings) > 10


# Found by hand or by a long run, fixed, and kept -------------------------------------------------------------------------


def nested(depth: int) -> list:
    inner: list = []
    for _ in range(depth):
        inner = [inner]
    return inner


@pytest.mark.parametrize(
    ("images", "options"),
    [
        (torch.zeros(3, 8, 8, device="meta"), {}),
        (torch.nested.nested_tensor([torch.zeros(3, 3)]), {}),
        (torch.zeros(3, 8, 8).to_sparse(), {}),
        (nested(3000), {}),
        (Image.new("RGB", (8, 8)), {"downsample_ratio": 1e-320}),
        (Image.new("RGB", (8, 8)), {"image_size": 2**20}),
        (Image.new("RGB", (8, 8)), {"image_size": 2**40}),
        (Image.new("RGB", (8, 8)), {"max_num_tiles": 1024, "image_size": 2048}),
        (np.zeros((0, 0, 3), np.uint8), {}),
        ("/dev/zero", {}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_kept_pictures_are_refused(images, options):
    with pytest.raises((ValueError, TypeError)):
        tiny_processor().image_processor(images, **options)


@pytest.mark.slow
@pytest.mark.parametrize("number", [28400, 45200, 54700, 57200, 61600])
def test_kept_damaged_checkpoints_are_loaded_or_refused(number):
    """A dtype that is none; a lone surrogate, a token id and a length of the wrong kind; no JSON object."""
    assert fuzz.run(number, "files", fuzz.Counter()) is None


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path):
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no named pipes")
    os.mkfifo(tmp_path / "pipe")
    for name in (tmp_path / "pipe", (tmp_path / "pipe").as_uri()):
        with pytest.raises(ValueError, match="no such file"):
            tiny_processor().image_processor(name)


def test_a_list_that_holds_itself_is_refused():
    endless: list = []
    endless.append(endless)
    with pytest.raises(ValueError, match="100 levels deep"):
        tiny_processor().image_processor(endless)


def test_random_sources_stay_within_their_bounds():
    source = Source(random.Random(0).randint)
    assert {source.pick(1, 2, 3) for _ in range(99)} == {1, 2, 3}
    assert all(len(source.data(3)) <= 3 for _ in range(99))
