"""`p4dprep report`: a run's page with coverage, timing, maps by the truth, answers and worst cases on it."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from p4dprep.cache import Cache, GroupInfo, info
from p4dprep.errors import P4DError, RequestError
from p4dprep.storage import redact
from student import run_folder
from student.maps import Progress, judge_maps
from student.page import Record, Section, Table, make_curve, make_panel, read_records, write_page
from student.report_answers import answers_section, read_answered, worst_section
from student.report_maps import maps_section

REPORT_PAGE = "report.html"


@dataclass(frozen=True, kw_only=True)
class ReportRequest:
    """What a report is made of.

    Attributes:
        run: folder of `p4dprep train`.
        out: the page; None is RUN/report.html.
        cache: whose coverage is shown beside that of the run's cache, and whose clips the student sees; None is the
            run's alone.
        against: the cache by which maps are judged; None judges none.
        answers: folders of `p4dprep eval answers`.
        data: folders of their benchmarks, for what was shown in the worst cases.
        limit: judge the maps of so many clips only.
        storage_options: passed to fsspec; held in memory only.
    """

    run: Path
    out: Path | None = None
    cache: str | None = None
    against: str | None = None
    answers: tuple[Path, ...] = ()
    data: tuple[Path, ...] = ()
    limit: int | None = None
    storage_options: Mapping[str, Any] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.data and not self.answers:
            raise RequestError(f"--data {self.data[0]} needs --answers: it draws their worst cases")
        if self.limit is not None and self.against is None:
            raise RequestError("--limit needs --against: it says how many clips' maps are judged")

    @property
    def page(self) -> Path:
        """Where the page goes."""
        return self.run / REPORT_PAGE if self.out is None else self.out


def write_report(request: ReportRequest, on_progress: Progress = lambda *_: None) -> Path:
    """Write the page and return its path.

    Args:
        request: what it is made of.
        on_progress: told of maps that are predicted and judged.

    Raises:
        RequestError: no run, a result that is none, or as `student.maps.judge_maps`.
        CacheError: a cache that was named cannot be read.
        CorruptDataError: a log, an answer or a committed object is damaged.
    """
    run = request.run
    settings, records = run_folder.read_settings(run), read_records(run)
    results = [read_answered(folder) for folder in request.answers]
    below = [_maps(request, on_progress)] if request.against is not None else []
    if results:
        below += [answers_section(results), worst_section(results, request.data)]
    headline = [(f"{each.said['bench']}, {each.name}", f"{each.result.table[0].value:.1f}%")
                for each in results if each.result.table]  # fmt: skip
    page, above = request.page, [_coverage(request, settings), _timing(run, settings, records)]
    made_of = Table(title="Made of", columns=(), rows=tuple(_identity(run)))
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        return write_page(run, page, facts=headline, above=above, below=below, tables=[made_of])
    except OSError as error:
        raise RequestError(f"cannot write {page}: {error.strerror or error}") from None


def _maps(request: ReportRequest, on_progress: Progress) -> Section:
    truth = Cache.open(str(request.against), request.storage_options)
    with tempfile.TemporaryDirectory(prefix="p4dprep-") as folder:
        maps = judge_maps(
            request.run,
            truth,
            folder,
            cache=request.cache,
            limit=request.limit,
            storage_options=request.storage_options,
            on_progress=on_progress,
        )
        section = maps_section(maps, truth)
        maps.data.close()
    return section


def _coverage(request: ReportRequest, settings: Mapping[str, Any]) -> Section:
    """Clips of every group that are there, failed or missing, and why; samples that were used and left out."""
    places = dict.fromkeys(str(place) for place in (settings.get("cache"), request.cache) if place)
    tables, notes = [], []
    for place in places:
        try:
            groups = info(Cache.open(place, request.storage_options)).groups
        except P4DError as error:
            if place == request.cache:
                raise
            notes.append(f"The run's cache cannot be read any more: {redact(str(error))}")
            continue
        tables += _group_tables(redact(place), groups)
    ended = _ended(request.run)
    if ended:
        notes.append(f"Trained on {ended['left_out']}")
    else:
        notes.append("The run has not ended: how many samples it uses and leaves out is written at its end.")
    return Section(title="Coverage", notes=tuple(notes), tables=tuple(tables))


def _group_tables(place: str, groups: Sequence[GroupInfo]) -> list[Table]:
    counts = [(each.num_committed, each.num_failed, each.num_missing) for each in groups]
    rows = [
        (each.name, redact(each.teacher), *map(str, count), f"{count[0] / max(1, sum(count)):.1%}")
        for each, count in zip(groups, counts, strict=True)
    ]
    failures = [
        (each.name, str(count), failure, redact(each.example_reasons[failure]))
        for each in groups
        for failure, count in each.failures.items()
    ]
    columns = ("targets", "teacher", "ok", "failed", "missing", "coverage")
    return [
        Table(title=f"Clips of {place}", columns=columns, rows=tuple(rows)),
        Table(title=f"Failures in {place}", columns=("targets", "clips", "failure", "such as"), rows=tuple(failures)),
    ]


def _ended(run: Path) -> dict[str, Any]:
    """What `p4dprep train` wrote at the end of a run; nothing before."""
    path = run / run_folder.REPORT
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) and "left_out" in content else {}


def _timing(run: Path, settings: Mapping[str, Any], records: Sequence[Record]) -> Section:
    """Seconds of a step, samples per second and the share that waited for data, over the whole log."""
    rates = np.array([record.get("samples_per_second", 0.0) for record in records])
    step_seconds = float(settings.get("batch_size", np.nan)) / rates[rates > 0]
    rows = []
    if np.isfinite(step_seconds).any():
        spread = np.percentile(step_seconds, (50, 100))
        rows.append(("a step, median and slowest", " and ".join(f"{seconds:.3g} s" for seconds in spread)))
    if len(rates[rates > 0]):
        rows.append(("samples per second, slowest and fastest", f"{rates[rates > 0].min():.3g} and {rates.max():.3g}"))
    rows += [("processes", str(settings["workers"]))] if "workers" in settings else []
    if ended := _ended(run):
        rows.append(
            ("the last call of p4dprep train", f"{float(ended.get('seconds', np.nan)):.1f} s, loading included")
        )
    terms = (
        ("samples_per_second", "Samples per second", ""),
        ("data_wait_fraction", "Waiting for data", "share of time"),
    )
    curves = [(make_curve(records, key, title), title, note) for key, title, note in terms]
    panels = [
        make_panel(f"curve-{curve.key}", title, note, [curve], records) for curve, title, note in curves if curve.steps
    ]
    return Section(
        title="Timing",
        tables=(Table(title="", columns=(), rows=tuple(rows)),),
        panels=tuple(panels),
    )


def _identity(run: Path) -> list[tuple[str, str]]:
    """Digests of what the run was made of, and its checkpoints."""
    try:
        content = json.loads((run / run_folder.IDENTITY).read_text(encoding="utf-8"))
        rows = [(str(name), str(value)) for name, value in content.items()]
    except (OSError, ValueError, AttributeError):
        rows = []
    steps = ", ".join(str(run_folder.step_of(path)) for path in run_folder.checkpoints(run))
    return [*rows, ("whole checkpoints, by step", steps or "none")]
