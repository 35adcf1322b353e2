"""What a training's loader costs beside np.memmap, and the share of time a real run waits for its data.

    OMP_NUM_THREADS=1 python -m benchmarks.train_loader [--rounds 11] [--num-windows 48] [--steps 8] [--json]

The window is S of PERFORMANCE.md with the motion mask as float16 too: four taps of 512 x 384 latents, depth, backward
flow and motion at 16 x 224 x 224, 8.0 MB. `raw` are these bytes in a cache, uncompressed; `encoded` the same targets as
a cache keeps them, decoded to float32; `sample` is what `TrainingData` gives: the encoded targets, 16 kept frames of
224 x 224 and their times. The memmaps hold the same numbers raw (frames as uint8). One window a batch, in this process
or from worker processes; ways alternate, ratios to a table's first line are medians over rounds with a 95% bootstrap
interval; files lie in the page cache. The run is `p4dprep train` of the tiny student on worlds that the script makes,
with a log line a step, of which the first is left out.
"""

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.cache_io import SPECS, Window, make_window
from benchmarks.clock import NUM_WARM_UP, paired_ratio
from benchmarks.encodings import NUM_FRAMES, SIDE, VIDEOS, read_frames
from benchmarks.train_step import make_request
from p4dprep.cache import Cache, ClipResult
from p4dprep.corpus import CORPUS_COLUMNS, Sampling
from p4dprep.extract.frames import KeptFrames
from p4dprep.targets import TargetSpec
from student.conversations import Report
from student.data import DataConfig, TrainingData, collate
from student.order import SampleKey
from student.run_folder import read_log
from student.train import train
from student.train_config import TrainConfig

NUM_CLIPS = 16
NUM_WORKERS = 2
TIMES = np.arange(NUM_FRAMES) / 30
GOALS = {"raw": "<= 1.25", "raw, 2 workers": "<= .15 (a threaded ring)"}


# The data, in a cache and in memmaps


