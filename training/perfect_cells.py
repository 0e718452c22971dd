"""Stage 1: teach nano's language model to read pages that a perfect eye has seen.

    python -m training.perfect_cells --output runs/cells --minutes 60

There is no picture and no tower: each visual token is the glyph it should hold (the language model's own embedding of
it, through one matrix) plus a position. Copying and looking up are the slow things to learn, and this way they cost no
vision. A run that was stopped goes on from its last save when the command is given again.
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM

from training.batches import IGNORE, TOKENS_PER_TILE, Batch, Encoder, exercise, lesson, lessons_by_length
from training.documents import KINDS, document
from training.muon import Muon
from training.nano import language_config, load_tokenizer
from training.questions import Conversation, ask

SAVE_EVERY_S = 120


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


def prepare_torch(num_threads: int) -> None:
    """Set the number of threads, and count denormal numbers as zero.

    A trained model's attention is full of numbers near 1e-40, with which a processor is slow: the backward pass of
    attention takes six times as long, a whole step twice.
    """
    torch.set_num_threads(num_threads)
    torch.set_flush_denormal(True)


def cells_of(batch: Batch, encoder: Encoder) -> torch.Tensor:
    """Glyph and position of all visual tokens of a batch, `(num_tokens, 2)`."""
    return torch.tensor([cell for page in batch.pages for cell in encoder.cells(page)])


def run_parser(description: str, **defaults: float) -> argparse.ArgumentParser:
    """The options that every stage of the training has, with the stage's defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory of the run; goes on where it stopped")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--muon-lr", type=float)
    parser.add_argument("--adamw-lr", type=float)
    parser.add_argument("--weight-decay", type=float, default=0.2, help="of Muon's matrices")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the lessons; what a run has seen, another seed has not"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.set_defaults(**defaults)
    return parser


