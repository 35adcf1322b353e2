"""One teacher's targets in a cache: what made them, where their arrays are, writing and reading clips."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p4dprep import encoding
from p4dprep.cache.arrays import ClipArray, time_array
from p4dprep.cache.ledger import ClipResult, ClipStates, Ledger, ObjectRecord
from p4dprep.errors import CacheFormatError, CorruptDataError, MissingDataError, RequestError, VideoError
from p4dprep.storage import Store, sha256_hex
from p4dprep.targets import SHARED_DIMS, FrameGeometry, TargetSpec


@dataclass(frozen=True, kw_only=True)
class GroupManifest:
    """What `ledger/<group>/group.json` holds; written once, before the first array.

    Attributes:
        name: the group's name, the first part of its arrays' names.
        teacher: the teacher's spec as the user may give it again.
        fingerprint: flat fields that determine the targets.
        targets: what the teacher makes.
        encodings: name of the encoding of each target.
        heads: objects of the frozen heads under `heads/<group>/`.
        creator: version of p4dprep that made the group.
    """

    name: str
    teacher: str
    fingerprint: Mapping[str, str]
    targets: tuple[TargetSpec, ...]
    encodings: tuple[str, ...]
    heads: tuple[ObjectRecord, ...]
    creator: str

    def to_bytes(self) -> bytes:
        """JSON, the same for the same manifest."""
        fields = dataclasses.asdict(self) | {"targets": [spec.to_attributes() for spec in self.targets]}
        return json.dumps(fields, indent=1, ensure_ascii=False, sort_keys=True).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "GroupManifest":
        """Parse what `to_bytes` wrote.

        Raises:
            CacheFormatError: it is torn, or of a version with other fields.
        """
        try:
            fields = json.loads(data)
            targets = [_spec(spec) for spec in fields["targets"]]
            heads = tuple(ObjectRecord(**head) for head in fields["heads"])
            changed = {"targets": tuple(targets), "encodings": tuple(fields["encodings"]), "heads": heads}
            return cls(**fields | changed)
        except (ValueError, TypeError, KeyError) as error:
            raise CacheFormatError(f"a group manifest cannot be read: {error}") from None

    @property
    def fingerprint_digest(self) -> str:
        """One digest of all fingerprint fields."""
        return sha256_hex(json.dumps(dict(self.fingerprint), sort_keys=True).encode())

    def arrays(self, frames: FrameGeometry) -> dict[str, tuple[tuple[encoding.StoredArray, ClipArray], ...]]:
        """Target name to its arrays in the order they are written."""
        dim_names = _dim_names(self.name, self.targets, frames)
        return {
            spec.name: tuple(
                (stored, self._clip_array(spec, by, stored, dim_names)) for stored in encoding.by_name(by).stored(spec)
            )
            for spec, by in zip(self.targets, self.encodings, strict=True)
        }

    def _clip_array(
        self,
        spec: TargetSpec,
        encoding_name: str,
        stored: encoding.StoredArray,
        dim_names: Mapping[tuple[str, str], str],
    ) -> ClipArray:
        attributes: dict[str, Any] = {
            "units": spec.units if not stored.suffix else "1",
            "long_name": (spec.description or f"{spec.quantity} of {self.name}") + stored.suffix.replace("_", " "),
            "quantity": spec.quantity,
            "encoding": encoding_name,
            "teacher": self.teacher,
            "fingerprint": self.fingerprint_digest,
            "transforms": list(spec.transforms),
            "invalid_frames": spec.invalid_frames,
        }
        return ClipArray(
            name=f"{self.name}_{spec.name}{stored.suffix}",
            dims=tuple(dim_names[spec.name, dim] for dim in stored.dims),
            shape=stored.shape,
            dtype=stored.dtype,
            codecs=stored.codecs,
            fill_value=stored.fill_value,
            attributes=attributes | dict(stored.attributes),
            optional=stored.optional,
        )


def _spec(fields: Mapping[str, Any]) -> TargetSpec:
    """A target's declaration from its JSON, where tuples are lists."""
    changed: dict[str, Any] = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    return TargetSpec(**{**fields, **changed})


