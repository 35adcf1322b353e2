"""The child process that decodes: the only place where libav sees a stranger's file.

Started by `p4dprep.video.Decoder` as `python -m p4dprep._decoder MEMORY_BYTES`; it imports av and numpy only. A
request is one JSON message on stdin; the answer is one JSON message per range on stdout, each followed by raw frame
bytes. A message is a 4-byte big-endian length and as many bytes of JSON. Nothing is ever unpickled, on either side.
"""

import contextlib
import json
import math
import os
import re
import resource
import select
import stat
import struct
import sys
import threading
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import IO, Any, BinaryIO, cast

import av
import av.error
import av.logging
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from numpy.typing import NDArray

from p4dprep.errors import VideoError, VideoFailure

_CONTAINERS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf"
"""Demuxers that read one file and nothing else. Playlists, image sequences and devices are absent on purpose."""

_PLAYLISTS = (b"#EXTM3U", b"ffconcat", b"<MPD", b"<SmoothStreamingMedia", b"[playlist]", b"v=0", b"rtsp://", b"http")
_EXACT = (
    Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
)
"""Whole chroma, and the same bytes on every processor."""

_HEADROOM_BYTES = 2**24
_REFORMATTER = VideoReformatter()
"""One for all frames: it keeps its tables from frame to frame."""

