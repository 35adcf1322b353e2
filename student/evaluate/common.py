"""What the readers of benchmarks share: reading tables, media paths, options, letters, and averages by group."""

import json
import math
import re
import string
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from p4dprep.errors import RequestError
from student.conversations import check_media_path
from student.data import safe_path
from student.evaluate.benchmark import Parsed, Question, Scored, mean_percent

LETTERS = string.ascii_uppercase
"""Of options; more than these are refused."""
NUMBER = re.compile(r"\d+(?:\.\d+)?")
_CONFIDENCES = np.linspace(0.5, 0.95, 10)

Record = dict[str, Any]


def read_json(path: Path, required: Collection[str]) -> list[Record]:
    """Records of a JSON file that holds one list of objects.

    Args:
        path: the file.
        required: keys that every record must have, whatever their values.

    Raises:
        RequestError: there is no such file, it is no list of objects, or a record lacks a key.
    """
    try:
        records = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise _absent(path) from None
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(f"{path} cannot be read as JSON: {error}; download it again") from None
    if not isinstance(records, list) or not records:
        raise RequestError(f"{path} must hold a list of questions, at least one")
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            raise RequestError(f"{path}: record {number} is a {type(record).__name__}; it must be an object")
        _check_keys(f"{path}: record {number}", record, required)
    return records


def read_parquet(path: Path, required: Collection[str], optional: Collection[str] = ()) -> list[Record]:
    """Rows of a parquet file; only the columns named are read, and optional ones that it lacks are None.

    Raises:
        RequestError: there is no such file, it is no parquet, has no rows, or lacks a column.
    """
    try:
        with pq.ParquetFile(path) as file:
            _check_keys(str(path), file.schema_arrow.names, required)
            columns = [name for name in file.schema_arrow.names if name in {*required, *optional}]
            rows: list[Record] = file.read(columns=columns).to_pylist()
    except FileNotFoundError:
        raise _absent(path) from None
    except (OSError, pa.ArrowException) as error:
        raise RequestError(f"{path} cannot be read as parquet: {error}; download it again") from None
    if not rows:
        raise RequestError(f"{path} holds no questions")
    return [dict.fromkeys(optional) | row for row in rows]


def _absent(path: Path) -> RequestError:
    return RequestError(f"{path} does not exist; --data must be the benchmark's folder as it is published")


def _check_keys(where: str, found: Collection[str], required: Collection[str]) -> None:
    missing = [name for name in required if name not in found]
    if missing:
        raise RequestError(f"{where} lacks {', '.join(missing)}; it has {', '.join(sorted(found)) or 'nothing'}")


def text_of(value: object) -> str:
    """A published value as text: None is "", numbers as Python writes them, text as it is."""
    return "" if value is None else str(value)


def media_file(data: Path, where: str, *candidates: str) -> Path:
    """The first of some published paths, relative to the data folder, that exists.

    Args:
        data: folder that no path may leave, not even by links.
        where: file and record that name the paths, for the message.
        candidates: paths in the order of preference; empty ones are passed over.

    Raises:
        RequestError: a path leaves the folder, or none of them exists.
    """
    named = [candidate for candidate in candidates if candidate]
    for candidate in named:
        try:
            check_media_path(candidate)
            found = Path(safe_path(str(data), candidate))
        except ValueError as error:
            raise RequestError(f"{where}: {error}") from None
        if found.is_file():
            return found
    raise RequestError(f"{where} shows {' or '.join(named) or 'no media'}, which {data} lacks; download it whole")


def picture_bytes(where: str, published: object) -> tuple[bytes, ...]:
    """Encoded pictures of a parquet cell: a list of bytes, or of the {bytes, path} that Hugging Face's datasets write.

    Raises:
        RequestError: it holds no pictures, or something else.
    """
    cells = published if isinstance(published, list) else []
    found = [cell.get("bytes") if isinstance(cell, dict) else cell for cell in cells]
    pictures = tuple(picture for picture in found if isinstance(picture, bytes) and picture)
    if not pictures or len(pictures) < len(found):
        raise RequestError(f"{where} holds no list of encoded pictures; download it again")
    return pictures


def letters_of(options: Sequence[str]) -> str:
    """A letter for each option, from A."""
    return LETTERS[: len(options)]


def list_options(options: Sequence[str], form: str = "({letter}) {option}") -> str:
    """The options with their letters, one a line."""
    return "\n".join(
        form.format(letter=letter, option=option) for letter, option in zip(LETTERS, options, strict=False)
    )


def letter_of_text(where: str, options: Sequence[str], answer: str) -> str:
    """Letter of the first option that reads like the published answer; "" if none does, as scoring rules expect.

    Raises:
        RequestError: there are fewer than two options, or more than letters.
    """
    check_options(where, options)
    return LETTERS[options.index(answer)] if answer and answer in options else ""


