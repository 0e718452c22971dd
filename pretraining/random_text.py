"""Pages full of random text: many characters an image, in no order that could be guessed."""

import random
import string

from documents.pages import Line, Page, Piece
from documents.questions import (
    ABSENT,
    CHECK_PHRASINGS,
    FIELD_PHRASINGS,
    LABEL_PHRASINGS,
    NAMES,
    PRICE_PHRASINGS,
    TRANSCRIBE_PHRASINGS,
    Conversation,
    QuestionMaker,
    Turn,
)
from documents.wording import LABELS

PRINTED = "".join(chr(code) for code in range(33, 127)) + "\u20ac\u00a3"
ALPHABETS = (
    PRINTED,
    string.digits * 4 + ".,:/-$\u20ac\u00a3%#()",
    string.ascii_letters + string.digits * 2,
    string.ascii_lowercase * 3 + string.ascii_uppercase,
    string.ascii_uppercase + string.digits,
    "lI1|i!O0oQD5S8B3.,:;-'4A6G92Z7T" + string.ascii_letters,  # those that look alike
)


def random_page(seed: int) -> Page:
    """Return a page of 6 to 28 lines of random words."""
    rng = random.Random(f"random page {seed}")
    columns = rng.randint(10, 44)
    alphabets = rng.choices(ALPHABETS, k=2)
    lines = []
    for _ in range(rng.randint(6, 28)):
        text = ""
        while len(text) < columns - 2:
            text += "".join(rng.choices(rng.choice(alphabets), k=rng.randint(1, 9))) + " "
            if rng.random() < 0.04:
                break
        text = text[:columns].strip()
        stop, align = rng.choice(((0.0, "l"), (0.0, "l"), (0.5, "c"), (1.0, "r")))
        scale = rng.choice((1.0,) * 9 + (1.2, 1.4))
        lines.append(
            Line([Piece(text, stop, align)], scale if len(text) < columns * 0.6 else 1.0, rng.random() < 0.15)
        )
    return Page("random text", 0, lines)


AMOUNTS = "amounts"
VALUE_ALPHABETS = (
    string.digits,
    string.digits + ".,-/",
    string.ascii_lowercase,
    string.ascii_letters,
    PRINTED,
    AMOUNTS,
)


def word(rng: random.Random, alphabet: str, longest: int = 8) -> str:
    """Return random characters, or an amount."""
    if alphabet == AMOUNTS:
        return f"{rng.choice(('', '', '$', chr(0x20AC)))}{rng.randint(20, 10 ** rng.randint(3, 6)) / 100:.2f}"
    return "".join(rng.choices(alphabet, k=rng.randint(1, longest)))


