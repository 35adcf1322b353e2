"""STI-Bench: what its published folder holds, how it is asked, and what replies score."""

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest

from p4dprep.errors import RequestError
from student.evaluate.benchmark import Parsed, Question
from student.evaluate.registry import BENCHMARKS
from tests.student.evaluate.contract import BenchmarkContract, answered, changed, constant, percent
from tests.student.evaluate.sti_data import ROWS, SCENES, TRUTH, row, write_sti

BENCH = BENCHMARKS["sti-bench"]
MEASURES = ROWS[0]
TRAJECTORIES = ROWS[6]


class TestContract(BenchmarkContract):
    name: ClassVar[str] = "sti-bench"

    def write(self, folder: Path) -> Path:
        return write_sti(folder)


def only(folder: Path, each: dict[str, Any]) -> Question:
    (question,) = BENCH.read(write_sti(folder, [each]), "official")
    return question


def test_the_prompt_is_the_authors_own(tmp_path: Path) -> None:
    assert only(tmp_path, ROWS[3]).prompt == (
        "From 1.0 s to 2.25 s. What about 3?\n(A) 1.5 m\n(B) 2.5 m\n(C) 12.5 m\n(D) 0.5 m\n(E) 2.5 m/s\n"
        "Please output only the option letter!"
    )


def test_the_whole_video_is_shown_as_the_authors_do(tmp_path: Path) -> None:
    assert only(tmp_path, ROWS[3]).shown.span_seconds is None


@pytest.mark.parametrize("folder", ["video", "videos"])
def test_the_archive_may_unpack_to_either_folder(tmp_path: Path, folder: str) -> None:
    questions = BENCH.read(write_sti(tmp_path, videos=folder), "official")
    assert questions[0].shown.video == (tmp_path / folder / "segment_camera_FRONT.mp4").resolve()


def test_one_published_number_in_two_videos_is_two_ids(tmp_path: Path) -> None:
    ids = [question.id for question in BENCH.read(write_sti(tmp_path), "official")]
    assert ids[:2] == ["segment_camera_FRONT.mp4/1/0.0-4.5", "scene0011_00.mp4/1/0.0-4.5"]


def test_null_options_are_not_asked(tmp_path: Path) -> None:
    question = only(tmp_path, TRAJECTORIES)
    assert question.options == ("straight", "turns", "stops", "turns left")
    assert "(E)" not in question.prompt


def test_candidates_may_be_json_text(tmp_path: Path) -> None:
    as_text = changed(MEASURES, Candidates=json.dumps(MEASURES["Candidates"]))
    assert only(tmp_path, as_text) == only(tmp_path, MEASURES)


def test_scenes_are_told_by_file_names_unless_a_column_tells_them(tmp_path: Path) -> None:
    assert tuple(question.tags["scene"] for question in BENCH.read(write_sti(tmp_path), "official")) == SCENES
    told = [changed(ROWS[0], scene="Indoor"), changed(ROWS[1], scene=None)]
    assert [each.tags["scene"] for each in BENCH.read(write_sti(tmp_path, told), "official")] == ["indoor", "indoor"]


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("(c) 12.5 m", "C"),
        ("A, or (B)", "B"),
        ("Ans='D'", "D"),
        ("answer: e", "E"),
        ("Answer = B", "B"),
        ("Option D fits", "D"),
        ("I say B is correct, not C.", "B"),
        ("It is\nB.\nSure", "B"),
        ("C", "C"),
        (" C \n", "C"),
        ("The answer is C", "C"),
    ],
)
def test_letters_are_read_by_the_official_patterns_in_their_order(tmp_path: Path, reply: str, letter: str) -> None:
    question = only(tmp_path, MEASURES)
    for mode in BENCH.modes:
        assert BENCH.parse(question, reply, mode, 0) == Parsed(answer=letter, is_matched=True)


@pytest.mark.parametrize(
    ("reply", "letter"), [("in the SPACE", "E"), ("2.5 m", ""), ("c", ""), ("**C**", ""), ("", "")]
)
def test_else_the_last_character_counts_officially_but_is_not_matched(tmp_path: Path, reply: str, letter: str) -> None:
    question = only(tmp_path, MEASURES)
    assert BENCH.parse(question, reply, "official", 0) == Parsed(answer=letter, is_matched=False)


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("2.5 m", "B"),
        ("It is 2.5  M.", "B"),
        ("2.5 m/s", "E"),
        ("about 12.5 m away", "C"),
        ("1.5 m or 2.5 m", ""),
        ("32.5 m", ""),
        ("-1.5 m", ""),
        ("1.5 metres", ""),
        ("in the SPACE", ""),
        ("(A) 2.5 m", "A"),
    ],
)
def test_the_mode_values_takes_the_one_option_that_is_said(tmp_path: Path, reply: str, letter: str) -> None:
    question = only(tmp_path, MEASURES)
    assert BENCH.parse(question, reply, "values", 0) == Parsed(answer=letter, is_matched=bool(letter))


