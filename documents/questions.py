"""Questions about drawn documents, with exact answers, and the conversations made of them.

Tasks: "field", "price", "chart", "yes/no", "absent" (the answer is `ABSENT`), "transcription", "html" (tables),
"compare" (two images) and "text" (no image). Only the split "heldout" uses the last phrasing of each list. The answer
to a comparison gives both values and then the verdict: "12.40 and 9.80. The first.". The answer to a question about
the highest value of a chart gives the value and its name: "87 (Milk)".
"""

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from documents.generator import KINDS, Document, document
from documents.values import words

ABSENT = "Not in the document."
PAGE_VERDICTS = ("The first.", "The second.")
VERDICTS = (*PAGE_VERDICTS, "Yes.", "No.")

FIELD_PHRASINGS = (
    "What is the {}?",
    "Give the {}, please.",
    "{}?",
    "Which {} is on the page?",
    "Please find the {}.",
    "Read the {}.",
    "Please read the {}.",
    "Find the {} on this page.",
    "The {}, please.",
    "What does the page give as the {}?",
    "What {} does the page have?",  # held out
)
PRICE_PHRASINGS = (
    "What is the price of {}?",
    "How much is {}?",
    "Find the price of {}.",
    "What does {} cost?",
    "Give the price of {}, please.",  # held out
)
VALUE_PHRASINGS = (
    "What is the value of {}?",
    "Read the value of {}.",
    "Find {}, please.",
    "Give the value of {}.",  # held out
)
CELL_PHRASINGS = (
    "What is the {1} of {0}?",
    "Find the {1} of {0}.",
    "Read {1} for {0}.",
    "Give the {1} of {0}.",  # held out
)
CHECK_PHRASINGS = (
    "Is the {} {}?",
    "Is {1} the {0}?",
    "Does the page give {1} as the {0}?",
    "Does the page have {1} as the {0}?",
    "Does the {0} read {1}?",
    "Does the page give the {0} as {1}?",  # held out
)
TRANSCRIBE_PHRASINGS = ("Transcribe the page.", "Read the page.", "Write out all the text.", "Give all the text.")
HTML_PHRASINGS = (
    "Extract the table in this image as HTML.",
    "Write the table as HTML.",
    "Give the table as HTML.",
)
COMPARE_PHRASINGS = {
    "higher": ("Which page has the higher {}?", "Which {} is higher?", "Find the higher {}."),
    "same": ("Do both pages have the same {}?", "Is the {} the same?", "Do both pages give the same {}?"),
    "which": ("Which page is from {}?", "Find the page from {}.", "Which of both pages is from {}?"),
}
PAGE_PHRASING = "What is the {0} of the {1} page?"  # in training only: it teaches to find the values to compare


def phrase_word(article: str, word: str) -> tuple[str, ...]:
    """Return questions about the meaning of a word; the last is held out."""
    noun = f"{article} {word}".strip()
    return (f"What is {noun}?", f"What does the word {word} mean?", f"Explain {word}.", f"Explain the word {word}.")


TEXT_QUESTIONS = {
    "A proof of payment.": phrase_word("a", "receipt"),
    "A request for payment.": phrase_word("an", "invoice"),
    "The amount before tax.": phrase_word("a", "subtotal"),
    "Value added tax.": phrase_word("", "VAT"),
    "The last day to pay.": phrase_word("a", "due date"),
    "The one who sells.": phrase_word("a", "supplier"),
    "The one who buys.": phrase_word("a", "customer"),
    "I read documents.": ("What do you do?", "Who are you?", "What can you do?", "What do you read?"),
}
SYNONYMS = {
    "supplier": ("supplier", "seller", "name of the shop"),
    "total": ("total", "total amount", "amount to pay"),
    "tax": ("tax", "VAT"),
    "date": ("date",),
    "payment": ("payment", "way of payment"),
    "highest": ("highest", "largest"),
    "lowest": ("lowest", "smallest"),
}
# "Who is the seller?" may be asked for these; in training only, so that the evaluation keeps its questions.
PEOPLE = words("supplier customer recipient sender employer")
# Fields that one may expect on each kind of document, so that a question about an absent one is fair.
EXPECTED = {
    "receipt": words(
        "supplier,address,phone number,receipt number,date,time,subtotal,tax,total,payment,due date,customer", ","
    ),
    "invoice": words("invoice number,supplier,customer,date,due date,tax,total,phone number,payment", ","),
    "form": words(
        "title,name,city,address,phone number,date of birth,customer number,employer,country,total,date", ","
    ),
    "table": words("title,total,date,supplier", ","),
    "letter": words(
        "date,recipient,sender,city,subject,day of the meeting,amount to bring,sender's address,phone number,total",
        ",",
    ),
    "bar chart": words("title,highest,lowest,total,date", ","),
    "line chart": words("title,highest,lowest,total,date", ","),
}


