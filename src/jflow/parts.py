"""Parameters with named parts, one part for each of several functions that are trained or used together.

A NamedTuple class names the parts: ``Weighted(map, log_weight)``, ``Started(velocity, correction)``. ``on_part`` converts a
function of one part to a function of the whole. The whole is one pytree for optimizers, averages and checkpoints.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from jflow.types import FlowMap, Params


def take(params: Params, kind: type, name: str) -> Params:
    """Returns the part ``name`` of parameters of the NamedTuple class ``kind``.

    Raises:
      TypeError: if the parameters have another type. The message names the class and its parts.
    """
    if not isinstance(params, kind):
        parts = ", ".join(getattr(kind, "_fields", ()))
        raise TypeError(f"params: expected {kind.__name__}({parts}), got {type(params).__name__}")
    return getattr(params, name)


def on_part(kind: type, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Converts a function of the part ``name`` of the parameters to a function of the whole parameters.

    Args:
      kind: the NamedTuple class of the whole parameters.
      name: the field that holds the parameters of ``function``.
      function: a function ``(params, *args, **kwargs)``, such as a Velocity, a mean velocity, a head or a log weight.

    Returns:
      The function of the whole parameters. It raises TypeError if the parameters have another type.
    """

    def routed(params: Any, *args: Any, **kwargs: Any) -> Any:
        return function(take(params, kind, name), *args, **kwargs)

    return routed


def map_on_part(kind: type, name: str, flow_map: FlowMap) -> FlowMap:
    """Converts a FlowMap of one part to a FlowMap of the whole parameters, with the same domain, form and overrides."""

    def routed(function: Callable[..., Any] | None) -> Any:
        return None if function is None else on_part(kind, name, function)

    return dataclasses.replace(
        flow_map,
        mean_velocity=on_part(kind, name, flow_map.mean_velocity),
        jump_override=routed(flow_map.jump_override),
        velocity_override=routed(flow_map.velocity_override),
    )
