"""LLaVA-OneVision: every frame through the projector, then 2 x 2 tokens pooled; a video ends in one newline token."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from p4dprep.errors import RequestError
from student.backbones.adapter import FamilyAdapter
from student.backbones.types import StudentBatch
from student.samples import VideoTokens


class LlavaOnevisionAdapter(FamilyAdapter):
    """LLaVA-OneVision. Its tower takes videos of one batch only with equally many frames, as a cache's clips are."""

    model_type = "llava_onevision"
    model_class = "LlavaOnevisionForConditionalGeneration"
    processor_class = "LlavaOnevisionProcessor"
    vision_tower = "model.vision_tower"
    projector = "model.multi_modal_projector"
    llm = "model.language_model"
    projector_parameters = ("model.multi_modal_projector.", "model.image_newline")
    picture_inputs: ClassVar[tuple[str, ...]] = ("pixel_values", "image_sizes", "batch_num_images")

    def locate_video(self, places_n: Tensor, media: dict[str, Tensor], num_frames: int) -> VideoTokens:  # noqa: ARG002
        """One step a frame, the pooled patches; the newline token at the end stands for no cell."""
        vision = self.config.vision_config
        cells = math.ceil(vision.image_size // vision.patch_size / 2)
        return self.raster(places_n[:-1], (num_frames, cells, cells), num_frames)

    def join_media(self, media: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Pictures are filled up to equally many tiles, which the model drops again.

        Raises:
            RequestError: videos with different numbers of frames.
        """
        counts = sorted({one["pixel_values_videos"].shape[1] for one in media if "pixel_values_videos" in one})
        if len(counts) > 1:
            raise RequestError(
                f"LLaVA-OneVision takes no videos of {counts} frames in one batch; use clips of one length"
            )
        tiles = max((one["pixel_values"].shape[1] for one in media if "pixel_values" in one), default=0)
        filled = [
            one | {"pixel_values": pad(one["pixel_values"], (0,) * 7 + (tiles - one["pixel_values"].shape[1],))}
            if "pixel_values" in one
            else one
            for one in media
        ]
        return super().join_media(filled)

    def feature_seconds(self, batch: StudentBatch) -> tuple[Tensor | None, ...]:
        """One row a tile or frame: first all pictures in one call, then all videos in one."""
        calls: list[Tensor | None] = [None] if "pixel_values" in batch.inputs else []
        if any(batch.video_tokens):
            calls.append(torch.cat([seconds for seconds in batch.step_seconds() if seconds is not None]))
        return tuple(calls)

    def feature_sizes(self, media: Mapping[str, Tensor], num_frames: int) -> dict[str, int]:  # noqa: ARG002
        """The patches of every frame; of several layers of the tower, the channels side by side."""
        vision, layers = self.config.vision_config, self.config.vision_feature_layer
        num_layers = 1 if isinstance(layers, int) else len(layers)
        num_patches = (vision.image_size // vision.patch_size) ** 2
        return {"t": num_frames, "patch": num_patches, "channel": num_layers * int(vision.hidden_size)}

    def project(self, model: Any, features: Tensor, batch: StudentBatch) -> Any:  # noqa: ARG002
        """Projected, pooled, and a newline token at the end of each video."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        inner = model.model
        pooled = inner.apply_pooling(model.get_submodule(self.projector)(features.flatten(0, 1)))
        videos = pooled.unflatten(0, (len(features), -1)).flatten(1, 2)
        newline = inner.image_newline.expand(len(features), 1, -1).to(videos)
        return BaseModelOutputWithPooling(pooler_output=torch.cat([videos, newline], dim=1))
