"""The notebook and the walk-through in examples/ do what they say: their code is run as it stands, for fewer steps.

After a change to the notebook, or to nano, renew its outputs (pip install nbconvert ipykernel peft matplotlib):

    jupyter nbconvert --to notebook --execute --inplace examples/quickstart.ipynb

That of the other one (pip install pypdfium2 pandas llguidance jsonschema) likewise.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import types

import pytest

from tools import ROOT

EXAMPLES = ROOT / "examples"
FEWER_STEPS = 2


def notebook_cells(name: str = "quickstart.ipynb") -> list[dict]:
    return json.loads((EXAMPLES / name).read_text(encoding="utf-8"))["cells"]


def test_the_notebook_is_stored_with_its_outputs():
    code = [cell for cell in notebook_cells() if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3  # the page, its tiles, the loss
    said = {cell["source"][-1]: "".join(cell["outputs"][0]["data"]["text/plain"]) for cell in code if cell["outputs"]
            and "data" in cell["outputs"][0]}  # fmt: skip
    assert said["before"] != said["after"] and '{"total": ' in said["after"]


@pytest.mark.slow
def test_the_notebook_runs_from_end_to_end():
    pytest.importorskip("peft", reason="pip install peft")
    script = "\n".join(
        f"steps = {FEWER_STEPS}" if "parameters" in cell["metadata"].get("tags", []) else "".join(cell["source"])
        for cell in notebook_cells()
        if cell["cell_type"] == "code"
    )
    script += "\nassert all(answers) and before and type(after) is str, (answers, before, after)"
    done = subprocess.run([sys.executable, "-c", script], cwd=EXAMPLES, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def test_the_notebook_about_reading_is_stored_with_its_outputs():
    code = [cell for cell in notebook_cells("reading.ipynb") if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    said = json.dumps(outputs)
    assert "image/png" in said and "text/html" in said and "320.76" in said and "([1], [2, 3], [])" in said


@pytest.mark.slow
def test_the_notebook_about_reading_runs_from_end_to_end():
    for package in ("pandas", "pypdfium2", "llguidance", "jsonschema"):
        pytest.importorskip(package, reason=f"pip install {package}")
    code = ["".join(cell["source"]) for cell in notebook_cells("reading.ipynb") if cell["cell_type"] == "code"]
    checks = """
