"""`evaluation.score`: the official rules, the kept answers, the prompts and the table.

The tests that need lmms-eval skip without it; docs/evaluation.md has its installation, and the slow test at the end
makes that installation anew.
"""

import copy
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import transformers
from PIL import Image

from evaluation.answers import AnswerFile, prompt_digest, read_answers
from evaluation.score import BENCHMARKS, STYLES, is_cut, main, ocrbench_v2_parts, require_wordnet, table_rows
from evaluation.scorers import ai2d_letter, mmmu_choice, ocrbench_score, ocrbench_v2_overall, videomme_letter
from evaluation.tables import paired_difference, table
from evaluation.tasks import utils
from tests.conftest import GOLDEN, ROOT
from tools.weights import fingerprint

SCORING = GOLDEN / "scoring"


def cases(name: str) -> list[dict]:
    path = SCORING / f"{name}.json"
    if not path.exists():
        pytest.skip(f"{GOLDEN} has no scoring/{name}.json")
    return json.loads(path.read_text(encoding="utf-8"))["cases"]


# --- The official rules, on stored cases -----------------------------------------------------------------------------


def test_golden_ocrbench():
    for case in cases("ocrbench"):
        assert ocrbench_score(case["prediction"], case["answers"], case["dataset"]) == case["score"], case


def test_golden_ai2d():
    for case in cases("ai2d"):
        letter = ai2d_letter(case["prediction"], case["options"])
        assert letter == case["letter"], case
        assert (letter == case["answer"]) == case["correct"], case


def test_golden_videomme():
    for case in cases("videomme"):
        letter = videomme_letter(case["prediction"])
        assert letter == case["letter"], case
        assert (letter == case["answer"]) == case["correct"], case


def test_golden_mmmu_choices():
    for case in cases("mmmu"):
        if case["type"] == "multiple-choice":
            choice = mmmu_choice(case["prediction"], case["options"], random.Random(0))
            assert (None if choice.drawn else choice.letter) == case["parsed"], case


def test_golden_mmmu_open_questions():
    pytest.importorskip("lmms_eval", reason="lmms-eval is absent: docs/evaluation.md installs it")
    for case in cases("mmmu"):
        if case["type"] != "multiple-choice":
            doc = {"question_type": "open", "options": "[]", "id": "x", "answer": case["answer"]}
            assert utils.mmmu_results(doc, [case["prediction"]])["score"] == case["correct"], case


def test_golden_anls():
    pytest.importorskip("lmms_eval", reason="lmms-eval is absent: docs/evaluation.md installs it")
    for case in cases("anls"):
        score = utils.docvqa_results({"answers": case["answers"]}, [case["prediction"]])["score"]
        assert score == pytest.approx(case["score"], abs=1e-9), case


def test_golden_chartqa():
    pytest.importorskip("lmms_eval", reason="lmms-eval is absent: docs/evaluation.md installs it")
    for case in cases("chartqa"):
        assert utils.chartqa_results({"answer": case["answer"]}, [case["prediction"]])["score"] == case["score"], case


def test_golden_ai2d_by_the_rule_of_lmms_eval():
    for case in cases("ai2d"):
        doc = {"options": case["options"], "answer": str("ABCDEFGH".index(case["answer"]))}
        assert utils.ai2d_results(doc, [case["prediction"]])["lmms_eval"] == case["lmms_eval"], case


@pytest.fixture
def ocrbench_v2(monkeypatch, tmp_path):
    """The scorer of OCRBench v2; it writes to the working directory."""
    pytest.importorskip("lmms_eval.tasks.ocrbench_v2.utils", reason="docs/evaluation.md installs what it needs")
    monkeypatch.chdir(tmp_path)
    try:
        require_wordnet()
    except ValueError as error:
        pytest.skip(str(error))

    def score(case: dict) -> float:
        doc = {name: value for name, value in case.items() if name not in ("prediction", "score")}
        if "bbox" in doc and case["type"] == "text spotting en":
            doc["bbox_list"] = doc.pop("bbox")  # its name in the published columns
        doc.setdefault("eval", "None")
        before = copy.deepcopy(doc)
        value = utils.ocrbench_v2_results(doc, [case["prediction"]])["score"]
        assert doc == before
        return value

    return score


def test_golden_ocrbench_v2(ocrbench_v2):
    for case in cases("ocrbench_v2"):
        assert ocrbench_v2(case) == pytest.approx(case["score"], abs=1e-9), case


