"""Ask nano about a receipt it has never seen: `make demo`.

    python -m tools.demo [CHECKPOINT] [--document FILE]

It shows how the image is cut into tiles and how many tokens it costs, streams two answers with their
confidence, and writes the image with its tiles drawn over it.
"""

import sys
import time
from pathlib import Path
from typing import Any

from nemotron_vl.pictures import open_document

from . import ROOT
from .chat import Conversation, describe, draw_tiles, drawn, load, percent
from .command_line import command_parser
from .legibility import warning
from .threads import choose_threads

RECEIPT = ROOT / "examples" / "receipt.png"
QUESTIONS = ("What is the total?", "Who is the seller?")


def run(checkpoint: Path, image: Any, tiles: Path, max_num_tiles: int | None = None) -> list[str]:
    """Load `checkpoint`, print what happens to an image or a page, stream the answers and return them."""
    model, processor = load(checkpoint)
    choose_threads(model)
    print(f"Image:    {describe(processor, image, max_num_tiles)}")
    page, tiling = drawn(processor.image_processor, image, max_num_tiles)
    if note := warning(model, tiling, page):
        print(f"Note:     {note}")
    try:
        draw_tiles(processor.image_processor, image, max_num_tiles).save(tiles)
        print(f"Tiles:    drawn over the image in {tiles}")
    except OSError as error:  # a checkout that cannot be written to; the answers need no file
        print(f"Tiles:    the image with its tiles was not written to {tiles}: {error.strerror}")
    conversation = Conversation(model, processor, [image], max_num_tiles=max_num_tiles)
    answers = []
    for question in QUESTIONS:
        started = time.monotonic()
        print(f"Question: {question}\nAnswer:   ", end="", flush=True)
        answers.append(conversation.ask(question))
        print(f"          ({time.monotonic() - started:.1f} s, confidence {percent(conversation.confidence)})")
    return answers


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("demo", __doc__)
    parser.add_argument("checkpoint", type=Path, nargs="?", default=ROOT / "nano")
    parser.add_argument("--tiles", type=Path, default=Path("tiles.png"))
    parser.add_argument("--document", type=Path, default=RECEIPT, help="a PDF or an image in place of the receipt")
    parser.add_argument("--page", type=int, default=1, help="of the document, which is asked about")
    parser.add_argument("--max-num-tiles", type=int, help="of the page")
    arguments = parser.parse_args(argv)
    (page,) = open_document(arguments.document, pages=[arguments.page])
    run(arguments.checkpoint, page, arguments.tiles, arguments.max_num_tiles)
    return 0


if __name__ == "__main__":
    sys.exit(main())
