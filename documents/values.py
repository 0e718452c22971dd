"""Values for drawn documents: names, streets, dates, amounts.

The checksum of a value decides its split, "heldout" for one in five and "train" for the others. Therefore the
evaluation never has a name, date or amount that training has printed, whatever the seeds are.
"""

import random
import zlib
from collections.abc import Callable

SPLITS = ("train", "heldout")


def words(text: str, separator: str | None = None) -> tuple[str, ...]:
    """Split a text into words; long lists are easier to read this way."""
    return tuple(text.split(separator))


ONSETS = words("b br c ch cl d dr f fl g gr h j k kl l m n p pr qu r s sh st t tr v w y z")
VOWELS = words("a e i o u ai ea ee io oa ou")
CODAS = words("b ck d g l ld m n nd ng p r rn rt s st t th x")
RUDE = words("cock cunt dick fag fuck nig piss prick shit slut tit")  # syllables can meet by accident
COMPANIES = words("Foods Market Supply Works Bros Mill Books Parts Tools Shop Deli Cafe Bakery Garden Sport")
STREETS = words("Road Lane St Way Hill Park")
GOODS = words(
    "Milk Bread Butter Apples Pears Coffee Tea Sugar Flour Rice Pasta Cheese Yogurt Eggs Salt Honey Juice Water Soap "
    "Paper Pen Pencil Folder Stapler Lamp Cable Plug Screw Bolt Nut Hammer Drill Saw Tape Glue Brush Paint Hose Seeds "
    "Pot Vase Candle Towel Socks Shirt Gloves Hat Scarf Belt Ball Racket Rope Tent Torch Battery Charger Mouse Cup"
)
MONTHS = words("Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec")


def split_of(value: str) -> str:
    """Return the split that owns `value`; it depends on nothing else."""
    return "heldout" if zlib.crc32(value.encode()) % 5 == 0 else "train"


class Values:
    """Draws values of one split from one random generator.

    Args:
        rng: the generator of the document; the same seed draws the same values.
        split: "train" or "heldout".
    """

    def __init__(self, rng: random.Random, split: str = "train"):
        if split not in SPLITS:
            raise ValueError(f"split must be one of {SPLITS}, got {split!r}.")
        self.rng = rng
        self.split = split

    def _draw(self, make: Callable[[], str]) -> str:
        while True:
            value = make()
            if split_of(value) == self.split:
                return value

    def _word(self, syllables: int) -> str:
        while True:
            pieces = [self.rng.choice(ONSETS) + self.rng.choice(VOWELS) for _ in range(syllables)]
            word = "".join(pieces) + self.rng.choice(CODAS)
            if not any(rude in word for rude in RUDE):
                return word

    def word(self, longest: int = 9) -> str:
        """A made-up capitalised word of at most `longest` letters."""

        def make() -> str:
            while len(word := self._word(self.rng.choice((1, 1, 2)))) > longest:
                pass
            return word.capitalize()

        return self._draw(make)

    def product(self, longest: int = 8) -> str:
        """A thing that is sold: a known word (three in five) or a made-up one."""
        if self.rng.random() < 0.4:
            return self.word(longest)
        return self._draw(lambda: self.rng.choice([good for good in GOODS if len(good) <= longest]))

    def products(self, count: int, longest: int = 8) -> list[str]:
        """`count` different products."""
        found: dict[str, None] = {}
        while len(found) < count:
            found[self.product(longest)] = None
        return list(found)

    def company(self) -> str:
        return self._draw(lambda: f"{self.word(8)} {self.rng.choice(COMPANIES)}")

    def person(self) -> str:
        return self._draw(lambda: f"{self.word(5)} {self.word(8)}")

    def address(self) -> str:
        return self._draw(lambda: f"{self.rng.randint(1, 199)} {self.word(7)} {self.rng.choice(STREETS)}")

    def phone(self) -> str:
        form = self.rng.choice(("0##-######", "0### ######", "(0##) ### ###"))
        return self._draw(lambda: "".join(str(self.rng.randint(0, 9)) if c == "#" else c for c in form))

    def code(self, prefix: str = "") -> str:
        return self._draw(lambda: prefix + "".join(str(self.rng.randint(0, 9)) for _ in range(self.rng.randint(3, 6))))

    def date(self) -> str:
        form = self.rng.choice(("{y}-{m:02}-{d:02}", "{d:02}.{m:02}.{y}", "{m:02}/{d:02}/{y}", "{d} {name} {y}"))

        def make() -> str:
            month = self.rng.randint(1, 12)
            year = self.rng.randint(1998, 2029)
            return form.format(y=year, m=month, d=self.rng.randint(1, 28), name=MONTHS[month - 1])

        return self._draw(make)

    def time(self) -> str:
        return self._draw(lambda: f"{self.rng.randint(0, 23):02}:{self.rng.randint(0, 59):02}")

    def cents(self, highest: int = 9999) -> int:
        """An amount in cents whose plain form "12.40" belongs to the split."""
        largest = self.rng.choice((999, highest))
        return round(float(self._draw(lambda: f"{self.rng.randint(20, largest) / 100:.2f}")) * 100)

    def number(self, highest: int = 99) -> str:
        return self._draw(lambda: str(self.rng.randint(1, highest)))
