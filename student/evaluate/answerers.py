"""Who answers: a student, a run with what it needs at inference, any other model, or a built-in one for checking."""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors.torch import load_file

from p4dprep.cache import Cache
from p4dprep.errors import CorruptDataError, RequestError
from student import run_folder
from student.backbones import Backbone, load, load_adapter
from student.backbones.loading import student_folder, time_cue_of, weights_digest
from student.cues import TimeCue, cued
from student.data import kept_frames
from student.distilled import TrainingBatch
from student.evaluate.benchmark import Benchmark, Question
from student.evaluate.common import LETTERS
from student.evaluate.media import FramePolicy, Loaded
from student.evaluate.stock import StockAnswerer, is_stock, make_greedy
from student.export import load_trained
from student.rivals import Rival, make_rival
from student.targets import stack_targets
from student.train_config import TrainConfig, parse_config
from student.tuning import load_trainable

Dtype = Literal["auto", "bfloat16", "float32"]

ORACLE, CONSTANT = "oracle", "constant:"

_SETTINGS = ("*.json", "*.jinja", "*.txt", "*.model")
_FORMS = ("{}", "({})", "Answer: {}", "``{}``")
"""How an answer may be written; a built-in answerer takes the first that the benchmark's own parser reads."""


class Answerer(Protocol):
    """Replies to questions, a batch at a time."""

    needs_media: bool

    def prepare(self, batch: Sequence[Loaded]) -> Any:
        """What `reply` takes, made beside it in another thread.

        Raises:
            RequestError: a question cannot be put to this answerer.
        """

    def reply(self, prepared: Any, num_tokens: int) -> list[str]:
        """The reply to each question, without white space around it."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A student that was named, looked at as far as that is cheap: no weights are in memory.

    Attributes:
        name: as named.
        digest: of weights and settings; a built-in answerer's is its name.
        time_cue: how it is told the frames' times.
        folder: of the student; of a run its base.
        run, step: the run and its checkpoint, or None.
        config: what the run was asked for.
        is_stock: whether it is of a family without an adapter.
    """

    name: str
    digest: str
    time_cue: TimeCue = "none"
    folder: Path | None = None
    run: Path | None = None
    step: int | None = None
    config: TrainConfig | None = None
    is_stock: bool = False

    def open_cache(self, cache: str | None, storage_options: Mapping[str, Any] | None) -> Cache | None:
        """The cache whose latents a rival reads when it answers; None for all others.

        Raises:
            RequestError: a rival without a cache, or a cache that nothing reads.
        """
        strategy = self.config.strategy if self.config is not None else "p4d"
        if strategy == "p4d" and cache is not None:
            raise RequestError(f"{self.name} reads no cache when it answers; leave --cache out")
        if strategy != "p4d" and cache is None:
            raise RequestError(f"{self.name} was trained as {strategy}, which reads a teacher's latents to answer; "
                               "name a cache of the benchmark's videos with --cache")  # fmt: skip
        return None if cache is None else Cache.open(cache, storage_options)

    def frame_policy(self, num_frames: int, frame_size: tuple[int, int] | None) -> FramePolicy:
        """The frames that it is shown: as asked for, else as a run was trained, else the video's own size.

        Raises:
            RequestError: the size that the run was trained with cannot be told.
        """
        if frame_size is not None or self.config is None:
            return FramePolicy(num_frames=num_frames, frame_size=frame_size)
        if self.config.frame_size is not None:
            return FramePolicy(num_frames=num_frames, frame_size=self.config.frame_size)
        try:
            cache = Cache.open(self.config.cache, self.config.storage_options or None)
        except Exception as error:
            raise RequestError(f"{self.name} was trained on frames of its cache's size, and {self.config.cache} cannot "
                               f"be opened to tell it; say --frame-size HEIGHTxWIDTH ({error})") from None  # fmt: skip
        seen, kept = cache.sampling, None if self.config.features else kept_frames(cache, None)
        size = (seen.height, seen.width) if kept is None else kept.spec.shape[1:3]
        return FramePolicy(num_frames=num_frames, frame_size=(size[0], size[1]), resize=seen.resize)


