"""Memory of the whole 8B, counted and not measured: weights, keys and values, and the peak of a prefill with 13 tiles.

    python -m benchmarks.memory

Everything runs on torch's "meta" device, which has shapes and no numbers: every tensor that our code makes is counted
while it lives. Attention counts as its output, as kernels without a matrix of scores have it. What the table leaves out:
the allocator's rounding, workspaces of the libraries, the CUDA context (about half a GB) and CUDA graphs.
"""

import math
import weakref
from collections.abc import Callable

import torch
from nemotron_vl.checkpoint import TORCH_DTYPES
from nemotron_vl.configuration_nemotron_vl import NemotronVLConfig
from nemotron_vl.modeling_nemotron_vl import Llama_Nemotron_Nano_VL
from nemotron_vl.quantization_nemotron_vl import FORMATS
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from benchmarks.common import report
from tools import ROOT

TILES, WORDS = 13, 200  # a picture of 2048 x 1536 px and the text around it
CONTEXTS = (4096, 16384)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of what operators make while it lives, each storage once."""

    def __init__(self) -> None:
        super().__init__()
        self.live: set[int] = set()
        self.now = self.peak = 0

    def __torch_dispatch__(self, operation: Callable, types, args=(), kwargs=None):
        self._note((args, kwargs), of_ours=False)  # weights, of which a view may come back
        result = operation(*args, **(kwargs or {}))
        self._note(result, of_ours=True)
        return result

    def _note(self, tree: object, of_ours: bool) -> None:
        for tensor in pytree.tree_leaves(tree):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.live:
                storage = tensor.untyped_storage()
                size = storage.nbytes() if of_ours else 0
                self.live.add(storage._cdata)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._release, storage._cdata, size)

    def _release(self, key: int, size: int) -> None:
        self.live.discard(key)
        self.now -= size


def peak_of(call: Callable[[], object]) -> int:
    """Bytes that a call holds at the most, beyond what is there before."""
    with torch.no_grad(), LiveBytes() as counted:
        call()
    return counted.peak


def attend_without_scores(module, query, key, value, attention_mask, **_) -> tuple[torch.Tensor, None]:
    return torch.empty_like(query.transpose(1, 2)), None


def packed_bytes(model: torch.nn.Module, name: str) -> int:
    """Bytes of the language model's matrices in a format, `lm_head` left out."""
    total = 0
    for layer in model.language_model.model.layers.modules():
        if isinstance(layer, torch.nn.Linear):
            stored = FORMATS[name].layout(layer.out_features, layer.in_features, 0)
            total += sum(TORCH_DTYPES[kinds[0]].itemsize * math.prod(shape) for kinds, shape in stored.values())
    return total


def unpacked_peak(name: str, rows: int, columns: int) -> int:
    """Bytes that unpacking one matrix for a prompt takes."""
    stored = FORMATS[name].layout(rows, columns, 0)
    tensors = {
        key: torch.empty(shape, dtype=TORCH_DTYPES[kinds[0]], device="meta") for key, (kinds, shape) in stored.items()
    }
    return peak_of(lambda: FORMATS[name].decode(tensors, torch.bfloat16))


def main() -> None:
    AttentionInterface.register("without_scores", attend_without_scores)
    AttentionMaskInterface.register("without_scores", lambda *_, **__: None)
    config = NemotronVLConfig.from_pretrained(ROOT)
    config._attn_implementation = "without_scores"
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = Llama_Nemotron_Nano_VL(config).eval()
        tiles = torch.empty(TILES, 3, config.force_image_size, config.force_image_size)
        prompt = torch.empty(1, TILES * config.num_image_tokens_per_tile + WORDS, config.text_config.hidden_size)
    tower = peak_of(lambda: model.get_image_features(tiles))
    text = peak_of(lambda: model.language_model(inputs_embeds=prompt, use_cache=True, logits_to_keep=1))
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    layers = [layer for layer in model.language_model.model.layers.modules() if isinstance(layer, torch.nn.Linear)]
    plain = sum(layer.weight.numel() * layer.weight.element_size() for layer in layers)
    largest = max((layer.weight.shape for layer in layers), key=math.prod)
    head_size = config.text_config.head_dim
    a_token = 2 * 2 * config.text_config.num_hidden_layers * config.text_config.num_key_value_heads * head_size
    prefill = text - a_token * prompt.shape[1]  # keys and values have columns of their own
    rows = []
    for name in ("bf16", "FP8", "NVFP4"):
        all_weights = weights if name == "bf16" else weights - plain + packed_bytes(model, name)
        unpacking = 0 if name == "bf16" else unpacked_peak(name, *largest)
        counted = {"weights": all_weights, **{f"keys and values, {n}": a_token * n for n in CONTEXTS}}
        counted |= {"tower": tower, "prefill": prefill + unpacking}
        counted["all, 16384"] = all_weights + a_token * CONTEXTS[-1] + max(tower, prefill + unpacking)
        rows.append({"case": name, **{key: round(value / 1e9, 2) for key, value in counted.items()}})
    print("| GB | " + " | ".join(list(rows[0])[1:]) + " |\n" + "|---" * len(rows[0]) + "|")
    for row in rows:
        print("| " + " | ".join(map(str, row.values())) + " |")
    torch.set_default_dtype(torch.float32)
    report("memory", rows, clock="none: counted, not measured", tiles=TILES, prompt_tokens=prompt.shape[1])


if __name__ == "__main__":
    main()
