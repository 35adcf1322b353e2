"""One training step with targets from the cache against the same step with the teacher run inside it.

    OMP_NUM_THREADS=1 python -m benchmarks.train_step [--rounds 40] [--json]
    OMP_NUM_THREADS=1 python -m benchmarks.train_step --cache CACHE --qa QA.json --student MODEL

Measured: both ways on the same batches of one process, in alternating order, with `l4p:mini` and the tiny student on
worlds that it makes itself, or with what is given; the teacher is the one that the cache names and gets the frames that
the cache keeps. Ratios are medians over pairs with a 95% bootstrap interval. Counted: FLOPs of both ways, and those of
the paper's sizes, see `benchmarks.full_step`, which a GPU also times.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.clock import NUM_WARM_UP, Clock, paired_ratio
from benchmarks.full_step import FullStep, count_full, time_full
from p4dprep import registry
from p4dprep.cache import Cache
from p4dprep.extract import make_plan
from p4dprep.extract import parse_config as parse_request
from p4dprep.extract.worker import Worker
from p4dprep.targets import FrameBatch, Teacher
from p4dprep.worlds.lists import write_lists
from p4dprep.worlds.write import Recipe, open_folder, process_pool, render_clips
from student.backbones import load
from student.conversations import Report, read_conversations
from student.data import DataConfig, TrainingData, TrainingSample
from student.distilled import Collate, DistilledStudent, TrainingBatch
from student.new import new_student, texts_of_conversations
from student.order import SampleKey
from student.targets import TargetBatch
from student.train import build_model, p4d_config
from student.train_config import TrainConfig
from teachers.l4p.config import MINI_FOLDER, L4PConfig

# What is trained


@dataclass(frozen=True, kw_only=True)
class Request:
    """Places of a training: cache, conversations and student."""

    cache: str
    qa: str
    student: str

    def config(self, batch_size: int) -> TrainConfig:
        """The paper's recipe on them; nothing is written to `out`."""
        return TrainConfig(
            cache=self.cache, qa=(self.qa,), student=self.student, out="unused", batch_size=batch_size,
            micro_batch_size=batch_size, precision="float32", on_problem="leave out",
        )  # fmt: skip


def make_request(folder: Path, num_clips: int) -> Request:
    """Worlds, their targets by `l4p:mini` with the frames kept, and a tiny student; Ray takes no part."""
    side, recipe = L4PConfig.load(MINI_FOLDER).image_size, Recipe(split="train", size=(96, 128))
    store = open_folder(folder / "worlds", recipe)
    with process_pool(1) as pool:
        render_clips(store, recipe, range(num_clips), pool, lambda *_: None)
        write_lists(store, recipe, num_clips, pool, lambda *_: None)
    places = {"source": f"{folder}/worlds/manifest.jsonl", "cache": f"{folder}/cache"}
    plan = make_plan(parse_request(places | {"teachers": ("l4p:mini",), "size": side, "keep_frames": side}))
    for group in plan.groups:
        worker = Worker(group.on(0).config)
        for task in plan.tasks(group):
            worker.run(task)
        worker.close()
    qa = f"{folder}/worlds/qa.json"
    return Request(
        cache=places["cache"], qa=qa, student=str(new_student(folder / "student", texts_of_conversations([qa])))
    )


def open_data(request: Request, targets: tuple[str, ...]) -> TrainingData:
    """The samples with these targets; what cannot be used is left out."""
    report = Report(on_problem="leave out")
    conversations = read_conversations([request.qa], report)
    return TrainingData(Cache.open(request.cache), conversations, DataConfig(targets=targets), report)


# One step, in parts


