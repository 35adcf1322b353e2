"""What a user asks of `p4dprep train`, from flags or a YAML file, validated once."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from p4dprep.config import validated
from p4dprep.storage import redact
from student.conversations import OnProblem
from student.cues import TimeCue
from student.losses import Loss
from student.p4d_config import DistilFrame, Heads
from student.regions import RegionPrompt
from student.rivals import Strategy
from student.tuning import Tuning


class TrainConfig(BaseModel):
    """A request to train. Field names are those of the YAML file; the flags are the same with hyphens.

    Attributes:
        cache: folder or URL of the cache that every target is read from.
        qa: conversations, see docs/training-data.md; none is distillation alone, a perception stage.
        media: folder under which the conversations' media lie; None reads clips from where the cache recorded them.
        student: folder in the hub's own format, `ORG/NAME`, or an earlier run's export.
        revision: the hub's branch, tag or commit.
        out: the run's folder; on a cluster, storage that all machines share.

        distill: what is learnt from the cache: `sft` nothing, `ld` latents, `ed` maps, `ld+ed`, single modalities
            `depth`, `flow`, `motion`, `camray`, joined by `+`. What is not learnt is still computed and logged.
        targets: arrays `<group>_<target>` to use, where the cache offers several for one thing.
        weights: lambda of single arrays, in place of the paper's.
        losses: loss of single arrays, in place of their quantity's default.
        latent_weight: of L_LD; raising it ties the student closer to the teacher's features.
        explicit_weight: of L_ED; raising it ties the student closer to the teacher's maps.
        heads: `frozen` are the teacher's own where the cache keeps them, as in the paper; `light` trains small ones in
            their place, for a student that is smaller than the teacher's heads.
        decoder_width: of the perception decoder's hidden layers.
        decoder_positions: tell the decoder where on the teacher's grid a token lies, for a student whose own grid is
            coarser.
        distill_layer: LLM layer whose output is distilled, from 1; None is the last, as in the paper. A middle one
            leaves later layers to read what was learnt.
        distill_cells: rows and columns over which latents are averaged before they are compared, for a student with
            no more tokens a frame; asks for light heads.
        distill_frame: whose hidden states a teacher's step of several frames is told from: `first`, as in the authors'
            release, or `last`, at which an LLM that looks back only has seen them all.
        standardise_latents: compare latents channel by channel in units of their spread over the corpus, so that none
            is drowned by one of another scale; the rivals read them so.
        balance_motion: in every loss what moves counts together as much as what stands, by the cached motion.
        strategy: `p4d`, or the paper's rivals, which read the teacher's targets at inference too (Table 4).
        time_cue: how the student is told the frames' times.
        tune: which parts learn.
        lora_rank: of the adapters, where `tune` has any; raising it lets the LLM change more.
        regions: how a question's regions are shown.
        flip: mirror every second sample without text.
        on_problem: what samples that cannot be used do.
        frame_size: height and width of the student's frames; None takes the kept frames' size, else the cache's.
        features: array of the student's own vision features in the cache (`extract --teacher student:MODEL`); the
            vision tower then does not run.
        conversations_per_sample: how many conversations over one clip share a sample, each blind to the others: the
            video, its targets and the losses of both are then paid for once. `batch_size` counts samples.

        epochs, max_steps: how long; steps win.
        batch_size: samples of one step, over all workers.
        micro_batch_size: samples one worker takes at once; raising it costs memory and changes nothing else.
        learning_rate, warmup_fraction, weight_decay, max_grad_norm: of AdamW with a cosine schedule.
        seed: of order, augmentation and everything random.
        precision: `bf16` computes so and keeps float32 weights; `auto` is bf16 where there is a GPU.
        gradient_checkpointing: compute activations again instead of keeping them.
        loader_workers: processes that read samples, for each worker.

        log_steps, save_steps, picture_steps: steps between log lines, checkpoints (a multiple of log_steps), and
            pictures of predicted and cached maps (0: none).
        keep_checkpoints: how many stay, at least 2.
        workers: processes that train, by Ray Train; with `gpus_per_worker` of a GPU each.
        address: a Ray cluster to join; None starts Ray on this machine where `workers` is more than 1.
        max_failures: how often Ray restarts lost workers, from the last checkpoint.
        trainer: more arguments of transformers.TrainingArguments, such as `fsdp`, `fsdp_config`, `deepspeed`, `optim`,
            `lr_scheduler_type`.
        storage_options: passed to fsspec for cache and videos; never written anywhere.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    cache: str = Field(min_length=1)
    qa: tuple[str, ...] = ()
    media: str | None = None
    student: str = Field(min_length=1)
    revision: str | None = None
    out: str = Field(min_length=1)

    distill: str = "ld+ed"
    targets: tuple[str, ...] | None = None
    weights: dict[str, float] = Field(default_factory=dict)
    losses: dict[str, Loss] = Field(default_factory=dict)
    latent_weight: float = Field(default=0.5, ge=0)
    explicit_weight: float = Field(default=0.1, ge=0)
    heads: Heads = "frozen"
    decoder_width: int = Field(default=2560, ge=1)
    decoder_positions: bool = False
    distill_layer: int | None = Field(default=None, ge=1)
    distill_cells: tuple[int, int] | None = None
    distill_frame: DistilFrame = "first"
    standardise_latents: bool = False
    balance_motion: bool = False
    strategy: Strategy = "p4d"
    time_cue: TimeCue = "tpe"
    tune: Tuning = "projector+llm"
    lora_rank: int = Field(default=16, ge=1)
    regions: RegionPrompt = "both"
    flip: bool = False
    on_problem: OnProblem = "stop"
    frame_size: tuple[int, int] | None = None
    features: str | None = None
    conversations_per_sample: int = Field(default=1, ge=1)

    epochs: int = Field(default=5, ge=1)
    max_steps: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=1024, ge=1)
    micro_batch_size: int = Field(default=1, ge=1)
    learning_rate: float = Field(default=1e-5, gt=0)
    warmup_fraction: float = Field(default=0.03, ge=0, le=1)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, ge=0)
    seed: int = Field(default=0, ge=0, lt=2**32)
    precision: Literal["auto", "float32", "bf16"] = "auto"
    gradient_checkpointing: bool = False
    loader_workers: int = Field(default=2, ge=0)

    log_steps: int = Field(default=10, ge=1)
    save_steps: int = Field(default=100, ge=1)
    picture_steps: int = Field(default=100, ge=0)
    keep_checkpoints: int = Field(default=2, ge=2)
    workers: int = Field(default=1, ge=1)
    gpus_per_worker: float | None = Field(default=None, ge=0)
    address: str | None = None
    max_failures: int = Field(default=3, ge=0)
    trainer: dict[str, Any] = Field(default_factory=dict)
    storage_options: dict[str, Any] = Field(default_factory=dict, repr=False, exclude=True)

    @model_validator(mode="before")
    @classmethod
    def _rivals_distil_nothing(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("strategy", "p4d") != "p4d":
            return {"distill": "sft"} | values
        return values

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.save_steps % self.log_steps:
            raise ValueError(f"save_steps {self.save_steps} must be a multiple of log_steps {self.log_steps}")
        if self.batch_size % (self.workers * self.micro_batch_size):
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of workers x micro_batch_size, "
                f"{self.workers} x {self.micro_batch_size}"
            )
        if self.strategy != "p4d" and self.distill != "sft":
            raise ValueError(f"strategy {self.strategy} reads the targets instead of learning them; leave distill out")
        if not self.qa and not self.distils:
            raise ValueError("without qa there is no text to learn; distil something, or name conversations")
        self._check_features()
        return self

    def _check_features(self) -> None:
        if self.features is None:
            return
        if self.frame_size is not None or self.time_cue == "marks" or self.flip:
            raise ValueError("cached features fit the cache's own frames only: no frame_size, no marks, no flip")
        if self.tune == "all":
            raise ValueError("cached features come from the tower as it is; tune projector+llm, llm or LoRA, not all")

    @property
    def distils(self) -> bool:
        """Whether anything is learnt from the cache."""
        return self.distill != "sft"

    def settings(self) -> dict[str, Any]:
        """What a run's config.yaml holds: all of it but secrets, with places that mean the same from any folder."""
        found = self.at_home().model_dump(mode="json")
        for name in ("cache", "media"):
            found[name] = found[name] and redact(found[name])
        return found

    def at_home(self) -> Self:
        """The same request with absolute paths: workers start in folders of their own."""
        is_folder = Path(self.student).expanduser().is_dir()
        places = {
            "cache": _absolute(self.cache),
            "qa": tuple(map(_absolute, self.qa)),
            "media": self.media and _absolute(self.media),
            "student": _absolute(self.student) if is_folder else self.student,
            "out": _absolute(self.out),
        }
        return self.model_copy(update=places)


def _absolute(place: str) -> str:
    return place if "://" in place else str(Path(place).expanduser().resolve())


FREE_FIELDS = frozenset(
    {
        "cache", "media", "student", "revision", "qa", "out",  # held to what they hold, not to where it lies
        "micro_batch_size", "loader_workers", "picture_steps", "keep_checkpoints", "workers", "gpus_per_worker",
        "address", "max_failures",
    }
)  # fmt: skip
"""Fields that a resumed run may change: none of them changes what is learnt, but for rounding."""


def parse_config(values: dict[str, Any]) -> TrainConfig:
    """Validate a request.

    Raises:
        RequestError: naming each wrong field, its value's fault and, for an unknown field, the known ones.
    """
    return validated(TrainConfig, values)
