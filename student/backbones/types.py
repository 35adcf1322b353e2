"""What goes into a student's model and comes out of it; what goes into its encoder is in `student.samples`.

Shape suffixes: `b` batch, `s` places in the token sequence, `t` frames, `c` channels, `v` vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from p4dprep.errors import RequestError
from student.samples import VideoTokens

IGNORED_LABEL = -100
"""The label of a token that is not learned, as everywhere in transformers."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StudentBatch:
    """Samples, padded and ready for `Backbone.forward`.

    Attributes:
        ids: of the samples, in order.
        inputs: the model's own keyword arguments, among them `input_ids` (b, s) and `attention_mask` (b, s).
        labels: (b, s), int64: the token itself inside an assistant's answer and its end, else -100.
        video_tokens: per sample where its video lies, None without one.
        time_seconds: per sample (t,), float64; TPE adds these times. None turns TPE off.
        features: what the vision tower made of all videos of the batch, (videos, *shape of one), float; the tower then
            sees none of them. None where the inputs hold their pixels.
        branch_starts: where samples have several conversations, (b, s), int64: the place in the sequence where the
            conversation that a token belongs to begins; 0 for what all of them see, the video and what is before it.
    """

    ids: tuple[str, ...]
    inputs: Mapping[str, Tensor]
    labels: Tensor
    video_tokens: tuple[VideoTokens | None, ...]
    time_seconds: tuple[Tensor | None, ...] | None
    features: Tensor | None = None
    branch_starts: Tensor | None = None

    def __repr__(self) -> str:
        shapes = {name: tuple(value.shape) for name, value in self.inputs.items()}
        if self.features is not None:
            shapes["features"] = tuple(self.features.shape)
        return f"StudentBatch({self.ids}, {shapes}, TPE {'off' if self.time_seconds is None else 'on'})"

    def to(self, device: torch.device | str) -> Self:
        """The same with the model's inputs, labels and positions on `device`."""
        return replace(
            self,
            inputs={name: value.to(device, non_blocking=True) for name, value in self.inputs.items()},
            labels=self.labels.to(device, non_blocking=True),
            features=None if self.features is None else self.features.to(device, non_blocking=True),
            branch_starts=None if self.branch_starts is None else self.branch_starts.to(device, non_blocking=True),
            video_tokens=tuple(
                tokens and replace(tokens, positions_tyx=tokens.positions_tyx.to(device, non_blocking=True))
                for tokens in self.video_tokens
            ),
        )

    def step_seconds(self) -> tuple[Tensor | None, ...]:
        """Per sample the time of each step, (steps,), float64: the mean of its frames' times; None without a video.

        Raises:
            RequestError: the batch carries no times.
        """
        if self.time_seconds is None:
            raise RequestError("this batch carries no times; TPE is off")
        return tuple(
            None if tokens is None or times is None else tokens.mean_by_step(times)
            for tokens, times in zip(self.video_tokens, self.time_seconds, strict=True)
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class StudentOutput:
    """What one forward pass gives.

    Attributes:
        loss_sft: the model's own mean cross-entropy over the labelled tokens; None where the batch has no label.
        logits_bsv: (b, s, vocabulary).
        hidden_bsc: (b, s, c), the LLM's hidden states after the layer that was asked for.
    """

    loss_sft: Tensor | None
    logits_bsv: Tensor
    hidden_bsc: Tensor
