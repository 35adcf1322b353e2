"""`p4dprep student`: students made from nothing."""

from pathlib import Path
from typing import Annotated

import typer

from cli._output import console, human_bytes

app = typer.Typer(no_args_is_help=True, help="Make a student.")


@app.command("new")
def new(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.", show_default=False)],
    size: Annotated[
        str, typer.Option(help="`tiny`, a Qwen2.5-VL, or `small`, a LLaVA-OneVision, whose steps are cheaper.")
    ] = "tiny",
    qa: Annotated[
        list[Path] | None,
        typer.Option(
            help="LLaVA JSON whose texts the tokenizer is built from; repeat for several.  "
            "[default: what `p4dprep worlds` asks]",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the random weights.")] = 0,
) -> None:
    """Make a video language model with random weights: small enough for a CPU, in the hub's own format.

    It knows nothing until it is trained, and proves plumbing, not quality. The same inputs give the same bytes.

    **Examples**

        p4dprep student new student --qa worlds/train/qa.json
    """
    from student.new import new_student, texts_of_conversations, texts_of_worlds

    folder = new_student(out, texts_of_conversations(qa) if qa else texts_of_worlds(), size=size, seed=seed)
    num_parameters, num_tokens, size_bytes = _measure(folder)
    asked = " ".join(f"--qa {path}" for path in qa or [Path("QA.json")])
    console.print(
        f"{folder}: {size}, random weights, {num_parameters:,} parameters, {num_tokens:,} tokens, "
        f"{human_bytes(size_bytes)}\ntrain it: p4dprep train CACHE {asked} --student {folder} --out RUN --tune all "
        "--learning-rate 1e-3",
        markup=False,
        highlight=False,
    )


def _measure(folder: Path) -> tuple[int, int, int]:
    """Parameters, tokens and bytes of the weights."""
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    weights = folder / "model.safetensors"
    num_parameters = sum(each.numel() for each in load_file(weights).values())
    return num_parameters, len(AutoTokenizer.from_pretrained(folder)), weights.stat().st_size
