"""How well a checkpoint reads pages of ordinary layouts that it has never seen.

    python -m evaluation.pages --model runs/nano --documents 1000 --out runs/pages.json

As `evaluation.nano`, on the pages of `documents.contents`: half of them in a typeface, half with a layout, three in ten
questions with a phrasing that training lacks. "declined" is the share of questions with an answer on the page to which
the checkpoint says that there is none.
"""

import json
import random
import time

import torch

from documents import fonts
from documents.asking import Asker, ask, compare, text_only
from documents.contents import KINDS, make_page
from documents.questions import ABSENT, Conversation
from documents.typesetting import draw, set_page
from evaluation.commands import conditions, evaluation_parser, write_report
from evaluation.nano import SPLIT, TASKS, Question, evaluate, markdown, mean, summarize
from tools.chat import load

SUITED = {
    "price": ("receipt", "bill", "invoice"),
    "cell": ("table",),
    "html": ("table",),
    "chart": ("chart",),
    "field": tuple(kind for kind in KINDS if kind != "chart"),
}


def make_question(seed: int, task: str | None = None) -> Question:
    """Return the question of a seed; by default the seed's place in `TASKS` gives the task."""
    task = task or TASKS[seed % len(TASKS)]
    if task == "text":
        conversation = text_only(seed, SPLIT, 1)
    elif task == "compare":
        conversation = compare(seed, SPLIT, 1)
    elif task == "follow-up":
        conversation = ask(seed, SPLIT, make_page(1000 * seed, SPLIT), 3)
    else:
        conversation = about_one_page(task, seed)
    prints = [set_page(page, seed + 10**6 * i, SPLIT) for i, page in enumerate(conversation.documents)]
    images = [draw(printed, seed + 10**6 * i, SPLIT) for i, printed in enumerate(prints)]
    pages = conversation.documents
    turn = conversation.turns[-1]
    if task == "follow-up":
        turn.task = task
    return Question(
        turn=turn,
        images=images,
        kind=pages[0].kind if pages else "none",
        seen_font=all(printed.typeface in fonts.TYPEFACES["train"] for printed in prints),
        seen_layout=all(page.is_seen for page in pages),
        earlier=[earlier.question for earlier in conversation.turns[:-1]],
    )


def about_one_page(task: str, seed: int) -> Conversation:
    rng = random.Random(f"evaluation {seed}")
    asker = Asker(rng, SPLIT)
    makers = {
        "field": asker.field,
        "price": asker.price,
        "cell": asker.price,
        "chart": asker.field if rng.random() < 0.5 else asker.price,
        "absent": asker.absent,
        "yes/no": asker.check,
        "transcription": asker.transcribe,
        "html": asker.html,
    }
    for attempt in range(1000):
        page = make_page(1000 * seed + attempt, SPLIT, rng.choice(SUITED.get(task, tuple(KINDS))))
        turn = makers[task](page)
        if turn.task == task:
            return Conversation([page], [turn])
    raise ValueError(f"No {task!r} question can be asked.")


def make_questions(num_documents: int) -> list[Question]:
    """Return questions about `num_documents` pages with `TASKS` in turn, and a twentieth more as last of three."""
    further = range(num_documents, num_documents + num_documents // 20)
    return [make_question(seed) for seed in range(num_documents)] + [
        make_question(seed, "follow-up") for seed in further
    ]


def main() -> None:
    parser = evaluation_parser(__doc__)
    parser.add_argument("--documents", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=1, help="answers at a time; pages must have as many tiles")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    fonts.require("train", "heldout")
    model, processor = load(arguments.model)
    questions = make_questions(arguments.documents)
    started = time.monotonic()
    rows = evaluate(model, processor, questions, arguments.batch_size)
    answerable = [
        row for row in rows if row["wanted"] != ABSENT and row["task"] in ("field", "price", "cell", "chart")
    ]
    report = {
        **conditions(arguments),
        "documents": arguments.documents,
        "seconds": round(time.monotonic() - started),
        "declined": mean(row["given"] == ABSENT for row in answerable),
        "tasks": summarize(rows),
    }
    write_report(arguments.out, report | {"answers": rows})
    print(f"{markdown(report)}\n{json.dumps(report)}")


if __name__ == "__main__":
    main()
