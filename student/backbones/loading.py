"""From a folder or hub id to a student. Only transformers' own classes, only safetensors, never a repository's code."""

import contextlib
import copy
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from p4dprep.errors import RequestError
from p4dprep.storage import one_line
from student.backbones.adapter import FamilyAdapter
from student.backbones.internvl import InternVLAdapter
from student.backbones.llava_onevision import LlavaOnevisionAdapter
from student.backbones.model import Backbone
from student.backbones.qwen_vl import Qwen3VLAdapter, Qwen25VLAdapter
from student.backbones.smolvlm import SmolVLMAdapter
from student.backbones.video_llama3 import VideoLlama3Adapter
from student.cues import TimeCue

FAMILIES: dict[str, type[FamilyAdapter]] = {
    adapter.model_type: adapter
    for adapter in (
        InternVLAdapter,
        LlavaOnevisionAdapter,
        Qwen25VLAdapter,
        Qwen3VLAdapter,
        SmolVLMAdapter,
        VideoLlama3Adapter,
    )
}
"""The families by transformers' model_type. A new one is one file and one line here; docs/students.md shows how."""

SETTINGS_KEY = "p4dprep"
"""In the config.json of a student that was trained here: `{"time_cue": "tpe"}`. transformers does not look at it."""

_SETTINGS = ("*.json", "*.jinja", "*.txt", "*.model")
_WEIGHTS = ("*.safetensors",)

_WANTED = (
    "a subclass of student.backbones.FamilyAdapter that names the model's and the processor's class in transformers, "
    "the paths of vision tower, projector and LLM, the frames and cell of every video token (locate_video) and the "
    "times of the projector's rows (feature_seconds)"
)


def load(
    model: str | os.PathLike[str],
    revision: str | None = None,
    *,
    dtype: torch.dtype | Literal["auto"] = "auto",
    tpe: bool | None = None,
    tower_only: bool = False,
) -> Backbone:
    """A student with its weights, on the CPU, in evaluation mode.

    Args:
        model: a folder in the hub's own format or `ORG/NAME`.
        revision: the hub's branch, tag or commit; resolved to its commit once.
        dtype: of the weights; `auto` keeps that of the checkpoint.
        tpe: whether batches that it encodes carry the frames' times for TPE; None does as the student was trained,
            see `time_cue_of`.
        tower_only: leave out all layers of the LLM but the first: enough for `vision_features`, in far less memory.

    Raises:
        RequestError: not found, of an unknown family, without safetensors, or with weights missing.
    """
    import transformers

    adapter = load_adapter(student_folder(model, revision))
    try:
        with no_progress_bar(), _no_warning() if tower_only else contextlib.nullcontext():
            weights, report = getattr(transformers, adapter.model_class).from_pretrained(
                adapter.folder,
                config=_with_one_layer(adapter.config) if tower_only else None,
                dtype=dtype,
                attn_implementation="sdpa",  # always given: a config may name one that is fetched as compiled code
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except Exception as error:  # a damaged file fails in many libraries' own ways
        raise RequestError(f"cannot load student {model} as {adapter.model_class}: {one_line(error)}") from error
    if missing := sorted(report["missing_keys"]):
        lacks = f"lacks {len(missing)} weights of {adapter.model_class}, such as {missing[0]}"
        raise RequestError(f"student {model} {lacks}; it would start with random ones")
    return Backbone(adapter, weights.eval(), tpe=time_cue_of(adapter) == "tpe" if tpe is None else tpe)


def load_adapter(model: str | os.PathLike[str], revision: str | None = None) -> FamilyAdapter:
    """A student's processor and config without its weights: enough to encode samples in a worker process.

    Raises:
        RequestError: not found, of an unknown family, or its processor cannot be loaded.
    """
    import transformers

    folder = _folder(model, revision, _SETTINGS)
    try:
        content, _ = transformers.PreTrainedConfig.get_config_dict(folder, local_files_only=True)
    except Exception as error:
        raise RequestError(f"no student in {model}: {one_line(error)}") from error
    if "model_type" not in content:
        raise RequestError(f"no student in {model}: there is no config.json that names a model_type")
    family = _family(content["model_type"], model)
    try:
        config = getattr(transformers, family.model_class).config_class.from_dict(content)
        processor = getattr(transformers, family.processor_class).from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        needs = f" (it needs the package {family.requirement})" if family.requirement else ""
        raise RequestError(f"cannot load the processor of student {model}{needs}: {one_line(error)}") from error
    return family(processor, config, folder)


def time_cue_of(adapter: FamilyAdapter) -> TimeCue:
    """The time cue that a student was trained with, as its config.json says; `none` if it says nothing.

    Raises:
        RequestError: it says something unknown.
    """
    settings = getattr(adapter.config, SETTINGS_KEY, {"time_cue": "none"})
    cue = settings.get("time_cue") if isinstance(settings, dict) else None
    for known in get_args(TimeCue):
        if cue == known:
            return known  # type: ignore[no-any-return]
    raise RequestError(
        f"config.json in {adapter.folder} says {SETTINGS_KEY}: {settings!r}; it must hold a time_cue, one of "
        f"{', '.join(get_args(TimeCue))}"
    )


def weights_digest(folder: Path) -> str:
    """SHA-256 of a student's weights: of the SHA-256 of each file, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def student_folder(model: str | os.PathLike[str], revision: str | None = None) -> Path:
    """Where a student's settings and weights lie; what comes from the hub is one commit, which names the folder.

    Raises:
        RequestError: not found.
    """
    return _folder(model, revision, (*_SETTINGS, *_WEIGHTS))


def _folder(model: str | os.PathLike[str], revision: str | None, patterns: tuple[str, ...]) -> Path:
    """Where the student's files lie; from the hub come only those of `patterns`, of one commit."""
    from huggingface_hub import snapshot_download

    folder = Path(model).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise RequestError(f"student {model} is a folder and has no revision {revision!r}; leave the revision out")
        return folder.resolve()
    try:
        return Path(snapshot_download(str(model), revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # the hub's client, HTTP and the disk each fail in their own ways
        asked = f"{model} at {revision}" if revision else f"{model}"
        raise RequestError(f"student {asked} is no folder and cannot be had from the hub: {one_line(error)}") from error


def _family(model_type: str, model: str | os.PathLike[str]) -> type[FamilyAdapter]:
    if model_type not in FAMILIES:
        raise RequestError(
            f"{model} is of the family {model_type!r}, which has no adapter; known are {', '.join(sorted(FAMILIES))}. "
            f"An adapter is {_WANTED}; docs/students.md shows how to add one"
        )
    return FAMILIES[model_type]


def _with_one_layer(config: Any) -> Any:
    """A copy of a config whose LLM has its first layer only."""
    shallow = copy.deepcopy(config)
    text = shallow.get_text_config()
    text.num_hidden_layers = 1
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:1]
    return shallow


@contextlib.contextmanager
def _no_warning() -> Iterator[None]:
    """transformers without its list of weights that are not wanted."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextlib.contextmanager
def no_progress_bar() -> Iterator[None]:
    """transformers without its progress bars."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
