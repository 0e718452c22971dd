"""Make the flat root importable (see `tools`), keep transformers offline, and lend the tests checkpoints."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="hf_modules_")

from tools import ROOT  # noqa: E402

# A folder with sets of stored outputs of the published code; tests/golden/README.md says what is in them.
GOLDEN = Path(os.environ.get("NEMOTRON_VL_GOLDEN") or ROOT / "tests" / "golden").resolve()
if not GOLDEN.is_dir():
    raise pytest.UsageError(f"NEMOTRON_VL_GOLDEN={GOLDEN} is no folder")


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, whatever its files are called."""
    weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    return weights


def read_golden_cases(folder: Path) -> dict[str, dict[str, Any]]:
    """The cases of a golden set by their names."""
    return {case["name"]: case for case in json.loads((folder / "expected.json").read_text())["cases"]}


def golden_parameters(name: str, find: Callable[[Path], Iterable[str]]) -> list:
    """What `find` finds in the golden set `name`, to parametrise a test by; where it finds nothing, the test skips."""
    folder = GOLDEN / name
    found = list(find(folder)) if folder.is_dir() else []
    reason = f"{GOLDEN} (NEMOTRON_VL_GOLDEN) has no such outputs in {name}"
    return found or [pytest.param(None, id="absent", marks=pytest.mark.skip(reason=reason))]


def golden_cases(name: str) -> list:
    """The names of the cases of a golden set, to parametrise a test by."""
    return golden_parameters(name, read_golden_cases)


def golden_formats() -> list:
    """The formats of the quantised checkpoints of the 8B V1, to parametrise a test by."""
    return golden_parameters(
        "8b-v1", lambda folder: sorted(file.name.removeprefix("checkpoint_") for file in folder.glob("checkpoint_*"))
    )


def golden_inputs(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """The `input_ids` of a golden case and, if it has images, their `pixel_values`, made here where none are stored."""
    from nemotron_vl.image_processing import NemotronVLImageProcessor

    stored, case = load_file(folder / "expected.safetensors"), read_golden_cases(folder)[name]
    inputs = {"input_ids": stored[f"{name}.input_ids"]}
    if f"{name}.pixel_values" in stored:
        inputs["pixel_values"] = stored[f"{name}.pixel_values"]
    elif case.get("images"):
        image_processor = NemotronVLImageProcessor.from_pretrained(folder / "checkpoint")
        inputs |= image_processor([Image.open(folder / file) for file in case["images"]])
        del inputs["num_patches"]
    elif f"{name}.image_features" in stored:
        pytest.skip(f"the golden case {name} has neither pixel_values nor images")
    return inputs


def complete_golden(name: str, out: Path) -> Path:
    """Copy a golden set to the folder `out`, and give quantised checkpoints what they share with the plain one.

    A file that is the same in both is stored in the plain checkpoint alone. `packed.safetensors` holds the tensors of
    the quantised layers; the other layers are those of the plain checkpoint.
    """
    folder = GOLDEN / name
    if not folder.is_dir():
        pytest.skip(f"{GOLDEN} (NEMOTRON_VL_GOLDEN) has no {name}")
    for checkpoint in folder.glob("checkpoint_*"):
        shutil.copytree(folder / "checkpoint", out / checkpoint.name, ignore=shutil.ignore_patterns("*.safetensors*"))
    shutil.copytree(folder, out, dirs_exist_ok=True)
    for packed in out.glob("checkpoint_*/packed.safetensors"):
        tensors = load_file(packed)
        layers = {key.rpartition(".")[0] for key in tensors}
        plain = load_weights(out / "checkpoint").items()
        tensors |= {key: tensor for key, tensor in plain if key.rpartition(".")[0] not in layers}
        save_file(tensors, packed.with_name("model.safetensors"), metadata={"format": "pt"})
        packed.unlink()
    return out


@pytest.fixture(scope="session")
def golden_8b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stored outputs and checkpoints of the 8B V1, each checkpoint complete."""
    return complete_golden("8b-v1", tmp_path_factory.mktemp("golden-8b-v1"))


@pytest.fixture(scope="session")
def golden_12b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stored outputs and the checkpoint of the 12B V2."""
    return complete_golden("12b-v2", tmp_path_factory.mktemp("golden-12b-v2"))


@pytest.fixture(scope="session")
def tiny_v2_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random checkpoint of the 12B V2, with our code beside it."""
    from tools.tiny_checkpoint import make_tiny_checkpoint

    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny-v2.checkpoint"), v2=True)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random checkpoint in the published layout, with our code beside it."""
    from tools.tiny_checkpoint import make_tiny_checkpoint

    # A dot and a hyphen in the name: both have broken the dynamic module loader before.
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny-checkpoint.v1"))


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path):
    """The tiny checkpoint's model, shared by the tests of a file: leave it as it is."""
    from nemotron_vl.modeling_nemotron_vl import Llama_Nemotron_Nano_VL

    model = Llama_Nemotron_Nano_VL.from_pretrained(tiny_checkpoint).eval()
    return model.to(os.environ.get("NEMOTRON_VL_TEST_DEVICE", "cpu"))  # benchmarks/gpu_day.py sets it


@pytest.fixture(scope="module")
def processor(tiny_checkpoint: Path):
    """The tiny checkpoint's processor, shared by the tests of a file: leave it as it is."""
    from nemotron_vl.processing_nemotron_vl import NemotronVLProcessor

    return NemotronVLProcessor.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="module")
def inputs(tiny_checkpoint: Path) -> dict[str, torch.Tensor]:
    """A prompt with a picture of one tile, made without the processor."""
    from nemotron_vl.configuration_nemotron_vl import NemotronVLConfig

    config = NemotronVLConfig.from_pretrained(tiny_checkpoint)
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(0, 200, (1, 12), generator=generator)
    image = torch.full((1, config.num_image_tokens_per_tile), config.image_token_id)
    pixel_values = torch.rand(1, 3, config.force_image_size, config.force_image_size, generator=generator)
    return {"input_ids": torch.cat((image, text), 1), "pixel_values": pixel_values}


@pytest.fixture
def kernels_on_this_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have Triton's kernels serve where their tests run, which may be a CPU; see tests/kernel_runs.py."""
    from nemotron_vl import triton_kernels

    from tests.kernel_runs import DEVICE

    monkeypatch.setattr(triton_kernels, "KERNEL_DEVICES", (DEVICE,))
