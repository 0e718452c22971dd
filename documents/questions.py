"""Questions about pages, with exact answers, and the conversations made of them.

Tasks: "field", "price", "cell", "chart", "yes/no", "absent" (the answer is `ABSENT`), "transcription", "html" (tables),
"compare" (two images) and "text" (no image). A field is asked for by one of its names ("the amount to pay"), by a whole
question ("When was this printed?"), or by the label that the page prints ("What does it say after Bill no.?"). Only the
split "heldout" uses the last phrasing of each list. The answer to a comparison gives both values and then the verdict:
"12.40 and 9.80. The first.". The answer to a question about the highest value of a chart gives the value and its name:
"87 (Milk)".
"""

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from documents.contents import make_page
from documents.pages import Page
from documents.values import words
from documents.wording import LABELS

ABSENT = "Not in the document."
PAGE_VERDICTS = ("The first.", "The second.")
VERDICTS = (*PAGE_VERDICTS, "Yes.", "No.")

FIELD_PHRASINGS = (
    "What is the {}?",
    "What is the {}?",
    "What's the {}?",
    "Give the {}, please.",
    "Give me the {}.",
    "{}?",
    "The {}?",
    "Which {} is on the page?",
    "Please find the {}.",
    "Read the {}.",
    "Tell me the {}.",
    "Find the {} on this page.",
    "Find the {} in this image.",
    "The {}, please.",
    "What {} is printed here?",
    "What is the {} on this document?",
    "Can you read the {}?",
    "Extract the {}.",
    "What {} does the page have?",  # held out
)
LABEL_PHRASINGS = (
    "What is the {}?",
    "{}?",
    "What does it say after {}?",
    "What stands next to {}?",
    "Read {}.",
    "What is given as {}?",
    "What is printed for {}?",
    "Give the value of {}.",
    "{}:",
    "What follows {}?",  # held out
)
PRICE_PHRASINGS = (
    "What is the price of {}?",
    "How much is {}?",
    "How much is the {}?",
    "How much was {}?",
    "Find the price of {}.",
    "What does {} cost?",
    "What did the {} cost?",
    "What was paid for {}?",
    "Price of {}?",
    "How much did {} cost?",
    "Give the price of {}, please.",  # held out
)
VALUE_PHRASINGS = (
    "What is the value of {}?",
    "Read the value of {}.",
    "Find {}, please.",
    "What is the number for {}?",
    "How many for {}?",
    "Give the value of {}.",  # held out
)
CELL_PHRASINGS = (
    "What is the {1} of {0}?",
    "Find the {1} of {0}.",
    "Read {1} for {0}.",
    "What is the {1} for {0}?",
    "{0}, {1}?",
    "Give the {1} of {0}.",  # held out
)
CHECK_PHRASINGS = (
    "Is the {} {}?",
    "Is {1} the {0}?",
    "Does the page give {1} as the {0}?",
    "Does the page have {1} as the {0}?",
    "Does the {0} read {1}?",
    "Is it true that the {0} is {1}?",
    "Does the page give the {0} as {1}?",  # held out
)
TRANSCRIBE_PHRASINGS = (
    "Transcribe the page.",
    "Read the page.",
    "Write out all the text.",
    "Transcribe this image.",
    "Read all the text.",
    "What does the document say?",
    "Give all the text.",
)
HTML_PHRASINGS = (
    "Extract the table in this image as HTML.",
    "Write the table as HTML.",
    "Convert the table to HTML.",
    "Give the table as HTML.",
)
COMPARE_PHRASINGS = {
    "higher": ("Which page has the higher {}?", "Which {} is higher?", "Find the higher {}."),
    "same": ("Do both pages have the same {}?", "Is the {} the same?", "Do both pages give the same {}?"),
    "which": ("Which page is from {}?", "Find the page from {}.", "Which of both pages is from {}?"),
}


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
NAMES = {
    "supplier": words(
        "supplier|seller|name of the shop|shop|store|merchant|vendor|company|name of the store|store name|"
        "merchant name|business|name of the company|shop name",
        "|",
    ),
    "total": words(
        "total|total|total amount|amount to pay|grand total|amount due|total price|sum|final amount|total due|amount paid in total|"
        "total to pay|overall total|invoice total",
        "|",
    ),
    "subtotal": words("subtotal|net amount|amount before tax|sum before tax|net total|sub-total", "|"),
    "tax": words("tax|VAT|sales tax|tax amount|amount of tax|VAT amount", "|"),
    "tip": words("tip|gratuity|service charge", "|"),
    "discount": words("discount|rebate|savings", "|"),
    "amount given": words("amount given|cash given|amount tendered|cash received|money given", "|"),
    "change": words("change|change given|money given back|change due", "|"),
    "payment": words("payment|way of payment|payment method|means of payment|payment type|method of payment", "|"),
    "receipt number": words(
        "receipt number|number of the receipt|bill number|ticket number|transaction number|receipt no|document number|"
        "number of the bill|receipt ID|check number",
        "|",
    ),
    "order number": words("order number|number of the order|order ID", "|"),
    "invoice number": words("invoice number|number of the invoice|invoice ID|bill number|document number", "|"),
    "date": words("date|date|date of the document|date of purchase|purchase date|day|date printed|issue date", "|"),
    "time": words("time|time of day|time of purchase|hour", "|"),
    "due date": words("due date|last day to pay|payment deadline|date due", "|"),
    "phone number": words("phone number|telephone number|phone|telephone", "|"),
    "email": words("email|email address|e-mail", "|"),
    "cashier": words("cashier|name of the cashier|waiter|server|person who served", "|"),
    "table number": words("table number|number of the table|table", "|"),
    "guests": words("number of guests|guest count|number of people", "|"),
    "register": words("register|till|terminal|register number", "|"),
    "card number": words("card number|number of the card", "|"),
    "number of items": words("number of items|item count|number of articles", "|"),
    "customer": words("customer|buyer|client|name of the customer|recipient of the invoice", "|"),
    "customer number": words("customer number|customer ID|member number|account number", "|"),
    "name": words("name|full name|name of the person", "|"),
    "address": words("address|street|street address|street and number", "|"),
    "city": words("city|town|place", "|"),
    "country": words("country|nationality", "|"),
    "date of birth": words("date of birth|birthday|birth date", "|"),
    "employer": words("employer|place of work", "|"),
    "job": words("job|occupation|profession", "|"),
    "room": words("room|room number|office", "|"),
    "department": words("department|division", "|"),
    "sender": words("sender|author|name of the sender|writer", "|"),
    "recipient": words("recipient|addressee|name of the recipient", "|"),
    "subject": words("subject|topic", "|"),
    "reference": words("reference|file number|reference number", "|"),
    "title": words("title|heading|headline", "|"),
    "day of the meeting": words("day of the meeting|date of the meeting|meeting date", "|"),
    "amount to bring": words("amount to bring|amount asked for|amount of money", "|"),
    "highest": words("highest value|largest value|maximum", "|"),
    "lowest": words("lowest value|smallest value|minimum", "|"),
}
WHOLE = {  # whole questions; the last of each is held out
    "supplier": words("Who is the seller?|Where was this bought?|Which shop is this from?|What is the shop called?|Who issued this?", "|"),
    "total": words(
        "How much was paid in total?|How much is it in total?|What did it cost altogether?|How much do I have to pay?|"
        "What do I owe?|How much is the bill?|How much did everything cost?",
        "|",
    ),
    "date": words("When was this issued?|When was this printed?|What day was this?|When was it bought?|When was this written?", "|"),
    "time": words("At what time?|What time was it?|At what time was this printed?", "|"),
    "payment": words("How was it paid?|How did the customer pay?|How was the bill paid?", "|"),
    "cashier": words("Who served?|Who was the cashier?|Who served the customer?", "|"),
    "customer": words("Who is the customer?|Who is the buyer?|Who has to pay?", "|"),
    "address": words("Where is it?|What is the street?|In which street is it?", "|"),
    "tax": words("How much is the tax?|How much tax was paid?|How much tax is included?", "|"),
    "due date": words("When is it due?|Until when must it be paid?|By when must I pay?", "|"),
    "phone number": words("What number can I call?|How can I call them?|What is the number to call?", "|"),
    "sender": words("Who wrote this?|Who signed this?|Who is the letter from?", "|"),
    "recipient": words("Who is this written to?|Who is the recipient?|Who is the letter to?", "|"),
    "change": words("How much change was given?|How much money came back?|How much change is there?", "|"),
    "name": words("Who is it?|Who filled in the form?|Whose form is this?", "|"),
    "employer": words("Who is the employer?|Where does the person work?|Whom does the person work for?", "|"),
    "table number": words("Which table?|At which table?|Which table was it?", "|"),
    "highest": words("Which is the highest?|Which one has the most?|Which is the largest?", "|"),
    "lowest": words("Which is the lowest?|Which one has the least?|Which is the smallest?", "|"),
}  # fmt: skip
# Fields that one may expect on each kind of page, so that a question about an absent one is fair.
_SHOP = (
    "address,city,phone number,email,receipt number,date,time,subtotal,tax,total,payment,cashier,discount,change,"
    "card number,order number,number of items,due date,customer,tip,table number,amount given,customer number,guests,"
    "register"
)
EXPECTED = {
    "receipt": words(_SHOP, ","),
    "bill": words(_SHOP, ","),
    "invoice": words(
        "address,city,phone number,email,order number,customer number,reference,date,due date,subtotal,tax,discount,"
        "payment,time,cashier,tip,card number",
        ",",
    ),
    "form": words(
        "name,address,city,country,phone number,email,date of birth,customer number,employer,job,room,department,date,"
        "time,total,tax,due date",
        ",",
    ),
    "letter": words("address,city,phone number,email,due date,amount to bring,tax,time,customer number", ","),
    "table": words("date,total,supplier,phone number,address", ","),
    "chart": words("date,total,phone number,supplier", ","),
}
CONFUSED = {
    "payment": "amount given",
    "amount given": "payment",
    "total": "amount to bring",
    "order number": "receipt number",
}


