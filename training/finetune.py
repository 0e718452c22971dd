"""Fine-tune a checkpoint on documents, from nano on a laptop to the 8B on many GPUs.

    python -m training.finetune training/recipes/nano.yaml
    python -m training.finetune training/recipes/lora-8b.yaml --set model=DIR data=my.jsonl trainer.max_steps=50
    accelerate launch --config_file training/recipes/launch/fsdp2.yaml \\
        -m training.finetune training/recipes/stage-2-instruction.yaml
    accelerate launch --config_file training/recipes/launch/deepspeed.yaml \\
        -m training.finetune training/recipes/stage-2-instruction.yaml

A recipe is a flat YAML file; its keys are the fields of `Recipe`, and everything under `trainer` goes to transformers'
`TrainingArguments`. Nothing is written before all of it is checked: options, packages, conversations and model. Ctrl-C
and SIGTERM save a checkpoint; an interrupted run resumes from its last one when the command is repeated.
The result in `output` loads through AutoModel; `loss.csv` lies beside it, `loss.png` if matplotlib is installed, and
logs for TensorBoard if that is. Adapters are merged into the result and also kept in `output/adapter`.
"""

import argparse
import json
import math
import os
import signal
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from torch.utils.data import ConcatDataset
from transformers import BitsAndBytesConfig, TrainingArguments, set_seed
from transformers.integrations import is_tensorboard_available

from tools.chat import load
from tools.threads import choose_threads
from training.conversations import Collator, JsonLines, Outline, lengths_of
from training.drawn_documents import DrawnDocuments
from training.trainer import PARTS, LossLog, PartsTrainer, StopOnSignal, last_whole_checkpoint, part_of

FIRST_REHEARSAL = 10**9  # a seed far from those of the documents that people draw for themselves
DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class Recipe:
    """The settings of a training run.

    Attributes:
        model: checkpoint directory, plain or quantised.
        output: directory of the result.
        data: JSON-lines file, or "documents" for drawn ones.
        num_documents: how many documents to draw for "documents".
        rehearsal: conversations about drawn documents to mix into those of a file, so that nano keeps what it can. The
            file's own are repeated until they are as many.
        train: the parts that learn, of "tower", "projector" and "language".
        learning_rates: by part; parts left out use the trainer's.
        lora: arguments of `peft.LoraConfig`; empty for full fine-tuning.
        dtype: of the weights in training. float32 keeps small updates, also with `trainer.bf16`, which computes in
            bfloat16. The result has the dtype of `model`.
        quantize: "nf4" keeps the frozen weights of the language model in 4 bits (bitsandbytes); needs `lora`.
        max_length: tokens of the longest conversation.
        max_num_tiles: tiles per image; None leaves the checkpoint's.
        group_by_length: put conversations of similar length into a step.
        max_shard_size: of the result's files.
        trainer: arguments of `TrainingArguments`.
    """

    model: str
    output: str
    data: str = "documents"
    num_documents: int = 1000
    rehearsal: int = 0
    train: list[str] = field(default_factory=lambda: list(PARTS))
    learning_rates: dict[str, float] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    quantize: str | None = None
    max_length: int = 16384
    max_num_tiles: int | None = None
    group_by_length: bool = True
    max_shard_size: str = "5GB"
    trainer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        unknown = {*self.train, *self.learning_rates} - set(PARTS)
        if unknown:
            raise ValueError(
                f"A model has the parts {', '.join(PARTS)}; the recipe names {', '.join(sorted(unknown))}."
            )
        if self.rehearsal and self.data == "documents":
            raise ValueError("`rehearsal` mixes drawn documents into the data of a file; leave it out with documents.")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is one of {', '.join(DTYPES)}, got {self.dtype!r}.")
        if self.quantize not in (None, "nf4"):
            raise ValueError(f"quantize is nf4 or nothing, got {self.quantize!r}.")
        if self.quantize and not self.lora:
            raise ValueError("Quantised weights cannot learn; add `lora` to the recipe, or leave `quantize` out.")


