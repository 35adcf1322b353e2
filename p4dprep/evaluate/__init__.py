"""The maps of one cache against the truth in another: clips joined by id, scores pooled, intervals, worst clips.

`p4dprep.metrics` has the rules of each score, docs/eval.md all of them in words.
"""

from p4dprep.evaluate.clip import MapPair
from p4dprep.evaluate.report import Bucket, ClipScores, Comparison, MapReport, Metric, MetricInfo, Skipped, metric_info
from p4dprep.evaluate.run import evaluate_maps, read_pair

__all__ = [
    "Bucket",
    "ClipScores",
    "Comparison",
    "MapPair",
    "MapReport",
    "Metric",
    "MetricInfo",
    "Skipped",
    "evaluate_maps",
    "metric_info",
    "read_pair",
]
