"""The Ray job: what is computed, what is not, and what one bad clip or worker costs. Real Ray, real videos."""

import contextlib
import shutil
import socket
from pathlib import Path

import numpy as np
import psutil
import pytest

from p4dprep import cache as caches
from p4dprep.cache import Cache
from p4dprep.errors import FingerprintMismatchError, P4DError, RequestError, TeacherError
from p4dprep.extract import GroupProgress, extract, job
from p4dprep.extract.job import _check_reachable
from tests.p4dprep.extract.builders import data_digests, make_request, write_corpus

pytestmark = pytest.mark.usefixtures("stranger", "ray_cluster")

NUM_CLIPS = 10


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("videos"), NUM_CLIPS)


@pytest.fixture(scope="module")
def undisturbed(videos: Path, tmp_path_factory: pytest.TempPathFactory, stranger: None, ray_cluster: None) -> Path:
    """A finished cache of `brightness`."""
    cache = tmp_path_factory.mktemp("undisturbed") / "cache"
    report = extract(make_request(videos, cache, "brightness"))
    assert (report.clips, report.committed, report.failed, report.skipped) == (NUM_CLIPS, NUM_CLIPS, 0, 0)
    return cache


@pytest.fixture
def copy_of_undisturbed(undisturbed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(undisturbed, tmp_path / "cache"))


def test_a_local_ray_listens_on_loopback_only() -> None:
    names, listeners = "", set()
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):  # it may end while we look, or have ended unreaped
            names += " ".join(process.cmdline())
            for connection in process.net_connections(kind="inet"):
                if connection.status == psutil.CONN_LISTEN:
                    listeners.add(connection.laddr.ip)
    assert "raylet" in names
    assert listeners
    assert {address.removeprefix("::ffff:") for address in listeners} == {"127.0.0.1"}


def verified(cache: Path) -> Cache:
    opened = Cache.open(str(cache))
    assert caches.verify(opened).problems == ()
    return opened


def test_every_clip_is_committed_with_its_own_values(undisturbed: Path) -> None:
    cache = verified(undisturbed)
    depths = [cache.group("brightness").read(index, "depth") for index in range(NUM_CLIPS)]
    assert len({depth.tobytes() for depth in depths}) == NUM_CLIPS
    assert all(1 < depth.mean() < 2 for depth in depths)


def test_the_same_request_again_computes_nothing(videos: Path, copy_of_undisturbed: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in copy_of_undisturbed.rglob("*") if path.is_file()}
    report = extract(make_request(videos, copy_of_undisturbed, "brightness"))
    assert (report.committed, report.skipped, report.frames_per_second) == (0, NUM_CLIPS, 0.0)
    written = {
        path
        for path in copy_of_undisturbed.rglob("*")
        if path.is_file() and path.stat().st_mtime_ns != before.get(path)
    }
    assert {path.name for path in written} <= {"zarr.json"}


def test_another_teacher_on_the_same_cache_runs_alone(videos: Path, copy_of_undisturbed: Path) -> None:
    before = data_digests(copy_of_undisturbed)
    report = extract(make_request(videos, copy_of_undisturbed, "brightness", "opencv-dis"))
    assert {name: group.committed for name, group in report.teachers.items()} == {
        "brightness": 0,
        "opencv_dis": NUM_CLIPS,
    }
    assert report.committed == NUM_CLIPS
    assert data_digests(copy_of_undisturbed).items() >= before.items()
    assert verified(copy_of_undisturbed).groups() == ("brightness", "opencv_dis")


def test_a_teacher_that_is_done_leaves_its_share_to_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    videos, cache, shares = write_corpus(tmp_path / "videos", 18), tmp_path / "cache", set()
    monkeypatch.setattr(job.ray, "cluster_resources", lambda: {"CPU": 1.0})  # two of such workers

    def note(groups: list[GroupProgress]) -> None:
        shares.add(tuple(group.num_workers for group in groups))

    report = extract(make_request(videos, cache, "slow?milliseconds=200", "brightness"), note)
    assert shares == {(1, 1), (2, 1)}
    assert (report.teachers["slow"].workers, report.committed, report.failed) == (2, 18, 0)
    verified(cache)


