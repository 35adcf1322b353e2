"""A small cache for tests: clips that are encoded and decoded for real, and an array of every kind of target."""

from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from p4dprep.cache import Cache, ClipResult, Group
from p4dprep.corpus import CORPUS_COLUMNS, Sampling
from p4dprep.targets import TargetSpec
from p4dprep.video import ClipFrames, Decoder

NUM_FRAMES, SIZE, GRID = 4, 32, 4
SAMPLING = Sampling(num_frames=NUM_FRAMES, height=SIZE, width=SIZE)

_THW = (NUM_FRAMES, SIZE, SIZE)
_GRID_DIMS = ("tube", "token_y", "token_x", "channel")
TARGETS: dict[str, tuple[TargetSpec, ...]] = {
    "opencv_dis": (
        TargetSpec(
            name="flow",
            dims=("t", "y", "x", "uv"),
            shape=(*_THW, 2),
            dtype="float32",
            units="px",
            quantity="backward flow",
            invalid_frames="first",
        ),
    ),
    "l4p": (
        TargetSpec(
            name="latents",
            dims=("tap", *_GRID_DIMS),
            shape=(2, NUM_FRAMES // 2, GRID, GRID, 16),
            dtype="float32",
            units="1",
            quantity="latents",
        ),
        TargetSpec(
            name="camray",
            dims=("t", "ray_y", "ray_x", "pluecker"),
            shape=(NUM_FRAMES, GRID, GRID, 6),
            dtype="float32",
            units="1",
            quantity="plücker rays",
        ),
        TargetSpec(name="depth", dims=("t", "y", "x"), shape=_THW, dtype="float32", units="m", quantity="metric depth"),
        TargetSpec(
            name="motion", dims=("t", "y", "x"), shape=_THW, dtype="float32", units="1", quantity="motion logit"
        ),
    ),
}


def write_video(path: Path, seed: int, num_frames: int = 12) -> None:
    """A textured square that crosses a textured ground: 64 x 64 at 6 fps, MPEG-4 in MP4."""
    ground = np.random.default_rng(seed).integers(0, 120, (64, 64, 3), np.uint8)
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=6)
        stream.height, stream.width, stream.pix_fmt, stream.time_base = 64, 64, "yuv420p", Fraction(1, 6)
        for index in range(num_frames):
            image = ground.copy()
            image[20:44, 2 + index : 26 + index] = 255 - ground[20:44, :24]
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def dis_flow(frames_thwc: NDArray[np.uint8]) -> NDArray[np.float32]:
    """OpenCV's backward flow, NaN in the first frame."""
    how = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames_thwc]
    flow = [np.full((SIZE, SIZE, 2), np.nan, np.float32)]
    flow += [how.calc(now, before, np.zeros((SIZE, SIZE, 2), np.float32)) for before, now in pairwise(grey)]
    return np.stack(flow)


def arrays_of(clip: ClipFrames) -> dict[str, dict[str, NDArray[np.float32]]]:
    """Group to target to array: real flow; depth a floor, motion from flow, rays of a moving camera, random latents."""
    flow = dis_flow(clip.frames_thwc)
    floor = np.linspace(6, 1, SIZE, dtype=np.float32)[None, :, None]
    x, y = np.meshgrid(np.linspace(-0.5, 0.5, GRID), np.linspace(-0.5, 0.5, GRID))
    direction = np.stack([x, y, np.ones_like(x)], axis=-1)
    direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
    rays = [np.concatenate([direction, np.cross([0.1 * t, 0, 0], direction)], axis=-1) for t in range(NUM_FRAMES)]
    latents = np.random.default_rng(0).standard_normal(TARGETS["l4p"][0].shape)
    return {
        "opencv_dis": {"flow": flow},
        "l4p": {
            "latents": latents.astype(np.float32),
            "camray": np.stack(rays).astype(np.float32),
            "depth": np.broadcast_to(floor, _THW).copy(),
            "motion": np.hypot(*np.moveaxis(np.nan_to_num(flow), -1, 0)) - 1,
        },
    }


def commit_clip(group: Group, index: int, clip: ClipFrames, arrays: dict[str, NDArray[np.float32]]) -> None:
    """Write one clip into a group and commit it."""
    result = ClipResult(
        index=index,
        id=f"clip-{index}",
        status="ok",
        num_distinct_frames=clip.num_distinct_frames,
        objects=group.write_clip(index, arrays, clip.time_seconds_t),
    )
    group.commit(index // group.ledger.clips_per_unit, [result])


def build_cache(folder: Path, *, num_clips: int = 3, num_failed: int = 1, name: str = "{index}.mp4") -> Cache:
    """`folder/cache` over `folder/videos` with the groups of `TARGETS`; the last clips failed in every group.

    Clips with an odd index begin 0.5 s into their video.

    Args:
        folder: an empty folder.
        num_clips: clips in all, with ids `clip-0`, `clip-1`, ...
        num_failed: how many of them failed.
        name: the videos' file names, `{index}` replaced.
    """
    videos = [folder / "videos" / name.replace("{index}", str(index)) for index in range(num_clips)]
    videos[0].parent.mkdir()
    starts = [0.5 if index % 2 else None for index in range(num_clips)]
    rows = [
        {"id": f"clip-{index}", "uri": str(videos[index]), "start_seconds": starts[index]} for index in range(num_clips)
    ]
    cache = Cache.create(str(folder / "cache"), SAMPLING, clips_per_unit=2)
    cache.extend(pa.Table.from_pylist(rows, schema=CORPUS_COLUMNS))
    groups = {
        kind: cache.add_group(kind, kind.replace("_", "-"), {"kind": kind}, specs) for kind, specs in TARGETS.items()
    }
    with Decoder() as decoder:
        for index, path in enumerate(videos[: num_clips - num_failed]):
            write_video(path, index)
            clip = decoder.read(path, SAMPLING, starts[index])
            for kind, arrays in arrays_of(clip).items():
                commit_clip(groups[kind], index, clip, arrays)
    for index in range(num_clips - num_failed, num_clips):
        failed = ClipResult(index=index, id=f"clip-{index}", status="failed", failure="corrupt", reason="is damaged")
        for group in groups.values():
            group.commit(index // cache.clips_per_unit, [failed])
    return cache
