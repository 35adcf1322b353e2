"""`p4dprep eval`: judge maps by the truth in another cache; ask a benchmark's questions, and compare two results."""

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import pyarrow.compute as pc
import typer
from rich.console import Console
from rich.table import Table as ScreenTable
from rich.text import Text

from cli._output import JsonFlag, StorageOptions, console, print_json, printable, progress_bar
from cli.answers import answers, compare, lmms_eval
from cli.cache import read_frames, writing
from p4dprep.errors import RequestError

if TYPE_CHECKING:
    from p4dprep.cache import Cache
    from p4dprep.evaluate import Comparison, MapReport, Metric
    from p4dprep.pictures import Card, Table
    from student.maps import StudentMaps

app = typer.Typer(no_args_is_help=True)
app.command()(answers)
app.command()(compare)
app.command()(lmms_eval)

MAX_REASONS = 3


@app.command()
def maps(
    cache: Annotated[
        str,
        typer.Argument(
            metavar="CACHE|RUN",
            help="Folder or URL of the cache; or a run, whose student predicts.",
            show_default=False,
        ),
    ],
    against: Annotated[str, typer.Option(metavar="TRUTH", help="Folder or URL of the cache that is right.")],
    group: Annotated[list[str] | None, typer.Option(help="Judge only this group; repeat for several.")] = None,
    truth_group: Annotated[
        str, typer.Option(help="The group of TRUTH that is right.  [default: the only one, or `truth`]")
    ] = "",
    align: Annotated[
        str,
        typer.Option(
            help="How depth is brought to the truth's scale: none, median scale, least squares scale, or least squares "
            "scale and shift in disparity.  [default: none for metric depth, else the last]"
        ),
    ] = "",
    limit: Annotated[int | None, typer.Option(min=1, help="Judge only so many of the shared clips.")] = None,
    clips: Annotated[
        str | None, typer.Option(metavar="CACHE", help="Of a RUN: whose clips the student sees.  [default: the run's]")
    ] = None,
    worst: Annotated[int, typer.Option(min=0, help="Worst clips to name, and to draw, per score.")] = 3,
    page: Annotated[Path | None, typer.Option(help="Write the worst clips' pictures as one HTML page.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    storage_options: StorageOptions = None,
    json: JsonFlag = False,
) -> None:
    """Judge depth, flow, motion, camera and latents by the truth in another cache that shares clips.

    Beside each score: its 95% bootstrap interval over clips, and what trivial predictions reach. Of a run of `p4dprep
    train`, its student predicts the maps, and its teacher's are judged on the same clips.

    **Examples**

        p4dprep eval maps cache/ --against worlds/truth

        p4dprep eval maps cache/ --against worlds/truth --group l4p --page worst.html --json

        p4dprep eval maps RUN --against held-out/truth --clips held-out/cache
    """
    from p4dprep.cache import Cache

    truth = Cache.open(against, storage_options)
    how: dict[str, Any] = {
        "groups": group or (),
        "truth_group": truth_group,
        "alignment": align,
        "limit": limit,
        "num_worst": worst,
        "seed": seed,
    }
    with _judged(cache, truth, clips, how, storage_options) as (opened, report, notes):
        if page is not None:
            _write_page(opened, truth, report, page, storage_options)
    if json:
        print_json(report)
    else:
        show(report)
    for line in (*_notes(report), *notes):
        console.print(printable(line), markup=False, highlight=False)
    if page is not None:
        console.print(f"worst clips: {page}", markup=False, highlight=False)


@contextmanager
def _judged(
    place: str, truth: "Cache", clips: str | None, how: Mapping[str, Any], storage_options: Mapping[str, Any] | None
) -> Iterator[tuple["Cache", "MapReport", Sequence[str]]]:
    """The cache that holds what was judged, the report, and what must be said besides."""
    from p4dprep.cache import Cache
    from p4dprep.evaluate import evaluate_maps
    from student.run_folder import CONFIG

    if not (Path(place) / CONFIG).is_file():
        if clips is not None:
            raise RequestError(f"--clips says what a run's student sees, but {place} is no run of p4dprep train")
        opened = Cache.open(place, storage_options)
        with progress_bar() as bar:
            task = bar.add_task("judging", total=None)
            report = evaluate_maps(
                opened, truth, **how, on_progress=lambda done, total: bar.update(task, completed=done, total=total)
            )
        yield opened, report, ()
        return
    with tempfile.TemporaryDirectory(prefix="p4dprep-") as folder:
        found = _judge_run(place, truth, Path(folder), clips, how, storage_options)
        yield found.cache, found.report, [found.novelty]


def _judge_run(
    run: str,
    truth: "Cache",
    folder: Path,
    clips: str | None,
    how: Mapping[str, Any],
    storage_options: Mapping[str, Any] | None,
) -> "StudentMaps":
    """Judge the maps of a run's student, with a bar on stderr."""
    from student.maps import judge_maps

    with progress_bar() as bar:
        task = bar.add_task("loading", total=None)

        def tell(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        return judge_maps(run, truth, folder, cache=clips, storage_options=storage_options, on_progress=tell, **how)


def _notes(report: "MapReport") -> Iterator[str]:
    """What a reader of the scores must know besides."""
    reasons: dict[str, int] = {}
    for skipped in report.skipped:
        reason = f"{skipped.group}: {skipped.reason}" if skipped.group else skipped.reason
        reasons[reason] = reasons.get(reason, 0) + 1
    for reason, count in list(reasons.items())[:MAX_REASONS]:
        yield f"left out {count} clips: {reason}"
    if len(reasons) > MAX_REASONS:
        yield f"and {len(reasons) - MAX_REASONS} further reasons; --json has them all"
    if report.num_only_predicted or report.num_only_truth:
        yield f"{report.num_only_predicted} clips are only in the cache, {report.num_only_truth} only in the truth"
    for comparison in report.comparisons:
        for metric in comparison.metrics:
            if metric.name == "coverage" and metric.value < 1:
                yield f"{comparison.group}/{comparison.target} has a value at {metric.value:.2%} of the true pixels"


def _title(comparison: "Comparison", report: "MapReport") -> str:
    """What was compared with what, and how."""
    title = f"{comparison.group}/{comparison.target} by {report.truth_group}/{comparison.truth_target}"
    facts = [comparison.quantity, f"{len(comparison.clips)} clips"]
    facts += [f"alignment: {comparison.alignment}"] if comparison.alignment else []
    return f"{title} ({', '.join(facts)})"


def _shown(comparison: "Comparison") -> "list[Metric]":
    from p4dprep.evaluate import metric_info

    return [metric for metric in comparison.metrics if metric_info(metric.name).shown]


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"


def _cells(metric: "Metric") -> tuple[str, str, str, str]:
    """Name and direction, value, interval, baselines."""
    unit = "" if metric.unit == "1" else f" {metric.unit.replace('degrees', 'deg')}"
    name = f"{metric.name.removesuffix('_degrees')} {'↑' if metric.higher_is_better else '↓'}"
    interval = f"{_number(metric.low)} .. {_number(metric.high)}"
    baselines = ", ".join(f"{name} {_number(value)}" for name, value in metric.baselines.items())
    return name, f"{_number(metric.value)}{unit}", interval, baselines


def _beats(metric: "Metric") -> bool:
    """Whether it is strictly better than every trivial prediction that has the score."""
    sign = 1 if metric.higher_is_better else -1
    known = [value for value in metric.baselines.values() if not math.isnan(value)]
    return all(sign * metric.value > sign * value for value in known)


def show(report: "MapReport") -> None:
    """The shown scores, and the buckets, as tables on stdout."""
    screen = Console(soft_wrap=True)
    for comparison in report.comparisons:
        table = ScreenTable(box=None, pad_edge=False, header_style="dim")
        for name in ("score", "value", "95% interval", "trivial predictions"):
            table.add_column(name, justify="left" if name in ("score", "trivial predictions") else "right")
        for metric in _shown(comparison):
            name, value, *rest = _cells(metric)
            table.add_row(name, Text(value, style="green" if _beats(metric) else "red"), *rest)
        screen.print(printable(_title(comparison, report)), style="bold", markup=False, highlight=False)
        screen.print(table)
        for line in _bucket_lines(comparison):
            screen.print(line, markup=False, highlight=False)


def _bucket_lines(comparison: "Comparison") -> Iterator[str]:
    """One line an axis: the first score in each bucket, and in brackets that of the trivial prediction."""
    for axis in dict.fromkeys(bucket.axis for bucket in comparison.buckets):
        buckets = [bucket for bucket in comparison.buckets if bucket.axis == axis and bucket.pixel_fraction > 0]
        texts = []
        for bucket in buckets:
            metric = bucket.metrics[0]
            trivial = "/".join(_number(value) for value in metric.baselines.values())
            texts.append(f"{bucket.name} {_number(metric.value)} ({trivial})")
        if texts:
            yield f"  {buckets[0].metrics[0].name} by {axis}: {', '.join(texts)}"


def _write_page(
    cache: "Cache", truth: "Cache", report: "MapReport", path: Path, storage_options: Mapping[str, Any] | None
) -> None:
    from p4dprep.pictures import gallery_html

    cards = list(_draw_worst(cache, truth, report, storage_options))
    facts = [("prediction", report.predicted), ("truth", f"{report.truth}, group {report.truth_group}")]
    facts += [("clips", f"{report.num_judged} of {report.num_shared} shared, {len(report.skipped)} left out")]
    tables = [_page_table(comparison, report) for comparison in report.comparisons]
    with writing(path):
        path.write_text(gallery_html(title="Map evaluation", facts=facts, tables=tables, cards=cards), encoding="utf-8")


def _page_table(comparison: "Comparison", report: "MapReport") -> "Table":
    from p4dprep.pictures import Table

    rows = []
    for metric in _shown(comparison):
        worst = comparison.worst.get(metric.name, ())
        rows.append((*_cells(metric), ", ".join(worst)))
    columns = ("score", "value", "95% interval", "trivial predictions", "worst clips")
    return Table(title=_title(comparison, report), columns=columns, rows=tuple(rows))


def _draw_worst(
    cache: "Cache", truth: "Cache", report: "MapReport", storage_options: Mapping[str, Any] | None
) -> Iterator["Card"]:
    """A card for each clip that is among the worst of a comparison by any score."""
    from p4dprep.video import Decoder

    with Decoder() as decoder, progress_bar() as bar:
        chosen = [(c, clip_id) for c in report.comparisons for clip_id in _worst_by(c)]
        rows = {row["id"]: row for row in _rows_of(cache, {clip_id for _, clip_id in chosen})}
        for comparison, clip_id in bar.track(chosen, description="drawing"):
            clip = rows[clip_id]
            times = cache.group(comparison.group).read_time(clip["index"])
            frames, problem = read_frames(cache, clip, times, decoder, storage_options)
            yield _draw_card(cache, truth, report, comparison, clip, (times, frames, problem))


def _rows_of(cache: "Cache", ids: set[str]) -> Sequence[dict[str, Any]]:
    import pyarrow as pa

    table = cache.clips()
    rows: list[dict[str, Any]] = table.filter(pc.is_in(table.column("id"), pa.array(sorted(ids)))).to_pylist()
    return rows


def _worst_by(comparison: "Comparison") -> dict[str, list[str]]:
    """Clip id to the scores by which it is among the worst."""
    found: dict[str, list[str]] = {}
    for score, ids in comparison.worst.items():
        for clip_id in ids:
            found.setdefault(clip_id, []).append(score)
    return found


def _draw_card(
    cache: "Cache",
    truth: "Cache",
    report: "MapReport",
    comparison: "Comparison",
    clip: Mapping[str, Any],
    decoded: tuple[Any, Any, str],
) -> "Card":
    from p4dprep import pictures
    from p4dprep.evaluate import read_pair
    from p4dprep.evaluate.pictures import pair_rows

    times, frames, problem = decoded
    pair = read_pair(cache, truth, report, comparison, clip["id"])
    name = f"{comparison.group}/{comparison.target}"
    truth_title = f"{report.truth_group}/{comparison.truth_target}"
    rows = [] if frames is None else [pictures.frame_row(frames)]
    rows += pair_rows(pair, title=name, truth_title=truth_title, frames_thwc=frames)
    scores = next(scores for scores in comparison.clips if scores.clip_id == clip["id"])
    worst = _worst_by(comparison)[clip["id"]]
    values = ", ".join(f"{score} {_number(scores.scores[score])}" for score in worst)
    return pictures.Card(
        clip_id=clip["id"],
        uri=clip["uri"],
        facts=(f"{name}: among the worst by {values}",),
        rows=tuple(rows),
        time_seconds_t=times,
        note=problem,
    )
