"""Ray casting against closed forms, and pictures against their truth."""

import math
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest

from p4dprep.errors import RequestError
from p4dprep.worlds.generate import LAYOUTS, held_out, make_scene, scene_of
from p4dprep.worlds.render import SKY, Surfaces, hit_shape, normals, ray_directions, render, trace
from p4dprep.worlds.scene import (
    PLAIN_SPLITS,
    SHAPES,
    SPLITS,
    Body,
    Camera,
    Effects,
    Light,
    Part,
    Scene,
    Segment,
    Split,
    Texture,
    Trajectory,
    still,
)
from p4dprep.worlds.textures import FAMILIES, PATTERNS, colours

GREY = Texture(pattern="waves", colour=(0.5, 0.5, 0.5), other=(0.4, 0.4, 0.4), scale=1.0)
BRIGHT = Texture(pattern="checker", colour=(0.9, 0.9, 0.9), other=(0.6, 0.6, 0.6), scale=0.5)


def part(shape: SHAPES, half_size: tuple[float, float, float] = (0.5, 0.5, 0.5)) -> Part:
    return Part(shape=shape, half_size=half_size, texture=BRIGHT)


def studio(*bodies: Body, scenery: tuple[Body, ...] = (), path: Trajectory | None = None) -> Scene:
    """A camera at the origin that looks along x with a field of view of 90 degrees."""
    return Scene(
        id="train-0-0", split="train", setting="room", layout="scatter", bodies=bodies, scenery=scenery,
        lights=(Light(direction=(0, 0, 1), strength=0.5),), ambient=0.5, sky=((0, 0, 1), (0, 0, 1)), far_metres=50,
        camera=Camera(
            trajectory=path or still((0, 0, 0)), pitch=0, fov_x=math.radians(90), aspect=1, kind="stand"
        ),
        effects=Effects(), frame_seconds=(0.0, 1.0), video_size=(64, 64), noise_seed=0,
    )  # fmt: skip


def thing(shape: SHAPES, at: tuple[float, float, float], half: tuple[float, float, float] = (0.5, 0.5, 0.5)) -> Body:
    return Body(category=shape, colour="red", parts=(part(shape, half),), trajectory=still(at))


@pytest.mark.parametrize("shape", ["box", "sphere", "cylinder", "capsule", "room"])
def test_hits_lie_on_the_surface_and_nothing_of_it_lies_before_them(shape: SHAPES) -> None:
    rng = np.random.default_rng(5)
    solid = part(shape, (0.4, 0.4, 0.9))
    origin = np.zeros(3) if shape == "room" else np.array([2.0, -1.5, 0.8])
    aims = rng.uniform(-1, 1, (3, 4000))
    direction = (aims - origin[:, None]).astype(np.float32)
    found = hit_shape(solid, origin.astype(np.float32)[:, None], direction)
    hits = np.isfinite(found)
    assert hits.any()
    assert np.abs(signed_distance(shape, origin[:, None] + found[hits] * direction[:, hits])).max() < 1e-4
    for share in (0.3, 0.6, 0.95):
        before = signed_distance(shape, origin[:, None] + share * found[hits] * direction[:, hits])
        assert (before < 0).all() if shape == "room" else (before > 0).all()
    if shape != "room":  # a miss is a miss all along the ray
        along = origin[:, None, None] + np.linspace(0, 4, 60)[:, None] * direction[:, None, ~hits]
        assert (signed_distance(shape, along.reshape(3, -1)) > -1e-3).all()


def signed_distance(shape: SHAPES, points_3n: np.ndarray) -> np.ndarray:
    """Below 0 inside; the sizes are those of the test above. A second way to say what a shape is."""
    x, y, z = points_3n
    distance: np.ndarray
    if shape in ("box", "room"):
        distance = np.max(np.abs(points_3n) - np.array([[0.4], [0.4], [0.9]]), axis=0)
    elif shape == "sphere":
        distance = np.sqrt(x * x + y * y + z * z) - 0.4
    elif shape == "cylinder":
        distance = np.maximum(np.hypot(x, y) - 0.4, np.abs(z) - 0.9)
    else:
        distance = np.sqrt(x * x + y * y + (z - np.clip(z, -0.5, 0.5)) ** 2) - 0.4
    return distance


@pytest.mark.parametrize("shape", ["box", "sphere", "cylinder", "capsule"])
def test_normals_are_unit_and_point_outward(shape: SHAPES) -> None:
    solid = part(shape, (0.4, 0.4, 0.9))
    origin = np.array([2.0, -1.5, 0.8], np.float32)
    direction = (np.random.default_rng(6).uniform(-0.5, 0.5, (3, 2000)) - origin[:, None]).astype(np.float32)
    found = hit_shape(solid, origin[:, None], direction)
    points = (origin[:, None] + found * direction)[:, np.isfinite(found)]
    normal = normals(solid, points)
    np.testing.assert_allclose(np.linalg.norm(normal, axis=0), 1, atol=2e-3)
    assert (signed_distance(shape, points + 1e-2 * normal) > 0).all()
    assert (signed_distance(shape, points - 1e-2 * normal) < 0).all()


