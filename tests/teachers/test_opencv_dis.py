"""DIS flow: the contract, the direction and sign of flow, and that threads do not matter."""

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from p4dprep.errors import RequestError
from p4dprep.registry import build, parse_teacher
from p4dprep.targets import FrameGeometry
from teachers._flow import frame_pairs
from teachers.opencv_dis import MIN_SIDE
from tests.teachers.contract import TeacherContract, make_batch, prepared, textured_clip

GEOMETRY = FrameGeometry(num_frames=4, height=96, width=128)


class TestOpenCVDIS(TeacherContract):
    geometry = FrameGeometry(num_frames=3, height=48, width=64)
    tolerance = 0.0

    @classmethod
    def spec_text(cls, weights: Path | None) -> str:
        return "opencv-dis"


@pytest.mark.parametrize("preset", ["medium", "fast", "ultrafast"])
@pytest.mark.parametrize(("direction", "u", "v"), [("backward", -3, -1), ("forward", 3, 1)])
def test_a_scene_moving_right_and_down_has_backward_flow_to_the_left_and_up(
    preset: str, direction: str, u: int, v: int
) -> None:
    teacher = prepared(build(parse_teacher(f"opencv-dis?preset={preset}&direction={direction}")))
    (spec,) = teacher.targets(GEOMETRY)
    flow_thw2 = teacher.predict(make_batch({"a": textured_clip(GEOMETRY, 0, (3, 1))})).arrays["flow"][0]
    assert spec.quantity == f"{direction} flow"
    inner = flow_thw2[spec.valid_frames(), 16:-16, 16:-16]
    assert np.median(inner, axis=(0, 1, 2)) == pytest.approx([u, v], abs=0.25)
    assert np.isnan(flow_thw2[0 if direction == "backward" else -1]).all()


def test_the_result_does_not_depend_on_the_number_of_threads() -> None:
    batch = make_batch({"a": textured_clip(GEOMETRY, 1)})
    before = cv2.getNumThreads()
    try:
        flows = []
        for num_threads in (1, 2, 4):
            cv2.setNumThreads(num_threads)
            flows.append(prepared(build(parse_teacher("opencv-dis"))).predict(batch).arrays["flow"])
    finally:
        cv2.setNumThreads(before)
    assert all(np.array_equal(flow, flows[0], equal_nan=True) for flow in flows)


def test_a_reused_matcher_gives_what_a_fresh_one_gives() -> None:
    teacher = prepared(build(parse_teacher("opencv-dis")))
    batch = make_batch({"a": textured_clip(GEOMETRY, 2)})
    teacher.predict(make_batch({"b": textured_clip(GEOMETRY, 3)}))
    fresh = prepared(build(parse_teacher("opencv-dis"))).predict(batch).arrays["flow"]
    np.testing.assert_array_equal(teacher.predict(batch).arrays["flow"], fresh)


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        (FrameGeometry(num_frames=1, height=64, width=64), "at least 2 frames"),
        (FrameGeometry(num_frames=4, height=MIN_SIDE - 1, width=224), "at least 32 px"),
    ],
)
def test_frames_it_cannot_take_are_refused_with_the_rule(frames: FrameGeometry, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        build(parse_teacher("opencv-dis")).targets(frames)


@pytest.mark.parametrize("preset", ["medium", "fast", "ultrafast"])
def test_the_smallest_frames_it_takes_do_not_crash_opencv(preset: str) -> None:
    code = (
        "import cv2, numpy as np\n"
        f"dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_{preset.upper()})\n"
        f"for h, w in (({MIN_SIDE}, {MIN_SIDE}), ({MIN_SIDE}, 2000), (2000, {MIN_SIDE}), ({MIN_SIDE}, 91)):\n"
        "    frame = np.random.default_rng(0).integers(0, 256, (h, w), dtype=np.uint8)\n"
        "    assert np.isfinite(dis.calc(frame, np.roll(frame, 2, 1), None)).all()\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("opencv-dis:medium", "takes no argument"),
        ("opencv-dis?preset=slow", "not one of medium, fast, ultrafast"),
        ("opencv-dis?direction=up", "not one of backward, forward"),
    ],
)
def test_wrong_requests_name_what_exists(text: str, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        build(parse_teacher(text))


def test_every_frame_but_the_undefined_one_has_its_neighbour() -> None:
    assert frame_pairs(3, "backward") == [(1, 0), (2, 1)]
    assert frame_pairs(3, "forward") == [(0, 1), (1, 2)]
