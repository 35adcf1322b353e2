"""The truth of a world's clip as latents: means over the cells of a grid, for pairs of frames, in few channels.

They lie in a cache as an encoder's latents of tubelet 2 do, so that whoever reads those reads these: an oracle in the
place of a teacher. Scales are such that every channel is of order 1.

Shape suffixes: `t` frames, `h w` pixels, `y x` cells, `k` taps, `c` channels.
"""

import numpy as np
from numpy.typing import NDArray

from p4dprep.errors import RequestError
from p4dprep.targets import FrameGeometry, TargetSpec
from p4dprep.worlds.render import camera_centre, ray_directions
from p4dprep.worlds.scene import Scene
from p4dprep.worlds.truth import Truth

LATENTS_VERSION = "2"

TUBELET = 2
"""Frames of one step; the last step of an odd number has one."""

POSITION_METRES = 10.0
"""What 1 means in a channel of position."""

FLOW_FRACTION = 0.1
"""What 1 means in a channel of flow, as a share of the frame's width or height."""

MAX_FLOW_FRACTION = 1.0
"""Flow is cut to this share of the frame: what passes close by the camera would outweigh the cell."""

CHANNELS = (
    *("log_depth", "sky", "velocity_x", "velocity_y", "velocity_z"),
    *("position_x", "position_y", "position_z", "motion", "flow_u", "flow_v"),
    *("body", "body_x", "body_y", "body_z"),
)
"""What each channel is the mean of, over the pixels of a cell in a step's frames that have it; 0 where none has.

- `log_depth`: natural logarithm of the depth in metres, of what is no sky.
- `sky`: share of the pixels that see sky.
- `velocity_x`, `_y`, `_z`: m/s, of the pixels that move, in the axes of the first frame's camera: right, down, forward.
  It is the body's as a whole: its turning about itself is left out. What stands has none, whatever the camera does.
- `position_x`, `_y`, `_z`: tens of metres, of the visible surface, in the coordinates of the first frame's camera.
- `motion`: share of the pixels that move in the world.
- `flow_u`, `flow_v`: backward flow in tenths of the frame's width and height, cut to the whole frame.
- `body`: share of the pixels that see a body, and not scenery or sky.
- `body_x`, `_y`, `_z`: the position of those pixels, as above: in a large cell the scenery's would hide it.
"""


def parse_grid(text: str) -> int | None:
    """Rows, and as many columns, of `?latents=ROWS`; None for no text.

    Raises:
        RequestError: not a number of at least 1.
    """
    if not text:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise RequestError(f"teacher 'truth': latents={text} is not a number of rows and columns such as 6")
    return int(text)


def latents_spec(frames: FrameGeometry, grid: int) -> TargetSpec:
    """The target `latents`: (tap, tube, token_y, token_x, channel) float32 of one tap.

    Raises:
        RequestError: there are more cells than pixels.
    """
    if grid > min(frames.height, frames.width):
        raise RequestError(
            f"teacher 'truth': latents={grid} asks for more rows or columns than frames of {frames.height} x "
            f"{frames.width} have pixels"
        )
    return TargetSpec(
        name="latents",
        dims=("tap", "tube", "token_y", "token_x", "channel"),
        shape=(1, -(-frames.num_frames // TUBELET), grid, grid, len(CHANNELS)),
        dtype="float32",
        units="1",
        quantity="latents",
        description=f"Means over cells of frames 2j and 2j+1: {', '.join(CHANNELS)}.",
    )


def latents(scene: Scene, seconds_t: NDArray[np.float64], found: Truth, grid: int) -> NDArray[np.float32]:
    """What `latents_spec` declares, from the truth of a scene at some times."""
    height, width = found.depth_thw.shape[1:]
    is_seen, is_moving = np.isfinite(found.depth_thw), found.motion_thw
    has_flow = ~np.isnan(found.flow_thw2[..., 0])  # both components or none
    log_depth = np.log(found.depth_thw, where=is_seen, out=np.zeros_like(found.depth_thw))
    flow = np.clip(found.flow_thw2 / np.array([width, height]), -MAX_FLOW_FRACTION, MAX_FLOW_FRACTION)
    everywhere, is_body = np.ones_like(is_seen), found.instances_thw > 0
    position = _position(found) / POSITION_METRES
    channels = (
        _means(log_depth[..., None], is_seen, grid),
        _means(~is_seen[..., None], everywhere, grid),
        _means(_velocity(scene, seconds_t, found), is_moving, grid),
        _means(position, is_seen, grid),
        _means(is_moving[..., None], everywhere, grid),
        _means(flow / FLOW_FRACTION, has_flow, grid),
        _means(is_body[..., None], everywhere, grid),
        _means(position, is_body, grid),
    )
    return np.concatenate(channels, axis=-1, dtype=np.float32, casting="same_kind")[None]


def _velocity(scene: Scene, seconds_t: NDArray[np.float64], found: Truth) -> NDArray[np.float64]:
    """m/s (t, h, w, 3) of the body that each pixel sees, in the axes of the first camera."""
    in_world = np.zeros((len(scene.bodies) + 1, len(seconds_t), 3))
    for instance, body in enumerate(scene.bodies, start=1):
        in_world[instance] = body.trajectory.velocity(seconds_t)
    in_camera = in_world @ found.pose_t44[0, :3, :3].T
    return np.asarray(in_camera[found.instances_thw, np.arange(len(seconds_t))[:, None, None]])


def _position(found: Truth) -> NDArray[np.float64]:
    """Metres (t, h, w, 3) of what each pixel sees, in the first camera's coordinates; NaN where there is sky."""
    first = found.pose_t44[0]
    position = np.empty((*found.depth_thw.shape, 3))
    for index, (pose, depth_hw) in enumerate(zip(found.pose_t44, found.depth_thw, strict=True)):
        rays_3hw = np.tensordot(first[:3, :3], ray_directions(pose, found.intrinsics_33, *depth_hw.shape), 1)
        origin = first[:3, :3] @ camera_centre(pose) + first[:3, 3]
        position[index] = np.moveaxis(rays_3hw * depth_hw, 0, -1) + origin
    return position


def _means(
    values_thwc: NDArray[np.floating] | NDArray[np.bool_], valid_thw: NDArray[np.bool_], grid: int
) -> NDArray[np.float64]:
    """Means (tube, y, x, c) over the valid pixels of each cell; 0 where there is none."""
    count = _sums(valid_thw[..., None].astype(float), grid)
    total = _sums(np.where(valid_thw[..., None], values_thwc, 0.0), grid)
    return np.asarray(total / np.maximum(count, 1))


def _sums(values_thwc: NDArray[np.float64], grid: int) -> NDArray[np.float64]:
    """Sums (tube, y, x, c) over the pixels of each cell; sides that do not divide make cells of unequal size."""
    num_frames, height, width, _ = values_thwc.shape
    sums = values_thwc
    for axis, starts in enumerate((np.arange(0, num_frames, TUBELET), _starts(height, grid), _starts(width, grid))):
        sums = np.add.reduceat(sums, starts, axis=axis)
    return sums


def _starts(num_pixels: int, grid: int) -> NDArray[np.intp]:
    return np.asarray(np.arange(grid) * num_pixels // grid)