def test_golden_ocrbench_v2_overall():
    samples = [(case["type"], case["score"]) for case in cases("ocrbench_v2")]
    (expected,) = cases("ocrbench_v2_overall")
    report = ocrbench_v2_overall(samples)
    for language, name in (("en", "English"), ("cn", "Chinese")):
        assert report[language]["overall"] == pytest.approx(expected["overall"][name], abs=6e-4)
        for category, numbers in expected["categories"][language].items():
            assert report[language]["categories"][category]["count"] == numbers["count"]
            assert report[language]["categories"][category]["score"] == pytest.approx(numbers["score"], abs=6e-4)


# --- Rules beyond the stored cases -----------------------------------------------------------------------------------


def test_empty_prediction_and_answer_of_ocrbench_v2_count_nothing(ocrbench_v2):
    assert ocrbench_v2({"type": "full-page OCR cn", "question": "?", "answers": [""], "prediction": ""}) == 0


def test_a_missing_category_is_left_out_and_said():
    parts = ocrbench_v2_parts([("math QA en", 1.0), ("text counting en", 0.0), ("science QA en", 1.0)])
    assert parts["en"]["score"] == pytest.approx(75) and not parts["en"]["complete"]
    assert set(parts) == {"en"}


def test_an_unknown_type_of_ocrbench_v2_is_refused():
    with pytest.raises(ValueError, match="'riddle en' is no type"):
        ocrbench_v2_overall([("riddle en", 1.0)])


def test_a_drawn_letter_is_the_same_each_time():
    doc = {"question_type": "multiple-choice", "options": "['heron', 'stork', 'gull']", "answer": "B", "id": "v_1"}
    first = utils.mmmu_results(doc, ["I cannot say"])
    assert first["drawn"] == 1.0 and first == utils.mmmu_results(doc, ["I cannot say"])


# --- Prompts ---------------------------------------------------------------------------------------------------------

IMAGE = Image.new("RGB", (8, 8))


def texts(messages: list[dict]) -> list[tuple[str, str]]:
    return [(message["role"], part["text"]) for message in messages for part in message["content"] if "text" in part]


def test_prompts_of_the_styles_are_those_of_the_programs():
    doc = {"question": "What is the total?", "image": IMAGE, "answers": []}
    options = {style: {"style": style} for style in STYLES}
    short = "\nAnswer the question using a single word"
    system = "Follow the user's instruction and answer questions."
    ask = utils.docvqa_messages
    assert texts(ask(doc, options["nvidia"])) == [
        ("system", system),
        ("user", f"What is the total?{short}, phrase, or number."),
    ]
    assert texts(ask(doc, None)) == texts(ask(doc, options["nvidia"]))
    assert texts(ask(doc, options["vlmevalkit"])) == [("user", f"What is the total?{short} or phrase.")]
    assert texts(ask(doc, options["plain"])) == [("user", "What is the total?")]
    assert texts(utils.chartqa_messages(doc, options["nvidia"]))[1][1] == f"What is the total?{short} or phrase."
    lmms = texts(utils.chartqa_messages(doc, options["lmms"]))
    assert lmms == [("user", "What is the total?\nAnswer the question with a single word.")]
    assert texts(utils.question_messages(doc, options["nvidia"])) == [
        ("system", system),
        ("user", "What is the total?"),
    ]
    assert ask(doc, options["nvidia"])[1]["content"][0]["type"] == "image"


def test_options_of_ai2d_and_mmmu():
    doc = {"question": "Which?", "options": ["root", "stem"], "answer": "1", "image": IMAGE}
    letter = "Answer with the option's letter from the given choices directly."
    assert utils.ai2d_text(doc, {"style": "lmms"}) == f"Which?\nA. root\nB. stem\n{letter}"
    assert utils.ai2d_text(doc, {"style": "vlmevalkit"}) == (
        "Question: Which?\nOptions:\nA. root\nB. stem\nPlease select the correct answer from the options above. \n"
    )
    exam = {
        "question": "See <image 2> and <image 1>?",
        "options": "['root', 'stem']",
        "question_type": "multiple-choice",
    }
    exam |= {f"image_{number}": Image.new("RGB", (number, 8)) for number in (1, 2)}
    first = utils.mmmu_messages(exam, {"style": "nvidia"})
    assert texts(first) == [
        ("system", "Answer the questions."),
        ("user", f"See <image 2> and <image 1>?\nA. root\nB. stem\n{letter}"),
    ]
    assert [part["url"].width for part in first[1]["content"] if part["type"] == "image"] == [1, 2]
    (placed,) = utils.mmmu_messages(exam, {"style": "vlmevalkit"})
    assert [part.get("text") or part["url"].width for part in placed["content"]][:4] == [
        "Question: See ",
        2,
        " and ",
        1,
    ]
    question = {"question": "How many?", "options": "[]", "question_type": "open"}
    assert utils.mmmu_text(question, {"style": "nvidia"}) == "How many?\nAnswer the question directly."


