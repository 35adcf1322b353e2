"""Frames kept in the cache: bit by bit what the decoder gives, at their own size and by the cache's clock."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from p4dprep import cache as caches
from p4dprep.cache import Cache
from p4dprep.corpus import Sampling
from p4dprep.errors import FingerprintMismatchError, RequestError
from p4dprep.extract import make_plan
from p4dprep.extract.frames import KeptFrames
from p4dprep.registry import parse_teacher
from p4dprep.targets import FrameGeometry
from p4dprep.video import ClipFrames, Decoder
from tests.p4dprep.extract.builders import data_digests, extract_here, make_request, write_corpus

pytestmark = pytest.mark.usefixtures("stranger")

NUM_CLIPS = 3
KEPT = (40, 56)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("videos"), NUM_CLIPS, num_frames=8)


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    with Decoder() as decoder:
        yield decoder


def decoded(decoder: Decoder, video: Path, sampling: Sampling, size: tuple[int, int] = KEPT) -> ClipFrames:
    return decoder.read(video, replace(sampling, height=size[0], width=size[1]))


@pytest.mark.parametrize("resize", ["squash", "pad"])
def test_kept_frames_are_bit_by_bit_what_decoding_the_video_gives(
    videos: Path, tmp_path: Path, decoder: Decoder, resize: str
) -> None:
    extract_here(make_request(videos, tmp_path / "cache", "brightness", keep_frames=KEPT, resize=resize))
    cache = Cache.open(str(tmp_path / "cache"))
    frames, brightness = cache.group("frames"), cache.group("brightness")
    assert cache.sampling.height == 32  # the teachers' size is another
    for index in range(NUM_CLIPS):
        expected = decoded(decoder, videos / f"clip_{index:02d}.mp4", cache.sampling)
        kept = frames.read(index, "frames", verify=True)
        assert kept.dtype == np.uint8
        np.testing.assert_array_equal(kept, expected.frames_thwc)
        np.testing.assert_array_equal(frames.read_time(index), expected.time_seconds_t)
        np.testing.assert_array_equal(brightness.read_time(index), expected.time_seconds_t)
    assert caches.verify(cache).ok


def test_a_real_clip_is_kept_bit_by_bit(shared_videos: Path, tmp_path: Path, decoder: Decoder) -> None:
    video = shared_videos / "fire2.mp4"  # rotated, of variable frame rate
    extract_here(make_request(video, tmp_path / "cache", keep_frames=112))
    cache = Cache.open(str(tmp_path / "cache"))
    expected = decoded(decoder, video, cache.sampling, (112, 112))
    np.testing.assert_array_equal(cache.read("fire2.mp4", "frames_frames"), expected.frames_thwc)


def test_xarray_reads_kept_frames_as_they_are(videos: Path, tmp_path: Path) -> None:
    extract_here(make_request(videos, tmp_path / "cache", keep_frames=KEPT))
    kept = Cache.open(str(tmp_path / "cache")).read(1, "frames_frames")
    with xr.open_zarr(str(tmp_path / "cache")) as opened:
        assert opened["frames_frames"].dims == ("clip", "t", "frames_y", "frames_x", "frames_rgb")
        np.testing.assert_array_equal(opened["frames_frames"][1], kept)


def test_frames_added_later_leave_what_is_there_alone_and_resume(videos: Path, tmp_path: Path) -> None:
    place = tmp_path / "cache"
    extract_here(make_request(videos, place, "brightness"))
    before = data_digests(place)
    first = extract_here(make_request(videos, place, keep_frames=KEPT, limit=1))
    assert [report.ok for report in first["frames"]] == [(0,)]
    rest = extract_here(make_request(videos, place, "brightness", keep_frames=KEPT))
    assert rest["brightness"] == []
    assert sorted(index for report in rest["frames"] for index in report.ok) == [1, 2]
    assert data_digests(place).items() > before.items()
    assert extract_here(make_request(videos, place, keep_frames=KEPT)) == {"frames": []}


def test_another_video_under_the_same_id_is_refused_when_frames_are_added(videos: Path, tmp_path: Path) -> None:
    video, place = tmp_path / "video.mp4", tmp_path / "cache"
    shutil.copy(videos / "clip_00.mp4", video)
    extract_here(make_request(video, place, "brightness"))
    shutil.copy(videos / "clip_01.mp4", video)
    (report,) = extract_here(make_request(video, place, keep_frames=KEPT))["frames"]
    assert report.failed[0][0] == "source_changed"
    shutil.copy(videos / "clip_00.mp4", video)
    assert extract_here(make_request(video, place, keep_frames=KEPT)) == {"frames": []}
    (report,) = extract_here(make_request(video, place, keep_frames=KEPT, retry_failed=True))["frames"]
    assert report.ok == (0,)


def test_another_size_needs_another_name(videos: Path, tmp_path: Path) -> None:
    extract_here(make_request(videos, tmp_path / "cache", keep_frames=KEPT, limit=1))
    with pytest.raises(FingerprintMismatchError, match=r"teacher\.size is 40x56 .*64x64 now.*NEWNAME=frames:64x64"):
        make_plan(make_request(videos, tmp_path / "cache", keep_frames=64))
    extract_here(make_request(videos, tmp_path / "cache", "large=frames:64", limit=1))
    cache = Cache.open(str(tmp_path / "cache"))
    assert [cache.read(0, name).shape for name in ("frames_frames", "large_frames")] == [
        (4, *KEPT, 3),
        (4, 64, 64, 3),
    ]


def test_what_is_asked_for_all_teachers_is_not_meant_for_frames(videos: Path, tmp_path: Path) -> None:
    changes = {"keep_frames": KEPT, "gpus": 1, "batch_size": 8}
    plan = make_plan(make_request(videos, tmp_path / "cache", "brightness", **changes))
    resources = {group.config.group: group.config.resources for group in plan.groups}
    assert (resources["brightness"].num_gpus, resources["brightness"].batch_size) == (1, 8)
    assert (resources["frames"].num_gpus, resources["frames"].batch_size) == (0, 1)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("frames", "size '' is not 224 or HEIGHTxWIDTH"),
        ("frames:9", "size '9' is not .* between 16 and 4096"),
        ("frames:9999x64", "size '9999x64' is not .* between 16 and 4096"),
        ("frames:64?quality=9", "'frames' has no option 'quality'"),
    ],
)
def test_what_is_no_size_of_frames_is_refused(videos: Path, tmp_path: Path, teacher: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        make_plan(make_request(videos, tmp_path / "cache", teacher))
    assert not (tmp_path / "cache").exists()


def test_clips_that_no_decoder_could_hold_are_refused_before_any_work() -> None:
    spec = parse_teacher("frames:4096")
    with pytest.raises(RequestError, match="64 frames of 4096x4096 take 3221225472 bytes a clip, over 1073741824"):
        KeptFrames.from_spec(spec.argument, spec.options).targets(FrameGeometry(num_frames=64, height=224, width=224))
