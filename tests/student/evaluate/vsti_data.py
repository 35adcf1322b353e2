"""A small VSTI-Bench in its published layout, with its traps."""

import json
from pathlib import Path
from typing import Any

from tests.videos import write_video

VIDEO = "ScanNet/videos/val/scene0011_00.mp4"
CHOICES = {
    "obj_obj_relative_pos_nf": ["Near", "Far"],
    "obj_obj_relative_pos_ud": ["Up", "Down"],
    "obj_obj_relative_pos_lr": ["Left", "Right"],
    "camera_obj_rel_dist_v1": ["chair", "table", "sofa", "lamp"],
    "camera_obj_rel_dist_v2": ["chair", "table", "sofa"],
    "camera_obj_rel_dist_v3": ["chair", "table"],
    "camera_movement_direction": ["Forward", "Backward", "Left", "Right"],
}
NUMBERS = {"camera_obj_abs_dist": 1.3, "camera_displacement": "0.7", "camera_obj_dist_change": 2}


def record(number: int, kind: str, **changes: Any) -> dict[str, Any]:
    """One record. Numbers are published with options and a letter too, which nobody shows or scores."""
    texts = CHOICES.get(kind, ["0.5", "0.9", "1.3", "2.0"])
    made: dict[str, Any] = {
        "id": number,
        "dataset": "scannet",
        "scene_name": "scene0011_00",
        "video_path": VIDEO,
        "frame_indices": [5],
        "question_type": kind,
        "question": f"In frame 6 of 31, what of {kind}?",
        "options": [f"{letter}. {text}" for letter, text in zip("ABCD", texts, strict=False)],
        "ground_truth": NUMBERS.get(kind, texts[0]),
        "mc_answer": "A" if kind in CHOICES else "C",
    }
    return made | changes


def records() -> list[dict[str, Any]]:
    """Two more of near and far (both B), so that types weigh differently; one set of options as a printed list."""
    made = [record(number, kind) for number, kind in enumerate([*CHOICES, *NUMBERS])]
    made[1]["options"] = str(made[1]["options"])
    made += [record(100 + number, "obj_obj_relative_pos_nf", mc_answer="B", ground_truth="Far") for number in range(2)]
    return made


def build(folder: Path, published: list[dict[str, Any]] | None = None) -> Path:
    """Write it, with the erratum's list of ids, which holds no records."""
    (folder / VIDEO).parent.mkdir(parents=True)
    write_video(folder / VIDEO, num_frames=4, width=32, height=32, fps=4)
    (folder / "test.json").write_text(json.dumps(records() if published is None else published))
    (folder / "erratum_dropped_items.json").write_text("[17, 23]")
    return folder
