"""Folders that are written whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from p4dprep.errors import RequestError, StorageError
from p4dprep.storage import one_line


def refuse_used(folder: Path) -> None:
    """Nothing is ever written over.

    Raises:
        RequestError: the folder holds something, or is none.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RequestError(f"{folder} exists and is not an empty folder; name a new one")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to write into; it takes that name in the end, and is deleted if anything fails.

    Raises:
        RequestError: `folder` holds something.
        StorageError: the disk refused.
    """
    folder = folder.absolute()
    refuse_used(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # what a killed process left
        partial.mkdir(parents=True)
        yield partial
        for path in partial.iterdir():
            path.chmod(partial.stat().st_mode & 0o666)  # safetensors lets its owner alone read a file
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        os.replace(partial, folder)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"cannot write {folder}: {one_line(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
