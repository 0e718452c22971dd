"""The README tells the truth: its tree, links, commands and code."""

import doctest
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from tools import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The fenced blocks that name this language, in order."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [code for name, code in fenced if name == language]


def tracked_files() -> list[Path]:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [Path(line) for line in listed.splitlines()]


def test_printed_tree_is_what_git_tracks():
    files = tracked_files()
    printed, folder = set(), ""
    for line in blocks("")[0].splitlines():
        name = line.split()[0]
        folder = folder if line.startswith("  ") else name if name.endswith("/") else ""
        printed.add(folder + name if line.startswith("  ") else name)
    at_root = {f"{file.parts[0]}/" if len(file.parts) > 1 else file.name for file in files}
    in_tools = {file.as_posix() for file in files if file.parts[0] == "tools"}
    assert printed == at_root | in_tools


def test_every_relative_link_exists():
    links = re.findall(r"\]\((?!https?://|#)([^)]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_named_file_exists():
    named = re.findall(r"`((?:tests|tools|docs|nano|training|evaluation|examples|benchmarks)/[\w./-]+)`", README)
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_yes_names_its_test():
    table = README[README.index("| works on |") :]
    rows = [line.split("|")[1:-1] for line in table[: table.index("\n\n")].splitlines()[2:]]
    unproven = [
        row[0] for row in rows if "yes" in "".join(row[1:-1]) and not re.search(r"`tests/test_\w+\.py`", row[-1])
    ]
    assert len(rows) > 5
    assert unproven == []


def test_make_targets_and_tools_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"\bmake ([a-z][\w.-]*)", "".join(blocks("bash"))):
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), target
    for tool in re.findall(r"python -m tools\.([a-z]\w+)", README):
        assert (ROOT / "tools" / f"{tool}.py").exists(), tool


def test_interactive_examples_give_what_they_print():
    failures, run = doctest.testfile(
        str(ROOT / "README.md"), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE
    )
    assert run and not failures


def test_code_blocks_run(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (60, 40), "white").save("receipt.png")
    code = "\n".join(block for block in blocks("python") if ">>>" not in block)
    assert 'path = "path/to/8b"' in code
    code = code.replace('"path/to/8b"', repr(str(tiny_checkpoint))).replace(
        '"max_new_tokens": 64', '"max_new_tokens": 4'
    )
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out


def test_metadata_block_is_a_model_card():
    metadata = README.split("---")[1]
    for line in ("library_name: transformers", "pipeline_tag: image-text-to-text", "license:", "base_model:"):
        assert line in metadata
    assert "custom_code" in metadata
