"""Time cues: what each changes in a sample, and what it leaves alone."""

import re
from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
from numpy.typing import NDArray

from p4dprep.errors import RequestError
from student.cues import TimeCue, cued
from student.samples import StudentSample, Turn, VisionFeatures

SECONDS = np.array([0.0, 1.25, 12.5])
CUES: tuple[TimeCue, ...] = get_args(TimeCue)
ASKED = (Turn(role="user", text="How fast is it?"), Turn(role="assistant", text="3 m/s"))


def video(side: int = 96, *, conversation: tuple[Turn, ...] = ASKED, value: int = 128) -> StudentSample:
    frames = np.full((len(SECONDS), side, side, 3), value, np.uint8)
    return StudentSample(id="clip", frames_thwc=frames, time_seconds=SECONDS, conversation=conversation)


def frames_of(sample: StudentSample) -> NDArray[np.uint8]:
    assert sample.frames_thwc is not None
    return sample.frames_thwc


@pytest.mark.parametrize("cue", ["none", "tpe"])
def test_no_cue_and_tpe_leave_the_sample_as_it_is(cue: TimeCue) -> None:
    sample = video()
    assert cued(sample, cue) is sample


@pytest.mark.parametrize("cue", CUES)
def test_what_has_no_video_has_no_times_to_tell(cue: TimeCue) -> None:
    words = StudentSample(id="words", conversation=ASKED)
    picture = StudentSample(id="picture", images_hwc=(np.zeros((96, 96, 3), np.uint8),), conversation=ASKED)
    assert cued(words, cue) is words
    assert cued(picture, cue) is picture


class TestMarks:
    @pytest.mark.parametrize(("side", "largest"), [(64, 0.7), (96, 0.45), (448, 0.2)])
    @pytest.mark.parametrize("value", [0, 128, 255])
    def test_each_frame_shows_its_time_small_in_the_upper_left_corner(
        self, side: int, largest: float, value: int
    ) -> None:
        sample = video(side, value=value)
        marked = cued(sample, "marks")
        for before, after in zip(frames_of(sample), frames_of(marked), strict=True):
            rows, columns = (before != after).any(-1).nonzero()
            assert rows.max() < 0.3 * side
            assert columns.max() < largest * side
            label = after[: rows.max() + 1, : columns.max() + 1].astype(int)
            assert label.max() > 200  # ink
            assert label.min() < 20  # paper
        assert not frames_of(sample).std()  # the sample itself is not painted on
        assert marked.conversation == sample.conversation

    @pytest.mark.parametrize("side", [96, 448])
    def test_another_time_looks_otherwise_and_the_same_time_the_same(self, side: int) -> None:
        times = np.array([0.0, 0.01, 1.0, 10.0, 10.0])
        frames = np.full((5, side, side, 3), 90, np.uint8)
        shown = frames_of(cued(StudentSample(id="c", frames_thwc=frames, time_seconds=times), "marks"))
        assert [bool((one != other).any()) for one, other in pairwise(shown)] == [True, True, True, False]

    def test_the_digits_are_those_of_the_frames_time(self) -> None:
        """Glyph by glyph: the mark of 1.11 s has the same narrow digit three times, that of 0.80 s none of them."""
        sample = StudentSample(
            id="c", frames_thwc=np.zeros((2, 448, 448, 3), np.uint8), time_seconds=np.array([0.8, 1.11])
        )
        widths = [_glyphs(frame) for frame in frames_of(cued(sample, "marks"))]
        assert [len(each) for each in widths] == [5, 5]  # d . d d s
        ones = {widths[1][place] for place in (0, 2, 3)}
        assert len(ones) == 1
        assert ones.isdisjoint(widths[0][place] for place in (0, 2, 3))

    def test_frames_too_small_for_a_mark_are_refused(self) -> None:
        with pytest.raises(RequestError, match=r"sample 'clip': frames of 24 x 24 pixels are too small for time marks"):
            cued(video(24), "marks")

    def test_cached_features_are_refused(self) -> None:
        features = VisionFeatures(values=np.zeros((3, 4), np.float32), frame_size=(96, 96))
        sample = StudentSample(id="clip", features=features, time_seconds=SECONDS, conversation=ASKED)
        with pytest.raises(RequestError, match="sample 'clip' has cached features, which show no marks"):
            cued(sample, "marks")


def _glyphs(frame_hwc: NDArray[np.uint8]) -> list[int]:
    """Widths of the runs of columns that hold ink."""
    inked = (frame_hwc.max(-1) > 100).any(0)
    return [len(run) for run in re.findall("1+", "".join("01"[int(each)] for each in inked))]


class TestPrompt:
    def test_every_frames_time_stands_before_the_users_first_words(self) -> None:
        more = (*ASKED, Turn(role="user", text="And then?"), Turn(role="assistant", text="It stops"))
        sample = video(conversation=more)
        told = cued(sample, "prompt")
        line = "The video's 3 frames were taken at 0.00, 1.25, 12.50 seconds."
        assert told.conversation == (Turn(role="user", text=f"{line}\nHow fast is it?"), *more[1:])
        assert told.frames_thwc is sample.frames_thwc

    def test_one_frame_is_told_in_the_singular_and_no_words_leave_no_empty_line(self) -> None:
        frames, turns = np.zeros((1, 8, 8, 3), np.uint8), (Turn(role="user", text=""), ASKED[1])
        sample = StudentSample(id="c", frames_thwc=frames, time_seconds=np.array([2.0]), conversation=turns)
        assert cued(sample, "prompt").conversation[0].text == "The video's only frame was taken at 2.00 seconds."

    def test_cached_features_are_told_too(self) -> None:
        features = VisionFeatures(values=np.zeros((3, 4), np.float32), frame_size=(96, 96))
        sample = StudentSample(id="clip", features=features, time_seconds=SECONDS, conversation=ASKED)
        assert "1.25" in cued(sample, "prompt").conversation[0].text

    def test_distillation_alone_has_no_words_to_put_it_before(self) -> None:
        sample = video(conversation=())
        assert cued(sample, "prompt") is sample
