"""Extraction against a bare loop over the same fake 50 ms teacher, in one run on one machine.

    python -m benchmarks.extraction [--num-clips 64] [--milliseconds 50] [--rounds 3]

The teacher sleeps instead of computing, as a GPU teacher does from the CPU's point of view. Printed: the wall-clock of
each way over the teacher's own time, whole and steady (from the first commit on), and the time from start to first
commit.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from p4dprep import registry
from p4dprep.cache import Cache
from p4dprep.corpus import discover
from p4dprep.extract import make_plan, parse_config
from p4dprep.targets import FrameBatch
from p4dprep.video import Decoder
from tests import faulty_teachers
from tests.discs import draw_discs, write_clip


def write_videos(folder: Path, num_clips: int) -> Path:
    """Distinct files; their content repeats after eight."""
    folder.mkdir()
    for seed in range(min(8, num_clips)):
        write_clip(folder / f"clip_{seed:04d}.mp4", draw_discs(seed))
    for index in range(8, num_clips):
        shutil.copy(folder / f"clip_{index % 8:04d}.mp4", folder / f"clip_{index:04d}.mp4")
    return folder


def bare_loop(videos: Path, cache: Path, teacher_text: str) -> float:
    """Decode, infer and write one clip after the other in this process: what a script would do."""
    config = parse_config({"source": str(videos), "cache": str(cache), "teachers": (teacher_text,)})
    plan = make_plan(config)
    group = plan.cache.group(plan.groups[0].config.group)
    teacher = registry.build(plan.groups[0].config.teacher)
    teacher.setup("cpu")
    start = time.perf_counter()
    with Decoder() as decoder:
        for index, (clip_id, uri) in enumerate(
            zip(*discover(str(videos)).select(["id", "uri"]).to_pydict().values(), strict=True)
        ):
            clip = decoder.read(uri, config.sampling)
            batch = FrameBatch(
                clip_ids=(clip_id,), frames_bthwc=clip.frames_thwc[None], time_seconds_bt=clip.time_seconds_t[None]
            )
            arrays = {name: np.asarray(array)[0] for name, array in teacher.predict(batch).arrays.items()}
            group.write_clip(index, arrays, clip.time_seconds_t)
    return time.perf_counter() - start


def extraction(videos: Path, cache: Path, teacher_text: str) -> tuple[float, float, float, int]:
    """Seconds of the whole command, to the first commit and from first to last; clips committed after the first."""
    command = [
        str(Path(sys.executable).with_name("p4dprep")),
        "extract",
        str(videos),
        str(cache),
        "--teacher",
        teacher_text,
    ]
    start_wall, start = time.time(), time.perf_counter()
    subprocess.run(
        [*command, "--workers", "1", "--json"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    whole = time.perf_counter() - start
    records = sorted((path.stat().st_mtime, path) for path in cache.glob("ledger/slow/0*.json"))
    first, last = records[0][0], records[-1][0]
    num_first = len(json.loads(records[0][1].read_text())["clips"])
    return whole, first - start_wall, last - first, len(Cache.open(str(cache)).clips()) - num_first


def main() -> None:
    """Measure in alternation and print a JSON object of medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-clips", type=int, default=64)
    parser.add_argument("--milliseconds", type=float, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    teacher_text = f"slow?milliseconds={options.milliseconds:g}"
    own_seconds = options.num_clips * options.milliseconds / 1000
    found: dict[str, list[float]] = {"bare": [], "whole": [], "steady": [], "first_commit_seconds": []}
    with tempfile.TemporaryDirectory() as name, faulty_teachers.seen(folder := faulty_teachers.install(Path(name))):
        videos = write_videos(folder / "videos", options.num_clips)
        for number in range(options.rounds):
            found["bare"].append(bare_loop(videos, folder / f"bare_{number}", teacher_text) / own_seconds)
            whole, first, span, num_after = extraction(videos, folder / f"ray_{number}", teacher_text)
            found["whole"].append(whole / own_seconds)
            found["first_commit_seconds"].append(first)
            found["steady"].append(span / (num_after * options.milliseconds / 1000))
    medians = {key: round(statistics.median(values), 3) for key, values in found.items()}
    goals = {"steady": 1.05, "first_commit_seconds": 7}
    print(
        json.dumps(
            {"clips": options.num_clips, "milliseconds": options.milliseconds, "medians": medians, "goals": goals}
        )
    )


if __name__ == "__main__":
    main()
