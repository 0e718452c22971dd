"""A random checkpoint of any size and format loads, strictly, as a published one does."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from nemotron_vl.checkpoint import INDEX_FILE, read_header
from nemotron_vl.configuration_nemotron_vl import NemotronVLConfig
from nemotron_vl.modeling_nemotron_vl import Llama_Nemotron_Nano_VL
from nemotron_vl.quantization_nemotron_vl import packed_linears
from safetensors.torch import load_file

from tools import ROOT, random_checkpoint
from tools.random_checkpoint import ShardWriter, make_vocabulary_tokenizer, random_tensors, write_random_checkpoint
from tools.tiny_checkpoint import make_config, make_tokenizer
from tools.weights import check_weights

PACKED = {"bf16": set(), "nvfp4": {"NVFP4"}, "fp8": {"FP8"}, "awq": {"AWQ GEMM"}}


@pytest.mark.parametrize("format_name", PACKED)
def test_a_random_checkpoint_fits_the_model_and_gives_finite_logits(tmp_path: Path, inputs: dict, format_name: str):
    config = make_config(make_tokenizer())
    num_bytes = write_random_checkpoint(tmp_path / "made", format_name, config, group_size=16)
    report = check_weights(tmp_path / "made", config)
    assert not report.problems
    assert num_bytes == sum(header.num_bytes for header in report.tensors.values())
    model = Llama_Nemotron_Nano_VL.from_pretrained(tmp_path / "made", torch_dtype="auto").eval()
    assert {layer.format.name for _, layer in packed_linears(model)} == PACKED[format_name]
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        logits = model(**inputs | {"pixel_values": inputs["pixel_values"].bfloat16()}).logits
    assert torch.isfinite(logits).all() and float(logits.std()) > 0


def test_every_full_size_format_has_the_names_of_the_published_index(monkeypatch: pytest.MonkeyPatch):
    config = NemotronVLConfig.from_pretrained(ROOT)
    with torch.device("meta"):
        model = Llama_Nemotron_Nano_VL(config)
    published = set(json.loads((ROOT / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"])
    monkeypatch.setattr(random_checkpoint, "draw", lambda name, shape, *_: torch.empty(shape, device="meta"))
    assert {name for name, _ in random_tensors(model, "bf16")} == published


def test_the_tokenizer_has_the_control_tokens_in_their_places():
    tokenizer = make_vocabulary_tokenizer()
    settings = json.loads((ROOT / "config.json").read_text(encoding="utf-8"))
    assert tokenizer.token_to_id("<image>") == settings["img_context_token_id"]
    assert tokenizer.token_to_id("<|begin_of_text|>") == settings["llm_config"]["bos_token_id"]
    assert tokenizer.token_to_id("<|eot_id|>") == settings["llm_config"]["eos_token_id"]
    assert tokenizer.decode(tokenizer.encode("Total: 72.13 <image>").ids) == "Total: 72.13 "
    assert all(tokenizer.id_to_token(number) is not None for number in range(tokenizer.get_vocab_size()))


def test_tensors_are_spread_over_files_that_other_programs_read(tmp_path: Path):
    tensors = {f"layer.{number}": torch.randn(3, 5 + number, dtype=torch.bfloat16) for number in range(7)}
    tensors["scalar"] = torch.tensor(0.5)
    writer = ShardWriter(tmp_path, max_shard_size=1e-7)  # 100 bytes: two tensors a file
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    assert writer.finish() == sum(tensor.nbytes for tensor in tensors.values())
    index = json.loads((tmp_path / INDEX_FILE).read_text(encoding="utf-8"))
    files = sorted(tmp_path.glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == [file.name for file in files] and len(files) > 2
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert all(read_header(file) for file in files)


def test_a_folder_is_removed_when_writing_ends_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(random_checkpoint, "encode", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_random_checkpoint(tmp_path / "made", "nvfp4", make_config(make_tokenizer()))
    assert not (tmp_path / "made").exists()


def test_a_folder_that_holds_something_is_refused_and_kept(tmp_path: Path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty; name a new folder"):
        write_random_checkpoint(tmp_path)
    assert (tmp_path / "mine.txt").exists()


def test_a_disk_that_is_too_small_is_named_with_both_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=5_000_000_000)
    monkeypatch.setattr(random_checkpoint.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match=r"needs 17\.4 GB, and its disk has 5\.0 GB free"):
        write_random_checkpoint(tmp_path / "made")
