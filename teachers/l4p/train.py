"""Train a small L4P on procedural worlds: `python -m teachers.l4p.train OUT --minutes 80`.

Worlds are rendered while it trains (`teachers.l4p._samples`). The learning rate follows the share of the time that
has passed, so a run of any length ends annealed; `--resume` goes on after a break, or with a new budget. What is
evaluated and saved is a running mean of the weights. Shape suffixes: `b` batch, `t` frames, `h w` pixels, `y x` ray
grid, `n` rays.
"""

import argparse
import contextlib
import copy
import csv
import math
import os
import queue
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from p4dprep.errors import P4DError, RequestError
from p4dprep.worlds.scene import PLAIN_SPLITS, Split
from teachers.l4p._samples import Batch, ClipRing, Renderers, RenderPlan, collate, random_batch, render_clip
from teachers.l4p.config import CONFIG_FILE, MODALITIES, WEIGHTS_FILE, L4PConfig, Modality
from teachers.l4p.model import L4P

MINI = L4PConfig(
    image_size=96, patch_size=16, hidden_size=192, num_layers=6, num_heads=4, mlp_size=768, taps=(2, 3, 5, 6),
    tap_channels=(32, 48, 64, 64), fusion_channels=16, hidden_channels=8,
)  # fmt: skip
"""The config of `l4p:mini`."""

