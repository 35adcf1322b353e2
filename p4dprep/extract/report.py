"""What a job did, counted from the commit records, not from what workers said."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from p4dprep.extract.job import GroupProgress
from p4dprep.extract.plan import JobPlan
from p4dprep.storage import redact

MAX_FAILURES_LISTED = 20


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One clip that one teacher could not do."""

    clip: str
    teacher: str
    failure: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class TeacherReport:
    """One teacher's share of a job; `stage_seconds` are busy seconds summed over its workers and threads."""

    teacher: str
    committed: int
    skipped: int
    failed: int
    frames: int
    bytes_written: int
    workers: int
    worker_deaths: int
    stage_seconds: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class ExtractReport:
    """A finished job. `clips == committed + skipped + failed + missing`, always.

    Attributes:
        clips: asked for.
        committed: complete now, for every teacher asked for, and not before.
        skipped: complete before.
        failed: with at least one teacher that could not do it; the reasons stand in the cache.
        missing: neither; the job was cut short.
        seconds: wall-clock of the whole command's work, Ray's start included.
        clips_per_second: committed over seconds.
        frames_per_second: frames given to teachers over seconds.
        coverage: share of clips that are complete.
        cache: where it is, without credentials.
        teachers: per teacher name.
        failures_by_kind: clips per kind of failure, summed over teachers.
        failures: the first ones, with reasons.
    """

    clips: int
    committed: int
    failed: int
    skipped: int
    missing: int
    seconds: float
    clips_per_second: float
    frames_per_second: float
    coverage: float
    cache: str
    teachers: dict[str, TeacherReport]
    failures_by_kind: dict[str, int]
    failures: list[Failure] = field(default_factory=list)


def make_report(plan: JobPlan, progress: Sequence[GroupProgress], seconds: float) -> ExtractReport:
    """Count the cache's records for the requested clips."""
    states = {group.config.group: plan.cache.group(group.config.group).states() for group in plan.groups}
    complete = np.logical_and.reduce([state.ok[plan.indices] for state in states.values()])
    failed = np.logical_or.reduce([(state.failed & ~state.ok)[plan.indices] for state in states.values()]) & ~complete
    failures = _failures(plan, progress)
    num_frames = sum(group.num_frames for group in progress)
    committed = int((complete & ~plan.complete_before).sum())
    return ExtractReport(
        clips=len(plan.indices),
        committed=committed,
        failed=int(failed.sum()),
        skipped=int(plan.complete_before.sum()),
        missing=int((~complete & ~failed).sum()),
        seconds=round(seconds, 3),
        clips_per_second=round(committed / seconds, 4),
        frames_per_second=round(num_frames / seconds, 3),
        coverage=float(complete.mean()) if len(complete) else 1.0,
        cache=plan.cache.store.url,
        teachers=_teacher_reports(plan, progress),
        failures_by_kind=dict(Counter(failure.failure for failure in failures).most_common()),
        failures=failures[:MAX_FAILURES_LISTED],
    )


def _teacher_reports(plan: JobPlan, progress: Sequence[GroupProgress]) -> dict[str, TeacherReport]:
    by_name = {group.name: group for group in progress}
    return {
        group.config.group: TeacherReport(
            teacher=redact(str(group.config.teacher)),
            committed=(done := by_name[group.config.group]).num_ok,
            skipped=group.num_ok_before,
            failed=done.num_failed + len(group.failed_before),
            frames=done.num_frames,
            bytes_written=done.num_bytes,
            workers=done.num_workers,
            worker_deaths=done.num_deaths,
            stage_seconds={stage: round(spent, 3) for stage, spent in sorted(done.stage_seconds.items())},
        )
        for group in plan.groups
    }


def _failures(plan: JobPlan, progress: Sequence[GroupProgress]) -> list[Failure]:
    """Every failure the job met or found, in the cache's order."""
    row_of_index = dict(zip(plan.indices.tolist(), range(len(plan.indices)), strict=True))
    ids = plan.corpus["id"]
    before = {group.config.group: group.failed_before for group in plan.groups}
    return [
        Failure(clip=ids[row_of_index[index]].as_py(), teacher=group.name, failure=kind, reason=redact(why))
        for group in progress
        for index, (kind, why) in sorted((before[group.name] | group.failed).items())
    ]
