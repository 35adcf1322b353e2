import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from p4dprep import storage
from p4dprep.errors import RequestError, StorageError
from p4dprep.storage import Store, redact, retry
from tests.s3 import SECRET_KEY, Place, s3_endpoint, s3_place, storage_options

__all__ = ["s3_endpoint", "s3_place"]


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return Store(str(tmp_path / "root"))
    place = request.getfixturevalue("s3_place")
    assert isinstance(place, Place)
    return Store(place.url, place.storage_options)


def test_what_was_put_is_listed_read_and_deleted(store: Store) -> None:
    assert store.list() == {}
    assert store.children() == ()
    assert store.put_if_absent("a/b", b"one")
    assert store.put_if_absent("a.txt", b"three", durable=False)
    store.sync(["a.txt"])
    assert store.list() == {"a.txt": 5, "a/b": 3}
    assert store.list("a") == {"a/b": 3}
    assert store.children() == ("a", "a.txt")
    assert store.children("a") == ("b",)
    assert store.get("a/b") == b"one"
    assert store.exists("a/b")
    assert store.modified_seconds("a/b") > 1e9
    store.delete("a/b")
    store.delete("a/b")
    assert not store.exists("a/b")
    with pytest.raises(FileNotFoundError, match="a/b"):
        store.get("a/b")


def test_the_first_writer_wins_and_the_same_bytes_are_no_conflict(store: Store) -> None:
    assert store.put_if_absent("x", b"first")
    assert store.put_if_absent("x", b"first")
    assert not store.put_if_absent("x", b"second")
    assert store.get("x") == b"first"


def test_of_many_writers_exactly_one_wins(store: Store) -> None:
    for round_number in range(4):
        with ThreadPoolExecutor(6) as pool:
            won = list(pool.map(lambda n, key=f"{round_number}": store.put_if_absent(key, b"%d" % n), range(6)))  # type: ignore[misc]
        assert won.count(True) == 1
        assert store.get(f"{round_number}") == b"%d" % won.index(True)


def test_a_swap_needs_the_expected_bytes(store: Store) -> None:
    assert not store.swap("x", b"", b"new")
    store.put_if_absent("x", b"old")
    assert not store.swap("x", b"other", b"new")
    assert store.swap("x", b"old", b"new")
    assert store.get("x") == b"new"


def test_of_many_swaps_none_is_lost(store: Store) -> None:
    store.put_if_absent("list", b"")

    def add(number: int) -> None:
        while True:
            now = store.get("list")
            if store.swap("list", now, now + b"%d," % number):
                return

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(add, range(9)))
    assert sorted(store.get("list").split(b",")) == [b""] + [b"%d" % number for number in range(9)]


def test_a_claim_keeps_whole_objects_and_replaces_torn_ones(store: Store) -> None:
    assert store.claim("x", b"mine!", lambda data: len(data) == 5) == b"mine!"
    assert store.claim("x", b"yours", lambda data: len(data) == 5) == b"mine!"
    store.put_if_absent("torn", b"min")
    assert store.claim("torn", b"yours", lambda data: len(data) == 5) == b"yours"
    assert store.get("torn") == b"yours"


@pytest.mark.parametrize("key", ["../x", "a/../../x", "/etc/passwd", "", "a\\b", "a\0b"])
def test_a_key_cannot_leave_the_root(tmp_path: Path, key: str) -> None:
    with pytest.raises(RequestError, match="does not stay under"):
        Store(str(tmp_path)).path(key)


def test_a_sync_reaches_every_object_and_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(tmp_path))
    keys = [f"{folder}/{n}" for folder in "abc" for n in range(4)]
    for key in keys:
        store.put_if_absent(key, key.encode(), durable=False)
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    store.sync(keys)
    assert sorted(synced) == sorted((tmp_path / name).stat().st_ino for name in (*keys, "a", "b", "c"))


def test_a_sync_that_fails_for_one_object_fails(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.put_if_absent("a", b"a", durable=False)
    with pytest.raises(FileNotFoundError, match="gone"):
        store.sync(["a", "gone"])


def test_an_object_larger_than_one_write_is_whole(tmp_path: Path) -> None:
    store, data = Store(str(tmp_path)), os.urandom(5 << 19)
    assert store.put_if_absent("a", data)
    assert store.get("a") == data


def test_nothing_partial_is_left_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(tmp_path))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device") as caught:
        store.put_if_absent("x", b"data")
    assert caught.value.errno == errno.ENOSPC
    assert store.list() == {}


def test_a_failure_that_passes_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "wait_random_exponential", lambda **_: lambda _: 0)
    tries = []

    def shaky() -> str:
        tries.append(1)
        if len(tries) < 3:
            raise ConnectionResetError(errno.ECONNRESET, "reset")
        return "done"

    assert retry(shaky, "read x") == "done"
    monkeypatch.setattr(storage, "RETRY_SECONDS", 0.0)
    tries.clear()
    with pytest.raises(StorageError, match="read x: ConnectionResetError"):
        retry(shaky, "read x")


def test_a_bug_is_not_dressed_up_as_a_storage_failure() -> None:
    with pytest.raises(ZeroDivisionError, match="division"):
        retry(lambda: 1 / 0, "divide")


def test_a_missing_bucket_is_named_without_credentials(s3_endpoint: str) -> None:
    store = Store("s3://no-such-bucket-here/cache", storage_options(s3_endpoint))
    with pytest.raises(
        StorageError, match=r"write s3://no-such-bucket-here/cache/x: there is no such bucket"
    ) as caught:
        store.put_if_absent("x", b"data")
    assert SECRET_KEY not in str(caught.value)
    assert SECRET_KEY not in repr(store)


def test_an_unknown_protocol_is_the_requests_fault() -> None:
    with pytest.raises(RequestError, match="cannot open nope://x"):
        Store("nope://x")


@pytest.mark.parametrize(
    "text",
    [
        "s3://key:hunter2@bucket/x",
        "https://host/x?X-Amz-Signature=hunter2&y=1",
        "{'secret': 'hunter2'}",
        "aws_secret_access_key=hunter2",
        "token: hunter2",
        "Authorization: hunter2",
    ],
)
def test_credentials_are_removed_from_text(text: str) -> None:
    assert "hunter2" not in redact(text)
    assert "***" in redact(text)


def test_the_name_of_an_error_is_no_credential() -> None:
    assert redact("NoCredentialsError: Unable to locate credentials") == (
        "NoCredentialsError: Unable to locate credentials"
    )


def test_missing_credentials_are_named_at_once(
    s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    store = Store("s3://bucket/cache", {"client_kwargs": {"endpoint_url": s3_endpoint}})
    monkeypatch.setattr(storage, "retry_if_exception", None)  # a second try would fail on this
    with pytest.raises(StorageError, match="NoCredentialsError: Unable to locate credentials; are credentials"):
        store.get("x")
