"""Config, index and headers of a checkpoint are read once; what transformers would load is what is checked."""

import builtins
import collections
import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
import transformers
from nemotron_vl.checkpoint import INDEX_FILE, Checkpoint, find_files, read_header
from nemotron_vl.configuration_nemotron_vl import NemotronVLConfig
from nemotron_vl.modeling_nemotron_vl import Llama_Nemotron_Nano_VL
from transformers import AutoConfig, AutoModel, AutoProcessor, AutoTokenizer

from tools import ROOT
from tools.quantize import quantize_model

AUTO_CLASSES = ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText")
MODULES = {path.name for path in ROOT.glob("*.py")}


@pytest.fixture(scope="module", params=["plain", "fp8", "nvfp4", "awq"])
def nano(request, tmp_path_factory) -> Path:
    """nano with our code beside it, in shards; plain or packed."""
    model = AutoModel.from_pretrained(ROOT, subfolder="nano", trust_remote_code=True)
    if request.param != "plain":
        quantize_model(model, request.param, group_size=32)
    folder = tmp_path_factory.mktemp(f"nano-{request.param}")
    model.save_pretrained(folder, max_shard_size="4MB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture
def reads(monkeypatch) -> collections.Counter:
    """How often our code reads each file: opens it itself, or has `get_config_dict` read and complete config.json."""
    count = collections.Counter()
    opens = {"open": builtins.open, "read_bytes": Path.read_bytes, "read_text": Path.read_text}

    def is_ours(frame) -> bool:
        # On transformers 4.57 `TensorHeader.read` reads single tensors, which is no reading of headers.
        return Path(frame.f_code.co_filename).name in MODULES and frame.f_code.co_name != "read"

    def counted(name):
        def read(file, *args, **kwargs):
            if is_ours(sys._getframe(1)):
                count[Path(file).name] += 1
            return opens[name](file, *args, **kwargs)

        return read

    monkeypatch.setattr(builtins, "open", counted("open"))
    for name in ("read_bytes", "read_text"):
        monkeypatch.setattr(Path, name, counted(name))
    original = transformers.PretrainedConfig.get_config_dict.__func__

    def get_config_dict(cls, *args, **kwargs):
        count["config.json"] += is_ours(sys._getframe(1))
        return original(cls, *args, **kwargs)

    monkeypatch.setattr(transformers.PretrainedConfig, "get_config_dict", classmethod(get_config_dict))
    return count


@pytest.mark.parametrize("loaded_by", ["AutoModel", "class"])
def test_loading_reads_config_index_and_headers_once(nano, reads, loaded_by):
    if loaded_by == "class":
        Llama_Nemotron_Nano_VL.from_pretrained(nano)
    else:
        AutoModel.from_pretrained(nano, trust_remote_code=True)
    expected = ["config.json", INDEX_FILE, *(path.name for path in nano.glob("*.safetensors"))]
    assert {name: reads[name] for name in expected} == dict.fromkeys(expected, 1)


def test_arguments_that_are_attributes_of_the_config_override_it(tiny_checkpoint):
    model, info = Llama_Nemotron_Nano_VL.from_pretrained(
        tiny_checkpoint, vision_batch_size=3, output_attentions=True, dtype="bfloat16", output_loading_info=True
    )
    assert (model.config.vision_batch_size, model.config.output_attentions) == (3, True)
    assert model.dtype == torch.bfloat16 and not info["missing_keys"]
    config = NemotronVLConfig.from_pretrained(tiny_checkpoint)
    assert Llama_Nemotron_Nano_VL.from_pretrained(tiny_checkpoint, config=config).config.vision_batch_size is None
    assert config.vision_batch_size is None


def test_the_files_of_a_variant_are_checked(tiny_checkpoint, tmp_path):
    model = Llama_Nemotron_Nano_VL.from_pretrained(tiny_checkpoint)
    model.save_pretrained(tmp_path, variant="fp16", max_shard_size="100KB")
    checkpoint, left = Checkpoint.read(tmp_path, NemotronVLConfig, {"variant": "fp16"})
    assert checkpoint.headers.keys() == model.state_dict().keys() and left["variant"] == "fp16"
    loaded = Llama_Nemotron_Nano_VL.from_pretrained(tmp_path, variant="fp16").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
    index = tmp_path / "model.safetensors.index.fp16.json"
    content = json.loads(index.read_text())
    content["weight_map"] = dict.fromkeys(content["weight_map"], "weights.bin")
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="lie beside it"):
        Llama_Nemotron_Nano_VL.from_pretrained(tmp_path, variant="fp16")


def test_headers_that_leave_gaps_between_tensors_are_refused(tmp_path):
    entries = {
        name: {"dtype": "F32", "shape": [1], "data_offsets": span}
        for name, span in {"a": [0, 4], "b": [8, 12]}.items()
    }
    header = json.dumps(entries).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(12))
    with pytest.raises(ValueError, match="bytes 8 to 12 do not fit b, F32"):
        read_header(path)


@pytest.mark.parametrize(
    "auto_class", [*(getattr(transformers, name) for name in AUTO_CLASSES), AutoProcessor, AutoTokenizer]
)
@pytest.mark.parametrize("subfolder", [None, "v2"])
def test_the_root_without_weights_says_where_they_come_from(auto_class, subfolder):
    if subfolder and not hasattr(transformers, "NemotronHForCausalLM") and auto_class.__name__.startswith("AutoModel"):
        pytest.skip("transformers 4.57 has no NemotronH")
    folder = {"subfolder": subfolder} if subfolder else {}
    with pytest.raises(OSError, match=r'`python -m tools.adopt\b[^.]*subfolder="nano"'):
        auto_class.from_pretrained(ROOT, trust_remote_code=True, **folder)


def test_a_repository_on_the_hub_without_weights_says_the_same(tmp_path):
    repository = tmp_path / "models--someone--code"
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    (snapshot / INDEX_FILE).symlink_to(ROOT / INDEX_FILE)
    hub = {"cache_dir": str(tmp_path), "local_files_only": True}
    with pytest.raises(FileNotFoundError, match="someone/code holds none of the 4 weight files.*tools.adopt.*nano"):
        find_files("someone/code", hub)
    (snapshot / "model-00002-of-00004.safetensors").touch()
    with pytest.raises(
        FileNotFoundError, match="names 4 files, of which model-00001-of-00004.safetensors, model-00003"
    ):
        find_files("someone/code", hub)


@pytest.mark.parametrize("auto_class", AUTO_CLASSES)
@pytest.mark.parametrize("member", ["tiny_checkpoint", "tiny_v2_checkpoint"])
def test_models_of_auto_classes_are_pickled_and_share_their_class(member, auto_class, request, tmp_path):
    if member == "tiny_v2_checkpoint" and not hasattr(transformers, "NemotronHForCausalLM"):
        pytest.skip("transformers 4.57 has no NemotronH")
    folder = request.getfixturevalue(member)
    load = getattr(transformers, auto_class).from_pretrained
    model, other = (load(folder, trust_remote_code=True) for _ in range(2))
    assert type(model) is type(other) is getattr(sys.modules[type(model).__module__], type(model).__name__)
    torch.save(model, tmp_path / "model.pt")
    for copied in (pickle.loads(pickle.dumps(model)), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert type(copied) is type(model)
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in copied.state_dict().items())
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()
