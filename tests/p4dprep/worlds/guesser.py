"""Guessers that read questions and options but never see a video: what a balanced corpus must defeat."""

import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

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


def _features(question: Question) -> list[list[int]]:
    """For each option, the hashed features that hold: its place, rank, length, overlap and value, with every word."""
    words = {"", *re.findall(r"[a-z_<>\-]+\d?", question.text.lower())}
    ranks = _ranks([_measure(option) for option in question.options])
    lengths = _ranks([len(option) for option in question.options])
    rows = []
    for place, option in enumerate(question.options):
        size = round(2 * np.log2(_measure(option) + 0.01))
        own = [f"at {place}", f"rank {ranks[place]} of {len(ranks)}", f"length {lengths[place]}", f"size {size}"]
        own += [f"overlap {_overlap(question, option)}", option, *option.lower().split()]
        rows.append([zlib.crc32(f"{word}|{feature}".encode()) % _NUM_FEATURES for word in words for feature in own])
    return rows


def learned(train: Sequence[Question], seed: int = 0, num_epochs: int = 6) -> Rule:
    """A logistic regression over the options of a question, on words crossed with what an option looks like."""
    rng = np.random.default_rng(seed)
    weights, squares = np.zeros(_NUM_FEATURES), np.full(_NUM_FEATURES, 1e-6)
    seen = [(question.answer_index, [np.array(row) for row in _features(question)]) for question in train]
    for _ in range(num_epochs):
        for number in rng.permutation(len(seen)).tolist():
            answer, rows = seen[number]
            scores = np.array([weights[row].sum() for row in rows])
            chances = np.exp(scores - scores.max())
            chances /= chances.sum()
            for place, row in enumerate(rows):
                slope = chances[place] - float(place == answer)
                squares[row] += slope**2
                weights[row] -= 0.05 * slope / np.sqrt(squares[row])
    return lambda question: int(np.argmax([weights[row].sum() for row in _features(question)]))
