"""What is asked about where things are and how large: R4D-Bench's static categories VG, DM and SR."""

from collections.abc import Iterator
from itertools import combinations, pairwise

import numpy as np

from p4dprep.worlds.questions import MIN_RATIO, Query
from p4dprep.worlds.scene import Floats
from p4dprep.worlds.tracks import to_camera
from p4dprep.worlds.view import AXES, NUM_PICKED, SECTOR_RATIO, Template, Texts, View, number, pick, point

_NUM_INTERVALS = 5  # of a clip

# --- 3D video grounding, as in STI-Bench: which 3D box, or position, an object has at a time -----------------------


def _vg_position(view: View) -> Iterator[Query]:
    for body in view.measured:
        if (at := view.moment(body)) is None:
            continue
        place = view.place(body, at)
        texts = (
            f"Where is the centre of <obj_1> at {at:.1f} s, {AXES}?",
            f"What is the position of <obj_1> at {at:.1f} s, {AXES}?",
        )
        near = (view.scene.id,)
        yield view.query("VG", "vg_position", texts, (body,), point(place), value=place, near=near)


def _vg_box(view: View) -> Iterator[Query]:
    for body in view.measured:
        box = view.facts[body].boxes_camera0[0]
        answer = f"centre {point(box.centre)}, yaw {np.degrees(box.yaw):.0f} degrees"
        convention = f"Centres are {AXES}; yaw is counter-clockwise seen from above, from the viewing direction."
        texts = (
            f"Which 3D box fits <obj_1> in the first frame? {convention}",
            f"Which of these is the 3D bounding box of <obj_1> in the first frame? {convention}",
        )
        yield view.query("VG", "vg_box", texts, (body,), answer, value=box.centre, near=(view.scene.id,))


def _vg_which(view: View) -> Iterator[Query]:
    if len(view.bodies) < NUM_PICKED:
        return
    target = int(view.rng.choice(view.bodies[:NUM_PICKED]))
    if (at := view.moment(target)) is None:
        return
    positions = {body: np.array(view.place(body, at)) for body in view.bodies}
    offsets = {body: -float(np.linalg.norm(positions[body] - positions[target])) for body in view.bodies}
    texts = (
        f"Which of {{listed}} has its centre at {point(positions[target])} at {at:.1f} s, {AXES}?",
        f"At {at:.1f} s one of {{listed}} is at {point(positions[target])}, {AXES}. Which one?",
    )
    yield from pick(view, "VG", "vg_which", texts, offsets, margin=0.3 * float(np.linalg.norm(positions[target])))


def _fifths(view: View) -> Texts:
    edges = np.linspace(view.seconds_t[0], view.seconds_t[-1], _NUM_INTERVALS + 1)
    return tuple(f"between {low:.1f} s and {high:.1f} s" for low, high in pairwise(edges))


def _vg_when(view: View) -> Iterator[Query]:
    options = _fifths(view)
    for body in filter(view.moves, view.bodies):
        slot = int(view.rng.integers(_NUM_INTERVALS))
        then = round((slot + 0.5) / _NUM_INTERVALS * (len(view.seconds_t) - 1))
        place = view.world_bt3[body, then]
        if _slot_of_smallest(np.linalg.norm(view.world_bt3[body] - place, axis=1)) != slot:
            continue
        there = point(to_camera(view.pose0, place[None])[0].tolist())
        texts = (
            f"When is the centre of <obj_1> at {there}, {AXES}?",
            f"At what time does <obj_1> pass the point {there}, {AXES}?",
        )
        yield view.query("VG", "vg_when", texts, (body,), options[slot], options=options)


def _slot_of_smallest(values_t: Floats) -> int | None:
    """In which fifth of the clip the smallest value lies, if it lies well inside and the others stay clearly above."""
    fifths = np.array_split(values_t, _NUM_INTERVALS)
    slot = int(np.argmin([part.min() for part in fifths]))
    others = min(float(part.min()) for place, part in enumerate(fifths) if place != slot)
    return slot if others - values_t.min() > 0.05 * np.ptp(values_t) > 0.01 * values_t.mean() else None


# --- Dimensional measurement ---------------------------------------------------------------------------------------


def _dm_size(view: View) -> Iterator[Query]:
    for body in view.measured:
        height = view.scene.bodies[body].size[2]
        texts = ("How tall is <obj_1>, in metres?", "What is the height of <obj_1>, in metres?")
        yield view.query("DM", "dm_height", texts, (body,), f"{number(height)} m", value=(height,))
        long = float(view.length_b[body])
        texts = (
            "How long is the longest side of the upright 3D box around <obj_1>, in metres?",
            "What is the largest dimension (length, width or height) of <obj_1>, in metres?",
        )
        yield view.query("DM", "dm_longest", texts, (body,), f"{number(long)} m", value=(long,))


