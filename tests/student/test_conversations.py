"""Conversations in every format of the issue, and files that break its rules."""

import io
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from p4dprep.errors import RequestError
from student import conversations as module
from student.conversations import ERRATUM, Report, convert_sat, iterate_array, read_conversations
from student.samples import Turn


def record(**changes: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<video>\nHow far?"}, {"from": "gpt", "value": "2 m"}]
    return {"id": "a", "video": "v/1.mp4", "conversations": turns} | changes


def write(path: Path, records: Any) -> Path:
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


class TestFormats:
    def test_llava_records_of_video_and_images(self, tmp_path: Path) -> None:
        several = record(id=7, image=["i/1.png", "i/2.png"], video=None)
        four_turns = record(conversations=record()["conversations"] * 2, video=["w.mp4"])
        path = write(tmp_path / "qa.json", [record(), several, record(id=None, image="i.png", video=""), four_turns])
        found = read_conversations([path], Report())
        assert [found[row].id for row in range(len(found))] == ["a", "7", "qa-3", "a"]
        assert found[0].turns == (Turn(role="user", text="How far?"), Turn(role="assistant", text="2 m"))
        assert (found[0].video, found[0].images) == ("v/1.mp4", ())
        assert (found[1].video, found[1].images) == (None, ("i/1.png", "i/2.png"))
        assert (found[2].images, found[3].video, len(found[3].turns)) == (("i.png",), "w.mp4", 4)

    @pytest.mark.parametrize(
        ("value", "text"),
        [
            ("<image>\nWhat is it?", "What is it?"),
            ("<image><image>\n What is it?", "What is it?"),
            ("What is <video> it?", "What is it?"),
            ("What is it?\n<video>", "What is it?"),
            ("Is a < b and <obj_1> red?", "Is a < b and <obj_1> red?"),
        ],
    )
    def test_media_tokens_are_taken_out_and_nothing_else(self, tmp_path: Path, value: str, text: str) -> None:
        turns = [{"from": "human", "value": value}, {"from": "gpt", "value": "yes"}]
        found = read_conversations([write(tmp_path / "qa.json", [record(conversations=turns)])], Report())
        assert found[0].turns[0].text == text

    def test_vsti_is_a_folder_whose_erratum_drops_records(self, tmp_path: Path) -> None:
        write(tmp_path / "qa_b.json", [record(id=3, question_type="x"), record(id="4")])
        write(tmp_path / "qa_a.json", [record(id=1), record(id=2)])
        write(tmp_path / ERRATUM, [2, "3"])
        report = Report()
        found = read_conversations([tmp_path], report)
        assert [found[row].id for row in range(len(found))] == ["1", "4"]
        assert report.counts == {"withdrawn by the erratum": 2}
        one = read_conversations([tmp_path / "qa_b.json"], Report())
        assert [one[row].id for row in range(len(one))] == ["4"]

    def test_robofac_calls_the_speaker_assistant(self, tmp_path: Path) -> None:
        turns = [{"from": "human", "value": "<video>\nDid it work?"}, {"from": "assistant", "value": "No"}]
        path = write(tmp_path / "training_qa.json", [record(conversations=turns, video="simulation_data/1.mp4")])
        assert read_conversations([path], Report())[0].turns[1] == Turn(role="assistant", text="No")

    def test_worlds_write_what_is_read_here(self, tmp_path: Path) -> None:
        from p4dprep.worlds.questions import Question, to_llava

        question = Question(
            id="train-0-1-q3",
            scene_id="train-0-1",
            category="C",
            template="count",
            text="How many balls does <obj_1> pass?",
            regions=(2,),
            names=("red ball",),
            options=("1", "2", "3", "4"),
            answer="2",
            answer_index=1,
        )
        videos, boxes = {"train-0-1": "videos/train-0-1.mp4"}, {"train-0-1": {2: (0.25, 0.5, 0.375, 1.0)}}
        path = write(tmp_path / "qa.json", to_llava([question], videos=videos, boxes=boxes))
        found = read_conversations([path], Report())[0]
        assert (found.id, found.video) == ("train-0-1-q3", "videos/train-0-1.mp4")
        assert found.regions == ((0.25, 0.5, 0.375, 1.0),)
        assert found.turns[0].text.startswith("How many balls does <obj_1> pass?")

    def test_regions_and_clips_are_kept(self, tmp_path: Path) -> None:
        boxes = [[0.1, 0.2, 0.5, 1], [0, 0, 1, 0.5]]
        path = write(tmp_path / "qa.json", [record(regions=boxes, clip="v/1.mp4#0.000-2.000")])
        found = read_conversations([path], Report())[0]
        assert found.regions == ((0.1, 0.2, 0.5, 1.0), (0.0, 0.0, 1.0, 0.5))
        assert found.clip == "v/1.mp4#0.000-2.000"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"video": "/etc/passwd"}, "must stay under the media folder"),
        ({"video": "a/../../b.mp4"}, "must stay under the media folder"),
        ({"video": "s3://bucket/b.mp4"}, "must stay under the media folder"),
        ({"video": "..\\b.mp4"}, "must stay under the media folder"),
        ({"video": "a\n.mp4"}, "control characters"),
        ({"video": 3}, "names a int as media"),
        ({"video": [{}]}, "names a dict as media"),
        ({"video": ["a.mp4", "b.mp4"]}, "has 2 videos; one is supported"),
        ({"video": None}, "needs either a video or images"),
        ({"image": "a.png"}, "needs either a video or images"),
        ({"clip": 3}, "clip is 3"),
        ({"conversations": []}, "has no conversations"),
        ({"conversations": [{"from": "human"}]}, "turn 0 is not {from, value}"),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, "turn 0 is from 'gpt'; it must be the user's"),
        ({"conversations": [{"from": "system", "value": "x"}]}, "turn 0 is from 'system'"),
        ({"conversations": [{"from": "human", "value": "x"}]}, "ends without an answer"),
        (
            {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": " "}]},
            "turn 1 is an empty answer",
        ),
        ({"regions": [[0, 0, 1]]}, "is not \\[left, top, right, bottom\\]"),
        ({"regions": [[0, 0, 2, 1]]}, "is not \\[left, top, right, bottom\\]"),
        ({"regions": "here"}, "region 'here' is not"),
        ({"regions": [[0.5, 0, 0.5, 1]]}, "is empty"),
    ],
)
def test_a_broken_record_stops_the_run_or_is_reported(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "qa.json", [record(), record(**changes)])
    with pytest.raises(RequestError, match=f"record 2: .*({message})"):
        read_conversations([path], Report())
    report = Report(on_problem="leave out")
    assert len(read_conversations([path], report)) == 1
    assert report.counts == {"broken record": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a JSON list"),
        ("{}", "not a JSON list"),
        ("[1", "no comma or ] after record 1"),
        ('[{"a": 1', "record 1 is not JSON"),
        ("[{} {}]", "no comma or ] after record 1"),
        ("[1.", "no comma or ] after record 1"),
        ("[" * 100_000, "record 1 is not JSON"),
        ("[,]", "record 1 is not JSON"),
    ],
)
def test_a_damaged_file_is_refused_with_the_place(text: str, message: str) -> None:
    with pytest.raises(RequestError, match=f"^qa.json.*{message}"):
        list(iterate_array(io.StringIO(text), "qa.json"))


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"none\.json cannot be read: No such file"):
        read_conversations([tmp_path / "none.json"], Report())
    with pytest.raises(RequestError, match=r"holds no \.json file"):
        read_conversations([tmp_path], Report())
    with pytest.raises(RequestError, match="is parquet, which SAT comes as; convert it first"):
        read_conversations([tmp_path / "sat.parquet"], Report())
    with pytest.raises(RequestError, match="no conversation to train on"):
        read_conversations([write(tmp_path / "qa.json", [])], Report())
    (tmp_path / "bad.json").write_bytes(b'["\xff"]')
    with pytest.raises(RequestError, match=r"bad\.json"):
        read_conversations([tmp_path / "bad.json"], Report())
    write(tmp_path / ERRATUM, {"id": 1})
    with pytest.raises(RequestError, match="must be a list of ids to drop"):
        read_conversations([tmp_path / "qa.json"], Report())


