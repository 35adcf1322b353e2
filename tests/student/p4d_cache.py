"""A tiny cache with latents, frozen heads and maps of every kind, made without decoding a video."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from p4dprep import heads
from p4dprep.cache import Cache, ClipResult
from p4dprep.corpus import CORPUS_COLUMNS, Sampling
from p4dprep.heads import DPTHead, DPTHeadConfig
from p4dprep.targets import TargetSpec

T, SIZE, GRID, CHANNELS, TAPS = 4, 8, 2, 6, 2
SAMPLING = Sampling(num_frames=T, height=SIZE, width=SIZE)
_THW = (T, SIZE, SIZE)
_FLIP = ("flip_x",)

LATENTS = TargetSpec(
    name="latents",
    dims=("tap", "tube", "token_y", "token_x", "channel"),
    shape=(TAPS, T // 2, GRID, GRID, CHANNELS),
    dtype="float32",
    units="1",
    quantity="latents",
    transforms=_FLIP,
)
DEPTH = TargetSpec(
    name="depth",
    dims=("t", "y", "x"),
    shape=_THW,
    dtype="float32",
    units="m",
    quantity="metric depth",
    transforms=_FLIP,
    may_be_invalid=True,
)
FLOW = TargetSpec(
    name="flow",
    dims=("t", "y", "x", "uv"),
    shape=(*_THW, 2),
    dtype="float32",
    units="px",
    quantity="backward flow",
    transforms=_FLIP,
    invalid_frames="first",
)
MOTION = TargetSpec(
    name="motion",
    dims=("t", "y", "x"),
    shape=_THW,
    dtype="float32",
    units="1",
    quantity="motion logit",
    transforms=_FLIP,
)
CAMRAY = TargetSpec(
    name="camray",
    dims=("t", "ray_y", "ray_x", "pluecker"),
    shape=(T, GRID, GRID, 6),
    dtype="float32",
    units="1",
    quantity="plücker rays",
)
DISPARITY = TargetSpec(
    name="depth", dims=("t", "y", "x"), shape=_THW, dtype="float32", units="1", quantity="relative disparity"
)
MASK = TargetSpec(name="motion", dims=("t", "y", "x"), shape=_THW, dtype="bool", units="1", quantity="motion mask")
INSTANCES = TargetSpec(
    name="instances", dims=("t", "y", "x"), shape=_THW, dtype="uint8", units="1", quantity="instance ids"
)
GROUPS: dict[str, tuple[TargetSpec, ...]] = {
    "l4p": (LATENTS, DEPTH, FLOW, MOTION, CAMRAY),
    "any": (DISPARITY,),
    "truth": (MASK, INSTANCES),
}


def head_config(spec: TargetSpec, **changes: object) -> DPTHeadConfig:
    frames, rows, columns, channels = (*spec.shape, 1)[:4]
    fields = {
        "token_channels": CHANNELS,
        "token_grid": (T // 2, GRID, GRID),
        "tap_channels": (4, 4),
        "tap_log2_factors": ((0, 1, 1), (0, 0, 0)),
        "fusion_channels": 4,
        "fusion_factors": ((1, 2, 2), (1, 2, 2)),
        "hidden_channels": 4,
        "out_channels": channels,
        "output_grid": (frames, rows, columns),
        "activation": "exp" if spec.quantity == "metric depth" else "none",
    }
    return DPTHeadConfig(**fields | changes)  # type: ignore[arg-type]


def values_of(spec: TargetSpec, seed: int) -> NDArray[np.generic]:
    """Random values that the declaration allows, some invalid."""
    random = np.random.default_rng([seed, len(spec.name), len(spec.quantity)])
    if spec.dtype != "float32":
        return random.integers(0, 2, spec.shape).astype(spec.dtype)
    values = random.standard_normal(spec.shape).astype(np.float32)
    if spec.quantity in ("metric depth", "relative disparity"):
        values = np.exp(values)
    if spec.may_be_invalid:
        values[:, :2, :3] = np.nan
    if spec.invalid_frames == "first":
        values[0] = np.nan
    return values


def build(folder: Path, groups: dict[str, tuple[TargetSpec, ...]] | None = None, num_clips: int = 2) -> Cache:
    """A cache of clips `clip-0`, ... with these groups; `l4p` has a random frozen head for every map."""
    cache = Cache.create(str(folder / "cache"), SAMPLING, clips_per_unit=2)
    rows = [{"id": f"clip-{i}", "uri": f"/videos/clip-{i}.mp4"} for i in range(num_clips)]
    cache.extend(pa.Table.from_pylist(rows, schema=CORPUS_COLUMNS))
    for name, specs in (GROUPS if groups is None else groups).items():
        heads_folder = folder / f"heads-{name}" if name == "l4p" else None
        if heads_folder is not None:
            write_heads(heads_folder, specs)
        group = cache.add_group(name, name, {"kind": name}, specs, heads_folder)
        for index in range(num_clips):
            arrays = {spec.name: values_of(spec, index) for spec in specs}
            objects = group.write_clip(index, arrays, np.arange(T, dtype=np.float64))
            result = ClipResult(index=index, id=f"clip-{index}", status="ok", num_distinct_frames=T, objects=objects)
            group.commit(index // 2, [result])
    return cache


def write_heads(folder: Path, specs: tuple[TargetSpec, ...], **changes: object) -> None:
    torch.manual_seed(7)
    for spec in specs:
        if spec.quantity != "latents":
            heads.save(DPTHead(head_config(spec, **changes)), folder / spec.name)
