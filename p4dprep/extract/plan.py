"""From a request to what is missing: the corpus in the cache's order, and per teacher the clips still to do."""

import os
import queue
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from p4dprep import corpus, registry
from p4dprep.cache import Cache, ClipStates
from p4dprep.errors import RequestError, StorageError, VideoError
from p4dprep.extract.config import ALL_TEACHERS, ExtractConfig
from p4dprep.extract.fingerprint import group_fingerprint
from p4dprep.extract.frames import KeptFrames, build
from p4dprep.extract.worker import ClipTask, UnitTask, WorkerConfig
from p4dprep.storage import redact
from p4dprep.targets import Resources, Teacher
from p4dprep.video import Decoder, local_copy

MAX_CLIPS_PER_UNIT = 16
MIN_UNITS = 8
UNITS_PER_READ = 64
"""Units whose clips are taken from the corpus at once: each take passes over the whole table."""


@dataclass(frozen=True, kw_only=True)
class GroupPlan:
    """One teacher's part of a job.

    Attributes:
        config: what its workers start from.
        num_workers: asked for, or None for as many as fit.
        todo: cache indices to do, ascending, int64.
        num_ok_before: requested clips that it had committed already.
        failed_before: requested clips that failed before and are not tried again, with failure and reason.
    """

    config: WorkerConfig
    num_workers: int | None
    todo: NDArray[np.int64]
    num_ok_before: int
    failed_before: dict[int, tuple[str, str]]

    def on(self, num_gpus: float) -> Self:
        """The same with the workers' GPU share decided, on a machine or cluster with so many GPUs."""
        return replace(self, config=replace(self.config, resources=self.config.resources.on(num_gpus)))


