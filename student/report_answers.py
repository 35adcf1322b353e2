"""A report's answers: the official table of each result with intervals, and the worst cases with what was shown.

Shape suffixes: `t` frames, `h w` pixels, `c` channels (RGB).
"""

import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from p4dprep.errors import CorruptDataError, MissingDataError, RequestError
from p4dprep.storage import redact
from student.evaluate import registry
from student.evaluate.benchmark import Question
from student.evaluate.common import LETTERS
from student.evaluate.media import FramePolicy, MediaReader
from student.evaluate.result import RESULT, Column, Result, facts, read_answers
from student.page import Card, Interval, Section, Table, address

MAX_WORST = 6
"""Cases shown of each result."""

_MAX_PICTURES, _PICTURE_HEIGHT, _GAP = 6, 120, 4
_COUNTS = ("num_asked", "num_unmatched", "num_failed", "failures", "table")


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A folder of results.

    Attributes:
        folder: as named.
        result: the table, and what was asked of whom.
        worst: lines of answers, the worst first.
    """

    folder: Path
    result: Result
    worst: tuple[Mapping[str, Any], ...]

    @property
    def said(self) -> Mapping[str, Any]:
        """What was asked of whom."""
        return self.result.identity

    @property
    def name(self) -> str:
        """The folder's own name."""
        return redact(self.folder.resolve().name)


def read_answered(folder: Path) -> Answered:
    """Read a folder of `p4dprep eval answers`.

    Raises:
        RequestError: it holds no result.
        CorruptDataError: its answers are damaged.
    """
    path = folder / RESULT
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        columns = tuple(map(_column, content["table"]))
        counts = {name: content[name] for name in _COUNTS if name != "table"}
        identity = {name: value for name, value in content.items() if name not in _COUNTS}
        result = Result(identity=identity, table=columns, **counts)
        facts(result)
    except OSError as error:
        raise RequestError(f"{folder} has no result of p4dprep eval answers ({error.strerror}); ask all questions "
                           "first") from None  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptDataError(f"{path} is no result of p4dprep eval answers: {error!r}") from None
    return Answered(folder=folder, result=result, worst=tuple(_worst(read_answers(folder))))


def _column(fields: Mapping[str, Any]) -> Column:
    """A column of the table whose numbers are numbers: they get into the page's style."""
    value, low, high = (math.nan if fields[name] is None else float(fields[name]) for name in ("value", "low", "high"))
    return Column(name=str(fields["name"]), value=value, low=low, high=high, num_questions=int(fields["num_questions"]))


