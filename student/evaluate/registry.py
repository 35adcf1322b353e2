"""The benchmarks by name. A new one is one file and one line here."""

from p4dprep.errors import RequestError
from student.evaluate.benchmark import Benchmark

BENCHMARKS: dict[str, Benchmark] = {}


def find(name: str) -> Benchmark:
    """A benchmark by its name.

    Raises:
        RequestError: there is none of that name.
    """
    if name not in BENCHMARKS:
        raise RequestError(f"benchmark {name!r} does not exist; there are {', '.join(sorted(BENCHMARKS))}")
    return BENCHMARKS[name]
