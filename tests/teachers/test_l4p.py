"""L4P on tiny random weights: the model, its windows, the import of original checkpoints, the teacher.

Agreement with the original's numbers was measured outside the repository; docs/l4p.md has the table.
"""

import contextlib
import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from p4dprep import heads
from p4dprep.errors import RequestError, TeacherError
from p4dprep.targets import FrameBatch, FrameGeometry, Predictions, check_predictions
from teachers.l4p import L4P, L4PConfig, L4POutput, L4PTeacher, import_checkpoint, run_windows
from teachers.l4p.windows import align_inverse_depth, align_rays
from tests.teachers.contract import TeacherContract

TINY = L4PConfig(
    image_size=28, patch_size=7, hidden_size=16, num_layers=5, num_heads=2, mlp_size=24, taps=(1, 2, 3, 4),
    tap_channels=(4, 5, 6, 7), fusion_channels=6, hidden_channels=3, camray_grid=(16, 4, 4),
)  # fmt: skip


def tiny_model(config: L4PConfig = TINY) -> L4P:
    torch.manual_seed(0)
    model = L4P(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def random_pixels(num_frames: int = 16, batch: int = 2, side: int = 28) -> Tensor:
    return torch.randn(batch, 3, num_frames, side, side, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("l4p")
    tiny_model().save_pretrained(path)
    return path


class TestModel:
    def test_it_returns_four_taps_and_a_map_per_modality(self) -> None:
        output = tiny_model()(random_pixels())
        assert [tuple(tap.shape) for tap in output.taps] == [(2, 8 * 4 * 4, 16)] * 4
        shapes = {name: tuple(values.shape) for name, values in output.maps.items()}
        assert shapes == {
            "depth": (2, 1, 16, 28, 28),
            "flow": (2, 2, 16, 28, 28),
            "motion": (2, 1, 16, 28, 28),
            "camray": (2, 6, 16, 4, 4),
        }
        assert (output.maps["depth"] > 0).all()

    def test_the_full_size_has_the_papers_1337_million_parameters_and_grids(self) -> None:
        with torch.device("meta"):
            model = L4P(L4PConfig())
        assert sum(parameter.numel() for parameter in model.parameters()) == 1_337_298_314
        assert model.config.token_grid == (8, 16, 16)
        assert model.config.head("depth").tap_grids == ((16, 64, 64), (16, 32, 32), (8, 16, 16), (4, 8, 8))
        assert model.config.head("camray").tap_grids == ((16, 16, 16), (16, 16, 16), (8, 16, 16), (4, 8, 8))

    def test_tap_i_is_the_output_of_block_i(self) -> None:
        model = tiny_model()
        seen: list[Tensor] = []
        for block in model.encoder.encoder.layer:
            block.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
        taps = model(random_pixels()).taps
        assert all(torch.equal(tap, output) for tap, output in zip(taps, seen, strict=True)), "or block 5 was run too"

    def test_a_tap_at_the_last_block_is_the_encoders_normed_output(self) -> None:
        config = L4PConfig(**{**vars(TINY), "taps": (0, 2, 3, 5)})
        model, pixels = tiny_model(config), random_pixels()
        taps = model(pixels).taps
        assert torch.equal(taps[3], model.encoder(pixels.transpose(1, 2)).last_hidden_state)
        assert torch.equal(taps[0], model.encoder.embeddings(pixels.transpose(1, 2), None))

    def test_positions_are_videomaes_own_table(self) -> None:
        from transformers import VideoMAEConfig, VideoMAEModel

        config = VideoMAEConfig(
            image_size=28, patch_size=7, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
        )
        theirs = VideoMAEModel(config).embeddings.position_embeddings
        assert torch.equal(tiny_model().encoder.embeddings.position_embeddings, theirs)

    def test_tokens_run_over_time_then_rows_then_columns(self) -> None:
        model, pixels = tiny_model(L4PConfig(**{**vars(TINY), "taps": (0, 1, 2, 3)})), random_pixels(batch=1)
        changed = pixels.clone()
        changed[:, :, 6:8, 7:14, 21:28] += 1  # step 3, row 1, column 3
        difference = (model(changed).taps[0] - model(pixels).taps[0]).abs().sum(-1)[0]
        assert difference.nonzero().tolist() == [[3 * 16 + 1 * 4 + 3]]

    def test_saving_and_loading_keeps_every_bit(self, folder: Path) -> None:
        loaded, pixels = L4P.from_pretrained(folder), random_pixels()
        expected, output = tiny_model()(pixels), loaded(pixels)
        assert not loaded.training
        assert loaded.config == TINY
        assert all(torch.equal(a, b) for a, b in zip(expected.taps, output.taps, strict=True))
        assert all(torch.equal(expected.maps[name], output.maps[name]) for name in expected.maps)

    def test_pixels_that_are_not_one_window_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"\(2, 3, 24, 28, 28\) are not one window, \(b, 3, 16, 28, 28\)"):
            tiny_model()(random_pixels(24))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"num_heads": 3}, "num_heads must divide"),
            ({"image_size": 30}, "must divide image_size"),
            ({"num_frames": 6}, "multiple of 4"),
            ({"taps": (1, 3, 2, 4)}, "must rise within 0..5"),
            ({"taps": (1, 2, 3, 6)}, "must rise within 0..5"),
            ({"camray_grid": (8, 4, 4)}, "must have 16 frames"),
        ],
    )
    def test_a_config_that_cannot_work_is_refused(self, change: dict[str, object], message: str) -> None:
        with pytest.raises(RequestError, match=message):
            L4PConfig(**{**vars(TINY), **change})  # type: ignore[arg-type]

    def test_foreign_and_damaged_folders_are_refused(self, folder: Path, tmp_path: Path) -> None:
        with pytest.raises(TeacherError, match=r"cannot read config\.json"):
            L4P.from_pretrained(tmp_path)
        (tmp_path / "config.json").write_text('{"model_type": "videomae", "hidden_size": 16}')
        with pytest.raises(TeacherError, match="not the config of an L4P"):
            L4P.from_pretrained(tmp_path)
        (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
        tensors = load_file(folder / "model.safetensors")
        del tensors["encoder.layernorm.weight"]
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(TeacherError, match=r"Missing key.*encoder\.layernorm\.weight"):
            L4P.from_pretrained(tmp_path)
        (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9])
        with pytest.raises(TeacherError, match="missing or damaged"):
            L4P.from_pretrained(tmp_path)


