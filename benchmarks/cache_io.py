"""Writing and reading one window against numpy on the same files' disk: `python -m benchmarks.cache_io`.

The window is S of PERFORMANCE.md: four taps of 512 x 384 latents, and depth, backward flow and motion at 16 x 224 x 224
(7.2 MB as float16 and uint8). All ways run in alternation in one process; medians. CPU ratios hold on a machine shared
with other jobs too. Neither np.save nor a write waits for the disk unless its line says fsync. Reads are from the page
cache, maps are opened once. Also: what a ledger of 100,000 clips and a corpus of 1,000,000 cost.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from benchmarks.encodings import (
    DEPTH,
    FLOW,
    LATENTS,
    LOGIT,
    VIDEOS,
    cast_room,
    chosen_row,
    flow_of,
    latents_of,
    logits_of,
    read_frames,
)
from p4dprep.cache import Cache, ClipResult, Group, ObjectRecord
from p4dprep.cache.arrays import ClipArray
from p4dprep.corpus import Sampling
from p4dprep.encoding import plain_codecs
from p4dprep.storage import Store
from p4dprep.targets import TargetSpec

IN_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108
NUM_ROUNDS = 21
SPECS = (DEPTH, FLOW, LOGIT, *(TargetSpec(**{**LATENTS.__dict__, "name": f"tap{n}"}) for n in range(4)))
Window = dict[str, NDArray[Any]]
TIMES = np.arange(16) / 30


def make_window(videos: Path) -> Window:
    """Targets of one real clip where there is one, float32."""
    clips = sorted(videos.glob("*.mp4")) if videos.is_dir() else []
    if not clips:
        raise SystemExit(f"no .mp4 in {videos}; give --videos FOLDER")
    frames, room = read_frames(clips[min(2, len(clips) - 1)]), cast_room()
    maps = {"depth": room.depth_thw, "flow": flow_of(frames), "logit": logits_of(room.sphere_thw)}
    return maps | {f"tap{n}": tap for n, tap in enumerate(latents_of(frames))}


def as_raw(window: Window) -> Window:
    """The same as one would save it without encodings: float16, the motion mask uint8."""
    return {name: (v > 0).astype(np.uint8) if name == "logit" else v.astype(np.float16) for name, v in window.items()}


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Medians over all rounds: milliseconds, and ratios to the baseline of the same round."""

    wall_milliseconds: float
    wall_ratio: float
    cpu_milliseconds: float
    cpu_ratio: float


