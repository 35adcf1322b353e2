"""Training in two processes, by Ray Train and by torchrun: what one process would log, and a death does no harm."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from student import run_folder
from student.train import train
from student.train_config import parse_config
from tests.e2e.commands import P4DPREP
from tests.student.conftest import one_thread  # noqa: F401 a fixture
from tests.student.train_run import request, untimed, write_world

WORKER = "ray::RayTrainWorker"
NUM_STEPS = 6
CANARY = b"c4n4ry"
"""A storage option, which may be a secret."""


def request_of(world: Path, run: Path) -> dict[str, Any]:
    """6 steps, with a checkpoint after every second one."""
    changes = {"micro_batch_size": 1, "picture_steps": 0, "max_steps": NUM_STEPS, "max_failures": 1}
    return request(world, run, **changes, storage_options={"auto_mkdir": CANARY.decode()})


def write_request(world: Path, run: Path) -> Path:
    path = run.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(request_of(world, run)))
    return path


def check_equal_but_for_rounding(run: Path, expected: list[dict[str, float]]) -> None:
    """The order of a sum differs, and AdamW makes much of little at first."""
    for mine, other in zip(untimed(run_folder.read_log(run)), expected, strict=True):
        assert mine == pytest.approx(other, rel=1e-5 if mine["step"] < 3 else 1e-3)


def start(world: Path, run: Path, *arguments: object) -> subprocess.Popen[str]:
    command = [P4DPREP, "train", "--config", str(write_request(world, run)), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def end(process: subprocess.Popen[str]) -> None:
    try:
        said, _ = process.communicate(timeout=400)
    finally:
        process.kill()
    assert process.returncode == 0, said


def kill_a_worker_after_a_checkpoint(run: Path, process: subprocess.Popen[str]) -> int:
    """SIGKILL of one of the workers that train; how many checkpoints were whole by then."""
    while process.poll() is None:
        if found := run_folder.checkpoints(run):
            for victim in psutil.process_iter():
                with contextlib.suppress(psutil.Error):
                    if any(WORKER in word for word in victim.cmdline()):
                        victim.kill()
                        return len(found)
        time.sleep(0.02)
    raise AssertionError(f"the training ended before a worker was killed: {process.communicate()[0]}")


def tensors(run: Path) -> dict[str, torch.Tensor]:
    last = run_folder.last_checkpoint(run)
    return load_file(last / run_folder.STUDENT_WEIGHTS) | load_file(last / run_folder.P4D_WEIGHTS)


@pytest.mark.timeout(900)
def test_two_workers_log_what_one_does_and_outlive_a_death(tmp_path: Path, ray_address: str) -> None:
    world = write_world(tmp_path / "world")
    alone, two, bereft = (tmp_path / name for name in ("alone", "two", "bereft"))
    joining = ("--workers", 2, "--address", ray_address)
    first = start(world, alone)
    end(start(world, two, *joining))
    end(first)
    check_equal_but_for_rounding(two, untimed(run_folder.read_log(alone)))
    assert not [path for path in two.rglob("*") if path.is_file() and CANARY in path.read_bytes()]

    process = start(world, bereft, *joining)
    assert kill_a_worker_after_a_checkpoint(bereft, process) < NUM_STEPS // 2
    end(process)
    assert untimed(run_folder.read_log(bereft)) == untimed(run_folder.read_log(two))
    found, expected = tensors(bereft), tensors(two)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.usefixtures("one_thread")
def test_torchruns_processes_end_with_the_same_weights_and_one_may_go_on(tmp_path: Path) -> None:
    world = write_world(tmp_path / "world")
    run, alone = tmp_path / "run", tmp_path / "alone"
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    command = [*torchrun, "-m", "tests.e2e.train_rank", str(write_request(world, run)), str(tmp_path)]
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    end(
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        )
    )
    first, second = (load_file(tmp_path / f"rank-{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    train(parse_config(request_of(world, alone)))
    expected = untimed(run_folder.read_log(alone))
    check_equal_but_for_rounding(run, expected)
    shutil.rmtree(run_folder.last_checkpoint(run))
    train(parse_config(request_of(world, run)), resume=True)
    check_equal_but_for_rounding(run, expected)
