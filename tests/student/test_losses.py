"""Every loss against a hand-written float64 reference, and what each quantity allows."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from p4dprep.errors import RequestError
from p4dprep.targets import Quantity
from student.losses import LOSSES, Loss, choose_loss, latent_losses, map_loss, motion_balance

pytestmark = pytest.mark.usefixtures("one_thread")

Array = NDArray[np.float64]


def smooth_l1(difference: float) -> float:
    size = abs(difference)
    return 0.5 * size * size if size < 1 else size - 0.5


def cross_entropy(logit: float, mask: float) -> float:
    probability = 1 / (1 + math.exp(-logit))
    return -(mask * math.log(probability) + (1 - mask) * math.log(1 - probability))


def normalised(values: list[float]) -> list[float]:
    median = sorted(values)[(len(values) - 1) // 2]
    spread = sum(abs(value - median) for value in values) / len(values)
    return [(value - median) / spread for value in values]


def reference(predicted: Array, target: Array, loss: Loss) -> float:
    """Loops over every pixel: mean inside a frame, sum over frames, mean over clips."""
    total = 0.0
    for clip in range(len(target)):
        for frame in range(target.shape[1]):
            pairs = [
                (p, t)
                for p, t in zip(
                    predicted[clip, frame].reshape(-1, target.shape[-1]).tolist(),
                    target[clip, frame].reshape(-1, target.shape[-1]).tolist(),
                    strict=True,
                )
                if not any(map(math.isnan, t))
            ]
            if pairs:
                total += frame_loss([p for p, _ in pairs], [t for _, t in pairs], loss)
    return total / len(target)


def frame_loss(predicted: list[list[float]], target: list[list[float]], loss: Loss) -> float:
    flat_p, flat_t = [v for pixel in predicted for v in pixel], [v for pixel in target for v in pixel]
    if loss == "scale_shift_invariant":
        if len(set(flat_t)) == 1:
            return 0.0
        terms = [abs(p - t) for p, t in zip(normalised(flat_p), normalised(flat_t), strict=True)]
    elif loss == "cross_entropy":
        terms = [cross_entropy(p, t) for p, t in zip(flat_p, flat_t, strict=True)]
    elif loss == "log_smooth_l1":
        terms = [smooth_l1(math.log(p) - math.log(t)) for p, t in zip(flat_p, flat_t, strict=True)]
    else:
        terms = [smooth_l1(p - t) for p, t in zip(flat_p, flat_t, strict=True)]
    return sum(terms) / len(terms)


def example(loss: Loss, channels: int = 1) -> tuple[Array, Array]:
    """Two clips of three frames: one whole, one with holes, and of the second clip one with nothing valid."""
    random = np.random.default_rng(3)
    predicted, target = random.standard_normal((2, 2, 3, 4, 5, channels)) * 2
    if loss == "log_smooth_l1":
        predicted, target = np.exp(predicted), np.exp(target)
    if loss == "cross_entropy":
        target = (target > 0).astype(float)
    target[:, 1, 1:3, 2, 0] = np.nan
    target[1, 2] = np.nan
    return predicted, target


@pytest.mark.parametrize(
    ("loss", "channels"),
    [("smooth_l1", 1), ("smooth_l1", 2), ("smooth_l1", 6), ("log_smooth_l1", 1), ("cross_entropy", 1)],
)
def test_a_map_loss_is_the_mean_of_valid_pixels_summed_over_frames(loss: Loss, channels: int) -> None:
    predicted, target = example(loss, channels)
    found = map_loss(torch.from_numpy(predicted), torch.from_numpy(target), loss)
    assert float(found) == pytest.approx(reference(predicted, target, loss), rel=1e-12)


def test_the_invariant_loss_shifts_each_frame_by_its_median_and_scales_it_by_its_spread() -> None:
    predicted, target = example("scale_shift_invariant")
    target[0, 0] = 2.5  # flat: it tells nothing
    found = map_loss(torch.from_numpy(predicted), torch.from_numpy(target), "scale_shift_invariant")
    assert float(found) == pytest.approx(reference(predicted, target, "scale_shift_invariant"), rel=1e-12)


def test_the_invariant_loss_does_not_feel_scale_and_shift_of_either_map() -> None:
    predicted, target = map(torch.from_numpy, example("scale_shift_invariant"))
    plain = map_loss(predicted, target, "scale_shift_invariant")
    moved = map_loss(predicted * 7 - 3, target * 0.01 + 40, "scale_shift_invariant")
    torch.testing.assert_close(moved, plain)
    assert float(map_loss(target.nan_to_num(9.0) * 5 + 1, target, "scale_shift_invariant")) < 1e-12
    assert float(map_loss(-predicted, target, "scale_shift_invariant")) != pytest.approx(float(plain), rel=1e-3)


def test_the_latent_loss_of_a_tap_is_a_mean_over_tokens_and_channels_summed_over_steps() -> None:
    predicted, target = np.random.default_rng(4).standard_normal((2, 2, 3, 2, 2, 2, 5)) * 1.5
    expected = [
        sum(
            np.mean([smooth_l1(d) for d in (predicted[clip, tap, step] - target[clip, tap, step]).ravel().tolist()])
            for clip in range(2)
            for step in range(2)
        )
        / 2
        for tap in range(3)
    ]
    found = latent_losses(torch.from_numpy(predicted), torch.from_numpy(target))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("loss", ["smooth_l1", "log_smooth_l1", "cross_entropy", "scale_shift_invariant"])
def test_gradients_are_right_and_finite_and_zero_where_the_target_is_invalid(loss: Loss) -> None:
    values, target = map(torch.from_numpy, example(loss))
    predicted = values.requires_grad_()
    assert torch.autograd.gradcheck(lambda p: map_loss(p, target, loss), predicted)
    map_loss(predicted, target, loss).backward()
    assert predicted.grad is not None
    invalid = target.isnan()
    assert predicted.grad.isfinite().all()
    assert (predicted.grad[invalid] == 0).all()
    assert (predicted.grad[~invalid] != 0).any()


def test_a_constant_prediction_has_a_finite_invariant_loss() -> None:
    _, target = map(torch.from_numpy, example("scale_shift_invariant"))
    predicted = torch.full_like(target, 0.3, requires_grad=True)
    map_loss(predicted, target, "scale_shift_invariant").backward()
    assert predicted.grad is not None
    assert predicted.grad.isfinite().all()


@pytest.mark.parametrize(
    ("quantity", "default"),
    [
        ("metric depth", "log_smooth_l1"),
        ("relative disparity", "scale_shift_invariant"),
        ("relative depth", "scale_shift_invariant"),
        ("backward flow", "smooth_l1"),
        ("motion logit", "smooth_l1"),
        ("motion mask", "cross_entropy"),
        ("plücker rays", "smooth_l1"),
    ],
)
def test_each_quantity_has_its_loss(quantity: Quantity, default: Loss) -> None:
    assert choose_loss("a_b", quantity, None) == default
    assert [choose_loss("a_b", quantity, loss) for loss in LOSSES[quantity]] == list(LOSSES[quantity])


@pytest.mark.parametrize("quantity", ["relative disparity", "relative depth"])
@pytest.mark.parametrize("loss", ["smooth_l1", "log_smooth_l1"])
def test_a_metric_loss_on_a_relative_quantity_is_refused(quantity: Quantity, loss: Loss) -> None:
    with pytest.raises(RequestError, match=f"any_depth: loss {loss} is refused.*scale and shift only; use scale_shift"):
        choose_loss("any_depth", quantity, loss)


def test_a_loss_without_meaning_and_a_quantity_that_is_no_map_are_refused() -> None:
    with pytest.raises(RequestError, match=r"loss cross_entropy is refused, since backward flow .* use smooth_l1"):
        choose_loss("l4p_flow", "backward flow", "cross_entropy")
    with pytest.raises(RequestError, match="truth_pose is camera pose, which is not learnt"):
        choose_loss("truth_pose", "camera pose", None)


class TestMotionBalance:
    def test_what_moves_counts_together_as_much_as_what_stands(self) -> None:
        moving = torch.zeros(1, 2, 4, 5, dtype=torch.float64)
        moving[0, 0, 1, 2] = 1
        moving[0, 1, :2] = 1
        weights = motion_balance(moving)
        torch.testing.assert_close((weights * moving).sum((2, 3)), torch.full((1, 2), 10.0).double())
        torch.testing.assert_close((weights * (1 - moving)).sum((2, 3)), torch.full((1, 2), 10.0).double())

    def test_a_cell_that_moves_in_part_counts_by_its_share(self) -> None:
        weights = motion_balance(torch.tensor([[[[0.5, 0.0, 0.0, 0.0]]]], dtype=torch.float64))
        expected = [(0.5 / 0.125 + 0.5 / 0.875) / 2, *[1 / 0.875 / 2] * 3]
        assert weights.flatten().tolist() == pytest.approx(expected)

    @pytest.mark.parametrize("value", [0.0, 1.0])
    def test_a_frame_of_one_kind_is_weighed_as_ever(self, value: float) -> None:
        assert (motion_balance(torch.full((1, 1, 3, 3), value)) == 1).all()

    def test_a_few_cells_taken_for_moving_never_rule_a_frame(self) -> None:
        moving = torch.zeros(1, 1, 100, 100, dtype=torch.float64)
        moving[..., 0, 0] = 1  # a ten thousandth: balance has one hundredth of its strength
        weights = motion_balance(moving)
        assert weights.mean().item() == pytest.approx(1)
        assert 1 < weights.max() <= 51
        assert weights[..., 0, 0].item() == pytest.approx(1 + 0.01 * (5000 - 1))

    @pytest.mark.parametrize("loss", ["smooth_l1", "log_smooth_l1", "cross_entropy", "scale_shift_invariant"])
    def test_a_weighted_map_loss_is_each_frames_weighted_mean(self, loss: Loss) -> None:
        predicted, target = (torch.from_numpy(each) for each in example(loss))
        weights = torch.from_numpy(np.random.default_rng(1).uniform(0.1, 3, target.shape[:4]))
        one_pixel = torch.zeros_like(weights)
        one_pixel[:, :, 3, 3] = 0.7  # a single valid pixel: its own difference, whatever its weight
        plain = map_loss(predicted, target, loss).item()
        assert map_loss(predicted, target, loss, torch.full_like(weights, 2.5)).item() == pytest.approx(plain)
        assert map_loss(predicted, target, loss, weights).item() != pytest.approx(plain, rel=1e-3)
        if loss != "scale_shift_invariant":
            frames = [(clip, frame) for clip in range(2) for frame in range(3) if (clip, frame) != (1, 2)]
            single = [reference(*(each[c : c + 1, f : f + 1, 3:4, 3:4].numpy() for each in (predicted, target)), loss)
                      for c, f in frames]  # fmt: skip
            assert map_loss(predicted, target, loss, one_pixel).item() == pytest.approx(sum(single) / 2)

    def test_a_weighted_latent_loss_is_each_steps_weighted_mean(self) -> None:
        generator = torch.Generator().manual_seed(0)
        predicted, target = torch.randn((2, 2, 3, 2, 3, 4, 5), generator=generator, dtype=torch.float64)
        weights = torch.zeros((2, 2, 3, 4), dtype=torch.float64)
        weights[:, :, 1, 2] = 12.0
        expected = latent_losses(predicted[:, :, :, 1:2, 2:3], target[:, :, :, 1:2, 2:3])
        torch.testing.assert_close(latent_losses(predicted, target, weights), expected)
