"""Read documents: folders of PDFs and images become Markdown and JSON lines, or answers, or fields.

    python -m tools.read invoices --out read                                # Markdown of every page, by nano
    python -m tools.read scans/*.pdf --out totals --ask "What is the total?" --model path/to/8b
    python -m tools.read invoices --out fields --schema invoice.json --server http://localhost:8000/v1

The folder DIR gets a Markdown file for each document, in the tree of the input, and `pages.jsonl` with a line for each
page. The same command again goes on where the last one ended, and tries again what failed. Ctrl-C finishes the page in
flight, and a second one stops at once. The exit status is 1 if a page failed. docs/reading.md says more.
"""

import argparse
import contextlib
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nemotron_vl.reading.engines import ChatServer, InProcess, RayWorkers, Server
from nemotron_vl.reading.inputs import find_documents
from nemotron_vl.reading.pages import STATUSES, Task
from nemotron_vl.reading.run import Run

from . import ROOT
from .command_line import INTERRUPTED, command_parser, progress, require_checkpoint, usable_device

SOME_FAILED = 1


@contextlib.contextmanager
def first_signal_asks() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether Ctrl-C was pressed, or the process was told to end; the second time ends it."""
    asked = []

    def ask(number: int, _: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        print("\nFinishing the page in flight; once more stops at once.", file=sys.stderr)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def show_progress(run: Run) -> None:
    """Read everything, with a bar that says how many pages a minute, and how many are left."""
    started, failed = time.monotonic(), 0
    form = "{l_bar}{bar}| {n_fmt}/{total_fmt} pages [{elapsed}<{remaining}{postfix}]"
    with progress(total=run.num_pages, desc="Reading", bar_format=form) as bar:
        for row in run:
            failed += row["status"] == "failed"
            minutes = (time.monotonic() - started) / 60
            bar.total = max(run.num_pages, bar.n + 1)
            bar.set_postfix_str(f"{(bar.n + 1) / minutes:.1f} a minute{f', {failed} failed' * (failed > 0)}", False)
            bar.update()
        bar.total = bar.n
        bar.refresh()


def summary(run: Run, out: Path) -> str:
    """Return the last line: how many pages of the documents have which status, and always how many failed."""
    statuses = [f"{run.counts[status]} {status}" for status in STATUSES if run.counts[status] or status == "failed"]
    invalid = f" {number(len(run.invalid), 'document')} without a valid object." if run.invalid else ""
    others = f" {number(run.num_others, 'other file')} left out." if run.num_others else ""
    return (
        f"{number(len(run.sources), 'document')}, {number(run.counts.total(), 'page')}: {', '.join(statuses)}."
        f"{invalid}{others} {number(run.num_read, 'page')} of this run, and all others, in {out / 'pages.jsonl'}."
    )


def number(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def tiles(text: str) -> int | str:
    """Return a number of tiles, or "fit", for argparse."""
    return text if text == "fit" else int(text)


def make_engine(arguments: argparse.Namespace) -> Any:
    """Return what reads, by the options about where."""
    if arguments.server:
        return Server(ChatServer(arguments.server, arguments.model, arguments.server_model), arguments.concurrency)
    options = {} if arguments.vllm else {"device_map": arguments.device or "auto"}
    if arguments.engine == "ray":
        resources = {"workers": arguments.workers, "cpus": arguments.cpus, "gpus": arguments.gpus}
        return RayWorkers(arguments.model, arguments.batch_size, arguments.vllm, **resources, **options)
    return InProcess.load(arguments.model, arguments.batch_size, arguments.vllm, **options)


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("read", __doc__)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="files, folders and patterns")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the output")
    what = parser.add_argument_group("what is asked")
    what.add_argument("--task", choices=["markdown"], default="markdown", help="the whole page; the default")
    asked = what.add_mutually_exclusive_group()
    asked.add_argument("--ask", metavar="QUESTION", help="ask this about each page instead")
    asked.add_argument("--schema", type=Path, metavar="FILE", help="extract the fields of this JSON Schema instead")
    what.add_argument("--prompt", help="other words for the whole page than the checkpoint's own")
    what.add_argument("--pages", help="pages of each document, such as 1-3,7; the default is all")
    what.add_argument("--password", help="of encrypted PDFs")
    what.add_argument("--text-layer", action="store_true", help="take the text of PDF pages that have one, unread")
    what.add_argument("--limit", type=int, metavar="N", help="read at most N pages, and leave the rest to another run")
    how = parser.add_argument_group("how it is read")
    how.add_argument("--model", type=Path, default=ROOT / "nano", help="directory of a checkpoint; default nano")
    how.add_argument("--max-num-tiles", type=tiles, metavar="N", help="of a page; 'fit' takes what leaves room")
    how.add_argument(
        "--max-new-tokens", type=int, default=Task.max_new_tokens, metavar="N", help="default %(default)s"
    )
    how.add_argument("--confidence", action="store_true", help="also say how probable each answer is")
    how.add_argument("--keep-loops", action="store_true", help="do not stop answers that repeat themselves")
    where = parser.add_argument_group("where it is read")
    where.add_argument("--engine", choices=["process", "ray"], default="process", help="here, or by workers of Ray")
    where.add_argument(
        "--server", metavar="URL", help="by an OpenAI-compatible server; --model is its checkpoint here"
    )
    where.add_argument("--server-model", metavar="NAME", help="its name there, if the server has several")
    where.add_argument("--concurrency", type=int, default=8, metavar="N", help="requests at once; default %(default)s")
    where.add_argument("--vllm", action="store_true", help="hold the model by vLLM instead of transformers")
    where.add_argument("--batch-size", type=int, default=1, metavar="N", help="pages at once; default %(default)s")
    where.add_argument("--device", type=usable_device, help="cpu, cuda, ...; the default is what accelerate chooses")
    where.add_argument("--workers", type=int, default=1, metavar="N", help="of Ray; default %(default)s")
    where.add_argument("--cpus", type=float, default=1, metavar="N", help="of each worker; default %(default)s")
    where.add_argument("--gpus", type=float, default=0, metavar="N", help="of each worker; default %(default)s")
    arguments = parser.parse_args(argv)

    require_checkpoint(arguments.model)
    task = Task(
        ask=arguments.ask,
        schema=json.loads(arguments.schema.read_text(encoding="utf-8")) if arguments.schema else None,
        prompt=arguments.prompt,
        pages=arguments.pages,
        password=arguments.password,
        max_num_tiles=arguments.max_num_tiles,
        max_new_tokens=arguments.max_new_tokens,
        text_layer=arguments.text_layer,
        stop_loops=not arguments.keep_loops,
        confidence=arguments.confidence,
    )
    find_documents(arguments.inputs)  # a mistake is said before a model is loaded
    with first_signal_asks() as should_stop:
        run = Run(arguments.inputs, make_engine(arguments), task, arguments.out, arguments.limit, should_stop)
        show_progress(run)
        print(summary(run, arguments.out))
        return INTERRUPTED if should_stop() else SOME_FAILED if run.counts["failed"] or run.invalid else 0


if __name__ == "__main__":
    sys.exit(main())
