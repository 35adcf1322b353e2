"""Any history of several jobs, crashes and clean-ups on one cache leaves what was committed first, and nothing else.

TRUST.md, promise 4. A model of a few dictionaries runs beside the cache; after every step they must agree.
"""

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from p4dprep.cache import Cache, ClipResult, Group, ObjectRecord, gc, verify
from p4dprep.errors import MissingDataError, StorageError
from p4dprep.storage import Store
from tests.p4dprep.cache import faults
from tests.p4dprep.cache.builders import FINGERPRINT, LATENTS, MASK, SAMPLING, T, failed, make_corpus, write

NEVER = 10**9
NUM_JOBS = 3
MAX_CLIPS = 12
CLIPS_PER_UNIT = 2

jobs = st.sampled_from(range(NUM_JOBS))  # evenly, where integers() prefers 0
clips = st.sampled_from(range(MAX_CLIPS))
modes = st.sampled_from(faults.MODES)


@dataclass(kw_only=True)
class Job:
    """One process at work: its own view of the cache, and what it has written and not yet committed."""

    cache: Cache
    group: Group
    fuse: faults.Fuse
    pending: dict[int, ClipResult] = field(default_factory=dict)


class Cached(RuleBasedStateMachine):
    """The cache under test and the model.

    Attributes:
        num_clips: how many there are.
        committed: index to the objects that its first commit named.
        failed: index to its latest reason.
        values: key to bytes of every committed object, as first seen.
        onlooker: a view of the cache that is never opened again.
    """

    def __init__(self) -> None:
        super().__init__()
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.folder = tempfile.TemporaryDirectory(dir=memory)
        self.url = f"{self.folder.name}/cache"
        self.num_clips = 5
        self.committed: dict[int, tuple[ObjectRecord, ...]] = {}
        self.failed: dict[int, str] = {}
        self.values: dict[str, bytes] = {}
        self.num_reasons = 0
        self.torn = False
        self.store = Store(self.url)
        self.jobs = [self.start() for _ in range(NUM_JOBS)]
        self.onlooker = Cache.open(self.url)

    def teardown(self) -> None:
        self.folder.cleanup()

    def start(self) -> Job:
        """What every run of `extract` begins with; it also completes what a crash left half done."""
        fuse = faults.Fuse(NEVER, "raise")
        with pytest.MonkeyPatch.context() as patch:
            faults.install(patch, fuse)
            cache = Cache.create(self.url, SAMPLING, clips_per_unit=CLIPS_PER_UNIT)
        cache.extend(make_corpus(self.num_clips))
        return Job(cache=cache, group=cache.add_group("toy", "toy:x", FINGERPRINT, (MASK, LATENTS)), fuse=fuse)

    def expect(self, results: list[ClipResult]) -> None:
        """The model's commit: the first ok counts, then the latest reason."""
        for result in results:
            if result.index in self.committed:
                continue
            if result.status == "failed":
                self.failed[result.index] = result.reason
                continue
            self.failed.pop(result.index, None)
            self.committed[result.index] = result.objects
            self.values |= {item.key: self.store.get(item.key) for item in result.objects}

    def unit_of(self, job: Job, clip: int) -> list[ClipResult]:
        unit = clip // CLIPS_PER_UNIT
        return [job.pending.pop(index) for index in sorted(job.pending) if index // CLIPS_PER_UNIT == unit]

    @rule(number=jobs)
    def start_again(self, number: int) -> None:
        self.jobs[number] = self.start()

    @precondition(lambda self: self.num_clips < MAX_CLIPS)
    @rule(number=jobs, more=st.integers(0, 2))
    def extend(self, number: int, more: int) -> None:
        self.num_clips = min(MAX_CLIPS, self.num_clips + more)
        indices = self.jobs[number].cache.extend(make_corpus(self.num_clips))
        assert indices.tolist() == list(range(self.num_clips))

    @rule(number=jobs, clip=clips)
    def write_clip(self, number: int, clip: int) -> None:
        """By a teacher that never says the same twice; done again it is a retry, or useless work."""
        clip %= self.num_clips
        self.jobs[number].pending[clip] = write(self.jobs[number].group, clip, noise=0.1)

    @rule(number=jobs, clip=clips)
    def commit(self, number: int, clip: int) -> None:
        results = self.unit_of(self.jobs[number], clip)
        self.jobs[number].group.commit(clip // CLIPS_PER_UNIT, results)
        self.expect(results)

    @rule(number=jobs, clip=clips)
    def write_and_commit(self, number: int, clip: int) -> None:
        self.write_clip(number, clip)
        self.commit(number, clip % self.num_clips)

    @rule(number=jobs, clip=clips)
    def record_a_failure(self, number: int, clip: int) -> None:
        clip %= self.num_clips
        self.num_reasons += 1
        results = [failed(clip, f"reason {self.num_reasons}")]
        self.jobs[number].group.commit(clip // CLIPS_PER_UNIT, results)
        self.expect(results)

    @rule(number=jobs, clip=clips, at=st.sampled_from(range(5)), mode=modes)
    def crash_in_a_commit(self, number: int, clip: int, at: int, mode: faults.Mode) -> None:
        """It stands or it does not, whole; which of the two only the ledger can tell."""
        job, clip = self.jobs[number], clip % self.num_clips
        if clip not in job.pending:
            self.write_clip(number, clip)
        results = self.unit_of(job, clip)
        if not self.survives(number, lambda: job.group.commit(clip // CLIPS_PER_UNIT, results), at, mode):
            ok = self.jobs[number].group.states().ok
            results = [result for result in results if ok[result.index]]
        self.expect(results)

    @rule(number=jobs, heir=jobs, clip=clips, at=st.sampled_from(range(5)), mode=modes)
    def crash_in_a_write(self, number: int, heir: int, clip: int, at: int, mode: faults.Mode) -> None:
        clip %= self.num_clips
        self.survives(number, lambda: write(self.jobs[number].group, clip, noise=0.1), at, mode)
        self.write_clip(heir, clip)

    @precondition(lambda self: self.num_clips < MAX_CLIPS)
    @rule(number=jobs, at=st.sampled_from(range(20)), mode=modes)
    def crash_in_an_extend(self, number: int, at: int, mode: faults.Mode) -> None:
        self.num_clips += 1
        self.survives(number, lambda: self.jobs[number].cache.extend(make_corpus(self.num_clips)), at, mode)

    def survives(self, number: int, action: Callable[[], Any], at: int, mode: faults.Mode) -> bool:
        """Run an action whose `at`-th storage operation fails; False if it came so far, and a new job took over."""
        fuse = self.jobs[number].fuse
        fuse.at, fuse.mode, fuse.count = at, mode, 0
        try:
            action()
        except (faults.Died, StorageError):
            note(f"failed at operation {at}: {mode}")
            self.torn |= mode == "torn write"
            self.jobs[number] = self.start()
            return False
        fuse.at = NEVER
        return True

    @rule(number=jobs)
    def list_garbage(self, number: int) -> None:
        report = gc(self.jobs[number].cache, delete=False, min_age_seconds=0)
        assert not report.unreferenced.keys() & self.values.keys()
        assert not report.deleted

    @rule(number=jobs)
    def collect_no_young_garbage(self, number: int) -> None:
        assert gc(self.jobs[number].cache, delete=True).unreferenced == {}

    @rule(number=jobs)
    def collect_garbage(self, number: int) -> None:
        """While no job writes: what they have not committed is lost to them."""
        for job in self.jobs:
            job.pending.clear()
        gc(self.jobs[number].cache, delete=True, min_age_seconds=0)
        assert gc(self.jobs[number].cache, delete=False, min_age_seconds=0).unreferenced == {}

    @rule(number=jobs, clip=clips)
    def read(self, number: int, clip: int) -> None:
        group = self.jobs[number].group
        if clip not in self.committed:
            with pytest.raises(MissingDataError, match=r"was never committed|failed: reason \d"):
                group.read(clip, "tap2")
            return
        assert group.read_time(clip, verify=True).shape == (T,)
        for array in group.target_arrays("tap2"):
            if array.key(clip) in self.values:
                wanted = array.decode(self.values[array.key(clip)])
                np.testing.assert_array_equal(array.read(self.store, clip, len(self.values[array.key(clip)])), wanted)
        assert np.isfinite(group.read(clip, "tap2", verify=True).astype(np.float32)).all()

    @invariant()
    def nothing_committed_has_changed(self) -> None:
        for key, data in self.values.items():
            assert self.store.get(key) == data, key

    @invariant()
    def every_job_sees_what_the_model_sees(self) -> None:
        for job in self.jobs:
            states = job.group.states()
            assert np.flatnonzero(states.ok).tolist() == sorted(self.committed)
            assert {index: reason for index, (_, reason) in states.reasons.items()} == self.failed
            assert len(states.ok) == self.num_clips == job.cache.num_clips
            for index, objects in self.committed.items():
                assert states.objects(index) == objects

    @invariant()
    def verify_is_clean(self) -> None:
        report = verify(self.onlooker)
        assert [problem for problem in report.problems if not (self.torn and problem.kind == "torn record")] == []
        assert report.num_objects == len(self.values)


def run(num_histories: int, num_steps: int, derandomize: bool) -> None:
    profile = settings(
        max_examples=num_histories,
        stateful_step_count=num_steps,
        derandomize=derandomize,
        phases=(Phase.generate,) if derandomize else (Phase.generate, Phase.shrink),  # shrinking takes minutes
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(Cached, settings=profile)  # type: ignore[no-untyped-call]


def test_any_history_leaves_what_was_committed_first() -> None:
    run(num_histories=30, num_steps=40, derandomize=True)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_hundred_histories_of_75_steps_leave_what_was_committed_first() -> None:
    run(num_histories=200, num_steps=75, derandomize=False)