def window_maker() -> tuple[Callable[[Tensor], L4POutput], list[list[int]]]:
    """A model whose every value says frame and window: 100 * (frame of the clip) + (number of the window)."""
    calls: list[list[int]] = []

    def model(pixels: Tensor) -> L4POutput:
        frames = pixels[0, 0, :, 0, 0]
        calls.append([int(frame) for frame in frames])
        values = 100 * frames + len(calls) - 1
        dense = values[None, None, :, None, None].expand(1, 1, 16, 28, 28)
        tokens = values[::2].repeat_interleave(16)[None, :, None].expand(1, 128, 16)
        rays = dense[..., :4, :4].expand(1, 6, 16, 4, 4)
        return L4POutput((tokens,) * 4, {"depth": dense + 1, "flow": dense, "motion": dense, "camray": rays})

    return model, calls


def clip_that_tells_frames(num_frames: int) -> Tensor:
    return torch.arange(float(num_frames))[None, None, :, None, None].expand(1, 3, num_frames, 28, 28)


class TestWindows:
    def test_a_later_window_overwrites_and_flow_keeps_the_earlier_value_of_its_first_frame(self) -> None:
        model, calls = window_maker()
        output = run_windows(model, clip_that_tells_frames(32), TINY)
        assert calls == [list(range(16)), list(range(8, 24)), list(range(16, 32))]
        windows = [0] * 8 + [1] * 8 + [2] * 16
        assert output.maps["motion"][0, 0, :, 0, 0].tolist() == [100 * t + w for t, w in enumerate(windows)]
        windows[8], windows[16] = 0, 1
        assert output.maps["flow"][0, 0, :, 0, 0].tolist() == [100 * t + w for t, w in enumerate(windows)]

    def test_taps_are_overwritten_by_token_steps(self) -> None:
        output = run_windows(window_maker()[0], clip_that_tells_frames(24), TINY)
        steps = output.taps[2].reshape(1, 12, 16, 16)
        assert steps[0, :, 0, 0].tolist() == [200 * step + (step >= 4) for step in range(12)]
        assert torch.equal(steps, steps[..., :1, :1].expand_as(steps))

    def test_one_window_is_left_as_it_is(self) -> None:
        model, pixels = tiny_model(), random_pixels()
        output, expected = run_windows(model, pixels, TINY), model(pixels)
        assert torch.equal(output.maps["depth"], expected.maps["depth"])
        assert torch.equal(output.maps["camray"], expected.maps["camray"])

    def test_depth_and_rays_are_aligned_before_they_overwrite(self) -> None:
        model, pixels = tiny_model(), random_pixels(24)
        first, second = model(pixels[:, :, :16]), model(pixels[:, :, 8:])
        merged = run_windows(model, pixels, TINY).maps
        assert torch.equal(merged["depth"][:, :, :8], first.maps["depth"][:, :, :8])
        depth = align_inverse_depth(second.maps["depth"], first.maps["depth"][:, :, 8:])
        assert torch.equal(merged["depth"][:, :, 8:], depth)
        assert not torch.allclose(depth, second.maps["depth"])
        rays = align_rays(second.maps["camray"], first.maps["camray"][:, :, 8:])
        assert torch.equal(merged["camray"][:, :, 8:], rays)

    @pytest.mark.parametrize("num_frames", [1, 8, 15, 17, 20, 28])
    def test_a_number_of_frames_that_windows_cannot_tile_is_refused(self, num_frames: int) -> None:
        with pytest.raises(RequestError, match=rf"cannot take {num_frames} frames.*16, 24, 32"):
            run_windows(window_maker()[0], clip_that_tells_frames(num_frames), TINY)


