"""The request: what is accepted, what is refused and how it is said."""

from typing import Any

import pytest

from p4dprep.errors import RequestError
from p4dprep.extract import parse_config


def request(**changes: Any) -> dict[str, Any]:
    return {"source": "videos", "cache": "cache", "teachers": ("opencv-dis",)} | changes


def test_a_plain_request_samples_sixteen_frames_of_224_pixels() -> None:
    sampling = parse_config(request()).sampling
    assert (sampling.plan, sampling.num_frames, sampling.height, sampling.width) == ("uniform", 16, 224, 224)


@pytest.mark.parametrize(("size", "expected"), [(112, (112, 112)), ("112", (112, 112)), ("90x160", (90, 160))])
def test_size_is_a_side_or_height_by_width(size: object, expected: tuple[int, int]) -> None:
    assert parse_config(request(size=size)).size == expected


def test_windows_without_overlap_are_the_default_of_fps() -> None:
    sampling = parse_config(request(fps=8.0)).sampling
    assert (sampling.plan, sampling.fps, sampling.stride_frames) == ("windows", 8.0, 16)


def test_a_plain_number_of_workers_holds_for_all_teachers() -> None:
    assert parse_config(request(workers="3")).workers == {"all": 3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": 0}, "frames.*greater than or equal to 1"),
        ({"size": "8x8"}, "size.*between 16 and 4096"),
        ({"size": "big"}, "size 'big' is not 224 or HEIGHTxWIDTH"),
        ({"keep_frames": "224x"}, "keep_frames.*size '224x' is not 224 or HEIGHTxWIDTH"),
        ({"keep_frames": 8192}, "keep_frames.*'8192'.*between 16 and 4096"),
        ({"keep_frames": [224, 224, 3]}, "keep_frames.*'224x224x3'"),
        ({"keep_frames": 224.5}, "keep_frames.*'224.5'"),
        ({"coverage": 1.5}, "coverage.*less than or equal to 1"),
        ({"resize": "crop"}, "resize.*squash"),
        ({"limit": 0}, "limit"),
        ({"teacher": "l4p"}, "teacher: Extra inputs.*fields: source, cache, teachers"),
    ],
)
def test_a_wrong_field_is_named_with_its_rule(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        parse_config(request(**changes))


def test_frames_to_keep_are_one_more_producer_and_may_be_the_only_one() -> None:
    assert parse_config(request(keep_frames="336")).producers == ("opencv-dis", "frames:336x336")
    assert parse_config(request(teachers=(), keep_frames=(90, 160))).producers == ("frames:90x160",)
    with pytest.raises(RequestError, match="nothing to extract: name a teacher with --teacher, or keep frames with"):
        _ = parse_config(request(teachers=())).producers


def test_stride_without_fps_is_refused() -> None:
    with pytest.raises(RequestError, match="needs --fps"):
        _ = parse_config(request(stride=4)).sampling


def test_storage_options_do_not_show_in_the_request() -> None:
    config = parse_config(request(storage_options={"secret": "canary-5d1"}))
    assert "canary" not in repr(config)
    with pytest.raises(RequestError) as caught:
        parse_config(request(storage_options={"secret": "canary-5d1"}, frames=-1))
    assert "canary" not in str(caught.value)
