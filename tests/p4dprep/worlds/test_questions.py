"""Questions: true by construction, silent where the truth is unclear, and no use to whoever does not see the video."""

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from p4dprep.worlds.generate import make_scene
from p4dprep.worlds.questions import (
    CATEGORIES,
    MIN_RATIO,
    TASK_NAMES,
    Query,
    Question,
    balance,
    to_llava,
    to_r4d,
    to_timebench,
)
from p4dprep.worlds.scene import Body, Scene, Segment, Split, Trajectory
from p4dprep.worlds.templates import ask
from tests.p4dprep.worlds.guesser import accuracy, chance, fixed_rules, learned, majority
from tests.p4dprep.worlds.stages import FRONT, answers, facts_of, moving, queries, resting, stage, thing

NUM_TRAIN, NUM_HELD_OUT = 100, 110
MAX_LEAK = 0.03
ENOUGH = 250  # questions of a category, for its accuracy to say something


def corpus(split: Split, num_scenes: int, seed: int = 11) -> list[Query]:
    scenes = [make_scene(split, seed, index) for index in range(num_scenes)]
    return [query for scene in scenes if scene.bodies for query in ask(scene, facts_of(scene, num_times=5))]


@pytest.fixture(scope="module")
def train() -> list[Query]:
    return corpus("train", NUM_TRAIN)


@pytest.fixture(scope="module")
def held_out() -> tuple[Question, ...]:
    return balance(corpus("test", NUM_HELD_OUT), seed=2)


# --- Truth --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("velocity", "way"),
    [
        ((0, 0.5, 0), "to the left"),
        ((0, -0.5, 0), "to the right"),
        ((-0.5, 0, 0), "towards the camera"),
        ((0.5, 0, 0), "away from the camera"),
    ],
)
@pytest.mark.parametrize("camera_velocity", [(0, 0, 0), (0, 1.2, 0), (-2, 0, 0)])
def test_directions_are_those_of_the_world_in_the_first_view_however_the_camera_moves(
    velocity: tuple[float, float, float], way: str, camera_velocity: tuple[float, float, float]
) -> None:
    path = Trajectory(segments=(Segment(start_seconds=0, position=(0, 0, 1), velocity=camera_velocity),))
    scene = stage(moving("red", (6, 0, 0.25), velocity), camera=replace(FRONT, trajectory=path))
    assert answers(scene, "t_world") == {(0,): f"It moves {way}"}
    claimed = [query for query in queries(scene) if query.template.startswith("fp_direction")]
    assert [query.answer for query in claimed] == [f"{'Yes' if way in claimed[0].text else 'No'}, it moves {way}"]


def test_a_resting_thing_does_not_move_in_the_world_but_shifts_in_the_picture_of_a_moving_camera() -> None:
    path = Trajectory(segments=(Segment(start_seconds=0, position=(0, 0, 1), velocity=(0, 0.7, 0)),))
    scene = stage(resting("red", (5, 0.5, 0.25)), camera=replace(FRONT, trajectory=path))
    assert answers(scene, "t_world") == {(0,): "It does not move"}
    assert answers(scene, "t_picture") == {(0,): "to the right"}
    assert answers(scene, "sa_change") == {(0,): "It does not move"}
    assert answers(scene, "dp_camera") == {(): "1.4 m"}


@pytest.mark.parametrize(("velocity", "way"), [((0, 0, 1), "upwards"), ((0, 0, -0.5), "downwards")])
def test_upwards_in_the_picture_is_upwards_in_the_world(velocity: tuple[float, float, float], way: str) -> None:
    assert answers(stage(moving("red", (5, 0, 1.2), velocity)), "t_picture") == {(0,): way}


def turning(rate: float, speed: float) -> Body:
    return moving("red", (6, 0, 0.25), (speed, 0, 0), turn_rate=rate if speed else 0.0, yaw_rate=rate)


