"""The engines give the same text: in this process, by servers, and by workers of Ray; and the command that runs them."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from nemotron_vl.reading.engines import VLLM, ChatServer, InProcess, RayWorkers, Server, Transformers, fingerprint
from nemotron_vl.reading.pages import PAGE_PROMPT, Task
from nemotron_vl.reading.run import Run, read
from PIL import Image

from documents.contents import make_page
from documents.distance import edit_distance
from documents.drawing import draw_page
from documents.pages import Page
from tools import ROOT
from tools import read as command
from tools.chat import load

NANO = ROOT / "nano"
RECEIPT = ROOT / "examples" / "receipt.png"
TOTAL = "What is the total?"
KINDS = ("receipt", "invoice", "form", "letter")


@pytest.fixture(scope="module")
def nano() -> Transformers:
    return Transformers(*load(NANO), "nano")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four drawn documents."""
    return draw_documents(tmp_path_factory.mktemp("documents"), 4)


def draw_documents(folder: Path, number: int) -> Path:
    for seed in range(number):
        page = drawn(seed)
        draw_page(page, seed, "heldout").save(folder / f"{seed:03} {page.kind}.png")
    return folder


def drawn(seed: int) -> Page:
    return make_page(seed, "heldout", KINDS[seed % len(KINDS)])


def answers(rows: list[dict]) -> dict[str, str]:
    assert {row["status"] for row in rows} == {"read"}, rows
    return {row["file"]: row["answer"] for row in rows}


# --- in this process ---


def test_a_page_is_answered_as_chat_answers(nano):
    features = nano.processor.image_processor(Image.open(RECEIPT).convert("RGB"), return_tensors="pt")
    options = {"max_new_tokens": 200, "do_sample": False}
    for question, asked in [(TOTAL, {"ask": TOTAL}), ("Transcribe the page.", {})]:
        (row,) = read(RECEIPT, InProcess(nano), **asked)
        asked = {"question": question, "generation_config": options, "return_dict": True}
        said = nano.model.chat(nano.processor, **asked, **features)
        assert (row["answer"], row["prompt"], row["status"], row["model"]) == (said.text, question, "read", "nano")
        assert (row["tokens"], row["tiles"]) == (len(said.token_ids) + 1, 2)  # and the end token


def test_a_batch_answers_as_single_pages_do(nano, folder):
    alone, batch = (answers(read(folder, InProcess(nano, size), ask=TOTAL)) for size in (1, 3))
    assert alone == batch and len(alone) == 4


def test_a_path_loads_the_checkpoint():
    (row,) = read(RECEIPT, NANO, ask=TOTAL)
    assert (row["answer"], row["model"]) == ("72.13", "nano")


def test_an_answer_without_an_end_is_cut_off(nano):
    (row,) = read(RECEIPT, InProcess(nano), max_new_tokens=5)
    assert (row["status"], row["tokens"]) == ("cut off", 5) and row["answer"] == "Clais"


def test_an_endless_answer_is_looped_and_keeps_what_it_said(model, processor):
    looping = Looping(Transformers(model, processor, "tiny"))
    (row,) = read(RECEIPT, InProcess(looping), max_new_tokens=600)
    assert row["status"] == "looped" and 200 < row["tokens"] < 300 and set(row["answer"]) == {"a"}
    (row,) = read(RECEIPT, InProcess(looping), max_new_tokens=300, stop_loops=False)
    assert (row["status"], row["tokens"]) == ("cut off", 300)


class Looping:
    """A backend whose model says nothing but the letter a."""

    def __init__(self, backend: Transformers):
        self.backend = backend
        self.name, self.tiling, self.page_prompt = backend.name, backend.tiling, backend.page_prompt
        self.window, self.tokens_per_tile = backend.window, backend.tokens_per_tile

    def answer(self, images, prompt, task):
        letter = self.backend.processor.tokenizer.encode("a", add_special_tokens=False)[0]

        def only_a(module, inputs, output):
            output.logits[:] = -torch.inf
            output.logits[..., letter] = 0.0

        hook = self.backend.model.register_forward_hook(only_a)
        try:
            return self.backend.answer(images, prompt, task)
        finally:
            hook.remove()


def test_a_page_that_fills_the_context_is_a_failed_page_with_both_numbers(nano, monkeypatch):
    monkeypatch.setattr(nano, "window", 200)
    (row,) = read(RECEIPT, InProcess(nano))
    assert row["status"] == "failed" and "context" in row["error"] and "200" in row["error"]


