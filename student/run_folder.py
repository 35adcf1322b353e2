"""A run's folder: which of its checkpoints are whole, what it was asked for, and its log.

A checkpoint exists when its `complete.json` exists and names every other file with its size. That record is written
last, so a process killed at any moment leaves a checkpoint either whole or not there.
"""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from p4dprep.errors import CorruptDataError, RequestError

CHECKPOINT_PREFIX = "checkpoint-"
COMPLETE = "complete.json"
CONFIG = "config.yaml"
IDENTITY = "identity.json"
LOG = "log.jsonl"
REPORT = "report.json"
PICTURES = "pictures"
TENSORBOARD = "tensorboard"
STUDENT_WEIGHTS = "student.safetensors"
P4D_WEIGHTS = "p4d.safetensors"


def checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run, by rising step."""
    found = [path for path in _checkpoint_folders(run) if _is_complete(path)]
    return sorted(found, key=step_of)


def last_checkpoint(run: str | os.PathLike[str], step: int | None = None) -> Path:
    """The newest whole checkpoint of a run, or that of a step.

    Raises:
        RequestError: there is none.
    """
    found = checkpoints(Path(run))
    wanted = [path for path in found if step is None or step_of(path) == step]
    if not wanted:
        steps = [step_of(path) for path in found]
        what = "no whole checkpoint" if step is None else f"no whole checkpoint of step {step}"
        raise RequestError(f"{run} holds {what}; it has {steps or 'none at all'}")
    return wanted[-1]


def step_of(checkpoint: Path) -> int:
    """The optimiser steps done when a checkpoint was written."""
    return int(checkpoint.name.removeprefix(CHECKPOINT_PREFIX))


def mark_complete(checkpoint: Path) -> None:
    """Make every file of a checkpoint durable, then declare it whole."""
    sizes = {str(file.relative_to(checkpoint)): file.stat().st_size for file in _files(checkpoint)}
    for name in sizes:
        _sync(checkpoint / name)
    write_atomically(checkpoint / COMPLETE, json.dumps({"size_bytes": sizes}, indent=2) + "\n")
    _sync(checkpoint.parent)


def remove_incomplete(run: Path) -> None:
    """Delete checkpoints that a killed process left half-written or half-deleted."""
    for path in _checkpoint_folders(run):
        if not _is_complete(path):
            (path / COMPLETE).unlink(missing_ok=True)
            shutil.rmtree(path)


def read_settings(run: str | os.PathLike[str]) -> dict[str, Any]:
    """What the run was asked for, as its config.yaml says.

    Raises:
        RequestError: the folder is no run.
    """
    path = Path(run) / CONFIG
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RequestError(f"{run} is no run of p4dprep train: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise RequestError(f"{path} holds no settings; the folder is no run of p4dprep train")
    return settings


def has_begun(run: Path) -> bool:
    """Whether the run got as far as its first step; one that was refused before may be asked for again, differently."""
    return (run / IDENTITY).exists() and (run / LOG).exists()


def num_steps(run: Path) -> int:
    """Steps of the whole run, as its identity says."""
    return int(json.loads((run / IDENTITY).read_text())["steps"])


def write_log(run: Path, records: Iterable[Mapping[str, float]]) -> None:
    """The log as it was at a checkpoint, in place of whatever was logged after it."""
    write_atomically(run / LOG, "".join(json.dumps(record, sort_keys=True) + "\n" for record in records))


def append_log(run: Path, record: Mapping[str, float]) -> None:
    """One more line of the log."""
    with open(run / LOG, "a", encoding="utf-8") as file:
        file.write(json.dumps(record, sort_keys=True) + "\n")


def read_log(run: str | os.PathLike[str]) -> list[dict[str, float]]:
    """Every line of the log; a last line that is still being written is left out.

    Raises:
        CorruptDataError: another line is no JSON object.
    """
    path = Path(run) / LOG
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    records = []
    for number, line in enumerate((line for line in lines if line.endswith("\n")), start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise CorruptDataError(f"{path}, line {number}, is no JSON object; the log is damaged")
        records.append(record)
    return records


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _checkpoint_folders(run: Path) -> list[Path]:
    found = run.glob(f"{CHECKPOINT_PREFIX}*")
    return [path for path in found if path.is_dir() and path.name.removeprefix(CHECKPOINT_PREFIX).isdecimal()]


def _is_complete(checkpoint: Path) -> bool:
    try:
        sizes = json.loads((checkpoint / COMPLETE).read_text())["size_bytes"]
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != COMPLETE)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
