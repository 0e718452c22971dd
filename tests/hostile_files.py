"""Hostile checkpoint directories, and what must hold for each; see hostile.py for the idea and for `Source`.

A directory is a tiny checkpoint with a list of damages: bytes changed or cut, files removed, swapped or added, values
of a JSON file replaced. Loading gives a model that computes, or one of the documented errors; `tools.adopt` always
gives a report; and no code is run that lies in the directory.
"""

import json
import os
import pickle
import shutil
import tempfile
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from nemotron_vl.modeling_nemotron_vl import Llama_Nemotron_Nano_VL
from nemotron_vl.processing_nemotron_vl import NemotronVLProcessor

from tests.hostile import REFUSALS, Source, json_value
from tools import adopt
from tools.tiny_checkpoint import make_tiny_checkpoint

# OSError: absent files; StrictDataclassError: what transformers 5 says about llm_config.
FILE_REFUSALS = (*REFUSALS, OSError, StrictDataclassError)
INDEX = "model.safetensors.index.json"
JSON_FILES = [
    "config.json",
    "config.json",
    INDEX,
    INDEX,
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
]
SHARDS = [f"model-0000{number}-of-00004.safetensors" for number in range(1, 5)]
ADDED_FILES = [
    "pytorch_model.bin",
    "model.bin",
    "special_tokens_map.json",
    "chat_template.json",
    "evil.py",
    "a b.json",
]
EVIL = {
    **dict.fromkeys(("AutoConfig", "AutoModel", "AutoImageProcessor", "AutoProcessor"), "evil.Evil"),
    "AutoTokenizer": ["evil.Evil", "evil.Evil"],
}
SPRUNG = Path(tempfile.gettempdir()) / f"nemotron-vl-trap-{os.getpid()}"  # the traps make this file


class Trap:
    """Makes the file SPRUNG when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (SPRUNG,)


@lru_cache(maxsize=1)
def honest_checkpoint() -> tempfile.TemporaryDirectory:
    """A tiny checkpoint in four shards, and code that nobody may run; kept for as long as the process."""
    held = tempfile.TemporaryDirectory(prefix="nemotron-vl-fuzz-")
    folder = Path(held.name)
    make_tiny_checkpoint(folder)
    model = Llama_Nemotron_Nano_VL.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="200KB")
    (folder / "evil.py").write_text(f"open({str(SPRUNG)!r}, 'w').close()\nclass Evil: pass\n")
    return held


def json_damage(source: Source) -> tuple[Any, ...]:
    """Replace what some steps into a JSON file lead to; a step is a number, taken modulo the number of entries."""
    numbers = (0, -1, 1, 3, 10**6, 10**12, 10**30, 0.5, float("nan"), float("inf"))
    words = ("", "..", "../x.safetensors", "pytorch_model.bin", "model-00001-of-00004.safetensors", "<image>", "llama")
    odd = source.pick(json_value(source), source.pick(*numbers), source.pick(*words), {"auto_map": EVIL}, EVIL)
    steps = [source.integer(0, 60) for _ in range(source.integer(0, 4))]
    return "json", source.pick(*JSON_FILES), steps, odd


def byte_damage(source: Source) -> tuple[Any, ...]:
    """Change a byte near the start, where the headers are, or anywhere."""
    return "byte", source.pick(*SHARDS, *JSON_FILES), source.integer(0, source.pick(40, 400, 200_000)), source.data(1)


def cut_damage(source: Source) -> tuple[Any, ...]:
    return "cut", source.pick(*SHARDS, *JSON_FILES), source.integer(0, source.pick(20, 2000, 200_000))


def place_damage(source: Source) -> tuple[Any, ...]:
    files = (*SHARDS, *JSON_FILES, "chat_template.jinja")
    return source.pick(
        ("remove", source.pick(*files)),
        ("swap", source.pick(*SHARDS), source.pick(*SHARDS)),
        ("copy", source.pick(*SHARDS), "model.safetensors"),
        ("add", source.pick(*ADDED_FILES), source.pick(b"", b"{}", source.data(20), pickle.dumps(Trap()))),
        ("add", "chat_template.jinja", source.pick(b"{% bad", b"\xff", b"{{ x.y.z }}", b"{{ ''.__class__ }}")),
    )


def damages(source: Source) -> list[tuple[Any, ...]]:
    makers = (json_damage, json_damage, byte_damage, cut_damage, place_damage)
    return [source.call(*makers) for _ in range(source.integer(1, 3))]


def replace_inside(value: Any, steps: list[int], new: Any) -> Any:
    """Return `value` with what `steps` lead to replaced by `new`."""
    if not steps or not isinstance(value, (dict, list)) or not value:
        return new
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = keys[steps[0] % len(keys)]
    value[key] = replace_inside(value[key], steps[1:], new)
    return value


def damage(folder: Path, kind: str, name: str, *details: Any) -> None:
    """Damage one file; the files are links to those of the honest checkpoint, and are replaced, not written to."""
    path = folder / name
    data = path.read_bytes() if path.exists() else b""
    path.unlink(missing_ok=True)
    if kind == "json":
        try:
            data = json.dumps(replace_inside(json.loads(data), *details), default=str).encode()
        except ValueError:  # an earlier damage left no JSON
            data = b"{}"
    elif kind == "byte":
        place, byte = details
        data = data[:place] + byte + data[place + 1 :]
    elif kind == "cut":
        data = data[: details[0]]
    elif kind == "add":
        data = details[0]
    elif kind in ("swap", "copy"):
        other = folder / details[0]
        kept = other.read_bytes() if other.exists() else b""
        other.unlink(missing_ok=True)
        other.write_bytes(data)
        data = kept if kind == "swap" else data
    if kind != "remove":
        path.write_bytes(data)


def loaded(load: Callable[[Path], Any], folder: Path) -> Any | None:
    try:
        return load(folder)
    except FILE_REFUSALS:
        return None
    except RuntimeError as error:  # what transformers says about tensors of other sizes
        if "mismatch" not in str(error):
            raise
        return None


def check_files(damages: list[tuple[Any, ...]]) -> str:
    """Load a damaged directory by our own classes and inspect it with `tools.adopt`."""
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(name, "checkpoint")
        shutil.copytree(honest_checkpoint().name, folder, copy_function=os.link)
        for one in damages:
            damage(folder, *one)
        report = adopt.inspect(folder).report()
        assert ("PROBLEM" in report) != ("Every tensor fits the model." in report)
        processor = loaded(NemotronVLProcessor.from_pretrained, folder)
        model = loaded(Llama_Nemotron_Nano_VL.from_pretrained, folder)
        assert not SPRUNG.exists()
        if model is None or processor is None:
            return "refused"
        with torch.no_grad():
            assert model(input_ids=torch.tensor([[3, 4, 5]])).logits.shape[:2] == (1, 3)
    return "accepted"
