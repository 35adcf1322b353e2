"""A training run as one page: what was asked for, how the losses fell, and predicted maps beside cached ones.

The page holds everything it shows, runs no script and asks no other address. It can be written at any moment of a run.
`student.report` adds what more than the run's own folder is needed for.
"""

import base64
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from p4dprep.errors import CorruptDataError
from p4dprep.storage import redact
from student.run_folder import LOG, PICTURES, read_log, read_settings, write_atomically

Record = Mapping[str, float]

PAGE = "index.html"

_NOT_SHOWN = ("step", "epoch")
_MAX_PICTURES_BETWEEN = 10
_PICTURE_NAME = re.compile(r"step-(\d+)\.webp")
_LOG_SCALE_FROM = 20
"""Where the largest loss is so many times the smallest, a linear axis would show its beginning only."""

_INK = "#010203"
"""Stands for the page's own colour of text, light or dark, while matplotlib draws."""
_COLOURS = ("#3b82f6", "#e8762d", "#2fa36b", "#c05ad0", "#d4a017", "#e0527a", "#22a3b8", "#8d6e63")
_FAINT_WIDTH, _WIDTH = 0.9, 1.6


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One term of the log over the steps, finite values only.

    Attributes:
        key: in the log.
        label: on the page.
        steps, values: of the same length, steps rising.
        num_lost: values that were no numbers and are not drawn.
    """

    key: str
    label: str
    steps: tuple[int, ...]
    values: tuple[float, ...]
    num_lost: int = 0


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One of the small pictures of losses.

    Attributes:
        title: the term, with `note` saying what it is.
        trend: first and last value.
        svg: the curves.
        legend: label and colour of every curve, if there are several.
    """

    title: str
    note: str
    trend: str
    svg: Markup
    legend: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A percentage with its 95% interval, drawn as a dot on a line from 0 to 100; None is unknown."""

    value: float
    low: float | None
    high: float | None

    @property
    def text(self) -> str:
        """`61.2 (57.0 .. 65.1)`."""
        known = self.low is not None and self.high is not None
        return f"{self.value:.1f} ({self.low:.1f} .. {self.high:.1f})" if known else f"{self.value:.1f}"


Cell = str | Interval


@dataclass(frozen=True, kw_only=True)
class Table:
    """A titled table; a first cell names its row."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    @property
    def is_wide(self) -> bool:
        """Whether it needs the page's whole width."""
        return any(sum(isinstance(cell, Interval) for cell in row) > 1 for row in self.rows)


