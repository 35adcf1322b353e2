"""Depth Anything V2 (Yang et al., NeurIPS 2024, arXiv 2406.09414), relative and metric, as transformers has it.

Shape suffixes: `b` batch, `t` frames, `h w` pixels, `c` channels.
"""

import logging
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p4dprep.errors import TeacherError
from p4dprep.targets import FrameBatch, FrameGeometry, Predictions, TargetSpec, TeacherInfo
from teachers._hub import HubTeacher, load_pretrained

FRAMES_PER_FORWARD = 8
"""Frames of a clip that go through the model at once; raising it costs memory and fills a GPU better."""

_LOG = logging.getLogger(__name__)


class DepthAnythingTeacher(HubTeacher):
    """Depth frame by frame: metres if the model is metric, else disparity up to an affine map per frame.

    The frames go through the model's own processor; the map comes back to the frames' size by bicubic interpolation,
    as the processor's `post_process_depth_estimation` does, kept within the range the model gave that frame, since
    bicubic interpolation overshoots at edges and a depth must stay positive.
    """

    kind = "depth-anything"
    model_type = "depth_anything"
    code_version = "1"
    processor_files = ("preprocessor_config.json", "processor_config.json")
    choices = {"dtype": ("float32", "float16", "bfloat16")}  # noqa: RUF012
    info = TeacherInfo(
        summary="Depth Anything V2: metric depth (m) or relative disparity (larger is nearer), frame by frame",
        licence="Small: Apache-2.0; Base and Large: CC-BY-NC-4.0 (see the model card)",
        argument="ORG/NAME[@REV] or FOLDER",
        downloads="config, processor and safetensors of that repository from the Hugging Face hub; a FOLDER: nothing",
        options={
            "dtype": "float32 (default), float16 or bfloat16 arithmetic; a batch that fails in half runs in float32"
        },
    )

    @property
    def _is_metric(self) -> bool:
        kind = self.config.get("depth_estimation_type", "relative")
        if kind not in ("relative", "metric"):
            raise TeacherError(f"{self.weights.argument}: unknown depth_estimation_type {kind!r}")
        return bool(kind == "metric")

    def targets(self, frames: FrameGeometry) -> tuple[TargetSpec, ...]:
        """One target, `depth`, (t, y, x) float32: metric depth in m, or relative disparity without unit."""
        metric = self._is_metric
        spec = TargetSpec(
            name="depth",
            dims=("t", "y", "x"),
            shape=(frames.num_frames, frames.height, frames.width),
            dtype="float32",
            units="m" if metric else "1",
            quantity="metric depth" if metric else "relative disparity",
            transforms=("flip_x",),
            description=f"Depth in metres, at most {self.config.get('max_depth') or 1:g}"
            if metric
            else "Inverse depth up to scale and shift per frame; larger is nearer, 0 is farthest",
        )
        return (spec,)

    def setup(self, device: str) -> None:
        """Load the model and its processor."""
        from transformers import DepthAnythingForDepthEstimation, DPTImageProcessor

        # A config that names a backbone, or another kind of one, could make transformers fetch it.
        backbone = self.config.get("backbone_config")
        if self.config.get("backbone") or not isinstance(backbone, dict) or backbone.get("model_type") != "dinov2":
            raise TeacherError(f"{self.weights.argument}: config.json must hold a dinov2 backbone_config, and no name")
        self._device = device
        self._processor: Any = DPTImageProcessor.from_pretrained(self.weights.folder, local_files_only=True)
        self._loaded = load_pretrained(
            DepthAnythingForDepthEstimation,
            self.weights.folder,
            device,
            attention={"": "eager", "backbone_config": "sdpa"},  # the attention layers are the backbone's
        )

    def predict(self, batch: FrameBatch) -> Predictions:
        """Depth of every frame. Rows do not depend on the batch beyond float rounding (measured below 1e-5)."""
        rows = [self._clip_depth(frames_thwc) for frames_thwc in batch.frames_bthwc]
        return Predictions(clip_ids=batch.clip_ids, arrays={"depth": np.stack(rows)})

    def _clip_depth(self, frames_thwc: NDArray[np.uint8]) -> NDArray[np.float32]:
        starts = range(0, len(frames_thwc), FRAMES_PER_FORWARD)
        return np.concatenate([self._depth(frames_thwc[n : n + FRAMES_PER_FORWARD]) for n in starts])

    def _depth(self, frames_thwc: NDArray[np.uint8]) -> NDArray[np.float32]:
        import torch

        model, dtype = self._model, self._options["dtype"]
        with torch.inference_mode():
            frames_tchw = torch.from_numpy(np.ascontiguousarray(frames_thwc)).permute(0, 3, 1, 2).to(self._device)
            pixels_tchw = self._processor(images=list(frames_tchw), return_tensors="pt")["pixel_values"]
            depth_thw = self._forward(model, pixels_tchw, dtype)
            if dtype != "float32" and not self._is_usable(depth_thw):
                _LOG.warning("depth-anything gave unusable depth in %s; these frames run again in float32", dtype)
                depth_thw = self._forward(model, pixels_tchw, "float32")
            resized = _resize(depth_thw, frames_thwc.shape[1], frames_thwc.shape[2])
            return np.asarray(resized.cpu().numpy(), np.float32)

    def _forward(self, model: Any, pixels_tchw: Any, dtype: str) -> Any:
        import torch

        with torch.autocast(pixels_tchw.device.type, getattr(torch, dtype), enabled=dtype != "float32"):
            return model(pixel_values=pixels_tchw).predicted_depth.float()

    def _is_usable(self, depth_thw: Any) -> bool:
        low, high = float(depth_thw.min()), float(depth_thw.max())
        return math.isfinite(low) and math.isfinite(high) and low < high and (low > 0 or not self._is_metric)


def _resize(depth_thw: Any, height: int, width: int) -> Any:
    from torch.nn.functional import interpolate

    lowest, highest = depth_thw.amin((1, 2), keepdim=True), depth_thw.amax((1, 2), keepdim=True)
    resized = interpolate(depth_thw[:, None], size=(height, width), mode="bicubic", align_corners=False)[:, 0]
    return resized.clamp(lowest, highest)
