"""Bytes, errors and speeds of the encodings and of what they were chosen over: `python -m benchmarks.encodings`.

Data: opencv's dense inverse search flow on the clips of a folder (`--videos`), hidden states of a VideoMAE with random
weights on their frames (with and without added outliers), and exact depth, motion and rays of a ray-cast room whose
depth carries 0.5% of smooth noise, as a network's does. CPU time of one core, medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import torch
from numcodecs import blosc
from numpy.typing import NDArray
from transformers import VideoMAEConfig, VideoMAEModel

from p4dprep import encoding
from p4dprep.cache.arrays import ClipArray
from p4dprep.targets import TargetSpec

NUM_FRAMES, SIDE = 16, 224
BLOCK_BYTES = 1 << 19
VIDEOS = Path(__file__).parents[2] / "shared" / "videos"


def spec_of(
    name: str, quantity: Any, shape: tuple[int, ...], dtype: Any = "float32", invalid: Any = "none"
) -> TargetSpec:
    """A target of a benchmark."""
    dims = (
        ("token", "channel")
        if quantity == "latents"
        else ("t", "y", "x", "uv" if shape[-1] == 2 else "ray")[: len(shape)]
    )
    return TargetSpec(
        name=name, dims=dims, shape=shape, dtype=dtype, units="1", quantity=quantity, invalid_frames=invalid
    )


MAPS = (NUM_FRAMES, SIDE, SIDE)
FLOW = spec_of("flow", "backward flow", (*MAPS, 2), invalid="first")
DEPTH = spec_of("depth", "metric depth", MAPS)
LOGIT = spec_of("logit", "motion logit", MAPS)
MASK = spec_of("mask", "motion mask", MAPS, dtype="bool")
RAYS = spec_of("rays", "plücker rays", (*MAPS, 6))
LATENTS = spec_of("latents", "latents", (512, 384))


def read_frames(video: Path) -> NDArray[np.uint8]:
    """16 frames spread over a clip's first 400, squashed to 224 x 224, (t, h, w, 3)."""
    with av.open(str(video)) as container:
        frames = [
            frame.to_ndarray(format="rgb24") for _, frame in zip(range(400), container.decode(video=0), strict=False)
        ]
    chosen = np.round(np.linspace(0, len(frames) - 1, NUM_FRAMES)).astype(int)
    return np.stack([cv2.resize(frames[i], (SIDE, SIDE), interpolation=cv2.INTER_AREA) for i in chosen])


