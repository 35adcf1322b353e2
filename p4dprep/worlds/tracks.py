"""What each body of a world does, exactly: boxes, speeds, accelerations, distances, and where it is in the first frame.

Suffixes: t times, b bodies, h w pixels. Coordinates are those of `p4dprep.worlds.scene`; camera-0 coordinates are the
camera's at the first of the times asked for.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from p4dprep.worlds.scene import Body, Camera, Floats, Scene, Vector, turn_about_z

PixelBox = tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True)
class Box3D:
    """An upright box.

    Attributes:
        centre: metres.
        size: length (along its front), width and height, metres.
        yaw: radians, counter-clockwise seen from above: in the world from x; in camera-0 coordinates from the direction
            in which camera 0 looks, so that a body facing left of it has a positive yaw, in (-pi, pi].
    """

    centre: Vector
    size: Vector
    yaw: float


@dataclass(frozen=True, kw_only=True)
class ObjectFacts:
    """The truth about one body over a clip; `dataclasses.asdict` makes it JSON.

    Attributes:
        body: its number in `scene.bodies`.
        name: what people call it: `red ball`.
        category: the noun of it.
        colour: the adjective of it.
        motion: the kind of its path.
        seconds: the times of all that follows.
        boxes_world: its box at each time.
        boxes_camera0: the same boxes in camera-0 coordinates.
        speeds: m/s at each time.
        accelerations: m/s^2, magnitude, at each time.
        mean_speed: m/s, path length over time.
        mean_acceleration: m/s^2, magnitude of the change of velocity over time.
        displacement_metres: from the first place to the last, straight.
        path_length_metres: along the path.
        num_frames_in_view: times at which its centre projects into the picture, hidden or not.
        first_frame_box: x0, y0, x1, y1 of its visible pixels at the first time, half-open; None where it is not seen.
        first_frame_fraction: share of the picture that those pixels take.
        first_frame_shown_fraction: share that they take of the rectangle around its 3D box, as far as that lies in the
            picture; small where something stands before it.
    """

    body: int
    name: str
    category: str
    colour: str
    motion: str
    seconds: tuple[float, ...]
    boxes_world: tuple[Box3D, ...]
    boxes_camera0: tuple[Box3D, ...]
    speeds: tuple[float, ...]
    accelerations: tuple[float, ...]
    mean_speed: float
    mean_acceleration: float
    displacement_metres: float
    path_length_metres: float
    num_frames_in_view: int
    first_frame_box: PixelBox | None
    first_frame_fraction: float
    first_frame_shown_fraction: float


def object_facts(scene: Scene, seconds: Floats, instances_hw: NDArray[np.uint8]) -> tuple[ObjectFacts, ...]:
    """The facts of every body of a scene.

    Args:
        scene: the world.
        seconds: times (t,), growing, at least two.
        instances_hw: the instance mask at the first time; i + 1 is body i.

    Raises:
        ValueError: fewer than two times, or times that do not grow.
    """
    seconds = np.asarray(seconds, float).reshape(-1)
    if len(seconds) < 2 or (np.diff(seconds) <= 0).any():
        raise ValueError(f"facts need two growing times or more, not {seconds.tolist()}; pass the clip's frame times")
    poses = scene.camera.world_to_camera(seconds)
    return tuple(_facts(scene, number, seconds, poses, instances_hw) for number in range(len(scene.bodies)))


def _facts(
    scene: Scene, number: int, seconds: Floats, poses_t44: Floats, instances_hw: NDArray[np.uint8]
) -> ObjectFacts:
    body, path = scene.bodies[number], scene.bodies[number].trajectory
    position, velocity, first, last = path.position(seconds), path.velocity(seconds), seconds[0], seconds[-1]
    length = path.path_length(first, last)
    yaw, mask = path.yaw(seconds), instances_hw == number + 1
    return ObjectFacts(
        body=number,
        name=body.name,
        category=body.category,
        colour=body.colour,
        motion=body.motion,
        seconds=tuple(seconds.tolist()),
        boxes_world=_boxes(body, position, yaw),
        boxes_camera0=_boxes(body, to_camera(poses_t44[0], position), _wrapped(yaw - _heading(poses_t44[0]))),
        speeds=tuple(np.linalg.norm(velocity, axis=1).tolist()),
        accelerations=tuple(np.linalg.norm(path.acceleration(seconds), axis=1).tolist()),
        mean_speed=float(length / (last - first)),
        mean_acceleration=float(np.linalg.norm(velocity[-1] - velocity[0]) / (last - first)),
        displacement_metres=float(np.linalg.norm(position[-1] - position[0])),
        path_length_metres=length,
        num_frames_in_view=int(in_view(scene.camera, poses_t44, position).sum()),
        first_frame_box=mask_box(mask),
        first_frame_fraction=float(mask.mean()),
        first_frame_shown_fraction=float(mask.mean())
        / _box_fraction(scene.camera, poses_t44[0], body, position[0], yaw[0]),
    )


def _boxes(body: Body, centre_t3: Floats, yaw_t: Floats) -> tuple[Box3D, ...]:
    size = body.size
    return tuple(
        Box3D(centre=(x, y, z), size=size, yaw=yaw)
        for (x, y, z), yaw in zip(centre_t3.tolist(), yaw_t.tolist(), strict=True)
    )


def _box_fraction(camera: Camera, pose_44: Floats, body: Body, centre_3: Floats, yaw: float) -> float:
    """Share of the picture that the rectangle around a body's 3D box takes; infinite outside of the picture."""
    corners = np.array(list(product((-0.5, 0.5), repeat=3))) * body.size
    corners = turn_about_z(corners, np.full(len(corners), yaw)) + centre_3
    place = np.clip(picture_place(camera, pose_44[None], corners), 0, 1)
    area = float(np.prod(np.ptp(place, axis=0)))
    return area if area > 0 else np.inf