def test_depth_is_along_the_optical_axis_and_the_nearer_body_wins() -> None:
    wall = thing("box", (8, 0, 0), (1, 20, 20))
    surfaces = trace(studio(thing("sphere", (4, 0, 0)), wall), np.zeros(1), 64, 64)
    assert surfaces.instances_thw[0, 0, 0] == 2
    np.testing.assert_allclose(
        surfaces.depth_thw[0][surfaces.instances_thw[0] == 2], 7.0, rtol=1e-6
    )  # flat, not radial
    assert surfaces.depth_thw[0, 32, 32] == pytest.approx(3.5, abs=1e-2)  # the pixel is half a pixel aside


def test_left_is_left_and_up_is_up_in_the_picture() -> None:
    surfaces = trace(studio(thing("sphere", (4, 2, 0)), thing("sphere", (4, 0, 2))), np.zeros(1), 64, 64)
    rows, columns = np.nonzero(surfaces.instances_thw[0] == 1)
    assert columns.max() < 32  # y of the world is to the camera's left
    assert abs(rows.mean() - 31.5) < 1
    rows, columns = np.nonzero(surfaces.instances_thw[0] == 2)
    assert rows.max() < 32
    assert abs(columns.mean() - 31.5) < 1


def test_sky_has_no_depth_and_no_instance() -> None:
    surfaces = trace(studio(thing("sphere", (4, 0, 0))), np.zeros(1), 32, 32)
    sky = surfaces.part_thw[0] == SKY
    assert np.isnan(surfaces.depth_thw[0][sky]).all()
    assert not np.isnan(surfaces.depth_thw[0][~sky]).any()
    assert not surfaces.instances_thw[0][sky].any()


def test_the_window_of_a_part_never_cuts_it() -> None:
    """Each scene traced with windows equals the nearest hit over whole pictures."""
    for index in range(6):
        scene = make_scene("train", 11, index)
        surfaces = trace(scene, np.array([0.0, 0.7]), 40, 56)
        np.testing.assert_array_equal(surfaces.part_thw[1], _nearest_parts(surfaces, 1, scene.far_metres))


def _nearest_parts(surfaces: Surfaces, time: int, far: float) -> np.ndarray:
    height, width = surfaces.depth_thw.shape[1:]
    pose = surfaces.pose_t44[time]
    directions = ray_directions(pose, surfaces.intrinsics_33, height, width).astype(np.float32).reshape(3, -1)
    origin = -pose[:3, :3].T @ pose[:3, 3]
    nearest, number = np.full(height * width, np.float32(far)), np.full(height * width, SKY)
    for index, placed in enumerate(surfaces.parts):
        local = (placed.rotation_t33[time].T @ (origin - placed.centre_t3[time])).astype(np.float32)
        found = hit_shape(placed.part, local[:, None], placed.rotation_t33[time].T.astype(np.float32) @ directions)
        number[found < nearest] = index
        nearest = np.minimum(found, nearest)
    return number.reshape(height, width)


def test_a_body_casts_a_shadow_away_from_the_light() -> None:
    floor = thing("ground", (0, 0, -1))
    lit = studio(scenery=(floor,))
    shaded = studio(thing("box", (4, 0, 2), (0.5, 0.5, 0.2)), scenery=(floor,))
    shaded = replace(shaded, camera=replace(shaded.camera, pitch=-0.3))
    lit = replace(lit, camera=shaded.camera)
    before, after = (render(scene, np.zeros(1), 64, 64)[0].astype(int) for scene in (lit, shaded))
    instances = trace(shaded, np.zeros(1), 64, 64)
    points = instances.points(0).reshape(3, 64, 64)
    under = (np.abs(points[0] - 4) < 0.4) & (np.abs(points[1]) < 0.4) & (np.abs(points[2] + 1) < 1e-3)
    clear = (np.abs(points[0] - 4) > 0.7) & (np.abs(points[2] + 1) < 1e-3) & (instances.instances_thw[0] == 0)
    assert under.any()
    assert (after[under] < 0.7 * before[under]).all()  # half of the light was the sun's
    np.testing.assert_array_equal(after[clear], before[clear])


def test_a_lamp_throws_the_shadow_beyond_the_body() -> None:
    floor = thing("ground", (0, 0, -1))
    lamp = Light(position=(2, 0, 1.5), strength=0.5)
    scene = replace(studio(thing("sphere", (4, 0, 0), (0.4, 0.4, 0.4)), scenery=(floor,)), lights=(lamp,))
    bare = replace(scene, bodies=())
    before, after = (render(one, np.zeros(1), 96, 96)[0].astype(int) for one in (bare, scene))
    points = trace(bare, np.zeros(1), 96, 96).points(0).reshape(3, 96, 96)
    instances = trace(scene, np.zeros(1), 96, 96).instances_thw[0]
    darker = (after.sum(-1) < before.sum(-1) - 5) & (instances == 0)
    assert darker.any()
    assert points[0][darker].min() > 4.0  # behind the sphere, seen from the lamp


