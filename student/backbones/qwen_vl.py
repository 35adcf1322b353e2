"""Qwen2.5-VL and Qwen3-VL: two frames a step, 2 x 2 patches a token; the projector is the tower's own merger."""

from typing import ClassVar

import torch
from torch import Tensor

from student.backbones.adapter import FamilyAdapter
from student.backbones.types import StudentBatch
from student.samples import VideoTokens


class Qwen25VLAdapter(FamilyAdapter):
    """Qwen2.5-VL. Its tower works through patches window by window, then the merger's output is put back in order.

    A window never leaves its step, so the merger's rows stay grouped by step, and TPE needs no permutation.
    """

    model_type = "qwen2_5_vl"
    model_class = "Qwen2_5_VLForConditionalGeneration"
    processor_class = "Qwen2_5_VLProcessor"
    vision_tower = "model.visual"
    projector = "model.visual.merger"
    llm = "model.language_model"
    projector_parameters: ClassVar[tuple[str, ...]] = ("model.visual.merger.",)

    def locate_video(self, places_n: Tensor, media: dict[str, Tensor], num_frames: int) -> VideoTokens:
        """The grid of patches that the processor states, merged."""
        num_steps, height, width = media["video_grid_thw"][0].tolist()
        merge = self.config.vision_config.spatial_merge_size
        return self.raster(places_n, (num_steps, height // merge, width // merge), num_frames)

    def feature_seconds(self, batch: StudentBatch) -> tuple[Tensor | None, ...]:
        """One row a patch: first all pictures in one call, then all videos in one."""
        calls: list[Tensor | None] = [None] if "image_grid_thw" in batch.inputs else []
        if "video_grid_thw" in batch.inputs:
            steps = [seconds for seconds in batch.step_seconds() if seconds is not None]
            patches = batch.inputs["video_grid_thw"][:, 1:].prod(-1).tolist()
            calls.append(torch.cat([s.repeat_interleave(num) for s, num in zip(steps, patches, strict=True)]))
        return tuple(calls)


class Qwen3VLAdapter(Qwen25VLAdapter):
    """Qwen3-VL. Mergers of its own feed features of inner layers to the LLM (DeepStack); TPE goes to the last one."""

    model_type = "qwen3_vl"
    model_class = "Qwen3VLForConditionalGeneration"
    processor_class = "Qwen3VLProcessor"
    projector_parameters = ("model.visual.merger.", "model.visual.deepstack_merger_list.")
