"""Conversations joined with the clips of a cache, read as samples: frames at the cached times, and the targets.

Clips are joined by id and clock. By id: a conversation's video names a clip (docs/training-data.md has the rules). By
clock: the frames are those that the cache keeps, or are decoded again, and then their presentation times must be those
that the cache recorded, to the bit.

Shape suffixes: `t` frames, `h w` pixels, `c` channels (RGB).
"""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import Dataset

from p4dprep.cache import Cache
from p4dprep.errors import MissingDataError, RequestError, VideoError
from p4dprep.storage import redact
from p4dprep.video import Decoder, local_copy
from student.conversations import Conversation, Conversations, Report
from student.features import refuse_marks, vision_target
from student.order import SampleKey, mixed
from student.regions import RegionPrompt, mark_regions, region_text
from student.samples import StudentSample, Turn, VisionFeatures
from student.targets import CachedTarget, TargetBatch, cached_targets, check_flip, flip_x, stack_targets

_LOG = logging.getLogger(__name__)
_IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
_MAX_IMAGE_PIXELS = 2**26
_MAX_SKIPPED = 100
"""Unreadable samples in a row before the run stops after all: then the fault is not theirs."""
_FLIP_WORD = 0xF11B
_NO_CLIP, _LEFT_OUT = -1, -2


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How samples are read.

    Attributes:
        targets: arrays to read from the cache, `<group>_<target>`; none for SFT alone.
        media_folder: where the conversations' media lie; None reads clips from the places the cache recorded.
        frame_size: height and width of the student's frames; None takes those that the cache keeps, else the teacher's
            size. A size that the cache keeps is read from it and no video is opened; any other is decoded.
        regions: how regions are shown.
        flip: mirror every second sample, chosen anew each epoch. Samples with text are never mirrored, since what
            they say of left and right would be wrong.
        seed: of the augmentation.
        features: array of the student's own vision features, see `student.features`: they are read in place of frames.
        conversations_per_sample: how many conversations over one clip a sample has at most. They are drawn once, by
            `seed`. Those whose regions are marked in the frames stay alone, since no other sees the same.
    """

    targets: tuple[str, ...] = ()
    media_folder: str | None = None
    frame_size: tuple[int, int] | None = None
    regions: RegionPrompt = "both"
    flip: bool = False
    seed: int = 0
    features: str | None = None
    conversations_per_sample: int = 1

    def __post_init__(self) -> None:
        if self.features is not None and (self.flip or self.frame_size is not None):
            raise RequestError("vision features are of the cache's own frames: they allow no flip and no frame_size")
        if self.regions not in get_args(RegionPrompt) or self.seed < 0:
            raise RequestError(
                f"regions must be one of {get_args(RegionPrompt)} and seed at least 0, "
                f"not {self.regions!r} and {self.seed}"
            )
        if len(set(self.targets)) != len(self.targets):
            raise RequestError(f"a target stands twice in {self.targets}")


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingSample:
    """One conversation or several over one video, its media and its clip's targets.

    Attributes:
        sample: what the student sees.
        clip_id: whose targets they are; None for still images.
        targets: array name to physical values of the spec's shape; empty for still images.
    """

    sample: StudentSample
    clip_id: str | None
    targets: Mapping[str, NDArray[Any]]


def collate(samples: Sequence[TrainingSample]) -> tuple[tuple[StudentSample, ...], TargetBatch]:
    """A batch: the samples for the student's encoder, and their targets. Pass it to a DataLoader as `collate_fn`."""
    ids = [item.sample.id for item in samples]
    targets = stack_targets(ids, [item.clip_id for item in samples], [item.targets for item in samples])
    return tuple(item.sample for item in samples), targets


