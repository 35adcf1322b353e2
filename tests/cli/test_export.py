"""`p4dprep export` through the real command: a trained run becomes a folder that transformers alone can load."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
from typer.testing import CliRunner, Result

from cli.app import app, main
from tests.student.conftest import one_thread
from tests.student.test_export import train
from tests.student.tiny_students import WRITERS

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

TimeCue = Literal["none", "tpe"]


def trained(folder: Path, time_cue: TimeCue = "tpe") -> Path:
    train(WRITERS["llava_onevision"](folder / "base"), folder / "run", "projector+lora", time_cue=time_cue)
    return folder / "run"


def export(*arguments: object) -> Result:
    result = CliRunner().invoke(app, ["export", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result


def test_the_lines_it_prints_load_the_export_where_nothing_of_ours_is(tmp_path: Path) -> None:
    said = export(trained(tmp_path), tmp_path / "out").stderr
    assert "LlavaOnevisionForConditionalGeneration" in said.splitlines()[0]
    assert 'TPE: config.json says "p4dprep": {"time_cue": "tpe"}' in said
    lines = [line.strip() for line in said.splitlines() if line.startswith("    ")]
    assert len(lines) == 3
    hidden = "import sys; sys.modules['student'] = sys.modules['p4dprep'] = None"
    shown = "print(type(model).__name__, type(processor).__name__, sum(each.numel() for each in model.parameters()))"
    code = "\n".join((hidden, *lines, shown))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    model, processor, num_parameters = done.stdout.split()
    assert (model, processor) == ("LlavaOnevisionForConditionalGeneration", "LlavaOnevisionProcessor")
    assert f"{int(num_parameters):,} parameters" in said


def test_the_report_as_json_says_what_was_written(tmp_path: Path) -> None:
    report = json.loads(export(trained(tmp_path, "none"), tmp_path / "out", "--step", 2, "--json").stdout)
    assert report["out"] == str(tmp_path / "out")
    assert report["base"] == str(tmp_path / "base")
    assert report["checkpoint"] == str(tmp_path / "run" / "checkpoint-2")
    assert (report["dtype"], report["time_cue"]) == ("float32", "none")
    assert report["size_bytes"] > 4 * report["num_parameters"]


def test_a_student_without_tpe_is_said_to_have_none(tmp_path: Path) -> None:
    assert "no TPE" in export(trained(tmp_path, "none"), tmp_path / "out").stderr


def test_a_folder_that_is_no_run_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["p4dprep", "export", str(tmp_path), str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=r"^2$"):
        main()
    said = capsys.readouterr().err
    assert said.startswith(f"p4dprep: {tmp_path} is no run of p4dprep train: ")
    assert said.count("\n") == 1
