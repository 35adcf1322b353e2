from pathlib import Path
from typing import Any

import pytest

from p4dprep.errors import RequestError
from student.evaluate.benchmark import Question
from student.evaluate.registry import find
from tests.student.evaluate import omnispatial_data
from tests.student.evaluate.asking import count_unmatched, score_all

_BENCH = find("omnispatial")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return omnispatial_data.build(tmp_path_factory.mktemp("OmniSpatial"))


@pytest.fixture(scope="module")
def questions(data: Path) -> tuple[Question, ...]:
    return tuple(_BENCH.read(data, "official"))


def test_who_knows_the_truth_scores_100_in_every_column(questions: tuple[Question, ...]) -> None:
    table = score_all(_BENCH, questions, lambda question: f"It turns.\n\nAnswer: {question.answer}")
    assert tuple(table) == _BENCH.columns
    assert set(table.values()) == {100.0}


def test_a_constant_letter_scores_its_share_of_each_task_and_sub_task(questions: tuple[Question, ...]) -> None:
    assert "".join(question.answer for question in questions) == "ABCBBBABAB"
    table = score_all(_BENCH, questions, lambda _: "Answer: B")
    assert table["Avg"] == 60
    assert table["Dynamic_Reasoning"] == 50
    assert table["Spatial_Interaction"] == pytest.approx(100 * 2 / 3)
    assert (table["Manipulation"], table["Motion_Analysis"]) == (0, 100)


def test_a_reply_without_an_answer_is_taken_for_a_and_counted(questions: tuple[Question, ...]) -> None:
    assert score_all(_BENCH, questions, lambda _: "B, I think")["Avg"] == 30
    assert count_unmatched(_BENCH, questions, lambda _: "B, I think") == 10
    assert count_unmatched(_BENCH, questions, lambda _: "Answer: A") == 0


def test_ids_that_collide_between_tasks_are_told_apart_and_find_their_own_picture(
    data: Path, questions: tuple[Question, ...]
) -> None:
    assert len({question.id for question in questions}) == 10
    assert questions[4].id == "Spatial_Interaction/1_0"
    assert questions[4].shown.images == (data / "Spatial_Interaction" / "1.png",)
    assert questions[3].shown.images == (data / "Spatial_Interaction" / "0.png",)


def test_the_prompt_asks_for_reasoning_and_then_a_line_of_its_own(questions: tuple[Question, ...]) -> None:
    assert questions[0].prompt.startswith(
        "\nYou are a spatial-reasoning assistant.\n\nTask\n-----\nYou will receive  \n"
    )
    assert questions[0].prompt.endswith(
        "\n\n\nEnd your answer with a separate line formatted exactly as:\n\nAnswer: X\nwhere X ∈ {A, B, C, D}.\n"
        "\n\nWhich way 0?\nA. left\nB. right"
    )


@pytest.mark.parametrize(
    ("reply", "answer", "is_matched"),
    [
        ("Answer: B", "B", True),
        ("Answer: A? No.\nAnswer : C", "C", True),
        ("ANSWER:\nD", "D", True),
        ("Answer: b", "b", True),  # by the official rule found, and then unequal to B
        ("Answer: Back", "A", False),
        ("B", "A", False),
        ("", "A", False),
    ],
)
def test_the_last_line_that_answers_counts(
    questions: tuple[Question, ...], reply: str, answer: str, is_matched: bool
) -> None:
    parsed = _BENCH.parse(questions[0], reply, "official", seed=0)
    assert (parsed.answer, parsed.is_matched) == (answer, is_matched)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sub_task_type": "Egocentric"}, "record 0 is of 'Dynamic_Reasoning', 'Egocentric', which OmniSpatial"),
        ({"answer": 2}, "the answer 2; it must be the index of one of 2 options"),
        ({"answer": "left"}, "the answer 'left'; it must be the index"),
        ({"options": "left"}, "0 options"),
        ({"id": "../../secret_0"}, "secret"),
        ({"id": "9_0"}, "9.png, which .* lacks"),
    ],
)
def test_a_record_that_cannot_be_asked_is_named_in_one_line(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = omnispatial_data.build(tmp_path / "OmniSpatial", [omnispatial_data.records()[0] | changes])
    with pytest.raises(RequestError, match=message):
        _BENCH.read(folder, "official")
