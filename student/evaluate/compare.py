"""Two results of one benchmark, question by question: the difference of every column, its interval, McNemar's p."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from p4dprep.errors import RequestError
from student.evaluate import registry
from student.evaluate.benchmark import Benchmark, Question, Scored, Shown
from student.evaluate.result import RESULT, count_by_column, in_order, interval, read_answers, resamples, units

_SAME = ("bench", "revision", "mode", "num_frames")


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One column of two results.

    Attributes:
        name: of the column.
        first, second: its values in percent, over the questions that both results have.
        difference: second - first, in points.
        low, high: 95% percentile bootstrap interval of the difference, over questions drawn for both alike.
        num_questions: that count in the column.
        only_first, only_second: questions that were asked in both, and are right (score 1) in this one and wrong (score
            0) in the other; where several stand or fall together, they count as one.
        p: McNemar's exact two-sided p of those two counts; 1 without any.
    """

    name: str
    first: float
    second: float
    difference: float
    low: float
    high: float
    num_questions: int
    only_first: int
    only_second: int
    p: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two results of one benchmark.

    Attributes:
        bench, revision, mode, num_frames: what both have in common.
        first, second: names of the students.
        num_failed: questions that could not be asked in the first, and in the second.
        columns: in the official order.
    """

    bench: str
    revision: str
    mode: str
    num_frames: int
    first: str
    second: str
    num_failed: tuple[int, int]
    columns: tuple[Difference, ...]


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """A question with both scores.

    Attributes:
        is_decided: whether both were asked, and each is right or wrong.
    """

    first: Scored
    second: Scored
    is_decided: bool


def compare(first: Path, second: Path, *, seed: int = 0) -> Comparison:
    """Compare two folders of results, the second against the first.

    Args:
        first, second: as `p4dprep eval answers` writes them.
        seed: of the draws.

    Raises:
        RequestError: a folder has no result, or they are of different benchmarks, revisions, modes or frames.
        CorruptDataError: answers are damaged.
    """
    results = _read_result(first), _read_result(second)
    for name in _SAME:
        if results[0][name] != results[1][name]:
            values = " and ".join(str(result[name]) for result in results)
            raise RequestError(f"{first} and {second} differ in {name}, {values}; compare results of the same "
                               "benchmark, data, mode and number of frames")  # fmt: skip
    benchmark, pairs = registry.find(results[0]["bench"]), _pairs(first, second)
    return Comparison(
        bench=benchmark.name,
        revision=results[0]["revision"],
        mode=results[0]["mode"],
        num_frames=results[0]["num_frames"],
        first=results[0]["student"],
        second=results[1]["student"],
        num_failed=(results[0]["num_failed"], results[1]["num_failed"]),
        columns=_differences(benchmark, pairs, seed),
    )


def _read_result(out: Path) -> dict[str, Any]:
    try:
        content = json.loads((out / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(f"{out} has no result of p4dprep eval answers: {error}") from None
    if not isinstance(content, dict) or not all(name in content for name in (*_SAME, "student", "num_failed")):
        raise RequestError(f"{out / RESULT} is no result of p4dprep eval answers")
    return content


def _pairs(first: Path, second: Path) -> list[_Pair]:
    before = {line["id"]: (float(line["score"]), not line["failure"]) for line in read_answers(first)}
    pairs = []
    for line in read_answers(second):
        if line["id"] not in before:
            continue
        question, (score, was_asked) = question_of(line), before[line["id"]]
        scores = score, float(line["score"])
        pairs.append(
            _Pair(
                first=Scored(question=question, score=scores[0]),
                second=Scored(question=question, score=scores[1]),
                is_decided=was_asked and not line["failure"] and set(scores) <= {0.0, 1.0},
            )
        )
    if not pairs:
        raise RequestError(f"{first} and {second} have no question in common")
    return sorted(pairs, key=lambda pair: pair.first.question.id)


def question_of(line: Mapping[str, Any]) -> Question:
    """A question as far as tables look at it."""
    return Question(
        id=line["id"],
        category=line["category"],
        prompt=line["prompt"],
        shown=Shown(),
        options=tuple(line["options"]),
        answer=line["truth"],
        tags=line["tags"],
    )


def _differences(benchmark: Benchmark, pairs: Sequence[_Pair], seed: int) -> tuple[Difference, ...]:
    first, second = [pair.first for pair in pairs], [pair.second for pair in pairs]
    tables = in_order(benchmark, benchmark.table(first)), benchmark.table(second)
    draws: dict[str, list[float]] = {name: [] for name in tables[0]}
    for rows in resamples(first, seed):
        drawn = [benchmark.table([side[row] for row in rows]) for side in (first, second)]
        for name, values in draws.items():
            values.append(drawn[1].get(name, math.nan) - drawn[0].get(name, math.nan))
    counts, discordant = count_by_column(benchmark, first), _discordant(benchmark, pairs)
    made = []
    for name, value in tables[0].items():
        low, high = interval(draws[name])
        only_first, only_second = discordant[name, 1], discordant[name, -1]
        made.append(
            Difference(
                name=name,
                first=value,
                second=tables[1][name],
                difference=tables[1][name] - value,
                low=low,
                high=high,
                num_questions=counts[name],
                only_first=only_first,
                only_second=only_second,
                p=mcnemar(only_first, only_second),
            )
        )
    return tuple(made)


def _discordant(benchmark: Benchmark, pairs: Sequence[_Pair]) -> Counter[tuple[str, int]]:
    """By column: how many units the first alone has right (1), and the second alone (-1)."""
    found: Counter[tuple[str, int]] = Counter()
    for rows in units([pair.first for pair in pairs]):
        unit = [pairs[row] for row in rows]
        if not all(pair.is_decided for pair in unit):
            continue
        before, after = (
            benchmark.table([pair.first for pair in unit]),
            benchmark.table([pair.second for pair in unit]),
        )
        found.update((name, round(value - after[name]) // 100) for name, value in before.items() if value == value)
    return found


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p that one of two answerers is right more often, from the questions that one alone has right.

    Under the null hypothesis each such question falls to either side like a fair coin.
    """
    count, smaller = only_first + only_second, min(only_first, only_second)
    logs = [
        math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) - count * math.log(2)
        for k in range(smaller + 1)
    ]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))