# Names of fields that the tokenizer keeps whole as well; all others are spelled, as printed labels are, so that a label is
# found by its characters.
WHOLE_NAMES = (
    " address birth bring city country meeting name phone sender subject title",
    "Address,Amount,City,Country,Customer,Date,Day,Due,Employer,Highest,Invoice,Lowest,Name,Payment,Phone,Receipt,"
    "Recipient,Sender,Subject,Subtotal,Supplier,Tax,Time,Title,Total,VAT,amount,date,highest,largest,lowest,name,"
    "payment,seller,smallest,supplier,tax,the,total,way",
)


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

    documents: list[Page]
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

    def turn(self, task: str, answer: str, phrasings: tuple[str, ...], *parts: str) -> Turn:
        question, seen = self.phrase(phrasings, *parts)
        return Turn(task, question, answer, seen)

    def name_of(self, field: str) -> str:
        return self.rng.choice(NAMES.get(field, (field,)))

    def about(self, task: str, name: str, answer: str) -> Turn:
        """Return a question about the field `name`, by one of its names or as a whole question."""
        if name in WHOLE and self.rng.random() < 0.2:
            return self.turn(task, answer, WHOLE[name])
        return self.turn(task, answer, FIELD_PHRASINGS, self.name_of(name))

    def field(self, page: Page) -> Turn:
        name = self.rng.choice(list(page.fields))
        if name in ("highest", "lowest"):
            return self.about("chart", name, with_name(page.fields[name], page.prices))
        labels = [other for field, other in page.labels.items() if field != name]
        label = page.labels.get(name)
        if label and self.rng.random() < 0.3 and not any(label.lower() in other.lower() for other in labels):
            return self.turn("field", page.fields[name], LABEL_PHRASINGS, label)
        return self.about("field", name, page.fields[name])

    def price(self, page: Page) -> Turn:
        name = self.rng.choice(list(page.prices))
        return self.about_thing(page, name, page.prices[name])

    def about_thing(self, page: Page, name: str, answer: str) -> Turn:
        if page.kind == "table":
            return self.turn("cell" if answer != ABSENT else "absent", answer, CELL_PHRASINGS, *name.split(" / "))
        is_chart = page.kind == "chart"
        task = "absent" if answer == ABSENT else "chart" if is_chart else "price"
        return self.turn(task, answer, VALUE_PHRASINGS if is_chart else PRICE_PHRASINGS, name)

    def absent(self, page: Page) -> Turn:
        """Return a question about a field, a label or a thing that the page does not have."""
        if page.prices and self.rng.random() < 0.3:
            other = make_page(self.rng.randrange(10**9), self.split, page.kind)
            text = page.text.lower()
            names = [name for name in other.prices if name.split(" / ")[0].lower() not in text]
            if names:
                return self.about_thing(page, self.rng.choice(names), ABSENT)
        missing = [
            name for name in EXPECTED[page.kind] if name not in page.fields and CONFUSED.get(name) not in page.fields
        ]
        if not missing:
            return self.field(page)
        name = self.rng.choice(missing)
        if name in LABELS and self.rng.random() < 0.2:
            label = self.rng.choice(LABELS[name][:-1])
            if label.lower() not in page.text.lower() and len(label) > 3:
                return self.turn("absent", ABSENT, LABEL_PHRASINGS, label)
        return self.about("absent", name, ABSENT)

    def check(self, page: Page) -> Turn:
        """Return a yes/no question about the true value, a value of another page, or the value of another field."""
        name = self.rng.choice([name for name in page.fields if name not in ("highest", "lowest")])
        value, answer = page.fields[name], "Yes."
        if self.rng.random() < 0.5:
            others = [other for other in page.fields.values() if other != value]
            if others and self.rng.random() < 0.2:
                value, answer = self.rng.choice(others), "No."
            elif any(character.isdigit() for character in value) and self.rng.random() < 0.3:
                place = self.rng.choice([index for index, character in enumerate(value) if character.isdigit()])
                digit = self.rng.choice([digit for digit in "0123456789" if digit != value[place]])
                value, answer = value[:place] + digit + value[place + 1 :], "No."
            else:
                for _ in range(20):
                    other = make_page(self.rng.randrange(10**9), self.split, page.kind)
                    if other.fields.get(name, value) != value:
                        value, answer = other.fields[name], "No."
                        break
        return self.turn("yes/no", answer, CHECK_PHRASINGS, self.name_of(name), value)

    def transcribe(self, page: Page) -> Turn:
        return self.turn("transcription", page.text, TRANSCRIBE_PHRASINGS)

    def html(self, page: Page) -> Turn:
        return self.turn("html", table_as_html(page.table), HTML_PHRASINGS)

    def text_only(self) -> Turn:
        answer = self.rng.choice(list(TEXT_QUESTIONS))
        return self.turn("text", answer, TEXT_QUESTIONS[answer])

    def compare(self, first: Page, second: Page) -> Turn:
        """Return a question about a field that both pages have; the answer gives both values, then the verdict."""
        names = [name for name in ("date", "supplier", "total") if name in first.fields and name in second.fields]
        values = {name: (first.fields[name], second.fields[name]) for name in names}
        kinds = ["same"]
        if "total" in values and amount_of(values["total"][0]) != amount_of(values["total"][1]):
            kinds.append("higher")
        if "supplier" in values and values["supplier"][0] != values["supplier"][1]:
            kinds.append("which")
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


