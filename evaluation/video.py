"""What nano makes of a film of receipts, although it was not trained on video.

    python -m evaluation.video --clips 100 --out evaluation/results/video.json

A film shows one to four held-out receipts or invoices, each for a second, at ten frames a second in H.264. `model.chat()`
gets the film, takes one frame of each receipt, and is asked for the price of a thing that only one receipt lists. For
comparison the same question is asked about that receipt as an image. Both layouts of the 8B V1 are tried. The last line
of the output is one JSON object.
"""

import io
import json
import random

import av
import numpy as np
import torch
from nemotron_vl.prompts import V1_LAYOUTS
from PIL import Image

from documents import fonts
from documents.contents import make_page
from documents.drawing import draw_page
from documents.pages import Page
from documents.questions import QuestionMaker, Turn
from evaluation.commands import conditions, evaluation_parser, write_report
from evaluation.nano import MAX_NEW_TOKENS_OF_OTHERS, SPLIT, mean
from tools.chat import load
from tools.command_line import progress

FRAMES_PER_SECOND = 10
FRAME_SIZE = (448, 512)  # width and height in pixels, about those of a drawn page, which fills the frame
MOST_RECEIPTS = 4


def film_of(images: list[Image.Image]) -> bytes:
    """Return an MP4 file that shows each image for a second."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND, options={"crf": "18"})
        stream.width, stream.height, stream.pix_fmt = *FRAME_SIZE, "yuv420p"
        for image in images:
            fitted = image.convert("RGB").resize(FRAME_SIZE)
            for _ in range(FRAMES_PER_SECOND):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.array(fitted), format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def make_clip(seed: int, num_receipts: int) -> tuple[list[Page], int, Turn]:
    """Return the pages of a film, the number of the one that is asked about, and the question."""
    rng = random.Random(f"video {num_receipts} {seed}")
    maker = QuestionMaker(rng, SPLIT)
    first = 10**7 + 1000 * seed
    for attempt in range(0, 1000, num_receipts):
        pages = [
            make_page(first + attempt + place, SPLIT, rng.choice(("receipt", "invoice")))
            for place in range(num_receipts)
        ]
        asked = rng.randrange(num_receipts)
        turn = maker.price(pages[asked])
        others = [name for place, page in enumerate(pages) if place != asked for name in page.prices]
        if turn.task == "price" and not any(name in turn.question for name in others):
            return pages, asked, turn
    raise ValueError(f"No price can be asked for about the film {seed}.")


@torch.no_grad()
def evaluate(model, processor, num_clips: int) -> list[dict]:
    """Return a row for each film and layout, with the right answer and the answers to the film and to the image."""
    options = {"max_new_tokens": MAX_NEW_TOKENS_OF_OTHERS, "do_sample": False}
    rows = []
    with progress(total=num_clips * MOST_RECEIPTS, desc="Asking", unit="film") as bar:
        for num_receipts in range(1, MOST_RECEIPTS + 1):
            for seed in range(num_clips):
                pages, asked, turn = make_clip(seed, num_receipts)
                images = [draw_page(page, seed + 10**6 * (place + 1), SPLIT) for place, page in enumerate(pages)]
                film = film_of(images)
                still = model.chat(
                    processor,
                    question=turn.question,
                    generation_config=options,
                    **processor.image_processor(images[asked], return_tensors="pt"),
                )
                for layout in V1_LAYOUTS:
                    given = model.chat(
                        processor,
                        question=turn.question,
                        generation_config=options,
                        video=film,
                        fps=1,
                        video_layout=layout,
                    )
                    rows.append(
                        {"receipts": num_receipts, "layout": layout, "asked": asked, "question": turn.question}
                        | {"wanted": turn.answer, "given": given, "image": still}
                    )
                bar.update()
    return rows


def summarize(rows: list[dict]) -> list[dict]:
    """Return the share of right answers for each number of receipts and each layout."""
    summary = []
    for num_receipts in range(1, MOST_RECEIPTS + 1):
        for layout in V1_LAYOUTS:
            own = [row for row in rows if (row["receipts"], row["layout"]) == (num_receipts, layout)]
            right = {name: mean(float(row[name] == row["wanted"]) for row in own) for name in ("given", "image")}
            summary.append({"receipts": num_receipts, "layout": layout, "films": len(own)} | right)
    return summary


def main() -> None:
    parser = evaluation_parser(__doc__)
    parser.add_argument("--clips", type=int, default=100, help="films of each number of receipts")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    fonts.require("train", "heldout")
    model, processor = load(arguments.model)
    rows = evaluate(model, processor, arguments.clips)
    report = {
        **conditions(arguments),
        "films": summarize(rows),
    }
    write_report(arguments.out, report | {"answers": rows})
    print("| receipts | layout | films | right about the film | right about the image |\n|---|---|---|---|---|")
    for line in report["films"]:
        print("| {receipts} | {layout} | {films} | {given:.3f} | {image:.3f} |".format(**line))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
