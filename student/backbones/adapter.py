"""What a family of video language models must say of itself, and how its processor turns samples into batches.

An adapter holds a processor and a config, no weights, and pickles: a DataLoader's workers take it, not the model.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from p4dprep.errors import RequestError
from student.backbones.layout import without_pixels
from student.backbones.types import IGNORED_LABEL, StudentBatch
from student.samples import StudentSample, Turn, VideoTokens, VisionFeatures

Part = Literal["vision_tower", "projector", "llm"]

_SEQUENCES = ("input_ids", "attention_mask", "mm_token_type_ids")


@dataclass(frozen=True, kw_only=True)
class EncodedSample:
    """One sample before padding: `sequences` by name, `labels` and `branch_starts` each (s,), `media` as the processor
    gave them."""

    sequences: dict[str, Tensor]
    labels: Tensor
    branch_starts: Tensor
    media: dict[str, Tensor]
    video_tokens: VideoTokens | None
    time_seconds: Tensor | None
    features: Tensor | None


class FamilyAdapter(ABC):
    """One family of transformers. A subclass gives the class attributes, `locate_video` and `feature_seconds`.

    Attributes:
        processor, config: transformers' own.
        folder: where they were read; from the hub its name is the commit.

    Class attributes:
        model_type: what `config.json` says.
        model_class: name of the model's class in transformers.
        processor_class: name of the processor's class in transformers.
        vision_tower, projector, llm: paths of these modules in the model. `projector` is the module that gets the
            vision features as its first argument; TPE is added there.
        projector_parameters: prefixes of all parameters that belong to the projector, inside the tower or not.
        requirement: a package the processor needs and transformers does not bring; empty if none.
        picture_inputs: the inputs that the model's `get_image_features` takes.
        no_features: why vision features cannot stand for frames; empty if they can.
    """

    model_type: ClassVar[str]
    model_class: ClassVar[str]
    processor_class: ClassVar[str]
    vision_tower: ClassVar[str]
    projector: ClassVar[str]
    llm: ClassVar[str]
    projector_parameters: ClassVar[tuple[str, ...]]
    requirement: ClassVar[str] = ""
    picture_inputs: ClassVar[tuple[str, ...]] = ("pixel_values", "image_grid_thw")
    no_features: ClassVar[str] = "its adapter has no feature_sizes and project"

    def __init__(self, processor: Any, config: Any, folder: Path) -> None:
        self.processor = processor
        self.config = config
        self.folder = folder

    @abstractmethod
    def locate_video(self, places_n: Tensor, media: dict[str, Tensor], num_frames: int) -> VideoTokens:
        """Which of one sample's media tokens stands for which frames and cell.

        Args:
            places_n: places in the unpadded sequence of all tokens of `video_token_id`, ascending.
            media: what the processor made of this sample beside the text.
            num_frames: frames of the video.
        """

    @abstractmethod
    def feature_seconds(self, batch: StudentBatch) -> tuple[Tensor | None, ...]:
        """The times of the vision features, one entry for each call of the projector in a forward pass, in order.

        An entry is (rows,), float64, for the first axis of that call's features, NaN where there is no time, or None
        for a call without any.
        """

    def feature_sizes(self, media: Mapping[str, Tensor], num_frames: int) -> dict[str, int]:  # noqa: ARG002
        """Axes and sizes of one video's vision features: the projector's first argument, before TPE.

        Args:
            media: what the processor made of this video beside the text; pixels may be `meta` tensors.
            num_frames: frames of the video.

        Raises:
            RequestError: features cannot stand for frames in this family.
        """
        raise RequestError(
            f"vision features cannot stand for frames in the family {self.model_type}: {self.no_features}; "
            "train on frames"
        )

    def project(self, model: nn.Module, features: Tensor, batch: StudentBatch) -> Any:
        """What the model's encoder would return for all videos of a batch, from the projector on.

        Args:
            model: the transformers model; the projector is called as a module, so that its hooks run.
            features: (videos, *feature_sizes), of the model's dtype.
            batch: its inputs hold everything but the videos' pixels.
        """
        raise NotImplementedError

    @property
    def feature_modules(self) -> tuple[str, ...]:
        """Paths of the modules whose first arguments are the vision features, the projector first."""
        return (self.projector,)

    def gather_features(self, arguments: Sequence[Tensor], num_videos: int) -> Tensor:
        """The first arguments of `feature_modules` for a batch of videos, as (videos, *feature_sizes)."""
        return arguments[0].reshape(num_videos, -1, *arguments[0].shape[1:])

    def encoder_outputs(self, model: Any, batch: StudentBatch) -> dict[str, Any]:
        """The model's `mm_encoder_outputs`: pictures from their pixels through the tower, videos from their features.

        Pictures pass the projector first, then videos do.
        """
        outputs = {}
        if "pixel_values" in batch.inputs:
            outputs["image"] = model.get_image_features(**self.picture_arguments(batch), return_dict=True)
        if batch.features is not None:
            outputs["video"] = self.project(model, batch.features.to(model.dtype), batch)
        return outputs

    def feature_shape(self, num_frames: int, height: int, width: int) -> dict[str, int]:
        """Axes and sizes of the vision features of a video of this geometry.

        Raises:
            RequestError: features cannot stand for frames in this family, or its processor refuses such frames.
        """
        blank = VisionFeatures(values=np.empty(0, np.float32), frame_size=(height, width))
        sample = StudentSample(id="a video", time_seconds=np.arange(num_frames, dtype=np.float64), features=blank)
        text, _ = self._render(sample)
        return self.feature_sizes(self._process(sample, text), num_frames)

    def picture_arguments(self, batch: StudentBatch) -> dict[str, Tensor]:
        """What the model's `get_image_features` takes of a batch."""
        return {name: batch.inputs[name] for name in self.picture_inputs if name in batch.inputs}

    @cached_property
    def _layout(self) -> Any:
        """The processor for videos whose features are cached."""
        return without_pixels(self.processor)

    @property
    def video_token_id(self) -> int:
        """The token that the LLM replaces by video features."""
        return int(self.config.video_token_id)

    def part_of(self, parameter: str) -> Part:
        """The part of the model that a parameter of this name belongs to; the language head belongs to the LLM."""
        if parameter.startswith(self.projector_parameters):
            return "projector"
        return "vision_tower" if parameter.startswith(self.vision_tower + ".") else "llm"

    def encode(
        self, samples: Sequence[StudentSample], *, tpe: bool, padding_side: Literal["left", "right"] = "right"
    ) -> StudentBatch:
        """Tokenise and pad samples; the frames are those given, none is dropped or repeated.

        Every sample goes through the processor by itself, so that it gets the same tokens in whatever batch. A
        conversation that ends with the user gets the template's prompt for an answer.

        Args:
            samples: at least one.
            tpe: whether the batch carries the frames' times for TPE.
            padding_side: where short sequences are filled up.

        Raises:
            RequestError: no sample, text that holds a media token, a chat template that rewrites earlier turns, or
                samples this family cannot batch, or features that do not fit this family or one another.
        """
        if not samples:
            raise RequestError("a batch needs at least one sample")
        encoded = [self._encode_one(sample) for sample in samples]
        length = max(len(one.labels) for one in encoded)
        gaps = [
            (length - len(one.labels), 0) if padding_side == "left" else (0, length - len(one.labels))
            for one in encoded
        ]
        fill = {"input_ids": self.processor.tokenizer.pad_token_id}
        inputs = {
            name: torch.stack(
                [pad(one.sequences[name], gap, value=fill.get(name, 0)) for one, gap in zip(encoded, gaps, strict=True)]
            )
            for name in encoded[0].sequences
        }
        return StudentBatch(
            ids=tuple(sample.id for sample in samples),
            inputs=inputs | self.join_media([one.media for one in encoded if one.media]),
            labels=torch.stack(
                [pad(one.labels, gap, value=IGNORED_LABEL) for one, gap in zip(encoded, gaps, strict=True)]
            ),
            video_tokens=tuple(
                one.video_tokens and one.video_tokens.shifted(gap[0]) for one, gap in zip(encoded, gaps, strict=True)
            ),
            time_seconds=tuple(one.time_seconds for one in encoded) if tpe else None,
            features=_stacked_features(encoded),
            branch_starts=_padded_branches(encoded, gaps) if any(sample.others for sample in samples) else None,
        )

    def join_media(self, media: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The media of several samples as one model takes them; one after the other unless a family says otherwise."""
        names = {name: None for one in media for name in one}
        return {name: torch.cat([one[name] for one in media if name in one]) for name in names}

    def raster(self, places_n: Tensor, grid_tyx: tuple[int, int, int], num_frames: int) -> VideoTokens:
        """Tokens in the order step, row, column, each step covering equally many frames, the last perhaps fewer.

        Raises:
            RuntimeError: there are not as many tokens as cells, so the adapter misjudges its family.
        """
        num_steps = grid_tyx[0]
        if len(places_n) != math.prod(grid_tyx):
            raise RuntimeError(f"{self.model_type}: {len(places_n)} video tokens for a grid of {grid_tyx} cells")
        size = math.ceil(num_frames / num_steps)
        spans = tuple((first, min(first + size, num_frames)) for first in range(0, num_frames, size))
        return VideoTokens(positions_tyx=places_n.reshape(grid_tyx), frame_spans=spans)

    def _encode_one(self, sample: StudentSample) -> EncodedSample:
        """A sample of several conversations has what they share once, then what each of them says."""
        if not sample.others:
            return self._encode_conversation(sample)
        seen = self._pixelless(sample)
        first, *rest = (
            self._encode_conversation(replace(shown, conversation=talk, others=()))
            for shown, talk in ((sample, sample.conversation), *((seen, talk) for talk in sample.others))
        )
        ids = first.sequences["input_ids"]
        shared = int((ids == self.video_token_id).nonzero()[-1]) + 1
        if any(not torch.equal(one.sequences["input_ids"][:shared], ids[:shared]) for one in rest):
            raise RequestError(
                f"sample {sample.id!r}: the chat template of this {self.model_type} model writes something before the "
                "video that depends on what is asked; use one conversation a sample"
            )
        starts = [torch.zeros(shared, dtype=torch.int64)]
        for length in (len(one.labels) - shared for one in (first, *rest)):
            starts.append(torch.full((length,), sum(map(len, starts))))
        return replace(
            first,
            sequences={
                name: torch.cat([values, *(one.sequences[name][shared:] for one in rest)])
                for name, values in first.sequences.items()
            },
            labels=torch.cat([first.labels, *(one.labels[shared:] for one in rest)]),
            branch_starts=torch.cat(starts),
        )

    def _pixelless(self, sample: StudentSample) -> StudentSample:
        """The sample without its pixels, which were given before; as it is, where its layout needs them.

        A family whose features can stand for frames is one whose layout does not.
        """
        takes_features = type(self).feature_sizes is not FamilyAdapter.feature_sizes
        if sample.frames_thwc is None or not takes_features:
            return sample
        blank = VisionFeatures(values=np.empty(0, np.float32), frame_size=sample.frames_thwc.shape[1:3])
        return replace(sample, frames_thwc=None, features=blank)

    def _encode_conversation(self, sample: StudentSample) -> EncodedSample:
        text, answers = self._render(sample)
        features = self._process(sample, text)
        (replacements,) = features.pop("text_replacement_offsets")
        (offsets,) = features.pop("offset_mapping").tolist()
        sequences = {name: features.pop(name)[0] for name in _SEQUENCES if name in features}
        ids = sequences["input_ids"]
        media = dict(features)
        values = self._checked_features(sample, media)
        tokens = None
        if sample.time_seconds is not None:
            places = (ids == self.video_token_id).nonzero()[:, 0]
            tokens = self.locate_video(places, media, len(sample.time_seconds))
        return EncodedSample(
            sequences=sequences,
            labels=_labels(ids, offsets, [_expanded(span, replacements) for span in answers]),
            branch_starts=torch.zeros_like(ids),
            media={name: value for name, value in media.items() if not value.is_meta},
            features=values,
            video_tokens=tokens,
            time_seconds=None if sample.time_seconds is None else torch.from_numpy(sample.time_seconds.copy()),
        )

    def _checked_features(self, sample: StudentSample, media: Mapping[str, Tensor]) -> Tensor | None:
        if sample.features is None or sample.time_seconds is None or not sample.features.values.size:
            return None
        values, expected = sample.features.values, self.feature_sizes(media, len(sample.time_seconds))
        if values.shape != tuple(expected.values()):
            raise RequestError(
                f"sample {sample.id!r} has features {values.shape}, this student's are {expected}; extract them again"
            )
        return torch.from_numpy(values.copy())

    def _process(self, sample: StudentSample, text: str) -> Any:
        bos = self.processor.tokenizer.bos_token
        processor = self.processor if sample.features is None else self._layout
        try:
            return processor(
                text=[text],
                return_tensors="pt",
                add_special_tokens=not (bos and text.startswith(bos)),
                return_offsets_mapping=True,
                return_text_replacement_offsets=True,
                **media_arguments(sample),
            )
        except ValueError as error:
            raise RequestError(f"the processor of this {self.model_type} model refuses {sample!r}: {error}") from error

    def _render(self, sample: StudentSample) -> tuple[str, list[tuple[int, int]]]:
        """The conversation in the model's own template, and where the answers with their end stand in it.

        Every answer follows the template's prompt for one, as it will when the model is asked. Some templates write an
        answer that was given otherwise (LLaVA-OneVision's with one space more), and what learnt that would be asked
        something else.
        """
        messages = _messages(sample, {self.processor.image_token, self.processor.video_token})
        asking = bool(sample.conversation) and sample.conversation[-1].role == "user"
        whole = self._template(messages, asking=asking)
        text, written, answers = "", "", []  # ours and the template's own, as far as the last answer
        for place, turn in enumerate(sample.conversation):
            if turn.role == "user":
                continue
            before, until = self._template(messages[:place]), self._template(messages[: place + 1])
            prompt = self._template(messages[:place], asking=True)
            start = len(prompt) if until.startswith(prompt) else until.find(turn.text.strip(), len(before))
            if not (prompt.startswith(before) and until.startswith(before) and whole.startswith(until) and start >= 0):
                raise RequestError(
                    f"sample {sample.id!r}: the chat template of this {self.model_type} model rewrites earlier turns "
                    "or answers, so the answers cannot be told from the prompt; use one question a sample"
                )
            text += prompt[len(written) :]
            begin = len(text)
            text, written = text + until[start:], until
            answers.append((begin, len(text.rstrip())))
        return text + whole[len(written) :], answers

    def _template(self, messages: Sequence[Any], *, asking: bool = False) -> str:
        return str(self.processor.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=asking))


def _messages(sample: StudentSample, media_tokens: set[str]) -> list[dict[str, Any]]:
    """transformers' chat messages: what is shown comes before the first words."""
    shown = [{"type": "video"}] if sample.has_video else [{"type": "image"} for _ in sample.images_hwc]
    messages: list[dict[str, Any]] = []
    for turn in sample.conversation or (Turn(role="user", text=""),):
        if found := sorted(token for token in media_tokens if token in turn.text):
            raise RequestError(
                f"sample {sample.id!r}: text holds the media token {found[0]!r}; remove it from the text"
            )
        messages.append({"role": turn.role, "content": [*shown, {"type": "text", "text": turn.text}]})
        shown = []
    return messages


def media_arguments(sample: StudentSample) -> dict[str, Any]:
    """A video as the processor takes it, with the very times of its frames, or pictures; tensors are (c, h, w).

    A video of which only the features are known has its size.
    """
    from transformers.video_utils import VideoMetadata

    if sample.images_hwc:
        return {"images": [torch.from_numpy(image.copy()).permute(2, 0, 1) for image in sample.images_hwc]}
    if sample.time_seconds is None:
        return {}
    times = sample.time_seconds
    # A short clip repeats frames, maybe all; then any distance will do.
    step = float(times[-1] - times[0]) / max(len(times) - 1, 1) or 1.0
    metadata = VideoMetadata(
        total_num_frames=len(times),
        fps=1 / step,
        duration=len(times) * step,
        # A processor reads frame i's time as frames_indices[i] / fps: fractions keep uneven times exact.
        frames_indices=[float(time) / step for time in times],
    )
    return {"videos": [_video_tchw(sample)], "video_metadata": [metadata], "do_sample_frames": False}


def _video_tchw(sample: StudentSample) -> Tensor:
    """The frames, uint8 (t, c, h, w); a `meta` tensor where only the features are known."""
    if sample.frames_thwc is not None:
        return torch.from_numpy(sample.frames_thwc.copy()).permute(0, 3, 1, 2)
    num_frames = 0 if sample.time_seconds is None else len(sample.time_seconds)
    size = (0, 0) if sample.features is None else sample.features.frame_size
    return torch.empty(num_frames, 3, *size, dtype=torch.uint8, device="meta")


def _stacked_features(encoded: Sequence[EncodedSample]) -> Tensor | None:
    """The features of all videos of a batch, or None where their pixels are given."""
    features = [one.features for one in encoded if one.features is not None]
    if not features:
        return None
    num_videos = sum(one.video_tokens is not None for one in encoded)
    if len(features) != num_videos or len({one.shape for one in features}) > 1:
        raise RequestError("a batch has videos with features and with frames, or of several sizes; give it one kind")
    return torch.stack(features)


def _padded_branches(encoded: Sequence[EncodedSample], gaps: Sequence[tuple[int, int]]) -> Tensor:
    """Their branches in the padded sequences: a branch begins later by what was put before it."""
    moved = [
        torch.where(one.branch_starts > 0, one.branch_starts + gap[0], 0)
        for one, gap in zip(encoded, gaps, strict=True)
    ]
    return torch.stack([pad(starts, gap) for starts, gap in zip(moved, gaps, strict=True)])


def _expanded(span: tuple[int, int], replacements: Sequence[Any]) -> tuple[int, int]:
    """A span of the template's text after the media tokens before it have been written out."""
    growth = sum(len(each["replacement"]) - len(each["text"]) for each in replacements if each["span"][1] <= span[0])
    return span[0] + growth, span[1] + growth


def _labels(ids: Tensor, offsets: Sequence[Sequence[int]], answers: Sequence[tuple[int, int]]) -> Tensor:
    """The ids of tokens that overlap an answer, -100 elsewhere."""
    learned = torch.tensor([any(a < end and b > start for start, end in answers) for a, b in offsets], dtype=torch.bool)
    return torch.where(learned, ids, IGNORED_LABEL)
