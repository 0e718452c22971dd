"""Measure everything that needs a GPU: three calls of at most ten minutes, or one after the other.

    python -m benchmarks.gpu_day --call 1             # correct? the tests, the kernels at the 8B's shapes, nano
    python -m benchmarks.gpu_day --call 2             # decoding: step by step, compiled and not, many answers in turn
    python -m benchmarks.gpu_day --call 3             # packed weights, tower, prompt, first token, second question
    python -m benchmarks.gpu_day --render             # the lines as tables, into docs/performance.md and the README
    python -m benchmarks.gpu_day --rehearse           # all calls on a pretended device, with a tiny model

Every case is a process of its own with its own limit, and its JSON line is written as soon as it ends: what was
measured stays, whatever happens to the rest. Models are the 8B with random weights in bfloat16, made on the device.
Ratios compare variants in turn within one process. The default way of `generate` is what is timed.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from tools import ROOT

SECONDS_PER_CALL = 590
LINES = ROOT / "benchmarks" / "results" / "gpu_day.jsonl"
PAGE, README = ROOT / "docs" / "performance.md", ROOT / "README.md"
MARKS = ("<!-- gpu_day: begin -->\n", "<!-- gpu_day: end -->\n")
# Size of the real day and of a rehearsal: tokens of a prompt, new tokens, rounds, tiles, answers in turn.
SIZES = {
    False: {"prompt": 3600, "new": 48, "rounds": 5, "tiles": 13, "answers": 20, "prefill": 3528},
    True: {"prompt": 24, "new": 6, "rounds": 2, "tiles": 2, "answers": 3, "prefill": 32},
}
SHAPES = {"key and value": (1024, 4096), "query and output": (4096, 4096), "up": (14336, 4096), "down": (4096, 14336)}
REHEARSED_SHAPES = {"small": (64, 96)}


class Day:
    """What the cases share: sizes, clocks, and the model."""

    def __init__(self, rehearsed: bool):
        self.rehearsed = rehearsed
        self.sizes = SIZES[rehearsed]
        self.shapes = REHEARSED_SHAPES if rehearsed else SHAPES

    def model(self, **text: Any) -> torch.nn.Module:
        if not self.rehearsed:
            from benchmarks.common import make_model

            return make_model(**text)
        from nemotron_vl import decode_attention
        from nemotron_vl.modeling_nemotron_vl import Llama_Nemotron_Nano_VL

        from tests.pretended_cuda import PretendedCuda
        from tools.tiny_checkpoint import make_config, make_tokenizer

        config = make_config(make_tokenizer())
        config.text_config._attn_implementation = decode_attention.NAME
        torch.manual_seed(0)
        return PretendedCuda.current.place(Llama_Nemotron_Nano_VL(config).eval())

    def ids(self, num_tokens: int, batch_size: int = 1) -> torch.Tensor:
        return (torch.arange(num_tokens).repeat(batch_size, 1) % 60 + 3).to("cuda")

    def tiles(self, model: torch.nn.Module) -> torch.Tensor:
        side = model.config.force_image_size
        generator = torch.Generator().manual_seed(0)
        levels = torch.randint(0, 256, (self.sizes["tiles"], 3, side, side), generator=generator, dtype=torch.uint8)
        return levels.to("cuda")

    def milliseconds(self, call: Callable[[], object], rounds: int = 20) -> float:
        """Median of some calls after one that is not counted, on the clock of the device's stream."""
        call()
        times = []
        for _ in range(2 if self.rehearsed else rounds):
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - start))
        return round(statistics.median(times), 4)

    def copy_limit(self, num_bytes: int) -> float:
        """Milliseconds to read and write as many bytes in all, by a copy: the bandwidth that the card reaches."""
        source = torch.ones(max(1, num_bytes // 2), dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        return self.milliseconds(lambda: target.copy_(source))

    def steps(
        self, model: torch.nn.Module, num_prompt: int, num_new: int, batch_size: int = 1, **options: Any
    ) -> dict:
        """Generate, and return what each step took: the first three alone, and the median of the others."""
        from benchmarks.decode import StepClock

        clock = StepClock()
        clock.read = time.perf_counter
        ids = self.ids(num_prompt, batch_size)
        fixed = {"max_new_tokens": num_new, "min_new_tokens": num_new, "do_sample": False, "pad_token_id": 1}
        start = time.perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), stopping_criteria=[clock], **{**fixed, **options})
        torch.cuda.synchronize()
        steps = [1e3 * (end - begin) for begin, end in pairwise(clock.times)]
        return {
            "first_token_ms": round(1e3 * (clock.times[0] - start), 2),
            "steps_1_to_3_ms": [round(step, 3) for step in steps[:3]],
            "step_ms": round(statistics.median(steps[3:] or steps), 4),
        }

    def second_steps(self, *arguments: Any) -> float:
        """Return the median step of the second answer; the first one compiles."""
        self.steps(*arguments)
        return self.steps(*arguments)["step_ms"]

    def in_turn(self, variants: dict[str, Callable[[], dict]]) -> dict[str, dict]:
        """Run variants in turn, the first round for compiling; return the last round with the median of all steps."""
        warm = {name: {"compile_and_answer_s": timed(variant)} for name, variant in variants.items()}
        found: dict[str, list[dict]] = {name: [] for name in variants}
        for _ in range(self.sizes["rounds"]):
            for name, variant in variants.items():
                found[name].append(variant())
        for name, rounds in found.items():
            steps = [one["step_ms"] for one in rounds]
            warm[name] |= rounds[-1] | {"step_ms": round(statistics.median(steps), 4), "all_step_ms": steps}
        return warm


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return round(time.perf_counter() - start, 2)


