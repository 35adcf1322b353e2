"""The losses of P4D (arXiv 2512.17012 Sec. 4.2 and A1.3), and which of them a quantity allows.

Reductions. The paper sums smooth L1 over the steps n' and frames n; inside one it is torch's own, a mean. So every
loss here is the mean over the valid pixels and channels of a frame, summed over frames, then averaged over the
batch (each clip counts alike); the latent loss is averaged over taps, so that `latent_weight` does not depend on how
many the teacher gave. smooth L1 has beta 1, torch's default. A frame without a valid pixel adds nothing to the sum.
Every mean over a frame can be a weighted one, see `motion_balance`.

Shape suffixes: `b` batch, `k` taps, `t y x` frames, rows and columns, `n` all pixels of a frame, `c` channels.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from p4dprep.errors import RequestError
from p4dprep.targets import Quantity

Loss = Literal["smooth_l1", "log_smooth_l1", "cross_entropy", "scale_shift_invariant"]

LOSSES: Mapping[Quantity, tuple[Loss, ...]] = {
    "metric depth": ("log_smooth_l1", "smooth_l1", "scale_shift_invariant"),
    "relative depth": ("scale_shift_invariant",),
    "relative disparity": ("scale_shift_invariant",),
    "backward flow": ("smooth_l1",),
    "forward flow": ("smooth_l1",),
    "motion logit": ("smooth_l1",),
    "motion mask": ("cross_entropy",),
    "plücker rays": ("smooth_l1",),
}
"""Losses a quantity allows, the default first."""

_MIN_SPREAD = 1e-6
_LEAST_SHARE = 0.01


def choose_loss(array: str, quantity: Quantity, asked: Loss | None) -> Loss:
    """The loss for a target: the one asked for, or the default of its quantity.

    Args:
        array: the target's name, for messages.
        quantity: what it measures.
        asked: None takes the default.

    Raises:
        RequestError: the quantity is no map to learn, or the loss has no meaning for it; above all a loss that
            compares as they stand numbers known only up to scale and shift.
    """
    allowed = LOSSES.get(quantity)
    if allowed is None:
        raise RequestError(f"{array} is {quantity}, which is not learnt; what is: {', '.join(LOSSES)}")
    if asked is None or asked in allowed:
        return asked or allowed[0]
    why = "is known up to scale and shift only" if allowed == ("scale_shift_invariant",) else "is no such thing"
    raise RequestError(f"{array}: loss {asked} is refused, since {quantity} {why}; use {' or '.join(allowed)}")


def motion_balance(moving_btyx: Tensor) -> Tensor:
    """Weights, of mean 1 in every frame, with which what moves counts together as much as what stands.

    In a plain mean a ball that covers a hundredth of the frame is worth a hundredth, however well it tells of motion.
    Where one of both has less than a hundredth of a frame, balance fades to the plain mean, so that a few cells taken
    for moving never rule a frame: no weight passes 1 / (2 * 0.01).

    Args:
        moving_btyx: share of each cell that moves, in [0, 1].
    """
    share = moving_btyx.mean(dim=(2, 3), keepdim=True)
    balanced = moving_btyx / share.clamp_min(_MIN_SPREAD) + (1 - moving_btyx) / (1 - share).clamp_min(_MIN_SPREAD)
    strength = (torch.minimum(share, 1 - share) / _LEAST_SHARE).clamp_max(1)
    return 1 + strength * (balanced / 2 - 1)


def latent_losses(predicted_bktyxc: Tensor, target_bktyxc: Tensor, weights_btyx: Tensor | None = None) -> Tensor:
    """L_LD (Sec. 4.2) of every tap, (k,): smooth L1, mean over a step's tokens and channels, sum over steps.

    Args:
        predicted_bktyxc: the student's.
        target_bktyxc: the teacher's, of the same shape.
        weights_btyx: of the tokens, of mean 1 in every step; None weighs all alike.
    """
    difference = functional.smooth_l1_loss(predicted_bktyxc, target_bktyxc, reduction="none").mean(dim=5)
    if weights_btyx is not None:
        difference = difference * weights_btyx[:, None]
    return difference.mean(dim=(3, 4)).sum(dim=2).mean(dim=0)


def map_loss(predicted_btyxc: Tensor, target_btyxc: Tensor, loss: Loss, weights_btyx: Tensor | None = None) -> Tensor:
    """One modality's part of L_ED (Sec. 4.2), unweighted, a scalar.

    `log_smooth_l1` compares logarithms (the authors' release); `cross_entropy` takes logits and a mask of 0 and 1.
    A pixel whose target has a NaN in any channel is left out.

    Args:
        predicted_btyxc: finite map; positive for a loss of logarithms.
        target_btyxc: of the same shape, NaN where invalid.
        loss: how they are compared.
        weights_btyx: of the pixels; None weighs all alike.
    """
    valid = target_btyxc.isfinite().all(dim=-1)
    # No NaN may enter the arithmetic: its gradient would be NaN even where a mask hides it.
    target = torch.where(valid[..., None], target_btyxc, 1.0)
    if loss == "scale_shift_invariant":
        values = _invariant_difference(predicted_btyxc, target, valid)
    elif loss == "cross_entropy":
        values = functional.binary_cross_entropy_with_logits(predicted_btyxc, target, reduction="none")
    elif loss == "log_smooth_l1":
        smallest = torch.finfo(predicted_btyxc.dtype).tiny
        values = functional.smooth_l1_loss(predicted_btyxc.clamp_min(smallest).log(), target.log(), reduction="none")
    else:
        values = functional.smooth_l1_loss(predicted_btyxc, target, reduction="none")
    return _sum_over_frames(values.mean(dim=-1), valid.to(values) if weights_btyx is None else valid * weights_btyx)


def _sum_over_frames(values_btyx: Tensor, weights_btyx: Tensor) -> Tensor:
    """Weighted mean over a frame's pixels, those of weight 0 left out, sum over frames, mean over the batch."""
    sums_bt = torch.where(weights_btyx > 0, values_btyx * weights_btyx, 0.0).sum(dim=(2, 3))
    totals_bt = weights_btyx.sum(dim=(2, 3))
    return (sums_bt / torch.where(totals_bt > 0, totals_bt, 1.0)).sum(dim=1).mean()


def _invariant_difference(predicted_btyxc: Tensor, target_btyxc: Tensor, valid_btyx: Tensor) -> Tensor:
    """|p - t| of maps whose every frame was shifted to median 0 and scaled to mean absolute deviation 1.

    The scale and shift invariant loss of MiDaS (Ranftl et al., arXiv 1907.01341, Sec. 5) with its robust estimators,
    untrimmed, as Depth Anything (arXiv 2401.10891, Sec. 3) uses it. Per frame, because a teacher of single frames
    knows scale and shift no longer than that. Of an even number of pixels the lower median is taken. A frame whose
    target is flat tells nothing and counts 0.
    """
    mask = valid_btyx.flatten(2)
    target, is_flat = _normalised(target_btyxc.flatten(2), mask)
    predicted, _ = _normalised(predicted_btyxc.flatten(2), mask)
    difference = torch.where(is_flat, 0.0, (predicted - target).abs())
    return difference.reshape(target_btyxc.shape)


def _normalised(values_btn: Tensor, mask_btn: Tensor) -> tuple[Tensor, Tensor]:
    """Values with median 0 and mean absolute deviation 1 over the mask, per frame; and whether a frame is flat."""
    mask = mask_btn | ~mask_btn.any(dim=-1, keepdim=True)
    median = torch.where(mask, values_btn, torch.nan).nanmedian(dim=-1, keepdim=True).values
    centred = torch.where(mask, values_btn - median, 0.0)
    spread = centred.abs().sum(dim=-1, keepdim=True) / mask.sum(dim=-1, keepdim=True)
    return centred / spread.clamp_min(_MIN_SPREAD), spread < _MIN_SPREAD
