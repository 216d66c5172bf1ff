r"""Conditions: the null condition, label dropout, and conditions that hold a guidance scale.

A condition is a pytree that the network receives as ``cond``. The *null condition* stands for "no condition": a network that
has been trained with it on a share of the data gives the unconditional velocity for it. ``FlowMap.null`` holds the null
condition of a model. ``flow_map(network, form)`` reads it from the network, and objectives, guidance and samplers read it
from the FlowMap.

``Scaled`` is the condition of a network that also receives the guidance scale.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jflow import checks
from jflow.types import Array, Cond, Key

ALWAYS = (0.0, 1.0)
KINDS = (jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating)


class Scaled(NamedTuple):
    """A condition with a guidance scale, of one sample.

    A network trained with ``objectives.Guidance(scale=law)`` receives it as ``cond``. ``guidance.classifier_free`` and
    ``guidance.extrapolated_jumps`` read the scale of each sample from it if they have none of their own.

    For ``nets.MLP`` and the image networks, the label is the integer leaf of this condition, and the other leaves are one or
    three floating-point numbers (``cond_features``).

    Attributes:
      cond: the condition itself, such as a class label.
      scale: the guidance scale w; 1 for no guidance.
      interval: the first and the last time t at which to guide, both included; None if the network does not receive them.
    """

    cond: Cond
    scale: Array | float
    interval: tuple[Array | float, Array | float] | None = None


def null_like(null: Cond, cond: Cond) -> Cond:
    """Returns the null condition in the structure of a condition of one sample.

    If ``cond`` is a ``Scaled`` and ``null`` is not, the result is a ``Scaled`` with scale 1 and, if ``cond`` has an interval,
    the interval (0, 1).

    Raises:
      ValueError: if the structures or shapes differ.
    """
    if isinstance(cond, Scaled) and not isinstance(null, Scaled):
        null = Scaled(null, 1.0, None if cond.interval is None else ALWAYS)
    checks.same_structure("cond", cond, "null", null)
    return null


def is_null(cond: Cond, null: Cond) -> Array:
    """Returns whether a condition of one sample is the null condition, a bool scalar.

    The scale and the interval of a ``Scaled`` are not compared.

    Raises:
      ValueError: if the structures or shapes differ.
      TypeError: if the two are of different kinds, such as labels and floating-point numbers.
    """
    inner = cond.cond if isinstance(cond, Scaled) else cond
    null = null_like(null.cond if isinstance(null, Scaled) else null, inner)
    both = jax.tree_util.tree_map_with_path(stack, inner, null)
    return jnp.all(jnp.stack([jnp.all(leaf[0] == leaf[1]) for leaf in jax.tree.leaves(both)]))


def drop(key: Key, cond: Cond, null: Cond, probability: float) -> Cond:
    """Replaces the conditions of a batch by the null condition, each with the same probability (2207.12598).

    Args:
      key: a PRNG key.
      cond: the conditions, leaves ``[B, ...]``.
      null: the null condition of one sample.
      probability: the probability that a row is replaced.

    Returns:
      The conditions, in the structure and shapes of ``cond``. The dtypes are those of ``cond`` where they hold the values of
      ``null``; otherwise they are promoted (uint8 labels and the null label 256 become int32).

    Raises:
      ValueError: if the structure of ``cond`` or the shape of a row differs from ``null``, or the probability is outside
        [0, 1].
      TypeError: if ``cond`` and ``null`` are of different kinds (labels and floating-point numbers).

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jflow import conditions
      >>> print(conditions.drop(jax.random.key(0), jnp.arange(4), null=10, probability=1.0))
      [10 10 10 10]
    """
    checks.key("key", key)
    checks.number("probability", probability, low=0.0, high=1.0)
    if cond is None or not jax.tree.leaves(cond):
        raise ValueError(f"cond: expected the conditions of the batch, to drop a share of them, got {cond!r}")
    rows = checks.rows("cond", cond)
    checks.fits("cond", cond)
    checks.same_structure("cond", jax.tree.map(lambda leaf: np.empty(np.shape(leaf)[1:]), cond), "null", null)
    dropped = jax.random.bernoulli(key, probability, (rows,))

    def replaced(path: Any, leaf: Any, value: Any) -> Array:
        known = checks.concrete(value)
        leaf, value = jnp.asarray(leaf), jnp.asarray(value)
        dtype = common(jax.tree_util.keystr(path), leaf, value, known)
        mask = dropped.reshape(rows, *(1,) * (leaf.ndim - 1))
        return jnp.where(mask, value.astype(dtype)[None], leaf.astype(dtype))

    return jax.tree_util.tree_map_with_path(replaced, cond, null)


def eager(*trees: Any) -> bool:
    """Returns whether no leaf is traced."""
    return all(checks.concrete(leaf) is not None for leaf in jax.tree.leaves(trees))


def pair(stacked: Any) -> tuple[Any, Any]:
    """Returns the two entries of the leading axis."""
    return tuple(jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(2))


def stack(path: Any, cond: Any, null: Any) -> Array:
    """Stacks cond and null in a dtype that holds both."""
    # Read the value before jnp.asarray, which makes a traced array of a concrete value under jit.
    value = checks.concrete(null)
    cond, null = jnp.asarray(cond), jnp.asarray(null)
    dtype = common(jax.tree_util.keystr(path), cond, null, value)
    return jnp.stack([cond.astype(dtype), null.astype(dtype)])


def common(path: str, cond: Array, null: Array, value: np.ndarray | None) -> np.dtype:
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
    hint = "; expected integer labels, because a bool has no third value to mean no condition"
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