_SPLITS: tuple[Split, ...] = ("train", *(split for split in PLAIN_SPLITS if split.endswith("train")))
CHECKPOINT_FILE = "checkpoint.pt"
CURVE_FILE = "curve.csv"


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How to train.

    Attributes:
        minutes: training time; the learning rate falls to nothing at its end.
        batch_size: clips of a step.
        learning_rate: highest rate of AdamW; Muon's update is scaled to the same size.
        weight_decay: of matrices.
        warmup_fraction: share of the time in which the learning rate rises.
        max_gradient: norm to which gradients are cut.
        ema_decay: of the running mean of the weights; shorter in the first steps.
        split: of the worlds; `train`, or that of plain worlds whose expert it shall be.
        seed: of worlds, augmentation and first weights.
        num_workers: rendering processes.
        num_threads: of torch; 0 leaves its own choice.
        device: torch's name of it.
        reuse: how often a clip is used, on average.
        prefill: clips in the ring before the first step.
        capacity: clips that the ring holds.
        num_val_clips: worlds in the evaluation: of split `val`, or of a plain split with the next seed.
        eval_minutes: time between evaluations.
        encoder_fraction: share of the time, the first, in which the encoder learns alone, from `token_losses`; a step
            without heads takes less than a third of the time.
    """

    minutes: float = 80.0
    batch_size: int = 8
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.02
    warmup_fraction: float = 0.03
    max_gradient: float = 1.0
    ema_decay: float = 0.998
    split: Split = "train"
    seed: int = 0
    num_workers: int = 1
    num_threads: int = 0
    device: str = "cpu"
    reuse: float = 6.0
    prefill: int = 256
    capacity: int = 4000
    num_val_clips: int = 64
    eval_minutes: float = 6.0
    encoder_fraction: float = 0.0

    def __post_init__(self) -> None:
        least = min(self.minutes, self.learning_rate, self.reuse, self.eval_minutes)
        if least <= 0 or min(self.batch_size, self.num_workers, self.prefill, self.num_val_clips) < 1:
            raise RequestError(f"times, rates and counts must be positive: {self}")
        if not 0 <= self.encoder_fraction < 1:
            raise RequestError(f"encoder_fraction {self.encoder_fraction} must be at least 0 and less than 1")
        if self.capacity < max(self.prefill, 2 * self.num_workers):
            raise RequestError(f"capacity {self.capacity} must hold the {self.prefill} clips of prefill")


RUN_OPTIONS = ("minutes", "split", "seed", "encoder_fraction")
"""What a run is, and keeps when it is resumed."""


# --- losses ---


def _mean_over(values: Tensor, valid: Tensor) -> Tensor:
    """Mean of the valid ones, or weighted mean; 0 if there are none."""
    return (values * valid).sum() / valid.sum().clamp_min(1)


def depth_losses(depth_b1thw: Tensor, target_b1thw: Tensor) -> dict[str, Tensor]:
    """L1 of the logarithm, and of its differences between neighbouring pixels."""
    valid = torch.isfinite(target_b1thw)
    error = depth_b1thw.clamp_min(1e-6).log() - torch.where(valid, target_b1thw, 1.0).clamp_min(1e-3).log()
    slope = torch.zeros((), device=error.device)
    for axis in (3, 4):
        length = valid.shape[axis] - 1
        both = valid.narrow(axis, 1, length) & valid.narrow(axis, 0, length)
        slope = slope + _mean_over(error.diff(dim=axis).abs(), both)
    return {"depth": _mean_over(error.abs(), valid), "depth_slope": slope}


def flow_losses(flow_b2thw: Tensor, target_b2thw: Tensor, moves_b1thw: Tensor) -> dict[str, Tensor]:
    """L1 in pixels, and on a logarithmic scale on which slow motion counts too.

    What moves weighs together as much as what stands: in a plain mean a small ball before a still camera is nothing.
    """
    valid = torch.isfinite(target_b2thw)
    weights = valid * _balance(moves_b1thw * valid[:, :1], valid[:, :1])
    target = torch.where(valid, target_b2thw, 0.0)

    def compressed(values: Tensor) -> Tensor:
        return values.sign() * values.abs().log1p()

    small = (compressed(flow_b2thw) - compressed(target)).abs()
    far = (flow_b2thw - target).abs().clamp_max(100.0)  # a surface that grazes the camera may fly any distance
    return {"flow": _mean_over(far, weights), "flow_log": _mean_over(small, weights)}


def _balance(moves: Tensor, valid: Tensor) -> Tensor:
    """Weights with which the valid that move weigh together as much as the others; 1 where all or none do."""
    share = moves.sum() / valid.sum().clamp_min(1)
    balanced = torch.where(moves > 0, 0.5 / share, 0.5 / (1 - share))
    return torch.where((share > 0) & (share < 1), balanced, 1.0)


def motion_losses(logits_b1thw: Tensor, target_b1thw: Tensor) -> dict[str, Tensor]:
    """Cross entropy in which what moves weighs more, and one less the soft intersection over union."""
    weight = 1 + 3 * target_b1thw
    entropy = functional.binary_cross_entropy_with_logits(logits_b1thw, target_b1thw, weight=weight)
    shown = logits_b1thw.sigmoid()
    both = (shown * target_b1thw).sum(dim=(1, 2, 3, 4))
    either = (shown + target_b1thw).sum(dim=(1, 2, 3, 4)) - both
    moves = target_b1thw.flatten(1).any(dim=1)
    return {"motion": entropy, "motion_iou": _mean_over(1 - (both + 1) / (either + 1), moves)}


LAGS = (0, 1, 4, 8)
"""Frames over which cameras are compared; 0 compares with the first frame."""


def camray_losses(rays_b6tyx: Tensor, batch: Batch) -> dict[str, Tensor]:
    """L1 of directions and moments, and of the rotations and camera centres that fit them best.

    With d the true directions and M = sum(I - d d'), the rotation vector that turns the predicted directions into the
    true ones is, to first order, inv(M) sum(d x d_predicted), and the centre that fits predicted moments is
    inv(M) sum(d x m_predicted). Errors of the single rays average out in both; what stays is the camera's error.
    """
    rays, target = rays_b6tyx.flatten(3), batch.rays_b6tyx.flatten(3)
    true_direction = target[:, :3].permute(0, 2, 3, 1)  # b t n 3
    error = (rays - target).permute(0, 2, 3, 1)
    normal = true_direction.shape[2] * torch.eye(3, device=rays.device) - true_direction.mT @ true_direction
    crossed = torch.stack(
        [torch.linalg.cross(true_direction, part).sum(2) for part in (error[..., :3], error[..., 3:])], dim=-1
    )
    rotation, centre = torch.linalg.solve(normal, crossed).unbind(-1)  # errors, b t 3
    return {
        "ray": error[..., :3].abs().mean(),
        "moment": error[..., 3:].abs().mean(),
        "rotation": torch.stack([_norm(_steps(rotation, lag)).mean() for lag in LAGS]).mean(),
        "centre": torch.stack([_share(centre, batch.origin_bt3, lag).mean() for lag in LAGS]).mean(),
    }


def _share(error_bt3: Tensor, origin_bt3: Tensor, lag: int) -> Tensor:
    """The error of the way the camera went in `lag` frames, over the way's length: about the angle between the two."""
    return _norm(_steps(error_bt3, lag)) / (_norm(_steps(origin_bt3, lag)) + 0.1)


def _steps(values_bt3: Tensor, lag: int) -> Tensor:
    """Differences to `lag` frames before; 0 for the values themselves."""
    lag = lag if lag < values_bt3.shape[1] else 0
    return values_bt3[:, lag:] - values_bt3[:, :-lag] if lag else values_bt3


def _norm(values: Tensor) -> Tensor:
    return (values.square().sum(-1) + 1e-8).sqrt()


WEIGHTS = {
    "depth": 2.0, "depth_slope": 1.0, "flow": 0.2, "flow_log": 2.0, "motion": 1.0, "motion_iou": 0.5,
    "ray": 4.0, "moment": 0.5, "rotation": 4.0, "centre": 1.0, "token_flow": 1.0, "token_depth": 1.0,
    "token_motion": 4.0,
}  # fmt: skip
"""What each loss counts; chosen so that none of the four maps drowns another; not tuned."""


def losses(maps: dict[Modality, Tensor], batch: Batch) -> dict[str, Tensor]:
    """Every loss, unweighted."""
    return {
        **depth_losses(maps["depth"], batch.depth_b1thw),
        **flow_losses(maps["flow"][:, :, 1:], batch.flow_b2thw[:, :, 1:], batch.motion_b1thw[:, :, 1:]),
        **motion_losses(maps["motion"], batch.motion_b1thw),
        **camray_losses(maps["camray"], batch),
    }


TOKEN_CHANNELS = 4
"""What is read off a token: flow (u, v) in pixels and log depth of what moves in its cell, the logit of its share."""


def token_losses(said_btyxc: Tensor, batch: Batch) -> dict[str, Tensor]:
    """What tokens tell of all that moves in their cells: L1 of mean flow and log depth, cross entropy of its share.

    Args:
        said_btyxc: (b, steps, rows, columns, TOKEN_CHANNELS), read off the deepest tap.
        batch: the truth, averaged over cells here. Flow is of those frames that have any.
    """
    cell = [size // cells for size, cells in zip(batch.motion_b1thw.shape[2:], said_btyxc.shape[1:4], strict=True)]

    def averaged(values: Tensor) -> Tensor:
        return functional.avg_pool3d(values, cell).movedim(1, -1)

    moves = batch.motion_b1thw * torch.isfinite(batch.depth_b1thw)
    flows = moves * torch.isfinite(batch.flow_b2thw).all(dim=1, keepdim=True)
    share, flow_share = averaged(moves), averaged(flows)
    log_depth = averaged(torch.where(moves > 0, batch.depth_b1thw.clamp_min(1e-3).log(), 0.0)) / share.clamp_min(1e-6)
    flow = averaged(torch.where(flows > 0, batch.flow_b2thw, 0.0)) / flow_share.clamp_min(1e-6)
    return {
        "token_flow": _mean_over((said_btyxc[..., :2] - flow).abs().mean(-1, keepdim=True), flow_share),
        "token_depth": _mean_over((said_btyxc[..., 2:3] - log_depth).abs(), share),
        "token_motion": functional.binary_cross_entropy_with_logits(said_btyxc[..., 3:], share),
    }


# --- model ---


FIRST_BIAS: dict[Modality, tuple[float, ...]] = {
    "depth": (math.log(6.0),), "flow": (0.0, 0.0), "motion": (-3.0,), "camray": (0.0, 0.0, 1.0, 0.0, 0.0, 0.0),
}  # fmt: skip
"""What the heads say at first: 6 m, no flow, nothing moves, a camera that looks ahead and stays."""


def fresh_model(config: L4PConfig, seed: int) -> L4P:
    """A model whose first weights suit short training.

    Attention starts as in mimetic initialisation (Trockman and Kolter, ICML 2023, arXiv 2305.09828): queries and keys
    are the same projection, so that a token looks at tokens like itself, and values pass through with their sign
    changed.
    """
    torch.manual_seed(seed)
    model = L4P(config)
    for block in model.encoder.encoder.layer:
        attention, out = block.attention.attention, block.attention.output.dense
        _mimetic(attention, out)
    with torch.no_grad():
        model.encoder.embeddings.patch_embeddings.projection.weight.copy_(whitening_patches(config))
    for modality in MODALITIES:
        _begin_head(model, modality)
    return model


@torch.no_grad()
def _begin_head(model: L4P, modality: Modality) -> None:
    """The last layers as they are at first; see LAST_LAYERS."""
    head = cast(Any, model.heads[modality])
    for name in LAST_LAYERS:
        getattr(head, name).reset_parameters()
    head.predict.bias.copy_(torch.tensor(FIRST_BIAS[modality]))
    head.predict.weight.mul_(0.1)
    head.smooth.bias.fill_(1.0)


@torch.no_grad()
def revive_heads(model: L4P, batch: Batch) -> list[Modality]:
    """Begin the last layers of those heads anew whose last ReLU lets next to nothing through: they learn no more.

    Returns:
        Which.
    """
    taps = model.encode(batch.pixels_bcthw)
    silent: list[Modality] = []
    for modality in MODALITIES:
        passed: list[float] = []
        smooth = cast(nn.Module, cast(Any, model.heads[modality]).smooth)
        hook = smooth.register_forward_hook(
            lambda _module, _args, out, seen=passed: seen.append((out > 0).float().mean().item())
        )
        model.heads[modality](taps)
        hook.remove()
        if passed[0] < SILENT:
            _begin_head(model, modality)
            silent.append(modality)
    return silent


def whitening_patches(config: L4PConfig) -> Tensor:
    """Weights (c, 3, t, y, x) of a patch embedding whose outputs are uncorrelated and of about equal variance.

    They are cosine transforms in space, of the sum and the difference of a tube's frames, of brightness and two
    opponent colours; those are taken that vary most. Unwhitened, the mean brightness varies thirty times more than
    what motion changes, and a random projection hides motion behind it. The spectrum was fitted to rendered worlds.
    """
    size, tube = config.patch_size, config.tubelet_size
    colours = functional.normalize(torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [1.0, 1.0, -2.0]]))
    space, time = _cosines(size), _cosines(tube)
    filters = torch.einsum("kc,st,uy,vx->ksuvctyx", colours, time, space, space).flatten(0, 3)
    steps = torch.arange(size)[:, None] + torch.arange(size)  # u + v
    still, moving = 30 / (1 + 2.2 * steps) ** 1.3, 1.8 / (1 + 0.25 * steps) ** 1.25
    spread = torch.stack([still, *[moving] * (tube - 1)])  # s u v
    spread = (torch.tensor([1.0, 0.4, 0.4])[:, None, None, None] * spread).flatten() * size / 16
    chosen = spread.argsort(descending=True, stable=True)[: config.hidden_size]
    return (filters[chosen] / spread[chosen, None, None, None, None]).float()


