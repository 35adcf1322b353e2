"""`p4dprep report`: a run, its maps and its answers as one page."""

from pathlib import Path
from typing import Annotated

import typer

from cli._output import StorageOptions, progress_bar


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of `p4dprep train`.", show_default=False)],
    cache: Annotated[
        str | None,
        typer.Option(
            metavar="CACHE", help="Clips that the student is shown for --against.  [default: the run's cache]"
        ),
    ] = None,
    against: Annotated[
        str | None, typer.Option(metavar="TRUTH", help="Judge the maps that the student predicts by this cache.")
    ] = None,
    answers: Annotated[
        list[Path] | None,
        typer.Option(metavar="RESULTS", help="Folder of `p4dprep eval answers`; repeat for several."),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="A result's benchmark folder, for the clips of its worst cases; repeat."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Judge the maps of so many clips only.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="PAGE", help="HTML file.  [default: RUN/report.html]")] = None,
    storage_options: StorageOptions = None,
) -> None:
    """Write one self-contained HTML page: what was run, coverage, timing, losses, maps, answers, worst cases.

    It holds every picture and number it shows, runs no script and asks no other address.

    **Examples**

        p4dprep report RUN

        p4dprep report RUN --against held-out/truth --cache held-out/cache --answers results --data held-out/worlds
    """
    from student.report import ReportRequest, write_report

    request = ReportRequest(
        run=run,
        out=out,
        cache=cache,
        against=against,
        answers=tuple(answers or ()),
        data=tuple(data or ()),
        limit=limit,
        storage_options=storage_options,
    )
    with progress_bar() as bar:
        task = bar.add_task("reading", total=None)

        def tell(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        page = write_report(request, tell)
    typer.echo(page)
