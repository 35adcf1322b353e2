"""How depth, flow, motion, rays and latents look, so that people look before they read.

Shape suffixes: `t` frames or latent steps, `h w` pixels, `c` channels, `k` layers. NaN is a value that does not exist
and is always drawn as a grey hatch, never as a colour of the scale.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Literal

import jinja2
import matplotlib
import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont

from p4dprep.storage import redact
from p4dprep.targets import TargetSpec

RGB = NDArray[np.uint8]

MAX_COLUMNS = 8
"""More frames than these would not be legible in one strip at 100%."""

_CELL_WIDTH, _LABEL_WIDTH, _GAP, _GROUP_GAP, _TITLE_HEIGHT, _TIMES_HEIGHT = 150, 190, 4, 12, 34, 22
_PAPER, _INK, _FAINT = (22, 24, 29), (236, 238, 242), (154, 161, 173)
_HATCH = (86, 104)
_MOVING = np.array([255, 40, 150], np.float32)
_WHEEL_STEPS = (0, 15, 21, 25, 36, 49, 55)
_WHEEL_RGB = ((255, 0, 0), (255, 255, 0), (0, 255, 0), (0, 255, 255), (0, 0, 255), (255, 0, 255), (255, 0, 0))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a strip: pictures of one thing over time.

    Attributes:
        title: what it is, such as `depth_anything/depth`.
        caption: quantity, range and units.
        rgb_thwc: uint8 RGB, (t, h, w, 3); t may be shorter than the clip's frames (a tubelet of 2 halves it).
        legend: a small uint8 RGB picture (h, w, 3) that explains the colours, if they have an order.
        starts_group: whether it stands apart from the row above it.
    """

    title: str
    caption: str
    rgb_thwc: RGB
    legend: RGB | None = None
    starts_group: bool = False

    def __post_init__(self) -> None:
        shape = self.rgb_thwc.shape
        if len(shape) != 4 or shape[3] != 3 or 0 in shape or self.rgb_thwc.dtype != np.uint8:
            raise ValueError(f"row {self.title}: {shape} {self.rgb_thwc.dtype} is not uint8 (t, h, w, 3)")

    def __repr__(self) -> str:
        return f"Row({self.title!r}, {self.caption!r}, rgb_thwc={self.rgb_thwc.shape})"


