"""The paper's rivals of P4D: the teacher's latents put into the student, at inference too (arXiv 2512.17012, Table 4).

What Sec. 6.3 says: "4D-Concat, we directly concatenate F4D with the 2D visual features E_V(V)", which trains the
projector E_P anew since the width differs; "4D-PE, we project F4D to positional encodings for the visual features,
similar to the spatial PE proposed in SR-3D" (arXiv 2509.13317: coordinates through sines, cosines and a point-wise MLP,
resized and added to the visual tokens). Both must compute F4D for every video they answer about. No code is released.

What we chose, where the paper leaves it open:
- Both act on the video tokens as the LLM reads them, behind the projector and not before it. There one token is one
  cell in every family; before it, features are patches in windows, tiles or shuffled fours.
- F4D is all of the teacher's cached taps, since P4D distils them all, each normalised (LayerNorm), since their scales
  differ; or, where latents are standardised, each channel by its mean and spread over the corpus. LayerNorm drowns what
  is faint where the channels are quantities of different units, such as the truth's depths and velocities.
- 4D-Concat maps token and latents back to the LLM's width by one linear layer; 4D-PE is a two-layer MLP with GELU on
  the latents alone, without sines, as F4D is no coordinate. Both start as no change at all: a student that is already
  trained begins from what it knows.

Cost at inference: `Rival.num_flops` counts the rival's own layers, two FLOPs a multiply-add. For a 7 B student
(3,584 wide) with 16 frames of 8 steps x 256 tokens and L4P's four taps of 1,408 channels it is 135 GFLOP for either,
with 33 M parameters. The teacher's encoder comes on top, 4.6 TFLOP a window (docs/l4p.md), and with it 1 B
parameters in memory.

Shape suffixes: `b` batch, `s` places in the token sequence, `k` taps, `t y x` steps, rows and columns, `n` video
tokens, `c` channels.
"""

from bisect import bisect_right
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from p4dprep.cache import Cache
from p4dprep.errors import RequestError
from p4dprep.heads import Triple
from student.p4d import LatentShape, first_frames
from student.p4d_config import latents_of
from student.samples import VideoTokens
from student.targets import CachedTarget, TargetBatch, cached_targets, channel_scales

Strategy = Literal["p4d", "4d-concat", "4d-pe"]
"""`p4d` is distillation, gone after training; the others stay in the student for good."""

RivalStrategy = Literal["4d-concat", "4d-pe"]


class _ChannelScale(nn.Module):
    """A factor and an offset for each channel of each tap: (n, k, c) to (n, k, c)."""

    def __init__(self, num_taps: int, num_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_taps, num_channels))
        self.bias = nn.Parameter(torch.zeros(num_taps, num_channels))

    def forward(self, features_nkc: Tensor) -> Tensor:
        return features_nkc * self.weight + self.bias


