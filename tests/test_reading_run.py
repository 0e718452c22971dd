"""A run over documents: its rows and files, what a bad file does, and that it goes on where it was stopped."""

import errno
import json
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from nemotron_vl.image_processing import V1_TILING
from nemotron_vl.reading.engines import InProcess
from nemotron_vl.reading.pages import KEYS, STATUSES, Answer, PageImage, Task
from nemotron_vl.reading.run import Run, read, write_file
from PIL import Image

fcntl = pytest.importorskip("fcntl", reason="processes are forked and killed")


class Pixel:
    """Answers with the colour of a page's first pixel, and counts its calls. A red page cannot be answered."""

    name = "pixel"
    tiling = V1_TILING
    page_prompt = "Which colour?"
    window, tokens_per_tile = 16384, 256

    def __init__(self, seconds: float = 0.0):
        self.seconds = seconds
        self.calls: list[int] = []

    def answer(self, images: list[PageImage], prompt: str, task: Task) -> list[Answer]:
        self.calls.append(len(images))
        time.sleep(self.seconds)
        colours = [page.image.getpixel((0, 0)) for page in images]
        if (255, 0, 0) in colours:
            raise RuntimeError("CUDA out of memory")
        return [Answer(f"{prompt} {colour}", 3, "cut off" if colour == (0, 255, 0) else "read") for colour in colours]


