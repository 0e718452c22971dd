"""Talk to a checkpoint about images, turn by turn.

    python -m tools.chat examples/receipt.png --question "What is the total?"
    python -m tools.chat contract.pdf --pages 1-3,7 --max-num-tiles fit
    python -m tools.chat page.png other.png --model ../my-checkpoint --tiles tiles.png

Images, PDFs, TIFFs of several pages and animated images can be given; every page is an image. The command prints how
each is cut into tiles and how many tokens it costs, streams the answer, and adds its confidence (docs/fields.md says
what that is). Low ones often show a page that the model cannot read. Without `--question` it asks for questions until
one is empty; Ctrl-C ends an answer, and between answers the chat. `--tiles` writes the first page with its tiles drawn
over it.
"""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from nemotron_vl.image_processing import Tiling, count_tiles, page_tiling, render_page, select_tile_grid
from nemotron_vl.pictures import is_page, open_document
from PIL import Image, ImageDraw
from transformers import AutoModel, AutoProcessor, TextStreamer

from . import ROOT
from .command_line import command_parser, require_checkpoint
from .legibility import warning
from .threads import choose_threads

CODE_FILE = "modeling_nemotron_vl.py"
GRID_COLOUR = (220, 30, 30)
MAX_NEW_TOKENS = 400
QUESTION_TOKENS = 256  # of the context, that pages leave for questions
NUMBER_COLOUR = (*GRID_COLOUR, 60)  # the page stays legible through it

# transformers warns several times about a directory whose name is no Python identifier ("my clone"), which works.
getLogger("transformers.dynamic_module_utils").addFilter(
    lambda record: "is not a valid Python identifier" not in record.getMessage()
)


def load(directory: Path, **options: Any) -> tuple[Any, Any]:
    """Return model and processor of a checkpoint directory; `nano/` of this repository finds its code at the root.

    Args:
        directory: holds the code too, or is a subfolder of the folder that holds it.
        options: arguments of `AutoModel.from_pretrained`; without `dtype` the checkpoint's is used.

    Raises:
        ValueError: if `directory` is no directory, or holds no checkpoint or one without our code.
    """
    require_checkpoint(directory)
    source = directory.resolve()
    where: dict[str, Any] = {"trust_remote_code": True}
    if not (source / CODE_FILE).exists():
        if not (source.parent / CODE_FILE).exists():
            raise ValueError(
                f"{directory} has no code of this repository ({CODE_FILE}) in it or in the directory above it. This "
                f"writes a directory that has: python -m tools.adopt {directory} --out DIR."
            )
        source, where["subfolder"] = source.parent, source.name
    model = AutoModel.from_pretrained(source, **{"dtype": "auto", **options}, **where)
    return model.eval(), AutoProcessor.from_pretrained(source, **where)


