"""From a folder or hub id to a student. Only transformers' own classes, only safetensors, never a repository's code."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any, Literal

import torch

from p4dprep.errors import RequestError
from p4dprep.storage import redact
from student.backbones.adapter import FamilyAdapter
from student.backbones.internvl import InternVLAdapter
from student.backbones.llava_onevision import LlavaOnevisionAdapter
from student.backbones.model import Backbone
from student.backbones.qwen_vl import Qwen3VLAdapter, Qwen25VLAdapter
from student.backbones.smolvlm import SmolVLMAdapter
from student.backbones.video_llama3 import VideoLlama3Adapter

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
    tpe: bool = False,
) -> Backbone:
    """A student with its weights, on the CPU, in evaluation mode.

    Args:
        model: a folder in the hub's own format or `ORG/NAME`.
        revision: the hub's branch, tag or commit.
        dtype: of the weights; `auto` keeps that of the checkpoint.
        tpe: whether batches that it encodes carry the frames' times for TPE.

    Raises:
        RequestError: not found, of an unknown family, without safetensors, or with weights missing.
    """
    import transformers

    adapter = load_adapter(model, revision)
    try:
        with no_progress_bar():
            weights, report = getattr(transformers, adapter.model_class).from_pretrained(
                model,
                revision=revision,
                dtype=dtype,
                attn_implementation="sdpa",
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except Exception as error:  # a damaged file fails in many libraries' own ways
        raise RequestError(f"cannot load student {model} as {adapter.model_class}: {_one_line(error)}") from error
    if missing := sorted(report["missing_keys"]):
        raise RequestError(
            f"student {model} lacks {len(missing)} weights of {adapter.model_class}, such as {missing[0]}"
        )
    return Backbone(adapter, weights.eval(), tpe=tpe)


def load_adapter(model: str | os.PathLike[str], revision: str | None = None) -> FamilyAdapter:
    """A student's processor and config without its weights: enough to encode samples in a worker process.

    Raises:
        RequestError: not found, of an unknown family, or its processor cannot be loaded.
    """
    import transformers

    try:
        content, _ = transformers.PreTrainedConfig.get_config_dict(model, revision=revision)
    except Exception as error:
        raise RequestError(f"no student in {model}: {_one_line(error)}") from error
    family = _family(content.get("model_type"), model)
    try:
        config = getattr(transformers, family.model_class).config_class.from_dict(content)
        processor = getattr(transformers, family.processor_class).from_pretrained(
            model, revision=revision, trust_remote_code=False
        )
    except Exception as error:
        needs = f" (it needs the package {family.requirement})" if family.requirement else ""
        raise RequestError(f"cannot load the processor of student {model}{needs}: {_one_line(error)}") from error
    return family(processor, config)


def _family(model_type: Any, model: str | os.PathLike[str]) -> type[FamilyAdapter]:
    if model_type not in FAMILIES:
        raise RequestError(
            f"{model} is of the family {model_type!r}, which has no adapter; known are {', '.join(sorted(FAMILIES))}. "
            f"An adapter is {_WANTED}; docs/students.md shows how to add one"
        )
    return FAMILIES[model_type]


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


def _one_line(error: BaseException) -> str:
    """A foreign error within a message of ours: its type and text on one line, without credentials, cut to fit."""
    text = " ".join(redact(str(error)).split())
    return f"{type(error).__name__}: {text[:300]}{'...' if len(text) > 300 else ''}"
