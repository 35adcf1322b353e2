"""Frozen prediction heads as data: a 3D DPT head (arXiv 2103.13413) built from a config plus safetensors.

A teacher exports its heads into a cache; a student builds them again with `load` and backpropagates through them,
without the teacher's code. Shapes: `b` batch, `n` tokens in (t, y, x) order, `c` channels, `t y x` the head's grids.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from p4dprep.errors import CacheFormatError, CorruptDataError, RequestError

Triple = tuple[int, int, int]
"""One number per axis, (t, y, x)."""

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class DPTHeadConfig:
    """What determines a head besides its weights. Per-tap tuples run from the shallowest tap to the deepest.

    Attributes:
        token_channels: width of every tap.
        token_grid: tokens per axis; a tap has their product as n.
        tap_channels: channels each tap is projected to before it is rescaled.
        tap_log2_factors: how each tap's grid is rescaled, as powers of two; one tap only grows or only shrinks.
        fusion_channels: width of the fusion blocks; raising it costs most of the head's time.
        fusion_factors: how much each fusion block up-samples its result.
        hidden_channels: width of the two convolutions before the output.
        out_channels: channels of the map.
        output_grid: frames, rows and columns of the map.
        activation: `exp` for depth, whose logarithm the convolutions predict; `none` otherwise.
        kind: tells this file from other configs.
    """

    token_channels: int
    token_grid: Triple
    tap_channels: tuple[int, ...]
    tap_log2_factors: tuple[Triple, ...]
    fusion_channels: int
    fusion_factors: tuple[Triple, ...]
    hidden_channels: int
    out_channels: int
    output_grid: Triple
    activation: Literal["exp", "none"] = "none"
    kind: Literal["dpt3d"] = "dpt3d"

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    def __post_init__(self) -> None:
        sizes = (self.token_channels, self.fusion_channels, self.hidden_channels, self.out_channels)
        if min((*sizes, *self.token_grid, *self.tap_channels, *self.output_grid), default=0) < 1:
            raise RequestError(f"every size of a head must be at least 1: {self}")
        if not len(self.tap_channels) == len(self.tap_log2_factors) == len(self.fusion_factors) >= 1:
            raise RequestError(f"tap_channels, tap_log2_factors and fusion_factors differ in number: {self}")
        for factors in self.tap_log2_factors:
            if min(factors) < 0 < max(factors):
                raise RequestError(f"tap_log2_factors {factors} grow and shrink one tap; choose one")
        self._check_fusion()

    def _check_fusion(self) -> None:
        grids = self.tap_grids
        for index in range(1, len(grids)):
            grown = [size * factor for size, factor in zip(grids[index], self.fusion_factors[index], strict=True)]
            # A shrunk grid is rounded up, so it may grow back past the next one by less than its factor.
            spare = [have - want for have, want in zip(grown, grids[index - 1], strict=True)]
            if any(not 0 <= s < f for s, f in zip(spare, self.fusion_factors[index], strict=True)):
                raise RequestError(
                    f"tap {index} grows to {tuple(grown)}, which does not fit the grid {grids[index - 1]} of the tap "
                    f"above it; mend fusion_factors {self.fusion_factors} or tap_log2_factors {self.tap_log2_factors}"
                )

    @property
    def num_tokens(self) -> int:
        """Tokens of one tap."""
        steps, rows, columns = self.token_grid
        return steps * rows * columns

    @property
    def tap_grids(self) -> tuple[Triple, ...]:
        """Each tap's grid after it was rescaled."""
        return tuple(
            (_rescaled(steps, t), _rescaled(rows, y), _rescaled(columns, x))
            for (steps, rows, columns), (t, y, x) in ((self.token_grid, factors) for factors in self.tap_log2_factors)
        )


def _rescaled(size: int, log2_factor: int) -> int:
    return size << log2_factor if log2_factor >= 0 else -(-size >> -log2_factor)


class DPTHead(nn.Module):
    """Taps of an encoder to one map per pixel."""

    def __init__(self, config: DPTHeadConfig) -> None:
        super().__init__()
        self.config = config
        width, hidden = config.fusion_channels, config.hidden_channels
        self.branches = nn.ModuleList(
            _TapBranch(config.token_channels, channels, factors, width)
            for channels, factors in zip(config.tap_channels, config.tap_log2_factors, strict=True)
        )
        deepest = len(config.fusion_factors) - 1
        self.fusions = nn.ModuleList(
            FusionBlock(width, factors, has_skip=index < deepest) for index, factors in enumerate(config.fusion_factors)
        )
        self.narrow = nn.Conv3d(width, hidden, 3, padding=1)
        self.smooth = nn.Conv3d(hidden, hidden, 3, padding=1)
        self.predict = nn.Conv3d(hidden, config.out_channels, 1)

    def forward(self, taps: Sequence[Tensor]) -> Tensor:
        """Predict the map.

        Args:
            taps: one (b, n, c) tensor per tap, the shallowest first, tokens in (t, y, x) order.

        Returns:
            (b, out_channels, t, y, x) on the output grid, in float32 or wider.

        Raises:
            ValueError: the taps do not fit the config.
        """
        self._check(taps)
        *upper, deepest = [branch(self._grid(tap)) for branch, tap in zip(self.branches, taps, strict=True)]
        fused = self.fusions[-1](deepest)
        for fusion, skip in zip(reversed(self.fusions[:-1]), reversed(upper), strict=True):
            steps, rows, columns = skip.shape[-3:]
            fused = fusion(fused[..., :steps, :rows, :columns], skip)
        values: Tensor = _resize(self.narrow(fused), self.config.output_grid)
        values = self.predict(functional.relu_(self.smooth(values)))
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        return values.exp() if self.config.activation == "exp" else values

    def _check(self, taps: Sequence[Tensor]) -> None:
        expected = (self.config.num_tokens, self.config.token_channels)
        shapes = [tuple(tap.shape) for tap in taps]
        if len(taps) != len(self.branches) or any(len(shape) != 3 or shape[1:] != expected for shape in shapes):
            raise ValueError(f"taps {shapes} do not fit a head for {len(self.branches)} taps of (b, *{expected})")

    def _grid(self, tap_bnc: Tensor) -> Tensor:
        return tap_bnc.transpose(1, 2).reshape(len(tap_bnc), -1, *self.config.token_grid)


