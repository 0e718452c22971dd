"""Conversations about pages of random characters.

Documents can be guessed from: totals and dates have their usual places. Random pages cannot, so a model has to copy
characters and to look values up.
"""

import random
import string

from documents.generator import COLUMNS, CURRENCIES, ROWS_PER_PAGE, Document, extremes
from documents.questions import (
    ABSENT,
    CELL_PHRASINGS,
    COMPARE_PHRASINGS,
    FIELD_PHRASINGS,
    HTML_PHRASINGS,
    PAGE_PHRASING,
    PRICE_PHRASINGS,
    SYNONYMS,
    TRANSCRIBE_PHRASINGS,
    VALUE_PHRASINGS,
    Conversation,
    Turn,
    amount_of,
    comparison,
    table_as_html,
    verdict_of,
    with_name,
)

ALPHABET = "".join(chr(code) for code in range(33, 127)) + "\u20ac\u00a3"  # all printed characters
AMOUNTS = "amounts"  # numbers with two decimals, in place of an alphabet
# Around names below their values: these, or any sign twice. Round ones are held out: only documents have them.
BRACKETS = ("[]", "<>", "{}", *(2 * sign for sign in string.punctuation if sign not in "()"))
# Where the value of a name stands, and how often: a value before its name is the hardest to find.
LIST_FORMS = {"right": 1, "left": 1, "colon": 1, "below": 1, "above": 3, "before": 3}
PRINTED_AS = {  # names of fields, and their labels in documents
    "name": "Name", "city": "City", "address": "Address", "phone number": "Phone", "date of birth": "Born",
    "customer number": "Customer", "employer": "Employer", "country": "Country", "total": "Total", "tax": "Tax",
    "date": "Date", "due date": "Due", "receipt number": "Receipt", "subtotal": "Subtotal", "payment": "Payment",
}  # fmt: skip


def random_page_conversation(seed: int, num_lines: int = ROWS_PER_PAGE, share_of_lookups: float = 0.0) -> Conversation:
    """Return the conversation of a seed about one or two pages of random characters.

    Args:
        seed: any integer.
        num_lines: most printed lines on a page, at least three.
        share_of_lookups: share of conversations with questions about lists of names and values, tables, or pairs of
            lists, 0 to 1; the others ask for a transcription.
    """
    rng = random.Random(f"exercise {seed}")
    if rng.random() >= share_of_lookups:
        return _transcription(rng, num_lines)
    makers = (_list_lookup, _table_lookup, _pair_comparison, _extreme_lookup)
    return rng.choices(makers, (16, 4, 4, 2))[0](rng, num_lines)


def value_first_conversation(seed: int, num_lines: int) -> Conversation:
    """Return questions about a list whose values stand above their names, or before them on the line."""
    rng = random.Random(f"look back {seed}")
    return _list_lookup(rng, num_lines, rng.choice(("above", "before")))


def verdict_conversation(seed: int, num_lines: int = 0) -> Conversation:
    """Return a comparison of two values in which the verdict alone carries loss.

    Args:
        seed: any integer.
        num_lines: most lines on each of the two pages that print the values; 0 for no pages.
    """
    rng = random.Random(f"judgement {seed}")
    if num_lines:
        conversation = _pair_comparison(rng, num_lines)
        conversation.turns = [turn for turn in conversation.turns if turn.task == "compare"][:1]
        return mask_values(conversation)
    alphabet = rng.choice((AMOUNTS, AMOUNTS, string.digits + ".-/", string.ascii_lowercase, ALPHABET))
    longest = rng.choice((3, 3, 4, 6, 9, COLUMNS))  # short values come often: comparing is learned on them first
    first = _value(rng, alphabet, longest)
    second = _other_value(rng, first, alphabet, longest)
    name = rng.choice((*SYNONYMS["total"], *SYNONYMS["supplier"], *SYNONYMS["date"]))
    return mask_values(Conversation([], [_comparison(rng, name, first, second, with_amounts=alphabet == AMOUNTS)]))


