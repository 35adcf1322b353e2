"""The student's own vision features as a target: its frozen tower runs once over a corpus, and never in training.

`p4dprep extract ... --teacher student:MODEL` keeps what the projector of MODEL gets, before TPE is added; `features:
student_features` of a training run then reads it in place of frames.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from p4dprep.cache import Cache
from p4dprep.errors import FingerprintMismatchError, RequestError, TeacherError
from p4dprep.registry import take_options
from p4dprep.targets import DType, FrameBatch, FrameGeometry, Predictions, TargetSpec, Teacher, TeacherInfo

if TYPE_CHECKING:
    from student.backbones import Backbone, FamilyAdapter
    from student.targets import CachedTarget

_CODE_VERSION = "1"
"""Raised whenever the same weights would give other features."""

_DTYPES: Mapping[str, DType] = {"float16": "float16", "float32": "float32"}
_WEIGHTS = ("model.safetensors", "model-*.safetensors")
_VISION_SETTINGS = ("vision_feature_layer", "vision_feature_select_strategy", "downsample_ratio")
"""What a config says of the vision tower outside its own part."""


class StudentTeacher(Teacher):
    """A student's vision tower. It computes in float32; `dtype` says what is kept, every bit of it."""

    info = TeacherInfo(
        summary="a student's own vision features, so that training runs its projector and LLM only",
        licence="the student's own (see its model card)",
        argument="ORG/NAME[@REV] or FOLDER",
        downloads="settings and safetensors of that repository from the Hugging Face hub; a FOLDER: nothing",
        options={"dtype": "float16 (default) or float32: what is kept; the tower computes in float32"},
    )

    def __init__(self, argument: str, options: Mapping[str, str]) -> None:
        self._argument, self._dtype = argument, _DTYPES[options["dtype"]]
        self._student: Backbone | None = None
        self._device = "cpu"

    @classmethod
    def from_spec(cls, argument: str, options: Mapping[str, str]) -> Self:
        """Build from `student:ORG/NAME[@REV]` or `student:FOLDER`, with options."""
        if not argument:
            raise RequestError("teacher 'student' needs a student: student:ORG/NAME[@REV] or student:FOLDER")
        return cls(argument, take_options("student", options, {"dtype": tuple(_DTYPES)}))

    @cached_property
    def adapter(self) -> "FamilyAdapter":
        """What the student's family says of itself; weights are downloaded with it, but not loaded."""
        from student.backbones import load_adapter
        from student.backbones.loading import student_folder

        name, at, revision = self._argument.partition("@")
        if Path(self._argument).expanduser().is_dir() or not at:
            return load_adapter(student_folder(self._argument))
        return load_adapter(student_folder(name, revision))

    def resolved_spec(self) -> tuple[str, dict[str, str]]:
        """The commit hash or absolute folder, and the dtype."""
        folder = self.adapter.folder
        is_local = Path(self._argument).expanduser().is_dir()
        name = str(folder) if is_local else f"{self._argument.partition('@')[0]}@{folder.name}"
        return name, {"dtype": self._dtype}

    def targets(self, frames: FrameGeometry) -> tuple[TargetSpec, ...]:
        """One target, `features`: what the projector gets of a clip, in the axes of its family."""
        sizes = self.adapter.feature_shape(frames.num_frames, frames.height, frames.width)
        spec = TargetSpec(
            name="features",
            dims=tuple(sizes),
            shape=tuple(sizes.values()),
            dtype=self._dtype,
            units="1",
            quantity="vision features",
            description=f"What the projector of this {self.adapter.model_type} model gets, before TPE",
        )
        return (spec,)

    def fingerprint(self) -> dict[str, str]:
        """What says whether a student is this one, dtype, library and code versions."""
        versions = {package: version(package).partition("+")[0] for package in ("torch", "transformers")}
        return tower_identity(self.adapter) | {"dtype": self._dtype, "code": _CODE_VERSION} | versions

    def setup(self, device: str) -> None:
        """Load the vision tower, the projector, and as little of the LLM as can be."""
        import torch

        from student.backbones import load

        student = load(self.adapter.folder, dtype=torch.float32, tower_only=True)
        student.model.requires_grad_(False).to(device)
        self._student, self._device = student, device

    def predict(self, batch: FrameBatch) -> Predictions:
        """Features of all clips at once. Rows depend on the batch by float rounding only."""
        from student.backbones import StudentSample
        from student.backbones.cached import vision_features

        if self._student is None:
            raise TeacherError("student: predict was called before setup or after close")
        clips = zip(batch.clip_ids, batch.frames_bthwc, batch.time_seconds_bt, strict=True)
        samples = [StudentSample(id=name, frames_thwc=frames, time_seconds=times) for name, frames, times in clips]
        encoded = self._student.adapter.encode(samples, tpe=False).to(self._device)
        features = vision_features(self._student, encoded).cpu().numpy()
        with np.errstate(over="ignore"):  # an infinity is refused, with the way out, when it is written
            return Predictions(clip_ids=batch.clip_ids, arrays={"features": features.astype(self._dtype)})

    def close(self) -> None:
        """Let go of the weights."""
        self._student = None


