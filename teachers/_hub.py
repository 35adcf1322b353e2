"""Weights in the hub's own format: a local folder or `ORG/NAME[@REV]`, as safetensors, pinned and digested."""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from p4dprep.errors import RequestError, TeacherError
from p4dprep.registry import take_options
from p4dprep.storage import one_line
from p4dprep.targets import Teacher

if TYPE_CHECKING:
    import torch

HUB_FORMAT = ("*.json", "*.safetensors")
"""What may be downloaded: settings and safetensors, never a pickle and never code."""

TRANSFORMERS_FILES = (
    "config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*.safetensors",
)
"""The files of a transformers model that determine its output."""

_HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
_READ_BYTES = 1 << 22


@dataclass(frozen=True, kw_only=True)
class ResolvedWeights:
    """Weights that lie on this machine.

    Attributes:
        folder: where they lie, absolute.
        source: the hub's `ORG/NAME`, or empty for a local folder.
        revision: the hub's commit hash, or empty for a local folder.
        shipped: the name of weights that come with the package, or empty.
    """

    folder: Path
    source: str = ""
    revision: str = ""
    shipped: str = ""

    @property
    def argument(self) -> str:
        """Names the very same weights again, shipped ones on every machine: a name, `ORG/NAME@COMMIT`, or a folder."""
        return self.shipped or (f"{self.source}@{self.revision}" if self.source else str(self.folder))

    @property
    def origin(self) -> str:
        """For a fingerprint: a shipped name, `ORG/NAME@COMMIT`, or `local folder`, wherever that lies."""
        return self.argument if self.source or self.shipped else "local folder"


def resolve_folder(argument: str, *, patterns: tuple[str, ...] = HUB_FORMAT) -> ResolvedWeights:
    """A folder with the weights that `argument` names, downloaded if need be.

    An existing folder wins over a hub id of the same name. HF_HUB_OFFLINE, HF_HUB_CACHE, HF_ENDPOINT and HF_TOKEN
    count as everywhere. A branch or tag is resolved to its commit once; nothing but `patterns` is downloaded.

    Args:
        argument: `FOLDER` or `ORG/NAME[@REV]`.
        patterns: file names that are needed, as globs.

    Raises:
        RequestError: neither a folder nor a hub id.
        TeacherError: not found, gated, unreachable, or without safetensors.
    """
    if not argument:
        raise RequestError("no weights named; write KIND:FOLDER or KIND:ORG/NAME[@REV]")
    folder = Path(argument).expanduser()
    if folder.is_dir():
        return _with_safetensors(ResolvedWeights(folder=folder.resolve()), argument)
    match = _HUB_ID.fullmatch(argument)
    if match is None or argument.startswith((".", "/", "~")):
        raise RequestError(f"weights {argument!r}: there is no such folder, and it is not ORG/NAME[@REV] of the hub")
    downloaded = _download(match["id"], match["revision"], patterns)
    # The hub's cache keeps a snapshot under its commit hash, whatever branch or tag was asked for.
    return _with_safetensors(ResolvedWeights(folder=downloaded, source=match["id"], revision=downloaded.name), argument)


def _with_safetensors(weights: ResolvedWeights, argument: str) -> ResolvedWeights:
    if not any(weights.folder.glob("*.safetensors")):
        raise TeacherError(
            f"weights {argument!r} hold no *.safetensors in {weights.folder}; pickled weights are never loaded: "
            "save them again with save_pretrained"
        )
    return weights


