"""The tangent identity alone: regression of the velocity on that of pairs."""

from __future__ import annotations

from typing import Unpack

from jflow.interpolants import Interpolant
from jflow.objectives.choices import Choices
from jflow.objectives.method import method
from jflow.objectives.objective import Objective
from jflow.types import FlowMap, Velocity, as_flow_map


@method(
    title="flow matching, rectified flow",
    source="2210.02747, 2209.03003",
    identity="tangent",
    velocity="conditional",
    when="the velocity, from data alone: the baseline, and the teacher of the distillations",
    published_passes=3,
)
def flow_matching(flow_map: FlowMap | Velocity, interpolant: Interpolant, **choices: Unpack[Choices]) -> Objective:
    """Regression of the velocity on that of the pair, ``E | v_{t,t}(I_t) - I_t' |^2`` (2210.02747, 2209.03003).

    ``flow_map`` may be a bare Velocity. The reduction is ``diagonal_reduction``. Cost: 3 passes a sample.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jflow import flow_map, interpolants, objectives, parameterizations
      >>> def net(params, s, t, x, cond=None, *, key=None):
      ...     return params * x
      >>> path = interpolants.linear()
      >>> model = flow_map(net, parameterizations.mean_velocity_form(path))
      >>> objective = objectives.flow_matching(model, path)
      >>> losses, aux = jax.jit(objective)(jnp.float32(0.5), jax.random.key(0), jnp.ones((8, 2), jnp.float32))
      >>> losses.shape, bool(jnp.isfinite(losses).all())
      ((8,), True)
    """
    return Objective(
        "flow_matching", as_flow_map("flow_map", flow_map), interpolant, defaults={"diagonal": 1.0}, **choices
    )


@method(
    title="reflow",
    source="2209.03003",
    identity="tangent",
    velocity="conditional, of pairs from a solve",
    when="straighter paths for a solver of few steps, when solving for pairs once is affordable",
    needs=("pairs",),
)
def reflow(flow_map: FlowMap | Velocity, interpolant: Interpolant, **choices: Unpack[Choices]) -> Objective:
    """Rectified flow's second stage, ``E | v_{t,t}(I_t) - I_t' |^2`` on pairs (z, X_{0,1}(z)) of a solve (2209.03003).

    The batch must hold x0; ``couplings.reflow`` makes the pairs. The flow learned is another one than that of the
    independent pairs, with straighter paths and the same ends. Cost: 3 passes a sample.
    """
    return Objective(
        "reflow",
        as_flow_map("flow_map", flow_map),
        interpolant,
        needs=("x0",),
        defaults={"diagonal": 1.0},
        **choices,
    )
