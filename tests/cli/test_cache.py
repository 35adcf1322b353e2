"""`p4dprep cache ...` run in this process on a small real cache."""

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from cli import cache as commands
from p4dprep.cache import Cache, verify
from p4dprep.corpus import write_manifest
from p4dprep.errors import CacheFormatError, MissingDataError, RequestError
from tests.cache_builder import build_cache, write_video
from tests.p4dprep.extract.builders import extract_here, make_request

HOSTILE_NAME = "<script>alert('{index}')<;script> \"quoted\" \x1b[31m.mp4"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `cache` and `videos`: clips 0 and 1 committed, clip 2 failed; hostile file names."""
    folder = tmp_path_factory.mktemp("pristine")
    build_cache(folder, name=HOSTILE_NAME)
    return folder


@pytest.fixture
def cache(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to break; the current folder is an empty one. The videos stay where the cache says they are."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(pristine / "cache", tmp_path / "copy"))


def run(*arguments: object, expect: int = 0, environment: dict[str, str] | None = None) -> Result:
    result = CliRunner().invoke(commands.app, [str(argument) for argument in arguments], env=environment)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == expect, result.output
    return result


def run_json(*arguments: object, expect: int = 0) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(run(*arguments, "--json", expect=expect).stdout)
    return parsed


def an_object(cache: Path, array: str = "l4p_depth") -> Path:
    return next(path for path in sorted((cache / array).rglob("*")) if path.is_file() and path.name != "zarr.json")


def test_info_counts_clips_bytes_and_failures(cache: Path) -> None:
    record = run_json("info", cache)
    groups = {group["name"]: group for group in record["groups"]}
    assert (record["num_clips"], record["sampling"]["num_frames"]) == (3, 4)
    for group in groups.values():
        assert (group["num_committed"], group["num_failed"], group["num_missing"]) == (2, 1, 0)
        assert group["coverage"] == pytest.approx(2 / 3)
        assert 0 < group["fp32_fraction"] < 0.5
    objects = [path for path in (cache / "opencv_dis_flow").iterdir() if path.name != "zarr.json"]
    assert groups["opencv_dis"]["num_bytes"] == sum(path.stat().st_size for path in objects)
    text = run("info", cache).stdout
    assert "2 committed, 1 failed, 0 missing (66.7%)" in text
    assert "opencv_dis_flow: backward flow [px], 4 x 32 x 32 x 2" in text
    assert "1 x corrupt, such as: is damaged" in text


def test_a_clean_cache_verifies(cache: Path) -> None:
    record = run_json("verify", cache)
    assert (record["ok"], record["problems"], record["num_clips"]) == (True, [], 3)
    assert record["num_objects"] > 10
    assert "all as committed" in run("verify", cache).stdout


def test_a_flipped_bit_and_a_lost_object_fail_verification_and_are_named(cache: Path) -> None:
    flipped, lost = an_object(cache), an_object(cache, "opencv_dis_flow")
    flipped.write_bytes(flipped.read_bytes()[:-1] + bytes([flipped.read_bytes()[-1] ^ 1]))
    lost.unlink()
    kinds = {problem["key"]: problem["kind"] for problem in run_json("verify", cache, expect=1)["problems"]}
    assert kinds == {
        flipped.relative_to(cache).as_posix(): "wrong digest",
        lost.relative_to(cache).as_posix(): "gone",
    }
    assert "2 problems" in run("verify", cache, expect=1).stdout


def test_no_more_than_a_screen_of_problems_is_listed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "MAX_LINES", 1)
    an_object(cache).unlink()
    an_object(cache, "l4p_motion").unlink()
    lines = run("verify", cache, expect=1).stdout.splitlines()
    assert lines[0].startswith("gone: l4p_")
    assert lines[1] == "... and 1 more; --json lists them all"


@pytest.mark.parametrize("command", ["info", "verify", "gc", "show"])
def test_where_no_cache_is_every_command_says_so(command: str, tmp_path: Path) -> None:
    with pytest.raises(CacheFormatError, match="there is no cache at"):
        run(command, tmp_path)


def test_gc_lists_leftovers_and_deletes_them_only_when_told_to(cache: Path) -> None:
    leftover = an_object(cache).with_name("99")
    leftover.write_bytes(b"12345")
    assert run_json("gc", cache)["num_too_young"] == 1
    record = run_json("gc", cache, "--min-age-seconds", 0)
    assert record["unreferenced"] == {leftover.relative_to(cache).as_posix(): 5}
    assert (record["num_bytes"], record["deleted"]) == (5, False)
    assert leftover.exists()
    assert "1 objects, 5 B, deleted" in run("gc", cache, "--min-age-seconds", 0, "--yes").stdout
    assert not leftover.exists()
    assert verify(Cache.open(str(cache))).ok


def strip_rows(path: Path) -> int:
    """Rows of a strip of square frames, from its height: title and times, then 150 px and a gap of 4 each."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        return (image.height - 56 - 4) // 154


@pytest.mark.parametrize("clip", ["clip-1", "1"])
def test_show_draws_one_clip_as_a_strip_with_a_row_per_target(cache: Path, clip: str) -> None:
    record = run_json("show", cache, clip, "--out", "strip.png")
    assert record == {"clips": ["clip-1"], "png": ["strip.png"], "html": None, "notes": {}}
    assert strip_rows(Path("strip.png")) == len(["frame", "depth", "flow", "motion", "d", "o x d", "tap 1", "tap 2"])