def _heading(pose_44: Floats) -> float:
    """Where a camera looks, seen from above, radians from x."""
    return float(np.arctan2(pose_44[2, 1], pose_44[2, 0]))


def _wrapped(radians_t: Floats) -> Floats:
    """The same angles in (-pi, pi]."""
    wrapped: Floats = np.pi - (np.pi - radians_t) % (2 * np.pi)
    return wrapped


def to_camera(pose: Floats, points_n3: Floats) -> Floats:
    """World points (n, 3) in the coordinates of a camera; `pose` is (4, 4), or (n, 4, 4) with one for each point."""
    moved: Floats = np.einsum("...ij,...j->...i", pose[..., :3, :3], points_n3) + pose[..., :3, 3]
    return moved


def picture_place(camera: Camera, poses_t44: Floats, points_t3: Floats) -> Floats:
    """Where world points (t, 3) lie in pictures of as many poses, or of one: (t, 2), 0-1 from left and top, or NaN."""
    x, y, z = to_camera(poses_t44, points_t3).T
    z = np.where(z > 0, z, np.nan)
    focal = camera.intrinsics(1, 1)
    return np.stack([focal[0, 0] * x / z + 0.5, focal[1, 1] * y / z + 0.5], axis=1)


def in_view(camera: Camera, poses_t44: Floats, points_t3: Floats) -> NDArray[np.bool_]:
    """Whether each point (t, 3) projects into the picture of its pose."""
    x, y = picture_place(camera, poses_t44, points_t3).T
    inside: NDArray[np.bool_] = (x >= 0) & (x < 1) & (y >= 0) & (y < 1)
    return inside


def mask_box(mask_hw: NDArray[np.bool_]) -> PixelBox | None:
    """x0, y0, x1, y1 around the true pixels, half-open; None if there are none."""
    rows, columns = (np.flatnonzero(mask_hw.any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
