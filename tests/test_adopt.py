"""`tools.adopt` opens published checkpoints, and refuses damaged ones with a sentence that says what is wrong."""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from nemotron_vl.checkpoint import INDEX_FILE, SINGLE_FILE, read_header
from nemotron_vl.configuration_nemotron_vl import NemotronVLConfig
from nemotron_vl.modeling_nemotron_vl import Llama_Nemotron_Nano_VL
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.conftest import GOLDEN, golden_formats, load_weights, read_golden_cases
from tools import ROOT
from tools import adopt as command
from tools.adopt import main
from tools.weights import make_index

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
MEAN, STD = (f"vision_model.radio_model.input_conditioner.norm_{name}" for name in ("mean", "std"))
NORM = "language_model.model.norm.weight"
Q_PROJ, K_PROJ = (f"language_model.model.layers.0.self_attn.{name}_proj" for name in "qk")

TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
CODE = {path.name for path in ROOT.glob("*.py")}
PROCESSOR_FILES = {"preprocessor_config.json", "processor_config.json", "special_tokens_map.json"}


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def edit(path: Path, **changes) -> None:
    """Change keys of a JSON file; None removes one."""
    data = {**(read(path) if path.exists() else {}), **changes}
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def save_sharded(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    names = sorted(weights)
    for file, part in zip(SHARDS, (names[::2], names[1::2]), strict=True):
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
    tensors = {name: tensor for file in SHARDS for name, tensor in read_header(folder / file).items()}
    (folder / INDEX_FILE).write_text(json.dumps(make_index(tensors)))


@pytest.fixture(scope="session")
def weights(tiny_checkpoint) -> dict[str, torch.Tensor]:
    return load_file(tiny_checkpoint / SINGLE_FILE)


@pytest.fixture(scope="session")
def published(tiny_checkpoint, weights, tmp_path_factory) -> Path:
    """A tiny checkpoint as NVIDIA lays its own out: foreign code and auto_map, two shards, no processor."""
    folder = tmp_path_factory.mktemp("published")
    for name in TEXT_FILES:
        shutil.copy(tiny_checkpoint / name, folder / name)
    foreign = {"AutoConfig": "configuration.Trap", "AutoModel": "modeling.Trap", "AutoTokenizer": [None, "trap.Trap"]}
    config = read(folder / "config.json")
    config["vision_config"]["auto_map"] = {"AutoConfig": "nvidia/C-RADIOv2-H--hf_model.RADIOConfig"}
    config["vision_config"]["a_vision_key_of_tomorrow"] = 7
    for name in ("id2label", "label2id"):  # transformers 5 writes the defaults of every config class
        config["llm_config"].pop(name, None)
    edit(
        folder / "config.json",
        **config | {"auto_map": foreign, "img_context_token_id": None, "attn_implementation": "flash_attention_2"},
        a_key_of_tomorrow=[1],
    )
    for name in ("configuration.py", "modeling.py", "trap.py"):
        (folder / name).write_text("raise RuntimeError('foreign code ran')\n")
    edit(
        folder / "tokenizer_config.json", auto_map=foreign, pad_token=None, padding_side=None, model_max_length=10**30
    )
    edit(
        folder / "preprocessor_config.json",
        auto_map={"AutoImageProcessor": "image_processing.LlamaNemotronNanoVLImageProcessor"},
        image_processor_type="LlamaNemotronNanoVLImageProcessor",
        do_normalize=False,
        image_size=64,
        max_num_tiles=4,
        use_thumbnail=False,
    )
    save_sharded(folder, weights)
    return folder


@pytest.fixture
def source(published, tmp_path) -> Path:
    """A copy of the published checkpoint to damage."""
    return shutil.copytree(published, tmp_path / "source")


def refusal(source: Path, capsys) -> str:
    """Adopt, see that it fails and writes nothing, and return the report."""
    out = source.parent / "adopted"
    before = sorted(path.name for path in source.parent.iterdir())
    assert main([str(source), "--out", str(out)]) == 1
    assert sorted(path.name for path in source.parent.iterdir()) == before
    report = capsys.readouterr().out
    assert main([str(source), "--check"]) == 1
    assert capsys.readouterr().out == report
    assert report.count("PROBLEM") == 1, report
    return report


def adopt(source: Path, *options: str) -> Path:
    out = source.parent / "adopted"
    assert main([str(source), "--out", str(out), *options]) == 0
    return out


# What it writes


def test_an_adopted_checkpoint_holds_theirs_and_ours(source, capsys):
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    out = adopt(source)
    assert {path.name for path in out.iterdir()} == {*TEXT_FILES, *PROCESSOR_FILES, *CODE, *SHARDS, INDEX_FILE}
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    for name in ("tokenizer.json", "generation_config.json", *SHARDS):
        assert (out / name).read_bytes() == before[name]
    for name in CODE:
        assert (out / name).read_bytes() == (ROOT / name).read_bytes()
    said = capsys.readouterr().out
    assert "Every tensor fits the model." in said and f"path = {str(out)!r}" in said


def test_the_hint_to_load_it_runs_and_says_dtype_as_the_pages_do(source, tmp_path, monkeypatch, capsys):
    out = tmp_path / "adopted"
    assert main([str(source), "--out", str(out)]) == 0
    hint = capsys.readouterr().out.partition("Load it:\n")[2]
    assert ' dtype="auto"' in hint
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (80, 60)).save("page.png")
    exec(textwrap.dedent(hint), {})
    assert capsys.readouterr().out.endswith("\n")


