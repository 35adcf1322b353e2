"""The cache as a whole: its root, its clips, its groups, and the zarr metadata that follows from them."""

import json
import re
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from p4dprep import __version__, encoding
from p4dprep.cache.arrays import TIME_ARRAY, ClipArray, time_array
from p4dprep.cache.group import Group, GroupManifest
from p4dprep.cache.ledger import ObjectRecord, has_records
from p4dprep.corpus import Sampling
from p4dprep.errors import (
    CacheError,
    CacheFormatError,
    CorruptDataError,
    FingerprintMismatchError,
    MissingDataError,
    RequestError,
)
from p4dprep.storage import Store, sha256_hex
from p4dprep.targets import TargetSpec

FORMAT = 1
"""Version of the layout; a newer one is refused."""

_ROOT = "zarr.json"
_CLIPS = "clips.parquet"
_GROUP_NAME = re.compile(r"[a-z][a-z0-9_]*")
_NUM_TRIES = 100
_ROWS_PER_GROUP = 100_000


class Cache:
    """A zarr v3 group of targets, its clips and its ledger. Build one with `open` or `create`.

    Attributes:
        store: where it lies.
        sampling: how clips become frames; the same for every group.
        clips_per_unit: clips of one unit, a run of consecutive indices.
    """

    def __init__(self, store: Store, attributes: Mapping[str, Any]) -> None:
        self.store = store
        self.sampling = Sampling.from_attributes(attributes["sampling"])
        self.clips_per_unit = int(attributes["clips_per_unit"])
        self._ids: dict[str, pa.Array] = {}
        self._groups: dict[str, Group] = {}
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        return f"Cache({self.store.url!r})"

    @classmethod
    def open(cls, url: str, storage_options: Mapping[str, Any] | None = None) -> Self:
        """Open a cache; reads its root `zarr.json` only.

        Raises:
            CacheFormatError: there is no cache, or one of a newer format.
        """
        store = Store(url, storage_options)
        try:
            return cls(store, _root_attributes(store.get(_ROOT), store.url))
        except (FileNotFoundError, NotADirectoryError):
            raise CacheFormatError(f"there is no cache at {store.url}; `p4dprep extract` makes one") from None

    @classmethod
    def create(
        cls, url: str, sampling: Sampling, *, clips_per_unit: int, storage_options: Mapping[str, Any] | None = None
    ) -> Self:
        """Make a cache, or open the one that is there; its recorded `clips_per_unit` wins.

        Raises:
            RequestError: the folder holds something else, or clips_per_unit is less than 1.
            FingerprintMismatchError: the cache there has another sampling.
            CacheFormatError: its format is newer.
        """
        if clips_per_unit < 1:
            raise RequestError(f"clips_per_unit is {clips_per_unit}; it must be at least 1")
        store = Store(url, storage_options)
        names = [name for name in store.children() if not name.endswith(".partial")]
        if names and _ROOT not in names:
            raise RequestError(f"{store.url} holds {names[0]!r} and no cache; give an empty or new folder")
        attributes: dict[str, Any] = {
            "p4dprep_format": FORMAT,
            "p4dprep_version": __version__,
            "clips_per_unit": clips_per_unit,
            "sampling": sampling.to_attributes(),
        }
        standing = store.claim(_ROOT, _root(attributes, {}), _is_json)
        recorded = _root_attributes(standing, store.url)
        _check_same("sampling", recorded["sampling"], attributes["sampling"], store.url, "use another cache")
        cache = cls(store, recorded)
        cache.refresh_metadata()
        return cache

    def clips(self) -> pa.Table:
        """Every clip in order of its index: `index` and the corpus's columns."""
        parts = self._read_parts()
        if not parts:
            return pa.table({"index": pa.array([], pa.int64()), "id": pa.array([], pa.string())})
        return pa.concat_tables(parts, promote_options="default")

    @property
    def num_clips(self) -> int:
        """How many clips the cache has, committed or not."""
        return sum(map(len, self._read_ids()))

    def extend(self, corpus: pa.Table) -> NDArray[np.int64]:
        """Add clips; ids that are there keep their index.

        Args:
            corpus: one row a clip, with a string column `id`, unique.

        Returns:
            The index of each row of `corpus`, int64.

        Raises:
            RequestError: two rows have one id, or the columns are not fit.
            CorruptDataError: clips that were there are lost; new ones must not take their places.
            StorageError: the store failed; the rows are added wholly or not at all.
        """
        ids = corpus.column("id").combine_chunks()
        if "index" in corpus.column_names or ids.null_count or not _are_unique(ids):
            raise RequestError("a corpus needs one unique `id` a row and no column `index`")
        self._refuse_lost_clips()
        for _ in range(_NUM_TRIES):
            parts = self._read_ids()
            known = pa.concat_arrays(parts) if parts else ids[:0]
            indices = pc.index_in(ids, value_set=known).fill_null(-1).to_numpy().astype(np.int64)
            new = indices < 0
            if not new.any():
                break
            indices[new] = np.arange(len(known), len(known) + new.sum())
            rows = corpus if new.all() else corpus.filter(pa.array(new))
            if self._add_part(len(parts), len(known), rows):
                break
        else:
            raise CacheError(f"{self.store.url}: other jobs keep extending this cache; try again")
        self.refresh_metadata()
        return np.asarray(indices, np.int64)

    def _add_part(self, number: int, first: int, rows: pa.Table) -> bool:
        """Append a part; False if another job was first."""
        indices = pa.array(np.arange(first, first + rows.num_rows, dtype=np.int64))
        sink = pa.BufferOutputStream()
        pq.write_table(
            rows.add_column(0, "index", indices),
            sink,
            compression="zstd",
            row_group_size=_ROWS_PER_GROUP,
            use_dictionary=False,  # ids and uris do not repeat
        )
        data = sink.getvalue().to_pybytes()
        name = f"part-{number:05d}.parquet"
        if self.store.claim(f"{_CLIPS}/{name}", data, _is_parquet) != data:
            return False
        with self._lock:
            self._ids[name] = rows["id"].combine_chunks()
        return True

    def _part_names(self) -> list[str]:
        return [name for name in self.store.children(_CLIPS) if name.endswith(".parquet")]

    def _read_part(self, name: str, is_last: bool, columns: list[str] | None = None) -> pa.Table | None:
        """One part; None if it is torn and the last, which the next `extend` replaces."""
        data = self.store.get(f"{_CLIPS}/{name}")
        if _is_parquet(data):
            return pq.read_table(pa.BufferReader(data), columns=columns)
        if is_last:
            return None
        raise CorruptDataError(f"{self.store.url}/{_CLIPS}/{name} is damaged; restore it from a copy")

    def _read_parts(self) -> list[pa.Table]:
        """The parts in order."""
        names = self._part_names()
        parts = [self._read_part(name, name == names[-1]) for name in names]
        return [part for part in parts if part is not None]

    def _read_ids(self) -> list[pa.Array]:
        """The ids of each part in order; those read before are kept, since a part never changes."""
        names = self._part_names()
        with self._lock:
            for name in names:
                if name not in self._ids:
                    part = self._read_part(name, name == names[-1], ["id"])
                    if part is None:
                        break
                    self._ids[name] = part["id"].combine_chunks()
            return [self._ids[name] for name in names if name in self._ids]

    def _refuse_lost_clips(self) -> None:
        """Compare the clips with the clock's length, which was written after them."""
        try:
            num_announced = int(json.loads(self.store.get(f"{TIME_ARRAY}/zarr.json"))["shape"][0])
        except (FileNotFoundError, ValueError, KeyError, TypeError, IndexError):
            return
        if self.num_clips < num_announced:
            raise CorruptDataError(
                f"{self.store.url}/{_CLIPS} has {self.num_clips} clips of {num_announced}: a part is gone or damaged; "
                "restore it from a copy"
            )

    def groups(self) -> tuple[str, ...]:
        """Names of the groups, sorted.

        Raises:
            CorruptDataError: a group that has commit records has lost its manifest.
        """
        whole, damaged = self.inspect_groups()
        if damaged:
            raise self._lost_manifest(damaged[0])
        return whole

    def inspect_groups(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of the groups, and of those that have commit records and have lost their manifest."""
        whole, damaged = [], []
        for name in self.store.children("ledger"):
            try:
                if name in self._groups or self._manifest(name) is not None:
                    whole.append(name)
            except CorruptDataError:
                damaged.append(name)
        return tuple(whole), tuple(damaged)

    def _manifest(self, name: str) -> GroupManifest | None:
        """A group's manifest; None if there is none, or a torn one that nothing stands on."""
        try:
            return GroupManifest.from_bytes(self.store.get(_manifest_key(name)))
        except (FileNotFoundError, NotADirectoryError, CacheFormatError):
            if has_records(self.store, name):
                raise self._lost_manifest(name) from None
            return None

    def _lost_manifest(self, name: str) -> CorruptDataError:
        what = f"{self.store.url}/{_manifest_key(name)} is gone or damaged, though clips are committed"
        return CorruptDataError(f"{what}; restore it from a copy")

    def group(self, name: str) -> Group:
        """Open a group; reads its manifest only.

        Raises:
            MissingDataError: there is none of this name.
            CorruptDataError: it has commit records and has lost its manifest.
        """
        with self._lock:
            if name not in self._groups:
                manifest = self._manifest(name)
                if manifest is None:
                    raise MissingDataError(f"{self.store.url} has no group {name!r}; it has {self.groups()}")
                self._groups[name] = self._open_group(manifest)
            return self._groups[name]

    def _open_group(self, manifest: GroupManifest) -> Group:
        return Group(self.store, manifest, self.sampling.geometry(), self.clips_per_unit, lambda: self.num_clips)

    def add_group(
        self,
        name: str,
        teacher: str,
        fingerprint: Mapping[str, str],
        targets: Sequence[TargetSpec],
        heads_folder: Path | None = None,
    ) -> Group:
        """Add a teacher's group, or open it if the same is there.

        Args:
            name: lower-case identifier; arrays are named `<name>_<target>`.
            teacher: the teacher's spec, for people and for running it again.
            fingerprint: flat fields that determine the targets.
            targets: what the teacher makes of a clip.
            heads_folder: frozen heads to keep under `heads/<name>/`.

        Raises:
            RequestError: the name is not fit, or an array of this name belongs to another group.
            FingerprintMismatchError: the group is there with other fields; the message names them.
            CorruptDataError: a group that has commit records has lost its manifest.
            StorageError: the store failed; the same call again completes the group.
        """
        if not _GROUP_NAME.fullmatch(name) or not targets:
            raise RequestError(f"group {name!r} needs a lower-case name of letters, digits and _, and a target")
        heads = _read_heads(name, heads_folder)
        ours = GroupManifest(
            name=name,
            teacher=teacher,
            fingerprint=dict(fingerprint),
            targets=tuple(targets),
            encodings=tuple(encoding.choose(spec).name for spec in targets),
            heads=tuple(ObjectRecord(key=k, size_bytes=len(d), digest=sha256_hex(d)) for k, d in heads.items()),
            creator=__version__,
        )
        self._check_array_names(ours)
        data = self.store.claim(_manifest_key(name), ours.to_bytes(), _is_manifest)
        manifest = GroupManifest.from_bytes(data)
        advice = f"give it another name: --teacher NEWNAME={teacher}"
        _check_same(f"group {name!r}", _identity(manifest), _identity(ours), self.store.url, advice)
        for head in manifest.heads:
            if head.key in heads:
                self.store.claim(head.key, heads[head.key], partial(_has_digest, head.digest))
        self.refresh_metadata()
        return self.group(name)

    def _check_array_names(self, manifest: GroupManifest) -> None:
        taken = {TIME_ARRAY: "the clock"}
        for other in self.groups():
            if other != manifest.name:
                taken |= {array.name: f"group {other}" for array in self.group(other).clip_arrays[1:]}
        for parts in manifest.arrays(self.sampling.geometry()).values():
            for _, array in parts:
                if array.name in taken:
                    raise RequestError(f"array {array.name} belongs to {taken[array.name]}; choose another group name")

    def read(self, clip: int | str, array_target: str) -> NDArray[Any]:
        """Physical values of `<group>_<target>` for a clip given by index or id.

        Raises:
            MissingDataError: no such target or clip, or it was never committed.
            CorruptDataError: its bytes are gone or damaged.
        """
        group, target = (
            self._find(array_target, tuple(self._groups)) or self._find(array_target, self.groups()) or ("", "")
        )
        if not group:
            known = [f"{name}_{spec.name}" for name in self.groups() for spec in self.group(name).targets]
            raise MissingDataError(f"{self.store.url} has no target {array_target!r}; it has {known}")
        return self.group(group).read(clip if isinstance(clip, int) else self._index(clip), target)

    def _find(self, array_target: str, groups: Sequence[str]) -> tuple[str, str] | None:
        for name in groups:
            for spec in self.group(name).targets:
                if array_target == f"{name}_{spec.name}":
                    return name, spec.name
        return None

    def _index(self, clip_id: str) -> int:
        table = self.clips()
        index = pc.index(table.column("id"), clip_id).as_py()
        if index < 0:
            raise MissingDataError(f"{self.store.url} has no clip {clip_id!r} among its {table.num_rows}")
        return int(index)

    def clip_arrays(self) -> dict[str, ClipArray]:
        """Every array of the cache by name, the clock first."""
        arrays = [time_array(self.sampling.geometry().num_frames)]
        for name in self.groups():
            arrays += self.group(name).clip_arrays[1:]
        return {array.name: array for array in arrays}

    def refresh_metadata(self) -> None:
        """Bring the zarr metadata in line with the clips and groups: array sizes, new arrays, the consolidated root.

        Readers of ours do not need it; `xarray.open_zarr` does. Any number of writers may do it at once: the root is
        swapped last and only if nobody else did meanwhile.

        Raises:
            CacheError: other writers kept changing the cache.
            CorruptDataError: clips that were there are lost.
        """
        self._refuse_lost_clips()
        for _ in range(_NUM_TRIES):
            before = self.store.get(_ROOT)
            num_clips = self.num_clips
            metadata = {name: array.metadata(num_clips) for name, array in sorted(self.clip_arrays().items())}
            if all(self._put_metadata(f"{name}/zarr.json", wanted) for name, wanted in metadata.items()):
                after = _root(_root_attributes(before, self.store.url), metadata)
                if after == before or self.store.swap(_ROOT, before, after):
                    return
        raise CacheError(f"the metadata of {self.store.url} kept changing; run the command again")

    def _put_metadata(self, key: str, wanted: dict[str, Any]) -> bool:
        """Write an array's `zarr.json`; False if a rival, who knows of more clips, was here meanwhile."""
        data = json.dumps(wanted, indent=1, ensure_ascii=False).encode()
        standing = self.store.claim(key, data, _is_json)
        if standing == data:
            return True
        if json.loads(standing)["shape"][0] > wanted["shape"][0]:
            return False
        return self.store.swap(key, standing, data)


def _manifest_key(name: str) -> str:
    return f"ledger/{name}/group.json"


def _root(attributes: Mapping[str, Any], metadata: Mapping[str, Any]) -> bytes:
    consolidated = {"kind": "inline", "must_understand": False, "metadata": dict(metadata)}
    root = {
        "zarr_format": 3,
        "node_type": "group",
        "attributes": dict(attributes),
        "consolidated_metadata": consolidated,
    }
    return json.dumps(root, indent=1, ensure_ascii=False).encode()


def _root_attributes(data: bytes, url: str) -> dict[str, Any]:
    """The attributes of a cache's root.

    Raises:
        CacheFormatError: it is no cache, or of another format.
    """
    try:
        attributes: dict[str, Any] = json.loads(data)["attributes"]
        version = int(attributes["p4dprep_format"])
    except (ValueError, KeyError, TypeError):
        raise CacheFormatError(f"{url} is a folder with a zarr.json, but no cache of p4dprep") from None
    if version != FORMAT:
        raise CacheFormatError(f"the cache at {url} has format {version}; this version of p4dprep reads {FORMAT}")
    return attributes


def _identity(manifest: GroupManifest) -> dict[str, Any]:
    """What must agree for two calls to mean one group."""
    targets = {f"target {spec.name}": repr(spec) for spec in manifest.targets}
    return dict(manifest.fingerprint) | targets | {f"head {head.key}": head.digest for head in manifest.heads}


def _check_same(what: str, recorded: Mapping[str, Any], asked: Mapping[str, Any], url: str, advice: str) -> None:
    differing = [
        f"{name} is {_short(recorded.get(name))} in the cache, {_short(asked.get(name))} now"
        for name in sorted({*recorded, *asked})
        if recorded.get(name) != asked.get(name)
    ]
    if differing:
        raise FingerprintMismatchError(f"{what} of {url} was made otherwise: {'; '.join(differing)}. Or {advice}")


def _short(value: Any) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:40]}...{text[-17:]}"


def _read_heads(name: str, folder: Path | None) -> dict[str, bytes]:
    """Key under the cache to bytes of every file of the heads' folder."""
    if folder is None:
        return {}
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {f"heads/{name}/{path.relative_to(folder).as_posix()}": path.read_bytes() for path in files}


def _has_digest(digest: str, data: bytes) -> bool:
    return sha256_hex(data) == digest


def _is_json(data: bytes) -> bool:
    try:
        return isinstance(json.loads(data), dict)
    except ValueError:
        return False


def _is_manifest(data: bytes) -> bool:
    try:
        return bool(GroupManifest.from_bytes(data))
    except CacheFormatError:
        return False


def _are_unique(ids: pa.Array) -> bool:
    """Whether no id stands twice; by sorting, which takes a fraction of a hash table's memory."""
    ordered = ids.take(pc.sort_indices(ids))
    return len(ids) < 2 or not pc.any(pc.equal(ordered[1:], ordered[:-1])).as_py()


def _is_parquet(data: bytes) -> bool:
    try:
        return bool(pq.read_metadata(pa.BufferReader(data)).num_rows >= 0)
    except (pa.ArrowInvalid, OSError):
        return False
