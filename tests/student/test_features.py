"""Cached vision features stand for frames: same tokens, same numbers, no tower; and what cannot use them is refused."""

import json
import pickle
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from p4dprep.cache import Cache
from p4dprep.errors import FingerprintMismatchError, RequestError
from p4dprep.extract.fingerprint import group_fingerprint
from p4dprep.registry import build, parse_teacher
from p4dprep.targets import FrameBatch, FrameGeometry
from p4dprep.video import Decoder
from student.backbones import Backbone, StudentBatch, StudentSample, load, load_adapter
from student.backbones.cached import vision_features
from student.conversations import Report, read_conversations
from student.data import DataConfig, TrainingData
from student.features import StudentTeacher, check_features
from student.order import SampleKey
from student.samples import VisionFeatures
from tests.cache_builder import SAMPLING, build_cache, commit_clip
from tests.student.test_backbones import TWO_QUESTIONS, lonely_group, pictures, video
from tests.student.tiny_students import SIDE, WRITERS
from tests.teachers.contract import TeacherContract

pytestmark = pytest.mark.usefixtures("one_thread")

WITH_FEATURES = sorted(set(WRITERS) - {"video_llama_3"})
ARRAY = "student_features"
__all__ = ["lonely_group"]  # a fixture that is only named by its arguments


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: write(tmp_path_factory.mktemp(family)) for family, write in WRITERS.items()}


def opened(folder: Path, **settings: Any) -> Backbone:
    student = load(folder, dtype=torch.float32, tpe=True, **settings)
    student.tune("projector", "llm")
    return student


def seen(student: Backbone, samples: list[StudentSample], dtype: str = "float32") -> list[StudentSample]:
    """The same samples, their videos as features, all computed in one batch."""
    shown = [sample for sample in samples if sample.has_video]
    found = iter(vision_features(student, student.encode(shown)).numpy().astype(dtype))
    return [
        replace(sample, frames_thwc=None, features=VisionFeatures(values=next(found), frame_size=(SIDE, SIDE)))
        if sample.has_video
        else sample
        for sample in samples
    ]


def poison_tower(student: Backbone) -> None:
    for name, parameter in student.model.named_parameters():
        if student.adapter.part_of(name) == "vision_tower":
            parameter.data.fill_(torch.nan)


