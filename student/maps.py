"""The maps that a trained student predicts, judged by the truth beside its teacher's on the very same clips.

Predictions and the teacher's maps are written into a small cache of their own, with the encodings of any cache, so
that `p4dprep.evaluate` treats both alike.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file

from p4dprep import encoding
from p4dprep.cache import Cache, ClipResult, Group
from p4dprep.errors import CorruptDataError, FingerprintMismatchError, P4DError, RequestError
from p4dprep.evaluate import MapReport, Skipped, evaluate_maps
from p4dprep.evaluate.pairs import join, open_truth
from p4dprep.storage import one_line
from p4dprep.targets import TargetSpec
from student import run_folder
from student.conversations import Report, read_conversations
from student.data import DataConfig, TrainingData, TrainingSample
from student.data import join as join_talks
from student.distilled import Collate, DistilledStudent
from student.export import load_trained
from student.order import SampleKey
from student.p4d import P4D, P4DPrediction
from student.targets import cached_targets
from student.train import p4d_config
from student.train_config import TrainConfig, parse_config
from student.tuning import load_trainable

Progress = Callable[[str, int, int], None]
"""Told what is being done, how many clips are done, and how many there are."""

_CLIPS_PER_UNIT = 64
_P4D_PREFIX = "p4d."


@dataclass(frozen=True, kw_only=True)
class StudentMaps:
    """What a student's maps are worth.

    Attributes:
        report: the student's and the teacher's maps by the truth; `predicted` is the run.
        cache: the small cache of both, as long as its folder is there.
        group: the student's group in it.
        num_trained: judged clips that the student was trained on; None where its conversations are gone.
        data, rows: what the student was shown, and each judged clip's row in it.
    """

    report: MapReport
    cache: Cache
    group: str
    num_trained: int | None
    data: TrainingData
    rows: Mapping[str, int]

    @property
    def novelty(self) -> str:
        """Whether the judged clips are new to the student, in words."""
        if self.num_trained is None:
            return "whether the student was trained on these clips is not known: the run's conversations are gone"
        return f"the student was trained on {self.num_trained} of the {len(self.rows)} clips"

    def frames(self, clip_id: str) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
        """A judged clip's frames (t, h, w, 3) and times (t,). Close `data` after the last."""
        return self.data.frames(self.rows[clip_id])


def judge_maps(
    run: str | os.PathLike[str],
    truth: Cache,
    folder: str | os.PathLike[str],
    *,
    cache: str | None = None,
    groups: Sequence[str] = (),
    truth_group: str = "",
    alignment: str = "",
    limit: int | None = None,
    num_worst: int = 3,
    seed: int = 0,
    storage_options: Mapping[str, Any] | None = None,
    on_progress: Progress = lambda *_: None,
) -> StudentMaps:
    """Let a run's student predict maps of the clips that a cache shares with the truth, and judge them.

    The student sees each clip without words: words follow the video and cannot reach what is distilled. The teacher's
    maps of the same clips, where the cache has them, are judged beside.

    Args:
        run: folder of `p4dprep train`; its last whole checkpoint is taken.
        truth: the cache that is right.
        folder: empty; takes about twice the bytes that the teacher's maps of these clips have in the cache.
        cache: whose clips the student sees; None is the one that it was trained from.
        groups, truth_group, alignment, limit, num_worst, seed: as `p4dprep.evaluate.evaluate_maps`.
        storage_options: passed to fsspec for the caches and videos.
        on_progress: told of every batch and every judged clip.

    Raises:
        RequestError: no run, no checkpoint, a run that distilled nothing, frames of another size, no shared clips, or
            none of them can be shown.
        FingerprintMismatchError: the run's cache or base student is no longer the same.
        CorruptDataError: weights or a committed object are damaged.
    """
    config = parse_config(run_folder.read_settings(run))
    taught = Cache.open(config.cache, storage_options)
    shown = taught if cache is None else Cache.open(cache, storage_options)
    if shown.sampling.geometry() != taught.sampling.geometry():
        raise RequestError(f"{shown.store.url} has frames of {shown.sampling.geometry()}, the run's cache of "
                           f"{taught.sampling.geometry()}; extract both with the same --frames and --size")  # fmt: skip
    standard, shared = open_truth(truth, truth_group), join(shown, truth)
    student = load_student(run, config, taught)
    writer = _Writer(student, shown, standard, Path(folder), is_truth=_is_same(shown, truth))
    asked = [(clip_id, index) for clip_id, index, _ in shared[:limit]]
    data = TrainingData(shown, None, writer.data_config(config), Report(on_problem="leave out"), storage_options)
    skipped = [Skipped(clip_id=clip_id, group=writer.group, reason=reason)
               for clip_id, reason in _predict(writer, data, config, asked, on_progress)]  # fmt: skip
    data.close()
    unseen = {each.clip_id for each in skipped}
    report = evaluate_maps(
        writer.cache,
        truth,
        groups=groups,
        truth_group=standard.name,
        alignment=alignment,
        num_worst=num_worst,
        seed=seed,
        on_progress=lambda done, total: on_progress("judging", done, total),
    )
    report = replace(
        report,
        predicted=str(run),
        num_shared=len(shared),
        num_only_predicted=shown.num_clips - len(shared),
        num_only_truth=truth.num_clips - len(shared),
        num_judged=len(asked),
        skipped=(*skipped, *(each for each in report.skipped if each.clip_id not in unseen)),
    )
    trained = _trained_clips(config, taught)
    judged = {clip_id for clip_id, _ in asked} - unseen
    num_trained = None if trained is None else len(trained & judged)
    row_of = {clip: row for row, clip in enumerate(data.clip_of_row.tolist())}
    return StudentMaps(
        report=report,
        cache=writer.cache,
        group=writer.group,
        num_trained=num_trained,
        data=data,
        rows={clip_id: row_of[clip] for clip_id, clip in asked if clip_id in judged},
    )


