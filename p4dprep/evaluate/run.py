"""The run over all clips: a few threads read and judge, and of each clip only the sums of its scores stay.

Shape suffixes: `n` clips, `m` scores.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from p4dprep import metrics
from p4dprep.cache import Cache, Group
from p4dprep.errors import MissingDataError, RequestError
from p4dprep.evaluate.clip import BUCKETED, OURS, Cells, MapPair, Maps, bucket_names, flat, map_pair, score_variants
from p4dprep.evaluate.pairs import Pair, find_pairs, join, make_pair, open_truth, target_of
from p4dprep.evaluate.report import Bucket, ClipScores, Comparison, MapReport, Metric, Skipped, metric_info
from p4dprep.metrics import Ratio

T = TypeVar("T")
R = TypeVar("R")

NUM_THREADS = min(4, os.cpu_count() or 1)
TIME_TOLERANCE_SECONDS = 1e-4
"""Frame times that differ by less are the same frames."""


def evaluate_maps(
    predicted: Cache,
    truth: Cache,
    *,
    groups: Sequence[str] = (),
    truth_group: str = "",
    alignment: str = "",
    limit: int | None = None,
    num_worst: int = 3,
    seed: int = 0,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> MapReport:
    """Judge every comparable target of a cache by the truth in another, on the clips that both have.

    Args:
        predicted: the cache to judge.
        truth: the cache that is right.
        groups: which groups to judge; all that have a comparable target if empty.
        truth_group: the group that is right; by default the only one, or else the one named `truth`.
        alignment: how depth is aligned; by default `metrics.default_alignment` of its quantity.
        limit: judge only so many of the shared clips, the first in the predicted cache's order.
        num_worst: how many worst clips to name per shown score.
        seed: of the bootstrap.
        on_progress: called with clips done and clips in all.

    Raises:
        RequestError: the caches share no clips or no comparable targets, sizes differ, it is not clear which group is
            right, or the alignment does not fit.
        MissingDataError: there is no such group.
        CorruptDataError: a committed object is gone or damaged.
    """
    standard = open_truth(truth, truth_group)
    pairs = find_pairs(predicted, groups, standard, truth, alignment)
    shared = join(predicted, truth)
    clips = shared[:limit]
    needs_depth = any(pair.kind == "depth" for pair in pairs)
    known = np.flatnonzero(standard.states().ok).tolist() if needs_depth else []
    total = len(known) + len(clips)
    depth = _mean_depth(standard, pairs, known, lambda done: on_progress(done, total))
    run = _Run(pairs, standard, depth)
    for done, clip in enumerate(_in_threads(run.judge, clips), start=1):
        run.add(*clip)
        on_progress(len(known) + done, total)
    return MapReport(
        predicted=predicted.store.url,
        truth=truth.store.url,
        truth_group=standard.name,
        num_shared=len(shared),
        num_only_predicted=predicted.num_clips - len(shared),
        num_only_truth=truth.num_clips - len(shared),
        num_judged=len(clips),
        depth_baseline=depth,
        comparisons=run.comparisons(seed, num_worst),
        skipped=tuple(run.skipped),
    )


def read_pair(predicted: Cache, truth: Cache, report: MapReport, comparison: Comparison, clip_id: str) -> MapPair:
    """The maps of one judged clip as they were compared, for pictures. Errors as those of reading a cache."""
    standard = truth.group(report.truth_group)
    group = predicted.group(comparison.group)
    pair = make_pair(group, target_of(group, comparison.target), standard, truth, comparison.alignment)
    if pair is None:
        raise MissingDataError(f"{comparison.group}/{comparison.target} has no counterpart in {truth.store.url}")
    ours, theirs = (pc.index(cache.clips().column("id"), clip_id).as_py() for cache in (predicted, truth))
    return map_pair(pair, Maps(group, ours), Maps(standard, theirs))


def _in_threads(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Results in order; few items are under way at once, so memory does not grow with their number."""
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > NUM_THREADS:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _mean_depth(
    standard: Group, pairs: Sequence[Pair], indices: Sequence[int], on_progress: Callable[[int], None]
) -> float:
    """The geometric mean of all judged true depths of these clips; NaN if no depth is compared."""
    names = [pair.truth.name for pair in pairs if pair.kind == "depth"]
    if not names:
        return float("nan")

    def log_depth(index: int) -> Ratio:
        depth = flat(standard.read(index, names[0]))
        judged = depth[metrics.has_depth(depth)]
        return Ratio(float(np.log(judged).sum(dtype=np.float64)), judged.size)

    total, num = 0.0, 0.0
    for done, found in enumerate(_in_threads(log_depth, indices), start=1):
        total, num = total + found.total, num + found.num
        on_progress(done)
    return float(np.exp(total / num)) if num else float("nan")


