"""Shared by the benchmarks: interleaved rounds, conditions, the models that are run, measured limits."""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import PIL
import torch
import transformers
from nemotron_vl.configuration_nemotron_vl import LLAMA_3_1_8B, NemotronVLConfig
from nemotron_vl.modeling_nemotron_vl import Llama_Nemotron_Nano_VL

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMAGE_TOKEN_ID = 2
# A CPU runs a part of the 8B: the shapes of its layers, or narrower ones, and fewer of them.
CPU_TEXT = {
    **LLAMA_3_1_8B,
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 8192,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
CPU_TOWER = {"num_hidden_layers": 1}
# Options of a generation that ends with its first token.
ONE_TOKEN = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 1, "disable_compile": True}


def read_options(description: str | None, **defaults: tuple[object, object]) -> argparse.Namespace:
    """Read a benchmark's options, each with its default on a GPU and the one on a CPU; run torch on one thread."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (on_gpu, on_cpu) in defaults.items():
        default = on_gpu if DEVICE == "cuda" else on_cpu
        parser.add_argument(
            "--" + name.replace("_", "-"), type=type(default) if default is not None else str, default=default
        )
    torch.set_num_threads(1)
    return parser.parse_args()


def require_equal(results: Sequence[object]) -> None:
    """Raise unless all variants give the same result: otherwise their times cannot be compared."""
    if len(set(results)) != 1:
        raise ValueError(f"The results differ, so there is nothing to time: {list(results)}.")


def make_model(text: dict | None = None, tower: dict | None = None) -> Llama_Nemotron_Nano_VL:
    """The 8B in bfloat16 with random weights on a GPU; on a CPU a part of it in float32."""
    torch.manual_seed(0)
    if DEVICE == "cuda":
        text, tower, dtype = {**LLAMA_3_1_8B, **(text or {})}, tower or {}, torch.bfloat16
    else:
        text, tower, dtype = {**CPU_TEXT, **(text or {})}, {**CPU_TOWER, **(tower or {})}, torch.float32
    config = NemotronVLConfig(vision_config=tower, llm_config=text, img_context_token_id=IMAGE_TOKEN_ID)
    with torch.device(DEVICE):
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            return Llama_Nemotron_Nano_VL(config).eval()
        finally:
            torch.set_default_dtype(default)


def prompt_ids(num_tokens: int) -> torch.Tensor:
    """`(1, num_tokens)` ids without image tokens."""
    return torch.arange(num_tokens, device=DEVICE)[None] % 60 + 3


def seconds_of(call: Callable[[], object]) -> float:
    """On a CPU the processor time of the process, which other load disturbs least; on a GPU the clock, synchronised."""
    if DEVICE == "cpu":
        start = time.process_time()
        call()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(
    variants: dict[str, Callable[[], object]],
    *,
    peer: str,
    rounds: int,
    limit: str | None = None,
    per: float = 1,
    measure: Callable[[Callable[[], object]], float] = seconds_of,
) -> dict[str, dict[str, object]]:
    """Time variants in interleaved rounds, after one call of each that is not counted.

    Args:
        variants: name -> call.
        peer: the variant that the others are compared with.
        rounds: how often each runs.
        limit: the variant that does only the unavoidable work, if there is one.
        per: divide times by this, for a call that does its work several times.
        measure: call -> seconds.

    Returns:
        for each variant median and quartiles in milliseconds, how many times faster than the peer it is, and the
        share of the limit that it reaches.
    """
    for variant in variants.values():
        variant()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, variant in variants.items():
            times[name].append(1e3 * measure(variant) / per)
    medians = {name: statistics.median(values) for name, values in times.items()}
    results = {}
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4)
        results[name] = {
            "median_ms": round(median, 3),
            "quartiles_ms": [round(low, 3), round(high, 3)],
            "times_faster": round(medians[peer] / median, 2),
        }
        if limit is not None:
            results[name]["share_of_limit"] = round(medians[limit] / median, 3)
    return results


def matmul_limit(flops: float, dtype: torch.dtype) -> Callable[[], object]:
    """A call that multiplies matrices of 2048 x 2048 until `flops` are done: what the machine can reach."""
    side = 2048
    left, right = (torch.randn(side, side, device=DEVICE, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    whole, rest = divmod(flops, 2 * side**3)
    rows = max(1, round(side * rest / (2 * side**3)))

    def multiply() -> None:
        for _ in range(int(whole)):
            torch.mm(left, right, out=out)
        torch.mm(left[:rows], right, out=out[:rows])

    return multiply


def read_limit(num_bytes: int) -> Callable[[], object]:
    """A call that copies half of `num_bytes` to the other half: as many bytes read and written."""
    source = torch.ones(num_bytes // 2, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def report(
    name: str, results: Sequence[dict[str, object]], model: torch.nn.Module | None = None, **conditions: object
) -> None:
    """Print the JSON line of a benchmark; if it ran a model, with the dtype and the sizes of that model."""
    if model is not None:
        text, tower = model.config.text_config, model.config.vision_config
        sizes = {"layers": text.num_hidden_layers, "hidden_size": text.hidden_size, "blocks": tower.num_hidden_layers}
        conditions = {"dtype": str(model.dtype), **sizes, **conditions}
    processor = platform.processor() or platform.machine()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists():
        models = [line for line in cpu_info.read_text().splitlines() if line.startswith("model name")]
        processor = models[0].split(": ", 1)[1] if models else processor
    line = {
        "benchmark": name,
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        "cpu": processor,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "num_threads": torch.get_num_threads(),
        "clock": "processor time of the process" if DEVICE == "cpu" else "wall, synchronised",
        "load_average": round(os.getloadavg()[0], 1),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "pillow": PIL.__version__,
        },
        "date": time.strftime("%Y-%m-%d"),
        **conditions,
        "results": list(results),
    }
    print(json.dumps(line), flush=True)
