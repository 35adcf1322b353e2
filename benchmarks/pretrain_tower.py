"""A vision tower that knows colours and places in single frames, for the student of docs/ablation.md.

    python -m benchmarks.pretrain_tower STUDENT OUT --cache CACHE --worlds FOLDER

A published student's tower was trained on pictures long before anybody distils into its LLM, and stays frozen then. The
tower of a student from `p4dprep student new --size small` is random; this teaches it, on the kept frames of plain
worlds, which colours each token (2 x 2 patches) shows and where in the picture they are centred. No depth, no motion
and no time: it sees one frame at once.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from p4dprep.cache import Cache
from student.backbones import Backbone, load

COLOURS = ("red", "green", "blue", "yellow", "purple", "white")
_WEIGHTS = "model.safetensors"
_IS_SEEN = 0.002
"""Share of a cell from which a thing counts as seen there."""
_SEEN_WEIGHT, _PLACE_WEIGHT = 4.0, 20.0


def labels(instances_yx: NDArray[np.uint8], colours: list[str], cells: int) -> NDArray[np.float32]:
    """What a frame's cells show, (cells * cells, colours, 3): coverage, and x and y of its centre in the frame, 0-1."""
    size, side = len(instances_yx), len(instances_yx) // cells
    rows, columns = ((each.reshape(cells, side, cells, side).swapaxes(1, 2).reshape(-1, side, side) + 0.5) / size
                     for each in np.indices((size, size)))  # fmt: skip
    found = np.zeros((cells * cells, len(COLOURS), 3), np.float32)
    for body, colour in enumerate(colours):
        mask = (instances_yx == body + 1).reshape(cells, side, cells, side).swapaxes(1, 2).reshape(-1, side, side)
        count = mask.sum((1, 2))
        place = np.stack([(mask * each).sum((1, 2)) for each in (columns, rows)], 1) / np.maximum(count, 1)[:, None]
        found[:, COLOURS.index(colour)] = np.concatenate([count[:, None] / side**2, place], 1)
    return found


def read(cache: Cache, worlds: Path, cells: int) -> tuple[Tensor, Tensor]:
    """Every kept frame (n, h, w, 3) and its labels (n, patches, colours, 3)."""
    scenes = {}
    with open(worlds / "scenes.jsonl") as file:
        for line in map(json.loads, file):
            scenes[line["id"]] = [body["name"].split()[0] for body in line["bodies"]]
    ids = cache.clips().column("id").to_pylist()
    frames, found = [], []
    for clip, name in enumerate(ids):
        if name not in scenes:
            continue
        frames.append(cache.group("frames").read(clip, "frames")[::3])
        instances_tyx = cache.group("truth").read(clip, "instances")[::3]
        found.append(np.stack([labels(each, scenes[name], cells) for each in instances_tyx]))
    return torch.from_numpy(np.concatenate(frames)), torch.from_numpy(np.concatenate(found))


def as_shown(student: Backbone, frames_bhwc: Tensor) -> Tensor:
    """Frames as the student's processor shows them to its tower, (b, c, h, w), here without resizing."""
    looks = student.adapter.processor.video_processor
    mean, std = (255 * torch.tensor(each).view(3, 1, 1) for each in (looks.image_mean, looks.image_std))
    return (frames_bhwc.movedim(-1, 1).float() - mean) / std


def main() -> None:
    """Train, and write the student with its new tower."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("student", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cache", required=True)
    parser.add_argument("--worlds", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=128)
    options = parser.parse_args()
    torch.manual_seed(0)
    student = load(options.student, dtype=torch.float32)
    tower = student.model.get_submodule("model.vision_tower").train()
    config = tower.config
    cells = config.image_size // config.patch_size // 2
    frames, truth = read(Cache.open(options.cache), options.worlds, cells)
    head = nn.Linear(config.hidden_size, len(COLOURS) * 3)
    optimizer = torch.optim.AdamW([*tower.parameters(), *head.parameters()], lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, options.steps)
    started = time.perf_counter()
    for step in range(options.steps):
        rows = torch.randint(len(frames), (options.batch,))
        pixels = as_shown(student, frames[rows])
        pooled = (
            tower(pixels, output_hidden_states=True).hidden_states[-1].unflatten(1, (cells, 2, cells, 2)).mean((2, 4))
        )
        said = head(pooled.flatten(1, 2)).unflatten(-1, (len(COLOURS), 3))
        cover, place = truth[rows][..., 0], truth[rows][..., 1:]
        seen = cover > _IS_SEEN
        errors = functional.mse_loss(said[..., 1:], place, reduction="none").sum(-1)
        told = functional.binary_cross_entropy_with_logits(said[..., 0], seen.float())
        loss = _SEEN_WEIGHT * told + _PLACE_WEIGHT * (errors * seen).sum() / seen.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == options.steps - 1:
            found = (said[..., 0] > 0)[seen].float().mean()
            error = (said[..., 1:] - place).abs()[seen].mean()
            print(
                f"step {step}: loss {loss:.3f}, {100 * found:.0f}% of what is seen is found, off by {error:.3f} of a "
                f"frame, {time.perf_counter() - started:.0f} s",
                flush=True,
            )
    shutil.copytree(options.student, options.out)
    weights = load_file(options.student / _WEIGHTS)
    learnt = tower.state_dict()
    names = {name: next(key for key in weights if key.endswith(f"vision_tower.{name}")) for name in learnt}
    save_file(
        weights | {names[name]: values.contiguous() for name, values in learnt.items()},
        options.out / _WEIGHTS,
        {"format": "pt"},
    )


if __name__ == "__main__":
    main()
