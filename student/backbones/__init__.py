"""Students: how each transformers family of video language models shows its tower, projector, LLM and video tokens."""

from student.backbones.adapter import FamilyAdapter, Part
from student.backbones.loading import FAMILIES, load, load_adapter
from student.backbones.model import Backbone
from student.backbones.types import StudentBatch, StudentOutput
from student.samples import StudentSample, Turn, VideoTokens

__all__ = [
    "FAMILIES",
    "Backbone",
    "FamilyAdapter",
    "Part",
    "StudentBatch",
    "StudentOutput",
    "StudentSample",
    "Turn",
    "VideoTokens",
    "load",
    "load_adapter",
]
