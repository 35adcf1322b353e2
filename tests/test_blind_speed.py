"""Speeds without times: what a constant length answers is right, and what needs the time is not."""

from benchmarks.blind_speed import blind_accuracy

OPTIONS = [[0.5, 1.0, 2.0, 4.0]] * 4


def test_clips_of_one_length_need_no_clock() -> None:
    assert blind_accuracy([0.5, 1.0, 2.0, 4.0], OPTIONS, [3.0] * 4) == 1.0


def test_where_lengths_differ_only_those_of_one_length_are_right() -> None:
    assert blind_accuracy([1.0, 1.0, 1.0, 2.0], OPTIONS, [1.0, 1.0, 1.0, 4.0]) == 0.75
    assert blind_accuracy([1.0, 2.0], OPTIONS[:2], [1.0, 8.0]) == 0.5