def step(student: Backbone, batch: StudentBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, hidden states of an inner layer, and the projector's gradients of a loss on both."""
    output = student.forward(batch, layer=2)
    assert output.loss_sft is not None
    (output.loss_sft + output.hidden_bsc.square().mean()).backward()
    found = torch.cat([p.grad.flatten() for p in student.projector.parameters() if p.grad is not None])
    student.model.zero_grad()
    assert (found != 0).any()
    return output.logits_bsv.detach(), output.hidden_bsc.detach(), found


def two_videos() -> list[StudentSample]:
    """Of one size and different times."""
    first, second = video(5), video(5, seed=1, conversation=TWO_QUESTIONS)
    assert second.time_seconds is not None
    return [first, replace(second, id="later", time_seconds=3 * second.time_seconds + 61)]


@pytest.mark.parametrize("family", WITH_FEATURES)
class TestEveryFamily:
    @pytest.mark.parametrize("tpe", [True, False])
    def test_a_step_on_features_is_the_step_on_frames_and_never_runs_the_tower(
        self, folders: dict[str, Path], family: str, *, tpe: bool
    ) -> None:
        student = opened(folders[family])
        samples = two_videos()
        expected = student.adapter.encode(samples, tpe=tpe, padding_side="left")
        batch = student.adapter.encode(seen(student, samples), tpe=tpe, padding_side="left")
        wanted = step(student, expected)
        poison_tower(student)
        for ours, theirs in zip(step(student, batch), wanted, strict=True):
            assert torch.equal(ours, theirs)
        assert step(student, expected)[0].isnan().any()  # the poison works

    def test_the_tokens_are_laid_out_as_for_frames(self, folders: dict[str, Path], family: str) -> None:
        student = opened(folders[family])
        samples = two_videos()
        expected = student.encode(samples)
        adapter = pickle.loads(pickle.dumps(student.adapter))  # noqa: S301  (our own, as a DataLoader sends it)
        for _ in range(2):  # the second time from memory
            batch = adapter.encode(seen(student, samples), tpe=True)
            assert torch.equal(batch.labels, expected.labels)
            assert all(torch.equal(value, expected.inputs[name]) for name, value in batch.inputs.items())
            assert {name for name in expected.inputs.keys() - batch.inputs.keys() if "pixel" not in name} == set()
            for ours, theirs in zip(batch.video_tokens, expected.video_tokens, strict=True):
                assert ours is not None
                assert theirs is not None
                assert torch.equal(ours.positions_tyx, theirs.positions_tyx)

    @torch.no_grad()
    def test_pictures_in_the_same_batch_still_go_through_the_tower(self, folders: dict[str, Path], family: str) -> None:
        student = opened(folders[family])
        first, second = two_videos()
        samples = [pictures(SIDE), first, pictures(SIDE, 2 * SIDE), second]
        expected = student.forward(student.encode(samples), layer=3)
        found = student.forward(student.encode(seen(student, samples)), layer=3)
        torch.testing.assert_close(found.logits_bsv, expected.logits_bsv, rtol=1e-5, atol=1e-5)

    @torch.no_grad()
    def test_modules_sharded_by_fsdp_take_features_too(
        self, folders: dict[str, Path], family: str, lonely_group: DeviceMesh
    ) -> None:
        student, sharded = opened(folders[family]), opened(folders[family])
        for module in (*sharded.llm.get_submodule("layers").children(), sharded.projector, sharded.model):
            fully_shard(module, mesh=lonely_group)
        batch = student.encode(seen(student, two_videos()))
        expected = student.forward(batch, layer=3).hidden_bsc
        torch.testing.assert_close(sharded.forward(batch, layer=3).hidden_bsc, expected)

    @torch.no_grad()
    def test_half_precision_features_change_little(self, folders: dict[str, Path], family: str) -> None:
        student = opened(folders[family])
        samples = two_videos()
        expected = student.forward(student.encode(samples), layer=3).hidden_bsc
        found = student.forward(student.encode(seen(student, samples, "float16")), layer=3).hidden_bsc
        assert not torch.equal(found, expected)
        assert (found - expected).norm() < 5e-3 * expected.norm()

    def test_the_declared_shape_is_what_the_tower_gives(self, folders: dict[str, Path], family: str) -> None:
        student = opened(folders[family])
        sizes = student.adapter.feature_shape(5, SIDE, SIDE)
        assert vision_features(student, student.encode(two_videos())).shape[1:] == tuple(sizes.values())


def test_a_family_that_lays_out_tokens_by_content_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(RequestError, match="video_llama_3: which tokens it leaves out depends on what the frames show"):
        load_adapter(folders["video_llama_3"]).feature_shape(4, SIDE, SIDE)
    sample = replace(
        video(4), frames_thwc=None, features=VisionFeatures(values=np.zeros(3, np.float32), frame_size=(SIDE, SIDE))
    )
    with pytest.raises(RequestError, match="cannot stand for frames in the family video_llama_3"):
        load_adapter(folders["video_llama_3"]).encode([sample], tpe=False)


class TestRefusals:
    @pytest.fixture(scope="class")
    @classmethod
    def student(cls, folders: dict[str, Path]) -> Backbone:
        return opened(folders["qwen2_5_vl"])

    def test_frames_and_features_in_one_batch(self, student: Backbone) -> None:
        first, second = two_videos()
        with pytest.raises(RequestError, match="videos with features and with frames"):
            student.encode([*seen(student, [first]), second])

    def test_features_of_another_size(self, student: Backbone) -> None:
        (sample,) = seen(student, [video(4)])
        assert sample.features is not None
        with pytest.raises(RequestError, match=r"features \(128, 32\), this student's are \{'patch': 192.*extract"):
            student.encode([replace(sample, time_seconds=np.arange(6.0))])

    def test_a_tower_that_learns(self, student: Backbone, folders: dict[str, Path]) -> None:
        learning = load(folders["qwen2_5_vl"], dtype=torch.float32)
        batch = student.encode(seen(student, [video(4)]))
        with pytest.raises(RequestError, match="vision tower learns, so its cached features would go stale"):
            learning.forward(batch, layer=1)
        with torch.no_grad():
            learning.forward(batch, layer=1)

    def test_pictures_have_no_features_to_keep(self, student: Backbone) -> None:
        with pytest.raises(RequestError, match="features are those of videos with their frames"):
            vision_features(student, student.encode([pictures(SIDE)]))

    def test_a_sample_shows_one_thing(self, student: Backbone) -> None:
        (sample,) = seen(student, [video(4)])
        with pytest.raises(RequestError, match="frames and its features"):
            replace(sample, frames_thwc=video(4).frames_thwc)
        with pytest.raises(RequestError, match="a video and pictures"):
            replace(sample, images_hwc=pictures(SIDE).images_hwc)
        with pytest.raises(RequestError, match="frames_thwc and time_seconds together, or features"):
            replace(sample, time_seconds=None)

    @pytest.mark.parametrize("changes", [{"flip": True}, {"frame_size": (64, 64)}])
    def test_settings_that_change_the_frames(self, changes: dict[str, Any]) -> None:
        with pytest.raises(RequestError, match="allow no flip and no frame_size"):
            DataConfig(features=ARRAY, **changes)


class TestStudentTeacher(TeacherContract):
    geometry: ClassVar[FrameGeometry] = FrameGeometry(num_frames=4, height=SIDE, width=SIDE)

    @pytest.fixture(scope="class")
    @classmethod
    def weights(cls, folders: dict[str, Path]) -> Path:
        return folders["qwen3_vl"]

    @classmethod
    def spec_text(cls, weights: Path | None) -> str:
        return f"student:{weights}?dtype=float32"

    def test_swapping_weights_of_the_same_size_changes_the_fingerprint(
        self, spec: Any, weights: Path | None, tmp_path: Path
    ) -> None:
        assert weights is not None
        original = build(spec).fingerprint()
        for name, differing in (
            ("model.visual.blocks.1.mlp.linear_fc1.weight", {"tower_sha256"}),
            ("model.visual.merger.linear_fc1.weight", set()),
            ("model.visual.deepstack_merger_list.0.linear_fc1.weight", set()),
            ("model.language_model.layers.2.mlp.up_proj.weight", set()),
        ):
            folder = retouched(weights, tmp_path / name, name)
            swapped = build(parse_teacher(self.spec_text(folder))).fingerprint()
            assert {key for key in original if swapped[key] != original[key]} == differing

    def test_it_loads_the_tower_and_little_of_the_llm(self, spec: Any) -> None:
        teacher = build(spec)
        assert isinstance(teacher, StudentTeacher)
        teacher.setup("cpu")
        assert teacher._student is not None
        assert teacher._student.num_layers == 1

    def test_features_too_large_for_half_precision_are_refused_with_the_way_out(
        self, weights: Path | None, tmp_path: Path
    ) -> None:
        assert weights is not None
        folder = retouched(weights, tmp_path / "large", "model.visual.blocks.1.mlp.linear_fc2.bias", 1e5)
        teacher = build(parse_teacher(f"student:{folder}"))
        teacher.setup("cpu")
        (spec,) = teacher.targets(self.geometry)
        frames = np.zeros((1, 4, SIDE, SIDE, 3), np.uint8)
        batch = FrameBatch(clip_ids=("a",), frames_bthwc=frames, time_seconds_bt=np.arange(4.0)[None])
        with pytest.raises(ValueError, match=r"is not finite .* try \?dtype=float32"):
            spec.check(teacher.predict(batch).arrays["features"][0], "a")


def retouched(weights: Path, folder: Path, name: str, amount: float = 1.0) -> Path:
    """A copy of a student with one weight changed."""
    shutil.copytree(weights, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name] += amount
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_student_must_be_named() -> None:
    with pytest.raises(RequestError, match=r"needs a student: student:ORG/NAME"):
        build(parse_teacher("student"))


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory, folders: dict[str, Path]) -> Path:
    """A folder with a cache of three clips, two of them with features of a tiny Qwen2.5-VL, in float32."""
    folder = tmp_path_factory.mktemp("features")
    cache = build_cache(folder, num_clips=3, num_failed=0)
    teacher = build(parse_teacher(f"student:{folders['qwen2_5_vl']}?dtype=float32"))
    specs = teacher.targets(cache.sampling.geometry())
    group = cache.add_group("student", "student", group_fingerprint("student", teacher, cache.sampling), specs)
    teacher.setup("cpu")
    with Decoder() as decoder:
        for index in range(2):
            clip = decoder.read(folder / f"videos/{index}.mp4", SAMPLING, 0.5 if index else None)
            batch = FrameBatch(
                clip_ids=("x",), frames_bthwc=clip.frames_thwc[None], time_seconds_bt=clip.time_seconds_t[None]
            )
            arrays: dict[str, NDArray[Any]] = {"features": teacher.predict(batch).arrays["features"][0]}
            commit_clip(group, index, clip, arrays)
    return folder