def draw(folder: Path, **colours: Any) -> Path:
    """Write one-page documents of one colour each, or of several pages with a list of colours."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, colour in colours.items():
        first, *others = [
            Image.new("RGB", (64, 64), one) for one in (colour if isinstance(colour, list) else [colour])
        ]
        more = {"save_all": True, "append_images": others} if others else {}
        first.save(folder / f"{name}.{'tif' if others else 'png'}", **more)
    return folder


def go(inputs: Path, out: Path | None, backend: Any = None, **options: Any) -> tuple[Run, list[dict]]:
    names = ("batch_size", "limit", "should_stop")
    of_run = {name: options.pop(name) for name in names if name in options}
    engine = InProcess(backend or Pixel(), of_run.pop("batch_size", 1))
    run = Run([inputs], engine, Task(**options), out, **of_run)
    return run, list(run)


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "pages.jsonl").read_text(encoding="utf-8").splitlines()]


# --- rows and files ---


def test_a_row_has_the_documented_keys_and_a_document_its_markdown(tmp_path):
    out = tmp_path / "out"
    run, rows = go(draw(tmp_path / "in" / "sub", a="blue").parent, out)
    assert rows == lines(out) and list(rows[0]) == list(KEYS)
    digest = rows[0].pop("sha256")
    assert len(digest) == 64 and rows[0].pop("seconds") >= 0
    assert rows == [
        {
            "file": str(tmp_path / "in" / "sub" / "a.png"), "page": 1, "prompt": "Which colour?",
            "answer": "Which colour? (0, 0, 255)", "tokens": 3, "tiles": 1, "model": "pixel", "status": "read",
            "error": None,
        }
    ]  # fmt: skip
    assert (out / "sub" / "a.png.md").read_text() == "Which colour? (0, 0, 255)\n"
    assert run.counts == {"read": 1} and run.num_read == 1


def test_markdown_says_which_page_is_which_and_what_is_wrong_with_it(tmp_path):
    out = tmp_path / "out"
    folder = draw(tmp_path / "in", a=["blue", (0, 255, 0), "red"])
    _, rows = go(folder, out)
    assert [(row["page"], row["status"]) for row in rows] == [(1, "read"), (2, "cut off"), (3, "failed")]
    assert (out / "a.tif.md").read_text() == (
        "<!-- page 1 -->\n\nWhich colour? (0, 0, 255)\n\n<!-- page 2: cut off -->\n\nWhich colour? (0, 255, 0)\n\n"
        "<!-- page 3: failed (CUDA out of memory) -->\n"
    )


def test_an_answer_with_a_latex_table_is_stored_as_it_is_and_written_as_markdown(tmp_path):
    class Table(Pixel):
        def answer(self, images, prompt, task):
            return [Answer(r"\begin{tabular}{ll} a & b \\ 1 & 2 \end{tabular}", 9)]

    folder, latex = draw(tmp_path / "in", a="blue"), r"\begin{tabular}{ll} a & b \\ 1 & 2 \end{tabular}"
    for number, (task, markdown) in enumerate(
        [({}, "| a | b |\n| --- | --- |\n| 1 | 2 |"), ({"ask": "What?"}, latex)]
    ):
        _, rows = go(folder, tmp_path / str(number), Table(), **task)
        assert rows[0]["answer"] == latex
        assert (tmp_path / str(number) / "a.png.md").read_text() == markdown + "\n"


def test_rows_without_a_folder_are_given_and_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    rows = read(draw(tmp_path / "in", a="blue", b="white"), InProcess(Pixel()), ask="What?")
    assert [row["answer"] for row in rows] == ["What? (0, 0, 255)", "What? (255, 255, 255)"]
    assert list((tmp_path / "temporary").iterdir()) == []


def test_unicode_spaces_and_bytes_that_are_no_text_in_names(tmp_path):
    folder, out = draw(tmp_path / "my ünï", **{"a b ✓": "blue"}), tmp_path / "out put"
    strange = os.fsencode(folder) + b"/\xff\xfe.png"
    with open(strange, "wb") as file:
        Image.new("RGB", (64, 64), "white").save(file, "png")
    go(folder, out)
    assert {row["file"] for row in lines(out)} == {str(folder / "a b ✓.png"), os.fsdecode(strange)}
    assert (out / "a b ✓.png.md").exists() and os.path.exists(os.fsencode(out) + b"/\xff\xfe.png.md")
    assert go(folder, out)[1] == []


def test_a_line_break_of_unicode_in_an_answer_breaks_no_line(tmp_path):
    class Breaks(Pixel):
        def answer(self, images, prompt, task):
            return [Answer("a\u2028b\x85c\nd\r", 1)]

    go(draw(tmp_path / "in", a="blue"), tmp_path / "out", Breaks())
    assert lines(tmp_path / "out")[0]["answer"] == "a\u2028b\x85c\nd\r"


def test_rows_make_a_data_frame(tmp_path):
    pandas = pytest.importorskip("pandas", reason="pip install pandas")
    go(draw(tmp_path / "in", a="blue", b="red"), tmp_path / "out")
    frame = pandas.read_json(tmp_path / "out" / "pages.jsonl", lines=True)
    assert list(frame.columns) == list(KEYS) and list(frame.status) == ["read", "failed"]
    assert list(pandas.DataFrame(lines(tmp_path / "out")).page) == [1, 1]


# --- what is bad spoils nothing else ---


def test_a_bad_document_is_a_failed_row_and_the_others_are_read(tmp_path):
    folder = draw(tmp_path / "in", a="blue", c="white")
    (folder / "b.png").write_bytes(b"no image")
    (folder / "empty.pdf").write_bytes(b"")
    (folder / "gone.png").symlink_to(folder / "absent")
    run, rows = go(folder, tmp_path / "out")
    assert {Path(row["file"]).name: row["status"] for row in rows} == {
        "a.png": "read", "b.png": "failed", "c.png": "read", "empty.pdf": "failed", "gone.png": "failed",
    }  # fmt: skip
    assert all(
        row["error"] and row["page"] is None and row["answer"] is None for row in rows if row["status"] == "failed"
    )
    assert run.counts == {"read": 2, "failed": 3}
    assert "<!-- document: failed (" in (tmp_path / "out" / "b.png.md").read_text()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_an_unreadable_document_is_a_failed_row(tmp_path):
    folder = draw(tmp_path / "in", a="blue")
    (folder / "a.png").chmod(0)
    (row,) = go(folder, None)[1]
    assert row["status"] == "failed" and "Permission denied" in row["error"]


def test_documents_that_vanish_while_they_are_read_are_failed_rows(tmp_path):
    folder = draw(tmp_path / "in", a=["blue", "white", "black"], b="blue", c="white")

    class Vanishing(Pixel):
        def answer(self, images, prompt, task):
            (folder / "b.png").unlink(missing_ok=True)
            return super().answer(images, prompt, task)

    _, rows = go(folder, None, Vanishing())
    assert [row["status"] for row in rows] == ["read", "read", "read", "failed", "read"]
    assert "b.png" in rows[3]["error"]


def test_a_page_that_fails_in_a_batch_spoils_no_other(tmp_path):
    backend = Pixel()
    folder = draw(tmp_path / "in", a="blue", b="red", c="white", d="black", e="grey")
    _, rows = go(folder, None, backend, batch_size=3)
    assert [row["status"] for row in rows] == ["read", "failed", "read", "read", "read"]
    assert backend.calls == [3, 1, 1, 1, 2]  # a batch that fails, its pages one by one, and the next batch


def test_a_bug_is_no_failed_page(tmp_path):
    class Broken(Pixel):
        def answer(self, images, prompt, task):
            raise KeyError("a bug")

    with pytest.raises(KeyError):
        go(draw(tmp_path / "in", a="blue"), tmp_path / "out", Broken())


# --- going on ---


def test_a_repeated_run_reads_nothing_again_and_what_is_new(tmp_path):
    folder, out, backend = draw(tmp_path / "in", a="blue", b=["white", "black"]), tmp_path / "out", Pixel()
    go(folder, out, backend)
    before = lines(out)
    run, rows = go(folder, out, backend)
    assert rows == [] and lines(out) == before and run.counts == {"read": 3}
    draw(folder, c="grey")
    assert [row["file"][-5:] for row in go(folder, out, backend)[1]] == ["c.png"] and len(backend.calls) == 4


def test_what_failed_is_tried_again(tmp_path):
    folder, out = draw(tmp_path / "in", a="red", b="blue"), tmp_path / "out"
    (folder / "c.png").write_bytes(b"no image yet")
    go(folder, out)
    draw(folder, c="white")
    run, rows = go(folder, out)
    assert [(row["file"][-5:], row["status"]) for row in rows] == [("a.png", "failed"), ("c.png", "read")]
    assert sorted(row["file"][-5:] for row in lines(out)) == ["a.png", "b.png", "c.png"]
    assert run.counts == {"read": 2, "failed": 1}
    assert "255" in (out / "c.png.md").read_text()


def test_a_document_with_new_content_is_read_again_and_its_old_rows_go(tmp_path):
    folder, out = draw(tmp_path / "in", a=["blue", "white", "black"], b="blue"), tmp_path / "out"
    go(folder, out)
    draw(folder, a=["grey", "black"])
    assert len(go(folder, out)[1]) == 2
    assert len(lines(out)) == 6  # the old lines go when the next run begins
    assert go(folder, out)[1] == []
    assert [(row["file"][-5:], row["page"], row["answer"][-7:]) for row in lines(out)] == [
        ("b.png", 1, "0, 255)"), ("a.tif", 1, "8, 128)"), ("a.tif", 2, "0, 0, 0)"[-7:]),
    ]  # fmt: skip
    assert (out / "a.tif.md").read_text().count("page") == 2


def test_limit_and_pages_choose_what_a_run_reads_and_another_goes_on(tmp_path):
    folder, out = draw(tmp_path / "in", a=["blue", "white", "black"], b=["blue", "grey"]), tmp_path / "out"
    assert len(go(folder, out, limit=0)[1]) == 0
    assert [row["page"] for row in go(folder, out, pages="2")[1]] == [2, 2]
    assert [row["page"] for row in go(folder, out, limit=2)[1]] == [1, 3]
    assert [row["page"] for row in go(folder, out)[1]] == [1]
    assert (out / "a.tif.md").read_text().index("page 2") < (out / "a.tif.md").read_text().index("page 3")


def test_a_wish_to_stop_finishes_the_pages_in_flight(tmp_path):
    folder, out = draw(tmp_path / "in", a=["blue", "white", "black", "grey"]), tmp_path / "out"
    backend = Pixel()
    _, rows = go(folder, out, backend, batch_size=2, should_stop=lambda: len(backend.calls) > 0)
    assert len(rows) == 2 and "page 2" in (out / "a.tif.md").read_text()
    assert len(go(folder, out, batch_size=2)[1]) == 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"ask": "What?"}, "ask was None and is now 'What\\?'"),
        ({"max_num_tiles": 4}, "max_num_tiles was None and is now 4"),
        ({"max_new_tokens": 5}, "max_new_tokens was 4096 and is now 5"),
    ],
)
def test_other_settings_for_the_same_folder_are_refused(tmp_path, change, says):
    folder, out = draw(tmp_path / "in", a="blue"), tmp_path / "out"
    go(folder, out)
    before = lines(out)
    with pytest.raises(ValueError, match=says):
        go(folder, out, **change)
    assert lines(out) == before


def test_another_model_for_the_same_folder_is_refused(tmp_path):
    folder, out = draw(tmp_path / "in", a="blue"), tmp_path / "out"
    list(Run([folder], InProcess(Pixel(), weights="one"), Task(), out))
    with pytest.raises(ValueError, match="weights was 'one' and is now 'two'"):
        list(Run([folder], InProcess(Pixel(), weights="two"), Task(), out))


def test_a_half_written_last_line_is_repaired(tmp_path):
    folder, out = draw(tmp_path / "in", a=["blue", "white", "black"]), tmp_path / "out"
    go(folder, out)
    whole = (out / "pages.jsonl").read_bytes()
    first = whole.index(b"\n") + 1
    for cut in (0, 1, first - 1, first, first + 1, first + 20, len(whole) - 1):
        (out / "pages.jsonl").write_bytes(whole[:cut])
        (out / "a.tif.md").unlink(missing_ok=True)
        go(folder, out)
        assert [row["page"] for row in lines(out)] == [1, 2, 3], cut
        assert "page 3" in (out / "a.tif.md").read_text()


def test_damage_that_no_kill_leaves_is_named_and_left_alone(tmp_path):
    folder, out = draw(tmp_path / "in", a=["blue", "white"]), tmp_path / "out"
    go(folder, out)
    for file, damage, says in [
        ("pages.jsonl", "{}\n", "Line 1 of .*pages.jsonl is damaged"),
        ("run.json", "{", "run.json is damaged"),
        ("run.json", None, "no run.json, so nothing says how"),
    ]:
        (out / file).unlink() if damage is None else (out / file).write_text(damage)
        with pytest.raises(ValueError, match=says):
            go(folder, out)


def test_equal_documents_are_read_once_and_have_rows_of_their_own(tmp_path):
    folder, out, backend = draw(tmp_path / "in", a="blue", b="white", c="blue"), tmp_path / "out", Pixel()
    (folder / "d.png").symlink_to(folder / "a.png")
    run, rows = go(folder, out, backend)
    assert len(backend.calls) == 2 and run.counts == {"read": 4} and run.num_read == 2
    by_name = {row["file"][-5:]: row for row in rows}
    assert by_name["c.png"]["answer"] == by_name["d.png"]["answer"] == by_name["a.png"]["answer"]
    assert by_name["c.png"]["seconds"] == 0 and (out / "d.png.md").exists()
    assert go(folder, out, backend)[1] == []
    (folder / "a.png").unlink()
    assert [row["status"] for row in go(folder, out, backend)[1]] == ["failed"]  # d.png leads nowhere now
    assert len(backend.calls) == 2


def test_an_output_that_another_document_or_person_wrote_is_not_overwritten(tmp_path):
    first, second = draw(tmp_path / "x", a="blue"), draw(tmp_path / "y", a="white")
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.png.md").write_text("mine")
    go(first, out)
    go(second, out)
    go(first, out)
    assert (out / "a.png.md").read_text() == "mine"
    assert "0, 0, 255" in (out / "x" / "a.png.md").read_text() and "255, 255" in (out / "y" / "a.png.md").read_text()


# --- processes that die, and two at once ---


def in_a_child(work: Any) -> int:
    """Fork; the child does `work` and ends with status 0, or 1 after an error that is no kill."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:  # also pytest's own; the child must not return to the tests
            print(repr(error), file=sys.stderr)
            os._exit(1)
    return pid