def test_of_values_within_each_other_the_longest_is_meant(tmp_path: Path) -> None:
    question = only(tmp_path, TRAJECTORIES)
    assert BENCH.parse(question, "It turns left.", "values", 0).answer == "D"
    assert BENCH.parse(question, "It turns.", "values", 0).answer == "B"


def test_modes_differ_for_a_student_that_answers_with_values(tmp_path: Path) -> None:
    questions = BENCH.read(write_sti(tmp_path), "official")

    def says_values(question: Question) -> str:
        return question.options["ABCDE".index(question.answer)]

    scores = {mode: BENCH.table(answered(BENCH, questions, says_values, mode))["Avg"] for mode in BENCH.modes}
    assert scores == {"official": 0.0, "values": 100.0}


@pytest.mark.parametrize("letter", "ABCDE")
def test_a_constant_letter_scores_what_counting_says(tmp_path: Path, letter: str) -> None:
    table = BENCH.table(answered(BENCH, BENCH.read(write_sti(tmp_path), "official"), constant(letter)))
    right = [truth == letter for truth in TRUTH]
    assert table["Avg"] == percent(right)
    assert [table[each["Task"]] for each in ROWS] == [100.0 * each for each in right]
    for scene in ("indoor", "desktop", "outdoor"):
        assert table[scene] == percent([each for each, place in zip(right, SCENES, strict=True) if place == scene])
    assert tuple(table) == BENCH.columns


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"Task": "Cooking"}, r"qa\.parquet: row 1 has the task 'Cooking'; known are Dimensional Measurement, "),
        ({"Candidates": {"A": "1", "C": "2"}}, r"row 1 has the letters A, C; they must go on from A"),
        ({"Candidates": {"A": "1", "C": None}}, r"row 1 has 1 options; a choice needs 2 to 26"),
        ({"Video": "../x.mp4"}, r"row 1: media path 'video/\.\./x\.mp4' must stay under the media folder"),
    ],
)
def test_a_broken_row_is_refused_in_one_line(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    rows = [changed(ROWS[0], Candidates={"A": "1", "B": "2"}), changed(ROWS[1], **fields)]
    write_sti(tmp_path, rows)
    with pytest.raises(RequestError, match=message):
        BENCH.read(tmp_path, "official")


@pytest.mark.parametrize("candidates", ["(A) 1 (B) 2", "[1, 2]"])
def test_candidates_without_letters_are_refused(tmp_path: Path, candidates: str) -> None:
    write_sti(tmp_path, [changed(MEASURES, Candidates=candidates)])
    with pytest.raises(RequestError, match=r"row 0 has candidates .*; it must name an option for each letter"):
        BENCH.read(tmp_path, "official")


def test_a_missing_video_and_both_its_places_are_named(tmp_path: Path) -> None:
    write_sti(tmp_path)
    (tmp_path / "video" / "000123.mp4").unlink()
    with pytest.raises(RequestError, match=r"row 2 shows video/000123\.mp4 or videos/000123\.mp4, which .* lacks"):
        BENCH.read(tmp_path, "official")


def test_a_truth_without_a_letter_scores_nothing(tmp_path: Path) -> None:
    question = only(tmp_path, row(1, "000123.mp4", "Pose Estimation", ("a", "b"), "E"))
    assert [each.score for letter in "ABCDE" for each in answered(BENCH, [question], constant(letter))] == [0.0] * 5


def test_a_file_of_another_kind_is_refused_in_one_line(tmp_path: Path) -> None:
    write_sti(tmp_path, [changed(MEASURES, Answer=..., ID=...)])
    with pytest.raises(RequestError, match=r"qa\.parquet lacks ID, Answer; it has "):
        BENCH.read(tmp_path, "official")
    (tmp_path / "qa.parquet").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(RequestError, match=r"qa\.parquet cannot be read as parquet: .*; download it again"):
        BENCH.read(tmp_path, "official")
