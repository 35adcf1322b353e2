"""An ablation: every arm and seed trained and asked once, one table with intervals, and nothing done twice."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from p4dprep.errors import RequestError
from student import ablate as module
from student.ablate import REPORT, TABLE, AblationConfig, Examination, ablate, parse_config
from student.evaluate import registry
from tests.student.evaluate.tiny_bench import KINDS, TinyBench, write_bench
from tests.student.train_run import request, write_world

pytestmark = pytest.mark.usefixtures("one_thread")

ARMS: dict[str, dict[str, Any] | None] = {"zero-shot": None, "SFT": {"distill": "sft"}, "LD+ED": {}}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("ablation")
    return write_world(folder / "world"), write_bench(folder / "bench")


@pytest.fixture(autouse=True)
def tiny_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.BENCHMARKS, "tiny", TinyBench())


def values(places: tuple[Path, Path], out: Path, **changes: Any) -> dict[str, Any]:
    world, bench = places
    training = request(world, out, max_steps=2, save_steps=2, picture_steps=0)
    del training["out"]
    asked = {"out": str(out), "train": training, "arms": ARMS, "baseline": "SFT", "seeds": (0, 1)}
    return asked | {"benches": [{"bench": "tiny", "data": str(bench), "frames": 4}]} | changes


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_every_arm_and_seed_is_trained_and_asked_once(
    places: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, seen = parse_config(values(places, tmp_path)), list[str]()
    for number in range(2):
        assert ablate(config, shard=(number, 2), show_part=seen.append) == {}
    assert not (tmp_path / TABLE).exists()
    assert sorted(seen) == sorted(f"{arm}, seed {seed}" for arm, seed in config.cells())
    seen.clear()
    tables = ablate(config, show_part=seen.append)
    assert seen[:-1] == ["zero-shot, seed 0", "SFT, seed 0", "LD+ED, seed 0", "SFT, seed 1", "LD+ED, seed 1"]
    assert seen[-1] == "tables of tiny"
    results = tables["tiny"]
    assert [(each.name, each.num_seeds) for each in results] == [("zero-shot", 1), ("SFT", 2), ("LD+ED", 2)]
    assert results[1].gains["Avg"] == module.Estimate(value=0, low=0, high=0)  # the baseline by itself
    for each in results:
        overall = each.columns["Avg"]
        assert 0 <= overall.low <= overall.value <= overall.high <= 100
    table = (tmp_path / TABLE).read_text()
    assert re.search(r"^\| LD\+ED \| 2 \|", table, re.MULTILINE)
    assert len(json.loads((tmp_path / REPORT).read_text())["tiny"]) == 3

    lines = {path: path.read_bytes() for path in (tmp_path / "answers").rglob("*.jsonl")}
    monkeypatch.setattr("student.trainer.DistillationTrainer.training_step", None)
    assert ablate(config) == tables
    assert {path: path.read_bytes() for path in lines} == lines


def test_means_over_seeds_and_gains_are_what_counting_says(
    places: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers by a known rule in place of a student's: the first arm knows nothing, the second all, the third half."""
    arms: dict[str, Any] = {"none": None, "all": {}, "half": {}}
    config = parse_config(values(places, tmp_path, arms=arms, baseline="none", ceiling="all"))
    questions = TinyBench().read(places[1], "official")

    def known(_: AblationConfig, bench: Examination, arm: str, seed: int) -> list[module.Scored]:
        right = {"none": 0.0, "all": 1.0, "half": float(seed)}[arm]
        return [module.Scored(question=question, score=right) for question in questions]

    monkeypatch.setattr(module, "_scored", known)
    none, everything, half = module._results(config, config.benches[0])
    assert (none.columns["Avg"].value, everything.columns["Avg"].value, half.columns["Avg"].value) == (0, 100, 50)
    assert everything.gains["Avg"] == module.Estimate(value=100, low=100, high=100)
    assert (half.gains["Avg"].low, half.gains["Avg"].high) == (0, 100)  # its seeds differ, and the interval says so
    closed = [each.gap_closed for each in (none, everything, half)]
    assert [each and each.value for each in closed] == [0, 100, 50]
    assert "| 50% (0.0 .. 100.0) |" in module.markdown({"tiny": (none, everything, half)}, config)

    def known_kind(_: AblationConfig, bench: Examination, arm: str, seed: int) -> list[module.Scored]:
        return [
            module.Scored(question=each, score=float(arm == "all" and each.category == KINDS[0])) for each in questions
        ]

    monkeypatch.setattr(module, "_scored", known_kind)
    rows = module._results(config, config.benches[0])
    gains = {name: gain.value for name, gain in rows[1].gains.items() if name != "Avg"}
    assert gains == {name: 100 * (name == KINDS[0]) for name in gains}
    assert len(gains) > 1
    cells = " | ".join("+100.0 (100.0 .. 100.0)" if gain else "+0.0 (0.0 .. 0.0)" for gain in gains.values())
    assert f"| all | {cells} |" in module.markdown({"tiny": rows}, config)

    monkeypatch.setattr(module, "_scored", known)
    unsure = parse_config(values(places, tmp_path, arms=arms, baseline="none", ceiling="half"))
    rows = module._results(unsure, unsure.benches[0])  # the ceiling gains 0 to 100: a share of that means nothing
    assert all(row.gap_closed is None for row in rows)
    assert "share" not in module.markdown({"tiny": rows}, unsure)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"baseline": "ED"}, "baseline 'ED' is no arm"),
        ({"ceiling": "oracle"}, "ceiling 'oracle' is no arm"),
        ({"arms": {"../SFT": {}}, "baseline": "../SFT"}, "names a folder"),
        ({"seeds": (1, 1)}, "each once"),
        ({"arms": {"SFT": {"seed": 3}}}, "seed is the ablation's own"),
        ({"arms": {"SFT": {"distil": "sft"}}}, "distil: Extra inputs"),
        ({"benches": [{"bench": "nothing", "data": "."}]}, "benchmark 'nothing' does not exist"),
        ({"benches": [{"bench": "worlds", "data": "."}] * 2}, "stands twice"),
        ({"colour": 1}, "colour: Extra inputs"),
    ],
)
def test_a_wrong_ablation_is_refused_before_anything_is_trained(
    places: tuple[Path, Path], tmp_path: Path, changes: dict[str, Any], fault: str
) -> None:
    with pytest.raises(RequestError, match=re.escape(fault)):
        parse_config(values(places, tmp_path, **changes))
    assert list(tmp_path.iterdir()) == []