def _dim_names(group: str, specs: Sequence[TargetSpec], frames: FrameGeometry) -> dict[tuple[str, str], str]:
    """(target, dim) to a name whose size agrees throughout the cache: shared, else the group's, else the target's."""
    shared = dict(zip(SHARED_DIMS, (frames.num_frames, frames.height, frames.width, 2), strict=True))
    sizes: dict[str, set[int]] = {}
    for spec in specs:
        for dim, size in zip(spec.dims, spec.shape, strict=True):
            if shared.get(dim) != size:
                sizes.setdefault(dim, set()).add(size)
    names = {}
    for spec in specs:
        for dim, size in zip(spec.dims, spec.shape, strict=True):
            own = f"{group}_{dim}" if len(sizes.get(dim, ())) == 1 else f"{group}_{spec.name}_{dim}"
            names[spec.name, dim] = dim if shared.get(dim) == size else own
    return names


class Group:
    """One teacher's targets in a cache. Cheap to open; safe for several threads.

    Args:
        store: the cache's.
        manifest: what the group's `group.json` says.
        frames: the geometry of the cache's sampling.
        clips_per_unit: the cache's.
        count_clips: how many clips the cache has.
    """

    def __init__(
        self,
        store: Store,
        manifest: GroupManifest,
        frames: FrameGeometry,
        clips_per_unit: int,
        count_clips: Callable[[], int],
    ) -> None:
        self.store = store
        self.manifest = manifest
        self.ledger = Ledger(store, manifest.name, clips_per_unit)
        self._count_clips = count_clips
        self._arrays = manifest.arrays(frames)
        self._time = time_array(frames.num_frames)
        self._states: ClipStates | None = None

    def __repr__(self) -> str:
        return f"Group({self.name!r}, {self.store.url!r})"

    @property
    def name(self) -> str:
        """First part of the arrays' names."""
        return self.manifest.name

    @property
    def teacher(self) -> str:
        """The teacher's spec."""
        return self.manifest.teacher

    @property
    def fingerprint(self) -> Mapping[str, str]:
        """Flat fields that determine the targets."""
        return self.manifest.fingerprint

    @property
    def fingerprint_digest(self) -> str:
        """One digest of them."""
        return self.manifest.fingerprint_digest

    @property
    def targets(self) -> tuple[TargetSpec, ...]:
        """What the teacher makes."""
        return self.manifest.targets

    @cached_property
    def clip_arrays(self) -> tuple[ClipArray, ...]:
        """Every array of the group, the cache's clock first."""
        return (self._time, *(array for parts in self._arrays.values() for _, array in parts))

    def target_arrays(self, target: str) -> tuple[ClipArray, ...]:
        """The arrays that keep one target."""
        return tuple(array for _, array in self._arrays[target])

    def states(self) -> ClipStates:
        """The state of every clip, read from the ledger now; later reads of clips use it."""
        arrays = tuple(array.name for array in self.clip_arrays)
        self._states = self.ledger.states(self._count_clips(), arrays)
        return self._states

    def write_clip(
        self, index: int, arrays: Mapping[str, NDArray[Any]], time_seconds_t: NDArray[np.float64]
    ) -> tuple[ObjectRecord, ...]:
        """Write one clip's objects; they count only once a record is committed.

        Where another writer's object stands already it is adopted, so that all writers record the same digests.

        Args:
            index: the clip's place.
            arrays: target name to values, of the spec's shape and dtype.
            time_seconds_t: presentation times of the frames, float64 (t,).

        Raises:
            RequestError: a target is missing or undeclared.
            ValueError: a shape is not the declared one.
            VideoError: the clip's times differ from those that another group recorded: the source has changed.
            StorageError: the store failed.
        """
        if set(arrays) != set(self._arrays):
            raise RequestError(f"clip {index} has targets {sorted(arrays)}; the group declares {sorted(self._arrays)}")
        objects = [self._write_time(index, time_seconds_t)]
        for spec, by in zip(self.targets, self.manifest.encodings, strict=True):
            objects += self._write_target(index, spec, encoding.by_name(by), arrays[spec.name])
        return tuple(objects)

    def _write_time(self, index: int, time_seconds_t: NDArray[np.float64]) -> ObjectRecord:
        key = self._time.key(index)
        ours = self._time.encode(time_seconds_t)
        standing = self.store.claim(key, ours, partial(self._is_whole, self._time, index), durable=False)
        if standing != ours:
            message = f"its frame times differ from those recorded in {key}; was the video replaced? Use a new cache"
            raise VideoError("source_changed", message)
        return ObjectRecord(key=key, size_bytes=len(ours), digest=sha256_hex(ours))

    def _write_target(
        self, index: int, spec: TargetSpec, how: encoding.Encoding, values: NDArray[Any]
    ) -> list[ObjectRecord]:
        """Part after part; a part that another writer left makes the later ones follow it, so that all fit together."""
        objects: list[ObjectRecord] = []
        standing: dict[str, NDArray[Any]] = {}
        encoded, adopted = how.encode(values, spec, standing), False
        for stored, array in self._arrays[spec.name]:
            if stored.suffix not in encoded.parts and not (adopted and self.store.exists(array.key(index))):
                continue
            part = encoded.parts.get(stored.suffix, np.zeros(stored.shape, stored.dtype))
            ours = array.encode(part)
            data = self.store.claim(array.key(index), ours, partial(self._is_whole, array, index), durable=False)
            standing[stored.suffix] = part
            if data != ours:
                standing[stored.suffix] = array.decode(data)
                encoded, adopted = how.encode(values, spec, standing), True
            num_bad = 0 if stored.suffix else encoded.num_out_of_range
            objects.append(
                ObjectRecord(
                    key=array.key(index), size_bytes=len(data), digest=sha256_hex(data), num_out_of_range=num_bad
                )
            )
        return objects

    def _is_whole(self, array: ClipArray, index: int, data: bytes) -> bool:
        """Whether found bytes are an object; a torn one may be replaced unless it was committed."""
        try:
            array.decode(data)
        except CorruptDataError as error:
            result = self.ledger.clip(index)
            if result is not None and result.status == "ok":
                raise CorruptDataError(f"{self.store.url}/{array.key(index)} is committed but {error}") from None
            return False
        return True

    def commit(self, unit: int, results: Sequence[ClipResult]) -> None:
        """Make the clips' objects durable, then append the record that makes them exist.

        Raises:
            RequestError: a clip lies outside the unit.
            StorageError: the store failed; nothing of it is committed, or all.
        """
        self.store.sync(item.key for result in results for item in result.objects)
        self.ledger.commit(unit, results)

    def read_parts(self, index: int, target: str, verify: bool = False) -> dict[str, NDArray[Any]]:
        """A committed clip's target as it is stored: suffix to array; see the encoding for what they mean.

        Args:
            index: the clip's place.
            target: name of the target in this group.
            verify: also compare the digest with the record, which finds swapped and stale objects; the size and the
                CRC-32C are checked in any case.

        Raises:
            MissingDataError: the clip is not committed, or there is no such target.
            CorruptDataError: an object is gone or damaged.
        """
        if target not in self._arrays:
            raise MissingDataError(f"group {self.name} has no target {target!r}; it has {sorted(self._arrays)}")
        sizes = self._sizes(index)
        return {
            stored.suffix: self._read_array(array, index, sizes[array.name], verify)
            for stored, array in self._arrays[target]
            if not (array.optional and sizes.get(array.name, -1) < 0)
        }

    def read(self, index: int, target: str, verify: bool = False) -> NDArray[Any]:
        """A committed clip's target in physical values, NaN where invalid. Arguments and errors as `read_parts`."""
        parts = self.read_parts(index, target, verify)
        position = next(i for i, spec in enumerate(self.targets) if spec.name == target)
        return encoding.by_name(self.manifest.encodings[position]).decode(parts, self.targets[position])

    def read_time(self, index: int, verify: bool = False) -> NDArray[np.float64]:
        """A committed clip's frame times, float64 (t,). Errors as `read_parts`."""
        return self._read_array(self._time, index, self._sizes(index)[self._time.name], verify)

    def _read_array(self, array: ClipArray, index: int, size_bytes: int, verify: bool) -> NDArray[Any]:
        if verify:
            result = self.ledger.clip(index)
            self._check_digest(array.key(index), {item.key: item.digest for item in result.objects} if result else {})
        return array.read(self.store, index, size_bytes)

    def _check_digest(self, key: str, digests: Mapping[str, str]) -> None:
        try:
            found = sha256_hex(self.store.get(key))
        except FileNotFoundError:
            raise CorruptDataError(
                f"{self.store.url}/{key} is committed but gone; run `p4dprep cache verify`"
            ) from None
        if found != digests[key]:
            raise CorruptDataError(f"{self.store.url}/{key} is not what was committed; run `p4dprep cache verify`")

    def _sizes(self, index: int) -> dict[str, int]:
        """Array name to size of a committed clip's object."""
        states = self._states
        if states is not None and 0 <= index < len(states.ok) and states.ok[index]:
            return dict(zip(states.arrays, states.size_bytes[index].tolist(), strict=True))
        result = self.ledger.clip(index) if index >= 0 else None
        if result is None or result.status != "ok":
            why = f"failed: {result.reason}" if result else "was never committed"
            raise MissingDataError(f"clip {index} of group {self.name} in {self.store.url} {why}")
        return {item.array: item.size_bytes for item in result.objects}
