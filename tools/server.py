"""The application behind `tools.serve`: the stock one of `transformers serve`, for this model, which drops nothing
in silence."""

import sys
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from transformers import GenerationConfig
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerateManager, GenerationState, Modality

from .chat import load
from .threads import choose_threads

ROUTES = ("/v1/chat/completions", "/v1/models", "/health")  # the stock server also loads any model for any client
ROLES = ("system", "user", "assistant", "tool")
# Keys that chat_template_kwargs may have. The processor of the 8B itself refuses enable_thinking.
REQUEST_OPTIONS = ("max_num_tiles", "use_thumbnail", "upscale", "enable_thinking", "num_frames", "fps", "video_layout")
# Fields that change the answer.
HONOURED = frozenset(
    (
        "chat_template_kwargs", "frequency_penalty", "logit_bias", "max_completion_tokens", "max_tokens", "messages",
        "model", "seed", "stop", "stream", "temperature", "tools", "top_p",
    )
)  # fmt: skip
# Fields about accounts, storage and caches of a service, which clients send to any server; docs/serving.md lists them.
IGNORED = frozenset(
    (
        "metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
        "safety_identifier", "service_tier", "store", "user",
        "stream_options",  # the last chunk of a stream always holds the usage
    )
)  # fmt: skip
# The values of other OpenAI fields that ask for nothing.
NEUTRAL_VALUES: dict[str, Any] = {
    "functions": [],
    "logprobs": False,
    "modalities": ["text"],
    "n": 1,
    "presence_penalty": 0,
    "response_format": {"type": "text"},
    "tool_choice": "auto",
    "top_logprobs": 0,
    "verbosity": "medium",
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

    @staticmethod
    def get_processor_inputs_from_messages(messages: list[dict[str, Any]], modality: Modality) -> list[dict[str, Any]]:
        return messages  # our processor reads OpenAI's form; the stock conversion drops parts that it does not know

    def _build_generation_config(self, body: dict[str, Any], *args: Any, **kwargs: Any) -> GenerationConfig:
        body = {name: value for name, value in body.items() if value not in ({}, [])}  # `stop: []` asks for nothing
        if body.get("logit_bias") is not None:  # transformers takes floats alone
            body["logit_bias"] = {token: float(bias) for token, bias in body["logit_bias"].items()}
        options = super()._build_generation_config(body, *args, **kwargs)
        wants_sampling = body.get("temperature") or body.get("top_p") is not None
        if wants_sampling and body.get("temperature") != 0:
            options.do_sample = True  # the default is greedy decoding, which silently ignores both options
        return options


class BoundedGeneration(GenerateManager):
    """Checks a request against the model before an answer begins: a stream that has begun cannot become an HTTP 400."""

    def generate_streaming(self, model: Any, processor: Any, inputs: Any, gen_config: Any, *args: Any, **kwargs: Any):
        _fit_model(model, inputs, gen_config)
        return super().generate_streaming(model, processor.tokenizer, inputs, gen_config, *args, **kwargs)

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *args: Any, **kwargs: Any
    ):
        _fit_model(model, inputs, gen_config)
        # `stop` needs the tokenizer; the stock server would pass the processor.
        return await super().generate_non_streaming(model, processor.tokenizer, inputs, gen_config, *args, **kwargs)


class BoundedState(GenerationState):
    def get_manager(self, model_id: str, use_cb: bool = False) -> GenerateManager:
        return self._generate_managers.setdefault(model_id, BoundedGeneration())


def _fit_model(model: Any, inputs: Any, options: GenerationConfig) -> None:
    """Limit the answer to what the prompt leaves of the context; `finish_reason` is "length" when the answer fills it.

    Raises:
        ValueError: if the prompt leaves nothing, or `logit_bias` names a token that the model does not have.
    """
    vocab_size = model.config.text_config.vocab_size
    absent = [token for (token,) in options.sequence_bias or () if token >= vocab_size]
    if absent:
        raise ValueError(f"logit_bias names the token {absent[0]}; this model has the tokens 0 to {vocab_size - 1}.")
    num_tokens, window = inputs["input_ids"].shape[1], model.config.max_sequence_length
    num_tokens -= model.count_pruned_tokens(inputs.get("num_video_frames", ()))
    if num_tokens >= window:
        raise ValueError(
            f"The prompt has {num_tokens} tokens; the context of {window} tokens holds prompt and answer. Send fewer "
            "or smaller images, a shorter text, or drop old turns; chat_template_kwargs={'max_num_tiles': 4} makes "
            "images cheaper, and {'num_frames': 8} videos."
        )
    options.max_new_tokens = min(options.max_new_tokens, window - num_tokens)


