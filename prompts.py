"""From text with placeholders to ids: protects user text, writes images into prompts, and splits message contents.

User text is data. Before a conversation is rendered, a marker character is put into every control token of its texts
(`<image>`, `<|eot_id|>`, ...). The rendered prompt is cut at the markers, and each piece is tokenised by itself, so no
text can forge a turn, an image or an end. `chat()` of the model and `apply_chat_template(tokenize=True)` of the
processor both work this way.
"""

import copy
import re
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from .pictures import document_of_part

try:
    from jinja2 import TemplateError
except ImportError:  # transformers says what to install when a template is rendered
    TemplateError = ValueError

# What a chat template may raise, besides ValueError and TypeError.
TEMPLATE_ERRORS = (TemplateError, ArithmeticError, LookupError, AttributeError, RecursionError)

IMAGE_TOKEN = "<image>"
IMAGE_START_TOKEN = "<img>"
IMAGE_END_TOKEN = "</img>"
THINK_START = "<think>"
THINK_END = "</think>"

# One image of a prompt: strings are text, integers are counts of the image token.
PromptPieces = list[str | int]

# Plane 15 is for private use, so texts do not need these characters. The marker is one that the input does not have.
PRIVATE_USE_CHARACTERS = range(0xF0000, 0xFFFFE)
MAX_NESTING = 100  # levels of lists and dicts in messages and tools


class PromptFormat(NamedTuple):
    """How a prompt is written where the 8B and the 12B differ.

    Attributes:
        images_first: all images of a message come before its text. Otherwise each image comes where its part comes,
            on a line of its own.
        numbered: several images in front of a text get numbers and share one line.
    """

    images_first: bool
    numbered: bool


V1_FORMAT = PromptFormat(images_first=False, numbered=False)
V2_FORMAT = PromptFormat(images_first=True, numbered=True)


class PromptIds(NamedTuple):
    """The ids of one prompt, and where they come from.

    Attributes:
        input_ids: all ids, the image tokens included.
        starts: for each id, the index of the character where it starts, in the prompt with its placeholders; None
            unless requested.
    """

    input_ids: list[int]
    starts: list[int] | None


def strings_in(data: Any, depth: int = 0) -> Iterator[str]:
    """Yield every string inside nested dicts, lists and tuples, dict keys included.

    Raises:
        ValueError: if something is nested more than 100 levels deep.
    """
    if depth > MAX_NESTING:
        raise ValueError(f"Messages and tools may be nested {MAX_NESTING} levels deep, these go deeper. Flatten them.")
    if isinstance(data, str):
        yield data
    elif isinstance(data, (dict, list, tuple)):
        for item in (*data, *data.values()) if isinstance(data, dict) else data:
            yield from strings_in(item, depth + 1)


class ControlTokenGuard:
    """Puts a marker into the control tokens of user text, so that tokenising the text cannot yield them.

    Args:
        tokenizer: its added tokens are the control tokens.
        data: everything that the user wrote, in nested dicts and lists. The marker is a character that is not in it.

    Raises:
        ValueError: if `data` is nested too deeply, or leaves no character for the marker.
    """

    def __init__(self, tokenizer: Any, data: Any):
        used = set().union(*map(set, strings_in(data)))
        self.marker = next((chr(code) for code in PRIVATE_USE_CHARACTERS if chr(code) not in used), "")
        if not self.marker:
            raise ValueError("The text uses all 65,534 private characters of Unicode's plane 15; one must be free.")
        tokens = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        # Match only the first character of a token, and look ahead for the token, because tokens may overlap. (?!)
        # matches nothing.
        self._pattern = re.compile(f"(?=({'|'.join(map(re.escape, tokens)) or '(?!)'}))(.)", re.DOTALL)

    def protect(self, data: Any, keep_image_token: bool = False) -> Any:
        """Return `data` with a marker after the first character of every control token in its strings.

        Args:
            data: a string, or nested dicts and lists of strings and numbers. Templates write the keys of dicts (the
                parameters of a tool) as they write values, so these are text as well.
            keep_image_token: leave `<image>` as it is, because it is a placeholder here.

        Raises:
            TypeError: for other objects, because the text that a template makes of them cannot be protected.
        """
        if isinstance(data, str):
            data = str.__str__(data)  # a subclass, such as markupsafe's, may change what is joined to it
            return self._pattern.sub(lambda match: self._split(*match.groups(), keep_image_token), data)
        if isinstance(data, dict):
            if not all(isinstance(key, str) for key in data):
                raise TypeError(f"The keys of messages and tools must be strings, got {list(data)!r:.80}.")
            return {self.protect(key): self.protect(value, keep_image_token) for key, value in data.items()}
        if isinstance(data, (list, tuple)):
            return [self.protect(item, keep_image_token) for item in data]
        if data is None or isinstance(data, (bool, int, float)):
            return data
        raise TypeError(
            f"Messages, tools and variables of the template hold strings, numbers, lists and dicts, got {data!r:.80} of "
            f"type {type(data).__name__}. Convert it, an object of a client library with its model_dump()."
        )

    def _split(self, token: str, start: str, keep_image_token: bool) -> str:
        return start if keep_image_token and token == IMAGE_TOKEN else start + self.marker


