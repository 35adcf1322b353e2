"""The benchmarks by name. A new one is one file and one line here."""

from p4dprep.errors import RequestError
from student.evaluate.benchmark import Benchmark
from student.evaluate.mmsi_bench import MMSIBench
from student.evaluate.omnispatial import OmniSpatial
from student.evaluate.r4d_bench import R4DBench
from student.evaluate.sat import SAT
from student.evaluate.sti_bench import STIBench
from student.evaluate.time_bench import TimeBench
from student.evaluate.vlm4d import VLM4D
from student.evaluate.vsti_bench import VSTIBench
from student.evaluate.worlds import Worlds

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        R4DBench(),
        STIBench(),
        VLM4D(),
        VSTIBench(),
        SAT(),
        MMSIBench(),
        OmniSpatial(),
        TimeBench(),
        Worlds(),
    )
}


def find(name: str) -> Benchmark:
    """A benchmark by its name.

    Raises:
        RequestError: there is none of that name.
    """
    if name not in BENCHMARKS:
        raise RequestError(f"benchmark {name!r} does not exist; there are {', '.join(sorted(BENCHMARKS))}")
    return BENCHMARKS[name]
