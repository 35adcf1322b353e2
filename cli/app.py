"""The entry point `p4dprep`: registers the commands and formats the errors, nothing else."""

import os
import signal
import sys
from typing import Annotated

import typer

from cli import ablate, cache, demo, doctor, eval, export, extract, report, student, teachers, train, worlds
from p4dprep import __version__
from p4dprep.errors import P4DError
from p4dprep.storage import redact

DEBUG_VARIABLE = "P4DPREP_DEBUG"
INTERRUPTED = 130
"""The exit code that typer gives a command that Ctrl-C ended."""

app = typer.Typer(
    help="Offline Perceptual 4D Distillation: frozen teachers run once over a video corpus and leave zarr caches.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("extract")(extract.extract)
app.command("train")(train.train)
app.command("export")(export.export)
app.command("ablate")(ablate.ablate)
app.command("report")(report.report)
app.add_typer(cache.app, name="cache", help="Look into a cache, verify it, show it, clean it.")
app.add_typer(eval.app, name="eval", help="Judge maps by the truth, and answers by benchmarks.")
app.add_typer(teachers.app, name="teachers", help="List the teachers; import the paper's checkpoint.")
app.add_typer(student.app, name="student", help="Make a small student of random weights.")
app.command("doctor")(doctor.doctor)
app.command("worlds")(worlds.worlds)
app.command("demo")(demo.demo)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line. A `P4DError` is one line on stderr and exit code 2; P4DPREP_DEBUG=1 shows the traceback.

    SIGTERM, by which schedulers and pre-empted nodes stop a job, does what Ctrl-C does.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app()
    except P4DError as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        print(f"p4dprep: {redact(str(error))}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            print(
                "p4dprep: interrupted; what was committed stays, the same command goes on from there", file=sys.stderr
            )
        raise
