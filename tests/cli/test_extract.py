"""The command line of `extract` and its neighbours, through the real entry point."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.e2e.commands import P4DPREP, run, run_json
from tests.p4dprep.extract.builders import write_corpus

NUM_CLIPS = 4
SMALL = ("--frames", 4, "--size", 32)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_corpus(tmp_path_factory.mktemp("videos"), NUM_CLIPS - 1, num_frames=8)
    (folder / "not_really.mp4").write_bytes(b"no video at all")
    return folder


def stderr_of_wrong_request(*arguments: object) -> str:
    """The one line that a wrong request prints."""

    done = subprocess.run([P4DPREP, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    return done.stderr


def test_flags_win_over_the_file_and_coverage_decides_the_exit_code(
    videos: Path, tmp_path: Path, ray_address: str
) -> None:
    cache = tmp_path / "cache"
    job = {"source": str(videos), "cache": str(cache), "teachers": ["opencv-dis"], "frames": 8, "size": 32}
    job |= {"address": ray_address}
    (tmp_path / "job.yaml").write_text(json.dumps(job))
    report = run_json("extract", "--config", tmp_path / "job.yaml", "--frames", 4, exit_code=1)
    assert (report["clips"], report["committed"], report["failed"]) == (NUM_CLIPS, NUM_CLIPS - 1, 1)
    assert report["failures"][0]["clip"] == "not_really.mp4"
    info = run_json("cache", "info", cache)
    assert info["sampling"]["num_frames"] == 4
    text = run("extract", "--config", tmp_path / "job.yaml", "--frames", 4, "--coverage", 0.75)
    assert text == ""


def test_plan_measures_clips_and_leaves_no_cache(videos: Path, tmp_path: Path) -> None:
    estimate = run_json("extract", videos, tmp_path / "cache", "--teacher", "opencv-dis", *SMALL, "--plan")
    group = estimate["teachers"]["opencv_dis"]
    assert (estimate["clips"], estimate["clips_failed"], group["clips_todo"]) == (NUM_CLIPS, 1, NUM_CLIPS)
    assert group["seconds_per_clip"] > 0
    assert group["dominated_by"] in group["stage_seconds_per_clip"]
    assert set(group["bytes_per_clip"]) == {"time_seconds", "opencv_dis_flow"}
    assert estimate["num_objects"] == 2 * NUM_CLIPS
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("extract",), "source: Field required"),
        (("extract", "nowhere", "cache", "--teacher", "opencv-dis"), "nowhere"),
        (("extract", "videos", "cache", "--teacher", "opencv-diss"), "did you mean 'opencv-dis'"),
        (("extract", "videos", "cache", "--teacher", "opencv-dis?preset=slow"), "preset=slow is not one of"),
        (("extract", "videos", "cache", "--teacher", "opencv-dis", "--workers", "l4p=1"), "workers names l4p"),
        (("extract", "--config", "missing.yaml"), "cannot read --config missing.yaml"),
        (("extract", "https://example.invalid/a.mp4", "cache", "--teacher", "opencv-dis"), "--allow-http"),
        (("cache", "info", "nowhere"), "no cache at"),
        (("extract", "videos", "cache", "--teacher", "opencv-dis", "--stride", "4"), "needs --fps"),
    ],
)
def test_a_wrong_request_is_one_line_and_exit_code_2(
    videos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    (tmp_path / "videos").symlink_to(videos)
    monkeypatch.chdir(tmp_path)
    line = stderr_of_wrong_request(*arguments)
    assert message in line
    assert line.startswith("p4dprep: ")
    assert line.count("\n") == 1
    assert not (tmp_path / "cache").exists()


def test_doctor_finds_this_machine_ready_and_a_new_folder_untouched(tmp_path: Path) -> None:
    found = run_json("doctor", tmp_path, tmp_path / "new")
    assert found["ok"]
    checks = {check["name"]: check["state"] for check in found["checks"]}
    assert checks["ray"] == checks["torch"] == checks[str(tmp_path)] == "ok"
    assert list(tmp_path.iterdir()) == []


def test_doctor_says_what_is_wrong_with_a_place_and_shows_no_secret(tmp_path: Path) -> None:
    options = json.dumps({"key": "AKIACANARY", "secret": "canary-secret-7f", "endpoint_url": "http://127.0.0.1:9"})
    found = run_json("doctor", "s3://bucket/videos", "--storage-options", options, exit_code=1)
    assert not found["ok"]
    assert found["checks"][-1]["state"] == "failed"
    assert "canary" not in json.dumps(found).lower()
