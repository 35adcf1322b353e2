"""Looking after a cache: what it holds, whether every committed byte is right, and what nobody refers to."""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np

from p4dprep.cache.arrays import ClipArray
from p4dprep.cache.group import Group
from p4dprep.cache.ledger import ObjectRecord, fold
from p4dprep.cache.store import Cache
from p4dprep.errors import CorruptDataError
from p4dprep.storage import sha256_hex

ProblemKind = Literal[
    "gone", "wrong size", "wrong digest", "undecodable", "torn record", "lost manifest", "wrong metadata"
]

_NUM_READERS = 8
_OBJECTS_AHEAD = 64

Advance = Callable[[int, int], None]
"""Called with (done, total) as a check goes on."""


@dataclass(frozen=True, kw_only=True)
class VerifyProblem:
    """One thing that is wrong.

    Attributes:
        kind: which.
        key: the object.
        group: the group whose record or manifest it contradicts; empty for the cache's own metadata.
        index: the clip's place; -1 where it concerns no clip.
        message: for a person.
    """

    kind: ProblemKind
    key: str
    group: str = ""
    index: int = -1
    message: str


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What `verify` found.

    Attributes:
        num_clips: clips in the cache.
        num_objects: committed objects that were checked.
        num_bytes: their size together.
        problems: everything that is wrong; empty if the cache is as committed.
    """

    num_clips: int
    num_objects: int
    num_bytes: int
    problems: tuple[VerifyProblem, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


@dataclass(frozen=True, kw_only=True)
class GcReport:
    """What `gc` found.

    Attributes:
        unreferenced: key to size of what no commit record, manifest or array refers to and is old enough.
        num_too_young: further ones kept because a running job may be about to commit them.
        deleted: whether the first were removed.
    """

    unreferenced: dict[str, int]
    num_too_young: int
    deleted: bool

    @property
    def num_bytes(self) -> int:
        """Size of what is unreferenced."""
        return sum(self.unreferenced.values())


@dataclass(frozen=True, kw_only=True)
class TargetInfo:
    """One target: its array's name, shape, units, quantity and encoding, and its committed bytes."""

    array: str
    shape: tuple[int, ...]
    units: str
    quantity: str
    encoding: str
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class GroupInfo:
    """One group: how many clips are in which state, and what it is made of.

    Attributes:
        name, teacher, fingerprint, fingerprint_digest: as in its manifest.
        num_committed, num_failed, num_missing: clips; together all of the cache's.
        num_bytes: committed bytes, without the shared clock.
        targets: each target.
        failures: failure name to how many clips, most frequent first.
        example_reasons: failure name to one clip's reason.
    """

    name: str
    teacher: str
    fingerprint: dict[str, str]
    fingerprint_digest: str
    num_committed: int
    num_failed: int
    num_missing: int
    num_bytes: int
    targets: tuple[TargetInfo, ...]
    failures: dict[str, int]
    example_reasons: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class CacheInfo:
    """What `cache info` shows."""

    url: str
    num_clips: int
    clips_per_unit: int
    sampling: dict[str, str | int | float | None]
    groups: tuple[GroupInfo, ...]


def info(cache: Cache) -> CacheInfo:
    """Counts, bytes and failures, from the ledgers alone."""
    return CacheInfo(
        url=cache.store.url,
        num_clips=cache.num_clips,
        clips_per_unit=cache.clips_per_unit,
        sampling=cache.sampling.to_attributes(),
        groups=tuple(_group_info(cache.group(name)) for name in cache.groups()),
    )


def _group_info(group: Group) -> GroupInfo:
    states = group.states()
    by_array = dict(zip(states.arrays, np.maximum(states.size_bytes, 0).sum(axis=0).tolist(), strict=True))
    targets = tuple(
        TargetInfo(
            array=f"{group.name}_{spec.name}",
            shape=spec.shape,
            units=spec.units,
            quantity=spec.quantity,
            encoding=by,
            num_bytes=sum(by_array[array.name] for array in group.target_arrays(spec.name)),
        )
        for spec, by in zip(group.targets, group.manifest.encodings, strict=True)
    )
    failures = Counter(failure for failure, _ in states.reasons.values())
    return GroupInfo(
        name=group.name,
        teacher=group.teacher,
        fingerprint=dict(group.fingerprint),
        fingerprint_digest=group.fingerprint_digest,
        num_committed=int(states.ok.sum()),
        num_failed=int(states.failed.sum()),
        num_missing=int(states.missing.sum()),
        num_bytes=sum(target.num_bytes for target in targets),
        targets=targets,
        failures=dict(failures.most_common()),
        example_reasons=dict(reversed(list(states.reasons.values()))),
    )


@dataclass(frozen=True, kw_only=True)
class _Committed:
    """One object of one group's record, with the array it must decode as."""

    group: str
    index: int
    record: ObjectRecord
    array: ClipArray | None


