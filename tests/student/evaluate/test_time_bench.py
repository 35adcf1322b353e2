"""TimeBench: five lengths of a video, of which one is true."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from p4dprep.errors import RequestError
from student.evaluate.registry import BENCHMARKS
from tests.student.evaluate.contract import BenchmarkContract, answered, changed, constant, percent, touch, write_json
from tests.student.evaluate.worlds_data import RECIPE, write_worlds

BENCH = BENCHMARKS["time-bench"]
RECORD: dict[str, Any] = {
    "id": "x-time",
    "benchmark": "worlds",
    "task": "TimeBench",
    "video": "x.mp4",
    "source": "x.mp4",
    "som_image": "",
    "question": "How long?",
    "question_raw": "How long?",
    "options": ["4.00 seconds", "16.00 seconds", "1.00 seconds", "8.00 seconds", "2.00 seconds"],
    "answer": "4.00 seconds",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_worlds(tmp_path_factory.mktemp("worlds"))


class TestContract(BenchmarkContract):
    name: ClassVar[str] = "time-bench"

    @pytest.fixture
    def data(self, made: Path) -> Path:
        return made


def written(folder: Path, **fields: object) -> Path:
    """A folder with one question."""
    touch(folder / "x.mp4")
    write_json(folder / "timebench.json", [changed(RECORD, **fields)])
    return folder


def test_the_truth_is_the_scene_s_length(made: Path) -> None:
    for number, question in enumerate(BENCH.read(made, "official")):
        seconds = RECIPE.scene(number).duration_seconds
        assert question.options["ABCDE".index(question.answer)] == f"{seconds:.2f} seconds"


@pytest.mark.parametrize("letter", "ABCDE")
def test_a_constant_letter_scores_what_counting_says(made: Path, letter: str) -> None:
    records = json.loads((made / "timebench.json").read_text())
    right = [record["options"].index(record["answer"]) == "ABCDE".index(letter) for record in records]
    table = BENCH.table(answered(BENCH, BENCH.read(made, "official"), constant(letter)))
    assert table == {"Avg": percent(right)}


def test_nothing_tells_the_length(made: Path) -> None:
    assert BENCH.modes == ("official", "words")
    for mode in BENCH.modes:
        assert not any("sampled from a video of" in question.prompt for question in BENCH.read(made, mode))


def test_words_are_asked_as_the_lessons_of_plain_worlds_are(tmp_path: Path) -> None:
    folder = write_worlds(tmp_path, recipe=replace(RECIPE, split="plain_train"))
    lessons = json.loads((folder / "qa.json").read_text())
    taught = {turn["value"].removeprefix("<video>\n") for lesson in lessons for turn in lesson["conversations"]}
    for question in BENCH.read(folder, "words"):
        assert not question.options
        assert question.prompt in taught
        assert f"{question.answer} seconds" in taught


@pytest.mark.parametrize(
    ("reply", "score"),
    [("4.00 seconds", 1.0), ("about 4.2", 1.0), ("4.9 seconds", 0.6), ("8.00 seconds", 0.0), ("no idea", 0.0)],
)
def test_words_are_worth_their_mean_relative_accuracy(tmp_path: Path, reply: str, score: float) -> None:
    (question,) = BENCH.read(written(tmp_path), "words")
    parsed = BENCH.parse(question, reply, "words", 0)
    assert parsed.is_matched == any(map(str.isdigit, reply))
    assert BENCH.score(question, parsed) == pytest.approx(score)


def test_lengths_may_be_rounded(tmp_path: Path) -> None:
    options = [f"{factor * 2.874999:.2f} seconds" for factor in (0.25, 4, 1, 2, 0.5)]
    assert BENCH.read(written(tmp_path, options=options, answer=options[2]), "official")[0].answer == "C"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"answer": "2.00 seconds"},
            r"timebench\.json: worlds/x-time offers 4\.00 seconds, 16\.00 seconds, .*; TimeBench",
        ),
        ({"answer": "5.00 seconds"}, r"TimeBench offers 0\.25, 0\.5, 1\.0, 2\.0, 4\.0 times the truth in seconds"),
        ({"options": RECORD["options"][:4]}, r"worlds/x-time offers .*; TimeBench offers"),
        ({"options": [*RECORD["options"][:4], "two"]}, r"worlds/x-time offers .*; TimeBench offers"),
        ({"task": "Counting"}, r"record 0 has the task 'Counting'; known are TimeBench"),
    ],
)
def test_what_is_no_time_bench_is_refused_in_one_line(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        BENCH.read(written(tmp_path, **fields), "official")
