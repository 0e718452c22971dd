"""The evaluation of nano asks what it says it asks, and scores it right."""

from collections import Counter
from types import SimpleNamespace

import pytest

from evaluation import foreign, quantized
from evaluation.nano import (
    TASKS,
    answer,
    batches,
    edit_distance,
    make_question,
    make_questions,
    markdown,
    score,
    summarize,
)


def questions(count: int) -> list:
    return [make_question(seed) for seed in range(count)]


def test_every_task_comes_in_its_share():
    asked = Counter(question.turn.task for question in questions(len(TASKS)))
    assert asked == Counter(TASKS)


def test_a_seed_always_asks_the_same():
    first, second = (make_question(3) for _ in range(2))
    assert first.turn == second.turn
    assert first.images[0].tobytes() == second.images[0].tobytes()


def test_batches_hold_equally_many_images():
    for batch in batches(questions(40), 4):
        assert len({len(question.images) for question in batch}) == 1


def test_follow_ups_come_after_the_pages_and_change_none_of_them():
    asked = make_questions(20)
    assert [question.turn for question in asked[:20]] == [question.turn for question in questions(20)]
    (last,) = asked[20:]
    assert last.turn.task == "follow-up" and len({last.turn.question, *last.earlier}) == 3


def test_pages_are_asked_about_in_every_task():
    asked = questions(len(TASKS))
    assert [question.turn.task for question in asked] == list(TASKS)
    assert [len(question.images) for question in asked] == [
        {"text": 0, "compare": 2}.get(question.turn.task, 1) for question in asked
    ]


def test_a_follow_up_is_asked_after_the_models_own_answers():
    calls = []

    class Model:
        def chat(self, tokenizer, question, history, **options):
            calls.append((question, history))
            answers = [f"answer {len(calls)}"] * len(question)
            histories = history or [[] for _ in question]
            return answers, [
                [*own, (text, said)] for own, text, said in zip(histories, question, answers, strict=True)
            ]

    class Processor:
        tokenizer = None

        def image_processor(self, images, return_tensors):
            return {"pixel_values": len(images)}

    batch = [make_question(seed, "follow-up") for seed in (20, 22)]
    assert answer(Model(), Processor(), batch) == ["answer 3"] * 2
    assert [text.count("<image>") for question, _ in calls for text in question] == [1, 1, 0, 0, 0, 0]
    assert [said for _, said in calls[2][1][1]] == ["answer 1", "answer 2"]
    assert calls[2][0] == [question.turn.question for question in batch]


def test_edit_distance_counts_insertions_deletions_and_replacements():
    assert edit_distance("", "abc") == edit_distance("abc", "") == 3
    assert edit_distance("kitten", "sitting") == 3


def test_scores_and_table():
    asked = questions(len(TASKS))
    rows = []
    for question in asked:
        marks = score(question, question.turn.answer)
        assert marks["exact"] == 1 and marks.get("character_error_rate", 0) == 0
        seen = {"seen_font": True, "seen_layout": False, "seen_phrasing": True}
        rows.append({"task": question.turn.task} | seen | marks)
    table = markdown({"tasks": summarize(rows)})
    assert "| field | 6 | 1.000 |" in table


def test_formats_are_compared_question_by_question():
    asked = questions(40)
    before = [{"task": question.turn.task, "given": "a"} | score(question, question.turn.answer) for question in asked]
    after = [dict(row) for row in before]
    for row in [row for row in after if row["task"] == "field"][:3] + [row for row in after if row["task"] == "text"][
        :1
    ]:
        row |= {"given": "b", "exact": 0.0}
    found = quantized.compare(before, after)
    assert (found["answers_changed"], found["became_wrong"], found["became_right"]) == (4, 4, 0)
    assert found["difference_in_points"]["all"] == -10.0
    assert found["difference_in_points"]["field"] == -25.0
    assert found["difference_in_points"]["price"] == 0.0
    assert found["difference_in_points"]["html, CER"] == 0.0
    assert found["standard_error_of_all"] == pytest.approx(100 * (0.1 * 0.9 / 39) ** 0.5, abs=0.01)
    assert quantized.count_differences(before, after) == 4
    sizes = {
        "bytes_after": 2**20,
        "mean_relative_error": 0.03,
        "worst_relative_error": 0.04,
        "packed_answers_differ": 2,
    }
    plain = {"bytes": 2**21, "percent": quantized.percentages(before)}
    report = {"dtype": "float32", "formats": {quantized.PLAIN: plain, "fp8": found | sizes}}
    assert "| fp8 | 1.0 | 0.030 (0.040) | 4 | 2 | -10.0 ± 4.8 | -25.0 |" in quantized.markdown(report)


def test_foreign_receipts_print_what_is_asked_for(monkeypatch):
    seen = []
    monkeypatch.setattr(foreign.ImageDraw.ImageDraw, "text", lambda self, place, text, *_, **__: seen.append(text))
    for seed in range(12):
        seen.clear()
        image, truth = foreign.receipt(seed)
        assert set(truth) == set(foreign.QUESTIONS) and image.width >= 300
        assert all(any(value in text for text in seen) for value in truth.values())


def test_answers_about_foreign_receipts_are_compared_with_the_print():
    class Model:
        def chat(self, tokenizer, question, **_):
            return foreign.receipt(0)[1]["total"] if "total" in question else "?"

    processor = SimpleNamespace(tokenizer=None, image_processor=lambda images, return_tensors: {})
    rows = foreign.answers(Model(), processor, 1)
    assert [row["right"] for row in rows] == [True, False, False]
