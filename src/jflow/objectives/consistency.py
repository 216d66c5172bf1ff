r"""Consistency models: the semigroup identity with a short first leg, compared as jumps to t = 1.

The residual::

    R( X_{s,1}(I_s) - sg X_{u,1}(x_u) ) / (u-s),     u = s + fraction (1-s)

in the units of X, with the weight 1/(u-s) of 2310.14189 and 2406.14548, and x_u the point of the same pair (training) or of a
solver's step along a teacher (distillation). Divided by 1-s, the gradient tends to the Eulerian identity's as u -> s. In the
formulas R is ``|.|^2`` under the reduction and sg the stop-gradient. Cost is per sample, in forward passes of the network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Unpack

import jax.numpy as jnp

from jflow import identities, reductions
from jflow.interpolants import Interpolant
from jflow.objectives.choices import Choices
from jflow.objectives.curriculum import Schedule, value_at
from jflow.objectives.eulerian import TO_DATA_PAIRS
from jflow.objectives.method import method
from jflow.objectives.objective import Objective
from jflow.objectives.row import Row, Term, second_leg
from jflow.objectives.semigroup import solver_step
from jflow.types import Array, Event, FlowMap


@method(
    title="consistency training",
    source="2303.01469",
    identity="Eulerian at t = 1, as a difference",
    velocity="conditional",
    stop_gradient="target side",
    derivative="finite difference along the pair",
    when="one jump to the data without derivatives; biased by the step",
    cost={"forward": 2, "backward": 1},
    stationary="order",
    order=1,
    at=lambda h: {"fraction": h},
    published=lambda: {"leg": "ema"},
    published_passes=4,
)
def consistency_training(
    flow_map: FlowMap,
    interpolant: Interpolant,
    *,
    fraction: Schedule = 0.05,
    leg: str = "own",
    **choices: Unpack[Choices],
) -> Objective:
    """R( X_{s,1}(I_s) - sg X_{u,1}(I_u) ) / (u-s), both of one pair: consistency training (2303.01469).

    ``fraction`` = (u-s)/(1-s) is a schedule that shrinks; ``leg`` is whose X_{u,1}: "own", "ema" (as in the paper) or
    "teacher". Cost: 4 passes.
    """
    return _consistency("consistency_training", flow_map, interpolant, {**choices}, _term(_share(fraction), _pair, leg))


@method(
    title="consistency distillation",
    source="2303.01469",
    identity="Eulerian at t = 1, as a difference",
    velocity="teacher's solver step",
    stop_gradient="target side",
    derivative="finite difference along the teacher",
    when="one jump to the data from a trusted velocity, with less noise than training",
    cost={"forward": 4, "backward": 1},
    stationary="order",
    order=2,
    at=lambda h: {"fraction": h},
    needs=("teacher",),
    published=lambda: {"leg": "ema"},
    published_passes=5,
)
def consistency_distillation(
    flow_map: FlowMap,
    interpolant: Interpolant,
    *,
    fraction: Schedule = 0.05,
    solver: str = "heun",
    steps: int = 1,
    leg: str = "own",
    **choices: Unpack[Choices],
) -> Objective:
    """R( X_{s,1}(I_s) - sg X_{u,1}(S_{s,u}(I_s)) ) / (u-s): consistency distillation (2303.01469).

    S takes ``steps`` steps of ``solver`` ("euler", "heun", ...) along the teacher's velocity. Cost: 6 passes with Heun's step,
    5 with Euler's.
    """

    def solved(row: Row, u: Array) -> Event:
        return solver_step(row.leg("teacher"), solver, steps, row.s, u, row.x)

    term = dataclasses.replace(_term(_share(fraction), solved, leg), reads=("teacher",))
    return _consistency("consistency_distillation", flow_map, interpolant, {**choices}, term)


@method(
    title="improved consistency training",
    source="2310.14189",
    identity="Eulerian at t = 1, as a difference",
    velocity="conditional",
    stop_gradient="target side",
    derivative="finite difference along the pair, doubling grid",
    when="consistency training with a curriculum of steps",
    cost={"forward": 2, "backward": 1},
    stationary="order",
    order=1,
    at=lambda h: {"cells": 1.0 / h},
    published=lambda: {"reduction": reductions.pseudo_huber(0.00054, times_root_size=True)},
    published_passes=4,
)
def ict(flow_map: FlowMap, interpolant: Interpolant, *, cells: Schedule = 20, **choices: Unpack[Choices]) -> Objective:
    """Consistency training with steps u - s = 1/cells: improved consistency training (2310.14189).

    ``cells`` grows, from 10 to 1280 by doubling in the paper (``curriculum`` shows the schedule), where the steps are equal
    in a power of sigma and not in time. The published reduction is pseudo-Huber with c = 0.00054 sqrt(d) for d entries, in
    the units of X. Cost: 4 passes.
    """

    def share(row: Row) -> Array:
        step = 1.0 / value_at(cells, row.step).astype(row.s.dtype)
        gap = row.t - row.s
        return jnp.where(gap > step, step / jnp.where(gap > step, gap, 1.0), 1.0)

    return _consistency("ict", flow_map, interpolant, {**choices}, _term(share, _pair, "own"))


@method(
    title="easy consistency tuning",
    source="2406.14548",
    identity="Eulerian at t = 1, as a difference",
    velocity="conditional",
    stop_gradient="target side",
    derivative="finite difference along the pair, from the whole to a small step",
    when="tuning a velocity network into a consistency model on a small budget",
    cost={"forward": 2, "backward": 1},
    stationary="order",
    order=1,
    at=lambda h: {"fraction": h},
    published=lambda: {"reduction": reductions.pseudo_huber(0.0)},
    published_passes=4,
)
def ect(
    flow_map: FlowMap, interpolant: Interpolant, *, fraction: Schedule | None = None, **choices: Unpack[Choices]
) -> Objective:
    """Consistency training whose step starts as all of the remaining time, u = 1, where it is a regression of the data, and
    shrinks by halves: easy consistency tuning (2406.14548), of a network that starts as a velocity's.

    ``fraction`` halves every 1000 steps down to 0.01 by default; the paper's is a share of sigma. The published reduction is
    ``sqrt(|D|^2 + c^2) - c`` with c = 0. The weight here is 1/(u - s); on the linear path, the paper's 1/(sigma_s - sigma_u)
    with sigma = (1-t)/t is u s/(u - s), so that the two differ by the factor u s. Cost: 4 passes.
    """
    share = _share(_halving() if fraction is None else fraction)
    return _consistency("ect", flow_map, interpolant, {**choices}, _term(share, _pair, "own"))


def _halving() -> Schedule:
    # Imported here, for ``import jflow`` should take little more time than ``import jax``.
    import optax

    return optax.exponential_decay(1.0, 1000, 0.5, staircase=True, end_value=0.01)


def _share(fraction: Schedule) -> Callable[[Row], Array]:
    return lambda row: value_at(fraction, row.step).astype(row.s.dtype)


def _pair(row: Row, u: Array) -> Event:
    return row.pair(row.s, u)


def _term(share: Callable[[Row], Array], first: Callable[[Row, Array], Event], leg: str) -> Term:
    """The residual from the share (u - s)/(t - s), the mean velocity of the first leg, and whose X_{u,t} it is."""

    def residual(row: Row) -> identities.Residual:
        part, gap = share(row), row.t - row.s
        u = row.s + part * gap
        two = identities.semigroup(row.own.v, row.s, row.t, row.x, 1.0 - part, legs=row.leg(leg).v, first=first(row, u))
        step = part * gap
        weight = jnp.where(step == 0.0, 0.0, 1.0 / jnp.where(step == 0.0, 1.0, step))
        # v times the gap is X up to x, which both sides share.
        return two.rescaled(prediction=gap, difference=gap)._replace(weight=weight)

    return Term("consistency", residual, ("teacher",) if leg == "teacher" else (), second_leg)


def _consistency(
    name: str, flow_map: FlowMap, interpolant: Interpolant, choices: dict[str, Any], term: Term
) -> Objective:
    return Objective(name, flow_map, interpolant, term, defaults={"diagonal": 0.0, **TO_DATA_PAIRS}, **choices)
