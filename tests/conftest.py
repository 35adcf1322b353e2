"""What all tests share."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from tests import faulty_teachers
from tests.s3 import s3_endpoint, s3_place

__all__ = ["s3_endpoint", "s3_place"]

ROOT = Path(__file__).parents[1]
NEEDS_RAY = (
    "tests/cli/test_demo.py",
    "tests/cli/test_extract.py",
    "tests/cli/test_worlds.py",
    "tests/e2e/test_bad_folder.py",
    "tests/e2e/test_kill.py",
    "tests/e2e/test_new_user.py",
    "tests/e2e/test_train_ray.py",
    "tests/p4dprep/extract/",
    "tests/student/evaluate/test_workers.py",
    "tests/test_readme.py::test_a_block_of_commands_runs_as_it_stands[ray start",
)
"""They share one Ray. The README's other commands start each its own, and would add a third to the longer half."""
README = "tests/test_readme.py"
SHARED_VIDEOS = ROOT.parent / "shared" / "videos"


class ByFile(LoadScopeScheduling):
    """Where several processes share the tests, one has all that share a Ray: two of them would starve two cores."""

    def _split_scope(self, nodeid: str) -> str:
        return "ray" if nodeid.startswith(NEEDS_RAY) else nodeid.split("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    """One file's tests stay in one process, whose fixtures they share; files go out in the order of collection."""
    config.option.loadscopereorder = False
    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The README comes first: a file that takes minutes, begun last, would leave the other process idle."""
    items.sort(key=lambda item: not item.nodeid.startswith(README) or item.nodeid.startswith(NEEDS_RAY))


@pytest.fixture(scope="session")
def strangers_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stranger's package of teachers, laid out but not yet seen by anybody."""
    return faulty_teachers.install(tmp_path_factory.mktemp("stranger"))


@pytest.fixture(scope="module")
def stranger(strangers_folder: Path) -> Iterator[None]:
    """The stranger's teachers are installed for the tests of one module, and for no other module's."""
    with faulty_teachers.seen(strangers_folder):
        yield


@pytest.fixture(scope="session")
def ray_cluster(strangers_folder: Path) -> Iterator[None]:
    """One Ray for all tests of a session, started as `extract` starts it; its workers see the stranger's teachers."""
    import ray

    from p4dprep.extract.job import start_ray

    with faulty_teachers.seen(strangers_folder):
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