def check_features(cache: Cache, array: str, student: "Backbone") -> None:
    """Refuse cached features that this student's vision tower would not make of the cache's frames.

    Whether the tower learns is not asked here: `Backbone.forward` refuses features then.

    Args:
        cache: that holds them.
        array: `<group>_<target>`.
        student: its folder is read, not its weights in memory.

    Raises:
        RequestError: no such array or no vision features, or a family that cannot use any.
        FingerprintMismatchError: another tower, other settings or another processor made them.
    """
    target = vision_target(cache, array)
    recorded, ours = cache.group(target.group).fingerprint, tower_identity(student.adapter)
    differing = [name for name, value in ours.items() if recorded.get(f"teacher.{name}") != value]
    sampling = cache.sampling
    sizes = student.adapter.feature_shape(sampling.num_frames, sampling.height, sampling.width)
    if differing or target.spec.shape != tuple(sizes.values()):
        raise FingerprintMismatchError(
            f"{array} of {cache.store.url} are features of another student than {student.adapter.folder}: "
            f"{', '.join(differing) or 'shape'} differ; extract this one's with --teacher student:MODEL"
        )


def vision_target(cache: Cache, array: str) -> "CachedTarget":
    """The student's own vision features in a cache.

    Raises:
        RequestError: the cache has no such array, or it holds something else.
    """
    from student.targets import cached_targets

    known = cached_targets(cache)
    if array not in known or known[array].spec.quantity != "vision features":
        found = [name for name, target in known.items() if target.spec.quantity == "vision features"]
        raise RequestError(
            f"{cache.store.url} has no vision features {array!r}; it has {', '.join(found) or 'none'}; "
            "p4dprep extract --teacher student:MODEL makes them"
        )
    return known[array]


def refuse_marks(conversations: pa.Table, rows: NDArray[np.int64]) -> None:
    """Refuse conversations over cached features whose regions would be drawn on the first frame.

    Args:
        conversations: columns id and regions.
        rows: those that show a video.

    Raises:
        RequestError: one of them has regions.
    """
    marked = rows[pc.list_value_length(conversations.column("regions")).to_numpy()[rows] > 0]
    if len(marked):
        raise RequestError(
            f"{len(marked)} conversations, such as {conversations.column('id')[int(marked[0])].as_py()}, have regions "
            "to mark on frames, and cached features stand for unmarked ones; set regions to boxes, or train on frames"
        )


def tower_identity(adapter: "FamilyAdapter") -> dict[str, str]:
    """What a student's vision features depend on: family, weights and settings of the tower, video processor.

    Projector and LLM may have been trained in between, so a student and its fine-tuned export agree.

    Raises:
        RequestError: the folder holds no weights of the tower.
    """
    from transformers import PreTrainedConfig

    vision = {name: getattr(adapter.config, name) for name in _VISION_SETTINGS if hasattr(adapter.config, name)}
    common = PreTrainedConfig().to_dict()  # what every config holds says nothing of a tower
    vision |= {name: value for name, value in adapter.config.vision_config.to_dict().items() if name not in common}
    return {
        "model_type": adapter.model_type,
        "tower_sha256": _tower_digest(adapter),
        "tower": json.dumps(vision, sort_keys=True, default=str),
        "video_processor": json.dumps(adapter.processor.video_processor.to_dict(), sort_keys=True, default=str),
    }


def _tower_digest(adapter: "FamilyAdapter") -> str:
    """SHA-256, hex, over the tower's weights as float32, whatever their names in the file and its dtype."""
    digests = sorted(set(_tensor_digests(adapter)))
    if not digests:
        raise RequestError(f"{adapter.folder} holds no weights of {adapter.vision_tower} in {' or '.join(_WEIGHTS)}")
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _tensor_digests(adapter: "FamilyAdapter") -> Iterator[str]:
    from safetensors import safe_open

    for path in sorted(path for pattern in _WEIGHTS for path in adapter.folder.glob(pattern)):
        with safe_open(path, "pt") as weights:
            for name in filter(lambda name: _is_in_tower(adapter, name), weights.keys()):
                tensor = weights.get_tensor(name)
                if tensor.is_floating_point():
                    values = tensor.float().contiguous().numpy()
                    yield hashlib.sha256(f"{values.shape}".encode() + values.tobytes()).hexdigest()


def _is_in_tower(adapter: "FamilyAdapter", name: str) -> bool:
    """Whether a tensor of a checkpoint belongs to the tower. Files may lack the first parts of the model's names."""
    tower = adapter.vision_tower
    _, found, inside = f".{name}".partition(f".{tower.rpartition('.')[2]}.")
    projector = tuple(prefix.removeprefix(f"{tower}.") for prefix in adapter.projector_parameters)
    return bool(found) and not inside.startswith(projector)
