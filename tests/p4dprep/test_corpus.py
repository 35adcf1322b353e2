import json
import os
import subprocess
import sys
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from p4dprep.corpus import CORPUS_COLUMNS, Sampling, discover, expand_windows, write_manifest
from p4dprep.errors import RequestError

WINDOWS = Sampling(plan="windows", num_frames=4, fps=2.0, stride_frames=2)


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"12345")


def jsonl(path: Path, *rows: dict[str, object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_folder_gives_its_videos_in_order_with_relative_ids(tmp_path: Path) -> None:
    touch(tmp_path / "b" / "two.MP4", tmp_path / "a.mkv", tmp_path / "notes.txt")
    table = discover(str(tmp_path))
    assert table.schema.equals(CORPUS_COLUMNS)
    assert table.column("id").to_pylist() == ["a.mkv", "b/two.MP4"]
    assert table.column("uri").to_pylist() == [str(tmp_path / "a.mkv"), str(tmp_path / "b" / "two.MP4")]
    assert table.column("size_bytes").to_pylist() == [5, 5]
    assert table.column("start_seconds").null_count == 2


def test_a_file_is_named_by_its_name_whatever_its_suffix(tmp_path: Path) -> None:
    touch(tmp_path / "clip.bin")
    assert discover(str(tmp_path / "clip.bin")).column("id").to_pylist() == ["clip.bin"]
    assert discover(f"file://{tmp_path}/clip.bin").column("id").to_pylist() == ["clip.bin"]


def test_a_glob_names_clips_from_its_fixed_folder(tmp_path: Path) -> None:
    touch(tmp_path / "x" / "1.mp4", tmp_path / "y" / "2.mp4", tmp_path / "y" / "2.txt")
    assert discover(f"{tmp_path}/*/*").column("id").to_pylist() == ["x/1.mp4", "y/2.mp4"]
    assert discover(f"{tmp_path}/**/2*").column("id").to_pylist() == ["y/2.mp4"]


def test_loops_of_links_pipes_and_folders_named_like_videos_do_not_stop_discovery(tmp_path: Path) -> None:
    touch(tmp_path / "good.mp4")
    (tmp_path / "again").symlink_to(tmp_path)
    (tmp_path / "loop.mp4").symlink_to(tmp_path / "loop.mp4")
    (tmp_path / "folder.mp4").mkdir()
    os.mkfifo(tmp_path / "pipe.mp4")
    table = discover(str(tmp_path))
    assert table.column("id").to_pylist() == ["folder.mp4", "good.mp4", "loop.mp4", "pipe.mp4"]
    assert table.column("size_bytes").to_pylist() == [None, 5, None, None]


def test_buckets_files_globs_and_manifests_are_found_by_url() -> None:
    bucket = fsspec.filesystem("memory")
    bucket.pipe({"/bkt/a/1.mp4": b"123", "/bkt/a/b/2.mov": b"1", "/bkt/a/x.txt": b""})
    bucket.pipe("/bkt/m.jsonl", b'{"id": "one", "uri": "a/1.mp4"}\n')
    try:
        assert discover("memory://bkt/a").column("id").to_pylist() == ["1.mp4", "b/2.mov"]
        assert discover("memory://bkt/a").column("uri").to_pylist() == [
            "memory:///bkt/a/1.mp4",
            "memory:///bkt/a/b/2.mov",
        ]
        assert discover("memory://bkt/a/1.mp4").column("size_bytes").to_pylist() == [3]
        assert discover("memory://bkt/*/*.mp4").column("id").to_pylist() == ["a/1.mp4"]
        assert discover("memory://bkt/m.jsonl").column("uri").to_pylist() == ["memory://bkt/a/1.mp4"]
        bucket.pipe("/bkt/m.jsonl", b'{"id": "one", "uri": "/etc/passwd"}\n')
        with pytest.raises(RequestError, match=r"line 1 .*names a file of this machine"):
            discover("memory://bkt/m.jsonl")
        with pytest.raises(RequestError, match="holds no video"):
            discover("memory://bkt/nothing")
    finally:
        bucket.rm("/bkt", recursive=True)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_a_written_manifest_is_read_back_the_same(tmp_path: Path, suffix: str) -> None:
    table = pa.table(
        {
            "id": ["a", 'ü,"x"'],
            "uri": ["/v/1.mp4", "s3://bucket/2.mp4"],
            "start_seconds": [0.1, None],
            "end_seconds": [2.5, None],
            "size_bytes": pa.array([7, None], pa.int64()),
            "caption": ["a dog", "a cat"],
        },
        schema=pa.schema([*CORPUS_COLUMNS, pa.field("caption", pa.string())]),
    )
    path = str(tmp_path / f"m{suffix}")
    write_manifest(table, path)
    assert discover(path).to_pylist() == table.to_pylist()
    assert os.listdir(tmp_path) == [f"m{suffix}"]


def test_relative_uris_resolve_against_the_manifest_and_columns_are_kept(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("uri,id,label\nv/1.mp4,one,3\n/abs/2.mp4,two,4\nfile:///f/3.mp4,three,x\n")
    table = discover(str(tmp_path / "m.csv"))
    assert table.column("uri").to_pylist() == [f"{tmp_path}/v/1.mp4", "/abs/2.mp4", "file:///f/3.mp4"]
    assert table.column("label").to_pylist() == ["3", "4", "x"]


def test_a_column_whose_type_changes_late_in_a_long_manifest_is_kept(tmp_path: Path) -> None:
    rows = [f"{index},v{index}.mp4,{index}" for index in range(60_000)]
    (tmp_path / "m.csv").write_text("id,uri,label\n" + "\n".join(rows) + "\nlast,x.mp4,words\n")
    table = discover(str(tmp_path / "m.csv"))
    assert table.num_rows == 60_001
    assert table.column("label")[60_000].as_py() == "words"


def test_without_ids_the_uri_names_the_clip(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "m.jsonl", {"uri": "v/1.mp4"}, {"uri": "v/2.mp4"})
    assert discover(source).column("id").to_pylist() == ["v/1.mp4", "v/2.mp4"]


@pytest.mark.parametrize(
    ("row", "rule"),
    [
        ({"id": None, "uri": "a.mp4"}, "id is missing"),
        ({"id": "", "uri": "a.mp4"}, "id is empty"),
        ({"id": "x" * 1025, "uri": "a.mp4"}, "id has more than 1024 characters"),
        ({"id": "a\nb", "uri": "a.mp4"}, "id holds control characters"),
        ({"id": "a", "uri": None}, "uri is missing"),
        ({"id": "a", "uri": ""}, "uri is empty"),
        ({"id": "a", "uri": "a\u0000.mp4"}, "uri holds control characters"),
        ({"id": "a", "uri": "zip://x.mp4::s3://b/a.zip"}, "chains protocols"),
        ({"id": "a", "uri": "http://h/a.mp4"}, "--allow-http"),
        ({"id": "a", "uri": "HTTPS://h/a.mp4"}, "protocol other than"),
        ({"id": "a", "uri": "ftp://h/a.mp4"}, "protocol other than"),
        ({"id": "a", "uri": "s3://key:secret@b/a.mp4"}, "uri holds credentials"),
        ({"id": "a", "uri": "a.mp4", "start_seconds": -1.0}, "start_seconds is negative"),
        ({"id": "a", "uri": "a.mp4", "start_seconds": 2.0, "end_seconds": 2.0}, "not before end_seconds"),
        ({"id": "a", "uri": "a.mp4", "end_seconds": 0.0}, "end_seconds is not above 0"),
        ({"id": "a", "uri": "a.mp4", "size_bytes": -1}, "size_bytes is negative"),
        ({"id": "good", "uri": "a.mp4"}, r"id 'good' is not unique \(lines 1 and 2\)"),
    ],
)
def test_a_row_that_breaks_a_rule_is_refused_by_file_line_and_rule(
    tmp_path: Path, row: dict[str, object], rule: str
) -> None:
    source = jsonl(tmp_path / "m.jsonl", {"id": "good", "uri": "good.mp4"}, row)
    with pytest.raises(RequestError, match=rule) as caught:
        discover(source)
    assert "m.jsonl" in str(caught.value)
    assert "line 2" in str(caught.value) or "lines 1 and 2" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_times_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["a"], "uri": ["a.mp4"], "start_seconds": [float("nan")]}), tmp_path / "m.parquet")
    with pytest.raises(RequestError, match="start_seconds is not finite"):
        discover(str(tmp_path / "m.parquet"))
    (tmp_path / "m.csv").write_text("id,uri,end_seconds\na,a.mp4,soon\n")
    with pytest.raises(RequestError, match="conversion error to double"):
        discover(str(tmp_path / "m.csv"))


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("m.jsonl", b"", "cannot be read"),
        ("m.jsonl", b"{not json", "cannot be read"),
        ("m.csv", b"id,uri\n", "has no rows"),
        ("m.csv", b"id,path\na,b\n", "must have uri"),
        ("m.csv", b"id,uri\na,\xff\xfe.mp4\n", "cannot be read"),
        ("m.parquet", b"PAR1", "cannot be read"),
    ],
)
def test_a_broken_manifest_is_refused_as_a_whole(tmp_path: Path, name: str, content: bytes, rule: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RequestError, match=rule):
        discover(str(tmp_path / name))


