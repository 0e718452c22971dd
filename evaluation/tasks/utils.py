"""The functions that the task files name: the images, the text and the target of a sample, and its score.

The wording of the styles comes from the programs they are named after: `nvidia` from the evaluation of this model in
Megatron-LM (examples/multimodal, d98e8a6), `vlmevalkit` from VLMEvalKit (e8e78f0), `lmms` from lmms-eval (0.7.3). The
cards give no wording. `plain` is the question and its options alone. A score lies in 0..1.
"""

import ast
import copy
import os
import random
import re
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from evaluation.scorers import ai2d_letter, mmmu_choice, ocrbench_score, option_letters, videomme_letter

Sample = dict[str, Any]

STYLES = ("nvidia", "vlmevalkit", "lmms", "plain")
SYSTEM_TEXT = "Follow the user's instruction and answer questions."
SYSTEM_TEXT_OF_EXAMS = "Answer the questions."  # MMMU and Video-MME
LETTER_PLEASE = "Answer with the option's letter from the given choices directly."
VIDEO_INSTRUCTION = (
    "Select the best answer to the following multiple-choice question based on the video. Respond with only the letter "
    "(A, B, C, or D) of the correct option."
)

# What follows a question that has no options.
SUFFIXES = {
    "docvqa": {
        "nvidia": "\nAnswer the question using a single word, phrase, or number.",
        "vlmevalkit": "\nAnswer the question using a single word or phrase.",
        "lmms": "\nAnswer the question using a single word or phrase.",
    },
    "chartqa": {
        "nvidia": "\nAnswer the question using a single word or phrase.",
        "vlmevalkit": "\nAnswer the question using a single word or phrase.",
        "lmms": "\nAnswer the question with a single word.",
    },
}


def _messages(
    images: Callable[[Sample], list], text: Callable[..., str], system: str = SYSTEM_TEXT
) -> Callable[..., list[dict]]:
    """Return lmms-eval's `doc_to_messages` for a benchmark: images before the text, and NVIDIA's system text."""

    def doc_to_messages(doc: Sample, lmms_eval_specific_kwargs: dict | None = None) -> list[dict]:
        content = [{"type": "image", "url": image} for image in images(doc)]
        content.append({"type": "text", "text": text(doc, lmms_eval_specific_kwargs)})
        messages = [{"role": "user", "content": content}]
        if _style(lmms_eval_specific_kwargs) == "nvidia":
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
        return messages

    return doc_to_messages


def _style(options: dict | None) -> str:
    return (options or {}).get("style", "nvidia")


def one_image(doc: Sample) -> list[Image.Image]:
    return [doc["image"].convert("RGB")]


# --- OCRBench, OCRBench v2: the question alone in every style --------------------------------------------------------


def question(doc: Sample, lmms_eval_specific_kwargs: dict | None = None) -> str:
    return doc["question"].strip()


question_messages = _messages(one_image, question)


def ocrbench_target(doc: Sample) -> Any:
    return doc["answer"]


def ocrbench_results(doc: Sample, results: list[str]) -> dict[str, float]:
    return {"score": ocrbench_score(results[0], doc["answer"], doc["dataset"])}


def ocrbench_v2_target(doc: Sample) -> Any:
    return doc["answers"]


def ocrbench_v2_results(doc: Sample, results: list[str]) -> dict[str, float]:
    """Score by lmms-eval's copy of the official script.

    The script changes the answers that it is given, and divides by zero where prediction and answer are both empty:
    that is no match of anything, and counts 0.
    """
    from lmms_eval.tasks.ocrbench_v2.utils import ocrbench_v2_process_results

    try:
        scored = ocrbench_v2_process_results(copy.deepcopy(doc), results)
    except ZeroDivisionError:
        if results[0].strip():
            raise
        return {"score": 0.0}
    return {"score": float(scored["ocrbench_v2_accuracy"]["score"])}


# --- DocVQA, InfoVQA -------------------------------------------------------------------------------------------------


