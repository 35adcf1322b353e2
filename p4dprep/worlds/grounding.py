"""What is where in the pictures: conversations that a student made from nothing learns before depth and motion.

Plain worlds only. They ask about single frames, in two dimensions, and how to point at an option; nothing in them tells
depth, motion or time.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from p4dprep.worlds.questions import ANSWER_BY_LETTER, LETTERS, LlavaRecord, Question, listed, scene_rng
from p4dprep.worlds.scene import Floats, Scene
from p4dprep.worlds.tracks import in_view, picture_place

_CELLS = 10
_MOMENTS = ("first", "middle", "last")
_NUM_READ = 2
"""Questions of a scene whose options are read out."""

Pair = tuple[str, str]
"""A question and its answer."""


def describe_pictures(scene: Scene, seconds: Floats) -> tuple[Pair, ...]:
    """Questions about what the first, the middle and the last frame show, and where; the same for the same scene.

    Args:
        scene: a plain world.
        seconds: of its frames, growing (t,).
    """
    rng = scene_rng(f"{scene.id} pictures")
    moments = rng.permutation(len(_MOMENTS))
    return tuple(pair for number in moments for pair in _of_frame(scene, seconds, int(number), rng))


def _of_frame(scene: Scene, seconds: Floats, number: int, rng: np.random.Generator) -> Iterator[Pair]:
    places = _places(scene, float(seconds[(len(seconds) - 1) * number // 2]))
    when = f"the {_MOMENTS[number]} frame"
    in_order = [name for name, _ in sorted(places.items(), key=lambda item: item[1])]
    yield f"What does {when} show, from left to right?", ", ".join(in_order) or "nothing"
    if in_order:
        for name in rng.permutation(in_order)[:2]:
            column, row = (min(int(place * _CELLS), _CELLS - 1) for place in places[name])
            yield f"Where in {when} is the {name}?", f"column {column}, row {row}"
    if len(in_order) > 2:
        yield _farthest(in_order, when, rng)


def _places(scene: Scene, second: float) -> dict[str, tuple[float, float]]:
    """Name to place in the picture, 0-1 from left and top, of all whose centre is in view, hidden or not."""
    at, camera = np.array([second]), scene.camera
    pose, places = camera.world_to_camera(at), {}
    for body in scene.bodies:
        centre = body.trajectory.position(at)
        if in_view(camera, pose, centre)[0]:
            x, y = picture_place(camera, pose, centre)[0].tolist()
            places[f"{body.colour} object"] = (x, y)
    return places


def _farthest(in_order: Sequence[str], when: str, rng: np.random.Generator) -> Pair:
    side = int(rng.integers(2))
    options = [in_order[number] for number in rng.permutation(len(in_order))]
    right = LETTERS[options.index(in_order[-side])]
    return _with_options(f"Which is farthest to the {('left', 'right')[side]} in {when}?", options), right


def _with_options(text: str, options: Sequence[str]) -> str:
    return f"{text}\n\nOptions:\n{listed(options)}\n\n{ANSWER_BY_LETTER}"


def to_grounding(
    scene_id: str, video: str, pairs: Sequence[Pair], questions: Sequence[Question]
) -> tuple[LlavaRecord, ...]:
    """Conversations about a scene's pictures, and about options of its questions as words, whatever the truth.

    Args:
        scene_id: of a plain world.
        video: its path.
        pairs: see `describe_pictures`.
        questions: of this scene.
    """
    rng = scene_rng(f"{scene_id} options")
    asked = [*pairs, *(_reading(question.named(), rng) for question in questions[:_NUM_READ])]
    return tuple(
        LlavaRecord(
            id=f"{scene_id}-picture{number}",
            conversations=[{"from": "human", "value": f"<video>\n{text}"}, {"from": "gpt", "value": answer}],
            video=video,
        )
        for number, (text, answer) in enumerate(asked)
    )


def is_of_first_frame(record: LlavaRecord) -> bool:
    """Whether a conversation of `to_grounding` can be had about the first frame alone."""
    text = record["conversations"][0]["value"]
    return not any(f"the {moment} frame" in text for moment in _MOMENTS[1:])


def _reading(question: Question, rng: np.random.Generator) -> Pair:
    """Which letter stands before some words; any of the options, so nothing is said of the scene."""
    number = int(rng.integers(len(question.options)))
    return _with_options(f"Which option reads: {question.options[number]}?", question.options), LETTERS[number]
