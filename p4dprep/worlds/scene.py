"""What a world consists of: bodies of simple shapes on exact paths, scenery, lights and a camera.

World coordinates are metres, right-handed, z up; yaw turns from x towards y, in radians, counter-clockwise seen from
above. Camera coordinates are OpenCV's: x right, y down, z forward. Pixel centres lie at half-integers, so that
intrinsics scale with the picture. Everything is a function of time in seconds from the start of the video.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Vector = tuple[float, float, float]
Floats = NDArray[np.float64]

Split = Literal["train", "val", "test", "hard", "plain_train", "plain_test", "single_train", "single_test"]
Setting = Literal["room", "road", "table", "landscape", "plain", "single"]
SHAPES = Literal["box", "sphere", "cylinder", "capsule", "room", "ground"]
SPLITS: tuple[Split, ...] = get_args(Split)
PLAIN_SPLITS: dict[Split, Setting] = {
    "plain_train": "plain",
    "plain_test": "plain",
    "single_train": "single",
    "single_test": "single",
}
"""Balls on a plane before a standing camera, asked about by their colours: for students of a million parameters.

Who is asked about a single ball need not find the one that is meant, only see what it does.
"""
SETTINGS: tuple[Setting, ...] = get_args(Setting)

STILL_METRES_PER_SECOND = 0.0005
"""A surface point slower than this between two frames does not move in 3D."""


_QUADRATURE = np.polynomial.legendre.leggauss(32)


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A piece of a path, from `start_seconds` until the next piece starts.

    Attributes:
        start_seconds: when it begins.
        position: metres, at its beginning.
        velocity: m/s, at its beginning.
        acceleration: m/s^2, constant; only where `turn_rate` is 0.
        yaw: radians, at its beginning.
        yaw_rate: rad/s, constant: how fast the body itself turns.
        turn_rate: rad/s, constant: how fast the velocity turns, about z; the path is an arc.
    """

    start_seconds: float
    position: Vector
    velocity: Vector = (0.0, 0.0, 0.0)
    acceleration: Vector = (0.0, 0.0, 0.0)
    yaw: float = 0.0
    yaw_rate: float = 0.0
    turn_rate: float = 0.0

    def __post_init__(self) -> None:
        if self.turn_rate and any(self.acceleration):
            raise ValueError("an arc has no further acceleration")

    def at(self, seconds: Floats) -> tuple[Floats, Floats, Floats, Floats]:
        """Position, velocity, acceleration (n, 3) and yaw (n,) at times of this piece."""
        since = (seconds - self.start_seconds)[:, None]
        start, velocity, acceleration = (
            np.asarray(value, float) for value in (self.position, self.velocity, self.acceleration)
        )
        yaw = self.yaw + self.yaw_rate * since[:, 0]
        if not self.turn_rate:
            moved = start + velocity * since + 0.5 * acceleration * since**2
            return moved, velocity + acceleration * since, np.broadcast_to(acceleration, moved.shape), yaw
        turned = turn_about_z(np.broadcast_to(velocity, (len(since), 3)), self.turn_rate * since[:, 0])
        sideways = np.cross([0.0, 0.0, 1.0], turned - velocity)  # the integral of a turning vector turns with it
        moved = start - sideways / self.turn_rate + np.array([0.0, 0.0, 1.0]) * velocity[2] * since
        return moved, turned, self.turn_rate * np.cross([0.0, 0.0, 1.0], turned), yaw