def read_recipe(path: Path, changes: list[str]) -> Recipe:
    """Read a recipe and apply `key=value` changes, values in YAML; `trainer.max_steps=3` reaches into a group.

    Raises:
        ValueError: for a file that is no YAML mapping, a change of another form, and unknown or missing keys.
    """
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold keys and values, as `model: nano`; it holds {settings!r:.80}.")
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise ValueError(f"A change reads KEY=VALUE, got {change!r}.")
        group, _, name = key.rpartition(".")
        target = settings.setdefault(group, {}) if group else settings
        target[name] = yaml.safe_load(value)
    check_keys(settings, Recipe, str(path))
    missing = {"model", "output"} - settings.keys()
    if missing:
        raise ValueError(f"{path} lacks {' and '.join(sorted(missing))}; add it, or --set it.")
    return Recipe(**settings)


def check_keys(settings: dict[str, Any], kind: type, name: str) -> None:
    """Refuse settings that are no fields of the dataclass `kind`.

    Raises:
        ValueError: with the unknown key, and the known one that resembles it.
    """
    known = [entry.name for entry in fields(kind) if entry.init]
    for key in settings:
        if key not in known:
            similar = get_close_matches(str(key), known, n=1)
            hint = f" Did you mean {similar[0]}?" if similar else ""
            raise ValueError(f"{name} has the unknown key {key}; it takes the fields of {kind.__name__}.{hint}")


def training_data(recipe: Recipe) -> tuple[ConcatDataset, list[Outline]]:
    """Return the conversations of a recipe and their outlines.

    Raises:
        ValueError: for a line of the file that cannot be trained on.
    """
    if recipe.data == "documents":
        parts: list[JsonLines | DrawnDocuments] = [DrawnDocuments(recipe.num_documents)]
    else:
        own = JsonLines(Path(recipe.data))
        parts = [own] * max(1, math.ceil(recipe.rehearsal / len(own)))
        if recipe.rehearsal:
            parts.append(DrawnDocuments(recipe.rehearsal, FIRST_REHEARSAL))
    outlines = {part: [part.outline(index) for index in range(len(part))] for part in parts}
    return ConcatDataset(parts), [outline for part in parts for outline in outlines[part]]


