import math
from pathlib import Path
from typing import Any

import pytest

from p4dprep.errors import RequestError
from student.evaluate.benchmark import Question
from student.evaluate.common import mean_relative_accuracy
from student.evaluate.registry import find
from tests.student.evaluate import vsti_data
from tests.student.evaluate.asking import count_unmatched, score_all

_BENCH = find("vsti-bench")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vsti_data.build(tmp_path_factory.mktemp("vstibench"))


@pytest.fixture(scope="module")
def questions(data: Path) -> tuple[Question, ...]:
    return tuple(_BENCH.read(data, "official"))


def test_who_knows_the_truth_scores_100_in_every_column(questions: tuple[Question, ...]) -> None:
    table = score_all(_BENCH, questions, lambda question: question.answer)
    assert tuple(table) == _BENCH.columns
    assert set(table.values()) == {100.0}


def test_a_constant_letter_scores_the_unweighted_mean_over_question_types(questions: tuple[Question, ...]) -> None:
    table = score_all(_BENCH, questions, lambda _: "A.")
    assert table["obj_obj_relative_pos_nf"] == pytest.approx(100 / 3)
    assert table["camera_displacement"] == 0
    assert table["Avg"] == pytest.approx((100 / 3 + 6 * 100 + 3 * 0) / 10)
    assert count_unmatched(_BENCH, questions, lambda _: "A.") == 3  # the three numbers


def test_prompts_are_the_official_ones_and_numbers_are_asked_without_their_options(
    questions: tuple[Question, ...],
) -> None:
    assert questions[0].prompt == (
        "These are frames of a video.\nIn frame 6 of 31, what of obj_obj_relative_pos_nf?\n"
        "Options:\nA. Near\nB. Far\nAnswer with the option's letter from the given choices directly."
    )
    assert questions[7].prompt == (
        "These are frames of a video.\nIn frame 6 of 31, what of camera_obj_abs_dist?\n"
        "Please answer the question using a single word or phrase."
    )
    assert (questions[7].options, questions[7].answer) == ((), "1.3")


def test_options_printed_as_text_are_options_all_the_same(questions: tuple[Question, ...]) -> None:
    assert questions[1].options == ("Up", "Down")


def test_the_frames_a_question_is_about_do_not_choose_what_is_shown(
    data: Path, questions: tuple[Question, ...]
) -> None:
    assert questions[0].shown.video == data / vsti_data.VIDEO
    assert questions[0].shown.frame_indices is None


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("A", "A"),
        (" b. It is far", "B"),
        ("A.\n", "A"),
        ("A\nbecause", ""),
        ("(A)", ""),
        ("Near", ""),
        ("C", ""),
        ("", ""),
    ],
)
def test_the_first_word_of_a_reply_is_the_letter(questions: tuple[Question, ...], reply: str, answer: str) -> None:
    parsed = _BENCH.parse(questions[0], reply, "official", seed=0)
    assert (parsed.answer, parsed.is_matched) == (answer, bool(answer))


@pytest.mark.parametrize(
    ("reply", "score"),
    [("1.3 metres", 1.0), ("1.3.", 1.0), ("1.0", 0.6), ("1.3m", 0.0), ("about 1.3", 0.0), ("inf", 0.0), ("nan", 0.0)],
)
def test_a_number_is_worth_its_mean_relative_accuracy(
    questions: tuple[Question, ...], reply: str, score: float
) -> None:
    parsed = _BENCH.parse(questions[7], reply, "official", seed=0)
    assert _BENCH.score(questions[7], parsed) == pytest.approx(score)
    assert parsed.is_matched == (score > 0)


@pytest.mark.parametrize(
    ("predicted", "accuracy"), [(1.0, 1.0), (1.07, 0.9), (0.88, 0.8), (1.47, 0.1), (1.6, 0.0), (-1.0, 0.0)]
)
def test_mean_relative_accuracy_counts_the_confidences_met(predicted: float, accuracy: float) -> None:
    assert mean_relative_accuracy(predicted, 1.0) == pytest.approx(accuracy)
    assert mean_relative_accuracy(math.nan, 1.0) == 0


def test_the_revision_is_of_the_questions_alone_and_the_erratum_is_never_read(tmp_path: Path) -> None:
    folder = vsti_data.build(tmp_path / "vstibench")
    (folder / "erratum_dropped_items.json").write_bytes(b"\xff no JSON")
    assert len(_BENCH.read(folder, "official")) == 12
    assert _BENCH.files(folder) == (folder / "test.json",)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("camera_displacement", {"question_type": "camera_speed"}, "record 0 has the task 'camera_speed'; known are"),
        ("camera_displacement", {"ground_truth": 0}, "ground_truth 0; it must be a number above 0"),
        ("camera_displacement", {"ground_truth": "far"}, "ground_truth 'far'; it must be a number"),
        ("camera_obj_rel_dist_v3", {"mc_answer": None}, "mc_answer None; it must be one of AB"),
        ("camera_obj_rel_dist_v3", {"options": "no list"}, "options 'no list'; they must be a list"),
        ("camera_obj_rel_dist_v3", {"options": None}, "options None; they must be a list"),
        ("camera_obj_rel_dist_v3", {"video_path": "../secret.mp4"}, "secret.mp4"),
        ("camera_obj_rel_dist_v3", {"video_path": "ScanNet/gone.mp4"}, "gone.mp4, which .* lacks"),
    ],
)
def test_a_record_that_cannot_be_asked_is_named_in_one_line(
    tmp_path: Path, kind: str, changes: dict[str, Any], message: str
) -> None:
    folder = vsti_data.build(tmp_path / "vstibench", [vsti_data.record(0, kind, **changes)])
    with pytest.raises(RequestError, match=message) as error:
        _BENCH.read(folder, "official")
    assert "\n" not in str(error.value)
