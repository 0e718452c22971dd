"""One page of a document: what is asked about it, its image, and the row that says what was answered."""

import math
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

from nemotron_vl.image_processing import Tiling, count_tiles, page_tiling, plan_pages, render_page
from nemotron_vl.pictures import open_document, page_spans
from PIL import Image

from .inputs import Source, file_digest
from .schema import Fields

STATUSES = ("read", "cut off", "looped", "text layer", "failed")
KEYS = ("file", "sha256", "page", "prompt", "answer", "tokens", "seconds", "tiles", "model", "status", "error")
# The whole page at once, in reading order, tables as LaTeX, which has merged cells. A checkpoint may have a prompt of
# its own in its config, under task_specific_params.
PAGE_PROMPT = (
    "Convert this page to Markdown, all of it and in reading order. Write tables as LaTeX, and formulas as LaTeX too. "
    "Add nothing that is not on the page."
)
# A text layer that has fewer letters and digits than this is a page number or a stamp on a scan.
MIN_LETTERS_OF_TEXT_LAYER = 40
FIT = "fit"  # as max_num_tiles
PROMPT_TOKENS = 100  # that "fit" counts for the text beside a page
# What a page that cannot be read raises; PDFium's and CUDA's errors are RuntimeErrors. Other errors are bugs.
PAGE_ERRORS = (ValueError, TypeError, OSError, ImportError, RuntimeError, MemoryError)

Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """What is asked about each page, and how. Without `ask` and `schema` it is the whole page as Markdown.

    Args:
        ask: a question about each page, instead of the whole page.
        schema: fields to extract from each document, as `extract` takes them, instead of the whole page.
        prompt: other words that ask for the whole page than those the checkpoint knows.
        pages: which pages of each document, such as "1-3,7"; None reads all.
        password: of encrypted PDFs.
        max_num_tiles: largest number of tiles of a page; None leaves the checkpoint's, "fit" takes the largest that
            leaves room for the answer.
        max_new_tokens: longest answer in tokens, at most what the context leaves.
        text_layer: answer a page by its PDF's own text, where it has one, instead of by the model.
        stop_loops: stop an answer that repeats itself without end.
        confidence: also say how probable each answer is; with a schema, each value has its confidence anyway.

    Raises:
        ValueError: for options that contradict each other.
    """

    ask: str | None = None
    schema: Any = None
    prompt: str | None = None
    pages: str | None = None
    password: str | None = field(default=None, repr=False)
    max_num_tiles: int | str | None = None
    max_new_tokens: int = 4096
    text_layer: bool = False
    stop_loops: bool = True
    confidence: bool = False

    def __post_init__(self):
        for name in ("ask", "prompt"):
            text = getattr(self, name)
            if text is not None and (not isinstance(text, str) or not text.strip()):
                raise ValueError(f"{name} must be a text that is not empty, got {text!r}.")
        page_ranges(self.pages)
        given = [name for name in ("ask", "schema", "prompt", "text_layer") if getattr(self, name)]
        if len(given) > 1 and set(given) != {"prompt", "text_layer"}:
            raise ValueError(f"{' and '.join(given)} ask for different things. Give one of them.")
        if isinstance(self.max_num_tiles, str) and self.max_num_tiles != FIT:
            raise ValueError(f"max_num_tiles must be a number or 'fit', got {self.max_num_tiles!r}.")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}.")
        if self.schema is not None:
            Fields.of(self.schema)  # a wrong schema is an error here and not one of each page

    @property
    def is_markdown(self) -> bool:
        """Whether the whole page is asked for."""
        return self.ask is None and self.schema is None

    @property
    def settings(self) -> dict[str, Any]:
        """What decides about an answer, for a run to remember; which pages are read does not."""
        names = ("ask", "prompt", "max_num_tiles", "max_new_tokens", "text_layer", "stop_loops", "confidence")
        schema = None if self.schema is None else Fields.of(self.schema).schema
        return {"schema": schema, **{name: getattr(self, name) for name in names}}


