"""L4P (arXiv 2502.13078): a VideoMAE encoder and four 3D DPT heads, written from the facts in docs/l4p.md.

Shape suffixes: `b` batch, `c` channels, `t` frames, `h w` pixels, `n` tokens in (t, y, x) order.
"""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from p4dprep.errors import TeacherError
from p4dprep.heads import DPTHead
from teachers.l4p.config import MODALITIES, WEIGHTS_FILE, L4PConfig, Modality

if TYPE_CHECKING:
    from transformers import VideoMAEModel


class L4POutput(NamedTuple):
    """What L4P says of a clip.

    Attributes:
        taps: per tapped layer (b, n, c), in the order of `L4PConfig.taps`; token ((step * rows) + row) * columns +
            column covers frames 2 * step and 2 * step + 1.
        maps: float32. `depth` (b, 1, t, h, w), metres; `flow` (b, 2, t, h, w), (u, v) backward in pixels of the
            frame, frame 0 without meaning; `motion` (b, 1, t, h, w), a logit; `camray` (b, 6, *camray_grid),
            Plücker (direction, moment) relative to the first frame.
    """

    taps: tuple[Tensor, ...]
    maps: dict[Modality, Tensor]


class L4P(nn.Module):
    """The model for one window of `config.num_frames` frames; random weights until some are loaded."""

    def __init__(self, config: L4PConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = _encoder(config)
        self.heads = nn.ModuleDict({modality: DPTHead(config.head(modality)) for modality in MODALITIES})
        self.eval()

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        return next(self.parameters()).dtype

    def encode(self, pixels_bcthw: Tensor) -> tuple[Tensor, ...]:
        """The taps of one window of normalised pixels; blocks after the last tap are not run."""
        last = self.config.taps[-1]
        hidden = self.encoder.embeddings(pixels_bcthw.transpose(1, 2), None)
        layers = [hidden]
        for block in self.encoder.encoder.layer[:last]:
            hidden = block(hidden)
            layers.append(hidden)
        if last == self.config.num_layers:
            layers[-1] = self.encoder.layernorm(hidden)
        return tuple(layers[tap] for tap in self.config.taps)

    def forward(self, pixels_bcthw: Tensor) -> L4POutput:
        """Run one window.

        Args:
            pixels_bcthw: (b, 3, t, h, w), RGB in 0-1 less the ImageNet mean, over its standard deviation.

        Raises:
            ValueError: the shape is not one window of this model.
        """
        size = self.config.image_size
        if pixels_bcthw.ndim != 5 or tuple(pixels_bcthw.shape[1:]) != (3, self.config.num_frames, size, size):
            raise ValueError(
                f"pixels {tuple(pixels_bcthw.shape)} are not one window, (b, 3, {self.config.num_frames}, {size}, "
                f"{size}); longer clips go through teachers.l4p.run_windows"
            )
        taps = self.encode(pixels_bcthw.to(self.dtype))
        return L4POutput(taps, {modality: self.heads[modality](taps) for modality in MODALITIES})

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, folder / WEIGHTS_FILE)
        self.config.save(folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """The model that `save_pretrained` or `import_checkpoint` wrote, in evaluation mode, on the CPU.

        Raises:
            TeacherError: config or weights are missing, damaged or do not fit each other.
        """
        folder = Path(folder)
        with torch.device("meta"):  # the weights are on their way; do not spend seconds on random ones
            model = cls(L4PConfig.load(folder))
        try:
            model.load_state_dict(load_file(folder / WEIGHTS_FILE), strict=True, assign=True)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise TeacherError(f"L4P weights in {folder} are missing or damaged: {error}") from None
        return model


def _encoder(config: L4PConfig) -> "VideoMAEModel":
    from transformers import VideoMAEConfig, VideoMAEModel  # seconds to import, which listing teachers need not pay

    encoder = VideoMAEModel(
        VideoMAEConfig(
            image_size=config.image_size,
            patch_size=config.patch_size,
            num_frames=config.tubelet_size,  # sizes the position table only, which is replaced below
            tubelet_size=config.tubelet_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            intermediate_size=config.mlp_size,
            layer_norm_eps=config.layer_norm_eps,
            qv_bias=True,
            use_mean_pooling=False,  # so that the final LayerNorm exists
        )
    )
    steps, rows, columns = config.token_grid
    encoder.embeddings.position_embeddings = _sinusoids(steps * rows * columns, config.hidden_size)
    return encoder


def _sinusoids(num_positions: int, width: int) -> Tensor:
    """Fixed positions (1, n, c) as VideoMAE has them; transformers fills the same table cell by cell, in seconds."""
    channels = np.arange(width)
    angles = np.arange(num_positions)[:, None] / np.power(10000, 2 * (channels // 2) / width)
    table = np.where(channels % 2 == 0, np.sin(angles), np.cos(angles))
    return torch.from_numpy(table.astype(np.float32))[None]
