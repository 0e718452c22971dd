"""The images, files and videos of a request: decoded, held to limits, and handed on as the processor takes them."""

import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nemotron_vl.pictures import DECODING_ERRORS, base64_bytes, open_document
from PIL import Image

EXAMPLES = {"image_url": "image/png", "video_url": "video/mp4", "file_data": "application/pdf"}
PARTS = ("text", "image_url", "video_url", "file")


@dataclass(frozen=True)
class MediaLimits:
    """What the images, files and videos of one request may cost; a request beyond a limit is refused.

    Args:
        max_file_bytes: of one image, file or video, decoded from base64.
        max_pixels: of one image, or of one page of a file that is an image. The pages of PDFs have no pixels: they are
            drawn at the size of their tiles.
        max_images: image and video parts.
        max_pages: pages of all files.
    """

    max_file_bytes: int = 24 * 2**20
    max_pixels: int = 100_000_000
    max_images: int = 64
    max_pages: int = 64


def shown(value: Any) -> str:
    """Return a value of a request as an error quotes it: whole, or in words where it is too long to quote."""
    text = repr(value)
    if len(text) <= 80:
        return text
    if isinstance(value, dict):
        names = ", ".join(map(str, list(value)[:4]))[:80]
        return f"an object with {len(value)} keys ({names}{', ...' * (len(value) > 4)})"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return f"{text[:77]}..."


def check_part(part: Any) -> None:
    """Refuse a content part of another kind, or one that does not hold what it is about; nothing is decoded yet.

    Raises:
        ValueError: with what came and what is possible.
    """
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        return
    if kind not in PARTS:
        raise ValueError(
            f"A message has a content part of type {kind!r}; this server takes {', '.join(map(repr, PARTS))}."
            f"{' The model has no audio encoder.' if kind == 'input_audio' else ''}"
        )
    held = part.get(kind)
    if kind == "file":
        if not isinstance(held, dict) or held.get("file_id") is not None:
            raise ValueError(
                "A file part must hold the file: {'file_data': 'data:application/pdf;base64,...'}. This server stores "
                f"no files; got {shown(held)}."
            )
        _check_url("file_data", held.get("file_data"))
        return
    held = held if isinstance(held, dict) else {"url": held}
    _check_url(kind, held.get("url"))
    if held.get("detail") not in (None, "auto", "high"):
        raise ValueError(
            f"detail={shown(held['detail'])} of one image is not supported; chat_template_kwargs="
            "{'max_num_tiles': 1} makes all images of a request small."
        )


def _check_url(name: str, url: Any) -> None:
    if not isinstance(url, str) or not url.startswith("data:"):
        raise ValueError(
            f"{name} must be a data: URL like 'data:{EXAMPLES[name]};base64,...', got {shown(url)}. This server fetches "
            "nothing and opens no files: read the file and send it along."
        )


def read_media(messages: list[dict[str, Any]], limits: MediaLimits) -> list[dict[str, Any]]:
    """Return checked messages as the processor takes them: with bytes of images and videos, and the pages of files.

    Raises:
        ValueError: if a limit is exceeded, with the numbers, or a file cannot be read.
        ImportError: if the server lacks the package that reads a file.
    """
    counts: Counter[str] = Counter()
    return [
        {**message, "content": [read for part in message["content"] for read in _read_part(part, limits, counts)]}
        if isinstance(message.get("content"), list)
        else message
        for message in messages
    ]


def _read_part(part: dict[str, Any], limits: MediaLimits, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    kind = part["type"]
    held = part[kind]
    if kind == "text":
        yield part
    elif kind == "file":
        data = _decoded("file_data", held["file_data"], limits)
        document = open_document(data, pages=held.get("pages"), password=held.get("password"))
        _count(counts, "pages of files", len(document), limits.max_pages)
        for page in document:
            if not page.is_scalable:
                _check_pixels(page.size, limits)
            yield {"type": "image", "image": page}
    else:
        data = _decoded(kind, held["url"] if isinstance(held, dict) else held, limits)
        _count(counts, "images and videos", 1, limits.max_images)
        medium = kind.removesuffix("_url")
        if medium == "image":
            _check_pixels(_size_of(data), limits)
        yield {"type": medium, medium: data}


def _count(counts: Counter[str], what: str, number: int, limit: int) -> None:
    counts[what] += number
    if counts[what] > limit:
        hint = " {'pages': '1-3'} beside file_data chooses some." if what == "pages of files" else ""
        raise ValueError(
            f"The request has at least {counts[what]} {what}; this server takes {limit}. Send fewer.{hint}"
        )


def _decoded(name: str, url: str, limits: MediaLimits) -> bytes:
    try:
        data = base64_bytes(url)
    except ValueError as error:
        raise ValueError(f"{name} {shown(url)} cannot be used: it is no base64 text ({error}).") from error
    if len(data) > limits.max_file_bytes:
        raise ValueError(
            f"{name} holds {len(data):,} bytes; this server takes {limits.max_file_bytes:,} for a file. Send a smaller "
            "one."
        )
    return data


def _size_of(data: bytes) -> tuple[int, int]:
    """Return the width and height of an image file, from its header; (0, 0) if the processor is to say what is wrong."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.size
    except DECODING_ERRORS:
        return 0, 0


def _check_pixels(size: tuple[float, float], limits: MediaLimits) -> None:
    width, height = size
    if width * height > limits.max_pixels:
        raise ValueError(
            f"An image has {width:,} x {height:,} = {width * height:,} pixels; this server takes "
            f"{limits.max_pixels:,}. Send a smaller one."
        )
