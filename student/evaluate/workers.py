"""Asking a benchmark's questions with Ray: each worker answers one shard into the folder that all of them share.

Only the request travels through Ray; answers go to the files of `student.evaluate.answers`, where a retry finds them.
"""

import logging
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from p4dprep.errors import P4DError, RequestError
from p4dprep.extract.job import start_ray
from p4dprep.storage import one_line
from student.evaluate.answers import AnswerRequest, Progress, answer, begin, put_together
from student.evaluate.result import Result, answer_files

log = logging.getLogger(__name__)

MAX_DEATHS_OF_A_SHARD = 3
"""How often a shard is given to another worker; what it had answered is not asked again."""

_LOCK_SECONDS = 120.0
"""A file system over the network frees the file lock of a machine that was lost after its lease, mostly 90 s."""

_POLL_SECONDS, _END_SECONDS = 0.5, 10.0


class WorkerFailedError(P4DError, RuntimeError):
    """A worker failed for a reason that is not ours, or was lost too often."""


def answer_with_workers(
    request: AnswerRequest,
    *,
    num_workers: int,
    address: str | None = None,
    gpus_per_worker: float | None = None,
    on_progress: Progress = lambda *_: None,
) -> Result:
    """Ask with Ray workers what was not asked yet, and put their answers together.

    Args:
        request: what; its data and results must lie where every machine has them under the same path.
        num_workers: shards; those for which no GPU or CPU is free wait for their turn.
        address: a Ray cluster to join; None starts Ray on this machine.
        gpus_per_worker: from 0 to 1; None is 1 where there are enough for all, else 0.
        on_progress: told how far all of them are together.

    Returns:
        The same as `answer` without a shard does.

    Raises:
        RequestError: as `answer`, or a shard was asked for, or there is no such GPU.
        WorkerFailedError: a worker failed, or was lost too often; what was answered stays.
        P4DError: as a worker raised it.
    """
    if request.shard is not None:
        raise RequestError("workers share all questions among them; leave --shard out, or --workers and --address")
    start_ray(address)
    num_gpus = _num_gpus(num_workers, address, gpus_per_worker)
    if request.dtype == "auto":  # told to all, so that a driver without a GPU agrees with workers that have one
        request = replace(request, dtype="bfloat16" if num_gpus else "float32")
    exam = begin(request)  # what is wrong with the request is said here, once, before workers start
    # The options may hold a secret; Ray shows what a task is given, but not what lies behind a reference.
    reference = [ray.put(_at_home(request))]
    task = _task(num_gpus)
    lines = _Lines(request.out)
    _answer_all(
        lambda number, wait_seconds: task.remote(reference, (number, num_workers), wait_seconds),
        num_workers,
        lambda: on_progress(min(lines.count(), len(exam.questions)), len(exam.questions)),
    )
    return put_together(exam)


def _num_gpus(num_workers: int, address: str | None, asked: float | None) -> float:
    """GPUs of a worker, as asked or as there are.

    Raises:
        RequestError: more than a worker can use, or than there are.
    """
    have = ray.cluster_resources().get("GPU", 0.0)
    if asked is None:
        return 1.0 if have >= num_workers else 0.0
    if asked > 1:
        raise RequestError(f"--gpus-per-worker {asked:g} is more than a student can use; say 1, or a share of one")
    if asked > have and address is None:
        raise RequestError(f"--gpus-per-worker {asked:g} is more than the {have:g} that Ray sees here")
    return asked


def _at_home(request: AnswerRequest) -> AnswerRequest:
    """The same request with absolute paths: workers start in folders of their own."""
    cache, is_folder = request.cache, Path(request.student).is_dir()
    return replace(
        request,
        student=str(Path(request.student).resolve()) if is_folder else request.student,
        data=request.data.resolve(),
        out=request.out.resolve(),
        cache=cache if cache is None or "://" in cache else str(Path(cache).resolve()),
    )


def _task(num_gpus: float) -> Any:
    """What Ray runs for a shard. Deaths are counted here, and a worker without a GPU of its own must see none."""
    hidden = {"runtime_env": {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}}
    return ray.remote(num_cpus=1, num_gpus=num_gpus, max_retries=0, **({} if num_gpus else hidden))(answer_shard)


def answer_shard(reference: list[Any], shard: tuple[int, int], wait_seconds: float) -> None:
    """What one Ray worker does; raises as `answer` does."""
    answer(replace(ray.get(reference[0]), shard=shard), wait_seconds=wait_seconds)


def _answer_all(start: Callable[[int, float], Any], num_shards: int, notify: Callable[[], None]) -> None:
    """Run all shards to their end, those of lost workers again."""
    running = {start(number, 0.0): number for number in range(num_shards)}
    deaths = Counter[int]()
    try:
        while running:
            notify()
            done, _ = ray.wait(list(running), timeout=_POLL_SECONDS)
            for reference in done:
                number = running.pop(reference)
                if _is_lost(reference, number, deaths):
                    running[start(number, _LOCK_SECONDS)] = number
        notify()
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
        if running:  # their files are free when they have ended
            ray.wait(list(running), num_returns=len(running), timeout=_END_SECONDS)


def _is_lost(reference: Any, number: int, deaths: Counter[int]) -> bool:
    """Whether a shard's worker died before its end.

    Raises:
        P4DError: the worker raised it.
        WorkerFailedError: it raised something else, or such workers died too often.
    """
    try:
        ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, P4DError):
            raise error.cause from error
        raise WorkerFailedError(f"the worker of shard {number} failed: {one_line(error.cause)}") from error
    except RayError as error:
        deaths[number] += 1
        log.warning("the worker of shard %d died: %s", number, one_line(error))
        if deaths[number] > MAX_DEATHS_OF_A_SHARD:
            raise WorkerFailedError(
                f"{deaths[number]} workers of shard {number} died, one after the other; is there enough memory? What "
                f"was answered stays, and the same command goes on from there. Ray says: {one_line(error)}"
            ) from error
        return True
    return False


class _Lines:
    """Counts the answers in a folder, reading only what was added since they were last counted."""

    def __init__(self, out: Path) -> None:
        self._out, self._num_lines = out, 0
        self._ends = Counter[Path]()

    def count(self) -> int:
        """Lines of all answer files; one that is half written does not count."""
        for path in answer_files(self._out):
            with suppress(FileNotFoundError), open(path, "rb") as file:  # a shard without questions removes its file
                file.seek(self._ends[path])
                for line in file:
                    if line.endswith(b"\n"):
                        self._ends[path] += len(line)
                        self._num_lines += 1
        return self._num_lines
