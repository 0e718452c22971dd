"""Throw random images, prompts, configs and files at the code: a line per finding, and one JSON object at the end.

    python -m tests.fuzz --images 100000 --prompts 100000 --configs 20000 --files 1000
    python -m tests.fuzz --minutes 60
    python -m tests.fuzz --replay check_images 1234

A finding is an exception other than the documented ones, or an accepted input without the properties that
tests/hostile.py and tests/hostile_files.py assert. The exit status is 1 if there is one. An input is made from its
number alone, so a finding can be replayed; keep it as an example in test_reliability_fuzz.py when it is fixed.
"""

import argparse
import faulthandler
import json
import logging
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError

import tools  # noqa: F401  (registers the root as the package `nemotron_vl`)
from tests import hostile, hostile_files
from tests.hostile import Source

TARGETS: dict[str, list[tuple[Callable[..., str], Callable[[Source], tuple]]]] = {
    "images": [
        (hostile.check_images, lambda source: (hostile.images(source), hostile.image_options(source))),
    ],
    "prompts": [
        (hostile.check_messages, lambda source: (hostile.conversation(source), hostile.template_options(source))),
        (hostile.check_chat, lambda source: (hostile.chat_arguments(source),)),
    ],
    # What transformers 5 says about a field of the language model.
    "configs": [(hostile.check_config, lambda source: (hostile.config_dict(source), (StrictDataclassError,)))],
    "files": [(hostile_files.check_files, lambda source: (hostile_files.damages(source),))],
}
MEMORY = 16 << 30  # bytes of addresses
EVERY = {"images": 1, "prompts": 1, "configs": 5, "files": 100}  # a directory takes as long as a hundred images


def make(number: int, generate: Callable[[Source], tuple]) -> tuple:
    return generate(Source(random.Random(number).randint))


def run(number: int, kind: str, counts: Counter) -> str | None:
    """Run input `number` of a kind; return what it broke, or None."""
    check, generate = TARGETS[kind][number % len(TARGETS[kind])]
    arguments = make(number, generate)
    try:
        counts[check(*arguments)] += 1
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        counts["broken"] += 1
        return f"{check.__name__} {number}: {type(error).__name__}: {str(error)[:300]!r} from {repr(arguments)[:600]}"
    return None


def replay(name: str, number: int) -> int:
    """Run one input again, with its traceback."""
    check, generate = next(pair for pairs in TARGETS.values() for pair in pairs if pair[0].__name__ == name)
    arguments = make(number, generate)
    print(arguments)
    print(check(*arguments))
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--prompts", type=int, default=100_000)
    parser.add_argument("--configs", type=int, default=20_000, help="one after every 5 images")
    parser.add_argument("--files", type=int, default=1_000, help="damaged checkpoints, one after every 100 images")
    parser.add_argument("--minutes", type=float, help="go on beyond those numbers until then, but not with 0")
    parser.add_argument("--start", type=int, default=0, help="number of the first input")
    parser.add_argument("--replay", nargs=2, metavar=("CHECK", "NUMBER"))
    options = parser.parse_args(argv)
    faulthandler.enable()  # a crash inside a decoder tells where
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))  # growth without bound is a finding
    if options.replay:
        return replay(options.replay[0], int(options.replay[1]))
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    begin = time.monotonic()
    counts = {kind: Counter() for kind in TARGETS}
    findings, number = 0, options.start

    def unfinished(kind: str) -> bool:
        beyond = options.minutes is not None and time.monotonic() - begin < 60 * options.minutes
        wanted = getattr(options, kind) * EVERY[kind]
        return wanted > 0 and (beyond or number - options.start < wanted)

    while kinds := [kind for kind in TARGETS if unfinished(kind)]:
        for kind in kinds:
            if number % EVERY[kind]:
                continue
            finding = run(number, kind, counts[kind])
            if finding:
                findings += 1
                print(finding, flush=True)
        number += 1
        if number % 5000 == 0:
            print(f"{time.monotonic() - begin:.0f} s: {counts}, {findings} findings", file=sys.stderr, flush=True)
    result = {
        **{kind: {"total": counter.total(), **counter} for kind, counter in counts.items()},
        "findings": findings,
        "numbers": [options.start, number - 1],
        "seconds": round(time.monotonic() - begin),
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "transformers": transformers.__version__,
    }
    print(json.dumps(result))
    return int(bool(findings))


if __name__ == "__main__":
    sys.exit(main())
