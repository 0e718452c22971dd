"""The commands for Nemotron Nano VL checkpoints.

nemotron-vl NAME ...       # after `pip install .`
python -m tools.NAME ...   # the same, in a clone
"""

import argparse
import ast
import importlib
import sys
from pathlib import Path

from . import command_line


def summaries() -> dict[str, str]:
    """Return the first line about each module that has a `main`, by its name; nothing is imported for it."""
    found = {}
    for file in sorted(Path(__file__).parent.glob("[!_]*.py")):
        module = ast.parse(file.read_text(encoding="utf-8"))
        if any(isinstance(statement, ast.FunctionDef) and statement.name == "main" for statement in module.body):
            found[file.stem] = (ast.get_docstring(module) or "").split("\n")[0]
    return found


def main(argv: list[str] | None = None) -> int:
    """Run the command that the first argument names with the arguments after it, and return its exit status."""
    command_line.prepare()
    commands = summaries()
    listed = "\n".join(f"  {name:<16} {text}" for name, text in commands.items())
    parser = argparse.ArgumentParser(
        prog="nemotron-vl",
        usage="%(prog)s NAME ...",
        description=f"{__doc__}\n{listed}",
        epilog="nemotron-vl NAME --help says more about each.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="?", choices=commands, metavar="NAME", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    chosen = parser.parse_args(argv)
    if chosen.name is None:
        parser.print_help()
        return 0
    return importlib.import_module(f".{chosen.name}", __package__).main(chosen.arguments)


if __name__ == "__main__":
    sys.exit(main())
