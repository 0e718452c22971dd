"""Stage 3: train tower, projector and language model together on pictures, and write nano.

    python -m training.joint --language runs/cells --eyes runs/eyes --output runs/joint --minutes 20
    python -m training.joint --start-from nano --output runs/more --minutes 60             # or go on from a checkpoint
    python -m training.joint --output runs/joint --export nano                             # write the checkpoint

Starts from a language model that reads perfect cells (stage 1) and eyes that imitate them (stage 2). The glyph loss of
stage 2 stays on, weakly. With `--freeze-eyes` only the language model learns, which costs a third. With `--drills`
short lessons on perfect cells stand beside every step.
"""

import argparse
import random
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from training import ROOT
from training.batches import Batch, Encoder, lessons_by_length
from training.distil import Eye, draw_pages, glyph_loss
from training.drawing import require_fonts
from training.lessons import add_lesson_options, draw_drill, draw_lesson, held_out_lesson
from training.nano import build_model, load_tokenizer, save_nano
from training.perfect_cells import Reader, cells_of, drill_loss
from training.runs import (
    Run,
    Score,
    build_optimizers,
    learn,
    load_weights,
    prepare_torch,
    run_parser,
    set_progress,
    unique_weights,
)

GLYPH_LOSS_WEIGHT = 0.3
HEADS = ("eye.glyph_head.", "reader.cells.")  # what training needs and the checkpoint does not hold
HEADS_FILE = ROOT / "training" / "heads.safetensors"


