"""What the tower of docs/ablation.md is taught: how much of each cell a colour covers, and where in the frame."""

import numpy as np

from benchmarks.pretrain_tower import COLOURS, labels


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
