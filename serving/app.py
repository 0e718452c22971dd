"""The HTTP side of the server: routes, keys, limits on what a client may send, and errors in OpenAI's form."""

import asyncio
import contextlib
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron_vl.tools.chat import load
from nemotron_vl.tools.threads import choose_threads
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from .completions import Completion
from .engine import MISTAKES, Busy, Engine, Job
from .media import MediaLimits, shown
from .requests import ChatRequest
from .responses import ModelResponse, chat_request

GONE = 499  # what servers log for a client that has gone; nobody gets it


@dataclass(frozen=True)
class ServerLimits:
    """What a client may send.

    Args:
        max_body_bytes: of a request.
        body_seconds: in which the body of a request has to arrive.
        max_incoming_bytes: of all bodies that are arriving.
    """

    max_body_bytes: int = 64 * 2**20
    body_seconds: float = 60.0
    max_incoming_bytes: int = 2**30


def error_of(message: str, status: int, code: str | None = None, headers: Mapping[str, str] | None = None) -> Response:
    """Return an error in the form that OpenAI's clients turn into an exception."""
    kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
    error = {"message": message, "type": kind, "param": None, "code": code}
    return JSONResponse({"error": error}, status, headers=headers)


class _JobStream(StreamingResponse):
    """A stream of events whose job is closed when it ends, in whatever way."""

    def __init__(self, job: Job, events: AsyncIterator[str], headers: Mapping[str, str]):
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-store", **headers})
        self.job = job

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.job.close()