_OPEN_NOTHING_ELSE = {"protocol_whitelist": "none", "format_whitelist": _CONTAINERS}


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the parent asks for.

    `plan` is `probe`, `span`, `named` (the frames `indices`), or `uniform` or `windows` of `p4dprep.corpus.Sampling`.
    """

    path: str
    plan: str
    max_pixels: int
    max_source_bytes: int
    cpu_seconds: float
    num_frames: int = 0
    fps: float = 0.0
    height: int = 0
    width: int = 0
    resize: str = "squash"
    ranges: Sequence[tuple[float | None, float | None]] = ()
    indices: Sequence[int] = ()


class _DamagedError(Exception):
    """The packets promise frames that do not decode; count what does."""


@dataclass(frozen=True, kw_only=True)
class _Timeline:
    """When frames are shown: strictly increasing presentation times in ticks, and the end of the last one."""

    pts: list[int]
    seconds: NDArray[np.float64]
    tick_seconds: float
    end_seconds: float


@dataclass(frozen=True, kw_only=True)
class _Key:
    pts: int
    dts: int


def _fail(failure: VideoFailure, message: str) -> VideoError:
    return VideoError(failure, message)


def _open_source(request: Request) -> BinaryIO:
    """The file, if it is a regular one of a sensible size and no playlist."""
    try:
        descriptor = os.open(request.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise _fail("not_found", f"cannot be opened: {error.strerror}") from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise _fail("unknown_container", "is not a regular file but a folder, pipe or device")
    file = open(descriptor, "rb", buffering=0)  # noqa: SIM115  (the caller closes it)
    try:
        if status.st_size == 0:
            raise _fail("empty_file", "is empty (0 bytes)")
        if status.st_size > request.max_source_bytes:
            raise _fail("too_large", f"has {status.st_size} bytes, over the limit of {request.max_source_bytes}")
        _refuse_playlists(file.read(4096))
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return file


def _refuse_playlists(head: bytes) -> None:
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    is_manifest = text.startswith(b"<?xml") and any(name in text for name in (b"<MPD", b"<SmoothStreamingMedia"))
    if is_manifest or text.startswith(_PLAYLISTS):
        raise _fail(
            "refused_protocol",
            "is a playlist that names other files or addresses, which are never opened; list the videos themselves",
        )


def _open_container(file: BinaryIO, max_pixels: int) -> Any:
    """A demuxer that can open nothing but this file object: the empty protocol list refuses every nested name."""
    file.seek(0)
    head = file.read(12)
    file.seek(0)
    try:
        return av.open(
            file,
            options={"max_pixels": str(max_pixels)},
            container_options=_OPEN_NOTHING_ELSE,
            metadata_errors="replace",
        )
    except (av.error.FFmpegError, ValueError) as error:
        if isinstance(error, MemoryError):
            raise
        if head[4:8] == b"ftyp":
            raise _fail(
                "corrupt", "is an MP4 whose index (moov) is missing or damaged; was it cut off while copying?"
            ) from None
        if isinstance(error, av.error.ArgumentError):
            raise _fail("unknown_container", f"is in a container other than {_CONTAINERS}") from None
        raise _fail("unknown_container", "is not a video: no known container was recognised in it") from None


class _Video:
    """One open file: its first real video stream, its timeline, and frames by presentation time."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._file = _open_source(request)
        self._container: Any = None
        self._walk: Iterator[Any] = iter(())
        self._position: int | None = None
        self._measured: _Timeline | None = None
        try:
            self.reopen()
            self._check_size()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._walk = iter(())
        if self._container is not None:
            self._container.close()
        self._file.close()

    def reopen(self) -> None:
        """Start again at the first packet, with a new decoder."""
        self._walk = iter(())
        self._position = None
        if self._container is not None:
            self._container.close()
        self._container = _open_container(self._file, self._request.max_pixels)
        self.stream = self._pick_stream()
        self.context = self.stream.codec_context
        if self.context is None:
            raise _fail("unknown_container", "is in a video codec that this decoder does not know")
        # One thread: errors are reported at the packet that has them. `explode`: no concealed pixels.
        self.context.thread_count = 1
        self.context.options = {"max_pixels": str(self._request.max_pixels), "err_detect": "explode"}

    @property
    def container(self) -> Any:
        return self._container

    def _pick_stream(self) -> Any:
        pictures = av.stream.Disposition.attached_pic | av.stream.Disposition.timed_thumbnails
        streams = [stream for stream in self._container.streams.video if not stream.disposition & pictures]
        if not streams:
            kinds = sorted({str(stream.type) for stream in self._container.streams})
            only = f", only {', '.join(kinds)}" if kinds else " nor any other; its header is damaged"
            raise _fail("no_video_stream", f"has no video stream{only}")
        for stream in self._container.streams:
            if stream.index != streams[0].index:
                stream.discard = av.stream.Discard.all
        return streams[0]

    def _check_size(self) -> None:
        size = f"{self.context.width}x{self.context.height}"
        if not self.context.width:  # libav itself refused the size, and only its log says which
            with av.logging.Capture() as messages:
                av.logging.set_level(av.logging.ERROR)
                next(self.frames(), None)
                av.logging.set_level(None)
            texts = " ".join(text for _, _, text in messages)
            refused = re.search(r"(\d+x\d+) (?:exceeds|is invalid)", texts)
            if refused is None:
                return
            size = refused[1]
        elif self.context.width * self.context.height <= self._request.max_pixels:
            return
        limit = self._request.max_pixels
        raise _fail("too_many_pixels", f"is {size}, over the limit of {limit} pixels a frame")

    def timeline(self, pts: list[int], last_duration: int) -> _Timeline:
        """Seconds of ticks, and where the last frame ends: by its own duration, else the last interval, else a tick."""
        base = self.stream.time_base
        end = pts[-1] + (last_duration or (pts[-1] - pts[-2] if len(pts) > 1 else 1))
        return _Timeline(
            pts=pts,
            seconds=np.array([float(tick * base) for tick in pts], np.float64),
            tick_seconds=float(base),
            end_seconds=float(end * base),
        )

    def _packets(self) -> Iterator[Any]:
        """The stream's packets; a file that breaks off ends there."""
        packets = self._container.demux(self.stream)
        with contextlib.suppress(av.error.FFmpegError):
            for packet in packets:
                if packet.size:
                    yield packet

    def listed(self) -> tuple[_Timeline, list[_Key]]:
        """What the packets promise, without decoding.

        Raises:
            _DamagedError: times are missing or not unique, so that only decoding can tell.
        """
        shown: dict[int, int] = {}
        keys: list[_Key] = []
        num_packets = 0
        for packet in self._packets():
            if packet.pts is None or packet.is_corrupt:
                raise _DamagedError
            if packet.is_keyframe:
                keys.append(_Key(pts=packet.pts, dts=packet.pts if packet.dts is None else packet.dts))
            if not packet.is_discard:
                num_packets += 1
                shown[packet.pts] = packet.duration or 0
        if not shown or not keys or len(shown) != num_packets:
            raise _DamagedError
        pts = sorted(shown)
        return self.timeline(pts, shown[pts[-1]]), sorted(keys, key=lambda key: key.pts)

    def measured(self) -> _Timeline:
        """What really decodes, by decoding all of it once.

        Raises:
            VideoError: nothing does.
        """
        if self._measured is None:
            pts, last_duration = [], 0
            for frame in self.frames():
                pts.append(frame.pts)
                last_duration = frame.duration or 0
            if not pts:
                raise _fail("no_frames", "has a video stream of which not one frame decodes undamaged")
            self._measured = self.timeline(pts, last_duration)
        return self._measured

    def frames(self) -> Iterator[Any]:
        """Undamaged frames from the start of the file, in strictly increasing time."""
        self.reopen()
        return self._decode(self._packets(), strict=False)

    def _decode(self, packets: Iterable[Any], *, strict: bool) -> Iterator[Any]:
        """Frames from the current packet on, in strictly increasing time.

        What follows a packet that fails, up to the next keyframe, refers to a picture that was never whole: it is
        not given out. With `strict` the first failure raises `_DamagedError` instead.
        """
        last, is_damaged = -math.inf, False
        for packet in packets:
            is_damaged = is_damaged and not packet.is_keyframe
            if is_damaged:
                continue
            frames, is_damaged = self._decode_packet(packet)
            if is_damaged and strict:
                raise _DamagedError
            for frame in frames:
                if frame.pts is not None and frame.pts > last:
                    last = frame.pts
                    yield frame
        for frame in self._drain():
            if frame.pts is not None and frame.pts > last:
                last = frame.pts
                yield frame

    def _decode_packet(self, packet: Any) -> tuple[list[Any], bool]:
        """Frames that came out, and whether this packet failed; after a failure the decoder is drained and empty."""
        try:
            frames = self.context.decode(packet)
        except av.error.FFmpegError as error:
            if isinstance(error, MemoryError):
                raise
            self._check_headroom()
            return [frame for frame in self._drain() if frame.pts != packet.pts], True
        good = [frame for frame in frames if not frame.is_corrupt]
        return good, len(good) != len(frames)

    def _check_headroom(self) -> None:
        """Tell damage from starvation: libav calls a failed allocation invalid data too.

        Raises:
            MemoryError: there is no room for a few more frames.
        """
        np.empty(_HEADROOM_BYTES + 12 * self.context.width * self.context.height, np.uint8)

    def _drain(self) -> list[Any]:
        frames = []
        try:
            frames = self.context.decode(None)
        except av.error.FFmpegError as error:
            if isinstance(error, MemoryError):
                raise
        self.context.flush_buffers()
        return [frame for frame in frames if not frame.is_corrupt]

    def frames_as_listed(self, listed: tuple[_Timeline, list[_Key]], wanted: Sequence[int]) -> Iterator[Any]:
        """Frames at `wanted` (increasing ticks), decoding only from the nearest keyframes.

        Raises:
            _DamagedError: what decodes is not what the packets promised.
        """
        timeline, keys = listed
        key_pts = [key.pts for key in keys]
        for pts in wanted:
            key = keys[max(0, bisect_right(key_pts, pts) - 1)]
            position = self._position
            if position is None or pts <= position or key.pts > _next_after(timeline.pts, position):
                self._start_walk(key)
            yield self._advance(timeline.pts, key, pts)

    def _start_walk(self, key: _Key) -> None:
        """Decode from a keyframe on. Containers seek by presentation or by decoding time, so both are tried."""
        self._position = None
        for ticks in (key.pts, key.dts):
            try:
                self._container.seek(ticks, stream=self.stream, backward=True)
            except av.error.FFmpegError:
                raise _DamagedError from None
            packets = self._packets()
            first = next(packets, None)
            if first is not None and first.pts is not None and first.pts <= key.pts:
                self._walk = self._decode(chain([first], packets), strict=True)
                return
        raise _DamagedError

    def _advance(self, listed_pts: list[int], key: _Key, pts: int) -> Any:
        """Decode up to `pts`, checking that every frame on the way is the one the packets promised."""
        first = listed_pts[bisect_left(listed_pts, min(key.pts, pts))]
        for frame in self._walk:
            if self._position is None and frame.pts < first:
                continue  # leading pictures of an open group, which belong to the group before
            if frame.pts != (first if self._position is None else _next_after(listed_pts, self._position)):
                break
            self._position = frame.pts
            if frame.pts == pts:
                return frame
        self._position = None
        raise _DamagedError

    def frames_as_measured(self, wanted: Sequence[int]) -> Iterator[Any]:
        """Frames at `wanted` (increasing ticks) among those that decode, from the start of the file."""
        remaining = iter(wanted)
        pts = next(remaining, None)
        for frame in self.frames():
            if pts is None:
                return
            if frame.pts == pts:
                yield frame
                pts = next(remaining, None)
        if pts is not None:
            raise _fail("corrupt", "decodes differently on a second reading")