class _TapBranch(nn.Module):
    """Project a tap's channels, rescale its grid, bring it to the fusion width."""

    def __init__(self, in_channels: int, channels: int, log2_factors: Triple, out_channels: int) -> None:
        super().__init__()
        self.project = nn.Conv3d(in_channels, channels, 1)
        self.rescale = _rescaling(channels, log2_factors)
        self.widen = nn.Conv3d(channels, out_channels, 3, padding=1, bias=False)

    def forward(self, tap_bctyx: Tensor) -> Tensor:
        """(b, in_channels, t, y, x) to (b, out_channels, *rescaled grid)."""
        widened: Tensor = self.widen(self.rescale(self.project(tap_bctyx)))
        return widened


def _rescaling(channels: int, log2_factors: Triple) -> nn.Module:
    t, y, x = (2 ** abs(factor) for factor in log2_factors)
    if max(log2_factors) > 0:
        return nn.ConvTranspose3d(channels, channels, (t, y, x), stride=(t, y, x))
    if min(log2_factors) < 0:
        padding = (t // 2, y // 2, x // 2)
        kernel = (2 * padding[0] + 1, 2 * padding[1] + 1, 2 * padding[2] + 1)
        return nn.Conv3d(channels, channels, kernel, stride=(t, y, x), padding=padding)
    return nn.Identity()


class ResidualUnit(nn.Module):
    """relu, conv, relu, conv, plus the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv3d(channels, channels, 3, padding=1)
        self.second = nn.Conv3d(channels, channels, 3, padding=1)

    def forward(self, values_bctyx: Tensor) -> Tensor:
        """Same shape out as in."""
        changed: Tensor = self.second(functional.relu_(self.first(functional.relu(values_bctyx))))
        return changed.add_(values_bctyx)


class FusionBlock(nn.Module):
    """Add a residual unit of the skip input, refine by a second residual unit, up-sample, mix channels.

    The 1x1x1 convolution runs before the up-sampling, not after: up-sampling mixes positions with weights that sum to
    one and the convolution mixes channels, so the two commute, and this order costs a fraction.

    Args:
        channels: width in and out.
        factors: up-sampling per axis, trilinear with aligned corners.
        has_skip: whether there is a shallower tap to add; the deepest block has none.
    """

    def __init__(self, channels: int, factors: Triple, *, has_skip: bool) -> None:
        super().__init__()
        self.factors = factors
        self.skip = ResidualUnit(channels) if has_skip else None
        self.refine = ResidualUnit(channels)
        self.mix = nn.Conv3d(channels, channels, 1)

    def forward(self, values_bctyx: Tensor, skip_bctyx: Tensor | None = None) -> Tensor:
        """(b, c, t, y, x) and a skip input of the same shape to (b, c, *factors times larger)."""
        if self.skip is not None:
            values_bctyx = values_bctyx + self.skip(skip_bctyx)
        t, y, x = (size * factor for size, factor in zip(values_bctyx.shape[-3:], self.factors, strict=True))
        return _resize(self.mix(self.refine(values_bctyx)), (t, y, x))


def _resize(values_bctyx: Tensor, grid: Triple) -> Tensor:
    if tuple(values_bctyx.shape[-3:]) == grid:
        return values_bctyx
    return functional.interpolate(values_bctyx, size=grid, mode="trilinear", align_corners=True)


def save(head: DPTHead, folder: Path) -> None:
    """Write `folder/config.json` and `folder/model.safetensors`, the weights in the head's own dtype."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in head.state_dict().items()}, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(asdict(head.config), indent=2) + "\n")


def load(folder: Path) -> DPTHead:
    """The head that `save` wrote, frozen, in evaluation mode, on the CPU, equal to the last bit.

    Raises:
        CacheFormatError: there is no head here, or of a kind this version does not know.
        CorruptDataError: its weights are damaged or do not fit its config.
    """
    try:
        config = TypeAdapter(DPTHeadConfig).validate_json((folder / CONFIG_FILE).read_bytes())
    except FileNotFoundError:
        raise CacheFormatError(f"no head in {folder}: {CONFIG_FILE} is missing") from None
    except ValidationError as error:
        raise CacheFormatError(f"{folder / CONFIG_FILE} is not the config of a head: {error}") from None
    with torch.device("meta"):
        head = DPTHead(config)
    try:
        head.load_state_dict(load_file(folder / WEIGHTS_FILE), strict=True, assign=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CorruptDataError(f"weights of the head in {folder} are missing or damaged: {error}") from None
    return head.eval().requires_grad_(False)