def _download(name: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import errors, snapshot_download

    asked = f"{name}@{revision}" if revision else name
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except errors.GatedRepoError:
        raise TeacherError(f"weights {asked} are gated: accept their licence on the hub and set HF_TOKEN") from None
    except errors.RepositoryNotFoundError:
        raise TeacherError(f"weights {asked} are not on the hub, or are private: check the name, or HF_TOKEN") from None
    except errors.RevisionNotFoundError:
        raise TeacherError(f"weights {name} have no revision {revision!r}; name a branch, tag or commit") from None
    except errors.LocalEntryNotFoundError:
        raise TeacherError(
            f"weights {asked} are not in the local hub cache, and the hub is offline or out of reach; "
            "download them once with a connection, or name a local folder"
        ) from None
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise TeacherError(f"weights {asked} cannot be fetched: {one_line(error)}") from None


def weights_digest(folder: Path, *, patterns: tuple[str, ...] = HUB_FORMAT) -> str:
    """SHA-256, hex, over the names, sizes and contents of the folder's files that match `patterns`, in name order.

    Raises:
        TeacherError: no file matches, or one cannot be read.
    """
    files = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    if not files:
        raise TeacherError(f"no file of {', '.join(patterns)} in {folder}")
    total = hashlib.sha256()
    for path in files:
        total.update(f"{path.relative_to(folder).as_posix()}\0{file_digest(path)}\n".encode())
    return total.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256, hex, of one file.

    Raises:
        TeacherError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(_READ_BYTES):
                digest.update(block)
    except OSError as error:
        raise TeacherError(f"cannot read weights {path}: {error.strerror}") from None
    return digest.hexdigest()


def read_json(folder: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """The first of these JSON files that the folder has.

    Raises:
        TeacherError: none is there, or it is no JSON object.
    """
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise TeacherError(f"{folder} has no {' or '.join(names)}; save the model and its processor there again")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TeacherError(f"cannot read {path}: {error}") from None
    if not isinstance(content, dict):
        raise TeacherError(f"{path} is not a JSON object")
    return content


def load_pretrained(
    model_class: Any, folder: Path, device: str, *, attention: str | dict[str, str] = "sdpa"
) -> "torch.nn.Module":
    """A transformers model from safetensors, in float32, every weight present, ready for inference.

    Args:
        model_class: the class itself, never an Auto class, so no code of the repository can run.
        folder: config.json and safetensors.
        device: `cpu` or `cuda:0`.
        attention: transformers' attn_implementation, by sub-config if it is a dict. Always given, since a config.json
            may name one that would be fetched from the hub as compiled code.

    Raises:
        TeacherError: weights are missing or damaged, of another architecture, or the device is not there.
    """
    import torch

    try:
        with _no_progress_bar():
            model, loading = model_class.from_pretrained(
                folder,
                dtype=torch.float32,
                attn_implementation=attention,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
        missing = sorted(loading["missing_keys"])
        if missing:
            raise TeacherError(f"{folder} lacks {len(missing)} weights of {model_class.__name__}, such as {missing[0]}")
        module: torch.nn.Module = model.eval().requires_grad_(False).to(device)
    except TeacherError:
        raise
    except Exception as error:  # a damaged file fails in many libraries' own ways
        reason = one_line(error)
        raise TeacherError(f"cannot load {folder} as {model_class.__name__} on {device}: {reason}") from error
    return module


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def library_version(package: str) -> str:
    """A package's public version, without the build's local part such as `+cu132`."""
    return version(package).partition("+")[0]


class HubTeacher(Teacher):
    """What teachers made of a transformers model share; a subclass adds targets, `_load` and `predict`.

    Class attributes:
        kind: the entry point's name.
        model_type: what `config.json` must say.
        code_version: raised whenever the same weights would give other numbers.
        processor_files: where the processor's settings may lie, best first.
        choices: the options, as for `take_options`.
    """

    kind: ClassVar[str]
    model_type: ClassVar[str]
    code_version: ClassVar[str]
    processor_files: ClassVar[tuple[str, ...]]
    choices: ClassVar[Mapping[str, tuple[str, ...]]]

    def __init__(self, argument: str, options: Mapping[str, str]) -> None:
        self._argument = argument
        self._options = dict(options)
        self._loaded: torch.nn.Module | None = None
        self._device = "cpu"

    @classmethod
    def from_spec(cls, argument: str, options: Mapping[str, str]) -> Self:
        """Build from `KIND:ORG/NAME[@REV]` or `KIND:FOLDER`, with options."""
        if not argument:
            raise RequestError(f"teacher {cls.kind!r} needs weights: {cls.kind}:ORG/NAME[@REV] or {cls.kind}:FOLDER")
        return cls(argument, take_options(cls.kind, options, cls.choices))

    @cached_property
    def weights(self) -> ResolvedWeights:
        """Where the weights lie, downloaded when first asked for."""
        return resolve_folder(self._argument, patterns=TRANSFORMERS_FILES)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The model's config.json, of the right model type."""
        config = read_json(self.weights.folder, ("config.json",))
        if config.get("model_type") != self.model_type:
            raise TeacherError(
                f"{self.weights.argument} is a {config.get('model_type')!r} model; "
                f"teacher {self.kind!r} needs {self.model_type!r}"
            )
        return config

    @cached_property
    def processor(self) -> dict[str, Any]:
        """The settings of the model's own processor."""
        return read_json(self.weights.folder, self.processor_files)

    def resolved_spec(self) -> tuple[str, dict[str, str]]:
        """The commit hash or absolute folder, and every option."""
        return self.weights.argument, dict(self._options)

    def fingerprint(self) -> dict[str, str]:
        """Origin and digest of the weights, processor, options, library and code versions."""
        return {
            "model_type": str(self.config["model_type"]),
            "weights": self.weights.origin,
            "weights_sha256": self._digest,
            "processor": json.dumps(self.processor, sort_keys=True),
            "torch": library_version("torch"),
            "transformers": library_version("transformers"),
            "code": self.code_version,
        } | self.resolved_spec()[1]

    @cached_property
    def _digest(self) -> str:
        return weights_digest(self.weights.folder, patterns=TRANSFORMERS_FILES)

    @property
    def _model(self) -> Any:
        if self._loaded is None:
            raise TeacherError(f"{self.kind}: predict was called before setup or after close")
        return self._loaded

    def close(self) -> None:
        """Let go of the weights."""
        self._loaded = None
