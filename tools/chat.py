"""Talk to a checkpoint about pictures, turn by turn.

    python -m tools.chat examples/receipt.png --question "What is the total?"
    python -m tools.chat page.png other.png --model ../my-checkpoint --tiles tiles.png

Prints how each picture is cut into tiles and how many tokens it costs, streams the answer, and goes on asking until an
empty line when no `--question` is given. `--tiles` writes a picture of the tile grid over each page.
"""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from nemotron_vl.image_processing import load_picture, select_tile_grid
from PIL import Image, ImageDraw
from transformers import AutoModel, AutoProcessor, TextStreamer

from . import ROOT

GRID_COLOUR = (220, 30, 30)
NUMBER_COLOUR = (*GRID_COLOUR, 60)  # the page stays legible through it


def load(directory: Path, **options: Any) -> tuple[Any, Any]:
    """Return model and processor of a checkpoint directory; `nano/` of this repository finds its code at the root.

    Args:
        directory: with the code, or a subfolder of where the code is.
        options: of `AutoModel.from_pretrained`; the dtype is the checkpoint's unless given.
    """
    where: dict[str, Any] = {"trust_remote_code": True}
    source = directory.resolve()
    if not (source / "modeling_nemotron_vl.py").exists():
        source, where["subfolder"] = source.parent, source.name
    model = AutoModel.from_pretrained(source, **{"dtype": "auto", **options}, **where)
    return model.eval(), AutoProcessor.from_pretrained(source, **where)


def open_picture(path: Path) -> Image.Image:
    """Read a file as the processor reads it: upright by its EXIF tag, transparency on white."""
    return load_picture(path)


def tile_grid(image_processor: Any, picture: Image.Image) -> tuple[int, int]:
    """Rows and columns of tiles that the processor cuts a picture into, without the thumbnail."""
    return select_tile_grid(
        picture.height,
        picture.width,
        image_size=image_processor.image_size,
        max_num_tiles=image_processor.max_num_tiles,
        upscale=image_processor.upscale,
        grid_rule=image_processor.grid_rule,
    )


def draw_tiles(image_processor: Any, picture: Image.Image) -> Image.Image:
    """Return the page with the borders of its tiles and their numbers drawn over it."""
    rows, columns = tile_grid(image_processor, picture)
    grid = Image.new("RGBA", picture.size)
    canvas = ImageDraw.Draw(grid)
    line_width = max(2, max(picture.size) // 500)
    for tile in range(rows * columns):
        row, column = divmod(tile, columns)
        left, right = (round(picture.width * edge / columns) for edge in (column, column + 1))
        top, bottom = (round(picture.height * edge / rows) for edge in (row, row + 1))
        canvas.rectangle((left, top, right - 1, bottom - 1), outline=GRID_COLOUR, width=line_width)
        middle = ((left + right) / 2, (top + bottom) / 2)
        canvas.text(middle, str(tile + 1), fill=NUMBER_COLOUR, font_size=(bottom - top) / 3, anchor="mm")
    return Image.alpha_composite(picture.convert("RGBA"), grid).convert("RGB")


def describe(processor: Any, picture: Image.Image) -> str:
    """One line about what a picture becomes."""
    rows, columns = tile_grid(processor.image_processor, picture)
    thumbnail = processor.image_processor.use_thumbnail and rows * columns > 1
    num_tiles = rows * columns + thumbnail
    num_tokens = processor.tokens_per_tile * num_tiles + 2
    return (
        f"{picture.width} x {picture.height} px -> {columns} x {rows} tiles"
        f"{' and a thumbnail' if thumbnail else ''} -> {num_tokens} tokens"
    )


class Conversation:
    """A chat about some pictures that remembers its turns."""

    def __init__(self, model: Any, processor: Any, pictures: list[Image.Image], max_new_tokens: int = 400):
        self.model = model
        self.processor = processor
        self.features = processor.image_processor(pictures, return_tensors="pt") if pictures else {}
        self.num_pictures = len(pictures)
        self.max_new_tokens = max_new_tokens
        self.history: list[tuple[str, str]] | None = None

    @torch.no_grad()
    def ask(self, question: str) -> str:
        """Stream the answer to standard output and return it."""
        if self.history is None:
            question = "<image>\n" * self.num_pictures + question
        streamer = TextStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        answer, self.history = self.model.chat(
            self.processor,
            question=question,
            generation_config={"max_new_tokens": self.max_new_tokens, "do_sample": False},
            history=self.history,
            return_history=True,
            streamer=streamer,
            **self.features,
        )
        return answer


def typed_questions() -> Iterator[str]:
    """What the user types, up to an empty line or the end of the input."""
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while question := input("> ").strip():
            yield question


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, nargs="*")
    parser.add_argument("--model", type=Path, default=ROOT / "nano")
    parser.add_argument("--question", nargs="+", help="ask these, one after the other, and stop")
    parser.add_argument("--tiles", type=Path, help="write the first page with its tiles there")
    arguments = parser.parse_args(argv)

    model, processor = load(arguments.model)
    pictures = [open_picture(path) for path in arguments.pictures]
    for path, picture in zip(arguments.pictures, pictures, strict=True):
        print(f"{path}: {describe(processor, picture)}")
    if arguments.tiles and pictures:
        draw_tiles(processor.image_processor, pictures[0]).save(arguments.tiles)
        print(f"Tiles drawn over the page: {arguments.tiles}")
    conversation = Conversation(model, processor, pictures)
    for question in arguments.question or typed_questions():
        if arguments.question:
            print(f"> {question}")
        conversation.ask(question)
    return 0


if __name__ == "__main__":
    sys.exit(main())