def verify(cache: Cache, progress: Advance = lambda _done, _total: None) -> VerifyReport:
    """Read every committed object and compare it with its record; compare the metadata with the manifests.

    Args:
        cache: which.
        progress: called with (objects done, objects in all).
    """
    names, damaged = cache.inspect_groups()
    problems = [_lost_manifest(name) for name in damaged] or list(_metadata_problems(cache))
    committed: list[_Committed] = []
    for name in names:
        committed += _committed_objects(cache.group(name), problems)
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        for start in range(0, len(committed), _OBJECTS_AHEAD):
            batch = committed[start : start + _OBJECTS_AHEAD]
            problems += [problem for problem in pool.map(lambda item: _object_problem(cache, item), batch) if problem]
            progress(start + len(batch), len(committed))
    return VerifyReport(
        num_clips=cache.num_clips,
        num_objects=len(committed),
        num_bytes=sum(item.record.size_bytes for item in committed),
        problems=tuple(problems),
    )


def _lost_manifest(name: str) -> VerifyProblem:
    message = "this group's manifest is gone or damaged, though clips are committed; restore it from a copy"
    return VerifyProblem(kind="lost manifest", key=f"ledger/{name}/group.json", group=name, message=message)


def _committed_objects(group: Group, problems: list[VerifyProblem]) -> Iterator[_Committed]:
    arrays = {array.name: array for array in group.clip_arrays}
    records = group.ledger.all_records()
    for key, record in records:
        if record is None:
            message = "this commit record cannot be read; what it committed counts as missing"
            problems.append(VerifyProblem(kind="torn record", key=key, group=group.name, message=message))
    for result in fold(record for _, record in records if record).values():
        for item in result.objects:
            yield _Committed(group=group.name, index=result.index, record=item, array=arrays.get(item.array))
    for head in group.manifest.heads:
        yield _Committed(group=group.name, index=-1, record=head, array=None)


def _object_problem(cache: Cache, item: _Committed) -> VerifyProblem | None:
    record = item.record

    def problem(kind: ProblemKind, message: str) -> VerifyProblem:
        return VerifyProblem(kind=kind, key=record.key, group=item.group, index=item.index, message=message)

    try:
        data = cache.store.get(record.key)
    except FileNotFoundError:
        return problem("gone", "it is committed but not there")
    if len(data) != record.size_bytes:
        return problem("wrong size", f"it has {len(data)} bytes, its record says {record.size_bytes}")
    if sha256_hex(data) != record.digest:
        return problem("wrong digest", "its bytes are not those that were committed")
    if item.index < 0:
        return None
    if item.array is None or item.array.key(item.index) != record.key:
        return problem("undecodable", "its record names an array or a place that the group does not have")
    try:
        item.array.decode(data)
    except CorruptDataError as error:
        return problem("undecodable", str(error))
    return None


def _metadata_problems(cache: Cache) -> Iterator[VerifyProblem]:
    """Arrays whose `zarr.json` is not what the manifests and the clips make it, in its place and in the root."""
    root = json.loads(cache.store.get("zarr.json"))
    listed = root.get("consolidated_metadata", {}).get("metadata", {})
    for name, array in cache.clip_arrays().items():
        wanted = array.metadata(cache.num_clips)
        key = f"{name}/zarr.json"
        try:
            found = json.loads(cache.store.get(key))
        except (FileNotFoundError, ValueError):
            found = None
        if found != wanted or listed.get(name) != wanted:
            where = "zarr.json's consolidated metadata" if found == wanted else key
            message = f"{where} differs from the group's manifest; `p4dprep extract` or `Cache.create` rewrites it"
            if found and found["shape"][0] > wanted["shape"][0]:
                message = (
                    "it has more clips than clips.parquet, where a part is gone or damaged; restore it from a copy"
                )
            yield VerifyProblem(kind="wrong metadata", key=key, message=message)


def gc(cache: Cache, *, delete: bool, min_age_seconds: float = 3600.0) -> GcReport:
    """Find, and with `delete` remove, what no record refers to: objects of clips that were never committed, left-over
    parts of broken writes, arrays of no group. Run it while no job writes to the cache: only an object's age tells
    that a running job may yet commit it.

    Args:
        cache: which.
        delete: remove them; otherwise they are listed.
        min_age_seconds: younger objects are kept and counted.
    """
    candidates = _unreferenced(cache, cache.store.list())
    now = time.time()
    old = {key: size for key, size in candidates.items() if now - _written_seconds(cache, key, now) >= min_age_seconds}
    if delete:
        old = _unreferenced(cache, old)  # a job may have committed some while we looked
        for key in old:
            cache.store.delete(key)
    return GcReport(unreferenced=old, num_too_young=len(candidates) - len(old), deleted=delete)


def _unreferenced(cache: Cache, sizes: dict[str, int]) -> dict[str, int]:
    names = cache.groups()
    groups: Sequence[Group] = [cache.group(name) for name in names]
    keep = {"zarr.json"} | {f"{name}/zarr.json" for name in cache.clip_arrays()}
    for group in groups:
        keep |= {head.key for head in group.manifest.heads}
        for result in fold(record for _, record in group.ledger.all_records() if record).values():
            keep |= {item.key for item in result.objects}
    ours = ("ledger/", "clips.parquet/")
    return {
        key: size
        for key, size in sizes.items()
        if key.endswith(".partial") or (key not in keep and not key.startswith(ours))
    }


def _written_seconds(cache: Cache, key: str, default: float) -> float:
    try:
        return cache.store.modified_seconds(key)
    except FileNotFoundError:
        return default
