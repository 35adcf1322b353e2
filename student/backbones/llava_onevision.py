"""LLaVA-OneVision: every frame through the projector, then 2 x 2 tokens pooled; a video ends in one newline token."""

import math
from collections.abc import Sequence

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
        if "pixel_values_videos" in batch.inputs:
            calls.append(torch.cat([seconds for seconds in batch.step_seconds() if seconds is not None]))
        return tuple(calls)
