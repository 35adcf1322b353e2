"""Frames kept beside the targets: what `--keep-frames SIZE` adds, so that training opens no video.

To the engine they are one more group: the kind `frames`, whose clips are decoded at its own size and stored as they
are. `--keep-frames 336` is `--teacher frames:336x336`; with a name, `--teacher large=frames:448`, a cache keeps a
second size.
"""

import re
from collections.abc import Mapping
from typing import Self

from p4dprep import registry
from p4dprep.errors import RequestError
from p4dprep.targets import (
    RGB_DIMS,
    FrameBatch,
    FrameGeometry,
    Predictions,
    Resources,
    TargetSpec,
    Teacher,
    TeacherInfo,
)

KIND = "frames"
MIN_SIDE, MAX_SIDE = 16, 4096
MAX_CLIP_BYTES = 2**30
"""Bytes of one clip's frames. A decoder, which holds them all, may use 1.5 GiB; blosc ends at 2 GiB."""

_SIZE = re.compile(r"(\d{1,5})(?:x(\d{1,5}))?")


def parse_size(value: object) -> tuple[int, int]:
    """Height and width from 224, "224", "HEIGHTxWIDTH" or [HEIGHT, WIDTH].

    Raises:
        RequestError: it is none of these, or a side is out of range.
    """
    text = "x".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    found = _SIZE.fullmatch(text.lower())
    sides = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not all(MIN_SIDE <= side <= MAX_SIDE for side in sides):
        raise RequestError(
            f"size {text!r} is not 224 or HEIGHTxWIDTH with each side between {MIN_SIDE} and {MAX_SIDE} pixels"
        )
    return sides


class KeptFrames(Teacher):
    """Gives back the frames it gets, which are decoded at its own size by the cache's own clock."""

    info = TeacherInfo(
        summary="The decoded frames themselves, for training without the videos; --keep-frames SIZE",
        licence="that of the videos",
        argument="SIDE or HEIGHTxWIDTH in pixels",
        downloads="nothing",
    )
    resources = Resources(num_gpus=0)

    def __init__(self, height: int, width: int) -> None:
        self._height, self._width = height, width

    @classmethod
    def from_spec(cls, argument: str, options: Mapping[str, str]) -> Self:
        """Build from `frames:SIZE`."""
        registry.take_options(KIND, options, {})
        return cls(*parse_size(argument))

    def resolved_spec(self) -> tuple[str, dict[str, str]]:
        """The size; no options."""
        return f"{self._height}x{self._width}", {}

    def frame_size(self, frames: FrameGeometry) -> tuple[int, int]:  # noqa: ARG002
        """The size to keep, whatever the teachers see."""
        return self._height, self._width

    def targets(self, frames: FrameGeometry) -> tuple[TargetSpec, ...]:
        """One target, `frames`.

        Raises:
            RequestError: a clip would take more than `MAX_CLIP_BYTES`.
        """
        spec = TargetSpec(
            name="frames",
            dims=RGB_DIMS,
            shape=(frames.num_frames, self._height, self._width, 3),
            dtype="uint8",
            units="1",
            quantity="rgb frames",
            transforms=("flip_x",),
            description=f"frames of the video, upright, {frames.resize} to size",
        )
        if spec.num_values > MAX_CLIP_BYTES:
            raise RequestError(
                f"{frames.num_frames} frames of {self._height}x{self._width} take {spec.num_values} bytes a clip, over "
                f"{MAX_CLIP_BYTES}; keep fewer frames or smaller ones"
            )
        return (spec,)

    def fingerprint(self) -> dict[str, str]:
        """The size; decoder and sampling are in every group's fingerprint."""
        return {"size": f"{self._height}x{self._width}"}

    def setup(self, device: str) -> None:
        """Nothing to load."""

    def predict(self, batch: FrameBatch) -> Predictions:
        """The frames as they came."""
        return Predictions(clip_ids=batch.clip_ids, arrays={"frames": batch.frames_bthwc})


def build(spec: registry.TeacherSpec) -> Teacher:
    """What fills a group: an installed teacher, or the frames themselves, which no package registers.

    Raises:
        RequestError: unknown kind, or an argument or option that the kind refuses.
        TeacherError: the kind cannot be imported.
    """
    return KeptFrames.from_spec(spec.argument, spec.options) if spec.kind == KIND else registry.build(spec)
