"""Perceptual 4D distillation (P4D, arXiv 2512.17012 Sec. 4): the perception decoder and the losses that teach it.

All of this exists during training only. The student's hidden states are brought to the teacher's grid of tokens, a
small decoder turns them into the teacher's latents at every tap, and heads turn those into maps. Losses compare both
with what the cache keeps.

Shape suffixes: `b` batch, `s` sequence, `k` taps, `t y x` the grid of tokens or of a map, `n` its tokens, `c` channels.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from p4dprep.cache import Cache
from p4dprep.errors import RequestError
from p4dprep.heads import DPTHead, Triple
from student.losses import choose_loss, latent_losses, map_loss, motion_balance
from student.p4d_config import MODALITIES, DistilFrame, ExplicitTerm, P4DConfig
from student.samples import VideoTokens
from student.targets import CachedTarget, TargetBatch, cached_targets, channel_scales, load_head

_LIGHT_CHANNELS = 64
_LATENTLESS_CHANNELS = 256
_LATENTLESS_SIDE = 16
_LIGHT_SIDE = 24
"""Most rows and columns of a map that a light head is taught: it draws no edges, so more would cost time in vain."""


@dataclass(frozen=True, kw_only=True)
class LatentShape:
    """The teacher's features: `num_taps` layers of (steps, rows, columns) tokens with `channels` each."""

    num_taps: int
    grid: Triple
    channels: int

    @classmethod
    def of(cls, target: CachedTarget) -> Self:
        """The shape of cached latents.

        Raises:
            RequestError: the target is not (taps, steps, rows, columns, channels) of latents.
        """
        shape = target.spec.shape
        if target.spec.quantity != "latents" or len(shape) != 5:
            raise RequestError(
                f"{target.array} is {target.spec.quantity} of {target.spec.dims}; latents are (tap, t, y, x, c)"
            )
        return cls(num_taps=shape[0], grid=(shape[1], shape[2], shape[3]), channels=shape[4])


class PerceptionDecoder(nn.Module):
    """D_4DP (Sec. 4.1): a 3-layer MLP with GELU from a hidden state to the teacher's features at every tap.

    Args:
        hidden_size: width of the language model.
        shape: of the teacher's features.
        hidden_channels: width in between; the paper's is 2,560.
        positions: add a learnt vector, 0 at first, for each row and column of the grid. The paper has none.
    """

    def __init__(
        self, hidden_size: int, shape: LatentShape, hidden_channels: int = 2560, *, positions: bool = False
    ) -> None:
        super().__init__()
        self.shape = shape
        self.position_yxc = nn.Parameter(torch.zeros(*shape.grid[1:], hidden_channels)) if positions else None
        self.first = nn.Linear(hidden_size, hidden_channels)
        self.second = nn.Linear(hidden_channels, hidden_channels)
        self.last = nn.Linear(hidden_channels, shape.num_taps * shape.channels)
        for layer in (self.first, self.second, self.last):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, hidden_btyxc: Tensor) -> Tensor:
        """Hidden states on the teacher's grid to its features (b, k, t, y, x, c), float32 or wider."""
        values = self.first(hidden_btyxc)
        values = functional.gelu(values if self.position_yxc is None else values + self.position_yxc)
        values = _at_least_float32(self.last(functional.gelu(self.second(values))))
        return values.reshape(*values.shape[:-1], self.shape.num_taps, self.shape.channels).movedim(-2, 1)


