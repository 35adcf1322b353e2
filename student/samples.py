"""What travels between the parts of a student's training: conversations, samples, and where video tokens lie.

Shape suffixes: `t` frames, `h w` pixels, `y x` token rows and columns, `c` channels (RGB).
"""

from dataclasses import dataclass, replace
from typing import Literal, Self, get_args

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
            raise RequestError(f"role {self.role!r} is neither 'user' nor 'assistant'")
        if self.role == "assistant" and not self.text.strip():
            raise RequestError("an assistant's turn is empty; there is nothing to learn from it")


@dataclass(frozen=True, kw_only=True, eq=False)
class VisionFeatures:
    """A video as the student's own frozen vision tower saw it: what its projector gets, in place of the frames.

    Attributes:
        values: float16 or float32, in the shape that the family's adapter gives such frames.
        frame_size: height and width of the frames that the tower saw.
    """

    values: NDArray[np.floating]
    frame_size: tuple[int, int]

    def __repr__(self) -> str:
        return f"VisionFeatures({self.values.shape} {self.values.dtype} of {self.frame_size} frames)"


@dataclass(frozen=True, kw_only=True, eq=False)
class StudentSample:
    """One conversation over one video, over still images, or over nothing shown; or several over one video.

    Attributes:
        id: of the sample; it travels with its arrays as far as the loss.
        conversation: turns that begin with the user and alternate; empty for distillation without text.
        others: further such conversations over the same video, each of which sees the video and no other's words.
        frames_thwc: uint8 RGB frames of the video, (t, h, w, 3); None for still images and for cached features.
        time_seconds: their presentation times, float64 (t,), never decreasing: a short clip repeats frames. None for
            still images.
        features: what the vision tower made of the video, in place of its frames.
        images_hwc: uint8 RGB images, each (h, w, 3), of any sizes; empty for a video.
    """

    id: str
    conversation: tuple[Turn, ...] = ()
    others: tuple[tuple[Turn, ...], ...] = ()
    frames_thwc: NDArray[np.uint8] | None = None
    time_seconds: NDArray[np.float64] | None = None
    images_hwc: tuple[NDArray[np.uint8], ...] = ()
    features: VisionFeatures | None = None

    def __post_init__(self) -> None:
        where = f"sample {self.id!r}"
        if self.has_video and self.images_hwc:
            raise RequestError(f"{where} has a video and pictures; give it one of them")
        if self.frames_thwc is not None and self.features is not None:
            raise RequestError(f"{where} has a video's frames and its features; give it one of them")
        for talk in (self.conversation, *self.others):
            if any(turn.role != ("user", "assistant")[place % 2] for place, turn in enumerate(talk)):
                raise RequestError(f"{where}: user and assistant must take turns, the user first")
        if self.others and not (self.has_video and all((self.conversation, *self.others))):
            raise RequestError(f"{where} has several conversations; they need words each, and a video")
        if not self.conversation and not self.has_video and not self.images_hwc:
            raise RequestError(f"{where} has neither a conversation nor anything shown")
        for picture in self.images_hwc if self.frames_thwc is None else tuple(self.frames_thwc):
            if picture.ndim != 3 or picture.shape[-1] != 3 or picture.dtype != np.uint8:
                raise RequestError(f"{where} shows {picture.dtype} of shape {picture.shape}; need uint8 (h, w, 3)")
        self._check_times(where)

    def _check_times(self, where: str) -> None:
        frames, seconds = self.frames_thwc, self.time_seconds
        if self.has_video != (seconds is not None):
            raise RequestError(f"{where} needs frames_thwc and time_seconds together, or features in place of frames")
        if seconds is None:
            return
        shown = seconds.shape if frames is None else frames.shape
        if seconds.shape != shown[:1] or not len(seconds):
            raise RequestError(f"{where} has times {seconds.shape} for frames {shown}; need one a frame")
        if not np.isfinite(seconds).all() or (np.diff(seconds) < 0).any():
            raise RequestError(f"{where} has times that decrease: {seconds.tolist()}")

    @property
    def has_video(self) -> bool:
        """Whether a video is shown, as frames or as features."""
        return self.frames_thwc is not None or self.features is not None

    def __repr__(self) -> str:
        shown = "nothing" if self.frames_thwc is None else f"video {self.frames_thwc.shape}"
        shown = f"{len(self.images_hwc)} pictures" if self.images_hwc else str(self.features or shown)
        return f"StudentSample({self.id!r}, {shown}, {len(self.conversation)} turns)"


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
        if self.positions_tyx.ndim != 3 or len(self.positions_tyx) != len(self.frame_spans) or not self.frame_spans:
            raise RequestError(f"{len(self.frame_spans)} spans do not fit {tuple(self.positions_tyx.shape)} tokens")
        starts = [0, *(end for _, end in self.frame_spans[:-1])]
        if any(start != first or last <= first for start, (first, last) in zip(starts, self.frame_spans, strict=True)):
            raise RequestError(f"spans {self.frame_spans} do not cover every frame exactly once")

    def __repr__(self) -> str:
        return f"VideoTokens({tuple(self.positions_tyx.shape)}, num_frames={self.num_frames})"

    @property
    def num_frames(self) -> int:
        """Frames of the video that the steps cover."""
        return self.frame_spans[-1][1]

    def shifted(self, num_places: int) -> Self:
        """The same after `num_places` of padding were put before the sequence."""
        return replace(self, positions_tyx=self.positions_tyx + num_places)

    def mean_by_step(self, values_t: Tensor) -> Tensor:
        """Means of one value a frame, (t,), over each step's frames, (steps,)."""
        return torch.stack([values_t[first:last].mean() for first, last in self.frame_spans])
