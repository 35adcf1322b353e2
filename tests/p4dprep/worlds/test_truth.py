"""Proofs that the truth is true: by re-projection, by warping pictures, by finite differences."""

from dataclasses import replace

import numpy as np
import pytest

from p4dprep.worlds.generate import make_scene
from p4dprep.worlds.render import ray_directions
from p4dprep.worlds.scene import Effects, Scene
from p4dprep.worlds.truth import RAY_GRID, Truth, film, truth

HEIGHT, WIDTH = 96, 128
NUM_SCENES = 8


def clips() -> list[tuple[Scene, np.ndarray, Truth]]:
    made = []
    for index in range(NUM_SCENES):
        scene = replace(make_scene("train", 3, index), effects=Effects())
        frames, known = film(scene, np.linspace(0, scene.duration_seconds, 8), HEIGHT, WIDTH)
        made.append((scene, frames, known))
    return made


@pytest.fixture(scope="module")
def filmed() -> list[tuple[Scene, np.ndarray, Truth]]:
    return clips()


def pixels() -> np.ndarray:
    """Pixel centres (h, w, 2)."""
    return np.stack(np.meshgrid(np.arange(WIDTH) + 0.5, np.arange(HEIGHT) + 0.5), axis=-1)


def test_depth_pose_and_intrinsics_give_the_flow_of_static_pixels(
    filmed: list[tuple[Scene, np.ndarray, Truth]],
) -> None:
    for _, _, known in filmed:
        for here, there, flow in ((3, 2, known.flow_thw2), (3, 4, known.flow_forward_thw2)):
            expected = reprojected(known, here, there) - pixels()
            static = ~np.isnan(known.depth_thw[here])
            moving = (
                known.motion_thw[here]
                if there < here
                else known.motion_thw[there - 1] | (known.instances_thw[here] > 0)
            )
            error = np.linalg.norm(flow[here] - expected, axis=-1)[static & ~moving]
            assert np.nanmax(error) < 0.05


def reprojected(known: Truth, here: int, there: int) -> np.ndarray:
    """Where static points seen in one frame lie in another (h, w, 2), from depth, poses and K alone."""
    ones = np.concatenate([pixels(), np.ones((HEIGHT, WIDTH, 1))], axis=-1)
    points = ones @ np.linalg.inv(known.intrinsics_33).T * known.depth_thw[here][..., None]
    relative = known.pose_t44[there] @ np.linalg.inv(known.pose_t44[here])
    moved = (points @ relative[:3, :3].T + relative[:3, 3]) @ known.intrinsics_33.T
    moved[moved[..., 2] <= 0] = np.nan
    projected: np.ndarray = moved[..., :2] / moved[..., 2:]
    return projected


def test_warping_by_the_flow_reproduces_the_next_frame_where_it_is_visible(
    filmed: list[tuple[Scene, np.ndarray, Truth]],
) -> None:
    warped_errors, plain_errors, hidden_errors = [], [], []
    for _, frames, known in filmed:
        for n in range(1, len(frames)):
            seen = known.flow_visible_thw[n]
            target = pixels() + np.nan_to_num(known.flow_thw2[n]) - 0.5
            error = np.abs(bilinear(frames[n - 1].astype(float), target) - frames[n]).mean(-1)
            warped_errors.append(error[seen].mean())
            plain_errors.append(np.abs(frames[n - 1].astype(float) - frames[n]).mean(-1)[seen].mean())
            inside = ((target > 0) & (target < [WIDTH - 1, HEIGHT - 1])).all(-1)
            hidden_errors += error[~seen & inside].tolist()
    print(f"photometric error {np.mean(warped_errors):.2f} of 255, not warped {np.mean(plain_errors):.2f}")
    assert np.mean(warped_errors) < 4  # of 255: shading, shadows and interpolation
    assert np.mean(warped_errors) < 0.3 * np.mean(plain_errors)
    assert np.mean(hidden_errors) > 4 * np.mean(warped_errors)  # what the mask calls hidden does not match


def bilinear(picture: np.ndarray, at_hw2: np.ndarray) -> np.ndarray:
    """A picture (h, w, c) sampled at (x, y) in units where pixel centres are integers."""
    x, y = np.clip(at_hw2[..., 0], 0, WIDTH - 1.001), np.clip(at_hw2[..., 1], 0, HEIGHT - 1.001)
    left, top = x.astype(int), y.astype(int)
    a, b = (x - left)[..., None], (y - top)[..., None]
    upper = picture[top, left] * (1 - a) + picture[top, left + 1] * a
    lower = picture[top + 1, left] * (1 - a) + picture[top + 1, left + 1] * a
    mixed: np.ndarray = upper * (1 - b) + lower * b
    return mixed