def load_for_training(recipe: Recipe) -> tuple[nn.Module, Any]:
    """Return the model, with frozen parts or adapters as the recipe says, and its processor."""
    options: dict[str, Any] = {"dtype": getattr(torch, recipe.dtype)}
    if recipe.quantize:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=recipe.quantize, bnb_4bit_compute_dtype=options["dtype"]
        )
    model, processor = load(Path(recipe.model), **options)
    if recipe.max_num_tiles is not None:
        processor.image_processor.max_num_tiles = recipe.max_num_tiles
    if recipe.lora:
        return add_adapters(model, recipe), processor
    if getattr(model.config, "quantization_config", None):
        raise ValueError(f"The weights of {recipe.model} are quantised and cannot learn; add `lora` to the recipe.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in recipe.train)
    return model, processor


def add_adapters(model: nn.Module, recipe: Recipe) -> nn.Module:
    """Freeze the model and give the linear layers of the parts that learn LoRA adapters."""
    from peft import get_peft_model

    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    wanted = [name for name in linear if not name.endswith("lm_head") and part_of(name) in recipe.train]
    return get_peft_model(model, adapter_config(recipe, target_modules=wanted))


def adapter_config(recipe: Recipe, **defaults: Any) -> Any:
    """Return the `peft.LoraConfig` of a recipe.

    Raises:
        ImportError: with the command that installs peft.
        ValueError: for an argument that LoRA does not have.
    """
    try:
        from peft import LoraConfig  # an optional package
    except ImportError as error:
        raise ImportError(f"LoRA adapters need peft: pip install peft. {error}") from error
    check_keys(recipe.lora, LoraConfig, "lora")
    return LoraConfig(**{**defaults, **recipe.lora})


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as it is written to `recipe.json`."""
    return json.loads(json.dumps(asdict(recipe)))


def check_output(recipe: Recipe) -> None:
    """Refuse to mix a run into that of another recipe.

    Raises:
        ValueError: if `output` holds a checkpoint or a result of another recipe.
    """
    output = Path(recipe.output)
    path, settings = output / "recipe.json", settings_of(recipe)
    if path.exists() and (last_whole_checkpoint(output / "checkpoints") or (output / "config.json").exists()):
        other = json.loads(path.read_text(encoding="utf-8"))
        changed = [key for key in settings if settings[key] != other.get(key) and key != "output"]
        if changed:
            raise ValueError(
                f"{output} holds a run by another recipe; different are {', '.join(changed)}. Go on with its own "
                f"recipe ({path}), or choose another output."
            )


def claim(recipe: Recipe) -> None:
    """Write the recipe into `output`, so that the run can be resumed and understood."""
    path = Path(recipe.output) / "recipe.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    own = path.with_suffix(f".{os.getpid()}")
    own.write_text(json.dumps(settings_of(recipe), indent=1) + "\n", encoding="utf-8")
    own.replace(path)


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """Return the arguments of the trainer.

    Raises:
        ValueError: for one that the trainer does not have, or that this machine cannot do, as bf16.
    """
    check_keys(recipe.trainer, TrainingArguments, "trainer")
    options: dict[str, Any] = {"report_to": ["tensorboard"] if is_tensorboard_available() else []}
    if recipe.trainer.get("gradient_checkpointing"):  # reentrant checkpointing skips blocks with frozen inputs
        options["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    options |= {"output_dir": str(Path(recipe.output) / "checkpoints"), "remove_unused_columns": False}
    return TrainingArguments(**{**options, **recipe.trainer})


def finetune(recipe: Recipe) -> Path:
    """Train by a recipe, from where an earlier run of it stopped, and return the directory of the result.

    Raises:
        KeyboardInterrupt: after a Ctrl-C, which saves a checkpoint.
        SystemExit: after a SIGTERM, which does the same; the status is 143, as shells count.
    """
    output = Path(recipe.output)
    check_output(recipe)
    arguments = training_arguments(recipe)
    if recipe.lora:
        adapter_config(recipe)
    dataset, outlines = training_data(recipe)
    set_seed(arguments.seed)  # all processes initialise the adapters alike
    model, processor = load_for_training(recipe)
    lengths = lengths_of(outlines, processor, recipe.max_length)
    stop = StopOnSignal()
    trainer = PartsTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=Collator(
            processor, recipe.max_length, always_images=any(outline.image_sizes for outline in outlines)
        ),
        callbacks=[LossLog(output), stop],
        learning_rates=recipe.learning_rates,
        lengths=lengths if recipe.group_by_length else None,
    )
    claim(recipe)
    choose_threads(model)  # after the trainer has moved it to its device
    checkpoint = last_whole_checkpoint(Path(arguments.output_dir))
    is_first = trainer.is_world_process_zero()
    if checkpoint and is_first:
        print(f"Going on from {checkpoint}.", flush=True)
    with stop:
        trainer.train(resume_from_checkpoint=checkpoint)
    if stop.step:
        if is_first:
            print(
                f"Stopped at step {stop.step} of {trainer.state.max_steps} with a checkpoint in {arguments.output_dir}; "
                "the same command goes on from there.",
                flush=True,
            )
        raise KeyboardInterrupt if stop.signal == signal.SIGINT else SystemExit(128 + stop.signal)
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if is_first:
        if recipe.lora:
            trainer.accelerator.unwrap_model(trainer.model_wrapped).save_pretrained(
                output / "adapter", state_dict=state
            )
        save_result(recipe, state, processor)
    trainer.accelerator.wait_for_everyone()
    return output


def save_result(recipe: Recipe, state: dict[str, torch.Tensor], processor: Any) -> None:
    """Put the trained weights into the checkpoint that training began with, and write it to `output`."""
    model, _ = load(Path(recipe.model), dequantize=True)
    if recipe.lora:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, Path(recipe.output) / "adapter").merge_and_unload()
    else:
        model.load_state_dict(state)
    model.save_pretrained(recipe.output, max_shard_size=recipe.max_shard_size)
    processor.save_pretrained(recipe.output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="change the recipe")
    arguments = parser.parse_args()
    print(f"Saved to {finetune(read_recipe(arguments.recipe, arguments.set))}")


if __name__ == "__main__":
    main()