def test_runs_that_are_killed_lose_no_page_and_read_none_twice(tmp_path):
    """SIGKILL at random moments, over rows, repairs, Markdown and the rewriting of pages that failed."""
    colours = [(level, level, 7) for level in range(0, 240, 6)]
    folder, out = draw(tmp_path / "in", a=colours[:14], b=colours[14:15], c=colours[15:]), tmp_path / "out"
    (folder / "bad.png").write_bytes(b"no image")
    moments = random.Random(20)
    kills = 0
    for _ in range(200):
        pid = in_a_child(lambda: go(folder, out, Pixel(0.001), batch_size=2))
        time.sleep(moments.uniform(0, 0.08))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        kills += os.WIFSIGNALED(status)
        pages = [(row["file"], row["page"]) for row in whole_lines(out)]
        assert len(set(pages)) == len(pages)
        if kills == 20:
            break
    assert kills == 20
    go(folder, out)
    pages = [(row["file"][-5:], row["page"], row["answer"]) for row in lines(out) if row["status"] == "read"]
    assert len(pages) == len(set(pages)) == len(colours) and len(lines(out)) == len(colours) + 1
    for name, first, last in (("a.tif", 0, 14), ("c.tif", 15, 40)):
        answers = [answer for file, _, answer in sorted(pages) if file == name]
        assert answers == [f"Which colour? {colour}" for colour in colours[first:last]]
        assert (out / f"{name}.md").read_text().count("Which colour?") == last - first
    assert sorted(file.name for file in out.iterdir() if not file.name.startswith(".")) == [
        "a.tif.md", "b.png.md", "bad.png.md", "c.tif.md", "pages.jsonl", "run.json",
    ]  # fmt: skip


