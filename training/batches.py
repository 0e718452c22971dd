"""Turn conversations about drawn documents into token sequences in the published prompt format.

A sequence is `<|begin_of_text|>`, then per turn a user and an assistant block; the images come first, each as `<img>`,
256 `<image>` per tile, `</img>` and a line break. Only answers (with their `<|eot_id|>`) carry loss.
"""

import random
import string
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedTokenizerBase

from training.documents import COLUMNS, KINDS, ROWS_PER_PAGE, Document, document
from training.questions import (
    ABSENT,
    CELL_PHRASINGS,
    COMPARE_PHRASINGS,
    FIELD_PHRASINGS,
    PRICE_PHRASINGS,
    TRANSCRIBE_PHRASINGS,
    VALUE_PHRASINGS,
    Conversation,
    Turn,
    ask,
    compare,
    read_out,
    text_only,
)

TOKENS_PER_TILE = COLUMNS * ROWS_PER_PAGE
IGNORE = -100
PAGE_PHRASING = "What is the {0} of the {1} page?"  # only in lessons: what to compare has to be found first
ALPHABET = "".join(chr(code) for code in range(33, 127)) + "\u20ac\u00a3"  # what pages are printed with


@dataclass
class Batch:
    """Right-padded sequences.

    Attributes:
        input_ids: `(num_sequences, length)`.
        labels: like `input_ids`; -100 where there is no loss.
        pages: the documents whose tiles fill the image tokens, in order.
        conversations: what the sequences say.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    pages: list[Document] = field(default_factory=list)
    conversations: list[Conversation] = field(default_factory=list)


class Encoder:
    """Encodes conversations with a tokenizer.

    Args:
        tokenizer: nano's.
        skip_blank_rows: leave blank rows of pages out of the sequence, for cheap first lessons on perfect cells.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, skip_blank_rows: bool = False):
        self.tokenizer = tokenizer
        self.skip_blank_rows = skip_blank_rows
        self.pad_token_id = tokenizer.pad_token_id
        self.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
        self.start = self.encode("<|begin_of_text|>")
        self.user = self.encode("<|start_header_id|>user<|end_header_id|>\n\n")
        self.assistant = self.encode("<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
        self.end = self.encode("<|eot_id|>")
        self.glyphs = {chr(code): self.encode(chr(code))[0] for code in range(32, 127)}
        self.glyphs.update({sign: self.encode(sign)[0] for sign in "\u20ac\u00a3"})

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def image(self, page: Document) -> list[int]:
        tokens = [self.image_token_id] * (COLUMNS * len(self.rows(page)))
        return [*self.encode("<img>"), *tokens, *self.encode("</img>\n")]

    def prompt(self, conversation: Conversation, num_answered: int = 0) -> list[int]:
        """Ids up to where the answer of turn `num_answered` begins; earlier turns are answered truly."""
        ids, _ = self.conversation(conversation, num_answered)
        return [*ids, *self._question(conversation, num_answered)]

    def _question(self, conversation: Conversation, index: int) -> list[int]:
        images = [token for page in conversation.documents for token in self.image(page)] if index == 0 else []
        start = self.start if index == 0 else []
        return [*start, *self.user, *images, *self.encode(conversation.turns[index].question), *self.assistant]

    def conversation(self, conversation: Conversation, num_turns: int | None = None) -> tuple[list[int], list[int]]:
        """Return `(input_ids, labels)` of the first `num_turns` turns, all by default."""
        ids: list[int] = []
        labels: list[int] = []
        for index, turn in enumerate(conversation.turns[:num_turns]):
            question = self._question(conversation, index)
            answer = [*self.encode(turn.answer), *self.end]
            ids += question + answer
            labels += [IGNORE] * len(question) + answer
        return ids, labels

    def rows(self, page: Document) -> list[int]:
        """The rows of a page that have visual tokens."""
        return [row for row, line in enumerate(page.lines) if line.strip() or not self.skip_blank_rows]

    def cells(self, page: Document) -> list[tuple[int, int]]:
        """Glyph and position in its tile of each visual token, row by row: what a perfect eye would see."""
        return [
            (self.glyphs[character], (row * COLUMNS + column) % TOKENS_PER_TILE)
            for row in self.rows(page)
            for column, character in enumerate(page.lines[row].ljust(COLUMNS))
        ]

    def batch(self, conversations: list[Conversation]) -> Batch:
        encoded = [self.conversation(conversation) for conversation in conversations]
        length = max(len(ids) for ids, _ in encoded)
        input_ids = torch.tensor([ids + [self.pad_token_id] * (length - len(ids)) for ids, _ in encoded])
        labels = torch.tensor([labels + [IGNORE] * (length - len(labels)) for _, labels in encoded])
        pages = [page for conversation in conversations for page in conversation.documents]
        return Batch(input_ids, labels, pages, conversations)


def lessons_by_length(encoder: "Encoder", conversations: list[Conversation], batch_size: int) -> list[Batch]:
    """Put conversations of like length together, to pad little; the order of the batches is by length."""
    by_length = sorted(conversations, key=lambda conversation: len(encoder.conversation(conversation)[0]))
    return [encoder.batch(by_length[start : start + batch_size]) for start in range(0, len(by_length), batch_size)]


def exercise(seed: int, num_lines: int = ROWS_PER_PAGE, share_of_look_ups: float = 0.0) -> Conversation:
    """A page of random characters: there is nothing to guess, so a reader has to copy and to look up.

    Args:
        seed: any integer.
        num_lines: at most so many printed lines, three or more.
        share_of_look_ups: how many of the exercises are lists of names and values, tables, or pairs of lists, with
            questions; the others are to be read out.
    """
    rng = random.Random(f"exercise {seed}")
    if rng.random() >= share_of_look_ups:
        return _copy(rng, num_lines)
    return rng.choices((_look_up, _look_up_cell, _look_up_in_pair), (6, 2, 1))[0](rng, num_lines)


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
    """Names with values on the same or on the next line; questions for some, and for names that are not there."""
    names = _names(rng, rng.randint(2, num_lines) + 1)
    page, known = _list(rng, names[:-1], num_lines)
    asked = rng.sample(list(known), min(7, len(known))) + names[len(known) :][:1]
    rng.shuffle(asked)
    phrasings = rng.choice((FIELD_PHRASINGS, VALUE_PHRASINGS, PRICE_PHRASINGS))[:-1]
    turns = [Turn("field", rng.choice(phrasings).format(name), known.get(name, ABSENT)) for name in asked]
    return Conversation([page], turns)


def _look_up_cell(rng: random.Random, num_lines: int) -> Conversation:
    """A table of random names with one or two columns of numbers; questions for cells."""
    names = _names(rng, rng.randint(2, num_lines - 1) + 1)
    columns = [name[:3] for name in _names(rng, rng.randint(1, 2))]
    rows = {name: [str(rng.randint(0, 999)) for _ in columns] for name in names[:-1]}
    widths = (8, rng.choice((4, -4, 6, 8)) if len(columns) == 1 else rng.choice((4, -4)))
    lines = [_row(rng.choice(("Item", "Name", "Part")), columns, widths)]
    page = _print(rng, lines + [_row(name, row, widths) for name, row in rows.items()])
    asked = rng.sample([(name, index) for name in rows for index in range(len(columns))], min(6, len(rows)))
    cells = [(name, columns[index], rows[name][index]) for name, index in asked]
    cells.insert(rng.randrange(len(cells)), (names[-1], rng.choice(columns), ABSENT))
    phrasings = CELL_PHRASINGS[:-1]
    turns = [Turn("cell", rng.choice(phrasings).format(name, column), cell) for name, column, cell in cells]
    return Conversation([page], turns)


def _look_up_in_pair(rng: random.Random, num_lines: int) -> Conversation:
    """Two lists of the same names; questions for the values of one of them, and whether both say the same."""
    names = _names(rng, rng.randint(2, max(2, num_lines // 2)))
    first, known = _list(rng, names, num_lines)
    second, known_there = _list(rng, names, num_lines, {name: v for name, v in known.items() if rng.random() < 0.5})
    turns = []
    for name in rng.sample(names, min(4, len(names))):
        if name in known and name in known_there:
            same = "Yes." if known[name] == known_there[name] else "No."
            turns.append(Turn("compare", rng.choice(COMPARE_PHRASINGS["same"][:-1]).format(name), same))
            number, values = rng.choice((("first", known), ("second", known_there)))
            turns.append(Turn("field", PAGE_PHRASING.format(name, number), values[name]))
    rng.shuffle(turns)
    return Conversation([first, second], turns)


def _names(rng: random.Random, count: int) -> list[str]:
    """So many different words of random letters."""
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(rng.choices(string.ascii_letters, k=rng.randint(3, 6)))] = None
    return list(names)


def _list(
    rng: random.Random, names: list[str], num_lines: int, given: dict[str, str] | None = None
) -> tuple[Document, dict[str, str]]:
    """Print names with values, those `given` or random ones, and return what found room."""
    pieces = (string.digits, string.digits + ".", string.ascii_lowercase, ALPHABET)
    form = rng.choice(("right", "left", "colon", "below"))
    known: dict[str, str] = {}
    lines: list[str] = []
    for name in names:
        longest = COLUMNS - 1 if form == "below" else COLUMNS - len(name) - 2
        value = (given or {}).get(name, "")
        if not 0 < len(value) <= longest:
            value = _value(rng, rng.choice(pieces), longest)
        printed = {
            "right": [name + value.rjust(COLUMNS - len(name))],
            "left": [f"{name} {value}"],
            "colon": [f"{name}: {value}"],
            "below": [name, value],
        }[form]
        if len(lines) + len(printed) > num_lines:
            break
        lines += printed
        known[name] = value
    return _print(rng, lines), known


def _value(rng: random.Random, alphabet: str, longest: int) -> str:
    """One or two words of random characters."""
    value = "".join(rng.choices(alphabet, k=rng.randint(2, 8)))
    if longest > 9 and rng.random() < 0.5:
        value += " " + "".join(rng.choices(alphabet, k=rng.randint(1, 7)))
    return value[:longest].rstrip()


def _row(name: str, cells: list[str], widths: tuple[int, int]) -> str:
    """A line of a table; a negative width puts cells to the left."""
    width = abs(widths[1])
    return name.ljust(widths[0]) + "".join(c.rjust(width) if widths[1] > 0 else c.ljust(width) for c in cells)


def _print(rng: random.Random, lines: list[str]) -> Document:
    """Put lines on a page in their order, at rows chosen at random or one below the other."""
    rows = range(len(lines))
    if rng.random() < 0.5:
        rows = sorted(rng.sample(range(ROWS_PER_PAGE), len(lines)))
    page = Document("exercise", 0, [""] * ROWS_PER_PAGE)
    for row, line in zip(rows, lines, strict=True):
        page.lines[row] = line.rstrip()
    return page


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
        return _compare_and_find(rng, compare(seed, "train", 5))
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