@dataclass
class Turn:
    """One question and its answer.

    Attributes:
        task: one of the tasks above.
        question: the user's text.
        answer: the right answer.
        seen: False for a phrasing that training does not have.
        given: the beginning of the answer that carries no loss.
    """

    task: str
    question: str
    answer: str
    seen: bool = True
    given: str = ""


@dataclass
class Conversation:
    """Questions about zero, one or two documents, in order."""

    documents: list[Document]
    turns: list[Turn]


class QuestionMaker:
    """Makes questions of one split from one random generator."""

    def __init__(self, rng: random.Random, split: str):
        self.rng = rng
        self.split = split

    def phrase(self, phrasings: tuple[str, ...], *parts: str) -> tuple[str, bool]:
        """Return a question and whether its phrasing occurs in training."""
        last = len(phrasings) - 1
        index = last if self.split == "heldout" and self.rng.random() < 0.3 else self.rng.randrange(last)
        question = phrasings[index].format(*parts)
        return question[0].upper() + question[1:], index != last

    def name_of(self, field: str) -> str:
        return self.rng.choice(SYNONYMS.get(field, (field,)))

    def turn(self, task: str, answer: str, phrasings: tuple[str, ...], *parts: str) -> Turn:
        question, seen = self.phrase(phrasings, *parts)
        return Turn(task, question, answer, seen)

    def field(self, page: Document) -> Turn:
        name = self.rng.choice(list(page.fields))
        if name in ("highest", "lowest"):
            return self.turn("chart", with_name(page.fields[name], page.prices), FIELD_PHRASINGS, self.name_of(name))
        return self._about_field("field", name, page.fields[name])

    def _about_field(self, task: str, name: str, answer: str) -> Turn:
        if self.split == "train" and name in PEOPLE and self.rng.random() < 0.25:
            words = [word for word in SYNONYMS.get(name, (name,)) if " " not in word]  # not "name of the shop"
            return Turn(task, f"Who is the {self.rng.choice(words)}?", answer)
        return self.turn(task, answer, FIELD_PHRASINGS, self.name_of(name))

    def price(self, page: Document) -> Turn:
        name = self.rng.choice(list(page.prices))
        return self._about_thing(page, name, page.prices[name])

    def _about_thing(self, page: Document, name: str, answer: str) -> Turn:
        if page.kind == "table":
            return self.turn("cell" if answer != ABSENT else "absent", answer, CELL_PHRASINGS, *name.split(" / "))
        task = "absent" if answer == ABSENT else "chart" if "chart" in page.kind else "price"
        return self.turn(task, answer, VALUE_PHRASINGS if "chart" in page.kind else PRICE_PHRASINGS, name)

    def absent(self, page: Document) -> Turn:
        missing = [name for name in EXPECTED[page.kind] if name not in page.fields]
        if page.prices and (not missing or self.rng.random() < 0.3):
            other = document(self.rng.randrange(10**9), self.split, page.kind)
            things = [name.split(" / ")[0] for name in page.prices]
            names = [name for name in other.prices if name.split(" / ")[0] not in things]
            if names:
                return self._about_thing(page, self.rng.choice(names), ABSENT)
        if not missing:
            return self.field(page)
        return self._about_field("absent", self.rng.choice(missing), ABSENT)

    def check(self, page: Document) -> Turn:
        """Return a yes/no question about the true value or one from another document of the kind."""
        name = self.rng.choice([name for name in page.fields if name not in ("highest", "lowest")])
        value, answer = page.fields[name], "Yes."
        if self.rng.random() < 0.5:
            for _ in range(20):
                other = document(self.rng.randrange(10**9), self.split, page.kind)
                if other.fields.get(name, value) != value:
                    value, answer = other.fields[name], "No."
                    break
        return self.turn("yes/no", answer, CHECK_PHRASINGS, self.name_of(name), value)

    def transcribe(self, page: Document) -> Turn:
        return self.turn("transcription", page.text, TRANSCRIBE_PHRASINGS)

    def html(self, page: Document) -> Turn:
        return self.turn("html", table_as_html(page.table), HTML_PHRASINGS)

    def text_only(self) -> Turn:
        answer = self.rng.choice(list(TEXT_QUESTIONS))
        return self.turn("text", answer, TEXT_QUESTIONS[answer])

    def compare(self, first: Document, second: Document) -> Turn:
        """Return a question about a field that both pages have."""
        names = [name for name in ("date", "supplier", "total") if name in first.fields and name in second.fields]
        values = {name: (first.fields[name], second.fields[name]) for name in names}
        amounts = [amount_of(total) for total in values["total"]]
        kinds = ["same"] + ["higher"] * (amounts[0] != amounts[1])
        kinds += ["which"] * (values["supplier"][0] != values["supplier"][1])
        kind = self.rng.choice(kinds)
        name = {"higher": "total", "which": "supplier"}.get(kind) or self.rng.choice(names)
        asked = self.rng.choice(values[name]) if kind == "which" else self.name_of(name)
        return self.turn("compare", comparison(kind, *values[name], asked), COMPARE_PHRASINGS[kind], asked)


