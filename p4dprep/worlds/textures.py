"""Solid textures: patterns over 3D points, smoothed by the pixel's footprint so that they do not shimmer.

A pattern maps points (3, n), in periods, to values (n,) in 0-1. Each split has its own family.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from p4dprep.worlds.scene import PLAIN_SPLITS, Split, Texture

Array = NDArray[np.float32]

_FADE_PERIODS = (0.3, 0.7)
"""A pattern is whole where a pixel covers less of its period, and grey where it covers more."""
_TURN = np.float32(2 * np.pi)


def _wave(x: Array) -> Array:
    wave: Array = np.sin(_TURN * x)
    return wave


def _soft(x: Array, sharpness: float = 4.0) -> Array:
    """A signed wave or distance to a soft step in 0-1."""
    step: Array = np.clip(0.5 + np.float32(sharpness / 2) * x, 0, 1)
    return step


def _checker(p: Array) -> Array:
    return _soft(_wave(p[0]) * _wave(p[1]) + 0.2 * _wave(p[2] * 0.5))


def _stripes(p: Array) -> Array:
    return _soft(_wave(p[0] + 0.5 * p[1] + 0.7 * p[2]))


def _waves(p: Array) -> Array:
    return 0.5 + 0.25 * (_wave(p[0] + 0.3 * _wave(p[1])) + _wave(0.7 * p[1] + 0.4 * _wave(p[2] + 0.5 * p[0])))


def _speckle(p: Array) -> Array:
    coarse = _wave(p[0] + 0.31 * p[2]) + _wave(1.13 * p[1] - 0.27 * p[0]) + _wave(0.83 * p[2] + 0.41 * p[1])
    fine = _wave(2.7 * p[0] - 1.9 * p[1] + 0.3) * _wave(2.3 * p[1] + 1.7 * p[2])
    return np.clip(0.5 + 0.2 * coarse + 0.25 * fine, 0, 1)


def _marble(p: Array) -> Array:
    return 0.5 + 0.5 * _wave(0.6 * p[0] + 0.35 * p[2] + 0.5 * _wave(0.7 * p[1] + 0.3 * _wave(1.6 * p[0])))


def _tiles(p: Array) -> Array:
    gap = np.maximum(np.maximum(np.cos(_TURN * p[0]), np.cos(_TURN * p[1])), np.cos(_TURN * p[2]) - 0.03)
    return _soft(gap - 0.9, 8.0)


def _bricks(p: Array) -> Array:
    row = np.floor(2 * (p[1] + p[2]))
    across = p[0] + 0.5 * np.mod(row, 2)
    return _soft(np.maximum(np.cos(_TURN * across), np.cos(2 * _TURN * (p[1] + p[2]))) - 0.85, 8.0)


def _rings(p: Array) -> Array:
    return _soft(_wave(np.sqrt(p[0] ** 2 + p[1] ** 2 + p[2] ** 2)))


def _dots(p: Array) -> Array:
    return _soft(np.cos(_TURN * p[0]) + np.cos(_TURN * p[1]) + 0.3 * np.cos(_TURN * p[2]) - 0.8, 3.0)


def _weave(p: Array) -> Array:
    over = _soft(_wave(0.5 * p[0]) * _wave(0.5 * p[1]) + 0.1 * _wave(0.25 * p[2]))
    return over * (0.5 + 0.5 * _wave(2 * p[0] + p[2])) + (1 - over) * (0.5 + 0.5 * _wave(2 * p[1] + p[2]))


def _patches(p: Array) -> Array:
    seed = 12.9898 * np.floor(p[0] + 0.13) + 78.233 * np.floor(p[1] + 0.21) + 37.719 * np.floor(0.5 * p[2] + 0.3)
    patch: Array = np.mod(np.abs(np.sin(seed)) * np.float32(43.7585), 1).astype(np.float32)
    return patch


def _zigzag(p: Array) -> Array:
    return _soft(_wave(p[0] + 0.5 * np.abs(np.mod(p[1] + 0.5 * p[2], 1) - 0.5) * 2))


def _diamonds(p: Array) -> Array:
    return _soft(_wave(0.7 * (p[0] + p[1])) * _wave(0.7 * (p[0] - p[1])) + 0.4 * _wave(0.6 * p[2]))


PATTERNS: dict[str, Callable[[Array], Array]] = {
    "checker": _checker,
    "stripes": _stripes,
    "waves": _waves,
    "speckle": _speckle,
    "marble": _marble,
    "tiles": _tiles,
    "bricks": _bricks,
    "rings": _rings,
    "dots": _dots,
    "weave": _weave,
    "patches": _patches,
    "zigzag": _zigzag,
    "diamonds": _diamonds,
}
FAMILIES: dict[Split, tuple[str, ...]] = {
    "train": ("checker", "stripes", "waves", "speckle", "marble", "tiles"),
    "val": ("bricks", "rings"),
    "test": ("dots", "weave", "patches"),
    "hard": ("zigzag", "diamonds"),
}
FAMILIES |= {split: FAMILIES["train" if split.endswith("train") else "test"] for split in PLAIN_SPLITS}


def colours(texture: Texture, points_3n: Array, footprint_n: Array) -> Array:
    """RGB (3, n) in 0-1 of points of a part.

    Args:
        texture: the look.
        points_3n: metres, in the part's coordinates.
        footprint_n: metres that a pixel covers on the surface, the longer way.
    """
    phase = np.asarray(texture.phase, np.float32)[:, None]
    value = PATTERNS[texture.pattern]((points_3n + phase) / np.float32(texture.scale))
    low, high = _FADE_PERIODS
    fade = np.clip((high - footprint_n / np.float32(texture.scale)) / (high - low), 0, 1)
    value = np.float32(0.5) + (value - np.float32(0.5)) * fade
    colour, other = (np.asarray(c, np.float32)[:, None] for c in (texture.colour, texture.other))
    mixed: Array = colour + (other - colour) * value
    return mixed
