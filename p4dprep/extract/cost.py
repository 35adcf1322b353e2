"""What a job will cost: a few clips of the corpus are really extracted into a temporary cache and measured."""

import os
import random
import tempfile
import time
from collections import Counter
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from p4dprep.cache import Cache
from p4dprep.corpus import write_manifest
from p4dprep.errors import CacheFormatError
from p4dprep.extract.config import ExtractConfig
from p4dprep.extract.plan import GroupPlan, JobPlan, find_corpus, make_plan
from p4dprep.extract.worker import UnitReport, Worker

NUM_PROBES = 5
"""Clips timed per teacher; the first one also pays for warm-up and is left out of the times."""


@dataclass(frozen=True, kw_only=True)
class TeacherCost:
    """One teacher's cost. Bytes and objects are of stored arrays; seconds are of one worker without neighbours."""

    clips_todo: int
    seconds_per_clip: float
    stage_seconds_per_clip: dict[str, float]
    dominated_by: str
    worker_hours: float
    bytes_per_clip: dict[str, int]
    objects_per_target: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class CostEstimate:
    """A whole job's cost on this machine. A cluster divides `worker_hours` by its workers."""

    clips: int
    clips_probed: int
    clips_failed: int
    workers: int
    seconds_with_workers: float
    num_bytes: int
    num_objects: int
    teachers: dict[str, TeacherCost]


def estimate_cost(config: ExtractConfig) -> CostEstimate:
    """Extract a few clips, spread over the corpus by a fixed seed, into a temporary cache, and scale up.

    The cache asked for is only read, to leave out what it has.

    Raises:
        RequestError: as `make_plan`.
        TeacherError: a teacher cannot be set up here.
    """
    table = find_corpus(config)
    with tempfile.TemporaryDirectory() as folder:
        plan = make_plan(_probe_config(config, table, folder))
        costs = {group.config.group: _measure(plan, group, config, table) for group in plan.groups}
    workers = os.cpu_count() or 1
    objects = sum(sum(cost.objects_per_target.values()) for cost, _ in costs.values())
    return CostEstimate(
        clips=len(table),
        clips_probed=len(plan.indices),
        clips_failed=max((num_failed for _, num_failed in costs.values()), default=0),
        workers=workers,
        seconds_with_workers=sum(cost.worker_hours for cost, _ in costs.values()) * 3600 / workers,
        num_bytes=sum(sum(cost.bytes_per_clip.values()) * cost.clips_todo for cost, _ in costs.values()),
        num_objects=objects,
        teachers={name: cost for name, (cost, _) in costs.items()},
    )


def _probe_config(config: ExtractConfig, table: pa.Table, folder: str) -> ExtractConfig:
    """The same request for a few of its clips and a cache of their own. Windows are cut already."""
    rows = sorted(random.Random(0).sample(range(len(table)), min(NUM_PROBES, len(table))))  # noqa: S311
    manifest = f"{folder}/probes.parquet"
    write_manifest(table.take(rows), manifest)
    return config.model_copy(update={"source": manifest, "cache": f"{folder}/cache", "limit": None})


def _measure(plan: JobPlan, group: GroupPlan, config: ExtractConfig, table: pa.Table) -> tuple[TeacherCost, int]:
    """Cost of a teacher, and how many of the clips failed. The first clip also pays for warm-up and is not timed,
    unless it is the only one."""
    first, *rest = plan.tasks(group)
    worker = Worker(group.on(0 if group.config.resources.num_gpus == 0 else _num_gpus_here()).config)
    try:
        start = time.perf_counter()
        warm_up = worker.run(first)
        if rest:
            start = time.perf_counter()
        timed = [worker.run(task) for task in rest] or [warm_up]
        seconds = time.perf_counter() - start
    finally:
        worker.close()
    num_failed = len(warm_up.failed) + sum(len(report.failed) for report in timed if report is not warm_up)
    return _scale_up(plan, group, timed, seconds, _num_todo(config, group.config.group, table)), num_failed


def _num_gpus_here() -> int:
    import torch  # seconds that a job does not need to spend in the driver

    return torch.cuda.device_count()


def _scale_up(plan: JobPlan, group: GroupPlan, reports: list[UnitReport], seconds: float, num_todo: int) -> TeacherCost:
    num_timed = max(1, sum(len(report.ok) + len(report.failed) for report in reports))
    names = {stage for report in reports for stage in report.stage_seconds}
    stages = {stage: sum(report.stage_seconds.get(stage, 0.0) for report in reports) for stage in names}
    states = plan.cache.group(group.config.group).states()
    ok = [index for index in plan.indices.tolist() if states.ok[index]]
    num_bytes: Counter[str] = Counter()
    num_objects: Counter[str] = Counter()
    for record in (record for index in ok for record in states.objects(index)):
        num_bytes[record.array] += record.size_bytes
        num_objects[record.array] += 1
    return TeacherCost(
        clips_todo=num_todo,
        seconds_per_clip=seconds / num_timed,
        stage_seconds_per_clip={stage: spent / num_timed for stage, spent in stages.items()},
        dominated_by=max(stages, key=lambda stage: stages[stage]),
        worker_hours=seconds / num_timed * num_todo / 3600,
        bytes_per_clip={array: round(total / len(ok)) for array, total in num_bytes.items()},
        objects_per_target={array: round(count / len(ok) * num_todo) for array, count in num_objects.items()},
    )


def _num_todo(config: ExtractConfig, group: str, table: pa.Table) -> int:
    """Clips of the corpus that the cache asked for lacks."""
    try:
        cache = Cache.open(config.cache, config.storage_options)
    except CacheFormatError:
        return len(table)
    if group not in cache.groups():
        return len(table)
    done = cache.clips().filter(pa.array(cache.group(group).states().ok))
    return len(table) - int(pc.sum(pc.is_in(table["id"], done["id"].combine_chunks())).as_py() or 0)
