"""The truth as a teacher: the contract, its targets, and that it refuses clips whose truth it cannot know."""

from dataclasses import replace
from itertools import count, islice
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from p4dprep import worlds
from p4dprep.errors import RequestError, TeacherOutputError
from p4dprep.registry import build, parse_teacher
from p4dprep.targets import FrameBatch, FrameGeometry
from p4dprep.worlds.generate import make_scene
from p4dprep.worlds.render import render
from p4dprep.worlds.scene import Scene
from p4dprep.worlds.truth import truth
from teachers.truth import thumbnails
from tests.teachers.contract import TeacherContract, make_batch, prepared

GEOMETRY = FrameGeometry(num_frames=3, height=36, width=48)
SECONDS = np.arange(GEOMETRY.num_frames) / 10
"""Of the contract's batches."""

SCENES = tuple(
    islice((scene for scene in (make_scene("val", 0, n) for n in count()) if scene.frame_seconds[1:3] == (0.1, 0.2)), 3)
)


def film(scene: Scene, seconds: NDArray[np.float64] = SECONDS) -> NDArray[np.uint8]:
    return render(scene, seconds, GEOMETRY.height, GEOMETRY.width)


def batch_of(clip_id: str, frames_thwc: NDArray[np.uint8], seconds: NDArray[np.float64] = SECONDS) -> FrameBatch:
    return FrameBatch(clip_ids=(clip_id,), frames_bthwc=frames_thwc[None], time_seconds_bt=seconds[None])


class TestTruth(TeacherContract):
    geometry = GEOMETRY
    tolerance = 0.0

    @classmethod
    def spec_text(cls, weights: Path | None) -> str:
        return "truth"

    @pytest.fixture(scope="class")
    @classmethod
    def clips(cls) -> dict[str, NDArray[np.uint8]]:
        return {scene.id: film(scene) for scene in SCENES}


def test_a_clip_gets_the_truth_of_its_scene_at_the_times_of_its_frames() -> None:
    scene = SCENES[0]
    seconds = np.array(scene.frame_seconds)[[0, 4, 9]]
    arrays = prepared(build(parse_teacher("truth"))).predict(batch_of(scene.id, film(scene, seconds), seconds)).arrays
    expected = truth(scene, seconds, GEOMETRY.height, GEOMETRY.width)
    np.testing.assert_array_equal(arrays["depth"][0], expected.depth_thw)
    np.testing.assert_array_equal(arrays["flow"][0], expected.flow_thw2)
    np.testing.assert_array_equal(arrays["flow_forward"][0], expected.flow_forward_thw2)
    np.testing.assert_array_equal(arrays["flow_visible"][0], expected.flow_visible_thw)
    np.testing.assert_array_equal(arrays["flow_forward_visible"][0], expected.flow_forward_visible_thw)
    np.testing.assert_array_equal(arrays["motion"][0], expected.motion_thw)
    np.testing.assert_array_equal(arrays["instances"][0], expected.instances_thw)
    np.testing.assert_array_equal(arrays["camray"][0], expected.camray_tyx6)
    np.testing.assert_allclose(arrays["pose"][0], expected.pose_t44, atol=1e-5)
    np.testing.assert_allclose(arrays["intrinsics"][0], np.stack([expected.intrinsics_33] * 3), rtol=1e-6)


def test_it_names_its_targets_and_the_version_of_the_worlds() -> None:
    teacher = build(parse_teacher("truth"))
    specs = {spec.name: spec for spec in teacher.targets(GEOMETRY)}
    assert list(specs) == [
        *("depth", "flow", "flow_forward", "flow_visible", "flow_forward_visible", "motion", "instances"),
        *("camray", "pose", "intrinsics"),
    ]
    assert [specs[name].quantity for name in ("flow", "flow_forward")] == ["backward flow", "forward flow"]
    assert [specs[name].invalid_frames for name in ("flow", "flow_forward")] == ["first", "last"]
    assert [name for name, spec in specs.items() if spec.may_be_invalid] == ["depth", "flow", "flow_forward"]
    assert teacher.fingerprint()["worlds"] == worlds.VERSION
    assert teacher.resources.num_gpus == 0


def test_a_window_of_a_clip_is_the_clip() -> None:
    scene = SCENES[0]
    predictions = prepared(build(parse_teacher("truth"))).predict(batch_of(f"{scene.id}#0.000-0.300", film(scene)))
    assert predictions.clip_ids == (f"{scene.id}#0.000-0.300",)


@pytest.mark.parametrize(
    ("clip_id", "message"),
    [
        ("dog.mp4", r"truth is not known: 'dog\.mp4' is not the id of a world"),
        (SCENES[1].id, rf"not those of scene {SCENES[1].id}: they differ by \d+\.\d of 255"),
    ],
)
def test_a_clip_that_is_not_the_scene_that_it_is_named_after_is_refused(clip_id: str, message: str) -> None:
    with pytest.raises(TeacherOutputError, match=message):
        prepared(build(parse_teacher("truth"))).predict(batch_of(clip_id, film(SCENES[0])))


def test_a_clip_on_another_clock_is_refused() -> None:
    batch = batch_of(SCENES[0].id, film(SCENES[0]), SECONDS + np.array([0, 0.03, 0]))
    with pytest.raises(TeacherOutputError, match=r"the frame at 0\.1300 s lies 0\.0300 s from every frame"):
        prepared(build(parse_teacher("truth"))).predict(batch)


def test_a_clip_that_was_mirrored_is_refused() -> None:
    with pytest.raises(TeacherOutputError, match="the pictures are not those"):
        prepared(build(parse_teacher("truth"))).predict(make_batch({SCENES[0].id: film(SCENES[0])[:, :, ::-1]}))


def test_thumbnails_are_means_of_cells() -> None:
    frames = np.zeros((1, 17, 24, 3), np.uint8)
    frames[0, :2, :3] = (60, 30, 0)
    frames[0, -3:, -3:, 2] = 90
    found = thumbnails(frames)
    assert found.shape == (1, 8, 8, 3)
    assert found[0, 0, 0].tolist() == [60, 30, 0]
    assert found[0, -1, -1].tolist() == [0, 0, 90]
    assert found.sum() == 180


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (replace(GEOMETRY, resize="pad"), "squashed to their size, not pad; use --resize squash"),
        (replace(GEOMETRY, num_frames=1), "at least 2 frames"),
    ],
)
def test_frames_that_have_no_truth_are_refused_before_any_work(frames: FrameGeometry, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        build(parse_teacher("truth")).targets(frames)


def test_it_takes_no_argument() -> None:
    with pytest.raises(RequestError, match="takes no argument, not 'x'"):
        build(parse_teacher("truth:x"))
