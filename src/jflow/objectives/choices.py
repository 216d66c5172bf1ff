"""The choices (options) of an objective: their types, their defaults, and the checks of their values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from jflow import bases, checks, couplings, interpolants, law_checks, reductions
from jflow import times as laws
from jflow.identities import Derivative
from jflow.named import described, shown
from jflow.objectives import velocity_estimates
from jflow.objectives.curriculum import Schedule
from jflow.objectives.guided import Guidance
from jflow.objectives.row import Estimate, Term
from jflow.types import Domain, FlowMap, Velocity, as_velocity

if TYPE_CHECKING:
    from jflow.objectives.objective import Objective

# The value of a choice that was not made. It is replaced by the default if the method reads this choice.
UNSET: Any = None


# The default choices. A method may override them.
DEFAULTS: dict[str, Any] = {
    "diagonal": 0.75,
    "times": laws.uniform(),
    "pairs": laws.triangle(),
    "gammas": laws.constant(0.5),
    "reduction": reductions.squared,
    "diagonal_reduction": reductions.squared,
}


# The signatures of these choices, for error messages, and their numbers of arguments.
_SIGNATURES = {
    "velocity": ("row -> velocity, such as velocity_estimates.pair", 1),
    "coupling": ("(key, x1, cond) -> x0, such as couplings.independent", 3),
}


class RowChoices(TypedDict, total=False):
    """The choices of every objective: how rows are drawn and reduced. ``Objective`` documents them."""

    diagonal: float
    times: laws.Law | laws.ByStep[laws.Law]
    pairs: laws.PairLaw | laws.ByStep[laws.PairLaw]
    gammas: laws.Law | laws.ByStep[laws.Law]
    reduction: reductions.Reduction
    diagonal_reduction: reductions.Reduction
    base: bases.Base
    coupling: couplings.Coupling
    blocks: int
    domain: Domain
    label_dropout: float


class Choices(RowChoices, total=False):
    """The choices of every method of the catalogue: those of ``RowChoices``, and the velocity to learn from."""

    velocity: Estimate
    teacher: FlowMap | Velocity | None
    guidance: Guidance | None


class DerivativeChoices(Choices, total=False):
    """The choices of a method whose residual contains a derivative."""

    warmup: Schedule | None
    derivative: Derivative


def defaults(objective: Objective) -> dict[str, Any]:
    """Returns a value for each choice that the caller did not make, that is, each that is None."""
    own = {name: value for name, value in objective.defaults.items() if name != "domain" or objective.pairs is None}
    found = {**DEFAULTS, "domain": objective.flow_map.domain, **own}
    found["velocity"] = velocity_estimates.pair if objective.teacher is None else velocity_estimates.teacher
    found["label_dropout"] = 0.0 if objective.guidance is None else 0.1
    found["base"], found["coupling"] = base_and_coupling(objective.base, objective.coupling)
    return found


def base_and_coupling(
    base: bases.Base | None, coupling: couplings.Coupling | None
) -> tuple[bases.Base, couplings.Coupling]:
    """Fills in the base and the coupling. If one is missing, it follows from the other.

    The base of an independent coupling is the default base. ``couplings.independent`` is replaced by an independent coupling
    with the chosen base.
    """
    named = coupling is couplings.independent
    if base is None:
        base = bases.STANDARD_NORMAL
        if isinstance(coupling, couplings.Independent) and not named:
            base = coupling.base
    if coupling is None or (named and base != couplings.independent.base):
        coupling = couplings.Independent(base)
    return base, coupling


def check_same_base(base: bases.Base, coupling: couplings.Coupling) -> None:
    """Raises ValueError if an independent coupling has another base."""
    if isinstance(coupling, couplings.Independent) and coupling.base != base:
        raise ValueError(f"base: expected that of the coupling, {coupling.base!r}, got {base!r}")


def check(objective: Objective) -> None:
    """Raises TypeError for arguments of a wrong type, and ValueError for numbers out of range and unused choices."""
    if not isinstance(objective.flow_map, FlowMap):
        raise TypeError(
            "flow_map: expected a FlowMap (jflow.flow_map(network, form) makes one of a network), got "
            f"{described(objective.flow_map)}"
        )
    interpolants.check(objective.interpolant)
    if objective.term is not None and not isinstance(objective.term, Term):
        raise TypeError(f"term: expected an objectives.Term(name, residual), got {described(objective.term)}")
    if objective.domain is not None and not isinstance(objective.domain, Domain):
        raise TypeError(f"domain: expected a Domain, such as types.FORWARD, got {described(objective.domain)}")
    if objective.diagonal is not None:
        checks.number("diagonal", objective.diagonal, low=0.0, high=1.0)
    checks.integer("blocks", objective.blocks, low=1)
    if objective.base is not None:
        bases.check(objective.base)
    if objective.term is None and objective.diagonal not in (None, 1.0):
        raise ValueError(f"diagonal: expected 1 for a method without off-diagonal rows, got {objective.diagonal}")
    for name in ("reduction", "diagonal_reduction"):
        if getattr(objective, name) is not None:
            reductions.check(name, getattr(objective, name))
    for name, (signature, count) in _SIGNATURES.items():
        if getattr(objective, name) is not None:
            checks.accepts(name, getattr(objective, name), signature, count, model=False)
    if objective.teacher is not None:
        as_velocity("teacher", objective.teacher)
    _check_null(objective)
    for name, why in unread(objective).items():
        if getattr(objective, name) is not None:
            raise ValueError(
                f"{name}: expected no choice of it for {objective.name}, {why}; got {shown(getattr(objective, name))}"
            )


def _check_null(objective: Objective) -> None:
    """Raises an error if labels are dropped or guided and the map has no null condition."""
    guidance = objective.guidance
    if guidance is not None and not isinstance(guidance, Guidance):
        raise TypeError(f"guidance: expected an objectives.Guidance, got {described(guidance)}")
    name = "guidance"
    if objective.label_dropout is not None:
        if checks.number("label_dropout", objective.label_dropout, low=0.0, high=1.0) > 0.0:
            name = "label_dropout"
        elif guidance is None:
            return
    elif guidance is None:
        return
    if objective.flow_map.null is None:
        raise ValueError(
            f"{name}: expected a flow map with a null condition: one of a network with labels, whose null_label it is, or "
            "null= of jflow.flow_map"
        )


def check_base(objective: Objective) -> None:
    """Raises an error if the base is not that of the coupling, or the batch's velocity is not valid with them."""
    check_same_base(objective.base, objective.coupling)
    if objective.velocity is velocity_estimates.batch:
        bases.gaussian(objective.base, "velocity_estimates.batch")
        if not isinstance(objective.coupling, couplings.Independent):
            raise ValueError("velocity: expected an independent coupling with the batch's velocity, which assumes it")


