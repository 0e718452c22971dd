"""Train nano's tower to name the characters that each visual token covers, on printed pages.

    python -m pretraining.tower --output runs/tower --minutes 60
    python -m pretraining.tower --output runs/tower-2 --start-from runs/tower --minutes 60 --muon-lr 0.01 \
        --imitate runs/documents

Two linear heads, kept for training only, name the characters: those of a visual token in order, from the projector's
hidden layer, and those of each patch, from the tower's output. A tower learns to combine neighbouring patches very
slowly by itself, so a new one begins as if it knew: each head of each block looks at one of the eight neighbours.
With `--imitate` the projector's output also has to equal the cell embedding of a run of
`pretraining.language`, so that its language model, which has never seen an image, reads images. Strips of tiles are cheaper than whole tiles, because attention is; `--strip 32` trains on whole tiles. Minutes are those
of the processor. An interrupted run resumes from its last save when the command is repeated.
"""

import argparse
import random
import time
from pathlib import Path

import numpy as np
import torch
from nemotron_vl.image_processing import cut_tiles
from nemotron_vl.modeling_nemotron_vl import pixel_shuffle
from torch import nn
from transformers import PreTrainedModel

from documents import fonts
from documents.contents import make_page
from documents.distance import edit_distance
from documents.drawing import draw
from documents.typesetting import Look, set_page
from pretraining.cells import NONE, NUM_CLASSES, SIDE, SPACE, cells_of, patch_classes, token_classes
from pretraining.common import (
    Run,
    build_optimizers,
    gradient_step,
    load_weights,
    precision,
    prepare_torch,
    run_parser,
    set_learning_rate,
    share,
)
from pretraining.language import CellEncoder, CellLanguageModel
from pretraining.nano import TOWER, build_model
from pretraining.random_text import random_page
from pretraining.tokenizer import build_tokenizer

NUM_SLOTS, NUM_PATCH_SLOTS = 4, 2
PATCHES = 2 * SIDE  # along a tile
TILE = 512
DIGITS = list(range(16, 26))  # their classes
NEIGHBOURS = [(x, y) for y in (-1, 0, 1) for x in (-1, 0, 1) if (x, y) != (0, 0)]
# Radians a patch, across and down: their sum of cosines is 11 where a head looks, and nowhere else above 7.6.
FREQUENCIES = ((0.1, 0.92, 1.24, 1.38, 1.78, 2.99), (0.33, 1.53, 2.05, 2.6, 2.8))
NUM_WAVES = sum(map(len, FREQUENCIES))
NUM_PLACES = 24  # dimensions of the width: sine and cosine of each frequency, a constant, and one that stays empty
THRESHOLD = 0.83 * NUM_WAVES
PLACE_SCALE, SHARPNESS = 3.0, 4.0


