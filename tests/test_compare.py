"""The side-by-side comparison: what it says of stored outputs, what it asks for, and that it runs foreign code.

The published code is not in this repository. Its stored outputs stand in for one side here, and `tests/stand_in`, own
code in the published layout, for the code.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.conftest import golden_inputs, read_golden_cases
from tools import ROOT, compare

STAND_IN = ROOT / "tests" / "stand_in"
TOWER = "nvidia/C-RADIOv2-H--hf_model"


@pytest.fixture(scope="module")
def dumps(golden_8b: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The stored outputs of the published code as it would have left them, and ours on the same cases."""
    published, ours = (tmp_path_factory.mktemp(name) for name in ("published", "ours"))
    stored = load_file(golden_8b / "expected.safetensors")
    names = {"tower": "tower_features", "projector": "image_features"}
    tensors, cases = {}, []
    for index, (name, case) in enumerate(read_golden_cases(golden_8b).items()):
        cases.append(case | {"images": [str(golden_8b / file) for file in case["images"]]})
        if case["images"]:
            tensors[f"{index}.tiles"] = golden_inputs(golden_8b, name)["pixel_values"]
            tensors |= {f"{index}.{stage}": stored[f"{name}.{key}"] for stage, key in names.items()}
        tensors[f"{index}.logits"] = stored[f"{name}.logits_last"][:, -1]
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, published / "stages.safetensors")
    (published / "run.json").write_text(json.dumps({"cases": cases, "conditions": {}}))
    compare.run_side("ours", golden_8b / "checkpoint", cases, "float32", "cpu", ours)
    return published, ours


def test_every_stage_agrees_with_the_golden_outputs(dumps: tuple[Path, Path]):
    rows = compare.compare(*dumps)
    assert [row for row in rows if not row["agrees"]] == []
    stored = load_file(dumps[0] / "stages.safetensors")
    compared = {(row["case"], row["stage"]): row["compared"] for row in rows}
    for index, case in enumerate(json.loads((dumps[0] / "run.json").read_text())["cases"]):
        stages = [*compare.STAGES, "text"] if case["images"] else ["logits", "text"]
        assert [stage for name, stage in compared if name == case["name"]] == stages
        assert f"| {case['name']} | text | " in compare.table(rows)
        if case["images"]:
            kept, tiles = len(stored[f"{index}.tower"]), sum(case["num_patches"])
            expected = f"{kept} of {tiles} tiles" if kept < tiles else f"{tiles} tiles"
            assert compared[case["name"], "tower"] == expected


def test_a_difference_in_any_stage_from_the_golden_shows(dumps: tuple[Path, Path], tmp_path: Path):
    published, ours = dumps
    tensors = load_file(ours / "stages.safetensors")
    run = json.loads((ours / "run.json").read_text())
    index = next(index for index, case in enumerate(run["cases"]) if f"{index}.tiles" in tensors)
    for stage, change in {"tiles": 1e-6, "tower": 1e-2, "projector": 1e-3, "logits": 1e-3}.items():
        tensors[f"{index}.{stage}"].view(-1)[0] += change
    save_file(tensors, tmp_path / "stages.safetensors")
    run["cases"][index]["answer"] += "!"
    (tmp_path / "run.json").write_text(json.dumps(run))
    rows = compare.compare(published, tmp_path)
    assert {(row["case"], row["stage"]) for row in rows if not row["agrees"]} == {
        (run["cases"][index]["name"], stage) for stage in (*compare.STAGES, "text")
    }
    assert compare.table(rows).count("DIFFERS") == 5


def test_logits_are_compared_until_the_tokens_part():
    theirs = torch.eye(5)
    own = theirs.clone()
    own[2] = torch.eye(5)[4] * 0.5
    row = compare.compare_stage("logits", theirs, own)
    assert row["compared"] == "3 of 5 steps"
    assert row["difference"] == 1.0
    assert not row["agrees"]


def test_other_shapes_and_absent_stages_never_agree():
    assert (
        compare.compare_stage("tiles", torch.zeros(7, 3), torch.zeros(13, 3))["compared"] == "[7, 3] against [13, 3]"
    )
    assert not compare.compare_stage("tower", torch.zeros(2, 3), torch.zeros(2, 4))["agrees"]
    assert not compare.compare_stage("projector", None, torch.zeros(2, 4))["agrees"]


