"""Training from frames that the cache keeps: the same pictures, the same flips, and no video."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from torch.utils.data import DataLoader

from p4dprep.cache import Cache
from p4dprep.corpus import write_manifest
from p4dprep.errors import RequestError
from p4dprep.video import Decoder
from student.conversations import Report
from student.data import collate
from student.order import SampleKey
from tests.cache_builder import SAMPLING, SIZE, build_cache
from tests.p4dprep.extract.builders import extract_here, make_request
from tests.student.test_data import Opened, frames_of, read, talk

pytestmark = pytest.mark.usefixtures("one_thread")

KEPT = (48, 40)


def keep_frames(folder: Path, size: str, **changes: Any) -> None:
    """What `p4dprep extract --teacher NAME=frames:SIZE` adds to the cache in a folder."""
    clips = Cache.open(str(folder / "cache")).clips().drop_columns(["index"])
    write_manifest(clips, str(folder / "clips.parquet"))
    extract_here(make_request(folder / "clips.parquet", folder / "cache", size, **changes))


def decoder_processes() -> set[int]:
    """Guarded decoders that run under this process and its workers."""
    children = psutil.Process().children(recursive=True)
    return {child.pid for child in children if "p4dprep._decoder" in child.cmdline()}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `folder`, with frames of 48 x 40 kept in the cache."""
    folder = tmp_path_factory.mktemp("kept")
    build_cache(folder, num_clips=4)
    keep_frames(folder, "frames:48x40")
    return folder


@pytest.fixture
def without_videos(kept: Path, tmp_path: Path) -> Iterator[Opened]:
    """Only the cache is left; the videos that it names are gone."""
    (kept / "videos").rename(kept / "hidden")
    opened = Opened(kept, tmp_path)
    yield opened
    opened.close()
    (kept / "hidden").rename(kept / "videos")


def test_reading_them_is_decoding_the_video_to_the_last_bit(kept: Path, tmp_path: Path) -> None:
    data = Opened(kept, tmp_path)([talk("0"), talk("1")])
    with Decoder() as decoder:
        for row in range(2):
            wanted = replace(SAMPLING, height=KEPT[0], width=KEPT[1])
            expected = decoder.read(kept / f"videos/{row}.mp4", wanted, 0.5 if row else None)
            item = read(data, row)
            np.testing.assert_array_equal(frames_of(item), expected.frames_thwc)
            np.testing.assert_array_equal(item.sample.time_seconds, expected.time_seconds_t)


def test_no_video_is_opened_and_no_decoder_started(without_videos: Opened) -> None:
    before = decoder_processes()
    by_default, by_size = without_videos([talk("1")]), without_videos([talk("1")], frame_size=KEPT)
    assert frames_of(read(by_default, 0)).shape == (4, *KEPT, 3)
    np.testing.assert_array_equal(frames_of(read(by_size, 0)), frames_of(read(by_default, 0)))
    data = without_videos(None, Report(on_problem="leave out"), media_folder=None)
    sampler = [[SampleKey(0, row) for row in range(3)]]
    ((samples, targets),) = DataLoader(data, batch_sampler=sampler, num_workers=1, collate_fn=collate)
    assert [sample.id for sample in samples] == list(targets.clip_ids) == ["clip-0", "clip-1", "clip-2"]
    assert decoder_processes() == before


def test_another_size_is_decoded_from_the_video(kept: Path, tmp_path: Path) -> None:
    data = Opened(kept, tmp_path)([talk("1")], frame_size=(SIZE, SIZE))
    with Decoder() as decoder:
        expected = decoder.read(kept / "videos/1.mp4", SAMPLING, 0.5)
    np.testing.assert_array_equal(frames_of(read(data, 0)), expected.frames_thwc)
    data.close()


def test_another_size_of_a_video_that_is_gone_stops_the_run(without_videos: Opened) -> None:
    with pytest.raises(RequestError, match=r"clip clip-1: .*mend it, or ask"):
        read(without_videos([talk("1")], frame_size=(SIZE, SIZE)), 0)


def test_they_are_mirrored_like_decoded_ones_and_like_any_target(kept: Path, tmp_path: Path) -> None:
    opened, seen = Opened(kept, tmp_path), set()
    both = {"targets": ("frames_frames",), "flip": True}
    data = opened(None, Report(on_problem="leave out"), **both)
    plain = frames_of(read(opened(None, Report(on_problem="leave out")), 1))
    for epoch in range(8):
        item = read(data, 1, epoch)
        np.testing.assert_array_equal(item.targets["frames_frames"], frames_of(item))
        is_flipped = not np.array_equal(frames_of(item), plain)
        np.testing.assert_array_equal(frames_of(item), plain[:, :, ::-1] if is_flipped else plain)
        seen.add(is_flipped)
    assert seen == {True, False}


def test_a_clip_without_them_stops_the_run_or_is_left_out(tmp_path: Path) -> None:
    build_cache(tmp_path, num_clips=3, num_failed=0)
    keep_frames(tmp_path, "frames:48x40", limit=2)
    opened, records = Opened(tmp_path, tmp_path), [talk("2"), talk("1")]
    with pytest.raises(RequestError, match="clip clip-2 lacks targets of frames; mend it, or ask"):
        opened(records)
    report = Report(on_problem="leave out")
    assert read(opened(records, report), 0).clip_id == "clip-1"
    assert dict(report.counts) == {"without targets": 1}
    keep_frames(tmp_path, "large=frames:64", limit=1)
    with pytest.raises(RequestError, match="keeps frames of 48x40, 64x64; say which with frame_size"):
        opened(records)
    assert frames_of(read(opened([talk("0")], frame_size=(64, 64)), 0)).shape == (4, 64, 64, 3)