@dataclass(frozen=True, kw_only=True)
class Card:
    """A picture with what must be said of it.

    Attributes:
        title: of the card.
        facts: name and text, each a line or more.
        picture: its address, `data:image/webp;base64,...`, or empty.
    """

    title: str
    facts: tuple[tuple[str, str], ...] = ()
    picture: str = ""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page.

    Attributes:
        title: its heading.
        notes: paragraphs under it.
        panels: curves.
        tables: those without rows are left out.
        cards: pictures.
    """

    title: str
    notes: tuple[str, ...] = ()
    panels: tuple[Panel, ...] = ()
    tables: tuple[Table, ...] = ()
    cards: tuple[Card, ...] = ()


def write_page(
    run: Path,
    out: Path | None = None,
    *,
    facts: Sequence[tuple[str, str]] = (),
    above: Sequence[Section] = (),
    below: Sequence[Section] = (),
    tables: Sequence[Table] = (),
) -> Path:
    """Write a page from the run's config, log and pictures, and return its path.

    Args:
        run: the run's folder.
        out: the page; None is RUN/index.html.
        facts: more to know first.
        above, below: sections before the losses, and after the run's own pictures.
        tables: more of what was run.

    Raises:
        RequestError: the folder is no run.
        CorruptDataError: a line of its log is damaged.
    """
    page = run / PAGE if out is None else out
    settings = read_settings(run)
    records = read_records(run)
    first, between, last = _pictures(run)
    source = files("student").joinpath("templates/run.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    html = environment.from_string(source).render(
        title=redact(run.resolve().name),
        facts=[*_facts(settings, records), *facts],
        above=above,
        below=below,
        tables=tables,
        panels=_panels(settings, records),
        numbers=_numbers(records),
        edges=[_embedded(path) for path in (first, last) if path],
        between=[_embedded(path) for path in _chosen(between)],
        num_between=len(between),
        settings=_setting_texts(settings),
    )
    # A name of a file or a setting may hold half a character, which no UTF-8 can.
    write_atomically(page, html.encode("utf-8", "replace").decode("utf-8"))
    return page


def read_records(run: Path) -> list[Record]:
    """The lines of the log, one a step, by rising step; of two lines of a step the later one."""
    by_step: dict[int, Record] = {}
    for number, record in enumerate(read_log(run), 1):
        for key, value in record.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise CorruptDataError(f"{run / LOG}, line {number}: {key[:40]!r} is {str(value)[:40]!r}, not a number")
        if not math.isfinite(record.get("step", math.nan)):
            raise CorruptDataError(f"{run / LOG}, line {number} has no step")
        by_step[int(record["step"])] = record
    return [by_step[step] for step in sorted(by_step)]


def make_curve(records: Sequence[Record], key: str, label: str) -> Curve:
    """The finite values of a term over the steps."""
    found = [(int(record["step"]), float(record[key])) for record in records if key in record]
    drawn = [(step, value) for step, value in found if math.isfinite(value)]
    steps, values = zip(*drawn, strict=True) if drawn else ((), ())
    return Curve(key=key, label=label, steps=steps, values=values, num_lost=len(found) - len(drawn))


def _panels(settings: Mapping[str, Any], records: Sequence[Record]) -> list[Panel]:
    """Total, SFT, LD with its taps, and every ED term; what was never logged or is 0 throughout is left out."""
    keys = list(dict.fromkeys(key for record in records for key in record))
    taps = [(key, key.removeprefix("ld/")) for key in keys if key.startswith("ld/")]
    latent, explicit = settings.get("latent_weight", "w"), settings.get("explicit_weight", "w")
    groups = [
        ("Total", f"SFT + {latent} LD + {explicit} Σ λ ED", [("loss", "total")]),
        ("SFT", "cross entropy of the answers", [("sft", "SFT")]),
        ("LD", "" if taps else "latents, unweighted", [("ld", "mean"), *taps]),
        *((f"ED {key.removeprefix('ed/')}", "unweighted", [(key, key)]) for key in keys if key.startswith("ed/")),
    ]
    panels = []
    for number, (title, note, terms) in enumerate(groups):
        curves = [make_curve(records, key, label) for key, label in terms if key in keys]
        if any(any(curve.values) or curve.num_lost for curve in curves):
            panels.append(make_panel(f"curve-{number}", title, note, curves, records))
    return panels


def make_panel(name: str, title: str, note: str, curves: Sequence[Curve], records: Sequence[Record]) -> Panel:
    """A small picture of curves; `name` begins with `curve-` and is the page's only one of that name."""
    steps = int(records[0]["step"]), int(records[-1]["step"])
    lost = sum(curve.num_lost for curve in curves)
    legend = zip((curve.label for curve in curves), _colours(len(curves)), strict=True)
    return Panel(
        title=title,
        note=f"{note} ({lost} values are not finite and not drawn)" if lost else note,
        trend=_trend(curves[0]),
        svg=_svg(name, curves, steps),
        legend=tuple(legend) if len(curves) > 1 else (),
    )


def _trend(curve: Curve) -> str:
    shown = [_number(value) for value in curve.values]
    return " → ".join([shown[0], shown[-1]] if len(shown) > 1 else shown)


def _colours(count: int) -> list[str]:
    return [_COLOURS[number % len(_COLOURS)] for number in range(count)]