# --- Kept answers ----------------------------------------------------------------------------------------------------


def row(doc_id: int, **changes) -> dict:
    base = {"task": "t", "doc_id": doc_id, "style": "plain", "prompt": "p", "settings": {"max_new_tokens": 4}}
    return base | {"answer": "a", "error": None} | changes


def test_a_line_cut_off_by_a_kill_is_dropped_and_the_others_stay(tmp_path):
    file = AnswerFile(tmp_path)
    file.append(row(0))
    file.append(row(1, answer="Zürich\n2"))
    whole = file.path.read_bytes()
    file.path.write_bytes(whole + b'{"task": "t", "doc')
    again = AnswerFile(tmp_path)
    assert [kept["answer"] for kept in again.rows.values()] == ["a", "Zürich\n2"]
    again.append(row(2))
    assert [kept["doc_id"] for kept in read_answers(file.path)] == [0, 1, 2]


def test_every_process_writes_its_own_file_and_reads_all(tmp_path):
    AnswerFile(tmp_path, rank=0).append(row(0))
    AnswerFile(tmp_path, rank=1).append(row(1))
    assert {key.doc_id for key in AnswerFile(tmp_path, rank=2).rows} == {0, 1}


def test_a_file_that_holds_something_else_is_named(tmp_path):
    (tmp_path / "answers-0.jsonl").write_text('{"task": "t"}\n')
    with pytest.raises(ValueError, match=r"answers-0.jsonl, line 1, is no answer"):
        AnswerFile(tmp_path)


def test_a_prompt_has_another_digest_when_its_text_image_or_settings_change():
    def digest(text="What?", colour=(0, 0, 0), settings=None):
        content = [{"type": "image", "url": Image.new("RGB", (4, 4), colour)}, {"type": "text", "text": text}]
        return prompt_digest([{"role": "user", "content": content}], settings or {"max_new_tokens": 4})

    assert digest() == digest()
    assert len({digest(), digest("Who?"), digest(colour=(1, 0, 0)), digest(settings={"max_new_tokens": 5})}) == 4


