"""Tasks for lmms-eval, which is not installed here: its YAML is read and its calls are made as its own code does."""

import importlib.util
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from p4dprep.errors import RequestError
from student.evaluate.lmms_eval import NAMES, Task, task, write_tasks
from student.evaluate.registry import find
from tests.student.evaluate import r4d_data, vlm4d_data, vsti_data
from tests.student.evaluate.asking import Reply, count_unmatched, png, score_all


class Rows(list[dict[str, Any]]):
    """What we need of a `datasets.Dataset`."""

    @classmethod
    def from_list(cls, rows: Sequence[dict[str, Any]]) -> "Rows":
        return cls(rows)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("benchmarks")
    r4d = r4d_data.write_r4d(root / "r4d")
    for path in r4d.glob("images/*/*.png"):
        path.write_bytes(png(77))
    return {
        "r4d-bench": r4d,
        "vlm4d": vlm4d_data.write_vlm4d(root / "vlm4d"),
        "vsti-bench": vsti_data.build(root / "vsti"),
    }


@pytest.fixture
def in_environment(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Path]]:
    for name, folder in folders.items():
        monkeypatch.setenv(Task(name).folder_variable, str(folder))
    task.cache_clear()
    yield folders
    task.cache_clear()


def load(folder: Path) -> dict[str, Any]:
    """A task's settings with its functions, found as lmms-eval finds them: utils.py runs anew for each."""

    class Loader(yaml.SafeLoader):
        pass

    def function(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Any:
        module_name, name = loader.construct_scalar(node).split(".")
        spec = importlib.util.spec_from_file_location(module_name, folder / f"{module_name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return getattr(module, name)

    Loader.add_constructor("!function", function)
    settings: dict[str, Any] = yaml.load((folder / f"{folder.name}.yaml").read_text(), Loader)  # noqa: S506
    return settings


def evaluate(folder: Path, reply: Reply) -> tuple[dict[str, float], Rows]:
    """Each metric as lmms-eval adds it up, and the documents."""
    made = SimpleNamespace(**load(folder))
    docs = made.process_docs(Rows([{"benchmark": "placeholder"}]))
    rows = defaultdict(list)
    for doc in docs:
        question = SimpleNamespace(**doc)
        for metric, row in made.process_results(doc, [reply(question)]).items():
            rows[metric].append(row)
    aggregations = {metric["metric"]: metric["aggregation"] for metric in made.metric_list}
    return {metric: aggregations[metric](found) for metric, found in rows.items()}, docs


@pytest.mark.parametrize("name", NAMES)
def test_a_task_asks_and_adds_up_what_the_benchmark_does(
    name: str, in_environment: dict[str, Path], tmp_path: Path
) -> None:
    folder = dict(zip(NAMES, write_tasks(tmp_path), strict=True))[name]
    benchmark = find(name)
    questions = benchmark.read(in_environment[name], benchmark.modes[0])
    models: list[Reply] = [lambda question: f"{question.answer}", lambda _: "A", lambda _: "no idea"]
    for reply in models:
        metrics, docs = evaluate(folder, reply)
        assert metrics.pop("unmatched") == count_unmatched(benchmark, questions, reply)
        assert metrics == pytest.approx(score_all(benchmark, questions, reply))
    assert [doc["prompt"] for doc in docs] == [question.prompt for question in questions]


@pytest.mark.parametrize("name", NAMES)
def test_a_task_s_settings_are_the_benchmark_s(name: str, tmp_path: Path) -> None:
    folder = dict(zip(NAMES, write_tasks(tmp_path), strict=True))[name]
    settings = load(folder)
    assert settings["task"] == folder.name == f"p4dprep_{name.replace('-', '_')}"
    assert [metric["metric"] for metric in settings["metric_list"]] == [*find(name).columns, "unmatched"]
    assert settings["generation_kwargs"] == {
        "max_new_tokens": find(name).num_tokens, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False
    }  # fmt: skip
    assert (folder / settings["dataset_kwargs"]["data_files"]["test"]).is_file()


def test_a_video_is_shown_as_its_path_and_marks_stand_before_it(in_environment: dict[str, Path]) -> None:
    marked, plain = task("r4d-bench"), task("vsti-bench")
    doc = marked.process_docs(Rows())[0]
    picture, video = marked.doc_to_visual(doc)
    assert np.asarray(picture).tolist() == np.full((8, 8, 3), 77).tolist()
    assert video == str(marked.questions[doc["id"]].shown.video)
    assert marked.doc_to_text(doc, lmms_eval_specific_kwargs={"default": {}}) == doc["prompt"]
    assert plain.doc_to_visual(plain.process_docs(Rows())[0]) == [str(in_environment["vsti-bench"] / vsti_data.VIDEO)]


def test_a_task_without_its_folder_says_how_to_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("P4DPREP_VSTI_BENCH", raising=False)
    with pytest.raises(RequestError, match=r"say where vsti-bench lies: P4DPREP_VSTI_BENCH=FOLDER lmms-eval"):
        Task("vsti-bench").process_docs(Rows())


def test_tasks_are_never_written_over_others_files(tmp_path: Path) -> None:
    (tmp_path / "p4dprep_vlm4d").mkdir()
    with pytest.raises(RequestError, match=r"p4dprep_vlm4d exists; remove it"):
        write_tasks(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["p4dprep_vlm4d"]
