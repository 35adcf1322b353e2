"""The truth of a world's clip as a teacher: exact depth, flow, motion, instances, rays and camera, no weights.

A clip's id names its scene (`p4dprep worlds`); the scene is traced at the very times of the decoded frames. A clip
whose pictures are not that scene's is refused, whatever its name. With `?latents=6` the cache gets the same truth once
more, as latents of 6 x 6 tokens a pair of frames (`teachers._truth_latents`).

Shape suffixes: `b` batch, `t` frames, `h w` pixels, `c` channels.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from p4dprep import worlds
from p4dprep.errors import RequestError, TeacherError, TeacherOutputError
from p4dprep.registry import take_options
from p4dprep.targets import (
    DType,
    FrameBatch,
    FrameGeometry,
    Predictions,
    Quantity,
    Resources,
    TargetSpec,
    Teacher,
    TeacherInfo,
)
from p4dprep.worlds.generate import scene_of
from p4dprep.worlds.render import render
from p4dprep.worlds.scene import Scene
from p4dprep.worlds.truth import RAY_GRID, truth
from teachers._flow import DIRECTIONS, as_direction, flow_target
from teachers._truth_latents import LATENTS_VERSION, latents, latents_spec, parse_grid

CODE_VERSION = "1"

CLOCK_TOLERANCE_SECONDS = 1e-3
"""How far a decoded time may lie from a time of the scene's own frames; containers round to their ticks."""

THUMBNAIL = 8
"""Rows and columns of the means that a decoded frame is compared by."""

MIN_CHECK_SIDE = 32
"""Pixels a side of what is rendered for that comparison; a quarter of the frames' where that is more."""

MAX_THUMBNAIL_DIFFERENCE = 10.0
"""Mean absolute difference, of 255, of those means. Measured on 24 scenes at 224 x 224 after H.264: at most 2.5 for
the same scene (5.0 where frames are as small as 32 x 32), at least 21 between any two scenes."""


class TruthTeacher(Teacher):
    """What is true of every pixel, from the scene's geometry; nothing is looked up in the frames."""

    info = TeacherInfo(
        summary="Exact depth, flow, motion, instances, rays and camera of clips that `p4dprep worlds` made",
        licence="Apache-2.0",
        argument="",
        downloads="nothing",
        options={"latents": "rows, and as many columns, of a grid: the truth as latents too, for pairs of frames"},
    )

    resources = Resources(num_gpus=0)

    def __init__(self, grid: int | None = None) -> None:
        self._grid = grid
        self._is_ready = False

    @classmethod
    def from_spec(cls, argument: str, options: Mapping[str, str]) -> Self:
        """Build from `truth` or `truth?latents=ROWS`."""
        if argument:
            raise RequestError(f"teacher 'truth' takes no argument, not {argument!r}")
        return cls(parse_grid(take_options("truth", options, {"latents": ()})["latents"]))

    def resolved_spec(self) -> tuple[str, dict[str, str]]:
        """No argument; the grid of latents, if there are any."""
        return "", {} if self._grid is None else {"latents": str(self._grid)}

    def targets(self, frames: FrameGeometry) -> tuple[TargetSpec, ...]:
        """Maps at the frames' size, the camera, and latents if asked for.

        Raises:
            RequestError: fewer than two frames have no flow; a padded picture shows the scene elsewhere; latents have
                more cells than there are pixels.
        """
        if frames.resize != "squash":
            raise RequestError(
                f"truth is that of pictures squashed to their size, not {frames.resize}; use --resize squash"
            )
        found = (*_maps(frames), *_camera(frames.num_frames))
        return found if self._grid is None else (*found, latents_spec(frames, self._grid))

    def fingerprint(self) -> dict[str, str]:
        """Versions of the worlds and of this code; with latents also their grid and version."""
        own = {} if self._grid is None else {"latents": str(self._grid), "latents_code": LATENTS_VERSION}
        return {"worlds": worlds.VERSION, "code": CODE_VERSION, **own}

    def setup(self, device: str) -> None:  # noqa: ARG002
        """Nothing to load."""
        self._is_ready = True

    def predict(self, batch: FrameBatch) -> Predictions:
        """The truth of each clip at its frames' times.

        Raises:
            TeacherOutputError: a clip is no world's, or not the one that its id names.
            TeacherError: `setup` was not called.
        """
        if not self._is_ready:
            raise TeacherError("truth: predict was called before setup or after close")
        rows = [
            _clip_truth(*clip, self._grid)
            for clip in zip(batch.clip_ids, batch.frames_bthwc, batch.time_seconds_bt, strict=True)
        ]
        return Predictions(
            clip_ids=batch.clip_ids, arrays={name: np.stack([row[name] for row in rows]) for name in rows[0]}
        )

    def close(self) -> None:
        """Nothing to let go of."""
        self._is_ready = False


def _maps(frames: FrameGeometry) -> tuple[TargetSpec, ...]:
    depth = "Along the optical axis; NaN where there is sky."
    seen_before = "The point is seen in frame n-1 too; false throughout frame 0."
    seen_after = "The point is seen in frame n+1 too; false throughout the last frame."
    motion = "The point moves in the world from frame n-1 to n (frame 0: to frame 1)."
    instances = "0 for scenery and sky, i + 1 for body i of the scene."
    backward, forward = (
        replace(flow_target(frames, as_direction(direction)), may_be_invalid=True) for direction in DIRECTIONS
    )
    return (
        replace(_map(frames, "depth", "metric depth", "float32", depth), units="m", may_be_invalid=True),
        backward,
        replace(forward, name="flow_forward"),
        _map(frames, "flow_visible", "visibility mask", "bool", seen_before),
        _map(frames, "flow_forward_visible", "visibility mask", "bool", seen_after),
        _map(frames, "motion", "motion mask", "bool", motion),
        _map(frames, "instances", "instance ids", "uint8", instances),
    )


