"""The order of training: which samples make which batch, as a pure function of seed, epoch and step.

Nothing else enters: no random state, no number of workers or ranks, no version of a library. So a run resumes in the
middle of an epoch by naming the steps it has done, and every rank works out its own share.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from p4dprep.errors import RequestError


class SampleKey(NamedTuple):
    """What a loader asks for: a row, in an epoch, since augmentation differs from epoch to epoch."""

    epoch: int
    row: int


def mixed(*words: int | NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Integers scrambled into 64 even bits, by the finaliser of SplitMix64 (Steele et al., OOPSLA 2014) after each.

    Args:
        words: not negative; arrays broadcast.
    """
    state = np.zeros(1, np.uint64)
    for word in words:
        state = (state ^ np.asarray(word, np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return state


@lru_cache(maxsize=2)
def epoch_order(num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """A permutation of the samples: they are sorted by a hash of (seed, epoch, row)."""
    order = np.argsort(mixed(seed, epoch, np.arange(num_samples, dtype=np.uint64)), kind="stable")
    order.flags.writeable = False
    return order


@dataclass(frozen=True, kw_only=True)
class BatchOrder:
    """The batches of a run. The last one of an epoch is filled up from the epoch's start, so that all are of one size.

    Attributes:
        num_samples: of the data.
        batch_size: samples of one step, of all ranks together.
        seed: another one gives another order.
    """

    num_samples: int
    batch_size: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_samples < 1 or self.batch_size < 1 or self.seed < 0:
            raise RequestError(f"there must be a sample, a batch size of 1 and a seed of 0 at least: {self}")

    @property
    def num_steps(self) -> int:
        """Batches of one epoch."""
        return -(-self.num_samples // self.batch_size)

    def rows(self, epoch: int, step: int) -> NDArray[np.int64]:
        """The samples of one batch, (batch_size,).

        Args:
            epoch: from 0.
            step: inside the epoch, from 0.
        """
        if not 0 <= step < self.num_steps or epoch < 0:
            raise ValueError(f"there is no step {step} of epoch {epoch} among {self.num_steps}")
        order = epoch_order(self.num_samples, self.seed, epoch)
        first = step * self.batch_size
        return order.take(range(first, first + self.batch_size), mode="wrap")


class RunBatches(Sampler[list[SampleKey]]):
    """One rank's micro-batches of a whole run, for a DataLoader's `batch_sampler`.

    Rank r of n takes every n-th sample of each batch, so a step sees the same samples whatever n is.

    Args:
        order: of the whole run.
        num_steps: batches of the run, over all its epochs.
        micro_batch_size: samples that a rank takes at once.
        first_step: where to begin; a resumed run names the steps it has done.
        rank: of this process.
        num_ranks: how many there are; with the micro-batch's size it must divide the batch size.
    """

    def __init__(
        self,
        order: BatchOrder,
        *,
        num_steps: int,
        micro_batch_size: int,
        first_step: int = 0,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        if not 0 <= rank < num_ranks or order.batch_size % (num_ranks * micro_batch_size):
            raise RequestError(
                f"{num_ranks} ranks with micro-batches of {micro_batch_size} must divide the batch size "
                f"{order.batch_size}; rank is {rank}"
            )
        if not 0 <= first_step <= num_steps:
            raise RequestError(f"the run has {num_steps} steps; it cannot go on from step {first_step}")
        self.order, self.num_steps, self.micro_batch_size = order, num_steps, micro_batch_size
        self.first_step, self.rank, self.num_ranks = first_step, rank, num_ranks

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for number in range(self.first_step, self.num_steps):
            epoch, step = divmod(number, self.order.num_steps)
            keys = [SampleKey(epoch, row) for row in self.order.rows(epoch, step)[self.rank :: self.num_ranks].tolist()]
            for first in range(0, len(keys), self.micro_batch_size):
                yield keys[first : first + self.micro_batch_size]

    def __len__(self) -> int:
        """Micro-batches of the whole run, those that are done included: transformers counts its steps by it."""
        return self.num_steps * (self.order.batch_size // (self.num_ranks * self.micro_batch_size))