def write_cache(folder: Path, window: Window, raw: Window, frames_thwc: NDArray[np.uint8]) -> Cache:
    """Clips with the window encoded and raw, and with their frames kept."""
    cache = Cache.create(f"{folder}/cache", Sampling(num_frames=NUM_FRAMES, height=SIDE, width=SIDE), clips_per_unit=1)
    rows = [{"id": f"clip-{number}", "uri": f"clip-{number}.mp4"} for number in range(NUM_CLIPS)]
    cache.extend(pa.Table.from_pylist(rows, schema=CORPUS_COLUMNS))
    kept = KeptFrames(SIDE, SIDE).targets(cache.sampling.geometry())
    groups: dict[str, tuple[tuple[TargetSpec, ...], Window]] = {
        "encoded": (SPECS, window),
        "raw": (tuple(_as_it_is(name, values) for name, values in raw.items()), raw),
        "frames": (kept, {"frames": frames_thwc}),
    }
    for name, (specs, arrays) in groups.items():
        group = cache.add_group(name, name, {"made by": name}, specs)
        for index in range(NUM_CLIPS):
            objects = group.write_clip(index, arrays, TIMES)
            result = ClipResult(index=index, id=f"clip-{index}", status="ok", objects=objects)
            group.commit(index // cache.clips_per_unit, [result])
    return cache


def _as_it_is(name: str, values: NDArray[Any]) -> TargetSpec:
    """A declaration that keeps every byte and compresses none."""
    return TargetSpec(
        name=name, dims=tuple(f"{name}_{axis}" for axis in range(values.ndim)), shape=values.shape, dtype="float16",
        units="1", quantity="vision features",
    )  # fmt: skip


class Mapped(Dataset[Window]):
    """Arrays from one np.memmap each, copied as torch needs them."""

    def __init__(self, folder: Path, arrays: Window) -> None:
        self.maps = {}
        for name, values in arrays.items():
            path = folder / f"{name}.raw"
            np.tile(values.reshape(-1), NUM_CLIPS).tofile(path)
            self.maps[name] = np.memmap(path, values.dtype, "r", shape=(NUM_CLIPS, *values.shape))

    def __getitem__(self, key: SampleKey) -> Window:
        return {name: np.array(values[key.row]) for name, values in self.maps.items()}


class Targets(Dataset[Window]):
    """One group's targets, as `TrainingData` reads them."""

    def __init__(self, cache: Cache, group: str) -> None:
        self.group = cache.group(group)

    def __getitem__(self, key: SampleKey) -> Window:
        return {spec.name: self.group.read(key.row, spec.name) for spec in self.group.targets}


def stacked(windows: list[Window]) -> dict[str, Tensor]:
    """What `student.data.collate` does to targets."""
    return {name: torch.from_numpy(np.stack([window[name] for window in windows])) for name in windows[0]}


# Ways to read, and their times


Way = Callable[[int], Iterator[Any]]
"""From a number of windows to an iterator over them."""


def loader(data: Dataset[Any], collate_fn: Callable[[list[Any]], Any], workers: int) -> Way:
    """Windows one a batch, as the trainer's loader makes them."""

    def batches(num_windows: int) -> Iterator[Any]:
        keys = [[SampleKey(0, number % NUM_CLIPS)] for number in range(num_windows)]
        ahead = 4 if workers else None
        return iter(
            DataLoader(data, batch_sampler=keys, collate_fn=collate_fn, num_workers=workers, prefetch_factor=ahead)
        )

    return batches


def copies(mapped: Mapped) -> Way:
    """The limit: plain copies into memory that is there already."""
    used = {name: np.empty_like(values[0]) for name, values in mapped.maps.items()}

    def windows(num_windows: int) -> Iterator[None]:
        for number in range(num_windows):
            for name, values in mapped.maps.items():
                np.copyto(used[name], values[number % NUM_CLIPS])
            yield None

    return windows


def make_tables(folder: Path, cache: Cache, raw: Window, frames_thwc: NDArray[np.uint8]) -> dict[str, dict[str, Way]]:
    """Ways by table, each table's baseline first."""
    window = Mapped(folder, raw)
    frames = Mapped(folder, {"frames": frames_thwc})
    both = Mapped(folder, raw | {"frames": frames_thwc})
    names = tuple(f"encoded_{spec.name}" for spec in SPECS)
    sample, bare = (
        TrainingData(cache, None, DataConfig(targets=targets), Report(on_problem="stop")) for targets in (names, ())
    )
    tables: dict[str, dict[str, Way]] = {}
    for workers in (0, NUM_WORKERS):
        told = f", {workers} workers" if workers else ""
        tables[f"targets of a window{told}"] = {
            f"DataLoader over np.memmap{told}": loader(window, stacked, workers),
            f"raw{told}": loader(Targets(cache, "raw"), stacked, workers),
            f"encoded{told}": loader(Targets(cache, "encoded"), stacked, workers),
        }
        tables[f"frames{told}"] = {
            f"DataLoader over np.memmap of frames{told}": loader(frames, stacked, workers),
            f"kept frames{told}": loader(bare, collate, workers),
        }
        tables[f"a sample{told}"] = {
            f"DataLoader over np.memmap of both{told}": loader(both, stacked, workers),
            f"sample{told}": loader(sample, collate, workers),
        }
    first = tables["targets of a window"]
    first["plain np.memmap copies into used buffers"] = copies(window)
    return tables


def cpu_seconds() -> float:
    """CPU time of this process and of those that it started and that have ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def time_ways(ways: Mapping[str, Way], num_rounds: int, num_windows: int) -> dict[str, Any]:
    """Milliseconds a window and paired ratios to the first way; a quarter more windows go before, to start workers."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    before = max(1, num_windows // 4)
    for number in range(-NUM_WARM_UP, num_rounds):
        for name, way in ways.items():
            cpu = cpu_seconds()
            windows = way(before + num_windows)
            for _ in range(before):
                next(windows)
            wall = time.perf_counter()
            num_read = sum(1 for _ in windows)
            wall = time.perf_counter() - wall
            del windows  # its workers end
            if number >= 0:
                taken[name].append((wall / num_read, (cpu_seconds() - cpu) / (before + num_read)))
    base = next(iter(taken.values()))
    return {
        name: {
            "ms": 1e3 * statistics.median(wall for wall, _ in seconds),
            "cpu_ms": 1e3 * statistics.median(cpu for _, cpu in seconds),
            "ratio": paired_ratio([wall for wall, _ in seconds], [wall for wall, _ in base]),
            "cpu_ratio": paired_ratio([cpu for _, cpu in seconds], [cpu for _, cpu in base]),
        }
        for name, seconds in taken.items()
    }


# A real run


def waiting(folder: Path, num_steps: int) -> dict[str, dict[str, float]]:
    """Shares of the time that a run waits for data, by number of the loader's processes."""
    request = make_request(folder, num_clips=8)
    found = {}
    for workers in (0, NUM_WORKERS):
        run = folder / f"run-{workers}"
        train(
            TrainConfig(
                cache=request.cache, qa=(request.qa,), student=request.student, out=str(run), max_steps=num_steps,
                batch_size=4, micro_batch_size=4, loader_workers=workers, on_problem="leave out", log_steps=1,
                picture_steps=0, save_steps=num_steps,
            )
        )  # fmt: skip
        shares = [line["data_wait_fraction"] for line in read_log(run)][1:]
        found[f"{workers} workers"] = {"median": statistics.median(shares), "most": max(shares)}
    return found


# Showing


def show(found: Mapping[str, Any]) -> None:
    """The tables of docs/benchmarks.md."""
    for title, ways in found["tables"].items():
        print(f"\n| {title} | median ms | ratio | CPU ms, all processes | CPU ratio | goal |\n|{' --- |' * 6}")
        for name, each in ways.items():
            wall, cpu = each["ratio"], each["cpu_ratio"]
            ratio = f"{wall['median']:.2f} ({wall['low']:.2f} to {wall['high']:.2f})"
            cells = f"{each['ms']:.2f} | {ratio} | {each['cpu_ms']:.2f} | {cpu['median']:.2f}"
            print(f"| {name} | {cells} | {GOALS.get(name, '')} |")
    print("\n| p4dprep train, share of a step's time that waits for data | median | most | goal |\n|" + " --- |" * 4)
    for workers, shares in found["waiting"].items():
        print(f"| {workers} | {shares['median']:.4f} | {shares['most']:.4f} | <= .01 |")


def main() -> None:
    """Measure, and print tables or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--num-windows", type=int, default=48, help="windows a round and way")
    parser.add_argument("--steps", type=int, default=8, help="of the run")
    parser.add_argument("--videos", type=Path, default=VIDEOS, help="folder of clips that the window is made of")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    window = make_window(options.videos)
    raw = {name: values.astype(np.float16) for name, values in window.items()}
    frames_thwc = read_frames(sorted(options.videos.glob("*.mp4"))[0])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tables = make_tables(folder, write_cache(folder, window, raw, frames_thwc), raw, frames_thwc)
        found = {
            "tables": {title: time_ways(ways, options.rounds, options.num_windows) for title, ways in tables.items()},
            "waiting": waiting(folder / "run", options.steps),
        }
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        show(found)


if __name__ == "__main__":
    main()
