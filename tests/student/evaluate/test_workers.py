"""Asking with Ray workers: what one process would answer, whatever becomes of a worker."""

import contextlib
import fcntl
import json
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from typer.testing import CliRunner

from cli.app import app
from p4dprep.errors import RequestError
from student.evaluate import workers
from student.evaluate.answers import AnswerRequest, answer
from student.evaluate.result import answer_files, read_answers
from student.evaluate.workers import WorkerFailedError, answer_with_workers
from tests.student.evaluate.sti_data import FIVE, ROWS, row, write_sti
from tests.student.tiny_students import WRITERS
from tests.videos import write_video

pytestmark = pytest.mark.usefixtures("ray_cluster")

NUM_QUESTIONS = 14
WORKER = "ray::answer_shard"
CANARY = "c4n4ry-of-the-options"
"""A storage option, which may be a secret."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """STI-Bench, whose long replies leave time for a kill, with a student and videos, one of which is empty."""
    more = [row(10 + number, "000123.mp4", "Pose Estimation", FIVE, "B") for number in range(NUM_QUESTIONS - len(ROWS))]
    folder = write_sti(tmp_path_factory.mktemp("sti"), [*ROWS, *more])
    for name in ("segment_camera_FRONT", "scene0011_00", "000123"):
        write_video(folder / "video" / f"{name}.mp4", num_frames=12, width=32, height=32, fps=2)
    WRITERS["qwen2_5_vl"](folder / "student")
    return folder


def ask(bench: Path, out: Path, **changes: Any) -> AnswerRequest:
    values = {"student": str(bench / "student"), "bench": "sti-bench", "num_frames": 4, "batch_size": 1}
    return AnswerRequest(data=bench, out=out, **values | {"dtype": "float32"} | changes)


@pytest.fixture(scope="module")
def whole(bench: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of one process, with as many threads as Ray gives a worker."""
    out, before = tmp_path_factory.mktemp("whole") / "out", torch.get_num_threads()
    torch.set_num_threads(1)
    answer(ask(bench, out))
    torch.set_num_threads(before)
    return out


def lines(out: Path) -> dict[str, dict[str, Any]]:
    return {line["id"]: line for line in read_answers(out)}


def check_same(out: Path, whole: Path) -> None:
    assert lines(out) == lines(whole)
    for name in ("identity.json", "result.json", "table.md"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def kill_one_that_answers(out: Path, is_over: Callable[[], bool]) -> int:
    """SIGKILL of a worker once there is an answer; how many there were by then, or 0 if it was over before."""
    while not is_over():
        if found := sum(path.read_bytes().count(b"\n") for path in answer_files(out)):
            for victim in psutil.process_iter():
                with contextlib.suppress(psutil.Error):
                    if any(WORKER in word for word in victim.cmdline()):
                        victim.kill()
                        return found
        time.sleep(0.01)
    return 0


def ask_and_kill_one(request: AnswerRequest) -> tuple["Future[Any]", int]:
    """Ask with two workers, one of whom is killed; the result, and how many answers there were when it was killed."""
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(answer_with_workers, request, num_workers=2)
        return asking, kill_one_that_answers(request.out, asking.done)


def test_two_workers_answer_as_one_process_does_and_show_one_progress(bench: Path, whole: Path, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    request = ask(bench, tmp_path / "out", storage_options={"secret": CANARY})
    result = answer_with_workers(request, num_workers=2, on_progress=lambda *step: steps.append(step))
    assert result.num_failed == 1  # the empty video
    check_same(tmp_path / "out", whole)
    assert {path.name: path.read_bytes().count(b"\n") for path in answer_files(tmp_path / "out")} == {
        f"answers-{number}-of-2.jsonl": NUM_QUESTIONS // 2 for number in range(2)
    }
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == ((0, NUM_QUESTIONS), (NUM_QUESTIONS, NUM_QUESTIONS))
    session = Path(ray._private.worker.global_worker.node.get_session_dir_path())
    written = [path for folder in (session, tmp_path) for path in folder.rglob("*") if path.is_file()]
    assert not [path for path in written if CANARY.encode() in path.read_bytes()]


def test_a_killed_workers_shard_is_given_to_another_and_the_answers_are_the_same(
    bench: Path, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asking, num_answers = ask_and_kill_one(ask(bench, tmp_path / "out"))
    assert 0 < num_answers < NUM_QUESTIONS
    assert asking.exception() is None
    assert [record.message.partition("died:")[0][:-2] for record in caplog.records] == ["the worker of shard "]
    check_same(tmp_path / "out", whole)


def test_a_shard_whose_workers_die_too_often_ends_the_command_which_may_go_on(
    bench: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "MAX_DEATHS_OF_A_SHARD", 0)
    asking, num_answers = ask_and_kill_one(ask(bench, tmp_path / "out"))
    assert 0 < num_answers < NUM_QUESTIONS
    with pytest.raises(WorkerFailedError, match=r"1 workers of shard . died, one after the other; is there enough"):
        asking.result()
    answer_with_workers(ask(bench, tmp_path / "out"), num_workers=2)
    check_same(tmp_path / "out", whole)


def test_a_workers_error_of_ours_is_the_commands(bench: Path, tmp_path: Path) -> None:
    request = ask(bench, tmp_path, student="oracle")
    with open(tmp_path / "answers-1-of-2.jsonl", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(RequestError, match=r"answers-1-of-2\.jsonl is being written by another process") as caught:
            answer_with_workers(request, num_workers=2)
    assert type(caught.value) is RequestError
    assert answer_with_workers(request, num_workers=2).num_asked == NUM_QUESTIONS


def test_any_other_error_of_a_worker_is_one_line(bench: Path, tmp_path: Path) -> None:
    (tmp_path / "answers-1-of-2.jsonl").symlink_to(tmp_path / "gone" / "file")
    with pytest.raises(
        WorkerFailedError, match=r"the worker of shard 1 failed: FileNotFoundError: .*-2\.jsonl'"
    ) as caught:
        answer_with_workers(ask(bench, tmp_path, student="oracle"), num_workers=2)
    assert "\n" not in str(caught.value)


def test_what_is_wrong_is_said_before_workers_start(bench: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="sti-bench has no mode 'odd'"):
        answer_with_workers(ask(bench, tmp_path, mode="odd"), num_workers=2)
    with pytest.raises(RequestError, match="--gpus-per-worker 2 is more than a student can use; say 1, or a share"):
        answer_with_workers(ask(bench, tmp_path), num_workers=2, gpus_per_worker=2)
    if not torch.cuda.is_available():
        with pytest.raises(RequestError, match=r"--gpus-per-worker 0\.5 is more than the 0 that Ray sees here"):
            answer_with_workers(ask(bench, tmp_path), num_workers=2, gpus_per_worker=0.5)


def test_the_command_asks_with_workers_that_join_a_ray(
    bench: Path, tmp_path: Path, ray_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bench.parent)  # the workers have another folder
    common = ("constant:B", "--bench", "sti-bench", "--data", bench.name, "--json", "--out")
    command = ("eval", "answers", *common)
    alone = CliRunner().invoke(app, [*command, str(tmp_path / "alone"), "--dtype", "float32"])
    joining = ("--workers", "3", "--gpus-per-worker", "0", "--address", ray_address)
    together = CliRunner().invoke(app, [*command, str(tmp_path / "together"), *joining])
    assert (alone.exit_code, together.exit_code) == (0, 0)
    assert json.loads(together.stdout) == json.loads(alone.stdout)
    assert len(answer_files(tmp_path / "together")) == 3