def copying(seed: int, num_lines: int, columns: int) -> Conversation:
    """Return the transcription of a page of random words; on some the words repeat, so that lines begin alike."""
    rng = random.Random(f"copying {seed}")
    alphabet = rng.choice((PRINTED, string.digits + ".,-", string.ascii_letters, string.ascii_lowercase[:6]))
    known = [word(rng, alphabet) for _ in range(rng.randint(2, 6))]
    alike = rng.choice((0.0, 0.0, 0.5, 0.9))
    lines = []
    for _ in range(rng.randint(2, num_lines)):
        words = [rng.choice(known) if rng.random() < alike else word(rng, alphabet) for _ in range(rng.randint(1, 5))]
        text = " ".join(words)[:columns].strip()
        half = text.find(" ", len(text) // 2)
        if half > 0 and rng.random() < 0.3:  # two pieces with a gap
            pieces = [Piece(text[:half]), Piece(text[half + 1 :], 1.0, "r")]
        else:
            pieces = [Piece(text, *rng.choice(((0.0, "l"), (0.0, "l"), (0.5, "c"), (1.0, "r"), (0.1, "l"))))]
        lines.append(Line(pieces))
        if rng.random() < 0.1:
            lines.append(Line([]))
    page = Page("random text", 0, lines)
    return Conversation([page], [transcription(rng, page)])


def transcription(rng: random.Random, page: Page) -> Turn:
    return Turn("transcription", rng.choice(TRANSCRIBE_PHRASINGS[:-1]), page.text)


def looking_up(seed: int, num_lines: int, columns: int) -> Conversation:
    """Return questions about a list of random names with random values, some of them for names that are not there."""
    rng = random.Random(f"looking up {seed}")
    names = random_names(rng, num_lines)
    values = random_values(rng, names, columns)
    page = Page("random text", 0, print_list(rng, values), values)
    turns = [question_about(rng, name, values) for name in rng.sample(names, min(8, len(names)))]
    turns = [turn for turn in turns if turn]
    return Conversation([page], turns or [transcription(rng, page)])


def understanding(seed: int, num_lines: int, columns: int) -> Conversation:
    """Return questions about a list of labels with random values, by the names of the fields that the labels mean.

    The values tell nothing, so that a field has to be found by the meaning of its label.
    """
    rng = random.Random(f"understanding {seed}")
    maker = QuestionMaker(rng, "train")
    shuffled = rng.sample(list(LABELS), len(LABELS))
    fields: list[str] = []
    for name in shuffled:
        if name in NAMES and len(fields) < num_lines and not any(share_a_name(name, other) for other in fields):
            fields.append(name)
    labels = {name: rng.choice(LABELS[name][:-1]) for name in fields}
    values = random_values(rng, list(labels.values()), columns)
    page = Page("random text", 0, print_list(rng, values), values)
    missing = [name for name in shuffled if name in NAMES and not any(share_a_name(name, other) for other in fields)]
    turns = []
    for name in rng.sample(fields, min(7, len(fields))):
        value = values[labels[name]]
        if rng.random() < 0.1:
            turns.append(check(rng, maker.name_of(name), value, values))
        else:
            turns.append(maker.about("field", name, value))
    turns += [maker.about("absent", name, ABSENT) for name in missing[: rng.choice((0, 1, 1, 2))]]
    rng.shuffle(turns)
    return Conversation([page], turns)


def share_a_name(first: str, second: str) -> bool:
    """Return whether two fields share a name or a label, in any case of letters."""
    own = [{text.lower() for text in (*NAMES[name], *LABELS[name])} for name in (first, second)]
    return bool(own[0] & own[1])


def random_values(rng: random.Random, names: list[str], columns: int) -> dict[str, str]:
    """Return a random value for each name, short enough for a line of both."""
    values = {}
    for name in names:
        alphabet = rng.choice(VALUE_ALPHABETS)
        value = " ".join(word(rng, alphabet) for _ in range(rng.choice((1, 1, 1, 2, 3))))
        values[name] = value[: max(3, columns - len(name) - 2)].strip()
    return values


def random_names(rng: random.Random, count: int) -> list[str]:
    """Return names of which none holds another: random letters, names of fields, labels of documents."""
    names: list[str] = []
    while len(names) < count:
        draw = rng.random()
        name = random_name(rng)
        if draw < 0.3:
            name = rng.choice(NAMES[rng.choice(list(NAMES))])
        elif draw < 0.6:
            name = rng.choice(LABELS[rng.choice(list(LABELS))][:-1])
        if not any(overlap(name, other) for other in names):
            names.append(name)
    return names


def random_name(rng: random.Random) -> str:
    return " ".join(word(rng, string.ascii_letters, 7) for _ in range(rng.choice((1, 1, 2))))


def overlap(first: str, second: str) -> bool:
    return first.lower() in second.lower() or second.lower() in first.lower()


def print_list(rng: random.Random, values: dict[str, str]) -> list[Line]:
    """Return names and their values as lines of one form."""
    form = rng.choice(("spread", "spread", "inline", "column", "stacked", "above", "before"))
    opening, closing = rng.choice(("()", "[]", "<>", "**", "  "))
    sign = rng.choice(("", "", ":", " -", "="))
    stop = rng.uniform(0.3, 0.5)
    lines: list[Line] = []
    for name, value in values.items():
        label = name if rng.random() < 0.5 else name[0].upper() + name[1:]
        lines += {
            "spread": [Line([Piece(label + sign), Piece(value, 1.0, "r")])],
            "column": [Line([Piece(label + sign), Piece(value, stop)])],
            "inline": [Line([Piece(f"{label}{sign} {value}")])],
            "before": [Line([Piece(value), Piece(label, stop)])],
            "stacked": [Line([Piece(label + sign)]), Line([Piece(value)])],
            "above": [Line([Piece(value)]), Line([Piece(f"{opening}{label}{closing}".strip())])],
        }[form]
    return lines


def check(rng: random.Random, name: str, value: str, values: dict[str, str]) -> Turn:
    """Return a yes/no question whether a value, or another one of the page, is that of a name."""
    shown = rng.choice((value, rng.choice(list(values.values()))))
    question = rng.choice(CHECK_PHRASINGS[:-1]).format(name, shown)
    return Turn("yes/no", question[0].upper() + question[1:], "Yes." if shown == value else "No.")


def question_about(rng: random.Random, name: str, values: dict[str, str]) -> Turn | None:
    """Return a question for a value, in some cases for a name that is not there or whether a value is right."""
    draw = rng.random()
    if draw < 0.12:
        name = random_name(rng) if draw < 0.06 else rng.choice(NAMES[rng.choice(list(NAMES))])
        if any(overlap(name, other) for other in values):
            return None
    elif draw < 0.2:
        return check(rng, name, values[name], values)
    question = rng.choice(rng.choice((LABEL_PHRASINGS, FIELD_PHRASINGS, PRICE_PHRASINGS))[:-1]).format(name)
    question = question[0].upper() + question[1:]
    return Turn("field", question, values[name]) if name in values else Turn("absent", question, ABSENT)
