"""`p4dprep demo`: from nothing to a verified cache, scores and a page; and the same on somebody's own clips."""

from pathlib import Path

import pytest
import typer.testing

from cli.app import app
from p4dprep import cache as caches
from p4dprep.cache import Cache
from tests.p4dprep.extract.builders import write_corpus

pytestmark = pytest.mark.usefixtures("ray_cluster")


def run(*arguments: object) -> str:
    result = typer.testing.CliRunner().invoke(app, ["demo", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def test_demo_makes_worlds_extracts_judges_and_shows_them(tmp_path: Path) -> None:
    output = run(tmp_path)
    cache = Cache.open(str(tmp_path / "cache"))
    assert cache.groups() == ("l4p", "opencv_dis", "truth")
    assert cache.group("l4p").states().ok.sum() == 6
    assert caches.verify(cache).problems == ()
    for judged in ("l4p/depth by truth/depth", "l4p/motion by truth/motion", "opencv_dis/flow", "camray"):
        assert judged in output
    page = (tmp_path / "pictures.html").read_text()
    assert page.count("data:image/") >= 6
    assert "test-7-0" in page


def test_demo_on_own_videos_ends_with_a_verified_cache_and_a_page_of_pictures(tmp_path: Path) -> None:
    videos = write_corpus(tmp_path / "mine", 2, num_frames=20)
    run(tmp_path / "out", "--videos", videos)
    cache = Cache.open(str(tmp_path / "out" / "cache"))
    assert cache.groups() == ("l4p", "opencv_dis")
    assert caches.verify(cache).problems == ()
    page = (tmp_path / "out" / "pictures.html").read_text()
    assert page.count("data:image/") >= 2
    assert "clip_01.mp4" in page