class TestDepthAlignment:
    def test_a_scaled_and_shifted_inverse_depth_is_undone_exactly_per_clip(self) -> None:
        torch.manual_seed(0)
        truth = torch.rand(2, 1, 16, 6, 6) * 9 + 1
        scale, shift = torch.tensor([0.5, 3.0]), torch.tensor([0.2, -0.01])
        window = 1 / (scale[:, None, None, None, None] / truth + shift[:, None, None, None, None])
        torch.testing.assert_close(align_inverse_depth(window, truth[:, :, :8]), truth, rtol=1e-5, atol=0)

    def test_on_noise_it_is_numpys_least_squares(self) -> None:
        torch.manual_seed(1)
        window, reference = torch.rand(1, 1, 16, 5, 5) * 5 + 1, torch.rand(1, 1, 8, 5, 5) * 5 + 1
        inverse = 1 / window.double().numpy()
        design = np.stack([inverse[:, :, :8].ravel(), np.ones(8 * 25)], axis=1)
        (scale, shift), *_ = np.linalg.lstsq(design, 1 / reference.double().numpy().ravel(), rcond=None)
        expected = 1 / (scale * inverse + shift)
        assert expected.min() > 0
        np.testing.assert_allclose(align_inverse_depth(window, reference).numpy(), expected, rtol=1e-5)

    def test_what_the_fit_pushes_past_infinity_is_held_at_a_hundred_times_the_farthest_depth(self) -> None:
        window = torch.full((1, 1, 16, 1, 2), 2.0)
        window[..., 1] = 4.0
        window[:, :, 15] = 50.0
        reference = 1 / (1 / window[:, :, :8] - 0.1)  # a shift that frame 15's inverse depth of 0.02 cannot bear
        aligned = align_inverse_depth(window, reference)
        torch.testing.assert_close(aligned[:, :, :8], reference)
        torch.testing.assert_close(aligned[:, :, 15], torch.full((1, 1, 1, 2), 100 * float(reference.max())))

    def test_a_flat_window_is_only_shifted(self) -> None:
        aligned = align_inverse_depth(torch.full((1, 1, 16, 2, 2), 2.0), torch.full((1, 1, 8, 2, 2), 4.0))
        torch.testing.assert_close(aligned, torch.full((1, 1, 16, 2, 2), 4.0))


