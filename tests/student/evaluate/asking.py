"""A whole evaluation without a model: replies come from a function of the question."""

import io
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from student.evaluate.benchmark import Benchmark, Question, Scored

Reply = Callable[[Question], str]


def score_all(benchmark: Benchmark, questions: Sequence[Question], reply: Reply) -> dict[str, float]:
    """The benchmark's table for these replies, in its official mode."""
    mode, scored = benchmark.modes[0], []
    for question in questions:
        parsed = benchmark.parse(question, reply(question), mode, seed=0)
        scored.append(Scored(question=question, score=benchmark.score(question, parsed)))
    return benchmark.table(scored)


def count_unmatched(benchmark: Benchmark, questions: Sequence[Question], reply: Reply) -> int:
    """How many of these replies held no answer."""
    mode = benchmark.modes[0]
    return sum(not benchmark.parse(question, reply(question), mode, seed=0).is_matched for question in questions)


def png(shade: int) -> bytes:
    """A small grey picture."""
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), shade, np.uint8)).save(file, "PNG")
    return file.getvalue()
