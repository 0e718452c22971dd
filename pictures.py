"""Whatever a caller hands over -> RGB images: files, bytes, base64, arrays, and the pages of documents.

`load_image` reads one image. `open_document` opens a PDF, or an image file with several frames, as a sequence of pages;
a page becomes an image when it is needed, so that a long document takes no more memory than a short one. PDFs are drawn
by PDFium, through pypdfium2, which only they need.
"""

import atexit
import base64
import contextlib
import io
import math
import os
import re
import struct
import sys
import threading
import weakref
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

HIDDEN_CONTRAST = 16  # of 255 levels: ink that differs less from its white ground is taken for invisible
MAX_NESTING = 100  # lists inside lists of images: a list that contains itself gets an error that says what is wrong
MAX_SIDE = 100_000  # pixels; a 1 x 100,000,000 image passes every limit on area and needs 800 GB on the way
POINTS_PER_INCH = 72
NATURAL_DPI = 150  # at this size a page of a PDF chooses its tiles, as a scan would; it is drawn at the tiles' size
# The frames of other formats are not pages but layers, sizes of an icon, or a camera's preview: they have one page.
PAGED_FORMATS = ("TIFF", "GIF", "WEBP", "PNG", "AVIF")
PDF_START = b"%PDF-"
PDF_START_WITHIN = 1024  # bytes: where readers look for it, because some programs write something before it

RGBImage = Image.Image | np.ndarray  # of mode RGB, or uint8 `(height, width, 3)`

# What Pillow's decoders raise on broken files.
DECODING_ERRORS = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, EOFError),
    *(RuntimeError, AssertionError, struct.error, zlib.error, Image.DecompressionBombError),
)

PLAIN_TIFF = "save this TIFF with unsigned 8-bit samples, in one plane"


def flatten_images(images: Any, depth: int = 0) -> Iterator[Any]:
    """Yield the images of an image, a list, nested lists, a document or a batched 4-dimensional array, in order.

    Raises:
        ValueError: if lists are nested more than 100 levels deep.
    """
    if depth > MAX_NESTING:
        raise ValueError(f"Lists of images may be nested {MAX_NESTING} levels deep, these go deeper. Flatten them.")
    is_batch = isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4
    if is_batch or isinstance(images, (list, tuple)) or is_document(images):
        for image in images:
            yield from flatten_images(image, depth + 1)
    else:
        yield images


def load_image(image: Any, *, do_convert_rgb: bool = True, input_data_format: str | None = None) -> RGBImage:
    """Read whatever a caller gives as an image into RGB; see `NemotronVLImageProcessor` for the rules.

    A page of a document is drawn at its natural size.

    Returns:
        For a PIL image or a file, a decoded PIL image of mode RGB, which may be `image` itself. For an array or a
        tensor, a uint8 array `(height, width, 3)`, which may be a view of it.

    Raises:
        ValueError: if a file cannot be decoded completely, or an array is ambiguous, out of range or empty.
        TypeError: if `image` is of no supported kind.
    """
    if is_page(image):
        return image.render()
    if isinstance(image, (np.ndarray, torch.Tensor)):
        loaded = _array_to_rgb(image, do_convert_rgb, input_data_format)
    elif isinstance(image, (str, os.PathLike, bytes, bytearray, memoryview, Image.Image)) or hasattr(image, "read"):
        try:
            decoded = _decode(image) if isinstance(image, Image.Image) else _decode_file(image)
            loaded = _pil_to_rgb(decoded, do_convert_rgb)
        except DECODING_ERRORS as error:
            raise ValueError(
                f"The image {_shown(image)} cannot be used: {str(error) or type(error).__name__}. Give a complete image "
                "that Pillow decodes (PNG, JPEG, WebP, TIFF, ...); a PDF is a document, see open_document."
            ) from error
    else:
        raise TypeError(
            f"An image is a PIL image, a NumPy array, a torch tensor, a path, a file opened in binary mode, the bytes "
            f"or the base64 text of an image file, a page of a document, or a list of those; got {type(image).__name__}."
        )
    _check_size(*height_and_width(loaded))
    return loaded


