"""What `teachers.l4p.train` learns from: rendered clips in a ring on disk, and augmented batches of them.

Rendering a clip costs about as much as training on it, so processes of their own render into a ring of fixed size, and
every clip is used several times, each time augmented. Shape suffixes: `b` batch, `t` frames, `c` channels, `h w`
pixels, `y x` ray grid.
"""

import multiprocessing
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from multiprocessing.context import SpawnProcess
from multiprocessing.synchronize import Semaphore
from pathlib import Path
from typing import Any, Self

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p4dprep.errors import RequestError, TeacherError
from p4dprep.worlds.generate import make_scene
from p4dprep.worlds.render import Surfaces, expose, trace
from p4dprep.worlds.scene import STILL_METRES_PER_SECOND, Scene, Split
from p4dprep.worlds.truth import carry, pluecker_rays, truth_of

MEAN, STD = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], np.float32)


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One clip and what the losses need of its truth.

    Attributes:
        frames_thwc: uint8 RGB.
        depth_thw: float16 metres, NaN where there is sky.
        flow_t2hw: float16 pixels from frame n to n-1; NaN in frame 0 and where there is none.
        flow_forward_t2hw: from frame n to n+1; NaN in the last frame.
        motion_thw: the surface moves in the world between n-1 and n (frame 0: between 0 and 1).
        motion_forward_thw: between n and n+1 (last frame: between n-1 and n).
        pose_t44: float64 world to camera.
        intrinsics_33: float64, pixels.
    """

    frames_thwc: NDArray[np.uint8]
    depth_thw: NDArray[np.float16]
    flow_t2hw: NDArray[np.float16]
    flow_forward_t2hw: NDArray[np.float16]
    motion_thw: NDArray[np.bool_]
    motion_forward_thw: NDArray[np.bool_]
    pose_t44: NDArray[np.float64]
    intrinsics_33: NDArray[np.float64]

    @classmethod
    def shapes(cls, num_frames: int, size: int) -> dict[str, tuple[tuple[int, ...], type[np.generic]]]:
        """Shape and dtype of every field."""
        t, image = num_frames, (size, size)
        return {
            "frames_thwc": ((t, *image, 3), np.uint8),
            "depth_thw": ((t, *image), np.float16),
            "flow_t2hw": ((t, 2, *image), np.float16),
            "flow_forward_t2hw": ((t, 2, *image), np.float16),
            "motion_thw": ((t, *image), np.bool_),
            "motion_forward_thw": ((t, *image), np.bool_),
            "pose_t44": ((t, 4, 4), np.float64),
            "intrinsics_33": ((3, 3), np.float64),
        }

    def reversed(self) -> "Clip":
        """The same clip shown backwards: forward flow and motion become backward ones."""
        return Clip(
            frames_thwc=self.frames_thwc[::-1],
            depth_thw=self.depth_thw[::-1],
            flow_t2hw=self.flow_forward_t2hw[::-1],
            flow_forward_t2hw=self.flow_t2hw[::-1],
            motion_thw=self.motion_forward_thw[::-1],
            motion_forward_thw=self.motion_thw[::-1],
            pose_t44=self.pose_t44[::-1],
            intrinsics_33=self.intrinsics_33,
        )

    def mirrored(self) -> "Clip":
        """The clip of the world mirrored left to right: u changes its sign, and so does x of world and camera."""
        mirror = np.diag([-1.0, 1.0, 1.0, 1.0])
        intrinsics = self.intrinsics_33.copy()
        intrinsics[0, 2] = self.frames_thwc.shape[2] - intrinsics[0, 2]
        sign = np.array([-1, 1], np.float16)[:, None, None]
        return Clip(
            frames_thwc=self.frames_thwc[:, :, ::-1],
            depth_thw=self.depth_thw[..., ::-1],
            flow_t2hw=self.flow_t2hw[..., ::-1] * sign,
            flow_forward_t2hw=self.flow_forward_t2hw[..., ::-1] * sign,
            motion_thw=self.motion_thw[..., ::-1],
            motion_forward_thw=self.motion_forward_thw[..., ::-1],
            pose_t44=mirror @ self.pose_t44 @ mirror,
            intrinsics_33=intrinsics,
        )


def sampled_seconds(scene: Scene, num_frames: int) -> NDArray[np.float64]:
    """Times of the frames that `Sampling(plan="uniform")` takes from the scene's video."""
    chosen = np.round(np.linspace(0, len(scene.frame_seconds) - 1, num_frames)).astype(int)
    seconds: NDArray[np.float64] = np.array(scene.frame_seconds)[chosen]
    return seconds


