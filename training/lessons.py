"""What nano is taught: conversations about drawn documents, mixed with exercises on random characters."""

import argparse
import random

from training.documents import KINDS, document
from training.exercises import exercise, give_values, judgement, look_back
from training.questions import PAGE_PHRASING, Conversation, Turn, ask, compare, read_out, text_only
from training.runs import share

# How often, which share of `--drills` (the longer, the fewer), and what draws one. Of comparisons only the verdict is
# learned, one word in an answer.
DRILLS = {
    "verdicts on words": (2, 1, lambda seed, rng: judgement(seed)),
    "verdicts on lists": (2, 2, lambda seed, rng: judgement(seed, rng.choice((2, 4)))),
    "verdicts on documents": (2, 6, lambda seed, rng: give_values(compare(seed, "train", 2))),
    "values before names": (3, 3, lambda seed, rng: look_back(seed, rng.choice((4, 6, 9, 12)))),
    "copying": (2, 6, lambda seed, rng: exercise(seed, rng.choice((5, 8, 14)))),
}


def add_lesson_options(parser: argparse.ArgumentParser, **defaults: float) -> None:
    """The options that say what to teach."""
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), help="kinds of documents; a kind may be repeated")
    parser.add_argument("--exercises", type=share, default=0.0, help="share of pages of random characters")
    parser.add_argument("--exercise-lines", type=int, default=14)
    parser.add_argument("--look-ups", type=share, default=0.0, help="share of exercises that ask for values")
    parser.add_argument("--long", type=share, default=0.0, help="share of documents of two tiles")
    parser.add_argument("--pairs", type=share, default=0.0, help="share of comparisons of two documents")
    parser.add_argument("--drills", type=int, default=0, help="short lessons beside a batch; fewer when with pages")
    parser.set_defaults(**defaults)


def draw_lesson(seed: int, arguments: argparse.Namespace) -> Conversation:
    """An exercise, or a lesson about a document, as the options say."""
    if random.Random(seed).random() < arguments.exercises:
        return exercise(seed, arguments.exercise_lines, arguments.look_ups)
    return lesson(seed, tuple(arguments.kinds), arguments.long, arguments.pairs)


def draw_drill(first_seed: int, arguments: argparse.Namespace) -> tuple[str, list[Conversation]]:
    """The name of a drill and its conversations: short lessons about what is learned too slowly among others."""
    rng = random.Random(f"drill {first_seed}")
    name = rng.choices(list(DRILLS), [weight for weight, _, _ in DRILLS.values()])[0]
    _, share, draw = DRILLS[name]
    seeds = range(first_seed * 1000, first_seed * 1000 + max(1, arguments.drills // share))
    return name, [draw(seed, rng) for seed in seeds]


def held_out_lesson(seed: int, kinds: tuple[str, ...]) -> Conversation:
    """Five questions about a held-out page."""
    return ask(seed, "heldout", document(seed, "heldout", kinds[seed % len(kinds)]), 5)


def lesson(
    seed: int, kinds: tuple[str, ...] = tuple(KINDS), share_of_long: float = 0.0, share_of_pairs: float = 0.0
) -> Conversation:
    """Return the training conversation of a seed: questions about a page, then (mostly) its transcription.

    Args:
        seed: any integer.
        kinds: the kinds of documents to draw.
        share_of_long: how many of the conversations are about a document of two tiles.
        share_of_pairs: how many compare two documents.
    """
    rng = random.Random(f"lesson {seed}")
    draw = rng.random()
    if draw < share_of_pairs:
        return _compare_and_find(rng, compare(seed, "train", 3))
    if draw < share_of_pairs + 0.02:
        return text_only(seed, "train", 4)
    is_long = rng.random() < share_of_long
    page = document(seed, num_pages=2) if is_long else document(seed, kind=rng.choice(kinds))
    if rng.random() < 0.25:
        return read_out(seed, "train", page)
    questions = ask(seed, "train", page, 9)
    if rng.random() < 0.6:
        questions.turns += read_out(seed, "train", page).turns
    return questions


def _compare_and_find(rng: random.Random, comparison: Conversation) -> Conversation:
    """Ask, between the comparisons of two pages, for values of each."""
    for number, page in zip(("first", "second"), comparison.documents, strict=True):
        for name in rng.sample(list(page.fields), min(2, len(page.fields))):
            turn = Turn("field", PAGE_PHRASING.format(name, number), page.fields[name])
            comparison.turns.insert(rng.randint(0, len(comparison.turns)), turn)
    return comparison