def _next_after(listed_pts: list[int], pts: int) -> int:
    """The presentation time that follows; `pts` itself at the end."""
    return listed_pts[min(bisect_right(listed_pts, pts), len(listed_pts) - 1)]


def choose(request: Request, timeline: _Timeline, start: float | None, end: float | None) -> list[int]:
    """Positions in the timeline of the frames of one range, by the sampling plan.

    Raises:
        VideoError: `empty_range` or `too_short`.
    """
    if request.plan == "named":
        return _choose_named(request, timeline)
    choose_by = _choose_windows if request.plan == "windows" else _choose_uniform
    return choose_by(request, timeline, start, end)


def _choose_named(request: Request, timeline: _Timeline) -> list[int]:
    """The frames that the request counts out, the file's first being 0."""
    if (last := max(request.indices)) >= len(timeline.pts):
        raise _fail("too_short", f"has {len(timeline.pts)} frames, so there is no frame {last}, counted from 0")
    return list(request.indices)


def _choose_uniform(request: Request, timeline: _Timeline, start: float | None, end: float | None) -> list[int]:
    """`round(linspace(0, N - 1, n))` over the N frames shown first within [start, end)."""
    half_tick = timeline.tick_seconds / 2
    low = 0 if start is None else bisect_left(timeline.seconds, start - half_tick)
    high = len(timeline.pts) if end is None else bisect_left(timeline.seconds, end - half_tick)
    if low >= high:
        raise _fail("empty_range", f"shows no frame within {_range_text(start, end)}; {_span_text(timeline)}")
    return [low + int(index) for index in np.linspace(0, high - low - 1, request.num_frames).round()]


