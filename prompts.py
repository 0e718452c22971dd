"""From text with placeholders to ids: protects user text, writes images and videos into prompts, and splits contents.

User text is data. Before a conversation is rendered, a marker character is put into every control token of its texts
(`<image>`, `<video>`, `<|eot_id|>`, ...). The rendered prompt is cut at the markers, and each piece is tokenised by
itself, so no text can forge a turn, an image or an end. `chat()` of the model and `apply_chat_template(tokenize=True)` of the
processor both work this way.
"""

import copy
import re
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from .pictures import document_of_part

try:
    from jinja2 import TemplateError
except ImportError:  # transformers says what to install when a template is rendered
    TemplateError = ValueError

# What a chat template may raise, besides ValueError and TypeError.
TEMPLATE_ERRORS = (TemplateError, ArithmeticError, LookupError, AttributeError, RecursionError)

IMAGE_TOKEN = "<image>"
VIDEO_TOKEN = "<video>"  # a token of the 12B V2 alone; everywhere a placeholder for one whole video
IMAGE_START_TOKEN = "<img>"
IMAGE_END_TOKEN = "</img>"
THINK_START = "<think>"
THINK_END = "</think>"


class VisualTokens(NamedTuple):
    """A number of equal tokens that stand for an image, or for a part of one or of a video."""

    token: str
    count: int


# One image or video of a prompt: text, and the tokens in between.
PromptPieces = list[str | VisualTokens]
# The runs of a prompt by their placeholders, `<image>` and `<video>`, each in the order of the prompt.
PromptRuns = Mapping[str, Sequence[PromptPieces]]
# transformers' types of a prompt's tokens: 0 is text.
TOKEN_TYPES = {IMAGE_TOKEN: 1, VIDEO_TOKEN: 2}

# Plane 15 is for private use, so texts do not need these characters. The marker is one that the input does not have.
PRIVATE_USE_CHARACTERS = range(0xF0000, 0xFFFFE)
MAX_NESTING = 100  # levels of lists and dicts in messages and tools


class VideoLayout(NamedTuple):
    """How a video is written in a prompt.

    Attributes:
        header: stands before the frames, unless the text before the video ends with it.
        label: stands before each frame; `{number}` counts from 1.
        timed_label: the same where the frames' times are known; `{time}` is in seconds.
        separator: stands between two frames.
        one_run: all frames share one pair of `<img>` and `</img>`, without labels.
    """

    header: str = ""
    label: str = ""
    timed_label: str = ""
    separator: str = "\n"
    one_run: bool = False


class PromptFormat(NamedTuple):
    """How a prompt is written where the 8B and the 12B differ.

    Attributes:
        images_first: all images and videos of a message come before its text. Otherwise each comes where its part
            comes, on a line of its own.
        numbered: several images in front of a text get numbers and share one line.
        layouts: how a video may be written, by name; the first is the default.
        video_filler: the token that stands for the parts of a video.
    """

    images_first: bool
    numbered: bool
    layouts: Mapping[str, VideoLayout]
    video_filler: str


# The 8B V1 was trained with all frames in one run; benchmark clients label them. It has no token for videos.
V1_LAYOUTS = {
    "one": VideoLayout(one_run=True),
    "frames": VideoLayout(label="Frame{number}: ", timed_label="Frame{number}: "),
}
# As the 12B V2 was trained.
V2_LAYOUTS = {
    "frames": VideoLayout(
        header="This is a video:\n",
        label="Frame {number}: ",
        timed_label="Frame {number} sampled at {time:.2f} seconds: ",
    )
}
V1_FORMAT = PromptFormat(images_first=False, numbered=False, layouts=V1_LAYOUTS, video_filler=IMAGE_TOKEN)
V2_FORMAT = PromptFormat(images_first=True, numbered=True, layouts=V2_LAYOUTS, video_filler=VIDEO_TOKEN)


