"""What every teacher must do. A teacher's tests subclass `TeacherContract` and say how to write its `--teacher`."""

import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from p4dprep.errors import RequestError, TeacherError
from p4dprep.registry import TeacherSpec, build, parse_teacher
from p4dprep.targets import FrameBatch, FrameGeometry, Teacher, TeacherInfo, check_predictions


def textured_clip(frames: FrameGeometry, seed: int, shift_xy: tuple[int, int] = (3, 1)) -> NDArray[np.uint8]:
    """A smooth random texture that moves by whole pixels a frame, (t, h, w, 3)."""
    dx, dy = shift_xy
    reach_x, reach_y = abs(dx) * frames.num_frames, abs(dy) * frames.num_frames
    size = (frames.height + 2 * reach_y, frames.width + 2 * reach_x, 3)
    noise = np.random.default_rng(seed).integers(0, 256, size).astype(np.float32)
    scene = cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 2), None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)
    corners = [(reach_y - dy * n, reach_x - dx * n) for n in range(frames.num_frames)]
    return np.stack([scene[y : y + frames.height, x : x + frames.width] for y, x in corners])


def make_batch(clips: dict[str, NDArray[np.uint8]]) -> FrameBatch:
    """Clips by id, at 10 frames a second."""
    frames_bthwc = np.stack(list(clips.values()))
    times = np.tile(np.arange(frames_bthwc.shape[1]) / 10, (len(clips), 1))
    return FrameBatch(clip_ids=tuple(clips), frames_bthwc=frames_bthwc, time_seconds_bt=times)


def prepared(teacher: Teacher) -> Teacher:
    teacher.setup("cpu")
    return teacher


class TeacherContract(ABC):
    """Subclass as `class TestX(TeacherContract)`; give `geometry`, `spec_text`, and `weights` if there are any.

    `tolerance` bounds how far a clip's row may move when other clips share its batch, relative to the row's largest
    value: matrix products of other shapes round differently.
    """

    geometry: ClassVar[FrameGeometry]
    tolerance: ClassVar[float] = 1e-5

    @pytest.fixture(scope="class")
    @classmethod
    def weights(cls) -> Path | None:
        """The file or folder of weights, made once a class; None if the teacher has none."""
        return None

    @classmethod
    @abstractmethod
    def spec_text(cls, weights: Path | None) -> str:
        """The `--teacher` that names these weights."""

    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls, weights: Path | None) -> TeacherSpec:
        return parse_teacher(cls.spec_text(weights))

    @pytest.fixture(scope="class")
    @classmethod
    def teacher(cls, spec: TeacherSpec) -> Iterator[Teacher]:
        teacher = prepared(build(spec))
        yield teacher
        teacher.close()

    @pytest.fixture(scope="class")
    @classmethod
    def clips(cls) -> dict[str, NDArray[np.uint8]]:
        return {name: textured_clip(cls.geometry, seed) for seed, name in enumerate(("ada", "bob", "cyd"))}

    def test_describes_itself(self, spec: TeacherSpec) -> None:
        info = build(spec).info
        assert isinstance(info, TeacherInfo)
        assert all((info.summary, info.licence, info.downloads))

    def test_declares_targets_before_setup(self, spec: TeacherSpec) -> None:
        specs = build(spec).targets(self.geometry)
        assert specs
        assert len({target.name for target in specs}) == len(specs)

    def test_fingerprint_is_flat_text_and_the_same_for_two_instances(self, spec: TeacherSpec) -> None:
        first, second = build(spec).fingerprint(), build(spec).fingerprint()
        assert first == second
        assert {"code"} < first.keys()
        assert all(isinstance(value, str) and value for value in first.values())

    def test_resolved_spec_names_the_same_teacher(self, spec: TeacherSpec) -> None:
        argument, options = build(spec).resolved_spec()
        again = build(TeacherSpec(name=spec.name, kind=spec.kind, argument=argument, options=options))
        assert again.fingerprint() == build(spec).fingerprint()
        assert again.resolved_spec() == (argument, options)

    def test_swapping_weights_of_the_same_size_changes_the_fingerprint(
        self, spec: TeacherSpec, weights: Path | None, tmp_path: Path
    ) -> None:
        if weights is None:
            pytest.skip("this teacher has no weights")
        copy = tmp_path / weights.name
        shutil.copytree(weights, copy) if weights.is_dir() else shutil.copy(weights, copy)
        assert build(parse_teacher(self.spec_text(copy))).fingerprint() == build(spec).fingerprint()
        file = max(copy.rglob("*.safetensors"), key=lambda path: path.stat().st_size) if copy.is_dir() else copy
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        swapped, original = build(parse_teacher(self.spec_text(copy))).fingerprint(), build(spec).fingerprint()
        assert {key for key in original if swapped[key] != original[key]} == {"weights_sha256"}

    def test_predictions_are_what_it_declares(self, teacher: Teacher, clips: dict[str, NDArray[np.uint8]]) -> None:
        batch, specs = make_batch(clips), teacher.targets(self.geometry)
        predictions = teacher.predict(batch)
        check_predictions(predictions, batch, specs)
        for target in specs:
            for clip_id, row in zip(batch.clip_ids, predictions.arrays[target.name], strict=True):
                target.check(row, clip_id)

    def test_a_clip_gets_its_own_row_in_whatever_batch(
        self, teacher: Teacher, clips: dict[str, NDArray[np.uint8]]
    ) -> None:
        first, second, third = clips
        shuffled = teacher.predict(make_batch({name: clips[name] for name in (third, first, second)}))
        for position, name in enumerate(shuffled.clip_ids):
            single = teacher.predict(make_batch({name: clips[name]}))
            assert single.clip_ids == (name,)
            for target, rows in shuffled.arrays.items():
                expected = np.asarray(single.arrays[target][0], np.float64)
                bound = self.tolerance * max(np.nanmax(np.abs(expected)), 1e-12)
                np.testing.assert_allclose(np.asarray(rows[position], np.float64), expected, rtol=0, atol=bound)
                other = np.asarray(rows[position - 1], np.float64)
                assert np.nanmax(np.abs(other - expected)) > bound

    def test_an_unknown_option_is_refused(self, spec: TeacherSpec) -> None:
        wrong = TeacherSpec(name="x", kind=spec.kind, argument=spec.argument, options={"nonsense": "1"})
        with pytest.raises(RequestError, match=r"no option 'nonsense'"):
            build(wrong)

    def test_predict_needs_setup_and_ends_with_close(
        self, spec: TeacherSpec, clips: dict[str, NDArray[np.uint8]]
    ) -> None:
        teacher, batch = build(spec), make_batch(clips)
        with pytest.raises(TeacherError, match="setup"):
            teacher.predict(batch)
        prepared(teacher).close()
        with pytest.raises(TeacherError, match="setup"):
            teacher.predict(batch)
