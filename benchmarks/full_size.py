"""The whole 8B on a CPU: time to load, memory, and the time of an answer about one tile and about four.

    python -m benchmarks.full_size                          # NVFP4, AWQ, FP8, BF16, one after the other
    python -m benchmarks.full_size --formats nvfp4 awq
    python -m benchmarks.full_size --checkpoint path/to/8b  # weights that are there, instead of random ones

Opt-in: `benchmarks.run` leaves it out, because it writes up to 18 GB into a temporary folder (`--folder` says where) and
takes minutes a format. The checkpoint of each format is written by `tools.random_checkpoint`, loaded packed in a process
of its own, and removed, also after Ctrl-C. A format whose weights do not fit the free memory is skipped with a line
that says so.

Each format prints one JSON line. Every time is there twice: by the clock, and as processor time of all threads. On a
busy machine take the latter, with `--threads 1`: threads that wait for each other use the processor too. "load" is
`from_pretrained`, from a disk whose cache does not have the files. Weights that are mapped from the file are read from
the disk when they are first used: `first_pass_seconds` is the time of one token after loading, before the answers. The
parts of an answer are "image" (tiles and ids), "tower" (with projector), "prefill" (from there to the first token), and
"token", the median of the tokens after the first. Memory is that of the process, in GB of 10^9 bytes: `peak_gb` while loading and answering, of which
`mapped_gb` are pages of files, which the system may drop.

Tables of all rows come last.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from nemotron_vl.image_processing import count_tiles
from PIL import Image
from transformers.generation.streamers import BaseStreamer

from benchmarks.common import report
from tools import ROOT
from tools.chat import load
from tools.quantize import folder_size
from tools.random_checkpoint import write_random_checkpoint

FORMATS = ("nvfp4", "awq", "fp8", "bf16")
SPARE_BYTES = 2e9  # what a process takes beside its weights, cache included
QUESTION = "Read all the text in this image."
# (rows, columns) of the grid: one tile has no thumbnail, four tiles have one more.
GRIDS = {"one tile": (1, 1), "four tiles and a thumbnail": (2, 2)}


class Clock(BaseStreamer):
    """Notes when the prompt and each token come: wall time and the processor time of all threads, in seconds."""

    def __init__(self) -> None:
        self.moments = [moment()]

    def put(self, ids: torch.Tensor) -> None:
        self.moments.append(moment())

    def end(self) -> None:
        """Do nothing: the last token has been noted."""


def moment() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def memory_gb(key: str) -> float:
    """Return a line of /proc/self/status: VmHWM is the peak, RssFile the pages of files."""
    status = Path("/proc/self/status").read_text().splitlines()
    return round(int(next(line.split()[1] for line in status if line.startswith(key))) * 1024 / 1e9, 2)


def available_bytes() -> int:
    """Memory that a new process can take."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable")))


def forget(folder: Path) -> None:
    """Drop the weight files from the system's cache, so that loading reads the disk."""
    for file in folder.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


@torch.no_grad()
def answer(model: Any, processor: Any, grid: tuple[int, int], num_tokens: int) -> dict[str, Any]:
    """Answer a question about an image that is cut into this grid, and say how long each part took."""
    rows, columns = grid
    tiling = processor.image_processor.tiling
    side = tiling.image_size // tiling.upscale
    image = Image.open(ROOT / "examples" / "receipt.png").convert("RGB").resize((columns * side, rows * side))
    messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    start = moment()
    inputs = processor.apply_chat_template(messages, **options)
    prepared = moment()
    features = {"image": model.get_image_features(inputs.pop("pixel_values"), inputs.pop("num_patches"))}
    clock = Clock()
    output = model.generate(
        **inputs,
        mm_encoder_outputs=features,
        streamer=clock,
        min_new_tokens=num_tokens,
        max_new_tokens=num_tokens,
        do_sample=False,
    )
    seen, _, first, *_ = clock.moments
    length = inputs["input_ids"].shape[1]
    found: dict[str, Any] = {
        "num_tiles": count_tiles(image.height, image.width, tiling),
        "prompt_tokens": length,
        "new_tokens": output.shape[1] - length,
    }
    for index, name in enumerate(("seconds", "processor_seconds")):
        tokens = [after[index] - before[index] for before, after in pairwise(clock.moments[2:])]
        found[name] = {
            "image": round(prepared[index] - start[index], 2),
            "tower": round(seen[index] - prepared[index], 2),
            "prefill": round(first[index] - seen[index], 2),
            "first_token": round(first[index] - start[index], 2),
            "token": round(statistics.median(tokens), 3),
            "token_range": [round(min(tokens), 3), round(max(tokens), 3)],
        }
    return found