def mask_values(conversation: Conversation) -> Conversation:
    """Take the loss off the values in the answers to comparisons, so that the verdicts alone carry it."""
    for turn in conversation.turns:
        turn.given = turn.answer.removesuffix(f" {verdict_of(turn.answer)}")
    return conversation


def _transcription(rng: random.Random, num_lines: int) -> Conversation:
    """Return the transcription of a page of random characters.

    On every other page the lines are made of a few words, so that some begin alike: the next character can then only
    be found by its place on the page.
    """
    alphabet = rng.choice((ALPHABET, string.digits + ".,-", string.ascii_letters, string.ascii_lowercase[:6]))
    known = ["".join(rng.choices(alphabet, k=rng.randint(1, 8))) for _ in range(rng.randint(2, 6))]
    alike = rng.choice((0.0, 0.0, 0.5, 0.9))
    lines = []
    for _ in range(rng.randint(3, num_lines)):
        words = [
            rng.choice(known) if rng.random() < alike else "".join(rng.choices(alphabet, k=rng.randint(1, 8)))
            for _ in range(rng.randint(1, 3))
        ]
        line = (" " * rng.choice((0, 0, 0, 1, 4))) + (" " * rng.choice((1, 1, 3, 6))).join(words)
        lines.append(line[:COLUMNS].rstrip())
    page = _print(rng, lines)
    return Conversation([page], [Turn("transcription", rng.choice(TRANSCRIBE_PHRASINGS[:-1]), page.text)])


def _list_lookup(rng: random.Random, num_lines: int, form: str | None = None) -> Conversation:
    """Return questions about names with values after, before, below or above them, and about absent names."""
    if rng.random() < 0.4:
        spelling = rng.choice((str, str.upper, str.lower))
        printed_as = {name: spelling(label) for name, label in PRINTED_AS.items()}
        phrasings, first_letter = FIELD_PHRASINGS, str.upper  # "Due date?", as of documents
    else:
        printed_as = {name: name for name in _names(rng, num_lines + 1)}
        phrasings, first_letter = rng.choice((FIELD_PHRASINGS, VALUE_PHRASINGS, PRICE_PHRASINGS)), str
    names = rng.sample(list(printed_as), rng.randint(2, min(num_lines, len(printed_as) - 1)) + 1)
    page, known = _list(rng, {name: printed_as[name] for name in names[:-1]}, num_lines, form=form)
    asked = rng.sample(list(known), min(7, len(known))) + names[len(known) :][:1]
    rng.shuffle(asked)
    turns = []
    for name in asked:
        question = rng.choice(phrasings[:-1]).format(name)
        turns.append(Turn("field", first_letter(question[0]) + question[1:], known.get(name, ABSENT)))
    return Conversation([page], turns)


def _extreme_lookup(rng: random.Random, num_lines: int) -> Conversation:
    """Return questions for the highest and the lowest of numbers with names."""
    names = _names(rng, rng.randint(2, min(6, num_lines)))
    numbers = [str(number) for number in rng.sample(range(1, rng.choice((10, 100, 1000))), len(names))]
    form = rng.choice(("right", "left", "colon", "before"))
    known = dict(zip(names, numbers, strict=True))
    page, _ = _list(rng, {name: name for name in names}, num_lines, known, form=form)
    turns = [
        Turn("chart", rng.choice(FIELD_PHRASINGS[:-1]).format(rng.choice(SYNONYMS[which])), with_name(name, known))
        for which, name in extremes(known).items()
    ]
    rng.shuffle(turns)
    return Conversation([page], turns)


