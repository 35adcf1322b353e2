"""A real HTTP S3 server for tests: moto's, on a free port of this machine. Import the fixtures where needed."""

import contextlib
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

ACCESS_KEY = "AKIACANARY0ACCESS000"
SECRET_KEY = "canary+secret/of+the+tests+0123456789abc"  # noqa: S105


@dataclass(frozen=True, kw_only=True)
class Place:
    """Somewhere to keep a cache: a URL and what fsspec needs to open it."""

    url: str
    storage_options: dict[str, Any] = field(default_factory=dict)


def storage_options(endpoint: str) -> dict[str, Any]:
    """What s3fs needs to reach a server; the only place with the credentials."""
    return {
        "key": ACCESS_KEY,
        "secret": SECRET_KEY,
        "client_kwargs": {"endpoint_url": endpoint},
    }


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """A running server's endpoint URL."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """One server for all tests of a session."""
    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture
def s3_place(s3_endpoint: str) -> Place:
    """A new bucket."""
    import s3fs

    bucket = f"bucket-{secrets.token_hex(6)}"
    options = storage_options(s3_endpoint)
    s3fs.S3FileSystem(**options, use_listings_cache=False).mkdir(bucket)
    return Place(url=f"s3://{bucket}/cache", storage_options=options)
