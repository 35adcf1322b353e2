"""Task folders for lmms-eval: its harness asks its models, our benchmarks say what is asked and what a reply is worth.

A folder holds no rule and no data, only calls of `task`. The benchmark's own folder is read by our reader when
lmms-eval asks for its documents: published files mix types within a column, which its loader of JSON refuses.
"""

import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from PIL import Image

from p4dprep.errors import RequestError
from student.data import read_image
from student.evaluate.benchmark import Question, Scored
from student.evaluate.registry import find

NAMES = ("r4d-bench", "vlm4d", "vsti-bench")
"""Benchmarks that are written as tasks."""

_ROWS = "rows.jsonl"
_SEED = 0
_UNMATCHED = "unmatched"

Doc = Mapping[str, Any]
_Dataset = TypeVar("_Dataset")


class Task:
    """One benchmark in the shape that lmms-eval calls.

    A document is `{id, category, prompt, options, answer}`; media are looked up by its id.

    Args:
        name: of the benchmark; its official mode is asked.
    """

    def __init__(self, name: str) -> None:
        self.benchmark = find(name)
        self.folder_variable = "P4DPREP_" + name.upper().replace("-", "_")

    @functools.cached_property
    def questions(self) -> dict[str, Question]:
        """By id, read once.

        Raises:
            RequestError: no folder is named in the environment, or it is not of the published layout.
        """
        folder = os.environ.get(self.folder_variable)
        if not folder:
            raise RequestError(f"say where {self.benchmark.name} lies: {self.folder_variable}=FOLDER lmms-eval ...")
        return {question.id: question for question in self.benchmark.read(Path(folder), self.benchmark.modes[0])}

    def process_docs(self, dataset: _Dataset) -> _Dataset:
        """The questions in place of the folder's one row; `dataset` is a `datasets.Dataset`, which we do not import."""
        made: _Dataset = cast(Any, type(dataset)).from_list([_document(each) for each in self.questions.values()])
        return made

    def doc_to_visual(self, doc: Doc) -> list[Any]:
        """The Set-of-Mark picture if there is one, as R4D-Bench's own harness shows it, and then the video's path."""
        shown = self.questions[doc["id"]].shown
        pictures = [shown.first_frame_marks] if shown.first_frame_marks else []
        return [*(Image.fromarray(read_image(str(path))) for path in pictures), str(shown.video)]

    def doc_to_text(self, doc: Doc, lmms_eval_specific_kwargs: Any = None) -> str:  # noqa: ARG002  (lmms-eval names it)
        """The official prompt, for every model the same."""
        return self.questions[doc["id"]].prompt

    def doc_to_target(self, doc: Doc) -> str:
        """The right letter or number."""
        return self.questions[doc["id"]].answer

    def process_results(self, doc: Doc, results: Sequence[str]) -> dict[str, dict[str, Any]]:
        """What a reply is worth, under every column that its question counts in, and under `unmatched`."""
        question = self.questions[doc["id"]]
        parsed = self.benchmark.parse(question, results[0], self.benchmark.modes[0], _SEED)
        score = self.benchmark.score(question, parsed)
        row = {"id": question.id, "answer": parsed.answer, "is_matched": parsed.is_matched, "score": score}
        columns = self.benchmark.table([Scored(question=question, score=score)])
        return dict.fromkeys([*columns, _UNMATCHED], row)

    def column(self, name: str) -> Callable[[Sequence[Doc]], float]:
        """The aggregation of a column, in percent, over those rows that `process_results` put under it."""

        def aggregate(rows: Sequence[Doc]) -> float:
            scored = [Scored(question=self.questions[row["id"]], score=row["score"]) for row in rows]
            return self.benchmark.table(scored)[name]

        return aggregate

    def num_unmatched(self, rows: Sequence[Doc]) -> int:
        """How many replies held no answer that the official rule reads."""
        return sum(not row["is_matched"] for row in rows)


def _document(question: Question) -> dict[str, Any]:
    return {
        "id": question.id,
        "category": question.category,
        "prompt": question.prompt,
        "options": list(question.options),
        "answer": question.answer,
    }


@functools.cache
def task(name: str) -> Task:
    """The one task of a name: lmms-eval runs a task's utils.py again for every function that its YAML names."""
    return Task(name)


def write_tasks(out: Path) -> tuple[Path, ...]:
    """Write a folder for each of `NAMES`, for `lmms-eval --include_path OUT --tasks p4dprep_r4d_bench`.

    Checked against lmms-eval of August 2026 (its commit 75571cf).

    Returns:
        The folders.

    Raises:
        RequestError: one of them exists.
    """
    folders = tuple(out / f"p4dprep_{name.replace('-', '_')}" for name in NAMES)
    for folder in folders:
        if folder.exists():
            raise RequestError(f"{folder} exists; remove it, or write the tasks elsewhere")
    for folder, name in zip(folders, NAMES, strict=True):
        folder.mkdir(parents=True)
        (folder / _ROWS).write_text(json.dumps({"benchmark": name}) + "\n")
        (folder / "utils.py").write_text(_utils(name))
        (folder / f"{folder.name}.yaml").write_text(_yaml(folder.name, task(name)))
    return folders


def _utils(name: str) -> str:
    columns = "\n".join(
        f"column_{number} = _TASK.column({json.dumps(column)})" for number, column in enumerate(find(name).columns)
    )
    calls = "\n".join(f"{call} = _TASK.{call}" for call in (*_CALLS, "num_unmatched"))
    return (
        f'"""Written by p4dprep, whose own definition of {name} says everything."""\n\n'
        f"from student.evaluate.lmms_eval import task\n\n_TASK = task({json.dumps(name)})\n\n{calls}\n{columns}\n"
    )


_CALLS = ("process_docs", "doc_to_visual", "doc_to_text", "doc_to_target", "process_results")


def _yaml(name: str, made: Task) -> str:
    """The task's settings. Strings are quoted as JSON, which is YAML too."""
    metrics = {column: f"column_{number}" for number, column in enumerate(made.benchmark.columns)}
    listed = "\n".join(
        f"  - metric: {json.dumps(metric)}\n    aggregation: !function utils.{function}\n"
        f"    higher_is_better: {'false' if metric == _UNMATCHED else 'true'}"
        for metric, function in (metrics | {_UNMATCHED: "num_unmatched"}).items()
    )
    calls = "\n".join(f"{call}: !function utils.{call}" for call in _CALLS)
    return (
        f"# {made.folder_variable}=FOLDER lmms-eval --include_path .. --tasks {name} --model ...\n"
        "# The paper shows 16 frames: say so in the model's arguments, such as max_num_frames=16.\n"
        f"task: {name}\n"
        f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {_ROWS}\ntest_split: test\n"
        f"output_type: generate_until\n{calls}\n"
        f"generation_kwargs:\n  max_new_tokens: {made.benchmark.num_tokens}\n"
        "  temperature: 0\n  top_p: 1.0\n  num_beams: 1\n  do_sample: false\n"
        f"metric_list:\n{listed}\n"
        "metadata:\n  - version: 1.0\n"
    )
