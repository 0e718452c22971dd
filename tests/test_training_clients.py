"""Trainers and adapters of other libraries, unmodified: transformers' Trainer, TRL, PEFT, bitsandbytes.

What needs an optional package skips where it is absent. To run all of it, in an environment of its own:

    pip install -r requirements-dev.txt -e ".[train]"
    python -m pytest -q tests/test_training_clients.py
"""

import copy
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
from nemotron_vl.modeling_nemotron_vl import Llama_Nemotron_Nano_VL
from nemotron_vl.processing_nemotron_vl import NemotronVLProcessor
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, Trainer, TrainingArguments

from tests import two_processes
from tests.processes import run
from training.conversations import IGNORE_INDEX, Collator

TEXT_LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
TOWER_LINEAR = {"embedder", "qkv", "proj", "fc1", "fc2"}
ALL_LINEAR = TEXT_LINEAR | TOWER_LINEAR | {"1", "3"}  # mlp1.1 and mlp1.3
OLD = transformers.__version__.startswith("4.")


def needs(package: str) -> ModuleType:
    """Import an optional package, or skip the test."""
    return pytest.importorskip(package, reason=f"{package} is absent: pip install -e '.[train]'")


def picture(number: int) -> Image.Image:
    return Image.new("RGB", (40 + 20 * number, 40), (40 * number, 0, 0))


def messages(number: int, with_picture: bool = True) -> list[dict]:
    image = [{"type": "image", "image": picture(number)}] if with_picture else []
    return [
        {"role": "user", "content": [*image, {"type": "text", "text": "Which?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": f"Red {number}"}]},
    ]


@pytest.fixture
def model(tiny_checkpoint) -> Llama_Nemotron_Nano_VL:
    return Llama_Nemotron_Nano_VL.from_pretrained(tiny_checkpoint).eval()


@pytest.fixture(scope="module")
def batch(processor) -> dict[str, torch.Tensor]:
    return Collator(processor, max_length=2048)([messages(1), messages(2, with_picture=False)])


def arguments(folder: Path, kind: type = TrainingArguments, **options):
    defaults = {"max_steps": 2, "per_device_train_batch_size": 2, "use_cpu": True, "report_to": []}
    return kind(output_dir=str(folder), disable_tqdm=True, save_strategy="no", **{**defaults, **options})


def trl_arguments(folder: Path, kind: type, **options):
    """Arguments of a trainer that loads the checkpoint from its path."""
    return arguments(folder, kind, bf16=False, trust_remote_code=True, **options)


def gradients(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.train()
    model(**batch).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


# --- what the clients rely on ------------------------------------------------------------------------------------


def test_datasets_hashes_config_and_model(tiny_checkpoint, recwarn):
    """`map` caches what a function gave by a hash of all that the function uses, which dill walks through."""
    hasher = needs("datasets.fingerprint").Hasher
    model = AutoModel.from_pretrained(tiny_checkpoint, trust_remote_code=True)
    for hashed in (model.config, type(model.config), type(model), model):
        assert hasher.hash(hashed) == hasher.hash(hashed)
    assert not [str(warning.message) for warning in recwarn if "pickle" in str(warning.message)]
    before = hasher.hash(model.config)
    model.config.vision_batch_size = 3
    assert hasher.hash(model.config) != before


def test_base_model_gives_the_hidden_states_that_the_head_reads(model, batch):
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    assert model.base_model is not model
    for call in (model.base_model, model.model):
        hidden_states = call(**inputs, use_cache=False).last_hidden_state
        torch.testing.assert_close(model.get_output_embeddings()(hidden_states), model(**inputs).logits)


def test_a_wrapped_projector_works(model, batch, processor):
    """PEFT puts `modules_to_save=["mlp1"]` into a wrapper that has no items."""

    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module):
            super().__init__()
            self.original_module, self.trained = module, copy.deepcopy(module)

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return self.trained(features)

    expected = model(**batch).loss
    seen = []
    hook = model.mlp1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    features = processor.image_processor(picture(0))
    options = {"question": "Which?", "generation_config": {"max_new_tokens": 3}}
    answer = model.chat(processor, **features, **options)
    hook.remove()
    model.mlp1 = Wrapper(model.mlp1)
    torch.testing.assert_close(model(**batch).loss, expected)
    assert model.chat(processor, visual_features=seen[0], **options) == answer


