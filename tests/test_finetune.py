"""Fine-tuning: what carries loss, which parts move, that an interrupted run ends where an unbroken one does, and that
two processes do what one does."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from tools import ROOT
from tools.chat import load
from tools.quantize import quantize_model
from tools.quantize import save as save_quantised
from tools.tiny_checkpoint import make_tiny_checkpoint
from training.conversations import IGNORE_INDEX, Collator, JsonLines, lengths_of
from training.drawn_documents import DrawnDocuments
from training.finetune import FIRST_REHEARSAL, Recipe, finetune, read_recipe, training_arguments, training_data
from training.trainer import LengthGroups, StopOnSignal

RECIPES = sorted((ROOT / "training" / "recipes").glob("*.yaml"))
LORA = {"r": 4, "lora_alpha": 8}
MODULE = "training.finetune"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("finetune") / "tiny")


@pytest.fixture(scope="module")
def processor(checkpoint):
    return load(checkpoint)[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Eight conversations of different lengths; the fourth has no image."""
    folder = tmp_path_factory.mktemp("data")
    Image.new("RGB", (70, 40), "white").save(folder / "page.png")
    image = {"type": "image", "image": "page.png"}
    lines = []
    for number in range(8):
        text = {"type": "text", "text": f"Which page is it? {number}" + " Please." * (number % 3)}
        question = [text] if number == 3 else [image, text]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": f"Page {number}."}]
        lines.append(json.dumps({"messages": messages}))
    (folder / "train.jsonl").write_text("\n".join(lines))
    return folder / "train.jsonl"


def recipe(checkpoint: Path, data: Path, output: Path, **changes) -> Recipe:
    trainer = {"per_device_train_batch_size": 2, "max_steps": 6, "learning_rate": 1e-2, "logging_steps": 1}
    trainer |= {"save_steps": 1, "use_cpu": True, "seed": 1, "disable_tqdm": True} | changes.pop("trainer", {})
    return Recipe(model=str(checkpoint), output=str(output), data=str(data), trainer=trainer, **changes)


@pytest.fixture(scope="module")
def whole(checkpoint, data, tmp_path_factory) -> Path:
    """An unbroken run: six steps, one and a half epochs."""
    return finetune(recipe(checkpoint, data, tmp_path_factory.mktemp("runs") / "whole", max_shard_size="100KB"))


@pytest.fixture(autouse=True)
def no_precision_left_behind():
    """transformers 4.57 leaves the precision of a run where the next one in the same process finds it."""
    yield
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    AcceleratorState._reset_state(reset_partial_state=True)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {name: weight for file in directory.glob("model*.safetensors") for name, weight in load_file(file).items()}


