"""`p4dprep eval maps` and the library under it, on a small exact truth and predictions with known errors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from numpy.typing import NDArray
from typer.testing import CliRunner

from cli import eval as commands
from p4dprep.cache import Cache
from p4dprep.errors import MissingDataError, RequestError
from p4dprep.evaluate import Comparison, MapReport, Metric, evaluate_maps
from p4dprep.targets import TargetSpec
from p4dprep.video import Decoder
from tests.cache_builder import write_video
from tests.truth_cache import SAMPLING, Arrays, poses, spec, truth_arrays, truth_specs, write_cache

NUM_CLIPS = 6
CLIPS = {f"clip-{index}": truth_arrays(index) for index in range(NUM_CLIPS)}
FAR, SHIFT = 1.1, (3, 4)


def prediction(arrays: Arrays) -> Arrays:
    """Depth a tenth too far, flow 5 px off, motion right, rays of a camera that stands."""
    return {
        "depth": np.nan_to_num(arrays["depth"], nan=5) * np.float32(FAR),
        "disparity": 3 / np.nan_to_num(arrays["depth"], nan=5) - np.float32(0.2),
        "flow": arrays["flow"] + np.float32(SHIFT),
        "motion": np.where(arrays["motion"], 2, -2).astype(np.float32),
        "camray": np.repeat(arrays["camray"][:1], len(arrays["camray"]), axis=0),
        "latents": np.random.default_rng(0).normal(size=(2, 2, 4, 4, 8)).astype(np.float32),
    }


def predicted_specs(*names: str) -> tuple[TargetSpec, ...]:
    arrays = prediction(CLIPS["clip-0"])
    specs = {
        "depth": spec("depth", "metric depth", arrays["depth"]),
        "disparity": spec("disparity", "relative disparity", arrays["disparity"]),
        "flow": spec("flow", "backward flow", arrays["flow"], invalid_frames="first"),
        "motion": spec("motion", "motion logit", arrays["motion"]),
        "camray": spec("camray", "plücker rays", arrays["camray"], ("t", "ray_y", "ray_x", "pluecker")),
        "latents": spec("latents", "latents", arrays["latents"], ("tap", "tube", "token_y", "token_x", "channel")),
    }
    return tuple(specs[name] for name in names)


def predict(folder: Path, *names: str, clips: dict[str, Arrays] | None = None, **options: Any) -> Cache:
    arrays = {clip_id: prediction(truth) if truth else {} for clip_id, truth in (clips or CLIPS).items()}
    group = options.pop("group", "l4p")
    return write_cache(str(folder / "predicted"), group, predicted_specs(*names), arrays, **options)


def write_truth(folder: Path, **options: Any) -> Cache:
    clips = options.pop("clips", CLIPS)
    return write_cache(str(folder), "truth", truth_specs(CLIPS["clip-0"]), clips, **options)


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return write_truth(tmp_path_factory.mktemp("truth") / "cache")


@pytest.fixture(scope="module")
def predicted(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Predictions in the opposite order, and one clip that the truth lacks."""
    clips = dict(reversed(CLIPS.items())) | {"clip-x": CLIPS["clip-0"]}
    return predict(tmp_path_factory.mktemp("predicted"), "depth", "flow", "motion", "camray", clips=clips)


@pytest.fixture(scope="module")
def report(predicted: Cache, truth: Cache) -> MapReport:
    return evaluate_maps(predicted, truth)


def comparison(report: MapReport, kind: str) -> Comparison:
    return next(found for found in report.comparisons if found.kind == kind)


def metric(found: Comparison, name: str) -> Metric:
    return next(metric for metric in found.metrics if metric.name == name)


