"""What a teacher may declare and return."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from p4dprep.errors import RequestError, TeacherOutputError
from p4dprep.targets import RGB_DIMS, FrameBatch, Predictions, Resources, TargetSpec, check_predictions

SHAPE = (3, 4, 5)
FRAMES = {"quantity": "rgb frames", "dtype": "uint8", "dims": RGB_DIMS, "shape": (*SHAPE, 3)}


def depth_spec(**changes: Any) -> TargetSpec:
    fields = {"name": "depth", "dims": ("t", "y", "x"), "shape": SHAPE, "dtype": "float32", "units": "m"}
    return TargetSpec(**fields | {"quantity": "metric depth"} | changes)


def flow_spec() -> TargetSpec:
    return depth_spec(
        name="flow",
        dims=("t", "y", "x", "uv"),
        shape=(*SHAPE, 2),
        units="px",
        quantity="backward flow",
        invalid_frames="first",
    )


def ramp(shape: tuple[int, ...] = SHAPE) -> NDArray[np.float32]:
    return (1 + np.arange(np.prod(shape), dtype=np.float32)).reshape(shape)


def batch(*clip_ids: str) -> FrameBatch:
    return FrameBatch(
        clip_ids=clip_ids,
        frames_bthwc=np.zeros((len(clip_ids), *SHAPE, 3), np.uint8),
        time_seconds_bt=np.zeros((len(clip_ids), SHAPE[0])),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "Depth"}, "lower-case identifier"),
        ({"shape": (3, 4)}, "do not fit shape"),
        ({"dims": ("t", "y", "y")}, "do not fit shape"),
        ({"quantity": "depth"}, "unknown quantity"),
        ({"dims": ("y", "t", "x"), "invalid_frames": "first"}, "needs `t` as the first dim"),
        ({"quantity": "rgb frames"}, "rgb frames are uint8 of .* with three colours, not float32"),
        ({**FRAMES, "dtype": "float32"}, "rgb frames are uint8"),
        ({**FRAMES, "shape": (*SHAPE, 4)}, "three colours, not uint8 of .*, 4"),
    ],
)
def test_a_declaration_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        depth_spec(**changes)


def spoiled(value: float) -> NDArray[np.float32]:
    depth = ramp()
    depth[1, 2, 3] = value
    return depth


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (ramp((3, 4, 4)), r"clip a has shape \(3, 4, 4\)"),
        (ramp().astype(np.float64), "dtype float64"),
        (spoiled(np.nan), "not finite in 1.67%"),
        (spoiled(np.inf), "not finite"),
        (spoiled(0), "must be positive"),
        (np.full(SHAPE, 2, np.float32), "is 2.0 everywhere"),
    ],
)
def test_an_output_that_the_declaration_forbids_is_refused(values: NDArray[Any], message: str) -> None:
    with pytest.raises(TeacherOutputError, match=message):
        depth_spec().check(values, "a")


def test_the_frame_without_flow_must_be_nan_and_no_other() -> None:
    flow = ramp((*SHAPE, 2))
    with pytest.raises(TeacherOutputError, match="has values in its first frame"):
        flow_spec().check(flow, "a")
    flow[0] = np.nan
    flow_spec().check(flow, "a")
    flow[2, 0, 0, 0] = np.nan
    with pytest.raises(TeacherOutputError, match="not finite"):
        flow_spec().check(flow, "a")


def test_a_still_clip_may_have_no_flow_and_no_motion() -> None:
    flow = np.zeros((*SHAPE, 2), np.float32)
    flow[0] = np.nan
    flow_spec().check(flow, "a")
    depth_spec(name="motion", quantity="motion mask", dtype="bool", units="1").check(np.zeros(SHAPE, bool), "a")


def test_single_values_may_be_absent_where_declared_but_not_all_and_never_infinite() -> None:
    sky = depth_spec(may_be_invalid=True)
    sky.check(spoiled(np.nan), "a")
    for values, message in (
        (spoiled(np.inf), "not finite"),
        (spoiled(-1), "must be positive"),
        (np.full(SHAPE, np.nan, np.float32), "nothing but NaN"),
    ):
        with pytest.raises(TeacherOutputError, match=message):
            sky.check(values, "a")


def test_ids_masks_and_a_standing_camera_may_be_constant() -> None:
    for quantity, dtype in (("instance ids", "uint8"), ("visibility mask", "bool"), ("camera pose", "float32")):
        depth_spec(quantity=quantity, dtype=dtype, units="1").check(np.ones(SHAPE, dtype), "a")


def test_the_attributes_of_a_declaration_without_new_fields_are_what_they_were() -> None:
    first = {"name", "dims", "shape", "dtype", "units", "quantity", "transforms", "invalid_frames", "description"}
    assert set(depth_spec().to_attributes()) == first
    assert depth_spec(may_be_invalid=True).to_attributes()["may_be_invalid"] is True


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        (Predictions(clip_ids=("b", "a"), arrays={"depth": ramp((2, *SHAPE))}), "of clips"),
        (Predictions(clip_ids=("a", "b"), arrays={"deep": ramp((2, *SHAPE))}), "it declares"),
        (Predictions(clip_ids=("a", "b"), arrays={"depth": ramp((1, *SHAPE))}), "1 rows for 2 clips"),
    ],
)
def test_predictions_of_other_clips_or_targets_are_refused(predictions: Predictions, message: str) -> None:
    with pytest.raises(TeacherOutputError, match=message):
        check_predictions(predictions, batch("a", "b"), (depth_spec(),))


def test_a_batch_keeps_ids_and_arrays_together() -> None:
    with pytest.raises(ValueError, match="are not uint8"):
        FrameBatch(clip_ids=("a",), frames_bthwc=batch("a", "b").frames_bthwc, time_seconds_bt=np.zeros((1, 3)))
    assert batch("a", "b").select(1).clip_ids == ("b",)


def test_a_worker_takes_a_gpu_only_where_there_is_one() -> None:
    undecided = Resources()
    assert (undecided.on(0).num_gpus, undecided.on(4).num_gpus) == (0, 1)
    assert Resources(num_gpus=0).on(4).num_gpus == 0
    assert Resources(num_gpus=0.25).on(0).num_gpus == 0.25
    with pytest.raises(RequestError, match="batch_size must be at least 1"):
        Resources(batch_size=0)
