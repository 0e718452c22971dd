"""Every command in a terminal: its help, one sentence for a mistake, Ctrl-C, progress, and the package of `pip install`."""

import io
import logging
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from types import SimpleNamespace

import fpdf
import pytest
import transformers
from PIL import Image

from tools import ROOT, chat, command_line, demo
from tools.__main__ import summaries

RECEIPT = ROOT / "examples" / "receipt.png"
FOLDERS = ("tools", "training", "evaluation", "pretraining", "documents", "benchmarks")
FILES = [file for folder in FOLDERS for file in (ROOT / folder).glob("*.py")]
FILES += [ROOT / "tests" / "fuzz.py", ROOT / "tests" / "standard_suites.py"]
COMMANDS = sorted(
    f"{file.parent.name}.{file.stem}" for file in FILES if '\nif __name__ == "__main__":' in file.read_text("utf-8")
)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run Python in the clone, as a user does."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


# --- help ---


@pytest.mark.slow
@pytest.mark.skipif(
    transformers.__version__.startswith("4."), reason="the help is that of transformers 5; minutes of it"
)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_answers_help(command):
    ended = run("-m", command, "--help")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("usage: ") and ended.stderr == ""


def test_the_list_of_commands_needs_no_package():
    ended = run("-I", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tools.__main__ import main; main()")
    assert ended.returncode == 0 and ended.stdout.startswith("usage: nemotron-vl NAME"), ended.stderr
    assert set(summaries()) == {name.removeprefix("tools.") for name in COMMANDS if name.startswith("tools.")} - {
        "__main__"
    }
    assert all(f"  {name:<16} {text}\n" in ended.stdout and text for name, text in summaries().items())


def test_serve_answers_help_without_its_packages_and_names_them_when_it_starts():
    blocked = "import sys; sys.modules.update(uvicorn=None, starlette=None); import tools.serve as serve\n"
    assert run("-c", blocked + "serve.main(['--help'])").stdout.startswith("usage: python -m tools.serve")
    ended = run("-c", blocked + "serve.main([])")
    assert (
        "ImportError: Serving needs packages that are not installed: pip install starlette uvicorn llguidance jsonschema"
        in ended.stderr
    )


# --- a user's mistakes ---


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ValueError("n must be 1."), "error: n must be 1.\n"),
        (FileNotFoundError(2, "No such file or directory", "a.yaml"), "error: a.yaml: No such file or directory.\n"),
        (
            ModuleNotFoundError("No module named 'yaml.nodes'", name="yaml.nodes"),
            "error: No module named 'yaml.nodes'. Install it: pip install pyyaml\n",
        ),
        (ImportError("Fonts are missing: pip install fonts"), "error: Fonts are missing: pip install fonts\n"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(error, sentence, capsys):
    with pytest.raises(SystemExit) as ended:
        command_line.end_with_a_sentence(type(error), error, None)
    assert ended.value.code == 2
    assert capsys.readouterr().err == sentence


def test_ctrl_c_is_quiet_and_a_bug_keeps_its_traceback(capsys):
    with pytest.raises(SystemExit) as ended:
        command_line.end_with_a_sentence(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert ended.value.code == 130 and capsys.readouterr().err == "\n"
    command_line.end_with_a_sentence(RuntimeError, RuntimeError("a bug"), None)
    assert "RuntimeError: a bug" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("tools.chat", "examples"), "it is a directory"),
        (("tools.chat", "nosuch.png"), "there is no such file"),
        (("tools.chat", "examples/receipt.png", "--model", "nosuch"), "nosuch does not exist"),
        (("tools.chat", "examples/receipt.png", "--model", "README.md"), "README.md is a file, not the directory"),
        (("tools.demo", "examples"), "examples holds no config.json"),
        (("tools.adopt", "nosuch", "--check"), "nosuch does not exist"),
        (("tools.weights", "nosuch"), "nosuch does not exist"),
        (("tools.quantize", "nosuch", "--format", "fp8", "--calibration", "a", "--out", "b"), "nosuch does not exist"),
        (("tools.build_index", "examples"), "examples holds no config.json"),
        (("tools", "adopt", "nosuch", "--check"), "nosuch does not exist"),
        (("training.finetune", "nosuch.yaml"), "nosuch.yaml: No such file or directory"),
        (("tools.compare", "nosuch", "examples/receipt.png", "--device", "abacus"), "'abacus' cannot be used here"),
    ],
)
def test_a_mistake_on_the_command_line_has_no_traceback(arguments, says):
    ended = run("-m", *arguments)
    assert ended.returncode == 2
    assert says in ended.stderr and "Traceback" not in ended.stderr


def test_a_wrong_model_is_named_itself_and_not_its_parent(tmp_path):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text("{}")
    for name, says in {"absent": "does not exist", "foreign": "has no code of this repository"}.items():
        with pytest.raises(ValueError, match=f"{name} {says}"):
            chat.load(tmp_path / name)


def test_a_directory_with_a_space_in_its_name_does_not_warn(tiny_checkpoint, tmp_path):
    seen: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    logger = logging.getLogger("transformers.dynamic_module_utils")
    logger.addHandler(handler)
    try:
        chat.load(Path(shutil.copytree(tiny_checkpoint, tmp_path / "a clone")))
    finally:
        logger.removeHandler(handler)
    assert seen == []