class _Run:
    """Judges clips and keeps their sums."""

    def __init__(self, pairs: Sequence[Pair], standard: Group, depth: float) -> None:
        self.skipped: list[Skipped] = []
        self._standard = standard
        self._depth = depth
        self._tables = {pair.name: _Table(pair) for pair in pairs}
        self._groups = {pair.group.name: pair.group for pair in pairs}
        self._ok = {name: group.states().ok for name, group in self._groups.items()}
        self._truth_ok = standard.states().ok

    def judge(self, clip: tuple[str, int, int]) -> tuple[str, list[Skipped], dict[str, dict[str, Cells]]]:
        """Id of a clip, why it was left out where it was, and the cells of each pair. Safe for several threads."""
        clip_id, ours, theirs = clip
        if not self._truth_ok[theirs]:
            return clip_id, [Skipped(clip_id=clip_id, group="", reason="the truth is not committed")], {}
        true, skipped = Maps(self._standard, theirs), []
        cells: dict[str, dict[str, Cells]] = {}
        for name, group in self._groups.items():
            reason = self._why_not(group, ours, true)
            if reason:
                skipped.append(Skipped(clip_id=clip_id, group=name, reason=reason))
                continue
            maps = Maps(group, ours)
            for pair in (table.pair for table in self._tables.values() if table.pair.group is group):
                cells[pair.name] = score_variants(pair, maps, true, self._depth)
        return clip_id, skipped, cells

    def _why_not(self, group: Group, index: int, true: Maps) -> str:
        if not self._ok[group.name][index]:
            return "the prediction is not committed"
        ours, theirs = group.read_time(index), self._standard.read_time(true.index)
        if ours.shape != theirs.shape or np.abs(ours - theirs).max() > TIME_TOLERANCE_SECONDS:
            return "the frame times differ: were both caches made with the same sampling, of the same video?"
        return ""

    def add(self, clip_id: str, skipped: Sequence[Skipped], cells: Mapping[str, Mapping[str, Cells]]) -> None:
        """Keep what `judge` found."""
        self.skipped += skipped
        for name, variants in cells.items():
            self._tables[name].add(clip_id, variants)

    def comparisons(self, seed: int, num_worst: int) -> tuple[Comparison, ...]:
        """The report of each pair that has a clip.

        Raises:
            RequestError: none has.
        """
        tables = [table for table in self._tables.values() if table.clip_ids]
        if not tables:
            reason = f": {self.skipped[0].reason}" if self.skipped else ""
            raise RequestError(f"the caches share clips, but none can be compared{reason}")
        return tuple(table.comparison(seed, num_worst) for table in tables)


