"""The Ray job: actors hold the teachers, the driver hands out units and counts what comes back.

Only unit tasks and unit reports travel through Ray; frames and targets never do.
"""

import logging
import os
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import ray
import tenacity
from ray._private import ray_constants
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayTaskError, WorkerCrashedError

from p4dprep.cache import ClipResult
from p4dprep.errors import P4DError, RequestError, TeacherError
from p4dprep.extract.plan import GroupPlan, JobPlan
from p4dprep.extract.worker import UnitReport, UnitTask, Worker, WorkerConfig
from p4dprep.storage import redact

log = logging.getLogger(__name__)

MIN_UNITS_IN_FLIGHT, MAX_UNITS_IN_FLIGHT = 2, 8
"""Units an actor holds at once, each with a decoder of its own: while one infers, the next ones decode."""
MAX_DEATHS_OF_A_CLIP = 3
MAX_DEATHS_IN_SETUP = 3
NUM_RAY_STARTS = 3
_REACH_SECONDS = 10.0
OBJECT_STORE_BYTES = 100 * 2**20
"""Ray's object store holds ids and small records only."""

_DEATHS = (ActorDiedError, ActorUnavailableError, RayActorError, WorkerCrashedError)


@dataclass(kw_only=True)
class GroupProgress:
    """How far one teacher is. `failures` counts clips by kind of failure; `stage_seconds` are busy seconds."""

    name: str
    num_todo: int
    num_ok: int = 0
    num_failed: int = 0
    num_frames: int = 0
    num_bytes: int = 0
    num_workers: int = 0
    num_deaths: int = 0
    failed: dict[int, tuple[str, str]] = field(default_factory=dict)
    stage_seconds: dict[str, float] = field(default_factory=dict)

    def add(self, report: UnitReport) -> None:
        """Count a unit in."""
        self.num_ok += len(report.ok)
        self.num_failed += len(report.failed)
        self.num_frames += report.num_frames
        self.num_bytes += report.num_bytes
        self.failed |= report.failed
        for stage, seconds in report.stage_seconds.items():
            self.stage_seconds[stage] = self.stage_seconds.get(stage, 0.0) + seconds


Progress = Callable[[list[GroupProgress]], None]


class _Actor:
    """A worker behind Ray. Building it is cheap; `setup` loads the teacher, so that its errors arrive typed."""

    def __init__(self, config: WorkerConfig) -> None:
        self._config = config
        self._worker: Worker | None = None

    def setup(self) -> None:
        self._worker = Worker(self._config)

    def run(self, task: UnitTask) -> UnitReport:
        if self._worker is None:
            raise TeacherError(f"{task.group}: the worker was not set up")
        return self._worker.run(task)


@dataclass(kw_only=True)
class _Slot:
    """One actor and what it holds."""

    actor: Any
    ready: bool = False
    tasks: dict[Any, UnitTask] = field(default_factory=dict)

    @property
    def has_suspect(self) -> bool:
        return any(task.num_deaths for task in self.tasks.values())


