"""Which of a student's parameters learn: its parts, or LoRA adapters of its language model."""

from typing import Literal

Tuning = Literal["projector+llm", "llm", "lora", "projector+lora", "all"]
