"""The facts about bodies: against finite differences, against the instance mask, and every sign convention."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest

from p4dprep.worlds.generate import make_scene
from p4dprep.worlds.scene import Segment, Trajectory
from p4dprep.worlds.tracks import mask_box, object_facts, picture_place
from tests.p4dprep.worlds.stages import FRONT, SECONDS, facts_of, moving, resting, stage

SPIN = 0.4


def test_speeds_and_lengths_are_those_of_finite_differences_of_positions() -> None:
    for index in range(6):
        scene = make_scene("train", 1, index)
        for body in facts_of(scene, num_times=2001):
            centres = np.array([box.centre for box in body.boxes_world])
            steps = np.linalg.norm(np.diff(centres, axis=0), axis=1)
            speeds = steps / np.diff(body.seconds)
            off = np.abs(speeds - (np.array(body.speeds)[1:] + np.array(body.speeds)[:-1]) / 2)
            assert np.quantile(off, 0.98) < 1e-2 * max(speeds.max(), 1e-9) + 1e-9  # all but the steps with a bounce
            assert body.path_length_metres == pytest.approx(
                steps.sum(), rel=5e-3, abs=1e-9
            )  # chords cut the corners of a bounce
            assert body.displacement_metres == pytest.approx(float(np.linalg.norm(centres[-1] - centres[0])))
            assert body.mean_speed == pytest.approx(body.path_length_metres / scene.duration_seconds)


def test_acceleration_is_the_change_of_velocity() -> None:
    scene = stage(moving("red", (5, 0, 0.25), (0.5, 0, 0), acceleration=(0.3, 0.4, 0)))
    (body,) = facts_of(scene)
    assert body.accelerations == pytest.approx([0.5] * 21)
    assert body.mean_acceleration == pytest.approx(0.5)
    assert body.speeds[-1] == pytest.approx(math.hypot(0.5 + 0.3 * SECONDS, 0.4 * SECONDS))


def test_a_body_that_comes_back_has_a_path_but_no_displacement() -> None:
    circle = {"turn_rate": 2 * math.pi / SECONDS, "yaw_rate": 2 * math.pi / SECONDS}
    (body,) = facts_of(stage(moving("red", (5, 0, 0.25), (1, 0, 0), **circle)))
    assert body.path_length_metres == pytest.approx(SECONDS)
    assert body.displacement_metres == pytest.approx(0, abs=1e-9)


def test_yaw_grows_counter_clockwise_seen_from_above() -> None:
    (body,) = facts_of(stage(moving("red", (5, 0, 0.25), (1, 0, 0), turn_rate=SPIN, yaw_rate=SPIN)))
    assert body.boxes_world[-1].yaw == pytest.approx(SPIN * SECONDS)
    assert body.boxes_world[-1].centre[1] > 0  # from x towards y, which is to the left of x with z up


@pytest.mark.parametrize(
    ("position", "sign_x", "sign_y"),
    [((5, 1, 1), -1, 0), ((5, -1, 1), 1, 0), ((5, 0, 2), 0, -1), ((5, 0, 0.25), 0, 1)],
    ids=["left", "right", "above", "below"],
)
def test_in_camera_coordinates_x_is_right_y_is_down_and_z_is_ahead(
    position: tuple[float, float, float], sign_x: int, sign_y: int
) -> None:
    (body,) = facts_of(stage(resting("red", position)))
    x, y, z = body.boxes_camera0[0].centre
    assert (np.sign(np.round(x, 9)), np.sign(np.round(y, 9)), z) == (sign_x, sign_y, pytest.approx(5))
    place = picture_place(FRONT, FRONT.world_to_camera(np.zeros(1)), np.array([position]))[0] - 0.5
    assert (np.sign(place.round(9)) == (sign_x, sign_y)).all()  # pixels grow to the right and down as well


@pytest.mark.parametrize(("camera_yaw", "expected"), [(0.0, 0.5), (0.3, 0.2), (-3.0, 3.5 - 2 * math.pi)])
def test_camera_yaw_is_zero_for_a_body_that_faces_where_the_camera_looks_and_positive_to_its_left(
    camera_yaw: float, expected: float
) -> None:
    still = replace(
        FRONT, trajectory=Trajectory(segments=(Segment(start_seconds=0, position=(0, 0, 1), yaw=camera_yaw),))
    )
    (body,) = facts_of(stage(resting("red", (5, 0, 0.25), yaw=0.5), camera=still))
    assert body.boxes_camera0[0].yaw == pytest.approx(expected)
    assert body.boxes_world[0].yaw == pytest.approx(0.5)


def test_camera_0_stays_the_reference_when_the_camera_moves() -> None:
    walk = replace(
        FRONT, trajectory=Trajectory(segments=(Segment(start_seconds=0, position=(0, 0, 1), velocity=(1, 0, 0)),))
    )
    (body,) = facts_of(stage(resting("red", (5, 1, 0.25)), camera=walk))
    assert body.boxes_camera0[0] == body.boxes_camera0[-1]


def test_first_frame_boxes_are_those_of_the_instance_mask() -> None:
    scene = stage(resting("red", (5, 1, 0.25)), resting("blue", (5, -1, 0.25)), resting("green", (5, 1, -20)))
    mask = np.zeros((48, 64), np.uint8)
    mask[3:7, 10:12] = 1
    mask[40, 63] = 2
    red, blue, green = object_facts(scene, np.array([0.0, 1.0]), mask)
    assert red.first_frame_box == (10, 3, 12, 7)
    assert red.first_frame_fraction == pytest.approx(8 / (48 * 64))
    assert (blue.first_frame_box, green.first_frame_box) == ((63, 40, 64, 41), None)
    assert (red.num_frames_in_view, green.num_frames_in_view) == (2, 0)
    assert mask_box(mask > 2) is None


def test_what_something_hides_shows_less_of_its_box() -> None:
    shown = [
        facts_of(stage(resting("red", (8, 0, 1)), resting("blue", (4, aside, 1))))[0].first_frame_shown_fraction
        for aside in (1.5, 0.15, 0.0)
    ]
    assert shown[0] > 0.7 > shown[1] > 0.2 > shown[2] == 0


def test_a_body_that_leaves_the_picture_is_in_view_for_the_frames_before() -> None:
    (body,) = facts_of(stage(moving("red", (5, 0, 1), (0, 4, 0))))
    assert body.num_frames_in_view == 13  # y / x reaches 1 at 1.25 s, and frames are 0.1 s apart


def test_facts_are_json() -> None:
    facts = facts_of(stage(resting("red", (5, 1, 0.25))))
    (read,) = json.loads(json.dumps([asdict(body) for body in facts]))
    assert (read["name"], read["boxes_world"][0]["centre"]) == ("red crate", [5.0, 1.0, 0.25])


@pytest.mark.parametrize("seconds", [[0.0], [0.0, 0.0], [1.0, 0.5]])
def test_facts_want_times_that_grow(seconds: list[float]) -> None:
    with pytest.raises(ValueError, match="two growing times"):
        object_facts(stage(resting("red", (5, 1, 0.25))), np.array(seconds), np.zeros((4, 4), np.uint8))