def test_exposure_noise_and_blur_change_pictures_and_nothing_else() -> None:
    scene = replace(make_scene("train", 2, 3), effects=Effects())
    seconds = np.array([0.2, 0.8])
    plain = render(scene, seconds, 48, 64).astype(float)
    bright = render(replace(scene, effects=Effects(exposure=(0.5, 0.5))), seconds, 48, 64)
    np.testing.assert_allclose(bright, plain * 0.5, atol=1.01)
    noisy = replace(scene, effects=Effects(noise=4.0))
    difference = render(noisy, seconds, 48, 64) - plain
    assert 3 < difference.std() < 5
    np.testing.assert_array_equal(render(noisy, seconds[1:], 48, 64)[0], render(noisy, seconds, 48, 64)[1])
    spin = Trajectory(segments=(Segment(start_seconds=0, position=(0, 0, 1), yaw_rate=0.5),))
    turning = replace(scene, camera=replace(scene.camera, trajectory=spin))
    sharp, blurred = (
        render(replace(turning, effects=Effects(shutter_seconds=shutter)), seconds, 48, 64).astype(float)
        for shutter in (0.0, 0.15)
    )
    assert np.abs(np.diff(blurred, axis=2)).mean() < 0.8 * np.abs(np.diff(sharp, axis=2)).mean()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_varies_stays_in_range_and_turns_grey_far_away(pattern: str) -> None:
    points = np.random.default_rng(1).uniform(-3, 3, (3, 5000)).astype(np.float32)
    texture = Texture(pattern=pattern, colour=(0, 0, 0), other=(1, 1, 1), scale=0.7, phase=(0.3, 0.2, 0.1))
    near = colours(texture, points, np.zeros(5000, np.float32))
    assert near.min() >= 0
    assert near.max() <= 1
    assert near.std() > 0.1
    np.testing.assert_allclose(colours(texture, points, np.full(5000, 0.7, np.float32)), 0.5)


def test_the_same_id_is_the_same_scene_and_another_seed_another() -> None:
    scene = make_scene("test", 7, 12)
    assert scene.id == "test-7-12"
    assert scene_of(scene.id) == scene == make_scene("test", 7, 12)
    assert make_scene("test", 8, 12).frame_seconds != scene.frame_seconds or make_scene("test", 8, 12) != scene
    for bad in ("test-7", "tests-7-1", "test--1-2", "video.mp4"):
        with pytest.raises(RequestError, match="not the id of a world"):
            scene_of(bad)


def test_splits_share_no_layout_no_texture_and_no_combination_of_hard() -> None:
    full = [split for split in SPLITS if split not in PLAIN_SPLITS]
    easier: list[tuple[Split, Split]] = [("plain_train", "plain_test"), ("single_train", "single_test")]
    assert {split for pair in easier for split in pair} == set(PLAIN_SPLITS)
    for one, other in (*permutations(full, 2), *easier):
        assert one != other
        assert not set(FAMILIES[one]) & set(FAMILIES[other])
        assert not set(LAYOUTS[one]) & set(LAYOUTS[other])
    for split in SPLITS:
        for index in range(30):
            scene = make_scene(split, 0, index)
            assert scene.layout in LAYOUTS[split]
            solid = [body for body in scene.bodies if body.motion != "still"]
            patterns = {part.texture.pattern for body in scene.bodies for part in body.parts}
            assert patterns <= set(FAMILIES[split])
            for body in solid:
                category = {"toy car": "toy"}.get(body.category, body.category)
                rare = held_out(category, body.motion) or held_out(category, body.colour)
                assert split in PLAIN_SPLITS or rare == (split == "hard")


def test_bodies_have_their_own_names_start_in_view_and_never_touch() -> None:
    for index in range(40):
        scene = make_scene("train", 1, index)
        names = [body.name for body in scene.bodies]
        assert len(set(names)) == len(names)
        assert scene.frame_seconds[0] == 0
        assert list(scene.frame_seconds) == sorted(set(scene.frame_seconds))
        seconds = np.linspace(0, scene.duration_seconds, 50)
        paths = [body.trajectory.position(seconds) for body in scene.bodies]
        for one in range(len(paths)):
            for other in range(one):
                apart = np.hypot(*(paths[one] - paths[other])[:, :2].T).min()
                assert apart > 0.9 * (scene.bodies[one].radius + scene.bodies[other].radius)
        assert all((path[:, 2] > body.size[2] / 2 - 1e-6).all() for path, body in zip(paths, scene.bodies, strict=True))


def test_all_settings_cameras_and_motions_occur() -> None:
    scenes = [make_scene("train", 4, index) for index in range(150)]
    assert {scene.setting for scene in scenes} == {"room", "road", "table", "landscape"}
    assert {scene.camera.kind for scene in scenes} == {"stand", "pan", "walk", "drive", "shake"}
    motions = {body.motion for scene in scenes for body in scene.bodies}
    assert motions == {"still", "linear", "accelerate", "brake", "stop", "bounce", "turn", "spin"}
    assert np.mean([len(scene.bodies) for scene in scenes]) > 3
    gaps = [np.diff(scene.frame_seconds) for scene in scenes]
    assert 0.1 < np.mean([gap.std() > 1e-2 for gap in gaps]) < 0.35  # a share has a variable frame rate
