"""Methods that train the velocity only, by regression on the velocity of the pairs (the tangent identity)."""

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
    r"""Flow matching: regression of the velocity on that of the pair (2210.02747, 2209.03003).

    .. math:: \mathbb{E} \left| v_{t,t}(I_t) - \dot I_t \right|^2

    ``flow_map`` may be a Velocity. The reduction is ``diagonal_reduction``. Cost: 3 passes per sample.

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
    when="straighter paths for a solver of few steps, from pairs that are solved for once",
    needs=("pairs",),
)
def reflow(flow_map: FlowMap | Velocity, interpolant: Interpolant, **choices: Unpack[Choices]) -> Objective:
    r"""Reflow: flow matching on pairs (z, X_{0,1}(z)) of a solved ODE, rectified flow's second stage (2209.03003).

    .. math:: \mathbb{E} \left| v_{t,t}(I_t) - \dot I_t \right|^2, \qquad x_0 = z, \quad x_1 = X_{0,1}(z)

    The batch must hold x0; ``couplings.reflow`` makes the pairs. The learned flow differs from that of independent pairs:
    its paths are straighter, and its endpoint distributions are the same. Cost: 3 passes per sample.
    """
    return Objective(
        "reflow",
        as_flow_map("flow_map", flow_map),
        interpolant,
        needs=("x0",),
        defaults={"diagonal": 1.0},
        **choices,
    )
