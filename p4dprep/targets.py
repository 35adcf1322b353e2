"""What a teacher is and what it leaves behind.

Shape suffixes: `b` batch, `t` frames, `h w` pixels, `c` channels.
"""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray

from p4dprep.errors import RequestError, TeacherOutputError

Quantity = Literal[
    "rgb frames",
    "metric depth",
    "relative depth",
    "relative disparity",
    "forward flow",
    "backward flow",
    "motion logit",
    "motion mask",
    "visibility mask",
    "instance ids",
    "plücker rays",
    "camera pose",
    "camera intrinsics",
    "latents",
    "vision features",
]
RGB_DIMS = ("t", "y", "x", "rgb")
"""Axes of the quantity `rgb frames`: pictures as they were decoded, kept for training, not made by a teacher."""
DType = Literal["float32", "float16", "bool", "uint8"]
Transform = Literal["flip_x"]
InvalidFrames = Literal["none", "first", "last"]

SHARED_DIMS = ("t", "y", "x", "uv")
"""Axes that mean the same for every target of a cache: frames, rows, columns, and (u, v) of a flow in pixels.
Any other axis belongs to one teacher and is stored as `<group>_<dim>`."""

_MAY_BE_CONSTANT: frozenset[Quantity] = frozenset(
    {
        "forward flow",
        "backward flow",
        "motion logit",
        "motion mask",
        "visibility mask",
        "instance ids",
        "camera pose",
        "camera intrinsics",
    }
)
_POSITIVE: frozenset[Quantity] = frozenset({"metric depth", "relative depth"})


