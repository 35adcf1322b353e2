"""The commit ledger of one group: append-only records that say which clips exist, and the digest of every object.

A record is `ledger/<group>/<unit>.<attempt>.json` and covers any of its unit's clips. A clip is ok if any record says
so (the first such record counts), else failed if any says so (the latest reason counts), else missing. Nothing else,
above all not the presence of an object, makes a clip exist.
"""

import dataclasses
import json
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from p4dprep.errors import RequestError
from p4dprep.storage import Store, redact

T = TypeVar("T")

_NUM_READERS = 16
_MAX_UNITS_KEPT = 1024


@dataclass(frozen=True, kw_only=True)
class ObjectRecord:
    """One committed object.

    Attributes:
        key: where, under the cache's root.
        size_bytes: its size.
        digest: SHA-256 of its bytes, hex.
        num_out_of_range: values that the encoding had to mark invalid or saturate.
    """

    key: str
    size_bytes: int
    digest: str
    num_out_of_range: int = 0

    @property
    def array(self) -> str:
        """Name of the zarr array the object belongs to."""
        return self.key.split("/", 1)[0]


@dataclass(frozen=True, kw_only=True)
class ClipResult:
    """What became of one clip: its objects, or why it failed.

    Attributes:
        index: place of the clip on the first axis of every array.
        id: the clip's stable id.
        status: `ok` or `failed`.
        failure: a short name for counting, such as `too_short`; empty if ok.
        reason: the same for a person; credentials are removed when it is committed.
        source_digest: digest of the video's bytes.
        num_distinct_frames: frames that differ; fewer than the sampling asks for where a video is short.
        objects: every object of the clip, the clock first.
    """

    index: int
    id: str
    status: Literal["ok", "failed"]
    failure: str = ""
    reason: str = ""
    source_digest: str = ""
    num_distinct_frames: int = 0
    objects: tuple[ObjectRecord, ...] = ()

    def __post_init__(self) -> None:
        if (
            self.index < 0
            or (self.status == "ok") != bool(self.objects)
            or (self.status == "failed") != bool(self.reason)
        ):
            raise ValueError(f"clip {self.id}: an ok clip has objects and no reason, a failed one the reverse: {self}")


@dataclass(frozen=True, kw_only=True)
class ClipStates:
    """State of every clip of a group, from its ledger at one moment.

    Attributes:
        ok: bool per clip: committed.
        failed: bool per clip: failed and not committed since.
        reasons: index of a failed clip to (failure, reason).
        arrays: names of the arrays behind the columns of `size_bytes`.
        size_bytes: int64 (clip, array); -1 where the clip has no such object.
        load: fetches one clip's objects with their digests from its record.
    """

    ok: NDArray[np.bool_]
    failed: NDArray[np.bool_]
    reasons: Mapping[int, tuple[str, str]]
    arrays: tuple[str, ...]
    size_bytes: NDArray[np.int64]
    load: Callable[[int], ClipResult | None]

    def __repr__(self) -> str:
        return f"ClipStates({len(self.ok)} clips, {int(self.ok.sum())} ok, {int(self.failed.sum())} failed)"

    @property
    def missing(self) -> NDArray[np.bool_]:
        """Bool per clip: neither committed nor failed."""
        return ~(self.ok | self.failed)

    def objects(self, index: int) -> tuple[ObjectRecord, ...]:
        """The committed objects of a clip; none if it is not ok."""
        result = self.load(index)
        return result.objects if result and result.status == "ok" else ()


