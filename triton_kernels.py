"""Whether Triton's kernels run on a device: found out once, by running one.

Triton comes with the CUDA builds of torch for Linux, and compiles a kernel when it is first called. For that it needs
a C compiler, the headers of Python, and a GPU that is not too old. If something is missing, plain torch computes what
the kernels would.
"""

import os
import shutil
import sys
import sysconfig
import time

import torch
from transformers.utils import logging

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch, and those for Windows
    triton = None

logger = logging.get_logger(__name__)

KERNEL_DEVICES = ("cuda",)
# A full disk or a driver that is busy may be well again later, so a failure does not decide for the whole process.
SECONDS_TO_NEXT_TRIAL = 60.0
# What is wrong with the caller's program and not with Triton. Older versions of torch lack the second.
CALLERS_ERRORS = (torch.cuda.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.cuda.OutOfMemoryError))

_working: set[torch.device] = set()
_failed: dict[torch.device, float] = {}  # when the last trial was

if triton is not None:

    @triton.jit
    def _count_kernel(number):
        tl.store(number, tl.load(number) + 1)


def runs_kernels(device: torch.device) -> bool:
    """Say whether Triton's kernels run on a device. The first call runs one; if that fails, it logs why.

    Only success is remembered for good. After a failure plain torch serves, and a later call tries again.

    Raises:
        torch.cuda.OutOfMemoryError, torch.AcceleratorError: if the device has no memory left, or earlier code broke it.
    """
    # ROCm also calls its devices "cuda", but nothing has been tried there.
    if triton is None or device.type not in KERNEL_DEVICES or torch.version.hip is not None:
        return False
    # A graph that is compiled for a GPU uses Triton already, and a trial run would become part of the graph.
    if torch.compiler.is_compiling() or device in _working:
        return True
    if device in _failed and time.monotonic() < _failed[device] + SECONDS_TO_NEXT_TRIAL:
        return False
    return _can_try(device) and _runs_trial(device)


@torch.compiler.assume_constant_result
def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a GPU. A CPU, which runs the kernels in Triton's interpreter, counts as new."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def _can_try(device: torch.device) -> bool:
    """Whether a trial could tell anything: it reads a number, which CUDA graphs and fake tensors do not allow."""
    is_fake = isinstance(torch.empty(0, device="cpu"), torch._subclasses.FakeTensor)
    return not is_fake and not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def _runs_trial(device: torch.device) -> bool:
    try:
        number = torch.zeros(1, device=device)
        with torch.cuda.device_of(number):
            _count_kernel[(1,)](number)
        if int(number) != 1:
            raise RuntimeError("a kernel that adds 1 to 0 gave another number")
    except CALLERS_ERRORS:
        raise
    except Exception as error:  # Triton's, the C compiler's or the driver's: they share no narrower class
        if device not in _failed:
            logger.warning(
                f"Triton cannot run on {device} ({error!r:.200}), so attention and packed weights take the slower way "
                f"of plain torch, and generations are not compiled. {_requirements()}"
            )
        _failed[device] = time.monotonic()
        return False
    _working.add(device)
    return True


def _requirements() -> str:
    """Say what Triton needs, and what of it this machine lacks: the error of a C compiler does not explain itself."""
    missing = []
    if not os.environ.get("CC") and not any(map(shutil.which, ("gcc", "clang", "cc"))):
        missing.append("a C compiler (apt install gcc)")
    if not os.path.isfile(os.path.join(sysconfig.get_path("include"), "Python.h")):
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        missing.append(f"Python.h, the headers of Python (apt install python{version}-dev)")
    found = f" This machine lacks {' and '.join(missing)}." if missing else ""
    return (
        "Triton needs a C compiler (gcc), the headers of Python, a disk that is not full for its cache, and a GPU of "
        f"compute capability 7.0 or later.{found}"
    )
