"""`p4dprep eval answers` and `p4dprep eval compare` as a user types them."""

import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from cli.app import app
from p4dprep.errors import RequestError
from student.evaluate import registry
from tests.student.evaluate.tiny_bench import TinyBench, write_bench


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.BENCHMARKS, "tiny", TinyBench())


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bench(tmp_path_factory.mktemp("tiny") / "bench", 9)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def answers(bench: Path, student: object, out: Path, *more: object) -> Result:
    return run("answers", student, "--bench", "tiny", "--data", bench, "--out", out, "--frames", 4, *more)


def test_the_table_is_data_and_what_must_be_known_is_talk(bench: Path, tmp_path: Path) -> None:
    result = answers(bench, bench / "student", tmp_path / "out", "--frame-size", "32x48")
    assert result.exit_code == 0
    rows = [line.split() for line in result.stdout.splitlines()]
    assert rows[0] == ["tiny", "95%", "interval", "questions"]
    assert [row[0] for row in rows[1:]] == ["Avg", "far", "fast"]
    talk = " ".join(result.stderr.split())
    assert "9 questions, " in talk
    assert "1 that could not be asked and score 0" in talk
    assert "not asked, 1: is empty (0 bytes)" in talk
    assert "frames: 4 uniform, 32x48 squash" in talk
    assert f"written: {tmp_path / 'out'}" in talk


def test_json_is_what_result_json_holds(bench: Path, tmp_path: Path) -> None:
    result = answers(bench, "oracle", tmp_path / "out", "--json", "--seed", 5)
    assert json.loads(result.stdout) == json.loads((tmp_path / "out" / "result.json").read_text())
    assert json.loads(result.stdout)["seed"] == 5


def test_shards_are_put_together_by_the_command_without_shard(bench: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for number in range(2):
        result = answers(bench, "constant:A", out, "--shard", f"{number}/2")
        assert (result.exit_code, result.stdout) == (0, "")
        assert f"answers-{number}-of-2.jsonl; without --shard all are put together" in result.stderr
    assert json.loads(answers(bench, "constant:A", out, "--json").stdout)["num_asked"] == 9


def test_two_results_are_compared_on_screen_and_as_json(bench: Path, tmp_path: Path) -> None:
    answers(bench, "constant:A", tmp_path / "a")
    answers(bench, "oracle", tmp_path / "b")
    result = run("compare", tmp_path / "a", tmp_path / "b")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == "tiny, mode official: A constant:A, B oracle"
    assert lines[2].split()[:4] == ["Avg", "33.3", "100.0", "+66.7"]
    content = json.loads(run("compare", tmp_path / "a", tmp_path / "b", "--json").stdout)
    assert content["columns"][0]["only_second"] == 6
    assert content["columns"][0]["p"] == pytest.approx(2 / 2**6)


def test_a_comparison_says_how_many_could_not_be_asked(bench: Path, tmp_path: Path) -> None:
    answers(bench, bench / "student", tmp_path / "a")
    answers(bench, "oracle", tmp_path / "b")
    assert "1 and 0 questions could not be asked and score 0" in run("compare", tmp_path / "a", tmp_path / "b").stderr


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--shard", "2"), "--shard 2 is not I/N, such as 0/8"),
        (
            ("--shard", "0/2", "--workers", "2"),
            "workers share all questions among them; leave --shard out, or --workers",
        ),
        (("--frame-size", "big"), "size 'big' is not 224 or HEIGHTxWIDTH"),
        (("--mode", "odd"), "tiny has no mode 'odd'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(bench: Path, tmp_path: Path, more: tuple[str, str], message: str) -> None:
    result = answers(bench, "oracle", tmp_path / "out", *more)
    assert message in str(result.exception)


def test_a_dtype_that_does_not_exist_is_refused(bench: Path, tmp_path: Path) -> None:
    result = answers(bench, "oracle", tmp_path / "out", "--dtype", "float8")
    assert result.exit_code == 2
    assert "float8" in result.stderr


def test_lmms_eval_gets_a_folder_for_each_task_and_nothing_is_overwritten(tmp_path: Path) -> None:
    result = run("lmms-eval", tmp_path / "tasks")
    assert result.exit_code == 0
    written = [Path(line) for line in result.stdout.split()]
    assert [folder.name for folder in written] == ["p4dprep_r4d_bench", "p4dprep_vlm4d", "p4dprep_vsti_bench"]
    assert all((folder / f"{folder.name}.yaml").exists() and (folder / "utils.py").exists() for folder in written)
    again = run("lmms-eval", tmp_path / "tasks")
    assert isinstance(again.exception, RequestError)
    assert "exists; remove it" in str(again.exception)
