"""Holds what a model writes to a grammar: at each step only tokens that can still lead to a valid text keep a score.

The grammar library is llguidance: docs/fields.md says why. `Grammar` processes the scores of a batch whose rows have
grammars of their own; pass it to `generate` or `chat` as a logits processor.
"""

import json
import re
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor

from .schema import INSTALL, held, validator_of

# One way to write an instance, so that a model cannot fill the page with spaces. The escapes leave out \\u, which could
# make lone surrogates: texts that no file can hold.
JSON_STYLE = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "json_allowed_escapes": 'nrbtf\\"',
}
_tokenizers: "weakref.WeakKeyDictionary[Any, Any]" = weakref.WeakKeyDictionary()


def llguidance() -> Any:
    """Return the module.

    Raises:
        ImportError: if it is missing; the message says how to install it.
    """
    try:
        import llguidance
        import llguidance.hf
    except ImportError as error:
        raise ImportError(f"Answers are held to a schema by llguidance, which is not installed: {INSTALL}.") from error
    return llguidance


def grammar_tokenizer(tokenizer: Any, vocab_size: int) -> Any:
    """Return the grammar library's view of a tokenizer; it is made once (a second for 128,000 tokens).

    Args:
        tokenizer: a fast tokenizer.
        vocab_size: number of scores that the model gives, which may exceed the tokenizer's tokens.
    """
    if tokenizer not in _tokenizers or _tokenizers[tokenizer].vocab_size != vocab_size:
        _tokenizers[tokenizer] = llguidance().hf.from_tokenizer(
            tokenizer, n_vocab=vocab_size, eos_token=tokenizer.eos_token_id
        )
    return _tokenizers[tokenizer]


def json_grammar(schema: Mapping[str, Any]) -> str:
    """Return the grammar of the JSON texts that are instances of a narrowed schema.

    Raises:
        ValueError: if the library cannot hold the schema; the message says why.
    """
    library = llguidance()
    grammar = library.LLMatcher.grammar_from_json_schema(held(schema), overrides=JSON_STYLE)
    return checked_grammar(grammar, schema)


def text_grammar(schema: Mapping[str, Any], absent: str | None) -> str:
    """Return the grammar of a plain answer to a question about one value: no quotes, no escapes.

    Args:
        schema: a narrowed schema of a string, number, integer, boolean or of several of them.
        absent: what the model answers if the page has no such value; None if null is not allowed.
    """
    terminals: list[str] = []
    alternatives = _alternatives(held(schema), terminals)
    if absent is not None:
        alternatives.append(_quoted(absent))
    grammar = llguidance().LLMatcher.grammar_from_lark("\n".join([f"start: {' | '.join(alternatives)}", *terminals]))
    return checked_grammar(grammar, schema)


def is_plain(schema: Mapping[str, Any]) -> bool:
    """Return whether `text_grammar` can hold a narrowed schema without references: a scalar, with a simple pattern."""
    members = [*schema.get("anyOf", ()), *schema.get("oneOf", ())]
    if members:
        return all(map(is_plain, members))
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if values is not None:
        return all(not isinstance(value, (list, dict)) and value != "" for value in values)
    if schema.get("maxLength") == 0:
        return False  # a plain answer has at least one character
    kinds, schema = types_of(schema), held(schema)
    return bool(kinds) and not {"object", "array"} & kinds and _whole_pattern(schema.get("pattern", "")) is not None


def types_of(schema: Mapping[str, Any]) -> set[str]:
    kinds = schema.get("type", [])
    return {kinds} if isinstance(kinds, str) else set(kinds)


