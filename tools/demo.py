"""Ask nano about a receipt it has never seen: `make demo`.

    python -m tools.demo [CHECKPOINT]

It shows how the image is cut into tiles and how many tokens it costs, streams two answers, and writes the image with
its tiles drawn over it.
"""

import sys
import time
from pathlib import Path

from PIL import Image

from . import ROOT
from .chat import Conversation, describe, draw_tiles, load
from .command_line import command_parser
from .legibility import warning
from .threads import choose_threads

RECEIPT = ROOT / "examples" / "receipt.png"
QUESTIONS = ("What is the total?", "Who is the seller?")


def run(checkpoint: Path, image: Image.Image, tiles: Path) -> list[str]:
    """Load `checkpoint`, print what happens to `image`, stream the answers and return them."""
    model, processor = load(checkpoint)
    choose_threads(model)
    print(f"Image:    {describe(processor, image)}")
    if note := warning(model, processor, image):
        print(f"Note:     {note}")
    try:
        draw_tiles(processor.image_processor, image).save(tiles)
        print(f"Tiles:    drawn over the image in {tiles}")
    except OSError as error:  # a checkout that cannot be written to; the answers need no file
        print(f"Tiles:    the image with its tiles was not written to {tiles}: {error.strerror}")
    conversation = Conversation(model, processor, [image])
    answers = []
    for question in QUESTIONS:
        started = time.monotonic()
        print(f"Question: {question}\nAnswer:   ", end="", flush=True)
        answers.append(conversation.ask(question))
        print(f"          ({time.monotonic() - started:.1f} s)")
    return answers


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("demo", __doc__)
    parser.add_argument("checkpoint", type=Path, nargs="?", default=ROOT / "nano")
    parser.add_argument("--tiles", type=Path, default=Path("tiles.png"))
    arguments = parser.parse_args(argv)
    run(arguments.checkpoint, Image.open(RECEIPT).convert("RGB"), arguments.tiles)
    return 0


if __name__ == "__main__":
    sys.exit(main())
