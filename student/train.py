"""Training from a cache: one process, `torchrun`'s processes, or Ray Train's workers on one machine or many.

No teacher takes part: everything a teacher knew is read from the cache (`student` cannot import `teachers`).
"""

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import yaml
from accelerate import PartialState
from numpy.typing import NDArray
from torch.utils.tensorboard import SummaryWriter
from transformers.integrations import TensorBoardCallback

from p4dprep.cache import Cache
from p4dprep.errors import FingerprintMismatchError, P4DError, RequestError
from p4dprep.storage import one_line
from student import run_folder
from student.backbones import Backbone, load, load_adapter
from student.backbones.loading import weights_digest
from student.conversations import Report, read_conversations
from student.data import DataConfig, TrainingData
from student.distilled import Collate, DistilledStudent
from student.features import check_features
from student.order import BatchOrder
from student.p4d import P4D
from student.p4d_config import P4DConfig, plan
from student.page import write_page
from student.rivals import Rival, make_rival
from student.train_config import FREE_FIELDS, TrainConfig, parse_config
from student.trainer import DistillationTrainer, MapPictures, RunLog, training_arguments, uses_cpu
from student.tuning import tune

ShowLine = Callable[[int, Mapping[str, float]], None]
"""Told of every log line: the number of steps of the whole run, and the line."""

_POLL_SECONDS = 0.5


class TrainingLostError(P4DError, RuntimeError):
    """Workers were lost more often than the run may restart them."""


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """How a run ended.

    Attributes:
        run: its folder.
        num_steps: optimiser steps done, those before a resume included.
        num_samples: samples of one epoch.
        num_left_out: samples that could not be used, and why they could not.
        left_out: the same in words.
        seconds: this call took, without those before a resume.
        first, last: first and last log line.
    """

    run: Path
    num_steps: int
    num_samples: int
    num_left_out: int
    left_out: str
    seconds: float
    first: Mapping[str, float]
    last: Mapping[str, float]


def train(config: TrainConfig, *, resume: bool = False, show: ShowLine = lambda *_: None) -> TrainReport:
    """Train a student; afterwards `config.out` holds its checkpoints, log, pictures and page.

    Args:
        config: the request.
        resume: go on from the last whole checkpoint of `config.out`, or start if there is none.
        show: told of every log line.

    Raises:
        RequestError: the request is wrong, or `out` holds a run and `resume` was not asked for.
        FingerprintMismatchError: the run to resume was made of something else; the message names what.
        CacheError: the cache cannot be read.
        DivergedError: the loss became NaN or infinite.
    """
    run = Path(config.out)
    if _is_main_process():
        _check_folder(config.out, resume)
    if config.workers == 1 and config.address is None:
        return _train_here(config, show)
    with _following(run, show):
        return _train_on_ray(config)


def _is_main_process() -> bool:
    """Known before any process group is: `torchrun` and Ray both say it in the environment."""
    return int(os.environ.get("RANK", "0")) == 0


def _check_folder(out: str, resume: bool) -> None:
    if "://" in out:
        raise RequestError(f"out {out} must be a folder that all machines can write, not a URL")
    run = Path(out)
    is_run = (run / run_folder.CONFIG).exists()
    if run.exists() and not run.is_dir():
        raise RequestError(f"out {run} is a file; name a folder")
    if is_run and run_folder.has_begun(run) and not resume:
        raise RequestError(f"out {run} holds a run; go on with --resume, or name another folder")
    if run.exists() and not is_run and any(run.iterdir()):
        raise RequestError(f"out {run} holds something that is no run; name an empty folder")
    run.mkdir(parents=True, exist_ok=True)


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """A request that was found possible, and written down as what the run is."""

    cache: Cache
    data: TrainingData
    order: BatchOrder
    num_steps: int
    report: Report


def _prepare(config: TrainConfig, *, writes: bool) -> _Prepared:
    """Read what the run is made of and compare it with the run's folder; needs no weights in memory."""
    cache = Cache.open(config.cache, config.storage_options or None)
    report = Report(on_problem=config.on_problem)
    data = _data(config, cache, report)
    if config.distils and not (data.clip_of_row >= 0).any():
        raise RequestError("no sample is of a clip with targets, so there is nothing to distil; use distill sft")
    order = BatchOrder(num_samples=len(data), batch_size=config.batch_size, seed=config.seed)
    num_steps = config.max_steps or config.epochs * order.num_steps
    if writes:
        student = load_adapter(config.student, config.revision).folder
        _claim(Path(config.out), config, _identity(cache, data, student, config) | {"steps": str(num_steps)})
    return _Prepared(cache=cache, data=data, order=order, num_steps=num_steps, report=report)