# --- call 1: is it correct? ---


def versions(day: Day) -> dict:
    import platform

    import transformers
    from nemotron_vl import triton_kernels

    smi = "nvidia-smi"
    query = [smi, "--query-gpu=name,driver_version,power.limit,clocks.max.sm,clocks.max.mem", "--format=csv,noheader"]
    try:
        card = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        card = f"{smi}: {error}"
    triton = triton_kernels.triton
    return {
        "card": card,
        "capability": list(torch.cuda.get_device_capability()),
        "multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "triton": getattr(triton, "__version__", None),
        "kernels_run": bool(triton_kernels.runs_kernels(torch.zeros(1, device="cuda").device)),
        "copy_gb_per_s": round(2 / day.copy_limit(2 << 30 if not day.rehearsed else 2 << 10) * 1e3 * 1.0737, 1),
    }


def run_tests(day: Day, *arguments: str, **environment: str) -> dict:
    """Run tests; return the last line of pytest and the names of those that failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line", "--no-showlocals"]
    if day.rehearsed:  # the pretended device lives in this process alone
        command.append("--collect-only")
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment}
    )
    lines = done.stdout.splitlines() or done.stderr.splitlines() or [""]
    failed = [line.split(" - ")[0] for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"summary": lines[-1], "failed": failed, "rc": done.returncode}


def gpu_tests(day: Day) -> dict:
    return run_tests(day, "-m", "gpu")


def kernel_tests(day: Day) -> dict:
    files = ("triton_kernels", "packed_matmul", "decode_attention")
    return run_tests(day, *(f"tests/test_{name}.py" for name in files), "-m", "not slow")


def suite(day: Day) -> dict:
    """The tests whose cells of docs/compatibility.md say "not run", with their model on the device."""
    files = ("modeling", "generation", "fast_paths", "quantization", "v2", "device_placement", "image_processing")
    files = (f"tests/test_{name}.py" for name in files)
    return run_tests(day, *files, "-m", "not slow", NEMOTRON_VL_TEST_DEVICE="cuda")


def packed_products(day: Day) -> dict:
    """Each format at the 8B's shapes: the error against float64 of the unpacked weight, and the share of the limit."""
    from nemotron_vl import packed_matmul
    from nemotron_vl.quantization_nemotron_vl import FORMATS

    from tests.test_packed_matmul import packed_layer

    rows = {}
    multiply = sys.modules["nemotron_vl.quantization_nemotron_vl"].multiply_packed
    for name in packed_matmul.FORMATS:
        for kind, (num_outputs, num_inputs) in day.shapes.items():
            tensors = packed_layer(name, num_outputs, num_inputs).packed_tensors()
            tensors = {key: tensor.to("cuda") for key, tensor in tensors.items()}
            num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
            exact = FORMATS[name].decode(tensors, torch.float32)
            found = {"limit_ms": day.copy_limit(num_bytes)}
            for num_rows in (1, 2, 4):
                generator = torch.Generator().manual_seed(1)
                inputs = torch.randn(num_rows, num_inputs, generator=generator).to("cuda", torch.bfloat16)
                expected = inputs.double() @ exact.double().T
                error = (multiply(name, inputs, tensors).double() - expected).abs().max() / expected.abs().max()
                call = partial(multiply, name, inputs, tensors)
                found[f"rows_{num_rows}"] = {"ms": day.milliseconds(call), "error": float(error)}
            weight = exact.to(torch.bfloat16)
            found["bf16_ms"] = day.milliseconds(lambda i=inputs[:1], w=weight: torch.nn.functional.linear(i, w))
            rows[f"{name}, {kind}"] = found
    return rows


