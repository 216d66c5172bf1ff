r"""Exponential moving averages (EMA) of parameters.

An average a follows the parameters p as

.. math::

    a_{n+1} = a_n + w_n (p_{n+1} - a_n), \qquad a_0 = p_0,

where n is the number of earlier updates by the optimizer. The weight of the new parameters, w_n = 1 - decay_n, comes from a
schedule. A schedule returns the weight rather than the decay because 1 - 0.9999 loses four digits in float32.

The schedules are

.. math::

    \text{constant}(d): \quad & w_n = 1 - d, \\
    \text{warmup}(d): \quad & w_n = 1 - \min\left(d, \frac{1 + n}{10 + n}\right), \\
    \text{power}(g): \quad & w_n = 1 - \left(\frac{n}{n + 1}\right)^{g + 1}, \\
    \text{unbiased}(d): \quad & w_n = \frac{1 - d}{1 - d^{\,n + 1}}.

The averages of ``power`` (2312.02696) and ``unbiased`` do not depend on p_0. After n updates ``power`` weights p_k
approximately in proportion to k^g, and ``unbiased`` in proportion to d^{n-k}.
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
    """The schedule of a constant decay, w_n = 1 - decay.

    Raises:
      ValueError: if the decay is outside [0, 1].
      TypeError: if it is not a number.

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
    r"""The schedule of a decay that grows to its final value, so that early parameters are forgotten quickly.

    .. math::

        w_n = 1 - \min\left(\text{decay}, \frac{1 + n}{10 + n}\right) = \max\left(1 - \text{decay}, \frac{9}{10 + n}\right)

    Raises:
      ValueError: if the decay is outside [0, 1].
      TypeError: if it is not a number.
    """
    weight = 1.0 - checks.number("decay", decay, low=0.0, high=1.0)
    return lambda n: jnp.maximum(jnp.float32(weight), 9.0 / (10.0 + jnp.asarray(n).astype(jnp.float32)))


def unbiased(decay: float) -> Schedule:
    r"""The schedule of a constant decay with Adam's bias correction.

    .. math::

        w_n = \frac{1 - \text{decay}}{1 - \text{decay}^{\,n + 1}}

    The first updates form nearly a plain mean of the new parameters, and p_0 has no weight.

    Raises:
      ValueError: if the decay is outside (0, 1).
      TypeError: if it is not a number.
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
    r"""The schedule of an average whose width is a fixed fraction of the run, about 1/gamma (2312.02696).

    .. math::

        w_n = 1 - \left(\frac{n}{n + 1}\right)^{\gamma + 1}

    After n updates the parameters :math:`p_k` have the weight :math:`(k/n)^{\gamma + 1} - ((k - 1)/n)^{\gamma + 1}`, and
    :math:`p_0` has none. With gamma = 16 the average reaches back over about the last 6 % of the steps, however many there are.

    Raises:
      ValueError: if gamma is negative.
      TypeError: if it is not a number.
    """
    exponent = checks.number("gamma", gamma, low=0.0) + 1.0

    def schedule(n: Array) -> Array:
        n = jnp.asarray(n).astype(jnp.float32)
        # log(n/(n + 1)) = log1p(-1/(n + 1)) is -inf at n = 0, where the weight is one.
        return -jnp.expm1(exponent * jnp.log1p(-1.0 / (n + 1.0)))

    return schedule


def resolve(averages: Averages) -> dict[str, Schedule]:
    """Schedules by name: a mapping unchanged, and for each decay a constant schedule named after it ("0.999").

    Raises:
      TypeError: if ``averages`` is not a mapping or an iterable of numbers, a name is not a string or contains "/", or a
        schedule is not callable.
      ValueError: if a decay is outside [0, 1].
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
    """The average before any update, a_0 = p_0, in at least float32; bfloat16 would round away an update of 1e-3."""
    return jax.tree.map(widen, params)


def update(average: Params, params: Params, weight: Array | float) -> Params:
    """The updated average, a + w (p - a) for each leaf, in the average's dtype.

    Leaves that are not floating point are replaced by those of ``params``. With a weight of zero the floating-point leaves
    are unchanged, even if the parameters are not finite.

    Args:
      average: a pytree like ``params``.
      params: the new parameters.
      weight: w in [0, 1], a scalar.

    Raises:
      ValueError: if the two differ in structure or shapes.
    """
    checks.same_structure("average", average, "params", params)
    weight = jnp.asarray(weight)

    def leaf(a: Array, p: Array) -> Array:
        if not jnp.issubdtype(a.dtype, jnp.inexact):
            return p
        return jnp.where(weight == 0, a, a + weight.astype(a.dtype) * (p.astype(a.dtype) - a))

    return jax.tree.map(leaf, average, params)


def as_params(average: Params, params: Params) -> Params:
    """The average with its leaves cast to the dtypes of ``params``, to be used in their place."""
    return jax.tree.map(lambda a, p: a.astype(p.dtype), average, params)


def decay_of_half_life(half_life: float, batch_size: int) -> float:
    """The decay per step with which a weight halves every ``half_life`` samples: 2^(-batch_size/half_life).

    Args:
      half_life: the half-life in samples.
      batch_size: samples per step.

    Raises:
      ValueError: if either is not positive.
      TypeError: if ``batch_size`` is not a whole number, or ``half_life`` not a number.

    Example:
      >>> from jflow.training import ema
      >>> round(ema.decay_of_half_life(1000, batch_size=10), 6)
      0.993092
    """
    checks.integer("batch_size", batch_size, low=1)
    return 0.5 ** (batch_size / checks.number("half_life", half_life, low=0.0, open_low=True))


def half_life_of_decay(decay: float, batch_size: int) -> float:
    """The half-life of a decay in samples, -batch_size log 2/log(decay); the inverse of ``decay_of_half_life``.

    Raises:
      ValueError: if the decay is outside (0, 1), or ``batch_size`` is not positive.
      TypeError: if ``batch_size`` is not a whole number, or ``decay`` not a number.
    """
    checks.integer("batch_size", batch_size, low=1)
    decay = checks.number("decay", decay, low=0.0, high=1.0)
    if decay in (0.0, 1.0):
        raise ValueError(f"decay: expected a number strictly between 0 and 1, got {decay}")
    return -batch_size * math.log(2.0) / math.log(decay)


def widen(leaf: Array) -> Array:
    """A floating-point array in at least float32; anything else as it is."""
    leaf = jnp.asarray(leaf)
    # jnp.promote_types would refuse to combine float64 and float32 under strict promotion.
    narrow = jnp.issubdtype(leaf.dtype, jnp.floating) and jnp.finfo(leaf.dtype).bits < 32
    return leaf.astype(jnp.float32) if narrow else leaf