def docvqa_text(doc: Sample, lmms_eval_specific_kwargs: dict | None = None) -> str:
    return doc["question"] + SUFFIXES["docvqa"].get(_style(lmms_eval_specific_kwargs), "")


docvqa_messages = _messages(one_image, docvqa_text)


def docvqa_target(doc: Sample) -> list[str]:
    return doc["answers"]


def docvqa_results(doc: Sample, results: list[str]) -> dict[str, float]:
    from lmms_eval.api.metrics import anls

    return {"score": float(anls(doc["answers"], results)["anls"])}


# --- ChartQA ---------------------------------------------------------------------------------------------------------


def chartqa_text(doc: Sample, lmms_eval_specific_kwargs: dict | None = None) -> str:
    return doc["question"] + SUFFIXES["chartqa"].get(_style(lmms_eval_specific_kwargs), "")


chartqa_messages = _messages(one_image, chartqa_text)


def chartqa_target(doc: Sample) -> str:
    return doc["answer"]


def chartqa_results(doc: Sample, results: list[str]) -> dict[str, float]:
    from lmms_eval.tasks.chartqa.utils import relaxed_correctness

    return {"score": float(relaxed_correctness(results[0], doc["answer"]))}


# --- AI2D ------------------------------------------------------------------------------------------------------------


def choices(question_text: str, options: list[str], style: str) -> str:
    """Return a question with its options as a style writes them for AI2D."""
    lines = "\n".join(
        f"{letter}. {option}" for letter, option in zip(option_letters(len(options)), options, strict=True)
    )
    if style == "vlmevalkit":
        closing = "Please select the correct answer from the options above. \n"
        return f"Question: {question_text}\nOptions:\n{lines}\n{closing}"
    return f"{question_text}\n{lines}" + ("" if style == "plain" else f"\n{LETTER_PLEASE}")


def ai2d_text(doc: Sample, lmms_eval_specific_kwargs: dict | None = None) -> str:
    return choices(doc["question"], doc["options"], _style(lmms_eval_specific_kwargs))


ai2d_messages = _messages(one_image, ai2d_text)


def ai2d_target(doc: Sample) -> str:
    return option_letters(len(doc["options"]))[int(doc["answer"])]


def ai2d_results(doc: Sample, results: list[str]) -> dict[str, float]:
    """Score by VLMEvalKit's rule; `lmms_eval` is the score by the rule of lmms-eval's task, a letter that comes first."""
    target = ai2d_target(doc)
    first = re.match(r"\s*([A-Z])\.", results[0])
    said = first[1] if first else results[0].translate(str.maketrans("", "", string.punctuation)).upper()
    return {"score": float(ai2d_letter(results[0], doc["options"]) == target), "lmms_eval": float(said == target)}


# --- MMMU ------------------------------------------------------------------------------------------------------------


def mmmu_images(doc: Sample) -> list[Image.Image]:
    """Return the images that question and options name, `<image 1>` to `<image 7>`, by their numbers."""
    named = sorted(set(re.findall(r"<image (\d)>", doc["question"] + doc["options"])))
    return [doc[f"image_{number}"].convert("RGB") for number in named]


def mmmu_text(doc: Sample, lmms_eval_specific_kwargs: dict | None = None) -> str:
    """Return the question; the markers of its images stay text, and the images stand before it."""
    style = _style(lmms_eval_specific_kwargs)
    if doc["question_type"] != "multiple-choice":
        closing = {"lmms": "\n\nAnswer the question using a single word or phrase.", "plain": ""}
        return doc["question"] + closing.get(style, "\nAnswer the question directly.")
    options = ast.literal_eval(doc["options"])
    if style in ("vlmevalkit", "plain"):
        return choices(doc["question"], options, style)
    lines = choices(doc["question"], options, "plain")
    return f"{lines}\n\n{LETTER_PLEASE}" if style == "lmms" else f"{lines}\n{LETTER_PLEASE}"


_mmmu_images_first = _messages(mmmu_images, mmmu_text, SYSTEM_TEXT_OF_EXAMS)


