"""The things of a world: compounds of simple shapes, at sizes that such things have."""

import colorsys
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import numpy as np

from p4dprep.worlds.scene import SHAPES, Body, Part, Texture, Vector, still

Painter = Callable[..., Texture]
"""(colour, scale in metres, contrast) to a texture of the split's family."""

COLOURS: dict[str, Vector] = {
    "red": (0.85, 0.15, 0.12),
    "green": (0.15, 0.62, 0.2),
    "blue": (0.15, 0.3, 0.85),
    "yellow": (0.92, 0.82, 0.15),
    "orange": (0.95, 0.5, 0.1),
    "purple": (0.55, 0.2, 0.7),
    "white": (0.92, 0.92, 0.92),
    "cyan": (0.15, 0.75, 0.8),
}
VEHICLES = ("car", "van", "toy", "book", "stool", "sheep", "walker")
"""What does not bounce."""
_DARK: Vector = (0.12, 0.12, 0.13)
_SKIN: Vector = (0.8, 0.62, 0.5)


def shade_of(colour: Vector, contrast: float) -> Vector:
    """A darker (or, for a dark colour, lighter) shade for a pattern."""
    hue, light, saturation = colorsys.rgb_to_hls(*colour)
    light = light * (1 - 0.8 * contrast) if light > 0.35 else min(1.0, light + 0.5 * contrast)
    return colorsys.hls_to_rgb(hue, light, saturation)


def slab(shape: SHAPES, centre: Vector, size: Vector, texture: Texture) -> Body:
    """Scenery of one shape that never moves; `size` is length, width and height."""
    x, y, z = (side / 2 for side in size)
    part = Part(shape=shape, half_size=(x, y, z), texture=texture)
    return Body(category=shape, parts=(part,), trajectory=still(centre))


class _Kit:
    """Collects a body's parts; heights are measured from the ground."""

    def __init__(self, rng: np.random.Generator, colour: Vector, paint: Painter) -> None:
        self.rng, self.colour, self._paint = rng, colour, paint
        self.parts: list[Part] = []

    def add(
        self,
        shape: SHAPES,
        half_size: Vector,
        centre: Vector,
        *,
        axis: Literal["x", "y", "z"] = "z",
        colour: Vector | None = None,
        scale: float | None = None,
    ) -> None:
        size = scale or 0.7 * max(half_size)
        texture = self._paint(colour or self.colour, size, 0.5 if colour is None else 0.25)
        self.parts.append(Part(shape=shape, half_size=half_size, centre=centre, axis=axis, texture=texture))


def _ball(kit: _Kit) -> None:
    radius = kit.rng.uniform(0.2, 0.3)
    kit.add("sphere", (radius,) * 3, (0, 0, radius))


def _marble(kit: _Kit) -> None:
    radius = kit.rng.uniform(0.03, 0.045)
    kit.add("sphere", (radius,) * 3, (0, 0, radius))


def _crate(kit: _Kit) -> None:
    x, y, z = kit.rng.uniform((0.25, 0.22, 0.2), (0.4, 0.32, 0.35))
    kit.add("box", (x, y, z), (0, 0, z))


def _book(kit: _Kit) -> None:
    x, y, z = kit.rng.uniform((0.1, 0.07, 0.012), (0.13, 0.09, 0.025))
    kit.add("box", (x, y, z), (0, 0, z), scale=0.08)


def _barrel(kit: _Kit) -> None:
    radius, half = kit.rng.uniform(0.25, 0.32), kit.rng.uniform(0.4, 0.5)
    kit.add("cylinder", (radius, radius, half), (0, 0, half))


def _can(kit: _Kit) -> None:
    radius, half = kit.rng.uniform(0.03, 0.036), kit.rng.uniform(0.055, 0.065)
    kit.add("cylinder", (radius, radius, half), (0, 0, half))


def _cup(kit: _Kit) -> None:
    radius, half = kit.rng.uniform(0.038, 0.048), kit.rng.uniform(0.04, 0.055)
    kit.add("cylinder", (radius, radius, half), (0, 0, half))
    kit.add("box", (0.012, 0.006, half * 0.6), (radius + 0.012, 0, half))


def _bottle(kit: _Kit) -> None:
    radius, half = kit.rng.uniform(0.033, 0.04), kit.rng.uniform(0.075, 0.09)
    kit.add("cylinder", (radius, radius, half), (0, 0, half))
    kit.add("capsule", (radius * 0.45, radius * 0.45, half * 0.6), (0, 0, 2 * half + half * 0.3), colour=_DARK)


def _stool(kit: _Kit) -> None:
    radius, height = kit.rng.uniform(0.18, 0.22), kit.rng.uniform(0.45, 0.6)
    kit.add("cylinder", (radius, radius, 0.03), (0, 0, height - 0.03))
    for x, y in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
        leg = (height - 0.06) / 2
        kit.add("cylinder", (0.022, 0.022, leg), (0.6 * radius * x, 0.6 * radius * y, leg))