def render_clip(split: Split, seed: int, index: int, num_frames: int, size: int) -> Clip:
    """A world's clip, sampled as `p4dprep extract` samples its video."""
    scene = make_scene(split, seed, index)
    surfaces = trace(scene, sampled_seconds(scene, num_frames), size, size)
    truth = truth_of(surfaces, visibility=False)
    with np.errstate(over="ignore"):  # flow of what nearly touches the camera plane
        flow, forward = (
            _finite(values.astype(np.float16)).transpose(0, 3, 1, 2)
            for values in (truth.flow_thw2, truth.flow_forward_thw2)
        )
    return Clip(
        frames_thwc=expose(scene, surfaces),
        depth_thw=truth.depth_thw.astype(np.float16),
        flow_t2hw=flow,
        flow_forward_t2hw=forward,
        motion_thw=truth.motion_thw,
        motion_forward_thw=_motion_forward(surfaces, truth.motion_thw),
        pose_t44=truth.pose_t44,
        intrinsics_33=truth.intrinsics_33,
    )


def _finite(values: NDArray[np.float16]) -> NDArray[np.float16]:
    return np.where(np.isfinite(values), values, np.float16(np.nan))


def _motion_forward(surfaces: Surfaces, motion_thw: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether the surfaces move until the next frame; the last frame keeps what it has."""
    forward = motion_thw.copy()
    for index in range(len(forward) - 1):
        points = surfaces.points(index)
        apart = np.linalg.norm(carry(surfaces, index, index + 1, points) - points, axis=0)
        between = surfaces.seconds[index + 1] - surfaces.seconds[index]
        forward[index] = (apart > STILL_METRES_PER_SECOND * between).reshape(forward.shape[1:])
    return forward


class ClipRing:
    """Clips in memory-mapped files, the newest over the oldest, for any number of processes.

    Clip `index` lies in slot `index % capacity`. A writer takes the slot's number away before it writes and sets it
    after, and a reader looks at it before and after: a clip that changed under the reader's hands is not returned.
    """

    def __init__(self, folder: Path, arrays: dict[str, NDArray[np.generic]], index_of_slot: NDArray[Any]) -> None:
        self.folder = folder
        self._arrays = arrays
        self._index_of_slot = index_of_slot

    @classmethod
    def open(cls, folder: Path, capacity: int, num_frames: int, size: int) -> Self:
        """The ring in a folder, made if there is none.

        Raises:
            RequestError: the folder's ring has another geometry.
        """
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {
            name: _mapped(folder / f"{name}.npy", (capacity, *shape), dtype)
            for name, (shape, dtype) in Clip.shapes(num_frames, size).items()
        }
        # 0 is an empty slot, so that a fresh file, all zeros, is an empty ring; clip i is stored as i + 1.
        return cls(folder, arrays, _mapped(folder / "numbers.npy", (capacity,), np.int64))

    def write(self, index: int, clip: Clip) -> None:
        """Store a clip."""
        slot = index % len(self._index_of_slot)
        self._index_of_slot[slot] = 0
        for name, array in self._arrays.items():
            array[slot] = getattr(clip, name)
        self._index_of_slot[slot] = index + 1

    def read(self, slot: int) -> Clip | None:
        """A copy of the clip in a slot; None if there is none, or it is being written."""
        before = int(self._index_of_slot[slot])
        if not before:
            return None
        clip = Clip(**{name: np.array(array[slot]) for name, array in self._arrays.items()})
        return clip if int(self._index_of_slot[slot]) == before else None

    def filled(self) -> NDArray[np.int64]:
        """Slots that hold a clip."""
        return np.flatnonzero(self._index_of_slot)

    def next_index(self) -> int:
        """One more than the newest clip's index."""
        return int(self._index_of_slot.max())


def _mapped(path: Path, shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
    if not path.exists():
        return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    array = np.lib.format.open_memmap(path, mode="r+")
    if array.shape != shape or array.dtype != dtype:
        raise RequestError(
            f"{path} holds {array.dtype} {array.shape}, not {np.dtype(dtype)} {shape}; delete {path.parent} and its "
            "clips are rendered again"
        )
    return array


@dataclass(frozen=True, kw_only=True)
class RenderPlan:
    """What a rendering process does: its share of the indices of one split and seed, as it is permitted."""

    folder: Path
    capacity: int
    num_frames: int
    size: int
    split: Split
    seed: int
    first_index: int
    step: int


class Renderers:
    """Processes that render training worlds into a ring, one clip per permit."""

    def __init__(self, ring: ClipRing, plan: RenderPlan, num_workers: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.ring = ring
        self._permits: Semaphore = context.Semaphore(0)
        plans = [replace(plan, first_index=plan.first_index + i, step=num_workers) for i in range(num_workers)]
        self._processes: list[SpawnProcess] = [
            context.Process(target=_render, args=(each, self._permits, os.getpid()), daemon=True) for each in plans
        ]
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # for the children: products this small only wait on threads
        for process in self._processes:
            process.start()

    def permit(self, num_clips: int) -> None:
        """Let them render so many more."""
        for _ in range(num_clips):
            self._permits.release()

    def check(self) -> None:
        """Raise if one died.

        Raises:
            TeacherError: it did.
        """
        for process in self._processes:
            if not process.is_alive():
                raise TeacherError(f"rendering process {process.pid} died with exit code {process.exitcode}; see above")

    def close(self) -> None:
        """End them."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()


def _render(plan: RenderPlan, permits: Semaphore, parent: int) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):  # a terminal sends them to all; the trainer saves, then ends us
        signal.signal(number, signal.SIG_IGN)
    os.nice(5)  # the optimiser waits for two threads at each step: it goes first
    ring = ClipRing.open(plan.folder, plan.capacity, plan.num_frames, plan.size)
    index = plan.first_index
    while os.getppid() == parent:
        if not permits.acquire(timeout=5.0):
            continue
        ring.write(index, render_clip(plan.split, plan.seed, index, plan.num_frames, plan.size))
        index += plan.step


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one step takes.

    Attributes:
        pixels_bcthw: normalised as the teacher normalises.
        depth_b1thw: metres, NaN where unknown.
        flow_b2thw: backward, pixels, NaN where unknown.
        motion_b1thw: 0 or 1.
        rays_b6tyx: Plücker rays in coordinates of the first camera.
        origin_bt3: camera centres in the same coordinates, metres.
    """

    pixels_bcthw: Tensor
    depth_b1thw: Tensor
    flow_b2thw: Tensor
    motion_b1thw: Tensor
    rays_b6tyx: Tensor
    origin_bt3: Tensor

    def to(self, device: str) -> "Batch":
        """The same on a device."""
        return Batch(**{field.name: getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)})


def collate(clips: list[Clip], frames: list[NDArray[np.float32]] | None = None) -> Batch:
    """A batch of clips; `frames` (t, h, w, c) in 0-1 stand in for the clips' own."""
    shown = frames or [_unit(clip) for clip in clips]
    pixels = np.stack([(values - MEAN) / STD for values in shown])
    rays = [pluecker_rays(clip.pose_t44, clip.intrinsics_33, *clip.frames_thwc.shape[1:3]) for clip in clips]
    return Batch(
        pixels_bcthw=torch.from_numpy(pixels).movedim(-1, 1),
        depth_b1thw=_tensor([clip.depth_thw for clip in clips])[:, None],
        flow_b2thw=_tensor([clip.flow_t2hw for clip in clips]).transpose(1, 2),
        motion_b1thw=_tensor([clip.motion_thw for clip in clips])[:, None],
        rays_b6tyx=_tensor(rays).movedim(-1, 1).contiguous(),
        origin_bt3=_tensor([_origins(clip.pose_t44) for clip in clips]),
    )


def _unit(clip: Clip) -> NDArray[np.float32]:
    """Frames in 0-1."""
    return clip.frames_thwc.astype(np.float32) / np.float32(255)


def _tensor(arrays: Sequence[NDArray[Any]]) -> Tensor:
    return torch.from_numpy(np.stack(arrays)).float()


def _origins(pose_t44: NDArray[np.float64]) -> NDArray[np.float64]:
    """Camera centres (t, 3) in the first camera's coordinates."""
    relative: NDArray[np.float64] = pose_t44[0] @ np.linalg.inv(pose_t44)
    return relative[:, :3, 3]


def augmented(clip: Clip, random: np.random.Generator) -> tuple[Clip, NDArray[np.float32]]:
    """The clip mirrored and reversed by chance, and its frames in 0-1 with other colours, noise and softness."""
    if random.random() < 0.5:
        clip = clip.mirrored()
    if random.random() < 0.5:
        clip = clip.reversed()
    frames = _unit(clip)
    if random.random() < 0.3:
        frames = frames[..., random.permutation(3)]
    if random.random() < 0.8:
        gain = (random.uniform(0.7, 1.3) * random.uniform(0.85, 1.15, 3)).astype(np.float32)
        grey, contrast, gamma = np.array(
            [frames.mean(), random.uniform(0.7, 1.3), random.uniform(0.8, 1.25)], np.float32
        )
        frames = np.clip(((frames - grey) * contrast + grey) * gain, 0, 1) ** gamma
    if random.random() < 0.3:
        frames = _softened(frames, random.uniform(0.5, 0.95))
    if random.random() < 0.3:
        noise = random.standard_normal(frames.shape, dtype=np.float32)
        frames = np.clip(frames + np.float32(random.uniform(0.005, 0.03)) * noise, 0, 1)
    return clip, frames


def _softened(frames_thwc: NDArray[np.float32], scale: float) -> NDArray[np.float32]:
    """Frames that lost detail, as a video coder takes it: scaled down and up again."""
    height, width = frames_thwc.shape[1:3]
    small = (max(1, round(width * scale)), max(1, round(height * scale)))
    shrunk = [cv2.resize(frame, small, interpolation=cv2.INTER_AREA) for frame in frames_thwc]
    return np.stack([cv2.resize(frame, (width, height)) for frame in shrunk]).astype(np.float32)


def random_batch(ring: ClipRing, size: int, random: np.random.Generator) -> Batch:
    """An augmented batch of clips that are in the ring now."""
    clips: list[Clip] = []
    frames: list[NDArray[np.float32]] = []
    while len(clips) < size:
        found = ring.read(int(random.choice(ring.filled())))
        if found is not None:
            clip, shown = augmented(found, random)
            clips.append(clip)
            frames.append(shown)
    return collate(clips, frames)
