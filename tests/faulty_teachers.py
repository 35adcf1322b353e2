"""Teachers of a stranger's package, for tests: a plain one, and one for each way a teacher can go wrong.

`install` lays them out as an installed package with entry points, and while `seen` lasts they are found as any other,
by Ray's workers too.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from p4dprep.targets import FrameBatch, FrameGeometry, Predictions, Resources, TargetSpec, Teacher, TeacherInfo

MARKER = b"\x07"


class Brightness(Teacher):
    """A metric depth of 1 + brightness: cheap, exact and different for every frame."""

    info: ClassVar[TeacherInfo] = TeacherInfo(summary="brightness", licence="none", argument="", downloads="nothing")
    resources: ClassVar[Resources] = Resources(batch_size=2, num_gpus=0, num_cpus=0.5)

    def __init__(self, options: Mapping[str, str]) -> None:
        self.options = dict(options)

    @classmethod
    def from_spec(cls, argument: str, options: Mapping[str, str]) -> Self:
        return cls(options)

    def resolved_spec(self) -> tuple[str, dict[str, str]]:
        return "", self.options

    def targets(self, frames: FrameGeometry) -> tuple[TargetSpec, ...]:
        shape = (frames.num_frames, frames.height, frames.width)
        return (
            TargetSpec(
                name="depth", dims=("t", "y", "x"), shape=shape, dtype="float32", units="m", quantity="metric depth"
            ),
        )

    def fingerprint(self) -> dict[str, str]:
        return {"offset": self.options.get("offset", "1")}

    def setup(self, device: str) -> None:
        pass

    def predict(self, batch: FrameBatch) -> Predictions:
        grey_bthw = batch.frames_bthwc.astype(np.float32).mean(-1) / 255 + float(self.options.get("offset", "1"))
        return Predictions(clip_ids=batch.clip_ids, arrays={"depth": grey_bthw.astype(np.float32)})


class Slow(Brightness):
    """As long per clip as a GPU teacher, without the GPU: `?milliseconds=50`, its arithmetic included."""

    def predict(self, batch: FrameBatch) -> Predictions:
        end = time.perf_counter() + len(batch.clip_ids) * float(self.options.get("milliseconds", "50")) / 1000
        predictions = super().predict(batch)
        time.sleep(max(0.0, end - time.perf_counter()))
        return predictions


class Raises(Brightness):
    """Raises for clips whose id holds `bad`."""

    def predict(self, batch: FrameBatch) -> Predictions:
        if any("bad" in clip_id for clip_id in batch.clip_ids):
            raise ArithmeticError("this clip is too bad")
        return super().predict(batch)


class Kills(Brightness):
    """Takes its whole process down for clips whose id holds `bad`."""

    def predict(self, batch: FrameBatch) -> Predictions:
        if any("bad" in clip_id for clip_id in batch.clip_ids):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().predict(batch)


class DiesInSetup(Brightness):
    def setup(self, device: str) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class FailsInSetup(Brightness):
    def setup(self, device: str) -> None:
        raise RuntimeError("weights went missing")


class BadOutput(Brightness):
    """Wrong in the way that `?fault=` says."""

    FAULTS: ClassVar[dict[str, Callable[[NDArray[Any]], NDArray[Any]]]] = {
        "nan": lambda depth: np.full_like(depth, np.nan),
        "one_nan": lambda depth: np.where(np.arange(depth.size).reshape(depth.shape) == depth.size // 2, np.nan, depth),
        "inf": lambda depth: np.where(np.arange(depth.size).reshape(depth.shape) == 3, np.inf, depth),
        "overflow": lambda depth: (depth * 60_000).astype(np.float16).astype(np.float32),
        "constant": lambda depth: np.full_like(depth, 2),
        "shape": lambda depth: depth[:, :, :-1],
        "dtype": lambda depth: depth.astype(np.float64),
    }

    def predict(self, batch: FrameBatch) -> Predictions:
        depth = super().predict(batch).arrays["depth"]
        with np.errstate(over="ignore"):
            wrong = self.FAULTS[self.options["fault"]](depth)
        wrong = wrong if self.options["fault"] == "dtype" else wrong.astype(np.float32)
        return Predictions(clip_ids=batch.clip_ids, arrays={"depth": wrong})


class OtherClips(Brightness):
    """Returns a batch under other ids: the mistake that attaches targets to the wrong videos."""

    def predict(self, batch: FrameBatch) -> Predictions:
        return Predictions(clip_ids=tuple(reversed(("x", *batch.clip_ids[1:]))), arrays=super().predict(batch).arrays)


KINDS = {
    "brightness": Brightness,
    "slow": Slow,
    "raises": Raises,
    "kills": Kills,
    "dies-in-setup": DiesInSetup,
    "fails-in-setup": FailsInSetup,
    "bad-output": BadOutput,
    "other-clips": OtherClips,
}


def install(folder: Path) -> Path:
    """A folder for PYTHONPATH that holds these teachers as the package `faulty-teachers`."""
    (folder / "faulty_teachers.py").write_text(Path(__file__).read_text())
    info = folder / "faulty_teachers-1.0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty-teachers\nVersion: 1.0\n")
    points = "\n".join(f"{kind} = faulty_teachers:{teacher.__name__}" for kind, teacher in KINDS.items())
    (info / "entry_points.txt").write_text(f"[p4dprep.teachers]\n{points}\n")
    return folder


@contextlib.contextmanager
def seen(folder: Path) -> Iterator[None]:
    """That package is found by this process and by those it starts, until the block ends."""
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder), before)))
    sys.path.append(str(folder))
    try:
        yield
    finally:
        os.environ["PYTHONPATH"] = before
        sys.path.remove(str(folder))
        if str(folder) not in sys.path:
            sys.modules.pop("faulty_teachers", None)
