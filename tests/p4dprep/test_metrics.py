"""Every score against a known answer, and against torchmetrics, ptlflow, scipy or a plain float64 rewrite."""

import importlib.util
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
import torchmetrics
import torchmetrics.functional as reference
from numpy.typing import NDArray
from scipy.spatial import procrustes
from scipy.spatial.transform import Rotation

from p4dprep import metrics
from p4dprep.cameras import (
    camera_centres,
    camera_directions,
    poses_from_rays,
    ray_angles,
    rays_from_poses,
    rotation_angles,
    umeyama,
    vector_angles,
)
from p4dprep.errors import RequestError
from p4dprep.metrics import Ratio, Scores
from tests.truth_cache import poses, truth_arrays

SHAPE = (4, 20, 30)


def random_depth(seed: int) -> NDArray[np.float32]:
    return np.exp(np.random.default_rng(seed).normal(1, 0.5, SHAPE)).astype(np.float32)


def random_flow(seed: int, size: float = 5) -> NDArray[np.float32]:
    flow = np.random.default_rng(seed).normal(0, size, (*SHAPE, 2)).astype(np.float32)
    flow[0] = np.nan
    return flow


def values(scores: Scores) -> dict[str, float]:
    return {name: ratio.value for name, ratio in scores.items()}


def depth_values(depth: NDArray[np.float32], truth: NDArray[np.float32], per_clip: bool = False) -> dict[str, float]:
    return values(metrics.depth_scores(metrics.depth_errors(depth, truth), per_clip=per_clip))


# Depth


def test_a_perfect_depth_scores_perfectly() -> None:
    scores = depth_values(random_depth(0), random_depth(0))
    assert scores == {"coverage": 1, "abs_rel": 0, "sq_rel": 0, "rmse": 0, "delta1": 1, "delta2": 1, "delta3": 1}


def test_depth_errors_are_those_of_torchmetrics_frame_by_frame() -> None:
    ours, true = random_depth(0), random_depth(1)
    scores = depth_values(ours, true)
    frames = [(torch.from_numpy(a), torch.from_numpy(b)) for a, b in zip(ours, true, strict=True)]
    abs_rel = np.mean([float(reference.mean_absolute_percentage_error(a, b)) for a, b in frames])
    rmse = np.mean([float(reference.mean_squared_error(a.ravel(), b.ravel(), squared=False)) for a, b in frames])
    assert scores["abs_rel"] == pytest.approx(abs_rel, rel=1e-5)
    assert scores["rmse"] == pytest.approx(rmse, rel=1e-5)
    a, b = ours.astype(float), true.astype(float)
    assert scores["sq_rel"] == pytest.approx(((a - b) ** 2 / b).mean(), rel=1e-5)
    for power in (1, 2, 3):
        assert scores[f"delta{power}"] == pytest.approx((np.maximum(a / b, b / a) < 1.25**power).mean(), abs=1e-6)


def test_a_depth_that_is_a_tenth_too_far_has_a_known_error() -> None:
    scores = depth_values(random_depth(0) * np.float32(1.1), random_depth(0))
    assert scores["abs_rel"] == pytest.approx(0.1, rel=1e-5)
    assert (scores["delta1"], depth_values(random_depth(0) * np.float32(1.3), random_depth(0))["delta1"]) == (1, 0)


def test_only_pixels_with_both_depths_count_and_the_rest_shows_in_the_coverage() -> None:
    true, ours = random_depth(0), random_depth(0)
    true[:, :5] = np.nan
    true[:, 5] = 100
    true[3] = np.nan
    true[3, 10, :9] = 2
    ours[:, 6] = np.nan
    ours[:, :6] = 1000
    ours[3] = 1000
    errors = metrics.depth_errors(ours, true)
    assert errors.coverage == Ratio(3 * 13 * 30 + 9, 3 * 14 * 30 + 9)
    scores = metrics.depth_scores(errors, per_clip=False)
    assert scores["abs_rel"] == Ratio(0, 3)  # the last frame has fewer than ten pixels
    assert metrics.depth_scores(errors, per_clip=True)["abs_rel"] == Ratio(0, 1)


