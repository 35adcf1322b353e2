"""Weights in the hub's own format: a local folder or `ORG/NAME[@REV]`, as safetensors, pinned and digested."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from p4dprep.errors import RequestError, TeacherError
from p4dprep.storage import redact

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
    """

    folder: Path
    source: str = ""
    revision: str = ""

    @property
    def argument(self) -> str:
        """Names the very same weights again: `ORG/NAME@COMMIT` or the absolute folder."""
        return f"{self.source}@{self.revision}" if self.source else str(self.folder)

    @property
    def origin(self) -> str:
        """For a fingerprint: `ORG/NAME@COMMIT`, or `local folder`, wherever that lies."""
        return self.argument if self.source else "local folder"


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
        first_line = redact(str(error)).strip().partition("\n")[0]
        raise TeacherError(f"weights {asked} cannot be fetched: {type(error).__name__}: {first_line}") from None


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