def test_the_config_becomes_ours_and_keeps_what_it_said(source):
    before = read(source / "config.json")
    config = read(adopt(source) / "config.json")
    reference = NemotronVLConfig()
    assert config["auto_map"] == reference.auto_map
    assert config["vision_config"]["auto_map"] == reference.vision_config.auto_map
    assert config["img_context_token_id"] == NemotronVLConfig.from_pretrained(source).img_context_token_id is not None
    assert config["architectures"] == ["Llama_Nemotron_Nano_VL"]
    assert config["a_key_of_tomorrow"] == [1] and config["vision_config"]["a_vision_key_of_tomorrow"] == 7
    assert "attn_implementation" not in config
    changed = {"auto_map", "img_context_token_id", "transformers_version", "vision_config", "llm_config"}
    kept = before.keys() - changed - {"attn_implementation"}
    assert {name: config[name] for name in kept} == {name: before[name] for name in kept}
    assert config["llm_config"]["rope_theta"] == 500000.0
    assert not {"id2label", "rope_parameters", "dtype"} & config["llm_config"].keys()


def test_the_tokenizer_is_readable_by_every_version_and_knows_how_to_pad(source):
    edit(
        source / "tokenizer_config.json",
        tokenizer_class="TokenizersBackend",
        extra_special_tokens=["<image>", "<img>"],
        additional_special_tokens=None,
    )
    out = adopt(source)
    tokenizer = read(out / "tokenizer_config.json")
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer["additional_special_tokens"] == ["<image>", "<img>"] and "extra_special_tokens" not in tokenizer
    assert tokenizer["pad_token"] == "<|finetune_right_pad_id|>" == read(out / "special_tokens_map.json")["pad_token"]
    assert tokenizer["padding_side"] == "left"
    assert tokenizer["model_max_length"] == 2048  # the config's context
    assert "auto_map" not in tokenizer


def test_the_options_of_the_image_processor_are_honoured(source):
    out = adopt(source)
    preprocessor = read(out / "preprocessor_config.json")
    assert preprocessor["max_num_tiles"] == 4 and preprocessor["use_thumbnail"] is False
    assert preprocessor["image_size"] == 64 and preprocessor["upscale"] == 2
    assert "image_processor_type" not in preprocessor
    assert preprocessor["auto_map"] == read(ROOT / "preprocessor_config.json")["auto_map"]
    assert read(out / "processor_config.json") == read(ROOT / "processor_config.json")


