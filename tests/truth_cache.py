"""A cache of exact truth for tests: a camera that flies past a slanted wall, with a patch that moves and some sky."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from p4dprep.cache import Cache, ClipResult
from p4dprep.cameras import rays_from_poses
from p4dprep.corpus import CORPUS_COLUMNS, Sampling
from p4dprep.targets import DType, InvalidFrames, Quantity, TargetSpec

SAMPLING = Sampling(num_frames=4, height=32, width=32)
GRID = (4, 4)
Arrays = dict[str, NDArray[Any]]


def spec(
    name: str,
    quantity: Quantity,
    values: NDArray[Any],
    dims: Sequence[str] = ("t", "y", "x", "uv"),
    *,
    dtype: DType = "float32",
    invalid_frames: InvalidFrames = "none",
    may_be_invalid: bool = False,
) -> TargetSpec:
    """A declaration that fits an array."""
    return TargetSpec(
        name=name,
        dims=tuple(dims[: values.ndim]),
        shape=values.shape,
        dtype=dtype,
        units="1",
        quantity=quantity,
        invalid_frames=invalid_frames,
        may_be_invalid=may_be_invalid,
    )


def truth_specs(arrays: Mapping[str, NDArray[Any]]) -> tuple[TargetSpec, ...]:
    """The declarations of `truth_arrays`, as the truth of a world has them."""
    return (
        spec("depth", "metric depth", arrays["depth"], may_be_invalid=True),
        spec("flow", "backward flow", arrays["flow"], invalid_frames="first", may_be_invalid=True),
        spec("flow_visible", "visibility mask", arrays["flow_visible"], dtype="bool"),
        spec("motion", "motion mask", arrays["motion"], dtype="bool"),
        spec("instances", "instance ids", arrays["instances"], dtype="uint8"),
        spec("camray", "plücker rays", arrays["camray"], ("t", "ray_y", "ray_x", "pluecker")),
        spec("pose", "camera pose", arrays["pose"], ("t", "row", "column")),
        spec("intrinsics", "camera intrinsics", arrays["intrinsics"], ("t", "k_row", "k_column")),
    )


def poses(seed: int, num_frames: int) -> NDArray[np.float64]:
    """World-to-camera poses of a camera that flies sideways, forwards and turns, (t, 4, 4)."""
    rng = np.random.default_rng(seed)
    step, turn = rng.uniform(0.05, 0.15, 3), rng.uniform(0.01, 0.03)
    pose = np.tile(np.eye(4), (num_frames, 1, 1))
    for frame in range(num_frames):
        cosine, sine = np.cos(turn * frame), np.sin(turn * frame)
        pose[frame, :3, :3] = [[cosine, 0, -sine], [0, 1, 0], [sine, 0, cosine]]
        pose[frame, :3, 3] = -pose[frame, :3, :3] @ (frame * step)
    return pose


def truth_arrays(seed: int, sampling: Sampling = SAMPLING) -> Arrays:
    """Depth, backward flow and its visibility, motion, instances, rays, poses and intrinsics of one clip."""
    num_frames, height, width = sampling.num_frames, sampling.height, sampling.width
    pose = poses(seed, num_frames)
    intrinsics = np.tile([[width, 0, width / 2], [0, width, height / 2], [0, 0, 1]], (num_frames, 1, 1)).astype(float)
    rays = rays_from_poses(pose, intrinsics, (height, width), (height, width))
    origin = np.linalg.inv(pose)[:, :3, 3][:, None, None]
    direction = rays[..., :3]
    normal = np.array([0.2, -0.1, 1.0])
    points = origin + direction * ((5 + seed % 3 - origin @ normal) / (direction @ normal))[..., None]
    depth = np.einsum("tij,tyxj->tyxi", pose[:, :3, :3], points)[..., 2] + pose[:, None, None, 2, 3]
    y, x = np.mgrid[:height, :width] + 0.5
    flow = np.full((num_frames, height, width, 2), np.nan)
    for frame in range(1, num_frames):
        seen = points[frame] @ pose[frame - 1, :3, :3].T + pose[frame - 1, :3, 3]
        image = seen @ intrinsics[0].T
        flow[frame] = image[..., :2] / image[..., 2:] - np.stack([x, y], axis=-1)
    motion = np.zeros((num_frames, height, width), bool)
    motion[:, height // 4 : height // 2, width // 4 : width // 2] = seed % 2 == 0
    flow[1:][motion[1:]] += 2
    target = np.stack([x, y], axis=-1) + np.nan_to_num(flow)
    depth[:, :2, :3] = np.nan
    return {
        "depth": depth.astype(np.float32),
        "flow": flow.astype(np.float32),
        "flow_visible": ((target >= 0) & (target < [width, height])).all(axis=-1),
        "motion": motion,
        "instances": motion.astype(np.uint8),
        "camray": rays_from_poses(pose, intrinsics, (height, width), GRID).astype(np.float32),
        "pose": pose.astype(np.float32),
        "intrinsics": intrinsics.astype(np.float32),
    }


def write_cache(
    url: str,
    group: str,
    specs: Sequence[TargetSpec],
    clips: Mapping[str, Arrays],
    *,
    sampling: Sampling = SAMPLING,
    times: Mapping[str, NDArray[np.float64]] | None = None,
    uris: Mapping[str, str] | None = None,
) -> Cache:
    """A cache, or one more group in it, of clips by id; clips without arrays stay uncommitted.

    Args:
        times: frame times of the clips whose times are not 0, 0.1, 0.2, ... s.
        uris: of the clips whose video is there.
    """
    rows = [{"id": clip_id, "uri": (uris or {}).get(clip_id, f"gone/{clip_id}.mp4")} for clip_id in clips]
    cache = Cache.create(url, sampling, clips_per_unit=2)
    indices = cache.extend(pa.Table.from_pylist(rows, schema=CORPUS_COLUMNS))
    written = cache.add_group(group, group, {"made by": group}, specs)
    for index, (clip_id, arrays) in zip(indices.tolist(), clips.items(), strict=True):
        if arrays:
            for declared in specs:
                declared.check(arrays[declared.name], clip_id)
            time = (times or {}).get(clip_id, np.arange(sampling.num_frames) / 10)
            kept = {declared.name: arrays[declared.name] for declared in specs}
            objects = written.write_clip(index, kept, time)
            result = ClipResult(index=index, id=clip_id, status="ok", num_distinct_frames=4, objects=objects)
            written.commit(index // cache.clips_per_unit, [result])
    return cache
