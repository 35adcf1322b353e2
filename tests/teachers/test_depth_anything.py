"""Depth Anything with tiny random models: plumbing, not quality."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from p4dprep.errors import RequestError, TeacherError
from p4dprep.registry import build, parse_teacher
from p4dprep.targets import FrameGeometry
from tests.teachers.contract import TeacherContract, make_batch, prepared, textured_clip
from tests.teachers.tiny_models import write_tiny_depth_anything

GEOMETRY = FrameGeometry(num_frames=3, height=60, width=80)


@pytest.fixture(scope="session")
def relative(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_depth_anything(tmp_path_factory.mktemp("depth") / "relative")


@pytest.fixture(scope="session")
def metric(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_depth_anything(tmp_path_factory.mktemp("depth") / "metric", metric=True)


class TestRelative(TeacherContract):
    geometry = GEOMETRY

    @pytest.fixture(scope="class")
    @classmethod
    def weights(cls, relative: Path) -> Path:
        return relative

    @classmethod
    def spec_text(cls, weights: Path | None) -> str:
        return f"depth-anything:{weights}"


class TestMetric(TestRelative):
    @pytest.fixture(scope="class")
    @classmethod
    def weights(cls, metric: Path) -> Path:
        return metric


def test_units_follow_the_model(relative: Path, metric: Path) -> None:
    (disparity,) = build(parse_teacher(f"depth-anything:{relative}")).targets(GEOMETRY)
    (depth,) = build(parse_teacher(f"depth-anything:{metric}")).targets(GEOMETRY)
    assert (disparity.quantity, disparity.units) == ("relative disparity", "1")
    assert (depth.quantity, depth.units) == ("metric depth", "m")


@pytest.mark.parametrize("size", [(60, 80), (224, 224), (37, 53)])
def test_it_gives_what_the_models_own_processor_and_post_processing_give(metric: Path, size: tuple[int, int]) -> None:
    from transformers import AutoImageProcessor, AutoModelForDepthEstimation

    frames = FrameGeometry(num_frames=9, height=size[0], width=size[1])  # more than one forward's worth
    clip = textured_clip(frames, 0)
    processor = AutoImageProcessor.from_pretrained(metric)
    model = AutoModelForDepthEstimation.from_pretrained(metric).eval()
    with torch.no_grad():
        outputs = model(**processor(images=list(clip), return_tensors="pt"))
    expected = processor.post_process_depth_estimation(outputs, target_sizes=[size] * len(clip))
    got = prepared(build(parse_teacher(f"depth-anything:{metric}"))).predict(make_batch({"a": clip})).arrays["depth"][0]
    for frame, raw, reference in zip(got, outputs.predicted_depth, expected, strict=True):
        within = reference["predicted_depth"].clamp(raw.min(), raw.max())  # bicubic overshoot is cut
        np.testing.assert_allclose(frame, within.numpy(), rtol=1e-5)


def test_half_precision_that_overflows_runs_again_in_float32(
    metric: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(metric, tmp_path / "huge"))
    weights = load_file(folder / "model.safetensors")
    weights["neck.convs.0.weight"] *= 1e6  # beyond float16's 65504
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    batch = make_batch({"a": textured_clip(GEOMETRY, 0)})
    full = prepared(build(parse_teacher(f"depth-anything:{folder}"))).predict(batch).arrays["depth"]
    with caplog.at_level(logging.WARNING, "teachers.depth_anything"):
        half = prepared(build(parse_teacher(f"depth-anything:{folder}?dtype=float16"))).predict(batch).arrays["depth"]
    assert "run again in float32" in caplog.text
    np.testing.assert_array_equal(half, full)


def test_half_precision_stays_near_float32_and_is_keyed(metric: Path) -> None:
    batch = make_batch({"a": textured_clip(GEOMETRY, 0)})
    full, half = (
        prepared(build(parse_teacher(f"depth-anything:{metric}?dtype={dtype}"))) for dtype in ("float32", "bfloat16")
    )
    assert full.fingerprint() | {"dtype": "bfloat16"} == half.fingerprint()
    difference = half.predict(batch).arrays["depth"] - full.predict(batch).arrays["depth"]
    assert 0 < np.abs(difference).mean() < 1.0


def _edited(folder: Path, tmp_path: Path, **changes: object) -> Path:
    copy = Path(shutil.copytree(folder, tmp_path / "edited"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changes))
    return copy


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "dpt"}, "is a 'dpt' model"),
        ({"backbone": "org/other"}, "dinov2 backbone_config"),
        ({"backbone_config": {"model_type": "timm_backbone"}}, "dinov2 backbone_config"),
        ({"depth_estimation_type": "guess"}, "unknown depth_estimation_type 'guess'"),
        ({"fusion_hidden_size": 12}, "cannot load"),
    ],
)
def test_a_config_of_another_model_is_refused(
    relative: Path, tmp_path: Path, changes: dict[str, object], reason: str
) -> None:
    folder = _edited(relative, tmp_path, **changes)
    teacher = build(parse_teacher(f"depth-anything:{folder}"))

    def use() -> None:
        teacher.targets(GEOMETRY)
        teacher.setup("cpu")

    with pytest.raises(TeacherError, match=reason):
        use()


def test_missing_weights_are_an_error_not_random_numbers(relative: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(relative, tmp_path / "holes"))
    weights = load_file(folder / "model.safetensors")
    del weights["head.conv3.bias"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(TeacherError, match=r"lacks 1 weights .* head\.conv3\.bias"):
        prepared(build(parse_teacher(f"depth-anything:{folder}")))


def test_a_truncated_weight_file_is_an_error(relative: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(relative, tmp_path / "cut"))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(TeacherError, match="cannot load"):
        prepared(build(parse_teacher(f"depth-anything:{folder}")))


def test_the_attention_is_torchs_own_whatever_the_config_names(relative: Path, tmp_path: Path) -> None:
    from transformers import DepthAnythingForDepthEstimation

    from teachers._hub import load_pretrained

    folder = _edited(relative, tmp_path, attn_implementation="stranger/kernel")
    choice = {"": "eager", "backbone_config": "eager"}
    model = load_pretrained(DepthAnythingForDepthEstimation, folder, "cpu", attention=choice)
    assert model.get_submodule("backbone").config._attn_implementation == "eager"  # the default would be sdpa


def test_without_weights_named_it_says_how() -> None:
    with pytest.raises(RequestError, match=r"depth-anything:ORG/NAME"):
        build(parse_teacher("depth-anything"))
