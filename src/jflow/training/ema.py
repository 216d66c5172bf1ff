r"""Exponential moving averages of parameters, several at once.

An average a follows the parameters p as::

    a_{n+1} = a_n + w_n (p_{n+1} - a_n),        a_0 = p_0,

where n counts the optimizer's updates made before and the weight of the new parameters, w_n = 1 - decay_n, comes from a
schedule. A schedule returns w rather than the decay because 1 - 0.9999 in float32 has lost four digits.

The schedules::

    constant(d)    w_n = 1 - d
    warmup(d)      w_n = 1 - min(d, (1 + n)/(10 + n))
    power(g)       w_n = 1 - (1 - 1/(n + 1))^{g + 1}        weights near k^g of p_1, ..., p_n, normalised (2312.02696)
    unbiased(d)    w_n = (1 - d)/(1 - d^{n+1})      the weights d^{n-k} of p_1, ..., p_n, normalised; forgets p_0
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import cast

import jax
import jax.numpy as jnp

from jflow import checks
from jflow.types import Array, Params

Schedule = Callable[[Array], Array]
Averages = Mapping[str, Schedule] | Iterable[float]


def constant(decay: float) -> Schedule:
    """w_n = 1 - decay.

    Raises:
      ValueError: when the decay is outside [0, 1]; TypeError if it is not a number.

    Example:
      >>> import jax.numpy as jnp
      >>> from jflow.training import ema
      >>> average = ema.update(jnp.zeros(1, jnp.float32), jnp.ones(1, jnp.float32), ema.constant(0.75)(0))
      >>> print(average)
      [0.25]
    """
    weight = 1.0 - checks.number("decay", decay, low=0.0, high=1.0)
    return lambda n: jnp.full(jnp.shape(n), weight, jnp.float32)


def warmup(decay: float) -> Schedule:
    """w_n = 1 - min(decay, (1 + n)/(10 + n)) = max(1 - decay, 9/(10 + n)): short-sighted at first.

    Raises:
      ValueError: when the decay is outside [0, 1]; TypeError if it is not a number.
    """
    weight = 1.0 - checks.number("decay", decay, low=0.0, high=1.0)
    return lambda n: jnp.maximum(jnp.float32(weight), 9.0 / (10.0 + jnp.asarray(n).astype(jnp.float32)))


def unbiased(decay: float) -> Schedule:
    """w_n = (1 - decay)/(1 - decay^{n+1}): Adam's bias correction; the start is a plain mean, and p_0 is forgotten.

    Raises:
      ValueError: when the decay is outside (0, 1); TypeError if it is not a number.
    """
    decay = checks.number("decay", decay, low=0.0, high=1.0)
    if decay in (0.0, 1.0):
        raise ValueError(f"decay: expected a number strictly between 0 and 1, got {decay}")
    log_decay = math.log(decay)

    def schedule(n: Array) -> Array:
        power = (jnp.asarray(n).astype(jnp.float32) + 1.0) * log_decay
        return (1.0 - decay) / -jnp.expm1(power)

    return schedule


def power(gamma: float) -> Schedule:
    """w_n = 1 - (n/(n + 1))^{gamma + 1}: a profile that keeps its shape as the run grows; relative width about 1/gamma.

    Of n parameters p_k has the weight (k/n)^{gamma + 1} - ((k - 1)/n)^{gamma + 1}, and p_0 none. With gamma = 16 the
    average reaches back over about the last 6 % of the steps, however many they are (2312.02696).

    Raises:
      ValueError: when gamma is negative; TypeError if it is not a number.
    """
    exponent = checks.number("gamma", gamma, low=0.0) + 1.0

    def schedule(n: Array) -> Array:
        n = jnp.asarray(n).astype(jnp.float32)
        # log(n/(n + 1)) = log1p(-1/(n + 1)) is -inf at n = 0, where the weight is one.
        return -jnp.expm1(exponent * jnp.log1p(-1.0 / (n + 1.0)))

    return schedule


def resolve(averages: Averages) -> dict[str, Schedule]:
    """Schedules by name: a mapping as it is, and a number d as ``{"d": constant(d)}``, so 0.999 is called "0.999".

    Raises:
      TypeError: for names that are no strings or hold "/", or schedules that cannot be called.
      ValueError: for a decay outside [0, 1].
    """
    if averages is None or isinstance(averages, (str, float, int)):
        raise TypeError(f"ema: expected a mapping of names to schedules or a tuple of decays, got {averages!r}")
    if not isinstance(averages, Mapping):
        return {str(checks.number("decay", decay, low=0.0, high=1.0)): constant(decay) for decay in averages}
    schedules = cast(Mapping[str, Schedule], averages)
    for name, schedule in schedules.items():
        if not isinstance(name, str) or "/" in name or not callable(schedule):
            raise TypeError(f"ema: expected names without '/' and callable schedules, got {name!r}: {schedule!r}")
    return dict(schedules)


def init(params: Params) -> Params:
    """The average before any update, a_0 = p_0, in at least float32: in bfloat16 an update of 1e-3 would be lost."""
    return jax.tree.map(widen, params)


def update(average: Params, params: Params, weight: Array | float) -> Params:
    """a + w (p - a), leaf by leaf, in the average's dtype; leaves that are not floating point are replaced.

    With a weight of zero the average stays as it is, even where the parameters are not finite.

    Args:
      average: a pytree like params.
      params: the new parameters.
      weight: w in [0, 1], a scalar.

    Raises:
      ValueError: when the two differ in structure or shapes.
    """
    checks.same_structure("average", average, "params", params)
    weight = jnp.asarray(weight)

    def leaf(a: Array, p: Array) -> Array:
        if not jnp.issubdtype(a.dtype, jnp.inexact):
            return p
        return jnp.where(weight == 0, a, a + weight.astype(a.dtype) * (p.astype(a.dtype) - a))

    return jax.tree.map(leaf, average, params)


def as_params(average: Params, params: Params) -> Params:
    """The average cast leaf by leaf to the dtypes of params, to be used in their place."""
    return jax.tree.map(lambda a, p: a.astype(p.dtype), average, params)


def decay_of_half_life(half_life: float, batch_size: int) -> float:
    """The decay per step at which a weight halves every ``half_life`` samples: 2^(-batch_size/half_life).

    Args:
      half_life: in samples.
      batch_size: samples per step.

    Raises:
      ValueError: when either is not positive; TypeError if it is not a number.

    Example:
      >>> from jflow.training import ema
      >>> round(ema.decay_of_half_life(1000, batch_size=10), 6)
      0.993092
    """
    checks.integer("batch_size", batch_size, low=1)
    return 0.5 ** (batch_size / checks.number("half_life", half_life, low=0.0, open_low=True))


def half_life_of_decay(decay: float, batch_size: int) -> float:
    """The samples after which a weight has halved: -batch_size log 2/log(decay), the inverse of decay_of_half_life.

    Raises:
      ValueError: when the decay is outside (0, 1); TypeError when an argument is no number.
    """
    checks.integer("batch_size", batch_size, low=1)
    decay = checks.number("decay", decay, low=0.0, high=1.0)
    if decay in (0.0, 1.0):
        raise ValueError(f"decay: expected a number strictly between 0 and 1, got {decay}")
    return -batch_size * math.log(2.0) / math.log(decay)


def widen(leaf: Array) -> Array:
    """A floating-point array in at least float32; anything else as it is."""
    leaf = jnp.asarray(leaf)
    # Not by jnp.promote_types, which refuses float64 with float32 where promotion is strict.
    narrow = jnp.issubdtype(leaf.dtype, jnp.floating) and jnp.finfo(leaf.dtype).bits < 32
    return leaf.astype(jnp.float32) if narrow else leaf
