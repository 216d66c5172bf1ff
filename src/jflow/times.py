"""Laws of times: ``(key, n) -> [n]`` for one time, ``(key, n) -> (s [n], t [n])`` for a pair.

A law draws the times of a whole batch in one call, so that it can spread them (``stratified``); the rows of a batch are
exchangeable. ``n`` is a Python number, and jax must be able to trace a law. A law of pairs returns a tuple.

The functions below make laws: ``times.uniform()`` is a law, ``times.uniform`` is not. Where a law is an argument, anything
else is refused with a TypeError or ValueError that names the argument: a function that makes laws, a function of other
arguments, a law of pairs in the place of a law of one time, and the reverse.

In papers that put the data at time 0, laws are reversed: MeanFlow's logit-normal(-0.4, 1) is logit-normal(+0.4, 1) here.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jflow import checks
from jflow.named import described, named, shown
from jflow.types import FINEST_LEVELS, Array, Domain, Key

# The number of times that are drawn when a law is checked.
DRAWN = 256

Law = Callable[[Key, int], Array]
PairLaw = Callable[[Key, int], tuple[Array, Array]]
AnyLaw = TypeVar("AnyLaw", Law, PairLaw)

_ARRAYS = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)
# What laws take and return, for messages.
_ONE = "(key, n) -> times, a law of jflow.times such as uniform()"
_PAIR = "(key, n) -> (s, t), a law of pairs of jflow.times such as triangle()"


@dataclasses.dataclass(frozen=True)
class ByStep(Generic[AnyLaw]):
    """A law that changes with the optimizer's step: ``law(step)`` is the law at that step, which may be traced.

    An objective takes a ByStep wherever it takes a law: ``ByStep(lambda step: cells(2 ** (step // 1000)))``. The functions
    of this module that combine laws do not; put ByStep around their results: ``ByStep(lambda step: ordered(...))``.

    Raises:
      TypeError: for anything that is not a function of a step, such as a law.
    """

    law: Callable[[Array], AnyLaw]

    def __post_init__(self) -> None:
        what = "step -> law, such as lambda step: uniform()"
        checks.function("law", self.law, what)
        # Of the makers, ``cells`` alone takes a traced number.
        if _makes_laws(self.law) and self.law is not cells:
            raise TypeError(f"law: expected a function {what}, got the function {shown(self.law)}")
        checks.accepts("law", self.law, what, 1, model=False)

    def __repr__(self) -> str:
        return f"ByStep({shown(self.law)})"


def at_step(law: AnyLaw | ByStep[AnyLaw], step: Array | int) -> AnyLaw:
    """The law at a step; ``law`` itself unless it is a ``ByStep``."""
    if not isinstance(law, ByStep):
        return law
    # Steps may be mixed with floats, as in an optax schedule.
    with jax.numpy_dtype_promotion("standard"):
        return law.law(jnp.asarray(step))


def uniform(low: float = 0.0, high: float = 1.0, *, stratified: bool = False) -> Law:
    """Uniform on [low, high); ``stratified`` puts one sample into each of n equal cells, in random order.

    Raises:
      ValueError: unless 0 <= low < high <= 1; TypeError if they are not numbers.

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
    """sigmoid(mean + std z), z ~ N(0, 1) (2403.03206).

    Raises:
      ValueError: if std is not positive; TypeError if they are not numbers.

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
    """The fixed time ``value``.

    Raises:
      ValueError: if it is outside [0, 1]; TypeError if it is not a number.

    Example:
      >>> import jax
      >>> from jflow import times
      >>> print(times.constant(0.5)(jax.random.key(0), 3))
      [0.5 0.5 0.5]
    """
    checks.number("value", value, low=0.0, high=1.0)
    return named("constant", lambda key, n: jnp.full((n,), value), value=value)


def triangle(*, stratified: bool = False) -> PairLaw:
    """Uniform on the triangle 0 <= s < t <= 1; ``stratified`` draws the gap t - s from one stratum for each row.

    The gap has density 2 (1 - g), hence g = 1 - sqrt(1 - u) with u uniform; s is uniform on [0, 1 - g].

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
    """Two independent draws, s the smaller (2505.13447): of one law, or of two (2510.24474).

    Raises:
      ValueError, TypeError: for anything but laws of one time.
    """
    _check_one("law", law)
    if other is not None:
        _check_one("other", other)
    second_law = law if other is None else other

    def pair(key: Key, n: int) -> tuple[Array, Array]:
        first_key, second_key = jax.random.split(key)
        first, second = law(first_key, n), second_law(second_key, n)
        return jnp.minimum(first, second), jnp.maximum(first, second)

    return named("ordered", pair, law=law, **({} if other is None else {"other": other}))


def source(pair: PairLaw) -> Law:
    """The law of s in a law of pairs: ``source(ordered(law))`` is the law of the smaller of two draws.

    Raises:
      ValueError, TypeError: for anything but a law of pairs.
    """
    _check_pair("pair", pair)
    return named("source", lambda key, n: pair(key, n)[0], pair=pair)


def independent(source: Law, target: Law) -> PairLaw:
    """s and t, each drawn from its own law: ``constant`` fixes an end, two uniforms give both directions.

    Raises:
      ValueError, TypeError: for anything but laws of one time.

    Example:
      >>> import jax
      >>> from jflow import times
      >>> s, t = times.independent(times.constant(0.0), times.constant(1.0))(jax.random.key(0), 2)
      >>> print(s, t)
      [0. 0.] [1. 1.]
    """
    _check_one("source", source)
    _check_one("target", target)

    def pair(key: Key, n: int) -> tuple[Array, Array]:
        source_key, target_key = jax.random.split(key)
        return source(source_key, n), target(target_key, n)

    return named("independent", pair, source=source, target=target)


def gapped(gap: Law) -> PairLaw:
    """The gap t - s is drawn from a law, then s uniformly from [0, 1 - gap].

    Raises:
      ValueError, TypeError: for anything but a law of one time.
    """
    _check_one("gap", gap)

    def pair(key: Key, n: int) -> tuple[Array, Array]:
        gap_key, start_key = jax.random.split(key)
        g = gap(gap_key, n)
        s = jax.random.uniform(start_key, (n,)) * (1.0 - g)
        return s, jnp.minimum(s + g, 1.0)

    return named("gapped", pair, gap=gap)


def mixed(laws: Sequence[PairLaw], weights: Sequence[float]) -> PairLaw:
    """Every row is drawn from one of several laws of pairs, chosen with the given probabilities.

    Args:
      laws: the laws of pairs, at least one.
      weights: their probabilities, numbers.

    Raises:
      ValueError: for weights that do not match the laws, are negative, or do not sum to one.
      TypeError: for weights that are not numbers, or anything but sequences.
      ValueError, TypeError: for anything but laws of pairs.
    """
    for name, value, what in (("laws", laws, "laws of pairs"), ("weights", weights, "numbers")):
        if not isinstance(value, Sequence | np.ndarray) or isinstance(value, str):
            raise TypeError(f"{name}: expected a sequence of {what}, got {described(value)}")
    for i, law in enumerate(laws):
        _check_pair(f"laws[{i}]", law)
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
    """t = 1 always, s from a law (uniform by default): the pairs of consistency models (2303.01469).

    Raises:
      ValueError, TypeError: for anything but a law of one time.
    """
    return independent(uniform() if source is None else source, constant(1.0))


def cells(count: Array | int) -> PairLaw:
    """A uniformly chosen cell [s, t] of a grid of ``count`` equal cells (2202.00512); the count may be traced.

    Raises:
      ValueError: if a concrete count is below one; TypeError for a Python number that is not whole.
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

    The smallest gap of the grid is drawn too; in the paper's code it comes in the flow-matching rows.

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
    """Draws from a law of one time, and refuses anything but ``[n]`` times in [0, 1].

    It draws concrete times under ``jit`` too, unless the law closes over traced values; the values of traced times are not
    checked.

    Args:
      name: how messages call it.
      law: ``(key, n) -> [n]``.

    Returns:
      The times that were drawn, in float64; None if they are traced.

    Raises:
      ValueError: for another shape, or times outside [0, 1] or not finite.
      TypeError: for anything that is not a law, or times that are not floating-point.
    """
    return _check_values(name, _draw(name, law, _ONE), "times")


def check_pairs(name: str, law: PairLaw, domain: Domain) -> tuple[np.ndarray, np.ndarray] | None:
    """Draws from a law of pairs, and refuses anything but a tuple of two arrays ``[n]`` of times within the domain.

    It draws concrete times under ``jit`` too, unless the law closes over traced values; the values of traced times are not
    checked.

    Args:
      name: how messages call it.
      law: ``(key, n) -> (s [n], t [n])``.
      domain: of the map that is trained at these times.

    Returns:
      The pairs (s, t) that were drawn, in float64; None if they are traced.

    Raises:
      ValueError: for anything but a tuple of two (a list, too), another shape, times outside [0, 1] or not finite, or a
        pair outside the domain.
      TypeError: for anything that is not a law, or times that are not floating-point.
    """
    first, second = _as_pair(name, _draw(name, law, _PAIR))
    s, t = _check_values(name, first, "s"), _check_values(name, second, "t")
    if s is None or t is None:
        return None
    outside = np.flatnonzero(~domain.contains_all(s, t))
    if outside.size:
        place = outside[0]
        raise ValueError(
            f"{name}: expected pairs (s, t) within the domain, {domain.name}; the law drew ({s[place]:g}, {t[place]:g})"
        )
    return s, t


def _check_one(name: str, law: Any) -> None:
    """Refuses anything but a law of one time; nothing is computed."""
    _check_array(name, _shapes(name, law, _ONE), "times")


def _check_pair(name: str, law: Any) -> None:
    """Refuses anything but a law of pairs; nothing is computed."""
    for drawn, which in zip(_as_pair(name, _shapes(name, law, _PAIR)), ("s", "t"), strict=True):
        _check_array(name, drawn, which)


def _shapes(name: str, law: Any, what: str) -> Any:
    """What a law returns, as shapes and dtypes."""
    _check_is_law(name, law, what)
    # The key is made within the trace: laws are also made at import, when jax must not start its backend.
    return jax.eval_shape(lambda: law(jax.random.key(0), DRAWN))


def _draw(name: str, law: Any, what: str) -> Any:
    """What a law returns, concrete where it can be."""
    _check_is_law(name, law, what)
    # Under jit the times would otherwise be traced, and their values could not be checked.
    with jax.ensure_compile_time_eval():
        return law(jax.random.key(0), DRAWN)


def _check_is_law(name: str, law: Any, what: str) -> None:
    """Refuses anything but a function of a key and a number."""
    checks.function(name, law, what)
    if _makes_laws(law):
        raise TypeError(
            f"{name}: expected a function {what}, got the function {shown(law)}, which makes one: {shown(law)}(...)"
        )
    checks.accepts(name, law, what, 2, model=False)


def _makes_laws(law: Any) -> bool:
    """Whether it is a function of this module, not the law that it returns."""
    return inspect.isfunction(law) and law.__module__ == __name__


def _as_pair(name: str, drawn: Any) -> tuple[Any, Any]:
    if not isinstance(drawn, tuple) or len(drawn) != 2:
        raise ValueError(f"{name}: expected a law that returns a tuple (s [n], t [n]), it returned {_kind(drawn)}")
    return drawn


def _check_array(name: str, drawn: Any, which: str) -> None:
    """Refuses anything but a floating-point array ``[n]``."""
    if not isinstance(drawn, _ARRAYS):
        raise ValueError(f"{name}: expected a law that returns an array of {which}, it returned {_kind(drawn)}")
    shape, dtype = drawn.shape, drawn.dtype
    if shape != (DRAWN,):
        raise ValueError(f"{name}: expected a law that returns {which} of shape [n], got {shape} for n = {DRAWN}")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{name}: expected a law that returns floating-point {which}, got {dtype}")


def _kind(drawn: Any) -> str:
    """What a law returned, for messages."""
    if isinstance(drawn, _ARRAYS):
        return "one array"
    return f"a {type(drawn).__name__}" + (f" of {len(drawn)}" if isinstance(drawn, tuple | list) else "")


def _check_values(name: str, drawn: Any, which: str) -> np.ndarray | None:
    """The times as numpy, checked; None if they are traced."""
    _check_array(name, drawn, which)
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
