"""A small MMSI-Bench in its published layout: one parquet with its pictures as bytes."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.student.evaluate.asking import png

TYPES = (
    "Positional Relationship (Cam.–Cam.)",
    "Positional Relationship (Obj.–Obj.)",
    "Positional Relationship (Reg.–Reg.)",
    "Positional Relationship (Cam.-Obj.)",  # some copies have plain hyphens
    "Positional Relationship (Obj.–Reg.)",
    "Positional Relationship (Cam.–Reg.)",
    "Attribute (Meas.)",
    "Attribute (Appr.)",
    "Motion (Cam.)",
    "Motion (Obj.)",
    "MSR",
    "MSR",
)


def rows() -> list[dict[str, Any]]:
    return [
        {
            "id": number,
            "images": [png(number), png(100 + number)],
            "question_type": kind,
            "question": f"Where to? Options: A: north {number}, B: south, C: east, D: west\n",
            "answer": "ABCD"[number % 4],
            "thought": "because",
        }
        for number, kind in enumerate(TYPES)
    ]


def build(folder: Path, published: list[dict[str, Any]] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows() if published is None else published)
    pq.write_table(table, folder / "MMSI_Bench.parquet")
    return folder
