"""Times of parts of a step, and ratios of pairs, for the benchmarks of training."""

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

NUM_RESAMPLES = 10_000
NUM_WARM_UP = 2
"""Rounds before those that count."""


class Clock:
    """Wall-clock and CPU seconds, or FLOPs, from mark to mark."""

    def __init__(self, device: str, counter: FlopCounterMode | None = None) -> None:
        self.parts: dict[str, tuple[float, float]] = {}
        self._device, self._counter = device, counter
        self._last = self._now()

    def _now(self) -> tuple[float, float]:
        if self._counter is not None:
            return float(self._counter.get_total_flops()), 0.0
        if self._device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    def mark(self, part: str) -> None:
        """What happened since the last mark was this part."""
        now = self._now()
        self.parts[part] = (now[0] - self._last[0], now[1] - self._last[1])
        self._last = now

    @property
    def total(self) -> tuple[float, float]:
        """Of all parts."""
        wall, cpu = zip(*self.parts.values(), strict=True)
        return sum(wall), sum(cpu)


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Median over pairs of ours to theirs, and its 95% bootstrap interval."""
    ratios = np.array(ours) / np.array(theirs)
    drawn = np.random.default_rng(0).integers(0, len(ratios), (NUM_RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(ratios[drawn], axis=1), [0.025, 0.975])
    return {"median": float(np.median(ratios)), "low": float(low), "high": float(high)}
