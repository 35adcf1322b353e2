"""Samples of a real cache: joined by id and clock, decoded again, with targets and regions; and what is refused."""

import dataclasses
import json
import os
import pickle
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from p4dprep.cache import Cache
from p4dprep.corpus import CORPUS_COLUMNS
from p4dprep.errors import CorruptDataError, RequestError
from p4dprep.video import Decoder
from student import targets as targets_module
from student.conversations import Report, read_conversations
from student.data import DataConfig, TrainingData, TrainingSample, collate, join
from student.order import BatchOrder, RunBatches, SampleKey
from tests import cache_builder
from tests.cache_builder import SAMPLING, SIZE, build_cache

pytestmark = pytest.mark.usefixtures("one_thread")

DEPTH, LATENTS, FLOW = "l4p_depth", "l4p_latents", "opencv_dis_flow"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`cache` of clip-0 to clip-3, of which clip-3 failed, `videos`, and two still images."""
    folder = tmp_path_factory.mktemp("data")
    build_cache(folder, num_clips=4)
    for number in range(2):
        picture = np.full((20, 30, 3), 60 * number, np.uint8)
        Image.fromarray(picture).save(folder / f"still-{number}.png")
    return folder


def turns(question: str = "<video>\nHow far?") -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": "2 m"}]


def talk(name: str, **changes: Any) -> dict[str, Any]:
    return {"id": f"q-{name}", "video": f"videos/{name}.mp4", "conversations": turns()} | changes


class Opened:
    """Training data over a folder; closed after the test."""

    def __init__(self, folder: Path, tmp_path: Path) -> None:
        self.folder, self.tmp_path, self.all = folder, tmp_path, list[TrainingData]()

    def __call__(
        self, records: list[dict[str, Any]] | None = None, report: Report | None = None, **config: Any
    ) -> TrainingData:
        settings = {"targets": (DEPTH, FLOW), "media_folder": str(self.folder)} | config
        report = report or Report()
        talks = None
        if records is not None:
            (self.tmp_path / "qa.json").write_text(json.dumps(records))
            talks = read_conversations([self.tmp_path / "qa.json"], report)
        data = TrainingData(Cache.open(str(self.folder / "cache")), talks, DataConfig(**settings), report)
        self.all.append(data)
        return data

    def close(self) -> None:
        for data in self.all:
            data.close()


@pytest.fixture
def opened(folder: Path, tmp_path: Path) -> Iterator[Opened]:
    opened = Opened(folder, tmp_path)
    yield opened
    opened.close()


def read(data: TrainingData, row: int, epoch: int = 0) -> TrainingSample:
    return data[SampleKey(epoch, row)]


def frames_of(item: TrainingSample) -> np.ndarray[Any, np.dtype[np.uint8]]:
    assert item.sample.frames_thwc is not None
    return item.sample.frames_thwc


class TestSamples:
    def test_frames_are_those_the_teacher_saw_and_targets_are_the_clips(self, folder: Path, opened: Opened) -> None:
        data, cache = opened([talk("1"), talk("0")]), Cache.open(str(folder / "cache"))
        with Decoder() as decoder:
            for row, index in enumerate((1, 0)):
                expected = decoder.read(folder / f"videos/{index}.mp4", SAMPLING, 0.5 if index else None)
                item = read(data, row)
                np.testing.assert_array_equal(frames_of(item), expected.frames_thwc)
                np.testing.assert_array_equal(item.sample.time_seconds, expected.time_seconds_t)
                assert (item.sample.id, item.clip_id) == (f"q-{index}", f"clip-{index}")
                assert [turn.text for turn in item.sample.conversation] == ["How far?", "2 m"]
                assert set(item.targets) == {DEPTH, FLOW}
                for name, values in item.targets.items():
                    np.testing.assert_array_equal(values, cache.read(index, name))

    def test_the_student_may_see_the_same_frames_larger(self, opened: Opened) -> None:
        plain, large = read(opened([talk("1")]), 0), read(opened([talk("1")], frame_size=(64, 48)), 0)
        assert frames_of(large).shape == (4, 64, 48, 3)
        np.testing.assert_array_equal(large.sample.time_seconds, plain.sample.time_seconds)

    def test_without_conversations_every_clip_with_targets_is_a_sample(self, opened: Opened) -> None:
        report = Report(on_problem="leave out")
        data = opened(None, report)
        assert [read(data, row).clip_id for row in range(len(data))] == ["clip-0", "clip-1", "clip-2"]
        assert read(data, 0).sample.conversation == ()
        assert str(report) == (
            "3 samples, 1 left out:\n  1 without targets, such as: clip clip-3 lacks targets of l4p, opencv_dis"
        )

    def test_still_images_have_no_targets(self, opened: Opened) -> None:
        still = {"id": "s", "image": ["still-0.png", "still-1.png"], "conversations": turns("<image>\nRed?")}
        data = opened([talk("0"), still])
        item = read(data, 1)
        assert (item.clip_id, item.targets, item.sample.frames_thwc) == (None, {}, None)
        assert [image.shape for image in item.sample.images_hwc] == [(20, 30, 3)] * 2
        assert item.sample.images_hwc[1].mean() == 60

    def test_identity_survives_shuffled_batches_in_other_processes(self, folder: Path, opened: Opened) -> None:
        data, cache = opened([talk(str(n % 3), id=f"{n}:{n % 3}") for n in range(7)]), Cache.open(str(folder / "cache"))
        seen = []
        for num_workers in (0, 2):
            order = BatchOrder(num_samples=len(data), batch_size=3, seed=1)
            sampler = RunBatches(order, num_steps=order.num_steps, micro_batch_size=3)
            loader = DataLoader(data, batch_sampler=sampler, num_workers=num_workers, collate_fn=collate)
            ids = []
            for samples, targets in loader:
                assert targets.sample_ids == tuple(sample.id for sample in samples)
                ids.append(targets.sample_ids)
                for row, clip in zip(targets.rows, targets.clip_ids, strict=True):
                    assert clip == f"clip-{samples[row].id.split(':')[1]}"
                    expected = torch.from_numpy(cache.read(clip, DEPTH))
                    assert torch.equal(targets.arrays[DEPTH][row], expected)
            seen.append(ids)
        assert seen[0] == seen[1]
        assert {*chain.from_iterable(seen[0])} == {f"{n}:{n % 3}" for n in range(7)}

    def test_a_batch_of_images_and_clips_names_the_rows_with_targets(self, opened: Opened) -> None:
        still = {"id": "s", "image": "still-0.png", "conversations": turns()}
        data = opened([still, talk("0"), talk("2")])
        samples, targets = collate([read(data, row) for row in (2, 0, 1)])
        assert [sample.id for sample in samples] == ["q-2", "s", "q-0"]
        assert (targets.rows, targets.clip_ids) == ((0, 2), ("clip-2", "clip-0"))
        assert targets.arrays[FLOW].shape == (2, 4, SIZE, SIZE, 2)

    def test_it_travels_to_another_process_without_its_decoder(self, opened: Opened) -> None:
        data = opened([talk("0")])
        before = read(data, 0)
        copy = pickle.loads(pickle.dumps(data))  # noqa: S301  (our own, as a DataLoader sends it)
        np.testing.assert_array_equal(frames_of(read(copy, 0)), frames_of(before))
        copy.close()


class TestJoin:
    def test_a_video_may_be_named_by_the_clips_id_or_the_end_of_its_uri(self, opened: Opened) -> None:
        records = [talk("0"), talk("1", video="1.mp4"), talk("2", video="clip-2")]
        data = opened(records, media_folder=None)
        assert [read(data, row).clip_id for row in range(3)] == ["clip-0", "clip-1", "clip-2"]

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"video": "videos/9.mp4"}, "is no clip of the cache"),
            ({"video": "other/0.mp4"}, "is no clip of the cache"),
            ({"video": "os/0.mp4"}, "is no clip of the cache"),  # `videos/0.mp4` ends so, but not in whole parts
            ({"clip": "clip-9"}, "has no such clip in the cache"),
            ({"clip": "clip-1"}, "has no such clip in the cache"),  # a clip of another video
        ],
    )
    def test_a_conversation_without_its_clip_stops_the_run_or_is_left_out(
        self, opened: Opened, changes: dict[str, Any], reason: str
    ) -> None:
        records = [talk("1"), talk("0", **changes)]
        with pytest.raises(RequestError, match=f"conversation q-0: video .* {reason}"):
            opened(records)
        report = Report(on_problem="leave out")
        data = opened(records, report)
        assert (len(data), dict(report.counts)) == (1, {reason: 1})
        assert read(data, 0).clip_id == "clip-1"

    def test_of_several_clips_of_one_video_one_must_be_named(self, tmp_path: Path) -> None:
        build_cache(tmp_path, num_clips=2, num_failed=0, name="one.mp4")
        opened = Opened(tmp_path, tmp_path)
        with pytest.raises(RequestError, match="fits several clips; name one in `clip`"):
            opened([talk("one")])
        data = opened([talk("one", clip="clip-1"), talk("one", clip="clip-0")])
        assert data.clip_of_row.tolist() == [1, 0]

    def test_of_equally_named_videos_the_one_in_the_media_folder_is_meant(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
        table = Cache.create(str(tmp_path / "cache"), SAMPLING, clips_per_unit=2)
        rows = [{"id": name, "uri": str(tmp_path / name / "x.mp4")} for name in ("a", "b")]
        table.extend(pa.Table.from_pylist(rows, schema=CORPUS_COLUMNS))
        (tmp_path / "qa.json").write_text(json.dumps([talk("x", video="x.mp4")]))
        talks = read_conversations([tmp_path / "qa.json"], Report())
        assert join(talks, table.clips(), str(tmp_path / "b"), Report()).tolist() == [1]

    def test_a_clip_that_failed_stops_the_run_or_is_left_out(self, opened: Opened) -> None:
        records = [talk("3"), talk("2")]
        with pytest.raises(RequestError, match="clip clip-3 lacks targets of l4p, opencv_dis; mend it, or ask"):
            opened(records)
        data = opened(records, Report(on_problem="leave out"))
        assert read(data, 0).clip_id == "clip-2"
        with pytest.raises(RequestError, match="nothing is left to train on; 0 samples, 1 left out"):
            opened(records[:1], Report(on_problem="leave out"))


class TestClock:
    @pytest.fixture
    def shifted(self, tmp_path: Path) -> Path:
        """A cache whose clip-1 is, by now, another video: of other frame times."""
        build_cache(tmp_path, num_clips=3, num_failed=0)
        cache_builder.write_video(tmp_path / "videos" / "1.mp4", seed=1, num_frames=9)
        return tmp_path

    def test_other_frame_times_stop_the_run(self, shifted: Path) -> None:
        data = Opened(shifted, shifted)([talk(str(n)) for n in range(3)])
        assert read(data, 0).clip_id == "clip-0"
        with pytest.raises(RequestError, match=r"clip clip-1: frame 1 of .*1\.mp4 is at .* s, the teacher saw it at"):
            read(data, 1)
        data.close()

    def test_or_the_next_sample_takes_its_place_always_the_same(
        self, shifted: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        data = Opened(shifted, shifted)([talk(str(n)) for n in range(3)], Report(on_problem="leave out"))
        assert [read(data, row).clip_id for row in (0, 1, 2)] == ["clip-0", "clip-2", "clip-2"]
        assert "left out: clip clip-1: frame 1 of" in caplog.text
        os.unlink(shifted / "videos" / "2.mp4")
        assert read(data, 1).clip_id == "clip-0"
        os.unlink(shifted / "videos" / "0.mp4")
        with pytest.raises(RequestError, match="none of 3 samples in a row can be read"):
            read(data, 1)
        data.close()

    def test_a_damaged_cache_always_stops(self, tmp_path: Path) -> None:
        cache = build_cache(tmp_path, num_clips=2, num_failed=0)
        os.unlink(
            tmp_path
            / "cache"
            / next(item.key for item in cache.group("l4p").states().objects(0) if item.array == DEPTH)
        )
        data = Opened(tmp_path, tmp_path)([talk("0"), talk("1")], Report(on_problem="leave out"))
        with pytest.raises(CorruptDataError, match=DEPTH):
            read(data, 0)
        data.close()


class TestMedia:
    def test_no_link_leads_out_of_the_media_folder(self, folder: Path, tmp_path: Path, opened: Opened) -> None:
        media = tmp_path / "media"
        (media / "videos").mkdir(parents=True)
        (media / "videos" / "0.mp4").symlink_to(folder / "videos" / "0.mp4")
        data = opened([talk("0")], media_folder=str(media))
        with pytest.raises(RequestError, match="leaves the media folder"):
            read(data, 0)

    def test_a_lost_video_and_a_bad_image_stop_the_run(self, folder: Path, tmp_path: Path, opened: Opened) -> None:
        (tmp_path / "bad.png").write_bytes(b"\x89PNG nonsense")
        stills = [{"image": name, "conversations": turns()} for name in ("bad.png", "none.png")]
        data = opened([talk("0"), *stills], media_folder=str(tmp_path))
        with pytest.raises(RequestError, match=r"clip clip-0: .*mend it, or ask for such samples to be left out"):
            read(data, 0)
        with pytest.raises(RequestError, match=r"sample qa-2: .*bad\.png is no image that can be read"):
            read(data, 1)
        with pytest.raises(RequestError, match=r"none\.png is no image that can be read"):
            read(data, 2)
        with pytest.raises(RequestError, match=r"image none\.png needs a media folder"):
            read(opened([{"image": "none.png", "conversations": turns()}], media_folder=None), 0)


class TestSeveralConversations:
    """Of clip-0 five, one of them with regions; of clip-1 one; and one of a still image."""

    def data(self, opened: Opened, **config: Any) -> TrainingData:
        def asked(name: str, clip: int, **more: Any) -> dict[str, Any]:
            return talk(str(clip), id=name, conversations=turns(f"<video>\nWhat of {name}?")) | more

        still = {"id": "still", "image": "still-0.png", "conversations": turns("<image>\nWhat of still?")}
        first = [asked(f"q{number}", 0) for number in range(4)]
        regions = asked("r", 0, regions=TestRegions.BOXES[:1], conversations=turns("<video>\nWhat of <obj_1>?"))
        return opened([*first, asked("other", 1), still, regions], targets=(DEPTH,), **config)

    @staticmethod
    def asked_of(data: TrainingData) -> list[list[str]]:
        samples = [read(data, row).sample for row in range(len(data))]
        return [[talk[0].text for talk in (sample.conversation, *sample.others)] for sample in samples]

    def test_none_is_lost_and_only_those_of_one_clip_are_together(self, opened: Opened) -> None:
        found = self.asked_of(self.data(opened, conversations_per_sample=3, regions="marks"))
        assert sorted(len(texts) for texts in found) == [1, 1, 1, 1, 3]
        assert sorted(text.removeprefix("What of ") for texts in found for text in texts)[:5] == [
            "<obj_1> is mark 1 in the first frame.\nWhat of <obj_1>?", "other?", "q0?", "q1?", "q2?",
        ]  # fmt: skip
        (together,) = (texts for texts in found if len(texts) == 3)
        assert set(together) < {f"What of q{number}?" for number in range(4)}

    def test_regions_told_in_words_are_no_reason_to_stay_alone(self, opened: Opened) -> None:
        found = self.asked_of(self.data(opened, conversations_per_sample=5, regions="boxes"))
        assert sorted(map(len, found)) == [1, 1, 5]
        assert any(text.startswith("<obj_1> is the box [250,") for text in max(found, key=len))

    def test_a_seed_decides_who_is_together(self, opened: Opened) -> None:
        first, again, *others = (
            self.asked_of(self.data(opened, conversations_per_sample=2, seed=seed)) for seed in (0, 0, 1, 2, 3)
        )
        assert first == again
        assert any(other != first for other in others)

    def test_the_targets_are_those_of_their_clip(self, opened: Opened) -> None:
        data = self.data(opened, conversations_per_sample=4)
        alone = self.data(opened)
        for row in range(len(data)):
            item = read(data, row)
            (same,) = (
                other
                for other in (read(alone, number) for number in range(len(alone)))
                if other.sample.id == item.sample.id
            )
            assert item.clip_id == same.clip_id
            for name, values in item.targets.items():
                np.testing.assert_array_equal(values, same.targets[name])


class TestRegions:
    BOXES = ((0.25, 0.25, 0.75, 0.75), (0.25, 0.25, 0.5, 0.5))

    def ask(self, opened: Opened, how: str) -> tuple[TrainingSample, TrainingSample]:
        question = talk("0", conversations=turns("<video>\nIs <obj_1> nearer than <obj_2>?"))
        plain = read(opened([question], targets=()), 0)
        return plain, read(opened([question | {"regions": self.BOXES}], targets=(), regions=how), 0)

    def test_boxes_are_told_in_thousandths(self, opened: Opened) -> None:
        plain, told = self.ask(opened, "boxes")
        np.testing.assert_array_equal(frames_of(told), frames_of(plain))
        assert told.sample.conversation[0].text == (
            "<obj_1> is the box [250, 250, 750, 750] in the first frame. "
            "<obj_2> is the box [250, 250, 500, 500] in the first frame. "
            "Boxes are [left, top, right, bottom] in thousandths of width and height.\n"
            "Is <obj_1> nearer than <obj_2>?"
        )

    def test_marks_are_drawn_on_the_first_frame_only(self, opened: Opened) -> None:
        plain, told = self.ask(opened, "marks")
        np.testing.assert_array_equal(frames_of(told)[1:], frames_of(plain)[1:])
        changed = (frames_of(told)[0] != frames_of(plain)[0]).any(axis=-1)
        assert changed[8:24, 23:26].any()  # the right edge of the first box
        assert told.sample.conversation[0].text.startswith(
            "<obj_1> is mark 1 in the first frame. <obj_2> is mark 2 in the first frame.\nIs <obj_1>"
        )

    def test_both_say_both(self, opened: Opened) -> None:
        plain, told = self.ask(opened, "both")
        assert (frames_of(told)[0] != frames_of(plain)[0]).any()
        assert "<obj_2> is mark 2, the box [250, 250, 500, 500] in the first frame." in told.sample.conversation[0].text

    def test_still_images_are_marked_too(self, opened: Opened) -> None:
        still = {"image": "still-1.png", "conversations": turns(), "regions": [[0.2, 0.2, 0.8, 0.8]]}
        item = read(opened([still], regions="marks"), 0)
        assert (item.sample.images_hwc[0] != 60).any()

    def test_a_region_hidden_by_others_is_refused(self, opened: Opened) -> None:
        twice = talk("0", regions=[[0.2, 0.2, 0.8, 0.8]] * 2)
        with pytest.raises(RequestError, match="cannot be marked in 32 x 32 pixels: instance 1 is not in the picture"):
            read(opened([twice]), 0)


class TestFlip:
    @pytest.fixture
    def flippable(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Opened:
        """A cache whose flow and latents may be flipped."""
        specs = {
            kind: tuple(
                dataclasses.replace(spec, transforms=("flip_x",)) if spec.name in ("flow", "latents") else spec
                for spec in targets
            )
            for kind, targets in cache_builder.TARGETS.items()
        }
        monkeypatch.setattr(cache_builder, "TARGETS", specs)
        build_cache(tmp_path, num_clips=2, num_failed=0)
        return Opened(tmp_path, tmp_path)

    def test_frames_and_targets_are_mirrored_together_and_anew_each_epoch(self, flippable: Opened) -> None:
        names = (FLOW, LATENTS)
        plain, flipped = flippable(None, targets=names), flippable(None, targets=names, flip=True)
        before, seen = read(plain, 0), set()
        for epoch in range(12):
            item = read(flipped, 0, epoch)
            is_flipped = not np.array_equal(frames_of(item), frames_of(before))
            seen.add(is_flipped)
            expected = before.targets
            if is_flipped:
                np.testing.assert_array_equal(frames_of(item), frames_of(before)[:, :, ::-1])
                specs = {name: plain.targets[name].spec for name in names}
                expected = {name: targets_module.flip_x(before.targets[name], specs[name]) for name in names}
            for name in names:
                np.testing.assert_array_equal(item.targets[name], expected[name])
            np.testing.assert_array_equal(frames_of(read(flipped, 0, epoch)), frames_of(item))
        assert seen == {True, False}
        for data in (plain, flipped):
            data.close()

    def test_samples_with_text_are_never_mirrored(self, flippable: Opened) -> None:
        told = flippable([talk("0")], targets=(FLOW,), flip=True)
        expected = frames_of(read(flippable([talk("0")], targets=(FLOW,)), 0))
        for epoch in range(8):
            np.testing.assert_array_equal(frames_of(read(told, 0, epoch)), expected)
        for data in flippable.all:
            data.close()

    def test_a_target_that_cannot_follow_refuses(self, opened: Opened) -> None:
        with pytest.raises(RequestError, match=r"target depth .* does not allow flip_x"):
            opened([talk("0")], flip=True)


def test_wrong_settings_are_refused(opened: Opened) -> None:
    with pytest.raises(RequestError, match="has no target 'l4p_deep'; it has"):
        opened([talk("0")], targets=("l4p_deep",))
    with pytest.raises(RequestError, match="stands twice"):
        DataConfig(targets=(DEPTH, DEPTH))
    with pytest.raises(RequestError, match=r"on_problem is 'ignore'; it must be"):
        Report(on_problem="ignore")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=r"regions must be one of .*not 'colours'"):
        DataConfig(regions="colours")  # type: ignore[arg-type]
