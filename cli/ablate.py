"""`p4dprep ablate`: the same student taught in several ways, asked the same questions."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli._output import JsonFlag, console, print_json, read_yaml

if TYPE_CHECKING:
    from student.ablate import AblationConfig, ArmResult


def ablate(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file.", show_default=False)],
    json: JsonFlag = False,
) -> None:
    """Train and score each arm of CONFIG with each seed, and put them into one table with intervals.

    The same command goes on where it was cut off. docs/ablation.md has a whole CONFIG for the paper's Tables 4 to 6.

    **Examples**

        p4dprep ablate ablation.yaml
    """
    from student.ablate import parse_config

    results = run(parse_config(read_yaml(config)))
    if json:
        print_json(results)


def run(request: "AblationConfig") -> "tuple[ArmResult, ...]":
    """Ablate with a progress display on stderr; the table goes to stderr too."""
    from cli.train import progress_display
    from student import ablate as engine

    with progress_display() as show:
        results = engine.ablate(
            request, show=show, show_arm=lambda arm: console.print(f"[bold]arm[/] {arm}", highlight=False)
        )
    console.print(engine.markdown(results, request), markup=False, highlight=False)
    return results
