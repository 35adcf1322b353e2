"""What is distilled and how much: the weights of P4D (arXiv 2512.17012 Sec. A1.3), and its ablations by a switch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from p4dprep.cache import Cache
from p4dprep.errors import RequestError
from p4dprep.targets import Quantity
from student.losses import Loss
from student.targets import CachedTarget, cached_targets

Modality = Literal["depth", "flow", "motion", "camray"]
Heads = Literal["frozen", "light"]
"""What predicts the maps: the teacher's own heads (paper Sec. 4.1), or small ones that learn with the student."""
DistilFrame = Literal["first", "last"]
"""Whose hidden states a teacher's step of several frames is told from. The authors' release takes the first; an LLM
that looks back only has seen all of the step's frames at the last."""

PAPER_WEIGHTS: Mapping[Modality, float] = {"depth": 1.0, "flow": 0.1, "motion": 0.05, "camray": 0.05}
"""lambda_m of Sec. A1.3. Maps differ about 100x in scale, so equal weights would let flow dominate."""

MODALITIES: Mapping[Quantity, Modality] = {
    "metric depth": "depth",
    "relative depth": "depth",
    "relative disparity": "depth",
    "backward flow": "flow",
    "forward flow": "flow",
    "motion logit": "motion",
    "motion mask": "motion",
    "plücker rays": "camray",
}


@dataclass(frozen=True, kw_only=True)
class ExplicitTerm:
    """One map that the student learns.

    Attributes:
        target: its array in the cache, `<group>_<target>`.
        weight: lambda_m; 0 computes and logs the term without learning from it.
        loss: None takes the default of the target's quantity: smooth L1, of logarithms for a metric depth; cross
            entropy for a mask, which has no logit; scale and shift invariant for what is known up to those only.
    """

    target: str
    weight: float
    loss: Loss | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.weight < float("inf"):
            raise RequestError(f"weight of {self.target} is {self.weight}; it must be finite and not negative")
        if self.loss is not None and self.loss not in get_args(Loss):
            raise RequestError(f"loss of {self.target} is {self.loss!r}; it must be one of {get_args(Loss)}")


@dataclass(frozen=True, kw_only=True)
class P4DConfig:
    """What is distilled, and how much; the total is L_SFT + latent_weight L_LD + explicit_weight L_ED.

    A weight of 0 switches learning off, not logging: the term is still computed, without gradients.

    Attributes:
        latents: array of the latents in the cache; None where there is none, and heads then read the decoder alone.
        terms: the maps.
        latent_weight: of L_LD; raising it ties the student closer to the teacher's features.
        explicit_weight: of L_ED; raising it ties the student closer to the teacher's maps.
        hidden_channels: width of the perception decoder.
        heads: `light` ones take a small part of the time of frozen ones; their maps are coarse.
        standardised: latents are compared channel by channel in units of their spread over the corpus, so that none
            is drowned by one of another scale.
        frame: see `DistilFrame`.
        positions: the decoder is told where on the teacher's grid a token lies, by a vector that it learns. Without,
            it cannot tell apart the teacher's cells within one cell of a student whose grid is coarser.
        balanced: in every loss what moves counts as much as what stands, see `student.losses.motion_balance`; by the
            one term that is a motion, which must be there.
        cells: rows and columns over which latents are averaged before they are compared, for a student whose grid is
            no finer; balanced where the losses are. None compares on the teacher's own grid. Without latents: the
            tokens from which light heads draw.
    """

    latents: str | None
    terms: tuple[ExplicitTerm, ...] = ()
    latent_weight: float = 0.5
    explicit_weight: float = 0.1
    hidden_channels: int = 2560
    heads: Heads = "frozen"
    standardised: bool = False
    frame: DistilFrame = "first"
    positions: bool = False
    balanced: bool = False
    cells: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if min(self.latent_weight, self.explicit_weight) < 0 or self.hidden_channels < 1:
            raise RequestError(f"weights must not be negative and hidden_channels at least 1: {self}")
        names = [term.target for term in self.terms]
        if len(set(names)) != len(names):
            raise RequestError(f"a target stands twice among the terms {names}")
        if self.latents is None and not self.terms:
            raise RequestError("there is nothing to distil: neither latents nor a map")

    @property
    def targets(self) -> tuple[str, ...]:
        """Arrays to read from the cache."""
        return (*((self.latents,) if self.latents else ()), *(term.target for term in self.terms))

    @property
    def learns_latents(self) -> bool:
        """Whether L_LD has gradients."""
        return self.latents is not None and self.latent_weight > 0

    def learns(self, term: ExplicitTerm) -> bool:
        """Whether a term has gradients."""
        return self.explicit_weight * term.weight > 0


