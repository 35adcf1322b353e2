"""A scene as the templates of questions see it.

A template asks only where the truth is clear to someone who sees the clip: regions must be well visible in the first
frame and stay in view, directions must lie well within their sector, speeds must differ clearly. `balance` in
`p4dprep.worlds.questions` then adds the distractors. Times are seconds from the start of the video.

Suffixes: t times, b bodies. "In the view of the first frame" means the axes of camera 0, so that a camera's own motion
changes nothing; left and right, towards and away are taken along the ground.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from p4dprep.worlds.questions import MIN_RATIO, Category, Query, scene_rng, token
from p4dprep.worlds.scene import Floats, Scene, Vector
from p4dprep.worlds.tracks import ObjectFacts, in_view, to_camera

_MIN_PICTURE_FRACTION = 0.0008  # a region smaller than that in the first frame is not asked about
_MIN_SHOWN_FRACTION = 0.2  # nor one that something else hides
_MIN_IN_VIEW_FRACTION = 0.7
_NUM_TIMES = 201
_NUM_MEASURED = 2  # bodies of a scene whose size or place is asked about, so that these do not crowd out motion
NUM_PICKED = 4  # regions to choose from
SECTOR_RATIO = 1.6  # of the larger to the smaller axis, for a direction to be along the larger
MIN_MOVE_FRACTION = 0.25  # of its longest side, for a body to have moved
_MIN_STRAIGHT_FRACTION = 0.75  # of the path, for its displacement along one axis to be its direction
MIN_TURN_RADIANS = np.radians(25)

Texts = tuple[str, ...]
Template = Callable[["View"], Iterator[Query]]

DIRECTIONS = ("to the left", "to the right", "towards the camera", "away from the camera")
UNMOVED = "It does not move"
FIRST_VIEW = "in the view of the first frame"
AXES = "in metres, in the coordinates of the first frame's camera (x right, y down, z forward)"


@dataclass(frozen=True)
class View:
    """A scene as templates see it: exact tracks at many times of the clip, and what may be asked about.

    Attributes:
        scene: the world.
        facts: of every body.
    """

    scene: Scene
    facts: Sequence[ObjectFacts]

    @cached_property
    def rng(self) -> np.random.Generator:
        """The draws, the same for the same scene."""
        return scene_rng(self.scene.id)

    @cached_property
    def seconds_t(self) -> Floats:
        """Times of the clip, dense."""
        return np.linspace(self.scene.frame_seconds[0], self.scene.frame_seconds[-1], _NUM_TIMES)

    @cached_property
    def poses_t44(self) -> Floats:
        """World to camera."""
        return self.scene.camera.world_to_camera(self.seconds_t)

    @property
    def pose0(self) -> Floats:
        """World to camera 0 (4, 4)."""
        pose: Floats = self.poses_t44[0]
        return pose

    @cached_property
    def world_bt3(self) -> Floats:
        """Centres, metres."""
        return np.array([body.trajectory.position(self.seconds_t) for body in self.scene.bodies])

    @cached_property
    def velocity_bt3(self) -> Floats:
        """m/s."""
        return np.array([body.trajectory.velocity(self.seconds_t) for body in self.scene.bodies])

    @cached_property
    def turned_b(self) -> Floats:
        """How far each body's yaw grows over the clip, radians; counter-clockwise is positive."""
        ends_b2 = np.array([body.trajectory.yaw(self.seconds_t[[0, -1]]) for body in self.scene.bodies])
        turned: Floats = ends_b2[:, 1] - ends_b2[:, 0]
        return turned

    @cached_property
    def range_bt(self) -> Floats:
        """Metres from the camera, where it is at each time, to each centre."""
        return np.array([np.linalg.norm(to_camera(self.poses_t44, track), axis=1) for track in self.world_bt3])

    @cached_property
    def length_b(self) -> Floats:
        """Metres of the longest side of each body's box."""
        return np.array([max(body.size) for body in self.scene.bodies])

    @cached_property
    def first_b3(self) -> Floats:
        """Centres in camera 0 at the first frame."""
        return to_camera(self.pose0, self.world_bt3[:, 0])

    @cached_property
    def bodies(self) -> list[int]:
        """Which bodies may be asked about, in random order."""
        enough = _MIN_IN_VIEW_FRACTION * len(self.facts[0].seconds) if self.facts else 0
        seen = [
            facts.body
            for facts in self.facts
            if facts.first_frame_fraction >= _MIN_PICTURE_FRACTION
            and facts.first_frame_shown_fraction >= _MIN_SHOWN_FRACTION
            and facts.num_frames_in_view >= enough
        ]
        return [seen[number] for number in self.rng.permutation(len(seen))]

    @property
    def measured(self) -> list[int]:
        """Those of them whose sizes and places are asked about: never by a noun, which gives both away."""
        return list(filter(self.goes_by_colour, self.bodies))[:_NUM_MEASURED]

    @cached_property
    def pairs(self) -> list[tuple[int, int]]:
        """Each of them with the next one, so that a crowded scene does not dominate a corpus."""
        following = self.bodies[1:] + self.bodies[:1]
        return list(zip(self.bodies, following, strict=True)) if len(self.bodies) > 1 else []

    def moment(self, body: int) -> float | None:
        """A time of the clip, in tenths of a second, at which a body is in view."""
        seen_t = in_view(self.scene.camera, self.poses_t44, self.world_bt3[body])
        tenths = np.arange(np.ceil(self.seconds_t[0] * 10), np.floor(self.seconds_t[-1] * 10) + 1) / 10
        seen = tenths[np.interp(tenths, self.seconds_t, seen_t) == 1]
        return float(self.rng.choice(seen)) if len(seen) else None

    def place(self, body: int, seconds: float) -> Vector:
        """Its centre at a time, in the coordinates of camera 0."""
        position = self.scene.bodies[body].trajectory.position(np.array([seconds]))
        x, y, z = to_camera(self.pose0, position)[0].tolist()
        return x, y, z

    def moves(self, body: int) -> bool:
        """Whether it clearly changes its place."""
        return bool(self.facts[body].path_length_metres > MIN_MOVE_FRACTION * self.length_b[body])

    def rests(self, body: int) -> bool:
        """Whether it neither moves nor turns at all."""
        return self.facts[body].path_length_metres < 1e-9 and abs(self.turned_b[body]) < 1e-9

    def direction(self, body: int) -> int | None:
        """Of its displacement in the first view: a place in `DIRECTIONS`; None if it is oblique, short or winding."""
        right, _, forward = self.pose0[:3, :3]
        ahead = np.array([forward[0], forward[1], 0.0]) / np.hypot(forward[0], forward[1])
        moved = self.world_bt3[body, -1] - self.world_bt3[body, 0]
        aside, away = float(moved @ right), float(moved @ ahead)
        long, short = sorted((abs(aside), abs(away)), reverse=True)
        along = np.linalg.norm(np.diff(self.world_bt3[body, :, :2], axis=0), axis=1).sum()
        if long < max(MIN_MOVE_FRACTION * self.length_b[body], SECTOR_RATIO * short, _MIN_STRAIGHT_FRACTION * along):
            return None
        return int(aside > 0) if abs(aside) > abs(away) else 2 + int(away > 0)

    def goes_by_colour(self, body: int) -> bool:
        """Whether its colour tells it from all other bodies, and from the trees."""
        colour = self.scene.bodies[body].colour
        trees = colour == "green" and self.scene.setting in ("road", "landscape")
        return not trees and [other.colour for other in self.scene.bodies].count(colour) == 1

    def name(self, body: int) -> str:
        """What tells it from the others: its colour if that is enough, since nouns have typical sizes and speeds."""
        named = self.scene.bodies[body]
        return f"{named.colour} object" if self.goes_by_colour(body) else named.name

    def query(
        self,
        category: Category,
        template: str,
        texts: Texts,
        regions: tuple[int, ...],
        answer: str,
        *,
        options: Texts = (),
        value: tuple[float, ...] = (),
        min_ratio: float = MIN_RATIO,
        near: tuple[str, ...] = (),
    ) -> Query:
        """A query in one of several wordings; `near` are finer pools than the setting's."""
        return Query(
            scene_id=self.scene.id,
            category=category,
            template=template,
            text=texts[int(self.rng.integers(len(texts)))],
            regions=regions,
            names=tuple(map(self.name, regions)),
            answer=answer,
            options=options,
            value=value,
            min_ratio=min_ratio,
            pools=(*near, self.scene.setting, ""),
        )