# --- transformers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [None, True, False])
def test_trainer_trains_evaluates_and_saves(tiny_checkpoint, model, processor, batch, tmp_path, use_reentrant):
    options = {"learning_rate": 1e-2, "max_steps": 3, "remove_unused_columns": False}
    if use_reentrant is not None:
        options |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    seen = []
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path / "run", **options),
        train_dataset=[messages(number) for number in range(4)],
        eval_dataset=[messages(number) for number in range(3)],
        data_collator=Collator(processor, max_length=2048),
        processing_class=processor,
        compute_metrics=lambda prediction: seen.append(prediction.predictions) or {"ok": 1.0},
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.1
    assert seen[0].shape[-1] == model.config.text_config.vocab_size  # the logits alone
    trainer.save_model(tmp_path / "saved")
    model.gradient_checkpointing_disable()
    again = Llama_Nemotron_Nano_VL.from_pretrained(tmp_path / "saved").eval()
    torch.testing.assert_close(again(**batch).logits, model.eval()(**batch).logits)
    NemotronVLProcessor.from_pretrained(tmp_path / "saved")


def run_twice(function: str, *arguments: str | Path) -> None:
    """Run a function of two_processes.py in two processes that know of each other; one that hangs says where."""
    script = "import faulthandler, sys, tools; faulthandler.dump_traceback_later(400, exit=True); "
    script += f"from tests.two_processes import {function}; {function}(*sys.argv[1:])"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    run(*launcher, sys.executable, "-c", script, *arguments)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_process_without_images_trains_beside_one_with_images(tiny_checkpoint, processor, tmp_path, kind):
    """DDP used to complain about weights without gradient, and FSDP2 aborted; the gradient is the mean of both."""
    output = tmp_path / "gradients.safetensors"
    run_twice("train_unevenly", kind, tiny_checkpoint, output)
    model = Llama_Nemotron_Nano_VL.from_pretrained(tiny_checkpoint)
    for rank in range(2):
        (model.train()(**two_processes.uneven_batch(processor, rank)).loss / 2).backward()
    found = load_file(output)
    assert found.keys() == {name for name, _ in model.named_parameters()}
    for name, weight in model.named_parameters():
        torch.testing.assert_close(found[name], weight.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
def test_two_processes_with_sharded_weights_train_like_one(tiny_checkpoint, processor, tmp_path):
    """accelerate's FSDP2 over gloo; see two_processes.py."""
    output = tmp_path / "trained.safetensors"
    run_twice("main", tiny_checkpoint, output)
    with safe_open(output, "pt") as file:
        found = file.metadata()
    weights = load_file(output)
    assert found["sharded"] == "True"
    assert {"FSDPLlamaDecoderLayer", "FSDPRADIOBlock", "FSDPRADIOPatchGenerator"} <= set(found["shards"].split(","))

    collator = Collator(processor, max_length=2048)
    model = Llama_Nemotron_Nano_VL.from_pretrained(tiny_checkpoint).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=two_processes.LEARNING_RATE)
    pairs = [(2 * step, 2 * step + 1) for step in range(two_processes.STEPS)]
    batches = [collator([two_processes.conversation(number) for number in pair]) for pair in pairs]
    losses = two_processes.train(model, optimizer, batches, lambda loss: loss.backward())
    assert losses[-1] < losses[0]
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=1e-5, msg=name)
    asked = two_processes.question(processor, 0)
    generated = model.eval().generate(**asked, **two_processes.GREEDY)[0].tolist()
    assert found["generated"] == ",".join(map(str, generated))