def attention(day: Day) -> dict:
    """The attention kernel beside sdpa, at 3,600 of 16,384 places, with NaN in those that it may not read."""
    from nemotron_vl import decode_attention

    places, used = (256, 40) if day.rehearsed else (16384, 3600)
    rows = {}
    for dtype in (torch.bfloat16, torch.float16):
        for batch_size in (1, 4):
            generator = torch.Generator().manual_seed(0)
            query = torch.randn(batch_size, 32, 1, 128, generator=generator).to("cuda", dtype)
            keys, values = (
                torch.randn(batch_size, 8, places, 128, generator=generator).to("cuda", dtype) for _ in range(2)
            )
            mask = (torch.arange(places) < used).expand(batch_size, 1, 1, places).contiguous().to("cuda")
            seen = [state[:, :, :used] for state in (keys, values)]
            expected = torch.nn.functional.scaled_dot_product_attention(query, *seen, enable_gqa=True)
            for state in (keys, values):
                state[:, :, used:].fill_(float("nan"))
            arguments = (query, keys, values, mask, 128**-0.5)
            error = (decode_attention._launch(*arguments) - expected).abs().max()
            rows[f"{dtype}, batch {batch_size}"] = {
                "error": float(error),
                "ms": day.milliseconds(lambda a=arguments: decode_attention._launch(*a)),
                "limit_ms": day.copy_limit(2 * seen[0].numel() * dtype.itemsize),
            }
    return rows


def nano(day: Day) -> dict:
    """nano's answers on both devices."""
    from nemotron_vl.modeling_nemotron_vl import Llama_Nemotron_Nano_VL
    from nemotron_vl.processing_nemotron_vl import NemotronVLProcessor

    model = Llama_Nemotron_Nano_VL.from_pretrained(ROOT / "nano", dtype=torch.float32).eval()
    processor = NemotronVLProcessor.from_pretrained(ROOT / "nano")
    tiles = processor.image_processor(ROOT / "examples" / "receipt.png")
    questions = ("What is the total?", "Who is the seller?")
    options = {"max_new_tokens": 8, "do_sample": False}

    def answers() -> list[str]:
        return [model.chat(processor, question=question, generation_config=options, **tiles) for question in questions]

    on_cpu = answers()
    if day.rehearsed:
        from tests.pretended_cuda import PretendedCuda

        PretendedCuda.current.place(model)
    else:
        model.to("cuda")
    on_device = answers()
    return {"answers": on_device, "equal": on_cpu == on_device}


