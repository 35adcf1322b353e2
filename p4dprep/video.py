"""Frames at exact presentation times, decoded in a guarded child process; probing; local copies of remote videos.

The clock: every time is `float(pts * time_base)` of a decoded frame, in seconds as the file itself counts them, never
an index divided by a rate. Shape suffixes: `t` frames, `h w` pixels, `c` channels (RGB).
"""

import contextlib
import hashlib
import json
import os
import select
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Self, get_args

import numpy as np
from numpy.typing import NDArray

from p4dprep._http import open_http
from p4dprep.corpus import Sampling
from p4dprep.errors import RequestError, VideoError, VideoFailure
from p4dprep.storage import open_filesystem, redact, retry

ALGORITHM = 1
"""Raised whenever the same file could give other pixels or times than before; part of the fingerprint."""

MAX_SOURCE_BYTES = 64 * 2**30
_CHUNK_BYTES = 2**20
_MAX_HEADER_BYTES = 2**22
_RANGES_PER_REQUEST = 256
_START_SECONDS = 30.0
_FATAL: tuple[VideoFailure, ...] = ("timeout", "out_of_memory", "decoder_crashed")


@dataclass(frozen=True, kw_only=True)
class DecodeLimits:
    """What one video may cost.

    Attributes:
        timeout_seconds: wall-clock for one clip; raising it lets slower files through and a hang last longer.
        memory_bytes: address space of the decoder; raising it lets larger frames through.
        max_pixels: width x height of a frame as coded; 8192 x 8192 / 2 fits 8K video.
        max_source_bytes: size of the file.
    """

    timeout_seconds: float = 60.0
    memory_bytes: int = 3 * 2**29
    max_pixels: int = 8192 * 8192 // 2
    max_source_bytes: int = MAX_SOURCE_BYTES

    def __post_init__(self) -> None:
        if not 0 < self.timeout_seconds < 1e6:
            raise RequestError(f"timeout_seconds is {self.timeout_seconds}; it must be above 0")
        if self.memory_bytes < 2**28:
            raise RequestError(f"memory_bytes is {self.memory_bytes}; a decoder needs at least {2**28} to start")
        if self.max_pixels < 1 or self.max_source_bytes < 1:
            raise RequestError(f"max_pixels and max_source_bytes must be at least 1, not {self}")


@dataclass(frozen=True, kw_only=True, eq=False)
class ClipFrames:
    """The frames of one clip.

    Attributes:
        frames_thwc: uint8 RGB, (t, h, w, 3), upright and resized.
        time_seconds_t: float64 (t,), presentation time of each frame on the file's own clock, never decreasing.
        num_distinct_frames: how many different frames those are; fewer than t where a short clip repeats frames.
    """

    frames_thwc: NDArray[np.uint8]
    time_seconds_t: NDArray[np.float64]
    num_distinct_frames: int

    def __post_init__(self) -> None:
        shape = self.frames_thwc.shape
        if len(shape) != 4 or shape[3] != 3 or self.frames_thwc.dtype != np.uint8:
            raise ValueError(f"frames {shape} {self.frames_thwc.dtype} are not uint8 (t, h, w, 3)")
        if self.time_seconds_t.shape != shape[:1] or self.time_seconds_t.dtype != np.float64:
            raise ValueError(f"times {self.time_seconds_t.shape} {self.time_seconds_t.dtype} do not fit frames {shape}")
        if not 1 <= self.num_distinct_frames <= shape[0]:
            raise ValueError(f"num_distinct_frames is {self.num_distinct_frames} of {shape[0]} frames")

    def __repr__(self) -> str:
        return f"ClipFrames(frames_thwc={self.frames_thwc.shape}, num_distinct_frames={self.num_distinct_frames})"


@dataclass(frozen=True, kw_only=True)
class VideoProbe:
    """What a file says of itself; `_from_header` values are declared, not measured, and may be wrong or missing.

    Attributes:
        width, height: pixels as coded, before rotation.
        rotation_degrees: counter-clockwise turn that the display matrix asks for.
    """

    width: int
    height: int
    rotation_degrees: int
    num_frames_from_header: int | None
    start_seconds_from_header: float | None
    duration_seconds_from_header: float | None
    average_fps_from_header: float | None
    codec: str
    container: str