class PageImage(NamedTuple):
    """The image of a page.

    Attributes:
        image: RGB.
        num_tiles: that it is cut into, the thumbnail included.
        max_num_tiles: largest number with which it is cut into these; the page may be drawn too large for more.
        is_only_page: whether its document has no other page, so that the fields of a schema are all on it.
    """

    image: Image.Image
    num_tiles: int
    max_num_tiles: int
    is_only_page: bool


class Answer(NamedTuple):
    """What a model answered about a page.

    Attributes:
        text: the answer.
        num_tokens: its length, the end token included.
        status: "read", "cut off" or "looped".
        more: further keys of the row, `confidence` and `fields`.
    """

    text: str
    num_tokens: int
    status: str = "read"
    more: dict[str, Any] = {}


class Backend(Protocol):
    """What answers about images of pages: a model in this process, or a server."""

    name: str  # in the rows, under `model`
    tiling: Tiling
    page_prompt: str  # what asks for the whole page
    window: int  # tokens of prompt and answer together
    tokens_per_tile: int

    def answer(self, images: list[PageImage], prompt: str | None, task: Task) -> list[Answer]:
        """Answer about each of the images by itself; `prompt` is None for a schema."""


class Wanted(NamedTuple):
    """A document of which pages are wanted.

    Attributes:
        source: the document.
        done: `(sha256, page)` of what has been read before.
    """

    source: Source
    done: Collection[tuple[str, int]] = ()


class Page(NamedTuple):
    """A page that is to be read, or, with `error`, one that cannot be.

    Attributes:
        file, sha256: the document.
        number: of the page, from 1; None for a document that cannot be opened.
        num_wanted: how many pages of this document are to be read.
        error: why it cannot be read.
    """

    file: str
    sha256: str | None
    number: int | None
    num_wanted: int
    error: str | None = None


class Outcome(NamedTuple):
    """The row of a page, and how many pages of its document are read in this run; no row if that is none."""

    file: str
    row: Row | None
    num_wanted: int


def open_for_task(file: str, task: Task) -> Any:
    """Open a document with the pages that a task wants of it; those that it does not have are left out.

    Raises:
        ValueError, OSError, ImportError: see `open_document`; also if it has none of the pages.
    """
    document = open_document(file, password=task.password)
    if task.pages is None:
        return document
    ranges = page_ranges(task.pages)
    numbers = [number for number in document.page_numbers if any(first <= number <= last for first, last in ranges)]
    if not numbers:
        document.close()
        raise ValueError(f"pages={task.pages!r} are none of the pages 1 to {len(document)} of {document.name}.")
    return open_document(document, pages=numbers)


def page_ranges(pages: str | None) -> list[tuple[int, float]]:
    """Return the first and last number of each range of pages, as in "1-3,7,12-".

    Raises:
        ValueError: if they are written in another form.
    """
    spans = [] if pages is None else page_spans(str(pages))
    ranges = [(first, math.inf if last is None else last) for first, last in spans]
    if any(not 1 <= first <= last for first, last in ranges):
        raise ValueError(f"pages must look like '1-3,7' or '12-', numbers from 1, got {pages!r:.80}.")
    return ranges


def pages_of(wanted: Wanted, task: Task) -> Iterator[Page | Outcome]:
    """Yield the pages of a document that are to be read; an `Outcome` without a row if there are none.

    Errors of the document are a page with that error.
    """
    source = wanted.source
    digest = None
    try:
        if source.error:
            raise ValueError(source.error)
        digest = file_digest(source.file)
        with open_for_task(source.file, task) as document:
            numbers = [number for number in document.page_numbers if (digest, number) not in wanted.done]
    except PAGE_ERRORS as error:
        yield Page(source.file, digest, None, 1, sentence_of(error))
        return
    for number in numbers:
        yield Page(source.file, digest, number, len(numbers))
    if not numbers:
        yield Outcome(source.file, None, 0)


