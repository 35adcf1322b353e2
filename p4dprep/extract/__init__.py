"""Plan, fingerprint, the Ray pipeline, resume and report."""

import time

from p4dprep.extract.config import ExtractConfig, parse_config
from p4dprep.extract.cost import CostEstimate, estimate_cost
from p4dprep.extract.job import GroupProgress, Progress, run_job, start_ray
from p4dprep.extract.plan import JobPlan, make_plan
from p4dprep.extract.report import ExtractReport, make_report

__all__ = [
    "CostEstimate",
    "ExtractConfig",
    "ExtractReport",
    "GroupProgress",
    "JobPlan",
    "Progress",
    "estimate_cost",
    "extract",
    "make_plan",
    "parse_config",
]


def extract(config: ExtractConfig, progress: Progress = lambda _: None) -> ExtractReport:
    """Run the teachers over the corpus and commit their targets to the cache; only what is missing is computed.

    Args:
        config: the request.
        progress: called after every change with the state of each teacher.

    Raises:
        RequestError: the request is wrong; nothing was computed.
        P4DError: the job had to stop; what was committed stays, and the same request goes on from there.
    """
    start = time.perf_counter()
    plan = make_plan(config)
    done = [GroupProgress(name=group.config.group, num_todo=0) for group in plan.groups]
    if any(len(group.todo) for group in plan.groups):
        start_ray(config.address)
        done = run_job(plan, config.address, progress)
    return make_report(plan, done, time.perf_counter() - start)
