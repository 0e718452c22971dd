"""Average the weights of runs that started from the same weights: two single-thread runs make one better model.

    python -m training.average runs/cells-a runs/cells-b --output runs/cells

On two busy cores, two processes that never wait for each other do twice the steps of one with two threads. Their
learning rates have to have fallen to zero, and they must not have gone far apart.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def average(directories: list[Path]) -> dict[str, torch.Tensor]:
    """Return the mean of every weight.

    Raises:
        ValueError: if the runs do not hold the same weights.
    """
    states = [load_file(directory / "model.safetensors") for directory in directories]
    if any(state.keys() != states[0].keys() for state in states):
        raise ValueError(f"{', '.join(map(str, directories))} are not runs of one model.")
    return {name: torch.stack([state[name].float() for state in states]).mean(0) for name in states[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    save_file(average(arguments.runs), arguments.output / "model.safetensors")
    states = [json.loads((run / "state.json").read_text()) for run in arguments.runs]
    (arguments.output / "state.json").write_text(json.dumps({"step": states[0]["step"], "minutes": 0.0}) + "\n")


if __name__ == "__main__":
    main()