def _hatched(rgb_thwc: ArrayLike, valid_thw: NDArray[np.bool_]) -> RGB:
    """Round colours to uint8 and draw a grey diagonal hatch wherever there is no value."""
    _, height, width = valid_thw.shape
    stripes = (np.add.outer(np.arange(height), np.arange(width)) // 4) % 2
    hatch_hw = np.where(stripes, *_HATCH).astype(np.float32)
    colours = np.where(valid_thw[..., None], rgb_thwc, hatch_hw[..., None])
    return np.asarray(np.rint(np.clip(colours, 0, 255)), np.uint8)


def _has_value(values_c: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which vectors on the last axis are finite throughout."""
    return np.asarray(np.isfinite(values_c).all(axis=-1), np.bool_)


def _stretch(
    values: NDArray[np.float32], valid: NDArray[np.bool_], like_n: NDArray[np.float32]
) -> tuple[NDArray[np.float32], float, float]:
    """Values brought to 0..1 between the 2nd and 98th percentile of `like_n`, and these; 0 where not valid."""
    if not like_n.size:
        return np.zeros_like(values), float("nan"), float("nan")
    low, high = (float(value) for value in np.percentile(like_n, (2, 98)))
    unit = (values - low) / max(high - low, 1e-12) if high > low else np.full_like(values, 0.5)
    return np.clip(np.where(valid, unit, 0), 0, 1).astype(np.float32), low, high


def _turbo(unit: NDArray[np.float32]) -> NDArray[np.float32]:
    """Blue at 0 to red at 1, without the map's almost black ends."""
    return np.asarray(matplotlib.colormaps["turbo"](0.06 + 0.88 * unit)[..., :3] * 255, np.float32)


def depth_rgb(
    depth_thw: ArrayLike,
    *,
    quantity: Literal["metric depth", "relative depth", "relative disparity"],
    like: ArrayLike | None = None,
) -> tuple[RGB, float, float]:
    """Colours of a depth or disparity clip: near is always red, far is always blue.

    Colours are linear in disparity (1/depth), where the eye's and the camera's precision lies, between the 2nd and
    98th percentile over the whole clip, so that a colour means one distance at all times.

    Args:
        depth_thw: (t, h, w), NaN where there is no depth.
        quantity: `relative disparity` grows towards the camera, the others away from it.
        like: the clip whose percentiles end the colours, so that two clips can be compared; None takes this one.

    Returns:
        uint8 (t, h, w, 3), and the values at the far and near end of the colours (NaN if there is none).
    """
    is_disparity = quantity == "relative disparity"
    nearness, valid = _nearness(depth_thw, is_disparity)
    like_nearness, like_valid = (nearness, valid) if like is None else _nearness(like, is_disparity)
    unit, far, near = _stretch(nearness, valid, like_nearness[like_valid])
    rgb = _turbo(unit)
    if not is_disparity:
        far, near = (1 / value if value else float("inf") for value in (far, near))
    return _hatched(rgb, valid), far, near


def _nearness(depth_thw: ArrayLike, is_disparity: bool) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """What grows towards the camera, and where there is a value."""
    depth = np.asarray(depth_thw, np.float32)
    valid = np.isfinite(depth) & (is_disparity | (depth > 0))
    return depth if is_disparity else np.reciprocal(np.where(valid, depth, np.float32(1))), valid


def flow_rgb(flow_thw2: ArrayLike, *, like: ArrayLike | None = None) -> tuple[RGB, float, float]:
    """Colours of a flow clip on the Middlebury wheel: hue is direction, strength of colour is length, white is rest.

    Source: Baker et al., "A Database and Evaluation Methodology for Optical Flow", IJCV 2011. Full colour is the 99th
    percentile of the lengths over the whole clip, so that one wild vector does not turn the rest white; longer ones
    are darkened as in the paper's code.

    Args:
        flow_thw2: (t, h, w, 2), right and down in pixels; NaN where there is none.
        like: the clip whose lengths decide what full colour is; None takes this one.

    Returns:
        uint8 (t, h, w, 3), the length at full colour and the longest length, in pixels (NaN if there is none).
    """
    flow = np.asarray(flow_thw2, np.float32)
    valid = _has_value(flow)
    flow = np.where(valid[..., None], flow, np.float32(0))
    length = np.hypot(flow[..., 0], flow[..., 1])
    if not valid.any():
        return _hatched(np.zeros((*valid.shape, 3)), valid), float("nan"), float("nan")
    longest = float(length[valid].max())
    like_length = length[valid] if like is None else _lengths(np.asarray(like, np.float32))
    full = (float(np.percentile(like_length, 99)) or float(like_length.max())) if like_length.size else longest
    radius = (length / max(full, 1e-6))[..., None]
    step = (np.arctan2(-flow[..., 1], -flow[..., 0]) / np.pi + 1) / 2 * _WHEEL_STEPS[-1]
    hue = np.stack([np.interp(step, _WHEEL_STEPS, channel) for channel in zip(*_WHEEL_RGB, strict=True)], axis=-1)
    rgb = np.where(radius <= 1, 255 - radius * (255 - hue), 0.75 * hue)
    return _hatched(rgb, valid), full, longest


def _lengths(vectors_thwc: NDArray[np.float32]) -> NDArray[np.float32]:
    """Lengths (n,) of the vectors that exist."""
    return np.asarray(np.linalg.norm(vectors_thwc[_has_value(vectors_thwc)], axis=-1), np.float32)


def motion_rgb(
    motion_thw: ArrayLike, *, quantity: Literal["motion logit", "motion mask"], frames_thwc: RGB | None = None
) -> RGB:
    """The probability that a pixel moves in 3D, as pink over the greyed frame (over dark grey without frames).

    Args:
        motion_thw: (t, h, w) logits or 0/1; NaN where there is none.
        quantity: which of the two.
        frames_thwc: the clip's frames, uint8 RGB of any size, as many as `motion_thw` has.

    Returns:
        uint8 (t, h, w, 3).
    """
    motion = np.asarray(motion_thw, np.float32)
    valid = np.isfinite(motion)
    motion = np.where(valid, motion, 0)
    share = motion if quantity == "motion mask" else 1 / (1 + np.exp(-np.clip(motion, -30, 30)))
    if frames_thwc is None:
        grey = np.full((*motion.shape, 1), 48, np.float32)
    else:
        grey = _resized(frames_thwc, motion.shape[2], motion.shape[1]).mean(axis=-1, keepdims=True) * 0.8
    return _hatched(grey + 0.75 * share[..., None] * (_MOVING - grey), valid)


def rays_rgb(rays_thwc: ArrayLike, *, like: ArrayLike | None = None) -> tuple[RGB, RGB, float]:
    """Plücker rays `[d, o x d]` as two pictures: where each pixel looks, and how far its ray passes the origin.

    Directions are `(d + 1) / 2` as red, green and blue, comparable between clips. Moments are drawn about grey, scaled
    by the clip's longest: a camera that stays at the origin is grey, one that travels gains colour.

    Args:
        rays_thwc: (t, h, w, 6); NaN where there is none.
        like: the clip whose longest moment has full colour; None takes this one.

    Returns:
        Directions and moments, uint8 (t, h, w, 3), and the longest moment, of full colour, in the cache's unit of
        length.
    """
    rays = np.asarray(rays_thwc, np.float32)
    valid = _has_value(rays)
    rays = np.where(valid[..., None], rays, 0)
    direction, moment = rays[..., :3], rays[..., 3:]
    direction = direction / np.maximum(np.linalg.norm(direction, axis=-1, keepdims=True), 1e-6)
    like_moment = moment if like is None else np.asarray(like, np.float32)[..., 3:]
    longest = float(_lengths(like_moment).max(initial=0))
    colours = (127.5 * (1 + direction), 127.5 * (1 + moment / max(longest, 1e-6)))
    return _hatched(colours[0], valid), _hatched(colours[1], valid), longest


def error_rgb(error_thw: ArrayLike, *, full: float) -> RGB:
    """How wrong each pixel is: black at 0, over red to pale yellow at `full` and beyond, uint8 (t, h, w, 3).

    Args:
        error_thw: (t, h, w), not negative; NaN where nothing was compared.
        full: the error at the end of the colours.
    """
    error = np.asarray(error_thw, np.float32)
    valid = np.isfinite(error)
    share = np.clip(np.where(valid, error, 0) / max(full, 1e-12), 0, 1)
    return _hatched(matplotlib.colormaps["inferno"](share)[..., :3] * 255, valid)


def _principal_axes(tokens_nc: NDArray[np.float32], num_axes: int = 3) -> NDArray[np.float32]:
    """The first principal axes (c, num_axes) of centred tokens, by randomised subspace iteration (Halko et al. 2011).

    A full decomposition of 2,048 x 1,408 features takes seconds, this some milliseconds. The start is fixed and the
    largest loading of each axis is positive, so the same tokens give the same axes.
    """
    channels = tokens_nc.shape[1]
    basis = np.random.default_rng(0).standard_normal((channels, min(channels, num_axes + 8))).astype(np.float32)
    for _ in range(8):
        basis, _ = np.linalg.qr(tokens_nc.T @ (tokens_nc @ basis))
    _, _, rotation = np.linalg.svd(tokens_nc @ basis, full_matrices=False)
    axes = (basis @ rotation.T)[:, :num_axes]
    signs = np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])
    return np.pad(axes * signs, ((0, 0), (0, num_axes - axes.shape[1])))


