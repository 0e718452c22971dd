"""Stage 3: train tower, projector and language model together on images, and write the checkpoint.

    python -m pretraining.joint --language runs/language --vision runs/vision --output runs/joint --minutes 60
    python -m pretraining.joint --start-from nano --output runs/joint --minutes 60      # or continue from a checkpoint
    python -m pretraining.joint --output runs/joint --export runs/exported              # write the checkpoint

A new run starts from the language model of stage 1 and the tower of stage 2. The glyph loss of stage 2 stays on with a
small weight. With `--freeze-vision` the language model learns alone, in a third of the time for a step. An exported
checkpoint holds no code, as `nano/` does not; `tools.adopt` makes a directory with code of it.
"""

import argparse
import random
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from documents.drawing import require_fonts
from pretraining import ROOT
from pretraining.batches import Batch, Encoder, batches_by_length
from pretraining.common import (
    Run,
    Score,
    build_optimizers,
    gradient_step,
    load_weights,
    prepare_torch,
    run_parser,
    set_learning_rate,
    unique_weights,
)
from pretraining.language import GlyphLanguageModel, auxiliary_loss, cells_of
from pretraining.mixture import add_mixture_options, auxiliary_batch, heldout_conversation, sample_conversation
from pretraining.nano import build_model, load_tokenizer, save_nano
from pretraining.vision import VisionEncoder, draw_pages, glyph_loss

GLYPH_LOSS_WEIGHT = 0.3
HEADS = ("vision.glyph_head.", "language.glyph_embedding.")  # training needs these, the checkpoint does not hold them