def assert_same_weights(found: Path, expected: Path, atol: float = 1e-6) -> None:
    found_weights, expected_weights = weights(found), weights(expected)
    assert found_weights.keys() == expected_weights.keys()
    for name, weight in expected_weights.items():
        torch.testing.assert_close(
            found_weights[name], weight, rtol=1e-5, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def moved_parts(before: Path, after: Path) -> set[str]:
    old, new = weights(before), weights(after)
    return {name.split(".")[0] for name in old if not torch.equal(old[name].float(), new[name].float())}


def losses(output: Path) -> list[float]:
    with (output / "loss.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


# --- data ---


def test_only_assistant_tokens_are_labels(processor, data):
    dataset = JsonLines(data)
    batch = Collator(processor, max_length=2048)([dataset[0], dataset[5]])
    said = [processor.tokenizer.decode(row[row != IGNORE_INDEX]) for row in batch["labels"]]
    assert said == ["Page 0.<|eot_id|>", "Page 5.<|eot_id|>"]
    assert torch.equal(
        batch["labels"][batch["labels"] != IGNORE_INDEX], batch["input_ids"][batch["labels"] != IGNORE_INDEX]
    )


def test_every_turn_of_the_assistant_carries_loss(processor):
    turns = [("user", "One?"), ("assistant", "Un."), ("user", "Two?"), ("assistant", "Deux.")]
    batch = Collator(processor, max_length=2048)([[{"role": role, "content": text} for role, text in turns]])
    assert (
        processor.tokenizer.decode(batch["labels"][batch["labels"] != IGNORE_INDEX]) == "Un.<|eot_id|>Deux.<|eot_id|>"
    )


def test_images_may_stand_in_a_list_beside_the_messages(data, tmp_path):
    shutil.copy(data.with_name("page.png"), tmp_path)
    question = [{"type": "image"}, {"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "A page."}]
    (tmp_path / "train.jsonl").write_text(json.dumps({"images": ["page.png"], "messages": messages}))
    assert JsonLines(tmp_path / "train.jsonl")[0][0]["content"][0]["image"] == str(tmp_path / "page.png")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "line 2: "),
        ('{"text": "hello"}', "line 2: needs an object with `messages`"),
        ('{"messages": [{"role": "user", "content": "Hello?"}]}', "line 2: no message of the assistant"),
        ('{"messages": [{"role": "user", "content": [{"type": "image", "image": "no.png"}]}]}', "'no.png' is no file"),
        ('{"messages": [{"role": "user", "content": [{"type": "video"}]}]}', "line 2: .*'video'"),
        (
            '{"images": ["a"], "messages": [{"role": "assistant", "content": "Hello."}]}',
            "line 2: `images` names 1 more images",
        ),
        ("", "holds no conversation"),
    ],
)
def test_lines_that_cannot_be_trained_on_are_refused_with_their_number(tmp_path, line, reason):
    path = tmp_path / "train.jsonl"
    path.write_text(f"\n{line}\n")
    with pytest.raises(ValueError, match=reason):
        JsonLines(path)


def test_a_file_that_is_no_image_is_refused_with_its_line(data, tmp_path):
    (tmp_path / "page.png").write_text("no image")
    shutil.copy(data, tmp_path)
    with pytest.raises(ValueError, match=r"line 1: the image .*page\.png cannot be opened"):
        JsonLines(tmp_path / "train.jsonl").outline(0)


def test_lengths_are_known_before_images_are_opened(processor, data):
    dataset = JsonLines(data)
    exact = [Collator(processor, 2048)([dataset[index]])["input_ids"].shape[1] for index in range(len(dataset))]
    estimated = lengths_of(map(dataset.outline, range(len(dataset))), processor, max_length=2048)
    assert all(abs(guess - true) <= 4 for guess, true in zip(estimated, exact, strict=True))


def test_long_conversations_are_refused_with_both_numbers(processor, data):
    with pytest.raises(ValueError, match=r"\d+ tokens, more than max_length=5"):
        Collator(processor, max_length=5)([JsonLines(data)[0]])
    with pytest.raises(ValueError, match=r"jsonl, line 1 has about \d+ tokens, \d+ of them .* max_length=5"):
        lengths_of([JsonLines(data).outline(0)], processor, max_length=5)


def test_drawn_documents_are_conversations_with_images():
    dataset = DrawnDocuments(4)
    messages = dataset[1]
    assert messages[0]["role"] == "user" and messages[-1]["role"] == "assistant"
    assert dataset[1][-1] == messages[-1]
    images = [part["image"] for part in messages[0]["content"] if part["type"] == "image"]
    assert dataset.outline(1).image_sizes == [image.size[::-1] for image in images]
    assert dataset.outline(1).num_messages == len(messages)


def test_rehearsal_mixes_in_as_many_drawn_documents_as_conversations_of_ones_own(checkpoint, data):
    mixed = recipe(checkpoint, data, Path("out"), rehearsal=20)
    dataset, outlines = training_data(mixed)
    own, drawn = JsonLines(data), DrawnDocuments(20, FIRST_REHEARSAL)
    assert len(dataset) == len(outlines) == 3 * len(own) + len(drawn)  # eight, until they are at least twenty
    assert [dataset[index] for index in (0, 8, 17)] == [own[0], own[0], own[1]]
    assert dataset[24][-1] == drawn[0][-1] and outlines[24] == drawn.outline(0)
    assert len(training_data(recipe(checkpoint, data, Path("out")))[0]) == len(own)
    with pytest.raises(ValueError, match="leave it out with documents"):
        recipe(checkpoint, "documents", Path("out"), rehearsal=20)


def test_nanos_recipe_for_a_few_documents_rehearses():
    assert read_recipe(ROOT / "training" / "recipes" / "lora-nano.yaml", []).rehearsal > 0


def test_a_step_holds_conversations_of_like_length_in_another_order_each_epoch():
    lengths = [10 * (index % 7) for index in range(23)]
    sampler = LengthGroups(lengths, step_size=4, seed=0)
    first = list(sampler)
    assert list(sampler) == first and sorted(first) == list(range(23))
    spreads = [[lengths[index] for index in first[start : start + 4]] for start in range(0, 20, 4)]
    assert sum(max(spread) - min(spread) for spread in spreads) <= 60 < sum(lengths[index] for index in first[:20])
    assert [max(spread) for spread in spreads] != sorted((max(spread) for spread in spreads), reverse=True)
    sampler.set_epoch(1)
    assert list(sampler) != first


def test_a_batch_without_images_reaches_the_tower_and_keeps_its_loss(checkpoint, processor, data):
    dataset = JsonLines(data)
    model, _ = load(checkpoint)
    found = []
    for always_images in (False, True):
        model.zero_grad()
        loss = model(**Collator(processor, 2048, always_images)([dataset[3], dataset[3][:2]])).loss
        loss.backward()
        found.append((loss.item(), model.language_model.model.layers[0].mlp.up_proj.weight.grad.clone()))
        assert all((parameter.grad is not None) == always_images for parameter in model.mlp1.parameters())
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)
    assert all(not parameter.grad.any() for parameter in model.mlp1.parameters())


