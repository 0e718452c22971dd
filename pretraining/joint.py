"""Train tower, projector and language model together on images of pages, and write the checkpoint.

    python -m pretraining.joint --tower runs/tower-2 --language runs/documents --output runs/joint --minutes 60
    python -m pretraining.joint --output runs/more --minutes 60                      # goes on from nano/
    python -m pretraining.joint --output runs/joint --export runs/exported           # write the checkpoint

A new run starts from a tower that imitates the cell embedding of the language model's run, so that the language model
reads images from the first step; without either it starts from `nano/`. The tower's naming of characters stays on as a
second loss. With `--freeze-tower` the language model learns alone. An exported checkpoint holds no code, as `nano/` does
not; `tools.adopt` makes a directory with code of it. Minutes are those of the processor.
"""

import argparse
import random
import time
from pathlib import Path

import torch
from nemotron_vl.image_processing import cut_tiles
from safetensors.torch import save_file
from torch import nn

from documents import fonts
from documents.drawing import draw
from pretraining.cells import patch_classes, token_classes
from pretraining.common import (
    Run,
    Score,
    build_optimizers,
    gradient_step,
    load_part,
    load_weights,
    precision,
    prepare_torch,
    run_parser,
    set_learning_rate,
    share,
    unique_weights,
)
from pretraining.language import (
    CellEncoder,
    CellLanguageModel,
    Lesson,
    add_mixture_options,
    answer_loss,
    heldout_lesson,
    sample_batches,
)
from pretraining.nano import TILING, build_model, nano_weights, save_nano
from pretraining.tokenizer import build_tokenizer
from pretraining.tower import (
    NUM_PATCH_SLOTS,
    NUM_SLOTS,
    Anchors,
    GlyphTower,
    accuracy,
    add_size_options,
    glyph_loss,
    sizes_of,
)

GLYPH_LOSS_WEIGHT = 0.3
READABLE_TYPE_HEIGHT = [15, 70]  # px in the tiles: nearly all pages that training draws
HEADS = ("tower.token_head.", "tower.patch_head.", "language.cell_embedding.")  # the checkpoint does not hold these


