"""Does it help? The same student trained in several ways and with several seeds, and asked the same questions.

Every arm and seed is a run of `student.train` and, for each benchmark, a result of `student.evaluate.answers`, in
folders of their own. So an ablation that was cut off goes on where it was, and several machines may share one.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from p4dprep.config import validated
from p4dprep.errors import RequestError
from student.evaluate import registry
from student.evaluate.answers import AnswerRequest, answer
from student.evaluate.benchmark import Benchmark, Scored
from student.evaluate.compare import question_of
from student.evaluate.result import in_order, interval, interval_text, read_answers, resamples
from student.run_folder import write_atomically
from student.train import ShowLine, train
from student.train_config import TrainConfig
from student.train_config import parse_config as parse_training

TABLE, REPORT = "ablation.md", "ablation.json"
_OWN_FIELDS = ("out", "seed")
_BENCH_CACHE = "bench_cache"
_NAME = re.compile(r"[\w+.][\w+. -]*")

ShowPart = Callable[[str], None]
"""Told of every arm and seed, and of the tables, as they begin."""


class Examination(BaseModel):
    """A benchmark that every arm is asked; see `p4dprep eval answers`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bench: str
    data: str
    mode: str | None = None
    frames: int = Field(default=16, ge=1)
    batch_size: int = Field(default=8, ge=1)