@pytest.mark.parametrize(("rate", "way", "side"), [(1.0, "counter-clockwise", "left"), (-1.0, "clockwise", "right")])
@pytest.mark.parametrize(("speed", "where"), [(0.5, "while it travels"), (0.0, "on the spot")])
def test_a_turn_to_the_left_is_counter_clockwise_seen_from_above(
    rate: float, way: str, side: str, speed: float, where: str
) -> None:
    scene = stage(turning(rate, speed))
    assert answers(scene, "r_how") == {(0,): f"It turns {way} {where}"}
    assert answers(scene, "r_steer") == ({(0,): f"It bends to its {side}"} if speed else {})
    assert answers(scene, "r_degrees") == {(0,): "about 110 degrees"}  # two radians, in two digits
    claims = [query for query in queries(scene) if query.template.startswith("fp_turn")]
    assert [query.answer.partition("turns ")[2] for query in claims] == [way]
    assert [query.answer[:3] == "Yes" for query in claims] == [f" turn {way}," in claims[0].text]


def test_left_right_nearer_and_farther_are_as_the_camera_sees_them() -> None:
    scene = stage(resting("red", (4, 1.5, 0.25)), resting("blue", (8, -2, 0.25)))
    assert answers(scene, "sr_quadrant") == {
        (0, 1): "to the left and nearer to the camera",
        (1, 0): "to the right and farther from the camera",
    }


AROUND = {
    "ahead of it": (7, 1, 0.25),
    "behind it": (3.5, 0.5, 0.25),
    "to its left": (5.5, 2, 0.25),
    "to its right": (5.5, -2, 0.25),
}
OPPOSITE = ("behind it", "ahead of it", "to its right", "to its left")


@pytest.mark.parametrize(("where", "opposite"), [*zip(AROUND, OPPOSITE, strict=True)])
def test_sides_of_a_moving_thing_are_those_of_its_own_direction(where: str, opposite: str) -> None:
    for speed, expected in ((0.3, where), (-0.3, opposite)):
        scene = stage(resting("blue", AROUND[where]), moving("red", (5, 0, 0.25), (speed, 0, 0)))
        assert answers(scene, "sr_heading") == {(0, 1): expected}


def test_measures_are_exact() -> None:
    walker = moving("red", (4, -1.5, 0.25), (0, 1.5, 0))
    scene = stage(walker, resting("blue", (4, 2, 0.25)))
    assert list(answers(scene, "dm_distance").values()) == ["3.5 m"]
    assert answers(scene, "dm_height") == {(0,): "0.5 m", (1,): "0.5 m"}
    assert answers(scene, "dm_longest")[0,] == "0.6 m"
    assert answers(scene, "sa_mean_speed") == {(0,): "1.5 m/s"} == answers(scene, "sa_speed_at")
    assert answers(scene, "dp_displacement") == {(0,): "3 m"} == answers(scene, "dp_path")
    far = next(query for query in queries(scene) if query.template == "dm_camera" and query.regions == (1,))
    assert far.value[0] == pytest.approx(math.sqrt(16 + 4 + 0.75**2))
    box = next(query for query in queries(scene) if query.template == "vg_box" and query.regions == (0,))
    assert box.answer == "centre (1.50, 0.75, 4.00), yaw 0 degrees"


def test_the_path_of_an_arc_is_longer_than_its_displacement() -> None:
    half = math.pi / 2  # a half circle in two seconds
    scene = stage(moving("red", (6, 0, 0.25), (1, 0, 0), turn_rate=half, yaw_rate=half))
    assert answers(scene, "dp_path") == {(0,): "2 m"}
    assert answers(scene, "dp_displacement") == {(0,): "1.3 m"}  # the diameter: 2 / (pi / 2)


