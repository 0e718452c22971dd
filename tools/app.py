"""Open a page in the browser that shows a document, its tiles and their cost, answers questions and reads fields.

    pip install gradio pypdfium2 llguidance jsonschema  # the extra `app`
    python -m tools.app  # nano, on http://localhost:7860
    python -m tools.app path/to/8b --device cuda --port 8080
    python -m tools.app --space my-space  # write a Hugging Face Space instead, which can be pushed as it is

The page fetches nothing from the network and reports nothing to anybody. One answer is generated at a time; the other
tabs wait. It has no authentication: let it listen on localhost, or behind a proxy that authenticates.
"""

import os
import sys
import threading
from pathlib import Path
from typing import Any

from . import ROOT
from .command_line import command_parser, require_checkpoint, usable_device

PIP = "pip install gradio pypdfium2 llguidance jsonschema"
MAX_FILE_SIZE = "200mb"
MAX_WAITING = 64  # questions of all tabs


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("app", __doc__)
    parser.add_argument("directory", type=Path, nargs="?", default=ROOT / "nano", help="of a checkpoint")
    parser.add_argument("--host", default=os.environ.get("GRADIO_SERVER_NAME", "localhost"))
    parser.add_argument("--port", type=int, default=int(os.environ.get("GRADIO_SERVER_PORT", "7860")))
    parser.add_argument("--device", type=usable_device, help="cpu, cuda, ...; the default is what accelerate chooses")
    parser.add_argument("--dtype", default="auto", help="bfloat16, float32, ...; the default is the checkpoint's own")
    parser.add_argument(
        "--space", type=Path, metavar="DIR", help="write a Hugging Face Space for the checkpoint there"
    )
    arguments = parser.parse_args(argv)
    require_checkpoint(arguments.directory)
    if arguments.space:
        from .space import write_space

        write_space(arguments.space, arguments.directory)
        print(f"{arguments.space} is a Space. It runs with: pip install -r requirements.txt; python app.py")
        return 0
    page = launch(
        arguments.directory,
        arguments.host,
        arguments.port,
        device_map=arguments.device or "auto",
        dtype=arguments.dtype,
    )
    try:
        print(f"The page is on {page.local_url}; Ctrl-C ends it.", flush=True)
        threading.Event().wait()
    finally:
        page.close(verbose=False)
    return 0


def launch(directory: Path, host: str, port: int, **options: Any) -> Any:
    """Load a checkpoint, serve the page in threads of its own, and return gradio's `Blocks`, which can be closed.

    Args:
        directory: of the checkpoint.
        host, port: where to listen.
        options: of `AutoModel.from_pretrained`.

    Raises:
        ImportError: if gradio is not installed; with the command that installs it.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it when it is imported
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        from .page import EXAMPLES, STYLE, THEME, DocumentPage
    except ImportError as error:
        raise ImportError(f"The page needs packages that are not installed: {PIP}. {error}") from error
    from .chat import load
    from .session import Reader
    from .threads import choose_threads

    model, processor = load(directory, **options)
    choose_threads(model)
    blocks = DocumentPage(Reader(model, processor, directory.resolve().name)).blocks
    blocks.queue(max_size=MAX_WAITING, default_concurrency_limit=4)
    blocks.launch(
        server_name=host,
        server_port=port,
        theme=THEME,
        css=STYLE,
        footer_links=[],
        run_history=False,  # nothing of a document stays in the browser
        ssr_mode=False,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        max_file_size=MAX_FILE_SIZE,
        allowed_paths=[str(ROOT / "examples" / name) for name in EXAMPLES.values()],
    )
    return blocks


if __name__ == "__main__":
    sys.exit(main())
