"""Asking a benchmark's questions: what is shown, resume, shards, batches, failures, and what may not change."""

import fcntl
import json
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from p4dprep.cache import Cache
from p4dprep.errors import CorruptDataError, FingerprintMismatchError, RequestError, VideoError
from p4dprep.targets import RGB_DIMS, TargetSpec
from p4dprep.video import Decoder
from student import run_folder
from student.backbones import FAMILIES
from student.evaluate import registry
from student.evaluate.answerers import StudentAnswerer, find_source, load_rival, open_answerer
from student.evaluate.answers import AnswerRequest, _rival_arrays, answer, plan
from student.evaluate.benchmark import Question, Shown
from student.evaluate.media import FramePolicy, Loaded, MediaReader
from student.evaluate.result import Result, read_answers
from student.train import train
from student.train_config import parse_config
from tests.student.evaluate.tiny_bench import TinyBench, write_bench
from tests.student.p4d_cache import SAMPLING, T
from tests.student.tiny_students import WRITERS
from tests.student.train_run import request as train_request
from tests.student.train_run import write_world
from tests.videos import decoded_times, write_video

pytestmark = pytest.mark.usefixtures("one_thread", "tiny")

NUM_QUESTIONS, NUM_BAD = 12, 1
RESULT_FILES = ("answers-0-of-1.jsonl", "identity.json", "result.json", "table.md")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.BENCHMARKS, "tiny", TinyBench())


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bench(tmp_path_factory.mktemp("tiny") / "bench", NUM_QUESTIONS)


def ask(data: Path, out: Path, **changes: Any) -> AnswerRequest:
    values = {"student": str(data / "student"), "bench": "tiny", "num_frames": 4, "batch_size": 2}
    return AnswerRequest(data=data, out=out, **values | changes)


def answered(request: AnswerRequest) -> Result:
    result = answer(request)
    assert result is not None
    return result


def replies(out: Path) -> dict[str, str]:
    return {line["id"]: line["reply"] for line in read_answers(out)}


def value(result: Result, name: str) -> float:
    return next(column.value for column in result.table if column.name == name)


