"""Questions about worlds in the nine categories of R4D-Bench (P4D Sec. 5), balanced, and the files they are written to.

A scene gives queries, which have a true answer but no distractors yet (`p4dprep.worlds.templates`). `balance` joins
queries of one corpus into groups whose members are asked in the same words and share their options, each option being
the answer of exactly one member. Whoever sees the question and the options but not the video therefore cannot know
which member it is: neither frequent answers, nor typical sizes, nor middle values, nor positions of options help.
"""

import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count, groupby
from typing import Literal, NotRequired, TypedDict, get_args

import numpy as np

from p4dprep.worlds.scene import Scene

Category = Literal["VG", "DM", "SR", "R", "C", "T", "FP", "SA", "DP"]
CATEGORIES: tuple[Category, ...] = get_args(Category)
TASK_NAMES: dict[Category, str] = {
    "VG": "3D Video Grounding",
    "DM": "Dimensional Measurement",
    "SR": "Spatial Relation",
    "R": "Rotational",
    "C": "Counting",
    "T": "Translational",
    "FP": "False Positives",
    "SA": "Speed & Acceleration",
    "DP": "Displacement & Path Length",
}
TIMEBENCH_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
_TIME_TEXT = "How many seconds pass from the first frame of this video to its last?"
ANSWER_BY_LETTER = "Answer with only the letter of the correct option."
ANSWER_BY_WORDS = "Answer with a word or a short phrase."
LETTERS = "ABCDE"

MIN_RATIO = 1.3  # of two measures that are offered together
_MIN_OFFSET_FRACTION = 0.35  # of the farther one's distance, between two points that are offered together
_NUM_OPTIONS = (5, 4)  # wanted, and still good
_NUM_OPEN_GROUPS = 64  # that are searched for a place; bounds the time, not the result's balance


@dataclass(frozen=True, kw_only=True)
class Query:
    """A question with its true answer, before it has distractors.

    Attributes:
        scene_id: which world it is about.
        category: R4D-Bench's.
        template: what is asked; all queries of one template are asked in the same words, up to rephrasing.
        text: the question, with `<obj_1>` for the first of `regions`.
        regions: numbers of bodies, in the order of the tokens.
        names: what people call them.
        answer: the truth.
        options: all that could be answered, or empty if the distractors are the truths of other queries.
        value: of a query without options, the number or point behind the answer: it decides which are distinct.
        min_ratio: of two such numbers that may be offered together; 1 for counts.
        pools: which queries may be told apart from it by nothing but the video, from the most alike on.
    """

    scene_id: str
    category: Category
    template: str
    text: str
    regions: tuple[int, ...]
    names: tuple[str, ...]
    answer: str
    options: tuple[str, ...] = ()
    value: tuple[float, ...] = ()
    min_ratio: float = MIN_RATIO
    pools: tuple[str, ...] = ("",)

    def __post_init__(self) -> None:
        tokens = set(re.findall(r"<obj_\d+>", " ".join((self.text, *self.options))))
        if tokens != {token(number) for number in range(len(self.regions))}:
            raise ValueError(f"{self.template}: the text names {sorted(tokens)} for {len(self.regions)} regions")
        if bool(self.options) == bool(self.value) or (self.options and self.answer not in self.options):
            raise ValueError(f"{self.template}: needs either a value, or options with the answer among them")

    def distinct_from(self, other: "Query") -> bool:
        """Whether two truths without options differ clearly enough to be offered together."""
        mine, theirs = np.array(self.value), np.array(other.value)
        if len(mine) > 1:
            far = max(float(np.linalg.norm(mine)), float(np.linalg.norm(theirs)))
            return float(np.linalg.norm(mine - theirs)) >= _MIN_OFFSET_FRACTION * far
        low, high = sorted((self.value[0], other.value[0]))
        return high > low * self.min_ratio


@dataclass(frozen=True, kw_only=True)
class Question:
    """A multiple-choice question with an exact answer.

    Attributes:
        id: unique in its corpus, and fit to be a file's name.
        scene_id: which world it is about.
        category: R4D-Bench's.
        template: what is asked.
        text: the question, with `<obj_1>` for the first of `regions`.
        regions: numbers of bodies, in the order of the tokens; their marks in the first frame are 1, 2, ...
        names: what people call them.
        options: four or five, in the order of the letters.
        answer: the right option.
        answer_index: its place.
    """

    id: str
    scene_id: str
    category: Category
    template: str
    text: str
    regions: tuple[int, ...]
    names: tuple[str, ...]
    options: tuple[str, ...]
    answer: str
    answer_index: int

    def __post_init__(self) -> None:
        if len(set(self.options)) != len(self.options) or self.options[self.answer_index] != self.answer:
            raise ValueError(f"{self.id}: options {self.options} must differ, with {self.answer!r} at its index")

    @property
    def letter(self) -> str:
        """Of the right option."""
        return LETTERS[self.answer_index]

    def named(self) -> "Question":
        """The same question for those who see no marks: `the red ball` for `<obj_1>`, and no region left."""
        return replace(
            self,
            text=_with_names(self.text, self.names),
            options=tuple(_with_names(option, self.names) for option in self.options),
            answer=_with_names(self.answer, self.names),
            regions=(),
            names=(),
        )


