r"""Consistency models: the semigroup identity with a short first leg, compared as jumps to t = 1.

    R( X_{s,1}(I_s) - sg X_{u,1}(x_u) ) / (u-s),     u = s + fraction (1-s)

in the units of X, with the weight 1/(u-s) of 2310.14189 and 2406.14548, and x_u the point of the same pair (training) or of a
solver's step along a teacher (distillation). Divided by 1-s, the gradient tends to the Eulerian identity's as u -> s. In the
formulas R is |.|^2 under the reduction and sg the stop-gradient. Cost is per sample, in forward passes of the network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jflow import identities, reductions, times
from jflow.interpolants import Interpolant
from jflow.objectives.compose import Objective, Row
from jflow.objectives.curriculum import Schedule, shrinking, value_at
from jflow.objectives.method import Method
from jflow.objectives.semigroup import solver_step
from jflow.types import TO_DATA, Array, Event, FlowMap


def consistency_training(
    flow_map: FlowMap, interpolant: Interpolant, *, fraction: Schedule = 0.05, leg: str = "own", **choices: Any
) -> Objective:
    """R( X_{s,1}(I_s) - sg X_{u,1}(I_u) ) / (u-s), both of one pair: consistency training (2303.01469).

    ``fraction`` = (u-s)/(1-s) is a schedule that shrinks; ``leg`` is whose X_{u,1}: "own", "ema" (as in the paper) or
    "teacher". Cost: 4 passes.
    """
    return _consistency("consistency_training", flow_map, interpolant, _share(fraction), _pair, leg, choices)


def ict(flow_map: FlowMap, interpolant: Interpolant, *, cells: Schedule = 20, **choices: Any) -> Objective:
    """Consistency training with steps u - s = 1/cells: improved consistency training (2310.14189).

    ``cells`` grows, ``curriculum.doubling(10, 1280, every)`` there, where the steps are equal in a power of sigma and not in
    time. The reduction is ``reductions.pseudo_huber(0.00054 sqrt(d))`` for d entries, in the units of X. Cost: 4 passes.
    """

    def share(row: Row) -> Array:
        step = 1.0 / value_at(cells, row.step).astype(row.s.dtype)
        gap = row.t - row.s
        return jnp.where(gap > step, step / jnp.where(gap > step, gap, 1.0), 1.0)

    return _consistency("ict", flow_map, interpolant, share, _pair, "own", choices)


def ect(flow_map: FlowMap, interpolant: Interpolant, *, fraction: Schedule | None = None, **choices: Any) -> Objective:
    """Consistency training whose step starts as all of the remaining time, u = 1, where it is a regression of the data, and
    shrinks by halves: easy consistency tuning (2406.14548), of a network that starts as a velocity's.

    ``fraction`` is ``curriculum.shrinking(every=1000, least=0.01)`` by default; the paper's is a share of sigma.
    Cost: 4 passes.
    """
    fraction = shrinking(1000, least=0.01) if fraction is None else fraction
    return _consistency("ect", flow_map, interpolant, _share(fraction), _pair, "own", choices)


def consistency_distillation(
    flow_map: FlowMap,
    interpolant: Interpolant,
    *,
    fraction: Schedule = 0.05,
    solver: str = "heun",
    steps: int = 1,
    leg: str = "own",
    **choices: Any,
) -> Objective:
    """R( X_{s,1}(I_s) - sg X_{u,1}(S_{s,u}(I_s)) ) / (u-s): consistency distillation (2303.01469).

    S takes ``steps`` steps of ``solver`` ("euler", "heun", ...) along the teacher's velocity. Cost: 6 passes with Heun's step,
    5 with Euler's.
    """

    def solved(row: Row, u: Array) -> Event:
        return solver_step(row.leg("teacher"), solver, steps, row.s, u, row.x)

    return _consistency("consistency_distillation", flow_map, interpolant, _share(fraction), solved, leg, choices)


def _share(fraction: Schedule) -> Callable[[Row], Array]:
    return lambda row: value_at(fraction, row.step).astype(row.s.dtype)


def _pair(row: Row, u: Array) -> Event:
    return row.pair(row.s, u)


def _consistency(
    name: str,
    flow_map: FlowMap,
    interpolant: Interpolant,
    share: Callable[[Row], Array],
    first: Callable[[Row, Array], Event],
    leg: str,
    choices: dict[str, Any],
) -> Objective:
    def residual(row: Row) -> identities.Residual:
        part, gap = share(row), row.t - row.s
        u = row.s + part * gap
        two = identities.semigroup(row.own.v, row.s, row.t, row.x, 1.0 - part, legs=row.leg(leg).v, first=first(row, u))
        step = part * gap
        weight = jnp.where(step == 0.0, 0.0, 1.0 / jnp.where(step == 0.0, 1.0, step))
        # v times the gap is X up to x, which both sides share.
        return two.rescaled(prediction=gap, difference=gap)._replace(weight=weight)

    if "pairs" not in choices:
        choices = {"pairs": times.to_data(), "domain": TO_DATA, **choices}
    return Objective(name, flow_map, interpolant, residual, "consistency", **{"diagonal": 0.0, **choices})


METHODS: dict[str, Method] = {
    "consistency_training": Method(
        consistency_training,
        "consistency training",
        "2303.01469",
        "Eulerian at t = 1, as a difference",
        "conditional",
        "target side",
        "finite difference along the pair",
        "one jump to the data without derivatives; biased by the step",
        {"forward": 2, "backward": 1},
        stationary="order",
        order=1,
        at=lambda h: {"fraction": h},
        published=lambda: {"leg": "ema"},
        published_passes=4,
    ),
    "consistency_distillation": Method(
        consistency_distillation,
        "consistency distillation",
        "2303.01469",
        "Eulerian at t = 1, as a difference",
        "teacher's solver step",
        "target side",
        "finite difference along the teacher",
        "one jump to the data from a trusted velocity, with less noise than training",
        {"forward": 4, "backward": 1},
        stationary="order",
        order=2,
        at=lambda h: {"fraction": h},
        needs=("teacher",),
        published=lambda: {"leg": "ema"},
        published_passes=5,
    ),
    "ict": Method(
        ict,
        "improved consistency training",
        "2310.14189",
        "Eulerian at t = 1, as a difference",
        "conditional",
        "target side",
        "finite difference along the pair, doubling grid",
        "consistency training with a curriculum of steps",
        {"forward": 2, "backward": 1},
        stationary="order",
        order=1,
        at=lambda h: {"cells": 1.0 / h},
        published=lambda: {"reduction": reductions.pseudo_huber(0.00054)},
        published_passes=4,
    ),
    "ect": Method(
        ect,
        "easy consistency tuning",
        "2406.14548",
        "Eulerian at t = 1, as a difference",
        "conditional",
        "target side",
        "finite difference along the pair, from the whole to a small step",
        "tuning a velocity network into a consistency model on a small budget",
        {"forward": 2, "backward": 1},
        stationary="order",
        order=1,
        at=lambda h: {"fraction": h},
        published_passes=4,
    ),
}
