"""Reads the fields of a document as checked values, each with its confidence and its page.

`extract` asks the model once a page, holds the answer to the caller's schema, and merges the pages into one object.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from .schema import Fields


class ExtractionError(ValueError):
    """No valid instance could be read.

    Args:
        message: what is missing, and what to do.
        status: "cut off", "looped" or "invalid".
        pages: what was read from each page.
    """

    def __init__(self, message: str, status: str, pages: "Sequence[PageValues]" = ()):
        super().__init__(message)
        self.status = status
        self.pages = list(pages)


@dataclass(frozen=True)
class Value:
    """One value of a document.

    Args:
        path: where it stands in the object, for example "items[0].price".
        value: a text, number, boolean, or None for what the document lacks.
        confidence: 0..1; None where the probabilities are not known.
        page: the page, from 1 on, that it was read from.
    """

    path: str
    value: Any
    confidence: float | None
    page: int


@dataclass
class PageValues:
    """What was read from one page.

    Args:
        page: its number, from 1 on.
        answer: what the model wrote.
        status: "read", "cut off" or "looped".
        tokens: number of tokens of the answer.
        values: the complete values, in the order of the answer.
        data: the object made of them, with null for what is missing.
    """

    page: int
    answer: str
    status: str
    tokens: int
    values: list[Value] = field(default_factory=list)
    data: Any = None


@dataclass
class Extraction:
    """The fields of one document.

    Args:
        fields: what was asked for.
        json: the instance of the schema, as `json.loads` returns it.
        values: every value by its path, with confidence and page.
        status: "read"; "cut off" or "looped" if a page's answer did not end, so that values may be missing.
        pages: what was read from each page.
    """

    fields: Fields
    json: dict[str, Any]
    values: dict[str, Value]
    status: str
    pages: list[PageValues]

    @cached_property
    def data(self) -> Any:
        """The instance; for a pydantic class an object of it.

        Raises:
            pydantic.ValidationError: if a validator of the class, which no schema shows, refuses the values.
        """
        return self.fields.build(self.json)

    def rows(self) -> list[dict[str, Any]]:
        """Return one dict a value, for `pandas.DataFrame(extraction.rows())`."""
        return [vars(value) for value in self.values.values()]
