"""How a student is told when each frame was taken: the time cues that the paper compares (arXiv 2512.17012, Table 6).

Shape suffixes: `t` frames, `h w` pixels, `c` channels (RGB).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from p4dprep.errors import RequestError
from student.samples import StudentSample, Turn

TimeCue = Literal["none", "marks", "prompt", "tpe"]
"""`marks` burns the time into each frame, `prompt` says the times in words, `tpe` adds them to the features."""

_PAPER, _INK = (0, 0, 0), (255, 255, 255)
_MIN_FONT, _FONT_FRACTION, _MARGIN = 12, 0.05, 2


def cued(sample: StudentSample, cue: TimeCue) -> StudentSample:
    """The sample with its frames' times told in pixels or words; samples without a video have none.

    - `none` changes nothing. Some families write times by themselves, whatever the cue: Qwen3-VL `<0.3 seconds>` before
      each step, VideoLLaMA3 `Time 0.3s:` and SmolVLM2 `Frame from 00:00:`, in whole seconds, before each frame.
      Qwen2.5-VL turns its time positions by the mean distance of frames. InternVL numbers its frames, LLaVA-OneVision
      does not even that.
    - `marks` burns `1.25s` into the upper left corner of each frame, over what is there (the paper's P4D+mark). It
      comes after augmentation and region marks, so it is never mirrored.
    - `prompt` puts one line before the user's first words. The paper's P4D+prompt tells length and frame rate of the
      video, which would not say where unevenly sampled frames lie; ours gives every frame's time. A sample without text
      stays as it is: words follow the video, and no family's LLM looks ahead, so they cannot reach what is distilled.
    - `tpe` changes nothing here: `Backbone` adds the times to the features.

    Raises:
        RequestError: marks are to be burnt into frames too small for them, or into cached vision features.
    """
    if sample.time_seconds is None:
        return sample
    seconds = sample.time_seconds.tolist()
    if cue == "marks":
        if sample.frames_thwc is None:
            raise RequestError(f"sample {sample.id!r} has cached features, which show no marks; use another time cue")
        return replace(sample, frames_thwc=_marked(sample.id, sample.frames_thwc, seconds))
    if cue == "prompt" and sample.conversation:
        told, *others = (_told(talk, _sentence(seconds)) for talk in (sample.conversation, *sample.others))
        return replace(sample, conversation=told, others=tuple(others))
    return sample


def _told(talk: Sequence[Turn], sentence: str) -> tuple[Turn, ...]:
    first, *others = talk
    return (Turn(role="user", text="\n".join(filter(None, (sentence, first.text)))), *others)


def _sentence(seconds: Sequence[float]) -> str:
    times = ", ".join(f"{second:.2f}" for second in seconds)
    if len(seconds) == 1:
        return f"The video's only frame was taken at {times} seconds."
    return f"The video's {len(seconds)} frames were taken at {times} seconds."


def _marked(sample_id: str, frames_thwc: NDArray[np.uint8], seconds: Sequence[float]) -> NDArray[np.uint8]:
    frames = frames_thwc.copy()
    height, width = frames.shape[1:3]
    size = max(_MIN_FONT, round(_FONT_FRACTION * min(height, width)))
    for frame_hwc, second in zip(frames, seconds, strict=True):
        label_hwc = _label(f"{second:.2f}s", size)
        rows, columns = label_hwc.shape[:2]
        if rows > height or columns > width:
            raise RequestError(
                f"sample {sample_id!r}: frames of {height} x {width} pixels are too small for time marks of "
                f"{rows} x {columns}; use larger frames or another time cue"
            )
        frame_hwc[:rows, :columns] = label_hwc
    return frames


def _label(text: str, font_size: int) -> NDArray[np.uint8]:
    """White on black, legible on whatever frame: uint8 RGB (h, w, 3)."""
    font = ImageFont.load_default(font_size)
    left, top, right, bottom = font.getbbox(text)
    size = (round(right - left) + 2 * _MARGIN, round(bottom - top) + 2 * _MARGIN)
    image = Image.new("RGB", size, _PAPER)
    ImageDraw.Draw(image).text((_MARGIN - left, _MARGIN - top), text, fill=_INK, font=font)
    return np.asarray(image)
