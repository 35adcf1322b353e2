"""Hand-made scenes: a camera at the origin looks along x, so that y is to its left; and what one puts before it."""

import math

import numpy as np

from p4dprep.worlds.questions import Query
from p4dprep.worlds.render import trace
from p4dprep.worlds.scene import Body, Camera, Effects, Light, Part, Scene, Segment, Texture, Trajectory, Vector, still
from p4dprep.worlds.templates import ask
from p4dprep.worlds.tracks import ObjectFacts, object_facts

SECONDS = 2.0
GREY = Texture(pattern="waves", colour=(0.5, 0.5, 0.5), other=(0.4, 0.4, 0.4), scale=1.0)
FRONT: Camera = Camera(
    trajectory=still((0, 0, 1)), pitch=0.0, fov_x=math.radians(90), aspect=4 / 3, kind="stand"
)  # sees y / x in -1..1


def thing(colour: str, *segments: Segment, size: Vector = (0.6, 0.4, 0.5), motion: str = "linear") -> Body:
    part = Part(shape="box", half_size=(size[0] / 2, size[1] / 2, size[2] / 2), texture=GREY)
    return Body(category="crate", colour=colour, parts=(part,), trajectory=Trajectory(segments=segments), motion=motion)


def resting(colour: str, position: Vector, yaw: float = 0.0) -> Body:
    return thing(colour, Segment(start_seconds=0, position=position, yaw=yaw), motion="still")


def moving(colour: str, position: Vector, velocity: Vector, **more: float | Vector) -> Body:
    return thing(colour, Segment(start_seconds=0, position=position, velocity=velocity, **more))


def stage(*bodies: Body, camera: Camera = FRONT) -> Scene:
    return Scene(
        id="test-0-0",
        split="test",
        setting="room",
        layout="by hand",
        bodies=bodies,
        scenery=(),
        lights=(Light(direction=(0, 0, 1)),),
        ambient=0.4,
        sky=((0.5, 0.6, 0.9), (0.8, 0.8, 0.9)),
        far_metres=50,
        camera=camera,
        effects=Effects(),
        frame_seconds=tuple(np.linspace(0, SECONDS, 21).tolist()),
        video_size=(96, 128),
        noise_seed=0,
    )


def facts_of(scene: Scene, num_times: int = 21) -> tuple[ObjectFacts, ...]:
    seconds = np.linspace(scene.frame_seconds[0], scene.frame_seconds[-1], num_times)
    return object_facts(scene, seconds, trace(scene, seconds[:1], 48, 64).instances_thw[0])


def answers(scene: Scene, template: str) -> dict[tuple[int, ...], str]:
    """The true answers of a template by regions."""
    return {query.regions: query.answer for query in queries(scene) if query.template == template}


def queries(scene: Scene) -> tuple[Query, ...]:
    return ask(scene, facts_of(scene))