class Nano(nn.Module):
    """The vision encoder of stage 2 and the language model of stage 1."""

    def __init__(self, vocab_size: int, vision: VisionEncoder):
        super().__init__()
        self.vision = vision
        self.language = GlyphLanguageModel(vocab_size)

    def forward(
        self, batch: Batch, encoder: Encoder, pixel_values: torch.Tensor | None, noise: float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return answer logits, their labels, and the glyph logits of all cells.

        Args:
            batch: of sequences.
            encoder: that made the batch.
            pixel_values: tiles of the batch's pages, or None to use their glyph ids; there are no glyph logits then.
            noise: of the glyph embedding.
        """
        if pixel_values is None:
            return *self.language(batch, encoder, noise=noise), None
        visual_tokens, glyph_logits = self.vision(pixel_values)
        return *self.language(batch, encoder, visual_tokens), glyph_logits


@torch.no_grad()
def measure(nano: Nano, encoder: Encoder, kinds: tuple[str, ...], num_batches: int = 5) -> dict[str, float]:
    """Return the teacher-forced accuracy of held-out answers about images: of tokens, and of whole answers."""
    score = Score(encoder.end[0])
    for index in range(num_batches):
        seeds = list(range(8 * index, 8 * index + 8))
        batch = encoder.batch([heldout_conversation(seed, kinds) for seed in seeds])
        score.add(*nano(batch, encoder, draw_pages(batch.pages, seeds, "heldout"))[:2])
    return score.shares


def heads_file(checkpoint: Path) -> Path:
    """Return the file with the heads of a checkpoint: beside the checkpoint, for `nano/` in this folder."""
    if checkpoint.resolve() == ROOT / "nano":
        return ROOT / "pretraining" / "heads.safetensors"
    return checkpoint.with_name(f"{checkpoint.name}-heads.safetensors")


def export(nano: Nano, directory: Path) -> None:
    """Write the checkpoint in the published layout, and beside it the heads that further training needs."""
    tokenizer = load_tokenizer()
    model = build_model(tokenizer)
    model.vision_model.load_state_dict(nano.vision.vision_model.state_dict())
    model.mlp1.load_state_dict(nano.vision.mlp1.state_dict())
    model.language_model.load_state_dict(nano.language.language_model.state_dict())
    save_nano(model, tokenizer, directory)
    heads = {name: weight for name, weight in unique_weights(nano).items() if name.startswith(HEADS)}
    save_file(heads, heads_file(directory))


def load_nano(nano: Nano, directory: Path) -> None:
    """Load a checkpoint and its heads."""
    weights = load_file(directory / "model.safetensors")
    placed = {}
    for name, weight in weights.items():
        placed[f"language.{name}" if name.startswith("language_model.") else f"vision.{name}"] = weight
    missing, unexpected = nano.load_state_dict(placed | load_file(heads_file(directory)), strict=False)
    missing = [name for name in missing if not name.endswith(("lm_head.weight", "norm_mean", "norm_std"))]
    if missing or unexpected:
        raise ValueError(f"{directory} does not fit this model: missing {missing[:3]}, unexpected {unexpected[:3]}.")


def main() -> None:
    parser = run_parser(__doc__, minutes=20, batch_size=6, muon_lr=0.01, adamw_lr=5e-4, seed=1)
    parser.add_argument("--start-from", type=Path, help="checkpoint to continue, instead of stages 1 and 2")
    parser.add_argument("--language", type=Path, help="run of pretraining.language or joint to start from")
    parser.add_argument("--vision", type=Path, help="run of pretraining.vision or joint to start from")
    parser.add_argument("--export", type=Path, help="write the checkpoint there instead of training")
    parser.add_argument("--freeze-vision", action="store_true", help="train the language model alone")
    parser.add_argument("--glyph-ids", type=float, default=0.0, help="share of steps on glyph ids instead of images")
    parser.add_argument("--noise", type=float, default=0.0, help="of their visual tokens, relative to the deviation")
    add_mixture_options(parser, long=0.1, pairs=0.1)
    arguments = parser.parse_args()
    is_continued = arguments.start_from or (arguments.output / "model.safetensors").exists()
    if not is_continued and not (arguments.language and arguments.vision):
        parser.error("a new run needs --start-from, or --language and --vision")
    prepare_torch(arguments.threads)
    require_fonts()

    tokenizer = load_tokenizer()
    encoder = Encoder(tokenizer)
    nano = Nano(len(tokenizer), VisionEncoder(build_model(tokenizer), len(tokenizer)))
    run = Run(arguments.output, arguments.minutes)
    if not run.resume(nano) and arguments.start_from:
        load_nano(nano, arguments.start_from)
    elif not run.state["step"]:
        load_weights(nano.language, arguments.language / "model.safetensors", "language.")
        load_weights(nano.vision, arguments.vision / "model.safetensors", "vision.")
    if arguments.export:
        export(nano, arguments.export)
        return
    if arguments.freeze_vision:
        nano.vision.requires_grad_(False)
    nano.language.glyph_embedding.requires_grad_(False)
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
            sampled = [sample_conversation(first + index, arguments) for index in range(arguments.batch_size * 4)]
            pool = batches_by_length(encoder, sampled, arguments.batch_size)
        set_learning_rate(optimizers, run.progress, run.steps_since_start)
        batch = pool.pop(run.state["step"] % len(pool))
        on_glyph_ids = random.Random(run.state["step"]).random() < arguments.glyph_ids
        styles = [
            2 * run.first_seed(arguments) + index for index in range(len(batch.pages))
        ]  # a conversation has at most two pages
        pixels = draw_pages(batch.pages, styles) if batch.pages and not on_glyph_ids else None
        logits, labels, glyph_logits = nano(batch, encoder, pixels, arguments.noise)
        loss = nn.functional.cross_entropy(logits, labels)
        numbers = {"loss": loss.item(), "tokens": (logits.argmax(-1) == labels).float().mean().item()}
        if pixels is not None and not arguments.freeze_vision:
            glyphs = cells_of(batch, encoder)[:, 0].view(glyph_logits.shape[:2])
            loss = loss + GLYPH_LOSS_WEIGHT * glyph_loss(glyph_logits, glyphs, encoder.glyphs[" "])
        if arguments.auxiliary:
            auxiliary = auxiliary_batch(run.first_seed(arguments), arguments)
            loss = loss + auxiliary_loss(nano.language, short_encoder, auxiliary, numbers)
        gradient_step(nano, loss, optimizers)
        run.record_step(nano, numbers, log_every=10)
        if run.state["step"] % 200 == 0 or run.progress >= 1:
            run.log({"step": run.state["step"], "held out": True} | measure(nano, encoder, kinds))


if __name__ == "__main__":
    main()