def mmmu_messages(doc: Sample, lmms_eval_specific_kwargs: dict | None = None) -> list[dict]:
    """Return the images before the text; in VLMEvalKit's style each image stands where its marker does."""
    if _style(lmms_eval_specific_kwargs) != "vlmevalkit":
        return _mmmu_images_first(doc, lmms_eval_specific_kwargs)
    pieces = re.split(r"<image (\d)>", mmmu_text(doc, lmms_eval_specific_kwargs))
    content = []
    for index, piece in enumerate(pieces):
        if index % 2:
            content.append({"type": "image", "url": doc[f"image_{piece}"].convert("RGB")})
        elif piece:
            content.append({"type": "text", "text": piece})
    return [{"role": "user", "content": content}]


def mmmu_target(doc: Sample) -> str:
    return doc["answer"]


def mmmu_results(doc: Sample, results: list[str]) -> dict[str, float]:
    """Score without a judge; `drawn` is 1 where the answer named no option and a letter was drawn, the same each time."""
    if doc["question_type"] == "multiple-choice":
        options = [str(option) for option in ast.literal_eval(doc["options"])]
        choice = mmmu_choice(results[0], options, random.Random(doc["id"]))
        return {"score": float(choice.letter == doc["answer"]), "drawn": float(choice.drawn)}
    from lmms_eval.tasks.mmmu.utils import eval_open, parse_open_response

    return {"score": float(eval_open(doc["answer"], parse_open_response(results[0]))), "drawn": 0.0}


# --- Video-MME -------------------------------------------------------------------------------------------------------


def videomme_video(doc: Sample) -> list[str]:
    """Return the path of a sample's film, in $VIDEOMME_VIDEOS or where lmms-eval unpacks the archives of the data set.

    Raises:
        FileNotFoundError: if it is not there.
    """
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    folder = Path(os.environ.get("VIDEOMME_VIDEOS") or home / "videomme" / "data")
    for suffix in (".mp4", ".MP4", ".mkv"):
        if (folder / f"{doc['videoID']}{suffix}").exists():
            return [str(folder / f"{doc['videoID']}{suffix}")]
    raise FileNotFoundError(
        f"{folder} has no film {doc['videoID']}.mp4. $VIDEOMME_VIDEOS names the folder of the films."
    )


def videomme_text(doc: Sample, lmms_eval_specific_kwargs: dict | None = None) -> str:
    """Return the official text without subtitles, and the question with its options, which carry their letters."""
    style, options = _style(lmms_eval_specific_kwargs), "\n".join(doc["options"])
    if style == "plain":
        return f"{doc['question']}\n{options}"
    if style == "vlmevalkit":
        closing = "Please select the correct answer from the options above. \n"
        return f"These are the frames of a video. Question: {doc['question']}\nOptions:\n{options}\n{closing}"
    if style == "lmms":
        with_subtitles = VIDEO_INSTRUCTION.replace("the video.", "the video and the subtitles.")
        return f"{with_subtitles}\n{doc['question']}\n{options}\n\n{LETTER_PLEASE}"
    return f"{VIDEO_INSTRUCTION}\n{doc['question']}\n{options}\n"


def videomme_messages(doc: Sample, lmms_eval_specific_kwargs: dict | None = None) -> list[dict]:
    """Return the film before the text, as a video part: the processor takes its frames."""
    (path,) = videomme_video(doc)
    text = {"type": "text", "text": videomme_text(doc, lmms_eval_specific_kwargs)}
    messages = [{"role": "user", "content": [{"type": "video", "url": path}, text]}]
    if _style(lmms_eval_specific_kwargs) == "nvidia":
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": SYSTEM_TEXT_OF_EXAMS}]})
    return messages


def videomme_target(doc: Sample) -> str:
    return doc["answer"]


def videomme_results(doc: Sample, results: list[str]) -> dict[str, float]:
    return {"score": float(videomme_letter(results[0]) == doc["answer"])}