@pytest.mark.parametrize(
    ("velocity", "acceleration", "change"),
    [(0.2, 0.5, "It speeds up"), (1.2, -0.5, "It slows down"), (0.8, 0.0, "It keeps a constant speed")],
)
def test_speeding_up_is_told_from_slowing_down(velocity: float, acceleration: float, change: str) -> None:
    scene = stage(moving("red", (5, 0, 0.25), (0, velocity, 0), acceleration=(0, acceleration, 0)))
    assert answers(scene, "sa_change") == {(0,): change}
    assert answers(scene, "sa_acceleration") == ({(0,): "0.5 m/s²"} if acceleration else {})


def test_bounces_are_counted_between_the_first_and_the_last_frame() -> None:
    hops = [
        Segment(start_seconds=start, position=(5, 0, 0.25), velocity=(0, 0, 3), acceleration=(0, 0, -10))
        for start in (0, 0.6, 1.2, 1.8, 2.4)
    ]
    scene = stage(thing("red", *hops, motion="bounce"), resting("blue", (5, 2, 0.25)))
    assert answers(scene, "c_bounces") == {(0,): "3", (1,): "0"}


def test_counts_and_comparisons_are_over_the_regions_they_name() -> None:
    scene = stage(
        moving("red", (4, -1.5, 0.25), (0, 1, 0)),
        moving("blue", (5, 3, 0.25), (0, -0.2, 0)),
        resting("green", (8, -3, 0.25)),
        resting("white", (12, 3, 0.25)),
    )
    moved = {0: True, 1: True, 2: False, 3: False}
    for size in (3, 4):
        for regions, count in answers(scene, f"c_move_{size}").items():
            assert (len(regions), int(count)) == (size, sum(moved[body] for body in regions))
    assert set(answers(scene, "c_total_move").values()) == {"2"}
    for template, winner in {"sa_fastest": 0, "dp_farthest": 0, "sr_nearest": 0, "sr_farthest": 3}.items():
        ((regions, answer),) = answers(scene, template).items()
        assert regions[int(answer[5]) - 1] == winner


def test_the_time_at_which_a_thing_passes_a_point_is_the_time_it_is_there() -> None:
    scene = stage(moving("red", (5, -2, 0.25), (0, 2, 0)))
    (query,) = (query for query in queries(scene) if query.template == "vg_when")
    x = float(re.search(r"\((-?[\d.]+),", query.text).group(1))
    low, high = (float(found) for found in re.findall(r"[\d.]+(?= s)", query.answer))
    assert low < (2 - x) / 2 < high  # x of the camera is -y of the world


def test_the_region_at_a_point_is_the_one_that_is_there() -> None:
    for index in range(12):
        scene = make_scene("val", 4, index)
        for query in queries(scene) if scene.bodies else ():
            if query.template == "vg_which":
                point = np.array([float(found) for found in re.findall(r"-?\d+\.\d\d", query.text)])
                at = float(re.search(r"([\d.]+) s", query.text).group(1))
                body = scene.bodies[query.regions[int(query.answer[5]) - 1]]
                pose = scene.camera.world_to_camera(np.zeros(1))[0]
                there = pose[:3, :3] @ body.trajectory.position(np.array([at]))[0] + pose[:3, 3]
                np.testing.assert_allclose(point, there, atol=0.0051)


# --- Silence where the truth is unclear ---------------------------------------------------------------------------


def test_what_is_not_well_seen_in_the_first_frame_or_leaves_the_picture_is_not_asked_about() -> None:
    hidden = stage(resting("red", (3, 0, 1)), resting("blue", (12, 0, 1)), moving("green", (5, 3, 1), (0, 6, 0)))
    assert {body for query in queries(hidden) for body in query.regions} == {0}