class _ChildGoneError(Exception):
    """The child ended or broke the protocol in the middle of an answer."""


class _Child:
    """One decoder process and its pipes.

    Args:
        limits: what a video may cost it.
        is_second: it is asked what a child before it was killed over.
    """

    def __init__(self, limits: DecodeLimits, *, is_second: bool = False) -> None:
        self.num_requests = 0
        self.is_second = is_second
        # Nothing of ours is inherited: no credentials, no proxy settings, no thread counts.
        environment = {
            "PYTHONPATH": os.pathsep.join(os.path.abspath(entry) for entry in sys.path),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "MALLOC_ARENA_MAX": "2",
        }
        environment |= {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "SYSTEMROOT") if name in os.environ}
        self._process = subprocess.Popen(  # noqa: S603  (our own module)
            [sys.executable, "-P", "-m", "p4dprep._decoder", str(limits.memory_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            cwd="/",
            bufsize=0,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def was_killed(self) -> bool:
        """Whether it ended by SIGKILL, which no video sends: its own limits end a decoder in other ways."""
        return self._process.returncode == -signal.SIGKILL

    def send(self, request: Mapping[str, object]) -> None:
        text = json.dumps(request).encode()
        assert self._process.stdin is not None  # noqa: S101  (Popen was asked for a pipe)
        try:
            self._process.stdin.write(struct.pack(">I", len(text)) + text)
        except OSError:
            raise _ChildGoneError from None
        self.num_requests += 1

    def receive_json(self, deadline: float) -> dict[str, Any]:
        (num_bytes,) = struct.unpack(">I", self._receive(bytearray(4), deadline))
        if num_bytes > _MAX_HEADER_BYTES:
            raise _ChildGoneError
        try:
            answer = json.loads(bytes(self._receive(bytearray(num_bytes), deadline)))
        except ValueError:
            raise _ChildGoneError from None
        if not isinstance(answer, dict):
            raise _ChildGoneError
        return answer

    def receive_frames(self, shape: tuple[int, int, int, int], deadline: float) -> NDArray[np.uint8]:
        frames = np.empty(shape, np.uint8)
        self._receive(frames.data.cast("B"), deadline)
        return frames

    def _receive(self, buffer: bytearray | memoryview, deadline: float) -> bytearray | memoryview:
        """Fill a buffer.

        Raises:
            TimeoutError: not before the deadline.
            _ChildGoneError: the pipe ended.
        """
        assert self._process.stdout is not None  # noqa: S101  (Popen was asked for a pipe)
        descriptor = self._process.stdout.fileno()
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        view = memoryview(buffer)
        while len(view):
            left_seconds = deadline - time.monotonic()
            if left_seconds <= 0 or not poll.poll(left_seconds * 1000):
                raise TimeoutError
            num_bytes = os.readv(descriptor, [view])
            if not num_bytes:
                raise _ChildGoneError
            view = view[num_bytes:]
        return buffer

    def kill(self) -> int:
        """End the process at once; its exit status."""
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        return self._process.wait()


class Decoder:
    """Frames out of video files, by one guarded child process that lives as long as it behaves.

    The child starts with the first request; it has limits on memory and time, no environment, and answers in plain
    JSON and raw bytes. A child that hangs or dies is replaced, and costs the clip at hand only. One caller at a time;
    others wait. Close it, or use it as a context manager.
    """

    def __init__(self, limits: DecodeLimits | None = None) -> None:
        self.limits = limits or DecodeLimits()
        self._lock = threading.Lock()
        self._child: _Child | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """Process id of the running child, if there is one."""
        return None if self._child is None else self._child.pid

    def close(self) -> None:
        """End the child. The decoder may be used again; it starts a new one."""
        with self._lock:
            self._end_child()

    def read(
        self,
        path: str | os.PathLike[str],
        sampling: Sampling,
        start_seconds: float | None = None,
        end_seconds: float | None = None,
    ) -> ClipFrames:
        """Frames of [start_seconds, end_seconds) of a file by a sampling plan; null means from or to the end.

        `uniform` takes `round(linspace(0, N - 1, n))` of the N frames that decode and are first shown in the range.
        `windows` takes the frames on display at start + i / fps. A frame in which the decoder reports damage, or
        that refers to such a frame, is never used.

        Raises:
            VideoError: the file cannot give those frames; `failure` says in which of the known ways.
        """
        (clip,) = self.read_many(path, sampling, [(start_seconds, end_seconds)])
        if isinstance(clip, VideoError):
            raise clip
        return clip

    def read_many(
        self,
        path: str | os.PathLike[str],
        sampling: Sampling,
        ranges: Sequence[tuple[float | None, float | None]],
    ) -> list[ClipFrames | VideoError]:
        """`read` for several ranges of one file, which is opened once; fastest in order of time.

        Each range ends as frames or as its own error, the same as if it had been read alone; but once the decoder
        has hung, died or run out of memory, the remaining ranges share that failure.
        """
        request = self._request(path, sampling.plan) | {
            "num_frames": sampling.num_frames,
            "fps": sampling.fps or 0.0,
            "height": sampling.height,
            "width": sampling.width,
            "resize": sampling.resize,
        }
        shape = (sampling.num_frames, sampling.height, sampling.width, 3)
        clips: list[ClipFrames | VideoError] = []
        with self._lock:
            while len(clips) < len(ranges):
                batch = ranges[len(clips) : len(clips) + _RANGES_PER_REQUEST]
                clips += self._read_batch(request, batch, shape)
                last = clips[-1] if clips else None
                if isinstance(last, VideoError) and last.failure in _FATAL:
                    return clips + [last] * (len(ranges) - len(clips))
        return clips

    def read_named(self, path: str | os.PathLike[str], indices: Sequence[int], height: int, width: int) -> ClipFrames:
        """Frames by their number among those that decode, squashed to a size.

        Args:
            path: the file.
            indices: from 0, never decreasing.
            height, width: size of the frames, in pixels.

        Raises:
            RequestError: no index, or indices that are negative or decrease.
            VideoError: the file cannot give those frames; `too_short` where it has fewer.
        """
        if not indices or min(indices) < 0 or list(indices) != sorted(indices):
            raise RequestError(f"frames {list(indices)} are asked for; indices must start at 0 and never decrease")
        request = self._request(path, "named") | {"num_frames": len(indices), "indices": list(indices)}
        shape = (len(indices), height, width, 3)
        with self._lock:
            clips: list[ClipFrames | VideoError] = []
            while not clips:
                clips = self._read_batch(request | {"height": height, "width": width}, [(None, None)], shape)
        if isinstance(clips[0], VideoError):
            raise clips[0]
        return clips[0]

    def probe(self, path: str | os.PathLike[str]) -> VideoProbe:
        """What the file says of itself.

        Raises:
            VideoError: it cannot be opened or has no video stream.
        """
        answer = self._ask(self._request(path, "probe"))
        try:
            return VideoProbe(**answer)
        except TypeError:
            raise VideoError("decoder_crashed", "crashed the decoder while it was being probed") from None

    def time_span(self, path: str | os.PathLike[str]) -> tuple[float, float]:
        """When the first frame is shown and when the last one ends, in seconds, measured on packets, not headers.

        Raises:
            VideoError: the file has no frames.
        """
        answer = self._ask(self._request(path, "span"))
        return float(answer["start_seconds"]), float(answer["end_seconds"])

    def _request(self, path: str | os.PathLike[str], plan: str) -> dict[str, object]:
        return {
            "path": os.path.abspath(path),
            "plan": plan,
            "max_pixels": self.limits.max_pixels,
            "max_source_bytes": self.limits.max_source_bytes,
            "cpu_seconds": self.limits.timeout_seconds,
        }

    def _ask(self, request: dict[str, object]) -> dict[str, Any]:
        """One request with one answer and no frames."""
        with self._lock:
            while True:
                child, deadline = self._start(request)
                try:
                    answer = child.receive_json(deadline)
                except (TimeoutError, _ChildGoneError) as error:
                    answer = self._bury(error)
                failure = _failure_of(answer)
                if failure is None:
                    return answer
                if not self._deserves_fresh_child(child, failure):
                    raise failure

    def _read_batch(
        self,
        request: dict[str, object],
        ranges: Sequence[tuple[float | None, float | None]],
        shape: tuple[int, int, int, int],
    ) -> list[ClipFrames | VideoError]:
        """Answers to some of the ranges: all, or those up to the first that ended the child."""
        child, deadline = self._start(request | {"ranges": list(ranges), "cpu_seconds": self._cpu_seconds(len(ranges))})
        clips: list[ClipFrames | VideoError] = []
        for _ in ranges:
            try:
                clips.append(_receive_clip(child, shape, deadline))
            except (TimeoutError, _ChildGoneError) as error:
                failure = _failure_of(self._bury(error))
                assert failure is not None  # noqa: S101  (a burial is a failure)
                clips.append(failure)
            last = clips[-1]
            if isinstance(last, VideoError) and self._deserves_fresh_child(child, last):
                return clips[:-1]
            if self._child is not child:
                return clips
            deadline = time.monotonic() + self.limits.timeout_seconds
        return clips

    def _cpu_seconds(self, num_ranges: int) -> float:
        return self.limits.timeout_seconds * num_ranges

    def _start(self, request: Mapping[str, object]) -> tuple[_Child, float]:
        """Send a request to the child, a new one if there is none or it died in its sleep; with the deadline."""
        for _ in range(2):
            self._child = self._child or _Child(self.limits)
            start_seconds = 0.0 if self._child.num_requests else _START_SECONDS
            try:
                self._child.send(request)
                return self._child, time.monotonic() + start_seconds + self.limits.timeout_seconds
            except _ChildGoneError:
                self._end_child()
        raise VideoError("decoder_crashed", "could not be given to a decoder: its process does not start")

    def _bury(self, error: Exception) -> dict[str, Any]:
        """End the child after a failed answer, and say how it went."""
        status = self._end_child()
        if isinstance(error, TimeoutError):
            message = f"was not decoded within {self.limits.timeout_seconds:g} s"
            return {"failure": "timeout", "message": message}
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        return {"failure": "decoder_crashed", "message": f"crashed the decoder ({how})"}

    def _deserves_fresh_child(self, child: _Child, failure: VideoError) -> bool:
        """A crash or lack of memory after earlier files may be theirs: ask again in a fresh child, once.

        So may be a kill: Ray kills the children of a worker that it ends some milliseconds before the worker, in which
        the video would be written down as faulty.
        """
        if failure.failure not in ("out_of_memory", "decoder_crashed"):
            return False
        if child.num_requests == 1 and child.was_killed and not child.is_second:
            self._child = _Child(self.limits, is_second=True)
            return True
        self._end_child()
        return child.num_requests > 1

    def _end_child(self) -> int:
        child, self._child = self._child, None
        return 0 if child is None else child.kill()


def _receive_clip(child: _Child, shape: tuple[int, int, int, int], deadline: float) -> ClipFrames | VideoError:
    answer = child.receive_json(deadline)
    failure = _failure_of(answer)
    if failure is not None:
        return failure
    frames = child.receive_frames(shape, deadline)
    try:
        return ClipFrames(
            frames_thwc=frames,
            time_seconds_t=np.array(answer["time_seconds"], np.float64),
            num_distinct_frames=int(answer["num_distinct_frames"]),
        )
    except (KeyError, TypeError, ValueError):
        raise _ChildGoneError from None


def _failure_of(answer: Mapping[str, Any]) -> VideoError | None:
    if "failure" not in answer:
        return None
    known: tuple[VideoFailure, ...] = get_args(VideoFailure)
    named = [name for name in known if name == answer["failure"]]
    return VideoError(named[0] if named else "decoder_crashed", str(answer.get("message"))[:1000])


def decoder_version() -> str:
    """What frames depend on beside the file: for the fingerprint of a cache."""
    import av

    libraries = ",".join(
        f"{name}-{'.'.join(str(part) for part in av.library_versions[name])}"
        for name in ("libavcodec", "libavformat", "libswscale")
    )
    return f"p4dprep-decoder-{ALGORITHM},pyav-{av.__version__},{libraries}"


@dataclass(frozen=True, kw_only=True)
class LocalVideo:
    """A video as a file on this machine.

    Attributes:
        path: where it is; valid inside `local_copy` only.
        digest: `sha256:` and the hex digest of its bytes.
        size_bytes: its size.
    """

    path: str
    digest: str
    size_bytes: int


@contextlib.contextmanager
def local_copy(
    uri: str, storage_options: Mapping[str, Any] | None = None, max_bytes: int = MAX_SOURCE_BYTES
) -> Iterator[LocalVideo]:
    """A video as a local file with its digest; a remote one is copied to a temporary file and deleted afterwards.

    Args:
        uri: a path or URL; HTTP(S) redirects to this machine's own network are refused.
        storage_options: passed to fsspec; held in memory only.
        max_bytes: larger sources are refused.

    Raises:
        VideoError: `not_found`, `unknown_container` (not a regular file) or `too_large`.
        StorageError: the bucket failed after the retries.
    """
    if "://" not in uri or uri.startswith(("file://", "local://")):
        path = os.path.abspath(uri.removeprefix("file://").removeprefix("local://"))
        digest, size_bytes = retry(lambda: _measure(path, max_bytes), f"read {path}")
        yield LocalVideo(path=path, digest=digest, size_bytes=size_bytes)
        return
    suffix = os.path.splitext(uri.split("?")[0])[1][:16]
    with tempfile.NamedTemporaryFile(prefix="p4dprep-", suffix=suffix) as target:
        digest, size_bytes = retry(lambda: _download(uri, storage_options, target, max_bytes), f"read {redact(uri)}")
        yield LocalVideo(path=target.name, digest=digest, size_bytes=size_bytes)


def _measure(path: str, max_bytes: int) -> tuple[str, int]:
    with _open_regular(path) as file:
        return _copy(file, None, max_bytes)


def _download(uri: str, storage_options: Mapping[str, Any] | None, target: Any, max_bytes: int) -> tuple[str, int]:
    target.seek(0)
    target.truncate()
    try:
        with _open_remote(uri, storage_options) as source:
            result = _copy(source, target, max_bytes)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise VideoError("not_found", f"cannot be read: {redact(str(error) or type(error).__name__)}") from None
    target.flush()
    return result


def _open_remote(uri: str, storage_options: Mapping[str, Any] | None) -> Any:
    if uri.startswith(("http://", "https://")):
        return open_http(uri)
    filesystem, path = open_filesystem(uri, storage_options)
    return filesystem.open(path, "rb", cache_type="readahead", block_size=8 * _CHUNK_BYTES)


def _open_regular(path: str) -> BinaryIO:
    """A file that is one: opening never waits for the other end of a pipe, and devices are not read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise VideoError("not_found", f"cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise VideoError("unknown_container", "is not a regular file but a folder, pipe or device")
    return open(descriptor, "rb", buffering=0)


def _copy(source: Any, target: Any, max_bytes: int) -> tuple[str, int]:
    digest, size_bytes = hashlib.sha256(), 0
    while chunk := source.read(_CHUNK_BYTES):
        size_bytes += len(chunk)
        if size_bytes > max_bytes:
            raise VideoError("too_large", f"has more than the {max_bytes} bytes that are allowed")
        digest.update(chunk)
        if target is not None:
            target.write(chunk)
    return f"sha256:{digest.hexdigest()}", size_bytes