def find_source(
    student: str, *, revision: str | None = None, step: int | None = None, tpe: bool | None = None
) -> Source:
    """What a user means by STUDENT.

    Args:
        student: a run's folder, a student's folder or `ORG/NAME`, `oracle` or `constant:LETTER`.
        revision: the hub's branch, tag or commit.
        step: of a run's checkpoint; None is the last whole one.
        tpe: turn TPE on or off, whatever the student was trained with.

    Raises:
        RequestError: there is no such student, or an option does not apply to it.
    """
    if student == ORACLE or student.startswith(CONSTANT):
        if student != ORACLE and student.removeprefix(CONSTANT) not in set(LETTERS):
            raise RequestError(f"{student} is no answerer; say constant: and one capital letter, such as constant:B")
        return Source(name=student, digest=student)
    is_run = (Path(student) / run_folder.CONFIG).exists()
    if step is not None and not is_run:
        raise RequestError(f"{student} is no run of p4dprep train, so it has no checkpoint of step {step}")
    if is_run:
        return _run(Path(student), step, tpe)
    folder = student_folder(student, revision)
    if is_stock(folder):
        if tpe:
            raise RequestError(f"{student} is of a family without an adapter, so TPE cannot be added; leave --tpe out")
        return Source(name=student, digest=_digest(folder), folder=folder, is_stock=True)
    cue = _turned(time_cue_of(load_adapter(folder)), tpe)
    return Source(name=student, digest=_digest(folder), time_cue=cue, folder=folder)


def _run(run: Path, step: int | None, tpe: bool | None) -> Source:
    config, checkpoint = parse_config(run_folder.read_settings(run)), run_folder.last_checkpoint(run, step)
    folder = student_folder(config.student, config.revision)
    files = [checkpoint / run_folder.STUDENT_WEIGHTS]
    if config.strategy != "p4d":
        files.append(checkpoint / run_folder.P4D_WEIGHTS)
    return Source(
        name=str(run),
        digest=_digest(folder, *files),
        time_cue=_turned(config.time_cue, tpe),
        folder=folder,
        run=run,
        step=run_folder.step_of(checkpoint),
        config=config,
    )


def _turned(cue: TimeCue, tpe: bool | None) -> TimeCue:
    if tpe is None:
        return cue
    return "tpe" if tpe else "none" if cue == "tpe" else cue