def test_missing_small_files_are_made(source):
    for name in ("preprocessor_config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja"):
        (source / name).unlink()
    edit(source / "config.json", torch_dtype=None, dtype=None)
    out = adopt(source)
    assert read(out / "preprocessor_config.json")["image_size"] == 64
    assert (
        read(out / "generation_config.json")["eos_token_id"]
        == read(source / "config.json")["llm_config"]["eos_token_id"]
    )
    assert read(out / "tokenizer_config.json")["eos_token"] == "<|eot_id|>"
    assert (out / "chat_template.jinja").read_text() == (ROOT / "chat_template.jinja").read_text()
    assert read(out / "config.json")["torch_dtype"] == "float32"


def test_an_equal_chat_template_gives_way_to_ours(source, capsys):
    (source / "chat_template.jinja").unlink()
    equal = (
        "{{- bos_token }}{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] + "
        "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
    )
    edit(source / "tokenizer_config.json", chat_template=[{"name": "default", "template": equal}])
    out = adopt(source)
    assert (out / "chat_template.jinja").read_text() == (ROOT / "chat_template.jinja").read_text()
    assert "chat_template" not in read(out / "tokenizer_config.json")
    assert "other prompts" not in capsys.readouterr().out


def test_a_chat_template_that_makes_other_prompts_is_kept_and_named(source, capsys):
    other = "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}{% endfor %}"
    (source / "chat_template.jinja").write_text(other)
    assert (adopt(source) / "chat_template.jinja").read_text() == other
    assert "makes other prompts" in capsys.readouterr().out


def test_weights_are_linked_unless_copies_are_wanted(source, capsys):
    out = adopt(source)
    assert all((out / name).samefile(source / name) for name in SHARDS)
    assert "its weights are hard-linked" in capsys.readouterr().out
    out = adopt(source, "--copy")
    assert not any((out / name).samefile(source / name) for name in SHARDS)
    assert (out / SHARDS[0]).read_bytes() == (source / SHARDS[0]).read_bytes()


class StoppingBar(contextlib.AbstractContextManager):
    """A progress bar that counts, and presses Ctrl-C after some pieces."""

    def __init__(self, pieces: int):
        self.pieces, self.copied, self.options = pieces, 0, {}

    def __call__(self, **options):
        self.options = options
        return self

    def __exit__(self, *_):
        pass

    def update(self, num_bytes: int) -> None:
        self.copied += num_bytes
        self.pieces -= 1
        if self.pieces == 0:
            raise KeyboardInterrupt


def test_a_copy_that_was_stopped_goes_on_where_it_was(source, tmp_path, monkeypatch, capsys):
    out, total = tmp_path / "copied", sum((source / name).stat().st_size for name in SHARDS)
    monkeypatch.setattr(command, "COPIED_AT_ONCE", total // 10)
    monkeypatch.setattr(command, "progress", first := StoppingBar(7))
    with pytest.raises(KeyboardInterrupt):
        main([str(source), "--out", str(out), "--copy"])
    assert not out.exists() and "The same command goes on where it was" in capsys.readouterr().err
    monkeypatch.setattr(command, "progress", second := StoppingBar(-1))
    assert main([str(source), "--out", str(out), "--copy"]) == 0
    assert second.options["initial"] == first.copied > 0 and second.copied == total - first.copied
    assert [(out / name).read_bytes() for name in SHARDS] == [(source / name).read_bytes() for name in SHARDS]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".copied")] == []


