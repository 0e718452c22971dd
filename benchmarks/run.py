"""Run the benchmarks that fit this machine and render their JSON lines into a table and a chart.

python -m benchmarks.run                          # all, into benchmarks/results/<device>.{jsonl,md,png}
python -m benchmarks.run tiling prompt            # some; the lines of the others are kept
python -m benchmarks.run --render-only
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

from PIL import Image, ImageDraw

from tools import ROOT

NAMES = (
    "tiling",
    "prompt",
    "tower",
    "prefill",
    "decode",
    "first_token",
    "second_turn",
    "loading",
    "importing",
)
RESULTS = ROOT / "benchmarks" / "results"


def run(name: str) -> dict[str, object]:
    """Run one benchmark in a process of its own and return its JSON line."""
    output = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}"], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(output.stdout.splitlines()[-1])


def rows_of(line: dict[str, object]) -> list[tuple[str, str, dict[str, object]]]:
    """`(case, variant, numbers)` of everything that one line compares."""
    return [
        (f"{line['benchmark']}: {result['case']}", variant, numbers)
        for result in line["results"]
        for variant, numbers in result.items()
        if isinstance(numbers, dict)
    ]


def formatted(numbers: dict[str, object]) -> tuple[str, str]:
    """Median and quartiles with their unit, for the table."""
    unit = "us" if "median_us" in numbers or "median" in numbers else "ms"
    median = next(numbers[key] for key in ("median_ms", "median_us", "median") if key in numbers)
    quartiles = numbers.get(f"quartiles_{unit}") or numbers.get("quartiles")
    return f"{median:g} {unit}", f"{quartiles[0]:g}-{quartiles[1]:g}" if quartiles else ""


def table(lines: list[dict[str, object]]) -> str:
    """The results as Markdown."""
    first = lines[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    text = [
        f"# Benchmarks: {first['device']}",
        "",
        f"{first['cpu']}, {first['num_threads']} thread, clock: {first['clock']}; {versions}. Medians and quartiles of "
        "interleaved rounds. `make bench` writes this file; the conditions of each line are in the `.jsonl` beside it.",
        "",
        "| benchmark | variant | median | quartiles | times the peer's speed | share of the limit | rounds | load |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        for case, variant, numbers in rows_of(line):
            median, quartiles = formatted(numbers)
            cells = (
                case,
                variant,
                median,
                quartiles,
                numbers.get("times_faster", ""),
                numbers.get("share_of_limit", ""),
            )
            text.append("| " + " | ".join(map(str, (*cells, line["rounds"], line["load_average"]))) + " |")
    return "\n".join([*text, ""])


def chart(lines: list[dict[str, object]]) -> Image.Image:
    """Draw a bar for each variant: its speed as a multiple of the speed of its peer."""
    bars = [
        (case, variant, n["times_faster"])
        for line in lines
        for case, variant, n in rows_of(line)
        if "times_faster" in n
    ]
    row, left, width = 22, 420, 1100
    image = Image.new("RGB", (width, row * (len(bars) + 2)), "white")
    draw = ImageDraw.Draw(image)
    scale = (width - left - 80) / max(speed for _, _, speed in bars)
    draw.text((10, 4), f"Speed as a multiple of the peer's, {lines[0]['device']}", fill="black")
    for number, (case, variant, speed) in enumerate(bars, start=1):
        top = row * number
        colour = "#2f6db5" if variant.startswith("ours") else "#b9b9b9"
        draw.text((10, top + 4), f"{case} | {variant}", fill="black")
        draw.rectangle((left, top + 2, left + max(1, speed * scale), top + row - 3), fill=colour)
        draw.text((left + speed * scale + 6, top + 4), f"{speed:g}", fill="black")
    return image


def render(path: Path) -> None:
    """Write `.md` and `.png` beside a `.jsonl`."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line.get("benchmark") in NAMES]
    if not lines:  # the file belongs to a benchmark that renders its own table
        return
    path.with_suffix(".md").write_text(table(lines), encoding="utf-8")
    chart(lines).save(path.with_suffix(".png"), optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES, help=f"of {', '.join(NAMES)}")
    parser.add_argument("--render-only", action="store_true")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(NAMES)
    if unknown:
        parser.error(f"no benchmark is called {sorted(unknown)}")
    RESULTS.mkdir(exist_ok=True)
    for name in () if arguments.render_only else arguments.names:
        line = run(name)
        path = RESULTS / (re.sub(r"\W+", "_", line["device"]).lower() + ".jsonl")
        kept = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        lines = {json.loads(text)["benchmark"]: text for text in kept} | {name: json.dumps(line)}
        ordered = [lines[known] for known in NAMES if known in lines]
        path.write_text("\n".join([*ordered, ""]), encoding="utf-8")
        print(lines[name], flush=True)
    for path in RESULTS.glob("*.jsonl"):
        render(path)


if __name__ == "__main__":
    main()