def table_as_html(table: list[list[str]]) -> str:
    """Return rows of cells as HTML; the first row is the header."""
    rows = ["".join(f"<td>{cell}</td>" for cell in row) for row in table]
    rows[0] = rows[0].replace("td>", "th>")
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def with_name(name: str, values: dict[str, str]) -> str:
    """Return the answer to a question about the highest or lowest of named numbers: the number and its name."""
    return f"{values[name]} ({name})"


def comparison(kind: str, first: str, second: str, asked: str) -> str:
    """Return the answer to a question of `COMPARE_PHRASINGS` about two values: the values, then the verdict."""
    verdict = {
        "same": lambda: "Yes." if first == second else "No.",
        "which": lambda: PAGE_VERDICTS[asked == second],
        "higher": lambda: PAGE_VERDICTS[amount_of(second) > amount_of(first)],
    }[kind]()
    return f"{first} and {second}. {verdict}"


def verdict_of(answer: str) -> str:
    """Return the last sentence of the answer to a comparison."""
    return answer.rsplit(". ", 1)[-1]


def amount_of(printed: str) -> float:
    """Return a printed amount ("1.240,50 EUR", "-$3.20") as a number; its last mark is the decimal one."""
    digits = re.sub(r"[^\d.,-]", "", printed)
    return float(re.sub(r"[.,]", "", digits)) / (100 if re.search(r"[.,]\d\d$", digits) else 1)


def distinct_turns(make: Callable[[], Turn], num_turns: int) -> list[Turn]:
    """Return turns of which none asks for a value again: it could be copied from the earlier answer.

    Args:
        make: makes a turn at random.
        num_turns: as many, or fewer if four times as many tries do not find them.
    """
    turns: dict[str, Turn] = {}
    for _ in range(num_turns * 4):
        turn = make()
        if turn.task == "compare":
            value = turn.answer.removesuffix(verdict_of(turn.answer))
        elif turn.answer in (ABSENT, "Yes.", "No."):
            value = turn.question
        else:
            value = turn.answer.split(" (")[0]  # "87 (Milk)" contains the value of Milk
        turns.setdefault(value, turn)
        if len(turns) == num_turns:
            break
    return list(turns.values())


