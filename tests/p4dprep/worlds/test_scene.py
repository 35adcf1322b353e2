"""Paths and cameras: positions, speeds and every sign convention."""

import math

import numpy as np
import pytest

from p4dprep.worlds.scene import Camera, Part, Segment, Texture, Trajectory, Wave, still

SEGMENTS = {
    "straight": Segment(start_seconds=0, position=(1, 2, 0.5), velocity=(1, -0.5, 0.1)),
    "accelerated": Segment(start_seconds=0, position=(0, 0, 3), velocity=(1, 0, 2), acceleration=(0, 0.3, -9.81)),
    "arc": Segment(start_seconds=0, position=(1, 2, 0), velocity=(1, 0.5, 0.2), turn_rate=0.7, yaw_rate=0.7),
    "arc back": Segment(start_seconds=0, position=(1, 2, 0), velocity=(-1, 0.5, 0), turn_rate=-1.3),
}
GREY = Texture(pattern="waves", colour=(0.5, 0.5, 0.5), other=(0.4, 0.4, 0.4), scale=1.0)


@pytest.mark.parametrize("name", SEGMENTS)
def test_differences_of_positions_are_the_velocity_and_of_velocities_the_acceleration(name: str) -> None:
    path, step = Trajectory(segments=(SEGMENTS[name],)), 1e-4
    seconds = np.linspace(0.1, 2, 40)
    velocity = (path.position(seconds + step) - path.position(seconds - step)) / (2 * step)
    acceleration = (path.velocity(seconds + step) - path.velocity(seconds - step)) / (2 * step)
    np.testing.assert_allclose(path.velocity(seconds), velocity, atol=1e-6)
    np.testing.assert_allclose(path.acceleration(seconds), acceleration, atol=1e-6)


def test_the_length_of_a_path_is_that_of_its_arc_and_not_of_its_chord() -> None:
    circle = Segment(start_seconds=0, position=(0, 0, 0), velocity=(2, 0, 0), turn_rate=2 * math.pi)
    path = Trajectory(segments=(circle, Segment(start_seconds=1, position=(0, 0, 0))))
    assert path.path_length(0, 1) == pytest.approx(2.0)
    assert path.path_length(0.5, 7) == pytest.approx(1.0)
    np.testing.assert_allclose(path.position(np.array([1 - 1e-12])), [[0, 0, 0]], atol=1e-9)


def test_a_later_segment_takes_over_at_its_start_and_the_first_one_holds_before() -> None:
    path = Trajectory(
        segments=(
            Segment(start_seconds=0, position=(0, 0, 0), velocity=(1, 0, 0)),
            Segment(start_seconds=2, position=(2, 0, 0), yaw=1.0),
        )
    )
    np.testing.assert_allclose(path.position(np.array([-1.0, 1, 2, 5]))[:, 0], [0, 1, 2, 2])
    assert path.yaw(np.array([1.0, 3.0])).tolist() == [0.0, 1.0]
    with pytest.raises(ValueError, match="in order of time"):
        Trajectory(segments=path.segments[::-1])


def test_an_arc_with_a_positive_rate_turns_left() -> None:
    left = Trajectory(segments=(Segment(start_seconds=0, position=(0, 0, 0), velocity=(1, 0, 0), turn_rate=0.5),))
    assert left.position(np.array([1.0]))[0, 1] > 0  # y is to the left of x, z is up


def camera(*, yaw: float = 0.0, pitch: float = 0.0) -> Camera:
    return Camera(trajectory=still((1, 2, 3), yaw=yaw), pitch=pitch, fov_x=math.radians(90), aspect=4 / 3, kind="stand")


def test_camera_axes_are_right_down_and_forward() -> None:
    pose = camera().world_to_camera(np.zeros(1))[0]
    ahead, right, up = np.array([2, 2, 3, 1]), np.array([1, 1, 3, 1]), np.array([1, 2, 4, 1])
    np.testing.assert_allclose(pose @ ahead, [0, 0, 1, 1], atol=1e-12)
    np.testing.assert_allclose(pose @ right, [1, 0, 0, 1], atol=1e-12)
    np.testing.assert_allclose(pose @ up, [0, -1, 0, 1], atol=1e-12)
    assert np.linalg.det(pose[:3, :3]) == pytest.approx(1)


def test_a_growing_yaw_turns_the_camera_left_and_a_growing_pitch_up() -> None:
    ahead = np.array([2, 2, 3, 1])
    assert (camera(yaw=0.1).world_to_camera(np.zeros(1))[0] @ ahead)[0] > 0  # what was ahead is now on the right
    assert (camera(pitch=0.1).world_to_camera(np.zeros(1))[0] @ ahead)[1] > 0  # and now below


def test_intrinsics_scale_with_the_picture_and_hold_the_field_of_view() -> None:
    small, large = camera().intrinsics(96, 128), camera().intrinsics(192, 256)
    np.testing.assert_allclose(np.diag([2, 2, 1]) @ small, large)
    assert small[0, 0] == pytest.approx(64)  # 90 degrees over 128 pixels
    assert small[1, 1] == pytest.approx(small[0, 0])  # square pixels at the camera's own aspect
    assert camera().intrinsics(128, 128)[1, 1] == pytest.approx(64 * 4 / 3)  # squashed to a square


def test_a_wave_shakes_the_camera_about_its_path() -> None:
    shaken = Camera(
        trajectory=still((0, 0, 1)), pitch=0, fov_x=1, aspect=1, kind="shake",
        bob=((Wave(amplitude=0.1, hertz=1, phase=0),), (), ()),
    )  # fmt: skip
    poses = shaken.world_to_camera(np.array([0, 0.25, 0.75]))
    forward = poses[:, 2, :3]
    np.testing.assert_allclose(np.arctan2(forward[:, 1], forward[:, 0]), [0, 0.1, -0.1], atol=1e-12)


def test_the_extent_of_a_part_follows_its_axis() -> None:
    wheel = Part(shape="cylinder", half_size=(0.3, 0.3, 0.1), axis="y", texture=GREY)
    np.testing.assert_allclose(wheel.extent(), [0.3, 0.1, 0.3])
    np.testing.assert_allclose(wheel.rotation() @ [0, 0, 1], [0, 1, 0])
    assert np.linalg.det(wheel.rotation()) == pytest.approx(1)
