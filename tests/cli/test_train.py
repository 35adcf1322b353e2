"""The command line of `train`, through the real entry point: no teacher, no network, and clear refusals."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cli.app import main
from student import run_folder
from tests.cache_builder import build_cache
from tests.e2e.commands import run_json
from tests.student.train_run import request, write_world

NO_TEACHER = """
import socket, sys

class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "teachers":
            raise ImportError(f"{name} is refused")

def connect(self, address, _connect=socket.socket.connect):
    if self.family != socket.AF_UNIX:
        raise OSError(f"{address} is refused")
    return _connect(self, address)

sys.meta_path.insert(0, Refused())
socket.socket.connect = socket.socket.connect_ex = connect
"""
"""Every Python that starts with this folder on its path runs it first."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Student and conversations, over a cache whose videos are decoded and whose maps have no frozen heads."""
    folder = write_world(tmp_path_factory.mktemp("world"))
    (folder / "decoded").mkdir()
    build_cache(folder / "decoded")
    return folder


@pytest.fixture
def alone(tmp_path: Path) -> dict[str, str]:
    """An environment in which no teacher can be imported and nothing outside can be reached."""
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(NO_TEACHER)
    proxies = {name: "" for name in os.environ if name.lower().endswith("_proxy")}
    return proxies | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "hook"), os.environ.get("PYTHONPATH", "")])}


def write_request(world: Path, path: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump(request(world, path.with_suffix(""), max_steps=2, **changes)))
    return path


def test_no_teacher_and_no_network_is_needed(world: Path, tmp_path: Path, alone: dict[str, str]) -> None:
    decoded = {"cache": str(world / "decoded" / "cache"), "qa": [], "media": None, "on_problem": "leave out"}
    report = run_json("train", "--config", write_request(world, tmp_path / "run.yaml", **decoded), env=alone)
    assert (report["num_steps"], report["num_samples"], report["num_left_out"]) == (2, 2, 1)
    assert {"ld", "ed/l4p_depth", "ed/opencv_dis_flow"} < report["last"].keys()
    for code, refused in (
        ("import teachers.l4p", "teachers is refused"),
        ("import urllib.request as u; u.urlopen('http://127.0.0.1:9')", "is refused"),
    ):
        tried = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | alone, capture_output=True, text=True, check=False
        )
        assert tried.returncode == 1
        assert refused in tried.stderr


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Exit code of `p4dprep train ARGUMENTS` in this process."""
    monkeypatch.setattr("sys.argv", ["p4dprep", "train", *map(str, arguments)])
    with pytest.raises(SystemExit, match=r"^[02]$") as ended:
        main()
    return int(ended.value.code or 0)


def test_flags_win_over_the_file_and_a_run_goes_on(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_request(world, tmp_path / "run.yaml", seed=1)
    assert call(monkeypatch, "--config", file, "--seed", 3, "--picture-steps", 0, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["num_steps"], report["run"]) == (2, str(tmp_path / "run"))
    assert run_folder.read_settings(tmp_path / "run")["seed"] == 3
    assert call(monkeypatch, "--config", file, "--seed", 3) == 2
    assert "go on with --resume" in one_error(capsys)
    assert call(monkeypatch, "--config", file, "--resume") == 2
    assert "was made with other seed; ask for the same" in one_error(capsys)
    assert call(monkeypatch, "--config", file, "--seed", 3, "--resume") == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert "2 steps over 7 samples" in said.err


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    said = capsys.readouterr()
    errors = [line for line in said.err.splitlines() if line.strip()]
    assert said.out == ""
    assert len(errors) == 1, said.err
    return errors[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batchsize": 4}, "batchsize: Extra inputs are not permitted (fields: cache, qa, "),
        ({"batch_size": 3}, "batch_size 3 must be a multiple of workers x micro_batch_size, 1 x 2"),
        ({"save_steps": 3, "log_steps": 2}, "save_steps 3 must be a multiple of log_steps 2"),
        ({"qa": [], "distill": "sft"}, "without qa there is no text to learn"),
        ({"distill": "lde"}, "switch 'lde' must be sft, or some of"),
        ({"trainer": {"learning_rate": 1}}, "trainer.learning_rate has a field of its own; use learning_rate"),
        ({"trainer": {"push_to_hub": True}}, "trainer.push_to_hub is refused"),
        ({"student": "nowhere/at/all"}, "nowhere/at/all"),
        ({"cache": "nowhere"}, "no cache at"),
        ({"out": "s3://bucket/run"}, "must be a folder that all machines can write, not a URL"),
        ({"learning_rate": 1e30, "warmup_fraction": 0.0, "max_grad_norm": 0.0}, "lower learning_rate"),
    ],
)
def test_a_wrong_request_is_one_line_and_exit_code_2(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    message: str,
) -> None:
    values = request(world, tmp_path / "run", max_steps=4, picture_steps=0) | changes
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    assert call(monkeypatch, "--config", tmp_path / "run.yaml") == 2
    said = capsys.readouterr().err.splitlines()
    errors = [line for line in said if line.strip() and not line.startswith("step ")]
    assert len(errors) == 1
    assert message in errors[0]
