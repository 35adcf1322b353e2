"""What kept frames cost and save: `python -m benchmarks.frames`.

Two tables for the clips of a folder (`--videos`), 16 frames squashed to `--side` pixels by the engine's own decoder.
Lossless codecs: bytes and speeds, blosc alone, CPU time of one core. Clips: bytes in a cache, and the wall-clock of
reading them back, checksum included, beside that of decoding the video, the file in memory in both cases.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numcodecs import blosc
from numpy.typing import NDArray

from benchmarks.encodings import VIDEOS, median_seconds
from p4dprep.cache import Cache, ClipResult, Group
from p4dprep.corpus import CORPUS_COLUMNS, Sampling
from p4dprep.extract.frames import KeptFrames
from p4dprep.video import ClipFrames, Decoder

SHUFFLES = ("no shuffle", "shuffle", "bitshuffle")
BLOCKS = {0: "blosc's own blocks", 1 << 19: "512 KiB", 1 << 21: "2 MiB"}


def as_they_are(frames_thwc: NDArray[np.uint8]) -> NDArray[Any]:
    """Bytes as decoded."""
    return frames_thwc.reshape(-1)


def as_pixels(frames_thwc: NDArray[np.uint8]) -> NDArray[Any]:
    """Items of three bytes, so that a shuffle parts the colours."""
    return frames_thwc.reshape(-1).view("V3")


def time_last(frames_thwc: NDArray[np.uint8]) -> NDArray[Any]:
    """A pixel's values over time side by side."""
    return np.ascontiguousarray(frames_thwc.transpose(1, 2, 3, 0)).reshape(-1)


def delta_in_time(frames_thwc: NDArray[np.uint8]) -> NDArray[Any]:
    """Difference to the frame before, modulo 256; no filter of zarr's specification undoes it."""
    return np.diff(frames_thwc, axis=0, prepend=np.uint8(0)).reshape(-1)


def delta_in_rows(frames_thwc: NDArray[np.uint8]) -> NDArray[Any]:
    """Difference to the row above, modulo 256; no filter of zarr's specification undoes it."""
    return np.diff(frames_thwc, axis=1, prepend=np.uint8(0)).reshape(-1)


CODECS: tuple[tuple[Callable[[NDArray[np.uint8]], NDArray[Any]], str, int, int, int], ...] = (
    (as_they_are, "zstd", 1, 2, 1 << 21),
    (as_they_are, "zstd", 1, 2, 1 << 19),
    (as_they_are, "zstd", 1, 2, 0),
    (as_they_are, "zstd", 3, 2, 1 << 21),
    (as_they_are, "zstd", 1, 0, 1 << 21),
    (as_they_are, "zstd", 3, 0, 1 << 21),
    (as_pixels, "zstd", 1, 1, 1 << 21),
    (as_they_are, "lz4", 5, 2, 1 << 21),
    (as_they_are, "lz4", 5, 0, 1 << 21),
    (time_last, "zstd", 1, 2, 1 << 21),
    (delta_in_time, "zstd", 1, 2, 1 << 19),
    (delta_in_rows, "zstd", 1, 2, 1 << 19),
    (delta_in_rows, "lz4", 5, 2, 1 << 19),
)


def try_codec(items: NDArray[Any], codec: tuple[bytes, int, int, int]) -> tuple[float, float, float]:
    """Share of the raw bytes, and MB a second of writing and reading."""
    packed, out = blosc.compress(items, *codec), np.empty_like(items)
    write_seconds = median_seconds(lambda: blosc.compress(items, *codec))
    read_seconds = median_seconds(lambda: blosc.decompress(packed, out))
    return len(packed) / items.nbytes, items.nbytes / write_seconds / 1e6, items.nbytes / read_seconds / 1e6


def codec_rows(clips: list[ClipFrames]) -> Iterator[str]:
    """One line a codec: shares of the raw bytes over the clips, median speeds."""
    yield "| bytes | codec | bytes / raw: mean | least | most | write MB/s | read MB/s |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for arrange, name, level, shuffle, block in CODECS:
        measured = [try_codec(arrange(clip.frames_thwc), (name.encode(), level, shuffle, block)) for clip in clips]
        shares, writes, reads = zip(*measured, strict=True)
        how = f"{name} {level}, {SHUFFLES[shuffle]}, {BLOCKS[block]}"
        mean = statistics.mean(shares)
        speeds = f"{statistics.median(writes):.0f} | {statistics.median(reads):.0f}"
        what = arrange.__name__.replace("_", " ")
        yield f"| {what} | {how} | {mean:.3f} | {min(shares):.3f} | {max(shares):.3f} | {speeds} |"


def keep(folder: str, videos: list[Path], clips: list[ClipFrames], sampling: Sampling) -> Group:
    """A cache of the clips' frames."""
    cache = Cache.create(folder, sampling, clips_per_unit=1)
    rows = [{"id": video.name, "uri": str(video)} for video in videos]
    cache.extend(pa.Table.from_pylist(rows, schema=CORPUS_COLUMNS))
    teacher = KeptFrames(sampling.height, sampling.width)
    group = cache.add_group("frames", "frames", teacher.fingerprint(), teacher.targets(sampling.geometry()))
    for index, clip in enumerate(clips):
        objects = group.write_clip(index, {"frames": clip.frames_thwc}, clip.time_seconds_t)
        group.commit(index, [ClipResult(index=index, id=videos[index].name, status="ok", objects=objects)])
    return group


def wall_seconds(work: Callable[[], object]) -> float:
    """The fastest of five runs; other processes can only add."""
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def clip_rows(group: Group, videos: list[Path], decoder: Decoder, sampling: Sampling) -> Iterator[str]:
    """One line a clip: what it takes and what it saves."""
    yield "| clip | raw MB | kept MB | share | decode the video, ms | read kept frames, ms |"
    yield "| --- | --- | --- | --- | --- | --- |"
    states = group.states()
    raw_mb = group.targets[0].num_values / 1e6
    for index, video in enumerate(videos):
        kept_mb = sum(item.size_bytes for item in states.objects(index) if item.array == "frames_frames") / 1e6
        decode_ms = 1e3 * wall_seconds(partial(decoder.read, video, sampling))
        read_ms = 1e3 * wall_seconds(partial(group.read, index, "frames"))
        size = f"{raw_mb:.2f} | {kept_mb:.2f} | {kept_mb / raw_mb:.3f}"
        yield f"| {video.stem} | {size} | {decode_ms:.0f} | {read_ms:.1f} |"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--videos", type=Path, default=VIDEOS, help="folder of clips")
    parser.add_argument("--side", type=int, default=336, help="pixels of a side")
    arguments = parser.parse_args()
    videos = sorted(path for path in arguments.videos.iterdir() if path.suffix in (".mp4", ".avi", ".mov"))
    sampling = Sampling(height=arguments.side, width=arguments.side)
    blosc.use_threads = False
    with Decoder() as decoder, tempfile.TemporaryDirectory() as folder:
        clips = [decoder.read(video, sampling) for video in videos]
        for row in codec_rows(clips):
            print(row, flush=True)
        print()
        for row in clip_rows(keep(f"{folder}/cache", videos, clips, sampling), videos, decoder, sampling):
            print(row, flush=True)


if __name__ == "__main__":
    main()
