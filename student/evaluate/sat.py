"""SAT: what moved, what would be seen after moving, and where to go; the 150 real questions (arXiv:2412.07755)."""

# ruff: noqa: ARG002  (one signature for all benchmarks, though few need every argument)

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from p4dprep.errors import RequestError
from student.evaluate.benchmark import Benchmark, Parsed, Question, Scored, Shown
from student.evaluate.common import (
    LETTERS,
    Record,
    averages,
    by_category,
    category_of,
    check_options,
    letters_of,
    parsed_letter,
    picture_bytes,
    read_parquet,
    text_of,
)

_TYPES = {
    "ego_movement": "EgoM",
    "obj_movement": "ObjM",
    "action_conseq": "EgoAct",
    "action_consequence": "EgoAct",
    "goal_aim": "GoalAim",
    "perspective": "Pers",
}
_KEYS = ("image_bytes", "question", "answers", "correct_answer", "question_type")


class SAT(Benchmark):
    """Circular: each item is asked with its options in both orders, and is right only if both answers are.

    Both questions of an item have the same tag `item`. Resample by it, not by question.
    """

    name = "sat"
    source = "array/SAT, SAT_test.parquet (MIT)"
    columns: ClassVar[tuple[str, ...]] = ("Avg", "EgoM", "ObjM", "EgoAct", "GoalAim", "Pers")

    def read(self, data: Path, mode: str) -> Sequence[Question]:
        """Two questions for each row of `SAT_test.parquet`, which holds the pictures too."""
        path = data / "SAT_test.parquet"
        rows = enumerate(read_parquet(path, _KEYS))
        return [question for number, row in rows for question in _both_orders(f"{path}: row {number}", number, row)]

    def parse(self, question: Question, reply: str, mode: str, seed: int) -> Parsed:
        """The one option whose text the reply holds, whatever its case; none if it holds several.

        Where one option's text holds another's ("left" in "left and forward"), the longer is meant. Upstream such an
        item could never be right.
        """
        rest, named = reply.lower(), ""
        options = zip(LETTERS, question.options, strict=False)
        for letter, option in sorted(options, key=lambda pair: -len(pair[1])):
            if option.lower() in rest:
                rest, named = rest.replace(option.lower(), "\0"), named + letter
        return parsed_letter(named if len(named) == 1 else "")

    def table(self, scored: Sequence[Scored]) -> dict[str, float]:
        """Share of items with both orders right; an item of which only one order was asked is not right."""
        orders: dict[str, dict[str, float]] = defaultdict(dict)
        for each in scored:
            orders[each.question.tags["item"]][each.question.id] = each.score
        whole = {item: float(len(scores) == 2 and min(scores.values()) == 1) for item, scores in orders.items()}
        # Every item stands in as many rows as it was asked, so a resample that draws it twice counts it twice.
        items = [Scored(question=each.question, score=whole[each.question.tags["item"]]) for each in scored]
        return averages(items, {"Avg": lambda _: True, **by_category(self.columns[1:])})

    def files(self, data: Path) -> tuple[Path, ...]:
        """`SAT_test.parquet`."""
        return (data / "SAT_test.parquet",)


def _both_orders(where: str, number: int, row: Record) -> list[Question]:
    category, right = category_of(where, row["question_type"], _TYPES), text_of(row["correct_answer"]).strip()
    options = tuple(text_of(option).strip() for option in row["answers"] or ())
    check_options(where, options)
    if options.count(right) != 1 or "" in options:
        raise RequestError(f"{where} has the answers {options} and the right one {right!r}; it must be one of them")
    shown = Shown(images=picture_bytes(where, row["image_bytes"]))
    return [
        Question(
            id=f"{number}/{order}",
            category=category,
            prompt=_prompt(text_of(row["question"]), asked),
            shown=shown,
            options=asked,
            answer=letters_of(asked)[asked.index(right)],
            tags={"item": str(number)},
        )
        for order, asked in (("published", options), ("reversed", options[::-1]))
    ]


def _prompt(question: str, options: Sequence[str]) -> str:
    listed = " or ".join(f'"{option}"' for option in options)
    return (
        f"Answer in natural language. {question} Answer the question using a single word or phrase. "
        f"Choose between the following options: {listed}."
    )
