"""A processor that lays out a video's tokens by its size and times alone, for videos whose vision features are cached.

Shape suffixes: `t` frames, `c` channels, `h w` pixels.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class _SizesOnly:
    """A video processor that looks at no pixel.

    What it says of a video is what the real one said of a black one of that size, asked once a size. Tensors of pixels
    become `meta` tensors: they have a shape and no memory.
    """

    def __init__(self, real: Any) -> None:
        self._real = real
        self._known: dict[tuple[int, ...], dict[str, Any]] = {}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # while it is unpickled there is no `_real` to ask
            raise AttributeError(name)
        return getattr(self._real, name)

    def __call__(self, videos: Sequence[Tensor], **settings: Any) -> Any:
        """As the real one, for a single video (t, c, h, w) of any device."""
        from transformers import BatchFeature

        (video_tchw,) = videos
        shape = tuple(video_tchw.shape)
        if shape not in self._known:
            said = self._real([torch.zeros(shape, dtype=torch.uint8)], **settings)
            self._known[shape] = {name: _emptied(name, value) for name, value in said.items()}
        said = dict(self._known[shape])
        if "video_metadata" in said:
            said["video_metadata"] = list(settings["video_metadata"])
        return BatchFeature(said)


def _emptied(name: str, value: Any) -> Any:
    if not name.startswith("pixel_"):
        return value
    stacked = value if isinstance(value, Tensor) else torch.stack(list(value))
    return stacked.to("meta")


def without_pixels(processor: Any) -> Any:
    """A copy of a processor that takes videos as `meta` tensors and gives every output but the pixels, those as `meta`.

    It is right for families whose layout of tokens depends on nothing that the frames show.
    """
    copied = copy.copy(processor)
    copied.video_processor = _SizesOnly(processor.video_processor)
    return copied
