"""The paper's rivals of P4D, which read the teacher's targets at inference too (arXiv 2512.17012, Table 4)."""

from typing import Literal

Strategy = Literal["p4d", "4d-concat", "4d-pe"]
"""`p4d` is distillation, gone after training; the others stay in the student for good."""
