"""Serve a checkpoint to OpenAI clients.

    pip install 'nemotron-vl[serve]'
    python -m tools.serve  # nano, on http://localhost:8000/v1
    python -m tools.serve path/to/8b --device cuda --port 8080

`POST /v1/chat/completions` answers about text, images, videos and PDFs, as plain text or held to a JSON Schema, whole or
as a stream; `GET /v1/models` names the model, `GET /health` says that the server runs. What cannot be honoured is
refused: docs/serving.md has the tables. The server fetches nothing and reads no file for a client. Without `--api-key`
anyone who reaches it may ask, so by default it listens on localhost.
"""

import argparse
import os
import sys
from pathlib import Path

from . import ROOT
from .command_line import command_parser, usable_device

PACKAGES = ("starlette", "uvicorn", "llguidance", "jsonschema")
MEBIBYTE = 2**20
GRACE_SECONDS = 5  # that answers get when the server is told to end
KEY_VARIABLE = "NEMOTRON_VL_API_KEY"


def positive(text: str) -> float:
    """Return a number above 0, for argparse."""
    if not float(text) > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return float(text)


def count(text: str) -> int:
    """Return a whole number from 0 on, for argparse."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 on, got {text}")
    return int(text)


def parser_of_options() -> argparse.ArgumentParser:
    parser = command_parser("serve", __doc__)
    parser.add_argument("directory", type=Path, nargs="?", default=ROOT / "nano")
    parser.add_argument("--host", default="localhost")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--device", type=usable_device, help="cpu, cuda, ...; the default is what accelerate chooses")
    parser.add_argument("--dtype", default="auto", help="bfloat16, float32, ...; the default is the checkpoint's own")
    parser.add_argument("--attention", help="eager, sdpa, flash_attention_2, ...")
    limits = parser.add_argument_group("limits", "A request beyond one is refused, with the numbers.")
    limits.add_argument(
        "--api-key", action="append", metavar="KEY",
        help=f"clients have to send it, or another that is given so; ${KEY_VARIABLE} does the same",
    )  # fmt: skip
    limits.add_argument(
        "--max-queue", type=count, default=64, metavar="N", help="requests that may wait (%(default)s)"
    )
    limits.add_argument(
        "--max-seconds", type=positive, default=600, metavar="N", help="for a request, with its wait (%(default)s)"
    )
    limits.add_argument("--max-body-mb", type=positive, default=64, metavar="N", help="of a request (%(default)s MiB)")
    limits.add_argument("--max-file-mb", type=positive, default=24, metavar="N", help="of a file (%(default)s MiB)")
    limits.add_argument("--max-pixels", type=count, default=100_000_000, metavar="N", help="of an image (%(default)s)")
    limits.add_argument("--max-images", type=count, default=64, metavar="N", help="and videos (%(default)s)")
    limits.add_argument("--max-pages", type=count, default=64, metavar="N", help="of all files (%(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = parser_of_options().parse_args(argv)
    try:
        import uvicorn
        from nemotron_vl.serving.app import ServerLimits, make_app
        from nemotron_vl.serving.media import MediaLimits
        from nemotron_vl.serving.protocol import PunctualProtocol
    except ImportError as error:
        raise ImportError(
            f"Serving needs packages that are not installed: pip install {' '.join(PACKAGES)}. {error}"
        ) from error
    keys = arguments.api_key or [key for key in (os.environ.get(KEY_VARIABLE),) if key]
    app = make_app(
        arguments.directory,
        api_keys=keys,
        limits=ServerLimits(int(arguments.max_body_mb * MEBIBYTE)),
        media=MediaLimits(
            int(arguments.max_file_mb * MEBIBYTE), arguments.max_pixels, arguments.max_images, arguments.max_pages
        ),
        max_queue=arguments.max_queue,
        max_seconds=arguments.max_seconds,
        device_map=arguments.device or "auto",
        dtype=arguments.dtype,
        attn_implementation=arguments.attention,
    )
    uvicorn.run(
        app,
        host=arguments.host,
        port=arguments.port,
        http=PunctualProtocol,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