class TrainingData(Dataset[TrainingSample]):
    """Samples by `SampleKey`. Each process that reads from it opens cache and decoder for itself.

    Args:
        cache: whose clips and targets are read.
        conversations: what is said; None gives every clip without text, for distillation alone.
        config: how.
        report: says whether problems stop the run, and takes what is left out now; what turns out to be unreadable
            later, or to have other frame times, is logged. A damaged cache always stops.
        storage_options: passed to fsspec for cache and remote videos; held in memory only.

    Raises:
        RequestError: an unknown target, one that allows no flip, vision features where regions would be marked, or
            nothing is left to train on; and what is left out, if problems stop the run.
    """

    def __init__(
        self,
        cache: Cache,
        conversations: Conversations | None,
        config: DataConfig,
        report: Report,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.config, self._on_problem = config, report.on_problem
        self._url, self._storage_options = cache.store.url, storage_options
        known = cached_targets(cache)
        for name in config.targets:
            if name not in known:
                raise RequestError(f"{cache.store.url} has no target {name!r}; it has {sorted(known)}")
        self.targets: dict[str, CachedTarget] = {name: known[name] for name in config.targets}
        for target in self.targets.values() if config.flip else ():
            check_flip(target.spec)
        self._conversations = conversations
        self._clips = cache.clips().select(["id", "uri", "start_seconds", "end_seconds"]).combine_chunks()
        self._features = vision_target(cache, config.features) if config.features is not None else None
        self._kept = None if self._features else kept_frames(cache, config.frame_size)
        read = [*self.targets.values(), *(shown for shown in (self._kept, self._features) if shown)]
        # What samples are made of: a run is held to these.
        self.groups = tuple(sorted({target.group for target in read}))
        self._groups = list(self.groups or cache.groups()[:1])
        clips = self._join(cache, report)
        used = np.flatnonzero(clips != _LEFT_OUT)
        if self._features and conversations is not None and config.regions != "boxes":
            refuse_marks(conversations.table, used[clips[used] >= 0])
        self.conversations_of_row = self._together(used, clips[used])
        self.clip_of_row = clips[self.conversations_of_row[:, 0]]
        report.num_used = len(used)
        if not len(self):
            raise RequestError(f"{cache.store.url}: nothing is left to train on; {report}")
        self._reader: _Reader | None = None

    def __len__(self) -> int:
        return len(self.clip_of_row)

    def _join(self, cache: Cache, report: Report) -> NDArray[np.int64]:
        """The clip of every conversation; `_NO_CLIP` for still images, `_LEFT_OUT` for what cannot be used."""
        done = {name: cache.group(name).states().ok for name in self._groups}
        usable = np.logical_and.reduce([np.ones(self._clips.num_rows, bool), *done.values()])
        if self._conversations is None:
            clips = np.arange(len(usable))
        else:
            clips = join(self._conversations, self._clips, self.config.media_folder, report)
        for row in np.flatnonzero((clips >= 0) & ~usable[clips]).tolist():
            clip = self._clips.column("id")[int(clips[row])].as_py()
            lacking = ", ".join(name for name, ok in done.items() if not ok[clips[row]])
            report.leave_out("without targets", f"clip {clip} lacks targets of {lacking}")
            clips[row] = _LEFT_OUT
        return clips

    def _together(self, numbers_n: NDArray[np.int64], clips_n: NDArray[np.int64]) -> NDArray[np.int64]:
        """Conversations of each row, (rows, conversations_per_sample), in the order of the first; -1 fills up."""
        size = self.config.conversations_per_sample
        if size == 1 or self._conversations is None or not len(numbers_n):
            return numbers_n[:, None]
        is_alone = clips_n < 0
        if self.config.regions != "boxes":
            lengths = pc.list_value_length(self._conversations.table.column("regions")).to_numpy()
            is_alone |= lengths[numbers_n] > 0
        # Alone means a clip of one's own; a clip's conversations are shuffled, then cut into rows.
        keys_n = np.where(is_alone, len(self._clips) + np.arange(len(clips_n)), clips_n)
        order = np.lexsort((mixed(self.config.seed, numbers_n.astype(np.uint64)), keys_n))
        keys_n, numbers_n = keys_n[order], numbers_n[order]
        begins = np.flatnonzero(np.r_[True, keys_n[1:] != keys_n[:-1]])
        place_n = np.arange(len(keys_n)) - np.repeat(begins, np.diff(np.r_[begins, len(keys_n)]))
        row_n = np.cumsum(place_n % size == 0) - 1
        rows = np.full((row_n[-1] + 1, size), -1, np.int64)
        rows[row_n, place_n % size] = numbers_n
        return rows[np.argsort(rows[:, 0])]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_reader": None}

    def __getitem__(self, key: SampleKey) -> TrainingSample:
        """A sample; where it cannot be read and problems do not stop the run, the next one that can.

        Raises:
            RequestError: it cannot be read, and that stops the run; or nor can many after it.
            CorruptDataError: the cache is damaged.
            StorageError: a bucket failed after the retries.
        """
        num_tries = min(len(self), _MAX_SKIPPED)
        for step in range(num_tries):
            row = (key.row + step) % len(self)
            try:
                return self._read(SampleKey(key.epoch, row))
            except (VideoError, MissingDataError, _UnreadableError) as error:
                message = f"{self._name(row)}: {error}"
                if self._on_problem == "stop":
                    raise RequestError(f"{message}; mend it, or ask for such samples to be left out") from None
                _LOG.warning("left out: %s", message)
        raise RequestError(f"none of {num_tries} samples in a row can be read; the log says why")

    def _name(self, row: int) -> str:
        clip = int(self.clip_of_row[row])
        return f"clip {self._clips.column('id')[clip].as_py()}" if clip >= 0 else f"sample {self._conversation(row).id}"

    def _conversation(self, row: int) -> Conversation:
        """A row's first conversation, which gives the sample its name."""
        if self._conversations is None:
            return Conversation(id=self._clips.column("id")[int(self.clip_of_row[row])].as_py(), turns=())
        return self._conversations[int(self.conversations_of_row[row, 0])]

    def _others(self, row: int) -> tuple[tuple[Turn, ...], ...]:
        """What is said in a row's further conversations."""
        numbers = [number for number in self.conversations_of_row[row, 1:].tolist() if number >= 0]
        talks = [self._conversations[number] for number in numbers] if self._conversations is not None else []
        return tuple(map(self._turns, talks))

    def _read(self, key: SampleKey) -> TrainingSample:
        talk, clip = self._conversation(key.row), int(self.clip_of_row[key.row])
        if clip == _NO_CLIP:
            images = tuple(self._image(path) for path in talk.images)
            return self._told(talk, StudentSample(id=talk.id, images_hwc=images), None, {})
        found = self._of_clip(key, talk, clip)
        return replace(found, sample=replace(found.sample, others=self._others(key.row)))

    def _of_clip(self, key: SampleKey, talk: Conversation, clip: int) -> TrainingSample:
        """A sample of a clip with its first conversation."""
        clip_id = self._clips.column("id")[clip].as_py()
        targets = {name: self._open().read(target, clip) for name, target in self.targets.items()}
        if self._features is not None:
            return self._told(talk, self._open().seen(talk.id, self._features, clip), clip_id, targets)
        frames, seconds = self._frames(talk, clip)
        if self.config.flip and not talk.turns and mixed(self.config.seed, _FLIP_WORD, *key)[0] & np.uint64(1):
            frames = np.ascontiguousarray(frames[:, :, ::-1])
            targets = {name: flip_x(values, self.targets[name].spec) for name, values in targets.items()}
        sample = StudentSample(id=talk.id, frames_thwc=frames, time_seconds=seconds)
        return self._told(talk, sample, clip_id, targets)

    def frames(self, row: int) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
        """Frames (t, h, w, 3) and times (t,) of a row's clip, also where the student is given features for them."""
        return self._frames(self._conversation(row), int(self.clip_of_row[row]))

    def _frames(self, talk: Conversation, clip: int) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
        if self._kept is not None:
            return self._open().kept_frames(self._kept, clip)
        row = {name: self._clips.column(name)[clip].as_py() for name in self._clips.column_names}
        folder, place = self.config.media_folder, row["uri"]
        if folder is not None and talk.video is not None:
            place = safe_path(folder, talk.video)
        return self._open().frames(place, clip, row["start_seconds"], row["end_seconds"])

    def _told(
        self, talk: Conversation, sample: StudentSample, clip_id: str | None, targets: Mapping[str, NDArray[Any]]
    ) -> TrainingSample:
        """The sample with its text, and its regions shown."""
        if talk.regions and self.config.regions != "boxes":
            sample = _marked(sample, talk)
        told = replace(sample, conversation=self._turns(talk))
        return TrainingSample(sample=told, clip_id=clip_id, targets=targets)

    def _turns(self, talk: Conversation) -> tuple[Turn, ...]:
        """What is said, with its regions in words."""
        if not talk.regions:
            return talk.turns
        first, *others = talk.turns
        return (Turn(role="user", text=f"{self._region_text(talk)}\n{first.text}"), *others)

    def _region_text(self, talk: Conversation) -> str:
        if talk.video is not None and self._open().cache.sampling.resize == "pad":
            raise RequestError(
                f"{talk.id} has regions, but the cache's frames are padded; extract with --resize squash"
            )
        return region_text(talk.regions, self.config.regions)

    def _image(self, path: str) -> NDArray[np.uint8]:
        if self.config.media_folder is None:
            raise RequestError(f"image {path} needs a media folder")
        return read_image(safe_path(self.config.media_folder, path))

    def _open(self) -> "_Reader":
        """This process's reader: neither a decoder's pipes nor a bucket's connections survive a fork."""
        if self._reader is None or self._reader.pid != os.getpid():
            self._reader = _Reader(self._url, self._storage_options, self._groups[0], self.config.frame_size)
        return self._reader

    def close(self) -> None:
        """End this process's decoder. Reading again starts another one."""
        if self._reader is not None and self._reader.pid == os.getpid():
            self._reader.decoder.close()
        self._reader = None


class _UnreadableError(ValueError):
    """Media that cannot be read; the message says why."""


class _Reader:
    """One process's open cache and decoder."""

    def __init__(
        self, url: str, storage_options: Mapping[str, Any] | None, group: str, frame_size: tuple[int, int] | None
    ) -> None:
        self.pid, self.decoder, self._storage_options = os.getpid(), Decoder(), storage_options
        self.cache = Cache.open(url, storage_options)
        self._clock = self.cache.group(group)
        height, width = frame_size or (self.cache.sampling.height, self.cache.sampling.width)
        self._sampling = replace(self.cache.sampling, height=height, width=width)

    def read(self, target: CachedTarget, clip: int) -> NDArray[Any]:
        return self.cache.group(target.group).read(clip, target.spec.name)

    def seen(self, name: str, features: CachedTarget, clip: int) -> StudentSample:
        """A sample of the clip as the student's vision tower saw it."""
        size = (self.cache.sampling.height, self.cache.sampling.width)
        values = VisionFeatures(values=self.read(features, clip), frame_size=size)
        times = self.cache.group(features.group).read_time(clip)
        return StudentSample(id=name, time_seconds=times, features=values)

    def kept_frames(self, kept: CachedTarget, clip: int) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
        """The clip's frames and their times as the cache keeps them."""
        return self.read(kept, clip), self.cache.group(kept.group).read_time(clip)

    def frames(
        self, place: str, clip: int, start_seconds: float | None, end_seconds: float | None
    ) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
        """The clip's frames and their times, which must be the cached ones."""
        if "://" in place and not place.startswith(("file://", "local://")):
            with local_copy(place, self._storage_options) as video:
                found = self.decoder.read(video.path, self._sampling, start_seconds, end_seconds)
        else:
            path = place.removeprefix("file://").removeprefix("local://")
            found = self.decoder.read(path, self._sampling, start_seconds, end_seconds)
        cached = self._clock.read_time(clip)
        if not np.array_equal(found.time_seconds_t, cached):
            where = int(np.flatnonzero(found.time_seconds_t != cached)[0])
            raise VideoError(
                "source_changed",
                f"frame {where} of {redact(place)} is at {found.time_seconds_t[where]:.6f} s, "
                f"the teacher saw it at {cached[where]:.6f} s: another video, or decoded otherwise",
            )
        return found.frames_thwc, found.time_seconds_t


def kept_frames(cache: Cache, frame_size: tuple[int, int] | None) -> CachedTarget | None:
    """The frames of a size that a cache keeps; of any size, if there is only one, for None.

    Returns:
        Their target; None where the videos must be decoded.

    Raises:
        RequestError: the cache keeps frames of several sizes and none is asked for.
    """
    kept = {
        target.spec.shape[1:3]: target
        for target in cached_targets(cache).values()
        if target.spec.quantity == "rgb frames"
    }
    if frame_size is not None:
        return kept.get(frame_size)
    if len(kept) > 1:
        sizes = ", ".join(f"{height}x{width}" for height, width in sorted(kept))
        raise RequestError(f"{cache.store.url} keeps frames of {sizes}; say which with frame_size")
    return next(iter(kept.values()), None)


def _marked(sample: StudentSample, talk: Conversation) -> StudentSample:
    """Marks on the first frame, or on the first image."""
    if sample.frames_thwc is None:
        first, *others = sample.images_hwc
        return replace(sample, images_hwc=(mark_regions(first, talk.regions), *others))
    frames = sample.frames_thwc.copy()
    frames[0] = mark_regions(frames[0], talk.regions)
    return replace(sample, frames_thwc=frames)


def join(conversations: Conversations, clips: pa.Table, media_folder: str | None, report: Report) -> NDArray[np.int64]:
    """The clip of every conversation, as an index into `clips`; -1 for still images, -2 for what is left out.

    A conversation's `clip` is a clip's id. Without one, its video is a clip's id, or the end of the uri of exactly one
    clip, whole path parts only; of several, the one that lies in the media folder.

    Args:
        conversations: (n) of them.
        clips: columns id and uri.
        media_folder: where the conversations' media lie, if known.
        report: takes conversations whose clip is unknown or one of several.

    Raises:
        RequestError: such a conversation, if problems stop the run.
    """
    table = conversations.table
    finder = _ClipFinder(clips, table, media_folder)
    found = np.full(table.num_rows, _NO_CLIP, np.int64)
    wanted = table.select(["video", "clip"]).to_batches()
    keys = [key for batch in wanted for key in zip(*(column.to_pylist() for column in batch.columns), strict=True)]
    for row, (video, clip) in enumerate(keys):
        if video is None:
            continue
        index, reason = finder.find(video, clip)
        found[row] = index
        if reason:
            name = table.column("id")[row].as_py()
            report.leave_out(reason, f"conversation {name}: video {video!r} {reason}")
            found[row] = _LEFT_OUT
    return found


class _ClipFinder:
    """Clips by id, or by the end of their uri; only those that some conversation could mean are kept."""

    def __init__(self, clips: pa.Table, conversations: pa.Table, media_folder: str | None) -> None:
        self._folder = media_folder
        videos = pc.unique(conversations.column("video")).drop_null()
        named = pc.unique(conversations.column("clip")).drop_null()
        names = pc.replace_substring_regex(videos, r"^.*/", "")
        ids = clips.column("id")
        endings = pc.replace_substring_regex(clips.column("uri"), r"^.*/", "")
        is_id = pc.or_(pc.is_in(ids, videos), pc.is_in(ids, named))
        self._by_id: dict[str, int] = {}
        self._by_name: dict[str, list[tuple[str, int]]] = {}
        for index in np.flatnonzero(is_id.to_numpy()).tolist():
            self._by_id[ids[index].as_py()] = index
        for index in np.flatnonzero(pc.is_in(endings, names).to_numpy()).tolist():
            self._by_name.setdefault(endings[index].as_py(), []).append((clips.column("uri")[index].as_py(), index))
        self._known: dict[tuple[str, str | None], tuple[int, str]] = {}

    def find(self, video: str, clip: str | None) -> tuple[int, str]:
        """Index and "", or anything and why there is none."""
        if (video, clip) not in self._known:
            self._known[video, clip] = self._find(video, clip)
        return self._known[video, clip]

    def _find(self, video: str, clip: str | None) -> tuple[int, str]:
        candidates = [index for uri, index in self._candidates(video)]
        if clip is not None:
            index = self._by_id.get(clip, _LEFT_OUT)
            is_of_video = index in candidates or clip == video
            return index, "" if index >= 0 and is_of_video else "has no such clip in the cache"
        if video in self._by_id:
            return self._by_id[video], ""
        if not candidates:
            return _LEFT_OUT, "is no clip of the cache"
        return candidates[0], "" if len(candidates) == 1 else "fits several clips; name one in `clip`"

    def _candidates(self, video: str) -> list[tuple[str, int]]:
        found = self._by_name.get(video.rsplit("/", 1)[-1], [])
        found = [(uri, index) for uri, index in found if uri == video or uri.endswith(f"/{video}")]
        if len(found) > 1 and self._folder is not None:
            path = os.path.realpath(os.path.join(self._folder, video))
            found = [(uri, index) for uri, index in found if os.path.realpath(uri) == path] or found
        return found


def safe_path(folder: str, path: str) -> str:
    """The file that a path under a folder means, links followed.

    Raises:
        RequestError: it lies outside the folder.
    """
    root = os.path.realpath(folder)
    found = os.path.realpath(os.path.join(root, path))
    if os.path.commonpath([root, found]) != root:
        raise RequestError(f"media path {path!r} leaves the media folder {folder}; media must lie inside it")
    return found


def read_image(source: str | bytes) -> NDArray[np.uint8]:
    """A still image upright, uint8 RGB (h, w, 3), from its file or its bytes; ValueError if it cannot be read."""
    path = source if isinstance(source, str) else f"a picture of {len(source)} bytes"
    try:
        with Image.open(source if isinstance(source, str) else BytesIO(source), formats=_IMAGE_FORMATS) as image:
            if image.width * image.height > _MAX_IMAGE_PIXELS:
                raise _UnreadableError(f"{path} has {image.width} x {image.height} pixels, over {_MAX_IMAGE_PIXELS}")
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError) as error:
        raise _UnreadableError(f"{path} is no image that can be read: {type(error).__name__}") from None
