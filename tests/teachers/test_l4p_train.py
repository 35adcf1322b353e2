"""Training of `l4p:mini`: augmentations against the truth of the changed clip, losses, checkpoints, a run."""

import csv
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from p4dprep.errors import RequestError
from p4dprep.targets import FrameBatch, FrameGeometry, check_predictions
from p4dprep.worlds.generate import make_scene
from p4dprep.worlds.truth import film
from teachers.l4p import L4P, L4PConfig, L4PTeacher
from teachers.l4p._samples import Clip, ClipRing, augmented, collate, render_clip, sampled_seconds
from teachers.l4p.config import Modality
from teachers.l4p.train import (
    CHECKPOINT_FILE,
    CURVE_FILE,
    MINI,
    WEIGHTS,
    Trainer,
    TrainOptions,
    cameras_from_rays,
    camray_losses,
    encode,
    evaluate,
    flow_losses,
    fresh_model,
    losses,
    main,
    predict,
    resume,
    revive_heads,
    start,
    token_losses,
    train,
    whitening_patches,
)

SIZE = 32
TINY = L4PConfig(
    num_frames=8, image_size=SIZE, patch_size=8, hidden_size=24, num_layers=4, num_heads=2, mlp_size=48,
    taps=(1, 2, 3, 4), tap_channels=(4, 4, 4, 4), fusion_channels=4, hidden_channels=4, camray_grid=(8, 16, 16),
)  # fmt: skip
OPTIONS = TrainOptions(
    minutes=1.0, batch_size=2, num_workers=1, prefill=2, capacity=4, num_val_clips=2, eval_minutes=60.0
)


def test_first_patches_carry_motion_as_loudly_as_brightness() -> None:
    """On worlds it has not been fitted to; a random projection of the same patches is all mean brightness."""
    weights = whitening_patches(MINI)
    assert weights.shape == (MINI.hidden_size, 3, 2, 16, 16)
    flat = weights.flatten(1) / weights.flatten(1).norm(dim=1, keepdim=True)
    torch.testing.assert_close(flat @ flat.T, torch.eye(len(flat)), atol=1e-5, rtol=0)
    pixels = collate(
        [render_clip("val", 9, index, MINI.num_frames, MINI.image_size) for index in range(4)]
    ).pixels_bcthw
    spread = torch.nn.functional.conv3d(pixels, weights, stride=(2, 16, 16)).std(dim=(0, 2, 3, 4))
    assert spread.max() / spread.min() < 8
    is_difference = (weights[:, :, 0] + weights[:, :, 1]).flatten(1).norm(dim=1) < 1e-3
    assert 0.2 < is_difference.float().mean() < 0.8
    plain = torch.nn.functional.conv3d(pixels, flat.view_as(weights), stride=(2, 16, 16)).std(dim=(0, 2, 3, 4))
    assert plain.max() / plain[is_difference].max() > 8


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models so small are slower on two threads, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    return [render_clip("train", 0, index, TINY.num_frames, SIZE) for index in range(3)]


def changed(clip: Clip) -> dict[str, Clip]:
    return {
        "as it is": clip,
        "mirrored": clip.mirrored(),
        "reversed": clip.reversed(),
        "both": clip.reversed().mirrored(),
    }


def flow_of_still_points(clip: Clip, other: int) -> NDArray[np.float64]:
    """Backward (`other` -1) or forward (1) flow (t, 2, h, w) of points that do not move, from depth, poses and K."""
    size = clip.frames_thwc.shape[1]
    x, y = np.meshgrid(np.arange(size) + 0.5, np.arange(size) + 0.5)
    pixels = np.stack([x, y, np.ones_like(x)])
    flow = np.full(clip.flow_t2hw.shape, np.nan)
    rays = np.tensordot(np.linalg.inv(clip.intrinsics_33), pixels, 1)
    for index in range(len(flow)):
        if 0 <= index + other < len(flow):
            points = rays * clip.depth_thw[index].astype(float)
            move = clip.pose_t44[index + other] @ np.linalg.inv(clip.pose_t44[index])
            seen = np.tensordot(clip.intrinsics_33 @ move[:3, :3], points, 1)
            seen += (clip.intrinsics_33 @ move[:3, 3])[:, None, None]
            flow[index] = seen[:2] / seen[2] - pixels[:2]
    return flow


