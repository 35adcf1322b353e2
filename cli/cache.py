"""`p4dprep cache info|verify|show|gc`: look into a cache, check every byte, look at pictures, clean up."""

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import numpy as np
import typer
from numpy.typing import NDArray

from cli._output import (
    CacheArgument,
    JsonFlag,
    StorageOptions,
    console,
    human_bytes,
    print_json,
    printable,
    progress_bar,
)
from p4dprep.errors import MissingDataError, P4DError, RequestError
from p4dprep.targets import Quantity

if TYPE_CHECKING:
    from p4dprep.cache import Cache, CacheInfo, ClipStates, GroupInfo
    from p4dprep.pictures import RGB, Card, Table
    from p4dprep.video import Decoder

app = typer.Typer(no_args_is_help=True)

MAX_LINES = 20
"""Problems or keys listed on a screen; --json has them all."""

MAX_REASONS = 5


@app.command()
def info(cache: CacheArgument, storage_options: StorageOptions = None, json: JsonFlag = False) -> None:
    """Show what a cache holds: sampling, clips per state, bytes, targets, reasons of failure.

    **Examples**

        p4dprep cache info cache/

        p4dprep cache info s3://bucket/cache --json
    """
    from p4dprep import cache as caches

    found = caches.info(caches.Cache.open(cache, storage_options))
    if json:
        print_json({**vars(found), "groups": [_group_record(group) for group in found.groups]})
        return
    lines = [f"cache     {found.url}", f"clips     {found.num_clips}", f"sampling  {_sampling_text(found)}"]
    for group in found.groups:
        lines += ["", *_group_lines(group)]
    typer.echo("\n".join(printable(line) for line in lines))


def _group_record(group: "GroupInfo") -> dict[str, Any]:
    return {**vars(group), "coverage": _coverage(group), "fp32_fraction": _fp32_fraction(group)}


def _coverage(group: "GroupInfo") -> float:
    return group.num_committed / max(1, group.num_committed + group.num_failed + group.num_missing)


def _fp32_fraction(group: "GroupInfo") -> float:
    """Committed bytes as a share of the same numbers in float32; NaN if nothing is committed."""
    num_values = sum(int(np.prod(target.shape)) for target in group.targets) * group.num_committed
    return group.num_bytes / (4 * num_values) if num_values else float("nan")


def _sampling_text(found: "CacheInfo") -> str:
    fields = found.sampling
    pace = f" at {fields['fps']} fps, stride {fields['stride_frames']}" if fields["plan"] == "windows" else ""
    size = f"{fields['height']} x {fields['width']} px (height x width), {fields['resize']}"
    return f"{fields['plan']}, {fields['num_frames']} frames{pace}, {size}"


def _states_text(group: "GroupInfo") -> str:
    counts = f"{group.num_committed} committed, {group.num_failed} failed, {group.num_missing} missing"
    return f"{counts} ({_coverage(group):.1%})"


def _bytes_text(group: "GroupInfo") -> str:
    share = f" ({_fp32_fraction(group):.1%} of float32)" if group.num_committed else ""
    return f"{human_bytes(group.num_bytes)}{share}"


def _group_lines(group: "GroupInfo") -> Iterator[str]:
    yield f"{group.name}  ({group.teacher}, fingerprint {group.fingerprint_digest[:12]})"
    yield f"  clips   {_states_text(group)}"
    yield f"  bytes   {_bytes_text(group)}"
    for target in group.targets:
        shape = " x ".join(str(size) for size in target.shape)
        facts = f"{target.quantity} [{target.units}], {shape}, {target.encoding}, {human_bytes(target.num_bytes)}"
        yield f"  target  {target.array}: {facts}"
    for failure, count in list(group.failures.items())[:MAX_REASONS]:
        yield f"  failed  {count} x {failure}, such as: {group.example_reasons[failure]}"
    if len(group.failures) > MAX_REASONS:
        yield f"  failed  {len(group.failures) - MAX_REASONS} further kinds of failure; --json has them all"


