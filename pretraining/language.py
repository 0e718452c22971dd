"""Train nano's language model on what each visual token covers instead of images.

    python -m pretraining.language --output runs/documents --minutes 60
    python -m pretraining.language --output runs/documents-2 --start-from runs/documents --minutes 60 --muon-lr 0.006

There is no image and no tower. Each visual token is the sum of the embeddings of the characters that it covers, each
turned by the matrix of its place among them, and of its position in the tile. A new run begins from the language model
in `nano/`; a fresh one would need hours to learn copying. Minutes are those of the processor. An interrupted run resumes
from its last save when the command is repeated.
"""

import argparse
import random
import re
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, LlamaForCausalLM, PreTrainedTokenizerBase

from documents import fonts
from documents.contents import KINDS, make_page
from documents.questions import (
    ABSENT,
    TEXT_QUESTIONS,
    VERDICTS,
    Conversation,
    ask,
    training_conversation,
    verdict_of,
)
from documents.typesetting import Look, Print, set_page
from pretraining.cells import Cells, cells_of
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
)
from pretraining.nano import language_config, nano_weights
from pretraining.random_text import copying, looking_up, understanding
from pretraining.tokenizer import MARKUP, build_tokenizer

NUM_SLOTS = 6
NO_GLYPH = -1
ATTENTION_ROWS = 128
IGNORE_INDEX = -100  # the label of tokens without loss
ANSWER_PIECE = re.compile(f"{'|'.join(MARKUP)}|.", re.DOTALL)
SENTENCES = {ABSENT, *VERDICTS, *TEXT_QUESTIONS}  # answers that no page prints


class Lesson(NamedTuple):
    """A conversation, what the visual tokens of its pages cover, and the pages set in type with their seeds."""

    conversation: Conversation
    cells: list[Cells]
    prints: list[Print]
    seeds: list[int]


def set_lesson(
    conversation: Conversation, seeds: list[int], split: str, look: Look, max_num_tiles: int, jitter: float = 0.0
) -> Lesson:
    """Set the pages of a conversation in type, each by its seed."""
    prints = [set_page(page, seed, split, look) for page, seed in zip(conversation.documents, seeds, strict=True)]
    rng = random.Random(f"jitter {seeds}")
    return Lesson(conversation, [cells_of(printed, max_num_tiles, jitter, rng) for printed in prints], prints, seeds)


