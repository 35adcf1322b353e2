"""Any two-frame optical flow model of ptlflow (Morimitsu, https://github.com/hmorimitsu/ptlflow), by name.

Shape suffixes: `t` frames, `h w` pixels, `c` channels, `2` the (u, v) of a flow, `p` frame pairs.
"""

import contextlib
import difflib
import os
import pickle
import re
import sys
import warnings
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from p4dprep.errors import RequestError, TeacherError, TeacherOutputError
from p4dprep.registry import take_options
from p4dprep.storage import one_line
from p4dprep.targets import FrameBatch, FrameGeometry, Predictions, TargetSpec, Teacher, TeacherInfo
from teachers._flow import DIRECTIONS, Direction, as_direction, flow_target, frame_pairs
from teachers._hub import file_digest, library_version

CODE_VERSION = "1"
PAIRS_PER_FORWARD = 4
"""Frame pairs of a clip that go through the model at once; raising it costs memory and fills a GPU better."""

PREFERRED_CHECKPOINTS = ("sintel", "things", "mixed", "mix")
"""Published checkpoints in the order they are chosen from when none is named: those for general scenes first."""

_ARGUMENT = re.compile(r"(?P<model>[a-z][a-z0-9_]*)(?:@(?P<checkpoint>.+))?")
_HASH_IN_NAME = re.compile(r"-([a-f0-9]{8,})\.")


def import_ptlflow() -> Any:
    """The package `ptlflow`, imported on first use (it takes 10 to 20 s), with its known noise kept away.

    Raises:
        TeacherError: it cannot be imported.
    """
    try:
        # Its models print to stdout what is optional, and stdout is for data.
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.filterwarnings("ignore", message="Importing from timm.models.layers", category=FutureWarning)
            warnings.filterwarnings("ignore", message="invalid escape sequence", category=DeprecationWarning)
            import ptlflow
    except Exception as error:  # it imports 60 models, each with needs of its own
        raise TeacherError(f"ptlflow cannot be imported: {one_line(error)}") from error
    return ptlflow