def test_a_stopped_copy_of_weights_that_have_changed_begins_again(source, tmp_path, monkeypatch):
    out = tmp_path / "copied"
    monkeypatch.setattr(command, "progress", StoppingBar(1))
    with pytest.raises(KeyboardInterrupt):
        main([str(source), "--out", str(out), "--copy"])
    for name in SHARDS:
        os.utime(source / name, ns=(1, 1))
    monkeypatch.setattr(command, "progress", again := StoppingBar(-1))
    assert main([str(source), "--out", str(out), "--copy"]) == 0
    assert again.options["initial"] == 0
    assert {path.name for path in out.iterdir()} == {*SHARDS, *command.inspect(source).files}


def test_a_copy_that_has_no_room_is_refused_before_it_begins(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: argparse.Namespace(free=1000))
    with pytest.raises(OSError, match="0.0 GB free, and 0.0 GB of weights are left to copy"):
        main([str(source), "--out", str(tmp_path / "copied"), "--copy"])
    assert not (tmp_path / "copied").exists() and not list(tmp_path.glob(".copied*/*"))


def test_weights_of_another_file_system_are_linked_by_name(source, monkeypatch, capsys):
    def other_file_system(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", other_file_system)
    out = adopt(source)
    assert (out / SHARDS[0]).readlink() == (source / SHARDS[0]).resolve()
    assert "its weights are linked" in capsys.readouterr().out


def test_an_adopted_directory_can_be_adopted_again(source, tmp_path):
    first = adopt(source)
    assert main([str(source), "--out", str(first)]) == 0
    assert main([str(first), "--out", str(tmp_path / "again")]) == 0
    for path in first.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


# What it reads


def load_strictly(folder: Path) -> dict[str, torch.Tensor]:
    return Llama_Nemotron_Nano_VL.from_pretrained(folder).state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_plain_dtype_is_adopted(source, weights, dtype):
    save_sharded(source, {name: tensor.to(dtype) for name, tensor in weights.items()})
    state = load_strictly(adopt(source))
    torch.testing.assert_close(state[NORM].float(), weights[NORM], rtol=0.01, atol=0.01)


def test_a_single_file_needs_no_index(source, weights):
    for name in (*SHARDS, INDEX_FILE):
        (source / name).unlink()
    save_file(weights, source / SINGLE_FILE)
    out = adopt(source)
    assert not (out / INDEX_FILE).exists()
    assert load_strictly(out).keys() == weights.keys()


def test_shards_without_an_index_get_one(source, weights):
    (source / INDEX_FILE).unlink()
    assert load_strictly(adopt(source)).keys() == weights.keys()


def test_an_index_that_disagrees_with_the_shards_is_corrected(source, weights, capsys):
    index = read(source / INDEX_FILE)
    files = index["weight_map"]
    files[NORM] = SHARDS[1] if files[NORM] == SHARDS[0] else SHARDS[0]
    del files["mlp1.0.bias"]
    (source / INDEX_FILE).write_text(json.dumps(index))
    out = adopt(source)
    assert "is wrong about 2 tensors" in capsys.readouterr().out
    corrected = read(out / INDEX_FILE)
    assert all(name in read_header(out / file) for name, file in corrected["weight_map"].items())
    assert corrected["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in weights.values())
    assert load_strictly(out).keys() == weights.keys()


@pytest.mark.parametrize("conditioner", [True, False])
@pytest.mark.parametrize("summary_idxs", [True, False])
def test_constants_of_the_tower_may_be_stored_or_not(source, weights, conditioner, summary_idxs):
    stored = {name: tensor for name, tensor in weights.items() if conditioner or name not in (MEAN, STD)}
    if summary_idxs:
        stored["vision_model.radio_model.summary_idxs"] = torch.tensor([0, 1, 2])
    save_sharded(source, stored)
    state = load_strictly(adopt(source))
    assert state.keys() == weights.keys()
    torch.testing.assert_close(state[MEAN], weights[MEAN])
    torch.testing.assert_close(state[STD], weights[STD])


def test_a_tied_head_need_not_be_stored(source, weights):
    config = read(source / "config.json")
    config["llm_config"]["tie_word_embeddings"] = config["tie_word_embeddings"] = True
    edit(source / "config.json", **config)
    save_sharded(source, {name: tensor for name, tensor in weights.items() if "lm_head" not in name})
    state = load_strictly(adopt(source))
    embeddings = weights["language_model.model.embed_tokens.weight"]
    torch.testing.assert_close(state["language_model.lm_head.weight"], embeddings)


# What it refuses


def test_a_truncated_shard(source, capsys):
    content = (source / SHARDS[1]).read_bytes()
    (source / SHARDS[1]).write_bytes(content[:-5])
    report = refusal(source, capsys)
    assert f"{SHARDS[1]} is truncated: {len(content) - 5} bytes instead of {len(content)}" in report


@pytest.mark.parametrize("size", [0, 5, 30])
def test_a_shard_that_ends_in_its_header(source, capsys, size):
    (source / SHARDS[0]).write_bytes((source / SHARDS[0]).read_bytes()[:size])
    assert SHARDS[0] in refusal(source, capsys)


def test_a_shard_with_surplus_bytes(source, capsys):
    with (source / SHARDS[0]).open("ab") as file:
        file.write(b"more")
    assert "has surplus bytes" in refusal(source, capsys)


def test_a_git_lfs_pointer(source, capsys):
    (source / SHARDS[0]).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    assert "git lfs pull" in refusal(source, capsys)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]},
        {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1]},
        [],
        None,
    ],
)
def test_a_header_that_contradicts_itself(source, capsys, entry):
    header = json.dumps({"a": entry}).encode()
    (source / SHARDS[0]).write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert "broken safetensors header" in refusal(source, capsys)


