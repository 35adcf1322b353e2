"""A training in a process of its own, made to be killed: it says what it is doing, and dies where it is told to.

A fork server imports this module once, so that a training costs a fork and not six seconds of imports.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any

import pandas as pd  # noqa: F401 imported late by pyarrow, as the next two by transformers
import torch
import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl
import transformers.models.qwen2_5_vl.processing_qwen2_5_vl  # noqa: F401

from student import run_folder, trainer
from student.train import train
from student.train_config import parse_config

CHECKPOINT, PICTURE, LOG, STEP = "checkpoint", "picture", "log", "step"
_PLACES: dict[str, tuple[Any, str]] = {
    CHECKPOINT: (trainer.DistillationTrainer, "_save_checkpoint"),
    PICTURE: (trainer.MapPictures, "_write"),
    LOG: (run_folder, "append_log"),
    STEP: (trainer.DistillationTrainer, "training_step"),
}
_FILE_CALLS = frozenset(
    {
        "open", "mkdir", "fsync", "replace", "rename", "unlink", "rmdir", "write", "flush", "close", "serialize_file",
        "write_record", "write_end_of_file",
    }
)  # fmt: skip
"""C functions that change a file, of `os`, of files, of safetensors and of torch.save."""


def be_trained(request: dict[str, Any], says: Connection, place: str, operation: int | None) -> None:
    """Train; tell `says` when a place is entered (`+checkpoint`) and left (`-checkpoint`).

    Args:
        request: values of the request; the run is resumed where it stands.
        says: to whoever kills this process; hears at last how many file operations there were in the place.
        place: whose file operations are counted.
        operation: dies before this one of them, counted from 0; None lives.
    """
    torch.set_num_threads(1)
    killer = _Killer(operation)
    for name, (owner, method) in _PLACES.items():
        setattr(owner, method, _told(getattr(owner, method), name, says, killer if name == place else None))
    train(parse_config(request), resume=True)
    says.send(f"={killer.num_done}")


class _Killer:
    """Counts the file operations of a place, and kills this process before one of them."""

    def __init__(self, operation: int | None) -> None:
        self.operation, self.num_done = operation, 0

    def __call__(self, frame: FrameType, event: str, called: Any) -> None:
        if event != "c_call" or getattr(called, "__name__", "") not in _FILE_CALLS:
            return
        if self.num_done == self.operation:
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
        self.num_done += 1


def _told(function: Callable[..., Any], name: str, says: Connection, killer: _Killer | None) -> Callable[..., Any]:
    def told(*args: Any, **kwargs: Any) -> Any:
        says.send(f"+{name}")
        sys.setprofile(killer)
        try:
            return function(*args, **kwargs)
        finally:
            sys.setprofile(None)
            says.send(f"-{name}")

    return told
