"""Drawn documents in the columns in which the benchmarks are published, as data sets on the disk.

    python -m tests.benchmark_data FOLDER 8    # FOLDER/echo840/OCRBench and the others, 8 samples each

`python -m evaluation.score nano --data FOLDER` then runs without a network.
"""

import random
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from evaluation.video import film_of
from training.drawn_documents import DrawnDocuments

README = """---
configs:
{configs}---
"""
CONFIG = """- config_name: {name}
  data_files:
  - split: {split}
    path: {folder}/{split}-*.parquet
"""


def documents(count: int) -> list[tuple[Image.Image, str, str]]:
    """Return so many drawn pages, each with a question about it and the right answer, of at most 24 characters."""
    rows, seed = [], 90_000_000
    while len(rows) < count:
        question, answer = DrawnDocuments(1, first_seed=seed, kinds=["receipt", "letter"])[0][:2]
        seed += 1
        images = [part["image"] for part in question["content"] if part["type"] == "image"]
        text, said = question["content"][-1]["text"], answer["content"][0]["text"]
        if len(images) == 1 and len(said) <= 24:
            rows.append((images[0], text, said))
    return rows


def columns(count: int) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """Return the rows of every benchmark by data set, config and split."""
    pages = documents(count)
    ocrbench_v2_kinds = ["text recognition en", "cognition VQA en", "full-page OCR cn", "science QA en"]
    tables: dict[tuple[str, str, str], list[dict[str, Any]]] = {}

    def add(data_set: str, config: str, split: str, row: dict[str, Any]) -> None:
        tables.setdefault((data_set, config, split), []).append(row)

    for index, (image, question, answer) in enumerate(pages):
        options = sorted({answer, *(other[2] for other in random.Random(index).sample(pages, min(3, count)))})
        letter = "ABCDEFGH"[options.index(answer)]
        base = {"image": image, "question": question}
        kind = ocrbench_v2_kinds[index % len(ocrbench_v2_kinds)]
        add(
            "echo840/OCRBench",
            "default",
            "test",
            base | {"dataset": "drawn", "question_type": "Doc-oriented VQA", "answer": [answer]},
        )
        add(
            "ling99/OCRBench_v2",
            "default",
            "test",
            base | {"type": kind, "answers": [answer], "eval": "None", "id": index},
        )
        for config in ("DocVQA", "InfographicVQA"):
            add(
                "lmms-lab-encoder/DocVQA", config, "validation", base | {"questionId": str(index), "answers": [answer]}
            )
        add(
            "lmms-lab-encoder/ChartQA",
            "default",
            "test",
            base | {"type": ["human_test", "augmented_test"][index % 2], "answer": answer},
        )
        add(
            "lmms-lab-encoder/ai2d",
            "default",
            "test",
            base | {"options": options, "answer": str(options.index(answer))},
        )
        several = {f"image_{number}": image if number <= 1 + index % 2 else None for number in range(1, 8)}
        chosen = index % 3 != 2
        mmmu = {
            "id": f"validation_Drawn_{index}",
            "question": f"<image 1> {question}",
            "options": repr(options if chosen else []),
        }
        if index % 2:
            mmmu["question"] += " <image 2>"
        mmmu |= {"question_type": "multiple-choice" if chosen else "open", "answer": letter if chosen else answer}
        add("lmms-lab-encoder/MMMU", "default", "validation", mmmu | several)
        lettered = [f"{option_letter}. {option}" for option_letter, option in zip("ABCD", options, strict=False)]
        film = {"videoID": f"film{index}", "question_id": str(index), "duration": "short", "answer": letter}
        film |= {"question": question, "options": lettered, "domain": "drawn", "sub_category": "d", "task_type": "OCR"}
        add("lmms-eval/Video-MME", "default", "test", film)
    return tables


def write(folder: Path, count: int) -> None:
    """Write the data sets as parquet files with the README that names their configs."""
    import datasets

    configs: dict[str, str] = {}
    for (data_set, config, split), rows in columns(count).items():
        place = folder / data_set / config
        place.mkdir(parents=True, exist_ok=True)
        features = datasets.Dataset.from_list(rows[:1]).features
        for name in [f"image_{number}" for number in range(1, 8) if "image_1" in rows[0]]:
            features[name] = datasets.Image()
        table = datasets.Dataset.from_list(rows, features=datasets.Features(features))
        table.to_parquet(place / f"{split}-00000-of-00001.parquet")
        configs[data_set] = configs.get(data_set, "") + CONFIG.format(name=config, split=split, folder=config)
    films = folder / "lmms-eval" / "Video-MME" / "data"
    films.mkdir()
    for index, (image, _, _) in enumerate(documents(count)):
        (films / f"film{index}.mp4").write_bytes(film_of([image] * 2))
    for data_set, text in configs.items():
        (folder / data_set / "README.md").write_text(README.format(configs=text))


if __name__ == "__main__":
    write(Path(sys.argv[1]), int(sys.argv[2]))