@pytest.fixture(scope="module")
def whole(bench: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of a run that nothing disturbed."""
    out, before = tmp_path_factory.mktemp("whole") / "out", torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.BENCHMARKS, "tiny", TinyBench())
        answered(ask(bench, out))
    torch.set_num_threads(before)
    return out


def test_a_run_that_was_killed_within_a_batch_goes_on_to_the_same_bytes(
    bench: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    victim = [
        sys.executable,
        "-m",
        "tests.student.evaluate.tiny_bench",
        str(bench / "student"),
        str(bench),
        str(out),
        "5",
    ]
    assert subprocess.run(victim, check=False, cwd=Path(__file__).parents[3]).returncode == -signal.SIGKILL
    file = out / "answers-0-of-1.jsonl"
    assert file.read_bytes().endswith(b'{"id": "q-')
    file.write_bytes(
        file.read_bytes().rsplit(b"\n", 2)[0] + b'\n{"id"'
    )  # the kill may fall between a batch's lines too
    assert len(file.read_bytes().splitlines()) - 1 in (4, 5)
    assert not (out / "result.json").exists()
    answered(ask(bench, out))
    for name in RESULT_FILES:
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_what_is_answered_already_is_not_asked_again(bench: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, steps = (whole / "result.json").read_bytes(), list[tuple[int, int]]()
    monkeypatch.setattr("student.evaluate.answers.open_answerer", lambda *_, **__: pytest.fail("asked again"))
    answer(ask(bench, whole), lambda *step: steps.append(step))
    assert steps == [(NUM_QUESTIONS, NUM_QUESTIONS)]
    assert (whole / "result.json").read_bytes() == before


def test_two_shards_put_together_are_the_whole(bench: Path, whole: Path, tmp_path: Path) -> None:
    for number in (1, 0):
        assert answer(ask(bench, tmp_path, shard=(number, 2))) is None
        assert len((tmp_path / f"answers-{number}-of-2.jsonl").read_text().splitlines()) == NUM_QUESTIONS // 2
    assert not (tmp_path / "result.json").exists()
    answered(ask(bench, tmp_path))
    assert not (tmp_path / "answers-0-of-1.jsonl").exists()
    for name in ("result.json", "table.md"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


def test_a_lost_shard_is_answered_when_the_others_are_put_together(bench: Path, whole: Path, tmp_path: Path) -> None:
    answer(ask(bench, tmp_path, shard=(0, 3)))
    answered(ask(bench, tmp_path))
    assert len((tmp_path / "answers-0-of-1.jsonl").read_text().splitlines()) == NUM_QUESTIONS * 2 // 3
    assert (tmp_path / "result.json").read_bytes() == (whole / "result.json").read_bytes()


def test_shards_cut_otherwise_ask_what_is_not_answered_yet(bench: Path, tmp_path: Path) -> None:
    for shard in ((0, 3), (0, 2), (1, 2)):
        answer(ask(bench, tmp_path, student="oracle", shard=shard))
    answered(ask(bench, tmp_path, student="oracle"))
    counts = {path.name: len(path.read_text().splitlines()) for path in tmp_path.glob("*.jsonl")}
    assert counts == {"answers-0-of-3.jsonl": 4, "answers-0-of-2.jsonl": 4, "answers-1-of-2.jsonl": 4}


@pytest.fixture(scope="module")
def shown(bench: Path) -> list[Loaded]:
    """Videos of one length, then pictures."""
    reader = MediaReader(FramePolicy(num_frames=4, frame_size=(48, 64)))
    questions = TinyBench().read(bench, "official")
    loaded = [reader.load(questions[number]) for number in (0, 1, 2, 4, 5)]
    reader.close()
    return loaded


@pytest.mark.parametrize("family", sorted(WRITERS))
def test_neither_padding_nor_neighbours_change_a_reply(shown: list[Loaded], family: str, tmp_path: Path) -> None:
    if requirement := FAMILIES[family].requirement:
        pytest.importorskip(requirement)
    source = find_source(str(WRITERS[family](tmp_path)), tpe=True)
    answerer = open_answerer(source, TinyBench(), "official", dtype="float32", seed=0, cache=None)
    alone = [reply for each in shown for reply in answerer.reply(answerer.prepare([each]), 4)]
    together = [answerer.reply(answerer.prepare(batch), 4) for batch in (shown[:4], shown[4:])]
    assert alone == together[0] + together[1]
    assert len(set(alone)) > 1


def test_tpe_changes_what_is_said_of_videos_and_nothing_else(bench: Path, whole: Path, tmp_path: Path) -> None:
    result = answered(ask(bench, tmp_path, tpe=True))
    with_tpe, without = replies(tmp_path), replies(whole)
    changed = {name for name in without if with_tpe[name] != without[name]}
    assert changed
    assert not changed & {"q-5", "q-6", "q-7"}  # pictures, and the video that cannot be read
    assert result.identity["time_cue"] == "tpe"


def test_logits_differ_with_and_without_tpe(bench: Path) -> None:
    found = []
    reader = MediaReader(FramePolicy(num_frames=4))
    loaded = [reader.load(TinyBench().read(bench, "official")[0])]
    for tpe in (False, True):
        source = find_source(str(bench / "student"), tpe=tpe)
        answerer = open_answerer(source, TinyBench(), "official", dtype="float32", seed=0, cache=None)
        assert isinstance(answerer, StudentAnswerer)
        with torch.inference_mode():
            batch = answerer.prepare(loaded).student
            found.append(answerer.backbone.forward(batch, layer=1).logits_bsv)
    reader.close()
    assert (found[0] - found[1]).abs().max() > 0.05


def test_an_oracle_scores_a_hundred_and_a_constant_letter_its_share(bench: Path, tmp_path: Path) -> None:
    assert [column.value for column in answered(ask(bench, tmp_path / "o", student="oracle")).table] == [100.0] * 3
    result = answered(ask(bench, tmp_path / "b", student="constant:B"))
    assert value(result, "Avg") == pytest.approx(100 / 3)
    assert (value(result, "far"), value(result, "fast")) == (0.0, 100.0)
    assert (result.num_unmatched, result.num_failed) == (0, 0)
    assert set(replies(tmp_path / "b").values()) == {"(B)"}


def test_a_video_that_cannot_be_read_scores_nothing_is_counted_and_stops_nobody(whole: Path) -> None:
    lines = {line["id"]: line for line in read_answers(whole)}
    assert len(lines) == NUM_QUESTIONS
    bad = lines["q-7"]
    assert (bad["reply"], bad["score"], bad["is_matched"], bad["failure"]) == (None, 0.0, False, "is empty (0 bytes)")
    result = json.loads((whole / "result.json").read_text())
    assert (result["num_asked"], result["num_failed"], result["failures"]) == (12, 1, {"is empty (0 bytes)": 1})
    assert result["num_unmatched"] == sum(not line["is_matched"] for line in lines.values()) - NUM_BAD


def test_a_question_that_no_model_can_be_asked_fails_alone(bench: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_bench(data, 4)
    records = json.loads((data / "qa.json").read_text())
    records[1]["question"] = "What is <|video_pad|>?"
    (data / "qa.json").write_text(json.dumps(records))
    result = answered(ask(data, tmp_path / "out", batch_size=4))
    assert (result.num_failed, list(result.failures)) == (1, [next(iter(result.failures))])
    assert "text holds the media token '<|video_pad|>'" in next(iter(result.failures))


def test_frames_are_spread_over_the_span_at_their_real_times(bench: Path) -> None:
    reader = MediaReader(FramePolicy(num_frames=4))
    first, spanned, short, named = (reader.load(each).sample for each in TinyBench().read(bench, "official")[:4])
    reader.close()
    times = decoded_times(bench / "v0.mp4")
    assert first.time_seconds is not None
    assert first.time_seconds.tolist() == [times[index] for index in np.linspace(0, 23, 4).round().astype(int)]
    assert first.frames_thwc is not None
    assert first.frames_thwc.shape == (4, 48, 64, 3)
    assert spanned.time_seconds is not None
    assert spanned.time_seconds.tolist() == [1.0, 1.5, 1.875, 2.375]  # of the 12 frames from 1.0 to 2.375 s
    assert short.time_seconds is not None
    assert short.time_seconds.tolist() == [0.0, 0.125, 0.375, 0.5]
    assert named.time_seconds is not None
    assert named.time_seconds.tolist() == [decoded_times(bench / "v2.mp4")[index] for index in (0, 3, 7, 11)]


def test_a_span_counts_from_the_first_frame_where_the_files_clock_starts_late(tmp_path: Path) -> None:
    video = write_video(tmp_path / "late.mkv", num_frames=16, fps=8, pts=range(40, 56), width=64, height=48)
    question = replace(QUESTION, shown=Shown(video=video, span_seconds=(1.0, 2.0)))
    reader = MediaReader(FramePolicy(num_frames=2))
    times = reader.load(question).sample.time_seconds
    reader.close()
    assert times is not None
    assert times.tolist() == [pytest.approx(6.0), pytest.approx(6.875)]


QUESTION = Question(id="q", category="far", prompt="What?", shown=Shown(), options=("1", "2"), answer="A")


def test_the_marked_picture_stands_for_the_first_frame_at_the_frames_size(bench: Path) -> None:
    reader = MediaReader(FramePolicy(num_frames=4, frame_size=(32, 40)))
    loaded = reader.load(TinyBench().read(bench, "official")[4]).sample
    reader.close()
    assert loaded.frames_thwc is not None
    assert loaded.frames_thwc.shape == (4, 32, 40, 3)
    assert (loaded.frames_thwc[0] == 250).all()
    assert not (loaded.frames_thwc[1] == 250).all()


def test_a_video_on_its_side_is_shown_upright_in_its_own_size(tmp_path: Path) -> None:
    video = write_video(tmp_path / "side.mp4", num_frames=4, width=64, height=48, rotation_degrees=90)
    reader = MediaReader(FramePolicy(num_frames=2))
    frames = reader.load(replace(QUESTION, shown=Shown(video=video))).sample.frames_thwc
    reader.close()
    assert frames is not None
    assert frames.shape == (2, 64, 48, 3)


def test_pictures_come_from_files_and_from_bytes(bench: Path) -> None:
    data = (bench / "still.png").read_bytes()
    reader = MediaReader(FramePolicy())
    shown = reader.load(replace(QUESTION, shown=Shown(images=(bench / "still.png", data)))).sample
    assert np.array_equal(shown.images_hwc[0], shown.images_hwc[1])
    with pytest.raises(ValueError, match="a picture of 9 bytes is no image that can be read"):
        reader.load(replace(QUESTION, shown=Shown(images=(b"not a png",))))
    reader.close()


def test_frames_named_beyond_the_end_or_out_of_order_are_refused(bench: Path) -> None:
    with Decoder() as decoder:
        with pytest.raises(VideoError, match="has 5 frames, so there is no frame 5, counted from 0"):
            decoder.read_named(bench / "v1.mp4", (0, 5), 48, 64)
        with pytest.raises(RequestError, match=r"frames \[3, 1\] are asked for; indices must start at 0 and never"):
            decoder.read_named(bench / "v1.mp4", (3, 1), 48, 64)
        named = decoder.read_named(bench / "v0.mp4", (0, 0, 23), 48, 64)
    assert named.time_seconds_t.tolist() == [0.0, 0.0, decoded_times(bench / "v0.mp4")[23]]
    assert named.num_distinct_frames == 2


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"num_frames": 8}, "num_frames 4 .now 8."),
        ({"frame_size": (32, 32)}, "frames '4 uniform, own size'"),
        ({"mode": "bare"}, "mode 'official' .now 'bare'."),
        ({"tpe": True}, "time_cue 'none' .now 'tpe'."),
        ({"dtype": "bfloat16"}, "dtype 'float32' .now 'bfloat16'."),
        ({"seed": 1}, "seed 0 .now 1."),
        ({"student": "oracle"}, "student_digest '[0-9a-f]+' .now 'oracle'."),
    ],
)
def test_another_request_is_refused_and_the_field_named(
    bench: Path, whole: Path, changes: dict[str, Any], field: str
) -> None:
    before = (whole / "answers-0-of-1.jsonl").read_bytes()
    with pytest.raises(FingerprintMismatchError, match=f"holds answers with .*{field}"):
        answer(ask(bench, whole, **changes))
    assert (whole / "answers-0-of-1.jsonl").read_bytes() == before


def test_other_questions_are_another_revision(tmp_path: Path) -> None:
    data = write_bench(tmp_path / "data", 3)
    answer(ask(data, tmp_path / "out", student="oracle"))
    (data / "qa.json").write_text((data / "qa.json").read_text() + "\n")
    with pytest.raises(FingerprintMismatchError, match=r"holds answers with revision '[0-9a-f]{64}' \(now"):
        answer(ask(data, tmp_path / "out", student="oracle"))


def test_the_same_student_elsewhere_is_the_same(bench: Path, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "moved").symlink_to(bench / "student")
    assert answered(ask(bench, whole, student=str(tmp_path / "moved"))).identity["student"] == str(tmp_path / "moved")


def test_a_damaged_line_is_never_passed_over(bench: Path, tmp_path: Path) -> None:
    answer(ask(bench, tmp_path, student="oracle"))
    file = tmp_path / "answers-0-of-1.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([lines[0], b'{"id": 3}\n', *lines[2:]]))
    with pytest.raises(CorruptDataError, match=r"answers-0-of-1\.jsonl, line 2, is no answer; delete the file"):
        answer(ask(bench, tmp_path, student="oracle"))


def test_two_processes_never_write_one_file_and_shards_are_put_together_when_all_have_ended(
    bench: Path, tmp_path: Path
) -> None:
    answer(ask(bench, tmp_path, student="oracle", shard=(0, 2)))
    with open(tmp_path / "answers-0-of-2.jsonl", "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(RequestError, match=r"answers-0-of-2\.jsonl is being written by another process"):
            answer(ask(bench, tmp_path, student="oracle", shard=(0, 2)))
        with pytest.raises(
            RequestError, match=r"answers-0-of-2\.jsonl is still being written; put the shards together"
        ):
            answer(ask(bench, tmp_path, student="oracle"))


def test_an_answer_file_that_another_process_holds_is_waited_for_where_that_was_asked_for(
    bench: Path, tmp_path: Path
) -> None:
    with ThreadPoolExecutor(1) as pool:
        with open(tmp_path / "answers-0-of-1.jsonl", "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            waiting = pool.submit(answer, ask(bench, tmp_path, student="oracle"), wait_seconds=60)
            assert wait([waiting], timeout=1).not_done
        result = waiting.result(timeout=60)
    assert result is not None
    assert result.num_asked == NUM_QUESTIONS


def test_a_folder_of_something_else_is_refused(bench: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(RequestError, match=r"holds thesis\.tex, which is no result; name an empty folder"):
        answer(ask(bench, tmp_path, student="oracle"))
    with pytest.raises(RequestError, match="is a file; name a folder for the results"):
        answer(ask(bench, tmp_path / "thesis.tex", student="oracle"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bench": "none"}, "benchmark 'none' does not exist; there are .*tiny"),
        ({"mode": "odd"}, "tiny has no mode 'odd'; it has official, bare"),
        ({"student": "constant:b"}, "constant:b is no answerer; say constant: and one capital letter"),
        ({"student": "oracle", "cache": "c"}, "oracle reads no cache when it answers; leave --cache out"),
        ({"step": 3}, "is no run of p4dprep train, so it has no checkpoint of step 3"),
        ({"num_frames": 5000}, "5000 frames of 1x1 are over 4096"),
    ],
)
def test_what_cannot_be_asked_is_refused(bench: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        answer(ask(bench, tmp_path, **changes))


def test_a_shard_that_does_not_exist_is_refused(bench: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="shard 2/2 does not exist; shards are 0/N to N-1/N"):
        ask(bench, tmp_path, shard=(2, 2))


def test_batches_hold_what_can_be_batched_and_every_question_once() -> None:
    shown = (
        Shown(video=Path("v")),
        Shown(images=(b"1",)),
        Shown(images=(b"1", b"2")),
        Shown(video=Path("v"), frame_indices=(1,)),
    )
    questions = [
        replace(QUESTION, id=str(number), shown=shown[number % 4], prompt="x" * (number * 7 % 11))
        for number in range(300)
    ]
    batches = plan(questions, 4)
    assert sorted(int(each.id) for batch in batches for each in batch) == list(range(300))
    assert max(map(len, batches)) == 4
    kinds = [
        {(each.shown.video, each.shown.frame_indices, len(each.shown.images)) for each in batch} for batch in batches
    ]
    assert all(len(kind) == 1 for kind in kinds)


@pytest.fixture(scope="module", params=[False, True], ids=["normalised", "standardised"])
def rival(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A world with videos of its clips, questions about them, and a run of 4d-concat whose latents matter."""
    folder, before = write_world(tmp_path_factory.mktemp("rival"), num_clips=3, num_stills=0), torch.get_num_threads()
    torch.set_num_threads(1)
    asked = train_request(
        folder,
        folder / "run",
        strategy="4d-concat",
        standardise_latents=request.param,
        max_steps=2,
        batch_size=2,
        micro_batch_size=1,
    )
    train(parse_config(asked))
    torch.set_num_threads(before)
    weights = folder / "run" / "checkpoint-2" / run_folder.P4D_WEIGHTS
    random = torch.Generator().manual_seed(0)
    save_file({name: torch.randn(each.shape, generator=random) for name, each in load_file(weights).items()}, weights)
    run_folder.mark_complete(weights.parent)
    for number in range(3):
        write_video(folder / f"clip-{number}.mp4", num_frames=T, fps=1, width=32, height=32)
    records = [
        {"id": f"q-{n}", "kind": "far", "question": "How far?", "answer": "A", "video": f"clip-{n}.mp4"}
        for n in range(3)
    ]
    (folder / "qa.json").write_text(json.dumps(records))
    return folder


def test_a_rival_reads_the_teachers_latents_when_it_answers(rival: Path, tmp_path: Path) -> None:
    request = ask(rival, tmp_path / "rival", student=str(rival / "run"), cache=str(rival / "cache"))
    result = answered(request)
    assert (result.num_failed, result.identity["step"], result.identity["frames"]) == (0, 2, "4 uniform, 8x8 squash")
    assert len(result.identity["cache"]) == 64
    source = find_source(str(rival / "run"))
    assert source.config is not None
    answerer = open_answerer(source, TinyBench(), "official", dtype="float32", seed=0, cache=None)
    reader = MediaReader(FramePolicy(num_frames=T, frame_size=(8, 8)))
    loaded = [reader.load(question) for question in TinyBench().read(rival, "official")]
    reader.close()
    without = answerer.reply(answerer.prepare(loaded), 5)
    assert list(replies(tmp_path / "rival").values()) != without


def test_a_rival_reads_only_the_targets_that_its_run_was_trained_with(rival: Path) -> None:
    cache, source = Cache.open(str(rival / "cache")), find_source(str(rival / "run"))
    assert source.config is not None
    assert _rival_arrays(source, cache) == ("l4p_latents",)
    other = replace(source, config=source.config.model_copy(update={"targets": ("l4p_depth",)}))
    with pytest.raises(RequestError, match=r"asked for were \['l4p_depth'\]"):
        load_rival(other, cache, hidden_size=32)
    with pytest.raises(RequestError, match=r"asked for were \['l4p_depth'\]"):
        _rival_arrays(other, cache)


def test_a_rival_asks_for_its_cache_and_its_frames(rival: Path, tmp_path: Path) -> None:
    run, cache = str(rival / "run"), str(rival / "cache")
    with pytest.raises(
        RequestError, match="was trained as 4d-concat, which reads a teacher's latents to answer; name a"
    ):
        answer(ask(rival, tmp_path, student=run))
    with pytest.raises(RequestError, match=f"has clips of {T} frames, and .* must see the same; say --frames {T}"):
        answer(ask(rival, tmp_path / "out", student=run, cache=cache, num_frames=T + 1))


def test_a_rivals_clip_that_is_not_cached_or_has_other_times_fails(rival: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    records = [
        {"id": f"q-{n}", "kind": "far", "question": "How far?", "answer": "A", "video": name}
        for n, name in enumerate(("clip-0.mp4", "clip-1.mp4", "unknown.mp4"))
    ]
    (data / "qa.json").write_text(json.dumps(records))
    for record in records:
        write_video(
            data / str(record["video"]), num_frames=T, fps=2 if record["id"] == "q-1" else 1, width=32, height=32
        )
    result = answered(ask(data, tmp_path / "out", student=str(rival / "run"), cache=str(rival / "cache")))
    assert set(result.failures) == {
        "has other frame times than clip clip-1 of the cache",
        "the cache has 0 clips of unknown.mp4; it must have one",
    }


def test_a_run_whose_cache_is_gone_asks_for_the_frames_size(rival: Path, tmp_path: Path) -> None:
    source = replace(find_source(str(rival / "run")), config=parse_config(train_request(tmp_path, tmp_path / "run")))
    with pytest.raises(RequestError, match=r"was trained on frames of its cache's size, and .* say --frame-size"):
        source.frame_policy(T, None)
    assert str(source.frame_policy(T, (24, 32))) == "4 uniform, 24x32 squash"


def test_a_run_on_kept_frames_is_asked_on_frames_of_their_size(rival: Path, tmp_path: Path) -> None:
    cache = Cache.create(str(tmp_path / "cache"), SAMPLING, clips_per_unit=2)
    spec = TargetSpec(
        name="frames", dims=RGB_DIMS, shape=(T, 16, 24, 3), dtype="uint8", units="1", quantity="rgb frames"
    )
    cache.add_group("frames", "frames", {"kind": "frames"}, (spec,), None)
    source = replace(find_source(str(rival / "run")), config=parse_config(train_request(tmp_path, tmp_path / "run")))
    assert str(source.frame_policy(T, None)) == "4 uniform, 16x24 squash"
