"""From a run to a plain transformers checkpoint: what P4D added is gone, what it taught stays in the base's weights.

An export needs nothing of ours: same architecture, same cost at inference (arXiv 2512.17012 Sec. 4). TPE alone, which
has no parameters, is ours: config.json says how the student was told the frames' times, and `student.backbones.load`
reads it.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from p4dprep.errors import CorruptDataError, FingerprintMismatchError, RequestError
from p4dprep.storage import one_line
from student import run_folder
from student.backbones import Backbone, load
from student.backbones.loading import SETTINGS_KEY, no_progress_bar, weights_digest
from student.cues import TimeCue
from student.folders import refuse_used, whole_folder
from student.train_config import TrainConfig, parse_config
from student.tuning import load_trainable, merge, tune

_CONFIG = "config.json"
_SETTINGS = ("*.json", "*.jinja", "*.txt", "*.model")


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What was written.

    Attributes:
        out: the folder.
        base: the student that the run began with.
        checkpoint: of the run; its number is the steps of training.
        model_class, processor_class: names in transformers.
        num_parameters: as many as the base has, tied ones once.
        dtype: of the weights, as in the base.
        size_bytes: of all files.
        time_cue: how the student was told the frames' times.
    """

    out: Path
    base: str
    checkpoint: Path
    model_class: str
    processor_class: str
    num_parameters: int
    dtype: str
    size_bytes: int
    time_cue: TimeCue


def export(run: str | os.PathLike[str], out: str | os.PathLike[str], *, step: int | None = None) -> ExportReport:
    """Write a trained student as an ordinary checkpoint of its family.

    Class, names, shapes and dtypes are the base's; adapters are merged in float32 and every weight is then rounded
    to the dtype that the base has as transformers loads it. Processor, tokenizer, chat template and generation config
    are the base's own files, and so is config.json but for the key `p4dprep`.

    Args:
        run: folder of `p4dprep train`.
        out: a new folder; it appears whole or not at all.
        step: of the checkpoint; None is the last whole one.

    Raises:
        RequestError: no run, no such checkpoint, a strategy that has no plain checkpoint, or `out` is in use.
        FingerprintMismatchError: the base's weights are no longer those that the run began with.
        CorruptDataError: the checkpoint's weights do not fit the student, or are not finite where they are merged.
        StorageError: the disk refused.
    """
    target = Path(out)
    refuse_used(target)
    strategy = run_folder.read_settings(run).get("strategy")
    if strategy in ("4d-concat", "4d-pe"):
        raise RequestError(f"{run} was trained as {strategy}, which pays at inference: there is no plain checkpoint of "
                           "it; evaluate the run itself")  # fmt: skip
    config, checkpoint = _config_of(run), run_folder.last_checkpoint(run, step)
    dtypes = {name: value.dtype for name, value in load(config.student, config.revision).model.state_dict().items()}
    trained = _trained(Path(run), config, checkpoint)
    _cast(trained.model, dtypes)
    with whole_folder(target) as folder:
        with no_progress_bar():
            trained.model.save_pretrained(folder)
        _copy_settings(trained.adapter.folder, folder, config.time_cue)
    return ExportReport(
        out=target,
        base=config.student,
        checkpoint=checkpoint,
        model_class=trained.adapter.model_class,
        processor_class=trained.adapter.processor_class,
        num_parameters=sum(each.numel() for each in trained.model.parameters()),
        dtype=str(trained.model.dtype).removeprefix("torch."),
        size_bytes=sum(path.stat().st_size for path in target.iterdir()),
        time_cue=config.time_cue,
    )


def load_trained(run: str | os.PathLike[str], step: int | None = None) -> Backbone:
    """A run's student as it is after training: float32, on the CPU, adapters merged, with its time cue.

    The rivals' own modules are no part of it: `4d-concat` and `4d-pe` need theirs from p4d.safetensors.

    Args:
        run: folder of `p4dprep train`.
        step: of the checkpoint; None is the last whole one.

    Raises:
        RequestError, FingerprintMismatchError, CorruptDataError: as `export`.
    """
    return _trained(Path(run), _config_of(run), run_folder.last_checkpoint(run, step))


def _config_of(run: str | os.PathLike[str]) -> TrainConfig:
    try:
        return parse_config(run_folder.read_settings(run))
    except RequestError as error:
        raise RequestError(f"{Path(run) / run_folder.CONFIG}: {error}") from None


def _trained(run: Path, config: TrainConfig, checkpoint: Path) -> Backbone:
    backbone = load(config.student, config.revision, dtype=torch.float32, tpe=config.time_cue == "tpe")
    _check_base(run, config, backbone.adapter.folder)
    tune(backbone, config.tune, lora_rank=config.lora_rank)
    weights = checkpoint / run_folder.STUDENT_WEIGHTS
    try:
        load_trainable(backbone.model, _read(weights))
    except CorruptDataError as error:
        raise CorruptDataError(f"{weights}: {error}") from None
    merge(backbone)
    setattr(backbone.adapter.config, SETTINGS_KEY, _settings(config.time_cue))
    return backbone


def _check_base(run: Path, config: TrainConfig, folder: Path) -> None:
    """What did not learn comes from the base, so it must still be the same."""
    identity = run / run_folder.IDENTITY
    if identity.exists() and json.loads(identity.read_text()).get("student") != weights_digest(folder):
        raise FingerprintMismatchError(
            f"student {config.student} has other weights now than when {run} was trained with it; bring those back, or "
            f"name their commit as `revision` in {run / run_folder.CONFIG}"
        )


def _read(weights: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise CorruptDataError(f"cannot be read: {one_line(error)}") from error
    return tensors


def _settings(time_cue: TimeCue) -> dict[str, TimeCue]:
    return {"time_cue": time_cue}


@torch.no_grad()
def _cast(model: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    for name, value in model.state_dict(keep_vars=True).items():
        value.data = value.data.to(dtypes[name])


def _copy_settings(base: Path, folder: Path, time_cue: TimeCue) -> None:
    """The base's own files beside the weights: a tokenizer written anew could differ from the one trained with."""
    for path in (path for pattern in _SETTINGS for path in base.glob(pattern)):
        if path.name != _CONFIG and not path.name.endswith(".index.json"):
            shutil.copyfile(path, folder / path.name)
    content: dict[str, Any] = json.loads((base / _CONFIG).read_text())
    content[SETTINGS_KEY] = _settings(time_cue)
    (folder / _CONFIG).write_text(json.dumps(content, indent=2) + "\n")
