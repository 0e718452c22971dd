"""Compile Triton kernels to machine code without a GPU, and read it: registers, spills, shared memory, instructions.

Triton's wheel has NVIDIA's assembler and disassembler. A kernel is compiled as a launch would: pointers are aligned to
16 bytes, and so are the sizes that `divisible` names.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 86, 89, 90, 100, 120)  # A100, RTX 30, RTX 40 and L4, H100 and H200, B200, RTX 50


@dataclass
class MachineCode:
    """What a kernel became for one architecture.

    Args:
        registers: of a thread.
        spilled: bytes of a thread's local memory.
        shared: bytes of a program's shared memory.
        num_threads: of a program.
        loops: the instructions of each loop, inner ones also within the outer.
    """

    registers: int
    spilled: int
    shared: int
    num_threads: int
    loops: list[list[str]]

    def per_item(self, num_items: int) -> float:
        """Instructions that the threads of a program execute in one round of the longest loop, for each item of it."""
        return len(max(self.loops, key=len)) * self.num_threads / num_items


def compile_kernel(
    kernel: Any,
    pointers: dict[str, str],
    constants: dict[str, Any],
    divisible: tuple[str, ...] = (),
    architecture: int = 90,
    num_warps: int = 4,
) -> MachineCode:
    """Compile a kernel for one launch.

    Args:
        kernel: a function with `triton.jit`.
        pointers: Triton's types of the arguments that are no 32-bit integers.
        constants: the compile-time arguments.
        divisible: integer arguments that are multiples of 16.
        architecture: 90 for sm_90.
        num_warps: of a program.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    kinds = dict.fromkeys(kernel.arg_names, "i32") | pointers | dict.fromkeys(constants, "constexpr")
    signature = {name: kinds[name] for name in kernel.arg_names}
    aligned = [name.startswith("*") or argument in divisible for argument, name in signature.items()]
    attributes = {(place,): [["tt.divisibility", 16]] for place, is_aligned in enumerate(aligned) if is_aligned}
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": num_warps})
    binary = compiled.asm["cubin"]
    usage = _run("cuobjdump", "--dump-resource-usage", binary=binary)
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return MachineCode(
        registers=numbers["REG"],
        spilled=max(numbers["STACK"], numbers["LOCAL"]),
        shared=compiled.metadata.shared,
        num_threads=32 * num_warps,
        loops=_loops(_run("nvdisasm", "-c", binary=binary)),
    )


def _run(program: str, *options: str, binary: bytes) -> str:
    """Run a program of Triton's wheel on a kernel."""
    import triton.backends.nvidia

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        path = Path(triton.backends.nvidia.__file__).parent / "bin" / program
        return subprocess.run([path, *options, file.name], capture_output=True, text=True, check=True).stdout


def _loops(disassembly: str) -> list[list[str]]:
    """Return the instructions between each label and each branch back to it."""
    instructions, labels, loops = [], {}, []
    for line in map(str.strip, disassembly.splitlines()):
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            instructions.append(found[1])
    for place, instruction in enumerate(instructions):
        target = re.search(r"BRA.*\(?(\.L_x_\d+)\)?", instruction)
        if target and labels.get(target[1], place) < place:
            loops.append(instructions[labels[target[1]] : place + 1])
    return loops
