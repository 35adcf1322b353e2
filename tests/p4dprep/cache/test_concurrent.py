"""Several threads and processes work on one cache at once: no commit is lost, none is made twice, none is torn."""

import multiprocessing
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from p4dprep.cache import Cache, Group, verify
from p4dprep.errors import MissingDataError
from tests.p4dprep.cache.builders import (
    DEPTH,
    FLOW,
    add_group,
    committed_digests,
    fill,
    make_corpus,
    make_values,
    new_cache,
)
from tests.s3 import Place

NUM_CLIPS = 8
NUM_PROCESSES = 8
NUM_OWN_GROUPS = 3


def one_job(place: Place, number: int) -> dict[str, str]:
    """A whole extraction: it may come first, last or in between, and computes what it finds missing."""
    cache = new_cache(place, num_clips=NUM_CLIPS)
    cache.extend(make_corpus(NUM_CLIPS + number % 2))
    group = add_group(cache)
    if number < NUM_OWN_GROUPS:
        add_group(cache, (DEPTH,), name=f"own{number}")
    fill(cache, group, noise=1e-3)
    return committed_digests(Cache.open(place.url, place.storage_options).group("toy"))


def check(place: Place, seen: list[dict[str, str]], num_own_groups: int) -> None:
    cache = Cache.open(place.url, place.storage_options)
    group = cache.group("toy")
    final = committed_digests(group)
    assert group.states().ok[:NUM_CLIPS].all()
    for digests in seen:
        assert digests.items() <= final.items()
    commits = [result.index for _, record in group.ledger.all_records() for result in record or ()]
    assert sorted(commits) == list(range(cache.num_clips))
    assert len(cache.groups()) == num_own_groups + 1
    report = verify(cache)
    assert report.problems == ()


def test_threads_agree_on_one_result(place: Place) -> None:
    with ThreadPoolExecutor(3) as pool:
        seen = list(pool.map(lambda number: one_job(place, number), range(3)))
    check(place, seen, NUM_OWN_GROUPS)


def _rounds(places: list[Place], number: int, start: Barrier, num_done: Any) -> None:
    for place in places:
        start.wait()
        one_job(place, number)
        with num_done.get_lock():
            num_done.value += 1


def race(places: list[Place]) -> None:
    """Eight processes, each doing all of the work on each cache, while this one reads what it can."""
    context = multiprocessing.get_context("forkserver")  # clean as spawn is, and imports once
    context.set_forkserver_preload([__name__])
    start, num_done = context.Barrier(NUM_PROCESSES + 1, timeout=120), context.Value("i", 0)
    jobs = [context.Process(target=_rounds, args=(places, n, start, num_done)) for n in range(NUM_PROCESSES)]
    for job in jobs:
        job.start()
    for done_before, place in enumerate(places):
        new_cache(place, num_clips=NUM_CLIPS)
        group = add_group(Cache.open(place.url, place.storage_options))
        start.wait()
        wanted = NUM_PROCESSES * (done_before + 1)
        assert read_until(group, lambda wanted=wanted: num_done.value == wanted) > 0  # type: ignore[misc]
        check(place, [], NUM_OWN_GROUPS)
    for job in jobs:
        job.join()
        assert job.exitcode == 0


def test_eight_processes_agree_on_one_result_while_a_reader_looks_on(tmp_path: Path) -> None:
    race([Place(url=str(tmp_path / f"{number}")) for number in range(6)])


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_eight_processes_agree_in_fifty_rounds_on_disk_and_bucket(tmp_path: Path, s3_place: Place) -> None:
    options = s3_place.storage_options
    race([Place(url=str(tmp_path / f"{number}")) for number in range(50)])
    race([Place(url=f"{s3_place.url}-{number}", storage_options=options) for number in range(50)])


def read_until(group: Group, done: object) -> int:
    """Read clips until the writers are done and all are there; any error but a missing clip is a failure."""
    assert callable(done)
    num_read, deadline = 0, time.monotonic() + 120
    while time.monotonic() < deadline:
        finished = done()
        for index in range(NUM_CLIPS):
            try:
                flow = group.read(index, "flow", verify=True)
            except MissingDataError:
                continue
            num_read += 1
            np.testing.assert_allclose(flow, make_values(FLOW, index), rtol=0.02, atol=0.02)
        if finished:
            return num_read
    raise AssertionError("the writers did not end")


def test_threads_of_one_worker_write_different_clips(local_place: Place) -> None:
    cache = new_cache(local_place, num_clips=12)
    group = add_group(cache)
    barrier = threading.Barrier(4)

    def work(number: int) -> None:
        barrier.wait()
        fill(cache, group, range(number, 12, 4))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert group.states().ok.all()
    assert verify(cache).ok