def flow_of(frames_thwc: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Backward flow by dense inverse search, (t, h, w, 2) pixels, NaN in the first frame."""
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames_thwc]
    search = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    flow = np.full(FLOW.shape, np.nan, np.float32)
    for n in range(1, NUM_FRAMES):
        flow[n] = search.calc(grey[n], grey[n - 1], None)  # type: ignore[call-overload]
    return flow


def latents_of(frames_thwc: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Four taps of a VideoMAE with random weights, (tap, 512, 384)."""
    torch.manual_seed(0)
    config = VideoMAEConfig(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536, patch_size=28
    )
    pixels = (torch.from_numpy(frames_thwc).permute(0, 3, 1, 2)[None].float() / 255 - 0.45) / 0.225
    with torch.no_grad():
        states = VideoMAEModel(config).eval()(pixels, output_hidden_states=True).hidden_states
    return np.stack([states[tap][0].numpy() for tap in (3, 6, 9, 12)])


def with_outliers(latents_nc: NDArray[np.float32]) -> NDArray[np.float32]:
    """Two tokens 50 times as large and four channels 30 times, as large encoders have them."""
    changed = latents_nc.copy()
    changed[[3, 200]] *= 50
    changed[:, [5, 77, 130, 301]] *= 30
    return changed


def with_spikes(latents_nc: NDArray[np.float32]) -> NDArray[np.float32]:
    """One value in every channel 60 times as large: what breaks any scale per channel."""
    changed = latents_nc.copy()
    channels = np.arange(changed.shape[1])
    changed[np.random.default_rng(0).integers(len(changed), size=len(channels)), channels] *= 60
    return changed


@dataclass(frozen=True, kw_only=True)
class Room:
    """Exact maps of a room with spheres seen by a moving camera."""

    depth_thw: NDArray[np.float32]
    sphere_thw: NDArray[np.bool_]
    rays_thw6: NDArray[np.float32]


def cast_room() -> Room:
    """Ray-cast a box and twelve spheres; depth is along the optical axis, with 0.5% of smooth noise."""
    rng = np.random.default_rng(0)
    centres, radii = rng.uniform((-2, -2, 2), (2, 2, 6), (12, 3)), rng.uniform(0.2, 0.7, 12)
    v, u = np.mgrid[:SIDE, :SIDE]
    rays = np.stack([(u - SIDE / 2) / SIDE * 1.2, (v - SIDE / 2) / SIDE * 1.2, np.ones_like(u)], -1)
    unit = rays / np.linalg.norm(rays, axis=-1, keepdims=True)
    depth, sphere, plucker = np.empty(MAPS, np.float32), np.zeros(MAPS, bool), np.empty(RAYS.shape, np.float32)
    for n in range(NUM_FRAMES):
        eye = np.array([0.05, 0.02, 0.03]) * n
        near = np.full((SIDE, SIDE), np.inf)
        for axis, wall in ((0, -3), (0, 3), (1, -2), (1, 2), (2, 8)):
            with np.errstate(divide="ignore"):
                reach = (wall - eye[axis]) / rays[..., axis]
            near = np.where((reach > 0) & (reach < near), reach, near)
        for centre, radius in zip(centres, radii, strict=True):
            offset = eye - centre
            a, b = (rays * rays).sum(-1), rays @ offset
            inside = b * b - a * (offset @ offset - radius**2)
            reach = (-b - np.sqrt(np.maximum(inside, 0))) / a
            hit = (inside > 0) & (reach > 0) & (reach < near)
            near, sphere[n] = np.where(hit, reach, near), sphere[n] | hit
        noise = cv2.GaussianBlur(rng.normal(size=(SIDE, SIDE)), (0, 0), 2)
        depth[n] = near * np.exp(0.005 * noise / noise.std())
        plucker[n] = np.concatenate([unit, np.cross(np.broadcast_to(eye, unit.shape), unit)], -1)
    return Room(depth_thw=depth, sphere_thw=sphere, rays_thw6=plucker)


def logits_of(mask_thw: NDArray[np.bool_]) -> NDArray[np.float32]:
    """A soft mask as a network gives it: +-6 with blurred borders and noise."""
    noise = np.random.default_rng(0).normal(size=mask_thw.shape)
    return np.stack(
        [
            cv2.GaussianBlur(12 * m - 6.0, (0, 0), 3) + 0.5 * cv2.GaussianBlur(n, (0, 0), 2)
            for m, n in zip(mask_thw, noise, strict=True)
        ]
    ).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table; shares and speeds are of the target as float32."""

    data: str
    how: str
    share: float
    error: str
    encode_mb_per_second: float
    decode_mb_per_second: float

    def __str__(self) -> str:
        speeds = f"{self.encode_mb_per_second:.0f} | {self.decode_mb_per_second:.0f}"
        return f"| {self.data} | {self.how} | {self.share:.3f} | {self.error} | {speeds} |"


def median_seconds(work: Callable[[], object], num_runs: int = 9) -> float:
    """Median CPU time."""
    seconds = []
    for _ in range(num_runs):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def arrays_of(spec: TargetSpec) -> dict[str, ClipArray]:
    """The arrays a cache would keep the target in."""
    return {
        s.suffix: ClipArray(
            name=spec.name, dims=s.dims, shape=s.shape, dtype=s.dtype, codecs=s.codecs, fill_value=s.fill_value,
            attributes=s.attributes,
        )
        for s in encoding.choose(spec).stored(spec)
    }  # fmt: skip


def error_of(spec: TargetSpec, ours: NDArray[Any], truth: NDArray[Any]) -> str:
    """The error that matters for the quantity."""
    ours, truth = ours[spec.valid_frames()].astype(np.float64), truth[spec.valid_frames()].astype(np.float64)
    if spec.quantity == "latents":
        cosine = (ours * truth).sum(-1) / np.linalg.norm(ours, axis=-1) / np.linalg.norm(truth, axis=-1)
        return f"{np.linalg.norm(ours - truth) / np.linalg.norm(truth):.1e} rel. L2, least cosine {cosine.min():.5f}"
    if "flow" in spec.quantity:
        return f"{np.nanmean(np.linalg.norm(ours - truth, axis=-1)):.1e} px"
    if "depth" in spec.quantity:
        return f"{np.abs(ours / truth - 1).mean():.1e} AbsRel"
    if "rays" in spec.quantity:
        unit = ours[..., :3] / np.linalg.norm(ours[..., :3], axis=-1, keepdims=True)
        sine = np.linalg.norm(np.cross(unit, truth[..., :3]), axis=-1)
        return f"{np.degrees(np.arcsin(sine)).mean():.1e} degrees"
    return f"{np.abs(ours - truth).mean():.1e}" if spec.dtype != "bool" else f"{(ours != truth).sum()} differ"


def chosen_row(data: str, spec: TargetSpec, values: NDArray[Any]) -> Row:
    """The encoding that caches use, with its checksums, as a clip is written and read."""
    how, arrays = encoding.choose(spec), arrays_of(spec)

    def write() -> dict[str, bytes]:
        return {suffix: arrays[suffix].encode(part) for suffix, part in how.encode(values, spec).parts.items()}

    def read() -> NDArray[Any]:
        return how.decode({suffix: arrays[suffix].decode(data) for suffix, data in objects.items()}, spec)

    objects = write()
    num_bytes = 4 * spec.num_values
    residual = " with residual" if "_residual" in objects else ""
    return Row(
        data=data,
        how=f"**{how.name}**{residual}",
        share=sum(map(len, objects.values())) / num_bytes,
        error=error_of(spec, read(), values),
        encode_mb_per_second=num_bytes / median_seconds(write) / 1e6,
        decode_mb_per_second=num_bytes / median_seconds(read) / 1e6,
    )


def codec_row(
    data: str,
    spec: TargetSpec,
    values: NDArray[Any],
    how: str,
    part: NDArray[Any],
    codec: tuple[str, int, int],
    block_bytes: int = BLOCK_BYTES,
) -> Row:
    """The same or other stored numbers through another blosc setting; speeds are of the codec alone."""
    part = np.ascontiguousarray(part)
    out = np.empty_like(part)
    packed = blosc.compress(part, codec[0].encode(), codec[1], codec[2], block_bytes)
    num_bytes = 4 * spec.num_values
    return Row(
        data=data,
        how=f"{how}, {codec[0]} {codec[1]}, {('no shuffle', 'shuffle', 'bitshuffle')[codec[2]]}"
        f"{'' if block_bytes else ', blocks as blosc chooses'}",
        share=len(packed) / num_bytes,
        error=error_of(spec, part, values) if part.dtype.kind == "f" else "as chosen",
        encode_mb_per_second=num_bytes
        / median_seconds(lambda: blosc.compress(part, codec[0].encode(), codec[1], codec[2], block_bytes))
        / 1e6,
        decode_mb_per_second=num_bytes / median_seconds(lambda: blosc.decompress(packed, out)) / 1e6,
    )


def rows(videos: list[Path]) -> Iterator[Row]:
    """Every line of the table."""
    room = cast_room()
    yield chosen_row("depth, room", DEPTH, room.depth_thw)
    rounded = encoding.choose(DEPTH).encode(room.depth_thw, DEPTH).parts[""]
    for codec in (("lz4", 5, 2), ("zstd", 1, 1), ("zstd", 3, 2)):
        yield codec_row("depth, room", DEPTH, room.depth_thw, "float32-mantissa9", rounded, codec)
    yield codec_row("depth, room", DEPTH, room.depth_thw, "float32-mantissa9", rounded, ("zstd", 1, 2), block_bytes=0)
    yield codec_row("depth, room", DEPTH, room.depth_thw, "float16", room.depth_thw.astype(np.float16), ("zstd", 1, 2))
    frames = [read_frames(video) for video in videos]
    for video, clip in zip(videos, frames, strict=True):
        yield chosen_row(f"flow, {video.stem}", FLOW, flow_of(clip))
    flow = flow_of(frames[0])
    steps = encoding.choose(FLOW).encode(flow, FLOW).parts[""]
    for codec in (("lz4", 5, 2), ("zstd", 1, 1), ("zstd", 3, 2)):
        yield codec_row(f"flow, {videos[0].stem}", FLOW, flow, "flow-int16", steps, codec)
    yield codec_row(f"flow, {videos[0].stem}", FLOW, flow, "flow-int16", steps, ("zstd", 1, 2), block_bytes=0)
    planar = steps.transpose(3, 0, 1, 2)
    yield codec_row(f"flow, {videos[0].stem}", FLOW, flow, "flow-int16, u and v apart", planar, ("zstd", 1, 2))
    yield chosen_row("motion logit, room", LOGIT, logits_of(room.sphere_thw))
    yield chosen_row("motion mask, room", MASK, room.sphere_thw)
    yield chosen_row("rays, room, full size", RAYS, room.rays_thw6)
    latents = latents_of(frames[0])[2]
    yield chosen_row("latents", LATENTS, latents)
    yield chosen_row("latents, outlier tokens and channels", LATENTS, with_outliers(latents))
    yield chosen_row("latents, a spike in each channel", LATENTS, with_spikes(latents))
    codes = encoding.choose(LATENTS).encode(latents, LATENTS).parts[""]
    yield codec_row("latents", LATENTS, latents, "latents-int8", codes, ("zstd", 1, 0))
    yield codec_row("latents", LATENTS, latents, "float16", latents.astype(np.float16), ("zstd", 1, 2))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--videos", type=Path, default=VIDEOS, help="folder of clips")
    folder = parser.parse_args().videos
    videos = sorted(path for path in folder.iterdir() if path.suffix in (".mp4", ".avi", ".mov"))
    blosc.use_threads = False
    print(
        "| data | encoding | bytes / fp32 | error | encode MB/s | decode MB/s |\n| --- | --- | --- | --- | --- | --- |"
    )
    for row in rows(videos):
        print(row, flush=True)


if __name__ == "__main__":
    main()
