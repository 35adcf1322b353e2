"""InternVL: every frame is a picture of its own; patches are shuffled together 2 x 2 before the projector."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from student.backbones.adapter import FamilyAdapter
from student.backbones.smolvlm import in_samples_order, one_row_a_picture
from student.backbones.types import StudentBatch
from student.samples import VideoTokens


class InternVLAdapter(FamilyAdapter):
    """InternVL in transformers' own format. Frames and tiles of pictures share one call of the projector.

    The shuffle puts the channels of four patches side by side, so TPE repeats its encoding four times.
    """

    model_type = "internvl"
    model_class = "InternVLForConditionalGeneration"
    processor_class = "InternVLProcessor"
    vision_tower = "model.vision_tower"
    projector = "model.multi_modal_projector"
    llm = "model.language_model"
    projector_parameters = ("model.multi_modal_projector.",)
    picture_inputs: ClassVar[tuple[str, ...]] = ("pixel_values",)

    @property
    def video_token_id(self) -> int:
        """Frames are pictures to this model."""
        return int(self.config.image_token_id)

    def locate_video(self, places_n: Tensor, media: dict[str, Tensor], num_frames: int) -> VideoTokens:
        """One step a frame; the patches of the resized frame, shuffled together."""
        rows, columns = self._cells(media)
        return self.raster(places_n, (num_frames, rows, columns), num_frames)

    def feature_seconds(self, batch: StudentBatch) -> tuple[Tensor | None, ...]:
        """One row a picture or frame, all in one call."""
        return one_row_a_picture(batch, self.video_token_id, self.processor.image_seq_length)

    def feature_sizes(self, media: Mapping[str, Tensor], num_frames: int) -> dict[str, int]:
        """The cells of every frame, the channels of a cell's patches side by side."""
        rows, columns = self._cells(media)
        channels = int(self.config.vision_config.hidden_size / self.config.downsample_ratio**2)
        return {"t": num_frames, "cell": rows * columns, "channel": channels}

    def encoder_outputs(self, model: Any, batch: StudentBatch) -> dict[str, Any]:
        """Frames are pictures: tokens of both in the samples' order."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        tokens = in_samples_order(self, model, batch, self.processor.image_seq_length)
        return {"image": BaseModelOutputWithPooling(pooler_output=tokens)}

    def _cells(self, media: Mapping[str, Tensor]) -> tuple[int, int]:
        """Rows and columns of a frame's cells."""
        patch_height, patch_width = self.config.vision_config.patch_size
        height, width = media["pixel_values"].shape[-2:]
        shrink = self.config.downsample_ratio
        return int(height // patch_height * shrink), int(width // patch_width * shrink)