def turn_about_z(vectors_n3: Floats, radians_n: Floats) -> Floats:
    """Vectors (n, 3) turned about z, each by its angle."""
    cos, sin = np.cos(radians_n), np.sin(radians_n)
    x, y, z = vectors_n3.T
    return np.stack([cos * x - sin * y, sin * x + cos * y, z], axis=1)


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """Segments in order of time; before the first one its beginning holds."""

    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        starts = [segment.start_seconds for segment in self.segments]
        if not starts or starts != sorted(starts):
            raise ValueError(f"segments must be in order of time, not {starts}")

    def _at(self, seconds: Floats) -> tuple[Floats, Floats, Floats, Floats]:
        seconds = np.maximum(np.asarray(seconds, float).reshape(-1), self.segments[0].start_seconds)
        starts = [segment.start_seconds for segment in self.segments]
        number_n = np.searchsorted(starts, seconds, side="right") - 1
        position, velocity, acceleration = np.empty((3, len(seconds), 3))
        yaw = np.empty(len(seconds))
        for number in np.unique(number_n):
            mine = number_n == number
            position[mine], velocity[mine], acceleration[mine], yaw[mine] = self.segments[number].at(seconds[mine])
        return position, velocity, acceleration, yaw

    def position(self, seconds: Floats) -> Floats:
        """Metres (n, 3)."""
        return self._at(seconds)[0]

    def velocity(self, seconds: Floats) -> Floats:
        """m/s (n, 3)."""
        return self._at(seconds)[1]

    def acceleration(self, seconds: Floats) -> Floats:
        """m/s^2 (n, 3)."""
        return self._at(seconds)[2]

    def yaw(self, seconds: Floats) -> Floats:
        """Radians (n,), not wrapped."""
        return self._at(seconds)[3]

    def path_length(self, start_seconds: float, end_seconds: float) -> float:
        """Metres travelled: Gauss-Legendre quadrature of the speed, piece by piece."""
        inner = [s.start_seconds for s in self.segments if start_seconds < s.start_seconds < end_seconds]
        ends = [start_seconds, *inner, end_seconds]
        nodes, weights = _QUADRATURE
        total = 0.0
        for low, high in pairwise(ends):
            speed = np.linalg.norm(self.velocity((high - low) / 2 * nodes + (high + low) / 2), axis=1)
            total += float((high - low) / 2 * (weights * speed).sum())
        return total


def still(position: Vector, yaw: float = 0.0) -> Trajectory:
    """A path that never moves."""
    return Trajectory(segments=(Segment(start_seconds=0.0, position=position, yaw=yaw),))