class GlyphTower(nn.Module):
    """Tower, pixel shuffle and projector of a model, with the heads that name characters.

    Args:
        model: of which tower and projector are trained.
        looks_at_neighbours: take it that each head of the tower attends to its neighbouring patch alone, as
            `look_at_neighbours` sets it: the same, but for a hundredth of attention, in half of the time.
    """

    def __init__(self, model: PreTrainedModel, looks_at_neighbours: bool = False):
        super().__init__()
        self.vision_model = model.vision_model
        self.mlp1 = model.mlp1
        self.merge_size = model.config.merge_size
        self.looks_at_neighbours = looks_at_neighbours
        self.token_head = nn.Linear(model.config.projector_hidden_size, NUM_SLOTS * NUM_CLASSES)
        self.patch_head = nn.Linear(model.config.vit_hidden_size, NUM_PATCH_SLOTS * NUM_CLASSES)

    def features(self, pixel_values: torch.Tensor, first_rows: torch.Tensor) -> torch.Tensor:
        """Return features of strips of tiles, `(num_strips, num_patches, width)`.

        Args:
            pixel_values: `(num_strips, 3, height, 512)`, 0 to 1.
            first_rows: in which row of patches of its tile each strip begins, `(num_strips,)`.
        """
        conditioned = self.vision_model.radio_model
        model = conditioned.model
        generator = model.patch_generator
        patches = generator.embedder(generator.patchify(conditioned.input_conditioner(pixel_values)))
        table = generator.pos_embed.view(PATCHES, PATCHES, -1)
        num_rows = pixel_values.shape[2] // 16
        rows = first_rows[:, None] + torch.arange(num_rows)
        hidden = patches + table[rows].flatten(1, 2)
        if self.looks_at_neighbours:
            around = neighbours_of(num_rows)
            for block in model.blocks:
                hidden = hidden + gather_neighbours(block.attn, block.norm1(hidden), around)
                hidden = hidden + block.mlp(block.norm2(hidden))
            return model.norm(hidden)
        hidden = generator.cls_token(hidden)
        for block in model.blocks:
            hidden = block(hidden)
        return model.norm(hidden)[:, -patches.shape[1] :]

    def forward(
        self, pixel_values: torch.Tensor, first_rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return visual tokens, and the logits of the characters of tokens and of patches, `(..., slots, classes)`."""
        features = self.features(pixel_values, first_rows)
        grid = features.unflatten(1, (-1, PATCHES))
        hidden = self.mlp1[:3](pixel_shuffle(grid, self.merge_size).flatten(1, 2))
        token_logits = self.token_head(hidden).unflatten(-1, (NUM_SLOTS, NUM_CLASSES))
        patch_logits = self.patch_head(features).unflatten(-1, (NUM_PATCH_SLOTS, NUM_CLASSES))
        return self.mlp1[3](hidden), token_logits, patch_logits


def neighbours_of(num_rows: int) -> torch.Tensor:
    """Return the patch at which each head looks from each patch, `(num_patches, 8)`; at the edge the nearest one."""
    y, x = torch.meshgrid(torch.arange(num_rows), torch.arange(PATCHES), indexing="ij")
    looked_at = [
        (y + down).clamp(0, num_rows - 1) * PATCHES + (x + across).clamp(0, PATCHES - 1) for across, down in NEIGHBOURS
    ]
    return torch.stack(looked_at, -1).flatten(0, 1)


def gather_neighbours(attention: nn.Module, hidden: torch.Tensor, around: torch.Tensor) -> torch.Tensor:
    """Return what attention gives if each head sees its neighbour alone, `(num_strips, num_patches, width)`."""
    width = hidden.shape[-1]
    weight, bias = attention.qkv.weight[2 * width :], attention.qkv.bias[2 * width :]
    values = nn.functional.linear(hidden, weight, bias).unflatten(-1, (len(NEIGHBOURS), -1))
    seen = torch.stack([values[:, around[:, head], head] for head in range(len(NEIGHBOURS))], 2)
    return attention.proj(seen.flatten(2))


def waves_of(frequencies: tuple[float, ...]) -> torch.Tensor:
    """Return sine and cosine of each frequency at each place along a tile, `(32, 2 * num_frequencies)`."""
    angles = torch.arange(PATCHES)[:, None] * torch.tensor(frequencies)
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)


@torch.no_grad()
def look_at_neighbours(tower: GlyphTower, patches: torch.Tensor) -> None:
    """Set initial weights with which each head of each block attends to one neighbouring patch.

    The last dimensions of the width hold the place of a patch as sines, which queries turn by one patch; the others hold
    its principal components. Only initial values: everything learns.

    Args:
        tower: with eight heads a block.
        patches: examples, `(num_patches, 3 * 16 * 16)`, as the tower's embedder gets them.
    """
    model = tower.vision_model.radio_model.model
    generator = model.patch_generator
    width = generator.pos_embed.shape[-1]
    num_contents = width - NUM_PLACES
    across, down = (waves_of(frequencies) for frequencies in FREQUENCIES)
    table = torch.zeros(PATCHES, PATCHES, width)
    table[..., num_contents : num_contents + across.shape[1]] = PLACE_SCALE * across[None]
    table[..., num_contents + across.shape[1] : num_contents + 2 * NUM_WAVES] = PLACE_SCALE * down[:, None]
    table[..., num_contents + 2 * NUM_WAVES] = PLACE_SCALE
    generator.pos_embed.copy_(table.flatten(0, 1)[None])
    generator.cls_token.token.zero_()  # far below the threshold of every query
    generator.cls_token.token[:, num_contents + 2 * NUM_WAVES] = PLACE_SCALE

    values, vectors = torch.linalg.eigh(torch.cov(patches.T))
    order = values.argsort(descending=True)[:num_contents]
    scale = (values[order] + 0.02 * values[order].mean()).rsqrt()
    generator.embedder.weight.zero_()
    generator.embedder.weight[:num_contents] = 0.7 * (vectors[:, order] * scale).T

    for block in model.blocks:
        qkv = block.attn.qkv.weight.view(3, len(NEIGHBOURS), -1, width)
        qkv[:2] = 0
        block.attn.qkv.bias.zero_()
        for head, offset in enumerate(NEIGHBOURS):
            turns = [(frequency, delta) for axis, delta in enumerate(offset) for frequency in FREQUENCIES[axis]]
            for index, (frequency, delta) in enumerate(turns):
                row, column = 2 * index, num_contents + 2 * index
                cos, sin = np.cos(frequency * delta), np.sin(frequency * delta)
                qkv[1, head, row, column] = qkv[1, head, row + 1, column + 1] = SHARPNESS
                qkv[0, head, row, column], qkv[0, head, row, column + 1] = SHARPNESS * cos, SHARPNESS * sin
                qkv[0, head, row + 1, column], qkv[0, head, row + 1, column + 1] = -SHARPNESS * sin, SHARPNESS * cos
            # Normalisation makes the keys of empty patches long; with a threshold they are long away from the query.
            constant = 2 * NUM_WAVES
            qkv[1, head, constant, num_contents + constant] = SHARPNESS
            qkv[0, head, constant, num_contents + constant] = -SHARPNESS * THRESHOLD
            content = torch.empty(qkv.shape[2], num_contents)
            nn.init.orthogonal_(content)
            qkv[2, head, :, :num_contents] = content
            qkv[2, head, :, num_contents:] = 0
        nn.init.orthogonal_(block.attn.proj.weight)
        block.attn.proj.weight.mul_(0.5)
        block.attn.proj.weight[num_contents:] = 0
        block.mlp.fc2.weight[num_contents:] = 0


@torch.no_grad()
def silence(tower: GlyphTower) -> None:
    """Let every block give back what it gets."""
    for block in tower.vision_model.radio_model.model.blocks:
        for layer in (block.attn.proj, block.mlp.fc2):
            layer.weight.zero_()
            layer.bias.zero_()


class Anchors:
    """Weights that keep their initial values: where heads look, and the part of the width that holds places.

    Long steps would lose the sight of neighbours within minutes.
    """

    def __init__(self, tower: GlyphTower):
        model = tower.vision_model.radio_model.model
        places = slice(-NUM_PLACES, None)
        generator = model.patch_generator
        anchored = [generator.pos_embed, generator.cls_token.token, generator.embedder.weight[places]]
        for block in model.blocks:
            width = block.attn.proj.weight.shape[0]
            anchored += [block.attn.qkv.weight[: 2 * width], block.attn.qkv.bias[: 2 * width]]
            anchored += [block.norm1.weight[places], block.norm1.bias[places]]
            for layer in (block.attn.proj, block.mlp.fc2):
                anchored += [layer.weight[places], layer.bias[places]]
        self.pairs = [(weight.detach(), weight.detach().clone()) for weight in anchored]

    @torch.no_grad()
    def restore(self) -> None:
        for weight, initial in self.pairs:
            weight.copy_(initial)


def sample_tiles(seed: int, split: str, max_num_tiles: int, look: Look, random_text: float = 0.5):
    """Return the tiles of the page of a seed, `(num_tiles, 3, 512, 512)` uint8, and its cells."""
    is_random = split == "train" and random.Random(f"tiles {seed}").random() < random_text
    page = random_page(seed) if is_random else make_page(seed, split)
    printed = set_page(page, seed, split, look)
    image = draw(printed, seed, split, look.degradation)
    tiles = torch.stack(cut_tiles(image, max_num_tiles=max_num_tiles, use_thumbnail=False, upscale=2))
    return tiles, cells_of(printed, max_num_tiles)


class Strips:
    """An endless supply of strips of tiles with characters.

    Args:
        look: how pages look.
        max_num_tiles: a page.
        height: of a strip, in patches.
        random_text: share of pages of random text.
    """

    def __init__(self, max_num_tiles: int, height: int, random_text: float, encoder: CellEncoder):
        self.max_num_tiles, self.height, self.random_text = max_num_tiles, height, random_text
        self.encoder = encoder
        self.pool: list[tuple] = []

    def add(self, seed: int, look: Look) -> None:
        tiles, cells = sample_tiles(seed, "train", self.max_num_tiles, look, self.random_text)
        rng = random.Random(f"strips {seed}")
        for index, tile in enumerate(tiles):
            glyphs = cells.tile(index)
            tokens = token_classes(glyphs, NUM_SLOTS).view(SIDE, SIDE, NUM_SLOTS)
            patches = patch_classes(glyphs, NUM_PATCH_SLOTS).view(PATCHES, PATCHES, NUM_PATCH_SLOTS)
            first = 2 * rng.randrange(self.height // 2) if self.height < PATCHES else 0
            for row in range(first, PATCHES - self.height + 1, self.height):
                wanted = tokens[row // 2 : (row + self.height) // 2]
                num_printed = ((wanted != NONE) & (wanted != SPACE)).sum().item()
                if num_printed >= 6 or rng.random() < 0.05:
                    pixels = tile[:, 16 * row : 16 * (row + self.height)].clone()
                    covered = range(SIDE * row // 2, SIDE * (row + self.height) // 2)
                    covered = torch.tensor([self.encoder.cell(token, glyphs.get(token, [])) for token in covered])
                    around = patches[row : row + self.height].flatten(0, 1)
                    self.pool.append((pixels, wanted.flatten(0, 1), around, row, covered))

    def batch(self, size: int, seed: int, look: Look) -> tuple[torch.Tensor, ...]:
        """Return pixels, classes of tokens, classes of patches, first rows, and the cells of the language model."""
        while len(self.pool) < 4 * size:  # a pool, so that the strips of a page are spread over steps
            self.add(seed, look)
            seed += 1
        random.Random(seed).shuffle(self.pool)
        chosen, self.pool = self.pool[:size], self.pool[size:]
        pixels, tokens, patches, rows, cells = zip(*chosen, strict=True)
        pixels = torch.stack(pixels).float() / 255
        return pixels, torch.stack(tokens), torch.stack(patches), torch.tensor(rows), torch.stack(cells)


def imitation_error(
    tokens: torch.Tensor, goal: torch.Tensor, printed: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the squared error of visual tokens relative to the variance of their goal: of all, of printed ones."""
    errors = (tokens.float() - goal).square().mean(-1) / goal.var()
    return errors.mean(), errors[printed].mean()


def glyph_loss(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of characters; spaces count 0.4 and empty slots 0.2, of which most are."""
    weights = torch.ones(NUM_CLASSES)
    weights[SPACE], weights[NONE] = 0.4, 0.2
    return nn.functional.cross_entropy(logits.float().flatten(0, -2), classes.flatten(), weights)


def accuracy(logits: torch.Tensor, classes: torch.Tensor) -> float:
    """Return the share of printed characters, spaces left out, that are named rightly in their slots."""
    printed = (classes != NONE) & (classes != SPACE)
    return (logits.argmax(-1) == classes)[printed].float().mean().item()


@torch.no_grad()
def measure(tower: GlyphTower, pages: list[tuple]) -> dict[str, float]:
    """Return accuracies, with attention as it is, on whole tiles of held-out pages: of characters, digits, patches, tokens, and the error rate.

    The character error rate compares the characters of all tokens of a tile in order, so that a character that is named
    rightly in the neighbouring token costs nothing.
    """
    tower.eval()
    fast, tower.looks_at_neighbours = tower.looks_at_neighbours, False
    said, wanted, said_patches, wanted_patches = [], [], [], []
    for tiles, cells in pages:
        _, tokens, patches = tower(tiles.float() / 255, torch.zeros(len(tiles), dtype=torch.long))
        said.append(tokens.argmax(-1))
        said_patches.append(patches.argmax(-1))
        for index in range(len(tiles)):
            wanted.append(token_classes(cells.tile(index), NUM_SLOTS))
            wanted_patches.append(patch_classes(cells.tile(index), NUM_PATCH_SLOTS))
    tower.train()
    tower.looks_at_neighbours = fast
    said, wanted = torch.cat(said), torch.stack(wanted)
    right, printed = said == wanted, (wanted != NONE) & (wanted != SPACE)
    is_digit = (wanted >= DIGITS[0]) & (wanted <= DIGITS[-1])
    said_patches, wanted_patches = torch.cat(said_patches), torch.stack(wanted_patches)
    printed_patches = (wanted_patches != NONE) & (wanted_patches != SPACE)
    errors = length = 0
    for row, truth in zip(said.flatten(1).tolist(), wanted.flatten(1).tolist(), strict=True):
        row, truth = ([fonts.CHARACTERS[index] for index in ids if index not in (NONE, SPACE)] for ids in (row, truth))
        errors, length = errors + edit_distance("".join(row), "".join(truth)), length + len(truth)
    return {
        "glyphs": right[printed].float().mean().item(),
        "digits": right[is_digit].float().mean().item(),
        "tokens": right.all(-1)[printed.any(-1)].float().mean().item(),
        "blank": right.all(-1)[~printed.any(-1)].float().mean().item(),
        "patches": (said_patches == wanted_patches)[printed_patches].float().mean().item(),
        "error rate": errors / length,
    }


def add_size_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--width", type=int, default=TOWER["embed_dim"])
    parser.add_argument("--depth", type=int, default=TOWER["depth"], help="may be more than that of --start-from")


def sizes_of(arguments: argparse.Namespace) -> dict[str, float]:
    """Return the sizes of the tower of a command line."""
    return TOWER | {"embed_dim": arguments.width, "depth": arguments.depth}


def main() -> None:
    parser = run_parser(__doc__, minutes=60, batch_size=8, muon_lr=0.02, adamw_lr=1e-3, threads=1)
    parser.add_argument("--start-from", type=Path, help="run to continue")
    parser.add_argument("--imitate", type=Path, help="run of pretraining.language whose cell embedding to imitate")
    parser.add_argument("--strip", type=int, default=8, help="height of strips in patches of 16 px; 32: whole tiles")
    parser.add_argument("--max-num-tiles", type=int, default=2)
    parser.add_argument("--random-text", type=float, default=0.5, help="share of pages of random text")
    parser.add_argument("--tilted", type=share, default=0.3, help="share of tilted pages; half as many in perspective")
    parser.add_argument("--measure-every", type=float, default=5, help="minutes")
    parser.add_argument("--free-attention", action="store_true", help="train also where heads look")
    add_size_options(parser)
    arguments = parser.parse_args()
    prepare_torch(arguments.threads)
    torch.manual_seed(arguments.seed)
    fonts.require("train", "heldout")

    tokenizer = build_tokenizer()
    encoder = CellEncoder(tokenizer)
    model = build_model(tokenizer, arguments.seed, sizes_of(arguments))
    tower = GlyphTower(model, looks_at_neighbours=not arguments.free_attention)
    teacher = None
    if arguments.imitate:
        teacher = CellLanguageModel(len(tokenizer)).requires_grad_(False)
        load_weights(teacher, arguments.imitate / "model.safetensors", "language.")
    run = Run(arguments.output, arguments.minutes, time.process_time)
    strips = Strips(arguments.max_num_tiles, arguments.strip, arguments.random_text, encoder)
    if not run.resume(tower):
        generator = tower.vision_model.radio_model.model.patch_generator
        conditioner = tower.vision_model.radio_model.input_conditioner
        pixels = Strips(arguments.max_num_tiles, 8, 0.5, encoder).batch(64, 10**9, Look(degradation=0.3))[0]
        patches = generator.patchify(conditioner(pixels)).flatten(0, 1)
        look_at_neighbours(tower, patches[patches.std(-1) > 0.2])
        if arguments.start_from:
            silence(tower)  # blocks that the earlier run lacks change nothing at first
            anchors = Anchors(tower)
            load_weights(tower, arguments.start_from / "model.safetensors", "tower.")
            anchors.restore()
    run.log({key: str(value) for key, value in vars(arguments).items()})
    train(tower, strips, run, arguments, teacher)


def train(
    tower: GlyphTower, strips: Strips, run: Run, arguments: argparse.Namespace, teacher: CellLanguageModel | None
) -> None:
    """Train until the run's minutes are spent."""
    anchors = None if arguments.free_attention else Anchors(tower)
    optimizers = build_optimizers(tower, arguments)
    pages = [sample_tiles(seed, "heldout", arguments.max_num_tiles, Look()) for seed in range(24)]
    next_measure = run.state["minutes"] + arguments.measure_every
    while run.progress < 1:
        set_learning_rate(optimizers, run.progress, run.steps_since_start)
        degradation = 1.0 if arguments.start_from else min(1.0, 0.2 + run.state["step"] / 1500)
        tilted = arguments.tilted * degradation
        look = Look(degradation=degradation, tilted=tilted, photographed=tilted / 2)
        pixels, tokens, patches, rows, cells = strips.batch(arguments.batch_size, run.first_seed(arguments), look)
        with precision(arguments):
            visual_tokens, token_logits, patch_logits = tower(pixels, rows)
        loss = glyph_loss(token_logits, tokens) + glyph_loss(patch_logits, patches)
        numbers = {
            "loss": loss.item(),
            "glyphs": accuracy(token_logits, tokens),
            "patches": accuracy(patch_logits, patches),
        }
        if teacher:
            goal = teacher.cell_embedding(cells.flatten(0, 1)).view_as(visual_tokens)
            error, printed_error = imitation_error(visual_tokens, goal, tokens[..., 0] != NONE)
            loss = loss + error + printed_error
            numbers |= {"error": error.item(), "printed error": printed_error.item()}
        gradient_step(tower, loss, optimizers)
        if anchors:
            anchors.restore()
        run.record_step(tower, numbers)
        if run.state["minutes"] > next_measure or run.progress >= 1:
            next_measure += arguments.measure_every
            run.log_measurement(lambda: measure(tower, pages))


if __name__ == "__main__":
    main()
