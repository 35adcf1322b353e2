import hashlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import psutil
import pytest

from p4dprep.corpus import Sampling, discover
from p4dprep.errors import RequestError, VideoError
from p4dprep.video import ClipFrames, DecodeLimits, Decoder, decoder_version, local_copy
from tests.videos import decoded_times, scene, write_video

REAL = Path(__file__).parents[2].parent / "shared" / "videos"
SMALL = Sampling(num_frames=5, height=48, width=64)
WINDOWS = Sampling(plan="windows", num_frames=4, fps=8.0, stride_frames=2, height=48, width=64)
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="the real clips are not on this machine")


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    with Decoder() as shared:
        yield shared


def indices(clip: ClipFrames) -> list[int]:
    """Which frame of `scene` each one is, told by its grey."""
    grey = clip.frames_thwc[:, -12:-4, 4:20].mean(axis=(1, 2, 3))
    return [round((float(value) - 20) / 4) for value in grey]


def test_uniform_takes_evenly_spaced_frames_with_their_own_times(decoder: Decoder, tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", num_frames=24)
    clip = decoder.read(path, SMALL)
    assert clip.frames_thwc.shape == (5, 48, 64, 3)
    assert indices(clip) == [0, 6, 12, 17, 23]
    times = decoded_times(path)
    assert clip.time_seconds_t.tolist() == [times[index] for index in (0, 6, 12, 17, 23)]
    assert clip.num_distinct_frames == 5


def test_variable_rates_and_late_starts_keep_the_files_own_clock(decoder: Decoder, tmp_path: Path) -> None:
    pts = [700, 710, 750, 1000, 1001, 1500]
    path = write_video(tmp_path / "vfr.mkv", num_frames=6, pts=pts, time_base=Fraction(1, 1000))
    clip = decoder.read(path, Sampling(num_frames=6, height=48, width=64))
    assert clip.time_seconds_t.tolist() == [tick / 1000 for tick in pts]
    assert indices(clip) == [0, 1, 2, 3, 4, 5]
    assert decoder.time_span(path)[0] == 0.7
    windows = Sampling(plan="windows", num_frames=3, fps=10.0, stride_frames=3, height=48, width=64)
    assert indices(decoder.read(path, windows)) == [0, 2, 2]  # 0.7, 0.8, 0.9 s
    assert indices(decoder.read(path, windows, start_seconds=0.0)) == [0, 2, 2]
    assert indices(decoder.read(path, windows, start_seconds=0.95)) == [2, 4, 4]


def test_a_short_clip_repeats_frames_and_says_so(decoder: Decoder, tmp_path: Path) -> None:
    clip = decoder.read(write_video(tmp_path / "a.mp4", num_frames=2), SMALL)
    assert indices(clip) == [0, 0, 0, 1, 1]
    assert clip.num_distinct_frames == 2


def test_ranges_are_half_open(decoder: Decoder, tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", num_frames=24)
    clip = decoder.read(path, SMALL, start_seconds=6 / 24, end_seconds=11 / 24)
    assert indices(clip) == [6, 7, 8, 9, 10]
    with pytest.raises(VideoError, match=r"shows no frame within \[5 s, the end\)") as caught:
        decoder.read(path, SMALL, start_seconds=5.0)
    assert caught.value.failure == "empty_range"


def test_windows_show_the_frame_on_display_and_refuse_what_is_too_short(decoder: Decoder, tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", num_frames=24)
    assert indices(decoder.read(path, WINDOWS, start_seconds=0.25)) == [6, 9, 12, 15]
    assert indices(decoder.read(path, WINDOWS, start_seconds=0.30)) == [7, 10, 13, 16]
    with pytest.raises(VideoError, match=r"has 0\.250 s .* needs more than 0\.375 s") as caught:
        decoder.read(path, WINDOWS, start_seconds=0.75)
    assert caught.value.failure == "too_short"


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts", ".avi"])
def test_many_ranges_give_what_single_reads_give(decoder: Decoder, tmp_path: Path, suffix: str) -> None:
    codec = "mpeg4" if suffix == ".avi" else "libx264"
    path = write_video(tmp_path / f"a{suffix}", num_frames=60, codec=codec, gop_size=7, seed=3)
    first = decoder.time_span(path)[0]
    ranges = [(first + step / 8, None) for step in (0, 2, 4, 13, 3, 40)]
    clips = decoder.read_many(path, WINDOWS, ranges)
    for (start, end), clip in zip(ranges[:-1], clips[:-1], strict=True):
        with Decoder() as alone:
            single = alone.read(path, WINDOWS, start, end)
        assert isinstance(clip, ClipFrames)
        np.testing.assert_array_equal(clip.frames_thwc, single.frames_thwc)
        np.testing.assert_array_equal(clip.time_seconds_t, single.time_seconds_t)
    assert isinstance(clips[-1], VideoError)


@pytest.mark.parametrize("options", [{}, {"x264-params": "open-gop=1:bframes=3:b-pyramid=normal"}])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_seeking_gives_the_same_pixels_as_decoding_everything(
    decoder: Decoder, tmp_path: Path, suffix: str, options: dict[str, str]
) -> None:
    path = write_video(tmp_path / f"a{suffix}", num_frames=50, gop_size=10, options=options, seed=1)
    every = decoder.read(path, Sampling(num_frames=50, height=48, width=64))
    assert every.num_distinct_frames == 50
    assert every.time_seconds_t.tolist() == decoded_times(path)
    few = decoder.read(path, Sampling(num_frames=3, height=48, width=64))
    np.testing.assert_array_equal(few.frames_thwc, every.frames_thwc[[0, 24, 49]])


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_rotated_videos_come_out_upright(decoder: Decoder, tmp_path: Path, degrees: int) -> None:
    path = write_video(tmp_path / "a.mp4", width=128, height=96, rotation_degrees=degrees)
    clip = decoder.read(path, Sampling(num_frames=2, height=60, width=80))
    red = clip.frames_thwc[0].astype(int)
    is_red = (red[..., 0] - red[..., 1]) > 80
    quarters = np.array(
        [[is_red[:30, :40].mean(), is_red[:30, 40:].mean()], [is_red[30:, :40].mean(), is_red[30:, 40:].mean()]]
    )
    expected = np.rot90(np.array([[1, 0], [0, 0]]), degrees // 90)
    np.testing.assert_allclose(quarters, expected, atol=0.1)
    assert decoder.probe(path).rotation_degrees % 360 == degrees


def test_padding_keeps_the_shape_of_the_upright_picture(decoder: Decoder, tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", width=128, height=64, rotation_degrees=90)
    clip = decoder.read(path, Sampling(num_frames=1, height=80, width=80, resize="pad"))
    lit = clip.frames_thwc[0].max(axis=2) > 8
    assert lit[:, 21:59].all()
    assert not lit[:, :19].any()
    assert not lit[:, 61:].any()


@pytest.mark.parametrize(("width", "height"), [(2, 2), (34, 18), (129, 97), (1280, 16)])
def test_odd_and_tiny_sizes_become_frames(decoder: Decoder, tmp_path: Path, width: int, height: int) -> None:
    pix_fmt = "yuv444p" if width % 2 else "yuv420p"
    path = write_video(tmp_path / "a.mkv", width=width, height=height, pix_fmt=pix_fmt, num_frames=3)
    assert decoder.read(path, SMALL).num_distinct_frames == 3


def test_scaling_keeps_colours(decoder: Decoder, tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", width=640, height=480, num_frames=1)
    for sampling in (Sampling(num_frames=1), Sampling(num_frames=1, height=600, width=800)):
        frame = decoder.read(path, sampling).frames_thwc[0]
        height, width = frame.shape[:2]
        np.testing.assert_allclose(frame[height // 4, width // 4], scene(0, 64, 64)[16, 16], atol=6)
        np.testing.assert_allclose(frame[height * 3 // 4, width // 4], scene(0, 64, 64)[48, 16], atol=3)


def test_the_first_of_several_video_streams_is_read(decoder: Decoder, tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", num_video_streams=2, has_audio=True)
    assert indices(decoder.read(path, SMALL)) == [0, 6, 12, 17, 23]


def test_ten_bit_video_becomes_eight_bit_frames(decoder: Decoder, tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", pix_fmt="yuv420p10le")
    assert indices(decoder.read(path, SMALL)) == [0, 6, 12, 17, 23]


def test_a_probe_tells_what_the_header_says(decoder: Decoder, tmp_path: Path) -> None:
    probe = decoder.probe(write_video(tmp_path / "a.mp4"))
    assert (probe.width, probe.height, probe.num_frames_from_header, probe.codec) == (128, 96, 24, "h264")
    assert probe.duration_seconds_from_header == pytest.approx(1.0, abs=0.01)
    assert probe.average_fps_from_header == 24.0
    assert "mp4" in probe.container


@needs_real
def test_real_clips_keep_the_times_of_a_plain_decoding(decoder: Decoder) -> None:
    for uri in discover(str(REAL)).column("uri").to_pylist():
        times = np.array(decoded_times(uri))
        clip = decoder.read(uri, Sampling(height=32, width=32))
        chosen = np.linspace(0, len(times) - 1, 16).round().astype(int)
        assert clip.time_seconds_t.tolist() == times[chosen].tolist()


@needs_real
def test_the_real_variable_rate_clip_gives_all_its_times(decoder: Decoder) -> None:
    clip = decoder.read(REAL / "fire2.mp4", Sampling(num_frames=25, height=32, width=32))
    assert clip.time_seconds_t.tolist() == decoded_times(REAL / "fire2.mp4")
    assert len(set(np.diff(clip.time_seconds_t).round(6))) > 1
    assert decoder.probe(REAL / "fire2.mp4").rotation_degrees in (-180, 180)


def test_a_killed_child_costs_nothing_when_idle_and_is_replaced(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4")
    with Decoder() as decoder:
        before = decoder.read(path, SMALL)
        assert decoder.pid is not None
        first = decoder.pid
        os.kill(first, signal.SIGKILL)
        after = decoder.read(path, SMALL)
        assert decoder.pid != first
    np.testing.assert_array_equal(before.frames_thwc, after.frames_thwc)


@pytest.mark.parametrize("num_kills", [1, 2])
def test_a_child_killed_over_its_first_video_is_replaced_once(tmp_path: Path, num_kills: int) -> None:
    path, killed = write_video(tmp_path / "a.mp4"), set[int]()
    with Decoder() as decoder, ThreadPoolExecutor(1) as pool:
        reading = pool.submit(decoder.read, path, SMALL)
        while not reading.done():
            time.sleep(0.001)
            if len(killed) < num_kills and (pid := decoder.pid) and pid not in killed:
                time.sleep(0.02)  # it was asked, and is still importing
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
        assert len(killed) == num_kills
        if num_kills == 1:
            assert indices(reading.result()) == [0, 6, 12, 17, 23]
        else:
            with pytest.raises(VideoError, match="signal 9") as caught:
                reading.result()
            assert caught.value.failure == "decoder_crashed"
        assert indices(decoder.read(path, SMALL)) == [0, 6, 12, 17, 23]


def test_a_decoder_that_hangs_is_killed_in_time_and_replaced(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4")
    with Decoder(DecodeLimits(timeout_seconds=0.5)) as decoder:
        decoder.read(path, SMALL)
        assert decoder.pid is not None
        os.kill(decoder.pid, signal.SIGSTOP)
        with pytest.raises(VideoError, match=r"was not decoded within 0\.5 s") as caught:
            decoder.read(path, SMALL)
        assert caught.value.failure == "timeout"
        assert decoder.pid is None
        assert decoder.read(path, SMALL).num_distinct_frames == 5


def test_the_child_has_limits_and_no_secrets_and_no_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary")
    monkeypatch.setenv("HF_TOKEN", "canary")
    with Decoder() as decoder:
        decoder.probe(write_video(tmp_path / "a.mp4"))
        child = psutil.Process(decoder.pid)
        assert "canary" not in " ".join(child.environ().values())
        assert child.rlimit(psutil.RLIMIT_AS)[1] == decoder.limits.memory_bytes
        assert child.rlimit(psutil.RLIMIT_FSIZE) == (0, 0)
        assert child.rlimit(psutil.RLIMIT_CORE) == (0, 0)
        assert not any("torch" in mapped.path for mapped in child.memory_maps())
    assert not child.is_running()


def test_lack_of_memory_fails_one_video(tmp_path: Path) -> None:
    big = write_video(tmp_path / "big.mkv", width=4096, height=4096, num_frames=8, options={"preset": "ultrafast"})
    good = write_video(tmp_path / "good.mp4")
    with Decoder(DecodeLimits(memory_bytes=2**28)) as decoder:
        before = decoder.read(good, SMALL)
        with pytest.raises(VideoError, match="needs more memory") as caught:
            decoder.read(big, SMALL)
        assert caught.value.failure == "out_of_memory"
        np.testing.assert_array_equal(decoder.read(good, SMALL).frames_thwc, before.frames_thwc)


def test_limits_on_pixels_and_bytes_are_kept(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", width=128, height=96)
    with Decoder(DecodeLimits(max_pixels=100 * 96)) as decoder, pytest.raises(VideoError, match="is 128x96, over"):
        decoder.read(path, SMALL)
    with (
        Decoder(DecodeLimits(max_source_bytes=100)) as decoder,
        pytest.raises(VideoError, match="over the limit of 100"),
    ):
        decoder.read(path, SMALL)
    with pytest.raises(RequestError, match="a decoder needs at least"):
        DecodeLimits(memory_bytes=1)
    with pytest.raises(RequestError, match="timeout_seconds is 0"):
        DecodeLimits(timeout_seconds=0)


def test_the_version_names_every_library_that_makes_pixels() -> None:
    assert all(name in decoder_version() for name in ("p4dprep-decoder-", "pyav-", "libavcodec-", "libswscale-"))


def test_a_local_file_is_used_where_it_is(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4")
    with local_copy(f"file://{path}") as video:
        assert video.path == str(path)
        assert video.digest == "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
        assert video.size_bytes == path.stat().st_size
    assert path.exists()


def test_a_bucket_object_is_copied_and_the_copy_deleted() -> None:
    data = os.urandom(3_000_000)
    bucket = fsspec.filesystem("memory")
    bucket.pipe("/bkt/v.mp4", data)
    with local_copy("memory://bkt/v.mp4") as video:
        assert Path(video.path).read_bytes() == data
        assert video.digest == "sha256:" + hashlib.sha256(data).hexdigest()
    assert not Path(video.path).exists()
    with pytest.raises(VideoError, match="more than the 1000 bytes"), local_copy("memory://bkt/v.mp4", max_bytes=1000):
        pass
    bucket.rm("/bkt", recursive=True)
    with pytest.raises(VideoError, match="cannot be read") as caught, local_copy("memory://bkt/v.mp4"):
        pass
    assert caught.value.failure == "not_found"


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    for path in (tmp_path / "pipe.mp4", tmp_path):
        with pytest.raises(VideoError, match="not a regular file"), local_copy(str(path)):
            pass
    with pytest.raises(VideoError, match="No such file"), local_copy(str(tmp_path / "x.mp4")):
        pass


class _Server(BaseHTTPRequestHandler):
    targets: dict[str, str] = {}  # noqa: RUF012

    def do_GET(self) -> None:
        if self.path in self.targets:
            self.send_response(302)
            self.send_header("Location", self.targets[self.path])
            self.end_headers()
        else:
            self.send_response(200 if self.path == "/v.mp4" else 404)
            self.end_headers()
            self.wfile.write(b"video")

    def log_message(self, *_: object) -> None:
        pass


def test_http_follows_redirects_on_its_host_but_never_to_internal_addresses() -> None:
    with (
        ThreadingHTTPServer(("127.0.0.1", 0), _Server) as server,
        ThreadingHTTPServer(("127.0.0.1", 0), _Server) as other,
    ):
        _Server.targets = {
            "/moved": "/v.mp4",
            "/metadata": "http://169.254.169.254/latest",
            "/port": f"http://127.0.0.1:{other.server_port}/v.mp4",
            "/file": "file:///etc/hostname",
            "/ftp": "ftp://127.0.0.1/x",
        }
        threads = [threading.Thread(target=each.serve_forever) for each in (server, other)]
        for thread in threads:
            thread.start()
        base = f"http://127.0.0.1:{server.server_port}"
        try:
            with local_copy(f"{base}/moved") as video:
                assert Path(video.path).read_bytes() == b"video"
            for name in ("metadata", "port", "file", "ftp"):
                with pytest.raises(VideoError, match="was refused"), local_copy(f"{base}/{name}"):
                    pass
            with pytest.raises(VideoError, match="HTTP 404"), local_copy(f"{base}/nothing"):
                pass
        finally:
            server.shutdown()
            other.shutdown()
            for thread in threads:
                thread.join()
