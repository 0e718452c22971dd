"""One thread that owns the model. Requests wait for it in a queue of bounded length; answers come token by token.

Each request is prepared in a second thread while the model answers the one before: its images are decoded and cut, and
its prompt is written. So at most two requests hold tiles, however many wait.
"""

import asyncio
import copy
import json
import logging
import math
import queue
import secrets
import threading
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from nemotron_vl.chat import DEFAULT_MAX_NEW_TOKENS
from nemotron_vl.reading.extraction import ExtractionError, extract
from nemotron_vl.reading.grammar import Grammar, grammar_tokenizer
from nemotron_vl.reading.schema import Fields, resolved
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from .calls import AnswerParts, Call, Part, call_grammar, opens_reasoning, uses_marks
from .media import MediaLimits, read_media
from .requests import ChatRequest, answer_grammar
from .writing import LogProbabilities, Penalties, Piece, Writer, check_tokenizer

logger = logging.getLogger("uvicorn.error")

# What bad requests raise. A package that the server lacks is one, too: to try again is of no use.
MISTAKES = (ValueError, TypeError, ImportError, RecursionError)
LEAST_TEMPERATURE = 1e-5  # below, sampling is greedy decoding, and numbers overflow
STOP_SECONDS = 10.0  # in which the step of an answer ends
PROMPT_END = 16  # tokens in which an opened block of reasoning would show
LIBRARY_TOP_K = (None, 50)  # of transformers: 50 tokens to sample from, unless a checkpoint says otherwise


class Busy(Exception):
    """The queue is full, or a request waited too long in it; `retry_after` are seconds."""

    def __init__(self, message: str, retry_after: int):
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True)
class Begun:
    """The model has begun with a request, whose prompt has so many tokens, after so many seconds in the queue."""

    num_prompt_tokens: int
    seconds_in_queue: float


@dataclass(frozen=True)
class Ended:
    """An answer has ended: "stop" or "length"."""

    choice: int
    finish_reason: str
    num_tokens: int


