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
from p4dprep.worlds.questions import ANSWER_BY_WORDS, TIMEBENCH_FACTORS
from student.evaluate.benchmark import Parsed, Question, Scored
from student.evaluate.common import LETTERS, NUMBER, averages, mean_relative_accuracy, parsed_letter
from student.evaluate.r4d_bench import R4DBench, official_prompt, read_questions

_SECONDS = re.compile(rf"({NUMBER.pattern}) seconds")
_TOLERANCE_SECONDS = 0.011
"""Options are written in hundredths."""


class TimeBench(R4DBench):
    """timebench.json of our worlds, asked and parsed as R4D-Bench is.

    There is no mode that tells the video's length: it would be the answer. Time cues are the student's own.

    The mode `words` asks without options, as the lessons of plain worlds do, and is ours: the number of the reply is
    worth its mean relative accuracy, as numbers are in VSTI-Bench. The nearest option in its place would not tell a
    clock from a habit: options lie a factor of 2 apart, so that whoever always says the usual length is often right.
    """

    name: ClassVar[str] = "time-bench"
    source: ClassVar[str] = "made here by `p4dprep worlds OUT --split test`, after the paper's definition"
    columns: ClassVar[tuple[str, ...]] = ("Avg",)
    modes: ClassVar[tuple[str, ...]] = ("official", "words")

    def read(self, data: Path, mode: str) -> Sequence[Question]:
        """The questions of timebench.json; see `Benchmark.read`."""
        (path,) = self.files(data)
        questions = read_questions(data, path, categories={"TimeBench": "TimeBench"})
        for question in questions:
            _check_options(path, question)
        if mode == "words":
            return tuple(map(_in_words, questions))
        return tuple(replace(question, prompt=official_prompt(question)) for question in questions)

    def parse(self, question: Question, reply: str, mode: str, seed: int) -> Parsed:
        """As R4D-Bench; in the mode `words` the reply's first number."""
        if mode != "words":
            return super().parse(question, reply, mode, seed)
        number = NUMBER.search(reply)
        return Parsed(answer=number[0], is_matched=True) if number else parsed_letter("")

    def score(self, question: Question, parsed: Parsed) -> float:
        """1 for the right option; mean relative accuracy of a number, 0 for what is no number."""
        if question.options:
            return super().score(question, parsed)
        return mean_relative_accuracy(float(parsed.answer or "nan"), float(question.answer))

    def table(self, scored: Sequence[Scored]) -> dict[str, float]:
        """The share of right answers, or the mean accuracy of numbers."""
        return averages(scored, {"Avg": lambda _: True})

    def files(self, data: Path) -> tuple[Path, ...]:
        """Only timebench.json."""
        return (data / "timebench.json",)


def _in_words(question: Question) -> Question:
    """The question without its options; the truth in seconds is its answer."""
    truth = question.options[LETTERS.index(question.answer)].removesuffix(" seconds")
    return replace(question, prompt=f"{question.prompt}\n\n{ANSWER_BY_WORDS}", options=(), answer=truth)


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
