"""Which documents a run reads: files, folders and patterns become a list of files, each with a name for its output."""

import glob
import hashlib
import itertools
import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

# What is taken from a folder. A file that is named itself is read whatever it is called.
SUFFIXES = frozenset(
    (
        ".pdf", ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".tif", ".tiff", ".webp", ".gif", ".bmp", ".dib", ".ppm",
        ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".avif", ".tga",
    )
)  # fmt: skip
MAX_NAME_BYTES = 200  # of a file that is written; file systems allow 255, and an ending follows


class Source(NamedTuple):
    """A document to read.

    Attributes:
        file: its path, as the caller's input leads to it.
        name: its place in the tree of its input: below the folder that was given, or the last part of a file's path.
        error: why it cannot be looked at, for a folder that cannot be listed.
    """

    file: str
    name: PurePosixPath
    error: str | None = None


class Found(NamedTuple):
    """The documents of some inputs, and how many other files lie in their folders."""

    sources: list[Source]
    num_others: int


def find_documents(inputs: Iterable[str | os.PathLike]) -> Found:
    """Find the documents of files, folders and patterns, in the order of the inputs and sorted within each.

    A folder gives every file of `SUFFIXES` in it and below; hidden files and folders are left out. Links are followed,
    but no folder is entered twice, so that a loop of links ends. A file that several inputs give is taken once.

    Raises:
        ValueError: for an input that does not exist, is neither file nor folder, or holds no document.
    """
    found: dict[str, Source] = {}
    num_others = 0
    for given in map(os.fspath, inputs):
        sources = [source for path in _matches(given) for source in _sources_of(path)]
        documents = [source for source in sources if source.error or _is_document(source, given)]
        num_others += len(sources) - len(documents)
        if not documents:
            raise ValueError(f"{given} holds no document. A folder gives files of {', '.join(sorted(SUFFIXES))}.")
        for source in documents:
            found.setdefault(os.path.abspath(source.file), source)  # a link is a document with a name of its own
    return Found(list(found.values()), num_others)


def _is_document(source: Source, given: str) -> bool:
    return source.file == given or source.name.suffix.lower() in SUFFIXES


def _sources_of(path: str) -> list[Source]:
    """Return all files that a path leads to, documents or not."""
    if os.path.isdir(path):
        return list(_walk(Path(path)))
    if os.path.isfile(path):
        return [Source(path, PurePosixPath(Path(path).name))]
    if os.path.exists(path):
        raise ValueError(f"{path} is neither a file nor a folder, and cannot be read twice. Give a file.")
    raise ValueError(f"{path} is a link that leads nowhere." if os.path.islink(path) else f"{path} does not exist.")


def _matches(given: str) -> list[str]:
    """Return the paths that an input names: itself, or what it matches as a pattern, which a shell may have left."""
    if os.path.lexists(given) or not glob.has_magic(given):
        return [given]
    matches = sorted(glob.glob(given, recursive=True))
    if not matches:
        raise ValueError(f"Nothing matches {given}.")
    return matches


def _walk(folder: Path) -> Iterator[Source]:
    """Yield all files in a folder and below, sorted, and the folders that cannot be listed with the reason."""
    entered = set()
    pending = [folder]
    while pending:
        here = pending.pop()
        try:
            status = here.stat()
            if (status.st_dev, status.st_ino) in entered:
                continue
            entered.add((status.st_dev, status.st_ino))
            entries = sorted(entry for entry in here.iterdir() if not entry.name.startswith("."))
        except OSError as error:
            yield Source(str(here), _name(here, folder), f"{here}: {error.strerror}.")
            continue
        pending += [entry for entry in reversed(entries) if entry.is_dir()]
        for entry in entries:
            if entry.is_file() or (entry.is_symlink() and not entry.exists()):  # a dangling link is a failed document
                yield Source(str(entry), _name(entry, folder))


def _name(path: Path, folder: Path) -> PurePosixPath:
    return PurePosixPath(path.relative_to(folder).as_posix() if path != folder else folder.name or "folder")


def choose_output(source: Source, is_taken: Callable[[str], bool]) -> str:
    """Return where the output of a document goes, below the folder of a run and without the ending of the output.

    It is the document's place in its input tree, with its own ending, so that `a.pdf` and `a.png` do not collide. If
    that place is taken, the folders above the document are put in front, and a number behind if they do not suffice.

    Args:
        source: the document.
        is_taken: whether a place belongs to something else.
    """
    above = Path(os.path.abspath(source.file)).parts[1 : -len(source.name.parts)]
    for count in range(len(above) + 1):
        place = _shorten(PurePosixPath(*above[len(above) - count :], source.name))
        if not is_taken(place):
            return place
    for number in itertools.count(2):
        place = _shorten(source.name.with_name(f"{source.name.name}-{number}"))
        if not is_taken(place):
            break
    return place


def place_key(place: str) -> str:
    """Return the form of a place by which a file system that ignores case, or normalises Unicode, compares it."""
    return unicodedata.normalize("NFC", place).casefold()


def _shorten(name: PurePosixPath) -> str:
    """Return a path whose last part is not too long for a file system, also with an ending."""
    encoded = os.fsencode(name.name)
    if len(encoded) <= MAX_NAME_BYTES:
        return str(name)
    digest = hashlib.sha256(encoded).hexdigest()[:8]
    kept = encoded[: MAX_NAME_BYTES - 9].decode("utf-8", "ignore")
    return str(name.with_name(f"{kept}~{digest}"))


def find_duplicates(files: Iterable[str]) -> dict[str, list[str]]:
    """Return the files whose content is that of an earlier one, under the earlier one; only equal sizes are compared."""
    by_size: dict[int, list[str]] = {}
    for file in files:
        try:
            by_size.setdefault(os.stat(file).st_size, []).append(file)
        except OSError:  # it is a failed document, of which the run says why
            continue
    duplicates: dict[str, list[str]] = {}
    for group in by_size.values():
        firsts: dict[str, str] = {}
        for file in group if len(group) > 1 else ():
            try:
                digest = file_digest(file)
            except OSError:
                continue
            if digest in firsts:
                duplicates.setdefault(firsts[digest], []).append(file)
            else:
                firsts[digest] = file
    return duplicates


def file_digest(file: str) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