class _Table:
    """Sums and numbers of every cell of every clip, for one pair."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.clip_ids: list[str] = []
        self._columns: list[tuple[str, str]] = []
        self._rows: dict[str, list[NDArray[np.float64]]] = {}

    def add(self, clip_id: str, variants: Mapping[str, Cells]) -> None:
        """One clip; every clip has the same variants and cells."""
        if not self._columns:
            self._columns = list(variants[OURS])
        self.clip_ids.append(clip_id)
        for name, cells in variants.items():
            self._rows.setdefault(name, []).append(np.array([cells[column] for column in self._columns], np.float64))

    def comparison(self, seed: int, num_worst: int) -> Comparison:
        """Everything pooled."""
        tables = {name: np.stack(rows) for name, rows in self._rows.items()}
        bounds = metrics.bootstrap_intervals(tables[OURS][..., 0], tables[OURS][..., 1], seed=seed)
        values = {name: _divide(table) for name, table in tables.items()}
        pooled = {name: _divide(table.sum(axis=0)) for name, table in tables.items()}
        num_n = (tables[OURS][..., 1] > 0).sum(axis=0)
        found = {
            column: _metric(column[1], i, pooled, (bounds[0][i], bounds[1][i]), int(num_n[i]))
            for i, column in enumerate(self._columns)
        }
        whole = {name: i for i, (bucket, name) in enumerate(self._columns) if not bucket}
        return Comparison(
            kind=self.pair.kind,
            group=self.pair.group.name,
            target=self.pair.spec.name,
            teacher=self.pair.group.teacher,
            quantity=self.pair.spec.quantity,
            truth_target=self.pair.truth.name,
            alignment=self.pair.alignment,
            metrics=tuple(found["", name] for name in whole),
            buckets=tuple(self._buckets(found, tables[OURS][..., 1].sum(axis=0))),
            clips=tuple(self._clip(values, whole, row) for row in range(len(self.clip_ids))),
            worst=self._worst(values[OURS], whole, num_worst),
        )

    def _buckets(self, found: Mapping[tuple[str, str], Metric], num_m: NDArray[np.float64]) -> Iterator[Bucket]:
        for axis in self.pair.keys if self.pair.kind in BUCKETED else ():
            names, scores = bucket_names(axis), BUCKETED[self.pair.kind]
            counts = [num_m[self._columns.index((name, scores[0]))] for name in names]
            for name, count in zip(names, counts, strict=True):
                fraction = float(count / sum(counts)) if sum(counts) else float("nan")
                kept = tuple(found[name, score] for score in scores)
                yield Bucket(axis=axis, name=name, pixel_fraction=fraction, metrics=kept)

    def _clip(self, values: Mapping[str, NDArray[np.float64]], whole: Mapping[str, int], row: int) -> ClipScores:
        scores = {name: {score: float(table[row, i]) for score, i in whole.items()} for name, table in values.items()}
        return ClipScores(clip_id=self.clip_ids[row], scores=scores.pop(OURS), baselines=scores)

    def _worst(
        self, values_nm: NDArray[np.float64], whole: Mapping[str, int], num_worst: int
    ) -> dict[str, tuple[str, ...]]:
        worst = {}
        for name, i in whole.items():
            info = metric_info(name)
            if info.shown:
                badness = -values_nm[:, i] if info.higher_is_better else values_nm[:, i]
                order = np.argsort(-badness, kind="stable")  # NaN comes last
                known = order[np.isfinite(badness[order])][:num_worst]
                worst[name] = tuple(self.clip_ids[row] for row in known.tolist())
        return worst


def _divide(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sums over numbers on the last axis; NaN where the number is 0."""
    num = table[..., 1]
    return np.asarray(np.where(num > 0, table[..., 0] / np.where(num > 0, num, 1), np.nan))


def _metric(
    name: str, i: int, pooled: Mapping[str, NDArray[np.float64]], bounds: tuple[float, float], num_clips: int
) -> Metric:
    info = metric_info(name)
    return Metric(
        name=name,
        unit=info.unit,
        higher_is_better=info.higher_is_better,
        value=float(pooled[OURS][i]),
        low=float(bounds[0]),
        high=float(bounds[1]),
        num_clips=num_clips,
        baselines={variant: float(values[i]) for variant, values in pooled.items() if variant != OURS},
    )