class AblationConfig(BaseModel):
    """A request to compare ways of training.

    Attributes:
        out: folder for runs, answers and the tables.
        train: fields of TrainConfig that all arms share.
        arms: name to the fields that differ; null is the student as it is, untrained. An arm's `bench_cache` holds a
            teacher's latents of the benchmarks' videos, for one that reads them at inference.
        baseline: the arm that the others are held against.
        ceiling: the arm that stands for all there is to gain; None has none.
        seeds: of every arm that is trained.
        benches: what is asked.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    out: str = Field(min_length=1)
    train: dict[str, Any]
    arms: dict[str, dict[str, Any] | None] = Field(min_length=1)
    baseline: str
    ceiling: str | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    benches: tuple[Examination, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for role, name in (("baseline", self.baseline), ("ceiling", self.ceiling or self.baseline)):
            if name not in self.arms:
                raise ValueError(f"{role} {name!r} is no arm; there are {', '.join(self.arms)}")
        if len({each.bench for each in self.benches}) < len(self.benches):
            raise ValueError("a benchmark stands twice in benches")
        if wrong := [name for name in self.arms if not _NAME.fullmatch(name)]:
            raise ValueError(f"arm {wrong[0]!r} names a folder: letters, digits, spaces and + . _ - only")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds {self.seeds} must be some, each once")
        for fields in (self.train, *filter(None, self.arms.values())):
            if own := [name for name in _OWN_FIELDS if name in fields]:
                raise ValueError(f"{own[0]} is the ablation's own; leave it out of train and arms")
        return self

    def seeds_of(self, arm: str) -> tuple[int, ...]:
        """The seeds that an arm is run with; a student that is not trained needs one."""
        return self.seeds if self.arms[arm] is not None else self.seeds[:1]

    def training(self, arm: str, seed: int) -> TrainConfig:
        """The request to train an arm with a seed.

        Raises:
            RequestError: a field is wrong.
        """
        fields = {name: value for name, value in (self.arms[arm] or {}).items() if name != _BENCH_CACHE}
        place = str(Path(self.out) / "runs" / f"{arm}-{seed}")
        return parse_training(self.train | fields | {"out": place, "seed": seed})

    def cells(self) -> list[tuple[str, int]]:
        """Every arm and seed, one seed of all arms before the next, so that what is cut off can be compared too."""
        return [(arm, seed) for seed in self.seeds for arm in self.arms if seed in self.seeds_of(arm)]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number in percent or points with its 95% interval, over questions and seeds drawn anew."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """One row of the table.

    Attributes:
        name: of the arm.
        num_seeds: how often it was trained.
        columns: column of the benchmark to its mean over the seeds.
        gains: each column less that of the baseline, on the same questions.
        gap_closed: the first column's gain in percent of the ceiling's; None without a ceiling, and where the
            ceiling's own gain is small beside its interval.
    """

    name: str
    num_seeds: int
    columns: Mapping[str, Estimate]
    gains: Mapping[str, Estimate]
    gap_closed: Estimate | None = None


Results = Mapping[str, tuple[ArmResult, ...]]
"""Benchmark to the rows of its table."""


def parse_config(values: dict[str, Any]) -> AblationConfig:
    """Validate a request and, before anything is trained, each of its arms.

    Raises:
        RequestError: naming each wrong field.
    """
    config = validated(AblationConfig, values)
    for each in config.benches:
        registry.find(each.bench)
    for arm, fields in config.arms.items():
        if fields is not None:
            config.training(arm, config.seeds[0])
    return config


def ablate(
    config: AblationConfig,
    *,
    shard: tuple[int, int] = (0, 1),
    show: ShowLine = lambda *_: None,
    show_part: ShowPart = lambda _: None,
) -> Results:
    """Train and ask every arm with every seed; write ablation.md and ablation.json.

    Args:
        config: the request.
        shard: (i, n) does every n-th cell from i only and, if there are others, makes no table.
        show: told of every log line of a training.
        show_part: told of every arm and seed, and of the tables.

    Returns:
        The tables; empty for one shard of several.

    Raises:
        P4DError: whatever training and asking raise.
    """
    number, count = shard
    if not 0 <= number < count:
        raise RequestError(f"shard {number}/{count} does not exist; shards are 0/N to N-1/N")
    for arm, seed in config.cells()[number::count]:
        show_part(f"{arm}, seed {seed}")
        student = str(config.train["student"])
        if config.arms[arm] is not None:
            student = str(train(config.training(arm, seed), resume=True, show=show).run)
        for bench in config.benches:
            answer(_questions(config, bench, arm, seed, student))
    if count > 1:
        return {}
    show_part(f"tables of {', '.join(bench.bench for bench in config.benches)}")  # twenty arms take minutes
    results = {bench.bench: _results(config, bench) for bench in config.benches}
    out = Path(config.out)
    rows = {bench: [asdict(each) for each in found] for bench, found in results.items()}
    write_atomically(out / REPORT, json.dumps(rows, indent=2) + "\n")
    write_atomically(out / TABLE, markdown(results, config))
    return results


def _questions(config: AblationConfig, bench: Examination, arm: str, seed: int, student: str) -> AnswerRequest:
    fields = config.arms[arm] or {}
    is_rival = (config.train | fields).get("strategy", "p4d") != "p4d"
    return AnswerRequest(
        student=student,
        bench=bench.bench,
        mode=bench.mode,
        data=Path(bench.data),
        out=_answers_folder(config, bench, arm, seed),
        num_frames=bench.frames,
        cache=fields.get(_BENCH_CACHE) if is_rival else None,
        batch_size=bench.batch_size,
    )


def _answers_folder(config: AblationConfig, bench: Examination, arm: str, seed: int) -> Path:
    return Path(config.out) / "answers" / bench.bench / f"{arm}-{seed}"


def _results(config: AblationConfig, bench: Examination) -> tuple[ArmResult, ...]:
    """Rows of one benchmark's table, from the answers on disk."""
    benchmark = registry.find(bench.bench)
    scored = {arm: [_scored(config, bench, arm, seed) for seed in config.seeds_of(arm)] for arm in config.arms}
    values = {arm: in_order(benchmark, benchmark.table(_mean(seeds))) for arm, seeds in scored.items()}
    draws = _draws(benchmark, scored)
    headline = next(iter(values[config.baseline]))
    gains = {
        (arm, name): _gain(config, name, values, draws, arm) for arm, columns in values.items() for name in columns
    }
    whole = gains[config.ceiling, headline] if config.ceiling else None
    ceiling = whole if whole and _is_sure(whole) else None
    return tuple(
        ArmResult(
            name=arm,
            num_seeds=len(scored[arm]),
            columns={
                name: _estimate(value, [each.get(name, math.nan) for each in draws[arm]])
                for name, value in columns.items()
            },
            gains={name: _estimate(*gains[arm, name]) for name in columns},
            gap_closed=ceiling and _gap_closed(gains[arm, headline], ceiling),
        )
        for arm, columns in values.items()
    )


_Gain = tuple[float, Sequence[float]]
"""Points over the baseline: of all questions, and of each draw of them."""


def _gain(
    config: AblationConfig,
    column: str,
    values: Mapping[str, Mapping[str, float]],
    draws: Mapping[str, Sequence[Mapping[str, float]]],
    arm: str,
) -> _Gain:
    base = draws[config.baseline]
    drawn = [
        each.get(column, math.nan) - other.get(column, math.nan) for each, other in zip(draws[arm], base, strict=True)
    ]
    return values[arm][column] - values[config.baseline].get(column, math.nan), drawn