def _choose_windows(request: Request, timeline: _Timeline, start: float | None, end: float | None) -> list[int]:
    """The frame on display at start + i / fps. A start before the first frame means the first frame."""
    half_tick = timeline.tick_seconds / 2
    first = float(timeline.seconds[0]) if start is None else max(start, float(timeline.seconds[0]))
    stop = timeline.end_seconds if end is None else min(end, timeline.end_seconds)
    targets = first + np.arange(request.num_frames) / request.fps
    if first >= stop - half_tick:
        raise _fail("empty_range", f"shows no frame within {_range_text(start, end)}; {_span_text(timeline)}")
    if targets[-1] >= stop - half_tick:
        raise _fail(
            "too_short",
            f"has {max(0.0, stop - first):.3f} s within {_range_text(start, end)}; a window of {request.num_frames} "
            f"frames at {request.fps:g} a second needs more than {targets[-1] - first:.3f} s",
        )
    return [bisect_right(timeline.seconds, target + half_tick) - 1 for target in targets.tolist()]


def _range_text(start: float | None, end: float | None) -> str:
    return f"[{'the start' if start is None else f'{start:g} s'}, {'the end' if end is None else f'{end:g} s'})"


def _span_text(timeline: _Timeline) -> str:
    return f"its frames lie in [{timeline.seconds[0]:.3f} s, {timeline.end_seconds:.3f} s)"