@dataclass(frozen=True, kw_only=True)
class FrameGeometry:
    """The frames every teacher of a cache gets: `num_frames` x `height` x `width` x 3, uint8 RGB.

    `resize` says how they came to that size: squashed, whatever the shape, or padded with black.
    """

    num_frames: int
    height: int
    width: int
    resize: Literal["squash", "pad"] = "squash"

    def __post_init__(self) -> None:
        for name in ("num_frames", "height", "width"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class TargetSpec:
    """One array that a teacher makes of every clip.

    Attributes:
        name: lower-case identifier, unique within its teacher, such as `depth`.
        dims: axis names of one clip's array; `t`, `y`, `x`, `uv` are shared, others are the teacher's own.
        shape: sizes of those axes.
        dtype: the dtype `predict` returns: `float32`, `float16`, `bool` for masks, `uint8` for ids.
        units: UDUNITS string such as `m`, `1/m`; `px` for flow; `1` for none.
        quantity: what the numbers mean; it chooses the encoding, the checks and the losses that are allowed.
        transforms: augmentations under which the target can follow the frames exactly.
        invalid_frames: the frame that has no value by definition, such as the first of a backward flow. It holds
            NaN; a NaN or infinity anywhere else is refused.
        may_be_invalid: single values may be NaN where there is none by nature, such as the depth of the sky; not all
            of them. Infinities stay refused.
        description: one line for people.
    """

    name: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: DType
    units: str
    quantity: Quantity
    transforms: tuple[Transform, ...] = ()
    invalid_frames: InvalidFrames = "none"
    description: str = ""
    may_be_invalid: bool = False

    def __post_init__(self) -> None:
        if not self.name.isidentifier() or self.name != self.name.lower():
            raise RequestError(f"target name {self.name!r} must be a lower-case identifier")
        if len(self.dims) != len(self.shape) or len(set(self.dims)) != len(self.dims) or min(self.shape, default=0) < 1:
            raise RequestError(f"target {self.name}: dims {self.dims} do not fit shape {self.shape}")
        if self.quantity not in get_args(Quantity):
            raise RequestError(f"target {self.name}: unknown quantity {self.quantity!r}; one of {get_args(Quantity)}")
        if self.invalid_frames != "none" and self.dims[0] != "t":
            raise RequestError(f"target {self.name}: invalid_frames needs `t` as the first dim, not {self.dims}")
        if self.quantity == "rgb frames" and (self.dtype, self.dims, self.shape[-1]) != ("uint8", RGB_DIMS, 3):
            raise RequestError(
                f"target {self.name}: rgb frames are uint8 of {RGB_DIMS} with three colours, not {self.dtype} of "
                f"{self.dims} {self.shape}"
            )

    @property
    def num_values(self) -> int:
        """Numbers in one clip's array."""
        return math.prod(self.shape)

    def to_attributes(self) -> dict[str, Any]:
        """The declaration for JSON. What a cache's format did not know at first is left out where it says nothing."""
        fields = dataclasses.asdict(self)
        if not self.may_be_invalid:
            del fields["may_be_invalid"]
        return fields

    def valid_frames(self) -> slice:
        """The frames that must hold finite numbers."""
        return {"none": slice(None), "first": slice(1, None), "last": slice(None, -1)}[self.invalid_frames]

    def check(self, values: NDArray[np.generic], clip_id: str) -> None:
        """Refuse an array that this declaration forbids.

        Raises:
            TeacherOutputError: wrong shape or dtype, NaN (unless declared) or infinity in a valid frame, nothing but
                NaN, a value in an invalid frame, a depth that is not positive, or a constant array where a real
                prediction cannot be constant.
        """
        where = f"target {self.name} of clip {clip_id}"
        if values.shape != self.shape:
            raise TeacherOutputError(f"{where} has shape {values.shape}; the teacher declares {self.shape}")
        if values.dtype != np.dtype(self.dtype):
            raise TeacherOutputError(f"{where} has dtype {values.dtype}; the teacher declares {self.dtype}")
        if self.dtype in ("bool", "uint8"):
            return
        valid = values[self.valid_frames()]
        if self.may_be_invalid and valid.size:
            valid = valid[~np.isnan(valid)]
            if not valid.size:
                raise TeacherOutputError(f"{where} holds nothing but NaN")
        low, high = (valid.min(), valid.max()) if valid.size else (np.float32(0), np.float32(1))
        if not (np.isfinite(low) and np.isfinite(high)):
            share = 1 - np.isfinite(valid.astype(np.float32)).mean()
            raise TeacherOutputError(f"{where} is not finite in {share:.2%} of its values; try ?dtype=float32")
        if self.invalid_frames != "none" and not np.isnan(values[0 if self.invalid_frames == "first" else -1]).all():
            raise TeacherOutputError(f"{where} has values in its {self.invalid_frames} frame, declared invalid")
        if self.quantity in _POSITIVE and low <= 0:
            raise TeacherOutputError(f"{where} reaches {low}; a depth must be positive")
        if self.quantity not in _MAY_BE_CONSTANT and valid.size > 1 and low == high:
            raise TeacherOutputError(f"{where} is {low} everywhere; a real prediction is never constant")


@dataclass(frozen=True, kw_only=True)
class FrameBatch:
    """Frames on their way to a teacher.

    Attributes:
        clip_ids: one id per clip; it travels with the arrays.
        frames_bthwc: uint8 RGB, (b, t, h, w, 3).
        time_seconds_bt: float64 presentation times, (b, t).
    """

    clip_ids: tuple[str, ...]
    frames_bthwc: NDArray[np.uint8]
    time_seconds_bt: NDArray[np.float64]

    def __post_init__(self) -> None:
        shape = self.frames_bthwc.shape
        if len(shape) != 5 or shape[0] != len(self.clip_ids) or shape[4] != 3 or self.frames_bthwc.dtype != np.uint8:
            raise ValueError(
                f"frames {shape} {self.frames_bthwc.dtype} are not uint8 (b, t, h, w, 3) of {self.clip_ids}"
            )
        if self.time_seconds_bt.shape != shape[:2] or self.time_seconds_bt.dtype != np.float64:
            raise ValueError(f"times {self.time_seconds_bt.shape} {self.time_seconds_bt.dtype} do not fit {shape[:2]}")

    def __repr__(self) -> str:
        return f"FrameBatch(clip_ids={self.clip_ids}, frames_bthwc={self.frames_bthwc.shape})"

    def select(self, index: int) -> Self:
        """The same batch cut to one clip."""
        cut = slice(index, index + 1)
        return type(self)(
            clip_ids=self.clip_ids[cut],
            frames_bthwc=self.frames_bthwc[cut],
            time_seconds_bt=self.time_seconds_bt[cut],
        )


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What a teacher returns for a batch: per target name an array (b, *spec.shape), with the clips' ids."""

    clip_ids: tuple[str, ...]
    arrays: Mapping[str, NDArray[np.generic]]

    def __repr__(self) -> str:
        return f"Predictions({self.clip_ids}, { {name: array.shape for name, array in self.arrays.items()} })"


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one worker of a teacher occupies, and how many clips it takes at once.

    Attributes:
        batch_size: clips per `predict`; raising it fills a GPU and costs memory.
        num_gpus: share of a GPU; 0 runs on the CPU. None takes a whole GPU where there is one, else the CPU.
        num_cpus: Ray CPUs one worker reserves.
    """

    batch_size: int = 1
    num_gpus: float | None = None
    num_cpus: float = 1.0

    def __post_init__(self) -> None:
        if self.batch_size < 1 or (self.num_gpus or 0) < 0 or self.num_cpus < 0:
            raise RequestError(f"batch_size must be at least 1, num_gpus and num_cpus at least 0, not {self}")

    def on(self, num_gpus: float) -> Self:
        """The same with the GPU share decided, on a machine or cluster with so many GPUs."""
        return self if self.num_gpus is not None else replace(self, num_gpus=1.0 if num_gpus >= 1 else 0.0)


@dataclass(frozen=True, kw_only=True)
class TeacherInfo:
    """What `p4dprep teachers list` shows of a kind of teacher.

    Attributes:
        summary: one line.
        licence: SPDX name or a short sentence, of the weights above all.
        argument: what stands after the colon in `--teacher kind:argument`, e.g. `ORG/NAME[@REV] or FOLDER`; empty
            if there is none.
        downloads: what it would fetch and from where; `nothing` if nothing.
        options: option name to explanation, for `kind:argument?option=value`.
    """

    summary: str
    licence: str
    argument: str
    downloads: str
    options: Mapping[str, str] = field(default_factory=dict)


class Teacher(ABC):
    """A frozen expert. A subclass is registered under the entry-point group `p4dprep.teachers`.

    The driver builds one with `from_spec` to ask for its targets and its fingerprint; each worker builds its own and
    calls `setup` once, `predict` many times, `close` once. Between `from_spec` and `setup` no weights may be loaded.
    """

    info: TeacherInfo
    resources: Resources = Resources()

    @classmethod
    @abstractmethod
    def from_spec(cls, argument: str, options: Mapping[str, str]) -> Self:
        """Build from `--teacher kind:argument?key=value&key=value`.

        Raises:
            RequestError: a missing or unknown argument or option, with the ones that exist.
        """

    @abstractmethod
    def resolved_spec(self) -> tuple[str, dict[str, str]]:
        """Argument and options that name the very same weights again: a hub revision as a commit hash, say."""

    def frame_size(self, frames: FrameGeometry) -> tuple[int, int]:
        """Height and width of the frames that `predict` wants, where they are not those of the cache."""
        return frames.height, frames.width

    @abstractmethod
    def targets(self, frames: FrameGeometry) -> tuple[TargetSpec, ...]:
        """The targets it makes of clips of this geometry.

        Raises:
            RequestError: it cannot take such frames.
        """

    @abstractmethod
    def fingerprint(self) -> dict[str, str]:
        """Flat fields that determine the output: weights digest, revision, processor, dtype, code version, ..."""

    @abstractmethod
    def setup(self, device: str) -> None:
        """Load weights onto `cpu` or `cuda:0`.

        Raises:
            TeacherError: the weights are missing, damaged or of another architecture.
        """

    @abstractmethod
    def predict(self, batch: FrameBatch) -> Predictions:
        """Run on a batch. Row i of each array belongs to `batch.clip_ids[i]`."""

    def export_heads(self, folder: Path) -> tuple[str, ...]:  # noqa: ARG002
        """Write the frozen heads a student needs, each as `folder/<name>/{config.json,model.safetensors}`.

        Returns:
            Their names; none by default. Called before or after `setup`.
        """
        return ()

    def close(self) -> None:  # noqa: B027
        """Let go of weights and memory."""


def check_predictions(predictions: Predictions, batch: FrameBatch, specs: tuple[TargetSpec, ...]) -> None:
    """Refuse predictions that belong to other clips or miss a target; rows are checked by `TargetSpec.check`.

    Raises:
        TeacherOutputError: ids differ from the batch's, a target is missing or undeclared, or rows do not fit.
    """
    if predictions.clip_ids != batch.clip_ids:
        raise TeacherOutputError(f"predictions are of clips {predictions.clip_ids}, the batch of {batch.clip_ids}")
    names = {spec.name for spec in specs}
    if set(predictions.arrays) != names:
        raise TeacherOutputError(f"the teacher returned {sorted(predictions.arrays)}; it declares {sorted(names)}")
    for name, array in predictions.arrays.items():
        if len(array) != len(batch.clip_ids):
            raise TeacherOutputError(f"target {name} has {len(array)} rows for {len(batch.clip_ids)} clips")