def token(number: int) -> str:
    """The region token of the region with this number, from 0."""
    return f"<obj_{number + 1}>"


def _with_names(text: str, names: Sequence[str]) -> str:
    for number, name in enumerate(names):
        text = text.replace(token(number), f"the {name}")
    return text[:1].upper() + text[1:]


def balance(queries: Iterable[Query], seed: int) -> tuple[Question, ...]:
    """Questions of one corpus that cannot be answered without its videos.

    Within each group that is asked with the same options, every option is right exactly once, and every letter too.
    Queries that fit no group are dropped, so a corpus of few scenes keeps few questions.

    Args:
        queries: of all scenes of the corpus; their order does not matter.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    questions: list[Question] = []
    ordered = sorted(queries, key=lambda query: (query.template, query.scene_id, query.text, query.regions))
    for _, same in groupby(ordered, key=lambda query: query.template):
        for group in _all_groups(list(same), rng):
            questions += _pose(group, rng)
    return _numbered(questions)


def _all_groups(queries: list[Query], rng: np.random.Generator) -> Iterator[list[Query]]:
    """Groups from the most alike queries first; what is left over is tried again in the next, wider pools."""
    for level in range(max(len(query.pools) for query in queries)):
        pools: dict[str, list[Query]] = {}
        for query in queries:
            pools.setdefault(query.pools[min(level, len(query.pools) - 1)], []).append(query)
        queries = []
        for pool in pools.values():
            shuffled = [pool[number] for number in rng.permutation(len(pool))]
            groups, rest = _groups(shuffled)
            yield from groups
            queries += rest


def _groups(queries: list[Query]) -> tuple[list[list[Query]], list[Query]]:
    """Groups of distinct answers, and the queries left over."""
    if queries[0].options:
        slots = range(len(queries[0].options))
        by_answer = [[query for query in queries if query.options.index(query.answer) == slot] for slot in slots]
        groups = [list(group) for group in zip(*by_answer, strict=False)]
        return groups, [query for same in by_answer for query in same[len(groups) :]]
    wanted, enough = _NUM_OPTIONS
    full: list[list[Query]] = []
    filling: list[list[Query]] = []
    for query in queries:
        group = next((g for g in filling[:_NUM_OPEN_GROUPS] if all(query.distinct_from(other) for other in g)), None)
        if group is None:
            filling.append([query])
            continue
        group.append(query)
        if len(group) == wanted:
            full.append(group)
            filling.remove(group)
    full += [group for group in filling if len(group) >= enough]
    return full, [query for group in filling if len(group) < enough for query in group]


def _pose(group: list[Query], rng: np.random.Generator) -> Iterator[Question]:
    """A question for each query of a group; the right letters are a permutation too."""
    letters = rng.permutation(len(group))
    for query, index in zip(group, letters.tolist(), strict=True):
        wrong = [option for option in query.options or [other.answer for other in group] if option != query.answer]
        options = [wrong[number] for number in rng.permutation(len(wrong))]
        options.insert(index, query.answer)
        yield Question(
            id="",
            scene_id=query.scene_id,
            category=query.category,
            template=query.template,
            text=query.text,
            regions=query.regions,
            names=query.names,
            options=tuple(options),
            answer=query.answer,
            answer_index=index,
        )


def _numbered(questions: Sequence[Question]) -> tuple[Question, ...]:
    """In the order of scenes, each with its id."""
    numbered = []
    for scene_id, same in groupby(sorted(questions, key=lambda question: question.scene_id), lambda q: q.scene_id):
        numbered += [replace(question, id=f"{scene_id}-q{n:03d}") for n, question in zip(count(), same, strict=False)]
    return tuple(numbered)


class R4DRecord(TypedDict):
    """A record of R4D-Bench's `test.json`; `answer` is the option's text."""

    id: str
    benchmark: str
    task: str
    video: str
    source: str
    som_image: str
    question: str
    question_raw: str
    options: list[str]
    answer: str


Turn = TypedDict("Turn", {"from": str, "value": str})

FrameBox = tuple[float, float, float, float]
"""Left, top, right and bottom of a region in the first frame, as fractions of its width and height."""


class LlavaRecord(TypedDict):
    """A training conversation as LLaVA has it; `regions` are ours, the first is that of `<obj_1>`."""

    id: str
    conversations: list[Turn]
    video: str
    regions: NotRequired[list[FrameBox]]


def to_r4d(
    questions: Iterable[Question], *, videos: Mapping[str, str], som_images: Mapping[str, str]
) -> list[R4DRecord]:
    """Records of R4D-Bench's `test.json`, with `benchmark` saying `worlds`; `question_raw` names the things instead.

    Args:
        questions: what is asked.
        videos: scene id to path; our clips are whole videos, so `video` and `source` are the same.
        som_images: question id to the path of its Set-of-Mark image, for questions that have regions.
    """
    return [
        R4DRecord(
            id=question.id,
            benchmark="worlds",
            task=TASK_NAMES[question.category],
            video=videos[question.scene_id],
            source=videos[question.scene_id],
            som_image=som_images[question.id] if question.regions else "",
            question=question.text,
            question_raw=question.named().text,
            options=list(question.options),
            answer=question.answer,
        )
        for question in questions
    ]


def to_llava(
    questions: Iterable[Question], *, videos: Mapping[str, str], boxes: Mapping[str, Mapping[int, FrameBox]]
) -> list[LlavaRecord]:
    """Conversations for training: every second question open with a short answer, the others with letters.

    Regions are called `<obj_1>`, as in the benchmark; the trainer shows them by marks on the first frame, by boxes in
    words, or both.

    Args:
        questions: what is asked.
        videos: scene id to path.
        boxes: scene id to the boxes of those bodies that the first frame shows.
    """
    return [_conversation(question, videos[question.scene_id], boxes[question.scene_id]) for question in questions]


def _conversation(question: Question, video: str, boxes: Mapping[int, FrameBox]) -> LlavaRecord:
    asked = f"Options:\n{listed(question.options)}\n{ANSWER_BY_LETTER}"
    answer = question.letter
    if zlib.crc32(question.id.encode()) % 2:
        asked, answer = ANSWER_BY_WORDS, question.answer
    human, gpt = f"<video>\n{question.text}\n{asked}", answer
    record = LlavaRecord(
        id=question.id,
        conversations=[{"from": "human", "value": human}, {"from": "gpt", "value": gpt}],
        video=video,
    )
    return record | {"regions": [boxes[body] for body in question.regions]} if question.regions else record


def listed(options: Sequence[str]) -> str:
    """Options with their letters, one a line."""
    return "\n".join(f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=False))


def to_lessons(
    questions: Iterable[Question], *, videos: Mapping[str, str], durations_seconds: Mapping[str, float]
) -> list[LlavaRecord]:
    """Conversations for training on plain worlds, one a question; each scene is also asked how long it is.

    Every answer is in words, since a student made from nothing takes longest to learn what a letter stands for. Things
    go by their names.

    Args:
        questions: what is asked, with their regions, in the order of scenes.
        videos: scene id to path, of all scenes.
        durations_seconds: scene id to seconds from the first frame to the last.
    """
    named = [question.named() for question in questions]
    asked = {scene_id: list(same) for scene_id, same in groupby(named, lambda question: question.scene_id)}
    return [
        _lesson(f"{scene_id}-t{number}", video, text, answer)
        for scene_id, video in videos.items()
        for number, (text, answer) in enumerate(
            [
                *((question.text, question.answer) for question in asked.get(scene_id, [])),
                (_TIME_TEXT, f"{durations_seconds[scene_id]:.2f} seconds"),
            ]
        )
    ]


def _lesson(name: str, video: str, text: str, answer: str) -> LlavaRecord:
    human = f"<video>\n{text}\n\n{ANSWER_BY_WORDS}"
    turns: list[Turn] = [{"from": "human", "value": human}, {"from": "gpt", "value": answer}]
    return LlavaRecord(id=name, conversations=turns, video=video)


def to_timebench(scenes: Iterable[Scene], *, videos: Mapping[str, str]) -> list[R4DRecord]:
    """TimeBench (P4D A3): how long is the video, with 0.25 to 4 times the truth as options.

    As the paper defines it, the truth is always the middle value: it tests whether a model reads the clock at all, and
    is no part of what `balance` promises.
    """
    return [_timebench(scene, videos[scene.id]) for scene in scenes]


def _timebench(scene: Scene, video: str) -> R4DRecord:
    values = [f"{factor * scene.duration_seconds:.2f} seconds" for factor in TIMEBENCH_FACTORS]
    order = scene_rng(scene.id).permutation(len(values)).tolist()
    return R4DRecord(
        id=f"{scene.id}-time",
        benchmark="worlds",
        task="TimeBench",
        video=video,
        source=video,
        som_image="",
        question=_TIME_TEXT,
        question_raw=_TIME_TEXT,
        options=[values[number] for number in order],
        answer=values[TIMEBENCH_FACTORS.index(1.0)],
    )


def scene_rng(scene_id: str) -> np.random.Generator:
    """The draws of a scene's questions: the same everywhere."""
    return np.random.default_rng(zlib.crc32(scene_id.encode()))