def _digest(folder: Path, *files: Path) -> str:
    """SHA-256 of all that decides a student's answers: its weights, and its settings by their names."""
    digest = hashlib.sha256(weights_digest(folder).encode())
    settings = sorted(path for pattern in _SETTINGS for path in folder.glob(pattern))
    for path in (*settings, *files):
        digest.update(path.name.encode() + b"\0")
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def device_and_dtype(dtype: Dtype) -> tuple[torch.device, torch.dtype]:
    """The GPU if there is one; `auto` is bfloat16 there and float32 on a CPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if dtype == "auto":
        return device, torch.bfloat16 if device.type == "cuda" else torch.float32
    return device, torch.bfloat16 if dtype == "bfloat16" else torch.float32


def open_answerer(
    source: Source, benchmark: Benchmark, mode: str, *, dtype: Dtype, seed: int, cache: Cache | None
) -> Answerer:
    """The answerer itself, its weights in memory.

    Args:
        source: who.
        benchmark, mode, seed: what a built-in answerer's replies must be read by.
        dtype: of the weights and of what is computed.
        cache: what a rival reads.

    Raises:
        RequestError, CacheError: as `student.backbones.load` and `student.export.load_trained`.
    """
    if source.folder is None:
        return BuiltIn(source.name, benchmark, mode, seed)
    device, precision = device_and_dtype(dtype)
    if source.is_stock:
        return StockAnswerer(source.folder, device, precision)
    if source.run is None:
        backbone = load(source.folder, dtype=precision, tpe=source.time_cue == "tpe")
    else:
        backbone = load_trained(source.run, source.step)
    rival = None if cache is None else load_rival(source, cache, backbone.hidden_size).to(device)
    backbone.model.to(device=device, dtype=precision)
    return StudentAnswerer(backbone, source.time_cue, rival)


def load_rival(source: Source, cache: Cache, hidden_size: int) -> Rival:
    """The rival of a run, trained, for another cache of the same teacher's latents.

    Raises:
        CorruptDataError: the checkpoint's weights do not fit the latents of this cache.
        RequestError: the cache has no latents, or several.
    """
    config = source.config
    if config is None or config.strategy == "p4d" or source.run is None:
        raise ValueError(f"{source.name} has no rival")
    rival = make_rival(config.strategy, cache, hidden_size, config.targets, standardised=config.standardise_latents)
    weights = run_folder.last_checkpoint(source.run, source.step) / run_folder.P4D_WEIGHTS
    tensors = {name.removeprefix("rival."): value for name, value in load_file(weights).items()}
    try:
        load_trainable(rival, tensors)
    except CorruptDataError as error:
        raise CorruptDataError(f"{weights} does not fit the latents of {cache.store.url}: {error}") from None
    return rival.eval()


class StudentAnswerer:
    """A student, asked greedily: the likeliest token each time, no sampling, no penalty for repetition.

    Args:
        backbone: on its device.
        time_cue: how it is told the frames' times.
        rival: what puts a teacher's latents into it, or None.
    """

    needs_media = True

    def __init__(self, backbone: Backbone, time_cue: TimeCue, rival: Rival | None = None) -> None:
        self.backbone, self.time_cue, self.rival = backbone, time_cue, rival
        self.backbone.tpe = time_cue == "tpe"
        self._device = next(backbone.model.parameters()).device
        make_greedy(backbone.model, backbone.processor.tokenizer)

    def prepare(self, batch: Sequence[Loaded]) -> TrainingBatch:
        """Tokens, padded on the left so that every reply begins at the same place, and a rival's latents."""
        told = [cued(each.sample, self.time_cue) for each in batch]
        encoded = self.backbone.encode(told, padding_side="left")
        clip_ids, cached = [each.clip_id for each in batch], [each.cached for each in batch]
        return TrainingBatch(student=encoded, targets=stack_targets(encoded.ids, clip_ids, cached))

    @torch.inference_mode()
    def reply(self, prepared: TrainingBatch, num_tokens: int) -> list[str]:
        """Generate on the student's device."""
        moved, rival = prepared.to(self._device), self.rival
        batch, dtype = moved.student, self.backbone.model.dtype
        inject = rival and (lambda embeds_bsc: rival(embeds_bsc, batch.video_tokens, moved.targets))
        # Times among the inputs stay as exact as they are.
        inputs = {
            name: value.to(dtype) if name.startswith("pixel_values") else value for name, value in batch.inputs.items()
        }
        with ExitStack() as hooks:
            hooks.enter_context(self.backbone.timed(batch))
            hooks.enter_context(self.backbone.injecting(batch, inject))
            written = self.backbone.model.generate(**inputs, max_new_tokens=num_tokens)
        new = written[:, batch.inputs["input_ids"].shape[1] :]
        texts = self.backbone.processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [text.strip() for text in texts]


class BuiltIn:
    """Knows the truth (`oracle`), or says the same letter always (`constant:B`); its replies go through the parser.

    `oracle` replies "" where the published truth is none of the options.
    """

    needs_media = False

    def __init__(self, name: str, benchmark: Benchmark, mode: str, seed: int) -> None:
        self._letter = "" if name == ORACLE else name.removeprefix(CONSTANT)
        self._benchmark, self._mode, self._seed = benchmark, mode, seed

    def prepare(self, batch: Sequence[Loaded]) -> list[Question]:
        """The questions."""
        return [each.question for each in batch]

    def reply(self, prepared: list[Question], num_tokens: int) -> list[str]:  # noqa: ARG002
        """What it knows, in the first form that the parser reads as meant."""
        return [self._say(question) for question in prepared]

    def _say(self, question: Question) -> str:
        wanted = self._letter or question.answer
        forms = [form.format(wanted) for form in _FORMS] if wanted else []
        if question.options and wanted in set(LETTERS[: len(question.options)]):
            forms.append(question.options[LETTERS.index(wanted)])
        for reply in forms:
            parsed = self._benchmark.parse(question, reply, self._mode, self._seed)
            if parsed.is_matched and parsed.answer == wanted:
                return reply
        return wanted
