"""P4D as a whole: rearrangement by the clock, decoder and heads, where gradients go, and the ablations' switches."""

import copy
import dataclasses
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import nn

from p4dprep.cache import Cache
from p4dprep.errors import CorruptDataError, RequestError
from p4dprep.heads import DPTHead
from student.losses import latent_losses, map_loss, motion_balance
from student.p4d import P4D, LatentShape, LightHead, PerceptionDecoder, pooled, rearrange, shrunk
from student.p4d_config import PAPER_WEIGHTS, ExplicitTerm, P4DConfig, plan
from student.samples import VideoTokens
from student.targets import TargetBatch, flip_x, load_head, stack_targets
from tests.student import p4d_cache
from tests.student.p4d_cache import CAMRAY, CHANNELS, DISPARITY, FLOW, GRID, LATENTS, MASK, SIZE, TAPS, T

pytestmark = pytest.mark.usefixtures("one_thread")

HIDDEN, LENGTH = 10, 40
NAMES = ("l4p_depth", "l4p_flow", "l4p_motion", "l4p_camray")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return p4d_cache.build(tmp_path_factory.mktemp("p4d"))


def video_tokens(steps: int = T, rows: int = 3, columns: int = 3, first: int = 2) -> VideoTokens:
    """Tokens that follow each other from `first` on; each step covers the same number of frames."""
    positions = torch.arange(first, first + steps * rows * columns).reshape(steps, rows, columns)
    each = T // steps
    return VideoTokens(positions_tyx=positions, frame_spans=tuple((i * each, (i + 1) * each) for i in range(steps)))


def batch_of(cache: Cache, config: P4DConfig, clips: tuple[int | None, ...] = (0, 1)) -> TargetBatch:
    ids = [None if clip is None else f"clip-{clip}" for clip in clips]
    arrays = [{} if name is None else {array: cache.read(name, array) for array in config.targets} for name in ids]
    return stack_targets([f"sample-{i}" for i in range(len(clips))], ids, arrays)


