"""From a run's folder to a plain checkpoint: the base's class and names, the trained numbers, nothing of ours."""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from p4dprep.errors import CorruptDataError, FingerprintMismatchError, RequestError, StorageError
from student import run_folder
from student.backbones import FAMILIES, Backbone, StudentBatch, load
from student.backbones.loading import time_cue_of, weights_digest
from student.cues import TimeCue
from student.export import export, load_trained
from student.folders import whole_folder
from student.train_config import TrainConfig, parse_config
from student.tuning import Tuning, trainable_state, tune
from tests.student.test_tuning import batch_of, logits, take_steps
from tests.student.tiny_students import WRITERS
from tests.student.train_run import request, write_world

pytestmark = pytest.mark.usefixtures("one_thread")

WAYS = [*((family, "projector+lora") for family in WRITERS), ("internvl", "all"), ("qwen2_5_vl", "all")]
"""Every family, and all parameters with tied and with separate embeddings."""


def train(base: Path, run: Path, how: Tuning, num_steps: int = 2, **fields: Any) -> Backbone:
    """A run's folder as `p4dprep train` leaves it, of a few real steps; the student, adapters still in place."""
    config = TrainConfig(cache="cache", student=str(base), out=str(run), tune=how, lora_rank=2, **fields)
    student = load(base, dtype=torch.float32, tpe=config.time_cue == "tpe")
    tune(student, how, lora_rank=2)
    take_steps(student, batch_of(student), num_steps)
    checkpoint = run / f"checkpoint-{num_steps}"
    checkpoint.mkdir(parents=True)
    state = {name: each.contiguous() for name, each in trainable_state(student.model).items()}
    save_file(state, checkpoint / run_folder.STUDENT_WEIGHTS)
    run_folder.mark_complete(checkpoint)
    (run / run_folder.CONFIG).write_text(yaml.safe_dump(config.settings()))
    (run / run_folder.IDENTITY).write_text(json.dumps({"student": weights_digest(base)}))
    return student


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny model of a family, written once."""

    @cache
    def write(family: str) -> Path:
        if requirement := FAMILIES[family].requirement:
            pytest.importorskip(requirement)
        return WRITERS[family](tmp_path_factory.mktemp(family))

    return write


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """One family is enough for what does not depend on it; this one ties its embeddings."""
    return WRITERS["internvl"](tmp_path / "base")


def stock(folder: Path, **options: Any) -> Any:
    """The folder's model as a user without this project loads it."""
    from transformers import AutoModelForImageTextToText

    model, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


def on_disk(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (each.shape, each.dtype) for name, each in load_file(folder / "model.safetensors").items()}


def is_tied(model: Any) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


@torch.no_grad()
def num_flops(model: Any, batch: StudentBatch) -> int:
    with FlopCounterMode(display=False) as counter:
        model(**batch.inputs, use_cache=False)
    return counter.get_total_flops()


@pytest.mark.parametrize(("family", "how"), WAYS)
def test_an_export_is_the_bases_class_and_names_with_the_trained_students_logits(
    bases: Callable[[str], Path], family: str, how: Tuning, tmp_path: Path
) -> None:
    base = bases(family)
    trained = train(base, tmp_path / "run", how)
    batch = batch_of(trained)
    report = export(tmp_path / "run", tmp_path / "out")
    before, after = stock(base), stock(tmp_path / "out")
    assert type(after).__name__ == type(before).__name__ == report.model_class
    assert on_disk(tmp_path / "out") == on_disk(base)
    numbers = [sum(each.numel() for each in model.parameters()) for model in (before, after)]
    assert numbers == [report.num_parameters] * 2
    assert is_tied(after) == is_tied(before)
    ours = load(tmp_path / "out")
    assert ours.tpe
    torch.testing.assert_close(logits(ours, batch), logits(load_trained(tmp_path / "run"), batch), rtol=0, atol=0)
    tolerance = {"rtol": 0, "atol": 0} if how == "all" else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(logits(ours, batch), logits(trained, batch), **tolerance)
    assert (logits(ours, batch) - logits(load(base, tpe=True), batch)).abs().max() > 0.05
    flops = [num_flops(model, batch) for model in (before, after)]
    assert flops[0] > 1e6
    assert abs(flops[1] / flops[0] - 1) < 1e-3


