"""Memory of the whole 8B and of the 12B V2, counted and not measured.

    python -m benchmarks.memory

Counts the weights, the cache of a full context, and the peaks of the tower and of a prefill with 13 tiles. Everything
runs on torch's "meta" device, which has shapes and no numbers: every tensor that our code makes is counted while it
lives. Attention counts as its output, as kernels without a matrix of scores have it; Mamba layers run in plain torch,
without their kernels. FP8 and NVFP4 count every matrix of the decoder layers as packed. What the table leaves out: the
allocator's rounding, workspaces of the libraries, the CUDA context (about half a GB) and CUDA graphs.

It needs transformers 5: version 4 opens an autocast for rotary positions, which the meta device does not have.
"""

import argparse
import math
import weakref
from collections.abc import Callable

import torch
from nemotron_vl.checkpoint import TORCH_DTYPES
from nemotron_vl.configuration_nemotron_vl import NemotronVLConfig, NemotronVLV2Config
from nemotron_vl.modeling_nemotron_vl import Llama_Nemotron_Nano_VL, NemotronH_Nano_VL_V2
from nemotron_vl.quantization_nemotron_vl import FORMATS
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, Cache
from transformers.masking_utils import AttentionMaskInterface

from benchmarks.common import report
from tools import ROOT

TILES, WORDS = 13, 200  # an image of 2048 x 1536 px and the text around it
MEMBERS = {
    "8B V1": (Llama_Nemotron_Nano_VL, NemotronVLConfig, ROOT, (4096, 16384)),
    "12B V2": (NemotronH_Nano_VL_V2, NemotronVLV2Config, ROOT / "v2", (16384, 131072)),
}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operators create, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.live: set[int] = set()
        self.now = self.peak = 0

    def __torch_dispatch__(self, operation: Callable, types, args=(), kwargs=None):
        self._note((args, kwargs), is_new=False)  # weights: the result may be a view of one
        result = operation(*args, **(kwargs or {}))
        self._note(result, is_new=True)
        return result

    def _note(self, tree: object, is_new: bool) -> None:
        for tensor in pytree.tree_leaves(tree):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.live:
                storage = tensor.untyped_storage()
                size = storage.nbytes() if is_new else 0
                self.live.add(storage._cdata)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._release, storage._cdata, size)

    def _release(self, key: int, size: int) -> None:
        self.live.discard(key)
        self.now -= size


def peak_of(call: Callable[[], object]) -> int:
    """Largest number of bytes that a call holds beyond those held before it."""
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
    """Bytes that are needed to unpack one matrix for a prompt."""
    stored = FORMATS[name].layout(rows, columns, 0)
    tensors = {
        key: torch.empty(shape, dtype=TORCH_DTYPES[kinds[0]], device="meta") for key, (kinds, shape) in stored.items()
    }
    return peak_of(lambda: FORMATS[name].decode(tensors, torch.bfloat16))


def cache_bytes(cache: Cache) -> tuple[int, int]:
    """Return the bytes of keys and values, which grow with the tokens, and of Mamba states, which do not."""
    growing = fixed = 0
    for layer in cache.layers:
        if isinstance(getattr(layer, "keys", None), torch.Tensor):
            growing += layer.keys.nbytes + layer.values.nbytes
        for states in (getattr(layer, "conv_states", None), getattr(layer, "recurrent_states", None)):
            fixed += sum(state.nbytes for state in (states or {}).values())
    return growing, fixed


def count(member: str) -> list[dict[str, object]]:
    """One row of the table, in GB, for each number format."""
    AttentionInterface.register("without_scores", attend_without_scores)
    AttentionMaskInterface.register("without_scores", lambda *_, **__: None)
    model_class, config_class, folder, contexts = MEMBERS[member]
    config = config_class.from_pretrained(folder)
    config._attn_implementation = "without_scores"
    num_tokens = TILES * config.num_image_tokens_per_tile + WORDS
    outputs = []
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = model_class(config).eval()
            tiles = torch.empty(TILES, 3, config.force_image_size, config.force_image_size)
            prompt = {"inputs_embeds": torch.empty(1, num_tokens, config.text_config.hidden_size), "use_cache": True}
        tower = peak_of(lambda: model.get_image_features(tiles))
        text = peak_of(lambda: outputs.append(model.language_model(**prompt, logits_to_keep=1)))
    finally:
        torch.set_default_dtype(before)
    growing, fixed = cache_bytes(outputs[0].past_key_values)
    a_token = growing // num_tokens
    prefill = text - growing - fixed  # the cache has columns of its own
    weights = sum(weight.nbytes for weight in model.parameters())
    layers = [layer for layer in model.language_model.model.layers.modules() if isinstance(layer, torch.nn.Linear)]
    plain = sum(layer.weight.nbytes for layer in layers)
    largest = max((layer.weight.shape for layer in layers), key=math.prod)
    rows = []
    for name in ("bf16", "FP8", "NVFP4"):
        all_weights = weights if name == "bf16" else weights - plain + packed_bytes(model, name)
        unpacking = 0 if name == "bf16" else unpacked_peak(name, *largest)
        counted = {"weights": all_weights, **{f"cache, {n}": a_token * n + fixed for n in contexts}}
        counted |= {"tower": tower, "prefill": prefill + unpacking}
        counted["all"] = all_weights + a_token * contexts[-1] + fixed + max(tower, prefill + unpacking)
        rows.append({"case": f"{member}, {name}", **{key: round(value / 1e9, 2) for key, value in counted.items()}})
    return rows


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows = []
    for member in MEMBERS:
        counted = count(member)
        print("| GB | " + " | ".join(list(counted[0])[1:]) + " |\n" + "|---" * len(counted[0]) + "|")
        for row in counted:
            print("| " + " | ".join(map(str, row.values())) + " |")
        rows += counted
    report("memory", rows, clock="none: counted, not measured", tiles=TILES, words=WORDS)


if __name__ == "__main__":
    main()
