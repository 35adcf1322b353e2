"""The rivals of P4D: the right latents at the right tokens, no effect before they learn, the same in every family."""

from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from p4dprep.cache import Cache
from p4dprep.errors import RequestError
from student.backbones import FAMILIES, Backbone, StudentBatch, load
from student.p4d import rearrange
from student.rivals import Rival, RivalStrategy, latents_of_tokens, make_rival
from student.samples import StudentSample, Turn, VideoTokens
from student.targets import TargetBatch, cached_targets, channel_scales
from tests.student import p4d_cache
from tests.student.p4d_cache import CHANNELS, DEPTH, GRID, LATENTS, TAPS, T
from tests.student.tiny_students import CELLS, SIDE, WRITERS

STRATEGIES: tuple[RivalStrategy, ...] = get_args(RivalStrategy)
WIDTH = 32
ASKED = (Turn(role="user", text="How far is the red ball?"), Turn(role="assistant", text="It is 2.5 metres away."))

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return p4d_cache.build(tmp_path_factory.mktemp("rivals"))


def grid_of(*shape: int, spans: tuple[tuple[int, int], ...], start: int = 3) -> VideoTokens:
    places = torch.arange(start, start + int(np.prod(shape))).reshape(shape)
    return VideoTokens(positions_tyx=places, frame_spans=spans)


PAIRS = ((0, 2), (2, 4))
SINGLES = ((0, 1), (1, 2), (2, 3), (3, 4))


