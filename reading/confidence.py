"""Which tokens of an answer make up each of its values, and how well a confidence tells right values from wrong ones.

`read_json` parses an answer into a tree whose leaves know their place in the text; `spelled_by` finds a leaf's tokens.
`auroc`, `fit_temperature` and `reliability` judge confidences by values whose truth is known.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from json.decoder import scanstring
from typing import Any

import numpy as np

_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_LITERALS = {"true": True, "false": False, "null": None}


@dataclass(frozen=True)
class Leaf:
    """A scalar of a JSON text: its value, and where its characters lie, without the quotes of a string."""

    value: Any
    start: int
    end: int


class _Unfinished(Exception):
    """The text ended inside a value."""


def read_json(text: str) -> tuple[Any, bool]:
    """Parse a JSON text that may end early.

    Returns:
        the tree of dicts, lists and leaves, and whether the text was complete. From a text that ends early come the
        values that are certainly complete: no text without its closing quote, no number that might have gone on, no
        entry of a list that is itself incomplete. None if there is nothing.

    Raises:
        ValueError: if the text is no beginning of a JSON text.
    """
    root: dict[str, Any] = {}
    try:
        end = _read(text, 0, root, "root")
    except _Unfinished:
        return root.get("root"), False
    if text[end:].strip():
        raise ValueError(f"After the JSON value follows {text[end : end + 40]!r}.")
    return root["root"], True


def _skip(text: str, place: int) -> int:
    while place < len(text) and text[place] in " \t\r\n":
        place += 1
    if place == len(text):
        raise _Unfinished
    return place


def _read(text: str, place: int, parent: Any, key: Any) -> int:
    """Read the value at `place` into `parent[key]` and return where it ends."""
    place = _skip(text, place)
    first = text[place]
    if first == "{":
        return _read_object(text, place + 1, parent.setdefault(key, {}))
    if first == "[":
        return _read_list(text, place + 1, parent.setdefault(key, []))
    if first == '"':
        value, end = _string(text, place)
        parent[key] = Leaf(value, place + 1, end - 1)
        return end
    for word, value in _LITERALS.items():
        if text.startswith(word, place):
            parent[key] = Leaf(value, place, place + len(word))
            return place + len(word)
        if word.startswith(text[place:]):
            raise _Unfinished
    match = _NUMBER.match(text, place)
    if match is None and re.fullmatch(r"-?", text[place:]):
        raise _Unfinished
    if match is None:
        raise ValueError(f"At character {place} stands {text[place : place + 40]!r}, which is no JSON value.")
    if re.fullmatch(r"[0-9.eE+-]*", text[match.end() :]) and (key != "root" or match.end() < len(text)):
        raise _Unfinished  # the number might have gone on
    parent[key] = Leaf(json.loads(match[0]), place, match.end())
    return match.end()


def _string(text: str, place: int) -> tuple[str, int]:
    try:
        return scanstring(text, place + 1)
    except json.JSONDecodeError as error:
        if re.search(r'(?<!\\)(?:\\\\)*"', text[place + 1 :]):
            raise ValueError(f"At character {place}: {error.msg}.") from error
        raise _Unfinished from error


def _read_object(text: str, place: int, found: dict[str, Any]) -> int:
    place = _skip(text, place)
    while text[place] != "}":
        if text[place] != '"':
            raise ValueError(f"At character {place} stands {text[place]!r}, where a key should begin.")
        key, place = _string(text, place)
        place = _skip(text, place)
        if text[place] != ":":
            raise ValueError(f"At character {place} stands {text[place]!r}, where a colon should stand.")
        place = _after_comma(text, _read(text, place + 1, found, key), "}")
    return place + 1


def _read_list(text: str, place: int, found: list[Any]) -> int:
    place = _skip(text, place)
    while text[place] != "]":
        entry: dict[str, Any] = {}
        place = _read(text, place, entry, "entry")
        found.append(entry["entry"])
        place = _after_comma(text, place, "]")
    return place + 1


def _after_comma(text: str, place: int, end: str) -> int:
    place = _skip(text, place)
    if text[place] == ",":
        return _skip(text, place + 1)
    if text[place] != end:
        raise ValueError(f"At character {place} stands {text[place]!r}, where a comma or {end!r} should stand.")
    return place


def spelled_by(leaf: Leaf, token_ends: Sequence[int], text: str) -> slice:
    """Return which tokens hold the characters of a leaf; for an empty text the token with its closing quote.

    Args:
        leaf: see `read_json`.
        token_ends: where each token ends, in bytes of the text.
        text: the whole text.
    """
    start, end = (len(text[:place].encode()) for place in (leaf.start, leaf.end))
    first = int(np.searchsorted(token_ends, start, side="right"))
    last = int(np.searchsorted(token_ends, max(end, start + 1), side="left"))
    return slice(first, last + 1)


def auroc(confidences: Sequence[float], is_right: Sequence[bool]) -> float:
    """Return how often a right value has a higher confidence than a wrong one; ties count one half.

    Raises:
        ValueError: if all are right or all are wrong.
    """
    right = np.sort([value for value, truth in zip(confidences, is_right, strict=True) if truth])
    wrong = np.array([value for value, truth in zip(confidences, is_right, strict=True) if not truth])
    if not len(right) or not len(wrong):
        raise ValueError(f"{len(right)} values are right and {len(wrong)} wrong; both kinds are needed.")
    above = len(right) - np.searchsorted(right, wrong, side="right")
    ties = np.searchsorted(right, wrong, side="right") - np.searchsorted(right, wrong, side="left")
    return float((above + ties / 2).sum() / (len(right) * len(wrong)))


def fit_temperature(confidences: Sequence[float], is_right: Sequence[bool]) -> float:
    """Return the temperature 0.05..20 for which `confidence ** (1 / temperature)` is likeliest given the truth.

    Args:
        confidences: at temperature 1, 0..1.
        is_right: whether each value is right.
    """
    logs = np.log(np.clip(np.asarray(confidences, dtype=float), 1e-30, 1 - 1e-9))
    truth = np.asarray(is_right, dtype=bool)
    temperatures = np.geomspace(0.05, 20, 1200)
    losses = []
    for temperature in temperatures:
        chance = np.clip(np.exp(logs / temperature), 1e-9, 1 - 1e-9)
        losses.append(-np.log(np.where(truth, chance, 1 - chance)).mean())
    return float(temperatures[int(np.argmin(losses))])


def reliability(confidences: Sequence[float], is_right: Sequence[bool], bins: int = 10) -> list[dict[str, float]]:
    """Return for each of `bins` equal ranges of confidence how many values lie in it, their mean and how many are right.

    Returns:
        dicts with "count", "confidence" (mean) and "accuracy"; ranges without values are left out.
    """
    values, truth = np.asarray(confidences, dtype=float), np.asarray(is_right, dtype=float)
    places = np.minimum((values * bins).astype(int), bins - 1)
    return [
        {
            "count": int((places == place).sum()),
            "confidence": float(values[places == place].mean()),
            "accuracy": float(truth[places == place].mean()),
        }
        for place in range(bins)
        if (places == place).any()
    ]


def calibration_error(confidences: Sequence[float], is_right: Sequence[bool], bins: int = 10) -> float:
    """Return the expected calibration error: the mean distance between confidence and accuracy over all values, 0..1."""
    ranges = reliability(confidences, is_right, bins)
    total = math.fsum(part["count"] for part in ranges)
    return sum(part["count"] * abs(part["confidence"] - part["accuracy"]) for part in ranges) / total