def test_another_fingerprint_under_the_same_name_is_refused_and_named(videos: Path, copy_of_undisturbed: Path) -> None:
    with pytest.raises(FingerprintMismatchError, match=r"teacher\.offset"):
        extract(make_request(videos, copy_of_undisturbed, "brightness?offset=2"))
    report = extract(make_request(videos, copy_of_undisturbed, "other=brightness?offset=2", limit=2))
    assert report.committed == 2


def test_another_sampling_is_refused(videos: Path, copy_of_undisturbed: Path) -> None:
    with pytest.raises(FingerprintMismatchError, match="num_frames"):
        extract(make_request(videos, copy_of_undisturbed, "brightness", frames=8))


def test_a_corpus_that_grew_costs_only_the_new_clips(videos: Path, copy_of_undisturbed: Path, tmp_path: Path) -> None:
    grown = Path(shutil.copytree(videos, tmp_path / "grown"))
    shutil.copy(videos / "clip_00.mp4", grown / "aaa_sorts_first.mp4")
    before = data_digests(copy_of_undisturbed)
    report = extract(make_request(grown, copy_of_undisturbed, "brightness"))
    assert (report.clips, report.committed, report.skipped) == (NUM_CLIPS + 1, 1, NUM_CLIPS)
    assert data_digests(copy_of_undisturbed).items() >= before.items()


def test_limit_takes_the_first_clips_and_the_rest_later(videos: Path, undisturbed: Path, tmp_path: Path) -> None:
    assert extract(make_request(videos, tmp_path / "cache", "brightness", limit=3)).clips == 3
    rest = extract(make_request(videos, tmp_path / "cache", "brightness"))
    assert (rest.committed, rest.skipped) == (NUM_CLIPS - 3, 3)
    assert sorted(data_digests(tmp_path / "cache").values()) == sorted(data_digests(undisturbed).values())


