"""How well a checkpoint reads receipts that look unlike its training: 60 receipts, three questions each.

    python -m evaluation.foreign --model nano --out runs/foreign.json

The receipts are drawn here with code, shops, wares and arrangements of their own; nothing of `documents` is used but the
typefaces, and nothing is trained on them. Asked are the total, the date and the receipt's number.
"""

import json
import random

import torch
from PIL import Image, ImageDraw

from documents import fonts
from evaluation.commands import conditions, evaluation_parser, write_report
from tools.chat import load
from tools.command_line import progress

QUESTIONS = {
    "total": "What is the total amount?",
    "date": "What is the date?",
    "number": "What is the receipt number?",
}
SHOPS = ("Harbour Fish & Chips", "KIOSK AM MARKT", "Blue Door Books", "Nordlicht Cafe", "City Hardware Centre",
         "La Petite Boulangerie", "Sunrise Grocery", "TECH CORNER", "Old Mill Farm Shop", "Riverside Pharmacy")  # fmt: skip
STREETS = ("14 Quay Street", "Marktplatz 3", "221 Elm Street", "7 rue du Port", "88 Station Road", "5 Mill Lane")
WARES = ("Haddock", "Mushy peas", "Newspaper", "Atlas of birds", "Filter coffee", "Cinnamon roll", "Wood screws 4x40",
         "Masking tape", "Baguette", "Eclair", "Bananas", "Oat milk", "USB cable", "AA batteries", "Goat cheese",
         "Plum jam", "Plasters", "Throat lozenges", "Batteries 9V", "Tomatoes")  # fmt: skip
NUMBER_LABELS = ("Receipt no:", "Bon-Nr.", "Ticket:", "Receipt #", "Rcpt", "Invoice/Receipt:", "Beleg", "Receipt No")
TOTAL_LABELS = ("TOTAL", "Total", "Total EUR", "AMOUNT DUE", "SUMME / TOTAL", "Total to pay", "Balance to pay")


def receipt(seed: int) -> tuple[Image.Image, dict[str, str]]:
    """Return the image of a receipt, and the total, date and number that it prints."""
    rng = random.Random(f"foreign {seed}")
    face = rng.choice([face for split in ("train", "heldout") for face in fonts.installed(split)])
    size = rng.choice((15, 16, 18, 20, 22))
    width = rng.choice((300, 340, 384, 420, 480))
    regular, bold = fonts.load(face, False, size), fonts.load(face, True, size)
    year, month, day = rng.randint(2019, 2027), rng.randint(1, 12), rng.randint(1, 28)
    dates = (
        f"{day:02}.{month:02}.{year}",
        f"{day:02}/{month:02}/{year}",
        f"{year}-{month:02}-{day:02}",
        f"{day:02}.{month:02}.{year % 100:02}",
    )
    prices = [rng.randint(85, 3999) for _ in range(rng.randint(1, 6))]
    money = (
        (lambda cents: f"{cents / 100:.2f}")
        if rng.random() < 0.7
        else (lambda cents: f"{cents / 100:.2f}".replace(".", ","))
    )
    truth = {
        "total": rng.choice(("{}", "{}", "\u20ac{}", "{} \u20ac")).format(money(sum(prices))),
        "date": rng.choice(dates),
        "number": rng.choice(("{}", "{}", "A{}", "{}-1")).format(rng.randint(1000, 99999)),
    }
    rows: list[tuple[str, str, bool]] = []  # left, right, bold; a lone left one may be centred
    rows.append((rng.choice(SHOPS), "", True))
    rows.append((rng.choice(STREETS), "", False))
    numbered = (rng.choice(NUMBER_LABELS), truth["number"])
    head = [(*numbered, False) if rng.random() < 0.5 else (f"{numbered[0]} {numbered[1]}", "", False)]
    clock = f"{rng.randint(8, 21):02}:{rng.randint(0, 59):02}"
    head.append(
        rng.choice(
            ((truth["date"], clock, False), ("Date", truth["date"], False), (f"Date: {truth['date']}", "", False))
        )
    )
    rng.shuffle(head)
    goods = [(name, money(price), False) for name, price in zip(rng.sample(WARES, len(prices)), prices, strict=True)]
    end = [(rng.choice(TOTAL_LABELS), truth["total"], rng.random() < 0.6)]
    if rng.random() < 0.5:
        end.append(("incl. VAT 19 %", money(round(sum(prices) * 0.16)), False))
    end.append((rng.choice(("Cash", "Girocard", "VISA contactless")), "", False))
    blocks = [head, goods, end] if rng.random() < 0.75 else [goods, end, head]
    for block in blocks:
        rows += [("", "", False), *block]
    step = round(size * rng.uniform(1.25, 1.6))
    margin = rng.randint(10, 30)
    needed = max(bold.getlength(left) + bold.getlength(right) + 2 * size for left, right, _ in rows) + 2 * margin
    width = max(width, round(needed))
    image = Image.new("RGB", (width, step * len(rows) + 4 * size), rng.choice(((255, 255, 255), (248, 246, 240))))
    canvas = ImageDraw.Draw(image)
    is_centred = rng.random() < 0.6
    for index, (left, right, is_bold) in enumerate(rows):
        font, y = bold if is_bold else regular, round(1.5 * size) + step * index
        if index < 2 and is_centred:
            canvas.text((width / 2, y), left, (25, 25, 25), font, anchor="ma")
        else:
            canvas.text((margin, y), left, (25, 25, 25), font, anchor="la")
        canvas.text((width - margin, y), right, (25, 25, 25), font, anchor="ra")
        if not left and rng.random() < 0.5:
            canvas.line((margin, y + step // 2, width - margin, y + step // 2), (120, 120, 120))
    if rng.random() < 0.4:
        image = image.rotate(rng.uniform(-1.2, 1.2), Image.Resampling.BICUBIC, expand=True, fillcolor=(235, 235, 235))
    return image, truth


@torch.no_grad()
def answers(model, processor, num_receipts: int) -> list[dict]:
    """Return a row for each question: the receipt, what is asked, the right answer and the one given."""
    rows = []
    with progress(total=num_receipts, desc="Reading", unit="receipt") as bar:
        for seed in range(num_receipts):
            image, truth = receipt(seed)
            pixels = processor.image_processor([image], return_tensors="pt")
            for name, question in QUESTIONS.items():
                given = model.chat(
                    processor.tokenizer,
                    question=f"<image>\n{question}",
                    generation_config={"max_new_tokens": 32},
                    **pixels,
                )
                rows.append(
                    {
                        "receipt": seed,
                        "asked": name,
                        "wanted": truth[name],
                        "given": given,
                        "right": given == truth[name],
                    }
                )
            bar.update()
    return rows


def main() -> None:
    parser = evaluation_parser(__doc__)
    parser.add_argument("--receipts", type=int, default=60)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    fonts.require("train", "heldout")
    rows = answers(*load(arguments.model), arguments.receipts)
    numbers = {name: sum(row["right"] for row in rows if row["asked"] == name) for name in QUESTIONS}
    report = {
        **conditions(arguments),
        "receipts": arguments.receipts,
        "right": numbers,
        "all": sum(numbers.values()),
    }
    write_report(arguments.out, report | {"answers": rows})
    print(json.dumps(report))


if __name__ == "__main__":
    main()
