"""Video encoders whose hidden states are the target: VideoMAE (Tong et al., NeurIPS 2022, arXiv 2203.12602) and
V-JEPA 2 (Assran et al., 2025, arXiv 2506.09985), as transformers has them.

Shape suffixes: `b` batch, `t` frames, `h w` pixels, `c` channels, `k` layers, `n` tokens.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p4dprep.errors import RequestError, TeacherError
from p4dprep.targets import FrameBatch, FrameGeometry, Predictions, TargetSpec, TeacherInfo
from teachers._hub import HubTeacher, load_pretrained

_LAYERS_HELP = "hidden states to keep, such as 3,6,9,12: 0 is the patch embedding, i the output of block i"


@dataclass(frozen=True, kw_only=True)
class TokenGrid:
    """How a model cuts a clip: frames and square side in pixels it takes, and the tubelet and patch of one token."""

    num_frames: int
    side: int
    tubelet: int
    patch: int
    num_layers: int
    width: int


class EncoderTeacher(HubTeacher):
    """Hidden states of a frozen video encoder at chosen layers, in float32.

    Layer 0 is the patch embedding, layer i the raw output of block i: `hidden_states[i]` as transformers gives it,
    the last one too, so without the final LayerNorm.
    """

    code_version = "1"
    processor_files = ("video_preprocessor_config.json", "preprocessor_config.json", "processor_config.json")
    choices = {"layers": ()}  # noqa: RUF012

    @property
    @abstractmethod
    def grid(self) -> TokenGrid:
        """Read from the model's config."""

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers asked for, or four evenly spaced that end with the last.

        Raises:
            RequestError: not ascending numbers of layers the model has.
        """
        last, text = self.grid.num_layers, self._options["layers"]
        if not text:
            return tuple(sorted({max(1, round(last * share / 4)) for share in (1, 2, 3, 4)}))
        try:
            layers = tuple(int(part) for part in text.split(","))
        except ValueError:
            raise RequestError(f"layers={text} is not a list of numbers such as 3,6,9,{last}") from None
        if list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] > last:
            raise RequestError(f"layers={text} must ascend within 0 to {last} for {self.weights.argument}")
        return layers

    def resolved_spec(self) -> tuple[str, dict[str, str]]:
        """The commit hash or absolute folder, and the layers as numbers."""
        return self.weights.argument, {"layers": ",".join(map(str, self.layers))}

    def targets(self, frames: FrameGeometry) -> tuple[TargetSpec, ...]:
        """One target, `latents`, (layer, tube, token_y, token_x, channel) float32."""
        self._check_frames(frames)
        grid = self.grid
        tokens = grid.side // grid.patch
        spec = TargetSpec(
            name="latents",
            dims=("layer", "tube", "token_y", "token_x", "channel"),
            shape=(len(self.layers), frames.num_frames // grid.tubelet, tokens, tokens, grid.width),
            dtype="float32",
            units="1",
            quantity="latents",
            description=f"Hidden states of layers {', '.join(map(str, self.layers))}; "
            f"tube j covers frames {grid.tubelet}j to {grid.tubelet}j+{grid.tubelet - 1}",
        )
        return (spec,)

    def _check_frames(self, frames: FrameGeometry) -> None:
        grid = self.grid
        if (frames.num_frames, frames.height, frames.width) != (grid.num_frames, grid.side, grid.side):
            raise RequestError(
                f"{self.kind} {self.weights.argument} takes {grid.num_frames} frames of {grid.side} x {grid.side}, not "
                f"{frames.num_frames} of {frames.height} x {frames.width}; "
                f"use --frames {grid.num_frames} --size {grid.side}"
            )

    @abstractmethod
    def _hidden_states(self, pixels_btchw: Any) -> Any:
        """All hidden states the model returns, indexed by layer; those not in `layers` may be None."""

    def predict(self, batch: FrameBatch) -> Predictions:
        """Latents of the whole batch at once. Rows depend on the batch by float rounding only (measured below 1e-5)."""
        import torch

        (spec,) = self.targets(_geometry(batch))
        with torch.inference_mode():
            frames_bthwc = torch.from_numpy(np.ascontiguousarray(batch.frames_bthwc)).to(self._device)
            states = self._hidden_states(self._normalise(frames_bthwc))
            latents_bknc = torch.stack([states[layer] for layer in self.layers], dim=1).float()
        latents: NDArray[np.float32] = latents_bknc.cpu().numpy()
        return Predictions(clip_ids=batch.clip_ids, arrays={"latents": latents.reshape(-1, *spec.shape)})

    def _normalise(self, frames_bthwc: Any) -> Any:
        """uint8 (b, t, h, w, c) to float32 (b, t, c, h, w), scaled and shifted as the model's processor would."""
        import torch

        settings = self.processor
        pixels = frames_bthwc.permute(0, 1, 4, 2, 3).float()
        if settings.get("do_rescale", True):
            pixels = pixels * float(settings.get("rescale_factor", 1 / 255))
        if settings.get("do_normalize", True):
            if "image_mean" not in settings or "image_std" not in settings:
                raise TeacherError(f"{self.weights.argument}: the processor's settings lack image_mean or image_std")
            mean = torch.tensor(settings["image_mean"], device=pixels.device).view(3, 1, 1)
            std = torch.tensor(settings["image_std"], device=pixels.device).view(3, 1, 1)
            pixels = (pixels - mean) / std
        return pixels


