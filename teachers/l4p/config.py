"""The sizes of an L4P model, and its four heads' configs."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import ConfigDict, TypeAdapter, ValidationError

from p4dprep.errors import RequestError, TeacherError

if TYPE_CHECKING:  # it brings torch, which naming a config need not wait for
    from p4dprep.heads import DPTHeadConfig

Triple = tuple[int, int, int]
Modality = Literal["depth", "flow", "motion", "camray"]
MODALITIES: tuple[Modality, ...] = ("depth", "flow", "motion", "camray")
OUT_CHANNELS: dict[Modality, int] = {"depth": 1, "flow": 2, "motion": 1, "camray": 6}

MINI_FOLDER = Path(__file__).parent / "mini"
"""The embedded teacher, `l4p:mini`: trained on worlds by `teachers.l4p.train`, its model card beside its weights."""
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

_DENSE_TAPS: tuple[Triple, ...] = ((1, 2, 2), (1, 1, 1), (0, 0, 0), (-1, -1, -1))
_DENSE_FUSION: tuple[Triple, ...] = ((1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2))
_CAMRAY_TAPS: tuple[Triple, ...] = ((1, 0, 0), (1, 0, 0), (0, 0, 0), (-1, -1, -1))
_CAMRAY_FUSION: tuple[Triple, ...] = ((1, 1, 1), (1, 1, 1), (2, 1, 1), (2, 2, 2))


@dataclass(frozen=True, kw_only=True)
class L4PConfig:
    """Sizes of encoder and heads; the defaults are L4P's own (arXiv 2502.13078), 1,337 M parameters.

    Attributes:
        num_frames: frames of one window; longer clips run windows with a stride of half of it.
        image_size: height and width of the frames.
        patch_size: pixels of a patch's side.
        tubelet_size: frames of a token.
        hidden_size: encoder width.
        num_layers: encoder blocks; those after the last tap are kept but not run.
        num_heads: attention heads; no tensor's shape tells it.
        mlp_size: width inside an encoder block's MLP.
        layer_norm_eps: of every LayerNorm.
        taps: the four layers that the heads read; tap 0 is the patch embedding, tap i the output of block i, and the
            last block's output goes through the final LayerNorm.
        tap_channels: each tap's channels inside a head.
        fusion_channels: width of the heads' fusion blocks.
        hidden_channels: width of the heads' last convolutions.
        camray_grid: frames, rows and columns of the camera ray map.
        model_type: tells this file from other models' configs.
    """

    num_frames: int = 16
    image_size: int = 224
    patch_size: int = 14
    tubelet_size: int = 2
    hidden_size: int = 1408
    num_layers: int = 40
    num_heads: int = 16
    mlp_size: int = 6144
    layer_norm_eps: float = 1e-6
    taps: tuple[int, int, int, int] = (14, 21, 28, 36)
    tap_channels: tuple[int, int, int, int] = (256, 512, 1024, 1024)
    fusion_channels: int = 256
    hidden_channels: int = 128
    camray_grid: Triple = (16, 16, 16)
    model_type: Literal["l4p"] = "l4p"

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    def __post_init__(self) -> None:
        sizes = (self.patch_size, self.tubelet_size, self.hidden_size, self.num_layers, self.num_heads, self.mlp_size)
        if min(sizes) < 1 or self.hidden_size % self.num_heads:
            raise RequestError(f"sizes must be at least 1 and num_heads must divide hidden_size: {self}")
        if self.image_size < self.patch_size or self.image_size % self.patch_size:
            raise RequestError(f"patch_size {self.patch_size} must divide image_size {self.image_size}")
        if self.num_frames < 1 or self.num_frames % (2 * self.tubelet_size):
            raise RequestError(f"num_frames {self.num_frames} must be a multiple of {2 * self.tubelet_size}")
        if list(self.taps) != sorted(set(self.taps)) or not 0 <= self.taps[0] <= self.taps[-1] <= self.num_layers:
            raise RequestError(f"taps {self.taps} must rise within 0..{self.num_layers}")
        if self.camray_grid[0] != self.num_frames:
            raise RequestError(f"camray_grid {self.camray_grid} must have {self.num_frames} frames")
        for modality in MODALITIES:
            self.head(modality)

    @property
    def token_grid(self) -> Triple:
        """Tokens of one window: steps, rows, columns."""
        side = self.image_size // self.patch_size
        return self.num_frames // self.tubelet_size, side, side

    def head(self, modality: Modality) -> "DPTHeadConfig":
        """The config of one head."""
        from p4dprep.heads import DPTHeadConfig

        is_camray = modality == "camray"
        return DPTHeadConfig(
            token_channels=self.hidden_size,
            token_grid=self.token_grid,
            tap_channels=self.tap_channels,
            tap_log2_factors=_CAMRAY_TAPS if is_camray else _DENSE_TAPS,
            fusion_channels=self.fusion_channels,
            fusion_factors=_CAMRAY_FUSION if is_camray else _DENSE_FUSION,
            hidden_channels=self.hidden_channels,
            out_channels=OUT_CHANNELS[modality],
            output_grid=self.camray_grid if is_camray else (self.num_frames, self.image_size, self.image_size),
            activation="exp" if modality == "depth" else "none",
        )

    def save(self, folder: Path) -> None:
        """Write `folder/config.json`."""
        (folder / CONFIG_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read `folder/config.json`.

        Raises:
            TeacherError: there is none, or it is not an L4P's.
        """
        path = folder / CONFIG_FILE
        try:
            return TypeAdapter(cls).validate_json(path.read_bytes())
        except OSError as error:
            raise TeacherError(f"no L4P model in {folder}: cannot read {CONFIG_FILE} ({error.strerror})") from None
        except ValidationError as error:
            raise TeacherError(
                f"{path} is not the config of an L4P model ({error}); `p4dprep teachers import-l4p` makes one"
            ) from None
