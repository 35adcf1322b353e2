"""`p4dprep worlds`: procedural clips with exact truth, a manifest, questions, and the truth as a cache."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli._output import JsonFlag, console, human_seconds, print_json, progress_bar
from p4dprep.errors import RequestError
from p4dprep.worlds.scene import Split

if TYPE_CHECKING:  # PyAV, OpenCV and Ray take seconds that --help should not cost
    from p4dprep.extract import ExtractConfig, ExtractReport
    from p4dprep.worlds.lists import Summary
    from p4dprep.worlds.questions import Category
    from p4dprep.worlds.write import Progress, Recipe

SECONDS_BETWEEN_LOG_LINES = 30.0


@dataclass(frozen=True, kw_only=True)
class WorldsReport:
    """What the command did; `truth` is None without one."""

    out: str
    split: Split
    seed: int
    num_clips: int
    num_rendered: int
    num_questions: "dict[Category, int]"
    seconds: float
    truth: "ExtractReport | None"


def worlds(
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder for the videos and all that belongs to them.")],
    num_clips: Annotated[int, typer.Option(min=1, help="Clips in all; more of them later keeps those there.")] = 200,
    split: Annotated[Split, typer.Option(help="Splits share no scene, layout or texture.")] = "train",
    seed: Annotated[int, typer.Option(min=0, help="Another seed gives other scenes.")] = 0,
    size: Annotated[
        str | None, typer.Option(help="Pixels of the videos, HEIGHTxWIDTH.  [default: the scenes' own]")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Rendering processes.  [default: one per processor]")
    ] = None,
    truth: Annotated[bool, typer.Option(help="Extract the truth into the cache OUT/truth.")] = True,
    frames: Annotated[int, typer.Option(help="Frames per clip of the truth.")] = 16,
    truth_size: Annotated[str, typer.Option(help="Pixels of the truth: 224 or HEIGHTxWIDTH.")] = "224",
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to join for the truth; else Ray starts here.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Make videos of procedural scenes whose depth, flow, motion, camera and objects are known exactly.

    OUT gets videos/, manifest.jsonl, scenes.jsonl, qa.json (LLaVA), test.json (R4D-Bench's layout), timebench.json,
    images/ (Set-of-Mark first frames) and truth/ (a cache). The same command again goes on where it was cut off.

    **Examples**

        p4dprep worlds worlds/test --split test --num-clips 200

        p4dprep worlds worlds/train --num-clips 5000 --seed 1 --workers 16 --no-truth

    Exit code 0: done; 1: the truth of some clips is missing; 2: the request was wrong.
    """
    from p4dprep.worlds.write import Recipe

    recipe = Recipe(split=split, seed=seed, size=_parse_size(size))
    request = _truth_request(out, frames, truth_size, address) if truth else None
    start = time.perf_counter()
    num_rendered, summary = make(out, recipe, num_clips, workers)
    seconds = time.perf_counter() - start
    console.print(
        f"{num_clips} clips in {out}: {num_rendered} rendered in {human_seconds(seconds)}, the others there before; "
        f"{sum(summary.num_questions.values())} questions",
        markup=False,
        highlight=False,
    )
    extracted = _extract(request) if request else None
    if json:
        print_json(
            WorldsReport(
                out=out,
                split=split,
                seed=seed,
                num_clips=num_clips,
                num_rendered=num_rendered,
                num_questions=summary.num_questions,
                seconds=round(seconds, 3),
                truth=extracted,
            )
        )
    if extracted is not None and extracted.coverage < 1:
        raise typer.Exit(1)


def _parse_size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise RequestError(f"--size {text} is not HEIGHTxWIDTH, such as 192x256")
    return int(height), int(width)


def _truth_request(out: str, frames: int, size: str, address: str | None) -> "ExtractConfig":
    from p4dprep.extract import parse_config

    places = {"source": f"{out}/manifest.jsonl", "cache": f"{out}/truth", "teachers": ("truth",)}
    return parse_config(places | {"frames": frames, "size": size, "address": address})


def _extract(request: "ExtractConfig") -> "ExtractReport":
    from cli import extract

    report = extract.run(request)
    extract.show_report(report)
    return report


def make(out: str | Path, recipe: "Recipe", num_clips: int, num_workers: int | None) -> "tuple[int, Summary]":
    """Videos and lists; clips that had to be rendered, and what the lists hold."""
    from p4dprep.worlds.lists import read_summary, write_lists
    from p4dprep.worlds.write import missing_clips, open_folder, process_pool, render_clips

    folder = open_folder(out, recipe)
    todo = missing_clips(folder, recipe, num_clips)
    summary = read_summary(folder)
    if not todo and summary is not None and summary.num_clips == num_clips:
        return 0, summary
    with process_pool(num_workers) as pool:
        with _progress("rendering") as show:
            render_clips(folder, recipe, todo, pool, show)
        with _progress("questions") as show:
            return len(todo), write_lists(folder, recipe, num_clips, pool, show)


@contextmanager
def _progress(what: str) -> "Iterator[Progress]":
    """A bar with rate and time left on a terminal; a line now and then in a log."""
    start = last_line = time.monotonic()
    with progress_bar() as bar:
        task = bar.add_task(what, total=None)

        def show(num_done: int, num_todo: int) -> None:
            nonlocal last_line
            now = time.monotonic()
            rate = f"{what}, {num_done / max(now - start, 1e-3):.2f} clips/s"
            bar.update(task, completed=num_done, total=num_todo, description=rate)
            if not console.is_terminal and now - last_line >= SECONDS_BETWEEN_LOG_LINES:
                last_line = now
                console.print(f"{rate}: {num_done}/{num_todo}", highlight=False)

        yield show
