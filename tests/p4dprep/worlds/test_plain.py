"""Plain worlds: balls on a plane, asked about by colour; lessons that give nothing away; what is where in pictures."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from p4dprep.storage import Store
from p4dprep.worlds.generate import make_scene, scene_of
from p4dprep.worlds.grounding import describe_pictures, to_grounding
from p4dprep.worlds.lists import write_lists
from p4dprep.worlds.questions import LlavaRecord, Query, Question, balance, to_lessons
from p4dprep.worlds.render import trace
from p4dprep.worlds.scene import PLAIN_SPLITS, Scene, Split
from p4dprep.worlds.stages import STAGES
from p4dprep.worlds.templates import ask
from p4dprep.worlds.write import Recipe, presentation_seconds, process_pool, render_clips, video_key
from student.evaluate.common import letter_of_words
from student.evaluate.worlds import Worlds
from tests.p4dprep.worlds.guesser import accuracy, chance, learned
from tests.p4dprep.worlds.stages import facts_of

NUM_SCENES, NUM_CLIPS = 120, 4
RECIPE = Recipe(split="plain_test", seed=5, size=(48, 48))


def corpus(split: Split, num_scenes: int, seed: int) -> list[Query]:
    scenes = [make_scene(split, seed, index) for index in range(num_scenes)]
    return [query for scene in scenes for query in ask(scene, facts_of(scene, num_times=5))]


@pytest.fixture(scope="module")
def questions() -> tuple[Question, ...]:
    return balance(corpus("plain_train", NUM_SCENES, seed=3), seed=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("plain")
    with process_pool(2) as pool:
        store = Store(str(place))
        render_clips(store, RECIPE, range(NUM_CLIPS), pool, lambda *_: None)
        write_lists(store, RECIPE, NUM_CLIPS, pool, lambda *_: None)
    return place


@pytest.mark.parametrize("split", PLAIN_SPLITS)
def test_balls_of_different_colours_lie_before_a_standing_camera(split: Split) -> None:
    for index in range(30):
        scene = make_scene(split, 0, index)
        assert scene == scene_of(scene.id)
        assert (scene.setting, scene.camera.kind, scene.effects.noise) == (PLAIN_SPLITS[split], "stand", 0.0)
        colours = [body.colour for body in scene.bodies]
        fewest, most = (1, 1) if scene.setting == "single" else (3, 4)
        assert fewest <= len(set(colours)) == len(colours) <= most
        assert set(colours) <= set(STAGES["plain"].colours)
        assert {body.category for body in scene.bodies} == {"ball"}
        pose = scene.camera.world_to_camera(np.array(scene.frame_seconds))
        assert np.ptp(pose, axis=0).max() == 0


def test_the_frames_of_single_worlds_do_not_tell_how_long_they_took() -> None:
    scenes = [make_scene("single_test", 3, number) for number in range(200)]
    seconds = [scene.duration_seconds for scene in scenes]
    frames = [len(scene.frame_seconds) for scene in scenes]
    assert np.percentile(seconds, 90) > 4 * np.percentile(seconds, 10)
    assert abs(np.corrcoef(seconds, frames)[0, 1]) < 0.5


def test_every_kind_of_question_but_grounding_in_space_is_asked(questions: tuple[Question, ...]) -> None:
    assert {question.category for question in questions} == {"DM", "SR", "R", "C", "T", "FP", "SA", "DP"}
    assert all(re.fullmatch(r"(red|green|blue|yellow|purple|white) object", n) for q in questions for n in q.names)


def test_whoever_reads_the_names_only_guesses(questions: tuple[Question, ...]) -> None:
    asked = [question.named() for question in balance(corpus("plain_test", NUM_SCENES, seed=4), seed=1)]
    seen = [question.named() for question in questions]
    assert accuracy(learned(seen), asked) <= chance(asked) + 0.03


def test_single_worlds_ask_of_one_ball_and_of_how_far_it_is() -> None:
    assert all(len(scene.bodies) == 1 for scene in (make_scene("single_test", 3, number) for number in range(60)))
    asked = balance(corpus("single_train", NUM_SCENES, seed=3), seed=0)
    assert {question.category for question in asked} == {"DM", "R", "T", "FP", "SA", "DP"}
    assert {len(question.regions) for question in asked} == {1}
    seen, held_out = ([q.named() for q in each] for each in (asked, balance(corpus("single_test", 200, 4), seed=1)))
    assert accuracy(learned(seen), held_out) <= chance(held_out) + 0.03


def lessons_of(questions: tuple[Question, ...]) -> list[LlavaRecord]:
    ids = dict.fromkeys(question.scene_id for question in questions)
    return to_lessons(
        questions, videos={name: f"{name}.mp4" for name in ids}, durations_seconds=dict.fromkeys(ids, 2.0)
    )


def pair(record: LlavaRecord) -> tuple[str, str]:
    question, answer = record["conversations"]
    return question["value"], answer["value"]


@pytest.mark.parametrize("number", ["0.3", "1", "2", "5"])
def test_whoever_always_says_the_same_number_only_guesses(questions: tuple[Question, ...], number: str) -> None:
    measures = [question for question in questions if all(re.match(r"[\d.]+ m", each) for each in question.options)]
    right = [letter_of_words(f"{number} m", question.options) == question.letter for question in measures]
    assert len(measures) > 100
    assert abs(np.mean(right) - chance(measures)) < 0.01


def test_lessons_hold_every_question_once_and_ask_for_words(questions: tuple[Question, ...]) -> None:
    asked = map(pair, lessons_of(questions))
    said = Counter[tuple[str, str]]()
    for text, answer in asked:
        question, _, rest = text.removeprefix("<video>\n").partition("\n\n")
        assert rest == "Answer with a word or a short phrase."
        said[question, answer] += "How many seconds pass" not in question
    assert +said == Counter((question.named().text, question.named().answer) for question in questions)


def test_every_clip_is_asked_how_long_it_is(questions: tuple[Question, ...]) -> None:
    told = [answer for text, answer in map(pair, lessons_of(questions)) if "How many seconds pass" in text]
    assert told == ["2.00 seconds"] * len({question.scene_id for question in questions})


def crossing() -> Scene:
    return next(scene for scene in (make_scene("plain_test", 2, n) for n in range(50)) if len(scene.bodies) == 4)


def test_pictures_are_described_as_they_are() -> None:
    scene = crossing()
    seconds = presentation_seconds(scene)
    said = dict(describe_pictures(scene, seconds))
    for moment, at in (("first", 0), ("last", -1)):
        seen = trace(scene, seconds[[at]], 96, 96).instances_thw[0]
        centres = {
            f"{body.colour} object": np.argwhere(seen == number + 1).mean(0)
            for number, body in enumerate(scene.bodies)
            if (seen == number + 1).sum() > 20
        }
        listed = said[f"What does the {moment} frame show, from left to right?"].split(", ")
        drawn = sorted(centres, key=lambda name: centres[name][1])
        assert [name for name in listed if name in centres] == [name for name in drawn if name in listed]
        for name, (row, column) in centres.items():
            where = said.get(f"Where in the {moment} frame is the {name}?")
            if where:
                found = [int(number) for number in re.findall(r"\d+", where)]
                assert np.allclose(found, [column / 9.6 - 0.5, row / 9.6 - 0.5], atol=1.3)


def test_nothing_of_motion_depth_or_time_is_in_the_grounding(folder: Path) -> None:
    records = json.loads((folder / "grounding.json").read_text())
    assert {record["video"] for record in records} == {video_key(RECIPE.scene_id(n)) for n in range(NUM_CLIPS)}
    asked = [text for text, _ in map(pair, records)]
    known = re.compile(r"<video>\n(What does the|Where in the|Which is farthest to the|Which option reads)")
    assert all(known.match(text) for text in asked)
    first = json.loads((folder / "grounding-first.json").read_text())
    assert first == [record for record in records if not re.search("the (middle|last) frame", pair(record)[0])]


def test_an_option_that_is_read_out_is_any_of_them(questions: tuple[Question, ...]) -> None:
    same = [question for question in questions if question.scene_id == questions[0].scene_id]
    read = [to_grounding(f"plain_train-3-{n}", "v.mp4", (), same) for n in range(60)]
    letters = Counter(answer for records in read for _, answer in map(pair, records))
    assert set(letters) >= set("ABCD")


def test_test_json_names_things_and_is_asked_without_marks(folder: Path) -> None:
    records = json.loads((folder / "test.json").read_text())
    assert records
    assert all(not record["som_image"] and "<obj_" not in record["question"] for record in records)
    assert not (folder / "images").exists()
    asked = Worlds().read(folder, "official")
    assert len(asked) == len(records)
    lessons = json.loads((folder / "qa.json").read_text())
    words = {text.removeprefix("<video>\n") for text, _ in map(pair, lessons)}
    assert {question.prompt for question in Worlds().read(folder, "words")} <= words
