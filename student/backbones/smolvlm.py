"""SmolVLM2: every frame is a picture of its own; the connector shuffles patches together, then projects."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from student.backbones.adapter import FamilyAdapter
from student.backbones.types import StudentBatch
from student.samples import VideoTokens


class SmolVLMAdapter(FamilyAdapter):
    """SmolVLM2. Frames and tiles of pictures go through the connector together, sample after sample."""

    model_type = "smolvlm"
    model_class = "SmolVLMForConditionalGeneration"
    processor_class = "SmolVLMProcessor"
    vision_tower = "model.vision_model"
    projector = "model.connector"
    llm = "model.text_model"
    projector_parameters = ("model.connector.",)
    requirement = "num2words"
    picture_inputs: ClassVar[tuple[str, ...]] = ("pixel_values", "pixel_attention_mask")

    @property
    def video_token_id(self) -> int:
        """Frames are pictures to this model."""
        return int(self.config.image_token_id)

    def locate_video(self, places_n: Tensor, media: dict[str, Tensor], num_frames: int) -> VideoTokens:
        """One step a frame; the patches of the resized frame, divided by the connector's factor."""
        cell = self.config.vision_config.patch_size * self.config.scale_factor
        height, width = media["pixel_values"].shape[-2:]
        return self.raster(places_n, (num_frames, height // cell, width // cell), num_frames)

    def join_media(self, media: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Pictures (1, n, c, h, w) and their masks, filled up with empty ones, which the model itself drops."""
        joined = {}
        for name in media[0] if media else ():
            sizes = torch.tensor([one[name].shape[1:] for one in media])
            gaps = (sizes.amax(0) - sizes).tolist()
            joined[name] = torch.cat([pad(one[name], _after(gap)) for one, gap in zip(media, gaps, strict=True)])
        return joined

    def feature_seconds(self, batch: StudentBatch) -> tuple[Tensor | None, ...]:
        """One row a picture or frame, all in one call."""
        return one_row_a_picture(batch, self.video_token_id, self.processor.image_seq_len)

    def feature_sizes(self, media: Mapping[str, Tensor], num_frames: int) -> dict[str, int]:
        """The patches of every frame."""
        vision = self.config.vision_config
        height, width = media["pixel_values"].shape[-2:]
        num_patches = (height // vision.patch_size) * (width // vision.patch_size)
        return {"t": num_frames, "patch": num_patches, "channel": int(vision.hidden_size)}

    def encoder_outputs(self, model: Any, batch: StudentBatch) -> dict[str, Any]:
        """Frames are pictures: tokens of both in the samples' order, as rows."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        tokens_nc = in_samples_order(self, model, batch, self.processor.image_seq_len).flatten(0, 1)
        return {"image": BaseModelOutputWithPooling(pooler_output=tokens_nc)}


def in_samples_order(adapter: FamilyAdapter, model: Any, batch: StudentBatch, tokens_a_picture: int) -> Tensor:
    """Tokens of pictures, from their pixels, and of frames, from their features, (rows, tokens, channels).

    For families to which a frame is a picture: the model takes the rows sample after sample.
    """
    rows = ((batch.inputs["input_ids"] == adapter.video_token_id).sum(-1) // tokens_a_picture).tolist()
    kinds: dict[bool, Tensor] = {}
    if "pixel_values" in batch.inputs:
        found = model.get_image_features(**adapter.picture_arguments(batch), return_dict=True).pooler_output
        tokens = found if isinstance(found, Tensor) else torch.cat(list(found))
        kinds[False] = tokens.reshape(-1, tokens_a_picture, tokens.shape[-1])
    if batch.features is not None:
        features = batch.features.to(model.dtype).flatten(0, 1)
        kinds[True] = model.get_submodule(adapter.projector)(features)
    used, pieces = {True: 0, False: 0}, list[Tensor]()
    for num, video in zip(rows, batch.video_tokens, strict=True):
        if num:
            kind = video is not None
            pieces.append(kinds[kind][used[kind] : used[kind] + num])
            used[kind] += num
    return torch.cat(pieces)


def one_row_a_picture(batch: StudentBatch, token_id: int, tokens_a_picture: int) -> tuple[Tensor | None, ...]:
    """Times of frames and NaN for pictures, sample after sample, where one call of the projector takes them all.

    Where frames come as features, pictures have a call of their own before.
    """
    if batch.features is not None:
        seconds = torch.cat([each for each in batch.step_seconds() if each is not None])
        return (None, seconds) if "pixel_values" in batch.inputs else (seconds,)
    rows = ((batch.inputs["input_ids"] == token_id).sum(-1) // tokens_a_picture).tolist()
    if not any(rows):
        return ()
    missing = torch.tensor(torch.nan, dtype=torch.float64)
    return (
        torch.cat(
            [
                missing.expand(num) if seconds is None else seconds
                for seconds, num in zip(batch.step_seconds(), rows, strict=True)
            ]
        ),
    )


def _after(gap: Sequence[int]) -> list[int]:
    """torch's padding, last axis first, at the end of each axis."""
    return [amount for size in reversed(gap) for amount in (0, size)]
