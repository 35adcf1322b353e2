"""The truth as latents: the contract, each channel against the maps of the same clip, and who can read them."""

from dataclasses import replace
from math import radians
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from p4dprep import worlds
from p4dprep.encoding import choose
from p4dprep.errors import RequestError
from p4dprep.registry import build, parse_teacher
from p4dprep.targets import FrameGeometry
from p4dprep.worlds.generate import make_scene
from p4dprep.worlds.scene import Camera, Scene, Segment, Trajectory
from p4dprep.worlds.truth import Truth, truth
from student.p4d import LatentShape
from student.rivals import Rival, RivalStrategy
from student.targets import CachedTarget
from teachers._truth_latents import CHANNELS, FLOW_FRACTION, POSITION_METRES, latents, latents_spec
from tests.p4dprep.worlds.stages import FRONT, moving, resting, stage, thing
from tests.teachers.contract import TeacherContract, prepared
from tests.teachers.test_truth import GEOMETRY, SCENES, batch_of, film

GRID = 4
SECONDS = np.array([0.0, 0.5, 1.0, 1.5])
HEIGHT, WIDTH = 48, 64
DRIVING = Camera(
    trajectory=Trajectory(segments=(Segment(start_seconds=0, position=(0, 0, 1), velocity=(1, 0, 0), yaw_rate=0.2),)),
    pitch=0.0,
    fov_x=radians(90),
    aspect=4 / 3,
    kind="drive",
)


class TestTruthWithLatents(TeacherContract):
    geometry = GEOMETRY
    tolerance = 0.0

    @classmethod
    def spec_text(cls, weights: Path | None) -> str:
        return f"truth?latents={GRID}"

    @pytest.fixture(scope="class")
    @classmethod
    def clips(cls) -> dict[str, NDArray[np.uint8]]:
        return {scene.id: film(scene) for scene in SCENES}


def channel(values_ktyxc: NDArray[np.float32], name: str) -> NDArray[np.float32]:
    return values_ktyxc[0, ..., CHANNELS.index(name)]


def vectors(values_ktyxc: NDArray[np.float32], *names: str) -> NDArray[np.float32]:
    return np.stack([channel(values_ktyxc, name) for name in names], axis=-1)


def of_scene(scene: Scene, grid: int = GRID, seconds: NDArray[np.float64] = SECONDS) -> NDArray[np.float32]:
    return latents(scene, seconds, truth(scene, seconds, HEIGHT, WIDTH), grid)