# --- call 2: decoding ---


def decode(day: Day) -> dict:
    """G1 and G2: step clocks after a long prompt; Hugging Face's eager loop and its compiled one around the same weights."""
    from nemotron_vl.modeling_nemotron_vl import COMPILE_OPTIONS
    from transformers import CompileConfig

    from benchmarks.decode import weight_bytes

    model = day.model()
    bare, own = model.language_model, model.language_model.config._attn_implementation
    lengths = (day.sizes["prompt"], day.sizes["new"])

    def with_attention(kind: str, call: Callable[[], dict]) -> Callable[[], dict]:
        def run() -> dict:
            bare.set_attn_implementation(kind)
            return call()

        return run

    plain_inductor = CompileConfig(mode="reduce-overhead")
    # Query, key and value as one launch, and so two launches a layer less.
    combined = CompileConfig(mode=None, options={**COMPILE_OPTIONS, "combo_kernels": True})
    variants = {
        "hf_eager": with_attention("sdpa", lambda: day.steps(bare, *lengths, disable_compile=True)),
        "hf_static_compiled": with_attention("sdpa", lambda: day.steps(bare, *lengths, cache_implementation="static")),
        "ours": with_attention(own, lambda: day.steps(model, *lengths)),
        "ours_plain_inductor": with_attention(own, lambda: day.steps(model, *lengths, compile_config=plain_inductor)),
        "ours_combo_kernels": with_attention(own, lambda: day.steps(model, *lengths, compile_config=combined)),
        "ours_not_compiled": with_attention(own, lambda: day.steps(model, *lengths, disable_compile=True)),
    }
    if day.rehearsed:
        del variants["hf_static_compiled"]  # the bare model would be compiled
    found = day.in_turn(variants)
    num_bytes = weight_bytes(model, day.sizes["prompt"])
    limit = day.copy_limit(num_bytes)
    for result in found.values():
        result["share_of_limit"] = round(limit / result["step_ms"], 3)
        result["times_hf_eager"] = round(found["hf_eager"]["step_ms"] / result["step_ms"], 2)
    return {"bytes_a_token": num_bytes, "limit_ms": limit, "variants": found}


