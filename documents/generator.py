"""Makes up documents from seeds, with exact ground truth.

A document is a grid of characters, 16 columns wide as on a narrow receipt printer, whose fields are known by name:
receipts, invoices, forms, tables, letters, bar and line charts. `documents.drawing` turns it into an image,
`documents.questions` into questions and answers. A seed always gives the same document. The splits "train" and
"heldout" share no values, and only "heldout" uses the last layout of each kind.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from documents.values import Values, split_of

COLUMNS = 16
ROWS_PER_PAGE = 16
NUM_LAYOUTS = 4  # the last one is held out

CURRENCIES = ("", "", "$", "\u20ac", "\u00a3")  # euro, pound
PAYMENTS = ("CASH", "CARD", "VISA", "CHEQUE")
LETTER_SUBJECTS = ("your order", "our meeting", "the delivery", "the invoice", "the repair", "your visit")


@dataclass
class Document:
    """One page.

    Attributes:
        kind: "receipt", "invoice", "form", "table", "letter", "bar chart" or "line chart".
        layout: index of the arrangement; training may shuffle its blocks and never uses `NUM_LAYOUTS - 1`.
        lines: the printed rows, at most `COLUMNS` characters each; a multiple of `ROWS_PER_PAGE` of them.
        fields: values that questions can be about, by name; each is printed exactly so.
        prices: price (or chart value, or table cell) of each thing named in the document.
        table: header and body rows for documents that are tables.
        rules: rows on which a thin line is drawn; they hold no characters.
        bars: (row, length in columns) of bars drawn under the text of a bar chart.
        points: (row, column) of the marks that a line chart connects.
    """

    kind: str
    layout: int
    lines: list[str]
    fields: dict[str, str] = field(default_factory=dict)
    prices: dict[str, str] = field(default_factory=dict)
    table: list[list[str]] | None = None
    rules: list[int] = field(default_factory=list)
    bars: list[tuple[int, int]] = field(default_factory=list)
    points: list[tuple[int, int]] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The transcription: printed lines without blank ones, runs of spaces as one."""
        return "\n".join(" ".join(line.split()) for line in self.lines if line.strip())


class Draft:
    """Blocks of lines under construction; `arrange` puts them on a page."""

    def __init__(self, rng: random.Random, values: Values):
        self.rng = rng
        self.values = values
        self.fields: dict[str, str] = {}
        self.prices: dict[str, str] = {}
        self.capitals = rng.random() < 0.25
        self.currency = rng.choice(CURRENCIES)
        self.comma = rng.random() < 0.15

    def add_field(self, name: str, value: str) -> str:
        """Keep `value` as the field `name` and return it for printing."""
        self.fields[name] = value
        return value

    def maybe(self, chance: float = 0.6) -> bool:
        return self.rng.random() < chance

    def money(self, cents: int, with_currency: bool = False) -> str:
        amount = f"{cents // 100}.{cents % 100:02}"
        amount = amount.replace(".", ",") if self.comma else amount
        return self.currency + amount if with_currency else amount

    def label(self, *choices: str) -> str:
        label = self.rng.choice(choices)
        return label.upper() if self.capitals else label

    def pair(self, label: str, value: str) -> list[str]:
        """A label and its value on one line, the value to the right, or on two lines when they do not fit."""
        if len(label) + 1 + len(value) > COLUMNS:
            return [label, value.rjust(COLUMNS)]
        if self.rng.random() < 0.3:
            return [f"{label} {value}"]
        return [label + value.rjust(COLUMNS - len(label))]

    def items(self, count: int) -> list[str]:
        """Priced lines; returns them and keeps `prices` and `sum_of_items`."""
        lines: list[str] = []
        self.sum_of_items = 0
        for name in self.values.products(count):
            cents = self.values.cents()
            self.sum_of_items += cents
            self.prices[name] = self.money(cents)
            lines += self.pair(name, self.prices[name])
        return lines


def in_order(draft: Draft, orders: tuple[list[list[str]], ...], layout: int) -> list[list[str]]:
    """The blocks that have lines, in the order of the layout.

    In training two in five pages have their blocks shuffled, because a model memorises three fixed orders. A shuffled
    page has neither the first nor the second block of the held-out order (the last of `orders`) in its place.
    """
    order, held_out = ([block for block in orders[index] if block] for index in (layout, NUM_LAYOUTS - 1))
    if draft.values.split == "train" and draft.maybe(0.4):
        draft.rng.shuffle(order)
        while order[0] is held_out[0] or order[1] is held_out[1]:
            draft.rng.shuffle(order)
    return order