def measure(checkpoint: Path, name: str, num_tokens: int) -> None:
    """Load one checkpoint in this process, let it answer, and print the JSON line."""
    start = moment()
    model, processor = load(checkpoint)
    load_seconds, load_processor_seconds = (after - before for before, after in zip(start, moment(), strict=True))
    peak_loading_gb = memory_gb("VmHWM")
    start = moment()
    with torch.no_grad():
        model(input_ids=torch.tensor([[0]]))
    first_pass_seconds = moment()[0] - start[0]
    print(f"{name}: loaded in {load_seconds:.1f} s, {load_processor_seconds:.1f} s of a processor.", file=sys.stderr)
    answers = {}
    for case, grid in GRIDS.items():
        answers[case] = answer(model, processor, grid, num_tokens)
        print(f"{name}, {case}: {answers[case]}", file=sys.stderr)
    found: dict[str, Any] = {
        "case": name,
        "file_gb": round(folder_size(checkpoint) / 1e9, 2),
        "load_seconds": round(load_seconds, 1),
        "load_processor_seconds": round(load_processor_seconds, 1),
        "first_pass_seconds": round(first_pass_seconds, 1),
        "peak_loading_gb": peak_loading_gb,
        "answers": answers,
        "peak_gb": memory_gb("VmHWM"),
        "mapped_gb": memory_gb("RssFile"),
    }
    report("full_size", [found], model, clock="wall and processor time of all threads", num_cores=os.cpu_count())


def run(checkpoint: Path, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure a checkpoint in a process of its own and print its line; a format that does not fit is skipped."""
    needed, free = folder_size(checkpoint) + SPARE_BYTES, available_bytes()
    if free < needed:
        skipped = f"needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"
        line = {"benchmark": "full_size", "results": [{"case": name, "skipped": skipped}]}
        print(json.dumps(line), flush=True)
        return line
    forget(checkpoint)
    command = [sys.executable, "-m", "benchmarks.full_size", "--measure", name, str(checkpoint)]
    command += ["--new-tokens", str(options.new_tokens)]
    command += ["--threads", str(options.threads)] if options.threads else []
    finished = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if finished.returncode:
        raise RuntimeError(f"{name} ended with status {finished.returncode}; its messages are above.")
    print(finished.stdout, end="", flush=True)
    return json.loads(finished.stdout.splitlines()[-1])


def checkpoints(options: argparse.Namespace) -> Iterator[tuple[str, Path]]:
    """Yield each checkpoint with its name; one written here is removed before the next."""
    if options.checkpoint:
        yield options.checkpoint.name, options.checkpoint.resolve()
        return
    for name in options.formats:
        with tempfile.TemporaryDirectory(prefix="full-size-", dir=options.folder) as folder:
            write_random_checkpoint(Path(folder) / name, name)
            yield name, Path(folder) / name


def markdown(lines: list[dict[str, Any]], clock: str) -> str:
    """Return the table of all rows; `clock` is "seconds" or "processor_seconds"."""
    heads = "weights", "file, GB", "load, s", "peak, GB", "image", "tower, s", "prefill, s", "a token, s"
    table = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for line in lines:
        for result in line["results"]:
            for case, times in result.get("answers", {result.get("skipped"): {clock: {}}}).items():
                cells = [result["case"], *(result.get(key, "") for key in ("file_gb", f"load_{clock}", "peak_gb"))]
                cells += [case, *(times[clock].get(key, "") for key in ("tower", "prefill", "token"))]
                table.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="measure this one instead of random weights")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where to write; the system's temporary folder")
    parser.add_argument("--new-tokens", type=int, default=16, help="length of an answer (default %(default)s)")
    parser.add_argument("--threads", type=int, metavar="N", help="of torch; by default torch's own choice")
    parser.add_argument("--measure", nargs=2, metavar=("NAME", "DIR"), help="measure a checkpoint in this process")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.measure:
        name, checkpoint = options.measure
        measure(Path(checkpoint), name, options.new_tokens)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the checkpoint is removed
    lines = [run(checkpoint, name, options) for name, checkpoint in checkpoints(options)]
    for clock in ("seconds", "processor_seconds"):
        print(f"\n{clock}\n\n{markdown(lines, clock)}")


if __name__ == "__main__":
    main()