def _robot(kit: _Kit) -> None:
    x, y, z = kit.rng.uniform((0.16, 0.2, 0.22), (0.2, 0.26, 0.3))
    kit.add("box", (x, y, z), (0, 0, 0.14 + z))
    kit.add("sphere", (0.15,) * 3, (0, 0, 0.14 + 2 * z + 0.13))
    kit.add("box", (0.03, 0.07, 0.02), (0.14, 0, 0.14 + 2 * z + 0.17), colour=_DARK)
    for side in (-1, 1):
        kit.add("cylinder", (0.14, 0.14, 0.04), (0, side * (y + 0.04), 0.14), axis="y", colour=_DARK)


def _walker(kit: _Kit) -> None:
    height = kit.rng.uniform(1.55, 1.85)
    for side in (-1, 1):
        kit.add("capsule", (0.085, 0.085, 0.24 * height), (0, 0.1 * side, 0.24 * height), colour=_DARK)
        kit.add("capsule", (0.055, 0.055, 0.17 * height), (0, 0.26 * side, 0.63 * height))
    kit.add("box", (0.12, 0.2, 0.18 * height), (0, 0, 0.65 * height))
    kit.add("sphere", (0.11,) * 3, (0, 0, height - 0.11), colour=_SKIN)


def _wheels(kit: _Kit, length: float, width: float, radius: float) -> None:
    for x in (-0.62, 0.62):
        for y in (-1, 1):
            centre = (x * length, y * (width - 0.4 * radius), radius)
            kit.add("cylinder", (radius, radius, 0.4 * radius), centre, axis="y", colour=_DARK)


def _car(kit: _Kit, unit: float = 1.0) -> None:
    length, width = kit.rng.uniform(2.0, 2.25) * unit, kit.rng.uniform(0.85, 0.92) * unit
    kit.add("box", (length, width, 0.28 * unit), (0, 0, 0.58 * unit), scale=1.2 * unit)
    kit.add("box", (length * 0.52, width * 0.9, 0.27 * unit), (-0.12 * length, 0, 1.13 * unit), scale=1.2 * unit)
    kit.add("box", (0.02 * unit, width * 0.8, 0.2 * unit), (0.41 * length, 0, 1.1 * unit), colour=_DARK)
    _wheels(kit, length, width, 0.32 * unit)


def _toy(kit: _Kit) -> None:
    _car(kit, 0.05)


def _van(kit: _Kit) -> None:
    length, width, height = kit.rng.uniform(2.5, 2.8), kit.rng.uniform(0.95, 1.02), kit.rng.uniform(0.8, 0.95)
    kit.add("box", (length, width, height), (0, 0, 0.35 + height), scale=1.5)
    kit.add("box", (0.03, width * 0.8, 0.3), (length, 0, 0.35 + 1.4 * height), colour=_DARK)
    _wheels(kit, length, width, 0.36)


def _sheep(kit: _Kit) -> None:
    kit.add("capsule", (0.26, 0.26, 0.5), (0, 0, 0.66), axis="x")
    kit.add("sphere", (0.15,) * 3, (0.58, 0, 0.85), colour=_DARK)
    for x, y in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
        kit.add("cylinder", (0.05, 0.05, 0.24), (0.28 * x, 0.14 * y, 0.24), colour=_DARK)


def _tree(kit: _Kit) -> None:
    height, crown = kit.rng.uniform(1.5, 2.6), kit.rng.uniform(0.9, 1.6)
    kit.add("cylinder", (0.16, 0.16, height / 2), (0, 0, height / 2), colour=(0.36, 0.26, 0.18))
    kit.add("sphere", (crown,) * 3, (0, 0, height + 0.7 * crown), colour=(0.22, 0.45, 0.18), scale=0.8)


_BUILDERS: dict[str, Callable[[_Kit], None]] = {
    "ball": _ball,
    "marble": _marble,
    "crate": _crate,
    "book": _book,
    "barrel": _barrel,
    "can": _can,
    "cup": _cup,
    "bottle": _bottle,
    "stool": _stool,
    "robot": _robot,
    "walker": _walker,
    "car": _car,
    "toy": _toy,
    "van": _van,
    "sheep": _sheep,
    "tree": _tree,
}
NOUNS = {"toy": "toy car"}
"""Where the category is not what people say."""


def build_body(
    rng: np.random.Generator,
    category: str,
    colour: str,
    paint: Painter,
    at: tuple[float, float] = (0.0, 0.0),
) -> Body:
    """A still thing of a category, standing on the ground at a spot; its origin is the centre of its box.

    Args:
        rng: draws its size.
        category: a key of the builders above.
        colour: a name in `COLOURS`; empty for scenery, whose parts have colours of their own.
        paint: makes textures.
        at: x and y, metres.
    """
    kit = _Kit(rng, COLOURS.get(colour, _SKIN), paint)
    _BUILDERS[category](kit)
    low = np.min([np.array(part.centre) - part.extent() for part in kit.parts], axis=0)
    high = np.max([np.array(part.centre) + part.extent() for part in kit.parts], axis=0)
    middle = (low + high) / 2
    parts = []
    for part in kit.parts:
        x, y, z = (np.array(part.centre) - middle).tolist()
        parts.append(replace(part, centre=(x, y, z)))
    spot = (float(at[0]), float(at[1]), float((high - low)[2] / 2))
    return Body(category=NOUNS.get(category, category), colour=colour, parts=tuple(parts), trajectory=still(spot))
