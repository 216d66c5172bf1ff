r"""Methods of the Lagrangian identity: the image of a point moves with the velocity at the place where it is.

In the formulas R is |.|^2 under the reduction, sg the stop-gradient, x = I_s, b the teacher's velocity. ``derivative`` may be
replaced by a finite difference, and ``warmup``, a schedule r, multiplies it (1 by default). A tangent term, where there is
one, is on the ``diagonal`` share of the batch. Cost is per off-diagonal sample, in forward passes of the network.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from jflow import identities, times, trees
from jflow.identities import Derivative
from jflow.interpolants import Interpolant
from jflow.objectives.compose import Objective, OffDiagonal, Row
from jflow.objectives.curriculum import Schedule, value_at
from jflow.objectives.eulerian import align_your_flow
from jflow.objectives.method import Method
from jflow.types import FROM_NOISE, FlowMap, move


def _lagrangian(velocity: str, stop: str, derivative: Derivative, warmup: Schedule | None = None) -> OffDiagonal:
    def residual(row: Row) -> identities.Residual:
        along = derivative if warmup is None else identities.scaled(derivative, value_at(warmup, row.step))
        b = row.leg(velocity).velocity
        return identities.lagrangian(row.own.v, row.s, row.t, row.x, b, stop=stop, derivative=along)

    return residual


def lsd(
    flow_map: FlowMap,
    interpolant: Interpolant,
    *,
    warmup: Schedule | None = None,
    derivative: Derivative = identities.forward_mode,
    **choices: Any,
) -> Objective:
    """R( v_{s,t} + (t-s) d/dt v_{s,t} - sg v_{t,t}(X_{s,t}) ) + tangent: Lagrangian self-distillation (2505.18825).

    Cost: 7 passes (derivative with value 2, back through it 4, the diagonal 1).
    """
    residual = _lagrangian("own", "velocity", derivative, warmup)
    return Objective("lsd", flow_map, interpolant, residual, "lagrangian", **choices)


def tvm(
    flow_map: FlowMap,
    interpolant: Interpolant,
    *,
    leg: str = "ema",
    warmup: Schedule | None = None,
    derivative: Derivative = identities.forward_mode,
    **choices: Any,
) -> Objective:
    """R( v_{s,t} + (t-s) d/dt v_{s,t} - v^ema_{t,t}(X_{s,t}) ) + tangent: terminal velocity matching (2511.19797).

    As ``lsd`` with the velocity of an average (``leg``: "ema" or "own"). The paper asks of the network that it be
    Lipschitz in its points. Cost: 7 passes.
    """
    residual = _lagrangian(leg, "velocity", derivative, warmup)
    return Objective("tvm", flow_map, interpolant, residual, "lagrangian", **choices)


def lmd(
    flow_map: FlowMap,
    interpolant: Interpolant,
    *,
    warmup: Schedule | None = None,
    derivative: Derivative = identities.forward_mode,
    **choices: Any,
) -> Objective:
    """R( d/dt X_{s,t}(x) - b_t(X_{s,t}(x)) ): Lagrangian map distillation (2406.07507); nothing is stopped.

    Cost: 8 passes (derivative with value 2, back 4, the teacher 1, and back to its input 1).
    """
    residual = _lagrangian("teacher", "none", derivative, warmup)
    return Objective("lmd", flow_map, interpolant, residual, "lagrangian", **{"diagonal": 0.0, **choices})


def ayf_lmd(
    flow_map: FlowMap,
    interpolant: Interpolant,
    *,
    warmup: Schedule | None = None,
    derivative: Derivative = identities.forward_mode,
    **choices: Any,
) -> Objective:
    """R( v_{s,t} - sg[ b_t(X_{s,t}) - r (t-s) d/dt v_{s,t} ] ): Align Your Flow, Lagrangian (2506.14603).

    ``warmup`` is r; the paper's rises to 0.99. The paper normalises the tangent
    (``reductions.normalised``) and guides the teacher (``guidance.autoguided``). Cost: 5 passes.
    """
    residual = _lagrangian("teacher", "target", derivative, warmup)
    return Objective("ayf_lmd", flow_map, interpolant, residual, "lagrangian", **{"diagonal": 0.0, **choices})


def pid(flow_map: FlowMap, interpolant: Interpolant, *, step: float = 0.01, **choices: Any) -> Objective:
    """R( v_{0,t} + t D_t v_{0,t} - sg b_t(X_{0,t}) ), x = x0, D_t a difference: physics-informed distillation (2411.08378).

    D_t looks back by ``step`` (forward where t < step), so that no time beyond 1 is asked for. No data: ``batch.x1`` may
    be None. Cost: 7 passes (two values, back through both 4, the teacher 1).

    Raises:
      ValueError: for a path that does not start at the base, or a parameterization singular there.
    """
    return _from_noise("pid", flow_map, interpolant, "velocity", step, choices)


def free_flow(flow_map: FlowMap, interpolant: Interpolant, *, step: float = 0.005, **choices: Any) -> Objective:
    """R( v_{0,t} - sg[ b_t(X_{0,t}) - t D_t v_{0,t} ] ), x = x0: FreeFlow's predictor (2511.19428).

    ``pid`` with the derivative, too, under the stop-gradient. The paper's corrector, a second network that matches the
    velocity of the noised samples, is not part of it. Cost: 5 passes.

    Raises:
      ValueError: for a path that does not start at the base, or a parameterization singular there.
    """
    return _from_noise("free_flow", flow_map, interpolant, "target", step, choices)


def _from_noise(
    name: str, flow_map: FlowMap, interpolant: Interpolant, stop: str, step: float, choices: dict[str, Any]
) -> Objective:
    alpha_0, beta_0, *_ = interpolant.endpoints
    if (alpha_0, beta_0) != (1.0, 0.0):
        raise ValueError(f"interpolant: {name} starts at the base, where {interpolant.name!r} only nearly begins")
    if flow_map.form == "noise":
        raise ValueError(f"flow_map: {name} starts at s = 0, where the noise form is singular")

    def residual(row: Row) -> identities.Residual:
        h = jnp.where(row.t >= row.s + step, -step, step)
        return _lagrangian("teacher", stop, identities.finite_difference(h))(row)

    pairs = times.independent(times.constant(0.0), times.uniform())
    choices = {"diagonal": 0.0, "pairs": pairs, "domain": FROM_NOISE, **choices}
    return Objective(name, flow_map, interpolant, residual, "lagrangian", needs=("no data",), **choices)


def fmm(
    flow_map: FlowMap,
    interpolant: Interpolant,
    *,
    cycle: float = 1.0,
    derivative: Derivative = identities.forward_mode,
    **choices: Any,
) -> Objective:
    """R( d/ds X_{t,s}(X_{s,t}(I_s)) - I_s', sqrt(cycle) (X_{t,s}(X_{s,t}(I_s)) - I_s) ): flow map matching (2406.07507).

    With the symbols of the paper's (s, t) exchanged: the sampled point is at the source. Both time directions are trained:
    (s, t) is uniform on the square, and the map's domain must hold both. Nothing is stopped. Cost: 9 passes.

    Raises:
      ValueError: for a map without a backward direction.
    """
    if not flow_map.domain.backward:
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

    choices = {"diagonal": 0.0, "pairs": times.independent(times.uniform(), times.uniform()), **choices}
    return Objective("fmm", flow_map, interpolant, residual, "matching", **choices)


METHODS: dict[str, Method] = {
    "lmd": Method(
        lmd,
        "Lagrangian map distillation",
        "2406.07507",
        "Lagrangian",
        "teacher",
        "none",
        "jvp",
        "a trusted velocity is at hand and the map should be accurate",
        {"jvp": 1, "jvp_backward": 1, "forward": 1, "input_backward": 1},
        needs=("teacher",),
        published_passes=9,
    ),
    "fmm": Method(
        fmm,
        "flow map matching",
        "2406.07507",
        "Lagrangian at the returned point, and the cycle",
        "conditional",
        "none",
        "jvp",
        "a map of both directions (encoding) from data alone",
        {"forward": 1, "backward": 1, "jvp": 1, "jvp_backward": 1},
        needs=("backward",),
        published_passes=9,
    ),
    "lsd": Method(
        lsd,
        "Lagrangian self-distillation",
        "2505.18825",
        "Lagrangian + tangent",
        "self",
        "velocity leg",
        "jvp",
        "the first choice from data alone: accurate at one jump and stable",
        {"jvp": 1, "jvp_backward": 1, "forward": 1},
        published_passes=10,
    ),
    "ayf_lmd": Method(
        ayf_lmd,
        "Align Your Flow, Lagrangian",
        "2506.14603",
        "Lagrangian",
        "teacher, guided or not",
        "target side",
        "jvp",
        "as its Eulerian sibling, with the teacher asked at the map's own images",
        {"jvp": 1, "backward": 1, "forward": 1},
        needs=("teacher",),
        published=align_your_flow,
        published_passes=6,
    ),
    "tvm": Method(
        tvm,
        "terminal velocity matching",
        "2511.19797",
        "Lagrangian + tangent",
        "average of self",
        "velocity leg",
        "jvp",
        "LSD with a steadier target",
        {"jvp": 1, "jvp_backward": 1, "forward": 1},
        needs=("ema",),
        published_passes=10,
    ),
    "pid": Method(
        pid,
        "physics-informed distillation",
        "2411.08378",
        "Lagrangian at s = 0",
        "teacher",
        "teacher leg",
        "finite difference",
        "a teacher and no data",
        {"forward": 3, "backward": 2},
        stationary="order",
        order=1,
        at=lambda h: {"step": h},
        needs=("teacher",),
        published_passes=7,
    ),
    "free_flow": Method(
        free_flow,
        "FreeFlow, predictor",
        "2511.19428",
        "Lagrangian at s = 0",
        "teacher",
        "target side",
        "finite difference",
        "a teacher and no data, with a cheaper step",
        {"forward": 3, "backward": 1},
        stationary="order",
        order=1,
        at=lambda h: {"step": h},
        needs=("teacher",),
        published_passes=12,
    ),
}
