"""`p4dprep worlds` through the real entry point: from nothing to a verified cache of truth, resumed, and killed."""

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from cli.app import main
from p4dprep import cache as caches
from p4dprep.cache import Cache
from p4dprep.corpus import Sampling
from p4dprep.video import Decoder
from p4dprep.worlds.questions import CATEGORIES
from p4dprep.worlds.scene import Scene
from p4dprep.worlds.truth import truth
from p4dprep.worlds.write import Recipe, presentation_seconds
from tests.e2e.commands import P4DPREP, run_json

NUM_CLIPS = 3
NUM_KILLED_CLIPS = 7
RECIPE = Recipe(split="test", seed=33, size=(48, 64))
WORLDS = ("--split", "test", "--seed", 33, "--size", "48x64", "--workers", 2)
TRUTH = ("--frames", 4, "--truth-size", "32x40")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder of worlds without their truth, and the report."""
    out = tmp_path_factory.mktemp("worlds") / "out"
    return out, run_json("worlds", out, *WORLDS, "--num-clips", NUM_CLIPS, "--no-truth")


def files_of(folder: Path) -> dict[Path, int]:
    """Every file and when it was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    """Run the command in this process; its exit code."""
    monkeypatch.setattr("sys.argv", ["p4dprep", "worlds", *map(str, arguments)])
    with pytest.raises(SystemExit, match=r"^[012]$") as ending:
        main()
    return str(ending.value)


def test_the_same_command_again_renders_nothing(
    made: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (out, first), written = made, files_of(made[0])
    assert (first["num_clips"], first["num_rendered"], first["truth"]) == (NUM_CLIPS, NUM_CLIPS, None)
    assert set(first["num_questions"]) == set(CATEGORIES)
    assert call(monkeypatch, out, *WORLDS, "--num-clips", NUM_CLIPS, "--no-truth", "--json") == "0"
    again = json.loads(capsys.readouterr().out)
    assert again == first | {"num_rendered": 0, "seconds": again["seconds"]}
    assert files_of(out) == written


def sampled_seconds(scene: Scene) -> np.ndarray[Any, np.dtype[np.float64]]:
    seconds = presentation_seconds(scene)
    return seconds[np.linspace(0, len(seconds) - 1, 4).round().astype(int)]


def test_the_truth_is_a_verified_cache_at_the_times_of_the_decoded_frames(
    made: tuple[Path, dict[str, Any]],
    ray_address: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, _ = made
    arguments = (out, *WORLDS, *TRUTH, "--num-clips", NUM_CLIPS, "--address", ray_address)
    report = run_json("worlds", *arguments)
    assert (report["num_rendered"], report["truth"]["committed"]) == (0, NUM_CLIPS)
    cache = Cache.open(str(out / "truth"))
    assert caches.verify(cache).ok
    assert cache.groups() == ("truth",)
    for index in range(NUM_CLIPS):
        scene = RECIPE.scene(index)
        seconds = sampled_seconds(scene)
        np.testing.assert_array_equal(cache.group("truth").read_time(index), seconds)
        expected = truth(scene, seconds, 32, 40)
        np.testing.assert_allclose(cache.read(scene.id, "truth_depth"), expected.depth_thw, rtol=2e-3)
        np.testing.assert_array_equal(cache.read(scene.id, "truth_instances"), expected.instances_thw)
        np.testing.assert_allclose(cache.read(scene.id, "truth_pose"), expected.pose_t44, atol=1e-5)
    written = files_of(out)
    assert call(monkeypatch, *arguments, "--json") == "0"
    assert json.loads(capsys.readouterr().out)["truth"]["skipped"] == NUM_CLIPS
    assert files_of(out) == written


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("OUT", "--split", "test", "--seed", "34"), "holds worlds of seed 33, not 34; name another folder"),
        (("OUT", *WORLDS, "--truth-size", "5"), "each side between 16 and 4096"),
        (("OUT", *WORLDS, "--size", "64"), "--size 64 is not HEIGHTxWIDTH"),
        (("OUT", *WORLDS, "--size", "63x64"), "both sides must be even"),
        (("s3://bucket/worlds", *WORLDS), "s3://bucket/worlds is no folder of this machine"),
    ],
)
def test_a_wrong_request_is_one_line_and_nothing_is_done(
    made: tuple[Path, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[object, ...],
    message: str,
) -> None:
    out, _ = made
    given = [str(argument).replace("OUT", str(out)) for argument in arguments]
    assert call(monkeypatch, *given, "--num-clips", NUM_CLIPS + 1) == "2"
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.startswith("p4dprep: ")
    assert printed.err.count("\n") == 1
    assert len(list((out / "videos").iterdir())) == NUM_CLIPS


def wait_until(is_so: Callable[[], bool], timeout_seconds: float = 200) -> None:
    end = time.monotonic() + timeout_seconds
    while not is_so():
        assert time.monotonic() < end, "it does not come about"
        time.sleep(0.02)


def test_a_killed_run_leaves_whole_videos_and_no_process_and_the_same_command_goes_on(tmp_path: Path) -> None:
    out, arguments = tmp_path / "out", (*WORLDS, "--num-clips", NUM_KILLED_CLIPS, "--no-truth")
    process = subprocess.Popen(
        [P4DPREP, "worlds", str(out), *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_until(lambda: len(list(out.glob("videos/*.mp4"))) >= 2 or process.poll() is not None)
    assert process.poll() is None
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive
    survivors = {path.name: path.read_bytes() for path in out.glob("videos/*.mp4")}
    assert 2 <= len(survivors) < NUM_KILLED_CLIPS
    assert not (out / "qa.json").exists()
    with Decoder() as decoder:
        for name in survivors:
            index = int(name.removesuffix(".mp4").split("-")[2])
            seconds = presentation_seconds(RECIPE.scene(index))
            clip = decoder.read(out / "videos" / name, Sampling(num_frames=len(seconds), height=48, width=64))
            np.testing.assert_array_equal(clip.time_seconds_t, seconds)
    report = run_json("worlds", out, *arguments)
    assert report["num_rendered"] == NUM_KILLED_CLIPS - len(survivors)
    assert len(list(out.glob("videos/*.mp4"))) == NUM_KILLED_CLIPS
    assert all((out / "videos" / name).read_bytes() == data for name, data in survivors.items())
    assert (out / "qa.json").exists()
