"""`p4dprep ablate`: the same student taught in several ways, asked the same questions."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli._output import JsonFlag, console, print_json, read_yaml

if TYPE_CHECKING:
    from student.ablate import AblationConfig, Results


def ablate(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file.", show_default=False)],
    shard: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="Do every N-th arm and seed from I (0 to N-1), for N jobs; no table."),
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Train and score each arm of CONFIG with each seed, and put them into one table with intervals.

    The same command goes on where it was cut off. With --shard, N jobs share the arms and seeds; afterwards the same
    command without it makes the tables. docs/ablation.md has a whole CONFIG for the paper's Tables 4 to 6.

    **Examples**

        p4dprep ablate ablation.yaml
    """
    from cli.answers import parse_shard
    from student.ablate import parse_config

    results = run(parse_config(read_yaml(config)), (0, 1) if shard is None else parse_shard(shard))
    if json:
        print_json(results)


def run(request: "AblationConfig", shard: tuple[int, int] = (0, 1)) -> "Results":
    """Ablate with a progress display on stderr; the tables go to stderr too."""
    from cli.train import progress_display
    from student import ablate as engine

    with progress_display() as show:
        results = engine.ablate(
            request,
            shard=shard,
            show=show,
            show_part=lambda part: console.print(f"[bold]ablate[/] {part}", highlight=False),
        )
    done = engine.markdown(results, request) if results else "done; without --shard all are put into tables"
    console.print(done, markup=False, highlight=False)
    return results
