"""Models of transformers that have no adapter here, asked through their own processor and chat template."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from p4dprep.errors import RequestError
from p4dprep.storage import one_line
from student.backbones.adapter import media_arguments
from student.backbones.loading import FAMILIES, no_progress_bar
from student.evaluate.media import Loaded
from student.samples import StudentSample


def is_stock(folder: Path) -> bool:
    """Whether a folder holds a model that transformers knows as image-text-to-text and no adapter here knows."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    try:
        content, _ = transformers.PreTrainedConfig.get_config_dict(folder, local_files_only=True)
    except (OSError, ValueError):
        return False
    kind = content.get("model_type")
    return kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and kind not in FAMILIES


def make_greedy(model: Any, tokenizer: Any) -> None:
    """Replace what a checkpoint says of sampling and penalties; what ends a reply stays."""
    from transformers import GenerationConfig

    own = model.generation_config
    ends = own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id
    fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else own.pad_token_id
    if fill is None:
        fill = ends[0] if isinstance(ends, list) else ends
    model.generation_config = GenerationConfig(
        do_sample=False, bos_token_id=own.bos_token_id, eos_token_id=ends, pad_token_id=fill
    )


class StockAnswerer:
    """One question at a time, since how such a model pads is its own affair.

    What is shown stands before the words. A video is given as a video with its real times where the processor takes
    videos, else as its frames, one picture each.

    Args:
        folder: in the hub's own format; safetensors only, and only classes of transformers.
        device, dtype: where and in what it computes.

    Raises:
        RequestError: it cannot be loaded, lacks weights, or has no chat template.
    """

    needs_media = True

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        places: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            with no_progress_bar():
                self._processor = AutoProcessor.from_pretrained(folder, **places)
                model, report = AutoModelForImageTextToText.from_pretrained(
                    folder,
                    dtype=dtype,
                    use_safetensors=True,
                    attn_implementation="sdpa",
                    output_loading_info=True,
                    **places,
                )
        except Exception as error:  # a damaged file fails in many libraries' own ways
            raise RequestError(f"cannot load {folder}: {one_line(error)}") from error
        if missing := sorted(report["missing_keys"]):
            raise RequestError(f"{folder} lacks {len(missing)} weights, such as {missing[0]}; they would be random")
        if getattr(self._processor, "chat_template", None) is None:
            raise RequestError(f"{folder} has no chat template, so it cannot be known how to ask it")
        self._model, self._device = model.eval().to(device), device
        make_greedy(self._model, self._processor.tokenizer)

    def prepare(self, batch: Sequence[Loaded]) -> list[Any]:
        """The processor's output for each question.

        Raises:
            RequestError: the processor refuses it.
        """
        return [self._encode(each.sample) for each in batch]

    @torch.inference_mode()
    def reply(self, prepared: list[Any], num_tokens: int) -> list[str]:
        """Generate, question by question."""
        replies = []
        for inputs in prepared:
            moved = inputs.to(self._device, self._model.dtype)  # floating point ones change dtype, ids do not
            written = self._model.generate(**moved, max_new_tokens=num_tokens)
            new = written[0, moved["input_ids"].shape[1] :]
            replies.append(str(self._processor.tokenizer.decode(new, skip_special_tokens=True)).strip())
        return replies

    def _encode(self, sample: StudentSample) -> Any:
        if sample.frames_thwc is not None and getattr(self._processor, "video_processor", None) is None:
            sample = replace(sample, frames_thwc=None, time_seconds=None, images_hwc=tuple(sample.frames_thwc))
        shown = [{"type": "video"}] if sample.has_video else [{"type": "image"} for _ in sample.images_hwc]
        words = {"type": "text", "text": sample.conversation[0].text}
        try:
            text = self._processor.apply_chat_template(
                [{"role": "user", "content": [*shown, words]}], tokenize=False, add_generation_prompt=True
            )
            bos = self._processor.tokenizer.bos_token
            return self._processor(
                text=[text],
                return_tensors="pt",
                add_special_tokens=not (bos and text.startswith(bos)),
                **media_arguments(sample),
            )
        except (ValueError, TypeError, IndexError) as error:
            raise RequestError(f"the processor of this model refuses {sample!r}: {one_line(error)}") from error
