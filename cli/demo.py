"""`p4dprep demo`: the main job from nothing to a taught student and its report, on worlds that it makes itself."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cli._output import console
from p4dprep.errors import CorruptDataError, RequestError

if TYPE_CHECKING:
    from p4dprep.cache import Cache

NUM_CLIPS: dict[Literal["train", "test"], int] = {"train": 8, "test": 4}
SEED = 7
TEACHER = "l4p:mini"
BASELINE = "opencv-dis"
TRAINING: dict[str, Any] = {
    "tune": "all",  # the student starts from random weights: there is no vision tower worth keeping
    "max_steps": 160,
    "batch_size": 4,
    "micro_batch_size": 4,
    "learning_rate": 2e-3,
    "decoder_width": 256,
    "log_steps": 10,
    "save_steps": 80,
    "picture_steps": 80,
}


def demo(
    out: Annotated[Path, typer.Argument(help="Folder for everything that is made.")] = Path("demo"),
    videos: Annotated[str | None, typer.Option(help="Your own folder, glob or URL instead of made-up worlds.")] = None,
) -> None:
    """Make worlds, extract depth, flow, motion, rays and latents, judge them, teach a student, export it, question it.

    No download, no GPU, and no teacher during training. The teachers are `l4p:mini`, a small network of the paper's
    architecture that was trained on other worlds, and OpenCV's DIS flow. The student is a video language model of half
    a million random parameters. With your own videos it learns from them without text.

    **Examples**

        p4dprep demo

        p4dprep demo out --videos my_videos
    """
    out.mkdir(parents=True, exist_ok=True)
    if videos is None:
        _make_worlds(out)
        _judge(_extract(str(_manifest(out, "test")), out / "test" / "cache", "truth", TEACHER, BASELINE), out)
        source, qa = str(_manifest(out, "train")), [out / "train" / "worlds" / "qa.json"]
        _extract(source, out / "train" / "cache", TEACHER)
    else:
        qa = []
        _show(_extract(videos, out / "train" / "cache", TEACHER, BASELINE), out)
    _teach(out, qa)
    _export(out)
    if qa:
        _ask(out)
    _report(out, is_judged=bool(qa))
    _say(
        "l4p:mini is a network of 4.5 M parameters that a CPU trained on other worlds, not the paper's of 1.3 B "
        "(teachers/l4p/mini/README.md). The student began with random weights and saw a few clips for minutes. Its "
        "answers are as good as guesses and its maps as a rough mean: this proves the plumbing, and says nothing about "
        "how good a student becomes."
    )


def _say(text: str) -> None:
    console.print(text, markup=False, highlight=False)


def _step(name: str, what: str) -> None:
    console.print(f"[bold]{name}[/] ", end="", highlight=False)
    _say(what)


def _manifest(out: Path, split: str) -> Path:
    return out / split / "worlds" / "manifest.jsonl"


def _make_worlds(out: Path) -> None:
    from cli import worlds
    from p4dprep.worlds.write import Recipe

    for split, num_clips in NUM_CLIPS.items():
        folder = _manifest(out, split).parent
        _step("worlds", f"{num_clips} for {'teaching' if split == 'train' else 'judging'} -> {folder}")
        worlds.make(folder, Recipe(split=split, seed=SEED, size=None), num_clips, None)


def _extract(source: str, folder: Path, *teachers: str) -> "Cache":
    from cli import extract
    from p4dprep.cache import Cache, verify
    from p4dprep.extract import parse_config
    from teachers.l4p import MINI_FOLDER, L4PConfig

    _step("extract", f"{source} -> {folder}")
    size = L4PConfig.load(MINI_FOLDER).image_size
    request = {"source": source, "cache": str(folder), "teachers": teachers, "size": size}
    report = extract.run(parse_config(request))
    extract.show_report(report)
    if not report.committed + report.skipped:
        raise RequestError(f"no clip of {source} could be extracted; the reasons stand above")
    made = Cache.open(str(folder))
    verified = verify(made)
    if not verified.ok:
        raise CorruptDataError(f"{len(verified.problems)} objects of {folder} are not what was committed")
    _say(f"verified: {verified.num_objects} objects, every digest as committed")
    return made


def _judge(made: "Cache", out: Path) -> None:
    from cli import eval
    from p4dprep.evaluate import evaluate_maps

    _step("judge", "the teachers by the truth of clips they never saw")
    eval.show(evaluate_maps(made, made, groups=("l4p", "opencv_dis"), truth_group="truth"))
    _show(made, out)


def _show(made: "Cache", out: Path) -> None:
    from cli import cache

    page = out / "pictures.html"
    cache.write_page(made.store.url, page)
    _say(f"pictures: {page}")


def _teach(out: Path, qa: list[Path]) -> None:
    from cli import train
    from student.new import new_student, texts_of_conversations, texts_of_worlds

    student, run = out / "student", out / "run"
    if not student.exists():
        new_student(student, texts_of_conversations(qa) if qa else texts_of_worlds())
    _step("train", f"{student} by {'text and ' if qa else ''}{out / 'train' / 'cache'} -> {run}")
    request = {"cache": str(out / "train" / "cache"), "qa": tuple(map(str, qa)), "student": str(student)}
    places = {"out": str(run), "media": str(qa[0].parent) if qa else None}
    # The same command again goes on where it was cut off.
    train.show_report(train.run(TRAINING | request | places, resume=True))


def _export(out: Path) -> None:
    from cli import export

    if not (out / "exported").exists():
        _step("export", f"{out / 'run'} -> {out / 'exported'}")
        export.export(out / "run", out / "exported")


def _ask(out: Path) -> None:
    from cli import answers

    _step("ask", f"{out / 'run'} about worlds it never saw -> {out / 'answers'}")
    # In the words of training: a student of this size knows no others.
    answers.answers(
        str(out / "run"), bench="worlds", data=_manifest(out, "test").parent, out=out / "answers", mode="both"
    )


def _report(out: Path, *, is_judged: bool) -> None:
    from student.report import ReportRequest, write_report

    request = ReportRequest(run=out / "run", out=out / "report.html")
    if is_judged:
        held_out = str(out / "test" / "cache")
        request = replace(
            request,
            cache=held_out,
            against=held_out,
            answers=(out / "answers",),
            data=(_manifest(out, "test").parent,),
        )
    _step("report", str(write_report(request)))
