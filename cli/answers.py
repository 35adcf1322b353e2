"""`p4dprep eval answers` and `p4dprep eval compare`: a benchmark's questions, and two results of one."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.progress import TaskID
from rich.table import Table
from rich.text import Text

from cli._output import JsonFlag, StorageOptions, console, print_json, printable, progress_bar
from p4dprep.errors import RequestError

if TYPE_CHECKING:  # torch and transformers take seconds that --help should not cost
    from student.evaluate.compare import Comparison
    from student.evaluate.result import Result

MAX_REASONS = 3
MACHINES = "Where it runs"


def answers(
    student: Annotated[
        str,
        typer.Argument(
            metavar="STUDENT",
            help="A run's folder, a student's folder or ORG/NAME; `oracle` or `constant:B` to check a benchmark.",
            show_default=False,
        ),
    ],
    bench: Annotated[str, typer.Option(metavar="NAME", help="The benchmark.", show_default=False)],
    data: Annotated[Path, typer.Option(metavar="DIR", help="Its folder, as published.", show_default=False)],
    out: Annotated[Path, typer.Option(metavar="RESULTS", help="Folder of the results.", show_default=False)],
    mode: Annotated[str | None, typer.Option(help="A named way to ask or score.  [default: the official one]")] = None,
    frames: Annotated[int, typer.Option(min=1, help="Frames of a video, spread over it.")] = 16,
    frame_size: Annotated[
        str | None,
        typer.Option(help="Pixels: 224 or HEIGHTxWIDTH.  [default: as a run was trained, else the video's own]"),
    ] = None,
    cache: Annotated[
        str | None, typer.Option(help="Cache of the benchmark's videos, for students trained as 4d-concat or 4d-pe.")
    ] = None,
    tpe: Annotated[
        bool | None, typer.Option("--tpe/--no-tpe", help="Timestamps in the features.  [default: as it was trained]")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="The hub's branch, tag or commit of the student.")] = None,
    step: Annotated[int | None, typer.Option(help="Checkpoint of a run.  [default: the last]")] = None,
    dtype: Annotated[
        Literal["auto", "bfloat16", "float32"],
        typer.Option(help="auto (bfloat16 on a GPU, else float32), bfloat16 or float32."),
    ] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered at once.")] = 8,
    loaders: Annotated[int, typer.Option(min=1, help="Processes that decode videos.")] = 2,
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Answer every N-th question from I (0 to N-1), for N jobs.")
    ] = None,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes that share the questions, by Ray.", rich_help_panel=MACHINES)
    ] = 1,
    gpus_per_worker: Annotated[
        float | None,
        typer.Option(min=0, help="GPUs of each.  [default: 1 where there are enough]", rich_help_panel=MACHINES),
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to join, e.g. auto.", rich_help_panel=MACHINES)
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the official rule's guesses and of the intervals.")] = 0,
    storage_options: StorageOptions = None,
    json: JsonFlag = False,
) -> None:
    """Ask a benchmark's questions of a student, and score the replies as the benchmark does.

    The same command goes on where it was interrupted. With --workers, Ray workers share the questions; DIR, RESULTS
    and STUDENT then lie where every machine has them under the same path. With --shard, N jobs share them; afterwards
    the same command without it puts their answers together.

    **Examples**

        p4dprep eval answers student-4d --bench r4d-bench --data R4D-Bench --out results/4d

        p4dprep eval answers ORG/NAME --bench vlm4d --data VLM4D --out /shared/zero-shot --workers 8 --address auto

        p4dprep eval answers oracle --bench sti-bench --data STI-Bench --out results/oracle
    """
    from p4dprep.extract.frames import parse_size
    from student.evaluate.answers import AnswerRequest, answer

    request = AnswerRequest(
        student=student,
        bench=bench,
        data=data,
        out=out,
        mode=mode,
        num_frames=frames,
        frame_size=None if frame_size is None else parse_size(frame_size),
        cache=cache,
        tpe=tpe,
        revision=revision,
        step=step,
        dtype=dtype,
        batch_size=batch_size,
        num_loaders=loaders,
        shard=None if shard is None else parse_shard(shard),
        seed=seed,
        storage_options=storage_options,
    )
    result: Result | None
    with _answering() as on_progress:
        if workers == 1 and address is None:
            result = answer(request, on_progress)
        else:
            from student.evaluate.workers import answer_with_workers

            result = answer_with_workers(
                request,
                num_workers=workers,
                address=address,
                gpus_per_worker=gpus_per_worker,
                on_progress=on_progress,
            )
    if result is None:
        console.print(f"answered: {request.file}; without --shard all are put together", markup=False, highlight=False)
    elif json:
        print_json(result.to_json())
    else:
        _show_result(result, out)


def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="Folder of results.", show_default=False)],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another, of the same benchmark.", show_default=False)],
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap.")] = 0,
    json: JsonFlag = False,
) -> None:
    """Compare two results question by question: B - A with its 95% interval, and McNemar's exact p.

    **Examples**

        p4dprep eval compare results/sft results/4d
    """
    from student.evaluate.compare import compare as compare_results

    comparison = compare_results(first, second, seed=seed)
    if json:
        print_json(comparison)
    else:
        _show_comparison(comparison)


def parse_shard(text: str) -> tuple[int, int]:
    """`0/8` as (0, 8).

    Raises:
        RequestError: it is no I/N.
    """
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal()):
        raise RequestError(f"--shard {text} is not I/N, such as 0/8")
    return int(number), int(count)


@contextmanager
def _answering() -> Iterator[Callable[[int, int], None]]:
    """A bar with the rate since it began and the time that is left."""
    with progress_bar() as bar:
        began: list[tuple[float, int, TaskID]] = []

        def on_progress(done: int, total: int) -> None:
            if not began:
                task = bar.add_task("answering", total=total, completed=done)
                began.append((time.monotonic(), done, task))
                return
            started, before, task = began[0]
            rate = (done - before) / max(time.monotonic() - started, 1e-9)
            bar.update(task, completed=done, description=f"answering, {rate:.1f} a second")

        yield on_progress


def _show_result(result: "Result", out: Path) -> None:
    from student.evaluate.result import facts, interval_text

    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("", result.identity["bench"], "95% interval", "questions"):
        table.add_column(name, justify="right" if name else "left")
    for column in result.table:
        interval = interval_text(column.low, column.high)
        table.add_row(printable(column.name), f"{column.value:.1f}", interval, str(column.num_questions))
    Console(soft_wrap=True).print(table)
    for line in facts(result):
        console.print(printable(line), markup=False, highlight=False)
    for reason, count in sorted(result.failures.items(), key=lambda item: -item[1])[:MAX_REASONS]:
        console.print(printable(f"not asked, {count}: {reason}"), style="red", markup=False, highlight=False)
    console.print(f"written: {out}", markup=False, highlight=False)


def _show_comparison(comparison: "Comparison") -> None:
    from student.evaluate.result import interval_text

    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("", "A", "B", "B - A", "95% interval", "only A", "only B", "p", "questions"):
        table.add_column(name, justify="right" if name else "left")
    for column in comparison.columns:
        is_clear = column.low > 0 or column.high < 0
        table.add_row(
            printable(column.name),
            f"{column.first:.1f}",
            f"{column.second:.1f}",
            Text(f"{column.difference:+.1f}", style="bold" if is_clear else ""),
            interval_text(column.low, column.high),
            str(column.only_first),
            str(column.only_second),
            f"{column.p:.2g}",
            str(column.num_questions),
        )
    title = f"{comparison.bench}, mode {comparison.mode}: A {comparison.first}, B {comparison.second}"
    screen = Console(soft_wrap=True)
    screen.print(printable(title), style="bold", markup=False, highlight=False)
    screen.print(table)
    if any(comparison.num_failed):
        failed = " and ".join(map(str, comparison.num_failed))
        console.print(f"{failed} questions could not be asked and score 0", markup=False, highlight=False)


def lmms_eval(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the tasks.", show_default=False)],
) -> None:
    """Write lmms-eval tasks for R4D-Bench, VLM4D and VSTI-Bench that ask and score as `eval answers` does.

    **Examples**

        p4dprep eval lmms-eval tasks

        P4DPREP_R4D_BENCH=R4D-Bench lmms-eval --include_path tasks --tasks p4dprep_r4d_bench --model ...
    """
    from student.evaluate.lmms_eval import write_tasks

    for folder in write_tasks(out):
        typer.echo(folder)