def test_chat_and_demo_ask_about_the_pages_of_a_pdf(tmp_path, capsys):
    pdf = fpdf.FPDF(unit="pt", format=(400, 448))
    pdf.add_page()
    pdf.add_page()
    pdf.image(RECEIPT, 0, 0, 400, 448)
    path = tmp_path / "two pages ü.pdf"
    pdf.output(path)
    tiles = tmp_path / "tiles.png"
    arguments = [str(path), "--pages", "2", "--max-num-tiles", "1", "--tiles", str(tiles)]
    assert chat.main([*arguments, "--question", "What is the total?"]) == 0
    printed = capsys.readouterr().out
    assert f"{path}, page 2: 512 x 512 px -> 1 x 1 tiles -> 258 tokens" in printed and "72.13" in printed
    assert Image.open(tiles).size == (512, 512)
    assert demo.main(["--document", str(path), "--page", "2", "--max-num-tiles", "1", "--tiles", str(tiles)]) == 0
    assert "72.13" in capsys.readouterr().out


def test_chat_says_how_many_tiles_fit(tmp_path):
    pdf = fpdf.FPDF()
    for _ in range(9):
        pdf.add_page()
    pdf.output(tmp_path / "nine.pdf")
    with pytest.raises(ValueError, match="They fit with max_num_tiles=1"):
        chat.main([str(tmp_path / "nine.pdf"), "--question", "What?"])


def test_the_demo_answers_where_it_cannot_write(tmp_path, capsys):
    image = Image.open(RECEIPT).convert("RGB")
    assert demo.run(ROOT / "nano", image, tmp_path / "absent" / "tiles.png")[0] == "72.13"
    assert "was not written" in capsys.readouterr().out


# --- Ctrl-C ---


class Slow:
    """Answers each question but one, in whose answer the user presses Ctrl-C."""

    config = SimpleNamespace(max_sequence_length=4096)

    def __init__(self):
        self.turns = []

    def chat(self, processor, question, history, **_):
        self.turns.append((question, history))
        if "long" in question:
            raise KeyboardInterrupt
        return "Yes.", [*(history or []), (question, "Yes.")], 0.25


def test_ctrl_c_in_an_answer_ends_the_answer_and_not_the_chat(monkeypatch, capsys):
    typed = iter(["A long one?", "Is it paid?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    model, processor = chat.load(ROOT / "nano")
    slow = Slow()
    monkeypatch.setattr(chat, "load", lambda directory: (slow, processor))
    monkeypatch.setattr(chat, "choose_threads", lambda model: None)
    assert chat.main([str(RECEIPT)]) == 0
    assert slow.turns == [("<image>\nA long one?", None), ("<image>\nIs it paid?", None)]
    assert "The answer was stopped" in capsys.readouterr().out


def test_ctrl_c_ends_questions_of_the_command_line(monkeypatch):
    _, processor = chat.load(ROOT / "nano")
    monkeypatch.setattr(chat, "load", lambda directory: (Slow(), processor))
    monkeypatch.setattr(chat, "choose_threads", lambda model: None)
    with pytest.raises(KeyboardInterrupt):
        chat.main([str(RECEIPT), "--question", "A long one?", "Is it paid?"])


# --- progress ---


@pytest.mark.parametrize("on_terminal", [True, False])
def test_progress_shows_the_time_left_on_a_terminal_and_nothing_elsewhere(on_terminal, monkeypatch):
    written = io.StringIO()
    written.isatty = lambda: on_terminal
    monkeypatch.setattr(sys, "stderr", written)
    assert list(command_line.progress(range(3), desc="Copying", mininterval=0)) == [0, 1, 2]
    assert (re.search(r"Copying: +\d+%.*\d/3 \[\d\d:\d\d<", written.getvalue()) is not None) == on_terminal
    assert on_terminal or written.getvalue() == ""


# --- pip install . ---


@pytest.mark.slow
@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="a wheel does not depend on the version")
def test_the_installed_package_has_the_commands_the_configs_and_nano(tmp_path):
    """The wheel in an environment of its own, which borrows the packages that it needs from this one."""
    others = shutil.ignore_patterns(".*", "__pycache__", "build", "*.egg-info", "golden", "results", "runs")
    source = shutil.copytree(ROOT, tmp_path / "source", ignore=others)  # setuptools writes beside the sources
    wheels = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", tmp_path, source]
    subprocess.run(wheels, cwd=tmp_path, check=True)
    venv.create(tmp_path / "venv", with_pip=False)
    (python,) = (tmp_path / "venv").glob("[Bb*]*/python")
    paths = run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
    site = Path(
        subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"])
        .decode()
        .strip()
    )
    (site / "borrowed.pth").write_text(paths)
    (wheel,) = tmp_path.glob("*.whl")
    install = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", wheel]
    subprocess.run(install, cwd=tmp_path, check=True)
    assert not (site / "tools").exists() and (site / "nemotron_vl" / "tools").is_dir()

    command = python.with_name("nemotron-vl")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}

    def call(*arguments: str | Path) -> str:
        ended = subprocess.run([command, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    for name in summaries():
        assert name in call("--help")

    in_clone = run("-m", "tools.chat", "--help").stdout
    assert call("chat", "--help").split() == in_clone.replace("python -m tools.", "nemotron-vl ").split()
    assert "72.13" in call("chat", RECEIPT, "--question", "What is the total?")
    assert "72.13" in call("demo")
    call("adopt", site / "nemotron_vl" / "nano", "--out", tmp_path / "flat", "--copy")
    assert "72.13" in call("demo", tmp_path / "flat")
    counting = "from nemotron_vl.image_processing import count_tiles; print(count_tiles(height=1754, width=1240))"
    assert subprocess.check_output([python, "-c", counting], cwd=tmp_path).split() == [b"13"]
