"""Where a world's bodies live: what each setting allows, and what stands around."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from p4dprep.worlds.bodies import COLOURS, build_body, shade_of, slab
from p4dprep.worlds.scene import Body, Setting, Split, Texture, Vector
from p4dprep.worlds.textures import FAMILIES

MOTIONS = ("linear", "accelerate", "brake", "stop", "bounce", "turn", "spin")
CAMERAS = ("stand", "pan", "walk", "shake")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What a setting allows.

    Attributes:
        categories: of bodies.
        region: nearest and farthest start of a body, metres ahead of the camera.
        aside: how far to the side a body may start, as a share of the distance ahead.
        speed: m/s, slowest and fastest.
        bounce: heights of a bounce, metres.
        camera_height, camera_pitch: metres and degrees, lowest and highest.
        camera_speed: m/s of a walk.
        camera_reach: metres a walk may cover.
        walls: distances of the walls behind, ahead and aside; None outdoors.
        far_metres: where sight ends.
        clearance: metres kept free around the camera.
        num_bodies: fewest and most that are tried.
        colours, motions: of bodies.
        cameras: how it may be filmed.
        has_effects: whether cameras add noise, blur and changing exposure.
        fps: frames a second, one of these; now and then they change within a clip.
        num_frames: fewest and most, whatever the rate; None takes as many as 1.8 to 4.5 seconds have.
    """

    categories: tuple[str, ...]
    region: tuple[float, float]
    aside: float
    speed: tuple[float, float]
    bounce: tuple[float, float]
    camera_height: tuple[float, float]
    camera_pitch: tuple[float, float]
    camera_speed: tuple[float, float]
    camera_reach: float
    walls: tuple[float, float, float] | None
    far_metres: float
    clearance: float
    num_bodies: tuple[int, int] = (3, 6)
    colours: tuple[str, ...] = tuple(COLOURS)
    motions: tuple[str, ...] = MOTIONS
    cameras: tuple[str, ...] = CAMERAS
    has_effects: bool = True
    fps: tuple[int, ...] = (6, 8, 10, 12, 15)
    num_frames: tuple[int, int] | None = None


STAGES: dict[Setting, Stage] = {
    "room": Stage(
        categories=("ball", "crate", "barrel", "stool", "robot", "walker"),
        region=(2.0, 5.0),
        aside=0.5,
        speed=(0.25, 1.1),
        bounce=(0.2, 0.8),
        camera_height=(1.4, 1.6),
        camera_pitch=(-18, -10),
        camera_speed=(0.2, 0.8),
        camera_reach=1.2,
        walls=(2.0, 6.8, 3.2),
        far_metres=20,
        clearance=0.9,
    ),
    "road": Stage(
        categories=("car", "van", "walker", "barrel", "ball"),
        region=(6.0, 22.0),
        aside=0.45,
        speed=(1.0, 7.0),
        bounce=(0.4, 1.2),
        camera_height=(1.4, 1.6),
        camera_pitch=(-6, -2),
        camera_speed=(1.5, 8.0),
        camera_reach=25.0,
        walls=None,
        far_metres=60,
        clearance=2.2,
        cameras=(*CAMERAS, "drive"),
    ),
    "table": Stage(
        categories=("cup", "can", "book", "toy", "marble", "bottle"),
        region=(0.5, 1.15),
        aside=0.45,
        speed=(0.05, 0.35),
        bounce=(0.05, 0.2),
        camera_height=(0.42, 0.5),
        camera_pitch=(-32, -25),
        camera_speed=(0.04, 0.16),
        camera_reach=0.25,
        walls=(1.5, 4.2, 2.4),
        far_metres=20,
        clearance=0.25,
    ),
    "landscape": Stage(
        categories=("walker", "ball", "crate", "sheep", "robot", "barrel"),
        region=(3.0, 12.0),
        aside=0.5,
        speed=(0.5, 2.5),
        bounce=(0.4, 1.5),
        camera_height=(1.5, 1.7),
        camera_pitch=(-10, -5),
        camera_speed=(0.4, 1.4),
        camera_reach=4.0,
        walls=None,
        far_metres=60,
        clearance=1.2,
    ),
    "plain": Stage(
        categories=("ball",),
        region=(1.7, 4.2),
        aside=0.42,
        speed=(0.25, 1.2),
        bounce=(0.2, 0.8),
        camera_height=(1.3, 1.5),
        camera_pitch=(-26, -22),
        camera_speed=(0.0, 0.0),
        camera_reach=0.0,
        walls=None,
        far_metres=30,
        clearance=0.7,
        num_bodies=(4, 4),
        colours=("red", "green", "blue", "yellow", "purple", "white"),
        motions=("linear", "accelerate", "brake", "stop", "turn"),
        cameras=("stand",),
        has_effects=False,
    ),
}
# As many frames in 1 second as in 6: what they show does not tell how long they took.
STAGES["single"] = replace(STAGES["plain"], num_bodies=(1, 1), fps=(4, 5, 6, 8, 10, 13, 16, 20), num_frames=(18, 24))


def near_colour(rng: np.random.Generator, colour: Vector, spread: float = 0.06) -> Vector:
    """A colour like another one."""
    red, green, blue = np.clip(np.asarray(colour) + rng.normal(0, spread, 3), 0.02, 1).tolist()
    return red, green, blue