def draw_tiles(image_processor: Any, image: Any, max_num_tiles: int | None = None) -> Image.Image:
    """Return an image, or a page of a document, with the borders of its tiles and their numbers drawn over it."""
    image, tiling = drawn(image_processor, image, max_num_tiles)
    rows, columns = select_tile_grid(image.height, image.width, tiling)
    grid = Image.new("RGBA", image.size)
    canvas = ImageDraw.Draw(grid)
    line_width = max(2, max(image.size) // 500)
    for tile in range(rows * columns):
        row, column = divmod(tile, columns)
        left, right = (round(image.width * edge / columns) for edge in (column, column + 1))
        top, bottom = (round(image.height * edge / rows) for edge in (row, row + 1))
        canvas.rectangle((left, top, right - 1, bottom - 1), outline=GRID_COLOUR, width=line_width)
        middle = ((left + right) / 2, (top + bottom) / 2)
        canvas.text(middle, str(tile + 1), fill=NUMBER_COLOUR, font_size=(bottom - top) / 3, anchor="mm")
    return Image.alpha_composite(image.convert("RGBA"), grid).convert("RGB")


def drawn(image_processor: Any, image: Any, max_num_tiles: int | None) -> tuple[Image.Image, Tiling]:
    """Return an image, or that of a page of a document, and how it is cut into tiles."""
    tiling = image_processor.tiling
    tiling = tiling if max_num_tiles is None else replace(tiling, max_num_tiles=max_num_tiles)
    return (render_page(image, tiling), page_tiling(image, tiling)[1]) if is_page(image) else (image, tiling)


def describe(processor: Any, image: Any, max_num_tiles: int | None = None) -> str:
    """Say in one line how an image, or a page of a document, is cut into tiles and how many tokens it costs."""
    image, tiling = drawn(processor.image_processor, image, max_num_tiles)
    rows, columns = select_tile_grid(image.height, image.width, tiling)
    num_tiles = count_tiles(image.height, image.width, tiling)
    num_tokens = processor.tokens_per_tile * num_tiles + 2
    return (
        f"{image.width} x {image.height} px -> {columns} x {rows} tiles"
        f"{' and a thumbnail' if num_tiles > rows * columns else ''} -> {num_tokens} tokens"
    )


class Conversation:
    """A chat about images, or pages of documents, that remembers its turns."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        images: list[Any],
        max_new_tokens: int = MAX_NEW_TOKENS,
        max_num_tiles: int | None = None,
    ):
        self.model = model
        self.processor = processor
        options = {"return_tensors": "pt", "max_num_tiles": max_num_tiles}
        self.features = processor.image_processor(images, **options) if images else {}
        self.num_images = len(images)
        self.max_new_tokens = max_new_tokens
        self.history: list[tuple[str, str]] | None = None
        self.confidence: float | None = None  # of the last answer, as `chat()` returns it

    @torch.no_grad()
    def ask(self, question: str) -> str:
        """Stream the answer to standard output and return it."""
        if self.history is None:
            question = "<image>\n" * self.num_images + question
        streamer = TextStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        answer, self.history, self.confidence = self.model.chat(
            self.processor,
            question=question,
            generation_config={"max_new_tokens": self.max_new_tokens, "do_sample": False},
            history=self.history,
            return_history=True,
            return_confidence=True,
            streamer=streamer,
            **self.features,
        )
        return answer


def percent(confidence: float | None) -> str:
    """Return a confidence for people; only 1 is written as 100 %."""
    if confidence is None:
        return ""
    return "100 %" if confidence == 1 else f"{min(100 * confidence, 99.9):.1f} %"


def typed_questions() -> Iterator[str]:
    """Yield the lines that the user types, up to an empty one or the end of the input."""
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while question := input("> ").strip():
            yield question
        return
    print()  # the prompt's line has not ended


def number_or_fit(text: str) -> int | str:
    """Return what `--max-num-tiles` names, for argparse."""
    if text != "fit" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a number or 'fit', got {text!r}")
    return text if text == "fit" else int(text)


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("chat", __doc__)
    parser.add_argument("images", type=Path, nargs="*", help="images and documents")
    parser.add_argument("--pages", help="of each document, such as 1-3,7 or 12-; all without it")
    parser.add_argument("--password", help="of encrypted PDFs")
    parser.add_argument(
        "--max-num-tiles", type=number_or_fit, help="of each page, or 'fit': as many as the context holds"
    )
    parser.add_argument("--model", type=Path, default=ROOT / "nano")
    parser.add_argument("--question", nargs="+", help="ask these, one after the other, and stop")
    parser.add_argument("--tiles", type=Path, help="file for the first image with its tiles drawn over it")
    arguments = parser.parse_args(argv)

    documents = [open_document(path, pages=arguments.pages, password=arguments.password) for path in arguments.images]
    model, processor = load(arguments.model)
    choose_threads(model)
    pages = [page for document in documents for page in document]
    max_num_tiles = None
    if pages:
        room = model.config.max_sequence_length - MAX_NEW_TOKENS - QUESTION_TOKENS
        max_num_tiles = processor.fitting_options(pages, arguments.max_num_tiles, room)["max_num_tiles"]
    for path, document in zip(arguments.images, documents, strict=True):
        for page in document:
            name = f"{path}, page {page.number}" if document.num_pages > 1 else path
            print(f"{name}: {describe(processor, page, max_num_tiles)}")
            image, tiling = drawn(processor.image_processor, page, max_num_tiles)
            if note := warning(model, tiling, image):
                print(f"{name}: {note}")
    if arguments.tiles and pages:
        draw_tiles(processor.image_processor, pages[0], max_num_tiles).save(arguments.tiles)
        print(f"Tiles drawn over the image: {arguments.tiles}")
    conversation = Conversation(model, processor, pages, max_num_tiles=max_num_tiles)
    for question in arguments.question or ():
        print(f"> {question}")
        conversation.ask(question)
        print(f"(confidence {percent(conversation.confidence)})")
    for question in () if arguments.question else typed_questions():
        try:
            conversation.ask(question)
            print(f"(confidence {percent(conversation.confidence)})")
        except KeyboardInterrupt:
            print("\n(The answer was stopped; the chat goes on as if it had not been asked for.)")
        except ValueError as error:  # a prompt beyond the context, for example
            print(f"error: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
