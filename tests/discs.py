"""Clips of textured discs that move, pass behind each other and grow before a panning background."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

NUM_FRAMES = 50
FPS = 25
HEIGHT, WIDTH = 240, 320
BACKGROUND = np.array([120.0, 130.0, 150.0])


def write_clip(path: Path, frames_thwc: NDArray[np.uint8]) -> None:
    """Encode uint8 RGB frames (t, h, w, 3) as H.264 in MP4 at `FPS`."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "20"})
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        stream.time_base = Fraction(1, FPS)
        for index, frame_hwc in enumerate(frames_thwc):
            frame = av.VideoFrame.from_ndarray(frame_hwc, format="rgb24")
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def draw_discs(seed: int) -> NDArray[np.uint8]:
    """Frames of one clip, (t, h, w, 3), the same for the same seed."""
    rng = np.random.default_rng(seed)
    y_hw, x_hw = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)
    pan = rng.uniform(-1.5, 1.5, 2)
    discs = [_random_disc(rng) for _ in range(3)]
    return np.stack([_draw(x_hw, y_hw, pan, discs, float(index)) for index in range(NUM_FRAMES)])


def _random_disc(rng: np.random.Generator) -> dict[str, NDArray[np.float64]]:
    return {
        "start": rng.uniform((60, 60), (WIDTH - 60, HEIGHT - 60)),
        "velocity": rng.uniform(-3, 3, 2),
        "radius": rng.uniform((20, -0.3), (50, 0.5)),
        "colour": rng.uniform(60, 255, 3),
    }


def _texture(x_hw: NDArray[np.floating], y_hw: NDArray[np.floating]) -> NDArray[np.floating]:
    """Fine and coarse waves in [0, 1], so that flow has something to hold on to."""
    return (4 + np.sin(x_hw / 3) + np.sin(y_hw / 4) + np.sin((x_hw + y_hw) / 11) + np.sin((x_hw - y_hw) / 17)) / 8


def _draw(
    x_hw: NDArray[np.float32],
    y_hw: NDArray[np.float32],
    pan: NDArray[np.float64],
    discs: list[dict[str, NDArray[np.float64]]],
    time: float,
) -> NDArray[np.uint8]:
    image: NDArray[np.floating] = _texture(x_hw + pan[0] * time, y_hw + pan[1] * time)[..., None] * BACKGROUND
    for disc in discs:
        x, y = disc["start"] + disc["velocity"] * time
        radius = max(8.0, disc["radius"][0] + disc["radius"][1] * time)
        inside = np.hypot(x_hw - x, y_hw - y) < radius
        image[inside] = (_texture(x_hw - x, y_hw - y)[..., None] * disc["colour"])[inside]
    return image.clip(0, 255).astype(np.uint8)
