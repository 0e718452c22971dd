"""The data mixture: which conversations a step of nano's training learns from.

A batch holds conversations about drawn documents and, by the share of `--random-pages`, about pages of random
characters. With `--auxiliary` a second, small batch of one auxiliary task stands beside each of these batches, and its
loss is added: verdicts of comparisons, values before their names and copying are too rare in the documents to be
learned from them alone.
"""

import argparse
import random
from collections.abc import Callable
from typing import NamedTuple

from documents.generator import KINDS, document
from documents.questions import Conversation, ask, compare, training_conversation
from pretraining.common import share
from pretraining.random_pages import (
    mask_values,
    random_page_conversation,
    value_first_conversation,
    verdict_conversation,
)


class AuxiliaryTask(NamedTuple):
    """A task of its own small batches.

    Args:
        weight: how often the task is chosen, relative to the others.
        divisor: a batch holds `--auxiliary` conversations divided by this; the longer they are, the fewer.
        make: makes a conversation from its seed and the batch's random generator.
    """

    weight: int
    divisor: int
    make: Callable[[int, random.Random], Conversation]


# Comparisons carry loss on the verdict alone.
AUXILIARY_TASKS = {
    "verdicts on words": AuxiliaryTask(2, 1, lambda seed, rng: verdict_conversation(seed)),
    "verdicts on lists": AuxiliaryTask(2, 2, lambda seed, rng: verdict_conversation(seed, rng.choice((2, 4)))),
    "verdicts on documents": AuxiliaryTask(2, 6, lambda seed, rng: mask_values(compare(seed, "train", 2))),
    "values before names": AuxiliaryTask(
        3, 3, lambda seed, rng: value_first_conversation(seed, rng.choice((4, 6, 9, 12)))
    ),
    "copying": AuxiliaryTask(2, 6, lambda seed, rng: random_page_conversation(seed, rng.choice((5, 8, 14)))),
}


def add_mixture_options(parser: argparse.ArgumentParser, **defaults: float) -> None:
    """Add the options that choose the mixture, with the stage's defaults."""
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), help="kinds of documents; a kind may be repeated")
    parser.add_argument("--random-pages", type=share, default=0.0, help="share of pages of random characters")
    parser.add_argument("--random-page-lines", type=int, default=14, help="most lines on a page of random characters")
    parser.add_argument("--lookups", type=share, default=0.0, help="share of random pages with questions for values")
    parser.add_argument("--long", type=share, default=0.0, help="share of documents of two tiles")
    parser.add_argument("--pairs", type=share, default=0.0, help="share of comparisons of two documents")
    parser.add_argument(
        "--auxiliary", type=int, default=0, help="conversations of an auxiliary batch; fewer for tasks with pages"
    )
    parser.set_defaults(**defaults)


def sample_conversation(seed: int, arguments: argparse.Namespace) -> Conversation:
    """Return the conversation of a seed, about a random page or a document as the options say."""
    if random.Random(seed).random() < arguments.random_pages:
        return random_page_conversation(seed, arguments.random_page_lines, arguments.lookups)
    return training_conversation(seed, tuple(arguments.kinds), arguments.long, arguments.pairs)


def auxiliary_batch(first_seed: int, arguments: argparse.Namespace) -> tuple[str, list[Conversation]]:
    """Return the name of an auxiliary task and the conversations of its batch."""
    rng = random.Random(f"drill {first_seed}")  # another text would draw other conversations
    name = rng.choices(list(AUXILIARY_TASKS), [task.weight for task in AUXILIARY_TASKS.values()])[0]
    task = AUXILIARY_TASKS[name]
    seeds = range(first_seed * 1000, first_seed * 1000 + max(1, arguments.auxiliary // task.divisor))
    return name, [task.make(seed, rng) for seed in seeds]


def heldout_conversation(seed: int, kinds: tuple[str, ...]) -> Conversation:
    """Return five questions about a held-out document."""
    return ask(seed, "heldout", document(seed, "heldout", kinds[seed % len(kinds)]), 5)
