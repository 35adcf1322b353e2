"""Several threads and processes work on one cache at once: no commit is lost, none is made twice, none is torn."""

import multiprocessing
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.synchronize import Event

import numpy as np

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


def one_job(place: Place, number: int) -> dict[str, str]:
    """A whole extraction: it may come first, last or in between, and computes what it finds missing."""
    cache = new_cache(place, num_clips=NUM_CLIPS)
    cache.extend(make_corpus(NUM_CLIPS + number % 2))
    group = add_group(cache)
    add_group(cache, (DEPTH,), name=f"own{number}")
    fill(cache, group, noise=1e-3)
    return committed_digests(Cache.open(place.url, place.storage_options).group("toy"))


def check(place: Place, seen: list[dict[str, str]], num_jobs: int) -> None:
    cache = Cache.open(place.url, place.storage_options)
    group = cache.group("toy")
    final = committed_digests(group)
    assert group.states().ok[:NUM_CLIPS].all()
    for digests in seen:
        assert digests.items() <= final.items()
    commits = [result.index for _, record in group.ledger.all_records() for result in record or ()]
    assert sorted(commits) == list(range(cache.num_clips))
    assert len(cache.groups()) == num_jobs + 1
    report = verify(cache)
    assert report.problems == ()


def test_threads_agree_on_one_result(place: Place) -> None:
    with ThreadPoolExecutor(3) as pool:
        seen = list(pool.map(lambda number: one_job(place, number), range(3)))
    check(place, seen, num_jobs=3)


def _spawned(place: Place, number: int, start: Event) -> None:
    start.wait()
    one_job(place, number)


def test_processes_agree_on_one_result_while_a_reader_looks_on(local_place: Place) -> None:
    context = multiprocessing.get_context("spawn")
    start = context.Event()
    jobs = [context.Process(target=_spawned, args=(local_place, number, start)) for number in range(3)]
    for job in jobs:
        job.start()
    new_cache(local_place, num_clips=NUM_CLIPS)
    group = add_group(Cache.open(local_place.url))
    start.set()
    num_read = read_until(group, lambda: not any(job.is_alive() for job in jobs))
    for job in jobs:
        job.join()
        assert job.exitcode == 0
    assert num_read > 0
    check(local_place, [], num_jobs=3)


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
