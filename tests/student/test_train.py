"""Whole small runs: the order, what may change at a resume, what is refused, and what a run's folder holds."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from p4dprep.errors import CorruptDataError, FingerprintMismatchError, RequestError
from student import run_folder
from student.train import TrainReport, train
from student.train_config import parse_config
from student.trainer import DistillationTrainer, DivergedError
from tests.student.train_run import request, untimed, write_world

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def run(world: Path, out: Path, *, resume: bool = False, **changes: Any) -> TrainReport:
    return train(parse_config(request(world, out, **{"max_steps": 4, "picture_steps": 0} | changes)), resume=resume)


def weights(out: Path) -> dict[str, torch.Tensor]:
    last = run_folder.last_checkpoint(out)
    return load_file(last / run_folder.STUDENT_WEIGHTS) | load_file(last / run_folder.P4D_WEIGHTS)


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps with micro-batches of 2, read in the process itself; no test may change it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("finished") / "run"
    run(world, out, picture_steps=2)
    torch.set_num_threads(before)
    return out


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


class TestOrder:
    @pytest.mark.parametrize("loader_workers", [1, 2])
    def test_who_reads_changes_nothing(self, world: Path, finished: Path, tmp_path: Path, loader_workers: int) -> None:
        run(world, tmp_path / "run", loader_workers=loader_workers)
        assert untimed(run_folder.read_log(tmp_path / "run")) == untimed(run_folder.read_log(finished))
        found, expected = weights(tmp_path / "run"), weights(finished)
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    @pytest.mark.parametrize("micro_batch_size", [1, 4])
    def test_micro_batches_change_rounding_only(
        self, world: Path, finished: Path, tmp_path: Path, micro_batch_size: int
    ) -> None:
        """The samples' answers differ in length, and some are still images, which have no targets."""
        run(world, tmp_path / "run", micro_batch_size=micro_batch_size)
        found, expected = untimed(run_folder.read_log(tmp_path / "run")), untimed(run_folder.read_log(finished))
        for mine, other in zip(found, expected, strict=True):
            assert mine == pytest.approx(other, rel=1e-4 if mine["step"] > 2 else 1e-5)

    def test_another_seed_is_another_run(self, world: Path, finished: Path, tmp_path: Path) -> None:
        run(world, tmp_path / "run", max_steps=1, save_steps=1, seed=1)
        assert run_folder.read_log(tmp_path / "run")[0]["loss"] != run_folder.read_log(finished)[0]["loss"]


def test_conversations_that_share_a_sample_are_learnt_as_those_that_do_not(world: Path, tmp_path: Path) -> None:
    """One step over all there is: three questions on each of two clips, apart and together."""
    answers = ("2 m", "It is near", "Yes", "The disc moves left and then passes behind the wall", "Yes", "2 m")
    talks = [
        {
            "id": f"t{number}",
            "video": f"clip-{number % 2}",
            "conversations": [{"from": "human", "value": "<video>\nHow far?"}, {"from": "gpt", "value": answer}],
        }
        for number, answer in enumerate(answers)
    ]
    (tmp_path / "talks.json").write_text(json.dumps(talks))
    settings = {"qa": [str(tmp_path / "talks.json")], "max_steps": 1, "save_steps": 1}
    for name, size, batch in (("apart", 1, 6), ("together", 3, 2)):
        report = run(
            world, tmp_path / name, conversations_per_sample=size, batch_size=batch, micro_batch_size=batch, **settings
        )
        assert report.num_samples == batch
    lines = [untimed(run_folder.read_log(tmp_path / name))[0] for name in ("apart", "together")]
    assert lines[1].keys() == lines[0].keys() > {"sft", "ld"}
    assert lines[1] == pytest.approx(lines[0] | {"epoch": 1.0}, rel=1e-4)
    apart, together = weights(tmp_path / "apart"), weights(tmp_path / "together")
    for name, values in apart.items():
        torch.testing.assert_close(together[name], values, rtol=0, atol=1e-4)


def test_a_run_begun_before_a_field_existed_goes_on(world: Path, copied: Path) -> None:
    settings = yaml.safe_load((copied / run_folder.CONFIG).read_text())
    del settings["conversations_per_sample"]
    (copied / run_folder.CONFIG).write_text(yaml.safe_dump(settings))
    shutil.rmtree(run_folder.last_checkpoint(copied))
    assert run(world, copied, resume=True, picture_steps=2).last["step"] == 4


