"""VSTI-Bench: what a moving camera sees of a scene, in choices and in numbers (VLM-3R, arXiv:2505.20279)."""

# ruff: noqa: ARG002  (one signature for all benchmarks, though few need every argument)

import ast
import math
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from p4dprep.errors import RequestError
from student.evaluate.benchmark import Benchmark, Parsed, Question, Scored, Shown
from student.evaluate.common import (
    Record,
    averages,
    by_category,
    category_of,
    check_options,
    letters_of,
    mean_relative_accuracy,
    media_file,
    parsed_letter,
    read_json,
    text_of,
    unique_ids,
)

_CHOICES = (
    "obj_obj_relative_pos_nf",
    "obj_obj_relative_pos_ud",
    "obj_obj_relative_pos_lr",
    "camera_obj_rel_dist_v1",
    "camera_obj_rel_dist_v2",
    "camera_obj_rel_dist_v3",
    "camera_movement_direction",
)
_NUMBERS = ("camera_obj_abs_dist", "camera_displacement", "camera_obj_dist_change")
_KEYS = ("id", "video_path", "question_type", "question", "ground_truth")


class VSTIBench(Benchmark):
    """Choices score by accuracy, numbers by mean relative accuracy; the average is over question types, unweighted.

    The record's `frame_indices` are the one or two frames that the question is about, counted in the words of the
    question ("frame 6 of 31"); the official harness never reads them and samples the whole video, and so do we.

    An erratum of 2026-07-13 changed labels and took 6,042 questions to 5,736; results across it cannot be compared, and
    the digest of `test.json` tells them apart. What else lies in the folder, such as an erratum's own list of ids, is
    never read.
    """

    name = "vsti-bench"
    source = "Journey9ni/vstibench, split test (see its card)"
    columns: ClassVar[tuple[str, ...]] = ("Avg", *_CHOICES, *_NUMBERS)

    def read(self, data: Path, mode: str) -> Sequence[Question]:
        """The questions of `test.json`; videos lie where their `video_path` says."""
        path = data / "test.json"
        records = read_json(path, _KEYS)
        return unique_ids(_question(data, f"{path}: record {number}", record) for number, record in enumerate(records))

    def parse(self, question: Question, reply: str, mode: str, seed: int) -> Parsed:
        """The first word without its full stops: a letter, whatever its case, or a number."""
        word = reply.strip().split(" ")[0].rstrip(".").strip()
        if question.options:
            letter = word.upper()
            return parsed_letter(letter if letter and letter in tuple(letters_of(question.options)) else "")
        return Parsed(answer=word, is_matched=True) if math.isfinite(_number(word)) else parsed_letter("")

    def score(self, question: Question, parsed: Parsed) -> float:
        """Accuracy of a choice; mean relative accuracy of a number, 0 for what is no number."""
        if question.options:
            return super().score(question, parsed)
        return mean_relative_accuracy(_number(parsed.answer), float(question.answer))

    def table(self, scored: Sequence[Scored]) -> dict[str, float]:
        """Each question type, and their unweighted mean."""
        types = averages(scored, by_category(_CHOICES + _NUMBERS))
        return {"Avg": sum(types.values()) / len(types), **types} if types else {}

    def files(self, data: Path) -> tuple[Path, ...]:
        """`test.json`."""
        return (data / "test.json",)


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        return math.nan


def _question(data: Path, where: str, record: Record) -> Question:
    kind = category_of(where, record["question_type"], {name: name for name in _CHOICES + _NUMBERS})
    shown = Shown(video=media_file(data, where, text_of(record["video_path"])))
    asked = f"These are frames of a video.\n{record['question']}\n"
    if kind in _CHOICES:
        options = _options(where, record.get("options"))
        answer, tail = _letter(where, options, record.get("mc_answer")), "\n".join(["Options:", *options, _ASK_LETTER])
    else:  # these too are published with options, which are neither shown nor scored
        options, answer, tail = (), _truth(where, record["ground_truth"]), _ASK_NUMBER
    return Question(
        id=text_of(record["id"]),
        category=kind,
        prompt=asked + tail,
        shown=shown,
        options=tuple(option.split(". ", 1)[-1] for option in options),
        answer=answer,
        tags={name: text_of(record[name]) for name in ("dataset", "scene_name") if name in record},
    )


_ASK_LETTER = "Answer with the option's letter from the given choices directly."
_ASK_NUMBER = "Please answer the question using a single word or phrase."


def _options(where: str, published: object) -> tuple[str, ...]:
    """The options as they are shown, "A. Near"; some copies hold the list as the text that Python prints of it."""
    options = published
    if isinstance(options, str):
        try:
            options = ast.literal_eval(options)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            options = None
    if not isinstance(options, list):
        raise RequestError(f"{where} has the options {published!r}; they must be a list")
    texts = tuple(map(text_of, options))
    check_options(where, texts)
    return texts


def _letter(where: str, options: Sequence[str], published: object) -> str:
    letter = text_of(published).strip().upper()
    if letter not in tuple(letters_of(options)):
        raise RequestError(f"{where} has the mc_answer {published!r}; it must be one of {letters_of(options)}")
    return letter


def _truth(where: str, published: object) -> str:
    """A truth that a relative error can be taken of, as text."""
    number = _number(text_of(published))
    if not (math.isfinite(number) and number > 0):
        raise RequestError(f"{where} has the ground_truth {published!r}; it must be a number above 0")
    return text_of(published)
