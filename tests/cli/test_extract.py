"""The command line of `extract` and its neighbours, through the real entry point."""

import json
import subprocess
from pathlib import Path

import pytest

from cli import extract as display
from cli.app import main
from p4dprep.cache import Cache
from p4dprep.extract import GroupProgress
from tests.e2e.commands import P4DPREP, run, run_json
from tests.p4dprep.extract.builders import write_corpus

NUM_CLIPS = 4
SMALL = ("--frames", 4, "--size", 32)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_corpus(tmp_path_factory.mktemp("videos"), NUM_CLIPS - 1, num_frames=8)
    (folder / "not_really.mp4").write_bytes(b"no video at all")
    return folder


WRONG_REQUESTS = [
    (("extract",), "source: Field required"),
    (("extract", "nowhere", "cache", "--teacher", "opencv-dis"), "nowhere"),
    (("extract", "videos", "cache", "--teacher", "opencv-diss"), "did you mean 'opencv-dis'"),
    (("extract", "videos", "cache", "--teacher", "opencv-dis?preset=slow"), "preset=slow is not one of"),
    (("extract", "videos", "cache", "--teacher", "opencv-dis", "--workers", "l4p=1"), "workers names l4p"),
    (("extract", "--config", "missing.yaml"), "cannot read --config missing.yaml"),
    (("extract", "https://example.invalid/a.mp4", "cache", "--teacher", "opencv-dis"), "--allow-http"),
    (("cache", "info", "nowhere"), "no cache at"),
    (("extract", "videos", "cache", "--teacher", "opencv-dis", "--stride", "4"), "needs --fps"),
    (("extract", "videos", "cache"), "nothing to extract: name a teacher"),
    (("extract", "videos", "cache", "--keep-frames", "9"), "size '9' is not 224 or HEIGHTxWIDTH"),
    (("extract", "videos", "cache", "--keep-frames", "336", "--frames", "4000"), "keep fewer frames or smaller ones"),
]


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


def test_frames_are_kept_without_a_teacher_or_beside_one_that_was_there(
    videos: Path, tmp_path: Path, ray_address: str
) -> None:
    common = (videos, tmp_path / "cache", *SMALL, "--address", ray_address, "--coverage", 0.5)
    alone = run_json("extract", *common, "--keep-frames", "40x56")
    assert (alone["committed"], list(alone["teachers"])) == (NUM_CLIPS - 1, ["frames"])
    assert alone["teachers"]["frames"]["teacher"] == "frames:40x56"
    both = run_json("extract", *common, "--keep-frames", "40x56", "--teacher", "opencv-dis")
    committed = {name: group["committed"] for name, group in both["teachers"].items()}
    assert committed == {"opencv_dis": NUM_CLIPS - 1, "frames": 0}
    assert Cache.open(str(tmp_path / "cache")).read("clip_01.mp4", "frames_frames").shape == (4, 40, 56, 3)


def test_plan_measures_clips_and_leaves_no_cache(videos: Path, tmp_path: Path) -> None:
    estimate = run_json("extract", videos, tmp_path / "cache", "--teacher", "opencv-dis", *SMALL, "--plan")
    group = estimate["teachers"]["opencv_dis"]
    assert (estimate["clips"], estimate["clips_failed"], group["clips_todo"]) == (NUM_CLIPS, 1, NUM_CLIPS)
    assert group["seconds_per_clip"] > 0
    assert group["dominated_by"] in group["stage_seconds_per_clip"]
    assert set(group["bytes_per_clip"]) == {"time_seconds", "opencv_dis_flow"}
    assert estimate["num_objects"] == 2 * NUM_CLIPS
    assert not (tmp_path / "cache").exists()


@pytest.fixture
def empty_folder(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, in which there is nothing but `videos`."""
    (tmp_path / "videos").symlink_to(videos)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("arguments", "message"), WRONG_REQUESTS)
def test_a_wrong_request_is_one_line_and_exit_code_2(
    empty_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.setattr("sys.argv", ["p4dprep", *arguments])
    with pytest.raises(SystemExit, match=r"^2$"):
        main()
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.startswith("p4dprep: ")
    assert printed.err.count("\n") == 1
    assert not (empty_folder / "cache").exists()


def test_a_process_of_a_wrong_request_prints_that_line_and_nothing_else(empty_folder: Path) -> None:
    arguments, message = WRONG_REQUESTS[2]
    done = subprocess.run([P4DPREP, *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_doctor_finds_this_machine_ready_and_says_what_is_wrong_with_a_place(tmp_path: Path) -> None:
    """Where all is well the exit code is 0: the README's blocks run it so."""
    options = json.dumps({"key": "AKIACANARY", "secret": "canary-secret-7f", "endpoint_url": "http://127.0.0.1:9"})
    places = (tmp_path, tmp_path / "new", "s3://bucket/videos")
    found = run_json("doctor", *places, "--storage-options", options, exit_code=1)
    checks = {check["name"]: check["state"] for check in found["checks"]}
    assert checks["ray"] == checks["torch"] == checks[str(tmp_path)] == checks[str(tmp_path / "new")] == "ok"
    assert [name for name, state in checks.items() if state == "failed"] == ["s3://bucket/videos"]
    assert not found["ok"]
    assert "canary" not in json.dumps(found).lower()
    assert list(tmp_path.iterdir()) == []


def test_in_a_log_a_finished_teacher_keeps_its_rate_and_is_told_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 1000, 31))
    monkeypatch.setattr(display.time, "monotonic", lambda: now)
    now = next(clock)
    with display._progress_display() as show:
        quick, slow = (GroupProgress(name=name, num_todo=100, num_workers=1) for name in ("quick", "slow"))
        for quick.num_ok, slow.num_ok in ((10, 0), (100, 5), (100, 36), (100, 67)):
            now = next(clock)
            show([quick, slow])
    told = capsys.readouterr().err.replace("\n", " ")
    assert told.count("quick: 100/100 clips, 2.90 clips/s") == told.count("quick: 100/100") == 1
    assert "slow: 36/100 clips, 1.00 clips/s" in told
    assert "slow: 67/100 clips, 1.00 clips/s, 0 frames/s, 33 s left" in told