def image_run(num_tiles: int, tokens_per_tile: int, image_tag_type: str = "internvl") -> PromptPieces:
    """Return what stands in a prompt for one image.

    Args:
        num_tiles: tiles of the image, the thumbnail included.
        tokens_per_tile: visual tokens of a tile, 256 for 512 px.
        image_tag_type: "internvl" writes `<img>`, all tokens, `</img>`. "nvlm" writes a tag before every tile; the
            last tile is the thumbnail.

    Raises:
        ValueError: for an unknown `image_tag_type`.
    """
    if image_tag_type == "internvl":
        return [IMAGE_START_TOKEN, num_tiles * tokens_per_tile, IMAGE_END_TOKEN]
    if image_tag_type != "nvlm":
        raise ValueError(f"image_tag_type must be 'internvl' or 'nvlm', got {image_tag_type!r}.")
    run: PromptPieces = ["<Image>"]
    for tile in range(1, num_tiles):
        run += [f"<tile_{tile}>", tokens_per_tile]
    return [*run, "<tile_global_thumbnail>", tokens_per_tile, "</Image>"]


def render_run(run: PromptPieces) -> str:
    """Write an image run as prompt text."""
    return "".join(piece if isinstance(piece, str) else IMAGE_TOKEN * piece for piece in run)


def replacement_offsets(
    prompt: str, image_runs: Sequence[PromptPieces], marker: str | None = None
) -> list[dict[str, Any]]:
    """Return the places of the placeholders in a prompt, and those of the images in the expanded prompt.

    Args:
        prompt: rendered text; `<image>` stands for one whole image.
        image_runs: one run per placeholder, in order, from `image_run`.
        marker: the character of a `ControlTokenGuard`; it does not count.

    Returns:
        one dict per image, with the keys of transformers: `type` "image", `text` the placeholder, `span` its (start,
        end) in the prompt, `replacement` the image run as text, `new_span` its (start, end) in the expanded prompt.
    """
    offsets, growth = [], 0
    for match, run in zip(re.finditer(re.escape(IMAGE_TOKEN), prompt), image_runs, strict=True):
        start = match.start() - (prompt.count(marker, 0, match.start()) if marker else 0)
        replacement = render_run(run)
        offsets.append(
            {
                "type": "image",
                "text": IMAGE_TOKEN,
                "span": (start, start + len(IMAGE_TOKEN)),
                "replacement": replacement,
                "new_span": (start + growth, start + growth + len(replacement)),
            }
        )
        growth += len(replacement) - len(IMAGE_TOKEN)
    return offsets


_private_backends: weakref.WeakKeyDictionary[Any, tuple[int, Any]] = weakref.WeakKeyDictionary()
_private_backends_lock = threading.Lock()


def private_backend(tokenizer: Any) -> Any:
    """Return a copy of a fast tokenizer's backend that neither truncates nor pads.

    transformers sets truncation and padding on the backend itself before every call of the tokenizer. Another thread
    that encodes with the same backend gets these settings too, and its prompts would be cut or padded.

    Returns:
        a `tokenizers.Tokenizer`. It is made when a tokenizer is first used, and again after tokens were added to it.

    Raises:
        TypeError: if the tokenizer has no such backend.
    """
    with _private_backends_lock:
        num_tokens, backend = _private_backends.get(tokenizer, (None, None))
        if num_tokens != len(tokenizer):
            if not hasattr(tokenizer, "backend_tokenizer"):
                raise TypeError(
                    f"Prompts need a fast tokenizer, got {type(tokenizer).__name__}. Load it with AutoTokenizer or as "
                    "PreTrainedTokenizerFast."
                )
            backend = copy.deepcopy(tokenizer.backend_tokenizer)
            backend.no_truncation()
            backend.no_padding()
            _private_backends[tokenizer] = len(tokenizer), backend
    return backend