class LightHead(nn.Module):
    """A small trainable head, where the teacher left no frozen one or none is wanted; its numbers are no teacher's.

    Two linear layers turn each token into the small block of the map that it covers, in space and time (sub-pixel
    convolution, arXiv 1609.05158, without a neighbourhood: the tokens come from a model that looks everywhere).

    Args:
        shape: of the features it reads.
        out_channels: channels of the map.
        output_grid: frames, rows and columns of the map.
        activation: `exp` for a depth in metres, whose logarithm is predicted.
    """

    def __init__(
        self, shape: LatentShape, out_channels: int, output_grid: Triple, activation: Literal["exp", "none"]
    ) -> None:
        super().__init__()
        self.grid, self.output_grid, self.activation = shape.grid, output_grid, activation
        (steps, rows, columns), (frames, *sides) = shape.grid, output_grid
        height, width = (max(1, min(side, _LIGHT_SIDE) // n) for side, n in zip(sides, (rows, columns), strict=True))
        self.block: Triple = (-(-frames // steps), height, width)
        self.mix = nn.Linear(shape.num_taps * shape.channels, _LIGHT_CHANNELS)
        self.predict = nn.Linear(_LIGHT_CHANNELS, math.prod(self.block) * out_channels)

    @property
    def coarse_grid(self) -> Triple:
        """Frames, rows and columns of the map that is compared with the teacher's in training."""
        frames, rows, columns = self.output_grid
        return frames, min(rows, self.grid[1] * self.block[1]), min(columns, self.grid[2] * self.block[2])

    def forward(self, told_bktyxc: Tensor, *, coarse: bool = False) -> Tensor:
        """What the decoder says to a map (b, out_channels, t, y, x), or to one on the coarse grid."""
        tokens_btyxc = told_bktyxc.movedim(1, -2).flatten(4)  # no copy: as the decoder's last layer wrote them
        values = self.predict(functional.gelu(self.mix(tokens_btyxc)))
        blocks = _at_least_float32(values).reshape(len(values), *self.grid, *self.block, -1)
        made = [cells * size for cells, size in zip(self.grid, self.block, strict=True)]
        values = blocks.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(len(values), -1, *made)
        grid = self.coarse_grid if coarse else self.output_grid
        if tuple(values.shape[2:]) != grid:
            values = functional.interpolate(values, grid, mode="trilinear")
        return values.exp() if self.activation == "exp" else values


def rearrange(
    hidden_bsc: Tensor, video_tokens: Sequence[VideoTokens], grid: Triple, frame: DistilFrame = "first"
) -> Tensor:
    """Hidden states of the video tokens, sampled and resized to the teacher's grid (Sec. 4.1).

    In time, each teacher step takes the student step that covers its first frame: every second one where the teacher's
    tubelet is 2 and the student has a step per frame, as in the authors' release; the step itself where the student
    merges the same frames. In space, bilinear with antialiasing, so that no cell is lost when the grid shrinks.

    Args:
        hidden_bsc: (b, s, c) hidden states of one layer.
        video_tokens: where each row's video lies in its sequence.
        grid: the teacher's (N', h', w').
        frame: of each teacher step that is taken.

    Returns:
        (b, N', h', w', c), float32 or wider.

    Raises:
        RequestError: the clip has fewer frames than the teacher has steps.
    """
    if len(video_tokens) != len(hidden_bsc):
        raise ValueError(f"{len(video_tokens)} videos do not fit hidden states of {len(hidden_bsc)} samples")
    return torch.stack(
        [_rearranged(hidden, tokens, grid, frame) for hidden, tokens in zip(hidden_bsc, video_tokens, strict=True)]
    )


def _rearranged(hidden_sc: Tensor, tokens: VideoTokens, grid: Triple, frame: DistilFrame) -> Tensor:
    steps = _student_steps(tokens, grid[0], frame)
    positions_tyx = tokens.positions_tyx[steps].to(hidden_sc.device)
    values_tcyx = _at_least_float32(hidden_sc[positions_tyx]).movedim(-1, 1)
    if tuple(values_tcyx.shape[-2:]) != grid[1:]:
        values_tcyx = functional.interpolate(values_tcyx, grid[1:], mode="bilinear", antialias=True)
    return values_tcyx.movedim(1, -1)


def _student_steps(tokens: VideoTokens, num_steps: int, frame: DistilFrame) -> list[int]:
    """For every teacher step, the student step that covers its first or its last frame."""
    step_of = [step for step, (first, last) in enumerate(tokens.frame_spans) for _ in range(first, last)]
    firsts = first_frames(tokens.num_frames, num_steps)
    if frame == "last":
        return [step_of[begin - 1] for begin in (*firsts[1:], tokens.num_frames)]
    return [step_of[begin] for begin in firsts]


def first_frames(num_frames: int, num_steps: int) -> list[int]:
    """The first frame of each of the teacher's steps.

    Raises:
        RequestError: there are fewer frames than steps.
    """
    if num_frames < num_steps:
        raise RequestError(f"the student sees {num_frames} frames, fewer than the teacher's {num_steps} steps")
    return [step * num_frames // num_steps for step in range(num_steps)]


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


@dataclass(frozen=True, kw_only=True, eq=False)
class P4DPrediction:
    """What the student sees of the rows of a batch that have targets.

    Attributes:
        latents_bktyxc: F^4D, the teacher's features as the student predicts them.
        told_bktyxc: the same as the decoder says them: each channel in units of its spread, where latents are
            standardised. Light heads read these, in which no channel is faint.
        maps: array name to the predicted map (b, t, y, x, c) in the target's own quantity (logits for a mask).
    """

    latents_bktyxc: Tensor
    told_bktyxc: Tensor
    maps: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class P4DLosses:
    """The distillation losses of a batch.

    Attributes:
        total: latent_weight L_LD + explicit_weight L_ED, to be added to L_SFT; a constant where nothing is learnt.
        latent_k: L_LD of each tap, unweighted; empty without latents.
        explicit: array name to its loss, unweighted.
    """

    total: Tensor
    latent_k: Tensor
    explicit: Mapping[str, Tensor]

    def log(self) -> dict[str, float]:
        """Every term unweighted, for a log line: `ld`, `ld/tap0`, ..., `ed/<target>`; empty without targets."""
        taps = {f"ld/tap{number}": float(loss) for number, loss in enumerate(self.latent_k)}
        mean = {"ld": float(self.latent_k.mean())} if taps else {}
        return mean | taps | {f"ed/{name}": float(loss) for name, loss in self.explicit.items()}


class P4D(nn.Module):
    """Decoder, heads and losses for one cache and one student. Frozen heads pass gradients on and take none.

    Args:
        config: what is distilled.
        cache: where its targets and heads lie.
        hidden_size: width of the student's language model.

    Raises:
        RequestError: the cache lacks a target; a target allows no such loss; the clips are of other sizes than the
            frozen heads.
        CorruptDataError: a frozen head is damaged.
    """

    latent_mean_ktyxc: Tensor | None
    latent_spread_ktyxc: Tensor | None

    def __init__(self, config: P4DConfig, cache: Cache, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        known = cached_targets(cache)
        missing = [name for name in config.targets if name not in known]
        if missing:
            raise RequestError(f"{cache.store.url} has no target {missing[0]!r}; it has {sorted(known)}")
        self.num_frames = cache.sampling.num_frames
        self.targets = {name: known[name] for name in config.targets}
        self.losses = {
            term.target: choose_loss(term.target, known[term.target].spec.quantity, term.loss) for term in config.terms
        }
        self.shape = self._latent_shape(self.num_frames)
        self.decoder = PerceptionDecoder(hidden_size, self.shape, config.hidden_channels, positions=config.positions)
        self.motion = self._motion() if config.balanced else None
        self._add_scales(cache)
        self.frozen_heads, self.light_heads = nn.ModuleDict(), nn.ModuleDict()
        for term in config.terms:
            self._add_head(cache, term)
        # What learns nothing asks for no gradient, so that a distributed step never waits for one.
        self.decoder.requires_grad_(self._learns_any)

    @property
    def _learns_any(self) -> bool:
        return self.config.learns_latents or any(map(self.config.learns, self.config.terms))

    def _add_scales(self, cache: Cache) -> None:
        """Mean and spread of every channel; none without standardising, which then costs nothing."""
        mean, spread = None, None
        if self.config.standardised and self.config.latents is not None:
            latents = self.targets[self.config.latents]
            read = [latents] if self.motion is None else [latents, self.motion]
            mean, spread = channel_scales(cache, read, self._taught)
        # Worked out anew by whoever resumes, from the same cache: no part of a checkpoint.
        self.register_buffer("latent_mean_ktyxc", mean, persistent=False)
        self.register_buffer("latent_spread_ktyxc", spread, persistent=False)

    def _motion(self) -> CachedTarget:
        """The one term that says what moves."""
        terms = [self.targets[term.target] for term in self.config.terms]
        found = [target for target in terms if MODALITIES.get(target.spec.quantity) == "motion"]
        if len(found) != 1:
            raise RequestError(
                f"balance_motion asks for one target that says what moves; the targets are {sorted(self.targets)}: "
                "name one among targets"
            )
        return found[0]

    def _latent_shape(self, num_frames: int) -> LatentShape:
        if self.config.latents is not None:
            shape = LatentShape.of(self.targets[self.config.latents])
            return shape if self.config.cells is None else self._of_cells(shape, self.config.cells)
        grid = (max(1, num_frames // 2), *(self.config.cells or (_LATENTLESS_SIDE, _LATENTLESS_SIDE)))
        return LatentShape(num_taps=1, grid=grid, channels=_LATENTLESS_CHANNELS)

    def _of_cells(self, shape: LatentShape, cells: tuple[int, int]) -> LatentShape:
        steps, rows, columns = shape.grid
        if min(cells) < 1 or rows % cells[0] or columns % cells[1]:
            raise RequestError(f"distill_cells {cells[0]} x {cells[1]} must divide the teacher's {rows} x {columns}")
        if self.config.terms and self.config.heads == "frozen":
            raise RequestError(
                "distill_cells averages the latents, of which a teacher's head makes nothing: heads light"
            )
        return replace(shape, grid=(steps, *cells))

    def _add_head(self, cache: Cache, term: ExplicitTerm) -> None:
        target = self.targets[term.target]
        frames, rows, columns, channels = _map_shape(target)
        grid = (frames, rows, columns)
        latents = self.targets.get(self.config.latents or "")
        has_head = latents is not None and latents.group == target.group and target.has_head
        if self.config.heads == "light" or not has_head:
            activation: Literal["exp", "none"] = "exp" if target.spec.quantity == "metric depth" else "none"
            light = LightHead(self.shape, channels, grid, activation)
            self.light_heads[target.array] = light.requires_grad_(self.config.learns(term))
            return
        head = load_head(cache, target.group, target.spec.name).float()
        _check_fit(head, target, self.shape, grid, channels)
        self.frozen_heads[target.array] = head

    def forward(
        self, hidden_bsc: Tensor, video_tokens: Sequence[VideoTokens | None], targets: TargetBatch
    ) -> P4DLosses:
        """Losses of a batch.

        Args:
            hidden_bsc: hidden states of the distilled layer, of the whole batch.
            video_tokens: one per sample of the batch, in order; None where there is no video, and no target.
            targets: what the cache keeps of them.
        """
        if len(targets.sample_ids) != len(hidden_bsc) or len(video_tokens) != len(hidden_bsc):
            raise ValueError(f"{targets} and {len(video_tokens)} videos do not fit {len(hidden_bsc)} hidden states")
        if not targets.rows:
            # Every rank must send a gradient for every weight, or a distributed step would wait for ever.
            learnt = [parameter for parameter in self.parameters() if parameter.requires_grad]
            nothing = torch.cat([values.flatten()[:0] for values in (hidden_bsc, *learnt)]).sum()
            return P4DLosses(total=nothing, latent_k=hidden_bsc.new_zeros(0), explicit={})
        rows = list(targets.rows)
        tokens = [found for row in rows if (found := video_tokens[row]) is not None]
        if len(tokens) != len(rows):
            raise ValueError(f"{targets}: some of rows {rows} have targets but no video")
        prediction = self.predict(hidden_bsc[rows], tokens, coarse=True)
        return self.compare(prediction, targets)

    def predict(
        self, hidden_bsc: Tensor, video_tokens: Sequence[VideoTokens], *, coarse: bool = False
    ) -> P4DPrediction:
        """The student's latents and maps; gradients flow only into what is learnt from.

        Args:
            hidden_bsc: hidden states of the distilled layer, of samples with a video.
            video_tokens: one per sample.
            coarse: leave the maps of light heads on the coarse grid, on which they are taught.

        Raises:
            RequestError: the student sees other frames than the teacher did.
        """
        for tokens in video_tokens:
            if tokens.num_frames != self.num_frames:
                raise RequestError(f"the student sees {tokens.num_frames} frames of a clip of {self.num_frames}")
        with torch.set_grad_enabled(self._learns_any and torch.is_grad_enabled()):
            hidden_btyxc = rearrange(hidden_bsc, video_tokens, self.shape.grid, self.config.frame)
            told = self.decoder(hidden_btyxc)
            latents = told
            if self.latent_mean_ktyxc is not None and self.latent_spread_ktyxc is not None:
                latents = told * self.latent_spread_ktyxc + self.latent_mean_ktyxc
        maps = {term.target: self._map(term, latents, told, coarse) for term in self.config.terms}
        return P4DPrediction(latents_bktyxc=latents, told_bktyxc=told, maps=maps)

    def _map(self, term: ExplicitTerm, latents_bktyxc: Tensor, told_bktyxc: Tensor, coarse: bool) -> Tensor:
        with torch.set_grad_enabled(self.config.learns(term) and torch.is_grad_enabled()):
            values: Tensor = (
                self.frozen_heads[term.target](list(latents_bktyxc.flatten(2, 4).unbind(1)))
                if term.target in self.frozen_heads
                else self.light_heads[term.target](told_bktyxc, coarse=coarse)
            )
        return values.movedim(1, -1)

    def compare(self, prediction: P4DPrediction, targets: TargetBatch) -> P4DLosses:
        """The losses of a prediction, each term unweighted, and their weighted sum."""
        config, device = self.config, prediction.latents_bktyxc.device
        weights = self._weights(prediction, targets)
        total, latent_k = torch.zeros((), device=device), torch.zeros(0, device=device)
        if config.latents is not None:
            predicted = prediction.told_bktyxc
            target = self._taught(targets.arrays).to(predicted)
            if self.latent_mean_ktyxc is not None and self.latent_spread_ktyxc is not None:
                target = (target - self.latent_mean_ktyxc) / self.latent_spread_ktyxc
            latent_k = latent_losses(predicted, target, weights.get(self.shape.grid))
            total = total + config.latent_weight * latent_k.mean() if config.learns_latents else total
        explicit = {term.target: self._explicit(term, prediction, targets, weights) for term in config.terms}
        for term in config.terms:
            if config.learns(term):
                total = total + config.explicit_weight * term.weight * explicit[term.target]
        return P4DLosses(total=total, latent_k=latent_k.detach(), explicit={n: e.detach() for n, e in explicit.items()})

    def _explicit(
        self, term: ExplicitTerm, prediction: P4DPrediction, targets: TargetBatch, weights: Mapping[Triple, Tensor]
    ) -> Tensor:
        predicted = prediction.maps[term.target]
        target = targets.arrays[term.target].to(predicted)
        target = shrunk(target.reshape(*target.shape[:4], predicted.shape[-1]), predicted.shape[2:4])
        return map_loss(predicted, target, self.losses[term.target], weights.get(_grid(predicted)))

    def _taught(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """The latents that are compared, (b, k, t, y, x, c): the teacher's, or their means over cells."""
        latents = arrays[self.config.latents or ""]
        if self.config.cells is None:
            return latents
        steps, rows, columns = latents.shape[2:5]
        grid = (steps, rows, columns)
        share = None if self.motion is None else functional.adaptive_avg_pool3d(self._moving(arrays), grid)
        return pooled(latents, self.config.cells, share)

    def _moving(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """Where something moves, (b, t, y, x), 1 or 0."""
        if self.motion is None:
            raise ValueError("these losses are not balanced")
        values = arrays[self.motion.array]
        is_moving = values > (0.5 if self.motion.spec.quantity == "motion mask" else 0)
        return is_moving.reshape(values.shape[:4]).float()

    def _weights(self, prediction: P4DPrediction, targets: TargetBatch) -> dict[Triple, Tensor]:
        """For each grid that is compared on, weights of its cells (b, t, y, x); none where all weigh alike."""
        if self.motion is None:
            return {}
        share = self._moving(targets.arrays).to(prediction.latents_bktyxc)
        grids = {self.shape.grid, *map(_grid, prediction.maps.values())}
        return {grid: motion_balance(functional.adaptive_avg_pool3d(share, grid)) for grid in grids}


def _grid(map_btyxc: Tensor) -> Triple:
    frames, rows, columns = map_btyxc.shape[1:4]
    return frames, rows, columns


def pooled(latents_bktyxc: Tensor, cells: tuple[int, int], moving_btyx: Tensor | None) -> Tensor:
    """Means over `cells` rows and columns, (b, k, t, rows, columns, c), of latents whose grid they divide.

    Args:
        latents_bktyxc: on the teacher's grid.
        cells: rows and columns.
        moving_btyx: share of each token that moves: in a cell what moves then counts as much as what stands, so that
            what is said of a small thing is not lost in the mean. None weighs all alike.
    """
    batch, taps, steps, rows, columns, channels = latents_bktyxc.shape
    height, width = rows // cells[0], columns // cells[1]
    values = latents_bktyxc.reshape(batch, taps, steps, cells[0], height, cells[1], width, channels)
    if moving_btyx is None:
        return values.mean(dim=(4, 6))
    moving = moving_btyx.reshape(batch, steps, cells[0], height, cells[1], width).permute(0, 1, 2, 4, 3, 5)
    weights = motion_balance(moving.flatten(0, 2)).reshape(moving.shape).to(values) / (height * width)
    return torch.einsum("bktRyCxc,btRCyx->bktRCc", values, weights)


def shrunk(values_btyxc: Tensor, size: Sequence[int]) -> Tensor:
    """A map averaged over the cells of a coarser grid of `size` rows and columns; NaN only where a whole cell is."""
    if tuple(values_btyxc.shape[2:4]) == tuple(size):
        return values_btyxc

    def averaged(each_ncyx: Tensor) -> Tensor:
        return functional.adaptive_avg_pool2d(each_ncyx, (size[0], size[1]))

    def averaged_valid(each_ncyx: Tensor) -> Tensor:
        valid = each_ncyx.isfinite()
        return averaged(each_ncyx.where(valid, 0.0)) / averaged(valid.to(each_ncyx))

    frames_ncyx = values_btyxc.flatten(0, 1).movedim(-1, 1)
    if frames_ncyx.device.type == "cpu":  # most frames are valid everywhere; on a GPU, to ask which waits for it
        means = averaged(frames_ncyx)
        holed = ~means.isfinite().flatten(1).all(1)
        means[holed] = averaged_valid(frames_ncyx[holed])
    else:
        means = averaged_valid(frames_ncyx)
    means_nyxc = means.movedim(1, -1)
    return means_nyxc.reshape(*values_btyxc.shape[:2], *means_nyxc.shape[1:])


def _map_shape(target: CachedTarget) -> tuple[int, int, int, int]:
    """Frames, rows, columns and channels of a map.

    Raises:
        RequestError: the target is no map.
    """
    shape = target.spec.shape
    if len(shape) not in (3, 4):
        raise RequestError(f"{target.array} has axes {target.spec.dims}; a map is (t, y, x) or (t, y, x, c)")
    return shape[0], shape[1], shape[2], shape[3] if len(shape) == 4 else 1


def _check_fit(head: DPTHead, target: CachedTarget, shape: LatentShape, grid: Triple, channels: int) -> None:
    config = head.config
    expected = (shape.grid, shape.channels, shape.num_taps, grid, channels)
    found = (
        config.token_grid,
        config.token_channels,
        len(config.tap_channels),
        config.output_grid,
        config.out_channels,
    )
    if found != expected:
        raise RequestError(
            f"the frozen head {target.group}/{target.spec.name} is for token grid, width, taps, map and channels "
            f"{found}; the cache's clips have {expected}: extract with the frames of one window of the teacher"
        )
