"""Geometry of cameras: Plücker rays from poses, poses from rays, and how far two of them lie apart.

Shape suffixes: `t` frames, `h w` cells of a ray grid, `6` a Plücker ray `[d, o x d]`, `n` points or rays, `33` and `44`
matrices. Cameras are world-to-camera, OpenCV axes (x right, y down, z forward). Results are float64.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]


def rays_from_poses(pose_t44: Floats, intrinsics_t33: Floats, size: tuple[int, int], grid: tuple[int, int]) -> Floats:
    """Plücker rays `[d, o x d]` through the centres of a grid's cells, in the coordinates of the first camera.

    Args:
        pose_t44: world to camera.
        intrinsics_t33: in pixels of the frame, pixel centres at half-integers.
        size: height and width of the frame in pixels.
        grid: rows and columns; cell (i, j) is seen at ((j + 0.5) / columns * width, (i + 0.5) / rows * height).

    Returns:
        float64 (t, rows, columns, 6); d of unit length.
    """
    directions_thw3 = camera_directions(intrinsics_t33, size, grid)
    to_first_t44 = pose_t44[0].astype(np.float64) @ np.linalg.inv(pose_t44.astype(np.float64))
    d = np.einsum("tij,thwj->thwi", to_first_t44[:, :3, :3], directions_thw3)
    return np.concatenate([d, np.cross(to_first_t44[:, None, None, :3, 3], d)], axis=-1)


def camera_directions(intrinsics_t33: Floats, size: tuple[int, int], grid: tuple[int, int]) -> Floats:
    """Unit directions (t, rows, columns, 3) of a grid's rays in each camera's own axes; arguments as above."""
    y, x = ((np.arange(cells) + 0.5) / cells * pixels for cells, pixels in zip(grid, size, strict=True))
    x, y = np.meshgrid(x, y)
    pixels_hw3 = np.stack([x, y, np.ones_like(x)], axis=-1)
    return _unit(np.einsum("tij,hwj->thwi", np.linalg.inv(intrinsics_t33.astype(np.float64)), pixels_hw3))


def poses_from_rays(rays_thw6: Floats, directions_thw3: Floats | None = None) -> Floats:
    """World-to-camera poses of cameras given by their Plücker rays; the world is the rays' coordinates.

    The centre is the point nearest to all rays of a frame, by least squares; the rotation is the one that best turns
    the rays' directions into the camera's own (Kabsch). Rays need not be of unit length.

    Args:
        rays_thw6: direction, then moment.
        directions_thw3: directions in each camera's own axes, from its intrinsics; without them those of the first
            frame's rays, which holds as long as the lens does not change.

    Returns:
        float64 (t, 4, 4).
    """
    rays_tn6 = rays_thw6.astype(np.float64).reshape(len(rays_thw6), -1, 6)
    length = np.maximum(np.linalg.norm(rays_tn6[..., :3], axis=-1, keepdims=True), 1e-12)
    d, m = np.split(rays_tn6 / length, 2, axis=-1)
    own = d[:1] if directions_thw3 is None else directions_thw3.reshape(len(directions_thw3), -1, 3)
    rotation_t33 = _best_rotation(np.einsum("tni,tnj->tij", np.broadcast_to(own, d.shape), d))
    # The squared distance of o from a ray is |o x d - m|^2: sum of (1 - d d^T) o = sum of d x m.
    normal_t33 = d.shape[1] * np.eye(3) - np.einsum("tni,tnj->tij", d, d)
    centre_t3 = np.einsum("tij,tj->ti", np.linalg.pinv(normal_t33, hermitian=True), np.cross(d, m).sum(axis=1))
    pose_t44 = np.tile(np.eye(4), (len(d), 1, 1))
    pose_t44[:, :3, :3] = rotation_t33
    pose_t44[:, :3, 3] = -np.einsum("tij,tj->ti", rotation_t33, centre_t3)
    return pose_t44


def _best_rotation(covariance_t33: Floats) -> Floats:
    """R that maximises the trace of R^T C, for C the sum of target x source^T (Kabsch)."""
    left, _, right = np.linalg.svd(covariance_t33)
    signs = np.ones((*covariance_t33.shape[:-2], 1, 3))
    signs[..., 0, 2] = np.linalg.det(left @ right)  # -1 would be a reflection: turn the weakest axis
    return np.asarray((left * signs) @ right)


def camera_centres(pose_t44: Floats) -> Floats:
    """Where world-to-camera poses stand in the world, (t, 3)."""
    return np.asarray(-np.einsum("tji,tj->ti", pose_t44[:, :3, :3], pose_t44[:, :3, 3]))


def umeyama(source_n3: Floats, target_n3: Floats) -> tuple[float, Floats, Floats]:
    """Scale, rotation (3, 3) and shift (3,) that bring points nearest to others by least squares (Umeyama 1991).

    Points that all lie in one place keep scale 1 and their axes.
    """
    source_mean, target_mean = source_n3.mean(axis=0), target_n3.mean(axis=0)
    source, target = source_n3 - source_mean, target_n3 - target_mean
    variance = float((source**2).sum())
    if variance < 1e-18:
        return 1.0, np.eye(3), target_mean - source_mean
    covariance = target.T @ source
    rotation = _best_rotation(covariance)
    scale = float(np.einsum("ij,ij->", rotation, covariance)) / variance
    return scale, rotation, target_mean - scale * rotation @ source_mean


def rotation_angles(ours_t33: Floats, true_t33: Floats) -> Floats:
    """Angles between rotations in degrees; exact near 0, where the arc cosine of a trace is not."""
    chord = np.linalg.norm(ours_t33 - true_t33, axis=(-2, -1)) / np.sqrt(8)
    return np.asarray(np.degrees(2 * np.arcsin(np.clip(chord, 0, 1))))


def vector_angles(ours_n3: Floats, true_n3: Floats) -> Floats:
    """Angles between vectors in degrees, 0 to 180; 90 where one is zero."""
    sine = np.linalg.norm(np.cross(ours_n3, true_n3), axis=-1)
    cosine = (ours_n3 * true_n3).sum(axis=-1)
    return np.asarray(np.where((sine == 0) & (cosine == 0), 90.0, np.degrees(np.arctan2(sine, cosine))))


def ray_angles(rays_thw6: Floats, truth_thw6: Floats) -> Floats:
    """Angles between ray directions in degrees, (t, rows, columns)."""
    return vector_angles(rays_thw6[..., :3].astype(np.float64), truth_thw6[..., :3].astype(np.float64))


def _unit(vectors: Floats) -> Floats:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True))
