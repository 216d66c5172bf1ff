r"""Named methods: each a choice of identity, velocity, stop-gradient, law of times and reduction.

Every constructor takes the map, the path, and the fields of ``Objective`` by keyword (``diagonal``, ``times``, ``pairs``,
``reduction``, ``coupling``, ``blocks``), and returns an Objective. All have the tangent term: on the ``diagonal`` share of
the batch, |v_{t,t}(I_t) - I_t'|^2. In the formulas R is |.|^2 under the reduction and sg the stop-gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from jflow import identities, times
from jflow.interpolants import Interpolant
from jflow.objectives.compose import Objective, Row
from jflow.types import FlowMap, Velocity


def flow_matching(flow_map: FlowMap | Velocity, interpolant: Interpolant, **choices: Any) -> Objective:
    """E | v_{t,t}(I_t) - I_t' |^2: regression of the velocity on that of the pair (2210.02747, 2209.03003).

    ``flow_map`` may be a bare Velocity. Cost: 3 passes a sample.
    """
    if not isinstance(flow_map, FlowMap):
        flow_map = _velocity_only(flow_map)
    return Objective("flow_matching", flow_map, interpolant, diagonal=1.0, **choices)


def lsd(
    flow_map: FlowMap,
    interpolant: Interpolant,
    *,
    derivative: identities.Derivative = identities.forward_mode,
    **choices: Any,
) -> Objective:
    """R( v_{s,t} + (t-s) d/dt v_{s,t} - sg v_{t,t}(X_{s,t}) ), x = I_s: Lagrangian self-distillation (2505.18825).

    Cost: 7 passes an off-diagonal sample (derivative with value 2, back through it 4, the diagonal 1).
    """

    def residual(row: Row) -> identities.Residual:
        return identities.lagrangian(
            row.own.v, row.s, row.t, row.x, row.own.velocity, stop="velocity", derivative=derivative
        )

    return Objective("lsd", flow_map, interpolant, residual, "lagrangian", **choices)


def esd(
    flow_map: FlowMap,
    interpolant: Interpolant,
    *,
    derivative: identities.Derivative = identities.forward_mode,
    **choices: Any,
) -> Objective:
    """R( v_{s,t} - (t-s) d/ds v_{s,t} - sg[ v_{s,s} + (t-s) grad v_{s,t} v_{s,s} ] ), x = I_s: Eulerian self-distillation
    (2505.18825).

    Cost: 8 passes an off-diagonal sample (value and two derivatives 3, back 4, the diagonal 1).
    """

    def residual(row: Row) -> identities.Residual:
        own = row.own.velocity(row.s, row.x)
        return identities.eulerian(row.own.v, row.s, row.t, row.x, own, stop="spatial", derivative=derivative)

    return Objective("esd", flow_map, interpolant, residual, "eulerian", **choices)


def psd_m(flow_map: FlowMap, interpolant: Interpolant, **choices: Any) -> Objective:
    """R( v_{s,t} - sg[ v_{s,u}/2 + v_{u,t}(X_{s,u})/2 ] ), u the midpoint, x = I_s: progressive self-distillation
    (2505.18825).

    Cost: 5 passes an off-diagonal sample.
    """
    return Objective("psd_m", flow_map, interpolant, _self_semigroup, "semigroup", **choices)


def psd_u(flow_map: FlowMap, interpolant: Interpolant, **choices: Any) -> Objective:
    """R( v_{s,t} - sg[ (1-gamma) v_{s,u} + gamma v_{u,t}(X_{s,u}) ] ), u = gamma s + (1-gamma) t, gamma uniform, x = I_s:
    progressive self-distillation with a random middle (2505.18825).

    Cost: 5 passes an off-diagonal sample.
    """
    choices = {"gammas": times.uniform(), **choices}
    return Objective("psd_u", flow_map, interpolant, _self_semigroup, "semigroup", **choices)


def mean_flow(
    flow_map: FlowMap,
    interpolant: Interpolant,
    *,
    derivative: identities.Derivative = identities.forward_mode,
    **choices: Any,
) -> Objective:
    """R( v_{s,t} - sg[ I_s' + (t-s) ( d/ds v_{s,t} + grad v_{s,t} I_s' ) ] ), x = I_s: MeanFlow (2505.13447).

    The default reduction is the squared one, under which the exact map is stationary. The published one is
    ``reductions.adaptive(1, 0.01)``, which biases it, with pairs ``times.ordered(times.logit_normal(0.4, 1))``.

    Cost: 4 passes an off-diagonal sample.
    """

    def residual(row: Row) -> identities.Residual:
        return identities.eulerian(
            row.own.v, row.s, row.t, row.x, row.conditional, stop="target", derivative=derivative
        )

    return Objective("mean_flow", flow_map, interpolant, residual, "eulerian", **choices)


def improved_mean_flow(
    flow_map: FlowMap,
    interpolant: Interpolant,
    *,
    derivative: identities.Derivative = identities.forward_mode,
    **choices: Any,
) -> Objective:
    """R( v_{s,t} - sg[ I_s' + (t-s) ( d/ds v_{s,t} + grad v_{s,t} v_{s,s} ) ] ), x = I_s: improved MeanFlow (2512.02012).

    As MeanFlow, but the derivative is along the map's own velocity, which lowers the variance of the target.

    Cost: 5 passes an off-diagonal sample.
    """

    def residual(row: Row) -> identities.Residual:
        own = row.own.velocity(row.s, row.x)
        return identities.eulerian(
            row.own.v,
            row.s,
            row.t,
            row.x,
            row.conditional,
            tangent_velocity=own,
            stop="target",
            derivative=derivative,
        )

    return Objective("improved_mean_flow", flow_map, interpolant, residual, "eulerian", **choices)


def _self_semigroup(row: Row) -> identities.Residual:
    return identities.semigroup(row.own.v, row.s, row.t, row.x, row.gamma)


def _velocity_only(velocity: Velocity) -> FlowMap:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("flow_map: flow matching was given a Velocity, which has no mean velocity off the diagonal")

    return FlowMap(refuse, velocity_override=velocity)


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the catalogue.

    Attributes:
      constructor: ``(flow_map, interpolant, **choices) -> Objective``.
      source: arXiv ids.
      identity, velocity, stop_gradient, derivative: the parts, in words.
      stationary: "exact" where the expected gradient at the exact map is zero under the squared reduction.
      off_diagonal_passes: cost of one off-diagonal sample in forward passes; None without such samples.
    """

    constructor: Callable[..., Objective]
    source: str
    identity: str
    velocity: str
    stop_gradient: str
    derivative: str
    stationary: str = "exact"
    off_diagonal_passes: int | None = None


METHODS: dict[str, Method] = {
    "flow_matching": Method(flow_matching, "2210.02747, 2209.03003", "tangent", "conditional", "-", "-"),
    "lsd": Method(lsd, "2505.18825", "Lagrangian + tangent", "self", "velocity leg", "jvp", off_diagonal_passes=7),
    "esd": Method(
        esd,
        "2505.18825",
        "Eulerian + tangent",
        "self",
        "spatial term and velocity",
        "jvp",
        off_diagonal_passes=8,
    ),
    "psd_m": Method(
        psd_m, "2505.18825", "semigroup + tangent, midpoint", "self", "both legs", "-", off_diagonal_passes=5
    ),
    "psd_u": Method(
        psd_u,
        "2505.18825",
        "semigroup + tangent, random middle",
        "self",
        "both legs",
        "-",
        off_diagonal_passes=5,
    ),
    "mean_flow": Method(
        mean_flow, "2505.13447", "Eulerian", "conditional", "target side", "jvp", off_diagonal_passes=4
    ),
    "improved_mean_flow": Method(
        improved_mean_flow,
        "2512.02012",
        "Eulerian",
        "conditional; tangent self",
        "target side",
        "jvp",
        off_diagonal_passes=5,
    ),
}