@dataclass(frozen=True, kw_only=True)
class JobPlan:
    """What a job does.

    Attributes:
        cache: where it goes.
        corpus: the requested clips; row i is clip `indices[i]` of the cache.
        indices: int64, one per row of the corpus, unique.
        complete_before: bool, one per row: every teacher of the job had committed it already.
        groups: one per teacher.
        states: what every teacher of the cache, in this job or not, had done before, by name.
    """

    cache: Cache
    corpus: pa.Table = field(repr=False)
    indices: NDArray[np.int64]
    complete_before: NDArray[np.bool_]
    groups: tuple[GroupPlan, ...]
    states: Mapping[str, ClipStates] = field(repr=False)

    def num_units(self, group: GroupPlan) -> int:
        """Units that have something to do for a teacher."""
        return len(np.unique(group.todo // self.cache.clips_per_unit))

    def tasks(self, group: GroupPlan) -> Iterator[UnitTask]:
        """The group's missing clips as units, made one by one: a plan of a million clips stays an array."""
        per_unit = self.cache.clips_per_unit
        row_of_index = np.argsort(self.indices, kind="stable")
        rows = row_of_index[np.searchsorted(self.indices[row_of_index], group.todo)]
        starts = [*np.flatnonzero(np.diff(group.todo // per_unit, prepend=-1)).tolist(), len(rows)]
        for first in range(0, len(starts) - 1, UNITS_PER_READ):
            bounds = starts[first : first + UNITS_PER_READ + 1]
            clips = self._clip_tasks(group.todo[bounds[0] : bounds[-1]], rows[bounds[0] : bounds[-1]])
            for start, stop in pairwise(bound - bounds[0] for bound in bounds):
                unit = clips[start].index // per_unit
                yield UnitTask(group=group.config.group, unit=unit, clips=tuple(clips[start:stop]))

    def _clip_tasks(self, indices: NDArray[np.int64], rows: NDArray[np.int64]) -> list[ClipTask]:
        columns = _take(self.corpus.select(["id", "uri", "start_seconds", "end_seconds"]), rows).to_pylist()
        return [
            ClipTask(index=index, source_digest=self._source_digest(index), **row)
            for index, row in zip(indices.tolist(), columns, strict=True)
        ]

    def _source_digest(self, index: int) -> str:
        """Digest of the video that an earlier teacher read, from its commit record."""
        for states in self.states.values():
            result = states.load(index) if index < len(states.ok) and states.ok[index] else None
            if result is not None:
                return result.source_digest
        return ""


def _take(table: pa.Table, rows: NDArray[np.int64]) -> pa.Table:
    """Rows of a table. A run of neighbours, the usual case, is a view; any other choice copies the whole table."""
    is_run = bool((np.diff(rows) == 1).all())
    return table.slice(int(rows[0]), len(rows)) if is_run else table.take(rows)


def make_plan(config: ExtractConfig) -> JobPlan:
    """Find the clips, extend the cache's corpus by the new ones, register the teachers, list what is missing.

    Raises:
        RequestError: a source, teacher or geometry that cannot be.
        FingerprintMismatchError: the cache was made with another sampling or, under this name, another teacher.
        StorageError: the cache cannot be written.
    """
    sampling = config.sampling
    named = _named_teachers(config.producers)
    _check_names(config, {spec.name for spec in named})
    teachers = [(spec, build(spec)) for spec in named]
    for _, teacher in teachers:
        teacher.targets(sampling.geometry())  # a geometry the teacher refuses is said before any work
    table = find_corpus(config)
    per_unit = max(1, min(MAX_CLIPS_PER_UNIT, len(table) // MIN_UNITS))
    cache = Cache.create(config.cache, sampling, clips_per_unit=per_unit, storage_options=config.storage_options)
    workers = [_worker(config, spec, teacher, _register(cache, spec, teacher)) for spec, teacher in teachers]
    indices = cache.extend(_without_secrets(table))
    states = {name: cache.group(name).states() for name in cache.groups()}
    return JobPlan(
        cache=cache,
        corpus=table,
        indices=indices,
        complete_before=np.logical_and.reduce([states[worker.group].ok[indices] for worker, _ in workers]),
        groups=tuple(
            _plan_group(config, worker, num_workers, states[worker.group], indices) for worker, num_workers in workers
        ),
        states=states,
    )


def find_corpus(config: ExtractConfig) -> pa.Table:
    """The requested clips; with `fps`, one row per window, videos of unknown length probed."""
    table = corpus.discover(config.source, storage_options=config.storage_options, allow_http=config.allow_http)
    if config.limit is not None:
        table = table.slice(0, config.limit)
    if config.sampling.plan == "windows":
        table = corpus.expand_windows(table, config.sampling, lambda uris: probe_spans(uris, config))
    return table


def probe_spans(uris: Sequence[str], config: ExtractConfig) -> list[tuple[float, float] | None]:
    """First and last moment of each video in seconds, None where it cannot be read; one decoder per CPU."""
    decoders: queue.SimpleQueue[Decoder] = queue.SimpleQueue()
    num_threads = os.cpu_count() or 1
    for _ in range(num_threads):
        decoders.put(Decoder())

    def probe(uri: str) -> tuple[float, float] | None:
        decoder = decoders.get()
        try:
            with local_copy(uri, config.storage_options) as video:
                return decoder.time_span(video.path)
        except (VideoError, StorageError):
            return None
        finally:
            decoders.put(decoder)

    try:
        with ThreadPoolExecutor(num_threads) as pool:
            return list(pool.map(probe, uris))
    finally:
        for _ in range(num_threads):
            decoders.get().close()


def _named_teachers(texts: Sequence[str]) -> list[registry.TeacherSpec]:
    specs = [registry.parse_teacher(text) for text in texts]
    names = [spec.name for spec in specs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RequestError(
            f"two teachers are named {twice[0]}; name one: --teacher NAME={specs[names.index(twice[0])].kind}..."
        )
    return specs


def _check_names(config: ExtractConfig, names: set[str]) -> None:
    for setting in ("workers", "batch_size", "gpus"):
        unknown = sorted(set(getattr(config, setting)) - names - {ALL_TEACHERS})
        if unknown:
            raise RequestError(
                f"{setting} names {unknown[0]}, which is no teacher of this job ({', '.join(sorted(names))})"
            )


def _register(cache: Cache, spec: registry.TeacherSpec, teacher: Teacher) -> registry.TeacherSpec:
    """Add the teacher's group with its frozen heads; the spec returned names the very same weights on any node."""
    argument, options = teacher.resolved_spec()
    resolved = replace(spec, argument=argument, options=options)
    fingerprint = group_fingerprint(spec.kind, teacher, cache.sampling)
    if not _is_registered(cache, spec.name, fingerprint):
        unnamed = registry.parse_teacher(spec.kind).name
        targets = teacher.targets(cache.sampling.geometry())
        with tempfile.TemporaryDirectory() as folder:
            heads = Path(folder) if teacher.export_heads(Path(folder)) else None
            cache.add_group(spec.name, str(replace(resolved, name=unnamed)), fingerprint, targets, heads_folder=heads)
    return resolved


def _is_registered(cache: Cache, name: str, fingerprint: Mapping[str, str]) -> bool:
    """Whether the very same group is there with its heads, so that they need not be read from the weights again."""
    if name not in cache.groups() or dict(cache.group(name).fingerprint) != dict(fingerprint):
        return False
    sizes = cache.store.list(f"heads/{name}")
    return all(sizes.get(head.key) == head.size_bytes for head in cache.group(name).manifest.heads)


def _without_secrets(table: pa.Table) -> pa.Table:
    """The corpus as the cache keeps it: a presigned URL without its signature. Workers get the URL itself."""
    suspicious = pc.match_substring_regex(table["uri"], "[?@]")
    if not pc.any(suspicious).as_py():
        return table
    uris = pa.array([redact(uri) for uri in table["uri"].to_pylist()], pa.string())
    return table.set_column(table.column_names.index("uri"), "uri", uris)


def _worker(
    config: ExtractConfig, spec: registry.TeacherSpec, teacher: Teacher, resolved: registry.TeacherSpec
) -> tuple[WorkerConfig, int | None]:
    worker = WorkerConfig(
        cache_url=config.cache,
        group=spec.name,
        teacher=resolved,
        resources=_resources(config, spec.name, teacher),
        storage_options=config.storage_options,
    )
    return worker, config.workers.get(spec.name, config.workers.get(ALL_TEACHERS))


def _plan_group(
    config: ExtractConfig,
    worker: WorkerConfig,
    num_workers: int | None,
    states: ClipStates,
    indices: NDArray[np.int64],
) -> GroupPlan:
    wanted = np.sort(indices)
    done = states.ok[wanted]
    kept_failed = states.failed[wanted] & ~done & (not config.retry_failed)
    return GroupPlan(
        config=worker,
        num_workers=num_workers,
        todo=wanted[~done & ~kept_failed],
        num_ok_before=int(done.sum()),
        failed_before={int(index): states.reasons[int(index)] for index in wanted[kept_failed]},
    )


def _resources(config: ExtractConfig, name: str, teacher: Teacher) -> Resources:
    declared = teacher.resources
    # What is asked for all teachers is not meant for frames: a GPU would keep others waiting, a batch gains nothing.
    for_all = name if isinstance(teacher, KeptFrames) else ALL_TEACHERS
    return replace(
        declared,
        batch_size=config.batch_size.get(name, config.batch_size.get(for_all, declared.batch_size)),
        num_gpus=config.gpus.get(name, config.gpus.get(for_all, declared.num_gpus)),
    )