def random_rays(num_frames: int = 16) -> Tensor:
    torch.manual_seed(2)
    directions = torch.nn.functional.normalize(torch.randn(1, 3, num_frames, 4, 4, dtype=torch.float64), dim=1)
    centres = torch.randn(1, 3, num_frames, 1, 1, dtype=torch.float64).expand_as(directions)
    return torch.cat([directions, torch.linalg.cross(centres, directions, dim=1)], dim=1)


def moved(rays: Tensor, rotation: Tensor, scale: float, shift: Tensor) -> Tensor:
    directions = torch.einsum("ij,bjtyx->bityx", rotation, rays[:, :3])
    moments = scale * torch.einsum("ij,bjtyx->bityx", rotation, rays[:, 3:])
    shifts = shift[None, :, None, None, None].expand_as(directions)
    return torch.cat([directions, moments + torch.linalg.cross(shifts, directions, dim=1)], dim=1)


class TestRayAlignment:
    def test_a_rigid_motion_and_scale_between_windows_is_undone_exactly(self) -> None:
        clip = random_rays()
        angle = torch.tensor(0.7, dtype=torch.float64)
        rotation = torch.tensor(
            [[angle.cos(), -angle.sin(), 0], [angle.sin(), angle.cos(), 0], [0, 0, 1]], dtype=torch.float64
        )
        window = moved(clip, rotation, 2.5, torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64))
        torch.testing.assert_close(align_rays(window, clip[:, :, :8]), clip)

    def test_a_camera_that_only_turns_keeps_its_scale(self) -> None:
        clip = random_rays()
        clip[:, 3:, :8] = 0  # all rays of the overlap pass through the origin: nothing tells the scale
        torch.testing.assert_close(align_rays(clip, clip[:, :, :8]), clip)

    def test_it_turns_and_never_mirrors(self) -> None:
        clip = random_rays()
        mirrored = clip.clone()
        mirrored[:, 0] *= -1
        aligned = align_rays(mirrored, clip[:, :, :8])
        before = torch.linalg.det(mirrored[0, :3, 0, 0, :3])
        assert torch.linalg.det(aligned[0, :3, 0, 0, :3]) == pytest.approx(float(before))


WIDTHS = (4, 5, 6, 7)
ENCODER = "l4p_model.video_encoder."
TASK_HEADS = {"depth": 1, "flow_2d_backward": 2, "dyn_mask": 1, "camray": 6}


def original_shapes() -> dict[str, tuple[int, ...]]:
    """The layout of an original checkpoint, written down from a listing of one, at TINY's sizes."""
    shapes: dict[str, tuple[int, ...]] = {
        f"{ENCODER}patch_embed.proj.weight": (16, 3, 2, 7, 7),
        f"{ENCODER}patch_embed.proj.bias": (16,),
        f"{ENCODER}norm.weight": (16,),
        f"{ENCODER}norm.bias": (16,),
        "l4p_model.task_heads.track_2d.prompt_encoder.not_a_point_embed.weight": (1, 8),
    }
    block = {
        "norm1.weight": (16,), "norm1.bias": (16,), "attn.q_bias": (16,), "attn.v_bias": (16,),
        "attn.qkv.weight": (48, 16), "attn.proj.weight": (16, 16), "attn.proj.bias": (16,), "norm2.weight": (16,),
        "norm2.bias": (16,), "mlp.fc1.weight": (24, 16), "mlp.fc1.bias": (24,), "mlp.fc2.weight": (16, 24),
        "mlp.fc2.bias": (16,),
    }  # fmt: skip
    for index in range(5):
        shapes |= {f"{ENCODER}blocks.{index}.{name}": shape for name, shape in block.items()}
    for task, channels in TASK_HEADS.items():
        head = original_head_shapes(channels, kernels=((2, 1, 1), (2, 1, 1)) if task == "camray" else None)
        shapes |= {f"l4p_model.task_heads.{task}.task_head.dpt.{name}": shape for name, shape in head.items()}
    return shapes


