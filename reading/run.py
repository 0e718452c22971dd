"""A run over documents: its folder, which another run can continue, and the rows that it gives.

The folder holds `pages.jsonl` with a line for each page, a Markdown file for each document, and `run.json` with the
settings, so that no two settings are mixed.
"""

import contextlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout  # comes with huggingface_hub

from .extraction import ExtractionError, PageValues, Value, merge_pages
from .inputs import Source, choose_output, find_documents, find_duplicates, place_key
from .markdown import to_markdown
from .pages import Outcome, Row, Task, Wanted
from .schema import Fields

ROWS, SETTINGS, LOCK = "pages.jsonl", "run.json", ".lock"
ENDINGS = (".md", ".json")  # of the output of a document: text, or fields
# Characters at which str.splitlines() would break a line; as escapes, a line of JSON stays one line for everybody.
_LINE_BREAKS = {ord(character): f"\\u{ord(character):04x}" for character in "\x7f\x85\u2028\u2029"}


class Engine(Protocol):
    """Where pages are read: in this process, by a server, or by workers of Ray."""

    model: str

    @property
    def settings(self) -> dict[str, Any]:
        """What tells one model from another, for a run to remember."""

    def read(
        self, documents: Iterable[Wanted], task: Task, limit: int | None, should_stop: Callable[[], bool]
    ) -> Iterator[Outcome]:
        """Yield the outcome of every page that is wanted, of at most `limit` pages, until `should_stop`.

        Pages that were begun when `should_stop` became true are finished.
        """


