"""What to process: videos found in files, folders, globs, buckets and manifests; stable clip ids; sampling plans.

A corpus is an arrow table with the columns `CORPUS_COLUMNS`, and any other column of its manifest, one row per clip.
Everything here works on whole columns, so that a million rows are planned in seconds.
"""

import contextlib
import glob
import io
import json
import math
import os
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from p4dprep._http import open_http
from p4dprep.errors import RequestError, StorageError
from p4dprep.storage import open_filesystem, redact, retry
from p4dprep.targets import FrameGeometry

# Arrow's own pool keeps what is freed; with the system's, planning a million clips takes a quarter less memory.
pa.set_memory_pool(pa.system_memory_pool())

CORPUS_COLUMNS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("start_seconds", pa.float64()),
        pa.field("end_seconds", pa.float64()),
        pa.field("size_bytes", pa.int64()),
    ]
)
"""Columns of every corpus. Times are on the file's own clock; null means from the first or to the last frame."""

VIDEO_SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".3gp", ".3g2", ".mkv", ".webm", ".avi", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg", ".vob",
    ".flv", ".ogv", ".ogg", ".wmv", ".asf",
)  # fmt: skip
"""What a folder is searched for, in any case; a file that is named itself may have any suffix."""

MANIFEST_SUFFIXES = (".parquet", ".csv", ".jsonl")
MAX_ID_CHARS = 1024

_LOCAL_PROTOCOLS = ("file", "local")
_MANIFEST_PROTOCOLS = (*_LOCAL_PROTOCOLS, "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "hf")
_HTTP = ("http://", "https://")
_PROTOCOL = r"^(?P<protocol>[A-Za-z][A-Za-z0-9+.\-]*)://"
_MAGIC = re.compile(r"[*?\[]")

TimeSpan = tuple[float, float]
"""When a video's first frame is shown and its last one ends, in seconds on the file's own clock."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Which frames of a clip a teacher sees, and how large; part of a cache's identity.

    Attributes:
        plan: `uniform` spreads the frames over the clip (the paper's); `windows` cuts it into clips of frames at `fps`.
        num_frames: frames per clip; raising it costs the teacher in proportion.
        fps: windows only, sampled frames per second.
        stride_frames: windows only, sampled frames between the starts of two windows; under `num_frames` they overlap.
        height, width: size of the frames, in pixels.
        resize: `squash` to the size whatever the shape (as L4P does), or `pad` to it with black.
    """

    plan: Literal["uniform", "windows"] = "uniform"
    num_frames: int = 16
    fps: float | None = None
    stride_frames: int | None = None
    height: int = 224
    width: int = 224
    resize: Literal["squash", "pad"] = "squash"

    def __post_init__(self) -> None:
        self.geometry()
        if self.plan not in ("uniform", "windows"):
            raise RequestError(f"plan is {self.plan!r}; it must be uniform or windows")
        if self.resize not in ("squash", "pad"):
            raise RequestError(f"resize is {self.resize!r}; it must be squash or pad")
        if max(self.height, self.width) > 8192 or self.num_frames > 4096:
            raise RequestError(f"{self.num_frames} frames of {self.height}x{self.width} are over 4096 of 8192x8192")
        if self.plan == "uniform" and (self.fps is not None or self.stride_frames is not None):
            raise RequestError("fps and stride_frames belong to plan windows; plan uniform takes neither")
        if self.plan == "windows" and (self.fps is None or self.stride_frames is None):
            raise RequestError("plan windows needs fps and stride_frames")
        if self.fps is not None and not 0 < self.fps <= 1000:
            raise RequestError(f"fps is {self.fps}; it must be above 0 and at most 1000")
        if self.stride_frames is not None and self.stride_frames < 1:
            raise RequestError(f"stride_frames is {self.stride_frames}; it must be at least 1")

    def geometry(self) -> FrameGeometry:
        """The frames a teacher gets.

        Raises:
            RequestError: a size is under 1.
        """
        return FrameGeometry(num_frames=self.num_frames, height=self.height, width=self.width, resize=self.resize)

    def to_attributes(self) -> dict[str, str | int | float | None]:
        """Flat fields, for a cache's attributes and fingerprint."""
        return asdict(self)

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, Any]) -> Self:
        """The sampling whose `to_attributes` these are.

        Raises:
            RequestError: a field is missing or unknown, or its value is refused.
        """
        names = {field.name for field in fields(cls)}
        if set(attributes) != names:
            raise RequestError(f"sampling has fields {sorted(attributes)}; it must have {sorted(names)}")
        return cls(**attributes)