def sentence_of(error: BaseException) -> str:
    """Return what an error says, with the name of the file for an error of the system."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}."
    return str(error) or type(error).__name__


class PageReader:
    """Turns pages into rows by a backend. It keeps the document of the last page open, and is not for several threads.

    Args:
        backend: what answers.
        task: what is asked.
    """

    def __init__(self, backend: Backend, task: Task):
        self.backend, self.task = backend, task
        self.prompt = task.ask or (None if task.schema is not None else task.prompt or backend.page_prompt)
        self._document: Any = None
        self._key: tuple[str, str | None] | None = None

    def close(self) -> None:
        if self._document is not None:
            self._document.close()
        self._document = self._key = None

    def __call__(self, pages: Iterable[Page]) -> list[Row]:
        """Read pages as one batch. If the batch fails, each page is read by itself, so that one spoils no other."""
        rows, images = [], []
        for page in pages:
            row, image = self.prepare(page)
            rows.append(row)
            if image is not None:
                images.append((row, image))
        if images:
            try:
                self.answer(images)
            except PAGE_ERRORS as error:
                for row, image in images:
                    self.answer_alone(row, image, error if len(images) == 1 else None)
        return rows

    def answer_alone(self, row: Row, image: PageImage, error: BaseException | None = None) -> None:
        """Complete the row of one page, by its answer or by its error."""
        try:
            if error is not None:
                raise error
            self.answer([(row, image)])
        except PAGE_ERRORS as raised:
            row.update(status="failed", error=sentence_of(raised))

    def answer(self, images: list[tuple[Row, PageImage]]) -> None:
        """Complete the rows of pages by the answers about their images; the time is shared equally."""
        started = time.perf_counter()
        answers = self.backend.answer([image for _, image in images], self.prompt, self.task)
        seconds = (time.perf_counter() - started) / len(images)
        for (row, _), answer in zip(images, answers, strict=True):
            row.update(answer=answer.text, tokens=answer.num_tokens, status=answer.status, **answer.more)
            row["seconds"] = round(row["seconds"] + seconds, 3)

    def prepare(self, page: Page) -> tuple[Row, PageImage | None]:
        """Return the row of a page so far, and its image if the row needs an answer."""
        started = time.perf_counter()
        row: Row = dict.fromkeys(KEYS)
        row.update(file=page.file, sha256=page.sha256, page=page.number, prompt=self.prompt)
        row.update(tokens=0, seconds=0.0, tiles=0, model=self.backend.name, status="failed", error=page.error)
        image = None
        if page.error is None:
            try:
                image = self._look(page, row)
            except PAGE_ERRORS as error:
                row["error"] = sentence_of(error)
        row["seconds"] = round(time.perf_counter() - started, 3)
        return row, image

    def _look(self, page: Page, row: Row) -> PageImage | None:
        """Render a page, or answer its row by its text layer."""
        if self._key != (page.file, page.sha256):
            self.close()
            self._document = open_for_task(page.file, self.task)
            self._key = (page.file, page.sha256)
        document = self._document
        page_of_document = document[document.page_numbers.index(page.number)]
        if self.task.text_layer:
            text = page_of_document.text or ""
            if sum(map(str.isalnum, text)) >= MIN_LETTERS_OF_TEXT_LAYER:
                row.update(answer=text.strip(), status="text layer", prompt=None)
                return None
        size, tiling = page_tiling(page_of_document, self._tiling_for(page_of_document.natural_size))
        row["tiles"] = count_tiles(*size, tiling)
        return PageImage(render_page(page_of_document, tiling), row["tiles"], tiling.max_num_tiles, len(document) == 1)

    def _tiling_for(self, size: tuple[int, int]) -> Tiling:
        """Return how a page of this natural size is cut; "fit" keeps room for the answer, at most half the context."""
        backend, wish = self.backend, self.task.max_num_tiles
        if wish == FIT:
            wish = plan_pages(
                [size],
                backend.tiling,
                context_length=backend.window,
                answer_tokens=min(self.task.max_new_tokens, backend.window // 2),
                prompt_tokens=PROMPT_TOKENS,
                tokens_per_tile=backend.tokens_per_tile,
            ).max_num_tiles
        return backend.tiling if wish is None else replace(backend.tiling, max_num_tiles=wish)
