"""VideoMAE and V-JEPA 2 with tiny random models: plumbing, not quality."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from p4dprep.errors import RequestError, TeacherError
from p4dprep.registry import build, parse_teacher
from p4dprep.targets import FrameGeometry
from tests.teachers.contract import TeacherContract, make_batch, prepared, textured_clip
from tests.teachers.tiny_models import TINY_FRAMES, TINY_SIDE, write_tiny_videomae, write_tiny_vjepa2

GEOMETRY = FrameGeometry(num_frames=TINY_FRAMES, height=TINY_SIDE, width=TINY_SIDE)


@pytest.fixture(scope="session")
def videomae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_videomae(tmp_path_factory.mktemp("encoders") / "videomae")


@pytest.fixture(scope="session")
def vjepa2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_vjepa2(tmp_path_factory.mktemp("encoders") / "vjepa2")


class TestVideoMAE(TeacherContract):
    geometry = GEOMETRY

    @pytest.fixture(scope="class")
    @classmethod
    def weights(cls, videomae: Path) -> Path:
        return videomae

    @classmethod
    def spec_text(cls, weights: Path | None) -> str:
        return f"videomae:{weights}"


class TestVJEPA2(TeacherContract):
    geometry = GEOMETRY

    @pytest.fixture(scope="class")
    @classmethod
    def weights(cls, vjepa2: Path) -> Path:
        return vjepa2

    @classmethod
    def spec_text(cls, weights: Path | None) -> str:
        return f"vjepa2:{weights}?layers=0,2"


def _block_outputs(blocks: Any, run: Any) -> list[torch.Tensor]:
    """Input of the first block, then each block's output, caught by hooks: independent of hidden_states."""
    caught: list[torch.Tensor] = []
    hooks = [blocks[0].register_forward_pre_hook(lambda module, args: caught.append(args[0]))]
    hooks += [
        block.register_forward_hook(
            lambda module, args, output: caught.append(output if isinstance(output, torch.Tensor) else output[0])
        )
        for block in blocks
    ]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return caught


@pytest.mark.parametrize("kind", ["videomae", "vjepa2"])
def test_layer_i_is_the_output_of_block_i_on_pixels_of_the_models_own_processor(
    kind: str, videomae: Path, vjepa2: Path
) -> None:
    from transformers import VideoMAEImageProcessor, VideoMAEModel, VJEPA2Model, VJEPA2VideoProcessor

    clip = textured_clip(GEOMETRY, 0)
    if kind == "videomae":
        folder, model = videomae, VideoMAEModel.from_pretrained(videomae).eval()
        processor = VideoMAEImageProcessor.from_pretrained(videomae)
        pixels = processor(list(clip), do_resize=False, do_center_crop=False, return_tensors="pt")["pixel_values"]
        caught = _block_outputs(model.encoder.layer, lambda: model(pixels.reshape(1, *pixels.shape[-4:])))
    else:
        folder, model = vjepa2, VJEPA2Model.from_pretrained(vjepa2).eval()
        processor = VJEPA2VideoProcessor.from_pretrained(vjepa2)
        tchw = torch.from_numpy(clip).permute(0, 3, 1, 2)
        pixels = processor([tchw], do_resize=False, do_center_crop=False, return_tensors="pt")["pixel_values_videos"]
        caught = _block_outputs(model.encoder.layer, lambda: model(pixels, skip_predictor=True))
    layers = ",".join(map(str, range(len(caught))))
    teacher = prepared(build(parse_teacher(f"{kind}:{folder}?layers={layers}")))
    latents = teacher.predict(make_batch({"a": clip})).arrays["latents"][0]
    for got, expected in zip(latents, caught, strict=True):
        np.testing.assert_allclose(got.reshape(expected.shape[1:]), expected[0].numpy(), atol=2e-5)


def test_a_token_sits_where_its_pixels_are(videomae: Path) -> None:
    teacher = prepared(build(parse_teacher(f"videomae:{videomae}?layers=0")))
    plain = np.full((TINY_FRAMES, TINY_SIDE, TINY_SIDE, 3), 90, np.uint8)
    dotted = plain.copy()
    dotted[2, 17, 30] = 255  # frame 2 is in tube 1; with patches of 8, row 17 is token 2 and column 30 token 3
    latents = teacher.predict(make_batch({"plain": plain, "dotted": dotted})).arrays["latents"][:, 0]
    changed = np.argwhere(np.abs(latents[0] - latents[1]).max(axis=-1) > 1e-6)
    np.testing.assert_array_equal(changed, [[1, 2, 3]])


def test_the_default_layers_are_evenly_spaced_and_end_with_the_last(videomae: Path, vjepa2: Path) -> None:
    assert build(parse_teacher(f"videomae:{videomae}")).resolved_spec()[1] == {"layers": "1,2,3"}
    assert build(parse_teacher(f"vjepa2:{vjepa2}")).resolved_spec()[1] == {"layers": "1,2"}


@pytest.mark.parametrize("layers", ["4", "2,1", "1,1", "-1", "last"])
def test_layers_the_model_lacks_are_refused(videomae: Path, layers: str) -> None:
    with pytest.raises(RequestError, match="layers="):
        build(parse_teacher(f"videomae:{videomae}?layers={layers}")).targets(GEOMETRY)


def test_other_layers_are_another_fingerprint(videomae: Path) -> None:
    first, second = (build(parse_teacher(f"videomae:{videomae}?layers={n}")).fingerprint() for n in (1, 2))
    assert {key for key in first if first[key] != second[key]} == {"layers"}


@pytest.mark.parametrize(("num_frames", "side"), [(TINY_FRAMES + 2, TINY_SIDE), (TINY_FRAMES, 2 * TINY_SIDE)])
def test_frames_that_do_not_fit_say_what_to_ask_for(videomae: Path, vjepa2: Path, num_frames: int, side: int) -> None:
    frames = FrameGeometry(num_frames=num_frames, height=side, width=side)
    for text in (f"videomae:{videomae}", f"vjepa2:{vjepa2}"):
        with pytest.raises(RequestError, match="use --frames 4 --size 32"):
            build(parse_teacher(text)).targets(frames)


def test_vjepa2_takes_fewer_frames_than_it_was_trained_on(vjepa2: Path) -> None:
    frames = FrameGeometry(num_frames=2, height=TINY_SIDE, width=TINY_SIDE)
    teacher = prepared(build(parse_teacher(f"vjepa2:{vjepa2}")))
    latents = teacher.predict(make_batch({"a": textured_clip(frames, 0)})).arrays["latents"]
    assert latents.shape[1:] == teacher.targets(frames)[0].shape


def test_weights_of_the_other_encoder_are_refused(vjepa2: Path) -> None:
    with pytest.raises(TeacherError, match=r"is a 'vjepa2' model; teacher 'videomae' needs 'videomae'"):
        build(parse_teacher(f"videomae:{vjepa2}")).targets(GEOMETRY)
