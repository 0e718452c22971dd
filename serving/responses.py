"""OpenAI's Responses API: its requests as those for a chat completion, and an answer as the events of a response.

Nothing is stored: a request holds its whole conversation.
"""

import secrets
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from .calls import Call
from .engine import Begun, Ended, Job
from .media import shown
from .requests import IGNORED, ChatRequest, check_numbers, check_unused

HONOURED = frozenset(
    (
        "chat_template_kwargs", "include", "input", "instructions", "max_output_tokens", "model", "seed", "stream",
        "temperature", "text", "tool_choice", "tools", "top_logprobs", "top_p",
    )
)  # fmt: skip
NEUTRAL_VALUES: dict[str, Any] = {"background": False, "truncation": "disabled", "reasoning": {}}
LOGPROBS = "message.output_text.logprobs"
# Fields that a chat completion has under the same name.
SHARED = ("chat_template_kwargs", "model", "seed", "stream", "temperature", "top_logprobs", "top_p")


def chat_request(body: dict[str, Any]) -> ChatRequest:
    """Read the body of a request for a response.

    Raises:
        ValueError: with the name of the field, what came and what is possible.
    """
    body = {name: value for name, value in body.items() if value is not None}
    check_unused(body, HONOURED | IGNORED | {"stream_options"}, NEUTRAL_VALUES)
    check_numbers(body, {"max_output_tokens": (int, 1, 2**63)})
    chat = {name: body[name] for name in SHARED if name in body}
    chat |= {"messages": _messages(body.get("input"), body.get("instructions")), **_format(body.get("text", {}))}
    if "max_output_tokens" in body:
        chat["max_completion_tokens"] = body["max_output_tokens"]
    if "tools" in body:
        chat["tools"] = [_nested(tool) for tool in body["tools"]] if isinstance(body["tools"], list) else body["tools"]
    if "tool_choice" in body:
        chat["tool_choice"] = _nested(body["tool_choice"])
    included = body.get("include", [])
    if not isinstance(included, list) or not set(map(str, included)) <= {LOGPROBS}:
        raise ValueError(f"include may hold {LOGPROBS!r}, got {shown(included)}.")
    return ChatRequest.of({**chat, "logprobs": bool(included) or "top_logprobs" in body})


def _nested(tool: Any) -> Any:
    """Return a function of the Responses API as a chat completion has it."""
    if not isinstance(tool, dict) or tool.get("type") != "function" or "function" in tool:
        return tool
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


def _format(text: Any) -> dict[str, Any]:
    """Return the `response_format` and the verbosity of a field `text`."""
    if not isinstance(text, dict):
        raise ValueError(f"text must be an object, got {shown(text)}.")
    form = {name: value for name, value in text.items() if name != "format" and value is not None}
    wanted = text.get("format") or {"type": "text"}
    if isinstance(wanted, dict) and wanted.get("type") == "json_schema":
        wanted = {"type": "json_schema", "json_schema": wanted}
    return {**form, "response_format": wanted}


def _messages(given: Any, instructions: Any) -> list[dict[str, Any]]:
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not isinstance(given, list) or not all(isinstance(item, dict) for item in given):
        raise ValueError(f"input must be a text or a list of items, got {shown(given)}.")
    if given and all(str(item.get("type")).startswith("input_") for item in given):
        given = [{"role": "user", "content": given}]
    messages: list[dict[str, Any]] = []
    if instructions is not None:
        messages.append({"role": "system", "content": instructions})
    for item in given:
        kind = item.get("type", "message")
        if kind == "message":
            messages.append({"role": item.get("role"), "content": _content(item.get("content"))})
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            if not (messages and messages[-1]["role"] == "assistant"):
                messages.append({"role": "assistant", "content": ""})
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            messages[-1].setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            output = _content(item.get("output"))
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": output})
        elif kind != "reasoning":  # that of earlier turns is not part of a prompt
            raise ValueError(
                f"input has an item of type {kind!r}; this server takes 'message', 'function_call', "
                "'function_call_output' and 'reasoning'."
            )
    return messages


def _content(content: Any) -> Any:
    return [_part(part) for part in content] if isinstance(content, list) else content


