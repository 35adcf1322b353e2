"""What travels between the parts of a student's training: conversations, samples, and where video tokens lie.

Shape suffixes: `t` frames, `h w` pixels, `y x` token rows and columns, `c` channels (RGB).
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p4dprep.errors import RequestError

Role = Literal["user", "assistant"]


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One utterance, without media tokens; the media stand before the first turn.

    Attributes:
        role: who speaks; only what the assistant says is learnt.
        text: what is said.
    """

    role: Role
    text: str

    def __post_init__(self) -> None:
        if self.role not in get_args(Role):
            raise RequestError(f"role is {self.role!r}; it must be user or assistant")


@dataclass(frozen=True, kw_only=True, eq=False)
class StudentSample:
    """One conversation over one video, or over still images.

    Attributes:
        id: of the sample; it travels with its arrays as far as the loss.
        conversation: turns that begin with the user and alternate; empty for distillation without text.
        frames_thwc: uint8 RGB frames of the video, (t, h, w, 3); None for still images.
        time_seconds: their presentation times, float64 (t,); None for still images.
        images_hwc: uint8 RGB images, each (h, w, 3), of any sizes; empty for a video.
    """

    id: str
    conversation: tuple[Turn, ...] = ()
    frames_thwc: NDArray[np.uint8] | None = None
    time_seconds: NDArray[np.float64] | None = None
    images_hwc: tuple[NDArray[np.uint8], ...] = ()

    def __post_init__(self) -> None:
        if (self.frames_thwc is None) != (self.time_seconds is None):
            raise ValueError(f"sample {self.id}: frames and their times come together")
        if (self.frames_thwc is None) == (not self.images_hwc):
            raise ValueError(f"sample {self.id}: it needs either a video or images")
        frames, seconds = self.frames_thwc, self.time_seconds
        if frames is not None and (frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8):
            raise ValueError(f"sample {self.id}: frames {frames.shape} {frames.dtype} are not uint8 (t, h, w, 3)")
        if frames is not None and seconds is not None and seconds.shape != frames.shape[:1]:
            raise ValueError(f"sample {self.id}: {seconds.shape} times do not fit frames {frames.shape}")
        for image in self.images_hwc:
            if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
                raise ValueError(f"sample {self.id}: image {image.shape} {image.dtype} is not uint8 (h, w, 3)")
        for number, turn in enumerate(self.conversation):
            if turn.role != ("user", "assistant")[number % 2]:
                raise ValueError(f"sample {self.id}: turn {number} is the {turn.role}'s; user and assistant alternate")

    def __repr__(self) -> str:
        media = self.frames_thwc.shape if self.frames_thwc is not None else [i.shape for i in self.images_hwc]
        return f"StudentSample({self.id!r}, media={media}, num_turns={len(self.conversation)})"


@dataclass(frozen=True, kw_only=True, eq=False)
class VideoTokens:
    """Where the tokens of one video lie in the padded sequence of its batch.

    Attributes:
        positions_tyx: int64 (steps, rows, columns), sequence index of the token that stands for step i, cell (j, k).
        frame_spans: per step the frames [first, last + 1) it covers; every frame is in exactly one span, in order.
    """

    positions_tyx: Tensor
    frame_spans: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        shape = tuple(self.positions_tyx.shape)
        if len(shape) != 3 or self.positions_tyx.dtype != torch.int64:
            raise ValueError(f"positions {shape} {self.positions_tyx.dtype} are not int64 (steps, rows, columns)")
        if len(self.frame_spans) != shape[0]:
            raise ValueError(f"{len(self.frame_spans)} frame spans do not fit positions of {shape[0]} steps")
        bounds = [0, *(last for _, last in self.frame_spans)]
        if any(span[0] != start or span[1] <= start for span, start in zip(self.frame_spans, bounds, strict=False)):
            raise ValueError(f"frame spans {self.frame_spans} do not cover every frame once, in order")

    def __repr__(self) -> str:
        return f"VideoTokens({tuple(self.positions_tyx.shape)}, num_frames={self.num_frames})"

    @property
    def num_frames(self) -> int:
        """Frames of the video that the steps cover."""
        return self.frame_spans[-1][1]