def number(value: float) -> str:
    """Two significant digits, without an exponent."""
    return f"{float(f'{value:.2g}'):g}"


def point(position: Iterable[float]) -> str:
    """Coordinates in metres, to the centimetre."""
    return "({:.2f}, {:.2f}, {:.2f})".format(*(round(value, 2) + 0.0 for value in position))


def pick(
    view: View,
    category: Category,
    template: str,
    texts: Texts,
    values: dict[int, float],
    *,
    margin: float = 0.0,
    hub: int | None = None,
) -> Iterator[Query]:
    """Which of four regions has the largest value, if that is clear.

    Args:
        view: the scene.
        category: of the question.
        template: its name.
        texts: wordings; `{listed}` stands for the regions, `{hub}` for the one they are compared with.
        values: of the bodies to choose from.
        margin: by which the largest must exceed the next one, beyond the usual ratio.
        hub: a body that all are compared with.
    """
    regions = tuple(body for body in view.bodies if body in values)[:NUM_PICKED]
    if len(regions) < NUM_PICKED:
        return
    second, first = sorted(values[body] for body in regions)[-2:]
    if first - second <= max(margin, (1 - 1 / MIN_RATIO) * abs(first)):
        return
    options = tuple(token(place) for place in range(len(regions)))
    words = {"listed": f"{', '.join(options[:-1])} or {options[-1]}", "hub": token(len(regions))}
    yield view.query(
        category,
        template,
        tuple(text.format(**words) for text in texts),
        regions if hub is None else (*regions, hub),
        options[[values[body] for body in regions].index(first)],
        options=options,
    )
