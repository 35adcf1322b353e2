"""Clips longer than one window: windows with a stride of half a window, brought together.

The rule, per target, where a window overlaps what came before: a later window overwrites. Backward flow keeps the
earlier value for the later window's first frame, which has none of its own. Depth is aligned first, by least squares
on inverse depth; camera rays are first moved into the first window's coordinates. Every array has its time on axis 2,
taps aside. Shape suffixes: `b` batch, `c` channels, `t` frames, `h w` pixels, `y x` rays, `n` tokens.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from p4dprep.errors import RequestError
from teachers.l4p.config import L4PConfig, Modality
from teachers.l4p.model import L4POutput

FARTHEST = 100.0
"""How many times farther than anything in the overlap an aligned depth may lie."""


def window_starts(num_frames: int, window: int) -> tuple[int, ...]:
    """First frames of the windows that tile a clip exactly.

    Raises:
        RequestError: they cannot.
    """
    stride = window // 2
    if num_frames < window or (num_frames - window) % stride:
        raise RequestError(
            f"L4P cannot take {num_frames} frames: it runs windows of {window} with a stride of {stride}, so choose "
            f"{window}, {window + stride}, {window + 2 * stride} or another {window} + {stride} k"
        )
    return tuple(range(0, num_frames - window + 1, stride))


def run_windows(model: Callable[[Tensor], L4POutput], pixels_bcthw: Tensor, config: L4PConfig) -> L4POutput:
    """Run a one-window model over a clip of any length that windows tile.

    Args:
        model: an `L4P`, or anything that maps one window's pixels to its output.
        pixels_bcthw: normalised pixels of the whole clip.
        config: the model's.

    Returns:
        The same as for one window, with as many frames (and token steps) as the clip has.

    Raises:
        RequestError: the number of frames does not fit.
    """
    starts = window_starts(pixels_bcthw.shape[2], config.num_frames)
    merged = model(pixels_bcthw[:, :, : config.num_frames])
    for start in starts[1:]:
        later = model(pixels_bcthw[:, :, start : start + config.num_frames])
        merged = _append(merged, later, start, config)
    return merged


def _append(earlier: L4POutput, later: L4POutput, start: int, config: L4PConfig) -> L4POutput:
    _, rows, columns = config.token_grid
    num_kept_tokens = start // config.tubelet_size * rows * columns
    taps = tuple(
        torch.cat([old[:, :num_kept_tokens], new], dim=1) for old, new in zip(earlier.taps, later.taps, strict=True)
    )
    maps = {name: _append_map(name, earlier.maps[name], values, start) for name, values in later.maps.items()}
    return L4POutput(taps, maps)


def _append_map(name: Modality, earlier: Tensor, later: Tensor, start: int) -> Tensor:
    if name == "flow":
        return torch.cat([earlier[:, :, : start + 1], later[:, :, 1:]], dim=2)
    if name == "depth":
        later = align_inverse_depth(later, earlier[:, :, start:])
    if name == "camray":
        later = align_rays(later, earlier[:, :, start:])
    return torch.cat([earlier[:, :, :start], later], dim=2)


def align_inverse_depth(depth_b1thw: Tensor, reference_b1thw: Tensor) -> Tensor:
    """Depth whose inverse was scaled and shifted to fit a reference on the first frames, by least squares per clip.

    Exact if the reference's inverse depth is a scaled and shifted copy. A depth must be positive and finite: what the
    fit pushes past `FARTHEST` times the farthest depth of the reference, or past infinity, is held there.

    Args:
        depth_b1thw: a later window.
        reference_b1thw: what is known of its first frames.
    """
    inverse = depth_b1thw.double().reciprocal()
    target = reference_b1thw.double().reciprocal().flatten(1)
    source = inverse[:, :, : reference_b1thw.shape[2]].flatten(1)
    source_mean, target_mean = source.mean(1, keepdim=True), target.mean(1, keepdim=True)
    centred = source - source_mean
    variance = (centred * centred).sum(1, keepdim=True)
    covariance = (centred * (target - target_mean)).sum(1, keepdim=True)
    scale = torch.where(variance > 0, covariance / variance, 1.0)
    shift = target_mean - scale * source_mean
    least = target.amin(1, keepdim=True) / FARTHEST
    scale, shift, least = (value[:, :, None, None, None] for value in (scale, shift, least))
    return (scale * inverse + shift).maximum(least).reciprocal().to(depth_b1thw.dtype)


def align_rays(rays_b6tyx: Tensor, reference_b6tyx: Tensor) -> Tensor:
    """Plücker rays moved by the similarity that best fits them to a reference on the first frames.

    Under x -> s R x + t a ray (d, m) becomes (R d, s R m + t x R d). R is the rotation that best turns directions into
    directions (Kabsch); s and t then follow from the moments by linear least squares, of which the solution nearest to
    s = 1, t = 0 is taken where the rays leave a choice. Exact if the reference is such a copy.

    Args:
        rays_b6tyx: a later window, in the coordinates of its own first frame.
        reference_b6tyx: its first frames in the clip's coordinates.
    """
    later, target = rays_b6tyx.double().flatten(2), reference_b6tyx.double().flatten(2)
    overlap = later[:, :, : target.shape[2]]
    rotation = _best_rotation(overlap[:, :3], target[:, :3])
    directions, moments = rotation @ overlap[:, :3], rotation @ overlap[:, 3:]
    # t x d is linear in t: its matrix, per ray, is that of d x (...) with the sign changed.
    basis = torch.eye(3, dtype=later.dtype, device=later.device)
    crossed = [torch.linalg.cross(axis[None, :, None].expand_as(directions), directions, dim=1) for axis in basis]
    columns = torch.stack([moments, *crossed], dim=-1).flatten(1, 2)
    residual = (target[:, 3:] - moments).flatten(1)[..., None]
    normal = columns.mT @ columns
    solution = torch.linalg.pinv(normal, hermitian=True) @ (columns.mT @ residual)
    scale, translation = 1 + solution[:, :1], solution[:, 1:]
    turned, shifted = rotation @ later[:, :3], scale * (rotation @ later[:, 3:])
    shifted = shifted + torch.linalg.cross(translation.expand_as(turned), turned, dim=1)
    return torch.cat([turned, shifted], dim=1).reshape(rays_b6tyx.shape).to(rays_b6tyx.dtype)


def _best_rotation(source_b3n: Tensor, target_b3n: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(target_b3n @ source_b3n.mT)
    signs = torch.ones_like(left[:, 0])
    signs[:, 2] = torch.linalg.det(left @ right)  # -1 would be a reflection: turn the weakest axis
    rotation: Tensor = (left * signs[:, None]) @ right
    return rotation
