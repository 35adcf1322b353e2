"""A cache as a student sees it: which targets it holds, its frozen heads, one batch's arrays, and how they flip.

Shape suffixes: `b` batch, `t` frames, `y x` rows and columns, `c` channels.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p4dprep.cache import Cache, Group
from p4dprep.errors import CorruptDataError, RequestError
from p4dprep.storage import sha256_hex
from p4dprep.targets import TargetSpec

if TYPE_CHECKING:
    from p4dprep.heads import DPTHead

_NUM_SCALE_CLIPS = 64
_MIN_SPREAD = 1e-6


@dataclass(frozen=True, kw_only=True)
class CachedTarget:
    """One target of a cache.

    Attributes:
        group: the teacher's group.
        spec: the teacher's declaration.
        has_head: whether the cache keeps a frozen head of the same teacher that predicts it.
    """

    group: str
    spec: TargetSpec
    has_head: bool = False

    @property
    def array(self) -> str:
        """Name of the target throughout the cache, `<group>_<target>`."""
        return f"{self.group}_{self.spec.name}"


def cached_targets(cache: Cache) -> dict[str, CachedTarget]:
    """Every target of a cache by its array's name; whether any clip has it is another question."""
    found = [
        CachedTarget(group=name, spec=spec, has_head=spec.name in head_names(cache.group(name)))
        for name in cache.groups()
        for spec in cache.group(name).targets
    ]
    return {target.array: target for target in found}