# --- TRL ---------------------------------------------------------------------------------------------------------


def rows(kind: str) -> list[dict]:
    question = [{"role": "user", "content": "Which?"}]
    answers = [[{"role": "assistant", "content": f"Red {number}"}] for number in range(4)]
    if kind == "messages":
        return [{"images": [picture(n)], "messages": question + answer} for n, answer in enumerate(answers)]
    if kind == "completions":
        return [{"image": picture(n), "prompt": question, "completion": answer} for n, answer in enumerate(answers)]
    if kind == "preferences":
        pair = {"rejected": [{"role": "assistant", "content": "Blue"}]}
        return [
            {"images": [picture(n)], "prompt": question, "chosen": answer, **pair} for n, answer in enumerate(answers)
        ]
    return [{"images": [picture(n)], "prompt": question} for n in range(4)]


def dataset(kind: str):
    return needs("datasets").Dataset.from_list(rows(kind))


def from_rows(collator: Collator):
    """Our collator for TRL's rows."""
    from trl.data_utils import prepare_multimodal_messages

    return lambda rows: collator([prepare_multimodal_messages(row["messages"], row["images"]) for row in rows])


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(
            "messages", marks=pytest.mark.skipif(OLD, reason="TRL refuses this mask below transformers 5.18")
        ),
        "completions",
        "our collator",
    ],
)
def test_sft_trainer_trains_on_the_answers(tiny_checkpoint, processor, tmp_path, kind):
    """From a path alone; at learning rate 0 its loss, from hidden states and chunks, is that of our forward."""
    trl = needs("trl")
    options = {"max_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 0.0, "max_length": None}
    if kind == "messages":
        options["assistant_only_loss"] = True
    collator = from_rows(Collator(processor, max_length=2048)) if kind == "our collator" else None
    trainer = trl.SFTTrainer(
        model=str(tiny_checkpoint),
        args=trl_arguments(tmp_path, trl.SFTConfig, **options),
        train_dataset=dataset("completions" if kind == "completions" else "messages"),
        data_collator=collator,
    )
    assert type(trainer.processing_class).__name__ == "NemotronVLProcessor"
    loss = trainer.train().training_loss
    inputs = trainer.data_collator([dict(row) for row in trainer.train_dataset])
    said = [processor.tokenizer.decode(row[row != IGNORE_INDEX]) for row in inputs["labels"]]
    assert said == [f"Red {number}<|eot_id|>" for number in range(4)]
    model = Llama_Nemotron_Nano_VL.from_pretrained(tiny_checkpoint)
    assert loss == pytest.approx(float(model(**inputs).loss), abs=1e-4)


@pytest.mark.slow
def test_sft_trainer_refuses_to_cut_images(tiny_checkpoint, tmp_path):
    trl = needs("trl")
    trainer = trl.SFTTrainer(
        model=str(tiny_checkpoint),
        args=trl_arguments(tmp_path, trl.SFTConfig, max_length=20),
        train_dataset=dataset("messages"),
    )
    with pytest.raises(ValueError, match="Truncation to 20 tokens would cut an image"):
        trainer.train()


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [False, True])
def test_dpo_starts_at_log_2_and_learns(tiny_checkpoint, tmp_path, adapters):
    trl, peft = needs("trl"), needs("peft")
    options = {"max_length": None, "max_steps": 6, "learning_rate": 1e-2, "logging_steps": 1}
    trainer = trl.DPOTrainer(
        model=str(tiny_checkpoint),
        args=trl_arguments(tmp_path, trl.DPOConfig, **options),
        train_dataset=dataset("preferences"),
        peft_config=peft.LoraConfig(target_modules="all-linear") if adapters else None,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4) and losses[-1] < losses[0] - 0.1


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_grpo_generates_scores_and_learns(tiny_checkpoint, processor, tmp_path, beta):
    trl = needs("trl")
    plain = copy.deepcopy(processor)
    if beta:  # TRL passes everything the processor returns to a function that knows no num_patches
        plain.image_processor.model_input_names = ["pixel_values"]
    options = {"num_generations": 2, "max_completion_length": 6, "per_device_train_batch_size": 4, "logging_steps": 1}
    said = []

    def reward(completions, **_):
        said.extend(completion[0]["content"] for completion in completions)
        return [float(len(text)) for text in said[-len(completions) :]]

    trainer = trl.GRPOTrainer(
        model=str(tiny_checkpoint),
        args=trl_arguments(tmp_path, trl.GRPOConfig, beta=beta, learning_rate=1e-2, **options),
        reward_funcs=reward,
        processing_class=plain,
        train_dataset=dataset("prompts"),
    )
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    assert len(said) == 8 and len(set(said)) > 1
    if beta:
        first = next(entry for entry in trainer.state.log_history if "kl" in entry)
        assert first["kl"] == pytest.approx(0, abs=1e-5)  # the first step's model is its reference
    changed = {name.split(".")[0] for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"vision_model", "mlp1", "language_model"}