def answers_in_turn(day: Day) -> dict:
    """Are CUDA graphs recorded anew for every answer? Short answers to prompts of other lengths, and what memory grows."""
    from torch._dynamo.utils import counters

    model = day.model()
    rows = []
    for number in range(day.sizes["answers"]):
        length = day.sizes["prompt"] // 4 * (1 + number % 4)
        result = day.steps(model, length, min(16, day.sizes["new"]))
        memory = 0 if day.rehearsed else torch.cuda.memory_reserved() >> 20
        graphs = counters["stats"]["unique_graphs"]
        rows.append({"prompt": length, **result, "reserved_mib": memory, "dynamo_graphs": graphs})
    late = rows[len(rows) // 2 :]
    return {
        "answers": rows,
        "late_cold_steps_ms": round(statistics.median(row["steps_1_to_3_ms"][0] for row in late), 3),
        "late_steps_ms": round(statistics.median(row["step_ms"] for row in late), 4),
        "grown_mib": rows[-1]["reserved_mib"] - rows[len(rows) // 2]["reserved_mib"],
        "graphs_grown": rows[-1]["dynamo_graphs"] - rows[len(rows) // 2]["dynamo_graphs"],
    }


# --- call 3: the rest ---


def packed_decode(day: Day, format_name: str) -> dict:
    """G3: the same model packed, at one and four sequences; the limit copies the packed bytes."""
    from benchmarks.decode import weight_bytes
    from tools.quantize import quantize_model

    model = day.model()
    lengths = (day.sizes["prompt"] // 4, day.sizes["new"])
    found: dict[str, Any] = {"bf16": {"step_ms": day.second_steps(model, *lengths)}}
    quantize_model(model, format_name, group_size=32 if day.rehearsed else 128)
    limit = day.copy_limit(weight_bytes(model, lengths[0]))
    for batch_size in (1, 4):
        step = day.second_steps(model, *lengths, batch_size)
        found[f"packed, batch {batch_size}"] = {"step_ms": step, "share_of_limit": round(limit / step, 3)}
    return {"limit_ms": limit, "variants": found}


def tower(day: Day) -> dict:
    """G4: tower and projector."""
    model = day.model()
    tiles = day.tiles(model)
    found = {}
    for kind in ("sdpa", "eager"):
        model.vision_model.set_attn_implementation(kind)
        with torch.no_grad():
            found[f"{kind}_ms"] = day.milliseconds(lambda: model.get_image_features(tiles))
    return found


def prompt(day: Day) -> dict:
    """G5: a prompt of text, by the default way and with a dynamic cache, also with padding on the left."""
    model = day.model()
    ids = day.ids(day.sizes["prefill"])
    whole, padded = torch.ones_like(ids), torch.ones_like(ids)
    padded[:, :8].fill_(0)
    options = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 1}
    found = {}
    for name, mask in (("whole", whole), ("padded", padded)):
        for kind, more in (("default", {}), ("dynamic", {"disable_compile": True})):
            call = lambda m=mask, o=more: model.generate(ids, attention_mask=m, **options, **o)  # noqa: E731
            found[f"{name}, {kind}_ms"] = day.milliseconds(call)
    return found


def first_token(day: Day) -> dict:
    """G6 and G6b: from an image to the first token, by the default way; and the tiles alone, by where they are made."""
    from nemotron_vl.image_processing import NemotronVLImageProcessor
    from PIL import Image

    model = day.model()
    processor = NemotronVLImageProcessor(image_size=model.config.force_image_size)
    image = Image.effect_noise((60, 40) if day.rehearsed else (2048, 1536), 60).convert("RGB")
    tokens = model.config.num_image_tokens_per_tile
    options = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 1}

    def ask(**more: Any) -> torch.Tensor:
        tiles = processor(image, do_rescale=False)["pixel_values"]
        ids = torch.cat(
            [torch.full((1, tokens * len(tiles)), model.config.image_token_id), torch.arange(3, 20)[None]], 1
        )
        return model.generate(ids, attention_mask=torch.ones_like(ids), pixel_values=tiles, **options, **more)

    return {
        "default_ms": day.milliseconds(ask, 7),
        "dynamic_ms": day.milliseconds(lambda: ask(disable_compile=True), 7),
        "tiles_cpu_ms": day.milliseconds(lambda: processor(image, do_rescale=False), 7),
        "tiles_cuda_ms": day.milliseconds(lambda: processor(image, device="cuda"), 7),
    }


def second_question(day: Day) -> dict:
    """G7: a second question about the same image, with its features kept, and with keys and values kept."""
    model = day.model()
    tiles = day.tiles(model)
    run = torch.full((1, model.config.num_image_tokens_per_tile * len(tiles)), model.config.image_token_id)
    text = torch.arange(50)[None] % 60 + 3
    first = torch.cat([run, text], 1).to("cuda")
    options = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 1}

    def ask(ids: torch.Tensor, **more: Any) -> Any:
        return model.generate(ids, attention_mask=torch.ones_like(ids), **options, **more)

    features = {"image": model.get_image_features(tiles)}
    turn = ask(first, pixel_values=tiles, return_dict_in_generate=True, disable_compile=True)
    second = torch.cat([turn.sequences, text.to("cuda")], 1)

    def kept() -> None:
        surplus = int(turn.past_key_values.get_seq_length()) - first.shape[1]
        if surplus:
            turn.past_key_values.crop(-surplus)
        ask(second, past_key_values=turn.past_key_values)

    return {
        "anew_ms": day.milliseconds(lambda: ask(second, pixel_values=tiles), 7),
        "features_kept_ms": day.milliseconds(lambda: ask(second, mm_encoder_outputs=features), 7),
        "keys_and_values_kept_ms": day.milliseconds(kept, 7),
    }


# For each call: a case, what runs it, and its limit in seconds.
CALLS: dict[int, list[tuple[str, Callable[[Day], dict], int]]] = {
    1: [
        ("versions", versions, 60),
        ("gpu_tests", gpu_tests, 120),
        ("kernel_tests", kernel_tests, 180),
        ("attention", attention, 90),
        ("packed_products", packed_products, 150),
        ("nano", nano, 90),
        ("suite", suite, 300),
    ],
    2: [("decode", decode, 420), ("answers_in_turn", answers_in_turn, 240)],
    3: [
        ("packed_fp8", lambda day: packed_decode(day, "fp8"), 150),
        ("packed_nvfp4", lambda day: packed_decode(day, "nvfp4"), 150),
        ("packed_awq", lambda day: packed_decode(day, "awq"), 150),
        ("tower", tower, 60),
        ("prompt", prompt, 120),
        ("first_token", first_token, 120),
        ("second_question", second_question, 120),
    ],
}
CASES = {name: run for cases in CALLS.values() for name, run, _ in cases}


def run_case(name: str, rehearsed: bool) -> None:
    """Run one case in this process and print its JSON line."""
    with contextlib.ExitStack() as stack:
        if rehearsed:
            from tests.pretended_cuda import pretended_cuda

            stack.enter_context(pretended_cuda())
        elif not torch.cuda.is_available():
            raise RuntimeError("There is no CUDA device here. --rehearse runs the cases on a pretended one.")
        result = CASES[name](Day(rehearsed))
    print(json.dumps(result), flush=True)


def run_call(number: int, rehearsed: bool, lines: Path) -> list[dict]:
    """Run the cases of a call, each in a process, and append a line to the file when it ends."""
    begun, found = time.monotonic(), []
    for name, _, limit in CALLS[number]:
        left = SECONDS_PER_CALL - (time.monotonic() - begun)
        line: dict[str, Any] = {
            "call": number,
            "case": name,
            "rehearsed": rehearsed,
            "date": time.strftime("%Y-%m-%d"),
        }
        if not rehearsed and left < 15:
            line |= {"error": "not begun: the ten minutes of the call were over"}
        else:
            line |= run_process(name, rehearsed, 600 if rehearsed else min(limit, left))
        found.append(line)
        with lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line)[:300], flush=True)
    return found


