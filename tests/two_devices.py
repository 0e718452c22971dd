"""Run a model over two devices that this machine does not have; started by test_device_placement.py.

A process of its own, because it registers a device type with torch: "twin:0" and "twin:1", whose numbers lie on the
CPU. As on two GPUs, tensors of different devices meet in no operation, and only a copy moves them. It prints one JSON
object: for every device map an error, or how far the logits are from those on the CPU and whether the answers agree.
"""

import json
from typing import Any

import torch
from accelerate import dispatch_model
from nemotron_vl.modeling_nemotron_vl import Llama_Nemotron_Nano_VL
from nemotron_vl.processing_nemotron_vl import NemotronVLProcessor
from PIL import Image
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

FIRST, SECOND = "twin:0", "twin:1"
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
GREEDY = {"max_new_tokens": 4, "do_sample": False}


class TwoDevices(_DummyBackendModule):
    def device_count(self) -> int:
        return 2

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0


class TwinTensor(torch.Tensor):
    """A tensor on a pretended device; `numbers` lies on the CPU."""

    @staticmethod
    def __new__(cls, numbers: torch.Tensor, device: torch.device):
        twin = torch.Tensor._make_wrapper_subclass(
            cls, numbers.size(), strides=numbers.stride(), dtype=numbers.dtype, device=device
        )
        twin.numbers = numbers
        return twin

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})


def compute(operation: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Compute on the CPU what stays on one device, refuse what mixes devices; numbers without dimensions may."""
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    twins = [tensor for tensor in tensors if isinstance(tensor, TwinTensor)]
    devices = {tensor.device for tensor in tensors if isinstance(tensor, TwinTensor) or tensor.dim()}
    if len(devices) > 1 and operation not in COPIES:
        raise RuntimeError(f"{operation} got tensors on {', '.join(sorted(map(str, devices)))}")
    target = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
    if target is not None:
        kwargs = {**kwargs, "device": "cpu"}
    plain_args, plain_kwargs = pytree.tree_map(
        lambda leaf: leaf.numbers if isinstance(leaf, TwinTensor) else leaf, (args, kwargs)
    )
    result = operation(*plain_args, **plain_kwargs)
    device = target or next((twin.device for twin in twins), torch.device("cpu"))
    if operation is torch.ops.aten.copy_.default:
        return args[0]
    if device.type == "cpu":
        return result
    device = torch.device(device.type, device.index or 0)
    own = {id(twin.numbers): twin for twin in twins}  # what an operation in place gives back

    def place(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return own[id(leaf)] if id(leaf) in own else TwinTensor(leaf, device)

    return pytree.tree_map(place, result)


class PythonEnds(TorchFunctionMode):
    """The two calls between tensors and Python lists that torch does not let a Python device define."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.tensor and torch.device(kwargs.get("device") or "cpu").type == "twin":
            device = kwargs.pop("device")
            return function(*args, **kwargs).to(device)
        if function is torch.Tensor.tolist and isinstance(args[0], TwinTensor):
            return args[0].numbers.tolist()
        return function(*args, **kwargs)


def device_maps() -> dict[str, dict[str, str]]:
    text, tower = "language_model.model", "vision_model.radio_model.model"
    # Key by key what lmms-eval's internvl2 builds: no rotary key, two names that are not ours left out by accelerate.
    internvl = {"vision_model": FIRST, "mlp1": FIRST, f"{text}.embed_tokens": FIRST, f"{text}.layers.0": FIRST}
    internvl |= {f"{text}.layers.1": SECOND, f"{text}.norm": FIRST, "language_model.lm_head": FIRST}
    blocks = {"vision_model.radio_model.input_conditioner": FIRST, f"{tower}.patch_generator": SECOND}
    blocks |= {f"{tower}.blocks.0": FIRST, f"{tower}.blocks.1": SECOND, f"{tower}.norm": FIRST}
    blocks |= {"mlp1.0": SECOND, "mlp1.1": FIRST, "mlp1.2": SECOND, "mlp1.3": FIRST, f"{text}.embed_tokens": SECOND}
    blocks |= {f"{text}.layers.0": FIRST, f"{text}.layers.1": SECOND, f"{text}.norm": FIRST}
    blocks |= {"language_model.lm_head": SECOND}
    cut_block = {name: device for name, device in blocks.items() if name != f"{tower}.blocks.0"}
    cut_block |= {f"{tower}.blocks.0.{part}": FIRST for part in ("norm1", "norm2", "mlp")}
    cut_generator = {name: device for name, device in blocks.items() if name != f"{tower}.patch_generator"}
    cut_generator |= {f"{tower}.patch_generator.{part}": FIRST for part in ("embedder", "cls_token")}
    return {
        "parts": {"vision_model": FIRST, "mlp1": SECOND, "language_model": SECOND},
        "tower second": {"vision_model": SECOND, "mlp1": FIRST, "language_model": FIRST},
        "internvl": internvl,
        "every block elsewhere": blocks,
        "a block cut": {**cut_block, f"{tower}.blocks.0.attn": SECOND},
        "a patch generator cut": {**cut_generator, f"{tower}.patch_generator.pos_embed": SECOND},
    }


def main(checkpoint: str) -> None:
    processor = NemotronVLProcessor.from_pretrained(checkpoint)
    image = Image.new("RGB", (60, 40), (200, 30, 90))
    asked = [{"type": "image", "image": image}, {"type": "text", "text": "Which?"}]
    inputs = processor.apply_chat_template(
        [[{"role": "user", "content": asked}], [{"role": "user", "content": "Hello"}]],
        tokenize=True,
        return_dict=True,
        padding=True,
        return_tensors="pt",
    )
    chat = {"question": "Which?", "generation_config": GREEDY, **processor.image_processor(image)}

    def load() -> Llama_Nemotron_Nano_VL:
        return Llama_Nemotron_Nano_VL.from_pretrained(checkpoint, dtype=torch.float32).eval()

    with torch.no_grad():
        plain = load()
        expected = plain(**inputs, labels=inputs["input_ids"])
        generated, answer = plain.generate(**inputs, **GREEDY).tolist(), plain.chat(processor, **chat)
        _setup_privateuseone_for_python_backend("twin", backend_module=TwoDevices())
        library = torch.library.Library("_", "IMPL")  # the registration lives as long as this object
        library.fallback(lambda operation, *args, **kwargs: compute(operation, args, kwargs), "PrivateUse1")
        results = {}
        for name, device_map in device_maps().items():
            with PythonEnds():
                model = dispatch_model(load(), device_map, main_device=FIRST)
                placed = inputs.to(FIRST)
                try:
                    got = model(**placed, labels=placed["input_ids"])
                    results[name] = {
                        "weights": sorted({str(parameter.device) for parameter in model.parameters()}),
                        "logits": float((got.logits.to("cpu") - expected.logits).abs().max()),
                        "loss": float((got.loss.to("cpu") - expected.loss).abs()),
                        "generated": model.generate(**placed, **GREEDY).tolist() == generated,
                        "chat": model.chat(processor, **chat) == answer,
                    }
                except RuntimeError as error:
                    results[name] = {"error": str(error)}
    print(json.dumps(results))
