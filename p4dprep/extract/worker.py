"""One worker of one teacher: decodes ahead, infers, encodes and writes in threads. It knows nothing of Ray.

A worker takes units and commits them itself; only ids and small records leave it.
"""

import logging
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import numpy as np

from p4dprep import registry
from p4dprep.cache import Cache, ClipResult, Group
from p4dprep.corpus import Sampling
from p4dprep.errors import (
    FingerprintMismatchError,
    StorageError,
    TeacherError,
    TeacherOutputError,
    VideoError,
)
from p4dprep.extract.fingerprint import group_fingerprint
from p4dprep.extract.frames import build
from p4dprep.targets import FrameBatch, Predictions, Resources, Teacher, check_predictions
from p4dprep.video import ClipFrames, Decoder, local_copy

log = logging.getLogger(__name__)

MAX_FAULTS_IN_A_ROW = 8
"""So many clips in a row that fail for a reason that is not theirs stop the job: a broken GPU or bucket must not
turn a corpus into a list of failed clips."""
NUM_WRITERS = 2
MAX_QUEUED_WRITES = 4


@dataclass(frozen=True, kw_only=True)
class ClipTask:
    """One clip to do. `source_digest` is what an earlier teacher read, empty if none has."""

    index: int
    id: str
    uri: str
    start_seconds: float | None
    end_seconds: float | None
    source_digest: str = ""


@dataclass(frozen=True, kw_only=True)
class UnitTask:
    """Clips of one unit for one teacher. `num_deaths` counts the workers that died with it in hand."""

    group: str
    unit: int
    clips: tuple[ClipTask, ...]
    num_deaths: int = 0


@dataclass(frozen=True, kw_only=True)
class UnitReport:
    """What became of a unit: small enough to travel."""

    group: str
    unit: int
    ok: tuple[int, ...]
    failed: Mapping[int, tuple[str, str]]
    num_frames: int
    num_bytes: int
    stage_seconds: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """All a worker needs to start anywhere, the GPU share decided. Storage options stay out of `repr`."""

    cache_url: str
    group: str
    teacher: registry.TeacherSpec
    resources: Resources
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, kw_only=True)
class _Decoded:
    clip: ClipTask
    frames: ClipFrames | None
    digest: str
    failure: tuple[str, str] | None = None


