"""Saved checkpoints are stable, and read alike by the two versions of transformers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from nemotron_vl.modeling_nemotron_vl import Llama_Nemotron_Nano_VL
from safetensors.torch import load_file

from tests.saving import save_again, tell
from tools import ROOT
from tools.tiny_checkpoint import make_tiny_checkpoint

OLD = ROOT / ".venv-4.57"  # where the Makefile puts transformers 4.57, for PYTHONPATH
SAYS_ITS_VERSION = {"config.json", "generation_config.json"}


@pytest.fixture(scope="module")
def stretched(tmp_path_factory) -> Path:
    """A tiny checkpoint whose rotary embedding is scaled as Llama 3.1's, so that a lost setting shows."""
    folder = make_tiny_checkpoint(tmp_path_factory.mktemp("stretched"))
    config = json.loads((folder / "config.json").read_text())
    config["llm_config"]["rope_scaling"] = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    (folder / "config.json").write_text(json.dumps(config))
    model = Llama_Nemotron_Nano_VL.from_pretrained(folder)
    plain = 1 / 500000 ** (torch.arange(0, 16, 2) / 16)
    assert not torch.allclose(model.language_model.model.rotary_emb.inv_freq, plain)
    return folder


def contents(folder: Path) -> dict[str, object]:
    """What a checkpoint's files say; the version of transformers that wrote them does not count."""
    found = {}
    for path in sorted(folder.iterdir()):
        found[path.name] = path.read_bytes() if path.suffix != ".json" else json.loads(path.read_text())
        if path.name in SAYS_ITS_VERSION:
            found[path.name].pop("transformers_version", None)
    return found


def test_what_is_saved_loads_and_saves_the_same(stretched, tmp_path):
    save_again(stretched, tmp_path / "first")
    save_again(tmp_path / "first", tmp_path / "second")
    first, second = contents(tmp_path / "first"), contents(tmp_path / "second")
    assert set(first) == set(second) >= {path.name for path in ROOT.glob("*.py")} | {"chat_template.jinja"}
    for name, content in first.items():
        assert second[name] == content, name
    for name, tensor in tell(stretched).items():
        assert torch.equal(tell(tmp_path / "second")[name], tensor), name


@pytest.mark.slow
def test_the_two_versions_of_transformers_read_what_the_other_saves(stretched, tmp_path):
    if not OLD.is_dir():
        pytest.skip("needs transformers 4.57 beside 5: make test-4.57")
    runs_old = transformers.__version__.startswith("4.")
    environment = {**os.environ, "PYTHONPATH": "" if runs_old else str(OLD), "HF_MODULES_CACHE": str(tmp_path / "m")}
    save_again(stretched, tmp_path / "ours")
    other = tmp_path / "other"
    other.mkdir()
    command = [sys.executable, str(Path(__file__).with_name("saving.py")), str(tmp_path / "ours"), str(other)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200, check=False)
    assert run.returncode == 0, run.stderr[-5000:]
    version = json.loads((other / "version.json").read_text())
    assert version.split(".")[0] == ("5" if runs_old else "4")

    expected, told, returned = tell(stretched), load_file(other / "told.safetensors"), tell(other / "checkpoint")
    for name, tensor in expected.items():
        for got in (told[name], returned[name]):
            torch.testing.assert_close(got, tensor, rtol=1e-5, atol=1e-5, msg=f"{name} on {version}")
    ours, theirs = contents(tmp_path / "ours"), contents(other / "checkpoint")
    assert {name for name in ours if name.endswith(".py")} == {name for name in theirs if name.endswith(".py")}
    for name in ("model.safetensors", "chat_template.jinja", "preprocessor_config.json"):
        assert theirs[name] == ours[name], name
    for key in ("model", "added_tokens", "pre_tokenizer", "decoder"):  # 5 adds a post-processor that does nothing
        assert theirs["tokenizer.json"][key] == ours["tokenizer.json"][key], key
    for key in ("rope_theta", "rope_scaling", "vocab_size", "torch_dtype"):
        assert theirs["config.json"]["llm_config"].get(key) == ours["config.json"]["llm_config"].get(key), key
