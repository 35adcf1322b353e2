"""Pictures of predicted against cached maps: one scale for both, the same bytes again, nothing drawn that is not so."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from p4dprep.pictures import RGB, Row, depth_rgb, latents_rgb
from p4dprep.targets import Quantity, TargetSpec
from student import pictures
from tests.student.p4d_cache import CAMRAY, DEPTH, DISPARITY, FLOW, GRID, LATENTS, MASK, MOTION, SIZE, T, values_of

SPECS = {
    "l4p_depth": DEPTH,
    "l4p_flow": FLOW,
    "l4p_motion": MOTION,
    "l4p_camray": CAMRAY,
    "any_depth": DISPARITY,
    "truth_motion": MASK,
    "l4p_latents": LATENTS,
}
FRAMES = np.random.default_rng(5).integers(0, 256, (T, SIZE, SIZE, 3), np.uint8)
Arrays = dict[str, NDArray[Any]]


def cached_arrays() -> Arrays:
    return {name: values_of(spec, 0) for name, spec in SPECS.items()}


def predicted_arrays(seed: int = 1) -> Arrays:
    """As heads give them: with a channel axis, finite, logits for the mask."""
    random = np.random.default_rng(seed)
    arrays: Arrays = {}
    for name, spec in SPECS.items():
        shape = spec.shape if len(spec.shape) > 3 else (*spec.shape, 1)
        arrays[name] = np.exp(0.3 * random.standard_normal(shape)).astype(np.float32)
    return arrays


def write(path: Path, predicted: Arrays, cached: Arrays | None = None) -> bytes:
    pictures.write_maps(
        path,
        frames_thwc=FRAMES,
        time_seconds_t=np.arange(T, dtype=np.float64),
        cached=cached_arrays() if cached is None else cached,
        predicted=predicted,
        specs=SPECS,
        title="step 1",
    )
    return path.read_bytes()


def pair(spec: TargetSpec, ours: NDArray[Any], true: NDArray[Any]) -> list[Row]:
    values = (np.asarray(array, np.float32).reshape(spec.shape) for array in (ours, true))
    return pictures._pair(f"group_{spec.name}", spec, *values, FRAMES)


def test_the_same_input_gives_the_same_bytes_and_another_prediction_gives_others(tmp_path: Path) -> None:
    once, again = (write(tmp_path / name / "a.webp", predicted_arrays()) for name in ("x", "y"))
    assert once == again
    for name in SPECS:
        changed = predicted_arrays()
        changed[name] = -changed[name] if name not in ("l4p_depth",) else 1 / changed[name]
        assert write(tmp_path / "b.webp", changed) != once, name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.webp", "x", "y"]


def test_the_picture_has_a_row_of_frames_and_two_of_every_map_that_is_predicted(tmp_path: Path) -> None:
    def height(names: tuple[str, ...]) -> int:
        path = tmp_path / "a.webp"
        write(path, {name: predicted_arrays()[name] for name in names})
        with Image.open(path) as image:
            assert image.format == "WEBP"
            return image.height

    frames, one, two = height(()), height(("l4p_depth",)), height(("l4p_depth", "l4p_flow"))
    assert one - frames == two - one > 2 * 100
    assert height(("l4p_latents",)) - frames == 2 * (one - frames)


@pytest.mark.parametrize("name", ["l4p_depth", "l4p_flow", "l4p_motion", "l4p_camray", "l4p_latents", "any_depth"])
def test_a_perfect_prediction_looks_exactly_like_the_cached_map(name: str) -> None:
    true = values_of(SPECS[name], 0)
    rows = pair(SPECS[name], true, true)
    assert len(rows) in (2, 4)
    for cached, predicted in zip(rows[::2], rows[1::2], strict=True):
        assert cached.title.endswith(" cached")
        assert (cached.starts_group, predicted.starts_group) == (True, False)
        assert predicted.title == cached.title.removesuffix("cached") + "predicted"
        assert np.array_equal(cached.rgb_thwc, predicted.rgb_thwc)


@pytest.mark.parametrize("factor", [0.01, 100.0])
@pytest.mark.parametrize("spec", [FLOW, CAMRAY, DEPTH])
def test_a_prediction_of_another_size_moves_no_colour_of_the_cached_map(spec: TargetSpec, factor: float) -> None:
    true = values_of(spec, 0)
    alone, beside = pair(spec, true, true)[::2], pair(spec, factor * true, true)[::2]
    assert [row.rgb_thwc.tobytes() for row in alone] == [row.rgb_thwc.tobytes() for row in beside]
    assert [row.caption for row in alone] == [row.caption for row in beside]


def test_a_colour_means_the_same_metres_in_both_rows() -> None:
    true = np.broadcast_to(np.linspace(1, 9, SIZE, dtype=np.float32), DEPTH.shape)
    cached, predicted = pair(DEPTH, np.full(DEPTH.shape, true[0, 0, 3]), true)
    assert (predicted.rgb_thwc == cached.rgb_thwc[0, 0, 3]).all()
    far = pair(DEPTH, np.full(DEPTH.shape, 500), true)[1]
    assert (far.rgb_thwc == cached.rgb_thwc[0, 0, -1]).all()
    assert far.caption == "same colours; its own depths are 500 to 500 m"
    assert not np.array_equal(predicted.rgb_thwc, depth_rgb(np.full(DEPTH.shape, 2.0), quantity="metric depth")[0])


def test_a_relative_map_is_fitted_frame_by_frame_and_its_label_says_so() -> None:
    true = values_of(DISPARITY, 0)
    scales, shifts = (np.array(some).reshape(T, 1, 1) for some in ([2, 0.1, 5, 40], [7, -3, 0, 90]))
    cached, predicted = pair(DISPARITY, scales * true + shifts, true)
    assert np.abs(cached.rgb_thwc.astype(int) - predicted.rgb_thwc).max() <= 1
    assert predicted.caption == "same colours, each frame fitted in scale and shift"
    inverted = pair(DISPARITY, -true, true)[1].rgb_thwc
    assert np.abs(cached.rgb_thwc.astype(int) - inverted).mean() > 40


def test_a_fitted_relative_depth_behind_the_camera_is_drawn_as_near_not_as_missing() -> None:
    quantity: Quantity = "relative depth"
    spec = replace(DISPARITY, quantity=quantity)
    true = values_of(DISPARITY, 0) + 1
    ours = true.copy()
    ours[:, 0, 0] = -1000
    predicted = pair(spec, ours, true)[1].rgb_thwc
    assert np.ptp(predicted[:, 0, 0].astype(int), axis=-1).min() > 100


def test_a_predicted_mask_is_a_logit() -> None:
    mask = np.zeros(MASK.shape, bool)
    mask[:, :4] = True
    cached, predicted = pair(MASK, np.where(mask, 30, -30), mask)
    assert np.array_equal(cached.rgb_thwc, predicted.rgb_thwc)
    assert "moves: 50.0%" in cached.caption
    assert "moves: 50.0%" in predicted.caption


def test_frames_without_a_target_are_hatched_in_both_rows_and_nothing_else_is() -> None:
    rows = pair(FLOW, np.ones(FLOW.shape), values_of(FLOW, 0))
    for row in rows:
        is_grey = np.ptp(row.rgb_thwc.astype(int), axis=-1) == 0
        assert is_grey[0].all()
        assert not is_grey[1:].any()


def test_what_a_diverged_student_predicts_is_missing_and_not_an_error(tmp_path: Path) -> None:
    for value in (np.nan, np.inf):
        lost = {name: np.full_like(array, value) for name, array in predicted_arrays().items()}
        write(tmp_path / "a.webp", lost)
        row: RGB = pair(DEPTH, lost["l4p_depth"], values_of(DEPTH, 0))[1].rgb_thwc
        assert (np.ptp(row.astype(int), axis=-1) == 0).all()
    partly = np.full(DEPTH.shape, 3, np.float32)
    partly[:, :4] = np.inf
    assert pair(DEPTH, partly, values_of(DEPTH, 0))[1].caption == "same colours; its own depths are 3 to 3 m"


def test_of_latents_the_first_and_last_layer_are_shown_in_the_cached_axes() -> None:
    spec = replace(LATENTS, shape=(3, *LATENTS.shape[1:]))
    true, ours = (np.random.default_rng(seed).standard_normal(spec.shape).astype(np.float32) for seed in (0, 1))
    rows = pair(spec, ours, true)
    assert [row.title for row in rows[::2]] == ["group/latents tap 1/3 cached", "group/latents tap 3/3 cached"]
    assert np.array_equal(rows[3].rgb_thwc, latents_rgb(ours[-1], like=true[-1]))
    assert not np.array_equal(rows[3].rgb_thwc, latents_rgb(ours[-1]))
    assert rows[0].rgb_thwc.shape == (T // 2, GRID, GRID, 3)


def test_a_prediction_that_fits_no_cached_map_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"l4p_pose is predicted, but only \['any_depth', .*\] are cached"):
        write(tmp_path / "a.webp", {"l4p_pose": np.zeros(3)})
    with pytest.raises(ValueError, match=r"l4p_depth: predicted \(4, 8, 4\), cached \(4, 8, 8\), declared \(4, 8, 8\)"):
        write(tmp_path / "a.webp", {"l4p_depth": np.ones((4, 8, 4))})
    assert not list(tmp_path.iterdir())
