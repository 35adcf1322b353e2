"""What a question shows, as a student sees it: frames at their real times, pictures, and a rival's cached latents.

Shape suffixes: `t` frames, `h w` pixels, `c` channels (RGB).
"""

import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from p4dprep.cache import Cache
from p4dprep.corpus import Sampling
from p4dprep.errors import MissingDataError, RequestError, VideoError
from p4dprep.video import ClipFrames, Decoder
from student.data import read_image
from student.evaluate.benchmark import Question, Shown
from student.regions import mark_regions
from student.samples import StudentSample, Turn
from student.targets import cached_targets


@dataclass(frozen=True, kw_only=True)
class FramePolicy:
    """Which frames of a video are shown, and how large.

    Attributes:
        num_frames: `round(linspace(0, N - 1, num_frames))` of the N frames that decode within the span that is meant;
            a shorter video repeats frames. A benchmark that names frames itself is shown those.
        frame_size: height and width; None is the video's own, upright.
        resize: how frames are brought to that size.
    """

    num_frames: int = 16
    frame_size: tuple[int, int] | None = None
    resize: Literal["squash", "pad"] = "squash"

    def __post_init__(self) -> None:
        self.sampling(*(self.frame_size or (1, 1)))

    def sampling(self, height: int, width: int) -> Sampling:
        """The same as a plan for the decoder.

        Raises:
            RequestError: under 1 or too many frames or pixels.
        """
        return Sampling(num_frames=self.num_frames, height=height, width=width, resize=self.resize)

    def __str__(self) -> str:
        size = "own size" if self.frame_size is None else "{}x{} {}".format(*self.frame_size, self.resize)
        return f"{self.num_frames} uniform, {size}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Loaded:
    """A question with what it shows.

    Attributes:
        question: as asked.
        sample: as the student sees it, without a time cue.
        clip_id: of a cache's clip whose arrays `cached` are; None without.
        cached: array name to physical values.
    """

    question: Question
    sample: StudentSample
    clip_id: str | None = None
    cached: Mapping[str, NDArray[Any]] = field(default_factory=dict)


class MediaReader:
    """Reads what questions show; several threads may.

    Args:
        policy: for videos.
        clips: where a rival's latents come from; None without a rival.
        num_decoders: guarded processes that decode at the same time.
    """

    def __init__(self, policy: FramePolicy, clips: "CachedClips | None" = None, num_decoders: int = 1) -> None:
        self.policy, self.clips = policy, clips
        self._decoders: queue.SimpleQueue[Decoder] = queue.SimpleQueue()
        self._all = [Decoder() for _ in range(num_decoders)]
        for decoder in self._all:
            self._decoders.put(decoder)

    def close(self) -> None:
        """End the decoders."""
        for decoder in self._all:
            decoder.close()

    def load(self, question: Question) -> Loaded:
        """The question with its frames or pictures.

        Raises:
            ValueError, MissingDataError: its media cannot be read, or a rival's clip is not cached.
            CorruptDataError: the cache is damaged.
        """
        shown, turns = question.shown, (Turn(role="user", text=question.prompt),)
        if shown.video is None:
            pictures = tuple(read_image(each if isinstance(each, bytes) else str(each)) for each in shown.images)
            return Loaded(
                question=question, sample=StudentSample(id=question.id, conversation=turns, images_hwc=pictures)
            )
        with self._decoder() as decoder:
            clip = self._frames(decoder, shown.video, shown)
        frames = clip.frames_thwc
        if shown.regions:  # marked as in training, see `student.data`
            frames[0] = mark_regions(frames[0], shown.regions)
        elif shown.first_frame_marks is not None:
            frames[0] = _fitted(read_image(str(shown.first_frame_marks)), frames.shape[1:3])
        sample = StudentSample(id=question.id, conversation=turns, frames_thwc=frames, time_seconds=clip.time_seconds_t)
        if self.clips is None:
            return Loaded(question=question, sample=sample)
        clip_id, cached = self.clips.read(shown.video, shown.span_seconds, clip.time_seconds_t)
        return Loaded(question=question, sample=sample, clip_id=clip_id, cached=cached)

    @contextmanager
    def _decoder(self) -> Iterator[Decoder]:
        decoder = self._decoders.get()
        try:
            yield decoder
        finally:
            self._decoders.put(decoder)

    def _frames(self, decoder: Decoder, video: Path, shown: Shown) -> ClipFrames:
        size = self.policy.frame_size or _upright_size(decoder, video)
        if self.clips is not None:
            start, end = self.clips.span(video, shown.span_seconds)
            return decoder.read(video, replace(self.clips.sampling, height=size[0], width=size[1]), start, end)
        if shown.frame_indices is not None:
            return decoder.read_named(video, shown.frame_indices, *size)
        start, end = _span(decoder, video, shown.span_seconds)
        return decoder.read(video, self.policy.sampling(*size), start, end)