class TestAugmentation:
    @pytest.mark.parametrize("name", ["as it is", "mirrored", "reversed", "both"])
    def test_depth_and_cameras_give_the_flow_of_what_does_not_move(self, clips: list[Clip], name: str) -> None:
        for clip in (changed(each)[name] for each in clips):
            for other, flow, motion in (
                (-1, clip.flow_t2hw, clip.motion_thw),
                (1, clip.flow_forward_t2hw, clip.motion_forward_thw),
            ):
                expected = flow_of_still_points(clip, other)
                still = (~motion)[:, None] & np.isfinite(expected) & np.isfinite(flow)
                error = np.abs(np.where(still, flow - expected, 0)) / (1 + np.abs(expected))
                assert still.sum() > 1000
                assert np.nanmax(error) < 0.05  # float16 depth and flow

    @pytest.mark.parametrize("name", ["mirrored", "reversed", "both"])
    def test_what_moves_is_what_departs_from_that_flow(self, clips: list[Clip], name: str) -> None:
        clip = changed(clips[0])[name]
        apart = np.abs(clip.flow_t2hw - flow_of_still_points(clip, -1)).max(axis=1) > 0.5
        assert apart[1:].any()
        assert clip.motion_thw[1:][apart[1:]].all()

    def test_a_reversed_scene_moves_where_the_truth_of_reversed_times_says(self) -> None:
        scene = make_scene("train", 0, 1)
        seconds = sampled_seconds(scene, TINY.num_frames)
        clip = render_clip("train", 0, 1, TINY.num_frames, SIZE).reversed()
        _, truth = film(scene, seconds[::-1], SIZE, SIZE, visibility=False)
        np.testing.assert_array_equal(clip.motion_thw, truth.motion_thw)
        np.testing.assert_array_equal(clip.flow_t2hw, truth.flow_thw2.astype(np.float16).transpose(0, 3, 1, 2))
        np.testing.assert_array_equal(clip.depth_thw, truth.depth_thw.astype(np.float16))
        rays = collate([clip]).rays_b6tyx[0].movedim(0, -1).numpy()
        np.testing.assert_allclose(rays, truth.camray_tyx6, atol=1e-6)

    def test_mirrored_rays_are_mirrored_lines(self, clips: list[Clip]) -> None:
        plain = collate([clips[1]]).rays_b6tyx
        # A mirror turns x of directions; a moment is a cross product, of which it turns y and z.
        expected = plain.flip(-1) * torch.tensor([-1.0, 1, 1, 1, -1, -1])[None, :, None, None, None]
        torch.testing.assert_close(collate([clips[1].mirrored()]).rays_b6tyx, expected, atol=1e-6, rtol=0)

    @pytest.mark.parametrize("change", [Clip.mirrored, Clip.reversed])
    def test_twice_changes_nothing(self, clips: list[Clip], change: object) -> None:
        assert callable(change)
        for field in fields(Clip):
            np.testing.assert_array_equal(
                getattr(change(change(clips[2])), field.name), getattr(clips[2], field.name), err_msg=field.name
            )

    def test_colours_change_frames_only_and_stay_in_range(self, clips: list[Clip]) -> None:
        for seed in range(20):
            clip, frames = augmented(clips[0], np.random.default_rng(seed))
            assert frames.shape == clip.frames_thwc.shape
            assert frames.dtype == np.float32
            assert frames.min() >= 0
            assert frames.max() <= 1.001
            assert any(clip.depth_thw.tobytes() == each.depth_thw.tobytes() for each in changed(clips[0]).values())