def test_sources_that_hold_nothing_or_need_a_flag_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="holds no video"):
        discover(str(tmp_path))
    with pytest.raises(RequestError, match="does not exist"):
        discover(str(tmp_path / "missing"))
    with pytest.raises(RequestError, match=r"m\.csv does not exist"):
        discover(str(tmp_path / "m.csv"))
    with pytest.raises(RequestError, match="--allow-http"):
        discover("https://example.com/a.mp4")
    with pytest.raises(RequestError, match="chains protocols"):
        discover("simplecache::s3://bucket/a.mp4")
    touch(tmp_path / os.fsdecode(b"\xff.mp4"))
    with pytest.raises(RequestError, match="not valid UTF-8"):
        discover(str(tmp_path))


def test_http_is_let_in_by_the_flag(tmp_path: Path) -> None:
    table = discover("https://example.com/v/a.mp4?size=1", allow_http=True)
    assert table.column("id").to_pylist() == ["a.mp4"]
    source = jsonl(tmp_path / "m.jsonl", {"id": "a", "uri": "https://example.com/a.mp4"})
    assert discover(source, allow_http=True).column("uri").to_pylist() == ["https://example.com/a.mp4"]


def corpus(**columns: list[object]) -> pa.Table:
    rows = len(columns["id"])
    full = {field.name: columns.get(field.name, [None] * rows) for field in CORPUS_COLUMNS}
    return pa.table(full, schema=CORPUS_COLUMNS)


