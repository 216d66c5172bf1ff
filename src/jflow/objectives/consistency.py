r"""Consistency models: the semigroup identity with a short first leg, for jumps to t = 1.

The methods minimise

.. math:: \frac{1}{u-s}\, R\big( X_{s,1}(I_s) - \mathrm{sg}\, X_{u,1}(x_u) \big), \qquad u = s + \mathrm{fraction} \cdot (1-s).

The point x_u belongs to the same pair as I_s (training), or a solver's step along a teacher's velocity ends there
(distillation). The weight 1/(u-s) is that of 2310.14189 and 2406.14548. As u tends to s, the gradient divided by 1-s tends
to the gradient for the Eulerian identity. ``jflow.objectives`` explains the symbols of the formulas.
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
    r"""Consistency training (2303.01469): compares the jumps to the data from two points of one pair.

    .. math::
        \frac{1}{u-s}\, R\big( X_{s,1}(I_s) - \mathrm{sg}\, X_{u,1}(I_u) \big), \qquad
        u = s + \mathrm{fraction} \cdot (1-s)

    ``fraction`` is a schedule that decreases during training. ``leg`` selects the model that gives X_{u,1}: "own", "ema" (as
    in the paper) or "teacher". Cost: 4 passes.
    """
    return _consistency("consistency_training", flow_map, interpolant, {**choices}, _term(_share(fraction), _pair, leg))


@method(
    title="consistency distillation",
    source="2303.01469",
    identity="Eulerian at t = 1, as a difference",
    velocity="teacher's solver step",
    stop_gradient="target side",
    derivative="finite difference along the teacher",
    when="one jump to the data from a trusted velocity, without the pair's noise in the target",
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
    r"""Consistency distillation (2303.01469): compares the jumps to the data before and after a solver's step.

    .. math::
        \frac{1}{u-s}\, R\big( X_{s,1}(I_s) - \mathrm{sg}\, X_{u,1}(S_{s,u}(I_s)) \big), \qquad
        u = s + \mathrm{fraction} \cdot (1-s)

    The solver S takes ``steps`` steps of ``solver`` ("euler", "heun", ...) along the teacher's velocity. ``fraction`` and
    ``leg`` are those of ``consistency_training``. Cost: 6 passes with Heun's step, 5 with Euler's.
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
    """Improved consistency training (2310.14189): consistency training with steps u - s = 1/cells.

    ``cells`` grows during training; in the paper it doubles from 10 to 1280 (``curriculum`` shows the schedule). The steps
    here are equal in time; the paper's are equal in a power of sigma. The published reduction is pseudo-Huber with
    c = 0.00054 sqrt(d) for d entries, in the units of X. Cost: 4 passes.
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
    when="tuning a velocity network into a consistency model, from large steps to small ones",
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
    r"""Easy consistency tuning (2406.14548): consistency training with a step that shrinks from the whole remaining time.

    It starts with u = 1, a regression on the data, from a network trained as a velocity. By default ``fraction`` is halved
    every 1000 steps, down to 0.01; in the paper it is a fraction of sigma. The published reduction of the difference D,
    with c = 0, is

    .. math:: \sqrt{|D|^2 + c^2} - c.

    The weight here is 1/(u - s). The paper's weight is 1/(sigma_s - sigma_u) with sigma = (1-t)/t on the linear path, which
    equals u s/(u - s). The two differ by the factor u s. Cost: 4 passes.
    """
    share = _share(_halving() if fraction is None else fraction)
    return _consistency("ect", flow_map, interpolant, {**choices}, _term(share, _pair, "own"))


def _halving() -> Schedule:
    # Imported here so that ``import jflow`` takes little more time than ``import jax``.
    import optax

    return optax.exponential_decay(1.0, 1000, 0.5, staircase=True, end_value=0.01)


def _share(fraction: Schedule) -> Callable[[Row], Array]:
    return lambda row: value_at(fraction, row.step).astype(row.s.dtype)


def _pair(row: Row, u: Array) -> Event:
    return row.pair(row.s, u)


def _term(share: Callable[[Row], Array], first: Callable[[Row, Array], Event], leg: str) -> Term:
    """Makes the term from the share (u - s)/(t - s), the mean velocity of the first leg, and the model of X_{u,t}."""

    def residual(row: Row) -> identities.Residual:
        part, gap = share(row), row.t - row.s
        u = row.s + part * gap
        two = identities.semigroup(row.own.v, row.s, row.t, row.x, 1.0 - part, legs=row.leg(leg).v, first=first(row, u))
        step = part * gap
        weight = jnp.where(step == 0.0, 0.0, 1.0 / jnp.where(step == 0.0, 1.0, step))
        # gap * v is X - x, and x cancels in the difference.
        return two.rescaled(prediction=gap, difference=gap)._replace(weight=weight)

    reads = (("pair",) if first is _pair else ()) + (("teacher",) if leg == "teacher" else ())
    return Term("consistency", residual, reads, second_leg)


def _consistency(
    name: str, flow_map: FlowMap, interpolant: Interpolant, choices: dict[str, Any], term: Term
) -> Objective:
    return Objective(name, flow_map, interpolant, term, defaults={"diagonal": 0.0, **TO_DATA_PAIRS}, **choices)
