"""The stages of nano's training run, resume, and write a checkpoint that answers, as docs/nano.md says."""

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
from torch import nn
from torch.multiprocessing import spawn

from documents import fonts
from documents.contents import make_page
from documents.drawing import draw_page
from documents.pages import Line, Page, Piece
from documents.questions import ABSENT, Conversation, Turn
from documents.typesetting import Look
from pretraining import common, joint, language, tower
from pretraining.common import Score, average, gradient_step, load_part, load_weights, prepare_torch
from pretraining.curve import draw_curve, read_log
from pretraining.language import IGNORE_INDEX, CellEncoder, CellLanguageModel, answer_loss, set_lesson
from pretraining.muon import orthogonalize
from pretraining.nano import HEADS, build_model, load_tokenizer, nano_weights
from pretraining.tokenizer import build_tokenizer
from pretraining.tower import NEIGHBOURS, PATCHES, Anchors, GlyphTower, Strips, look_at_neighbours, neighbours_of
from tools import ROOT
from tools.chat import load

FLAT = Look(narrowest=(2, 3), tilted=0.0, photographed=0.0, degradation=0.0)


@pytest.fixture(scope="module")
def encoder() -> CellEncoder:
    return CellEncoder(build_tokenizer())


@pytest.fixture(scope="module")
def looking_tower(encoder) -> GlyphTower:
    """A new tower whose heads look at neighbours."""
    torch.manual_seed(0)
    made = GlyphTower(build_model(encoder.tokenizer))
    pixels = Strips(2, 8, 0.5, encoder).batch(16, 99, Look())[0]
    conditioned = made.vision_model.radio_model
    patches = conditioned.model.patch_generator.patchify(conditioned.input_conditioner(pixels)).flatten(0, 1)
    look_at_neighbours(made, patches[patches.std(-1) > 0.2])
    return made


def lesson_of(*lines: str, question: str = "Read the page.", answer: str = "x", tiles: int = 1):
    page = Page("random text", 0, [Line([Piece(text)]) for text in lines])
    return set_lesson(Conversation([page], [Turn("field", question, answer)]), [1], "train", FLAT, tiles)


def test_a_lesson_is_the_published_prompt_with_a_cell_for_every_image_token(encoder):
    batch = encoder.lessons([lesson_of("ab 12", answer="12")], skip_blank=False)
    ids = batch.input_ids[0].tolist()
    assert ids.count(encoder.image_token_id) == len(batch.cells) == 256
    assert encoder.tokenizer.decode([i for i in ids if i != encoder.image_token_id]) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<img></img>\nRead the page.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n12<|eot_id|>"
    )
    labels = batch.labels[0][batch.labels[0] != IGNORE_INDEX]
    assert encoder.tokenizer.decode(labels.tolist()) == "12<|eot_id|>"
    assert batch.position_ids[0].tolist() == list(range(len(ids)))


def test_without_blank_tokens_the_others_keep_their_positions(encoder):
    lesson = lesson_of("ab 12", "cd 34", answer="12")
    full, short = (encoder.lessons([lesson], skip_blank=skip) for skip in (False, True))
    assert len(short.cells) == len(lesson.cells[0].glyphs) < len(full.cells)
    kept = dict(zip(full.position_ids[0].tolist(), full.input_ids[0].tolist(), strict=True))
    assert all(kept[p] == i for p, i in zip(short.position_ids[0].tolist(), short.input_ids[0].tolist(), strict=True))
    assert short.position_ids[0, -1] == full.position_ids[0, -1]


def test_a_prompt_ends_before_the_answer(encoder):
    ids, labels, positions, _ = encoder.lesson(lesson_of("ab", answer="ab"), skip_blank=True, num_answered=0)
    assert encoder.tokenizer.decode(ids).endswith("assistant<|end_header_id|>\n\n")
    assert len(ids) == len(labels) == len(positions) and set(labels) == {IGNORE_INDEX}


def test_gaps_in_the_positions_hide_nothing(encoder):
    """The attention that transformers would choose takes gaps for the borders of packed texts."""
    torch.manual_seed(0)
    model = CellLanguageModel(len(encoder.tokenizer)).eval()
    answers = []
    for text in ("12", "34"):
        batch = encoder.lessons([lesson_of(text, "", "zz", answer="12")], skip_blank=True)
        assert (batch.position_ids.diff() > 1).any()
        answers.append(model(batch, encoder)[0])
    assert not torch.allclose(answers[0], answers[1])


