"""SmolVLM2: every frame is a picture of its own; the connector shuffles patches together, then projects."""

from collections.abc import Sequence

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


def one_row_a_picture(batch: StudentBatch, token_id: int, tokens_a_picture: int) -> tuple[Tensor | None, ...]:
    """Times of frames and NaN for pictures, sample after sample, where one call of the projector takes them all."""
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
