"""What networks and buckets do to a cache is survived or named, never taken for success. TRUST.md, promise 5.

The faults are real: a proxy before a real S3 server resets, stalls and cuts, before and after a request took effect.
s3fs's and botocore's own retries are off where they would hide ours.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import s3fs

from p4dprep import storage
from p4dprep.cache import Cache, verify
from p4dprep.errors import StorageError
from p4dprep.storage import Store
from tests.faulty_proxy import LASTING, PASSING, Fault, FaultyProxy, faulty_proxy
from tests.p4dprep.cache.builders import (
    FEW_SPECS,
    FINGERPRINT,
    FLOW,
    SAMPLING,
    add_group,
    committed_digests,
    fill,
    make_corpus,
    make_times,
    make_values,
    new_cache,
    write,
)
from tests.s3 import ACCESS_KEY, SECRET_KEY, Place, storage_options

READ_TIMEOUT_SECONDS = 0.3
NUM_CLIPS = 3
IMPATIENT = {"config_kwargs": {"read_timeout": READ_TIMEOUT_SECONDS, "retries": {"max_attempts": 0}}}


@pytest.fixture
def proxy(s3_endpoint: str) -> Iterator[FaultyProxy]:
    with faulty_proxy(s3_endpoint) as running:
        running.late_seconds = 2 * READ_TIMEOUT_SECONDS
        yield running


@pytest.fixture
def behind(proxy: FaultyProxy, s3_place: Place, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A new bucket behind the proxy, with no retries but ours, and no pauses between those."""
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    monkeypatch.setattr(storage, "wait_random_exponential", lambda **_: lambda _: 0)
    return Place(url=s3_place.url, storage_options=storage_options(proxy.endpoint) | IMPATIENT)


Operation = Callable[[Store, str], object]


def _get_or_none(store: Store, key: str) -> bytes | None:
    try:
        return store.get(key)
    except FileNotFoundError:
        return None


OPERATIONS: dict[str, Operation] = {
    "get": lambda store, key: store.get(f"{key}/old"),
    "get of nothing": lambda store, key: _get_or_none(store, f"{key}/none"),
    "put": lambda store, key: store.put_if_absent(f"{key}/new", b"new"),
    "put on another": lambda store, key: store.put_if_absent(f"{key}/old", b"new"),
    "swap": lambda store, key: store.swap(f"{key}/old", b"old", b"new"),
    "swap too late": lambda store, key: store.swap(f"{key}/old", b"other", b"new"),
    "claim of a torn one": lambda store, key: store.claim(f"{key}/old", b"whole", lambda data: data == b"whole"),
    "exists": lambda store, key: (store.exists(f"{key}/old"), store.exists(f"{key}/none")),
    "delete": lambda store, key: store.delete(f"{key}/old"),
    "list": lambda store, key: [name.removeprefix(key) for name in store.list(key)],
    "children": lambda store, key: store.children(key),
    "modified": lambda store, key: store.modified_seconds(f"{key}/old") > 1e9,
}


def outcome(proxy: FaultyProxy, store: Store, name: str, at: int, fault: Fault) -> tuple[object, dict[str, bytes]]:
    """What an operation answers and what it leaves, with a fault at its `at`-th request; with none if that is -1."""
    key = f"{name.replace(' ', '-')}/{at}"
    store.put_if_absent(f"{key}/old", b"old")
    proxy.choose = at_request(at, fault)
    answer = OPERATIONS[name](store, key)
    proxy.choose = lambda _method: None
    return answer, {left.removeprefix(key): store.get(left) for left in store.list(key)}