assert list(table.status) == ["read"] * 3 and table.answer[2].splitlines()[2].endswith(" 320.76"), table
assert answers["What is the total?"][2] == "320.76", answers
assert found["fields"]["total"] == 320.76 and found["values"]["total"]["page"] == 3, found
assert [row["page"] for row in second] == [2, 3] and third == []
"""
    script = [sys.executable, "-c", "\n".join([*code, checks])]
    done = subprocess.run(script, cwd=EXAMPLES, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def test_the_invoice_that_is_read_is_the_one_that_the_repository_draws(tmp_path):
    pytest.importorskip("fpdf", reason="pip install fpdf2")
    pypdfium2 = pytest.importorskip("pypdfium2", reason="pip install pypdfium2")
    from documents.invoice import draw_invoice

    draw_invoice(tmp_path / "drawn.pdf")
    pages = []
    for file in (tmp_path / "drawn.pdf", EXAMPLES / "invoice.pdf"):
        document = pypdfium2.PdfDocument(file)
        pages.append([page.render().to_numpy().tobytes() for page in document])
        document.close()
    assert len(pages[0]) == 3 and pages[0] == pages[1]


@pytest.mark.slow
def test_the_walk_through_runs_from_end_to_end(tmp_path):
    pytest.importorskip("peft", reason="pip install peft")
    for entry in ROOT.iterdir():
        if not entry.name.startswith("."):
            (tmp_path / entry.name).symlink_to(entry)  # the root, but what the commands write stays here
    text = (EXAMPLES / "finetune.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```(bash|python)\n(.*?)```", text, re.DOTALL)
    assert [language for language, _ in blocks] == ["python", "bash", "bash", "bash"]
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}",
    }
    for language, code in blocks:
        code = code.replace("output=runs/mine", f"output=runs/mine trainer.max_steps={FEWER_STEPS}")
        shell = ["bash", "-ec", 'python() { "$PYTHON" "$@"; }\n' + code]
        command = [sys.executable, "-c", code] if language == "python" else shell
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
    assert "> Total as JSON?" in done.stdout and not list(ROOT.glob("my-documents"))
    assert (tmp_path / "runs" / "mine" / "adapter").is_dir()


# --- read.py, the recipe in one file ---


def recipe() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("recipe", EXAMPLES / "read.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_recipe_reads_a_folder_and_says_what_failed(tmp_path, capsys):
    (tmp_path / "in/may").mkdir(parents=True)
    (tmp_path / "in/broken.pdf").write_bytes(b"%PDF-1.7 and no more")
    (tmp_path / "in/notes.txt").write_text("Not a document.")
    shutil.copy(EXAMPLES / "receipt.png", tmp_path / "in/may")
    assert recipe().main([str(tmp_path / "in"), str(tmp_path / "out")]) == 1
    markdown = (tmp_path / "out/may/receipt.png.md").read_text(encoding="utf-8")
    assert markdown.startswith("<!-- page 1 -->\n") and "Total 72.13" in markdown.splitlines()
    rows = [json.loads(line) for line in (tmp_path / "out/pages.jsonl").read_text(encoding="utf-8").splitlines()]
    broken, receipt = sorted(rows, key=lambda row: row["file"])
    assert broken["status"] == "failed" and "broken.pdf" in broken["error"] and broken["page"] is None
    assert receipt["status"] == "read" and receipt["answer"] in markdown and receipt["page"] == 1
    assert "page 1: read" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="nothing is overwritten"):
        recipe().main([str(tmp_path / "in"), str(tmp_path / "out")])


def test_the_recipe_reads_a_checkpoint_directory_page_by_page(tiny_checkpoint, tmp_path):
    pytest.importorskip("pypdfium2", reason="pip install pypdfium2")
    options = ["--model", str(tiny_checkpoint), "--max-new-tokens", "3", "--prompt", "What is this?"]
    assert recipe().main([str(EXAMPLES / "invoice.pdf"), str(tmp_path / "out"), *options]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out/pages.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["page"] for row in rows] == [1, 2, 3] and all(row["tokens"] <= 3 for row in rows)
    markdown = (tmp_path / "out/invoice.pdf.md").read_text(encoding="utf-8")
    places = [markdown.index(f"<!-- page {row['page']}") for row in rows]
    assert places == sorted(places)


@pytest.mark.parametrize("mistake", ["no such file", "no documents", "no checkpoint"])
def test_the_recipe_says_a_mistake_in_a_sentence(tmp_path, mistake):
    given = {"no such file": tmp_path / "absent.pdf", "no documents": tmp_path}.get(mistake, EXAMPLES / "receipt.png")
    with pytest.raises(SystemExit) as ended:
        recipe().main([str(given), str(tmp_path / "out"), "--model", str(tmp_path)])
    said = {"no such file": "does not exist", "no documents": "holds no file", "no checkpoint": "--model DIR"}
    assert said[mistake] in ended.value.code and not (tmp_path / "out").exists()


def test_the_recipe_pins_what_the_project_pins():
    head = (EXAMPLES / "read.py").read_text(encoding="utf-8").split("# ///")[1]
    pins = set(re.findall(r'"([\w-]+==[\d.]+)"', head))
    known = "".join((ROOT / name).read_text() for name in ("requirements.txt", "requirements-dev.txt")).splitlines()
    assert len(pins) == 6 and pins <= set(known)


@pytest.mark.slow
def test_the_recipe_runs_by_uv_in_a_fresh_environment(tmp_path):
    """uv takes wheels from where pip is told to look first; PyPI's torch for Linux has CUDA and weighs 4 GB."""
    pytest.importorskip("uv", reason="pip install uv")
    shutil.copy(EXAMPLES / "read.py", tmp_path)  # away from the clone
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    variables |= {"UV_FIND_LINKS": variables.get("PIP_FIND_LINKS", ""), "HF_HUB_OFFLINE": "1"}
    command = ["uv", "run", "read.py", str(EXAMPLES / "invoice.pdf"), "out", "--model", str(ROOT / "nano")]
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stderr[-4000:]
    markdown = (tmp_path / "out/invoice.pdf.md").read_text(encoding="utf-8")
    assert "Invoice A20471" in markdown and "Total 320.76" in markdown
