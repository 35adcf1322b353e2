"""A store that fails at its n-th operation, in one of four ways."""

import contextlib
import threading
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeVar

import pytest

from p4dprep.errors import StorageError
from p4dprep.storage import Store

T = TypeVar("T")
Mode = Literal["raise", "die before", "die after", "torn write"]
MODES: tuple[Mode, ...] = ("raise", "die before", "die after", "torn write")


class Died(BaseException):
    """Stands for the end of the process: nothing may catch it."""


class Fuse:
    """Counts operations; the `at`-th one (from 0) blows."""

    def __init__(self, at: int, mode: Mode) -> None:
        self.at, self.mode, self.count = at, mode, 0
        self._lock = threading.Lock()  # ledgers are read by many threads

    def burn(self, operation: Callable[[], T], tear: Callable[[], None] = lambda: None) -> T:
        """Run one operation, or fail as asked."""
        with self._lock:
            blows = self.count == self.at
            self.count += 1
        if not blows:
            return operation()
        if self.mode == "raise":
            raise StorageError(5, "injected")
        if self.mode == "die after":
            with contextlib.suppress(FileNotFoundError):
                operation()
        if self.mode == "torn write":
            tear()
        raise Died


class FaultyStore(Store):
    """A local store whose operations burn a fuse. A torn write leaves half an object under its own name, which is
    worse than our local writes ever are: it stands for stores that do not rename."""

    def __init__(self, url: str, storage_options: Any = None, *, fuse: Fuse) -> None:
        super().__init__(url, storage_options)
        self.fuse = fuse

    def _tear(self, key: str, data: bytes) -> Callable[[], None]:
        return lambda: Store.put_if_absent(self, key, data[: len(data) // 2]) and None

    def get(self, key: str) -> bytes:
        return self.fuse.burn(lambda: Store.get(self, key))

    def put_if_absent(self, key: str, data: bytes, durable: bool = True) -> bool:
        return self.fuse.burn(lambda: Store.put_if_absent(self, key, data, durable), self._tear(key, data))

    def swap(self, key: str, expected: bytes, data: bytes) -> bool:
        def tear() -> None:
            Store.delete(self, key)
            Store.put_if_absent(self, key, data[: len(data) // 2])

        return self.fuse.burn(lambda: Store.swap(self, key, expected, data), tear)

    def sync(self, keys: Iterable[str]) -> None:
        return self.fuse.burn(lambda: Store.sync(self, keys))

    def children(self, prefix: str = "") -> tuple[str, ...]:
        return self.fuse.burn(lambda: Store.children(self, prefix))


def install(monkeypatch: pytest.MonkeyPatch, fuse: Fuse) -> None:
    """Let every cache that is opened from now on use a faulty store."""
    monkeypatch.setattr("p4dprep.cache.store.Store", lambda url, options=None: FaultyStore(url, options, fuse=fuse))
