"""Random scenes: the same id is the same scene in every process and on every machine.

Splits share no random stream, no layout and no family of textures. `hard` moreover holds what the others never show:
held-out pairs of category and motion, and of category and colour.
"""

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from p4dprep.errors import RequestError
from p4dprep.worlds.bodies import VEHICLES, build_body
from p4dprep.worlds.scene import (
    PLAIN_SPLITS,
    SETTINGS,
    SPLITS,
    Body,
    Camera,
    Effects,
    Floats,
    Light,
    Scene,
    Segment,
    Setting,
    Split,
    Trajectory,
    Vector,
    Wave,
    still,
)
from p4dprep.worlds.stages import SCENERY, STAGES, Painter, Stage, near_colour

GRAVITY = 9.81

_FULL_SETTINGS = tuple(setting for setting in SETTINGS if setting not in PLAIN_SPLITS.values())
_NUM_TRIES = 40
_MIN_BODIES = 3
_STILL_SHARE = 0.35
_VIDEO_SIZE = (192, 256)


Spots = Callable[[np.random.Generator, int], Floats]


def _scatter(rng: np.random.Generator, count: int) -> Floats:
    return rng.uniform(-1, 1, (count, 2))


def _ring(rng: np.random.Generator, count: int) -> Floats:
    angle = rng.uniform(0, 2 * np.pi) + 2 * np.pi * np.arange(count) / count
    return np.stack([np.cos(angle), np.sin(angle)], axis=1) * rng.uniform(0.6, 0.95)


def _row(rng: np.random.Generator, count: int) -> Floats:
    return np.stack([np.full(count, rng.uniform(-0.6, 0.6)), np.linspace(-0.9, 0.9, count)], axis=1)


def _lane(rng: np.random.Generator, count: int) -> Floats:
    return np.stack([np.linspace(-0.95, 0.95, count), np.full(count, rng.uniform(-0.7, 0.7))], axis=1)


def _arc(rng: np.random.Generator, count: int) -> Floats:
    angle = np.linspace(0.2, np.pi - 0.2, count)
    return np.stack([1.6 * np.sin(angle) - 0.9, -np.cos(angle)], axis=1) * rng.uniform(0.7, 1)


def _diagonal(rng: np.random.Generator, count: int) -> Floats:
    along = np.linspace(-0.95, 0.95, count)
    return np.stack([along, along * rng.choice([-1, 1])], axis=1)


def _grid(rng: np.random.Generator, count: int) -> Floats:
    cells = np.array([(x, y) for x in (-0.8, 0.2, 0.9) for y in (-0.8, 0.0, 0.8)])
    return rng.permutation(cells)[:count]


def _corner(rng: np.random.Generator, count: int) -> Floats:
    along = np.linspace(-0.9, 0.9, count)
    side = rng.choice([-1, 1])
    return np.where(
        (np.arange(count) % 2)[:, None],
        np.stack([along, along * 0 + 0.8 * side], 1),
        np.stack([along * 0 + 0.8, along], 1),
    )


def _spiral(rng: np.random.Generator, count: int) -> Floats:
    turn = rng.uniform(0, 6) + 2.1 * np.arange(count)
    return np.stack([np.cos(turn), np.sin(turn)], axis=1) * np.linspace(0.25, 1, count)[:, None]


def _cluster(rng: np.random.Generator, count: int) -> Floats:
    return np.clip(rng.uniform(-0.5, 0.5, 2) + rng.normal(0, 0.35, (count, 2)), -1, 1)


LAYOUTS: dict[Split, dict[str, Spots]] = {
    "train": {"scatter": _scatter, "ring": _ring, "row": _row, "lane": _lane},
    "val": {"arc": _arc, "diagonal": _diagonal},
    "test": {"grid": _grid, "corner": _corner},
    "hard": {"spiral": _spiral, "cluster": _cluster},
}
LAYOUTS |= {split: LAYOUTS["train" if split.endswith("train") else "test"] for split in PLAIN_SPLITS}


def held_out(category: str, other: str) -> bool:
    """Whether a pair of category and motion, or of category and colour, is shown by the split `hard` alone."""
    return other != "still" and zlib.crc32(f"{category}/{other}".encode()) % 5 == 0


def scene_of(scene_id: str) -> Scene:
    """The scene that an id names.

    Raises:
        RequestError: it is not the id of a world.
    """
    split, *numbers = scene_id.split("-")
    if split not in SPLITS or len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
        raise RequestError(f"{scene_id!r} is not the id of a world, SPLIT-SEED-INDEX with a split of {SPLITS}")
    return make_scene(split, int(numbers[0]), int(numbers[1]))


