"""SIGKILL of a training at seeded moments, a third of them inside a checkpoint: it ends as if nothing had happened."""

import multiprocessing
import random
import signal
from collections import Counter
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from student import run_folder
from tests.e2e.train_victim import CHECKPOINT, LOG, PICTURE, STEP, be_trained
from tests.student.train_run import request, untimed, write_world

SEED = 20261121
NUM_STEPS, NUM_CHECKPOINTS = 16, 8
OPERATION, MOMENT = "before a file operation", "some time after entering"
KILLS = (
    (CHECKPOINT, OPERATION), (STEP, MOMENT), (LOG, OPERATION),
    (CHECKPOINT, MOMENT), (CHECKPOINT, OPERATION), (PICTURE, MOMENT),
) * 5  # fmt: skip
"""30, of which the 10 at a checkpoint's file operations cannot miss it, and the 5 some time after its start may."""
LONGEST_SECONDS = {CHECKPOINT: 0.03, LOG: 0.0, PICTURE: 0.06, STEP: 0.3}
ELSEWHERE = "elsewhere"


class Victim:
    """One process that trains on a run, from wherever the run stands."""

    def __init__(self, world: Path, run: Path, place: str = CHECKPOINT, operation: int | None = None) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([be_trained.__module__])
        self.ears, mouth = context.Pipe(duplex=False)
        values = request(world, run, max_steps=NUM_STEPS, save_steps=NUM_STEPS // NUM_CHECKPOINTS, picture_steps=5)
        self.process: BaseProcess = context.Process(target=be_trained, args=(values, mouth, place, operation))
        self.process.start()
        mouth.close()
        self.heard: list[str] = []

    def listen(self, place: str | None = None, count: int = 1, delay_seconds: float = 0.0) -> None:
        """Hear it to its end; kill it after it entered a place so many times and then went on for a moment."""
        while word := _next(self.ears):
            self.heard.append(word)
            if word == f"+{place}" and self.heard.count(word) == count:
                self.process.join(delay_seconds)
                self.process.kill()
        self.process.join()
        self.ears.close()

    @property
    def died_in(self) -> str | None:
        """What it was doing when it was killed; None if it came to the end of the run."""
        assert self.process.exitcode in (0, -signal.SIGKILL), f"ended with {self.process.exitcode}: {self.heard[-3:]}"
        if self.process.exitcode == 0:
            return None
        inside = [place for place in LONGEST_SECONDS if self.heard.count(f"+{place}") > self.heard.count(f"-{place}")]
        return (*inside, ELSEWHERE)[0]


def _next(ears: Connection) -> str:
    try:
        return str(ears.recv())
    except EOFError:
        return ""


def kill_one(world: Path, run: Path, place: str, how: str, operations: int, rng: random.Random) -> str | None:
    """Train until killed; see `Victim.died_in`."""
    if how == OPERATION:
        victim = Victim(world, run, place, rng.randrange(operations))
        victim.listen()
    else:
        victim = Victim(world, run)
        victim.listen(place, rng.randrange(1, 4), rng.uniform(0, LONGEST_SECONDS[place]))
    return victim.died_in


def state_of(run: Path) -> dict[str, Any]:
    """All that a run ended with, but for how long it took."""
    last = run_folder.last_checkpoint(run)
    found: dict[str, Any] = {path.name: load_file(path) for path in last.glob("*.safetensors")}
    found |= {name: torch.load(last / name, weights_only=True) for name in ("optimizer.pt", "scheduler.pt")}
    pictures = {path.name: path.read_bytes() for path in (run / run_folder.PICTURES).iterdir()}
    assert len(found) == 4
    return found | {
        "steps": [run_folder.step_of(path) for path in run_folder.checkpoints(run)],
        "rng": (last / "rng_state.pth").read_bytes(),
        "pictures": pictures,
        "log": untimed(run_folder.read_log(run)),
    }


def differing(left: Any, right: Any, name: str = "") -> list[str]:
    """Paths of what is not equal to the last bit."""
    if isinstance(left, dict) and isinstance(right, dict) and left.keys() == right.keys():
        return [path for key in left for path in differing(left[key], right[key], f"{name}/{key}")]
    if isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        return [path for n in range(len(left)) for path in differing(left[n], right[n], f"{name}/{n}")]
    same = torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right
    return [] if same else [name]


@pytest.mark.timeout(900)
def test_killed_30_times_a_run_ends_equal_to_the_undisturbed_one(tmp_path: Path) -> None:
    world, rng = write_world(tmp_path / "world"), random.Random(SEED)
    undisturbed = Victim(world, tmp_path / "undisturbed")
    undisturbed.listen()
    assert undisturbed.died_in is None
    expected, in_checkpoints = state_of(tmp_path / "undisturbed"), int(undisturbed.heard[-1].removeprefix("="))
    # Of two checkpoints, so that the second is met too, and the deletion of an older one; of three log lines.
    operations = {CHECKPOINT: 2 * in_checkpoints // NUM_CHECKPOINTS, LOG: 6}

    runs, died_in = [tmp_path / "0"], list[str]()
    while len(died_in) < len(KILLS):
        place, how = KILLS[len(died_in)]
        found = kill_one(world, runs[-1], place, how, operations.get(place, 0), rng)
        died_in += [found] if found else []
        runs += [] if found else [tmp_path / str(len(runs))]
    print(f"seed {SEED}: {len(runs)} runs, killed in {Counter(died_in)}")
    assert died_in.count(CHECKPOINT) >= len(KILLS) // 3
    assert min(Counter(died_in)[place] for place in (STEP, LOG, PICTURE)) >= 1

    for run in runs:
        last = Victim(world, run)
        last.listen()
        assert last.died_in is None
        assert differing(state_of(run), expected) == [], f"seed {SEED}: {run.name} after {died_in}"
