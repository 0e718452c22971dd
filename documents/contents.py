"""Makes up pages from seeds, with exact ground truth: receipts, bills, invoices, letters, forms, tables and charts.

A seed always gives the same page. The splits "train" and "heldout" share no values; only "heldout" has the last two
layouts of each kind and the last spelling of each label.
"""

import random
from collections.abc import Callable

from documents.pages import Line, Page, Piece
from documents.values import split_of
from documents.wording import GREETINGS, MAKERS, SUBJECTS, TITLES, Wording

NUM_LAYOUTS = 6
NUM_HELD_OUT = 2  # the last layouts of each kind
Block = list[Line]


class Draft:
    """Blocks of lines under construction."""

    def __init__(self, rng: random.Random, split: str):
        self.rng = rng
        self.words = Wording(rng, split)
        self.fields: dict[str, str] = {}
        self.labels: dict[str, str] = {}
        self.prices: dict[str, str] = {}
        # How label and value share a line, on most lines of a page.
        self.pairs = rng.choice(("spread", "spread", "spread", "inline", "inline", "column"))
        self.stop = rng.uniform(0.3, 0.5)
        self.colon = rng.choice(("", "", ":"))
        self.table: list[list[str]] | None = None

    def maybe(self, chance: float) -> bool:
        return self.rng.random() < chance

    def add(self, name: str, value: str | None = None, label: str | None = None) -> str:
        """Keep a value (by default a made-up one) as the field `name`, and return it for printing."""
        self.fields[name] = MAKERS[name](self.words) if value is None else value
        if label:
            self.labels[name] = label
        return self.fields[name]

    def pair(self, label: str, value: str, bold: bool = False, scale: float = 1.0, form: str | None = None) -> Block:
        """A label and its value as lines, in the page's form or in a given one."""
        form = form or (self.pairs if self.maybe(0.85) else self.rng.choice(("spread", "inline", "stacked")))
        text = label if label.endswith((":", "#")) else label + self.colon
        if form == "spread":
            return [Line([Piece(text), Piece(value, 1.0, "r")], scale, bold)]
        if form == "column":
            return [Line([Piece(text), Piece(value, self.stop)], scale, bold)]
        if form == "stacked":
            return [Line([Piece(text)], scale, bold), Line([Piece(value)], scale, bold)]
        return [Line([Piece(f"{text} {value}")], scale, bold)]

    def labelled(self, name: str, value: str | None = None, **how) -> Block:
        """A field with its label as lines."""
        label = self.words.label(name)
        return self.pair(label, self.add(name, value, label), **how)

    def centred(self, lines: Block) -> Block:
        for line in lines:
            if len(line.pieces) == 1:
                line.pieces[0].stop, line.pieces[0].align = 0.5, "c"
        return lines

    def items(self, count: int, food: bool = False, form: str | None = None) -> Block:
        """Priced lines; fills `prices`, and `net` with the sum in cents."""
        rng, words = self.rng, self.words
        form = form or rng.choice(("plain", "plain", "count", "count", "two lines", "columns", "code", "priced each"))
        self.net = 0
        lines: Block = []
        stop = rng.uniform(0.55, 0.72)
        if form == "columns":
            header = [words.label("item"), words.label("quantity"), words.label("price")]
            pieces = [Piece(header[0]), Piece(header[1], stop, "r"), Piece(header[2], 1.0, "r")]
            lines.append(Line(pieces, bold=self.maybe(0.4)))
        letters = rng.choice(("", "", "", "AB", "T"))
        sign = rng.choice(("x ", " x ", "x", " ", "* "))
        names: list[str] = []
        while len(names) < count:
            name = words.product_name(food)
            if not any(name in other or other in name for other in names):
                names.append(name)
        for name in names:
            cents = words.cents(rng.choice((999, 9999)))
            quantity = rng.choice((1, 1, 1, 2, 2, 3, 4, 6, 12))
            if form in ("two lines", "priced each", "columns", "count") and cents % quantity:
                quantity = 1
            self.net += cents
            price = self.prices[name] = words.money(cents)
            letter = f" {rng.choice(letters)}" if letters else ""
            end = Piece(price + letter, 1.0, "r")
            if form == "plain":
                lines.append(Line([Piece(name), end]))
            elif form == "count":
                lines.append(Line([Piece(f"{quantity}{sign}{name}"), end]))
            elif form == "code":
                lines.append(Line([Piece(f"{rng.randint(100, 99999)} {name}"), end]))
            elif form == "columns":
                lines.append(Line([Piece(name), Piece(str(quantity), stop, "r"), end]))
            elif form == "priced each":
                each = words.money(cents // quantity, with_currency=False)
                lines.append(Line([Piece(name), Piece(f"{quantity} x {each}", stop + 0.05, "r"), end]))
            elif form == "first":  # price before name, held out
                lines.append(Line([Piece(price), Piece(name, 0.3)]))
            else:
                each = words.money(cents // quantity, with_currency=False)
                lines += [Line([Piece(name)]), Line([Piece(f"{quantity} x {each}", 0.08), end])]
        return lines

    def sums(self, with_tip: bool = False) -> Block:
        """Subtotal, tax and total below items."""
        rng, words = self.rng, self.words
        lines: Block = []
        total = self.net
        with_subtotal = self.maybe(0.5)
        if with_subtotal:
            lines += self.labelled("subtotal", words.money(total))
        if self.maybe(0.15) and total > 500:
            cut = -rng.randint(10, total // 4)
            lines += self.labelled("discount", words.money(cut))
            total += cut
        if self.maybe(0.6):
            tax = max(1, round(total * rng.choice((0.05, 0.07, 0.08, 0.1, 0.19, 0.2))))
            lines += self.labelled("tax", words.money(tax))
            total += tax if with_subtotal else 0
        if with_tip and self.maybe(0.4):
            tip = max(1, round(total * rng.choice((0.05, 0.1, 0.12, 0.15))))
            lines += self.labelled("tip", words.money(tip))
            total += tip
        big = self.maybe(0.4)
        if lines and self.maybe(0.3):
            lines.append(rule(rng))
        scale = rng.choice((1.15, 1.3, 1.5)) if big else 1.0
        form = rng.choice(("spread", "spread", "inline")) if self.pairs == "spread" else None
        printed = words.money(total, with_currency=True if self.maybe(0.6) else None)
        lines += self.labelled("total", printed, bold=self.maybe(0.5), scale=scale, form=form)
        self.total = total
        return lines


def rule(rng: random.Random) -> Line:
    return Line([], rule=rng.choice("---==.*__"))


def stack(
    draft: Draft, orders: list[list[Block]], kind: str, layout: int, gap: float = 0.7, shuffle: bool = True
) -> Page:
    """Put the blocks of the layout's order below each other, with blank lines or rules between them.

    In training a quarter of the pages have their blocks shuffled, so that fixed orders are not learned by heart; a
    shuffled page never has a held-out order.
    """
    rng = draft.rng
    order = [block for block in orders[layout] if block]
    if shuffle and draft.words.split == "train" and draft.maybe(0.25):
        held_out = [[id(block) for block in other if block] for other in orders[NUM_LAYOUTS - NUM_HELD_OUT :]]
        while True:
            rng.shuffle(order)
            if [id(block) for block in order] not in held_out:
                break
    between = rng.choice(("blank", "rule", "mixed", "none"))
    lines: Block = []
    for block in order:
        if lines and between != "none" and rng.random() < gap:
            lines.append(Line([]) if between == "blank" or (between == "mixed" and draft.maybe(0.5)) else rule(rng))
        lines += block
    is_seen = layout < NUM_LAYOUTS - NUM_HELD_OUT
    return Page(kind, layout, lines, draft.fields, draft.labels, draft.prices, draft.table, is_seen)


def head_of_shop(draft: Draft) -> Block:
    """Name, address, town and telephone of a shop."""
    rng = draft.rng
    name = Line([Piece(draft.add("supplier"))], rng.choice((1.0, 1.2, 1.4, 1.7)), draft.maybe(0.5))
    rest: Block = []
    if draft.maybe(0.65):
        rest.append(Line([Piece(draft.add("address"))]))
        if draft.maybe(0.5):
            rest.append(Line([Piece(draft.add("city"))]))
    if draft.maybe(0.5):
        phone = draft.add("phone number")
        if draft.maybe(0.6):
            label = draft.labels["phone number"] = draft.words.label("phone number")
            phone = f"{label}{'' if label.endswith(':') else draft.colon} {phone}"
        rest.append(Line([Piece(phone)]))
    if draft.maybe(0.1):
        rest.append(Line([Piece(draft.add("email"))]))
    lines = [name, *rest]
    return draft.centred(lines) if draft.maybe(0.65) else lines


def date_and_time(draft: Draft) -> Block:
    """Date, and time in most, on one line or two, with or without labels."""
    rng = draft.rng
    date = draft.add("date")
    form = rng.choice(("bare", "label", "label", "both ends"))
    if not draft.maybe(0.6):
        if form == "bare":
            return [Line([Piece(date)])]
        label = draft.labels["date"] = draft.words.label("date")
        return draft.pair(label, date)
    time = draft.add("time")
    if form == "bare":
        return [Line([Piece(f"{date} {time}")])]
    if form == "both ends":
        return [Line([Piece(date), Piece(time, 1.0, "r")])]
    label = draft.labels["date"] = draft.words.label("date")
    other = draft.words.label("time")
    if draft.maybe(0.4):
        draft.labels["time"] = other
        return [Line([Piece(f"{label}{draft.colon} {date}"), Piece(f"{other}{draft.colon} {time}", 1.0, "r")])]
    if draft.maybe(0.3):
        return draft.pair(label, f"{date} {time}")
    draft.labels["time"] = other
    return draft.pair(label, date) + draft.pair(other, time)


def details(draft: Draft, chances: dict[str, float]) -> Block:
    """Labelled fields, each with its chance, in a random order."""
    names = [name for name, chance in chances.items() if draft.maybe(chance)]
    draft.rng.shuffle(names)
    if len(names) > 1 and draft.maybe(0.2):  # two of them on one line
        first, second = (f"{draft.words.label(name)}|{name}" for name in names[:2])
        pieces = []
        for place, text in zip(((0.0, "l"), (1.0, "r")), (first, second), strict=True):
            label, name = text.split("|")
            pieces.append(Piece(f"{label}{draft.colon} {draft.add(name, label=label)}", *place))
        lines = [Line(pieces)]
        names = names[2:]
    else:
        lines = []
    return lines + [line for name in names for line in draft.labelled(name)]


def paying(draft: Draft) -> Block:
    """How a bill was paid."""
    lines: Block = []
    draw = draft.rng.random()
    if draw < 0.3:
        given = (draft.total // 1000 + draft.rng.randint(1, 4)) * 1000
        lines += draft.labelled("amount given", draft.words.money(given))
        lines += draft.labelled("change", draft.words.money(given - draft.total))
    elif draw < 0.7:
        lines += draft.labelled("payment")
        if draft.maybe(0.3):
            lines += draft.labelled("card number")
    return lines


def farewell(draft: Draft, chance: float = 0.6) -> Block:
    lines = [Line([Piece(text)]) for text in draft.rng.sample(GREETINGS, draft.rng.choice((1, 1, 2)))]
    return draft.centred(lines) if draft.maybe(chance) else []


def title_of(draft: Draft, kind: str, chance: float) -> Block:
    if not draft.maybe(chance):
        return []
    line = Line([Piece(draft.rng.choice(TITLES[kind]))], draft.rng.choice((1.0, 1.2, 1.5)), draft.maybe(0.6))
    return draft.centred([line]) if draft.maybe(0.5) else [line]


def receipt(draft: Draft, layout: int) -> Page:
    """A receipt of a shop: head, date and number, priced items, sums, payment."""
    head, title = head_of_shop(draft), title_of(draft, "receipt", 0.25)
    when = date_and_time(draft) if draft.maybe(0.9) else []
    number = details(
        draft, {"receipt number": 0.75, "cashier": 0.3, "register": 0.2, "order number": 0.05, "customer number": 0.05}
    )
    bought = draft.items(draft.rng.choice((1, 2, 2, 3, 3, 4, 5, 6, 8, 11)), form="first" if layout == 5 else None)
    sums, paid, end = draft.sums(), paying(draft), farewell(draft)
    count = draft.labelled("number of items", str(len(draft.prices))) if draft.maybe(0.12) else []
    orders = [
        [title, head, number, when, bought, sums, paid, count, end],
        [head, title, when, number, bought, count, sums, paid, end],
        [head, title, bought, sums, paid, count, when, number, end],
        [title, head, when, bought, sums, paid, count, number, end],
        [number, when, bought, sums, paid, count, head, title, end],
        [title, head, sums, paid, when, number, bought, count, end],
    ]
    return stack(draft, orders, "receipt", layout)


def bill(draft: Draft, layout: int) -> Page:
    """A bill of a cafe or restaurant: table, waiter, dishes, tip."""
    head, title = head_of_shop(draft), title_of(draft, "bill", 0.4)
    when = date_and_time(draft) if draft.maybe(0.9) else []
    where = details(
        draft, {"table number": 0.8, "guests": 0.4, "cashier": 0.5, "receipt number": 0.6, "order number": 0.15}
    )
    eaten = draft.items(draft.rng.choice((1, 2, 3, 3, 4, 5, 6, 8)), food=True, form="first" if layout == 5 else None)
    sums, paid, end = draft.sums(with_tip=True), paying(draft), farewell(draft)
    orders = [
        [head, title, where, when, eaten, sums, paid, end],
        [title, head, when, where, eaten, sums, paid, end],
        [head, title, when, eaten, sums, where, paid, end],
        [title, where, when, eaten, sums, paid, head, end],
        [when, title, where, head, eaten, sums, paid, end],
        [head, where, sums, eaten, paid, when, title, end],
    ]
    return stack(draft, orders, "bill", layout)


def invoice(draft: Draft, layout: int) -> Page:
    """A small invoice: number, parties, dates, items, amount due."""
    rng = draft.rng
    number = draft.labelled("invoice number", bold=draft.maybe(0.4), scale=rng.choice((1.0, 1.0, 1.2, 1.5)))
    title = title_of(draft, "invoice", 0.4)
    seller = [Line([Piece(draft.add("supplier"))], rng.choice((1.0, 1.2, 1.5)), draft.maybe(0.5))]
    if draft.maybe(0.3):
        seller = draft.pair(
            draft.words.label("supplier"), seller[0].text, form=rng.choice(("inline", "stacked", "column"))
        )
    if draft.maybe(0.5):
        seller.append(Line([Piece(draft.add("address"))]))
        if draft.maybe(0.5):
            seller.append(Line([Piece(draft.add("city"))]))
    if draft.maybe(0.3):
        seller += draft.labelled("phone number")
    if draft.maybe(0.15):
        seller += draft.labelled("email")
    buyer = draft.labelled("customer", form=rng.choice(("stacked", "stacked", "inline", "column")))
    dates = draft.labelled("date")
    if draft.maybe(0.6):
        dates += draft.labelled("due date")
    dates += details(draft, {"order number": 0.15, "customer number": 0.15, "reference": 0.1})
    bought = draft.items(
        rng.choice((1, 2, 2, 3, 3, 4, 6)),
        form="first" if layout == 5 else rng.choice(("columns", "plain", "count", "priced each")),
    )
    sums = draft.sums()
    end = draft.labelled("payment") if draft.maybe(0.15) else farewell(draft, 0.3)
    orders = [
        [title, number, seller, buyer, dates, bought, sums, end],
        [seller, title, number, dates, buyer, bought, sums, end],
        [seller, buyer, title, number, dates, bought, sums, end],
        [title, seller, dates, number, buyer, bought, sums, end],
        [dates, number, title, buyer, bought, sums, seller, end],
        [title, buyer, sums, number, dates, bought, seller, end],
    ]
    return stack(draft, orders, "invoice", layout)


FORM_FIELDS = (
    "name", "address", "city", "country", "phone number", "email", "date of birth", "customer number", "employer",
    "job", "room", "department", "date", "time",
)  # fmt: skip


def form(draft: Draft, layout: int) -> Page:
    """A filled form: labels with values beside or below them, two side by side in some."""
    rng = draft.rng
    names = rng.sample(FORM_FIELDS, rng.randint(3, 9))
    title = draft.add("title", rng.choice(TITLES["form"]))
    head = [Line([Piece(title)], rng.choice((1.0, 1.2, 1.5)), draft.maybe(0.6))]
    if draft.maybe(0.5):
        draft.centred(head)
    lines: Block = []
    style = ("spread", "stacked", "column", "inline", "above", "beside")[layout]
    while names:
        name = names.pop()
        label = draft.words.label(name)
        value = draft.add(name, label=label)
        if style == "above":
            lines += [Line([Piece(value)]), Line([Piece(f"({label.lower()})")], 0.85)]
        elif style == "beside" and names:
            other = names.pop()
            other_label = draft.words.label(other)
            lines += [
                Line([Piece(label), Piece(other_label, 0.55)], 0.9),
                Line([Piece(value), Piece(draft.add(other, label=other_label), 0.55)]),
            ]
        else:
            lines += draft.pair(label, value, form="inline" if style == "beside" else style)
        if draft.maybe(0.15):
            lines.append(Line([]) if draft.maybe(0.6) else Line([], rule="_"))
    sign = [Line([Piece("Signature")], 0.85)] if draft.maybe(0.2) else []
    return stack(draft, [[head, lines, sign]] * NUM_LAYOUTS, "form", layout, shuffle=False)


def letter(draft: Draft, layout: int) -> Page:
    """A short letter: sender, date, recipient, subject, sentences, signature."""
    rng, words = draft.rng, draft.words
    sender, recipient = draft.add("sender"), draft.add("recipient")
    date = [Line([Piece(draft.add("date"), *rng.choice(((0.0, "l"), (1.0, "r"))))])]
    if draft.maybe(0.2):
        label = draft.labels["date"] = words.label("date")
        date = draft.pair(label, draft.fields["date"], form="inline")
    place = [Line([Piece(sender)])] + [Line([Piece(draft.add("address"))])] + [Line([Piece(draft.add("city"))])]
    if draft.maybe(0.3):
        place += draft.labelled("phone number", form="inline")
    if draft.maybe(0.4):
        place = []
        for name in ("address", "city", "phone number"):
            draft.fields.pop(name, None)
            draft.labels.pop(name, None)
    subject = draft.add("subject", rng.choice(SUBJECTS))
    about = (
        draft.pair(words.label("subject"), subject, bold=draft.maybe(0.4), form="inline") if draft.maybe(0.6) else []
    )
    if about:
        draft.labels["subject"] = about[0].text.removesuffix(subject).rstrip(" :")
    hello = [f"Dear {recipient},", f"Hello {recipient},", f"Dear {recipient}"][rng.randrange(3)]
    sentences = [] if about else [f"I write about {subject}."]
    meeting = draft.add("day of the meeting", words.day())
    sentences.append(
        rng.choice(("We meet on {}.", "Please come on {}.", "Can we talk on {}?", "The day is {}.")).format(meeting)
    )
    if draft.maybe(0.5):
        amount = draft.add("amount to bring", words.money(words.cents(), True))
        sentences.append(
            rng.choice(("Please bring {}.", "It costs {}.", "You owe us {}.", "We ask for {}.")).format(amount)
        )
    if draft.maybe(0.4):
        sentences.append(f"{rng.choice(('My number is', 'Call me at', 'Our file is'))} {words.number_code()}.")
    body = [Line([Piece(hello)]), *(Line([Piece(text)]) for text in wrap(" ".join(sentences), rng.randint(24, 40)))]
    end = [
        Line([Piece(rng.choice(("Regards,", "Yours,", "Best wishes", "Kind regards,", "Sincerely")))]),
        Line([Piece(sender)]),
    ]
    if place and draft.maybe(0.2):
        draft.centred(place)
    orders = [
        [place, date, about, body, end],
        [date, place, about, body, end],
        [date, about, body, end, place],
        [place, about, date, body, end],
        [about, body, end, date, place],
        [body, end, place, date, about],
    ]
    page = stack(draft, orders, "letter", layout)
    whole = " ".join(line.text for line in page.lines if line.pieces)
    if any(value not in whole for value in page.fields.values()):
        raise Unprintable
    return page


class Unprintable(Exception):
    """A draft that cannot be kept."""


def wrap(text: str, width: int) -> list[str]:
    """Break a text into lines of at most `width` characters, so that no value is broken where this can be avoided."""
    lines = [""]
    for word in text.split(" "):
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def table(draft: Draft, layout: int) -> Page:
    """A table of two to four columns with a title."""
    rng, words = draft.rng, draft.words
    title = draft.add(
        "title", f"{words.word(8)} {rng.choice(('list', 'stock', 'plan', 'prices', 'hours', 'results', 'stock list'))}"
    )
    first = rng.choice(("Item", "Name", "Part", "Town", "Product", "Team"))
    num_columns = rng.choice((1, 2, 2, 3)) if layout != 4 else 2
    headings = rng.sample(
        ("Qty", "Kg", "Box", "No.", "Size", "Price", "2023", "2024", "Points", "Hours", "Cost", "Boxes"), num_columns
    )
    names: list[str] = []
    while len(names) < rng.randint(3, 10):
        name = words.product_name() if rng.random() < 0.4 else words.word(9)
        if not any(name in other or other in name for other in names):
            names.append(name)
    money = {heading: heading in ("Price", "Cost") for heading in headings}
    body = [
        [name, *(words.money(words.cents()) if money[h] else words.number(rng.choice((99, 999))) for h in headings)]
        for name in names
    ]
    order = list(range(num_columns + 1))
    if layout == 4:
        order = [1, 0, 2]  # names between two columns of numbers
    if layout == 5:
        order = [*range(1, num_columns + 1), 0]  # names last
    grid = [[row[index] for index in order] for row in ([first, *headings], *body)]
    align = "r" if layout in (0, 2) else "l"
    start = rng.uniform(0.4, 0.5) if layout < 4 else rng.uniform(0.3, 0.4)
    stops = [0.0, *(start + (1 - start) * (i + (align == "r")) / num_columns for i in range(num_columns))]
    if align == "l":
        stops = [min(stop, 0.9) for stop in stops]
    lines: Block = []
    for row in grid:
        pieces = [Piece(cell, stops[i], align if i else "l") for i, cell in enumerate(row)]
        lines.append(Line(pieces, bold=not lines and draft.maybe(0.5)))
    if draft.maybe(0.4):
        lines.insert(1, Line([], rule=rng.choice("-_=")))
    for row in body:
        for heading, cell in zip(headings, row[1:], strict=True):
            draft.prices[f"{row[0]} / {heading}"] = cell
    draft.table = grid
    head = [Line([Piece(title)], rng.choice((1.0, 1.2, 1.5)), draft.maybe(0.6))]
    if draft.maybe(0.4):
        draft.centred(head)
    when = draft.labelled("date", form="inline") if draft.maybe(0.2) else []
    return stack(draft, [[head, when, lines]] * NUM_LAYOUTS, "table", layout, shuffle=False)


def chart(draft: Draft, layout: int) -> Page:
    """A chart of horizontal bars with names and values."""
    rng, words = draft.rng, draft.words
    title = draft.add(
        "title", f"{words.word(8)} {rng.choice(('sales', 'costs', 'visits', 'votes', 'visitors by town'))}"
    )
    count = rng.randint(3, 6)
    allowed = [str(number) for number in range(1, 100) if split_of(str(number)) == words.split]
    names: dict[str, None] = {}
    while len(names) < count:
        names[words.word(8)] = None
    values = dict(zip(names, rng.sample(allowed, count), strict=True))
    draft.prices.update(values)
    for which, choose in (("highest", max), ("lowest", min)):
        draft.fields[which] = choose(values, key=lambda name: int(values[name]))
    lines: Block = []
    for name, value in values.items():
        length = max(0.03, int(value) / 99)
        if layout in (0, 1):  # above the bar, the value beside the name or at the end
            pieces = [Piece(f"{name} {value}")] if layout else [Piece(name), Piece(value, 1.0, "r")]
            lines += [Line(pieces), Line([], bar=length)]
        elif layout in (2, 3):
            pieces = [Piece(name, 0.0), Piece(value, 1.0, "r")] if layout == 2 else [Piece(value), Piece(name, 0.2)]
            lines += [Line([], bar=length), Line(pieces)]
        elif layout == 4:
            lines += [Line([Piece(f"{value} {name}")]), Line([], bar=length)]
        else:
            lines += [Line([Piece(name)]), Line([], bar=length), Line([Piece(value)])]
    head = [Line([Piece(title)], rng.choice((1.0, 1.2, 1.5)), draft.maybe(0.6))]
    return stack(draft, [[head, lines]] * NUM_LAYOUTS, "chart", layout, shuffle=False)


KINDS: dict[str, Callable[[Draft, int], Page]] = {
    "receipt": receipt,
    "bill": bill,
    "invoice": invoice,
    "form": form,
    "letter": letter,
    "table": table,
    "chart": chart,
}
SHARES = {"receipt": 5, "bill": 3, "invoice": 3, "form": 2, "letter": 2, "table": 2, "chart": 1}
MAX_LINES = 30


def make_page(seed: int, split: str = "train", kind: str | None = None) -> Page:
    """Return the page of a seed.

    Args:
        seed: any integer; train and heldout pages of one seed have nothing in common.
        split: "train" or "heldout"; the latter has held-out layouts half of the time.
        kind: one of `KINDS`, or None for a random one, receipts most often.
    """
    rng = random.Random(f"page {split} {seed}")
    if kind is None:
        kind = rng.choices(list(SHARES), SHARES.values())[0]
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}.")
    while True:  # a draft that does not fit is discarded
        draft = Draft(rng, split)
        held_out = split == "heldout" and rng.random() < 0.5
        seen = NUM_LAYOUTS - NUM_HELD_OUT
        layout = rng.randrange(seen, NUM_LAYOUTS) if held_out else rng.randrange(seen)
        try:
            page = KINDS[kind](draft, layout)
        except Unprintable:
            continue
        if len(page.lines) <= MAX_LINES and all(len(line.text) <= 52 for line in page.lines):
            return page
