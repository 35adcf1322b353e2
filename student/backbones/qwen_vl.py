"""Qwen2.5-VL and Qwen3-VL: two frames a step, 2 x 2 patches a token; the projector is the tower's own merger."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

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

    def feature_sizes(self, media: Mapping[str, Tensor], num_frames: int) -> dict[str, int]:  # noqa: ARG002
        """Patches in the tower's own order, window by window in Qwen2.5-VL."""
        num_patches = int(media["video_grid_thw"][0].prod())
        return {"patch": num_patches, "channel": int(self.config.vision_config.hidden_size)}

    def project(self, model: nn.Module, features: Tensor, batch: StudentBatch) -> Any:
        """The merger, and its tokens back in order."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling
        from transformers.vision_utils import get_vision_window_index

        merged = model.get_submodule(self.projector)(features.flatten(0, 1))
        vision, grids = self.config.vision_config, batch.inputs["video_grid_thw"]
        windows, _ = get_vision_window_index(grids, vision.spatial_merge_size, vision.window_size, vision.patch_size)
        merged = merged[windows.to(merged.device).argsort()]
        return BaseModelOutputWithPooling(pooler_output=merged.chunk(len(features)))


class Qwen3VLAdapter(Qwen25VLAdapter):
    """Qwen3-VL. Mergers of its own feed features of inner layers to the LLM (DeepStack); TPE goes to the last one."""

    model_type = "qwen3_vl"
    model_class = "Qwen3VLForConditionalGeneration"
    processor_class = "Qwen3VLProcessor"
    projector_parameters = ("model.visual.merger.", "model.visual.deepstack_merger_list.")

    @property
    def feature_modules(self) -> tuple[str, ...]:
        """The last merger, then DeepStack's, which get features of inner layers."""
        inner = range(len(self.config.vision_config.deepstack_visual_indexes))
        return (self.projector, *(f"{self.vision_tower}.deepstack_merger_list.{number}" for number in inner))

    def gather_features(self, arguments: Sequence[Tensor], num_videos: int) -> Tensor:
        """One layer of features for each merger."""
        return torch.stack([super(Qwen3VLAdapter, self).gather_features([each], num_videos) for each in arguments], 1)

    def feature_sizes(self, media: Mapping[str, Tensor], num_frames: int) -> dict[str, int]:
        """The last layer's patches, then those of DeepStack's layers."""
        return {"merger": len(self.feature_modules)} | super().feature_sizes(media, num_frames)

    def project(self, model: nn.Module, features: Tensor, batch: StudentBatch) -> Any:  # noqa: ARG002
        """Every merger on its own layer's features."""
        from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

        merged, *inner = (
            model.get_submodule(path)(features[:, number].flatten(0, 1)).chunk(len(features))
            for number, path in enumerate(self.feature_modules)
        )
        return BaseModelOutputWithDeepstackFeatures(pooler_output=merged, deepstack_features=inner)
