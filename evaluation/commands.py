"""What the commands that evaluate nano share: their options, and the file with the numbers and every answer."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import transformers

from evaluation import ROOT


def evaluation_parser(description: str | None, threads: int = 2) -> argparse.ArgumentParser:
    """Return a parser with `--model`, `--threads` and `--out`.

    Args:
        description: the docstring of the command.
        threads: of torch, if the user names no number.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "nano")
    parser.add_argument("--threads", type=int, default=threads)
    parser.add_argument("--out", type=Path, help="JSON file for the numbers and every answer")
    return parser


def conditions(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what a report says of its run: the model, the versions and the threads."""
    return {
        "model": arguments.model.name,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": arguments.threads,
    }


def write_report(out: Path | None, report: dict[str, Any]) -> None:
    """Write a report, if there is a file for it; folders that are missing are made."""
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