@pytest.fixture
def download(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A tiny checkpoint that looks like NVIDIA's repository, with the stand-in's code in it."""
    folder = tmp_path / "Nano-VL.v1"
    folder.mkdir()
    for name in ("config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_checkpoint / name, folder)
    for file in [*tiny_checkpoint.glob("*.safetensors"), *tiny_checkpoint.glob("*.jinja"), *STAND_IN.glob("*.py")]:
        shutil.copy(file, folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration.Llama_Nemotron_Nano_VL_Config",
        "AutoModel": "modeling.Llama_Nemotron_Nano_VL",
    }
    config["attn_implementation"] = "flash_attention_2"
    config["vision_config"]["auto_map"] = {
        "AutoConfig": f"{TOWER}.RADIOConfig",
        "AutoModel": f"{TOWER}.RADIOModel",
    }
    shape = {"embed_dim": 32, "depth": 2, "num_heads": 2}
    config["vision_config"]["args"] |= {"model_kwargs": shape, "cpe_max_size": 256}
    (folder / "config.json").write_text(json.dumps(config))
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings["auto_map"] = {"AutoImageProcessor": "image_processing.LlamaNemotronNanoVLImageProcessor"}
    settings["image_processor_type"] = "LlamaNemotronNanoVLImageProcessor"
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def test_nothing_is_missing_from_a_whole_download(download: Path):
    assert compare.what_is_missing(download, STAND_IN / "tower", sys.executable) == []


def test_what_is_missing_is_named_with_the_remedy(download: Path, tiny_checkpoint: Path, tmp_path: Path):
    (download / "modeling.py").unlink()
    (download / "model.safetensors").unlink()
    (download / "configuration.py").write_text(
        "import surely_absent\ntry:\n    import also_absent\nexcept ImportError:\n    pass\n"
    )
    problems = "\n".join(compare.what_is_missing(download, None, sys.executable))
    assert "modeling.py is not there" in problems
    assert "model.safetensors is not there" in problems
    assert "hf download nvidia/C-RADIOv2-H" in problems
    assert "lacks surely_absent" in problems
    assert "-m pip install surely_absent" in problems
    assert "also_absent" not in problems
    assert "is not in" in "\n".join(compare.missing_files(download, tmp_path))
    assert "not the published one" in "\n".join(compare.missing_files(tiny_checkpoint, None))
    assert "no config.json" in compare.missing_files(tmp_path, None)[0]
    assert "does not run" in compare.what_is_missing(download, None, str(tmp_path / "python"))[-1]


def test_the_names_of_the_packages_are_those_of_pip(download: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compare, "missing_packages", lambda python, packages: (["open_clip", "timm"], "4.53.3"))
    problems = compare.what_is_missing(download, STAND_IN / "tower", "old/bin/python")
    assert problems == [
        "old/bin/python lacks open_clip, timm: old/bin/python -m pip install open-clip-torch==3.1.0 timm==1.0.19"
    ]


def test_the_command_says_what_is_missing_and_stops(download: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert compare.main([str(download), str(tmp_path / "page.png")]) == 2
    assert (
        "The published code cannot run yet:\n- The tower's code (hf_model.py) is not given" in capsys.readouterr().out
    )


@pytest.mark.slow
def test_both_codes_run_side_by_side(download: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    pictures = []
    for number, size in enumerate([(20, 20), (150, 60)]):
        pictures.append(str(tmp_path / f"{number}.png"))
        Image.effect_noise(size, 60).convert("RGB").save(pictures[-1])
    kept = str(tmp_path / "kept")
    command = [str(download), "--tower", str(STAND_IN / "tower"), "--keep", kept, "--max-new-tokens", "4"]
    assert compare.main([*command, *pictures]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(found["rows"]) == 2 * 5
    assert max(row["difference"] or 0 for row in found["rows"]) < 1e-4
    assert [row["compared"] for row in found["rows"] if row["stage"] == "logits"] == ["4 steps"] * 2
    run = json.loads((tmp_path / "kept" / "run.json").read_text())
    run["cases"][0]["answer"] = "something else"
    (tmp_path / "kept" / "run.json").write_text(json.dumps(run))
    assert compare.main([str(download), "--published", kept]) == 1
    assert "| 0.png | text | 14 characters |  |  | DIFFERS |" in capsys.readouterr().out
