"""The order of training: a pure function of seed, epoch and step, whatever workers and ranks there are."""

from itertools import chain

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from p4dprep.errors import RequestError
from student.order import BatchOrder, RunBatches, SampleKey, epoch_order, mixed


def splitmix64(state: int) -> int:
    """The published generator's output for a state, in Python's own integers."""
    mask = 2**64 - 1
    z = (state + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


class Keys(Dataset[tuple[int, int]]):
    """Samples that are their own keys."""

    def __getitem__(self, key: SampleKey) -> tuple[int, int]:
        return tuple(key)


def test_the_hash_is_splitmix64() -> None:
    assert splitmix64(0) == 0xE220A8397B1DCDAF  # of the reference implementation, seed 0
    assert mixed(0).tolist() == [splitmix64(0)]
    assert mixed(5, 2**63).tolist() == [splitmix64(splitmix64(5) ^ 2**63)]


def test_an_epoch_is_a_permutation_and_each_seed_and_epoch_has_its_own() -> None:
    orders = {(seed, epoch): epoch_order(500, seed, epoch).tolist() for seed in range(3) for epoch in range(3)}
    assert all(sorted(order) == list(range(500)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 9
    expected = sorted(range(8), key=lambda row: splitmix64(splitmix64(splitmix64(1) ^ 2) ^ row))
    assert epoch_order(8, 1, 2).tolist() == expected  # the same for ever and everywhere: runs must resume


def test_every_sample_comes_at_each_place_equally_often() -> None:
    counts = np.zeros((6, 6))
    for seed in range(3000):
        counts[np.arange(6), epoch_order(6, seed, 0)] += 1
    assert ((counts - 500) ** 2 / 500).sum() < 60  # chi-square with 25 degrees of freedom: p < 1e-4


def test_the_last_batch_is_filled_up_from_the_start() -> None:
    order = BatchOrder(num_samples=10, batch_size=4, seed=1)
    whole = epoch_order(10, 1, 0).tolist()
    assert order.num_steps == 3
    assert [order.rows(0, step).tolist() for step in range(3)] == [whole[:4], whole[4:8], whole[8:] + whole[:2]]
    assert len(BatchOrder(num_samples=3, batch_size=8).rows(0, 0)) == 8


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")  # more than the machine has cores
@pytest.mark.parametrize("num_workers", [0, 1, 2, 4])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_workers_and_ranks_do_not_change_a_step(num_workers: int, num_ranks: int) -> None:
    order = BatchOrder(num_samples=11, batch_size=4, seed=3)
    ranks = []
    for rank in range(num_ranks):
        sampler = RunBatches(order, num_steps=6, micro_batch_size=2, first_step=3, rank=rank, num_ranks=num_ranks)
        loader = DataLoader(Keys(), batch_sampler=sampler, num_workers=num_workers, collate_fn=list)
        micro = list(loader)
        size = len(micro) // 3
        ranks.append([[*chain(*micro[first : first + size])] for first in range(0, len(micro), size)])
    steps = [[*chain.from_iterable(zip(*parts, strict=True))] for parts in zip(*ranks, strict=True)]
    assert steps == [[(1, row) for row in order.rows(1, step).tolist()] for step in range(3)]


def test_a_resumed_run_goes_on_exactly_where_it_was_left() -> None:
    order = BatchOrder(num_samples=10, batch_size=4, seed=9)
    whole = list(RunBatches(order, num_steps=7, micro_batch_size=2))
    assert [key.epoch for key, _ in whole] == [0] * 6 + [1] * 6 + [2] * 2
    torch.manual_seed(123)  # nothing of torch's or numpy's state may matter
    for step in range(8):
        resumed = RunBatches(order, num_steps=7, micro_batch_size=2, first_step=step)
        assert list(resumed) == whole[2 * step :]
        assert len(resumed) == len(whole)


def test_wrong_requests_are_refused() -> None:
    order = BatchOrder(num_samples=10, batch_size=4)
    with pytest.raises(RequestError, match="3 ranks with micro-batches of 1 must divide the batch size 4"):
        RunBatches(order, num_steps=1, micro_batch_size=1, num_ranks=3)
    with pytest.raises(RequestError, match="rank is 2"):
        RunBatches(order, num_steps=1, micro_batch_size=1, rank=2, num_ranks=2)
    with pytest.raises(RequestError, match="has 3 steps; it cannot go on from step 4"):
        RunBatches(order, num_steps=3, micro_batch_size=1, first_step=4)
    with pytest.raises(ValueError, match="no step 3 of epoch 0"):
        order.rows(0, 3)
    with pytest.raises(RequestError, match="there must be a sample"):
        BatchOrder(num_samples=0, batch_size=4)
