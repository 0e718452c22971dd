"""One answer while the model writes it: tokens become bytes, bytes text, and text the parts that a client gets."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tokenizers import decoders
from transformers import LogitsProcessor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from .calls import AnswerParts, Part, overlap

BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}


def bytes_of_token(tokenizer: Any, token_id: int) -> bytes:
    """Return the bytes that a token of a byte-level tokenizer stands for; those of a character may be in several."""
    token = tokenizer.convert_ids_to_tokens(token_id)
    if token is None:  # the model has more embeddings than the tokenizer has tokens
        return b""
    try:
        return bytes(BYTE_OF[character] for character in token)
    except KeyError:  # an added token is written as it is
        return token.encode()


def check_tokenizer(tokenizer: Any) -> None:
    """Raise ValueError unless a tokenizer is byte-level, as those of both models are."""
    if not isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel):
        raise ValueError(
            f"The server needs a byte-level tokenizer, whose tokens stand for bytes; the checkpoint's decoder is "
            f"{tokenizer.backend_tokenizer.decoder!r:.80}."
        )


@dataclass
class Piece:
    """What a token has added to an answer.

    Args:
        choice: index of the answer.
        parts: text, reasoning and calls that are now certain.
        logprobs: of tokens, in OpenAI's form; empty if they were not asked for.
    """

    choice: int
    parts: list[Part] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)


class LogProbabilities(LogitsProcessor):
    """Keeps the log-probabilities of the step, those of grammars, biases and penalties included. It changes no score.

    Put it last: transformers applies temperature and top-p afterwards. It follows one row.
    """

    def __init__(self) -> None:
        self.latest = torch.empty(0)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.latest = scores[0].float().log_softmax(-1)
        return scores


class Penalties(LogitsProcessor):
    """Takes OpenAI's penalties off the logits of the tokens that an answer already has.

    Args:
        frequency: times the number of times that the token is there.
        presence: once.
        counts: how often each token is in the answer; whoever writes the answer keeps it up to date.
    """

    def __init__(self, frequency: float, presence: float, counts: dict[int, int]):
        self.frequency, self.presence, self.counts = frequency, presence, counts

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not self.counts:
            return scores
        tokens = torch.tensor(list(self.counts), device=scores.device)
        times = torch.tensor(list(self.counts.values()), device=scores.device, dtype=scores.dtype)
        return scores.index_add(1, tokens, -(times * self.frequency + self.presence)[None].expand(len(scores), -1))


class Writer:
    """Collects the tokens of one answer.

    Args:
        tokenizer: a byte-level tokenizer.
        choice: index of the answer.
        ends: ids that end an answer.
        limit: tokens of the answer.
        stops: texts before which it ends.
        parts: divides its text.
        probabilities: None if no log-probabilities are wanted.
        num_alternatives: most probable tokens to name at each place.

    Attributes:
        counts: how often each token is in the answer.
        num_tokens: of the answer, its end included, as vLLM counts.
        finish_reason: "stop" or "length"; None while it is written.
    """

    def __init__(
        self,
        tokenizer: Any,
        choice: int,
        ends: Sequence[int],
        limit: int,
        stops: Sequence[str],
        parts: AnswerParts,
        probabilities: LogProbabilities | None = None,
        num_alternatives: int = 0,
    ):
        self.tokenizer, self.choice, self.ends, self.limit, self.stops = tokenizer, choice, ends, limit, stops
        self.parts, self.probabilities, self.num_alternatives = parts, probabilities, num_alternatives
        self.counts: dict[int, int] = {}
        self.num_tokens = 0
        self.finish_reason: str | None = None
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._waiting = ""  # text that may be the beginning of a stop
        self._is_cut = False
        self._num_characters = 0  # that are decoded
        self._logprobs: list[tuple[int, dict[str, Any]]] = []  # those that wait, and where their tokens begin

    def add(self, token_id: int) -> Piece:
        """Add a token and return what is now certain; `finish_reason` is set if the answer ends with it."""
        self.num_tokens += 1
        if token_id in self.ends:
            return self.finish("stop")
        if self.probabilities is not None:
            self._logprobs.append((self._num_characters, self._logprob(token_id)))
        self.counts[token_id] = self.counts.get(token_id, 0) + 1
        text = self._decoder.decode(bytes_of_token(self.tokenizer, token_id))
        if self._take(text) or self.num_tokens < self.limit:
            return self._piece()
        return self.finish("length")

    def finish(self, reason: str) -> Piece:
        """End the answer, and return what was held back."""
        if self.finish_reason is None and not self._take(self._decoder.decode(b"", final=True)):
            self.finish_reason = reason
        return self._piece()

    def _take(self, text: str) -> bool:
        """Add text; return whether it completes a stop, which ends the answer before it."""
        self._num_characters += len(text)
        self._waiting += text
        places = [place for stop in self.stops if (place := self._waiting.find(stop)) >= 0]
        if places:
            self._num_characters -= len(self._waiting) - min(places)
            self._waiting, self._is_cut = self._waiting[: min(places)], True
            self.finish_reason = "stop"
        return bool(places)

    def _piece(self) -> Piece:
        is_last = self.finish_reason is not None
        kept = 0 if is_last else max((overlap(self._waiting, stop) for stop in self.stops), default=0)
        certain = len(self._waiting) - kept
        text, self._waiting = self._waiting[:certain], self._waiting[certain:]
        num_certain = self._num_characters - kept
        logprobs = []
        while self._logprobs and (self._logprobs[0][0] < num_certain or (is_last and not self._is_cut)):
            logprobs.append(self._logprobs.pop(0)[1])
        return Piece(self.choice, list(self.parts.add(text, is_last)), logprobs)

    def _logprob(self, token_id: int) -> dict[str, Any]:
        latest = self.probabilities.latest
        best = latest.topk(self.num_alternatives)
        alternatives = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        # What a grammar forbids has a probability of 0, whose logarithm JSON cannot write.
        named = [self._named(other, value) for other, value in alternatives if value > -torch.inf]
        return {**self._named(token_id, float(latest[token_id])), "top_logprobs": named}

    def _named(self, token_id: int, logprob: float) -> dict[str, Any]:
        spelled = bytes_of_token(self.tokenizer, token_id)
        return {"token": spelled.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(spelled)}
