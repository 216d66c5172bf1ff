r"""Guidance: a velocity extrapolated from a weak velocity through a strong one.

.. math:: b_t(x) = b^{\mathrm{weak}}_t(x) + w \left( b^{\mathrm{strong}}_t(x) - b^{\mathrm{weak}}_t(x) \right)

- Classifier-free guidance (2207.12598) uses one model: strong has the condition, weak the null condition.
- Autoguidance (2406.02507) uses two models with the same condition.

Guidance applies at times within an interval (2404.07724); outside the interval, the velocity is the strong one. The formula
is evaluated as strong + (w - 1)(strong - weak), which is exactly strong at w = 1.

The result is a Velocity: it can be solved, distilled into a flow map, or guided again. In general, its flow does not map the
base to the data law tilted by a power of the likelihood.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jflow import checks, parts, trees
from jflow.types import Array, Cond, Event, FlowMap, Key, Params, Time, Velocity, as_velocity

ALWAYS = (0.0, 1.0)
KINDS = (jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating)


class Guided(NamedTuple):
    """The parameters of two models, of which one guides the other.

    Attributes:
      strong: the parameters of the guided model.
      weak: the parameters of the model to guide away from, for the same task: a smaller model, or one trained for less time.
    """

    strong: Params
    weak: Params


def classifier_free(
    velocity: Velocity | FlowMap, scale: float | Array, null: Cond, interval: tuple[float, float] = ALWAYS
) -> Velocity:
    r"""Returns a velocity with classifier-free guidance (2207.12598).

    .. math:: b_t(x \mid \mathrm{null}) + w \left( b_t(x \mid \mathrm{cond}) - b_t(x \mid \mathrm{null}) \right)

    Outside the interval, it is the conditional velocity (2404.07724).

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
      scale: the weight w, a scalar: 0 is unconditional, 1 conditional. It may be traced.
      null: the condition of one sample that means "unconditional": a pytree like ``cond``, or None if the model takes
        None for this. It may be traced.
      interval: the first and the last time t at which to guide, both included, within [0, 1]; 0 is the noise.

    Returns:
      A Velocity with the parameters of the model.

    Raises:
      ValueError: if the scale is not a finite scalar, or the interval is not 0 <= first <= last <= 1; when called, if there
        is no condition, or its structure or shapes differ from those of ``null``.
      TypeError: if the model is not a function, or the scale or a time is not a number; when called, if ``cond`` and
        ``null`` are of different kinds (labels and floating-point numbers, or bool labels and an integer), or no dtype holds
        the values of both (uint64 and int64).

    Example:
      >>> import jax.numpy as jnp
      >>> from jflow import guidance
      >>> def velocity(params, t, x, cond=None, *, key=None):
      ...     return cond * jnp.ones_like(x)
      >>> guided = guidance.classifier_free(velocity, scale=3.0, null=jnp.float32(0.0))
      >>> print(guided(None, 0.5, jnp.zeros(2, jnp.float32), jnp.float32(1.0)))
      [3. 3.]
    """
    checks.fits("null", null)
    model = as_velocity("velocity", velocity)
    scale, one = _scale(scale)
    _check_interval(interval)

    def guided(params: Params, t: Time, x: Event, cond: Cond = None, *, key: Key | None = None) -> Event:
        if cond is None:
            raise ValueError("cond: expected the condition to guide towards, got None")
        if null is not None:
            checks.same_structure("cond", cond, "null", null)
            checks.fits("cond", cond)
            both = jax.tree_util.tree_map_with_path(_stack, cond, null)
        if one:
            return model(params, t, x, cond, key=key)
        if null is None or interval != ALWAYS:
            strong = model(params, t, x, cond, key=key)
            return _extrapolate(strong, lambda: model(params, t, x, null, key=key), scale, interval, t)
        if _eager(t, x, both):
            strong, weak = (model(params, t, x, c, key=key) for c in _pair(both))
        else:
            strong, weak = _pair(jax.vmap(lambda c: model(params, t, x, c, key=key))(both))
        return _extrapolate(strong, lambda: weak, scale, interval, t)

    return guided


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
    scale, one = _scale(scale)
    _check_interval(interval)

    def guided(params: Guided, t: Time, x: Event, cond: Cond = None, *, key: Key | None = None) -> Event:
        value = good(params, t, x, cond, key=key)
        if one:
            return value
        return _extrapolate(value, lambda: bad(params, t, x, cond, key=key), scale, interval, t)

    return guided


def _extrapolate(
    strong: Event, weak: Callable[[], Event], scale: float | Array, interval: tuple[float, float], t: Time
) -> Event:
    """Returns strong + (scale - 1)(strong - weak()) at times within the interval, and strong outside."""

    def correction() -> Event:
        return trees.scale(scale - 1.0, trees.sub(strong, weak()))

    if interval == ALWAYS:
        return trees.add(strong, correction())
    checks.scalar("t", t)
    first, t, last = (
        jnp.asarray(value).astype(trees.at_least_float32(strong)) for value in (interval[0], t, interval[1])
    )
    inside = (first <= t) & (t <= last)
    # With ``cond``, the weak model does not run outside the interval. Under a vmap over t it becomes a ``select``.
    return trees.add(strong, jax.lax.cond(inside, correction, lambda: trees.zeros_like(strong)))


def _eager(*trees: Any) -> bool:
    """Returns whether no leaf is traced."""
    return all(checks.concrete(leaf) is not None for leaf in jax.tree.leaves(trees))


def _pair(stacked: Any) -> tuple[Any, Any]:
    """Returns the two entries of the leading axis."""
    return tuple(jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(2))


def _stack(path: Any, cond: Any, null: Any) -> Array:
    """Stacks cond and null in a dtype that holds both."""
    # Read the value before jnp.asarray, which makes a traced array of a concrete value under jit.
    value = checks.concrete(null)
    cond, null = jnp.asarray(cond), jnp.asarray(null)
    dtype = _common(jax.tree_util.keystr(path), cond, null, value)
    return jnp.stack([cond.astype(dtype), null.astype(dtype)])


def _common(path: str, cond: Array, null: Array, value: np.ndarray | None) -> np.dtype:
    """Returns the dtype of the condition if it holds the null condition, else the promotion of both dtypes."""
    if cond.dtype == null.dtype:
        return cond.dtype
    of_cond, of_null = (next((k for k in KINDS if jnp.issubdtype(z.dtype, k)), None) for z in (cond, null))
    # An integer null of 0 is common with floating-point conditions.
    if value is not None and (of_cond is of_null or (of_cond, of_null) == (jnp.floating, jnp.integer)):
        if _survives(value, cond.dtype, rounding=of_null is jnp.floating and null.weak_type):
            return cond.dtype
    if of_cond is of_null:
        # Promote with the standard rules, whatever the setting of jax_numpy_dtype_promotion.
        with jax.numpy_dtype_promotion("standard"):
            dtype = jnp.promote_types(_promotable(cond.dtype), _promotable(null.dtype))
        if of_cond is not jnp.integer or all(_holds(dtype, z.dtype) for z in (cond, null)):
            return dtype
    hint = "; expected integer labels, for a bool has no third value for no condition"
    raise TypeError(
        f"null{path}: expected a null condition of the kind of cond{path}, {cond.dtype}, and values that one dtype can "
        f"hold, got {null.dtype}{'' if value is None else f' {value}'}{hint if of_cond is jnp.bool_ else ''}"
    )


def _promotable(dtype: np.dtype) -> np.dtype:
    """Replaces a dtype that jax does not promote (8-bit floats, integers below 8 bits) by a wider one with all its values."""
    if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits <= 8:
        return jnp.dtype(jnp.bfloat16)
    if jnp.issubdtype(dtype, jnp.integer) and jnp.iinfo(dtype).bits < 8:
        return jnp.dtype(jnp.uint8 if jnp.iinfo(dtype).min == 0 else jnp.int8)
    return dtype


def _survives(value: np.ndarray, dtype: np.dtype, *, rounding: bool) -> bool:
    """Returns whether a cast to the dtype keeps the value, or, with ``rounding``, whether it keeps finite values finite."""
    # numpy cannot cast between different integers of less than 8 bits.
    value = value.astype(_promotable(value.dtype))
    with np.errstate(over="ignore", invalid="ignore"):
        cast = value.astype(dtype)
        if rounding:
            return bool(np.all(np.isfinite(cast) == np.isfinite(value)))
        back = cast.astype(value.dtype)
        same = np.array_equal(back, value, equal_nan=True)
    # A value that wraps around between signed and unsigned integers passes the round trip, so compare the signs as well.
    return same and np.array_equal(cast < 0, value < 0)


def _holds(wide: np.dtype, narrow: np.dtype) -> bool:
    """Returns whether an integer dtype has every value of another."""
    if not jnp.issubdtype(wide, jnp.integer):
        return False
    a, b = jnp.iinfo(wide), jnp.iinfo(narrow)
    return a.min <= b.min and b.max <= a.max


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
