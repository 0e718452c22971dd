"""The three stages of nano's training run, resume, and write a checkpoint, as docs/nano.md says."""

import argparse
import functools
import importlib
import json
import os
import re
import shlex
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

from documents.drawing import require_fonts
from documents.questions import ABSENT, verdict_of
from evaluation import nano as evaluation
from pretraining import common, joint, language, vision
from pretraining.batches import Encoder
from pretraining.common import Score, average, gradient_step, load_weights, prepare_torch
from pretraining.curve import draw_curve, read_log
from pretraining.mixture import auxiliary_batch
from pretraining.nano import load_tokenizer
from tools import ROOT
from tools.chat import load

SMALL = ["--batch-size", "2", "--threads", "1"]


def run(stage, *arguments: str, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", [stage.__name__, *map(str, arguments)])
    stage.main()


def state(output: Path) -> dict:
    return json.loads((output / "state.json").read_text())


@pytest.fixture
def quick(monkeypatch):
    """Measure on few held-out pages; restore the number of threads and the handling of denormals afterwards."""
    num_threads = torch.get_num_threads()
    monkeypatch.setattr(joint, "measure", functools.partial(joint.measure, num_batches=1))
    monkeypatch.setattr(vision, "measure", functools.partial(vision.measure, num_pages=2))
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


@pytest.mark.parametrize(("share", "rates"), [("0", [1, 1, 1]), ("0.4", [1, 1, 0.02]), ("1", [1, 0.5, 0.02])])
def test_the_learning_rate_decays_over_the_last_share_of_the_minutes(share, rates):
    arguments = common.run_parser("", minutes=1, muon_lr=0.1, adamw_lr=1.0).parse_args(
        ["--output", "run", "--lr-decay", share]
    )
    optimizers = common.build_optimizers(nn.Linear(2, 2), arguments)
    for progress, rate in zip((0.0, 0.5, 1.0), rates, strict=True):
        common.set_learning_rate(optimizers, progress, steps_since_start=100)
        assert optimizers[0].param_groups[0]["lr"] == pytest.approx(rate)


def test_a_share_is_from_0_to_1(capsys):
    with pytest.raises(SystemExit):
        common.run_parser("", minutes=1).parse_args(["--output", "run", "--lr-decay", "40"])
    assert "40 is no share" in capsys.readouterr().err


def test_joint_training_needs_both_earlier_stages(tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        run(joint, "--output", tmp_path, "--language", tmp_path, monkeypatch=monkeypatch)
    assert "--language and --vision" in capsys.readouterr().err


def test_one_process_averages_nothing():
    tensor = torch.tensor([1.0, 2.0])
    average([tensor])
    assert tensor.tolist() == [1.0, 2.0]


def test_weights_of_another_model_are_refused(tmp_path):
    save_file({"other.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"other\.weight"):
        load_weights(nn.Linear(1, 1), tmp_path / "model.safetensors")


def test_a_part_of_a_larger_model_can_be_loaded(tmp_path):
    both = nn.ModuleDict({"vision": nn.Linear(1, 1), "language": nn.Linear(1, 1)})
    save_file(both.state_dict(), tmp_path / "model.safetensors")
    alone = nn.Linear(1, 1)
    load_weights(alone, tmp_path / "model.safetensors", "vision.")
    assert torch.equal(alone.weight, both["vision"].weight)
    with pytest.raises(ValueError, match=r"language\.weight"):
        load_weights(alone, tmp_path / "model.safetensors")


def test_auxiliary_batches_are_small_and_hold_their_task():
    arguments = argparse.Namespace(auxiliary=12)
    auxiliary_batches = [auxiliary_batch(step, arguments) for step in range(60)]
    counts = {"verdicts on words": 12, "verdicts on lists": 6, "verdicts on documents": 2}
    counts |= {"values before names": 4, "copying": 2}
    assert {name: len(conversations) for name, conversations in auxiliary_batches} == counts
    for name, conversations in auxiliary_batches:
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
    assert auxiliary_batches[0] == auxiliary_batch(0, arguments) != auxiliary_batch(1, arguments)


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
        gradient_step(model, sum(halves) / 2 if half is None else halves[half], [optimizer])
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
    command = ["--output", tmp_path, *SMALL, "--random-pages", 0.5, "--lookups", 0.5, "--skip-blank-rows"]
    command += ["--auxiliary", 6]
    run(language, *command, "--minutes", 0.02, monkeypatch=quick)
    before = state(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    run(language, *command, "--minutes", before["minutes"] + 0.02, "--freeze-glyph-embedding", monkeypatch=quick)
    after = load_file(tmp_path / "model.safetensors")
    assert state(tmp_path)["step"] > before["step"] > 0
    assert weights.keys() == after.keys()
    frozen = {name for name in after if torch.equal(weights[name], after[name])}
    assert frozen == {name for name in after if name.startswith("glyph_embedding.")}
    embedding = next(name for name in after if "embed_tokens" in name)
    moved = (weights[embedding] != after[embedding]).any(1)
    glyphs = list(Encoder(load_tokenizer()).glyphs.values())
    assert not moved[glyphs].any()
    assert moved[load_tokenizer().convert_tokens_to_ids("<|eot_id|>")]
    heldout = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()][-1]
    assert heldout["held out"] and 0 <= heldout["answers"] <= heldout["tokens"] <= 1


@pytest.mark.slow
def test_nano_goes_on_learning_and_is_written(tmp_path, quick, fonts):
    heads = (ROOT / "pretraining" / "heads.safetensors").read_bytes()
    command = ["--output", tmp_path / "run", *SMALL, "--glyph-ids", 0.5, "--noise", 0.1, "--freeze-vision"]
    run(joint, *command, "--start-from", ROOT / "nano", "--minutes", 0.05, "--long", 0, monkeypatch=quick)
    first_measured = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    assert first_measured["step"] == 0
    assert first_measured["tokens"] > 0.8  # it began with what nano knows
    run(joint, *command, "--export", tmp_path / "nano", monkeypatch=quick)
    before = load_file(ROOT / "nano" / "model.safetensors")
    after = load_file(tmp_path / "nano" / "model.safetensors")
    assert before.keys() == after.keys()
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.startswith("language_model.") for name in moved)
    assert len(load_tokenizer()) == after["language_model.model.embed_tokens.weight"].shape[0]
    assert (ROOT / "pretraining" / "heads.safetensors").read_bytes() == heads  # those of nano stay
    command[1] = tmp_path / "more"
    run(joint, *command, "--start-from", tmp_path / "nano", "--minutes", 0.01, monkeypatch=quick)
    assert state(tmp_path / "more")["step"] > 0


@pytest.mark.slow
def test_the_second_stage_imitates_the_first_and_can_be_continued(tmp_path, quick, fonts):
    run(language, "--output", tmp_path / "language", *SMALL, "--minutes", 0.01, monkeypatch=quick)
    command = ["--output", tmp_path / "vision", *SMALL, "--language", tmp_path / "language"]
    run(vision, *command, "--minutes", 0.02, monkeypatch=quick)
    heldout = [json.loads(line) for line in (tmp_path / "vision" / "log.jsonl").read_text().splitlines()][-1]
    assert heldout["held out"] and 0 <= heldout["glyphs"] <= 1
    command += ["--output", tmp_path / "more", "--start-from", tmp_path / "vision"]
    quick.setattr(vision, "gradient_step", lambda model, loss, optimizers: None)  # saves the weights it starts with
    run(vision, *command, "--minutes", 0.01, monkeypatch=quick)
    first, more = (load_file(tmp_path / name / "model.safetensors") for name in ("vision", "more"))
    assert first.keys() == more.keys() and all(torch.equal(first[name], more[name]) for name in first)


@pytest.mark.slow
def test_the_commands_of_the_manual_train_and_evaluate_nano(tmp_path, quick):
    """Each command of docs/nano.md runs as it stands, in order, but for a moment and on small batches."""
    text = (ROOT / "docs" / "nano.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    commands = [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    assert [command[:2] for command in commands] == [["python", "-m"]] * 10
    (tmp_path / "nano").symlink_to(ROOT / "nano")
    quick.chdir(tmp_path)
    for stage in (vision, joint, evaluation):  # whether a command runs does not depend on the fonts
        quick.setattr(stage, "require_fonts", lambda *split: None)
    for _, _, module, *arguments in commands:
        if "--minutes" in arguments:
            arguments[arguments.index("--minutes") + 1] = "0.01"
            arguments += ["--batch-size", "2"]
        if "--documents" in arguments:
            arguments[arguments.index("--documents") + 1] = "20"
        if module != "tools.adopt":
            arguments += ["--threads", "1"]
        run(importlib.import_module(module), *arguments, monkeypatch=quick)
    logs = sorted(path.parent.name for path in (tmp_path / "runs").glob("*/log.jsonl"))
    assert logs == ["documents", "joint", "joint-2", "more", "random-pages", "vision", "vision-2"]
    assert all(state(tmp_path / "runs" / name)["step"] > 0 for name in logs)
    assert len(json.loads((tmp_path / "runs" / "nano.json").read_text())["answers"]) == 22
    model, _ = load(tmp_path / "runs" / "nano")
    assert model.state_dict().keys() >= load_file(ROOT / "nano" / "model.safetensors").keys()


def test_the_curve_of_several_runs_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("1-first", "2-second"):
        entries = [{"step": 20, "minutes": 1.5, "loss": 2.0, "tokens": 0.3}]
        entries += [{"step": 20, "held out": True, "tokens": 0.4, "answers": 0.1}]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert [entry["minutes"] for entry in read_log(tmp_path / "1-first.jsonl")] == [1.5, 1.5]
    draw_curve(sorted(tmp_path.glob("*.jsonl")), tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as image:
        assert image.width > 500


def test_the_names_of_short_runs_do_not_overlap_in_the_curve(monkeypatch, tmp_path):
    figure = pytest.importorskip("matplotlib.figure", reason="pip install matplotlib").Figure
    drawn = []
    monkeypatch.setattr(figure, "savefig", lambda self, *_, **__: drawn.append(self))
    draw_curve(sorted((ROOT / "docs" / "log" / "nano").glob("*.jsonl")), tmp_path / "curve.png")
    (axes,) = drawn[0].axes
    drawn[0].canvas.draw()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == 17 and all(box.y0 >= axes.bbox.y1 for box in boxes)  # above the plot
    assert all(left.x1 <= right.x0 for left, right in pairwise(boxes))