def latents_rgb(latents_thwc: ArrayLike, *, like: ArrayLike | None = None) -> RGB:
    """One layer's latents: their first three principal components as red, green and blue.

    One basis and one scale (2nd to 98th percentile) for the whole clip: what keeps its colour over time keeps its
    meaning. Tokens are brought to unit length first; a few outlier tokens would take the basis over otherwise.

    Args:
        latents_thwc: (t, h, w, c) of one layer; NaN where there is none.
        like: the clip whose basis and scale are used, so that two clips can be compared; None takes this one.

    Returns:
        uint8 (t, h, w, 3).
    """
    latents = np.asarray(latents_thwc, np.float32)
    valid = _has_value(latents)
    tokens = _unit_tokens(latents)
    like_tokens = tokens if like is None else _unit_tokens(np.asarray(like, np.float32))
    if not (len(tokens) and len(like_tokens)):
        return _hatched(np.zeros((*valid.shape, 3)), np.zeros_like(valid))
    mean = like_tokens.mean(axis=0)
    axes = _principal_axes(like_tokens - mean)
    components, like_components = (tokens - mean) @ axes, (like_tokens - mean) @ axes
    # Rounding noise of tokens that are all alike must not be stretched into colours.
    is_noise = np.ptp(like_components, axis=0) < 1e-5
    components[:, is_noise], like_components[:, is_noise] = 0, 0
    rgb = np.zeros((*valid.shape, 3), np.float32)
    for channel in range(3):
        unit, _, _ = _stretch(components[:, channel], np.ones(len(tokens), bool), like_components[:, channel])
        rgb[valid, channel] = unit * 255
    return _hatched(rgb, valid)


