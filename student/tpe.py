"""Timestamp positional encoding, TPE (P4D paper Eq. 5): a frame's time as sines and cosines, with no parameter."""

import torch
from torch import Tensor

from p4dprep.errors import RequestError

_BASE = 10_000.0


def timestamp_encoding(seconds_n: Tensor, width: int) -> Tensor:
    """`p[2i] = sin(t / T^(2i/D))`, `p[2i+1] = cos(t / T^(2i/D))`, with `T = 10,000` and `D = width` (Eq. 5).

    Args:
        seconds_n: times, (n,), seconds from the start of the video. NaN stands for no time.
        width: channels of the features that it is added to.

    Returns:
        (n, width), float64, on the device of `seconds_n`; zeros where the time is NaN.

    Raises:
        RequestError: `width` is not positive, or the times are not a vector.
    """
    if width < 1 or seconds_n.ndim != 1:
        raise RequestError(f"times of shape {tuple(seconds_n.shape)} and width {width}; need (n,) and at least 1")
    channels = torch.arange(width, dtype=torch.float64, device=seconds_n.device)
    even = channels - channels % 2
    angles = seconds_n.to(torch.float64)[:, None] / _BASE ** (even / width)
    encoding = torch.where(channels % 2 == 0, angles.sin(), angles.cos())
    return encoding.nan_to_num(nan=0.0)
