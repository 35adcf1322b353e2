"""The trainer itself: what transformers is told, what stays as it was, and one loss whatever the micro-batches."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from p4dprep.cache import Cache
from p4dprep.errors import RequestError
from student.backbones import load
from student.conversations import Report, read_conversations
from student.data import DataConfig, TrainingData
from student.distilled import Collate
from student.order import BatchOrder
from student.train import build_model
from student.train_config import TrainConfig, parse_config
from student.trainer import DistillationTrainer, training_arguments
from tests.student.test_distilled import ARRAYS
from tests.student.train_run import request, write_world

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@contextmanager
def made(world: Path, out: Path, **changes: Any) -> Iterator[DistillationTrainer]:
    """A trainer of two steps."""
    config = parse_config(request(world, out, max_steps=2, **changes))
    report, cache = Report(), Cache.open(config.cache)
    talks = read_conversations(config.qa, report) if config.qa else None
    data = TrainingData(cache, talks, DataConfig(targets=ARRAYS, media_folder=str(world)), report)
    torch.manual_seed(0)
    backbone = load(config.student, dtype=torch.float32, tpe=True)
    model = build_model(config, cache, backbone)
    order = BatchOrder(num_samples=len(data), batch_size=config.batch_size)
    arguments = training_arguments(config, 2, 1, use_bf16=False)
    yield DistillationTrainer(model, arguments, data, order, Collate(backbone.adapter, "tpe"))
    data.close()


def bytes_of(trainer: DistillationTrainer) -> dict[str, Tensor]:
    return {name: values.detach().clone() for name, values in trainer.distilled.state_dict().items()}


@pytest.mark.parametrize("tuning", ["projector+llm", "llm", "projector+lora"])
def test_training_moves_what_learns_and_no_byte_of_anything_else(world: Path, tmp_path: Path, tuning: str) -> None:
    with made(world, tmp_path, tune=tuning, warmup_fraction=0.0) as trainer:
        before = bytes_of(trainer)
        trainer.train()
        after = bytes_of(trainer)
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        tied = {"student.lm_head.weight"} if "student.lm_head.weight" in before else set()
        assert moved <= trainer.trainable | tied
        # The second halves of LoRA's adapters start at zero, and so the first ones learn nothing in the first step.
        assert len(moved) > 0.9 * len(trainer.trainable)
        assert not any(".visual.blocks." in name or "frozen_heads" in name for name in moved)
        assert any("frozen_heads" in name for name in before)


@pytest.mark.parametrize("qa", [True, False], ids=["with text", "without text"])
def test_gradients_of_a_step_are_the_same_however_it_is_cut(world: Path, tmp_path: Path, qa: bool) -> None:
    found = []
    for micro_batch_size in (4, 2, 1):
        changes: dict[str, Any] = {} if qa else {"qa": []}
        with made(world, tmp_path, micro_batch_size=micro_batch_size, **changes) as trainer:
            trainer.create_optimizer_and_scheduler(2)
            batches, totals = trainer.get_batch_samples(
                iter(trainer.get_train_dataloader()), 4 // micro_batch_size, torch.device("cpu")
            )
            trainer.distilled.train()
            loss = sum(float(trainer.training_step(trainer.distilled, batch, totals)) for batch in batches)
            grads = {name: each.grad for name, each in trainer.distilled.named_parameters() if each.grad is not None}
            assert grads.keys() == trainer.trainable - _unused(trainer, qa)
            found.append((loss, grads))
    (loss, grads), *others = found
    for other_loss, other_grads in others:
        assert other_loss == pytest.approx(loss, rel=1e-5)
        for name, values in grads.items():
            torch.testing.assert_close(other_grads[name], values, rtol=1e-3, atol=1e-5 * float(values.abs().max()))


def _unused(trainer: DistillationTrainer, qa: bool) -> set[str]:
    """Without text nobody reads the language head; here it is tied to the embeddings."""
    return set() if qa else {name for name in trainer.trainable if "lm_head" in name}


class TestArguments:
    def make(self, **changes: Any) -> Any:
        values = {"cache": "c", "student": "s", "out": "run", "trainer": {"use_cpu": True}}
        config: TrainConfig = parse_config(values | changes)
        return training_arguments(config, 100, 2, use_bf16=False)

    def test_they_are_the_requests(self) -> None:
        found = self.make(batch_size=24, micro_batch_size=3, workers=2, weight_decay=0.1, seed=5)
        assert (found.max_steps, found.warmup_steps, found.gradient_accumulation_steps) == (100, 3, 4)
        assert (found.seed, found.weight_decay, found.save_total_limit) == (5, 0.1, 2)
        assert found.lr_scheduler_type == "cosine"
        assert self.make(trainer={"use_cpu": True, "optim": "sgd"}).optim == "sgd"

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("seed", "trainer.seed has a field of its own; use seed"),
            ("gradient_accumulation_steps", "has a field of its own; use batch_size and micro_batch_size"),
            ("resume_from_checkpoint", "has a field of its own; use --resume"),
            ("hub_token", "trainer.hub_token is refused: the run fixes its order, checkpoints and loss itself"),
            ("save_only_model", "trainer.save_only_model is refused"),
            ("not_an_argument", "trainer: .*unexpected keyword argument 'not_an_argument'"),
        ],
    )
    def test_others_are_refused(self, name: str, message: str) -> None:
        with pytest.raises(RequestError, match=message):
            self.make(trainer={"use_cpu": True, name: 1})
