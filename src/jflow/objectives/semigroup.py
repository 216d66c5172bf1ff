r"""Methods of the semigroup identity: two successive jumps equal one jump.

``jflow.objectives`` explains the symbols of the formulas.
"""

from __future__ import annotations

import functools
from typing import Unpack

import jax.numpy as jnp
import numpy as np

from jflow import identities, times, types
from jflow.interpolants import Interpolant
from jflow.objectives.choices import Choices
from jflow.objectives.curriculum import Schedule, value_at
from jflow.objectives.method import method
from jflow.objectives.objective import Objective
from jflow.objectives.row import Leg, Row, Term, both_legs, gamma_of, second_leg
from jflow.types import Array, Cond, Event, FlowMap, Key, Params, Time, move


def solver_step(leg: Leg, method: str, steps: int, s: Array, u: Array, x: Event) -> Event:
    """Returns the mean velocity from s to u of ``steps`` steps of a Diffrax solver along a leg's velocity."""
    from jflow import solvers

    def velocity(params: Params, t: Time, x: Event, cond: Cond = None, *, key: Key | None = None) -> Event:
        del params, cond, key
        return leg.velocity(t, x)

    return solvers.solve(velocity, method, steps=steps).mean_velocity(None, s, u, x)


def semigroup_term(leg: str, stop: str = "target", smallest: float = 0.0) -> Term:
    """Makes a term of the semigroup residual.

    Args:
      leg: the model that gives the two legs: "own", "ema" or "teacher".
      stop: as in ``identities.semigroup``.
      smallest: legs shorter than this gap are evaluated at s = t, as velocities.
    """
    # Halfway between the smallest gap and half of it, so that rounding of either gap does not matter.
    least = 0.75 * smallest

    def residual(row: Row) -> identities.Residual:
        v = row.leg(leg).v

        def asked(s: Time, u: Time, x: Event) -> Event:
            return v(s, jnp.where(jnp.abs(u - s) < least, s, u), x)

        legs = asked if smallest else v
        return identities.semigroup(row.own.v, row.s, row.t, row.x, gamma_of(row), legs=legs, stop=stop)

    def asks(s: np.ndarray, t: np.ndarray, gamma: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        return [(start, np.where(np.abs(end - start) < least, start, end)) for start, end in both_legs(s, t, gamma)]

    if leg == "teacher":
        return Term("semigroup", residual, ("gamma", "teacher"))
    return Term("semigroup", residual, ("gamma",), asks)


@method(
    title="progressive distillation, PFMM",
    source="2202.00512, 2406.07507",
    identity="semigroup, midpoint",
    velocity="teacher legs",
    stop_gradient="both legs",
    when="no derivative at all and targets that stand still; the steps halve with each stage",
    cost={"forward": 3, "backward": 1},
    needs=("map teacher",),
    published_passes=5,
)
def progressive_distillation(
    flow_map: FlowMap,
    interpolant: Interpolant,
    *,
    cells: Schedule = 1,
    solver: str | None = None,
    **choices: Unpack[Choices],
) -> Objective:
    r"""Progressive distillation (2202.00512; 2406.07507 for flow maps): one jump is trained to equal two jumps of the teacher.

    With the midpoint u and the teacher's mean velocity v' and jump X', it minimises

    .. math:: R\Big( v_{s,t} - \tfrac12 \big[ v'_{s,u} + v'_{u,t}(X'_{s,u}) \big] \Big).

    (s, t) is a cell of a grid of ``cells`` cells, usually ``curriculum.halving(...)``. When this number is halved, the student
    becomes the teacher: pass ``curriculum.halvings(...)`` as ``teacher_updates`` of ``make_step``. If the first teacher is
    only a velocity, its jumps are single steps of ``solver`` ("euler", "heun"); combine the two stages with ``sequence``.

    Cost: 5 passes, 7 with Heun's steps.
    """

    def residual(row: Row) -> identities.Residual:
        teacher = row.leg("teacher")
        legs = teacher.v if solver is None else functools.partial(solver_step, teacher, solver, 1)
        return identities.semigroup(row.own.v, row.s, row.t, row.x, gamma_of(row), legs=legs)

    def cell(step: Array) -> times.PairLaw:
        return times.cells(value_at(cells, step))

    term = Term("semigroup", residual, ("gamma", "teacher"))
    defaults = {"diagonal": 0.0, "pairs": times.ByStep(cell)}
    return Objective("progressive_distillation", flow_map, interpolant, term, defaults=defaults, **choices)


@method(
    title="progressive self-distillation, midpoint",
    source="2505.18825",
    identity="semigroup, midpoint, + tangent",
    velocity="self legs",
    stop_gradient="both legs",
    when="networks that refuse forward mode; no derivative",
    cost={"forward": 3, "backward": 1},
    published_passes=8,
)
def psd_m(
    flow_map: FlowMap,
    interpolant: Interpolant,
    *,
    leg: str = "own",
    stop: str = "target",
    **choices: Unpack[Choices],
) -> Objective:
    r"""Progressive self-distillation with the midpoint (2505.18825): one jump is trained to equal two jumps of the map.

    .. math:: R\Big( v_{s,t} - \mathrm{sg}\, \tfrac12 \big[ v_{s,u} + v_{u,t}(X_{s,u}) \big] \Big)

    There is a tangent term. ``leg`` selects the model that gives the legs: "own", "ema" or "teacher". ``stop`` selects the
    parts under a stop-gradient, as in ``identities.semigroup``. Cost: 5 passes.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jflow import flow_map, interpolants, objectives, parameterizations
      >>> def net(params, s, t, x, cond=None, *, key=None):
      ...     return params * x
      >>> path = interpolants.linear()
      >>> model = flow_map(net, parameterizations.mean_velocity_form(path))
      >>> objective = objectives.psd_m(model, path)
      >>> losses, aux = jax.jit(objective)(jnp.float32(0.5), jax.random.key(0), jnp.ones((8, 2), jnp.float32))
      >>> losses.shape, bool(jnp.isfinite(losses).all())
      ((8,), True)
    """
    return Objective("psd_m", flow_map, interpolant, semigroup_term(leg, stop), **choices)


@method(
    title="progressive self-distillation, uniform",
    source="2505.18825",
    identity="semigroup, random middle, + tangent",
    velocity="self legs",
    stop_gradient="both legs",
    when="as PSD-M, with every split of a jump",
    cost={"forward": 3, "backward": 1},
    published_passes=8,
)
def psd_u(
    flow_map: FlowMap,
    interpolant: Interpolant,
    *,
    leg: str = "own",
    stop: str = "target",
    **choices: Unpack[Choices],
) -> Objective:
    r"""Progressive self-distillation with a random middle time (2505.18825): ``psd_m`` with gamma uniform on [0, 1].

    .. math:: R\big( v_{s,t} - \mathrm{sg}[ (1-\gamma)\, v_{s,u} + \gamma\, v_{u,t}(X_{s,u}) ] \big)

    There is a tangent term. ``leg`` and ``stop`` are those of ``psd_m``. Cost: 5 passes.
    """
    term = semigroup_term(leg, stop)
    return Objective("psd_u", flow_map, interpolant, term, defaults={"gammas": times.uniform()}, **choices)


@method(
    title="shortcut model",
    source="2410.12557",
    identity="semigroup, midpoint, on a dyadic grid, + tangent",
    velocity="self legs (average)",
    stop_gradient="both legs",
    when="step counts that are powers of two are all that is wanted",
    cost={"forward": 3, "backward": 1},
    needs=("ema",),
    published_passes=8,
)
def shortcut(
    flow_map: FlowMap,
    interpolant: Interpolant,
    *,
    levels: int = 7,
    leg: str = "ema",
    stop: str = "target",
    **choices: Unpack[Choices],
) -> Objective:
    """Shortcut models (2410.12557): ``psd_m`` on the dyadic grid of 2^levels cells, with legs at the averaged parameters.

    An eighth of the batch is off the diagonal. Legs shorter than a cell are evaluated at s = t, as in the paper. A jump over
    one cell is therefore trained to equal two Euler steps of the velocity, and a longer jump to equal two jumps over its
    halves. The network should take (s, t - s) as inputs, as ``nets.MLP`` does. Cost: 5 passes.
    """
    defaults = {"diagonal": 0.875, "pairs": times.dyadic(levels), "domain": types.dyadic(levels)}
    term = semigroup_term(leg, stop, 2.0**-levels)
    return Objective("shortcut", flow_map, interpolant, term, defaults=defaults, **choices)


@method(
    title="SplitMeanFlow",
    source="2507.16884",
    identity="semigroup, random middle, + tangent",
    velocity="self legs; teacher on the diagonal",
    stop_gradient="both legs",
    when="PSD-U with a teacher's diagonal",
    cost={"forward": 3, "backward": 1},
    published_passes=9,
)
def split_mean_flow(flow_map: FlowMap, interpolant: Interpolant, **choices: Unpack[Choices]) -> Objective:
    """SplitMeanFlow (2507.16884): ``psd_u``, with the ``teacher``'s velocity on the diagonal if there is a teacher.

    Cost: 5 passes.
    """
    defaults = {"gammas": times.uniform()}
    return Objective("split_mean_flow", flow_map, interpolant, semigroup_term("own"), defaults=defaults, **choices)


@method(
    title="consistency trajectory model",
    source="2310.02279",
    identity="semigroup compared at t = 1, + tangent",
    velocity="teacher's solver step, self legs",
    stop_gradient="target side",
    when="any-to-any jumps from a teacher, compared at the data",
    cost={"forward": 6, "backward": 1, "input_backward": 1},
    stationary="order",
    order=3,
    at=lambda h: {"fraction": h},
    needs=("teacher",),
    published_passes=7,
)
def ctm(
    flow_map: FlowMap,
    interpolant: Interpolant,
    *,
    solver: str = "heun",
    steps: int = 1,
    fraction: Schedule | None = None,
    **choices: Unpack[Choices],
) -> Objective:
    r"""Consistency trajectory models (2310.02279): the semigroup identity after a solver's step, compared at t = 1.

    .. math:: R\big( X_{t,1}(X_{s,t}(x)) - \mathrm{sg}[ X_{t,1}(X_{u,t}(S_{s,u}(x))) ] \big)

    There is a tangent term. The jumps to t = 1, where both ends are compared, use frozen parameters. The solver S takes
    ``steps`` steps of ``solver`` along the teacher's velocity, or along the map's own if there is no teacher. gamma is
    uniform unless ``fraction`` = (u - s)/(t - s) is given. The paper's adversarial term is not included. Cost: 9 passes with
    Heun's step.
    """

    def residual(row: Row) -> identities.Residual:
        gamma = gamma_of(row) if fraction is None else 1.0 - value_at(fraction, row.step).astype(row.s.dtype)
        u = gamma * row.s + (1.0 - gamma) * row.t
        source = row.frozen if row.teacher is None else row.teacher
        first = solver_step(source, solver, steps, row.s, u, row.x)
        two = identities.semigroup(row.own.v, row.s, row.t, row.x, gamma, legs=row.frozen.v, first=first)
        one = jnp.ones_like(row.t)

        def end(v: Event) -> Event:
            there = move(row.x, row.s, row.t, v)
            return move(there, row.t, one, row.frozen.v(row.t, one, there))

        return two._replace(prediction=end(two.prediction), target=end(two.target))

    # A fraction takes the place of the law of gamma.
    random = {"gammas": times.uniform()} if fraction is None else {}
    term = Term("semigroup", residual, ("gamma", "teacher") if random else ("teacher",), second_leg)
    return Objective("ctm", flow_map, interpolant, term, defaults={"diagonal": 0.5, **random}, **choices)


@method(
    title="alpha-Flow",
    source="2510.20771",
    identity="semigroup with a conditional first leg, + tangent",
    velocity="conditional, self",
    stop_gradient="target side",
    when="from flow matching to MeanFlow by one parameter, without derivatives",
    cost={"forward": 2, "backward": 1},
    stationary="limit",
    order=1,
    at=lambda h: {"alpha": h},
)
def alpha_flow(
    flow_map: FlowMap, interpolant: Interpolant, *, alpha: Schedule = 0.05, **choices: Unpack[Choices]
) -> Objective:
    r"""alpha-Flow (2510.20771): the semigroup residual with the velocity of the pair as its first leg.

    .. math::
        R(\Delta/\alpha), \qquad
        \Delta &= v_{s,t} - \mathrm{sg}\big[ \alpha \dot I_s + (1-\alpha)\, v_{u,t}(x + (u-s) \dot I_s) \big] \\
        u &= s + \alpha (t-s)

    There is a tangent term. In the gradient, the derivative of :math:`\Delta/\alpha` is replaced by that of v; with the
    squared reduction, the gradient is that of the paper's :math:`R(\Delta)/\alpha`. alpha falls from 1 (flow matching for
    every t) towards 0, where the method is MeanFlow (``curriculum.falling_sigmoid``). If there is a ``teacher``, its
    velocity replaces :math:`\dot I_s`. Cost: 4 passes.
    """
    return Objective("alpha_flow", flow_map, interpolant, _moved(alpha), **choices)


@method(
    title="SoFlow",
    source="2512.15657",
    identity="Eulerian, as a difference, + tangent",
    velocity="conditional",
    stop_gradient="target side",
    derivative="finite difference along the velocity",
    when="MeanFlow without forward mode",
    cost={"forward": 2, "backward": 1},
    stationary="order",
    order=1,
    at=lambda h: {"fraction": h},
    published_passes=7,
)
def soflow(
    flow_map: FlowMap, interpolant: Interpolant, *, fraction: Schedule = 0.05, **choices: Unpack[Choices]
) -> Objective:
    r"""Solution flow (2512.15657): the Eulerian identity as a difference of jumps along the velocity of the pair.

    .. math::
        R\left( \frac{X_{s,t}(x) - \mathrm{sg}\, X_{u,t}(x + (u-s) \dot I_s)}{u-s} \right), \qquad
        u = s + \mathrm{fraction} \cdot (t-s)

    There is a tangent term. ``fraction`` falls during training. The residual and its gradient are those of ``alpha_flow``
    with alpha = fraction; the two methods differ in their schedules and weights. Cost: 4 passes.
    """
    return Objective("soflow", flow_map, interpolant, _moved(fraction), **choices)


def _moved(fraction: Schedule) -> Term:
    def residual(row: Row) -> identities.Residual:
        share = value_at(fraction, row.step).astype(row.s.dtype)
        two = identities.semigroup(row.own.v, row.s, row.t, row.x, 1.0 - share, first=row.conditional)
        return two.rescaled(prediction=1.0, difference=1.0 / share)

    return Term("semigroup", residual, ("velocity",), second_leg)
