"""The paper's teacher, L4P: latents, depth, backward flow, motion and camera rays (docs/l4p.md)."""

from teachers.l4p.checkpoint import import_checkpoint
from teachers.l4p.config import L4PConfig
from teachers.l4p.model import L4P, L4POutput
from teachers.l4p.teacher import L4PTeacher
from teachers.l4p.windows import run_windows

__all__ = ["L4P", "L4PConfig", "L4POutput", "L4PTeacher", "import_checkpoint", "run_windows"]