def test_a_run_of_the_trainer_itself_is_exported(tmp_path: Path) -> None:
    from student.train import train as train_for_real

    world, run = write_world(tmp_path, num_clips=2, num_stills=0), tmp_path / "run"
    asked = request(world, run, tune="projector+lora", max_steps=2, picture_steps=0, micro_batch_size=1, batch_size=2)
    train_for_real(parse_config(asked))
    report = export(run, tmp_path / "out")
    assert (report.checkpoint.name, report.time_cue) == ("checkpoint-2", "tpe")
    before, after = (load_file(folder / "model.safetensors") for folder in (world / "student", report.out))
    changed = {name for name, value in before.items() if not torch.equal(after[name], value)}
    projector = {name for name in before if name.startswith("visual.merger.")}
    linear = {name for name in before if name.startswith("model.layers.") and name.endswith("_proj.weight")}
    assert changed == projector | linear


def test_everything_beside_the_weights_is_the_bases_own_but_for_one_key(plain: Path, tmp_path: Path) -> None:
    from transformers import AutoProcessor

    train(plain, tmp_path / "run", "llm", time_cue="tpe")
    report = export(tmp_path / "run", tmp_path / "out")
    for file in plain.glob("*.j*"):
        if file.name != "config.json":
            assert (report.out / file.name).read_bytes() == file.read_bytes()
    configs = [json.loads((folder / "config.json").read_text()) for folder in (plain, report.out)]
    assert configs[1] == configs[0] | {"p4dprep": {"time_cue": "tpe"}}
    assert {path.name for path in report.out.iterdir()} == {path.name for path in plain.iterdir()}
    assert report.size_bytes == sum(path.stat().st_size for path in report.out.iterdir())
    processors = [AutoProcessor.from_pretrained(folder) for folder in (plain, report.out)]
    assert processors[1].chat_template == processors[0].chat_template
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_base_in_bfloat16_gives_an_export_in_bfloat16(plain: Path, tmp_path: Path) -> None:
    half = load(plain, dtype=torch.bfloat16)
    half.model.save_pretrained(tmp_path / "half")
    for file in plain.glob("*.j*"):
        if file.name != "config.json":
            shutil.copyfile(file, tmp_path / "half" / file.name)
    train(tmp_path / "half", tmp_path / "run", "projector+lora")
    report = export(tmp_path / "run", tmp_path / "out")
    assert report.dtype == "bfloat16"
    assert on_disk(report.out) == on_disk(tmp_path / "half")
    exact, written = load_trained(tmp_path / "run").model.state_dict(), load(report.out).model.state_dict()
    for name, value in exact.items():
        assert value.dtype == torch.float32
        assert torch.equal(written[name], value.bfloat16())


@pytest.mark.parametrize("cue", ["none", "marks", "prompt", "tpe"])
def test_the_time_cue_travels_with_the_student(plain: Path, tmp_path: Path, cue: TimeCue) -> None:
    train(plain, tmp_path / "run", "llm", num_steps=1, time_cue=cue)
    export(tmp_path / "run", tmp_path / "out")
    for student in (load(tmp_path / "out"), load_trained(tmp_path / "run")):
        assert student.tpe == (cue == "tpe")
        assert time_cue_of(student.adapter) == cue
    assert load(tmp_path / "out", tpe=True).tpe
    assert not load(tmp_path / "out", tpe=False).tpe