class TestTraining:
    @pytest.fixture
    def student(self, folders: dict[str, Path]) -> Backbone:
        return opened(folders["qwen2_5_vl"])

    @pytest.fixture
    def cache(self, cached: Path) -> Cache:
        return Cache.open(str(cached / "cache"))

    @pytest.fixture
    def talks(self, tmp_path: Path) -> Iterator[Any]:
        def talks(**changes: Any) -> Any:
            turns = [{"from": "human", "value": "<video>\nHow far?"}, {"from": "gpt", "value": "2 m"}]
            record = {"id": "q", "video": "videos/1.mp4", "conversations": turns} | changes
            (tmp_path / "qa.json").write_text(json.dumps([record]))
            return read_conversations([tmp_path / "qa.json"], Report())

        return talks

    def test_a_sample_from_the_cache_gives_the_step_of_its_video_which_is_never_opened(
        self, cache: Cache, student: Backbone, talks: Any, tmp_path: Path
    ) -> None:
        check_features(cache, ARRAY, student)
        outputs = []
        for features in (None, ARRAY):
            config = DataConfig(targets=("l4p_latents",), features=features)
            data = TrainingData(cache, talks(), config, Report())
            item = data[SampleKey(0, 0)]
            assert (item.clip_id, set(item.targets)) == ("clip-1", {"l4p_latents"})
            assert (item.sample.frames_thwc is None) == (features is not None)
            assert (data._open().decoder.pid is None) == (features is not None)
            data.close()
            outputs.append(step(student, student.encode([item.sample])))
        for ours, theirs in zip(*outputs, strict=True):
            assert torch.equal(ours, theirs)

    def test_a_clip_without_features_is_left_out(self, cache: Cache) -> None:
        report = Report(on_problem="leave out")
        data = TrainingData(cache, None, DataConfig(features=ARRAY, targets=("l4p_latents",)), report)
        assert [data[SampleKey(0, row)].clip_id for row in range(len(data))] == ["clip-0", "clip-1"]
        assert report.examples == {"without targets": ["clip clip-2 lacks targets of student"]}

    def test_regions_may_be_told_but_not_drawn(self, cache: Cache, talks: Any) -> None:
        marked = talks(regions=[[0.1, 0.1, 0.5, 0.5]])
        for how in ("marks", "both"):
            with pytest.raises(RequestError, match="1 conversations, such as q, have regions to mark on frames"):
                TrainingData(cache, marked, DataConfig(features=ARRAY, regions=how), Report())  # type: ignore[arg-type]
        data = TrainingData(cache, marked, DataConfig(features=ARRAY, regions="boxes"), Report())
        assert "the box [100, 100, 500, 500]" in data[SampleKey(0, 0)].sample.conversation[0].text

    def test_only_vision_features_stand_for_frames(self, cache: Cache, student: Backbone) -> None:
        for name in ("l4p_latents", "student_latents"):
            with pytest.raises(RequestError, match=f"has no vision features '{name}'; it has {ARRAY}"):
                check_features(cache, name, student)
            with pytest.raises(RequestError, match="has no vision features"):
                TrainingData(cache, None, DataConfig(features=name), Report())

    def test_another_students_features_are_refused_and_a_fine_tuned_one_keeps_its_own(
        self, cache: Cache, student: Backbone, folders: dict[str, Path], tmp_path: Path
    ) -> None:
        tower = "visual.blocks.0.attn.qkv.weight"  # this family's files leave out the first part of the name
        other = opened(retouched(folders["qwen2_5_vl"], tmp_path / "other", tower))
        with pytest.raises(FingerprintMismatchError, match=r"features of another student .* tower_sha256 differ"):
            check_features(cache, ARRAY, other)
        for parameter in (*student.projector.parameters(), *student.llm.parameters()):
            parameter.data.add_(0.1)
        student.model.save_pretrained(tmp_path / "tuned")
        student.processor.save_pretrained(tmp_path / "tuned")
        check_features(cache, ARRAY, opened(tmp_path / "tuned"))

    def test_other_settings_of_the_processor_are_named(
        self, cache: Cache, folders: dict[str, Path], tmp_path: Path
    ) -> None:
        shutil.copytree(folders["qwen2_5_vl"], tmp_path / "student")
        settings = json.loads((tmp_path / "student/processor_config.json").read_text())
        settings["video_processor"]["image_mean"] = [0.0, 0.0, 0.0]
        (tmp_path / "student/processor_config.json").write_text(json.dumps(settings))
        with pytest.raises(FingerprintMismatchError, match="video_processor differ; extract this one's"):
            check_features(cache, ARRAY, opened(tmp_path / "student"))
