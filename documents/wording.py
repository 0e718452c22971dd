"""How documents word things: the spellings of labels, made-up values in the forms in which shops print them.

The last spelling of each label is held out from training.
"""

import random
from collections.abc import Callable

from documents.values import MONTHS, Values, words

LABELS = {
    "total": words(
        "Total|Total|TOTAL|Total due|Amount due|Grand total|To pay|Sum|Balance due|Total amount|Amount payable|"
        "Total to pay|Please pay|Amount|Balance|Total sum|Bill total|Pay this amount|TOTAL DUE|Total (EUR)|"
        "Total price|Final total",
        "|",
    ),
    "subtotal": words(
        "Subtotal|Subtotal|Sub-total|Sub total|Net|Net amount|Items total|Goods|Net total|Before tax|Merchandise|"
        "Net sum",
        "|",
    ),
    "tax": words(
        "Tax|VAT|VAT|Sales tax|GST|Tax 8%|VAT 20%|VAT 19%|Tax 7.5%|HST|Tax amount|VAT (10%)|State tax|incl. VAT|Tax 1|"
        "Tax due",
        "|",
    ),
    "tip": words("Tip|Gratuity|Service|Service charge|Service 10%|Tip added", "|"),
    "discount": words("Discount|Rebate|Savings|You saved|Coupon|Member discount|Promotion|Price cut", "|"),
    "amount given": words("Cash|Tendered|Cash given|Amount paid|Cash tendered|Given|Received|Cash received", "|"),
    "change": words("Change|Change|Change due|Your change|Cash back|Change given", "|"),
    "payment": words(
        "Payment|Paid by|Paid with|Payment method|Method|Tender|Paid|Payment type|Pay type|Settled by", "|"
    ),
    "receipt number": words(
        "Receipt|Receipt No.|Receipt #|Receipt no|Ticket|Ticket No.|No.|No|#|Bill|Bill no.|Bill #|Trans.|Transaction|"
        "Trans. no.|Check|Check #|Slip|Slip no.|Ref|Ref. no.|Doc. no.|Document|Sale|Sale #|Voucher no.",
        "|",
    ),
    "order number": words("Order|Order #|Order no.|Order No.|Order ID|Your order|Order ref.", "|"),
    "invoice number": words(
        "Invoice|Invoice No.|Invoice no.|Invoice #|INVOICE|Inv. no.|No.|Number|Invoice number|Bill no.|Invoice ref.",
        "|",
    ),
    "date": words("Date|Date|Date|DATE|Dated|Date of sale|Day|Purchase date|Issued|Issued on|Printed|Sold on", "|"),
    "time": words("Time|Time|TIME|At|Hour|Time of sale", "|"),
    "due date": words("Due|Due date|Pay by|Payment due|Due by|Please pay by|Due on|Payable by", "|"),
    "phone number": words("Tel|Tel.|Phone|Tel:|Call|T|Ph.|Phone no.|Telephone|Call us", "|"),
    "email": words("Email|E-mail|Mail|Contact|Write to", "|"),
    "cashier": words("Cashier|Served by|Your cashier|Clerk|Operator|Server|Staff|Waiter|You were served by", "|"),
    "table number": words("Table|Table no.|TABLE|Table #|Tab.|Seat", "|"),
    "guests": words("Guests|Covers|Persons|Guest count|Diners", "|"),
    "register": words("Register|Till|Terminal|POS|Reg.|Lane|Desk", "|"),
    "card number": words("Card|Card no.|Account|Card number|Card ending", "|"),
    "number of items": words("Items|Item count|No. of items|Items sold|Articles|Number of items|Pieces", "|"),
    "supplier": words("From|Seller|Vendor|Supplier|Company|Issued by|Shop|Sold by", "|"),
    "customer": words("To|Bill to|Customer|Buyer|Client|Sold to|Billed to|Invoice to|For", "|"),
    "customer number": words("Customer no.|Customer ID|Client no.|Account no.|Member|Member no.|Customer #", "|"),
    "name": words("Name|Full name|Applicant|Your name|Name of applicant|Participant", "|"),
    "address": words("Address|Street|Home address|Street address|Residence", "|"),
    "city": words("City|Town|Place|City/Town|Home town", "|"),
    "country": words("Country|Nationality|Country of residence|Nation", "|"),
    "date of birth": words("Born|Date of birth|Birth date|DOB|Birthday", "|"),
    "employer": words("Employer|Company|Works for|Place of work", "|"),
    "job": words("Job|Occupation|Position|Profession|Trade", "|"),
    "room": words("Room|Room no.|Office|Room number|Suite", "|"),
    "department": words("Department|Dept.|Division|Unit|Section", "|"),
    "sender": words("From|Sender|Signed|Author", "|"),
    "recipient": words("To|Recipient|Attn.|For the attention of", "|"),
    "subject": words("Subject|Re|Regarding|About|Topic", "|"),
    "reference": words("Reference|Our ref.|Ref.|Your ref.|File|File no.", "|"),
    "price": words("Price|Price|Amount|Total|EUR|USD|Cost|Sum|Line total", "|"),
    "item": words("Item|Description|Article|Product|Goods|Name|What", "|"),
    "quantity": words("Qty|Qty.|Quantity|No.|Pcs|Units|Count", "|"),
}
GREETINGS = words(
    "Thank you!|Thank you for your visit|Come again soon|Goodbye|Have a nice day|THANK YOU|See you soon|"
    "Please keep this receipt|No refund without receipt|Thanks for shopping with us|Customer copy|Open daily 8 to 20|"
    "Follow us online|Returns within 14 days|Your opinion counts|All prices include VAT|Enjoy your meal|Merchant copy",
    "|",
)
PAYMENTS = words(
    "CASH|Cash|CARD|Card|VISA|Visa|Mastercard|MASTERCARD|Debit|DEBIT CARD|Credit card|Cheque|Bank transfer|Gift card|"
    "Contactless|Amex|Maestro|Voucher",
    "|",
)
TITLES = {
    "receipt": words("Receipt|RECEIPT|Sales receipt|Cash receipt|Sale|Tax receipt|Till receipt", "|"),
    "bill": words("Bill|GUEST CHECK|Guest bill|Table bill|Your bill|Check", "|"),
    "invoice": words("Invoice|INVOICE|Tax invoice|Bill|Statement|Pro forma", "|"),
    "form": words(
        "Application|Registration|Order form|Member card|Visitor pass|Registration form|Membership form|"
        "Parcel label|Patient card|Library card|Job application|Loan request|Delivery note|Event sign-up",
        "|",
    ),
}
SUBJECTS = words(
    "your order|our meeting|the delivery|the invoice|the repair|your visit|your letter|the new contract|a late payment|"
    "your booking|the missing parts|our summer party|the roof of the shed|your question|the garden fence",
    "|",
)
ADJECTIVES = words(
    "Green Black White Red Fresh Dark Sweet Large Small Iced Hot Dried Organic Plain Mixed Baked Grilled Smoked Wild "
    "Golden Classic Double Extra Light Blue Soft Spicy Roast Whole Mini"
)
FOODS = words(
    "Espresso Latte Cappuccino Croissant Muffin Bagel Soup Salad Burger Pizza Fries Lasagne Curry Steak Omelette Pancakes "
    "Lemonade Beer Wine Cider Cola Tart Sorbet Risotto Wrap Toast Sandwich Brownie Cookie Noodles Dumplings Olives Hummus"
)
SIZES = words("1L|500ml|250g|2kg|XL|12pk|75cl|S|M|No. 4|A4|3m|60W|330ml|1kg|x6", "|")
SHOPS = words(
    "Foods|Market|Supply|Works|Bros|Mill|Books|Parts|Tools|Shop|Deli|Cafe|Bakery|Garden|Sport|Kitchen|Bistro|Diner|"
    "Pharmacy|Hardware|Flowers|Electronics|& Sons|Ltd|Inc.|Stores|Coffee House|Grill|Bar|Toys|Shoes|Fashion|GmbH|"
    "Corner Shop|Trading Co.|Outlet|Express|Hotel|Garage|Services|Design|Studio",
    "|",
)
FIRST = words("The Old New Big Little Royal Golden Happy Blue Green North South East West City Corner")
ROADS = words("Road Lane St Way Hill Park Street Avenue Ave. Square Drive Court Place Rd. Blvd")


