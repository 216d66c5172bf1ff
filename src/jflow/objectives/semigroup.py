r"""Methods of the semigroup identity: two jumps are one.

In the formulas R is |.|^2 under the reduction, sg the stop-gradient, x = I_s, u = gamma s + (1-gamma) t the middle time and
S a solver of a velocity. A tangent term, where there is one, is on the ``diagonal`` share of the batch. Cost is per
off-diagonal sample, in forward passes of the network.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp

from jflow import checks, identities, times, types
from jflow.interpolants import Interpolant
from jflow.objectives.compose import Leg, Objective, OffDiagonal, Row
from jflow.objectives.curriculum import Schedule, value_at
from jflow.objectives.method import Method
from jflow.types import Array, Event, FlowMap, move


def solver_step(leg: Leg, method: str, steps: int, s: Array, u: Array, x: Event) -> Event:
    """The mean velocity from s to u of a Diffrax solver's ``steps`` steps along a leg's velocity."""
    from jflow import solvers

    def velocity(params: Any, t: Array, x: Event, cond: Any = None, *, key: Any = None) -> Event:
        del params, cond, key
        return leg.velocity(t, x)

    return solvers.solve(velocity, method, steps=steps).mean_velocity(None, s, u, x)


def _semigroup(leg: str) -> OffDiagonal:
    def residual(row: Row) -> identities.Residual:
        return identities.semigroup(row.own.v, row.s, row.t, row.x, row.gamma, legs=row.leg(leg).v)

    return residual


def psd_m(flow_map: FlowMap, interpolant: Interpolant, *, leg: str = "own", **choices: Any) -> Objective:
    """R( v_{s,t} - sg[ v_{s,u}/2 + v_{u,t}(X_{s,u})/2 ] ) + tangent, u the midpoint: progressive self-distillation
    (2505.18825).

    ``leg`` is whose legs: "own", "ema" or "teacher". Cost: 5 passes.
    """
    return Objective("psd_m", flow_map, interpolant, _semigroup(leg), "semigroup", **choices)


def psd_u(flow_map: FlowMap, interpolant: Interpolant, *, leg: str = "own", **choices: Any) -> Objective:
    """R( v_{s,t} - sg[ (1-gamma) v_{s,u} + gamma v_{u,t}(X_{s,u}) ] ) + tangent, gamma uniform: progressive
    self-distillation with a random middle (2505.18825).

    Cost: 5 passes.
    """
    choices = {"gammas": times.uniform(), **choices}
    return Objective("psd_u", flow_map, interpolant, _semigroup(leg), "semigroup", **choices)


def shortcut(
    flow_map: FlowMap, interpolant: Interpolant, *, levels: int = 7, leg: str = "ema", **choices: Any
) -> Objective:
    """``psd_m`` on the dyadic grid of 2^levels cells with the legs of an average: shortcut models (2410.12557).

    An eighth of the batch is off the diagonal. The network should see (s, t - s), as ``nets.MLP`` does. Cost: 5 passes.
    """
    checks.integer("levels", levels, low=1)
    choices = {"diagonal": 0.875, "pairs": times.dyadic(levels), "domain": types.dyadic(levels), **choices}
    return Objective("shortcut", flow_map, interpolant, _semigroup(leg), "semigroup", **choices)


def split_mean_flow(flow_map: FlowMap, interpolant: Interpolant, **choices: Any) -> Objective:
    """``psd_u``, with a ``teacher``'s velocity on the diagonal where one is given: SplitMeanFlow (2507.16884).

    Cost: 5 passes.
    """
    choices = {"gammas": times.uniform(), **choices}
    return Objective("split_mean_flow", flow_map, interpolant, _semigroup("own"), "semigroup", **choices)


def progressive_distillation(
    flow_map: FlowMap, interpolant: Interpolant, *, cells: Schedule = 1, solver: str | None = None, **choices: Any
) -> Objective:
    """R( v_{s,t} - [ v'_{s,u}/2 + v'_{u,t}(X'_{s,u})/2 ] ), u the midpoint: progressive distillation (2202.00512, and of flow
    maps 2406.07507), v' the teacher's.

    (s, t) is a cell of a grid of ``cells`` cells, ``curriculum.halving(...)`` as a rule; where it halves, the student
    becomes the teacher (``make_step``'s ``teacher_updates`` at ``curriculum.halvings(...)``). A first teacher that is only a
    velocity jumps by one step of ``solver`` ("euler", "heun"); put the two stages into a ``sequence``.

    Cost: 5 passes, 7 with Heun's steps.
    """

    def residual(row: Row) -> identities.Residual:
        teacher = row.leg("teacher")
        legs = teacher.v
        if solver is not None:
            legs = functools.partial(solver_step, teacher, solver, 1)
        return identities.semigroup(row.own.v, row.s, row.t, row.x, row.gamma, legs=legs)

    def cell(step: Array) -> times.PairLaw:
        return times.cells(value_at(cells, step))

    choices = {"diagonal": 0.0, "pairs": times.ByStep(cell), **choices}
    return Objective("progressive_distillation", flow_map, interpolant, residual, "semigroup", **choices)


def ctm(
    flow_map: FlowMap,
    interpolant: Interpolant,
    *,
    solver: str = "heun",
    steps: int = 1,
    fraction: Schedule | None = None,
    **choices: Any,
) -> Objective:
    """R( X_{t,1}(X_{s,t}(x)) - sg[ X_{t,1}(X_{u,t}(S_{s,u}(x))) ] ) + tangent: consistency trajectory models (2310.02279).

    Both ends are mapped on to t = 1 by the map at frozen parameters and compared there. S takes ``steps`` steps of
    ``solver`` along the teacher's velocity, or the map's own where there is no teacher. gamma is uniform unless
    ``fraction``, (u - s)/(t - s), is given. The paper's adversarial term is not part of it. Cost: 9 passes with Heun's step.
    """

    def residual(row: Row) -> identities.Residual:
        gamma = row.gamma if fraction is None else 1.0 - value_at(fraction, row.step).astype(row.s.dtype)
        u = gamma * row.s + (1.0 - gamma) * row.t
        source = row.frozen if row.teacher is None else row.teacher
        first = solver_step(source, solver, steps, row.s, u, row.x)
        two = identities.semigroup(row.own.v, row.s, row.t, row.x, gamma, legs=row.frozen.v, first=first)
        one = jnp.ones_like(row.t)

        def end(v: Event) -> Event:
            there = move(row.x, row.s, row.t, v)
            return move(there, row.t, one, row.frozen.v(row.t, one, there))

        return two._replace(prediction=end(two.prediction), target=end(two.target))

    choices = {"gammas": times.uniform(), "diagonal": 0.5, **choices}
    return Objective("ctm", flow_map, interpolant, residual, "semigroup", **choices)


def alpha_flow(flow_map: FlowMap, interpolant: Interpolant, *, alpha: Schedule = 0.05, **choices: Any) -> Objective:
    """R( ( v_{s,t} - sg[ alpha I_s' + (1-alpha) v_{u,t}(x + (u-s) I_s') ] )/alpha ) + tangent, u = s + alpha (t-s): alpha-Flow
    (2510.20771).

    The gradient is that of the paper's R/alpha. alpha falls from 1 (flow matching for every t) towards 0, where the method
    is MeanFlow (``curriculum.falling_sigmoid``). With a ``teacher`` its velocity takes the place of I_s'. Cost: 4 passes.
    """
    return _moved("alpha_flow", flow_map, interpolant, alpha, choices)


def soflow(flow_map: FlowMap, interpolant: Interpolant, *, fraction: Schedule = 0.05, **choices: Any) -> Objective:
    """R( (X_{s,t}(x) - sg X_{u,t}(x + (u-s) I_s'))/(u-s) ) + tangent, in the gradient of v: solution flow (2512.15657).

    u = s + fraction (t-s), with a fraction that falls during training. The residual is alpha-Flow's with alpha = fraction;
    the two differ in their schedules and weights. Cost: 4 passes.
    """
    return _moved("soflow", flow_map, interpolant, fraction, choices)


def _moved(
    name: str, flow_map: FlowMap, interpolant: Interpolant, fraction: Schedule, choices: dict[str, Any]
) -> Objective:
    def residual(row: Row) -> identities.Residual:
        share = value_at(fraction, row.step).astype(row.s.dtype)
        two = identities.semigroup(row.own.v, row.s, row.t, row.x, 1.0 - share, first=row.conditional)
        return two.rescaled(prediction=1.0, difference=1.0 / share)

    return Objective(name, flow_map, interpolant, residual, "semigroup", **choices)


METHODS: dict[str, Method] = {
    "progressive_distillation": Method(
        progressive_distillation,
        "progressive distillation, PFMM",
        "2202.00512, 2406.07507",
        "semigroup, midpoint",
        "teacher legs",
        "both legs",
        "-",
        "no derivative at all and targets that stand still; the steps halve with each stage",
        {"forward": 3, "backward": 1},
        needs=("map teacher",),
        published_passes=5,
    ),
    "psd_m": Method(
        psd_m,
        "progressive self-distillation, midpoint",
        "2505.18825",
        "semigroup, midpoint, + tangent",
        "self legs",
        "both legs",
        "-",
        "networks that refuse forward mode; cheap steps",
        {"forward": 3, "backward": 1},
        published_passes=8,
    ),
    "psd_u": Method(
        psd_u,
        "progressive self-distillation, uniform",
        "2505.18825",
        "semigroup, random middle, + tangent",
        "self legs",
        "both legs",
        "-",
        "as PSD-M, with every split of a jump",
        {"forward": 3, "backward": 1},
        published_passes=8,
    ),
    "shortcut": Method(
        shortcut,
        "shortcut model",
        "2410.12557",
        "semigroup, midpoint, on a dyadic grid, + tangent",
        "self legs (average)",
        "both legs",
        "-",
        "step counts that are powers of two are all that is wanted",
        {"forward": 3, "backward": 1},
        needs=("ema",),
        published_passes=8,
    ),
    "split_mean_flow": Method(
        split_mean_flow,
        "SplitMeanFlow",
        "2507.16884",
        "semigroup, random middle, + tangent",
        "self legs; teacher on the diagonal",
        "both legs",
        "-",
        "PSD-U with a teacher's diagonal",
        {"forward": 3, "backward": 1},
        published_passes=9,
    ),
    "ctm": Method(
        ctm,
        "consistency trajectory model",
        "2310.02279",
        "semigroup compared at t = 1, + tangent",
        "teacher's solver step, self legs",
        "target side",
        "-",
        "any-to-any jumps from a teacher, compared where they matter, at the data",
        {"forward": 6, "backward": 1, "input_backward": 1},
        stationary="order",
        order=3,
        at=lambda h: {"fraction": h},
        needs=("teacher",),
        published_passes=7,
    ),
    "alpha_flow": Method(
        alpha_flow,
        "alpha-Flow",
        "2510.20771",
        "semigroup with a conditional first leg, + tangent",
        "conditional, self",
        "target side",
        "-",
        "from flow matching to MeanFlow by one parameter, without derivatives",
        {"forward": 2, "backward": 1},
        stationary="limit",
        order=1,
        at=lambda h: {"alpha": h},
    ),
    "soflow": Method(
        soflow,
        "SoFlow",
        "2512.15657",
        "Eulerian, as a difference, + tangent",
        "conditional",
        "target side",
        "finite difference along the velocity",
        "MeanFlow without forward mode",
        {"forward": 2, "backward": 1},
        stationary="order",
        order=1,
        at=lambda h: {"fraction": h},
        published_passes=7,
    ),
}
