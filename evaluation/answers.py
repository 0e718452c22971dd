"""Answers that are kept as they come, so that a stopped evaluation goes on where it was.

An `AnswerFile` is a JSON line for each answer. `KeepsAnswers` puts one before a model class of lmms-eval: what is
already there is not asked again, every answer is on the disk before the next batch is asked, and a sample that the
model refuses fails alone.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image


class Key(NamedTuple):
    """What an answer belongs to; the folder of an `AnswerFile` says which checkpoint and tiling it comes from.

    Attributes:
        task, doc_id: the sample.
        style: of the prompt.
        prompt: a digest of the messages, images included, and of the settings of generation.
    """

    task: str
    doc_id: int
    style: str
    prompt: str


class AnswerFile:
    """The answers of one folder: `rows` by key. Every process appends to a file of its own and reads all of them.

    Args:
        folder: is made if it does not exist.
        rank: of this process.

    Raises:
        ValueError: a line other than the last of a file is no answer. A last line that was cut off by a kill is
            dropped.
    """

    def __init__(self, folder: Path, rank: int = 0):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"answers-{rank}.jsonl"
        self.rows: dict[Key, dict[str, Any]] = {}
        for path in sorted(folder.glob("answers-*.jsonl")):
            for row in read_answers(path, mend=path == self.path):
                self.rows[key_of(row)] = row

    def append(self, row: dict[str, Any]) -> None:
        """Keep an answer: it is written to the disk before this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
        self.rows[key_of(row)] = row


def key_of(row: dict[str, Any]) -> Key:
    return Key(row["task"], row["doc_id"], row["style"], row["prompt"])


def read_answers(path: Path, mend: bool = False) -> list[dict[str, Any]]:
    """Return the answers of a file; with `mend` a last line that was cut off is also removed from the file."""
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if mend and len(whole) < len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    rows = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            row = json.loads(line)
            key_of(row), row["answer"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}, line {number}, is no answer of evaluation.score: {line[:100]!r}.") from None
        rows.append(row)
    return rows


def prompt_digest(messages: list[dict], settings: dict[str, Any]) -> str:
    """Return a digest of messages in lmms-eval's form, the pixels of their images included, and of settings."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for message in messages:
        digest.update(f"\0{message['role']}".encode())
        for part in message["content"]:
            value = part.get("text") if part["type"] == "text" else part["url"]
            digest.update(f"\0{part['type']}\0".encode())
            if isinstance(value, Image.Image):
                digest.update(f"{value.mode} {value.size}".encode())
                digest.update(np.asarray(value).tobytes())
            elif part["type"] == "text":
                digest.update(value.encode())
            else:  # the path of a film, which may lie elsewhere next time
                path = Path(value)
                digest.update(f"{path.name} {path.stat().st_size}".encode())
    return digest.hexdigest()[:16]


def files_digest(folder: Path) -> str:
    """Return a digest of the names, sizes and times of the files below a folder."""
    digest = hashlib.sha256(str(folder.resolve()).encode())
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        found = path.stat()
        digest.update(f"\0{path.relative_to(folder)} {found.st_size} {found.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


class KeepsAnswers:
    """Put before a model class of lmms-eval in the bases of a class; call `keep_answers` before it is asked."""

    def keep_answers(self, file: AnswerFile, style: str, bar: Any) -> None:
        """Keep the answers that come from now on.

        Args:
            file: where.
            style: of the prompts.
            bar: tqdm's, advanced by a step for each sample.
        """
        self._answers, self._style, self._bar = file, style, bar

    def clean(self) -> None:
        """Stay whole for the next benchmark: lmms-eval drops the weights after each."""

    @contextlib.contextmanager
    def options_for(self, request: Any) -> Iterator[None]:
        """Set what a batch like `request` needs for the time that it is asked; `request.num_images` is known."""
        yield

    def generate_until(self, requests: list) -> list[str]:
        """Return the answers to lmms-eval's requests: those that are kept, and the others from the model."""
        keys = [self._key(request) for request in requests]
        missing = {key: request for key, request in zip(keys, requests, strict=True) if key not in self._answers.rows}
        self._bar.reset(total=len(requests))
        self._bar.update(len(requests) - len(missing))
        for group in self._batches(missing):
            self.ask(group)
        return [self._answers.rows[key]["answer"] for key in keys]

    def _key(self, request: Any) -> Key:
        _, doc_to_messages, settings, doc_id, task, split = request.args
        messages = doc_to_messages(self.task_dict[task][split][doc_id])
        kinds = [part["type"] for message in messages for part in message["content"]]
        request.num_images, request.has_video = kinds.count("image"), "video" in kinds
        return Key(task, doc_id, self._style, prompt_digest(messages, settings))

    def _batches(self, missing: dict[Key, Any]) -> Iterator[list[tuple[Key, Any]]]:
        """Yield batches; a sample with several images, which share the tiles, or a film has one to itself."""
        alone = [member for member in missing.items() if member[1].num_images > 1 or member[1].has_video]
        keys_alone = {key for key, _ in alone}
        others = [member for member in missing.items() if member[0] not in keys_alone]
        for start in range(0, len(others), int(self.batch_size)):
            yield others[start : start + int(self.batch_size)]
        yield from ([member] for member in alone)

    def ask(self, group: list[tuple[Key, Any]]) -> None:
        """Ask the model, and keep its answers; a sample that it refuses with a ValueError or TypeError fails alone."""
        try:
            with self.options_for(group[0][1]):
                answers = super().generate_until([request for _, request in group])
        except (ValueError, TypeError) as error:
            if len(group) == 1:
                self._keep(group[0], "", str(error) or type(error).__name__)
            else:
                for member in group:
                    self.ask([member])
            return
        for member, answer in zip(group, answers, strict=True):
            self._keep(member, getattr(answer, "text", answer), None)

    def _keep(self, member: tuple[Key, Any], answer: str, error: str | None) -> None:
        key, request = member
        self._answers.append({**key._asdict(), "settings": request.args[2], "answer": answer, "error": error})
        self._bar.update(1)