def test_a_checkpoint_without_words_of_its_own_gets_ours(model, processor):
    assert Transformers(model, processor, "tiny").page_prompt == PAGE_PROMPT
    assert Transformers(model, processor).name  # the last part of its path


def test_the_fingerprint_tells_checkpoints_apart(tiny_checkpoint, tmp_path):
    assert fingerprint(tiny_checkpoint) == fingerprint(tiny_checkpoint) != fingerprint(NANO)


def test_max_num_tiles_limits_the_tiles_of_a_page(model, processor, tmp_path):
    Image.effect_noise((400, 600), 50).convert("RGB").save(tmp_path / "page.png")
    engine = InProcess(Transformers(model, processor, "tiny"))
    many, few = (read(tmp_path, engine, max_new_tokens=1, max_num_tiles=number)[0]["tiles"] for number in (None, 2))
    assert many > few == 3  # two and the thumbnail


# --- the command ---


def call(*arguments: str | Path, **options) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = [sys.executable, "-m", "tools.read"]
    return subprocess.run([*start, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, **options)


def test_the_command_reads_a_folder_and_says_how_many_failed(folder, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "receipt.png").write_bytes(RECEIPT.read_bytes())
    out = tmp_path / "out"
    assert command.main([str(tmp_path / "in"), "--out", str(out), "--ask", TOTAL]) == 0
    said = capsys.readouterr()
    assert (
        said.out.startswith("1 document, 1 page: 1 read, 0 failed. 1 page of this run") and "Reading" not in said.err
    )
    (tmp_path / "in" / "bad.png").write_bytes(b"bad")
    (tmp_path / "in" / "notes.txt").write_bytes(b"bad")
    assert command.main([str(tmp_path / "in"), "--out", str(out), "--ask", TOTAL]) == command.SOME_FAILED
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("2 documents, 2 pages: 1 read, 1 failed. 1 other file left out. 1 page of this run")
    assert (out / "receipt.png.md").read_text() == "72.13\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nosuch", "--out", "out"], "nosuch does not exist"),
        ([str(RECEIPT), "--out", "README.md"], "README.md is a file"),
        ([str(RECEIPT), "--out", "out", "--model", "nosuch"], "nosuch does not exist"),
        ([str(RECEIPT), "--out", "out", "--batch-size", "0"], "batch_size must be at least 1"),
        ([str(RECEIPT), "--out", "out", "--ask", "a", "--prompt", "b"], "ask and prompt"),
    ],
)
def test_a_mistake_is_said_before_anything_is_written(arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("a file")
    with pytest.raises(ValueError, match=says):
        command.main(arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_packages_that_are_missing_are_named_with_their_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match="pip install openai"):
        ChatServer("http://127.0.0.1:9/v1", NANO)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'ray\[data\]'"):
        RayWorkers(NANO)


def test_progress_on_a_terminal_says_pages_a_minute_and_what_is_left(nano, folder, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(command, "progress", lambda **options: original(mininterval=0, **options))
    command.show_progress(Run([folder], InProcess(nano), Task(ask=TOTAL)))
    said = capsys.readouterr().err
    assert "4/4 pages" in said and " a minute" in said and "[00:" in said


original = command.progress


@pytest.mark.slow
def test_ctrl_c_finishes_the_page_in_flight_and_the_same_command_goes_on(tmp_path):
    (tmp_path / "in").mkdir()
    number_of_documents = 16  # more than are read before the signal comes
    folder, out = draw_documents(tmp_path / "in", number_of_documents), tmp_path / "out"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = [sys.executable, "-m", "tools.read", str(folder), "--out", str(out)]
    for number in (signal.SIGINT, signal.SIGTERM):
        process = subprocess.Popen(
            start, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        rows_before = num_rows(out)
        while num_rows(out) == rows_before:
            time.sleep(0.01)
        process.send_signal(number)
        said, errors = process.communicate(timeout=120)
        assert process.returncode == 130, errors
        assert "Finishing the page in flight" in errors and "Traceback" not in errors
        assert said.startswith(f"{number_of_documents} documents, ") and num_rows(out) < number_of_documents
    assert call(folder, "--out", out).returncode == 0 and num_rows(out) == number_of_documents


def num_rows(out: Path) -> int:
    return (out / "pages.jsonl").read_bytes().count(b"\n") if (out / "pages.jsonl").exists() else 0


@pytest.mark.slow
def test_a_command_that_is_killed_goes_on(nano, folder, tmp_path):
    out = tmp_path / "out"
    for rows in (1, 2, 3):
        process = subprocess.Popen([sys.executable, "-m", "tools.read", str(folder), "--out", str(out)], cwd=ROOT)
        while num_rows(out) < rows:
            time.sleep(0.01)
        process.kill()
        process.wait()
    assert call(folder, "--out", out).returncode == 0
    rows = [json.loads(line) for line in (out / "pages.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 4 and answers(rows) == answers(read(folder, InProcess(nano)))


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the memory of a process is read from /proc")
def test_many_documents_are_read_as_single_calls_read_them_and_in_flat_memory(nano, tmp_path):
    (tmp_path / "in").mkdir()
    number, out = 24, tmp_path / "out"
    folder = draw_documents(tmp_path / "in", number)
    process = subprocess.Popen(
        [sys.executable, "-m", "tools.read", str(folder), "--out", str(out)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    memory = {}  # MB, by the number of pages that were read
    while process.poll() is None:
        with contextlib.suppress(OSError, IndexError):  # the process may end in between
            status = Path(f"/proc/{process.pid}/status").read_text()
            memory[num_rows(out)] = int(status.split("VmRSS:")[1].split()[0]) / 1000
        time.sleep(0.02)
    assert process.returncode == 0
    rows = [json.loads(line) for line in (out / "pages.jsonl").read_text(encoding="utf-8").splitlines()]
    read_here = {row["file"]: row["answer"] for row in rows if row["status"] in ("read", "looped")}
    single = {
        str(path): nano.model.chat(
            nano.processor,
            question="Transcribe the page.",
            generation_config={"max_new_tokens": 400, "do_sample": False},
            stop_loops=True,
            **nano.processor.image_processor(Image.open(path), return_tensors="pt"),
        )
        for path in sorted(folder.iterdir())
    }
    assert read_here == single
    texts = [drawn(seed).text for seed in range(number)]
    errors = sum(map(edit_distance, single.values(), texts)) / sum(map(len, texts))
    assert errors < 0.4  # equal answers that read nothing would show nothing
    early = max(megabytes for pages, megabytes in memory.items() if number // 8 <= pages <= number // 2)
    late = max(megabytes for pages, megabytes in memory.items() if number // 2 < pages < number)
    assert late < early + 20, memory


# --- servers ---


@pytest.mark.slow
def test_our_server_gives_the_same_text(nano, folder, tmp_path):
    pytest.importorskip("openai", reason="pip install openai")
    from tests.served import serve

    here = answers(read(folder, InProcess(nano)))
    served = serve(NANO, tmp_path / "log.txt")
    try:
        url = str(next(served).base_url)
        assert answers(read(folder, Server(ChatServer(url, NANO), 3), max_new_tokens=1000)) == here
        there, alone = Server(ChatServer(url, NANO)), InProcess(nano)
        (sure,), (expected,) = (read(RECEIPT, engine, ask=TOTAL, confidence=True) for engine in (there, alone))
        assert (sure["answer"], sure["tokens"]) == (expected["answer"], expected["tokens"])
        assert sure["confidence"] == pytest.approx(expected["confidence"], rel=1e-4)
        schema = {"type": "object", "properties": {"total": {"type": "number"}, "date": {"type": "string"}}}
        (row,), (expected,) = (read(RECEIPT, engine, schema=schema) for engine in (there, alone))
        assert row["fields"] == expected["fields"] and row["fields"]["total"] == 72.13
        done = call(folder, "--out", tmp_path / "out", "--server", url, "--ask", TOTAL, "--max-num-tiles", "1")
        assert done.returncode == 0, done.stderr
        (row,) = read(RECEIPT, Server(ChatServer(url, NANO, "nano")), max_new_tokens=5)
        assert (row["status"], row["tokens"]) == ("cut off", 5)
        with pytest.raises(ValueError, match="has no model 'other', but nano"):
            ChatServer(url, NANO, "other")
    finally:
        served.close()
    done = call(folder, "--out", tmp_path / "out", "--server", url, "--ask", TOTAL, "--max-num-tiles", "1")
    assert done.returncode == 2 and "does not answer" in done.stderr and "Traceback" not in done.stderr


# --- vLLM ---


def test_the_token_that_ends_an_answer_is_no_part_of_its_confidence(nano):
    tokens = [SimpleNamespace(logprob=math.log(0.5)), SimpleNamespace(logprob=math.log(0.1))]
    output = SimpleNamespace(text="7", token_ids=[3, 4], logprobs=[{3: tokens[0]}, {4: tokens[1]}])
    backend = SimpleNamespace(processor=nano.processor, temperature=1.0)
    for output.finish_reason, confidence in (("stop", 0.5), ("length", 0.05)):
        answer = VLLM._answer_of(backend, output, Task(confidence=True))
        assert answer.more["confidence"] == pytest.approx(confidence)


VLLM_RUN = """
import json, os, sys
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
sys.path.insert(0, sys.argv[1])
import tools
from nemotron_vl.reading import InProcess, read
from tests.vllm_generate import keep_float32
keep_float32()
options = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 2, "max_model_len": 2048}
engine = InProcess.load(sys.argv[2], 3, use_vllm=True, **options)
rows = [read(sys.argv[3], engine, max_new_tokens=400), read(sys.argv[3], engine, ask=sys.argv[4], confidence=True)]
json.dump(rows, open(sys.argv[5], "w"))
"""


@pytest.mark.slow
def test_vllm_gives_the_same_text(nano, folder, tmp_path):
    """Images of the size of two tiles, which both cut to the same pixels if ours are not doubled: vLLM never doubles."""
    python = os.environ.get("NEMOTRON_VL_VLLM")
    if not python:
        pytest.skip("NEMOTRON_VL_VLLM names no python with vLLM; tests/vllm_environment.sh makes one")
    from tests.test_vllm import pad_heads

    checkpoint, pages = tmp_path / "nano", tmp_path / "pages"
    nano.model.save_pretrained(checkpoint)
    nano.processor.save_pretrained(checkpoint)
    pad_heads(checkpoint)
    pages.mkdir()
    for file in folder.iterdir():
        Image.open(file).convert("RGB").resize((512, 1024)).save(pages / file.name)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    command = [python, "-c", VLLM_RUN, ROOT, checkpoint, pages, TOTAL, tmp_path / "rows.json"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    read_there, asked_there = json.loads((tmp_path / "rows.json").read_text())
    processor = load(NANO)[1]
    processor.image_processor.upscale = 1
    here = InProcess(Transformers(nano.model, processor, "nano"))
    asked_here = read(pages, here, ask=TOTAL, confidence=True)
    assert answers(read_there) == answers(read(pages, here, max_new_tokens=400))
    assert answers(asked_there) == answers(asked_here)
    for there, here in zip(asked_there, asked_here, strict=True):
        assert there["tokens"] == here["tokens"]
        assert there["confidence"] == pytest.approx(here["confidence"], abs=1e-3)


# --- Ray ---


def descendants(pid: int) -> list[int]:
    """The processes that a process started, and those that they started."""
    parents = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(file.parent.name)] = int(file.read_text().rpartition(")")[2].split()[1])
    children = [child for child, parent in parents.items() if parent == pid]
    return [*children, *(further for child in children for further in descendants(child))]


def command_line(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


@pytest.mark.slow
@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="Ray does not depend on the version; a minute")
def test_ray_gives_the_same_text_although_a_worker_is_killed(nano, tmp_path):
    ray = pytest.importorskip("ray", reason="pip install 'ray[data]'")
    folder = draw_documents(tmp_path, 12)
    (folder / "bad.png").write_bytes(b"no image")
    here = {row["file"]: row["answer"] for row in read(folder, InProcess(nano))}
    killed, rows = [], []
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
    try:
        engine = RayWorkers(NANO, workers=2)
        for row in Run([folder], engine, Task(), tmp_path / "out"):
            rows.append(row)
            if len(rows) == 2:
                workers = [pid for pid in descendants(os.getpid()) if b"ray::MapWorker" in command_line(pid)]
                os.kill(workers[0], signal.SIGKILL)
                killed = workers
    finally:
        ray.shutdown()
    assert len(killed) == 2 and len(rows) == 13
    assert {row["file"]: row["answer"] for row in rows} == here
    assert [row["file"] for row in rows if row["status"] == "failed"] == [str(folder / "bad.png")]
    assert list(Run([folder], InProcess(nano, weights=fingerprint(NANO)), Task(), tmp_path / "out"))[0][
        "file"
    ].endswith("bad.png")