def ask(seed: int, split: str, page: Document, num_turns: int) -> Conversation:
    """Return `num_turns` short questions about a page, all different."""
    maker = QuestionMaker(random.Random(f"questions {split} {seed}"), split)
    kinds = [maker.field] * 4 + [maker.absent, maker.check] + ([maker.price] * 3 if page.prices else [])
    return Conversation([page], distinct_turns(lambda: maker.rng.choice(kinds)(page), num_turns))


def read_out(seed: int, split: str, page: Document) -> Conversation:
    """Return a conversation with one long answer: the transcription, or for half of the tables the HTML."""
    maker = QuestionMaker(random.Random(f"read out {split} {seed}"), split)
    turn = maker.html(page) if page.table and maker.rng.random() < 0.5 else maker.transcribe(page)
    return Conversation([page], [turn])


def compare(seed: int, split: str, num_turns: int) -> Conversation:
    """Return questions about two receipts or invoices; in about a third of the pairs both have a value in common."""
    maker = QuestionMaker(random.Random(f"compare {split} {seed}"), split)
    kind = maker.rng.choice(("receipt", "invoice"))
    pages = [document(maker.rng.randrange(10**9), split, kind) for _ in range(2)]
    if maker.rng.random() < 0.5:
        shared = [name for name in ("date", "supplier", "total") if all(name in page.fields for page in pages)]
        name = maker.rng.choice(shared)
        replace_value(pages[1], name, pages[0].fields[name])
    return Conversation(pages, distinct_turns(lambda: maker.compare(*pages), num_turns))


def replace_value(page: Document, name: str, value: str) -> None:
    """Print another value for a field where it fits in place of the old one; otherwise leave the page as it is."""
    old = page.fields[name]
    for row, line in enumerate(page.lines):
        if old in line and len(old) >= 3 and len(line.replace(old, value)) <= 16:
            page.lines[row] = line.replace(old, value)
            page.fields[name] = value
            return


def text_only(seed: int, split: str, num_turns: int) -> Conversation:
    """Return questions without an image."""
    maker = QuestionMaker(random.Random(f"text {split} {seed}"), split)
    return Conversation([], [maker.text_only() for _ in range(num_turns)])


def training_conversation(
    seed: int, kinds: tuple[str, ...] = tuple(KINDS), share_of_long: float = 0.0, share_of_pairs: float = 0.0
) -> Conversation:
    """Return the training conversation of a seed: questions about a page, and for most pages its transcription.

    Args:
        seed: any integer.
        kinds: the kinds of documents to draw.
        share_of_long: share of conversations about a document of two tiles, 0 to 1.
        share_of_pairs: share of conversations that compare two documents, 0 to 1.
    """
    rng = random.Random(f"lesson {seed}")
    draw = rng.random()
    if draw < share_of_pairs:
        return _add_field_questions(rng, compare(seed, "train", 3))
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


def _add_field_questions(rng: random.Random, comparison: Conversation) -> Conversation:
    """Add questions about fields of either page between the comparisons."""
    for number, page in zip(("first", "second"), comparison.documents, strict=True):
        for name in rng.sample(list(page.fields), min(2, len(page.fields))):
            turn = Turn("field", PAGE_PHRASING.format(name, number), page.fields[name])
            comparison.turns.insert(rng.randint(0, len(comparison.turns)), turn)
    return comparison


def instruction_texts() -> Iterator[str]:
    """Yield all fixed wording of questions and short answers, whose words the tokenizer keeps whole."""
    for phrasings in (
        FIELD_PHRASINGS, PRICE_PHRASINGS, VALUE_PHRASINGS, CELL_PHRASINGS, CHECK_PHRASINGS, TRANSCRIBE_PHRASINGS,
        HTML_PHRASINGS, *COMPARE_PHRASINGS.values(), *TEXT_QUESTIONS.values(), *SYNONYMS.values(),
    ):  # fmt: skip
        yield from (phrasing.replace("{}", "").replace("{0}", "").replace("{1}", "") for phrasing in phrasings)
    for names in EXPECTED.values():
        yield from (f"the {name}" for name in names)
        yield from (f"{name[0].upper()}{name[1:]}?" for name in names)
    yield from TEXT_QUESTIONS
    yield from (ABSENT, *VERDICTS)