def test_words_of_questions_are_whole_and_names_of_fields_spelled(encoder):
    known = encoder.tokenizer.get_vocab()
    assert "\u0120altogether" in known and "\u0120gratuity" not in known


def test_nano_answers_from_cells_as_it_does_from_images(encoder):
    """Its heads hold the cell embedding that its tower imitates."""
    model = CellLanguageModel(len(encoder.tokenizer)).eval()
    load_part(model, nano_weights(), "language.")
    lessons = [
        lesson_of(f"Total {i}7.35", "Date 2024-05-06", question="What is the total?", answer=f"{i}7.35")
        for i in range(9)
    ]
    assert language.measure(model, encoder, lessons, skip_blank=False)["tokens"] > 0.9


def test_attention_by_rows_is_causal_attention():
    query, key, value = torch.randn(3, 2, 4, 300, 48)
    found, _ = language.causal_attention(None, query, key, value, None, 48**-0.5)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(found, expected.transpose(1, 2))


def test_the_first_token_of_an_answer_may_count_more():
    logits, labels = torch.randn(5, 10), torch.tensor([1, 2, 9, 3, 9])
    losses = nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(answer_loss(logits, labels, 9, 1.0), losses.mean())
    weights = torch.tensor([4.0, 1, 1, 4, 1])
    torch.testing.assert_close(answer_loss(logits, labels, 9, 4.0), (weights * losses).sum() / weights.sum())