def test_a_checkpoint_has_another_digest_when_its_weights_change(tmp_path):
    for name, weights in (("a", b"\0" * 2_000_000), ("b", b"\0" * 1_000_000 + b"\1" * 1_000_000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(weights)
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "a") != fingerprint(tmp_path / "b")


# --- The table -------------------------------------------------------------------------------------------------------


def test_a_limited_run_says_so_and_is_not_compared_with_the_card():
    run = {"task": "docvqa", "style": "nvidia", "samples": 8, "of": 5349, "score": 87.5, "error": 23.4}
    run |= {"failed": 1, "cut": 2, "drawn": 0}
    (cells,) = table_rows({"model": "8B", "runs": [run]})
    assert cells[1] == "8 of 5,349" and cells[4] == "91.2" and cells[5] == ""
    assert cells[-1].endswith("a part of the benchmark: not comparable; 1 failed; 2 at the limit of tokens")
    (whole,) = table_rows({"model": "8B", "runs": [run | {"samples": 5349}]})
    assert whole[1] == "5,349" and whole[5] == "-3.7"
    (other,) = table_rows({"model": None, "runs": [run | {"samples": 5349}]})
    assert other[4] == other[5] == ""


def test_columns_of_a_table_are_as_wide_as_their_longest_cell():
    assert table(("a", "bb"), [("ccc", "d")]) == "| a   | bb |\n| --- | -- |\n| ccc | d  |"


def test_a_paired_difference_counts_changes_of_the_same_samples():
    numbers = paired_difference([1, 0, 1, 1], [1, 1, 0, 1])
    assert numbers["difference"] == 0 and numbers["became_wrong"] == numbers["became_right"] == 1
    assert numbers["standard_error"] == pytest.approx(100 * (2 / 3 / 4) ** 0.5)
    with pytest.raises(ValueError, match="no sample in common"):
        paired_difference([], [])


def test_an_answer_of_as_many_tokens_as_its_limit_counts_as_cut():
    def tokenizer(text, add_special_tokens):
        return {"input_ids": text.split()}

    assert is_cut(row(0, answer="a b c d"), tokenizer) and not is_cut(row(0, answer="a b c"), tokenizer)


def test_two_runs_are_compared_over_the_samples_that_both_have(tmp_path, capsys):
    for name, scores in (("a", {"0": 1.0, "1": 1.0, "2": 0.0}), ("b", {"1": 0.0, "2": 0.0, "3": 1.0})):
        (tmp_path / name).mkdir()
        report = {"checkpoint": name, "runs": [{"task": "docvqa", "style": "nvidia", "scores": scores}]}
        (tmp_path / name / "scores.json").write_text(json.dumps(report))
    assert main(["--compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    numbers = last["differences"]["docvqa nvidia"]
    assert numbers["samples"] == 2 and numbers["difference"] == -50 and numbers["became_wrong"] == 1


@pytest.mark.parametrize(
    "options",
    [[], ["nano", "--answers", "x"], ["nano", "--model-args", "a=b"], ["nano", "--engine", "vllm", "--upscale", "2"]],
)
def test_options_that_contradict_each_other_are_refused(options, capsys):
    with pytest.raises(SystemExit) as ended:
        main(options)
    assert ended.value.code == 2


def test_the_text_of_video_mme_is_the_official_one():
    doc = {"question": "Who?", "options": ["A. He.", "B. She."]}
    assert utils.videomme_text(doc, {"style": "nvidia"}) == (
        "Select the best answer to the following multiple-choice question based on the video. Respond with only the "
        "letter (A, B, C, or D) of the correct option.\nWho?\nA. He.\nB. She.\n"
    )
    assert utils.videomme_text(doc, {"style": "plain"}) == "Who?\nA. He.\nB. She."


def test_a_missing_film_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("VIDEOMME_VIDEOS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no film x.mp4"):
        utils.videomme_video({"videoID": "x"})
    (tmp_path / "x.MP4").touch()
    assert utils.videomme_video({"videoID": "x"}) == [str(tmp_path / "x.MP4")]


def test_every_benchmark_has_a_task_file():
    names = {path.stem for path in (ROOT / "evaluation" / "tasks").glob("*.yaml")}
    assert names == set(BENCHMARKS)


# --- The whole command, with lmms-eval -------------------------------------------------------------------------------


def run_score(*options, python=sys.executable, cwd=ROOT, **environment) -> subprocess.CompletedProcess:
    command = [python, "-m", "evaluation.score", *map(str, options)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=1200)


def report_of(run: subprocess.CompletedProcess) -> dict:
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Eight drawn documents in the columns of each benchmark."""
    pytest.importorskip("lmms_eval", reason="lmms-eval is absent: docs/evaluation.md installs it")
    folder = tmp_path_factory.mktemp("data")
    from tests.benchmark_data import write

    write(folder, 8)
    return folder


TASKS = ["docvqa", "mmmu", "videomme"]
FRAMES = ["--num-frames", 4]  # nano's context has no room for 16


@pytest.mark.slow
def test_all_benchmarks_run_offline_and_batches_change_no_answer(data, tmp_path):
    options = ["nano", "--data", data, "--styles", "plain", *FRAMES, "--tasks", *TASKS]
    one = run_score(*options, "--out", tmp_path / "one")
    assert one.returncode == 0, one.stderr[-3000:]
    four = run_score(*options, "--out", tmp_path / "four", "--batch-size", 4)
    assert [run["score"] for run in report_of(one)["runs"]] == [run["score"] for run in report_of(four)["runs"]]
    answers = [
        {key: kept["answer"] for key, kept in AnswerFile(tmp_path / name).rows.items()} for name in ("one", "four")
    ]
    assert answers[0] == answers[1] and len(answers[0]) == 8 * len(TASKS)

    again = run_score("--answers", tmp_path / "one", "--data", data, "--styles", "plain", "--tasks", *TASKS)
    assert again.returncode == 0 and report_of(again)["runs"] == [
        run | {"cut": None} for run in report_of(one)["runs"]
    ]
    eight = run_score(*options, "--out", tmp_path / "few", "--limit", 3)
    kept = json.loads((tmp_path / "one" / "scores.json").read_text())["runs"][0]["scores"]
    assert report_of(eight)["runs"][0]["score"] == pytest.approx(100 * sum(kept[str(n)] for n in range(3)) / 3)
    assert "3 of 8" in eight.stdout

    other = run_score(*options, "--out", tmp_path / "one", "--max-num-tiles", 1)
    assert other.returncode == 2 and "max_num_tiles: 2 there, 1 now" in other.stderr


@pytest.mark.slow
def test_two_processes_share_the_samples_and_count_as_one(data, tmp_path):
    options = ["nano", "--data", str(data), "--styles", "plain", "--tasks", "docvqa", "--limit", "5"]
    one = run_score(*options, "--out", tmp_path / "one")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "1"}
    two = subprocess.run(
        [*launch, "-m", "evaluation.score", *options, "--out", str(tmp_path / "two")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert one.returncode == two.returncode == 0, (one.stderr + two.stderr)[-3000:]
    assert report_of(two)["runs"] == report_of(one)["runs"]
    shares = [len(read_answers(tmp_path / "two" / f"answers-{rank}.jsonl")) for rank in (0, 1)]
    assert shares == [3, 2]


@pytest.mark.slow
def test_a_killed_run_loses_no_answer_and_asks_none_twice(data, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "evaluation.score", "nano", "--data", data, "--styles", "plain"]
    command += ["--tasks", "docvqa", "ocrbench", "--out", out]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    generator, seen = random.Random(5), 0
    for _ in range(3):
        process = subprocess.Popen(
            list(map(str, command)), cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wanted, deadline = seen + generator.randint(1, 4), time.monotonic() + 600
        while process.poll() is None and time.monotonic() < deadline:
            path = out / "answers-0.jsonl"
            if path.exists() and len(path.read_bytes().splitlines()) >= wanted:
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        seen = len(read_answers(out / "answers-0.jsonl", mend=True))
        assert seen >= wanted
    finished = run_score(*command[3:])
    assert finished.returncode == 0, finished.stderr[-3000:]
    rows = read_answers(out / "answers-0.jsonl")
    assert sorted((kept["task"], kept["doc_id"]) for kept in rows) == [
        (f"nemotron_{task}", number) for task in ("docvqa", "ocrbench") for number in range(8)
    ]


@pytest.mark.slow
def test_a_sample_beyond_the_context_fails_alone_and_a_benchmark_without_data_fails_the_command(data, tmp_path):
    import datasets

    place = data / "lmms-lab-encoder" / "DocVQA" / "DocVQA"
    folder = tmp_path / "data" / "lmms-lab-encoder" / "DocVQA" / "DocVQA"
    folder.mkdir(parents=True)
    (folder.parent / "README.md").write_text((place.parent / "README.md").read_text())
    rows = list(datasets.Dataset.from_parquet(str(next(place.glob("*.parquet")))))
    rows[1]["question"] = "word " * 9000
    features = datasets.Dataset.from_list(rows[:1]).features
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "validation-00000-of-00001.parquet")
    run = run_score(
        "nano",
        "--data",
        tmp_path / "data",
        "--styles",
        "plain",
        "--tasks",
        "docvqa",
        "chartqa",
        "--out",
        tmp_path / "o",
    )
    docvqa, chartqa = report_of(run)["runs"]
    assert run.returncode == 1 and "does not exist" in chartqa["error_text"]
    assert docvqa["samples"] == 8 and docvqa["failed"] == 1
    refused = [kept for kept in AnswerFile(tmp_path / "o").rows.values() if kept["error"]]
    assert len(refused) == 1 and refused[0]["doc_id"] == 1 and "tokens" in refused[0]["error"]


@pytest.mark.slow
@pytest.mark.skipif(transformers.__version__ < "5", reason="it installs its own transformers: once is enough")
def test_the_installation_of_the_manual_scores_nano(tmp_path):
    """The commands of docs/evaluation.md in an empty environment; what needs WordNet, which is elsewhere, is left out."""
    manual = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    block = manual.split("```bash\n", 1)[1].split("```", 1)[0]
    installs = [line for line in block.splitlines() if line.startswith("pip install")]
    assert len(installs) == 2
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    python = tmp_path / "env" / "bin" / "python"
    for line in installs:
        words = shlex.split(line)
        words[-1] = words[-1].replace(".[", f"{ROOT}[")
        install = subprocess.run([python, "-m", *words], capture_output=True, text=True)
        if install.returncode and "No matching distribution" in install.stderr:
            pytest.skip(f"no package index: {install.stderr.strip().splitlines()[-1]}")
        assert install.returncode == 0, install.stderr[-3000:]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    made = subprocess.run(
        [python, "-m", "tests.benchmark_data", tmp_path / "data", "4"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr[-3000:]
    tasks = [task for task in BENCHMARKS if task != "ocrbench_v2"]
    options = ["nano", "--data", tmp_path / "data", "--styles", "plain", *FRAMES, "--tasks", *tasks]
    options += ["--out", tmp_path / "out"]
    run = run_score(*options, python=python)
    assert run.returncode == 0, run.stderr[-3000:] + run.stdout
    assert {(done["task"], done["samples"]) for done in report_of(run)["runs"]} == {(task, 4) for task in tasks}