def check_times(objective: Objective) -> None:
    """Draws from the laws, and raises an error if times are outside [0, 1], the domain or the map's own domain."""
    drawn = {}
    for name in ("times", "gammas"):
        if getattr(objective, name) is not None:
            drawn[name] = law_checks.check_law(name, laws.at_step(getattr(objective, name), 0))
    if objective.pairs is None:
        return
    law = laws.at_step(objective.pairs, 0)
    pair = law_checks.check_pairs("pairs", law, objective.domain)
    if objective.domain != objective.flow_map.domain:
        law_checks.check_pairs("pairs", law, objective.flow_map.domain)
    if objective.term is None or objective.term.asks is None or pair is None:
        return
    gamma = drawn.get("gammas")
    for s, t in objective.term.asks(*pair, np.full_like(pair[0], 0.5) if gamma is None else gamma):
        for domain in (objective.flow_map.domain, objective.domain):
            outside = np.flatnonzero(~domain.contains_all(s, t))
            if outside.size:
                raise ValueError(
                    f"domain: {objective.name} asks the map at (s, t) = ({s[outside[0]]:g}, {t[outside[0]]:g}), too, for "
                    f"these pairs and gammas; expected a domain that holds them, got {domain.name}"
                )


def unread(objective: Objective) -> dict[str, str]:
    """Returns the choices that the objective does not read, each with the reason."""
    diagonal = (
        objective.defaults.get("diagonal", DEFAULTS["diagonal"]) if objective.diagonal is None else objective.diagonal
    )
    off = objective.term is not None and diagonal < 1.0
    reads = objective.term.reads if objective.term is not None and off else ()
    found = {}
    estimate = objective.velocity
    if estimate is None and objective.teacher is not None:
        estimate = velocity_estimates.teacher
    if not set(reads) & {"velocity", "pair"} and diagonal == 0.0:
        found["guidance"] = "which reads no velocity of the data"
    elif estimate is velocity_estimates.teacher and "pair" not in reads:
        found["guidance"] = "whose velocity is the teacher's, which must be guided itself (guidance.classifier_free)"
    if objective.guidance is not None and objective.guidance.fed:
        found.pop("guidance", None)  # the networks receive the scale
    if "gamma" not in reads:
        found["gammas"] = "which has no middle time"
    if not off:
        where = "" if objective.term is None else " with diagonal=1"
        found |= dict.fromkeys(("pairs", "reduction", "gammas", "domain"), f"which has no off-diagonal rows{where}")
    if diagonal == 0.0:
        found |= dict.fromkeys(("times", "diagonal_reduction"), "which has no diagonal rows")
    if diagonal == 0.0 and "velocity" not in reads:
        found["velocity"] = "which reads no conditional velocity"
    estimates = (velocity_estimates.pair, velocity_estimates.batch)
    if "teacher" not in reads and ("velocity" in found or objective.velocity in estimates):
        found["teacher"] = "which reads no teacher" + ("" if "velocity" in found else " with that velocity")
    return found
