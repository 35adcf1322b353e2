"""Conversations for training: LLaVA JSON as VSTI, RoboFAC and our worlds write it, and SAT converted to it.

docs/training-data.md describes the formats. A file passes through record by record into arrow columns, so that memory
grows with the text itself and not with Python's objects around it.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TextIO, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from p4dprep.errors import RequestError, StorageError
from student.samples import Role, Turn

OnProblem = Literal["stop", "leave out"]
Box = tuple[float, float, float, float]
"""Left, top, right and bottom of a region in the first frame, as fractions of its width and height."""

ERRATUM = "erratum_dropped_items.json"
"""Beside VSTI's files: ids of records that its authors withdrew."""

_ROLES: Mapping[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
_MEDIA_TOKEN = re.compile(r" ?<(?:image|video)>\n?")
_CHUNK_CHARS = 2**20
_MAX_RECORD_CHARS = 2**24
_BATCH_RECORDS = 4096
_GOES_ON = frozenset(["", *"0123456789.eE+-"])
_MAX_EXAMPLES = 5
_SAT_COLUMNS = ["image_bytes", "question", "answers", "correct_answer"]
_SAT_ROWS_AT_ONCE = 64
"""Each may hold several images of some 100 KB."""
_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("video", pa.string()),
        ("clip", pa.string()),
        ("images", pa.list_(pa.string())),
        ("texts", pa.list_(pa.string())),
        ("regions", pa.list_(pa.float64())),
    ]
)


@dataclass(kw_only=True)
class Report:
    """What was left out and why; or, as asked, the first such thing stops the run.

    Attributes:
        on_problem: what a broken record, a clip without its targets or with other frame times, or media that cannot be
            read do: `stop` the run, or be counted and left out (`leave out`).
        num_used: conversations, or clips without text, that are trained on.
        counts: reason to how many were left out for it.
        examples: reason to a few messages.
    """

    on_problem: OnProblem = "stop"
    num_used: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.on_problem not in get_args(OnProblem):
            raise RequestError(f"on_problem is {self.on_problem!r}; it must be one of {get_args(OnProblem)}")

    def leave_out(self, reason: str, message: str) -> None:
        """Count one thing as left out.

        Raises:
            RequestError: problems are to stop the run.
        """
        if self.on_problem == "stop":
            raise RequestError(f"{message}; mend it, or ask for such samples to be left out")
        self.counts[reason] += 1
        shown = self.examples.setdefault(reason, [])
        if len(shown) < _MAX_EXAMPLES:
            shown.append(message)

    def __str__(self) -> str:
        total = self.counts.total()
        lines = [f"{self.num_used} samples" + (f", {total} left out:" if total else "")]
        for reason, count in self.counts.most_common():
            lines.append(f"  {count} {reason}, such as: {self.examples[reason][0]}")
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """One record.

    Attributes:
        id: as given, or the file's name and the record's number.
        turns: user and assistant in turn, without media tokens; the assistant speaks last.
        video: path under the media folder; None for still images.
        images: paths under the media folder; empty for a video.
        clip: id of a cached clip, for videos that are cut into several.
        regions: boxes in the first frame, `<obj_1>` first.
    """

    id: str
    turns: tuple[Turn, ...]
    video: str | None = None
    images: tuple[str, ...] = ()
    clip: str | None = None
    regions: tuple[Box, ...] = ()


class Conversations:
    """Many conversations in arrow columns; a record becomes objects when it is asked for.

    Attributes:
        table: columns id, video, clip, images, texts and regions.
    """

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitem__(self, row: int) -> Conversation:
        record = {name: self.table.column(name)[row].as_py() for name in _SCHEMA.names}
        roles: itertools.cycle[Role] = itertools.cycle(("user", "assistant"))
        corners = iter(record["regions"])
        return Conversation(
            id=record["id"],
            turns=tuple(Turn(role=role, text=text) for role, text in zip(roles, record["texts"], strict=False)),
            video=record["video"],
            images=tuple(record["images"]),
            clip=record["clip"],
            regions=tuple(zip(corners, corners, corners, corners, strict=True)),
        )


