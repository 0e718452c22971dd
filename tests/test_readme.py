"""The pages tell the truth: their links, commands, code, numbers, the printed tree and the table of what works where."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import transformers

from tools import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
COMPATIBILITY = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
PERFORMANCE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
MANUALS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "examples/finetune.md",
]
PAGES = [*MANUALS, *sorted((ROOT / "docs" / "log").glob("*.md"))]  # the logs name files and options of their day


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a page that name this language, in order."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return [code for name, code in fenced if name == language]


def tracked_files() -> list[Path]:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [Path(line) for line in listed.splitlines()]


def run_from_the_clone(*arguments: str) -> str:
    """What Python prints, started in the root as a reader would."""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_printed_tree_is_what_git_tracks():
    files = tracked_files()
    printed, folder = set(), ""
    for line in blocks(CONTRIBUTING, "")[0].splitlines():
        name = line.split()[0]
        folder = folder if line.startswith("  ") else name if name.endswith("/") else ""
        printed.add(folder + name if line.startswith("  ") else name)
    at_root = {f"{file.parts[0]}/" if len(file.parts) > 1 else file.name for file in files}
    in_tools = {file.as_posix() for file in files if file.parts[0] == "tools"}
    assert printed == at_root | in_tools


def anchors(page: Path) -> set[str]:
    """The anchors that a forge gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_leads_somewhere(page):
    for link in re.findall(r"\]\((?!https?://)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_front_page_links_every_manual():
    linked = {(ROOT / link).resolve() for link in re.findall(r"\]\(([\w./-]+)[)#]", README)}
    assert {page.resolve() for page in MANUALS[1:]} <= linked


@pytest.mark.parametrize("page", MANUALS, ids=name_of)
def test_every_named_file_exists(page):
    folders = "tests|tools|docs|nano|documents|pretraining|training|evaluation|examples|benchmarks"
    named = re.findall(rf"`((?:{folders})/[\w./-]+)`", page.read_text(encoding="utf-8"))
    assert [name for name in named if not (ROOT / name).exists()] == []


def table_rows() -> list[list[str]]:
    """What works where: what it is, transformers 4.57, transformers 5.23, CUDA, the tests that show it."""
    table = COMPATIBILITY[COMPATIBILITY.index("| works on |") :]
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


@pytest.mark.parametrize("page", MANUALS, ids=name_of)
def test_make_targets_and_commands_exist(page):
    text, makefile = page.read_text(encoding="utf-8"), (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:^|`)make ([a-z][\w.-]*)", text, re.MULTILINE):
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), target
    folders = "tools|tests|training|pretraining|documents|evaluation|benchmarks"
    for module in re.findall(rf"-m ((?:{folders})(?:\.[a-z]\w*)+)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module


def test_the_pages_make_and_pip_ask_for_the_same_python():
    lowest = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["requires-python"]
    major, minor = lowest.removeprefix(">=").split(".")
    assert f"Python {major}.{minor} or later" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"sys.version_info < ({major}, {minor})" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_make_with_an_older_python_says_which_it_needs_and_installs_nothing(tmp_path):
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    older = tmp_path / "python3"
    older.write_text(f'#!/bin/sh\nexec {sys.executable} -c "import sys; sys.version_info = (3, 10, 13); $2"\n')
    older.chmod(0o755)
    command = ["make", f"PYTHON={older}", f"VENV={tmp_path / 'venv'}", "demo"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and not (tmp_path / "venv").exists()
    assert done.stderr.startswith(f"This needs Python 3.11 or later, and {older} is 3.10. Name a later one: make PY")


def test_interactive_examples_give_what_they_print():
    # `tools` stands in for the installed package, which tests/test_terminal.py imports as such.
    doctest = "import doctest, tools; doctest.testfile('README.md', False, verbose=True, optionflags=doctest.NORMALIZE_WHITESPACE)"
    report = run_from_the_clone("-c", doctest)
    assert f"{README.count('>>>')} tests in 1 items" in report or f"{README.count('>>>')} passed" in report


def test_the_code_on_nano_runs_from_the_clone_and_prints_what_is_shown():
    code = [block for block in blocks(README, "python") if ">>>" not in block and "path/to" not in block]
    shown = blocks(README, "text")
    assert len(code) == len(shown) == 2
    assert run_from_the_clone("-c", "\n".join(code)) == "".join(shown)


def test_the_code_that_loads_an_adopted_checkpoint_runs(tiny_checkpoint):
    (code,) = [block for block in blocks(README, "python") if "path/to/8b" in block]
    names: dict = {}
    exec("from transformers import AutoModel, AutoProcessor", names)
    exec(code.replace("path/to/8b", str(tiny_checkpoint)), names)
    assert str(names["model"].dtype) == "torch.bfloat16" and names["processor"].image_token == "<image>"


def test_the_answers_of_the_sample_are_those_of_nano():
    from tools.chat import load

    model, processor = load(ROOT / "nano")
    table = README[README.index("| question |") :].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert len(rows) >= 4
    features = processor.image_processor(ROOT / "examples" / "receipt.png")
    options = {"max_new_tokens": 64, "do_sample": False}
    for question, answer in rows:
        assert model.chat(processor, question=question, generation_config=options, **features) == answer


@pytest.mark.parametrize("member", ["8B V1", "12B V2"])
def test_memory_in_the_pages_is_what_the_benchmark_counts(member):
    if transformers.__version__.startswith("4."):
        pytest.skip("transformers 4 opens an autocast for rotary positions, which the meta device does not have")
    from benchmarks.memory import count

    rows = count(member)
    for row in rows:
        assert f"| {' | '.join(f'{value:.2f}' for value in list(row.values())[1:])} |" in PERFORMANCE, row
    start = README.index(f"| {member}: weights |")
    weights, whole = (re.findall(r"\d+\.\d", line) for line in README[start:].splitlines()[:2])
    assert [float(cell) for cell in weights] == pytest.approx([row["weights"] for row in rows], abs=0.051)
    assert [float(cell) for cell in whole] == pytest.approx([row["all"] for row in rows], abs=0.051)


def test_metadata_block_is_a_model_card():
    metadata = README.split("---")[1]
    for line in ("library_name: transformers", "pipeline_tag: image-text-to-text", "license:", "base_model:"):
        assert line in metadata
    assert "custom_code" in metadata
