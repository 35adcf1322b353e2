"""A training step of the paper's sizes: the full L4P (1,337 M parameters) beside a student of Qwen2.5-VL-7B's sizes.

On torch's `meta` device, where weights take no memory, FLOPs are counted; on a GPU the same step is timed, with random
weights and without the optimiser. Attention counts as if it were not causal. `benchmarks.train_step` prints both.
"""

import statistics
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.clock import NUM_WARM_UP, Clock, paired_ratio
from student.p4d import LatentShape, PerceptionDecoder, rearrange
from student.samples import VideoTokens
from teachers.l4p.config import MODALITIES, L4PConfig
from teachers.l4p.model import L4P

TEXT_TOKENS = 128
QWEN_7B_TEXT: Mapping[str, Any] = {
    "vocab_size": 152_064, "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}  # fmt: skip
QWEN_7B_VISION: Mapping[str, Any] = {
    "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
    "patch_size": 14, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
}  # fmt: skip


class FullStep:
    """The full L4P and a 7 B student with random weights; only sizes matter.

    Args:
        side: pixels of the student's frames.
        device: `meta` to count, `cuda` to time.
        teacher: its sizes.
        text, vision: the student's.
        num_conversations: that share the clip, each of TEXT_TOKENS.
    """

    def __init__(
        self,
        side: int,
        device: str,
        teacher: L4PConfig | None = None,
        text: Mapping[str, Any] = QWEN_7B_TEXT,
        vision: Mapping[str, Any] = QWEN_7B_VISION,
        num_conversations: int = 1,
    ) -> None:
        self.device, self.num_text = device, num_conversations * TEXT_TOKENS
        self.teacher = _frozen_teacher(teacher or L4PConfig(), device)
        self.student = _student(text, vision, device)
        config = self.teacher.config
        shape = LatentShape(num_taps=len(config.taps), grid=config.token_grid, channels=config.hidden_size)
        with torch.device(device):
            self.decoder = PerceptionDecoder(text["hidden_size"], shape)
        cells = side // vision["patch_size"]
        self.grid = torch.tensor([[config.num_frames // 2, cells, cells]])
        steps, rows = config.num_frames // 2, cells // 2
        spans = tuple((2 * step, 2 * step + 2) for step in range(steps))
        places = torch.arange(steps * rows * rows, device=device).reshape(steps, rows, rows)
        self.tokens = VideoTokens(positions_tyx=places, frame_spans=spans)
        self.num_tokens = places.numel() + self.num_text

    def ask_teacher(self) -> None:
        """One clip through L4P."""
        config = self.teacher.config
        with torch.no_grad():
            self.teacher(torch.zeros(1, 3, config.num_frames, *2 * [config.image_size], device=self.device))

    def train(self, clock: Clock) -> None:
        """Forward and backward of one clip; projector, LLM and decoder learn."""
        hidden, sft = self._student_forward()
        clock.mark("student forward")
        latents = self.decoder(rearrange(hidden, [self.tokens], self.decoder.shape.grid))
        taps = list(latents.flatten(2, 4).unbind(1))
        maps = [self.teacher.heads[modality](taps) for modality in MODALITIES]
        loss = sft + latents.square().mean() + torch.stack([values.square().mean() for values in maps]).sum()
        clock.mark("P4D forward")
        loss.backward()
        clock.mark("backward")
        for module in (self.student, self.decoder):
            module.zero_grad()

    def _student_forward(self) -> tuple[Tensor, Tensor]:
        from transformers.vision_utils import get_vision_position_ids

        visual, dtype = self.student.model.visual, self.student.dtype
        places = get_vision_position_ids(self.grid, visual.spatial_merge_size).to(self.device)
        patches = torch.zeros(len(places), visual.patch_embed.proj.weight[0].numel(), device=self.device, dtype=dtype)
        seen = visual(patches, grid_thw=self.grid, position_ids=places).pooler_output
        text = torch.zeros(self.num_text, seen.shape[-1], device=self.device, dtype=dtype)
        positions = torch.arange(self.num_tokens, device=self.device).expand(3, 1, -1)
        read = self.student.model.language_model(
            inputs_embeds=torch.cat([seen, text])[None], position_ids=positions, use_cache=False
        )
        hidden: Tensor = read.last_hidden_state
        labels = torch.zeros(self.num_tokens, dtype=torch.long, device=self.device)
        return hidden, functional.cross_entropy(self.student.lm_head(hidden)[0].float(), labels)


def _frozen_teacher(config: L4PConfig, device: str) -> L4P:
    with torch.device(device):
        teacher = L4P(config).requires_grad_(False)
    places = teacher.encoder.embeddings
    places.position_embeddings = places.position_embeddings.to(device)
    return teacher


def _student(text: Mapping[str, Any], vision: Mapping[str, Any], device: str) -> Any:
    """The model in bfloat16, its tower frozen, its projector not."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(text_config=dict(text), vision_config=dict(vision), tie_word_embeddings=False)
    with torch.device(device):
        model = Qwen2_5_VLForConditionalGeneration(config).to(torch.bfloat16)
    model.model.visual.requires_grad_(False)
    model.model.visual.merger.requires_grad_(True)
    return model


def count_full(side: int, num_conversations: int = 1) -> dict[str, float]:
    """FLOPs of a step on one clip, by part, with the teacher beside it."""
    made = FullStep(side, "meta", num_conversations=num_conversations)
    with FlopCounterMode(display=False) as counter:
        clock = Clock("meta", counter)
        made.ask_teacher()
        clock.mark("teacher")
        made.train(clock)
    parts = {part: flops for part, (flops, _) in clock.parts.items()}
    without = clock.total[0] - parts["teacher"]
    return {
        "side": side,
        "conversations": num_conversations,
        "tokens": made.num_tokens,
        **parts,
        "ratio": without / clock.total[0],
        "a conversation": without / num_conversations,
    }


def time_full(made: FullStep, num_rounds: int) -> dict[str, Any]:
    """Seconds of the same on a GPU, in bfloat16 by autocast; the teacher's part over both is what the cache saves."""
    taken: list[tuple[float, float]] = []
    for number in range(-NUM_WARM_UP, num_rounds):
        clock = Clock(made.device)
        with torch.autocast(made.device, torch.bfloat16):
            made.ask_teacher()
            clock.mark("teacher")
            made.train(clock)
        if number >= 0:
            taken.append((clock.parts["teacher"][0], clock.total[0]))
    ratio = paired_ratio([both - teacher for teacher, both in taken], [both for _, both in taken])
    medians = [statistics.median(column) for column in zip(*taken, strict=True)]
    return {"teacher_seconds": medians[0], "online_seconds": medians[1], "ratio": ratio}
