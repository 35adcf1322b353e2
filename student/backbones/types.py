"""What goes into a student and comes out of it.

Shape suffixes: `b` batch, `s` places in the token sequence, `t` frames, `h w` pixels, `c` channels; in `positions_tyx`
`t y x` are the steps, rows and columns of the student's own grid of video tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p4dprep.errors import RequestError

IGNORED_LABEL = -100
"""The label of a token that is not learned, as everywhere in transformers."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One message of a conversation."""

    role: Literal["user", "assistant"]
    text: str

    def __post_init__(self) -> None:
        if self.role not in ("user", "assistant"):
            raise RequestError(f"role {self.role!r} is neither 'user' nor 'assistant'")
        if self.role == "assistant" and not self.text.strip():
            raise RequestError("an assistant's turn is empty; there is nothing to learn from it")


@dataclass(frozen=True, kw_only=True)
class StudentSample:
    """One conversation about one video, or about images, or about nothing shown.

    Attributes:
        id: the clip's or question's id; it travels with the sample to the loss.
        conversation: user and assistant in turn, the user first; empty to distil from the video alone.
        frames_thwc: the video, (t, h, w, 3), uint8 RGB.
        time_seconds: (t,), float64, each frame's time from the start of the video, increasing.
        images_hwc: pictures, each (h, w, 3), uint8 RGB; a sample has a video or pictures, not both.
    """

    id: str
    conversation: tuple[Turn, ...] = ()
    frames_thwc: NDArray[np.uint8] | None = None
    time_seconds: NDArray[np.float64] | None = None
    images_hwc: tuple[NDArray[np.uint8], ...] = ()

    def __post_init__(self) -> None:
        where = f"sample {self.id!r}"
        if self.frames_thwc is not None and self.images_hwc:
            raise RequestError(f"{where} has a video and pictures; give it one of them")
        if [turn.role for turn in self.conversation] != [
            ("user", "assistant")[place % 2] for place in range(len(self.conversation))
        ]:
            raise RequestError(f"{where}: user and assistant must take turns, the user first")
        if not self.conversation and self.frames_thwc is None and not self.images_hwc:
            raise RequestError(f"{where} has neither a conversation nor anything shown")
        pictures = self.images_hwc if self.frames_thwc is None else tuple(self.frames_thwc)
        for picture in pictures:
            if picture.ndim != 3 or picture.shape[-1] != 3 or picture.dtype != np.uint8:
                raise RequestError(f"{where} shows {picture.dtype} of shape {picture.shape}; need uint8 (h, w, 3)")
        self._check_times(where)

    def _check_times(self, where: str) -> None:
        if (self.frames_thwc is None) != (self.time_seconds is None):
            raise RequestError(f"{where} needs frames_thwc and time_seconds together")
        if self.frames_thwc is None or self.time_seconds is None:
            return
        if self.time_seconds.shape != self.frames_thwc.shape[:1] or not len(self.time_seconds):
            raise RequestError(
                f"{where} has times {self.time_seconds.shape} for frames {self.frames_thwc.shape}; need one a frame"
            )
        if not np.isfinite(self.time_seconds).all() or (np.diff(self.time_seconds) <= 0).any():
            raise RequestError(f"{where} has times that do not increase: {self.time_seconds.tolist()}")

    def __repr__(self) -> str:
        shown = "nothing" if self.frames_thwc is None else f"video {self.frames_thwc.shape}"
        shown = f"{len(self.images_hwc)} pictures" if self.images_hwc else shown
        return f"StudentSample({self.id!r}, {shown}, {len(self.conversation)} turns)"


@dataclass(frozen=True, kw_only=True)
class VideoTokens:
    """Where the tokens of one video lie in its sample's padded sequence.

    Attributes:
        positions_tyx: (steps, rows, columns), int64: the place of the token that stands for step i, cell (j, k).
        frame_spans: per step the frames it covers, [first, last + 1); every frame is in exactly one span.
    """

    positions_tyx: Tensor
    frame_spans: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        starts = [0, *(end for _, end in self.frame_spans[:-1])]
        if self.positions_tyx.ndim != 3 or len(self.positions_tyx) != len(self.frame_spans):
            raise RequestError(f"{len(self.frame_spans)} spans do not fit {tuple(self.positions_tyx.shape)} tokens")
        if any(start != first or last <= first for start, (first, last) in zip(starts, self.frame_spans, strict=True)):
            raise RequestError(f"spans {self.frame_spans} do not cover every frame exactly once")

    @property
    def num_frames(self) -> int:
        """Frames of the video."""
        return self.frame_spans[-1][1]

    def shifted(self, num_places: int) -> Self:
        """The same after `num_places` of padding were put before the sequence."""
        return replace(self, positions_tyx=self.positions_tyx + num_places)

    def mean_by_step(self, values_t: Tensor) -> Tensor:
        """Means of one value a frame, (t,), over each step's frames, (steps,)."""
        return torch.stack([values_t[first:last].mean() for first, last in self.frame_spans])


@dataclass(frozen=True, kw_only=True)
class StudentBatch:
    """Samples, padded and ready for `Backbone.forward`.

    Attributes:
        ids: of the samples, in order.
        inputs: the model's own keyword arguments, among them `input_ids` (b, s) and `attention_mask` (b, s).
        labels: (b, s), int64: the token itself inside an assistant's answer and its end, else -100.
        video_tokens: per sample where its video lies, None without one.
        time_seconds: per sample (t,), float64; TPE adds these times. None turns TPE off.
    """

    ids: tuple[str, ...]
    inputs: Mapping[str, Tensor]
    labels: Tensor
    video_tokens: tuple[VideoTokens | None, ...]
    time_seconds: tuple[Tensor | None, ...] | None

    def __repr__(self) -> str:
        shapes = {name: tuple(value.shape) for name, value in self.inputs.items()}
        return f"StudentBatch({self.ids}, {shapes}, TPE {'off' if self.time_seconds is None else 'on'})"

    def to(self, device: torch.device | str) -> Self:
        """The same with the model's inputs, labels and positions on `device`."""
        return replace(
            self,
            inputs={name: value.to(device, non_blocking=True) for name, value in self.inputs.items()},
            labels=self.labels.to(device, non_blocking=True),
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


@dataclass(frozen=True, kw_only=True)
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