def fit_frame(frame: Any, request: Request) -> NDArray[np.uint8]:
    """One decoded frame upright, as uint8 RGB (height, width, 3), squashed or padded to size.

    The display matrix's rotation is applied to the nearest quarter turn; its mirroring, if any, is not. Samples are
    taken as square. Colours follow the stream's own matrix and range, without tone mapping.
    """
    quarter_turns = round(frame.rotation / 90) % 4
    is_lying = quarter_turns % 2 == 1
    upright_height, upright_width = (frame.width, frame.height) if is_lying else (frame.height, frame.width)
    height, width = request.height, request.width
    if request.resize == "pad":
        scale = min(height / upright_height, width / upright_width)
        height = min(height, max(1, round(upright_height * scale)))
        width = min(width, max(1, round(upright_width * scale)))
    # Resized before it is turned: fewer pixels to turn.
    turned_hwc = np.rot90(_resize(frame, height, width) if is_lying else _resize(frame, width, height), quarter_turns)
    if (height, width) == (request.height, request.width):
        return np.ascontiguousarray(turned_hwc)
    canvas_hwc = np.zeros((request.height, request.width, 3), np.uint8)
    top, left = (request.height - height) // 2, (request.width - width) // 2
    canvas_hwc[top : top + height, left : left + width] = turned_hwc
    return canvas_hwc


def _resize(frame: Any, width: int, height: int) -> NDArray[np.uint8]:
    """RGB at another size by swscale, in one pass: by area when both sides shrink, else bilinear (also antialiased).

    Measured on 1280x720 to 224x224: 0.9 ms a frame, against 5.9 ms for a conversion and cv2's INTER_AREA.
    """
    is_shrinking = width <= frame.width and height <= frame.height
    kernel = Interpolation.AREA if is_shrinking else Interpolation.BILINEAR
    scaled = _REFORMATTER.reformat(frame, width=width, height=height, format="rgb24", interpolation=kernel | _EXACT)
    return cast(NDArray[np.uint8], scaled.to_ndarray())


