"""Guessers that read questions and options but never see a video: what a balanced corpus must defeat."""

import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

from p4dprep.worlds.questions import Question

_NUM_FEATURES = 2**16
Rule = Callable[[Question], int]


def accuracy(rule: Rule, questions: Sequence[Question]) -> float:
    return float(np.mean([rule(question) == question.answer_index for question in questions]))


def chance(questions: Sequence[Question]) -> float:
    return float(np.mean([1 / len(question.options) for question in questions]))


def _measure(option: str) -> float:
    """The size of the number or point in an option, or the option's length."""
    numbers = [float(found) for found in re.findall(r"-?\d+(?:\.\d+)?", re.sub(r"<obj_\d>", "", option))]
    return float(np.linalg.norm(numbers[:3])) if numbers else float(len(option))


def _overlap(question: Question, option: str) -> int:
    return len(set(question.text.lower().split()) & set(option.lower().split()))


def _ranks(values: Sequence[float]) -> list[int]:
    return np.argsort(np.argsort(values, kind="stable"), kind="stable").tolist()


def fixed_rules() -> dict[str, Rule]:
    """Positions, sizes of options and words that the question shares with them."""
    rules: dict[str, Rule] = {f"option {index}": lambda q, i=index: min(i, len(q.options) - 1) for index in range(5)}
    rules |= {
        f"value {rank}": lambda q, r=rank: _ranks([_measure(option) for option in q.options]).index(
            min(r, len(q.options) - 1)
        )
        for rank in range(5)
    }
    rules["longest"] = lambda q: int(np.argmax([len(option) for option in q.options]))
    rules["shortest"] = lambda q: int(np.argmin([len(option) for option in q.options]))
    rules["overlap"] = lambda q: int(np.argmax([_overlap(q, option) for option in q.options]))
    return rules


def majority(train: Sequence[Question]) -> Rule:
    """The answer that is most often right for the template, else for the category."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for question in train:
        counts[question.template][question.answer] += 1
        counts[question.category][question.answer] += 1

    def rule(question: Question) -> int:
        scores = [(counts[question.template][option], counts[question.category][option]) for option in question.options]
        return scores.index(max(scores))

    return rule


@cache
def _hash(text: str) -> int:
    return zlib.crc32(text.encode())


def _features(question: Question) -> list[np.ndarray]:
    """For each option its features: place, rank, length, overlap, value and words, each with every word asked."""
    words = np.array([_hash(word) for word in {"", *re.findall(r"[a-z_<>\-]+\d?", question.text.lower())}])
    ranks = _ranks([_measure(option) for option in question.options])
    lengths = _ranks([len(option) for option in question.options])
    rows = []
    for place, option in enumerate(question.options):
        size = round(2 * np.log2(_measure(option) + 0.01))
        own = [f"at {place}", f"rank {ranks[place]} of {len(ranks)}", f"length {lengths[place]}", f"size {size}"]
        own += [f"overlap {_overlap(question, option)}", option, *option.lower().split()]
        mixed = words[:, None] * 2654435761 + np.array([_hash(feature) for feature in own])
        rows.append((mixed >> 7).ravel() % _NUM_FEATURES)
    return rows


class _Table:
    """The features of many questions as flat arrays: feature, and which option of which question has it."""

    def __init__(self, questions: Sequence[Question]) -> None:
        rows = [_features(question) for question in questions]
        self.num, self.width = len(questions), max(map(len, rows))
        flat = [(number * self.width + place, row) for number, of in enumerate(rows) for place, row in enumerate(of)]
        self.feature = np.concatenate([row for _, row in flat])
        self.owner = np.repeat([owner for owner, _ in flat], [len(row) for _, row in flat])
        self.real = np.isin(np.arange(self.num * self.width), [owner for owner, _ in flat])
        self.answer = np.arange(self.num) * self.width + [question.answer_index for question in questions]

    def chances(self, weights: np.ndarray) -> np.ndarray:
        scores = np.bincount(self.owner, weights[self.feature], self.num * self.width)
        grid = np.where(self.real, scores, -np.inf).reshape(self.num, self.width)
        odds = np.exp(grid - grid.max(axis=1, keepdims=True))
        return (odds / odds.sum(axis=1, keepdims=True)).ravel()


def learned(train: Sequence[Question], num_epochs: int = 8, batch: int = 256) -> Rule:
    """A logistic regression over a question's options (Adagrad), on words crossed with what an option looks like."""
    tables = [_Table(train[start : start + batch]) for start in range(0, len(train), batch)]
    weights, squares = np.zeros(_NUM_FEATURES), np.full(_NUM_FEATURES, 1e-6)
    for _ in range(num_epochs):
        for table in tables:
            slopes = table.chances(weights)
            slopes[table.answer] -= 1
            gradient = np.bincount(table.feature, slopes[table.owner], _NUM_FEATURES)
            squares += gradient**2
            weights -= 0.03 * gradient / np.sqrt(squares)
    return lambda question: int(np.argmax(_Table([question]).chances(weights)))