class Rival(nn.Module):
    """One of the rivals, for one cache and one student; as yet without effect. `make_rival` makes it.

    Args:
        strategy: which.
        latents: what is read from the cache.
        num_frames: of the cache's clips.
        hidden_size: width of the language model.
        standardised: whether each channel has a scale of its own, for `standardise` to begin at the corpus's; else
            each token's latents are normalised together (LayerNorm).

    Attributes:
        targets: arrays to read from the cache.
    """

    def __init__(
        self,
        strategy: RivalStrategy,
        latents: CachedTarget,
        num_frames: int,
        hidden_size: int,
        *,
        standardised: bool = False,
    ) -> None:
        super().__init__()
        self.strategy, self.num_frames = strategy, num_frames
        self.targets: tuple[str, ...] = (latents.array,)
        shape = LatentShape.of(latents)
        num_features = shape.num_taps * shape.channels
        self.norm = _ChannelScale(shape.num_taps, shape.channels) if standardised else nn.LayerNorm(shape.channels)
        last = nn.Linear(hidden_size + num_features if strategy == "4d-concat" else hidden_size, hidden_size)
        # The difference to passing the token on is learnt, so that weight decay pulls to that, not to nothing.
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        first = [] if strategy == "4d-concat" else [nn.Linear(num_features, hidden_size), nn.GELU()]
        self.layers = nn.Sequential(*first, last)

    def standardise(self, cache: Cache) -> None:
        """Let the scales begin where each channel has mean 0 and spread 1 over a cache; they are learnt from there.

        Raises:
            RequestError: no clip has latents yet.
        """
        latents = cached_targets(cache)[self.targets[0]]
        mean, spread = channel_scales(cache, [latents], lambda arrays: arrays[latents.array])
        with torch.no_grad():
            self.norm.weight.copy_(1 / spread[:, 0, 0, 0])
            self.norm.bias.copy_(-(mean / spread)[:, 0, 0, 0])

    def num_flops(self, num_tokens: int) -> int:
        """FLOPs of the linear layers for so many video tokens, two a multiply-add; the teacher's come on top."""
        layers = [module for module in self.modules() if isinstance(module, nn.Linear)]
        return num_tokens * sum(2 * layer.in_features * layer.out_features for layer in layers)

    def forward(self, embeds_bsc: Tensor, video_tokens: Sequence[VideoTokens | None], targets: TargetBatch) -> Tensor:
        """The LLM's input embeddings with the video tokens changed; pass it to `Backbone.forward` as `inject`.

        Rows without targets stay as they are, as does every video token at whose place no latent is valid.

        Args:
            embeds_bsc: (b, s, c), of the whole batch.
            video_tokens: one per sample of the batch, in order; None where there is no video, and no target.
            targets: what the cache keeps of them, `Rival.targets` among it.

        Raises:
            RequestError: the student sees other frames than the teacher did.
        """
        if not len(embeds_bsc) == len(video_tokens) == len(targets.sample_ids):
            raise ValueError(f"{targets} and {len(video_tokens)} videos do not fit {len(embeds_bsc)} rows")
        if not targets.rows:
            # Every rank must send a gradient for every weight, or a distributed step would wait for ever.
            nothing = torch.cat([parameter.flatten()[:0] for parameter in self.parameters()]).sum()
            return embeds_bsc + nothing.to(embeds_bsc.dtype)
        found = [self._place(row, video_tokens[row], latents) for row, latents in self._latents(embeds_bsc, targets)]
        rows_n, places_n, features_nkc = (torch.cat(parts) for parts in zip(*found, strict=True))
        tokens_nc, inputs_nc = embeds_bsc[rows_n, places_n], self.norm(features_nkc.to(self.norm.weight)).flatten(1)
        if self.strategy == "4d-concat":
            inputs_nc = torch.cat((tokens_nc.to(inputs_nc.dtype), inputs_nc), dim=-1)
        added_nc = self.layers(inputs_nc).to(tokens_nc.dtype)
        return embeds_bsc.index_put((rows_n, places_n), tokens_nc + added_nc)

    def _latents(self, embeds_bsc: Tensor, targets: TargetBatch) -> list[tuple[int, Tensor]]:
        values_bktyxc = targets.arrays[self.targets[0]].to(embeds_bsc.device, torch.float32)
        return list(zip(targets.rows, values_bktyxc, strict=True))

    def _place(self, row: int, tokens: VideoTokens | None, latents_ktyxc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows (n,), places (n,) and latents (n, k, c) of one video's tokens that have any."""
        if tokens is None:
            raise ValueError(f"row {row} has targets but no video")
        if tokens.num_frames != self.num_frames:
            raise RequestError(f"the student sees {tokens.num_frames} frames of a clip of {self.num_frames}")
        places_n, features_nkc = latents_of_tokens(latents_ktyxc, tokens)
        return torch.full_like(places_n, row), places_n, features_nkc


def make_rival(
    strategy: RivalStrategy,
    cache: Cache,
    hidden_size: int,
    targets: Sequence[str] | None = None,
    *,
    standardised: bool = False,
) -> Rival:
    """The rival for one cache and one student, as yet without effect.

    Args:
        strategy: which.
        cache: where the teacher's latents lie.
        hidden_size: width of the student's language model.
        targets: arrays it may read; None takes the latents of the teacher that left heads, or the only ones.
        standardised: see `Rival`; what it begins at is `Rival.standardise`'s to measure.

    Raises:
        RequestError: the cache has no latents, or several and none was named, or not what was named.
    """
    known = cached_targets(cache)
    latents = latents_of([target for name, target in known.items() if targets is None or name in targets])
    if latents is None or not set(targets or ()) <= set(known):
        raise RequestError(
            f"{strategy} puts a teacher's latents into the student; {cache.store.url} has {sorted(known)}, "
            f"{'none of them latents' if targets is None else f'asked for were {sorted(targets)}'}"
        )
    return Rival(strategy, latents, cache.sampling.num_frames, hidden_size, standardised=standardised)


@torch.no_grad()
def latents_of_tokens(latents_ktyxc: Tensor, tokens: VideoTokens) -> tuple[Tensor, Tensor]:
    """The teacher's latents at each of one video's tokens; the way back of `student.p4d.rearrange`.

    In time, a student step takes the mean, over the frames it covers, of the teacher step of each frame. In space,
    bilinear with antialiasing. Where one token stands for several cells (VideoLLaMA3 leaves repeated ones out), it
    takes their mean. NaN has no weight in any of these means; a token with nothing else is left out.

    Args:
        latents_ktyxc: of one clip, float32; NaN where invalid.
        tokens: where its tokens lie.

    Returns:
        places (n,) in the sequence, ascending, each once; latents (n, k, c).
    """
    places = tokens.positions_tyx.flatten().to(latents_ktyxc.device)
    places_n, token_of_cell = torch.unique(places, return_inverse=True)
    valid_tyx = latents_ktyxc.isfinite().all(-1).all(0)
    values_ktyxc = latents_ktyxc.where(valid_tyx[None, ..., None], 0.0)
    channels = torch.cat((values_ktyxc.movedim(0, -2).flatten(-2), valid_tyx[..., None].to(values_ktyxc)), dim=-1)
    cells = _resized(channels, tokens).flatten(0, 2)
    sums = cells.new_zeros(len(places_n), cells.shape[-1]).index_add(0, token_of_cell, cells)
    known, weight = sums[:, -1] > 0, sums[:, -1:]
    features = (sums[:, :-1] / weight)[known]
    return places_n[known], features.reshape(len(features), len(latents_ktyxc), latents_ktyxc.shape[-1])


def _resized(values_tyxc: Tensor, tokens: VideoTokens) -> Tensor:
    """Values on the teacher's grid, brought to the grid of the tokens."""
    grid: Triple = tuple(tokens.positions_tyx.shape)  # type: ignore[assignment]
    weights = torch.tensor(_step_weights(tokens, len(values_tyxc)), device=values_tyxc.device)
    values_tcyx = torch.einsum("st,tyxc->scyx", weights, values_tyxc)
    if tuple(values_tcyx.shape[-2:]) != grid[1:]:
        values_tcyx = functional.interpolate(values_tcyx, grid[1:], mode="bilinear", antialias=True)
    return values_tcyx.movedim(1, -1)


def _step_weights(tokens: VideoTokens, num_steps: int) -> list[list[float]]:
    """Of every student step, the share of its frames that lie in each of the teacher's steps."""
    starts = first_frames(tokens.num_frames, num_steps)
    weights = [[0.0] * num_steps for _ in tokens.frame_spans]
    for shares, (first, last) in zip(weights, tokens.frame_spans, strict=True):
        for frame in range(first, last):
            shares[bisect_right(starts, frame) - 1] += 1 / (last - first)
    return weights