def test_unclear_truths_are_not_asked() -> None:
    winding = stage(moving("red", (6, 0, 0.25), (1, 0, 0), turn_rate=2.5, yaw_rate=2.5))
    assert answers(winding, "t_world") == {}
    oblique = stage(moving("red", (5, 0, 0.25), (0.6, 0.6, 0)), resting("blue", (5.2, 1.5, 0.25)))
    assert not {"t_world", "sr_quadrant"} & {query.template for query in queries(oblique) if 0 in query.regions}
    creeping = queries(stage(moving("red", (5, 0, 0.25), (0.01, 0, 0), yaw_rate=0.05)))
    motion = {"t_world", "r_how", "r_steer", "sa_mean_speed", "dp_displacement", "vg_when", "sa_change"}
    assert not motion & {query.template for query in creeping}


def test_things_that_are_not_there_are_never_in_the_scene_and_those_that_are_go_where_they_go() -> None:
    for index in range(12):
        scene = make_scene("train", 8, index)
        names = {body.name for body in scene.bodies}
        for query in queries(scene) if scene.bodies else ():
            if query.template == "fp_absent":
                present = any(f"the {name} " in query.text for name in names)
                assert present != query.answer.startswith("There is no")


# --- Balance ------------------------------------------------------------------------------------------------------


def test_questions_are_the_same_again_whatever_the_order_of_scenes(train: list[Query]) -> None:
    scene = make_scene("train", 11, 0)
    assert list(queries(scene)) == list(queries(scene))
    some = train[:3000]
    assert balance(some, seed=1) == balance(some[::-1], seed=1)
    assert balance(some, seed=1) != balance(some, seed=2)


def test_a_corpus_has_questions_of_all_nine_categories(held_out: tuple[Question, ...]) -> None:
    counts = Counter(question.category for question in held_out)
    assert set(counts) == set(CATEGORIES)
    assert min(counts.values()) >= 40, counts
    assert len({question.id for question in held_out}) == len(held_out)
    assert {len(question.options) for question in held_out} == {4, 5}


def test_within_a_template_every_option_is_right_as_often_as_any_other(held_out: tuple[Question, ...]) -> None:
    right: defaultdict[tuple[str, tuple[str, ...]], Counter[str]] = defaultdict(Counter)
    for question in held_out:
        if not question.template.startswith("vg_when"):  # its options are times of each video
            right[question.template, tuple(sorted(question.options))][question.answer] += 1
    for (template, options), counts in right.items():
        assert [counts[option] for option in options] == [counts[options[0]]] * len(options), template


def test_measures_offered_together_differ_clearly(held_out: tuple[Question, ...]) -> None:
    measures = [question for question in held_out if re.fullmatch(r"[\d.]+ m\S*", question.answer)]
    assert len(measures) > 300
    for question in measures:
        values = np.sort([float(option.split()[0]) for option in question.options])
        assert (values[1:] / values[:-1] > 0.9 * MIN_RATIO).all()  # as written, in two digits


@pytest.mark.parametrize("named", [False, True], ids=["regions", "names"])
def test_nobody_guesses_the_answers_from_questions_and_options_alone(
    train: list[Query], held_out: tuple[Question, ...], named: bool
) -> None:
    seen, asked = list(balance(train, seed=1)), list(held_out)
    if named:
        seen, asked = [question.named() for question in seen], [question.named() for question in asked]
    assert len(seen) > 2000 < len(asked)
    guessers = {**fixed_rules(), "majority": majority(seen), "learned": learned(seen)}
    for name, rule in guessers.items():
        assert accuracy(rule, asked) <= chance(asked) + MAX_LEAK, name
        for category in CATEGORIES:
            mine = [question for question in asked if question.category == category]
            luck = 2 * math.sqrt(0.25 * 0.75 / len(mine))
            if len(mine) >= ENOUGH:
                assert accuracy(rule, mine) <= chance(mine) + MAX_LEAK + luck, (name, category)


def unbalanced(found: Sequence[Query]) -> list[Question]:
    """Questions with fixed options as they come, in alphabetical order: what `balance` is there to prevent."""
    return [
        Question(
            id=f"{query.scene_id}-{number}",
            scene_id=query.scene_id,
            category=query.category,
            template=query.template,
            text=query.text,
            regions=query.regions,
            names=query.names,
            options=tuple(sorted(query.options)),
            answer=query.answer,
            answer_index=sorted(query.options).index(query.answer),
        )
        for number, query in enumerate(found)
        if query.options
    ]


