"""VLM4D: what its published folder holds, how it is asked, and what replies score."""

from pathlib import Path
from typing import Any, ClassVar

import pytest

from p4dprep.errors import RequestError
from student.evaluate.benchmark import Parsed
from student.evaluate.registry import BENCHMARKS
from tests.student.evaluate.contract import BenchmarkContract, answered, changed, constant, percent, touch, write_json
from tests.student.evaluate.vlm4d_data import CATEGORIES, HUB, REAL, SYNTHETIC, TRUTH, record, write_vlm4d

BENCH = BENCHMARKS["vlm4d"]


class TestContract(BenchmarkContract):
    name: ClassVar[str] = "vlm4d"

    def write(self, folder: Path) -> Path:
        return write_vlm4d(folder)


def test_answers_are_the_letters_of_their_texts_whatever_their_types(tmp_path: Path) -> None:
    questions = BENCH.read(write_vlm4d(tmp_path), "official")
    assert "".join(question.answer for question in questions) == TRUTH
    assert questions[1].options == ("1", "2", "0", "3")


def test_the_prompt_is_the_authors_own_for_direct_answers(tmp_path: Path) -> None:
    question = BENCH.read(write_vlm4d(tmp_path), "official")[1]
    assert question.prompt == (
        "\nQuestion: Where to in 922?\nA: 1\nB: 2\nC: 0\nD: 3\n\nDo not generate any intermediate reasoning process. "
        "Answer directly with the option letter from the given choices.\n"
    )


def test_both_splits_count_from_one_and_stay_apart(tmp_path: Path) -> None:
    ids = [question.id for question in BENCH.read(write_vlm4d(tmp_path), "official")]
    assert (ids[0], ids[4]) == ("real/validation_1", "synthetic/validation_1")


def test_sides_and_kinds_are_the_authors_own(tmp_path: Path) -> None:
    assert tuple(question.category for question in BENCH.read(write_vlm4d(tmp_path), "official")) == CATEGORIES


@pytest.mark.parametrize("place", [".", "QA", "data"])
def test_the_questions_lie_beside_the_videos_or_in_their_own_folder(tmp_path: Path, place: str) -> None:
    write_vlm4d(tmp_path, questions=place)
    assert len(BENCH.read(tmp_path, "official")) == 8
    assert BENCH.files(tmp_path) == (tmp_path / place / "real_mc.json", tmp_path / place / "synthetic_mc.json")


def test_a_split_that_is_not_there_is_left_out(tmp_path: Path) -> None:
    real = BENCH.read(write_vlm4d(tmp_path / "real", synthetic=()), "official")
    assert set(BENCH.table(answered(BENCH, real, constant("A")))) == {"Real", "Ego", "Exo", "Overall"}
    synthetic = BENCH.read(write_vlm4d(tmp_path / "synthetic", real=()), "official")
    table = BENCH.table(answered(BENCH, synthetic, constant("A")))
    assert set(table) == {"Synthetic", "Directional", "FP", "Overall"}


@pytest.mark.parametrize(
    ("video", "path"),
    [
        (f"{HUB}/videos_real/davis/x y.mp4", "videos_real/davis/x y.mp4"),
        (f"{HUB}/videos_real/davis/x%20y.mp4?download=true", "videos_real/davis/x y.mp4"),
        ("https://mirror.example/a/resolve/0a1b2c/videos_real/davis/x y.mp4", "videos_real/davis/x y.mp4"),
        ("videos_real/davis/x y.mp4", "videos_real/davis/x y.mp4"),
    ],
)
def test_an_address_on_the_hub_is_a_path_below_the_folder(tmp_path: Path, video: str, path: str) -> None:
    touch(tmp_path / path)
    write_json(tmp_path / "real_mc.json", [changed(REAL[0], video=video)])
    assert BENCH.read(tmp_path, "official")[0].shown.video == (tmp_path / path).resolve()


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("B", "B"),
        (" C: right", "C"),
        ("D. the answer is A", "D"),
        ("So the answer is b.", "B"),
        ("B, C? Answer - D", "B"),
        ("Probably (C), not D", "C"),
        ("answer:A or B", "A"),
        ("I choose D", "D"),
    ],
)
def test_letters_are_read_by_the_offline_rule(tmp_path: Path, reply: str, letter: str) -> None:
    question = BENCH.read(write_vlm4d(tmp_path), "official")[0]
    assert BENCH.parse(question, reply, "official", 0) == Parsed(answer=letter, is_matched=True)


@pytest.mark.parametrize("reply", ["left", "E", "the answer is unknown", "b", "AB"])
def test_what_holds_no_letter_is_wrong_and_counted(tmp_path: Path, reply: str) -> None:
    question = BENCH.read(write_vlm4d(tmp_path), "official")[0]
    assert BENCH.parse(question, reply, "official", 0) == Parsed(answer="", is_matched=False)


@pytest.mark.parametrize("letter", "ABCD")
def test_a_constant_letter_scores_what_counting_says(tmp_path: Path, letter: str) -> None:
    table = BENCH.table(answered(BENCH, BENCH.read(write_vlm4d(tmp_path), "official"), constant(letter)))
    right = [truth == letter for truth in TRUTH]
    assert table == {
        "Real": percent(right[:4]),
        "Ego": percent(right[2:4]),
        "Exo": percent(right[:2]),
        "Synthetic": percent(right[4:]),
        "Directional": percent([right[4], right[7]]),
        "FP": percent(right[5:7]),
        "Overall": percent(right),
    }
    assert tuple(table) == BENCH.columns


def test_averages_are_over_questions_not_over_splits(tmp_path: Path) -> None:
    questions = BENCH.read(write_vlm4d(tmp_path, real=[*REAL, *REAL[:2]]), "official")
    table = BENCH.table(answered(BENCH, questions, constant("A")))
    assert (table["Real"], table["Synthetic"], table["Overall"]) == (100 / 6, 50.0, 30.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id": "seven"}, r"real_mc\.json: record 1 has the id 'seven'; it must end in _NUMBER"),
        ({"choices": ["left", "right"]}, r"record 1 has choices \['left', 'right'\]; it must name an option for each"),
        ({"choices": {"A": "left", "C": "right"}}, r"record 1 has choices .*; it must name an option for each letter"),
        ({"choices": ...}, r"record 1 lacks choices; it has answer, "),
        ({"video": "https://example.com/x.mp4"}, r"record 1 has the video .*; it must be an address with /resolve/"),
        ({"video": f"{HUB}/%2e%2e/x.mp4"}, r"record 1: media path '\.\./x\.mp4' must stay under the media folder"),
        ({"video": f"{HUB}//etc/passwd"}, r"record 1: media path '/etc/passwd' must stay under the media folder"),
        ({"video": None}, r"record 1 shows no media, which .* lacks; download it whole"),
    ],
)
def test_a_broken_record_is_refused_in_one_line(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    write_vlm4d(tmp_path)
    write_json(tmp_path / "real_mc.json", [REAL[0], changed(REAL[1], **fields)])
    with pytest.raises(RequestError, match=message):
        BENCH.read(tmp_path, "official")


def test_a_truth_that_is_no_choice_scores_nothing(tmp_path: Path) -> None:
    odd = record(5, "videos_synthetic/synth_001.mp4", ["left", "right", "up", "down"], "sideways")
    question = BENCH.read(write_vlm4d(tmp_path, synthetic=[*SYNTHETIC, odd]), "official")[-1]
    assert [each.score for letter in "ABCD" for each in answered(BENCH, [question], constant(letter))] == [0.0] * 4