# --- runs ---


@pytest.mark.slow
def test_the_result_is_sharded_and_loads_in_a_fresh_process(whole, processor):
    assert len(list(whole.glob("model-*-of-*.safetensors"))) > 1
    code = (
        "import sys; from transformers import AutoModel, AutoProcessor; from PIL import Image\n"
        "model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "pixels = processor.image_processor(Image.new('RGB', (70, 40)), return_tensors='pt')\n"
        "model.chat(processor, question='What?', generation_config={'max_new_tokens': 2}, **pixels)\n"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(whole / "modules")}
    subprocess.run([sys.executable, "-c", code, whole], cwd=whole, env=environment, check=True)


def test_the_loss_is_logged_step_by_step(whole):
    with (whole / "loss.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])


def test_the_loss_is_drawn_and_logged_for_tensorboard(whole):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    assert Image.open(whole / "loss.png").size[0] > 300
    assert list((whole / "checkpoints").rglob("events.out.tfevents*"))


@pytest.mark.parametrize("step", [2, 5])
def test_an_interrupted_run_ends_where_an_unbroken_one_does(whole, checkpoint, data, tmp_path, step):
    broken = recipe(checkpoint, data, tmp_path / "broken", max_shard_size="100KB")
    checkpoints = tmp_path / "broken" / "checkpoints"
    shutil.copytree(whole / "checkpoints" / f"checkpoint-{step}", checkpoints / f"checkpoint-{step}")
    # Killed while it wrote the next one: that one is not whole.
    shutil.copytree(whole / "checkpoints" / f"checkpoint-{step + 1}", checkpoints / f"checkpoint-{step + 1}")
    state = checkpoints / f"checkpoint-{step + 1}" / "trainer_state.json"
    state.write_text(state.read_text()[:100])
    resumed = finetune(broken)
    assert_same_weights(resumed, whole)
    assert (resumed / "loss.csv").read_text() == (whole / "loss.csv").read_text()


def start(settings: Recipe, folder: Path, *program: str) -> subprocess.Popen:
    """Run a recipe in a process of its own, which reports every step."""
    (folder / "settings.json").write_text(json.dumps(vars(settings)))  # JSON is YAML
    command = [sys.executable, "-u", *(program or ("-m", MODULE)), folder / "settings.json"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)


def stop_after_a_step(process: subprocess.Popen, send: Callable[[], None]) -> str:
    """Send a signal when the first step has been logged, and return the output up to the end of the process."""
    said = ""
    for line in process.stdout:
        if "'loss'" in line and "'loss'" not in said:
            send()
        said += line
    process.wait()
    return said


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, (130, -signal.SIGINT)), (signal.SIGTERM, (143,))])
def test_a_signal_before_the_first_checkpoint_loses_nothing(checkpoint, data, tmp_path, number, status):
    steps = {"max_steps": 60, "save_steps": 1000, "logging_steps": 1}
    broken = recipe(checkpoint, data, tmp_path / "broken", trainer=steps)
    process = start(broken, tmp_path)
    said = stop_after_a_step(process, lambda: process.send_signal(number))
    assert process.returncode in status, said
    (line,) = [line for line in said.splitlines() if line.startswith("Stopped at step ")]
    step = int(line.split()[3])
    assert line.startswith(f"Stopped at step {step} of 60 with a checkpoint in ")
    assert line.endswith("the same command goes on from there.") and 0 < step < 60
    assert [path.name for path in (tmp_path / "broken" / "checkpoints").iterdir()] == [f"checkpoint-{step}"]
    resumed = finetune(broken)
    unbroken = finetune(recipe(checkpoint, data, tmp_path / "whole", trainer=steps))
    assert_same_weights(resumed, unbroken)
    assert (resumed / "loss.csv").read_text() == (unbroken / "loss.csv").read_text()