def _cosines(length: int) -> Tensor:
    """The orthonormal cosine transform (frequency, place)."""
    place = (torch.arange(length) + 0.5) / length
    waves = torch.cos(math.pi * torch.arange(length)[:, None] * place) * math.sqrt(2 / length)
    waves[0] /= math.sqrt(2)
    return waves


@torch.no_grad()
def _mimetic(attention: nn.Module, out: nn.Linear) -> None:
    query, key, value = (cast(nn.Linear, getattr(attention, name)) for name in ("query", "key", "value"))
    width, size = query.in_features, query.in_features // cast(int, attention.num_attention_heads)
    for start in range(0, width, size):
        rows = torch.linalg.qr(torch.randn(width, size))[0].T
        query.weight[start : start + size] = 0.7 * rows + 0.3 * torch.randn(size, width) / math.sqrt(width)
        key.weight[start : start + size] = 0.7 * rows + 0.3 * torch.randn(size, width) / math.sqrt(width)
    value.weight.copy_(torch.linalg.qr(torch.randn(width, width))[0] * 0.6)
    out.weight.copy_(-0.6 * value.weight.T + 0.3 * torch.randn(width, width) / math.sqrt(width))


def _has_fast_bfloat16(device_type: str) -> bool:
    """Whether bfloat16 is worth it: a CPU that only imitates it takes many times as long as in float32."""
    if device_type != "cpu":
        return True
    known = torch.cpu.get_capabilities()
    return any(known.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def _half(model: L4P, device_type: str) -> torch.autocast:
    """bfloat16, but not on CPUs without it, nor for models whose deepest grid is narrower than 3.

    On the CPU, oneDNN's weight gradient of a bfloat16 3x3x3 convolution over 2 cells or fewer holds memory that was
    never written (torch 2.15; a test compares them).
    """
    is_safe = min(model.config.head("depth").tap_grids[-1]) >= 3
    return torch.autocast(device_type, torch.bfloat16, enabled=is_safe and _has_fast_bfloat16(device_type))


def encode(model: L4P, pixels_bcthw: Tensor) -> tuple[Tensor, ...]:
    """The taps, in bfloat16 where that is fast."""
    with _half(model, pixels_bcthw.device.type):
        return model.encode(pixels_bcthw)


def predict(model: L4P, taps: tuple[Tensor, ...]) -> dict[Modality, Tensor]:
    """The maps of `encode`'s taps, in bfloat16 where that is fast, but for camera rays, whose last digits matter."""
    with _half(model, taps[0].device.type):
        maps: dict[Modality, Tensor] = {name: model.heads[name](taps) for name in MODALITIES if name != "camray"}
    maps["camray"] = model.heads["camray"]([tap.float() for tap in taps])
    return maps


LAST_LAYERS, LAST_SHARE = ("narrow", "smooth", "predict"), 0.2
"""The layers behind and before a head's last ReLU learn at a fifth of the rate, and start with all units on. Until the
encoder sees motion, the best flow is none, and at the full rate the head finds it by silencing every unit of that ReLU
within a few hundred steps: no gradient comes through again. (Seen both times it was looked for.)"""


SILENT = 1e-3
"""A head whose last ReLU lets through less than this share, over units and pixels, is dead."""


class Optimizer:
    """Muon (Jordan et al. 2024) for the encoder's matrices, AdamW for everything else, under one learning rate."""

    def __init__(self, model: L4P, options: TrainOptions, readout: nn.Linear) -> None:
        matrices: list[Tensor] = []
        others: list[Tensor] = []
        vectors: list[Tensor] = list(readout.parameters())
        last: list[Tensor] = []
        for name, parameter in model.named_parameters():
            if name.startswith("encoder.encoder.layer") and parameter.ndim == 2:
                matrices.append(parameter)
            elif name.startswith("heads.") and name.split(".")[2] in LAST_LAYERS:
                last.append(parameter)
            else:
                (others if parameter.ndim > 1 else vectors).append(parameter)
        decay = options.weight_decay
        self._parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(
                [
                    {"params": others, "weight_decay": decay, "share": 1.0},
                    {"params": vectors, "weight_decay": 0.0, "share": 1.0},
                    {"params": last, "weight_decay": 0.0, "share": LAST_SHARE},
                ],
                betas=(0.9, 0.98),
                fused=True,
            ),
        ]

    def step(self, learning_rate: float) -> None:
        """Update the weights and forget the gradients."""
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = learning_rate * group.get("share", 1.0)
            part.step()
            part.zero_grad(set_to_none=True)

    def state_dicts(self) -> list[dict[str, Any]]:
        """For a checkpoint."""
        return [part.state_dict() for part in self._parts]

    def load_state_dicts(self, states: list[dict[str, Any]]) -> None:
        """From a checkpoint."""
        for part, state in zip(self._parts, states, strict=True):
            part.load_state_dict(state)


