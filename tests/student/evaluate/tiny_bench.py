"""A small benchmark for the engine's own tests: choices about tiny videos and pictures, with every kind of trap."""

import json
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image

from student.evaluate import registry
from student.evaluate.answers import AnswerRequest, answer
from student.evaluate.benchmark import Benchmark, Parsed, Question, Scored, Shown, mean_percent
from student.evaluate.common import LETTERS, guess
from tests.student.tiny_students import WRITERS
from tests.videos import write_video

KINDS = ("far", "fast")


class TinyBench(Benchmark):
    """Options in round brackets; what matches nothing is guessed."""

    name = "tiny"
    source = "tests"
    columns: ClassVar[tuple[str, ...]] = ("Avg", *KINDS)
    num_tokens = 5
    modes: ClassVar[tuple[str, ...]] = ("official", "bare")

    def read(self, data: Path, mode: str) -> Sequence[Question]:
        """The questions of qa.json."""
        return [_question(data, record, mode) for record in json.loads((data / "qa.json").read_text())]

    def parse(self, question: Question, reply: str, mode: str, seed: int) -> Parsed:
        """The first `(A)`."""
        found = re.search(r"\(([A-D])\)", reply)
        return Parsed(answer=found[1] if found else guess(question, seed), is_matched=bool(found))

    def table(self, scored: Sequence[Scored]) -> dict[str, float]:
        """Micro averages."""
        groups = {"Avg": scored} | {kind: [each for each in scored if each.question.category == kind] for kind in KINDS}
        return {name: mean_percent(group) for name, group in groups.items() if group}

    def files(self, data: Path) -> tuple[Path, ...]:
        """qa.json."""
        return (data / "qa.json",)


def _question(data: Path, record: dict[str, object], mode: str) -> Question:
    names = record.get("images") or ()
    assert isinstance(names, list | tuple)
    span, indices = record.get("span"), record.get("indices")
    return Question(
        id=str(record["id"]),
        category=str(record["kind"]),
        prompt=str(record["question"]) if mode == "bare" else f"{record['question']}\n(A) 1\n(B) 2\n(C) 3",
        shown=Shown(
            video=data / str(record["video"]) if "video" in record else None,
            images=tuple(data / str(name) for name in names),
            span_seconds=span and tuple(span),  # type: ignore[arg-type]
            frame_indices=indices and tuple(indices),  # type: ignore[arg-type]
            first_frame_marks=data / str(record["marks"]) if "marks" in record else None,
        ),
        options=("1", "2", "3"),
        answer=str(record["answer"]),
        tags={"split": "even" if int(str(record["id"])[2:]) % 2 == 0 else "odd"},
    )


def write_bench(folder: Path, num_questions: int = 12) -> Path:
    """qa.json, videos, pictures and a `student`: spans, named frames, marks, still pictures, one bad video."""
    folder.mkdir(parents=True)
    for number, frames in enumerate((24, 5, 12)):
        write_video(folder / f"v{number}.mp4", num_frames=frames, width=64, height=48, fps=8)
    (folder / "bad.mp4").write_bytes(b"")
    marked = np.full((96, 128, 3), 250, np.uint8)
    Image.fromarray(marked).save(folder / "marked.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)).save(folder / "still.png")
    shown = (
        {"video": "v0.mp4"},
        {"video": "v0.mp4", "span": [1.0, 2.5]},
        {"video": "v1.mp4"},
        {"video": "v2.mp4", "indices": [0, 3, 7, 11]},
        {"video": "v2.mp4", "marks": "marked.png"},
        {"images": ["still.png"]},
        {"images": ["still.png", "marked.png"]},
        {"video": "bad.mp4"},
    )
    records = [
        {
            "id": f"q-{number}",
            "kind": KINDS[number % 3 % 2],
            "question": "How far is the ball? " * (1 + number % 3),
            "answer": LETTERS[number % 3],
            **shown[number % len(shown)],
        }
        for number in range(num_questions)
    ]
    (folder / "qa.json").write_text(json.dumps(records))
    WRITERS["qwen2_5_vl"](folder / "student")
    return folder


def register() -> None:
    """Make it known under its name."""
    registry.BENCHMARKS["tiny"] = TinyBench()


def main() -> None:
    """STUDENT DATA OUT NUM_LINES: answer until so many lines are there, tear one off, and end by SIGKILL."""
    torch.set_num_threads(1)
    register()
    student, data, out, limit = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    request = AnswerRequest(student=student, bench="tiny", data=data, out=out, num_frames=4, batch_size=2)

    def kill(done: int, _total: int) -> None:
        if done >= limit:
            with open(request.file, "ab") as file:
                file.write(b'{"id": "q-')
            os.kill(os.getpid(), signal.SIGKILL)

    answer(request, kill)


if __name__ == "__main__":
    main()
