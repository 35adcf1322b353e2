"""Whole runs of `p4dprep train` small enough for a test: a cache that keeps its frames, talks, stills and a student."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from p4dprep.cache import Cache, ClipResult
from p4dprep.corpus import CORPUS_COLUMNS
from p4dprep.targets import RGB_DIMS, TargetSpec
from student.new import new_student
from tests.student.p4d_cache import CAMRAY, DEPTH, FLOW, LATENTS, MOTION, SAMPLING, SIZE, T, values_of, write_heads

ANSWERS = ("2 m", "The disc moves left and then passes behind the wall", "It is near", "Yes")
FRAMES = TargetSpec(
    name="frames", dims=RGB_DIMS, shape=(T, SIZE, SIZE, 3), dtype="uint8", units="1", quantity="rgb frames"
)
GROUPS = {"l4p": (LATENTS, DEPTH, FLOW, MOTION, CAMRAY), "frames": (FRAMES,)}
TIMING = ("samples_per_second", "data_wait_fraction")


def write_world(folder: Path, *, num_clips: int = 5, num_stills: int = 2, seed: int = 0) -> Path:
    """`cache`, `qa.json` about its clips and some still images, and `student`, in a folder; the seed is the models'."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_cache(folder, num_clips, seed)
    talks = [_talk(f"q-{n}", {"video": f"clip-{n}"}, "<video>\nHow far?", n) for n in range(num_clips)]
    for number in range(num_stills):
        picture = np.random.default_rng(number).integers(0, 255, (24, 24, 3), np.uint8)
        Image.fromarray(picture).save(folder / f"still-{number}.png")
        talks.append(_talk(f"s-{number}", {"image": f"still-{number}.png"}, "<image>\nWhat is left of it?", number))
    (folder / "qa.json").write_text(json.dumps(talks))
    new_student(folder / "student", ["How far?", "What is left of it?", *ANSWERS], seed=seed)
    return folder


def _talk(name: str, media: dict[str, str], question: str, number: int) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": ANSWERS[number % len(ANSWERS)]}]
    return {"id": name, "conversations": turns} | media


def _write_cache(folder: Path, num_clips: int, seed: int) -> None:
    cache = Cache.create(str(folder / "cache"), SAMPLING, clips_per_unit=2)
    rows = [{"id": f"clip-{n}", "uri": f"/videos/clip-{n}.mp4"} for n in range(num_clips)]
    cache.extend(pa.Table.from_pylist(rows, schema=CORPUS_COLUMNS))
    write_heads(folder / "heads", GROUPS["l4p"])
    for name, specs in GROUPS.items():
        heads = folder / "heads" if name == "l4p" else None
        group = cache.add_group(name, name, {"kind": name, "seed": seed}, specs, heads)
        for index in range(num_clips):
            arrays = {spec.name: _values(spec, index) for spec in specs}
            objects = group.write_clip(index, arrays, np.arange(T, dtype=np.float64))
            result = ClipResult(index=index, id=f"clip-{index}", status="ok", num_distinct_frames=T, objects=objects)
            group.commit(index // cache.clips_per_unit, [result])


def _values(spec: TargetSpec, index: int) -> NDArray[np.generic]:
    if spec is FRAMES:
        return np.random.default_rng(index).integers(0, 255, spec.shape, np.uint8)
    return values_of(spec, index)


def request(world: Path, run: Path, **changes: Any) -> dict[str, Any]:
    """Values of a request: 12 steps of 4 samples, a checkpoint every second one."""
    values = {
        "cache": str(world / "cache"),
        "qa": [str(world / "qa.json")],
        "media": str(world),
        "student": str(world / "student"),
        "out": str(run),
        "decoder_width": 16,
        "batch_size": 4,
        "micro_batch_size": 2,
        "max_steps": 12,
        "learning_rate": 1e-3,
        "precision": "float32",
        "loader_workers": 0,
        "log_steps": 1,
        "save_steps": 2,
        "picture_steps": 5,
        "trainer": {"use_cpu": True},
    }
    return values | changes


def untimed(log: list[dict[str, float]]) -> list[dict[str, float]]:
    """A log without how long things took."""
    return [{name: value for name, value in line.items() if name not in TIMING} for line in log]