class Trainer:
    """Weights, their running mean, the optimiser, and where the schedule stands.

    `readout` reads `TOKEN_CHANNELS` off the tokens for `token_losses`, and is no part of the model.
    """

    def __init__(self, model: L4P, options: TrainOptions) -> None:
        self.options = options
        self.model = model.to(options.device).train()
        if options.device == "cpu":  # in bfloat16 a third faster there than the fused attention
            self.model.encoder.set_attn_implementation("eager")
            self.model.heads.to(memory_format=torch.channels_last_3d)  # a tenth faster
        self.mean = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.readout = nn.Linear(model.config.hidden_size, TOKEN_CHANNELS).to(options.device)
        nn.init.zeros_(self.readout.weight)
        self.optimizer = Optimizer(self.model, options, self.readout)
        self.num_steps = 0
        self.elapsed_seconds = 0.0
        self.next_index = 0

    @property
    def fraction(self) -> float:
        """Share of the time that has passed."""
        return min(1.0, self.elapsed_seconds / (60 * self.options.minutes))

    def learning_rate(self) -> float:
        """Rises linearly, then falls as a cosine."""
        warmup = self.options.warmup_fraction
        if self.fraction < warmup:
            return self.options.learning_rate * max(self.fraction / warmup, 0.02)
        return self.options.learning_rate * 0.5 * (1 + math.cos(math.pi * (self.fraction - warmup) / (1 - warmup)))

    def step(self, batch: Batch) -> dict[str, float]:
        """One update.

        Returns:
            The unweighted losses.

        Raises:
            FloatingPointError: the loss is no finite number.
        """
        taps = encode(self.model, batch.pixels_bcthw)
        parts: dict[str, Tensor] = {}
        if self.options.encoder_fraction:
            said = self.readout(taps[-1].float()).unflatten(1, self.model.config.token_grid)
            parts = token_losses(said, batch)
        if self.fraction >= self.options.encoder_fraction:
            parts |= losses(predict(self.model, taps), batch)
        total = sum((WEIGHTS[name] * value for name, value in parts.items()), torch.zeros(()))
        torch.autograd.backward(total)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.options.max_gradient)
        values = {name: value.item() for name, value in parts.items()} | {"gradient": norm.item()}
        if not all(map(math.isfinite, values.values())):
            raise FloatingPointError(f"step {self.num_steps}: {values}; go on from the checkpoint, with a lower rate")
        self.optimizer.step(self.learning_rate())
        self.num_steps += 1
        decay = min(self.options.ema_decay, (1 + self.num_steps) / (10 + self.num_steps))
        torch._foreach_lerp_(list(self.mean.parameters()), list(self.model.parameters()), 1 - decay)
        return values

    def save(self, folder: Path) -> None:
        """Write the checkpoint, and `folder/model` as `L4P.from_pretrained` reads it, each whole or not at all."""
        state = {
            "config": asdict(self.model.config),
            "options": asdict(self.options),
            "model": self.model.state_dict(),
            "mean": self.mean.state_dict(),
            "readout": self.readout.state_dict(),
            "optimizer": self.optimizer.state_dicts(),
            "num_steps": self.num_steps,
            "elapsed_seconds": self.elapsed_seconds,
            "next_index": self.next_index,
        }
        torch.save(state, folder / f"{CHECKPOINT_FILE}.part")
        os.replace(folder / f"{CHECKPOINT_FILE}.part", folder / CHECKPOINT_FILE)
        part = folder / "model.part"
        copy.deepcopy(self.mean).cpu().half().save_pretrained(part)
        (folder / "model").mkdir(exist_ok=True)
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            os.replace(part / name, folder / "model" / name)
        shutil.rmtree(part)

    @classmethod
    def load(cls, folder: Path, options: TrainOptions) -> "Trainer":
        """From the checkpoint; the options are the caller's but for `RUN_OPTIONS`, which belong to the run.

        Raises:
            RequestError: there is none, or one of an older version.
        """
        try:
            state = torch.load(folder / CHECKPOINT_FILE, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise RequestError(f"nothing to resume: {folder / CHECKPOINT_FILE} is missing") from None
        config = state["config"]
        sequences = {name: tuple(value) for name, value in config.items() if isinstance(value, list | tuple)}
        if "readout" not in state:
            raise RequestError(f"{folder} is of an older version; begin another with --init {folder / 'model'}")
        options = replace(options, **{name: state["options"][name] for name in RUN_OPTIONS})
        trainer = cls(L4P(L4PConfig(**(config | sequences))), options)
        trainer.model.load_state_dict(state["model"])
        trainer.mean.load_state_dict(state["mean"])
        trainer.readout.load_state_dict(state["readout"])
        trainer.optimizer.load_state_dicts(state["optimizer"])
        trainer.num_steps, trainer.next_index = state["num_steps"], state["next_index"]
        trainer.elapsed_seconds = state["elapsed_seconds"]
        return trainer


# --- evaluation ---


@torch.no_grad()
def evaluate(model: L4P, batches: list[Batch]) -> dict[str, float]:
    """The goal's figures, each a mean over clips; depth is compared as it is, in metres.

    `abs_rel`, `delta1`; `epe` in pixels and `epe_of_zero`, its ratio to that of no flow at all; `motion_iou`, 1 where
    nothing moves and nothing is said to; `rotation_auc15` and `translation_auc15` over all pairs of frames, the latter
    of those pairs between which the camera moved by 2 cm or more.
    """
    rows: list[dict[str, Tensor]] = []
    for batch in batches:
        maps = predict(model, encode(model, batch.pixels_bcthw))
        rows.append(_depth_figures(maps["depth"], batch.depth_b1thw))
        rows[-1] |= _flow_figures(maps["flow"][:, :, 1:], batch.flow_b2thw[:, :, 1:])
        rows[-1] |= _motion_figures(maps["motion"] > 0, batch.motion_b1thw > 0.5)
        rows[-1] |= _camera_figures(maps["camray"], batch)
    means = {name: torch.cat([row[name].float() for row in rows]).nanmean().item() for name in rows[0]}
    return means | {"epe_of_zero": means["epe"] / means.pop("epe_zero")}


def _clip_mean(values: Tensor, valid: Tensor) -> Tensor:
    return (torch.where(valid, values, 0.0).flatten(1).sum(1)) / valid.flatten(1).sum(1)


def _depth_figures(depth: Tensor, target: Tensor) -> dict[str, Tensor]:
    valid = torch.isfinite(target)
    close = torch.maximum(depth / target, target / depth) < 1.25
    return {
        "abs_rel": _clip_mean((depth - target).abs() / target, valid),
        "delta1": _clip_mean(close.float(), valid),
    }


def _flow_figures(flow: Tensor, target: Tensor) -> dict[str, Tensor]:
    valid = torch.isfinite(target).all(dim=1)
    return {
        "epe": _clip_mean((flow - target).norm(dim=1), valid),
        "epe_zero": _clip_mean(target.norm(dim=1), valid),
    }


def _motion_figures(shown: Tensor, target: Tensor) -> dict[str, Tensor]:
    both, either = (shown & target).flatten(1).sum(1), (shown | target).flatten(1).sum(1)
    return {"motion_iou": torch.where(either > 0, both / either.clamp_min(1), 1.0)}


def cameras_from_rays(rays_b6tyx: Tensor) -> tuple[Tensor, Tensor]:
    """Rotations (b, t, 3, 3), camera 0 to camera t, and centres (b, t, 3) that fit rays best.

    The rotation turns the first frame's directions into a frame's (Kabsch); the centre o fits o x d = m by least
    squares.
    """
    rays = rays_b6tyx.double().flatten(3).permute(0, 2, 3, 1)
    directions, moments = functional.normalize(rays[..., :3], dim=-1), rays[..., 3:]
    left, _, right = torch.linalg.svd(directions.mT @ directions[:, :1])
    signs = torch.ones_like(left[..., 0])
    signs[..., 2] = torch.linalg.det(left @ right)
    rotation = (left * signs[..., None, :]) @ right
    normal = directions.shape[2] * torch.eye(3, dtype=rays.dtype, device=rays.device) - directions.mT @ directions
    centre = torch.linalg.solve(normal, torch.linalg.cross(directions, moments).sum(2))
    return rotation.mT, centre


def _camera_figures(rays: Tensor, batch: Batch) -> dict[str, Tensor]:
    rotation, centre = cameras_from_rays(rays)
    true_rotation, true_centre = cameras_from_rays(batch.rays_b6tyx)
    first, second = torch.triu_indices(rays.shape[2], rays.shape[2], 1)

    def relative(rotation: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
        turned = rotation[:, second] @ rotation[:, first].mT
        return turned, (rotation[:, first] @ (centre[:, second] - centre[:, first])[..., None])[..., 0]

    turned, moved = relative(rotation, centre)
    true_turned, true_moved = relative(true_rotation, true_centre)
    cosine = ((turned.mT @ true_turned).diagonal(dim1=-2, dim2=-1).sum(-1) - 1) / 2
    angle = functional.cosine_similarity(moved, true_moved, dim=-1).clamp(-1, 1).acos().rad2deg()
    angle = torch.where(true_moved.norm(dim=-1) >= 0.02, angle, torch.nan)
    return {"rotation_auc15": _auc(cosine.clamp(-1, 1).acos().rad2deg()), "translation_auc15": _auc(angle)}


def _auc(degrees_bn: Tensor, limit: int = 15) -> Tensor:
    """Mean over the thresholds 1..limit of the share of errors below; NaN where every error is."""
    below = torch.stack([(degrees_bn < threshold).double() for threshold in range(1, limit + 1)]).mean(0)
    return torch.where(degrees_bn.isnan(), torch.nan, below).nanmean(1)


def validation_batches(folder: Path, config: L4PConfig, options: TrainOptions) -> list[Batch]:
    """Worlds that are not learnt from, rendered once and kept in the folder."""
    place: tuple[Split, int] = ("val", 0) if options.split == "train" else (options.split, options.seed + 1)
    ring = ClipRing.open(folder / "val", options.num_val_clips, config.num_frames, config.image_size)
    for index in range(ring.next_index(), options.num_val_clips):
        ring.write(index, render_clip(*place, index, config.num_frames, config.image_size))
    clips = [clip for clip in map(ring.read, range(options.num_val_clips)) if clip is not None]
    return [collate(clips[start : start + 8]).to(options.device) for start in range(0, len(clips), 8)]


# --- the run ---


@contextlib.contextmanager
def _stop_asked() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set, instead of ending the process."""
    asked = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        asked.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _batches_ahead(make: Callable[[], Batch], depth: int = 2) -> Iterator[Callable[[], Batch]]:
    """Makes batches in a thread, so many ahead; an error there is raised here."""
    ready: queue.Queue[Batch | BaseException] = queue.Queue(depth)
    ended = threading.Event()

    def work() -> None:
        while not ended.is_set():
            try:
                made: Batch | BaseException = make()
            except BaseException as error:
                made = error
            while not ended.is_set():
                with contextlib.suppress(queue.Full):
                    ready.put(made, timeout=0.5)
                    break

    def take() -> Batch:
        made = ready.get()
        if isinstance(made, BaseException):
            raise made
        return made

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield take
    finally:
        ended.set()
        thread.join()


def train(folder: Path, trainer: Trainer) -> dict[str, float]:
    """Train until the time is over or SIGTERM comes, saving on the way.

    Returns:
        The last evaluation's figures; empty if SIGTERM came first.
    """
    options, config = trainer.options, trainer.model.config
    folder.mkdir(parents=True, exist_ok=True)
    ring = ClipRing.open(folder / "clips", options.capacity, config.num_frames, config.image_size)
    trainer.next_index = max(trainer.next_index, ring.next_index())
    plan = RenderPlan(
        folder=ring.folder, capacity=options.capacity, num_frames=config.num_frames, size=config.image_size,
        split=options.split, seed=options.seed, first_index=trainer.next_index, step=1,
    )  # fmt: skip
    with _stop_asked() as stop, contextlib.closing(Renderers(ring, plan, options.num_workers)) as renderers:
        renderers.permit(max(0, options.prefill - len(ring.filled())))
        validation = validation_batches(folder, config, options)
        while len(ring.filled()) < options.prefill and not stop.wait(0.2):
            renderers.check()
        if trainer.num_steps == 0 and (revived := revive_heads(trainer.model, validation[0])):
            trainer.mean.load_state_dict(trainer.model.state_dict())
            print(f"begun anew, since silent: the last layers of {', '.join(revived)}", file=sys.stderr, flush=True)
        random = np.random.default_rng([options.seed, trainer.num_steps])
        with _batches_ahead(lambda: random_batch(ring, options.batch_size, random)) as take:
            return _loop(folder, trainer, renderers, take, validation, stop)


def _loop(
    folder: Path,
    trainer: Trainer,
    renderers: Renderers,
    take: Callable[[], Batch],
    validation: list[Batch],
    stop: threading.Event,
) -> dict[str, float]:
    options = trainer.options
    figures: dict[str, float] = {}
    sums: dict[str, float] = {}
    since_step, since, waited, owed = trainer.num_steps, time.monotonic(), 0.0, 0.0
    next_eval = trainer.elapsed_seconds + 60 * options.eval_minutes
    while trainer.fraction < 1 and not stop.is_set():
        started = time.monotonic()
        batch = take().to(options.device)
        waited += time.monotonic() - started
        for name, value in trainer.step(batch).items():
            sums[name] = sums.get(name, 0.0) + value
        owed += options.batch_size / options.reuse
        renderers.permit(int(owed))
        owed -= int(owed)
        if not stop.is_set():
            renderers.check()
        trainer.elapsed_seconds += time.monotonic() - started
        num_steps = trainer.num_steps - since_step
        if time.monotonic() - since > 30 or trainer.fraction >= 1:
            seconds = time.monotonic() - since
            _talk(
                trainer,
                {name: value / num_steps for name, value in sums.items()},
                seconds / num_steps,
                waited / seconds,
            )
            sums, since_step, since, waited = {}, trainer.num_steps, time.monotonic(), 0.0
        if trainer.elapsed_seconds >= next_eval or trainer.fraction >= 1:
            figures = evaluate(trainer.mean, validation)
            _log_figures(folder, trainer, figures)
            trainer.next_index = renderers.ring.next_index()
            trainer.save(folder)
            trainer.elapsed_seconds += time.monotonic() - since if trainer.fraction < 1 else 0.0
            next_eval = trainer.elapsed_seconds + 60 * options.eval_minutes
            since = time.monotonic()
    if trainer.fraction < 1:
        trainer.next_index = renderers.ring.next_index()
        trainer.save(folder)
        print(f"stopped at step {trainer.num_steps}; --resume goes on", file=sys.stderr, flush=True)
    return figures


def _talk(trainer: Trainer, means: dict[str, float], seconds_per_step: float, waiting_fraction: float) -> None:
    left = (1 - trainer.fraction) * trainer.options.minutes
    shown = " ".join(f"{name} {value:.3f}" for name, value in means.items())
    print(
        f"step {trainer.num_steps} ({trainer.fraction:.1%}, {left:.1f} min left): {shown} | "
        f"{1000 * seconds_per_step:.0f} ms/step, {trainer.options.batch_size / seconds_per_step:.2f} clips/s, "
        f"waiting {waiting_fraction:.0%}, lr {trainer.learning_rate():.1e}",
        file=sys.stderr,
        flush=True,
    )


def _log_figures(folder: Path, trainer: Trainer, figures: dict[str, float]) -> None:
    row = {"step": trainer.num_steps, "minutes": round(trainer.elapsed_seconds / 60, 2)}
    print(
        "validation " + " ".join(f"{name} {value:.4f}" for name, value in figures.items()), file=sys.stderr, flush=True
    )
    path = folder / CURVE_FILE
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [*row, *figures])
        if is_new:
            writer.writeheader()
        writer.writerow(row | {name: round(value, 5) for name, value in figures.items()})


def start(folder: Path, options: TrainOptions, *, init: Path | None, config: L4PConfig = MINI) -> Trainer:
    """A trainer at step 0, of fresh weights or those of a folder.

    Raises:
        RequestError: the folder holds a run already.
    """
    if (folder / CHECKPOINT_FILE).exists():
        raise RequestError(f"{folder} holds a run; add --resume to go on with it, or choose another folder")
    model = fresh_model(config, options.seed) if init is None else L4P.from_pretrained(init).float()
    return Trainer(model.requires_grad_(True), options)


def resume(folder: Path, options: TrainOptions, minutes: float | None) -> Trainer:
    """The trainer of a run's checkpoint. With `minutes` a schedule of so many begins; else the old one goes on."""
    trainer = Trainer.load(folder, options)
    if minutes is not None:
        trainer.options = replace(trainer.options, minutes=minutes)
        trainer.elapsed_seconds = 0.0
    return trainer


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m teachers.l4p.train", description="Train l4p:mini on worlds.")
    defaults = TrainOptions()
    parser.add_argument("out", type=Path, help="folder of checkpoint, curve.csv, model and clips")
    parser.add_argument("--minutes", type=float, help=f"training time (default {defaults.minutes:.0f})")
    parser.add_argument(
        "--resume", action="store_true",
        help=f"go on as the run began ({', '.join(RUN_OPTIONS)}); with --minutes, for a new schedule of so many",
    )  # fmt: skip
    parser.add_argument("--init", type=Path, help="start from the weights of a folder, such as the shipped ones")
    parser.add_argument("--batch-size", type=int, default=defaults.batch_size)
    parser.add_argument("--lr", type=float, default=defaults.learning_rate)
    parser.add_argument("--split", choices=_SPLITS, help=f"of worlds (default {defaults.split})")
    parser.add_argument("--seed", type=int, help=f"of worlds and weights (default {defaults.seed})")
    parser.add_argument("--workers", type=int, default=defaults.num_workers, help="rendering processes")
    parser.add_argument("--threads", type=int, default=defaults.num_threads, help="of torch; 0: its own choice")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--reuse", type=float, default=defaults.reuse, help="how often a clip is used, on average")
    parser.add_argument("--prefill", type=int, default=defaults.prefill, help="clips before the first step")
    parser.add_argument("--capacity", type=int, default=defaults.capacity, help="clips kept, about 2 MB each")
    parser.add_argument("--eval-minutes", type=float, default=defaults.eval_minutes)
    parser.add_argument(
        "--encoder-fraction", type=float,
        help=f"share of the time, first, in which the encoder learns alone what moves "
        f"(default {defaults.encoder_fraction:g})",
    )  # fmt: skip
    given = parser.parse_args()
    begun = {
        name: value for name in ("split", "seed", "encoder_fraction") if (value := getattr(given, name)) is not None
    }
    if given.resume and (begun or given.init):
        parser.error(f"--resume goes on as the run began: leave out {', '.join(begun) or 'init'}")
    try:
        options = TrainOptions(
            minutes=given.minutes or defaults.minutes, batch_size=given.batch_size, learning_rate=given.lr,
            num_workers=given.workers, num_threads=given.threads,
            device=given.device, reuse=given.reuse, prefill=given.prefill, capacity=given.capacity,
            eval_minutes=given.eval_minutes, **begun,
        )  # fmt: skip
        if options.num_threads:
            torch.set_num_threads(options.num_threads)
        trainer = (
            resume(given.out, options, given.minutes) if given.resume else start(given.out, options, init=given.init)
        )
        num_parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
        print(f"{num_parameters / 1e6:.2f} M parameters on {options.device}", file=sys.stderr)
        train(given.out, trainer)
    except P4DError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
