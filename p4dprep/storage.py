"""Bytes at a place: a folder or a bucket behind one small interface, through fsspec.

Writes are whole or absent. `put_if_absent` lets exactly one of several writers win where the store can
(local disks by link, S3 by `If-None-Match`); elsewhere it is the best that fsspec offers.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem
from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

from p4dprep.errors import RequestError, StorageError

T = TypeVar("T")

RETRY_SECONDS = 60.0
"""How long a bucket operation is retried before it counts as failed; s3fs alone gives up after about 2 s."""

_NUM_RACES = 20
"""How often a write is tried anew when a rival keeps getting in between."""

_NUM_SYNCS = 8

_WRITE_BYTES = 1 << 20
"""A longer write asks the kernel for page cache in such large pieces that finding them takes half as long again."""

_PERMANENT = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
_PASSING_STATUS = (307, 408, 409, 425, 429)
_PASSING_CODES = ("RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch")
_LASTING_NAMES = (  # of botocore, which is slow to import and not needed for a local disk
    "NoCredentialsError", "PartialCredentialsError", "UnknownCredentialError", "ProfileNotFound", "ConfigParseError",
    "ParamValidationError", "InvalidRegionError", "SSOTokenLoadError", "UnauthorizedSSOTokenError",
)  # fmt: skip
_SECRET = re.compile(
    r"(?i)(?P<key>[\w-]*(?:secret|token|password|passwd|signature|credential|access[_-]?key|api[_-]?key|authorization)[\w-]*)"
    r"(?<!Error)(?P<sep>[\"']?\s*[=:]\s*[\"']?)(?P<value>[^\s&\"',}]+)"
)
_USERINFO = re.compile(r"(?P<scheme>[a-zA-Z][a-zA-Z0-9+.-]*://)[^/\s@]+@")


def redact(text: str) -> str:
    """Text without credentials: user info and secret query values of URLs, and `secret=...`-like pairs, become ***."""
    text = _USERINFO.sub(r"\g<scheme>***@", text)
    return _SECRET.sub(r"\g<key>\g<sep>***", text)


def one_line(error: BaseException) -> str:
    """A foreign error within a message of ours: its type and text on one line, without credentials, cut to fit."""
    text = " ".join(redact(str(error)).split())
    return f"{type(error).__name__}: {text[:300]}{'...' if len(text) > 300 else ''}"


def sha256_hex(data: bytes | memoryview) -> str:
    """Digest of an object, as commit records keep it."""
    return hashlib.sha256(data).hexdigest()


def open_filesystem(
    url: str, storage_options: Mapping[str, Any] | None = None
) -> tuple[fsspec.AbstractFileSystem, str]:
    """The fsspec file system behind a URL or plain path, and the path inside it.

    Listings are never cached: a stale one would hide objects that another worker has just written.

    Raises:
        RequestError: the protocol is unknown or its package is not installed.
    """
    options = dict(storage_options or {})
    if "://" in url and not url.startswith(("file://", "local://")):
        options = {"use_listings_cache": False} | options
    else:
        url = os.path.abspath(os.path.expanduser(url.removeprefix("file://").removeprefix("local://")))
        options = {}
    try:
        filesystem, path = fsspec.core.url_to_fs(url, **options)
    except (ValueError, ImportError, TypeError) as error:
        raise RequestError(f"cannot open {redact(url)}: {redact(str(error))}") from None
    return filesystem, str(path)


def is_local(filesystem: fsspec.AbstractFileSystem) -> bool:
    """Whether the file system is this machine's own."""
    return isinstance(filesystem, LocalFileSystem)


def _answer(error: BaseException) -> tuple[int, str]:
    """HTTP status and error code of S3's answer; 0 and nothing if it gave none."""
    found = getattr(error.__cause__, "response", None) or getattr(error, "response", None)
    response = found if isinstance(found, dict) else {}
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return int(status), str(response.get("Error", {}).get("Code", ""))


