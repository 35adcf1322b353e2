"""A small OmniSpatial in its published layout, whose ids start anew in every task."""

import json
from pathlib import Path
from typing import Any

from tests.student.evaluate.asking import png

SUBTASKS = {
    "Manipulation": "Dynamic_Reasoning",
    "Motion_Analysis": "Dynamic_Reasoning",
    "Traffic_Analysis": "Spatial_Interaction",
    "Localization": "Spatial_Interaction",
    "Geospatial_Strategy": "Spatial_Interaction",
    "Pattern_Recognition": "Complex_Logic",
    "Geometric_Reasoning": "Complex_Logic",
    "Egocentric": "Perspective_Taking",
    "Allocentric": "Perspective_Taking",
    "Hypothetical": "Perspective_Taking",
}


def records() -> list[dict[str, Any]]:
    """One of each sub-task; two pictures a task, and on the first of them two questions."""
    made: list[dict[str, Any]] = []
    for number, (subtask, task) in enumerate(SUBTASKS.items()):
        place = sum(each["task_type"] == task for each in made)
        options = ["left", "right", "up", "down"][: 2 + number % 3]
        made.append(
            {
                "id": ("0_0", "0_1", "1_0")[place],
                "question": f"Which way {number}?",
                "options": options,
                "answer": number % len(options),
                "task_type": task,
                "sub_task_type": subtask,
            }
        )
    return made


def build(folder: Path, published: list[dict[str, Any]] | None = None) -> Path:
    for task in SUBTASKS.values():
        (folder / task).mkdir(parents=True, exist_ok=True)
        for number in range(2):
            (folder / task / f"{number}.png").write_bytes(png(number))
    (folder / "data.json").write_text(json.dumps(records() if published is None else published))
    return folder