def compare(ways: dict[str, Callable[[int], object]], baseline: str, num_rounds: int = NUM_ROUNDS) -> dict[str, Timing]:
    """Run ways in alternation, each with the number of the round."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for number in range(num_rounds):
        for name, way in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            way(number)
            seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    base = np.array(seconds[baseline])
    medians = {name: np.median(taken, axis=0) for name, taken in seconds.items()}
    ratios = {name: np.median(np.array(taken) / base, axis=0) for name, taken in seconds.items()}
    return {
        name: Timing(
            wall_milliseconds=1e3 * medians[name][0],
            wall_ratio=ratios[name][0],
            cpu_milliseconds=1e3 * medians[name][1],
            cpu_ratio=ratios[name][1],
        )
        for name in ways
    }


def show(title: str, results: dict[str, Timing], goals: dict[str, str]) -> None:
    """One table."""
    print(f"\n| {title} | median ms | ratio | CPU ms | CPU ratio | goal |\n| --- | --- | --- | --- | --- | --- |")
    for name, t in results.items():
        wall, cpu = f"{t.wall_milliseconds:.2f} | {t.wall_ratio:.2f}", f"{t.cpu_milliseconds:.2f} | {t.cpu_ratio:.2f}"
        print(f"| {name} | {wall} | {cpu} | {goals.get(name, '')} |", flush=True)


def raw_arrays(raw: Window) -> dict[str, ClipArray]:
    """Cache arrays without compression, of the raw window."""
    return {
        name: ClipArray(
            name=f"raw_{name}", dims=tuple(f"{name}{n}" for n in range(v.ndim)), shape=v.shape, dtype=str(v.dtype),
            codecs=plain_codecs(str(v.dtype)), fill_value=0, attributes={},
        )
        for name, v in raw.items()
    }  # fmt: skip


def bench_write(folder: Path, group: Group, window: Window, raw: Window) -> None:
    """A clip's objects and their commit against np.save of the raw arrays, with and without fsync."""
    arrays, store = raw_arrays(raw), Store(str(folder / "raw"))
    for name in raw:
        (folder / "npy" / name).mkdir(parents=True)

    def save(number: int) -> None:
        for name, values in raw.items():
            np.save(folder / "npy" / name / f"{number}.npy", values)

    def save_durable(number: int) -> None:
        for name, values in raw.items():
            with open(folder / "npy" / name / f"{number}-durable.npy", "wb") as file:
                np.save(file, values)
                file.flush()
                os.fsync(file.fileno())

    def write_raw(number: int) -> None:
        for name, array in arrays.items():
            store.put_if_absent(array.key(number), array.encode(raw[name]), durable=False)

    def write_raw_durable(number: int) -> None:
        for name, array in arrays.items():
            store.put_if_absent(array.key(10**6 + number), array.encode(raw[name]), durable=True)

    def write_raw_synced(number: int) -> None:
        keys = [array.key(2 * 10**6 + number) for array in arrays.values()]
        for key, (name, array) in zip(keys, arrays.items(), strict=True):
            store.put_if_absent(key, array.encode(raw[name]), durable=False)
        store.sync(keys)

    written: dict[int, tuple[ObjectRecord, ...]] = {}

    def write_clip(number: int) -> None:
        written[number] = group.write_clip(number, window, TIMES)

    def commit(number: int) -> None:
        group.commit(number, [ClipResult(index=number, id=f"{number}", status="ok", objects=written[number])])

    results = compare(
        {
            "np.save, raw": save,
            "np.save, raw, fsync per file": save_durable,
            "raw arrays of a cache": write_raw,
            "raw arrays, fsync per object": write_raw_durable,
            "raw arrays, fsync at once before the commit": write_raw_synced,
            "Group.write_clip, encoded": write_clip,
            "Group.commit (fsync of all and the record)": commit,
        },
        "np.save, raw",
    )
    show("writing a window", results, {"raw arrays of a cache": "<= 1.8", "Group.write_clip, encoded": "<= 6"})


def bench_read(folder: Path, group: Group, raw: Window) -> None:
    """The raw window and the encoded one against np.memmap, into fresh memory and into buffers used again."""
    arrays, store = raw_arrays(raw), Store(str(folder / "raw"))
    sizes = {name: array.num_bytes + 4 for name, array in arrays.items()}
    buffers = {name: np.empty_like(values) for name, values in raw.items()}

    maps = {
        name: np.memmap(folder / f"{name}.raw", values.dtype, "r", shape=(3 * NUM_ROUNDS, *values.shape))
        for name, values in raw.items()
    }

    def memmap(number: int) -> None:
        for name in raw:
            np.copyto(buffers[name], maps[name][number])

    def read_raw(number: int) -> None:
        for name, array in arrays.items():
            array.read(store, number, sizes[name], buffers[name])

    def memmap_fresh(number: int) -> list[NDArray[Any]]:
        return [np.array(maps[name][number]) for name in raw]

    def read_raw_fresh(number: int) -> list[NDArray[Any]]:
        return [array.read(store, number, sizes[name]) for name, array in arrays.items()]

    def read_encoded(number: int, verify: bool = False) -> list[NDArray[Any]]:
        return [group.read(number, spec.name, verify=verify) for spec in group.targets]

    def read_parts(number: int) -> list[dict[str, NDArray[Any]]]:
        return [group.read_parts(number, spec.name) for spec in group.targets]

    group.states()
    used = compare({"np.memmap": memmap, "raw arrays of a cache": read_raw}, "np.memmap", 3 * NUM_ROUNDS)
    show("reading a raw window into used buffers", used, {"raw arrays of a cache": "<= 1.25"})
    fresh = compare(
        {
            "np.memmap": memmap_fresh,
            "raw arrays of a cache": read_raw_fresh,
            "Group.read_parts (codes and scales)": read_parts,
            "Group.read (physical float32)": read_encoded,
            "Group.read, digests verified": lambda number: read_encoded(number, verify=True),
        },
        "np.memmap",
    )
    show("reading a window into fresh memory", fresh, {"raw arrays of a cache": "<= 1.25"})