def _geometry(batch: FrameBatch) -> FrameGeometry:
    _, num_frames, height, width, _ = batch.frames_bthwc.shape
    return FrameGeometry(num_frames=num_frames, height=height, width=width)


class VideoMAETeacher(EncoderTeacher):
    """VideoMAE; its positions are fixed, so it takes exactly the frames and size of its config."""

    kind = "videomae"
    model_type = "videomae"
    info = TeacherInfo(
        summary="VideoMAE encoder: hidden states at chosen layers, tubes of 2 frames",
        licence="CC-BY-NC-4.0 for the authors' weights (see the model card)",
        argument="ORG/NAME[@REV] or FOLDER",
        downloads="config, processor and safetensors of that repository from the Hugging Face hub; a FOLDER: nothing",
        options={"layers": _LAYERS_HELP},
    )

    @property
    def grid(self) -> TokenGrid:
        """Read from `VideoMAEConfig`'s fields, with their defaults."""
        return TokenGrid(
            num_frames=_positive(self.config, "num_frames", 16),
            side=_positive(self.config, "image_size", 224),
            tubelet=_positive(self.config, "tubelet_size", 2),
            patch=_positive(self.config, "patch_size", 16),
            num_layers=_positive(self.config, "num_hidden_layers", 12),
            width=_positive(self.config, "hidden_size", 768),
        )

    def setup(self, device: str) -> None:
        """Load the encoder; a pre-training checkpoint's decoder is left out."""
        from transformers import VideoMAEModel

        self._device = device
        self._loaded = load_pretrained(VideoMAEModel, self.weights.folder, device)

    def _hidden_states(self, pixels_btchw: Any) -> Any:
        return self._model(pixel_values=pixels_btchw, output_hidden_states=list(self.layers)).hidden_states


class VJEPA2Teacher(EncoderTeacher):
    """V-JEPA 2; rotary positions in time, so it also takes fewer frames than it was trained on."""

    kind = "vjepa2"
    model_type = "vjepa2"
    info = TeacherInfo(
        summary="V-JEPA 2 encoder: hidden states at chosen layers, tubes of 2 frames",
        licence="MIT for the authors' weights (see the model card)",
        argument="ORG/NAME[@REV] or FOLDER",
        downloads="config, processor and safetensors of that repository from the Hugging Face hub; a FOLDER: nothing",
        options={"layers": _LAYERS_HELP},
    )

    @property
    def grid(self) -> TokenGrid:
        """Read from `VJEPA2Config`'s fields, with their defaults."""
        return TokenGrid(
            num_frames=_positive(self.config, "frames_per_clip", 64),
            side=_positive(self.config, "crop_size", 256),
            tubelet=_positive(self.config, "tubelet_size", 2),
            patch=_positive(self.config, "patch_size", 16),
            num_layers=_positive(self.config, "num_hidden_layers", 24),
            width=_positive(self.config, "hidden_size", 1024),
        )

    def _check_frames(self, frames: FrameGeometry) -> None:
        # Each frame's tokens are numbered by crop_size, so the size is fixed; the number of tubes is free.
        grid = self.grid
        square = frames.height == frames.width == grid.side
        if not square or frames.num_frames % grid.tubelet or frames.num_frames > grid.num_frames:
            raise RequestError(
                f"vjepa2 {self.weights.argument} takes a multiple of {grid.tubelet} frames, at most {grid.num_frames}, "
                f"of {grid.side} x {grid.side}, not {frames.num_frames} of {frames.height} x {frames.width}; "
                f"use --frames {grid.num_frames} --size {grid.side}"
            )

    def setup(self, device: str) -> None:
        """Load the encoder and its predictor, which is never run."""
        from transformers import VJEPA2Model

        self._device = device
        self._loaded = load_pretrained(VJEPA2Model, self.weights.folder, device)

    def _hidden_states(self, pixels_btchw: Any) -> Any:
        output = self._model(
            pixel_values_videos=pixels_btchw, skip_predictor=True, output_hidden_states=list(self.layers)
        )
        return output.hidden_states


def _positive(config: dict[str, Any], name: str, default: int) -> int:
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise TeacherError(f"config.json: {name} is {value!r}; a positive whole number is needed")
    return value
