"""Stage 2: teach nano's tower and projector to see, first glyphs, then exactly what the perfect eye would give.

    python -m training.distil --output runs/eyes --minutes 30                           # glyphs only, beside stage 1
    python -m training.distil --output runs/eyes --minutes 40 --language runs/cells     # and the language model's input
    python -m training.distil --output runs/more --language runs/joint --start-from runs/joint    # with all trouble at once

Every visual token has to name the glyph it covers (a linear head on the projector's hidden layer, kept only for
training). With `--language` the projector's output must also equal the perfect cell's embedding of stage 1, so that a
language model which has never seen a picture reads pictures.
"""

import random
import string
from pathlib import Path

import torch
from nemotron_vl.modeling_nemotron_vl import pixel_shuffle
from torch import nn
from transformers import PreTrainedModel

from training.batches import Encoder
from training.documents import COLUMNS, KINDS, LONG_KINDS, Document, document
from training.drawing import draw, random_style, require_fonts
from training.exercises import ALPHABET
from training.nano import build_model, load_tokenizer, tiles_of
from training.perfect_cells import Reader
from training.runs import Run, build_optimizers, learn, load_weights, prepare_torch, run_parser, set_progress

BLANK_WEIGHT = 0.1  # most cells are blank
LOOK_ALIKES = "lI1|i!O0oQD5S8B3.,:;-'4A" * 4


class Eye(nn.Module):
    """Tower, pixel shuffle and projector of a model, with a head that names glyphs."""

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
    """Cross-entropy over cells, blank ones counting `BLANK_WEIGHT`."""
    weights = torch.ones(logits.shape[-1])
    weights[blank] = BLANK_WEIGHT
    return nn.functional.cross_entropy(logits.flatten(0, -2), glyphs.flatten(), weights)


def draw_pages(pages: list[Document], seeds: list[int], split: str = "train", trouble: float = 1.0) -> torch.Tensor:
    """Tiles of pages, each in the style of its seed."""
    styles = [random_style(seed, split, trouble) for seed in seeds]
    return tiles_of([draw(page, style, seed) for page, style, seed in zip(pages, styles, seeds, strict=True)])


def random_page(seed: int, split: str = "train") -> Document:
    """A document, or a page full of random characters, of which those that look alike come more often."""
    rng = random.Random(f"page {split} {seed}")
    page = document(seed, split, rng.choice(LONG_KINDS if rng.random() < 0.3 else tuple(KINDS)))
    if rng.random() < 0.5:
        characters = rng.choice((ALPHABET, ALPHABET + LOOK_ALIKES, string.ascii_letters + string.digits + ".,-"))
        page.lines = ["".join(rng.choices(characters + " " * 12, k=COLUMNS)) for _ in page.lines]
        page.rules, page.bars, page.points = [], [], []
    return page


@torch.no_grad()
def measure(eye: Eye, encoder: Encoder, num_pages: int = 16) -> dict[str, float]:
    """Share of printed glyphs named rightly on held-out pages, half of them in held-out fonts."""
    eye.eval()
    pages = [document(seed, "heldout") for seed in range(num_pages)]
    glyphs = torch.tensor([encoder.cells(page) for page in pages])[..., 0]
    right = eye(draw_pages(pages, list(range(num_pages)), "heldout"))[1].argmax(-1) == glyphs
    printed = glyphs != encoder.glyphs[" "]
    eye.train()
    return {"glyphs": right[printed].float().mean().item(), "blanks": right[~printed].float().mean().item()}


def main() -> None:
    parser = run_parser(__doc__, minutes=30, batch_size=6, muon_lr=0.02, adamw_lr=1e-3)
    parser.add_argument("--language", type=Path, help="run of training.perfect_cells or joint to imitate")
    parser.add_argument("--start-from", type=Path, help="run of training.distil or joint whose eyes to begin with")
    arguments = parser.parse_args()
    prepare_torch(arguments.threads)
    require_fonts()

    tokenizer = load_tokenizer()
    encoder = Encoder(tokenizer)
    eye = Eye(build_model(tokenizer, arguments.seed), len(tokenizer))
    teacher = None
    if arguments.language:
        teacher = Reader(len(tokenizer)).requires_grad_(False)
        load_weights(teacher, arguments.language / "model.safetensors", "reader.")
    run = Run(arguments.output, arguments.minutes)
    if not run.resume(eye) and arguments.start_from:
        load_weights(eye, arguments.start_from / "model.safetensors", "eye.")
    optimizers = build_optimizers(eye, arguments)

    while run.progress < 1:
        set_progress(optimizers, run.progress, run.steps_since_start)
        first = run.first_seed(arguments)
        seeds = list(range(first, first + arguments.batch_size))
        pages = [random_page(seed) for seed in seeds]
        trouble = 1.0 if arguments.start_from else min(1.0, run.state["step"] / 400)
        cells = torch.tensor([encoder.cells(page) for page in pages])
        tokens, logits = eye(draw_pages(pages, seeds, trouble=trouble))
        loss = glyph_loss(logits, cells[..., 0], encoder.glyphs[" "])
        printed = cells[..., 0] != encoder.glyphs[" "]
        numbers = {
            "loss": loss.item(),
            "glyphs": (logits.argmax(-1) == cells[..., 0])[printed].float().mean().item(),
        }
        if teacher is not None:
            wanted = teacher.cells(cells.flatten(0, 1)).view_as(tokens)
            error = (tokens - wanted).square().mean() / wanted.var()
            loss = loss + error + (tokens - wanted)[printed].square().mean() / wanted.var()
            numbers["error"] = error.item()
        learn(eye, loss, optimizers)
        run.tick(eye, numbers, log_every=10)
        if run.state["step"] % 200 == 0 or run.progress >= 1:
            run.log({"step": run.state["step"], "held out": True} | measure(eye, encoder))


if __name__ == "__main__":
    main()
