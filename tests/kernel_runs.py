"""Where the tests of Triton's kernels run: on a GPU, or on a CPU in Triton's interpreter.

In the interpreter (`pip install --no-deps triton`), in a process of its own, because Triton asks once, when imported:

    TRITON_INTERPRET=1 python -m pytest -q tests/test_decode_attention.py tests/test_packed_matmul.py
"""

import importlib.util
import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
needs_kernels = pytest.mark.skipif(
    not (HAS_TRITON and (INTERPRETED or torch.cuda.is_available())),
    reason="needs Triton (pip install --no-deps triton) and a GPU or TRITON_INTERPRET=1",
)
needs_compiler = pytest.mark.skipif(
    not HAS_TRITON or INTERPRETED, reason="needs Triton (pip install --no-deps triton), not its interpreter"
)
