"""Reads the fields of a document as checked values, each with its confidence and its page.

`extract` asks the model page by page, holds the answers to the caller's schema, and merges the pages into one object.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from nemotron_vl.answers import confidence
from nemotron_vl.chat import DEFAULT_MAX_NEW_TOKENS, Answer
from nemotron_vl.pictures import is_page, open_document

from .confidence import Leaf, read_json, spelled_by
from .grammar import Grammar, grammar_tokenizer, is_plain, json_grammar, plain_value, text_grammar
from .schema import NULL, Fields, allows_null, asked_about, resolved

INSTRUCTIONS = (
    "Read the page and answer with one JSON object that follows the schema below. Copy texts as they are printed. "
    "Write null for what the page does not have."
)
STATUSES = {"stop": "read", "length": "cut off", "loop": "looped"}


class ExtractionError(ValueError):
    """No valid object could be read.

    Attributes:
        status: "cut off" or "looped" if an answer did not end, "invalid" if the answers make no valid object.
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
        value: a text, a number, a boolean, or None for what the document lacks.
        confidence: 0..1; None where the probabilities are not known.
        page: the page, from 1 on, that it was read from; None if no page has it.
    """

    path: str
    value: Any
    confidence: float | None
    page: int | None


@dataclass
class PageValues:
    """What was read from one page.

    Args:
        page: its number, from 1 on.
        answer: what the model wrote; with a question for each field, one answer a line.
        status: "read", "cut off" or "looped".
        tokens: number of tokens of the answer.
        tree: the object read, with a `Value` at each leaf.
    """

    page: int
    answer: str
    status: str
    tokens: int
    tree: dict[str, Any] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, Value]:
        """Every value by its path."""
        return {value.path: value for value in _leaves(self.tree)}


@dataclass
class Extraction:
    """The fields of one document.

    Args:
        fields: what was asked for.
        json: the instance of the schema, made of dicts, lists, texts, numbers, booleans and None.
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
        """The instance: for a pydantic class an object of it, otherwise the same as `json`.

        Raises:
            pydantic.ValidationError: if a validator of the class, which its schema does not show, refuses a value.
        """
        return self.fields.build(self.json)

    def rows(self) -> list[dict[str, Any]]:
        """Return a dict for each value, for `pandas.DataFrame(extraction.rows())`."""
        return [dict(vars(value)) for value in self.values.values()]


def extract(
    model: Any,
    processor: Any,
    document: Any,
    schema: Any,
    *,
    pages: str | Iterable[int] | None = None,
    password: str | None = None,
    instructions: str = INSTRUCTIONS,
    question_per_field: bool | None = None,
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
    stop_loops: bool | int = True,
    batch_size: int = 1,
    generation_config: Mapping[str, Any] | None = None,
    **image_options: Any,
) -> Extraction:
    """Read the fields of a document.

    Args:
        model, processor: of one checkpoint.
        document: a PDF, an image or another document (see `open_document`), or a list of them, whose pages follow one
            another. A page is rendered when it is read.
        schema: what to read: a JSON Schema of an object, a pydantic class, or a list of names. docs/fields.md says
            which keywords can be held, and what becomes of values that the page lacks.
        pages, password: which pages of the document, such as "1-3,7", and the password of an encrypted one. A page of
            a `Value` counts the pages that are read, from 1 on.
        instructions: what the model is told before the schema.
        question_per_field: ask one short question for each scalar field instead of once for the whole object. None
            does so if the checkpoint's generation_config has `absent_answer`: the words in which a model that was
            trained on short questions says that the page lacks something.
        max_new_tokens: limit of each answer.
        stop_loops: see `chat`.
        batch_size: how many pages are read at once; not with a question for each field.
        generation_config: further options of `chat`.
        image_options: options of the image processor, for example `max_num_tiles`.

    Returns:
        the values of all pages in one object.

    Raises:
        ImportError: if llguidance or jsonschema are missing.
        ValueError: if the schema cannot be held while the model writes; the message names the keyword.
        ExtractionError: if no valid object came out, mostly because an answer needs more than `max_new_tokens`.
    """
    fields = schema if isinstance(schema, Fields) else Fields.of(schema)
    images = _pages_of(document, pages, password)
    if not images:
        raise ValueError("The document has no pages.")
    options = {
        "do_sample": False,
        **dict(generation_config or {}),
        "max_new_tokens": max_new_tokens,
    }
    asker = _Asker(model, processor, instructions, stop_loops, options, image_options)
    if question_per_field is None:
        question_per_field = asker.absent_answer is not None
    asked = fields.asked if len(images) == 1 else fields.for_one_of_several_pages()
    if question_per_field:
        found = [asker.ask_field_by_field(fields, page, number, asked) for number, page in enumerate(images, 1)]
    else:
        found = asker.ask_pages(images, asked, batch_size)
    if len(images) > 1:
        _ask_again(asker, fields, images, found)
    return merge_pages(fields, found)


