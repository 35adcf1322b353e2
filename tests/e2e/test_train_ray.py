"""`p4dprep train --workers 2` on a real Ray: what one worker would log, and no harm from the death of a worker."""

import contextlib
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from student import run_folder
from tests.e2e.commands import P4DPREP
from tests.student.train_run import request, untimed, write_world

WORKER = "ray::RayTrainWorker"
NUM_STEPS = 6


def start(world: Path, run: Path, *arguments: object) -> subprocess.Popen[str]:
    """`p4dprep train` on a request of 6 steps, two of which there is a checkpoint."""
    path = run.with_suffix(".yaml")
    values = request(world, run, micro_batch_size=1, picture_steps=0, max_steps=NUM_STEPS, max_failures=1)
    path.write_text(yaml.safe_dump(values))
    command = [P4DPREP, "train", "--config", str(path), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def end(process: subprocess.Popen[str]) -> None:
    said, _ = process.communicate(timeout=280)
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


@pytest.mark.timeout(600)
def test_two_workers_log_what_one_does_and_outlive_a_death(tmp_path: Path, ray_address: str) -> None:
    world = write_world(tmp_path / "world")
    alone, two, bereft = (tmp_path / name for name in ("alone", "two", "bereft"))
    joining = ("--workers", 2, "--address", ray_address)
    first = start(world, alone)
    end(start(world, two, *joining))
    end(first)
    for mine, other in zip(run_folder.read_log(two), run_folder.read_log(alone), strict=True):
        assert untimed([mine])[0] == pytest.approx(untimed([other])[0], rel=1e-5 if mine["step"] < 3 else 1e-3)

    process = start(world, bereft, *joining)
    assert kill_a_worker_after_a_checkpoint(bereft, process) < NUM_STEPS // 2
    end(process)
    assert untimed(run_folder.read_log(bereft)) == untimed(run_folder.read_log(two))
    found, expected = tensors(bereft), tensors(two)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