def _is_precondition_failure(error: BaseException) -> bool:
    return _answer(error)[1] in ("PreconditionFailed", "412", "ConditionalRequestConflict")


def _is_refusal(error: BaseException) -> bool:
    """Whether the store, or the client before it asked, refuses the request itself: above all bad credentials.

    An expired token is a 400, and S3 answers a HEAD without a body, so that the status alone must tell.
    """
    status, code = _answer(error)
    refused = 300 <= status < 500 and status not in _PASSING_STATUS and code not in _PASSING_CODES
    return refused or type(error).__name__ in _LASTING_NAMES


def _is_of_storage(error: BaseException) -> bool:
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in (
        "aiohttp", "botocore", "aiobotocore", "urllib3", "gcsfs", "httpx",
    )  # fmt: skip


def _is_passing(error: BaseException) -> bool:
    """Whether trying again may help: a broken connection or a busy store, not a missing file or a full disk."""
    if isinstance(error, _PERMANENT) or _is_precondition_failure(error) or _is_refusal(error):
        return False
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
        return False
    return _is_of_storage(error)


def retry(operation: Callable[[], T], what: str) -> T:
    """Run a storage operation, again while the store fails in a passing way.

    Raises:
        StorageError: it still fails after `RETRY_SECONDS`, or in a lasting way, credentials removed from the message.
        FileNotFoundError, FileExistsError: as the store says.
    """
    try:
        return operation()
    except (FileNotFoundError, FileExistsError):
        raise
    except Exception as error:
        if not _is_passing(error):
            raise _final(error, what) from None
    attempts = Retrying(
        retry=retry_if_exception(_is_passing),
        stop=stop_after_delay(RETRY_SECONDS),
        wait=wait_random_exponential(multiplier=0.2, max=10),
        reraise=True,
    )
    try:
        return attempts(operation)
    except (FileNotFoundError, FileExistsError):
        raise
    except Exception as error:
        raise _final(error, what) from None


def _final(error: Exception, what: str) -> Exception:
    """What a caller gets to see of a failure that will not pass."""
    if _is_precondition_failure(error):
        return FileExistsError(what)
    if not _is_of_storage(error):
        return error
    message = f"{what}: {type(error).__name__}: {error}"
    if _is_refusal(error):
        message = f"{message.rstrip('.')}; are credentials, region and endpoint right, and the credentials not expired?"
    number = error.errno if isinstance(error, OSError) else None
    return StorageError(number or errno.EIO, redact(message))


