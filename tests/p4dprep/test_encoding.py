"""Every encoding passes one contract; each quantity also meets the error that docs/encodings.md promises."""

import dataclasses
from typing import Any, get_args

import numpy as np
import pytest
from numpy.typing import NDArray

from p4dprep import encoding
from p4dprep.encoding import Encoded, FixedPointFlow
from p4dprep.errors import CacheFormatError
from p4dprep.targets import Quantity, TargetSpec
from tests.p4dprep.cache.builders import DEPTH, FLOW, FRAMES, LATENTS, LOGIT, MASK, RAYS, make_values


def encode(values: NDArray[Any], spec: TargetSpec) -> Encoded:
    return encoding.choose(spec).encode(values, spec)


def round_trip(values: NDArray[Any], spec: TargetSpec) -> NDArray[Any]:
    how = encoding.choose(spec)
    return how.decode(how.encode(values, spec).parts, spec)


class EncodingContract:
    """What each encoding owes; a subclass names a target that uses it."""

    spec: TargetSpec

    def test_what_it_encodes_fits_what_it_declares(self) -> None:
        how = encoding.choose(self.spec)
        declared = {stored.suffix: stored for stored in how.stored(self.spec)}
        parts = encode(make_values(self.spec, 1), self.spec).parts
        assert {suffix for suffix, stored in declared.items() if not stored.optional} <= set(parts) <= set(declared)
        for suffix, part in parts.items():
            assert part.shape == declared[suffix].shape
            assert part.dtype == declared[suffix].dtype
            assert set(declared[suffix].dims) <= set(self.spec.dims)

    def test_decoding_gives_the_shape_and_a_physical_dtype(self) -> None:
        values = round_trip(make_values(self.spec, 1), self.spec)
        assert values.shape == self.spec.shape
        assert values.dtype in (np.dtype(self.spec.dtype), np.dtype("float32"))

    def test_encoding_twice_gives_the_same_and_leaves_the_input_alone(self) -> None:
        values = make_values(self.spec, 1)
        before = values.copy()
        first, second = encode(values, self.spec).parts, encode(values, self.spec).parts
        np.testing.assert_array_equal(values, before)
        for suffix, part in first.items():
            assert part.tobytes() == second[suffix].tobytes()

    def test_what_was_decoded_encodes_to_nearly_itself(self) -> None:
        once = round_trip(make_values(self.spec, 1), self.spec).astype(self.spec.dtype)
        twice = round_trip(once, self.spec)
        np.testing.assert_allclose(twice.astype(float), once.astype(float), rtol=2e-3, atol=2e-2)

    def test_a_name_in_a_cache_finds_it_again(self) -> None:
        how = encoding.choose(self.spec)
        assert encoding.by_name(how.name) is how


class TestDepth(EncodingContract):
    spec = DEPTH

    @pytest.mark.parametrize("size", [1e-20, 1e-3, 1, 80, 1e6, 1e30])
    def test_the_relative_error_is_the_same_at_any_scale(self, size: float) -> None:
        values = make_values(DEPTH, 1) * np.float32(size)
        error = np.abs(round_trip(values, DEPTH).astype(float) / values.astype(float) - 1)
        assert error.max() <= 2**-10
        assert error.mean() < 5e-4

    def test_nan_infinity_zero_and_the_largest_number_survive(self) -> None:
        special = np.array([np.nan, np.inf, -np.inf, 0, 65504, 1, -1, 2**-126], np.float32)
        spec = dataclasses.replace(DEPTH, dims=("x",), shape=(8,), quantity="relative disparity")
        np.testing.assert_allclose(round_trip(special, spec), special, rtol=2**-10)

    def test_half_precision_input_is_taken(self) -> None:
        spec = dataclasses.replace(DEPTH, dtype="float16")
        values = make_values(DEPTH, 1).astype(np.float16)
        np.testing.assert_allclose(round_trip(values, spec), values.astype(np.float32), rtol=2**-10)