def _pages_of(document: Any, pages: str | Iterable[int] | None, password: str | None) -> list[Any]:
    """Return the pages of one or several documents; they are not rendered yet."""
    found: list[Any] = []
    for part in document if isinstance(document, list | tuple) else [document]:
        if is_page(part) or isinstance(part, np.ndarray | torch.Tensor):
            found.append(part)
        else:
            found += open_document(part, pages=pages, password=password)
    return found


def merge_pages(fields: Fields, pages: Sequence[PageValues]) -> Extraction:
    """Merge what was read from the pages of a document into one object.

    Of a scalar the value with the highest confidence is kept, lists follow one another, objects merge key by key.

    Args:
        fields: what was asked for.
        pages: in order.

    Raises:
        ExtractionError: if the result is no instance of the schema.
    """
    status = next((page.status for page in pages if page.status != "read"), "read")
    tree = _merge([page.tree for page in pages], fields.asked, fields.asked)
    try:
        instance = fields.instance(_plain(tree))
    except (ValueError, RecursionError) as error:
        if status == "read":
            message = f"The answers make no valid object: {error}."
        else:
            unfinished = next(page for page in pages if page.status == status)
            message = (
                f"The answer about page {unfinished.page} was {status} after {unfinished.tokens} tokens, before it had "
                f"all values that the schema requires ({error}). Raise max_new_tokens, or ask for less."
            )
        raise ExtractionError(message, status if status != "read" else "invalid", pages) from error
    return Extraction(fields, instance, {value.path: value for value in _leaves(tree)}, status, list(pages))


def page_values(answer: str, page: int = 1, finish_reason: str = "stop", tokens: int = 0) -> PageValues:
    """Return what an answer in JSON says about a page, without confidences: for answers of other engines.

    Raises:
        ValueError: if the answer is no JSON object.
    """
    try:
        tree, is_complete = read_json(answer)
    except RecursionError as error:
        raise ValueError("The answer is nested too deeply.") from error
    if not isinstance(tree if tree is not None else {}, dict):
        raise ValueError(f"The answer must be a JSON object, got {answer[:80]!r}.")
    status = STATUSES[finish_reason] if finish_reason != "stop" or is_complete else "cut off"
    return PageValues(page, answer, status, tokens, _with_values(tree or {}, lambda leaf: None, page))


