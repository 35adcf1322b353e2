"""`p4dprep demo`: the main job from nothing to pictures, on clips and weights that it makes itself."""

from fractions import Fraction
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray

from cli._output import console
from p4dprep.errors import CorruptDataError, RequestError

NUM_CLIPS = 8
NUM_FRAMES = 50
FPS = 25
HEIGHT, WIDTH = 240, 320
BACKGROUND = np.array([120.0, 130.0, 150.0])


def demo(
    out: Annotated[Path, typer.Argument(help="Folder for clips, weights, cache and the page of pictures.")] = Path(
        "demo"
    ),
    videos: Annotated[str | None, typer.Option(help="Your own folder, glob or URL instead of made-up clips.")] = None,
) -> None:
    """Extract flow, depth and latents from a few clips and show them; no download, no GPU.

    The flow comes from a real teacher (OpenCV's DIS). Depth, motion, rays and latents come from a small L4P with
    **random weights**: they show the plumbing, not geometry.

    **Examples**

        p4dprep demo

        p4dprep demo out --videos my_videos
    """
    from cli import cache, extract
    from p4dprep.cache import Cache, verify
    from p4dprep.extract import parse_config

    out.mkdir(parents=True, exist_ok=True)
    source = videos or str(make_clips(out / "videos"))
    weights = make_weights(out / "l4p-random")
    console.print(f"[bold]extract[/] {source} -> {out / 'cache'}", highlight=False)
    report = extract.run(
        parse_config({"source": source, "cache": str(out / "cache"), "teachers": ("opencv-dis", f"l4p:{weights}")})
    )
    extract.show_report(report)
    if not report.committed + report.skipped:
        raise RequestError(f"no clip of {source} could be extracted; the reasons stand above")
    verified = verify(Cache.open(str(out / "cache")))
    if not verified.ok:
        raise CorruptDataError(f"{len(verified.problems)} objects of {out / 'cache'} are not what was committed")
    console.print(f"verified: {verified.num_objects} objects, every digest as committed", highlight=False)
    page = out / "pictures.html"
    cache.write_page(str(out / "cache"), page)
    console.print(f"pictures: {page}", markup=False, highlight=False)
    console.print(
        "Flow is real (OpenCV DIS). Depth, motion, rays and latents come from random weights: plumbing, not quality."
    )


def make_weights(folder: Path) -> Path:
    """A small L4P with random weights from a fixed seed, in the layout of `L4P.save_pretrained`."""
    import torch

    from teachers.l4p import L4P, L4PConfig

    small = L4PConfig(
        hidden_size=48,
        num_layers=4,
        num_heads=4,
        mlp_size=96,
        taps=(1, 2, 3, 4),
        tap_channels=(16, 16, 16, 16),
        fusion_channels=16,
        hidden_channels=8,
    )
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        L4P(small).save_pretrained(folder)
    return folder


def make_clips(folder: Path) -> Path:
    """H.264 clips of textured discs that move, pass behind each other and grow before a panning background."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(NUM_CLIPS):
        path = folder / f"discs_{seed}.mp4"
        if not path.exists():
            partial = path.with_suffix(".partial")
            write_clip(partial, draw_discs(seed))
            partial.rename(path)
    return folder


def write_clip(path: Path, frames_thwc: NDArray[np.uint8]) -> None:
    """Encode uint8 RGB frames (t, h, w, 3) as H.264 in MP4 at `FPS`."""
    import av

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