def test_a_shard_without_one_of_its_tensors(source, weights, capsys):
    save_sharded(source, {name: tensor for name, tensor in weights.items() if name != NORM})
    assert f"1 tensors are missing: {NORM}." in refusal(source, capsys)


def test_a_tensor_of_another_name(source, weights, capsys):
    save_sharded(source, {**weights, "mlp1.4.weight": torch.ones(2)})
    assert "1 tensors do not belong to this model: mlp1.4.weight" in refusal(source, capsys)


def test_tensors_of_another_shape(source, weights, capsys):
    q_proj, k_proj = (f"{name}.weight" for name in (Q_PROJ, K_PROJ))
    save_sharded(source, {**weights, q_proj: weights[k_proj].clone(), k_proj: weights[q_proj].clone()})
    report = refusal(source, capsys)
    assert "2 tensors have a wrong shape" in report
    assert f"{k_proj} is [64, 64], the config asks for [32, 64]" in report


def test_a_tensor_of_another_dtype(source, weights, capsys):
    save_sharded(source, {**weights, NORM: weights[NORM].double()})
    assert f"1 tensors are not BF16, F16, F32: {NORM} is F64" in refusal(source, capsys)


def test_a_tensor_that_is_stored_twice(source, weights, capsys):
    second = load_file(source / SHARDS[1])
    other = next(name for name in weights if name not in second)
    save_file({**second, other: weights[other]}, source / SHARDS[1])
    assert f"stored twice, in {SHARDS[1]} and in {SHARDS[0]}: {other}" in refusal(source, capsys)


def test_an_index_that_names_an_absent_file(source, capsys):
    (source / SHARDS[1]).unlink()
    assert f"names files that are absent: {SHARDS[1]}" in refusal(source, capsys)


@pytest.mark.parametrize("name", ["../evil.safetensors", "sub/evil.safetensors", "..", "", "a\\b.safetensors"])
def test_an_index_that_leaves_the_directory(source, capsys, name):
    shutil.copy(source / SHARDS[0], source.parent / "evil.safetensors")
    index = read(source / INDEX_FILE)
    index["weight_map"][NORM] = name
    (source / INDEX_FILE).write_text(json.dumps(index))
    assert "names files that do not lie in the directory" in refusal(source, capsys)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {"a": 1}}', "\xff"])
