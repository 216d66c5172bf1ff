"""Parameters made of named parts, one for each of several functions that are trained or used together.

A NamedTuple class names the parts: ``Weighted(map, log_weight)``, ``Started(velocity, correction)``. Functions of one part
become functions of the whole, which any optimizer, average or checkpoint takes as one pytree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from jflow.types import FlowMap, Params


def take(params: Params, kind: type, name: str) -> Params:
    """The part ``name`` of parameters that must be of the NamedTuple class ``kind``.

    Raises:
      TypeError: for parameters of another type; the message names the class and its parts.
    """
    if not isinstance(params, kind):
        parts = ", ".join(getattr(kind, "_fields", ()))
        raise TypeError(f"params: expected {kind.__name__}({parts}), got {type(params).__name__}")
    return getattr(params, name)


def on_part(kind: type, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function(params, ...)`` as a function of the whole parameters, of which it is given the part ``name``.

    Args:
      kind: the NamedTuple class of the whole parameters.
      name: the field that holds the parameters of ``function``.
      function: ``(params, *args, **kwargs) -> anything``: a Velocity, a mean velocity, a head, a log weight.

    Returns:
      The function; called with parameters of another type it raises TypeError.
    """

    def routed(params: Any, *args: Any, **kwargs: Any) -> Any:
        return function(take(params, kind, name), *args, **kwargs)

    return routed


def map_on_part(kind: type, name: str, flow_map: FlowMap) -> FlowMap:
    """A FlowMap as one of the whole parameters, with the same domain, form and overrides (see ``on_part``)."""

    def routed(function: Callable[..., Any] | None) -> Any:
        return None if function is None else on_part(kind, name, function)

    return dataclasses.replace(
        flow_map,
        mean_velocity=on_part(kind, name, flow_map.mean_velocity),
        jump_override=routed(flow_map.jump_override),
        velocity_override=routed(flow_map.velocity_override),
    )
