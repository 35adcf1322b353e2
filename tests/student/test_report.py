"""The report: its numbers are the run's, the cache's and the results', and nothing of theirs can break out of it."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from p4dprep.cache import ClipResult
from p4dprep.errors import CacheFormatError, CorruptDataError, RequestError
from student.evaluate.answers import AnswerRequest, answer
from student.report import ReportRequest, write_report
from student.report_answers import MAX_WORST, read_answered
from student.train import train
from student.train_config import parse_config
from tests.student import p4d_cache
from tests.student.browser import open_page
from tests.student.evaluate import mmsi_data, vsti_data
from tests.student.test_page import HOSTILE, SETTINGS, Page, line, run_folder
from tests.student.train_run import request, write_world

STEPS = (10, 20, 30)
TIMES = ({"samples_per_second": 8.0}, {"samples_per_second": 2.0}, {"samples_per_second": 4.0})


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Benchmarks `vsti`, with a hostile question, and `mmsi`; results `a`, `b` and `pictures` of constant letters."""
    folder = tmp_path_factory.mktemp("asked")
    records = vsti_data.records()
    records[0]["question"] += HOSTILE
    vsti_data.build(folder / "vsti", records)
    mmsi_data.build(folder / "mmsi")
    for name, letter, bench in (("a", "A", "vsti"), ("b", "B", "vsti"), ("pictures", "C", "mmsi")):
        request = AnswerRequest(
            student=f"constant:{letter}", bench=f"{bench}-bench", data=folder / bench, out=folder / name, num_frames=4
        )
        assert answer(request) is not None
    return folder


def a_run(folder: Path, **settings: Any) -> Path:
    records = [line(step, **times) for step, times in zip(STEPS, TIMES, strict=True)]
    return run_folder(folder / "run", records, {**SETTINGS, "batch_size": 16, **settings})


def report(run: Path, **options: Any) -> Page:
    return Page(write_report(ReportRequest(run=run, **options)))


def texts(page: Page) -> str:
    return " ".join(page.text.split())


def test_clips_that_failed_are_counted_and_their_reason_is_shown(tmp_path: Path) -> None:
    cache = p4d_cache.build(tmp_path, {"any": (p4d_cache.DISPARITY,)}, num_clips=3)
    group = cache.add_group("l4p", "l4p", {"kind": "l4p"}, (p4d_cache.DEPTH,))
    failed = ClipResult(
        index=1,
        id="clip-1",
        status="failed",
        failure="too_short",
        reason=f"has 1 frame {HOSTILE}",
        num_distinct_frames=0,
    )
    group.commit(0, [failed])
    run = a_run(tmp_path, cache=cache.store.url)
    left_out = "7 samples, 2 left out: 2 without targets"
    (run / "report.json").write_text(json.dumps({"left_out": left_out, "seconds": 12.5}))
    page = report(run)
    assert page.after("any", 5) == ["any", "3", "0", "0", "100.0%"]
    assert page.after("l4p", 5) == ["l4p", "0", "1", "2", "0.0%"]
    assert page.after("too_short") == [f"has 1 frame {HOSTILE}"]
    assert f"Trained on {left_out}" in texts(page)
    assert page.after("the last call of p4dprep train") == ["12.5 s, loading included"]


def test_a_runs_cache_that_is_gone_is_said_and_a_named_one_is_refused(tmp_path: Path) -> None:
    run = a_run(tmp_path, cache=str(tmp_path / "gone"))
    assert "The run's cache cannot be read any more" in texts(report(run))
    with pytest.raises(CacheFormatError, match="elsewhere"):
        report(run, cache=str(tmp_path / "elsewhere"))


def test_timing_is_that_of_the_log(tmp_path: Path) -> None:
    page = report(a_run(tmp_path))
    assert page.after("a step, median and slowest") == ["4 s and 8 s"]
    assert page.after("samples per second, slowest and fastest") == ["2 and 8"]
    assert len(page.points("curve-samples_per_second-0")) == len(STEPS)
    assert "The run has not ended" in texts(page)