def encode_prompt(
    tokenizer: Any,
    prompt: str,
    image_runs: Sequence[PromptPieces],
    image_token_id: int,
    marker: str | None = None,
    return_starts: bool = False,
) -> PromptIds:
    """Tokenise a rendered prompt without adding special tokens, each `<image>` replaced by its run.

    Args:
        tokenizer: a tokenizer with the image tokens.
        prompt: rendered text; `<image>` stands for one whole image.
        image_runs: one run per placeholder, in order, from `image_run`.
        image_token_id: id that fills the runs.
        marker: the character of a `ControlTokenGuard`; the texts before and after it are tokenised separately.
        return_starts: also return where in `prompt` each id starts.

    Raises:
        TypeError: if the tokenizer is not a fast one.
        ValueError: if the number of placeholders differs from the number of runs (the message has both), or if the
            text holds half of a surrogate pair.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"The text holds the lone surrogate {prompt[error.start]!r}, half a character, which no tokenizer takes. "
            "Decode it anew, or replace it: text.encode('utf-8', 'replace').decode()."
        ) from error
    num_placeholders = prompt.count(IMAGE_TOKEN)
    if num_placeholders != len(image_runs):
        raise ValueError(
            f"The prompt has {num_placeholders} {IMAGE_TOKEN} placeholders but {len(image_runs)} images were given. "
            "Write one placeholder per image, in the order of the images."
        )
    ids: list[int] = []
    starts: list[int] = []
    for segment in _segments(prompt, image_runs, marker):
        if isinstance(segment, _ImageTokens):
            ids += [image_token_id] * segment.count
            starts += [segment.start] * segment.count
            continue
        text = "".join(piece.text for piece in segment)
        if not text:
            continue
        encoding = private_backend(tokenizer).encode(text, add_special_tokens=False)
        ids += encoding.ids
        if return_starts:
            origins = [origin for piece in segment for origin in piece.origins()]
            starts += [origins[min(offset, len(origins) - 1)] for offset, _ in encoding.offsets]
    return PromptIds(ids, starts if return_starts else None)


class _TextPiece(NamedTuple):
    """Text and the character of the prompt where it starts; the text of an image run comes from one placeholder."""

    text: str
    start: int
    is_in_prompt: bool

    def origins(self) -> list[int]:
        """For each character of the text, the character of the prompt that it comes from."""
        return [self.start + i * self.is_in_prompt for i in range(len(self.text))]


class _ImageTokens(NamedTuple):
    """A number of image tokens, and the character of the prompt where their placeholder starts."""

    count: int
    start: int


def _segments(
    prompt: str, image_runs: Sequence[PromptPieces], marker: str | None
) -> Iterator[list[_TextPiece] | _ImageTokens]:
    """Cut a prompt at its markers and image tokens; the pieces of text between two cuts are tokenised as one text."""
    runs = iter(image_runs)
    text: list[_TextPiece] = []
    position = 0
    boundary = re.escape(IMAGE_TOKEN) + (f"|{re.escape(marker)}" if marker else "")
    for match in re.finditer(boundary, prompt):
        text.append(_TextPiece(prompt[position : match.start()], position, True))
        position = match.end()
        if match.group() == marker:
            yield text
            text = []
            continue
        for piece in next(runs):
            if isinstance(piece, str):
                text.append(_TextPiece(piece, match.start(), False))
            else:
                yield text
                text = []
                yield _ImageTokens(piece, match.start())
    text.append(_TextPiece(prompt[position:], position, True))
    yield text


def render_messages(render: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call a function of transformers that renders messages by a chat template.

    Raises:
        ValueError, TypeError: if the template refuses the messages.
    """
    try:
        return render(*args, **options)
    except TEMPLATE_ERRORS as error:
        raise ValueError(f"The chat template refuses these messages: {error}") from error


def image_token_id_of(tokenizer: Any) -> int:
    """Return the tokenizer's id of `<image>`.

    Raises:
        ValueError: if the tokenizer has no such token.
    """
    token_id = tokenizer.get_added_vocab().get(IMAGE_TOKEN)
    if token_id is None:
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path!r} has no {IMAGE_TOKEN} token. Load the tokenizer of a Nemotron "
            "Nano VL checkpoint; a plain Llama tokenizer lacks the image tokens."
        )
    return token_id


def leading_images(num_images: int, prompt_format: PromptFormat) -> str:
    """Write the placeholders of images that come before a text: one on each line, or numbered on one line."""
    if not prompt_format.numbered or num_images < 2:
        return f"{IMAGE_TOKEN}\n" * num_images
    return " ".join(f"<image {number}>{IMAGE_TOKEN}" for number in range(1, num_images + 1)) + "\n"


