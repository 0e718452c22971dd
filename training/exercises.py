"""Pages of random characters: there is nothing to guess on them, so a reader has to copy and to look up."""

import random
import string

from training.documents import COLUMNS, ROWS_PER_PAGE, Document
from training.questions import (
    ABSENT,
    CELL_PHRASINGS,
    COMPARE_PHRASINGS,
    FIELD_PHRASINGS,
    HTML_PHRASINGS,
    PAGE_PHRASING,
    PAGE_VERDICTS,
    PRICE_PHRASINGS,
    TRANSCRIBE_PHRASINGS,
    VALUE_PHRASINGS,
    Conversation,
    Turn,
    comparison,
    table_as_html,
)

ALPHABET = "".join(chr(code) for code in range(33, 127)) + "\u20ac\u00a3"  # what pages are printed with
AMOUNTS = "amounts"  # numbers with two decimals, in place of an alphabet
BRACKETS = ("[]", "<>", "{}", "--")  # around names below their values; documents have round ones


def exercise(seed: int, num_lines: int = ROWS_PER_PAGE, share_of_look_ups: float = 0.0) -> Conversation:
    """A page, or two, of random characters, with what it asks.

    Args:
        seed: any integer.
        num_lines: at most so many printed lines on a page, three or more.
        share_of_look_ups: how many of the exercises are lists of names and values, tables, pairs of lists, or two
            values in words, with questions; the others are to be read out.
    """
    rng = random.Random(f"exercise {seed}")
    if rng.random() >= share_of_look_ups:
        return _copy(rng, num_lines)
    return rng.choices((_look_up, _look_up_cell, _look_up_in_pair, _compare_in_words), (5, 3, 2, 2))[0](rng, num_lines)


def _copy(rng: random.Random, num_lines: int) -> Conversation:
    """Lines of random characters to read out, few or many different ones, anywhere on the page."""
    alphabet = rng.choice((ALPHABET, string.digits + ".,-", string.ascii_letters, string.ascii_lowercase[:6]))
    lines = []
    for _ in range(rng.randint(3, num_lines)):
        words = ["".join(rng.choices(alphabet, k=rng.randint(1, 8))) for _ in range(rng.randint(1, 3))]
        line = (" " * rng.choice((0, 0, 0, 1, 4))) + (" " * rng.choice((1, 1, 3, 6))).join(words)
        lines.append(line[:COLUMNS].rstrip())
    page = _print(rng, lines)
    return Conversation([page], [Turn("transcription", rng.choice(TRANSCRIBE_PHRASINGS[:-1]), page.text)])


def _look_up(rng: random.Random, num_lines: int) -> Conversation:
    """Names with values after, before, below or above them; questions for some, and for names that are not there."""
    names = _names(rng, rng.randint(2, num_lines) + 1)
    page, known = _list(rng, names[:-1], num_lines)
    asked = rng.sample(list(known), min(7, len(known))) + names[len(known) :][:1]
    rng.shuffle(asked)
    phrasings = rng.choice((FIELD_PHRASINGS, VALUE_PHRASINGS, PRICE_PHRASINGS))[:-1]
    turns = [Turn("field", rng.choice(phrasings).format(name), known.get(name, ABSENT)) for name in asked]
    return Conversation([page], turns)


def _look_up_cell(rng: random.Random, num_lines: int) -> Conversation:
    """A table of random names, in the first or in the last column, and numbers; questions for cells, or all as HTML."""
    names = _names(rng, rng.randint(2, num_lines - 1) + 1)
    columns = [name[:3] for name in _names(rng, rng.randint(1, 2))]
    rows = {name: [str(rng.randint(0, 999)) for _ in columns] for name in names[:-1]}
    table = [[rng.choice(("Item", "Name", "Part")), *columns], *([name, *row] for name, row in rows.items())]
    align = rng.choice((str.rjust, str.ljust))
    width = 4 if len(columns) == 2 else rng.choice((4, 6, 8))
    if rng.random() < 0.4:
        table = [[*row[1:], row[0]] for row in table]
        lines = ["".join(align(cell, width) for cell in row[:-1]) + " " + row[-1] for row in table]
    else:
        lines = [row[0].ljust(8) + "".join(align(cell, width) for cell in row[1:]) for row in table]
    page = _print(rng, lines)
    page.table = table
    asked = rng.sample([(name, index) for name in rows for index in range(len(columns))], min(6, len(rows)))
    cells = [(name, columns[index], rows[name][index]) for name, index in asked]
    cells.insert(rng.randrange(len(cells)), (names[-1], rng.choice(columns), ABSENT))
    phrasings = CELL_PHRASINGS[:-1]
    turns = [Turn("cell", rng.choice(phrasings).format(name, column), cell) for name, column, cell in cells]
    if rng.random() < 0.3:
        turns = [Turn("html", rng.choice(HTML_PHRASINGS[:-1]), table_as_html(table))]
    return Conversation([page], turns)


