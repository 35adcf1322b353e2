"""How a target lies in storage: small, close to the teacher's numbers, and readable without this code where possible.

Every encoding but that of latents is plain CF: `xarray.open_zarr` returns physical values by itself. docs/encodings.md
has the measured bytes, errors and speeds behind each choice, and the command that measures them again.

Shape suffixes: `n` tokens, `c` channels.
"""
# ruff: noqa: ARG002  (one signature for all encodings, though few need every argument)

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from p4dprep.errors import CacheFormatError
from p4dprep.targets import Quantity, TargetSpec

Codec = dict[str, Any]
"""One codec of a zarr v3 array, as its `zarr.json` spells it."""

_BLOSC_BYTES = 1 << 19
"""Bytes of a blosc block. Its own choice, 32 KiB, writes a fifth slower, reads a third slower, takes 3 to 6% more."""

_FRAMES_BLOSC_BYTES = 1 << 21
"""For frames: a block that holds several of them finds again what did not move."""

NOTHING: Mapping[str, NDArray[Any]] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class StoredArray:
    """One zarr array that keeps (a part of) a target; every size is that of one clip.

    Attributes:
        suffix: appended to the target's name; empty for the main array.
        dims: axis names as in the target's spec, without `clip`.
        shape: sizes of those axes.
        dtype: numpy name of what is stored.
        codecs: zarr v3 codec chain for a chunk of shape (1, *shape).
        fill_value: what zarr shows where no object is; for an optional array that is the true value.
        attributes: CF attributes that let xarray decode the array.
        optional: whether a clip may lack the object; its commit record tells.
    """

    suffix: str = ""
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    codecs: tuple[Codec, ...]
    fill_value: float | bool = 0
    attributes: Mapping[str, Any] = field(default_factory=dict)
    optional: bool = False


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A clip's target as its stored arrays hold it.

    Attributes:
        parts: suffix of a stored array to its values; an optional one may be absent.
        num_out_of_range: values the encoding could not hold: marked invalid (flow) or saturated (logits).
    """

    parts: dict[str, NDArray[Any]]
    num_out_of_range: int = 0


def little_endian(itemsize: int) -> Codec:
    """The array-to-bytes codec of zarr v3."""
    return {"name": "bytes", "configuration": {"endian": "little"}} if itemsize > 1 else {"name": "bytes"}


def checksum() -> Codec:
    """CRC-32C behind the bytes: any zarr reader notices a flipped bit, at about 20 GB/s."""
    return {"name": "crc32c"}


def blosc(itemsize: int, level: int = 1, block_bytes: int = _BLOSC_BYTES) -> Codec:
    """Bit planes, then zstd: planes that rounding emptied cost nothing."""
    settings = {
        "cname": "zstd",
        "clevel": level,
        "shuffle": "bitshuffle",
        "typesize": itemsize,
        "blocksize": block_bytes,
    }
    return {"name": "blosc", "configuration": settings}


def plain_codecs(dtype: str) -> tuple[Codec, ...]:
    """Raw little-endian bytes and their checksum, for what does not compress."""
    return little_endian(np.dtype(dtype).itemsize), checksum()


def packed_codecs(dtype: str) -> tuple[Codec, ...]:
    """Compressed bytes and their checksum."""
    itemsize = np.dtype(dtype).itemsize
    return little_endian(itemsize), blosc(itemsize), checksum()


class Encoding(ABC):
    """A reversible way to store one target. Stateless; its name stands in the cache and fixes every parameter."""

    name: ClassVar[str]

    @abstractmethod
    def stored(self, spec: TargetSpec) -> tuple[StoredArray, ...]:
        """The arrays that keep the target, in the order they are written: a part stands before what depends on it."""

    @abstractmethod
    def encode(self, values: NDArray[Any], spec: TargetSpec, standing: Mapping[str, NDArray[Any]] = NOTHING) -> Encoded:
        """One clip's values, of the spec's shape and dtype, as stored arrays.

        Args:
            values: one clip's target.
            spec: its declaration.
            standing: parts that another writer has stored already; the other parts must fit to them.
        """

    @abstractmethod
    def decode(self, parts: Mapping[str, NDArray[Any]], spec: TargetSpec) -> NDArray[Any]:
        """Physical values in the spec's shape; NaN where invalid. float32 unless the spec says otherwise."""