def test_a_clip_without_depth_has_no_score() -> None:
    nothing = np.full(SHAPE, np.nan, np.float32)
    for per_clip in (False, True):
        scores = metrics.depth_scores(metrics.depth_errors(random_depth(0), nothing), per_clip=per_clip)
        assert {ratio.num for ratio in scores.values()} == {0}
        assert np.isnan(scores["abs_rel"].value)


def test_a_wild_depth_is_very_wrong_and_not_lost() -> None:
    wild = random_depth(0)
    wild[0, 0, 0], wild[0, 0, 1] = 3e38, 1e-40
    scores = depth_values(wild, random_depth(0))
    assert scores["coverage"] == 1
    assert 1e6 < scores["rmse"] < np.inf


@pytest.mark.parametrize("alignment", ["median scale", "least squares scale"])
def test_a_scale_is_found_and_taken_out(alignment: metrics.Alignment) -> None:
    true = random_depth(0)
    true[:, :3] = np.nan
    aligned = metrics.align_depth(random_depth(0) * np.float32(7), true, alignment)
    assert depth_values(aligned, true)["abs_rel"] < 1e-6
    assert np.isfinite(aligned).all()
    assert depth_values(metrics.align_depth(true * np.float32(7), true, "none"), true)["abs_rel"] == pytest.approx(6)


def test_scale_and_shift_are_found_in_disparity() -> None:
    true = random_depth(0)
    disparity = 3 / true - 0.2
    how = metrics.default_alignment("relative disparity")
    assert depth_values(metrics.align_depth(disparity, true, how, is_disparity=True), true)["abs_rel"] < 1e-5
    relative = 1 / (0.5 / true + 0.7)
    assert depth_values(metrics.align_depth(relative, true, how), true)["abs_rel"] < 1e-5


def test_scale_and_shift_are_those_of_least_squares() -> None:
    true, noisy = random_depth(0), random_depth(3)
    both = np.stack([noisy.ravel(), np.ones(noisy.size)], axis=1).astype(float)
    fitted = both @ np.linalg.lstsq(both, 1 / true.ravel().astype(float))[0]
    wanted = np.clip(1 / np.maximum(fitted, 1e-3), 1e-3, 80).reshape(SHAPE)
    how = metrics.default_alignment("relative disparity")
    np.testing.assert_allclose(metrics.align_depth(noisy, true, how, is_disparity=True), wanted, rtol=1e-4)


def test_a_constant_is_aligned_to_the_mean_disparity() -> None:
    true = random_depth(0)
    aligned = metrics.align_depth(np.full(SHAPE, 5, np.float32), true, metrics.default_alignment("relative depth"))
    np.testing.assert_allclose(aligned, 1 / (1 / true.astype(float)).mean(), rtol=1e-5)


