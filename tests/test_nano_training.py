"""The three stages of nano's training: they run, go on where they stopped, and write what they learned."""

import argparse
import functools
import json
import os
import re
import socket
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import distributed, nn
from torch.multiprocessing import spawn

from training import distil, joint, perfect_cells, runs
from training.batches import Encoder
from training.curve import draw_curve, read_log
from training.drawing import require_fonts
from training.lessons import draw_drill
from training.nano import load_tokenizer
from training.questions import ABSENT, verdict_of
from training.runs import Score, average, learn, load_weights, prepare_torch

SMALL = ["--batch-size", "2", "--threads", "1"]


def run(stage, *arguments: str, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", [stage.__name__, *map(str, arguments)])
    stage.main()


def state(output: Path) -> dict:
    return json.loads((output / "state.json").read_text())


@pytest.fixture
def quick(monkeypatch):
    """Exams of a few pages instead of sixty, and the number of threads and the handling of denormals given back."""
    num_threads = torch.get_num_threads()
    monkeypatch.setattr(joint, "measure", functools.partial(joint.measure, num_batches=1))
    monkeypatch.setattr(distil, "measure", functools.partial(distil.measure, num_pages=2))
    yield monkeypatch
    torch.set_flush_denormal(False)
    torch.set_num_threads(num_threads)


@pytest.fixture
def fonts():
    try:
        require_fonts()
    except ImportError as error:
        pytest.skip(str(error))


def test_answers_are_counted_token_by_token_and_as_a_whole():
    end, labels = 9, torch.tensor([1, 2, 9, 3, 9])
    score = Score(end)
    score.add(nn.functional.one_hot(torch.tensor([1, 7, 9, 3, 9]), 10).float(), labels)
    assert score.shares == {"tokens": 0.8, "answers": 0.5}


@pytest.mark.parametrize(("fall", "rates"), [("0", [1, 1, 1]), ("0.4", [1, 1, 0.02]), ("1", [1, 0.5, 0.02])])
def test_the_rate_falls_over_the_share_that_was_asked_for(fall, rates):
    arguments = runs.run_parser("", minutes=1, muon_lr=0.1, adamw_lr=1.0).parse_args(
        ["--output", "run", "--fall", fall]
    )
    optimizers = runs.build_optimizers(nn.Linear(2, 2), arguments)
    for progress, rate in zip((0.0, 0.5, 1.0), rates, strict=True):
        runs.set_progress(optimizers, progress, steps_since_start=100)
        assert optimizers[0].param_groups[0]["lr"] == pytest.approx(rate)


def test_a_share_is_from_0_to_1(capsys):
    with pytest.raises(SystemExit):
        runs.run_parser("", minutes=1).parse_args(["--output", "run", "--fall", "40"])
    assert "40 is no share" in capsys.readouterr().err


def test_pictures_need_eyes_and_a_reader(tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        run(joint, "--output", tmp_path, "--language", tmp_path, monkeypatch=monkeypatch)
    assert "--language and --eyes" in capsys.readouterr().err


def test_one_process_averages_nothing():
    tensor = torch.tensor([1.0, 2.0])
    average([tensor])
    assert tensor.tolist() == [1.0, 2.0]


def test_weights_of_another_model_are_refused(tmp_path):
    save_file({"other.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"other\.weight"):
        load_weights(nn.Linear(1, 1), tmp_path / "model.safetensors")


def test_a_part_of_a_larger_model_can_be_loaded(tmp_path):
    both = nn.ModuleDict({"eye": nn.Linear(1, 1), "reader": nn.Linear(1, 1)})
    save_file(both.state_dict(), tmp_path / "model.safetensors")
    alone = nn.Linear(1, 1)
    load_weights(alone, tmp_path / "model.safetensors", "eye.")
    assert torch.equal(alone.weight, both["eye"].weight)
    with pytest.raises(ValueError, match=r"reader\.weight"):
        load_weights(alone, tmp_path / "model.safetensors")


def test_drills_cost_little_and_are_what_they_say():
    arguments = argparse.Namespace(drills=12)
    drills = [draw_drill(step, arguments) for step in range(60)]
    counts = {"verdicts on words": 12, "verdicts on lists": 6, "verdicts on documents": 2}
    counts |= {"values before names": 4, "copying": 2}
    assert {name: len(conversations) for name, conversations in drills} == counts
    for name, conversations in drills:
        for conversation in conversations:
            if name == "values before names":
                lines = [line.strip() for line in conversation.documents[0].lines if line]
                values = [turn.answer for turn in conversation.turns if turn.answer != ABSENT]
                above = {line: caption for line, caption in pairwise(lines) if re.fullmatch(r"[\W_].+[\W_]", caption)}
                assert values and all(v in above or any(line.startswith(f"{v} ") for line in lines) for v in values)
            elif name == "copying":
                assert [turn.answer for turn in conversation.turns] == [conversation.documents[0].text]
            else:
                assert all(turn.answer == f"{turn.given} {verdict_of(turn.answer)}" for turn in conversation.turns)
                assert bool(conversation.documents) == (name != "verdicts on words")
    assert drills[0] == draw_drill(0, arguments) != draw_drill(1, arguments)


def learn_a_half(rank: int, folder: Path, port: int, steps: int = 3) -> None:
    """One of two processes: learn from one half of the batch and save."""
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    prepare_torch(1)
    save_file(two_layers_after(steps, half=rank), folder / f"{rank}.safetensors")
    distributed.destroy_process_group()


def two_layers_after(steps: int, half: int | None = None) -> dict[str, torch.Tensor]:
    """Weights after learning; the second layer gets no gradient from the first half of the batch."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(3, 2), nn.Linear(2, 2)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    inputs = torch.randn(4, 3)
    for _ in range(steps):
        halves = [model[0](inputs[:2]).square().mean(), model[1](model[0](inputs[2:])).square().mean()]
        learn(model, sum(halves) / 2 if half is None else halves[half], [optimizer])
    return model.state_dict()


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    spawn(learn_a_half, (tmp_path, port), nprocs=2)
    alone = two_layers_after(3)
    for rank in range(2):
        torch.testing.assert_close(load_file(tmp_path / f"{rank}.safetensors"), alone)


@pytest.mark.slow
def test_the_first_stage_learns_and_goes_on(tmp_path, quick):
    command = ["--output", tmp_path, *SMALL, "--exercises", 0.5, "--look-ups", 0.5, "--skip-blank-rows"]
    command += ["--drills", 6]
    run(perfect_cells, *command, "--minutes", 0.02, monkeypatch=quick)
    before = state(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    run(perfect_cells, *command, "--minutes", before["minutes"] + 0.02, "--freeze-cells", monkeypatch=quick)
    after = load_file(tmp_path / "model.safetensors")
    assert state(tmp_path)["step"] > before["step"] > 0
    assert weights.keys() == after.keys()
    frozen = {name for name in after if torch.equal(weights[name], after[name])}
    assert frozen == {name for name in after if name.startswith("cells.")}
    embedding = next(name for name in after if "embed_tokens" in name)
    moved = (weights[embedding] != after[embedding]).any(1)
    glyphs = list(Encoder(load_tokenizer()).glyphs.values())
    assert not moved[glyphs].any()
    assert moved[load_tokenizer().convert_tokens_to_ids("<|eot_id|>")]
    exam = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()][-1]
    assert exam["held out"] and 0 <= exam["answers"] <= exam["tokens"] <= 1


@pytest.mark.slow
def test_nano_goes_on_learning_and_is_written(tmp_path, quick, fonts):
    from tools import ROOT

    quick.setattr(joint, "HEADS_FILE", tmp_path / "heads.safetensors")
    (tmp_path / "heads.safetensors").write_bytes((ROOT / "training" / "heads.safetensors").read_bytes())
    command = ["--output", tmp_path / "run", *SMALL, "--cells", 0.5, "--noise", 0.1, "--freeze-eyes"]
    run(joint, *command, "--start-from", ROOT / "nano", "--minutes", 0.05, "--long", 0, monkeypatch=quick)
    first_exam = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    assert first_exam["step"] == 0
    assert first_exam["tokens"] > 0.8  # it began with what nano knows
    run(joint, *command, "--export", tmp_path / "nano", monkeypatch=quick)
    before = load_file(ROOT / "nano" / "model.safetensors")
    after = load_file(tmp_path / "nano" / "model.safetensors")
    assert before.keys() == after.keys()
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.startswith("language_model.") for name in moved)
    assert len(load_tokenizer()) == after["language_model.model.embed_tokens.weight"].shape[0]


@pytest.mark.slow
def test_eyes_learn_what_the_language_model_wants_to_see(tmp_path, quick, fonts):
    run(perfect_cells, "--output", tmp_path / "cells", *SMALL, "--minutes", 0.01, monkeypatch=quick)
    command = ["--output", tmp_path / "eyes", *SMALL, "--language", tmp_path / "cells"]
    run(distil, *command, "--minutes", 0.02, monkeypatch=quick)
    exam = [json.loads(line) for line in (tmp_path / "eyes" / "log.jsonl").read_text().splitlines()][-1]
    assert exam["held out"] and 0 <= exam["glyphs"] <= 1
    command += ["--output", tmp_path / "more", "--start-from", tmp_path / "eyes"]
    quick.setattr(distil, "learn", lambda model, loss, optimizers: None)  # what it begins with is what it saves
    run(distil, *command, "--minutes", 0.01, monkeypatch=quick)
    eyes, more = (load_file(tmp_path / name / "model.safetensors") for name in ("eyes", "more"))
    assert eyes.keys() == more.keys() and all(torch.equal(eyes[name], more[name]) for name in eyes)


def test_the_curve_of_several_runs_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("1-first", "2-second"):
        entries = [{"step": 20, "minutes": 1.5, "loss": 2.0, "tokens": 0.3}]
        entries += [{"step": 20, "held out": True, "tokens": 0.4, "answers": 0.1}]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert [entry["minutes"] for entry in read_log(tmp_path / "1-first.jsonl")] == [1.5, 1.5]
    draw_curve(sorted(tmp_path.glob("*.jsonl")), tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.width > 500
