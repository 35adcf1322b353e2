"""How far maps lie from the truth: depth, flow, motion, camera and latents. docs/eval.md states every rule in words.

Every function is pure, on numpy arrays of one clip. A score is a `Ratio`, a sum and the number of things summed, so
that clips are pooled by adding and none of their maps has to stay. Where nothing can be said, the number is 0.

Shape suffixes: `t` frames, `h w` pixels, `2` the (u, v) of a flow in pixels, `n` tokens, `c` channels, `k` taps, `44` a
world-to-camera pose (OpenCV axes: x right, y down, z forward), `p` pairs of frames. NaN is a value that does not exist.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import cv2
import numpy as np
from numpy.typing import NDArray

from p4dprep.cameras import camera_centres, ray_angles, rotation_angles, umeyama, vector_angles
from p4dprep.errors import RequestError
from p4dprep.targets import Quantity

Floats = NDArray[np.floating]
Booleans = NDArray[np.bool_]
Alignment = Literal["none", "median scale", "least squares scale", "least squares scale and shift in disparity"]

MIN_DEPTH, MAX_DEPTH = 1e-3, 80.0
"""True depths outside are not judged."""
MIN_PIXELS = 10
"""A frame with fewer pixels of true depth is not judged."""
MIN_DISPARITY = 1e-3
"""Aligned disparities are held above it."""
MIN_TRANSLATION = 1e-3
"""A true camera that moves less, in the truth's unit (1 mm if metres), has no direction of translation and no scale."""
AUC_DEGREES = (3, 5, 15, 30)
BOUNDARY_FRACTION = 0.008
"""Tolerance of a motion boundary as a share of the frame's diagonal, as DAVIS has it."""


class Ratio(NamedTuple):
    """A score that can be pooled: `total` over `count` things; undefined where `num` is 0."""

    total: float
    num: float

    @property
    def value(self) -> float:
        """The score itself, NaN if undefined."""
        return self.total / self.num if self.num else float("nan")


Scores = Mapping[str, Ratio]


class ErrorMaps(NamedTuple):
    """Errors per pixel.

    Attributes:
        valid_thw: where truth and prediction both exist.
        num_true: pixels where the truth exists.
        maps: name to (t, h, w) float32, 0 where not valid.
    """

    valid_thw: Booleans
    num_true: int
    maps: Mapping[str, Floats]

    def over(self, name: str, where_thw: Booleans | None = None) -> Ratio:
        """One error pooled over the valid pixels, or those of them that are marked."""
        chosen = self.valid_thw if where_thw is None else self.valid_thw & where_thw
        return Ratio(float(self.maps[name].sum(where=chosen, dtype=np.float64)), int(chosen.sum()))

    @property
    def coverage(self) -> Ratio:
        """Share of the true pixels that the prediction has a value for."""
        return Ratio(int(self.valid_thw.sum()), self.num_true)


def _mean(values: Floats) -> Ratio:
    """The mean of what is not NaN."""
    known = np.isfinite(values)
    return Ratio(float(values[known].sum(dtype=np.float64)), int(known.sum()))


def _once(value: float) -> Ratio:
    """A score of a whole clip."""
    return Ratio(value, 1) if np.isfinite(value) else Ratio(0, 0)


# Depth


def default_alignment(quantity: Quantity) -> Alignment:
    """How a depth of this quantity is brought to the truth's scale if nobody says otherwise."""
    return "none" if quantity == "metric depth" else "least squares scale and shift in disparity"


def check_alignment(alignment: str, quantity: Quantity) -> Alignment:
    """The alignment, if a depth of this quantity can be judged with it.

    Raises:
        RequestError: it is unknown, or leaves a relative quantity without a unit.
    """
    if alignment not in get_args(Alignment):
        raise RequestError(f"unknown alignment {alignment!r}; one of {get_args(Alignment)}")
    fitted = default_alignment("relative disparity")
    if quantity == "relative disparity" and alignment != fitted:
        raise RequestError(f"a relative disparity has no zero, so {alignment!r} means nothing; use {fitted!r}")
    if quantity == "relative depth" and alignment == "none":
        raise RequestError("a relative depth has no unit; use an alignment other than 'none'")
    return next(known for known in get_args(Alignment) if known == alignment)