def test_an_index_that_is_none(source, capsys, text):
    (source / INDEX_FILE).write_text(text, encoding="latin-1")
    assert INDEX_FILE in refusal(source, capsys)


def test_a_single_file_beside_the_shards(source, weights, capsys):
    save_file(weights, source / SINGLE_FILE)
    assert f"Both {SINGLE_FILE} and the files of {INDEX_FILE}" in refusal(source, capsys)


def test_pickles_without_safetensors(source, capsys):
    for name in (*SHARDS, INDEX_FILE):
        (source / name).unlink()
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    assert "loading a pickle can run any code" in refusal(source, capsys)


def test_pickles_beside_safetensors_stay_behind(source, capsys):
    (source / "optimizer.pt").write_bytes(b"pickle")
    assert not (adopt(source) / "optimizer.pt").exists()
    assert "optimizer.pt are not used" in capsys.readouterr().out


def test_no_weights_at_all(source, capsys):
    for name in (*SHARDS, INDEX_FILE):
        (source / name).unlink()
    assert "There is no safetensors file" in refusal(source, capsys)


def packed(dtype: torch.dtype = torch.uint8, **companions: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"weight": torch.zeros(64, 32, dtype=dtype), **companions}


SCALE = torch.ones(64, 4)
WORDS = torch.zeros(64, 8, dtype=torch.int32)


@pytest.mark.parametrize(
    ("said", "tensors"),
    [
        # The layer is 64 x 64. Incomplete, misshapen, or of a layout nobody reads here:
        ("weight_scale_2", packed(weight_scale=torch.ones(64, 4).to(torch.float8_e4m3fn))),
        ("weight_scale", packed()),
        ("weight_scale", packed(torch.float8_e4m3fn)),
        ("qzeros", {"qweight": WORDS, "scales": SCALE.half()}),
        ("GPTQ", {"qweight": WORDS, "g_idx": WORDS.clone()}),
        ("llm-awq", {"qweight": WORDS.to(torch.int16), "scaled_zeros": SCALE}),
        ("compressed-tensors", {"weight_packed": WORDS, "weight_global_scale": torch.ones(1)}),
        ("bitsandbytes", packed(**{"weight.absmax": SCALE, "weight.quant_state.bitsandbytes__nf4": WORDS})),
    ],
)
def test_quantised_layers_that_cannot_be_read_are_refused(source, weights, capsys, said, tensors):
    plain = {name: tensor for name, tensor in weights.items() if name != f"{Q_PROJ}.weight"}
    save_sharded(source, {**plain, **{f"{Q_PROJ}.{name}": tensor for name, tensor in tensors.items()}})
    edit(source / "config.json", quantization_config={"quant_method": "modelopt"})
    report = refusal(source, capsys)
    assert Q_PROJ in report and said in report


@pytest.mark.parametrize("variant", golden_formats())
def test_golden_quantised_checkpoints_are_adopted(golden_8b, variant, tmp_path, capsys):
    source = golden_8b / f"checkpoint_{variant}"
    quantised = [name for name in load_weights(source) if name.endswith((".weight_scale", ".qweight"))]
    assert main([str(source), "--out", str(tmp_path / "out")]) == 0
    report = capsys.readouterr().out
    assert f"{len(quantised)} layers are" in report and "dequantize=True" in report
    assert (tmp_path / "out" / "quantization_nemotron_vl.py").exists()