def build_optimizers(model: nn.Module, arguments: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of blocks, AdamW for embeddings, norms, biases and everything else.

    Every step of Muon has the same length, so without decay the matrices grow with every minute, and attention with them
    into saturation, where nothing more is learned.
    """
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            inside = ("layers." in name or "blocks." in name) and parameter.ndim == 2
            (matrices if inside else others).append(parameter)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=arguments.adamw_lr, betas=(0.9, 0.98), weight_decay=0.0)
    ]
    if matrices:
        optimizers.append(Muon(matrices, lr=arguments.muon_lr, weight_decay=arguments.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def learn(model: nn.Module, loss: torch.Tensor, optimizers: list[torch.optim.Optimizer]) -> None:
    """One step of gradient descent."""
    loss.backward()
    nn.utils.clip_grad_norm_([weight for weight in model.parameters() if weight.grad is not None], 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def set_progress(optimizers: list[torch.optim.Optimizer], progress: float, steps_since_start: int) -> None:
    """Warm up over 50 steps (after every restart), keep the rate, let it fall to zero over the last 40 %."""
    factor = min(1.0, (steps_since_start + 1) / 50) * min(1.0, max(0.02, (1 - progress) / 0.4))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor


class Run:
    """A training run on disk: weights, the step, the minutes spent, and a log with one JSON object a line."""

    def __init__(self, directory: Path, minutes: float):
        self.directory = directory
        self.minutes = minutes
        directory.mkdir(parents=True, exist_ok=True)
        state = directory / "state.json"
        self.state = json.loads(state.read_text()) if state.exists() else {"step": 0, "minutes": 0.0}
        self.started_at = self.saved_at = time.monotonic()
        self.minutes_before = self.state["minutes"]
        self.steps_since_start = 0

    @property
    def progress(self) -> float:
        return min(1.0, self.state["minutes"] / self.minutes)

    def resume(self, model: nn.Module) -> bool:
        """Load the last save into the model; False when there is none."""
        path = self.directory / "model.safetensors"
        if path.exists():
            load_weights(model, path)
        return path.exists()

    def tick(self, model: nn.Module, numbers: dict[str, float], log_every: int = 20) -> None:
        """Count a step; log and save when it is time."""
        self.state["step"] += 1
        self.steps_since_start += 1
        self.state["minutes"] = self.minutes_before + (time.monotonic() - self.started_at) / 60
        if self.state["step"] % log_every == 0:
            self.log({"step": self.state["step"], "minutes": round(self.state["minutes"], 2)} | numbers)
        if time.monotonic() - self.saved_at > SAVE_EVERY_S or self.progress >= 1:
            self.save(model)

    def log(self, entry: dict) -> None:
        line = json.dumps(
            {key: round(value, 4) if isinstance(value, float) else value for key, value in entry.items()}
        )
        with (self.directory / "log.jsonl").open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)

    def save(self, model: nn.Module) -> None:
        """Write weights first, then the state that says they are complete."""
        temporary = self.directory / "model.safetensors.tmp"
        save_file(unique_weights(model), temporary)
        temporary.replace(self.directory / "model.safetensors")
        (self.directory / "state.json").write_text(json.dumps(self.state) + "\n")
        self.saved_at = time.monotonic()


def unique_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict without the second name of tied weights."""
    return {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}


def load_weights(model: nn.Module, path: Path) -> None:
    """Load what `unique_weights` wrote.

    Raises:
        ValueError: if a weight has no place in the model.
    """
    unexpected = model.load_state_dict(load_file(path), strict=False).unexpected_keys
    if unexpected:
        raise ValueError(f"{path} holds weights this model lacks: {', '.join(unexpected[:5])}.")


@torch.no_grad()
def measure(model: Reader, encoder: Encoder, batches: list[Batch]) -> dict[str, float]:
    """Teacher-forced accuracy on held-out batches: share of tokens, and share of answers right in every token."""
    right_tokens = num_tokens = right_answers = num_answers = 0
    for batch in batches:
        logits, labels = model(batch, encoder)
        right = logits.argmax(-1) == labels
        right_tokens, num_tokens = right_tokens + right.sum().item(), num_tokens + len(right)
        ends = (labels == encoder.end[0]).nonzero().flatten().tolist()
        start = 0
        for end in ends:
            right_answers += right[start : end + 1].all().item()
            start = end + 1
        num_answers += len(ends)
    return {"tokens": right_tokens / num_tokens, "answers": right_answers / num_answers}


def main() -> None:
    parser = run_parser(__doc__, minutes=60, batch_size=12, muon_lr=0.02, adamw_lr=2e-3)
    parser.add_argument("--start-from", type=Path, help="directory of an earlier run whose weights to begin with")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), help="kinds of documents")
    parser.add_argument("--skip-blank-rows", action="store_true", help="shorter sequences, for the first lessons")
    parser.add_argument("--noise", type=float, default=0.0, help="of the cells, relative to their deviation")
    parser.add_argument("--freeze-cells", action="store_true", help="keep the cells as stage 2 imitates them")
    parser.add_argument("--exercises", type=float, default=0.0, help="share of pages of random characters")
    parser.add_argument("--exercise-lines", type=int, default=4)
    parser.add_argument("--look-ups", type=float, default=0.0, help="share of exercises that ask for values")
    parser.add_argument("--long", type=float, default=0.0, help="share of documents of two tiles")
    parser.add_argument("--pairs", type=float, default=0.0, help="share of comparisons of two documents")
    arguments = parser.parse_args()
    prepare_torch(arguments.threads)
    torch.manual_seed(arguments.seed)

    tokenizer = load_tokenizer()
    encoder = Encoder(tokenizer, arguments.skip_blank_rows)
    model = Reader(len(tokenizer))
    run = Run(arguments.output, arguments.minutes)
    if not run.resume(model) and arguments.start_from:
        load_weights(model, arguments.start_from / "model.safetensors")
    if arguments.freeze_cells:
        model.cells.requires_grad_(False)
        model.language_model.get_input_embeddings().requires_grad_(False)
    optimizers = build_optimizers(model, arguments)
    exam = [
        encoder.batch([held_out_lesson(10 * batch + index, tuple(arguments.kinds)) for index in range(10)])
        for batch in range(6)
    ]

    pool: list[Batch] = []
    while run.progress < 1:
        if not pool:
            first = (arguments.seed * 10**7 + run.state["step"]) * arguments.batch_size
            drawn = [draw_lesson(first + index, arguments) for index in range(arguments.batch_size * 8)]
            pool = lessons_by_length(encoder, drawn, arguments.batch_size)
            random.Random(first).shuffle(pool)
        set_progress(optimizers, run.progress, run.steps_since_start)
        logits, labels = model(pool.pop(), encoder, noise=arguments.noise)
        loss = nn.functional.cross_entropy(logits, labels)
        learn(model, loss, optimizers)
        run.tick(model, {"loss": loss.item(), "tokens": (logits.argmax(-1) == labels).float().mean().item()})
        if run.state["step"] % 200 == 0 or run.progress >= 1:
            run.log({"step": run.state["step"], "held out": True} | measure(model, encoder, exam))


def draw_lesson(seed: int, arguments: argparse.Namespace) -> Conversation:
    """An exercise in copying, or a lesson about a document."""
    if random.Random(seed).random() < arguments.exercises:
        return exercise(seed, arguments.exercise_lines, arguments.look_ups)
    return lesson(seed, tuple(arguments.kinds), arguments.long, arguments.pairs)


def held_out_lesson(seed: int, kinds: tuple[str, ...]) -> Conversation:
    """Five questions about a held-out page."""
    return ask(seed, "heldout", document(seed, "heldout", kinds[seed % len(kinds)]), 5)


if __name__ == "__main__":
    main()