class _Asker:
    """Asks a model about pages and turns its answers into values."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        instructions: str,
        stop_loops: bool | int,
        options: dict[str, Any],
        image_options: dict[str, Any],
    ):
        self.model = model
        self.processor = processor
        self.instructions = instructions
        self.stop_loops = stop_loops
        self.options = options
        self.image_options = image_options
        self.absent_answer = getattr(model.generation_config, "absent_answer", None)
        self.temperature = options.get("confidence_temperature") or getattr(
            model.generation_config, "confidence_temperature", 1.0
        )
        self.tokens = grammar_tokenizer(processor.tokenizer, model.config.get_text_config().vocab_size)

    def _images(self, pages: Sequence[Any]) -> Any:
        return self.processor.image_processor(list(pages), return_tensors="pt", **self.image_options)

    def _chat(self, questions: Any, grammars: list[str], **kwargs: Any) -> Any:
        processors = [*(self.options.get("logits_processor") or ()), Grammar(self.tokens, grammars)]
        return self.model.chat(
            self.processor,
            question=questions,
            generation_config={**self.options, "logits_processor": processors},
            return_dict=True,
            return_confidence=True,
            stop_loops=self.stop_loops,
            **kwargs,
        )

    def ask_pages(
        self, pages: Sequence[Any], asked: Mapping[str, Any], batch_size: int = 1, numbers: Sequence[int] = ()
    ) -> list[PageValues]:
        """Ask for the whole object, `batch_size` pages at a time."""
        grammar, question = json_grammar(asked), f"{self.instructions}\n\n{json.dumps(asked, ensure_ascii=False)}"
        numbers = numbers or range(1, len(pages) + 1)
        found = []
        for start in range(0, len(pages), batch_size):
            batch = pages[start : start + batch_size]
            answers = self._chat([question] * len(batch), [grammar] * len(batch), **self._images(batch))
            found += [
                self._page_values(answer, number)
                for answer, number in zip(answers, numbers[start : start + batch_size], strict=True)
            ]
        return found

    def _page_values(self, answer: Answer, page: int) -> PageValues:
        pieces = [self.tokens.decode_bytes([token]) for token in answer.token_ids]
        ends = [sum(map(len, pieces[: index + 1])) for index in range(len(pieces))]
        text = b"".join(pieces).decode(errors="ignore")
        found = page_values(text, page, answer.finish_reason, len(answer.token_ids))

        def confidence_of(leaf: Leaf) -> float:
            return confidence(answer.probabilities[spelled_by(leaf, ends, text)], self.temperature)

        tree, _ = read_json(text)
        return replace(found, tree=_with_values(tree or {}, confidence_of, page))

    def ask_field_by_field(self, fields: Fields, page: Any, number: int, asked: Mapping[str, Any]) -> PageValues:
        """Ask one question for each scalar field, and once for all others together.

        The questions share the beginning of their prompts, which is kept in a cache where the model can keep one.
        """
        images = self._images([page])
        cache = None if self.model._is_stateful else self.model.chat_cache()
        found = PageValues(number, "", "read", 0)
        others: dict[str, Any] = {}
        answers = []
        for question in _questions(asked, asked, fields.schema, fields.schema):
            if question.schema is None:
                others[question.path[0]] = asked["properties"][question.path[0]]
                continue
            absent = (self.absent_answer or "null") if question.may_be_absent else None
            grammar = text_grammar(question.schema, absent)
            answer = self._chat(question.text, [grammar], past_key_values=cache, **images)
            answers.append(answer)
            text = self.tokens.decode_bytes(answer.token_ids).decode(errors="ignore")  # chat() strips its texts
            value = None if text == absent else plain_value(text, question.schema)
            if answer.finish_reason == "stop":
                _put(found.tree, question.path, Value("", value, answer.confidence, number))
        if others:
            rest = self.ask_pages([page], asked_about(asked, others), numbers=[number])[0]
            found = replace(found, status=rest.status, tokens=rest.tokens, tree={**found.tree, **rest.tree})
            found.answer = rest.answer
        found.answer = "\n".join([*(answer.text for answer in answers), *([found.answer] if others else [])])
        found.tokens += sum(len(answer.token_ids) for answer in answers)
        ends = [STATUSES[answer.finish_reason] for answer in answers]
        found.status = next((status for status in [*ends, found.status] if status != "read"), "read")
        found.tree = _with_paths({name: found.tree[name] for name in asked["properties"] if name in found.tree})
        return found


@dataclass(frozen=True)
class _Question:
    """A question about one field; `schema` is None for fields that are asked for together, as JSON."""

    path: tuple[str, ...]
    text: str
    schema: dict[str, Any] | None
    may_be_absent: bool


def _questions(
    asked: Mapping[str, Any], root: Mapping[str, Any], given: Any, given_root: Mapping[str, Any]
) -> Iterator[_Question]:
    """Yield a question for each scalar field of an object, those of objects inside it included."""
    for name, part in asked["properties"].items():
        yield from _about(name, (name,), part, root, resolved(given, given_root)["properties"][name], given_root)


def _about(
    words: str,
    path: tuple[str, ...],
    part: Mapping[str, Any],
    root: Mapping[str, Any],
    given: Any,
    given_root: Mapping[str, Any],
    may_be_absent: bool = False,
) -> Iterator[_Question]:
    given = resolved(given, given_root)
    part = _without_references(part, root)
    members = [member for member in part.get("anyOf", ()) if member != NULL]
    may_be_absent = may_be_absent or allows_null(part)
    if len(members) == 1:
        part = _without_references(members[0], root)
    if "properties" in part and "properties" in given:
        inner = [
            question
            for name, value in part["properties"].items()
            for question in _about(
                f"{words} {name}", (*path, name), value, root, given["properties"][name], given_root, may_be_absent
            )
        ]
        if all(question.schema is not None for question in inner):
            yield from inner
            return
    description = given.get("description", "")
    words = re.sub(r"(?<=[a-z])(?=[A-Z])|_|-", " ", given.get("title", words)).lower()
    text = description if description.endswith("?") else f"What is the {words}?"
    yield _Question(path, text, dict(part) if is_plain(part) else None, may_be_absent)


def _without_references(schema: Mapping[str, Any], root: Mapping[str, Any]) -> dict[str, Any]:
    """Return a schema with the references of its own and of its alternatives followed."""
    schema = resolved(schema, root)
    return {
        name: [resolved(member, root) for member in value] if name in ("anyOf", "oneOf") else value
        for name, value in schema.items()
    }


def _put(tree: dict[str, Any], path: tuple[str, ...], value: Value) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value


def _with_values(tree: Any, confidence_of: Callable[[Leaf], float | None], page: int) -> Any:
    """Return a tree with a `Value` in place of each `Leaf`."""
    if isinstance(tree, dict):
        return _with_paths({name: _with_values(part, confidence_of, page) for name, part in tree.items()})
    if isinstance(tree, list):
        return [_with_values(part, confidence_of, page) for part in tree]
    return Value("", tree.value, confidence_of(tree), page if tree.value is not None else None)


def _with_paths(tree: Any, path: str = "") -> Any:
    """Return a tree whose values know where they stand."""
    if isinstance(tree, dict):
        return {name: _with_paths(part, f"{path}.{name}" if path else name) for name, part in tree.items()}
    if isinstance(tree, list):
        return [_with_paths(part, f"{path}[{index}]") for index, part in enumerate(tree)]
    return replace(tree, path=path)


def _leaves(tree: Any) -> Iterator[Value]:
    if isinstance(tree, Value):
        yield tree
        return
    for part in tree.values() if isinstance(tree, dict) else tree:
        yield from _leaves(part)


def _plain(tree: Any) -> Any:
    """Return the tree of values alone."""
    if isinstance(tree, dict):
        return {name: _plain(part) for name, part in tree.items()}
    if isinstance(tree, list):
        return [_plain(part) for part in tree]
    return tree.value


def _merge(trees: Sequence[Any], schema: Mapping[str, Any], root: Mapping[str, Any], path: str = "") -> Any:
    """Return one tree of those of several pages, with every key that the schema names."""
    schema = _without_references(schema, root)
    members = [member for member in schema.get("anyOf", ()) if member != NULL]
    if len(members) == 1:
        schema = _without_references(members[0], root)
    present = [tree for tree in trees if not isinstance(tree, Value) or tree.value is not None]
    if not present:
        if "properties" in schema and not trees:
            return {name: _merge([], part, root, _join(path, name)) for name, part in schema["properties"].items()}
        known = [tree.confidence for tree in trees if tree.confidence is not None]
        return Value(path, None, math.prod(known) if known else None, None)
    if "properties" in schema and all(isinstance(tree, dict) for tree in present):
        return {
            name: _merge([tree[name] for tree in present if name in tree], part, root, _join(path, name))
            for name, part in schema["properties"].items()
        }
    if all(isinstance(tree, list) for tree in present) and "prefixItems" not in schema:
        return _with_paths([entry for tree in present for entry in tree], path)
    return _with_paths(max(present, key=_confidence_of_tree), path)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _confidence_of_tree(tree: Any) -> float:
    known = [value.confidence for value in _leaves(tree) if value.confidence is not None]
    return sum(known) / len(known) if known else 0.0


def _ask_again(asker: _Asker, fields: Fields, pages: Sequence[Any], found: list[PageValues]) -> None:
    """Ask again, without leaving the model the choice, for required fields that no page admitted to have.

    Each is asked of the page that was least sure that it lacks the field; the new value takes the place of all others.
    A list that is too long for the schema stays as it is: to drop entries would hide that there are more.
    """
    merged = _merge([page.tree for page in found], fields.asked, fields.asked)
    again: dict[int, dict[str, Any]] = {}
    for name, part in fields.asked["properties"].items():
        broken = fields.broken_keywords(_plain(merged[name]), part)
        if not broken or "maxItems" in broken:
            continue
        doubts = [_confidence_of_tree(page.tree.get(name, [])) for page in found]
        again.setdefault(doubts.index(min(doubts)), {})[name] = part
    for index, parts in again.items():
        answer = asker.ask_pages([pages[index]], asked_about(fields.asked, parts), numbers=[index + 1])[0]
        for page in found:
            page.tree = {name: part for name, part in page.tree.items() if name not in parts}
        page = found[index]
        page.tree |= answer.tree
        page.answer += f"\n{answer.answer}"
        page.tokens += answer.tokens
        page.status = page.status if page.status != "read" else answer.status