class PTLFlowTeacher(Teacher):
    """Optical flow in pixels of the clip's frames; the model pads them to its own stride and cuts the flow again."""

    info = TeacherInfo(
        summary="Any two-frame optical flow model of ptlflow (RAFT, SEA-RAFT, DPFlow, ...)",
        licence="code Apache-2.0; weights by model (see ptlflow's model list)",
        argument="MODEL[@CHECKPOINT or @FILE]",
        downloads="the published checkpoint from github.com/hmorimitsu/ptlflow, through torch.hub; a FILE: nothing",
        options={"direction": "backward (default, frame n to n-1) or forward"},
    )

    def __init__(self, model: str, checkpoint: str, direction: Direction) -> None:
        self._name = model
        self._checkpoint = checkpoint
        self._direction: Direction = direction
        self._model: Any = None
        self._device = "cpu"

    @classmethod
    def from_spec(cls, argument: str, options: Mapping[str, str]) -> Self:
        """Build from `ptlflow:MODEL[@CHECKPOINT]`; the model's name is checked when ptlflow is first needed."""
        match = _ARGUMENT.fullmatch(argument)
        if match is None:
            raise RequestError(
                f"teacher 'ptlflow' needs MODEL[@CHECKPOINT], such as ptlflow:raft_small or "
                f"ptlflow:sea_raft_s@kitti or ptlflow:raft_small@FILE.ckpt, not {argument!r}"
            )
        taken = take_options("ptlflow", options, {"direction": DIRECTIONS})
        return cls(match["model"], match["checkpoint"] or "", as_direction(taken["direction"]))

    @cached_property
    def _local_file(self) -> Path | None:
        """The checkpoint as a file of the user's: whatever exists, or looks like a path."""
        path = Path(self._checkpoint).expanduser()
        if not self._checkpoint or not (path.is_file() or "/" in self._checkpoint or path.suffix):
            return None
        if not path.is_file():
            raise TeacherError(f"ptlflow:{self._name}: there is no checkpoint file {path}")
        return path.resolve()

    @cached_property
    def _published(self) -> tuple[str, str]:
        """Name and URL of the published checkpoint."""
        urls: dict[str, str] = getattr(self._model_class(), "pretrained_checkpoints", None) or {}
        if not urls:
            raise RequestError(f"ptlflow publishes no checkpoint for {self._name!r}; name a FILE: {self._name}@FILE")
        name = self._checkpoint or next((name for name in PREFERRED_CHECKPOINTS if name in urls), next(iter(urls)))
        if name not in urls:
            raise RequestError(f"ptlflow model {self._name!r} has no checkpoint {name!r}; it has: {', '.join(urls)}")
        return name, urls[name]

    def _model_class(self) -> Any:
        ptlflow = import_ptlflow()
        names = ptlflow.get_model_names()
        if self._name not in names:
            near = difflib.get_close_matches(self._name, names, n=3)
            raise RequestError(f"ptlflow has no model {self._name!r}; near: {', '.join(near) or 'none'}, of {names}")
        return ptlflow.get_model_reference(self._name)

    @cached_property
    def _weights_file(self) -> Path:
        return self._local_file or _download(self._published[1])

    def resolved_spec(self) -> tuple[str, dict[str, str]]:
        """The model with its checkpoint's name or absolute file, and the direction."""
        checkpoint = str(self._local_file) if self._local_file else self._published[0]
        return f"{self._name}@{checkpoint}", {"direction": self._direction}

    def targets(self, frames: FrameGeometry) -> tuple[TargetSpec, ...]:
        """One target, `flow`."""
        return (flow_target(frames, self._direction),)

    def fingerprint(self) -> dict[str, str]:
        """Model, checkpoint and its digest, direction, library and code versions."""
        return {
            "model": self._name,
            "weights": "local file" if self._local_file else self._published[0],
            "weights_sha256": file_digest(self._weights_file),
            "direction": self._direction,
            "dtype": "float32",
            "torch": library_version("torch"),
            "ptlflow": library_version("ptlflow"),
            "code": CODE_VERSION,
        }

    def setup(self, device: str) -> None:
        """Build the model and load every weight of the checkpoint."""
        model_class = self._model_class()
        weights = load_checkpoint(self._weights_file)
        where = f"cannot load {self._weights_file} as ptlflow's {self._name}"
        try:
            model = model_class()
            known = model.state_dict().keys()
            odd = [f"lacks {name}" for name in known - weights.keys()]
            odd += [f"has {name}, unknown to it" for name in weights.keys() - known]
            if odd:
                raise TeacherError(f"{where}: {len(odd)} weights do not fit; the file {min(odd)}")
            model.load_state_dict(weights, strict=True)
            self._model = model.eval().requires_grad_(False).to(device)
        except TeacherError:
            raise
        except Exception as error:  # each of 60 models fails in its own way
            raise TeacherError(f"{where}: {one_line(error)}") from error
        self._device = device

    def predict(self, batch: FrameBatch) -> Predictions:
        """Flow of each clip on its own. Rows do not depend on the other clips of the batch."""
        if self._model is None:
            raise TeacherError("ptlflow: predict was called before setup or after close")
        flows = np.stack([self._clip_flow(frames_thwc) for frames_thwc in batch.frames_bthwc])
        return Predictions(clip_ids=batch.clip_ids, arrays={"flow": flows})

    def _clip_flow(self, frames_thwc: NDArray[np.uint8]) -> NDArray[np.float32]:
        flow_thw2 = np.full((*frames_thwc.shape[:3], 2), np.nan, np.float32)
        pairs = frame_pairs(len(frames_thwc), self._direction)
        for first in range(0, len(pairs), PAIRS_PER_FORWARD):
            chosen = np.array(pairs[first : first + PAIRS_PER_FORWARD])
            flow_thw2[chosen[:, 0]] = self._pair_flow(frames_thwc[chosen])
        return flow_thw2

    def _pair_flow(self, pairs_p2hwc: NDArray[np.uint8]) -> NDArray[np.float32]:
        import torch

        # ptlflow's models take BGR in 0 to 1, (pair, 2, 3, h, w), whatever their own normalisation and padding.
        bgr = torch.from_numpy(np.ascontiguousarray(pairs_p2hwc[..., ::-1])).to(self._device)
        with torch.inference_mode():
            flow = self._model({"images": bgr.permute(0, 1, 4, 2, 3).float() / 255})["flows"]
        num_pairs, _, height, width, _ = pairs_p2hwc.shape
        if tuple(flow.shape) != (num_pairs, 1, 2, height, width):
            raise TeacherOutputError(
                f"ptlflow's {self._name} returned flow {tuple(flow.shape)} for {num_pairs} pairs of "
                f"{height} x {width}; only models of two frames are supported"
            )
        return np.asarray(flow[:, 0].permute(0, 2, 3, 1).float().cpu().numpy(), np.float32)

    def close(self) -> None:
        """Let go of the weights."""
        self._model = None


def _download(url: str) -> Path:
    """A published checkpoint in torch.hub's cache, its name's digest checked while it is fetched."""
    from torch import hub

    path = Path(hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if path.is_file():
        return path
    digest = _HASH_IN_NAME.search(path.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        hub.download_url_to_file(url, os.fspath(path), digest[1] if digest else None, progress=False)
    except (OSError, RuntimeError) as error:
        raise TeacherError(
            f"cannot fetch {url}: {one_line(error)}; download it yourself and name the file: MODEL@FILE"
        ) from None
    return path


def load_checkpoint(path: Path) -> Mapping[str, Any]:
    """The weights of a checkpoint in ptlflow's own format, or of a safetensors file; nothing in it can execute.

    Args:
        path: `*.safetensors`, or what torch.save wrote: a dict with `state_dict`.

    Raises:
        TeacherError: it holds other objects than tensors and plain values, is damaged, or has no `state_dict`.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        with warnings.catch_warnings():  # what it warns of is a pickle that it then refuses or reads whole
            warnings.filterwarnings("ignore", message="Detected pickle protocol", category=UserWarning)
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise TeacherError(f"refused {path}: it holds more than tensors and plain values, {one_line(error)}") from None
    except (OSError, RuntimeError, EOFError, ValueError, SafetensorError) as error:
        raise TeacherError(f"cannot read checkpoint {path}: {one_line(error)}") from None
    weights = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(weights, dict):
        raise TeacherError(f"{path} is no ptlflow checkpoint: it has no `state_dict`")
    return weights
