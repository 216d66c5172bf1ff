r"""Guidance: a velocity extrapolated from a weak velocity through a strong one.

.. math:: b_t(x) = b^{\mathrm{weak}}_t(x) + w \left( b^{\mathrm{strong}}_t(x) - b^{\mathrm{weak}}_t(x) \right)

- Classifier-free guidance (2207.12598) uses one model: strong has the condition, weak the null condition.
- Autoguidance (2406.02507) uses two models with the same condition.

Guidance applies at times within an interval (2404.07724); outside the interval, the velocity is the strong one. The formula
is evaluated as strong + (w - 1)(strong - weak), which is exactly strong at w = 1.

The result is a Velocity: it can be solved, distilled into a flow map, or guided again. In general, its flow does not map the
base to the data law tilted by a power of the likelihood.

A map trained with a guided target (``objectives.Guidance``) needs no guidance in sampling: its jumps are those of the guided
velocity. If its network receives the scale, the condition is ``conditions.Scaled(label, scale, interval)``. For other maps,
``extrapolated_jumps`` extrapolates the jumps, which is exact at s = t only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jflow import checks, conditions, parts, trees
from jflow.conditions import ALWAYS, Scaled
from jflow.types import Array, Cond, Event, FlowMap, Key, Params, Time, Velocity, as_velocity

# The default of ``null``: the null condition of the model, ``FlowMap.null``.
OF_MODEL: Any = object()


class Guided(NamedTuple):
    """The parameters of two models, of which one guides the other.

    Attributes:
      strong: the parameters of the guided model.
      weak: the parameters of the model to guide away from, for the same task: a smaller model, or one trained for less time.
    """

    strong: Params
    weak: Params


def classifier_free(
    velocity: Velocity | FlowMap,
    scale: float | Array | None = None,
    null: Cond = OF_MODEL,
    interval: tuple[float, float] = ALWAYS,
) -> Velocity:
    r"""Returns a velocity with classifier-free guidance (2207.12598).

    .. math:: b_t(x \mid \mathrm{null}) + w \left( b_t(x \mid \mathrm{cond}) - b_t(x \mid \mathrm{null}) \right)

    Outside the interval, it is the conditional velocity (2404.07724).

    The network must have been trained with the null condition (``label_dropout`` of the objectives); otherwise its output for
    this condition has no meaning.

    Without ``scale``, the scale and the interval of each sample are those of its condition, a ``conditions.Scaled``; the model
    receives ``cond.cond``.

    Cost: two passes inside the interval; one outside, if the batch shares t (t is not vmapped); one everywhere if the scale
    is a concrete 1. With a null condition and no interval, the two passes are one vmapped call, in which computations that do
    not depend on the condition are done once. An eager call makes two calls of the network instead, so that the network gets
    concrete labels and can raise an error for labels outside its classes. For traced labels outside the classes, the
    networks of ``jflow.nets`` return NaN.

    ``cond`` and ``null`` may differ in dtype if both are integers, if both are floating-point, or if ``null`` is an integer
    and ``cond`` floating-point. Values do not change, except that a Python float may be rounded: ``null`` is cast to the
    dtype of ``cond`` if this keeps its value; otherwise both are promoted (uint8 labels and the null label 256 become int32).
    A traced ``null`` has no known value. It must be of the same kind as ``cond``, and both are promoted if their dtypes
    differ. To keep the dtype of ``cond``, pass ``null`` in this dtype.

    Args:
      velocity: a conditional Velocity, or a FlowMap, whose velocity v_{t,t} is used.
      scale: the weight w, a scalar: 0 is unconditional, 1 conditional. It may be traced. None to read it from the condition.
      null: the condition of one sample that means "unconditional": a pytree like ``cond``, or None if the model takes
        None for this. It may be traced. By default the ``null`` of the FlowMap.
      interval: the first and the last time t at which to guide, both included, within [0, 1]; 0 is the noise.

    Returns:
      A Velocity with the parameters of the model.

    Raises:
      ValueError: if the scale is not a finite scalar, the interval is not 0 <= first <= last <= 1, or the model has no null
        condition and none is given; when called, if there is no condition, or its structure or shapes differ from those of
        ``null``.
      TypeError: if the model is not a function, or the scale or a time is not a number; when called without a scale, if
        ``cond`` is not a ``conditions.Scaled`` of a number and a pair of times; when called, if ``cond`` and ``null`` are of
        different kinds (labels and floating-point numbers, or bool labels and an integer), or no dtype holds the values of
        both (uint64 and int64).

    Example:
      >>> import jax.numpy as jnp
      >>> from jflow import guidance
      >>> def velocity(params, t, x, cond=None, *, key=None):
      ...     return cond * jnp.ones_like(x)
      >>> guided = guidance.classifier_free(velocity, scale=3.0, null=jnp.float32(0.0))
      >>> print(guided(None, 0.5, jnp.zeros(2, jnp.float32), jnp.float32(1.0)))
      [3. 3.]
    """
    null = _null_of(velocity, null)
    model = as_velocity("velocity", velocity)
    rule = _rule(scale, interval)

    def guided(params: Params, t: Time, x: Event, cond: Cond = None, *, key: Key | None = None) -> Event:
        cond, scale, interval, one = rule(cond)
        if cond is None:
            raise ValueError("cond: expected the condition to guide towards, got None")
        if null is not None:
            checks.same_structure("cond", cond, "null", null)
            checks.fits("cond", cond)
            both = jax.tree_util.tree_map_with_path(conditions.stack, cond, null)
        if one:
            return model(params, t, x, cond, key=key)
        if null is None or interval is not ALWAYS:
            again = _again(key)
            strong = model(params, t, x, cond, key=key)
            return _extrapolate(strong, lambda: model(params, t, x, null, key=again()), scale, interval, t)
        if conditions.eager(t, x, both):
            strong, weak = (model(params, t, x, c, key=key) for c in conditions.pair(both))
        else:
            strong, weak = conditions.pair(jax.vmap(lambda c: model(params, t, x, c, key=key))(both))
        return _extrapolate(strong, lambda: weak, scale, interval, t)

    return guided


def extrapolated_jumps(
    flow_map: FlowMap,
    scale: float | Array | None = None,
    null: Cond = OF_MODEL,
    interval: tuple[float, float] = ALWAYS,
) -> FlowMap:
    r"""Returns a map whose mean velocities are extrapolated. It is the flow map of the guided velocity at s = t only.

    .. math::
        v_{s,t}(x \mid \mathrm{cond}) + (w - 1)\, r_{s,t}
        \left( v_{s,t}(x \mid \mathrm{cond}) - v_{s,t}(x \mid \mathrm{null}) \right)

    Here r is the share of [s, t] that lies in the interval. At s = t this is ``classifier_free`` of v_{t,t}. A jump with s < t
    is not that of the guided velocity, because both jumps start from x and then follow different paths; the difference is of
    order t - s. A map trained with a guided target (``objectives.Guidance``) or distilled from ``classifier_free`` has no
    such error.

    Without ``scale``, the scale and the interval of each sample are those of its condition, a ``conditions.Scaled``; the model
    receives ``cond.cond``. Cost: two passes.

    Args:
      flow_map: a conditional map, trained with the null condition.
      scale, null, interval: as in ``classifier_free``.

    Returns:
      A FlowMap with the parameters, domain and null condition of ``flow_map``.

    Raises:
      TypeError: if ``flow_map`` is not a FlowMap, and as ``classifier_free``.
      ValueError: as ``classifier_free``.

    Example:
      >>> import jax.numpy as jnp
      >>> from jflow import FlowMap, guidance
      >>> def v(params, s, t, x, cond=None, *, key=None):
      ...     return cond * jnp.ones_like(x)
      >>> guided = guidance.extrapolated_jumps(FlowMap(v, null=0.0), scale=3.0)
      >>> print(guided.jump(None, 0.0, 1.0, jnp.zeros(2, jnp.float32), jnp.float32(1.0)))
      [3. 3.]
    """
    if not isinstance(flow_map, FlowMap):
        raise TypeError(f"flow_map: expected a FlowMap, got {type(flow_map).__name__}")
    null = _null_of(flow_map, null)
    rule = _rule(scale, interval)

    def mean_velocity(
        params: Params, s: Time, t: Time, x: Event, cond: Cond = None, *, key: Key | None = None
    ) -> Event:
        cond, scale, interval, one = rule(cond)
        if cond is None:
            raise ValueError("cond: expected the condition to guide towards, got None")

        def v(c: Cond) -> Event:
            return flow_map.mean_velocity(params, s, t, x, c, key=key)

        if null is not None:
            checks.same_structure("cond", cond, "null", null)
            checks.fits("cond", cond)
        if one:
            return v(cond)
        if null is None or conditions.eager(s, t, x, cond):
            strong, weak = v(cond), v(null)
        else:
            both = jax.tree_util.tree_map_with_path(conditions.stack, cond, null)
            strong, weak = conditions.pair(jax.vmap(v)(both))
        share = _share(interval, s, t, trees.at_least_float32(x))
        return trees.add(strong, trees.scale((scale - 1.0) * share, trees.sub(strong, weak)))

    velocity = classifier_free(flow_map, scale, null, interval)
    return dataclasses.replace(flow_map, mean_velocity=mean_velocity, jump_override=None, velocity_override=velocity)


def autoguided(
    strong: Velocity | FlowMap,
    weak: Velocity | FlowMap,
    scale: float | Array,
    interval: tuple[float, float] = ALWAYS,
) -> Velocity:
    r"""Returns a velocity with autoguidance (2406.02507): a strong model guided away from a weak one.

    .. math:: b^{\mathrm{weak}}_t(x) + w \left( b^{\mathrm{strong}}_t(x) - b^{\mathrm{weak}}_t(x) \right)

    Outside the interval, it is the strong velocity (2404.07724). Both models get the same condition and key. Cost: one pass
    of each model inside the interval. Outside, only the strong model runs if the batch shares t. If the scale is a concrete
    1, only the strong model runs everywhere.

    Args:
      strong: the model to guide, a Velocity, or a FlowMap, whose velocity v_{t,t} is used.
      weak: the model to guide away from, of the same types; it may be the same function.
      scale: the weight w, a scalar: 0 is the weak model, 1 the strong one. It may be traced.
      interval: the first and the last time t at which to guide, both included, within [0, 1]; 0 is the noise.

    Returns:
      A Velocity whose parameters are ``Guided(strong, weak)``.

    Raises:
      ValueError: if the scale is not a finite scalar, or the interval is not 0 <= first <= last <= 1.
      TypeError: if a model is not a function, or the scale or a time is not a number; when called, if the parameters are
        not a ``Guided``.

    Example:
      >>> import jax.numpy as jnp
      >>> from jflow import guidance
      >>> def velocity(params, t, x, cond=None, *, key=None):
      ...     return params * jnp.ones_like(x)
      >>> guided = guidance.autoguided(velocity, velocity, scale=2.0)
      >>> params = guidance.Guided(jnp.float32(3.0), jnp.float32(1.0))
      >>> print(guided(params, 0.5, jnp.zeros(2, jnp.float32)))
      [5. 5.]
    """
    good = parts.on_part(Guided, "strong", as_velocity("strong", strong))
    bad = parts.on_part(Guided, "weak", as_velocity("weak", weak))
    rule = _rule(scale, interval, kept=True)

    def guided(params: Guided, t: Time, x: Event, cond: Cond = None, *, key: Key | None = None) -> Event:
        cond, scale, interval, one = rule(cond)
        again = _again(key)
        value = good(params, t, x, cond, key=key)
        if one:
            return value
        return _extrapolate(value, lambda: bad(params, t, x, cond, key=again()), scale, interval, t)

    return guided


def _extrapolate(strong: Event, weak: Callable[[], Event], scale: Any, interval: tuple[Any, Any], t: Time) -> Event:
    """Returns strong + (scale - 1)(strong - weak()) at times within the interval, and strong outside."""

    def correction() -> Event:
        return trees.scale(scale - 1.0, trees.sub(strong, weak()))

    if interval is ALWAYS:
        return trees.add(strong, correction())
    checks.scalar("t", t)
    first, t, last = (
        jnp.asarray(value).astype(trees.at_least_float32(strong)) for value in (interval[0], t, interval[1])
    )
    inside = (first <= t) & (t <= last)
    # With ``cond``, the weak model does not run outside the interval. Under a vmap over t it becomes a ``select``.
    return trees.add(strong, jax.lax.cond(inside, correction, lambda: trees.zeros_like(strong)))


def _again(key: Key | None) -> Callable[[], Key | None]:
    """Returns a function that makes the key once more, from its data.

    Both models get the same key on purpose. Under a vmap over t, ``lax.cond`` selects between its operands, and a key among
    them would count as used twice.
    """
    if key is None or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return lambda: key
    data, kind = jax.random.key_data(key), jax.random.key_impl(key)
    return lambda: jax.random.wrap_key_data(data, impl=kind)


def _share(interval: tuple[Any, Any], s: Time, t: Time, dtype: Any) -> Array:
    """Returns the share of [s, t] within the interval; at s = t, 1 inside and 0 outside."""
    if interval is ALWAYS:
        return jnp.ones((), dtype)
    first, last, s, t = (jnp.asarray(value).astype(dtype) for value in (*interval, s, t))
    gap = t - s
    overlap = jnp.clip(t, first, last) - jnp.clip(s, first, last)
    inside = ((first <= s) & (s <= last)).astype(dtype)
    return jnp.where(gap == 0.0, inside, overlap / jnp.where(gap == 0.0, 1.0, gap))


def _null_of(model: Any, null: Cond) -> Cond:
    """Returns the null condition that is given, or else that of the model."""
    if null is not OF_MODEL:
        checks.fits("null", null)
        return null
    found = getattr(model, "null", None)
    if found is None:
        raise ValueError(
            "null: expected the condition that means no condition, such as the label after the last class, because the model "
            "has none (null= of jflow.flow_map)"
        )
    return found


def _rule(scale: Any, interval: Any, kept: bool = False) -> Callable[[Cond], tuple[Cond, Any, tuple[Any, Any], bool]]:
    """Checks the scale and the interval, and returns a function of the condition.

    It returns the condition for the model, the scale, the interval, and whether the scale is known to be 1. With ``kept``, the
    model receives the whole condition, and the scale must be given.
    """
    if scale is not None or kept:
        scale, one = _scale(scale)
        _check_interval(interval)
        interval = ALWAYS if interval == ALWAYS else interval
        return lambda cond: (cond, scale, interval, one)
    if interval != ALWAYS:
        raise ValueError(f"interval: expected none without a scale, because the condition has both, got {interval!r}")

    def of_cond(cond: Cond) -> tuple[Cond, Any, tuple[Any, Any], bool]:
        if not isinstance(cond, Scaled):
            raise TypeError(
                "cond: expected a conditions.Scaled(cond, scale, interval), because no scale was given, got "
                f"{type(cond).__name__}"
            )
        _check_scaled(cond)
        return cond.cond, cond.scale, ALWAYS if cond.interval is None else cond.interval, False

    return of_cond


def _check_scaled(cond: Scaled) -> None:
    """Checks the scale and the interval of a condition. The values of traced ones are not checked."""
    checks.scalar("cond.scale", cond.scale)
    if checks.concrete(cond.scale) is not None:
        checks.number("cond.scale", cond.scale)
    if cond.interval is None:
        return
    if not isinstance(cond.interval, tuple) or len(cond.interval) != 2:
        raise TypeError(f"cond.interval: expected a pair (first, last) of times or None, got {cond.interval!r}")
    for name, end in zip(("first", "last"), cond.interval, strict=True):
        checks.scalar(f"cond.interval: {name}", end)
    if all(checks.concrete(end) is not None for end in cond.interval):
        first = checks.number("cond.interval: first", cond.interval[0], low=0.0, high=1.0)
        checks.number("cond.interval: last", cond.interval[1], low=first, high=1.0)


def _scale(scale: Any) -> tuple[float | Array, bool]:
    """Checks the scale, and returns it and whether it is known to be 1."""
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