class Nano(nn.Module):
    """A tower with its heads, and a language model with its cell embedding."""

    def __init__(self, vocab_size: int, tower: GlyphTower):
        super().__init__()
        self.tower = tower
        self.language = CellLanguageModel(vocab_size)

    def look(self, tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return visual tokens and logits of characters of whole tiles, `(num_tiles, 3, 512, 512)`, 0 to 1."""
        return self.tower(tiles, torch.zeros(len(tiles), dtype=torch.long))


def tiles_of(lessons: list[Lesson], split: str, degradation: float = 1.0) -> torch.Tensor | None:
    """Draw the pages of lessons and return their tiles, `(num_tiles, 3, 512, 512)`, 0 to 1, or None without pages."""
    tiles = []
    for lesson in lessons:
        for printed, seed, cells in zip(lesson.prints, lesson.seeds, lesson.cells, strict=True):
            image = draw(printed, seed, split, degradation)
            tiles += cut_tiles(image, max_num_tiles=cells.max_num_tiles, use_thumbnail=False, upscale=2)
    return torch.stack(tiles).float() / 255 if tiles else None


def classes_of(lessons: list[Lesson]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the classes of the tokens and of the patches of all tiles of lessons."""
    glyphs = [
        cells.tile(index) for lesson in lessons for cells in lesson.cells for index in range(cells.num_tokens // 256)
    ]
    tokens = torch.stack([token_classes(tile, NUM_SLOTS) for tile in glyphs])
    return tokens, torch.stack([patch_classes(tile, NUM_PATCH_SLOTS) for tile in glyphs])


@torch.no_grad()
def measure(nano: Nano, encoder: CellEncoder, lessons: list[Lesson], batch_size: int = 4) -> dict[str, float]:
    """Return the teacher-forced accuracy of answers about held-out images: of tokens, and of whole answers.

    The tower computes its attention here, as the checkpoint will; training takes neighbours directly.
    """
    nano.eval()
    fast, nano.tower.looks_at_neighbours = nano.tower.looks_at_neighbours, False
    score = Score(encoder.end[0])
    for start in range(0, len(lessons), batch_size):
        chosen = lessons[start : start + batch_size]
        visual_tokens = nano.look(tiles_of(chosen, "heldout"))[0].flatten(0, 1)
        score.add(*nano.language(encoder.lessons(chosen, skip_blank=False), encoder, visual_tokens))
    nano.tower.looks_at_neighbours = fast
    nano.train()
    return score.shares


def export(nano: Nano, tower: dict[str, float], directory: Path, max_num_tiles: int) -> None:
    """Write the checkpoint in the published layout, and beside it the heads that further training needs."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, tower=tower)
    model.config.readable_type_height = READABLE_TYPE_HEIGHT
    model.vision_model.load_state_dict(nano.tower.vision_model.state_dict())
    model.mlp1.load_state_dict(nano.tower.mlp1.state_dict())
    model.language_model.load_state_dict(nano.language.language_model.state_dict())
    save_nano(model, tokenizer, directory, TILING | {"max_num_tiles": max_num_tiles})
    heads = {name: weight for name, weight in unique_weights(nano).items() if name.startswith(HEADS)}
    save_file(heads, directory.with_name(f"{directory.name}-heads.safetensors"))


def main() -> None:
    parser = run_parser(__doc__, minutes=60, batch_size=6, muon_lr=0.01, adamw_lr=5e-4, seed=1, threads=1)
    parser.add_argument("--tower", type=Path, help="run of pretraining.tower or pretraining.joint to start from")
    parser.add_argument("--language", type=Path, help="run of pretraining.language or pretraining.joint to start from")
    parser.add_argument("--export", type=Path, help="write the checkpoint there instead of training")
    parser.add_argument("--freeze-tower", action="store_true", help="train the language model alone")
    parser.add_argument("--free-attention", action="store_true", help="train also where the tower's heads look")
    parser.add_argument("--cells", type=share, default=0.3, help="share of steps on cells instead of images")
    parser.add_argument("--noise", type=float, default=0.1, help="of their visual tokens, relative to the deviation")
    add_size_options(parser)
    parser.add_argument("--measure-every", type=float, default=10, help="minutes")
    add_mixture_options(parser, exercises=0.1, exercise_lines=8, skip_blank=0.0)
    arguments = parser.parse_args()
    if bool(arguments.language) != bool(arguments.tower):
        parser.error("--language and --tower are given together, or neither to go on from nano/")
    prepare_torch(arguments.threads)
    torch.manual_seed(arguments.seed)
    fonts.require("train", "heldout")

    tokenizer = build_tokenizer()
    encoder = CellEncoder(tokenizer)
    sizes = sizes_of(arguments)
    model = build_model(tokenizer, arguments.seed, sizes)
    nano = Nano(len(tokenizer), GlyphTower(model, looks_at_neighbours=not arguments.free_attention))
    run = Run(arguments.output, arguments.minutes, time.process_time)
    is_resumed = run.resume(nano)
    if not is_resumed and arguments.tower:
        load_weights(nano.language, arguments.language / "model.safetensors", "language.")
        load_weights(nano.tower, arguments.tower / "model.safetensors", "tower.")
    elif not is_resumed:
        load_part(nano, nano_weights())
    if arguments.export:
        export(nano, sizes, arguments.export, arguments.max_num_tiles)
        return
    if arguments.freeze_tower:
        nano.tower.requires_grad_(False)
    anchors = None if arguments.free_attention or arguments.freeze_tower else Anchors(nano.tower)
    nano.language.cell_embedding.requires_grad_(False)
    lessons = [heldout_lesson(seed, arguments.max_num_tiles) for seed in range(42)]
    run.log({key: str(value) for key, value in vars(arguments).items()})
    run.log_measurement(lambda: measure(nano, encoder, lessons))
    train(nano, encoder, run, arguments, lessons, anchors)


def train(
    nano: Nano,
    encoder: CellEncoder,
    run: Run,
    arguments: argparse.Namespace,
    heldout: list[Lesson],
    anchors: Anchors | None,
) -> None:
    """Train until the run's minutes are spent."""
    optimizers = build_optimizers(nano, arguments)
    next_measure = run.state["minutes"] + arguments.measure_every
    on_images = argparse.Namespace(**vars(arguments) | {"jitter": 0.0})
    pool: list[list[Lesson]] = []
    while run.progress < 1:
        uses_cells = random.Random(f"cells {run.state['step']}").random() < arguments.cells
        pool = pool or sample_batches(run, on_images, arguments.densest)
        set_learning_rate(optimizers, run.progress, run.steps_since_start)
        chosen = pool.pop()
        tiles = None if uses_cells else tiles_of(chosen, "train")
        batch = encoder.lessons(chosen, skip_blank=False)
        numbers: dict[str, float] = {}
        loss = torch.zeros(())
        with precision(arguments):
            if tiles is None:
                logits, labels = nano.language(batch, encoder, noise=arguments.noise)
            else:
                visual_tokens, token_logits, patch_logits = nano.look(tiles)
                logits, labels = nano.language(batch, encoder, visual_tokens.flatten(0, 1))
        if tiles is not None:
            tokens, patches = classes_of(chosen)
            numbers["glyphs"] = accuracy(token_logits, tokens)
            if not arguments.freeze_tower:
                loss = GLYPH_LOSS_WEIGHT * (glyph_loss(token_logits, tokens) + glyph_loss(patch_logits, patches))
        reading_loss = answer_loss(logits, labels, encoder.end[0], arguments.first_weight)
        right = (logits.argmax(-1) == labels).float().mean().item()
        numbers |= {"loss": reading_loss.item(), "tokens on cells" if uses_cells else "tokens": right}
        gradient_step(nano, reading_loss + loss, optimizers)
        if anchors:
            anchors.restore()
        run.record_step(nano, numbers, log_every=10)
        if run.state["minutes"] > next_measure or run.progress >= 1:
            next_measure += arguments.measure_every
            run.log_measurement(lambda: measure(nano, encoder, heldout))


if __name__ == "__main__":
    main()
