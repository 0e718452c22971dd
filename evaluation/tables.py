"""Tables in Markdown, and the difference between two runs over the same samples."""

from collections.abc import Iterable, Sequence
from typing import Any


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table whose columns are as wide as their longest cell."""
    lines = [list(headings), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def paired_difference(before: Sequence[float], after: Sequence[float]) -> dict[str, Any]:
    """Return how much the mean changed between two runs, and how sure that is: the same samples are counted in pairs.

    Args:
        before, after: the scores of the same samples, in 0..1, in the same order.

    Returns:
        `before`, `after` and their `difference` in per cent and points, its `standard_error` in points, and how many
        samples `became_wrong` (a lower score) and `became_right` (a higher one).
    """
    changes = [new - old for old, new in zip(before, after, strict=True)]
    if not changes:
        raise ValueError("The two runs have no sample in common.")
    average = sum(changes) / len(changes)
    variance = sum((change - average) ** 2 for change in changes) / max(1, len(changes) - 1)
    return {
        "before": 100 * sum(before) / len(before),
        "after": 100 * sum(after) / len(after),
        "difference": 100 * average,
        "standard_error": 100 * (variance / len(changes)) ** 0.5,
        "became_wrong": sum(change < 0 for change in changes),
        "became_right": sum(change > 0 for change in changes),
    }
