"""What a request asks for: its fields, checked, so that nothing is dropped in silence."""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nemotron_vl.reading.grammar import json_grammar
from nemotron_vl.reading.schema import writable

from .media import check_part, shown

ROLES = ("system", "developer", "user", "assistant", "tool")
# Keys that chat_template_kwargs may have. The processor of the 8B itself refuses enable_thinking.
REQUEST_OPTIONS = ("max_num_tiles", "use_thumbnail", "upscale", "enable_thinking", "num_frames", "fps", "video_layout")
# Fields that change the answer.
HONOURED = frozenset(
    (
        "chat_template_kwargs", "frequency_penalty", "logit_bias", "logprobs", "max_completion_tokens", "max_tokens",
        "messages", "model", "n", "presence_penalty", "response_format", "seed", "stop", "stream", "stream_options",
        "temperature", "tool_choice", "tools", "top_logprobs", "top_p",
    )
)  # fmt: skip
# Fields about accounts, storage and caches of a service, which clients send to any server; docs/serving.md lists them.
IGNORED = frozenset(
    (
        "metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
        "safety_identifier", "service_tier", "store", "user",
    )
)  # fmt: skip
# The values of other OpenAI fields that ask for nothing.
NEUTRAL_VALUES: dict[str, Any] = {"functions": [], "modalities": ["text"], "verbosity": "medium"}
MAX_CHOICES = 16
RANGES: dict[str, tuple[type, float, float]] = {
    "temperature": (float, 0, 2),
    "top_p": (float, 0, 1),
    "frequency_penalty": (float, -2, 2),
    "presence_penalty": (float, -2, 2),
    "max_tokens": (int, 1, sys.maxsize),
    "max_completion_tokens": (int, 1, sys.maxsize),
    "n": (int, 1, MAX_CHOICES),
    "seed": (int, -(2**63), 2**64 - 1),
    "top_logprobs": (int, 0, 20),
}
ANY_OBJECT = {"type": "object"}


@dataclass(frozen=True)
class ChatRequest:
    """A checked request for answers to a conversation.

    Args:
        messages: in OpenAI's form; the media in them are not decoded yet.
        tools: functions that the prompt describes, in OpenAI's form.
        forced_tools: the functions one of which the answer has to call; empty if it need not call any.
        template_options: options of the processor and its chat template.
        num_choices: answers.
        max_tokens: of each answer; None leaves it to the checkpoint.
        temperature, top_p: None leaves both to the checkpoint.
        seed: of the first answer; None takes a random one.
        stops: texts before which an answer ends.
        frequency_penalty, presence_penalty: taken off the logits of the tokens of the answer so far.
        logit_bias: added to the logits of tokens.
        top_logprobs: most probable tokens to name at each place; None if no log-probabilities are wanted at all.
        schema: JSON Schema that the answer is held to; None for plain text.
        is_streamed, wants_usage: the answer comes in pieces, and a last piece has the usage.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] = field(default_factory=list)
    forced_tools: list[dict[str, Any]] = field(default_factory=list)
    template_options: dict[str, Any] = field(default_factory=dict)
    num_choices: int = 1
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stops: list[str] = field(default_factory=list)
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    top_logprobs: int | None = None
    schema: dict[str, Any] | None = None
    is_streamed: bool = False
    wants_usage: bool = False

    @classmethod
    def of(cls, body: dict[str, Any]) -> "ChatRequest":
        """Read the body of a request for a chat completion.

        Raises:
            ValueError: with the name of the field, what came and what is possible.
        """
        body = {name: value for name, value in body.items() if value is not None}
        _check_fields(body)
        tools, forced = _tools(body.get("tools", []), body.get("tool_choice", "auto"))
        schema = _schema(body.get("response_format", {"type": "text"}))
        if schema is not None and forced:
            raise ValueError("response_format and a tool_choice that asks for a call exclude each other. Send one.")
        wants_logprobs = body.get("logprobs", False)
        if body.get("top_logprobs") and not wants_logprobs:
            raise ValueError("top_logprobs needs logprobs=true.")
        stop = body.get("stop", [])
        return cls(
            messages=_messages(body.get("messages")),
            tools=tools,
            forced_tools=forced,
            template_options=dict(body.get("chat_template_kwargs", {})),
            num_choices=body.get("n", 1),
            max_tokens=body.get("max_completion_tokens", body.get("max_tokens")),
            temperature=body.get("temperature"),
            top_p=body.get("top_p"),
            seed=body.get("seed"),
            stops=[stop] if isinstance(stop, str) else stop,
            frequency_penalty=body.get("frequency_penalty", 0.0),
            presence_penalty=body.get("presence_penalty", 0.0),
            logit_bias={int(token): float(bias) for token, bias in body.get("logit_bias", {}).items()},
            top_logprobs=body.get("top_logprobs", 0) if wants_logprobs else None,
            schema=schema,
            is_streamed=body.get("stream", False),
            wants_usage=body.get("stream_options", {}).get("include_usage", False),
        )


def check_numbers(body: Mapping[str, Any], ranges: Mapping[str, tuple[type, float, float]] = RANGES) -> None:
    """Raise ValueError for a field that is no number, or one out of its range."""
    for name, (kind, lowest, highest) in ranges.items():
        value = body.get(name)
        is_number = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
        if value is not None and not (is_number and lowest <= value <= highest):
            noun = "whole number" if kind is int else "number"
            raise ValueError(f"{name} must be a {noun} from {lowest} to {highest}, got {shown(value)}.")


def check_unused(body: Mapping[str, Any], known: frozenset[str], neutral: Mapping[str, Any] = NEUTRAL_VALUES) -> None:
    """Raise ValueError for a field that would be ignored, unless its value asks for nothing."""
    for name in sorted(body.keys() - known):
        if name not in neutral or body[name] != neutral[name]:
            raise ValueError(f"{name}={shown(body[name])} is not supported by this server; leave {name} out.")


def _check_fields(body: Mapping[str, Any]) -> None:
    check_unused(body, HONOURED | IGNORED)
    check_numbers(body)
    for name in ("stream", "logprobs"):
        if not isinstance(body.get(name, False), bool):
            raise ValueError(f"{name} must be true or false, got {shown(body[name])}.")
    stream_options = body.get("stream_options", {})
    if not isinstance(stream_options, dict) or not stream_options.keys() <= {"include_usage", "include_obfuscation"}:
        raise ValueError(f"stream_options may hold include_usage, got {shown(stream_options)}.")
    stop = body.get("stop", [])
    texts = stop if isinstance(stop, list) else [stop]
    if not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"stop must be a text or a list of texts, none of them empty, got {shown(stop)}.")
    biases = body.get("logit_bias", {})
    if not (isinstance(biases, dict) and all(map(_is_bias, biases.keys(), biases.values()))):
        raise ValueError(f"logit_bias must map token ids to numbers from -100 to 100, got {shown(biases)}.")
    options = body.get("chat_template_kwargs", {})
    if not isinstance(options, dict) or not options.keys() <= set(REQUEST_OPTIONS):
        raise ValueError(f"chat_template_kwargs may hold {', '.join(REQUEST_OPTIONS)}, got {shown(options)}.")


def _is_bias(token: str, bias: Any) -> bool:
    is_number = isinstance(bias, (int, float)) and not isinstance(bias, bool) and math.isfinite(bias)
    return token.isascii() and token.isdecimal() and is_number and -100 <= bias <= 100


def _messages(messages: Any) -> list[dict[str, Any]]:
    """Return checked messages; the processor checks the rest of them."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages must be a list with at least one message, got {shown(messages)}.")
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ValueError(f"A message is an object with a role of {', '.join(ROLES)}; got {shown(message)}.")
        if isinstance(message.get("content"), list):
            for part in message["content"]:
                check_part(part)
    renamed = {"developer": "system"}  # OpenAI's newer name
    return [{**message, "role": renamed.get(message["role"], message["role"])} for message in messages]