def ask(seed: int, split: str, page: Page, num_turns: int) -> Conversation:
    """Return `num_turns` short questions about a page, all different."""
    maker = QuestionMaker(random.Random(f"questions {split} {seed}"), split)
    kinds = [maker.field] * 5 + [maker.absent] * 2 + [maker.check] + ([maker.price] * 3 if page.prices else [])
    return Conversation([page], distinct_turns(lambda: maker.rng.choice(kinds)(page), num_turns))


def read_out(seed: int, split: str, page: Page) -> Conversation:
    """Return a conversation with one long answer: the transcription, or for half of the tables the HTML."""
    maker = QuestionMaker(random.Random(f"read out {split} {seed}"), split)
    return Conversation(
        [page], [maker.html(page) if page.table and maker.rng.random() < 0.5 else maker.transcribe(page)]
    )


def compare(seed: int, split: str, num_turns: int) -> Conversation:
    """Return questions about two receipts, bills or invoices; a third of the pairs share a value."""
    maker = QuestionMaker(random.Random(f"compare {split} {seed}"), split)
    kind = maker.rng.choice(("receipt", "bill", "invoice"))
    pages = [make_page(maker.rng.randrange(10**9), split, kind) for _ in range(2)]
    names = [name for name in ("date", "supplier", "total") if all(name in page.fields for page in pages)]
    if names and maker.rng.random() < 0.4:
        name = maker.rng.choice(names)
        replace_value(pages[1], name, pages[0].fields[name])
    return Conversation(pages, distinct_turns(lambda: maker.compare(*pages), num_turns))