def channel_scales(
    cache: Cache, targets: Sequence[CachedTarget], values: Callable[[dict[str, Tensor]], Tensor]
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every channel of every tap over 64 clips spread over a cache.

    Args:
        cache: where the targets lie.
        targets: what `values` reads.
        values: (b, k, t, y, x, c) from the targets' arrays of one clip, b = 1; not finite where invalid.

    Returns:
        Both (k, 1, 1, 1, c), float32. The deviation of a channel that never changes is 1, so as not to magnify it.

    Raises:
        RequestError: no clip has these targets yet.
    """
    groups = [cache.group(target.group) for target in targets]
    done = np.flatnonzero(np.logical_and.reduce([group.states().ok for group in groups]))
    if not len(done):
        raise RequestError(f"no clip of {cache.store.url} has {targets[0].array} yet, so its scale is not known")
    places = np.unique(np.linspace(0, len(done) - 1, _NUM_SCALE_CLIPS).round().astype(int))
    counts, sums, squares = torch.zeros(()), torch.zeros(()), torch.zeros(())
    for clip in done[places].tolist():
        arrays = {
            target.array: torch.from_numpy(group.read(clip, target.spec.name))[None]
            for target, group in zip(targets, groups, strict=True)
        }
        found = values(arrays)[0].double()
        valid = found.isfinite()
        found = found.where(valid, 0.0)
        counts = counts + valid.sum(dim=(1, 2, 3), keepdim=True)
        sums = sums + found.sum(dim=(1, 2, 3), keepdim=True)
        squares = squares + found.square().sum(dim=(1, 2, 3), keepdim=True)
    counts = counts.clamp_min(1)
    mean = sums / counts
    spread = (squares / counts - mean.square()).clamp_min(0).sqrt()
    return mean.float(), torch.where(spread > _MIN_SPREAD, spread, 1.0).float()


def head_names(group: Group) -> tuple[str, ...]:
    """Names of the frozen heads that a cache keeps for a group, sorted."""
    return tuple(sorted({head.key.split("/")[2] for head in group.manifest.heads}))


def load_head(cache: Cache, group_name: str, name: str) -> "DPTHead":
    """A frozen head as the cache keeps it, its bytes compared with the digests in the group's manifest.

    Raises:
        RequestError: the cache keeps no such head.
        CorruptDataError: its files are gone or differ from what was committed.
        CacheFormatError: it is of a kind that this version does not know.
    """
    from p4dprep import heads

    group = cache.group(group_name)
    prefix = f"heads/{group_name}/{name}/"
    records = [head for head in group.manifest.heads if head.key.startswith(prefix)]
    if not records:
        raise RequestError(f"{cache.store.url} keeps no head {group_name}/{name}; it has {head_names(group)}")
    with tempfile.TemporaryDirectory(prefix="p4dprep-") as folder:
        for record in records:
            try:
                data = cache.store.get(record.key)
            except FileNotFoundError:
                data = b""
            if sha256_hex(data) != record.digest:
                raise CorruptDataError(f"{cache.store.url}/{record.key} is gone or not what was committed")
            (Path(folder) / Path(record.key).name).write_bytes(data)
        return heads.load(Path(folder))


def flip_x(values: NDArray[Any], spec: TargetSpec) -> NDArray[Any]:
    """The target of the mirrored frames: columns mirrored, and the u of a flow negated.

    Args:
        values: one clip's target, of the spec's shape.
        spec: its declaration.

    Raises:
        RequestError: the target does not allow it, or has no axis of columns.
    """
    check_flip(spec)
    axis = next(number for number, dim in enumerate(spec.dims) if dim == "x" or dim.endswith("_x"))
    flipped = np.flip(values, axis).copy()
    if "uv" in spec.dims:
        np.moveaxis(flipped, spec.dims.index("uv"), 0)[0] *= -1
    return flipped


def check_flip(spec: TargetSpec) -> None:
    """Refuse a target that cannot follow mirrored frames.

    Raises:
        RequestError: it does not allow `flip_x`, or has no axis of columns.
    """
    if "flip_x" not in spec.transforms:
        raise RequestError(
            f"target {spec.name} ({spec.quantity}) does not allow flip_x; train without the flip or without this target"
        )
    if not any(dim == "x" or dim.endswith("_x") for dim in spec.dims):
        raise RequestError(f"target {spec.name} allows flip_x, but none of its axes {spec.dims} counts columns")


@dataclass(frozen=True, kw_only=True, eq=False)
class TargetBatch:
    """The targets of those samples of a batch that have any.

    Attributes:
        sample_ids: ids of all samples of the batch, in its order.
        rows: which of them have targets; image samples have none.
        clip_ids: the clip whose targets each of `rows` has.
        arrays: array name to physical values, (len(rows), *spec.shape); NaN where invalid.
    """

    sample_ids: tuple[str, ...]
    rows: tuple[int, ...]
    clip_ids: tuple[str, ...]
    arrays: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        if list(self.rows) != sorted(set(self.rows) & set(range(len(self.sample_ids)))):
            raise ValueError(f"rows {self.rows} do not rise within a batch of {len(self.sample_ids)}")
        if len(self.clip_ids) != len(self.rows):
            raise ValueError(f"{len(self.clip_ids)} clip ids do not fit {len(self.rows)} rows")
        for name, array in self.arrays.items():
            if len(array) != len(self.rows):
                raise ValueError(f"{name} has {len(array)} rows for {len(self.rows)} samples with targets")

    def __repr__(self) -> str:
        shapes = {name: tuple(array.shape) for name, array in self.arrays.items()}
        return f"TargetBatch({len(self.sample_ids)} samples, rows={self.rows}, {shapes})"

    def to(self, device: torch.device | str) -> Self:
        """The same on a device."""
        moved = {name: array.to(device, non_blocking=True) for name, array in self.arrays.items()}
        return type(self)(sample_ids=self.sample_ids, rows=self.rows, clip_ids=self.clip_ids, arrays=moved)


def stack_targets(
    sample_ids: Sequence[str], clip_ids: Sequence[str | None], arrays: Sequence[Mapping[str, NDArray[Any]]]
) -> TargetBatch:
    """One batch's targets from those of its samples.

    Args:
        sample_ids: id of each sample.
        clip_ids: id of each sample's clip; None for a sample without targets.
        arrays: each sample's targets by array name, of the same names wherever there is a clip.
    """
    rows = [row for row, clip in enumerate(clip_ids) if clip is not None]
    names = list(arrays[rows[0]]) if rows else []
    return TargetBatch(
        sample_ids=tuple(sample_ids),
        rows=tuple(rows),
        clip_ids=tuple(clip for clip in clip_ids if clip is not None),
        arrays={name: torch.from_numpy(np.stack([arrays[row][name] for row in rows])) for name in names},
    )
