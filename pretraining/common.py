"""The parts that all stages of nano's training share: options, optimizers, a run on disk, several processes.

A stage started by `torchrun --nproc-per-node 2 -m pretraining.language ...` draws other conversations in each process
and averages the gradients. Two processes with one thread each are faster than one process with two threads.
"""

import argparse
import atexit
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import distributed, nn

from pretraining.muon import Muon

SAVE_EVERY_S = 120


def prepare_torch(num_threads: int) -> None:
    """Set the number of threads, treat denormal numbers as zero, and join the other processes of `torchrun`.

    The attention of a trained model is full of numbers near 1e-40, on which a processor is slow: with them the
    backward pass of attention takes six times as long, and a whole step twice as long.
    """
    torch.set_num_threads(num_threads)
    torch.set_flush_denormal(True)
    if "WORLD_SIZE" in os.environ and not distributed.is_initialized():
        distributed.init_process_group("gloo")
        atexit.register(distributed.destroy_process_group)  # else a process that exits first may be aborted


def rank() -> int:
    """Return the number of this process, 0 if it is the only one."""
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
    """Parse a number from 0 to 1 of a command line."""
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share: a number from 0 to 1 is needed")
    return float(text)


def run_parser(description: str, **defaults: float) -> argparse.ArgumentParser:
    """Return a parser with the options that all stages have, with the stage's defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory of the run; goes on where it stopped")
    parser.add_argument("--minutes", type=float, help="of the whole run, earlier starts included")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--muon-lr", type=float, help="learning rate of the matrices inside blocks")
    parser.add_argument("--adamw-lr", type=float, help="learning rate of all other weights")
    parser.add_argument(
        "--lr-decay", type=share, default=0.4, help="last share of the minutes, in which rates fall; 0: never"
    )
    parser.add_argument("--weight-decay", type=float, default=0.2, help="of Muon's matrices")
    parser.add_argument("--seed", type=int, default=0, help="of the conversations; two seeds share none")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--bfloat16", action="store_true", help="multiply in bfloat16, faster on a processor with AVX512-BF16 or AMX"
    )
    parser.set_defaults(**defaults)
    return parser


def precision(arguments: argparse.Namespace) -> torch.autocast:
    """Return the context in which a stage computes its outputs; weights and gradients stay in float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=arguments.bfloat16)


def build_optimizers(model: nn.Module, arguments: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of blocks, AdamW for embeddings, norms, biases and everything else.

    Every step of Muon has the same length, so without weight decay the matrices grow until attention saturates and
    learning stops.
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
        dtype = torch.bfloat16 if arguments.bfloat16 else torch.float32
        optimizers.append(Muon(matrices, arguments.muon_lr, weight_decay=arguments.weight_decay, dtype=dtype))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"], group["lr_decay"] = group["lr"], arguments.lr_decay
    return optimizers


def gradient_step(model: nn.Module, loss: torch.Tensor, optimizers: list[torch.optim.Optimizer]) -> None:
    """Take one optimizer step along the mean gradient of all processes."""
    loss.backward()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in trained:  # a batch without images skips the tower, but all processes must average the same weights
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
    average([weight.grad for weight in trained])
    nn.utils.clip_grad_norm_(trained, 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def set_learning_rate(optimizers: list[torch.optim.Optimizer], progress: float, steps_since_start: int) -> None:
    """Set learning rates: a warm-up of 50 steps after every start, then the peak, then the decay to a fiftieth."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            decay = min(1.0, max(0.02, (1 - progress) / group["lr_decay"])) if group["lr_decay"] else 1.0
            group["lr"] = group["peak_lr"] * min(1.0, (steps_since_start + 1) / 50) * decay


class Run:
    """A training run on disk: weights, the step, the minutes spent, and a log with one JSON object a line."""

    def __init__(self, directory: Path, minutes: float, clock: Callable[[], float] = time.monotonic):
        self.directory = directory
        self.minutes = minutes
        self.clock = clock  # `time.process_time` counts the processor's minutes, whatever else runs
        directory.mkdir(parents=True, exist_ok=True)
        state = directory / "state.json"
        self.state = json.loads(state.read_text()) if state.exists() else {"step": 0, "minutes": 0.0}
        self.saved_at = time.monotonic()
        self.started_at = clock()
        self.minutes_before = self.state["minutes"]
        self.steps_since_start = 0

    @property
    def progress(self) -> float:
        return min(1.0, self.state["minutes"] / self.minutes)

    def resume(self, model: nn.Module) -> bool:
        """Load the last saved weights into the model; return whether there are any."""
        path = self.directory / "model.safetensors"
        if path.exists():
            load_weights(model, path)
        return path.exists()

    def record_step(self, model: nn.Module, numbers: dict[str, float], log_every: int = 20) -> None:
        """Count a step; log every `log_every` steps and save every `SAVE_EVERY_S` seconds."""
        self.state["step"] += 1
        self.steps_since_start += 1
        minutes = torch.tensor([self.minutes_before + (self.clock() - self.started_at) / 60], dtype=torch.float64)
        average([minutes])  # the learning rate depends on it, so all processes need the same
        self.state["minutes"] = minutes.item()
        if self.state["step"] % log_every == 0:
            self.log({"step": self.state["step"], "minutes": round(self.state["minutes"], 2)} | numbers)
        if time.monotonic() - self.saved_at > SAVE_EVERY_S or self.progress >= 1:
            self.save(model)

    def log_measurement(self, measure: Callable[[], dict[str, float]]) -> None:
        """Log what `measure` returns; its time is none of training."""
        began = self.clock()
        self.log(
            {"step": self.state["step"], "minutes": round(self.state["minutes"], 2), "held out": True} | measure()
        )
        self.started_at += self.clock() - began

    def first_seed(self, arguments: argparse.Namespace) -> int:
        """Return the first seed of this step's conversations; steps, processes and `--seed`s share none."""
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
        """Write the weights, then the state that says they are complete, from the first process."""
        self.saved_at = time.monotonic()
        if rank():
            return
        temporary = self.directory / "model.safetensors.tmp"
        save_file(unique_weights(model), temporary)
        temporary.replace(self.directory / "model.safetensors")
        (self.directory / "state.json").write_text(json.dumps(self.state) + "\n")


class Score:
    """Teacher-forced accuracy: the share of right tokens, and the share of answers whose every token is right."""

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
    """Return the state dict without the second name of tied weights."""
    return {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}


def load_part(model: nn.Module, weights: dict[str, torch.Tensor], part: str = "", source: str = "nano/") -> None:
    """Load weights of this model, or of a larger one that holds it as its `part` ("language.", "tower.").

    Raises:
        ValueError: if a weight has no place in the model.
    """
    if part and any(name.startswith(part) for name in weights):
        weights = {name.removeprefix(part): weight for name, weight in weights.items() if name.startswith(part)}
    unexpected = model.load_state_dict(weights, strict=False).unexpected_keys
    if unexpected:
        raise ValueError(f"{source} holds weights this model lacks: {', '.join(unexpected[:5])}.")


def load_weights(model: nn.Module, path: Path, part: str = "") -> None:
    """Load the file of a run into a model, as `load_part` does."""
    load_part(model, load_file(path), part, str(path))
