"""Chat completions in OpenAI's form: an answer as one object, or as chunks of a stream."""

import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from .calls import Call
from .engine import Begun, Ended, Job
from .writing import Piece


@dataclass
class Choice:
    """One answer, as far as it has come."""

    text: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None
    num_tokens: int = 0

    def add(self, piece: Piece) -> dict[str, Any]:
        """Take a piece in, and return it as the `delta` of a chunk."""
        delta: dict[str, Any] = {}
        self.logprobs += piece.logprobs
        for kind, value in piece.parts:
            if kind == "call":
                call = tool_call(value)
                delta.setdefault("tool_calls", []).append({"index": len(self.calls), **call})
                self.calls.append(call)
            elif kind == "reasoning":
                self.reasoning += value
                delta["reasoning_content"] = delta.get("reasoning_content", "") + value
            else:
                self.text += value
                delta["content"] = delta.get("content", "") + value
        return delta

    def end(self, ended: Ended) -> None:
        self.num_tokens = ended.num_tokens
        self.finish_reason = "tool_calls" if self.calls and ended.finish_reason == "stop" else ended.finish_reason

    @property
    def message(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self.text, "refusal": None}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message |= {"content": self.text or None, "tool_calls": self.calls}
        return message


def tool_call(call: Call) -> dict[str, Any]:
    """Return a call with an id of its own."""
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


class Completion:
    """The answers to one request.

    Args:
        job: where they come from.
        begun: says how long the prompt is.
        model: name of the model.
    """

    end_mark = "data: [DONE]\n\n"

    def __init__(self, job: Job, begun: Begun, model: str):
        self.job, self.request, self.begun = job, job.request, begun
        self.choices = [Choice() for _ in range(job.request.num_choices)]
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    @property
    def usage(self) -> dict[str, int]:
        prompt, answers = self.begun.num_prompt_tokens, sum(choice.num_tokens for choice in self.choices)
        return {"prompt_tokens": prompt, "completion_tokens": answers, "total_tokens": prompt + answers}

    def _logprobs(self, entries: list[dict[str, Any]]) -> dict[str, Any] | None:
        return None if self.request.top_logprobs is None else {"content": entries, "refusal": None}

    async def whole(self) -> dict[str, Any]:
        """Return the object of an answer that is not streamed."""
        async for event in self.job.events():
            choice = self.choices[event.choice]
            choice.end(event) if isinstance(event, Ended) else choice.add(event)
        choices = [
            {
                "index": index,
                "message": choice.message,
                "logprobs": self._logprobs(choice.logprobs),
                "finish_reason": choice.finish_reason or "length",
            }
            for index, choice in enumerate(self.choices)
        ]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": self.usage}

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """Yield the objects of a stream."""
        for index in range(len(self.choices)):
            yield self._chunk(index, {"role": "assistant", "content": ""})
        async for event in self.job.events():
            choice = self.choices[event.choice]
            if isinstance(event, Ended):
                choice.end(event)
                yield self._chunk(event.choice, {}, finish_reason=choice.finish_reason)
            else:
                yield self._chunk(event.choice, choice.add(event), event.logprobs)
        if self.request.wants_usage:
            yield {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": self.usage}

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: list[dict[str, Any]] | None = None,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs(logprobs) if logprobs else None,
            "finish_reason": finish_reason,
        }
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": [choice]}
        return {**chunk, "usage": None} if self.request.wants_usage else chunk
