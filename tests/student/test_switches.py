"""Every switch of the paper's comparisons trains, and its log line adds up to its loss."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from p4dprep.cache import Cache
from p4dprep.errors import RequestError
from student import run_folder
from student.p4d_config import PAPER_WEIGHTS
from student.rivals import make_rival
from student.train import train
from student.train_config import parse_config
from tests.student.train_run import request, write_world

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*mtime:UserWarning")]

EXPLICIT = {f"ed/l4p_{name}": 0.1 * weight for name, weight in PAPER_WEIGHTS.items()}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("switches") / "world")


def log_of(world: Path, run: Path, **changes: Any) -> dict[str, float]:
    """The last log line of a run of two steps."""
    short = {"max_steps": 2, "save_steps": 2, "picture_steps": 0}
    report = train(parse_config(request(world, run, **short | changes)))
    return dict(report.last)


@pytest.mark.parametrize(
    ("distill", "weights"),
    [
        ("ld", {"ld": 0.5}),
        ("ed", EXPLICIT),
        ("ld+ed", {"ld": 0.5} | EXPLICIT),
        ("depth", {"ed/l4p_depth": 0.1}),
        ("flow", {"ed/l4p_flow": 0.01}),
        ("motion", {"ed/l4p_motion": 0.005}),
        ("camray", {"ed/l4p_camray": 0.005}),
    ],
)
def test_the_loss_is_the_papers_sum_of_what_is_learnt_and_the_rest_is_logged_all_the_same(
    world: Path, tmp_path: Path, distill: str, weights: Mapping[str, float]
) -> None:
    line = log_of(world, tmp_path, distill=distill)
    assert line["loss"] == pytest.approx(line["sft"] + sum(weights[name] * line[name] for name in weights), rel=1e-5)
    assert all(line[name] > 0 for name in ("ld", "ld/tap0", "ld/tap1", *EXPLICIT))


def test_text_alone_learns_from_text_alone(world: Path, tmp_path: Path) -> None:
    line = log_of(world, tmp_path, distill="sft")
    assert line["loss"] == pytest.approx(line["sft"], rel=1e-6)
    assert not line.keys() & {"ld", *EXPLICIT}


@pytest.mark.parametrize("strategy", ["4d-concat", "4d-pe"])
def test_a_rival_learns_what_it_adds_to_the_student(world: Path, tmp_path: Path, strategy: str) -> None:
    line = log_of(world, tmp_path, strategy=strategy)
    assert line["loss"] == pytest.approx(line["sft"], rel=1e-6)
    learnt = load_file(run_folder.last_checkpoint(tmp_path) / run_folder.P4D_WEIGHTS)
    assert learnt
    assert all(name.startswith("rival.") for name in learnt)


def test_a_rival_takes_standardised_latents_from_its_corpus(world: Path, tmp_path: Path) -> None:
    log_of(world, tmp_path, strategy="4d-pe", standardise_latents=True, learning_rate=1e-9)
    learnt = load_file(run_folder.last_checkpoint(tmp_path) / run_folder.P4D_WEIGHTS)
    rival = make_rival("4d-pe", Cache.open(str(world / "cache")), hidden_size=1, standardised=True)
    rival.standardise(Cache.open(str(world / "cache")))
    torch.testing.assert_close(learnt["rival.norm.weight"], rival.norm.weight.detach())
    torch.testing.assert_close(learnt["rival.norm.bias"], rival.norm.bias.detach())
    assert not torch.equal(rival.norm.bias, torch.zeros_like(rival.norm.bias))


def test_a_rival_reads_only_the_targets_that_are_named(world: Path, tmp_path: Path) -> None:
    log_of(world, tmp_path / "named", strategy="4d-pe", targets=["l4p_latents"])
    with pytest.raises(RequestError, match=r"none of them latents|asked for were \['l4p_depth'\]"):
        log_of(world, tmp_path / "none", strategy="4d-pe", targets=["l4p_depth"])


@pytest.mark.parametrize("time_cue", ["none", "prompt"])
def test_another_time_cue_gives_another_loss(world: Path, tmp_path: Path, time_cue: str) -> None:
    cued = log_of(world, tmp_path / "cued", time_cue=time_cue)
    assert cued["sft"] != log_of(world, tmp_path / "tpe")["sft"]


def test_an_inner_layer_is_distilled_instead_of_the_last(world: Path, tmp_path: Path) -> None:
    lines = {layer: log_of(world, tmp_path / str(layer), distill="ld", distill_layer=layer) for layer in (1, 4)}
    assert lines[4] != lines[1]
    last = log_of(world, tmp_path / "last", distill="ld")
    assert (last["ld"], last["loss"]) == (lines[4]["ld"], lines[4]["loss"])


@pytest.mark.parametrize("tune", ["llm", "lora", "projector+lora", "all"])
def test_every_way_to_tune_trains(world: Path, tmp_path: Path, tune: str) -> None:
    log_of(world, tmp_path, tune=tune)
    learnt = load_file(run_folder.last_checkpoint(tmp_path) / run_folder.STUDENT_WEIGHTS)
    assert any("lora" in name for name in learnt) == ("lora" in tune)
    assert any("visual.merger" in name for name in learnt) == (tune in ("projector+lora", "all"))
    assert any("visual.blocks" in name for name in learnt) == (tune == "all")