class RoundedFloat(Encoding):
    """float32 with its mantissa rounded to a few bits, so that most bit planes are empty.

    Relative error is at most 2^-(bits + 1), at any scale: a relative depth has none of its own. NaN stays NaN.
    """

    name = "float32-mantissa9"
    mantissa_bits: ClassVar[int] = 9

    def stored(self, spec: TargetSpec) -> tuple[StoredArray, ...]:
        """One float32 array."""
        return (
            StoredArray(
                dims=spec.dims,
                shape=spec.shape,
                dtype="float32",
                codecs=packed_codecs("float32"),
                fill_value=math.nan,
                attributes={"mantissa_bits": self.mantissa_bits},
            ),
        )

    def encode(self, values: NDArray[Any], spec: TargetSpec, standing: Mapping[str, NDArray[Any]] = NOTHING) -> Encoded:
        """Round half to even at the last kept bit; NaN and infinity keep their bits."""
        rounded = np.array(values, np.float32)
        bits = rounded.view(np.uint32)
        drop = 23 - self.mantissa_bits
        special = ~np.isfinite(rounded)
        kept = bits[special]
        half = bits >> np.uint32(drop)
        half &= np.uint32(1)
        half += np.uint32((1 << (drop - 1)) - 1)
        bits += half
        bits &= np.uint32(0xFFFFFFFF ^ ((1 << drop) - 1))
        bits[special] = kept
        return Encoded(parts={"": rounded})

    def decode(self, parts: Mapping[str, NDArray[Any]], spec: TargetSpec) -> NDArray[Any]:
        """The stored numbers themselves."""
        return parts[""]


class RoundedRays(RoundedFloat):
    """As `RoundedFloat`, with more bits: the angle between rays of neighbouring pixels is small."""

    name = "float32-mantissa12"
    mantissa_bits = 12


class ExactFloat(Encoding):
    """float32 as it is, for a few numbers of which each counts, such as camera poses."""

    name = "float32"

    def stored(self, spec: TargetSpec) -> tuple[StoredArray, ...]:
        """One float32 array."""
        codecs = plain_codecs("float32")
        return (StoredArray(dims=spec.dims, shape=spec.shape, dtype="float32", codecs=codecs, fill_value=math.nan),)

    def encode(self, values: NDArray[Any], spec: TargetSpec, standing: Mapping[str, NDArray[Any]] = NOTHING) -> Encoded:
        """As they are."""
        return Encoded(parts={"": np.asarray(values, np.float32)})

    def decode(self, parts: Mapping[str, NDArray[Any]], spec: TargetSpec) -> NDArray[Any]:
        """As they are."""
        return parts[""]


class AsDeclared(Encoding):
    """Every bit of the numbers, in the dtype that the teacher declares: for what a network reads on, not a target."""

    name = "as-declared"

    def stored(self, spec: TargetSpec) -> tuple[StoredArray, ...]:
        """One array of the spec's dtype."""
        codecs = plain_codecs(spec.dtype)
        return (StoredArray(dims=spec.dims, shape=spec.shape, dtype=spec.dtype, codecs=codecs, fill_value=math.nan),)

    def encode(self, values: NDArray[Any], spec: TargetSpec, standing: Mapping[str, NDArray[Any]] = NOTHING) -> Encoded:
        """As they are."""
        return Encoded(parts={"": np.asarray(values, spec.dtype)})

    def decode(self, parts: Mapping[str, NDArray[Any]], spec: TargetSpec) -> NDArray[Any]:
        """As they are."""
        return parts[""]


