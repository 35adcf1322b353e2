"""The paper's teacher, L4P: latents, depth, backward flow, motion and camera rays (docs/l4p.md).

Names are loaded when they are first asked for: torch takes seconds that listing the teachers need not cost.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from teachers.l4p.checkpoint import import_checkpoint
    from teachers.l4p.config import MINI_FOLDER, L4PConfig
    from teachers.l4p.model import L4P, L4POutput
    from teachers.l4p.teacher import L4PTeacher
    from teachers.l4p.windows import run_windows

__all__ = ["L4P", "MINI_FOLDER", "L4PConfig", "L4POutput", "L4PTeacher", "import_checkpoint", "run_windows"]

_HOMES = {
    "L4P": "model",
    "L4PConfig": "config",
    "L4POutput": "model",
    "L4PTeacher": "teacher",
    "MINI_FOLDER": "config",
    "import_checkpoint": "checkpoint",
    "run_windows": "windows",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
