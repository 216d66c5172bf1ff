r"""Guidance: velocities made of two velocities, one extrapolated away from the other.

    classifier-free    b_t(x | null) + w ( b_t(x | cond) - b_t(x | null) )     one model, two conditions   (2207.12598)
    autoguidance       weak_t(x) + w ( strong_t(x) - weak_t(x) )               two models, one condition   (2406.02507)

at times within an interval (2404.07724), and the conditional or the strong one alone outside. Both are evaluated as
strong + (w - 1)(strong - weak), which at w = 1 is the strong one to the bit.

The result is a Velocity like any other: it can be solved, distilled into a flow map, or guided again. Its flow does not
carry the base to the law tilted by a power of the likelihood, as is often said: the formula alone defines it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jflow import checks, trees
from jflow.types import Array, Cond, Event, FlowMap, Key, Params, Time, Velocity

ALWAYS = (0.0, 1.0)


class Guided(NamedTuple):
    """The parameters of two models, one guiding the other.

    Attributes:
      strong: those of the model that is guided.
      weak: those of the one it is guided away from: smaller, or trained for less time, on the same task.
    """

    strong: Params
    weak: Params


def classifier_free(
    velocity: Velocity | FlowMap, scale: float | Array, null: Cond, interval: tuple[float, float] = ALWAYS
) -> Velocity:
    """b_null + scale (b_cond - b_null) at times in the interval, b_cond outside (2207.12598, 2404.07724).

    Cost: two passes at a time inside, one outside where t is shared by the batch (not itself vmapped), and one
    everywhere at a concrete scale of 1. With a null condition and without an interval the two go through the network
    as one vmapped call, which does but once what does not depend on the condition.

    Args:
      velocity: a conditional model, or a FlowMap, of which the velocity v_{t,t} is taken.
      scale: the weight w, a scalar: 0 is unconditional, 1 conditional; it may be traced.
      null: the condition that stands for none, of one sample: a pytree like ``cond``, or None where the model takes
        None for it.
      interval: the first and the last time t, both included, at which to guide; within [0, 1], 0 being noise.

    Returns:
      A Velocity with the model's own parameters.

    Raises:
      ValueError: for a scale that is no finite scalar, or an interval that is not 0 <= first <= last <= 1; when called,
        without a condition, or with one unlike ``null`` in structure or shapes.
      TypeError: for a model that cannot be called, or numbers that are none.
    """
    model = _velocity("velocity", velocity)
    scale, one = _scale(scale)
    _check_interval(interval)

    def guided(params: Params, t: Time, x: Event, cond: Cond = None, *, key: Key | None = None) -> Event:
        if cond is None:
            raise ValueError("cond: expected the condition to guide towards, got None")
        if null is not None:
            checks.same_structure("cond", cond, "null", null)
        if one:
            return model(params, t, x, cond, key=key)
        if null is None or interval != ALWAYS:
            strong = model(params, t, x, cond, key=key)
            return _extrapolate(strong, lambda: model(params, t, x, null, key=key), scale, interval, t)
        both = jax.tree.map(_stack, cond, null)
        out = jax.vmap(lambda c: model(params, t, x, c, key=key))(both)
        strong, weak = (jax.tree.map(lambda leaf, i=i: leaf[i], out) for i in range(2))
        return _extrapolate(strong, lambda: weak, scale, interval, t)

    return guided


def autoguided(
    strong: Velocity | FlowMap,
    weak: Velocity | FlowMap,
    scale: float | Array,
    interval: tuple[float, float] = ALWAYS,
) -> Velocity:
    """weak + scale (strong - weak) at times in the interval, the strong one outside (2406.02507, 2404.07724).

    Both see the same condition and key. Cost: one pass of each inside, of the strong one alone outside where t is shared
    by the batch, and everywhere at a concrete scale of 1.

    Args:
      strong: the model to be guided, or a FlowMap, of which the velocity v_{t,t} is taken.
      weak: the model to be guided away from, likewise; may be the same function.
      scale: the weight w, a scalar: 0 is the weak model, 1 the strong one; it may be traced.
      interval: the first and the last time t, both included, at which to guide; within [0, 1], 0 being noise.

    Returns:
      A Velocity whose parameters are ``Guided(strong, weak)``.

    Raises:
      ValueError: for a scale that is no finite scalar, or an interval that is not 0 <= first <= last <= 1.
      TypeError: for a model that cannot be called, or numbers that are none; when called, for parameters that are not
        ``Guided``.
    """
    good, bad = _velocity("strong", strong), _velocity("weak", weak)
    scale, one = _scale(scale)
    _check_interval(interval)

    def guided(params: Guided, t: Time, x: Event, cond: Cond = None, *, key: Key | None = None) -> Event:
        if not isinstance(params, Guided):
            raise TypeError(f"params: expected Guided(strong, weak), got {type(params).__name__}")
        value = good(params.strong, t, x, cond, key=key)
        if one:
            return value
        return _extrapolate(value, lambda: bad(params.weak, t, x, cond, key=key), scale, interval, t)

    return guided


def _extrapolate(strong: Event, weak: Any, scale: float | Array, interval: tuple[float, float], t: Time) -> Event:
    """strong + (scale - 1)(strong - weak()) at times within the interval, strong outside."""

    def correction() -> Event:
        return trees.scale(scale - 1.0, trees.sub(strong, weak()))

    if interval == ALWAYS:
        return trees.add(strong, correction())
    checks.scalar("t", t)
    first, t, last = (
        jnp.asarray(value).astype(trees.at_least_float32(strong)) for value in (interval[0], t, interval[1])
    )
    inside = (first <= t) & (t <= last)
    # A branch, so that the weak one is not evaluated outside; under a vmap over t it becomes a selection.
    return trees.add(strong, jax.lax.cond(inside, correction, lambda: trees.zeros_like(strong)))


def _stack(cond: Any, null: Any) -> Array:
    cond = jnp.asarray(cond)
    return jnp.stack([cond, jnp.asarray(null).astype(cond.dtype)])


def _velocity(name: str, model: Velocity | FlowMap) -> Velocity:
    if isinstance(model, FlowMap):
        return model.velocity
    if not callable(model):
        raise TypeError(f"{name}: expected a Velocity or a FlowMap, got {type(model).__name__}")
    return model


def _scale(scale: Any) -> tuple[float | Array, bool]:
    """The scale, checked, and whether it is known to be 1."""
    checks.scalar("scale", scale)
    value = checks.concrete(scale)
    if value is None:
        checks.floating("scale", scale)
        return scale, False
    number = checks.number("scale", value.item())
    return number, number == 1.0


def _check_interval(interval: tuple[float, float]) -> None:
    if not isinstance(interval, tuple) or len(interval) != 2:
        raise ValueError(f"interval: expected a pair (first, last) of times, got {interval!r}")
    first = checks.number("interval: first", interval[0], low=0.0, high=1.0)
    checks.number("interval: last", interval[1], low=first, high=1.0)
