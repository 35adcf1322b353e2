"""VLM4D: directions, rotations and counts of what moves (arXiv 2508.02095; data `shijiezhou/VLM4D`).

The prompt is the authors' one for direct answers. They score by a language model as judge; offline, as in the harness
of arXiv 2512.17012, a letter is read by rule, which agrees where the answer is direct as asked. The columns are those
of the authors' statistics. A question's side is told by its number: those over 922 come from Ego4D.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote, urlsplit

from p4dprep.errors import RequestError
from student.evaluate.benchmark import Benchmark, Parsed, Question, Scored, Shown
from student.evaluate.common import (
    LETTERS,
    Record,
    averages,
    by_category,
    by_tag,
    first_letter,
    letter_of_text,
    letters_of,
    list_options,
    media_file,
    parsed_letter,
    read_json,
    text_of,
    unique_ids,
)

FILES = {"real": "real_mc.json", "synthetic": "synthetic_mc.json"}
_FOLDERS = (".", "QA", "data")
"""Where copies keep the two files: beside the videos, or in a folder of their own."""
_LAST_EXOCENTRIC = 922
_CATEGORIES = ("Ego", "Exo", "Directional", "FP")
_LETTER = (
    re.compile(r"^\s*([A-D])\b"),
    re.compile(r"answer\s*(?:is)?\s*[:\-]?\s*([A-D])\b", re.IGNORECASE),
    re.compile(r"\b([A-D])\b"),
)


class VLM4D(Benchmark):
    """VLM4D in its published folder: real_mc.json, synthetic_mc.json or both, videos_real/ and videos_synthetic/.

    `Real` is what the paper of P4D reports. A split whose JSON file is not there is left out.
    """

    name: ClassVar[str] = "vlm4d"
    source: ClassVar[str] = "shijiezhou/VLM4D on the Hugging Face hub, MIT"
    columns: ClassVar[tuple[str, ...]] = ("Real", "Ego", "Exo", "Synthetic", "Directional", "FP", "Overall")

    def read(self, data: Path, mode: str) -> Sequence[Question]:  # noqa: ARG002
        """The questions of both splits; see `Benchmark.read`."""
        return unique_ids(
            _question(data, f"{path}: record {number}", _split_of(path), record)
            for path in self.files(data)
            for number, record in enumerate(read_json(path, required=("id", "video", "question", "choices", "answer")))
        )

    def parse(self, question: Question, reply: str, mode: str, seed: int) -> Parsed:  # noqa: ARG002
        """A letter that begins the reply, else one that is called the answer, else the first that stands alone."""
        return parsed_letter(first_letter(reply.strip(), _LETTER, letters_of(question.options)))

    def table(self, scored: Sequence[Scored]) -> dict[str, float]:
        """Micro averages over all questions, of each split, and of its two parts."""
        splits = {name.capitalize(): belongs for name, belongs in by_tag("split", FILES).items()}
        columns = {**splits, **by_category(_CATEGORIES), "Overall": lambda _: True}
        return averages(scored, {name: columns[name] for name in self.columns})

    def files(self, data: Path) -> tuple[Path, ...]:
        """Those of the two files that there are; the first, for the message, if there is none."""
        places = [[data / folder / name for folder in _FOLDERS] for name in FILES.values()]
        found = [next((path for path in paths if path.is_file()), None) for paths in places]
        return tuple(path for path in found if path) or (data / FILES["real"],)


def _split_of(path: Path) -> str:
    return next(split for split, name in FILES.items() if name == path.name)


def _question(data: Path, where: str, split: str, record: Record) -> Question:
    choices = record["choices"]
    if not isinstance(choices, Mapping) or list(choices) != list(LETTERS[: len(choices)]):
        raise RequestError(f"{where} has choices {choices!r}; it must name an option for each letter from A")
    options = tuple(text_of(option) for option in choices.values())
    answer = text_of(record["answer"])
    return Question(
        id=f"{split}/{text_of(record['id'])}",
        category=_side(where, text_of(record["id"])) if split == "real" else _kind(answer),
        prompt=(
            f"\nQuestion: {text_of(record['question'])}\n{list_options(options, '{letter}: {option}')}\n\n"
            "Do not generate any intermediate reasoning process. "
            "Answer directly with the option letter from the given choices.\n"
        ),
        shown=Shown(video=media_file(data, where, _local_path(where, text_of(record["video"])))),
        options=options,
        answer=letter_of_text(where, options, answer),
        tags={"split": split},
    )


def _side(where: str, published_id: str) -> str:
    """Whether a question of the real split is about a video taken by who wears the camera."""
    number = published_id.rpartition("_")[2]
    if not number.isdecimal():
        raise RequestError(f"{where} has the id {published_id!r}; it must end in _NUMBER, which tells ego from exo")
    return "Ego" if int(number) > _LAST_EXOCENTRIC else "Exo"


def _kind(answer: str) -> str:
    """Of the synthetic split: a question about what is not there is a false positive's."""
    said = answer.strip().lower()
    return "FP" if said == "no" or said.startswith("no ") else "Directional"


def _local_path(where: str, video: str) -> str:
    """Path below the data folder of a file that is named by its address on the hub, or by its path already."""
    parts = urlsplit(video)
    if not parts.scheme:
        return video
    _, found, rest = parts.path.partition("/resolve/")
    path = rest.partition("/")[2]
    if not found or not path:
        raise RequestError(f"{where} has the video {video!r}; it must be an address with /resolve/REVISION/PATH")
    return unquote(path)
