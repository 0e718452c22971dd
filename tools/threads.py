"""How many threads a model gets on a CPU."""

import os
import sys
from typing import Any

import torch

# Below this size a step reads at most 200 MB of weights, which one core does in milliseconds. A step consists of
# hundreds of short operations, and all threads wait for the slowest at the end of each: where another program has one
# of their cores, for a whole time slice.
NUM_PARAMETERS_OF_SMALL = 50_000_000


def choose_threads(model: Any) -> None:
    """Give a small model on a CPU one thread, and say so on standard error; leave the others torch's choice.

    The environment variable `OMP_NUM_THREADS` wins: where it is set, nothing changes.

    Args:
        model: a loaded model; all of this process counts threads together, so this is the process's number.
    """
    num_threads, num_parameters = torch.get_num_threads(), model.num_parameters()
    if "OMP_NUM_THREADS" in os.environ or num_threads == 1 or model.device.type != "cpu":
        return
    if num_parameters < NUM_PARAMETERS_OF_SMALL:
        torch.set_num_threads(1)
        print(
            f"One thread instead of {num_threads}: a model of {num_parameters / 1e6:.1f} M parameters is quick on one, "
            "and many times slower on several if the machine is busy. OMP_NUM_THREADS chooses another number.",
            file=sys.stderr,
        )
