"""What a person does with a document in the page of `tools.app`: see its tiles, ask about it, read fields.

A `Reader` holds the model and works on one answer at a time, in one thread. A `Session` is one document and the
conversation about it. Neither knows of the page.
"""

import contextlib
import json
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nemotron_vl.chat import DEFAULT_MAX_NEW_TOKENS as MAX_NEW_TOKENS
from nemotron_vl.image_processing import count_tiles, render_page
from nemotron_vl.pictures import open_document
from nemotron_vl.reading.boxes import draw_boxes, parse_boxes
from nemotron_vl.reading.extraction import Extraction, ExtractionError, PageValues, extract
from nemotron_vl.reading.inputs import file_digest
from PIL import Image
from transformers import StoppingCriteria

from .chat import QUESTION_TOKENS, describe, draw_tiles, drawn, percent
from .command_line import sentence_of
from .legibility import warning

# What a document, a question or a full memory raises; CUDA's and PDFium's errors are RuntimeErrors.
PROBLEMS = (ValueError, TypeError, OSError, ImportError, RuntimeError, MemoryError)
PAGE, TILES, BOXES = VIEWS = ("Page", "Tiles", "Boxes")


class Stopped(Exception):
    """The person has stopped the work, or has left."""


@dataclass
class Reply:
    """An answer while it grows.

    Args:
        text: what there is of it.
        note: how sure and how long it is, once it is complete; or that it was stopped.
    """

    text: str
    note: str = ""


@dataclass
class FieldsRead:
    """The fields of a document.

    Args:
        rows: field, value, confidence and page of each value, as texts.
        json: the document as `tools.read --schema` writes it: its file, `fields`, `values` and `error`.
        note: what is to be said of it.
    """

    rows: list[list[str]]
    json: dict[str, Any]
    note: str


class Reader:
    """A model, which answers one person after another.

    Args:
        model, processor: of one checkpoint.
        name: of the checkpoint.
    """

    def __init__(self, model: Any, processor: Any, name: str):
        self.model, self.processor, self.name = model, processor, name
        self.max_num_tiles = processor.image_processor.tiling.max_num_tiles
        # Of whatever conversation was last: the next question about the same pages does not read them again.
        self.cache = self._new_cache()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reader")

    def _new_cache(self) -> Any:
        return None if self.model._is_stateful else self.model.chat_cache()

    def describe(self) -> str:
        """Say in one line which model this is."""
        size = self.model.num_parameters()
        size_text = f"{size / 1e9:.1f} B" if size >= 1e9 else f"{size / 1e6:.1f} M"
        device = "CPU" if self.model.device.type == "cpu" else str(self.model.device)
        window = self.model.config.max_sequence_length
        return f"{self.name}, {size_text} parameters, on {device}, with a context of {window:,} tokens"

    def work(self, job: Callable[[Callable[[Any], None]], None], stop: threading.Event) -> Iterator[Any]:
        """Run a job in the thread that generates, after the jobs before it, and yield what it reports.

        Args:
            job: gets a function that reports. It raises `Stopped`, which is kept to itself, once `stop` is set.
            stop: is set if the loop over the reports is left.
        """
        reports: queue.SimpleQueue[Any] = queue.SimpleQueue()
        end = object()

        def run() -> None:
            if stop.is_set():
                return
            try:
                job(reports.put)
            except Stopped:
                pass
            except BaseException:
                self.cache = self._new_cache()  # a step may have ended half-way
                raise

        future = self._worker.submit(run)
        future.add_done_callback(lambda _: reports.put(end))
        try:
            while (report := reports.get()) is not end:
                yield report
            future.result()
        finally:
            stop.set()


class _StopCriterion(StoppingCriteria):
    """Ends a generation by an exception, so that the ones that would follow it do not begin."""

    def __init__(self, stop: threading.Event):
        self.stop = stop

    def __call__(self, *_: Any, **__: Any) -> Any:
        if self.stop.is_set():
            raise Stopped
        return False