def discover(source: str, *, storage_options: Mapping[str, Any] | None = None, allow_http: bool = False) -> pa.Table:
    """The corpus that a source names, sorted by id, or in a manifest's own order.

    Args:
        source: a file, a folder (searched recursively for `VIDEO_SUFFIXES`), a glob, a manifest (`.parquet`, `.csv`,
            `.jsonl`), or any fsspec URL of those.
        storage_options: passed to fsspec; held in memory only.
        allow_http: let http(s) addresses in, of the source and in a manifest.

    Raises:
        RequestError: nothing there, no video in it, a duplicate or malformed id, or a manifest row that breaks a rule;
            the message names the row and the rule.
        StorageError: the bucket failed after the retries.
    """
    is_http = source.lower().startswith(_HTTP)
    if is_http and not allow_http:
        raise RequestError(f"{redact(source)} is plain HTTP(S); pass --allow-http to read videos from the web")
    if "::" in source and not os.path.lexists(source):
        raise RequestError(f"{redact(source)} chains protocols with ::, which is refused; name one place")
    if source.split("?")[0].lower().endswith(MANIFEST_SUFFIXES):
        return _read_manifest(source, storage_options, allow_http)
    if is_http:
        name = posixpath.basename(source.split("?")[0].rstrip("/"))
        return _validated(_table([(name, source, None)]), redact(source), 1)
    listed = _list_local(source) if _is_local(source) else _list_remote(source, storage_options)
    if not listed:
        raise RequestError(f"{redact(source)} holds no video ({' '.join(VIDEO_SUFFIXES)})")
    return _validated(_table(sorted(listed)), redact(source), 1)


def _is_local(source: str) -> bool:
    match = re.match(_PROTOCOL, source)
    return match is None or match["protocol"] in _LOCAL_PROTOCOLS


def _local_path(source: str) -> str:
    return os.path.abspath(os.path.expanduser(source.removeprefix("file://").removeprefix("local://")))


def _is_video(name: str) -> bool:
    return name.lower().endswith(VIDEO_SUFFIXES)


Listed = tuple[str, str, int | None]
"""Id, uri and size in bytes of one file found."""


def _table(listed: Sequence[Listed]) -> pa.Table:
    ids, uris, sizes = zip(*listed, strict=True)
    try:
        columns = {"id": pa.array(ids, pa.string()), "uri": pa.array(uris, pa.string())}
    except UnicodeEncodeError as error:
        raise RequestError(f"file name {error.object!r} is not valid UTF-8; rename the file") from None
    nulls = pa.nulls(len(ids), pa.float64())
    columns |= {"start_seconds": nulls, "end_seconds": nulls, "size_bytes": pa.array(sizes, pa.int64())}
    return pa.table(columns, schema=CORPUS_COLUMNS)


def _list_local(source: str) -> list[Listed]:
    path = _local_path(source)
    if os.path.isdir(path):
        return list(_walk(path, path))
    if os.path.lexists(path):
        return [(os.path.basename(path), path, _local_size(path))]
    if not _MAGIC.search(path):
        raise RequestError(f"{source} does not exist")
    root = _fixed_part(path)
    found = (name for name in glob.iglob(path, recursive=True) if _is_video(name) and not os.path.isdir(name))
    return [(os.path.relpath(name, root), name, _local_size(name)) for name in found]


def _local_size(path: str) -> int | None:
    """Bytes, or None for a broken link or what is not a file: that is found out, and named, when it is read."""
    return os.path.getsize(path) if os.path.isfile(path) else None