def test_windows_are_half_open_named_by_time_and_fit_whole() -> None:
    table = corpus(id=["a"], uri=["a.mp4"], size_bytes=[9])
    found = expand_windows(table, WINDOWS, lambda uris: [(1.5, 5.5)])
    # 4 frames at 2 a second: the last frame of a window is shown 1.5 s after its start, and must be before 5.5 s.
    assert found.column("start_seconds").to_pylist() == [1.5, 2.5, 3.5]
    assert found.column("end_seconds").to_pylist() == [3.5, 4.5, 5.5]
    assert found.column("id").to_pylist() == ["a#1.500-3.500", "a#2.500-4.500", "a#3.500-5.500"]
    assert found.column("size_bytes").to_pylist() == [9, 9, 9]


def test_spans_are_asked_only_where_the_end_is_unknown_and_once_a_file() -> None:
    table = corpus(
        id=["a", "b", "c"], uri=["x", "y", "x"], start_seconds=[None, None, 2.0], end_seconds=[None, 4.0, None]
    )
    asked: list[list[str]] = []

    def spans(uris: object) -> list[tuple[float, float]]:
        asked.append(list(uris))  # type: ignore[call-overload]
        return [(0.0, 4.0)]

    found = expand_windows(table, WINDOWS, spans)
    assert asked == [["x"]]
    assert found.column("id").to_pylist() == [
        "a#0.000-2.000", "a#1.000-3.000", "a#2.000-4.000", "b#0.000-2.000", "b#1.000-3.000", "b#2.000-4.000",
        "c#2.000-4.000",
    ]  # fmt: skip


def test_clips_without_a_known_span_or_shorter_than_a_window_keep_their_row() -> None:
    table = corpus(id=["bad", "short"], uri=["x", "y"], start_seconds=[None, 1.0], end_seconds=[None, 2.0])
    found = expand_windows(table, WINDOWS, lambda uris: [None])
    assert found.to_pylist() == table.to_pylist()


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"num_frames": 0}, "num_frames is 0"),
        ({"plan": "random"}, "must be uniform or windows"),
        ({"plan": "windows"}, "needs fps and stride_frames"),
        ({"fps": 8.0}, "plan uniform takes neither"),
        ({"plan": "windows", "fps": 0.0, "stride_frames": 1}, "fps is 0.0"),
        ({"plan": "windows", "fps": 8.0, "stride_frames": 0}, "stride_frames is 0"),
        ({"resize": "crop"}, "must be squash or pad"),
        ({"height": 100_000}, "are over"),
    ],
)
def test_a_sampling_that_makes_no_sense_is_refused(fields: dict[str, object], rule: str) -> None:
    with pytest.raises(RequestError, match=rule):
        Sampling(**fields)  # type: ignore[arg-type]


def test_sampling_survives_its_attributes() -> None:
    assert Sampling.from_attributes(json.loads(json.dumps(WINDOWS.to_attributes()))) == WINDOWS
    with pytest.raises(RequestError, match="sampling has fields"):
        Sampling.from_attributes({"plan": "uniform"})


PLAN = """
import resource, sys
import pyarrow.compute, pyarrow.csv, pyarrow.json, pyarrow.parquet
from p4dprep.corpus import discover
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
print(discover(sys.argv[1]).num_rows, peak() - before)
"""


def planned(path: Path) -> tuple[int, int]:
    """Rows and bytes of memory over the imports, measured in a process of its own."""
    done = subprocess.run([sys.executable, "-c", PLAN, str(path)], check=True, capture_output=True, text=True)
    rows, num_bytes = done.stdout.split()
    return int(rows), int(num_bytes)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_million_lines_are_planned_within_300_mib_and_60_seconds(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"m{suffix}"
    line = {
        ".jsonl": '{{"id": "clip-{0:07d}", "uri": "videos/part-{1:03d}/video-{0:07d}.mp4", "caption": "words {0}"}}\n',
        ".csv": "clip-{0:07d},videos/part-{1:03d}/video-{0:07d}.mp4,words {0}\n",
    }[suffix]
    with path.open("w") as file:
        if suffix == ".csv":
            file.write("id,uri,caption\n")
        file.writelines(line.format(index, index % 997) for index in range(1_000_000))
    rows, num_bytes = planned(path)
    assert rows == 1_000_000
    assert num_bytes < 300 * 2**20
