"""How a question's regions are shown: numbered marks on the first frame, boxes as text, or both.

Shape suffixes: `h w` pixels, `c` channels (RGB).
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from p4dprep.errors import RequestError
from p4dprep.worlds.marks import draw_marks
from student.conversations import Box

RegionPrompt = Literal["marks", "boxes", "both"]
"""`marks` is Set-of-Mark (arXiv 2310.11441), as R4D-Bench shows its regions."""

_BOX_UNITS = 1000
"""Boxes are written in thousandths of width and height, as many detectors among language models do."""


def mark_regions(picture_hwc: NDArray[np.uint8], regions: Sequence[Box]) -> NDArray[np.uint8]:
    """A picture with mark k on region k, counted from 1.

    Raises:
        RequestError: a region is hidden by others that lie wholly inside it, or thinner than a pixel.
    """
    height, width = picture_hwc.shape[:2]
    instances_hw = np.zeros((height, width), np.uint8)
    # Large ones first, so that a region inside another one is not painted over.
    for number in sorted(range(len(regions)), key=lambda n: -_area(regions[n])):
        left, top, right, bottom = regions[number]
        rows = slice(round(top * height), round(bottom * height))
        instances_hw[rows, round(left * width) : round(right * width)] = number + 1
    try:
        return np.asarray(draw_marks(picture_hwc, instances_hw, range(1, len(regions) + 1)))
    except ValueError as error:
        raise RequestError(f"regions {regions} cannot be marked in {width} x {height} pixels: {error}") from None


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def region_text(regions: Sequence[Box], how: RegionPrompt) -> str:
    """What is said of the regions before the question: that they are marked, where they are, or both."""
    sentences = []
    for number, box in enumerate(regions, start=1):
        where = f"the box {[round(corner * _BOX_UNITS) for corner in box]}"
        mark = f"mark {number}"
        place = {"marks": mark, "boxes": where, "both": f"{mark}, {where}"}[how]
        sentences.append(f"<obj_{number}> is {place} in the first frame.")
    if how != "marks":
        sentences.append("Boxes are [left, top, right, bottom] in thousandths of width and height.")
    return " ".join(sentences)