def hidden_states(batch: int = 2, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((batch, LENGTH, HIDDEN), generator=generator, dtype=torch.float64).requires_grad_()


def p4d_of(cache: Cache, config: P4DConfig) -> P4D:
    torch.manual_seed(5)
    return P4D(dataclasses.replace(config, hidden_channels=12), cache, HIDDEN).double()


class TestRearrange:
    def test_a_student_step_per_frame_gives_every_second_one_to_a_teacher_of_tubes_of_two(self) -> None:
        hidden, tokens = hidden_states(1), video_tokens(T, GRID, GRID)
        found = rearrange(hidden, [tokens], (T // 2, GRID, GRID))
        expected = hidden[0, tokens.positions_tyx[::2]]
        torch.testing.assert_close(found[0], expected, rtol=0, atol=0)

    def test_a_student_that_merges_the_same_frames_gives_its_own_steps(self) -> None:
        hidden, tokens = hidden_states(1), video_tokens(T // 2, GRID, GRID)
        found = rearrange(hidden, [tokens], (T // 2, GRID, GRID))
        torch.testing.assert_close(found[0], hidden[0, tokens.positions_tyx], rtol=0, atol=0)

    def test_uneven_steps_are_chosen_by_the_frame_they_cover(self) -> None:
        positions = torch.arange(3).reshape(3, 1, 1)
        tokens = VideoTokens(positions_tyx=positions, frame_spans=((0, 1), (1, 4), (4, 8)))
        hidden = torch.arange(5.0)[None, :, None]
        found = rearrange(hidden, [tokens], (4, 1, 1))  # first frames 0, 2, 4, 6
        assert found.flatten().tolist() == [0, 1, 2, 2]
        found = rearrange(hidden, [tokens], (4, 1, 1), "last")  # last frames 1, 3, 5, 7
        assert found.flatten().tolist() == [1, 1, 2, 2]

    def test_the_last_frame_of_a_tube_can_be_asked_for(self) -> None:
        hidden, tokens = hidden_states(1), video_tokens(T, GRID, GRID)
        found = rearrange(hidden, [tokens], (T // 2, GRID, GRID), "last")
        torch.testing.assert_close(found[0], hidden[0, tokens.positions_tyx[1::2]], rtol=0, atol=0)

    def test_tokens_are_found_wherever_they_lie_and_other_positions_do_not_matter(self) -> None:
        hidden = hidden_states(2).detach()
        tokens = [video_tokens(first=0), video_tokens(first=4)]
        shuffled = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(1))
        moved = torch.empty_like(hidden[1])
        moved[shuffled] = hidden[1]
        other = VideoTokens(positions_tyx=shuffled[tokens[1].positions_tyx], frame_spans=tokens[1].frame_spans)
        before = rearrange(hidden, tokens, (2, GRID, GRID))
        after = rearrange(torch.stack([hidden[0], moved]), [tokens[0], other], (2, GRID, GRID))
        torch.testing.assert_close(after, before, rtol=0, atol=0)

    @pytest.mark.parametrize("side", [2, 3, 5])
    def test_a_painted_cell_changes_its_own_latent_cell_most_and_no_cell_is_lost(self, side: int) -> None:
        tokens = video_tokens(2, side, side)
        for row in range(side):
            for column in range(side):
                hidden = torch.zeros(1, 2 + 2 * side * side, 1)
                hidden[0, tokens.positions_tyx[1, row, column]] = 1
                found = rearrange(hidden, [tokens], (2, 2, 2))[0, ..., 0]
                assert (found[0] == 0).all()
                y, x = (min(1, int((at + 0.5) * 2 / side)) for at in (row, column))
                assert found[1, y, x] >= 0.999 * found[1].max() > 0

    def test_half_precision_comes_back_in_single(self) -> None:
        found = rearrange(hidden_states(1).detach().bfloat16(), [video_tokens()], (2, GRID, GRID))
        assert found.dtype == torch.float32

    def test_a_clip_with_fewer_frames_than_the_teacher_has_steps_is_refused(self) -> None:
        with pytest.raises(RequestError, match="sees 4 frames, fewer than the teacher's 5 steps"):
            rearrange(hidden_states(1), [video_tokens()], (5, GRID, GRID))


class TestPerceptionDecoder:
    def test_it_is_three_layers_of_the_papers_width_with_xavier_weights_and_no_bias(self) -> None:
        decoder = PerceptionDecoder(64, LatentShape(num_taps=4, grid=(8, 16, 16), channels=32))
        layers = [layer for layer in decoder.modules() if isinstance(layer, nn.Linear)]
        assert [(layer.in_features, layer.out_features) for layer in layers] == [(64, 2560), (2560, 2560), (2560, 128)]
        for layer in layers:
            bound = (6 / (layer.in_features + layer.out_features)) ** 0.5
            assert 0.99 * bound < layer.weight.abs().max() <= bound
            assert (layer.bias == 0).all()

    def test_its_output_is_a_hand_written_mlps_cut_into_taps(self) -> None:
        torch.manual_seed(0)
        decoder = PerceptionDecoder(HIDDEN, LatentShape(num_taps=2, grid=(1, 1, 1), channels=3), 4).double()
        values = np.random.default_rng(0).standard_normal(HIDDEN)
        for layer in (decoder.first, decoder.second, decoder.last):
            values = layer.weight.detach().numpy() @ values
            if layer is not decoder.last:
                values = np.array([v / 2 * (1 + float(torch.erf(torch.tensor(v / 2**0.5)))) for v in values])
        found = decoder(torch.from_numpy(np.random.default_rng(0).standard_normal((1, 1, 1, 1, HIDDEN))))
        assert found.shape == (1, 2, 1, 1, 1, 3)
        np.testing.assert_allclose(found.detach().numpy().ravel(), values, rtol=1e-6)

    def test_with_positions_it_tells_apart_what_lies_within_one_of_the_students_cells(self) -> None:
        torch.manual_seed(0)
        hidden = torch.randn(1, 1, 1, 1, HIDDEN).expand(1, 1, 2, 3, HIDDEN)
        shape = LatentShape(num_taps=1, grid=(1, 2, 3), channels=4)
        target = torch.randn(1, 1, 1, 2, 3, 4)
        errors = {}
        for positions in (False, True):
            torch.manual_seed(0)
            decoder = PerceptionDecoder(HIDDEN, shape, 32, positions=positions)
            first = decoder(hidden)
            assert (first == first[:, :, :, :1, :1]).all()  # it begins where one without does
            optimizer = torch.optim.Adam(decoder.parameters(), lr=1e-2)
            for _ in range(200):
                optimizer.zero_grad()
                (decoder(hidden) - target).square().mean().backward()
                optimizer.step()
            errors[positions] = (decoder(hidden) - target).square().mean().item()
        assert errors[True] < 0.01 < 0.3 < errors[False]


class TestLosses:
    def test_the_total_is_the_papers_weighted_sum_of_what_is_logged(self, cache: Cache) -> None:
        config = plan(cache, targets=["l4p_latents", *NAMES])
        p4d, targets = p4d_of(cache, config), batch_of(cache, config)
        losses = p4d(hidden_states(), [video_tokens()] * 2, targets)
        log = losses.log()
        weights = dict(zip(NAMES, PAPER_WEIGHTS.values(), strict=True))
        expected = 0.5 * log["ld"] + 0.1 * sum(weights[name] * log[f"ed/{name}"] for name in NAMES)
        assert losses.total.item() == pytest.approx(expected, rel=1e-9)
        assert set(log) == {"ld", "ld/tap0", "ld/tap1", *(f"ed/{name}" for name in NAMES)}

    def test_each_term_compares_prediction_and_cache_through_the_frozen_head(self, cache: Cache) -> None:
        config = plan(cache, targets=["l4p_latents", *NAMES])
        p4d, targets = p4d_of(cache, config), batch_of(cache, config)
        hidden, tokens = hidden_states(), [video_tokens(), video_tokens(first=4)]
        log = p4d(hidden, tokens, targets).log()
        latents = p4d.decoder(rearrange(hidden, tokens, (2, GRID, GRID)))
        arrays = {name: array.double() for name, array in targets.arrays.items()}
        per_tap = latent_losses(latents, arrays["l4p_latents"])
        assert [log["ld/tap0"], log["ld/tap1"]] == pytest.approx(per_tap.tolist(), rel=1e-9)
        head = load_head(cache, "l4p", "depth").double()
        depth = head([latents[:, 0].flatten(1, 3), latents[:, 1].flatten(1, 3)]).movedim(1, -1)
        expected = map_loss(depth, arrays["l4p_depth"][..., None], "log_smooth_l1")
        assert log["ed/l4p_depth"] == pytest.approx(expected.item(), rel=1e-9)

    def test_standardised_latents_are_compared_in_units_of_each_channels_spread(self, cache: Cache) -> None:
        config = plan(cache, targets=["l4p_latents", *NAMES])
        targets, hidden = batch_of(cache, config), hidden_states()
        p4d = p4d_of(cache, dataclasses.replace(config, standardised=True))
        corpus = np.stack([cache.read(name, "l4p_latents") for name in cache.clips().column("id").to_pylist()])
        mean, spread = (each.astype(np.float64) for each in (corpus.mean((0, 2, 3, 4)), corpus.std((0, 2, 3, 4))))
        assert p4d.latent_mean_ktyxc is not None
        assert p4d.latent_spread_ktyxc is not None
        scales = [each[:, 0, 0, 0].numpy() for each in (p4d.latent_mean_ktyxc, p4d.latent_spread_ktyxc)]
        np.testing.assert_allclose(scales[0], mean, atol=1e-5)
        np.testing.assert_allclose(scales[1], spread, rtol=1e-4)
        raw = p4d.decoder(rearrange(hidden, [video_tokens()] * 2, (2, GRID, GRID)))
        target = (targets.arrays["l4p_latents"].double() - p4d.latent_mean_ktyxc) / p4d.latent_spread_ktyxc
        log = p4d(hidden, [video_tokens()] * 2, targets).log()
        assert [log["ld/tap0"], log["ld/tap1"]] == pytest.approx(latent_losses(raw, target).tolist(), rel=1e-6)
        latents = raw * p4d.latent_spread_ktyxc + p4d.latent_mean_ktyxc  # heads read the teacher's own units
        head = load_head(cache, "l4p", "depth").double()
        depth = head([latents[:, 0].flatten(1, 3), latents[:, 1].flatten(1, 3)]).movedim(1, -1)
        expected = map_loss(depth, targets.arrays["l4p_depth"].double()[..., None], "log_smooth_l1")
        assert log["ed/l4p_depth"] == pytest.approx(expected.item(), rel=1e-6)

    @pytest.mark.parametrize("motion", ["l4p_motion", "truth_motion"])
    @pytest.mark.parametrize("heads", ["frozen", "light"])
    def test_balanced_losses_weigh_every_cell_by_the_motion_in_the_cache(
        self, cache: Cache, motion: str, heads: Literal["frozen", "light"]
    ) -> None:
        config = plan(cache, targets=["l4p_latents", "l4p_depth", "l4p_flow", motion])
        config = dataclasses.replace(config, balanced=True, heads=heads)
        p4d, targets = p4d_of(cache, config), batch_of(cache, config)
        hidden, tokens = hidden_states(), [video_tokens()] * 2
        log = p4d(hidden, tokens, targets).log()
        moving = (targets.arrays[motion] > (0 if motion == "l4p_motion" else 0.5)).double()
        assert 0 < moving.mean() < 1
        prediction = p4d.predict(hidden, tokens)
        pooled = moving.reshape(2, 2, 2, GRID, SIZE // GRID, GRID, SIZE // GRID).mean(dim=(2, 4, 6))
        expected = latent_losses(
            prediction.latents_bktyxc, targets.arrays["l4p_latents"].double(), motion_balance(pooled)
        )
        assert [log["ld/tap0"], log["ld/tap1"]] == pytest.approx(expected.tolist(), rel=1e-9)
        for name, loss in (("l4p_depth", "log_smooth_l1"), ("l4p_flow", "smooth_l1")):
            target = targets.arrays[name].double().reshape(prediction.maps[name].shape)
            value = map_loss(prediction.maps[name], target, loss, motion_balance(moving))  # type: ignore[arg-type]
            assert log[f"ed/{name}"] == pytest.approx(value.item(), rel=1e-9)
        plain = p4d_of(cache, dataclasses.replace(config, balanced=False))(hidden, tokens, targets).log()
        assert all(log[name] != plain[name] for name in plain)

    def test_balance_without_a_motion_to_go_by_is_refused(self, cache: Cache) -> None:
        config = dataclasses.replace(plan(cache, targets=["l4p_latents", "l4p_depth"]), balanced=True)
        with pytest.raises(RequestError, match="balance_motion asks for one target that says what moves"):
            p4d_of(cache, config)

    @pytest.mark.parametrize("balanced", [False, True])
    def test_latents_are_compared_as_means_over_the_students_cells(self, cache: Cache, *, balanced: bool) -> None:
        config = plan(cache, targets=["l4p_latents", "truth_motion"])
        asked = {"balanced": balanced, "cells": (1, 1), "heads": "light", "standardised": True}
        config = dataclasses.replace(config, **asked)  # type: ignore[arg-type]
        p4d, targets, tokens = p4d_of(cache, config), batch_of(cache, config), [video_tokens()] * 2
        assert p4d.shape.grid == (T // 2, 1, 1)
        moving = targets.arrays["truth_motion"].double().reshape(2, 2, 2, GRID, SIZE // GRID, GRID, SIZE // GRID)
        share = moving.mean(dim=(2, 4, 6))
        weights = motion_balance(share) if balanced else torch.ones_like(share)
        means = (targets.arrays["l4p_latents"].double() * weights[:, None, ..., None]).mean(dim=(3, 4), keepdim=True)
        mean, spread = means.mean(dim=(0, 2), keepdim=True), means.std(dim=(0, 2), keepdim=True, correction=0)
        hidden = hidden_states()
        told = p4d.decoder(rearrange(hidden, tokens, (T // 2, 1, 1)))
        expected = latent_losses(told, (means - mean) / spread)
        log = p4d(hidden, tokens, targets).log()
        assert [log["ld/tap0"], log["ld/tap1"]] == pytest.approx(expected.tolist(), rel=1e-5)
        latents = p4d.predict(hidden, tokens).latents_bktyxc
        torch.testing.assert_close(latents, told * spread + mean, rtol=1e-5, atol=1e-6)

    def test_in_a_cell_what_moves_counts_as_much_as_what_stands(self) -> None:
        latents = torch.zeros(1, 1, 1, 4, 6, 1, dtype=torch.float64)
        latents[..., 1, 4, 0] = 1  # of the six tokens of the first row's last cell, one
        moving = latents[:, 0, ..., 0]
        assert pooled(latents, (2, 2), None).flatten().tolist() == pytest.approx([0, 1 / 6, 0, 0])
        assert pooled(latents, (2, 2), moving).flatten().tolist() == pytest.approx([0, 1 / 2, 0, 0])
        assert pooled(latents + 3, (2, 2), moving).flatten().tolist() == pytest.approx([3, 3.5, 3, 3])

    @pytest.mark.parametrize(
        ("changes", "fault"),
        [
            ({"cells": (2, 3)}, "distill_cells 2 x 3 must divide the teacher's 2 x 2"),
            ({"cells": (0, 1)}, "distill_cells 0 x 1 must divide"),
            ({"cells": (1, 1), "heads": "frozen"}, "of which a teacher's head makes nothing: heads light"),
        ],
    )
    def test_cells_that_do_not_fit_are_refused(self, cache: Cache, changes: dict[str, Any], fault: str) -> None:
        config = dataclasses.replace(plan(cache, targets=["l4p_latents", "l4p_depth"]), **{"heads": "light"} | changes)
        with pytest.raises(RequestError, match=fault):
            p4d_of(cache, config)

    def test_scales_are_no_part_of_a_checkpoint(self, cache: Cache) -> None:
        p4d = p4d_of(cache, dataclasses.replace(plan(cache, targets=["l4p_latents"]), standardised=True))
        assert not [name for name in p4d.state_dict() if "latent_" in name]

    def test_gradients_reach_hidden_states_at_video_tokens_and_the_decoder_and_nothing_else(self, cache: Cache) -> None:
        config = plan(cache, targets=["l4p_latents", *NAMES])
        p4d, tokens = p4d_of(cache, config), video_tokens()
        hidden, targets = hidden_states(), batch_of(cache, config)
        before = copy.deepcopy(p4d.frozen_heads.state_dict())
        p4d(hidden, [tokens] * 2, targets).total.backward()
        touched = torch.zeros(LENGTH, dtype=torch.bool)
        touched[tokens.positions_tyx[::2].flatten()] = True  # the teacher has a step for every second frame
        assert hidden.grad is not None
        assert ((hidden.grad != 0).any(dim=(0, 2)) == touched).all()
        assert all(p.grad is not None and (p.grad != 0).any() for p in p4d.decoder.parameters())
        assert all(p.grad is None and not p.requires_grad for p in p4d.frozen_heads.parameters())
        assert all(array.grad is None for array in targets.arrays.values())
        after = p4d.frozen_heads.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)

    def test_explicit_distillation_alone_passes_gradients_through_every_frozen_head(self, cache: Cache) -> None:
        for name in NAMES:
            config = P4DConfig(latents="l4p_latents", terms=(ExplicitTerm(target=name, weight=1.0),), latent_weight=0.0)
            p4d, hidden = p4d_of(cache, config), hidden_states()
            p4d(hidden, [video_tokens()] * 2, batch_of(cache, config)).total.backward()
            assert hidden.grad is not None
            assert (hidden.grad != 0).any(), name

    def test_samples_without_targets_change_nothing(self, cache: Cache) -> None:
        config = plan(cache, targets=["l4p_latents", "l4p_flow"])
        p4d, hidden = p4d_of(cache, config), hidden_states(3)
        mixed = p4d(hidden, [video_tokens(), None, video_tokens()], batch_of(cache, config, (0, None, 1)))
        plain = p4d(hidden[[0, 2]], [video_tokens()] * 2, batch_of(cache, config))
        assert mixed.log() == pytest.approx(plain.log(), rel=1e-12)
        with pytest.raises(ValueError, match="have targets but no video"):
            p4d(hidden, [video_tokens(), None, video_tokens()], batch_of(cache, config, (0, 1, None)))
        assert mixed.log() != pytest.approx(p4d(hidden[[2, 0]], [video_tokens()] * 2, batch_of(cache, config)).log())

    def test_a_batch_without_targets_costs_nothing_yet_sends_every_gradient(self, cache: Cache) -> None:
        config = plan(cache, targets=["l4p_latents", "l4p_flow"])
        p4d, hidden = p4d_of(cache, config), hidden_states(1)
        losses = p4d(hidden, [video_tokens()], batch_of(cache, config, (None,)))
        losses.total.backward()
        assert (losses.total.item(), losses.log()) == (0.0, {})
        assert all(p.grad is not None and not p.grad.any() for p in p4d.decoder.parameters())

    def test_half_precision_hidden_states_are_compared_in_single(self, cache: Cache) -> None:
        config = plan(cache, targets=["l4p_latents", "l4p_depth"])
        p4d = P4D(dataclasses.replace(config, hidden_channels=12), cache, HIDDEN)
        hidden = hidden_states().detach().bfloat16().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            losses = p4d(hidden, [video_tokens()] * 2, batch_of(cache, config))
        losses.total.backward()
        assert losses.total.dtype == losses.latent_k.dtype == torch.float32
        assert hidden.grad is not None
        assert hidden.grad.isfinite().all()

    def test_a_student_that_sees_other_frames_is_refused(self, cache: Cache) -> None:
        config = plan(cache, targets=["l4p_latents"])
        tokens = VideoTokens(positions_tyx=torch.zeros((2, 1, 1), dtype=torch.int64), frame_spans=((0, 3), (3, 6)))
        with pytest.raises(RequestError, match="the student sees 6 frames of a clip of 4"):
            p4d_of(cache, config)(hidden_states(), [tokens] * 2, batch_of(cache, config))


class TestSwitches:
    ALL = ("l4p_latents", *NAMES)

    @pytest.mark.parametrize(
        ("switch", "learnt"),
        [
            ("sft", set()),
            ("ld", {"ld"}),
            ("ed", set(NAMES)),
            ("ld+ed", {"ld", *NAMES}),
            ("ld+depth+flow", {"ld", "l4p_depth", "l4p_flow"}),
            *((name.removeprefix("l4p_"), {name}) for name in NAMES),
        ],
    )
    def test_a_switch_chooses_what_is_learnt_and_everything_is_logged(
        self, cache: Cache, switch: str, learnt: set[str]
    ) -> None:
        config = plan(cache, switch, targets=self.ALL)
        p4d, hidden = p4d_of(cache, config), hidden_states()
        losses = p4d(hidden, [video_tokens()] * 2, batch_of(cache, config))
        log = losses.log()
        everything = p4d_of(cache, plan(cache, targets=self.ALL))
        assert log == everything(hidden, [video_tokens()] * 2, batch_of(cache, config)).log()
        weights = {"ld": 0.5} | {n: 0.1 * w for n, w in zip(NAMES, PAPER_WEIGHTS.values(), strict=True)}
        expected = sum(weights[name] * log["ld" if name == "ld" else f"ed/{name}"] for name in learnt)
        assert losses.total.item() == pytest.approx(expected, rel=1e-9)
        assert losses.total.requires_grad == bool(learnt)
        assert any(p.requires_grad for p in p4d.parameters()) == bool(learnt)

    def test_a_plan_takes_the_teacher_with_heads_and_fills_in_nothing_ambiguous(self, cache: Cache) -> None:
        config = plan(cache)
        assert config.latents == "l4p_latents"
        assert [(term.target, term.weight) for term in config.terms] == list(
            zip(NAMES, (1.0, 0.1, 0.05, 0.05), strict=True)
        )
        assert (config.latent_weight, config.explicit_weight, config.hidden_channels) == (0.5, 0.1, 2560)

    def test_a_cache_without_latents_is_taught_through_light_heads(self, tmp_path: Path) -> None:
        groups = {"any": (DISPARITY,), "dis": (FLOW,), "truth": (MASK,)}
        cache = p4d_cache.build(tmp_path, groups)
        with pytest.raises(RequestError, match=r"has no latents.*switch to ed"):
            plan(cache)
        config = plan(cache, "ed")
        assert p4d_of(cache, config).shape.grid == (T // 2, 16, 16)
        assert p4d_of(cache, dataclasses.replace(config, cells=(3, 5))).shape.grid == (T // 2, 3, 5)
        assert [term.target for term in config.terms] == ["any_depth", "dis_flow", "truth_motion"]
        p4d, hidden = p4d_of(cache, config), hidden_states()
        assert (set(p4d.light_heads), set(p4d.frozen_heads)) == ({"any_depth", "dis_flow", "truth_motion"}, set())
        losses = p4d(hidden, [video_tokens()] * 2, batch_of(cache, config))
        losses.total.backward()
        assert set(losses.log()) == {"ed/any_depth", "ed/dis_flow", "ed/truth_motion"}
        unmoved = [name for name, p in p4d.named_parameters() if p.grad is None or not (p.grad != 0).any()]
        # A shift changes nothing of a disparity's loss, so what its bias gets is rounding, or nothing.
        assert set(unmoved) <= {"light_heads.any_depth.predict.bias"}

    def test_light_heads_learn_a_map(self, tmp_path: Path) -> None:
        cache = p4d_cache.build(tmp_path, {"metric": (p4d_cache.DEPTH,)})
        config = dataclasses.replace(plan(cache, "ed"), hidden_channels=32)
        torch.manual_seed(0)
        p4d = P4D(config, cache, HIDDEN)
        assert (p4d.predict(hidden_states().float(), [video_tokens()] * 2).maps["metric_depth"] > 0).all()
        optimizer = torch.optim.Adam(p4d.parameters(), lr=5e-3)
        hidden, targets = hidden_states().detach().float(), batch_of(cache, config)
        targets.arrays["metric_depth"][:] = torch.linspace(4, 8, p4d_cache.SIZE)
        history = []
        for _ in range(10):
            losses = p4d(hidden, [video_tokens()] * 2, targets)
            optimizer.zero_grad()
            losses.total.backward()
            optimizer.step()
            history.append(losses.log()["ed/metric_depth"])
        assert history[-1] < 0.5 * history[0]

    def test_light_heads_stand_in_for_frozen_ones_where_they_are_asked_for(self, cache: Cache) -> None:
        config = dataclasses.replace(plan(cache), heads="light")
        torch.manual_seed(0)
        p4d, hidden = p4d_of(cache, config), hidden_states()
        assert (set(p4d.light_heads), set(p4d.frozen_heads)) == (set(NAMES), set())
        losses = p4d(hidden, [video_tokens()] * 2, batch_of(cache, config))
        losses.total.backward()
        assert set(losses.explicit) == set(NAMES)
        assert all(p.grad is not None and (p.grad != 0).any() for p in p4d.light_heads.parameters())

    def test_a_light_head_is_taught_on_a_coarse_grid_and_shown_at_full_size(self) -> None:
        head = LightHead(LatentShape(num_taps=1, grid=(2, 3, 3), channels=5), 2, (4, 96, 60), "none")
        taps = torch.randn(1, 1, 2, 3, 3, 5)
        assert head(taps).shape == (1, 2, 4, 96, 60)
        assert head(taps, coarse=True).shape == (1, 2, 4, 24, 24)

    def test_a_light_head_lays_each_tokens_block_where_the_token_lies(self) -> None:
        head = LightHead(LatentShape(num_taps=2, grid=(2, 2, 3), channels=5), 2, (4, 6, 6), "none")
        taps = torch.randn(1, 2, 2, 2, 3, 5, generator=torch.Generator().manual_seed(0))
        tokens = torch.cat([taps[0, 0], taps[0, 1]], dim=-1)
        blocks = head.predict(nn.functional.gelu(head.mix(tokens))).reshape(2, 2, 3, 2, 3, 2, 2)
        values = head(taps)[0]
        assert values.shape == (2, 4, 6, 6)
        for t, y, x in np.ndindex(4, 6, 6):
            torch.testing.assert_close(values[:, t, y, x], blocks[t // 2, y // 3, x // 2, t % 2, y % 3, x % 2])

    def test_a_light_head_makes_odd_numbers_of_frames_and_maps_coarser_than_its_tokens(self) -> None:
        head = LightHead(LatentShape(num_taps=1, grid=(2, 16, 16), channels=5), 1, (5, 8, 40), "exp")
        for coarse, columns in ((False, 40), (True, 16)):
            values = head(torch.randn(2, 1, 2, 16, 16, 5), coarse=coarse)
            assert values.shape == (2, 1, 5, 8, columns)
            assert (values > 0).all()

    def test_a_map_is_shrunk_to_the_mean_of_what_is_valid(self) -> None:
        values = torch.tensor([[1.0, 3.0], [torch.nan, 5.0]]).repeat_interleave(2, 1)[None, None, :, :, None]
        values[..., 1, :2, :] = torch.nan
        small = shrunk(values, (2, 2))
        assert torch.equal(small[0, 0, :, :, 0].isnan(), torch.tensor([[False, False], [True, False]]))
        assert small[0, 0, 0, :, 0].tolist() == [1.0, 3.0]
        assert shrunk(values, (1, 1)).item() == pytest.approx((1 + 1 + 3 + 3 + 5 + 5) / 6)
        assert shrunk(values, (2, 4)) is values

    def test_a_hole_in_one_frame_leaves_the_others_as_they_are(self) -> None:
        values = torch.arange(2 * 3 * 4 * 4 * 2, dtype=torch.float32).reshape(2, 3, 4, 4, 2)
        whole = shrunk(values, (2, 2))
        torch.testing.assert_close(whole, values.unflatten(3, (2, 2)).unflatten(2, (2, 2)).mean((3, 5)))
        values[1, 0, 0, 0, 1], values[0, 2, :2, 2:] = torch.inf, torch.nan
        holed = shrunk(values, (2, 2))
        changed = torch.zeros_like(whole, dtype=torch.bool)
        changed[1, 0, 0, 0, 1] = changed[0, 2, 0, 1] = True
        torch.testing.assert_close(holed[~changed], whole[~changed])
        assert holed[1, 0, 0, 0, 1] == values[1, 0, :2, :2, 1].flatten()[1:].mean()
        assert holed[0, 2, 0, 1].isnan().all()

    def test_a_metric_loss_on_a_disparity_is_refused(self, cache: Cache) -> None:
        term = ExplicitTerm(target="any_depth", weight=1.0, loss="smooth_l1")
        with pytest.raises(RequestError, match="any_depth: loss smooth_l1 is refused"):
            p4d_of(cache, P4DConfig(latents=None, terms=(term,)))

    @pytest.mark.parametrize(
        ("switch", "targets", "message"),
        [
            ("everything", None, "switch 'everything' must be sft, or some of"),
            ("sft+ld", None, "must be sft, or some of"),
            ("ld", ["any_depth"], "has no latents"),
            ("flow", ["any_depth"], "has no target of flow"),
            ("ed", ["any_depth", "l4p_depth"], r"several targets for depth: \['any_depth', 'l4p_depth'\]"),
            ("ed", ["any_deep"], "has no target 'any_deep'; it has"),
        ],
    )
    def test_wrong_plans_are_refused(self, cache: Cache, switch: str, targets: list[str] | None, message: str) -> None:
        with pytest.raises(RequestError, match=message):
            plan(cache, switch, targets)

    def test_wrong_configs_are_refused(self, cache: Cache) -> None:
        with pytest.raises(RequestError, match="weight of a_b is -1"):
            ExplicitTerm(target="a_b", weight=-1)
        with pytest.raises(RequestError, match="nothing to distil"):
            P4DConfig(latents=None)
        with pytest.raises(RequestError, match="stands twice"):
            P4DConfig(latents=None, terms=(ExplicitTerm(target="a_b", weight=1),) * 2)
        with pytest.raises(RequestError, match="truth_instances is instance ids, which is not learnt"):
            p4d_of(cache, P4DConfig(latents=None, terms=(ExplicitTerm(target="truth_instances", weight=1),)))
        with pytest.raises(RequestError, match="l4p_flow is backward flow of"):
            p4d_of(cache, P4DConfig(latents="l4p_flow"))


class TestFrozenHeads:
    def test_heads_come_from_the_cache_to_the_last_bit(self, cache: Cache, tmp_path: Path) -> None:
        torch.manual_seed(7)
        expected = DPTHead(p4d_cache.head_config(p4d_cache.DEPTH))  # the first that the builder made of this seed
        found = load_head(cache, "l4p", "depth")
        assert all(torch.equal(a, b) for a, b in zip(found.parameters(), expected.parameters(), strict=True))
        with pytest.raises(RequestError, match="keeps no head any/depth"):
            load_head(cache, "any", "depth")

    @pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
    def test_a_changed_or_lost_head_is_refused(self, tmp_path: Path, file: str) -> None:
        cache = p4d_cache.build(tmp_path, {"l4p": (LATENTS, CAMRAY)})
        path = tmp_path / "cache" / "heads" / "l4p" / "camray" / file
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)
        with pytest.raises(CorruptDataError, match=f"camray/{file} is gone or not what was committed"):
            load_head(cache, "l4p", "camray")
        path.unlink()
        with pytest.raises(CorruptDataError, match="is gone"):
            p4d_of(cache, plan(cache))

    def test_heads_for_other_windows_than_the_clips_are_refused(self, tmp_path: Path) -> None:
        longer = dataclasses.replace(LATENTS, shape=(TAPS, T, GRID, GRID, CHANNELS))
        cache = p4d_cache.build(tmp_path, {"l4p": (longer, CAMRAY)})
        with pytest.raises(RequestError, match=r"frozen head l4p/camray is for token grid.*one window of the teacher"):
            p4d_of(cache, plan(cache))


class TestFlip:
    def test_maps_and_latents_are_mirrored_and_u_changes_its_sign(self) -> None:
        flow = p4d_cache.values_of(FLOW, 0)
        flipped = flip_x(flow, FLOW)
        np.testing.assert_array_equal(flipped[..., 0], -flow[:, :, ::-1, 0])
        np.testing.assert_array_equal(flipped[..., 1], flow[:, :, ::-1, 1])
        latents = p4d_cache.values_of(LATENTS, 0)
        np.testing.assert_array_equal(flip_x(latents, LATENTS), latents[:, :, :, ::-1])
        np.testing.assert_array_equal(flip_x(flip_x(flow, FLOW), FLOW), flow)

    def test_a_target_that_does_not_allow_it_refuses(self) -> None:
        with pytest.raises(RequestError, match=r"target camray .* does not allow flip_x; train without"):
            flip_x(p4d_cache.values_of(CAMRAY, 0), CAMRAY)
        nameless = dataclasses.replace(LATENTS, dims=("tap", "tube", "token", "cell", "channel"))
        with pytest.raises(RequestError, match=r"none of its axes .* counts columns"):
            flip_x(p4d_cache.values_of(LATENTS, 0), nameless)


def test_a_batch_of_targets_keeps_its_rows_and_ids_together() -> None:
    batch = stack_targets(["a", "b", "c"], [None, "x", "y"], [{}, {"m": np.ones(2)}, {"m": np.zeros(2)}])
    assert (batch.rows, batch.clip_ids, batch.sample_ids) == ((1, 2), ("x", "y"), ("a", "b", "c"))
    assert batch.arrays["m"].tolist() == [[1, 1], [0, 0]]
    with pytest.raises(ValueError, match=r"rows \(1, 1\) do not rise"):
        dataclasses.replace(batch, rows=(1, 1))
    with pytest.raises(ValueError, match="m has 2 rows for 1 samples"):
        dataclasses.replace(batch, rows=(1,), clip_ids=("x",))
