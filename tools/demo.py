"""Ask nano about a receipt it has never seen: `make demo`.

    python -m tools.demo [CHECKPOINT]

Shows how the page is cut into tiles and what it costs, streams two answers, and writes the tiles drawn over the page.
"""

import argparse
import sys
import time
from pathlib import Path

from PIL import Image

from . import ROOT
from .chat import Conversation, describe, draw_tiles, load

RECEIPT = ROOT / "examples" / "receipt.png"
QUESTIONS = ("What is the total?", "Who is the seller?")


def run(checkpoint: Path, picture: Image.Image, tiles: Path) -> list[str]:
    """Load `checkpoint`, print what happens to `picture`, stream the answers and return them."""
    model, processor = load(checkpoint)
    print(f"Picture:  {describe(processor, picture)}")
    draw_tiles(processor.image_processor, picture).save(tiles)
    print(f"Tiles:    drawn over the page in {tiles}")
    conversation = Conversation(model, processor, [picture])
    answers = []
    for question in QUESTIONS:
        started = time.monotonic()
        print(f"Question: {question}\nAnswer:   ", end="", flush=True)
        answers.append(conversation.ask(question))
        print(f"          ({time.monotonic() - started:.1f} s)")
    return answers


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", default=ROOT / "nano")
    parser.add_argument("--tiles", type=Path, default=Path("tiles.png"))
    arguments = parser.parse_args(argv)
    run(arguments.checkpoint, Image.open(RECEIPT).convert("RGB"), arguments.tiles)
    return 0


if __name__ == "__main__":
    sys.exit(main())
