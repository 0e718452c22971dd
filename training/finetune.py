"""Fine-tune a checkpoint on documents, from nano on a laptop to the 8B on many GPUs.

    python -m training.finetune training/recipes/nano.yaml
    python -m training.finetune training/recipes/lora-8b.yaml --set model=DIR data=my.jsonl
    accelerate launch --num_processes 8 --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP \\
        -m training.finetune training/recipes/stage-2-instruction.yaml

A recipe is a flat YAML file; its keys are the fields of `Recipe`, and everything under `trainer` goes to transformers'
`TrainingArguments`. A run that was stopped goes on from its last checkpoint. The result in `output` loads through
AutoModel; `loss.csv` (and `loss.png`, with matplotlib) lie beside it.
"""

import argparse
import csv
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from tools.chat import load
from training.conversations import Collator, DrawnDocuments, JsonLines

PARTS = {"tower": "vision_model.", "projector": "mlp1.", "language": "language_model."}


@dataclass
class Recipe:
    """What to train on what.

    Attributes:
        model: checkpoint directory.
        output: directory of the result.
        data: JSON-lines file, or "documents" for drawn ones.
        num_documents: how many documents to draw.
        train: the parts that learn, of "tower", "projector" and "language".
        learning_rates: by part; parts left out use the trainer's.
        lora: arguments of `peft.LoraConfig`; empty for full fine-tuning.
        max_length: tokens of the longest conversation.
        max_num_tiles: tiles per picture; None leaves the checkpoint's.
        trainer: arguments of `TrainingArguments`.
    """

    model: str
    output: str
    data: str = "documents"
    num_documents: int = 1000
    train: list[str] = field(default_factory=lambda: list(PARTS))
    learning_rates: dict[str, float] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    max_length: int = 16384
    max_num_tiles: int | None = None
    trainer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        unknown = {*self.train, *self.learning_rates} - set(PARTS)
        if unknown:
            raise ValueError(
                f"A model has the parts {', '.join(PARTS)}; the recipe names {', '.join(sorted(unknown))}."
            )


def read_recipe(path: Path, changes: list[str]) -> Recipe:
    """Read a recipe and apply `key=value` changes, values in YAML."""
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    settings.update({key: yaml.safe_load(value) for key, value in (change.split("=", 1) for change in changes)})
    unknown = settings.keys() - {entry.name for entry in fields(Recipe)}
    if unknown:
        raise ValueError(f"{path} has unknown keys: {', '.join(sorted(unknown))}.")
    return Recipe(**settings)


def part_of(name: str) -> str:
    """The part of the model that a weight belongs to, whatever wraps the model."""
    return next(part for part, prefix in PARTS.items() if prefix in name)


def prepare(model: nn.Module, recipe: Recipe) -> nn.Module:
    """Freeze what does not learn, or add LoRA adapters to what does."""
    if not recipe.lora:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(part_of(name) in recipe.train)
        return model
    from peft import LoraConfig, get_peft_model  # an optional package

    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    wanted = [name for name in linear if not name.endswith("lm_head") and part_of(name) in recipe.train]
    return get_peft_model(model, LoraConfig(**{"target_modules": wanted, **recipe.lora}))


class PartsTrainer(Trainer):
    """transformers' Trainer with a learning rate for each part of the model."""

    learning_rates: dict[str, float] = {}

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        if self.optimizer is None:
            groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    groups.setdefault((part_of(name), parameter.ndim > 1), []).append(parameter)
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
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


class LossLog(TrainerCallback):
    """Writes `loss.csv` as training goes on, and a picture of it at the end."""

    def __init__(self, directory: Path):
        self.path = directory / "loss.csv"

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs and "loss" in logs:
            is_new = not self.path.exists()
            with self.path.open("a", newline="") as file:
                writer = csv.writer(file)
                if is_new:
                    writer.writerow(("step", "loss", "learning_rate"))
                writer.writerow((state.global_step, logs["loss"], logs.get("learning_rate")))

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero and self.path.exists():
            draw_loss(self.path)


def draw_loss(path: Path) -> None:
    """Draw the loss of a CSV log beside it; without matplotlib do nothing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    axes.plot([int(row["step"]) for row in rows], [float(row["loss"]) for row in rows])
    axes.set(xlabel="step", ylabel="loss")
    figure.savefig(path.with_suffix(".png"), bbox_inches="tight")


def finetune(recipe: Recipe) -> Path:
    """Train by a recipe and return the directory of the result."""
    output = Path(recipe.output)
    output.mkdir(parents=True, exist_ok=True)
    model, processor = load(Path(recipe.model))
    if recipe.max_num_tiles is not None:
        processor.image_processor.max_num_tiles = recipe.max_num_tiles
    is_drawn = recipe.data == "documents"
    dataset = DrawnDocuments(recipe.num_documents) if is_drawn else JsonLines(Path(recipe.data))
    arguments = TrainingArguments(
        output_dir=str(output / "checkpoints"), remove_unused_columns=False, report_to=[], **recipe.trainer
    )
    trainer = PartsTrainer(
        model=prepare(model, recipe),
        args=arguments,
        train_dataset=dataset,
        data_collator=Collator(processor, recipe.max_length),
        callbacks=[LossLog(output)],
    )
    trainer.learning_rates = recipe.learning_rates
    last = get_last_checkpoint(arguments.output_dir) if Path(arguments.output_dir).exists() else None
    trainer.train(resume_from_checkpoint=last)
    trainer.save_model(str(output))
    if trainer.is_world_process_zero():
        processor.save_pretrained(output)
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="change the recipe")
    arguments = parser.parse_args()
    print(f"Saved to {finetune(read_recipe(arguments.recipe, arguments.set))}")


if __name__ == "__main__":
    main()