class TestClipRing:
    def test_the_newest_clips_stand_over_the_oldest(self, clips: list[Clip], tmp_path: Path) -> None:
        ring = ClipRing.open(tmp_path, 2, TINY.num_frames, SIZE)
        assert len(ring.filled()) == 0
        for index, clip in enumerate(clips):
            ring.write(index, clip)
        again = ClipRing.open(tmp_path, 2, TINY.num_frames, SIZE)
        assert again.next_index() == 3
        found = again.read(0)
        assert found is not None
        np.testing.assert_array_equal(found.flow_t2hw, clips[2].flow_t2hw)

    def test_a_clip_that_is_being_written_is_not_read(
        self, clips: list[Clip], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ring = ClipRing.open(tmp_path, 2, TINY.num_frames, SIZE)
        ring.write(0, clips[0])
        half = replace(clips[1])
        object.__delattr__(half, "intrinsics_33")
        with pytest.raises(AttributeError, match="intrinsics_33"):
            ring.write(2, half)  # dies on the way, in slot 0
        assert ring.read(0) is None

    def test_a_ring_of_another_size_is_refused(self, tmp_path: Path) -> None:
        ClipRing.open(tmp_path, 2, TINY.num_frames, SIZE)
        with pytest.raises(RequestError, match="delete"):
            ClipRing.open(tmp_path, 3, TINY.num_frames, SIZE)


class TestLosses:
    def test_the_truth_itself_costs_almost_nothing_and_scores_best(self, clips: list[Clip]) -> None:
        batch = collate(clips)
        perfect = {
            "depth": batch.depth_b1thw.nan_to_num(1.0),
            "flow": batch.flow_b2thw.nan_to_num(0.0),
            "motion": 40 * (batch.motion_b1thw - 0.5),
            "camray": batch.rays_b6tyx,
        }
        assert {name: round(value.item(), 3) for name, value in losses(perfect, batch).items()} == dict.fromkeys(
            losses(perfect, batch), 0.0
        )

    def test_a_turned_and_moved_camera_costs_its_angle_and_its_way(self, clips: list[Clip]) -> None:
        batch = collate(clips[:1])
        angle, moved = 0.01, torch.tensor([0.1, -0.2, 0.05])
        turn = torch.tensor([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]]).float()
        direction, moment = batch.rays_b6tyx.split(3, dim=1)
        moment = moment + torch.linalg.cross(moved[None, :, None, None, None].expand_as(direction), direction, dim=1)
        rays = torch.cat([torch.einsum("ij,bjtyx->bityx", turn, direction), moment], dim=1)
        found = camray_losses(rays, batch)
        assert found["rotation"].item() == pytest.approx(angle / 2, rel=0.05)  # two of four lags reach back to frame 0
        rotation, centre = cameras_from_rays(torch.cat([direction, moment], dim=1))
        torch.testing.assert_close(centre.float() - batch.origin_bt3, moved.expand_as(batch.origin_bt3))
        expected, _ = cameras_from_rays(batch.rays_b6tyx)
        torch.testing.assert_close(rotation, expected)

    @pytest.mark.parametrize("num_moving", [1, 9])
    def test_flow_of_the_smallest_ball_weighs_half(self, num_moving: int) -> None:
        target, moves = torch.zeros(1, 2, 1, 8, 8), torch.zeros(1, 1, 1, 8, 8)
        moves.flatten()[:num_moving] = 1
        target[:, 0][moves[:, 0] > 0] = 3.0
        target[..., 7, :] = torch.nan  # sky
        found = flow_losses(torch.zeros_like(target), target, moves)
        assert found["flow"].item() == pytest.approx(3.0 / 2 / 2)  # half the weight, one of two channels
        assert found["flow_log"].item() == pytest.approx(np.log(4) / 2 / 2)
        assert flow_losses(torch.zeros_like(target), target, 0 * moves)["flow"] < 0.3

    def test_tokens_that_tell_what_moves_in_their_cells_cost_only_its_entropy(self, clips: list[Clip]) -> None:
        batch, cell = collate(clips), 8
        steps, side = TINY.num_frames // 2, SIZE // cell
        said = torch.zeros(len(clips), steps, side, side, 4)
        entropy = []
        for at in np.ndindex(said.shape[:-1]):
            n, t, y, x = at
            part = (n, slice(None), slice(2 * t, 2 * t + 2), *(slice(cell * i, cell * i + cell) for i in (y, x)))
            depth, flow = batch.depth_b1thw[part][0], batch.flow_b2thw[part]
            moves = (batch.motion_b1thw[part][0] > 0) & depth.isfinite()
            with_flow = moves & flow.isfinite().all(0)
            if with_flow.any():
                said[at][:2] = flow[:, with_flow].mean(1)
            if moves.any():
                said[at][2] = depth[moves].log().mean()
            share = moves.float().mean().clamp(1e-6, 1 - 1e-6)
            said[at][3] = share.logit()
            entropy.append(-(share * share.log() + (1 - share) * (1 - share).log()))
        found = token_losses(said, batch)
        assert (found["token_flow"].item(), found["token_depth"].item()) == pytest.approx((0.0, 0.0), abs=1e-4)
        assert found["token_motion"].item() == pytest.approx(torch.stack(entropy).mean().item(), abs=1e-4)
        off = token_losses(said + torch.tensor([1.0, 1.0, 0.5, 0.0]), batch)
        assert (off["token_flow"].item(), off["token_depth"].item()) == pytest.approx((1.0, 0.5), abs=1e-4)

    def test_the_encoder_learns_alone_first_and_the_heads_then(self, clips: list[Clip], tmp_path: Path) -> None:
        trainer = start(tmp_path, replace(OPTIONS, encoder_fraction=0.5), init=None, config=TINY)
        batch = collate(clips)

        def moved(seconds: float) -> tuple[bool, bool]:
            trainer.elapsed_seconds = seconds
            before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
            trainer.step(batch)
            changed = {n for n, value in trainer.model.state_dict().items() if not torch.equal(value, before[n])}
            return (any(n.startswith("encoder") for n in changed), any(n.startswith("heads") for n in changed))

        assert moved(5.0) == (True, False)
        assert moved(31.0) == (True, True)
        trainer.elapsed_seconds = 5.0
        seen = [trainer.step(batch) for _ in range(40)]
        assert set(seen[0]) == {"token_flow", "token_depth", "token_motion", "gradient"}
        assert seen[-1]["token_depth"] < 0.7 * seen[0]["token_depth"]
        with pytest.raises(RequestError, match="encoder_fraction"):
            replace(OPTIONS, encoder_fraction=1.0)

    def test_a_silent_head_is_begun_anew_and_no_other(self, clips: list[Clip]) -> None:
        model, batch = fresh_model(TINY, seed=0), collate(clips)
        assert revive_heads(model, batch) == []
        with torch.no_grad():
            model.heads["flow"].get_submodule("smooth").get_parameter("bias").fill_(-1e3)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        assert model(batch.pixels_bcthw).maps["flow"].std() < 1e-6
        assert revive_heads(model, batch) == ["flow"]
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert {name.split(".")[1] for name in changed} == {"flow"}
        assert {name.split(".")[2] for name in changed} <= {"narrow", "smooth", "predict"}
        assert model(batch.pixels_bcthw).maps["flow"].std() > 1e-4
        assert revive_heads(model, batch) == []

    def test_losses_fall_on_one_repeated_batch(self, clips: list[Clip], tmp_path: Path) -> None:
        trainer = start(tmp_path, OPTIONS, init=None, config=TINY)
        trainer.elapsed_seconds = 5.0  # past the warm-up
        batch = collate(clips)
        seen = [trainer.step(batch) for _ in range(60)]
        for name in ("depth", "flow_log", "flow", "motion", "motion_iou"):
            assert seen[-1][name] < 0.97 * seen[0][name], name

    def test_a_loss_that_is_not_finite_stops_before_it_spoils_the_weights(
        self, clips: list[Clip], tmp_path: Path
    ) -> None:
        trainer = start(tmp_path, OPTIONS, init=None, config=TINY)
        batch = collate(clips)
        batch.pixels_bcthw[0, 0, 0, 0, 0] = torch.nan
        with pytest.raises(FloatingPointError, match="go on from the checkpoint"):
            trainer.step(batch)
        assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


