"""A small SAT in its published layout: one parquet with its pictures as bytes."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.student.evaluate.asking import png

ROWS: list[dict[str, Any]] = [
    {"question_type": "ego_movement", "answers": ["left", "right"], "correct_answer": "left"},
    {"question_type": "obj_movement", "answers": ["moved left", "no movement"], "correct_answer": "no movement"},
    {"question_type": "action_conseq", "answers": ["no", "yes"], "correct_answer": "no"},
    {"question_type": "goal_aim", "answers": ["left", "left and forward"], "correct_answer": "left and forward"},
    {"question_type": "perspective", "answers": ["right", "left"], "correct_answer": "left"},
    {"question_type": "perspective", "answers": ["right", "left"], "correct_answer": "right"},
]


def build(folder: Path, rows: list[dict[str, Any]] | None = None, *, as_structs: bool = False) -> Path:
    """Write it; Hugging Face's own writer makes a struct of each picture."""
    table = []
    for number, row in enumerate(ROWS if rows is None else rows):
        pictures: list[Any] = [png(number), png(100 + number)][: 1 + number % 2]
        if as_structs:
            pictures = [{"bytes": picture, "path": None} for picture in pictures]
        table.append({"image_bytes": pictures, "question": f"Question {number}?"} | row)
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(table), folder / "SAT_test.parquet")
    return folder