@pytest.mark.slow
def test_two_processes_stop_after_the_same_step(checkpoint, data, tmp_path):
    broken = recipe(checkpoint, data, tmp_path / "broken", trainer=PLAIN | {"max_steps": 200, "save_steps": 1000})
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", MODULE)
    process = start(broken, tmp_path, *launcher)
    said = stop_after_a_step(process, lambda: os.killpg(process.pid, signal.SIGINT))  # as a terminal does
    assert said.count("Stopped at step ") == 1, said
    assert process.returncode and len(list((tmp_path / "broken" / "checkpoints").iterdir())) == 1


def test_a_signal_is_handled_as_before_when_training_is_over(checkpoint, data, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    finetune(recipe(checkpoint, data, tmp_path, trainer={"max_steps": 1}))
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_ctrl_c_ends_at_once():
    stop = StopOnSignal()
    with stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # the same press, passed on by a launcher
        stop.received_at -= 2 * StopOnSignal.SAME_PRESS_S
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_recipes_save_several_times_in_a_short_run():
    for name in ("nano", "lora-nano", "lora-8b"):
        trainer = read_recipe(ROOT / "training" / "recipes" / f"{name}.yaml", []).trainer
        assert trainer["save_steps"] <= 0.1  # a share of all steps


def test_another_recipe_does_not_go_on_with_a_run(whole, checkpoint, data):
    with pytest.raises(ValueError, match="run by another recipe; different are train, max_shard_size"):
        finetune(recipe(checkpoint, data, whole, train=["language"]))


BROKEN_LINE = "the fourth line is cut off"
MISTAKES = {
    "a wrong data path": {"data": "nowhere.jsonl"},
    "a broken JSON line": {"data": BROKEN_LINE},
    "a conversation that is too long": {"max_length": 5},
    "a wrong model path": {"model": "nowhere/model"},
    "an unknown trainer key": {"trainer": {"learn_rate": 1.0}},
    "a trainer value that is none": {"trainer": {"lr_scheduler_type": "cosin"}},
    "bf16 refused": {"trainer": {"bf16": True, "use_cpu": False}},
    "an optimizer that is not installed": {"trainer": {"optim": "apollo_adamw"}},
    "an unknown LoRA key": {"lora": {"rank": 4}},
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_failed_run_does_not_block_its_output_folder(checkpoint, data, tmp_path, mistake):
    if "lora" in MISTAKES[mistake]:
        pytest.importorskip("peft", reason="pip install peft")
    output, changes = tmp_path / "out", dict(MISTAKES[mistake])
    if changes.get("data") == BROKEN_LINE:
        lines = data.read_text().splitlines()
        changes["data"] = data.with_name("broken.jsonl")
        changes["data"].write_text("\n".join([*lines[:3], lines[3][:40]]))
    mistaken = recipe(
        changes.pop("model", checkpoint), changes.pop("data", data), output, **{"trainer": {"max_steps": 1}, **changes}
    )
    with pytest.raises((ValueError, OSError, ImportError)):
        finetune(mistaken)
    if mistake != "an optimizer that is not installed":  # found when training begins
        assert not output.exists()
    assert finetune(recipe(checkpoint, data, output, trainer={"max_steps": 1})) == output


@pytest.mark.parametrize("part", ["tower", "projector", "language"])
def test_frozen_parts_stay(checkpoint, data, tmp_path, part):
    output = finetune(recipe(checkpoint, data, tmp_path, train=[part], trainer={"max_steps": 1}))
    name = {"tower": "vision_model", "projector": "mlp1", "language": "language_model"}[part]
    assert moved_parts(checkpoint, output) == {name}


def test_each_part_has_its_learning_rate(checkpoint, data, tmp_path):
    rates = {"tower": 0.0, "projector": 1e-2}
    trainer = {"max_steps": 1, "learning_rate": 0.0, "weight_decay": 0.1}
    output = finetune(recipe(checkpoint, data, tmp_path, learning_rates=rates, trainer=trainer))
    assert moved_parts(checkpoint, output) == {"mlp1"}


@pytest.mark.slow
def test_checkpointing_and_bfloat16_learn_the_same(whole, checkpoint, data, tmp_path):
    cheap = {"gradient_checkpointing": True}
    assert_same_weights(finetune(recipe(checkpoint, data, tmp_path / "saved", trainer=cheap)), whole, atol=1e-4)
    rounded = finetune(recipe(checkpoint, data, tmp_path / "rounded", trainer={"bf16": True}))
    assert losses(rounded) != losses(whole)
    assert losses(rounded) == pytest.approx(losses(whole), rel=0.05)


@pytest.mark.skipif(not hasattr(transformers, "NemotronHForCausalLM"), reason="transformers 4.57 has no NemotronH")
def test_the_12b_v2_learns_as_well(tiny_v2_checkpoint, data, tmp_path):
    output = finetune(recipe(tiny_v2_checkpoint, data, tmp_path, trainer={"max_steps": 1}))
    assert moved_parts(tiny_v2_checkpoint, output) == {"vision_model", "mlp1", "language_model"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_runs(path, checkpoint, data, tmp_path):
    if read_recipe(path, []).lora:
        pytest.importorskip("peft", reason="pip install peft")
    changes = [f"model={checkpoint}", f"output={tmp_path}", f"data={data}", "trainer.max_steps=1"]
    changes += ["trainer.use_cpu=true", "trainer.disable_tqdm=true", "trainer.per_device_train_batch_size=1"]
    changed = read_recipe(path, [*changes, "trainer.gradient_accumulation_steps=2", "trainer.warmup_steps=0"])
    output = finetune(changed)
    names = {"tower": "vision_model", "projector": "mlp1", "language": "language_model"}
    assert moved_parts(checkpoint, output) == {names[part] for part in changed.train}


@pytest.mark.parametrize(
    ("text", "says"),
    [("model: [nano", "is not YAML"), ("- model", "must hold keys and values"), ("", "must hold keys")],
)
def test_a_recipe_that_is_no_yaml_mapping_is_named(tmp_path, text, says):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"recipe.yaml {says}"):
        read_recipe(tmp_path / "recipe.yaml", [])


def test_wrong_recipes_are_refused():
    with pytest.raises(ValueError, match=r"unknown key learn_rate; .* Did you mean learning_rates\?"):
        read_recipe(RECIPES[0], ["learn_rate=1"])
    with pytest.raises(ValueError, match="KEY=VALUE, got 'train'"):
        read_recipe(RECIPES[0], ["train"])
    with pytest.raises(ValueError, match="the recipe names eyes"):
        read_recipe(RECIPES[0], ["train=[eyes]"])
    with pytest.raises(ValueError, match="dtype is one of float32, .*, got 'float33'"):
        read_recipe(RECIPES[0], ["dtype=float33"])
    with pytest.raises(ValueError, match=r"unknown key learn_rate; .* Did you mean learning_rate\?"):
        training_arguments(read_recipe(RECIPES[0], ["trainer.learn_rate=1"]))
    with pytest.raises(ValueError, match="Quantised weights cannot learn; add `lora`"):
        read_recipe(RECIPES[0], ["quantize=nf4", "lora={}"])


@pytest.mark.parametrize("name", ["fsdp2", "deepspeed"])
def test_launch_files_are_what_accelerate_reads(name):
    config = load_config_from_file(str(ROOT / "training" / "recipes" / "launch" / f"{name}.yaml"))
    assert config.distributed_type.value == {"fsdp2": "FSDP", "deepspeed": "DEEPSPEED"}[name]


# --- adapters ---


@pytest.mark.slow
def test_adapters_are_merged_into_the_result(checkpoint, data, tmp_path):
    peft = pytest.importorskip("peft", reason="pip install peft")
    output = finetune(recipe(checkpoint, data, tmp_path, train=["language"], lora=LORA))
    assert losses(output)[-1] < losses(output)[0]
    assert moved_parts(checkpoint, output) == {"language_model"}
    batch = Collator(load(checkpoint)[1], 2048)([JsonLines(data)[0]])
    with torch.no_grad():
        adapted = peft.PeftModel.from_pretrained(load(checkpoint)[0], output / "adapter")(**batch).logits
        torch.testing.assert_close(load(output)[0](**batch).logits, adapted, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_an_interrupted_run_of_adapters_ends_where_an_unbroken_one_does(checkpoint, data, tmp_path):
    pytest.importorskip("peft", reason="pip install peft")
    lora = LORA | {"lora_dropout": 0.3}
    unbroken = finetune(recipe(checkpoint, data, tmp_path / "whole", lora=lora))
    shutil.copytree(unbroken / "checkpoints" / "checkpoint-3", tmp_path / "broken" / "checkpoints" / "checkpoint-3")
    assert_same_weights(finetune(recipe(checkpoint, data, tmp_path / "broken", lora=lora)), unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["nf4", "packed"])
def test_adapters_learn_over_quantised_weights(checkpoint, data, tmp_path, how):
    pytest.importorskip("peft", reason="pip install peft")
    source, options = checkpoint, {"quantize": "nf4"}
    if how == "nf4":
        pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")
    else:
        model, _ = load(checkpoint)
        quantize_model(model, "nvfp4")
        save_quantised(model, checkpoint, tmp_path / "packed")
        source, options = tmp_path / "packed", {}
        with pytest.raises(ValueError, match="are quantised and cannot learn; add `lora`"):
            finetune(recipe(source, data, tmp_path / "none", trainer={"max_steps": 1}))
    output = finetune(recipe(source, data, tmp_path / "out", train=["language"], lora=LORA, **options))
    assert losses(output)[-1] < losses(output)[0]
    assert not hasattr(load(output)[0].config, "quantization_config")


# --- several processes ---

FOUR = {"per_device_train_batch_size": 4}
# Adam turns rounding into steps where a gradient is zero in truth, as that of a key's bias.
PLAIN = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 1.0}


# accelerate shards on GPUs only; this tells it that two CPU processes are a place to shard as well.
SHARD_ON_CPUS = """
import os, sys
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

create = AcceleratorState.__init__
def create_sharding(self, *arguments, **options):
    create(self, *arguments, **options)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.FSDP
        self.fsdp_plugin = FullyShardedDataParallelPlugin()
AcceleratorState.__init__ = create_sharding
from training.finetune import main
main()
"""


def launch(settings: Recipe, folder: Path, *program: str, **environment: str) -> Path:
    """Run a recipe in two processes."""
    (folder / "recipe.json").write_text(json.dumps(vars(settings)))  # JSON is YAML
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *program]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", **environment}
    done = subprocess.run(
        [*command, str(folder / "recipe.json")], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return Path(settings.output)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [{}, LORA], ids=["full", "lora"])
def test_two_processes_learn_what_one_does(checkpoint, data, tmp_path, lora):
    if lora:
        pytest.importorskip("peft", reason="pip install peft")
    one = finetune(recipe(checkpoint, data, tmp_path / "one", lora=lora, trainer=PLAIN | FOUR))
    two = launch(recipe(checkpoint, data, tmp_path / "two", lora=lora, trainer=PLAIN), tmp_path, "-m", MODULE)
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert_same_weights(two, one, atol=1e-5)


@pytest.mark.slow
def test_two_processes_with_weights_shared_out_learn_what_one_does(checkpoint, data, tmp_path):
    one = finetune(recipe(checkpoint, data, tmp_path / "one", trainer=PLAIN | FOUR))
    (tmp_path / "sharded.py").write_text(SHARD_ON_CPUS)
    settings = yaml.safe_load((ROOT / "training" / "recipes" / "launch" / "fsdp2.yaml").read_text())["fsdp_config"]
    environment = {name.upper(): str(value) for name, value in settings.items()} | {"ACCELERATE_USE_FSDP": "true"}
    sharded = str(tmp_path / "sharded.py")
    two = launch(recipe(checkpoint, data, tmp_path / "two", trainer=PLAIN), tmp_path, sharded, **environment)
    assert list((two / "checkpoints" / "checkpoint-3" / "pytorch_model_fsdp_0").glob("*.distcp"))
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert_same_weights(two, one, atol=1e-5)
    shutil.copytree(two / "checkpoints" / "checkpoint-3", tmp_path / "broken" / "checkpoints" / "checkpoint-3")
    broken = launch(recipe(checkpoint, data, tmp_path / "broken", trainer=PLAIN), tmp_path, sharded, **environment)
    assert_same_weights(broken, two, atol=1e-6)
