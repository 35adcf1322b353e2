"""VideoLLaMA3: one step a frame, 2 x 2 patches a token; tokens that repeat the frame before are left out."""

import torch
from torch import Tensor

from student.backbones.adapter import FamilyAdapter
from student.backbones.types import StudentBatch
from student.samples import VideoTokens


class VideoLlama3Adapter(FamilyAdapter):
    """VideoLLaMA3. Where a cell's token was left out, the cell's last token before it stands for it."""

    model_type = "video_llama_3"
    model_class = "VideoLlama3ForConditionalGeneration"
    processor_class = "VideoLlama3Processor"
    vision_tower = "model.vision_model"
    projector = "model.projector"
    llm = "model.language_model"
    projector_parameters = ("model.projector.",)
    no_features = "which tokens it leaves out depends on what the frames show"

    def locate_video(self, places_n: Tensor, media: dict[str, Tensor], num_frames: int) -> VideoTokens:
        """The grid of patches that the processor states, merged, and its mask of the tokens that were kept."""
        num_steps, height, width = media["video_grid_thw"][0].tolist()
        merge = int(media["video_merge_sizes"][0])
        grid = (num_steps, height // merge, width // merge)
        kept = media["video_compression_mask"].reshape(grid)
        places_tyx = torch.full(grid, -1, dtype=torch.int64)
        places_tyx[kept] = places_n
        return self.raster(places_tyx.cummax(0).values.flatten(), grid, num_frames)

    def feature_seconds(self, batch: StudentBatch) -> tuple[Tensor | None, ...]:
        """One row a cell, kept or not: first all pictures in one call, then all videos in one."""
        calls: list[Tensor | None] = [None] if "image_grid_thw" in batch.inputs else []
        if "video_grid_thw" in batch.inputs:
            pairs = zip(batch.step_seconds(), batch.video_tokens, strict=True)
            calls.append(
                torch.cat([s.repeat_interleave(t.positions_tyx[0].numel()) for s, t in pairs if s is not None and t])
            )
        return tuple(calls)