def run(*arguments: object, expect: int = 0) -> Result:
    result = CliRunner().invoke(commands.app, ["maps", *map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == expect, result.output
    return result


# What it says


def test_every_comparable_target_is_judged_on_the_shared_clips(report: MapReport) -> None:
    assert [found.kind for found in report.comparisons] == ["depth", "flow", "motion", "camera"]
    assert (report.num_shared, report.num_only_predicted, report.num_only_truth) == (NUM_CLIPS, 1, 0)
    assert [scores.clip_id for scores in comparison(report, "depth").clips] == list(reversed(CLIPS))
    assert report.skipped == ()


def test_known_errors_come_out_as_they_went_in(report: MapReport) -> None:
    depth, flow, motion = (comparison(report, kind) for kind in ("depth", "flow", "motion"))
    assert (depth.alignment, metric(depth, "abs_rel").value) == ("none", pytest.approx(FAR - 1, abs=2e-3))
    assert metric(depth, "delta1").value == 1
    assert metric(depth, "coverage").value == 1
    assert metric(flow, "epe").value == pytest.approx(5, abs=0.01)
    assert (metric(flow, "fl_all").value, metric(flow, "px1").value) == (1, 0)
    assert [metric(motion, name).value for name in ("j", "f", "j_moving")] == [1, 1, 1]
    for found in report.comparisons:
        for score in found.metrics:
            assert np.isnan(score.value) or score.low <= score.value + 1e-9 <= score.high + 2e-9, score


def test_baselines_know_the_truth_of_all_clips_and_no_single_one(report: MapReport) -> None:
    logs = np.concatenate([np.log(arrays["depth"][np.isfinite(arrays["depth"])]) for arrays in CLIPS.values()])
    assert report.depth_baseline == pytest.approx(np.exp(logs.mean()), rel=1e-3)
    errors = [np.nanmean(abs(report.depth_baseline / arrays["depth"] - 1)) for arrays in CLIPS.values()]
    abs_rel = metric(comparison(report, "depth"), "abs_rel").baselines
    assert abs_rel == {"mean depth": pytest.approx(np.mean(errors), rel=1e-2)}
    lengths = np.concatenate([np.linalg.norm(arrays["flow"][1:], axis=-1).ravel() for arrays in CLIPS.values()])
    epe = metric(comparison(report, "flow"), "epe").baselines
    assert epe == {"zero flow": pytest.approx(lengths.mean(), rel=1e-2)}
    j = metric(comparison(report, "motion"), "j").baselines
    assert j == {"all static": 0.5, "all moving": pytest.approx(0.5 / 16)}  # every second clip has the moving patch


def test_a_camera_that_stands_is_its_own_baseline_and_never_right_about_translation(report: MapReport) -> None:
    camera = comparison(report, "camera")
    for name in ("ate", "rotation_degrees", "ray_degrees", "translation_degrees", "auc15", "rotation_auc15"):
        score = metric(camera, name)
        assert score.value == pytest.approx(score.baselines["static camera"], rel=1e-3, abs=1e-3)
    assert metric(camera, "translation_auc30").value == 0
    turns = [np.degrees(np.arccos((np.trace(poses(index, 4)[1, :3, :3]) - 1) / 2)) for index in range(NUM_CLIPS)]
    assert metric(camera, "rotation_degrees").value == pytest.approx(2 * np.mean(turns), abs=1e-2)


def test_buckets_follow_true_motion_and_distance(report: MapReport) -> None:
    flow = comparison(report, "flow")
    assert [(b.axis, b.name) for b in flow.buckets][:5] == [
        ("true motion", "under 1 px"),
        ("true motion", "1 to 4 px"),
        ("true motion", "4 to 16 px"),
        ("true motion", "over 16 px"),
        ("true distance", "under 2 m"),
    ]
    motion = [bucket for bucket in flow.buckets if bucket.axis == "true motion"]
    lengths = np.concatenate([np.linalg.norm(arrays["flow"][1:], axis=-1).ravel() for arrays in CLIPS.values()])
    shares = np.histogram(lengths, [0, 1, 4, 16, 1e9])[0] / len(lengths)
    np.testing.assert_allclose([bucket.pixel_fraction for bucket in motion], shares, atol=0.02)
    for bucket in motion:
        epe = bucket.metrics[0]
        assert bucket.pixel_fraction == 0 or epe.value == pytest.approx(5, abs=0.02)
    distance = [bucket for bucket in comparison(report, "depth").buckets if bucket.axis == "true distance"]
    assert sum(bucket.pixel_fraction for bucket in distance) == pytest.approx(1)
    assert np.isnan(distance[-1].metrics[0].value)  # nothing is farther than 30 m


def test_occluded_and_visible_pixels_are_told_apart(tmp_path: Path, truth: Cache) -> None:
    arrays = {"clip-0": dict(prediction(CLIPS["clip-0"]))}
    hidden = ~CLIPS["clip-0"]["flow_visible"]
    hidden[0] = False
    assert hidden.any()
    arrays["clip-0"]["flow"] = CLIPS["clip-0"]["flow"] + np.float32([2, 0]) * hidden[..., None]
    found = evaluate_maps(write_cache(str(tmp_path), "l4p", predicted_specs("flow"), arrays), truth).comparisons[0]
    assert metric(found, "epe_visible").value == pytest.approx(0, abs=0.02)
    assert metric(found, "epe_occluded").value == pytest.approx(2, abs=0.02)


def test_the_worst_clips_come_first(tmp_path: Path, truth: Cache) -> None:
    arrays = {clip_id: prediction(true) for clip_id, true in CLIPS.items()}
    for step, clip_id in enumerate(("clip-2", "clip-4", "clip-1"), start=1):
        arrays[clip_id]["depth"] = arrays[clip_id]["depth"] * np.float32(1 + step)
    cache = write_cache(str(tmp_path), "l4p", predicted_specs("depth"), arrays)
    found = evaluate_maps(cache, truth, num_worst=3).comparisons[0]
    assert found.worst["abs_rel"] == ("clip-1", "clip-4", "clip-2")
    by_id = {scores.clip_id: scores.scores["abs_rel"] for scores in found.clips}
    assert by_id["clip-1"] == pytest.approx(3.4, abs=0.02)


def test_a_disparity_is_aligned_and_says_so(tmp_path: Path, truth: Cache) -> None:
    found = evaluate_maps(predict(tmp_path, "disparity"), truth).comparisons[0]
    assert found.alignment == "least squares scale and shift in disparity"
    assert metric(found, "abs_rel").value < 5e-3
    with pytest.raises(RequestError, match="has no zero"):
        evaluate_maps(predict(tmp_path, "disparity"), truth, alignment="none")


def test_an_alignment_that_was_asked_for_is_used(predicted: Cache, truth: Cache) -> None:
    found = comparison(evaluate_maps(predicted, truth, alignment="median scale"), "depth")
    assert metric(found, "abs_rel").value < 2e-3
    assert found.alignment == "median scale"


def test_frames_are_pooled_and_after_an_alignment_clips(tmp_path: Path) -> None:
    short = dict(CLIPS["clip-1"])
    short["depth"] = short["depth"].copy()
    short["depth"][1:] = np.nan
    clips = {"clip-0": CLIPS["clip-0"], "clip-1": short}
    noisy = {clip_id: prediction(truth) for clip_id, truth in clips.items()}
    noisy["clip-1"]["depth"][:, ::2] *= 3
    standard = write_truth(tmp_path / "truth", clips=clips)
    cache = write_cache(str(tmp_path / "predicted"), "l4p", predicted_specs("depth"), noisy)
    for alignment, weights in (("none", [4, 1]), ("median scale", [1, 1])):
        found = evaluate_maps(cache, standard, alignment=alignment).comparisons[0]
        values = [scores.scores["abs_rel"] for scores in found.clips]
        assert values[1] > 5 * values[0] + 0.1
        assert metric(found, "abs_rel").value == pytest.approx(np.average(values, weights=weights))


def test_rays_alone_make_a_truth_for_cameras(tmp_path: Path, predicted: Cache) -> None:
    specs = tuple(spec for spec in truth_specs(CLIPS["clip-0"]) if spec.name == "camray")
    rays_only = write_cache(str(tmp_path), "truth", specs, CLIPS)
    ours = comparison(evaluate_maps(predicted, rays_only), "camera")
    assert metric(ours, "auc30").baselines == {"static camera": 0}
    assert metric(ours, "rotation_degrees").value > 0.5


def test_latents_of_two_caches_are_compared_tap_by_tap(tmp_path: Path) -> None:
    first, second = (predict(tmp_path / name, "latents", group=name) for name in ("a", "b"))
    found = comparison(evaluate_maps(first, second), "latents")
    assert {score.name for score in found.metrics} == {
        f"{name}_tap{tap}" for name in ("cosine", "relative_l2", "cka") for tap in (1, 2)
    }
    assert metric(found, "cosine_tap2").value == pytest.approx(1)


def test_latents_of_another_encoder_judge_none_and_hinder_no_maps(tmp_path: Path) -> None:
    ours = predict(tmp_path / "ours", "depth", "latents")
    wider = np.random.default_rng(1).normal(size=(1, 2, 2, 2, 15)).astype(np.float32)
    clips = {name: arrays | {"latents": wider} for name, arrays in CLIPS.items() if arrays}
    specs = (spec("latents", "latents", wider, ("tap", "tube", "token_y", "token_x", "channel")),)
    oracle = write_cache(str(tmp_path / "truth"), "truth", (*truth_specs(CLIPS["clip-0"]), *specs), clips)
    assert {found.kind for found in evaluate_maps(ours, oracle).comparisons} == {"depth"}


def test_one_group_of_a_cache_is_judged_by_another(tmp_path: Path) -> None:
    cache = predict(tmp_path, "depth", group="a")
    predict(tmp_path, "depth", "flow", group="b")
    with pytest.raises(RequestError, match=r"has groups \('a', 'b'\); say which is right with --truth-group"):
        evaluate_maps(cache, cache)
    report = evaluate_maps(cache, cache, truth_group="a")
    assert [(found.group, found.target) for found in report.comparisons] == [("b", "depth")]
    assert metric(report.comparisons[0], "abs_rel").value == 0


# Which clips


def test_clips_that_are_missing_or_of_other_times_are_left_out_with_the_reason(tmp_path: Path) -> None:
    standard = write_truth(tmp_path / "truth", clips=CLIPS | {"clip-1": {}})
    cache = predict(
        tmp_path,
        "depth",
        clips=CLIPS | {"clip-2": {}, "clip-x": CLIPS["clip-0"]},
        times={"clip-3": np.arange(4) / 9},
    )
    report = evaluate_maps(cache, standard)
    reasons = {skipped.clip_id: (skipped.group, skipped.reason.split(":")[0]) for skipped in report.skipped}
    assert reasons == {
        "clip-1": ("", "the truth is not committed"),
        "clip-2": ("l4p", "the prediction is not committed"),
        "clip-3": ("l4p", "the frame times differ"),
    }
    assert [scores.clip_id for scores in report.comparisons[0].clips] == ["clip-0", "clip-4", "clip-5"]
    lines = run(cache.store.url, "--against", standard.store.url).stderr
    assert "left out 1 clips: l4p: the frame times differ" in lines
    assert "1 clips are only in the cache, 0 only in the truth" in lines


def test_a_limit_takes_the_first_clips(predicted: Cache, truth: Cache) -> None:
    calls: list[tuple[int, int]] = []
    report = evaluate_maps(predicted, truth, limit=2, on_progress=lambda done, total: calls.append((done, total)))
    assert [scores.clip_id for scores in report.comparisons[0].clips] == ["clip-5", "clip-4"]
    assert (report.num_shared, report.num_judged) == (NUM_CLIPS, 2)
    assert calls == [(done, NUM_CLIPS + 2) for done in range(1, NUM_CLIPS + 3)]


def test_the_answer_does_not_depend_on_the_number_of_threads(
    predicted: Cache, truth: Cache, report: MapReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    from p4dprep.evaluate import run as module

    monkeypatch.setattr(module, "NUM_THREADS", 1)
    again = evaluate_maps(predicted, truth)
    np.testing.assert_equal(
        [[score.value, score.low] for found in again.comparisons for score in found.metrics],
        [[score.value, score.low] for found in report.comparisons for score in found.metrics],
    )


# What is refused


def test_caches_without_a_shared_clip_are_refused(tmp_path: Path, truth: Cache) -> None:
    with pytest.raises(RequestError, match=r"\(1 clips\) .* \(6 clips\) share no clip id; make both caches"):
        evaluate_maps(predict(tmp_path, "depth", clips={"other": CLIPS["clip-0"]}), truth)


def test_caches_whose_every_clip_is_left_out_are_refused(tmp_path: Path, truth: Cache) -> None:
    cache = predict(tmp_path, "depth", clips={"clip-0": CLIPS["clip-0"]}, times={"clip-0": np.arange(4) / 9})
    with pytest.raises(RequestError, match="none can be compared: the frame times differ"):
        evaluate_maps(cache, truth)


def test_caches_without_comparable_targets_are_refused(tmp_path: Path, truth: Cache) -> None:
    with pytest.raises(RequestError, match=r"nothing to compare: .* has \['latents'\]"):
        evaluate_maps(predict(tmp_path, "latents"), truth)


def test_maps_of_another_size_are_refused_with_the_way_out(tmp_path: Path, truth: Cache) -> None:
    half: NDArray[np.float32] = prediction(CLIPS["clip-0"])["depth"][:, ::2, ::2]
    cache = write_cache(
        str(tmp_path), "small", (spec("depth", "metric depth", half),), {"clip-0": {"depth": half}}, sampling=SAMPLING
    )
    with pytest.raises(RequestError, match=r"small/depth is 4 x 16 x 16, truth/depth is 4 x 32 x 32; .* --size"):
        evaluate_maps(cache, truth)


def test_a_group_that_is_not_there_is_refused(predicted: Cache, truth: Cache) -> None:
    with pytest.raises(MissingDataError, match="has no group 'deep'"):
        evaluate_maps(predicted, truth, groups=["deep"])


# The command


def test_the_screen_holds_scores_intervals_baselines_and_buckets(predicted: Cache, truth: Cache) -> None:
    lines = run(predicted.store.url, "--against", truth.store.url).stdout.splitlines()
    text = "\n".join(lines)
    assert "l4p/depth by truth/depth (metric depth, 6 clips, alignment: none)" in text
    assert "mean depth 0." in text
    assert "all static 0.500, all moving 0.031" in text
    assert any(line.startswith("  epe by true motion: under 1 px 5.0") for line in lines)
    assert len(lines) <= 40


def test_json_has_every_clip_and_every_score(predicted: Cache, truth: Cache, report: MapReport) -> None:
    parsed = json.loads(run(predicted.store.url, "--against", truth.store.url, "--json").stdout)
    depth = parsed["comparisons"][0]
    assert depth["alignment"] == "none"
    assert depth["clips"][0]["clip_id"] == "clip-5"
    assert depth["clips"][0]["scores"]["abs_rel"] == pytest.approx(0.1, abs=2e-3)
    assert set(depth["clips"][0]["baselines"]) == {"mean depth"}
    assert len(depth["metrics"]) == len(report.comparisons[0].metrics)
    assert [score["low"] for score in depth["metrics"]] == [score.low for score in report.comparisons[0].metrics]


def test_the_page_draws_the_worst_clips_with_their_frames_and_nothing_from_outside(
    tmp_path: Path, truth: Cache
) -> None:
    video, page = tmp_path / "video.mp4", tmp_path / "pages" / "worst.html"
    write_video(video, 0)
    with Decoder() as decoder:
        times = decoder.read(video, SAMPLING).time_seconds_t
    standard = write_truth(tmp_path / "truth", times={"clip-0": times})
    names = ("depth", "flow", "motion", "camray")
    cache = predict(tmp_path, *names, times={"clip-0": times}, uris={"clip-0": str(video)})
    result = run(cache.store.url, "--against", standard.store.url, "--limit", 2, "--worst", 1, "--page", page)
    assert f"worst clips: {page}" in result.stderr
    html = page.read_text()
    assert html.count("<article") >= 4
    assert "l4p/flow: among the worst by" in html
    assert "drawn without its frames" in html  # clip-1 has no video, and clip-0 is drawn with its own
    assert html.count("drawn without its frames") < html.count("<article")
    assert 'src="http' not in html


def test_pictures_of_each_kind_share_a_scale_and_show_the_error(tmp_path: Path, predicted: Cache, truth: Cache) -> None:
    from p4dprep.evaluate import read_pair
    from p4dprep.evaluate.pictures import pair_rows

    latents = [predict(tmp_path / name, "latents", group=name) for name in ("a", "b")]
    for ours, true, counts in ((predicted, truth, [3, 3, 3, 3]), (*latents, [2])):
        report = evaluate_maps(ours, true, limit=1)
        for found, count in zip(report.comparisons, counts, strict=True):
            pair = read_pair(ours, true, report, found, found.clips[0].clip_id)
            rows = pair_rows(pair, title="ours", truth_title="truth")
            assert len(rows) == count, found.kind
            assert rows[0].rgb_thwc.shape == rows[1].rgb_thwc.shape
            if found.kind == "motion":
                np.testing.assert_array_equal(rows[0].rgb_thwc, rows[1].rgb_thwc)
                assert not rows[2].rgb_thwc[..., :2].any()
            if found.kind == "depth":
                assert pair.error_thw is not None
                assert np.nanmean(pair.error_thw) == pytest.approx(0.1, abs=2e-3)