class _Stopwatch:
    """Busy seconds per stage, added up over threads."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._lock = threading.Lock()

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self.seconds[stage] += time.perf_counter() - start


class Worker:
    """A teacher with its decoders and writers. `run` may be called from several threads: while one unit infers,
    the next one decodes.

    Raises:
        TeacherError: the teacher cannot be set up here, or its fingerprint differs from the cache's.
    """

    def __init__(self, config: WorkerConfig) -> None:
        self._storage_options = config.storage_options
        cache = Cache.open(config.cache_url, config.storage_options)
        self._group: Group = cache.group(config.group)
        self._batch_size = config.resources.batch_size
        self._teacher: Teacher = build(config.teacher)
        self._refuse_other_weights(config, cache.sampling)
        height, width = self._teacher.frame_size(cache.sampling.geometry())
        self._sampling = replace(cache.sampling, height=height, width=width)
        self._teacher.setup("cuda:0" if config.resources.num_gpus else "cpu")
        self._teacher_lock = threading.Lock()
        self._writers = ThreadPoolExecutor(NUM_WRITERS, thread_name_prefix="write")
        self._write_slots = threading.BoundedSemaphore(MAX_QUEUED_WRITES)
        self._decoders: queue.SimpleQueue[Decoder] = queue.SimpleQueue()
        self._num_faults_in_a_row = 0

    def _refuse_other_weights(self, config: WorkerConfig, sampling: Sampling) -> None:
        found = group_fingerprint(config.teacher.kind, self._teacher, sampling)
        recorded = dict(self._group.fingerprint)
        differing = sorted(key for key in found | recorded if found.get(key) != recorded.get(key))
        if differing:
            raise FingerprintMismatchError(
                f"this worker's {config.group} differs from the cache's in {', '.join(differing)}; "
                "every node must have the same weights and the same p4dprep"
            )

    def run(self, task: UnitTask) -> UnitReport:
        """Do a unit and commit it. A clip that fails is recorded with its reason.

        Raises:
            StorageError: the cache cannot be written.
            TeacherError: the teacher failed `MAX_FAULTS_IN_A_ROW` times in a row; nothing of this unit is committed.
        """
        watch = _Stopwatch()
        results: list[Future[ClipResult]] = []
        for batch in _batches(self._decode_ahead(task, watch), self._batch_size):
            results += self._infer(batch, watch)
        done = [future.result() for future in results]
        with watch.measure("write"):
            self._group.commit(task.unit, done)
        return _report(task, done, self._sampling.num_frames, watch)

    def close(self) -> None:
        """Stop threads and decoders, let go of the teacher."""
        self._writers.shutdown(wait=False, cancel_futures=True)
        while not self._decoders.empty():
            self._decoders.get().close()
        self._teacher.close()

    # Decoding

    @contextmanager
    def _decoder(self) -> Iterator[Decoder]:
        """A decoder of our own for a while; its child process is kept for the next unit."""
        decoder = Decoder() if self._decoders.empty() else self._decoders.get()
        try:
            yield decoder
        finally:
            self._decoders.put(decoder)

    def _decode_ahead(self, task: UnitTask, watch: _Stopwatch) -> Iterator[_Decoded]:
        """Clips of the unit, decoded in a thread that stays at most two batches ahead."""
        ready: queue.Queue[_Decoded | BaseException | None] = queue.Queue(maxsize=2 * self._batch_size)
        stop = threading.Event()

        def decode() -> None:
            try:
                for decoded in self._decode(task.clips, watch):
                    _put(ready, decoded, stop)
                _put(ready, None, stop)
            except BaseException as error:
                _put(ready, error, stop)

        thread = threading.Thread(target=decode, name="decode", daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            thread.join()

    def _decode(self, clips: Sequence[ClipTask], watch: _Stopwatch) -> Iterator[_Decoded]:
        with self._decoder() as decoder:
            for uri, same_source in groupby(clips, key=lambda clip: clip.uri):
                yield from self._decode_source(decoder, uri, tuple(same_source), watch)

    def _decode_source(
        self, decoder: Decoder, uri: str, clips: tuple[ClipTask, ...], watch: _Stopwatch
    ) -> Iterator[_Decoded]:
        """All clips of one video in one pass over its file."""
        frames: Sequence[ClipFrames | VideoError | StorageError]
        digest = ""
        try:
            with ExitStack() as stack:
                with watch.measure("fetch"):
                    video = stack.enter_context(local_copy(uri, self._storage_options))
                digest = video.digest
                with watch.measure("decode"):
                    frames = decoder.read_many(
                        video.path, self._sampling, [(clip.start_seconds, clip.end_seconds) for clip in clips]
                    )
        except VideoError as error:
            frames = [error] * len(clips)
        except StorageError as error:
            self._count_fault(error)
            frames = [error] * len(clips)
        for clip, found in zip(clips, frames, strict=True):
            yield _decoded(clip, found, digest)

    # Inference

    def _infer(self, batch: Sequence[_Decoded], watch: _Stopwatch) -> list[Future[ClipResult]]:
        good = [item for item in batch if item.frames is not None]
        outcomes: dict[int, Predictions | tuple[str, str]] = {}
        if good:
            with self._teacher_lock, watch.measure("infer"):
                outcomes = self._predict(good)
        return [self._finish(item, outcomes.get(item.clip.index), watch) for item in batch]

    def _predict(self, items: Sequence[_Decoded]) -> dict[int, Predictions | tuple[str, str]]:
        """Predictions of a batch; where it fails, each clip alone, so that one clip cannot fail its neighbours."""
        batch = _frame_batch(items)
        try:
            predictions = self._teacher.predict(batch)
            check_predictions(predictions, batch, self._group.targets)
        except Exception as error:
            if len(items) > 1:
                return {index: found for item in items for index, found in self._predict([item]).items()}
            return {items[0].clip.index: self._fault(error)}
        self._num_faults_in_a_row = 0
        rows = {name: np.asarray(array) for name, array in predictions.arrays.items()}
        return {
            item.clip.index: Predictions(clip_ids=(item.clip.id,), arrays={name: rows[name][i] for name in rows})
            for i, item in enumerate(items)
        }

    def _fault(self, error: Exception) -> tuple[str, str]:
        """The record of a clip the teacher could not do."""
        if isinstance(error, TeacherOutputError):
            return "bad_output", str(error)
        self._count_fault(error)
        log.warning("teacher failed on a clip", exc_info=error)
        return "teacher_raised", f"the teacher raised {_first_line(error)}"

    def _count_fault(self, error: Exception) -> None:
        """Count a failure that need not be the clip's own.

        Raises:
            TeacherError: too many in a row for the clips to be to blame.
        """
        self._num_faults_in_a_row += 1
        if self._num_faults_in_a_row >= MAX_FAULTS_IN_A_ROW:
            raise TeacherError(
                f"{self._group.name}: {MAX_FAULTS_IN_A_ROW} clips in a row failed for no reason of their own, "
                f"last: {_first_line(error)}"
            ) from error

    # Writing

    def _finish(
        self, item: _Decoded, outcome: Predictions | tuple[str, str] | None, watch: _Stopwatch
    ) -> Future[ClipResult]:
        if isinstance(outcome, Predictions):
            self._write_slots.acquire()
            future = self._writers.submit(self._write, item, outcome, watch)
            future.add_done_callback(lambda _: self._write_slots.release())
            return future
        failed: Future[ClipResult] = Future()
        failed.set_result(_failed(item, outcome or item.failure or ("unknown", "no reason was given")))
        return failed

    def _write(self, item: _Decoded, predictions: Predictions, watch: _Stopwatch) -> ClipResult:
        assert item.frames is not None  # noqa: S101
        with watch.measure("write"):
            try:
                for spec in self._group.targets:
                    spec.check(predictions.arrays[spec.name], item.clip.id)
                objects = self._group.write_clip(item.clip.index, predictions.arrays, item.frames.time_seconds_t)
            except TeacherOutputError as error:
                return _failed(item, ("bad_output", str(error)))
            except VideoError as error:
                return _failed(item, (error.failure, str(error)))
        return ClipResult(
            index=item.clip.index,
            id=item.clip.id,
            status="ok",
            source_digest=item.digest,
            num_distinct_frames=item.frames.num_distinct_frames,
            objects=objects,
        )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:500]


def _put(ready: "queue.Queue[Any]", item: object, stop: threading.Event) -> None:
    """Put, unless the reader has gone."""
    while not stop.is_set():
        try:
            ready.put(item, timeout=0.1)
        except queue.Full:
            continue
        return


def _decoded(clip: ClipTask, found: ClipFrames | VideoError | StorageError, digest: str) -> _Decoded:
    if isinstance(found, StorageError):
        return _Decoded(clip=clip, frames=None, digest=digest, failure=("unreadable", str(found)))
    if isinstance(found, VideoError):
        return _Decoded(clip=clip, frames=None, digest=digest, failure=(found.failure, str(found)))
    if clip.source_digest and clip.source_digest != digest:
        reason = f"the source changed since another teacher read it: {clip.source_digest[:19]} then, {digest[:19]} now"
        return _Decoded(clip=clip, frames=None, digest=digest, failure=("source_changed", reason))
    return _Decoded(clip=clip, frames=found, digest=digest)


def _batches(items: Iterator[_Decoded], size: int) -> Iterator[list[_Decoded]]:
    """Batches of up to `size` clips that have frames; failed clips ride along."""
    batch: list[_Decoded] = []
    for item in items:
        batch.append(item)
        if sum(clip.frames is not None for clip in batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _frame_batch(items: Sequence[_Decoded]) -> FrameBatch:
    frames = [item.frames for item in items if item.frames is not None]
    return FrameBatch(
        clip_ids=tuple(item.clip.id for item in items),
        frames_bthwc=np.stack([clip.frames_thwc for clip in frames]),
        time_seconds_bt=np.stack([clip.time_seconds_t for clip in frames]),
    )


def _failed(item: _Decoded, why: tuple[str, str]) -> ClipResult:
    failure, reason = why
    return ClipResult(
        index=item.clip.index,
        id=item.clip.id,
        status="failed",
        failure=failure,
        reason=reason,
        source_digest=item.digest,
    )


def _report(task: UnitTask, results: Sequence[ClipResult], num_frames: int, watch: _Stopwatch) -> UnitReport:
    ok = tuple(result.index for result in results if result.status == "ok")
    return UnitReport(
        group=task.group,
        unit=task.unit,
        ok=ok,
        failed={result.index: (result.failure, result.reason) for result in results if result.status == "failed"},
        num_frames=num_frames * len(ok),
        num_bytes=sum(record.size_bytes for result in results for record in result.objects),
        stage_seconds=dict(watch.seconds),
    )