@pytest.mark.parametrize("fault", PASSING)
def test_one_fault_at_any_request_of_any_operation_changes_nothing(
    proxy: FaultyProxy, behind: Place, fault: Fault
) -> None:
    """Every request in turn; every fourth where the fault costs a time-out."""
    step = 4 if fault in ("stall before", "stall after", "applied late") else 1
    store = Store(behind.url, behind.storage_options)
    for start, name in enumerate(OPERATIONS):
        wanted = outcome(proxy, store, name, -1, fault)
        for at in range(start % step, 20, step):
            before = len(proxy.log)
            assert outcome(proxy, store, name, at, fault) == wanted, f"{fault} at request {at} of {name}"
            if len(proxy.log) == before:
                break
    print(f"{len(proxy.log)} times {fault}, each survived")
    assert len(proxy.log) >= (4 if fault == "conflict" else 24 // step)


def at_request(at: int, fault: Fault) -> Callable[[str], Fault | None]:
    """The fault once, at the `at`-th request that can meet it, from 0."""
    num_seen = 0

    def choose(method: str) -> Fault | None:
        nonlocal num_seen
        num_seen += fault != "conflict" or method == "conditional PUT"
        return fault if num_seen == at + 1 and (fault != "conflict" or method == "conditional PUT") else None

    return choose


@pytest.mark.parametrize("fault", LASTING)
def test_expired_credentials_fail_at_once_and_are_named(proxy: FaultyProxy, s3_place: Place, fault: Fault) -> None:
    """With every library's own retries on, and our 60 s."""
    store = Store(s3_place.url, storage_options(proxy.endpoint))
    store.put_if_absent("x/old", b"old")
    proxy.choose = lambda _method: fault
    for operation in OPERATIONS.values():
        started = time.monotonic()
        with pytest.raises(StorageError, match=r"s3://bucket-\w+/cache/x.*credentials not expired\?") as caught:
            operation(store, "x")
        assert time.monotonic() - started < 5
        assert not {ACCESS_KEY, SECRET_KEY} & set(str(caught.value).split())
    proxy.choose = lambda _method: None
    assert store.get("x/old") == b"old"


def test_a_fault_that_lasts_is_named_after_the_retries(
    proxy: FaultyProxy, behind: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "RETRY_SECONDS", 0.1)
    store = Store(behind.url, behind.storage_options)
    for fault in PASSING:
        if fault == "conflict":
            continue
        proxy.choose = lambda _method, fault=fault: fault  # type: ignore[misc]
        with pytest.raises(StorageError, match=r"read s3://bucket-\w+/cache/x: \w+") as caught:
            store.get("x")
        assert SECRET_KEY not in str(caught.value)


@pytest.mark.parametrize("fault", ["reset after", "stall after", "applied late"])
def test_a_commit_whose_answer_is_lost_is_made_once(proxy: FaultyProxy, behind: Place, fault: Fault) -> None:
    cache = new_cache(behind)
    group = add_group(cache)
    result = write(group, 0)
    todo = [fault]
    proxy.choose = lambda method: todo.pop() if todo and method == "conditional PUT" else None
    group.commit(0, [result])
    assert proxy.log == [("conditional PUT", fault)]
    assert cache.store.children("ledger/toy") == ("00000000.000.json", "group.json")
    assert group.states().ok.tolist() == [True, False, False]


@dataclass(kw_only=True)
class Weather:
    """Seeded faults, `num_left` of them; a burst of three outlasts one retry."""

    rng: np.random.Generator
    num_left: int
    rate: float = 0.08
    burst: list[Fault] = field(default_factory=list)

    def choose(self, method: str) -> Fault | None:
        """The next request's fault."""
        if not self.burst and self.rng.random() < self.rate:
            kinds = PASSING + LASTING
            weights = np.array([0.25 if fault.startswith(("stall", "applied")) else 1.0 for fault in kinds])
            fault = kinds[self.rng.choice(len(kinds), p=weights / weights.sum())]
            self.burst = [fault] * int(self.rng.choice([1, 3]))
        if not self.burst or self.num_left == 0 or (self.burst[0] == "conflict" and method != "conditional PUT"):
            return None
        self.num_left -= 1
        return self.burst.pop()


def job(place: Place, heads: Path, promised: set[int]) -> dict[str, str]:
    """All that is done to a cache; what it promised once must be there ever after."""
    cache = Cache.create(place.url, SAMPLING, clips_per_unit=2, storage_options=place.storage_options)
    cache.extend(make_corpus(2))
    cache.extend(make_corpus(NUM_CLIPS))
    group = cache.add_group("toy", "toy:x", FINGERPRINT, FEW_SPECS, heads_folder=heads)
    for index in range(NUM_CLIPS):
        fill(cache, group, [index])
        promised.add(index)
    again = Cache.open(place.url, place.storage_options).group("toy")
    assert set(np.flatnonzero(again.states().ok).tolist()) >= promised
    for index in promised:
        np.testing.assert_array_equal(again.read_time(index, verify=True), make_times(index))
        np.testing.assert_allclose(again.read(index, "flow"), make_values(FLOW, index), atol=0.02)
    assert verify(cache).problems == ()
    return committed_digests(again)


def storm(proxy: FaultyProxy, place: Place, heads: Path, seed: int, num_faults: int) -> int:
    """Run a job again and again until the faults are spent and it ends; how often it failed by name."""
    weather = Weather(rng=np.random.default_rng(seed), num_left=num_faults)
    proxy.choose = weather.choose
    promised: set[int] = set()
    wanted = job(Place(url=str(heads.parent / f"undisturbed-{seed}")), heads, set())
    named: list[str] = []
    while True:
        try:
            found = job(place, heads, promised)
        except StorageError as error:
            named.append(str(error))
            continue
        if weather.num_left == 0:
            assert found == wanted
            assert SECRET_KEY not in "".join(named)
            return len(named)


def storms(
    proxy: FaultyProxy, behind: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seeds: range, num_faults: int
) -> None:
    monkeypatch.setattr(storage, "RETRY_SECONDS", 0.0)  # one retry and no more: bursts come through
    heads = tmp_path / "heads"
    (heads / "depth").mkdir(parents=True)
    (heads / "depth" / "config.json").write_text('{"width": 8}')
    started, num_named = time.monotonic(), 0
    for seed in seeds:
        place = Place(url=f"{behind.url}-{seed}", storage_options=behind.storage_options)
        num_named += storm(proxy, place, heads, seed, num_faults)
    print(
        f"{len(proxy.log)} faults in {proxy.num_requests} requests: {num_named} jobs ended in a named error, "
        f"0 wrong outcomes, {time.monotonic() - started:.0f} s, seeds {seeds}"
    )
    assert len(proxy.log) == len(seeds) * num_faults
    assert num_named > 0


def test_a_cache_made_in_a_storm_is_the_cache_made_in_calm(
    proxy: FaultyProxy, behind: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storms(proxy, behind, tmp_path, monkeypatch, range(1), 50)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_hundred_caches_made_in_storms_are_the_caches_made_in_calm(
    proxy: FaultyProxy, behind: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storms(proxy, behind, tmp_path, monkeypatch, range(100, 200), 50)