class Server:
    """Answers the requests of clients.

    Args:
        engine: answers them.
        model: its name.
        api_keys: of which every request needs one; none if anyone may ask.
        limits: of requests.

    Raises:
        ValueError: if a key is empty.
    """

    def __init__(
        self, engine: Engine, model: str, api_keys: Sequence[str] = (), limits: ServerLimits = ServerLimits()
    ):
        if not all(api_keys):
            raise ValueError("An API key is empty, which would let everyone in. Give one, or none at all.")
        self.engine, self.model, self.limits = engine, model, limits
        self._keys = [key.encode() for key in api_keys]
        self._num_incoming = 0  # bytes

    def app(self) -> Starlette:
        @contextlib.asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            try:
                yield
            finally:
                self.engine.stop()

        return Starlette(
            routes=[
                Route("/health", self.health),
                Route("/v1/models", self.models),
                Route("/v1/models/{name:path}", self.models),
                Route("/v1/chat/completions", self.chat_completions, methods=["POST"]),
                Route("/v1/responses", self.responses, methods=["POST"]),
            ],
            exception_handlers={HTTPException: self._on_http_error, Exception: self._on_failure},
            lifespan=lifespan,
        )

    async def health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok", "waiting": max(0, self.engine.num_open - 1)})

    async def models(self, request: Request) -> Response:
        if refusal := self._refused_key(request):
            return refusal
        model = {"id": self.model, "object": "model", "created": 0, "owned_by": "local"}
        name = request.path_params.get("name")
        if name is None:
            return JSONResponse({"object": "list", "data": [model]})
        return JSONResponse(model) if name == self.model else self._unknown_model(name)

    async def chat_completions(self, request: Request) -> Response:
        return await self._answer(request, ChatRequest.of, Completion)

    async def responses(self, request: Request) -> Response:
        return await self._answer(request, chat_request, ModelResponse)

    async def _answer(
        self, request: Request, read: Callable[[dict[str, Any]], ChatRequest], form: Callable[..., Any]
    ) -> Response:
        """Answer a request: whole, or as a stream that begins when the model has begun."""
        if refusal := self._refused_key(request):
            return refusal
        try:
            self.engine.check_room()
            body = await self._body(request)
            if isinstance(body, Response):
                return body
            if body.get("model") not in (None, self.model):
                return self._unknown_model(body["model"])
            job = self.engine.submit(read(body))
        except Busy as busy:
            return error_of(str(busy), 429, "queue_full", {"retry-after": str(busy.retry_after)})
        except MISTAKES as error:
            return error_of(str(error), 400)
        except ClientDisconnect:
            return Response(status_code=GONE)
        try:
            response = await _unless_gone(request, self._begun(job, form))
        except BaseException:
            job.close()
            raise
        if not isinstance(response, _JobStream):
            job.close()
        return response

    async def _begun(self, job: Job, form: Callable[..., Any]) -> Response:
        try:
            begun = await job.begun()
            completion = form(job, begun, self.model)
            headers = {"x-queue-seconds": f"{begun.seconds_in_queue:.3f}"}
            if job.request.is_streamed:
                return _JobStream(job, self._events(completion), headers)
            return JSONResponse(await completion.whole(), headers=headers)
        except Busy as busy:
            return error_of(str(busy), 503, "timeout", {"retry-after": str(busy.retry_after)})
        except MISTAKES as error:
            return error_of(str(error), 400)
        except Exception as error:
            return error_of(f"The server failed: {type(error).__name__}: {error}", 500)

    async def _events(self, completion: Any) -> AsyncIterator[str]:
        try:
            async for event in completion.chunks():
                name = f"event: {event['type']}\n" if "type" in event else ""
                yield f"{name}data: {json.dumps(event, ensure_ascii=False)}\n\n"
            yield completion.end_mark
        except Exception as error:  # the status is sent; clients raise for an event with an error
            failure = {"message": str(error), "type": "server_error", "param": None, "code": None}
            yield f"data: {json.dumps({'error': failure})}\n\n"

    async def _body(self, request: Request) -> dict[str, Any] | Response:
        """Return the body of a request, or the refusal of it."""
        limit = self.limits.max_body_bytes
        too_large = f"The body has more than {limit:,} bytes, which this server takes. Send fewer or smaller files."
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length) > limit:
            return error_of(too_large, 413)
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                async for chunk in request.stream():
                    body += chunk
                    self._num_incoming += len(chunk)
                    if len(body) > limit:
                        return error_of(too_large, 413)
                    if self._num_incoming > self.limits.max_incoming_bytes:
                        raise Busy(
                            "Too many large requests arrive at once. Try again later.", self.engine.seconds_to_wait
                        )
        except TimeoutError:
            return error_of(
                f"The body did not arrive within {self.limits.body_seconds:g} seconds.",
                408,
                headers={"connection": "close"},
            )
        finally:
            self._num_incoming -= len(body)
        try:
            read = json.loads(body)
        except (ValueError, RecursionError) as error:
            return error_of(f"The body is no JSON: {error}.", 400)
        if not isinstance(read, dict):
            return error_of(f"The body must be a JSON object, got {shown(read)}.", 400)
        return read

    def _refused_key(self, request: Request) -> Response | None:
        """Return the refusal of a request without a valid key. Every key is compared, each in constant time."""
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        given = key.strip().encode("latin-1") if kind.lower() == "bearer" else b""
        fits = [hmac.compare_digest(given, known) for known in self._keys]
        if not self._keys or any(fits):
            return None
        return error_of(
            "This server needs an API key: Authorization: Bearer KEY.", 401, "invalid_api_key",
            {"www-authenticate": "Bearer"},
        )  # fmt: skip

    def _unknown_model(self, name: Any) -> Response:
        return error_of(f"This server has the model {self.model!r}, not {shown(name)}.", 404, "model_not_found")

    async def _on_http_error(self, _: Request, error: Exception) -> Response:
        status = getattr(error, "status_code", 500)
        return error_of(str(getattr(error, "detail", error)), status, headers=getattr(error, "headers", None))

    async def _on_failure(self, _: Request, error: Exception) -> Response:
        return error_of(f"The server failed: {type(error).__name__}: {error}", 500)


async def _unless_gone(request: Request, answer: Awaitable[Response]) -> Response:
    """Wait for a response, or for the client to go away."""
    answering = asyncio.ensure_future(answer)
    leaving = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
        return answering.result() if answering.done() else Response(status_code=GONE)
    finally:
        answering.cancel()
        leaving.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def make_app(
    directory: Path,
    *,
    api_keys: Sequence[str],
    limits: ServerLimits,
    media: MediaLimits,
    max_queue: int,
    max_seconds: float,
    **options: Any,
) -> Starlette:
    """Load a checkpoint directory and return the application that serves it, under the name of the directory.

    Args:
        directory: a directory with our code, or a subfolder of one, like `nano/`.
        api_keys, limits: see `Server`.
        media, max_queue, max_seconds: see `Engine`.
        options: arguments of `AutoModel.from_pretrained`: `device_map`, `dtype`, `attn_implementation`, ...
    """
    model, processor = load(directory, **options)
    choose_threads(model)
    engine = Engine(model, processor, media, max_queue, max_seconds)
    return Server(engine, directory.resolve().name, api_keys, limits).app()
