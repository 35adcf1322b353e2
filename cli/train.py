"""`p4dprep train`: teach a student from a cache, with no teacher in sight."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from cli._output import JsonFlag, StorageOptions, console, human_seconds, print_json, progress_bar, read_yaml

if TYPE_CHECKING:  # torch and transformers take seconds that --help should not cost
    from student.train import ShowLine, TrainReport

EXAMPLES = """
Fine-tune a video language model with SFT and Perceptual 4D Distillation, reading every target from CACHE.

No teacher is loaded. The same command with --resume goes on from the last checkpoint, exactly.

**Examples**

    p4dprep train cache --qa worlds/qa.json --media worlds --student student --out run

    p4dprep train cache --student ORG/NAME --out stage1 --epochs 1   (no text: distillation alone)

    p4dprep train s3://bucket/cache --qa qa.json --student ORG/NAME --out /shared/run --config train.yaml --workers 8

    p4dprep train cache --qa qa.json --student ORG/NAME --out sft --distill sft --tune lora

Exit code 0: trained; 2: the request was wrong. docs/training.md has every field of --config.
"""

STUDENT, LEARNT, SCHEDULE, MACHINES = "What is taught", "What is learnt", "How long and how fast", "Where it runs"


def train(
    cache: Annotated[str | None, typer.Argument(help="Folder or URL of the cache.", show_default=False)] = None,
    qa: Annotated[
        list[str] | None,
        typer.Option("--qa", help="Conversations in LLaVA JSON; repeat for several. None: distillation alone."),
    ] = None,
    student: Annotated[str | None, typer.Option(help="Folder in the hub's format, or ORG/NAME.")] = None,
    out: Annotated[str | None, typer.Option(help="The run's folder.")] = None,
    media: Annotated[str | None, typer.Option(help="Folder of the conversations' media.")] = None,
    revision: Annotated[str | None, typer.Option(help="The hub's branch, tag or commit of the student.")] = None,
    distill: Annotated[
        str | None,
        typer.Option(
            help="sft, ld, ed, ld+ed, or depth, flow, motion, camray joined by +.  [default: ld+ed]",
            rich_help_panel=LEARNT,
        ),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option("--target", help="Array GROUP_TARGET to use; repeat.", rich_help_panel=LEARNT),
    ] = None,
    distill_layer: Annotated[
        int | None, typer.Option(help="LLM layer to distil, from 1.  [default: the last]", rich_help_panel=LEARNT)
    ] = None,
    strategy: Annotated[
        str | None, typer.Option(help="p4d, 4d-concat or 4d-pe.  [default: p4d]", rich_help_panel=LEARNT)
    ] = None,
    time_cue: Annotated[
        str | None, typer.Option(help="none, marks, prompt or tpe.  [default: tpe]", rich_help_panel=LEARNT)
    ] = None,
    tune: Annotated[
        str | None,
        typer.Option(
            help="projector+llm, llm, lora, projector+lora or all.  [default: projector+llm]", rich_help_panel=LEARNT
        ),
    ] = None,
    regions: Annotated[
        str | None, typer.Option(help="Show regions as marks, boxes or both.  [default: both]", rich_help_panel=LEARNT)
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(help="Array of cached vision features; the tower does not run.", rich_help_panel=LEARNT),
    ] = None,
    conversations_per_sample: Annotated[
        int | None,
        typer.Option(
            help="Conversations over one clip that share its video, each blind to the others.  [default: 1]",
            rich_help_panel=SCHEDULE,
        ),
    ] = None,
    leave_out: Annotated[
        bool | None,
        typer.Option("--leave-out", help="Leave out samples that cannot be used.  [default: stop]"),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the data.  [default: 5]", rich_help_panel=SCHEDULE)
    ] = None,
    max_steps: Annotated[int | None, typer.Option(help="Steps, instead of epochs.", rich_help_panel=SCHEDULE)] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Samples of one step, of all workers.  [default: 1024]", rich_help_panel=SCHEDULE)
    ] = None,
    micro_batch_size: Annotated[
        int | None, typer.Option(help="Samples a worker takes at once.  [default: 1]", rich_help_panel=SCHEDULE)
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Highest of the cosine.  [default: 1e-5]", rich_help_panel=SCHEDULE)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of order and weights.  [default: 0]", rich_help_panel=SCHEDULE)
    ] = None,
    log_steps: Annotated[
        int | None, typer.Option(help="Steps between log lines.  [default: 10]", rich_help_panel=SCHEDULE)
    ] = None,
    save_steps: Annotated[
        int | None, typer.Option(help="Steps between checkpoints.  [default: 100]", rich_help_panel=SCHEDULE)
    ] = None,
    picture_steps: Annotated[
        int | None, typer.Option(help="Steps between pictures, 0 for none.  [default: 100]", rich_help_panel=SCHEDULE)
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes that train, by Ray Train.  [default: 1]", rich_help_panel=MACHINES)
    ] = None,
    loader_workers: Annotated[
        int | None, typer.Option(help="Reading processes a worker.  [default: 2]", rich_help_panel=MACHINES)
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="auto, float32 or bf16.  [default: auto]", rich_help_panel=MACHINES)
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to join, e.g. auto.", rich_help_panel=MACHINES)
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with any of this and more; flags win.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")] = False,
    storage_options: StorageOptions = None,
    json: JsonFlag = False,
) -> None:
    """Teach a student from a cache."""
    flags = {
        "cache": cache,
        "qa": tuple(qa) if qa else None,
        "student": student,
        "out": out,
        "media": media,
        "revision": revision,
        "distill": distill,
        "targets": tuple(target) if target else None,
        "distill_layer": distill_layer,
        "strategy": strategy,
        "time_cue": time_cue,
        "tune": tune,
        "regions": regions,
        "conversations_per_sample": conversations_per_sample,
        "features": features,
        "on_problem": "leave out" if leave_out else None,
        "epochs": epochs,
        "max_steps": max_steps,
        "batch_size": batch_size,
        "micro_batch_size": micro_batch_size,
        "learning_rate": learning_rate,
        "seed": seed,
        "log_steps": log_steps,
        "save_steps": save_steps,
        "picture_steps": picture_steps,
        "workers": workers,
        "loader_workers": loader_workers,
        "precision": precision,
        "address": address,
        "storage_options": storage_options,
    }
    given = {key: value for key, value in flags.items() if value is not None}
    report = run((read_yaml(config) if config else {}) | given, resume=resume)
    print_json(report) if json else show_report(report)


train.__doc__ = EXAMPLES


def run(request: Mapping[str, Any], *, resume: bool = False) -> "TrainReport":
    """Train with a progress display on stderr."""
    from student import train as engine
    from student.train_config import parse_config

    config = parse_config(dict(request))
    with progress_display() as show:
        return engine.train(config, resume=resume, show=show)


@contextmanager
def progress_display() -> Iterator["ShowLine"]:
    """A bar with the time left, and above it every line of the log."""
    with progress_bar() as bar:
        task = bar.add_task("loading", total=None)

        def show(num_steps: int, line: Mapping[str, float]) -> None:
            bar.update(task, description="train", total=num_steps, completed=int(line["step"]))
            console.print(log_line(num_steps, line), markup=False, highlight=False)

        yield show


def log_line(num_steps: int, line: Mapping[str, float]) -> str:
    """One line of the log for people: where it stands, every term, how fast it goes."""
    terms = [f"{name} {line[name]:.4g}" for name in line if name in ("sft", "ld") or name.startswith("ed/")]
    return "  ".join(
        [
            f"step {line['step']:.0f}/{num_steps}",
            f"loss {line['loss']:.4g}",
            *terms,
            f"lr {line['learning_rate']:.2g}",
            f"{line['samples_per_second']:.3g} samples/s",
            f"waited {line['data_wait_fraction']:.1%}",
        ]
    )


def show_report(report: "TrainReport") -> None:
    """How the run ended, on one screen."""
    table = Table("term", "first", "last", box=None)
    for name in report.last:
        if name in ("loss", "sft", "ld") or name.startswith("ed/"):
            table.add_row(name, f"{report.first.get(name, float('nan')):.4g}", f"{report.last[name]:.4g}")
    console.print(table)
    if report.num_left_out:
        console.print(report.left_out, markup=False, highlight=False)
    console.print(
        f"{report.num_steps} steps over {report.num_samples} samples, {human_seconds(report.seconds)}; "
        f"{report.run / 'index.html'} shows them",
        markup=False,
        highlight=False,
    )
    console.print(f"next: p4dprep export {report.run} OUT", markup=False, highlight=False)
