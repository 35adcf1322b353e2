"""Our worlds' held-out questions: a folder that `p4dprep worlds --split test` made, in R4D-Bench's layout."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, cast

from p4dprep.errors import RequestError
from p4dprep.worlds.questions import ANSWER_BY_WORDS
from student.conversations import Box
from student.evaluate.benchmark import Parsed, Question, Shown
from student.evaluate.common import letter_of_words, list_options, read_json
from student.evaluate.r4d_bench import R4DBench, official_prompt, read_questions
from student.regions import RegionPrompt, region_text


class Worlds(R4DBench):
    """test.json of our worlds, asked and scored as R4D-Bench is.

    The other modes ask in the words of training instead, for students that know no others: `marks`, `boxes` and `both`
    are the values of `DataConfig.regions`; the boxes are those of qa.json beside it. `words` asks without options, as
    the lessons of plain worlds do, and takes the option that the reply means (`letter_of_words`).
    """

    name: ClassVar[str] = "worlds"
    source: ClassVar[str] = "made here by `p4dprep worlds OUT --split test`"
    modes: ClassVar[tuple[str, ...]] = ("official", "marks", "boxes", "both", "words")

    def read(self, data: Path, mode: str) -> Sequence[Question]:
        """The questions of test.json; see `Benchmark.read`."""
        questions = read_questions(data, data / "test.json")
        if mode == "official":
            return tuple(replace(question, prompt=official_prompt(question)) for question in questions)
        if mode == "words":
            return tuple(replace(each, prompt=f"{each.prompt}\n\n{ANSWER_BY_WORDS}") for each in questions)
        boxes = _boxes(data / "qa.json")
        return tuple(_as_trained(question, boxes, cast(RegionPrompt, mode)) for question in questions)

    def parse(self, question: Question, reply: str, mode: str, seed: int) -> Parsed:
        """As R4D-Bench; in the mode `words` first of all the option that the reply means."""
        letter = letter_of_words(reply, question.options) if mode == "words" else ""
        return Parsed(answer=letter, is_matched=True) if letter else super().parse(question, reply, mode, seed)

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