class TestRays(EncodingContract):
    spec = RAYS

    def test_directions_turn_by_less_than_a_fiftieth_of_a_degree(self) -> None:
        directions = np.random.default_rng(0).normal(size=RAYS.shape).astype(np.float32)[..., :3]
        directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
        spec = dataclasses.replace(RAYS, shape=directions.shape)
        ours = round_trip(directions, spec).astype(float)
        sine = np.linalg.norm(np.cross(ours / np.linalg.norm(ours, axis=-1, keepdims=True), directions), axis=-1)
        assert np.degrees(np.arcsin(sine)).max() < 0.02


class TestFlow(EncodingContract):
    spec = FLOW

    def test_the_error_is_at_most_half_a_step_and_the_first_frame_stays_invalid(self) -> None:
        values = make_values(FLOW, 1)
        decoded = round_trip(values, FLOW)
        assert np.isnan(decoded[0]).all()
        assert np.abs(decoded[1:] - values[1:]).max() <= 1 / 128
        assert encode(values, FLOW).num_out_of_range == 0

    def test_vectors_out_of_range_become_invalid_whole_and_are_counted(self) -> None:
        values = make_values(FLOW, 1)
        values[1, 0, 0, 0] = 600
        values[2, 0, 1] = -1e9
        encoded = encode(values, FLOW)
        decoded = encoding.choose(FLOW).decode(encoded.parts, FLOW)
        assert encoded.num_out_of_range == 2
        assert np.isnan(decoded[1, 0, 0]).all()
        assert np.isnan(decoded[2, 0, 1]).all()
        assert np.isfinite(decoded[1:]).sum() == decoded[1:].size - 4

    def test_what_is_declared_absent_is_not_counted(self) -> None:
        values = make_values(FLOW, 1)
        values[1, 0, 0] = np.nan
        values[2, 0, 1] = 1e9
        encoded = encode(values, dataclasses.replace(FLOW, may_be_invalid=True))
        assert encoded.num_out_of_range == 1
        assert encode(values, FLOW).num_out_of_range == 2

    @pytest.mark.parametrize(
        ("side", "scale"), [(224, 1 / 64), (255, 1 / 64), (256, 1 / 32), (518, 1 / 16), (1024, 1 / 8)]
    )
    def test_the_range_covers_twice_the_frames_longer_side(self, side: int, scale: float) -> None:
        spec = dataclasses.replace(FLOW, shape=(4, 10, side, 2))
        assert FixedPointFlow().scale(spec) == scale
        assert 2 * side <= 32767 * scale


class TestLogit(EncodingContract):
    spec = LOGIT

    def test_the_error_is_at_most_half_a_step_and_the_rest_saturates(self) -> None:
        values = make_values(LOGIT, 1)
        values[0, 0, 0], values[0, 0, 1] = 40, -40
        encoded = encode(values, LOGIT)
        decoded = encoding.choose(LOGIT).decode(encoded.parts, LOGIT)
        inside = np.abs(values) <= 127 / 8
        assert np.abs(decoded - values)[inside].max() <= 1 / 16
        assert (decoded[0, 0, 0], decoded[0, 0, 1]) == (15.875, -15.875)
        assert encoded.num_out_of_range == (~inside).sum() > 0


class TestMask(EncodingContract):
    spec = MASK

    def test_a_mask_is_exact(self) -> None:
        values = make_values(MASK, 1)
        np.testing.assert_array_equal(round_trip(values, MASK), values)


class TestIds(EncodingContract):
    spec = dataclasses.replace(MASK, quantity="instance ids", dtype="uint8")

    def test_every_id_is_exact(self) -> None:
        values = (np.arange(self.spec.num_values) % 256).reshape(self.spec.shape).astype(np.uint8)
        decoded = round_trip(values, self.spec)
        np.testing.assert_array_equal(decoded, values)
        assert decoded.dtype == np.uint8


class TestVisionFeatures(EncodingContract):
    spec = dataclasses.replace(LATENTS, quantity="vision features")

    @pytest.mark.parametrize("dtype", ["float16", "float32"])
    def test_every_bit_of_the_declared_dtype_survives(self, dtype: Any) -> None:
        spec = dataclasses.replace(self.spec, dtype=dtype)
        values = make_values(spec, 1)
        found = round_trip(values, spec)
        assert found.dtype == values.dtype == dtype
        assert found.tobytes() == values.tobytes()