def test_a_base_says_nothing_of_a_time_cue_and_nonsense_is_refused(plain: Path) -> None:
    assert time_cue_of(load(plain).adapter) == "none"
    config = json.loads((plain / "config.json").read_text())
    for nonsense in ({"time_cue": "clock"}, "tpe"):
        (plain / "config.json").write_text(json.dumps(config | {"p4dprep": nonsense}))
        with pytest.raises(
            RequestError, match=r"says p4dprep: .*; it must hold a time_cue, one of none, marks, prompt"
        ):
            load(plain)


def test_an_export_can_be_trained_and_exported_again(plain: Path, tmp_path: Path) -> None:
    train(plain, tmp_path / "first", "all", num_steps=1, time_cue="none")
    export(tmp_path / "first", tmp_path / "out")
    train(tmp_path / "out", tmp_path / "second", "lora", num_steps=1, time_cue="tpe")
    export(tmp_path / "second", tmp_path / "again")
    assert load(tmp_path / "again").tpe
    assert on_disk(tmp_path / "again") == on_disk(plain)


def test_the_step_asked_for_is_the_one_exported(plain: Path, tmp_path: Path) -> None:
    for num_steps in (1, 2):
        train(plain, tmp_path / "run", "llm", num_steps)
    assert export(tmp_path / "run", tmp_path / "last").checkpoint.name == "checkpoint-2"
    assert export(tmp_path / "run", tmp_path / "first", step=1).checkpoint.name == "checkpoint-1"
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("first", "last")]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    with pytest.raises(RequestError, match=r"run holds no whole checkpoint of step 3; it has \[1, 2\]"):
        export(tmp_path / "run", tmp_path / "third", step=3)


def test_what_has_no_plain_checkpoint_is_refused(plain: Path, tmp_path: Path) -> None:
    train(plain, tmp_path / "run", "llm", num_steps=1, strategy="4d-pe", qa=("qa.json",))
    with pytest.raises(RequestError, match=r"4d-pe, which pays at inference: .* evaluate the run itself"):
        export(tmp_path / "run", tmp_path / "out")
    with pytest.raises(RequestError, match="base is no run of p4dprep train"):
        export(plain, tmp_path / "out")
    with pytest.raises(RequestError, match=r"base exists and is not an empty folder; name a new one"):
        export(tmp_path / "run", plain)
    (tmp_path / "run" / run_folder.CONFIG).write_text("tune: lora\n")
    with pytest.raises(RequestError, match=r"config\.yaml: the request is not valid: cache: Field required"):
        export(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_the_runs_are_refused(plain: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(plain, run, "lora", num_steps=1)
    file = run / "checkpoint-1" / run_folder.STUDENT_WEIGHTS
    whole = file.read_bytes()
    file.write_bytes(b"?" * len(whole))
    with pytest.raises(CorruptDataError, match=r"student\.safetensors: cannot be read"):
        load_trained(run)
    file.write_bytes(whole)
    settings = yaml.safe_load((run / run_folder.CONFIG).read_text())
    (run / run_folder.CONFIG).write_text(yaml.safe_dump(settings | {"lora_rank": 4}))
    with pytest.raises(CorruptDataError, match=r"student\.safetensors: these weights .* must be those of the run"):
        load_trained(run)
    WRITERS["internvl"](plain, seed=1)
    with pytest.raises(FingerprintMismatchError, match=r"has other weights now than when .*run was trained with it"):
        load_trained(run)


def write_to_a_full_disk(folder: Path) -> None:
    with whole_folder(folder) as partial, open("/dev/full", "w") as full:
        (partial / "weights").touch()
        full.write("more")


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "left by a kill").touch()
    with pytest.raises(StorageError, match=r"cannot write .*out: .*No space left on device"):
        write_to_a_full_disk(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    with whole_folder(tmp_path / "out") as folder:
        assert list((tmp_path / "out").iterdir()) == []
        (folder / "weights").touch(mode=0o600)
    assert (tmp_path / "out" / "weights").stat().st_mode & 0o777 == (tmp_path / "out").stat().st_mode & 0o666
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "weights"]
