"""One page of a document: what is asked about it, its image, and the row that says what was answered."""

import contextlib
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

from nemotron_vl.image_processing import Tiling, count_tiles
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
        given = [name for name in ("ask", "schema", "prompt", "text_layer") if getattr(self, name)]
        if len(given) > 1 and set(given) != {"prompt", "text_layer"}:
            raise ValueError(f"{' and '.join(given)} ask for different things. Give one of them.")
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
        num_tiles: that it is cut into.
        is_only_page: whether its document has no other page, so that the fields of a schema are all on it.
    """

    image: Image.Image
    num_tiles: int
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


def pages_of(wanted: Wanted, task: Task) -> Iterator[Page | Outcome]:
    """Yield the pages of a document that are to be read; an `Outcome` without a row if there are none.

    Errors of the document are a page with that error.
    """
    from nemotron_vl.pictures import open_document

    source = wanted.source
    digest = None
    try:
        if source.error:
            raise ValueError(source.error)
        digest = file_digest(source.file)
        with contextlib.closing(open_document(source.file, pages=task.pages, password=task.password)) as document:
            numbers = list(document.page_numbers)
    except PAGE_ERRORS as error:
        yield Page(source.file, digest, None, 1, sentence_of(error))
        return
    numbers = [number for number in numbers if (digest, number) not in wanted.done]
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
        from nemotron_vl.pictures import open_document

        if self._key != (page.file, page.sha256):
            self.close()
            self._document = open_document(page.file, pages=self.task.pages, password=self.task.password)
            self._key = (page.file, page.sha256)
        document = self._document
        place = list(document.page_numbers).index(page.number)
        if self.task.text_layer:
            text = document.text(place) or ""
            if sum(map(str.isalnum, text)) >= MIN_LETTERS_OF_TEXT_LAYER:
                row.update(answer=text.strip(), status="text layer", prompt=None)
                return None
        tiling = tiling_of(self.backend, self.task)
        image = document.render(place, tiling, tiling.max_num_tiles)
        row["tiles"] = count_tiles(image.height, image.width, tiling)
        return PageImage(image, row["tiles"], len(document.page_numbers) == 1)


def tiling_of(backend: Backend, task: Task) -> Tiling:
    """Return how the pages of a task are cut into tiles."""
    if task.max_num_tiles is None:
        return backend.tiling
    return replace(backend.tiling, max_num_tiles=task.max_num_tiles)
