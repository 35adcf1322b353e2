"""A bad video costs one video: every crafted file and every mutant ends as frames or as a plain reason."""

import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from p4dprep.corpus import Sampling, discover
from p4dprep.errors import VideoError
from p4dprep.video import ClipFrames, DecodeLimits, Decoder, local_copy
from tests.videos import BAD_COUNT, decoded_times, mutants, video_bytes, with_rotation, write_bad_videos, write_video

SMALL = Sampling(num_frames=6, height=32, width=32)
LIMITS = DecodeLimits(timeout_seconds=20.0)
SEED = 20261120


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    with Decoder(LIMITS) as shared:
        yield shared


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_bad_videos(tmp_path_factory.mktemp("bad"))


def outcome(decoder: Decoder, path: Path) -> ClipFrames | VideoError:
    """The one state of a file, as a worker would find it."""
    try:
        with local_copy(str(path)) as video:
            return decoder.read(video.path, SMALL)
    except VideoError as error:
        return error


def test_each_of_sixty_bad_files_fails_with_a_reason_and_the_next_good_file_is_untouched(
    decoder: Decoder, bad: list[Path], tmp_path: Path
) -> None:
    good = write_video(tmp_path / "good.mp4")
    before = decoder.read(good, SMALL)
    pid = decoder.pid
    assert len(bad) == BAD_COUNT == 60
    for path in bad:
        began = time.monotonic()
        error = outcome(decoder, path)
        assert isinstance(error, VideoError), path.name
        assert time.monotonic() - began < LIMITS.timeout_seconds, path.name
        assert 10 < len(error.message) < 300, path.name
        assert "Error" not in error.message, path.name
        after = decoder.read(good, SMALL)
        assert after.frames_thwc.tobytes() == before.frames_thwc.tobytes(), path.name
    assert decoder.pid == pid, "no bad file may cost more than its own answer"


@pytest.mark.parametrize(
    ("name", "failure", "reason"),
    [
        ("empty.mp4", "empty_file", "is empty"),
        ("audio_only.mp4", "no_video_stream", "has no video stream, only audio"),
        ("text.mp4", "unknown_container", "is not a video"),
        ("hls.mp4", "refused_protocol", "is a playlist"),
        ("cut_60.mp4", "corrupt", r"index \(moov\) is missing"),
        ("16k.avi", "too_many_pixels", "is 16384x16384, over the limit"),
        ("mdat_noise.mp4", "no_frames", "not one frame decodes"),
        ("fifo.mp4", "unknown_container", "not a regular file"),
        ("loop.mp4", "not_found", "Too many levels of symbolic links"),
        ("sound.mp4", "unknown_container", "in a container other than"),
    ],
)
def test_a_reason_says_what_is_wrong(decoder: Decoder, bad: list[Path], name: str, failure: str, reason: str) -> None:
    path = next(path for path in bad if path.name == name)
    with pytest.raises(VideoError, match=reason) as caught:
        decoder.read(path, SMALL)
    assert caught.value.failure == failure


def test_a_folder_of_bad_files_is_discovered_whole(bad: list[Path]) -> None:
    assert discover(str(bad[0].parent)).num_rows == BAD_COUNT


def test_nothing_inside_a_file_is_opened_or_called(decoder: Decoder, tmp_path: Path) -> None:
    """Playlists whose segments are a canary video and a listener: neither is touched, whatever the file is called."""
    canary = write_video(tmp_path / "canary.mp4")
    connections: list[object] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=_accept, args=(server, connections), daemon=True).start()
        address = f"http://127.0.0.1:{server.getsockname()[1]}/x.mp4"
        for target in (address, f"file://{canary}", str(canary), "canary.mp4"):
            for suffix in (".mp4", ".mkv", ".m3u8", ".avi"):
                texts = [
                    f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{target}\n#EXT-X-ENDLIST\n",
                    f"ffconcat version 1.0\nfile '{target}'\n",
                    f'<?xml version="1.0"?>\n<MPD><Period><BaseURL>{target}</BaseURL></Period></MPD>',
                    f"# a comment first\n#EXTM3U\n#EXTINF:1,\n{target}\n",
                ]
                for text in texts:
                    path = tmp_path / f"list{suffix}"
                    path.write_text(text)
                    with pytest.raises(VideoError, match=r"playlist|not a video|container"):
                        decoder.read(path, SMALL)
        external = tmp_path / "external.mp4"
        external.write_bytes(_with_external_data(video_bytes()))
        result = outcome(decoder, external)
        assert isinstance(result, VideoError) or result.num_distinct_frames > 0
        assert decoder.pid is not None
        assert not psutil.Process(decoder.pid).net_connections()
        assert connections == []
        # The listener does work.
        socket.create_connection(server.getsockname()).close()
        _wait_for(connections)


def _accept(server: socket.socket, connections: list[object]) -> None:
    try:
        while True:
            connection, peer = server.accept()
            connection.close()
            connections.append(peer)
    except OSError:
        return