def has_depth(truth_thw: Floats) -> Booleans:
    """Which true depths are judged: those that exist, between MIN_DEPTH and MAX_DEPTH."""
    return (truth_thw >= MIN_DEPTH) & (truth_thw <= MAX_DEPTH)


def align_depth(
    predicted_thw: Floats, truth_thw: Floats, alignment: Alignment, *, is_disparity: bool = False
) -> NDArray[np.float32]:
    """Predicted depth at the truth's scale; one scale (and shift) for the whole clip.

    Args:
        predicted_thw: depth, or disparity; NaN where there is none.
        truth_thw: true depth, NaN where there is none.
        alignment: `median scale` is the ratio of the medians; `least squares scale` minimises squared depth errors;
            with a shift, squared errors of disparity (1/depth) are minimised, and the result is held above
            MIN_DISPARITY and, as a depth, between MIN_DEPTH and MAX_DEPTH.
        is_disparity: the prediction grows towards the camera.

    Returns:
        Depth, float32 (t, h, w), NaN where there is no prediction.
    """
    exists = np.isfinite(predicted_thw) & (is_disparity | (predicted_thw > 0))
    both = exists & has_depth(truth_thw)
    predicted = np.where(exists, predicted_thw, 1).astype(np.float32)
    source, target = predicted[both].astype(np.float64), truth_thw[both].astype(np.float64)
    if alignment == "none" or not len(source):
        aligned = predicted
    elif alignment == "median scale":
        aligned = predicted * np.float32(np.median(target) / np.median(source))
    elif alignment == "least squares scale":
        aligned = predicted * np.float32(source @ target / (source @ source))
    else:
        scale, shift = _fit_line(source if is_disparity else 1 / source, 1 / target)
        disparity = predicted if is_disparity else 1 / predicted
        disparity = np.maximum(disparity * np.float32(scale) + np.float32(shift), np.float32(MIN_DISPARITY))
        aligned = np.clip(1 / disparity, np.float32(MIN_DEPTH), np.float32(MAX_DEPTH))
    return np.where(exists, aligned, np.float32(np.nan))


def _fit_line(x_n: Floats, y_n: Floats) -> tuple[float, float]:
    """Scale and shift of x that come nearest to y; a constant x is only shifted."""
    centred = x_n - x_n.mean()
    variance = float(centred @ centred)
    scale = float(centred @ y_n) / variance if variance > 1e-12 * float(x_n @ x_n) else 0.0
    return scale, float(y_n.mean() - scale * x_n.mean())


def depth_errors(depth_thw: Floats, truth_thw: Floats) -> ErrorMaps:
    """Errors of a depth that is at the truth's scale, NaN where there is none.

    Predictions are held between 1e-6 and 1e9, so that no sum overflows.

    Maps: `abs_rel` |d - t| / t, `sq_rel` (d - t)^2 / t, `squared` (d - t)^2, and `delta1`..`delta3`, whether
    max(d / t, t / d) < 1.25, 1.25^2, 1.25^3 (Eigen et al. 2014, arXiv 1406.2283).
    """
    judged = has_depth(truth_thw)
    valid: Booleans = judged & (depth_thw > 0) & (depth_thw < np.inf)
    depth = np.clip(np.where(valid, depth_thw, 1).astype(np.float32), np.float32(1e-6), np.float32(1e9))
    truth = np.where(valid, truth_thw, 1).astype(np.float32)
    difference, inverse = np.abs(depth - truth), 1 / truth
    squared = difference * difference
    ratio = np.where(depth > truth, depth * inverse, truth / depth)
    maps = {"abs_rel": difference * inverse, "sq_rel": squared * inverse, "squared": squared}
    maps |= {f"delta{power}": ((ratio < 1.25**power) & valid).astype(np.float32) for power in (1, 2, 3)}
    return ErrorMaps(valid, int(judged.sum()), maps)