class FixedPointFlow(Encoding):
    """int16 steps of a power of two, 1/64 px for frames up to 256 px: error at most 1/128 px in u and in v.

    The range covers at least twice the frame's longer side. A vector beyond it, or not finite, is marked invalid; it
    is counted unless it was NaN where the spec allows that.
    """

    name = "flow-int16"
    invalid: ClassVar[int] = -32768

    def scale(self, spec: TargetSpec) -> float:
        """Pixels per step."""
        longer_side = max(size for dim, size in zip(spec.dims, spec.shape, strict=True) if dim not in ("t", "uv"))
        return 2.0 ** max(-6, math.ceil(math.log2(2 * longer_side / 32767)))

    def stored(self, spec: TargetSpec) -> tuple[StoredArray, ...]:
        """One int16 array."""
        return (
            StoredArray(
                dims=spec.dims,
                shape=spec.shape,
                dtype="int16",
                codecs=packed_codecs("int16"),
                fill_value=self.invalid,
                attributes={"scale_factor": self.scale(spec), "_FillValue": self.invalid},
            ),
        )

    def encode(self, values: NDArray[Any], spec: TargetSpec, standing: Mapping[str, NDArray[Any]] = NOTHING) -> Encoded:
        """Round to steps; whole vectors become invalid, and those outside the invalid frame are counted."""
        frames = spec.valid_frames()
        steps = np.multiply(values[frames], np.float32(1 / self.scale(spec)), dtype=np.float32)
        np.rint(steps, out=steps)
        num_bad = 0
        if steps.size and not (steps.min() >= -32767 and steps.max() <= 32767):  # a NaN fails both
            uv = spec.dims.index("uv")
            bad = ~(np.abs(steps) <= 32767).all(axis=uv, keepdims=True)
            uncounted = np.isnan(steps).any(axis=uv, keepdims=True) if spec.may_be_invalid else np.False_
            num_bad = int((bad & ~uncounted).sum())
            np.copyto(steps, np.float32(self.invalid), where=bad)
        codes = np.full(values.shape, self.invalid, np.int16)
        codes[frames] = steps
        return Encoded(parts={"": codes}, num_out_of_range=num_bad)

    def decode(self, parts: Mapping[str, NDArray[Any]], spec: TargetSpec) -> NDArray[Any]:
        """Pixels, float32."""
        return _from_steps(parts[""], self.scale(spec), self.invalid)


def _from_steps(codes: NDArray[Any], scale: float, invalid: int) -> NDArray[np.float32]:
    values: NDArray[np.float32] = np.multiply(codes, np.float32(scale), dtype=np.float32)
    if codes.min() == invalid:
        np.copyto(values, np.float32(np.nan), where=codes == invalid)
    return values


class LogitSteps(Encoding):
    """int8 steps of 1/8, saturating at +-15.875: a sigmoid's value there is 1e-7 from 0 or 1; error at most 1/16."""

    name = "logit-int8"
    scale: ClassVar[float] = 1 / 8
    invalid: ClassVar[int] = -128

    def stored(self, spec: TargetSpec) -> tuple[StoredArray, ...]:
        """One int8 array."""
        return (
            StoredArray(
                dims=spec.dims,
                shape=spec.shape,
                dtype="int8",
                codecs=packed_codecs("int8"),
                fill_value=self.invalid,
                attributes={"scale_factor": self.scale, "_FillValue": self.invalid},
            ),
        )

    def encode(self, values: NDArray[Any], spec: TargetSpec, standing: Mapping[str, NDArray[Any]] = NOTHING) -> Encoded:
        """Round to steps and saturate; NaN is marked invalid."""
        steps = np.multiply(values, np.float32(1 / self.scale), dtype=np.float32)
        np.rint(steps, out=steps)
        if steps.min() >= -127 and steps.max() <= 127:  # a NaN fails both
            return Encoded(parts={"": steps.astype(np.int8)})
        num_saturated = int((np.abs(steps) > 127).sum())
        invalid = np.isnan(steps)
        np.clip(steps, -127, 127, out=steps)
        np.copyto(steps, np.float32(self.invalid), where=invalid)
        return Encoded(parts={"": steps.astype(np.int8)}, num_out_of_range=num_saturated)

    def decode(self, parts: Mapping[str, NDArray[Any]], spec: TargetSpec) -> NDArray[Any]:
        """Logits, float32."""
        return _from_steps(parts[""], self.scale, self.invalid)


