"""`p4dprep doctor`: is this machine ready for a long run?"""

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import typer

from cli._output import JsonFlag, StorageOptions, console, human_bytes, print_json
from p4dprep.storage import Store, redact

CODECS = ("h264", "hevc", "vp9", "av1", "mpeg4", "prores")
MIN_FREE_BYTES = 10 * 2**30
MIN_SHM_BYTES = 2**30
SHARED_MEMORY = "/dev/shm"  # noqa: S108


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing looked at: what was found and, unless it is fine, what to do."""

    name: str
    state: Literal["ok", "warning", "failed"]
    found: str
    advice: str = ""


def doctor(
    urls: Annotated[list[str] | None, typer.Argument(help="Folders or URLs that you mean to read or write.")] = None,
    storage_options: StorageOptions = None,
    json: JsonFlag = False,
) -> None:
    """Check this machine before a long run: torch and CUDA, codecs, Ray, memory, disk, and credentials for URLs.

    **Examples**

        p4dprep doctor

        p4dprep doctor s3://bucket/videos s3://bucket/cache

    Exit code 0: ready (warnings may stand); 1: something would fail.
    """
    checks = [check for look in (_torch, _codecs, _memory, _disk, _ray) for check in _guarded(look)]
    for url in urls or []:
        checks += _guarded(partial(_url, url, storage_options or {}))
    if json:
        print_json({"ok": all(check.state != "failed" for check in checks), "checks": checks})
    else:
        _show(checks)
    if any(check.state == "failed" for check in checks):
        raise typer.Exit(1)


def _show(checks: Sequence[Check]) -> None:
    signs = {"ok": "[green]ok     [/]", "warning": "[yellow]warning[/]", "failed": "[red]failed [/]"}
    for check in checks:
        console.print(f"{signs[check.state]} [bold]{check.name}[/]: ", end="")
        console.print(check.found + (f" - {check.advice}" if check.advice else ""), markup=False, highlight=False)


def _guarded(look: Callable[[], Iterator[Check]]) -> list[Check]:
    """A check that itself breaks is a finding, not a crash."""
    found: list[Check] = []
    try:
        found.extend(look())
    except Exception as error:
        name = getattr(look, "__name__", "place").strip("_")
        found.append(Check(name=name, state="failed", found=redact(f"{type(error).__name__}: {error}")))
    return found


def _torch() -> Iterator[Check]:
    import torch

    python = f"Python {sys.version.split()[0]}, torch {torch.__version__}"
    yield Check(name="torch", state="ok", found=python)
    if not torch.cuda.is_available():
        advice = "teachers run on the CPU; fine for opencv-dis and tests, slow for large models"
        yield Check(name="cuda", state="warning", found="no GPU", advice=advice)
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        yield Check(name=f"cuda:{index}", state="ok", found=f"{name}, {human_bytes(free)} of {human_bytes(total)} free")


def _codecs() -> Iterator[Check]:
    import av
    from av.codec import codecs_available

    missing = [codec for codec in CODECS if codec not in codecs_available]
    found = f"PyAV {av.__version__}, FFmpeg {getattr(av, 'ffmpeg_version_info', 'unknown')}"
    if missing:
        yield Check(name="video", state="warning", found=f"{found} cannot decode {', '.join(missing)}")
    else:
        yield Check(name="video", state="ok", found=f"{found} decodes {', '.join(CODECS)}")


def _memory() -> Iterator[Check]:
    import psutil

    free = psutil.virtual_memory().available
    cpus = os.cpu_count() or 1
    found = f"{human_bytes(free)} free, {cpus} CPUs"
    low = free < cpus * 2 * 2**30
    advice = "plan 2 GiB per worker besides the teacher" if low else ""
    yield Check(name="memory", state="warning" if low else "ok", found=found, advice=advice)


def _disk() -> Iterator[Check]:
    places = (
        ("shared memory", SHARED_MEMORY, MIN_SHM_BYTES, "docker needs --shm-size=2g"),
        ("temporary files", tempfile.gettempdir(), MIN_FREE_BYTES, "set TMPDIR to a larger disk"),
    )
    for name, folder, least, advice in places:
        if os.path.isdir(folder):
            free = shutil.disk_usage(folder).free
            low = free < least
            found = f"{human_bytes(free)} free in {folder}"
            yield Check(name=name, state="warning" if low else "ok", found=found, advice=advice if low else "")


def _ray() -> Iterator[Check]:
    import ray

    from p4dprep.extract.job import start_ray

    start_ray(None)
    try:
        have = ray.cluster_resources()
        ray.get(ray.remote(num_cpus=1)(lambda: os.getpid()).remote(), timeout=60)
        found = (
            f"Ray {ray.__version__} starts and runs a task: {have.get('CPU', 0):g} CPUs, {have.get('GPU', 0):g} GPUs"
        )
        yield Check(name="ray", state="ok", found=found)
    finally:
        ray.shutdown()


def _url(url: str, storage_options: dict[str, Any]) -> Iterator[Check]:
    """Whether a place can be listed and written; the probe object is removed again."""
    name = redact(url)
    store = Store(url, storage_options)
    try:
        present = store.filesystem.exists(store.root)
    except Exception as error:
        advice = "check the credentials in the environment or --storage-options"
        yield Check(name=name, state="failed", found=redact(f"{type(error).__name__}: {error}"), advice=advice)
        return
    yield Check(name=name, state="ok", found="reachable" if present else "nothing there yet")
    if store.is_local and not present:
        return
    key = f".p4dprep-doctor-{os.urandom(6).hex()}"
    try:
        store.put_if_absent(key, b"p4dprep doctor")
        exclusive = not store.put_if_absent(key, b"another")
    except OSError as error:
        yield Check(name=name, state="warning", found=f"not writable: {redact(str(error))}", advice="fine for a source")
        return
    finally:
        with contextlib.suppress(OSError):
            store.delete(key)
    found = "writable" + ("" if exclusive else ", but without conditional writes")
    advice = "" if exclusive else "never run two jobs on one cache at once"
    yield Check(name=name, state="ok" if exclusive else "warning", found=found, advice=advice)