def test_a_config_that_announces_quantised_weights_beside_plain_ones(source, capsys):
    edit(source / "config.json", quantization_config={"quant_method": "modelopt"})
    assert "announces weights quantised by 'modelopt', but they are plain" in refusal(source, capsys)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "NemotronH_Nano_VL_V2"}, "config.json is no NemotronH_Nano_VL_V2 that can be read"),
        ({"model_type": "llava"}, "config.json is no Llama_Nemotron_Nano_VL that can be read"),
        ({"patch_size": 14}, "contradicts itself about patch_size"),
        ({"projector_hidden_size": 49}, "3 tensors have a wrong shape"),
        ({"projector_hidden_size": -1}, "projector_hidden_size must be a whole number"),
        ({"projector_hidden_size": "wide"}, "projector_hidden_size must be a whole number"),
    ],
)
def test_a_config_of_something_else(source, capsys, changes, said):
    edit(source / "config.json", **changes)
    assert said in refusal(source, capsys)


def test_a_config_of_absurd_depth_is_not_built(source, capsys):
    config = read(source / "config.json")
    config["llm_config"]["num_hidden_layers"] = 10**9
    edit(source / "config.json", **config)
    assert "llm_config.num_hidden_layers must be a whole number in 1..16777216, got 1000000000" in refusal(
        source, capsys
    )


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_missing_file(source, capsys, name):
    edit(source / "config.json", img_context_token_id=NemotronVLConfig.from_pretrained(source).image_token_id)
    (source / name).unlink()
    assert f"{name} is missing" in refusal(source, capsys)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "preprocessor_config.json"])
@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_a_broken_file(source, capsys, name, text):
    edit(source / "config.json", img_context_token_id=NemotronVLConfig.from_pretrained(source).image_token_id)
    (source / name).write_text(text)
    assert name in refusal(source, capsys)


def test_a_preprocessor_that_cannot_cut_tiles(source, capsys):
    edit(source / "preprocessor_config.json", image_size=60)
    assert "preprocessor_config.json cannot be used" in refusal(source, capsys)


def test_a_tokenizer_of_another_checkpoint(source, capsys):
    edit(source / "config.json", img_context_token_id=5)
    assert "config.json's img_context_token_id is 5" in refusal(source, capsys)


@pytest.mark.parametrize("token", [{"id": 3}, 3, {"content": None}, ["x"]])
def test_a_special_token_without_text(source, capsys, token):
    edit(source / "tokenizer_config.json", pad_token=token)
    assert "a special token without text" in refusal(source, capsys)


def test_a_tokenizer_without_image_tokens(source, capsys):
    edit(source / "config.json", img_context_token_id=NemotronVLConfig.from_pretrained(source).image_token_id)
    edit(source / "tokenizer.json", added_tokens=[{"id": 0, "content": "<|begin_of_text|>"}])
    edit(source / "tokenizer_config.json", added_tokens_decoder=None)
    assert "The tokenizer has no <image> token" in refusal(source, capsys)


def test_a_source_that_is_no_directory(tmp_path, capsys):
    with pytest.raises(ValueError, match="absent does not exist. Download the checkpoint first"):
        main([str(tmp_path / "absent"), "--check"])
    assert capsys.readouterr().out == ""


def test_out_is_asked_for():
    with pytest.raises(SystemExit) as failure:
        main(["anywhere"])
    assert failure.value.code == 2


def test_a_directory_with_other_files_is_left_alone_unless_forced(source, capsys):
    out = source.parent / "adopted"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds files of something else: thesis.txt"):
        main([str(source), "--out", str(out)])
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    adopt(source, "--force")
    assert (out / "thesis.txt").read_text() == "mine"


def test_other_weights_in_the_directory_are_refused_even_when_forced(source, capsys):
    out = source.parent / "adopted"
    out.mkdir()
    (out / SINGLE_FILE).write_bytes(b"")
    with pytest.raises(ValueError, match="holds other weights, which might be loaded instead"):
        main([str(source), "--out", str(out), "--force"])


def test_the_source_itself_is_no_place_to_write(source, capsys):
    with pytest.raises(ValueError, match="--out is the source itself"):
        main([str(source), "--out", str(source / "."), "--force"])


# What the result is good for

