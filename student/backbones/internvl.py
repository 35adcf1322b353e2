"""InternVL: every frame is a picture of its own; patches are shuffled together 2 x 2 before the projector."""

from torch import Tensor

from student.backbones.adapter import FamilyAdapter
from student.backbones.smolvlm import one_row_a_picture
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

    @property
    def video_token_id(self) -> int:
        """Frames are pictures to this model."""
        return int(self.config.image_token_id)

    def locate_video(self, places_n: Tensor, media: dict[str, Tensor], num_frames: int) -> VideoTokens:
        """One step a frame; the patches of the resized frame, shuffled together."""
        patch_height, patch_width = self.config.vision_config.patch_size
        height, width = media["pixel_values"].shape[-2:]
        shrink = self.config.downsample_ratio
        rows, columns = int(height // patch_height * shrink), int(width // patch_width * shrink)
        return self.raster(places_n, (num_frames, rows, columns), num_frames)

    def feature_seconds(self, batch: StudentBatch) -> tuple[Tensor | None, ...]:
        """One row a picture or frame, all in one call."""
        return one_row_a_picture(batch, self.video_token_id, self.processor.image_seq_length)