class Nano(nn.Module):
    """Eyes and reader side by side, as stages 1 and 2 left them."""

    def __init__(self, vocab_size: int, eye: Eye):
        super().__init__()
        self.eye = eye
        self.reader = Reader(vocab_size)

    def forward(
        self, batch: Batch, encoder: Encoder, pixel_values: torch.Tensor | None, noise: float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return answer logits, the labels, and the glyph logits of all cells; without pixels, read perfect cells."""
        if pixel_values is None:
            return *self.reader(batch, encoder, noise=noise), None
        visual_tokens, glyph_logits = self.eye(pixel_values)
        return *self.reader(batch, encoder, visual_tokens), glyph_logits


@torch.no_grad()
def measure(nano: Nano, encoder: Encoder, kinds: tuple[str, ...], num_batches: int = 5) -> dict[str, float]:
    """Teacher-forced accuracy of held-out answers to pictures: of tokens, and of whole answers."""
    score = Score(encoder.end[0])
    for index in range(num_batches):
        seeds = list(range(8 * index, 8 * index + 8))
        batch = encoder.batch([held_out_lesson(seed, kinds) for seed in seeds])
        score.add(*nano(batch, encoder, draw_pages(batch.pages, seeds, "heldout"))[:2])
    return score.shares


def export(nano: Nano, directory: Path) -> None:
    """Write the checkpoint in the published layout."""
    tokenizer = load_tokenizer()
    model = build_model(tokenizer)
    model.vision_model.load_state_dict(nano.eye.vision_model.state_dict())
    model.mlp1.load_state_dict(nano.eye.mlp1.state_dict())
    model.language_model.load_state_dict(nano.reader.language_model.state_dict())
    save_nano(model, tokenizer, directory)
    heads = {name: weight for name, weight in unique_weights(nano).items() if name.startswith(HEADS)}
    save_file(heads, HEADS_FILE)


def load_nano(nano: Nano, directory: Path) -> None:
    """Go on from a written checkpoint and the heads that only training has."""
    weights = load_file(directory / "model.safetensors")
    placed = {}
    for name, weight in weights.items():
        placed[f"reader.{name}" if name.startswith("language_model.") else f"eye.{name}"] = weight
    missing, unexpected = nano.load_state_dict(placed | load_file(HEADS_FILE), strict=False)
    missing = [name for name in missing if not name.endswith(("lm_head.weight", "norm_mean", "norm_std"))]
    if missing or unexpected:
        raise ValueError(f"{directory} does not fit this model: missing {missing[:3]}, unexpected {unexpected[:3]}.")


def main() -> None:
    parser = run_parser(__doc__, minutes=20, batch_size=6, muon_lr=0.01, adamw_lr=5e-4, seed=1)
    parser.add_argument("--start-from", type=Path, help="written checkpoint to go on from, instead of stages 1 and 2")
    parser.add_argument("--language", type=Path, help="run of training.perfect_cells or joint")
    parser.add_argument("--eyes", type=Path, help="run of training.distil or joint")
    parser.add_argument("--export", type=Path, help="write the checkpoint there instead of training")
    parser.add_argument("--freeze-eyes", action="store_true", help="train the language model alone")
    parser.add_argument("--cells", type=float, default=0.0, help="share of steps on perfect cells instead of pictures")
    parser.add_argument("--noise", type=float, default=0.0, help="of these cells, relative to their deviation")
    add_lesson_options(parser, long=0.1, pairs=0.1)
    arguments = parser.parse_args()
    going_on = arguments.start_from or (arguments.output / "model.safetensors").exists()
    if not going_on and not (arguments.language and arguments.eyes):
        parser.error("a new run needs --start-from, or --language and --eyes")
    prepare_torch(arguments.threads)
    require_fonts()

    tokenizer = load_tokenizer()
    encoder = Encoder(tokenizer)
    nano = Nano(len(tokenizer), Eye(build_model(tokenizer), len(tokenizer)))
    run = Run(arguments.output, arguments.minutes)
    if not run.resume(nano) and arguments.start_from:
        load_nano(nano, arguments.start_from)
    elif not run.state["step"]:
        load_weights(nano.reader, arguments.language / "model.safetensors", "reader.")
        load_weights(nano.eye, arguments.eyes / "model.safetensors", "eye.")
    if arguments.export:
        export(nano, arguments.export)
        return
    if arguments.freeze_eyes:
        nano.eye.requires_grad_(False)
    nano.reader.cells.requires_grad_(False)
    kinds = tuple(arguments.kinds)
    run.log({"step": run.state["step"], "held out": True} | measure(nano, encoder, kinds))
    train(nano, encoder, run, arguments, kinds)


def train(nano: Nano, encoder: Encoder, run: Run, arguments: argparse.Namespace, kinds: tuple[str, ...]) -> None:
    """Train until the run's minutes are spent."""
    optimizers = build_optimizers(nano, arguments)
    short_encoder = Encoder(encoder.tokenizer, skip_blank_rows=True)
    pool: list[Batch] = []
    while run.progress < 1:
        if not pool:
            first = run.first_seed(arguments)
            drawn = [draw_lesson(first + index, arguments) for index in range(arguments.batch_size * 4)]
            pool = lessons_by_length(encoder, drawn, arguments.batch_size)
        set_progress(optimizers, run.progress, run.steps_since_start)
        batch = pool.pop(run.state["step"] % len(pool))
        on_cells = random.Random(run.state["step"]).random() < arguments.cells
        styles = [
            2 * run.first_seed(arguments) + index for index in range(len(batch.pages))
        ]  # a lesson has two at most
        pixels = draw_pages(batch.pages, styles) if batch.pages and not on_cells else None
        logits, labels, glyph_logits = nano(batch, encoder, pixels, arguments.noise)
        loss = nn.functional.cross_entropy(logits, labels)
        numbers = {"loss": loss.item(), "tokens": (logits.argmax(-1) == labels).float().mean().item()}
        if pixels is not None and not arguments.freeze_eyes:
            glyphs = cells_of(batch, encoder)[:, 0].view(glyph_logits.shape[:2])
            loss = loss + GLYPH_LOSS_WEIGHT * glyph_loss(glyph_logits, glyphs, encoder.glyphs[" "])
        if arguments.drills:
            drill = draw_drill(run.first_seed(arguments), arguments)
            loss = loss + drill_loss(nano.reader, short_encoder, drill, numbers)
        learn(nano, loss, optimizers)
        run.tick(nano, numbers, log_every=10)
        if run.state["step"] % 200 == 0 or run.progress >= 1:
            run.log({"step": run.state["step"], "held out": True} | measure(nano, encoder, kinds))


if __name__ == "__main__":
    main()
