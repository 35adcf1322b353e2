"""What was predicted, what is true, and the error, as rows of pictures that share one scale of colours."""

from collections.abc import Callable

import numpy as np

from p4dprep.evaluate.clip import MapPair
from p4dprep.pictures import RGB, Row, depth_rgb, error_rgb, flow_rgb, latents_rgb, motion_rgb, rays_rgb

_ERRORS = {
    "depth": ("relative error of depth", 0.5, ""),
    "flow": ("length of the error", 10.0, " px"),
    "motion": ("yellow is wrong", 1.0, ""),
    "camera": ("angle between rays", 10.0, " degrees"),
}
"""Kind of map to what its error is, the largest error at which the colours may end, and its unit."""


def pair_rows(pair: MapPair, *, title: str, truth_title: str, frames_thwc: RGB | None = None) -> tuple[Row, ...]:
    """Rows of the prediction, the truth and the error of one clip; none for latents without a grid.

    Args:
        pair: what was compared.
        title: of the prediction, such as `l4p/depth`.
        truth_title: of the truth.
        frames_thwc: the clip's frames, drawn under motion.
    """
    rows: list[Row] = []
    drawn = _draw(pair, frames_thwc)
    if drawn is None:
        return ()
    for rgb_thwc, name in zip(drawn[0], (title, truth_title), strict=True):
        rows.append(Row(title=name, caption=drawn[1], rgb_thwc=rgb_thwc))
    if pair.error_thw is not None and np.isfinite(pair.error_thw).any():
        what, most, unit = _ERRORS[pair.kind]
        full = min(most, float(np.nanpercentile(pair.error_thw, 99))) or most
        caption = f"{what}\nyellow from {full:.2g}{unit}, mean {np.nanmean(pair.error_thw):.3g}{unit}"
        rows.append(Row(title=f"{title} error", caption=caption, rgb_thwc=error_rgb(pair.error_thw, full=full)))
    return tuple(rows)


def _draw(pair: MapPair, frames_thwc: RGB | None) -> tuple[tuple[RGB, RGB], str] | None:
    """Prediction and truth in colours, and what these mean."""
    match pair.kind:
        case "depth":
            both, (far, near) = _together(pair, lambda maps: _split(depth_rgb(maps, quantity="metric depth")))
            return both, f"one scale for both\nnear {near:.3g}, far {far:.3g}"
        case "flow":
            both, (full, _) = _together(pair, lambda maps: _split(flow_rgb(maps)))
            return both, f"one scale for both\nfull at {full:.3g} px"
        case "motion":
            ours, true = (
                motion_rgb(maps, quantity="motion mask", frames_thwc=frames_thwc)
                for maps in (pair.predicted, pair.truth)
            )
            return (ours, true), f"pink moves: {pair.predicted.mean():.1%}\ntruly {pair.truth.mean():.1%}"
        case "camera":
            both, _ = _together(pair, lambda maps: (rays_rgb(maps)[0], ()))
            return both, "ray direction\nx red, y green, z blue"
        case "latents":
            if pair.truth.ndim not in (4, 5):
                return None
            both, _ = _together(pair, lambda maps: (latents_rgb(maps), ()))
            return both, "last tap, one PCA for both"


def _split(painted: tuple[RGB, float, float]) -> tuple[RGB, tuple[float, ...]]:
    return painted[0], painted[1:]


def _together(
    pair: MapPair, paint: Callable[[np.ndarray], tuple[RGB, tuple[float, ...]]]
) -> tuple[tuple[RGB, RGB], tuple[float, ...]]:
    """Paint both as one long clip, so that a colour means the same in both."""
    ours, true = (
        maps[-1] if pair.kind == "latents" and maps.ndim == 5 else maps for maps in (pair.predicted, pair.truth)
    )
    rgb, scale = paint(np.concatenate([ours, true]).astype(np.float32))
    return (rgb[: len(ours)], rgb[len(ours) :]), scale