def depth_scores(errors: ErrorMaps, *, per_clip: bool) -> Scores:
    """AbsRel, SqRel, RMSE and delta of each frame, then their mean over frames.

    Args:
        errors: of `depth_errors`.
        per_clip: every clip counts once, as is the rule for aligned video depth; else every frame does.
    """
    num_t = errors.valid_thw.sum(axis=(1, 2))
    frames = num_t >= MIN_PIXELS
    scores = {"coverage": errors.coverage}
    for name, map_thw in errors.maps.items():
        mean_t = map_thw.sum(axis=(1, 2), dtype=np.float64)[frames] / num_t[frames]
        ratio = _mean(np.sqrt(mean_t)) if name == "squared" else _mean(mean_t)
        scores["rmse" if name == "squared" else name] = _once(ratio.value) if per_clip else ratio
    return scores


# Flow


def flow_errors(flow_thw2: Floats, truth_thw2: Floats) -> ErrorMaps:
    """Errors of a flow, NaN where there is none.

    Maps: `epe`, the length of the difference in pixels; `fl_all`, whether that is over 3 px and over 5% of the true
    length (KITTI 2015); `px1`, whether it is under 1 px.
    """
    true: Booleans = _exists(truth_thw2)
    valid: Booleans = true & _exists(flow_thw2)
    u, v = (np.where(valid, flow_thw2[..., axis] - truth_thw2[..., axis], 0).astype(np.float32) for axis in (0, 1))
    epe = np.sqrt(u * u + v * v)
    outlier = (epe > 3) & (epe > 0.05 * flow_length(np.where(valid[..., None], truth_thw2, 0)))
    maps = {"epe": epe, "fl_all": outlier.astype(np.float32), "px1": ((epe < 1) & valid).astype(np.float32)}
    return ErrorMaps(valid, int(true.sum()), maps)


def _exists(flow_thw2: Floats) -> Booleans:
    return np.asarray(np.isfinite(flow_thw2[..., 0]) & np.isfinite(flow_thw2[..., 1]))


def flow_length(flow_thw2: Floats) -> NDArray[np.float32]:
    """Length of each vector in pixels, NaN where there is none."""
    u, v = flow_thw2[..., 0], flow_thw2[..., 1]
    return np.sqrt(u * u + v * v).astype(np.float32, copy=False)


def flow_scores(errors: ErrorMaps, visible_thw: Booleans | None = None) -> Scores:
    """EPE, Fl-all and 1 px, pooled over pixels; Fl-all also as the mean over frames of each frame's share.

    Args:
        errors: of `flow_errors`.
        visible_thw: where the surface is seen in the other frame too; the rest is occluded or leaves the frame. With it
            EPE and Fl-all are also given apart for both.
    """
    scores = {"coverage": errors.coverage} | {name: errors.over(name) for name in errors.maps}
    num_t = errors.valid_thw.sum(axis=(1, 2))
    share_t = errors.maps["fl_all"].sum(axis=(1, 2), dtype=np.float64)[num_t > 0] / num_t[num_t > 0]
    scores["fl_all_per_sample"] = _mean(share_t)
    if visible_thw is not None:
        for name in ("epe", "fl_all"):
            scores[f"{name}_visible"] = errors.over(name, visible_thw)
            scores[f"{name}_occluded"] = errors.over(name, ~visible_thw)
    return scores


