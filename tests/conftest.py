"""What all tests share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import faulty_teachers
from tests.s3 import s3_endpoint, s3_place

__all__ = ["s3_endpoint", "s3_place"]

ROOT = Path(__file__).parents[1]
SHARED_VIDEOS = ROOT.parent / "shared" / "videos"


@pytest.fixture(scope="session")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A stranger's installed package of teachers, seen by this process and every one it starts."""
    folder = faulty_teachers.install(tmp_path_factory.mktemp("stranger"))
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder), before)))
    yield folder
    os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="session")
def ray_cluster(stranger: Path) -> Iterator[None]:
    """One Ray for all tests of a session, started as `extract` starts it."""
    import ray

    from p4dprep.extract.job import start_ray

    start_ray(None)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def ray_address(ray_cluster: None) -> str:
    """Where a command joins that Ray: `--address` saves it the seconds of starting one of its own."""
    import ray

    return str(ray.get_runtime_context().gcs_address)


@pytest.fixture(scope="session")
def shared_videos() -> Path:
    """The small real clips beside the project."""
    if not SHARED_VIDEOS.is_dir():
        pytest.skip("the real clips are not here; other tests make their own")
    return SHARED_VIDEOS