def _is_sure(whole: _Gain) -> bool:
    """Whether shares of a gain mean anything: its interval begins above half of it."""
    low, _ = interval(whole[1])
    return low > whole[0] / 2 > 0


def _gap_closed(gain: _Gain, whole: _Gain) -> Estimate:
    """One gain in percent of another; a draw in which there is nothing to gain says nothing."""
    value = 100 * gain[0] / whole[0] if whole[0] else math.nan
    drawn = zip(gain[1], whole[1], strict=True)
    return _estimate(value, [100 * one / other if other else math.nan for one, other in drawn])


def _scored(config: AblationConfig, bench: Examination, arm: str, seed: int) -> list[Scored]:
    lines = sorted(read_answers(_answers_folder(config, bench, arm, seed)), key=lambda line: str(line["id"]))
    return [Scored(question=question_of(line), score=float(line["score"])) for line in lines]


def _mean(seeds: Sequence[Sequence[Scored]]) -> list[Scored]:
    """Each question with the mean of its scores; the tables are means of scores, so this is the mean of the tables."""
    scores = np.mean([[each.score for each in scored] for scored in seeds], axis=0).tolist()
    return [replace(each, score=score) for each, score in zip(seeds[0], scores, strict=True)]


def _draws(benchmark: Benchmark, scored: Mapping[str, list[list[Scored]]]) -> dict[str, list[dict[str, float]]]:
    """Tables of every arm for questions drawn with replacement, the same for all arms, and seeds drawn for each."""
    random = np.random.default_rng(0)
    draws: dict[str, list[dict[str, float]]] = {arm: [] for arm in scored}
    means: dict[tuple[str | int, ...], list[Scored]] = {}  # a few seeds can be drawn in a few ways only
    for rows in resamples(next(iter(scored.values()))[0], seed=0):
        for arm, seeds in scored.items():
            drawn = sorted(random.integers(len(seeds), size=len(seeds)).tolist())
            if (arm, *drawn) not in means:
                means[arm, *drawn] = _mean([seeds[number] for number in drawn])
            mean = means[arm, *drawn]
            draws[arm].append(benchmark.table([mean[row] for row in rows]))
    return draws


def _estimate(value: float, draws: Sequence[float]) -> Estimate:
    low, high = interval(draws)
    return Estimate(value=value, low=low, high=high)


def markdown(results: Results, config: AblationConfig) -> str:
    """Tables in the shape of the paper's Tables 4 to 6: an arm a row, a benchmark's columns, and the gain."""
    return "\n".join(_table(results[bench.bench], bench, config) for bench in config.benches)


def _table(rows: Sequence[ArmResult], bench: Examination, config: AblationConfig) -> str:
    names = list(rows[0].columns)
    first, gap = names[0], [] if rows[0].gap_closed is None else [f"share of {config.ceiling}'s gain, 95%"]
    heads = ["arm", "seeds", *names, f"{first}, 95%", "gain, 95%", *gap]
    title = (
        f"{bench.bench}, {bench.frames} frames, seeds {', '.join(map(str, config.seeds))}; percent; "
        f"gain over {config.baseline} in points of {first} with its 95% interval over questions and seeds."
    )
    lines = [title, "", *_rows(heads, [_cells_of(each, names) for each in rows])]
    if len(names) > 1:
        gains = [[each.name, *(_gain_text(each.gains[name]) for name in names[1:])] for each in rows]
        lines += ["", f"{bench.bench}, gain over {config.baseline} by column.", "", *_rows(["arm", *names[1:]], gains)]
    return "\n".join(lines) + "\n"


def _rows(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}", *(f"| {' | '.join(row)} |" for row in cells)]


def _cells_of(row: ArmResult, names: Sequence[str]) -> list[str]:
    values = [f"{row.columns[name].value:.1f}" if name in row.columns else "" for name in names]
    overall, gap = row.columns[names[0]], row.gap_closed
    cells = [row.name, str(row.num_seeds), *values, interval_text(overall.low, overall.high)]
    cells.append(_gain_text(row.gains[names[0]]))
    return cells if gap is None else [*cells, f"{gap.value:.0f}% ({interval_text(gap.low, gap.high)})"]


def _gain_text(gain: Estimate) -> str:
    return f"{gain.value:+.1f} ({interval_text(gain.low, gain.high)})"
