"""Stage 1: train nano's language model on glyph ids instead of images.

    python -m pretraining.language --output runs/language --minutes 60

There is no image and no tower. Each visual token is made from the id of the glyph that it covers: the language model's
own embedding of the glyph, through one matrix, plus a position. Copying and looking up take the longest to learn, and
without a tower their steps are cheap. An interrupted run resumes from its last save when the command is repeated.
"""

import random
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaForCausalLM

from documents.questions import Conversation
from pretraining.batches import IGNORE_INDEX, TOKENS_PER_TILE, Batch, Encoder, batches_by_length
from pretraining.common import (
    Run,
    Score,
    build_optimizers,
    gradient_step,
    load_weights,
    prepare_torch,
    run_parser,
    set_learning_rate,
)
from pretraining.mixture import add_mixture_options, auxiliary_batch, heldout_conversation, sample_conversation
from pretraining.nano import language_config, load_tokenizer


class GlyphEmbedding(nn.Module):
    """Embeds glyph ids as visual tokens: the language model's embedding of the glyph, projected, plus a position.

    With a shared embedding, copying that was learned on one glyph works for all of them.
    """

    def __init__(self, embedding: nn.Embedding):
        super().__init__()
        self.embedding = [embedding]  # in a list: a borrowed module, not a child
        self.projection = nn.Linear(embedding.embedding_dim, embedding.embedding_dim, bias=False)
        nn.init.orthogonal_(self.projection.weight)
        self.position_embedding = nn.Parameter(torch.randn(TOKENS_PER_TILE, embedding.embedding_dim) * 0.02)

    def forward(self, cells: torch.Tensor, noise: float = 0.0) -> torch.Tensor:
        """Return visual tokens `(num_tokens, hidden_size)`.

        Args:
            cells: glyph id and position in the tile, `(num_tokens, 2)`.
            noise: standard deviation of added Gaussian noise, relative to that of the tokens; it stands in for the
                errors of a tower.
        """
        tokens = self.projection(self.embedding[0](cells[:, 0])) + self.position_embedding[cells[:, 1]]
        return tokens + noise * tokens.detach().std() * torch.randn_like(tokens) if noise else tokens


class GlyphLanguageModel(nn.Module):
    """Nano's language model, with an embedding of glyph ids in place of a tower."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.language_model = LlamaForCausalLM(language_config(vocab_size))
        self.glyph_embedding = GlyphEmbedding(self.language_model.get_input_embeddings())

    def forward(
        self, batch: Batch, encoder: Encoder, visual_tokens: torch.Tensor | None = None, noise: float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits `(num_labels, vocab_size)` and the labels that they should predict.

        Args:
            batch: of sequences.
            encoder: that made the batch.
            visual_tokens: `(num_tokens, hidden_size)` for the image tokens; None for those of the glyph embedding.
            noise: of the glyph embedding.
        """
        embeddings = self.language_model.get_input_embeddings()(batch.input_ids)
        if visual_tokens is None and batch.pages:
            visual_tokens = self.glyph_embedding(cells_of(batch, encoder), noise)
        if visual_tokens is not None:
            mask = (batch.input_ids == encoder.image_token_id).unsqueeze(-1)
            embeddings = embeddings.masked_scatter(mask, visual_tokens)
        hidden_states = self.language_model.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        labels = batch.labels[:, 1:]
        wanted = labels != IGNORE_INDEX
        return self.language_model.lm_head(hidden_states[:, :-1][wanted]), labels[wanted]


def cells_of(batch: Batch, encoder: Encoder) -> torch.Tensor:
    """Return glyph id and position of all visual tokens of a batch, `(num_tokens, 2)`."""
    return torch.tensor([cell for page in batch.pages for cell in encoder.cells(page)])


def freeze_glyph_embedding(model: GlyphLanguageModel, encoder: Encoder) -> None:
    """Freeze what stage 2 imitates: the glyph embedding with the embeddings of glyphs; those of words still learn."""
    model.glyph_embedding.requires_grad_(False)
    embedding = model.language_model.get_input_embeddings().weight
    is_word = torch.ones(len(embedding), 1)
    is_word[list(encoder.glyphs.values())] = 0
    embedding.register_hook(lambda gradient: gradient * is_word)


def auxiliary_loss(
    model: GlyphLanguageModel, encoder: Encoder, named_batch: tuple[str, list[Conversation]], numbers: dict[str, float]
) -> torch.Tensor:
    """Return the loss on an auxiliary batch; its share of right answers goes into `numbers`."""
    name, conversations = named_batch
    logits, labels = model(encoder.batch(conversations), encoder)
    score = Score(encoder.end[0])
    score.add(logits, labels)
    numbers[name] = score.shares["answers"]
    return nn.functional.cross_entropy(logits, labels)


@torch.no_grad()
def measure(model: GlyphLanguageModel, encoder: Encoder, batches: list[Batch]) -> dict[str, float]:
    """Return the teacher-forced accuracy on held-out batches: of tokens, and of whole answers."""
    score = Score(encoder.end[0])
    for batch in batches:
        score.add(*model(batch, encoder))
    return score.shares


def main() -> None:
    parser = run_parser(__doc__, minutes=60, batch_size=12, muon_lr=0.02, adamw_lr=2e-3)
    parser.add_argument("--start-from", type=Path, help="directory of an earlier run whose weights to begin with")
    parser.add_argument("--skip-blank-rows", action="store_true", help="leave blank rows out of sequences")
    parser.add_argument("--noise", type=float, default=0.0, help="of visual tokens, relative to their deviation")
    parser.add_argument("--freeze-glyph-embedding", action="store_true", help="keep what stage 2 imitates")
    add_mixture_options(parser)
    arguments = parser.parse_args()
    prepare_torch(arguments.threads)
    torch.manual_seed(arguments.seed)

    tokenizer = load_tokenizer()
    encoder = Encoder(tokenizer, arguments.skip_blank_rows)
    model = GlyphLanguageModel(len(tokenizer))
    run = Run(arguments.output, arguments.minutes)
    if not run.resume(model) and arguments.start_from:
        load_weights(model, arguments.start_from / "model.safetensors", "language.")
    if arguments.freeze_glyph_embedding:
        freeze_glyph_embedding(model, encoder)
    optimizers = build_optimizers(model, arguments)
    heldout_batches = [
        encoder.batch([heldout_conversation(10 * batch + index, tuple(arguments.kinds)) for index in range(10)])
        for batch in range(6)
    ]

    pool: list[Batch] = []
    while run.progress < 1:
        if not pool:
            first = run.first_seed(arguments)
            sampled = [sample_conversation(first + index, arguments) for index in range(arguments.batch_size * 8)]
            pool = batches_by_length(encoder, sampled, arguments.batch_size)
            random.Random(run.state["step"]).shuffle(
                pool
            )  # the same order in all processes, so that their steps take as long
        set_learning_rate(optimizers, run.progress, run.steps_since_start)
        logits, labels = model(pool.pop(), encoder, noise=arguments.noise)
        loss = nn.functional.cross_entropy(logits, labels)
        numbers = {"loss": loss.item(), "tokens": (logits.argmax(-1) == labels).float().mean().item()}
        if arguments.auxiliary:
            loss = loss + auxiliary_loss(
                model, encoder, auxiliary_batch(run.first_seed(arguments), arguments), numbers
            )
        gradient_step(model, loss, optimizers)
        run.record_step(model, numbers)
        if run.state["step"] % 200 == 0 or run.progress >= 1:
            run.log({"step": run.state["step"], "held out": True} | measure(model, encoder, heldout_batches))


if __name__ == "__main__":
    main()
