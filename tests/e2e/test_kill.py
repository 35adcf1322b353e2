"""SIGKILL of driver, worker and decoder at seeded moments: a rerun ends as if nothing had happened."""

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from p4dprep import cache as caches
from p4dprep.cache import Cache
from tests.e2e.commands import P4DPREP, run_json
from tests.p4dprep.extract.builders import data_digests, write_corpus

SEED = 20261120
NUM_KILLS = 20
NUM_CLIPS = 24
RAY_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""They hold nothing of ours, but try for 60 s to tell the dead head node of its death before they go."""
TEACHERS = ("--teacher", "slow?milliseconds=60", "--frames", "4", "--size", "32", "--workers", "1")


class Job:
    """A running extraction and the processes that belong to it."""

    def __init__(self, videos: Path, cache: Path, address: str | None) -> None:
        self.cache = cache
        self.address = address
        joining = ["--address", address] if address else []
        self.process = subprocess.Popen(
            [P4DPREP, "extract", str(videos), str(cache), *TEACHERS, *joining],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.seen: dict[int, psutil.Process] = {}

    def family(self) -> list[psutil.Process]:
        """Processes that are there because of this job: its own and, on a cluster, its workers and their decoders."""
        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            found = psutil.Process(self.process.pid).children(recursive=True)
        if self.address:
            found += [process for process in psutil.process_iter() if is_ours(process)]
        for process in found:
            self.seen.setdefault(process.pid, process)
        return found

    def named(self, part: str) -> list[psutil.Process]:
        return [process for process in self.family() if part in command_line(process)]

    def wait_until(self, ready: Callable[[], bool], timeout_seconds: float = 120) -> bool:
        """Watch until it is so; False if the job ended first."""
        end = time.monotonic() + timeout_seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                return False
            if ready():
                return True
            time.sleep(0.002)
        raise TimeoutError("the job neither got there nor ended")

    def num_objects(self) -> int:
        return len(list(self.cache.glob("slow_depth/c*")))

    def num_records(self) -> int:
        return len(list(self.cache.glob("ledger/slow/0*.json")))

    def has_data_without_record(self) -> bool:
        unit = 3
        return self.num_objects() > self.num_records() * unit


def kill_driver(job: Job) -> None:
    job.family()
    job.process.kill()


def kill_one(job: Job, part: str, rng: random.Random) -> bool:
    """Kill one such process; False if there was none left to kill, which is no kill."""
    victims = job.named(part)
    with contextlib.suppress(psutil.NoSuchProcess):
        if victims:
            rng.choice(victims).kill()
            return True
    return False


@pytest.fixture
def job_family() -> Iterator[list[Job]]:
    """Jobs to be gone at the end, whatever the test did."""
    jobs: list[Job] = []
    yield jobs
    for job in jobs:
        if job.process.poll() is None:
            os.killpg(job.process.pid, signal.SIGKILL)
            job.process.wait()


@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("stranger")
def test_killed_anywhere_and_run_again_it_ends_the_same(
    tmp_path: Path, job_family: list[Job], ray_address: str
) -> None:
    videos = write_corpus(tmp_path / "videos", NUM_CLIPS, num_frames=8)
    run_json("extract", videos, tmp_path / "undisturbed", *TEACHERS, "--address", ray_address)
    expected = data_digests(tmp_path / "undisturbed")
    rng = random.Random(SEED)
    num_caches, num_kills = 0, 0
    while num_kills < NUM_KILLS:
        cache = tmp_path / f"cache_{num_caches}"
        num_caches += 1
        finished = False
        while not finished and num_kills < NUM_KILLS:
            address = None if num_kills % 8 in (0, 1) else ray_address  # a Ray of its own takes long to start
            finished, killed = one_round(Job(videos, cache, address), num_kills, rng, job_family)
            num_kills += killed
        report = run_json("extract", videos, cache, *TEACHERS, "--address", ray_address)
        assert (report["committed"] + report["skipped"], report["failed"]) == (NUM_CLIPS, 0), f"seed {SEED}"
        assert data_digests(cache) == expected, f"seed {SEED}, after {num_kills} kills"
        assert caches.verify(Cache.open(str(cache))).problems == ()
    assert not left_running([process for job in job_family for process in job.seen.values()], 90)


def command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def is_ours(process: psutil.Process) -> bool:
    return any(part in command_line(process) for part in ("ray::_Actor", "p4dprep._decoder"))


def is_agent(process: psutil.Process) -> bool:
    return any(agent in command_line(process) for agent in RAY_AGENTS)


def left_running(processes: list[psutil.Process], timeout_seconds: float) -> list[psutil.Process]:
    return psutil.wait_procs(processes, timeout=timeout_seconds)[1]


def one_round(job: Job, number: int, rng: random.Random, jobs: list[Job]) -> tuple[bool, int]:
    """Start, wait for a seeded moment, kill, wait for the end: did the job finish, and did the kill come in time?"""
    jobs.append(job)
    more = rng.randrange(1, 8)
    before = job.num_objects()
    moment = [
        job.has_data_without_record,
        lambda: job.num_objects() >= before + more,
        lambda: job.num_objects() >= before + more and bool(job.named("ray::_Actor")),
        lambda: job.num_objects() >= before + more and bool(job.named("p4dprep._decoder")),
    ][number % 4]
    in_time = job.wait_until(moment)
    if in_time and number % 4 < 2:
        kill_driver(job)
    elif in_time:
        in_time = kill_one(job, "ray::_Actor" if number % 4 == 2 else "p4dprep._decoder", rng)
    code = job.process.wait(timeout=120)
    assert not left_running([process for process in job.seen.values() if not is_agent(process)], 30)
    assert not in_time or code == (-signal.SIGKILL if number % 4 < 2 else 0)  # a worker's death is not the job's
    return code == 0, int(in_time)