def _look_up_in_pair(rng: random.Random, num_lines: int) -> Conversation:
    """Two lists of the same names; questions for the values of one of them, and comparisons of both."""
    names = _names(rng, rng.randint(2, max(2, num_lines // 2)))
    alphabet = rng.choice((AMOUNTS, None))
    first, known = _list(rng, names, num_lines, alphabet=alphabet)
    given = {name: value for name, value in known.items() if rng.random() < 0.4}
    second, known_there = _list(rng, names, num_lines, given, alphabet)
    turns = []
    for name in rng.sample(names, min(4, len(names))):
        if name in known and name in known_there:
            values = known[name], known_there[name]
            turns.append(_comparison(rng, name, *values, with_amounts=alphabet == AMOUNTS))
            index = rng.randrange(2)
            turns.append(Turn("field", PAGE_PHRASING.format(name, ("first", "second")[index]), values[index]))
    rng.shuffle(turns)
    return Conversation([first, second], turns)


def _compare_in_words(rng: random.Random, num_lines: int) -> Conversation:
    """Comparisons without pages: the questions give both values, which leaves the comparing to learn."""
    turns = []
    for name in _names(rng, rng.randint(4, 10)):
        alphabet = rng.choice((AMOUNTS, string.digits + ".", string.ascii_lowercase, ALPHABET))
        first = _value(rng, alphabet, COLUMNS)
        second = first if rng.random() < 0.4 else _value(rng, alphabet, COLUMNS)
        turn = _comparison(rng, name, first, second, with_amounts=alphabet == AMOUNTS)
        pages = " ".join(
            f"The {name} of the {number} page is {value}." for number, value in (("first", first), ("second", second))
        )
        turns.append(Turn("compare", f"{pages} {turn.question}", turn.answer))
    return Conversation([], turns)


def _comparison(rng: random.Random, name: str, first: str, second: str, with_amounts: bool) -> Turn:
    """Which amount is higher, which page a value is from, or whether both values are the same."""
    kind, asked, verdict = "same", name, "Yes." if first == second else "No."
    if first != second and rng.random() < 0.6:
        index = rng.randrange(2)
        kind, asked, verdict = "which", (first, second)[index], PAGE_VERDICTS[index]
        if with_amounts and float(first) != float(second):
            kind, asked, verdict = "higher", name, PAGE_VERDICTS[float(second) > float(first)]
    return Turn("compare", rng.choice(COMPARE_PHRASINGS[kind][:-1]).format(asked), comparison(first, second, verdict))


def _names(rng: random.Random, count: int) -> list[str]:
    """So many different words of random letters."""
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(rng.choices(string.ascii_letters, k=rng.randint(3, 6)))] = None
    return list(names)


def _list(
    rng: random.Random,
    names: list[str],
    num_lines: int,
    given: dict[str, str] | None = None,
    alphabet: str | None = None,
) -> tuple[Document, dict[str, str]]:
    """Print names with values, those `given` or random ones, and return what found room."""
    pieces = (alphabet,) if alphabet else (string.digits, string.digits + ".", string.ascii_lowercase, ALPHABET)
    form = rng.choice(("right", "left", "colon", "below", "above", "before"))
    indent = " " * rng.choice((0, 0, 0, 1, 2))
    opening, closing = rng.choice(BRACKETS)
    known: dict[str, str] = {}
    lines: list[str] = []
    for name in names:
        longest = COLUMNS - 1 if form in ("below", "above") else COLUMNS - len(name) - 4
        value = (given or {}).get(name, "")
        if not 0 < len(value) <= longest:
            value = _value(rng, rng.choice(pieces), longest)
        printed = {
            "right": [name + value.rjust(COLUMNS - len(name))],
            "left": [f"{indent}{name} {value}"],
            "colon": [f"{name}: {value}"],
            "below": [name, value],
            "above": [value, f"{opening}{name}{closing}"],
            "before": [f"{indent}{value} {name}"],
        }[form]
        if len(lines) + len(printed) > num_lines:
            break
        lines += printed
        known[name] = value
    return _print(rng, lines), known


def _value(rng: random.Random, alphabet: str, longest: int) -> str:
    """One or two words of random characters, or an amount."""
    if alphabet == AMOUNTS:
        return f"{rng.randint(20, rng.choice((999, 9999, 99999))) / 100:.2f}"
    value = "".join(rng.choices(alphabet, k=rng.randint(2, 8)))
    if longest > 9 and rng.random() < 0.5:
        value += " " + "".join(rng.choices(alphabet, k=rng.randint(1, 7)))
    return value[:longest].rstrip()


def _print(rng: random.Random, lines: list[str]) -> Document:
    """Put lines on a page in their order, at rows chosen at random or one below the other."""
    rows: list[int] | range = range(len(lines))
    if rng.random() < 0.5:
        rows = sorted(rng.sample(range(ROWS_PER_PAGE), len(lines)))
    page = Document("exercise", 0, [""] * ROWS_PER_PAGE)
    for row, line in zip(rows, lines, strict=True):
        page.lines[row] = line.rstrip()
    return page