@app.command()
def verify(cache: CacheArgument, storage_options: StorageOptions = None, json: JsonFlag = False) -> None:
    """Read every committed object and compare it with its record.

    Exit code 0: all is as committed; 1: something is gone or damaged; 2: there is no cache.

    **Examples**

        p4dprep cache verify cache/

        p4dprep cache verify s3://bucket/cache --json
    """
    from p4dprep import cache as caches

    opened = caches.Cache.open(cache, storage_options)
    with progress_bar() as bar:
        task = bar.add_task("verifying", total=None)
        report = caches.verify(opened, lambda done, total: bar.update(task, completed=done, total=total))
    if json:
        print_json({"ok": report.ok, **vars(report)})
    else:
        for problem in report.problems[:MAX_LINES]:
            typer.echo(printable(f"{problem.kind}: {problem.key}: {problem.message}"))
        if len(report.problems) > MAX_LINES:
            typer.echo(f"... and {len(report.problems) - MAX_LINES} more; --json lists them all")
        checked = f"{report.num_objects} objects, {human_bytes(report.num_bytes)}"
        found = "all as committed" if report.ok else f"{len(report.problems)} problems"
        typer.echo(f"{found} ({checked} checked)")
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def gc(
    cache: CacheArgument,
    yes: Annotated[bool, typer.Option("--yes", help="Delete; without it the objects are only listed.")] = False,
    min_age_seconds: Annotated[
        float, typer.Option(min=0, help="Keep younger objects: a running job may be about to commit them.")
    ] = 3600.0,
    storage_options: StorageOptions = None,
    json: JsonFlag = False,
) -> None:
    """Find what no commit record refers to, and with --yes delete it. Run it while no job writes to the cache.

    **Examples**

        p4dprep cache gc cache/

        p4dprep cache gc cache/ --yes --min-age-seconds 86400
    """
    from p4dprep import cache as caches

    opened = caches.Cache.open(cache, storage_options)
    report = caches.gc(opened, delete=yes, min_age_seconds=min_age_seconds)
    if json:
        print_json({**vars(report), "num_bytes": report.num_bytes})
        return
    for key, size in list(report.unreferenced.items())[:MAX_LINES]:
        typer.echo(printable(f"{human_bytes(size):>10}  {key}"))
    if len(report.unreferenced) > MAX_LINES:
        typer.echo(f"... and {len(report.unreferenced) - MAX_LINES} more; --json lists them all")
    done = "deleted" if report.deleted else "to delete with --yes"
    young = f"; {report.num_too_young} younger than {min_age_seconds:g} s kept" if report.num_too_young else ""
    typer.echo(f"{len(report.unreferenced)} objects, {human_bytes(report.num_bytes)}, {done}{young}")


@app.command()
def show(
    cache: CacheArgument,
    clip: Annotated[
        str | None, typer.Argument(metavar="CLIP", help="Id or index of a clip.", show_default=False)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="PNG file or folder for strips.  [default: this folder]")] = None,
    html: Annotated[Path | None, typer.Option(help="HTML file to write.  [default: CACHE's name]")] = None,
    num_clips: Annotated[int, typer.Option(min=1, help="Clips on the page, when no clip is named.")] = 6,
    seed: Annotated[int, typer.Option(min=0, help="Chooses the clips of the page.")] = 0,
    storage_options: StorageOptions = None,
    json: JsonFlag = False,
) -> None:
    """Draw a clip as a PNG strip, or a sample of clips as one self-contained HTML page.

    Frames are those kept in the cache, or decoded again from the source; where it is gone or its times differ, the
    targets are drawn without.

    **Examples**

        p4dprep cache show cache/ --num-clips 12

        p4dprep cache show cache/ 0 --out strip.png

        p4dprep cache show cache/ dog.mp4 --html dog.html
    """
    from p4dprep.cache import Cache

    if clip is None and out is not None and out.suffix.lower() == ".png":
        raise RequestError(f"--out {out} is one picture; name a CLIP, or give a folder")
    opened = Cache.open(cache, storage_options)
    states = {name: opened.group(name).states() for name in opened.groups()}
    indices = [_find_clip(opened, clip)] if clip is not None else _sample(states, num_clips, seed)
    cards = _draw_clips(opened, states, indices, storage_options)
    strips = _write_strips(cards, out or Path()) if clip is not None or out is not None else []
    page = html or (None if strips else Path(f"{_file_name(_cache_name(cache))}.html"))
    if page is not None:
        _write_html(opened, cards, page, cache)
    if json:
        notes = {card.clip_id: card.note for card in cards if card.note}
        print_json({"clips": [card.clip_id for card in cards], "png": strips, "html": page, "notes": notes})
        return
    for card in cards:
        if card.note:
            console.print(f"{printable(card.clip_id)}: {printable(card.note)}", markup=False, highlight=False)
    for path in [*strips, *([page] if page else [])]:
        typer.echo(path)


