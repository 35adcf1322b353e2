"""R4D-Bench: what its published folder holds, how it is asked, and what replies score."""

from pathlib import Path
from typing import Any, ClassVar

import pytest

from p4dprep.errors import RequestError
from student.evaluate.benchmark import Question
from student.evaluate.registry import BENCHMARKS
from tests.student.evaluate.contract import BenchmarkContract, answered, changed, constant, percent, write_json
from tests.student.evaluate.r4d_data import LETTERS, RECORDS, record, write_r4d

BENCH = BENCHMARKS["r4d-bench"]
PREAMBLE = (
    "The first image is a set-of-mark annotation of a key frame from the video, with bounding boxes labeled <obj_1>, "
    "<obj_2>, etc. References to <obj_N> in the question correspond to those labeled regions."
)


class TestContract(BenchmarkContract):
    name: ClassVar[str] = "r4d-bench"

    def write(self, folder: Path) -> Path:
        return write_r4d(folder)


def only(folder: Path, each: dict[str, Any], mode: str = "official") -> Question:
    """The one question of a folder with one record."""
    (question,) = BENCH.read(write_r4d(folder, [each]), mode)
    return question


def refused(folder: Path, each: dict[str, Any], match: str) -> None:
    write_r4d(folder)
    write_json(folder / "test.json", [RECORDS[0], each])
    with pytest.raises(RequestError, match=match):
        BENCH.read(folder, "official")


def test_answers_are_the_letters_of_their_texts_whatever_their_types(tmp_path: Path) -> None:
    questions = BENCH.read(write_r4d(tmp_path), "official")
    assert "".join(question.answer for question in questions) == LETTERS
    assert questions[1].options == ("1", "2", "3 m", "4")
    assert questions[4].options == ("left", "right", "not", "")


def test_ids_that_two_sources_share_stay_apart(tmp_path: Path) -> None:
    ids = [question.id for question in BENCH.read(write_r4d(tmp_path), "official")]
    assert (ids[0], ids[3]) == ("stibench/7", "vlm4d/7")


def test_an_id_that_comes_twice_is_numbered(tmp_path: Path) -> None:
    ids = [question.id for question in BENCH.read(write_r4d(tmp_path, [RECORDS[0]] * 3), "official")]
    assert ids == ["stibench/7", "stibench/7#2", "stibench/7#3"]


def test_the_prompt_is_the_harness_s(tmp_path: Path) -> None:
    question = only(tmp_path, RECORDS[1])
    assert question.prompt == (
        f"{PREAMBLE}\n\nWhat of <obj_1> in 8?\n\nOptions:\n(A) 1\n(B) 2\n(C) 3 m\n(D) 4\n\n"
        "Answer with only the letter of the correct option."
    )
    assert question.shown.video == (tmp_path / "clipped/stibench/clip.mp4").resolve()
    assert question.shown.first_frame_marks == (tmp_path / "images/stibench/8.png").resolve()


@pytest.mark.parametrize("absent", ["", None, ...])
def test_a_question_without_marks_has_no_preamble(tmp_path: Path, absent: object) -> None:
    question = only(tmp_path, changed(RECORDS[1], som_image=absent))
    assert question.prompt.startswith("What of <obj_1> in 8?\n\nOptions:")
    assert question.shown.first_frame_marks is None


def test_the_mode_seconds_tells_the_length_of_what_is_shown(tmp_path: Path) -> None:
    sentence = "These images are uniformly sampled from a video of {} seconds.\nWhat of <obj_1> in"
    write_r4d(tmp_path)
    asked = [question.prompt for question in BENCH.read(tmp_path, "seconds")]
    assert f"\n\n{sentence.format('2.00')} 7?" in asked[0]
    assert f"\n\n{sentence.format('3.00')} 7?" in asked[3]
    assert not any("seconds" in question.prompt for question in BENCH.read(tmp_path, "official"))


def test_a_video_without_a_length_is_named(tmp_path: Path) -> None:
    write_r4d(tmp_path)
    (tmp_path / "clipped/stibench/clip.mp4").write_bytes(b"no video")
    with pytest.raises(RequestError, match=r"clip\.mp4 tells no length: .*; download it again"):
        BENCH.read(tmp_path, "seconds")


def test_older_copies_call_the_question_new(tmp_path: Path) -> None:
    old = changed(RECORDS[0], question=..., question_raw=..., question_new="Where is <obj_1>?", question_old="Where?")
    assert "\n\nWhere is <obj_1>?\n\n" in only(tmp_path, old).prompt
    assert "\n\nWhere?\n\n" in only(tmp_path, changed(old, question_new=None)).prompt


def test_a_clip_that_was_not_cut_is_shown_whole_and_tagged(tmp_path: Path) -> None:
    write_r4d(tmp_path, RECORDS[:1])
    assert BENCH.read(tmp_path, "official")[0].tags["video"] == "clipped/stibench/clip.mp4"
    (tmp_path / "clipped/stibench/clip.mp4").unlink()
    (question,) = BENCH.read(tmp_path, "official")
    assert question.shown.video == (tmp_path / "videos/stibench/clip.mp4").resolve()
    assert question.tags == {"benchmark": "stibench", "video": "videos/stibench/clip.mp4"}


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B. 2", "B"),
        ("The best answer is B", "B"),
        ("The correct option is: (C).", "C"),
        ("A or rather (B)", "B"),
        ("(E) no, (D)", "D"),
        ("E, D", "D"),
        ("I think that it is D", "D"),
        ("Answer:C", "C"),
        ("Best answer: B", "B"),
        ("The answer isB", "B"),
    ],
)
def test_letters_are_read_by_the_official_rule(tmp_path: Path, reply: str, letter: str) -> None:
    parsed = BENCH.parse(only(tmp_path, RECORDS[1]), reply, "official", 0)
    assert (parsed.answer, parsed.is_matched) == (letter, True)


