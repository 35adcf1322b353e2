"""`l4p:mini`, the trained teacher that ships with the package: the contract, and that its weights do see."""

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from p4dprep.registry import build, parse_teacher
from p4dprep.targets import FrameBatch, FrameGeometry, Predictions
from p4dprep.worlds.generate import make_scene
from p4dprep.worlds.truth import Truth, film
from teachers.l4p import MINI_FOLDER
from teachers.l4p._samples import sampled_seconds
from tests.teachers.contract import TeacherContract, prepared

GEOMETRY = FrameGeometry(num_frames=16, height=96, width=96)
NUM_SCENES = 4


class TestContract(TeacherContract):
    geometry = GEOMETRY
    tolerance = 1e-4

    @classmethod
    def spec_text(cls, weights: Path | None) -> str:
        return "l4p:mini"


def test_it_is_named_the_same_on_every_machine() -> None:
    teacher = build(parse_teacher("l4p:mini"))
    assert teacher.resolved_spec() == ("mini", {"dtype": "float32"})
    assert teacher.fingerprint()["weights"] == "mini"


def test_it_is_small_and_ships_with_its_card() -> None:
    weights = MINI_FOLDER / "model.safetensors"
    assert weights.stat().st_size <= 12e6
    with safe_open(weights, framework="np") as file:
        sizes = [np.prod(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118
    assert sum(sizes) <= 6e6
    assert "AbsRel" in (MINI_FOLDER / "README.md").read_text()


@pytest.fixture(scope="module")
def seen() -> tuple[Predictions, list[Truth]]:
    """What it says of test worlds, and what is true of them."""
    scenes = [make_scene("test", 100, index) for index in range(NUM_SCENES)]
    seconds = [sampled_seconds(scene, 16) for scene in scenes]
    films = [film(scene, times, 96, 96, visibility=False) for scene, times in zip(scenes, seconds, strict=True)]
    batch = FrameBatch(
        clip_ids=tuple(scene.id for scene in scenes),
        frames_bthwc=np.stack([frames for frames, _ in films]),
        time_seconds_bt=np.stack(seconds),
    )
    return prepared(build(parse_teacher("l4p:mini"))).predict(batch), [truth for _, truth in films]


def test_its_depth_is_nearer_to_the_truth_than_any_constant(seen: tuple[Predictions, list[Truth]]) -> None:
    predictions, truths = seen
    ours = theirs = 0.0
    for depth, truth in zip(predictions.arrays["depth"], truths, strict=True):
        true = np.log(truth.depth_thw)
        ours += float(np.nanmean(np.abs(np.log(np.asarray(depth, float)) - true)))
        theirs += float(np.nanmean(np.abs(true - np.nanmedian(true))))  # the best constant of this very clip
    assert ours < theirs / 1.5


def test_its_flow_is_nearer_to_the_truth_than_none(seen: tuple[Predictions, list[Truth]]) -> None:
    predictions, truths = seen
    ours = theirs = 0.0
    for flow, truth in zip(predictions.arrays["flow"], truths, strict=True):
        ours += float(np.nanmean(np.linalg.norm(np.asarray(flow, float)[1:] - truth.flow_thw2[1:], axis=-1)))
        theirs += float(np.nanmean(np.linalg.norm(truth.flow_thw2[1:], axis=-1)))
    assert ours < 0.9 * theirs


def test_its_rays_turn_with_the_camera(seen: tuple[Predictions, list[Truth]]) -> None:
    """Nearer than the very rays of the true first camera, which is what a camera that stands would give."""
    predictions, truths = seen
    ours = theirs = 0.0
    for rays, truth in zip(predictions.arrays["camray"], truths, strict=True):
        true = truth.camray_tyx6[..., :3].astype(float)
        ours += _mean_degrees(np.asarray(rays, float)[..., :3], true)
        theirs += _mean_degrees(np.broadcast_to(true[:1], true.shape), true)
    assert ours < theirs


def _mean_degrees(directions: np.ndarray, unit_directions: np.ndarray) -> float:
    cosine = (directions * unit_directions).sum(-1) / np.linalg.norm(directions, axis=-1)
    return float(np.degrees(np.arccos(np.clip(cosine, -1, 1))).mean())