def _svg(name: str, curves: Sequence[Curve], steps: tuple[int, int]) -> Markup:
    """The curves over all steps of the log, as SVG that takes the page's colour of text.

    No text of the log or the config gets into it. A line longer than a hundred points is thinned where the eye cannot
    see it, so that the page of a long run stays small.
    """
    style = {
        "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 8.5,
        "text.color": _INK, "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK,
    }  # fmt: skip
    buffer = io.StringIO()
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(3.2, 1.7))
        axes = figure.add_axes((0.14, 0.25, 0.82, 0.71))
        for number, (curve, colour) in reversed(list(enumerate(zip(curves, _colours(len(curves)), strict=True)))):
            _draw(axes, curve, colour, _FAINT_WIDTH if number else _WIDTH, f"{name}-{number}")
        _scale(axes, curves, steps)
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    # Rules of style and ids would act on the whole page; sizes and fonts are the page's to choose.
    text = re.sub(r"<defs>\s*<style.*?</defs>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' id="(?!curve-)[^"]*"| (width|height)="[\d.]+pt"| font-family: [^;"]*;', "", text)
    return Markup(text.replace(_INK, "currentColor"))  # noqa: S704


def _draw(axes: Axes, curve: Curve, colour: str, width: float, name: str) -> None:
    if not curve.steps:
        return
    (line,) = axes.plot(curve.steps, curve.values, linewidth=width, gid=name)
    # A line without length has round ends: a dot, which shows a log of one line too.
    (dot,) = axes.plot(curve.steps[-1:] * 2, curve.values[-1:] * 2, linewidth=3 * width)
    for drawn in (line, dot):
        drawn.set(color=colour, clip_on=False, solid_capstyle="round", solid_joinstyle="round")


def _scale(axes: Axes, curves: Sequence[Curve], steps: tuple[int, int]) -> None:
    values = [value for curve in curves for value in curve.values]
    if values and min(values) > 0 and max(values) / min(values) > _LOG_SCALE_FROM:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=6))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4))
    first, last = steps
    axes.set_xlim(first, last if last > first else first + 1)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("step", labelpad=2)
    axes.tick_params(length=0, pad=4, bottom=False, left=False)
    axes.grid(color=_INK, alpha=0.13, linewidth=0.6, clip_on=False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _facts(settings: Mapping[str, Any], records: Sequence[Record]) -> list[tuple[str, str]]:
    """What a reader wants to know first."""
    wanted = {"student": "student", "cache": "cache", "strategy": "strategy", "distill": "distilled", "tune": "tuned"}
    wanted["time_cue"] = "time cue"
    facts = [(label, _text(name, settings[name])) for name, label in wanted.items() if name in settings]
    if not records:
        return [*facts, ("step", "none logged yet")]
    last, most = records[-1], settings.get("max_steps")
    facts.append(("step", f"{int(last['step']):,}{f' of {most:,}' if isinstance(most, int) else ''}"))
    if "epoch" in last:
        facts.append(("epoch", f"{last['epoch']:.3g}"))
    return facts + _speed(records)


def _speed(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Samples per second and the share of time that waited for data, over the whole log."""
    num_steps = np.diff([record["step"] for record in records], prepend=0)
    known = [(record, count) for record, count in zip(records, num_steps, strict=True) if _rate(record) > 0]
    if not known:
        return []
    # A step is as many samples in every line, but the last line may stand for fewer steps than the others.
    seconds = np.array([count / _rate(record) for record, count in known])
    waited = float(np.average([record.get("data_wait_fraction", math.nan) for record, _ in known], weights=seconds))
    speed = [("speed", f"{sum(count for _, count in known) / seconds.sum():.3g} samples/s")]
    return speed if math.isnan(waited) else [*speed, ("waiting for data", f"{waited:.1%} of the time")]


def _rate(record: Record) -> float:
    return record.get("samples_per_second", 0)


def _numbers(records: Sequence[Record]) -> list[tuple[str, str, str, str]]:
    """Every term: its name, first and last value, and the change."""
    rows = []
    for key in dict.fromkeys(key for record in records for key in record if key not in _NOT_SHOWN):
        found = [record[key] for record in records if key in record]
        first, last = found[0], found[-1]
        change = last / first - 1 if first else math.nan
        rows.append(
            (key, _number(first), _number(last), f"{change:+.0%}".replace("-", "−") if math.isfinite(change) else "–")
        )
    return rows


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _setting_texts(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The config as texts without credentials; storage options never leave it."""
    return [(str(name), _text(name, value)) for name, value in settings.items() if name != "storage_options"]


def _text(name: object, value: object) -> str:
    if value is None or value in ([], {}):
        return "–"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return redact(f"{name}: {text}").removeprefix(f"{name}: ")


def _pictures(run: Path) -> tuple[Path | None, list[Path], Path | None]:
    """The picture of the first step, those between, and that of the last; a single one is the first."""
    found = [path for path in (run / PICTURES).glob("*") if _PICTURE_NAME.fullmatch(path.name)]
    found.sort(key=_step_of)
    if len(found) < 2:
        return (found[0] if found else None), [], None
    return found[0], found[1:-1], found[-1]


def _step_of(picture: Path) -> int:
    return int(picture.name.removeprefix("step-").removesuffix(".webp"))


def _chosen(pictures: Sequence[Path]) -> list[Path]:
    """Some of them, evenly, so that the page of a long run can still be opened."""
    count = min(len(pictures), _MAX_PICTURES_BETWEEN)
    return [pictures[round(place)] for place in np.linspace(0, len(pictures) - 1, count)]


def _embedded(picture: Path) -> tuple[int, str]:
    """A picture's step, and itself as an address."""
    return _step_of(picture), address(picture.read_bytes())


def address(webp: bytes) -> str:
    """A WebP picture as an address that the page's policy lets it show."""
    return f"data:image/webp;base64,{base64.b64encode(webp).decode('ascii')}"
