"""Eq. 5 of the paper, against a float64 calculation by hand."""

import math

import pytest
import torch

from p4dprep.errors import RequestError
from student.tpe import timestamp_encoding


@pytest.mark.parametrize("width", [2, 6, 7, 1152])
def test_every_channel_is_the_sine_or_cosine_of_equation_5(width: int) -> None:
    seconds = torch.tensor([0.0, 0.04, 1.5, 3600.0], dtype=torch.float64)
    encoding = timestamp_encoding(seconds, width)
    for row, time in zip(encoding.tolist(), seconds.tolist(), strict=True):
        for channel, value in enumerate(row):
            angle = time / 10_000 ** (2 * (channel // 2) / width)
            assert value == pytest.approx(math.cos(angle) if channel % 2 else math.sin(angle), abs=1e-12)


def test_time_zero_is_not_the_same_as_no_time() -> None:
    zero, nothing = timestamp_encoding(torch.tensor([0.0, math.nan]), 6)
    assert zero.tolist() == [0, 1, 0, 1, 0, 1]
    assert nothing.tolist() == [0] * 6


def test_frames_a_fortieth_of_a_second_apart_differ_an_hour_into_the_video() -> None:
    first, second = timestamp_encoding(torch.tensor([3600.0, 3600.025], dtype=torch.float64), 64)
    assert (first - second).abs().max() > 0.02


@pytest.mark.parametrize(("seconds", "width"), [(torch.zeros(2, 2), 4), (torch.zeros(2), 0)])
def test_other_shapes_are_refused(seconds: torch.Tensor, width: int) -> None:
    with pytest.raises(RequestError, match=r"need \(n,\) and at least 1"):
        timestamp_encoding(seconds, width)