class _GroupRun:
    """The units, actors and counts of one teacher."""

    def __init__(self, plan: JobPlan, group: GroupPlan, num_workers: int, units_in_flight: int) -> None:
        self.group = group
        self.cache = plan.cache
        self.units_in_flight = units_in_flight
        self.progress = GroupProgress(name=group.config.group, num_todo=len(group.todo), num_workers=num_workers)
        self._fresh: Iterator[UnitTask] = plan.tasks(group)
        self._num_fresh = plan.num_units(group)
        self._next: UnitTask | None = next(self._fresh, None)
        self._suspects: deque[UnitTask] = deque()
        self._slots = [_Slot(actor=None) for _ in range(num_workers if self._next else 0)]
        self._setup_deaths = 0

    def start(self) -> None:
        for slot in self._slots:
            self._start_actor(slot)

    @property
    def finished(self) -> bool:
        return self._next is None and not self._suspects and not any(slot.tasks for slot in self._slots if slot.ready)

    def refs(self) -> dict[Any, _Slot]:
        return {ref: slot for slot in self._slots for ref in slot.tasks}

    def grow(self, num_workers: int) -> None:
        """Start more actors, up to so many in all, if there are units for them that nobody has yet."""
        for _ in range(min(num_workers - len(self._slots), self._num_fresh)):
            self._slots.append(slot := _Slot(actor=None))
            self._start_actor(slot)
        self.progress.num_workers = max(self.progress.num_workers, len(self._slots))

    def stop(self) -> None:
        """Kill the actors: their decoders die with them and the CPUs and GPUs are free for another teacher."""
        for slot in self._slots:
            if slot.actor is not None:
                ray.kill(slot.actor)
        self._slots = []

    def feed(self) -> None:
        """Hand out units. A unit that a worker died with goes alone to an idle worker, so that if it kills again
        it kills no neighbour."""
        for slot in self._slots:
            while slot.ready and len(slot.tasks) < self.units_in_flight and not slot.has_suspect:
                if self._suspects and not slot.tasks:
                    task = self._suspects.popleft()
                elif self._next is not None:
                    task, self._next = self._next, next(self._fresh, None)
                    self._num_fresh -= 1
                else:
                    break
                slot.tasks[slot.actor.run.remote(task)] = task

    def collect(self, ref: Any, slot: _Slot) -> None:
        """Take one finished call.

        Raises:
            P4DError: what the worker raised, or its teacher cannot be set up.
        """
        task = slot.tasks.pop(ref)
        try:
            result = ray.get(ref)
        except RayTaskError as error:
            raise _unwrapped(error, self.progress.name) from error
        except _DEATHS as error:
            self._replace_dead(slot, task, error)
            return
        if result is None:
            slot.ready, self._setup_deaths = True, 0
        else:
            self.progress.add(result)

    def _start_actor(self, slot: _Slot) -> None:
        resources = self.group.config.resources
        actor_class = ray.remote(
            num_cpus=resources.num_cpus,
            num_gpus=resources.num_gpus,
            max_concurrency=self.units_in_flight + 1,
            max_restarts=0,
        )(_Actor)
        slot.actor, slot.ready = actor_class.remote(self.group.config), False
        slot.tasks = {slot.actor.setup.remote(): UnitTask(group=self.progress.name, unit=-1, clips=())}

    def _replace_dead(self, slot: _Slot, task: UnitTask, error: Exception) -> None:
        lost = [task, *slot.tasks.values()]
        self.progress.num_deaths += 1
        log.warning("a worker of %s died: %s", self.progress.name, str(error).splitlines()[0])
        if not slot.ready:
            self._setup_deaths += 1
            if self._setup_deaths >= MAX_DEATHS_IN_SETUP:
                last_line = redact(str(error)).strip().splitlines()[-1][:300]
                raise TeacherError(
                    f"workers of {self.progress.name} died {MAX_DEATHS_IN_SETUP} times in a row while loading the "
                    f"teacher; is there enough memory? (p4dprep doctor) Ray says: {last_line}"
                ) from error
        for unit in lost:
            if unit.clips:
                self._requeue(replace(unit, num_deaths=unit.num_deaths + 1))
        ray.kill(slot.actor)  # a node that only lost its network may still run it
        self._start_actor(slot)

    def _requeue(self, task: UnitTask) -> None:
        """Try again; from the second death on clip by clip, and a clip that keeps killing is recorded as failed."""
        if task.num_deaths >= MAX_DEATHS_OF_A_CLIP and len(task.clips) == 1:
            self._give_up(task)
        elif task.num_deaths >= 2:
            self._suspects.extend(replace(task, clips=(clip,)) for clip in task.clips)
        else:
            self._suspects.append(task)

    def _give_up(self, task: UnitTask) -> None:
        clip = task.clips[0]
        reason = (
            f"the worker died {task.num_deaths} times with this clip in hand (out of memory, or a crash in a library)"
        )
        result = ClipResult(index=clip.index, id=clip.id, status="failed", failure="worker_died", reason=reason)
        self.cache.group(task.group).commit(task.unit, [result])
        self.progress.num_failed += 1
        self.progress.failed[clip.index] = ("worker_died", reason)


def _unwrapped(error: RayTaskError, name: str) -> Exception:
    """The worker's own error if it is one of ours, else one that says where it came from."""
    cause = error.cause
    if isinstance(cause, P4DError):
        return cause
    return TeacherError(f"a worker of {name} failed: {type(cause).__name__}: {cause}")


def start_ray(address: str | None) -> None:
    """Join a cluster, or start Ray on this machine: loopback only, no dashboard, no usage report.

    Raises:
        RequestError: no cluster answers at the address, or this machine is too busy to start Ray.
    """
    if not ray.is_initialized():
        with _own_sigterm():
            _start_ray(address)


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Leave a program's answer to SIGTERM as it is: Ray's ends it with a trace of its own, by SIGABRT."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _start_ray(address: str | None) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # a worker without GPUs is nothing to warn of
    if address is None:
        _stay_on_loopback()
        _start_local_ray()
        return
    _check_reachable(address)
    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        hint = "a cluster with token authentication needs RAY_AUTH_MODE=token here, or --address auto on its node"
        raise RequestError(f"cannot join Ray at {address}: {str(error).splitlines()[0]} ({hint})") from None


