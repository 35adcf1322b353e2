"""OmniSpatial: dynamics, interaction, logic and perspective, told from one picture (arXiv:2506.03135)."""

# ruff: noqa: ARG002  (one signature for all benchmarks, though few need every argument)

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar

from p4dprep.errors import RequestError
from student.evaluate.benchmark import Benchmark, Parsed, Question, Scored, Shown
from student.evaluate.common import (
    Record,
    averages,
    check_options,
    letters_of,
    list_options,
    media_file,
    parsed_letter,
    read_json,
    text_of,
    unique_ids,
)

_TASKS = {
    "Dynamic_Reasoning": ("Manipulation", "Motion_Analysis"),
    "Spatial_Interaction": ("Traffic_Analysis", "Localization", "Geospatial_Strategy"),
    "Complex_Logic": ("Pattern_Recognition", "Geometric_Reasoning"),
    "Perspective_Taking": ("Egocentric", "Allocentric", "Hypothetical"),
}
_COLUMNS = tuple(name for task, subtasks in _TASKS.items() for name in (task, *subtasks))
_KEYS = ("id", "question", "options", "answer", "task_type", "sub_task_type")
_ANSWER = re.compile(r"Answer\s*:\s*([A-D])\b", re.IGNORECASE)
_PREAMBLE = (
    "\nYou are a spatial-reasoning assistant.\n\n"
    "Task\n-----\n"
    "You will receive  \n"
    "1. **Image** - a single RGB frame depicting a scene.  \n"
    "2. **Question** - a natural-language query about spatial relationships between objects in the image.  \n"
    "3. **Options** - ≥2 answer candidates, each tagged by a capital letter (A, B, C, D…).\n\n"
    "Guidelines\n----------\n"
    "Please follow these steps to analyze the image and answer the question:\n"
    "1. First, carefully observe the image and identify all relevant objects and their spatial relationships.\n"
    "2. Next, break down the question into key components that need to be addressed.\n"
    "3. Think through the spatial reasoning step-by-step to arrive at your answer. It may be necessary to transfer "
    "perspective to better understand the scene.\n"
    "4. Finally, select the most appropriate option (A, B, C, or D) based on your analysis.\n\n"
    "Always ground your answer in the visual evidence; do not hallucinate unseen objects.\n"
    "If uncertain, pick the most plausible option—never refuse or reply “insufficient information.”\n"
    "\n\n"
    "End your answer with a separate line formatted exactly as:\n\n"
    "Answer: X\nwhere X ∈ {A, B, C, D}.\n"
    "\n\n"
)
"""The official defaults, `--prompt_type manual_cot --eval_type re`."""


class OmniSpatial(Benchmark):
    """The prompt asks for reasoning first, so replies are long; upstream allows 8,192 tokens and means five samples."""

    name = "omnispatial"
    source = "qizekun/OmniSpatial, OmniSpatial-test.zip unpacked (CC BY-NC 4.0)"
    columns: ClassVar[tuple[str, ...]] = ("Avg", *_COLUMNS)
    num_tokens = 1024

    def read(self, data: Path, mode: str) -> Sequence[Question]:
        """The records of `data.json`; the picture of question `7_2` of a task is `<task_type>/7.png`."""
        path = data / "data.json"
        records = read_json(path, _KEYS)
        return unique_ids(_question(data, f"{path}: record {number}", record) for number, record in enumerate(records))

    def parse(self, question: Question, reply: str, mode: str, seed: int) -> Parsed:
        """The last "Answer: X", else A.

        A lower-case letter matches and is kept as it is, so that it is wrong, as by the official rule.
        """
        letters = _ANSWER.findall(reply)
        return parsed_letter(letters[-1] if letters else "", fallback="A")

    def table(self, scored: Sequence[Scored]) -> dict[str, float]:
        """Micro averages of all, of each task and of each sub-task."""
        return averages(scored, {"Avg": lambda _: True, **{name: partial(_is_of, name) for name in _COLUMNS}})

    def files(self, data: Path) -> tuple[Path, ...]:
        """`data.json`."""
        return (data / "data.json",)


def _is_of(column: str, question: Question) -> bool:
    return column in (question.tags["task"], question.category)


def _question(data: Path, where: str, record: Record) -> Question:
    task, subtask, id_ = (text_of(record[name]) for name in ("task_type", "sub_task_type", "id"))
    if subtask not in _TASKS.get(task, ()):
        raise RequestError(f"{where} is of {task!r}, {subtask!r}, which OmniSpatial does not have; download it again")
    options = tuple(map(text_of, record["options"])) if isinstance(record["options"], list) else ()
    check_options(where, options)
    answer = record["answer"]
    if type(answer) is not int or not 0 <= answer < len(options):
        raise RequestError(f"{where} has the answer {answer!r}; it must be the index of one of {len(options)} options")
    return Question(
        id=f"{task}/{id_}",  # the ids start anew in every task
        category=subtask,
        prompt=f"{_PREAMBLE}{record['question']}\n{list_options(options, '{letter}. {option}')}",
        shown=Shown(images=(media_file(data, where, f"{task}/{id_.split('_')[0]}.png"),)),
        options=options,
        answer=letters_of(options)[answer],
        tags={"task": task},
    )