def _schema(wanted: Any) -> dict[str, Any] | None:
    """Return the schema that a `response_format` asks for."""
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return ANY_OBJECT
    held = wanted.get("json_schema") if kind == "json_schema" else None
    if not isinstance(held, dict) or not isinstance(held.get("schema"), dict):
        raise ValueError(
            "response_format must be {'type': 'text'}, {'type': 'json_object'} or {'type': 'json_schema', 'json_schema': "
            f"{{'name': ..., 'schema': {{...}}}}}}, got {shown(wanted)}."
        )
    return held["schema"]


def _tools(tools: Any, choice: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the functions to describe in the prompt, and those one of which has to be called."""
    functions = []
    for tool in tools if isinstance(tools, list) else [tools]:
        function = (
            tool.get("function") if isinstance(tool, dict) and tool.get("type", "function") == "function" else None
        )
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise ValueError(
                "tools must be a list of {'type': 'function', 'function': {'name': ..., 'parameters': {...}}}, got "
                f"{shown(tool)}."
            )
        if not isinstance(function.get("parameters", {}), dict):
            raise ValueError(f"The parameters of the tool {function['name']} must be a JSON Schema.")
        functions.append(tool)
    if choice == "none":
        return [], []
    if choice == "auto":
        return functions, []
    function = choice.get("function") if isinstance(choice, dict) else None
    named = function.get("name") if isinstance(function, dict) else None
    forced = [tool for tool in functions if choice == "required" or tool["function"]["name"] == named]
    if not forced:
        names = ", ".join(tool["function"]["name"] for tool in functions) or "none"
        raise ValueError(
            "tool_choice must be 'auto', 'none', 'required' or {'type': 'function', 'function': {'name': ...}} with the "
            f"name of a tool of the request ({names}), got {shown(choice)}."
        )
    return functions, forced


def answer_grammar(schema: Mapping[str, Any]) -> str:
    """Return the grammar of the texts that are instances of a caller's schema.

    Raises:
        ValueError: if the schema cannot be held while the model writes.
        ImportError: if the server lacks a package for it.
    """
    return json_grammar(schema if schema == ANY_OBJECT else writable(schema))
