"""What all commands share: data on stdout, talk on stderr, and the options that several take."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from p4dprep.errors import RequestError

console = Console(stderr=True, soft_wrap=True)
"""Talk: everything that is not the answer itself."""


def parse_storage_options(text: str) -> dict[str, Any]:
    """The fsspec options in a JSON object.

    Raises:
        typer.BadParameter: it is not a JSON object. The text, which may hold a secret, is not repeated; of a
            ValueError (and so of a P4DError) click would repeat it.
    """
    try:
        options = json.loads(text)
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise typer.BadParameter('it must be a JSON object, such as {"endpoint_url": "https://HOST"}')
    return options


CacheArgument = Annotated[str, typer.Argument(metavar="CACHE", help="Folder or URL of the cache.", show_default=False)]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
StorageOptions = Annotated[
    dict[str, Any] | None,
    typer.Option(
        parser=parse_storage_options,
        envvar="P4DPREP_STORAGE_OPTIONS",
        show_envvar=True,
        metavar="JSON",
        help="Options for fsspec as a JSON object, e.g. endpoint and credentials of a bucket. Kept nowhere.",
    ),
]


def _plain(value: object) -> object:
    """A value as JSON knows it; NaN and infinity, which JSON lacks, become null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def print_json(value: object) -> None:
    """Print one JSON object on stdout. Dataclasses, mappings, arrays and paths are welcome.

    Raises:
        TypeError: something in it has no JSON form.
    """
    typer.echo(json.dumps(_plain(value), indent=2, allow_nan=False))


def read_yaml(path: Path) -> dict[str, Any]:
    """A `--config` file: field names with underscores, hyphens welcome.

    Raises:
        RequestError: it cannot be read, or holds no fields.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RequestError(f"cannot read --config {path}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise RequestError(f"--config {path} must hold fields such as `source: videos/`, not {type(values).__name__}")
    return {key.replace("-", "_"): value for key, value in values.items()}


def printable(text: str) -> str:
    """Text for a terminal: control characters, which a file name may hold to play tricks, become `?`."""
    return "".join(character if character.isprintable() else "?" for character in text)


def human_bytes(num_bytes: float) -> str:
    """Bytes for people, in binary units: `1.4 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} PiB"


def human_seconds(seconds: float) -> str:
    """A duration for people: `0.4 s`, `12 s`, `3 min 20 s`, `5 h 07 min`, `4 d 2 h`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def progress_bar() -> Progress:
    """A bar on stderr with count, elapsed and remaining time; gone when done."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