def test_rays_agree_with_pose_and_intrinsics(filmed: list[tuple[Scene, np.ndarray, Truth]]) -> None:
    rows, columns = RAY_GRID
    for _, _, known in filmed:
        rays = known.camray_tyx6.astype(float)
        directions, moments = rays[..., :3], rays[..., 3:]
        np.testing.assert_allclose(np.linalg.norm(directions, axis=-1), 1, atol=1e-6)
        np.testing.assert_allclose((directions * moments).sum(-1), 0, atol=1e-5)
        assert np.abs(moments[0]).max() < 1e-9  # the first camera is the reference
        centres = np.stack(
            np.meshgrid((np.arange(columns) + 0.5) * WIDTH / columns, (np.arange(rows) + 0.5) * HEIGHT / rows), axis=-1
        )
        in_camera = np.concatenate([centres, np.ones((rows, columns, 1))], -1) @ np.linalg.inv(known.intrinsics_33).T
        in_camera /= np.linalg.norm(in_camera, axis=-1, keepdims=True)
        for n, pose in enumerate(known.pose_t44):
            to_first = known.pose_t44[0] @ np.linalg.inv(pose)
            expected = in_camera @ to_first[:3, :3].T
            np.testing.assert_allclose(directions[n], expected, atol=1e-5)
            np.testing.assert_allclose(moments[n], np.cross(to_first[:3, 3], expected), atol=1e-5)


def test_motion_is_what_moves_in_the_world_whatever_the_camera_does(
    filmed: list[tuple[Scene, np.ndarray, Truth]],
) -> None:
    kinds = set()
    for scene, _, known in filmed:
        seconds = np.linspace(0, scene.duration_seconds, 8)
        for number, body in enumerate(scene.bodies, start=1):
            path, yaw = body.trajectory.position(seconds), body.trajectory.yaw(seconds)
            for n in range(1, 8):
                mine = known.instances_thw[n] == number
                moved = np.linalg.norm(path[n] - path[n - 1]) > 1e-2 or abs(yaw[n] - yaw[n - 1]) > 1e-2
                if mine.sum() > 20 and (moved or (path[n] == path[n - 1]).all()):
                    kinds.add(moved)
                    assert (known.motion_thw[n][mine].mean() > 0.95) == moved
        assert not known.motion_thw[known.instances_thw == 0].any()
        np.testing.assert_array_equal(known.motion_thw[0][known.instances_thw[0] == 0], False)
    assert kinds == {True, False}


def test_backward_flow_points_to_where_the_pixel_came_from() -> None:
    """A camera that turns left sees things move right: backward flow then points left."""
    scene = next(s for s in (make_scene("train", 9, i) for i in range(200)) if s.camera.kind == "pan")
    known = truth(scene, np.array([0.0, 0.3]), HEIGHT, WIDTH)
    yaw = scene.camera.trajectory.yaw(np.array([0.0, 0.3]))
    flow_x = np.nanmedian(known.flow_thw2[1][..., 0])
    assert np.sign(flow_x) == -np.sign(yaw[1] - yaw[0])
    assert np.sign(np.nanmedian(known.flow_forward_thw2[0][..., 0])) == -np.sign(flow_x)


def test_frames_without_a_neighbour_have_no_flow(filmed: list[tuple[Scene, np.ndarray, Truth]]) -> None:
    for _, _, known in filmed:
        assert np.isnan(known.flow_thw2[0]).all()
        assert np.isnan(known.flow_forward_thw2[-1]).all()
        assert not known.flow_visible_thw[0].any()
        assert not known.flow_forward_visible_thw[-1].any()
        assert np.isfinite(known.flow_thw2[1:]).mean() > 0.99


def test_the_truth_at_another_size_is_the_same_scene() -> None:
    scene = make_scene("train", 3, 2)
    seconds = np.linspace(0, 1, 3)
    small, large = truth(scene, seconds, 48, 64), truth(scene, seconds, 96, 128)
    np.testing.assert_array_equal(small.pose_t44, large.pose_t44)
    np.testing.assert_allclose(small.camray_tyx6, large.camray_tyx6, atol=1e-6)
    inner = large.flow_thw2[2].reshape(48, 2, 64, 2, 2)
    spread = inner.max(axis=(1, 3)) - inner.min(axis=(1, 3))
    smooth = (spread < 0.5).all(-1)  # no edge between the four
    np.testing.assert_allclose(2 * small.flow_thw2[2][smooth], inner.mean(axis=(1, 3))[smooth], atol=0.26)
    rays = ray_directions(small.pose_t44[0], small.intrinsics_33, 48, 64)
    assert rays.shape == (3, 48, 64)