def random_latents(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


class TestLatentsOfTokens:
    def test_on_the_same_grid_each_token_gets_its_own_cells_latents(self) -> None:
        latents = random_latents(TAPS, 2, 3, 4, CHANNELS)
        places, found = latents_of_tokens(latents, grid_of(2, 3, 4, spans=PAIRS))
        assert places.tolist() == list(range(3, 27))
        torch.testing.assert_close(found, latents.movedim(0, -2).flatten(0, 2), rtol=0, atol=0)

    def test_a_token_of_one_frame_takes_the_step_that_covers_it(self) -> None:
        latents = random_latents(1, 2, 1, 1, CHANNELS)
        _, found = latents_of_tokens(latents, grid_of(4, 1, 1, spans=SINGLES))
        torch.testing.assert_close(found[:, 0], latents[0, [0, 0, 1, 1], 0, 0])

    def test_a_token_of_several_steps_takes_their_mean_by_frames(self) -> None:
        latents = random_latents(1, 4, 1, 1, CHANNELS)
        _, found = latents_of_tokens(latents, grid_of(2, 1, 1, spans=((0, 3), (3, 4))))
        torch.testing.assert_close(found[:, 0], torch.stack([latents[0, :3, 0, 0].mean(0), latents[0, 3, 0, 0]]))

    def test_steps_that_divide_the_frames_unevenly_are_those_that_rearrange_reads(self) -> None:
        """Five frames, two steps of the teacher: its second begins at frame 2, for both ways."""
        tokens = grid_of(5, 1, 1, spans=tuple((frame, frame + 1) for frame in range(5)), start=0)
        latents = torch.tensor([10.0, 20.0]).reshape(1, 2, 1, 1, 1)
        _, found = latents_of_tokens(latents, tokens)
        assert found.flatten().tolist() == [10, 10, 20, 20, 20]
        assert rearrange(torch.arange(5.0).reshape(1, 5, 1), [tokens], (2, 1, 1)).flatten().tolist() == [0, 2]

    def test_a_finer_grid_is_bilinear_and_a_coarser_one_loses_no_cell(self) -> None:
        column = torch.arange(4.0).repeat(4, 1)[None, None, ..., None]
        _, finer = latents_of_tokens(column, grid_of(1, 8, 8, spans=((0, 1),)))
        expected = (torch.arange(8) / 2 - 0.25).clamp(0, 3)
        torch.testing.assert_close(finer.reshape(8, 8), expected.repeat(8, 1))
        spots = torch.eye(16).reshape(1, 1, 4, 4, 16)  # channel c shows cell c alone
        _, coarser = latents_of_tokens(spots, grid_of(1, 2, 2, spans=((0, 1),)))
        quadrants = [2 * (cell // 8) + cell % 4 // 2 for cell in range(16)]
        assert coarser[:, 0].argmax(0).tolist() == quadrants
        assert coarser[:, 0].max(0).values.min() > 0.1

    def test_there_and_back_is_the_same_where_the_grids_agree(self) -> None:
        tokens = grid_of(2, GRID, GRID, spans=PAIRS, start=0)
        latents = random_latents(1, 2, GRID, GRID, CHANNELS)
        _, found = latents_of_tokens(latents, tokens)
        assert torch.equal(rearrange(found.movedim(1, 0), [tokens], (2, GRID, GRID)), latents)

    def test_a_token_that_stands_for_several_cells_takes_their_mean(self) -> None:
        """As VideoLLaMA3 leaves out what repeats the frame before."""
        latents = random_latents(1, 2, 1, 2, CHANNELS)
        places = torch.tensor([[[7, 8]], [[7, 9]]])
        found_places, found = latents_of_tokens(latents, VideoTokens(positions_tyx=places, frame_spans=PAIRS))
        assert found_places.tolist() == [7, 8, 9]
        expected = [latents[0, :, 0, 0].mean(0), latents[0, 0, 0, 1], latents[0, 1, 0, 1]]
        torch.testing.assert_close(found[:, 0], torch.stack(expected))

    def test_invalid_latents_have_no_weight_and_a_token_with_no_other_is_left_out(self) -> None:
        latents = random_latents(2, 2, 2, 2, 1)
        latents[1, 0, 0, 0] = torch.nan  # one tap is enough
        latents[:, 1] = torch.nan
        places, found = latents_of_tokens(latents, grid_of(2, 2, 2, spans=PAIRS))
        assert places.tolist() == [4, 5, 6]
        torch.testing.assert_close(found[..., 0], latents[:, 0].reshape(2, 4).T[1:])
        _, merged = latents_of_tokens(latents, grid_of(1, 2, 2, spans=((0, 4),)))
        torch.testing.assert_close(merged[..., 0], latents[:, 0].reshape(2, 4).T[1:])
        assert torch.isfinite(latents_of_tokens(latents, grid_of(2, 4, 4, spans=PAIRS))[1]).all()

    def test_fewer_frames_than_steps_are_refused(self) -> None:
        with pytest.raises(RequestError, match="the student sees 1 frames, fewer than the teacher's 2 steps"):
            latents_of_tokens(random_latents(1, 2, 1, 1, 1), grid_of(1, 1, 1, spans=((0, 1),)))


def targets_of(batch: StudentBatch, *, seed: int = 0) -> TargetBatch:
    """Random latents for every row with a video."""
    rows = tuple(row for row, tokens in enumerate(batch.video_tokens) if tokens is not None)
    values = torch.randn(len(rows), *LATENTS.shape, generator=torch.Generator().manual_seed(seed))
    clips = tuple(f"clip-{row}" for row in rows)
    return TargetBatch(sample_ids=batch.ids, rows=rows, clip_ids=clips, arrays={"l4p_latents": values})


def awake(rival: Rival) -> Rival:
    """With weights as if it had learnt."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(3)
        for parameter in rival.parameters():
            parameter.normal_(std=0.5)
    return rival


def video(seed: int = 0, num_frames: int = T, conversation: tuple[Turn, ...] = ASKED) -> StudentSample:
    frames = np.random.default_rng(seed).integers(0, 256, (num_frames, SIDE, SIDE, 3), dtype=np.uint8)
    times = np.arange(num_frames) / 2
    return StudentSample(id=f"video-{seed}", frames_thwc=frames, time_seconds=times, conversation=conversation)


def mixed_batch(student: Backbone) -> StudentBatch:
    words = StudentSample(id="words", conversation=ASKED)
    picture = StudentSample(id="picture", images_hwc=(np.zeros((SIDE, SIDE, 3), np.uint8),), conversation=ASKED)
    longer = (*ASKED, Turn(role="user", text="Which one moves?"), Turn(role="assistant", text="the left one"))
    return student.encode([video(), words, video(1, conversation=longer), picture])


@pytest.mark.parametrize("strategy", STRATEGIES)
class TestEveryFamily:
    @pytest.fixture(scope="class", params=sorted(WRITERS))
    @classmethod
    def student(cls, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
        if requirement := FAMILIES[request.param].requirement:
            pytest.importorskip(requirement)
        return load(WRITERS[request.param](tmp_path_factory.mktemp(request.param)), dtype=torch.float32)

    @pytest.fixture(scope="class")
    @classmethod
    def batch(cls, student: Backbone) -> StudentBatch:
        return mixed_batch(student)

    def test_before_it_learns_it_changes_nothing(
        self, student: Backbone, batch: StudentBatch, cache: Cache, strategy: RivalStrategy
    ) -> None:
        rival, targets = make_rival(strategy, cache, WIDTH), targets_of(batch)
        with torch.no_grad():
            plain = student.forward(batch, layer=3)
            injected = student.forward(batch, layer=3, inject=lambda embeds: rival(embeds, batch.video_tokens, targets))
        assert torch.equal(plain.logits_bsv, injected.logits_bsv)

    def test_exactly_the_video_tokens_change_and_each_by_its_own_latents(
        self, student: Backbone, batch: StudentBatch, cache: Cache, strategy: RivalStrategy
    ) -> None:
        rival, targets = awake(make_rival(strategy, cache, WIDTH)), targets_of(batch)
        seen: list[Tensor] = []

        def inject(embeds_bsc: Tensor) -> Tensor:
            painted = targets.arrays["l4p_latents"].clone()
            painted[1, :, 1, 0, 1] *= -1
            other = replace(targets, arrays={"l4p_latents": painted})
            seen.extend([embeds_bsc, *(rival(embeds_bsc, batch.video_tokens, each) for each in (targets, other))])
            return seen[1]

        with torch.no_grad():
            plain = student.forward(batch, layer=3)
            injected = student.forward(batch, layer=3, inject=inject)
        tokens = [each for each in batch.video_tokens if each is not None]
        assert len(tokens) == 2
        expected = torch.zeros(seen[0].shape[:2], dtype=torch.bool)
        for row, each in zip((0, 2), tokens, strict=True):
            expected[row, each.positions_tyx] = True
        assert torch.equal((seen[1] != seen[0]).any(-1), expected)
        change = (seen[2] - seen[1]).norm(dim=-1)
        assert not change[[0, 1, 3]].any()
        per_step = change[2][tokens[1].positions_tyx]
        late = [first >= T // 2 for first, _ in tokens[1].frame_spans]
        assert [bool(step.any()) for step in per_step] == late
        half = CELLS // GRID
        assert per_step[-1].argmax() in [y * CELLS + x for y in range(half) for x in range(half, CELLS)]
        # What is read before the video knows nothing of it; what comes after does.
        first = int(tokens[0].positions_tyx.min())
        assert torch.equal(plain.logits_bsv[0, :first], injected.logits_bsv[0, :first])
        assert not torch.equal(plain.logits_bsv[0, first:], injected.logits_bsv[0, first:])

    def test_gradients_reach_the_rival_through_the_answers(
        self, student: Backbone, batch: StudentBatch, cache: Cache, strategy: RivalStrategy
    ) -> None:
        rival, targets = awake(make_rival(strategy, cache, WIDTH)), targets_of(batch)
        student.tune("projector", "llm")
        output = student.forward(batch, layer=3, inject=lambda embeds: rival(embeds, batch.video_tokens, targets))
        assert output.loss_sft is not None
        output.loss_sft.backward()  # type: ignore[no-untyped-call]
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in rival.parameters())
        assert any(parameter.grad is not None and parameter.grad.any() for parameter in student.projector.parameters())
        student.model.zero_grad()

    def test_answers_are_generated_from_the_changed_video(
        self, student: Backbone, cache: Cache, strategy: RivalStrategy
    ) -> None:
        asking = student.encode([video(conversation=ASKED[:1]), video(1, conversation=ASKED[:1])], padding_side="left")
        rival, targets = awake(make_rival(strategy, cache, WIDTH)), targets_of(asking)
        calls: list[int] = []

        def inject(embeds_bsc: Tensor) -> Tensor:
            calls.append(embeds_bsc.shape[1])
            return rival(embeds_bsc, asking.video_tokens, targets)  # type: ignore[no-any-return]

        with torch.no_grad():
            first = student.forward(asking, layer=3, inject=inject).logits_bsv[:, -1].argmax(-1)
            with student.injecting(asking, inject):
                answers = student.model.generate(**asking.inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        length = asking.inputs["input_ids"].shape[1]
        assert calls == [length, length]
        assert answers[:, length].tolist() == first.tolist()


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return load(WRITERS["qwen2_5_vl"](tmp_path_factory.mktemp("qwen")), dtype=torch.float32)


@pytest.fixture
def tokens() -> VideoTokens:
    return grid_of(2, CELLS, CELLS, spans=PAIRS)


def one_clip(latents: Tensor) -> TargetBatch:
    return TargetBatch(sample_ids=("a",), rows=(0,), clip_ids=("clip-0",), arrays={"l4p_latents": latents[None]})


@pytest.mark.parametrize("strategy", STRATEGIES)
class TestRival:
    @pytest.fixture
    def rival(self, cache: Cache, strategy: RivalStrategy) -> Rival:
        return awake(make_rival(strategy, cache, WIDTH))

    def test_it_reads_the_latents_of_the_teacher_that_left_heads(self, rival: Rival) -> None:
        assert rival.targets == ("l4p_latents",)

    def test_the_tokens_own_content_matters_to_concat_only(
        self, rival: Rival, strategy: RivalStrategy, tokens: VideoTokens
    ) -> None:
        targets, embeds = one_clip(random_latents(*LATENTS.shape)), random_latents(1, 40, WIDTH)
        added = [(rival(each, [tokens], targets) - each).detach() for each in (embeds, embeds.flip(1))]
        assert torch.allclose(*added, atol=1e-5) == (strategy == "4d-pe")

    def test_scale_and_offset_of_a_tap_do_not_matter(self, rival: Rival, tokens: VideoTokens) -> None:
        """Taps of one encoder differ in scale by orders of magnitude."""
        latents, embeds = random_latents(*LATENTS.shape), random_latents(1, 40, WIDTH)
        found = [rival(embeds, [tokens], one_clip(each)).detach() for each in (latents, 100 * latents + 7)]
        torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)

    def test_standardised_every_channel_counts_alike_by_its_own_mean_and_spread(
        self, cache: Cache, strategy: RivalStrategy
    ) -> None:
        rival = make_rival(strategy, cache, WIDTH, standardised=True)
        rival.standardise(cache)
        ids = cache.clips().column("id").to_pylist()
        corpus = torch.stack([torch.from_numpy(cache.read(each, "l4p_latents")) for each in ids])
        read = rival.norm(corpus.movedim(1, -2).flatten(0, 3)).detach()
        torch.testing.assert_close(read.mean(0), torch.zeros(TAPS, CHANNELS), rtol=0, atol=1e-4)
        torch.testing.assert_close(read.std(0, correction=0), torch.ones(TAPS, CHANNELS), rtol=1e-4, atol=0)

    def test_standardised_a_channel_is_heard_however_faint_it_is_beside_another(
        self, cache: Cache, strategy: RivalStrategy, tokens: VideoTokens
    ) -> None:
        """As a velocity is beside a depth: LayerNorm all but loses it."""
        embeds, heard = random_latents(1, 40, WIDTH), []
        latents = random_latents(*LATENTS.shape)
        latents[..., 0] *= 1000
        for standardised in (False, True):
            rival = awake(make_rival(strategy, cache, WIDTH, standardised=standardised))
            if standardised:
                with torch.no_grad():
                    rival.norm.weight.copy_(1 / latents.std((1, 2, 3)))
            changed = latents.clone()
            changed[..., 1] *= -1
            found = [rival(embeds, [tokens], one_clip(each)).detach() for each in (latents, changed)]
            heard.append(((found[0] - found[1]).norm() / (found[0] - embeds).norm()).item())
        assert heard[0] < 0.02 < 0.1 < heard[1]

    def test_a_batch_without_clips_passes_and_gives_every_weight_a_gradient(self, rival: Rival) -> None:
        nothing = TargetBatch(sample_ids=("a",), rows=(), clip_ids=(), arrays={})
        embeds = random_latents(1, 40, WIDTH)
        found = rival(embeds, [None], nothing)
        assert torch.equal(found, embeds)
        found.sum().backward()
        assert all(parameter.grad is not None and not parameter.grad.any() for parameter in rival.parameters())

    def test_clips_without_a_valid_latent_pass_unchanged(self, rival: Rival, tokens: VideoTokens) -> None:
        embeds = random_latents(1, 40, WIDTH)
        found = rival(embeds, [tokens], one_clip(torch.full(LATENTS.shape, torch.nan)))
        assert torch.equal(found, embeds)

    def test_bfloat16_embeddings_stay_so(self, rival: Rival, tokens: VideoTokens) -> None:
        targets, embeds = one_clip(random_latents(*LATENTS.shape)), random_latents(1, 40, WIDTH)
        found = rival(embeds.bfloat16(), [tokens], targets)
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), rival(embeds, [tokens], targets), rtol=0.02, atol=0.1)
        assert rival.bfloat16()(embeds.bfloat16(), [tokens], targets).dtype == torch.bfloat16

    def test_other_frames_than_the_teachers_are_refused(self, rival: Rival) -> None:
        three = grid_of(1, CELLS, CELLS, spans=((0, 3),))
        with pytest.raises(RequestError, match="the student sees 3 frames of a clip of 4"):
            rival(random_latents(1, 40, WIDTH), [three], one_clip(random_latents(*LATENTS.shape)))

    def test_batches_that_do_not_fit_are_a_fault_of_the_caller(self, rival: Rival) -> None:
        targets = one_clip(random_latents(*LATENTS.shape))
        with pytest.raises(ValueError, match="row 0 has targets but no video"):
            rival(random_latents(1, 40, WIDTH), [None], targets)
        with pytest.raises(ValueError, match="2 videos do not fit 1 rows"):
            rival(random_latents(1, 40, WIDTH), [None, None], targets)

    def test_flops_are_those_that_torch_counts(self, rival: Rival, tokens: VideoTokens) -> None:
        targets = one_clip(random_latents(*LATENTS.shape))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            rival(random_latents(1, 40, WIDTH), [tokens], targets)
        counted = counter.flop_counts["Rival.layers"]
        assert rival.num_flops(tokens.positions_tyx.numel()) == sum(counted.values()) > 0


@pytest.mark.parametrize("hole", [torch.nan, torch.inf])
def test_scales_are_those_of_the_valid_cells(cache: Cache, hole: float) -> None:
    valid = torch.rand(LATENTS.shape, generator=torch.Generator().manual_seed(0)) < 0.7
    valid[..., 0] = False
    target = cached_targets(cache)["l4p_latents"]
    found = channel_scales(cache, [target], lambda arrays: arrays["l4p_latents"].where(valid, hole))
    ids = cache.clips().column("id").to_pylist()
    corpus = np.stack([np.where(valid, cache.read(each, "l4p_latents"), np.nan) for each in ids])[..., 1:]
    mean, spread = np.nanmean(corpus, (0, 2, 3, 4)), np.nanstd(corpus, (0, 2, 3, 4))
    np.testing.assert_allclose(found[0][:, 0, 0, 0, 1:], mean, atol=1e-5)
    np.testing.assert_allclose(found[1][:, 0, 0, 0, 1:], spread, rtol=1e-4)
    assert found[0][..., 0].eq(0).all()
    assert found[1][..., 0].eq(1).all()


class TestMaking:
    def test_a_cache_without_latents_is_refused(self, tmp_path: Path) -> None:
        cache = p4d_cache.build(tmp_path, {"any": (DEPTH,)})
        with pytest.raises(RequestError, match=r"4d-pe puts a teacher's latents .* has \['any_depth'\], none of them"):
            make_rival("4d-pe", cache, WIDTH)

    def test_naming_targets_without_latents_or_unknown_ones_is_refused(self, cache: Cache) -> None:
        for names in (["any_depth"], ["l4p_latents", "l4p_latent"]):
            with pytest.raises(RequestError, match=r"has \[.*'l4p_latents'.*\], asked for were \["):
                make_rival("4d-concat", cache, WIDTH, names)

    def test_of_several_latents_one_must_be_named(self, tmp_path: Path) -> None:
        cache = p4d_cache.build(tmp_path, {"one": (LATENTS,), "two": (LATENTS,)})
        with pytest.raises(RequestError, match=r"several targets for latents: \['one_latents', 'two_latents'\]"):
            make_rival("4d-concat", cache, WIDTH)
        assert make_rival("4d-concat", cache, WIDTH, ["two_latents"]).targets == ("two_latents",)


class TestInjecting:
    def test_several_answers_a_sample_are_refused(self, qwen: Backbone) -> None:
        batch = qwen.encode([video(conversation=ASKED[:1])], padding_side="left")
        with (
            pytest.raises(
                RequestError, match=r"the LLM reads \(2, \d+\) tokens of a batch of \(1, \d+\); .* one answer"
            ),
            qwen.injecting(batch, lambda embeds: embeds),
        ):
            qwen.model.generate(**batch.inputs, max_new_tokens=2, num_beams=2, do_sample=False)

    def test_a_model_that_is_not_run_is_a_fault(self, qwen: Backbone) -> None:
        batch = qwen.encode([video()])
        with (
            pytest.raises(RuntimeError, match="the LLM was not called, so nothing was injected"),
            qwen.injecting(batch, lambda embeds: embeds),
        ):
            pass

    def test_nothing_stays_behind_not_even_after_a_fault(self, qwen: Backbone) -> None:
        batch = qwen.encode([video()])

        def broken(_embeds: Tensor) -> Tensor:
            raise ValueError("broken on purpose")

        with torch.no_grad():
            before = qwen.forward(batch, layer=1).logits_bsv
            with pytest.raises(ValueError, match="broken on purpose"):
                qwen.forward(batch, layer=1, inject=broken)
            assert torch.equal(qwen.forward(batch, layer=1).logits_bsv, before)
