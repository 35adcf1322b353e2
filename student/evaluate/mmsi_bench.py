"""MMSI-Bench: positions, attributes and motion told from several pictures (arXiv:2505.23764)."""

# ruff: noqa: ARG002  (one signature for all benchmarks, though few need every argument)

import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from p4dprep.errors import RequestError
from student.evaluate.benchmark import Benchmark, Parsed, Question, Scored, Shown
from student.evaluate.common import (
    Record,
    averages,
    by_category,
    category_of,
    parsed_letter,
    picture_bytes,
    read_parquet,
    text_of,
    unique_ids,
)

_TYPES = (
    "Positional Relationship (Cam.–Cam.)",
    "Positional Relationship (Obj.–Obj.)",
    "Positional Relationship (Reg.–Reg.)",
    "Positional Relationship (Cam.–Obj.)",
    "Positional Relationship (Obj.–Reg.)",
    "Positional Relationship (Cam.–Reg.)",
    "Attribute (Meas.)",
    "Attribute (Appr.)",
    "Motion (Cam.)",
    "Motion (Obj.)",
    "MSR",
)
_KEYS = ("id", "images", "question_type", "question", "answer")
_ASK = "\nAnswer with the option's letter from the given choices directly. Enclose the option's letter within ``."
_ENCLOSED = (re.compile(r"``([^`]*)``"), re.compile(r"`([^`]*)`"), re.compile(r"\{([^}]*)\}"))
_LETTER = re.compile(r"\b[A-D]\b(?!\s[a-zA-Z])")
"""A letter that stands alone: the A of "A bike" does not."""


class MMSIBench(Benchmark):
    """The options stand within the question, so a question has none of its own; the answer is a letter from A to D."""

    name = "mmsi-bench"
    source = "RunsenXu/MMSI-Bench, MMSI_Bench.parquet (CC BY-NC 4.0)"
    columns: ClassVar[tuple[str, ...]] = ("Avg", *_TYPES)

    def read(self, data: Path, mode: str) -> Sequence[Question]:
        """The rows of `MMSI_Bench.parquet`, which holds the pictures too."""
        path = data / "MMSI_Bench.parquet"
        rows = read_parquet(path, _KEYS)
        return unique_ids(_question(f"{path}: row {number}", row) for number, row in enumerate(rows))

    def parse(self, question: Question, reply: str, mode: str, seed: int) -> Parsed:
        """What stands in double back-ticks, then in single ones, then in braces; of that the first lone letter.

        Upstream asks an LLM where this finds nothing; here that is unmatched.
        """
        for enclosed in _ENCLOSED:  # each within what the one before it found
            found = enclosed.search(reply)
            reply = found[1] if found else reply
        letter = _LETTER.search(reply)
        return parsed_letter(letter[0] if letter else "")

    def table(self, scored: Sequence[Scored]) -> dict[str, float]:
        """Micro average of all, and of each question type."""
        return averages(scored, {"Avg": lambda _: True, **by_category(_TYPES)})

    def files(self, data: Path) -> tuple[Path, ...]:
        """`MMSI_Bench.parquet`."""
        return (data / "MMSI_Bench.parquet",)


def _question(where: str, row: Record) -> Question:
    kind = text_of(row["question_type"]).replace("-", "–")  # copies differ in their dashes
    category = category_of(where, kind, {name: name for name in _TYPES})
    answer = text_of(row["answer"]).strip().upper()
    if answer not in tuple("ABCD"):
        raise RequestError(f"{where} has the answer {row['answer']!r}; it must be a letter from A to D")
    return Question(
        id=text_of(row["id"]),
        category=category,
        prompt=text_of(row["question"]).strip() + _ASK,
        shown=Shown(images=picture_bytes(where, row["images"])),
        answer=answer,
    )
