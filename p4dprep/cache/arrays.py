"""One zarr v3 array whose chunks are single clips: its metadata by zarr-python, its chunks by a few lines of our own.

PERFORMANCE.md measured zarr-python at 4-25 times the cost of the bytes themselves; the codec chain recorded in the
array's `zarr.json` is a few calls. Tests prove that zarr-python and xarray read what is written here.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numcodecs import blosc
from numpy.typing import NDArray
from zarr.storage import MemoryStore

from p4dprep.encoding import Codec, plain_codecs
from p4dprep.errors import CacheFormatError, CorruptDataError
from p4dprep.storage import Store

TIME_ARRAY = "time_seconds"
_NUM_CHECKSUM_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class ClipArray:
    """An array (clip, *shape) with one object per clip.

    Attributes:
        name: its folder under the cache's root.
        dims: names of the axes after `clip`.
        shape: sizes of those axes.
        dtype: numpy name.
        codecs: zarr v3 codec chain: bytes, blosc or nothing, crc32c.
        fill_value: what zarr shows where no object is.
        attributes: attributes of the array, JSON.
        optional: whether a committed clip may lack the object.
    """

    name: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    codecs: tuple[Codec, ...]
    fill_value: float | bool
    attributes: Mapping[str, Any]
    optional: bool = False

    def key(self, index: int) -> str:
        """Key of a clip's object."""
        return f"{self.name}/c.{index}" + ".0" * len(self.shape)

    @cached_property
    def num_bytes(self) -> int:
        """Size of one clip in memory."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @cached_property
    def _blosc(self) -> dict[str, Any] | None:
        return next((codec["configuration"] for codec in self.codecs if codec["name"] == "blosc"), None)

    def __post_init__(self) -> None:
        names = [codec["name"] for codec in self.codecs]
        if names not in (["bytes", "crc32c"], ["bytes", "blosc", "crc32c"]):
            raise CacheFormatError(f"array {self.name} has codecs {names}, which this version does not read")

    def encode(self, values: NDArray[Any]) -> bytes:
        """One clip's object.

        Raises:
            ValueError: the shape or dtype is not the array's.
        """
        if values.shape != self.shape or values.dtype != np.dtype(self.dtype):
            raise ValueError(f"{self.name} takes {self.dtype} {self.shape}, not {values.dtype} {values.shape}")
        stored = np.ascontiguousarray(values)
        if self._blosc is None:
            data: Any = stored.reshape(-1).view(np.uint8)
        else:
            setting = self._blosc
            shuffle = {"noshuffle": 0, "shuffle": 1, "bitshuffle": 2}[setting["shuffle"]]
            flat = stored.reshape(-1).view(f"u{setting['typesize']}")
            data = blosc.compress(flat, setting["cname"].encode(), setting["clevel"], shuffle, setting["blocksize"])
        return b"".join((data, google_crc32c.value(data).to_bytes(_NUM_CHECKSUM_BYTES, "little")))

    def decode(self, data: bytes, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """One clip's values from its object, into `out` if given (C-contiguous, of the array's shape and dtype).

        Raises:
            CorruptDataError: the bytes fail their checksum or do not make an array of this shape.
        """
        body = np.frombuffer(data, np.uint8)[:-_NUM_CHECKSUM_BYTES]
        self._check_sum(body, data[-_NUM_CHECKSUM_BYTES:])
        values = np.empty(self.shape, self.dtype) if out is None else out
        target = values.reshape(-1).view(np.uint8)
        if self._blosc is None:
            self._check_size(len(body))
            target[:] = body
        else:
            try:
                self._check_size(int.from_bytes(data[4:8], "little"))  # of the blosc 1 header: nbytes
                blosc.decompress(body, target)
            except (RuntimeError, ValueError) as error:
                raise CorruptDataError(f"it cannot be decompressed: {error}") from None
        return values

    def read(self, store: Store, index: int, size_bytes: int, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """One clip's values; where nothing is to decode, the disk fills the array itself.

        Raises:
            CorruptDataError: the object is gone, has another size than its record says, or fails its checksum.
        """
        key = self.key(index)
        try:
            if store.is_local and self._blosc is None:
                return self._read_direct(store, key, out)
            data = store.get(key)
            if len(data) != size_bytes:
                raise CorruptDataError(f"it has {len(data)} bytes, its commit record says {size_bytes}")
            return self.decode(data, out)
        except FileNotFoundError:
            raise CorruptDataError(f"{store.url}/{key} is committed but gone; run `p4dprep cache verify`") from None
        except CorruptDataError as error:
            raise CorruptDataError(f"{store.url}/{key} is damaged: {error}; run `p4dprep cache verify`") from None

    def _read_direct(self, store: Store, key: str, out: NDArray[Any] | None) -> NDArray[Any]:
        values = np.empty(self.shape, self.dtype) if out is None else out
        body, check = values.reshape(-1).view(np.uint8), bytearray(_NUM_CHECKSUM_BYTES)
        if not store.read_into(key, (body.data, memoryview(check))):
            raise CorruptDataError(f"it has not {self.num_bytes + _NUM_CHECKSUM_BYTES} bytes")
        self._check_sum(body, check)
        return values

    def _check_sum(self, body: NDArray[np.uint8], check: bytes | bytearray) -> None:
        if google_crc32c.value(body) != int.from_bytes(check, "little"):
            raise CorruptDataError("its bytes fail their checksum")

    def _check_size(self, num_bytes: int) -> None:
        if num_bytes != self.num_bytes:
            raise CorruptDataError(f"it decodes to {num_bytes} bytes, not {self.num_bytes}")

    @cached_property
    def _metadata(self) -> str:
        array = zarr.create_array(
            MemoryStore(),
            shape=(0, *self.shape),
            chunks=(1, *self.shape),
            dtype=self.dtype,
            filters=(),
            serializer=self.codecs[0],
            compressors=list(self.codecs[1:]),
            fill_value=self.fill_value,
            attributes=dict(self.attributes),
            dimension_names=("clip", *self.dims),
            chunk_key_encoding={"name": "default", "separator": "."},
            zarr_format=3,
        )
        return json.dumps(array.metadata.to_dict())

    def metadata(self, num_clips: int) -> dict[str, Any]:
        """The array's `zarr.json`, made by zarr-python."""
        made: dict[str, Any] = json.loads(self._metadata)
        return made | {"shape": [num_clips, *self.shape]}


def time_array(num_frames: int) -> ClipArray:
    """The clock: presentation times of a clip's frames, float64 seconds from the start of its video."""
    return ClipArray(
        name=TIME_ARRAY,
        dims=("t",),
        shape=(num_frames,),
        dtype="float64",
        codecs=plain_codecs("float64"),
        fill_value=math.nan,
        attributes={"units": "s", "long_name": "presentation time of each frame from the start of its video"},
    )