def load_student(run: str | os.PathLike[str], config: TrainConfig, cache: Cache) -> DistilledStudent:
    """A run's student with its perception decoder and heads, as its last whole checkpoint has them, for inference.

    Args:
        run: the folder.
        config: the run's.
        cache: the run's; it keeps the frozen heads.

    Raises:
        RequestError: the run distilled nothing, or has no whole checkpoint.
        FingerprintMismatchError: the cache or the base student is another than the run was made with.
        CorruptDataError: the weights are damaged.
    """
    if not config.distils:
        raise RequestError(f"{run} was trained with distill {config.distill} and strategy {config.strategy}: its "
                           "student predicts no maps")  # fmt: skip
    planned = p4d_config(config, cache)
    _check_groups(Path(run), cache, {cached_targets(cache)[name].group for name in planned.targets})
    backbone = load_trained(run)
    p4d = P4D(planned, cache, backbone.hidden_size)
    weights = run_folder.last_checkpoint(run) / run_folder.P4D_WEIGHTS
    try:
        load_trainable(p4d, {name.removeprefix(_P4D_PREFIX): values for name, values in load_file(weights).items()})
    except (OSError, SafetensorError, CorruptDataError) as error:
        raise CorruptDataError(f"{weights}: {one_line(error)}") from None
    return DistilledStudent(backbone, p4d, layer=config.distill_layer).eval()


def _check_groups(run: Path, cache: Cache, names: set[str]) -> None:
    """Heads of another teacher would make other maps of the same student."""
    identity = run / run_folder.IDENTITY
    made = json.loads(identity.read_text()) if identity.exists() else {}
    for name in sorted(names):
        if made.get(f"cache group {name}", "") != cache.group(name).fingerprint_digest:
            raise FingerprintMismatchError(
                f"group {name} of {cache.store.url} is not the one that {run} was trained from; bring that cache back, "
                f"or name its place as `cache` in {run / run_folder.CONFIG}"
            )


def _is_same(one: Cache, other: Cache) -> bool:
    return one.store.url == other.store.url