def write_page(
    cache: str,
    path: Path,
    *,
    storage_options: Mapping[str, Any] | None = None,
    num_clips: int = 6,
    seed: int = 0,
) -> None:
    """Write the page of pictures of a sample of committed clips.

    Raises:
        CacheFormatError: there is no cache.
        CorruptDataError: a committed object is gone or damaged.
    """
    from p4dprep.cache import Cache

    opened = Cache.open(cache, storage_options)
    states = {name: opened.group(name).states() for name in opened.groups()}
    cards = _draw_clips(opened, states, _sample(states, num_clips, seed), storage_options)
    _write_html(opened, cards, path, cache)


def _find_clip(cache: "Cache", clip: str) -> int:
    """The index of a clip given by id, or else by index."""
    ids: list[str] = cache.clips().column("id").to_pylist()
    if clip in ids:
        return ids.index(clip)
    if clip.isdecimal() and int(clip) < len(ids):
        return int(clip)
    raise MissingDataError(f"{cache.store.url} has no clip {clip!r}; it has {len(ids)}, by id or from index 0")


def _sample(states: Mapping[str, "ClipStates"], num_clips: int, seed: int) -> list[int]:
    """Indices of clips that at least one teacher has done, chosen at random, in order."""
    if not states:
        return []
    done = np.flatnonzero(np.any([state.ok for state in states.values()], axis=0))
    chosen = np.random.default_rng(seed).permutation(done)[:num_clips]
    return [int(index) for index in np.sort(chosen)]


def _draw_clips(
    cache: "Cache", states: Mapping[str, "ClipStates"], indices: list[int], storage_options: Mapping[str, Any] | None
) -> list["Card"]:
    from p4dprep.video import Decoder

    with Decoder() as decoder, progress_bar() as bar:
        return [
            _draw_clip(cache, states, index, decoder, storage_options)
            for index in bar.track(indices, description="drawing")
        ]


def _draw_clip(
    cache: "Cache",
    states: Mapping[str, "ClipStates"],
    index: int,
    decoder: "Decoder",
    storage_options: Mapping[str, Any] | None,
) -> "Card":
    """One clip with all that is committed of it; what is missing and why goes into the note."""
    from p4dprep import pictures

    clip = cache.clips().slice(index, 1).to_pylist()[0]
    notes = [_why_absent(name, state, index) for name, state in states.items() if not state.ok[index]]
    groups = [cache.group(name) for name, state in states.items() if state.ok[index]]
    if not groups:
        empty = np.zeros(0, np.float64)
        return pictures.Card(
            clip_id=clip["id"], uri=clip["uri"], facts=(), rows=(), time_seconds_t=empty, note="; ".join(notes)
        )
    times = groups[0].read_time(index)
    frames, problem = read_frames(cache, clip, times, decoder, storage_options)
    pairs = [(group, spec) for group in groups for spec in group.targets]
    pairs.sort(key=lambda pair: get_args(Quantity).index(pair[1].quantity))
    rows = [] if frames is None else [pictures.frame_row(frames)]
    for group, spec in pairs:
        rows += pictures.target_rows(group.name, spec, group.read(index, spec.name), frames)
    result = groups[0].ledger.clip(index)
    num_distinct = result.num_distinct_frames if result else 0
    return pictures.Card(
        clip_id=clip["id"],
        uri=clip["uri"],
        facts=(f"{times[0]:.2f} to {times[-1]:.2f} s", f"{len(times)} frames, {num_distinct} distinct"),
        rows=tuple(rows),
        time_seconds_t=times,
        note="; ".join([*notes, *([problem] if problem else [])]),
    )


def _why_absent(name: str, states: "ClipStates", index: int) -> str:
    reason = states.reasons.get(index)
    return f"{name} failed: {reason[1]}" if reason else f"{name} is not committed"