def layout_of(prompt_format: PromptFormat, name: str | None = None, **changes: str | None) -> VideoLayout:
    """Return a layout of a format by its name, with some of its texts replaced; without a name, the default.

    Raises:
        ValueError: for an unknown name.
        TypeError: for a text that is none.
    """
    layouts = prompt_format.layouts
    if name is not None and name not in layouts:
        raise ValueError(f"video_layout must be one of {', '.join(layouts)}, got {name!r}.")
    stated = {part: text for part, text in changes.items() if text is not None}
    wrong = [part for part, text in stated.items() if not isinstance(text, str)]
    if wrong:
        raise TypeError(f"The {wrong[0]} of a video must be a string, got {stated[wrong[0]]!r}.")
    return layouts[name or next(iter(layouts))]._replace(**stated)


class PromptIds(NamedTuple):
    """The ids of one prompt, and where they come from.

    Attributes:
        input_ids: all ids, those of images and videos included.
        starts: for each id, the index of the character where it starts, in the prompt with its placeholders; None
            unless requested.
        types: for each id, 1 if it belongs to an image, 2 if to a video, else 0.
    """

    input_ids: list[int]
    starts: list[int] | None
    types: list[int]


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
        # <video> is a placeholder even where it is no token.
        tokens = sorted({*tokenizer.get_added_vocab(), VIDEO_TOKEN}, key=len, reverse=True)
        # Match only the first character of a token, and look ahead for the token, because tokens may overlap. (?!)
        # matches nothing.
        self._pattern = re.compile(f"(?=({'|'.join(map(re.escape, tokens)) or '(?!)'}))(.)", re.DOTALL)

    def protect(self, data: Any, keep: Sequence[str] = ()) -> Any:
        """Return `data` with a marker after the first character of every control token in its strings.

        Args:
            data: a string, or nested dicts and lists of strings and numbers. Templates write the keys of dicts (the
                parameters of a tool) as they write values, so these are text as well.
            keep: tokens to leave as they are, because they are placeholders here.

        Raises:
            TypeError: for other objects, because the text that a template makes of them cannot be protected.
        """
        if isinstance(data, str):
            data = str.__str__(data)  # a subclass, such as markupsafe's, may change what is joined to it
            return self._pattern.sub(lambda match: self._split(*match.groups(), keep), data)
        if isinstance(data, dict):
            if not all(isinstance(key, str) for key in data):
                raise TypeError(f"The keys of messages and tools must be strings, got {list(data)!r:.80}.")
            return {self.protect(key): self.protect(value, keep) for key, value in data.items()}
        if isinstance(data, (list, tuple)):
            return [self.protect(item, keep) for item in data]
        if data is None or isinstance(data, (bool, int, float)):
            return data
        raise TypeError(
            f"Messages, tools and variables of the template hold strings, numbers, lists and dicts, got {data!r:.80} of "
            f"type {type(data).__name__}. Convert it, an object of a client library with its model_dump()."
        )

    def _split(self, token: str, start: str, keep: Sequence[str]) -> str:
        return start if token in keep else start + self.marker


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
        return [IMAGE_START_TOKEN, VisualTokens(IMAGE_TOKEN, num_tiles * tokens_per_tile), IMAGE_END_TOKEN]
    if image_tag_type != "nvlm":
        raise ValueError(f"image_tag_type must be 'internvl' or 'nvlm', got {image_tag_type!r}.")
    run: PromptPieces = ["<Image>"]
    one_tile = VisualTokens(IMAGE_TOKEN, tokens_per_tile)
    for tile in range(1, num_tiles):
        run += [f"<tile_{tile}>", one_tile]
    return [*run, "<tile_global_thumbnail>", one_tile, "</Image>"]