@dataclass(frozen=True)
class Painter:
    """Draws textures of a split's family."""

    rng: np.random.Generator
    split: Split

    def __call__(self, colour: Vector, scale: float, contrast: float = 0.5) -> Texture:
        """A texture of about this colour and scale (metres)."""
        colour = near_colour(self.rng, colour, 0.03)
        return Texture(
            pattern=str(self.rng.choice(FAMILIES[self.split])),
            colour=colour,
            other=shade_of(colour, contrast * self.rng.uniform(0.7, 1.2)),
            scale=float(scale * self.rng.uniform(0.7, 1.4)),
            phase=tuple(self.rng.uniform(0.1, 5, 3).tolist()),
        )


def _walls(rng: np.random.Generator, stage: Stage, paint: Painter, floor: float) -> Iterator[Body]:
    behind, ahead, aside = stage.walls or (0.0, 0.0, 0.0)
    ahead, aside, height = ahead + rng.uniform(0, 1), aside + rng.uniform(0, 0.8), rng.uniform(2.6, 3.0)
    wall = paint(near_colour(rng, (0.75, 0.72, 0.66), 0.1), 0.8, 0.3)
    yield slab("room", ((ahead - behind) / 2, 0, floor + height / 2), (ahead + behind, 2 * aside, height), wall)
    cover = paint(near_colour(rng, (0.55, 0.45, 0.36), 0.1), 0.5, 0.45)
    yield slab("ground", (0, 0, floor + 0.005), (1, 1, 1), cover)


def _room(rng: np.random.Generator, stage: Stage, paint: Painter) -> Iterator[Body]:
    yield from _walls(rng, stage, paint, 0.0)
    for _ in range(rng.integers(0, 4)):
        width, depth, height = rng.uniform((0.6, 0.35, 0.5), (1.6, 0.6, 1.9))
        centre = (stage.walls[1] - depth / 2, rng.uniform(-2.5, 2.5), height / 2) if stage.walls else (0.0, 0.0, 0.0)
        wall = paint(near_colour(rng, (0.5, 0.4, 0.32), 0.12), 0.5)
        yield slab("box", (centre[0] + depth, centre[1], centre[2]), (depth, width, height), wall)


def _table(rng: np.random.Generator, stage: Stage, paint: Painter) -> Iterator[Body]:
    yield from _walls(rng, stage, paint, -0.75)
    top = paint(near_colour(rng, (0.6, 0.45, 0.3), 0.1), 0.15, 0.35)
    yield slab("box", (0.9, 0, -0.02), (1.4, 1.8, 0.04), top)
    for x, y in ((0.3, 0.8), (0.3, -0.8), (1.5, 0.8), (1.5, -0.8)):
        yield slab("box", (x, y, -0.4), (0.06, 0.06, 0.7), top)


def _road(rng: np.random.Generator, __: Stage, paint: Painter) -> Iterator[Body]:
    yield slab("ground", (0, 0, 0), (1, 1, 1), paint(near_colour(rng, (0.36, 0.36, 0.38), 0.03), 0.6, 0.25))
    marking = Texture(pattern="waves", colour=(0.9, 0.9, 0.85), other=(0.8, 0.8, 0.75), scale=1.0)
    shift = rng.uniform(0, 3)
    for number in range(10):
        yield slab("box", (shift + 4 + 5 * number, 1.75, 0.005), (2.0, 0.15, 0.012), marking)
    for side in (-1, 1):
        walk = paint(near_colour(rng, (0.6, 0.58, 0.55), 0.05), 1.0, 0.2)
        yield slab("box", (25, side * 12.5, 0.04), (90, 3.0, 0.12), walk)
        x = rng.uniform(2, 10)
        for _ in range(4):
            width, depth, height = rng.uniform((5, 4, 4), (12, 8, 11))
            wall = paint(near_colour(rng, (0.6, 0.52, 0.45), 0.12), 1.6)
            yield slab("box", (x + width / 2, side * (14.5 + depth / 2), height / 2), (width, depth, height), wall)
            x += width + rng.uniform(0.5, 5)
        yield _tree(rng, (rng.uniform(8, 45), side * 12.5), paint)


def _landscape(rng: np.random.Generator, stage: Stage, paint: Painter) -> Iterator[Body]:
    yield slab("ground", (0, 0, 0), (1, 1, 1), paint(near_colour(rng, (0.4, 0.52, 0.3), 0.06), 1.0, 0.35))
    for _ in range(rng.integers(2, 5)):
        radius, x = rng.uniform(15, 40), rng.uniform(35, 60)
        hill = paint(near_colour(rng, (0.38, 0.5, 0.32), 0.06), 4.0, 0.35)
        yield slab("sphere", (x, rng.uniform(-40, 40), -radius * rng.uniform(0.75, 0.9)), (radius * 2,) * 3, hill)
    for _ in range(rng.integers(3, 7)):
        x = rng.uniform(stage.region[1] * 1.2, 35)
        yield _tree(rng, (x, x * rng.uniform(-0.7, 0.7)), paint)


def _plain(rng: np.random.Generator, _: Stage, paint: Painter) -> Iterator[Body]:
    yield slab("ground", (0, 0, 0), (1, 1, 1), paint(near_colour(rng, (0.5, 0.47, 0.42), 0.04), 0.6, 0.15))


def _tree(rng: np.random.Generator, spot: tuple[float, float], paint: Painter) -> Body:
    return build_body(rng, "tree", "", paint, at=spot)


SCENERY: dict[Setting, Callable[[np.random.Generator, Stage, Painter], Iterator[Body]]] = {
    "room": _room,
    "road": _road,
    "table": _table,
    "landscape": _landscape,
    "plain": _plain,
    "single": _plain,
}
