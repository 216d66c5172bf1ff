"""The tangent identity alone: regression of the velocity on that of pairs."""

from __future__ import annotations

from typing import Any

from jflow.interpolants import Interpolant
from jflow.objectives.compose import Objective
from jflow.objectives.method import Method
from jflow.types import FlowMap, Velocity


def flow_matching(flow_map: FlowMap | Velocity, interpolant: Interpolant, **choices: Any) -> Objective:
    """E | v_{t,t}(I_t) - I_t' |^2: regression of the velocity on that of the pair (2210.02747, 2209.03003).

    ``flow_map`` may be a bare Velocity. Cost: 3 passes a sample.
    """
    return Objective("flow_matching", _as_map(flow_map), interpolant, diagonal=1.0, **choices)


def reflow(flow_map: FlowMap | Velocity, interpolant: Interpolant, **choices: Any) -> Objective:
    """E | v_{t,t}(I_t) - I_t' |^2 on pairs (z, X_{0,1}(z)) of a solve: rectified flow's second stage (2209.03003).

    The batch must hold x0; ``couplings.reflow`` makes the pairs. The flow learned is another one than that of the
    independent pairs, with straighter paths and the same ends. Cost: 3 passes a sample.
    """
    return Objective("reflow", _as_map(flow_map), interpolant, diagonal=1.0, needs=("x0",), **choices)


def _as_map(velocity: FlowMap | Velocity) -> FlowMap:
    if isinstance(velocity, FlowMap):
        return velocity

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("flow_map: flow matching was given a Velocity, which has no mean velocity off the diagonal")

    return FlowMap(refuse, velocity_override=velocity)


METHODS: dict[str, Method] = {
    "flow_matching": Method(
        flow_matching,
        "flow matching, rectified flow",
        "2210.02747, 2209.03003",
        "tangent",
        "conditional",
        "-",
        "-",
        "the velocity, from data alone: the baseline, and the teacher of the distillations",
        published_passes=3,
    ),
    "reflow": Method(
        reflow,
        "reflow",
        "2209.03003",
        "tangent",
        "conditional, of pairs from a solve",
        "-",
        "-",
        "straighter paths for a solver of few steps, when solving for pairs once is affordable",
        needs=("pairs",),
    ),
}