def original_head_shapes(channels: int, kernels: tuple[tuple[int, ...], ...] | None) -> dict[str, tuple[int, ...]]:
    first, second = kernels or ((2, 4, 4), (2, 2, 2))
    shapes: dict[str, tuple[int, ...]] = {
        "act_postprocess.0.1.weight": (4, 4, *first),
        "act_postprocess.1.1.weight": (5, 5, *second),
        "act_postprocess.3.1.weight": (7, 7, 3, 3, 3),
        "head1.0.weight": (3, 6, 3, 3, 3), "head1.0.bias": (3,),
        "head2.0.weight": (3, 3, 3, 3, 3), "head2.0.bias": (3,),
        "head2.2.weight": (channels, 3, 1, 1, 1), "head2.2.bias": (channels,),
    }  # fmt: skip
    for index, width in enumerate(WIDTHS):
        shapes[f"act_postprocess.{index}.0.weight"] = (width, 16, 1, 1, 1)
        shapes[f"act_postprocess.{index}.0.bias"] = (width,)
        if index != 2:
            shapes[f"act_postprocess.{index}.1.bias"] = (width,)
        shapes[f"scratch.layer_rn.{index}.weight"] = (6, width, 3, 3, 3)
        shapes[f"scratch.layer{index + 1}_rn.weight"] = (6, width, 3, 3, 3)
        refine = f"scratch.refinenet{index + 1}."
        shapes |= {f"{refine}out_conv.weight": (6, 6, 1, 1, 1), f"{refine}out_conv.bias": (6,)}
        for unit in ("resConfUnit1.conv1", "resConfUnit1.conv2", "resConfUnit2.conv1", "resConfUnit2.conv2"):
            shapes |= {f"{refine}{unit}.weight": (6, 6, 3, 3, 3), f"{refine}{unit}.bias": (6,)}
    return shapes


def original_tensors() -> dict[str, Tensor]:
    torch.manual_seed(3)
    tensors = {name: torch.randn(shape) for name, shape in original_shapes().items()}
    for name in tensors:
        if "layer_rn." in name:
            base, _, index = name.removesuffix(".weight").rpartition("layer_rn.")
            tensors[f"{base}layer{int(index) + 1}_rn.weight"] = tensors[name]
    return tensors


def write_checkpoint(path: Path, tensors: object) -> Path:
    torch.save({"state_dict": tensors, "pytorch-lightning_version": "2.4.0", "epoch": 3}, path)
    return path


def run_import(checkpoint: Path, out: Path) -> L4PConfig:
    return import_checkpoint(checkpoint, out, num_heads=2, taps=(1, 2, 3, 4), image_size=28)


