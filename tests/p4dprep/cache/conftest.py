"""Where the caches under test lie: a local folder and a bucket."""

from pathlib import Path

import pytest

from tests.s3 import Place, s3_endpoint, s3_place

__all__ = ["s3_endpoint", "s3_place"]


@pytest.fixture
def local_place(tmp_path: Path) -> Place:
    """A folder that does not exist yet."""
    return Place(url=str(tmp_path / "cache"))


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest) -> Place:
    """Each kind of place in turn."""
    found = request.getfixturevalue(f"{request.param}_place")
    assert isinstance(found, Place)
    return found