def arrange(
    draft: Draft, blocks: list[list[str]], kind: str, layout: int, rows: int, centred: bool = False
) -> Document:
    """Stack blocks on a page of `rows` rows, with blank rows or thin rules between them where there is room."""
    rng = draft.rng
    spare = rows - sum(len(block) for block in blocks)
    lines: list[str] = []
    rules: list[int] = []
    for index, block in enumerate(blocks):
        if index and spare > 0 and rng.random() < 0.7:
            if rng.random() < 0.5:
                rules.append(len(lines))
            lines.append("")
            spare -= 1
        lines += [line.center(COLUMNS).rstrip() for line in block] if centred and index == 0 else block
    top = rng.randint(0, max(0, spare))
    lines = [""] * top + lines
    lines = lines[:rows] + [""] * (rows - len(lines))
    return Document(kind, layout, lines, draft.fields, draft.prices, rules=[row + top for row in rules])


def receipt(draft: Draft, layout: int, rows: int) -> Document:
    """Make a receipt: header, date and number, priced items, sums; the layouts differ in the order of these blocks."""
    values = draft.values
    header = [draft.add_field("supplier", values.company().upper() if draft.capitals else values.company())]
    if draft.maybe():
        header.append(draft.add_field("address", values.address()))
    if draft.maybe(0.5):
        phone = draft.add_field("phone number", values.phone())
        header.append(phone if len(phone) > 11 or draft.maybe(0.5) else f"Tel {phone}")
    meta: list[str] = []
    if draft.maybe(0.4):
        meta += draft.pair(draft.label("Receipt", "No", "Ticket"), draft.add_field("receipt number", values.code()))
    if draft.maybe(0.8):
        date = draft.add_field("date", values.date())
        if len(date) == 10 and draft.maybe(0.5):
            meta.append(f"{date} {draft.add_field('time', values.time())}")
        else:
            meta += draft.pair(draft.label("Date", "On"), date) if draft.maybe(0.5) else [date]
    bought = draft.items(draft.rng.randint(2, 4) if rows == ROWS_PER_PAGE else draft.rng.randint(5, 12))
    sums: list[str] = []
    total = draft.sum_of_items
    if draft.maybe(0.5):
        tax = values.cents(999)
        if draft.maybe(0.5):
            sums += draft.pair(draft.label("Subtotal", "Net"), draft.add_field("subtotal", draft.money(total)))
        sums += draft.pair(draft.label("Tax", "VAT"), draft.add_field("tax", draft.money(tax)))
        total += tax
    sums += draft.pair(draft.label("Total", "To pay", "Sum"), draft.add_field("total", draft.money(total, True)))
    footer: list[str] = []
    if draft.maybe(0.5):
        footer += draft.pair(draft.label("Paid by", "Payment"), draft.add_field("payment", draft.rng.choice(PAYMENTS)))
    if draft.maybe(0.3):
        footer.append(draft.rng.choice(("Thank you!", "Come again", "Goodbye")))
    orders = (
        [header, meta, bought, sums, footer],
        [meta, header, bought, sums, footer],
        [header, bought, sums, footer, meta],
        [header, sums, meta, bought, footer],
    )
    return arrange(draft, in_order(draft, orders, layout), "receipt", layout, rows, centred=draft.maybe(0.5))


def invoice(draft: Draft, layout: int, rows: int) -> Document:
    """Make an invoice: number, parties, dates, items and the amount due."""
    values = draft.values
    head = [
        draft.label("Invoice")
        + " "
        + draft.add_field("invoice number", values.code(draft.rng.choice(("", "A", "R-"))))
    ]
    parties = [draft.label("From", "Seller") + ":", draft.add_field("supplier", values.company())]
    parties += [draft.label("To", "Bill to") + ":", draft.add_field("customer", values.person())]
    dates = draft.pair(draft.label("Date", "Issued"), draft.add_field("date", values.date()))
    if draft.maybe(0.6):
        dates += draft.pair(draft.label("Due", "Pay by"), draft.add_field("due date", values.date()))
    bought = draft.items(draft.rng.randint(1, 3) if rows == ROWS_PER_PAGE else draft.rng.randint(4, 9))
    total = draft.sum_of_items
    sums: list[str] = []
    if draft.maybe(0.5):
        tax = values.cents(999)
        sums += draft.pair(draft.label("VAT", "Tax"), draft.add_field("tax", draft.money(tax)))
        total += tax
    sums += draft.pair(draft.label("Total", "Amount"), draft.add_field("total", draft.money(total, True)))
    orders = (
        [head, parties, dates, bought, sums],
        [parties, head, dates, bought, sums],
        [head, dates, parties, bought, sums],
        [dates, head, bought, sums, parties],
    )
    return arrange(draft, in_order(draft, orders, layout), "invoice", layout, rows, centred=draft.maybe(0.3))