class RunFolder:
    """The folder of a run, held by one process at a time.

    Args:
        folder: is made if it does not exist.
        settings: what decides about the answers.

    Attributes:
        dropped: how many rows of pages that failed in an earlier run were taken out, so that they are read again.

    Raises:
        ValueError: if another process holds the folder, if it holds a run with other settings, or if its rows are
            damaged.
        OSError: if the folder cannot be written.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file, not a folder for the output.")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.folder / LOCK)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"Another run is writing into {self.folder}. Wait for its end, or give this one another folder."
            ) from None
        try:
            self._places: dict[str, str] = self._check_settings(json.loads(json.dumps(settings)))
            self._index: dict[str, dict[int | None, tuple[int, str, str | None]]] = {}
            self.dropped = self._load()
            self._rows = open(self.folder / ROWS, "ab")  # noqa: SIM115  (closed by `close`)
        except BaseException:
            self._lock.release()
            raise

    def close(self) -> None:
        self._rows.close()
        self._lock.release()

    def _check_settings(self, settings: dict[str, Any]) -> dict[str, str]:
        """Return the places of the outputs so far; write the settings if the folder is new."""
        path = self.folder / SETTINGS
        if not path.exists():
            if (self.folder / ROWS).exists():
                raise ValueError(
                    f"{self.folder} has {ROWS} but no {SETTINGS}, so nothing says how its pages were read. Give another "
                    "folder."
                )
            self._settings = settings
            self._write_settings({})
            return {}
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            self._settings, places = stored["settings"], stored["outputs"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}). Give another folder.") from None
        changed = [name for name in {**self._settings, **settings} if self._settings.get(name) != settings.get(name)]
        if changed:
            values = "; ".join(
                f"{name} was {self._settings.get(name)!r:.80} and is now {settings.get(name)!r:.80}"
                for name in changed
            )
            raise ValueError(
                f"{self.folder} holds a run with other settings: {values}. Give another folder, or the same settings, or "
                "delete this folder to begin again."
            )
        return places

    def _write_settings(self, places: dict[str, str]) -> None:
        stored = {"settings": self._settings, "outputs": places}
        write_file(self.folder / SETTINGS, json.dumps(stored, indent=1, ensure_ascii=True) + "\n")

    def _load(self) -> int:
        """Read where the rows are, and take out a half-written last line and the rows of pages that failed.

        Of two rows of a page the last one counts, and of two contents of a file the last one: a run that was killed
        while it replaced them leaves both.
        """
        path = self.folder / ROWS
        if not path.exists():
            return 0
        place, last_digest, found = 0, {}, []
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break  # killed while it was written
                try:
                    row = json.loads(line)
                    key = (row["file"], row["page"], row["sha256"], row["status"])
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(
                        f"Line {number} of {path} is damaged ({error}). Delete it, and its page is read again."
                    ) from None
                found.append((place, len(line), key))
                last_digest[row["file"]] = row["sha256"]
                place += len(line)
            size = file.seek(0, os.SEEK_END)
        kept = {
            (key[0], key[1]): (start, length, key)
            for start, length, key in found
            if key[3] != "failed" and key[2] == last_digest[key[0]]
        }
        if size != place and len(kept) == len(found):
            with path.open("r+b") as file:
                file.truncate(place)
        elif len(kept) != len(found):
            self._rewrite(kept.values())
            return self._load() + sum(key[3] == "failed" for _, _, key in found)
        for start, _, (file, page, digest, status) in found:
            self._index.setdefault(file, {})[page] = (start, status, digest)
        return 0

    def _rewrite(self, kept: Iterable[tuple[int, int, Any]]) -> None:
        """Write the rows anew with only these; the old file stays until the new one is complete."""
        path, new = self.folder / ROWS, self.folder / f"{ROWS}.new"
        with path.open("rb") as old, new.open("wb") as file:
            for start, length, _ in sorted(kept):
                old.seek(start)
                file.write(old.read(length))
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)

    def done(self, file: str) -> set[tuple[str, int]]:
        """Return `(sha256, page)` of the pages of a document that have a row."""
        return {(digest, page) for page, (_, _, digest) in self._index.get(file, {}).items()}

    def add(self, row: Row) -> None:
        """Append a row; it is on the disk when this returns."""
        file, digest = row["file"], row["sha256"]
        line = json.dumps(row, ensure_ascii=False).translate(_LINE_BREAKS).encode("utf-8", "backslashreplace") + b"\n"
        entries = self._index.setdefault(file, {})
        for page in [page for page, (_, _, old) in entries.items() if old != digest]:
            del entries[page]  # of an earlier content of the file; `_load` takes the line out next time
        place = self._rows.tell()
        self._rows.write(line)
        self._rows.flush()
        os.fsync(self._rows.fileno())
        entries[row["page"]] = (place, row["status"], digest)

    def rows(self, file: str) -> list[Row]:
        """Return the rows of a document in the order of its pages."""
        entries = self._index.get(file, {})
        with (self.folder / ROWS).open("rb") as lines:
            rows = []
            for page in sorted(entries, key=lambda page: page or 0):
                lines.seek(entries[page][0])
                rows.append(json.loads(lines.readline()))
        return rows

    def statuses(self, file: str) -> list[str]:
        """Return the statuses of the pages of a document."""
        return [status for _, status, _ in self._index.get(file, {}).values()]

    def place_outputs(self, sources: Iterable[Source]) -> None:
        """Give each document a place for its output, and remember it; a document keeps the place that it has."""
        taken = {place_key(place) for place in self._places.values()}

        def is_taken(place: str) -> bool:
            return place_key(place) in taken or any((self.folder / f"{place}{ending}").exists() for ending in ENDINGS)

        new = {}
        for source in sources:
            if source.file not in self._places and source.file not in new:
                new[source.file] = choose_output(source, is_taken)
                taken.add(place_key(new[source.file]))
        if new:
            self._places.update(new)
            self._write_settings(self._places)

    def output(self, file: str, ending: str) -> Path:
        """Return the file for the output of a document."""
        return self.folder / f"{self._places[file]}{ending}"


def write_file(path: Path, text: str) -> None:
    """Write a text file at once: whoever reads it, and whenever the process ends, it is the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    try:
        new.write_bytes(text.encode("utf-8", "replace"))
        os.replace(new, path)
    except OSError:
        with contextlib.suppress(OSError):
            new.unlink()
        raise


