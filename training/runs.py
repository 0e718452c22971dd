"""What every stage of nano's training shares: options, optimizers, a run on disk, several processes.

A stage started by `torchrun --nproc-per-node 2 -m training.perfect_cells ...` draws other lessons in each process and
averages the gradients. Processes on the cores of one machine learn faster than one process with as many threads.
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import distributed, nn

from training.muon import Muon

SAVE_EVERY_S = 120


def prepare_torch(num_threads: int) -> None:
    """Set the number of threads, count denormal numbers as zero, and join the other processes of `torchrun`.

    A trained model's attention is full of numbers near 1e-40, with which a processor is slow: the backward pass of
    attention takes six times as long, a whole step twice.
    """
    torch.set_num_threads(num_threads)
    torch.set_flush_denormal(True)
    if "WORLD_SIZE" in os.environ and not distributed.is_initialized():
        distributed.init_process_group("gloo")


def rank() -> int:
    """The number of this process, 0 when it is alone."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def average(tensors: list[torch.Tensor]) -> None:
    """Replace each tensor by its mean over all processes."""
    if distributed.is_initialized():
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        distributed.all_reduce(flat)
        flat /= distributed.get_world_size()
        for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))


def share(text: str) -> float:
    """A command line's number from 0 to 1."""
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share: a number from 0 to 1 is needed")
    return float(text)


def run_parser(description: str, **defaults: float) -> argparse.ArgumentParser:
    """The options that every stage of the training has, with the stage's defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory of the run; goes on where it stopped")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--muon-lr", type=float)
    parser.add_argument("--adamw-lr", type=float)
    parser.add_argument(
        "--fall", type=share, default=0.4, help="share of the minutes in which the rate falls; 0: never"
    )
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
            group["peak_lr"], group["fall"] = group["lr"], arguments.fall
    return optimizers


def learn(model: nn.Module, loss: torch.Tensor, optimizers: list[torch.optim.Optimizer]) -> None:
    """One step of gradient descent, down the mean gradient of all processes."""
    loss.backward()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in trained:  # a batch without pictures uses no eyes, but every process must average the same weights
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
    average([weight.grad for weight in trained])
    nn.utils.clip_grad_norm_(trained, 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def set_progress(optimizers: list[torch.optim.Optimizer], progress: float, steps_since_start: int) -> None:
    """Warm up over 50 steps (after every restart), keep the rate, let it fall as `--fall` says, to a fiftieth."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            falling = min(1.0, max(0.02, (1 - progress) / group["fall"])) if group["fall"] else 1.0
            group["lr"] = group["peak_lr"] * min(1.0, (steps_since_start + 1) / 50) * falling


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
        minutes = torch.tensor([self.minutes_before + (time.monotonic() - self.started_at) / 60], dtype=torch.float64)
        average([minutes])  # one clock for all, since the learning rate depends on it
        self.state["minutes"] = minutes.item()
        if self.state["step"] % log_every == 0:
            self.log({"step": self.state["step"], "minutes": round(self.state["minutes"], 2)} | numbers)
        if time.monotonic() - self.saved_at > SAVE_EVERY_S or self.progress >= 1:
            self.save(model)

    def first_seed(self, arguments: argparse.Namespace) -> int:
        """Where the lessons of this step begin; other steps, processes and `--seed`s have others."""
        return (arguments.seed * 10**7 + rank() * 10**6 + self.state["step"]) * arguments.batch_size

    def log(self, entry: dict) -> None:
        if rank():
            return
        line = json.dumps(
            {key: round(value, 4) if isinstance(value, float) else value for key, value in entry.items()}
        )
        with (self.directory / "log.jsonl").open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)

    def save(self, model: nn.Module) -> None:
        """Write weights first, then the state that says they are complete; the first process does."""
        self.saved_at = time.monotonic()
        if rank():
            return
        temporary = self.directory / "model.safetensors.tmp"
        save_file(unique_weights(model), temporary)
        temporary.replace(self.directory / "model.safetensors")
        (self.directory / "state.json").write_text(json.dumps(self.state) + "\n")


class Score:
    """Counts teacher-forced answers: how many tokens are right, and how many answers in every token."""

    def __init__(self, end_of_answer: int):
        self.end_of_answer = end_of_answer
        self.right_tokens = self.num_tokens = self.right_answers = self.num_answers = 0

    def add(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Count logits `(num_labels, vocab_size)` against the labels, answer after answer."""
        right = logits.argmax(-1) == labels
        self.right_tokens, self.num_tokens = self.right_tokens + right.sum().item(), self.num_tokens + len(right)
        start = 0
        for end in (labels == self.end_of_answer).nonzero().flatten().tolist():
            self.right_answers += right[start : end + 1].all().item()
            self.num_answers, start = self.num_answers + 1, end + 1

    @property
    def shares(self) -> dict[str, float]:
        return {"tokens": self.right_tokens / self.num_tokens, "answers": self.right_answers / self.num_answers}


def unique_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict without the second name of tied weights."""
    return {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}


def load_weights(model: nn.Module, path: Path, part: str = "") -> None:
    """Load what `unique_weights` wrote of this model, or of a larger one that has it as its `part` ("reader.", "eye.").

    Raises:
        ValueError: if a weight has no place in the model.
    """
    weights = load_file(path)
    if part and any(name.startswith(part) for name in weights):
        weights = {name.removeprefix(part): weight for name, weight in weights.items() if name.startswith(part)}
    unexpected = model.load_state_dict(weights, strict=False).unexpected_keys
    if unexpected:
        raise ValueError(f"{path} holds weights this model lacks: {', '.join(unexpected[:5])}.")