def _dm_distance(view: View) -> Iterator[Query]:
    for one, other in combinations(view.measured, 2):
        apart = float(np.linalg.norm(view.world_bt3[one, 0] - view.world_bt3[other, 0]))
        texts = (
            "How far apart are the centres of <obj_1> and <obj_2> in the first frame, in metres?",
            "At the start of the video, what is the distance from the centre of <obj_1> to that of <obj_2>?",
        )
        yield view.query("DM", "dm_distance", texts, (one, other), f"{number(apart)} m", value=(apart,))


def _dm_camera(view: View) -> Iterator[Query]:
    for body in view.measured:
        if (at := view.moment(body)) is None:
            continue
        far = float(np.interp(at, view.seconds_t, view.range_bt[body]))
        texts = (
            f"How far is the centre of <obj_1> from the camera at {at:.1f} s?",
            f"What is the distance between the camera and the centre of <obj_1> at {at:.1f} s?",
        )
        yield view.query("DM", "dm_camera", texts, (body,), f"{number(far)} m", value=(far,))


# --- Spatial relation ----------------------------------------------------------------------------------------------


def _sr_quadrant(view: View) -> Iterator[Query]:
    sides, depths = ("to the left", "to the right"), ("nearer to the camera", "farther from the camera")
    options = tuple(f"{side} and {depth}" for side in sides for depth in depths)
    for one, other in view.pairs:
        (x, _, z), (other_x, _, other_z) = view.first_b3[[one, other]].tolist()
        aside, in_picture = x - other_x, x / z - other_x / other_z
        if max(z, other_z) < MIN_RATIO * min(z, other_z) or aside * in_picture <= 0 or abs(in_picture) < 0.1:
            continue
        texts = (
            "In the first frame, where is <obj_1> compared with <obj_2>, as the camera sees it?",
            "As seen from the camera at the start, how does <obj_1> lie relative to <obj_2>?",
        )
        answer = options[2 * int(aside > 0) + int(z > other_z)]
        yield view.query("SR", "sr_quadrant", texts, (one, other), answer, options=options)


def _sr_heading(view: View) -> Iterator[Query]:
    options = ("ahead of it", "behind it", "to its left", "to its right")
    for one, other in ((one, other) for pair in view.pairs for one, other in (pair, pair[::-1])):
        (x, y), (ahead_x, ahead_y) = (
            (view.world_bt3[one, 0] - view.world_bt3[other, 0])[:2],
            view.velocity_bt3[other, 0, :2],
        )
        along, left = ahead_x * x + ahead_y * y, ahead_x * y - ahead_y * x
        long, short = sorted((abs(along), abs(left)), reverse=True)
        if not view.moves(other) or long < SECTOR_RATIO * short or not np.hypot(ahead_x, ahead_y):
            continue
        answer = options[int(along < 0) if abs(along) > abs(left) else 2 + int(left < 0)]
        texts = (
            "Imagine riding on <obj_2>, facing the way it starts to move. Where is <obj_1> in the first frame?",
            "Seen from <obj_2>, facing its direction of motion at the start, where is <obj_1>?",
        )
        yield view.query("SR", "sr_heading", texts, (one, other), answer, options=options)


def _sr_extreme(view: View) -> Iterator[Query]:
    texts = ("In the first frame, which of {listed} is nearest to the camera?",)
    yield from pick(view, "SR", "sr_nearest", texts, {body: -float(view.range_bt[body, 0]) for body in view.bodies})
    texts = ("In the last frame, which of {listed} is farthest from the camera?",)
    yield from pick(view, "SR", "sr_farthest", texts, {body: float(view.range_bt[body, -1]) for body in view.bodies})
    if len(view.bodies) > NUM_PICKED:
        *others, hub = view.bodies[: NUM_PICKED + 1]
        apart_b = np.linalg.norm(view.world_bt3[:, 0] - view.world_bt3[hub, 0], axis=1)
        texts = ("In the first frame, which of {listed} is nearest to {hub}?",)
        yield from pick(view, "SR", "sr_neighbour", texts, {body: -float(apart_b[body]) for body in others}, hub=hub)


STATIC_TEMPLATES: tuple[Template, ...] = (
    *(_vg_position, _vg_box, _vg_which, _vg_when),
    *(_dm_size, _dm_distance, _dm_camera),
    *(_sr_quadrant, _sr_heading, _sr_extreme),
)

PLAIN_STATIC_TEMPLATES: tuple[Template, ...] = (_dm_distance, _sr_quadrant, _sr_extreme)
"""What is asked about plain worlds: nothing whose answer is a point in space."""

SINGLE_STATIC_TEMPLATES: tuple[Template, ...] = (_dm_camera,)
"""What is asked about plain worlds of one ball, which has no others to be compared with."""
