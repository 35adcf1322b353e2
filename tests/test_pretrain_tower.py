"""What the tower of docs/ablation.md is taught: how much of each cell a colour covers, and where in the frame."""

from pathlib import Path

import numpy as np
import torch

from benchmarks.pretrain_tower import COLOURS, as_shown, labels
from student.backbones import StudentSample, load
from student.new import new_student


def test_a_cell_says_which_colours_it_shows_how_much_of_them_and_where() -> None:
    instances = np.zeros((8, 8), np.uint8)
    instances[0:2, 4:6] = 1  # in the upper right cell
    instances[4:8, 0:4] = 2  # all of the lower left one
    found = labels(instances, ["blue", "red"], 2).reshape(2, 2, len(COLOURS), 3)
    blue, red = COLOURS.index("blue"), COLOURS.index("red")
    assert found[0, 1, blue].tolist() == [0.25, 5 / 8, 1 / 8]
    assert found[1, 0, red].tolist() == [1.0, 2 / 8, 6 / 8]
    found[0, 1, blue], found[1, 0, red] = 0, 0
    assert not found.any()


def test_the_tower_learns_on_what_the_students_processor_shows_it(tmp_path: Path) -> None:
    student = load(new_student(tmp_path / "student", ["What?"], size="small"), dtype=torch.float32)
    frames = np.random.default_rng(0).integers(0, 256, (3, 96, 96, 3), dtype=np.uint8)
    sample = StudentSample(id="clip", frames_thwc=frames, time_seconds=np.arange(3.0))
    shown = student.encode([sample]).inputs["pixel_values_videos"][0]
    torch.testing.assert_close(as_shown(student, torch.from_numpy(frames)), shown, rtol=0, atol=1e-5)
