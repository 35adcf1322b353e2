"""`p4dprep demo`: from nothing to a verified cache, scores and a page; and the same on somebody's own clips."""

import json
from pathlib import Path

import pytest
import torch
import typer.testing
from transformers import Qwen2_5_VLForConditionalGeneration

from cli import demo
from cli.app import app
from p4dprep import cache as caches
from p4dprep.cache import Cache
from student import run_folder
from tests.p4dprep.extract.builders import write_corpus

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(900)]  # 300 s pass on a busy machine

NUM_STEPS = 3
NUM_CLIPS = {"train": 4, "test": 4}


@pytest.fixture(autouse=True)
def short_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of the demo but its size: `make demo` takes ten minutes."""
    steps = {"max_steps": NUM_STEPS, "log_steps": 1, "save_steps": 2, "picture_steps": 2}
    monkeypatch.setattr(demo, "TRAINING", demo.TRAINING | steps | {"batch_size": 1, "micro_batch_size": 1})
    monkeypatch.setattr(demo, "NUM_CLIPS", NUM_CLIPS)


def run(*arguments: object) -> str:
    result = typer.testing.CliRunner().invoke(app, ["demo", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def check_student(folder: Path) -> None:
    """A run with its log, its pictures and its page, and a student that transformers loads."""
    log = run_folder.read_log(folder / "run")
    assert [line["step"] for line in log] == [1, 2, 3]
    assert {"sft", "ld", "ed/l4p_depth", "ed/l4p_flow", "ed/l4p_motion", "ed/l4p_camray"} <= log[-1].keys()
    pictures = sorted(path.stem for path in (folder / "run" / "pictures").iterdir())
    assert pictures == ["step-00000000", "step-00000002", "step-00000003"]
    assert (folder / "run" / "index.html").read_text().count("data:image/") >= 2
    student = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "exported")
    base = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "student")
    assert student.num_parameters() == base.num_parameters()
    assert not torch.equal(student.lm_head.weight, base.lm_head.weight)


def test_demo_makes_worlds_extracts_judges_and_teaches_a_student(tmp_path: Path) -> None:
    output = run(tmp_path)
    cache = Cache.open(str(tmp_path / "test" / "cache"))
    assert cache.groups() == ("l4p", "opencv_dis", "truth")
    assert cache.group("l4p").states().ok.sum() == NUM_CLIPS["test"]
    assert caches.verify(cache).problems == ()
    for judged in ("l4p/depth by truth/depth", "l4p/motion by truth/motion", "opencv_dis/flow", "camray"):
        assert judged in output
    page = (tmp_path / "pictures.html").read_text()
    assert page.count("data:image/") >= 6
    assert "test-7-0" in page
    check_student(tmp_path)
    result = json.loads((tmp_path / "answers" / "result.json").read_text())
    assert result["bench"] == "worlds"
    assert result["num_failed"] == 0
    report = (tmp_path / "report.html").read_text()
    assert report.count("data:image/") >= 8
    assert "worlds, answers" in report
    assert "proves the plumbing" in output


def test_demo_on_own_videos_teaches_a_student_without_text(tmp_path: Path) -> None:
    videos = write_corpus(tmp_path / "mine", 2, num_frames=20)
    run(tmp_path / "out", "--videos", videos)
    cache = Cache.open(str(tmp_path / "out" / "train" / "cache"))
    assert cache.groups() == ("l4p", "opencv_dis")
    assert caches.verify(cache).problems == ()
    page = (tmp_path / "out" / "pictures.html").read_text()
    assert page.count("data:image/") >= 2
    assert "clip_01.mp4" in page
    log = run_folder.read_log(tmp_path / "out" / "run")
    assert log[-1]["sft"] == 0
    assert log[-1]["loss"] > 0
    assert (tmp_path / "out" / "report.html").exists()