DOORS = """
import json, sys
from pathlib import Path
import transformers
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer

found = {}
for name, folder, cases in json.loads(sys.argv[1]):
    trust = {"trust_remote_code": True}
    auto_map = json.loads((Path(folder) / "config.json").read_text())["auto_map"]
    doors = [getattr(transformers, door) for door in auto_map if hasattr(transformers, door)]  # 4.57 lacks the last
    model = AutoModel.from_pretrained(folder, **trust).eval()
    image_processor = AutoImageProcessor.from_pretrained(folder, **trust)
    tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
    answers = []
    for case in cases:
        pictures = [Image.open(path) for path in case["images"]]
        images = image_processor(pictures) if pictures else {"pixel_values": None}
        options = {"do_sample": False, "max_new_tokens": case["max_new_tokens"]}
        history = [tuple(turn) for turn in case["history"] or []] or None
        answers.append(model.chat(
            tokenizer, question=case["question"], generation_config=options, history=history,
            system_prompt=case["system_prompt"], **images))
    found[name] = {
        "classes": {door.__name__: type(door.from_pretrained(folder, **trust)).__name__ for door in doors},
        "processor": type(AutoProcessor.from_pretrained(folder, **trust)).__name__,
        "image_processor": type(image_processor).__name__,
        "max_num_tiles": image_processor.max_num_tiles,
        "pad": tokenizer.pad_token,
        "answers": answers,
    }
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def opened(published, request, tmp_path_factory) -> dict[str, dict]:
    """What a fresh process finds behind every door of adopted checkpoints: the tiny one and the golden ones."""
    work = tmp_path_factory.mktemp("adopted")
    question = {"question": "Hi", "images": [], "system_prompt": None, "history": None, "max_new_tokens": 2}
    jobs = [("tiny", published, [question])]
    if (GOLDEN / "8b-v1").is_dir():
        golden = request.getfixturevalue("golden_8b")
        cases = list(read_golden_cases(golden).values())
        for case in cases:
            case["images"] = [str(golden / image) for image in case["images"]]
        jobs.append(("golden", golden / "checkpoint", cases))
        jobs += [(folder.name, folder, cases[:2]) for folder in golden.glob("checkpoint_*")]
    for name, folder, _ in jobs:
        assert main([str(folder), "--out", str(work / f"{name}-8B.v1"), "--copy"]) == 0
    argument = json.dumps([(name, str(work / f"{name}-8B.v1"), cases) for name, _, cases in jobs])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(work / "modules")}
    command = [sys.executable, "-c", DOORS, argument]
    run = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-5000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["tiny", "golden"])
def test_every_door_of_an_adopted_checkpoint_opens(opened, published, request, name):
    folder = published if name == "tiny" else request.getfixturevalue("golden_8b") / "checkpoint"
    found = opened[name]
    assert found["classes"].pop("AutoConfig") == "NemotronVLConfig"
    assert {"AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText"} <= found["classes"].keys()
    assert set(found["classes"].values()) == {"Llama_Nemotron_Nano_VL"}
    assert found["processor"] == "NemotronVLProcessor"
    assert found["image_processor"] == "NemotronVLImageProcessor"
    assert found["max_num_tiles"] == read(folder / "preprocessor_config.json")["max_num_tiles"]
    assert found["pad"] == "<|finetune_right_pad_id|>"


def test_an_adopted_checkpoint_chats_as_the_golden_says(opened, golden_8b):
    assert opened["golden"]["answers"] == [case["answer"] for case in read_golden_cases(golden_8b).values()]


@pytest.mark.parametrize("variant", golden_formats())
def test_an_adopted_quantised_checkpoint_chats_as_the_golden_says(opened, golden_8b, variant):
    expected = read(golden_8b / f"expected_{variant}.json")
    assert opened[f"checkpoint_{variant}"]["answers"] == [
        expected[name] for name in list(read_golden_cases(golden_8b))[:2]
    ]