@contextmanager
def _without_denormals() -> Iterator[None]:
    """Numbers under 1e-38 count as 0 on a CPU, where they slow arithmetic down many times.

    Backward through the tails of a light head's GELU is full of them: 0.7 s a step in place of 4. Torch's threads do as
    the thread does that started them, so this comes before the first arithmetic.
    """
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@_without_denormals()
def _train_here(config: TrainConfig, show: ShowLine) -> TrainReport:
    """Train in this process, one of several if the environment says so."""
    started, run = time.perf_counter(), Path(config.out)
    state = PartialState(cpu=uses_cpu(config))
    transformers.set_seed(config.seed)
    made = _prepare(config, writes=state.is_main_process)
    state.wait_for_everyone()
    whole = run_folder.checkpoints(run)
    done = run_folder.step_of(whole[-1]) if whole else 0
    if done < made.num_steps:
        trainer = _trainer(config, made, done, lambda line: show(made.num_steps, line))
        trainer.train(resume_from_checkpoint=str(whole[-1]) if whole else None)
        if trainer.state.global_step < made.num_steps:
            raise RuntimeError(f"the run ended after {trainer.state.global_step} of {made.num_steps} steps")
    made.data.close()
    ended = _report(run, made, time.perf_counter() - started)
    if state.is_main_process:
        content = json.dumps(asdict(ended) | {"run": str(run)}, indent=2)
        run_folder.write_atomically(run / run_folder.REPORT, content + "\n")
        write_page(run)
    return ended


def _trainer(
    config: TrainConfig, made: _Prepared, done: int, on_line: Callable[[dict[str, float]], None]
) -> DistillationTrainer:
    state, run = PartialState(), Path(config.out)
    backbone = load(config.student, config.revision, dtype=torch.float32, tpe=config.time_cue == "tpe")
    if config.features is not None:
        check_features(made.cache, config.features, backbone)
    model = build_model(config, made.cache, backbone)
    trainer = DistillationTrainer(
        model,
        training_arguments(config, made.num_steps, state.num_processes, use_bf16=_uses_bf16(config, state)),
        made.data,
        made.order,
        Collate(backbone.adapter, config.time_cue),
        first_step=done,
        callbacks=[RunLog(run, on_line)],
    )
    if config.picture_steps and model.p4d is not None:
        trainer.add_callback(MapPictures(trainer, run, config.picture_steps))
    if state.is_main_process:
        # What was logged after the checkpoint that the run goes on from is not shown.
        writer = SummaryWriter(str(run / run_folder.TENSORBOARD), purge_step=done + 1)
        trainer.add_callback(TensorBoardCallback(writer))
    return trainer


def _uses_bf16(config: TrainConfig, state: PartialState) -> bool:
    return config.precision == "bf16" or (config.precision == "auto" and state.device.type == "cuda")


def build_model(config: TrainConfig, cache: Cache, backbone: Backbone) -> DistilledStudent:
    """The student with what teaches it, and gradients let into what learns.

    Raises:
        RequestError: the cache lacks what is to be learnt, or the student has no such layer.
    """
    if config.distill_layer is not None and config.distill_layer > backbone.num_layers:
        raise RequestError(f"distill_layer {config.distill_layer} does not exist; {config.student} has "
                           f"{backbone.num_layers} layers")  # fmt: skip
    tune(backbone, config.tune, lora_rank=config.lora_rank)
    if config.gradient_checkpointing:
        backbone.model.activation_checkpointing_enable({"use_reentrant": False})
    p4d = P4D(p4d_config(config, cache), cache, backbone.hidden_size) if config.distils else None
    rival: Rival | None = None
    if config.strategy != "p4d":
        is_standardised = config.standardise_latents
        rival = make_rival(config.strategy, cache, backbone.hidden_size, config.targets, standardised=is_standardised)
        if is_standardised:
            rival.standardise(cache)
    return DistilledStudent(backbone, p4d, rival, config.distill_layer)


def p4d_config(config: TrainConfig, cache: Cache) -> P4DConfig:
    """The paper's plan for this cache, with the weights and losses that were asked for.

    Raises:
        RequestError: a weight or loss is for an array that is not among the terms.
    """
    planned = plan(cache, config.distill, config.targets)
    names = {term.target for term in planned.terms}
    for name in (*config.weights, *config.losses):
        if name not in names:
            raise RequestError(f"weights or losses name {name!r}, which is no map that is learnt; {sorted(names)} are")
    terms = tuple(
        replace(term, weight=config.weights.get(term.target, term.weight), loss=config.losses.get(term.target))
        for term in planned.terms
    )
    return replace(
        planned,
        terms=terms,
        latent_weight=config.latent_weight if planned.learns_latents else 0.0,
        explicit_weight=config.explicit_weight,
        hidden_channels=config.decoder_width,
        heads=config.heads,
        standardised=config.standardise_latents,
        frame=config.distill_frame,
        positions=config.decoder_positions,
        balanced=config.balance_motion,
        cells=config.distill_cells,
    )


def _data(config: TrainConfig, cache: Cache, report: Report) -> TrainingData:
    targets: tuple[str, ...] = p4d_config(config, cache).targets if config.distils else ()
    if config.strategy != "p4d":
        targets = make_rival(config.strategy, cache, hidden_size=1, targets=config.targets).targets
    wanted = DataConfig(
        targets=targets,
        media_folder=config.media,
        frame_size=config.frame_size,
        regions=config.regions,
        flip=config.flip,
        features=config.features,
        conversations_per_sample=config.conversations_per_sample,
        seed=config.seed,
    )
    conversations = read_conversations(config.qa, report) if config.qa else None
    return TrainingData(cache, conversations, wanted, report, config.storage_options or None)