class Ledger:
    """Reads and appends the commit records of one group. Safe for many threads and many processes."""

    def __init__(self, store: Store, group: str, clips_per_unit: int) -> None:
        self.store = store
        self.folder = f"ledger/{group}"
        self.clips_per_unit = clips_per_unit
        self._units: dict[int, tuple[tuple[ClipResult, ...], ...]] = {}

    def key(self, unit: int, attempt: int) -> str:
        """Key of a record."""
        return f"{self.folder}/{unit:08d}.{attempt:03d}.json"

    def records(self, unit: int) -> tuple[tuple[ClipResult, ...], ...]:
        """The records of a unit in order, those written since the last call included."""
        records = self._units.get(unit, ())
        num_whole = None
        while True:
            try:
                found = parse_record(self.store.get(self.key(unit, len(records))))
            except FileNotFoundError:
                break
            if found is None and num_whole is None:
                num_whole = len(records)  # the next commit replaces a torn record, so that it is to be read again
            records = (*records, found or ())
        self._keep(unit, records[:num_whole])
        return records

    def clip(self, index: int) -> ClipResult | None:
        """What became of a clip: asked of the store again only while the clip is not ok."""
        unit = index // self.clips_per_unit
        known = fold(self._units.get(unit, ())).get(index)
        if known is None or known.status != "ok":
            known = fold(self.records(unit)).get(index)
        return known

    def commit(self, unit: int, results: Sequence[ClipResult]) -> None:
        """Append a record; clips that another writer has committed meanwhile are left to it.

        Every object must be durable before.

        Raises:
            RequestError: a clip lies outside the unit.
            StorageError: the store failed; nothing is committed, or all of it.
        """
        for result in results:
            if result.index // self.clips_per_unit != unit:
                raise RequestError(f"clip {result.index} is not of unit {unit} of {self.clips_per_unit} clips")
        pending = tuple(dataclasses.replace(result, reason=redact(result.reason)) for result in results)
        write_id = secrets.token_hex(8)
        attempt = 0
        while pending:
            ours = _record(unit, write_id, pending)
            standing = self.store.claim(self.key(unit, attempt), ours, lambda data: parse_record(data) is not None)
            if standing == ours:
                return
            done = {result.index for result in parse_record(standing) or () if result.status == "ok"}
            pending = tuple(result for result in pending if result.index not in done)
            attempt += 1

    def all_records(self) -> list[tuple[str, tuple[ClipResult, ...] | None]]:
        """Every record of the group by key, in order of unit and attempt; None for one that cannot be read."""
        return self._read_all(parse_record)

    def _read_all(self, parse: Callable[[bytes], T]) -> list[tuple[str, T]]:
        keys = [f"{self.folder}/{name}" for name in self.store.children(self.folder) if _is_record_name(name)]
        with ThreadPoolExecutor(_NUM_READERS) as pool:
            return list(zip(keys, pool.map(lambda key: parse(self.store.get(key)), keys), strict=True))

    def states(self, num_clips: int, arrays: tuple[str, ...]) -> ClipStates:
        """The state of every clip. Works on the plain JSON: a large ledger holds millions of object records."""
        column = {name: position for position, name in enumerate(arrays)}
        size_bytes = np.full((num_clips, len(arrays)), -1, np.int64)
        failed, ok = np.zeros(num_clips, bool), np.zeros(num_clips, bool)
        reasons: dict[int, tuple[str, str]] = {}
        for _, record in self._read_all(_clips_of):
            for clip in record:
                index = clip["index"]
                if index >= num_clips or ok[index]:
                    continue
                if clip["status"] == "failed":
                    failed[index] = True
                    reasons[index] = (clip["failure"], clip["reason"])
                    continue
                ok[index], failed[index] = True, False
                reasons.pop(index, None)
                for key, size, *_ in clip["objects"]:
                    position = column.get(key.split("/", 1)[0])
                    if position is not None:
                        size_bytes[index, position] = size
        return ClipStates(ok=ok, failed=failed, reasons=reasons, arrays=arrays, size_bytes=size_bytes, load=self.clip)

    def _keep(self, unit: int, records: tuple[tuple[ClipResult, ...], ...]) -> None:
        if len(self._units) >= _MAX_UNITS_KEPT and unit not in self._units:
            self._units = {}
        self._units[unit] = records


def has_records(store: Store, group: str) -> bool:
    """Whether a group has a commit record, be it torn."""
    return any(map(_is_record_name, store.children(f"ledger/{group}")))


def _is_record_name(name: str) -> bool:
    return name[:8].isdigit() and name.endswith(".json")


def fold(records: Iterable[Iterable[ClipResult]]) -> dict[int, ClipResult]:
    """The result that counts for each clip: its first ok one, else its latest."""
    results: dict[int, ClipResult] = {}
    for record in records:
        for result in record:
            if result.index not in results or results[result.index].status != "ok":
                results[result.index] = result
    return results


def _record(unit: int, write_id: str, results: Iterable[ClipResult]) -> bytes:
    clips = [
        {field.name: getattr(result, field.name) for field in dataclasses.fields(result) if field.name != "objects"}
        | {"objects": [[item.key, item.size_bytes, item.digest, item.num_out_of_range] for item in result.objects]}
        for result in results
    ]
    return json.dumps({"unit": unit, "write_id": write_id, "clips": clips}, separators=(",", ":")).encode()


def _clips_of(data: bytes) -> list[dict[str, Any]]:
    """The clips in a record as plain JSON; none if it is torn."""
    try:
        clips: list[dict[str, Any]] = json.loads(data)["clips"]
    except (ValueError, TypeError, KeyError):
        return []
    return clips


def parse_record(data: bytes) -> tuple[ClipResult, ...] | None:
    """The results in a record; None if it is torn, which makes it no record."""
    try:
        return tuple(
            ClipResult(
                **{name: value for name, value in clip.items() if name != "objects"},
                objects=tuple(
                    ObjectRecord(key=key, size_bytes=size, digest=digest, num_out_of_range=num)
                    for key, size, digest, num in clip["objects"]
                ),
            )
            for clip in json.loads(data)["clips"]
        )
    except (ValueError, TypeError, KeyError):
        return None
