"""The stages that train nano on pages of ordinary layouts run, resume, and write a checkpoint that answers."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from documents import fonts
from documents.contents import make_page
from documents.pages import Line, Page, Piece
from documents.questions import Conversation, Turn
from documents.typesetting import Look, draw, set_page
from pretraining import pictures, reading, tower
from pretraining.batches import IGNORE_INDEX
from pretraining.cells import Cells
from pretraining.muon import orthogonalize
from pretraining.nano import build_model, load_tokenizer
from pretraining.reading import CellEncoder, CellLanguageModel, new_tokenizer, set_lesson, start_from_nano
from pretraining.tower import (
    NEIGHBOURS,
    PATCHES,
    TOWER,
    Anchors,
    GlyphTower,
    Strips,
    look_at_neighbours,
    neighbours_of,
)
from tools import adopt
from tools.chat import load

FLAT = Look(narrowest=(2, 3), tilted=0.0, photographed=0.0, degradation=0.0)


@pytest.fixture(scope="module")
def encoder() -> CellEncoder:
    return CellEncoder(new_tokenizer())


@pytest.fixture(scope="module")
def looking_tower(encoder) -> GlyphTower:
    """A new tower whose heads look at neighbours."""
    torch.manual_seed(0)
    made = GlyphTower(build_model(encoder.tokenizer, 0, TOWER))
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


def test_nanos_language_model_reads_one_character_a_token(encoder):
    model = CellLanguageModel(len(encoder.tokenizer)).eval()
    start_from_nano(model, encoder.tokenizer)
    lessons = []
    for i in range(9):
        lesson = lesson_of("", question="What is the lo?", answer=f"{i}35")
        printed = {row: f"{label} {i}{value} " for row, label, value in ((3, "ka", 71), (5, "lo", 35))}
        glyphs = {16 * row + at: [(char, 0.5, 0.5)] for row, text in printed.items() for at, char in enumerate(text)}
        lessons.append(lesson._replace(cells=[Cells((1, 1), glyphs, 30.0, 1)]))
    assert reading.measure(model, encoder, lessons, skip_blank=False)["tokens"] > 0.6  # by chance about 0.1


def test_new_words_of_questions_are_whole_and_names_of_fields_spelled(encoder):
    known = encoder.tokenizer.get_vocab()
    assert "\u0120altogether" in known and "\u0120gratuity" not in known
    assert set(load_tokenizer().get_vocab()) <= set(known)


def test_attention_by_rows_is_causal_attention():
    query, key, value = torch.randn(3, 2, 4, 300, 48)
    found, _ = reading.causal_attention(None, query, key, value, None, 48**-0.5)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(found, expected.transpose(1, 2))


def test_the_first_token_of_an_answer_may_count_more():
    logits, labels = torch.randn(5, 10), torch.tensor([1, 2, 9, 3, 9])
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(reading.answer_loss(logits, labels, 9, 1.0), losses.mean())
    weights = torch.tensor([4.0, 1, 1, 4, 1])
    torch.testing.assert_close(reading.answer_loss(logits, labels, 9, 4.0), (weights * losses).sum() / weights.sum())


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
    assert cells.shape == (6, 64, reading.NUM_SLOTS + 3) and (rows % 2 == 0).all()
    space = encoder.glyphs[" "]
    is_printed = (cells[..., 0] != space).flatten()
    darkness = pixels.mean(1).unfold(1, 32, 32).unfold(2, 32, 32).flatten(3).std(-1).flatten()
    assert darkness[is_printed].mean() > 5 * darkness[~is_printed].mean()


def run(stage, *arguments, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", [stage.__name__, *map(str, arguments), "--threads", "1", "--batch-size", "2"])
    stage.main()


def last_measured(folder: Path) -> dict:
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [entry for entry in entries if entry.get("held out")][-1]


@pytest.mark.slow
def test_the_stages_follow_each_other_and_the_checkpoint_answers(tmp_path, monkeypatch):
    num_threads = torch.get_num_threads()
    monkeypatch.setattr(fonts, "require", lambda *splits: None)  # whether a stage runs does not depend on the fonts
    monkeypatch.setattr(
        reading, "heldout_lesson", lambda seed, tiles, make=reading.heldout_lesson: make(seed % 2, tiles)
    )
    monkeypatch.setattr(tower, "measure", lambda made, pages, measure=tower.measure: measure(made, pages[:2]))
    monkeypatch.setattr(
        pictures, "measure", lambda *given, measure=pictures.measure: measure(*given[:2], given[2][:2])
    )
    short = ("--minutes", "0.01")
    run(reading, "--output", tmp_path / "language", *short, "--exercises", 0.5, monkeypatch=monkeypatch)
    run(tower, "--output", tmp_path / "tower", *short, monkeypatch=monkeypatch)
    assert 0 <= last_measured(tmp_path / "tower")["glyphs"] <= 1
    imitate = ("--start-from", tmp_path / "tower", "--imitate", tmp_path / "language")
    run(tower, "--output", tmp_path / "tower-2", *short, *imitate, monkeypatch=monkeypatch)
    both = ("--tower", tmp_path / "tower-2", "--language", tmp_path / "language")
    run(pictures, "--output", tmp_path / "pictures", *short, *both, "--cells", 0, monkeypatch=monkeypatch)
    state = json.loads((tmp_path / "pictures" / "state.json").read_text())
    run(pictures, "--output", tmp_path / "pictures", "--minutes", state["minutes"] + 0.01, monkeypatch=monkeypatch)
    assert json.loads((tmp_path / "pictures" / "state.json").read_text())["step"] > state["step"]  # it went on
    run(pictures, "--output", tmp_path / "pictures", "--export", tmp_path / "exported", monkeypatch=monkeypatch)
    torch.set_flush_denormal(False)
    torch.set_num_threads(num_threads)

    assert adopt.main([str(tmp_path / "exported"), "--out", str(tmp_path / "nano"), "--copy"]) == 0
    model, processor = load(tmp_path / "nano")
    page = make_page(3, "heldout", "receipt")
    image = draw(set_page(page, 3, "heldout", FLAT), 3, "heldout", 0.0)
    features = processor.image_processor([image], return_tensors="pt")
    assert len(features["pixel_values"]) in (1, 2)
    question = "<image>\nWhat is the total?"
    answer = model.chat(processor.tokenizer, question=question, generation_config={"max_new_tokens": 4}, **features)
    assert isinstance(answer, str)
    # the checkpoint sees what training saw
    trained = load_file(tmp_path / "pictures" / "model.safetensors")
    name = "vision_model.radio_model.model.blocks.0.attn.qkv.weight"
    assert torch.equal(model.state_dict()[name].float(), trained[f"tower.{name}"])
