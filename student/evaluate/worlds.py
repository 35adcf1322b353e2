"""Our worlds' held-out questions: a folder that `p4dprep worlds --split test` made, in R4D-Bench's layout."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, cast

from p4dprep.errors import RequestError
from student.conversations import Box
from student.evaluate.benchmark import Question, Shown
from student.evaluate.common import list_options, read_json
from student.evaluate.r4d_bench import R4DBench, official_prompt, read_questions
from student.regions import RegionPrompt, region_text


class Worlds(R4DBench):
    """test.json of our worlds, asked and scored as R4D-Bench is.

    The other modes ask in the words of training instead, for students that know no others: `marks`, `boxes` and `both`
    are the values of `DataConfig.regions`; the boxes are those of qa.json beside it.
    """

    name: ClassVar[str] = "worlds"
    source: ClassVar[str] = "made here by `p4dprep worlds OUT --split test`"
    modes: ClassVar[tuple[str, ...]] = ("official", "marks", "boxes", "both")

    def read(self, data: Path, mode: str) -> Sequence[Question]:
        """The questions of test.json; see `Benchmark.read`."""
        questions = read_questions(data, data / "test.json")
        if mode == "official":
            return tuple(replace(question, prompt=official_prompt(question)) for question in questions)
        boxes = _boxes(data / "qa.json")
        return tuple(_as_trained(question, boxes, cast(RegionPrompt, mode)) for question in questions)

    def files(self, data: Path) -> tuple[Path, ...]:
        """test.json, and qa.json for its boxes."""
        return data / "test.json", data / "qa.json"


def _boxes(path: Path) -> dict[str, tuple[Box, ...]]:
    """Regions of each question of qa.json, by the id that it has in test.json too."""
    boxes = {}
    for number, record in enumerate(read_json(path, required=("id",))):
        regions = record.get("regions") or []
        try:
            boxes[f"worlds/{record['id']}"] = tuple((float(a), float(b), float(c), float(d)) for a, b, c, d in regions)
        except (TypeError, ValueError):
            raise RequestError(f"{path}: record {number} has regions {regions!r}; make the worlds again") from None
    return boxes


def _as_trained(question: Question, boxes: dict[str, tuple[Box, ...]], how: RegionPrompt) -> Question:
    """The question as `student.data` shows and words it."""
    if question.id not in boxes:
        raise RequestError(f"test.json asks {question.id}, which qa.json beside it lacks; make the worlds again")
    regions = boxes[question.id]
    words = (
        region_text(regions, how) if regions else "",
        f"{question.prompt}\nOptions:\n{list_options(question.options)}",
        "Answer with only the letter of the correct option.",
    )
    unmarked = Shown(video=question.shown.video)
    shown = unmarked if how == "boxes" else replace(question.shown, regions=regions)
    return replace(question, prompt="\n".join(filter(None, words)), shown=shown)
