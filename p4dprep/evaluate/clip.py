"""The scores of one clip: the prediction's and those of trivial predictions, whole and in buckets.

Shape suffixes as in `p4dprep.metrics`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p4dprep import metrics
from p4dprep.cache import Group
from p4dprep.cameras import camera_directions, poses_from_rays, ray_angles, rays_from_poses
from p4dprep.evaluate.pairs import Pair
from p4dprep.evaluate.report import Axis, Kind
from p4dprep.metrics import ErrorMaps, Ratio, Scores
from p4dprep.targets import TargetSpec

EDGES: Mapping[Axis, tuple[float, ...]] = {"true motion": (1, 4, 16), "true distance": (2, 5, 10, 30)}
"""Bounds of the buckets, in pixels and metres."""
_UNITS: Mapping[Axis, str] = {"true motion": "px", "true distance": "m"}
BUCKETED: Mapping[Kind, tuple[str, ...]] = {"depth": ("abs_rel", "delta1"), "flow": ("epe", "fl_all")}


@dataclass(frozen=True, kw_only=True)
class MapPair:
    """The maps of one clip as they were compared.

    Attributes:
        kind: what they are.
        predicted, truth: depth (t, h, w) after alignment, flow (t, h, w, 2), motion bool (t, h, w), rays (t, h, w, 6),
            latents (k, ..., c).
        error_thw: relative error of depth, pixels of flow, 0 or 1 of motion, degrees of rays; NaN where there is none.
            None for latents.
        num_frames: frames of the clip.
    """

    kind: Kind
    predicted: NDArray[Any]
    truth: NDArray[Any]
    error_thw: NDArray[np.floating] | None
    num_frames: int


class Maps:
    """One clip of one group, each target read once; for one thread at a time."""

    def __init__(self, group: Group, index: int) -> None:
        self.group = group
        self.index = index
        self._read: dict[str, NDArray[Any]] = {}

    def read(self, target: str) -> NDArray[Any]:
        """A target's physical values. Errors as `Group.read`."""
        if target not in self._read:
            self._read[target] = self.group.read(self.index, target)
        return self._read[target]

    def buckets(self, axis: Axis, target: str) -> NDArray[np.intp]:
        """The bucket of each pixel on an axis, (t, h, w), by the target that decides."""
        name = f"{axis} by {target}"
        if name not in self._read:
            values = self.read(target)
            key_thw = flat(values) if axis == "true distance" else metrics.flow_length(values)
            self._read[name] = metrics.bucket_of(key_thw, EDGES[axis])
        return self._read[name]


Cells = Mapping[tuple[str, str], Ratio]
"""(bucket, score) to its value; the bucket is empty for all pixels."""
OURS = ""
"""Name of the prediction among the variants that are scored; the others are baselines."""


def score_variants(pair: Pair, ours: Maps, true: Maps, depth: float) -> dict[str, Cells]:
    """The cells of the prediction and of each baseline on one clip."""
    match pair.kind:
        case "depth":
            return _depth_variants(pair, ours, true, depth)
        case "flow":
            truth = true.read(pair.truth.name)
            visible = true.read(pair.others["visible"]) if "visible" in pair.others else None
            flows = {OURS: ours.read(pair.spec.name), "zero flow": np.zeros_like(truth)}
            errors = {name: metrics.flow_errors(flow, truth) for name, flow in flows.items()}
            return {name: _cells(pair, true, e, metrics.flow_scores(e, visible)) for name, e in errors.items()}
        case "motion":
            moving, truth = _moving(pair.spec, ours), _moving(pair.truth, true)
            masks = {OURS: moving, "all static": np.zeros_like(truth), "all moving": np.ones_like(truth)}
            return {name: _whole(metrics.motion_scores(mask, truth)) for name, mask in masks.items()}
        case "camera":
            return _camera_variants(pair, ours, true)
        case "latents":
            scores = metrics.latent_scores(_by_tap(pair, ours), _by_tap(pair, true))
            return {OURS: _whole(scores)}


def _depth_variants(pair: Pair, ours: Maps, true: Maps, depth: float) -> dict[str, Cells]:
    truth = flat(true.read(pair.truth.name))
    guess = metrics.align_depth(np.full_like(truth, depth), truth, pair.alignment or "none")
    variants: dict[str, Cells] = {}
    for name, aligned in ((OURS, _aligned(pair, ours, truth)), ("mean depth", guess)):
        errors = metrics.depth_errors(aligned, truth)
        scores = metrics.depth_scores(errors, per_clip=pair.alignment != "none")
        variants[name] = _cells(pair, true, errors, scores)
    return variants


