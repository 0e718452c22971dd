"""docling: turn the pages of documents into Markdown with this model, in docling's process or on a server.

    pip install docling
    python examples/clients/docling_markdown.py path/to/flat document.pdf > document.md

    pip install torch==2.13.0 "docling-slim[convert-core,format-pdf,format-web]"  # enough for a server
    python examples/clients/docling_markdown.py nano document.pdf --server http://localhost:8000/v1 > document.md

The server is `python -m tools.serve`, vLLM, or another with OpenAI's interface that takes images; $OPENAI_API_KEY is
sent along. docling knows no LaTeX tables and joins the lines of a paragraph, so answers are rewritten for it. The exit
status is 1 if a page failed or its answer was cut off.
"""

import argparse
import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

DECODING = {"skip_special_tokens": True}  # otherwise docling keeps the token that ends an answer in the Markdown
MAX_NEW_TOKENS = 4096
# The words of `tools.read`, for a checkpoint whose config has none of its own.
PROMPT = (
    "Convert this page to Markdown, all of it and in reading order. Write tables as LaTeX, and formulas as LaTeX too. "
    "Add nothing that is not on the page."
)
# A4 has 12 tiles, 1536 x 2048 pixels; at 180 dpi docling sends 1488 x 2105. Six tiles, the longest side, have 3072.
PAGE_SIZE = {"scale": 2.5, "max_size": 3072}


def page_prompt(folder: Path) -> str:
    """Return what asks a checkpoint for the whole page, as `tools.read` does: the words of its config, or `PROMPT`."""
    config = folder / "config.json"
    stored = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
    return (stored.get("task_specific_params") or {}).get("markdown", {}).get("prompt", PROMPT)


def model_options(folder: Path, **changes: Any) -> dict[str, Any]:
    """What docling's `InlineVlmOptions` takes for a checkpoint with our code beside it.

    docling looks for the folder among its artifacts; `converter` says where those are.
    """
    return {
        "repo_id": folder.resolve().name,
        "prompt": page_prompt(folder),
        "response_format": "markdown",
        "inference_framework": "transformers",
        "transformers_model_type": "automodel-imagetexttotext",
        "trust_remote_code": True,
        "temperature": 0.0,
        "max_new_tokens": MAX_NEW_TOKENS,
        "extra_generation_config": DECODING,
        **PAGE_SIZE,
        **changes,
    }


def server_options(folder: Path, url: str, name: str, **changes: Any) -> dict[str, Any]:
    """What docling's `ApiVlmOptions` takes for a server.

    Args:
        folder: of the checkpoint; only the config is read.
        url: of the server, such as http://localhost:8000/v1.
        name: of the model there.
        changes: other options. A page waits for those that were sent before it, and its time out covers that as well.
    """
    key = os.environ.get("OPENAI_API_KEY")
    return {
        "url": f"{url.rstrip('/')}/chat/completions",
        "headers": {"Authorization": f"Bearer {key}"} if key else {},
        "params": {"model": name, "max_tokens": MAX_NEW_TOKENS},
        "prompt": page_prompt(folder),
        "response_format": "markdown",
        "temperature": 0.0,
        "timeout": 3600,  # seconds; on a CPU a page takes minutes
        "concurrency": 1,  # tools.serve answers one request after the other
        **PAGE_SIZE,
        **changes,
    }


def only_model(url: str) -> str:
    """Return the name of the model that a server has.

    Raises:
        ValueError: if it has several, or does not answer.
    """
    import requests  # comes with docling

    key = os.environ.get("OPENAI_API_KEY", "none")
    try:
        answer = requests.get(f"{url.rstrip('/')}/models", headers={"Authorization": f"Bearer {key}"}, timeout=60)
        answer.raise_for_status()
        names = [model["id"] for model in answer.json()["data"]]
    except (requests.RequestException, LookupError, TypeError) as error:
        raise ValueError(f"{url} does not answer as a server with OpenAI's interface: {error}") from error
    if len(names) != 1:
        raise ValueError(f"{url} has the models {', '.join(names) or '(none)'}. Name one with --server-model.")
    return names[0]


