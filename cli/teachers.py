"""`p4dprep teachers`: which frozen experts are installed, and the import of the paper's own."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from p4dprep.errors import RequestError, TeacherError
from p4dprep.registry import available, load, package_of

app = typer.Typer(no_args_is_help=True, help="Frozen experts: list what is installed, import the paper's own.")

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of text.")]


@dataclass(frozen=True, kw_only=True)
class TeacherRow:
    """One kind of teacher as `list` shows it; `problem` says why its package cannot be imported, or is empty."""

    kind: str
    package: str
    argument: str = ""
    summary: str = ""
    licence: str = ""
    downloads: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    problem: str = ""


@app.command("list")
def list_teachers(as_json: JsonFlag = False) -> None:
    """List every kind of teacher, its licence, and what it would download.

    Examples:

      p4dprep teachers list

      p4dprep teachers list --json
    """
    rows = [_row(kind, package_of(point)) for kind, point in available().items()]
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows], indent=2, ensure_ascii=False))
        return
    table = Table("--teacher", "what it is", show_lines=True)
    table.columns[0].no_wrap = True
    for row in rows:
        table.add_row(row.kind, _about(row))
    Console(markup=False, highlight=False).print(table)


def _about(row: TeacherRow) -> str:
    if row.problem:
        return f"{row.problem}\npackage: {row.package}"
    lines = [row.summary, f"write: {row.kind}:{row.argument}" if row.argument else f"write: {row.kind}"]
    lines += [f"  ?{name}= {text}" for name, text in row.options.items()]
    lines += [f"licence: {row.licence}", f"downloads: {row.downloads}", f"package: {row.package}"]
    return "\n".join(lines)


def _row(kind: str, package: str) -> TeacherRow:
    try:
        info = load(kind).info
    except TeacherError as error:
        return TeacherRow(kind=kind, package=package, problem=str(error))
    return TeacherRow(
        kind=kind,
        package=package,
        argument=info.argument,
        summary=info.summary,
        licence=info.licence,
        downloads=info.downloads,
        options=dict(info.options),
    )


@app.command("import-l4p")
def import_l4p(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="The original PyTorch-Lightning checkpoint.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder for config.json and safetensors.")],
    num_heads: Annotated[int, typer.Option(min=1, help="Attention heads; shapes cannot tell.")] = 16,
    taps: Annotated[str, typer.Option(help="The four layers the heads read, from shallow to deep.")] = "14,21,28,36",
    as_json: JsonFlag = False,
) -> None:
    """Convert an original L4P checkpoint to safetensors, for `--teacher l4p:OUT`. Nothing in it is executed.

    Examples:

      p4dprep teachers import-l4p l4p.ckpt ./l4p

      p4dprep teachers import-l4p small.ckpt ./small --num-heads 8 --taps 3,6,9,12
    """
    # The only line of the command line that imports a teacher: the import is that teacher's own business.
    from teachers.l4p import import_checkpoint

    if not checkpoint.is_file():
        raise RequestError(f"there is no checkpoint file {checkpoint}")
    import_checkpoint(checkpoint, out, num_heads=num_heads, taps=_parse_taps(taps))
    if as_json:
        typer.echo(json.dumps({"teacher": f"l4p:{out}", "folder": str(out)}))
    else:
        typer.echo(f"wrote {out}; use it with --teacher l4p:{out}")


def _parse_taps(text: str) -> tuple[int, int, int, int]:
    try:
        first, second, third, fourth = (int(part) for part in text.split(","))
    except ValueError:
        raise RequestError(f"--taps {text} is not four layer numbers such as 14,21,28,36") from None
    if not 0 <= first < second < third < fourth:
        raise RequestError(f"--taps {text} must ascend, from the shallowest layer to the deepest")
    return first, second, third, fourth