def plan(cache: Cache, switch: str = "ld+ed", targets: Sequence[str] | None = None) -> P4DConfig:
    """The paper's configuration for what a cache holds.

    Args:
        cache: whose targets are meant.
        switch: what to learn, words joined by `+`: `sft` (nothing here), `ld` the latents, `ed` every map, or single
            modalities `depth`, `flow`, `motion`, `camray`. Everything else is still computed and logged.
        targets: arrays to use; None takes the latents of the teacher that left heads, its maps, and for a modality
            that it lacks the only other teacher's.

    Raises:
        RequestError: an unknown word or target; or several teachers offer the same and none was named.
    """
    known = cached_targets(cache)
    words = _words(switch)
    for name in targets or ():
        if name not in known:
            raise RequestError(f"{cache.store.url} has no target {name!r}; it has {sorted(known)}")
    allowed = list(known.values()) if targets is None else [known[name] for name in targets]
    latents = latents_of(allowed)
    if "ld" in words and latents is None:
        raise RequestError(f"{switch}: {cache.store.url} has no latents; it has {sorted(known)}: switch to ed")
    terms = []
    for modality, weight in PAPER_WEIGHTS.items():
        target = _target_of(modality, allowed, latents, is_named=targets is not None)
        learns = bool(words & {"ed", modality})
        if target is None and modality in words:
            raise RequestError(f"{switch}: {cache.store.url} has no target of {modality}; it has {sorted(known)}")
        if target is not None:
            terms.append(ExplicitTerm(target=target.array, weight=weight if learns else 0.0))
    return P4DConfig(
        latents=latents.array if latents else None,
        terms=tuple(terms),
        latent_weight=0.5 if "ld" in words else 0.0,
    )


def _words(switch: str) -> set[str]:
    words, known = set(switch.split("+")), {"sft", "ld", "ed", *PAPER_WEIGHTS}
    if not words <= known or ("sft" in words and len(words) > 1):
        raise RequestError(f"switch {switch!r} must be sft, or some of {sorted(known - {'sft'})} joined by +")
    return words


def latents_of(allowed: Sequence[CachedTarget]) -> CachedTarget | None:
    """The latents of the teacher that left heads, since these read no others; else the only ones, None without any.

    Raises:
        RequestError: there are several.
    """
    found = [target for target in allowed if target.spec.quantity == "latents"]
    with_heads = {target.group for target in allowed if target.has_head}
    return _only([target for target in found if target.group in with_heads] or found, "latents")


def _target_of(
    modality: Modality, allowed: Sequence[CachedTarget], latents: CachedTarget | None, *, is_named: bool
) -> CachedTarget | None:
    found = [target for target in allowed if MODALITIES.get(target.spec.quantity) == modality]
    if not is_named:
        # The paper's flow is backward; a teacher that gives both is asked for that one.
        found = [t for t in found if t.spec.quantity != "forward flow"] or found
        found = [t for t in found if latents is not None and t.group == latents.group] or found
    return _only(found, modality)


def _only(found: Sequence[CachedTarget], what: str) -> CachedTarget | None:
    if len(found) > 1:
        names = [target.array for target in found]
        raise RequestError(f"the cache has several targets for {what}: {names}; name the ones to use")
    return found[0] if found else None