def _map(frames: FrameGeometry, name: str, quantity: Quantity, dtype: DType, description: str) -> TargetSpec:
    return TargetSpec(
        name=name,
        dims=("t", "y", "x"),
        shape=(frames.num_frames, frames.height, frames.width),
        dtype=dtype,
        units="1",
        quantity=quantity,
        transforms=("flip_x",),
        description=description,
    )


def _camera(num_frames: int) -> tuple[TargetSpec, ...]:
    return (
        TargetSpec(
            name="camray",
            dims=("t", "ray_y", "ray_x", "pluecker"),
            shape=(num_frames, *RAY_GRID, 6),
            dtype="float32",
            units="1",
            quantity="plücker rays",
            description="[d, o x d] through the centres of a grid of cells, in the first camera's coordinates; o in m.",
        ),
        TargetSpec(
            name="pose",
            dims=("t", "row", "column"),
            shape=(num_frames, 4, 4),
            dtype="float32",
            units="1",
            quantity="camera pose",
            description="World to camera: x right, y down, z forward; translation in m.",
        ),
        TargetSpec(
            name="intrinsics",
            dims=("t", "k_row", "k_column"),
            shape=(num_frames, 3, 3),
            dtype="float32",
            units="px",
            quantity="camera intrinsics",
            description="K of the frames as squashed; pixel centres lie at half-integers.",
        ),
    )


def _clip_truth(
    clip_id: str, frames_thwc: NDArray[np.uint8], seconds_t: NDArray[np.float64], grid: int | None
) -> dict[str, NDArray[np.generic]]:
    scene = _scene_of_clip(clip_id)
    _check_clock(scene, seconds_t)
    _check_pictures(scene, frames_thwc, seconds_t)
    num_frames, height, width, _ = frames_thwc.shape
    found = truth(scene, seconds_t, height, width)
    own = {} if grid is None else {"latents": latents(scene, seconds_t, found, grid)}
    return {
        "depth": found.depth_thw,
        "flow": found.flow_thw2,
        "flow_forward": found.flow_forward_thw2,
        "flow_visible": found.flow_visible_thw,
        "flow_forward_visible": found.flow_forward_visible_thw,
        "motion": found.motion_thw,
        "instances": found.instances_thw,
        "camray": found.camray_tyx6,
        "pose": found.pose_t44.astype(np.float32),
        "intrinsics": np.tile(found.intrinsics_33.astype(np.float32), (num_frames, 1, 1)),
        **own,
    }


def _scene_of_clip(clip_id: str) -> Scene:
    try:
        return scene_of(clip_id.split("#")[0])  # a window of a clip is named ID#START-END
    except RequestError as error:
        raise TeacherOutputError(f"its truth is not known: {error}; give the manifest of p4dprep worlds") from None


def _check_clock(scene: Scene, seconds_t: NDArray[np.float64]) -> None:
    own = np.asarray(scene.frame_seconds)
    after = np.clip(np.searchsorted(own, seconds_t), 1, len(own) - 1)
    apart = np.minimum(np.abs(own[after] - seconds_t), np.abs(own[after - 1] - seconds_t))
    if apart.max() > CLOCK_TOLERANCE_SECONDS:
        raise TeacherOutputError(
            f"the frame at {seconds_t[apart.argmax()]:.4f} s lies {apart.max():.4f} s from every frame of scene "
            f"{scene.id}; the video is of another version or was coded again: make it with p4dprep worlds"
        )


def _check_pictures(scene: Scene, frames_thwc: NDArray[np.uint8], seconds_t: NDArray[np.float64]) -> None:
    """Compare the first and the last frame with the scene's, small."""
    ends = [0, len(seconds_t) - 1]
    height, width = (max(MIN_CHECK_SIDE, side // 4) for side in frames_thwc.shape[1:3])
    expected = render(scene, seconds_t[ends], height, width)
    difference = float(np.abs(thumbnails(frames_thwc[ends]) - thumbnails(expected)).mean())
    if difference > MAX_THUMBNAIL_DIFFERENCE:
        raise TeacherOutputError(
            f"the pictures are not those of scene {scene.id}: they differ by {difference:.1f} of 255, more than "
            f"{MAX_THUMBNAIL_DIFFERENCE:g}; the video is of another version: make it with p4dprep worlds"
        )


def thumbnails(frames_thwc: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Mean colours (t, THUMBNAIL, THUMBNAIL, c) of a grid of cells, 0-255; sides of at least THUMBNAIL."""
    rows, columns = (np.linspace(0, side, THUMBNAIL + 1).astype(int) for side in frames_thwc.shape[1:3])
    sums = np.add.reduceat(np.add.reduceat(frames_thwc.astype(float), rows[:-1], axis=1), columns[:-1], axis=2)
    return np.asarray(sums / np.outer(np.diff(rows), np.diff(columns))[..., None])