def bucket_of(key_thw: Floats, edges: Sequence[float]) -> NDArray[np.intp]:
    """The bucket of each pixel: i where edges[i - 1] <= key < edges[i], or len(edges) + 1, which is none, at NaN."""
    bucket_thw = np.zeros(key_thw.shape, np.intp)
    for edge in edges:
        bucket_thw += key_thw >= edge
    bucket_thw[np.isnan(key_thw)] = len(edges) + 1
    return bucket_thw


def bucket_scores(
    errors: ErrorMaps, names: Sequence[str], bucket_thw: NDArray[np.intp], num_buckets: int
) -> list[Scores]:
    """Errors pooled over the pixels of each bucket.

    Args:
        errors: errors per pixel.
        names: which of its maps.
        bucket_thw: of `bucket_of`.
        num_buckets: len(edges) + 1.

    Returns:
        One per bucket.
    """
    bucket_n = bucket_thw.ravel()
    counts, *totals = (
        np.bincount(bucket_n, values_thw.ravel(), num_buckets)
        for values_thw in (errors.valid_thw, *(errors.maps[name] for name in names))
    )
    found = dict(zip(names, totals, strict=True))
    return [{name: Ratio(float(found[name][i]), int(counts[i])) for name in names} for i in range(num_buckets)]


# Motion


def motion_scores(moving_thw: Booleans, truth_thw: Booleans) -> Scores:
    """Region similarity J and boundary accuracy F of each frame (DAVIS 2017, arXiv 1704.00675), mean over frames.

    J is the intersection over the union, 1 where both masks are empty; `j_moving` is the same over the frames in which
    something truly moves, which a mask without any motion cannot win.
    """
    union_t = (moving_thw | truth_thw).sum(axis=(1, 2))
    shared_t = (moving_thw & truth_thw).sum(axis=(1, 2))
    j_t = np.where(union_t > 0, shared_t / np.maximum(union_t, 1), 1.0)
    f_t = np.array([boundary_f(ours, true) for ours, true in zip(moving_thw, truth_thw, strict=True)])
    return {"j": _mean(j_t), "f": _mean(f_t), "j_moving": _mean(j_t[truth_thw.any(axis=(1, 2))])}


def boundary_f(moving_hw: Booleans, truth_hw: Booleans) -> float:
    """F measure of two masks' 1-px boundaries; those nearer than 0.8% of the diagonal (rounded up) match."""
    ours, true = _boundary(moving_hw), _boundary(truth_hw)
    num_ours, num_true = int(ours.sum()), int(true.sum())
    if not num_ours or not num_true:
        return float(num_ours == num_true)
    radius = int(np.ceil(BOUNDARY_FRACTION * np.hypot(*truth_hw.shape)))
    axis = np.arange(-radius, radius + 1) ** 2
    disk = (np.add.outer(axis, axis) <= radius**2).astype(np.uint8)
    precision = float((ours & cv2.dilate(true, disk)).sum()) / num_ours
    recall = float((true & cv2.dilate(ours, disk)).sum()) / num_true
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _boundary(mask_hw: Booleans) -> NDArray[np.uint8]:
    """1 where a pixel differs from its neighbour to the right, below, or both; the frame's edge is no boundary."""
    padded = np.pad(mask_hw, ((0, 1), (0, 1)), mode="edge")
    here = padded[:-1, :-1]
    return ((here ^ padded[:-1, 1:]) | (here ^ padded[1:, :-1]) | (here ^ padded[1:, 1:])).astype(np.uint8)


# Camera and latents