class _Writer:
    """Writes the student's maps and the teacher's into one small cache.

    Args:
        student: who predicts.
        shown: whose clips it sees, and whose maps are copied.
        standard: the group that is right; latents are kept only where it has any.
        folder: of the small cache.
        is_truth: whether `shown` is the truth, whose own group is no prediction.
    """

    def __init__(
        self, student: DistilledStudent, shown: Cache, standard: Group, folder: Path, *, is_truth: bool
    ) -> None:
        if student.p4d is None:
            raise ValueError("this student predicts no maps")
        self.student, self.p4d, self.shown = student, student.p4d, shown
        # Latents told of the student's own cells are no teacher's to compare with.
        wants_latents = self.p4d.config.cells is None and any(spec.quantity == "latents" for spec in standard.targets)
        kept = [name for name in self.p4d.config.targets if name != self.p4d.config.latents or wants_latents]
        self.targets = {name: self.p4d.targets[name] for name in kept}
        known = cached_targets(shown)
        self.taught = {
            name: known[name]
            for name, target in self.targets.items()
            if name in known and not (is_truth and target.group == standard.name)
        }
        names = {target.group for target in self.taught.values()}
        self.group = "student" if "student" not in names else "student_maps"
        self.cache = Cache.create(str(folder), shown.sampling, clips_per_unit=_CLIPS_PER_UNIT)
        self.specs = {name: _predicted_spec(target.spec) for name, target in self.targets.items()}
        self._groups = {self.group: self._add(self.group, "the trained student", list(self.specs.values()))}
        for name in sorted(names):
            specs = [target.spec for target in self.taught.values() if target.group == name]
            self._groups[name] = self._add(name, shown.group(name).teacher, specs)

    def _add(self, name: str, teacher: str, specs: Sequence[TargetSpec]) -> Group:
        return self.cache.add_group(name, teacher, {"judged": name}, specs)

    def data_config(self, config: TrainConfig) -> DataConfig:
        """How the clips are read: as in training, with the maps that are copied; the tower runs where features lack."""
        features = config.features if config.features in cached_targets(self.shown) else None
        return DataConfig(targets=tuple(self.taught), frame_size=config.frame_size, features=features)

    def extend(self, clips: Sequence[int]) -> None:
        """Take over these clips of the shown cache, in this order."""
        rows = self.shown.clips().take(pa.array(clips, pa.int64()))
        self.cache.extend(rows.drop_columns(["index"]))

    def write(self, index: int, sample: TrainingSample, ours: Mapping[str, NDArray[np.float32]]) -> None:
        """One clip's maps: ours by array name, and the teacher's."""
        times, clip_id = sample.sample.time_seconds, sample.clip_id
        if times is None or clip_id is None:
            raise ValueError(f"{sample.sample.id} is no clip")
        arrays: dict[str, dict[str, NDArray[Any]]] = {
            self.group: {self.specs[name].name: values for name, values in ours.items()}
        }
        for name, target in self.taught.items():
            arrays.setdefault(target.group, {})[target.spec.name] = sample.targets[name]
        for name, group in self._groups.items():
            objects = group.write_clip(index, arrays[name], times)
            done = ClipResult(index=index, id=clip_id, status="ok", num_distinct_frames=len(times), objects=objects)
            group.commit(index // _CLIPS_PER_UNIT, [done])

    def values(self, prediction: P4DPrediction, number: int) -> dict[str, NDArray[np.float32]]:
        """One sample's predicted arrays, fit to be stored."""
        found = {}
        for name, spec in self.specs.items():
            is_latents = name == self.p4d.config.latents
            values = (prediction.latents_bktyxc if is_latents else prediction.maps[name])[number]
            found[name] = _storable(values.float().cpu().numpy().reshape(spec.shape), spec)
        return found


def _predicted_spec(spec: TargetSpec) -> TargetSpec:
    """What a head gives for a target: float32, and logits for a mask."""
    quantity = "motion logit" if spec.quantity == "motion mask" else spec.quantity
    return replace(spec, dtype="float32", quantity=quantity, transforms=(), may_be_invalid=True)


def _storable(values: NDArray[np.float32], spec: TargetSpec) -> NDArray[np.float32]:
    """Nothing where nothing is asked for; a flow beyond what a cache can hold stays wrong instead of being left out."""
    kept = np.where(np.isfinite(values), values, np.float32(np.nan))
    how = encoding.choose(spec)
    if isinstance(how, encoding.FixedPointFlow):
        bound = np.float32(32767 * how.scale(spec))
        kept = np.clip(kept, -bound, bound)
    unknown = np.ones(len(kept), bool)
    unknown[spec.valid_frames()] = False
    kept[unknown] = np.nan
    return kept


def _predict(
    writer: _Writer, data: TrainingData, config: TrainConfig, asked: Sequence[tuple[str, int]], on_progress: Progress
) -> Iterator[tuple[str, str]]:
    """Predict and write every clip that can be shown; gives id and reason of the others."""
    row_of = {clip: row for row, clip in enumerate(data.clip_of_row.tolist())}
    for clip_id, clip in asked:
        if clip not in row_of:
            yield clip_id, "its frames or the teacher's maps are not committed"
    wanted = [(clip_id, clip) for clip_id, clip in asked if clip in row_of]
    writer.extend([clip for _, clip in wanted])
    collate, device = Collate(writer.student.backbone.adapter, config.time_cue), _device()
    writer.student.to(device)
    for start in range(0, len(wanted), config.micro_batch_size):
        batch = []
        for place, (clip_id, clip) in enumerate(wanted[start : start + config.micro_batch_size], start):
            sample = data[SampleKey(0, row_of[clip])]
            if sample.clip_id == clip_id:
                batch.append((place, sample))
            else:  # the data gave the next clip that can be read
                yield clip_id, "its video cannot be read; the log says why"
        if batch:
            _predict_batch(writer, collate, device, batch)
        on_progress("predicting", min(start + config.micro_batch_size, len(wanted)), len(wanted))


@torch.inference_mode()
def _predict_batch(
    writer: _Writer, collate: Collate, device: torch.device, batch: Sequence[tuple[int, TrainingSample]]
) -> None:
    prediction = writer.student.predict(collate([sample for _, sample in batch]).to(device))
    for number, (place, sample) in enumerate(batch):
        writer.write(place, sample, writer.values(prediction, number))


def _device() -> torch.device:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def _trained_clips(config: TrainConfig, cache: Cache) -> frozenset[str] | None:
    """Ids of the clips that the run's samples are of."""
    clips = cache.clips().select(["id", "uri"]).combine_chunks()
    if not config.qa:
        return frozenset(clips.column("id").to_pylist())
    report = Report(on_problem="leave out")
    try:
        talks = read_conversations(config.qa, report)
        found = join_talks(talks, clips, config.media, report)
    except (P4DError, OSError):
        return None
    return frozenset(pc.take(clips.column("id"), pa.array(np.unique(found[found >= 0]))).to_pylist())