def check_options(body: dict[str, Any]) -> None:
    """Refuse fields of a request that would be ignored, and impossible values.

    Raises:
        ValueError: with the name of the field, what came and what is possible.
    """
    for name in sorted(body.keys() - HONOURED - IGNORED):
        if body[name] is not None and (name not in NEUTRAL_VALUES or body[name] != NEUTRAL_VALUES[name]):
            raise ValueError(f"{name}={shown(body[name])} is not supported by this server; leave {name} out.")
    for name, (lowest, highest) in RANGES.items():
        value = body.get(name)
        kind, types = ("whole number", int) if name.endswith("tokens") else ("number", (int, float))
        is_number = isinstance(value, types) and not isinstance(value, bool)
        if value is not None and not (is_number and lowest <= value <= highest):
            raise ValueError(f"{name} must be a {kind} from {lowest} to {highest}, got {shown(value)}.")
    stop = body.get("stop")
    texts = stop if isinstance(stop, list) else [] if stop is None else [stop]
    if not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"stop must be a text or a list of texts, none of them empty, got {shown(stop)}.")
    biases = body.get("logit_bias") or {}
    if not (isinstance(biases, dict) and all(map(_is_bias, biases.keys(), biases.values()))):
        raise ValueError(f"logit_bias must map token ids to numbers from -100 to 100, got {shown(biases)}.")
    options = body.get("chat_template_kwargs", {})
    if not isinstance(options, dict) or not options.keys() <= set(REQUEST_OPTIONS):
        raise ValueError(f"chat_template_kwargs may hold {', '.join(REQUEST_OPTIONS)}, got {shown(options)}.")


def _is_bias(token: str, bias: Any) -> bool:
    is_number = isinstance(bias, (int, float)) and not isinstance(bias, bool)
    return token.isdecimal() and is_number and -100 <= bias <= 100


def shown(value: Any) -> str:
    """Return a value of a request as an error quotes it: whole, or in words where it is too long to quote."""
    text = repr(value)
    if len(text) <= 80:
        return text
    if isinstance(value, dict):
        return f"an object with {len(value)} keys ({', '.join(map(str, list(value)[:4]))[:80]}{', ...' * (len(value) > 4)})"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return f"{text[:77]}..."


def check_messages(messages: Any) -> None:
    """Refuse messages with other parts than text, images and videos in `data:` URLs; the processor checks the rest.

    Raises:
        ValueError: with what came and what is possible.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages must be a list with at least one message, got {shown(messages)}.")
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ValueError(f"A message is an object with a role of {', '.join(ROLES)}; got {shown(message)}.")
        if isinstance(message.get("content"), list):
            for part in message["content"]:
                _check_part(part)


def _check_part(part: Any) -> None:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        return
    if kind not in ("image_url", "video_url"):
        raise ValueError(
            f"A message has a content part of type {kind!r}; this server takes 'text', 'image_url' and 'video_url'. "
            "Send a PDF page as an image_url."
        )
    image = part.get(kind)
    image = image if isinstance(image, dict) else {"url": image}
    if not isinstance(image.get("url"), str) or not image["url"].startswith("data:"):
        example = "image/png" if kind == "image_url" else "video/mp4"
        raise ValueError(
            f"{kind} must be a data: URL like 'data:{example};base64,...', got {shown(image.get('url'))}. This server "
            f"fetches nothing and opens no files: read the {kind.removesuffix('_url')} and send it along."
        )
    if image.get("detail") not in (None, "auto", "high"):
        raise ValueError(
            f"detail={shown(image['detail'])} of one image is not supported; chat_template_kwargs="
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