class TestFolder:
    def test_every_line_has_every_term(self, finished: Path) -> None:
        lines = run_folder.read_log(finished)
        assert [line["step"] for line in lines] == [1, 2, 3, 4]
        assert [line["epoch"] for line in lines] == [0.5, 1.0, 1.5, 2.0]
        terms = {"sft", "ld", "ld/tap0", "ld/tap1", "ed/l4p_depth", "ed/l4p_flow", "ed/l4p_motion", "ed/l4p_camray"}
        others = {"step", "epoch", "loss", "grad_norm", "learning_rate", "samples_per_second", "data_wait_fraction"}
        assert all(line.keys() == terms | others for line in lines)
        assert all(np.isfinite(list(line.values())).all() for line in lines)

    def test_the_loss_is_the_papers_sum_of_the_terms(self, finished: Path) -> None:
        for line in run_folder.read_log(finished):
            explicit = sum(value for name, value in line.items() if name.startswith("ed/"))
            assert line["ld"] == pytest.approx((line["ld/tap0"] + line["ld/tap1"]) / 2, rel=1e-5)
            assert line["loss"] > line["sft"] + 0.5 * line["ld"]
            assert explicit > 0

    def test_pictures_come_at_the_start_now_and_then_and_at_the_end(self, finished: Path) -> None:
        names = sorted(path.name for path in (finished / run_folder.PICTURES).iterdir())
        assert names == [f"step-{step:08d}.webp" for step in (0, 2, 4)]

    def test_tensorboard_shows_the_log(self, finished: Path) -> None:
        events = EventAccumulator(str(finished / run_folder.TENSORBOARD))
        events.Reload()
        for name in ("loss", "sft", "ld", "ed/l4p_depth"):
            shown = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
            logged = [(line["step"], pytest.approx(line[name])) for line in run_folder.read_log(finished)]
            assert shown == logged

    def test_only_what_learns_is_saved(self, finished: Path) -> None:
        last = run_folder.last_checkpoint(finished)
        assert not any("visual.blocks" in name for name in load_file(last / run_folder.STUDENT_WEIGHTS))
        names = load_file(last / run_folder.P4D_WEIGHTS)
        assert names.keys() == {
            f"p4d.decoder.{layer}.{kind}" for layer in ("first", "second", "last") for kind in ("weight", "bias")
        }

    def test_secrets_are_written_nowhere(self, world: Path, tmp_path: Path) -> None:
        out = tmp_path / "run"
        run(world, out, max_steps=1, save_steps=1, storage_options={"auto_mkdir": "c4n4ry"})
        assert not [path for path in out.rglob("*") if path.is_file() and b"c4n4ry" in path.read_bytes()]


