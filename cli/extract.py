"""`p4dprep extract`: run frozen teachers over a corpus and leave a cache."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TaskID, TextColumn
from rich.table import Table

from cli._output import JsonFlag, StorageOptions, console, human_bytes, human_seconds, print_json, read_yaml
from p4dprep.errors import RequestError

if TYPE_CHECKING:  # Ray and pyarrow take seconds that --help should not cost
    from p4dprep.extract import CostEstimate, ExtractConfig, ExtractReport, GroupProgress

SECONDS_BETWEEN_LOG_LINES = 30.0
WIDTH_FOR_STAGES = 120

EXAMPLES = """
Run frozen TEACHERS over the videos of SOURCE and write their targets into CACHE.

The same command again computes only what is missing; another teacher on the same cache runs alone.

**Examples**

    p4dprep extract videos/ cache/ --teacher opencv-dis

    p4dprep extract videos/ cache/ --teacher l4p:weights/l4p --teacher depth-anything:ORG/NAME@REV --gpus 1

    p4dprep extract videos/ cache/ --teacher l4p:mini --keep-frames 336

    p4dprep extract s3://bucket/clips/*.mp4 s3://bucket/cache --teacher ptlflow:sea_raft_s@kitti --address auto

    p4dprep extract manifest.parquet cache/ --teacher raft=ptlflow:raft_small --fps 8 --stride 8 --plan

Exit code 0: coverage reached; 1: finished below it; 2: the request was wrong.
"""


def extract(
    source: Annotated[
        str | None, typer.Argument(help="Folder, file, glob, URL of those, or manifest (.parquet, .csv, .jsonl).")
    ] = None,
    cache: Annotated[str | None, typer.Argument(help="Folder or URL of the cache; made if there is none.")] = None,
    teacher: Annotated[
        list[str] | None,
        typer.Option("--teacher", "-t", help="[NAME=]KIND[:ARGUMENT][?option=value]; repeat for several."),
    ] = None,
    keep_frames: Annotated[
        str | None,
        typer.Option(help="Keep the frames too, so that training opens no video; pixels: 224 or HEIGHTxWIDTH."),
    ] = None,
    frames: Annotated[int | None, typer.Option(help="Frames per clip.  [default: 16]")] = None,
    fps: Annotated[float | None, typer.Option(help="Cut windows at so many sampled frames per second.")] = None,
    stride: Annotated[int | None, typer.Option(help="Sampled frames between two windows' starts.")] = None,
    size: Annotated[str | None, typer.Option(help="Pixels: 224 or HEIGHTxWIDTH.  [default: 224]")] = None,
    resize: Annotated[
        Literal["squash", "pad"] | None, typer.Option(help="Squash to the size, or fit and pad.  [default: squash]")
    ] = None,
    workers: Annotated[list[str] | None, typer.Option(help="N or NAME=N; by default as many as fit.")] = None,
    batch_size: Annotated[list[str] | None, typer.Option(help="N or NAME=N clips per call of a teacher.")] = None,
    gpus: Annotated[list[str] | None, typer.Option(help="SHARE or NAME=SHARE of a GPU per worker.")] = None,
    coverage: Annotated[
        float | None, typer.Option(help="Share of clips that must be committed for exit code 0.  [default: 1]")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first clips of the source.")] = None,
    retry_failed: Annotated[bool | None, typer.Option("--retry-failed", help="Try failed clips again.")] = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster to join, e.g. auto; else Ray starts here.")] = None,
    allow_http: Annotated[bool | None, typer.Option("--allow-http", help="Permit HTTP(S) sources.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with any of this; flags win.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Time a few clips and print what the job will cost.")] = False,
    storage_options: StorageOptions = None,
    json: JsonFlag = False,
) -> None:
    """Run frozen teachers over a corpus and write their targets into a cache."""
    from p4dprep import extract as engine

    flags = {
        "source": source,
        "cache": cache,
        "teachers": tuple(teacher) if teacher else None,
        "keep_frames": keep_frames,
        "frames": frames,
        "fps": fps,
        "stride": stride,
        "size": size,
        "resize": resize,
        "workers": _per_teacher("workers", workers),
        "batch_size": _per_teacher("batch-size", batch_size),
        "gpus": _per_teacher("gpus", gpus),
        "coverage": coverage,
        "limit": limit,
        "retry_failed": retry_failed,
        "address": address,
        "allow_http": allow_http,
        "storage_options": storage_options,
    }
    request = engine.parse_config(
        (read_yaml(config) if config else {}) | {key: value for key, value in flags.items() if value is not None}
    )
    if plan:
        estimate = engine.estimate_cost(request)
        print_json(estimate) if json else _show_cost(estimate)
        return
    report = run(request)
    print_json(report) if json else show_report(report)
    if report.coverage < request.coverage:
        raise typer.Exit(1)


extract.__doc__ = EXAMPLES


def run(request: "ExtractConfig") -> "ExtractReport":
    """Extract with a progress display on stderr."""
    from p4dprep import extract as engine

    with _progress_display() as show:
        return engine.extract(request, show)


def _per_teacher(option: str, texts: Sequence[str] | None) -> dict[str, str] | None:
    """`4` holds for all, `NAME=4` for one."""
    if not texts:
        return None
    pairs = [text.split("=", 1) if "=" in text else ["all", text] for text in texts]
    if len({name for name, _ in pairs}) != len(pairs):
        raise RequestError(f"--{option} is given twice for one teacher: {', '.join(texts)}")
    return {pair[0]: pair[1] for pair in pairs}


class _Display:
    """A bar per teacher on a terminal; a line now and then in a log."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}
        self._firsts: dict[str, tuple[float, int, int]] = {}
        self._ends: dict[str, float] = {}
        self._last_line = time.monotonic()

    def __call__(self, groups: "list[GroupProgress]") -> None:
        working = [group for group in groups if group.num_todo]
        for group in working:
            self._update(group)
        now = time.monotonic()
        if not console.is_terminal and now - self._last_line >= SECONDS_BETWEEN_LOG_LINES:
            for group in working:
                if self._ends.get(group.name, now) > self._last_line:  # else its last line stands above
                    counts = f"{group.num_ok + group.num_failed}/{group.num_todo} clips"
                    console.print(f"{group.name}: {counts}, {self._rates(group)} ({_stages(group)})", highlight=False)
            self._last_line = now

    def _update(self, group: "GroupProgress") -> None:
        if group.name not in self._tasks:
            self._tasks[group.name] = self._bars.add_task(group.name, total=group.num_todo, rates="", stages="")
        done = group.num_ok + group.num_failed
        self._bars.update(
            self._tasks[group.name], completed=done, rates=self._rates(group), stages=f"[dim]{_stages(group)}"
        )

    def _rates(self, group: "GroupProgress") -> str:
        """Rates from the first result, until which Ray and the teacher were starting, to the last."""
        now, done = time.monotonic(), group.num_ok + group.num_failed
        if done == group.num_todo:
            now = self._ends.setdefault(group.name, now)
        if not done:
            return f"starting {group.num_workers} worker{'s' * (group.num_workers != 1)}"
        start, first_done, first_frames = self._firsts.setdefault(group.name, (now, done, group.num_frames))
        failed = f", [red]{group.num_failed} failed[/]" if group.num_failed else ""
        if done == first_done:
            return f"first results{failed}"
        clips_per_second = (done - first_done) / max(now - start, 1e-3)
        frames_per_second = (group.num_frames - first_frames) / max(now - start, 1e-3)
        left = human_seconds((group.num_todo - done) / clips_per_second)
        return f"{clips_per_second:.2f} clips/s, {frames_per_second:.0f} frames/s, {left} left{failed}"