class TestPose(EncodingContract):
    spec = dataclasses.replace(RAYS, quantity="camera pose", dims=("t", "row", "column"), shape=(4, 4, 4))

    def test_every_bit_survives(self) -> None:
        values = make_values(self.spec, 1)
        assert round_trip(values, self.spec).tobytes() == values.tobytes()


class TestFrames(EncodingContract):
    spec = FRAMES

    def test_every_bit_survives(self) -> None:
        values = make_values(FRAMES, 1)
        np.testing.assert_array_equal(round_trip(values, FRAMES), values)


def least_cosine(ours: NDArray[Any], wanted: NDArray[Any]) -> float:
    ours, wanted = ours.astype(np.float64), wanted.astype(np.float64)
    norms = np.linalg.norm(ours, axis=-1) * np.linalg.norm(wanted, axis=-1)
    return float(((ours * wanted).sum(-1) / norms).min())


class TestLatents(EncodingContract):
    spec = LATENTS
    wide = dataclasses.replace(LATENTS, shape=(256, 384), dtype="float32")

    def test_ordinary_features_need_no_residual(self) -> None:
        values = np.random.default_rng(0).normal(size=self.wide.shape).astype(np.float32)
        assert "_residual" not in encode(values, self.wide).parts
        assert least_cosine(round_trip(values, self.wide), values) >= 0.9999

    def test_an_outlier_token_costs_the_others_nothing(self) -> None:
        values = np.random.default_rng(0).normal(size=self.wide.shape).astype(np.float32)
        values[7] *= 300
        assert "_residual" not in encode(values, self.wide).parts
        assert least_cosine(round_trip(values, self.wide), values) >= 0.9999

    def test_channels_of_any_scale_share_nothing(self) -> None:
        values = np.random.default_rng(0).normal(size=self.wide.shape).astype(np.float32)
        values *= np.exp(np.random.default_rng(1).normal(0, 2, self.wide.shape[1])).astype(np.float32)
        assert least_cosine(round_trip(values, self.wide), values) >= 0.9999

    def test_spikes_bring_the_residual_and_the_cosine_holds(self) -> None:
        rng = np.random.default_rng(0)
        values = rng.normal(size=self.wide.shape).astype(np.float32)
        values[rng.integers(256, size=384), np.arange(384)] *= 60
        encoded = encode(values, self.wide)
        assert "_residual" in encoded.parts
        without = {suffix: part for suffix, part in encoded.parts.items() if suffix != "_residual"}
        assert least_cosine(encoding.choose(self.wide).decode(without, self.wide), values) < 0.9999
        assert least_cosine(round_trip(values, self.wide), values) >= 0.9999

    def test_silent_tokens_and_channels_stay_silent(self) -> None:
        values = np.random.default_rng(0).normal(size=self.wide.shape).astype(np.float32)
        values[3], values[:, 5] = 0, 0
        decoded = round_trip(values, self.wide)
        assert not decoded[3].any()
        assert not decoded[:, 5].any()
        assert np.isfinite(decoded).all()

    def test_later_parts_follow_the_ones_that_stand(self) -> None:
        rng = np.random.default_rng(0)
        values = rng.normal(size=self.wide.shape).astype(np.float32)
        how = encoding.choose(self.wide)
        theirs = how.encode(values * 1.01, self.wide).parts
        ours = how.encode(values, self.wide, {"_token_rms": theirs["_token_rms"]}).parts
        np.testing.assert_array_equal(ours["_token_rms"], theirs["_token_rms"])
        decoded = how.decode(ours, self.wide)
        assert np.linalg.norm(decoded - values) / np.linalg.norm(values) < 0.01


def test_every_quantity_has_an_encoding() -> None:
    for quantity in get_args(Quantity):
        spec = FRAMES if quantity == FRAMES.quantity else dataclasses.replace(FLOW, quantity=quantity)
        assert encoding.choose(spec).stored(spec)


def test_an_unknown_encoding_is_a_format_error() -> None:
    with pytest.raises(CacheFormatError, match="encoding 'fp3' is unknown to this version"):
        encoding.by_name("fp3")