def video_run(
    tokens_per_frame: Sequence[int], times: Sequence[float] | None, layout: VideoLayout, filler: str = VIDEO_TOKEN
) -> PromptPieces:
    """Return what stands in a prompt for one video, its header included.

    Args:
        tokens_per_frame: visual tokens of each frame.
        times: seconds of each frame; None if unknown.
        layout: how the video is written.
        filler: the token that stands for the parts of the video.

    Raises:
        ValueError: if a label of the layout cannot be written.
    """
    if layout.one_run:
        whole = VisualTokens(filler, sum(tokens_per_frame))
        return [layout.header + IMAGE_START_TOKEN, whole, IMAGE_END_TOKEN]
    run: PromptPieces = [layout.header]
    for number, count in enumerate(tokens_per_frame, 1):
        try:
            label = (
                layout.label.format(number=number)
                if times is None
                else layout.timed_label.format(number=number, time=times[number - 1])
            )
        except (LookupError, ValueError, AttributeError, TypeError) as error:
            raise ValueError(
                f"The label of a frame cannot be written: {error!r}. It may hold {{number}} and, with known times, "
                "{time}, as in 'Frame {number} sampled at {time:.2f} seconds: '."
            ) from error
        run += [(layout.separator if number > 1 else "") + label + IMAGE_START_TOKEN]
        run += [VisualTokens(filler, count), IMAGE_END_TOKEN]
    return run


def without_headers(prompt: str, runs: PromptRuns, header: str) -> PromptRuns:
    """Return the runs of a prompt, without the header of each video that the text before it already ends with."""
    if not header or not runs.get(VIDEO_TOKEN):
        return runs
    videos, position = [], 0
    for run in runs[VIDEO_TOKEN]:
        position = prompt.find(VIDEO_TOKEN, position)
        has_header = position >= 0 and prompt[:position].endswith(header)
        videos.append([run[0].removeprefix(header), *run[1:]] if has_header else run)
        position += len(VIDEO_TOKEN)
    return {**runs, VIDEO_TOKEN: videos}


def render_run(run: PromptPieces) -> str:
    """Write a run as prompt text."""
    return "".join(piece if isinstance(piece, str) else piece.token * piece.count for piece in run)


def count_placeholders(text: str) -> dict[str, int]:
    """Count the images and videos of a prompt."""
    return {token: text.count(token) for token in TOKEN_TYPES}


def order_of_placeholders(prompt: str) -> list[str]:
    """Return the placeholders of a prompt, in its order."""
    return re.findall("|".join(map(re.escape, TOKEN_TYPES)), prompt)


def _placeholders(prompt: str, runs: PromptRuns, marker: str | None = None) -> Iterator[tuple[re.Match, PromptPieces]]:
    """Yield each placeholder of a prompt with its run, and each marker with an empty one."""
    left = {token: iter(runs.get(token, ())) for token in TOKEN_TYPES}
    for match in re.finditer("|".join(map(re.escape, [*left, marker] if marker else left)), prompt):
        yield match, [] if match.group() == marker else next(left[match.group()])