class Store:
    """Objects under one root. Keys are relative POSIX paths; none can leave the root.

    Args:
        url: any fsspec URL or a plain path.
        storage_options: passed to fsspec; held in memory only.
    """

    def __init__(self, url: str, storage_options: Mapping[str, Any] | None = None) -> None:
        self.url = redact(url)
        self.filesystem, root = open_filesystem(url, storage_options)
        self.root = root.rstrip("/")
        self.is_local = is_local(self.filesystem)

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    def path(self, key: str) -> str:
        """The file system's path of a key.

        Raises:
            RequestError: the key is absolute or climbs out of the root.
        """
        parts = PurePosixPath(key).parts
        if not parts or key.startswith("/") or ".." in parts or "\\" in key or "\0" in key:
            raise RequestError(f"refused key {key!r}: it does not stay under {self.url}")
        return f"{self.root}/{key}"

    def get(self, key: str) -> bytes:
        """The whole object.

        Raises:
            FileNotFoundError: there is none.
            StorageError: the store failed.
        """
        path = self.path(key)
        if self.is_local:
            return retry(Path(path).read_bytes, f"read {self.url}/{key}")
        return retry(lambda: bytes(self.filesystem.cat_file(path)), f"read {self.url}/{key}")

    def put_if_absent(self, key: str, data: bytes, durable: bool = True) -> bool:
        """Write an object unless one is there. Exactly one writer wins.

        Args:
            key: where.
            data: the whole object.
            durable: wait until a local disk has it; with False, `sync` must be called before anything refers to it.

        Returns:
            True if the object now holds `data` (also when an earlier try of ours had landed); False if another
            object was there first and stays.

        Raises:
            StorageError: the store failed.
        """
        for _ in range(_NUM_RACES):
            if self._create(key, data, durable):
                return True
            with contextlib.suppress(FileNotFoundError):  # a rival's write that was announced and then vanished
                return self.get(key) == data
        raise StorageError(errno.EIO, f"write {self.url}/{key}: another writer came and went {_NUM_RACES} times")

    def _create(self, key: str, data: bytes, durable: bool) -> bool:
        path, what = self.path(key), f"write {self.url}/{key}"
        try:
            if self.is_local:
                return retry(lambda: _link_new_file(path, data, durable), what)
            retry(lambda: self.filesystem.pipe_file(path, data, mode="create"), what)
        except FileExistsError:
            return False
        except FileNotFoundError:
            raise StorageError(errno.ENOENT, f"{what}: there is no such bucket, or the folder was removed") from None
        return True

    def swap(self, key: str, expected: bytes, data: bytes) -> bool:
        """Replace an object only if it still holds `expected`: for metadata and torn leftovers, never for records.

        Local disks take a lock on the root folder, S3 compares the ETag; elsewhere a rival may slip in between.

        Returns:
            False if the object is gone or holds something else.
        """
        path, what = self.path(key), f"write {self.url}/{key}"
        try:
            if not self.is_local:
                return self._swap_remote(key, expected, data)
            with _folder_lock(self.root):
                if self.get(key) != expected:
                    return False
                retry(lambda: _replace_file(path, data), what)
                return True
        except FileNotFoundError:
            return False

    def _swap_remote(self, key: str, expected: bytes, data: bytes) -> bool:
        path, what = self.path(key), f"write {self.url}/{key}"
        for attempt in range(_NUM_RACES):
            tag = retry(lambda: self.filesystem.info(path), what).get("ETag")
            found = self.get(key)
            if found != expected:
                return attempt > 0 and found == data
            condition = {"IfMatch": tag} if tag and "s3" in self.filesystem.protocol else {}
            with contextlib.suppress(FileExistsError):  # by a rival, by our own write whose answer was lost, or passing
                retry(partial(self.filesystem.pipe_file, path, data, **condition), what)
                return True
        raise StorageError(errno.EIO, f"{what}: it kept changing under {_NUM_RACES} tries")

    def claim(self, key: str, data: bytes, is_whole: Callable[[bytes], bool], durable: bool = True) -> bytes:
        """Write an object unless a whole one is there; a torn leftover is replaced.

        Returns:
            The bytes that stand: `data`, or those of the writer who was first.
        """
        for _ in range(_NUM_RACES):
            if self.put_if_absent(key, data, durable):
                return data
            present = self.get(key)
            if is_whole(present):
                return present
            if self.swap(key, present, data):
                return data
        raise StorageError(errno.EIO, f"write {self.url}/{key}: it kept changing under {_NUM_RACES} tries")

    def sync(self, keys: Iterable[str]) -> None:
        """Wait until a local disk has these objects and their names; buckets answer only when they have."""
        if not self.is_local:
            return
        files = {self.path(key) for key in keys}
        paths = files | {os.path.dirname(path) for path in files}
        with ThreadPoolExecutor(_NUM_SYNCS) as pool:  # the disk's journal takes those that wait together at once
            list(pool.map(lambda path: retry(partial(_sync_path, path), f"sync {self.url}"), paths))

    def read_into(self, key: str, buffers: Sequence[memoryview]) -> bool:
        """Fill buffers, one after the other, with a local object and no copy in between.

        Returns:
            False if the object has another size than the buffers together.

        Raises:
            FileNotFoundError: there is none.
            StorageError: the store failed.
        """
        return retry(lambda: _read_vector(self.path(key), buffers), f"read {self.url}/{key}")

    def exists(self, key: str) -> bool:
        """Whether an object is there."""
        path = self.path(key)
        return retry(lambda: bool(self.filesystem.exists(path)), f"look up {self.url}/{key}")

    def delete(self, key: str) -> None:
        """Remove an object; a missing one is fine."""
        path = self.path(key)
        with contextlib.suppress(FileNotFoundError):
            retry(lambda: self.filesystem.rm_file(path), f"delete {self.url}/{key}")

    def modified_seconds(self, key: str) -> float:
        """When an object was last written, in seconds since the epoch.

        Raises:
            FileNotFoundError: there is none.
        """
        path = self.path(key)
        if self.is_local:
            return retry(lambda: os.stat(path).st_mtime, f"look up {self.url}/{key}")
        return float(retry(lambda: self.filesystem.modified(path), f"look up {self.url}/{key}").timestamp())

    def children(self, prefix: str = "") -> tuple[str, ...]:
        """Names directly in a folder, sorted; empty if the folder is missing."""
        folder = self.path(prefix) if prefix else self.root
        try:
            names = retry(lambda: self.filesystem.ls(folder, detail=False), f"list {self.url}/{prefix}")
        except (FileNotFoundError, NotADirectoryError):
            return ()
        return tuple(sorted({PurePosixPath(name).name for name in names} - {PurePosixPath(folder).name}))

    def list(self, prefix: str = "") -> dict[str, int]:
        """Key to size in bytes of every object below a folder, in key order; empty if the folder is missing."""
        folder = self.path(prefix.rstrip("/")) if prefix else self.root
        if self.is_local:
            return dict(sorted((f"{path}"[len(self.root) + 1 :], size) for path, size in _walk(folder)))
        try:
            found = retry(lambda: self.filesystem.find(folder, detail=True), f"list {self.url}/{prefix}")
        except FileNotFoundError:
            return {}
        return dict(sorted((path[len(self.root) + 1 :], int(info["size"] or 0)) for path, info in found.items()))


