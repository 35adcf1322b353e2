"""Asking a benchmark's questions of a student, so that a run may be killed, go on, and be split over machines.

RESULTS/identity.json says what is asked of whom; RESULTS/answers-I-of-N.jsonl has a line for each answered question,
appended batch by batch. Which questions share a batch depends on the request alone, so a run that was killed and goes
on gives the same bytes as one that was not.
"""

import fcntl
import hashlib
import importlib.metadata
import json
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import tenacity

from p4dprep.cache import Cache
from p4dprep.errors import CacheError, FingerprintMismatchError, MissingDataError, RequestError
from p4dprep.video import decoder_version
from student.evaluate import registry
from student.evaluate.answerers import Answerer, Dtype, Source, device_and_dtype, find_source, open_answerer
from student.evaluate.benchmark import Benchmark, Parsed, Question
from student.evaluate.media import CachedClips, Loaded, MediaReader
from student.evaluate.result import IDENTITY, Result, answer_files, make_result, read_lines, write_result
from student.rivals import make_rival
from student.samples import StudentSample, Turn
from student.targets import cached_targets

_WINDOW_BATCHES = 32
"""Questions of similar length are looked for among so many batches, so that neighbours share the file cache."""

_LOCK_POLL_SECONDS = 0.5

_FREE_FIELDS = frozenset({"student", "versions"})
"""What may differ between the parts of one result: a name for the same weights, and the machines' software."""

Progress = Callable[[int, int], None]
"""Told of questions answered and asked, first of those that were answered before."""


@dataclass(frozen=True, kw_only=True)
class AnswerRequest:
    """What `p4dprep eval answers` is asked for.

    Attributes:
        student: a run's folder, a student's folder or `ORG/NAME`, `oracle` or `constant:LETTER`.
        revision, step: of a student of the hub; of a run's checkpoint.
        bench, mode, data: the benchmark, how it is asked (None: the official way), and its folder.
        out: the folder of results.
        num_frames, frame_size: of a video; a size of None is as `Source.frame_policy` says.
        cache: a rival's, with a teacher's latents of the benchmark's videos.
        tpe: on or off, whatever the student was trained with.
        dtype: of weights and computation.
        batch_size: questions answered at once; more are faster and take more memory.
        num_loaders: processes that decode videos.
        shard: (i, n) answers questions i, i + n, i + 2n, ... only and makes no result.
        seed: of guesses, where a benchmark's rule guesses, and of intervals.
        storage_options: passed to fsspec for the cache; never written anywhere.
    """

    student: str
    bench: str
    data: Path
    out: Path
    revision: str | None = None
    step: int | None = None
    mode: str | None = None
    num_frames: int = 16
    frame_size: tuple[int, int] | None = None
    cache: str | None = None
    tpe: bool | None = None
    dtype: Dtype = "auto"
    batch_size: int = 8
    num_loaders: int = 2
    shard: tuple[int, int] | None = None
    seed: int = 0
    storage_options: Mapping[str, Any] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.shard is not None and not 0 <= self.shard[0] < self.shard[1]:
            raise RequestError(f"shard {self.shard[0]}/{self.shard[1]} does not exist; shards are 0/N to N-1/N")
        if self.batch_size < 1 or self.num_loaders < 1 or self.seed < 0:
            raise RequestError("batch size and loaders must be at least 1, and the seed at least 0")

    @property
    def is_whole(self) -> bool:
        """Whether every question is asked, and a result made."""
        return self.shard is None or self.shard[1] == 1

    @property
    def file(self) -> Path:
        """Where the answers go."""
        number, count = self.shard or (0, 1)
        return self.out / f"answers-{number}-of-{count}.jsonl"


@dataclass(frozen=True, kw_only=True)
class Exam:
    """A request that was found possible, and whose folder of results is claimed; no weights are in memory.

    Attributes:
        request: as asked.
        benchmark, mode, questions: what is asked, and how.
        source, cache: of whom, and what a rival reads.
        identity: all that decides an answer, as identity.json holds it.
    """

    request: AnswerRequest
    benchmark: Benchmark
    mode: str
    questions: Sequence[Question]
    source: Source
    cache: Cache | None
    identity: Mapping[str, Any]


