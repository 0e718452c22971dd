"""Calls of tools: found in what a model writes, and forced on it by a grammar, in the format of its chat template.

The template of the 8B V1 has a model write `{"name": ..., "parameters": {...}}`, on lines of their own, the template of
the 12B V2 `<TOOLCALL>[{"name": ..., "arguments": {...}}, ...]</TOOLCALL>`.
"""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from nemotron_vl.prompts import THINK_END, THINK_START
from nemotron_vl.reading.confidence import read_json
from nemotron_vl.reading.grammar import JSON_STYLE, checked_grammar, llguidance
from nemotron_vl.reading.schema import held, writable

CALLS_START, CALLS_END = "<TOOLCALL>", "</TOOLCALL>"
ARGUMENTS = ("parameters", "arguments")


class Part(NamedTuple):
    """A part of an answer: kind "text" or "reasoning" with a piece of it, or "call" with a `Call`."""

    kind: str
    value: Any


class Call(NamedTuple):
    """A call of a tool: its name and its arguments, a JSON object as text."""

    name: str
    arguments: str


def uses_marks(chat_template: str) -> bool:
    """Say whether a chat template has calls between `<TOOLCALL>` and `</TOOLCALL>`."""
    return CALLS_START in chat_template


def call_of(value: Any, names: Sequence[str]) -> Call | None:
    """Return the call that a JSON value stands for; None if it is none of the functions with these names."""
    if not isinstance(value, dict) or value.get("name") not in names:
        return None
    arguments = next((value[key] for key in ARGUMENTS if key in value), None)
    return Call(value["name"], json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None


def call_grammar(tools: Sequence[dict[str, Any]], with_marks: bool) -> str:
    """Return the grammar of an answer that is one call of one of these tools.

    Raises:
        ValueError: if the parameters of a tool cannot be held while the model writes.
        ImportError: if the server lacks a package for it.
    """
    before, after = (CALLS_START + "[", "]" + CALLS_END) if with_marks else ("", "")
    key = ARGUMENTS[with_marks]
    rules = [f"start: {' | '.join(f'call{index}' for index in range(len(tools)))}"]
    for index, tool in enumerate(tools):
        function = tool["function"]
        schema = function.get("parameters") or {"type": "object", "properties": {}}
        opening = json.dumps(f'{before}{{"name": {json.dumps(function["name"])}, "{key}": ', ensure_ascii=False)
        rules.append(f"call{index}: {opening} arguments{index} {json.dumps('}' + after)}")
        rules.append(f"arguments{index}: %json {json.dumps({'x-guidance': JSON_STYLE, **held(writable(schema))})}")
    return checked_grammar(llguidance().LLMatcher.grammar_from_lark("\n".join(rules)), [*tools])


class AnswerParts:
    """Divides the text of an answer into reasoning, text and calls, while it comes.

    Args:
        names: of the tools of the request. What calls no such tool is text.
        with_marks: see `uses_marks`.
        begins_with_reasoning: the prompt has opened a block of reasoning.
    """

    def __init__(self, names: Sequence[str], with_marks: bool, begins_with_reasoning: bool):
        self.names, self.with_marks, self.is_reasoning = names, with_marks, begins_with_reasoning
        self._waiting = ""
        self._at_start = True  # of a line, where a call without marks may begin
        self._has_called = False

    def add(self, text: str, is_last: bool = False) -> Iterator[Part]:
        """Yield the parts that are certain after a further piece of the answer; all that is left with `is_last`."""
        self._waiting += text
        if self.is_reasoning:
            yield from self._reasoning(is_last)
            if self.is_reasoning:
                return
        if not self.names:
            yield from self._text(len(self._waiting))
        else:
            yield from self._marked(is_last) if self.with_marks else self._bare(is_last)
            if is_last and not (self._has_called and self._waiting.isspace()):  # else it belonged to the call
                yield from self._text(len(self._waiting))

    def _text(self, length: int, kind: str = "text") -> Iterator[Part]:
        text, self._waiting = self._waiting[:length], self._waiting[length:]
        if text:
            yield Part(kind, text)

    def _reasoning(self, is_last: bool) -> Iterator[Part]:
        end = self._waiting.find(THINK_END)
        if end < 0:
            yield from self._text(
                len(self._waiting) - (0 if is_last else overlap(self._waiting, THINK_END)), "reasoning"
            )
            return
        yield from self._text(end, "reasoning")
        # The line feeds around the mark belong to neither.
        after = self._waiting.removeprefix(THINK_END).lstrip("\n")
        if after or is_last:
            self._waiting, self.is_reasoning = after, False

    def _marked(self, is_last: bool) -> Iterator[Part]:
        while CALLS_START in self._waiting:
            before, _, rest = self._waiting.partition(CALLS_START)
            inner, end, after = rest.partition(CALLS_END)
            if not end and not is_last:
                yield from self._text(len(before.rstrip("\n")))  # the line feeds before a call are its own
                return
            calls = self._calls_in(inner)
            if calls is None:
                yield from self._text(len(self._waiting) - len(after))
                continue
            yield from self._text(len(before.rstrip("\n")))
            self._waiting, self._has_called = after.lstrip("\n"), True
            yield from (Part("call", call) for call in calls)
        if not is_last:
            certain = len(self._waiting) - overlap(self._waiting, CALLS_START)
            yield from self._text(len(self._waiting[:certain].rstrip("\n")))

    def _calls_in(self, text: str) -> list[Call] | None:
        try:
            values = json.loads(text)
        except ValueError:
            return None
        calls = [call_of(value, self.names) for value in (values if isinstance(values, list) else [values])]
        return calls if calls and None not in calls else None

    def _bare(self, is_last: bool) -> Iterator[Part]:
        while self._waiting:
            between = r"[\s;,]*" if self._has_called else r"\s*"  # Llama may write a semicolon between calls
            begins = re.match(rf"{between}(\{{|\Z)", self._waiting) if self._at_start else None
            if begins is None:
                line = re.search(r"\n\s*(?:\{|\Z)", self._waiting)
                self._at_start = line is not None
                yield from self._text(line.start() if line else len(self._waiting))
                continue
            if not begins[1]:
                return  # white space, which belongs to the call that may follow
            try:
                value, end = json.JSONDecoder().raw_decode(self._waiting, begins.start(1))
            except (ValueError, RecursionError):
                if not is_last and is_beginning_of_json(self._waiting[begins.start(1) :]):
                    return
                value, end = None, begins.end()
            call = call_of(value, self.names)
            self._at_start = call is not None
            if call is None:
                yield from self._text(end)
            else:
                self._waiting, self._has_called = self._waiting[end:], True
                yield Part("call", call)


def overlap(text: str, mark: str) -> int:
    """Return the length of the longest end of a text that is a beginning of a mark, but not all of it."""
    return next((size for size in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:size])), 0)


def is_beginning_of_json(text: str) -> bool:
    """Say whether a text may go on to become a JSON value."""
    try:
        return not read_json(text)[1]
    except (ValueError, RecursionError):
        return False


def opens_reasoning(prompt_end: str) -> bool:
    """Say whether the end of a prompt has opened a block of reasoning."""
    return prompt_end.rstrip().endswith(THINK_START)
