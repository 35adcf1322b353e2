"""A folder with sixty bad files among twenty good ones."""

import contextlib
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from p4dprep.extract import extract
from tests.e2e.commands import run_json
from tests.p4dprep.extract.builders import data_digests, make_request, write_corpus
from tests.videos import write_bad_videos

NUM_GOOD = 20
NUM_BAD = 60
MAX_PROCESS_BYTES = 1.5 * 2**30
WATCHED = ("p4dprep extract", "ray::_Actor", "p4dprep._decoder")
"""Driver, worker and decoder, by a part of their command lines."""
TEACHER = "opencv-dis"
OPTIONS = ("--teacher", TEACHER, "--frames", "4", "--size", "32")


@contextlib.contextmanager
def peak_memory() -> Iterator[dict[str, int]]:
    """Largest resident bytes of any of our processes of each kind while the block runs, seen every 50 ms."""
    peaks: dict[str, int] = {}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    line = " ".join(process.cmdline())
                    for part in WATCHED:
                        if part in line:
                            peaks[part] = max(peaks.get(part, 0), process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peaks
    finally:
        done.set()
        watcher.join()


@pytest.mark.timeout(600)
def test_sixty_bad_files_cost_sixty_clips_and_no_neighbour(tmp_path: Path, ray_address: str) -> None:
    folder = write_corpus(tmp_path / "mixed", NUM_GOOD, num_frames=8)
    good = Path(shutil.copytree(folder, tmp_path / "good"))
    assert len(write_bad_videos(folder)) == NUM_BAD
    with peak_memory() as peaks:
        report = run_json("extract", folder, tmp_path / "cache", *OPTIONS, "--address", ray_address, exit_code=1)
    assert set(peaks) == set(WATCHED), "a kind of process was never seen, so its memory was not measured"
    assert max(peaks.values()) < MAX_PROCESS_BYTES, peaks
    assert {key: report[key] for key in ("clips", "committed", "failed", "skipped", "missing")} == {
        "clips": NUM_GOOD + NUM_BAD,
        "committed": NUM_GOOD,
        "failed": NUM_BAD,
        "skipped": 0,
        "missing": 0,
    }
    assert sum(report["failures_by_kind"].values()) == NUM_BAD
    assert all(len(failure["reason"]) > 10 for failure in report["failures"])
    extract(make_request(good, tmp_path / "clean", TEACHER))
    assert sorted(data_digests(tmp_path / "cache").values()) == sorted(data_digests(tmp_path / "clean").values())
    again = extract(make_request(folder, tmp_path / "cache", TEACHER))
    assert (again.committed, again.skipped, again.failed, again.coverage) == (0, NUM_GOOD, NUM_BAD, 0.25)
