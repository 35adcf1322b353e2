"""Planning a large manifest: seconds, and memory over what the imports take, in a process of its own.

    python -m benchmarks.planning [--num-clips 1000000]

Goals: a million clips in <= 60 s and <= 300 MiB over the baseline.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

from p4dprep import registry
from p4dprep.extract import make_plan, parse_config


def write_manifest(path: Path, num_clips: int) -> None:
    """JSON lines with ids, uris, ranges and a column of the user's own."""
    with path.open("w") as file:
        for index in range(num_clips):
            clip = {
                "id": f"clip-{index:07d}",
                "uri": f"/data/videos/shard-{index // 1000:04d}/clip-{index:07d}.mp4",
                "start_seconds": 0.0,
                "end_seconds": 8.0 + index % 7,
                "caption": f"a caption of clip {index}",
            }
            file.write(json.dumps(clip) + "\n")


def peak_mib() -> float:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Plan once, hand out every unit once, and print a JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-clips", type=int, default=1_000_000)
    options = parser.parse_args()
    registry.load("opencv-dis")
    with tempfile.TemporaryDirectory() as name:
        manifest = Path(name) / "manifest.jsonl"
        write_manifest(manifest, options.num_clips)
        baseline, start = peak_mib(), time.perf_counter()
        request = {"source": str(manifest), "cache": f"{name}/cache", "teachers": ("opencv-dis",)}
        plan = make_plan(parse_config(request))
        found = {"clips": options.num_clips, "plan_seconds": round(time.perf_counter() - start, 2)}
        found["plan_mib_over_baseline"] = round(peak_mib() - baseline)
        start = time.perf_counter()
        num_clips = sum(len(task.clips) for task in plan.tasks(plan.groups[0]))
        assert num_clips == options.num_clips
        found["handing_out_seconds"] = round(time.perf_counter() - start, 2)
        found["all_mib_over_baseline"] = round(peak_mib() - baseline)
    print(json.dumps(found | {"goals": {"plan_seconds": 60, "plan_mib_over_baseline": 300}}))


if __name__ == "__main__":
    main()
