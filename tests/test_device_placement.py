"""Weights on several devices, on the CPU and on disk: the numbers of an undivided model."""

import json
import sys

import pytest
import torch
import transformers
from accelerate import cpu_offload, disk_offload, dispatch_model, infer_auto_device_map
from nemotron_vl.modeling_nemotron_vl import Llama_Nemotron_Nano_VL
from PIL import Image

from tests.processes import run

GREEDY = {"max_new_tokens": 4, "do_sample": False}


def outcomes(model, processor, visual_features: torch.Tensor) -> list:
    """Everything that has to be the same wherever the weights are."""
    picture = Image.new("RGB", (60, 40), (200, 30, 90))
    asked = [{"type": "image", "image": picture}, {"type": "text", "text": "Which?"}]
    batch = processor.apply_chat_template(
        [[{"role": "user", "content": asked}], [{"role": "user", "content": "Hello"}]],
        tokenize=True,
        return_dict=True,
        padding=True,
        return_tensors="pt",
    )
    chat = {"question": "Which?", "generation_config": GREEDY}
    with torch.no_grad():
        logits = model(**batch).logits
        hidden_states = model.base_model(**batch).last_hidden_state
    return [
        logits,
        hidden_states,
        model.generate(**batch, **GREEDY),
        model.chat(processor, **chat, **processor.image_processor(picture)),
        model.chat(processor, **chat, visual_features=visual_features),
    ]


def test_offloaded_weights_give_the_same_numbers(tiny_checkpoint, model, processor, tmp_path):
    features = torch.randn(2, 4, 128, generator=torch.Generator().manual_seed(0))
    expected = outcomes(model, processor, features)

    def load(**options):
        return Llama_Nemotron_Nano_VL.from_pretrained(tiny_checkpoint, **options).eval()

    cpu = torch.device("cpu")
    internvl = dict.fromkeys(("vision_model", "mlp1", "language_model.lm_head", "language_model.output"), "cpu")
    internvl |= {f"language_model.model.{name}": "cpu" for name in ("tok_embeddings", "embed_tokens", "norm")}
    internvl |= {"language_model.model.layers.0": "disk", "language_model.model.layers.1": "cpu"}
    parts = {"vision_model": "disk", "mlp1": "disk", "language_model": "cpu"}
    placed = {
        "auto": load(device_map="auto", max_memory={"cpu": 150_000}, offload_folder=tmp_path / "auto"),
        "the map of lmms-eval's internvl2": load(device_map=internvl, offload_folder=tmp_path / "internvl"),
        "dispatched": dispatch_model(load(), parts, main_device="cpu", offload_dir=tmp_path / "parts"),
        "all on the CPU": cpu_offload(load(), execution_device=cpu),
        "all on disk": disk_offload(load(), tmp_path / "disk", execution_device=cpu),
    }
    for name, divided in placed.items():
        assert any(parameter.device.type == "meta" for parameter in divided.parameters()), name
        for got, wanted in zip(outcomes(divided, processor, features), expected, strict=True):
            assert torch.equal(got, wanted) if isinstance(wanted, torch.Tensor) else got == wanted, name


def test_no_block_is_split_over_devices(tiny_checkpoint):
    """Every limit on the first device cuts somewhere else. FSDP refuses a name that no module of the model has."""
    model = Llama_Nemotron_Nano_VL.from_pretrained(tiny_checkpoint)
    assert set(model._no_split_modules) <= {type(module).__name__ for module in model.modules()}
    blocks = [name for name, module in model.named_modules() if type(module).__name__ in model._no_split_modules]
    total = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    for share in range(1, 10):
        device_map = infer_auto_device_map(
            model, {"cpu": total * share // 10, "disk": total}, no_split_module_classes=model._no_split_modules
        )
        assert not [key for key in device_map for block in blocks if key.startswith(block + ".")], share


@pytest.mark.slow
def test_two_devices_give_the_numbers_of_one(tiny_checkpoint):
    if transformers.__version__.startswith("4."):
        pytest.skip("transformers 4.57 makes tensors by a call that torch lets no pretended device define")
    script = "import sys, tools; from tests.two_devices import main; main(sys.argv[1])"
    results = json.loads(run(sys.executable, "-c", script, tiny_checkpoint).splitlines()[-1])
    for name in ("a block cut", "a patch generator cut"):  # what _no_split_modules is for, and that mixing is seen
        assert "got tensors on" in results.pop(name)["error"]
    for name, result in results.items():
        assert "error" not in result, (name, result)
        assert result["weights"] == ["twin:0", "twin:1"] and result["generated"] and result["chat"], (name, result)
        assert result["logits"] < 1e-4 and result["loss"] < 1e-4, (name, result)