class Run:
    """Reads documents; iterate over it for the rows of this run, as they come.

    Args:
        inputs: files, folders and patterns.
        engine: what reads.
        task: what is asked about each page.
        out: the folder of the run, which continues what is in it; None keeps nothing.
        limit: read at most so many pages, and leave the rest to another run.
        should_stop: when it returns True, the pages in flight are finished, and no other is begun.

    Attributes:
        sources: the documents.
        num_others: files in the folders among the inputs that are no documents.
        counts: how many pages of the documents have which status, once the iteration has ended.
        num_read: pages of this run so far.
        invalid: documents whose fields, as far as their pages were read, make no valid object.

    Raises:
        ValueError, OSError: see `find_documents` and `RunFolder`.
    """

    def __init__(
        self,
        inputs: Iterable[str | os.PathLike],
        engine: Engine,
        task: Task,
        out: str | os.PathLike | None = None,
        limit: int | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ):
        self.sources, self.num_others = find_documents(inputs)
        self.engine, self.task, self.limit, self.should_stop = engine, task, limit, should_stop
        self.out = out
        self.counts: Counter[str] = Counter()
        self.num_read = 0
        self.invalid: set[str] = set()
        self._num_unopened, self._num_opened, self._num_known = len(self.sources), 0, 0

    @property
    def num_pages(self) -> int:
        """How many pages this run reads, as far as can be said: unopened documents count with the mean so far."""
        mean = self._num_known / self._num_opened if self._num_opened else 1
        num_pages = self._num_known + round(self._num_unopened * mean)
        return num_pages if self.limit is None else min(num_pages, self.limit)

    def __iter__(self) -> Iterator[Row]:
        with contextlib.ExitStack() as stack:
            out = stack.enter_context(tempfile.TemporaryDirectory()) if self.out is None else self.out
            settings = {**self.task.settings, **self.engine.settings}
            folder = stack.enter_context(contextlib.closing(RunFolder(Path(out), settings)))
            folder.place_outputs(self.sources)
            stack.callback(self._count, folder)
            stack.callback(self._write_missing_outputs, folder)
            copies = find_duplicates(source.file for source in self.sources if not source.error)
            is_copy = {copy for files in copies.values() for copy in files}
            wanted = [
                Wanted(source, folder.done(source.file)) for source in self.sources if source.file not in is_copy
            ]
            self._num_unopened = len(wanted)
            yield from self._read(folder, wanted)
            for first, files in copies.items():
                yield from self._copy(folder, first, files)

    def _read(self, folder: RunFolder, wanted: list[Wanted]) -> Iterator[Row]:
        seen: set[str] = set()
        last = None
        for file, row, num_wanted in self.engine.read(wanted, self.task, self.limit, self.should_stop):
            if file not in seen:
                seen.add(file)
                self._num_unopened -= 1
                self._num_opened += num_wanted > 0
                self._num_known += num_wanted
            if row is None:
                continue
            if last not in (None, file):
                self._write_output(folder, last)
            last = file
            self._add(folder, row)
            self.num_read += 1
            yield row

    def _copy(self, folder: RunFolder, first: str, files: list[str]) -> Iterator[Row]:
        """Give the rows of a document to the files with the same content."""
        rows = folder.rows(first)
        for file in files:
            done = folder.done(file)
            for row in rows:
                if (row["sha256"], row["page"]) not in done:
                    row = {**row, "file": file, "seconds": 0.0}
                    self._add(folder, row)
                    yield row

    def _add(self, folder: RunFolder, row: Row) -> None:
        self._output(folder, row["file"]).unlink(missing_ok=True)  # it lacks this page
        folder.add(row)

    def _output(self, folder: RunFolder, file: str) -> Path:
        return folder.output(file, ENDINGS[self.task.schema is not None])

    def _write_output(self, folder: RunFolder, file: str) -> None:
        rows = folder.rows(file)
        if self.task.schema is None:
            text = document_markdown(rows, self.task)
        else:
            document = document_fields(rows, self.task.schema)
            text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
            (self.invalid.discard if document["fields"] is not None else self.invalid.add)(file)
        write_file(self._output(folder, file), text)

    def _write_missing_outputs(self, folder: RunFolder) -> None:
        """Write what this run, or one that was killed, has not written yet."""
        for source in self.sources:
            if folder.statuses(source.file) and not self._output(folder, source.file).exists():
                self._write_output(folder, source.file)

    def _count(self, folder: RunFolder) -> None:
        self.counts = Counter(status for source in self.sources for status in folder.statuses(source.file))