def _table_lookup(rng: random.Random, num_lines: int) -> Conversation:
    """Return questions about cells of a table, or ask for the whole table as HTML or as a transcription."""
    names = _names(rng, rng.randint(2, num_lines - 1) + 1, longest=5)
    columns = [rng.choice(("Item", "Name", "Part")), *_names(rng, rng.randint(1, 2), longest=3)]
    of_words = rng.random() < 0.3
    body = [
        [name, *(_names(rng, 1, longest=3)[0] if of_words else str(rng.randint(0, 999)) for _ in columns[1:])]
        for name in names
    ]
    missing = body.pop()[0]
    key = 0
    order = list(range(len(columns)))
    if rng.random() < 0.5:  # the order numbers, words, numbers is held out: only documents have it
        rng.shuffle(order)
        if len(order) == 3 and order[1] == 0 and not of_words:
            order = [1, 2, 0]
        key = order.index(0)
    table = [[row[index] for index in order] for row in (columns, *body)]
    page = _print(rng, _columns(rng, table))
    page.table = table
    draw = rng.random()
    if draw < 0.3:
        return Conversation([page], [Turn("html", rng.choice(HTML_PHRASINGS[:-1]), table_as_html(table))])
    if draw < 0.4:
        return Conversation([page], [Turn("transcription", rng.choice(TRANSCRIBE_PHRASINGS[:-1]), page.text)])
    others = [index for index in range(len(order)) if index != key]
    cells = [(row[key], table[0][index], row[index]) for row in table[1:] for index in others]
    cells = rng.sample(cells, min(6, len(cells)))
    cells.insert(rng.randrange(len(cells)), (missing, table[0][rng.choice(others)], ABSENT))
    turns = [Turn("cell", rng.choice(CELL_PHRASINGS[:-1]).format(name, column), cell) for name, column, cell in cells]
    return Conversation([page], turns)


def _columns(rng: random.Random, table: list[list[str]]) -> list[str]:
    """Return the lines of a table; its columns differ in alignment and in the room beyond their longest cell."""
    widths = [max(len(row[index]) for row in table) for index in range(len(table[0]))]
    spare = COLUMNS - sum(widths) - len(widths) + 1
    aligns = [rng.choice((str.ljust, str.rjust)) for _ in widths]
    gaps = [0] * len(widths)
    for _ in range(rng.randint(0, max(0, spare))):
        gaps[rng.randrange(len(gaps))] += 1
    widths = [width + gap for width, gap in zip(widths, gaps, strict=True)]
    return [
        " ".join(align(cell, width) for align, cell, width in zip(aligns, row, widths, strict=True)) for row in table
    ]


