"""The day with a GPU: each case runs on the pretended device, and its lines become tables."""

import json
import sys

import pytest
import torch

from benchmarks import gpu_day
from tests.processes import run

COMMON = {"call": 2, "date": "2026-12-01", "rehearsed": False, "seconds": 9.5}
LINES = [
    {**COMMON, "case": "versions", "result": {"card": "NVIDIA H200, 570.1, 700 W"}},
    {**COMMON, "case": "gpu_tests", "result": {"summary": "== 11 passed in 60.1s =="}},
    {**COMMON, "case": "decode", "result": {"variants": {"hf_eager": {"step_ms": 25.0}, "ours": {"step_ms": 5.0}}}},
    {**COMMON, "case": "packed_fp8", "result": {"variants": {"packed, batch 1": {"step_ms": 4.0}}}},
    {**COMMON, "case": "packed_nvfp4", "error": "ended after 150 s"},
    {**COMMON, "case": "tower", "result": {"sdpa_ms": 99.0}},
    {**COMMON, "case": "tower", "result": {"sdpa_ms": 31.5, "many": [1, 2, 3, 4]}},
    {**COMMON, "case": "prompt", "error": "Traceback\nCUDA is out of memory"},
    {**COMMON, "case": "nano", "rehearsed": True, "result": {"equal": True}},
]


@pytest.fixture
def page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("Above.\n" + "".join(gpu_day.MARKS) + "Below.\n")
    return page


@pytest.fixture
def lines(tmp_path):
    lines = tmp_path / "gpu_day.jsonl"
    lines.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return lines


def test_every_line_becomes_a_table_and_a_case_that_did_not_end_is_named(tmp_path, lines, page):
    gpu_day.render(tmp_path / "absent.jsonl", {page: gpu_day.tables})
    assert "Nothing has been measured" in page.read_text()
    gpu_day.render(lines, {page: gpu_day.tables})
    text = page.read_text()
    assert "| sdpa_ms | 31.5 |" in text and "99.0" not in text and "CUDA is out of memory" in text
    assert "nano" not in text and text.startswith("Above.\n") and text.endswith("Below.\n") and "many" not in text
    page.write_text("No marks")
    with pytest.raises(ValueError, match="no place for the tables"):
        gpu_day.render(lines, {page: gpu_day.tables})


def test_the_readme_gets_a_row_of_tokens_a_second(lines, page):
    gpu_day.render(lines, {page: gpu_day.summary})
    gpu_day.render(lines, {page: gpu_day.summary})
    text = page.read_text()
    assert "| one sequence | 40 | 200 | 250 | not measured | not measured | not measured |" in text
    assert "On NVIDIA H200 (2026-12-01)" in text and text.count("11 passed in 60.1s") == 1


def test_both_pages_have_a_place_for_what_is_measured(tmp_path):
    """They are rendered from the stored lines, so rendering changes nothing."""
    pages = {gpu_day.PAGE: gpu_day.tables, gpu_day.README: gpu_day.summary}
    copies = {tmp_path / page.name: write for page, write in pages.items()}
    for page in pages:
        (tmp_path / page.name).write_text(page.read_text(encoding="utf-8"), encoding="utf-8")
    gpu_day.render(gpu_day.LINES, copies)
    for page in pages:
        assert (tmp_path / page.name).read_text(encoding="utf-8") == page.read_text(encoding="utf-8")


def test_a_case_that_hangs_or_fails_costs_itself_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_day, "CALLS", {1: [("tower", None, 5), ("nano", None, 5)]})
    ends = iter([{"error": "ended after 5 s"}, {"seconds": 1.0, "result": {}}])
    monkeypatch.setattr(gpu_day, "run_process", lambda *_: next(ends))
    found = gpu_day.run_call(1, False, tmp_path / "lines.jsonl")
    assert ["error" in line for line in found] == [True, False]
    assert len((tmp_path / "lines.jsonl").read_text().splitlines()) == 2
    monkeypatch.setattr(gpu_day, "SECONDS_PER_CALL", 0)
    assert all("not begun" in line["error"] for line in gpu_day.run_call(1, False, tmp_path / "lines.jsonl"))


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
def test_the_whole_day_runs_on_the_pretended_device(tmp_path):
    """So that the day itself costs minutes, and no mistake of a script."""
    run(sys.executable, "-m", "benchmarks.gpu_day", "--rehearse", "--out", tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "gpu_day.jsonl").read_text().splitlines()]
    assert {line["case"]: line.get("error") for line in lines} == dict.fromkeys(gpu_day.CASES)
    results = {line["case"]: line["result"] for line in lines}
    assert results["nano"]["equal"] and all(row["error"] < 1e-2 for row in results["attention"].values())
    for formats in results["packed_products"].values():
        assert all(found["error"] < 1e-2 for name, found in formats.items() if name.startswith("rows"))
