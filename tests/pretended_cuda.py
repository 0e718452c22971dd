"""A pretended CUDA device for machines without one: tensors say "cuda:0", and their numbers lie on the CPU.

libtorch takes them for tensors of the CPU, because a build without CUDA refuses others. As on a GPU, tensors of two
devices meet in no operation, and only a copy moves them. Every time the host would wait
for the device is counted, with the line that waits: those waits are what makes a decode step slow, and no other test
shows them. Numbers are real, so answers can be compared with the CPU's.

    with pretended_cuda() as cuda:
        model = cuda.place(model)
        model.generate(ids.to("cuda"))
        cuda.waits  # Counter of "file.py:line function"
"""

import collections
import contextlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface

from tools import ROOT

aten = torch.ops.aten
DEVICE = torch.device("cuda", 0)
# What the host can only know when the device has come so far.
WAITING = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten._unique2.default,
    aten.repeat_interleave.Tensor,
}
COPYING = {aten._to_copy.default, aten.copy_.default}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class OnDevice(torch.Tensor):
    """A tensor of the pretended device; `numbers` is the tensor on the CPU."""

    numbers: torch.Tensor

    @staticmethod
    def __new__(cls, numbers: torch.Tensor) -> "OnDevice":
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            numbers.shape,
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
        )
        tensor.numbers = numbers
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return PretendedCuda.current.run(operation, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.numbers})"

    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def get_device(self) -> int:
        return DEVICE.index

    def data_ptr(self) -> int:
        return self.numbers.data_ptr()

    # What follows is C++ that reads numbers without an operation.
    def tolist(self) -> Any:
        PretendedCuda.current.note_wait()
        return self.numbers.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")