def whole_lines(out: Path) -> list[dict]:
    text = (out / "pages.jsonl").read_bytes() if (out / "pages.jsonl").exists() else b""
    return [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]


def test_a_second_run_on_one_folder_at_once_is_refused_and_a_dead_one_holds_nothing(tmp_path):
    folder, out = draw(tmp_path / "in", a="blue", b="white"), tmp_path / "out"
    pid = in_a_child(lambda: go(folder, out, Pixel(60)))
    while not (out / "pages.jsonl").exists():
        time.sleep(0.01)
    with pytest.raises(ValueError, match="Another run is writing into"):
        go(folder, out)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert len(go(folder, out)[1]) == 2


def test_two_runs_in_one_process_do_not_share_a_folder(tmp_path):
    folder, out = draw(tmp_path / "in", a="blue", b="white"), tmp_path / "out"
    rows = iter(Run([folder], InProcess(Pixel()), Task(), out))
    next(rows)
    with pytest.raises(ValueError, match="Another run is writing into"):
        go(folder, out)
    rows.close()
    assert len(go(folder, out)[1]) == 1


def test_a_full_disk_stops_the_run_with_its_reason_and_the_next_one_goes_on(tmp_path):
    folder, out = draw(tmp_path / "in", **{f"d{number:02}": (number, 0, 0) for number in range(20)}), tmp_path / "out"

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))  # of each file; Python ignores the signal
        try:
            go(folder, out)
        except OSError as error:
            os._exit(7 if error.errno in (errno.EFBIG, errno.ENOSPC) else 8)

    _, status = os.waitpid(in_a_child(fill), 0)
    assert os.WEXITSTATUS(status) == 7
    assert len(whole_lines(out)) < 10
    go(folder, out)
    assert len({row["file"] for row in lines(out)}) == len(lines(out)) == 20
    assert len(list(out.glob("*.md"))) == 20


