"""Stage 1: teach nano's language model to read pages that a perfect eye has seen.

    python -m training.perfect_cells --output runs/cells --minutes 60

There is no picture and no tower: each visual token is the glyph it should hold (the language model's own embedding of
it, through one matrix) plus a position. Copying and looking up are the slow things to learn, and this way they cost no
vision. A run that was stopped goes on from its last save when the command is given again.
"""

import random
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaForCausalLM

from training.batches import IGNORE, TOKENS_PER_TILE, Batch, Encoder, lessons_by_length
from training.lessons import add_lesson_options, draw_drill, draw_lesson, held_out_lesson
from training.nano import language_config, load_tokenizer
from training.questions import Conversation
from training.runs import Run, Score, build_optimizers, learn, load_weights, prepare_torch, run_parser, set_progress


class PerfectCells(nn.Module):
    """Embeds glyph ids of tiles as visual tokens: the language model's embedding of the glyph, turned, plus position.

    Sharing the embedding lets a copying circuit learned on one glyph serve all of them.
    """

    def __init__(self, embedding: nn.Embedding):
        super().__init__()
        self.embedding = [embedding]  # in a list: a borrowed module, not a child
        self.turn = nn.Linear(embedding.embedding_dim, embedding.embedding_dim, bias=False)
        nn.init.orthogonal_(self.turn.weight)
        self.positions = nn.Parameter(torch.randn(TOKENS_PER_TILE, embedding.embedding_dim) * 0.02)

    def forward(self, cells: torch.Tensor, noise: float = 0.0) -> torch.Tensor:
        """Return `(num_tokens, hidden_size)` for `(num_tokens, 2)`: glyph id and position in the tile.

        With `noise`, add Gaussian noise of that share of the tokens' standard deviation, as a tower would.
        """
        tokens = self.turn(self.embedding[0](cells[:, 0])) + self.positions[cells[:, 1]]
        return tokens + noise * tokens.detach().std() * torch.randn_like(tokens) if noise else tokens


class Reader(nn.Module):
    """The language model and its perfect eye."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.language_model = LlamaForCausalLM(language_config(vocab_size))
        self.cells = PerfectCells(self.language_model.get_input_embeddings())

    def forward(
        self, batch: Batch, encoder: Encoder, visual_tokens: torch.Tensor | None = None, noise: float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits `(num_labels, vocab_size)` and the labels they should predict."""
        embeddings = self.language_model.get_input_embeddings()(batch.input_ids)
        if visual_tokens is None and batch.pages:
            visual_tokens = self.cells(cells_of(batch, encoder), noise)
        if visual_tokens is not None:
            mask = (batch.input_ids == encoder.image_token_id).unsqueeze(-1)
            embeddings = embeddings.masked_scatter(mask, visual_tokens)
        hidden_states = self.language_model.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        labels = batch.labels[:, 1:]
        wanted = labels != IGNORE
        return self.language_model.lm_head(hidden_states[:, :-1][wanted]), labels[wanted]


def cells_of(batch: Batch, encoder: Encoder) -> torch.Tensor:
    """Glyph and position of all visual tokens of a batch, `(num_tokens, 2)`."""
    return torch.tensor([cell for page in batch.pages for cell in encoder.cells(page)])


def freeze_cells(model: Reader, encoder: Encoder) -> None:
    """Keep what the eyes imitate: the cells, and the embeddings of glyphs; those of words may still change."""
    model.cells.requires_grad_(False)
    embedding = model.language_model.get_input_embeddings().weight
    is_word = torch.ones(len(embedding), 1)
    is_word[list(encoder.glyphs.values())] = 0
    embedding.register_hook(lambda gradient: gradient * is_word)


def drill_loss(
    model: Reader, encoder: Encoder, drill: tuple[str, list[Conversation]], numbers: dict[str, float]
) -> torch.Tensor:
    """The loss on a drill; the share of right answers is noted in `numbers` under its name."""
    name, conversations = drill
    logits, labels = model(encoder.batch(conversations), encoder)
    score = Score(encoder.end[0])
    score.add(logits, labels)
    numbers[name] = score.shares["answers"]
    return nn.functional.cross_entropy(logits, labels)


@torch.no_grad()
def measure(model: Reader, encoder: Encoder, batches: list[Batch]) -> dict[str, float]:
    """Teacher-forced accuracy on held-out batches: of tokens, and of whole answers."""
    score = Score(encoder.end[0])
    for batch in batches:
        score.add(*model(batch, encoder))
    return score.shares


def main() -> None:
    parser = run_parser(__doc__, minutes=60, batch_size=12, muon_lr=0.02, adamw_lr=2e-3)
    parser.add_argument("--start-from", type=Path, help="directory of an earlier run whose weights to begin with")
    parser.add_argument("--skip-blank-rows", action="store_true", help="shorter sequences, for the first lessons")
    parser.add_argument("--noise", type=float, default=0.0, help="of the cells, relative to their deviation")
    parser.add_argument("--freeze-cells", action="store_true", help="keep the cells as stage 2 imitates them")
    add_lesson_options(parser)
    arguments = parser.parse_args()
    prepare_torch(arguments.threads)
    torch.manual_seed(arguments.seed)

    tokenizer = load_tokenizer()
    encoder = Encoder(tokenizer, arguments.skip_blank_rows)
    model = Reader(len(tokenizer))
    run = Run(arguments.output, arguments.minutes)
    if not run.resume(model) and arguments.start_from:
        load_weights(model, arguments.start_from / "model.safetensors", "reader.")
    if arguments.freeze_cells:
        freeze_cells(model, encoder)
    optimizers = build_optimizers(model, arguments)
    exam = [
        encoder.batch([held_out_lesson(10 * batch + index, tuple(arguments.kinds)) for index in range(10)])
        for batch in range(6)
    ]

    pool: list[Batch] = []
    while run.progress < 1:
        if not pool:
            first = run.first_seed(arguments)
            drawn = [draw_lesson(first + index, arguments) for index in range(arguments.batch_size * 8)]
            pool = lessons_by_length(encoder, drawn, arguments.batch_size)
            random.Random(run.state["step"]).shuffle(pool)  # in every process alike, which keeps their steps as long
        set_progress(optimizers, run.progress, run.steps_since_start)
        logits, labels = model(pool.pop(), encoder, noise=arguments.noise)
        loss = nn.functional.cross_entropy(logits, labels)
        numbers = {"loss": loss.item(), "tokens": (logits.argmax(-1) == labels).float().mean().item()}
        if arguments.drills:
            loss = loss + drill_loss(model, encoder, draw_drill(run.first_seed(arguments), arguments), numbers)
        learn(model, loss, optimizers)
        run.tick(model, numbers)
        if run.state["step"] % 200 == 0 or run.progress >= 1:
            run.log({"step": run.state["step"], "held out": True} | measure(model, encoder, exam))


if __name__ == "__main__":
    main()