def form(draft: Draft, layout: int, rows: int) -> Document:
    """Make a form; label and value stand on one line, with or without a colon, or on two lines."""
    values = draft.values
    title = draft.rng.choice(("Application", "Registration", "Order form", "Member card", "Visitor pass"))
    known: list[tuple[str, str, Callable[[], str]]] = [
        ("name", "Name", values.person),
        ("city", "City", lambda: values.word(9)),
        ("address", "Address", values.address),
        ("phone number", "Phone", values.phone),
        ("date of birth", "Born", values.date),
        ("customer number", "Customer", lambda: values.code("C")),
        ("employer", "Employer", values.company),
        ("country", "Country", lambda: values.word(8)),
    ]
    chosen = draft.rng.sample(known, draft.rng.randint(4, 6))
    lines: list[str] = []
    for name, label, make in chosen:
        value, label = draft.add_field(name, make()), draft.label(label)
        if layout == 0:
            lines += draft.pair(label, value)
        elif layout == 1:
            lines += [f"{label}:", value]
        elif layout == 2:
            lines += draft.pair(label + ":", value)
        else:
            lines += [value, f"({label.lower()})"]
    return arrange(draft, [[draft.add_field("title", title)], lines], "form", layout, rows, centred=draft.maybe(0.5))


def table(draft: Draft, layout: int, rows: int) -> Document:
    """Make a table of two or three columns with a title; the layouts differ in alignment and order of columns."""
    values, rng = draft.values, draft.rng
    title = draft.add_field("title", f"{values.word(8)} {rng.choice(('list', 'stock', 'plan'))}")
    first = rng.choice(("Item", "Name", "Part"))
    other = rng.sample(("Qty", "Kg", "Box", "No"), 2 if layout in (0, 3) else 1)
    names = values.products(rng.randint(3, 7 if rows == ROWS_PER_PAGE else 20), longest=7)
    body = [[name, *(values.number() for _ in other)] for name in names]
    header = [first, *other]

    def line(cells: list[str]) -> str:
        if layout == 3:
            return cells[1].ljust(4) + cells[0].ljust(8) + cells[2].rjust(4)
        if layout == 2:
            return cells[0].ljust(8) + cells[1]
        return cells[0].ljust(8) + "".join(cell.rjust(4 if len(cells) == 3 else 6) for cell in cells[1:])

    for row in body:
        for column, cell in zip(other, row[1:], strict=True):
            draft.prices[f"{row[0]} / {column}"] = cell
    document = arrange(
        draft, [[title], [line(header).rstrip()], [line(row).rstrip() for row in body]], "table", layout, rows
    )
    document.table = (
        [[header[1], header[0], header[2]], *([b, a, c] for a, b, c in body)]
        if layout == 3
        else [
            header,
            *body,
        ]
    )
    return document


def letter(draft: Draft, layout: int, rows: int) -> Document:
    """Make a letter: date, greeting, a few sentences, signature."""
    values, rng = draft.values, draft.rng
    date = [draft.add_field("date", values.date())]
    recipient, sender = draft.add_field("recipient", values.word(8)), draft.add_field("sender", values.person())
    city = draft.add_field("city", values.word(9))
    subject = draft.add_field("subject", rng.choice(LETTER_SUBJECTS))
    body = [f"Dear {recipient},", "about", f"{subject}:", "we meet in", city]
    body.append(f"on {draft.add_field('day of the meeting', values.date())}.")
    if draft.maybe(0.5):
        body += ["Please bring", f"{draft.add_field('amount to bring', draft.money(values.cents(), True))}."]
    end = [rng.choice(("Regards", "Yours", "Best wishes")), sender]
    place = [draft.add_field("sender's address", values.address())] if draft.maybe(0.5) else []
    orders = ([date, body, end, place], [place, date, body, end], [body, end, date, place], [end, place, body, date])
    return arrange(draft, in_order(draft, orders, layout), "letter", layout, rows)


def extremes(values: dict[str, str]) -> dict[str, str]:
    """Return the names of the highest and the lowest of named whole numbers, as "highest" and "lowest"."""
    choosers = {"highest": max, "lowest": min}
    return {which: choose(values, key=lambda name: int(values[name])) for which, choose in choosers.items()}


def chart_lines(draft: Draft, count: int) -> list[tuple[str, str]]:
    """Return `count` names with different values for a chart, and keep them as fields and prices."""
    names = draft.values.products(count, longest=7)
    allowed = [str(number) for number in range(1, 100) if split_of(str(number)) == draft.values.split]
    draft.rng.shuffle(allowed)
    draft.prices.update(zip(names, allowed, strict=False))
    draft.fields.update(extremes(draft.prices))
    return [(name, draft.prices[name]) for name in names]