def _check_reachable(address: str) -> None:
    """Refuse a HOST:PORT where nothing listens, which Ray would try for minutes; other addresses are Ray's to read."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), _REACH_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise RequestError(
            f"cannot join Ray at {address}: nothing answers there ({error}); is the cluster up?"
        ) from None


def _start_local_ray() -> None:
    """Start Ray here. Ray gives its own processes 30 seconds to come up, which a busy machine may miss once."""
    busy = "timed out during startup"
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_message(match=f".*{busy}"),
        stop=tenacity.stop_after_attempt(NUM_RAY_STARTS),
        before_sleep=lambda _: ray.shutdown(),
        reraise=True,
    )
    try:
        retrying(
            ray.init,
            address="local",  # without it, Ray joins whatever cluster was last started on this machine
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    except Exception as error:
        if busy not in str(error):
            raise
        raise RequestError(
            f"Ray did not start on this machine in {NUM_RAY_STARTS} attempts of 30 seconds: the machine is too busy; "
            "try again later, or join a running Ray with --address"
        ) from None


def _stay_on_loopback() -> None:
    """Keep a local Ray off the network: without a cluster nobody else needs its ports, which run any code they are
    sent. Ray has this switch for desktop systems; the variable is for the processes it starts, the constant was read
    from it when ray was imported here."""
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False


def _num_workers(group: GroupPlan, num_groups: int, num_units: int, address: str | None) -> int:
    """As asked, else as many as the GPUs or CPUs carry, shared among the teachers; never more than units.

    Raises:
        RequestError: this machine has no such GPU.
    """
    resources, have = group.config.resources, ray.cluster_resources()
    num_gpus = have.get("GPU", 0.0)
    share = resources.num_gpus or 0.0
    if share > num_gpus and address is None:
        raise RequestError(f"{group.config.group} asks for {share:g} GPU a worker; Ray sees {num_gpus:g} here")
    if group.num_workers is not None:
        return min(group.num_workers, num_units)
    by_cpu = have.get("CPU", 1.0) / max(resources.num_cpus, 0.01) / num_groups
    by_gpu = num_gpus / share if share else by_cpu
    return min(max(1, int(min(by_cpu, by_gpu))), num_units)


def _units_in_flight(num_workers: int) -> int:
    """As many decoders per worker as there are CPUs for each: decoding must not keep a GPU waiting."""
    cpus_per_worker = int(ray.cluster_resources().get("CPU", 1.0) / max(1, num_workers))
    return max(MIN_UNITS_IN_FLIGHT, min(MAX_UNITS_IN_FLIGHT, cpus_per_worker))


def run_job(plan: JobPlan, address: str | None, progress: Progress) -> list[GroupProgress]:
    """Do all that the plan lists. Needs `start_ray` before.

    Args:
        plan: from `make_plan`.
        address: as given to `start_ray`.
        progress: called after every change, at least once a second.

    Raises:
        P4DError: a teacher cannot be set up, the cache cannot be written, or clips fail for no reason of their own.
            What was committed stays.
    """
    num_gpus = ray.cluster_resources().get("GPU", 0.0)
    waiting = [group.on(num_gpus) for group in plan.groups if len(group.todo)]
    num_workers = [_num_workers(group, len(waiting), plan.num_units(group), address) for group in waiting]
    in_flight = _units_in_flight(sum(num_workers))
    runs = [_GroupRun(plan, group, number, in_flight) for group, number in zip(waiting, num_workers, strict=True)]
    idle = [GroupProgress(name=group.config.group, num_todo=0) for group in plan.groups if not len(group.todo)]
    try:
        for run in runs:
            run.start()
        _drive(
            runs,
            lambda: progress([run.progress for run in runs] + idle),
            lambda run, num_groups: _num_workers(run.group, num_groups, plan.num_units(run.group), address),
        )
    finally:
        for run in runs:
            run.stop()
    return [run.progress for run in runs] + idle


def _drive(runs: list[_GroupRun], notify: Callable[[], None], workers_of: Callable[[_GroupRun, int], int]) -> None:
    """Feed and collect to the end; `workers_of` tells a teacher's share of the workers among so many teachers."""
    last_notified = 0.0
    while active := [run for run in runs if not run.finished]:
        for run in active:
            run.feed()
        owners = {ref: (run, slot) for run in active for ref, slot in run.refs().items()}
        done, _ = ray.wait(list(owners), num_returns=1, timeout=1.0)
        for ref in done:
            run, slot = owners[ref]
            run.collect(ref, slot)
            if run.finished:
                run.stop()
                still = [other for other in runs if not other.finished]
                for other in still:  # theirs now
                    other.grow(workers_of(other, len(still)))
        if done or time.monotonic() - last_notified >= 1.0:
            notify()
            last_notified = time.monotonic()
