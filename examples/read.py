# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0",
#   "transformers==5.23.0",
#   "accelerate==1.15.0",
#   "numpy==2.4.6",
#   "pillow==13.0.0",
#   "pypdfium2==5.15.2",
# ]
# ///
"""Read a document, or a folder of them, into Markdown and JSON lines. This file and a checkpoint are all it takes.

    uv run examples/read.py examples/invoice.pdf out                     # in a clone: nano
    uv run read.py scans out --model path/to/8b --max-num-tiles 4        # anywhere: what tools.adopt wrote

OUT gets NAME.md for each document, in the tree of IN, and `pages.jsonl` with a line for each page. The exit status is 1
if a page failed. `python -m tools.read` in a clone does more: it goes on where it was interrupted, converts LaTeX
tables, extracts fields, and asks servers.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NANO = Path(__file__).resolve().parents[1] / "nano"
ENDINGS = (".pdf", ".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".bmp", ".gif", ".avif")
# What asks for a page, where the checkpoint's config has no words of its own.
PROMPT = (
    "Convert this page to Markdown, all of it and in reading order. Write tables as Markdown tables. Add nothing that "
    "is not on the page."
)
STATUSES = {"stop": "read", "length": "cut off", "loop": "looped"}
# What a document or a page that cannot be read raises; PDFium's and CUDA's errors are RuntimeErrors.
PAGE_ERRORS = (ValueError, TypeError, OSError, RuntimeError, MemoryError)


def load(directory: Path) -> tuple[Any, Any]:
    """Return model and processor of a directory with our code in it, or in the one above it like a clone's `nano`."""
    from transformers import AutoModel, AutoProcessor

    where: dict[str, Any] = {"trust_remote_code": True}
    source = directory.resolve()
    if not (source / "config.json").exists():
        raise SystemExit(f"{directory} holds no config.json. Name the directory of a checkpoint: --model DIR.")
    if not (source / "modeling_nemotron_vl.py").exists():
        source, where["subfolder"] = source.parent, source.name
    model = AutoModel.from_pretrained(source, dtype="auto", device_map="auto", **where)
    return model.eval(), AutoProcessor.from_pretrained(source, **where)


def find_documents(path: Path) -> list[Path]:
    """Return a file, or the files of a folder and the folders in it that end like a document."""
    if not path.exists():
        raise SystemExit(f"{path} does not exist.")
    if path.is_file():
        return [path]
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in ENDINGS and file.is_file())
    if not found:
        raise SystemExit(f"{path} holds no file that ends in {', '.join(ENDINGS)}.")
    return found


def read_pages(model: Any, processor: Any, file: Path, prompt: str, options: argparse.Namespace) -> Iterator[dict]:
    """Yield a row for each page of a document; what cannot be read is a row with an error."""
    row = {"file": str(file), "page": None, "answer": None, "tokens": 0, "status": "failed", "error": None}
    try:
        with processor.open_document(file) as pages:
            for page in pages:
                row["page"] = page.number
                try:
                    features = processor.image_processor(
                        page, return_tensors="pt", max_num_tiles=options.max_num_tiles
                    )
                    answer = model.chat(
                        processor,
                        question=prompt,
                        generation_config={"max_new_tokens": options.max_new_tokens, "do_sample": False},
                        return_dict=True,
                        stop_loops=True,
                        **features,
                    )
                    tokens = len(answer.token_ids) + (answer.finish_reason == "stop")  # the end token
                    yield {**row, "answer": answer.text, "tokens": tokens, "status": STATUSES[answer.finish_reason]}
                except PAGE_ERRORS as error:
                    yield {**row, "error": str(error)}
    except PAGE_ERRORS as error:
        yield {**row, "error": str(error)}


def markdown(rows: list[dict]) -> str:
    """Return the pages of a document, each after a comment with its number and what is wrong with it."""
    parts = []
    for row in rows:
        remark = "" if row["status"] == "read" else f": {row['error'] or row['status']}".replace("--", "- -")
        parts.append(f"<!-- page {row['page'] or '?'}{remark} -->\n\n{row['answer'] or ''}".rstrip() + "\n")
    return "\n".join(parts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", type=Path, metavar="IN", help="a PDF, an image, or a folder of them")
    parser.add_argument("out", type=Path, metavar="OUT", help="a new or empty folder")
    parser.add_argument(
        "--model", type=Path, default=NANO, help="directory of a checkpoint; default nano of the clone"
    )
    parser.add_argument("--prompt", help="what is asked about each page; the default asks for all of it as Markdown")
    parser.add_argument("--max-num-tiles", type=int, metavar="N", help="of a page; fewer are faster and less sharp")
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="of an answer; default 4096, or half the context"
    )
    options = parser.parse_args(argv)
    files = find_documents(options.documents)
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise SystemExit(f"{options.out} is not an empty folder. Name a new one: nothing is overwritten.")
    model, processor = load(options.model)
    tasks = getattr(model.config, "task_specific_params", None) or {}
    options.max_new_tokens = options.max_new_tokens or min(4096, model.config.max_sequence_length // 2)
    prompt = options.prompt or tasks.get("markdown", {}).get("prompt", PROMPT)
    options.out.mkdir(parents=True, exist_ok=True)
    failed = 0
    with (options.out / "pages.jsonl").open("w", encoding="utf-8") as lines:
        for file in files:
            rows = []
            for row in read_pages(model, processor, file, prompt, options):
                rows.append(row)
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")
                lines.flush()
                failed += row["status"] == "failed"
                print(f"{file}, page {row['page']}: {row['error'] or row['status']}", file=sys.stderr)
            root = options.documents if options.documents.is_dir() else file.parent
            target = options.out / file.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.with_name(f"{file.name}.md").write_text(markdown(rows), encoding="utf-8")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