def test_a_broken_video_fails_alone_and_is_retried_on_request(videos: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(videos, tmp_path / "videos"))
    whole = (source / "clip_04.mp4").read_bytes()
    (source / "clip_04.mp4").write_bytes(whole[: len(whole) // 3][:200])
    first = extract(make_request(source, tmp_path / "cache", "brightness"))
    assert (first.committed, first.failed, first.coverage) == (NUM_CLIPS - 1, 1, 1 - 1 / NUM_CLIPS)
    assert [(failure.clip, failure.teacher) for failure in first.failures] == [("clip_04.mp4", "brightness")]
    (source / "clip_04.mp4").write_bytes(whole)
    before = data_digests(tmp_path / "cache")
    again = extract(make_request(source, tmp_path / "cache", "brightness"))
    assert (again.committed, again.failed) == (0, 1)
    retried = extract(make_request(source, tmp_path / "cache", "brightness", retry_failed=True))
    assert (retried.committed, retried.failed, retried.skipped, retried.coverage) == (1, 0, NUM_CLIPS - 1, 1.0)
    assert data_digests(tmp_path / "cache").items() >= before.items()
    verified(tmp_path / "cache")


@pytest.fixture
def one_bad(videos: Path, tmp_path: Path) -> Path:
    source = Path(shutil.copytree(videos, tmp_path / "videos"))
    (source / "clip_03.mp4").rename(source / "clip_03_bad.mp4")
    return source


@pytest.mark.parametrize(("kind", "failure"), [("raises", "teacher_raised"), ("kills", "worker_died")])
def test_a_clip_that_breaks_the_teacher_costs_only_itself(
    one_bad: Path, tmp_path: Path, undisturbed: Path, kind: str, failure: str
) -> None:
    report = extract(make_request(one_bad, tmp_path / "cache", f"brightness={kind}", workers=1))
    assert (report.committed, report.failed, report.missing) == (NUM_CLIPS - 1, 1, 0)
    assert [(found.clip, found.failure) for found in report.failures] == [("clip_03_bad.mp4", failure)]
    neighbours = set(data_digests(tmp_path / "cache").values())
    assert neighbours < set(data_digests(undisturbed).values())
    verified(tmp_path / "cache")


def test_no_bad_output_is_committed_or_passed_over_in_silence(videos: Path, tmp_path: Path) -> None:
    """Each way of being bad: tests of the worker."""
    report = extract(make_request(videos, tmp_path / "cache", "bad-output?fault=one_nan", limit=2))
    assert (report.committed, report.failures_by_kind) == (0, {"bad_output": 2})
    assert data_digests(tmp_path / "cache") == {}


@pytest.mark.parametrize(
    ("kind", "message"),
    [("dies-in-setup", "died 3 times in a row while loading"), ("fails-in-setup", "weights went missing")],
)
def test_a_teacher_that_cannot_start_ends_the_job_with_its_reason(
    videos: Path, tmp_path: Path, kind: str, message: str
) -> None:
    with pytest.raises(TeacherError, match=message):
        extract(make_request(videos, tmp_path / "cache", kind))


def test_a_teacher_that_always_raises_stops_the_job_and_fails_no_clip(videos: Path, tmp_path: Path) -> None:
    source = tmp_path / "bad"
    source.mkdir()
    for path in videos.iterdir():
        shutil.copy(path, source / f"bad_{path.name}")
    with pytest.raises(TeacherError, match=r"8 clips in a row failed.*too bad"):
        extract(make_request(source, tmp_path / "cache", "raises", workers=1))
    assert len(Cache.open(str(tmp_path / "cache")).group("raises").states().reasons) < NUM_CLIPS


def test_a_source_that_changed_between_teachers_is_refused(videos: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(videos, tmp_path / "videos"))
    extract(make_request(source, tmp_path / "cache", "brightness", limit=3))
    shutil.copy(source / "clip_05.mp4", source / "clip_01.mp4")
    report = extract(make_request(source, tmp_path / "cache", "opencv-dis", limit=3))
    assert [(found.clip, found.failure) for found in report.failures] == [("clip_01.mp4", "source_changed")]


def test_windows_become_clips_of_their_own(videos: Path, tmp_path: Path) -> None:
    report = extract(make_request(videos / "clip_00.mp4", tmp_path / "cache", "brightness", fps=12.5, stride=2))
    cache = verified(tmp_path / "cache")
    assert report.committed == report.clips == cache.num_clips > 1
    starts = [cache.group("brightness").read_time(index)[0] for index in range(report.clips)]
    np.testing.assert_allclose(np.diff(starts), 2 / 12.5, atol=1e-9)


def test_progress_ends_with_every_clip_counted(videos: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def show(groups: list[GroupProgress]) -> None:
        seen.append((groups[0].num_ok + groups[0].num_failed, groups[0].num_todo))

    extract(make_request(videos, tmp_path / "cache", "brightness", limit=4), show)
    assert seen == sorted(seen)
    assert seen[-1] == (4, 4)


@pytest.mark.parametrize(
    ("teachers", "changes", "message"),
    [
        (("no-such-teacher",), {}, "no teacher of kind"),
        (("brightness", "brightness"), {}, "two teachers are named brightness"),
        (("brightness",), {"workers": {"l4p": 2}}, "workers names l4p"),
        (("brightness",), {"gpus": 1}, "asks for 1 GPU"),
    ],
)
def test_a_wrong_request_is_said_before_anything_is_computed(
    videos: Path, tmp_path: Path, teachers: tuple[str, ...], changes: dict[str, object], message: str
) -> None:
    with pytest.raises(P4DError, match=message):
        extract(make_request(videos, tmp_path / "cache", *teachers, **changes))
    assert not (tmp_path / "cache").exists() or data_digests(tmp_path / "cache") == {}


def test_a_source_that_is_not_there_is_a_wrong_request(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="nowhere"):
        extract(make_request(tmp_path / "nowhere", tmp_path / "cache", "brightness"))
    assert not (tmp_path / "cache").exists()


def test_an_address_where_nothing_listens_is_refused_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
        with pytest.raises(RequestError, match=f"cannot join Ray at {address}: nothing answers there"):
            _check_reachable(address)
    _check_reachable("auto")
