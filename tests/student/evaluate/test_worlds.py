"""Our worlds as a benchmark: what `p4dprep worlds` leaves, asked as R4D-Bench is, or as students were trained."""

import json
from pathlib import Path
from typing import ClassVar

import pytest

from p4dprep.errors import RequestError
from p4dprep.worlds.questions import TASK_NAMES
from student.conversations import Report, read_conversations
from student.evaluate.benchmark import Question, Shown
from student.evaluate.registry import BENCHMARKS
from student.evaluate.worlds import Worlds
from student.regions import RegionPrompt, region_text
from tests.student.evaluate.contract import BenchmarkContract, answered, constant, percent, write_json
from tests.student.evaluate.worlds_data import write_worlds

BENCH = BENCHMARKS["worlds"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_worlds(tmp_path_factory.mktemp("worlds"))


class TestContract(BenchmarkContract):
    name: ClassVar[str] = "worlds"

    @pytest.fixture
    def data(self, made: Path) -> Path:
        return made


@pytest.mark.parametrize("letter", "ABCD")
def test_a_constant_letter_scores_what_counting_says(made: Path, letter: str) -> None:
    records = json.loads((made / "test.json").read_text())
    right = [record["options"].index(record["answer"]) == "ABCDE".index(letter) for record in records]
    table = BENCH.table(answered(BENCH, BENCH.read(made, "official"), constant(letter)))
    assert table["Avg"] == percent(right)
    for category, task in TASK_NAMES.items():
        of_task = [each for each, record in zip(right, records, strict=True) if record["task"] == task]
        assert table.get(category) == (percent(of_task) if of_task else None)


def test_officially_the_question_is_asked_as_r4d_bench_asks_it(made: Path) -> None:
    assert BENCH.read(made, "official") == BENCHMARKS["r4d-bench"].read(made, "official")


@pytest.mark.parametrize("how", ["marks", "boxes", "both"])
def test_other_modes_say_word_for_word_what_training_says(made: Path, how: RegionPrompt) -> None:
    conversations = read_conversations([made / "qa.json"], Report())
    trained = {}
    for number in range(len(conversations.table)):
        talk = conversations[number]
        lead = f"{region_text(talk.regions, how)}\n" if talk.regions else ""
        trained[f"worlds/{talk.id}"] = (f"{lead}{talk.turns[0].text}", talk.regions)
    asked = {question.id: question for question in BENCH.read(made, how)}
    with_letters = {name for name, (text, _) in trained.items() if "\nOptions:\n" in text}
    assert 0 < len(with_letters) < len(asked) == len(trained)
    for name in with_letters:
        text, regions = trained[name]
        assert asked[name].prompt == text
        assert asked[name].shown.regions == (() if how == "boxes" else regions)
        assert (asked[name].shown.first_frame_marks is not None) == (how != "boxes" and bool(regions))


def test_a_question_that_training_data_lack_is_named(tmp_path: Path) -> None:
    records = json.loads((write_worlds(tmp_path) / "qa.json").read_text())
    write_json(tmp_path / "qa.json", records[1:])
    message = rf"test\.json asks worlds/{records[0]['id']}, which qa\.json beside it lacks; make the worlds again"
    assert len(BENCH.read(tmp_path, "official")) == len(records)
    with pytest.raises(RequestError, match=message):
        BENCH.read(tmp_path, "marks")
    write_json(tmp_path / "qa.json", [*records[:-1], records[-1] | {"regions": [[0.1, 0.2]]}])
    with pytest.raises(
        RequestError, match=r"qa\.json: record \d+ has regions \[\[0\.1, 0\.2\]\]; make the worlds again"
    ):
        BENCH.read(tmp_path, "boxes")


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("It moves to the left", "B"),
        ("it moves to the left.", "B"),
        ("It does not move", "A"),
        ("(C)", "C"),
        ("to the", ""),
    ],
)
def test_words_mean_the_option_that_they_say(reply: str, letter: str) -> None:
    options = ("It does not move", "It moves to the left", "It moves to the right")
    assert said(options, reply) == letter


@pytest.mark.parametrize(
    ("reply", "letter"), [("0.9 m/s", "B"), ("0.8", "A"), ("about 3 m/s", "C"), ("1 m/s", "B"), ("fast", ""), ("0", "")]
)
def test_a_number_means_the_nearest_option_by_ratio(reply: str, letter: str) -> None:
    assert said(("0.7 m/s", "1 m/s", "2 m/s"), reply) == letter


def said(options: tuple[str, ...], reply: str) -> str:
    """The letter that is read in a reply to a question asked for words; empty where it is a guess."""
    question = Question(id="q", category="T", prompt="?", shown=Shown(), options=options, answer="A")
    parsed = Worlds().parse(question, reply, "words", 0)
    return parsed.answer if parsed.is_matched else ""