def _walk(folder: str) -> Iterator[tuple[str, int]]:
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(entry.path)
            else:
                with contextlib.suppress(FileNotFoundError):
                    yield entry.path, entry.stat(follow_symlinks=False).st_size


def _write_partial(path: str, data: bytes, durable: bool) -> str:
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
    except FileExistsError as error:  # not our object: a file where its folder must be
        raise NotADirectoryError(errno.ENOTDIR, "a file stands where a folder must be", error.filename) from None
    partial_path = f"{path}.{secrets.token_hex(6)}.partial"
    try:
        with open(partial_path, "xb", buffering=0) as file:
            view = memoryview(data)
            while view:
                view = view[file.write(view[:_WRITE_BYTES]) :]
            if durable:
                os.fsync(file.fileno())
    except BaseException:  # a full disk above all: leave nothing
        with contextlib.suppress(OSError):
            os.unlink(partial_path)
        raise
    return partial_path


def _sync_path(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _folder_lock(folder: str) -> Iterator[None]:
    """Exclusive among threads and processes of this machine; network mounts may not have it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _read_vector(path: str, buffers: Sequence[memoryview]) -> bool:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        wanted = sum(buffer.nbytes for buffer in buffers)
        return os.fstat(descriptor).st_size == wanted and os.preadv(descriptor, buffers, 0) == wanted
    finally:
        os.close(descriptor)


def _link_new_file(path: str, data: bytes, durable: bool) -> bool:
    if os.path.exists(path):
        return False
    partial_path = _write_partial(path, data, durable)
    try:
        os.link(partial_path, path)
    except FileExistsError:
        return False
    finally:
        os.unlink(partial_path)
    if durable:
        _sync_path(os.path.dirname(path))
    return True


def _replace_file(path: str, data: bytes) -> None:
    partial_path = _write_partial(path, data, durable=True)
    try:
        os.replace(partial_path, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial_path)
        raise
    _sync_path(os.path.dirname(path))