def _shown(source: Any) -> str:
    """Return a short text that names what a caller gave."""
    return f"{source[:60]!r}..." if isinstance(source, (str, bytes)) and len(source) > 60 else repr(source)


def _check_size(height: int, width: int) -> None:
    if not (0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE):
        raise ValueError(
            f"The sides of an image must be in 1..{MAX_SIDE} pixels, got height={height}, width={width}. "
            "Cut a longer one into pages."
        )


def height_and_width(image: RGBImage) -> tuple[int, int]:
    return (image.height, image.width) if isinstance(image, Image.Image) else image.shape[:2]


def _decode(image: Image.Image) -> Image.Image:
    if image.format == "EPS":
        raise ValueError("EPS is a program for Ghostscript, which is not run; convert it to PNG first")
    _check_size(image.height, image.width)
    is_tiff = isinstance(image, TiffImagePlugin.TiffImageFile)
    if is_tiff:
        _check_tiff(image)
    try:
        image.load()
    except ValueError as error:  # of a truncated file it would be an OSError
        raise ValueError(f"{error}{f'; {PLAIN_TIFF}' if is_tiff else ''}") from error
    return image


def _tiff_tag(image: TiffImagePlugin.TiffImageFile, tag: int, default: int = 1) -> int:
    """The number of a tag; of a tag with a number for each channel, the largest."""
    value = image.tag_v2.get(tag, default)
    return max(value) if isinstance(value, tuple) else value


def _check_tiff(image: TiffImagePlugin.TiffImageFile) -> None:
    """Raise ValueError for samples that Pillow 13 decodes into others without an error, and for signed ones.

    32-bit signed samples pass: Pillow writes its mode I that way.
    """
    bits = _tiff_tag(image, TiffImagePlugin.BITSPERSAMPLE)
    is_raw = _tiff_tag(image, TiffImagePlugin.COMPRESSION) == 1
    foreign_order = {"little": b"MM", "big": b"II"}[sys.byteorder]
    problem = None
    if _tiff_tag(image, TiffImagePlugin.SAMPLEFORMAT) == 2 and bits < 32:
        problem = f"its samples are signed {bits}-bit numbers, which do not say what is white"
    elif image.mode in ("I", "F") and not is_raw and image.tag_v2.prefix == foreign_order:
        problem = f"Pillow does not put the bytes of compressed {bits}-bit samples into order"
    elif _tiff_tag(image, TiffImagePlugin.PLANAR_CONFIGURATION) == 2:
        photometric = _tiff_tag(image, TiffImagePlugin.PHOTOMETRIC_INTERPRETATION, 0)
        fill_order = _tiff_tag(image, TiffImagePlugin.FILLORDER)
        misread = bits != 8 or fill_order == 2 or photometric in (0, 6) if is_raw else image.mode in ("LA", "La", "PA")
        if misread:
            problem = f"Pillow does not decode separate planes (PlanarConfiguration 2) of {bits}-bit {image.mode}"
    if problem:
        raise ValueError(f"{problem}; {PLAIN_TIFF}")


def _decode_file(source: Any) -> Image.Image:
    """Decode a path, `file:` or `data:` URL, base64 text, bytes or file; first frame, upright by its EXIF tag."""
    file = _named_file(source) if isinstance(source, str) else source
    if isinstance(file, (str, os.PathLike)):
        _check_file(file)
        opened: Any = contextlib.nullcontext(file)
    else:
        opened = _at_its_start(file) if hasattr(file, "read") else io.BytesIO(file)
    with opened as file, _open(file) as image:
        ImageOps.exif_transpose(_decode(image), in_place=True)
    return image