def camera_scores(predicted_t44: Floats, truth_t44: Floats) -> Scores:
    """Errors of a clip's cameras, up to a change of the world's axes.

    - `ate`: root mean square distance of the centres after the Sim(3) of Umeyama (1991); `rpe_translation`,
      `rpe_rotation`: root mean square error of the motion from each frame to the next (delta 1), the translation at the
      scale of that Sim(3). In the truth's unit and degrees. A true camera that stands has no scale, so neither of the
      two translations.
    - `rotation_degrees`: mean over frames of the error of the rotation relative to the first frame.
    - Over all pairs of frames, as VGGT judges: the angle between relative rotations, and between relative translations
      up to sign, and the larger of both; `..._auc15` is the mean over thresholds of 1, 2, ... 15 degrees of the share
      of pairs below. Pairs whose true translation is under MIN_TRANSLATION have no direction: they are left out
      wherever one is needed, and `undirected_pairs` is their share.
    - `translation_degrees`: the mean of that angle with the sign, so that a reversed camera shows as 180.

    Args:
        predicted_t44: world to camera.
        truth_t44: the same.
    """
    predicted, truth = predicted_t44.astype(np.float64), truth_t44.astype(np.float64)
    scores = _trajectory_scores(predicted, truth)
    first, second = np.triu_indices(len(truth), 1)
    ours, true = (pose[first] @ np.linalg.inv(pose[second]) for pose in (predicted, truth))
    turn_p = rotation_angles(ours[:, :3, :3], true[:, :3, :3])
    directed = np.linalg.norm(true[:, :3, 3], axis=-1) >= MIN_TRANSLATION
    signed_p = vector_angles(_moves(ours[directed, :3, 3]), true[directed, :3, 3])
    shift_p = np.minimum(signed_p, 180 - signed_p)
    scores["rotation_degrees"] = _mean(turn_p[first == 0])
    scores["translation_degrees"] = _mean(signed_p)
    scores["undirected_pairs"] = Ratio(int((~directed).sum()), len(directed))
    both_p = np.maximum(turn_p[directed], shift_p)
    for prefix, error_p in (("rotation_auc", turn_p), ("translation_auc", shift_p), ("auc", both_p)):
        scores |= {f"{prefix}{degrees}": _mean(_under(error_p, degrees)) for degrees in AUC_DEGREES}
    return scores


def _moves(shift_p3: Floats) -> Floats:
    """Translations, those that are only rounding set to 0."""
    return np.where(np.linalg.norm(shift_p3, axis=-1, keepdims=True) < 1e-9, 0.0, shift_p3)


def _trajectory_scores(predicted_t44: Floats, truth_t44: Floats) -> dict[str, Ratio]:
    ours_t3, true_t3 = (camera_centres(pose) for pose in (predicted_t44, truth_t44))
    stands = np.linalg.norm(true_t3 - true_t3.mean(axis=0), axis=-1).max() < MIN_TRANSLATION
    scale, rotation, shift = umeyama(ours_t3, true_t3)
    residual = scale * ours_t3 @ rotation.T + shift - true_t3
    ours, true = (pose[:-1] @ np.linalg.inv(pose[1:]) for pose in (predicted_t44, truth_t44))
    turn = rotation_angles(ours[:, :3, :3], true[:, :3, :3])
    step = np.linalg.norm(scale * ours[:, :3, 3] - true[:, :3, 3], axis=-1)
    return {
        "ate": Ratio(0, 0) if stands else _once(_root_mean_square(np.linalg.norm(residual, axis=-1))),
        "rpe_translation": Ratio(0, 0) if stands else _once(_root_mean_square(step)),
        "rpe_rotation": _once(_root_mean_square(turn)),
    }


def _root_mean_square(values: Floats) -> float:
    return float(np.sqrt(np.mean(values**2))) if len(values) else float("nan")


def _under(error_p: Floats, degrees: int) -> Floats:
    """Per pair the share of the thresholds 1, 2, ... degrees that its error is under."""
    return np.asarray((error_p[:, None] < np.arange(1, degrees + 1)).mean(axis=1))


def ray_scores(rays_thw6: Floats, truth_thw6: Floats) -> Scores:
    """`ray_degrees`: mean angle between the directions of two Plücker ray grids. Our own; there is no official one."""
    return {"ray_degrees": _mean(ray_angles(rays_thw6, truth_thw6).ravel())}