def make_scene(split: Split, seed: int, index: int) -> Scene:
    """Scene number `index` of a split.

    Args:
        split: decides layouts, textures and combinations.
        seed: non-negative; another seed gives other scenes.
        index: non-negative.
    """
    if seed < 0 or index < 0:
        raise RequestError(f"seed {seed} and index {index} of a world must not be negative")
    rng = np.random.default_rng([SPLITS.index(split), seed, index])
    setting = PLAIN_SPLITS.get(split) or _FULL_SETTINGS[rng.integers(len(_FULL_SETTINGS))]
    stage = STAGES[setting]
    seconds = _frame_seconds(rng, stage)
    camera = _camera(rng, stage, seconds[-1])
    layout = str(rng.choice(list(LAYOUTS[split])))
    paint = Painter(rng, split)
    return Scene(
        id=f"{split}-{seed}-{index}",
        split=split,
        setting=setting,
        layout=layout,
        bodies=_bodies(rng, split, setting, LAYOUTS[split][layout], camera, seconds[-1], paint),
        scenery=tuple(SCENERY[setting](rng, stage, paint)),
        lights=_lights(rng, stage),
        ambient=float(rng.uniform(0.35, 0.5)),
        sky=(near_colour(rng, (0.45, 0.65, 0.95)), near_colour(rng, (0.8, 0.87, 0.95))),
        far_metres=stage.far_metres,
        camera=camera,
        effects=_effects(rng) if stage.has_effects else Effects(),
        frame_seconds=tuple(seconds.tolist()),
        video_size=_VIDEO_SIZE,
        noise_seed=int(rng.integers(2**31)),
    )


def _frame_seconds(rng: np.random.Generator, stage: Stage) -> Floats:
    """Presentation times at one of the stage's rates, or at a changing one."""
    fps = float(rng.choice(stage.fps))
    if stage.num_frames:
        count = int(rng.integers(*stage.num_frames, endpoint=True))
    else:
        count = max(18, round(rng.uniform(1.8, 4.5) * fps))
    gaps = np.ones(count - 1)
    if rng.random() < 0.2:
        gaps = rng.choice([1, 1, 1, 2, 3], count - 1) * 0.75
    ticks = np.concatenate([[0], np.cumsum(np.rint(gaps * 1000 / fps))])
    return ticks / 1000


def _camera(rng: np.random.Generator, stage: Stage, duration: float) -> Camera:
    kind = str(rng.choice(stage.cameras))
    heading = rng.uniform(-1.2, 1.2) if kind == "walk" else 0.0
    if kind == "walk" and rng.random() < 0.25:
        heading += np.pi
    speed = 0.0
    if kind in ("walk", "drive"):
        fastest = min(stage.camera_speed[1], stage.camera_reach / duration) * (1.0 if kind == "drive" else 0.6)
        speed = rng.uniform(min(stage.camera_speed[0], fastest), fastest)
    degrees = {"pan": rng.choice([-1, 1]) * rng.uniform(4, 14), "walk": rng.uniform(-4, 4), "drive": rng.uniform(-3, 3)}
    yaw_rate = math.radians(degrees.get(kind, 0.0))
    segment = Segment(
        start_seconds=0.0,
        position=(0.0, 0.0, rng.uniform(*stage.camera_height)),
        velocity=(speed * math.cos(heading), speed * math.sin(heading), 0.0),
        yaw=rng.uniform(-0.05, 0.05) - yaw_rate * duration * 0.4,
        yaw_rate=yaw_rate,
        turn_rate=yaw_rate if kind == "drive" else 0.0,
    )
    return Camera(
        trajectory=Trajectory(segments=(segment,)),
        pitch=math.radians(rng.uniform(*stage.camera_pitch)),
        fov_x=math.radians(rng.uniform(57, 63)),
        aspect=_VIDEO_SIZE[1] / _VIDEO_SIZE[0],
        kind=kind,
        bob=_bob(rng, kind, stage),
    )


def _bob(
    rng: np.random.Generator, kind: str, stage: Stage
) -> tuple[tuple[Wave, ...], tuple[Wave, ...], tuple[Wave, ...]]:
    def wave(amplitude: float, hertz: float) -> Wave:
        return Wave(amplitude=amplitude, hertz=hertz, phase=float(rng.uniform(0, 2 * np.pi)))

    if kind == "shake":
        yaw = tuple(wave(math.radians(rng.uniform(0.4, 1.6)), rng.uniform(0.4, 1.5)) for _ in range(2))
        pitch = tuple(wave(math.radians(rng.uniform(0.3, 1.0)), rng.uniform(0.4, 1.5)) for _ in range(2))
        return yaw, pitch, (wave(0.01 * stage.camera_height[0], 1.1),)
    if kind == "walk":
        return (), (wave(math.radians(0.3), 1.8),), (wave(0.015 * stage.camera_height[0], 1.8),)
    return (), (), ()


