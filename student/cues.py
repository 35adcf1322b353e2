"""How a student is told when each frame was taken."""

from typing import Literal

TimeCue = Literal["none", "marks", "prompt", "tpe"]
"""`marks` burns the time into each frame, `prompt` says the times in words, `tpe` adds them to the features."""
