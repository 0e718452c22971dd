"""Broken, foreign and hostile checkpoint files: one clear error, or the right weights; nothing in them is run."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nemotron_vl.modeling_nemotron_vl import Llama_Nemotron_Nano_VL
from nemotron_vl.processing_nemotron_vl import NemotronVLProcessor
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from tools import ROOT
from tools.adopt import main as adopt

INDEX = "model.safetensors.index.json"
IDS = torch.tensor([[256, 40, 41, 42]])


@pytest.fixture(scope="module")
def sharded(tiny_checkpoint, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    Llama_Nemotron_Nano_VL.from_pretrained(tiny_checkpoint).save_pretrained(folder, max_shard_size="200KB")
    return folder


@pytest.fixture
def source(sharded, tmp_path) -> Path:
    """A copy in three shards or so, to damage."""
    return shutil.copytree(sharded, tmp_path / "source")


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return Llama_Nemotron_Nano_VL.from_pretrained(folder).eval()(IDS).logits


def edit_index(folder: Path, change) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_truncated_weights_are_named_as_such(source, size):
    path = shards(source)[1]
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match="Download it again"):
        logits(source)


def test_a_git_lfs_pointer_is_no_safetensors_file(source):
    shards(source)[0].write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        logits(source)


def test_shards_with_swapped_names_give_the_same_model(source, sharded):
    first, second = shards(source)[:2]
    first.rename(source / "aside")
    second.rename(first)
    (source / "aside").rename(second)
    assert torch.equal(logits(source), logits(sharded))


def test_shards_of_another_model_are_refused(source):
    tensors = load_file(shards(source)[0])
    name = next(name for name in tensors if tensors[name].dim() == 2)
    tensors[name] = torch.zeros(tensors[name].shape[0] + 1, tensors[name].shape[1])
    save_file(tensors, shards(source)[0], metadata={"format": "pt"})
    with pytest.raises((RuntimeError, ValueError), match="(?s)size|mismatch"):
        logits(source)


def test_an_absent_shard_is_named(source):
    path = shards(source)[-1]
    path.unlink()
    with pytest.raises((OSError, ValueError), match=path.name):
        logits(source)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/outside.safetensors", "a\\b.safetensors", "..", "", 3, "weights.bin"]
)
def test_an_index_stays_in_its_directory(source, name):
    shutil.copy(shards(source)[0], source.parent / "outside.safetensors")
    edit_index(source, lambda weight_map: weight_map.update(dict.fromkeys(list(weight_map)[:1], name)))
    with pytest.raises(ValueError, match="lie beside it"):
        logits(source)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', ""])
def test_an_index_that_is_none_is_refused(source, text):
    (source / INDEX).write_text(text)
    with pytest.raises(ValueError):
        logits(source)


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("beside_safetensors", [False, True])
def test_pickles_are_never_opened(source, beside_safetensors):
    sprung = source.parent / "sprung"
    (source / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(sprung)))
    if beside_safetensors:
        assert torch.isfinite(logits(source)).all()
    else:
        for path in [*shards(source), source / INDEX]:
            path.unlink()
        with pytest.raises(OSError, match="safetensors"):
            logits(source)
    with pytest.raises(ValueError, match="pickle"):
        Llama_Nemotron_Nano_VL.from_pretrained(source, use_safetensors=False)
    assert not sprung.exists()


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("llm_config", "num_hidden_layers", 10**9),
        ("llm_config", "vocab_size", 10**12),
        ("llm_config", "hidden_size", -64),
        ("vision_config", "num_hidden_layers", 10**9),
        ("vision_config", "hidden_size", "32"),
        ("vision_config", "num_attention_heads", 0),
        ("vision_config", "max_image_size", 10**15),
        (None, "projector_hidden_size", 10**15),
        (None, "force_image_size", 2**40),
        (None, "max_sequence_length", -1),
        (None, "vision_batch_size", 0),
        (None, "downsample_ratio", 1e-320),
        (None, "torch_dtype", "../x.safetensors"),
        ("llm_config", "torch_dtype", "nn"),
        ("vision_config", "torch_dtype", 16),
    ],
)
def test_absurd_values_are_refused_before_anything_is_built(source, part, name, value):
    config = json.loads((source / "config.json").read_text())
    (config[part] if part else config)[name] = value
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=name):
        logits(source)


PARAMETERS = r"a model of \d{10,} parameters, but the weights beside it have only \d{6} bytes"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (None, PARAMETERS),
        ({"vocab_size": 1 << 24, "hidden_size": 1 << 14}, PARAMETERS),
        ({"num_hidden_layers": 1 << 20}, r"a model of 1048576 layers, but the files beside it hold only \d+ tensors"),
    ],
)
def test_a_config_far_larger_than_its_weights_is_refused_before_memory_is_taken(source, changes, reason, monkeypatch):
    config = json.loads((source / "config.json").read_text())
    if changes is None:  # nothing at all stands for the released 8B
        config = {"model_type": config["model_type"]}
    else:
        config["llm_config"] |= changes
    (source / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", None)  # would allocate what is missing
    with pytest.raises(ValueError, match=reason):
        logits(source)


@pytest.mark.parametrize(
    "text", ["", "{", "3", '"words"', "[]", "null", '{"vision_config": "words"}', '{"llm_config": 3}']
)
def test_a_config_that_is_none_is_refused(source, text):
    (source / "config.json").write_text(text)
    with pytest.raises((ValueError, TypeError, OSError)):
        logits(source)


@pytest.mark.parametrize("name", ["metadata", "weight_map"])
def test_an_index_without_its_parts_is_refused(source, name):
    index = json.loads((source / INDEX).read_text())
    del index[name]
    (source / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="metadata|lie beside it"):
        logits(source)


@pytest.mark.parametrize("file", ["tokenizer.json", "processor_config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("text", ["", "{", "3", '"words"', "[]", "null"])
def test_damaged_processor_files_are_refused(tiny_checkpoint, tmp_path, file, text):
    source = shutil.copytree(tiny_checkpoint, tmp_path / "source")
    if file == "preprocessor_config.json":  # the options that transformers 5 keeps inside win
        processor = json.loads((source / "processor_config.json").read_text())
        processor.pop("image_processor", None)
        (source / "processor_config.json").write_text(json.dumps(processor))
    (source / file).write_text(text)
    with pytest.raises((ValueError, TypeError, OSError)):
        NemotronVLProcessor.from_pretrained(source)


def test_a_tokenizer_that_its_library_cannot_read_is_refused(tiny_checkpoint, tmp_path):
    source = shutil.copytree(tiny_checkpoint, tmp_path / "source")
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    (source / "tokenizer.json").write_text(json.dumps({**tokenizer, "decoder": {"type": "Unknown"}}))
    with pytest.raises(OSError, match="no usable tokenizer.json"):
        NemotronVLProcessor.from_pretrained(source)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adopt_check_reports_weights_that_are_no_numbers(tiny_checkpoint, tmp_path, capsys, value, dtype):
    source = shutil.copytree(tiny_checkpoint, tmp_path / "source")
    weights = {name: tensor.to(dtype) for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    assert adopt([str(source), "--check"]) == 0
    weights["mlp1.1.weight"][3, 5] = value
    weights["mlp1.1.weight"][4, 5] = value
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    assert adopt([str(source), "--check"]) == 1
    assert "1 tensors hold numbers that are NaN or infinite: 2 of mlp1.1.weight" in capsys.readouterr().out


def test_loading_writes_nothing_beside_the_weights(source):
    before = {path.name: path.stat().st_mtime_ns for path in source.iterdir()}
    for path in [*source.iterdir(), source]:
        path.chmod(path.stat().st_mode & ~0o222)
    try:
        logits(source)
    finally:
        source.chmod(0o755)
    assert {path.name: path.stat().st_mtime_ns for path in source.iterdir()} == before


LOAD = """
import sys, torch
from transformers import AutoModel, AutoProcessor
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
print("ANSWER", model.chat(processor, None, "Hi", {"max_new_tokens": 4, "do_sample": False}).encode())
"""


def start(checkpoint: Path, modules: Path, **variables: str) -> subprocess.Popen:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_") and name != "HOME"}
    return subprocess.Popen(
        [sys.executable, "-c", LOAD, str(checkpoint)],
        env={**kept, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(modules), **variables},
        cwd=modules.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def answer_of(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return next(line for line in output.splitlines() if line.startswith("ANSWER"))


@pytest.mark.slow
def test_processes_may_load_one_directory_at_once_and_agree(tiny_checkpoint, tmp_path):
    # Different hash seeds: no order of a set may reach the answer.
    processes = [start(tiny_checkpoint, tmp_path / "modules", PYTHONHASHSEED=str(number)) for number in range(4)]
    assert len({answer_of(process) for process in processes}) == 1


@pytest.mark.slow
def test_no_home_directory_is_needed(tiny_checkpoint, tmp_path):
    # /proc/none cannot be made, by root neither. Only the copy of the code needs a place.
    assert answer_of(start(tiny_checkpoint, tmp_path / "modules", HOME="/proc/none")).startswith("ANSWER")


def test_the_shipped_code_reads_no_environment_and_no_home():
    """But for $CC, which names the compiler of two files, and the user's cache, which keeps what it compiled."""
    for path in {*ROOT.glob("*.py")} - {ROOT / "c_compiler.py", ROOT / "triton_kernels.py"}:
        text = path.read_text(encoding="utf-8")
        assert "environ" not in text and "expanduser" not in text and "getenv" not in text, path.name