class PythonEnds(TorchFunctionMode):
    """Calls whose C++ looks at devices before it reaches an operation."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = {key: with_index(value) if key == "device" else value for key, value in (kwargs or {}).items()}
        kwargs.pop("pin_memory", None)
        if function is torch.tensor and is_cuda(kwargs.get("device")):
            device = kwargs.pop("device")
            return move(function(*args, **kwargs), device)
        if function in (torch.Tensor.cuda, torch.Tensor.cpu):
            return move(args[0], DEVICE if function is torch.Tensor.cuda else torch.device("cpu"))
        if function is torch.Tensor.to:
            return move(*map(with_index, args), **kwargs)
        return function(*args, **kwargs)


def move(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`tensor.to(...)`, which C++ would answer by the device that it takes the tensor for."""
    is_copied = kwargs.pop("copy", False)
    if args and isinstance(args[0], torch.Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    device, dtype = device or tensor.device, dtype or tensor.dtype
    if (device, dtype) == (tensor.device, tensor.dtype) and not is_copied and memory_format is None:
        return tensor
    return aten._to_copy(tensor, device=device, dtype=dtype, non_blocking=non_blocking, memory_format=memory_format)


class PretendedCuda(TorchDispatchMode):
    """Runs every operation; see the module.

    Attributes:
        waits: how often the host waits for the device, by the line of this repository that makes it wait, or else the
            line of a library.
        copies: copies to the device, by shape, dtype and whether the host waits for them.
        launches: calls of our kernels, for which plain torch computes.
    """

    current: "PretendedCuda"

    def __init__(self) -> None:
        super().__init__()
        self.waits: collections.Counter[str] = collections.Counter()
        self.copies: collections.Counter[str] = collections.Counter()
        self.launches: collections.Counter[str] = collections.Counter()

    def place(self, tree: Any) -> Any:
        """Put a model, in place, or the tensors of a mapping on the device."""
        if not isinstance(tree, torch.nn.Module):
            return {key: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for key, value in tree.items()}
        for module in tree.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    placed = OnDevice(parameter.detach())
                    module._parameters[name] = torch.nn.Parameter(placed, requires_grad=False)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = OnDevice(buffer)
        return tree

    def reset(self) -> None:
        for counter in (self.waits, self.copies, self.launches):
            counter.clear()

    def own_waits(self) -> dict[str, int]:
        """The waits that this repository's root modules ask for."""
        own = {path.name for path in ROOT.glob("*.py")}
        return {line: count for line, count in self.waits.items() if line.partition(":")[0] in own}

    def note_wait(self) -> None:
        self.waits[place_of_call()] += 1

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return self.run(operation, args, kwargs or {})

    def run(self, operation: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        tensors = [leaf for leaf in pytree.arg_tree_leaves(*args, **kwargs) if isinstance(leaf, torch.Tensor)]
        placed = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
        wanted = kwargs.get("device")
        if not placed and not is_cuda(wanted):
            return operation(*args, **kwargs)
        name = operation.overloadpacket.__name__
        if operation in COPYING:
            self._note_copy(args, kwargs)
        elif placed:
            self._check_devices(name, args, tensors)
        if operation in WAITING:
            self.note_wait()
        plain_kwargs = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory")}
        if "device" in kwargs:
            plain_kwargs["device"] = torch.device("cpu") if is_cuda(wanted) else wanted
        numbers_of = lambda leaf: leaf.numbers if isinstance(leaf, OnDevice) else leaf  # noqa: E731
        result = operation(*pytree.tree_map(numbers_of, args), **pytree.tree_map(numbers_of, plain_kwargs))
        if is_in_place(operation):
            return args[0]
        if not (is_cuda(wanted) if wanted is not None else placed):
            return result
        known = {id(tensor.numbers): tensor for tensor in placed}

        def put(leaf: Any) -> Any:
            is_plain = isinstance(leaf, torch.Tensor) and not isinstance(leaf, OnDevice)
            return known.get(id(leaf)) or OnDevice(leaf) if is_plain else leaf

        return pytree.tree_map(put, result)

    def _check_devices(self, name: str, args: tuple, tensors: list[torch.Tensor]) -> None:
        """Raise if a tensor of the CPU meets one of the device; numbers without a dimension may, and indices are copied."""
        strangers = [tensor for tensor in tensors if not isinstance(tensor, OnDevice) and tensor.dim() > 0]
        if name in INDEXING and isinstance(args[0], OnDevice):
            indices = [index for index in args[1] or () if isinstance(index, torch.Tensor)]
            strangers = [tensor for tensor in strangers if not any(tensor is index for index in indices)]
            if any(index.dtype in (torch.bool, torch.uint8) or not isinstance(index, OnDevice) for index in indices):
                self.note_wait()
        if strangers:
            shapes = [tuple(tensor.shape) for tensor in strangers]
            raise RuntimeError(
                f"Expected all tensors to be on the same device: {name} got shapes {shapes} on the CPU, the others on "
                f"{DEVICE} ({place_of_call()})."
            )

    def _note_copy(self, args: tuple, kwargs: dict[str, Any]) -> None:
        target, source = (args[0], args[1]) if len(args) > 1 and isinstance(args[1], torch.Tensor) else (None, args[0])
        waits = not (kwargs.get("non_blocking") or (target is not None and len(args) > 2 and args[2]))
        wanted = kwargs.get("device")
        to_device = isinstance(target, OnDevice) if target is not None else is_cuda(wanted)
        if isinstance(source, OnDevice):
            leaves = target is not None and not isinstance(target, OnDevice)
            if leaves or (target is None and wanted is not None and not is_cuda(wanted)):
                self.note_wait()
        elif to_device and source.dim() > 0:
            self.copies[f"{tuple(source.shape)} {source.dtype}{', waited for' if waits else ''}"] += 1


def is_cuda(device: Any) -> bool:
    return device is not None and not isinstance(device, int) and torch.device(device).type == "cuda"


def is_in_place(operation: Any) -> bool:
    name = operation.overloadpacket.__name__
    return operation._schema.is_mutable and name.endswith("_") and not name.endswith("__")


def with_index(argument: Any) -> Any:
    """ "cuda" as a device of a number, because libtorch would ask the driver which one is current."""
    return DEVICE if isinstance(argument, (str, torch.device)) and is_cuda(argument) else argument


def place_of_call() -> str:
    """The last line of this repository that is being run, or else of any library but torch: "file.py:line function"."""
    library = None
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path != __file__ and "/torch/" not in path:
            library = library or frame
            # What a library does by itself is not our doing, but what our arguments make torch do is.
            if Path(path).parent == ROOT or "/transformers/" in library.f_code.co_filename:
                break
        frame = frame.f_back
    found = library if frame is None or "/transformers/" in library.f_code.co_filename else frame
    return f"{Path(found.f_code.co_filename).name}:{found.f_lineno} {found.f_code.co_name}"


def attend_plainly(query, key, value, mask, scaling) -> torch.Tensor:
    """What the kernel of `decode_attention` computes; it reads no place that the mask leaves out."""
    key, value = (state.masked_fill(~mask.transpose(2, 3), 0) for state in (key, value))
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True
    )


@contextlib.contextmanager
def pretended_cuda() -> Iterator[PretendedCuda]:
    """Have torch believe in one GPU, on which our kernels run, and nothing is compiled."""
    from nemotron_vl import chat, decode_attention, modeling_nemotron_vl, packed_matmul, quantization_nemotron_vl
    from nemotron_vl import triton_kernels as trial

    cuda = PretendedCuda.current = PretendedCuda()
    properties = SimpleNamespace(major=9, minor=0, total_memory=80 << 30, multi_processor_count=132, name="pretended")
    answers = {
        "_lazy_init": None,
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "synchronize": None,
        "is_current_stream_capturing": False,
        "get_device_capability": (9, 0),
        "get_device_properties": properties,
        "get_device_name": "pretended",
        "mem_get_info": (70 << 30, 80 << 30),
        "empty_cache": None,
    }
    run_thread = threading.Thread.run

    def run_with_modes(thread: threading.Thread) -> None:
        with PythonEnds(), cuda:  # modes belong to a thread
            run_thread(thread)

    def launching(name: str, compute: Any) -> Any:
        def launch(*args: Any) -> torch.Tensor:
            cuda.launches[name] += 1
            tensors = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            if {type(tensor) for tensor in tensors} - {OnDevice, torch.nn.Parameter}:
                raise RuntimeError(f"{name} got tensors of the CPU")
            numbers_of = lambda leaf: leaf.numbers if isinstance(leaf, OnDevice) else leaf  # noqa: E731
            return OnDevice(compute(*pytree.tree_map(numbers_of, args)))

        return launch

    def multiply_plainly(format_name, inputs, tensors) -> torch.Tensor:
        weight = quantization_nemotron_vl.FORMATS[format_name].decode(tensors, inputs.dtype)
        return torch.nn.functional.linear(inputs, weight)

    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_, answer=answer, **__: answer))
        for name in ("device", "device_of"):
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda _: contextlib.nullcontext()))
        stack.enter_context(mock.patch.object(threading.Thread, "run", run_with_modes))
        stack.enter_context(mock.patch.object(chat, "_lasting_thread", chat._LastingThread()))  # it keeps its modes
        for module in (chat, decode_attention, modeling_nemotron_vl, packed_matmul):
            runs = lambda device: device.type == "cuda"  # noqa: E731
            stack.enter_context(mock.patch.object(module, "runs_kernels", runs))
        stack.enter_context(mock.patch.object(trial, "runs_kernels", runs))
        attend = launching("attention", attend_plainly)
        stack.enter_context(mock.patch.object(decode_attention, "_launch", attend))
        # The copy of the file that transformers runs for remote code registers the same name.
        registered = {decode_attention.NAME: decode_attention.decode_attention_forward}
        stack.enter_context(mock.patch.dict(AttentionInterface._global_mapping, registered))
        multiply = launching("packed", multiply_plainly)
        stack.enter_context(mock.patch.object(quantization_nemotron_vl, "multiply_packed", multiply))
        compiles = "_valid_auto_compile_criteria"
        for model_class in (modeling_nemotron_vl.Llama_Nemotron_Nano_VL, modeling_nemotron_vl.NemotronH_Nano_VL_V2):
            stack.enter_context(mock.patch.object(model_class, compiles, lambda *_, **__: False, create=True))
        stack.enter_context(PythonEnds())
        stack.enter_context(cuda)
        yield cuda