@pytest.mark.parametrize(
    ("alignment", "quantity", "message"),
    [
        ("affine", "metric depth", "unknown alignment 'affine'"),
        ("none", "relative depth", "has no unit"),
        ("median scale", "relative disparity", "has no zero"),
    ],
)
def test_an_alignment_that_means_nothing_is_refused(alignment: str, quantity: metrics.Quantity, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        metrics.check_alignment(alignment, quantity)


# Flow


def flow_values(
    flow: NDArray[np.float32], truth: NDArray[np.float32], visible: NDArray[np.bool_] | None = None
) -> dict[str, float]:
    return values(metrics.flow_scores(metrics.flow_errors(flow, truth), visible))


def test_a_perfect_flow_scores_perfectly() -> None:
    scores = flow_values(random_flow(0), random_flow(0))
    assert scores == {"coverage": 1, "epe": 0, "fl_all": 0, "px1": 1, "fl_all_per_sample": 0}


def test_a_constant_shift_has_a_known_error() -> None:
    scores = flow_values(random_flow(0) + np.float32([3, 4]), random_flow(0))
    assert scores["epe"] == pytest.approx(5, rel=1e-6)
    assert (scores["px1"], scores["fl_all"]) == (0, 1)


def test_a_reversed_flow_is_twice_as_wrong_as_none() -> None:
    true = random_flow(0)
    none = flow_values(np.zeros_like(true), true)["epe"]
    assert flow_values(-true, true)["epe"] == pytest.approx(2 * none, rel=1e-6)


def ptlflow_metrics() -> torchmetrics.Metric:
    """ptlflow's metrics from their own file: the package would import every model it has."""
    package = importlib.util.find_spec("ptlflow")
    assert package is not None
    path = Path(str(package.origin)).parent / "utils" / "flow_metrics.py"
    found = importlib.util.spec_from_file_location("flow_metrics", path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module.FlowMetrics()


def test_flow_errors_are_those_of_ptlflow() -> None:
    ours, true = random_flow(0, 30), random_flow(1, 30)
    ours[1:] = true[1:] + random_flow(2, 3)[1:]
    visible = np.random.default_rng(0).random(SHAPE) < 0.7
    theirs = ptlflow_metrics()
    flows, truths = (torch.from_numpy(flow[1:].transpose(0, 3, 1, 2)) for flow in (ours, true))
    theirs.update({"flows": flows}, {"flows": truths, "occs": torch.from_numpy(~visible[1:, None]).float()})
    wanted = {name: float(value) for name, value in theirs.compute().items()}
    scores = flow_values(ours, true, visible)
    assert scores["epe"] == pytest.approx(wanted["epe"], rel=1e-5)
    assert scores["px1"] == pytest.approx(wanted["px1"], rel=1e-5)
    assert 100 * scores["fl_all_per_sample"] == pytest.approx(wanted["flall"], rel=1e-5)
    for name, part in (("visible", "non_occ"), ("occluded", "occ")):
        mean_of_frames = wanted[f"epe_{part}"]  # ptlflow averages frames; ours pools pixels
        masked = np.where(visible[1:] == (name == "visible"), np.linalg.norm(ours[1:] - true[1:], axis=-1), np.nan)
        assert np.mean([np.nanmean(frame) for frame in masked]) == pytest.approx(mean_of_frames, rel=1e-5)
        assert scores[f"epe_{name}"] == pytest.approx(np.nanmean(masked), rel=1e-5)


def test_an_outlier_is_over_three_pixels_and_over_a_twentieth_of_the_length() -> None:
    true = np.zeros((1, 1, 4, 2), np.float32)
    true[..., 0] = [10, 10, 100, 100]
    flow = true.copy()
    flow[..., 1] = [2.9, 3.1, 4.9, 5.1]
    errors = metrics.flow_errors(flow, true)
    assert errors.maps["fl_all"].ravel().tolist() == [0, 1, 0, 1]


def test_pooling_and_averaging_over_frames_differ_as_they_should() -> None:
    true = random_flow(0)
    true[1, 1:] = np.nan
    ours = true.copy()
    ours[1] += 10
    scores = metrics.flow_scores(metrics.flow_errors(ours, true))
    assert scores["fl_all"] == Ratio(30, 30 + 2 * 600)
    assert scores["fl_all_per_sample"] == Ratio(1, 3)


def test_a_vector_that_is_not_predicted_shows_in_the_coverage_only() -> None:
    ours = random_flow(0)
    ours[1, 0, :, 1] = np.nan
    scores = flow_values(ours, random_flow(0))
    assert scores["coverage"] == pytest.approx(1 - 30 / 1800)
    assert scores["epe"] == 0


def test_buckets_split_the_pixels_by_a_key_and_add_up() -> None:
    true = random_flow(0, 8)
    errors = metrics.flow_errors(random_flow(1), true)
    length = np.linalg.norm(true, axis=-1)
    buckets = metrics.bucket_scores(errors, ("epe", "px1"), metrics.bucket_of(length, (1, 4, 16)), 4)
    whole = errors.over("epe")
    assert sum(scores["epe"].num for scores in buckets) == whole.num == 3 * 600
    assert sum(scores["epe"].total for scores in buckets) == pytest.approx(whole.total)
    chosen = (length >= 4) & (length < 16)
    assert buckets[2]["epe"].value == pytest.approx(errors.maps["epe"][chosen].mean(), rel=1e-5)
    assert metrics.bucket_of(np.float32([0.5, 1, 4, 16, np.nan]), (1, 4, 16)).tolist() == [0, 1, 2, 3, 4]


# Motion


def test_j_is_the_intersection_over_the_union_of_torchmetrics() -> None:
    rng = np.random.default_rng(0)
    ours, true = rng.random(SHAPE) < 0.4, rng.random(SHAPE) < 0.5
    wanted = np.mean([float(reference.jaccard_index(*pair, "binary")) for pair in _tensors(ours, true)])
    assert values(metrics.motion_scores(ours, true))["j"] == pytest.approx(wanted, rel=1e-6)


def _tensors(*masks: NDArray[np.bool_]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.from_numpy(a).int(), torch.from_numpy(b).int()) for a, b in zip(*masks, strict=True)]


def test_where_nothing_moves_and_nothing_is_predicted_j_is_one_but_says_nothing_of_motion() -> None:
    still, moving = np.zeros(SHAPE, bool), np.zeros(SHAPE, bool)
    moving[2:, 5:9, 5:9] = True
    assert metrics.motion_scores(still, still) == {"j": Ratio(4, 4), "f": Ratio(4, 4), "j_moving": Ratio(0, 0)}
    assert metrics.motion_scores(still, moving) == {"j": Ratio(2, 4), "f": Ratio(2, 4), "j_moving": Ratio(0, 2)}
    assert metrics.motion_scores(moving, moving)["j_moving"] == Ratio(2, 2)


def plain_boundary_f(ours: NDArray[np.bool_], true: NDArray[np.bool_]) -> float:
    """DAVIS's rule with distances between pixels instead of a dilation."""
    points = []
    for mask in (ours, true):
        edge = np.zeros_like(mask)
        for y, x in np.ndindex(mask.shape):
            below, right = min(y + 1, mask.shape[0] - 1), min(x + 1, mask.shape[1] - 1)
            edge[y, x] = len({mask[y, x], mask[y, right], mask[below, x], mask[below, right]}) > 1
        points.append(np.argwhere(edge))
    distance = np.linalg.norm(points[0][:, None] - points[1][None], axis=-1)
    near = distance <= np.ceil(0.008 * np.hypot(*ours.shape))
    precision, recall = near.any(axis=1).mean(), near.any(axis=0).mean()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


@pytest.mark.parametrize("seed", range(5))
def test_f_is_that_of_a_plain_rewrite_with_distances(seed: int) -> None:
    rng = np.random.default_rng(seed)
    masks = np.zeros((2, 150, 180), bool)
    for mask in masks:
        y, x = rng.integers(0, 100, 2)
        mask[y : y + 60, x : x + rng.integers(30, 90)] = True
    assert metrics.boundary_f(*masks) == pytest.approx(plain_boundary_f(*masks))


def test_a_boundary_may_be_off_by_the_tolerance_and_no_more() -> None:
    true = np.zeros((224, 224), bool)
    true[60:120, 60:120] = True  # 0.8% of the diagonal, rounded up, is 3 px
    assert metrics.boundary_f(np.roll(true, 3, axis=1), true) == 1
    assert metrics.boundary_f(np.roll(true, 4, axis=1), true) < 0.6
    assert metrics.boundary_f(np.zeros_like(true), true) == 0


# Camera

SIZE, GRID = (40, 60), (6, 8)


def intrinsics(num_frames: int, zoom: float = 0) -> NDArray[np.float64]:
    focal = 50 * (1 + zoom * np.arange(num_frames))
    matrix = np.tile(np.eye(3), (num_frames, 1, 1))
    matrix[:, 0, 0], matrix[:, 1, 1], matrix[:, 0, 2], matrix[:, 1, 2] = focal, focal, 30, 20
    return matrix


def random_poses(seed: int, num_frames: int = 7) -> NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    pose = np.tile(np.eye(4), (num_frames, 1, 1))
    pose[:, :3, :3] = Rotation.from_rotvec(rng.normal(0, 0.4, (num_frames, 3))).as_matrix()
    pose[:, :3, 3] = rng.normal(0, 1, (num_frames, 3))
    return pose


def in_first(pose: NDArray[np.float64]) -> NDArray[np.float64]:
    return pose @ np.linalg.inv(pose[0])


def moved(pose: NDArray[np.float64], scale: float = 2.5) -> NDArray[np.float64]:
    """The same cameras in a world that was scaled, turned and shifted."""
    rotation = Rotation.from_euler("xyz", [20, -50, 110], degrees=True).as_matrix()
    centres = scale * camera_centres(pose) @ rotation.T + [3, -1, 2]
    result = pose.copy()
    result[:, :3, :3] = pose[:, :3, :3] @ rotation.T
    result[:, :3, 3] = -np.einsum("tij,tj->ti", result[:, :3, :3], centres)
    return result


def test_rays_pass_through_what_the_camera_sees() -> None:
    pose, matrix = in_first(random_poses(0)), intrinsics(7)
    rays = rays_from_poses(pose, matrix, SIZE, GRID)
    directions, moments = rays[..., :3], rays[..., 3:]
    np.testing.assert_allclose(np.linalg.norm(directions, axis=-1), 1)
    np.testing.assert_allclose((directions * moments).sum(-1), 0, atol=1e-12)
    points = np.cross(directions, moments) + 50 * directions  # far along each ray, in front of the camera
    seen = np.einsum("tij,tyxj->tyxi", pose[:, :3, :3], points) + pose[:, None, None, :3, 3]
    image = np.einsum("tij,tyxj->tyxi", matrix, seen)
    y, x = np.mgrid[: GRID[0], : GRID[1]]
    np.testing.assert_allclose(image[..., 0] / image[..., 2], np.tile((x + 0.5) / 8 * 60, (7, 1, 1)))
    np.testing.assert_allclose(image[..., 1] / image[..., 2], np.tile((y + 0.5) / 6 * 40, (7, 1, 1)))
    np.testing.assert_allclose(moments[0], 0, atol=1e-12)


def test_a_camera_that_goes_right_turns_its_moments_by_the_right_hand_rule() -> None:
    pose = np.tile(np.eye(4), (2, 1, 1))
    pose[1, 0, 3] = -1  # the camera stands at x = 1
    ray = rays_from_poses(pose, intrinsics(2), SIZE, (1, 1))[1, 0, 0]
    np.testing.assert_allclose(ray, [0, 0, 1, 0, -1, 0], atol=1e-12)


@pytest.mark.parametrize("zoom", [0, 0.1])
def test_poses_come_back_from_rays_of_any_length(zoom: float) -> None:
    pose, matrix = random_poses(0), intrinsics(7, zoom)
    rays = rays_from_poses(pose, matrix, SIZE, GRID)
    rays = rays * np.random.default_rng(0).uniform(0.5, 2, (*rays.shape[:-1], 1))
    own = camera_directions(matrix, SIZE, GRID) if zoom else None
    np.testing.assert_allclose(poses_from_rays(rays, own), in_first(pose), atol=1e-9)


def test_a_rotation_from_noisy_rays_is_that_of_scipy() -> None:
    rng = np.random.default_rng(0)
    rays = rays_from_poses(random_poses(0), intrinsics(7), SIZE, GRID)
    rays[1:] += rng.normal(0, 0.05, rays[1:].shape)
    ours = poses_from_rays(rays)[3, :3, :3]
    unit = rays[..., :3] / np.linalg.norm(rays[..., :3], axis=-1, keepdims=True)
    theirs, _ = Rotation.align_vectors(unit[0].reshape(-1, 3), unit[3].reshape(-1, 3))
    np.testing.assert_allclose(ours, theirs.as_matrix(), atol=1e-7)


def test_the_centre_from_noisy_rays_is_nearest_to_all_of_them() -> None:
    rays = rays_from_poses(random_poses(0), intrinsics(7), SIZE, GRID)
    rays += np.random.default_rng(0).normal(0, 0.05, rays.shape)
    rays /= np.linalg.norm(rays[..., :3], axis=-1, keepdims=True)
    d, m = rays[3, ..., :3].reshape(-1, 3), rays[3, ..., 3:].reshape(-1, 3)
    crossed = np.concatenate([np.cross(np.eye(3), direction).T for direction in d])  # o x d as a matrix times o
    wanted = np.linalg.lstsq(crossed, m.ravel())[0]
    np.testing.assert_allclose(camera_centres(poses_from_rays(rays))[3], wanted, atol=1e-9)


def test_perfect_cameras_score_perfectly_in_any_world() -> None:
    pose = random_poses(0)
    for other in (pose, moved(pose)):
        scores = values(metrics.camera_scores(other, pose))
        errors = {name: value for name, value in scores.items() if "auc" not in name}
        assert max(errors.values()) < 1e-5, errors
        assert {value for name, value in scores.items() if "auc" in name} == {1}


def test_a_similarity_is_found_and_its_residual_is_that_of_scipy() -> None:
    rng = np.random.default_rng(0)
    source, rotation = rng.normal(size=(9, 3)), Rotation.random(rng=1).as_matrix()
    target = 0.3 * source @ rotation.T + [1, 2, 3]
    scale, found, shift = umeyama(source, target)
    assert scale == pytest.approx(0.3)
    np.testing.assert_allclose(found, rotation, atol=1e-12)
    np.testing.assert_allclose(shift, [1, 2, 3], atol=1e-12)
    noisy = target + rng.normal(0, 0.02, target.shape)
    scale, found, shift = umeyama(source, noisy)
    residual = ((scale * source @ found.T + shift - noisy) ** 2).sum() / ((noisy - noisy.mean(axis=0)) ** 2).sum()
    assert residual == pytest.approx(procrustes(noisy, source)[2])


def test_a_mirrored_path_is_turned_and_never_reflected() -> None:
    source = np.random.default_rng(0).normal(size=(9, 3))
    _, rotation, _ = umeyama(source, source * [1, 1, -1])
    assert np.linalg.det(rotation) == pytest.approx(1)


def plain_auc(turn: list[float], shift: list[float], degrees: int) -> float:
    larger = [max(pair) for pair in zip(turn, shift, strict=True)]
    return float(np.mean([np.mean([error < threshold for error in larger]) for threshold in range(1, degrees + 1)]))


def test_auc_is_that_of_a_plain_rewrite_of_vggts_rule() -> None:
    true = random_poses(0, 6)
    ours = true.copy()
    rng = np.random.default_rng(1)
    ours[:, :3, :3] = Rotation.from_rotvec(rng.normal(0, 0.08, (6, 3))).as_matrix() @ true[:, :3, :3]
    ours[:, :3, 3] += rng.normal(0, 0.1, (6, 3))
    turn, shift = [], []
    for i, j in combinations(range(6), 2):
        a, b = (pose[i] @ np.linalg.inv(pose[j]) for pose in (ours, true))
        turn.append(np.degrees(Rotation.from_matrix(a[:3, :3] @ b[:3, :3].T).magnitude()))
        cosine = a[:3, 3] @ b[:3, 3] / np.linalg.norm(a[:3, 3]) / np.linalg.norm(b[:3, 3])
        shift.append(np.degrees(np.arccos(abs(cosine))))
    scores = metrics.camera_scores(ours, true)
    for degrees in (3, 5, 15, 30):
        assert scores[f"auc{degrees}"].value == pytest.approx(plain_auc(turn, shift, degrees))
        assert scores[f"rotation_auc{degrees}"].value == pytest.approx(plain_auc(turn, turn, degrees))
        assert scores[f"translation_auc{degrees}"].value == pytest.approx(plain_auc(shift, shift, degrees))
    assert 0 < scores["auc15"].value < 1
    assert scores["auc15"].num == 15


def test_a_reversed_path_is_seen_by_the_signed_angle_though_vggts_rule_folds_it() -> None:
    true = in_first(random_poses(0))
    ours = true.copy()
    ours[:, :3, 3] *= -1
    scores = values(metrics.camera_scores(ours, true))
    assert scores["translation_degrees"] == pytest.approx(180)
    assert scores["translation_auc30"] == 1
    assert scores["ate"] > 0.1


def test_a_true_camera_that_stands_has_no_direction_and_no_scale() -> None:
    true = poses(0, 4)
    true[:, :3, 3] = 0
    scores = metrics.camera_scores(random_poses(0, 4), true)
    undefined = {name for name, ratio in scores.items() if not ratio.num}
    assert {"ate", "rpe_translation", "translation_degrees", "auc15", "translation_auc3"} <= undefined
    assert scores["undirected_pairs"] == Ratio(6, 6)
    assert scores["rotation_auc30"].num == 6


def test_a_predicted_camera_that_stands_has_right_angles_for_directions() -> None:
    ours = np.tile(random_poses(0)[1], (4, 1, 1))  # rounding leaves a little of its translation
    scores = values(metrics.camera_scores(ours, poses(0, 4)))
    assert (scores["translation_degrees"], scores["auc30"]) == (90, 0)
    spread = camera_centres(poses(0, 4)) - camera_centres(poses(0, 4)).mean(axis=0)
    assert scores["ate"] == pytest.approx(np.sqrt((spread**2).sum(axis=1).mean()))


def test_a_clip_of_one_frame_has_no_motion_to_judge() -> None:
    scores = metrics.camera_scores(random_poses(0, 1), random_poses(1, 1))
    assert {ratio.num for ratio in scores.values()} == {0}
    assert metrics.flow_scores(metrics.flow_errors(random_flow(0)[:1], random_flow(0)[:1]))["epe"] == Ratio(0, 0)


def test_a_turn_of_known_size_is_measured() -> None:
    true = random_poses(0)
    ours = true.copy()
    ours[3:, :3, :3] = true[3:, :3, :3] @ Rotation.from_euler("z", 7, degrees=True).as_matrix()
    scores = metrics.camera_scores(ours, true)
    assert scores["rotation_degrees"].value == pytest.approx(7 * 4 / 6)
    assert scores["rpe_rotation"].value == pytest.approx(7 / np.sqrt(6))


def test_relative_errors_of_translation_are_those_of_a_plain_rewrite() -> None:
    true, ours = random_poses(0), random_poses(0)
    ours[:, :3, 3] += np.random.default_rng(5).normal(0, 0.1, (7, 3))
    centres = [camera_centres(pose) for pose in (ours, true)]
    scale, rotation, shift = umeyama(*centres)
    aligned = [np.linalg.inv(pose) for pose in (ours, true)]
    aligned[0][:, :3, 3] = scale * centres[0] @ rotation.T + shift
    aligned[0][:, :3, :3] = rotation @ aligned[0][:, :3, :3]
    steps = []
    for frame in range(6):
        relative = [np.linalg.inv(pose[frame]) @ pose[frame + 1] for pose in aligned]
        steps.append(np.linalg.norm((np.linalg.inv(relative[1]) @ relative[0])[:3, 3]))
    scores = values(metrics.camera_scores(ours, true))
    assert scores["rpe_translation"] == pytest.approx(np.sqrt(np.mean(np.square(steps))))
    assert scores["ate"] == pytest.approx(np.sqrt(((aligned[0] - aligned[1])[:, :3, 3] ** 2).sum(-1).mean()))


def test_angles_are_exact_even_where_they_are_tiny() -> None:
    turns = Rotation.from_rotvec([[0, 0, 1e-7], [0.5, 0, 0], [0, np.pi, 0]]).as_matrix()
    np.testing.assert_allclose(rotation_angles(turns, np.eye(3)), np.degrees([1e-7, 0.5, np.pi]), rtol=1e-6)
    vectors = np.array([[1, 1e-7, 0], [0, 2, 0], [-3, 0, 0], [0, 0, 0]])
    np.testing.assert_allclose(vector_angles(vectors, np.array([[1.0, 0, 0]] * 4)), [np.degrees(1e-7), 90, 180, 90])


def test_the_angle_between_rays_is_the_arc_cosine() -> None:
    ours, true = (rays_from_poses(random_poses(seed), intrinsics(7), SIZE, GRID) for seed in (0, 1))
    cosine = (ours[..., :3] * true[..., :3]).sum(-1)
    np.testing.assert_allclose(ray_angles(ours, true), np.degrees(np.arccos(np.clip(cosine, -1, 1))), atol=1e-5)
    assert metrics.ray_scores(ours, true)["ray_degrees"].num == 7 * 6 * 8


def test_rays_flow_and_depth_of_the_test_worlds_agree() -> None:
    arrays = truth_arrays(1)
    np.testing.assert_allclose(poses_from_rays(arrays["camray"]), arrays["pose"], atol=1e-5)
    assert np.nanmin(arrays["depth"]) > 1
    assert 0.2 < np.nanmean(np.abs(arrays["flow"])) < 3


# Latents


def random_latents(seed: int, tokens: int = 40, channels: int = 12) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(2, tokens, channels)).astype(np.float32)


