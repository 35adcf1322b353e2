"""What every optical flow teacher shares: the target it declares and the frame pairs it looks at."""

from typing import Literal, cast

from p4dprep.errors import RequestError
from p4dprep.targets import FrameGeometry, TargetSpec

Direction = Literal["backward", "forward"]
DIRECTIONS = ("backward", "forward")
"""Choices of `direction=`; backward is the paper's: at frame n it goes from n to n-1."""


def as_direction(text: str) -> Direction:
    """A checked option value as the type."""
    return cast(Direction, text)


def flow_target(frames: FrameGeometry, direction: Direction) -> TargetSpec:
    """The target `flow`: (t, y, x, uv) float32 pixels of the clip's frames, u to the right, v down.

    Raises:
        RequestError: a flow needs two frames.
    """
    if frames.num_frames < 2:
        raise RequestError("optical flow needs at least 2 frames a clip; use --frames 2 or more")
    backward = direction == "backward"
    return TargetSpec(
        name="flow",
        dims=("t", "y", "x", "uv"),
        shape=(frames.num_frames, frames.height, frames.width, 2),
        dtype="float32",
        units="px",
        quantity="backward flow" if backward else "forward flow",
        transforms=("flip_x",),
        invalid_frames="first" if backward else "last",
        description=f"Where each pixel of frame n lies in frame {'n-1' if backward else 'n+1'}, minus where it is.",
    )


def frame_pairs(num_frames: int, direction: Direction) -> list[tuple[int, int]]:
    """(n, neighbour) for every frame that has a flow: its pixels are looked up in the neighbour."""
    step = -1 if direction == "backward" else 1
    return [(n, n + step) for n in range(num_frames) if 0 <= n + step < num_frames]