def test_a_file_is_replaced_at_once_or_not_at_all(tmp_path, monkeypatch):
    write_file(tmp_path / "a" / "b.md", "old")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_file(tmp_path / "a" / "b.md", "new")
    assert [file.read_text() for file in (tmp_path / "a").iterdir()] == ["old"]


def test_the_pages_left_are_estimated_from_the_documents_so_far(tmp_path):
    folder = draw(tmp_path / "in", a=["blue", "white", "black"], b="blue", c="grey")
    run = Run([folder], InProcess(Pixel()), Task())
    assert run.num_pages == 3
    assert [run.num_pages for _ in run] == [9, 9, 9, 6, 5]


# --- fields ---

SCHEMA = {
    "type": "object",
    "properties": {"total": {"type": "number"}, "date": {"type": "string"}},
    "required": ["total"],
}


class Fields(Pixel):
    """Reads the blue value of a page as its total, and the red one as its date; black has neither."""

    def answer(self, images, prompt, task):
        super().answer(images, prompt, task)
        answers = []
        for page in images:
            red, _, blue = page.image.getpixel((0, 0))
            fields = {"total": blue or None, "date": str(red) if red else None}
            more = {"fields": fields, "confidence": {"total": 0.5, "date": 0.25}}
            answers.append(Answer(json.dumps(fields), 9, "read", more))
        return answers


