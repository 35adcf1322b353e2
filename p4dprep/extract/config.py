"""What a user asks of `p4dprep extract`, from flags or a YAML file, validated once."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from p4dprep.config import validated
from p4dprep.corpus import Sampling
from p4dprep.errors import RequestError
from p4dprep.extract.frames import KIND, parse_size

ALL_TEACHERS = "all"
"""Key of a per-teacher setting that holds for every teacher not named."""


class ExtractConfig(BaseModel):
    """A request to extract. Field names are those of the YAML file; the flags are the same with hyphens.

    Attributes:
        source: file, folder, glob, URL of those, or manifest.
        cache: folder or URL of the cache.
        teachers: `[NAME=]KIND[:ARGUMENT][?option=value]`, one each.
        keep_frames: height and width at which the frames themselves are kept too, as the group `frames`.
        frames: frames per clip.
        fps: sampled frames per second; makes windows instead of one uniform sample over the clip.
        stride: sampled frames between two windows' starts; by default windows do not overlap.
        size: height and width in pixels.
        resize: `squash` to the size, as L4P does, or fit and `pad`.
        workers: workers per teacher name, or `all`; by default as many as the machine or cluster carries.
        batch_size: clips per `predict`, per teacher name or `all`; raising it fills a GPU and costs memory.
        gpus: share of a GPU per worker, per teacher name or `all`.
        coverage: share of clips that must be committed for exit code 0.
        limit: only the first clips of the source.
        retry_failed: try clips again that failed before.
        address: a Ray cluster to join, such as `auto` or `ray://HOST:10001`; None starts Ray on this machine.
        allow_http: permit plain HTTP(S) sources.
        storage_options: passed to fsspec for source and cache; never written anywhere.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(min_length=1)
    cache: str = Field(min_length=1)
    teachers: tuple[str, ...] = ()
    keep_frames: tuple[int, int] | None = None
    frames: int = Field(default=16, ge=1, le=4096)
    fps: float | None = Field(default=None, gt=0, le=1000)
    stride: int | None = Field(default=None, ge=1)
    size: tuple[int, int] = (224, 224)
    resize: Literal["squash", "pad"] = "squash"
    workers: dict[str, int] = Field(default_factory=dict)
    batch_size: dict[str, int] = Field(default_factory=dict)
    gpus: dict[str, float] = Field(default_factory=dict)
    coverage: float = Field(default=1.0, ge=0, le=1)
    limit: int | None = Field(default=None, ge=1)
    retry_failed: bool = False
    address: str | None = None
    allow_http: bool = False
    storage_options: dict[str, Any] = Field(default_factory=dict, repr=False)

    @field_validator("size", "keep_frames", mode="before")
    @classmethod
    def _parse_size(cls, value: object) -> object:
        """Accept 224, "224" and "HEIGHTxWIDTH"."""
        return None if value is None else parse_size(value)

    @field_validator("workers", "batch_size", "gpus", mode="before")
    @classmethod
    def _one_for_all(cls, value: object) -> object:
        """Accept a plain number for every teacher."""
        return {ALL_TEACHERS: value} if isinstance(value, int | float | str) else value

    @property
    def producers(self) -> tuple[str, ...]:
        """What fills groups: the teachers, and the frames to keep.

        Raises:
            RequestError: there is neither.
        """
        if not self.teachers and self.keep_frames is None:
            raise RequestError("nothing to extract: name a teacher with --teacher, or keep frames with --keep-frames")
        frames = () if self.keep_frames is None else (f"{KIND}:{self.keep_frames[0]}x{self.keep_frames[1]}",)
        return self.teachers + frames

    @property
    def sampling(self) -> Sampling:
        """The frames each clip gives.

        Raises:
            RequestError: `stride` without `fps`.
        """
        if self.fps is None and self.stride is not None:
            raise RequestError("--stride cuts windows and needs --fps")
        return Sampling(
            plan="uniform" if self.fps is None else "windows",
            num_frames=self.frames,
            fps=self.fps,
            stride_frames=None if self.fps is None else (self.stride or self.frames),
            height=self.size[0],
            width=self.size[1],
            resize=self.resize,
        )


def parse_config(values: dict[str, Any]) -> ExtractConfig:
    """Validate a request.

    Raises:
        RequestError: naming each wrong field, its value's fault and, for an unknown field, the known ones.
    """
    return validated(ExtractConfig, values)
