"""Plots the accuracy of held-out answers over the minutes of training runs, one run after the other.

    python -m pretraining.curve docs/log/nano/*.jsonl --out docs/images/nano_curve.png

It needs matplotlib. Each argument is the log of a run; vertical lines separate the runs,
whose names stand above the plot.
"""

import argparse
import json
from pathlib import Path

LABEL_WIDTH = 0.018  # of a line of text, as a part of the plot's width


def read_log(path: Path) -> list[dict[str, float]]:
    """Return the entries of a run's log; those about held-out answers get the minutes of the step before them."""
    entries, minutes = [], 0.0
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        minutes = entry.setdefault("minutes", minutes)
        entries.append(entry)
    return entries


def draw_curve(logs: list[Path], path: Path) -> None:
    """Write the plot.

    Raises:
        ImportError: without matplotlib, with the command that installs it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("The curve is drawn with matplotlib: pip install matplotlib.") from error
    figure = Figure(figsize=(9, 4.2))
    axes = figure.subplots()
    start, runs = 0.0, []
    for log in logs:
        entries = read_log(log)
        held_out = [entry for entry in entries if entry.get("held out") and "answers" in entry]
        trained = [entry for entry in entries if "loss" in entry and "tokens" in entry]
        axes.plot([start + e["minutes"] for e in trained], [e["tokens"] for e in trained], color="0.8", linewidth=0.8)
        for key, colour in (("tokens", "tab:blue"), ("answers", "tab:orange")):
            points = [start + entry["minutes"] for entry in held_out], [entry[key] for entry in held_out]
            axes.plot(*points, "o-", color=colour, markersize=4)
        runs.append((log.stem.split("-", 1)[-1], start + entries[-1]["minutes"] / 2))
        start += entries[-1]["minutes"]
        axes.axvline(start, color="0.6", linewidth=0.6)
    middle = -start
    for name, wanted in runs:  # above the plot, each in the middle of its run, or right of the name before
        middle = max(wanted, middle + start * LABEL_WIDTH)
        axes.text(middle, 1.02, name, fontsize=8, rotation=90, ha="center", va="bottom")
    for label, colour in (
        ("training, tokens", "0.8"),
        ("held out, tokens", "tab:blue"),
        ("held out, whole", "tab:orange"),
    ):
        axes.plot([], [], color=colour, label=label)
    axes.set(xlabel="minutes", ylabel="right when the answer so far is given", ylim=(0, 1), xlim=(0, start))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3, fontsize=8)
    figure.savefig(path, bbox_inches="tight", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    draw_curve(arguments.logs, arguments.out)


if __name__ == "__main__":
    main()
