"""After any failure, at any storage operation, the same work run again ends as if nothing had happened."""

import os
import secrets
import tempfile
from pathlib import Path

import numpy as np
import pytest

from p4dprep.cache import Cache, ClipResult, ObjectRecord, gc, verify
from p4dprep.errors import CorruptDataError, MissingDataError, StorageError
from p4dprep.storage import Store
from tests.p4dprep.cache import faults
from tests.p4dprep.cache.builders import (
    FEW_SPECS,
    FINGERPRINT,
    LATENTS,
    SAMPLING,
    add_group,
    committed_digests,
    failed,
    fill,
    make_corpus,
    make_times,
    make_values,
    new_cache,
    write,
)
from tests.s3 import Place

NEVER = 10**9


def whole_job(place: Place, heads: Path) -> Cache:
    """All that an extraction does to a cache: create, extend, register, write, commit, in two rounds."""
    cache = Cache.create(place.url, SAMPLING, clips_per_unit=2, storage_options=place.storage_options)
    cache.extend(make_corpus(2))
    group = cache.add_group("toy", "toy:x", FINGERPRINT, FEW_SPECS, heads_folder=heads)
    fill(cache, group)
    cache.extend(make_corpus(3))
    fill(cache, group)
    return cache


@pytest.fixture
def heads(tmp_path: Path) -> Path:
    folder = tmp_path / "heads"
    (folder / "depth").mkdir(parents=True)
    (folder / "depth" / "config.json").write_text('{"width": 8}')
    return folder


@pytest.fixture
def undisturbed(tmp_path: Path, heads: Path) -> dict[str, str]:
    """Digests of the job that nothing disturbs."""
    cache = whole_job(Place(url=str(tmp_path / "undisturbed")), heads)
    return committed_digests(cache.group("toy"))


@pytest.mark.parametrize("mode", faults.MODES)
def test_a_fault_at_every_fourth_operation_leaves_a_cache_that_a_rerun_completes(
    heads: Path, undisturbed: dict[str, str], mode: faults.Mode
) -> None:
    check_faults(heads, undisturbed, mode, first=faults.MODES.index(mode), step=4)


@pytest.mark.slow
@pytest.mark.parametrize("mode", faults.MODES)
def test_a_fault_at_any_operation_leaves_a_cache_that_a_rerun_completes(
    heads: Path, undisturbed: dict[str, str], mode: faults.Mode
) -> None:
    check_faults(heads, undisturbed, mode, first=0, step=1)


