"""A process of its own, for what a test cannot do in this one."""

import os
import subprocess
from pathlib import Path

from tools import ROOT


def run(*command: str | Path, cwd: Path = ROOT, timeout: float = 600, **environment: str) -> str:
    """Run a command on one thread and return its standard output; if it fails, so does the test, with both outputs."""
    ended = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    return ended.stdout
