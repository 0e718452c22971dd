"""The official rules by which the benchmarks count answers, where lmms-eval counts otherwise.

ANLS (DocVQA, InfoVQA), relaxed accuracy (ChartQA), the 30 types of OCRBench v2 and MMMU's open questions are counted by
lmms-eval's own functions, which agree with the official scripts; `evaluation/tasks/utils.py` calls them. The rules here
are those that differ there: OCRBench without folding of full-width letters, AI2D as VLMEvalKit reads an option before it
asks a judge, MMMU's choice with its random draw, the letter of Video-MME, and OCRBench v2's mean over categories.
"""

import random
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

# OCRBench v2: the category of each type of question, English and Chinese (eval_scripts/get_score.py).
OCRBENCH_V2_CATEGORIES = {
    "en": {
        "text_recognition": ("text recognition en", "fine-grained text recognition en", "full-page OCR en"),
        "text_detection": ("text grounding en", "VQA with position en"),
        "text_spotting": ("text spotting en",),
        "relationship_extraction": ("key information extraction en", "key information mapping en"),
        "element_parsing": (
            "document parsing en",
            "chart parsing en",
            "table parsing en",
            "formula recognition en",
        ),
        "mathematical_calculation": ("math QA en", "text counting en"),
        "visual_text_understanding": (
            "document classification en",
            "cognition VQA en",
            "diagram QA en",
        ),
        "knowledge_reasoning": (
            "reasoning VQA en",
            "science QA en",
            "APP agent en",
            "ASCII art classification en",
        ),
    },
    "cn": {
        "text_recognition": ("full-page OCR cn",),
        "relationship_extraction": ("key information extraction cn", "handwritten answer extraction cn"),
        "element_parsing": ("document parsing cn", "table parsing cn", "formula recognition cn"),
        "visual_text_understanding": ("cognition VQA cn",),
        "knowledge_reasoning": ("reasoning VQA cn", "text translation cn"),
    },
}
CATEGORY_OF_TYPE = {
    kind: (language, category)
    for language, categories in OCRBENCH_V2_CATEGORIES.items()
    for category, kinds in categories.items()
    for kind in kinds
}


def ocrbench_score(prediction: str, answers: str | Sequence[str], dataset: str) -> int:
    """Return 1 if the prediction contains the answer, or one of the answers, else 0.

    Case and surrounding space do not count and a line feed is a space. In the formulas of the data set "HME100k" case
    counts, and all spaces are dropped.
    """
    answers = [answers] if isinstance(answers, str) else answers
    if dataset == "HME100k":
        contained = (_without_spaces(answer) in _without_spaces(prediction) for answer in answers)
    else:
        contained = (_folded(answer) in _folded(prediction) for answer in answers)
    return int(any(contained))


def _without_spaces(text: str) -> str:
    return text.strip().replace("\n", " ").replace(" ", "")


def _folded(text: str) -> str:
    return text.lower().strip().replace("\n", " ")


def ocrbench_v2_overall(scores: Iterable[tuple[str, float]]) -> dict[str, dict]:
    """Return the means of OCRBench v2 for pairs of a question's type and its score.

    For "en" and "cn": `categories` with the mean `score` and the `count` of each category, and `overall`, the plain mean
    of the categories' means, in 0..1. A category without questions is left out, so `complete` says whether all are there.

    Raises:
        ValueError: a type is none of the benchmark's.
    """
    by_category: dict[tuple[str, str], list[float]] = {}
    for kind, score in scores:
        if kind not in CATEGORY_OF_TYPE:
            raise ValueError(f"{kind!r} is no type of OCRBench v2; its types are {', '.join(CATEGORY_OF_TYPE)}.")
        by_category.setdefault(CATEGORY_OF_TYPE[kind], []).append(float(score))
    report = {}
    for language, categories in OCRBENCH_V2_CATEGORIES.items():
        means = {
            name: {"score": sum(members) / len(members), "count": len(members)}
            for name in categories
            if (members := by_category.get((language, name)))
        }
        if means:
            overall = sum(mean["score"] for mean in means.values()) / len(means)
            report[language] = {"categories": means, "overall": overall, "complete": len(means) == len(categories)}
    return report


def ai2d_letter(prediction: str, options: Sequence[str]) -> str | None:
    """Return the letter of the option that the prediction names, or None: VLMEvalKit's rule before any judge.

    First a letter that stands by itself and is the only one; "A" is not taken for an option in a longer sentence, where
    it is an article, and a letter counts only among the last five words. Otherwise the only option whose text the
    prediction contains, if the prediction is at most twice as long as all options together.
    """
    letters = option_letters(len(options))
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", prediction).split()
    named = [letter for letter in letters if letter in words]
    if len(named) == 1:
        article = "A" in words and len(words) > 3
        if not article and words.index(named[0]) > len(words) - 5:
            return named[0]
    elif not named and "Z" in words:
        return "Z"  # "none of them" in VLMEvalKit; never right
    text = prediction.lower()
    if len(text) > 2 * sum(len(option) for option in options):
        return None
    contained = [letter for letter, option in zip(letters, options, strict=True) if option.lower() in text]
    return contained[0] if len(contained) == 1 else None


class Choice(NamedTuple):
    """The letter of a multiple-choice answer, and whether it was drawn at random because the answer names none."""

    letter: str
    drawn: bool


def mmmu_choice(prediction: str, options: Sequence[str], generator: random.Random) -> Choice:
    """Return the option that an answer to MMMU names, as the official parser reads it.

    The last "(B)" in the answer, or the last "B" between spaces, or in answers of more than five words the option whose
    text comes last. An answer that names none gets a letter from `generator`.
    """
    text = prediction
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    letters = option_letters(len(options))
    for pattern in ("({})", " {} "):
        places = {letter: text.rfind(pattern.format(letter)) for letter in letters}
        if max(places.values(), default=-1) >= 0:
            return Choice(max(places, key=places.get), False)
    if len(text.split()) > 5:
        places = {letter: text.lower().rfind(option.lower()) for letter, option in zip(letters, options, strict=True)}
        if max(places.values(), default=-1) >= 0:
            return Choice(max(places, key=places.get), False)
    return Choice(generator.choice(letters), True)


# Two commas are missing in the official list, so that two pairs of phrases are one phrase each and never occur.
VIDEOMME_PHRASES = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option isThe correct option is",
    "Best answer:Best option:",
    "Answer:",
    "Option:",
    "The correct answer",
    "The correct option",
)


def videomme_letter(prediction: str) -> str:
    """Return the first capital letter of A to D after the official script has removed some phrases; "" without one."""
    text = prediction.strip()
    for phrase in VIDEOMME_PHRASES:
        text = text.replace(phrase, "")
    found = re.search("[ABCD]", text)
    return found[0] if found else ""


def option_letters(count: int) -> list[str]:
    """Return the letters of so many options: A, B, C, ..."""
    return [chr(ord("A") + index) for index in range(count)]
