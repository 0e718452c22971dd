"""How well the confidence of a value tells right from wrong: `python -m evaluation.confidence --documents 400`.

    python -m evaluation.confidence --documents 400 --out evaluation/results/confidence.json \\
        --plot docs/images/confidence.png --keep

`extract` reads up to four fields, and one that the page lacks, from each held-out document. A value is right if it
equals the printed one, and null for the field that is absent. The documents with an even seed fit the temperature, those
with an odd seed give every number shown. `--keep` writes the temperature into the checkpoint's generation_config.json,
where `chat` and `extract` find it. The last line of the output is one JSON object.
"""

import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from documents import fonts
from documents.contents import make_page
from documents.drawing import draw_page
from documents.questions import EXPECTED
from evaluation.commands import conditions, evaluation_parser, write_report
from evaluation.nano import SPLIT
from tools.chat import load
from tools.command_line import progress

from nemotron_vl.reading import extract  # isort: skip  (importing tools makes it importable)
from nemotron_vl.reading.confidence import auroc, calibration_error, fit_temperature, reliability  # isort: skip

KINDS = ("receipt", "bill", "invoice", "form", "letter", "table")
NUM_FIELDS = 4


def read_values(model: Any, processor: Any, seed: int, **options: Any) -> list[dict[str, Any]]:
    """Return a row for each field of the document of a seed: what was read, its confidence at 1, and whether it is right."""
    rng = random.Random(f"confidence {seed}")
    page = make_page(1000 * seed, SPLIT, rng.choice(KINDS))
    names = rng.sample(sorted(page.fields), min(NUM_FIELDS, len(page.fields)))
    absent = [name for name in EXPECTED[page.kind] if name not in page.fields]
    names += rng.sample(absent, min(1, len(absent)))
    options = {"generation_config": {"confidence_temperature": 1.0}, "max_new_tokens": 48, **options}
    found = extract(model, processor, draw_page(page, seed, SPLIT), names, **options)
    return [
        {
            "seed": seed,
            "kind": page.kind,
            "field": name,
            "value": found.values[name].value,
            "confidence": found.values[name].confidence or 0.0,
            "right": found.values[name].value == page.fields.get(name),
        }
        for name in names
    ]


def judge(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Fit the temperature on the documents with an even seed, and judge the confidences on the others."""
    fitting, shown = ([row for row in rows if row["seed"] % 2 == rest] for rest in (0, 1))
    temperature = fit_temperature([row["confidence"] for row in fitting], [row["right"] for row in fitting])
    before, right = [row["confidence"] for row in shown], [row["right"] for row in shown]
    after = [value ** (1 / temperature) for value in before]
    return {
        "temperature": round(temperature, 3),
        "values_fitted": len(fitting),
        "values": len(shown),
        "accuracy": round(float(np.mean(right)), 4),
        "auroc": round(auroc(after, right), 4),
        "auroc_by_presence": {
            name: round(auroc([after[i] for i in places], [right[i] for i in places]), 4)
            for name, places in _by_presence(shown).items()
            if len({right[i] for i in places}) == 2
        },
        "calibration_error_before": round(calibration_error(before, right), 4),
        "calibration_error": round(calibration_error(after, right), 4),
        "reliability_before": reliability(before, right, bins=5),
        "reliability": reliability(after, right, bins=5),
    }


def _by_presence(rows: list[dict[str, Any]]) -> dict[str, list[int]]:
    """Return the places of the values that were read, and of those that were called absent."""
    return {
        "read": [place for place, row in enumerate(rows) if row["value"] is not None],
        "absent": [place for place, row in enumerate(rows) if row["value"] is None],
    }


def plot(report: dict[str, Any], out: Path) -> None:
    """Draw how many values are right at each confidence, before and after the temperature."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(4.6, 4.2), layout="constrained")
    axes.plot([0, 1], [0, 1], color="0.75", linewidth=1)
    for name, label, colour in (
        ("reliability_before", "as the model says", "tab:grey"),
        ("reliability", f"temperature {report['temperature']}", "tab:green"),
    ):
        ranges = report[name]
        axes.plot(
            [part["confidence"] for part in ranges], [part["accuracy"] for part in ranges], color=colour, linewidth=1
        )
        axes.scatter(
            [part["confidence"] for part in ranges],
            [part["accuracy"] for part in ranges],
            s=[8 + 200 * part["count"] / report["values"] for part in ranges],
            color=colour,
            label=label,
        )
    axes.set(
        xlim=(0, 1.02), ylim=(0, 1.02), xlabel="confidence of a value", ylabel="share of these values that are right"
    )
    axes.set_title(f"{report['values']} values, AUROC {report['auroc']:.3f}", fontsize=10)
    axes.legend(loc="lower right", frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


def keep_temperature(checkpoint: Path, temperature: float) -> None:
    """Write the temperature into a checkpoint's generation_config.json."""
    file = checkpoint / "generation_config.json"
    options = json.loads(file.read_text()) | {"confidence_temperature": round(temperature, 3)}
    file.write_text(json.dumps(options, indent=2, sort_keys=True) + "\n")


def main() -> None:
    parser = evaluation_parser(__doc__)
    parser.add_argument("--documents", type=int, default=400)
    parser.add_argument("--plot", type=Path, help="image file for the reliability")
    parser.add_argument("--keep", action="store_true", help="write the temperature into the checkpoint")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    fonts.require("train", "heldout")
    model, processor = load(arguments.model)
    started = time.monotonic()
    rows = []
    for seed in progress(range(arguments.documents), desc="Reading", unit="document"):
        rows += read_values(model, processor, seed)
    report = {
        **conditions(arguments),
        "documents": arguments.documents,
        "seconds": round(time.monotonic() - started),
        **judge(rows),
    }
    write_report(arguments.out, report | {"read": rows})
    if arguments.plot:
        plot(report, arguments.plot)
    if arguments.keep:
        keep_temperature(arguments.model, report["temperature"])
    print(json.dumps(report))


if __name__ == "__main__":
    main()
