"""Worlds as files: H.264 videos with true presentation times, rendered side by side, each whole or absent.

    OUT/worlds.json     what this folder is: split, seed, size, version; another one is refused
    OUT/videos/ID.mp4   a clip; that it is there means that it is done
    OUT/frames/ID.png   its first frame, as rendered
    OUT/masks/ID.png    the instances in it: 0 scenery and sky, i + 1 body i
    and the lists of `p4dprep.worlds.lists`

Everything follows from split, seed, index and size, so a run that was cut off is continued by the same command, and
two runs at once do each other no harm. Shape suffixes: `t` frames, `h w` pixels, `c` channels.
"""

import contextlib
import io
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from numpy.typing import NDArray
from PIL import Image

from p4dprep import worlds
from p4dprep.errors import P4DError, RequestError
from p4dprep.storage import Store
from p4dprep.worlds.generate import make_scene
from p4dprep.worlds.render import render, trace
from p4dprep.worlds.scene import PLAIN_SPLITS, SPLITS, Floats, Scene, Split

TIME_BASE = Fraction(1, 90_000)
"""Ticks of the videos; every common frame rate and every millisecond is a whole number of them."""

_ENCODER_OPTIONS = {"crf": "18", "preset": "medium", "x264-params": "cpu-independent=1"}
"""`cpu-independent`: the same bytes whatever instructions a processor has. Without it, they were seen to differ even
from call to call, with how a frame lies in memory."""

_EXACT = (
    Interpolation.BICUBIC
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.FULL_CHR_H_INP
    | Interpolation.ACCURATE_RND
    | Interpolation.BITEXACT
)
_FRAMES_AT_ONCE = 16
_NUM_WAITING = 64
"""Clips given to the pool at any time; a queue of all would take memory."""

_IDENTITY = "worlds.json"

_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""Of each rendering process: its many small products are three times slower on several (measured on two)."""

Progress = Callable[[int, int], None]
"""Called with clips done and clips to do."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Which worlds a folder holds.

    Attributes:
        split: one of `SPLITS`.
        seed: another seed gives other scenes.
        size: height and width of the videos in pixels, even; None takes each scene's own.
    """

    split: Split
    seed: int = 0
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise RequestError(f"split is {self.split!r}; it must be one of {', '.join(SPLITS)}")
        if self.seed < 0:
            raise RequestError(f"seed is {self.seed}; it must not be negative")
        if self.size is not None and not all(32 <= side <= 4096 and side % 2 == 0 for side in self.size):
            raise RequestError(f"size is {self.size[0]}x{self.size[1]}; both sides must be even, from 32 to 4096")

    @property
    def is_plain(self) -> bool:
        """Whether the worlds are plain ones, whose things go by their colours."""
        return self.split in PLAIN_SPLITS

    def scene(self, index: int) -> Scene:
        """Scene number `index`."""
        return make_scene(self.split, self.seed, index)

    def scene_id(self, index: int) -> str:
        """Its id, without making it."""
        return f"{self.split}-{self.seed}-{index}"

    def video_size(self, scene: Scene) -> tuple[int, int]:
        """Height and width of a scene's video."""
        return self.size or scene.video_size


def video_key(scene_id: str) -> str:
    """Where a clip's video lies in the folder."""
    return f"videos/{scene_id}.mp4"


def frame_key(scene_id: str) -> str:
    """Where its first frame lies."""
    return f"frames/{scene_id}.png"


def mask_key(scene_id: str) -> str:
    """Where the instances in its first frame lie."""
    return f"masks/{scene_id}.png"


def open_folder(out: str | os.PathLike[str], recipe: Recipe) -> Store:
    """The folder for a recipe's worlds, made if there is none.

    Raises:
        RequestError: it is no local folder, holds other worlds, or other things altogether.
        StorageError: it cannot be written.
    """
    path = os.fspath(out)
    if "://" in path and not path.startswith("file://"):
        raise RequestError(f"{path} is no folder of this machine; write the worlds here and copy them there")
    store = Store(path)
    strange = [name for name in store.children() if not name.endswith(".partial")]
    if strange and _IDENTITY not in strange:
        raise RequestError(f"{path} holds other files than worlds ({strange[0]}); name a new or empty folder")
    asked = {"version": worlds.VERSION, **asdict(recipe), "size": list(recipe.size) if recipe.size else None}
    store.put_if_absent(_IDENTITY, json.dumps(asked).encode())
    _refuse_other(path, store.get(_IDENTITY), asked)
    return store


def _refuse_other(path: str, written: bytes, asked: dict[str, Any]) -> None:
    try:
        found = json.loads(written)
        differing = [name for name in asked if found.get(name) != asked[name]]
    except (ValueError, AttributeError):
        raise RequestError(f"{path}/{_IDENTITY} is not what p4dprep worlds writes; name another folder") from None
    if differing:
        name = differing[0]
        raise RequestError(f"{path} holds worlds of {name} {found.get(name)}, not {asked[name]}; name another folder")


def presentation_ticks(scene: Scene) -> NDArray[np.int64]:
    """When the frames are shown (t,), in ticks of `TIME_BASE`."""
    return np.rint(np.asarray(scene.frame_seconds) / float(TIME_BASE)).astype(np.int64)


