r"""Guidance: a velocity extrapolated from one velocity through another.

The kinds of guidance::

    classifier-free    b_t(x | null) + w ( b_t(x | cond) - b_t(x | null) )     one model, two conditions   (2207.12598)
    autoguidance       weak_t(x) + w ( strong_t(x) - weak_t(x) )               two models, one condition   (2406.02507)

The formula holds at times within an interval (2404.07724); outside, the velocity is the conditional or the strong one. Both
are evaluated as strong + (w - 1)(strong - weak), which equals strong bit for bit at w = 1.

The result is a Velocity like any other: it can be solved, distilled into a flow map, or guided again. Its flow does not, in
general, carry the base to the data law tilted by a power of the likelihood.
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
    """The parameters of two models, one guiding the other.

    Attributes:
      strong: the parameters of the model that is guided.
      weak: the parameters of the model that it is guided away from: a smaller one, or one trained for less time, on the
        same task.
    """

    strong: Params
    weak: Params


def classifier_free(
    velocity: Velocity | FlowMap, scale: float | Array, null: Cond, interval: tuple[float, float] = ALWAYS
) -> Velocity:
    """b_null + scale (b_cond - b_null) at times in the interval, b_cond outside (2207.12598, 2404.07724).

    Cost: two passes inside the interval; one outside, if the batch shares t (t is not vmapped); one everywhere if the scale
    is a concrete 1. With a null condition and no interval, the two passes are one vmapped call, which computes once what
    does not depend on the condition. An eager call makes two calls of the network instead, so that the network sees concrete
    labels and can refuse labels outside its classes. Traced labels cannot be refused; the networks of ``jflow.nets`` return
    NaN for them.

    ``cond`` and ``null`` may differ in dtype if both are integers, both floating-point, or ``null`` is a whole number beside
    a floating-point ``cond``. No value changes, except that a Python float may be rounded: ``null`` is cast to the dtype of
    ``cond`` if that keeps its value, else both are promoted (uint8 labels and the null label 256 become int32). The value of
    a traced ``null`` is not known. It is therefore always promoted by its dtype, even where its value would fit, and must be
    of the kind of ``cond``: pass it in the dtype of ``cond`` for the network to see that dtype.

    Args:
      velocity: a conditional model; of a FlowMap, its velocity v_{t,t}.
      scale: the weight w, a scalar: 0 is unconditional, 1 conditional; it may be traced.
      null: the condition of one sample that stands for no condition: a pytree like ``cond``, or None if the model takes
        None for that; it may be traced.
      interval: the first and the last time t at which to guide, both included, within [0, 1]; 0 is the noise.

    Returns:
      A Velocity with the model's own parameters.

    Raises:
      ValueError: for a scale that is not a finite scalar, or an interval that is not 0 <= first <= last <= 1; when called,
        without a condition, or with one unlike ``null`` in structure or shapes.
      TypeError: for a model that cannot be called, or a scale or time that is not a number; when called, for ``cond`` and
        ``null`` of different kinds (labels and floating-point numbers, or bool labels and an integer), or of dtypes whose
        values no common dtype holds (uint64 and int64).

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
    """weak + scale (strong - weak) at times in the interval, the strong one outside (2406.02507, 2404.07724).

    Both models see the same condition and key. Cost: one pass of each inside the interval. The strong model alone runs
    outside, if the batch shares t, and everywhere if the scale is a concrete 1.

    Args:
      strong: the model to be guided; of a FlowMap, its velocity v_{t,t}.
      weak: the model to be guided away from, likewise; it may be the same function.
      scale: the weight w, a scalar: 0 is the weak model, 1 the strong one; it may be traced.
      interval: the first and the last time t at which to guide, both included, within [0, 1]; 0 is the noise.

    Returns:
      A Velocity whose parameters are ``Guided(strong, weak)``.

    Raises:
      ValueError: for a scale that is not a finite scalar, or an interval that is not 0 <= first <= last <= 1.
      TypeError: for a model that cannot be called, or a scale or time that is not a number; when called, for parameters
        that are not ``Guided``.

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
    # A branch, so that the weak model does not run outside; under a vmap over t it becomes a selection.
    return trees.add(strong, jax.lax.cond(inside, correction, lambda: trees.zeros_like(strong)))


def _eager(*trees: Any) -> bool:
    """Whether nothing is traced."""
    return all(checks.concrete(leaf) is not None for leaf in jax.tree.leaves(trees))


def _pair(stacked: Any) -> tuple[Any, Any]:
    """The two entries of the leading axis."""
    return tuple(jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(2))


def _stack(path: Any, cond: Any, null: Any) -> Array:
    """[cond, null] in a dtype that holds both."""
    # Before jnp.asarray: under jit that makes a traced array of a concrete value.
    value = checks.concrete(null)
    cond, null = jnp.asarray(cond), jnp.asarray(null)
    dtype = _common(jax.tree_util.keystr(path), cond, null, value)
    return jnp.stack([cond.astype(dtype), null.astype(dtype)])


def _common(path: str, cond: Array, null: Array, value: np.ndarray | None) -> np.dtype:
    """The dtype of the condition if it holds the null condition, else the promotion of both dtypes."""
    if cond.dtype == null.dtype:
        return cond.dtype
    of_cond, of_null = (next((k for k in KINDS if jnp.issubdtype(z.dtype, k)), None) for z in (cond, null))
    # A null of 0 is common beside floating-point conditions.
    if value is not None and (of_cond is of_null or (of_cond, of_null) == (jnp.floating, jnp.integer)):
        if _survives(value, cond.dtype, rounding=of_null is jnp.floating and null.weak_type):
            return cond.dtype
    if of_cond is of_null:
        # Explicit promotion, whichever rules the session has for the implicit one.
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
    """A dtype that has all values of one that jax promotes with no other: floats of 8 bits, integers of less."""
    if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits <= 8:
        return jnp.dtype(jnp.bfloat16)
    if jnp.issubdtype(dtype, jnp.integer) and jnp.iinfo(dtype).bits < 8:
        return jnp.dtype(jnp.uint8 if jnp.iinfo(dtype).min == 0 else jnp.int8)
    return dtype


def _survives(value: np.ndarray, dtype: np.dtype, *, rounding: bool) -> bool:
    """Whether a cast to the dtype keeps the value; with ``rounding``, whether it keeps a finite value finite."""
    # numpy has no casts between different integers of less than 8 bits.
    value = value.astype(_promotable(value.dtype))
    with np.errstate(over="ignore", invalid="ignore"):
        cast = value.astype(dtype)
        if rounding:
            return bool(np.all(np.isfinite(cast) == np.isfinite(value)))
        back = cast.astype(value.dtype)
        same = np.array_equal(back, value, equal_nan=True)
    # A value that wraps around between signed and unsigned integers comes back as itself.
    return same and np.array_equal(cast < 0, value < 0)


def _holds(wide: np.dtype, narrow: np.dtype) -> bool:
    """Whether an integer dtype has every value of another."""
    if not jnp.issubdtype(wide, jnp.integer):
        return False
    a, b = jnp.iinfo(wide), jnp.iinfo(narrow)
    return a.min <= b.min and b.max <= a.max


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
