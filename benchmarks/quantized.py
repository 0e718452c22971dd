"""Load time, memory and speed of every weight format, packed and dequantised, on nano and a model of 1 B parameters.

    python -m benchmarks.quantized                         # both models, one CPU thread
    python -m benchmarks.quantized --models nano --steps 20
    python -m benchmarks.quantized --device cuda           # the same on a GPU

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

import torch
import transformers
from nemotron_vl.configuration_nemotron_vl import LLAMA_3_1_8B, NemotronVLConfig
from nemotron_vl.modeling_nemotron_vl import Llama_Nemotron_Nano_VL

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
    low, _, high = statistics.quantiles(times, n=4)
    memory = {"imports_mib": imports, "loaded_mib": loaded, "peak_mib": resident_mib("VmHWM")}
    if device != "cpu":
        memory["gpu_peak_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
    return {
        "file_mib": round(quantize.folder_size(checkpoint) / 2**20, 1),
        "load_seconds": round(load_seconds, 2),
        **memory,
        "prompt_tokens_per_second": round(prompt / prompt_seconds, 2),
        "tokens_per_second": round(1 / statistics.median(times), 3),
        "tokens_per_second_quartiles": [round(1 / high, 3), round(1 / low, 3)],
    }


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
    parser.add_argument("--models", nargs="+", choices=("nano", "middle"), default=["nano", "middle"])
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
        found = measure(
            Path(checkpoint), dequantize == "True", dtype, options.device, options.prompt_tokens, options.steps
        )
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
        "date": time.strftime("%Y-%m-%d"),
    }
    rows = []
    for model in options.models:
        with tempfile.TemporaryDirectory() as folder:
            make_checkpoints(model, Path(folder))
            for name, checkpoint, dequantize, dtype in variants(options.dtypes):
                command = [sys.executable, "-m", "benchmarks.quantized", "--device", options.device]
                command += ["--prompt-tokens", str(options.prompt_tokens), "--steps", str(options.steps)]
                command += ["--only", str(Path(folder) / checkpoint), str(dequantize), dtype]
                finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
                if finished.returncode:
                    raise RuntimeError(f"{model}, {name} failed:\n{finished.stderr[-2000:]}")
                rows.append({"model": model, "weights": name} | json.loads(finished.stdout.splitlines()[-1]))
                print(json.dumps(conditions | rows[-1]), flush=True)
    print(markdown(rows))


if __name__ == "__main__":
    main()