def _lights(rng: np.random.Generator, stage: Stage) -> tuple[Light, ...]:
    def sun(strength: float) -> Light:
        azimuth, height = rng.uniform(0, 2 * np.pi), rng.uniform(0.5, 1.2)
        direction = (math.cos(azimuth) * math.cos(height), math.sin(azimuth) * math.cos(height), math.sin(height))
        return Light(direction=direction, strength=strength)

    if stage.walls is None:
        return sun(rng.uniform(0.55, 0.7)), sun(0.12)
    lamps = [
        Light(position=(rng.uniform(0, 4), rng.uniform(-2, 2), rng.uniform(2.0, 2.5)), strength=rng.uniform(0.5, 0.8))
        for _ in range(rng.integers(1, 3))
    ]
    return (*lamps, sun(0.1))


def _effects(rng: np.random.Generator) -> Effects:
    gains = rng.uniform(0.8, 1.15, 2) if rng.random() < 0.3 else np.repeat(rng.uniform(0.85, 1.1), 2)
    return Effects(
        noise=float(rng.uniform(1, 5)) if rng.random() < 0.5 else 0.0,
        shutter_seconds=float(rng.uniform(0.01, 0.04)) if rng.random() < 0.1 else 0.0,
        exposure=(float(gains[0]), float(gains[1])),
    )


def _bodies(
    rng: np.random.Generator,
    split: Split,
    setting: Setting,
    spots: Spots,
    camera: Camera,
    duration: float,
    paint: Painter,
) -> tuple[Body, ...]:
    """Bodies that start in view and never touch each other, the camera or a wall."""
    stage = STAGES[setting]
    fewest, most = stage.num_bodies
    count = int(rng.integers(fewest, most + 1))
    near, far = stage.region
    free = _Free(stage=stage, camera=camera, duration=duration)
    bodies: list[Body] = []

    def add(ahead: float, aside: float) -> None:
        for _ in range(_NUM_TRIES):
            x = near + (far - near) * ((np.clip(ahead + rng.normal(0, 0.12), -1, 1) + 1) / 2) ** 1.3
            y = x * stage.aside * np.clip(aside + rng.normal(0, 0.12), -1, 1)
            body = _random_body(rng, split, stage, (x, y), duration, paint)
            if body.name not in {other.name for other in bodies} and free.fits(body, bodies):
                bodies.append(body)
                return

    for ahead, aside in spots(rng, count):
        add(ahead, aside)
    for _ in range(_NUM_TRIES):  # a layout may have left no room for some
        if len(bodies) < min(_MIN_BODIES, fewest):
            add(*_scatter(rng, 1)[0])
    return tuple(bodies)


def _random_body(
    rng: np.random.Generator,
    split: Split,
    stage: Stage,
    spot: tuple[float, float],
    duration: float,
    paint: Painter,
) -> Body:
    category, motion, colour = _combination(rng, split, stage)
    body = build_body(rng, category, colour, paint)
    start = (float(spot[0]), float(spot[1]), body.size[2] / 2)
    if motion == "still":
        return replace(body, trajectory=still(start, rng.uniform(-np.pi, np.pi)), motion=motion)
    return replace(body, trajectory=_path(rng, category, motion, stage, start, duration), motion=motion)


def _combination(rng: np.random.Generator, split: Split, stage: Stage) -> tuple[str, str, str]:
    """Category, motion and colour; held-out pairs for `hard` alone."""
    wants_held_out = split == "hard"
    while True:
        category = str(rng.choice(stage.categories))
        motion = "still" if rng.random() < _STILL_SHARE else str(rng.choice(stage.motions))
        colour = str(rng.choice(stage.colours))
        if split in PLAIN_SPLITS:
            return category, motion, colour
        if motion == "bounce" and category in VEHICLES:
            continue
        if (held_out(category, motion) or held_out(category, colour)) == wants_held_out:
            return category, motion, colour


