"""Many clients at once against the server: is every answer that of its own picture, how fast, and is memory flat?

    python -m benchmarks.serving                                      # 2,000 requests of 64 clients, a tiny checkpoint
    python -m benchmarks.serving --checkpoint nano --requests 200 --clients 8
    python -m benchmarks.serving --checkpoint path/to/8b --requests 64 --clients 16 --verify 16

Each request has a picture of its own. `tools.serve` runs in a process of its own; this one sends the requests, and
compares the answers with those of `chat()` afterwards, all of them or the first `--verify`. The JSON line has requests a
second, the seconds that requests waited in the queue and that they took in all (median and 99th percentile), and the
resident memory of the server after a tenth of the requests, after half and after all of them.
"""

import argparse
import base64
import http.client
import io
import json
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.common import report
from tools import ROOT
from tools.chat import load
from tools.threads import choose_threads
from tools.tiny_checkpoint import make_tiny_checkpoint

QUESTION = "What?"
SIDE = 64  # pixels of a picture
TRIES = 3000  # to find the server started, a tenth of a second each


def picture(number: int) -> Image.Image:
    """Return a picture of noise that no other number has."""
    pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@contextmanager
def serve(directory: Path, *options: str) -> Iterator[tuple[int, int]]:
    """Start `tools.serve` and yield its port and its process id."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "tools.serve",
        str(directory),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        *options,
    ]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        try:
            for _ in range(TRIES):
                if process.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(f"The server ended: {log.read()[-2000:]}")
                try:
                    request(port, "GET", "/health")
                    break
                except OSError:
                    time.sleep(0.1)
            yield port, process.pid
        finally:
            process.terminate()
            process.wait()


def request(port: int, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any, Any]:
    """Send a request and return status, headers and the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    try:
        connection.request(method, path, None if body is None else json.dumps(body))
        response = connection.getresponse()
        return response.status, response.headers, json.load(response)
    finally:
        connection.close()


def ask(port: int, model: str, number: int, max_tokens: int) -> tuple[str, float, float]:
    """Return the answer about a picture, the seconds it took, and those that it waited in the queue."""
    buffer = io.BytesIO()
    picture(number).save(buffer, "png")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": content}]
    begin = time.perf_counter()
    body = {"model": model, "messages": messages, "max_tokens": max_tokens}
    status, headers, answer = request(port, "POST", "/v1/chat/completions", body)
    if status != 200:
        raise RuntimeError(f"HTTP {status}: {answer}")
    text = answer["choices"][0]["message"]["content"]
    return text, time.perf_counter() - begin, float(headers["x-queue-seconds"])


def resident_megabytes(process: int) -> float | None:
    """Return the resident memory of a process; None where /proc is missing."""
    status = Path(f"/proc/{process}/status")
    found = re.search(r"VmRSS:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return round(int(found[1]) / 1024, 1) if found else None


def load_test(
    directory: Path, num_requests: int, num_clients: int, max_tokens: int
) -> tuple[list[str], dict[str, Any]]:
    """Return the answers to all requests, and the numbers."""
    with serve(directory, "--max-queue", str(num_clients)) as (port, process), ThreadPoolExecutor(num_clients) as pool:
        name = directory.resolve().name
        ask(port, name, num_requests, max_tokens)  # the first one is slower
        memory, done = {}, []
        begin = time.perf_counter()
        for end in (num_requests // 10, num_requests // 2, num_requests):
            numbers = range(len(done), end)
            done += pool.map(lambda number: ask(port, name, number, max_tokens), numbers)
            memory[f"after_{end}"] = resident_megabytes(process)
        seconds = time.perf_counter() - begin
    answers, times, waits = zip(*done, strict=True)
    return list(answers), {
        "requests": num_requests,
        "clients": num_clients,
        "max_tokens": max_tokens,
        "requests_per_second": round(num_requests / seconds, 2),
        "seconds": percentiles(times),
        "seconds_in_queue": percentiles(waits),
        "resident_megabytes": memory,
    }


def percentiles(values: tuple[float, ...]) -> dict[str, float]:
    ranks = statistics.quantiles(values, n=100, method="inclusive")
    return {"median": round(ranks[49], 3), "p99": round(ranks[98], 3)}


def count_wrong(directory: Path, answers: list[str], max_tokens: int) -> int:
    """Return how many answers differ from those of `chat()` about their pictures."""
    model, processor = load(directory)
    choose_threads(model)
    options = {"max_new_tokens": max_tokens, "do_sample": False}
    wrong = 0
    for number, answer in enumerate(answers):
        features = processor.image_processor(picture(number), return_tensors="pt")
        wrong += model.chat(processor, question=QUESTION, generation_config=options, **features) != answer.strip()
    return wrong


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="directory of a checkpoint; a tiny random one without it")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=8)
    parser.add_argument("--verify", type=int, help="compare so many answers with chat(); all without it")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        directory = arguments.checkpoint or make_tiny_checkpoint(Path(folder) / "tiny")
        answers, numbers = load_test(directory, arguments.requests, arguments.clients, arguments.max_tokens)
        verified = answers[: arguments.verify]
        numbers |= {
            "checkpoint": directory.name,
            "verified": len(verified),
            "wrong": count_wrong(directory, verified, arguments.max_tokens),
            "different_answers": len(set(answers)),
        }
    report("serving", [{"case": "one server", **numbers}])
    return int(numbers["wrong"] > 0)


if __name__ == "__main__":
    sys.exit(main())