class _Clips:
    """The frames of ranges of one file, keeping the last fitted ones, which overlapping windows share."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._video = _Video(request)
        self._fitted: OrderedDict[int, NDArray[np.uint8]] = OrderedDict()
        self._listed: tuple[_Timeline, list[_Key]] | None = None
        with contextlib.suppress(_DamagedError):
            self._listed = self._video.listed()

    def close(self) -> None:
        self._video.close()

    def read(self, start: float | None, end: float | None) -> tuple[dict[str, Any], list[NDArray[np.uint8]]]:
        """Answer header and frames of one range. Each range is answered as if it were the only one."""
        if self._listed is not None:
            with contextlib.suppress(_DamagedError):
                return self._read(self._listed[0], start, end, is_listed=True)
        return self._read(self._video.measured(), start, end, is_listed=False)

    def _read(
        self, timeline: _Timeline, start: float | None, end: float | None, *, is_listed: bool
    ) -> tuple[dict[str, Any], list[NDArray[np.uint8]]]:
        chosen = choose(self._request, timeline, start, end)
        distinct = sorted(set(chosen))
        self._fit([timeline.pts[index] for index in distinct], is_listed=is_listed)
        header = {
            "time_seconds": [float(timeline.seconds[index]) for index in chosen],
            "num_distinct_frames": len(distinct),
        }
        return header, [self._fitted[timeline.pts[index]] for index in chosen]

    def _fit(self, wanted: list[int], *, is_listed: bool) -> None:
        missing = [pts for pts in wanted if pts not in self._fitted]
        if is_listed and self._listed is not None:
            frames = self._video.frames_as_listed(self._listed, missing)
        else:
            frames = self._video.frames_as_measured(missing)
        for pts, frame in zip(missing, frames, strict=False):
            self._fitted[pts] = fit_frame(frame, self._request)
        for pts in wanted:
            self._fitted.move_to_end(pts)
        while len(self._fitted) > 2 * self._request.num_frames:
            self._fitted.popitem(last=False)


def _span(request: Request) -> dict[str, Any]:
    """When the first frame is shown and when the last one ends, from the packets alone where they tell."""
    video = _Video(request)
    try:
        try:
            timeline = video.listed()[0]
        except _DamagedError:
            timeline = video.measured()
    finally:
        video.close()
    return {"start_seconds": float(timeline.seconds[0]), "end_seconds": timeline.end_seconds}


def _probe(request: Request) -> dict[str, Any]:
    video = _Video(request)
    try:
        # First, since it opens the file anew: streams of a closed container must not be touched.
        rotation = next((frame.rotation for frame in video.frames()), 0)
        stream, container = video.stream, video.container
        duration = stream.duration * stream.time_base if stream.duration else (container.duration or 0) / 1_000_000
        return {
            "width": video.context.width,
            "height": video.context.height,
            "rotation_degrees": rotation,
            "num_frames_from_header": stream.frames or None,
            "start_seconds_from_header": None
            if stream.start_time is None
            else float(stream.start_time * stream.time_base),
            "duration_seconds_from_header": float(duration) or None,
            "average_fps_from_header": float(stream.average_rate) if stream.average_rate else None,
            "codec": video.context.name,
            "container": container.format.name,
        }
    finally:
        video.close()


def _describe(error: BaseException) -> dict[str, Any]:
    if isinstance(error, VideoError):
        return {"failure": error.failure, "message": error.message}
    if isinstance(error, MemoryError):
        return {"failure": "out_of_memory", "message": "needs more memory to decode than the decoder may use"}
    return {"failure": "corrupt", "message": f"cannot be decoded: {type(error).__name__}: {error}"[:500]}


def _answers(request: Request) -> Iterator[tuple[dict[str, Any], list[NDArray[np.uint8]]]]:
    """One answer per range; a probe has one."""
    try:
        if request.plan in ("probe", "span"):
            yield (_probe if request.plan == "probe" else _span)(request), []
            return
        clips = _Clips(request)
    except Exception as error:
        yield from [(_describe(error), [])] * max(1, len(request.ranges))
        return
    try:
        for start, end in request.ranges:
            try:
                yield clips.read(start, end)
            except Exception as error:
                yield _describe(error), []
    finally:
        clips.close()


def _limit_cpu(seconds: float) -> None:
    """A second guard beside the parent's watchdog: this much processor time more, then the kernel ends us."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = math.ceil(used.ru_utime + used.ru_stime + seconds) + 1
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def _exit_with_parent() -> None:
    """Leave as soon as nobody holds the other end of stdin, even in the midst of decoding."""
    poll = select.poll()
    poll.register(0, 0)
    poll.poll()
    os._exit(0)


def serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Answer requests until stdin ends."""
    while len(length := requests.read(4)) == 4:
        request = Request(**json.loads(requests.read(struct.unpack(">I", length)[0])))
        _limit_cpu(request.cpu_seconds)
        for header, frames in _answers(request):
            text = json.dumps(header).encode()
            answers.write(struct.pack(">I", len(text)) + text)
            for frame in frames:
                answers.write(frame.data)
            answers.flush()


def main() -> None:
    """Lower our own limits, then serve."""
    memory_bytes = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    av.logging.set_level(None)
    av.logging.set_skip_repeated(False)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    with open(0, "rb", closefd=False) as requests, open(1, "wb", closefd=False) as answers:
        serve(requests, answers)


if __name__ == "__main__":
    main()