class TestEvaluation:
    def test_a_perfect_model_reaches_perfect_figures(self, clips: list[Clip], monkeypatch: pytest.MonkeyPatch) -> None:
        batch = collate(clips)
        maps = {
            "depth": batch.depth_b1thw,
            "flow": batch.flow_b2thw,
            "motion": batch.motion_b1thw - 0.5,
            "camray": batch.rays_b6tyx,
        }
        monkeypatch.setattr("teachers.l4p.train.predict", lambda *_: maps)
        figures = evaluate(L4P(TINY), [batch])
        expected = {"abs_rel": 0.0, "delta1": 1.0, "epe": 0.0, "motion_iou": 1.0, "epe_of_zero": 0.0}
        expected |= {"rotation_auc15": 1.0, "translation_auc15": 1.0}
        assert figures == pytest.approx(expected, abs=1e-6)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    trainer = start(folder, replace(OPTIONS, minutes=1e-4), init=None, config=TINY)
    assert train(folder, trainer)["epe"] > 0  # the first step is over the time
    return folder


class TestRun:
    def test_it_leaves_a_folder_that_the_teacher_runs(self, out: Path) -> None:
        teacher = L4PTeacher.from_spec(str(out / "model"), {})
        geometry = FrameGeometry(num_frames=8, height=SIZE, width=SIZE)
        teacher.setup("cpu")
        frames = np.zeros((1, 8, SIZE, SIZE, 3), np.uint8)
        batch = FrameBatch(clip_ids=("c",), frames_bthwc=frames, time_seconds_bt=np.arange(8.0)[None])
        check_predictions(teacher.predict(batch), batch, teacher.targets(geometry))
        assert L4P.from_pretrained(out / "model").dtype == torch.float16

    def test_an_expert_of_plain_worlds_learns_from_them_and_is_judged_by_others(self, tmp_path: Path) -> None:
        options = replace(OPTIONS, minutes=1e-4, split="single_train", seed=3)
        train(tmp_path, start(tmp_path, options, init=None, config=TINY))
        for name, seed in (("clips", 3), ("val", 4)):
            clip = ClipRing.open(tmp_path / name, OPTIONS.capacity if seed == 3 else 2, TINY.num_frames, SIZE).read(1)
            assert clip is not None
            wanted = render_clip("single_train", seed, 1, TINY.num_frames, SIZE)
            np.testing.assert_array_equal(clip.frames_thwc, wanted.frames_thwc)

    def test_the_curve_has_a_line_per_evaluation(self, out: Path) -> None:
        rows = list(csv.DictReader((out / CURVE_FILE).read_text().splitlines()))
        assert [row["step"] for row in rows] == ["1"]
        assert {"abs_rel", "delta1", "epe_of_zero", "motion_iou", "rotation_auc15"} <= set(rows[0])

    def test_a_second_start_is_refused_and_resume_goes_on(self, out: Path) -> None:
        with pytest.raises(RequestError, match="--resume"):
            start(out, OPTIONS, init=None, config=TINY)
        trainer = resume(out, OPTIONS, minutes=1e-4)
        assert (trainer.num_steps, trainer.fraction) == (1, 0.0)
        train(out, trainer)
        again = resume(out, OPTIONS, minutes=None)
        assert (again.num_steps, again.next_index >= 2, again.options.minutes) == (2, True, 1e-4)
        for name, tensor in again.model.state_dict().items():
            torch.testing.assert_close(tensor, trainer.model.state_dict()[name], rtol=0, atol=0, msg=name)

    def test_a_resumed_run_keeps_what_it_is_and_takes_the_machines_options_anew(self, tmp_path: Path) -> None:
        options = replace(OPTIONS, split="single_train", seed=3, encoder_fraction=0.5)
        start(tmp_path, options, init=None, config=TINY).save(tmp_path)
        resumed = Trainer.load(tmp_path, replace(OPTIONS, minutes=9.0, num_workers=2))
        assert resumed.options == replace(options, num_workers=2)
        state = torch.load(tmp_path / CHECKPOINT_FILE, weights_only=True)
        del state["readout"]
        torch.save(state, tmp_path / CHECKPOINT_FILE)
        with pytest.raises(RequestError, match="older version; begin another with --init"):
            Trainer.load(tmp_path, OPTIONS)

    @pytest.mark.parametrize("option", ["--split=single_train", "--seed=0", "--encoder-fraction=0", "--init=x"])
    def test_what_a_run_is_cannot_be_said_again(
        self, option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr("sys.argv", ["train", "run", "--resume", option])
        with pytest.raises(SystemExit, match="2"):
            main()
        name = option[2:].split("=")[0].replace("-", "_")
        assert f"--resume goes on as the run began: leave out {name}\n" in capsys.readouterr().err

    def test_a_run_begins_silent_heads_anew(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        model = fresh_model(TINY, seed=0)
        with torch.no_grad():
            model.heads["flow"].get_submodule("smooth").get_parameter("bias").fill_(-1e3)
        model.save_pretrained(tmp_path / "init")
        trainer = start(tmp_path / "out", replace(OPTIONS, minutes=1e-4), init=tmp_path / "init", config=TINY)
        train(tmp_path / "out", trainer)
        assert "begun anew, since silent: the last layers of flow\n" in capsys.readouterr().err
        saved = L4P.from_pretrained(tmp_path / "out" / "model").heads["flow"].get_submodule("smooth")
        assert saved.get_parameter("bias").float().abs().max() < 10

    def test_resume_without_a_run_says_so(self, tmp_path: Path) -> None:
        with pytest.raises(RequestError, match="nothing to resume"):
            resume(tmp_path, OPTIONS, minutes=None)

    def test_init_starts_from_a_folders_weights(self, out: Path, tmp_path: Path) -> None:
        trainer = start(tmp_path, OPTIONS, init=out / "model")
        shipped = L4P.from_pretrained(out / "model").state_dict()
        for name, tensor in trainer.model.state_dict().items():
            torch.testing.assert_close(tensor, shipped[name].float(), rtol=0, atol=0)

    @pytest.mark.parametrize("encoder_fraction", [0.0, 0.5])
    def test_a_resumed_step_equals_the_step_of_a_run_that_never_stopped(
        self, clips: list[Clip], tmp_path: Path, encoder_fraction: float
    ) -> None:
        batch, options = collate(clips), replace(OPTIONS, encoder_fraction=encoder_fraction)
        whole = start(tmp_path, options, init=None, config=TINY)
        whole.elapsed_seconds = 5.0
        whole.step(batch)
        whole.save(tmp_path)
        parted = Trainer.load(tmp_path, OPTIONS)
        assert parted.step(batch) == whole.step(batch)
        assert torch.load(tmp_path / CHECKPOINT_FILE, weights_only=True)["num_steps"] == 1
        for mine, other in zip(whole.mean.parameters(), parted.mean.parameters(), strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=0)

    @pytest.mark.parametrize(("has", "dtype"), [("avx2", torch.float32), ("amx_bf16", torch.bfloat16)])
    def test_a_cpu_without_bfloat16_does_not_imitate_it(
        self, has: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {has: True})
        model = fresh_model(replace(MINI, num_layers=4, taps=(1, 2, 3, 4), image_size=48, patch_size=8), seed=0)
        assert {tap.dtype for tap in encode(model, torch.zeros(1, 3, 16, 48, 48))} == {dtype}

    @pytest.mark.parametrize("patch_size", [8, 24])
    def test_gradients_in_bfloat16_are_near_those_in_float32(
        self, patch_size: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
        config = replace(MINI, num_layers=4, taps=(1, 2, 3, 4), image_size=48, patch_size=patch_size)
        model = fresh_model(config, seed=0).train()
        batch = collate([render_clip("train", 0, 0, 16, 48)])

        def gradient(maps: dict[Modality, Tensor]) -> Tensor:
            model.zero_grad()
            found = losses(maps, batch)
            torch.autograd.backward(sum((WEIGHTS[name] * found[name] for name in found), torch.zeros(())))
            return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

        rough, exact = (
            gradient(predict(model, encode(model, batch.pixels_bcthw))),
            gradient(model(batch.pixels_bcthw).maps),
        )
        assert (rough - exact).norm() < 0.03 * exact.norm()