def _walk(folder: str, root: str) -> Iterator[Listed]:
    """Everything below a folder that is named like a video, whatever it is: a bad one fails later, by name.

    Links to folders are not followed, so that no loop is.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False) and not _is_video(entry.name):
                yield from _walk(entry.path, root)
            elif entry.is_dir(follow_symlinks=False):
                yield os.path.relpath(entry.path, root), entry.path, None
            elif _is_video(entry.name):
                yield os.path.relpath(entry.path, root), entry.path, _local_size(entry.path)


def _fixed_part(pattern: str) -> str:
    """The folder above the first part of a pattern that has magic in it."""
    match = _MAGIC.search(pattern)
    return pattern if match is None else posixpath.dirname(pattern[: match.start()] + "x")


def _list_remote(source: str, storage_options: Mapping[str, Any] | None) -> list[Listed]:
    filesystem, root = open_filesystem(source, storage_options)
    what = f"list {redact(source)}"
    is_file = not _MAGIC.search(root) and retry(lambda: filesystem.isfile(root), what)
    if is_file:
        found = {root: retry(lambda: filesystem.info(root), what)}
        root = posixpath.dirname(root)
    elif _MAGIC.search(root):
        found = retry(lambda: filesystem.glob(root, detail=True), what)
        root = _fixed_part(root)
    else:
        try:
            found = retry(lambda: filesystem.find(root, detail=True), what)
        except FileNotFoundError:
            found = {}
    prefix = root.rstrip("/") + "/"
    return [
        (path.removeprefix(prefix), str(filesystem.unstrip_protocol(path)), info.get("size"))
        for path, info in found.items()
        if is_file or (_is_video(path) and info.get("type") != "directory")
    ]


def _read_manifest(source: str, storage_options: Mapping[str, Any] | None, allow_http: bool) -> pa.Table:
    where = redact(source)
    suffix = os.path.splitext(source.split("?")[0])[1].lower()
    first_line = {".csv": 2, ".jsonl": 1, ".parquet": 1}[suffix]
    try:
        if _is_local(source):
            table = _parse(_local_path(source), suffix)
        elif source.lower().startswith(_HTTP):
            with open_http(source) as response:
                table = _parse(pa.BufferReader(response.read()), suffix)
        else:
            filesystem, path = open_filesystem(source, storage_options)
            data = retry(lambda: cast(bytes, filesystem.cat_file(path)), f"read {where}")
            table = _parse(pa.BufferReader(data), suffix)
    except FileNotFoundError:
        raise RequestError(f"manifest {where} does not exist") from None
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowKeyError, pa.ArrowNotImplementedError, OSError) as error:
        raise RequestError(f"manifest {where} cannot be read: {error}") from None
    table = _normalised(table, where)
    table = _resolved(table, source, allow_http, first_line)
    pa.default_memory_pool().release_unused()
    return _validated(table, where, first_line)


def _parse(source: Any, suffix: str) -> pa.Table:
    """The manifest as it is; block by block, which takes two thirds of the memory of a reading at once."""
    read = {".parquet": _parse_parquet, ".csv": _parse_csv, ".jsonl": _parse_jsonl}[suffix]
    try:
        table = read(source, True)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        # A stream fixes the types of further columns by its first block; a whole reading looks at all of them.
        if isinstance(source, pa.BufferReader):
            source.seek(0)
        table = read(source, False)
    pa.default_memory_pool().release_unused()
    return table


def _parse_parquet(source: Any, _: bool) -> pa.Table:
    with pa.parquet.ParquetFile(source) as file:
        return pa.Table.from_batches(file.iter_batches(), file.schema_arrow)


def _parse_csv(source: Any, is_stream: bool) -> pa.Table:
    convert = pa.csv.ConvertOptions(column_types=CORPUS_COLUMNS, strings_can_be_null=False)
    if not is_stream:
        return pa.csv.read_csv(source, convert_options=convert)
    with pa.csv.open_csv(source, convert_options=convert) as reader:
        return reader.read_all()


def _parse_jsonl(source: Any, is_stream: bool) -> pa.Table:
    # Not nullable=False: a missing value is to be named by its line.
    schema = pa.schema([(field.name, field.type) for field in CORPUS_COLUMNS])
    parse = pa.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="infer")
    if not is_stream:
        return pa.json.read_json(source, parse_options=parse)
    with pa.json.open_json(source, parse_options=parse) as reader:
        return reader.read_all()


def _normalised(table: pa.Table, where: str) -> pa.Table:
    """The manifest with all of `CORPUS_COLUMNS`, of their types, in front; without an id column the uri is the id."""
    if "uri" not in table.column_names:
        raise RequestError(f"manifest {where} has columns {table.column_names}; it must have uri, and id if it can")
    if len(set(table.column_names)) != len(table.column_names):
        raise RequestError(f"manifest {where} has a column twice: {table.column_names}")
    if not table.num_rows:
        raise RequestError(f"manifest {where} has no rows")
    columns = {name: table.column(name) for name in table.column_names}
    # An explicit JSON schema makes the id column even where no line has one.
    if "id" not in columns or columns["id"].null_count == table.num_rows:
        columns["id"] = columns["uri"]
    wanted = {}
    for field in CORPUS_COLUMNS:
        column = columns.pop(field.name, None)
        try:
            wanted[field.name] = pa.nulls(table.num_rows, field.type) if column is None else column.cast(field.type)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise RequestError(f"manifest {where}: column {field.name} is not {field.type}: {error}") from None
    return pa.table(wanted | columns)


def _resolved(table: pa.Table, source: str, allow_http: bool, first_line: int) -> pa.Table:
    """The manifest with whole uris; rows whose uri breaks a rule are refused."""
    where, uris = redact(source), table.column("uri")
    is_local = _is_local(source)
    allowed = _MANIFEST_PROTOCOLS + (("http", "https") if allow_http else ())
    if pc.any(pc.match_substring(uris, "://")).as_py():
        protocol = pc.struct_field(pc.extract_regex(uris, _PROTOCOL), "protocol")
    else:
        protocol = pa.nulls(len(uris), pa.string())
    has_protocol = pc.is_valid(protocol)
    is_web = pc.is_in(protocol, pa.array(["http", "https"]))
    is_path = pc.or_(pc.starts_with(uris, "/"), pc.is_in(protocol, pa.array(_LOCAL_PROTOCOLS)))
    rules = [
        (pc.is_null(uris), "uri is missing"),
        (pc.equal(uris, ""), "uri is empty"),
        (pc.match_substring_regex(uris, r"\p{Cc}"), "uri holds control characters"),
        (pc.match_substring(uris, "::"), "uri chains protocols with ::, which is refused"),
        (pc.match_substring_regex(uris, r"^[^/]*://[^/]*@"), "uri holds credentials; pass them as storage options"),
        (pc.and_(is_web, not allow_http), "uri is plain HTTP(S); pass --allow-http to allow that"),
        (
            pc.and_(has_protocol, pc.invert(pc.is_in(protocol, pa.array(allowed)))),
            f"uri has a protocol other than {', '.join(allowed)}",
        ),
    ]
    if not is_local:
        rules.append((is_path, "uri names a file of this machine, which a manifest from elsewhere may not"))
        rules.append((pc.match_substring_regex(uris, r"(^|/)\.\.(/|$)"), "uri climbs with .., which is refused"))
    _refuse(table, rules, where, first_line)
    base = posixpath.dirname(_local_path(source) if is_local else source.split("?")[0])
    relative = pc.and_(pc.invert(has_protocol), pc.invert(pc.starts_with(uris, "/")))
    if pc.any(relative).as_py():
        base = pc.if_else(relative, base.rstrip("/") + "/", "")
        uris = pc.binary_join_element_wise(base, uris, "")
    return table.set_column(1, CORPUS_COLUMNS.field("uri"), uris)


def _refuse(table: pa.Table, rules: Sequence[tuple[Any, str]], where: str, first_line: int) -> None:
    """Raise for the first row that breaks one of the rules; null counts as keeping it."""
    for broken, rule in rules:
        if pc.any(broken).as_py():
            row = pc.index(pc.fill_null(broken, False), True).as_py()
            row_id = str(table.column("id")[row].as_py())[:100]
            raise RequestError(f"{where}, line {row + first_line} (id {row_id!r}): {rule}")


def _validated(table: pa.Table, where: str, first_line: int) -> pa.Table:
    """The corpus itself, if ids and ranges keep the rules."""
    try:
        for name in ("id", "uri"):
            table.column(name).validate(full=True)
    except pa.ArrowInvalid as error:
        raise RequestError(f"{where}: {name} is not valid UTF-8: {error}") from None
    ids, start, end = (table.column(name) for name in ("id", "start_seconds", "end_seconds"))
    _refuse(
        table,
        [
            (pc.is_null(ids), "id is missing"),
            (pc.equal(ids, ""), "id is empty"),
            (pc.greater(pc.utf8_length(ids), MAX_ID_CHARS), f"id has more than {MAX_ID_CHARS} characters"),
            (pc.match_substring_regex(ids, r"\p{Cc}"), "id holds control characters"),
            (pc.invert(pc.is_finite(start)), "start_seconds is not finite"),
            (pc.invert(pc.is_finite(end)), "end_seconds is not finite"),
            (pc.less(start, 0.0), "start_seconds is negative"),
            (pc.less_equal(end, 0.0), "end_seconds is not above 0"),
            (pc.greater_equal(start, end), "start_seconds is not before end_seconds"),
            (pc.less(table.column("size_bytes"), 0), "size_bytes is negative"),
        ],
        where,
        first_line,
    )
    _refuse_duplicates(ids, where, first_line)
    return table


def _refuse_duplicates(ids: pa.ChunkedArray, where: str, first_line: int) -> None:
    # Sorted 64-bit hashes take 8 bytes an id, a hash table of the ids themselves more than 60.
    hashes = np.fromiter((hash(text.as_py()) for text in ids), np.int64, len(ids))
    hashes.sort()
    if not (hashes[1:] == hashes[:-1]).any() or pc.count_distinct(ids).as_py() == len(ids):
        return
    counts = pc.value_counts(ids)
    twice = counts.field("values").filter(pc.greater(counts.field("counts"), 1))[0]
    rows = np.flatnonzero(pc.equal(ids, twice).to_numpy(zero_copy_only=False))[:2] + first_line
    raise RequestError(
        f"{where}: id {twice.as_py()!r} is not unique (lines {rows[0]} and {rows[1]}); give every clip its own id"
    )


def write_manifest(table: pa.Table, url: str, storage_options: Mapping[str, Any] | None = None) -> None:
    """Write a corpus as a manifest that `discover` reads back; the format follows the suffix.

    Raises:
        RequestError: the suffix is none of `MANIFEST_SUFFIXES`.
        StorageError: the store failed.
    """
    suffix = os.path.splitext(url)[1].lower()
    if suffix not in MANIFEST_SUFFIXES:
        raise RequestError(f"{redact(url)} must end in one of {', '.join(MANIFEST_SUFFIXES)}")
    sink = io.BytesIO()
    if suffix == ".parquet":
        pa.parquet.write_table(table, sink)
    elif suffix == ".csv":
        pa.csv.write_csv(table, sink)
    else:
        for batch in table.to_batches(max_chunksize=10_000):
            sink.writelines(f"{json.dumps(row, ensure_ascii=False)}\n".encode() for row in batch.to_pylist())
    data = sink.getvalue()
    if _is_local(url):
        _write_local(_local_path(url), data)
    else:
        filesystem, path = open_filesystem(url, storage_options)
        retry(lambda: filesystem.pipe_file(path, data), f"write {redact(url)}")


def _write_local(path: str, data: bytes) -> None:
    partial = f"{path}.{os.getpid()}.partial"
    try:
        with open(partial, "wb") as file:
            file.write(data)
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
        raise StorageError(error.errno, f"write {path}: {error.strerror}") from None


def expand_windows(
    table: pa.Table, sampling: Sampling, spans: Callable[[Sequence[str]], Sequence[TimeSpan | None]]
) -> pa.Table:
    """One row per window of `num_frames` at `fps`, every `stride_frames`, as many as fit whole into each clip.

    Windows are half-open, [start, start + num_frames / fps), and named `<id>#<start>-<end>` in milliseconds' precision.
    A clip whose span is unknown, or that is shorter than one window, keeps its own row, so that its failure is recorded
    when it is read.

    Args:
        table: a corpus.
        sampling: its plan must be `windows`.
        spans: time spans of videos by uri, None where one cannot be had (`Decoder.time_span`); asked only for rows
            without `end_seconds`, once per uri, in one call.

    Raises:
        RequestError: the plan is not `windows`, or window ids are not unique.
    """
    if sampling.plan != "windows" or sampling.fps is None or sampling.stride_frames is None:
        raise RequestError(f"plan {sampling.plan} has no windows")
    start, end = _filled_ranges(table, spans)
    stride_seconds = sampling.stride_frames / sampling.fps
    # The last frame of a window must be on display before the end; 1e-6 s forgives the rounding of sums.
    slack = end - start - (sampling.num_frames - 1) / sampling.fps - 1e-6
    num_windows = np.where(slack > 0, np.ceil(slack / stride_seconds), 0)
    num_windows = np.nan_to_num(num_windows, nan=0.0).astype(np.int64)
    num_rows = np.maximum(num_windows, 1)
    rows = np.repeat(np.arange(table.num_rows), num_rows)
    position = np.arange(len(rows)) - np.repeat(np.cumsum(num_rows) - num_rows, num_rows)
    is_window = num_windows[rows] > 0
    window_start = start[rows] + position * stride_seconds
    window_end = window_start + sampling.num_frames / sampling.fps
    return _validated(_window_table(table.take(pa.array(rows)), is_window, window_start, window_end), "windows", 1)


def _filled_ranges(
    table: pa.Table, spans: Callable[[Sequence[str]], Sequence[TimeSpan | None]]
) -> tuple[np.ndarray[Any, np.dtype[np.float64]], np.ndarray[Any, np.dtype[np.float64]]]:
    """Start and end of every row in seconds, NaN where unknown."""
    given_start, given_end, uris = (table.column(name) for name in ("start_seconds", "end_seconds", "uri"))
    start = np.array(pc.fill_null(given_start, 0.0).to_numpy())
    end = np.array(pc.fill_null(given_end, math.nan).to_numpy())
    is_open = given_end.is_null()
    asked = pc.unique(uris.filter(is_open)).to_pylist()
    if not asked:
        return start, end
    known = dict(zip(asked, spans(asked), strict=True))
    has_start = given_start.is_valid().to_numpy()
    for row in np.flatnonzero(is_open.to_numpy()):
        span = known[uris[int(row)].as_py()]
        if span is not None:
            start[row] = max(start[row], span[0]) if has_start[row] else span[0]
            end[row] = span[1]
    return start, end


def _window_table(
    table: pa.Table,
    is_window: np.ndarray[Any, np.dtype[np.bool_]],
    start: np.ndarray[Any, np.dtype[np.float64]],
    end: np.ndarray[Any, np.dtype[np.float64]],
) -> pa.Table:
    mask, ids = pa.array(is_window), table.column("id")
    window_ids = pc.binary_join_element_wise(ids, pc.binary_join_element_wise(_text(start), _text(end), "-"), "#")
    changed = {
        "id": pc.if_else(mask, window_ids, ids),
        "start_seconds": pc.if_else(mask, pa.array(start), table.column("start_seconds")),
        "end_seconds": pc.if_else(mask, pa.array(end), table.column("end_seconds")),
    }
    for name, column in changed.items():
        index = table.column_names.index(name)
        table = table.set_column(index, CORPUS_COLUMNS.field(name), column)
    return table


def _text(seconds: np.ndarray[Any, np.dtype[np.float64]]) -> pa.Array:
    """Seconds with three decimals, as text."""
    milliseconds = np.nan_to_num(np.round(seconds * 1000)).astype(np.int64)
    whole = pa.array(milliseconds // 1000).cast(pa.string())
    fraction = pc.utf8_lpad(pa.array(milliseconds % 1000).cast(pa.string()), 3, "0")
    return pc.binary_join_element_wise(whole, fraction, ".")
