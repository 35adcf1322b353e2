"""From lines of answers to a result: the official table with intervals, and what must be known beside it."""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from p4dprep.errors import CorruptDataError, RequestError
from student.evaluate.benchmark import Benchmark, Question, Scored
from student.run_folder import write_atomically

IDENTITY, RESULT, TABLE = "identity.json", "result.json", "table.md"

NUM_DRAWS, _MIN_DRAWS = 1000, 200
_MAX_ROWS = 20_000_000
"""Of all draws together, beyond 20,000 questions: where intervals are narrow, fewer draws tell them as well."""

_PERCENTILES = (2.5, 97.5)
_MAX_REASONS = 20
_UNIT_TAG = "item"
"""Questions that share this tag stand or fall together, and are drawn together."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """One number of the table.

    Attributes:
        name: the official one.
        value: in percent.
        low, high: 95% percentile bootstrap interval over questions; NaN with fewer than two.
        num_questions: that count in it.
    """

    name: str
    value: float
    low: float
    high: float
    num_questions: int


@dataclass(frozen=True, kw_only=True)
class Result:
    """A benchmark answered whole.

    Attributes:
        identity: what was asked of whom, as identity.json says.
        num_asked: questions.
        num_unmatched: replies in which the official rule found no answer; what it falls back to is what was scored.
        num_failed: questions that could not be asked; they score 0.
        failures: reason to how many, the most frequent ones.
        table: the official columns, in the official order.
    """

    identity: Mapping[str, Any]
    num_asked: int
    num_unmatched: int
    num_failed: int
    failures: Mapping[str, int]
    table: tuple[Column, ...]

    def to_json(self) -> dict[str, Any]:
        """As result.json holds it; an interval that does not exist is null."""
        columns = [
            {
                name: None if isinstance(value, float) and math.isnan(value) else value
                for name, value in vars(each).items()
            }
            for each in self.table
        ]
        counts = {"num_asked": self.num_asked, "num_unmatched": self.num_unmatched, "num_failed": self.num_failed}
        return {**self.identity, **counts, "failures": dict(self.failures), "table": columns}


def answer_files(out: Path) -> list[Path]:
    """The answer files of all shards, by name."""
    return sorted(out.glob("answers-*-of-*.jsonl"))


def read_lines(file: IO[bytes], path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Every line of an answer file with the byte at which it ends; a last line that was torn is left out.

    Raises:
        CorruptDataError: another line is damaged.
    """
    for number, raw in enumerate(file, start=1):
        if not raw.endswith(b"\n"):
            return
        try:
            line = json.loads(raw)
            if not isinstance(line["id"], str) or not isinstance(line["score"], int | float):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            raise CorruptDataError(f"{path}, line {number}, is no answer; delete the file and ask again") from None
        yield line, file.tell()


def read_answers(out: Path) -> Iterator[dict[str, Any]]:
    """The lines of all shards; of a question that two of them answered, the first.

    Raises:
        CorruptDataError: a line is damaged.
    """
    seen: set[str] = set()
    for path in answer_files(out):
        with open(path, "rb") as file:
            for line, _ in read_lines(file, path):
                if line["id"] not in seen:
                    seen.add(line["id"])
                    yield line


def make_result(out: Path, benchmark: Benchmark, questions: Sequence[Question], identity: Mapping[str, Any]) -> Result:
    """The result of all answers in a folder.

    Raises:
        RequestError: a question was not answered.
    """
    scores: dict[str, float] = {}
    num_unmatched, failures = 0, Counter[str]()
    for line in read_answers(out):
        scores[line["id"]] = float(line["score"])
        num_unmatched += not line["failure"] and not line["is_matched"]
        failures.update([line["failure"]] if line["failure"] else [])
    if missing := [question.id for question in questions if question.id not in scores]:
        raise RequestError(f"{out} lacks answers to {len(missing)} questions, such as {missing[0]!r}; ask them first")
    scored = [Scored(question=question, score=scores[question.id]) for question in questions]
    return Result(
        identity=identity,
        num_asked=len(questions),
        num_unmatched=num_unmatched,
        num_failed=failures.total(),
        failures=dict(sorted(failures.most_common(_MAX_REASONS))),
        table=make_table(benchmark, scored, int(identity["seed"])),
    )


