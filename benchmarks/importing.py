"""Importing our modules: processor time beyond that of importing what every Llama needs, each time in a fresh process.

    python -m benchmarks.importing

The goal is 0.1 s beyond transformers. Files are in the page cache, with their bytecode, as from the second import on.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys

from benchmarks.common import report
from tools import ROOT

CODE = """
import json, time
start = time.process_time()
import torch, transformers, numpy, PIL.Image
from transformers import AutoProcessor, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.generation import GenerationMixin
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ProcessorMixin
import tools
middle = time.process_time()
import nemotron_vl.modeling_nemotron_vl
print(json.dumps([1e3 * (middle - start), 1e3 * (time.process_time() - middle)]))
"""


def import_times() -> tuple[float, float]:
    """Milliseconds of processor time for transformers, and for our modules after it."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    # Where Python is told not to keep bytecode, ours would be compiled anew in every round and transformers' would not.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    run = subprocess.run(
        [sys.executable, "-c", CODE], cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    )
    return tuple(json.loads(run.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    import_times()  # fills the page cache and the bytecode
    columns = zip(*(import_times() for _ in range(arguments.rounds)), strict=True)
    result = {}
    for name, values in zip(("transformers", "ours_added"), columns, strict=True):
        low, median, high = statistics.quantiles(values, n=4)
        result[name] = {"median_ms": round(median, 1), "quartiles_ms": [round(low, 1), round(high, 1)]}
    report("importing", [{"case": "fresh process", **result}], rounds=arguments.rounds)


if __name__ == "__main__":
    main()
