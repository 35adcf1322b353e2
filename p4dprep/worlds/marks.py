"""Set-of-Mark pictures: the regions that a question speaks of, outlined and numbered in the first frame.

Source: Yang et al., "Set-of-Mark Prompting", arXiv 2310.11441; R4D-Bench shows its regions so (P4D, Appendix A2).
"""

from collections.abc import Iterator, Sequence

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from p4dprep.worlds.tracks import PixelBox, mask_box

COLOURS = ((255, 230, 25), (0, 235, 255), (255, 90, 220), (90, 255, 90), (255, 150, 40), (175, 150, 255))
"""Of marks 1, 2, ...; bright, so that black numbers on them are legible."""

_INK = (0, 0, 0)
_MIN_FONT, _FONT_FRACTION = 12, 0.05


def draw_marks(
    picture_hwc: NDArray[np.uint8], instances_hw: NDArray[np.uint8], instances: Sequence[int]
) -> Image.Image:
    """A picture with mark k + 1 on `instances[k]`: its outline, and a numbered tag in or beside it.

    Args:
        picture_hwc: uint8 RGB, (h, w, 3).
        instances_hw: uint8 mask of instances, (h, w).
        instances: ids in the mask, each seen.

    Raises:
        ValueError: an instance is not in the mask.
    """
    image = Image.fromarray(picture_hwc.copy())
    colours = [COLOURS[number % len(COLOURS)] for number in range(len(instances))]
    for instance, colour in zip(instances, colours, strict=True):
        image.paste(colour, mask=Image.fromarray(_outline(instances_hw == instance)))
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(max(_MIN_FONT, round(_FONT_FRACTION * min(image.size))))
    taken: list[PixelBox] = []
    for number, (instance, colour) in enumerate(zip(instances, colours, strict=True), start=1):
        tag = _place_tag(instances_hw, instance, _tag_size(draw, str(number), font), taken)
        draw.rectangle((tag[0], tag[1], tag[2] - 1, tag[3] - 1), fill=colour, outline=_INK)
        draw.text(((tag[0] + tag[2]) / 2, (tag[1] + tag[3]) / 2), str(number), fill=_INK, font=font, anchor="mm")
        taken.append(tag)
    return image


def _outline(mask_hw: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """The rim of a mask, 255 there; outside it, so that the object itself stays as it is."""
    mask = mask_hw.astype(np.uint8)
    grown = cv2.dilate(mask, np.ones((3, 3), np.uint8), iterations=max(1, min(mask.shape) // 200))
    return np.asarray((grown - mask) * 255, np.uint8)


def _tag_size(
    draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> tuple[int, int]:
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    return round(right - left) + 6, round(bottom - top) + 6


def _place_tag(
    instances_hw: NDArray[np.uint8], instance: int, size: tuple[int, int], taken: Sequence[PixelBox]
) -> PixelBox:
    """Where a tag goes: in the middle of a large region, else beside it, over as little else as may be."""
    mask_hw = instances_hw == instance
    box = mask_box(mask_hw)
    if box is None:
        raise ValueError(f"instance {instance} is not in the picture")
    height, width = mask_hw.shape
    occupied_hw = instances_hw > 0
    for left, top, right, bottom in taken:
        occupied_hw[top:bottom, left:right] = True
    distance_hw = cv2.distanceTransform(np.pad(mask_hw, 1).astype(np.uint8), cv2.DIST_L2, 5)[1:-1, 1:-1]
    y, x = (int(value) for value in np.unravel_index(distance_hw.argmax(), distance_hw.shape))
    if distance_hw.max() >= 1.5 * max(size):
        return _tag_at(x, y, size, height, width)
    tags = [_tag_at(*centre, size, height, width) for centre in _beside(box, size)]
    return min(tags, key=lambda tag: int(occupied_hw[tag[1] : tag[3], tag[0] : tag[2]].sum()))


def _beside(box: PixelBox, size: tuple[int, int]) -> Iterator[tuple[int, int]]:
    left, top, right, bottom = box
    wide, high = size[0] // 2 + 3, size[1] // 2 + 3
    x, y = (left + right) // 2, (top + bottom) // 2
    yield from ((x, top - high), (right + wide, y), (left - wide, y), (x, bottom + high))


def _tag_at(x: int, y: int, size: tuple[int, int], height: int, width: int) -> PixelBox:
    left, top = (
        min(max(0, at - side // 2), limit - side) for at, side, limit in zip((x, y), size, (width, height), strict=True)
    )
    return left, top, left + size[0], top + size[1]
