"""Two results compared: paired differences, their intervals, McNemar's exact p, and what cannot be compared."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from p4dprep.errors import RequestError
from student.evaluate import registry
from student.evaluate.benchmark import Scored
from student.evaluate.compare import compare, mcnemar
from tests.student.evaluate.test_result import scored, write_lines
from tests.student.evaluate.tiny_bench import TinyBench

CONTENT = {"bench": "tiny", "revision": "r", "mode": "official", "num_frames": 16, "student": "s", "num_failed": 0}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.BENCHMARKS, "tiny", TinyBench())


def write(folder: Path, answers: Sequence[Scored], content: dict[str, Any] | None = None, **changes: object) -> Path:
    folder.mkdir()
    write_lines(folder / "answers-0-of-1.jsonl", answers, **changes)
    (folder / "result.json").write_text(json.dumps(CONTENT | (content or {})))
    return folder


@pytest.mark.parametrize("counts", [(0, 0), (1, 0), (3, 9), (9, 3), (40, 40), (512, 600), (30_000, 30_500)])
def test_mcnemars_p_is_the_exact_binomial_test(counts: tuple[int, int]) -> None:
    expected = scipy.stats.binomtest(counts[0], sum(counts)).pvalue if sum(counts) else 1.0
    assert mcnemar(*counts) == pytest.approx(expected, rel=1e-8)


def test_differences_are_paired_and_counted_by_column(tmp_path: Path) -> None:
    far, fast = [1, 1, 0, 0, 1], [0, 0, 0, 1]
    first = write(tmp_path / "a", scored(far, "far") + scored(fast, "fast"), {"student": "sft"})
    second = write(tmp_path / "b", scored([1, 0, 1, 1, 1], "far") + scored([1, 1, 0, 1], "fast"), {"student": "4d"})
    found = compare(first, second)
    assert (found.first, found.second, found.bench) == ("sft", "4d", "tiny")
    assert [column.name for column in found.columns] == ["Avg", "far", "fast"]
    average, near, quick = found.columns
    assert (average.first, average.second) == pytest.approx((400 / 9, 700 / 9))
    assert average.difference == pytest.approx(300 / 9)
    assert [(each.only_first, each.only_second, each.num_questions) for each in found.columns] == [
        (1, 4, 9), (1, 2, 5), (0, 2, 4)
    ]  # fmt: skip
    assert average.p == pytest.approx(scipy.stats.binomtest(1, 5).pvalue)
    assert near.p == 1.0
    assert (quick.low, quick.high) == (0.0, 100.0)


def test_the_interval_is_that_of_the_paired_difference(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    before = random.integers(0, 2, 200)
    after = np.where(random.random(200) < 0.8, before, 1)
    found = compare(write(tmp_path / "a", scored(before.tolist())), write(tmp_path / "b", scored(after.tolist())))
    expected = scipy.stats.bootstrap(
        (after - before,), np.mean, n_resamples=1000, method="percentile", rng=np.random.default_rng(5)
    ).confidence_interval
    column = found.columns[0]
    assert (column.low, column.high) == pytest.approx((100 * expected.low, 100 * expected.high), abs=1.0)
    assert column.low > 0


def test_a_result_compared_with_itself_differs_in_nothing(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", scored([1, 0, 1, 0.5]))
    assert {(each.difference, each.low, each.high, each.p) for each in compare(folder, folder).columns} == {
        (0, 0, 0, 1)
    }


def test_the_order_of_the_lines_does_not_matter(tmp_path: Path) -> None:
    answers = scored([1, 0, 1, 0, 0, 1])
    first = write(tmp_path / "a", answers)
    others = scored([0, 0, 1, 1, 1, 1])
    found = [compare(first, write(tmp_path / f"b{n}", lines)) for n, lines in enumerate((others, others[::-1]))]
    assert found[0] == found[1]


def test_partial_credit_and_questions_that_failed_are_no_votes(tmp_path: Path) -> None:
    first = write(tmp_path / "a", scored([1, 1, 0, 0.4]))
    second = write(tmp_path / "b", scored([0, 0.5, 1, 1]))
    assert [(each.only_first, each.only_second) for each in compare(first, second).columns] == [(1, 1)] * 2
    failed = write(tmp_path / "c", scored([0, 0, 0, 0]), failure="is empty")
    column = compare(first, failed).columns[0]
    assert (column.only_first, column.p, column.second) == (0, 1.0, 0.0)


def test_questions_of_one_item_are_one_vote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from student.evaluate.sat import SAT

    monkeypatch.setitem(registry.BENCHMARKS, "tiny", SAT())

    def pairs(folder: Path, scores: Sequence[int]) -> Path:
        answers = [replace(each, question=replace(each.question, category="EgoM")) for each in scored(scores)]
        write(folder, answers)
        file = folder / "answers-0-of-1.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        lines = [line | {"tags": {"item": str(n // 2)}, "id": f"{n // 2}/{n % 2}"} for n, line in enumerate(lines)]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder

    found = compare(pairs(tmp_path / "a", [1, 1, 1, 0, 0, 0]), pairs(tmp_path / "b", [1, 0, 1, 1, 1, 1]))
    average = found.columns[0]
    assert (average.first, average.second) == pytest.approx((100 / 3, 200 / 3))
    assert (average.only_first, average.only_second, average.p) == (1, 2, 1.0)


@pytest.mark.parametrize("name", ["bench", "revision", "mode", "num_frames"])
def test_results_of_different_things_are_not_compared(tmp_path: Path, name: str) -> None:
    first, second = write(tmp_path / "a", scored([1])), write(tmp_path / "b", scored([1]), {name: "other"})
    with pytest.raises(RequestError, match=f"differ in {name}, {CONTENT[name]} and other; compare results of the same"):
        compare(first, second)


def test_a_folder_without_a_result_is_refused(tmp_path: Path) -> None:
    first = write(tmp_path / "a", scored([1]))
    with pytest.raises(RequestError, match="none has no result of p4dprep eval answers"):
        compare(first, tmp_path / "none")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "result.json").write_text("[]")
    with pytest.raises(RequestError, match=r"result\.json is no result of p4dprep eval answers"):
        compare(first, tmp_path / "b")


def test_results_without_a_common_question_are_refused(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a", scored([1], "far")), write(tmp_path / "b", scored([1], "fast"))
    with pytest.raises(RequestError, match="have no question in common"):
        compare(first, second)
