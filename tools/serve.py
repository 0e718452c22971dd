"""Serve a checkpoint to OpenAI clients: the stock `transformers serve`, extended to load this model.

    pip install fastapi uvicorn openai  # the extra `serve`
    python -m tools.serve  # nano, on http://localhost:8000/v1
    python -m tools.serve path/to/8b --device cuda --port 8080

`POST /v1/chat/completions` takes text and `image_url` parts with a `data:` URL, and streams; `GET /v1/models` names
the model, `GET /health` says that the server runs. Requests that cannot be honoured are refused with HTTP 400: other
content parts, options that would be ignored, prompts beyond the context. The server fetches nothing and reads no file
for a client. It has no authentication: let it listen on localhost, or behind a proxy that authenticates.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import transformers
from transformers import GenerationConfig

from . import ROOT
from .chat import load
from .threads import choose_threads

try:
    import openai  # noqa: F401  (the stock server builds its answers with it)
    import uvicorn
    from fastapi import FastAPI, HTTPException, Request
    from fastapi.responses import JSONResponse
    from transformers.cli.serving.chat_completion import UNUSED_CHAT_COMPLETION_FIELDS, ChatCompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.utils import GenerateManager, GenerationState, Modality
except ImportError as error:
    raise SystemExit(
        f"Serving needs transformers 5.23 or later (this is {transformers.__version__}) and three packages: "
        f"pip install fastapi uvicorn openai. {error}"
    ) from error

ROUTES = ("/v1/chat/completions", "/v1/models", "/health")  # the stock server also loads any model for any client
ROLES = ("system", "user", "assistant", "tool")
# Keys that chat_template_kwargs may have. The processor of the 8B itself refuses enable_thinking.
REQUEST_OPTIONS = ("max_num_tiles", "use_thumbnail", "upscale", "enable_thinking")
ANY = object()
# OpenAI fields that the stock server ignores, each with the value that has no effect.
NEUTRAL_VALUES: dict[str, Any] = {
    "functions": [],
    "logprobs": False,
    "metadata": ANY,
    "modalities": ["text"],
    "n": 1,
    "parallel_tool_calls": ANY,
    "presence_penalty": 0,
    "response_format": {"type": "text"},
    "service_tier": ANY,
    "store": ANY,
    "stream_options": ANY,  # the last chunk of a stream always holds the usage
    "tool_choice": "auto",
    "top_logprobs": 0,
    "user": ANY,
}
RANGES = {
    "temperature": (0, 2),
    "top_p": (0, 1),
    "frequency_penalty": (0, 2),
    "max_tokens": (1, sys.maxsize),
    "max_completion_tokens": (1, sys.maxsize),
}


class OneModel(ModelManager):
    """Holds the model and the processor of one checkpoint directory, under the name of the directory."""

    def __init__(self, directory: Path, **options: Any):
        self._loaded = load(directory, **options)
        choose_threads(self._loaded[0])
        super().__init__(force_model=directory.resolve().name)

    @staticmethod
    def process_model_name(model_id: str) -> str:
        return model_id  # a directory has no revisions

    def _load_processor(self, *_: Any, **__: Any) -> Any:
        return self._loaded[1]

    def _load_model(self, *_: Any, **__: Any) -> Any:
        return self._loaded[0]

    @staticmethod
    def get_model_modality(*_: Any, **__: Any) -> Modality:
        return Modality.VLM

    def get_gen_models(self, *_: Any) -> list[dict[str, Any]]:
        return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": "local"}]


class StrictChat(ChatCompletionHandler):
    """Chat completions that refuse what the stock handler would silently drop."""

    def _validate_request(self, body: dict[str, Any]) -> None:
        check_options(body)
        check_messages(body.get("messages"))
        super()._validate_request(body)

    @staticmethod
    def get_processor_inputs_from_messages(messages: list[dict[str, Any]], modality: Modality) -> list[dict[str, Any]]:
        return messages  # our processor reads OpenAI's form; the stock conversion drops parts that it does not know

    def _build_generation_config(self, body: dict[str, Any], *args: Any, **kwargs: Any) -> GenerationConfig:
        options = super()._build_generation_config(body, *args, **kwargs)
        wants_sampling = body.get("temperature") or body.get("top_p") is not None
        if wants_sampling and body.get("temperature") != 0:
            options.do_sample = True  # the default is greedy decoding, which silently ignores both options
        return options


class BoundedGeneration(GenerateManager):
    """Checks the context window before an answer begins: a stream that has begun cannot become an HTTP 400."""

    def generate_streaming(self, model: Any, processor: Any, inputs: Any, gen_config: Any, *args: Any, **kwargs: Any):
        _fit_context(model, inputs, gen_config)
        return super().generate_streaming(model, processor.tokenizer, inputs, gen_config, *args, **kwargs)

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *args: Any, **kwargs: Any
    ):
        _fit_context(model, inputs, gen_config)
        # `stop` needs the tokenizer; the stock server would pass the processor.
        return await super().generate_non_streaming(model, processor.tokenizer, inputs, gen_config, *args, **kwargs)


class BoundedState(GenerationState):
    def get_manager(self, model_id: str, use_cb: bool = False) -> GenerateManager:
        return self._generate_managers.setdefault(model_id, BoundedGeneration())


def _fit_context(model: Any, inputs: Any, options: GenerationConfig) -> None:
    """Limit the answer to what the prompt leaves of the context; `finish_reason` is "length" when the answer fills it.

    Raises:
        ValueError: if the prompt leaves nothing.
    """
    num_tokens, window = inputs["input_ids"].shape[1], model.config.max_sequence_length
    if num_tokens >= window:
        raise ValueError(
            f"The prompt has {num_tokens} tokens; the context of {window} tokens holds prompt and answer. Send fewer "
            "or smaller images, a shorter text, or drop old turns; chat_template_kwargs={'max_num_tiles': 4} makes "
            "images cheaper."
        )
    options.max_new_tokens = min(options.max_new_tokens, window - num_tokens)


def check_options(body: dict[str, Any]) -> None:
    """Refuse options of a request that would be ignored, and impossible values.

    Raises:
        ValueError: with the name of the option, what came and what is possible.
    """
    for name in sorted(UNUSED_CHAT_COMPLETION_FIELDS & body.keys()):
        neutral = NEUTRAL_VALUES.get(name)
        if body[name] is not None and neutral is not ANY and body[name] != neutral:
            raise ValueError(f"{name}={body[name]!r:.80} is not supported by this server; leave {name} out.")
    for name, (lowest, highest) in RANGES.items():
        value = body.get(name)
        kind, types = ("whole number", int) if name.endswith("tokens") else ("number", (int, float))
        is_number = isinstance(value, types) and not isinstance(value, bool)
        if value is not None and not (is_number and lowest <= value <= highest):
            raise ValueError(f"{name} must be a {kind} from {lowest} to {highest}, got {value!r:.80}.")
    options = body.get("chat_template_kwargs", {})
    if not isinstance(options, dict) or not options.keys() <= set(REQUEST_OPTIONS):
        raise ValueError(f"chat_template_kwargs may hold {', '.join(REQUEST_OPTIONS)}, got {options!r:.80}.")


def check_messages(messages: Any) -> None:
    """Refuse messages with other parts than text and images in `data:` URLs; the processor checks the rest.

    Raises:
        ValueError: with what came and what is possible.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages must be a list with at least one message, got {messages!r:.80}.")
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ValueError(f"A message is an object with a role of {', '.join(ROLES)}; got {message!r:.80}.")
        if isinstance(message.get("content"), list):
            for part in message["content"]:
                _check_part(part)


