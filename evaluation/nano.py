"""How well nano reads documents it has never seen: `make eval-nano`.

    python -m evaluation.nano --documents 1000 --out evaluation/results/nano.json

Each held-out document is drawn as an image and goes through the checkpoint's own processor; one question about it is
answered by `model.chat()`, greedy. The tasks take turns. A tenth as many documents follow with two further tasks: the
last of three questions over the checkpoint's own earlier answers ("follow-up"), and documents of two tiles ("long").
Names, dates and amounts are never those of training. Half of the images use a font, half of the pages a layout and
three in ten questions a phrasing that training has not seen. The last line of the output is one JSON object.
"""

import json
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from PIL import Image

from documents.distance import edit_distance
from documents.drawing import FONTS, draw, random_style, require_fonts
from documents.generator import KINDS, LONG_KINDS, NUM_LAYOUTS, document
from documents.questions import Conversation, QuestionMaker, Turn, ask, compare, text_only, verdict_of
from evaluation.commands import conditions, evaluation_parser, write_report
from tools.chat import load
from tools.command_line import progress

SPLIT = "heldout"
TASKS = ("field",) * 6 + ("price",) * 3 + ("cell", "chart", "absent", "absent", "yes/no", "yes/no", "transcription")
TASKS += ("transcription", "html", "compare", "compare", "text")
# These come after the documents of the tasks above, so that their seeds do not change.
FURTHER_TASKS = ("follow-up", "long")
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


def make_questions(num_documents: int, kinds: tuple[str, ...]) -> list[Question]:
    """Return questions about `num_documents` documents with `TASKS` in turn, and a tenth more of the further tasks."""
    further = range(num_documents, num_documents + num_documents // 10)
    return [make_question(seed, kinds) for seed in range(num_documents)] + [
        make_question(seed, kinds, FURTHER_TASKS[seed % len(FURTHER_TASKS)]) for seed in further
    ]


def make_question(seed: int, kinds: tuple[str, ...], task: str | None = None) -> Question:
    """Return the question of a seed; by default the seed's place in `TASKS` gives the task."""
    task = task or TASKS[seed % len(TASKS)]
    rng = random.Random(f"evaluation {seed}")
    if task == "text":
        conversation = text_only(seed, SPLIT, 1)
    elif task == "compare":
        conversation = compare(seed, SPLIT, 1)
    elif task == "follow-up":
        conversation = ask(seed, SPLIT, document(1000 * seed, SPLIT, rng.choice(kinds)), 3)
    elif task == "long":
        page = document(1000 * seed, SPLIT, rng.choice(LONG_KINDS), num_pages=2)
        conversation = ask(seed, SPLIT, page, 1)
    else:
        conversation = _about_one_page(task, seed, rng, kinds)
    styles = [random_style(seed + 10**6 * index, SPLIT) for index in range(len(conversation.documents))]
    pages = conversation.documents
    last = conversation.turns[-1]
    return Question(
        turn=replace(last, task=task) if task in FURTHER_TASKS else last,
        images=[draw(page, style, seed) for page, style in zip(pages, styles, strict=True)],
        kind=pages[0].kind if pages else "none",
        seen_font=all(style.font in FONTS["train"] for style in styles),
        seen_layout=all(page.layout != NUM_LAYOUTS - 1 for page in pages),
        earlier=[turn.question for turn in conversation.turns[:-1]],
    )


def _about_one_page(task: str, seed: int, rng: random.Random, kinds: tuple[str, ...]) -> Conversation:
    maker = QuestionMaker(rng, SPLIT)
    suited = {"price": ("receipt", "invoice"), "cell": ("table",), "html": ("table",)}
    suited["chart"] = ("bar chart", "line chart")
    ask: dict[str, Callable] = {"field": maker.field, "absent": maker.absent, "yes/no": maker.check}
    ask |= {"transcription": maker.transcribe, "html": maker.html}
    for attempt in range(1000):
        page = document(1000 * seed + attempt, SPLIT, rng.choice(suited.get(task, kinds)))
        turn = ask.get(task, maker.price)(page)
        if turn.task == task:
            return Conversation([page], [turn])
    raise ValueError(f"No {task!r} question can be asked about {', '.join(kinds)}.")


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
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    parser.add_argument("--batch-size", type=int, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    require_fonts("heldout")
    model, processor = load(arguments.model)

    questions = make_questions(arguments.documents, tuple(arguments.kinds))
    started = time.monotonic()
    rows = evaluate(model, processor, questions, arguments.batch_size)
    report = {
        **conditions(arguments),
        "documents": arguments.documents,
        "kinds": arguments.kinds,
        "seconds": round(time.monotonic() - started),
        "tasks": summarize(rows),
    }
    write_report(arguments.out, report | {"answers": rows})
    print(f"{markdown(report)}\n{json.dumps(report)}")


if __name__ == "__main__":
    main()
