"""Load time, memory and speed of every weight format, packed and dequantised: products of one layer, and two models.

    python -m benchmarks.quantized                         # products, nano and a model of 1 B, one CPU thread
    python -m benchmarks.quantized --models products       # products alone: seconds a row of 14336 x 4096 and others
    python -m benchmarks.quantized --models nano --steps 20
    python -m benchmarks.quantized --models nano middle --device cuda  # the models on a GPU

The products multiply 1 and 512 rows by random weights of the 8B's shapes in every way that this machine has, in turn,
and print million weights a second (best and median, processor time of one thread; the last column is the clock with
all threads), the time as a multiple of the dense bfloat16 product, and the relative error against float64.

With llama-cpp-python and gguf (`pip install llama-cpp-python gguf`) the products and the middle model run in llama.cpp
too; `benchmarks/llama_cpp.py` says what that rounds.

The middle model has the decoder of Llama 3.2 1B, random weights and a small tower; nano is the repository's.
Checkpoints of every format are made with `tools.quantize` (without calibration: it does not change speed) in a
temporary folder, and each is measured in a process of its own, which prints one JSON line: seconds to load, tokens a
second of the prompt and, as median and quartiles, of greedy decoding at batch 1. Times are processor time of the one
thread on a CPU, wall clock on a GPU: other load on the machine disturbs them least. Memory is resident: `imports_mib`
before the model is loaded, `loaded_mib` once it has answered (weights that are mapped from the file count from their
first use), `peak_mib` the most at any time. The table of all rows comes last.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from nemotron_vl import torch_int4
from nemotron_vl.configuration_nemotron_vl import LLAMA_3_1_8B, NemotronVLConfig
from nemotron_vl.modeling_nemotron_vl import Llama_Nemotron_Nano_VL

from benchmarks import llama_cpp
from tools import ROOT, quantize

QUANTISED = ("fp8", "nvfp4", "awq")
MIDDLE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 16384,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def make_checkpoints(name: str, folder: Path) -> None:
    """Write `folder/plain` in bfloat16 and `folder/FORMAT` for every format."""
    if name == "nano":
        model = Llama_Nemotron_Nano_VL.from_pretrained(ROOT / "nano", dtype=torch.bfloat16)
    else:
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        tower = {"num_hidden_layers": 1, "hidden_size": 256, "num_attention_heads": 4, "max_image_size": 512}
        text = {**LLAMA_3_1_8B, **MIDDLE}
        config = NemotronVLConfig(vision_config=tower, llm_config=text, img_context_token_id=2)
        model = Llama_Nemotron_Nano_VL(config)
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder / "plain")
    for format_name in QUANTISED:
        model = Llama_Nemotron_Nano_VL.from_pretrained(folder / "plain", dtype=torch.bfloat16)
        quantize.quantize_model(model, format_name, group_size=64)
        quantize.save(model, folder / "plain", folder / format_name)


def resident_mib(key: str = "VmRSS") -> int:
    """Resident memory, `VmHWM` for its peak. Not `ru_maxrss`: a child process starts with its parent's."""
    status = Path("/proc/self/status").read_text().splitlines()
    return round(int(next(line.split()[1] for line in status if line.startswith(key))) / 1024)


