"""What quantising costs nano: the evaluation of `evaluation.nano`, before and after, for every format.

    python -m evaluation.quantized --out evaluation/results/quantized.json

Each format is made with `python -m tools.quantize`, calibrated on images of training documents, none of which is
asked about; then the very same held-out questions are asked of the unpacked weights, and once more of the packed ones,
to count the answers that differ: sums in another order may turn one where two tokens are equally probable. Prints a table whose first row holds shares in percent and whose other rows
hold differences from it in percentage points; the last line of the output is one JSON object.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from documents import fonts
from documents.contents import KINDS, make_page
from documents.drawing import draw_page
from evaluation import ROOT
from evaluation.commands import conditions, evaluation_parser, write_report
from evaluation.nano import evaluate, make_questions, mean
from evaluation.tables import paired_difference
from tools.chat import load

FORMATS = ("fp8", "nvfp4", "awq")
PLAIN = "unquantised"


def draw_calibration_images(folder: Path, count: int) -> list[Path]:
    """Draw documents of the training split, all kinds in turn."""
    kinds, files = list(KINDS), []
    for seed in range(count):
        page = make_page(seed, "train", kinds[seed % len(kinds)])
        files.append(folder / f"{seed}.png")
        draw_page(page, seed).save(files[-1])
    return files


def quantize(model: Path, format_name: str, images: list[Path], group_size: int, out: Path) -> dict[str, Any]:
    """Run `tools.quantize` as a user does and return its report, the error of every layer included."""
    command = [sys.executable, "-m", "tools.quantize", model, "--format", format_name, "--out", out]
    command += ["--group-size", str(group_size), "--calibration", *images]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if finished.returncode:
        raise ValueError(f"tools.quantize --format {format_name} failed:\n{finished.stderr[-2000:]}")
    lines = finished.stdout.splitlines()
    layers = dict(line.split() for line in lines if line.startswith("language_model.") and len(line.split()) == 2)
    return json.loads(lines[-1]) | {"layer_errors": {name: float(error) for name, error in layers.items()}}


def percentages(rows: list[dict]) -> dict[str, float]:
    """Share of exact answers over all questions and per task, character error rate of the long ones; in percent."""
    groups = {"all": rows}
    for row in rows:
        groups.setdefault(row["task"], []).append(row)
    shares = {f"{task}": mean(row["exact"] for row in members) for task, members in groups.items()}
    for task, members in groups.items():
        if task != "all" and "character_error_rate" in members[0]:
            shares[f"{task}, CER"] = mean(row["character_error_rate"] for row in members)
    return {name: round(100 * share, 2) for name, share in shares.items()}


def compare(before: list[dict], after: list[dict]) -> dict[str, Any]:
    """Differences in points, and how sure they are: the same questions were asked, so changes are counted in pairs."""
    numbers = paired_difference([row["exact"] for row in before], [row["exact"] for row in after])
    shares = percentages(before)
    return {
        "difference_in_points": {
            name: round(share - shares[name], 2) for name, share in percentages(after).items() if name in shares
        },
        "standard_error_of_all": round(numbers["standard_error"], 2),
        "answers_changed": count_differences(before, after),
        "became_wrong": numbers["became_wrong"],
        "became_right": numbers["became_right"],
    }


def count_differences(first: list[dict], second: list[dict]) -> int:
    """Count the answers that differ."""
    return sum(one["given"] != other["given"] for one, other in zip(first, second, strict=True))


def markdown(report: dict[str, Any]) -> str:
    """One table: a row per format."""
    plain = report["formats"][PLAIN]
    names = list(plain["percent"])
    lines = [f"| | weights, MiB | layer error, mean (worst) | answers changed | packed | {' | '.join(names)} |"]
    lines.append("|---" * (len(names) + 5) + "|")
    cells = [f"{plain['percent'][name]:.1f}" for name in names]
    lines.append(f"| {PLAIN} ({report['dtype']}) | {plain['bytes'] / 2**20:.1f} | | | | {' | '.join(cells)} |")
    for name, numbers in list(report["formats"].items())[1:]:
        cells = [f"{numbers['difference_in_points'][task]:+.1f}" for task in names]
        cells[0] += f" ± {numbers['standard_error_of_all']:.1f}"
        error = f"{numbers['mean_relative_error']:.3f} ({numbers['worst_relative_error']:.3f})"
        size = f"{numbers['bytes_after'] / 2**20:.1f}"
        changed = f"{numbers['answers_changed']} | {numbers['packed_answers_differ']}"
        lines.append(f"| {name} | {size} | {error} | {changed} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = evaluation_parser(__doc__, threads=1)
    parser.add_argument("--documents", type=int, default=1000)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--calibration-images", type=int, default=32)
    parser.add_argument("--group-size", type=int, default=64, help="AWQ: inputs per scale; nano's widths allow 64")
    parser.add_argument("--batch-size", type=int, default=10)
    parser.add_argument("--dtype", default="auto", help="of the computation; that of the checkpoint by default")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    fonts.require("train", "heldout")
    questions = make_questions(arguments.documents)
    model, processor = load(arguments.model, dtype=arguments.dtype)
    before = evaluate(model, processor, questions, arguments.batch_size)
    size = sum(file.stat().st_size for file in arguments.model.glob("*.safetensors"))
    report = {
        **conditions(arguments),
        "documents": arguments.documents,
        "dtype": str(model.dtype).removeprefix("torch."),
        "awq_group_size": arguments.group_size,
        "calibration_images": arguments.calibration_images,
        "date": time.strftime("%Y-%m-%d"),
        "formats": {PLAIN: {"bytes": size, "percent": percentages(before)}},
    }
    with tempfile.TemporaryDirectory() as folder:
        images = draw_calibration_images(Path(folder), arguments.calibration_images)
        for name in arguments.formats:
            out = Path(folder) / name
            numbers = quantize(arguments.model, name, images, arguments.group_size, out)
            model, processor = load(out, dequantize=True, dtype=arguments.dtype)
            after = evaluate(model, processor, questions, arguments.batch_size)
            model, processor = load(out, dtype=arguments.dtype)
            packed = evaluate(model, processor, questions, arguments.batch_size)
            numbers |= {"packed_answers_differ": count_differences(after, packed), "questions": len(packed)}
            report["formats"][name] = numbers | compare(before, after) | {"percent": percentages(after)}
            write_report(arguments.out, report)  # after every format: a stopped run keeps what it has
    print(f"\n{markdown(report)}\n{json.dumps(report)}")


if __name__ == "__main__":
    main()