def test_show_names_the_file_after_the_clip_and_takes_a_folder(cache: Path) -> None:
    assert run("show", cache, "clip-0").stdout == "clip-0.png\n"
    assert run_json("show", cache, "--out", "strips")["png"] == ["strips/clip-0.png", "strips/clip-1.png"]
    with pytest.raises(RequestError, match="is one picture; name a CLIP"):
        run("show", cache, "--out", "one.png")


def test_a_source_that_is_gone_or_replaced_is_said_and_drawn_without_frames(tmp_path: Path) -> None:
    build_cache(tmp_path, num_clips=2, num_failed=0)
    cache, out = tmp_path / "cache", tmp_path / "strip.png"
    (tmp_path / "videos" / "0.mp4").unlink()
    record = run_json("show", cache, "0", "--out", out)
    assert "drawn without its frames: the source" in record["notes"]["clip-0"]
    assert strip_rows(out) == 7
    write_video(tmp_path / "videos" / "1.mp4", seed=0, num_frames=20)
    result = run("show", cache, "1", "--out", out)
    assert "clip-1: drawn without its frames: the source's frame times differ" in result.stderr
    assert result.stdout.strip() == str(out)


def test_frames_kept_in_the_cache_are_drawn_when_the_video_is_gone(tmp_path: Path) -> None:
    build_cache(tmp_path, num_clips=2, num_failed=0)
    cache, clips = tmp_path / "cache", tmp_path / "clips.parquet"
    write_manifest(Cache.open(str(cache)).clips().drop_columns(["index"]), str(clips))
    extract_here(make_request(clips, cache, keep_frames=48))
    shutil.rmtree(tmp_path / "videos")
    assert run_json("show", cache, "0", "--out", tmp_path / "strip.png")["notes"] == {}
    assert strip_rows(tmp_path / "strip.png") == 8
    run("show", cache, "--html", tmp_path / "page.html")
    assert "that of the videos" in (tmp_path / "page.html").read_text()
    assert "frames_frames: rgb frames [1], 4 x 48 x 48 x 3, rgb-uint8" in run("info", cache).stdout
    assert run_json("verify", cache)["ok"]


class Page(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_show_writes_a_page_of_clips_that_hostile_names_do_not_break(cache: Path) -> None:
    assert run("show", cache).stdout == "copy.html\n"
    html = Path("copy.html").read_text(encoding="utf-8")
    page = Page(html)
    assert (page.tags.count("article"), page.tags.count("img"), page.tags.count("script")) == (2, 4, 0)
    assert "<script>alert('0')<;script> \"quoted\"" in page.text
    assert "http" not in html.replace("http-equiv", "")
    for text in (
        "2 committed, 1 failed, 0 missing",
        "is damaged",
        "Apache-2.0",
        "4 frames, 4 distinct",
        "0.00 to 1.83 s",
    ):
        assert text in page.text


def test_the_sample_of_a_page_follows_its_seed_and_size(cache: Path) -> None:
    chosen = {run_json("show", cache, "--num-clips", 1, "--seed", seed)["clips"][0] for seed in (0, 3)}
    assert chosen == {"clip-0", "clip-1"}
    assert run_json("show", cache, "--html", "a.html")["clips"] == ["clip-0", "clip-1"]
    commands.write_page(str(cache), Path("deep/b.html"))
    assert Path("deep/b.html").read_bytes() == Path("a.html").read_bytes()


def test_a_clip_that_is_unknown_or_failed_is_refused_with_its_reason(cache: Path) -> None:
    with pytest.raises(MissingDataError, match=r"has no clip 'clip-9'; it has 3"):
        run("show", cache, "clip-9")
    with pytest.raises(MissingDataError, match="nothing to draw of clip clip-2: l4p failed: is damaged"):
        run("show", cache, "2")


def test_a_damaged_object_is_never_drawn(cache: Path) -> None:
    path = an_object(cache)
    path.write_bytes(bytes(len(path.read_bytes())))
    with pytest.raises(commands.P4DError, match="l4p_depth"):
        run("show", cache, "0")


def test_a_terminal_gets_no_control_characters(cache: Path) -> None:
    texts = [run("info", cache).output, run("show", cache, "0").output]
    assert not any("\x1b" in text for text in texts)


def test_storage_options_come_from_the_flag_or_the_environment_and_are_never_repeated(cache: Path) -> None:
    run("info", cache, "--storage-options", '{"key": "value"}')
    run("info", cache, environment={"P4DPREP_STORAGE_OPTIONS": '{"key": "value"}'})
    for text in ('{"secret": "hunter2"', '["hunter2"]'):
        result = run("info", cache, "--storage-options", text, expect=2)
        assert "must be a JSON object" in result.stderr.replace("\n", " ")
        assert "hunter2" not in result.output


def test_json_output_knows_dataclasses_arrays_paths_and_what_is_not_a_number(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from cli._output import human_bytes, human_seconds, print_json

    print_json({"a": np.arange(2), "b": float("nan"), "c": Path("x"), "d": (np.float32(0.5), {"e": None})})
    assert json.loads(capsys.readouterr().out) == {"a": [0, 1], "b": None, "c": "x", "d": [0.5, {"e": None}]}
    assert [human_bytes(size) for size in (0, 1023, 1536, 5 * 2**30)] == ["0 B", "1023 B", "1.5 KiB", "5.0 GiB"]
    durations = [human_seconds(seconds) for seconds in (0.44, 12.2, 200, 18420, 180000)]
    assert durations == ["0.4 s", "12 s", "3 min 20 s", "5 h 07 min", "2 d 2 h"]