class Job:
    """A request on its way through the threads; it belongs to the event loop that made it.

    Args:
        engine: where it holds a place until `close`.
        request: what it asks for.
        seconds: after which it is given up.
    """

    def __init__(self, engine: "Engine", request: ChatRequest, seconds: float):
        self.engine, self.request = engine, request
        self.begin = time.monotonic()
        self.deadline = self.begin + seconds
        self.is_closed = False
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Any] = asyncio.Queue()

    def post(self, event: Any) -> None:
        """Hand an event on, from any thread: `Begun`, `Piece`, `Ended`, an error, or None at the end."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the loop has ended
            self.is_closed = True

    async def begun(self) -> Begun:
        """Wait until the model begins with this request.

        Raises:
            ValueError: if the request cannot be answered.
            Busy: if its time is over before.
        """
        try:
            async with asyncio.timeout(self.deadline - time.monotonic()):
                return _raised(await self._events.get())
        except TimeoutError:
            raise Busy(
                f"The request waited {self.deadline - self.begin:g} seconds and was given up.",
                self.engine.seconds_to_wait,
            ) from None

    async def events(self) -> AsyncIterator[Piece | Ended]:
        """Yield what follows on `Begun`."""
        while (event := await self._events.get()) is not None:
            yield _raised(event)

    def close(self) -> None:
        """Give up the place of this request; the model ends its answer before the next token."""
        if not self.is_closed:
            self.is_closed = True
            self.engine.num_open -= 1


def _raised(event: Any) -> Any:
    if isinstance(event, BaseException):
        raise event
    return event


@dataclass
class _Prepared:
    """What `generate` takes for a request, and what else its answers need."""

    inputs: Any
    options: GenerationConfig
    limit: int
    grammar: str | None
    begins_with_reasoning: bool
    fields: "_Fields | None" = None


@dataclass
class _Fields:
    """What is asked field by field: the images, the fields, and the options of the images."""

    images: list[Any]
    wanted: Fields
    image_options: dict[str, Any]


class Engine:
    """Answers requests with one model, in the order in which they came.

    Args:
        model, processor: of one checkpoint.
        limits: of the images, files and videos of a request.
        max_queue: requests that may wait while one is answered.
        max_seconds: that a request may take, its time in the queue included.
    """

    def __init__(
        self, model: Any, processor: Any, limits: MediaLimits, max_queue: int = 64, max_seconds: float = 600.0
    ):
        check_tokenizer(processor.tokenizer)
        self.model, self.processor, self.limits = model, processor, limits
        self.max_queue, self.max_seconds = max_queue, max_seconds
        self.num_open = 0  # only the event loop changes it
        self._mean_seconds = 1.0  # of one request
        self._is_stopping = False
        self._with_marks = uses_marks(processor.chat_template)
        ends = model.generation_config.eos_token_id
        self._ends = sorted({processor.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None})
        self._arrived: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._prepared: queue.Queue[tuple[Job, _Prepared] | None] = queue.Queue(maxsize=1)
        self._threads = [
            threading.Thread(target=work, name=name, daemon=True)
            for work, name in ((self._prepare_all, "prepare"), (self._generate_all, "generate"))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def seconds_to_wait(self) -> int:
        """How long a new request would wait, judged by the last ones, at least 1."""
        return max(1, math.ceil(self._mean_seconds * self.num_open))

    def check_room(self) -> None:
        """Raise Busy if the queue is full."""
        if self.num_open > self.max_queue:
            raise Busy(
                f"{self.num_open - 1} requests wait, and this server lets {self.max_queue} wait. Try again later.",
                self.seconds_to_wait,
            )

    def submit(self, request: ChatRequest) -> Job:
        """Put a request into the queue; whoever calls this closes the job.

        Raises:
            Busy: if the queue is full.
        """
        self.check_room()
        job = Job(self, request, self.max_seconds)
        self.num_open += 1
        self._arrived.put(job)
        return job

    def stop(self) -> None:
        """End both threads, and the answer that is being written."""
        self._is_stopping = True
        self._arrived.put(None)
        for thread in self._threads:
            thread.join(STOP_SECONDS)

    def _is_over(self, job: Job) -> bool:
        return job.is_closed or self._is_stopping or time.monotonic() > job.deadline

    # --- the first thread ---

    def _prepare_all(self) -> None:
        while (job := self._arrived.get()) is not None:
            if not self._is_over(job):
                try:
                    self._prepared.put((job, self._prepare(job.request)))
                except Exception as error:  # of one request, whatever it is; the next may do
                    if not isinstance(error, MISTAKES):
                        logger.exception("A request could not be prepared.")
                    job.post(error)
        self._prepared.put(None)

    def _prepare(self, request: ChatRequest) -> _Prepared:
        """Read the media of a request and write its prompt.

        Raises:
            ValueError, TypeError, ImportError: if the request cannot be answered; the message says why.
        """
        messages = read_media(request.messages, self.limits)
        inputs = self.processor.apply_chat_template(
            messages,
            tools=request.tools or None,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **request.template_options,
        )
        vocab_size = self.model.config.text_config.vocab_size
        absent = [token for token in request.logit_bias if token >= vocab_size]
        if absent:
            raise ValueError(
                f"logit_bias names the token {absent[0]}; this model has the tokens 0 to {vocab_size - 1}."
            )
        prompt_end = self.processor.tokenizer.decode(inputs["input_ids"][0, -PROMPT_END:])
        grammar = None
        if request.schema is not None:
            grammar = answer_grammar(request.schema)
        elif request.forced_tools:
            grammar = call_grammar(request.forced_tools, self._with_marks)
        limit = self._answer_limit(inputs, request.max_tokens)
        options, reasons = self._options(request, limit), opens_reasoning(prompt_end)
        return _Prepared(inputs, options, limit, grammar, reasons, self._fields_of(request, messages))

    def _fields_of(self, request: ChatRequest, messages: list[dict[str, Any]]) -> _Fields | None:
        """Return what is asked field by field, as `extract` does for a model that was trained on short questions.

        Raises:
            ValueError: if the request also wants what such answers do not have.
        """
        schema = request.schema
        if len(request.forced_tools) == 1:
            schema = request.forced_tools[0]["function"].get("parameters")
        contents = [message.get("content") for message in messages]
        parts = [part for content in contents if isinstance(content, list) for part in content]
        images = [part["image"] for part in parts if part["type"] == "image"]
        if not (images and schema and resolved(schema, schema).get("properties")):
            return None
        if getattr(self.model.generation_config, "absent_answer", None) is None:
            return None
        if request.top_logprobs is not None:
            raise ValueError("This model is asked for each field by itself, so there are no logprobs of one answer.")
        names = [name for name in ("max_num_tiles", "use_thumbnail", "upscale") if name in request.template_options]
        return _Fields(images, Fields.of(schema), {name: request.template_options[name] for name in names})

    def _answer_limit(self, inputs: Any, wanted: int | None) -> int:
        """Return how many tokens an answer may have: at most what the prompt leaves of the context.

        Raises:
            ValueError: if the prompt leaves nothing.
        """
        num_tokens, window = inputs["input_ids"].shape[1], self.model.config.max_sequence_length
        num_tokens -= self.model.count_pruned_tokens(inputs.get("num_video_frames", ()))
        if num_tokens >= window:
            raise ValueError(
                f"The prompt has {num_tokens} tokens; the context of {window} tokens holds prompt and answer. Send "
                "fewer or smaller images, a shorter text, or drop old turns; chat_template_kwargs={'max_num_tiles': 4} "
                "makes images cheaper, and {'num_frames': 8} videos."
            )
        wanted = wanted or self.model.generation_config.max_new_tokens or DEFAULT_MAX_NEW_TOKENS
        return min(wanted, window - num_tokens)

    def _options(self, request: ChatRequest, limit: int) -> GenerationConfig:
        options = copy.deepcopy(self.model.generation_config)
        options.max_new_tokens, options.eos_token_id = limit, self._ends
        if options.pad_token_id is None:
            options.pad_token_id = self._ends[0]
        if request.logit_bias:
            options.sequence_bias = {(token,): bias for token, bias in request.logit_bias.items()}
        if request.temperature is not None and request.temperature < LEAST_TEMPERATURE:
            options.do_sample = False
        elif request.temperature is not None or request.top_p is not None:
            options.do_sample = True
            options.temperature = float(request.temperature or 1.0)
            options.top_p = float(1.0 if request.top_p is None else request.top_p)
            options.top_k = 0 if options.top_k in LIBRARY_TOP_K else options.top_k
        if not options.do_sample:
            options.temperature = options.top_p = options.top_k = None
        return options

    # --- the second thread ---

    def _generate_all(self) -> None:
        try:
            self.model.compile_in_this_thread()
        except RuntimeError as error:  # whoever made this engine has generated with the model before
            logger.warning("Answers go without the compiled step. %s", error)
        while (held := self._prepared.get()) is not None:
            job, prepared = held
            begin = time.monotonic()
            if not self._is_over(job):
                try:
                    job.post(Begun(prepared.inputs["input_ids"].shape[1], begin - job.begin))
                    self._answer(job, prepared)
                    job.post(None)
                except Exception as error:  # of this answer: a prepared request is not the client's mistake
                    logger.exception("An answer failed.")
                    job.post(RuntimeError(f"{type(error).__name__}: {error}"))
                self._mean_seconds += 0.2 * (time.monotonic() - begin - self._mean_seconds)
            del held, job, prepared  # tiles are not kept until the next request comes

    def _answer_fields(self, job: Job, choice: int, prepared: _Prepared) -> None:
        """Answer with an object whose fields were asked for one by one."""
        asked, is_over = prepared.fields, _IsOver(self, job)
        try:
            extraction = extract(
                self.model,
                self.processor,
                asked.images,
                asked.wanted,
                max_new_tokens=prepared.limit,
                question_per_field=True,
                generation_config={"stopping_criteria": [is_over]},
                **asked.image_options,
            )
        except ExtractionError as error:
            if error.status == "invalid" and not self._is_over(job):
                raise
            job.post(Ended(choice, "length", is_over.num_tokens))
            return
        text = json.dumps(extraction.json, ensure_ascii=False)
        forced = job.request.forced_tools
        part = Part("call", Call(forced[0]["function"]["name"], text)) if forced else Part("text", text)
        job.post(Piece(choice, [part]))
        job.post(Ended(choice, "stop", is_over.num_tokens))

    def _answer(self, job: Job, prepared: _Prepared) -> None:
        request = job.request
        inputs = prepared.inputs.to(self.model.device)
        seed = secrets.randbits(63) if request.seed is None else request.seed
        names = [tool["function"]["name"] for tool in request.tools]
        for choice in range(request.num_choices):
            torch.manual_seed((seed + choice) % 2**64)
            if prepared.fields is not None:
                self._answer_fields(job, choice, prepared)
                continue
            probabilities = None if request.top_logprobs is None else LogProbabilities()
            parts = AnswerParts(names, self._with_marks, prepared.begins_with_reasoning)
            writer = Writer(
                self.processor.tokenizer, choice, self._ends, prepared.limit, request.stops, parts, probabilities,
                request.top_logprobs or 0,
            )  # fmt: skip
            processors: list[LogitsProcessor] = []
            if request.frequency_penalty or request.presence_penalty:
                processors.append(Penalties(request.frequency_penalty, request.presence_penalty, writer.counts))
            if prepared.grammar is not None:
                tokenizer = grammar_tokenizer(self.processor.tokenizer, self.model.config.text_config.vocab_size)
                processors.append(_AfterReasoning(Grammar(tokenizer, [prepared.grammar]), parts, self._ends))
            if probabilities is not None:
                processors.append(probabilities)
            self.model.generate(
                **inputs,
                generation_config=prepared.options,
                logits_processor=processors,
                stopping_criteria=[_Watch(self, job, writer)],
            )
            if writer.finish_reason is None:  # its time is over, or nobody waits
                job.post(writer.finish("length"))
            job.post(Ended(choice, writer.finish_reason, writer.num_tokens))
            if self._is_over(job):
                break


class _AfterReasoning(LogitsProcessor):
    """Holds an answer to a grammar from the end of its reasoning on, before which it cannot end."""

    def __init__(self, grammar: Grammar, parts: AnswerParts, ends: Sequence[int]):
        self.grammar, self.parts, self.ends = grammar, parts, ends

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not self.parts.is_reasoning:
            return self.grammar(input_ids, scores)
        return scores.index_fill(1, torch.tensor(self.ends, device=scores.device), -torch.inf)


class _IsOver(StoppingCriteria):
    """Counts tokens, and ends an answer whose client or time says so."""

    def __init__(self, engine: Engine, job: Job):
        self.engine, self.job, self.num_tokens = engine, job, 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.num_tokens += 1
        return torch.full((len(input_ids),), self.engine._is_over(self.job), device=input_ids.device)


class _Watch(StoppingCriteria):
    """Hands each new token on, and ends the answer where its text, its client or its time says so."""

    def __init__(self, engine: Engine, job: Job, writer: Writer):
        self.engine, self.job, self.writer = engine, job, writer

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        piece = self.writer.add(int(input_ids[0, -1]))
        if piece.parts or piece.logprobs:
            self.job.post(piece)
        is_over = self.writer.finish_reason is not None or self.engine._is_over(self.job)
        return torch.full((len(input_ids),), is_over, device=input_ids.device, dtype=torch.bool)