def presentation_seconds(scene: Scene) -> Floats:
    """When the frames of the video are shown (t,), to the last bit what a decoder makes of its ticks."""
    return np.array([float(tick * TIME_BASE) for tick in presentation_ticks(scene).tolist()])


def write_clip(store: Store, recipe: Recipe, index: int) -> None:
    """Render one clip: first frame, mask, and last of all the video.

    Raises:
        StorageError: the disk refused.
    """
    scene = recipe.scene(index)
    seconds, (height, width) = presentation_seconds(scene), recipe.video_size(scene)
    chunks = (seconds[start : start + _FRAMES_AT_ONCE] for start in range(0, len(seconds), _FRAMES_AT_ONCE))
    pictures = (picture for chunk in chunks for picture in render(scene, chunk, height, width))
    first = next(pictures)
    store.put_if_absent(frame_key(scene.id), png_bytes(Image.fromarray(first)))
    mask_hw = trace(scene, seconds[:1], height, width).instances_thw[0]
    store.put_if_absent(mask_key(scene.id), png_bytes(Image.fromarray(mask_hw)))
    mp4 = encode_mp4(itertools.chain([first], pictures), presentation_ticks(scene))
    store.put_if_absent(video_key(scene.id), mp4)


def png_bytes(image: Image.Image) -> bytes:
    """A picture as PNG."""
    sink = io.BytesIO()
    image.save(sink, format="PNG")
    return sink.getvalue()


def encode_mp4(frames_hwc: Iterable[NDArray[np.uint8]], ticks_t: NDArray[np.int64]) -> bytes:
    """Frames (uint8 RGB, one size, even sides) as H.264 in MP4: the same bytes for the same frames.

    Args:
        frames_hwc: one per tick.
        ticks_t: presentation times in `TIME_BASE`, growing; they need not be equidistant.
    """
    frames = iter(frames_hwc)
    first = next(frames)
    gaps = np.diff(ticks_t, append=2 * ticks_t[-1] - ticks_t[-2] if len(ticks_t) > 1 else ticks_t[-1] + 1)
    reformatter, sink = VideoReformatter(), io.BytesIO()
    with av.open(sink, "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", options=_ENCODER_OPTIONS)
        stream.height, stream.width, stream.pix_fmt = *first.shape[:2], "yuv420p"
        stream.time_base = stream.codec_context.time_base = TIME_BASE
        stream.codec_context.thread_count = 1
        for picture, tick, gap in zip(itertools.chain([first], frames), ticks_t.tolist(), gaps.tolist(), strict=True):
            rgb = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame: Any = reformatter.reformat(rgb, format="yuv420p", interpolation=_EXACT)
            frame.pts, frame.time_base, frame.duration = tick, TIME_BASE, gap
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return sink.getvalue()


def missing_clips(store: Store, recipe: Recipe, num_clips: int) -> list[int]:
    """Indices under `num_clips` that lack their video, first frame or mask."""
    keys = (video_key, frame_key, mask_key)
    there = {f"{folder}/{name}" for folder in ("videos", "frames", "masks") for name in store.children(folder)}
    return [index for index in range(num_clips) if not all(key(recipe.scene_id(index)) in there for key in keys)]


def render_clips(
    store: Store, recipe: Recipe, todo: Sequence[int], pool: ProcessPoolExecutor, progress: Progress
) -> None:
    """Write the clips with these indices, side by side.

    Raises:
        StorageError: the disk refused; what is done stays.
    """
    progress(0, len(todo))
    for num_done, _ in enumerate(_each(pool, store.root, recipe, todo), start=1):
        progress(num_done, len(todo))


def _each(pool: ProcessPoolExecutor, root: str, recipe: Recipe, todo: Sequence[int]) -> Iterator[None]:
    """One item per clip done."""
    left = iter(todo)
    waiting: set[Future[None]] = set()
    while True:
        waiting |= {
            pool.submit(_write_one, root, recipe, index)
            for index in itertools.islice(left, _NUM_WAITING - len(waiting))
        }
        if not waiting:
            return
        done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
        for future in done:
            yield future.result()


def _write_one(root: str, recipe: Recipe, index: int) -> None:
    write_clip(Store(root), recipe, index)


@contextlib.contextmanager
def process_pool(num_workers: int | None) -> Iterator[ProcessPoolExecutor]:
    """Processes that render, as many as there are processors by default; they end with this one, however it ends.

    Raises:
        RequestError: fewer than one.
        P4DError: one of them was killed.
    """
    if num_workers is not None and num_workers < 1:
        raise RequestError(f"workers is {num_workers}; it must be at least 1")
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers or os.cpu_count() or 1, context, initializer=_end_with_parent)
    try:
        with _environment(_ONE_THREAD):
            yield pool
    except BrokenProcessPool:
        raise P4DError(
            "a rendering process was killed, perhaps for want of memory; the same command goes on, "
            "with fewer --workers or a smaller --size if need be"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """What processes started meanwhile find in their environment; what the user has set stays."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _end_with_parent() -> None:
    """In a rendering process: leave Ctrl-C to the parent, and go when the parent is gone, killed or not."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