def _pair_comparison(rng: random.Random, num_lines: int) -> Conversation:
    """Return comparisons of values in two lists of the same names, and questions about one of the values."""
    names = _names(rng, rng.choice((1, 2, 3, rng.randint(2, max(2, num_lines // 2)))))
    alphabet = rng.choice((AMOUNTS, AMOUNTS, None))
    labels = {name: name for name in names}
    first, known = _list(rng, labels, num_lines, alphabet=alphabet)
    given = {name: _other_value(rng, value, alphabet or string.digits) for name, value in known.items()}
    second, known_there = _list(rng, labels, num_lines, given, alphabet)
    turns = []
    for name in rng.sample(names, min(4, len(names))):
        if name in known and name in known_there:
            values = known[name], known_there[name]
            turns.append(_comparison(rng, name, *values, with_amounts=alphabet == AMOUNTS))
            if rng.random() < 0.3:
                index = rng.randrange(2)
                turns.append(Turn("field", PAGE_PHRASING.format(name, ("first", "second")[index]), values[index]))
    rng.shuffle(turns)
    return Conversation([first, second], turns)


def _other_value(rng: random.Random, value: str, alphabet: str, longest: int = COLUMNS) -> str:
    """Return the same value, one that differs in a single character, or a new one."""
    draw = rng.random()
    if draw < 0.3:
        return value
    if draw < 0.6:
        place = rng.choice(
            [index for index, character in enumerate(value) if character not in " .$\u20ac\u00a3"] or [0]
        )
        return value[:place] + rng.choice(string.digits if alphabet == AMOUNTS else alphabet) + value[place + 1 :]
    return _value(rng, alphabet, longest)


def _comparison(rng: random.Random, name: str, first: str, second: str, with_amounts: bool) -> Turn:
    """Return a question for the higher amount, for the page of a value, or whether both values are the same."""
    kind = "same"
    if first != second and rng.random() < 0.6:
        kind = "higher" if with_amounts and amount_of(first) != amount_of(second) else "which"
    asked = rng.choice((first, second)) if kind == "which" else name
    question = rng.choice(COMPARE_PHRASINGS[kind][:-1]).format(asked)
    return Turn("compare", question, comparison(kind, first, second, asked))


def _names(rng: random.Random, count: int, longest: int = 6) -> list[str]:
    """Return `count` different words of three or more random letters."""
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(rng.choices(string.ascii_letters, k=rng.randint(3, longest)))] = None
    return list(names)


def _list(
    rng: random.Random,
    printed_as: dict[str, str],
    num_lines: int,
    given: dict[str, str] | None = None,
    alphabet: str | None = None,
    form: str | None = None,
) -> tuple[Document, dict[str, str]]:
    """Print names with values, the `given` or random ones, and return the page and the values that fitted on it."""
    pieces = (alphabet,) if alphabet else (string.digits, string.digits + ".", string.ascii_lowercase, ALPHABET)
    form = form or rng.choices(list(LIST_FORMS), LIST_FORMS.values())[0]
    indent = " " * rng.choice((0, 0, 0, 1, 2))
    opening, closing = rng.choice(BRACKETS)
    known: dict[str, str] = {}
    lines: list[str] = []
    for name, label in printed_as.items():
        longest = COLUMNS - 1 if form in ("below", "above") else COLUMNS - len(label) - 4
        value = (given or {}).get(name, "")
        if not 0 < len(value) <= longest:
            value = _value(rng, rng.choice(pieces), longest)
        printed = {
            "right": [label + value.rjust(COLUMNS - len(label))],
            "left": [f"{indent}{label} {value}"],
            "colon": [f"{label}: {value}"],
            "below": [label, value],
            "above": [value, f"{opening}{label}{closing}"],
            "before": [f"{value} {label}"],  # values to the right before names: only the held-out bar charts
        }[form]
        if len(lines) + len(printed) > num_lines:
            break
        lines += printed
        known[name] = value
    return _print(rng, lines, together=len(printed)), known


def _value(rng: random.Random, alphabet: str, longest: int) -> str:
    """Return one or two words of random characters, or an amount, which has at least four characters."""
    if alphabet == AMOUNTS:
        digits = rng.randint(3, max(3, min(5, longest - 2)))
        return rng.choice(CURRENCIES) * (longest > 4) + f"{rng.randint(20, 10**digits - 1) / 100:.2f}"
    value = "".join(rng.choices(alphabet, k=rng.randint(2, min(8, longest))))
    if longest > 9 and rng.random() < 0.5:
        value += " " + "".join(rng.choices(alphabet, k=rng.randint(1, 7)))
    return value[:longest].rstrip()


def _print(rng: random.Random, lines: list[str], together: int = 1) -> Document:
    """Put lines on a page in order, with blank rows between blocks of `together` lines or below all of them."""
    blocks = [lines[start : start + together] for start in range(0, len(lines), together)]
    num_blank = ROWS_PER_PAGE - len(lines)
    after = rng.choices(range(len(blocks) + 1), k=num_blank) if rng.random() < 0.5 else [len(blocks)] * num_blank
    page = Document("exercise", 0, [""] * after.count(0))
    for index, block in enumerate(blocks, start=1):
        page.lines += [*(line.rstrip() for line in block), *[""] * after.count(index)]
    return page
