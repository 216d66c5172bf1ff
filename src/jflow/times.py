"""Laws of times: ``(key, n) -> [n]`` for one time, ``(key, n) -> (s [n], t [n])`` for a pair.

A law sees the whole batch, so that it can spread its samples (``stratified``); the rows of a batch are exchangeable.
Laws of time flip between conventions: MeanFlow's logit-normal(-0.4, 1) is logit-normal(+0.4, 1) here, s the smaller.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jflow import checks
from jflow.named import named, shown
from jflow.types import FINEST_LEVELS, Array, Domain, Key

# How many times are drawn when a law is checked.
DRAWN = 256

Law = Callable[[Key, int], Array]
PairLaw = Callable[[Key, int], tuple[Array, Array]]
AnyLaw = TypeVar("AnyLaw", Law, PairLaw)


@dataclasses.dataclass(frozen=True)
class ByStep(Generic[AnyLaw]):
    """A law that changes with the optimizer's step: ``law(step)`` is the one in force, for a traced step.

    An objective takes it wherever it takes a law: ``ByStep(lambda step: cells(2 ** (step // 1000)))``.

    Raises:
      TypeError: for what is no function.
    """

    law: Callable[[Array], AnyLaw]

    def __post_init__(self) -> None:
        checks.function("law", self.law, "step -> law")

    def __repr__(self) -> str:
        return f"ByStep({shown(self.law)})"


def at_step(law: AnyLaw | ByStep[AnyLaw], step: Array | int) -> AnyLaw:
    """The law in force at a step: ``law`` itself unless it is ``ByStep``."""
    if not isinstance(law, ByStep):
        return law
    # As in a schedule, whole steps may be mixed with floats.
    with jax.numpy_dtype_promotion("standard"):
        return law.law(jnp.asarray(step))


def uniform(low: float = 0.0, high: float = 1.0, *, stratified: bool = False) -> Law:
    """Uniform on [low, high); ``stratified`` puts one sample into each of n equal cells, in random order.

    Raises:
      ValueError: when not 0 <= low < high <= 1; TypeError when they are not numbers.
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
    """sigmoid(mean + std z), z ~ N(0, 1) (2403.03206).

    Raises:
      ValueError: when std is not positive; TypeError when they are not numbers.
    """
    checks.number("mean", mean)
    checks.number("std", std, low=0.0, open_low=True)

    def law(key: Key, n: int) -> Array:
        return jax.nn.sigmoid(mean + std * jax.random.normal(key, (n,)))

    return named("logit_normal", law, mean=mean, std=std)


def constant(value: float) -> Law:
    """The fixed time ``value``.

    Raises:
      ValueError: when it is outside [0, 1]; TypeError when it is not a number.
    """
    checks.number("value", value, low=0.0, high=1.0)
    return named("constant", lambda key, n: jnp.full((n,), value), value=value)


def triangle(*, stratified: bool = False) -> PairLaw:
    """Uniform on the triangle 0 <= s < t <= 1; ``stratified`` spreads the gap t - s evenly over its own law.

    The gap has density 2 (1 - g), so g = 1 - sqrt(1 - u), and s is uniform on [0, 1 - g].
    """
    position = uniform(stratified=stratified)

    def law(key: Key, n: int) -> tuple[Array, Array]:
        gap_key, start_key = jax.random.split(key)
        gap = 1.0 - jnp.sqrt(1.0 - position(gap_key, n))
        s = jax.random.uniform(start_key, (n,)) * (1.0 - gap)
        return s, jnp.minimum(s + gap, 1.0)

    return named("triangle", law, stratified=stratified)


def ordered(law: Law, other: Law | None = None) -> PairLaw:
    """Two independent draws, s the smaller (2505.13447): of one law, or of two (2510.24474)."""
    second_law = law if other is None else other

    def pair(key: Key, n: int) -> tuple[Array, Array]:
        first_key, second_key = jax.random.split(key)
        first, second = law(first_key, n), second_law(second_key, n)
        return jnp.minimum(first, second), jnp.maximum(first, second)

    return named("ordered", pair, law=law, **({} if other is None else {"other": other}))


def source(pair: PairLaw) -> Law:
    """The law of s in a law of pairs: ``source(ordered(law))`` is that of the smaller of two draws."""
    return named("source", lambda key, n: pair(key, n)[0], pair=pair)


def independent(source: Law, target: Law) -> PairLaw:
    """s and t drawn each from a law of its own: a fixed end with ``constant``, both directions with two uniforms."""

    def pair(key: Key, n: int) -> tuple[Array, Array]:
        source_key, target_key = jax.random.split(key)
        return source(source_key, n), target(target_key, n)

    return named("independent", pair, source=source, target=target)


def gapped(gap: Law) -> PairLaw:
    """The gap t - s from a law, then s uniform on [0, 1 - gap]."""

    def pair(key: Key, n: int) -> tuple[Array, Array]:
        gap_key, start_key = jax.random.split(key)
        g = gap(gap_key, n)
        s = jax.random.uniform(start_key, (n,)) * (1.0 - g)
        return s, jnp.minimum(s + g, 1.0)

    return named("gapped", pair, gap=gap)


def mixed(laws: Sequence[PairLaw], weights: Sequence[float]) -> PairLaw:
    """Every row from one of several pair laws, chosen with the given probabilities.

    Raises:
      ValueError: when the weights do not match the laws, are negative, or do not sum to one.
    """
    if len(laws) != len(weights) or not laws:
        raise ValueError(f"weights: expected one for each of {len(laws)} laws, got {len(weights)}")
    if min(weights) < 0 or abs(sum(weights) - 1.0) > 1e-6:
        raise ValueError(f"weights: expected non-negative numbers that sum to one, got {tuple(weights)}")

    def pair(key: Key, n: int) -> tuple[Array, Array]:
        choice_key, *keys = jax.random.split(key, len(laws) + 1)
        chosen = jax.random.categorical(choice_key, jnp.log(jnp.asarray(weights)), shape=(n,))
        drawn = [law(k, n) for law, k in zip(laws, keys, strict=True)]
        pick = lambda values: jnp.take_along_axis(jnp.stack(values), chosen[None], axis=0)[0]  # noqa: E731
        return pick([s for s, _ in drawn]), pick([t for _, t in drawn])

    return named("mixed", pair, laws=tuple(laws), weights=tuple(weights))


def to_data(source: Law | None = None) -> PairLaw:
    """t = 1 always, s from a law (uniform by default): the pairs of consistency models (2303.01469)."""
    return independent(uniform() if source is None else source, constant(1.0))


def cells(count: Array | int) -> PairLaw:
    """A uniformly chosen cell [s, t] of a grid of ``count`` equal cells (2202.00512); the count may be traced.

    Raises:
      ValueError: when a concrete count is below one; TypeError for a Python number that is not whole.
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
    """The law of the shortcut model (2410.12557): a gap 2^-k, k uniform on 0..levels, and s uniform on its multiples.

    The smallest gap of the grid is drawn too: in the paper's code the flow-matching rows carry it.

    Raises:
      ValueError: for levels outside 1 to ``types.FINEST_LEVELS``; TypeError if it is not a whole number.
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


def check_law(name: str, law: Law) -> np.ndarray | None:
    """Draws from a law of one time and refuses what is not ``[n]`` times in [0, 1].

    Within ``jit``, too, unless the law itself closes over traced values, whose times cannot be looked at and pass.

    Args:
      name: how the message calls it.
      law: ``(key, n) -> [n]``.

    Returns:
      The times that were drawn, in float64; None if they are traced.

    Raises:
      ValueError: for another shape, or times outside [0, 1] or not finite.
      TypeError: for what is no function, or times that are not floating-point.
    """
    return _check_drawn(name, _draw(name, law), "times")


def check_pairs(name: str, law: PairLaw, domain: Domain) -> tuple[np.ndarray, np.ndarray] | None:
    """Draws from a law of pairs and refuses what is not two arrays ``[n]`` of times within the domain.

    Within ``jit``, too, unless the law itself closes over traced values, whose times cannot be looked at and pass.

    Args:
      name: how the message calls it.
      law: ``(key, n) -> (s [n], t [n])``.
      domain: of the map that is trained at these times.

    Returns:
      The pairs (s, t) that were drawn, in float64; None if they are traced.

    Raises:
      ValueError: for anything but a pair, another shape, times outside [0, 1] or not finite, or a pair outside the domain.
      TypeError: for what is no function, or times that are not floating-point.
    """
    drawn = _draw(name, law)
    if not isinstance(drawn, tuple) or len(drawn) != 2:
        of = f" of {len(drawn)}" if isinstance(drawn, tuple) else ""
        raise ValueError(
            f"{name}: expected a law that returns a pair (s [n], t [n]), it returned {type(drawn).__name__}{of}"
        )
    s, t = (_check_drawn(name, part, which) for part, which in zip(drawn, ("s", "t"), strict=True))
    if s is None or t is None:
        return None
    outside = np.flatnonzero(~domain.contains_all(s, t))
    if outside.size:
        place = outside[0]
        raise ValueError(
            f"{name}: expected pairs (s, t) within the domain, {domain.name}; the law drew ({s[place]:g}, {t[place]:g})"
        )
    return s, t


def _draw(name: str, law: Any) -> Any:
    checks.function(name, law, "(key, n) -> times, a law of jflow.times")
    # Concrete within a trace, where the check would otherwise see nothing.
    with jax.ensure_compile_time_eval():
        return law(jax.random.key(0), DRAWN)


def _check_drawn(name: str, drawn: Any, which: str) -> np.ndarray | None:
    """The times as numpy, checked; None while they are traced."""
    if not isinstance(drawn, (jax.Array, np.ndarray)):
        raise ValueError(f"{name}: expected a law that returns an array of {which}, it returned {type(drawn).__name__}")
    shape, dtype = drawn.shape, drawn.dtype
    if shape != (DRAWN,):
        raise ValueError(f"{name}: expected a law that returns {which} of shape [n], got {shape} for n = {DRAWN}")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{name}: expected a law that returns floating-point {which}, got {dtype}")
    values = checks.concrete(drawn)
    if values is None:
        return None
    values = values.astype(np.float64)
    wrong = values[~((values >= 0.0) & (values <= 1.0))]
    if wrong.size:
        raise ValueError(f"{name}: expected a law of times in [0, 1], it drew {which} = {wrong[0]:g}")
    return values


LAWS: dict[str, Callable[[], Law]] = {"uniform": uniform, "logit_normal": logit_normal}
PAIR_LAWS: dict[str, Callable[[], PairLaw]] = {
    "triangle": triangle,
    "ordered_logit_normal": lambda: ordered(logit_normal(0.4, 1.0)),
}
