"""What is true of every pixel of a world's clip, from its geometry.

Shape suffixes: `t` frames, `h w` pixels, `y x` ray grid, `n` points.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from p4dprep.worlds.render import (
    SKY,
    Surfaces,
    camera_centre,
    expose,
    occluded,
    ray_directions,
    trace,
)
from p4dprep.worlds.scene import STILL_METRES_PER_SECOND, Floats, Scene

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]

RAY_GRID = (16, 16)
"""Rows and columns of the camera rays, as L4P's."""


@dataclass(frozen=True, kw_only=True)
class Truth:
    """The truth of a clip's sampled frames.

    Attributes:
        depth_thw: metres along the optical axis; NaN where there is sky.
        flow_thw2: (u, v) from frame n to n-1 in pixels; frame 0 is NaN, and so is what goes behind the camera.
        flow_forward_thw2: from frame n to n+1; the last frame is NaN.
        flow_visible_thw: the surface point is seen in frame n-1: inside the picture and not hidden. False in frame 0.
        flow_forward_visible_thw: the same for frame n+1. False in the last frame.
        motion_thw: the surface point moves in the world between n-1 and n (frame 0: between 0 and 1).
        instances_thw: 0 for scenery and sky, i + 1 for body i of the scene.
        camray_tyx6: Plücker rays [d, o x d], d of length 1, in coordinates of the first camera, through the centres
            of a 16 x 16 grid of cells.
        pose_t44: world to camera (OpenCV axes), metres.
        intrinsics_33: K in pixels; pixel centres at half-integers.
    """

    depth_thw: Array
    flow_thw2: Array
    flow_forward_thw2: Array
    flow_visible_thw: Mask
    flow_forward_visible_thw: Mask
    motion_thw: Mask
    instances_thw: NDArray[np.uint8]
    camray_tyx6: Array
    pose_t44: Floats
    intrinsics_33: Floats


def truth(scene: Scene, seconds: Floats, height: int, width: int) -> Truth:
    """The truth at some times, for pictures squashed to height x width."""
    return truth_of(trace(scene, seconds, height, width))


def film(
    scene: Scene, seconds: Floats, height: int, width: int, *, visibility: bool = True
) -> tuple[NDArray[np.uint8], Truth]:
    """Pictures (t, h, w, 3) and their truth from one pass; without `visibility` its masks are all True, and cheap."""
    surfaces = trace(scene, seconds, height, width)
    return expose(scene, surfaces), truth_of(surfaces, visibility=visibility)


def truth_of(surfaces: Surfaces, *, visibility: bool = True) -> Truth:
    """The truth of surfaces that were traced."""
    num_frames, height, width = surfaces.depth_thw.shape
    flows = np.full((2, num_frames, height, width, 2), np.nan, np.float32)
    visible = np.zeros((2, num_frames, height, width), bool)
    motion = np.zeros((num_frames, height, width), bool)
    for index in range(num_frames):
        points = surfaces.points(index)
        for direction, other in enumerate((index - 1, index + 1)):
            if not 0 <= other < num_frames:
                continue
            carried = carry(surfaces, index, other, points)
            flow, seen = _flow(surfaces, index, other, carried, visibility=visibility)
            flows[direction, index], visible[direction, index] = flow, seen
            if direction == 0 or index == 0:
                apart = np.linalg.norm(carried - points, axis=0).reshape(height, width)
                between = abs(surfaces.seconds[index] - surfaces.seconds[other])
                motion[index] = apart > STILL_METRES_PER_SECOND * between
    return Truth(
        depth_thw=surfaces.depth_thw,
        flow_thw2=flows[0],
        flow_forward_thw2=flows[1],
        flow_visible_thw=visible[0],
        flow_forward_visible_thw=visible[1],
        motion_thw=motion,
        instances_thw=surfaces.instances_thw,
        camray_tyx6=pluecker_rays(surfaces.pose_t44, surfaces.intrinsics_33, height, width),
        pose_t44=surfaces.pose_t44,
        intrinsics_33=surfaces.intrinsics_33,
    )


def carry(surfaces: Surfaces, index: int, other: int, points_3n: Floats) -> Floats:
    """Where the surface points that the pixels of one frame see are at the time of another; sky and scenery stay."""
    carried = points_3n.copy()
    instances = surfaces.instances_thw[index].reshape(-1)
    numbers = surfaces.part_thw[index].reshape(-1)
    for instance in np.unique(instances):
        if not instance:
            continue
        mine = instances == instance
        placed = surfaces.parts[numbers[mine][0]]  # the parts of a body move as one
        turn = placed.rotation_t33[other] @ placed.rotation_t33[index].T
        moved = turn @ (points_3n[:, mine] - placed.centre_t3[index][:, None]) + placed.centre_t3[other][:, None]
        carried[:, mine] = moved
    return carried


def _flow(
    surfaces: Surfaces, index: int, other: int, carried_3n: Floats, *, visibility: bool
) -> tuple[Array, NDArray[np.bool_] | bool]:
    """Flow (h, w, 2) to the other frame, and whether the points are seen there."""
    height, width = surfaces.depth_thw.shape[1:]
    is_sky = surfaces.part_thw[index].reshape(-1) == SKY
    pose, intrinsics = surfaces.pose_t44[other], surfaces.intrinsics_33
    in_camera = pose[:3, :3] @ carried_3n + np.where(is_sky, 0.0, pose[:3, 3][:, None])  # sky is infinitely far
    with np.errstate(divide="ignore", invalid="ignore"):
        projected = (intrinsics @ in_camera)[:2] / in_camera[2]
    projected[:, in_camera[2] <= 0] = np.nan
    columns, rows = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    here = np.stack([columns.reshape(-1), rows.reshape(-1)])
    flow = (projected - here).T.reshape(height, width, 2).astype(np.float32)
    if not visibility:
        return flow, True
    inside = (projected >= 0).all(axis=0) & (projected[0] <= width) & (projected[1] <= height)
    seen = inside.copy()
    candidates = np.flatnonzero(inside)
    centre = camera_centre(pose)[:, None]
    towards = np.where(is_sky, 1e4, 1.0) * (carried_3n - np.where(is_sky, 0.0, centre))
    starts = np.broadcast_to(centre, towards.shape)
    # A point does not hide itself: stop a little before it.
    seen[candidates] = ~occluded(
        surfaces.parts, other, starts[:, candidates], 0.999 * towards[:, candidates], ends_at_target=True
    )
    return flow, seen.reshape(height, width)


def pluecker_rays(pose_t44: Floats, intrinsics_33: Floats, height: int, width: int) -> Array:
    """Rays (t, 16, 16, 6) through the centres of a grid of cells, [d, o x d] in the first camera's coordinates."""
    rows, columns = RAY_GRID
    scaled = np.diag([columns / width, rows / height, 1.0]) @ intrinsics_33
    first = pose_t44[0]
    rays = np.empty((len(pose_t44), rows, columns, 6), np.float32)
    for index, pose in enumerate(pose_t44):
        directions = np.tensordot(first[:3, :3], ray_directions(pose, scaled, rows, columns), 1)
        directions /= np.linalg.norm(directions, axis=0)
        origin = first[:3, :3] @ camera_centre(pose) + first[:3, 3]
        moments = np.cross(origin[None, None], directions.transpose(1, 2, 0))
        rays[index] = np.concatenate([directions.transpose(1, 2, 0), moments], axis=-1)
    return rays
