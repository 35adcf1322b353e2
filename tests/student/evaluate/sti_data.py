"""A folder in STI-Bench's published layout."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.student.evaluate.contract import touch


def row(
    number: int, video: str, task: str, options: Sequence[str], answer: str, span: tuple[float, float] = (0.0, 4.5)
) -> dict[str, Any]:
    """One of qa.parquet; a question with fewer than five options has nulls for the others."""
    return {
        "Source": "Waymo",
        "Video": video,
        "ID": number,
        "Task": task,
        "QType": "multi-choice",
        "Question": f"What about {number}?",
        "Candidates": dict(zip("ABCDE", [*options, *[None] * 5][:5], strict=True)),
        "Answer": answer,
        "Answer Detail": "see above",
        "time_start": span[0],
        "time_end": span[1],
    }


FIVE = ("1.5 m", "2.5 m", "12.5 m", "0.5 m", "2.5 m/s")
ROWS = (
    row(1, "segment_camera_FRONT.mp4", "Dimensional Measurement", FIVE, "A"),
    row(1, "scene0011_00.mp4", "Spatial Relation", ("left", "right", "above", "below", "behind"), "B"),
    row(2, "000123.mp4", "3D Video Grounding", FIVE, "C"),
    row(3, "000123.mp4", "Displacement & Path Length", FIVE, "D", (1.0, 2.25)),
    row(4, "000123.mp4", "Speed & Acceleration", FIVE, "E"),
    row(5, "scene0011_00.mp4", "Ego-Centric Orientation", FIVE, "E"),
    row(6, "segment_camera_FRONT.mp4", "Trajectory Description", ("straight", "turns", "stops", "turns left"), "A"),
    row(7, "12345.mp4", "Pose Estimation", FIVE, "B"),
)
TRUTH = "ABCDEEAB"
SCENES = ("outdoor", "indoor", "desktop", "desktop", "desktop", "indoor", "outdoor", "unknown")


def write_sti(folder: Path, rows: Sequence[Mapping[str, Any]] = ROWS, videos: str = "video") -> Path:
    """qa.parquet, and the videos as empty files; the archive unpacks to `video` or to `videos`."""
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist([dict(each) for each in rows]), folder / "qa.parquet")
    for each in rows:
        touch(folder / videos / str(each["Video"]))
    return folder
