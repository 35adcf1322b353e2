"""A run's folder: a checkpoint is whole or not there, and the log survives its writer's death."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p4dprep.errors import CorruptDataError, RequestError
from student import run_folder


def write_checkpoint(run: Path, step: int, *, complete: bool = True) -> Path:
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "student.safetensors").write_bytes(b"w" * step)
    (folder / "optimizer.pt").write_bytes(b"o" * 2 * step)
    if complete:
        run_folder.mark_complete(folder)
    return folder


class TestCheckpoints:
    def test_they_rise_by_step_and_not_by_name(self, tmp_path: Path) -> None:
        for step in (100, 9, 20):
            write_checkpoint(tmp_path, step)
        assert [run_folder.step_of(path) for path in run_folder.checkpoints(tmp_path)] == [9, 20, 100]
        assert run_folder.last_checkpoint(tmp_path).name == "checkpoint-100"
        assert run_folder.last_checkpoint(tmp_path, 20).name == "checkpoint-20"

    def test_one_without_its_record_is_not_there(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path, 2)
        write_checkpoint(tmp_path, 4, complete=False)
        assert run_folder.last_checkpoint(tmp_path).name == "checkpoint-2"

    @pytest.mark.parametrize("name", ["student.safetensors", "optimizer.pt", "complete.json"])
    @pytest.mark.parametrize("harm", ["gone", "short", "long"])
    def test_one_that_was_harmed_is_not_there(self, tmp_path: Path, name: str, harm: str) -> None:
        path = write_checkpoint(tmp_path, 2) / name
        content = path.read_bytes()
        path.unlink() if harm == "gone" else path.write_bytes(content[:-1] if harm == "short" else content + b"}")
        if (name, harm) == ("complete.json", "short"):  # its last line break
            path.write_bytes(content[:-2])
        assert run_folder.checkpoints(tmp_path) == []

    @pytest.mark.parametrize("record", ["[]", "{}", '{"size_bytes": 3}', '{"size_bytes": []}', "\x00"])
    def test_a_record_that_says_something_else_is_none(self, tmp_path: Path, record: str) -> None:
        (write_checkpoint(tmp_path, 2) / run_folder.COMPLETE).write_text(record)
        assert run_folder.checkpoints(tmp_path) == []

    def test_what_a_kill_left_is_deleted_and_nothing_else(self, tmp_path: Path) -> None:
        kept, half = write_checkpoint(tmp_path, 2), write_checkpoint(tmp_path, 4, complete=False)
        (tmp_path / "checkpoint-best").mkdir()
        (tmp_path / "checkpoint-6").write_text("a file")
        run_folder.remove_incomplete(tmp_path)
        assert kept.is_dir()
        assert not half.exists()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-6", "checkpoint-best"]

    def test_a_step_that_is_not_there_is_said(self, tmp_path: Path) -> None:
        with pytest.raises(RequestError, match="holds no whole checkpoint; it has none at all"):
            run_folder.last_checkpoint(tmp_path)
        write_checkpoint(tmp_path, 2)
        with pytest.raises(RequestError, match=r"holds no whole checkpoint of step 3; it has \[2\]"):
            run_folder.last_checkpoint(tmp_path, 3)

    def test_the_record_is_written_after_everything_is_on_disk(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder, done = write_checkpoint(tmp_path, 2, complete=False), list[str]()
        fsync, replace = os.fsync, os.replace

        def synced(descriptor: int) -> None:
            done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
            fsync(descriptor)

        def replaced(source: Any, target: Any) -> None:
            done.append(f"-> {Path(target).name}")
            replace(source, target)

        monkeypatch.setattr(os, "fsync", synced)
        monkeypatch.setattr(os, "replace", replaced)
        run_folder.mark_complete(folder)
        record = ".complete.json.partial"
        assert done == ["optimizer.pt", "student.safetensors", record, "-> complete.json", tmp_path.name]


class TestLog:
    @given(cut=st.integers(min_value=0))
    def test_however_much_of_its_end_is_lost_the_rest_is_read(
        self, tmp_path_factory: pytest.TempPathFactory, cut: int
    ) -> None:
        run, lines = tmp_path_factory.mktemp("run"), [{"step": step, "loss": 1 / step} for step in (1, 2, 3)]
        run_folder.write_log(run, lines[:1])
        for line in lines[1:]:
            run_folder.append_log(run, line)
        content = (run / run_folder.LOG).read_bytes()
        (run / run_folder.LOG).write_bytes(content[: cut % (len(content) + 1)])
        found = run_folder.read_log(run)
        assert found == lines[: len(found)]
        assert len(found) == content[: cut % (len(content) + 1)].count(b"\n")

    def test_a_damaged_line_is_said(self, tmp_path: Path) -> None:
        (tmp_path / run_folder.LOG).write_text('{"step": 1}\nnonsense\n')
        with pytest.raises(CorruptDataError, match=r"log\.jsonl"):
            run_folder.read_log(tmp_path)

    def test_before_the_first_line_there_is_none(self, tmp_path: Path) -> None:
        assert run_folder.read_log(tmp_path) == []


class TestSettings:
    def test_a_folder_that_is_no_run_is_said(self, tmp_path: Path) -> None:
        with pytest.raises(RequestError, match="is no run of p4dprep train"):
            run_folder.read_settings(tmp_path)
        (tmp_path / run_folder.CONFIG).write_text("- 1\n")
        with pytest.raises(RequestError, match="holds no settings"):
            run_folder.read_settings(tmp_path)

    def test_a_run_has_begun_when_it_has_a_log(self, tmp_path: Path) -> None:
        (tmp_path / run_folder.IDENTITY).write_text(json.dumps({"steps": "12"}))
        assert (run_folder.has_begun(tmp_path), run_folder.num_steps(tmp_path)) == (False, 12)
        run_folder.write_log(tmp_path, [])
        assert run_folder.has_begun(tmp_path)

    def test_a_file_is_replaced_whole(self, tmp_path: Path) -> None:
        for text in ("one\n", "two\n"):
            run_folder.write_atomically(tmp_path / "report.json", text)
        assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
        assert (tmp_path / "report.json").read_text() == "two\n"
