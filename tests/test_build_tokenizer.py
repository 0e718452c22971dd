"""The 8B's tokenizer, built from Meta's package."""

import base64
import json
import random
from pathlib import Path

import pytest
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tools import ROOT, build_tokenizer


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files the command writes; asserts by itself that tokenizer.json has the published bytes."""
    pytest.importorskip("llama_models", reason="pip install --no-deps llama-models")
    folder = tmp_path_factory.mktemp("tokenizer")
    assert build_tokenizer.main(["--out", str(folder)]) == 0
    return folder


def test_bytes_are_spelled_as_byte_level_bpe_spells_them():
    characters = build_tokenizer.byte_characters()
    assert len(set(characters)) == 256
    assert set(characters) == set(pre_tokenizers.ByteLevel.alphabet())
    assert (characters[ord("A")], characters[ord(" ")], characters[ord("\n")]) == ("A", "\u0120", "\u010a")


def test_merges_are_all_splits_of_a_token_by_its_rank():
    ranks = {b"a": 0, b"b": 1, b"ab": 2, b"ba": 3, b"aba": 4}
    vocabulary, merges = build_tokenizer.vocabulary_and_merges(ranks)
    assert vocabulary == {"a": 0, "b": 1, "ab": 2, "ba": 3, "aba": 4}
    assert merges == [("a", "b"), ("b", "a"), ("a", "ba"), ("ab", "a")]


def test_special_tokens_have_the_ids_of_llama_and_of_the_released_model():
    ids = {token: 128000 + number for number, token in enumerate(build_tokenizer.special_tokens())}
    assert len(ids) == 265
    assert ids["<|finetune_right_pad_id|>"] == 128004
    assert ids["<|reserved_special_token_2|>"] == 128005
    assert ids["<|eot_id|>"] == 128009
    assert ids["<|reserved_special_token_247|>"] == 128255
    assert (ids["<image>"], ids["</box>"]) == (128256, 128264)
    names = json.loads((ROOT / "tokenizer_config.json").read_text())["additional_special_tokens"]
    assert names == build_tokenizer.IMAGE_TOKENS


def test_another_tokenizer_model_is_refused_and_nothing_is_written(tmp_path: Path):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(b"".join(base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256)))
    with pytest.raises(ValueError, match="256 ranks"):
        build_tokenizer.main(["--out", str(tmp_path / "out"), "--model", str(file)])
    with pytest.raises(ValueError, match="17211566"):
        build_tokenizer.check_published(b"{}")
    assert not (tmp_path / "out").exists()


def test_the_other_tokenizer_files_are_copied_but_name_no_code(tmp_path: Path):
    (tmp_path / "chat_template.jinja").write_text("mine")
    build_tokenizer.copy_other_files(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == "mine"
    copied = json.loads((tmp_path / "tokenizer_config.json").read_text())
    ours = json.loads((ROOT / "tokenizer_config.json").read_text())
    assert ours.pop("auto_map") and copied == ours


@pytest.mark.slow
def test_the_published_bytes_are_reached(built: Path):
    assert (built / "tokenizer.json").stat().st_size == build_tokenizer.PUBLISHED_SIZE
    build_tokenizer.check_published((built / "tokenizer.json").read_bytes())
    tokenizer = PreTrainedTokenizerFast.from_pretrained(built)
    assert tokenizer("Hi")["input_ids"] == [128000, 13347]
    assert tokenizer.convert_tokens_to_ids(["<image>", "</box>"]) == [128256, 128264]
    assert tokenizer.eos_token_id == 128009
    assert tokenizer.pad_token_id == 128004


@pytest.mark.slow
def test_ids_equal_tiktoken_on_a_broad_sample(built: Path):
    tiktoken = pytest.importorskip("tiktoken")
    ranks = build_tokenizer.read_ranks(build_tokenizer.find_tokenizer_model())
    reference = tiktoken.Encoding("llama3", pat_str=build_tokenizer.PATTERN, mergeable_ranks=ranks, special_tokens={})
    tokenizer = PreTrainedTokenizerFast.from_pretrained(built)
    choose = random.Random(0)
    texts = [file.read_text(encoding="utf-8")[:4000] for file in sorted(ROOT.glob("*.py"))]
    scripts = [(0x20, 0x7F), (0xA0, 0x250), (0x370, 0x400), (0x400, 0x500), (0x600, 0x700), (0x3040, 0x30FF)]
    scripts += [(0x4E00, 0x9FA5), (0xAC00, 0xD7A3), (0x1F300, 0x1F64F)]
    for low, high in scripts:
        texts += ["".join(chr(choose.randrange(low, high)) for _ in range(40)) for _ in range(200)]
    texts += ["".join(choose.choices("ab 019.,-\n\t'S", k=30)) for _ in range(500)]
    for text in texts:
        # Control tokens in these texts are spelled out: the reference knows none.
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ids == reference.encode(text, disallowed_special=())
