"""One forward pass of student and losses, term by term, against the same computed by hand."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from p4dprep.cache import Cache
from student.backbones import load
from student.conversations import Report, read_conversations
from student.data import DataConfig, TrainingData
from student.distilled import Collate, DistilledStudent, TrainingBatch
from student.order import SampleKey
from student.train import build_model
from student.train_config import TrainConfig
from tests.student.train_run import request, write_world

pytestmark = pytest.mark.usefixtures("one_thread")

ARRAYS = ("l4p_latents", "l4p_depth", "l4p_flow", "l4p_motion", "l4p_camray")
CLIPS, STILLS = (0, 1, 2), (5, 6)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@contextmanager
def opened(world: Path, *, talks: bool = True) -> Iterator[TrainingData]:
    report = Report()
    said = read_conversations([str(world / "qa.json")], report) if talks else None
    data = TrainingData(
        Cache.open(str(world / "cache")), said, DataConfig(targets=ARRAYS, media_folder=str(world)), report
    )
    yield data
    data.close()


def made(world: Path, **changes: Any) -> tuple[DistilledStudent, Collate]:
    """A student in evaluation mode, and what makes its batches."""
    config = TrainConfig(**request(world, world / "unused", **changes))
    torch.manual_seed(0)
    backbone = load(config.student, dtype=torch.float32, tpe=config.time_cue == "tpe")
    model = build_model(config, Cache.open(config.cache), backbone)
    return model.eval(), Collate(backbone.adapter, config.time_cue)


def batch_of(world: Path, collate: Collate, *rows: int, talks: bool = True) -> TrainingBatch:
    with opened(world, talks=talks) as data:
        return collate([data[SampleKey(0, row)] for row in rows])


class TestTerms:
    def test_they_are_p4ds_own_in_the_order_of_their_names(self, world: Path) -> None:
        model, collate = made(world)
        batch = batch_of(world, collate, *CLIPS, *STILLS)
        found = model(batch)
        terms = dict(zip(model.term_names, found["terms"].tolist(), strict=True))
        hidden = model.backbone.forward(batch.student, layer=4).hidden_bsc
        assert model.p4d is not None
        assert terms == pytest.approx(model.p4d(hidden, batch.student.video_tokens, batch.targets).log())
        assert not found["terms"].requires_grad

    def test_their_sum_has_the_weights_that_were_asked_for(self, world: Path) -> None:
        asked = {"l4p_depth": 2.0, "l4p_motion": 0.25}
        model, collate = made(world, latent_weight=0.7, explicit_weight=0.2, weights=asked)
        found = model(batch_of(world, collate, *CLIPS))
        terms = dict(zip(model.term_names, found["terms"].tolist(), strict=True))
        planned = {term.target: term.weight for term in model.p4d.config.terms}  # type: ignore[union-attr]
        assert (planned["l4p_depth"], planned["l4p_motion"]) == (2.0, 0.25)
        expected = 0.7 * terms["ld"] + 0.2 * sum(planned[name] * terms[f"ed/{name}"] for name in planned)
        assert float(found["p4d"].detach()) == pytest.approx(expected, rel=1e-5)

    def test_how_it_is_taught_is_as_was_asked_for(self, world: Path) -> None:
        asked = {
            "balance_motion": True,
            "decoder_positions": True,
            "standardise_latents": True,
            "distill_frame": "last",
        }
        model, collate = made(world, **asked)
        config = model.p4d.config  # type: ignore[union-attr]
        assert (config.balanced, config.positions, config.standardised, config.frame) == (True, True, True, "last")
        losses = model.train()(batch_of(world, collate, *CLIPS, *STILLS))
        losses["p4d"].backward()
        gradient = model.p4d.decoder.position_yxc.grad  # type: ignore[union-attr]
        assert gradient is not None
        assert (gradient != 0).any(dim=-1).all()

    def test_sft_is_the_cross_entropy_of_the_answers_tokens(self, world: Path) -> None:
        model, collate = made(world)
        batch = batch_of(world, collate, 0, 1, 5)
        with torch.no_grad(), model.backbone.timed(batch.student):
            logits = model.student(**batch.student.inputs, use_cache=False).logits
        total, count = 0.0, 0
        for row, labels in enumerate(batch.student.labels):
            for place in range(1, len(labels)):
                if labels[place] != -100:
                    total += float(functional.cross_entropy(logits[row, place - 1].double(), labels[place]))
                    count += 1
        assert batch.num_labels == count
        assert batch.num_clips == 2
        with torch.no_grad():
            assert float(model(batch)["sft"]) == pytest.approx(total / count, rel=1e-5)

    def test_stills_alone_have_no_terms_but_gradients_for_every_rank(self, world: Path) -> None:
        model, collate = made(world)
        found = model(batch_of(world, collate, *STILLS))
        assert (float(found["p4d"].detach()), found["terms"].tolist()) == (0.0, [0.0] * len(model.term_names))
        (found["sft"] + found["p4d"]).backward()
        assert all(each.grad is not None for each in model.p4d.parameters() if each.requires_grad)  # type: ignore[union-attr]

    def test_clips_without_text_have_no_sft(self, world: Path) -> None:
        model, collate = made(world, qa=[])
        batch = batch_of(world, collate, *CLIPS, talks=False)
        found = model(batch)
        assert (batch.num_labels, float(found["sft"])) == (0, 0.0)
        assert float(found["p4d"].detach()) > 0

    def test_sft_alone_computes_no_more(self, world: Path) -> None:
        model, collate = made(world, distill="sft")
        found = model(batch_of(world, collate, 0))
        assert model.term_names == ()
        assert (float(found["p4d"]), len(found["terms"])) == (0.0, 0)
        with pytest.raises(ValueError, match="predicts no maps"):
            model.predict(batch_of(world, collate, 0))


class TestGradients:
    @pytest.mark.parametrize(
        ("tuning", "learning"),
        [
            ("projector+llm", ("merger", "language_model", "decoder")),
            ("llm", ("language_model", "decoder")),
            ("lora", ("lora_", "decoder")),
            ("projector+lora", ("merger", "lora_", "decoder")),
            ("all", ("visual", "language_model", "decoder")),
        ],
    )
    def test_they_reach_what_learns_and_nothing_else(self, world: Path, tuning: str, learning: tuple[str, ...]) -> None:
        model, collate = made(world, tune=tuning)
        losses = model.train()(batch_of(world, collate, 0, 5))
        (losses["sft"] + losses["p4d"]).backward()
        reached = {name for name, each in model.named_parameters() if each.grad is not None}
        assert reached == {name for name, each in model.named_parameters() if each.requires_grad}
        assert all(any(part in name for part in learning) for name in reached)
        assert all(any(part in name for name in reached) for part in learning)
        assert not any("frozen_heads" in name for name in reached)
        assert any(name.startswith("p4d.frozen_heads") for name, _ in model.named_parameters())


def test_inputs_and_targets_must_be_of_the_same_samples(world: Path) -> None:
    _, collate = made(world)
    one, other = batch_of(world, collate, 0), batch_of(world, collate, 1)
    with pytest.raises(ValueError, match=r"inputs of .*q-0.* do not fit targets of .*q-1"):
        TrainingBatch(student=one.student, targets=other.targets)


def test_fsdp_is_told_what_a_layer_is(world: Path) -> None:
    model, _ = made(world)
    assert "Qwen2_5_VLDecoderLayer" in model._no_split_modules
