from pathlib import Path
from typing import Any

import pytest

from p4dprep.errors import RequestError
from student.evaluate.benchmark import Question, Scored
from student.evaluate.registry import find
from tests.student.evaluate import sat_data
from tests.student.evaluate.asking import count_unmatched, png, score_all

_BENCH = find("sat")


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Question, ...]:
    return tuple(_BENCH.read(sat_data.build(tmp_path_factory.mktemp("SAT")), "official"))


def _truth(question: Question) -> str:
    return question.options["AB".index(question.answer)]


def test_who_knows_the_truth_scores_100_in_every_column(questions: tuple[Question, ...]) -> None:
    table = score_all(_BENCH, questions, lambda question: f"It is {_truth(question).upper()}.")
    assert tuple(table) == _BENCH.columns
    assert set(table.values()) == {100.0}


def test_who_takes_the_first_option_is_right_in_one_order_only_and_scores_nothing(
    questions: tuple[Question, ...],
) -> None:
    assert set(score_all(_BENCH, questions, lambda question: question.options[0]).values()) == {0.0}


def test_a_constant_word_scores_the_items_it_answers(questions: tuple[Question, ...]) -> None:
    table = score_all(_BENCH, questions, lambda _: "left")
    assert table == {"Avg": pytest.approx(100 * 2 / 6), "EgoM": 100, "ObjM": 0, "EgoAct": 0, "GoalAim": 0, "Pers": 50}


def test_both_orders_are_asked_and_share_an_item(questions: tuple[Question, ...]) -> None:
    first, second = questions[:2]
    assert (first.id, second.id, first.tags["item"], second.tags["item"]) == ("0/published", "0/reversed", "0", "0")
    assert (first.options, second.options) == (("left", "right"), ("right", "left"))
    assert (first.answer, second.answer) == ("A", "B")
    assert second.prompt == (
        "Answer in natural language. Question 0? Answer the question using a single word or phrase. "
        'Choose between the following options: "right" or "left".'
    )
    assert (first.shown.images, questions[2].shown.images) == ((png(0),), (png(1), png(101)))


def test_an_item_of_which_one_order_is_missing_is_not_right(questions: tuple[Question, ...]) -> None:
    assert _BENCH.table([Scored(question=questions[0], score=1.0)]) == {"Avg": 0, "EgoM": 0}


def test_an_item_that_a_resample_draws_twice_counts_twice(questions: tuple[Question, ...]) -> None:
    right = [Scored(question=question, score=1.0) for question in questions[:2]]
    wrong = [Scored(question=question, score=0.0) for question in questions[2:4]]
    assert _BENCH.table(right + right + wrong)["Avg"] == pytest.approx(100 * 2 / 3)


@pytest.mark.parametrize(
    ("item", "reply", "answer"),
    [
        (0, "to the Left", "A"),
        (0, "left or right", ""),
        (0, "up", ""),
        (3, "left", "A"),
        (3, "Left and forward", "B"),
        (3, "left and forward, not left", ""),
    ],
)
def test_the_one_option_that_a_reply_names_is_its_answer(
    questions: tuple[Question, ...], item: int, reply: str, answer: str
) -> None:
    parsed = _BENCH.parse(questions[2 * item], reply, "official", seed=0)
    assert (parsed.answer, parsed.is_matched) == (answer, bool(answer))


def test_replies_that_name_no_option_are_counted(questions: tuple[Question, ...]) -> None:
    assert count_unmatched(_BENCH, questions, lambda _: "moved left") == 2  # "no", "yes" in both orders


def test_pictures_as_the_hubs_own_writer_stores_them_are_the_same(tmp_path: Path) -> None:
    plain = _BENCH.read(sat_data.build(tmp_path / "plain"), "official")
    assert plain == _BENCH.read(sat_data.build(tmp_path / "structs", as_structs=True), "official")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"question_type": "other"}, "row 0 has the task 'other'; known are ego_movement"),
        ({"correct_answer": "up"}, "right one 'up'; it must be one of them"),
        ({"answers": ["left"]}, "1 options"),
        ({"answers": ["left", "left"]}, "it must be one of them"),
        ({"image_bytes": []}, "row 0 holds no list of encoded pictures"),
    ],
)
def test_a_row_that_cannot_be_asked_is_named_in_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = sat_data.build(tmp_path, [sat_data.ROWS[0] | changes])
    with pytest.raises(RequestError, match=message):
        _BENCH.read(folder, "official")
