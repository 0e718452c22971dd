"""Programs with OpenAI's interface against `python -m tools.serve` on nano, by the lines of docs/clients.md as they
stand.

Each section of the manual is one script: its lines of Python, with the address of this server, have to print what the
manual says. docs/clients.md has the commands that install the programs:

    python -m pytest -q tests/test_openai_clients.py
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.served import serve
from tools import ROOT

pytestmark = pytest.mark.slow

MANUAL = ROOT / "docs/clients.md"
ADDRESS = "http://localhost:8000/v1"
PROGRAMS = {"docling": "docling", "LangChain": "langchain_openai", "LlamaIndex": "llama_index.llms.openai_like"}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of `tools.serve` with nano."""
    for client in serve(ROOT / "nano", tmp_path_factory.mktemp("serve") / "log.txt"):
        yield str(client.base_url).rstrip("/")


def needs(program: str) -> None:
    try:
        found = importlib.util.find_spec(PROGRAMS[program])
    except ModuleNotFoundError:
        found = None
    if found is None:
        pytest.skip(f"{program} is absent: {install_line(program)}")


def section(program: str) -> str:
    """Return what the manual has under `### program`."""
    text = MANUAL.read_text(encoding="utf-8")
    return re.split(r"^##", text.split(f"\n### {program} ", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def install_line(program: str) -> str:
    return re.search(r"^pip install [^#\n]*", section(program), re.MULTILINE).group().strip()


def run(command: list[str], address: str) -> subprocess.CompletedProcess:
    variables = {name: value for name, value in os.environ.items() if name != "OPENAI_API_KEY"}
    return subprocess.run(
        [part.replace(ADDRESS, address) for part in command],
        cwd=ROOT, env=variables, capture_output=True, text=True, timeout=900,
    )  # fmt: skip


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_lines_of_the_manual_print_what_it_says(program, address):
    needs(program)
    text = section(program)
    script = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    said = "".join(re.findall(r"```text\n(.*?)```", text, re.DOTALL))
    assert ADDRESS in script and said
    done = run([sys.executable, "-c", script], address)
    assert done.returncode == 0, done.stderr[-4000:]
    assert [line.rstrip() for line in done.stdout.splitlines()] == [line.rstrip() for line in said.splitlines()]


DOCLING = [sys.executable, "examples/clients/docling_markdown.py", "nano"]


def test_docling_converts_a_pdf_and_an_image_by_the_server(address):
    needs("docling")
    for document, options, lines in (
        ("examples/invoice.pdf", ["--concurrency", "6"], ["Invoice no. A20471", "Lamp 64.90", "Total 320.76"]),
        ("examples/receipt.png", [], ["Claisaid Tools", "Total 72.13"]),
    ):
        done = run([*DOCLING, document, "--server", ADDRESS, *options], address)
        assert done.returncode == 0, done.stderr[-4000:]
        assert set(lines) <= {line.strip() for line in done.stdout.splitlines()}


def test_docling_says_which_page_a_server_refused(address):
    needs("docling")
    done = run([*DOCLING, "examples/receipt.png", "--server", ADDRESS, "--server-model", "another"], address)
    assert done.returncode == 1 and "receipt.png, page 1: " in done.stderr and "another" in done.stderr


def test_docling_reads_the_tables_that_the_models_write():
    needs("docling")
    table = (
        r"\begin{tabular}{lr} Item & Price \\ \hline Vase \& jar & 64.94 \\ \multicolumn{2}{c}{End} \\ \end{tabular}"
    )
    script = """
import io, json, sys
sys.path.insert(0, "examples/clients")
from docling.datamodel.base_models import DocumentStream
from docling.document_converter import DocumentConverter
from docling_markdown import to_markdown

page = DocumentStream(name="page.md", stream=io.BytesIO(to_markdown(sys.argv[1]).encode()))
document = DocumentConverter(allowed_formats=["md"]).convert(page).document
tables = [[[cell.text for cell in row] for row in table.data.grid] for table in document.tables]
print(json.dumps([[text.text for text in document.texts], tables]))
"""
    done = run([sys.executable, "-c", script, f"Seller: Ann\nTotal: 64.94\n\n{table}"], ADDRESS)
    assert done.returncode == 0, done.stderr[-4000:]
    texts, (rows,) = json.loads(done.stdout)
    assert texts[0] == "Seller: Ann\nTotal: 64.94"
    assert rows == [["Item", "Price"], ["Vase & jar", "64.94"], ["End", "End"]]


def test_the_size_of_a_page_is_that_of_the_manual():
    """The options to copy are those of the adapter."""
    spec = importlib.util.spec_from_file_location("docling_markdown", ROOT / "examples/clients/docling_markdown.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    options = module.server_options(Path("nano"), ADDRESS, "nano")
    text = section("docling")
    for name in ("scale", "max_size", "timeout", "concurrency", "params"):
        assert re.search(rf"\b{name}={re.escape(json.dumps(options[name]))}", text), name
