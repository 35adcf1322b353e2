"""`p4dprep export`: a trained student as a plain transformers checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli._output import JsonFlag, console, human_bytes, print_json

if TYPE_CHECKING:  # torch and transformers take seconds that --help should not cost
    from student.export import ExportReport


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of `p4dprep train`.", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.", show_default=False)],
    step: Annotated[
        int | None, typer.Option(help="Checkpoint of this step.  [default: the last]", show_default=False)
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Write a run's student as an ordinary checkpoint: the base's class, names, shapes and dtype, adapters merged.

    Everything that only training needed stays behind. OUT appears whole or not at all.

    **Examples**

        p4dprep export run student-4d

        p4dprep export run student-4d --step 1000
    """
    from student.export import export as write

    report = write(run, out, step=step)
    if json:
        print_json(report)
    else:
        console.print(_text(report), markup=False, highlight=False)


def _text(report: "ExportReport") -> str:
    return f"""\
{report.out}: {report.model_class}, {report.num_parameters:,} parameters in {report.dtype} as in {report.base}, \
{human_bytes(report.size_bytes)}, from {report.checkpoint}
{_about_times(report)}
    from transformers import {report.model_class}, {report.processor_class}
    model = {report.model_class}.from_pretrained({str(report.out)!r})
    processor = {report.processor_class}.from_pretrained({str(report.out)!r})"""


def _about_times(report: "ExportReport") -> str:
    said = f'config.json says "p4dprep": {{"time_cue": "{report.time_cue}"}}'
    if report.time_cue == "tpe":
        return f"TPE: {said}. student.backbones.load adds the frames' times; transformers alone runs without them:"
    return f"time cue: {said}; no TPE. transformers alone runs it as it was trained, given frames and text so told:"