def _path(
    rng: np.random.Generator, category: str, motion: str, stage: Stage, start: Vector, duration: float
) -> Trajectory:
    slow, fast = stage.speed
    if category == "walker":
        slow, fast = slow, min(fast, 1.8)
    speed, heading = rng.uniform(slow, fast), rng.uniform(-np.pi, np.pi)
    ahead = (math.cos(heading), math.sin(heading), 0.0)
    velocity = (speed * ahead[0], speed * ahead[1], 0.0)
    first = Segment(start_seconds=0.0, position=start, velocity=velocity, yaw=heading)
    match motion:
        case "linear":
            return Trajectory(segments=(first,))
        case "accelerate":
            slower = rng.uniform(0.1, 0.3)
            gain = (fast - slower * speed) / duration
            return _path_of(replace(first, velocity=_times(velocity, slower), acceleration=_times(ahead, gain)))
        case "brake":
            until = duration * rng.uniform(0.6, 0.9)
            moving = replace(first, acceleration=_times(ahead, -speed / until))
            return _path_of(moving, _stopped(moving, until))
        case "stop":
            return _path_of(first, _stopped(first, duration * rng.uniform(0.35, 0.65)))
        case "bounce":
            height = rng.uniform(*stage.bounce)
            return Trajectory(segments=tuple(_bounces(first, height, rng.uniform(0.75, 1.0), duration)))
        case "turn":
            rate = rng.choice([-1, 1]) * rng.uniform(0.5, 1.3)
            return _path_of(replace(first, yaw_rate=rate, turn_rate=rate))
        case _:
            rate = rng.choice([-1, 1]) * rng.uniform(0.6, 2.2)
            return _path_of(replace(first, velocity=(0.0, 0.0, 0.0), yaw_rate=rate))


def _path_of(*segments: Segment) -> Trajectory:
    return Trajectory(segments=segments)


def _times(vector: Vector, factor: float) -> Vector:
    x, y, z = vector
    return x * factor, y * factor, z * factor


def _stopped(moving: Segment, seconds: float) -> Segment:
    x, y, z = moving.at(np.array([seconds]))[0][0].tolist()
    return Segment(start_seconds=seconds, position=(x, y, z), yaw=moving.yaw)


def _bounces(first: Segment, height: float, keep: float, duration: float) -> Iterator[Segment]:
    """Parabolas, each as high as the last one times `keep`."""
    start, (x, y, z) = 0.0, first.position
    while start < duration and height > 1e-3:
        lift = math.sqrt(2 * GRAVITY * height)
        yield replace(
            first,
            start_seconds=start,
            position=(x, y, z),
            velocity=(first.velocity[0], first.velocity[1], lift),
            acceleration=(0.0, 0.0, -GRAVITY),
        )
        flight = 2 * lift / GRAVITY
        start, x, y, height = (
            start + flight,
            x + first.velocity[0] * flight,
            y + first.velocity[1] * flight,
            height * keep,
        )


@dataclass(frozen=True, kw_only=True)
class _Free:
    """Tells whether a body has room for its whole path."""

    stage: Stage
    camera: Camera
    duration: float

    def fits(self, body: Body, others: Sequence[Body]) -> bool:
        """In view at the start; apart from others, camera and walls at all times."""
        seconds = np.linspace(0, self.duration, 25)
        path = body.trajectory.position(seconds)
        viewer = self.camera.trajectory.position(seconds)
        if (np.hypot(*(path - viewer)[:, :2].T) < body.radius + self.stage.clearance).any():
            return False
        if not self._in_view(body) or not self._within_walls(path, body.radius):
            return False
        return all(
            (np.hypot(*(path - other.trajectory.position(seconds))[:, :2].T) > body.radius + other.radius).all()
            for other in others
        )

    def _in_view(self, body: Body) -> bool:
        pose = self.camera.world_to_camera(np.zeros(1))[0]
        x, y, z = pose[:3, :3] @ body.trajectory.position(np.zeros(1))[0] + pose[:3, 3]
        half_x = math.tan(self.camera.fov_x / 2)
        return bool(z > 0 and abs(x / z) < 0.88 * half_x and abs(y / z) < 0.92 * half_x / self.camera.aspect)

    def _within_walls(self, path_t3: Floats, radius: float) -> bool:
        if self.stage.region[1] < 2:  # a table: nothing may fall off it
            x, y = path_t3[:, 0], path_t3[:, 1]
            return bool(((x > 0.3 + radius) & (x < 1.5 - radius) & (np.abs(y) < 0.8 - radius)).all())
        if self.stage.walls is None:
            return True
        behind, ahead, aside = self.stage.walls
        x, y = path_t3[:, 0], path_t3[:, 1]
        return bool(((x > -behind + radius) & (x < ahead - radius) & (np.abs(y) < aside - radius)).all())
