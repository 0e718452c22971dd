"""How well nano reads pages it has never seen: `make eval-nano`.

    python -m evaluation.nano --documents 1000 --out evaluation/results/nano.json

Each held-out page is drawn as an image and goes through the checkpoint's own processor; one question about it is
answered by `model.chat()`, greedy. The tasks take turns. A twentieth as many pages follow, with the last of three
questions over the checkpoint's own earlier answers ("follow-up"). Names, dates and amounts are never those of training.
Half of the images use a typeface, about half of the pages a layout and three in ten questions a phrasing that training
has not seen. "declined" is the share of questions with an answer on the page to which the checkpoint says that there is
none. The last line of the output is one JSON object.
"""

import json
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from PIL import Image

from documents import fonts
from documents.contents import KINDS, make_page
from documents.distance import edit_distance
from documents.drawing import draw
from documents.questions import ABSENT, Conversation, QuestionMaker, Turn, ask, compare, text_only, verdict_of
from documents.typesetting import set_page
from evaluation.commands import conditions, evaluation_parser, write_report
from tools.chat import load
from tools.command_line import progress

SPLIT = "heldout"
TASKS = ("field",) * 6 + ("price",) * 3 + ("cell", "chart", "absent", "absent", "yes/no", "yes/no", "transcription")
TASKS += ("transcription", "html", "compare", "compare", "text")
SUITED = {
    "price": ("receipt", "bill", "invoice"),
    "cell": ("table",),
    "html": ("table",),
    "chart": ("chart",),
    "field": tuple(kind for kind in KINDS if kind != "chart"),
}
MAX_NEW_TOKENS = {"transcription": 320, "html": 400}
MAX_NEW_TOKENS_OF_OTHERS = 48  # the longest comparison of two suppliers takes 43


@dataclass
class Question:
    """One question after the questions `earlier`, the kind of its document, and what of it training has seen."""

    turn: Turn
    images: list[Image.Image]
    kind: str
    seen_font: bool
    seen_layout: bool
    earlier: list[str] = field(default_factory=list)


def batches(questions: list[Question], batch_size: int) -> Iterator[list[Question]]:
    """Yield batches of questions with equally many images and turns and the same limit of the answer's length."""
    groups: dict[tuple[int, int, int], list[Question]] = defaultdict(list)
    for question in questions:
        limit = MAX_NEW_TOKENS.get(question.turn.task, 0)
        groups[len(question.images), len(question.earlier), limit].append(question)
    for members in groups.values():
        for start in range(0, len(members), batch_size):
            yield members[start : start + batch_size]


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
    maker = QuestionMaker(rng, SPLIT)
    makers = {
        "field": maker.field,
        "price": maker.price,
        "cell": maker.price,
        "chart": maker.field if rng.random() < 0.5 else maker.price,
        "absent": maker.absent,
        "yes/no": maker.check,
        "transcription": maker.transcribe,
        "html": maker.html,
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


@torch.no_grad()
def answer(model, processor, questions: list[Question]) -> list[str]:
    """Return greedy answers of `model.chat()` to the last questions, after its own answers to the earlier ones."""
    images = [question.images for question in questions]
    flat = [image for group in images for image in group]
    pixels = processor.image_processor(flat, return_tensors="pt") if flat else {}
    placeholders = ["<image>\n" * len(group) for group in images]
    longest = max(MAX_NEW_TOKENS.get(question.turn.task, MAX_NEW_TOKENS_OF_OTHERS) for question in questions)
    turns = zip(*([*question.earlier, question.turn.question] for question in questions), strict=True)
    history, answers = None, []
    for texts in turns:
        answers, history = model.chat(
            processor.tokenizer,
            question=list(texts)
            if history
            else [place + text for place, text in zip(placeholders, texts, strict=True)],
            generation_config={"max_new_tokens": longest},
            history=history,
            return_history=True,
            **pixels,
        )
    return answers


def score(question: Question, given: str) -> dict[str, float]:
    """Return the exact match, the character error rate of long answers and the verdict of comparisons."""
    wanted = question.turn.answer
    marks = {"exact": float(given == wanted)}
    if question.turn.task == "compare":
        marks["verdict"] = float(verdict_of(given) == verdict_of(wanted))
    if question.turn.task in MAX_NEW_TOKENS:
        marks["character_error_rate"] = min(1.0, edit_distance(given, wanted) / len(wanted))
    return marks


def summarize(rows: list[dict]) -> dict[str, dict[str, float]]:
    """Return means per task, and the exact matches with seen and with unseen fonts, layouts and phrasings."""
    groups: dict[str, list[dict]] = defaultdict(list)
    for row in rows:
        groups[row["task"]].append(row)
    summary = {}
    for task, members in groups.items():
        summary[task] = {"questions": len(members), "exact": mean(row["exact"] for row in members)}
        for name in ("verdict", "character_error_rate"):
            if name in members[0]:
                summary[task][name] = mean(row[name] for row in members)
        for name in ("seen_font", "seen_layout", "seen_phrasing"):
            summary[task][f"exact_{name}"] = mean(row["exact"] for row in members if row[name])
            summary[task][f"exact_un{name}"] = mean(row["exact"] for row in members if not row[name])
    return summary


def markdown(report: dict) -> str:
    """Return the summary as a table, with the exact matches for unseen fonts, layouts and phrasings."""
    lines = ["| task | questions | exact | unseen font | unseen layout | unseen phrasing | verdict | error rate |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for task, numbers in report["tasks"].items():
        names = ("exact", "exact_unseen_font", "exact_unseen_layout", "exact_unseen_phrasing")
        names += ("verdict", "character_error_rate")
        cells = ["" if numbers.get(name) is None else f"{numbers[name]:.3f}" for name in names]
        lines.append(f"| {task} | {numbers['questions']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def mean(values) -> float | None:
    values = list(values)
    return round(sum(values) / len(values), 4) if values else None


def evaluate(model, processor, questions: list[Question], batch_size: int) -> list[dict]:
    """Return a row for each question: its text, the right answer, the answer given, flags and scores."""
    rows: list[dict] = []
    with progress(total=len(questions), desc="Asking", unit="question") as bar:
        for batch in batches(questions, batch_size):
            for question, given in zip(batch, answer(model, processor, batch), strict=True):
                turn = question.turn
                rows.append(
                    {"task": turn.task, "kind": question.kind, "question": turn.question, "wanted": turn.answer}
                    | {"given": given, "seen_font": question.seen_font, "seen_layout": question.seen_layout}
                    | {"seen_phrasing": turn.seen}
                    | score(question, given)
                )
            bar.update(len(batch))
    return rows


def main() -> None:
    parser = evaluation_parser(__doc__)
    parser.add_argument("--documents", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=10)
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