def _worst(lines: Iterator[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The lowest scores, in turn from every category, the category that is worst as a whole first."""
    kept: dict[str, list[Mapping[str, Any]]] = {}
    scores: dict[str, list[float]] = {}
    for line in lines:
        scores.setdefault(line["category"], []).append(line["score"])
        if line["score"] < 1:
            ranked = kept.setdefault(line["category"], [])
            ranked.append(line)
            ranked.sort(key=lambda each: each["score"])
            del ranked[MAX_WORST:]
    order = sorted(kept, key=lambda category: float(np.mean(scores[category])))
    turns = [(place, rank, line) for rank, category in enumerate(order) for place, line in enumerate(kept[category])]
    return [line for _, _, line in sorted(turns, key=lambda turn: turn[:2])[:MAX_WORST]]


def answers_section(results: Sequence[Answered]) -> Section:
    """The official tables, results of one benchmark side by side, and what must be known besides."""
    kinds = dict.fromkeys((each.said["bench"], each.said["mode"]) for each in results)
    return Section(
        title="Answers",
        notes=tuple(_note(each) for each in results),
        tables=tuple(
            _table(bench, mode, [each for each in results if (each.said["bench"], each.said["mode"]) == (bench, mode)])
            for bench, mode in kinds
        ),
    )


def _note(answered: Answered) -> str:
    failures = "; ".join(f"{count} x {reason}" for reason, count in answered.result.failures.items())
    lines = [*facts(answered.result), *([f"not asked: {failures}"] if failures else [])]
    return redact(f"{answered.name}: {'; '.join(lines)}")


def _table(bench: str, mode: str, results: Sequence[Answered]) -> Table:
    """Percent with the 95% interval, a row for each official column."""
    found = [{column.name: column for column in each.result.table} for each in results]
    rows = []
    for name in dict.fromkeys(name for columns in found for name in columns):
        counts = {columns[name].num_questions for columns in found if name in columns}
        cells = [_interval(columns[name]) if name in columns else "–" for columns in found]
        rows.append((name, " / ".join(f"{count:,}" for count in sorted(counts)), *cells))
    columns = ("percent right", "questions", *(each.name for each in results))
    return Table(title=f"{bench}, {mode}", columns=columns, rows=tuple(rows))


def _interval(column: Column) -> Interval:
    low, high = (None if math.isnan(bound) else bound for bound in (column.low, column.high))
    return Interval(value=column.value, low=low, high=high)


def worst_section(results: Sequence[Answered], data: Sequence[Path]) -> Section:
    """The worst answers of each result, with the frames or pictures that were shown.

    Args:
        results: whose answers.
        data: folders of the benchmarks, in any order.

    Raises:
        RequestError: a folder holds the questions of no result.
    """
    shown: dict[int, Mapping[str, Question]] = {}
    used: set[Path] = set()
    for number, each in enumerate(results):
        shown[number] = {}
        for folder in data:
            if questions := _questions(each, folder):
                shown[number] = questions
                used.add(folder)
                break
    if lost := [folder for folder in data if folder not in used]:
        raise RequestError(
            f"--data {lost[0]} holds none of the questions that are shown; name a result's benchmark folder"
        )
    cards = [card for number, each in enumerate(results) for card in _cards(each, shown[number])]
    lacking = [each.name for number, each in enumerate(results) if each.worst and not shown[number]]
    notes = [f"At most {MAX_WORST} of each result: the lowest scores, in turn from every category."]
    notes += [f"What was shown in {', '.join(lacking)} is not drawn: name its benchmark's folder with --data."] * bool(
        lacking
    )
    return Section(title="Worst cases", notes=tuple(notes), cards=tuple(cards))


def _questions(answered: Answered, folder: Path) -> Mapping[str, Question]:
    """The worst cases' questions, if the folder is the benchmark's and holds the very words that were asked."""
    asked = {line["id"]: line["prompt"] for line in answered.worst}
    try:
        questions = registry.find(answered.said["bench"]).read(folder, answered.said["mode"])
    except RequestError:
        return {}
    return {each.id: each for each in questions if asked.get(each.id) == each.prompt}


def _cards(answered: Answered, questions: Mapping[str, Question]) -> Iterator[Card]:
    reader = MediaReader(FramePolicy(num_frames=answered.said["num_frames"]))
    try:
        for line in answered.worst:
            picture, seen = "", "not drawn: the folder of --data has no such question" if questions else ""
            if line["id"] in questions:
                picture, seen = _seen(reader, questions[line["id"]])
            yield Card(
                title=redact(f"{answered.name}: {line['category']}, {line['id']}"),
                picture=picture,
                facts=tuple((name, redact(text)) for name, text in _facts(line, seen) if text),
            )
    finally:
        reader.close()


def _facts(line: Mapping[str, Any], seen: str) -> list[tuple[str, str]]:
    options = line.get("options", [])
    read = (
        _answer(line["answer"], options) if line["is_matched"] else f"no answer; scored as {line['answer'] or 'none'}"
    )
    failure = line.get("failure", "")
    return [
        ("shown", seen),
        ("question", line["prompt"]),
        ("truth", _answer(line["truth"], options)),
        ("reply", "" if failure else line["reply"] or "(nothing)"),
        ("read as", "" if failure else read),
        ("could not be asked", failure),
        ("score", f"{line['score']:.2f}" if line["score"] else ""),
    ]


def _answer(answer: str, options: Sequence[str]) -> str:
    """A letter with its option's text; a number or words as they are."""
    place = LETTERS.find(answer) if len(answer) == 1 else -1
    return f"{answer}: {options[place]}" if 0 <= place < len(options) else answer


def _seen(reader: MediaReader, question: Question) -> tuple[str, str]:
    """What a question showed as one picture's address, and in words; without a picture, why."""
    try:
        sample = reader.load(question).sample
    except (ValueError, MissingDataError) as error:
        return "", f"not drawn: {error}"
    if sample.frames_thwc is None or sample.time_seconds is None:
        pictures = list(sample.images_hwc)[:_MAX_PICTURES]
        words = f"{len(pictures)} of {len(sample.images_hwc)} pictures"
    else:
        places = np.unique(np.linspace(0, len(sample.frames_thwc) - 1, _MAX_PICTURES).round().astype(int))
        pictures = [sample.frames_thwc[place] for place in places]
        times = ", ".join(f"{sample.time_seconds[place]:.2f}" for place in places)
        words = f"{len(pictures)} of {len(sample.frames_thwc)} frames, at {times} s"
    return (_side_by_side(pictures), words) if pictures else ("", "nothing")


def _side_by_side(pictures_hwc: Sequence[NDArray[np.uint8]]) -> str:
    """Pictures of one height in a row, as an address."""
    shrunk = [Image.fromarray(each) for each in pictures_hwc]
    shrunk = [
        each.resize((max(1, round(each.width * _PICTURE_HEIGHT / each.height)), _PICTURE_HEIGHT)) for each in shrunk
    ]
    canvas = Image.new("RGB", (sum(each.width + _GAP for each in shrunk) - _GAP, _PICTURE_HEIGHT))
    left = 0
    for each in shrunk:
        canvas.paste(each, (left, 0))
        left += each.width + _GAP
    buffer = io.BytesIO()
    canvas.save(buffer, "WEBP", quality=85)
    return address(buffer.getvalue())
