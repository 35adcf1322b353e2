"""A folder in VLM4D's published layout, with its mixture of types."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.student.evaluate.contract import touch, write_json

HUB = "https://huggingface.co/datasets/shijiezhou/VLM4D/resolve/main"


def record(number: int, video: str, options: Sequence[object], answer: object) -> dict[str, Any]:
    """One of real_mc.json or synthetic_mc.json; both count their ids from validation_1."""
    return {
        "id": f"validation_{number}",
        "video": f"{HUB}/{video}",
        "question_type": "multiple-choice",
        "question": f"Where to in {number}?",
        "choices": dict(zip("ABCD", options, strict=True)),
        "answer": answer,
    }


WAYS = ("left", "right", "up", "not moving")
REAL = (
    record(1, "videos_real/davis/bus.mp4", WAYS, "not moving"),
    record(922, "videos_real/youtube-vos/a.mp4", [1, 2, 0, 3], 0),
    record(923, "videos_real/ego4d/b.mp4", WAYS, "right"),
    record(1371, "videos_real/ego4d/b.mp4", ["A dog", "no dog there", 2, "a cat"], "A dog"),
)
SYNTHETIC = (
    record(1, "videos_synthetic/synth_001.mp4", WAYS, "left"),
    record(2, "videos_synthetic/synth_001.mp4", ["left", "no dragon there", "right", "up"], "no dragon there"),
    record(3, "videos_synthetic/synth_003.mp4", ["nowhere", "left", "No", "right"], "No"),
    record(4, "videos_synthetic/synth_003.mp4", ["nowhere", "left", "No", "right"], "nowhere"),
)
TRUTH = "DCBAABCA"
CATEGORIES = ("Exo", "Exo", "Ego", "Ego", "Directional", "FP", "FP", "Directional")


def write_vlm4d(
    folder: Path,
    real: Sequence[Mapping[str, Any]] = REAL,
    synthetic: Sequence[Mapping[str, Any]] = SYNTHETIC,
    questions: str = ".",
) -> Path:
    """Both splits, and the videos as empty files; a split without questions has no file."""
    for name, records in (("real", real), ("synthetic", synthetic)):
        if records:
            write_json(folder / questions / f"{name}_mc.json", list(records))
        for each in records:
            touch(folder / str(each["video"]).removeprefix(f"{HUB}/"))
    return folder