@dataclass
class Session:
    """One document and the conversation about it.

    Args:
        reader: that answers.
        path: of the document.
        pages: which, such as "1-3,7"; without it as many of the first ones as a question can be about.
        password: of an encrypted PDF.
        max_num_tiles: of each page; None leaves the checkpoint's.

    Raises:
        ValueError: if the document cannot be used, or has no such pages.
    """

    reader: Reader
    path: Path
    pages: str | None = None
    password: str | None = field(default=None, repr=False)
    max_num_tiles: int | None = None

    def __post_init__(self) -> None:
        self.history: list[tuple[str, str]] | None = None
        # What is to be done next: a question that waits for its answer, and whether fields are to be read.
        self.question: str | None = None
        self.wants_fields = False
        self._answers_with_boxes: dict[int, str] = {}
        self._stop = threading.Event()
        self._stop.set()
        self.document = open_document(self.path, pages=self.pages or None, password=self.password or None)
        if self.max_num_tiles is None:
            self.max_num_tiles = self.reader.max_num_tiles
        self._tiling = replace(self.reader.processor.image_processor.tiling, max_num_tiles=self.max_num_tiles)
        sizes = [page.natural_size for page in self.document]
        self._tokens = [self.reader.processor.tokens_of_image(count_tiles(*size, self._tiling)) for size in sizes]
        if not self.pages:
            fitting = sum(sum(self._tokens[: number + 1]) <= self.room for number in range(len(sizes))) or 1
            self.document = open_document(self.document, pages=range(1, fitting + 1))
            self._tokens = self._tokens[:fitting]

    @property
    def room(self) -> int:
        """How many tokens of the context all pages may take, beside a question and its answer."""
        return self.reader.model.config.max_sequence_length - MAX_NEW_TOKENS - QUESTION_TOKENS

    @property
    def fits(self) -> bool:
        """Whether a question can be asked about all of the pages at once."""
        return sum(self._tokens) <= self.room

    def page_range(self) -> str:
        """The chosen pages as a text, such as "1-3,7"."""
        numbers = self.document.page_numbers
        starts = [index for index, number in enumerate(numbers) if not index or number != numbers[index - 1] + 1]
        spans = [numbers[start:end] for start, end in zip(starts, [*starts[1:], len(numbers)], strict=True)]
        return ",".join(str(span[0]) if len(span) == 1 else f"{span[0]}-{span[-1]}" for span in spans)

    def views(self, index: int) -> list[str]:
        """Which of `VIEWS` a page has."""
        return [view for view in VIEWS if view != BOXES or index in self._answers_with_boxes]

    def picture(self, index: int, view: str) -> Image.Image:
        """Return a page as the model sees it, with its tiles or the boxes of the last answer drawn over it.

        Args:
            index: of the page among the chosen ones, from 0.
            view: one of `VIEWS`.
        """
        page = self.document[index]
        if view == TILES:
            return draw_tiles(self.reader.processor.image_processor, page, self.max_num_tiles)
        image = render_page(page, self._tiling)
        if view == BOXES and index in self._answers_with_boxes:
            return draw_boxes(image, parse_boxes(self._answers_with_boxes[index], image.width, image.height))
        return image

    def costs(self, index: int) -> str:
        """Say how a page is cut into tiles, and what it and all pages take of the context."""
        window = self.reader.model.config.max_sequence_length
        text = describe(self.reader.processor, self.document[index], self.max_num_tiles)
        text = f"{text.replace(' x ', ' × ').replace(' -> ', ' → ')}, {share(self._tokens[index], window)}"
        if self.document.num_pages > 1:
            text = f"Page {self.document.page_numbers[index]} of {self.document.num_pages}: {text}"
        if len(self._tokens) > 1:
            total = sum(self._tokens)
            text += f". The pages {self.page_range()} together: {total:,} tokens, {share(total, window)}"
        return f"{text}."

    def cautions(self, index: int) -> list[str]:
        """Say what stands in the way of a good answer: too many pages, or type that the model cannot read."""
        notes = []
        if not self.fits:
            notes.append(
                f"These pages take {sum(self._tokens):,} tokens, and the context leaves {max(0, self.room):,} beside a "
                "question and its answer. Choose fewer pages or fewer tiles to ask. Fields are read page by page, "
                "which is possible."
            )
        elif not self.pages and len(self._tokens) < self.document.num_pages:
            notes.append(
                f"{len(self._tokens)} of {self.document.num_pages} pages fit into a question with up to "
                f"{self.max_num_tiles} tiles each. Choose others, or fewer tiles."
            )
        image, tiling = drawn(self.reader.processor.image_processor, self.document[index], self.max_num_tiles)
        if note := warning(self.reader.model, tiling, image):
            notes.append(note)
        return notes

    @property
    def is_busy(self) -> bool:
        """Whether something is being generated for this session, or waits for its turn."""
        return self.question is not None or self.wants_fields or not self._stop.is_set()

    def stop(self) -> None:
        """End what is being generated for this session, before its next token, and what waits."""
        self.question, self.wants_fields = None, False
        self._stop.set()

    def close(self) -> None:
        self.stop()
        self.document.close()

    def ask(self, question: str) -> Iterator[Reply]:
        """Answer a question about the pages and the conversation so far; the last reply has a note.

        An answer that was stopped does not become part of the conversation.

        Raises:
            ValueError: if there is no question, or pages and conversation do not fit the context.
        """
        if not question.strip():
            raise ValueError("Write a question first.")
        reader, stop = self.reader, threading.Event()
        self._stop = stop
        done: list[Any] = []
        started = time.monotonic()

        def pieces() -> Iterator[str]:
            answer = yield from reader.model.chat_stream(
                reader.processor,
                question=question.strip(),
                generation_config={"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False},
                history=self.history,
                document=self.document,
                max_num_tiles=self.max_num_tiles,
                past_key_values=reader.cache,
                stop_loops=True,
                return_confidence=True,
                return_dict=True,
            )
            done.append(answer)

        def job(report: Callable[[Any], None]) -> None:
            nonlocal started
            started = time.monotonic()
            report("")  # it has begun
            with contextlib.closing(pieces()) as stream:
                for piece in stream:
                    if stop.is_set():
                        raise Stopped
                    report(piece)

        text = ""
        for piece in reader.work(job, stop):
            text += piece
            yield Reply(text.lstrip())
        if not done:
            yield Reply(text.strip(), "Stopped. The conversation goes on without this question.")
            return
        (answer,) = done
        self.history = answer.history
        seconds = time.monotonic() - started
        note = f"Confidence {percent(answer.confidence)}, {len(answer.token_ids)} tokens, {seconds:.1f} s. "
        endings = {"length": "The answer was cut off at its longest.", "loop": "It was stopped as it repeated itself."}
        note += endings.get(answer.finish_reason, "")
        yield Reply(answer.text, f"{note}{self._keep_boxes({0: answer.text})}".strip())

    def extract(self, wanted: str) -> Iterator[FieldsRead]:
        """Read fields from the pages, each page for itself, and yield them once.

        Args:
            wanted: see `fields_of_text`.

        Raises:
            ValueError: if `wanted` cannot be understood.
        """
        schema = fields_of_text(wanted)
        stop = self._stop = threading.Event()

        def job(report: Callable[[Any], None]) -> None:
            options = {"stopping_criteria": [_StopCriterion(stop)]}
            try:
                found = extract(
                    self.reader.model,
                    self.reader.processor,
                    self.document,
                    schema,
                    max_new_tokens=MAX_NEW_TOKENS,
                    generation_config=options,
                    max_num_tiles=self.max_num_tiles,
                )
                report((found, found.pages, None))
            except ExtractionError as error:
                report((None, error.pages, str(error)))

        for found, pages, error in self.reader.work(job, stop):
            yield self._fields_read(found, pages, error)

    def _fields_read(self, found: Extraction | None, pages: list[PageValues], error: str | None) -> FieldsRead:
        """Return what was read from the pages, or from those that could be read."""
        numbers = self.document.page_numbers
        values = list(found.values.values()) if found else [v for page in pages for v in page.values.values()]
        values = [replace(value, page=value.page and numbers[value.page - 1]) for value in values]
        rows = [[v.path, shown(v.value), percent(v.confidence), str(v.page or "")] for v in values]
        if error is None and found.status != "read":
            error = f"The answer about a page was {found.status}, so values may be missing."
        document = {
            "file": self.path.name,
            "sha256": file_digest(str(self.path)),
            "fields": found.json if found else None,
            "values": {
                v.path: {"value": v.value, "confidence": v.confidence, "page": v.page} for v in values if found
            },
            "error": error,
        }
        boxes = self._keep_boxes({page.page - 1: page.answer for page in pages})
        return FieldsRead(rows, document, f"{error or ''} {boxes}".strip())

    def _keep_boxes(self, answers: dict[int, str]) -> str:
        """Keep the answers that have boxes, by the index of their page; return what is to be said of them."""
        self._answers_with_boxes = {}
        is_about_all = len(answers) < len(self._tokens)
        for index, answer in answers.items():
            try:
                if not parse_boxes(answer, 1, 1):
                    continue
            except ValueError as error:
                return f"The boxes in the answer cannot be drawn: {error}"
            if is_about_all:
                return "The boxes are not drawn, as the answer is about several pages; ask about one of them."
            self._answers_with_boxes[index] = answer
        return "The boxes are drawn over the page." if self._answers_with_boxes else ""

    @property
    def first_page_with_boxes(self) -> int | None:
        """The index of the first page that the last answer has boxes of."""
        return min(self._answers_with_boxes, default=None)


def words_of(error: BaseException, path: str | Path) -> str:
    """Return what an error about a document says, without the folder in which it lies on this machine."""
    return sentence_of(error).replace(str(path), Path(path).name)


def share(num_tokens: int, window: int) -> str:
    """Return a number of tokens as a share of the context, for people."""
    return f"{100 * num_tokens / window:.0f} % of the context"


def shown(value: Any) -> str:
    """Return a value of a document as a text for people."""
    return "not found" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def fields_of_text(text: str) -> Any:
    """Return the fields that a text asks for, as `extract` takes them.

    Args:
        text: names, separated by commas or lines; or a JSON Schema; or a list of names in JSON.

    Raises:
        ValueError: if it has no names, or begins like JSON and is none.
    """
    text = text.strip()
    if text.startswith(("{", "[")):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"The fields begin like JSON, but are none: {error.msg} in line {error.lineno}, column {error.colno}. "
                "Write a JSON Schema, or names separated by commas."
            ) from error
    names = [name.strip() for line in text.splitlines() for name in line.split(",") if name.strip()]
    if not names:
        raise ValueError("Name the fields to read, separated by commas, or write a JSON Schema.")
    return names