def _wait_for(found: list[object]) -> None:
    deadline = time.monotonic() + 10
    while not found:
        assert time.monotonic() < deadline


def _with_external_data(mp4: bytes) -> bytes:
    """The mp4 whose data reference asks for another file (its self-contained flag is cleared)."""
    at = mp4.index(b"url ", mp4.index(b"dref"))
    return mp4[: at + 4] + bytes(4) + mp4[at + 8 :]


def test_a_video_cut_anywhere_gives_a_clean_beginning_of_itself(decoder: Decoder, tmp_path: Path) -> None:
    """A container without an index at its end survives a cut: every frame it still gives is the whole file's."""
    for suffix in (".mkv", ".ts"):
        data = video_bytes(suffix)
        whole_path = tmp_path / f"whole{suffix}"
        whole_path.write_bytes(data)
        every = Sampling(num_frames=24, height=32, width=32)
        whole = decoder.read(whole_path, every)
        assert whole.num_distinct_frames == 24
        by_time = dict(zip(whole.time_seconds_t.tolist(), whole.frames_thwc, strict=True))
        counts = []
        for share in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98):
            path = tmp_path / f"cut{suffix}"
            path.write_bytes(data[: int(len(data) * share)])
            clip = decoder.read(path, every)
            counts.append(clip.num_distinct_frames)
            for seconds, frame in zip(clip.time_seconds_t.tolist(), clip.frames_thwc, strict=True):
                np.testing.assert_array_equal(frame, by_time[seconds], err_msg=f"{suffix} {share} {seconds}")
        assert counts == sorted(counts)
        assert counts[0] < 24


def test_headers_that_promise_more_frames_than_there_are_do_not_count(decoder: Decoder, tmp_path: Path) -> None:
    """The index of an mp4 lists 24 frames; the data of the later ones is gone."""
    data = write_video(tmp_path / "a.mp4").read_bytes()
    moov = data.index(b"moov") - 4
    mdat = data.index(b"mdat") - 4
    assert mdat < moov
    middle = (mdat + moov) // 2
    path = tmp_path / "promising.mp4"
    path.write_bytes(data[:middle] + bytes(moov - middle) + data[moov:])
    assert decoder.probe(path).num_frames_from_header == 24
    clip = decoder.read(path, Sampling(num_frames=24, height=32, width=32))
    assert 1 <= clip.num_distinct_frames < 24
    assert set(clip.time_seconds_t.tolist()) < set(decoded_times(tmp_path / "a.mp4"))


def test_one_damaged_group_costs_its_frames_only(decoder: Decoder, tmp_path: Path) -> None:
    data = bytearray(video_bytes(".mkv", num_frames=48, gop_size=12))
    clean, broken = tmp_path / "clean.mkv", tmp_path / "broken.mkv"
    clean.write_bytes(data)
    at = len(data) // 2
    data[at : at + 40] = random.Random(1).randbytes(40)
    broken.write_bytes(data)
    every = Sampling(num_frames=48, height=32, width=32)
    whole, rest = decoder.read(clean, every), decoder.read(broken, every)
    assert 12 <= rest.num_distinct_frames < 48
    by_time = dict(zip(whole.time_seconds_t.tolist(), whole.frames_thwc, strict=True))
    last = rest.time_seconds_t.tolist()[-1]
    np.testing.assert_array_equal(rest.frames_thwc[-1], by_time[last])


@pytest.mark.parametrize(("suffix", "codec"), [(".mp4", "libx264"), (".mkv", "libx264"), (".avi", "mpeg4")])
def test_mutants_end_as_frames_or_as_a_reason(decoder: Decoder, tmp_path: Path, suffix: str, codec: str) -> None:
    good = write_video(tmp_path / "good.mp4")
    before = decoder.read(good, SMALL)
    path = tmp_path / f"mutant{suffix}"
    outcomes = {"ok": 0, "failed": 0}
    for number, data in enumerate(mutants(video_bytes(suffix, codec=codec), 100, SEED)):
        path.write_bytes(data)
        began = time.monotonic()
        result = outcome(decoder, path)
        assert time.monotonic() - began < LIMITS.timeout_seconds, number
        outcomes["ok" if isinstance(result, ClipFrames) else "failed"] += 1
        if isinstance(result, VideoError):
            assert result.failure not in ("timeout", "out_of_memory", "decoder_crashed"), (number, result)
    assert min(outcomes.values()) > 0, outcomes
    assert decoder.read(good, SMALL).frames_thwc.tobytes() == before.frames_thwc.tobytes()
    assert psutil.Process(decoder.pid).memory_info().rss < 2**29


def test_the_crafted_rotation_is_what_a_player_sees(tmp_path: Path) -> None:
    """The tests' own helper: patching the display matrix changes nothing else."""
    data = video_bytes()
    assert len(with_rotation(data, 90)) == len(data)
    assert with_rotation(with_rotation(data, 90), 0) == data