def test_perfect_latents_score_perfectly() -> None:
    scores = values(metrics.latent_scores(random_latents(0), random_latents(0)))
    perfect = {"cosine_tap1": 1, "relative_l2_tap1": 0, "cka_tap1": 1}
    assert scores == pytest.approx(perfect | {name.replace("1", "2"): value for name, value in perfect.items()})


def test_latents_agree_with_torchmetrics_and_closed_forms() -> None:
    ours, true = random_latents(0), random_latents(1)
    scores = values(metrics.latent_scores(ours, true))
    for tap in (0, 1):
        pair = torch.from_numpy(ours[tap]), torch.from_numpy(true[tap])
        assert scores[f"cosine_tap{tap + 1}"] == pytest.approx(
            float(reference.cosine_similarity(*pair, reduction="mean")), rel=1e-4
        )
        wanted = np.linalg.norm(ours[tap] - true[tap]) / np.linalg.norm(true[tap])
        assert scores[f"relative_l2_tap{tap + 1}"] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(("tokens", "channels"), [(40, 12), (12, 40)])
def test_cka_is_one_for_turned_and_scaled_features_and_equals_the_kernel_form(tokens: int, channels: int) -> None:
    x = random_latents(0, tokens, channels)[0].astype(float)
    turn, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(channels, channels)))
    assert metrics.linear_cka(x, 3 * x @ turn + 5) == pytest.approx(1)
    y = random_latents(1, tokens, channels)[0].astype(float) + x
    centre = np.eye(tokens) - 1 / tokens
    kernels = [centre @ z @ z.T @ centre for z in (x, y)]
    wanted = np.trace(kernels[0] @ kernels[1]) / np.linalg.norm(kernels[0]) / np.linalg.norm(kernels[1])
    assert metrics.linear_cka(x, y) == pytest.approx(wanted)