def _identity(cache: Cache, data: TrainingData, student: Path, config: TrainConfig) -> dict[str, str]:
    """What a run is made of, by content: another place of the same things is the same run."""
    made = {f"cache group {name}": cache.group(name).fingerprint_digest for name in data.groups}
    said = [Path(path) for path in config.qa]
    files = [file for path in said for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
    return {
        "student": weights_digest(student),
        "student's settings": _digest_of_files(sorted([*student.glob("*.json"), *student.glob("*.jinja")])),
        "conversations": _digest_of_files(files),
        "samples": _digest_of_arrays(data.clip_of_row, data.conversations_of_row),
        **made,
    }


def _digest_of_files(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _digest_of_arrays(*arrays: NDArray[np.int64]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(array.tobytes())
    return digest.hexdigest()


def _claim(run: Path, config: TrainConfig, identity: Mapping[str, str]) -> None:
    """Write down what the run is, or compare it with what was written before, and clear what a kill left behind.

    Raises:
        FingerprintMismatchError: the run was made of something else.
    """
    settings = config.settings()
    if run_folder.has_begun(run):
        made = json.loads((run / run_folder.IDENTITY).read_text())
        # A run that an earlier version began lacks the fields that were added since: it had their defaults.
        defaults = {name: field.default for name, field in TrainConfig.model_fields.items()}
        before = defaults | run_folder.read_settings(run)
        changed = [name for name in settings if name not in FREE_FIELDS and before.get(name) != settings[name]]
        changed += [name for name in sorted({*made, *identity}) if made.get(name) != identity.get(name)]
        if changed:
            raise FingerprintMismatchError(
                f"{run} was made with other {', '.join(changed)}; ask for the same, or name another folder"
            )
        run_folder.remove_incomplete(run)
        return
    run_folder.write_atomically(run / run_folder.CONFIG, yaml.safe_dump(settings, sort_keys=False))
    run_folder.write_atomically(run / run_folder.IDENTITY, json.dumps(identity, indent=2) + "\n")


def _report(run: Path, made: _Prepared, seconds: float) -> TrainReport:
    log = run_folder.read_log(run)
    return TrainReport(
        run=run,
        num_steps=made.num_steps,
        num_samples=len(made.data),
        num_left_out=made.report.counts.total(),
        left_out=str(made.report),
        seconds=seconds,
        first=log[0] if log else {},
        last=log[-1] if log else {},
    )


def _train_on_ray(config: TrainConfig) -> TrainReport:
    """Train with Ray Train's workers; lost ones are restarted and go on from the last whole checkpoint."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from p4dprep.extract.job import start_ray

    _prepare(config, writes=True)  # what is wrong with the request is said here, once, before workers start
    start_ray(config.address)
    gpus = config.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if ray.cluster_resources().get("GPU", 0) >= config.workers else 0.0
    config = config.at_home()
    run = Path(config.out)
    trainer = TorchTrainer(
        _work,
        # The options may hold a secret; Ray shows a config, but not what lies behind a reference.
        train_loop_config={
            "values": config.model_dump(mode="json"),
            "storage_options": [ray.put(config.storage_options)],
        },
        scaling_config=ScalingConfig(
            num_workers=config.workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": 1, "GPU": gpus} if gpus else {"CPU": 1},
        ),
        run_config=RunConfig(
            name="ray", storage_path=str(run), failure_config=FailureConfig(max_failures=config.max_failures)
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise _cause(error) from error
    ended = json.loads((run / run_folder.REPORT).read_text())
    return TrainReport(**(ended | {"run": run}))


def _cause(error: BaseException) -> P4DError:
    """What went wrong in the first worker that failed, as one of our own errors."""
    failures = getattr(error, "worker_failures", {})
    causes = [getattr(failure, "cause", failure) for _, failure in sorted(failures.items())]
    own = [cause for cause in causes if isinstance(cause, P4DError)]
    return own[0] if own else TrainingLostError(f"training on Ray failed: {one_line(causes[0] if causes else error)}")


def _work(config: Mapping[str, Any]) -> None:
    """What one Ray worker does."""
    import ray

    options = ray.get(config["storage_options"][0])
    request = parse_config(config["values"] | {"storage_options": options})
    num_processes = PartialState(cpu=uses_cpu(request)).num_processes
    if num_processes != request.workers:
        raise RuntimeError(f"a worker sees {num_processes} workers where there are {request.workers}")
    _train_here(request, lambda *_: None)


@contextmanager
def _following(run: Path, show: ShowLine) -> Iterator[None]:
    """Show the lines that workers elsewhere add to the log."""
    ended = threading.Event()

    def follow() -> None:
        shown = len(run_folder.read_log(run))
        while True:
            is_last_look = ended.wait(_POLL_SECONDS)
            lines = run_folder.read_log(run)
            for line in lines[shown:]:
                show(run_folder.num_steps(run), line)
            shown = len(lines)
            if is_last_look:
                return

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
