"""transformers' Trainer with learning rates by part, batches of similar length, and a log of the loss.

A run's result depends on its seed and step alone, so that an interrupted run resumes exactly.
"""

import csv
import json
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback

PARTS = {"tower": "vision_model.", "projector": "mlp1.", "language": "language_model."}
# Conversations are shuffled, cut into pools of this many steps, and sorted by length within a pool.
BATCHES_PER_POOL = 50


def part_of(name: str) -> str:
    """Return the part of the model that a weight belongs to, with any prefix of wrappers before its name."""
    return next(part for part, prefix in PARTS.items() if prefix in name)


class LengthGroups(Sampler[int]):
    """A new order in every epoch, in which the conversations of a step are of similar length.

    Args:
        lengths: of the conversations.
        step_size: conversations in an optimiser step, all processes and accumulated batches together.
        seed: of the order; epoch and seed alone decide it.
    """

    def __init__(self, lengths: list[int], step_size: int, seed: int):
        self.lengths = lengths
        self.step_size = step_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(f"order {self.seed} {self.epoch}")
        shuffled = rng.sample(range(len(self.lengths)), len(self.lengths))
        pool_size = self.step_size * BATCHES_PER_POOL
        ordered: list[int] = []
        for start in range(0, len(shuffled), pool_size):
            ordered += sorted(shuffled[start : start + pool_size], key=self.lengths.__getitem__, reverse=True)
        steps = [ordered[start : start + self.step_size] for start in range(0, len(ordered), self.step_size)]
        rest = [steps.pop()] if len(ordered) % self.step_size else []  # an incomplete step stays the last
        rng.shuffle(steps)
        return (index for step in steps + rest for index in step)


class PartsTrainer(Trainer):
    """transformers' Trainer with learning rates by part and batches of similar length.

    Args:
        learning_rates: by part of `PARTS`; others have the arguments' `learning_rate`.
        lengths: tokens of each conversation; None shuffles without regard to length.
        kwargs: as for `Trainer`.
    """

    def __init__(self, *, learning_rates: dict[str, float], lengths: list[int] | None, **kwargs: Any):
        self.learning_rates = learning_rates
        self.sampler = None
        if lengths is not None:
            arguments = kwargs["args"]
            step_size = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
            self.sampler = LengthGroups(lengths, step_size, arguments.seed)
            # After a resumption Trainer does not reach the sampler through the loaders wrapped around it.
            kwargs["callbacks"] = [*kwargs.get("callbacks", []), EpochOf(self.sampler)]
        super().__init__(**kwargs)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler | None:
        return self.sampler or super()._get_train_sampler(*args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    groups.setdefault((part_of(name), parameter.ndim > 1), []).append(parameter)
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            options.pop("lr", None)
            self.optimizer = optimizer_class(
                [
                    {
                        "params": parameters,
                        "lr": self.learning_rates.get(part, self.args.learning_rate),
                        "weight_decay": self.args.weight_decay if is_matrix else 0.0,
                    }
                    for (part, is_matrix), parameters in groups.items()
                ],
                **options,
            )
        return self.optimizer


class EpochOf(TrainerCallback):
    """Sets the epoch of a sampler."""

    def __init__(self, sampler: LengthGroups):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.set_epoch(int(state.epoch or 0))


class StopOnSignal(TrainerCallback):
    """Ends training with a checkpoint after the step in which Ctrl-C (SIGINT) or SIGTERM came.

    Signals are caught inside a `with` block, in the main thread. All processes stop after the same step, even if the
    signal reached only one of them. A second Ctrl-C ends at once, without a checkpoint.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)
    SAME_PRESS_S = 1.0  # a launcher passes on the Ctrl-C that the terminal has already sent to its processes

    def __init__(self):
        self.signal = 0  # what came, 0 for nothing
        self.received_at = 0.0
        self.step = 0  # after which training stopped
        self.previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopOnSignal":
        if threading.current_thread() is threading.main_thread():  # Python allows no other to set handlers
            self.previous = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: Any) -> None:
        if self.signal and number == signal.SIGINT and time.monotonic() - self.received_at > self.SAME_PRESS_S:
            raise KeyboardInterrupt
        if not self.signal:
            self.signal, self.received_at = number, time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        if distributed.is_initialized():
            agreed = torch.tensor(self.signal, device=args.device)
            distributed.all_reduce(agreed, distributed.ReduceOp.MAX)
            self.signal = int(agreed)
        if self.signal and state.global_step < state.max_steps:
            self.step = state.global_step
            # The mean loss since the last row of the log is in no checkpoint, so it is logged now.
            control.should_log = control.should_save = control.should_training_stop = True


class LossLog(TrainerCallback):
    """Writes `loss.csv` during training and, with matplotlib, the plot `loss.png` at the end.

    The file is rewritten from the trainer's state each time, so that after a resumption no step is in it twice.
    """

    def __init__(self, directory: Path):
        self.path = directory / "loss.csv"

    def on_log(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            rows = [entry for entry in state.log_history if "loss" in entry]
            columns = ("step", "epoch", "loss", "learning_rate", "grad_norm")
            with self.path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, columns, extrasaction="ignore")
                writer.writeheader()
                writer.writerows(rows)

    def on_train_end(self, args, state, control, **kwargs):
        rows = [entry for entry in state.log_history if "loss" in entry]
        if state.is_world_process_zero and rows:
            draw_loss([(row["step"], row["loss"]) for row in rows], self.path.with_suffix(".png"))


def draw_loss(points: list[tuple[int, float]], path: Path) -> None:
    """Draw (step, loss) as a line; without matplotlib do nothing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    axes.plot(*zip(*points, strict=True))
    axes.set(xlabel="step", ylabel="loss")
    figure.savefig(path, bbox_inches="tight", dpi=120)


def last_whole_checkpoint(directory: Path) -> str | None:
    """Return the newest complete checkpoint; a run that was killed while saving leaves an incomplete one."""
    numbered = {path: path.name.rpartition("-")[2] for path in directory.glob("checkpoint-*")}
    for path in sorted((path for path in numbered if numbered[path].isdigit()), key=lambda p: -int(numbered[p])):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))  # written last
        except (OSError, ValueError):
            continue
        return str(path)
    return None