def timed(call: Callable[[], object], device: str) -> float:
    """Seconds of processor time of this thread's process on a CPU, of the clock on a GPU."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - start


@torch.no_grad()
def measure(checkpoint: Path, dequantize: bool, dtype: str, device: str, prompt: int, steps: int) -> dict[str, object]:
    """Load one checkpoint in this process and decode."""
    imports = resident_mib()
    model: Llama_Nemotron_Nano_VL

    def load() -> None:
        nonlocal model
        model = Llama_Nemotron_Nano_VL.from_pretrained(
            checkpoint, dtype=getattr(torch, dtype), device_map=device, dequantize=dequantize
        ).eval()

    load_seconds = timed(load, device)
    ids = torch.randint(3, 400, (1, prompt), generator=torch.Generator().manual_seed(0)).to(device)
    model(input_ids=ids[:, :1])  # touches every weight
    loaded = resident_mib()
    output = model(input_ids=ids, use_cache=True, logits_to_keep=1)  # also warms up
    prompt_seconds = timed(lambda: model(input_ids=ids, logits_to_keep=1), device)
    times = []
    for _ in range(steps):
        token = output.logits[:, -1:].argmax(-1)

        def step(token: torch.Tensor = token) -> None:
            nonlocal output
            output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)

        times.append(timed(step, device))
    found = summary(quantize.folder_size(checkpoint), load_seconds, (imports, loaded), prompt / prompt_seconds, times)
    return found if device == "cpu" else found | {"gpu_peak_mib": round(torch.cuda.max_memory_allocated() / 2**20)}


def measure_llama_cpp(file: Path, prompt: int, steps: int) -> dict[str, object]:
    """Do the same with a GGUF file in llama.cpp, on as many threads as torch has."""
    from llama_cpp import Llama

    imports = resident_mib()
    model: Llama

    def load() -> None:
        nonlocal model
        threads = torch.get_num_threads()
        model = Llama(str(file), n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)

    load_seconds = timed(load, "cpu")
    ids = torch.randint(3, 400, (prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    model.eval(ids)
    loaded = resident_mib()
    model.reset()
    prompt_seconds = timed(lambda: model.eval(ids), "cpu")
    times = [timed(lambda: model.eval(ids[:1]), "cpu") for _ in range(steps)]
    return summary(file.stat().st_size, load_seconds, (imports, loaded), prompt / prompt_seconds, times)


def summary(
    file_bytes: int, load_seconds: float, resident: tuple[int, int], prompt_speed: float, times: list[float]
) -> dict[str, object]:
    """Return the numbers of a model; `resident` is the memory before it was loaded and after its first answer."""
    low, _, high = statistics.quantiles(times, n=4)
    return {
        "file_mib": round(file_bytes / 2**20, 1),
        "load_seconds": round(load_seconds, 2),
        "imports_mib": resident[0],
        "loaded_mib": resident[1],
        "peak_mib": resident_mib("VmHWM"),
        "prompt_tokens_per_second": round(prompt_speed, 2),
        "tokens_per_second": round(1 / statistics.median(times), 3),
        "tokens_per_second_quartiles": [round(1 / high, 3), round(1 / low, 3)],
    }


SHAPES = ((14336, 4096), (4096, 4096), (4096, 14336))


def product_layers(rows: int, columns: int) -> dict[str, tuple[Any, torch.Tensor]]:
    """Return every way to multiply by one random weight: name -> (layer, the float64 weight that it means)."""
    linear = torch.nn.Linear(columns, rows, bias=False, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(rows, 1, generator=generator).exp()  # scales of one size would all be rounded alike
    linear.weight = torch.nn.Parameter(0.02 * spread * torch.randn(rows, columns, generator=generator))
    encoders = {"nvfp4": quantize.encode_nvfp4, "fp8": quantize.encode_fp8, "awq": quantize.encode_awq_gemm}
    ways: dict[str, tuple[Any, torch.Tensor]] = {}
    for name, encode in encoders.items():
        layer = quantize.make_packed_linear(linear, quantize.FORMAT_NAMES[name], encode(linear.weight.detach()))
        weight = layer.dequantized_weight(torch.float32)
        ways[name] = layer, weight
        ways[f"{name} dequantised"] = layer.unpacked(torch.bfloat16), weight
    layer = quantize.make_packed_linear(linear, "AWQ GEMM", encoders["awq"](linear.weight.detach()))
    if torch_int4.can_convert(layer.own_tensors()):
        codes, layer.int4_scales = torch_int4.convert(layer.own_tensors())
        layer.qweight = torch.nn.Parameter(codes, requires_grad=False)
        ways["awq by torch's int4 operator"] = layer, ways["awq"][1]  # the way without a C compiler
    return ways | (llama_cpp.products(linear.weight.detach()) if llama_cpp.is_installed() else {})


@torch.no_grad()
def measure_products(num_rows: int, rounds: int) -> list[dict[str, object]]:
    """Time the products of all shapes in interleaved rounds: on one thread, and at last on all."""
    found = []
    for rows, columns in SHAPES:
        ways = product_layers(rows, columns)
        inputs = torch.randn(num_rows, columns, generator=torch.Generator().manual_seed(0)).bfloat16()
        times: dict[str, list[float]] = {name: [] for name in ways}
        for layer, _ in ways.values():
            layer(inputs)
        for _ in range(rounds):
            for name, (layer, _) in ways.items():
                start = time.thread_time()
                layer(inputs)
                times[name].append(time.thread_time() - start)
        dense = statistics.median(times["nvfp4 dequantised"])
        for name, (layer, weight) in ways.items():
            exact = inputs[:16].double() @ weight.double().t()
            torch.set_num_threads(os.cpu_count() or 1)
            walls = [timed_by_clock(layer, inputs) for _ in range(3)]
            torch.set_num_threads(1)
            found.append(
                {
                    "shape": f"{rows} x {columns}",
                    "rows": num_rows,
                    "way": name,
                    "million_weights_per_second": round(rows * columns / min(times[name]) / 1e6),
                    "median": round(rows * columns / statistics.median(times[name]) / 1e6),
                    "times_dense": round(statistics.median(times[name]) / dense, 3),
                    "error": round(float((layer(inputs[:16]).double() - exact).norm() / exact.norm()), 6),
                    "clock_all_threads": round(rows * columns / min(walls) / 1e6),
                }
            )
    return found


def timed_by_clock(layer: torch.nn.Module, inputs: torch.Tensor) -> float:
    start = time.perf_counter()
    layer(inputs)
    return time.perf_counter() - start


def variants(dtypes: list[str]) -> list[tuple[str, str, bool, str]]:
    """(name, checkpoint, dequantize, dtype) of every row."""
    rows = [(f"plain {dtype}", "plain", False, dtype) for dtype in ("float32", "bfloat16")]
    for name in QUANTISED:
        for dtype in dtypes:
            rows += [
                (f"{name} packed, {dtype}", name, False, dtype),
                (f"{name} dequantised, {dtype}", name, True, dtype),
            ]
    return rows


def llama_cpp_variants(folder: Path) -> list[tuple[str, str, bool, str]]:
    """Write the middle model for llama.cpp, if that is installed; return the rows as `variants` does."""
    rows = []
    for quantisation in llama_cpp.QUANTISATIONS if llama_cpp.is_installed() else ():
        llama_cpp.write_model(folder / f"{quantisation}.gguf", quantisation, MIDDLE)
        rows.append((f"llama.cpp {quantisation}", f"{quantisation}.gguf", False, "float32"))
    return rows


def markdown(rows: list[dict]) -> str:
    keys = ("file_mib", "load_seconds", "loaded_mib", "peak_mib", "prompt_tokens_per_second", "tokens_per_second")
    lines = [
        "| model | weights | file, MiB | load, s | resident, MiB | peak, MiB | prompt, tokens/s | decode, tokens/s |"
    ]
    lines.append("|---" * 8 + "|")
    for row in rows:
        cells = [row["model"], row["weights"], *(f"{row[key]:g}" for key in keys)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", choices=("products", "nano", "middle"), default=["products", "nano", "middle"]
    )
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["bfloat16"])
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--only", nargs=3, metavar=("CHECKPOINT", "DEQUANTIZE", "DTYPE"), help="measure in this process"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.only:
        checkpoint, dequantize, dtype = options.only
        sizes = options.prompt_tokens, options.steps
        if checkpoint.endswith(".gguf"):
            found = measure_llama_cpp(Path(checkpoint), *sizes)
        else:
            found = measure(Path(checkpoint), dequantize == "True", dtype, options.device, *sizes)
        print(json.dumps(found))
        return
    conditions = {
        "benchmark": "quantized",
        "machine": f"{platform.machine()}, 1 of {os.cpu_count()} cores" if options.device == "cpu" else options.device,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "prompt_tokens": options.prompt_tokens,
        "steps": options.steps,
        "batch_size": 1,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **({"llama_cpp": llama_cpp.version()} if llama_cpp.is_installed() else {}),
        "date": time.strftime("%Y-%m-%d"),
    }
    rows = []
    for num_rows, rounds in ((1, 15), (512, 3)) if "products" in options.models else ():
        for product in measure_products(num_rows, rounds):
            print(json.dumps(conditions | {"load_average": round(os.getloadavg()[0], 1)} | product), flush=True)
    for model in options.models:
        if model == "products":
            continue
        with tempfile.TemporaryDirectory() as folder:
            make_checkpoints(model, Path(folder))
            others = llama_cpp_variants(Path(folder)) if model == "middle" and options.device == "cpu" else []
            for name, checkpoint, dequantize, dtype in variants(options.dtypes) + others:
                command = [sys.executable, "-m", "benchmarks.quantized", "--device", options.device]
                command += ["--prompt-tokens", str(options.prompt_tokens), "--steps", str(options.steps)]
                command += ["--only", str(Path(folder) / checkpoint), str(dequantize), dtype]
                finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
                if finished.returncode:
                    raise RuntimeError(f"{model}, {name} failed:\n{finished.stderr[-2000:]}")
                load_average = {"load_average": round(os.getloadavg()[0], 1)}
                rows.append(
                    {"model": model, "weights": name} | load_average | json.loads(finished.stdout.splitlines()[-1])
                )
                print(json.dumps(conditions | rows[-1]), flush=True)
    if rows:
        print(markdown(rows))


if __name__ == "__main__":
    main()