def test_muon_orthogonalises_in_bfloat16_nearly_as_in_float32():
    matrices = torch.randn(2, 96, 48)
    full, half = (orthogonalize(matrices, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert half.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(full.flatten(), half.flatten(), 0) > 0.999


def test_each_head_of_a_new_tower_looks_at_one_neighbour(looking_tower):
    model = looking_tower.vision_model.radio_model.model
    hidden = torch.randn(1, 64 * PATCHES // 4, 192)
    hidden[0, ::3] *= 0.01  # patches of an even grey: normalisation makes their keys long
    hidden[..., -24:] = 0
    rows = torch.arange(16)
    hidden = hidden + model.patch_generator.pos_embed.view(PATCHES, PATCHES, -1)[rows].flatten(0, 1)
    around = neighbours_of(16)
    for block in model.blocks:
        qkv = block.attn.qkv(block.norm1(hidden)).view(1, -1, 3, len(NEIGHBOURS), block.attn.head_dim)
        query, key, _ = qkv.permute(2, 0, 3, 1, 4)
        weights = (query @ key.mT * block.attn.scaling).softmax(-1)[0]
        for head in range(len(NEIGHBOURS)):
            seen = weights[head].gather(1, around[:, head, None]).view(16, PATCHES)
            assert seen[1:-1, 1:-1].mean() > 0.95


def test_gathering_neighbours_is_what_attention_does(looking_tower, encoder):
    pixels, _, _, rows, _ = Strips(2, 8, 0.5, encoder).batch(2, 10, Look(photographed=1.0))
    with torch.no_grad():
        slow = looking_tower(pixels, rows)[2]
        looking_tower.looks_at_neighbours = True
        fast = looking_tower(pixels, rows)[2]
        looking_tower.looks_at_neighbours = False
    alike = torch.nn.functional.cosine_similarity(slow.flatten(2), fast.flatten(2), dim=-1).unflatten(1, (8, PATCHES))
    assert alike[:, 3:-3, 3:-3].mean() > 0.97  # at the edges heads that look outside see something else


def test_anchored_weights_are_restored_and_others_learn(looking_tower):
    anchors = Anchors(looking_tower)
    before = {name: weight.clone() for name, weight in looking_tower.named_parameters()}
    with torch.no_grad():
        for weight in looking_tower.parameters():
            weight += 1
    anchors.restore()
    after = dict(looking_tower.named_parameters())
    qkv = next(name for name in after if name.endswith("blocks.1.attn.qkv.weight"))
    assert torch.equal(after[qkv][:384], before[qkv][:384])
    assert torch.equal(after[qkv][384:], before[qkv][384:] + 1)
    with torch.no_grad():
        for name, weight in looking_tower.named_parameters():
            weight.copy_(before[name])


def test_strips_hold_the_characters_that_stand_in_them(encoder):
    pixels, tokens, patches, rows, cells = Strips(2, 8, 0.0, encoder).batch(6, 3, FLAT)
    assert pixels.shape == (6, 3, 128, 512) and tokens.shape == (6, 64, 4) and patches.shape == (6, 256, 2)
    assert cells.shape == (6, 64, language.NUM_SLOTS + 3) and (rows % 2 == 0).all()
    space = encoder.glyphs[" "]
    is_printed = (cells[..., 0] != space).flatten()
    darkness = pixels.mean(1).unfold(1, 32, 32).unfold(2, 32, 32).flatten(3).std(-1).flatten()
    assert darkness[is_printed].mean() > 5 * darkness[~is_printed].mean()


def test_what_stands_on_a_page_is_spelled_and_what_does_not_is_said_in_words(encoder):
    tokens_of = lambda text: encoder.tokenizer.convert_ids_to_tokens(encoder.answer(text))  # noqa: E731
    assert tokens_of("Total 5\nTo") == ["T", "o", "t", "a", "l", "\u0120", "5", "\u010a", "T", "o"]
    assert tokens_of("<tr><td>No</td></tr>") == ["<tr>", "<td>", "N", "o", "</td>", "</tr>"]
    assert tokens_of("1. The first.") == ["1", ".", "\u0120", "T", "h", "e", "\u0120first", "."]
    assert encoder.answer("\u00e9") == encoder.encode("\u00e9")  # on no drawn page
    assert encoder.answer(ABSENT) == encoder.encode(ABSENT)


def test_training_prompts_equal_the_chat_template(encoder):
    turns = [Turn("field", "What is the total?", "1.25"), Turn("absent", "The date?", "Not in the document.")]
    lesson = set_lesson(
        Conversation([Page("receipt", 0, [Line([Piece("Total 1.25")])])], turns), [1], "train", FLAT, 1
    )
    messages = []
    for index, turn in enumerate(turns):
        messages.append({"role": "user", "content": ("<image>\n" if index == 0 else "") + turn.question})
        messages.append({"role": "assistant", "content": turn.answer})
    text = encoder.tokenizer.apply_chat_template(messages, tokenize=False)
    image = "<img>" + "<image>" * 256 + "</img>"
    ids = encoder.lesson(lesson, skip_blank=False)[0]
    assert encoder.tokenizer.decode(ids) == text.replace("<image>", image)


def run(stage, *arguments, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", [stage.__name__, *map(str, arguments)])
    stage.main()


def state(output: Path) -> dict:
    return json.loads((output / "state.json").read_text())


def last_measured(folder: Path) -> dict:
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [entry for entry in entries if entry.get("held out")][-1]


@pytest.fixture
def quick(monkeypatch):
    """Measure on few held-out pages; restore the number of threads and the handling of denormals afterwards.

    Whether a stage runs does not depend on the typefaces.
    """
    num_threads = torch.get_num_threads()
    monkeypatch.setattr(fonts, "require", lambda *splits: None)
    for stage, place in ((language, 2), (tower, 1), (joint, 2)):

        def measure(*given, whole=stage.measure, place=place, **options):
            return whole(*given[:place], given[place][:2], *given[place + 1 :], **options)

        monkeypatch.setattr(stage, "measure", measure)
    yield monkeypatch
    torch.set_flush_denormal(False)
    torch.set_num_threads(num_threads)


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


def test_joint_training_needs_both_earlier_stages_or_none(tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        run(joint, "--output", tmp_path, "--language", tmp_path, monkeypatch=monkeypatch)
    assert "--language and --tower" in capsys.readouterr().err


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


def learn_a_half(rank: int, folder: Path, port: int, steps: int = 3) -> None:
    """One of two processes: learn from one half of the batch and save."""
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    prepare_torch(1)
    save_file(two_layers_after(steps, half=rank), folder / f"{rank}.safetensors")


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
def test_what_the_tower_imitates_stays_when_it_is_frozen(tmp_path, quick):
    small = ("--output", tmp_path, "--batch-size", "2", "--exercises", 0.5)
    run(language, *small, "--minutes", 0.02, monkeypatch=quick)
    before, weights = state(tmp_path), load_file(tmp_path / "model.safetensors")
    run(language, *small, "--minutes", before["minutes"] + 0.02, "--freeze-cells", monkeypatch=quick)
    after = load_file(tmp_path / "model.safetensors")
    assert state(tmp_path)["step"] > before["step"] > 0
    assert weights.keys() == after.keys()
    frozen = {name for name in after if torch.equal(weights[name], after[name])}
    assert frozen == {name for name in after if name.startswith("cell_embedding.")}
    embedding = next(name for name in after if "embed_tokens" in name)
    moved = (weights[embedding] != after[embedding]).any(1)
    assert not moved[list(CellEncoder(build_tokenizer()).glyphs.values())].any()
    assert moved[load_tokenizer().convert_tokens_to_ids("<|eot_id|>")]
    assert 0 <= last_measured(tmp_path)["answers"] <= last_measured(tmp_path)["tokens"] <= 1


@pytest.mark.slow
def test_nano_goes_on_learning_and_is_written(tmp_path, quick):
    heads = HEADS.read_bytes()
    command = ["--output", tmp_path / "run", "--batch-size", "2", "--cells", 0.5, "--freeze-tower"]
    run(joint, *command, "--minutes", 0.05, monkeypatch=quick)
    first_measured = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[1])
    assert first_measured["step"] == 0
    assert first_measured["tokens"] > 0.6  # it began with what nano knows
    run(joint, *command, "--export", tmp_path / "nano", monkeypatch=quick)
    before = load_file(ROOT / "nano" / "model.safetensors")
    after = load_file(tmp_path / "nano" / "model.safetensors")
    assert before.keys() == after.keys()
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved and all(name.startswith("language_model.") for name in moved)
    assert HEADS.read_bytes() == heads  # those of nano stay
    assert load_file(tmp_path / "nano-heads.safetensors").keys() == load_file(HEADS).keys()


@pytest.mark.slow
def test_the_commands_of_the_manual_train_and_evaluate_nano(tmp_path, quick):
    """Each command of docs/nano.md runs as it stands, in order, but for a moment and on small batches."""
    text = (ROOT / "docs" / "nano.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    commands = [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    assert {tuple(command[:2]) for command in commands} == {("python", "-m")}
    (tmp_path / "nano").symlink_to(ROOT / "nano")
    quick.chdir(tmp_path)
    for _, _, module, *arguments in commands:
        if "--minutes" in arguments:
            arguments[arguments.index("--minutes") + 1] = "0.01"
            arguments += ["--batch-size", "2"]
        if "--documents" in arguments:
            arguments[arguments.index("--documents") + 1] = "20"
        if "--receipts" in arguments:
            arguments[arguments.index("--receipts") + 1] = "2"
        if module != "tools.adopt":
            arguments += ["--threads", "1"]
        run(importlib.import_module(module), *arguments, monkeypatch=quick)
    logs = sorted(path.parent.name for path in (tmp_path / "runs").glob("*/log.jsonl"))
    assert logs and all(state(tmp_path / "runs" / name)["step"] > 0 for name in logs)
    assert len(json.loads((tmp_path / "runs" / "nano.json").read_text())["answers"]) == 21
    model, processor = load(tmp_path / "runs" / "nano")
    assert model.state_dict().keys() >= load_file(ROOT / "nano" / "model.safetensors").keys()
    image = draw_page(make_page(3, "heldout", "receipt"), 3, "heldout", FLAT)
    features = processor.image_processor([image], return_tensors="pt")
    question = "<image>\nWhat is the total?"
    answer = model.chat(processor.tokenizer, question=question, generation_config={"max_new_tokens": 4}, **features)
    assert isinstance(answer, str)
    # the checkpoint sees what training saw
    trained = load_file(tmp_path / "runs" / "joint" / "model.safetensors")
    name = "vision_model.radio_model.model.blocks.0.attn.qkv.weight"
    assert torch.equal(model.state_dict()[name].float(), trained[f"tower.{name}"])


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