def test_letters_go_beyond_e(tmp_path: Path) -> None:
    question = only(tmp_path, record(1, "stibench", "Counting", list(range(14)), 13))
    assert question.answer == "N"
    assert [BENCH.parse(question, reply, "official", 0).answer for reply in ("(N)", "N")] == ["N", "N"]
    assert not BENCH.parse(question, "(O)", "official", 0).is_matched


def test_a_guess_hangs_on_seed_and_question_only_and_is_counted(tmp_path: Path) -> None:
    questions = BENCH.read(write_r4d(tmp_path), "official")
    guesses = {
        seed: "".join(BENCH.parse(question, "no idea", "official", seed).answer for question in questions)
        for seed in range(200)
    }
    assert guesses[3] == "".join(BENCH.parse(question, "who knows", "seconds", 3).answer for question in questions)
    assert len(set(guesses.values())) > 190
    first = [guess[0] for guess in guesses.values()]
    assert {letter: 20 < first.count(letter) < 60 for letter in "ABCDE"} == dict.fromkeys("ABCDE", True)
    assert not any(BENCH.parse(question, "no idea", "official", 0).is_matched for question in questions)


@pytest.mark.parametrize("answer", ["a bus", None, "", 5.5])
def test_a_truth_that_is_no_option_scores_nothing_whatever_is_said(tmp_path: Path, answer: object) -> None:
    question = only(tmp_path, record(1, "vlm4d", "Counting", ["car", None, 2, 3], answer))
    assert question.answer == ""
    assert [each.score for letter in "ABCD" for each in answered(BENCH, [question], constant(letter))] == [0.0] * 4
    assert BENCH.score(question, BENCH.parse(question, "hm", "official", 0)) == 0


def test_of_options_that_read_alike_only_the_first_is_right(tmp_path: Path) -> None:
    question = only(tmp_path, RECORDS[2])
    assert [each.score for letter in "AC" for each in answered(BENCH, [question], constant(letter))] == [1.0, 0.0]


@pytest.mark.parametrize("letter", "ABCDE")
def test_a_constant_letter_scores_what_counting_says(tmp_path: Path, letter: str) -> None:
    # Questions with five options guess, where others have no E.
    questions = BENCH.read(write_r4d(tmp_path), "official")
    table = BENCH.table(
        answered(BENCH, [each for each in questions if letter < "E" or len(each.options) == 5], constant(letter))
    )
    if letter == "E":
        assert table == {"Avg": 200 / 3, "Sta": 100.0, "Dyn": 50.0, "VG": 100.0, "SA": 100.0, "DP": 0.0}
        return
    right = [truth == letter for truth in LETTERS]
    assert table["Avg"] == percent(right)
    assert (table["Sta"], table["Dyn"]) == (percent(right[:3]), percent(right[3:]))
    single = dict(zip(("VG", "DM", "SR", "C", "R", "T", "FP", "SA", "DP"), right, strict=True))
    assert {name: table[name] for name in single} == {name: 100.0 * each for name, each in single.items()}


def test_columns_are_in_the_paper_s_order(tmp_path: Path) -> None:
    assert BENCH.columns == ("Avg", "Sta", "Dyn", "VG", "DM", "SR", "R", "C", "T", "FP", "SA", "DP")
    table = BENCH.table(answered(BENCH, BENCH.read(write_r4d(tmp_path), "official"), constant("A")))
    assert tuple(table) == BENCH.columns


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "Painting"}, r"test\.json: record 1 has the task 'Painting'; known are 3D Video Grounding, "),
        ({"options": "A B"}, r"record 1 has options 'A B'; it must have a list"),
        ({"options": ["one"]}, r"record 1 has 1 options; a choice needs 2 to 26"),
        ({"answer": ...}, r"record 1 lacks answer; it has benchmark, "),
        ({"question": "", "question_raw": None}, r"record 1 asks nothing; download it again"),
        ({"video": "gone.mp4", "source": None}, r"record 1 shows gone\.mp4, which .* lacks; download it whole"),
        ({"video": None, "source": None}, r"record 1 shows no media, which .* lacks"),
        ({"video": "../secret.mp4"}, r"record 1: media path '\.\./secret\.mp4' must stay under the media folder"),
        ({"som_image": "/etc/passwd"}, r"record 1: media path '/etc/passwd' must stay under the media folder"),
        ({"som_image": "images/none.png"}, r"record 1 shows images/none\.png, which .* lacks"),
    ],
)
def test_a_broken_record_is_refused_in_one_line(tmp_path: Path, fields: dict[str, object], message: str) -> None:
    refused(tmp_path, changed(RECORDS[3], **fields), message)


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret.mp4").touch()
    folder = write_r4d(tmp_path / "data")
    (folder / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    refused(folder, changed(RECORDS[3], video="link.mp4"), r"'link\.mp4' leaves the media folder")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"test\.json cannot be read as JSON: .*; download it again"),
        ("[" * 99999, r"test\.json cannot be read as JSON: .*; download it again"),
        ("{}", r"test\.json must hold a list of questions, at least one"),
        ("[]", r"test\.json must hold a list of questions, at least one"),
        ("[3]", r"test\.json: record 0 is a int; it must be an object"),
        ("version https://git-lfs.github.com/spec/v1", r"test\.json cannot be read as JSON"),
    ],
)
def test_a_file_of_another_kind_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "test.json").write_text(text)
    with pytest.raises(RequestError, match=message) as caught:
        BENCH.read(tmp_path, "official")
    assert "\n" not in str(caught.value)
