"""What latents tell of the truth by a linear probe: `python -m benchmarks.probe_latents CACHE|RUN TRUTH`.

CACHE holds latents of a teacher, TRUTH `truth?latents=ROWS` of the same clips; of a RUN of `p4dprep train` that was
taught latents, and not on its own `distill_cells`, they are what its student predicts of TRUTH's clips. They are
averaged over the cells of the truth, whose every channel is then fitted by ridge regression on 70% of the clips, and R2
is told of the others: 1 is all of it, 0 no more than the mean.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from p4dprep.cache import Cache
from p4dprep.errors import RequestError
from student import run_folder
from student.maps import judge_maps
from teachers._truth_latents import CHANNELS

FIT_FRACTION, RIDGE = 0.7, 30.0


def r_squared(features_nc: NDArray[np.float32], truth_nc: NDArray[np.float32], num_fit: int) -> NDArray[np.float64]:
    """Share of each truth's variance, over the rows from `num_fit` on, that a fit on those before tells; (c,)."""
    mean, spread = features_nc[:num_fit].mean(0), features_nc[:num_fit].std(0) + 1e-6
    features = np.pad((features_nc - mean) / spread, ((0, 0), (0, 1)), constant_values=1.0).astype(np.float64)
    fit, truth = features[:num_fit], truth_nc.astype(np.float64)
    weights = np.linalg.solve(fit.T @ fit + RIDGE * np.eye(fit.shape[1]), fit.T @ truth[:num_fit])
    error = np.square(features[num_fit:] @ weights - truth[num_fit:]).mean(0)
    told: NDArray[np.float64] = 1 - error / np.maximum(truth[num_fit:].var(0), 1e-9)
    return told


def read_pairs(cache: Cache, group: str, truth: Cache) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Latents and places of cells (clip, cell, feature), and truth (clip, cell, channel), of the clips in both."""
    index_of = {clip: index for index, clip in enumerate(truth.clips()["id"].to_pylist())}
    seen, known = cache.group(group).states().ok, truth.group("truth").states().ok
    features, truths = [], []
    for index, clip in enumerate(cache.clips()["id"].to_pylist()):
        other = index_of.get(clip)
        if other is None or not seen[index] or not known[other]:
            continue
        (true,) = truth.group("truth").read(other, "latents")  # one tap
        latents = torch.from_numpy(cache.group(group).read(index, "latents").astype(np.float32))
        latents_ktcyx = functional.adaptive_avg_pool3d(latents.movedim(-1, 1), true.shape[:3])
        features.append(latents_ktcyx.flatten(0, 1).flatten(1).T.numpy())
        truths.append(true.reshape(-1, true.shape[-1]))
    places = np.broadcast_to(np.eye(features[0].shape[0], dtype=np.float32), (len(features), *[len(features[0])] * 2))
    return np.concatenate([np.stack(features), places], axis=-1), np.stack(truths).astype(np.float32)


def read_latents(source: str, group: str, truth_url: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """As `read_pairs`, of a cache or of the student of a run."""
    is_run = (Path(source) / run_folder.CONFIG).exists()
    if is_run and run_folder.read_settings(source).get("distill_cells"):
        raise RequestError(f"{source} was taught on its own distill_cells; latents are read of runs without them")
    truth = Cache.open(truth_url)
    if not is_run:
        return read_pairs(Cache.open(source), group, truth)
    with tempfile.TemporaryDirectory(prefix="p4dprep-") as folder:
        predicted = judge_maps(source, truth, folder, cache=truth_url)
        return read_pairs(predicted.cache, predicted.group, truth)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="CACHE|RUN")
    parser.add_argument("truth", metavar="TRUTH")
    parser.add_argument("--group", default="l4p", help="of the latents in CACHE")
    options = parser.parse_args()
    features, truth = read_latents(options.source, options.group, options.truth)
    num_clips, num_cells, _ = features.shape
    told = r_squared(
        features.reshape(num_clips * num_cells, -1),
        truth.reshape(num_clips * num_cells, -1),
        int(FIT_FRACTION * num_clips) * num_cells,
    )
    print(f"{num_clips} clips; R2 of those not fitted")
    for name, value in zip(CHANNELS, told, strict=True):
        print(f"{name:12} {value:6.3f}")


if __name__ == "__main__":
    main()