def test_fields_of_all_pages_make_one_object_with_the_page_of_each_value(tmp_path):
    pytest.importorskip("jsonschema", reason="pip install jsonschema")
    folder, out = draw(tmp_path / "in", a=["black", (7, 0, 0), "black", (0, 0, 9)]), tmp_path / "out"
    run, rows = go(folder, out, Fields(), schema=SCHEMA)
    assert [list(row) for row in rows] == [[*KEYS, "fields", "confidence"]] * 4 and rows[0]["prompt"] is None
    found = json.loads((out / "a.tif.json").read_text())
    assert found["fields"] == {"total": 9, "date": "7"} and found["error"] is None and run.invalid == set()
    assert found["values"]["total"] == {"value": 9, "confidence": 0.5, "page": 4}
    assert found["values"]["date"] == {"value": "7", "confidence": 0.25, "page": 2}


def test_a_document_without_a_valid_object_says_why_and_is_counted(tmp_path):
    pytest.importorskip("jsonschema", reason="pip install jsonschema")
    folder, out = draw(tmp_path / "in", a="black", b=["black", (0, 0, 9)], c=(255, 0, 0)), tmp_path / "out"
    run, _ = go(folder, out, Fields(), schema=SCHEMA, limit=2)
    assert {Path(file).name for file in run.invalid} == {"a.png", "b.tif"}
    run, _ = go(folder, out, Fields(), schema=SCHEMA)
    assert {Path(file).name for file in run.invalid} == {"c.png"}
    documents = [json.loads((out / f"{name}.json").read_text()) for name in ("a.png", "b.tif", "c.png")]
    assert [document["fields"] for document in documents] == [None, {"total": 9}, None]
    assert "total" in documents[0]["error"] and documents[2]["error"] == "page 1: CUDA out of memory"


# --- tasks ---


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ask": "a", "schema": {}, "prompt": "b"}, "ask and prompt ask for different things"),
        ({"ask": "a", "text_layer": True}, "ask and text_layer"),
        ({"ask": " "}, "ask must be a text that is not empty"),
        ({"max_new_tokens": 0}, "at least 1"),
    ],
)
def test_contradictions_of_a_task_are_named(options, says):
    with pytest.raises(ValueError, match=says):
        Task(**options)


def test_a_password_is_neither_shown_nor_stored(tmp_path):
    assert "secret" not in repr(Task(password="secret"))
    go(draw(tmp_path / "in", a="blue"), tmp_path / "out", password="secret")
    assert not [file for file in (tmp_path / "out").iterdir() if b"secret" in file.read_bytes()]


def test_every_status_is_documented():
    page = (Path(__file__).parents[1] / "docs" / "reading.md").read_text(encoding="utf-8")
    assert all(f"`{status}`" in page for status in STATUSES) and all(f"`{key}`" in page for key in KEYS)
