"""A folder in R4D-Bench's published layout, with its mixture of types."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.student.evaluate.contract import touch, write_json
from tests.videos import write_video


def record(number: object, benchmark: str, task: str, options: Sequence[object], answer: object) -> dict[str, Any]:
    """One of test.json; STI-Bench's videos are clipped, VLM4D's are not."""
    folder = "clipped" if benchmark == "stibench" else "videos"
    return {
        "id": number,
        "benchmark": benchmark,
        "task": task,
        "video": f"{folder}/{benchmark}/clip.mp4",
        "source": f"videos/{benchmark}/clip.mp4",
        "som_image": f"images/{benchmark}/{number}.png",
        "question": f"What of <obj_1> in {number}?",
        "question_raw": f"What of the car in {number}?",
        "options": list(options),
        "answer": answer,
    }


RECORDS = (
    record(7, "stibench", "3D Video Grounding", ["left", "right", "up", "down", "gone"], "gone"),
    record(8, "stibench", "Dimensional Measurement", [1, 2, "3 m", 4], 1),
    record(9, "stibench", "Spatial Relation", ["near", "far", "near", "none"], "near"),
    record(7, "vlm4d", "Counting", [3, 0, 1, 2], 0),
    record("validation_8", "vlm4d", "Rotational", ["left", "right", "not", None], "right"),
    record("validation_9", "vlm4d", "Translational", ["left", "right", "up", "down"], "down"),
    record("validation_10", "vlm4d", "False Positives", ["no", "yes", 1, 2], "no"),
    record(11, "stibench", "Speed & Acceleration", ["1 m/s", "2 m/s", "3 m/s", "4 m/s", "5 m/s"], "5 m/s"),
    record(12, "stibench", "Displacement & Path Length", ["1", "2", "3", "4", "5"], 3),
)
LETTERS = "EAABBDAEC"
"""The right ones, counted by hand."""


def write_r4d(folder: Path, records: Sequence[dict[str, Any]] = RECORDS) -> Path:
    """Its videos last 2 seconds as clips, and 3 seconds whole."""
    write_json(folder / "test.json", list(records))
    for benchmark in ("stibench", "vlm4d"):
        for name, num_frames in (("clipped", 16), ("videos", 24)):
            path = folder / name / benchmark / "clip.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_video(path, num_frames=num_frames, fps=8, width=32, height=32)
    for each in records:
        if each.get("som_image"):
            touch(folder / each["som_image"])
    return folder