def make_table(benchmark: Benchmark, scored: Sequence[Scored], seed: int) -> tuple[Column, ...]:
    """The official columns with their intervals."""
    values = in_order(benchmark, benchmark.table(scored))
    draws: dict[str, list[float]] = {name: [] for name in values}
    for rows in resamples(scored, seed):
        table = benchmark.table([scored[row] for row in rows])
        for name, found in draws.items():
            found.append(table.get(name, math.nan))
    counts, columns = count_by_column(benchmark, scored), []
    for name, value in values.items():
        low, high = interval(draws[name])
        columns.append(Column(name=name, value=value, low=low, high=high, num_questions=counts[name]))
    return tuple(columns)


def in_order(benchmark: Benchmark, table: Mapping[str, float]) -> dict[str, float]:
    """A table in the official order of columns, without those that have no value."""
    names = dict.fromkeys((*benchmark.columns, *table))
    return {name: table[name] for name in names if not math.isnan(table.get(name, math.nan))}


def count_by_column(benchmark: Benchmark, scored: Sequence[Scored]) -> Counter[str]:
    """How many questions count in each column."""
    return Counter(name for each in scored for name, value in benchmark.table([each]).items() if not math.isnan(value))


def resamples(scored: Sequence[Scored], seed: int) -> Iterator[list[int]]:
    """Rows of `NUM_DRAWS` draws of as many questions, with replacement; none of fewer than two questions.

    Of very many there are fewer draws, at least 200. Questions that stand or fall together are drawn together.
    """
    groups, random = units(scored), np.random.default_rng(seed)
    if len(groups) < 2:
        return
    for _ in range(max(_MIN_DRAWS, min(NUM_DRAWS, _MAX_ROWS // len(scored)))):
        yield [row for group in random.integers(len(groups), size=len(groups)).tolist() for row in groups[group]]


def units(scored: Sequence[Scored]) -> list[list[int]]:
    """Rows of questions that stand or fall together; most stand alone."""
    found: dict[str, list[int]] = {}
    for row, each in enumerate(scored):
        tag = each.question.tags.get(_UNIT_TAG)
        found.setdefault(f"id {each.question.id}" if tag is None else f"item {tag}", []).append(row)
    return list(found.values())


def interval(draws: Sequence[float]) -> tuple[float, float]:
    """The 2.5th and 97.5th percentile of the draws that are numbers; NaN if none is."""
    known = [value for value in draws if not math.isnan(value)]
    if not known:
        return math.nan, math.nan
    low, high = np.percentile(known, _PERCENTILES).tolist()
    return low, high


def write_result(out: Path, result: Result, benchmark: Benchmark) -> None:
    """Write result.json and table.md, each whole or not at all."""
    write_atomically(out / RESULT, json.dumps(result.to_json(), indent=2, allow_nan=False) + "\n")
    write_atomically(out / TABLE, markdown(result, benchmark))


def markdown(result: Result, benchmark: Benchmark) -> str:
    """The table in the official column order, one decimal, with intervals, and what it was measured with."""
    rows = [
        [column.name for column in result.table],
        ["---:"] * len(result.table),
        [f"{column.value:.1f}" for column in result.table],
        [interval_text(column.low, column.high) for column in result.table],
        [str(column.num_questions) for column in result.table],
    ]
    heads = [benchmark.name, "---", str(result.identity["student"]).replace("|", "\\|"), "95% interval", "questions"]
    lines = [f"| {' | '.join([head, *row])} |" for head, row in zip(heads, rows, strict=True)]
    return "\n".join([*lines, "", *(f"- {fact}" for fact in facts(result))]) + "\n"


def facts(result: Result) -> list[str]:
    """What a reader of the table must know besides, a line each."""
    said = result.identity
    step = "" if said["step"] is None else f", step {said['step']}"
    return [
        f"{result.num_asked} questions, {result.num_unmatched} replies without an answer, {result.num_failed} that "
        "could not be asked and score 0",
        f"mode {said['mode']}, data {said['revision'][:12]}, frames: {said['frames']}",
        f"student {said['student']}{step}, {said['student_digest'][:12]}, time cue {said['time_cue']}, "
        f"{said['dtype']}, {said['generation']}, seed {said['seed']}",
    ]


def interval_text(low: float, high: float) -> str:
    """`37.1 .. 45.2`, or `-` where there is none."""
    return "-" if math.isnan(low) else f"{low:.1f} .. {high:.1f}"
