"""What a benchmark of questions is: how its files are read, asked, parsed, scored and added up."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from p4dprep.errors import RequestError
from student.conversations import Box


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What is shown with a question: one video, or pictures, or nothing.

    Attributes:
        video: file of a video; the frame policy samples it.
        span_seconds: [start, end) of the video that is meant; None is all of it.
        frame_indices: decoded frames that the benchmark itself names; None leaves the choice to the frame policy.
        images: files of pictures, or their encoded bytes.
        first_frame_marks: picture that stands for the first frame (Set-of-Mark), or None. Official harnesses show it
            before the video, as a picture of its own; a student's adapter takes a video or pictures, not both.
        regions: the same marks as boxes: left, top, right and bottom as fractions of the first frame's width and
            height. Where given, `student.regions.mark_regions` marks them as in training, in place of that picture.
    """

    video: Path | None = None
    span_seconds: tuple[float, float] | None = None
    frame_indices: tuple[int, ...] | None = None
    images: tuple[Path | bytes, ...] = ()
    first_frame_marks: Path | None = None
    regions: tuple[Box, ...] = ()

    def __post_init__(self) -> None:
        if self.video is None and (self.first_frame_marks or self.regions):
            raise RequestError("marks on a first frame need a video")
        if self.video is not None and self.images:
            raise RequestError(f"a question shows {self.video} and pictures; it must be one of them")


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question as it is asked.

    Attributes:
        id: unique within the benchmark, also where the published ids are not.
        category: the official one; a column of the table.
        prompt: the official words, without media tokens.
        shown: what is seen.
        options: texts of the options in their order; empty for a number or free words.
        answer: letter of the right option; the number or the words where there are no options; "" where the
            published truth is none of the options, which scores 0 by the official rule.
        tags: other official groupings, such as split or scene.
    """

    id: str
    category: str
    prompt: str
    shown: Shown
    options: tuple[str, ...] = ()
    answer: str
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Parsed:
    """What was read out of a reply.

    Attributes:
        answer: letter, number or words; what the official rule falls back to where nothing matched.
        is_matched: whether the reply held an answer; otherwise `answer` is a fallback (or ""), and is counted.
    """

    answer: str
    is_matched: bool


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One question with its score, 0 to 1."""

    question: Question
    score: float


class Benchmark(ABC):
    """One benchmark. Subclasses hold no state; one file each, registered in `student.evaluate.registry`.

    Class attributes:
        name: on the command line.
        source: where the data come from, and their licence, for people.
        columns: of the table, in the official (or the paper's) order; the first is the headline.
        num_tokens: most tokens of a reply.
        modes: named ways to ask or score; the first is the official one.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]
    num_tokens: ClassVar[int] = 16
    modes: ClassVar[tuple[str, ...]] = ("official",)

    @abstractmethod
    def read(self, data: Path, mode: str) -> Sequence[Question]:
        """The questions of a downloaded data set, in its order.

        Args:
            data: folder in the published layout.
            mode: one of `modes`.

        Raises:
            RequestError: the folder is not of that layout; the message names the file and what is wrong with it.
        """

    @abstractmethod
    def parse(self, question: Question, reply: str, mode: str, seed: int) -> Parsed:
        """Read an answer out of a reply by the official rule; guesses, where the rule guesses, come from the seed."""

    def score(self, question: Question, parsed: Parsed) -> float:
        """1 for the right answer, else 0, unless the benchmark has partial credit."""
        return float(bool(question.answer) and parsed.answer == question.answer)

    @abstractmethod
    def table(self, scored: Sequence[Scored]) -> dict[str, float]:
        """Every column that has questions, in percent (0 to 100), by the official aggregation."""

    @abstractmethod
    def files(self, data: Path) -> tuple[Path, ...]:
        """The files that hold the questions; their digest is the revision that a result records."""


def mean_percent(scored: Sequence[Scored]) -> float:
    """Micro average in percent; of nothing it is NaN."""
    return 100 * sum(each.score for each in scored) / len(scored) if scored else float("nan")
