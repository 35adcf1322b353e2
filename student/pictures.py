"""What the student predicts beside what the cache holds, as one picture of a clip (arXiv 2512.17012, Figure 5).

Every pair of rows shares one scale of colours, that of the cached map: pictures of the same clip at two steps can be
compared too, and a prediction beyond the scale has the colour of the scale's end.

Shape suffixes: `t` frames or latent steps, `h w` pixels, `c` channels.
"""

import io
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p4dprep.pictures import RGB, Row, frame_row, strip, target_rows
from p4dprep.targets import TargetSpec

Values = NDArray[np.float32]

_MAX_COLUMNS, _CELL_WIDTH = 5, 120
"""Two pictures must stand side by side on a page and stay legible."""

_MIN_SPREAD = 1e-6


def write_maps(
    path: Path,
    *,
    frames_thwc: RGB,
    time_seconds_t: NDArray[np.float64],
    cached: Mapping[str, NDArray[Any]],
    predicted: Mapping[str, NDArray[Any]],
    specs: Mapping[str, TargetSpec],
    title: str,
) -> None:
    """Write a WebP picture of a clip: its frames, then under every cached map the predicted one in the same colours.

    The same input gives the same bytes. The file appears whole or not at all.

    Args:
        path: of the picture; its folder is made.
        frames_thwc: uint8 RGB frames that the student saw, (t, h, w, 3).
        time_seconds_t: float64 times of the frames, (t,).
        cached: array name to the clip's physical values, NaN where invalid.
        predicted: array name to as many values: maps as heads give them (logits for a motion mask), latents of all
            taps. A target that is cached only is not drawn.
        specs: array name to the target's declaration.
        title: stands above it, such as the step and the clip.

    Raises:
        ValueError: a predicted array is not cached, or not of the declared size.
    """
    rows = [frame_row(frames_thwc)]
    for name, values in predicted.items():
        if name not in cached or name not in specs:
            raise ValueError(f"{name} is predicted, but only {sorted(cached.keys() & specs.keys())} are cached")
        spec = specs[name]
        if values.size != spec.num_values or cached[name].shape != spec.shape:
            raise ValueError(f"{name}: predicted {values.shape}, cached {cached[name].shape}, declared {spec.shape}")
        ours, true = (np.asarray(array, np.float32).reshape(spec.shape) for array in (values, cached[name]))
        rows += _pair(name, spec, ours, true, frames_thwc)
    buffer = io.BytesIO()
    strip(rows, time_seconds_t, title=title, max_columns=_MAX_COLUMNS, cell_width=_CELL_WIDTH).save(
        buffer, "WEBP", quality=88
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(buffer.getvalue())
    os.replace(partial, path)


def _pair(name: str, spec: TargetSpec, ours: Values, true: Values, frames_thwc: RGB) -> list[Row]:
    """Rows of one target: cached, then predicted; of latents the first and the last layer."""
    group = name.removesuffix(f"_{spec.name}")
    comparable, note = _comparable(spec, ours, true)
    # A mask's head gives logits.
    ours_spec = replace(spec, quantity="motion logit") if spec.quantity == "motion mask" else spec
    cached_rows = target_rows(group, spec, true, frames_thwc)
    predicted_rows = target_rows(group, ours_spec, comparable, frames_thwc, like=true)
    pairs = list(zip(cached_rows, predicted_rows, strict=True))
    chosen = [pairs[0], pairs[-1]] if spec.quantity == "latents" and len(pairs) > 1 else pairs
    rows: list[Row] = []
    for cached, predicted in chosen:
        rows.append(replace(cached, title=f"{cached.title} cached", starts_group=True))
        caption = note or predicted.caption
        rows.append(replace(predicted, title=f"{predicted.title} predicted", caption=caption, legend=None))
    return rows


def _comparable(spec: TargetSpec, ours: Values, true: Values) -> tuple[Values, str]:
    """A prediction as it can be compared with the cached map, and what must be said about it beside the scale."""
    ours = np.where(np.isfinite(ours), ours, np.float32(np.nan))
    # Nothing teaches the student what frames without a target hold.
    unknown = np.ones(len(ours), bool)
    unknown[spec.valid_frames()] = False
    ours[unknown] = np.nan
    if spec.quantity in ("relative depth", "relative disparity"):
        fitted = _fitted(ours, true)
        # A relative depth that lands behind the camera is nearest, not missing.
        fitted = np.maximum(fitted, np.finfo(np.float32).tiny) if spec.quantity == "relative depth" else fitted
        return fitted, "same colours, each frame fitted in scale and shift"
    if spec.quantity == "metric depth" and np.isfinite(ours).any():
        low, high = np.nanpercentile(ours, (2, 98))
        return ours, f"same colours; its own depths are {low:.3g} to {high:.3g} {spec.units}"
    return ours, {"plücker rays": "same colours", "latents": "same axes and colours"}.get(spec.quantity, "")


def _fitted(ours: Values, true: Values) -> Values:
    """Every frame of a prediction moved to the cached one's median and mean absolute deviation.

    That is what the scale and shift invariant loss compares (`student.losses`). A least-squares fit could turn an
    inverted prediction round and make it look right.
    """
    fitted = np.full_like(ours, np.nan)
    for result, frame, target in zip(fitted, ours, true, strict=True):
        exists = np.isfinite(frame) & np.isfinite(target)
        if exists.any():
            (centre, spread), (true_centre, true_spread) = (_spread(some[exists]) for some in (frame, target))
            result[...] = (frame - centre) / max(spread, _MIN_SPREAD) * true_spread + true_centre
    return fitted


def _spread(values_n: Values) -> tuple[float, float]:
    centre = float(np.median(values_n))
    return centre, float(np.abs(values_n - centre).mean())