def bench_bytes(group: Group, videos: Path) -> None:
    """Bytes of the whole record against float32, for every clip's flow, and the same with latents of full size."""
    sizes = dict(zip(group.states().arrays, group.states().size_bytes[0].tolist(), strict=True))
    taps = sum(size for name, size in sizes.items() if "tap" in name and size > 0)
    still = sizes["toy_depth"] + sizes["toy_logit"]
    clips = sorted(path for path in videos.iterdir() if path.suffix in (".mp4", ".avi", ".mov"))
    flows = [chosen_row(clip.stem, FLOW, flow_of(read_frames(clip))).share * 4 * FLOW.num_values for clip in clips]
    taps_fp32, maps_fp32 = 4 * 4 * LATENTS.num_values, 4 * sum(spec.num_values for spec in SPECS[:3])
    print("\n| bytes over float32 | mean | least | most | goal |\n| --- | --- | --- | --- | --- |")
    for name, scale, goal in (("S", 1, "<= .16"), ("F, latents scaled up", 2048 * 1408 / LATENTS.num_values, "<= .23")):
        shares = [(scale * taps + still + flow) / (scale * taps_fp32 + maps_fp32) for flow in flows]
        print(
            f"| {name}, {len(clips)} clips | {np.mean(shares):.3f} | {min(shares):.3f} | {max(shares):.3f} | {goal} |"
        )


def bench_scale(folder: Path) -> None:
    """A ledger of 100,000 clips in units of 8, and a corpus of 1,000,000, in memory: the disk's syncs are not ours."""
    cache = Cache.create(str(folder / "wide"), Sampling(), clips_per_unit=8)
    group = cache.add_group("toy", "toy", {"a": "b"}, SPECS)
    cache.extend(pa.table({"id": [f"clip-{n:09d}" for n in range(100_000)]}))
    names = [array for array in group.clip_arrays if not array.optional]
    digest = "ab" * 32
    for unit in range(100_000 // 8):
        results = [
            ClipResult(
                index=n, id=f"clip-{n:09d}", status="ok",
                objects=tuple(ObjectRecord(key=a.key(n), size_bytes=10**5, digest=digest) for a in names),
            )
            for n in range(8 * unit, 8 * unit + 8)
        ]  # fmt: skip
        group.ledger.commit(unit, results)
    start = time.perf_counter()
    group = Cache.open(str(folder / "wide")).group("toy")
    opened = time.perf_counter() - start
    num_ok = int(group.states().ok.sum())
    print(f"\nledger of {num_ok} clips, {len(names)} objects each: open {1e3 * opened:.1f} ms, states "
          f"{time.perf_counter() - start - opened:.1f} s")  # fmt: skip
    corpus = pa.table(
        {"id": pa.array([f"video-{n:09d}" for n in range(1_000_000)]), "uri": ["s3://bucket/x.mp4"] * 1_000_000}
    )
    start = time.perf_counter()
    cache.extend(corpus)
    first = time.perf_counter() - start
    start = time.perf_counter()
    Cache.open(str(folder / "wide")).extend(corpus)
    print(f"extend by 1,000,000 clips: {first:.1f} s; again, all known: {time.perf_counter() - start:.1f} s")


def main() -> None:
    """Print every table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--videos", type=Path, default=VIDEOS, help="folder of clips")
    parser.add_argument(
        "--dir", type=Path, help="where the files go, to choose the disk; a temporary folder by default"
    )
    arguments = parser.parse_args()
    window = make_window(arguments.videos)
    raw = as_raw(window)
    with tempfile.TemporaryDirectory(dir=arguments.dir) as name:
        folder = Path(name)
        cache = Cache.create(str(folder / "cache"), Sampling(), clips_per_unit=1)
        cache.extend(pa.table({"id": [f"{n}" for n in range(NUM_ROUNDS)]}))
        group = cache.add_group("toy", "toy", {"a": "b"}, SPECS)
        bench_write(folder, group, window, raw)
        store = Store(str(folder / "raw"))
        for target, array in raw_arrays(raw).items():
            np.tile(raw[target].reshape(-1), 3 * NUM_ROUNDS).tofile(folder / f"{target}.raw")
            for number in range(3 * NUM_ROUNDS):
                store.put_if_absent(array.key(number), array.encode(raw[target]), durable=False)
        bench_read(folder, group, raw)
        bench_bytes(group, arguments.videos)
        with tempfile.TemporaryDirectory(dir=IN_MEMORY) as memory:
            bench_scale(Path(memory))


if __name__ == "__main__":
    main()