def answer(request: AnswerRequest, on_progress: Progress = lambda *_: None, wait_seconds: float = 0) -> Result | None:
    """Ask what was not asked yet; then, unless only a shard was asked for, put all shards together.

    Args:
        request: what.
        on_progress: told how far it is.
        wait_seconds: how long another process may still hold the answer file.

    Returns:
        The result, which is then also in result.json and table.md; None for a shard.

    Raises:
        RequestError: the request is wrong, or another process writes an answer file.
        FingerprintMismatchError: `out` holds answers to another request; the message names what differs.
        CorruptDataError: an answer file or a cache is damaged.
    """
    exam = begin(request)
    _ask(exam, on_progress, wait_seconds)
    return put_together(exam) if request.is_whole else None


def begin(request: AnswerRequest) -> Exam:
    """Look at all that was asked for, and claim the folder of results; raises as `answer` does."""
    benchmark = registry.find(request.bench)
    mode = request.mode or benchmark.modes[0]
    if mode not in benchmark.modes:
        raise RequestError(f"{request.bench} has no mode {mode!r}; it has {', '.join(benchmark.modes)}")
    questions = benchmark.read(request.data, mode)
    source = find_source(request.student, revision=request.revision, step=request.step, tpe=request.tpe)
    cache = source.open_cache(request.cache, request.storage_options)
    identity = _identity(request, benchmark, mode, questions, source, cache)
    _claim(request.out, identity)
    return Exam(
        request=request,
        benchmark=benchmark,
        mode=mode,
        questions=questions,
        source=source,
        cache=cache,
        identity=identity,
    )


def put_together(exam: Exam) -> Result:
    """The result of all shards' answers, written to result.json and table.md.

    Raises:
        RequestError: a question was not answered.
        CorruptDataError: an answer file is damaged.
    """
    result = make_result(exam.request.out, exam.benchmark, exam.questions, exam.identity)
    write_result(exam.request.out, result, exam.benchmark)
    return result


def _ask(exam: Exam, on_progress: Progress, wait_seconds: float) -> None:
    """Ask what the request's share still lacks, and append the answers to its file."""
    request = exam.request
    number, count = request.shard or (0, 1)
    with _appending(request.file, wait_seconds) as (file, done):
        elsewhere = _answered_elsewhere(request)
        asked = [question for question in exam.questions[number::count] if question.id not in elsewhere]
        done &= {question.id for question in asked}
        on_progress(len(done), len(asked))
        batches = [batch for batch in plan(asked, request.batch_size) if any(each.id not in done for each in batch)]
        for lines in _answers(exam, asked, batches) if batches else ():
            _append(file, [line for line in lines if line["id"] not in done])
            done |= {line["id"] for line in lines}
            on_progress(len(done), len(asked))


def _answers(
    exam: Exam, asked: Sequence[Question], batches: Sequence[Sequence[Question]]
) -> Iterator[list[dict[str, Any]]]:
    """Load who answers, and give the lines of each batch."""
    request, source = exam.request, exam.source
    answerer = open_answerer(
        source, exam.benchmark, exam.mode, dtype=request.dtype, seed=request.seed, cache=exam.cache
    )
    reader = _reader(request, source, exam.cache, asked)
    yield from _Asking(exam.benchmark, exam.mode, request.seed, answerer, reader).all(batches, request.num_loaders)


def _identity(
    request: AnswerRequest,
    benchmark: Benchmark,
    mode: str,
    questions: Sequence[Question],
    source: Source,
    cache: Cache | None,
) -> dict[str, Any]:
    """What is asked of whom and how; all of it that decides an answer must stay the same in one result."""
    policy = source.frame_policy(request.num_frames, request.frame_size)
    _, dtype = device_and_dtype(request.dtype)
    return {
        "bench": benchmark.name,
        "revision": _digest_of_files(benchmark.files(request.data), request.data),
        "mode": mode,
        "num_questions": len(questions),
        "student": source.name,
        "student_digest": source.digest,
        "step": source.step,
        "time_cue": source.time_cue,
        "num_frames": policy.num_frames,
        "frames": str(policy),
        "dtype": str(dtype).removeprefix("torch."),
        "num_tokens": benchmark.num_tokens,
        "generation": "greedy",
        "cache": None if cache is None else _cache_digest(source, cache),
        "seed": request.seed,
        "versions": {
            **{name: importlib.metadata.version(name) for name in ("p4dprep", "torch", "transformers")},
            "decoder": decoder_version(),
        },
    }