# --- PEFT --------------------------------------------------------------------------------------------------------


def adapted(model: nn.Module, **options) -> nn.Module:
    peft = needs("peft")
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "init_lora_weights": False, **options}))


@pytest.mark.slow
@pytest.mark.parametrize(
    "target_modules, hit",
    [("all-linear", ALL_LINEAR), (sorted(TEXT_LINEAR), TEXT_LINEAR), (sorted(TOWER_LINEAR), TOWER_LINEAR)],
)
def test_lora_targets_hit_what_the_documentation_says(model, batch, target_modules, hit):
    model = adapted(model, target_modules=target_modules)
    got = {name.split(".lora_")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.rsplit(".", 1)[1] for name in got} == hit
    assert not any("lm_head" in name for name in got)
    assert all(gradient is not None and gradient.any() for gradient in gradients(model, batch).values())


ADAPTERS = {
    "LoraConfig": {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False},
    "IA3Config": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "PromptTuningConfig": {"num_virtual_tokens": 3},
    "PrefixTuningConfig": {"num_virtual_tokens": 3},
    "PromptEncoderConfig": {"num_virtual_tokens": 3, "encoder_hidden_size": 16},  # P-tuning
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_of_every_kind_train_and_generate(tiny_checkpoint, processor, batch, kind):
    """PEFT reads sizes in the config and looks for the embedding of the tokens; prompt and prefix tuning did not start."""
    peft = needs("peft")
    torch.manual_seed(0)
    base = Llama_Nemotron_Nano_VL.from_pretrained(tiny_checkpoint)
    model = peft.get_peft_model(base, getattr(peft, kind)(task_type="CAUSAL_LM", **ADAPTERS[kind])).train()
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(adapters, lr=0.05)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        losses.append(model(**batch).loss)
        losses[-1].backward()
        assert all(parameter.grad is not None for parameter in adapters)
        optimizer.step()
    assert losses[-1] < losses[0]
    model.eval()
    for with_picture in (True, False):
        asked = processor.apply_chat_template(
            messages(1, with_picture)[:1],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
        )
        images = {name: asked[name] for name in ("pixel_values", "num_patches") if name in asked}
        expected = asked["input_ids"]
        with torch.no_grad():  # every step from the beginning
            for _ in range(4):
                logits = model(input_ids=expected, attention_mask=torch.ones_like(expected), **images).logits
                logits[..., base.config.image_token_id] = -math.inf  # the random model would write it
                expected = torch.cat([expected, logits[:, -1:].argmax(-1)], 1)
        options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
        options["suppress_tokens"] = [base.config.image_token_id]
        assert torch.equal(model.generate(**asked, **options), expected)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_whole_modules_train_beside_lora(tiny_checkpoint, batch, tmp_path, dtype):
    base = Llama_Nemotron_Nano_VL.from_pretrained(tiny_checkpoint, dtype=dtype)
    model = adapted(base, target_modules=["q_proj"], modules_to_save=["mlp1", "embed_tokens", "lm_head"])
    got = gradients(model, batch)
    assert {name.split("modules_to_save")[0].split(".")[-2] for name in got if "lora_" not in name} == {
        "mlp1",
        "embed_tokens",
        "lm_head",
    }
    assert all(gradient is not None for gradient in got.values())


@pytest.mark.slow
def test_adapters_are_saved_loaded_and_merged(tiny_checkpoint, processor, batch, tmp_path):
    peft = needs("peft")
    base = AutoModel.from_pretrained(tiny_checkpoint, trust_remote_code=True)
    # task_type lets AutoPeftModel find the base; without it PEFT wants to import the class by its module's name.
    model = adapted(base, target_modules="all-linear", modules_to_save=["mlp1"], task_type="CAUSAL_LM").eval()
    expected = model(**batch).logits
    plain = Llama_Nemotron_Nano_VL.from_pretrained(tiny_checkpoint)
    assert not torch.allclose(expected, plain(**batch).logits, atol=0.1)  # the adapters do something
    answer = model.chat(processor, question="Which?", generation_config={"max_new_tokens": 3})
    model.save_pretrained(tmp_path / "adapter")

    fresh = AutoModel.from_pretrained(tiny_checkpoint, trust_remote_code=True)
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    torch.testing.assert_close(again(**batch).logits, expected)
    by_path = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", trust_remote_code=True)
    torch.testing.assert_close(by_path.eval()(**batch).logits, expected)
    merged = again.merge_and_unload()
    assert type(merged).__name__ == "Llama_Nemotron_Nano_VL"
    merged.save_pretrained(tmp_path / "merged")
    processor.save_pretrained(tmp_path / "merged")
    loaded = AutoModel.from_pretrained(tmp_path / "merged", trust_remote_code=True)
    torch.testing.assert_close(loaded(**batch).logits, expected, rtol=1e-4, atol=1e-4)
    assert loaded.chat(processor, question="Which?", generation_config={"max_new_tokens": 3}) == answer


@pytest.mark.slow
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("target_modules", ["all-linear", ["q_proj"], ["qkv"]], ids=["all", "text", "tower"])
def test_lora_under_checkpointing_gets_equal_gradients(tiny_checkpoint, batch, target_modules, use_reentrant):
    results = []
    for checkpointing in (False, True):
        base = Llama_Nemotron_Nano_VL.from_pretrained(tiny_checkpoint)
        model = adapted(base, target_modules=target_modules)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        results.append(gradients(model, batch))
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, msg=name)