@contextlib.contextmanager
def _at_its_start(file: Any) -> Iterator[Any]:
    """Yield a file object of the caller at its start, and leave it where it was."""
    if not isinstance(file.read(0), bytes):
        raise ValueError("the file is open in text mode; open it in binary mode, 'rb'")
    if not file.seekable():  # a pipe or socket might never end
        raise ValueError("the file is a stream that cannot be read twice; pass what it held: file.read()")
    position = file.tell()
    file.seek(0)
    try:
        yield file
    finally:
        file.seek(position)


def _check_file(path: str | os.PathLike) -> None:
    if not os.path.isfile(path):  # a pipe or device would never end
        raise ValueError("it is a directory" if os.path.isdir(path) else "there is no such file")


def _open(file: Any) -> Image.Image:
    try:
        return Image.open(file)
    except UnidentifiedImageError:
        is_path = isinstance(file, (str, os.PathLike))
        with open(file, "rb") if is_path else contextlib.nullcontext(file) as opened:
            opened.seek(0)
            if opened.read(4) not in TiffImagePlugin.PREFIXES:
                raise
        raise ValueError(
            f"Pillow does not decode this TIFF: it is damaged, or its samples are of a rare kind; {PLAIN_TIFF}"
        ) from None


def _named_file(text: str) -> str | bytes:
    """The path that a text names, or the bytes that it holds as base64."""
    if text.startswith(("http://", "https://")):
        raise ValueError("images are not fetched from the network; download it and pass the path or the bytes")
    if text.startswith("file://"):
        return url2pathname(urlsplit(text).path)
    if not text.startswith("data:") and os.path.isfile(text):
        return text
    try:
        return base64_bytes(text)
    except ValueError as error:
        raise ValueError("it is neither an existing file nor base64 text") from error


def base64_bytes(text: str) -> bytes:
    """The bytes of a `data:` URL or of base64 text."""
    encoded = text.partition(",")[2] if text.startswith("data:") else text
    return base64.b64decode("".join(encoded.split()), validate=True)


def _pil_to_rgb(image: Image.Image, do_convert_rgb: bool) -> Image.Image:
    transparent = image.has_transparency_data
    if image.mode == "RGB" and not (transparent and do_convert_rgb):
        return image
    if not do_convert_rgb:
        raise ValueError(f"the model takes RGB, its mode is {image.mode!r} and do_convert_rgb is False")
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return _deep_grey_to_rgb(image)
    if not transparent:
        return image.convert("RGB")
    if image.mode == "La":  # Pillow leaves premultiplied grey in two steps only
        image = image.convert("LA")
    return _on_visible_ground(image.convert("RGBA"))


def _on_visible_ground(image: Image.Image) -> Image.Image:
    """Composite an RGBA image on white, or on black if white hides it; an alpha of 0 everywhere is no alpha."""
    on_white = _composite(image, "white")
    if _contrast(on_white) > HIDDEN_CONTRAST:
        return on_white
    is_alpha_unused = image.getchannel("A").getextrema() == (0, 0)
    return max(on_white, image.convert("RGB") if is_alpha_unused else _composite(image, "black"), key=_contrast)


def _composite(image: Image.Image, ground: str) -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", image.size, ground), image).convert("RGB")


def _contrast(image: Image.Image) -> int:
    """The difference between the highest and the lowest level of a channel, at most 255."""
    return max(high - low for low, high in image.getextrema())


