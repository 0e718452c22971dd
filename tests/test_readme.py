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
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


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


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_named_file_exists(page):
    folders = "tests|tools|docs|nano|training|evaluation|examples|benchmarks"
    named = re.findall(rf"`((?:{folders})/[\w./-]+)`", page.read_text(encoding="utf-8"))
    assert [name for name in named if not (ROOT / name).exists()] == []


def table_rows() -> list[list[str]]:
    """What works where: what it is, transformers 4.57, transformers 5.23, CUDA, the tests that show it."""
    table = README[README.index("| works on |") :]
    lines = table[: table.index("\n\n")].splitlines()[2:]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_every_yes_names_its_test():
    rows = table_rows()
    assert len(rows) > 20 and {len(row) for row in rows} == {5}
    for what, *cells, shown_by in rows:
        files = re.findall(r"`tests/(test_\w+\.py)`", shown_by)
        assert files or "yes" not in cells, what
        for file in files:
            assert "def test_" in (ROOT / "tests" / file).read_text(encoding="utf-8"), file


def test_cuda_is_claimed_only_where_a_test_needs_it():
    """A cell says "not run", or names the tests that need a device; each of these stands in one."""
    marked = r"^@pytest\.mark\.gpu\n(?:@.*\n)*def (test_\w+)"
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py")]
    exist = {name for source in sources for name in re.findall(marked, source, re.MULTILINE)}
    named = set()
    for what, _, _, cuda, _ in table_rows():
        tests = re.findall(r"`(test_\w+)`", cuda)
        assert tests or cuda == "not run", what
        named.update(tests)
    assert named == exist


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
