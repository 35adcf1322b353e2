"""Small caches for tests: every quantity, a few clips, and arrays that a clip's index determines."""

from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from p4dprep.cache import Cache, ClipResult, Group
from p4dprep.corpus import Sampling
from p4dprep.targets import RGB_DIMS, TargetSpec
from tests.s3 import Place

SAMPLING = Sampling(num_frames=4, height=16, width=24)
T, H, W = 4, 16, 24
FINGERPRINT = {"weights": "ab" * 32, "dtype": "float32"}

FLOW = TargetSpec(
    name="flow", dims=("t", "y", "x", "uv"), shape=(T, H, W, 2), dtype="float32", units="px",
    quantity="backward flow", transforms=("flip_x",), invalid_frames="first", description="flow to the frame before",
)  # fmt: skip
DEPTH = TargetSpec(
    name="depth", dims=("t", "y", "x"), shape=(T, H, W), dtype="float32", units="m", quantity="metric depth"
)
LOGIT = TargetSpec(
    name="motion", dims=("t", "y", "x"), shape=(T, H, W), dtype="float32", units="1", quantity="motion logit"
)
MASK = TargetSpec(name="mask", dims=("t", "y", "x"), shape=(T, H, W), dtype="bool", units="1", quantity="motion mask")
RAYS = TargetSpec(
    name="rays", dims=("t", "y", "x", "ray"), shape=(T, 4, 4, 6), dtype="float32", units="1", quantity="plücker rays"
)
LATENTS = TargetSpec(
    name="tap2", dims=("token", "channel"), shape=(32, 24), dtype="float16", units="1", quantity="latents"
)
FRAMES = TargetSpec(
    name="frames", dims=RGB_DIMS, shape=(T, H, W, 3), dtype="uint8", units="1", quantity="rgb frames",
    transforms=("flip_x",),
)  # fmt: skip
ALL_SPECS = (FLOW, DEPTH, LOGIT, MASK, RAYS, FRAMES, LATENTS)
FEW_SPECS = (FLOW, LATENTS)


def make_values(spec: TargetSpec, seed: int) -> NDArray[np.generic]:
    """Values that the spec's own check accepts."""
    rng = np.random.default_rng([seed, len(spec.name)])
    if spec.dtype == "bool":
        return rng.random(spec.shape) > 0.5
    if spec.dtype == "uint8":
        return rng.integers(0, 256, spec.shape, np.uint8)
    values = rng.normal(0, 3, spec.shape)
    values = np.exp(values / 3) if spec.quantity == "metric depth" else values
    values = values.astype(spec.dtype)
    if spec.invalid_frames == "first":
        values[0] = np.nan
    spec.check(values, f"clip {seed}")
    return values


def make_times(index: int) -> NDArray[np.float64]:
    """Frame times of a clip."""
    return index + np.arange(T) / 30


def make_corpus(num_clips: int) -> pa.Table:
    """A corpus of `clip-0`, `clip-1`, ..."""
    ids = [f"clip-{number}" for number in range(num_clips)]
    return pa.table({"id": ids, "uri": [f"videos/{clip_id}.mp4" for clip_id in ids]})


def new_cache(place: Place, num_clips: int = 3, clips_per_unit: int = 2) -> Cache:
    """A cache with clips and no group."""
    cache = Cache.create(place.url, SAMPLING, clips_per_unit=clips_per_unit, storage_options=place.storage_options)
    cache.extend(make_corpus(num_clips))
    return cache


def add_group(cache: Cache, specs: Sequence[TargetSpec] = FEW_SPECS, name: str = "toy") -> Group:
    """A group of a toy teacher."""
    return cache.add_group(name, "toy:x", FINGERPRINT, specs)


def write(group: Group, index: int, noise: float = 0.0) -> ClipResult:
    """Write a clip's objects; `noise` makes a teacher that never says the same twice."""
    rng = np.random.default_rng()
    arrays = {}
    for spec in group.targets:
        values = make_values(spec, index)
        if noise and spec.dtype not in ("bool", "uint8"):
            values = (values * (1 + noise * rng.normal(size=spec.shape))).astype(spec.dtype)
        arrays[spec.name] = values
    objects = group.write_clip(index, arrays, make_times(index))
    return ClipResult(index=index, id=f"clip-{index}", status="ok", objects=objects)


def fill(cache: Cache, group: Group, indices: Iterable[int] | None = None, noise: float = 0.0) -> None:
    """Compute and commit what is missing, unit by unit, as extraction does."""
    wanted = range(cache.num_clips) if indices is None else indices
    missing = [index for index in wanted if not group.states().ok[index]]
    for unit in sorted({index // cache.clips_per_unit for index in missing}):
        results = [write(group, index, noise) for index in missing if index // cache.clips_per_unit == unit]
        group.commit(unit, results)


def failed(index: int, reason: str = "it has no frames") -> ClipResult:
    """A clip that could not be read."""
    return ClipResult(index=index, id=f"clip-{index}", status="failed", failure="no_frames", reason=reason)


def committed_digests(group: Group) -> dict[str, str]:
    """Key to digest of every committed object."""
    states = group.states()
    return {item.key: item.digest for index in np.flatnonzero(states.ok).tolist() for item in states.objects(index)}