class Wording(Values):
    """Values in the forms in which shops and offices print them.

    Args:
        rng: the generator of the page.
        split: "train" or "heldout".
    """

    def __init__(self, rng: random.Random, split: str = "train"):
        super().__init__(rng, split)
        self.shouts = rng.random() < 0.2
        self.date_form = self._form_of_date()
        self.time_form = rng.choice(("{h:02}:{m:02}", "{h:02}:{m:02}", "{h:02}:{m:02}:{s:02}", "{t}:{m:02} {x}"))
        self.comma = rng.random() < 0.15
        sign = rng.choice("$$$\u20ac\u20ac\u00a3")
        code = {"$": "USD", "\u20ac": "EUR", "\u00a3": "GBP"}[sign]
        self.money_form = rng.choice((sign + "{}", sign + "{}", "{}" + sign, "{} " + sign, "{} " + code, code + " {}"))
        self.amount_form = rng.choice(("{}", "{}", "{}", self.money_form))

    def label(self, name: str) -> str:
        """Return a spelling of a label."""
        choices = LABELS[name]
        held_out = self.split == "heldout" and self.rng.random() < 0.3
        label = choices[-1] if held_out else self.rng.choice(choices[:-1])
        return label.upper() if self.shouts else label

    def money(self, cents: int, with_currency: bool | None = None) -> str:
        """Return an amount as the page prints it, with the currency for totals or where all amounts have it."""
        sign = "-" if cents < 0 else ""
        whole, rest = divmod(abs(cents), 100)
        thousands = f"{whole:,}" if whole > 999 and self.date_form[-1] != "y" else str(whole)
        amount = f"{sign}{thousands}.{rest:02}"
        if self.comma:
            amount = amount.translate(str.maketrans(",.", ".,"))
        form = self.money_form if with_currency else self.amount_form if with_currency is None else "{}"
        return form.format(amount)

    def shop(self) -> str:
        """A name of one to four words."""

        def make() -> str:
            draw = self.rng.random()
            name = self.word(9)
            if draw < 0.1:
                return name
            if draw < 0.25:
                return f"{self.rng.choice(FIRST)} {name} {self.rng.choice(SHOPS)}"
            if draw < 0.35:
                return f"{name}'s {self.rng.choice(SHOPS)}"
            if draw < 0.45:
                return f"{name} & {self.word(8)}"
            return f"{name} {self.rng.choice(SHOPS)}"

        name = self._draw(make)
        return name.upper() if self.shouts or self.rng.random() < 0.2 else name

    def product_name(self, food: bool = False) -> str:
        """A name of one to three words."""

        def make() -> str:
            thing = self.rng.choice(FOODS) if food and self.rng.random() < 0.7 else self.product(9)
            if self.rng.random() < 0.4:
                thing = f"{self.rng.choice(ADJECTIVES)} {thing}"
            if self.rng.random() < 0.2:
                thing = f"{thing} {self.rng.choice(SIZES)}"
            return thing

        name = self._draw(make)
        return name.upper() if self.shouts else name

    def full_name(self) -> str:
        def make() -> str:
            draw = self.rng.random()
            if draw < 0.15:
                return f"{self.rng.choice(('Mr', 'Ms', 'Dr', 'Mrs'))} {self.word(8)}"
            if draw < 0.3:
                return f"{self.word(6)[0]}. {self.word(9)}"
            return f"{self.word(7)} {self.word(9)}"

        return self._draw(make)

    def street(self) -> str:
        form = self.rng.choice(("{n} {w} {r}", "{n} {w} {r}", "{w} {r} {n}", "{n}{a} {w} {r}"))
        return self._draw(
            lambda: form.format(
                n=self.rng.randint(1, 299),
                w=self.word(8),
                r=self.rng.choice(ROADS),
                a=self.rng.choice("abc"),
            )
        )

    def town(self) -> str:
        form = self.rng.choice(("{w}", "{p} {w}", "{w} {p}", "{w}, {s} {p}"))
        return self._draw(
            lambda: form.format(
                w=self.word(9),
                p=f"{self.rng.randint(0, 99999):05}",
                s="".join(self.rng.choices("ACDEILMNORTX", k=2)),
            )
        )

    def telephone(self) -> str:
        form = self.rng.choice(
            ("0##-######", "0### ######", "(0##) ### ###", "###-###-####", "(###) ###-####", "+## ### ######",
             "0#### ###", "0## ### ## ##", "555-####")
        )  # fmt: skip
        return self._draw(lambda: "".join(str(self.rng.randint(0, 9)) if c == "#" else c for c in form))

    def number_code(self) -> str:
        """A document's number: digits, with letters or a year in some."""
        digits = self.rng.randint(3, 8)
        form = self.rng.choice(
            ("{n}", "{n}", "{n}", "{l}{n}", "{l}-{n}", "#{n}", "{y}-{n}", "{n}/{y}", "{l}{l}-{y}-{n}")
        )
        digits = min(digits, 5) if "{y}" in form or "{l}{l}" in form else digits
        return self._draw(
            lambda: form.format(
                n="".join(str(self.rng.randint(0, 9)) for _ in range(digits)),
                l=self.rng.choice("ABCDEFGHKLMNPRSTVWX"),
                y=self.rng.randint(2015, 2029),
            )
        )

    def address_of_mail(self) -> str:
        return self._draw(
            lambda: f"{self.word(7)}@{self.word(8)}.{self.rng.choice(('com', 'net', 'org', 'eu'))}".lower()
        )

    def _form_of_date(self) -> str:
        return self.rng.choice(
            ("{y}-{m:02}-{d:02}", "{d:02}.{m:02}.{y}", "{d:02}.{m:02}.{y}", "{m:02}/{d:02}/{y}", "{d:02}/{m:02}/{y}",
             "{d} {n} {y}", "{n} {d}, {y}", "{d:02}-{n}-{s:02}", "{d:02}/{m:02}/{s:02}", "{w} {d} {n} {y}",
             "{d:02}.{m:02}.{s:02}", "{d} {l} {y}", "{l} {d}, {y}", "{m}/{d}/{y}", "{d:02} {n} {y}")
        )  # fmt: skip

    def day(self) -> str:
        """A date in the page's form."""

        def make() -> str:
            month, year = self.rng.randint(1, 12), self.rng.randint(1998, 2029)
            return self.date_form.format(
                y=year, s=year % 100, m=month, d=self.rng.randint(1, 28), n=MONTHS[month - 1],
                l=LONG_MONTHS[month - 1], w=self.rng.choice(("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")),
            )  # fmt: skip

        return self._draw(make)

    def clock(self) -> str:
        """A time in the page's form."""

        def make() -> str:
            hour = self.rng.randint(0, 23)
            return self.time_form.format(
                h=hour, t=hour % 12 or 12, x="PM" if hour > 11 else "AM", m=self.rng.randint(0, 59),
                s=self.rng.randint(0, 59),
            )  # fmt: skip

        return self._draw(make)