def _unit_tokens(latents_thwc: NDArray[np.float32]) -> NDArray[np.float32]:
    """The tokens (n, c) that exist, at length 1."""
    tokens = latents_thwc[_has_value(latents_thwc)]
    return np.asarray(tokens / np.maximum(np.linalg.norm(tokens, axis=-1, keepdims=True), 1e-12), np.float32)


def _resized(rgb_thwc: RGB, width: int, height: int) -> RGB:
    """Frames at another size; small maps keep their grid visible, everything else is filtered."""
    is_grid = rgb_thwc.shape[2] * 2 < width
    how = Image.Resampling.NEAREST if is_grid else Image.Resampling.LANCZOS
    return np.stack([np.asarray(Image.fromarray(frame).resize((width, height), how)) for frame in rgb_thwc])


def _flow_wheel(size: int = 44) -> RGB:
    """The legend of flow: the colour at each place is that of the vector from the centre to it."""
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    flow_hw2 = np.stack(np.meshgrid(axis, axis), axis=-1)
    outside = np.hypot(flow_hw2[..., 0], flow_hw2[..., 1]) > 1
    wheel: RGB = flow_rgb(flow_hw2[None])[0][0]
    wheel[outside] = _PAPER
    return wheel


def _depth_bar(width: int = 120, height: int = 9) -> RGB:
    """The legend of depth: near on the left, far on the right."""
    bar = np.linspace(1, 0, width, dtype=np.float32)[None].repeat(height, axis=0)
    return np.asarray(np.rint(_turbo(bar)), np.uint8)


def frame_row(frames_thwc: RGB) -> Row:
    """The row of the frames that the teachers saw, uint8 RGB (t, h, w, 3)."""
    num_frames, height, width, _ = frames_thwc.shape
    return Row(title="frame", caption=f"{num_frames} frames, {width} x {height} px", rgb_thwc=frames_thwc)


