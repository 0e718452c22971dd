"""Serve a checkpoint to OpenAI clients: the stock `transformers serve`, extended to load this model.

    pip install fastapi uvicorn openai  # the extra `serve`
    python -m tools.serve  # nano, on http://localhost:8000/v1
    python -m tools.serve path/to/8b --device cuda --port 8080

`POST /v1/chat/completions` takes text and `image_url` parts with a `data:` URL, and streams; `GET /v1/models` names
the model, `GET /health` says that the server runs. Requests that cannot be honoured are refused with HTTP 400: other
content parts, options that would be ignored, prompts beyond the context; docs/serving.md lists the few options that
are ignored. The server fetches nothing and reads no file for a client. It has no authentication: let it listen on
localhost, or behind a proxy that authenticates.
"""

import sys
from pathlib import Path

from . import ROOT
from .command_line import command_parser, usable_device

PACKAGES = ("fastapi", "uvicorn", "openai")


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("serve", __doc__)
    parser.add_argument("directory", type=Path, nargs="?", default=ROOT / "nano")
    parser.add_argument("--host", default="localhost")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--device", type=usable_device, help="cpu, cuda, ...; the default is what accelerate chooses")
    parser.add_argument("--dtype", default="auto", help="bfloat16, float32, ...; the default is the checkpoint's own")
    parser.add_argument("--attention", help="eager, sdpa, flash_attention_2, ...")
    arguments = parser.parse_args(argv)
    try:
        import openai  # noqa: F401  (the stock server builds its answers with it)
        import uvicorn

        from .server import make_app
    except ImportError as error:
        raise ImportError(what_is_missing(error)) from error
    app = make_app(
        arguments.directory,
        device_map=arguments.device or "auto",
        dtype=arguments.dtype,
        attn_implementation=arguments.attention,
    )
    uvicorn.run(app, host=arguments.host, port=arguments.port)
    return 0


def what_is_missing(error: ImportError) -> str:
    """Return what serving lacks: one of its packages, or the transformers that has a server to extend."""
    import transformers

    if (error.name or "").split(".")[0] in PACKAGES:
        return f"Serving needs packages that are not installed: pip install {' '.join(PACKAGES)}. {error}"
    return f"Serving needs transformers 5.23 or later, this is {transformers.__version__}. {error}"


if __name__ == "__main__":
    sys.exit(main())
