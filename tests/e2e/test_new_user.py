"""The main job as a new user does it: three teachers, on a disk and on a real HTTP S3 server, read back by xarray."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import xarray

from p4dprep import cache as caches
from p4dprep.cache import Cache
from p4dprep.storage import Store
from teachers.l4p import L4P, L4PConfig
from tests.e2e.commands import bucket_environment, run_json, upload
from tests.p4dprep.extract.builders import data_digests, write_corpus
from tests.s3 import ACCESS_KEY, SECRET_KEY, storage_options
from tests.teachers.test_l4p import TINY
from tests.teachers.tiny_models import write_tiny_depth_anything

NUM_CLIPS = 3
SMALL_L4P = L4PConfig(**{**vars(TINY), "image_size": 56, "patch_size": 14})


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments for a real flow teacher and two random models in their native formats, for small frames."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    L4P(SMALL_L4P).save_pretrained(folder / "l4p")
    write_tiny_depth_anything(folder / "depth")
    specs = ("opencv-dis", f"l4p:{folder / 'l4p'}", f"depth-anything:{folder / 'depth'}")
    return [*(part for spec in specs for part in ("--teacher", spec)), "--size", str(SMALL_L4P.image_size)]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("videos"), NUM_CLIPS)


@pytest.fixture(scope="module")
def local_cache(videos: Path, teachers: list[str], tmp_path_factory: pytest.TempPathFactory, ray_address: str) -> Path:
    cache = tmp_path_factory.mktemp("local") / "cache"
    report = run_json("extract", videos, cache, *teachers, "--address", ray_address)
    assert (report["clips"], report["committed"], report["failed"], report["coverage"]) == (
        NUM_CLIPS,
        NUM_CLIPS,
        0,
        1.0,
    )
    assert report["clips_per_second"] > 0
    return cache


def check_opens_in_xarray(cache: str, **options: Any) -> None:
    targets = xarray.open_zarr(cache, **options)
    flow = targets.opencv_dis_flow
    assert flow.dims == ("clip", "t", "y", "x", "uv")
    assert flow.attrs["units"] == "px"
    values = flow[0].to_numpy()
    assert np.isnan(values[0]).all()
    assert np.isfinite(values[1:]).all()
    assert (targets.l4p_depth[0].to_numpy() > 0).all()
    assert targets.depth_anything_depth[0].to_numpy().std() > 0
    assert targets.time_seconds.to_numpy()[:, 0].tolist() == [0.0] * NUM_CLIPS


def test_three_teachers_commit_every_clip_on_a_disk(local_cache: Path) -> None:
    assert caches.verify(Cache.open(str(local_cache))).problems == ()
    check_opens_in_xarray(str(local_cache))


def test_the_same_on_s3_gives_the_same_bytes_and_leaks_no_credential(
    s3_endpoint: str, videos: Path, teachers: list[str], local_cache: Path
) -> None:
    upload(s3_endpoint, videos, "corpus", "videos")
    environment, options = bucket_environment(s3_endpoint), storage_options(s3_endpoint)
    cache = "s3://corpus/cache"
    report = run_json("extract", "s3://corpus/videos", cache, *teachers, env=environment)
    assert (report["committed"], report["failed"]) == (NUM_CLIPS, 0)
    again = run_json("extract", "s3://corpus/videos", cache, *teachers, env=environment)
    assert (again["committed"], again["skipped"]) == (0, NUM_CLIPS)
    assert caches.verify(Cache.open(cache, options)).problems == ()
    assert data_digests(cache, options) == data_digests(local_cache)
    check_opens_in_xarray(cache, storage_options=options)
    store = Store(cache, options)
    written = b"".join(store.get(key) for key in store.list())
    for secret in (ACCESS_KEY, SECRET_KEY):
        assert secret.encode() not in written
        assert secret not in str(report)


def test_the_times_of_a_variable_frame_rate_clip_are_the_files_own(
    shared_videos: Path, tmp_path: Path, ray_address: str
) -> None:
    options = ("--teacher", "opencv-dis", "--size", 64, "--address", ray_address)
    run_json("extract", shared_videos / "fire2.mp4", tmp_path / "cache", *options)
    with av.open(str(shared_videos / "fire2.mp4")) as container:
        own = [float(frame.pts * Fraction(frame.time_base)) for frame in container.decode(video=0)]
    wanted = np.round(np.linspace(0, len(own) - 1, 16)).astype(int)
    times = Cache.open(str(tmp_path / "cache")).group("opencv_dis").read_time(0)
    assert times.tolist() == [own[index] for index in wanted]
    assert len(set(np.diff(times).round(4))) > 2


def test_six_real_clips_are_committed_by_three_teachers(
    shared_videos: Path, teachers: list[str], tmp_path: Path, ray_address: str
) -> None:
    report = run_json("extract", shared_videos, tmp_path / "cache", *teachers, "--address", ray_address)
    assert (report["clips"], report["committed"], report["failed"]) == (6, 6, 0)
    assert caches.verify(Cache.open(str(tmp_path / "cache"))).problems == ()
