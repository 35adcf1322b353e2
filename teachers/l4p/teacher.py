"""L4P as a teacher: `l4p:mini`, which ships with the package, or what `import-l4p` or `save_pretrained` wrote."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from p4dprep.errors import RequestError, TeacherError
from p4dprep.registry import take_options
from p4dprep.targets import (
    FrameBatch,
    FrameGeometry,
    Predictions,
    Resources,
    TargetSpec,
    Teacher,
    TeacherInfo,
    Transform,
)
from teachers._hub import ResolvedWeights, library_version, resolve_folder, weights_digest
from teachers.l4p.config import CONFIG_FILE, MINI_FOLDER, MODALITIES, WEIGHTS_FILE, L4PConfig, Modality

if TYPE_CHECKING:  # torch is imported where it is used: listing the teachers need not wait for it
    from torch import Tensor

    from p4dprep.heads import DPTHead
    from teachers.l4p.model import L4P, L4POutput

_DTYPES = ("float32", "bfloat16", "float16")
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_FLIP: tuple[Transform, ...] = ("flip_x",)

_MINI_WIDTH = 384
"""Widest model that takes 16 clips at once where nobody says how many. On a CPU torch takes six times as long for the
small convolutions of a single clip."""

CODE_VERSION = "1"
"""Raised whenever the same weights and frames would give other numbers."""


class L4PTeacher(Teacher):
    """Latents of four layers, metric depth, backward flow, motion logits and camera rays."""

    info = TeacherInfo(
        summary="L4P, the paper's teacher: latents, depth, backward flow, motion and camera rays of 16-frame windows",
        licence="mini: Apache-2.0; others have their own (the original's: non-commercial research, from the user)",
        argument="mini, FOLDER or ORG/NAME[@REV]",
        downloads="nothing for mini or a folder; config and safetensors for a hub id",
        options={"dtype": "float32 (default), bfloat16 or float16: what the weights are run in"},
    )

    def __init__(self, weights: ResolvedWeights, dtype: str) -> None:
        self._weights = weights
        self._dtype = dtype
        self._config = L4PConfig.load(weights.folder)
        self._model: L4P | None = None
        if self._config.hidden_size <= _MINI_WIDTH:
            self.resources = Resources(batch_size=16)

    @classmethod
    def from_spec(cls, argument: str, options: Mapping[str, str]) -> Self:
        """Build from `l4p:mini?dtype=...`; reads the config, no weights. A folder called mini is `l4p:./mini`."""
        dtype = take_options("l4p", options, {"dtype": _DTYPES})["dtype"]
        if argument == MINI_FOLDER.name:
            return cls(ResolvedWeights(folder=MINI_FOLDER, shipped=argument), dtype)
        return cls(resolve_folder(argument), dtype)

    def resolved_spec(self) -> tuple[str, dict[str, str]]:
        """The folder, or the hub id at its commit, with the dtype."""
        return self._weights.argument, {"dtype": self._dtype}

    def targets(self, frames: FrameGeometry) -> tuple[TargetSpec, ...]:
        """Latents and four maps.

        The flip of a target is the target of the flipped frames up to the teacher's own left-right error, which is what
        students are trained to accept; camera rays would need more than a flip.
        """
        size = self._config.image_size
        if (frames.height, frames.width) != (size, size):
            raise RequestError(
                f"this L4P takes frames squashed to {size} x {size}, not frames of {frames.height} x {frames.width}; "
                f"use --size {size}"
            )
        from teachers.l4p.windows import window_starts

        window_starts(frames.num_frames, self._config.num_frames)
        return self._latents_spec(frames.num_frames), *_map_specs(frames), self._camray_spec(frames.num_frames)

    def _latents_spec(self, num_frames: int) -> TargetSpec:
        config = self._config
        _, rows, columns = config.token_grid
        return TargetSpec(
            name="latents",
            dims=("tap", "tube", "token_y", "token_x", "channel"),
            shape=(len(config.taps), num_frames // config.tubelet_size, rows, columns, config.hidden_size),
            dtype=self._latents_dtype,
            units="1",
            quantity="latents",
            transforms=_FLIP,
            description=f"outputs of encoder blocks {', '.join(map(str, config.taps))}",
        )

    def _camray_spec(self, num_frames: int) -> TargetSpec:
        return TargetSpec(
            name="camray",
            dims=("t", "ray_y", "ray_x", "pluecker"),
            shape=(num_frames, *self._config.camray_grid[1:], 6),
            dtype="float32",
            units="1",
            quantity="plücker rays",
            description="direction and moment of each ray, relative to the clip's first camera",
        )

    @property
    def _latents_dtype(self) -> Literal["float16", "float32"]:
        return "float16" if self._dtype == "float16" else "float32"

    def fingerprint(self) -> dict[str, str]:
        """Digest of config and weights, dtype, window rule, and the versions of libraries and code."""
        window = self._config.num_frames
        return {
            "weights": self._weights.origin,
            "weights_sha256": self._digest,
            "dtype": self._dtype,
            "pixels": f"0-1 less {_MEAN}, over {_STD}",
            "windows": f"{window} frames, stride {window // 2}; depth and rays aligned; a later window overwrites",
            "torch": library_version("torch"),
            "transformers": library_version("transformers"),
            "code": CODE_VERSION,
        }

    @cached_property
    def _digest(self) -> str:
        return weights_digest(self._weights.folder, patterns=(CONFIG_FILE, WEIGHTS_FILE))

    def setup(self, device: str) -> None:
        """Load the weights, strictly."""
        import torch

        from teachers.l4p.model import L4P

        model = L4P.from_pretrained(self._weights.folder).requires_grad_(False)
        self._model = model.to(device=device, dtype=getattr(torch, self._dtype))
        self._device = device

    def predict(self, batch: FrameBatch) -> Predictions:
        """Run windows over the batch."""
        import torch

        from teachers.l4p.windows import run_windows

        if self._model is None:
            raise TeacherError("l4p: predict was called before setup or after close")
        with torch.inference_mode():
            pixels = _normalised(torch.from_numpy(batch.frames_bthwc).to(self._device))
            output = run_windows(self._model, pixels, self._config)
            return Predictions(clip_ids=batch.clip_ids, arrays=self._arrays(output))

    def _arrays(self, output: "L4POutput") -> dict[str, NDArray[np.generic]]:
        import torch

        _, rows, columns = self._config.token_grid
        taps = torch.stack(output.taps, dim=1)
        latents = taps.reshape(*taps.shape[:2], -1, rows, columns, taps.shape[-1])
        maps = output.maps
        flow = maps["flow"].movedim(1, -1).contiguous()
        flow[:, 0] = torch.nan
        return {
            "latents": _numpy(latents.to(getattr(torch, self._latents_dtype))),
            "depth": _numpy(maps["depth"][:, 0]),
            "flow": _numpy(flow),
            "motion": _numpy(maps["motion"][:, 0]),
            "camray": _numpy(maps["camray"].movedim(1, -1)),
        }

    def export_heads(self, folder: Path) -> tuple[str, ...]:
        """Write the four heads, in the weights' own dtype, without loading the encoder."""
        from p4dprep import heads

        for modality in MODALITIES:
            heads.save(self._head(modality), folder / modality)
        return MODALITIES

    def _head(self, modality: Modality) -> "DPTHead":
        import torch

        from p4dprep.heads import DPTHead

        path, prefix = self._weights.folder / WEIGHTS_FILE, f"heads.{modality}."
        with torch.device("meta"):
            head = DPTHead(self._config.head(modality))
        try:
            with safe_open(path, framework="pt") as file:
                found = {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
            head.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in found.items()}, assign=True)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise TeacherError(f"the {modality} head in {path} is missing or damaged: {error}") from None
        return head

    def close(self) -> None:
        """Let go of the weights."""
        self._model = None