def plain_value(text: str, schema: Mapping[str, Any]) -> Any:
    """Return the value that a plain answer stands for.

    Args:
        text: an answer in `text_grammar(schema, absent)`, but not `absent`.
        schema: the narrowed schema.
    """
    validator = validator_of(dict(schema))
    values = [value for value in _choices(schema) if text == _spelled(value)]
    values += [value for value in (True, False) if text == _spelled(value)]
    if re.fullmatch(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?", text):
        values.append(json.loads(text))
    return next(filter(validator.is_valid, values), text)


def _choices(schema: Mapping[str, Any]) -> list[Any]:
    """Return the values that a schema and its alternatives list."""
    members = [*schema.get("anyOf", ()), *schema.get("oneOf", ())]
    own = schema.get("enum", [schema["const"]] if "const" in schema else [])
    return [*own, *(value for member in members for value in _choices(member))]


def _spelled(value: Any) -> str:
    """Return how a plain answer writes a value."""
    if isinstance(value, bool):
        return "Yes." if value else "No."
    return value if isinstance(value, str) else json.dumps(value)


def _alternatives(schema: Mapping[str, Any], terminals: list[str]) -> list[str]:
    """Return the alternatives of a Lark rule for the plain text of a value, and add the terminals that they need.

    Null has no text of its own.
    """
    members = [*schema.get("anyOf", ()), *schema.get("oneOf", ())]
    if members:
        return [rule for member in members for rule in _alternatives(member, terminals)]
    if "enum" in schema or "const" in schema:
        return [_quoted(_spelled(value)) for value in _choices(schema) if value is not None]
    rules = []
    for kind in sorted(types_of(schema) - {"null"}):
        if kind == "boolean":
            rules += [_quoted(_spelled(value)) for value in (True, False)]
        elif kind == "string":
            rules.append(f"TEXT{len(terminals)}")
            terminals.append(f"{rules[-1]}: {_text_terminal(schema)}")
        else:
            limits = {name: value for name, value in schema.items() if "imum" in name or name == "multipleOf"}
            rules.append(f"%json {json.dumps({'type': kind, **limits})}")
    return rules


def _text_terminal(schema: Mapping[str, Any]) -> str:
    length = f"{{{max(1, schema.get('minLength', 1))},{schema.get('maxLength', '')}}}"
    text = rf"/[^\x00-\x1f]{length}/"
    if "pattern" in schema:
        pattern = llguidance().regex_to_lark(
            _whole_pattern(schema["pattern"]), "dw"
        )  # \d and \w as JSON Schema has them
        text = f"{text} & /{pattern}/"
    return text


def _whole_pattern(pattern: str) -> str | None:
    """Return a regular expression that matches whole texts where `pattern` is searched for; None if that is not easy."""
    begins, ends = pattern.startswith("^"), pattern.endswith("$") and not pattern.endswith("\\$")
    middle = pattern[begins : len(pattern) - ends]
    depth = 0
    for character in re.sub(r"\\.|\[[^\]]*\]", "", middle):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if character in "^$" or (character == "|" and not depth):
            return None
    return f"{'' if begins else '.*'}{middle}{'' if ends else '.*'}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def checked_grammar(grammar: str, schema: Any) -> str:
    """Return a grammar of the library, made for `schema`.

    Raises:
        ValueError: if the library cannot hold it; the message says why.
    """
    failed, messages = llguidance().LLMatcher.validate_grammar_with_warnings(grammar)
    if failed:
        raise ValueError(
            f"The schema cannot be held while the model writes: {messages[0][:300]}. It is {schema!r:.200}."
        )
    return grammar


class Grammar(LogitsProcessor):
    """Leaves only those tokens a score that continue a text of the grammar of their row. It serves one `generate`.

    Args:
        tokenizer: see `grammar_tokenizer`.
        grammars: one a row.

    Raises (when called):
        RuntimeError: if the library gives up on a grammar, which is then too large.
    """

    def __init__(self, tokenizer: Any, grammars: Sequence[str]):
        library = llguidance()
        self._matchers = [library.LLMatcher(tokenizer, grammar) for grammar in grammars]
        self._num_seen: int | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        new_ids = [[]] * len(input_ids) if self._num_seen is None else input_ids[:, self._num_seen :].tolist()
        self._num_seen = input_ids.shape[1]
        blocked = np.zeros((len(scores), scores.shape[1]), dtype=bool)
        for row, (matcher, ids) in enumerate(zip(self._matchers, new_ids, strict=True)):
            if matcher.is_stopped() and not matcher.is_error():
                continue  # ended: what follows is padding
            if not matcher.consume_tokens(ids):
                raise RuntimeError(f"The grammar library gave up: {matcher.get_error()[:300]}")
            blocked_bits = ~np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
            blocked[row] = np.unpackbits(blocked_bits, count=scores.shape[1], bitorder="little")
            if matcher.is_error():
                raise RuntimeError(f"The grammar library gave up: {matcher.get_error()[:300]}")
        return scores.masked_fill(torch.from_numpy(blocked).to(scores.device), -torch.inf)
