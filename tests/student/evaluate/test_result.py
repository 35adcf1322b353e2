"""From answers to a table: order, intervals, what is drawn together, and what is written."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from p4dprep.errors import CorruptDataError, RequestError
from student.evaluate.benchmark import Question, Scored, Shown
from student.evaluate.result import (
    NUM_DRAWS,
    make_result,
    make_table,
    markdown,
    read_answers,
    resamples,
    units,
    write_result,
)
from tests.student.evaluate.tiny_bench import TinyBench

IDENTITY: Mapping[str, Any] = {
    "bench": "tiny", "student": "a|b", "student_digest": "0123456789abcdef", "step": 7, "seed": 0, "mode": "official",
    "revision": "fedcba9876543210", "frames": "16 uniform, own size", "time_cue": "tpe", "dtype": "float32",
    "generation": "greedy",
}  # fmt: skip


def scored(scores: Sequence[float], category: str = "far") -> list[Scored]:
    def question(number: int) -> Question:
        return Question(id=f"{category}-{number}", category=category, prompt="?", shown=Shown(), answer="A")

    return [Scored(question=question(number), score=score) for number, score in enumerate(scores)]


def write_lines(path: Path, answers: Sequence[Scored], **changes: object) -> None:
    lines = [
        {
            "id": each.question.id, "category": each.question.category, "prompt": "?", "reply": "(A)", "answer": "A",
            "is_matched": True, "truth": "A", "score": each.score, "tags": {}, "options": [], "failure": "", **changes,
        }
        for each in answers
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_an_interval_is_the_percentile_bootstrap_of_the_column() -> None:
    scores = np.random.default_rng(3).integers(0, 2, 120).astype(float)
    (column,) = [each for each in make_table(TinyBench(), scored(scores), seed=1) if each.name == "Avg"]
    expected = scipy.stats.bootstrap(
        (scores,), np.mean, n_resamples=NUM_DRAWS, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    assert column.value == pytest.approx(100 * scores.mean())
    assert (column.low, column.high) == pytest.approx((100 * expected.low, 100 * expected.high), abs=2.0)
    assert column.num_questions == 120


def test_intervals_depend_on_the_seed_alone() -> None:
    answers = scored([0, 1, 1, 0, 1, 0, 0.5] * 5)
    assert make_table(TinyBench(), answers, seed=1) == make_table(TinyBench(), answers, seed=1)
    assert make_table(TinyBench(), answers, seed=1) != make_table(TinyBench(), answers, seed=2)


def test_columns_stand_in_the_official_order_and_empty_ones_are_left_out() -> None:
    answers = scored([1, 0], "fast") + scored([1], "far")
    table = make_table(TinyBench(), answers, seed=0)
    assert [(each.name, each.num_questions) for each in table] == [("Avg", 3), ("far", 1), ("fast", 2)]
    assert [each.name for each in make_table(TinyBench(), scored([1, 0], "fast"), seed=0)] == ["Avg", "fast"]


def test_a_single_question_has_no_interval() -> None:
    (column, _) = make_table(TinyBench(), scored([1.0]), seed=0)
    assert (column.value, math.isnan(column.low), math.isnan(column.high)) == (100.0, True, True)


def test_questions_of_one_item_are_always_drawn_together() -> None:
    answers = [
        replace(each, question=replace(each.question, tags={"item": str(number // 2)}))
        for number, each in enumerate(scored([0, 1] * 6))
    ]
    assert units(answers) == [[row, row + 1] for row in range(0, 12, 2)]
    for rows in resamples(answers, seed=0):
        assert len(rows) == 12
        assert all(after == before + 1 and before % 2 == 0 for before, after in zip(rows[::2], rows[1::2], strict=True))


def test_very_many_questions_are_drawn_less_often() -> None:
    questions = scored([1.0]) * 3
    many = [replace(each, question=replace(each.question, id=str(n))) for n, each in enumerate(questions * 20_000)]
    draws = resamples(many, seed=0)
    assert [len(next(draws)) for _ in range(2)] == [60_000] * 2
    assert sum(1 for _ in resamples(many[:30], seed=0)) == NUM_DRAWS


def test_a_result_counts_unmatched_and_failed_and_says_why(tmp_path: Path) -> None:
    answers = scored([1, 1, 0, 0, 0])
    write_lines(tmp_path / "answers-0-of-3.jsonl", answers[:2])
    write_lines(tmp_path / "answers-1-of-3.jsonl", answers[2:3], is_matched=False)
    write_lines(tmp_path / "answers-2-of-3.jsonl", answers[3:], is_matched=False, failure="is empty (0 bytes)")
    result = make_result(tmp_path, TinyBench(), [each.question for each in answers], IDENTITY)
    assert (result.num_asked, result.num_unmatched, result.num_failed) == (5, 1, 2)
    assert result.failures == {"is empty (0 bytes)": 2}
    assert result.table[0].value == 40.0


def test_a_result_lacks_no_answer(tmp_path: Path) -> None:
    answers = scored([1, 0])
    write_lines(tmp_path / "answers-0-of-1.jsonl", answers[:1])
    with pytest.raises(RequestError, match="lacks answers to 1 questions, such as 'far-1'; ask them first"):
        make_result(tmp_path, TinyBench(), [each.question for each in answers], IDENTITY)


def test_of_a_question_answered_twice_the_first_file_counts(tmp_path: Path) -> None:
    write_lines(tmp_path / "answers-0-of-2.jsonl", scored([1]))
    write_lines(tmp_path / "answers-1-of-2.jsonl", scored([0]))
    assert [line["score"] for line in read_answers(tmp_path)] == [1]


def test_what_is_written_is_json_without_nan_and_a_table_of_one_decimal(tmp_path: Path) -> None:
    answers = scored([1, 0, 0], "far") + scored([1], "fast")
    write_lines(tmp_path / "answers-0-of-1.jsonl", answers)
    result = make_result(tmp_path, TinyBench(), [each.question for each in answers], IDENTITY)
    write_result(tmp_path, result, TinyBench())
    content = json.loads((tmp_path / "result.json").read_text())
    assert content["student"] == "a|b"
    assert [column["name"] for column in content["table"]] == ["Avg", "far", "fast"]
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[:3] == [
        "| tiny | Avg | far | fast |",
        "| --- | ---: | ---: | ---: |",
        "| a\\|b | 50.0 | 33.3 | 100.0 |",
    ]
    assert lines[4] == "| questions | 4 | 3 | 1 |"
    assert lines[6] == "- 4 questions, 0 replies without an answer, 0 that could not be asked and score 0"
    assert "frames: 16 uniform, own size" in lines[7]
    assert "step 7, 0123456789ab, time cue tpe, float32, greedy, seed 0" in lines[8]


def test_an_interval_that_does_not_exist_is_null_and_a_dash(tmp_path: Path) -> None:
    answers = scored([1])
    write_lines(tmp_path / "answers-0-of-1.jsonl", answers)
    result = make_result(tmp_path, TinyBench(), [each.question for each in answers], IDENTITY)
    assert result.to_json()["table"][0]["low"] is None
    assert "| 95% interval | - | - |" in markdown(result, TinyBench())


def test_a_line_without_a_score_is_damage(tmp_path: Path) -> None:
    (tmp_path / "answers-0-of-1.jsonl").write_text('{"id": "q", "score": "1"}\n')
    with pytest.raises(CorruptDataError, match=r"answers-0-of-1\.jsonl, line 1, is no answer; delete the file"):
        list(read_answers(tmp_path))