def _digest_of_files(paths: Sequence[Path], data: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(paths):
        name = path.relative_to(data) if path.is_relative_to(data) else path.name
        digest.update(f"{name}\0".encode())
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _rival_arrays(source: Source, cache: Cache) -> tuple[str, ...]:
    config = source.config
    if config is None or config.strategy == "p4d":
        return ()
    return make_rival(config.strategy, cache, hidden_size=1, targets=config.targets).targets


def _cache_digest(source: Source, cache: Cache) -> str:
    known = cached_targets(cache)
    groups = sorted({known[array].group for array in _rival_arrays(source, cache)})
    return " ".join(cache.group(name).fingerprint_digest for name in groups)


def _claim(out: Path, identity: Mapping[str, Any]) -> None:
    """Write down what the folder is for, or compare it with what was written; several shards may do so at once."""
    if out.exists() and not out.is_dir():
        raise RequestError(f"{out} is a file; name a folder for the results")
    out.mkdir(parents=True, exist_ok=True)
    path = out / IDENTITY
    foreign = [each.name for each in out.iterdir() if not each.name.startswith((".", "answers-", IDENTITY))]
    if foreign and not path.exists():
        raise RequestError(f"{out} holds {foreign[0]}, which is no result; name an empty folder")
    with tempfile.NamedTemporaryFile("w", dir=out, prefix=".identity-", encoding="utf-8") as file:
        file.write(json.dumps(identity, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
        with suppress(FileExistsError):
            os.link(file.name, path)  # whole or not at all, and never over another's
    before = json.loads(path.read_text(encoding="utf-8"))
    now = json.loads(json.dumps(identity))
    changed = [name for name in {**before, **now} if name not in _FREE_FIELDS and before.get(name) != now.get(name)]
    if changed:
        said = ", ".join(f"{name} {before.get(name)!r} (now {now.get(name)!r})" for name in changed)
        raise FingerprintMismatchError(f"{out} holds answers with {said}; ask for the same, or name another folder")


@contextmanager
def _appending(path: Path, wait_seconds: float) -> Iterator[tuple[IO[bytes], set[str]]]:
    """An answer file to append to, held by this process alone, and the ids in it; a torn last line is cut off."""
    patiently = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(OSError),
        wait=tenacity.wait_fixed(_LOCK_POLL_SECONDS),
        stop=tenacity.stop_after_delay(wait_seconds),
        reraise=True,
    )
    with open(path, "a+b") as file:
        try:
            patiently(fcntl.flock, file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RequestError(f"{path} is being written by another process; wait for it, or end it") from None
        file.seek(0)
        done, end = set(), 0
        for line, stop in read_lines(file, path):
            done.add(line["id"])
            end = stop
        file.truncate(end)
        yield file, done
        os.fsync(file.fileno())
        if path.stat().st_size == 0:
            path.unlink()


def _append(file: IO[bytes], lines: Sequence[Mapping[str, Any]]) -> None:
    file.write(b"".join(json.dumps(line, ensure_ascii=False).encode("utf-8", "replace") + b"\n" for line in lines))
    file.flush()


def _answered_elsewhere(request: AnswerRequest) -> set[str]:
    """Ids in the files of shards that were cut otherwise; those of the same cut hold other questions.

    Raises:
        RequestError: such a shard is still being answered.
    """
    found: set[str] = set()
    _, count = request.shard or (0, 1)
    for path in answer_files(request.out):
        if path.name.endswith(f"-of-{count}.jsonl"):
            continue
        with open(path, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                raise RequestError(
                    f"{path} is still being written; put the shards together when all have ended"
                ) from None
            found.update(line["id"] for line, _ in read_lines(file, path))
    return found


def _reader(request: AnswerRequest, source: Source, cache: Cache | None, asked: Sequence[Question]) -> MediaReader:
    policy, clips = source.frame_policy(request.num_frames, request.frame_size), None
    if cache is not None:
        if (expected := cache.sampling.num_frames) != policy.num_frames:
            raise RequestError(f"{request.cache} has clips of {expected} frames, and {source.name} must see the same; "
                               f"say --frames {expected}")  # fmt: skip
        videos = [question.shown.video for question in asked if question.shown.video is not None]
        clips = CachedClips(cache, _rival_arrays(source, cache), request.data, videos)
    return MediaReader(policy, clips, request.num_loaders)


def plan(questions: Sequence[Question], batch_size: int) -> list[list[Question]]:
    """Questions in batches: what is shown is alike in number, prompts are of similar length, videos stay near."""
    batches: list[list[Question]] = []
    window = _WINDOW_BATCHES * batch_size
    for start in range(0, len(questions), window):
        rows = sorted(questions[start : start + window], key=lambda each: (_kind(each), len(each.prompt)))
        for question in rows:
            last = batches[-1] if batches and question is not rows[0] else []
            if last and len(last) < batch_size and _kind(last[0]) == _kind(question):
                last.append(question)
            else:
                batches.append([question])
    return batches


def _kind(question: Question) -> tuple[bool, int]:
    """Some families batch neither videos with pictures nor videos of different length."""
    shown = question.shown
    return shown.video is not None, len(shown.frame_indices or ()) if shown.video else len(shown.images)


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """A batch: questions that can be asked, in order, with what the answerer takes, and why the others cannot."""

    questions: tuple[Question, ...]
    inputs: Any
    failures: Mapping[str, str]


class _Asking:
    """Loads, asks, parses and scores; the next batches are loaded while one is answered."""

    def __init__(self, benchmark: Benchmark, mode: str, seed: int, answerer: Answerer, reader: MediaReader) -> None:
        self._benchmark, self._mode, self._seed = benchmark, mode, seed
        self._answerer, self._reader = answerer, reader

    def all(self, batches: Sequence[Sequence[Question]], num_loaders: int) -> Iterator[list[dict[str, Any]]]:
        """The lines of each batch, in the batches' order."""
        with ExitStack() as stack:
            stack.callback(self._reader.close)
            pools = ThreadPoolExecutor(num_loaders), ThreadPoolExecutor(1)
            for pool in pools:
                stack.callback(pool.shutdown, cancel_futures=True)
            ahead: deque[Any] = deque()
            for batch in batches:
                ahead.append((batch, pools[1].submit(self._prepare, batch, pools[0])))
                if len(ahead) > 1:
                    yield self._lines(*ahead.popleft())
            while ahead:
                yield self._lines(*ahead.popleft())

    def _lines(self, batch: Sequence[Question], future: Any) -> list[dict[str, Any]]:
        made: _Prepared = future.result()
        replies: dict[str, str] = {}
        if made.questions:
            said = self._answerer.reply(made.inputs, self._benchmark.num_tokens)
            replies = {each.id: reply for each, reply in zip(made.questions, said, strict=True)}
        return [self._line(each, replies.get(each.id), made.failures.get(each.id, "")) for each in batch]

    def _line(self, question: Question, reply: str | None, failure: str) -> dict[str, Any]:
        """What is written down; a question that could not be asked scores 0."""
        parsed, score = Parsed(answer="", is_matched=False), 0.0
        if reply is not None:
            parsed = self._benchmark.parse(question, reply, self._mode, self._seed)
            score = float(self._benchmark.score(question, parsed))
        return {
            "id": question.id,
            "category": question.category,
            "prompt": question.prompt,
            "reply": reply,
            "answer": parsed.answer,
            "is_matched": parsed.is_matched,
            "truth": question.answer,
            "score": score,
            "tags": dict(question.tags),
            "options": list(question.options),
            "failure": failure,
        }

    def _prepare(self, batch: Sequence[Question], pool: ThreadPoolExecutor) -> _Prepared:
        failures: dict[str, str] = {}
        loaded = [each for each in pool.map(lambda question: self._load(question, failures), batch) if each]
        inputs: Any = None
        try:
            inputs = self._answerer.prepare(loaded) if loaded else None
        except RequestError:
            loaded = [each for each in loaded if self._can_ask(each, failures)]
            inputs = self._answerer.prepare(loaded) if loaded else None
        return _Prepared(questions=tuple(each.question for each in loaded), inputs=inputs, failures=failures)

    def _load(self, question: Question, failures: dict[str, str]) -> Loaded | None:
        if not self._answerer.needs_media:
            turns = (Turn(role="user", text=question.prompt),)
            return Loaded(question=question, sample=StudentSample(id=question.id, conversation=turns))
        try:
            return self._reader.load(question)
        except (ValueError, MissingDataError) as error:
            if isinstance(error, CacheError) and not isinstance(error, MissingDataError):
                raise
            failures[question.id] = str(error)
            return None

    def _can_ask(self, loaded: Loaded, failures: dict[str, str]) -> bool:
        """Whether a question that shares a batch with a faulty one is itself without fault."""
        try:
            self._answerer.prepare([loaded])
        except RequestError as error:
            failures[loaded.question.id] = str(error)
            return False
        return True