def replacement_offsets(prompt: str, runs: PromptRuns, marker: str | None = None) -> list[dict[str, Any]]:
    """Return the places of the placeholders in a prompt, and those of images and videos in the expanded prompt.

    Args:
        prompt: rendered text; `<image>` stands for one whole image, `<video>` for one video.
        runs: the run of each placeholder.
        marker: the character of a `ControlTokenGuard`; it does not count.

    Returns:
        one dict per image or video, with the keys of transformers: `type` "image" or "video", `text` the placeholder,
        `span` its (start, end) in the prompt, `replacement` the run as text, `new_span` its (start, end) in the
        expanded prompt.
    """
    offsets, growth = [], 0
    for match, run in _placeholders(prompt, runs):
        token = match.group()
        start = match.start() - (prompt.count(marker, 0, match.start()) if marker else 0)
        replacement = render_run(run)
        offsets.append(
            {
                "type": token.strip("<>"),
                "text": token,
                "span": (start, start + len(token)),
                "replacement": replacement,
                "new_span": (start + growth, start + growth + len(replacement)),
            }
        )
        growth += len(replacement) - len(token)
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
    runs: PromptRuns,
    image_token_id: int,
    marker: str | None = None,
    return_starts: bool = False,
) -> PromptIds:
    """Tokenise a rendered prompt without adding special tokens, each placeholder replaced by its run.

    Args:
        tokenizer: a tokenizer with the image tokens.
        prompt: rendered text; `<image>` stands for one whole image, `<video>` for one video.
        runs: the run of each placeholder, from `image_run` and `video_run`.
        image_token_id: id that fills the runs of images.
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
    for token, number in count_placeholders(prompt).items():
        given = len(runs.get(token, ()))
        if number != given:
            name = token.strip("<>")
            raise ValueError(
                f"The prompt has {number} {token} placeholders but {given} {name}s were given. Write one placeholder "
                f"per {name}, in the order of the {name}s."
            )
    token_ids = {IMAGE_TOKEN: image_token_id, VIDEO_TOKEN: tokenizer.get_added_vocab().get(VIDEO_TOKEN)}
    ids: list[int] = []
    starts: list[int] = []
    types: list[int] = []
    for segment in _segments(prompt, runs, marker):
        if isinstance(segment, _VisualSegment):
            ids += [token_ids[segment.tokens.token]] * segment.tokens.count
            starts += [segment.start] * segment.tokens.count
            types += [TOKEN_TYPES[segment.placeholder]] * segment.tokens.count
            continue
        text = "".join(piece.text for piece in segment)
        if not text:
            continue
        encoding = private_backend(tokenizer).encode(text, add_special_tokens=False)
        ids += encoding.ids
        types += [0] * len(encoding.ids)
        if return_starts:
            origins = [origin for piece in segment for origin in piece.origins()]
            starts += [origins[min(offset, len(origins) - 1)] for offset, _ in encoding.offsets]
    return PromptIds(ids, starts if return_starts else None, types)


class _TextPiece(NamedTuple):
    """Text and the character of the prompt where it starts; the text of a run comes from one placeholder."""

    text: str
    start: int
    is_in_prompt: bool

    def origins(self) -> list[int]:
        """For each character of the text, the character of the prompt that it comes from."""
        return [self.start + i * self.is_in_prompt for i in range(len(self.text))]


class _VisualSegment(NamedTuple):
    """Visual tokens, their placeholder, and the character of the prompt where that starts."""

    tokens: VisualTokens
    placeholder: str
    start: int


def _segments(prompt: str, runs: PromptRuns, marker: str | None) -> Iterator[list[_TextPiece] | _VisualSegment]:
    """Cut a prompt at its markers and visual tokens; the pieces of text between two cuts are tokenised as one text."""
    text: list[_TextPiece] = []
    position = 0
    for match, run in _placeholders(prompt, runs, marker):
        text.append(_TextPiece(prompt[position : match.start()], position, True))
        position = match.end()
        if match.group() == marker:
            yield text
            text = []
        for piece in run:
            if isinstance(piece, str):
                text.append(_TextPiece(piece, match.start(), False))
            else:
                yield text
                text = []
                yield _VisualSegment(piece, match.group(), match.start())
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


def leading_placeholders(tokens: Sequence[str], prompt_format: PromptFormat) -> str:
    """Write placeholders that come before a text, each on a line; several images are numbered if the format says so.

    Numbered images that follow each other share a line.
    """
    if not prompt_format.numbered or tokens.count(IMAGE_TOKEN) < 2:
        return "".join(f"{token}\n" for token in tokens)
    written, number = "", 0
    for token, following in zip(tokens, [*tokens[1:], None], strict=True):
        number += token == IMAGE_TOKEN
        written += f"<image {number}>{token}" if token == IMAGE_TOKEN else token
        written += " " if token == following == IMAGE_TOKEN else "\n"
    return written


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


class VideoPart(NamedTuple):
    """The video of a content part, among the images of other parts; None if the part holds none."""

    video: Any


def flatten_content(
    content: Any, guard: ControlTokenGuard | None = None, prompt_format: PromptFormat = V1_FORMAT
) -> tuple[str, list[Any]]:
    """Turn the content of a message into one string with placeholders, and its images and videos.

    Args:
        content: see `split_content`.
        guard: protects the text; None leaves it as it is.
        prompt_format: says where the images come. If they come first, leading line feeds of the text are removed. If
            the text is not protected and contains `<image>` or `<video>`, that marks their places instead.

    Returns:
        the string, and what `split_content` returns of the other parts.

    Raises:
        ValueError, TypeError: see `split_content`.
    """
    texts, media = split_content(content, on_lines=not prompt_format.images_first)
    tokens = [placeholder_of(one) for one in media]
    if not prompt_format.images_first:
        return _interleave(guard.protect(texts) if guard else texts, tokens), media
    text = "".join(texts)
    placed = [token for token in TOKEN_TYPES if guard is None and token in text]
    text = guard.protect(text) if guard else text
    if content is None or isinstance(content, str):
        return text, media
    leading = leading_placeholders([token for token in tokens if token not in placed], prompt_format)
    return leading + text.lstrip("\n"), media


def placeholder_of(medium: Any) -> str:
    """Return the placeholder of an image or a `VideoPart`."""
    return VIDEO_TOKEN if isinstance(medium, VideoPart) else IMAGE_TOKEN


def _interleave(texts: Sequence[str], tokens: Sequence[str]) -> str:
    return "".join(text + token for text, token in zip(texts, [*tokens, ""], strict=True))


def split_content(content: Any, on_lines: bool = True) -> tuple[list[str], list[Any]]:
    """Split the content of a message into its texts and its images and videos.

    Args:
        content: a string, None, or a list of parts `{"type": "text", "text": ...}`, `{"type": "image", ...}` with the
            image under `image`, `url`, `path` or `base64`, or under `image_url` as OpenAI clients send it, and
            `{"type": "video", ...}` with the video under `video`, `url`, `path` or `base64`, or under `video_url`. A
            part of type "document" or "file" (see `document_of_part`) gives an image for each of its pages.
        on_lines: put images and videos on lines of their own, as in training: a line feed follows one unless the next
            text starts with one.

    Returns:
        the texts before, between and after the other parts, and for each of these its image (None if it holds none),
        or a `VideoPart`. Adjacent text parts become one string, because two harmless parts may join to a control
        token.

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
    texts, media, after_medium = [""], [], False
    for part in _with_pages(parts):
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        kind = part.get("type")
        if kind == "text":
            if not isinstance(part.get("text"), str):
                raise TypeError(f"A text part needs a string under 'text', got {part!r:.80}.")
            piece = str.__str__(part["text"])  # as in ControlTokenGuard.protect
        elif kind in ("image", "image_url", "video", "video_url"):
            piece = ""
        else:
            raise ValueError(
                f"A message has a content part of type {kind!r}; this model takes 'text', 'image', 'image_url', "
                "'video', 'video_url', 'document' and 'file'."
            )
        texts[-1] += "\n" if after_medium and on_lines and not piece.startswith("\n") else ""
        after_medium = kind != "text"
        if after_medium:
            medium = _source_of(part, kind.removesuffix("_url"))
            media.append(VideoPart(medium) if kind.startswith("video") else medium)
            texts.append("")
        else:
            texts[-1] += piece
    return texts, media


def _with_pages(parts: Sequence[str | dict[str, Any]]) -> Iterator[str | dict[str, Any]]:
    """Yield content parts, an image part for each page in place of a document."""
    for part in parts:
        if isinstance(part, dict) and part.get("type") in ("document", "file"):
            yield from ({"type": "image", "image": page} for page in document_of_part(part))
        else:
            yield part


def _source_of(part: dict[str, Any], kind: str) -> Any:
    """Return the image or video that a content part holds, None if it holds none."""
    if part["type"] != kind:
        url = part.get(part["type"])
        return url.get("url") if isinstance(url, dict) else url
    return next((part[key] for key in (kind, "url", "path", "base64") if part.get(key) is not None), None)