def _deep_grey_to_rgb(image: Image.Image) -> Image.Image:
    """Scale 12-, 16- and 32-bit and float grey to 0..255; what is white says the mode or, in a TIFF, its tags."""
    values, white_is_zero = np.asarray(image), False
    whites = {"I": (255, 65535), "F": (1, 255)}.get(image.mode, (65535,))  # the smallest that holds all values
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        white_is_zero = _tiff_tag(image, TiffImagePlugin.PHOTOMETRIC_INTERPRETATION, 0) == 0
        if _tiff_tag(image, TiffImagePlugin.BITSPERSAMPLE) == 12:
            whites = (4095,)
        elif image.mode == "I" and _tiff_tag(image, TiffImagePlugin.SAMPLEFORMAT) == 1:
            values, whites = values.view(np.uint32), (255, 65535, 2**32 - 1)
    low, high = (values.min(), values.max()) if values.size else (0, 0)
    white = next((white for white in whites if high <= white), whites[-1])
    if not (low >= 0 and high <= white):
        raise ValueError(f"its mode {image.mode} needs values in 0..{white}, got {low}..{high}; rescale it to 0..255")
    grey = np.rint(values * np.float32(255 / white)).astype(np.uint8)
    return Image.fromarray(255 - grey if white_is_zero else grey).convert("RGB")


def _array_to_rgb(array: np.ndarray | torch.Tensor, do_convert_rgb: bool, input_data_format: str | None) -> np.ndarray:
    """Grey `(H, W)`, or `(H, W, C)` or `(C, H, W)` with 1, 3 or 4 channels; uint8, or float in 0..1 -> uint8 RGB."""
    if isinstance(array, torch.Tensor):
        if array.is_meta or array.is_nested:
            raise TypeError("An image tensor must hold its pixels; this one is on the meta device, or nested.")
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()
    array = _channels_last_view(array, input_data_format)
    if np.issubdtype(array.dtype, np.floating) and array.size:
        low, high = float(array.min()), float(array.max())
        if not (low >= -0.5 / 255 and high <= 1 + 0.5 / 255):  # not: so that NaN is refused as well
            raise ValueError(
                f"A float image must lie in 0..1, got {low:g}..{high:g}. Divide values in 0..255 by 255 or pass them "
                "as uint8; undo_normalization takes a mean and standard deviation off again."
            )
        array = np.rint(array * 255).clip(0, 255).astype(np.uint8)
    elif array.dtype != np.uint8 and array.size:
        raise TypeError(
            f"An image array must be uint8 in 0..255 or float in 0..1, got {array.dtype}. Convert it, for example "
            "16-bit values with (array // 257).astype('uint8')."
        )
    num_channels = array.shape[-1]
    if num_channels == 4 and array.size:
        return np.asarray(_pil_to_rgb(Image.fromarray(np.ascontiguousarray(array)), do_convert_rgb))
    if num_channels == 1 and not do_convert_rgb:
        raise ValueError("The model takes RGB, the array has 1 channel and do_convert_rgb is False.")
    return np.broadcast_to(array, (*array.shape[:2], 3)) if num_channels == 1 else array


def _channels_last_view(array: np.ndarray, input_data_format: str | None) -> np.ndarray:
    """View an array as `(height, width, channels)`, channels 1, 3 or 4, or say why that is not possible."""
    if array.ndim == 2:
        return array[..., None]
    fits = [array.ndim == 3 and array.shape[axis] in (1, 3, 4) for axis in (0, -1)]
    wanted = {"channels_first": (True, False), "channels_last": (False, True), None: (True, True)}
    name = getattr(input_data_format, "value", input_data_format)
    if name not in wanted:
        raise ValueError(f"input_data_format must be 'channels_first' or 'channels_last', got {input_data_format!r}.")
    first, last = (fit and want for fit, want in zip(fits, wanted[name], strict=True))
    if first == last:
        problem = "can be read either way" if first else f"does not fit input_data_format={name!r}"
        raise ValueError(
            f"An image array of shape {array.shape} {problem}. It must be (height, width), or 1, 3 or 4 channels "
            "first or last; input_data_format='channels_first' or 'channels_last' says which."
        )
    return array.transpose(1, 2, 0) if first else array


# ---------------------------------------------------------------------------------------------------------------------
# Documents
# ---------------------------------------------------------------------------------------------------------------------


