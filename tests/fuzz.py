"""Throw random pictures and prompts at the processors, for hours if wanted: a line per finding, then one JSON object.

    python -m tests.fuzz --pictures 100000 --prompts 100000
    python -m tests.fuzz --minutes 60

A finding is an exception other than ValueError and TypeError, or an accepted input without the properties that
tests/strategies.py asserts. The exit status is 1 if there is one. Add it to test_reliability_fuzz.py when it is fixed.
"""

import argparse
import json
import logging
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable

import transformers
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import tools  # noqa: F401  (registers the root as the package `nemotron_vl`)
from tests import strategies

BATCH = 1000  # examples per hypothesis run: its bookkeeping grows with the length of a run
QUIET = {
    "database": None,
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "phases": [Phase.generate, Phase.shrink],
    "print_blob": False,
    "report_multiple_bugs": False,
}
TARGETS = {
    "pictures": [
        (strategies.check_pictures, (strategies.pictures(), strategies.image_options())),
    ],
    "prompts": [
        (strategies.check_messages, (strategies.conversations(), strategies.template_options())),
        (strategies.check_chat, (strategies.chat_arguments(),)),
    ],
}


def run_batch(check: Callable[..., str], inputs: tuple, number: int, counts: Counter) -> str | None:
    """Run one batch; return the smallest input that breaks `check`, with its exception, or None."""
    last: list[object] = []

    @seed(number)
    @settings(max_examples=BATCH, **QUIET)
    @given(st.tuples(*inputs))
    def probe(arguments):
        last[:] = arguments
        counts[check(*arguments)] += 1

    try:
        probe()
    except Exception as error:
        return f"{check.__name__}({', '.join(map(repr, last))[:2000]}): {type(error).__name__}: {str(error)[:500]}"
    return None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=100_000)
    parser.add_argument("--prompts", type=int, default=100_000)
    parser.add_argument("--minutes", type=float, help="go on with further seeds until then")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    logging.disable(logging.WARNING)
    start = time.monotonic()
    counts = {kind: Counter() for kind in TARGETS}
    findings: list[str] = []

    def unfinished(kind: str) -> bool:
        if options.minutes is not None:
            return time.monotonic() - start < 60 * options.minutes
        return counts[kind].total() < getattr(options, kind)

    number = options.seed
    while any(unfinished(kind) for kind in TARGETS):
        for kind, checks in TARGETS.items():
            for check, inputs in checks:
                if not unfinished(kind):
                    continue
                finding = run_batch(check, inputs, number, counts[kind])
                if finding:
                    findings.append(finding)
                    print(finding, flush=True)
        number += 1
        totals = {kind: counter.total() for kind, counter in counts.items()}
        print(f"{time.monotonic() - start:.0f} s: {totals}, {len(findings)} findings", file=sys.stderr, flush=True)
    result = {
        **{kind: dict(counter) for kind, counter in counts.items()},
        "findings": len(findings),
        "seeds": [options.seed, number - 1],
        "seconds": round(time.monotonic() - start),
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "transformers": transformers.__version__,
    }
    print(json.dumps(result))
    return int(bool(findings))


if __name__ == "__main__":
    sys.exit(main())