def latent_scores(latents_knc: Floats, truth_knc: Floats) -> Scores:
    """Per tap k (from 1): `cosine_tap1`, mean over tokens; `relative_l2_tap1`, |l - t| / |t|; `cka_tap1`, linear CKA.

    Args:
        latents_knc: taps, tokens, channels.
        truth_knc: the same.
    """
    scores: dict[str, Ratio] = {}
    pairs = zip(latents_knc.astype(np.float32), truth_knc.astype(np.float32), strict=True)
    for tap, (ours_nc, true_nc) in enumerate(pairs, start=1):
        scores[f"cosine_tap{tap}"] = _mean(cosines(ours_nc, true_nc))
        norm = float(np.linalg.norm(true_nc))
        scores[f"relative_l2_tap{tap}"] = Ratio(float(np.linalg.norm(ours_nc - true_nc)) / norm, 1 if norm else 0)
        scores[f"cka_tap{tap}"] = _once(linear_cka(ours_nc, true_nc))
    return scores


def cosines(ours_nc: Floats, true_nc: Floats) -> Floats:
    """Cosine of each token with its counterpart; NaN where one is zero."""
    norms = np.linalg.norm(ours_nc, axis=-1) * np.linalg.norm(true_nc, axis=-1)
    return np.where(norms > 0, np.vecdot(ours_nc, true_nc) / np.where(norms > 0, norms, 1), np.nan)


def linear_cka(ours_nc: Floats, true_nc: Floats) -> float:
    """Linear centred kernel alignment over a clip's tokens (Kornblith et al. 2019, arXiv 1905.00414), or NaN."""
    x, y = (values - values.mean(axis=0, dtype=np.float64).astype(values.dtype) for values in (ours_nc, true_nc))
    if len(x) < x.shape[1]:  # the smaller of two equal forms: tokens x tokens
        grams = [x @ x.T, y @ y.T]
        shared = float(np.vdot(*grams))
    else:
        grams = [x.T @ x, y.T @ y]
        shared = float(np.linalg.norm(x.T @ y) ** 2)
    norms = float(np.linalg.norm(grams[0])) * float(np.linalg.norm(grams[1]))
    return shared / norms if norms else float("nan")


# Uncertainty


def bootstrap_intervals(
    totals_nm: Floats, counts_nm: Floats, *, seed: int, num_resamples: int = 1000, confidence: float = 0.95
) -> tuple[Floats, Floats]:
    """Percentile intervals of pooled scores under a new draw of the clips (Efron 1979).

    Args:
        totals_nm: sums, a row per clip and a column per score.
        counts_nm: the numbers of things summed; 0 where a clip has no such score.
        seed: of the draws; all columns share each draw.
        num_resamples: draws.
        confidence: share of the draws between the bounds.

    Returns:
        Lower and upper bounds (m,); NaN where fewer than two clips have the score.
    """
    num_clips, num_scores = totals_nm.shape
    rng = np.random.default_rng(seed)
    pooled_rm = np.full((num_resamples, num_scores), np.nan)
    step = max(1, 1_000_000 // max(1, num_clips))  # bounds the memory
    for start in range(0, num_resamples, step):
        rows = min(step, num_resamples - start)
        drawn = rng.integers(num_clips, size=(rows, num_clips)) + np.arange(rows)[:, None] * num_clips
        times_rn = np.bincount(drawn.ravel(), minlength=rows * num_clips).reshape(rows, num_clips).astype(np.float64)
        totals, counts = times_rn @ totals_nm, times_rn @ counts_nm
        np.divide(totals, counts, out=pooled_rm[start : start + rows], where=counts > 0)
    bounds = np.full((2, num_scores), np.nan)
    known = (counts_nm > 0).sum(axis=0) > 1
    tail = 50 * (1 - confidence)
    bounds[:, known] = np.nanpercentile(pooled_rm[:, known], [tail, 100 - tail], axis=0)
    return bounds[0], bounds[1]