class Page:
    """One page of a document: an image that is made when it is needed.

    Attributes:
        document: the `Document` that it belongs to.
        number: of the page in the whole file, from 1.
    """

    def __init__(self, document: "Document", number: int):
        self.document, self.number = document, number

    def __repr__(self) -> str:
        return f"<page {self.number} of {self.document.name}>"

    @property
    def is_scalable(self) -> bool:
        """Whether the page has no pixels of its own, so that it can be drawn at every size: a page of a PDF."""
        return self.document._source.is_scalable

    @property
    def size(self) -> tuple[float, float]:
        """Width and height as a reader sees the page, rotated and cropped: points of a PDF, pixels of an image."""
        return self.document._read(self.number, "size")

    @property
    def natural_size(self) -> tuple[int, int]:
        """Height and width in pixels: those of an image, and those of a PDF's page at 150 dpi."""
        width, height = self.size
        if not self.is_scalable:
            return int(height), int(width)
        scale = NATURAL_DPI / POINTS_PER_INCH
        return max(1, round(height * scale)), max(1, round(width * scale))

    @property
    def text(self) -> str | None:
        """The text layer of a PDF's page, which may be empty; None for an image."""
        return self.document._read(self.number, "text")

    def render(self, height: int | None = None, width: int | None = None) -> Image.Image:
        """Return the page as an RGB image.

        Args:
            height, width: in pixels, for a page of a PDF; None takes the natural size. Annotations and what is filled
                into forms are drawn.

        Raises:
            ValueError: if the page cannot be drawn, or a size is given for a page that has its own.
        """
        if self.is_scalable:
            natural = self.natural_size
            height, width = height or natural[0], width or natural[1]
            _check_size(height, width)
        elif height is not None or width is not None:
            raise ValueError(f"{self!r} has pixels of its own; resize the image that render() returns.")
        return self.document._read(self.number, "image", height, width)


