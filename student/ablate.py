"""Does it help? The same student trained in several ways and with several seeds, and asked the same questions.

Every arm and seed is a run of `student.train` and a result of `student.evaluate.answers`, in folders of their own, so
an ablation that was cut off goes on where it was.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from p4dprep.config import validated
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

ShowArm = Callable[[str], None]
"""Told of every arm and seed as it begins."""


class AblationConfig(BaseModel):
    """A request to compare ways of training.

    Attributes:
        out: folder for runs, answers and the table.
        train: fields of TrainConfig that all arms share.
        arms: name to the fields that differ; null is the student as it is, untrained.
        baseline: the arm that the others are held against.
        seeds: of every arm that is trained.
        bench, mode, data, frames: the benchmark, see `p4dprep eval answers`.
        bench_cache: a teacher's latents of the benchmark's videos, for arms that read them at inference.
        batch_size: questions answered at once.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    out: str = Field(min_length=1)
    train: dict[str, Any]
    arms: dict[str, dict[str, Any] | None] = Field(min_length=1)
    baseline: str
    seeds: tuple[int, ...] = (0, 1, 2)
    bench: str = "worlds"
    mode: str | None = None
    data: str
    frames: int = Field(default=16, ge=1)
    bench_cache: str | None = None
    batch_size: int = Field(default=8, ge=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.baseline not in self.arms:
            raise ValueError(f"baseline {self.baseline!r} is no arm; there are {', '.join(self.arms)}")
        if wrong := [name for name in self.arms if not re.fullmatch(r"[\w+.][\w+. -]*", name)]:
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
        place = str(Path(self.out) / "runs" / f"{arm}-{seed}")
        return parse_training(self.train | (self.arms[arm] or {}) | {"out": place, "seed": seed})


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
        difference: first column less that of the baseline, on the same questions.
    """

    name: str
    num_seeds: int
    columns: Mapping[str, Estimate]
    difference: Estimate


def parse_config(values: dict[str, Any]) -> AblationConfig:
    """Validate a request and, before anything is trained, each of its arms.

    Raises:
        RequestError: naming each wrong field.
    """
    config = validated(AblationConfig, values)
    registry.find(config.bench)
    for arm, fields in config.arms.items():
        if fields is not None:
            config.training(arm, config.seeds[0])
    return config


def ablate(
    config: AblationConfig, *, show: ShowLine = lambda *_: None, show_arm: ShowArm = lambda _: None
) -> tuple[ArmResult, ...]:
    """Train and ask every arm with every seed; write ablation.md and ablation.json.

    Args:
        config: the request.
        show: told of every log line of a training.
        show_arm: told of every arm and seed.

    Raises:
        P4DError: whatever training and asking raise.
    """
    for arm, seed in _cells(config):
        show_arm(f"{arm}, seed {seed}")
        student = str(config.train["student"])
        if config.arms[arm] is not None:
            student = str(train(config.training(arm, seed), resume=True, show=show).run)
        answer(_questions(config, arm, seed, student))
    results = _results(config)
    out = Path(config.out)
    write_atomically(out / REPORT, json.dumps([asdict(each) for each in results], indent=2) + "\n")
    write_atomically(out / TABLE, markdown(results, config))
    return results


def _cells(config: AblationConfig) -> Iterator[tuple[str, int]]:
    return ((arm, seed) for arm in config.arms for seed in config.seeds_of(arm))


def _questions(config: AblationConfig, arm: str, seed: int, student: str) -> AnswerRequest:
    is_rival = (config.arms[arm] or {}).get("strategy", "p4d") != "p4d"
    return AnswerRequest(
        student=student,
        bench=config.bench,
        mode=config.mode,
        data=Path(config.data),
        out=_answers_folder(config, arm, seed),
        num_frames=config.frames,
        cache=config.bench_cache if is_rival else None,
        batch_size=config.batch_size,
    )


def _answers_folder(config: AblationConfig, arm: str, seed: int) -> Path:
    return Path(config.out) / "answers" / f"{arm}-{seed}"


def _results(config: AblationConfig) -> tuple[ArmResult, ...]:
    """Rows of the table, from the answers on disk."""
    benchmark = registry.find(config.bench)
    scored = {arm: [_scored(config, arm, seed) for seed in config.seeds_of(arm)] for arm in config.arms}
    values = {arm: in_order(benchmark, benchmark.table(_mean(seeds))) for arm, seeds in scored.items()}
    headline = next(iter(values[config.baseline]))
    draws = _draws(benchmark, scored)
    base = [each.get(headline, math.nan) for each in draws[config.baseline]]
    rows = []
    for arm, columns in values.items():
        ahead = [each.get(headline, math.nan) - other for each, other in zip(draws[arm], base, strict=True)]
        rows.append(
            ArmResult(
                name=arm,
                num_seeds=len(scored[arm]),
                columns={
                    name: _estimate(value, [each.get(name, math.nan) for each in draws[arm]])
                    for name, value in columns.items()
                },
                difference=_estimate(columns[headline] - values[config.baseline][headline], ahead),
            )
        )
    return tuple(rows)


def _scored(config: AblationConfig, arm: str, seed: int) -> list[Scored]:
    lines = sorted(read_answers(_answers_folder(config, arm, seed)), key=lambda line: str(line["id"]))
    return [Scored(question=question_of(line), score=float(line["score"])) for line in lines]


def _mean(seeds: Sequence[Sequence[Scored]]) -> list[Scored]:
    """Each question with the mean of its scores; the tables are means of scores, so this is the mean of the tables."""
    scores = np.mean([[each.score for each in scored] for scored in seeds], axis=0).tolist()
    return [replace(each, score=score) for each, score in zip(seeds[0], scores, strict=True)]


def _draws(benchmark: Benchmark, scored: Mapping[str, list[list[Scored]]]) -> dict[str, list[dict[str, float]]]:
    """Tables of every arm for questions drawn with replacement, the same for all arms, and seeds drawn for each."""
    random = np.random.default_rng(0)
    draws: dict[str, list[dict[str, float]]] = {arm: [] for arm in scored}
    for rows in resamples(next(iter(scored.values()))[0], seed=0):
        for arm, seeds in scored.items():
            drawn = [seeds[number] for number in random.integers(len(seeds), size=len(seeds)).tolist()]
            mean = _mean(drawn)
            draws[arm].append(benchmark.table([mean[row] for row in rows]))
    return draws


def _estimate(value: float, draws: Sequence[float]) -> Estimate:
    low, high = interval(draws)
    return Estimate(value=value, low=low, high=high)


def markdown(results: Sequence[ArmResult], config: AblationConfig) -> str:
    """The table in the shape of the paper's Tables 4 to 6: an arm a row, the benchmark's columns, and the gain."""
    names = list(results[0].columns)
    lines = [
        f"{config.bench}, {config.frames} frames, seeds {', '.join(map(str, config.seeds))}; percent; "
        f"gain over {config.baseline} in points of {names[0]} with its 95% interval over questions and seeds.",
        "",
        f"| arm | seeds | {' | '.join(names)} | {names[0]}, 95% | gain, 95% |",
        f"| --- |{' --- |' * (len(names) + 3)}",
    ]
    for each in results:
        cells = [f"{each.columns[name].value:.1f}" if name in each.columns else "" for name in names]
        first, gain = each.columns[names[0]], each.difference
        lines.append(
            f"| {each.name} | {each.num_seeds} | {' | '.join(cells)} | {interval_text(first.low, first.high)} "
            f"| {gain.value:+.1f} ({interval_text(gain.low, gain.high)}) |"
        )
    return "\n".join(lines) + "\n"
