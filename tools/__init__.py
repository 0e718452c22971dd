"""Commands for checkpoints and images, run from the repository root as `python -m tools.NAME`.

The root is a flat Hugging Face model repository without a package of its own. Importing `tools` makes it importable as
`nemotron_vl`, the name it has when pip installs it.
"""

import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

if "nemotron_vl" not in sys.modules:
    package = types.ModuleType("nemotron_vl")
    package.__path__ = [str(ROOT)]
    sys.modules["nemotron_vl"] = package