class Document(Sequence):
    """The chosen pages of a document, a sequence of `Page`. It is a context manager, which closes the file at its end.

    Attributes:
        name: the file's name, or "document".
        page_numbers: the numbers of the chosen pages in the file, from 1, in the order in which they were chosen.
        num_pages: pages of the whole file.
    """

    def __init__(self, source: "_PdfFile | _ImageFile", name: str, pages: str | Iterable[int] | None):
        self._source, self.name, self.num_pages = source, name, source.num_pages
        self.page_numbers = _chosen_pages(pages, self.num_pages, name)

    def __len__(self) -> int:
        return len(self.page_numbers)

    def __getitem__(self, index: Any) -> Any:
        """Return a page, or a list of pages for a slice."""
        if isinstance(index, slice):
            return [Page(self, number) for number in self.page_numbers[index]]
        return Page(self, self.page_numbers[index])

    def __repr__(self) -> str:
        return f"<document {self.name}, {len(self)} of {self.num_pages} pages>"

    def __enter__(self) -> "Document":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; its pages cannot be read any more."""
        self._source.close()

    def _read(self, number: int, what: str, *args: Any) -> Any:
        try:
            return getattr(self._source, what)(number - 1, *args)
        except DECODING_ERRORS as error:
            raise ValueError(
                f"Page {number} of {self.name} cannot be used: {str(error) or type(error).__name__}."
            ) from error


# transformers runs a copy of this file of its own, whose classes are others: pages and documents of both are taken.


def is_page(value: Any) -> bool:
    """Say whether a value is a `Page`."""
    return hasattr(value, "is_scalable") and hasattr(value, "natural_size")


def is_document(value: Any) -> bool:
    """Say whether a value is a `Document`."""
    return hasattr(value, "page_numbers") and isinstance(value, Sequence)


def open_document(source: Any, *, pages: str | Iterable[int] | None = None, password: str | None = None) -> Document:
    """Open a PDF, or an image file whose frames are the pages (a TIFF of several pages, an animated GIF or WebP).

    Args:
        source: a path, a `file:` or `data:` URL, the bytes of a file, a file opened in binary mode (it is read from
            its start, its position stays), or a PIL image. A `Document` gives one with other pages.
        pages: which pages, in this order: a text such as "1-3,7,10-" or numbers, from 1; None takes all.
        password: of an encrypted PDF.

    Raises:
        ValueError: if the file is damaged, encrypted or empty, or has no such page.
        ImportError: if pypdfium2 is not installed and the file is a PDF.
        TypeError: if `source` is of no supported kind.
    """
    if is_document(source):
        return Document(source._source, source.name, source.page_numbers if pages is None else pages)
    if not isinstance(password, str | None):
        raise TypeError(f"password must be a text, got {type(password).__name__}.")
    name = "document"
    try:
        if isinstance(source, Image.Image):
            return Document(_opened_image(source), os.path.basename(getattr(source, "filename", "")) or name, pages)
        if isinstance(source, str):
            source = _named_file(source)
        elif hasattr(source, "read"):
            name = os.path.basename(str(getattr(source, "name", name)))
            with _at_its_start(source) as file:
                source = file.read()
        if isinstance(source, (str, os.PathLike)):
            _check_file(source)
            name = os.path.basename(source)
            with open(source, "rb") as file:
                start = file.read(PDF_START_WITHIN)
        elif isinstance(source, (bytes, bytearray, memoryview)):
            source = bytes(source)
            start = source[:PDF_START_WITHIN]
        else:
            raise TypeError(
                "A document is a path, a file: or data: URL, the bytes of a file, a file opened in binary mode or a PIL "
                f"image; got {type(source).__name__}."
            )
        if not start:
            raise ValueError("it is empty")
        if PDF_START in start:
            opened: _PdfFile | _ImageFile = _PdfFile(source, password)
        else:
            opened = _ImageFile(source if isinstance(source, (str, os.PathLike)) else io.BytesIO(source))
    except TypeError:
        raise
    except DECODING_ERRORS as error:
        shown = name if name != "document" else _shown(source)
        raise ValueError(
            f"The document {shown} cannot be used: {str(error) or type(error).__name__}. Give a complete PDF, or an "
            "image file that Pillow decodes."
        ) from error
    return Document(opened, name, pages)


def document_of_part(part: dict[str, Any]) -> Document:
    """Open the document that a content part of a message holds.

    Args:
        part: `{"type": "document", "document": source, "pages": "1-3", "password": ...}`, where `source` may also
            stand under `url`, `path` or `base64`, or `{"type": "file", "file": {"file_data": data URL, ...}}` as
            OpenAI clients send it; that may also hold `pages` and `password`. `file_data` is never taken for a path.

    Raises:
        ValueError, TypeError, ImportError: see `open_document`; also for a part without a document.
    """
    holder = part if part["type"] == "document" else part.get("file")
    holder = holder if isinstance(holder, dict) else {}
    names = ("document", "url", "path", "base64") if part["type"] == "document" else ("file_data",)
    source = next((holder[name] for name in names if holder.get(name) is not None), None)
    if source is None:
        raise ValueError(
            f"A part of type {part['type']!r} needs {' or '.join(names)} with the file, got {_shown(str(part))}. Files "
            "that were uploaded before (file_id) are not known here."
        )
    if part["type"] == "file" and isinstance(source, str):
        try:
            source = base64_bytes(source)
        except ValueError as error:
            raise ValueError(
                f"file_data must be a URL like 'data:application/pdf;base64,...', got {_shown(source)}. The document part "
                "takes a path."
            ) from error
    return open_document(source, pages=holder.get("pages"), password=holder.get("password"))


def page_spans(pages: str) -> list[tuple[int, int | None]]:
    """Read which pages a text names, such as "1-3,7,10-".

    Returns:
        the first and the last page of each span, from 1; None for a span to the end.

    Raises:
        ValueError: if the text has another form.
    """
    spans: list[tuple[int, int | None]] = []
    for part in pages.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})\s*(-\s*(\d{1,9})?)?\s*", part, re.ASCII)
        if not match:
            raise ValueError(f"pages must look like '1-3,7' or '12-', numbers from 1, got {pages!r:.80}.")
        first = int(match[1])
        spans.append((first, int(match[3]) if match[3] else None if match[2] else first))
    return spans


def _chosen_pages(pages: str | Iterable[int] | None, num_pages: int, name: str) -> tuple[int, ...]:
    """Return page numbers, checked; see `open_document`."""
    if pages is None:
        return tuple(range(1, num_pages + 1))
    spans: list[tuple[int, int]] = []
    if isinstance(pages, str):
        spans += [(first, num_pages if last is None else last) for first, last in page_spans(pages)]
    else:
        for number in [pages] if isinstance(pages, int) else pages:
            if isinstance(number, bool) or not isinstance(number, (int, np.integer)):
                raise TypeError(f"pages must be a text such as '1-3,7' or whole numbers, got {number!r}.")
            spans.append((int(number), int(number)))
    for first, last in spans:
        if not 1 <= first <= last <= num_pages:
            asked = first if first == last else f"{first}-{last}"
            raise ValueError(f"{name} has the pages 1 to {num_pages}, so there is no page {asked}.")
    chosen = tuple(number for first, last in spans for number in range(first, last + 1))
    if not chosen:
        raise ValueError("pages names no page. Leave it out to take all pages.")
    return chosen


_OPEN_PDFS: "weakref.WeakSet[_PdfFile]" = weakref.WeakSet()


def _close_pdfs() -> None:
    """Close what is open when Python ends; pypdfium2 complains of what it has to close itself."""
    for pdf in list(_OPEN_PDFS):
        pdf.close()


class _PdfFile:
    """A PDF. Indices of pages count from 0."""

    is_scalable = True

    def __init__(self, source: str | os.PathLike | bytes, password: str | None):
        try:
            import pypdfium2
        except ImportError as error:
            raise ImportError("PDFs are drawn by pypdfium2, which is not installed: pip install pypdfium2") from error
        if not _OPEN_PDFS:
            atexit.unregister(_close_pdfs)
            atexit.register(_close_pdfs)  # after pypdfium2's own, so that it runs before
        _OPEN_PDFS.add(self)
        self._pdf: Any = None
        # Kept, because transformers loads no file that imports an absent package outside of `try`.
        self._pypdfium2 = pypdfium2
        # PDFium is not safe with threads. The lock belongs to the module: transformers runs a second copy of this file.
        # Reentrant, because collecting a document may close it inside such a call.
        self._lock = vars(pypdfium2).setdefault("_nemotron_vl_lock", threading.RLock())
        with self._lock:
            try:
                self._pdf = pypdfium2.PdfDocument(
                    os.fspath(source) if isinstance(source, os.PathLike) else source, password=password
                )
            except pypdfium2.PdfiumError as error:
                if getattr(error, "err_code", None) == pypdfium2.raw.FPDF_ERR_PASSWORD:
                    problem = "it is encrypted, and needs a password" if password is None else "the password is wrong"
                    raise ValueError(problem) from error
                raise ValueError(f"PDFium cannot read it; it is damaged ({error})") from error
            self.num_pages = len(self._pdf)
            if not self.num_pages:
                raise ValueError("it has no pages")
            if self._pdf.get_formtype() != pypdfium2.raw.FORMTYPE_NONE:
                self._pdf.init_forms()  # what is filled in is drawn

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        if getattr(self, "_pdf", None) is not None:
            with self._lock:
                pdf, self._pdf = self._pdf, None
                if pdf is not None:
                    pdf.close()

    @contextlib.contextmanager
    def _page(self, index: int) -> Iterator[Any]:
        with self._lock:
            if self._pdf is None:
                raise ValueError("the document is closed")
            page = self._pdf[index]
            try:
                yield page
            finally:
                page.close()

    def size(self, index: int) -> tuple[float, float]:
        with self._lock:
            if self._pdf is None:
                raise ValueError("the document is closed")
            width, height = self._pdf.get_page_size(index)
        if not (width > 0 and height > 0 and math.isfinite(width + height)):
            raise ValueError(f"its size is {width:g} x {height:g} points")
        return width, height

    def text(self, index: int) -> str:
        with self._page(index) as page:
            layer = page.get_textpage()
            try:
                return layer.get_text_bounded()
            finally:
                layer.close()

    def image(self, index: int, height: int, width: int) -> Image.Image:
        pdfium = self._pypdfium2.raw
        with self._page(index) as page:
            bitmap = self._pypdfium2.PdfBitmap.new_native(width, height, pdfium.FPDFBitmap_BGRx)
            try:
                bitmap.fill_rect((255, 255, 255, 255), 0, 0, width, height)
                place = (bitmap.raw, page.raw, 0, 0, width, height, 0, pdfium.FPDF_ANNOT)
                pdfium.FPDF_RenderPageBitmap(*place)
                if self._pdf.formenv is not None:
                    pdfium.FPDF_FFLDraw(self._pdf.formenv.raw, *place)
                return bitmap.to_pil().convert("RGB")  # a copy: the bitmap's memory goes with it
            finally:
                bitmap.close()


def _opened_image(image: Image.Image) -> "_ImageFile":
    """Open the pages of a caller's PIL image: its current pixels, or, if its file has several frames, a copy of that.

    Pillow forgets changed pixels as soon as it goes to another frame, or counts them, so the caller's object is not
    touched.
    """
    file = getattr(image, "fp", None) or getattr(image, "_fp", None)
    if image.format in PAGED_FORMATS and hasattr(file, "seekable") and not file.closed:
        with _at_its_start(file) as start:
            copied = _ImageFile(io.BytesIO(start.read()))
        if copied.num_pages > 1:
            return copied
    return _ImageFile(load_image(image))


class _ImageFile:
    """An image file, or an RGB image. Indices of frames count from 0."""

    is_scalable = False

    def __init__(self, source: Any):
        self._image = source if isinstance(source, Image.Image) else _open(source)
        self._lock = threading.Lock()
        self.num_pages = getattr(self._image, "n_frames", 1) if self._image.format in PAGED_FORMATS else 1
        self._is_closed = False

    def close(self) -> None:
        self._is_closed = True
        if self._image.format is not None:  # of a file; others are the caller's
            self._image.close()

    def size(self, index: int) -> tuple[int, int]:
        with self._at(index) as image:
            # Pillow turns a TIFF itself, and its size is that of the turned one.
            sideways = image.format != "TIFF" and image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            return image.size[::-1] if sideways else image.size

    def text(self, index: int) -> None:
        return None

    def image(self, index: int, height: None, width: None) -> Image.Image:
        with self._at(index) as image:
            loaded = _pil_to_rgb(_decode(image), True)  # by the tags of a TIFF, which a turned copy has not
            orientation = image.getexif().get(ExifTags.Base.Orientation) if image.format else None
            loaded = loaded.copy() if loaded is image else loaded  # the next frame is decoded into the same object
        if orientation is not None:
            loaded.getexif()[ExifTags.Base.Orientation] = orientation
            ImageOps.exif_transpose(loaded, in_place=True)
        _check_size(*height_and_width(loaded))
        return loaded

    @contextlib.contextmanager
    def _at(self, index: int) -> Iterator[Image.Image]:
        """Yield the image at a frame."""
        with self._lock:
            if self._is_closed:
                raise ValueError("the document is closed")
            if self.num_pages > 1:
                self._image.seek(index)
            yield self._image
