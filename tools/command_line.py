"""What all commands share: their `--help`, one sentence for a user's mistake, a quiet Ctrl-C, and progress.

`python -X dev -m tools.NAME` shows the traceback behind a sentence.
"""

import argparse
import os
import shutil
import sys
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# What bad input raises: a wrong option or file, a checkpoint that does not fit, a package that is not installed.
MISTAKES = (ValueError, TypeError, OSError, ImportError)
# The packages whose name for pip is not the one that Python imports.
PIP_NAMES = {"yaml": "pyyaml", "PIL": "pillow"}
INTERRUPTED = 130  # 128 + SIGINT, as shells count


def prepare() -> None:
    """Make this process end like a command: see `end_with_a_sentence`; progress is only shown on a terminal."""
    sys.excepthook = end_with_a_sentence
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers reads it when it is imported


def end_with_a_sentence(
    kind: type[BaseException], error: BaseException, traceback: types.TracebackType | None
) -> None:
    """End with status 2 and the error's own text for `MISTAKES`, and quietly with status 130 for Ctrl-C.

    It is a `sys.excepthook`: that also covers the seconds in which torch is imported. Other errors are bugs, whose
    traceback is shown.
    """
    if issubclass(kind, KeyboardInterrupt):
        print(file=sys.stderr)
        raise SystemExit(INTERRUPTED)
    if sys.flags.dev_mode or not issubclass(kind, MISTAKES):
        sys.__excepthook__(kind, error, traceback)
        return
    print(f"error: {sentence_of(error)}", file=sys.stderr)
    raise SystemExit(2)


def sentence_of(error: BaseException) -> str:
    """Return what an error says to a user: a missing package with the command that installs it, a file with its name."""
    if isinstance(error, ModuleNotFoundError) and error.name and str(error).startswith("No module named"):
        package = error.name.split(".")[0]
        return f"{error}. Install it: pip install {PIP_NAMES.get(package, package)}"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}."
    return str(error) or type(error).__name__


def command_parser(name: str, description: str | None, **options: Any) -> argparse.ArgumentParser:
    """Return the parser of a command of `tools`; its help names the command as the user has it, see `tools.__main__`.

    Args:
        name: of the command.
        description: the docstring of its module, which names commands as `python -m tools.NAME`.
        options: of `argparse.ArgumentParser`.
    """
    is_installed = __package__ != "tools"
    start = "nemotron-vl " if is_installed else "python -m tools."
    text = (description or "").replace("python -m tools.", start)
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=start + name, description=text, formatter_class=formatter, **options)


def usable_device(name: str) -> str:
    """Return the name of a device, for argparse, which shows the error if torch cannot use it here."""
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(f"{name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return name


def require_directory(folder: Path) -> None:
    """Raise ValueError, with the folder's name, unless it is a directory."""
    if not folder.is_dir():
        kind = "is a file, not the directory of a checkpoint" if folder.exists() else "does not exist"
        raise ValueError(f"{folder} {kind}. Download the checkpoint first: hf download ID --local-dir DIR.")


def require_checkpoint(folder: Path) -> None:
    """Raise ValueError, with the folder's name, unless it is a directory that holds a config.json."""
    require_directory(folder)
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} holds no config.json, so it is not the directory of a checkpoint.")


def progress(steps: Iterable[Any] | None = None, **options: Any) -> Any:
    """Return tqdm's bar over `steps`, with the time left; it is not shown where the messages are not on a terminal.

    Args:
        steps: what to go through; without, call `update` of the result.
        options: of `tqdm.tqdm`.
    """
    from tqdm import tqdm  # comes with transformers; imported here so that `--help` answers without

    size = shutil.get_terminal_size()  # tqdm's own draws nothing on a terminal that says 0, as those of containers do
    return tqdm(steps, **{"disable": None, "ncols": size.columns, "nrows": size.lines} | options)
