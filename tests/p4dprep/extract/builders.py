"""Small corpora and requests for the tests of extraction."""

from pathlib import Path
from typing import Any

from p4dprep.extract import ExtractConfig, make_plan, parse_config
from p4dprep.extract.worker import UnitReport, Worker
from p4dprep.storage import Store, sha256_hex
from tests.discs import draw_discs, write_clip


def write_corpus(folder: Path, num_clips: int, *, num_frames: int = 20) -> Path:
    """Clips `clip_00.mp4` and so on, each with its own content."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(num_clips):
        write_clip(folder / f"clip_{seed:02d}.mp4", draw_discs(seed)[:num_frames])
    return folder


def make_request(source: object, cache: object, *teachers: str, **changes: Any) -> ExtractConfig:
    """A request for few small frames, which a test can afford."""
    fields = {"source": str(source), "cache": str(cache), "teachers": teachers, "frames": 4, "size": 32}
    return parse_config(fields | changes)


def extract_here(request: ExtractConfig) -> dict[str, list[UnitReport]]:
    """What a job does, without Ray: every unit that is missing, per group."""
    plan = make_plan(request)
    reports: dict[str, list[UnitReport]] = {}
    for group in plan.groups:
        worker = Worker(group.on(0).config) if len(group.todo) else None
        reports[group.config.group] = [worker.run(task) for task in plan.tasks(group)] if worker else []
        if worker:
            worker.close()
    return reports


def data_digests(cache: object, storage_options: dict[str, Any] | None = None) -> dict[str, str]:
    """Key to SHA-256 of every object that holds clips' data, of all arrays."""
    store = Store(str(cache), storage_options)
    keys = [key for key in store.list() if not key.startswith(("ledger/", "heads/", "clips.parquet/"))]
    return {key: sha256_hex(store.get(key)) for key in keys if not key.endswith("zarr.json")}