def target_rows(
    group: str,
    spec: TargetSpec,
    values: NDArray[np.generic],
    frames_thwc: RGB | None = None,
    like: NDArray[np.generic] | None = None,
) -> tuple[Row, ...]:
    """The rows that show one target of one clip.

    Args:
        group: name of the target group in the cache, for the title.
        spec: the target's declaration; its quantity chooses the colours.
        values: physical values, NaN where invalid: (t, y, x) or (t, y, x, 1), (t, y, x, uv), (t, y, x, 6) for rays,
            (layer, t, y, x, channel) or (t, y, x, channel) for latents.
        frames_thwc: the clip's frames, drawn under motion if there are as many as the target has.
        like: values of the same shape whose scale of colours is used; None takes the values' own.

    Returns:
        One row; two for rays; one per layer for latents. None for other shapes, such as latents without a grid.
    """
    title = f"{group}/{spec.name}"
    array = np.asarray(values, np.float32)
    scale = array if like is None else np.asarray(like, np.float32).reshape(array.shape)
    match spec.quantity:
        case "metric depth" | "relative depth" | "relative disparity" if (depth := _thw(array)) is not None:
            rgb, far, near = depth_rgb(depth, quantity=spec.quantity, like=scale)
            unit = "" if spec.units == "1" else f" {spec.units}"
            caption = f"{spec.quantity}\nnear {near:.3g}{unit}, far {far:.3g}{unit}"
            return (Row(title=title, caption=caption, rgb_thwc=rgb, legend=_depth_bar()),)
        case "forward flow" | "backward flow" if array.ndim == 4 and array.shape[-1] == 2:
            rgb, full, longest = flow_rgb(array, like=scale)
            caption = f"{spec.quantity}\nfull at {full:.3g} px, max {longest:.3g} px"
            return (Row(title=title, caption=caption, rgb_thwc=rgb, legend=_flow_wheel()),)
        case "motion logit" | "motion mask" if (motion := _thw(array)) is not None:
            under = frames_thwc if frames_thwc is not None and len(frames_thwc) == len(motion) else None
            rgb = motion_rgb(motion, quantity=spec.quantity, frames_thwc=under)
            moving = (motion > (0.5 if spec.quantity == "motion mask" else 0)).mean()
            return (Row(title=title, caption=f"{spec.quantity}\npink moves: {moving:.1%} of pixels", rgb_thwc=rgb),)
        case "plücker rays" if array.ndim == 4 and array.shape[-1] == 6:
            direction, moment, longest = rays_rgb(array, like=scale)
            return (
                Row(title=f"{title} d", caption="ray direction\nx red, y green, z blue", rgb_thwc=direction),
                Row(title=f"{title} o x d", caption=f"ray moment, grey is 0\nlongest {longest:.3g}", rgb_thwc=moment),
            )
        case "latents" if array.ndim in (4, 5):
            return _latent_rows(title, spec.dims[0], *(some.reshape(-1, *array.shape[-4:]) for some in (array, scale)))
    return ()


def _thw(array: NDArray[np.float32]) -> NDArray[np.float32] | None:
    """A map without a last axis of one channel; None if it is no map."""
    if array.ndim == 4 and array.shape[-1] == 1:
        return array[..., 0]
    return array if array.ndim == 3 else None


def _latent_rows(
    title: str, layer_axis: str, latents_kthwc: NDArray[np.float32], like_kthwc: NDArray[np.float32]
) -> tuple[Row, ...]:
    num_layers, steps, height, width, channels = latents_kthwc.shape
    caption = f"PCA of {channels} channels\n{steps} x {height} x {width} tokens"
    titles = [title] if num_layers == 1 else [f"{title} {layer_axis} {k + 1}/{num_layers}" for k in range(num_layers)]
    return tuple(
        Row(title=name, caption=caption, rgb_thwc=latents_rgb(latents_thwc, like=like_thwc))
        for name, latents_thwc, like_thwc in zip(titles, latents_kthwc, like_kthwc, strict=True)
    )


def _write_lines(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, size: int, ink: tuple[int, ...]) -> int:
    """Draw text wrapped to the label column; returns the y below it."""
    font = ImageFont.load_default(size)
    x, y = place
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for character in paragraph:
            if font.getlength(line + character) > _LABEL_WIDTH - 2 * _GAP - x:
                head, _, tail = line.rpartition(" ")
                lines.append(head or line)
                line = tail if head else ""
            line += character
        lines.append(line)
    for line in lines:
        draw.text((x, y), line, font=font, fill=ink)
        y += size + 4
    return y


def _draw_label(canvas: Image.Image, row: Row, top: int) -> None:
    draw = ImageDraw.Draw(canvas)
    y = _write_lines(draw, (8, top + 4), row.title, 15, _INK)
    y = _write_lines(draw, (8, y), row.caption, 12, _FAINT)
    if row.legend is not None:
        canvas.paste(Image.fromarray(row.legend), (8, y + 2))