def _check_part(part: Any) -> None:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        return
    if kind != "image_url":
        raise ValueError(
            f"A message has a content part of type {kind!r}; this server takes 'text' and 'image_url'. Send a PDF "
            "page or a video frame as an image_url."
        )
    image = part.get("image_url")
    image = image if isinstance(image, dict) else {"url": image}
    if not isinstance(image.get("url"), str) or not image["url"].startswith("data:"):
        raise ValueError(
            f"image_url must be a data: URL like 'data:image/png;base64,...', got {image.get('url')!r:.80}. This "
            "server fetches nothing and opens no files: read the image and send it along."
        )
    if image.get("detail") not in (None, "auto", "high"):
        raise ValueError(
            f"detail={image['detail']!r:.80} of one image is not supported; chat_template_kwargs="
            "{'max_num_tiles': 1} makes all images of a request small."
        )


def make_app(directory: Path, **options: Any) -> FastAPI:
    """Load a checkpoint directory and return the stock application around it, without the routes for other models.

    Args:
        directory: a directory with our code, or a subfolder of one, like `nano/`.
        options: arguments of `AutoModel.from_pretrained`: `device_map`, `dtype`, `attn_implementation`, ...
    """
    models = OneModel(directory, **options)
    state = BoundedState()
    app = build_server(models, StrictChat(models, state), None, None, None, None, generation_state=state)
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in ROUTES]
    for kind in (ValueError, TypeError, HTTPException):
        app.add_exception_handler(kind, _refusal)
    return app


async def _refusal(request: Request, error: Exception) -> JSONResponse:
    """Return the error in the form that OpenAI's clients turn into an exception."""
    status, message = getattr(error, "status_code", 400), getattr(error, "detail", str(error))
    return JSONResponse(
        {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}, status
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, nargs="?", default=ROOT / "nano")
    parser.add_argument("--host", default="localhost")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", help="bfloat16, float32, ...; the default is the checkpoint's own")
    parser.add_argument("--attention", help="eager, sdpa, flash_attention_2, ...")
    arguments = parser.parse_args(argv)
    app = make_app(
        arguments.directory,
        device_map=arguments.device,
        dtype=arguments.dtype,
        attn_implementation=arguments.attention,
    )
    uvicorn.run(app, host=arguments.host, port=arguments.port)
    return 0


if __name__ == "__main__":
    sys.exit(main())
