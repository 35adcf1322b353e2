"""What is asked about how things move: R4D-Bench's dynamic categories R, C, T, FP, SA and DP."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from p4dprep.worlds.bodies import COLOURS, NOUNS
from p4dprep.worlds.generate import held_out
from p4dprep.worlds.questions import MIN_RATIO, Query, token
from p4dprep.worlds.scene import Body
from p4dprep.worlds.tracks import in_view, picture_place
from p4dprep.worlds.view import (
    DIRECTIONS,
    FIRST_VIEW,
    MIN_MOVE_FRACTION,
    MIN_TURN_RADIANS,
    SECTOR_RATIO,
    UNMOVED,
    Template,
    Texts,
    View,
    number,
    pick,
)

# --- Rotational ----------------------------------------------------------------------------------------------------


def _round(view: View, body: int) -> bool:
    """Whether a body looks the same from all sides, so that only its pattern would show a turn."""
    parts = view.scene.bodies[body].parts
    return all(not any(part.centre[:2]) and part.shape != "box" and part.axis == "z" for part in parts)


def _r_how(view: View) -> Iterator[Query]:
    turns = ("turns clockwise", "turns counter-clockwise")
    options = (
        *(f"It {turn} while it travels" for turn in turns),
        *(f"It {turn} on the spot" for turn in turns),
        "It does not turn",
    )
    for body in view.bodies:
        turned = view.turned_b[body]
        if _round(view, body) or 0 < abs(turned) < MIN_TURN_RADIANS:
            continue
        slot = int(turned > 0) + 2 * int(not view.moves(body)) if turned else 4
        texts = (
            "How does <obj_1> turn during the video, as seen from above?",
            "Seen from above, which describes the rotation of <obj_1>?",
        )
        yield view.query("R", "r_how", texts, (body,), options[slot], options=options)


def _r_degrees(view: View) -> Iterator[Query]:
    for body in view.bodies:
        turned = abs(float(view.turned_b[body]))
        if _round(view, body) or turned < MIN_TURN_RADIANS:
            continue
        texts = (
            "By how many degrees does <obj_1> turn about its vertical axis from the first frame to the last?",
            "Through what angle does <obj_1> rotate in the course of the video?",
        )
        answer = f"about {number(np.degrees(turned))} degrees"
        yield view.query("R", "r_degrees", texts, (body,), answer, value=(turned,))


def _steered(view: View, body: int) -> float:
    """How far the direction of motion turns over the clip, radians."""
    x, y, _ = view.velocity_bt3[body].T
    moving = np.hypot(x, y) > 1e-6
    heading = np.unwrap(np.arctan2(y, x)[moving])
    return float(heading[-1] - heading[0]) if len(heading) else 0.0


def _r_steer(view: View) -> Iterator[Query]:
    options = ("It bends to its left", "It bends to its right", "It goes straight on", "It stays where it is")
    for body in view.bodies:
        steered = _steered(view, body)
        if not (view.moves(body) or view.rests(body)) or 1e-6 < abs(steered) < MIN_TURN_RADIANS:
            continue
        slot = 3 if view.rests(body) else int(steered < 0) if abs(steered) > 1e-6 else 2
        texts = (
            "Seen in its own direction of motion, how does the path of <obj_1> run?",
            "Does the path of <obj_1> bend, from its own point of view?",
        )
        yield view.query("R", "r_steer", texts, (body,), options[slot], options=options)


# --- Counting ------------------------------------------------------------------------------------------------------


def _count(view: View, template: str, texts: Texts, holds: dict[int, bool]) -> Iterator[Query]:
    """How many of three or four regions do something; `holds` has the bodies of which it is clear."""
    yes, no = ([body for body in view.bodies if holds.get(body) is wanted] for wanted in (True, False))
    for size in (3, 4):
        feasible = [wanted for wanted in range(size + 1) if wanted <= len(yes) and size - wanted <= len(no)]
        for wanted in view.rng.permutation(feasible)[:2].astype(int).tolist():
            chosen = [*yes[:wanted], *no[: size - wanted]]
            regions = tuple(chosen[place] for place in view.rng.permutation(size))
            tokens = [token(place) for place in range(size)]
            listed = f"{', '.join(tokens[:-1])} and {tokens[-1]}"
            options = tuple(str(count) for count in range(size + 1))
            asked = tuple(text.format(listed=listed) for text in texts)
            yield view.query("C", f"{template}_{size}", asked, regions, str(wanted), options=options)


def _c_regions(view: View) -> Iterator[Query]:
    texts: Texts = (
        "How many of {listed} change their place in the world?",
        "Of {listed}, how many move from their place?",
    )
    moving = {body: view.moves(body) for body in view.bodies if view.moves(body) or view.rests(body)}
    yield from _count(view, "c_move", texts, moving)
    texts = ("How many of {listed} are nearer to the camera at the end of the video than at its start?",)
    gain = {body: float(view.range_bt[body, -1] / view.range_bt[body, 0]) for body in view.bodies}
    yield from _count(
        view, "c_nearer", texts, {body: value < 1 for body, value in gain.items() if abs(value - 1) > 0.1}
    )


def _c_total(view: View) -> Iterator[Query]:
    if len(view.bodies) < len(view.scene.bodies):
        return
    turned = np.abs(view.turned_b[view.bodies])
    if all(view.moves(body) or view.facts[body].path_length_metres < 1e-9 for body in view.bodies):
        texts = (
            "How many objects in the video change their place in the world?",
            "How many things travel from one place to another in this video, the camera aside?",
        )
        yield _total(view, "c_total_move", texts, sum(map(view.moves, view.bodies)))
    if not ((turned > 0) & (turned < MIN_TURN_RADIANS)).any():
        texts = (
            "How many objects in the video turn about their vertical axis?",
            "How many things change the way they face in the course of this video?",
        )
        yield _total(view, "c_total_turn", texts, int((turned > 0).sum()))


def _total(view: View, template: str, texts: Texts, count: int) -> Query:
    return view.query("C", template, texts, (), str(count), value=(float(count),), min_ratio=1.0)


def _c_bounces(view: View) -> Iterator[Query]:
    for body in view.bodies:
        starts = [segment.start_seconds for segment in view.scene.bodies[body].trajectory.segments]
        path, margin = view.scene.bodies[body].trajectory, 0.06
        hits = [
            at
            for at in starts
            if view.seconds_t[0] < at < view.seconds_t[-1]
            and path.velocity(np.array([at - 1e-6]))[0, 2] < 0 < path.velocity(np.array([at]))[0, 2]
        ]
        if any(view.seconds_t[-1] - at < margin for at in starts if at <= view.seconds_t[-1]):
            continue
        texts = (
            "How many times does <obj_1> hit the ground and bounce up again during the video?",
            "How often does <obj_1> bounce off the ground during the video?",
        )
        yield view.query("C", "c_bounces", texts, (body,), str(len(hits)), value=(float(len(hits)),), min_ratio=1.0)


# --- Translational -------------------------------------------------------------------------------------------------


def _t_world(view: View) -> Iterator[Query]:
    options = (*(f"It moves {direction}" for direction in DIRECTIONS), UNMOVED)
    for body in view.bodies:
        slot = 4 if view.rests(body) else view.direction(body)
        if slot is not None:
            texts = (
                f"Leaving the camera's own motion aside, how does <obj_1> move, {FIRST_VIEW}?",
                f"In which direction does <obj_1> travel in the world, {FIRST_VIEW}?",
            )
            yield view.query("T", "t_world", texts, (body,), options[slot], options=options)


def _t_picture(view: View) -> Iterator[Query]:
    options = ("to the left", "to the right", "upwards", "downwards")
    for body in view.bodies:
        ends, poses = view.world_bt3[body, [0, -1]], view.poses_t44[[0, -1]]
        place = picture_place(view.scene.camera, poses, ends)
        right, down = (place[1] - place[0]) / (1.0, view.scene.camera.aspect)
        long, short = sorted((abs(right), abs(down)), reverse=True)
        if not in_view(view.scene.camera, poses, ends).all() or long < max(0.06, SECTOR_RATIO * short):
            continue
        slot = int(right > 0) if abs(right) > abs(down) else 2 + int(down > 0)
        texts = (
            "Camera motion included, which way does <obj_1> shift within the picture from the first frame to the last?",
            "Compare the first frame with the last: where has <obj_1> gone in the picture?",
        )
        yield view.query("T", "t_picture", texts, (body,), options[slot], options=options)


def _t_range(view: View) -> Iterator[Query]:
    options = (
        "It shrinks by more than a quarter",
        "It shrinks by less than a quarter",
        "It stays the same",
        "It grows by less than a quarter",
        "It grows by more than a quarter",
    )
    bounds = ((0.0, 0.7), (0.79, 0.93), (0.99, 1.01), (1.07, 1.21), (1.3, np.inf))
    for body in view.bodies:
        ratio = float(view.range_bt[body, -1] / view.range_bt[body, 0])
        slot = next((slot for slot, (low, high) in enumerate(bounds) if low < ratio < high), None)
        if slot is not None:
            texts = (
                "Compare the last frame with the first: what has become of the distance between camera and <obj_1>?",
                "How does the distance from the camera to <obj_1> change from the first frame to the last?",
            )
            yield view.query("T", "t_range", texts, (body,), options[slot], options=options)


# --- False positives: a motion that mostly does not happen, or a thing that is not there ---------------------------


def _fp_direction(view: View) -> Iterator[Query]:
    for body in view.bodies:
        slot = 4 if view.rests(body) else view.direction(body)
        if slot is None:
            continue
        claim = int(view.rng.integers(len(DIRECTIONS)))
        ways = [f"{'Yes' if way == claim else 'No'}, it moves {direction}" for way, direction in enumerate(DIRECTIONS)]
        options = (*ways, "No, it does not move")
        texts = (
            f"Does <obj_1> move {DIRECTIONS[claim]}, {FIRST_VIEW}?",
            f"Is it true that <obj_1> moves {DIRECTIONS[claim]} ({FIRST_VIEW}, the camera's motion left aside)?",
        )
        yield view.query("FP", f"fp_direction_{claim}", texts, (body,), options[slot], options=options)


def _fp_turn(view: View) -> Iterator[Query]:
    for body in view.bodies:
        turned = view.turned_b[body]
        if (
            _round(view, body)
            or 0 < abs(turned) < MIN_TURN_RADIANS
            or not (view.rests(body) or turned or view.moves(body))
        ):
            continue
        slot = int(turned > 0) if turned else 2 + int(view.rests(body))
        claim = int(view.rng.integers(2))
        ways = ("clockwise", "counter-clockwise")
        options = (
            *(f"{'Yes' if way == claim else 'No'}, it turns {name}" for way, name in enumerate(ways)),
            "No, it moves without turning",
            "No, it does nothing at all",
        )
        texts = (f"Does <obj_1> turn {ways[claim]}, seen from above?",)
        yield view.query("FP", f"fp_turn_{ways[claim]}", texts, (body,), options[slot], options=options)


def _fp_absent(view: View) -> Iterator[Query]:
    options = ("To the left", "To the right", "It stays where it is", "There is no such thing in the video")
    asked = [(view.scene.bodies[body], view.direction(body), view.rests(body)) for body in view.bodies]
    slots = {body.name: (body, 2 if rests else way) for body, way, rests in asked if rests or way in (0, 1)}
    absent = _absent(view)
    for name, (body, slot) in {**slots, **({absent[0]: (absent[1], 3)} if absent else {})}.items():
        if slot is not None:
            texts = (f"Which way does the {name} move, {FIRST_VIEW}?", f"Where does the {name} go, {FIRST_VIEW}?")
            query = view.query("FP", "fp_absent", texts, (), options[slot], options=options)
            yield replace(query, pools=(body.category,))


def _absent(view: View) -> tuple[str, Body] | None:
    """The name of a thing that is not there, as likely a name as those that are, and the body it was made from."""
    body = view.scene.bodies[int(view.rng.integers(len(view.scene.bodies)))]
    made_as = {noun: category for category, noun in NOUNS.items()}.get(body.category, body.category)
    colour = str(view.rng.choice(list(COLOURS)))
    name = f"{colour} {body.category}"
    if name in {other.name for other in view.scene.bodies}:
        return None
    return (name, body) if held_out(made_as, colour) == held_out(made_as, body.colour) else None


# --- Speed and acceleration ----------------------------------------------------------------------------------------


def _level(view: View, body: int) -> bool:
    """Whether a body keeps its height."""
    return not view.velocity_bt3[body, :, 2].any()


def _sa_speed(view: View) -> Iterator[Query]:
    for body in filter(view.moves, view.bodies):
        speed = view.facts[body].mean_speed
        texts = (
            "What is the average speed of <obj_1> over the video, in metres per second?",
            "How fast does <obj_1> move on average?",
        )
        yield view.query("SA", "sa_mean_speed", texts, (body,), f"{number(speed)} m/s", value=(speed,))
        at = view.moment(body)
        if at is None or not _level(view, body):
            continue
        speed = float(np.linalg.norm(view.scene.bodies[body].trajectory.velocity(np.array([at]))))
        if speed > 0.02:
            texts = (f"How fast is <obj_1> at {at:.1f} s?", f"What is the speed of <obj_1> at {at:.1f} s?")
            yield view.query("SA", "sa_speed_at", texts, (body,), f"{number(speed)} m/s", value=(speed,))


def _sa_fastest(view: View) -> Iterator[Query]:
    speeds = {body: view.facts[body].mean_speed for body in view.bodies}
    texts = ("Which of {listed} has the highest average speed?", "Which of {listed} moves fastest on average?")
    if any(speeds.values()):
        yield from pick(view, "SA", "sa_fastest", texts, speeds)


def _change(view: View, body: int) -> int | None:
    """0 speeds up, 1 slows down, 2 keeps its speed, 3 rests; None if it is none of them all along or clearly."""
    if view.rests(body):
        return 3
    speed_t = np.linalg.norm(view.velocity_bt3[body], axis=1)
    if not view.moves(body) or not _level(view, body):
        return None
    first, middle, last = speed_t[[0, len(speed_t) // 4, -1]].tolist()
    if np.ptp(speed_t) < 1e-6:
        return 2
    if last > MIN_RATIO * first and middle > 1.02 * first:
        return 0
    return 1 if first > MIN_RATIO * last and middle < 0.98 * first else None


def _sa_change(view: View) -> Iterator[Query]:
    options = ("It speeds up", "It slows down", "It keeps a constant speed", UNMOVED)
    for body in view.bodies:
        if (slot := _change(view, body)) is not None:
            texts = ("How does the speed of <obj_1> change over the video?", "What does the speed of <obj_1> do?")
            yield view.query("SA", "sa_change", texts, (body,), options[slot], options=options)


def _sa_acceleration(view: View) -> Iterator[Query]:
    for body in view.bodies:
        if _change(view, body) not in (0, 1):
            continue
        rate = float(np.linalg.norm(view.scene.bodies[body].trajectory.acceleration(view.seconds_t[:1])))
        texts = (
            "How large is the acceleration (or deceleration) of <obj_1> in the first half of the video?",
            "At what rate does the speed of <obj_1> change in the first half of the video?",
        )
        yield view.query("SA", "sa_acceleration", texts, (body,), f"{number(rate)} m/s²", value=(rate,))


# --- Displacement and path length ----------------------------------------------------------------------------------


def _dp_lengths(view: View) -> Iterator[Query]:
    for body in filter(view.moves, view.bodies):
        straight, along = view.facts[body].displacement_metres, view.facts[body].path_length_metres
        if straight > MIN_MOVE_FRACTION * view.length_b[body]:
            texts = (
                "How far is the last position of <obj_1> from its first, in a straight line?",
                "What is the displacement of <obj_1> from the first frame to the last?",
            )
            yield view.query("DP", "dp_displacement", texts, (body,), f"{number(straight)} m", value=(straight,))
        texts = (
            "How long is the path that <obj_1> covers in the course of the video?",
            "What distance does <obj_1> travel along its path during the video?",
        )
        yield view.query("DP", "dp_path", texts, (body,), f"{number(along)} m", value=(along,))


def _dp_farthest(view: View) -> Iterator[Query]:
    moved = {body: view.facts[body].displacement_metres for body in view.bodies}
    texts = ("Which of {listed} ends up farthest from where it started?",)
    if any(moved.values()):
        yield from pick(view, "DP", "dp_farthest", texts, moved)


def _dp_camera(view: View) -> Iterator[Query]:
    ends = view.scene.camera.trajectory.position(view.seconds_t[[0, -1]])
    moved = float(np.linalg.norm(ends[1] - ends[0]))
    if moved > 0:
        texts = (
            "How far does the camera itself move from the first frame to the last, in a straight line?",
            "What is the displacement of the camera over the video?",
        )
        yield view.query("DP", "dp_camera", texts, (), f"{number(moved)} m", value=(moved,))


DYNAMIC_TEMPLATES: tuple[Template, ...] = (
    *(_r_how, _r_degrees, _r_steer),
    *(_c_regions, _c_total, _c_bounces),
    *(_t_world, _t_picture, _t_range),
    *(_fp_direction, _fp_turn, _fp_absent),
    *(_sa_speed, _sa_fastest, _sa_change, _sa_acceleration),
    *(_dp_lengths, _dp_farthest, _dp_camera),
)

PLAIN_DYNAMIC_TEMPLATES: tuple[Template, ...] = (
    *(_r_steer, _c_regions, _c_total),
    *(_t_world, _t_picture, _t_range, _fp_direction),
    *(_sa_speed, _sa_fastest, _sa_change, _dp_lengths, _dp_farthest),
)
"""What is asked about plain worlds, whose balls neither spin nor bounce."""