LONG_MONTHS = words("January February March April May June July August September October November December")
MAKERS: dict[str, Callable[[Wording], str]] = {
    "supplier": Wording.shop,
    "customer": lambda w: w.full_name() if w.rng.random() < 0.6 else w.shop(),
    "name": Wording.full_name,
    "sender": Wording.full_name,
    "recipient": lambda w: w.full_name() if w.rng.random() < 0.7 else w.word(8),
    "cashier": lambda w: w.word(8) if w.rng.random() < 0.6 else w.full_name(),
    "address": Wording.street,
    "city": Wording.town,
    "country": lambda w: w.word(9),
    "phone number": Wording.telephone,
    "email": Wording.address_of_mail,
    "receipt number": Wording.number_code,
    "order number": Wording.number_code,
    "invoice number": Wording.number_code,
    "customer number": Wording.number_code,
    "reference": Wording.number_code,
    "date": Wording.day,
    "due date": Wording.day,
    "date of birth": Wording.day,
    "time": Wording.clock,
    "payment": lambda w: w.rng.choice(PAYMENTS),
    "table number": lambda w: w.number(60),
    "guests": lambda w: w.number(20),
    "register": lambda w: w._draw(lambda: f"{w.rng.randint(1, 99):02}"),
    "number of items": lambda w: w.number(30),
    "card number": lambda w: w._draw(
        lambda: w.rng.choice(("****", "XXXX", "************")) + f"{w.rng.randint(0, 9999):04}"
    ),
    "employer": Wording.shop,
    "job": lambda w: w._draw(lambda: w.rng.choice(JOBS)),
    "room": lambda w: w._draw(lambda: w.rng.choice(("", "", "B", "C-")) + str(w.rng.randint(1, 420))),
    "department": lambda w: w._draw(lambda: w.rng.choice(DEPARTMENTS)),
}
JOBS = words(
    "Baker Carpenter Nurse Teacher Driver Plumber Engineer Gardener Painter Welder Lawyer Chemist Waiter Tailor Farmer "
    "Florist Clerk Dentist Surveyor Roofer Cook Mason Pilot Editor"
)
DEPARTMENTS = words(
    "Sales Finance Research Shipping Support Marketing Purchasing Logistics Quality Security Design Legal Training Stores"
)
