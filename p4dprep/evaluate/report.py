"""What an evaluation says: scores over all clips and per clip, intervals, baselines, buckets, worst clips."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from p4dprep.metrics import Alignment
from p4dprep.targets import Quantity

Kind = Literal["depth", "flow", "motion", "camera", "latents"]
Axis = Literal["true motion", "true distance"]


@dataclass(frozen=True, kw_only=True)
class MetricInfo:
    """What a score means.

    Attributes:
        unit: `px`, `degrees`, `m` (the truth's unit of length), or `1`.
        higher_is_better: whether; None for a count that is neither.
        shown: whether it belongs on a screen, and its worst clips on the page.
    """

    unit: str
    higher_is_better: bool | None
    shown: bool = True


def _info(unit: str, names: str, better: bool | None, shown: bool = True) -> dict[str, MetricInfo]:
    return {name: MetricInfo(unit=unit, higher_is_better=better, shown=shown) for name in names.split()}


_METRICS: Mapping[str, MetricInfo] = {
    **_info("1", "abs_rel", False),
    **_info("m", "rmse", False),
    **_info("1", "delta1", True),
    **_info("1", "delta2 delta3", True, shown=False),
    **_info("m", "sq_rel", False, shown=False),
    **_info("px", "epe epe_visible epe_occluded", False),
    **_info("1", "fl_all", False),
    **_info("1", "fl_all_per_sample fl_all_visible fl_all_occluded", False, shown=False),
    **_info("1", "px1", True),
    **_info("1", "coverage", True, shown=False),
    **_info("1", "j j_moving f", True),
    **_info("1", "rotation_auc15 translation_auc15 auc15", True),
    **_info("degrees", "ray_degrees rotation_degrees translation_degrees", False),
    **_info("m", "ate", False),
    **_info("m", "rpe_translation", False, shown=False),
    **_info("degrees", "rpe_rotation", False, shown=False),
    **_info("1", "rotation_auc3 rotation_auc5 rotation_auc30 translation_auc3 translation_auc5", True, shown=False),
    **_info("1", "translation_auc30 auc3 auc5 auc30", True, shown=False),
    **_info("1", "undirected_pairs", None, shown=False),
    **_info("1", "cosine_tap cka_tap", True),
    **_info("1", "relative_l2_tap", False),
}


def metric_info(name: str) -> MetricInfo:
    """What a score of a report means; those of latents end in the number of their tap."""
    return _METRICS[name.rstrip("0123456789") if "_tap" in name else name]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One score over all clips.

    Attributes:
        name, unit, higher_is_better: as `metric_info` says.
        value: pooled over clips; NaN where it is undefined.
        low, high: 95% percentile bootstrap interval over clips; NaN with fewer than two.
        num_clips: clips that have the score.
        baselines: name of a trivial prediction to its value.
    """

    name: str
    unit: str
    higher_is_better: bool | None
    value: float
    low: float
    high: float
    num_clips: int
    baselines: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """The scores of the pixels whose key lies in one range.

    Attributes:
        axis: the key.
        name: the range, such as `1 to 4 px`.
        pixel_fraction: its share of the pixels that were compared and have a key.
        metrics: pooled over pixels.
    """

    axis: Axis
    name: str
    pixel_fraction: float
    metrics: tuple[Metric, ...]


@dataclass(frozen=True, kw_only=True)
class ClipScores:
    """The scores of one clip, and of the trivial predictions on it; NaN where undefined."""

    clip_id: str
    scores: Mapping[str, float]
    baselines: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One predicted target against the truth.

    Attributes:
        kind: what is compared.
        group, target, teacher, quantity: of the prediction.
        truth_target: of the truth's group.
        alignment: how a depth was brought to the truth's scale; empty for other kinds.
        metrics: over all clips.
        buckets: by true motion and true distance, where the truth knows them.
        clips: per clip, in order of the predicted cache.
        worst: name of a shown score to ids of clips, the worst first.
    """

    kind: Kind
    group: str
    target: str
    teacher: str
    quantity: Quantity
    truth_target: str
    alignment: Alignment | Literal[""]
    metrics: tuple[Metric, ...]
    buckets: tuple[Bucket, ...]
    clips: tuple[ClipScores, ...]
    worst: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A clip of both caches that was left out, and why; `group` is empty if it was for all."""

    clip_id: str
    group: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class MapReport:
    """What `evaluate_maps` found.

    Attributes:
        predicted, truth: URLs of the caches.
        truth_group: the group that was taken as the truth.
        num_shared: clips with one id in both caches; `num_only_predicted` and `num_only_truth` are in one.
        num_judged: shared clips that were asked for (`limit`).
        depth_baseline: the constant that stands for a guess, the geometric mean of the depths of every clip of the
            truth, in its unit; NaN where no depth was compared.
        comparisons: one per comparable target.
        skipped: clips left out.
    """

    predicted: str
    truth: str
    truth_group: str
    num_shared: int
    num_only_predicted: int
    num_only_truth: int
    num_judged: int
    depth_baseline: float
    comparisons: tuple[Comparison, ...]
    skipped: tuple[Skipped, ...]