def read_conversations(paths: Sequence[str | os.PathLike[str]], report: Report) -> Conversations:
    """Every conversation of some JSON files, in order.

    Args:
        paths: LLaVA JSON files, or folders of them (VSTI's). An erratum beside a file is obeyed, and is no file of
            records itself.
        report: takes the records that the erratum drops, and those that break a rule.

    Raises:
        RequestError: a file cannot be read as JSON, none holds a record, or a record breaks a rule and problems stop
            the run; the message names file and record.
    """
    columns: dict[str, list[Any]] = {name: [] for name in _SCHEMA.names}
    batches: list[pa.RecordBatch] = []
    for path in _files(paths):
        for record in _read_file(path, report):
            for name, value in record.items():
                columns[name].append(value)
            if len(columns["id"]) == _BATCH_RECORDS:
                batches.append(pa.record_batch(columns, schema=_SCHEMA))
                columns = {name: [] for name in _SCHEMA.names}
    batches.append(pa.record_batch(columns, schema=_SCHEMA))
    table = pa.Table.from_batches(batches, _SCHEMA)
    pa.default_memory_pool().release_unused()
    if not table.num_rows:
        raise RequestError(f"{', '.join(map(str, paths))}: no conversation to train on; {report}")
    return Conversations(table)


def _files(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    found: list[Path] = []
    for path in map(Path, paths):
        inside = sorted(path.glob("*.json")) if path.is_dir() else [path]
        if not inside:
            raise RequestError(f"{path} holds no .json file")
        found += [file for file in inside if file.name != ERRATUM]
    for file in found:
        if file.suffix == ".parquet":
            raise RequestError(f"{file} is parquet, which SAT comes as; convert it first (docs/training-data.md)")
    return found


def _read_file(path: Path, report: Report) -> Iterator[dict[str, Any]]:
    dropped = _erratum(path.parent / ERRATUM)
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, record in enumerate(iterate_array(file, str(path)), start=1):
                where = f"{path}, record {number}"
                if isinstance(record, dict) and str(record.get("id")) in dropped:
                    report.counts["withdrawn by the erratum"] += 1
                    report.examples.setdefault("withdrawn by the erratum", [where])
                    continue
                try:
                    yield _columns(record, f"{path.stem}-{number}")
                except _BrokenRecordError as error:
                    report.leave_out("broken record", f"{where}: {error}")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8"
        raise RequestError(f"{path} cannot be read: {reason}") from None


def _erratum(path: Path) -> frozenset[str]:
    try:
        ids = json.loads(path.read_bytes())
    except FileNotFoundError:
        return frozenset()
    except (OSError, ValueError) as error:
        raise RequestError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(ids, list) or not all(isinstance(item, str | int) for item in ids):
        raise RequestError(f"{path} must be a list of ids to drop")
    return frozenset(map(str, ids))


class _BrokenRecordError(ValueError):
    """A record breaks a rule; the message says which."""


def _columns(record: object, default_id: str) -> dict[str, Any]:
    """One record as the columns of `_SCHEMA`."""
    if not isinstance(record, dict):
        raise _BrokenRecordError(f"is a {type(record).__name__}, not an object")
    videos, images = _media(record, "video", "videos"), _media(record, "image", "images")
    if bool(videos) == bool(images):
        raise _BrokenRecordError("needs either a video or images")
    if len(videos) > 1:
        raise _BrokenRecordError(f"has {len(videos)} videos; one is supported")
    clip = record.get("clip")
    if clip is not None and not isinstance(clip, str):
        raise _BrokenRecordError(f"clip is {clip!r}; it must be a clip's id")
    given = record.get("id")
    return {
        "id": default_id if given is None else str(given),
        "video": videos[0] if videos else None,
        "clip": clip,
        "images": images,
        "texts": _texts(record.get("conversations")),
        "regions": _regions(record.get("regions")),
    }


def _media(record: Mapping[str, Any], *names: str) -> list[str]:
    found: list[str] = []
    for name in names:
        value = record.get(name) or []
        found += value if isinstance(value, list) else [value]
    for path in found:
        if not isinstance(path, str):
            raise _BrokenRecordError(f"names a {type(path).__name__} as media; a path is needed")
        check_media_path(path)
    return found


def check_media_path(path: str) -> None:
    """Refuse what is no path under a media folder, whatever lies there.

    Raises:
        ValueError: it is absolute, a URL, climbs with `..`, or holds control characters.
    """
    parts = PurePosixPath(path).parts
    if not parts or path.startswith(("/", "~")) or "\\" in path or "://" in path or ".." in parts:
        raise _BrokenRecordError(f"media path {path[:200]!r} must stay under the media folder: relative, without ..")
    if any(ord(character) < 32 for character in path):
        raise _BrokenRecordError(f"media path {path[:200]!r} holds control characters")


def _texts(turns: object) -> list[str]:
    if not isinstance(turns, list) or not turns:
        raise _BrokenRecordError("has no conversations")
    texts = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise _BrokenRecordError(f"turn {number} is not {{from, value}}")
        expected = ("user", "assistant")[number % 2]
        if _ROLES.get(str(turn.get("from"))) != expected:
            raise _BrokenRecordError(f"turn {number} is from {turn.get('from')!r}; it must be the {expected}'s")
        texts.append(_MEDIA_TOKEN.sub("", turn["value"]).strip())
        if expected == "assistant" and not texts[-1]:
            raise _BrokenRecordError(f"turn {number} is an empty answer")
    if len(texts) % 2:
        raise _BrokenRecordError("ends without an answer")
    return texts


def _regions(boxes: object) -> list[float]:
    corners: list[float] = []
    for box in boxes if isinstance(boxes, list) else [] if boxes is None else [boxes]:
        given = box if isinstance(box, list) else []
        numbers = [number for number in given if isinstance(number, int | float) and 0 <= number <= 1]
        if len(numbers) != 4 or len(given) != 4:
            raise _BrokenRecordError(f"region {box!r} is not [left, top, right, bottom] in fractions from 0 to 1")
        if not (numbers[0] < numbers[2] and numbers[1] < numbers[3]):
            raise _BrokenRecordError(f"region {box!r} is empty")
        corners += numbers
    return corners


def iterate_array(file: TextIO, where: str) -> Iterator[Any]:
    """Elements of a JSON array one by one: a file of any size takes the memory of one element.

    Args:
        file: open for reading.
        where: its name, for messages.

    Raises:
        RequestError: it is no JSON array, or an element is damaged or of more than 16 Mi characters.
    """
    text = _Text(file)
    if text.skip_space() != "[":
        raise RequestError(f"{where} is not a JSON list of records")
    text.at += 1
    is_first = True
    for number in itertools.count(1):
        character = text.skip_space()
        if character == "]":
            return
        if not is_first:
            if character != ",":
                raise RequestError(f"{where}: no comma or ] after record {number - 1}; the file is damaged")
            text.at += 1
            text.skip_space()
        is_first = False
        try:
            yield text.element()
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{where}: record {number} is not JSON: {error}") from None


class _Text:
    """A file's text from where it was read to, as much of it as is needed."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._decoder = file, json.JSONDecoder()
        self._buffer, self.at = "", 0

    def skip_space(self) -> str:
        """Go to the next character that is no white space; empty at the end."""
        while True:
            while self.at < len(self._buffer) and self._buffer[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self._buffer):
                return self._buffer[self.at]
            if not self._fill():
                return ""

    def element(self) -> Any:
        """The JSON value that begins here, with the place moved behind it."""
        while True:
            can_grow = len(self._buffer) - self.at <= _MAX_RECORD_CHARS
            try:
                value, end = self._decoder.raw_decode(self._buffer, self.at)
            except json.JSONDecodeError:
                if not (can_grow and self._fill()):
                    raise
                continue
            # A number may go on in what was not read yet: 1 or 1. or 1.5e
            is_whole = self._buffer[end : end + 1] not in _GOES_ON
            if is_whole or not (can_grow and self._fill()):
                self.at = end
                return value

    def _fill(self) -> bool:
        chunk = self._file.read(_CHUNK_CHARS)
        self._buffer, self.at = self._buffer[self.at :] + chunk, 0
        return bool(chunk)


def convert_sat(source: str | os.PathLike[str], out: str | os.PathLike[str]) -> int:
    """SAT's parquet (`array/SAT`) as LLaVA JSON with image files: OUT/qa.json and OUT/images/.

    A question is asked once per rotation of its options, so that no position is right more often than another (the
    benchmark's circular orders). Rows pass through in small batches.

    Args:
        source: a parquet file with image_bytes, question, answers, correct_answer.
        out: an empty or new folder.

    Returns:
        Records written.

    Raises:
        RequestError: the file is no such parquet, a row breaks a rule, or the folder is not empty.
        StorageError: the disk refused.
    """
    folder = Path(out)
    if folder.exists() and any(folder.iterdir()):
        raise RequestError(f"{folder} is not empty; name a new folder")
    num_records = 0
    try:
        (folder / "images").mkdir(parents=True, exist_ok=True)
        with open(folder / "qa.json.partial", "w", encoding="utf-8") as qa:
            for number, row in enumerate(_sat_rows(source)):
                for record in _sat_records(row, number, folder):
                    qa.write(("[\n" if not num_records else ",\n") + json.dumps(record, ensure_ascii=False))
                    num_records += 1
            qa.write("\n]\n" if num_records else "[]\n")
        os.replace(folder / "qa.json.partial", folder / "qa.json")
    except OSError as error:
        raise StorageError(error.errno, f"write {folder}: {error.strerror}") from None
    return num_records


def _sat_rows(source: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    try:
        with pq.ParquetFile(source) as file:
            missing = set(_SAT_COLUMNS) - set(file.schema_arrow.names)
            if missing:
                raise RequestError(f"{source} is not SAT's parquet: it lacks {sorted(missing)}")
            for batch in file.iter_batches(_SAT_ROWS_AT_ONCE, columns=_SAT_COLUMNS):
                yield from batch.to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise RequestError(f"{source} cannot be read as parquet: {error}") from None


def _sat_records(row: Mapping[str, Any], number: int, folder: Path) -> Iterator[dict[str, Any]]:
    answers, correct = row["answers"], row["correct_answer"]
    if not answers or correct not in answers or not row["question"]:
        raise RequestError(f"SAT row {number}: correct answer {correct!r} is not among {answers}")
    images = [_write_image(image, number, folder) for image in row["image_bytes"] or ()]
    if not images:
        raise RequestError(f"SAT row {number} has no image")
    for turn in range(len(answers)):
        quoted = [f'"{answer}"' for answer in (*answers[turn:], *answers[:turn])]
        options = " or ".join(filter(None, (", ".join(quoted[:-1]), quoted[-1])))
        prompt = (
            f"Answer in natural language. {row['question']} Answer the question using a single word or phrase. "
            f"Choose between the following options: {options}."
        )
        turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": correct}]
        yield {"id": f"sat-{number}-{turn}", "image": images, "conversations": turns}


def _write_image(image: Any, number: int, folder: Path) -> str:
    """Keep an image's bytes as they are, once, under their digest."""
    data = image["bytes"] if isinstance(image, dict) else image
    suffix = ".png" if data[:4] == b"\x89PNG" else ".jpg" if data[:3] == b"\xff\xd8\xff" else None
    if suffix is None:
        raise RequestError(f"SAT row {number}: an image is neither PNG nor JPEG")
    name = f"images/{hashlib.sha256(data).hexdigest()[:32]}{suffix}"
    with contextlib.suppress(FileExistsError), open(folder / name, "xb") as file:
        file.write(data)
    return name
