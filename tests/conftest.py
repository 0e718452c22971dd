"""Make the flat root importable (see `tools`), keep transformers offline, and lend the tests a tiny checkpoint."""

import os
import tempfile
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="hf_modules_")

from tools import ROOT  # noqa: E402

GOLDEN = Path(os.environ.get("NEMOTRON_VL_GOLDEN", ROOT.parent / "shared" / "golden"))


def golden(name: str) -> Path:
    """A folder of stored outputs of the published code; tests that need it skip where it is absent."""
    folder = GOLDEN / name
    if not folder.is_dir():
        pytest.skip(f"no golden outputs at {folder}")
    return folder


@pytest.fixture(scope="session")
def golden_8b() -> Path:
    return golden("8b-v1")


@pytest.fixture(scope="session")
def golden_12b() -> Path:
    return golden("12b-v2")


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

    return Llama_Nemotron_Nano_VL.from_pretrained(tiny_checkpoint).eval()


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