def read_frames(
    cache: "Cache",
    clip: Mapping[str, Any],
    times: NDArray[np.float64],
    decoder: "Decoder",
    storage_options: Mapping[str, Any] | None,
) -> tuple["RGB | None", str]:
    """The clip's frames, as the cache keeps them or decoded again.

    None and why: the source is gone, broken, or no longer the one that the teachers saw.
    """
    from p4dprep.video import local_copy

    kept = _kept_frames(cache, clip["index"])
    if kept is not None:
        return kept, ""
    try:
        with local_copy(clip["uri"], storage_options) as video:
            read = decoder.read(video.path, cache.sampling, clip.get("start_seconds"), clip.get("end_seconds"))
    except P4DError as error:
        return None, f"drawn without its frames: the source {error}"
    if not np.array_equal(read.time_seconds_t, times):
        return None, "drawn without its frames: the source's frame times differ from the cached ones; was it replaced?"
    return read.frames_thwc, ""


def _kept_frames(cache: "Cache", index: int) -> "RGB | None":
    """Frames of a clip that the cache keeps, of the first size that there is."""
    for group in map(cache.group, cache.groups()):
        for spec in group.targets:
            if spec.quantity == "rgb frames":
                with contextlib.suppress(MissingDataError):
                    return group.read(index, spec.name)
    return None


def _file_name(text: str) -> str:
    """A file name that any disk takes; ids and URLs hold slashes and worse."""
    return re.sub(r"[^\w.-]+", "_", text).strip("._")[:100] or "cache"


def _cache_name(url: str) -> str:
    """Last part of a cache's path or URL."""
    return url.split("?")[0].rstrip("/").rsplit("/", 1)[-1] if "://" in url else Path(url).absolute().name


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the disk refuses into a request's error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise RequestError(f"cannot write {path}: {error.strerror or error}") from None


def _write_strips(cards: list["Card"], out: Path) -> list[Path]:
    """One PNG per clip, at `out` if it ends in .png, else in that folder."""
    from p4dprep import pictures

    paths: list[Path] = []
    for card in cards:
        if not card.rows:
            raise MissingDataError(f"there is nothing to draw of clip {card.clip_id}: {card.note}")
        path = out if out.suffix.lower() == ".png" else out / f"{_file_name(card.clip_id)}.png"
        if path in paths:  # two ids can shorten to one file name
            path = path.with_stem(f"{path.stem}_{len(paths)}")
        title = f"{printable(card.clip_id)}   {'   '.join(card.facts)}"
        with writing(path):
            pictures.strip(card.rows, card.time_seconds_t, title=title).save(path, "PNG")
        paths.append(path)
    return paths


def _write_html(cache: "Cache", cards: list["Card"], path: Path, url: str) -> None:
    from p4dprep import cache as caches
    from p4dprep import pictures

    found = caches.info(cache)
    facts = [("clips", str(found.num_clips)), ("sampling", _sampling_text(found))]
    facts += [("bytes", human_bytes(sum(group.num_bytes for group in found.groups))), ("cache", found.url)]
    page = pictures.gallery_html(title=_cache_name(url), facts=facts, tables=_tables(found), cards=cards)
    with writing(path):
        path.write_text(page, encoding="utf-8")


def _tables(found: "CacheInfo") -> list["Table"]:
    from p4dprep.pictures import Table

    teachers = Table(
        title="Teachers",
        columns=("name", "teacher", "licence", "fingerprint", "clips", "bytes"),
        rows=tuple(
            (g.name, g.teacher, _licence(g), g.fingerprint_digest[:12], _states_text(g), _bytes_text(g))
            for g in found.groups
        ),
    )
    targets = Table(
        title="Targets",
        columns=("target", "quantity", "units", "shape", "encoding", "bytes"),
        rows=tuple(
            (t.array, t.quantity, t.units, " x ".join(map(str, t.shape)), t.encoding, human_bytes(t.num_bytes))
            for group in found.groups
            for t in group.targets
        ),
    )
    failures = Table(
        title="Failures",
        columns=("teacher", "clips", "failure", "such as"),
        rows=tuple(
            (group.name, str(count), failure, group.example_reasons[failure])
            for group in found.groups
            for failure, count in group.failures.items()
        ),
    )
    return [teachers, targets, failures]


def _licence(group: "GroupInfo") -> str:
    """The licence that the installed teacher of this kind declares; the weights' own card may say more."""
    from p4dprep import registry

    if any(target.quantity == "rgb frames" for target in group.targets):
        return "that of the videos"
    try:
        return registry.load(registry.parse_teacher(group.teacher).kind).info.licence
    except P4DError:
        return "unknown here"
