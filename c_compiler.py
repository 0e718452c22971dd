"""Compiles C code at its first use, and keeps the library in a cache folder for later processes.

The compiler is the one that `$CC` names, else cc, gcc or clang, else that of the Python package ziglang. The key of a
cached library covers the source, the command, and everything that the compiler says about itself and this processor.
So a home directory that different machines share works, and so does an update of the compiler.
"""

import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

INSTALL_HINT = "Install gcc or clang, or `pip install ziglang`."
COMPILERS = ("cc", "gcc", "clang")
# Sums keep their order (no -ffast-math); a product and a sum may become one instruction, which rounds once.
FLAGS = ("-O3", "-ffp-contract=fast", "-fPIC", "-shared")
TIMEOUT_SECONDS = 300


@functools.cache
def find_compiler() -> tuple[str, ...]:
    """Return the command of a C compiler.

    Raises:
        FileNotFoundError: if there is none.
    """
    named = shlex.split(os.environ.get("CC", ""))
    if named:
        return tuple(named)
    for name in COMPILERS:
        if shutil.which(name):
            return (name,)
    if importlib.util.find_spec("ziglang") is not None:
        return (sys.executable, "-m", "ziglang", "cc")
    raise FileNotFoundError(f"there is no C compiler: neither $CC, {', '.join(COMPILERS)}, nor the package ziglang")


def _run(command: list[str]) -> str:
    """Run the compiler and return what it prints.

    Raises:
        OSError: if it does not start.
        RuntimeError: if it fails or does not end.
    """
    try:
        result = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{shlex.join(command)} did not end in {TIMEOUT_SECONDS} s") from error
    if result.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed: {result.stderr.strip()[-400:]}")
    return result.stdout


def cache_folder() -> Path:
    """Return a folder for libraries that nobody but this user can write to.

    It is nemotron_vl in `$XDG_CACHE_HOME` or ~/.cache, or a new temporary folder if that one cannot be had.
    """
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nemotron_vl"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        private = os.name == "nt" or (status.st_uid == os.getuid() and not status.st_mode & 0o022)
        if private and os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        pass
    return Path(tempfile.mkdtemp(prefix="nemotron_vl_"))


def load_library(source: str) -> ctypes.CDLL:
    """Compile C code for this processor, unless the cache has it, and load it.

    Raises:
        OSError: if there is no compiler, or a file cannot be written or loaded.
        RuntimeError: if the compiler fails.
    """
    is_arm = platform.machine().lower() in ("arm64", "aarch64")
    command = [*find_compiler(), *FLAGS, "-mcpu=native" if is_arm else "-march=native"]
    # The predefined macros name the compiler's version and the instructions of this processor.
    macros = _run([*command, "-dM", "-E", "-x", "c", os.devnull])
    key = hashlib.sha256("\0".join((source, *command, macros)).encode()).hexdigest()[:32]
    library = cache_folder() / f"{key}.{'dll' if os.name == 'nt' else 'so'}"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=library.parent, ignore_cleanup_errors=True) as folder:
            code, compiled = Path(folder) / "code.c", Path(folder) / library.name
            code.write_text(source, encoding="utf-8")
            _run([*command, str(code), "-o", str(compiled)])
            os.replace(compiled, library)  # other processes see all of the file or nothing
    return ctypes.CDLL(str(library))