def document_markdown(rows: list[Row], task: Task) -> str:
    """Return the Markdown of a document from the rows of its pages: each page after a comment with its number.

    The comment also says what is wrong with a page. A document of one page that was read has no comment.
    """
    parts = []
    for row in rows:
        number = "document" if row["page"] is None else f"page {row['page']}"
        remark = "" if row["status"] in ("read", "text layer") else f": {row['status']}"
        reason = f" ({row['error']})" if row["error"] else ""
        answer = row["answer"] or ""
        text = to_markdown(answer) if task.is_markdown else answer
        comment = f"<!-- {f'{number}{remark}{reason}'.replace('--', '- -')} -->\n\n" if remark or len(rows) > 1 else ""
        parts.append(f"{comment}{text}".strip("\n") + "\n")
    return "\n".join(parts)


def document_fields(rows: list[Row], schema: Any) -> dict[str, Any]:
    """Return the fields of a document: what its pages have of them, merged; and each value with its page.

    If they make no valid object, `fields` is null and `error` says why.
    """
    pages = [row for row in rows if row.get("fields") is not None]
    found = [
        PageValues(
            row["page"],
            row["answer"],
            row["status"],
            row["tokens"],
            _tree(row["fields"], row["confidence"], row["page"]),
        )
        for row in pages
    ]
    document: dict[str, Any] = {"file": rows[0]["file"], "sha256": rows[0]["sha256"], "fields": None, "values": {}}
    errors = [f"page {row['page']}: {row['error']}" if row["page"] else row["error"] for row in rows if row["error"]]
    try:
        if found:
            merged = merge_pages(Fields.of(schema), found)
            values = merged.values.items()
            document["fields"] = merged.json
            document["values"] = {
                path: {"value": value.value, "confidence": value.confidence, "page": value.page}
                for path, value in values
            }
    except ExtractionError as error:
        errors.append(str(error))
    document["error"] = " ".join(errors) or None
    return document


def _tree(part: Any, confidences: dict[str, float | None], page: int, path: str = "") -> Any:
    """Return the fields of a row with a `Value` in place of each value."""
    if isinstance(part, dict):
        return {
            name: _tree(value, confidences, page, f"{path}.{name}" if path else name) for name, value in part.items()
        }
    if isinstance(part, list):
        return [_tree(value, confidences, page, f"{path}[{index}]") for index, value in enumerate(part)]
    return Value(path, part, confidences.get(path), None if part is None else page)


def read(
    inputs: str | os.PathLike | Iterable[str | os.PathLike],
    engine: Engine | str | os.PathLike,
    *,
    out: str | os.PathLike | None = None,
    limit: int | None = None,
    **task: Any,
) -> list[Row]:
    """Read documents; return a row for each page, as a list that `pandas.DataFrame` takes.

    Args:
        inputs: a file, folder or pattern, or several.
        engine: what reads, or the directory of a checkpoint, which is then loaded into this process.
        out: a folder for Markdown and JSON lines; a run that was interrupted is continued from it, and then only the
            new rows are returned.
        limit: read at most so many pages.
        task: arguments of `Task`, such as `prompt`, `schema`, `pages` or `max_num_tiles`.

    Raises:
        ValueError, OSError: see `Run`. A document or page that cannot be read is a row with the status "failed".

    Example:
        >>> rows = read("invoice.pdf", "nano", prompt="What is the total?")  # doctest: +SKIP
    """
    if isinstance(inputs, (str, os.PathLike)):
        inputs = [inputs]
    if isinstance(engine, (str, os.PathLike)):
        from .engines import InProcess

        engine = InProcess.load(engine)
    return list(Run(inputs, engine, Task(**task), out, limit))
