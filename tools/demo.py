"""Ask a checkpoint about a picture, through the front doors a user takes.

    python -m tools.demo [CHECKPOINT]

Without a checkpoint it makes a tiny one with random weights, which runs everything and knows nothing.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw
from transformers import AutoModel, AutoProcessor, TextStreamer

from .tiny_checkpoint import make_tiny_checkpoint

QUESTION = "What is the total?"


def draw_receipt() -> Image.Image:
    """Return a small receipt, `(320, 240)` pixels wide and high, in RGB."""
    image = Image.new("RGB", (320, 240), "white")
    draw = ImageDraw.Draw(image)
    lines = [
        "CORNER BAKERY",
        "12 Mill Lane",
        "",
        "2 x Rye bread      7.80",
        "1 x Apple tart     4.70",
        "",
        "TOTAL  12.50",
    ]
    for row, line in enumerate(lines):
        draw.text((24, 20 + 28 * row), line, fill="black", font_size=18)
    return image


def run(checkpoint: Path, picture: Image.Image, question: str) -> str:
    """Load `checkpoint`, print what happens to `picture`, stream the answer to `question` and return it."""
    model = AutoModel.from_pretrained(checkpoint, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    features = processor.image_processor(picture, return_tensors="pt")
    num_tiles = int(features["num_patches"][0])
    print(f"Picture:  {picture.width}x{picture.height} px, cut into {num_tiles} tiles (the thumbnail is the last)")
    print(f"Tokens:   {num_tiles} x {processor.tokens_per_tile} visual tokens, and 2 around them")
    print(f"Question: {question}\nAnswer:   ", end="", flush=True)
    return model.chat(
        processor,
        question=question,
        generation_config={"max_new_tokens": 32, "do_sample": False},
        streamer=TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True),
        **features,
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", help="a directory with weights and this code beside them")
    checkpoint = parser.parse_args(argv).checkpoint
    if checkpoint is not None:
        run(checkpoint, draw_receipt(), QUESTION)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        print(
            "There are no trained weights in this repository yet: a tiny model with RANDOM weights answers nonsense."
        )
        run(make_tiny_checkpoint(Path(folder) / "tiny-random"), draw_receipt(), QUESTION)
    return 0


if __name__ == "__main__":
    sys.exit(main())