def test_silent_tokens_have_no_cosine() -> None:
    ours = random_latents(0)
    ours[0, :3] = 0
    assert metrics.latent_scores(ours, random_latents(0))["cosine_tap1"].num == 37


# Intervals


def test_intervals_are_those_of_scipy_for_a_mean() -> None:
    from scipy.stats import bootstrap

    sample = np.random.default_rng(0).gamma(2, size=80)
    low, high = metrics.bootstrap_intervals(sample[:, None], np.ones((80, 1)), seed=1, num_resamples=4000)
    theirs = bootstrap((sample,), np.mean, n_resamples=4000, method="percentile", rng=2).confidence_interval
    assert (low[0], high[0]) == pytest.approx((theirs.low, theirs.high), abs=0.03)


def test_intervals_pool_sums_and_numbers_follow_the_seed_and_need_two_clips() -> None:
    rng = np.random.default_rng(0)
    num = rng.integers(1, 9, (30, 3)).astype(float)
    num[:, 1] = 0
    num[1:, 2] = 0
    totals = num * 0.25
    low, high = metrics.bootstrap_intervals(totals, num, seed=0)
    assert (low[0], high[0]) == pytest.approx((0.25, 0.25))
    assert np.isnan([*low[1:], *high[1:]]).all()
    noisy = totals + rng.random(totals.shape)
    first, again, other = (metrics.bootstrap_intervals(noisy, num, seed=seed)[0][0] for seed in (0, 0, 1))
    assert first == again != other
