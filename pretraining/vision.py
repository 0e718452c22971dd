"""Stage 2: train nano's tower and projector to give what the language model of stage 1 reads.

    python -m pretraining.vision --output runs/vision --language runs/language --minutes 90
    python -m pretraining.vision --output runs/more --language runs/joint --start-from runs/joint    # continue a tower

A linear head on the projector's hidden layer classifies the glyph that each visual token covers; it is kept for
training only. With `--language` the projector's output also has to equal the glyph embedding of stage 1
(distillation), so that a language model that has never seen an image reads images. Without `--language` the glyphs
alone are learned, which can run beside stage 1. The degradation of images grows over the first 400 steps of a new run;
a continued run has all of it from the start.
"""

import random
import string
from pathlib import Path

import torch
from nemotron_vl.modeling_nemotron_vl import pixel_shuffle
from torch import nn
from transformers import PreTrainedModel

from documents.drawing import draw, random_style, require_fonts
from documents.generator import COLUMNS, KINDS, LONG_KINDS, Document, document
from pretraining.batches import Encoder
from pretraining.common import (
    Run,
    build_optimizers,
    gradient_step,
    load_weights,
    prepare_torch,
    run_parser,
    set_learning_rate,
)
from pretraining.language import GlyphLanguageModel
from pretraining.nano import build_model, load_tokenizer, tiles_of
from pretraining.random_pages import ALPHABET

BLANK_WEIGHT = 0.1  # in the loss; most cells are blank
LOOK_ALIKES = "lI1|i!O0oQD5S8B3.,:;-'4A" * 4


class VisionEncoder(nn.Module):
    """Tower, pixel shuffle and projector of a model, with a head that classifies glyphs."""

    def __init__(self, model: PreTrainedModel, vocab_size: int):
        super().__init__()
        self.vision_model = model.vision_model
        self.mlp1 = model.mlp1
        self.glyph_head = nn.Linear(model.config.projector_hidden_size, vocab_size)
        self.merge_size = model.config.merge_size
        self.patch_size = model.config.patch_size

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return visual tokens `(num_tiles, 256, hidden_size)` and glyph logits `(num_tiles, 256, vocab_size)`."""
        features = self.vision_model(pixel_values).features
        grid = features.unflatten(1, (pixel_values.shape[-2] // self.patch_size, -1))
        hidden = self.mlp1[:3](pixel_shuffle(grid, self.merge_size).flatten(1, 2))
        return self.mlp1[3](hidden), self.glyph_head(hidden)


def glyph_loss(logits: torch.Tensor, glyphs: torch.Tensor, blank: int) -> torch.Tensor:
    """Return the cross-entropy of glyphs, in which blank ones count `BLANK_WEIGHT`."""
    weights = torch.ones(logits.shape[-1])
    weights[blank] = BLANK_WEIGHT
    return nn.functional.cross_entropy(logits.flatten(0, -2), glyphs.flatten(), weights)


def draw_pages(
    pages: list[Document], seeds: list[int], split: str = "train", degradation: float = 1.0
) -> torch.Tensor:
    """Return the tiles of pages, each drawn in the style of its seed: `(num_tiles, 3, 512, 512)`, 0 to 1."""
    styles = [random_style(seed, split, degradation) for seed in seeds]
    return tiles_of([draw(page, style, seed) for page, style, seed in zip(pages, styles, seeds, strict=True)])


def sample_page(seed: int, split: str = "train") -> Document:
    """Return a document or a page full of random characters, on which those that look alike are more frequent."""
    rng = random.Random(f"page {split} {seed}")
    page = document(seed, split, rng.choice(LONG_KINDS if rng.random() < 0.3 else tuple(KINDS)))
    if rng.random() < 0.5:
        characters = rng.choice((ALPHABET, ALPHABET + LOOK_ALIKES, string.ascii_letters + string.digits + ".,-"))
        page.lines = ["".join(rng.choices(characters + " " * 12, k=COLUMNS)) for _ in page.lines]
        page.rules, page.bars, page.points = [], [], []
    return page


@torch.no_grad()
def measure(vision: VisionEncoder, encoder: Encoder, num_pages: int = 16) -> dict[str, float]:
    """Return the shares of printed and blank glyphs classified rightly on held-out pages, half in held-out fonts."""
    vision.eval()
    pages = [document(seed, "heldout") for seed in range(num_pages)]
    glyphs = torch.tensor([encoder.cells(page) for page in pages])[..., 0]
    right = vision(draw_pages(pages, list(range(num_pages)), "heldout"))[1].argmax(-1) == glyphs
    printed = glyphs != encoder.glyphs[" "]
    vision.train()
    return {"glyphs": right[printed].float().mean().item(), "blanks": right[~printed].float().mean().item()}


def main() -> None:
    parser = run_parser(__doc__, minutes=30, batch_size=6, muon_lr=0.02, adamw_lr=1e-3)
    parser.add_argument("--language", type=Path, help="run of pretraining.language or joint to imitate")
    parser.add_argument("--start-from", type=Path, help="run of pretraining.vision or joint to continue")
    arguments = parser.parse_args()
    prepare_torch(arguments.threads)
    require_fonts()

    tokenizer = load_tokenizer()
    encoder = Encoder(tokenizer)
    vision = VisionEncoder(build_model(tokenizer, arguments.seed), len(tokenizer))
    teacher = None
    if arguments.language:
        teacher = GlyphLanguageModel(len(tokenizer)).requires_grad_(False)
        load_weights(teacher, arguments.language / "model.safetensors", "language.")
    run = Run(arguments.output, arguments.minutes)
    if not run.resume(vision) and arguments.start_from:
        load_weights(vision, arguments.start_from / "model.safetensors", "vision.")
    optimizers = build_optimizers(vision, arguments)

    while run.progress < 1:
        set_learning_rate(optimizers, run.progress, run.steps_since_start)
        first = run.first_seed(arguments)
        seeds = list(range(first, first + arguments.batch_size))
        pages = [sample_page(seed) for seed in seeds]
        degradation = 1.0 if arguments.start_from else min(1.0, run.state["step"] / 400)
        cells = torch.tensor([encoder.cells(page) for page in pages])
        tokens, logits = vision(draw_pages(pages, seeds, degradation=degradation))
        loss = glyph_loss(logits, cells[..., 0], encoder.glyphs[" "])
        printed = cells[..., 0] != encoder.glyphs[" "]
        numbers = {
            "loss": loss.item(),
            "glyphs": (logits.argmax(-1) == cells[..., 0])[printed].float().mean().item(),
        }
        if teacher is not None:
            target = teacher.glyph_embedding(cells.flatten(0, 1)).view_as(tokens)
            error = (tokens - target).square().mean() / target.var()
            loss = loss + error + (tokens - target)[printed].square().mean() / target.var()
            numbers["error"] = error.item()
        gradient_step(vision, loss, optimizers)
        run.record_step(vision, numbers, log_every=10)
        if run.state["step"] % 200 == 0 or run.progress >= 1:
            run.log({"step": run.state["step"], "held out": True} | measure(vision, encoder))


if __name__ == "__main__":
    main()