def split_reasoning(text: str, thinking: bool = False) -> tuple[str, str]:
    """Split what the 12B V2 wrote into its reasoning and its answer, both stripped.

    Args:
        text: what the model wrote. The prompt opens the reasoning, so that `<think>` itself may be missing.
        thinking: whether the prompt requests reasoning. If it does, a text without `</think>` is unfinished reasoning.

    Returns:
        `(reasoning, answer)`; one of them is empty if the model wrote only the other.
    """
    reasoning, end, answer = text.partition(THINK_END)
    if not end and not (thinking or text.lstrip().startswith(THINK_START)):
        reasoning, answer = "", text
    return reasoning.strip().removeprefix(THINK_START).strip(), answer.strip()


def flatten_content(
    content: Any, guard: ControlTokenGuard | None = None, prompt_format: PromptFormat = V1_FORMAT
) -> tuple[str, list[Any]]:
    """Turn the content of a message into one string with `<image>` placeholders, and its images.

    Args:
        content: see `split_content`.
        guard: protects the text; None leaves it as it is.
        prompt_format: says where the images come. If they come first, leading line feeds of the text are removed. If
            the text is not protected and contains `<image>`, that marks the places of the images instead.

    Returns:
        the string, and the image of each image part (None if the part holds none).

    Raises:
        ValueError, TypeError: see `split_content`.
    """
    texts, images = split_content(content, on_lines=not prompt_format.images_first)
    if not prompt_format.images_first:
        return IMAGE_TOKEN.join(guard.protect(texts) if guard else texts), images
    text = "".join(texts)
    placed = guard is None and IMAGE_TOKEN in text
    text = guard.protect(text) if guard else text
    if content is None or isinstance(content, str):
        return text, images
    return ("" if placed else leading_images(len(images), prompt_format)) + text.lstrip("\n"), images


def split_content(content: Any, on_lines: bool = True) -> tuple[list[str], list[Any]]:
    """Split the content of a message into its texts and its images.

    Args:
        content: a string, None, or a list of parts `{"type": "text", "text": ...}` and `{"type": "image", ...}` with
            the image under `image`, `url`, `path` or `base64`, or under `image_url` as OpenAI clients send it. A part
            of type "document" or "file" (see `document_of_part`) gives an image for each of its pages.
        on_lines: put images on lines of their own, as in training: a line feed follows an image unless the next text
            starts with one.

    Returns:
        the texts before, between and after the images, and the image of each image part (None if the part holds
        none). Adjacent text parts become one string, because two harmless parts may join to a control token.

    Raises:
        ValueError: for a part of another type; nothing is dropped.
        TypeError: for content that is neither text nor a list of parts.
    """
    parts = [content or ""] if content is None or isinstance(content, str) else content
    if not isinstance(parts, (list, tuple)) or not all(isinstance(part, (str, dict)) for part in parts):
        raise TypeError(
            f"The content of a message must be a string or a list of parts like {{'type': 'text', 'text': ...}}, got "
            f"{content!r:.80}."
        )
    texts, images, after_image = [""], [], False
    for part in _with_pages(parts):
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        kind = part.get("type")
        if kind == "text":
            if not isinstance(part.get("text"), str):
                raise TypeError(f"A text part needs a string under 'text', got {part!r:.80}.")
            piece = str.__str__(part["text"])  # as in ControlTokenGuard.protect
        elif kind in ("image", "image_url"):
            piece = IMAGE_TOKEN
        else:
            raise ValueError(
                f"A message has a content part of type {kind!r}; this model takes 'text', 'image', 'image_url', "
                "'document' and 'file'. Send a video frame as an image."
            )
        texts[-1] += "\n" if after_image and on_lines and not piece.startswith("\n") else ""
        after_image = kind != "text"
        if after_image:
            images.append(_image_of(part))
            texts.append("")
        else:
            texts[-1] += piece
    return texts, images


def _with_pages(parts: Sequence[str | dict[str, Any]]) -> Iterator[str | dict[str, Any]]:
    """Yield content parts, an image part for each page in place of a document."""
    for part in parts:
        if isinstance(part, dict) and part.get("type") in ("document", "file"):
            yield from ({"type": "image", "image": page} for page in document_of_part(part))
        else:
            yield part


def _image_of(part: dict[str, Any]) -> Any:
    if part["type"] == "image_url":
        url = part.get("image_url")
        return url.get("url") if isinstance(url, dict) else url
    return next((part[key] for key in ("image", "url", "path", "base64") if part.get(key) is not None), None)
