"""What holds for every benchmark of questions; one class of tests for each subclasses it."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from p4dprep.errors import RequestError
from student.evaluate.benchmark import Benchmark, Question, Scored
from student.evaluate.registry import BENCHMARKS

Model = Callable[[Question], str]


def truth(question: Question) -> str:
    """The oracle: it knows the answer, and says it as benchmarks ask for it."""
    return f"({question.answer})"


def constant(letter: str) -> Model:
    return lambda _: letter


def answered(benchmark: Benchmark, questions: Sequence[Question], model: Model, mode: str = "official") -> list[Scored]:
    """What a model's replies score."""
    return [
        Scored(question=each, score=benchmark.score(each, benchmark.parse(each, model(each), mode, 0)))
        for each in questions
    ]


def percent(flags: Sequence[bool]) -> float:
    return 100 * sum(flags) / len(flags)


class BenchmarkContract:
    """Subclasses name a benchmark and how its folder is written, every truth among the options."""

    name: ClassVar[str]

    def write(self, folder: Path) -> Path:
        """The folder in the published layout."""
        raise NotImplementedError

    @property
    def benchmark(self) -> Benchmark:
        return BENCHMARKS[self.name]

    @pytest.fixture
    def data(self, tmp_path: Path) -> Path:
        return self.write(tmp_path)

    def test_an_oracle_scores_a_hundred_in_every_column_and_mode(self, data: Path) -> None:
        for mode in self.benchmark.modes:
            table = self.benchmark.table(answered(self.benchmark, self.benchmark.read(data, mode), truth, mode))
            assert set(table.values()) == {100.0}, (mode, table)
            assert list(table) == [column for column in self.benchmark.columns if column in table]

    def test_every_question_has_an_id_of_its_own_and_shows_what_is_there(self, data: Path) -> None:
        questions = self.benchmark.read(data, "official")
        assert len({question.id for question in questions}) == len(questions) > 1
        for question in questions:
            assert question.shown.video is not None
            assert question.shown.video.is_file()
            assert question.answer in "ABCDEFGHIJ"[: len(question.options)]

    def test_silence_is_never_matched(self, data: Path) -> None:
        question = self.benchmark.read(data, "official")[0]
        assert not any(self.benchmark.parse(question, reply, "official", 0).is_matched for reply in ("", "hm", " \n"))

    def test_reading_twice_gives_the_same_questions(self, data: Path) -> None:
        assert list(self.benchmark.read(data, "official")) == list(self.benchmark.read(data, "official"))

    def test_an_empty_folder_says_which_file_is_missing(self, tmp_path: Path) -> None:
        empty = tmp_path / "empty"
        empty.mkdir()
        with pytest.raises(RequestError, match=r"empty/\S+ does not exist; --data must be the benchmark's folder"):
            self.benchmark.read(empty, "official")

    def test_files_of_the_revision_are_those_read(self, data: Path) -> None:
        assert all(path.is_file() for path in self.benchmark.files(data))


def write_json(path: Path, records: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records))
    return path


def touch(path: Path) -> Path:
    """A file of media that no reader opens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def changed(record: dict[str, Any], **fields: object) -> dict[str, Any]:
    """The record with other values; a field that is `...` is left out."""
    return {key: value for key, value in {**record, **fields}.items() if value is not ...}