def _part(part: Any) -> Any:
    """Return a part of a message as a chat completion has it; what is no such part is refused there."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("input_text", "output_text"):
        return {"type": "text", "text": part.get("text")}
    if kind == "input_image":
        return {"type": "image_url", "image_url": {"url": part.get("image_url"), "detail": part.get("detail")}}
    if kind == "input_file":
        return {"type": "file", "file": {name: value for name, value in part.items() if name != "type"}}
    return part


def _id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(12)}"


class ModelResponse:
    """The response to one request.

    Args:
        job: where the answer comes from.
        begun: says how long the prompt is.
        model: name of the model.
    """

    end_mark = ""

    def __init__(self, job: Job, begun: Begun, model: str):
        self.job, self.begun = job, begun
        self._output: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None  # the item that is being written
        self._number = -1
        request = job.request
        self._response: dict[str, Any] = {
            "id": _id("resp"),
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "output": [],
            "usage": None,
            "instructions": None,
            "max_output_tokens": request.max_tokens,
            "metadata": {},
            "parallel_tool_calls": True,
            "temperature": request.temperature,
            "tool_choice": "auto",
            "tools": [{**tool["function"], "type": "function"} for tool in request.tools],
            "top_p": request.top_p,
        }

    async def whole(self) -> dict[str, Any]:
        """Return the response when it is complete."""
        events = [event async for event in self.chunks()]
        return events[-1]["response"]

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """Yield the events of the response."""
        for kind in ("created", "in_progress"):
            yield self._event(f"response.{kind}", response=dict(self._response))
        async for event in self.job.events():
            if isinstance(event, Ended):
                self._end(event)
                continue
            logprobs = event.logprobs
            for kind, value in event.parts:
                for written in self._written(kind, value, logprobs):
                    yield written
                logprobs = []
        if self._open is None and not any(item["type"] != "reasoning" for item in self._output):
            for opened in self._opened("text"):
                yield opened
        for closed in self._closed():
            yield closed
        yield self._event(f"response.{self._response['status']}", response={**self._response, "output": self._output})

    def _event(self, kind: str, **content: Any) -> dict[str, Any]:
        self._number += 1
        return {"type": kind, "sequence_number": self._number, **content}

    def _end(self, ended: Ended) -> None:
        is_whole = ended.finish_reason == "stop"
        prompt, answer = self.begun.num_prompt_tokens, ended.num_tokens
        self._response |= {
            "status": "completed" if is_whole else "incomplete",
            "incomplete_details": None if is_whole else {"reason": "max_output_tokens"},
            "usage": {
                "input_tokens": prompt,
                "output_tokens": answer,
                "total_tokens": prompt + answer,
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens_details": {"reasoning_tokens": 0},
            },
        }

    def _written(self, kind: str, value: Any, logprobs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield the events of one part of the answer."""
        if kind == "call":
            yield from self._closed()
            yield from self._called(value)
            return
        wanted = "message" if kind == "text" else "reasoning"
        if self._open is None or self._open["type"] != wanted:
            yield from self._closed()
            yield from self._opened(kind)
        content = self._open["content"][0]
        content["text"] += value
        delta = {"item_id": self._open["id"], "output_index": len(self._output), "content_index": 0, "delta": value}
        if kind == "text":
            content["logprobs"] += logprobs
            yield self._event("response.output_text.delta", **delta, logprobs=logprobs)
        else:
            yield self._event("response.reasoning_text.delta", **delta)

    def _opened(self, kind: str) -> Iterator[dict[str, Any]]:
        index = len(self._output)
        if kind == "text":
            item = {"id": _id("msg"), "type": "message", "role": "assistant", "status": "in_progress", "content": []}
            part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        else:
            item = {"id": _id("rs"), "type": "reasoning", "status": "in_progress", "summary": [], "content": []}
            part = {"type": "reasoning_text", "text": ""}
        yield self._event("response.output_item.added", output_index=index, item=dict(item))
        place = {"item_id": item["id"], "output_index": index, "content_index": 0}
        yield self._event("response.content_part.added", **place, part={**part})
        self._open = {**item, "content": [part]}

    def _closed(self) -> Iterator[dict[str, Any]]:
        """Yield the events that end the open item, if there is one."""
        if self._open is None:
            return
        item, index, self._open = {**self._open, "status": "completed"}, len(self._output), None
        if self._response["status"] == "incomplete":
            item["status"] = "incomplete"
        part = item["content"][0]
        place = {"item_id": item["id"], "output_index": index, "content_index": 0}
        done: dict[str, Any] = {"text": part["text"]}
        if item["type"] == "message":
            done["logprobs"] = part["logprobs"]
        yield self._event(f"response.{part['type']}.done", **place, **done)
        yield self._event("response.content_part.done", **place, part=part)
        yield self._event("response.output_item.done", output_index=index, item=item)
        self._output.append(item)

    def _called(self, call: Call) -> Iterator[dict[str, Any]]:
        index = len(self._output)
        item = {"id": _id("fc"), "type": "function_call", "call_id": _id("call"), "name": call.name}
        place = {"item_id": item["id"], "output_index": index}
        added = {**item, "arguments": "", "status": "in_progress"}
        yield self._event("response.output_item.added", output_index=index, item=added)
        yield self._event("response.function_call_arguments.delta", **place, delta=call.arguments)
        done = {"name": call.name, "arguments": call.arguments}
        yield self._event("response.function_call_arguments.done", **place, **done)
        item |= {"arguments": call.arguments, "status": "completed"}
        yield self._event("response.output_item.done", output_index=index, item=item)
        self._output.append(item)