@pytest.mark.slow
def test_qlora_trains_on_a_4_bit_language_model(tiny_checkpoint, batch, tmp_path):
    peft = needs("peft")
    needs("bitsandbytes")
    from transformers import BitsAndBytesConfig

    # On a CPU with AVX-512 for bfloat16, bitsandbytes 0.50.2 packs rows of 96 values, as the checkpoint has, wrongly.
    config = Llama_Nemotron_Nano_VL.config_class.from_pretrained(tiny_checkpoint)
    config.text_config.intermediate_size = 128
    Llama_Nemotron_Nano_VL(config).save_pretrained(tmp_path / "base")
    packed = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    base = Llama_Nemotron_Nano_VL.from_pretrained(tmp_path / "base", quantization_config=packed)
    base = peft.prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": False})
    model = adapted(base, target_modules="all-linear", init_lora_weights=True)
    wrapped = model.base_model.model.language_model.model.layers[0].self_attn.q_proj
    assert type(wrapped.base_layer).__name__ == "Linear4bit"
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.3
    model.save_pretrained(tmp_path)
    fresh = Llama_Nemotron_Nano_VL.from_pretrained(tmp_path / "base", quantization_config=packed)
    again = peft.PeftModel.from_pretrained(fresh, tmp_path).eval()
    torch.testing.assert_close(again(**batch).loss, model.eval()(**batch).loss, rtol=1e-3, atol=1e-3)
