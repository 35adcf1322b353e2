"""The worker without Ray: what it commits, what it reports, and that short queues bound what it holds."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from p4dprep import registry
from p4dprep.cache import Cache
from p4dprep.errors import FingerprintMismatchError, TeacherError
from p4dprep.extract import make_plan
from p4dprep.extract.worker import UnitTask, Worker, WorkerConfig
from tests.faulty_teachers import BadOutput
from tests.p4dprep.extract.builders import data_digests, make_request, write_corpus

pytestmark = pytest.mark.usefixtures("stranger")

NUM_CLIPS = 3


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_corpus(tmp_path_factory.mktemp("videos"), NUM_CLIPS, num_frames=8)
    (folder / "text.mp4").write_text("not a video, though it is named like one")
    return folder


def planned(videos: Path, cache: Path, teacher: str) -> tuple[WorkerConfig, UnitTask]:
    """A worker's config, and one task with all clips."""
    plan = make_plan(make_request(videos, cache, teacher))
    tasks = list(plan.tasks(plan.groups[0]))
    assert [task.unit for task in tasks] == list(range(NUM_CLIPS + 1))
    return plan.groups[0].on(0).config, replace(tasks[0], clips=tuple(clip for task in tasks for clip in task.clips))


def run_units(config: WorkerConfig, task: UnitTask) -> tuple[set[int], dict[int, tuple[str, str]]]:
    worker = Worker(config)
    try:
        reports = [worker.run(replace(task, unit=clip.index, clips=(clip,))) for clip in task.clips]
    finally:
        worker.close()
    failed = {index: why for report in reports for index, why in report.failed.items()}
    return {index for report in reports for index in report.ok}, failed


def test_good_clips_are_committed_and_the_bad_one_has_its_reason(videos: Path, tmp_path: Path) -> None:
    config, task = planned(videos, tmp_path / "cache", "brightness")
    ok, failed = run_units(config, task)
    assert ok == {0, 1, 2}
    assert failed[3][0] == "unknown_container"
    states = Cache.open(config.cache_url).group("brightness").states()
    assert states.ok.tolist() == [True, True, True, False]
    assert states.reasons == failed


def test_committed_times_are_those_of_the_frames_that_were_seen(videos: Path, tmp_path: Path) -> None:
    config, task = planned(videos, tmp_path / "cache", "brightness")
    run_units(config, task)
    times = Cache.open(config.cache_url).group("brightness").read_time(0)
    np.testing.assert_allclose(times, np.array([0, 2, 5, 7]) / 25, atol=1e-9)


def test_one_bad_clip_of_a_batch_does_not_change_its_neighbours(videos: Path, tmp_path: Path) -> None:
    for name, teacher in (("good", "brightness"), ("mixed", "brightness=raises")):
        config, task = planned(videos, tmp_path / name, teacher)
        clips = [
            replace(clip, id=f"bad {clip.id}" if (name, clip.index) == ("mixed", 1) else clip.id) for clip in task.clips
        ]
        _, failed = run_units(config, replace(task, clips=tuple(clips)))
        assert (1 in failed) == (name == "mixed")
    good, mixed = (Cache.open(str(tmp_path / name)).group("brightness") for name in ("good", "mixed"))
    for index in (0, 2):
        np.testing.assert_array_equal(good.read(index, "depth"), mixed.read(index, "depth"))


@pytest.mark.parametrize(
    "teacher", ["other-clips", *(f"bad-output?fault={fault}" for fault in sorted(BadOutput.FAULTS))]
)
def test_no_bad_output_is_committed(videos: Path, tmp_path: Path, teacher: str) -> None:
    config, task = planned(videos, tmp_path / "cache", teacher)
    ok, failed = run_units(config, replace(task, clips=task.clips[:2]))
    assert not ok
    assert {index: kind for index, (kind, _) in failed.items()} == {0: "bad_output", 1: "bad_output"}
    assert data_digests(tmp_path / "cache") == {}


def test_a_worker_with_other_weights_than_the_cache_refuses_to_start(videos: Path, tmp_path: Path) -> None:
    config, _ = planned(videos, tmp_path / "cache", "brightness")
    other = replace(config, teacher=registry.parse_teacher("brightness?offset=3"))
    with pytest.raises(FingerprintMismatchError, match=r"differs from the cache's in teacher\.offset"):
        Worker(other)


def test_a_teacher_that_is_set_up_wrong_says_so(videos: Path, tmp_path: Path) -> None:
    config, _ = planned(videos, tmp_path / "cache", "fails-in-setup")
    with pytest.raises(RuntimeError, match="weights went missing"):
        Worker(config)


def test_nothing_of_a_unit_is_committed_when_faults_stop_the_job(videos: Path, tmp_path: Path) -> None:
    config, task = planned(videos, tmp_path / "cache", "raises")
    bad = tuple(replace(task.clips[0], id="bad") for _ in range(9))
    worker = Worker(config)
    try:
        with pytest.raises(TeacherError, match="8 clips in a row failed for no reason of their own"):
            worker.run(replace(task, clips=bad))
    finally:
        worker.close()
    assert not Cache.open(config.cache_url).group("raises").states().failed.any()
