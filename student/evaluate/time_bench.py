"""TimeBench: how long is this video (arXiv 2512.17012, A3)? The authors' own questions are not published.

Our worlds come with such questions: five options, 0.25, 0.5, 1, 2 and 4 times the truth. The truth is always the middle
value, so whoever compares the options needs no video at all: it tells whether a student reads the clock it is given,
not how well it judges time.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from p4dprep.errors import RequestError
from p4dprep.worlds.questions import TIMEBENCH_FACTORS
from student.evaluate.benchmark import Question, Scored
from student.evaluate.common import LETTERS, averages
from student.evaluate.r4d_bench import R4DBench, official_prompt, read_questions

_SECONDS = re.compile(r"(\d+(?:\.\d+)?) seconds")
_TOLERANCE_SECONDS = 0.011
"""Options are written in hundredths."""


class TimeBench(R4DBench):
    """timebench.json of our worlds, asked and parsed as R4D-Bench is.

    There is no mode that tells the video's length: it would be the answer. Nor one that asks for words: whoever always
    says 3 seconds is nearest to the truth in 85 of 100 plain worlds. Time cues are the student's own.
    """

    name: ClassVar[str] = "time-bench"
    source: ClassVar[str] = "made here by `p4dprep worlds OUT --split test`, after the paper's definition"
    columns: ClassVar[tuple[str, ...]] = ("Avg",)
    modes: ClassVar[tuple[str, ...]] = ("official",)

    def read(self, data: Path, mode: str) -> Sequence[Question]:  # noqa: ARG002
        """The questions of timebench.json; see `Benchmark.read`."""
        (path,) = self.files(data)
        questions = read_questions(data, path, categories={"TimeBench": "TimeBench"})
        for question in questions:
            _check_options(path, question)
        return tuple(replace(question, prompt=official_prompt(question)) for question in questions)

    def table(self, scored: Sequence[Scored]) -> dict[str, float]:
        """The share of right answers."""
        return averages(scored, {"Avg": lambda _: True})

    def files(self, data: Path) -> tuple[Path, ...]:
        """Only timebench.json."""
        return (data / "timebench.json",)


def _check_options(path: Path, question: Question) -> None:
    """Refuse what is no TimeBench: other options than the factors of the truth."""
    matches = [_SECONDS.fullmatch(option) for option in question.options]
    values = [float(match[1]) for match in matches if match]
    if question.answer and len(values) == len(question.options) == len(TIMEBENCH_FACTORS):
        truth = values[LETTERS.index(question.answer)]
        wanted = [factor * truth for factor in sorted(TIMEBENCH_FACTORS)]
        # The truth is rounded too, and four times that is offered.
        tolerance = _TOLERANCE_SECONDS / 2 * (1 + max(TIMEBENCH_FACTORS))
        if all(abs(value - want) <= tolerance for value, want in zip(sorted(values), wanted, strict=True)):
            return
    raise RequestError(
        f"{path}: {question.id} offers {', '.join(question.options)}; TimeBench offers "
        f"{', '.join(map(str, TIMEBENCH_FACTORS))} times the truth in seconds; make the worlds again"
    )