def strip(
    rows: Sequence[Row],
    time_seconds_t: NDArray[np.float64],
    *,
    title: str = "",
    max_columns: int = MAX_COLUMNS,
    cell_width: int = _CELL_WIDTH,
) -> Image.Image:
    """One picture of a clip: a column per time (`max_columns` at most, evenly chosen), a row per frame or target.

    A row with fewer steps than the clip has frames shows the step that covers the frame (frames 2j and 2j+1 are step j
    of a tubelet of 2).

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("a strip needs at least one row")
    num_frames = len(time_seconds_t)
    columns = np.unique(np.linspace(0, num_frames - 1, min(num_frames, max_columns)).round().astype(int))
    height = _cell_height(rows, cell_width)
    times_top = _TITLE_HEIGHT if title else _GAP
    head = times_top + _TIMES_HEIGHT
    tops = head + np.cumsum([_GROUP_GAP * row.starts_group for row in rows]) + np.arange(len(rows)) * (height + _GAP)
    size = (_LABEL_WIDTH + len(columns) * (cell_width + _GAP) + _GAP, int(tops[-1]) + height + 2 * _GAP)
    canvas = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((8, 9), title, font=ImageFont.load_default(16), fill=_INK)
    for place, frame in enumerate(columns):
        x = _LABEL_WIDTH + place * (cell_width + _GAP)
        draw.text((x, times_top), f"{time_seconds_t[frame]:.2f} s", font=ImageFont.load_default(13), fill=_FAINT)
    for row, top in zip(rows, tops.tolist(), strict=True):
        _draw_label(canvas, row, top)
        steps = columns * len(row.rgb_thwc) // num_frames
        for place, picture in enumerate(_resized(row.rgb_thwc[steps], cell_width, height)):
            canvas.paste(Image.fromarray(picture), (_LABEL_WIDTH + place * (cell_width + _GAP), top))
    return canvas


def _cell_height(rows: Sequence[Row], cell_width: int) -> int:
    """Height of a cell with the first row's aspect, tall enough for a label, not so tall that it fills the screen."""
    _, height, width, _ = rows[0].rgb_thwc.shape
    return int(np.clip(round(cell_width * height / width), 108, 260))


def animation(rows: Sequence[Row], num_frames: int) -> bytes:
    """The first six rows side by side as an animated WebP that loops, six pictures a second."""
    shown = rows[:6]
    height = _cell_height(rows, _CELL_WIDTH)
    frames = []
    cells = [_resized(row.rgb_thwc, _CELL_WIDTH, height) for row in shown]
    for frame in range(num_frames):
        canvas = Image.new("RGB", (len(shown) * (_CELL_WIDTH + _GAP) - _GAP, height + 18), _PAPER)
        draw = ImageDraw.Draw(canvas)
        for place, (row, cell) in enumerate(zip(shown, cells, strict=True)):
            x = place * (_CELL_WIDTH + _GAP)
            canvas.paste(Image.fromarray(cell[frame * len(cell) // num_frames]), (x, 0))
            draw.text((x + 3, height + 2), row.title[:24], font=ImageFont.load_default(12), fill=_INK)
        frames.append(canvas)
    buffer = io.BytesIO()
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:], duration=166, loop=0, quality=75)
    return buffer.getvalue()


@dataclass(frozen=True, kw_only=True)
class Card:
    """One clip on the page of pictures.

    Attributes:
        clip_id, uri: of the clip; credentials in the URI are removed when the page is made.
        facts: short sentences, such as its times and its number of distinct frames.
        rows: its pictures; none if nothing of it is committed.
        time_seconds_t: its clock, float64 (t,).
        note: what is missing and why, or empty.
    """

    clip_id: str
    uri: str
    facts: tuple[str, ...]
    rows: tuple[Row, ...]
    time_seconds_t: NDArray[np.float64]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A titled table of texts."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def gallery_html(
    *, title: str, facts: Sequence[tuple[str, str]], tables: Sequence[Table], cards: Sequence[Card]
) -> str:
    """One self-contained page: no script, no outside address, every text escaped, credentials removed from addresses.

    Args:
        title: heading and page title.
        facts: names and values at the top.
        tables: below them; those without rows are left out.
        cards: one per clip.
    """
    source = files("p4dprep").joinpath("templates/gallery.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"redact": redact, "strip": _strip_uri, "animation": _animation_uri}
    return environment.from_string(source).render(
        title=title, facts=facts, tables=[table for table in tables if table.rows], cards=cards
    )


def _strip_uri(card: Card) -> str:
    buffer = io.BytesIO()
    strip(card.rows, card.time_seconds_t).save(buffer, "WEBP", quality=88)
    return _data_uri(buffer.getvalue())


def _animation_uri(card: Card) -> str:
    return _data_uri(animation(card.rows, len(card.time_seconds_t)))


def _data_uri(webp: bytes) -> str:
    return f"data:image/webp;base64,{base64.b64encode(webp).decode('ascii')}"
