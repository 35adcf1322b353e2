"""How many speed questions can be answered without a clock: `python -m benchmarks.blind_speed WORLDS`.

Of a split's questions that ask for metres a second, it counts those that are right for whoever knows exactly how far
the object went and takes every clip to last equally long; the length that makes most of them right is found by trying.
What a student without times reaches beyond that, it knows of lengths in some other way.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

UNIT = " m/s"
ASSUMED_SECONDS = np.geomspace(0.25, 8, 200)


def blind_accuracy(speeds: Sequence[float], options: Sequence[Sequence[float]], seconds: Sequence[float]) -> float:
    """Share of questions that the best constant length answers, taking the option nearest in ratio.

    Args:
        speeds: the truth, m/s, per question; one of its options.
        options: m/s, per question.
        seconds: how long each question's clip lasts.
    """
    best = 0.0
    for assumed in ASSUMED_SECONDS:
        guesses = np.asarray(speeds) * np.asarray(seconds) / assumed
        taken = [
            min(given, key=lambda one: abs(np.log(one / guess))) for given, guess in zip(options, guesses, strict=True)
        ]
        best = max(best, float(np.mean(np.equal(taken, speeds))))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("worlds", type=Path, help="a folder of `p4dprep worlds`, with test.json")
    folder: Path = parser.parse_args().worlds
    scenes = map(json.loads, (folder / "scenes.jsonl").read_text().splitlines())
    lasts = {scene["video"]: scene["duration_seconds"] for scene in scenes}
    asked = [each for each in json.loads((folder / "test.json").read_text()) if each["answer"].endswith(UNIT)]
    if not asked:
        parser.error(f"{folder / 'test.json'} asks for no metres a second; name worlds of a split that does")
    options = [[float(option.removesuffix(UNIT)) for option in each["options"]] for each in asked]
    speeds = [float(each["answer"].removesuffix(UNIT)) for each in asked]
    found = blind_accuracy(speeds, options, [lasts[each["video"]] for each in asked])
    chance = np.mean([1 / len(given) for given in options])
    print(f"{len(asked)} questions in m/s: chance {100 * chance:.1f}, distances without times {100 * found:.1f}")


if __name__ == "__main__":
    main()
