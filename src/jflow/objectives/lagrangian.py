r"""Methods of the Lagrangian identity: the image of a point moves with the velocity at its own position.

``lmd``, ``lsd``, ``ayf_lmd`` and ``tvm`` take ``derivative``, which is ``identities.forward_mode`` or a finite difference,
and ``warmup``, a schedule r that multiplies the derivative (1 by default). ``fmm`` takes ``derivative``. ``pid`` and
``free_flow`` use a finite difference with their own ``step``. ``jflow.objectives`` explains the symbols of the formulas.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Unpack

import jax.numpy as jnp

from jflow import checks, identities, reductions, times, trees
from jflow.identities import Derivative
from jflow.interpolants import Interpolant
from jflow.objectives.choices import Choices, DerivativeChoices
from jflow.objectives.curriculum import Schedule, value_at
from jflow.objectives.method import method
from jflow.objectives.objective import Objective
from jflow.objectives.row import Row, Term, near_target
from jflow.types import FROM_NOISE, Array, FlowMap, move


def lagrangian_term(leg: str, stop: str, warmup: Schedule | None = None, derivative: Derivative | None = None) -> Term:
    """Makes a term of the Lagrangian residual; ``leg`` selects the model that gives the velocity."""
    derivative = identities.forward_mode if derivative is None else derivative

    def residual(row: Row) -> identities.Residual:
        along = derivative if warmup is None else identities.scaled(derivative, value_at(warmup, row.step))
        b = row.leg(leg).velocity
        return identities.lagrangian(row.own.v, row.s, row.t, row.x, b, stop=stop, derivative=along)

    return Term("lagrangian", residual, ("teacher",) if leg == "teacher" else (), near_target)


def _lagrangian(
    name: str,
    flow_map: FlowMap,
    interpolant: Interpolant,
    choices: dict[str, Any],
    leg: str,
    stop: str,
    **defaults: Any,
) -> Objective:
    """Makes a method with the Lagrangian residual."""
    term = lagrangian_term(leg, stop, choices.pop("warmup", None), choices.pop("derivative", None))
    return Objective(name, flow_map, interpolant, term, defaults=defaults, **choices)


@method(
    title="Lagrangian map distillation",
    source="2406.07507",
    identity="Lagrangian",
    velocity="teacher",
    stop_gradient="none",
    derivative="jvp",
    when="from a trusted velocity; its gradient passes through the velocity at the map's own images",
    cost={"jvp": 1, "jvp_backward": 1, "forward": 1, "input_backward": 1},
    needs=("teacher",),
    published_passes=9,
)
def lmd(flow_map: FlowMap, interpolant: Interpolant, **choices: Unpack[DerivativeChoices]) -> Objective:
    r"""Lagrangian map distillation (2406.07507): the Lagrangian residual with the teacher's velocity.

    .. math:: R\big( \partial_t X_{s,t}(x) - b_t(X_{s,t}(x)) \big)

    There is no stop-gradient. Cost: 8 passes (value and derivative 2, backward 4, the teacher 1, backward to its input 1).
    """
    return _lagrangian("lmd", flow_map, interpolant, {**choices}, "teacher", "none", diagonal=0.0)


@method(
    title="flow map matching",
    source="2406.07507",
    identity="Lagrangian at the returned point, and the cycle",
    velocity="conditional",
    stop_gradient="none",
    derivative="jvp",
    when="a map of both directions (encoding) from data alone",
    cost={"forward": 1, "backward": 1, "jvp": 1, "jvp_backward": 1},
    needs=("backward",),
    published_passes=9,
)
def fmm(
    flow_map: FlowMap,
    interpolant: Interpolant,
    *,
    cycle: float = 1.0,
    derivative: Derivative = identities.forward_mode,
    **choices: Unpack[Choices],
) -> Objective:
    r"""Flow map matching (2406.07507): the Lagrangian identity for the jump back to a sampled point, and the cycle condition.

    With :math:`y = X_{s,t}(I_s)`, the residual has two parts, the velocity at the returned point and the cycle condition:

    .. math:: R\Big( \partial_s X_{t,s}(y) - \dot I_s,\ \sqrt{\mathrm{cycle}}\, \big( X_{t,s}(y) - I_s \big) \Big)

    The derivative does not act on y. The paper's s and t are exchanged: here the sampled point is at the source. Both
    directions of time are trained: (s, t) is uniform on the square, and the map's domain must include both directions.
    There is no stop-gradient. Cost: 9 passes.

    Raises:
      ValueError: if the map's domain has no backward direction, or ``cycle`` is negative.
    """
    checks.number("cycle", cycle, low=0.0)
    if isinstance(flow_map, FlowMap) and not flow_map.domain.backward:
        raise ValueError(
            f"flow_map: flow map matching trains both directions, the map's domain is {flow_map.domain.name}"
        )

    def residual(row: Row) -> identities.Residual:
        there = move(row.x, row.s, row.t, row.own.v(row.s, row.t, row.x))
        along = identities.within(derivative, identities.target_interval(row.t, row.s))
        value, (in_time,) = along(lambda s: row.own.v(row.t, s, there), (row.s,), (jnp.ones_like(row.s),))
        back = move(there, row.t, row.s, value)
        root = jnp.sqrt(jnp.asarray(cycle))
        velocity = trees.axpy(row.s - row.t, in_time, value)
        return identities.Residual(
            (velocity, trees.scale(root, back)), (row.conditional, trees.scale(root, row.x)), in_time
        )

    square = times.independent(times.uniform(), times.uniform())

    term = Term("matching", residual, ("velocity",), lambda s, t, gamma: near_target(t, s, gamma))
    return Objective("fmm", flow_map, interpolant, term, defaults={"diagonal": 0.0, "pairs": square}, **choices)


@method(
    title="Lagrangian self-distillation",
    source="2505.18825",
    identity="Lagrangian + tangent",
    velocity="self",
    stop_gradient="velocity leg",
    derivative="jvp",
    when="from data alone, with one derivative, in time, and a target free of the pair's noise",
    cost={"jvp": 1, "jvp_backward": 1, "forward": 1},
    published_passes=10,
)
def lsd(
    flow_map: FlowMap,
    interpolant: Interpolant,
    *,
    leg: str = "own",
    stop: str = "velocity",
    **choices: Unpack[DerivativeChoices],
) -> Objective:
    r"""Lagrangian self-distillation (2505.18825): the Lagrangian residual with the map's own velocity, and a tangent term.

    .. math:: R\big( v_{s,t} + (t-s)\, \partial_t v_{s,t} - \mathrm{sg}\, v_{t,t}(X_{s,t}) \big)

    ``leg`` selects the model that gives v_{t,t}: "own", "ema" or "teacher". ``stop`` selects the parts under a
    stop-gradient, as in ``identities.lagrangian``. Cost: 7 passes (value and derivative 2, backward 4, the diagonal 1).

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jflow import flow_map, interpolants, objectives, parameterizations
      >>> def net(params, s, t, x, cond=None, *, key=None):
      ...     return params * x
      >>> path = interpolants.linear()
      >>> model = flow_map(net, parameterizations.mean_velocity_form(path))
      >>> objective = objectives.lsd(model, path)
      >>> losses, aux = jax.jit(objective)(jnp.float32(0.5), jax.random.key(0), jnp.ones((8, 2), jnp.float32))
      >>> losses.shape, bool(jnp.isfinite(losses).all())
      ((8,), True)
    """
    return _lagrangian("lsd", flow_map, interpolant, {**choices}, leg, stop)


def align_your_flow() -> dict[str, Any]:
    """The choices of the paper (2506.14603) for both of its methods."""

    def rising(step: Array) -> Array:
        return 0.99 * (step / 10_000.0).clip(0.0, 1.0)

    return {"reduction": reductions.normalised(0.1), "warmup": rising}


@method(
    title="Align Your Flow, Lagrangian",
    source="2506.14603",
    identity="Lagrangian",
    velocity="teacher, guided or not",
    stop_gradient="target side",
    derivative="jvp",
    when="as its Eulerian sibling, with the teacher asked at the map's own images",
    cost={"jvp": 1, "backward": 1, "forward": 1},
    needs=("teacher",),
    published=align_your_flow,
    published_passes=6,
)
def ayf_lmd(flow_map: FlowMap, interpolant: Interpolant, **choices: Unpack[DerivativeChoices]) -> Objective:
    r"""Align Your Flow, Lagrangian (2506.14603): the Lagrangian residual with the target side under a stop-gradient.

    .. math:: R\big( v_{s,t} - \mathrm{sg}[ b_t(X_{s,t}) - r (t-s)\, \partial_t v_{s,t} ] \big)

    ``warmup`` is r. In the paper, r rises to 0.99, the tangent is normalised (``reductions.normalised``), and the teacher is
    guided (``guidance.autoguided``). Cost: 5 passes.
    """
    return _lagrangian("ayf_lmd", flow_map, interpolant, {**choices}, "teacher", "target", diagonal=0.0)


@method(
    title="terminal velocity matching",
    source="2511.19797",
    identity="Lagrangian + tangent",
    velocity="average of self",
    stop_gradient="velocity leg",
    derivative="jvp",
    when="LSD with the velocity of the average parameters in its target",
    cost={"jvp": 1, "jvp_backward": 1, "forward": 1},
    needs=("ema",),
    published_passes=10,
)
def tvm(
    flow_map: FlowMap, interpolant: Interpolant, *, leg: str = "ema", **choices: Unpack[DerivativeChoices]
) -> Objective:
    r"""Terminal velocity matching (2511.19797): ``lsd`` with the velocity at the averaged parameters.

    .. math:: R\big( v_{s,t} + (t-s)\, \partial_t v_{s,t} - v^{\mathrm{ema}}_{t,t}(X_{s,t}) \big)

    There is a tangent term. ``leg`` selects the model that gives the velocity: "ema" or "own". The paper requires a network
    that is Lipschitz continuous in x. Cost: 7 passes.
    """
    return _lagrangian("tvm", flow_map, interpolant, {**choices}, leg, "velocity")


@method(
    title="physics-informed distillation",
    source="2411.08378",
    identity="Lagrangian at s = 0",
    velocity="teacher",
    stop_gradient="teacher leg",
    derivative="finite difference",
    when="a teacher and no data",
    cost={"forward": 3, "backward": 2},
    stationary="order",
    order=1,
    at=lambda h: {"step": h},
    needs=("teacher",),
    published_passes=7,
)
def pid(flow_map: FlowMap, interpolant: Interpolant, *, step: float = 0.01, **choices: Unpack[Choices]) -> Objective:
    r"""Physics-informed distillation (2411.08378): the Lagrangian residual at s = 0 with a finite difference in t.

    .. math:: R\big( v_{0,t}(x_0) + t\, D_t v_{0,t}(x_0) - \mathrm{sg}\, b_t(X_{0,t}(x_0)) \big)

    :math:`D_t` is a backward difference with ``step`` (a forward difference where t < step), so that no time exceeds 1. The
    method needs no data: ``batch.x1`` may be None. Cost: 7 passes (two values 2, backward through both 4, the teacher 1).

    Raises:
      ValueError: if the path does not start at the base, or the map is in the noise form, which is singular at s = 0.
    """
    return _from_noise("pid", flow_map, interpolant, {**choices}, step, "velocity")


@method(
    title="FreeFlow, predictor",
    source="2511.19428",
    identity="Lagrangian at s = 0",
    velocity="teacher",
    stop_gradient="target side",
    derivative="finite difference",
    when="a teacher and no data, without a gradient through the difference",
    cost={"forward": 3, "backward": 1},
    stationary="order",
    order=1,
    at=lambda h: {"step": h},
    needs=("teacher",),
    published_passes=12,
)
def free_flow(
    flow_map: FlowMap, interpolant: Interpolant, *, step: float = 0.005, **choices: Unpack[Choices]
) -> Objective:
    r"""FreeFlow's predictor (2511.19428): ``pid`` with the derivative also under the stop-gradient.

    .. math:: R\big( v_{0,t}(x_0) - \mathrm{sg}[ b_t(X_{0,t}(x_0)) - t\, D_t v_{0,t}(x_0) ] \big)

    The paper's corrector, a second network that matches the velocity of the noised samples, is not included. Cost: 5 passes.

    Raises:
      ValueError: if the path does not start at the base, or the map is in the noise form, which is singular at s = 0.
    """
    return _from_noise("free_flow", flow_map, interpolant, {**choices}, step, "target")


def _from_noise(
    name: str, flow_map: FlowMap, interpolant: Interpolant, choices: dict[str, Any], step: float, stop: str
) -> Objective:
    alpha_0, beta_0, *_ = getattr(interpolant, "endpoints", (1.0, 0.0))
    if (alpha_0, beta_0) != (1.0, 0.0):
        raise ValueError(f"interpolant: {name} starts at the base, where {interpolant.name!r} only nearly begins")
    if getattr(flow_map, "form", "") == "noise":
        raise ValueError(f"flow_map: {name} starts at s = 0, where the noise form is singular")

    def residual(row: Row) -> identities.Residual:
        h = jnp.where(row.t >= row.s + step, -step, step)
        return lagrangian_term("teacher", stop, derivative=identities.finite_difference(h)).residual(row)

    pairs = times.independent(times.constant(0.0), times.uniform())
    defaults = {"diagonal": 0.0, "pairs": pairs, "domain": FROM_NOISE}
    term = dataclasses.replace(lagrangian_term("teacher", stop), residual=residual)
    return Objective(name, flow_map, interpolant, term, needs=("no data",), defaults=defaults, **choices)