class Mask(Encoding):
    """Booleans; one bit plane of eight survives, and zstd takes the rest."""

    name = "bool"

    def stored(self, spec: TargetSpec) -> tuple[StoredArray, ...]:
        """One bool array."""
        return (
            StoredArray(dims=spec.dims, shape=spec.shape, dtype="bool", codecs=packed_codecs("bool"), fill_value=False),
        )

    def encode(self, values: NDArray[Any], spec: TargetSpec, standing: Mapping[str, NDArray[Any]] = NOTHING) -> Encoded:
        """As they are."""
        return Encoded(parts={"": np.asarray(values, bool)})

    def decode(self, parts: Mapping[str, NDArray[Any]], spec: TargetSpec) -> NDArray[Any]:
        """As they are."""
        return parts[""]


class Labels(Mask):
    """Ids of up to 256 things; large areas of one id compress to nearly nothing."""

    name = "uint8"

    def stored(self, spec: TargetSpec) -> tuple[StoredArray, ...]:
        """One uint8 array."""
        return (StoredArray(dims=spec.dims, shape=spec.shape, dtype="uint8", codecs=packed_codecs("uint8")),)

    def encode(self, values: NDArray[Any], spec: TargetSpec, standing: Mapping[str, NDArray[Any]] = NOTHING) -> Encoded:
        """As they are."""
        return Encoded(parts={"": np.asarray(values, np.uint8)})


class ExactFrames(Labels):
    """Pictures, bit by bit what the decoder gave: training from them is training from the video."""

    name = "rgb-uint8"

    def stored(self, spec: TargetSpec) -> tuple[StoredArray, ...]:
        """One uint8 array, its blocks larger than other targets'."""
        codecs = little_endian(1), blosc(1, block_bytes=_FRAMES_BLOSC_BYTES), checksum()
        return (StoredArray(dims=spec.dims, shape=spec.shape, dtype="uint8", codecs=codecs),)


class ScaledLatents(Encoding):
    """int8 codes with two scales: value = (codes + residual / 254) * token_rms * channel_scale.

    Each token is divided by its RMS first, or an outlier token would eat the range of every channel. Where the cosine
    of any token with the teacher's falls under 0.9999, the clip also gets the residual: 16 bits in all. The last axis
    is the channels, all others count tokens.
    """

    name = "latents-int8"
    least_cosine: ClassVar[float] = 0.9999

    def stored(self, spec: TargetSpec) -> tuple[StoredArray, ...]:
        """The scales, the codes that depend on them, and the residual that most clips lack."""
        formula = "value = (codes + residual / 254) * token_rms * channel_scale"
        codes = StoredArray(
            dims=spec.dims, shape=spec.shape, dtype="int8", codecs=plain_codecs("int8"), attributes={"formula": formula}
        )
        residual = dataclasses.replace(codes, suffix="_residual", optional=True)
        token_rms = _scales("_token_rms", spec.dims[:-1], spec.shape[:-1])
        return token_rms, _scales("_channel_scale", spec.dims[-1:], spec.shape[-1:]), codes, residual

    def encode(self, values: NDArray[Any], spec: TargetSpec, standing: Mapping[str, NDArray[Any]] = NOTHING) -> Encoded:
        """Codes and scales; the residual too where codes alone turn a token too far."""
        shape = values.shape
        values_nc = np.asarray(values, np.float32).reshape(-1, shape[-1])
        squares_n = np.vecdot(values_nc, values_nc)
        rms_n = standing.get("_token_rms", np.sqrt(squares_n / np.float32(shape[-1]))).reshape(-1)
        scaled_nc = values_nc / np.where(rms_n > 0, rms_n, np.float32(1))[:, None]
        peak_c = np.maximum(scaled_nc.max(axis=0), -scaled_nc.min(axis=0))
        scale_c = standing.get("_channel_scale", peak_c / np.float32(127))
        scaled_nc /= np.where(scale_c > 0, scale_c, np.float32(1))
        ours_nc = np.rint(scaled_nc)  # fresh memory costs more than the arithmetic, so it is used again
        np.clip(ours_nc, -127, 127, out=ours_nc)
        codes_nc = standing.get("", ours_nc).reshape(scaled_nc.shape).astype(np.int8)
        parts: dict[str, NDArray[Any]] = {
            "": codes_nc.reshape(shape),
            "_token_rms": rms_n.reshape(shape[:-1]),
            "_channel_scale": scale_c,
        }
        np.multiply(codes_nc, scale_c, out=ours_nc)
        if _least_cosine(ours_nc, values_nc, squares_n) < self.least_cosine:
            scaled_nc -= codes_nc
            scaled_nc *= np.float32(254)
            residual_nc = np.clip(np.rint(scaled_nc, out=scaled_nc), -127, 127, out=scaled_nc)
            parts["_residual"] = residual_nc.astype(np.int8).reshape(shape)
        return Encoded(parts=parts)

    def decode(self, parts: Mapping[str, NDArray[Any]], spec: TargetSpec) -> NDArray[Any]:
        """The latents, in the spec's dtype."""
        values: NDArray[Any]
        if "_residual" in parts:
            values = np.multiply(parts["_residual"], np.float32(1 / 254), dtype=np.float32)
            values += parts[""]
            values *= parts["_channel_scale"]
        else:
            values = np.multiply(parts[""], parts["_channel_scale"], dtype=np.float32)
        values *= parts["_token_rms"][..., None]
        return values.astype(spec.dtype, copy=False)