def cells(values_thw: NDArray[Any]) -> NDArray[np.float64]:
    """Pixels of each cell of each pair of frames, (t / 2, y, x, n)."""
    t, h, w = values_thw.shape
    split = values_thw.astype(float).reshape(t // 2, 2, GRID, h // GRID, GRID, w // GRID)
    return split.transpose(0, 2, 4, 1, 3, 5).reshape(t // 2, GRID, GRID, -1)


@pytest.fixture(scope="module")
def real() -> tuple[NDArray[np.float32], Truth]:
    scene = make_scene("train", 0, 1)
    seconds = np.linspace(0, scene.duration_seconds, 6)
    known = truth(scene, seconds, HEIGHT, WIDTH)
    return latents(scene, seconds, known, GRID), known


def test_without_the_option_nothing_changes() -> None:
    teacher = build(parse_teacher("truth"))
    assert "latents" not in {spec.name for spec in teacher.targets(GEOMETRY)}
    assert teacher.fingerprint() == {"worlds": worlds.VERSION, "code": "1"}
    assert teacher.resolved_spec() == ("", {})


def test_with_it_one_target_is_added_and_the_others_stay() -> None:
    plain, asked = (prepared(build(parse_teacher(text))) for text in ("truth", "truth?latents=4"))
    assert asked.targets(GEOMETRY)[:-1] == plain.targets(GEOMETRY)
    assert asked.targets(GEOMETRY)[-1].shape == (1, 2, 4, 4, len(CHANNELS))
    assert asked.fingerprint().items() > plain.fingerprint().items()
    assert asked.fingerprint() != build(parse_teacher("truth?latents=5")).fingerprint()
    batch = batch_of(SCENES[0].id, film(SCENES[0]))
    found, expected = asked.predict(batch).arrays, plain.predict(batch).arrays
    assert found.keys() - expected.keys() == {"latents"}
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


def test_depth_sky_and_motion_are_means_of_the_maps(real: tuple[NDArray[np.float32], Truth]) -> None:
    values, known = real
    depth = cells(known.depth_thw)
    assert np.isnan(depth).any()
    seen = np.maximum((~np.isnan(depth)).sum(-1), 1)
    np.testing.assert_allclose(channel(values, "log_depth"), np.nansum(np.log(depth), axis=-1) / seen, atol=1e-5)
    np.testing.assert_allclose(channel(values, "sky"), np.isnan(depth).mean(-1), atol=1e-6)
    np.testing.assert_allclose(channel(values, "motion"), cells(known.motion_thw).mean(-1), atol=1e-6)
    assert channel(values, "motion").any()


def test_flow_is_the_mean_of_what_is_valid_in_tenths_of_the_frame(real: tuple[NDArray[np.float32], Truth]) -> None:
    values, known = real
    for index, (name, side) in enumerate((("flow_u", WIDTH), ("flow_v", HEIGHT))):
        flow = cells(known.flow_thw2[..., index]) / side / FLOW_FRACTION
        assert np.isnan(flow[0, :, :, : flow.shape[-1] // 2]).all()  # the first frame has none
        np.testing.assert_allclose(channel(values, name), np.nanmean(flow, axis=-1), atol=1e-5)


def test_flow_of_what_passes_close_by_is_cut_to_the_frame(real: tuple[NDArray[np.float32], Truth]) -> None:
    _, known = real
    wild = replace(known, flow_thw2=np.where(np.isnan(known.flow_thw2), np.nan, np.float32(1e30)))
    values = latents(make_scene("train", 0, 1), np.arange(6.0), wild, GRID)
    np.testing.assert_allclose(vectors(values, "flow_u", "flow_v"), 1 / FLOW_FRACTION)


def test_before_a_standing_camera_flow_is_where_things_move() -> None:
    values = of_scene(stage(moving("red", (4, 0, 1), (0, 1, 0))))[:, 1:]  # of the first frame flow is not known
    has_motion = channel(values, "motion") > 0
    assert np.abs(vectors(values, "flow_u", "flow_v")[~has_motion]).max() < 1e-5
    assert channel(values, "flow_u")[has_motion].min() > 0  # it moves left, so it came from the right


def test_a_moving_body_gives_its_cells_its_velocity_as_the_first_camera_sees_it() -> None:
    values = of_scene(stage(moving("red", (4, -1, 1), (0.5, 1, 0.25))))
    has_motion = channel(values, "motion") > 0
    assert 0 < has_motion.sum() < has_motion.size
    velocity = vectors(values, "velocity_x", "velocity_y", "velocity_z")
    np.testing.assert_allclose(velocity[has_motion], np.tile([-1, -0.25, 0.5], (has_motion.sum(), 1)), atol=1e-6)
    assert not velocity[~has_motion].any()


def test_velocity_is_that_of_the_frames_own_time() -> None:
    scene = stage(thing("red", Segment(start_seconds=0, position=(4, 0, 1), acceleration=(0.4, 0, 0))))
    values = of_scene(scene, grid=1)
    first, second = channel(values, "velocity_z")[:, 0, 0]
    assert 0 < first < 0.4 * 0.5  # between its times 0 and 0.5 s
    assert 0.4 * 1.0 < second < 0.4 * 1.5


def test_in_a_standing_scene_nothing_moves_though_the_camera_does() -> None:
    values = of_scene(stage(resting("red", (6, 0, 1)), camera=DRIVING))
    assert not vectors(values, "motion", "velocity_x", "velocity_y", "velocity_z").any()
    assert channel(values, "flow_u").any()


@pytest.mark.parametrize("camera", [FRONT, DRIVING])
def test_positions_are_those_of_the_surface_in_the_first_cameras_coordinates(camera: Camera) -> None:
    values = of_scene(stage(resting("red", (6, -1, 1.5)), camera=camera), grid=1)
    position = POSITION_METRES * vectors(values, "position_x", "position_y", "position_z")[0, 0, 0]
    np.testing.assert_allclose(position, [1, -0.5, 6], atol=0.35)  # half the size of the body
    later = POSITION_METRES * vectors(values, "position_x", "position_y", "position_z")[1, 0, 0]
    np.testing.assert_allclose(later, position, atol=0.1)  # it stands, and more or less of a side is seen


def test_bodies_have_a_position_of_their_own_in_cells_that_see_scenery_too() -> None:
    scene = make_scene("plain_train", 0, 1)  # its camera stands: depth is the z of the first camera
    known = truth(scene, SECONDS, HEIGHT, WIDTH)
    values = latents(scene, SECONDS, known, GRID)
    is_body = cells(known.instances_thw > 0)
    share = channel(values, "body")
    np.testing.assert_allclose(share, is_body.mean(-1), atol=1e-6)
    assert ((share > 0) & (share < 0.5)).any()
    assert not vectors(values, "body_x", "body_y", "body_z")[share == 0].any()
    depth = np.where(is_body, cells(known.depth_thw), 0).sum(-1) / np.maximum(is_body.sum(-1), 1)
    np.testing.assert_allclose(POSITION_METRES * channel(values, "body_z"), depth, atol=1e-4)


def test_the_position_of_one_pixel_follows_from_its_depth() -> None:
    scene = stage(resting("red", (2, 0, 1), yaw=0.3))
    known = truth(scene, SECONDS, HEIGHT, HEIGHT)
    values = latents(scene, SECONDS, known, HEIGHT)
    row, column = 20, 25
    ray = np.linalg.inv(known.intrinsics_33) @ [column + 0.5, row + 0.5, 1]
    found = POSITION_METRES * vectors(values, "position_x", "position_y", "position_z")[0, row, column]
    np.testing.assert_allclose(found, ray * known.depth_thw[0, row, column], rtol=1e-5)


def test_a_cell_of_sky_has_no_depth_position_nor_motion() -> None:
    values = of_scene(stage(resting("red", (4, 0, 1))))
    corner = dict(zip(CHANNELS, values[0, 0, 0, 0].tolist(), strict=True))
    assert corner.pop("sky") == 1
    assert not any(value for name, value in corner.items() if not name.startswith("flow"))
    assert np.isfinite(values).all()


def test_an_odd_frame_is_a_step_of_its_own_and_sides_need_not_divide() -> None:
    seconds = np.array([0.0, 0.5, 1.0])
    scene = stage(moving("red", (4, 0, 1), (0, 1, 0)))
    values = of_scene(scene, grid=5, seconds=seconds)
    assert values.shape == (1, 2, 5, 5, len(CHANNELS))
    moves = truth(scene, seconds, HEIGHT, WIDTH).motion_thw[2]
    assert channel(values, "motion")[1, 2, 2] == pytest.approx(moves[19:28, 25:38].mean(), abs=1e-6)


def test_the_cache_keeps_them_to_a_twentieth_and_zeros_as_zeros(real: tuple[NDArray[np.float32], Truth]) -> None:
    values, _ = real
    spec = latents_spec(FrameGeometry(num_frames=6, height=HEIGHT, width=WIDTH), GRID)
    spec.check(values, "clip")
    encoding = choose(spec)
    decoded = encoding.decode(encoding.encode(values, spec).parts, spec)
    assert np.abs(decoded - values).max() < 0.05
    assert not decoded[values == 0].any()


@pytest.mark.parametrize("strategy", ["4d-concat", "4d-pe"])
def test_a_student_reads_them_as_any_teachers(strategy: RivalStrategy) -> None:
    frames = FrameGeometry(num_frames=16, height=96, width=96)
    target = CachedTarget(group="truth", spec=latents_spec(frames, 6))
    assert LatentShape.of(target) == LatentShape(num_taps=1, grid=(8, 6, 6), channels=len(CHANNELS))
    assert Rival(strategy, target, frames.num_frames, hidden_size=8).targets == ("truth_latents",)


@pytest.mark.parametrize("text", ["0", "-1", "6x6", "2.5"])
def test_a_grid_that_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match=rf"latents={text} is not a number of rows and columns such as 6"):
        build(parse_teacher(f"truth?latents={text}"))


def test_more_cells_than_pixels_are_refused_before_any_work() -> None:
    with pytest.raises(RequestError, match="latents=37 asks for more rows or columns than frames of 36 x 48 have"):
        build(parse_teacher("truth?latents=37")).targets(GEOMETRY)