def run_process(name: str, rehearsed: bool, limit: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.gpu_day", "--case", name, *(["--rehearse"] if rehearsed else [])]
    begun = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired as expired:
        told = (expired.stderr or b"").decode(errors="replace")[-500:]
        return {"error": f"ended after {limit:.0f} s: {told}"}
    seconds = round(time.monotonic() - begun, 1)
    if done.returncode:
        return {"seconds": seconds, "error": done.stderr[-1500:]}
    return {"seconds": seconds, "result": json.loads(done.stdout.splitlines()[-1])}


def flatten(result: Any, path: tuple[str, ...] = ()) -> list[tuple[str, Any]]:
    """Return the numbers of a result with their paths; long lists are left to the file."""
    if isinstance(result, dict):
        return [pair for key, value in result.items() for pair in flatten(value, (*path, str(key)))]
    if isinstance(result, list) and (len(result) > 3 or any(isinstance(item, (dict, list)) for item in result)):
        return []
    return [(", ".join(path), result)]


def latest_of(lines: Sequence[dict]) -> dict[str, dict]:
    """Return the latest line of each case that was measured."""
    return {line["case"]: line for line in lines if not line["rehearsed"]}


def tables(lines: Sequence[dict]) -> str:
    """Return the latest line of each case as Markdown."""
    latest = latest_of(lines)
    if not latest:
        return "Nothing has been measured on a GPU yet.\n"
    text = []
    for name in CASES:
        if name not in latest:
            continue
        line = latest[name]
        text += [f"### {name.replace('_', ' ')}", ""]
        if "error" in line:
            text += [f"It did not end ({line['date']}): `{line['error'].strip().splitlines()[-1][:200]}`", ""]
            continue
        text += [f"Measured on {line['date']} in {line['seconds']} s.", "", "| | |", "|---|---|"]
        text += [f"| {key} | {value} |" for key, value in flatten(line["result"])] + [""]
    return "\n".join(text)


def summary(lines: Sequence[dict]) -> str:
    """Return what the README says of GPUs: the tests, and a row of tokens a second."""
    latest = latest_of(lines)
    if not latest:
        return "Its CUDA code has not run on a GPU yet.\n"

    def found(case: str, *path: str) -> Any:
        value = latest.get(case, {}).get("result")
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def per_second(milliseconds: float | None) -> str:
        return "not measured" if milliseconds is None else f"{1e3 / milliseconds:.0f}"

    first = found("first_token", "default_ms")
    cells = {
        "Hugging Face, eager": per_second(found("decode", "variants", "hf_eager", "step_ms")),
        "BF16": per_second(found("decode", "variants", "ours", "step_ms")),
        **{
            name: per_second(found(f"packed_{name.lower()}", "variants", "packed, batch 1", "step_ms"))
            for name in ("FP8", "NVFP4", "AWQ")
        },
        "image to first token": "not measured" if first is None else f"{first:.0f} ms",
    }
    card = (found("versions", "card") or "a GPU").split(",")[0]
    tests = found("gpu_tests", "summary") or "did not end"
    return (
        f"On {card} ({max(line['date'] for line in latest.values())}), random weights of full size; its tests there: "
        f"{tests.strip('= ')} ([all numbers](docs/performance.md#measured-on-a-gpu)):\n\n"
        f"| tokens a second of the 8B | {' | '.join(cells)} |\n|{'---|' * (len(cells) + 1)}\n"
        f"| one sequence | {' | '.join(cells.values())} |\n"
    )


def render(lines: Path, pages: dict[Path, Callable[[Sequence[dict]], str]]) -> None:
    """Write what each page says of the lines between its marks."""
    found = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()] if lines.exists() else []
    for page, write in pages.items():
        text = page.read_text(encoding="utf-8")
        begin, end = (text.find(mark) for mark in MARKS)
        if begin < 0 or end < begin:
            raise ValueError(
                f"{page.name} has no place for the tables: the lines {MARKS[0].strip()} and {MARKS[1].strip()}."
            )
        text = text[: begin + len(MARKS[0])] + "\n" + write(found) + "\n" + text[end:]
        page.write_text(text, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--call", type=int, choices=CALLS, action="append", help="run these calls; all by default")
    parser.add_argument("--case", choices=CASES, help="run one case in this process and print its line")
    parser.add_argument("--out", type=Path, help="folder of gpu_day.jsonl; the default is $OUT or benchmarks/results")
    parser.add_argument("--rehearse", action="store_true", help="a pretended device and a tiny model")
    parser.add_argument(
        "--render", action="store_true", help="write the lines into docs/performance.md and the README"
    )
    arguments = parser.parse_args()
    folder = arguments.out or Path(os.environ.get("OUT") or LINES.parent)
    lines = folder / LINES.name
    if arguments.render:
        render(lines, {PAGE: tables, README: summary})
        return 0
    if arguments.case:
        run_case(arguments.case, arguments.rehearse)
        return 0
    if arguments.rehearse and arguments.out is None:
        parser.error("--rehearse needs --out: its lines are no measurements")
    folder.mkdir(parents=True, exist_ok=True)
    found = [line for call in arguments.call or CALLS for line in run_call(call, arguments.rehearse, lines)]
    failed = [line["case"] for line in found if "error" in line]
    print(f"{len(found) - len(failed)} of {len(found)} cases ended" + (f"; not {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
