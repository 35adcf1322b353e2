"""STI-Bench: measuring objects, motion and pose in real videos (arXiv 2503.23765; data `MINT-SJTU/STI-Bench`).

Prompt, parsing and scenes are those of the authors' script for open models. It shows frames of the whole video, the
prompt naming the seconds that are meant. Where no pattern finds a letter, it takes the reply's last character if that
is a letter of an option, so that a bare `C` counts, and so does `in the SPACE`; only the former counts as matched here.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from p4dprep.errors import RequestError
from student.evaluate.benchmark import Benchmark, Parsed, Question, Scored, Shown
from student.evaluate.common import (
    LETTERS,
    Record,
    averages,
    by_category,
    by_tag,
    category_of,
    check_options,
    first_letter,
    letter_of_value,
    letters_of,
    list_options,
    media_file,
    parsed_letter,
    read_parquet,
    text_of,
    unique_ids,
)

TASKS = (
    "Dimensional Measurement",
    "Spatial Relation",
    "3D Video Grounding",
    "Displacement & Path Length",
    "Speed & Acceleration",
    "Ego-Centric Orientation",
    "Trajectory Description",
    "Pose Estimation",
)
SCENES = ("indoor", "desktop", "outdoor")
_REQUIRED = ("Video", "ID", "Task", "Question", "Candidates", "Answer", "time_start", "time_end")
_SCENE_KEYS = ("scene", "Scene")
_LETTERS = "ABCDE"
_OFFICIAL = tuple(
    re.compile(pattern, re.IGNORECASE | re.MULTILINE)
    for pattern in (
        r"\(([A-E])\)",
        r"Ans\s*=\s*['\"]?([A-E])['\"]?",
        r"Answer\s*[:=]\s*([A-E])",
        r"Option\s+([A-E])",
        r"\b([A-E])\s*(?:is|was)\s*correct",
        r"\b([A-E])[\.\)]\s*$",
    )
)
_LAST_LETTER = re.compile(r"(?<!\w)([A-E])\s*\Z")


class STIBench(Benchmark):
    """STI-Bench in its published folder: qa.parquet, and video.zip unpacked to video/ or videos/.

    The mode `values` also accepts an option's value in place of its letter, and takes no last characters.
    """

    name: ClassVar[str] = "sti-bench"
    source: ClassVar[str] = "MINT-SJTU/STI-Bench on the Hugging Face hub"
    columns: ClassVar[tuple[str, ...]] = ("Avg", *TASKS, *SCENES)
    num_tokens: ClassVar[int] = 100
    """As the authors' script for hosted models: a value may be long. Students that obey stop after the letter."""
    modes: ClassVar[tuple[str, ...]] = ("official", "values")

    def read(self, data: Path, mode: str) -> Sequence[Question]:  # noqa: ARG002
        """The questions of qa.parquet; see `Benchmark.read`."""
        (path,) = self.files(data)
        rows = read_parquet(path, required=_REQUIRED, optional=_SCENE_KEYS)
        return unique_ids(_question(data, f"{path}: row {number}", row) for number, row in enumerate(rows))

    def parse(self, question: Question, reply: str, mode: str, seed: int) -> Parsed:  # noqa: ARG002
        """By the official patterns, then a letter at the end; else the last character, or an option's value."""
        letter = first_letter(reply, (*_OFFICIAL, _LAST_LETTER), _LETTERS)
        if letter or mode != "values":
            last = reply.strip()[-1:]
            return parsed_letter(letter, fallback=last if last in _LETTERS else "")
        return parsed_letter(letter_of_value(reply, question.options))

    def table(self, scored: Sequence[Scored]) -> dict[str, float]:
        """Micro averages over all questions, by task and by scene."""
        return averages(scored, {"Avg": lambda _: True, **by_category(TASKS), **by_tag("scene", SCENES)})

    def files(self, data: Path) -> tuple[Path, ...]:
        """Only qa.parquet."""
        return (data / "qa.parquet",)


def _question(data: Path, where: str, row: Record) -> Question:
    start, end, video, answer = (text_of(row[key]) for key in ("time_start", "time_end", "Video", "Answer"))
    options = _options(where, row["Candidates"])
    scene = next((text_of(row[key]).lower() for key in _SCENE_KEYS if row[key]), _scene_of_file(video))
    return Question(
        id=f"{video}/{text_of(row['ID'])}/{start}-{end}",
        category=category_of(where, row["Task"], {task: task for task in TASKS}),
        prompt=(
            f"From {start} s to {end} s. {text_of(row['Question'])}\n{list_options(options)}\n"
            "Please output only the option letter!"
        ),
        shown=Shown(video=media_file(data, where, f"video/{video}", f"videos/{video}")),
        options=options,
        answer=answer.strip() if answer.strip() in letters_of(options) else "",
        tags={"scene": scene},
    )


def _options(where: str, candidates: object) -> tuple[str, ...]:
    """Texts of the options by their letters; a copy may hold them as JSON text, and unused letters as null."""
    try:
        named = json.loads(candidates) if isinstance(candidates, str) else candidates
    except ValueError:
        named = None
    if not isinstance(named, Mapping):
        raise RequestError(f"{where} has candidates {candidates!r}; it must name an option for each letter")
    used = sorted(letter for letter, option in named.items() if option is not None)
    if used != list(LETTERS[: len(used)]):
        raise RequestError(f"{where} has the letters {', '.join(used)}; they must go on from A")
    options = tuple(text_of(named[letter]) for letter in used)
    check_options(where, options)
    return options


def _scene_of_file(name: str) -> str:
    """Where a video was taken, by the names of the three sources it can come from."""
    if "camera" in name:
        return "outdoor"
    if name.startswith("scene"):
        return "indoor"
    return "desktop" if re.fullmatch(r"\d{6}", name.split(".")[0]) else "unknown"
