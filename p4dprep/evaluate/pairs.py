"""Which target of a cache is judged by which of the truth, and whether their sizes allow it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from p4dprep import metrics
from p4dprep.cache import Cache, Group
from p4dprep.errors import RequestError
from p4dprep.evaluate.report import Axis, Kind
from p4dprep.metrics import Alignment
from p4dprep.targets import Quantity, TargetSpec

_KINDS: Mapping[Quantity, tuple[Kind, tuple[Quantity, ...]]] = {
    "metric depth": ("depth", ("metric depth", "relative depth")),
    "relative depth": ("depth", ("metric depth", "relative depth")),
    "relative disparity": ("depth", ("metric depth", "relative depth")),
    "backward flow": ("flow", ("backward flow",)),
    "forward flow": ("flow", ("forward flow",)),
    "motion logit": ("motion", ("motion mask", "motion logit")),
    "motion mask": ("motion", ("motion mask", "motion logit")),
    "plücker rays": ("camera", ("camera pose", "plücker rays")),
    "latents": ("latents", ("latents",)),
}
"""A predicted quantity to its kind and the true quantities it can be judged by, the best first."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A predicted target and what the truth has to judge it by.

    Attributes:
        size: height and width of the frames in pixels.
        keys: per axis of buckets the truth's target that decides, where there is one.
        others: names of further targets of the truth: visibility, pose, intrinsics, rays; empty where it has none.
    """

    kind: Kind
    group: Group
    spec: TargetSpec
    truth: TargetSpec
    alignment: Alignment | Literal[""]
    size: tuple[int, int]
    keys: Mapping[Axis, str]
    others: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The prediction's group and target."""
        return f"{self.group.name}/{self.spec.name}"


def open_truth(truth: Cache, name: str) -> Group:
    """The group that is right: the named one, else the only one, else `truth`.

    Raises:
        RequestError: there are several and none was named.
        MissingDataError: there is none of this name.
    """
    names = truth.groups()
    if name or len(names) == 1 or "truth" in names:
        return truth.group(name or (names[0] if len(names) == 1 else "truth"))
    raise RequestError(f"{truth.store.url} has groups {names}; say which is right with --truth-group")


def find_pairs(
    predicted: Cache, groups: Sequence[str], standard: Group, truth: Cache, alignment: str
) -> tuple[Pair, ...]:
    """Every comparable target of the given groups, or of all but the truth itself.

    Raises:
        RequestError: there is none, sizes differ, or the alignment does not fit.
        MissingDataError: there is no such group.
    """
    opened = [predicted.group(name) for name in groups or predicted.groups()]
    if predicted.store.url == truth.store.url and not groups:
        opened = [group for group in opened if group.name != standard.name]
    found = [make_pair(group, spec, standard, truth, alignment) for group in opened for spec in group.targets]
    pairs = tuple(pair for pair in found if pair is not None)
    if not pairs:
        ours = sorted({spec.quantity for group in opened for spec in group.targets})
        theirs = sorted({spec.quantity for spec in standard.targets})
        raise RequestError(
            f"nothing to compare: {predicted.store.url} has {ours}, {standard.name} of {truth.store.url} has {theirs}"
        )
    return pairs


def make_pair(group: Group, spec: TargetSpec, standard: Group, truth: Cache, alignment: str) -> Pair | None:
    """The pair of a predicted target, None if the truth has no counterpart: latents of another encoder are none."""
    if spec.quantity not in _KINDS:
        return None
    kind, quantities = _KINDS[spec.quantity]
    true = _first(standard, *quantities, name=spec.name if kind == "latents" else "")
    if true is None or (kind == "latents" and _taps_and_channels(spec) != _taps_and_channels(true)):
        return None
    frames = truth.sampling.geometry()
    pair = Pair(
        kind=kind,
        group=group,
        spec=spec,
        truth=true,
        alignment=_alignment(spec, true, alignment) if kind == "depth" else "",
        size=(frames.height, frames.width),
        keys=_keys(standard, true),
        others=_others(standard, true),
    )
    _check_shapes(pair, standard)
    return pair


def _first(group: Group, *quantities: Quantity, name: str = "") -> TargetSpec | None:
    """The group's first target of the first quantity it has, of this name if one is given."""
    for quantity in quantities:
        for spec in group.targets:
            if spec.quantity == quantity and name in ("", spec.name):
                return spec
    return None


def _taps_and_channels(latents: TargetSpec) -> tuple[int, int]:
    """What tells encoders apart where they see the same frames."""
    return latents.shape[0], latents.shape[-1]


def target_of(group: Group, name: str) -> TargetSpec:
    """The declaration of a target that the group has."""
    return next(spec for spec in group.targets if spec.name == name)


def _alignment(spec: TargetSpec, true: TargetSpec, asked: str) -> Alignment:
    if true.quantity == "relative depth" and spec.quantity == "metric depth":
        return metrics.check_alignment(asked or metrics.default_alignment("relative depth"), "relative depth")
    return metrics.check_alignment(asked or metrics.default_alignment(spec.quantity), spec.quantity)


def _keys(standard: Group, true: TargetSpec) -> dict[Axis, str]:
    flow = true if "flow" in true.quantity else _first(standard, "backward flow", "forward flow")
    depth = _first(standard, "metric depth")
    found: dict[Axis, TargetSpec | None] = {"true motion": flow, "true distance": depth}
    return {axis: spec.name for axis, spec in found.items() if spec is not None}


def _others(standard: Group, true: TargetSpec) -> dict[str, str]:
    found = {
        "visible": _first(standard, "visibility mask", name=f"{true.name}_visible"),
        "pose": _first(standard, "camera pose"),
        "intrinsics": _first(standard, "camera intrinsics"),
        "rays": _first(standard, "plücker rays"),
    }
    return {role: spec.name for role, spec in found.items() if spec is not None}


def _check_shapes(pair: Pair, standard: Group) -> None:
    """Refuse sizes that cannot be compared.

    Raises:
        RequestError: with both sizes, and what to do.
    """
    ours, theirs = pair.spec.shape, pair.truth.shape
    if pair.kind == "camera":
        if not {"pose", "intrinsics"} <= set(pair.others):
            theirs = target_of(standard, pair.others["rays"]).shape if "rays" in pair.others else theirs
        else:
            theirs = (theirs[0], *ours[1:])
    if pair.kind in ("depth", "motion"):  # a last axis of one channel is none
        ours, theirs = (shape[:3] if shape[3:] == (1,) else shape for shape in (ours, theirs))
    if ours != theirs:
        raise RequestError(
            f"{pair.name} is {_by(ours)}, {standard.name}/{pair.truth.name} is {_by(theirs)}; extract both caches with "
            "the same --frames and --size"
        )


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def join(predicted: Cache, truth: Cache) -> list[tuple[str, int, int]]:
    """Id of each shared clip in the predicted cache's order, and its indices in both caches.

    Raises:
        RequestError: there are none.
    """
    ours, theirs = (cache.clips().column("id").to_pylist() for cache in (predicted, truth))
    index_of = {clip_id: index for index, clip_id in enumerate(theirs)}
    shared = [(clip_id, index, index_of[clip_id]) for index, clip_id in enumerate(ours) if clip_id in index_of]
    if not shared:
        raise RequestError(
            f"{predicted.store.url} ({len(ours)} clips) and {truth.store.url} ({len(theirs)} clips) share no clip id; "
            "make both caches from one manifest"
        )
    return shared