def to_markdown(answer: str) -> str:
    r"""Return an answer as docling reads it: tables and formulas in Markdown or HTML, and a break after each line.

    docling takes `\begin{tabular}` for text, and a line break within a paragraph for a space.
    """
    file = Path(__file__).resolve().parents[2] / "reading/markdown.py"  # by its path: its package needs torch
    spec = importlib.util.spec_from_file_location("nemotron_vl_markdown", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return re.sub(r"(?<=\S)\n(?=\S)", "  \n", module.to_markdown(answer))


def converter(options: Any, artifacts: Path | None = None) -> Any:
    """A docling `DocumentConverter` for PDF files and images.

    Args:
        options: of docling's `InlineVlmOptions` or, with a `url`, of its `ApiVlmOptions`, as a dict.
        artifacts: the folder that holds the folder of an inline model.
    """
    from docling.datamodel.base_models import InputFormat
    from docling.datamodel.pipeline_options import VlmPipelineOptions
    from docling.datamodel.pipeline_options_vlm_model import ApiVlmOptions, InlineVlmOptions
    from docling.datamodel.settings import settings
    from docling.document_converter import DocumentConverter, ImageFormatOption, PdfFormatOption
    from docling.pipeline.vlm_pipeline import VlmPipeline

    class Decoded(ApiVlmOptions if "url" in options else InlineVlmOptions):
        def decode_response(self, text: str) -> str:
            return to_markdown(text)

    # docling sends the pages of one batch at once, and no more.
    settings.perf.page_batch_size = max(settings.perf.page_batch_size, options.get("concurrency", 1))
    pipeline_options = VlmPipelineOptions(
        artifacts_path=artifacts, enable_remote_services="url" in options, vlm_options=Decoded(**options)
    )
    formats = {InputFormat.PDF: PdfFormatOption, InputFormat.IMAGE: ImageFormatOption}
    return DocumentConverter(
        allowed_formats=list(formats),
        format_options={
            name: option(pipeline_cls=VlmPipeline, pipeline_options=pipeline_options)
            for name, option in formats.items()
        },
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory of a checkpoint; with --server its config.json is enough")
    parser.add_argument("document", type=Path, nargs="+", help="PDF or image")
    parser.add_argument(
        "--prompt", help="what the model is asked about each page; the default is the config's, or ours"
    )
    parser.add_argument("--scale", type=float, default=PAGE_SIZE["scale"], help="1 is 72 dpi; default %(default)s")
    parser.add_argument(
        "--server", metavar="URL", help="where a server has the model, such as http://localhost:8000/v1"
    )
    parser.add_argument("--server-model", metavar="NAME", help="its name there, if the server has several")
    parser.add_argument(
        "--concurrency", type=int, default=1, metavar="N", help="requests at once; default %(default)s"
    )
    arguments = parser.parse_args(argv)
    changes = {"scale": arguments.scale, **({"prompt": arguments.prompt} if arguments.prompt else {})}
    try:
        if arguments.server:
            name = arguments.server_model or only_model(arguments.server)
            options = server_options(arguments.model, arguments.server, name, **changes)
            convert = converter({**options, "concurrency": arguments.concurrency})
        else:
            convert = converter(model_options(arguments.model, **changes), arguments.model.resolve().parent)
    except ImportError as error:
        parser.error(f"docling is absent ({error}): pip install docling")
    except ValueError as error:
        parser.error(str(error))
    failed = False
    for result in convert.convert_all(arguments.document, raises_on_error=False):
        print(result.document.export_to_markdown(escape_html=False))
        for error in result.errors:
            failed = True
            print(f"{result.input.file.name}, page {error.page_no}: {error.error_message}", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
