"""The maps of a trained student: predicted as in training, judged on the very clips that its teacher is judged on."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from benchmarks.probe_latents import read_latents
from cli.app import app
from p4dprep.cache import Cache
from p4dprep.errors import FingerprintMismatchError, RequestError
from p4dprep.evaluate import Comparison, evaluate_maps
from student.backbones import load
from student.conversations import Report
from student.data import DataConfig, TrainingData
from student.distilled import Collate
from student.maps import StudentMaps, judge_maps
from student.order import SampleKey
from student.run_folder import last_checkpoint, read_settings
from student.train import build_model, train
from student.train_config import parse_config
from tests.student import p4d_cache
from tests.student.p4d_cache import CAMRAY, DEPTH, FLOW, LATENTS, MASK
from tests.student.train_run import FRAMES, request, write_world

TRUTH = {"truth": (DEPTH, FLOW, MASK, CAMRAY)}
NUM_SHARED = 4


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`world` of 5 clips, of which 3 are talked about; `run`, trained on it; `truth` of 4 of its clips."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("made")
    world = write_world(folder / "world")
    talks = json.loads((world / "qa.json").read_text())
    (world / "qa.json").write_text(json.dumps([talk for talk in talks if talk["id"] not in ("q-3", "q-4")]))
    train(parse_config(request(world, folder / "run", max_steps=2, picture_steps=0)))
    p4d_cache.build(folder / "truth", TRUTH, num_clips=NUM_SHARED)
    yield folder
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def judged(made: Path) -> StudentMaps:
    return judge_maps(made / "run", Cache.open(str(made / "truth" / "cache")), made / "judged")


def comparison(maps: StudentMaps, group: str, target: str) -> Comparison:
    return next(each for each in maps.report.comparisons if (each.group, each.target) == (group, target))


def test_the_maps_are_those_of_the_trained_model_clip_by_clip(made: Path, judged: StudentMaps) -> None:
    config = parse_config(read_settings(made / "run"))
    cache = Cache.open(config.cache)
    backbone = load(config.student, dtype=torch.float32)
    model = build_model(config, cache, backbone).eval()
    weights = {f"student.{name}": values for name, values in load_file(_weights(made, "student")).items()}
    missing, unexpected = model.load_state_dict(weights | load_file(_weights(made, "p4d")), strict=False)
    assert not unexpected
    assert not [name for name, values in model.named_parameters() if values.requires_grad and name in missing]
    data = TrainingData(cache, None, DataConfig(), Report())
    for row in range(NUM_SHARED):
        with torch.no_grad():
            wanted = model.predict(Collate(backbone.adapter, "tpe")([data[SampleKey(0, row)]])).maps
        depth, flow, motion = (
            judged.cache.read(f"clip-{row}", f"student_{name}") for name in ("depth", "flow", "motion")
        )
        np.testing.assert_allclose(depth, wanted["l4p_depth"][0, ..., 0].numpy(), rtol=2e-3)
        np.testing.assert_allclose(flow[1:], wanted["l4p_flow"][0, 1:].numpy(), atol=1 / 128 + 1e-6)
        assert np.isnan(flow[0]).all()
        np.testing.assert_allclose(motion, wanted["l4p_motion"][0, ..., 0].numpy(), atol=0.1)


def _weights(made: Path, name: str) -> Path:
    return last_checkpoint(made / "run") / f"{name}.safetensors"


def test_the_teacher_is_judged_beside_it_with_the_scores_of_its_own_cache(made: Path, judged: StudentMaps) -> None:
    truth = Cache.open(str(made / "truth" / "cache"))
    alone = evaluate_maps(Cache.open(str(made / "world" / "cache")), truth)
    for each in alone.comparisons:
        ours = comparison(judged, "l4p", each.target)
        assert ours.metrics == each.metrics
        assert [clip.clip_id for clip in ours.clips] == [f"clip-{number}" for number in range(NUM_SHARED)]
    student, teacher = (
        next(each for each in comparison(judged, group, "depth").metrics if each.name == "abs_rel")
        for group in ("student", "l4p")
    )
    assert student.value > teacher.value == 0  # the truth holds the teacher's very depths
    assert student.baselines == teacher.baselines


def test_a_student_that_learnt_from_kept_features_sees_clips_that_have_frames_only(
    made: Path, judged: StudentMaps, tmp_path: Path
) -> None:
    run = _changed(made, tmp_path, features="student_features")  # an array that these clips lack
    found = judge_maps(run, Cache.open(str(made / "truth" / "cache")), tmp_path / "judged")
    assert comparison(found, "student", "depth").metrics == comparison(judged, "student", "depth").metrics


def test_clips_are_counted_by_what_is_shared_and_by_what_was_trained_on(made: Path, judged: StudentMaps) -> None:
    report = judged.report
    assert (report.num_shared, report.num_only_predicted, report.num_only_truth) == (NUM_SHARED, 1, 0)
    assert judged.num_trained == 3
    assert judged.novelty == "the student was trained on 3 of the 4 clips"
    assert report.predicted == str(made / "run")


def test_what_the_student_was_trained_on_is_not_guessed_where_its_conversations_are_gone(
    made: Path, tmp_path: Path
) -> None:
    run = _changed(made, tmp_path, qa=[str(tmp_path / "gone.json")])
    found = judge_maps(run, Cache.open(str(made / "truth" / "cache")), tmp_path / "judged", limit=1)
    assert found.num_trained is None
    assert "not known" in found.novelty
    assert found.report.num_judged == 1


def _changed(made: Path, folder: Path, **settings: Any) -> Path:
    """The run with other settings."""
    shutil.copytree(made / "run", folder / "run")
    path = folder / "run" / "config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | settings))
    return folder / "run"


def test_latents_are_judged_where_the_truth_has_some_and_it_is_not_judged_by_itself(made: Path, tmp_path: Path) -> None:
    taught = Cache.open(str(made / "world" / "cache"))
    found = judge_maps(made / "run", taught, tmp_path / "judged", truth_group="l4p", limit=2)
    assert {each.group for each in found.report.comparisons} == {"student"}
    latents = comparison(found, "student", LATENTS.name)
    assert "cosine_tap1" in {metric.name for metric in latents.metrics}
    assert len(latents.clips) == 2


def test_what_a_student_says_of_latents_can_be_probed_for_the_truth(made: Path, tmp_path: Path) -> None:
    true = replace(LATENTS, shape=(1, *LATENTS.shape[1:3], 1, LATENTS.shape[-1]))  # a cell is a row of the student's
    truth = p4d_cache.build(tmp_path, {"truth": (true, DEPTH), "frames": (FRAMES,)}, num_clips=NUM_SHARED)
    features, told = read_latents(str(made / "run"), "", truth.store.url)
    assert told[2, 1].tolist() == truth.read("clip-2", "truth_latents")[0, 0, 1, 0].tolist()
    said = judge_maps(made / "run", truth, tmp_path / "judged", cache=truth.store.url).cache
    mine_kxc = said.read("clip-2", "student_latents")[:, 0, 1]
    place = np.eye(told.shape[1])[1]
    np.testing.assert_allclose(features[2, 1], [*mine_kxc.mean(axis=1).ravel(), *place], rtol=1e-4)


def test_latents_of_the_students_own_cells_are_nobodys_to_compare_with(made: Path, tmp_path: Path) -> None:
    told = {"distill_cells": (1, 1), "heads": "light", "balance_motion": True, "decoder_positions": True}
    targets = ["l4p_latents", "l4p_depth", "l4p_motion"]
    train(parse_config(request(made / "world", tmp_path / "run", max_steps=1, save_steps=1, targets=targets, **told)))
    assert list((tmp_path / "run" / "pictures").glob("*.webp"))
    taught = Cache.open(str(made / "world" / "cache"))
    found = judge_maps(tmp_path / "run", taught, tmp_path / "judged", truth_group="l4p", limit=1)
    assert {each.target for each in found.report.comparisons} == {"depth", "motion"}


def test_clips_without_targets_are_left_out_with_their_reason(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "world" / "cache", tmp_path / "cache")
    for record in (tmp_path / "cache" / "ledger" / "l4p").glob("00000001.*"):
        record.unlink()  # of clips 2 and 3
    run = _changed(made, tmp_path, cache=str(tmp_path / "cache"))
    found = judge_maps(run, Cache.open(str(made / "truth" / "cache")), tmp_path / "judged")
    assert [(each.clip_id, each.reason) for each in found.report.skipped] == [
        (f"clip-{number}", "its frames or the teacher's maps are not committed") for number in (2, 3)
    ]
    for group in ("student", "l4p"):
        assert [clip.clip_id for clip in comparison(found, group, "depth").clips] == ["clip-0", "clip-1"]
    assert sorted(found.rows) == ["clip-0", "clip-1"]


def test_a_run_that_distilled_nothing_predicts_no_maps(made: Path, tmp_path: Path) -> None:
    run = _changed(made, tmp_path, distill="sft")
    with pytest.raises(RequestError, match="distill sft and strategy p4d: its student predicts no maps"):
        judge_maps(run, Cache.open(str(made / "truth" / "cache")), tmp_path / "judged")


def test_the_heads_of_another_teacher_are_refused(made: Path, tmp_path: Path) -> None:
    other = write_world(tmp_path / "other", seed=1)
    run = _changed(made, tmp_path, cache=str(other / "cache"))
    with pytest.raises(FingerprintMismatchError, match=r"group l4p of .* is not the one that .*run was trained from"):
        judge_maps(run, Cache.open(str(made / "truth" / "cache")), tmp_path / "judged")


def test_frames_of_another_size_are_refused(made: Path, tmp_path: Path) -> None:
    shown = Cache.create(str(tmp_path / "shown"), replace(p4d_cache.SAMPLING, height=16), clips_per_unit=2)
    with pytest.raises(RequestError, match=r"height=16.*extract both with the same --frames and --size"):
        judge_maps(made / "run", Cache.open(str(made / "truth" / "cache")), tmp_path / "judged", cache=shown.store.url)


def test_a_run_stands_in_place_of_a_cache_on_the_command_line(made: Path, tmp_path: Path) -> None:
    truth = str(made / "truth" / "cache")
    page = tmp_path / "worst.html"
    told = CliRunner().invoke(
        app, ["eval", "maps", str(made / "run"), "--against", truth, "--limit", "1", "--json", "--page", str(page)]
    )
    assert told.exit_code == 0, told.output
    report = json.loads(told.stdout)
    assert {each["group"] for each in report["comparisons"]} == {"student", "l4p"}
    assert "the student was trained on 1 of the 1 clips" in told.stderr
    assert page.read_text().count("student/depth") > 1


def test_clips_are_a_runs_option_only(made: Path) -> None:
    truth = str(made / "truth" / "cache")
    told = CliRunner().invoke(app, ["eval", "maps", truth, "--against", truth, "--clips", truth])
    assert isinstance(told.exception, RequestError)
    assert "is no run of p4dprep train" in str(told.exception)
