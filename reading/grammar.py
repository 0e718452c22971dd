"""Holds what a model writes to a grammar: at each step only tokens that can still lead to a valid text keep a score.

The grammar library is llguidance: docs/fields.md says why. `Grammar` processes the scores of a batch whose rows have
grammars of their own; pass it to `generate` or `chat` as a logits processor.
"""

import re
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor

from .schema import INSTALL

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
    grammar = library.LLMatcher.grammar_from_json_schema(dict(schema), overrides=JSON_STYLE)
    return _checked(grammar, schema)


def text_grammar(schema: Mapping[str, Any], absent: str | None) -> str:
    """Return the grammar of a plain answer to a question about one value: no quotes, no escapes.

    Args:
        schema: a narrowed schema of a string, number, integer, boolean or of several of them.
        absent: what the model answers if the page has no such value; None if null is not allowed.
    """
    library = llguidance()
    rules, start = [], ["value"]
    if absent is not None:
        start.append("absent")
        rules.append(f"absent: {_quoted(absent)}")
    rules += [f"value: {_value_rule(schema)}", r"WORDS: /[^\x00-\x1f]+/"]
    grammar = library.LLMatcher.grammar_from_lark("\n".join([f"start: {' | '.join(start)}", *rules]))
    return _checked(grammar, schema)
