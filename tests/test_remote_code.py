"""The repository loads by `trust_remote_code` the way transformers' dynamic module loader works, and only so.

One fresh process opens every door (front_doors.py); the tests here read its findings.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from nemotron_vl.configuration_nemotron_vl import NemotronVLConfig
from nemotron_vl.modeling_nemotron_vl import Llama_Nemotron_Nano_VL
from nemotron_vl.processing_nemotron_vl import NemotronVLProcessor
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.dynamic_module_utils import get_imports, get_relative_import_files, get_relative_imports

from tests.front_doors import MODEL_DOORS, encode
from tools import ROOT

MODULES = sorted(path.name for path in ROOT.glob("*.py"))
ENTRY_FILES = [
    "configuration_nemotron_vl.py",
    "image_processing.py",
    "modeling_nemotron_vl.py",
    "processing_nemotron_vl.py",
    "radio_model.py",
    "video_processing.py",
]
# Which root modules a root module may import.
ARROWS = {
    "configuration_nemotron_vl": "",
    "triton_kernels": "",
    "c_compiler": "",
    "torch_int4": "",
    "pictures": "",
    "prompts": "pictures",
    "answers": "",
    "image_processing": "pictures",
    "checkpoint": "configuration_nemotron_vl",
    "radio_model": "configuration_nemotron_vl checkpoint",
    "packed_matmul": "triton_kernels",
    "cpu_matmul": "c_compiler",
    "decode_attention": "triton_kernels",
    "quantization_nemotron_vl": "checkpoint packed_matmul cpu_matmul torch_int4",
    "video_processing": "image_processing pictures",
    "chat": "prompts pictures answers video_processing decode_attention triton_kernels",
    "processing_nemotron_vl": "prompts image_processing pictures video_processing",
    "modeling_nemotron_vl": (
        "configuration_nemotron_vl checkpoint radio_model quantization_nemotron_vl decode_attention triton_kernels chat "
        # The others for transformers 4.57, which copies direct imports alone.
        "prompts image_processing packed_matmul cpu_matmul c_compiler torch_int4 pictures answers video_processing"
    ),
}
HARD_IMPORTS = {"torch", "transformers", "numpy", "PIL"}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def source(module: str) -> str:
    return (ROOT / module).read_text(encoding="utf-8")


def test_every_auto_map_names_an_entry_file(tiny_checkpoint):
    config = NemotronVLConfig()
    entries = [*config.auto_map.values(), *config.vision_config.auto_map.values()]
    for file in ("preprocessor_config.json", "processor_config.json"):
        for folder in (ROOT, tiny_checkpoint):
            entries += json.loads((folder / file).read_text()).get("auto_map", {}).values()
    entries += json.loads((ROOT / "config.json").read_text())["auto_map"].values()
    for folder in (ROOT, ROOT / "v2"):
        entries += json.loads((folder / "tokenizer_config.json").read_text())["auto_map"]["AutoTokenizer"]
    assert {f"{entry.split('.')[0]}.py" for entry in entries} == set(ENTRY_FILES)
    assert not [entry for entry in entries if "--" in entry]


@pytest.mark.parametrize("module", ENTRY_FILES)
def test_every_entry_file_imports_its_closure_directly(module):
    direct = {f"{name}.py" for name in get_relative_imports(ROOT / module)}
    closure = {Path(file).name for file in get_relative_import_files(ROOT / module)}
    assert closure == direct


def test_root_modules_import_each_other_as_the_table_says():
    found = {}
    for module in MODULES:
        statements = [node for node in ast.walk(ast.parse(source(module))) if isinstance(node, ast.ImportFrom)]
        found[module.removesuffix(".py")] = {node.module for node in statements if node.level}
    assert found == {module: set(imports.split()) for module, imports in ARROWS.items()}


@pytest.mark.parametrize("module", MODULES)
def test_relative_imports_are_plain_lines(module):
    for line in re.findall(r"^.*\bfrom\s+\..*$|^.*\bimport\s+\..*$", source(module), re.MULTILINE):
        match = re.match(r"from \.(\w+) import [^;*]+$", line)
        assert match, line
        assert (ROOT / f"{match[1]}.py").exists()


@pytest.mark.parametrize("module", MODULES)
def test_only_the_allowed_packages_are_needed(module):
    needed = {name.split(".")[0] for name in get_imports(ROOT / module)} - set(sys.stdlib_module_names)
    assert needed <= HARD_IMPORTS


@pytest.mark.parametrize("module", MODULES)
def test_shipped_modules_are_quiet_and_portable(module):
    for node in ast.walk(ast.parse(source(module))):
        assert not isinstance(node, ast.Assert), f"assert in line {node.lineno}"
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f"bare except in line {node.lineno}"
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            assert name not in ("print", "cuda", "breakpoint"), f"{name}() in line {node.lineno}"
        assert not (isinstance(node, ast.Name) and node.id == "__file__"), "data beside the code is not copied"


@pytest.fixture(scope="module")
def doors(tiny_checkpoint, tmp_path_factory) -> tuple[dict, dict[str, torch.Tensor], Path]:
    """Findings, logits and output folder of a fresh process that opened every door."""
    work = tmp_path_factory.mktemp("doors")
    hub = work / "hf/hub/models--org--tiny-model.v1"
    shutil.copytree(tiny_checkpoint, hub / "snapshots" / COMMIT)
    (hub / "refs").mkdir()
    (hub / "refs/main").write_text(COMMIT)
    repository = work / "repo-with.nano"
    shutil.copytree(tiny_checkpoint, repository / "nano", ignore=shutil.ignore_patterns("*.py"))
    for name in [*MODULES, "processor_config.json", "preprocessor_config.json"]:
        shutil.copy(ROOT / name, repository / name)
    out = work / "out"
    out.mkdir()
    environment = {
        **os.environ,
        "HF_HOME": str(work / "hf"),
        "HF_MODULES_CACHE": str(work / "modules"),
        "HF_HUB_OFFLINE": "1",
    }
    script = Path(__file__).with_name("front_doors.py")
    command = [sys.executable, str(script), str(tiny_checkpoint), str(repository), str(out)]
    run = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=1200, check=False)
    assert run.returncode == 0, run.stderr[-5000:]
    return json.loads((out / "results.json").read_text()), load_file(out / "logits.safetensors"), out


@pytest.fixture(scope="module")
def side_door_logits(tiny_checkpoint) -> torch.Tensor:
    model = Llama_Nemotron_Nano_VL.from_pretrained(tiny_checkpoint).eval()
    with torch.no_grad():
        return model(**encode(NemotronVLProcessor.from_pretrained(tiny_checkpoint))).logits


def test_the_fresh_process_runs_this_transformers(doors):
    assert doors[0]["version"] == transformers.__version__


def test_every_door_gives_the_side_door_logits(doors, side_door_logits):
    sources = {"local", "hub", "subfolder"}
    classes = {name for name in MODEL_DOORS if hasattr(transformers, name)}
    expected = sources | {"export", "round trip"} | {f"{source} {name}" for source in sources for name in classes}
    assert expected == set(doors[1])
    for door, logits in doors[1].items():
        torch.testing.assert_close(logits, side_door_logits, msg=door)


@pytest.mark.parametrize("door", ["local", "hub", "subfolder", "export", "round trip"])
def test_each_route_opens_everything(doors, door):
    result = doors[0][door]
    assert result["config"] == "NemotronVLConfig"
    assert result["model"] == "Llama_Nemotron_Nano_VL"
    assert result["processor"] == "NemotronVLProcessor"
    assert result["modules"] == ["transformers_modules"]  # dynamic code, not the package the tests import
    assert result["templates"]
    assert result["tiles_of_a_strict_image_processor"] == [1]
    assert isinstance(result["eos"], int) and isinstance(result["answer"], str)
    assert result["eos of the model"] == 257  # of the tiny checkpoint, not of a root beside it


@pytest.mark.parametrize("name", ["export", "round trip"])
def test_saving_brings_the_code_along(doors, name):
    assert set(MODULES) <= set(doors[0][name + " files"])
    assert set(doors[0][name + " auto_map"]) >= {"AutoConfig", "AutoModel", "AutoModelForImageTextToText"}
    assert not [entry for entry in doors[0][name + " auto_map"].values() if "--" in entry]


@pytest.mark.parametrize("source", ["local", "hub", "subfolder"])
def test_the_pipeline_answers_as_generate_does(doors, source):
    by_pipeline, by_hand = doors[0][f"{source} pipeline"]
    assert by_pipeline == by_hand


def test_without_trust_it_is_refused_and_no_native_class_steps_in(doors):
    assert len(doors[0]["no trust"]) == len([name for name in MODEL_DOORS if hasattr(transformers, name)]) + 4
    for words in doors[0]["no trust"]:
        assert "contains custom code" in words and "`trust_remote_code=True`" in words


def test_a_spawned_worker_can_use_the_processor(doors):
    assert doors[0]["worker"] is True


def test_code_named_in_the_parts_of_a_checkpoint_is_not_run_through_auto_classes(tiny_checkpoint, tmp_path):
    """The top level names our code, as after tools.adopt; everything below it names a trap."""
    trap, sprung = tmp_path / "trap", tmp_path / "sprung"
    shutil.copytree(tiny_checkpoint, trap)
    (trap / "evil.py").write_text(f"open({str(sprung)!r}, 'w').close()\nclass Evil: pass\n")
    evil = dict.fromkeys(("AutoConfig", "AutoModel", "AutoImageProcessor", "AutoProcessor"), "evil.Evil")
    evil["AutoTokenizer"] = ["evil.Evil", "evil.Evil"]
    for file, parts in {
        "config.json": ("vision_config", "llm_config"),
        "processor_config.json": ("image_processor", "tokenizer"),
    }.items():
        content = json.loads((trap / file).read_text())
        for part in parts:
            content.setdefault(part, {})["auto_map"] = evil
        (trap / file).write_text(json.dumps(content))
    for file in ("tokenizer_config.json", "generation_config.json"):
        (trap / file).write_text(json.dumps({**json.loads((trap / file).read_text()), "auto_map": evil}))
    config = AutoConfig.from_pretrained(trap, trust_remote_code=True)
    model = AutoModel.from_pretrained(trap, trust_remote_code=True)
    built = AutoModel.from_config(config, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(trap, trust_remote_code=True)
    model(**encode(processor))
    assert type(config).__name__ == "NemotronVLConfig" and type(built).__name__ == type(model).__name__
    assert not sprung.exists()


def test_code_named_inside_the_configs_is_never_run(tiny_checkpoint, tmp_path):
    trap = tmp_path / "trap"
    shutil.copytree(tiny_checkpoint, trap)
    sprung = tmp_path / "sprung"
    (trap / "evil.py").write_text(f"open({str(sprung)!r}, 'w').close()\nclass Evil: pass\n")
    evil = dict.fromkeys(("AutoConfig", "AutoModel", "AutoImageProcessor", "AutoProcessor"), "evil.Evil")
    evil["AutoTokenizer"] = ["evil.Evil", "evil.Evil"]
    for file, parts in {
        "config.json": ("vision_config", "llm_config"),
        "preprocessor_config.json": (),
        "processor_config.json": ("image_processor",),
        "tokenizer_config.json": (),
    }.items():
        content = json.loads((trap / file).read_text())
        for holder in (content, *(content.setdefault(part, {}) for part in parts)):
            holder["auto_map"] = evil
        (trap / file).write_text(json.dumps(content))
    model = Llama_Nemotron_Nano_VL.from_pretrained(trap)
    processor = NemotronVLProcessor.from_pretrained(trap, trust_remote_code=True)
    model(**encode(processor))
    for saved in (model, processor):
        saved.save_pretrained(tmp_path / "saved")
    assert not sprung.exists()
    for file in (tmp_path / "saved").glob("*.json"):
        assert "evil" not in file.read_text(), file.read_text()
