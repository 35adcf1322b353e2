"""SIGKILL of driver, worker and decoder at seeded moments, and being asked to stop: a rerun ends as if nothing had
happened."""

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import psutil
import pytest

from p4dprep import cache as caches
from p4dprep.cache import Cache
from p4dprep.extract import extract
from tests.e2e.commands import P4DPREP
from tests.p4dprep.extract.builders import data_digests, make_request, write_corpus

SEED = 20261120
NUM_CLIPS = 24
IN_COMMIT, DRIVER, WORKER, DECODER = range(4)
"""What is killed: the driver while there is data without its record, the driver, a worker, a decoder."""
KILLS = {"own": (IN_COMMIT, DRIVER) * 2, "shared": (IN_COMMIT, DRIVER, WORKER, DECODER) * 4}
"""20 kills, of jobs that start a Ray of their own, which takes long, and of jobs on the tests' Ray. Both go on at once:
most of the time they wait."""
RAY_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""They hold nothing of ours, but try for 60 s to tell the dead head node of its death before they go."""
TEACHER = "slow?milliseconds=60"
SLOWER_TEACHER = "slow?milliseconds=1000"
"""With it a job outlasts any delay between seeing how far it is and asking it to stop."""
OPTIONS = ("--frames", "4", "--size", "32", "--workers", "1")


class Job:
    """A running extraction and the processes that belong to it. At most one job at a time is on the tests' Ray."""

    def __init__(
        self,
        videos: Path,
        cache: Path,
        address: str | None,
        teacher: str = TEACHER,
        stderr: IO[str] | int = subprocess.DEVNULL,
    ) -> None:
        self.cache = cache
        self.address = address
        joining = ["--address", address] if address else []
        self.process = subprocess.Popen(
            [P4DPREP, "extract", str(videos), str(cache), "--teacher", teacher, *OPTIONS, *joining],
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,
        )
        self.seen: dict[int, psutil.Process] = {}

    def family(self) -> list[psutil.Process]:
        """Processes that are there because of this job: its own or, on the tests' Ray, its workers and decoders."""
        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            found = psutil.Process(self.process.pid).children(recursive=True)
        if self.address:
            found += [process for process in children_of_our_ray() if is_worker_or_decoder(process)]
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
        return sum(path.suffix != ".partial" for path in self.cache.glob("slow_depth/c*"))

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
    run_to_the_end(videos, tmp_path / "undisturbed")
    expected = data_digests(tmp_path / "undisturbed")

    with ThreadPoolExecutor(len(KILLS)) as pool:
        lanes = [
            pool.submit(kill_all, videos, tmp_path / name, address, KILLS[name], job_family)
            for name, address in (("own", None), ("shared", ray_address))
        ]
        killed = [cache for lane in lanes for cache in lane.result()]
    for cache in killed:
        run_to_the_end(videos, cache)
        opened = Cache.open(str(cache))
        leftovers = caches.gc(opened, delete=True, min_age_seconds=0).unreferenced
        assert all(key.endswith(".partial") for key in leftovers), f"seed {SEED}: {leftovers}"
        assert data_digests(cache) == expected, f"seed {SEED}: {cache}"
        assert caches.verify(opened).problems == ()
    assert not left_running([process for job in job_family for process in job.seen.values()], 90)


@pytest.mark.parametrize(("number", "has_own_ray"), [(signal.SIGINT, False), (signal.SIGTERM, True)])
@pytest.mark.usefixtures("stranger")
def test_asked_to_stop_it_says_that_it_goes_on_from_there(
    number: signal.Signals, has_own_ray: bool, tmp_path: Path, job_family: list[Job], ray_address: str
) -> None:
    """A Ray that the job started has an answer to SIGTERM of its own, which must not win."""
    num_clips, cache, said = 12, tmp_path / "cache", tmp_path / "stderr"
    videos = write_corpus(tmp_path / "videos", num_clips, num_frames=8)
    with open(said, "w") as stderr:
        job_family.append(job := Job(videos, cache, None if has_own_ray else ray_address, SLOWER_TEACHER, stderr))
        assert job.wait_until(lambda: job.num_records() > 0)
        job.process.send_signal(number)
        assert job.process.wait(timeout=60) == 130
    assert said.read_text().splitlines()[-1] == (
        "p4dprep: interrupted; what was committed stays, the same command goes on from there"
    )
    assert not left_running([process for process in job.seen.values() if not is_agent(process)], 60)
    report = extract(make_request(videos, cache, SLOWER_TEACHER, workers=1))
    assert (report.committed + report.skipped, report.failed) == (num_clips, 0)
    assert min(report.committed, report.skipped) > 0


def run_to_the_end(videos: Path, cache: Path) -> None:
    """The same request, uninterrupted and in this process, whose Ray is the tests' own."""
    report = extract(make_request(videos, cache, TEACHER, workers=1))
    assert (report.committed + report.skipped, report.failed) == (NUM_CLIPS, 0), f"seed {SEED}"


def kill_all(videos: Path, folder: Path, address: str | None, kills: Sequence[int], jobs: list[Job]) -> list[Path]:
    """The caches of jobs that these kills hit: a job starts again on the same cache until it finishes."""
    rng = random.Random(f"{SEED} {folder.name}")
    used, finished, num_hits = [], True, 0
    folder.mkdir()
    while num_hits < len(kills):
        if finished:
            used.append(folder / str(len(used)))
        job = Job(videos, used[-1], address)
        jobs.append(job)
        finished, hit = one_round(job, kills[num_hits], rng)
        num_hits += hit
    return used


def children_of_our_ray() -> list[psutil.Process]:
    """Processes of the Ray that this process started, whoever's jobs they work for."""
    found = []
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            found += process.children(recursive=True) if process.name() == "raylet" else []
    return found


def command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def is_worker_or_decoder(process: psutil.Process) -> bool:
    return any(part in command_line(process) for part in ("ray::_Actor", "p4dprep._decoder"))


def is_agent(process: psutil.Process) -> bool:
    return any(agent in command_line(process) for agent in RAY_AGENTS)


def left_running(processes: list[psutil.Process], timeout_seconds: float) -> list[psutil.Process]:
    return psutil.wait_procs(processes, timeout=timeout_seconds)[1]


def one_round(job: Job, victim: int, rng: random.Random) -> tuple[bool, bool]:
    """Wait for a seeded moment, kill, wait for the end: did the job finish, and did the kill come in time?"""
    more = rng.randrange(1, 8)
    before = job.num_objects()
    moment = {
        IN_COMMIT: job.has_data_without_record,
        DRIVER: lambda: job.num_objects() >= before + more,
        WORKER: lambda: job.num_objects() >= before + more and bool(job.named("ray::_Actor")),
        DECODER: lambda: job.num_objects() >= before + more and bool(job.named("p4dprep._decoder")),
    }[victim]
    hit = job.wait_until(moment)
    if hit and victim in (IN_COMMIT, DRIVER):
        kill_driver(job)
    elif hit:
        hit = kill_one(job, "ray::_Actor" if victim == WORKER else "p4dprep._decoder", rng)
    code = job.process.wait(timeout=120)
    assert not left_running([process for process in job.seen.values() if not is_agent(process)], 30)
    survives = victim in (WORKER, DECODER)  # their death is not the job's
    assert not hit or code == (0 if survives else -signal.SIGKILL)
    return code == 0, hit