@pytest.mark.parametrize("chunk_chars", [1, 2, 7, 1000])
def test_elements_come_out_whole_wherever_the_reading_cuts(monkeypatch: pytest.MonkeyPatch, chunk_chars: int) -> None:
    monkeypatch.setattr(module, "_CHUNK_CHARS", chunk_chars)
    elements = [{"a": [1, {"b": "]},["}]}, 12345, 'ä"\\', None, [], -0.5e3, True]
    for text in (json.dumps(elements), json.dumps(elements, indent=3) + "\n"):
        assert list(iterate_array(io.StringIO(text), "x")) == elements
    assert list(iterate_array(io.StringIO(" [ ] "), "x")) == []


def test_a_record_without_an_end_is_not_read_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_RECORD_CHARS", 1000)
    monkeypatch.setattr(module, "_CHUNK_CHARS", 100)
    file = io.StringIO('["' + "x" * 1_000_000)
    with pytest.raises(RequestError, match="record 1 is not JSON"):
        list(iterate_array(file, "x"))
    assert file.tell() < 2000


def png(value: int) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(sink, "PNG")
    return sink.getvalue()


class TestSAT:
    def rows(self) -> list[dict[str, Any]]:
        two = {"question": "Which is nearer?", "answers": ["cup", "lamp"], "correct_answer": "lamp"}
        three = {"question": "Where to?", "answers": ["left", "right", "on"], "correct_answer": "on"}
        return [
            two | {"image_bytes": [png(1), png(2)], "question_type": "near"},
            three | {"image_bytes": [png(1)], "question_type": "go"},
        ]

    def test_each_question_is_asked_in_every_rotation_of_its_options(self, tmp_path: Path) -> None:
        pq.write_table(pa.Table.from_pylist(self.rows()), tmp_path / "sat.parquet")
        assert convert_sat(tmp_path / "sat.parquet", tmp_path / "out") == 5
        found = read_conversations([tmp_path / "out" / "qa.json"], Report())
        texts = [found[row].turns[0].text for row in range(5)]
        assert texts[0] == (
            "Answer in natural language. Which is nearer? Answer the question using a single word or phrase. "
            'Choose between the following options: "cup" or "lamp".'
        )
        assert [text.split("options: ")[1] for text in texts[1:]] == [
            '"lamp" or "cup".',
            '"left", "right" or "on".',
            '"right", "on" or "left".',
            '"on", "left" or "right".',
        ]
        assert [found[row].turns[1].text for row in range(5)] == ["lamp", "lamp", "on", "on", "on"]
        assert found[0].images[0] == found[2].images[0] != found[0].images[1]
        stored = tmp_path / "out" / found[0].images[1]
        assert stored.read_bytes() == png(2)
        assert len(list((tmp_path / "out" / "images").iterdir())) == 2

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"correct_answer": "dog"}, "SAT row 1: correct answer 'dog' is not among"),
            ({"image_bytes": []}, "SAT row 1 has no image"),
            ({"image_bytes": [b"<svg>"]}, "SAT row 1: an image is neither PNG nor JPEG"),
        ],
    )
    def test_a_wrong_row_is_named(self, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
        rows = self.rows()
        pq.write_table(pa.Table.from_pylist([rows[0], rows[1] | changes]), tmp_path / "sat.parquet")
        with pytest.raises(RequestError, match=message):
            convert_sat(tmp_path / "sat.parquet", tmp_path / "out")

    def test_other_files_and_full_folders_are_refused(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
        with pytest.raises(RequestError, match=r"is not SAT's parquet: it lacks .*'answers'"):
            convert_sat(tmp_path / "other.parquet", tmp_path / "out")
        (tmp_path / "text.parquet").write_text("x")
        with pytest.raises(RequestError, match="cannot be read as parquet"):
            convert_sat(tmp_path / "text.parquet", tmp_path / "out2")
        with pytest.raises(RequestError, match="is not empty; name a new folder"):
            convert_sat(tmp_path / "other.parquet", tmp_path)


def test_many_conversations_take_little_more_memory_than_their_text(tmp_path: Path) -> None:
    """Python's objects would take several times as much."""
    with open(tmp_path / "qa.json", "w") as file:
        for number, comma in zip(range(10_000), itertools.chain("[", itertools.repeat(",")), strict=False):
            file.write(comma + json.dumps(record(id=f"record-{number}", video=f"videos/{number % 97}.mp4")))
        file.write("]")
    found = read_conversations([tmp_path / "qa.json"], Report())
    assert len(found) == 10_000
    assert found[9_999].id == "record-9999"
    assert found.table.nbytes < (tmp_path / "qa.json").stat().st_size