def _scales(suffix: str, dims: tuple[str, ...], shape: tuple[int, ...]) -> StoredArray:
    return StoredArray(suffix=suffix, dims=dims, shape=shape, dtype="float32", codecs=plain_codecs("float32"))


def _least_cosine(
    ours_nc: NDArray[np.float32], theirs_nc: NDArray[np.float32], squares_n: NDArray[np.float32]
) -> float:
    """The smallest cosine between matching rows, given the squared norms of theirs; rows of zeros agree."""
    norms_n = np.sqrt(np.vecdot(ours_nc, ours_nc)) * np.sqrt(squares_n)
    cosine_n = np.vecdot(ours_nc, theirs_nc) / np.where(norms_n > 0, norms_n, 1)
    return float(np.where(theirs_nc.any(axis=-1), cosine_n, 1).min())


_ENCODINGS: dict[str, Encoding] = {
    encoding.name: encoding
    for encoding in (
        RoundedFloat(),
        RoundedRays(),
        ExactFloat(),
        AsDeclared(),
        FixedPointFlow(),
        LogitSteps(),
        Mask(),
        Labels(),
        ExactFrames(),
        ScaledLatents(),
    )
}
_BY_QUANTITY: dict[Quantity, str] = {
    "metric depth": RoundedFloat.name,
    "relative depth": RoundedFloat.name,
    "relative disparity": RoundedFloat.name,
    "forward flow": FixedPointFlow.name,
    "backward flow": FixedPointFlow.name,
    "motion logit": LogitSteps.name,
    "motion mask": Mask.name,
    "visibility mask": Mask.name,
    "instance ids": Labels.name,
    "rgb frames": ExactFrames.name,
    "plücker rays": RoundedRays.name,
    "camera pose": ExactFloat.name,
    "camera intrinsics": ExactFloat.name,
    "latents": ScaledLatents.name,
    "vision features": AsDeclared.name,
}


def choose(spec: TargetSpec) -> Encoding:
    """The encoding that new caches use for a target."""
    return _ENCODINGS[_BY_QUANTITY[spec.quantity]]


def by_name(name: str) -> Encoding:
    """The encoding that a cache names.

    Raises:
        CacheFormatError: this version does not know it.
    """
    if name not in _ENCODINGS:
        raise CacheFormatError(f"encoding {name!r} is unknown to this version, which knows {sorted(_ENCODINGS)}")
    return _ENCODINGS[name]