def test_the_guesser_does_find_what_an_unbalanced_corpus_gives_away(train: list[Query]) -> None:
    leaky = unbalanced(train)
    seen, asked = leaky[::2][:1500], leaky[1::2][:1500]
    assert accuracy(learned(seen), asked) > chance(asked) + 0.2
    assert accuracy(majority(seen), asked) > chance(asked) + 0.2


# --- Formats ------------------------------------------------------------------------------------------------------


def test_r4d_records_hold_what_the_benchmark_scores(held_out: tuple[Question, ...]) -> None:
    videos = {question.scene_id: f"videos/{question.scene_id}.mp4" for question in held_out}
    marks = {question.id: f"images/{question.id}.png" for question in held_out}
    for question, record in zip(held_out, to_r4d(held_out, videos=videos, som_images=marks), strict=True):
        assert record["benchmark"] == "worlds"
        assert record["task"] == TASK_NAMES[question.category]
        assert record["answer"] == record["options"]["ABCDE".index(question.letter)]
        assert record["video"] == record["source"] == videos[question.scene_id]
        assert record["som_image"] == (marks[question.id] if question.regions else "")
        assert ("<obj_" in record["question"]) == bool(question.regions)
        assert "<obj_" not in record["question_raw"]


def test_conversations_ask_about_boxed_regions_openly_or_for_a_letter(held_out: tuple[Question, ...]) -> None:
    videos = {question.scene_id: f"{question.scene_id}.mp4" for question in held_out}
    boxes = {scene_id: {body: (0.0, body / 100, 1.0, 1.0) for body in range(99)} for scene_id in videos}
    open_ones = 0
    for question, record in zip(held_out, to_llava(held_out, videos=videos, boxes=boxes), strict=True):
        human, gpt = record["conversations"]
        assert (human["from"], gpt["from"], record["video"]) == ("human", "gpt", videos[question.scene_id])
        assert human["value"].startswith(f"<video>\n{question.text}\n")
        assert [box[1] * 100 for box in record.get("regions", [])] == pytest.approx(question.regions)
        assert ("regions" in record) == ("<obj_1>" in json.dumps(record))
        if "Options:" in human["value"]:
            assert f"({gpt['value']}) {question.answer}" in human["value"].splitlines()
        else:
            open_ones += 1
            assert gpt["value"] == question.answer
    assert 0.4 < open_ones / len(held_out) < 0.6


def test_answers_are_short_enough_for_a_small_student(held_out: tuple[Question, ...]) -> None:
    assert max(len(question.answer) for question in held_out) < 50


def test_timebench_offers_a_quarter_to_four_times_the_true_duration() -> None:
    scenes: list[Scene] = [make_scene("test", 0, index) for index in range(30)]
    records = to_timebench(scenes, videos={scene.id: f"{scene.id}.mp4" for scene in scenes})
    for scene, record in zip(scenes, records, strict=True):
        seconds = sorted(float(option.split()[0]) for option in record["options"])
        np.testing.assert_allclose(np.array(seconds) / scene.duration_seconds, [0.25, 0.5, 1, 2, 4], atol=0.005)
        assert record["answer"] == f"{scene.duration_seconds:.2f} seconds"
    assert len({record["options"].index(record["answer"]) for record in records}) == 5


def test_a_query_says_what_is_wrong_with_it() -> None:
    query = queries(stage(resting("red", (5, 0, 0.25))))[0]
    with pytest.raises(ValueError, match=r"names \[\] for 1 regions"):
        replace(query, text="Where is it?")
    with pytest.raises(ValueError, match="either a value, or options with the answer"):
        replace(query, value=(), options=("here", "there"))
