"""Servers for tests: the application in a thread of this process, or the command in a process of its own."""

import base64
import contextlib
import io
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tools import ROOT

PACKAGES = "pip install starlette uvicorn openai"

RATE = {
    "type": "function",
    "function": {
        "name": "rate",
        "description": "The rate of a currency.",
        "parameters": {
            "type": "object",
            "properties": {"currency": {"enum": ["EUR", "USD"]}, "day": {"$ref": "#/$defs/day"}},
            "required": ["currency"],
            "$defs": {"day": {"enum": ["today", "yesterday"]}},
        },
    },
}
OTHER: dict[str, Any] = {"type": "function", "function": {"name": "now"}}


@contextlib.contextmanager
def running(app: Any) -> Iterator[str]:
    """Run an application in a thread and yield its address."""
    uvicorn = pytest.importorskip("uvicorn", reason=PACKAGES)
    from nemotron_vl.serving.protocol import PunctualProtocol

    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", http=PunctualProtocol)
    config.timeout_graceful_shutdown = 1
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@contextlib.contextmanager
def served(model: Any, processor: Any, **options: Any) -> Iterator[Any]:
    """Serve a loaded model under the name "nano", and yield a client; `options` are limits, as `tools.serve` has them."""
    pytest.importorskip("starlette", reason=PACKAGES)
    from nemotron_vl.serving.app import Server, ServerLimits
    from nemotron_vl.serving.engine import Engine
    from nemotron_vl.serving.media import MediaLimits

    def of(kind: type) -> dict[str, Any]:
        return {field.name: options.pop(field.name) for field in fields(kind) if field.name in options}

    limits, media, keys = ServerLimits(**of(ServerLimits)), MediaLimits(**of(MediaLimits)), options.pop("api_keys", ())
    server = Server(Engine(model, processor, media, **options), "nano", keys, limits)
    with running(server.app()) as address:
        yield client_of(address)


def client_of(address: str, **options: Any) -> Any:
    openai = pytest.importorskip("openai", reason=PACKAGES)
    return openai.OpenAI(base_url=f"{address}/v1", **{"api_key": "none", "max_retries": 0, **options})


def serve(directory: Path, log: Path, *options: str) -> Iterator[Any]:
    """Start the command in a process of its own and yield a client of it."""
    pytest.importorskip("starlette", reason=PACKAGES)
    pytest.importorskip("uvicorn", reason=PACKAGES)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = ["--host", "127.0.0.1", "--port", str(port)]
    command = [sys.executable, "-m", "tools.serve", str(directory), *place, *options]
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
    try:
        for _ in range(600):
            if process.poll() is not None:
                pytest.fail(f"tools.serve ended: {log.read_text()}")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except urllib.error.URLError:
                time.sleep(0.2)
        yield client_of(f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        process.wait()


def data_url(data: bytes | Image.Image, kind: str = "image/png") -> str:
    if isinstance(data, Image.Image):
        buffer = io.BytesIO()
        data.save(buffer, "png")
        data = buffer.getvalue()
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def image_part(image: Image.Image, **options: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(image), **options}}


def file_part(data: bytes, kind: str = "application/pdf", **options: Any) -> dict[str, Any]:
    return {"type": "file", "file": {"filename": "a.pdf", "file_data": data_url(data, kind), **options}}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": [text_part(part) if isinstance(part, str) else part for part in parts]}


def pdf_of(*texts: str) -> bytes:
    fpdf = pytest.importorskip("fpdf")
    pdf = fpdf.FPDF()
    for text in texts:
        pdf.add_page()
        pdf.set_font("helvetica", size=32)
        pdf.cell(text=text)
    return bytes(pdf.output())