def check_faults(heads: Path, undisturbed: dict[str, str], mode: faults.Mode, first: int, step: int) -> None:
    """In memory where the machine has such a folder: a few thousand syncs of a disk would take minutes."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        with pytest.MonkeyPatch.context() as patch:
            fuse = faults.Fuse(NEVER, mode)
            faults.install(patch, fuse)
            whole_job(Place(url=f"{folder}/counted"), heads)
        assert fuse.count > 60
        for at in range(first, fuse.count, step):
            place = Place(url=f"{folder}/{at}")
            with pytest.MonkeyPatch.context() as patch:
                faults.install(patch, faults.Fuse(at, mode))
                with pytest.raises((faults.Died, StorageError), match=r"injected|^$"):
                    whole_job(place, heads)
            cache = whole_job(place, heads)
            assert committed_digests(cache.group("toy")) == undisturbed, f"operation {at}"
            problems = [problem for problem in verify(cache).problems if problem.kind != "torn record"]
            assert problems == [], f"operation {at}"


def test_a_teacher_that_never_repeats_itself_still_leaves_parts_that_fit(local_place: Place) -> None:
    cache = new_cache(local_place, num_clips=1)
    group = add_group(cache)
    write(group, 0, noise=0.01)
    names = [array.name for array in group.clip_arrays if array.name.startswith("toy_tap2")]
    rng = np.random.default_rng(0)
    for _ in range(20):
        for name in rng.choice(names, rng.integers(1, len(names))).tolist():
            cache.store.delete(f"{name}/c.0" + (".0" if "_rms" in name or "_scale" in name else ".0.0"))
        result = write(group, 0, noise=0.01)
    group.commit(0, [result])
    ours = group.read(0, "tap2").astype(np.float64)
    wanted = make_values(LATENTS, 0).astype(np.float64)
    cosine = (ours * wanted).sum(-1) / np.linalg.norm(ours, axis=-1) / np.linalg.norm(wanted, axis=-1)
    assert cosine.min() > 0.999
    assert verify(cache).ok


def test_a_torn_leftover_is_replaced_but_a_committed_object_never(local_place: Place) -> None:
    cache = new_cache(local_place)
    group = add_group(cache)
    flow = group.clip_arrays[1]
    cache.store.put_if_absent(flow.key(0), b"half an obj")
    fill(cache, group)
    assert verify(cache).ok
    whole = cache.store.get(flow.key(1))
    assert cache.store.swap(flow.key(1), whole, whole[:40])
    with pytest.raises(CorruptDataError, match=r"c\.1\.0\.0\.0\.0 is committed but its bytes fail"):
        write(Cache.open(local_place.url).group("toy"), 1)
    assert cache.store.get(flow.key(1)) == whole[:40]


def test_committing_before_the_data_is_there_is_caught(place: Place) -> None:
    """The suite has teeth: a build that commits first is found out by the reader and by verify."""
    cache = new_cache(place)
    group = add_group(cache)
    result = write(group, 0)
    for item in result.objects:
        cache.store.delete(item.key)
    cache.group("toy").ledger.commit(0, [result])
    with pytest.raises(CorruptDataError, match="is committed but gone"):
        group.read(0, "flow")
    problems = verify(cache).problems
    assert {problem.key for problem in problems if problem.kind == "gone"} == {item.key for item in result.objects}


def test_a_commit_whose_answer_was_lost_is_not_repeated(local_place: Place) -> None:
    cache = new_cache(local_place)
    group = add_group(cache)
    result = write(group, 0)
    group.commit(0, [result])
    group.commit(0, [result, failed(1)])
    group.commit(0, [result])
    names = cache.store.children("ledger/toy")
    assert names == ("00000000.000.json", "00000000.001.json", "group.json")
    assert group.states().ok.tolist() == [True, False, False]
    assert group.states().failed.tolist() == [False, True, False]


def test_a_failed_clip_becomes_ok_later_and_ok_stays_ok(place: Place) -> None:
    cache = new_cache(place)
    group = add_group(cache)
    group.commit(0, [failed(0), failed(1)])
    before = group.ledger.clip(0)
    assert before is not None
    assert before.status == "failed"
    fill(cache, group, [0])
    group.commit(0, [failed(0), failed(1, "again")])
    states = group.states()
    assert states.ok.tolist() == [True, False, False]
    assert states.reasons == {1: ("no_frames", "again")}
    assert group.read(0, "flow").shape == FEW_SPECS[0].shape
    assert states.objects(1) == ()


def test_an_object_may_not_be_committed_in_another_unit(local_place: Place) -> None:
    group = add_group(new_cache(local_place))
    with pytest.raises(ValueError, match="clip 2 is not of unit 0 of 2 clips"):
        group.commit(0, [failed(2)])


def test_full_disks_and_broken_folders_end_in_a_named_error(local_place: Place, tmp_path: Path) -> None:
    group = add_group(new_cache(local_place))
    (tmp_path / "cache" / "toy_flow" / "zarr.json").unlink()
    (tmp_path / "cache" / "toy_flow").rmdir()
    (tmp_path / "cache" / "toy_flow").write_text("a file where a folder must be")
    with pytest.raises(StorageError, match=r"write .*toy_flow/c.0.0.0.0.0: NotADir"):
        write(group, 0)


@pytest.mark.parametrize("damage", ["gone", "cut", "flipped", "swapped", "stale"])
def test_every_damage_to_a_committed_object_is_detected(local_place: Place, damage: str) -> None:
    rng = np.random.default_rng(7)
    cache = new_cache(local_place)
    group = add_group(cache)
    fill(cache, group)
    keys = sorted(committed_digests(group))
    for key in keys:
        good = cache.store.get(key)
        index = int(key.split(".")[1])
        bad = {
            "gone": None,
            "cut": good[: rng.integers(len(good))],
            "flipped": _flip(good, int(rng.integers(8 * len(good)))),
            "swapped": cache.store.get(key.replace(f"c.{index}.", f"c.{(index + 1) % 3}.", 1)),
            "stale": good + b"\x00",
        }[damage]
        cache.store.delete(key)
        if bad is not None:
            cache.store.put_if_absent(key, bad)
        assert key in {problem.key for problem in verify(cache).problems}, f"{damage} {key}"
        with pytest.raises(CorruptDataError, match="cache verify"):
            _read_all(group, index)
        cache.store.delete(key)
        cache.store.put_if_absent(key, good)
    assert verify(cache).ok


def _flip(data: bytes, bit: int) -> bytes:
    flipped = bytearray(data)
    flipped[bit // 8] ^= 1 << (bit % 8)
    return bytes(flipped)


def _read_all(group: object, index: int) -> None:
    from p4dprep.cache import Group

    assert isinstance(group, Group)
    group.read_time(index, verify=True)
    for spec in group.targets:
        group.read(index, spec.name, verify=True)


def test_a_flipped_bit_is_found_by_a_plain_read(local_place: Place) -> None:
    rng = np.random.default_rng(3)
    cache = new_cache(local_place)
    group = add_group(cache)
    fill(cache, group)
    key = group.clip_arrays[1].key(2)
    good = cache.store.get(key)
    for _ in range(200):
        bad = _flip(good, int(rng.integers(8 * len(good))))
        assert cache.store.swap(key, cache.store.get(key), bad)
        with pytest.raises(CorruptDataError, match="is damaged: its bytes fail their checksum"):
            group.read(2, "flow")


def test_verify_names_metadata_that_was_changed(local_place: Place) -> None:
    cache = new_cache(local_place)
    group = add_group(cache)
    fill(cache, group)
    key = "toy_flow/zarr.json"
    good = cache.store.get(key)
    assert cache.store.swap(key, good, good.replace(b"0.015625", b"0.03125"))
    assert [(problem.kind, problem.key) for problem in verify(cache).problems] == [("wrong metadata", key)]
    cache.store.delete(key)
    assert [(problem.kind, problem.key) for problem in verify(cache).problems] == [("wrong metadata", key)]
    Cache.create(local_place.url, SAMPLING, clips_per_unit=2)
    assert verify(cache).ok


def test_a_torn_record_commits_nothing_and_is_named(local_place: Place) -> None:
    cache = new_cache(local_place)
    group = add_group(cache)
    fill(cache, group, [0])
    key = "ledger/toy/00000000.000.json"
    record = cache.store.get(key)
    assert cache.store.swap(key, record, record[:50])
    with pytest.raises(MissingDataError, match="was never committed"):
        Cache.open(local_place.url).group("toy").read(0, "flow")
    assert [problem.kind for problem in verify(cache).problems] == ["torn record"]
    fill(cache, group)
    assert verify(cache).ok


def test_a_torn_record_that_is_replaced_is_seen_by_those_who_saw_it_torn(local_place: Place) -> None:
    cache = new_cache(local_place)
    group = add_group(cache)
    cache.store.put_if_absent("ledger/toy/00000000.000.json", b'{"unit": 0')
    onlooker = Cache.open(local_place.url).group("toy")
    with pytest.raises(MissingDataError, match="was never committed"):
        onlooker.read(0, "flow")
    fill(cache, group, [0])
    assert onlooker.read(0, "flow").shape == FEW_SPECS[0].shape


def _damage(cache: Cache, key: str, damage: str) -> None:
    data = cache.store.get(key)
    cache.store.delete(key)
    if damage == "cut":
        cache.store.put_if_absent(key, data[:50])


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_group_that_lost_its_manifest_is_named_and_neither_collected_nor_taken_over(
    place: Place, damage: str
) -> None:
    fill(new_cache(place), add_group(new_cache(place)))
    key = "ledger/toy/group.json"
    _damage(new_cache(place), key, damage)
    before = Store(place.url, place.storage_options).list()
    cache = Cache.open(place.url, place.storage_options)
    assert [(problem.kind, problem.key) for problem in verify(cache).problems] == [("lost manifest", key)]
    for refused in (
        lambda: gc(cache, delete=True, min_age_seconds=0),
        lambda: cache.add_group("toy", "toy:x", {"weights": "other"}, FEW_SPECS),
        lambda: cache.read(0, "toy_flow"),
        lambda: new_cache(place),
    ):
        with pytest.raises(CorruptDataError, match=r"toy/group.json is gone or damaged, .*restore it from a copy"):
            refused()
    assert cache.store.list() == before


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_new_clips_never_take_the_places_of_lost_ones(local_place: Place, damage: str) -> None:
    cache = new_cache(local_place)
    fill(cache, add_group(cache))
    cache.extend(make_corpus(5))
    _damage(cache, "clips.parquet/part-00001.parquet", damage)
    cache = Cache.open(local_place.url)
    assert {problem.message for problem in verify(cache).problems} == {
        "it has more clips than clips.parquet, where a part is gone or damaged; restore it from a copy"
    }
    for refused in (lambda: cache.extend(make_corpus(9).slice(7)), lambda: new_cache(local_place)):
        with pytest.raises(CorruptDataError, match="has 3 clips of 5: a part is gone or damaged"):
            refused()


def test_gc_lists_leftovers_first_and_never_takes_what_is_committed(place: Place) -> None:
    cache = new_cache(place)
    group = add_group(cache)
    fill(cache, group, [0, 2])
    before = {key: cache.store.get(key) for key in cache.store.list()}
    left = {item.key for item in write(group, 1).objects}
    partial_key = f"toy_flow/c.1.0.0.0.0.{secrets.token_hex(6)}.partial"
    cache.store.put_if_absent(partial_key, b"half")
    young = gc(cache, delete=True)
    assert (young.unreferenced, young.num_too_young) == ({}, len(left) + 1)
    listed = gc(cache, delete=False, min_age_seconds=0)
    assert set(listed.unreferenced) == left | {partial_key}
    assert cache.store.exists(partial_key)
    assert gc(cache, delete=True, min_age_seconds=0).num_bytes == listed.num_bytes
    assert {key: cache.store.get(key) for key in cache.store.list()} == before
    assert verify(cache).ok


def test_a_record_that_names_a_strange_array_is_undecodable(local_place: Place) -> None:
    cache = new_cache(local_place)
    group = add_group(cache)
    cache.store.put_if_absent("elsewhere/c.0", b"x")
    digest = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
    strange = ObjectRecord(key="elsewhere/c.0", size_bytes=1, digest=digest)
    group.commit(0, [ClipResult(index=0, id="clip-0", status="ok", objects=(strange,))])
    assert [problem.kind for problem in verify(cache).problems] == ["undecodable"]


def test_times_and_values_survive_a_store_that_lost_its_answers(s3_place: Place) -> None:
    """A conditional write that landed but whose answer was lost is refused on the retry, by our own object."""
    store = Store(s3_place.url, s3_place.storage_options)
    data = make_times(0).tobytes()
    assert store.put_if_absent("x", data)
    assert store.put_if_absent("x", data)
    assert not store.put_if_absent("x", b"other")