def _map_specs(frames: FrameGeometry) -> tuple[TargetSpec, ...]:
    dims, shape = ("t", "y", "x"), (frames.num_frames, frames.height, frames.width)
    depth = TargetSpec(
        name="depth",
        dims=dims,
        shape=shape,
        dtype="float32",
        units="m",
        quantity="metric depth",
        transforms=_FLIP,
        description="depth along the optical axis",
    )
    flow = TargetSpec(
        name="flow",
        dims=(*dims, "uv"),
        shape=(*shape, 2),
        dtype="float32",
        units="px",
        quantity="backward flow",
        transforms=_FLIP,
        invalid_frames="first",
        description="from frame n to n-1, in pixels of the sampled frame",
    )
    motion = TargetSpec(
        name="motion",
        dims=dims,
        shape=shape,
        dtype="float32",
        units="1",
        quantity="motion logit",
        transforms=_FLIP,
        description="logit that a pixel moves in 3D, not merely because the camera does",
    )
    return depth, flow, motion


def _normalised(frames_bthwc: "Tensor") -> "Tensor":
    import torch

    mean = torch.tensor(_MEAN, device=frames_bthwc.device)
    std = torch.tensor(_STD, device=frames_bthwc.device)
    return ((frames_bthwc.float() / 255 - mean) / std).movedim(-1, 1)


def _numpy(values: "Tensor") -> NDArray[np.generic]:
    array: NDArray[np.generic] = values.cpu().contiguous().numpy()
    return array