def test_every_official_column_has_its_percentage_interval_and_questions(tmp_path: Path, asked: Path) -> None:
    page = report(a_run(tmp_path), answers=(asked / "a", asked / "b"))
    results = [json.loads((asked / name / "result.json").read_text()) for name in ("a", "b")]
    assert page.cells[page.cells.index("percent right") :][:4] == ["percent right", "questions", "a", "b"]
    for first, second in zip(results[0]["table"], results[1]["table"], strict=True):
        wanted = [str(first["num_questions"]), *(_shown(column) for column in (first, second))]
        assert page.after(first["name"], 3) == wanted
    assert f"a: {results[0]['num_asked']} questions, {results[0]['num_unmatched']} replies without an answer" in texts(
        page
    )
    assert page.after("vsti-bench, b") == [f"{results[1]['table'][0]['value']:.1f}%"]


def _shown(column: dict[str, Any]) -> str:
    interval = "" if column["low"] is None else f" ({column['low']:.1f} .. {column['high']:.1f})"
    return f"{column['value']:.1f}{interval}"


def test_the_worst_cases_show_question_truth_reply_and_frames_of_every_category_in_turn(
    tmp_path: Path, asked: Path
) -> None:
    page = report(a_run(tmp_path), answers=(asked / "b",), data=(asked / "vsti",))
    worst = read_answered(asked / "b").worst
    assert len(worst) == MAX_WORST
    assert len({each["category"] for each in worst}) == MAX_WORST
    assert all(each["score"] < 1 for each in worst)
    assert page.cells.count("B") == MAX_WORST  # the replies
    assert [page.cells[n + 1] for n, cell in enumerate(page.cells) if cell == "question"] == [
        each["prompt"] for each in worst
    ]
    assert "4 of 4 frames, at 0.00, 0.25, 0.50, 0.75 s" in page.cells
    assert page.tags.count("img") == MAX_WORST


def test_pictures_of_a_question_stand_side_by_side(tmp_path: Path, asked: Path) -> None:
    page = report(a_run(tmp_path), answers=(asked / "pictures",), data=(asked / "mmsi",))
    assert "2 of 2 pictures" in page.cells
    assert page.tags.count("img") == MAX_WORST


def test_without_the_benchmarks_folder_the_worst_cases_have_words_only(tmp_path: Path, asked: Path) -> None:
    page = report(a_run(tmp_path), answers=(asked / "b",))
    assert "What was shown in b is not drawn: name its benchmark's folder with --data." in texts(page)
    assert "img" not in page.tags
    assert page.cells.count("B") == MAX_WORST


def test_a_video_that_is_gone_is_said_and_the_case_stays(tmp_path: Path, asked: Path) -> None:
    shutil.copytree(asked / "vsti", tmp_path / "vsti")
    (tmp_path / "vsti" / vsti_data.VIDEO).write_bytes(b"no video")
    page = report(a_run(tmp_path), answers=(asked / "b",), data=(tmp_path / "vsti",))
    assert sum(cell.startswith("not drawn: ") for cell in page.cells) == MAX_WORST


@pytest.mark.parametrize("changed", ["all", "one"])
def test_frames_of_a_question_in_other_words_are_not_shown(tmp_path: Path, asked: Path, changed: str) -> None:
    shutil.copytree(asked / "vsti", tmp_path / "vsti")
    path = tmp_path / "vsti" / "test.json"
    records = json.loads(path.read_text())
    one = read_answered(asked / "b").worst[0]["id"]
    for record in records:
        record["question"] += " Or else?" if changed == "all" or str(record["id"]) == one else ""
    path.write_text(json.dumps(records))
    if changed == "all":
        with pytest.raises(RequestError, match="holds none of the questions that are shown"):
            report(a_run(tmp_path), answers=(asked / "b",), data=(tmp_path / "vsti",))
        return
    page = report(a_run(tmp_path), answers=(asked / "b",), data=(tmp_path / "vsti",))
    assert page.tags.count("img") == MAX_WORST - 1
    assert page.cells.count("not drawn: the folder of --data has no such question") == 1


def test_a_folder_of_no_results_benchmark_is_refused(tmp_path: Path, asked: Path) -> None:
    with pytest.raises(RequestError, match=r"--data .*mmsi holds none of the questions that are shown"):
        report(a_run(tmp_path), answers=(asked / "b",), data=(asked / "mmsi",))


