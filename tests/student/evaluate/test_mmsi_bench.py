from pathlib import Path
from typing import Any

import pytest

from p4dprep.errors import RequestError
from student.evaluate.benchmark import Question
from student.evaluate.registry import find
from tests.student.evaluate import mmsi_data
from tests.student.evaluate.asking import count_unmatched, png, score_all

_BENCH = find("mmsi-bench")


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Question, ...]:
    return tuple(_BENCH.read(mmsi_data.build(tmp_path_factory.mktemp("MMSI")), "official"))


def test_who_knows_the_truth_scores_100_in_every_column(questions: tuple[Question, ...]) -> None:
    table = score_all(_BENCH, questions, lambda question: f"``{question.answer}``")
    assert tuple(table) == _BENCH.columns
    assert set(table.values()) == {100.0}


def test_a_constant_letter_scores_its_share_of_all_questions(questions: tuple[Question, ...]) -> None:
    table = score_all(_BENCH, questions, lambda _: "`C`")
    assert table["Avg"] == pytest.approx(100 * 3 / 12)
    assert table["MSR"] == 50
    assert table["Motion (Obj.)"] == 0


def test_a_question_is_asked_in_the_official_words_with_all_its_pictures(questions: tuple[Question, ...]) -> None:
    assert questions[0].prompt == (
        "Where to? Options: A: north 0, B: south, C: east, D: west\n"
        "Answer with the option's letter from the given choices directly. Enclose the option's letter within ``."
    )
    assert questions[0].shown.images == (png(0), png(100))


def test_hyphens_and_dashes_name_the_same_type(questions: tuple[Question, ...]) -> None:
    assert questions[3].category == "Positional Relationship (Cam.–Obj.)"


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("``B``", "B"),
        ("A or C? ``B``", "B"),
        ("``(B)``", "B"),
        ("`B`", "B"),
        ("A. `D`", "D"),
        ("A. Thus \\boxed{B}", "B"),
        ("``{C}``", "C"),
        ("The answer is B", "B"),
        ("A bike stands at B.", "B"),
        ("B. south", "B"),
        ("b", ""),
        ("``none``, so A", ""),  # what is enclosed is all that counts
        ("E", ""),
        ("Answer", ""),
    ],
)
def test_the_letter_is_looked_for_in_back_ticks_then_in_braces_then_alone(
    questions: tuple[Question, ...], reply: str, answer: str
) -> None:
    parsed = _BENCH.parse(questions[0], reply, "official", seed=0)
    assert (parsed.answer, parsed.is_matched) == (answer, bool(answer))


def test_replies_without_a_letter_are_counted_and_wrong(questions: tuple[Question, ...]) -> None:
    assert count_unmatched(_BENCH, questions, lambda _: "north") == 12
    assert score_all(_BENCH, questions, lambda _: "north")["Avg"] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"question_type": "Smell"}, r"MMSI_Bench.parquet: row 0 has the task 'Smell'; known are Positional"),
        ({"answer": "north"}, "answer 'north'; it must be a letter from A to D"),
        ({"images": None}, "row 0 holds no list of encoded pictures"),
    ],
)
def test_a_row_that_cannot_be_asked_is_named_in_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = mmsi_data.build(tmp_path, [mmsi_data.rows()[0] | changes])
    with pytest.raises(RequestError, match=message):
        _BENCH.read(folder, "official")


def test_a_folder_without_the_parquet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"MMSI_Bench.parquet does not exist; --data must be"):
        _BENCH.read(tmp_path, "official")