def _camera_variants(pair: Pair, ours: Maps, true: Maps) -> dict[str, Cells]:
    rays, truth = ours.read(pair.spec.name), _true_rays(pair, true)
    directions = None
    if "intrinsics" in pair.others:
        intrinsics = true.read(pair.others["intrinsics"])
        directions = camera_directions(intrinsics, pair.size, (rays.shape[1], rays.shape[2]))
    pose = true.read(pair.others["pose"]) if "pose" in pair.others else poses_from_rays(truth, directions)
    variants: dict[str, Cells] = {}
    for name, variant in ((OURS, rays), ("static camera", np.repeat(truth[:1], len(truth), axis=0))):
        scores = metrics.camera_scores(poses_from_rays(variant, directions), pose)
        variants[name] = _whole({**metrics.ray_scores(variant, truth), **scores})
    return variants


def _true_rays(pair: Pair, true: Maps) -> NDArray[np.floating]:
    """The truth's rays on the prediction's grid: exact from poses and intrinsics, else as they are."""
    if {"pose", "intrinsics"} <= set(pair.others):
        pose, intrinsics = (true.read(pair.others[role]) for role in ("pose", "intrinsics"))
        return rays_from_poses(pose, intrinsics, pair.size, (pair.spec.shape[1], pair.spec.shape[2]))
    return true.read(pair.others["rays"])


def _aligned(pair: Pair, ours: Maps, truth_thw: NDArray[np.floating]) -> NDArray[np.float32]:
    is_disparity = pair.spec.quantity == "relative disparity"
    depth = flat(ours.read(pair.spec.name))
    return metrics.align_depth(depth, truth_thw, pair.alignment or "none", is_disparity=is_disparity)


def _moving(spec: TargetSpec, maps: Maps) -> NDArray[np.bool_]:
    """Motion as a mask: a logit above 0."""
    return np.asarray(flat(maps.read(spec.name)) > (0 if spec.quantity == "motion logit" else 0.5))


def _by_tap(pair: Pair, maps: Maps) -> NDArray[Any]:
    """Latents as (k, n, c); one tap if the target has no such axis."""
    values = maps.read(pair.spec.name)
    num_taps = values.shape[0] if pair.spec.dims[0] == "tap" else 1
    return values.reshape(num_taps, -1, values.shape[-1])


def flat(values: NDArray[Any]) -> NDArray[Any]:
    """A map without a last axis of one channel."""
    return values[..., 0] if values.ndim == 4 else values


def _whole(scores: Scores) -> dict[tuple[str, str], Ratio]:
    return {("", name): ratio for name, ratio in scores.items()}


def _cells(pair: Pair, true: Maps, errors: ErrorMaps, scores: Scores) -> Cells:
    """A clip's scores, and those of each bucket."""
    cells = _whole(scores)
    for axis, target in pair.keys.items():
        names = bucket_names(axis)
        found = metrics.bucket_scores(errors, BUCKETED[pair.kind], true.buckets(axis, target), len(names))
        cells |= {(bucket, name): ratio for bucket, s in zip(names, found, strict=True) for name, ratio in s.items()}
    return cells


def bucket_names(axis: Axis) -> list[str]:
    """The ranges between the edges, in words."""
    edges, unit = EDGES[axis], _UNITS[axis]
    inner = [f"{low:g} to {high:g} {unit}" for low, high in pairwise(edges)]
    return [f"under {edges[0]:g} {unit}", *inner, f"over {edges[-1]:g} {unit}"]


def map_pair(pair: Pair, ours: Maps, true: Maps) -> MapPair:
    """The maps of one clip as `score_variants` compares them."""
    error: NDArray[np.floating] | None = None
    match pair.kind:
        case "depth":
            truth = flat(true.read(pair.truth.name))
            predicted: NDArray[Any] = _aligned(pair, ours, truth)
            error = _where_valid(metrics.depth_errors(predicted, truth), "abs_rel")
        case "flow":
            predicted, truth = ours.read(pair.spec.name), true.read(pair.truth.name)
            error = _where_valid(metrics.flow_errors(predicted, truth), "epe")
        case "motion":
            predicted, truth = _moving(pair.spec, ours), _moving(pair.truth, true)
            error = (predicted != truth).astype(np.float32)
        case "camera":
            predicted, truth = ours.read(pair.spec.name), _true_rays(pair, true)
            error = ray_angles(predicted, truth)
        case "latents":
            predicted, truth = ours.read(pair.spec.name), true.read(pair.truth.name)
    num_frames = len(true.group.read_time(true.index))
    return MapPair(kind=pair.kind, predicted=predicted, truth=truth, error_thw=error, num_frames=num_frames)


def _where_valid(errors: ErrorMaps, name: str) -> NDArray[np.floating]:
    return np.where(errors.valid_thw, errors.maps[name], np.float32(np.nan))
