"""R4D-Bench: regions, depth and motion in multiple choice (arXiv 2512.17012, Sec. 5; data `nvidia/R4D-Bench`).

Prompt, parsing and the split into static and dynamic are those of the authors' released harness, which differs from
the paper in its numbers: it splits by task (the data card splits by source), and guesses where it can read no letter.
There the guess is drawn anew in every run; here it is a function of seed and question, and every guess is counted.
The harness shows the Set-of-Mark picture before the video; here it stands for the video's first frame.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from p4dprep.errors import RequestError, VideoError
from p4dprep.video import Decoder
from p4dprep.worlds.questions import CATEGORIES, TASK_NAMES
from student.evaluate.benchmark import Benchmark, Parsed, Question, Scored, Shown
from student.evaluate.common import (
    Record,
    averages,
    by_category,
    category_of,
    first_letter,
    guess,
    letter_of_text,
    letters_of,
    list_options,
    media_file,
    parsed_letter,
    read_json,
    text_of,
    unique_ids,
)

STATIC = ("VG", "DM", "SR")
_PREAMBLE = (
    "The first image is a set-of-mark annotation of a key frame from the video, with bounding boxes labeled <obj_1>, "
    "<obj_2>, etc. References to <obj_N> in the question correspond to those labeled regions."
)
_STOCK_PHRASES = re.compile(r"The (?:(?:best|correct) (?:answer|option)|answer) is|Best (?:answer|option):|Answer:")
_LETTER = (re.compile(r"\(([A-Z])\)"), re.compile(r"\b([A-Z])\b"))
_CATEGORY_OF_TASK = {task: category for category, task in TASK_NAMES.items()}


class R4DBench(Benchmark):
    """R4D-Bench in its published folder: test.json, videos/, clipped/ and images/.

    The mode `seconds` also tells the video's length, as the paper's P4D+prompt does; how the authors round it is not
    known, here it has two decimals.
    """

    name: ClassVar[str] = "r4d-bench"
    source: ClassVar[str] = "nvidia/R4D-Bench on the Hugging Face hub; access on request, non-commercial use only"
    columns: ClassVar[tuple[str, ...]] = ("Avg", "Sta", "Dyn", *CATEGORIES)
    modes: ClassVar[tuple[str, ...]] = ("official", "seconds")

    def read(self, data: Path, mode: str) -> Sequence[Question]:
        """The questions of test.json; see `Benchmark.read`."""
        (path,) = self.files(data)
        questions = read_questions(data, path)
        if mode == "seconds":
            questions = _with_lengths(questions)
        return tuple(replace(question, prompt=official_prompt(question)) for question in questions)

    def parse(self, question: Question, reply: str, mode: str, seed: int) -> Parsed:  # noqa: ARG002
        """The first letter in brackets, else the first that stands alone, else a guess."""
        letter = first_letter(_STOCK_PHRASES.sub("", reply), _LETTER, letters_of(question.options))
        return parsed_letter(letter, fallback=guess(question, seed))

    def table(self, scored: Sequence[Scored]) -> dict[str, float]:
        """Micro averages over all, static and dynamic questions, and by category."""
        return averages(
            scored,
            {
                "Avg": lambda _: True,
                "Sta": lambda question: question.category in STATIC,
                "Dyn": lambda question: question.category not in STATIC,
                **by_category(CATEGORIES),
            },
        )

    def files(self, data: Path) -> tuple[Path, ...]:
        """Only test.json."""
        return (data / "test.json",)


def read_questions(data: Path, path: Path, categories: Mapping[str, str] = _CATEGORY_OF_TASK) -> tuple[Question, ...]:
    """Questions of a file in R4D-Bench's layout, whose prompts are the bare question.

    `id`, `options` and `answer` may be numbers, text or null. The question is the one that speaks of `<obj_1>`; older
    copies call it `question_new`. Where `video` is missing `source` is shown, and the tag `video` says which it was.

    Args:
        data: the folder that media paths start from.
        path: the file.
        categories: task to category.

    Raises:
        RequestError: the file or a record is not of that layout, or media are missing.
    """
    records = read_json(path, required=("id", "task", "options", "answer"))
    return unique_ids(
        _question(data, f"{path}: record {number}", record, categories) for number, record in enumerate(records)
    )


def _question(data: Path, where: str, record: Record, categories: Mapping[str, str]) -> Question:
    if not isinstance(record["options"], list):
        raise RequestError(f"{where} has options {record['options']!r}; it must have a list")
    options = tuple(text_of(option) for option in record["options"])
    clip, source, marks, benchmark = (text_of(record.get(key)) for key in ("video", "source", "som_image", "benchmark"))
    shown = Shown(
        video=media_file(data, where, clip, source),
        first_frame_marks=media_file(data, where, marks) if marks else None,
    )
    return Question(
        id="/".join(filter(None, (benchmark, text_of(record["id"])))),
        category=category_of(where, record["task"], categories),
        prompt=_asked(where, record),
        shown=shown,
        options=options,
        answer=letter_of_text(where, options, text_of(record["answer"])),
        tags={"benchmark": benchmark, "video": clip if (data / clip).is_file() else source},
    )


def _asked(where: str, record: Record) -> str:
    for key in ("question", "question_new", "question_raw", "question_old"):
        if record.get(key):
            return text_of(record[key])
    raise RequestError(f"{where} asks nothing; download it again")


def official_prompt(question: Question) -> str:
    """The harness's words around a bare question."""
    parts = (
        _PREAMBLE if question.shown.first_frame_marks else "",
        question.prompt,
        f"Options:\n{list_options(question.options)}",
        "Answer with only the letter of the correct option.",
    )
    return "\n\n".join(filter(None, parts))


def _with_lengths(questions: Sequence[Question]) -> tuple[Question, ...]:
    """The questions, each told first how long its video is, as measured on the file's packets."""
    sentence = "These images are uniformly sampled from a video of {:.2f} seconds.\n{}"
    with Decoder() as decoder:
        length = functools.cache(functools.partial(_length, decoder))
        return tuple(
            replace(question, prompt=sentence.format(length(question.shown.video), question.prompt))
            for question in questions
        )


def _length(decoder: Decoder, video: Path) -> float:
    try:
        start_seconds, end_seconds = decoder.time_span(video)
    except VideoError as error:
        raise RequestError(f"{video} tells no length: {error}; download it again") from None
    return end_seconds - start_seconds
