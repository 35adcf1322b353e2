"""Dense inverse search flow (Kroeger et al., ECCV 2016, arXiv 1603.03590) as OpenCV ships it: no weights, for CPUs.

Shape suffixes: `b` batch, `t` frames, `h w` pixels, `2` the (u, v) of a flow.
"""

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from p4dprep.errors import RequestError, TeacherError
from p4dprep.registry import take_options
from p4dprep.targets import FrameBatch, FrameGeometry, Predictions, Resources, TargetSpec, Teacher, TeacherInfo
from teachers._flow import DIRECTIONS, Direction, as_direction, flow_target, frame_pairs

CODE_VERSION = "1"
MIN_SIDE = 32
"""Smallest frame side in pixels. Below it OpenCV 5.0 picks pyramid levels smaller than its 8 px patch and crashes the
process (measured: 16 x 224); from 32 px on every shape up to 4000 px of a grid of 1,344 runs worked."""


class OpenCVDISTeacher(Teacher):
    """Optical flow in pixels without weights. The result does not depend on the number of threads."""

    info = TeacherInfo(
        summary="Dense inverse search optical flow on grey frames; needs no GPU and no weights",
        licence="Apache-2.0 (OpenCV)",
        argument="",
        downloads="nothing",
        options={
            "preset": "medium (default), fast or ultrafast: more speed, coarser flow",
            "direction": "backward (default, frame n to n-1) or forward",
        },
    )

    resources = Resources(num_gpus=0)

    def __init__(self, preset: str, direction: Direction) -> None:
        self._preset = preset
        self._direction: Direction = direction
        self._dis: Any = None

    @classmethod
    def from_spec(cls, argument: str, options: Mapping[str, str]) -> Self:
        """Build from `opencv-dis[?preset=..&direction=..]`."""
        if argument:
            raise RequestError(f"teacher 'opencv-dis' takes no argument, not {argument!r}")
        taken = take_options(
            "opencv-dis", options, {"preset": ("medium", "fast", "ultrafast"), "direction": DIRECTIONS}
        )
        return cls(taken["preset"], as_direction(taken["direction"]))

    def resolved_spec(self) -> tuple[str, dict[str, str]]:
        """No argument; both options."""
        return "", {"preset": self._preset, "direction": self._direction}

    def targets(self, frames: FrameGeometry) -> tuple[TargetSpec, ...]:
        """One target, `flow`."""
        if min(frames.height, frames.width) < MIN_SIDE:
            raise RequestError(f"opencv-dis needs frames of at least {MIN_SIDE} px a side, not {frames}; use --size")
        return (flow_target(frames, self._direction),)

    def fingerprint(self) -> dict[str, str]:
        """Preset, direction, OpenCV's version and this code's."""
        import cv2

        return {
            "algorithm": "DISOpticalFlow",
            "preset": self._preset,
            "direction": self._direction,
            "opencv": cv2.__version__,
            "code": CODE_VERSION,
        }

    def setup(self, device: str) -> None:  # noqa: ARG002
        """Make the matcher; it runs on the CPU whatever the device."""
        import cv2

        preset = getattr(cv2, f"DISOPTICAL_FLOW_PRESET_{self._preset.upper()}")
        self._dis = cv2.DISOpticalFlow.create(preset)

    def predict(self, batch: FrameBatch) -> Predictions:
        """Flow of each clip on its own, so a batch gives what single clips give, bit by bit."""
        if self._dis is None:
            raise TeacherError("opencv-dis: predict was called before setup or after close")
        flows = np.stack([self._clip_flow(frames_thwc) for frames_thwc in batch.frames_bthwc])
        return Predictions(clip_ids=batch.clip_ids, arrays={"flow": flows})

    def _clip_flow(self, frames_thwc: NDArray[np.uint8]) -> NDArray[np.float32]:
        import cv2

        grey_thw = [cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY) for frame in frames_thwc]
        flow_thw2 = np.full((*frames_thwc.shape[:3], 2), np.nan, np.float32)
        for frame, neighbour in frame_pairs(len(grey_thw), self._direction):
            flow_thw2[frame] = self._dis.calc(grey_thw[frame], grey_thw[neighbour], None)
        return flow_thw2

    def close(self) -> None:
        """Let go of the matcher's buffers."""
        self._dis = None