def replace_value(page: Page, name: str, value: str) -> None:
    """Print another value for a field in place of the old one."""
    old = page.fields[name]
    for line in page.lines:
        for piece in line.pieces:
            if old in piece.text:
                piece.text = piece.text.replace(old, value)
    page.fields[name] = value


def text_only(seed: int, split: str, num_turns: int) -> Conversation:
    """Return questions without an image."""
    maker = QuestionMaker(random.Random(f"text {split} {seed}"), split)
    return Conversation([], [maker.text_only() for _ in range(num_turns)])


def training_conversation(
    seed: int, pairs: float = 0.05, transcriptions: float = 0.65, kinds: tuple[str, ...] | None = None
) -> Conversation:
    """Return the training conversation of a seed: questions about a page, and for most pages its transcription.

    Args:
        seed: any integer.
        pairs: share of conversations that compare two pages, 0 to 1.
        transcriptions: share of questioned pages that are read out too, 0 to 1.
        kinds: of pages to draw; all by default, in the shares of `documents.contents`.
    """
    rng = random.Random(f"conversation {seed}")
    drawn = rng.random()
    if drawn < pairs:
        return compare(seed, "train", 3)
    if drawn < pairs + 0.02:
        return text_only(seed, "train", 4)
    page = make_page(seed, kind=rng.choice(kinds) if kinds else None)
    if rng.random() < 0.2:
        return read_out(seed, "train", page)
    conversation = ask(seed, "train", page, 9)
    if rng.random() < transcriptions:
        conversation.turns += read_out(seed, "train", page).turns
    return conversation


def instruction_texts() -> Iterator[str]:
    """Yield the fixed wording of questions and short answers, whose words the tokenizer keeps whole."""
    for phrasings in (
        FIELD_PHRASINGS, LABEL_PHRASINGS, PRICE_PHRASINGS, VALUE_PHRASINGS, CELL_PHRASINGS, CHECK_PHRASINGS,
        TRANSCRIBE_PHRASINGS, HTML_PHRASINGS, *COMPARE_PHRASINGS.values(), *TEXT_QUESTIONS.values(), *WHOLE.values(),
    ):  # fmt: skip
        yield from (re.sub(r"\{\d?\}", "", phrasing) for phrasing in phrasings)
    yield from TEXT_QUESTIONS
    yield from (ABSENT, *VERDICTS, *WHOLE_NAMES)