def check_options(where: str, options: Sequence[str]) -> None:
    """Refuse what cannot be asked as a choice.

    Raises:
        RequestError: there are fewer than two options, or more than letters.
    """
    if not 2 <= len(options) <= len(LETTERS):
        raise RequestError(f"{where} has {len(options)} options; a choice needs 2 to {len(LETTERS)}")


def first_letter(reply: str, patterns: Iterable[re.Pattern[str]], letters: str) -> str:
    """The letter that the first matching pattern captures, among the letters of the options; "" if none does.

    Args:
        reply: of the model.
        patterns: tried in turn over the whole reply; their first group is a letter. A match on a letter that is no
            option is passed over.
        letters: of the options.
    """
    for pattern in patterns:
        for match in pattern.finditer(reply):
            if match[1].upper() in letters:
                return match[1].upper()
    return ""


def parsed_letter(letter: str, fallback: str = "") -> Parsed:
    """What `first_letter` gave, or the fallback where it gave nothing."""
    return Parsed(answer=letter or fallback, is_matched=bool(letter))


def guess(question: Question, seed: int) -> str:
    """A letter at random, for rules that guess; a function of seed and question id alone."""
    letters = letters_of(question.options)
    return letters[zlib.crc32(f"{seed}:{question.id}".encode()) % len(letters)]


def letter_of_value(reply: str, options: Sequence[str]) -> str:
    """The letter of the one option whose text stands in the reply, not inside a longer word or number."""
    said = _plain(reply)
    texts = [_plain(option) for option in options]
    found = [text for text in texts if text and re.search(rf"(?<![\w.-]){re.escape(text)}(?!\w|\.\d)", said)]
    longest = [text for text in found if not any(text != other and text in other for other in found)]
    return LETTERS[texts.index(longest[0])] if len(longest) == 1 else ""


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".")


def letter_of_words(reply: str, options: Sequence[str]) -> str:
    """The letter of the option that a reply in words means: by its text, else by the number nearest to the reply's.

    Nearest is meant where every option holds one positive number: 0.9 m is nearer to 1 m than to 0.7 m, by their ratio.
    """
    if letter := letter_of_value(reply, options):
        return letter
    said, numbers = NUMBER.search(reply), [NUMBER.findall(option) for option in options]
    if said is None or any(len(found) != 1 or float(found[0]) <= 0 for found in numbers) or float(said[0]) <= 0:
        return ""
    ratios = [abs(math.log(float(found[0]) / float(said[0]))) for found in numbers]
    return LETTERS[ratios.index(min(ratios))]


def mean_relative_accuracy(predicted: float, truth: float) -> float:
    """Share of the confidences 0.5, 0.55, ... 0.95 at which the relative error is at most 1 - confidence.

    Args:
        predicted: NaN scores 0.
        truth: above 0.
    """
    return float(np.mean(abs(predicted - truth) / truth <= 1 - _CONFIDENCES))


def averages(scored: Sequence[Scored], columns: Mapping[str, Callable[[Question], bool]]) -> dict[str, float]:
    """Micro averages in percent, of those columns that have questions.

    Args:
        scored: all questions.
        columns: name to which questions count in it.
    """
    groups = {name: [each for each in scored if belongs(each.question)] for name, belongs in columns.items()}
    return {name: mean_percent(group) for name, group in groups.items() if group}


def by_category(names: Iterable[str]) -> dict[str, Callable[[Question], bool]]:
    """A column for each category."""
    return {name: partial(_is_of_category, name) for name in names}


def by_tag(tag: str, names: Iterable[str]) -> dict[str, Callable[[Question], bool]]:
    """A column for each value of a tag."""
    return {name: partial(_is_tagged, tag, name) for name in names}


def _is_of_category(name: str, question: Question) -> bool:
    return question.category == name


def _is_tagged(tag: str, name: str, question: Question) -> bool:
    return question.tags[tag] == name


def category_of(where: str, task: object, known: Mapping[str, str]) -> str:
    """The category of a published task's name, whatever its case.

    Raises:
        RequestError: it is none of those known.
    """
    named = {name.casefold(): category for name, category in known.items()}
    found = named.get(text_of(task).strip().casefold())
    if found is None:
        raise RequestError(f"{where} has the task {task!r}; known are {', '.join(known)}")
    return found


def unique_ids(questions: Iterable[Question]) -> tuple[Question, ...]:
    """The same questions in their order; an id that came before gets `#2`, `#3`: results are joined by id."""
    seen: Counter[str] = Counter()
    unique = []
    for question in questions:
        seen[question.id] += 1
        number = seen[question.id]
        unique.append(question if number == 1 else replace(question, id=f"{question.id}#{number}"))
    return tuple(unique)