@dataclass(kw_only=True, eq=False)
class Stepper:
    """Takes steps of a student either way.

    Attributes:
        model: student and losses, on the device.
        teacher: set up on the same device.
        names: target of the teacher to its array in the cache.
        device: `cpu` or `cuda`.
    """

    model: DistilledStudent
    teacher: Teacher
    names: Mapping[str, str]
    device: str
    clock: Clock = field(init=False)

    def __post_init__(self) -> None:
        learnt = [values for values in self.model.parameters() if values.requires_grad]
        self._learnt, self._optimizer = learnt, torch.optim.AdamW(learnt, lr=1e-5)
        assert self.model.p4d is not None
        self.model.p4d.register_forward_pre_hook(lambda *_: self.clock.mark("student forward"))

    def step(self, batch: TrainingBatch, frames: FrameBatch, online: bool, clock: Clock) -> float:
        """One optimiser step of one micro-batch; the loss.

        Args:
            batch: as the loader gives it.
            frames: what the teacher sees of the batch's rows with targets.
            online: ask the teacher for the targets instead of taking the batch's.
            clock: told of every part.
        """
        self.clock = clock
        if online:
            batch = replace(batch, targets=self.ask(batch.targets, frames))
            clock.mark("teacher")
        losses = self.model(batch.to(self.device))
        clock.mark("P4D forward")
        loss: Tensor = losses["sft"] + losses["p4d"]
        loss.backward()  # type: ignore[no-untyped-call]
        clock.mark("backward")
        nn.utils.clip_grad_norm_(self._learnt, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        clock.mark("optimiser")
        return loss.item()

    def ask(self, targets: TargetBatch, frames: FrameBatch) -> TargetBatch:
        """The same rows' targets, those of the teacher from itself."""
        arrays = self.teacher.predict(frames).arrays
        found = {name: torch.from_numpy(np.asarray(arrays[target])) for target, name in self.names.items()}
        return replace(targets, arrays={**targets.arrays, **found})


def frames_of(samples: Sequence[TrainingSample]) -> FrameBatch:
    """The kept frames of those samples that have targets."""
    shown = [item for item in samples if item.clip_id is not None]
    return FrameBatch(
        clip_ids=tuple(str(item.clip_id) for item in shown),
        frames_bthwc=np.stack([_known(item.sample.frames_thwc) for item in shown]),
        time_seconds_bt=np.stack([_known(item.sample.time_seconds) for item in shown]),
    )


def _known(values: NDArray[Any] | None) -> NDArray[Any]:
    assert values is not None
    return values


# Measuring


_CONVERSATIONS = (1, 4, 8)
"""That share a clip of the 7 B student, see `conversations_per_sample`."""
WAYS = ("cache", "online")
Times = dict[str, dict[str, list[tuple[float, float]]]]
"""Way to part to (wall, CPU) seconds of every round."""


@dataclass(kw_only=True, eq=False)
class Race:
    """Both ways on the same batches.

    Attributes:
        stepper: takes the steps.
        collate: makes batches.
        data: samples with and without the teacher's targets, by way.
        batch_size: samples of a step.
    """

    stepper: Stepper
    collate: Collate
    data: Mapping[str, TrainingData]
    batch_size: int

    def load(self, way: str, number: int) -> tuple[TrainingBatch, FrameBatch]:
        """One batch, read as a loader's process reads it."""
        data = self.data[way]
        first = number * self.batch_size
        samples = [data[SampleKey(0, row % len(data))] for row in range(first, first + self.batch_size)]
        return self.collate(samples), frames_of(samples)

    def check(self) -> None:
        """Both ways must train on the same: their losses differ by no more than the cache's rounding."""
        batch, frames = self.load("cache", 0)
        with torch.no_grad():
            asked = replace(batch, targets=self.stepper.ask(batch.targets, frames))
            self.stepper.clock = Clock(self.stepper.device)
            ours, theirs = (self.stepper.model(each.to(self.stepper.device))["p4d"].item() for each in (batch, asked))
        if abs(ours - theirs) > 0.01 * abs(theirs):
            raise SystemExit(f"the loss is {ours} from the cache and {theirs} from the teacher: these are not the same")

    def run(self, num_rounds: int) -> Times:
        """Steps of both ways in alternation, after a warm-up."""
        times: Times = {way: {} for way in WAYS}
        for number in range(-NUM_WARM_UP, num_rounds):
            for way in WAYS if number % 2 else WAYS[::-1]:
                loading = Clock(self.stepper.device)
                batch, frames = self.load(way, number + NUM_WARM_UP)
                loading.mark("loader")
                clock = Clock(self.stepper.device)
                self.stepper.step(batch, frames, way == "online", clock)
                for part, seconds in (loading.parts | clock.parts | {"step": clock.total}).items():
                    if number >= 0:
                        times[way].setdefault(part, []).append(seconds)
        return times

    def count(self) -> dict[str, dict[str, float]]:
        """FLOPs of each part, by way."""
        found = {}
        for way in WAYS:
            with FlopCounterMode(display=False) as counter:
                clock = Clock(self.stepper.device, counter)
                self.stepper.step(*self.load("cache", 0), way == "online", clock)
            found[way] = {part: flops for part, (flops, _) in clock.parts.items()}
        return found


def measure(request: Request, num_rounds: int, batch_size: int, device: str) -> dict[str, Any]:
    """Times and FLOPs of a student that fits the machine."""
    config, cache = request.config(batch_size), Cache.open(request.cache)
    latents = p4d_config(config, cache).latents
    data = open_data(request, p4d_config(config, cache).targets)
    if latents is None:
        raise SystemExit(f"{request.cache} has no teacher's latents: nobody to run online")
    group = data.targets[latents].group
    torch.manual_seed(0)
    backbone = load(request.student, dtype=torch.float32, tpe=True)
    teacher = registry.build(registry.parse_teacher(cache.group(group).teacher))
    teacher.setup(device)
    names = {target.spec.name: name for name, target in data.targets.items() if target.group == group}
    others = tuple(name for name in data.targets if name not in names.values())
    stepper = Stepper(
        model=build_model(config, cache, backbone).to(device).train(), teacher=teacher, names=names, device=device
    )
    race = Race(
        stepper=stepper,
        collate=Collate(backbone.adapter, config.time_cue),
        data={"cache": data, "online": open_data(request, others)},
        batch_size=batch_size,
    )
    race.check()
    flops, times = race.count(), race.run(num_rounds)
    return {"teacher": cache.group(group).teacher, "flops": flops} | summary(times, num_rounds)


def summary(times: Times, num_rounds: int) -> dict[str, Any]:
    """Medians in milliseconds and paired ratios of the whole step, without and with the loader in the same process."""
    found: dict[str, Any] = {"rounds": num_rounds, "milliseconds": {}, "ratio": {}}
    for which, name in enumerate(("wall", "cpu")):
        found["milliseconds"][name] = {
            way: {part: 1e3 * statistics.median(each[which] for each in taken) for part, taken in parts.items()}
            for way, parts in times.items()
        }
        steps = [[each[which] for each in times[way]["step"]] for way in WAYS]
        both = [
            [a[which] + b[which] for a, b in zip(times[way]["loader"], times[way]["step"], strict=True)] for way in WAYS
        ]
        found["ratio"][name] = {"step": paired_ratio(*steps), "loader and step": paired_ratio(*both)}
    return found


# Showing


def show(found: Mapping[str, Any]) -> None:
    """The tables of docs/benchmarks.md."""
    print(f"\n{found['device']}, {found['teacher']}, batches of {found['batch_size']}, {found['rounds']} pairs")
    print("\n| part of a step | cache, ms | online, ms | cache, CPU ms | online, CPU ms | cache, GFLOPs | online |")
    print("|" + " --- |" * 7)
    wall, cpu, flops = *(found["milliseconds"][name] for name in ("wall", "cpu")), found["flops"]
    for part in ("teacher", "student forward", "P4D forward", "backward", "optimiser", "step", "loader"):
        row = [f"{times[way].get(part, 0):.1f}" for times in (wall, cpu) for way in WAYS]
        counts = [sum(flops[way].values()) if part == "step" else flops[way].get(part, 0) for way in WAYS]
        print(f"| {part} | {' | '.join(row)} | {' | '.join(f'{count / 1e9:.2f}' for count in counts)} |")
    for name, ratios in found["ratio"].items():
        for what, ratio in ratios.items():
            print(f"{what}, {name}: {ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})")
    print(
        "\n| student's frames | conversations | tokens | student forward | P4D forward | backward | full L4P | "
        "cache / online | a conversation |"
    )
    print("|" + " --- |" * 9)
    for each in found["full"]:
        parts = [f"{each[part] / 1e12:.1f}" for part in ("student forward", "P4D forward", "backward", "teacher")]
        print(
            f"| {each['side']} x {each['side']} | {each['conversations']} | {each['tokens']} | {' | '.join(parts)} | "
            f"{each['ratio']:.3f} | {each['a conversation'] / 1e12:.1f} |"
        )
    print(f"the same step timed: {json.dumps(found['full_timed'])}")


def main() -> None:
    """Measure, count, and print tables or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="pairs of steps")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--num-clips", type=int, default=8, help="worlds to make without --cache")
    parser.add_argument("--sides", type=int, nargs="+", default=[224, 448], help="frames of the 7 B student")
    for name in ("cache", "qa", "student"):
        parser.add_argument(f"--{name}", help="give all three, or none")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    given = [options.cache, options.qa, options.student]
    if any(given) and not all(given):
        parser.error("give all of --cache, --qa and --student, or none")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        request = (
            Request(cache=options.cache, qa=options.qa, student=options.student)
            if all(given)
            else make_request(Path(folder), options.num_clips)
        )
        found = measure(request, options.rounds, options.batch_size, device)
    found |= {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "batch_size": options.batch_size,
        "full": [count_full(side, number) for side in options.sides for number in _CONVERSATIONS],
        "full_timed": "not run on a GPU",
    }
    if device == "cuda":
        found["full_timed"] = {side: time_full(FullStep(side, device), options.rounds) for side in options.sides}
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        show(found)


if __name__ == "__main__":
    main()