class TestResume:
    def test_on_nothing_it_starts(self, world: Path, finished: Path, tmp_path: Path) -> None:
        report = run(world, tmp_path / "run", resume=True)
        assert report.num_steps == 4
        assert untimed(run_folder.read_log(tmp_path / "run")) == untimed(run_folder.read_log(finished))

    def test_what_changes_nothing_may_change_and_the_log_goes_on(
        self, world: Path, finished: Path, copied: Path
    ) -> None:
        shutil.rmtree(copied / "checkpoint-4")
        run(world, copied, resume=True, loader_workers=1, picture_steps=3, keep_checkpoints=3)
        assert untimed(run_folder.read_log(copied)) == untimed(run_folder.read_log(finished))
        found, expected = weights(copied), weights(finished)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        events = EventAccumulator(str(copied / run_folder.TENSORBOARD))
        events.Reload()
        assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]

    def test_a_finished_run_is_left_as_it_is(self, world: Path, copied: Path) -> None:
        before = {path: path.read_bytes() for path in copied.rglob("*.jsonl")}
        before |= {path: path.read_bytes() for path in copied.glob("checkpoint-*/*")}
        report = run(world, copied, resume=True)
        assert (report.num_steps, report.last["step"]) == (4, 4)
        assert {path: path.read_bytes() for path in before} == before

    def test_a_run_is_not_trained_over(self, world: Path, copied: Path) -> None:
        with pytest.raises(RequestError, match="holds a run; go on with --resume, or name another folder"):
            run(world, copied)

    def test_a_strangers_folder_is_not_written_into(self, world: Path, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_text("")
        with pytest.raises(RequestError, match="holds something that is no run"):
            run(world, tmp_path, resume=True)

    @pytest.mark.parametrize(
        ("changes", "named"),
        [
            ({"seed": 1}, "other seed;"),
            ({"learning_rate": 1e-4, "batch_size": 2}, "other batch_size, learning_rate;"),
            ({"max_steps": 6}, "other max_steps, steps;"),
            ({"decoder_width": 8}, "other decoder_width;"),
        ],
    )
    def test_other_settings_are_named(self, world: Path, copied: Path, changes: dict[str, Any], named: str) -> None:
        with pytest.raises(FingerprintMismatchError, match=named):
            run(world, copied, resume=True, **changes)

    @pytest.mark.parametrize("what", ["cache", "student", "qa.json"])
    def test_other_content_in_the_same_place_is_named(
        self, world: Path, copied: Path, tmp_path: Path, what: str
    ) -> None:
        other = Path(shutil.copytree(world, tmp_path / "other"))
        run(other, copied, resume=True)  # another place of the same things is the same run
        named = {"cache": "cache group l4p", "student": "student", "qa.json": "conversations"}[what]
        if what == "qa.json":
            (other / what).write_text((world / what).read_text().replace("near", "far"))
        else:
            changed = write_world(tmp_path / "changed", seed=1)
            shutil.rmtree(other / what)
            shutil.copytree(changed / what, other / what)
        with pytest.raises(FingerprintMismatchError, match=f"other .*{named}"):
            run(other, copied, resume=True)


def test_kept_frames_are_part_of_what_a_run_is(finished: Path) -> None:
    """Other ones, or of another size, would go unnoticed otherwise."""
    assert "cache group frames" in json.loads((finished / run_folder.IDENTITY).read_text())


class TestRefused:
    @pytest.mark.parametrize(
        ("trainer", "message"),
        [
            ({"learning_rate": 1.0}, "trainer.learning_rate has a field of its own; use learning_rate"),
            ({"push_to_hub": True}, "trainer.push_to_hub is refused"),
            ({"no_such": 1}, "trainer: .*no_such"),
            (
                {"deepspeed": {"zero_optimization": {"stage": 2}}},
                "trainer.deepspeed needs the package deepspeed, which",
            ),
            ({"fsdp": True}, "trainer.fsdp shards a student over several GPUs, and this run has no two"),
            ({"lr_scheduler_type": "square"}, "trainer: square is not a valid SchedulerType"),
        ],
    )
    def test_arguments_of_transformers(
        self, world: Path, tmp_path: Path, trainer: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(RequestError, match=message) as caught:
            run(world, tmp_path / "run", trainer={"use_cpu": True} | trainer)
        assert "\n" not in str(caught.value)

    def test_what_was_refused_may_be_asked_for_again_differently(self, world: Path, tmp_path: Path) -> None:
        with pytest.raises(RequestError, match="distill_layer 9"):
            run(world, tmp_path / "run", distill_layer=9)
        assert run(world, tmp_path / "run", distill_layer=3, max_steps=1).num_steps == 1

    def test_a_loss_that_is_no_number_stops_the_run(self, world: Path, tmp_path: Path) -> None:
        with pytest.raises(DivergedError, match=r"the loss is (nan|inf) at step \d: lower learning_rate") as caught:
            run(world, tmp_path / "run", learning_rate=1e30, warmup_fraction=0.0, max_grad_norm=0.0)
        assert "\n" not in str(caught.value)
        assert not [path for path in run_folder.checkpoints(tmp_path / "run") if run_folder.step_of(path) > 1]

    def test_a_gradient_that_is_no_number_leaves_no_checkpoint(
        self, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        step = DistillationTrainer.training_step

        def spoilt(trainer: DistillationTrainer, *given: Any) -> torch.Tensor:
            loss = step(trainer, *given)
            next(each.grad for each in trainer.model.parameters() if each.grad is not None).fill_(torch.nan)
            return loss

        monkeypatch.setattr(DistillationTrainer, "training_step", spoilt)
        with pytest.raises(DivergedError, match="the gradient is nan at step 1: lower learning_rate"):
            run(world, tmp_path / "run", save_steps=1)
        assert run_folder.checkpoints(tmp_path / "run") == []

    def test_pictures_alone_have_nothing_to_distil(self, world: Path, tmp_path: Path) -> None:
        talks = json.loads((world / "qa.json").read_text())
        stills = tmp_path / "stills.json"
        stills.write_text(json.dumps([talk for talk in talks if "image" in talk]))
        with pytest.raises(RequestError, match="no sample is of a clip with targets, so there is nothing to distil"):
            run(world, tmp_path / "run", qa=[str(stills)])
        assert run(world, tmp_path / "sft", qa=[str(stills)], distill="sft", max_steps=1).num_samples == 2

    def test_a_layer_that_is_not_there(self, world: Path, tmp_path: Path) -> None:
        with pytest.raises(RequestError, match=r"distill_layer 9 does not exist; .* has 4 layers"):
            run(world, tmp_path / "run", distill_layer=9)

    def test_a_weight_of_what_is_not_learnt(self, world: Path, tmp_path: Path) -> None:
        with pytest.raises(RequestError, match="weights or losses name 'l4p_nothing', which is no map that is learnt"):
            run(world, tmp_path / "run", weights={"l4p_nothing": 1.0})


class TestSwitches:
    def test_without_text_only_the_cache_teaches(self, world: Path, tmp_path: Path) -> None:
        report = run(world, tmp_path / "run", qa=[], max_steps=2)
        assert (report.num_samples, report.last["sft"]) == (5, 0)
        assert report.last["ld"] > 0

    def test_text_alone_reads_no_target(self, world: Path, tmp_path: Path) -> None:
        bare = Path(shutil.copytree(world, tmp_path / "bare"))
        for values in bare.glob("cache/l4p_*/c.*"):
            values.unlink()
        report = run(bare, tmp_path / "run", distill="sft", max_steps=2)
        assert not any(name.startswith(("ld", "ed/")) for name in report.last)
        with pytest.raises(CorruptDataError, match="l4p"):
            run(bare, tmp_path / "other", max_steps=2)

    def test_gradient_checkpointing_changes_memory_only(self, world: Path, finished: Path, tmp_path: Path) -> None:
        run(world, tmp_path / "run", max_steps=2, gradient_checkpointing=True)
        found, expected = run_folder.read_log(tmp_path / "run"), run_folder.read_log(finished)[:2]
        for name in ("loss", "grad_norm"):
            assert [line[name] for line in found] == pytest.approx([line[name] for line in expected], rel=1e-5)

    def test_numbers_too_small_to_be_fast_count_as_zero_while_it_trains(
        self, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        step, products = DistillationTrainer.training_step, []

        def watched(trainer: DistillationTrainer, *given: Any) -> torch.Tensor:
            products.append(float(torch.tensor([1e-30]) * torch.tensor([1e-9])))
            return step(trainer, *given)

        monkeypatch.setattr(DistillationTrainer, "training_step", watched)
        run(world, tmp_path / "run", max_steps=1, save_steps=1)
        assert products
        assert not any(products)
        assert float(torch.tensor([1e-30]) * torch.tensor([1e-9])) > 0

    def test_bfloat16_trains_on_a_cpu(self, world: Path, finished: Path, tmp_path: Path) -> None:
        run(world, tmp_path / "run", max_steps=2, precision="bf16")
        found, expected = run_folder.read_log(tmp_path / "run"), run_folder.read_log(finished)
        assert found[0]["loss"] == pytest.approx(expected[0]["loss"], rel=0.02)
        assert found[0]["loss"] != expected[0]["loss"]
        assert all(values.dtype == torch.float32 for values in weights(tmp_path / "run").values())


def test_the_report_is_the_runs_end(finished: Path) -> None:
    report = json.loads((finished / run_folder.REPORT).read_text())
    assert (report["num_steps"], report["num_samples"], report["num_left_out"]) == (4, 7, 0)
    assert report["last"] == run_folder.read_log(finished)[-1]