@dataclass(frozen=True, kw_only=True)
class Texture:
    """A solid texture: a pattern over 3D points of the part.

    Attributes:
        pattern: a name of `p4dprep.worlds.textures`.
        colour: RGB in 0-1.
        other: the second colour of the pattern.
        scale: metres of one period.
        phase: moves the pattern, metres.
    """

    pattern: str
    colour: Vector
    other: Vector
    scale: float
    phase: Vector = (0.0, 0.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One shape of a body, in the body's coordinates.

    Attributes:
        shape: `box`; `sphere`; `cylinder` and `capsule`, which stand along `axis`; for scenery also `room`, a box seen
            from inside, and `ground`, the plane through the centre.
        half_size: metres from the centre to the surface along the part's own x, y, z. A sphere, cylinder or capsule is
            round: its x and y are the radius. The z of a capsule includes its caps.
        centre: metres.
        axis: the body's axis that the part's z lies along.
        texture: its look.
    """

    shape: SHAPES
    half_size: Vector
    centre: Vector = (0.0, 0.0, 0.0)
    axis: Literal["x", "y", "z"] = "z"
    texture: Texture

    @property
    def radius(self) -> float:
        """Metres of the sphere around it."""
        x, _, z = self.half_size
        if self.shape == "sphere":
            return x
        if self.shape == "capsule":
            return max(x, z)
        return float(np.linalg.norm(self.half_size)) if self.shape == "box" else float(np.hypot(x, z))

    def rotation(self) -> Floats:
        """Part to body coordinates (3, 3): a cyclic change of axes."""
        return np.roll(np.eye(3), {"z": 0, "x": 1, "y": 2}[self.axis], axis=0)

    def extent(self) -> Floats:
        """Half size along the body's axes (3,)."""
        extent: Floats = np.abs(self.rotation()) @ np.array(self.half_size)
        return extent


@dataclass(frozen=True, kw_only=True)
class Body:
    """A thing: parts that move together. Its origin is the centre of its box.

    Attributes:
        category: a noun, such as `ball`.
        colour: an adjective, such as `red`; with the category it names one body of a scene. Empty for scenery.
        parts: its shapes.
        trajectory: where its origin is, and its yaw.
        motion: the kind of path, such as `bounce`; `still` if it never moves.
    """

    category: str
    colour: str = ""
    parts: tuple[Part, ...]
    trajectory: Trajectory
    motion: str = "still"

    @property
    def name(self) -> str:
        """What people call it: `red ball`."""
        return f"{self.colour} {self.category}".strip()

    @property
    def size(self) -> Vector:
        """Length (x), width (y) and height (z) of its box at yaw 0, metres."""
        reach = np.max([np.abs(part.centre) + part.extent() for part in self.parts], axis=0)
        x, y, z = (2 * reach).tolist()
        return x, y, z

    @property
    def radius(self) -> float:
        """Metres of the circle around it, seen from above."""
        return float(np.hypot(*self.size[:2]) / 2)


@dataclass(frozen=True, kw_only=True)
class Light:
    """A light with shadows.

    Attributes:
        direction: unit vector towards a light infinitely far away; None for a lamp at `position`.
        position: metres.
        strength: how bright it makes a surface that faces it (a lamp: at 3 m).
    """

    direction: Vector | None = None
    position: Vector = (0.0, 0.0, 0.0)
    strength: float = 0.7


@dataclass(frozen=True, kw_only=True)
class Wave:
    """A sine that shakes the camera."""

    amplitude: float
    hertz: float
    phase: float

    def at(self, seconds: Floats) -> Floats:
        """Its value (n,)."""
        return self.amplitude * np.sin(2 * np.pi * self.hertz * seconds + self.phase)


@dataclass(frozen=True, kw_only=True)
class Camera:
    """A pinhole camera on a path.

    Attributes:
        trajectory: its centre and yaw.
        pitch: radians; negative looks down.
        fov_x: horizontal field of view, radians.
        aspect: width over height of the picture.
        kind: `stand`, `pan`, `walk`, `drive` or `shake`.
        bob: shakes of yaw, pitch (radians) and height (metres).
    """

    trajectory: Trajectory
    pitch: float
    fov_x: float
    aspect: float
    kind: str
    bob: tuple[tuple[Wave, ...], tuple[Wave, ...], tuple[Wave, ...]] = ((), (), ())

    def intrinsics(self, height: int, width: int) -> Floats:
        """K (3, 3) in pixels of a picture squashed to height x width."""
        focal = 0.5 / np.tan(self.fov_x / 2)
        return np.array(
            [[focal * width, 0, width / 2], [0, focal * self.aspect * height, height / 2], [0, 0, 1]], float
        )

    def world_to_camera(self, seconds: Floats) -> Floats:
        """Poses (n, 4, 4): x_camera = pose @ x_world, homogeneous, metres."""
        seconds = np.asarray(seconds, float).reshape(-1)
        yaw_bob, pitch_bob, height_bob = (sum((wave.at(seconds) for wave in waves), 0.0) for waves in self.bob)
        centre = self.trajectory.position(seconds)
        centre[:, 2] += height_bob
        yaw, pitch = self.trajectory.yaw(seconds) + yaw_bob, self.pitch + pitch_bob + np.zeros(len(seconds))
        forward = np.stack([np.cos(pitch) * np.cos(yaw), np.cos(pitch) * np.sin(yaw), np.sin(pitch)], axis=1)
        right = np.stack([np.sin(yaw), -np.cos(yaw), np.zeros_like(yaw)], axis=1)
        pose = np.tile(np.eye(4), (len(seconds), 1, 1))
        pose[:, :3, :3] = np.stack([right, np.cross(forward, right), forward], axis=1)
        pose[:, :3, 3] = -np.einsum("nij,nj->ni", pose[:, :3, :3], centre)
        return pose


@dataclass(frozen=True, kw_only=True)
class Effects:
    """What a real camera adds to the picture; the truth is that of the frame's own time.

    Attributes:
        noise: standard deviation, of 255.
        shutter_seconds: exposure time around the frame's time; 0 for none.
        exposure: gain at the start and at the end.
    """

    noise: float = 0.0
    shutter_seconds: float = 0.0
    exposure: tuple[float, float] = (1.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One world, and the clip that is filmed in it.

    Attributes:
        id: `SPLIT-SEED-INDEX`; the same id is the same scene everywhere.
        split: which split it belongs to.
        setting: room, road, table, landscape, plain or single.
        layout: how the bodies were placed.
        bodies: things one may ask about, each with its own name; instance i + 1 is body i.
        scenery: what stands around, never moving.
        lights: at least one.
        ambient: light without direction.
        sky: RGB of the zenith and of the horizon, 0-1.
        far_metres: what is farther along the optical axis is sky.
        camera: who films.
        effects: what the camera adds.
        frame_seconds: presentation times of the video's frames.
        video_size: height and width of the video.
        noise_seed: of the image noise.
    """

    id: str
    split: Split
    setting: Setting
    layout: str
    bodies: tuple[Body, ...]
    scenery: tuple[Body, ...]
    lights: tuple[Light, ...]
    ambient: float
    sky: tuple[Vector, Vector]
    far_metres: float
    camera: Camera
    effects: Effects
    frame_seconds: tuple[float, ...]
    video_size: tuple[int, int]
    noise_seed: int

    @property
    def duration_seconds(self) -> float:
        """From the first frame to the last."""
        return self.frame_seconds[-1] - self.frame_seconds[0]
