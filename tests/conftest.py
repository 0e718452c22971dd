"""Make the flat repository root importable as the package `nemotron_vl`, so that its relative imports resolve."""

import os
import sys
import tempfile
import types
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_MODULES_CACHE", tempfile.mkdtemp(prefix="hf_modules_"))

ROOT = Path(__file__).resolve().parents[1]

package = types.ModuleType("nemotron_vl")
package.__path__ = [str(ROOT)]
sys.modules.setdefault("nemotron_vl", package)
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # `tools`, `training`, ... are packages of the root
