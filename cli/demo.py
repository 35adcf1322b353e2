"""`p4dprep demo`: the main job from nothing to pictures, on worlds that it makes itself."""

from pathlib import Path
from typing import Annotated

import typer

from cli._output import console
from p4dprep.errors import CorruptDataError, RequestError

NUM_CLIPS = 6
SEED = 7
TEACHERS = ("l4p:mini", "opencv-dis")


def demo(
    out: Annotated[Path, typer.Argument(help="Folder for clips, cache and the page of pictures.")] = Path("demo"),
    videos: Annotated[str | None, typer.Option(help="Your own folder, glob or URL instead of made-up worlds.")] = None,
) -> None:
    """Make worlds, extract depth, flow, motion, rays and latents from them, judge and show them; no download, no GPU.

    The teachers are `l4p:mini`, a small network of the paper's architecture that was trained on other worlds, and
    OpenCV's DIS flow. Since the truth of a world is known, the demo ends with how far they are from it.

    **Examples**

        p4dprep demo

        p4dprep demo out --videos my_videos
    """
    from cli import cache, eval, extract, worlds
    from p4dprep.cache import Cache, verify
    from p4dprep.evaluate import evaluate_maps
    from p4dprep.extract import parse_config
    from p4dprep.worlds.write import Recipe
    from teachers.l4p import MINI_FOLDER, L4PConfig

    out.mkdir(parents=True, exist_ok=True)
    source, teachers = videos, list(TEACHERS)
    if source is None:
        console.print(f"[bold]worlds[/] -> {out / 'worlds'}", highlight=False)
        worlds.make(out / "worlds", Recipe(split="test", seed=SEED, size=None), NUM_CLIPS, None)
        source, teachers = str(out / "worlds" / "manifest.jsonl"), ["truth", *TEACHERS]
    console.print(f"[bold]extract[/] {source} -> {out / 'cache'}", highlight=False)
    size = L4PConfig.load(MINI_FOLDER).image_size
    report = extract.run(
        parse_config({"source": source, "cache": str(out / "cache"), "teachers": tuple(teachers), "size": size})
    )
    extract.show_report(report)
    if not report.committed + report.skipped:
        raise RequestError(f"no clip of {source} could be extracted; the reasons stand above")
    made = Cache.open(str(out / "cache"))
    verified = verify(made)
    if not verified.ok:
        raise CorruptDataError(f"{len(verified.problems)} objects of {out / 'cache'} are not what was committed")
    console.print(f"verified: {verified.num_objects} objects, every digest as committed", highlight=False)
    if videos is None:
        eval.show(evaluate_maps(made, made, groups=("l4p", "opencv_dis"), truth_group="truth"))
    page = out / "pictures.html"
    cache.write_page(str(out / "cache"), page)
    console.print(f"pictures: {page}", markup=False, highlight=False)
    console.print(
        "l4p:mini is a network of 4.5 M parameters that a CPU trained on other worlds, not the paper's of 1.3 B: "
        "teachers/l4p/mini/README.md says what it can and cannot do.",
        markup=False,
    )