@pytest.mark.parametrize(
    ("content", "error", "fault"),
    [
        (None, RequestError, "has no result of p4dprep eval answers"),
        ('{"table": 3}', CorruptDataError, r"result\.json is no result of p4dprep eval answers"),
        ("[]", CorruptDataError, r"result\.json is no result of p4dprep eval answers"),
    ],
)
def test_results_that_are_none_are_refused(
    tmp_path: Path, content: str | None, error: type[Exception], fault: str
) -> None:
    if content is not None:
        (tmp_path / "result.json").write_text(content)
    with pytest.raises(error, match=fault):
        report(a_run(tmp_path), answers=(tmp_path,))


def test_nothing_of_a_result_can_break_out_of_the_page(tmp_path: Path, asked: Path) -> None:
    hostile = tmp_path / HOSTILE.replace("/", "|")
    shutil.copytree(asked / "b", hostile)
    result = json.loads((hostile / "result.json").read_text())
    result |= {"student": HOSTILE, "failures": {HOSTILE: 2}}
    result["table"][0]["name"] = HOSTILE
    (hostile / "result.json").write_text(json.dumps(result))
    (answers,) = hostile.glob("answers-*.jsonl")
    lines = [json.loads(each) for each in answers.read_text().splitlines()]
    for each in lines:
        each |= {"category": HOSTILE, "reply": HOSTILE, "answer": HOSTILE, "truth": HOSTILE, "is_matched": True}
    answers.write_text("".join(json.dumps(each) + "\n" for each in lines))
    page = report(a_run(tmp_path), answers=(hostile,))
    assert not {"script", "img", "link", "iframe", "a"} & set(page.tags)
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert ("content", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in page.attributes
    assert page.cells.count(HOSTILE) == 3 * MAX_WORST + 1  # truth, reply and what was read; a column


def test_a_table_with_words_for_numbers_cannot_write_style(tmp_path: Path, asked: Path) -> None:
    shutil.copytree(asked / "b", tmp_path / "b")
    result = json.loads((tmp_path / "b" / "result.json").read_text())
    result["table"][0]["value"] = "0; background: url(//evil.example)"
    (tmp_path / "b" / "result.json").write_text(json.dumps(result))
    with pytest.raises(CorruptDataError, match="is no result of p4dprep eval answers"):
        report(a_run(tmp_path), answers=(tmp_path / "b",))


def test_a_whole_report_opens_in_a_browser_without_an_error(tmp_path: Path, asked: Path, one_thread: None) -> None:
    world = write_world(tmp_path / "world")
    train(parse_config(request(world, tmp_path / "run", max_steps=2)))
    truth = p4d_cache.build(tmp_path / "truth", {"truth": (p4d_cache.DEPTH, p4d_cache.FLOW, p4d_cache.MASK)}, 4)
    written = write_report(
        ReportRequest(
            run=tmp_path / "run", against=truth.store.url, answers=(asked / "a", asked / "b"), data=(asked / "vsti",)
        )
    )
    page = Page(written)
    titles = ("Coverage", "Timing", "Losses", "What the student sees", "Maps by the truth", "Answers", "Worst cases")
    places = [page.text.index(f"\n{title}\n" if title == "Answers" else title) for title in titles]
    assert places == sorted(places)
    assert page.after("abs_rel ↓", 2)[1] == "0.000 (0.000 .. 0.000)"  # the truth holds the teacher's very depths
    assert "the student was trained on 4 of the 4 clips" in texts(page)
    num_worst = sum(len(read_answered(asked / name).worst) for name in ("a", "b"))
    assert page.tags.count("img") == 2 + 3 + num_worst
    said, picture_hwc = open_page(written, tmp_path, (1400, 6000))
    assert said == []
    _check_painted(picture_hwc)


def _check_painted(picture_hwc: np.ndarray) -> None:
    """Text, lines and pictures all over it, not one colour."""
    assert picture_hwc.shape == (6000, 1400, 3)
    for band in np.split(picture_hwc, 6):
        assert band.std() > 5


def test_the_browser_would_tell_of_an_error(tmp_path: Path) -> None:
    policy = "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'\">"
    (tmp_path / "bad.html").write_text(f"{policy}<p>bad<script>alert(1)</script>")
    said, _ = open_page(tmp_path / "bad.html", tmp_path)
    assert any("Content Security Policy" in each for each in said)