class Canary:
    """Pickled, it would make a file when loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    folder = tmp_path_factory.mktemp("imported")
    run_import(write_checkpoint(folder / "l4p.ckpt", original_tensors()), folder / "out")
    return load_file(folder / "out" / "model.safetensors")


class TestImport:
    def test_sizes_are_read_off_the_shapes_and_the_rest_are_options(self, tmp_path: Path) -> None:
        config = run_import(write_checkpoint(tmp_path / "l4p.ckpt", original_tensors()), tmp_path / "out")
        # The grid of the camera rays is the original's own; no shape tells it.
        assert config == L4PConfig(**{**vars(TINY), "camray_grid": (16, 16, 16)})
        assert L4P.from_pretrained(tmp_path / "out").config == config

    @pytest.mark.parametrize(
        ("ours", "theirs"),
        [
            ("encoder.embeddings.patch_embeddings.projection.weight", f"{ENCODER}patch_embed.proj.weight"),
            ("encoder.encoder.layer.3.attention.attention.query.bias", f"{ENCODER}blocks.3.attn.q_bias"),
            ("encoder.encoder.layer.3.attention.attention.value.bias", f"{ENCODER}blocks.3.attn.v_bias"),
            ("encoder.encoder.layer.1.attention.output.dense.bias", f"{ENCODER}blocks.1.attn.proj.bias"),
            ("encoder.encoder.layer.0.layernorm_before.weight", f"{ENCODER}blocks.0.norm1.weight"),
            ("encoder.encoder.layer.0.layernorm_after.weight", f"{ENCODER}blocks.0.norm2.weight"),
            ("encoder.encoder.layer.4.intermediate.dense.weight", f"{ENCODER}blocks.4.mlp.fc1.weight"),
            ("encoder.encoder.layer.4.output.dense.weight", f"{ENCODER}blocks.4.mlp.fc2.weight"),
            ("encoder.layernorm.bias", f"{ENCODER}norm.bias"),
            ("heads.flow.branches.3.project.bias", "flow_2d_backward:act_postprocess.3.0.bias"),
            ("heads.camray.branches.1.rescale.weight", "camray:act_postprocess.1.1.weight"),
            ("heads.depth.branches.2.widen.weight", "depth:scratch.layer_rn.2.weight"),
            ("heads.motion.fusions.0.skip.first.weight", "dyn_mask:scratch.refinenet1.resConfUnit1.conv1.weight"),
            ("heads.motion.fusions.3.refine.second.bias", "dyn_mask:scratch.refinenet4.resConfUnit2.conv2.bias"),
            ("heads.depth.fusions.2.mix.weight", "depth:scratch.refinenet3.out_conv.weight"),
            ("heads.depth.narrow.weight", "depth:head1.0.weight"),
            ("heads.depth.smooth.bias", "depth:head2.0.bias"),
            ("heads.camray.predict.weight", "camray:head2.2.weight"),
        ],
    )
    def test_every_kind_of_tensor_finds_its_place(self, ours: str, theirs: str, imported: dict[str, Tensor]) -> None:
        task, _, name = theirs.rpartition(":")
        source = f"l4p_model.task_heads.{task}.task_head.dpt.{name}" if task else theirs
        assert torch.equal(imported[ours], original_tensors()[source])

    def test_the_qkv_matrix_is_cut_into_query_key_and_value(self, imported: dict[str, Tensor]) -> None:
        qkv = original_tensors()[f"{ENCODER}blocks.2.attn.qkv.weight"]
        attention = "encoder.encoder.layer.2.attention.attention."
        parts = [imported[f"{attention}{part}.weight"] for part in ("query", "key", "value")]
        assert torch.equal(torch.cat(parts), qkv)
        assert f"{attention}key.bias" not in imported

    def test_unused_parts_are_named_in_the_log(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        run_import(write_checkpoint(tmp_path / "l4p.ckpt", original_tensors()), tmp_path / "out")
        assert "1 tensors under l4p_model.task_heads.track_2d. are not used: the point-tracking head" in caplog.text
        for task in TASK_HEADS:
            unit = f"l4p_model.task_heads.{task}.task_head.dpt.scratch.refinenet4.resConfUnit1."
            assert f"4 tensors under {unit} are not used: a residual unit without input" in caplog.text

    def test_missing_and_unknown_tensors_are_named(self, tmp_path: Path) -> None:
        tensors = original_tensors()
        missing = "l4p_model.task_heads.camray.task_head.dpt.head1.0.bias"
        del tensors[missing]
        tensors["l4p_model.task_heads.normals.bias"] = torch.zeros(3)
        path = write_checkpoint(tmp_path / "l4p.ckpt", tensors)
        with pytest.raises(TeacherError, match=rf"missing {missing}; unknown l4p_model\.task_heads\.normals\.bias"):
            run_import(path, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_a_tensor_whose_second_copy_differs_is_refused(self, tmp_path: Path) -> None:
        tensors = original_tensors()
        name = "l4p_model.task_heads.depth.task_head.dpt.scratch.layer2_rn.weight"
        tensors[name] = tensors[name] + 1
        with pytest.raises(TeacherError, match=rf"unknown {name}"):
            run_import(write_checkpoint(tmp_path / "l4p.ckpt", tensors), tmp_path / "out")

    @pytest.mark.parametrize(
        ("name", "tensor", "message"),
        [
            ("blocks.4.mlp.fc1.weight", torch.zeros(25, 16), r"mlp\.fc1\.weight is \(25, 16\).*\(24, 16\)"),
            ("blocks.0.attn.qkv.weight", torch.zeros(47, 16), r"qkv\.weight is \(47, 16\).*\(16, 16\)"),
            ("norm.bias", torch.zeros(16, dtype=torch.int64), r"norm\.bias is .*int64.*floating-point"),
            ("patch_embed.proj.weight", torch.zeros(16), r"patch_embed\.proj\.weight has shape \(16,\); 5 axes"),
        ],
    )
    def test_a_tensor_of_a_wrong_shape_is_named(self, tmp_path: Path, name: str, tensor: Tensor, message: str) -> None:
        path = write_checkpoint(tmp_path / "l4p.ckpt", original_tensors() | {ENCODER + name: tensor})
        with pytest.raises(TeacherError, match=message):
            run_import(path, tmp_path / "out")

    def test_options_that_do_not_fit_are_refused(self, tmp_path: Path) -> None:
        path = write_checkpoint(tmp_path / "l4p.ckpt", original_tensors())
        with pytest.raises(RequestError, match="must rise within"):
            import_checkpoint(path, tmp_path / "out", num_heads=2, image_size=28)

    def test_a_model_that_is_there_already_is_not_overwritten(self, folder: Path, tmp_path: Path) -> None:
        path = write_checkpoint(tmp_path / "l4p.ckpt", original_tensors())
        with pytest.raises(RequestError, match="holds a model already"):
            run_import(path, folder)

    @pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
    def test_a_malicious_pickle_is_refused_unrun(self, tmp_path: Path, write: Callable[[object, Path], object]) -> None:
        canary, path = tmp_path / "canary", tmp_path / "l4p.ckpt"
        write({"state_dict": {"weight": torch.zeros(1)}, "callbacks": Canary(canary)}, path)
        with pytest.raises(TeacherError, match="is not a checkpoint of tensors and plain values"):
            run_import(path, tmp_path / "out")
        assert not canary.exists()
        with contextlib.suppress(RuntimeError):
            torch.load(path, weights_only=False)
        assert canary.exists(), "so it was dangerous"

    def test_other_files_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(RequestError, match="there is no checkpoint"):
            run_import(tmp_path / "none.ckpt", tmp_path / "out")
        (tmp_path / "text.ckpt").write_text("weights")
        with pytest.raises(TeacherError, match="is not a checkpoint of tensors"):
            run_import(tmp_path / "text.ckpt", tmp_path / "out")
        with pytest.raises(TeacherError, match="no `state_dict` of tensors"):
            run_import(write_checkpoint(tmp_path / "odd.ckpt", {"a": 1}), tmp_path / "out")
        with pytest.raises(TeacherError, match=r"not an L4P checkpoint.*patch_embed\.proj\.weight is missing"):
            run_import(write_checkpoint(tmp_path / "other.ckpt", {"a": torch.zeros(1)}), tmp_path / "out")


GEOMETRY = FrameGeometry(num_frames=24, height=28, width=28)


def frame_batch(num_frames: int = 24, num_clips: int = 2) -> FrameBatch:
    random = np.random.default_rng(0)
    return FrameBatch(
        clip_ids=tuple(f"clip{index}" for index in range(num_clips)),
        frames_bthwc=random.integers(0, 256, (num_clips, num_frames, 28, 28, 3), dtype=np.uint8),
        time_seconds_bt=np.tile(np.arange(num_frames) / 10.0, (num_clips, 1)),
    )


def loaded_teacher(folder: Path, **options: str) -> L4PTeacher:
    teacher = L4PTeacher.from_spec(str(folder), options)
    teacher.setup("cpu")
    return teacher


def row(predictions: Predictions, name: str, index: int) -> np.ndarray:
    return np.asarray(predictions.arrays[name][index])


class TestTeacherContract(TeacherContract):
    geometry = GEOMETRY
    tolerance = 1e-4  # random weights and the alignment of windows amplify rounding

    @pytest.fixture(scope="class")
    @classmethod
    def weights(cls, folder: Path) -> Path:
        return folder

    @classmethod
    def spec_text(cls, weights: Path | None) -> str:
        return f"l4p:{weights}"


class TestTeacher:
    def test_a_small_one_takes_many_clips_at_once(self, folder: Path) -> None:
        assert L4PTeacher.from_spec(str(folder), {}).resources.batch_size == 16
        assert L4PTeacher.resources.batch_size == 1  # of the original, whose clips fill a GPU

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_predictions_fit_the_declared_targets(self, folder: Path, dtype: str) -> None:
        teacher, batch = loaded_teacher(folder, dtype=dtype), frame_batch()
        specs, predictions = teacher.targets(GEOMETRY), teacher.predict(batch)
        check_predictions(predictions, batch, specs)
        for spec in specs:
            for index, clip_id in enumerate(batch.clip_ids):
                spec.check(row(predictions, spec.name, index), clip_id)
        assert {spec.name: (spec.shape, spec.dtype) for spec in specs} == {
            "latents": ((4, 12, 4, 4, 16), "float16" if dtype == "float16" else "float32"),
            "depth": ((24, 28, 28), "float32"),
            "flow": ((24, 28, 28, 2), "float32"),
            "motion": ((24, 28, 28), "float32"),
            "camray": ((24, 4, 4, 6), "float32"),
        }

    def test_arrays_are_the_models_taps_and_maps_of_imagenet_normalised_frames(self, folder: Path) -> None:
        batch = frame_batch(num_frames=16, num_clips=1)
        arrays = loaded_teacher(folder).predict(batch).arrays
        frames = batch.frames_bthwc.astype(np.float32) / 255
        pixels = (frames - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
        with torch.no_grad():
            output = L4P.from_pretrained(folder)(torch.from_numpy(pixels.transpose(0, 4, 1, 2, 3)))
        expected = output.taps[2][0].reshape(8, 4, 4, 16).numpy()
        np.testing.assert_allclose(arrays["latents"][0, 2], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(arrays["depth"][0], output.maps["depth"][0, 0].numpy(), rtol=1e-4)
        flow, rays = output.maps["flow"][0].numpy(), output.maps["camray"][0].numpy()
        np.testing.assert_allclose(arrays["flow"][0, 5, 7, 9], flow[:, 5, 7, 9], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(arrays["camray"][0, 5, 1, 2], rays[:, 5, 1, 2], rtol=1e-4, atol=1e-5)

    def test_maps_and_latents_may_be_flipped_and_rays_may_not(self, folder: Path) -> None:
        specs = L4PTeacher.from_spec(str(folder), {}).targets(GEOMETRY)
        assert {spec.name for spec in specs if spec.transforms == ("flip_x",)} == {"latents", "depth", "flow", "motion"}

    def test_frames_it_cannot_take_are_refused(self, folder: Path) -> None:
        teacher = L4PTeacher.from_spec(str(folder), {})
        with pytest.raises(RequestError, match="squashed to 28 x 28, not frames of 28 x 32"):
            teacher.targets(FrameGeometry(num_frames=16, height=28, width=32))
        with pytest.raises(RequestError, match="cannot take 20 frames"):
            teacher.targets(FrameGeometry(num_frames=20, height=28, width=28))

    def test_the_dtype_is_checked(self, folder: Path) -> None:
        with pytest.raises(RequestError, match="int8"):
            L4PTeacher.from_spec(str(folder), {"dtype": "int8"})

    def test_the_fingerprint_follows_weights_config_and_dtype(self, folder: Path, tmp_path: Path) -> None:
        before = L4PTeacher.from_spec(str(folder), {}).fingerprint()
        half = L4PTeacher.from_spec(str(folder), {"dtype": "float16"}).fingerprint()
        assert {name for name in before if before[name] != half[name]} == {"dtype"}
        model = tiny_model()
        model.heads["camray"].predict.bias.data[0] += math.ldexp(1, -10)
        model.save_pretrained(tmp_path)
        changed = L4PTeacher.from_spec(str(tmp_path), {}).fingerprint()
        assert {name for name in before if before[name] != changed[name]} == {"weights_sha256"}

    def test_exported_heads_turn_latents_into_the_teachers_maps(self, folder: Path, tmp_path: Path) -> None:
        teacher = L4PTeacher.from_spec(str(folder), {})
        assert teacher.export_heads(tmp_path) == ("depth", "flow", "motion", "camray")
        teacher.setup("cpu")
        arrays = teacher.predict(frame_batch(num_frames=16)).arrays
        taps = [torch.from_numpy(arrays["latents"][:, index]).flatten(1, 3) for index in range(4)]
        depth = heads.load(tmp_path / "depth")(taps)[:, 0]
        np.testing.assert_allclose(depth.numpy(), arrays["depth"], rtol=1e-5)
        flow = heads.load(tmp_path / "flow")(taps).movedim(1, -1)
        np.testing.assert_allclose(flow[:, 1:].numpy(), arrays["flow"][:, 1:], rtol=1e-4, atol=1e-5)
