"""Samples and video tokens refuse what the rest of training relies on not meeting."""

from typing import Any

import numpy as np
import pytest
import torch

from p4dprep.errors import RequestError
from student.samples import StudentSample, Turn, VideoTokens

FRAMES = np.zeros((3, 4, 5, 3), np.uint8)
SECONDS = np.array([0.0, 0.5, 0.5])
ASK, ANSWER = Turn(role="user", text="?"), Turn(role="assistant", text="!")


def test_a_short_clip_may_repeat_frames_and_their_times() -> None:
    sample = StudentSample(id="a", frames_thwc=FRAMES, time_seconds=SECONDS, conversation=(ASK, ANSWER))
    assert repr(sample) == "StudentSample('a', video (3, 4, 5, 3), 2 turns)"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "neither a conversation nor anything shown"),
        ({"frames_thwc": FRAMES}, "needs frames_thwc and time_seconds together"),
        ({"frames_thwc": FRAMES, "time_seconds": SECONDS[:2]}, r"times \(2,\) for frames \(3, 4, 5, 3\)"),
        ({"frames_thwc": FRAMES, "time_seconds": -SECONDS}, "times that decrease"),
        ({"frames_thwc": FRAMES, "time_seconds": SECONDS * np.nan}, "times that decrease"),
        ({"frames_thwc": FRAMES.astype(float), "time_seconds": SECONDS}, r"shows float64 of shape \(4, 5, 3\)"),
        ({"frames_thwc": FRAMES, "time_seconds": SECONDS, "images_hwc": (FRAMES[0],)}, "a video and pictures"),
        ({"images_hwc": (FRAMES[0, 0],)}, r"shows uint8 of shape \(5, 3\)"),
        ({"conversation": (ANSWER, ASK)}, "must take turns, the user first"),
    ],
)
def test_a_wrong_sample_is_refused_by_its_id(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=f"sample 'a'.*{message}"):
        StudentSample(id="a", **fields)


def test_a_turn_has_a_known_role_and_an_answer_says_something() -> None:
    with pytest.raises(RequestError, match="role 'gpt' is neither"):
        Turn(role="gpt", text="x")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="an assistant's turn is empty"):
        Turn(role="assistant", text=" ")


def test_every_frame_of_a_video_has_one_step() -> None:
    positions = torch.arange(2 * 3).reshape(2, 3, 1)
    tokens = VideoTokens(positions_tyx=positions, frame_spans=((0, 1), (1, 4)))
    assert tokens.num_frames == 4
    assert tokens.mean_by_step(torch.tensor([1.0, 2.0, 3.0, 7.0])).tolist() == [1.0, 4.0]
    assert torch.equal(tokens.shifted(5).positions_tyx, positions + 5)
    for spans in (((0, 1), (2, 4)), ((0, 2), (1, 4)), ((0, 1), (1, 1)), ((1, 2), (2, 4))):
        with pytest.raises(RequestError, match="do not cover every frame exactly once"):
            VideoTokens(positions_tyx=positions, frame_spans=spans)
    with pytest.raises(RequestError, match=r"1 spans do not fit \(2, 3, 1\) tokens"):
        VideoTokens(positions_tyx=positions, frame_spans=((0, 4),))
