"""`p4dprep demo`: the clips it makes are real H.264, and it ends with a cache and a page."""

from pathlib import Path

import av
import numpy as np
import pytest
import typer.testing

from cli.app import app
from cli.demo import FPS, NUM_FRAMES, draw_discs, write_clip
from p4dprep import cache as caches
from p4dprep.cache import Cache
from tests.p4dprep.extract.builders import write_corpus


def test_a_demo_clip_is_h264_with_true_times_and_moving_content(tmp_path: Path) -> None:
    write_clip(tmp_path / "clip.mp4", draw_discs(3))
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        frames = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    np.testing.assert_allclose([time for time, _ in frames], np.arange(NUM_FRAMES) / FPS, atol=1e-6)
    assert np.abs(frames[0][1].astype(int) - frames[-1][1]).mean() > 5


@pytest.mark.usefixtures("ray_cluster")
def test_demo_on_own_videos_ends_with_a_verified_cache_and_a_page_of_pictures(tmp_path: Path) -> None:
    videos = write_corpus(tmp_path / "mine", 2, num_frames=20)
    result = typer.testing.CliRunner().invoke(app, ["demo", str(tmp_path / "out"), "--videos", str(videos)])
    assert result.exit_code == 0, result.output
    cache = Cache.open(str(tmp_path / "out" / "cache"))
    assert cache.groups() == ("l4p", "opencv_dis")
    assert caches.verify(cache).problems == ()
    page = (tmp_path / "out" / "pictures.html").read_text()
    assert page.count("data:image/") >= 2
    assert "clip_01.mp4" in page
