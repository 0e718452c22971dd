"""Commands for checkpoints and images: `python -m tools.NAME` in a clone, `nemotron-vl NAME` after `pip install .`.

The root is a flat Hugging Face model repository without a package of its own. Importing `tools` makes it importable as
`nemotron_vl`, the name it has when pip installs it; these commands are then `nemotron_vl.tools`.
"""

import sys
import types
from pathlib import Path

from . import command_line

ROOT = Path(__file__).resolve().parents[1]

if "nemotron_vl" not in sys.modules:
    package = types.ModuleType("nemotron_vl")
    package.__path__ = [str(ROOT)]
    sys.modules["nemotron_vl"] = package

if sys.argv[0] == "-m":  # what Python puts there while it looks for the module that `python -m` is to run
    command_line.prepare()
