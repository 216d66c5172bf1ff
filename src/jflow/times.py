"""Laws of times: functions that draw training times, ``(key, n) -> t [n]``, or pairs, ``(key, n) -> (s [n], t [n])``.

A law draws the times of a whole batch in one call, so that it can stratify them; the rows of a batch are exchangeable. ``n``
is a Python integer. Laws must be traceable by jax. A law of pairs returns a tuple.

The functions of this module make laws: ``times.uniform()`` is a law, ``times.uniform`` is not. A function that takes a law
raises a TypeError or ValueError for anything else: a function that makes laws, a function with other arguments, a law of pairs
in place of a law of one time, and the reverse.

In papers with the data at time 0, laws are reversed: MeanFlow's logit-normal(-0.4, 1) is logit-normal(+0.4, 1) here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jflow import checks
from jflow.domains import FINEST_LEVELS
from jflow.law_checks import Law, PairLaw, check_one, check_pair, makes_laws
from jflow.named import described, named, shown
from jflow.types import Array, Key

AnyLaw = TypeVar("AnyLaw", Law, PairLaw)


@dataclasses.dataclass(frozen=True)
class ByStep(Generic[AnyLaw]):
    """A law that changes with the optimizer's step: ``law(step)`` is the law at that step. The step may be traced.

    An objective takes a ByStep wherever it takes a law: ``ByStep(lambda step: cells(2 ** (step // 1000)))``. The functions
    of this module that combine laws do not take a ByStep. Put it around their results: ``ByStep(lambda step: ordered(...))``.

    Raises:
      TypeError: if ``law`` is not a function of a step; a law, for example, is not.
    """

    law: Callable[[Array], AnyLaw]

    def __post_init__(self) -> None:
        what = "step -> law, such as lambda step: uniform()"
        checks.function("law", self.law, what)
        # ``cells`` is the only function of this module that makes a law from a traced number.
        if makes_laws(self.law) and self.law is not cells:
            raise TypeError(f"law: expected a function {what}, got the function {shown(self.law)}")
        checks.accepts("law", self.law, what, 1, model=False)

    def __repr__(self) -> str:
        return f"ByStep({shown(self.law)})"


def at_step(law: AnyLaw | ByStep[AnyLaw], step: Array | int) -> AnyLaw:
    """Returns the law at a step: ``law`` itself unless it is a ``ByStep``."""
    if not isinstance(law, ByStep):
        return law
    # The function may mix the step with floats, as optax schedules do.
    with jax.numpy_dtype_promotion("standard"):
        return law.law(jnp.asarray(step))


def uniform(low: float = 0.0, high: float = 1.0, *, stratified: bool = False) -> Law:
    """Returns the uniform law on [low, high). ``stratified`` draws one sample from each of n equal cells, in random order.

    Raises:
      ValueError: unless 0 <= low < high <= 1.
      TypeError: if low or high is not a number.

    Example:
      >>> import jax
      >>> from jflow import times
      >>> t = times.uniform(0.2, 0.4)(jax.random.key(0), 8)
      >>> t.shape, bool((t >= 0.2).all() and (t <= 0.4).all())
      ((8,), True)
    """
    checks.number("low", low, low=0.0, high=1.0)
    checks.number("high", high, low=low, high=1.0, open_low=True)

    def law(key: Key, n: int) -> Array:
        position_key, order_key = jax.random.split(key)
        u = jax.random.uniform(position_key, (n,))
        if stratified:
            u = jax.random.permutation(order_key, (jnp.arange(n, dtype=u.dtype) + u) / n)
        return low + (high - low) * u

    return named("uniform", law, low=low, high=high, stratified=stratified)


def logit_normal(mean: float = 0.0, std: float = 1.0) -> Law:
    """Returns the logit-normal law (2403.03206): t = sigmoid(mean + std z) with z ~ N(0, 1).

    Raises:
      ValueError: if std is not positive, or a number is not finite.
      TypeError: if mean or std is not a number.

    Example:
      >>> import jax
      >>> from jflow import times
      >>> t = times.logit_normal(-0.4, 1.0)(jax.random.key(0), 8)
      >>> bool((t > 0.0).all() and (t < 1.0).all())
      True
    """
    checks.number("mean", mean)
    checks.number("std", std, low=0.0, open_low=True)

    def law(key: Key, n: int) -> Array:
        return jax.nn.sigmoid(mean + std * jax.random.normal(key, (n,)))

    return named("logit_normal", law, mean=mean, std=std)


def constant(value: float) -> Law:
    """Returns the law of a fixed time.

    Raises:
      ValueError: if ``value`` is outside [0, 1].
      TypeError: if ``value`` is not a number.

    Example:
      >>> import jax
      >>> from jflow import times
      >>> print(times.constant(0.5)(jax.random.key(0), 3))
      [0.5 0.5 0.5]
    """
    checks.number("value", value, low=0.0, high=1.0)
    return named("constant", lambda key, n: jnp.full((n,), value), value=value)


def triangle(*, stratified: bool = False) -> PairLaw:
    """Returns the uniform law on the triangle 0 <= s < t <= 1.

    The gap g = t - s has density 2 (1 - g) and is drawn as g = 1 - sqrt(1 - u) with u uniform on [0, 1). s is uniform on
    [0, 1 - g]. ``stratified`` draws u from ``uniform(stratified=True)``.

    Example:
      >>> import jax
      >>> from jflow import times
      >>> s, t = times.triangle()(jax.random.key(0), 8)
      >>> bool((s <= t).all())
      True
    """
    position = uniform(stratified=stratified)

    def law(key: Key, n: int) -> tuple[Array, Array]:
        gap_key, start_key = jax.random.split(key)
        gap = 1.0 - jnp.sqrt(1.0 - position(gap_key, n))
        s = jax.random.uniform(start_key, (n,)) * (1.0 - gap)
        return s, jnp.minimum(s + gap, 1.0)

    return named("triangle", law, stratified=stratified)


def ordered(law: Law, other: Law | None = None) -> PairLaw:
    """Returns the law of two independent draws in increasing order: s is the smaller, t the larger (2505.13447).

    The second draw is from ``other`` if it is given (2510.24474), else from ``law``.

    Raises:
      ValueError, TypeError: if an argument is not a law of one time.
    """
    check_one("law", law)
    if other is not None:
        check_one("other", other)
    second_law = law if other is None else other

    def pair(key: Key, n: int) -> tuple[Array, Array]:
        first_key, second_key = jax.random.split(key)
        first, second = law(first_key, n), second_law(second_key, n)
        return jnp.minimum(first, second), jnp.maximum(first, second)

    return named("ordered", pair, law=law, **({} if other is None else {"other": other}))


def source(pair: PairLaw) -> Law:
    """Returns the law of s in a law of pairs. For example, ``source(ordered(law))`` is the law of the smaller of two draws.

    Raises:
      ValueError, TypeError: if ``pair`` is not a law of pairs.
    """
    check_pair("pair", pair)
    return named("source", lambda key, n: pair(key, n)[0], pair=pair)


def independent(source: Law, target: Law) -> PairLaw:
    """Returns the law of independent s and t. Use ``constant`` to fix one of them, and two uniforms for both directions.

    Raises:
      ValueError, TypeError: if an argument is not a law of one time.

    Example:
      >>> import jax
      >>> from jflow import times
      >>> s, t = times.independent(times.constant(0.0), times.constant(1.0))(jax.random.key(0), 2)
      >>> print(s, t)
      [0. 0.] [1. 1.]
    """
    check_one("source", source)
    check_one("target", target)

    def pair(key: Key, n: int) -> tuple[Array, Array]:
        source_key, target_key = jax.random.split(key)
        return source(source_key, n), target(target_key, n)

    return named("independent", pair, source=source, target=target)


def gapped(gap: Law) -> PairLaw:
    """Returns the law of pairs whose gap t - s is drawn from a law, and then s uniformly from [0, 1 - gap].

    Raises:
      ValueError, TypeError: if ``gap`` is not a law of one time.
    """
    check_one("gap", gap)

    def pair(key: Key, n: int) -> tuple[Array, Array]:
        gap_key, start_key = jax.random.split(key)
        g = gap(gap_key, n)
        s = jax.random.uniform(start_key, (n,)) * (1.0 - g)
        return s, jnp.minimum(s + g, 1.0)

    return named("gapped", pair, gap=gap)


def mixed(laws: Sequence[PairLaw], weights: Sequence[float]) -> PairLaw:
    """Returns the mixture of several laws of pairs: each row is drawn from one of them, with the given probabilities.

    Args:
      laws: the laws of pairs, at least one.
      weights: their probabilities.

    Raises:
      ValueError: if the numbers of weights and laws differ or are zero, a weight is negative, the weights do not sum to one,
        or an entry of ``laws`` does not return pairs of times.
      TypeError: if an argument is not a sequence, a weight is not a number, or an entry of ``laws`` is not a law.
    """
    for name, value, what in (("laws", laws, "laws of pairs"), ("weights", weights, "numbers")):
        if not isinstance(value, Sequence | np.ndarray) or isinstance(value, str):
            raise TypeError(f"{name}: expected a sequence of {what}, got {described(value)}")
    for i, law in enumerate(laws):
        check_pair(f"laws[{i}]", law)
    if len(laws) != len(weights) or not laws:
        raise ValueError(f"weights: expected one for each of {len(laws)} laws, got {len(weights)}")
    weights = tuple(checks.number(f"weights[{i}]", weight, low=0.0) for i, weight in enumerate(weights))
    if abs(sum(weights) - 1.0) > 1e-6:
        raise ValueError(f"weights: expected non-negative numbers that sum to one, got {weights}")

    def pair(key: Key, n: int) -> tuple[Array, Array]:
        choice_key, *keys = jax.random.split(key, len(laws) + 1)
        chosen = jax.random.categorical(choice_key, jnp.log(jnp.asarray(weights)), shape=(n,))
        drawn = [law(k, n) for law, k in zip(laws, keys, strict=True)]
        pick = lambda values: jnp.take_along_axis(jnp.stack(values), chosen[None], axis=0)[0]  # noqa: E731
        return pick([s for s, _ in drawn]), pick([t for _, t in drawn])

    return named("mixed", pair, laws=tuple(laws), weights=weights)


def to_data(source: Law | None = None) -> PairLaw:
    """Returns the law of the pairs of consistency models (2303.01469): t = 1, and s from a law, uniform by default.

    Raises:
      ValueError, TypeError: if ``source`` is not a law of one time.
    """
    return independent(uniform() if source is None else source, constant(1.0))


def cells(count: Array | int) -> PairLaw:
    """Returns the law of a uniformly chosen cell [s, t] in a grid of ``count`` equal cells (2202.00512).

    Raises:
      ValueError: if ``count`` is concrete and below one. It may be traced.
      TypeError: if ``count`` is neither an integer nor a jax array.
    """
    if not isinstance(count, jax.Array):
        checks.integer("count", count, low=1)
    value = checks.concrete(count)
    if value is not None and not value >= 1:
        raise ValueError(f"count: expected at least one cell, got {value}")

    def pair(key: Key, n: int) -> tuple[Array, Array]:
        u = jax.random.uniform(key, (n,))
        of = jnp.asarray(count).astype(u.dtype)
        start = jnp.minimum(jnp.floor(u * of), of - 1.0)
        return start / of, (start + 1.0) / of

    return named("cells", pair, count=count)


def dyadic(levels: int) -> PairLaw:
    """Returns the law of the shortcut model (2410.12557): the gap is 2^-k with k uniform on 0..levels.

    s is uniform on the multiples of the gap below 1. The smallest gap of the grid is included; in the paper's code it occurs
    in the flow-matching rows.

    Raises:
      ValueError: if ``levels`` is not between 1 and ``types.FINEST_LEVELS``.
      TypeError: if ``levels`` is not an integer.
    """
    checks.integer("levels", levels, low=1, high=FINEST_LEVELS)

    def pair(key: Key, n: int) -> tuple[Array, Array]:
        level_key, start_key = jax.random.split(key)
        cells = 2 ** jax.random.randint(level_key, (n,), 0, levels + 1)
        u = jax.random.uniform(start_key, (n,))
        count = cells.astype(u.dtype)
        start = jnp.floor(u * count)
        return start / count, (start + 1.0) / count

    return named("dyadic", pair, levels=levels)


LAWS: dict[str, Callable[[], Law]] = {"uniform": uniform, "logit_normal": logit_normal}
PAIR_LAWS: dict[str, Callable[[], PairLaw]] = {
    "triangle": triangle,
    "ordered_logit_normal": lambda: ordered(logit_normal(0.4, 1.0)),
}
