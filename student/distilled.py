"""The student as it is trained: one batch of the loader, and one forward pass that gives every loss.

Shape suffixes: `b` batch, `s` places in the token sequence, `c` channels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from student.backbones import Backbone, FamilyAdapter, StudentBatch
from student.backbones.types import IGNORED_LABEL
from student.cues import TimeCue, cued
from student.data import TrainingSample, collate
from student.p4d import P4D, P4DLosses, P4DPrediction
from student.rivals import Rival
from student.targets import TargetBatch


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingBatch:
    """What one micro-batch needs: the model's inputs and the cached targets of the same samples."""

    student: StudentBatch
    targets: TargetBatch

    def __post_init__(self) -> None:
        if self.student.ids != self.targets.sample_ids:
            raise ValueError(f"inputs of {self.student.ids} do not fit targets of {self.targets.sample_ids}")

    @property
    def num_labels(self) -> int:
        """Tokens that are learnt; the first of a sequence has nothing before it to be told from."""
        return int((self.student.labels[:, 1:] != IGNORED_LABEL).sum())

    @property
    def num_clips(self) -> int:
        """Samples that have targets."""
        return len(self.targets.rows)

    def to(self, device: torch.device | str) -> Self:
        """The same on a device."""
        return replace(self, student=self.student.to(device), targets=self.targets.to(device))

    def pin_memory(self) -> Self:
        """The same in page-locked memory, from which a GPU copies while it computes."""
        return replace(self, student=_pinned(self.student), targets=_pinned(self.targets))


def _pinned(value: Any) -> Any:
    """Every tensor inside, pinned."""
    if isinstance(value, Tensor):
        return value.pin_memory()
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _pinned(getattr(value, field.name)) for field in fields(value)})
    if isinstance(value, Mapping):
        return {name: _pinned(item) for name, item in value.items()}
    return tuple(map(_pinned, value)) if isinstance(value, tuple) else value


class Collate:
    """Samples to a batch, in the loader's processes; holds no weights.

    Args:
        adapter: of the student's family.
        time_cue: how the frames' times are told.
    """

    def __init__(self, adapter: FamilyAdapter, time_cue: TimeCue) -> None:
        self.adapter, self.time_cue = adapter, time_cue

    def __call__(self, items: Sequence[TrainingSample]) -> TrainingBatch:
        """One micro-batch."""
        samples, targets = collate(items)
        told = [cued(sample, self.time_cue) for sample in samples]
        return TrainingBatch(student=self.adapter.encode(told, tpe=self.time_cue == "tpe"), targets=targets)


class DistilledStudent(nn.Module):
    """A student with what teaches it. The trainer wraps, shards and saves this module.

    Args:
        backbone: the student.
        p4d: decoder, heads and losses; None learns from text alone.
        rival: one of the paper's other strategies, or None.
        layer: the LLM layer that is distilled, from 1; None is the last.
    """

    def __init__(
        self, backbone: Backbone, p4d: P4D | None, rival: Rival | None = None, layer: int | None = None
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.student: nn.Module = backbone.model
        self.p4d, self.rival = p4d, rival
        self.layer = layer or backbone.num_layers
        # FSDP wraps layer by layer, and looks here for what a layer is.
        self._no_split_modules = list(getattr(backbone.model, "_no_split_modules", None) or ())

    @property
    def term_names(self) -> tuple[str, ...]:
        """Names of the unweighted terms that `forward` returns under `terms`."""
        if self.p4d is None:
            return ()
        taps = self.p4d.shape.num_taps if self.p4d.config.latents else 0
        latent = ("ld", *(f"ld/tap{tap}" for tap in range(taps))) if taps else ()
        return (*latent, *(f"ed/{term.target}" for term in self.p4d.config.terms))

    def forward(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """The losses of a micro-batch, on the student's device.

        Returns:
            `sft`: mean cross-entropy over the learnt tokens, 0 without any; `p4d`: weighted distillation loss, mean
            over the clips; `terms` (len(term_names),): its parts unweighted and without gradients, 0 without clips.
        """
        hidden_bsc, sft = self._run(batch)
        if self.p4d is None:
            return {"sft": sft, "p4d": sft.new_zeros(()), "terms": sft.new_zeros(0)}
        losses = self.p4d(hidden_bsc, batch.student.video_tokens, batch.targets)
        return {"sft": sft, "p4d": losses.total, "terms": self._terms(losses)}

    def predict(self, batch: TrainingBatch) -> P4DPrediction:
        """The maps that the student sees in the samples that have targets."""
        if self.p4d is None:
            raise ValueError("this student predicts no maps")
        hidden_bsc, _ = self._run(batch)
        rows = list(batch.targets.rows)
        tokens = [found for row in rows if (found := batch.student.video_tokens[row]) is not None]
        return self.p4d.predict(hidden_bsc[rows], tokens)

    def _run(self, batch: TrainingBatch) -> tuple[Tensor, Tensor]:
        """Hidden states of the distilled layer (b, s, c) and the SFT loss, a scalar."""
        output = self.backbone.forward(batch.student, layer=self.layer, inject=self._inject(batch))
        sft = output.loss_sft
        return output.hidden_bsc, output.hidden_bsc.new_zeros(()) if sft is None else sft

    def _inject(self, batch: TrainingBatch) -> Any:
        rival = self.rival
        return rival and (lambda embeds_bsc: rival(embeds_bsc, batch.student.video_tokens, batch.targets))

    def _terms(self, losses: P4DLosses) -> Tensor:
        parts = [losses.latent_k.mean()[None], losses.latent_k] if len(losses.latent_k) else []
        parts += [loss[None] for loss in losses.explicit.values()]
        if not parts:
            return torch.zeros(len(self.term_names), device=losses.total.device)
        return torch.cat([part.float() for part in parts])
