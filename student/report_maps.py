"""A report's maps: the student's scores beside its teacher's and trivial predictions, and clips drawn in one scale.

Shape suffixes: `t` frames or latent steps, `h w` pixels, `c` channels.
"""

import io
import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from p4dprep.cache import Cache
from p4dprep.evaluate import Comparison, MapPair, Metric, metric_info, read_pair
from p4dprep.evaluate.report import Kind
from p4dprep.pictures import (
    RGB,
    Row,
    depth_rgb,
    flow_rgb,
    frame_row,
    latents_rgb,
    motion_rgb,
    rays_rgb,
    strip,
)
from student.maps import StudentMaps
from student.page import Card, Section, Table, address

_MAX_COLUMNS, _CELL_WIDTH = 5, 120
_MAX_REASONS = 5
_UNITS = {"depth": "", "flow": " px", "motion": "", "camera": " degrees", "latents": ""}


def maps_section(maps: StudentMaps, truth: Cache) -> Section:
    """The scores of all maps, and the student's best, median and worst clip.

    Raises:
        CorruptDataError: a committed object is gone or damaged.
    """
    ours = [each for each in maps.report.comparisons if each.group == maps.group]
    cards = [_card(maps, truth, ours, clip_id, place) for clip_id, place in _chosen(ours)]
    return Section(
        title="Maps by the truth",
        notes=tuple(_notes(maps, ours)),
        tables=tuple(_table(maps, each) for each in ours),
        cards=tuple(cards),
    )


def _notes(maps: StudentMaps, ours: Sequence[Comparison]) -> Iterator[str]:
    report = maps.report
    yield (
        f"{len(maps.rows)} of {report.num_shared} clips shared with {report.truth}, group {report.truth_group}; "
        f"95% bootstrap intervals over clips; {maps.novelty}."
    )
    reasons: dict[str, int] = {}
    for skipped in report.skipped:
        reasons[skipped.reason] = reasons.get(skipped.reason, 0) + 1
    for reason, count in list(reasons.items())[:_MAX_REASONS]:
        yield f"Left out {count}: {reason}"
    if len(reasons) > _MAX_REASONS:
        yield f"And {len(reasons) - _MAX_REASONS} further reasons; p4dprep eval maps --json has them all."
    for each in ours:
        for metric in each.metrics:
            if metric.name == "coverage" and metric.value < 1:
                yield f"{each.target}: the student has a value at {metric.value:.2%} of the true pixels."


def _table(maps: StudentMaps, ours: Comparison) -> Table:
    theirs = _teachers(maps, ours)
    columns = ("score", "student", *(each.group for each in theirs), "trivial predictions")
    rows = []
    for metric in ours.metrics:
        if metric_info(metric.name).shown:
            others = [_value(found) for each in theirs for found in each.metrics if found.name == metric.name]
            trivial = ", ".join(f"{name} {_number(value)}" for name, value in metric.baselines.items())
            arrow = "↑" if metric.higher_is_better else "↓"
            rows.append((f"{metric.name} {arrow}", _value(metric), *others, trivial))
    facts = [ours.quantity, f"{len(ours.clips)} clips"]
    facts += [f"alignment: {ours.alignment}"] if ours.alignment else []
    return Table(title=f"{ours.target} ({', '.join(facts)})", columns=columns, rows=tuple(rows))


def _teachers(maps: StudentMaps, ours: Comparison) -> list[Comparison]:
    """What other groups made of the same thing."""
    return [
        each
        for each in maps.report.comparisons
        if each.group != maps.group and (each.kind, each.target) == (ours.kind, ours.target)
    ]


def _value(metric: Metric) -> str:
    unit = "" if metric.unit == "1" else f" {metric.unit}"
    interval = "" if math.isnan(metric.low) else f" ({_number(metric.low)} .. {_number(metric.high)})"
    return f"{_number(metric.value)}{interval}{unit}"


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"


def _chosen(ours: Sequence[Comparison]) -> list[tuple[str, str]]:
    """Clips and why they are shown, by the student's first score: no choice of ours."""
    if not ours:
        return []
    first = next(metric for metric in ours[0].metrics if metric_info(metric.name).shown)
    sign = -1 if first.higher_is_better else 1
    known = [each for each in ours[0].clips if not math.isnan(each.scores[first.name])]
    ranked = sorted(known, key=lambda each: sign * each.scores[first.name])
    places = {0: "best", len(ranked) // 2: "median", len(ranked) - 1: "worst"}
    return [
        (ranked[place].clip_id, f"{name} by {ours[0].target} {first.name} {_number(ranked[place].scores[first.name])}")
        for place, name in places.items()
        if place < len(ranked)
    ]


def _card(maps: StudentMaps, truth: Cache, ours: Sequence[Comparison], clip_id: str, place: str) -> Card:
    """One clip: frames, then for every map the truth, what teachers gave and what the student predicts."""
    frames_thwc, times = maps.frames(clip_id)
    rows = [frame_row(frames_thwc)]
    for each in ours:
        pairs = [
            (found.group, read_pair(maps.cache, truth, maps.report, found, clip_id))
            for found in (*_teachers(maps, each), each)
        ]
        rows += _rows(each, pairs, frames_thwc)
    buffer = io.BytesIO()
    strip(rows, times, max_columns=_MAX_COLUMNS, cell_width=_CELL_WIDTH).save(buffer, "WEBP", quality=88)
    return Card(title=f"{clip_id}: {place}", picture=address(buffer.getvalue()))


def _rows(ours: Comparison, pairs: Sequence[tuple[str, MapPair]], frames_thwc: RGB) -> Iterator[Row]:
    """The truth and every prediction in the truth's colours."""
    truth = pairs[-1][1].truth
    if ours.kind == "latents" and truth.ndim not in (4, 5):
        return
    painted, caption = _painted(ours.kind, truth, truth, frames_thwc)
    yield Row(title=f"{ours.target} truth", caption=caption, rgb_thwc=painted, starts_group=True)
    for group, pair in pairs:
        painted, _ = _painted(ours.kind, pair.predicted, truth, frames_thwc)
        yield Row(title=f"{ours.target} {group}", caption=_error(pair), rgb_thwc=painted)


def _error(pair: MapPair) -> str:
    if pair.error_thw is None or not np.isfinite(pair.error_thw).any():
        return "same colours"
    what = {"depth": "relative error", "flow": "error", "motion": "wrong", "camera": "angle"}[pair.kind]
    return f"same colours\nmean {what} {np.nanmean(pair.error_thw):.3g}{_UNITS[pair.kind]}"


def _painted(kind: Kind, values: NDArray[np.generic], truth: NDArray[np.generic], frames_thwc: RGB) -> tuple[RGB, str]:
    """Colours of a map, (t, h, w, 3), on the truth's scale, and what they mean."""
    match kind:
        case "depth":
            rgb, far, near = depth_rgb(values, quantity="metric depth", like=truth)
            return rgb, f"near {near:.3g}, far {far:.3g}"
        case "flow":
            rgb, full, _ = flow_rgb(values, like=truth)
            return rgb, f"full at {full:.3g} px"
        case "motion":
            return motion_rgb(values, quantity="motion mask", frames_thwc=frames_thwc), "pink moves"
        case "camera":
            return rays_rgb(values, like=truth)[0], "ray direction\nx red, y green, z blue"
        case "latents":
            own, true = (maps[-1] if maps.ndim == 5 else maps for maps in (values, truth))
            return latents_rgb(own, like=true), "last tap, PCA"
