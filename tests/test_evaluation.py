"""The evaluation of nano asks what it says it asks, and scores it right."""

from collections import Counter

from evaluation.nano import TASKS, batches, edit_distance, make_question, markdown, score, summarize
from training.documents import KINDS


def questions(count: int) -> list:
    return [make_question(seed, tuple(KINDS)) for seed in range(count)]


def test_every_task_comes_in_its_share():
    asked = Counter(question.turn.task for question in questions(len(TASKS)))
    assert asked == Counter(TASKS)


def test_a_seed_always_asks_the_same():
    first, second = (make_question(3, tuple(KINDS)) for _ in range(2))
    assert first.turn == second.turn
    assert first.pictures[0].tobytes() == second.pictures[0].tobytes()


def test_batches_hold_equally_many_pictures():
    for batch in batches(questions(40), 4):
        assert len({len(question.pictures) for question in batch}) == 1


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
