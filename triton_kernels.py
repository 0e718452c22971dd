"""Whether Triton's kernels run on a device: found out once, by running one.

Triton comes with the CUDA builds of torch for Linux, and compiles a kernel when it is first called. For that it needs
a C compiler and a GPU that is not too old. If something is missing, plain torch computes what the kernels would.
"""

import functools

import torch
from transformers.utils import logging

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch, and those for Windows
    triton = None

logger = logging.get_logger(__name__)

KERNEL_DEVICES = ("cuda",)

if triton is not None:

    @triton.jit
    def _count_kernel(number):
        tl.store(number, tl.load(number) + 1)


def runs_kernels(device: torch.device) -> bool:
    """Say whether Triton's kernels run on a device. The first call runs one; if that fails, it logs why."""
    if triton is None or device.type not in KERNEL_DEVICES:
        return False
    # A graph that is compiled for a GPU uses Triton already, and a trial run would become part of the graph.
    return torch.compiler.is_compiling() or _runs_trial(device)


@functools.cache
def _runs_trial(device: torch.device) -> bool:
    try:
        number = torch.zeros(1, device=device)
        with torch.cuda.device_of(number):
            _count_kernel[(1,)](number)
        if int(number) != 1:
            raise RuntimeError("a kernel that adds 1 to 0 gave another number")
    except Exception as error:  # Triton's, the C compiler's or the driver's: they share no narrower class
        logger.warning(
            f"Triton cannot run on {device} ({error!r:.200}), so attention and packed weights take the slower way of "
            "plain torch, and generations are not compiled. Triton needs a C compiler (gcc) and a GPU of compute "
            "capability 7.0 or later."
        )
        return False
    return True