class Batch(NamedTuple):
    """Right-padded sequences, each `(num_sequences, length)`, and the cells of their image tokens, `(num_tokens, 9)`.

    The columns of `cells` are glyph ids (`NO_GLYPH` for none), the position in the tile, and eighths of the place of the
    first character in the token, across and down.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    cells: torch.Tensor


class CellEncoder:
    """Encodes lessons in the published prompt format; blank visual tokens may be left out, the others keep their positions.

    A sequence is `<|begin_of_text|>`, then per turn a user and an assistant block; the images come first, each as
    `<img>`, 256 `<image>` per tile, `</img>` and a line break. Only answers (with their `<|eot_id|>`) carry loss.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.pad_token_id = tokenizer.pad_token_id
        self.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
        self.start = self.encode("<|begin_of_text|>")
        self.user = self.encode("<|start_header_id|>user<|end_header_id|>\n\n")
        self.assistant = self.encode("<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
        self.end = self.encode("<|eot_id|>")
        self.glyphs = {character: self.encode(character)[0] for character in fonts.CHARACTERS}
        self.pieces = {piece: self.encode(piece) for piece in (*self.glyphs, "\n", *MARKUP)}

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def answer(self, text: str) -> list[int]:
        """Return the ids of an answer: printed text one glyph a token, sentences of `SENTENCES` in whole words.

        The tokenizer has a token for "Total". To choose it the model would have to read the whole word ahead, and it
        confuses "Total" with "To:"; glyph by glyph it copies. The " and " between two values is written likewise.
        `chat()` encodes earlier answers with the tokenizer's whole words all the same.
        """
        if text in SENTENCES:
            return self.encode(text)
        verdict = verdict_of(text)
        printed = text.removesuffix(f" {verdict}") if verdict in VERDICTS else text
        pieces = [self.pieces.get(piece) or self.encode(piece) for piece in ANSWER_PIECE.findall(printed)]
        return [token for piece in pieces for token in piece] + self.encode(text.removeprefix(printed))

    def page(self, cells: Cells, skip_blank: bool) -> tuple[list[int], list[list[int]]]:
        """Return positions of the visual tokens from the first, and their cells."""
        kept = [index for index in range(cells.num_tokens) if not skip_blank or index in cells.glyphs]
        return kept, [self.cell(index % 256, cells.glyphs.get(index, ())) for index in kept]

    def cell(self, position: int, glyphs: list[tuple[str, float, float]]) -> list[int]:
        if not glyphs:
            return [self.glyphs[" "], *[NO_GLYPH] * (NUM_SLOTS - 1), position, 8, 8]
        ids = [self.glyphs[character] for character, _, _ in glyphs[:NUM_SLOTS]]
        across, down = (min(7, max(0, int(8 * share))) for share in glyphs[0][1:])
        return [*ids, *[NO_GLYPH] * (NUM_SLOTS - len(ids)), position, across, down]

    def lesson(self, lesson: Lesson, skip_blank: bool, num_answered: int | None = None):
        """Return ids, labels, positions and cells; with `num_answered`, up to the question after so many turns."""
        ids = list(self.start)
        ids += self.user
        positions = list(range(len(ids)))
        cells: list[list[int]] = []
        for page in lesson.cells:
            opening, closing = self.encode("<img>"), self.encode("</img>\n")
            first = positions[-1] + 1 + len(opening)
            kept, covered = self.page(page, skip_blank)
            ids += opening + [self.image_token_id] * len(kept) + closing
            positions += range(positions[-1] + 1, first)
            positions += [first + index for index in kept]
            positions += range(first + page.num_tokens, first + page.num_tokens + len(closing))
            cells += covered
        labels = [IGNORE_INDEX] * len(ids)
        turns = lesson.conversation.turns
        for index, turn in enumerate(turns if num_answered is None else turns[: num_answered + 1]):
            question = (self.user if index else []) + self.encode(turn.question) + self.assistant
            answer = [] if index == num_answered else [*self.answer(turn.answer), *self.end]
            ids += question + answer
            labels += [IGNORE_INDEX] * len(question) + answer
        positions += range(positions[-1] + 1, positions[-1] + 1 + len(ids) - len(positions))
        return ids, labels, positions, cells

    def lessons(self, lessons: list[Lesson], skip_blank: bool) -> Batch:
        rows = [self.lesson(lesson, skip_blank) for lesson in lessons]
        length = max(len(row[0]) for row in rows)
        fill = lambda column, value: torch.tensor([row[column] + [value] * (length - len(row[0])) for row in rows])  # noqa: E731
        cells = torch.tensor([cell for row in rows for cell in row[3]], dtype=torch.long).view(-1, NUM_SLOTS + 3)
        return Batch(fill(0, self.pad_token_id), fill(1, IGNORE_INDEX), fill(2, 0), cells)


class CellEmbedding(nn.Module):
    """Embeds cells as visual tokens: the embeddings of their glyphs, each turned by the matrix of its slot, summed.

    With a shared embedding, copying that was learned on one glyph works for all of them.
    """

    def __init__(self, embedding: nn.Embedding):
        super().__init__()
        self.embedding = [embedding]  # in a list: a borrowed module, not a child
        width = embedding.embedding_dim
        turns = [nn.init.orthogonal_(torch.empty(width, width)) for _ in range(NUM_SLOTS)]
        self.turns = nn.Parameter(torch.stack(turns))
        self.position_embedding = nn.Parameter(torch.randn(256, width) * 0.02)
        self.across = nn.Parameter(torch.randn(9, width) * 0.02)
        self.down = nn.Parameter(torch.randn(9, width) * 0.02)

    def forward(self, cells: torch.Tensor, noise: float = 0.0) -> torch.Tensor:
        """Return visual tokens `(num_tokens, hidden_size)`.

        Args:
            cells: as in `Batch`.
            noise: standard deviation of added Gaussian noise, relative to that of the tokens; it stands in for the
                errors of a tower.
        """
        position, across, down = cells[:, NUM_SLOTS:].unbind(1)
        tokens = self.position_embedding[position] + self.across[across] + self.down[down]
        for slot in range(NUM_SLOTS):
            covered = (cells[:, slot] != NO_GLYPH).nonzero()[:, 0]
            if len(covered):
                glyphs = self.embedding[0](cells[covered, slot]) @ self.turns[slot].T
                tokens = tokens.index_add(0, covered, glyphs.to(tokens.dtype))
        return tokens + noise * tokens.detach().std() * torch.randn_like(tokens) if noise else tokens


def causal_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: None, scaling: float, **_
) -> tuple[torch.Tensor, None]:
    """Attend to all earlier tokens, `ATTENTION_ROWS` at a time: faster on a CPU than torch's own attention in bfloat16.

    Gaps in the positions hide nothing here; transformers' own choice takes them for the borders of packed texts.

    Args:
        module, mask: not used; sequences are padded on the right, where nothing is learned.
        query, key, value: `(num_sequences, num_heads, length, head_dim)`.
        scaling: of the products.

    Returns:
        `(num_sequences, length, num_heads, head_dim)`, and no weights.
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    query, key, value = (query * scaling).to(dtype), key.to(dtype), value.to(dtype)
    length = query.shape[2]
    seen = []
    for start in range(0, length, ATTENTION_ROWS):
        end = min(length, start + ATTENTION_ROWS)
        later = torch.full((end - start, end), -torch.inf, dtype=dtype).triu(start + 1)
        weights = (query[:, :, start:end] @ key[:, :, :end].mT + later).softmax(-1)
        seen.append(weights.to(dtype) @ value[:, :, :end])
    return torch.cat(seen, 2).transpose(1, 2).contiguous(), None


AttentionInterface.register("causal", causal_attention)
AttentionMaskInterface.register("causal", lambda *_, **__: None)


class CellLanguageModel(nn.Module):
    """Nano's language model, with an embedding of cells in place of a tower."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.language_model = LlamaForCausalLM(language_config(vocab_size))
        self.language_model.set_attn_implementation("causal")
        self.cell_embedding = CellEmbedding(self.language_model.get_input_embeddings())

    def embed(
        self,
        input_ids: torch.Tensor,
        cells: torch.Tensor,
        image_token_id: int,
        visual_tokens: torch.Tensor | None = None,
        noise: float = 0.0,
    ) -> torch.Tensor:
        embeddings = self.language_model.get_input_embeddings()(input_ids)
        if not len(cells):
            return embeddings
        visual_tokens = self.cell_embedding(cells, noise) if visual_tokens is None else visual_tokens
        mask = (input_ids == image_token_id).unsqueeze(-1)
        return embeddings.masked_scatter(mask, visual_tokens.to(embeddings.dtype))

    def forward(
        self, batch: Batch, encoder: CellEncoder, visual_tokens: torch.Tensor | None = None, noise: float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits `(num_labels, vocab_size)` and the labels that they should predict.

        Args:
            batch: of sequences.
            encoder: that made the batch.
            visual_tokens: `(num_tokens, hidden_size)` for the image tokens; None for those of the cells.
            noise: of the cell embedding.
        """
        hidden_states = self.language_model.model(
            inputs_embeds=self.embed(batch.input_ids, batch.cells, encoder.image_token_id, visual_tokens, noise),
            position_ids=batch.position_ids,
            use_cache=False,
        ).last_hidden_state
        labels = batch.labels[:, 1:]
        wanted = labels != IGNORE_INDEX
        return self.language_model.lm_head(hidden_states[:, :-1][wanted]), labels[wanted]


def answer_loss(logits: torch.Tensor, labels: torch.Tensor, end_of_answer: int, first_weight: float) -> torch.Tensor:
    """Return the cross-entropy of answers; the first token of each, which tells whether its place was found, may count more.

    Args:
        logits: `(num_labels, vocab_size)`.
        labels: `(num_labels,)`, answer after answer.
        end_of_answer: the token that ends each answer.
        first_weight: of the first tokens, relative to the others.
    """
    is_first = torch.cat([labels.new_ones(1, dtype=torch.bool), labels[:-1] == end_of_answer])
    weights = 1 + (first_weight - 1) * is_first
    losses = nn.functional.cross_entropy(logits.float(), labels, reduction="none")
    return (weights * losses).sum() / weights.sum()


def freeze_cells(model: CellLanguageModel, encoder: CellEncoder) -> None:
    """Freeze what the tower imitates: the cell embedding with the embeddings of glyphs; those of words still learn."""
    model.cell_embedding.requires_grad_(False)
    embedding = model.language_model.get_input_embeddings().weight
    is_word = torch.ones(len(embedding), 1)
    is_word[list(encoder.glyphs.values())] = 0
    embedding.register_hook(lambda gradient: gradient * is_word)


def add_mixture_options(parser: argparse.ArgumentParser, **defaults: float) -> None:
    """Add the options that choose what a step learns from, with the stage's defaults."""
    parser.add_argument("--exercises", type=share, default=0.4, help="share of pages of random text")
    parser.add_argument(
        "--exercise-lines", type=int, default=4, help="most lines, or pairs of name and value, on them"
    )
    parser.add_argument("--densest", type=float, default=40, help="most columns on them; 10 at first, all after 70 %%")
    parser.add_argument("--lookups", type=share, default=0.5, help="share of them with questions for values")
    parser.add_argument("--understanding", type=share, default=0.4, help="share of these by names that a label means")
    parser.add_argument("--skip-blank", type=share, default=0.5, help="share of batches without blank visual tokens")
    parser.add_argument("--one-tile", type=share, default=0.0, help="share of pages in one tile, others in more")
    parser.add_argument("--max-num-tiles", type=int, default=2)
    parser.add_argument("--tilted", type=share, default=0.3, help="share of tilted documents")
    parser.add_argument("--jitter", type=float, default=0.03, help="of the places of characters, in visual tokens")
    parser.add_argument("--pairs", type=share, default=0.05, help="share of comparisons of two documents")
    parser.add_argument(
        "--transcriptions", type=share, default=0.65, help="share of questioned documents read out too"
    )
    parser.add_argument("--first-weight", type=float, default=1.0, help="of the first token of an answer in the loss")
    parser.set_defaults(**defaults)


def sample_lesson(seed: int, arguments: argparse.Namespace, densest: float) -> Lesson:
    """Return the training lesson of a seed: an exercise or a document, with most documents' transcription."""
    rng = random.Random(f"lesson {seed}")
    tiles = 1 if rng.random() < arguments.one_tile else arguments.max_num_tiles
    if rng.random() < arguments.exercises:
        num_lines = rng.randint(2, arguments.exercise_lines)
        columns = rng.randint(6, round(densest))
        make = copying
        if rng.random() < arguments.lookups:
            make = understanding if rng.random() < arguments.understanding else looking_up
        look = Look(narrowest=(2, 5), tilted=0.0, photographed=0.0)
        return set_lesson(make(seed, num_lines, columns), [seed], "train", look, tiles, arguments.jitter)
    conversation = training_conversation(seed, arguments.pairs, arguments.transcriptions)
    look = Look(tilted=arguments.tilted, photographed=arguments.tilted / 2)
    seeds = [2 * seed + index for index in range(len(conversation.documents))]
    return set_lesson(conversation, seeds, "train", look, tiles, arguments.jitter)


def heldout_lesson(seed: int, max_num_tiles: int, num_turns: int = 5) -> Lesson:
    """Return questions about a held-out document."""
    page = make_page(seed, "heldout", list(KINDS)[seed % len(KINDS)])
    return set_lesson(ask(seed, "heldout", page, num_turns), [seed], "heldout", Look(), max_num_tiles)


@torch.no_grad()
def measure(
    model: CellLanguageModel, encoder: CellEncoder, lessons: list[Lesson], skip_blank: bool
) -> dict[str, float]:
    """Return the teacher-forced accuracy on held-out lessons: of tokens, and of whole answers."""
    model.eval()
    score = Score(encoder.end[0])
    for start in range(0, len(lessons), 8):
        score.add(*model(encoder.lessons(lessons[start : start + 8], skip_blank), encoder))
    model.train()
    return score.shares


def main() -> None:
    parser = run_parser(__doc__, minutes=15, batch_size=16, muon_lr=0.02, adamw_lr=2e-3, threads=1)
    parser.add_argument("--start-from", type=Path, help="directory of an earlier run whose weights to begin with")
    add_mixture_options(parser)
    parser.add_argument("--noise", type=float, default=0.05, help="of visual tokens, relative to their deviation")
    parser.add_argument("--freeze-cells", action="store_true", help="keep what the tower imitates")
    parser.add_argument("--measure-every", type=float, default=3, help="minutes")
    arguments = parser.parse_args()
    prepare_torch(arguments.threads)
    torch.manual_seed(arguments.seed)
    fonts.require("train", "heldout")

    tokenizer = build_tokenizer()
    encoder = CellEncoder(tokenizer)
    model = CellLanguageModel(len(tokenizer))
    run = Run(arguments.output, arguments.minutes, time.process_time)
    if not run.resume(model):
        if arguments.start_from:
            load_weights(model, arguments.start_from / "model.safetensors", "language.")
        else:
            load_part(model, nano_weights(), "language.")
    if arguments.freeze_cells:
        freeze_cells(model, encoder)
    documents = [heldout_lesson(seed, arguments.max_num_tiles) for seed in range(42)]
    settings = argparse.Namespace(**vars(arguments) | {"exercises": 1.0, "one_tile": 1.0})
    exercises = [sample_lesson(10**8 + seed, settings, arguments.densest) for seed in range(40)]
    run.log({key: str(value) for key, value in vars(arguments).items()})
    train(model, encoder, run, arguments, documents, exercises)


def train(
    model: CellLanguageModel,
    encoder: CellEncoder,
    run: Run,
    arguments: argparse.Namespace,
    documents: list[Lesson],
    exercises: list[Lesson],
) -> None:
    """Train until the run's minutes are spent."""
    optimizers = build_optimizers(model, arguments)

    def shares() -> dict[str, float]:
        tokens = measure(model, encoder, exercises, skip_blank=True)["tokens"]
        return measure(model, encoder, documents, skip_blank=False) | {"exercise tokens": tokens}

    next_measure = run.state["minutes"] + arguments.measure_every
    pool: list[list[Lesson]] = []
    while run.progress < 1:
        if not pool:
            grown = 1.0 if arguments.start_from else min(1.0, run.progress / 0.7)
            densest = 10 + (arguments.densest - 10) * grown
            pool = sample_batches(run, arguments, densest)
        set_learning_rate(optimizers, run.progress, run.steps_since_start)
        skip_blank = random.Random(f"skip {run.state['step']}").random() < arguments.skip_blank
        with precision(arguments):
            logits, labels = model(encoder.lessons(pool.pop(), skip_blank), encoder, noise=arguments.noise)
        loss = answer_loss(logits, labels, encoder.end[0], arguments.first_weight)
        numbers = {"loss": loss.item(), "tokens": (logits.argmax(-1) == labels).float().mean().item()}
        gradient_step(model, loss, optimizers)
        run.record_step(model, numbers)
        if run.state["minutes"] > next_measure or run.progress >= 1:
            next_measure += arguments.measure_every
            run.log_measurement(shares)


def sample_batches(run: Run, arguments: argparse.Namespace, densest: float) -> list[list[Lesson]]:
    """Return the lessons of eight steps from this one, those of similar length together, in a random order."""
    first, size = run.first_seed(arguments), arguments.batch_size
    lessons = [sample_lesson(first + index, arguments, densest) for index in range(8 * size)]
    lessons.sort(key=lambda lesson: (sum(page.num_tokens for page in lesson.cells), length_of(lesson)))
    batches = [lessons[start : start + size] for start in range(0, len(lessons), size)]
    random.Random(run.state["step"]).shuffle(batches)
    return batches


def length_of(lesson: Lesson) -> int:
    """Return about how many tokens a lesson has without blank ones."""
    answers = sum(len(turn.answer) + 12 for turn in lesson.conversation.turns)
    return answers + sum(len(page.glyphs) for page in lesson.cells)


if __name__ == "__main__":
    main()
