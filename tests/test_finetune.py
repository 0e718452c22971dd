"""Fine-tuning: what carries loss, which parts move, and that an interrupted run ends where an unbroken one does."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

from tools import ROOT
from tools.chat import load
from tools.tiny_checkpoint import make_tiny_checkpoint
from training.batches import IGNORE
from training.conversations import Collator, DrawnDocuments, JsonLines
from training.finetune import Recipe, finetune, read_recipe


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("finetune") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    Image.new("RGB", (70, 40), "white").save(folder / "page.png")
    picture = {"type": "image", "image": "page.png"}
    lines = []
    for number in range(6):
        question = [picture, {"type": "text", "text": f"Which page is it? {number}"}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": f"Page {number}."}]
        lines.append(json.dumps({"messages": messages}))
    (folder / "train.jsonl").write_text("\n".join(lines))
    return folder / "train.jsonl"


def recipe(checkpoint: Path, data: Path, output: Path, **changes) -> Recipe:
    trainer = {"per_device_train_batch_size": 2, "max_steps": 3, "learning_rate": 1e-2, "logging_steps": 1}
    trainer |= {"save_steps": 1, "use_cpu": True, "seed": 1, "disable_tqdm": True} | changes.pop("trainer", {})
    return Recipe(model=str(checkpoint), output=str(output), data=str(data), trainer=trainer, **changes)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def test_only_assistant_tokens_are_labels(checkpoint, data):
    _, processor = load(checkpoint)
    dataset = JsonLines(data)
    batch = Collator(processor, max_length=2048)([dataset[0], dataset[3]])
    said = [processor.tokenizer.decode(row[row != IGNORE]) for row in batch["labels"]]
    assert said == ["Page 0.<|eot_id|>", "Page 3.<|eot_id|>"]


def test_long_conversations_are_refused_with_both_numbers(checkpoint, data):
    _, processor = load(checkpoint)
    with pytest.raises(ValueError, match=r"\d+ tokens, more than max_length=5"):
        Collator(processor, max_length=5)([JsonLines(data)[0]])


def test_drawn_documents_are_conversations_with_pictures():
    messages = DrawnDocuments(4)[1]
    assert messages[0]["role"] == "user" and messages[-1]["role"] == "assistant"
    assert DrawnDocuments(4)[1][-1] == messages[-1]


def test_frozen_parts_stay_and_the_result_loads(checkpoint, data, tmp_path):
    output = finetune(recipe(checkpoint, data, tmp_path / "out", train=["projector"]))
    before, after = weights(checkpoint), weights(output)
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name].float(), after[name].float())}
    assert moved == {"mlp1"}
    load(output)
    assert (output / "loss.csv").read_text().count("\n") == 4


@pytest.mark.skipif(not hasattr(transformers, "NemotronHForCausalLM"), reason="transformers 4.57 has no NemotronH")
def test_the_12b_v2_learns_as_well(tiny_v2_checkpoint, data, tmp_path):
    output = finetune(recipe(tiny_v2_checkpoint, data, tmp_path / "out", trainer={"max_steps": 1}))
    before, after = weights(tiny_v2_checkpoint), weights(output)
    assert before.keys() == after.keys()
    still = {name for name in before if torch.equal(before[name].float(), after[name].float())}
    assert {name.rsplit(".", 1)[-1] for name in still} == {"norm_mean", "norm_std"}
    load(output)


def test_an_interrupted_run_ends_where_an_unbroken_one_does(checkpoint, data, tmp_path):
    whole = finetune(recipe(checkpoint, data, tmp_path / "whole"))
    broken = recipe(checkpoint, data, tmp_path / "broken")
    for later in (tmp_path / "whole" / "checkpoints").glob("checkpoint-1"):
        target = tmp_path / "broken" / "checkpoints" / later.name
        target.parent.mkdir(parents=True)
        later.rename(target)
    resumed = finetune(broken)
    expected, found = weights(whole), weights(resumed)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)


def test_every_recipe_is_valid():
    recipes = sorted((ROOT / "training" / "recipes").glob("*.yaml"))
    assert len(recipes) == 5
    for path in recipes:
        assert read_recipe(path, ["output=elsewhere"]).output == "elsewhere"
    with pytest.raises(ValueError, match="unknown keys: learn_rate"):
        read_recipe(recipes[0], ["learn_rate=1"])