def bar_chart(draft: Draft, layout: int, rows: int) -> Document:
    """Make a chart of horizontal bars: the name, the value, and a bar below or beside them."""
    title = draft.add_field("title", f"{draft.values.word(8)} {draft.rng.choice(('sales', 'costs', 'visits'))}")
    points = chart_lines(draft, draft.rng.randint(3, 5))
    body: list[str] = []
    bars: list[tuple[int, int]] = []
    for name, value in points:
        length = max(1, round(int(value) / 99 * COLUMNS))
        text = {0: f"{name} {value}", 1: name.ljust(COLUMNS - 3) + value.rjust(3), 2: f"{value} {name}"}
        bars.append((len(body) + (0 if layout == 3 else 1), length))
        body += ["", f"{value.rjust(3)} {name}"] if layout == 3 else [text[layout], ""]
    document = arrange(draft, [[title], body], "bar chart", layout, rows, centred=draft.maybe(0.5))
    start = next(row for row, line in enumerate(document.lines) if body[0 if layout != 3 else 1] == line)
    document.bars = [(row + start - (1 if layout == 3 else 0), length) for row, length in bars]
    return document


def line_chart(draft: Draft, layout: int, rows: int) -> Document:
    """Make a chart of points joined by a line, each with its value beside it, and a legend of names below."""
    title = draft.add_field("title", f"{draft.values.word(8)} {draft.rng.choice(('sales', 'costs', 'visits'))}")
    points = chart_lines(draft, 4)
    plot_rows = 7
    plot = [[" "] * COLUMNS for _ in range(plot_rows)]
    marks: list[tuple[int, int]] = []
    for index, (_, value) in enumerate(points):
        row = plot_rows - 1 - round(int(value) / 99 * (plot_rows - 2))
        column = index * 4
        marks.append((row, column))
        row_of_text = row - 1 if layout != 3 else row
        column_of_text = column if layout != 3 else column + 1
        for offset, digit in enumerate(value):
            plot[row_of_text][column_of_text + offset] = digit
    names = [name for name, _ in points]
    legend = [f"{index + 1} {name}" for index, name in enumerate(names)]
    if layout == 1:
        legend = [f"{index + 1}: {name}" for index, name in enumerate(names)]
    if layout == 2:
        legend = names
    plot_lines = ["".join(line).rstrip() for line in plot]
    lines = [title, *plot_lines, *legend]
    lines += [""] * (rows - len(lines))
    document = Document("line chart", layout, lines, draft.fields, draft.prices)
    document.points = [(row + 1, column) for row, column in marks]
    return document


KINDS: dict[str, Callable[[Draft, int, int], Document]] = {
    "receipt": receipt,
    "invoice": invoice,
    "form": form,
    "table": table,
    "letter": letter,
    "bar chart": bar_chart,
    "line chart": line_chart,
}
LONG_KINDS = ("receipt", "invoice", "table")  # these may also be two pages long


def document(seed: int, split: str = "train", kind: str | None = None, num_pages: int = 1) -> Document:
    """Return the document of a seed.

    Args:
        seed: any integer; train and heldout documents of one seed have nothing in common.
        split: "train" or "heldout"; only the latter uses the last layout (half of the time).
        kind: one of `KINDS`, or None for a random one.
        num_pages: height in units of `ROWS_PER_PAGE` rows; more than 1 only for `LONG_KINDS`.
    """
    rng = random.Random(f"{split} {seed}")
    if kind is None:
        kind = rng.choice(LONG_KINDS if num_pages > 1 else tuple(KINDS))
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}.")
    if num_pages > 1 and kind not in LONG_KINDS:
        raise ValueError(f"A {kind} has one page; num_pages={num_pages} is for {', '.join(LONG_KINDS)}.")
    rows = ROWS_PER_PAGE * num_pages
    while True:  # a draft that does not fit its page is discarded
        draft = Draft(rng, Values(rng, split))
        held_out = split == "heldout" and rng.random() < 0.5
        layout = NUM_LAYOUTS - 1 if held_out else rng.randrange(NUM_LAYOUTS - 1)
        candidate = KINDS[kind](draft, layout, rows)
        printed = "\n".join(candidate.lines)
        fits = len(candidate.lines) == rows and all(len(line) <= COLUMNS for line in candidate.lines)
        if fits and all(value in printed for value in [*candidate.fields.values(), *candidate.prices.values()]):
            return candidate