def _stages(group: "GroupProgress") -> str:
    """Share of the busy time of each stage: what to speed up."""
    busy = sum(group.stage_seconds.values()) or 1.0
    return " ".join(f"{stage} {spent / busy:.0%}" for stage, spent in sorted(group.stage_seconds.items()))


@contextmanager
def _progress_display() -> Iterator[_Display]:
    columns: list[ProgressColumn] = [
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rates]}"),
    ]
    if console.width >= WIDTH_FOR_STAGES:
        columns.append(TextColumn("{task.fields[stages]}"))
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        yield _Display(bars)


def show_report(report: "ExtractReport") -> None:
    """The summary, on one screen."""
    console.print(
        f"[bold]{report.clips} clips[/]: {report.committed} committed, {report.skipped} there before, "
        f"{report.failed} failed, {report.missing} missing; coverage {report.coverage:.1%}; "
        f"{human_seconds(report.seconds)}, {report.clips_per_second:.2f} clips/s, "
        f"{report.frames_per_second:.1f} frames/s"
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("teacher", "committed", "before", "failed", "written", "workers", "busy seconds"):
        table.add_column(name)
    for name, group in report.teachers.items():
        stages = ", ".join(f"{stage} {spent:.1f}" for stage, spent in group.stage_seconds.items())
        counts = map(str, (group.committed, group.skipped, group.failed))
        table.add_row(name, *counts, human_bytes(group.bytes_written), str(group.workers), stages)
    console.print(table)
    for failure in report.failures[:8]:
        console.print(f"  failed: {failure.clip} ({failure.teacher}): {failure.reason}", markup=False, highlight=False)
    if report.failed > 8:
        console.print(f"  and more: {report.failures_by_kind}; p4dprep cache info lists them", markup=False)
    console.print(f"cache: {report.cache}", markup=False, highlight=False)


def _show_cost(estimate: "CostEstimate") -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in (
        "teacher",
        "clips",
        "s/clip",
        "worker hours",
        "dominated by",
        "target",
        "bytes/clip",
        "bytes",
        "objects",
    ):
        table.add_column(name, justify="left" if name in ("teacher", "target", "dominated by") else "right")
    for name, group in estimate.teachers.items():
        first = (
            name,
            str(group.clips_todo),
            f"{group.seconds_per_clip:.3f}",
            f"{group.worker_hours:.2f}",
            group.dominated_by,
        )
        for target, per_clip in group.bytes_per_clip.items():
            total, objects = per_clip * group.clips_todo, f"{group.objects_per_target[target]:,}"
            table.add_row(*first, target, human_bytes(per_clip), human_bytes(total), objects)
            first = ("", "", "", "", "")
    console.print(table)
    console.print(
        f"{estimate.clips} clips: {human_seconds(estimate.seconds_with_workers)} here with "
        f"{estimate.workers} workers, {human_bytes(estimate.num_bytes)}, {estimate.num_objects:,} objects "
        f"(from {estimate.clips_probed} clips timed, {estimate.clips_failed} of them failed)"
    )