def _upright_size(decoder: Decoder, video: Path) -> tuple[int, int]:
    probe = decoder.probe(video)
    is_lying = round(probe.rotation_degrees / 90) % 2 == 1
    return (probe.width, probe.height) if is_lying else (probe.height, probe.width)


def _span(decoder: Decoder, video: Path, span_seconds: tuple[float, float] | None) -> tuple[float | None, float | None]:
    """A benchmark counts seconds from the first frame, a file from wherever its clock starts."""
    if span_seconds is None:
        return None, None
    first, _ = decoder.time_span(video)
    return first + span_seconds[0], first + span_seconds[1]


def _fitted(picture_hwc: NDArray[np.uint8], size: tuple[int, ...]) -> NDArray[np.uint8]:
    """A picture squashed to (height, width), antialiased."""
    if picture_hwc.shape[:2] == size:
        return picture_hwc
    return np.asarray(Image.fromarray(picture_hwc).resize((size[1], size[0]), Image.Resampling.BILINEAR))


class CachedClips:
    """A cache whose arrays a student reads when it answers, by the videos of questions.

    A clip is a video's if its id or the end of its uri, whole path parts only, is the video's path under the data
    folder, as in training; of several, the one with the question's span.

    Args:
        cache: the cache.
        arrays: to read, `<group>_<target>`.
        data: folder of the questions' media.
        videos: all that will be asked about; others need not be kept in memory.

    Raises:
        RequestError: the cache has none of the videos.
    """

    def __init__(self, cache: Cache, arrays: Sequence[str], data: Path, videos: Sequence[Path]) -> None:
        known = cached_targets(cache)
        self.targets = {name: known[name] for name in arrays}
        self.cache, self.sampling, self._data = cache, cache.sampling, data.resolve()
        names = {video.name for video in videos} | {self._relative(video) for video in videos}
        self._lock = threading.Lock()
        self._clips: dict[str, list[dict[str, Any]]] = {}
        table = cache.clips().select(["index", "id", "uri", "start_seconds", "end_seconds"])
        for batch in table.to_batches():
            for row in batch.to_pylist():
                for name in {row["id"], row["uri"].rsplit("/", 1)[-1]} & names:
                    self._clips.setdefault(name, []).append(row)
        if videos and not any(self._of(video) for video in videos):
            raise RequestError(
                f"{cache.store.url} has no clip of any video that is asked about, such as {self._relative(videos[0])}; "
                "extract the benchmark's videos with the run's teacher into a cache and name it with --cache"
            )

    def span(self, video: Path, span_seconds: tuple[float, float] | None) -> tuple[float | None, float | None]:
        """Start and end of the video's clip.

        Raises:
            MissingDataError: there is none, or not just one.
        """
        row = self._row(video, span_seconds)
        return row["start_seconds"], row["end_seconds"]

    def read(
        self, video: Path, span_seconds: tuple[float, float] | None, time_seconds_t: NDArray[np.float64]
    ) -> tuple[str, dict[str, NDArray[Any]]]:
        """Id and arrays of the video's clip.

        Raises:
            MissingDataError: there is no such clip, or it was never committed.
            VideoError: the cached frames have other times.
        """
        row = self._row(video, span_seconds)
        arrays = {}
        with self._lock:
            for name, target in self.targets.items():
                group = self.cache.group(target.group)
                if not np.array_equal(group.read_time(row["index"]), time_seconds_t):
                    raise VideoError("source_changed", f"has other frame times than clip {row['id']} of the cache")
                arrays[name] = group.read(row["index"], target.spec.name)
        return row["id"], arrays

    def _relative(self, video: Path) -> str:
        path = video.resolve()
        return path.relative_to(self._data).as_posix() if path.is_relative_to(self._data) else path.as_posix()

    def _of(self, video: Path) -> list[dict[str, Any]]:
        name = self._relative(video)
        found = [row for row in self._clips.get(video.name, []) if f"/{row['uri']}".endswith(f"/{name}")]
        return found or [row for row in self._clips.get(name, []) if row["id"] == name]

    def _row(self, video: Path, span_seconds: tuple[float, float] | None) -> dict[str, Any]:
        found = self._of(video)
        if len(found) > 1 or span_seconds is not None:
            found = [
                row for row in found if (row["start_seconds"], row["end_seconds"]) == (span_seconds or (None, None))
            ]
        if len(found) != 1:
            span = "" if span_seconds is None else f" from {span_seconds[0]:g} to {span_seconds[1]:g} s"
            raise MissingDataError(
                f"the cache has {len(found)} clips of {self._relative(video)}{span}; it must have one"
            )
        return found[0]
