r"""Reductions: from one sample's residual D = prediction - target to its loss, a scalar.

Every reduction has the signature ``(params, s, t, difference) -> loss``; only the learned ones read the first three.
``|D|^2`` is the sum over all leaves and axes of the event. With sg the stop-gradient::

    squared            |D|^2
    adaptive           |D|^2 / sg(|D|^2 + c)^p                       (2505.13447)
    pseudo-Huber       sqrt(|D|^2 + c^2) - c                         (2310.14189)
    Cauchy             (c^2/2) log(1 + |D|^2/c^2)                    (2510.24474)
    learned            e^{-w} |D|^2 + w, w = w(s, t)                 (2312.02696)
    learned Cauchy     log(1 + e^{-w} |D|^2) + w/2                   (2510.24474)

``per_entry`` makes ``|D|^2`` a mean over entries. Three more replace the value of D, keep its derivative, and apply any of the
above (``then``)::

    normalised         D/(|D| + c): the tangent normalisation of 2410.11081 and 2506.14603
    clipped            D min(1, c/|D|)
    clamped            every entry of D cut off at +-c               (2507.03738)

A warm-up of the tangent is not a reduction, because it scales one term of D: it is a choice of the method's derivative
(``identities.scaled``).

Where the target holds a velocity from the pair (MeanFlow) only a weight that does not depend on D keeps the exact map
stationary: all but ``squared`` and ``learned`` bias it wherever x1 given x is skewed. In the other methods the residual of
the exact map is zero for every sample, or its target is the regression of flow matching, biased in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jflow import checks, trees
from jflow.named import named
from jflow.types import Array, Event, Params, Time

Reduction = Callable[[Params, Time, Time, Event], Array]
_LOG_WEIGHT = "(params, s, t) -> log-weight, a scalar"
_LOSS = "(params, s, t, difference) -> loss, such as reductions.squared"


def check(name: str, reduction: Reduction) -> None:
    """Refuses anything but a reduction: a number, or a function that makes one in its place.

    Raises:
      TypeError: naming the argument, and what was expected.
    """
    checks.accepts(name, reduction, _LOSS, 4, model=False)


def squared(params: Params, s: Time, t: Time, difference: Event) -> Array:
    """The squared norm, ``|D|^2``.

    Example:
      >>> import jax.numpy as jnp
      >>> from jflow import reductions
      >>> difference = jnp.array([3.0, 4.0], jnp.float32)
      >>> round(float(reductions.squared(None, 0.0, 1.0, difference)), 4)
      25.0
    """
    del params, s, t
    return trees.sq_norm(difference)


def weighted(weight: Callable[[Array], Array]) -> Reduction:
    """The squared norm with a weight that depends on it and has no gradient, ``sg(weight(|D|^2)) |D|^2``; ``adaptive`` is one.

    Raises:
      TypeError: for a weight that is not a function of one argument.
    """
    checks.accepts("weight", weight, "|D|^2 -> weight", 1, model=False)

    def reduction(params: Params, s: Time, t: Time, difference: Event) -> Array:
        del params, s, t
        square = trees.sq_norm(difference)
        return jax.lax.stop_gradient(weight(square)) * square

    return named("weighted", reduction, weight=weight)


def adaptive(p: float = 1.0, c: float = 0.01) -> Reduction:
    """The squared norm with MeanFlow's adaptive weight, ``|D|^2 / sg(|D|^2 + c)^p``.

    Raises:
      ValueError: if p is negative or c not positive; when called, if c^p or its inverse is not a normal number of the
        dtype of ``|D|^2``. TypeError if they are not numbers.

    Example:
      >>> import jax.numpy as jnp
      >>> from jflow import reductions
      >>> difference = jnp.array([3.0, 4.0], jnp.float32)
      >>> round(float(reductions.adaptive()(None, 0.0, 1.0, difference)), 4)
      0.9996
    """
    checks.number("p", p, low=0.0)
    checks.number("c", c, low=0.0, open_low=True)

    def weight(square: Array) -> Array:
        _representable("c", c, p, square.dtype)
        return (square + c) ** -p

    return named("adaptive", weighted(weight), p=p, c=c)


def shaped(shape: Callable[[Event], Event], then: Reduction = squared) -> Reduction:
    """``then`` of D + sg(shape(D) - D): the value is that of shape(D), the derivative that of D.

    With ``then`` squared, half the gradient is shape(D) times that of the prediction.

    Raises:
      TypeError: for a shape that is not a function of one argument, or anything but a reduction.
    """
    checks.accepts("shape", shape, "D -> another D", 1, model=False)
    check("then", then)

    def reduction(params: Params, s: Time, t: Time, difference: Event) -> Array:
        moved = jax.lax.stop_gradient(trees.sub(shape(difference), difference))
        return then(params, s, t, trees.add(difference, moved))

    return named("shaped", reduction, shape=shape, then=then)


def normalised(c: float = 0.1, then: Reduction = squared) -> Reduction:
    """Tangent normalisation: ``then`` of ``D/(|D| + c)``, with the derivative of D.

    Raises:
      ValueError: if c is not positive; when called, if c or its inverse is not a normal number of the dtype of ``|D|``.
      TypeError: if it is not a number, or for anything but a reduction.

    Example:
      >>> import jax.numpy as jnp
      >>> from jflow import reductions
      >>> difference = jnp.array([3.0, 4.0], jnp.float32)
      >>> round(float(reductions.normalised()(None, 0.0, 1.0, difference)), 4)
      0.9612
    """
    checks.number("c", c, low=0.0, open_low=True)

    def shape(d: Event) -> Event:
        norm = jnp.sqrt(trees.sq_norm(d)) + c
        _representable("c", c, 1.0, norm.dtype)
        # Divided in the wide dtype: the inverse of a small norm overflows in 16 bits.
        return jax.tree.map(lambda leaf: (leaf.astype(norm.dtype) / norm).astype(leaf.dtype), d)

    return named("normalised", shaped(shape, then), c=c, then=then)


def clipped(c: float = 1.0, then: Reduction = squared) -> Reduction:
    """Clipping: ``then`` of ``D min(1, c/|D|)``, with the derivative of D.

    Raises:
      ValueError: if c is not positive; TypeError if it is not a number, or for anything but a reduction.

    Example:
      >>> import jax.numpy as jnp
      >>> from jflow import reductions
      >>> difference = jnp.array([3.0, 4.0], jnp.float32)
      >>> round(float(reductions.clipped(c=1.0)(None, 0.0, 1.0, difference)), 4)
      1.0
    """
    checks.number("c", c, low=0.0, open_low=True)
    shape = shaped(lambda d: trees.scale(c / jnp.maximum(jnp.sqrt(trees.sq_norm(d)), c), d), then)
    return named("clipped", shape, c=c, then=then)


def clamped(c: float = 1.0, then: Reduction = squared) -> Reduction:
    """``then`` of D with every entry cut off at +-c, with the derivative of D.

    Raises:
      ValueError: if c is not positive; TypeError if it is not a number, or for anything but a reduction.
    """
    checks.number("c", c, low=0.0, open_low=True)
    shape = shaped(lambda d: jax.tree.map(lambda leaf: jnp.clip(leaf, -c, c), d), then)
    return named("clamped", shape, c=c, then=then)


def per_entry(then: Reduction = squared) -> Reduction:
    """``then`` of D/sqrt(d), d counting the entries of the event: ``|D|^2`` becomes its mean over the entries.

    Published losses are often means over pixels and channels. A cut-off of entries goes outside:
    ``clamped(1.0, then=per_entry(adaptive(0.5, 1e-3)))``.

    Raises:
      TypeError: for anything but a reduction. ValueError when called, for an event without entries.

    Example:
      >>> import jax.numpy as jnp
      >>> from jflow import reductions
      >>> difference = jnp.array([3.0, 4.0], jnp.float32)
      >>> round(float(reductions.per_entry()(None, 0.0, 1.0, difference)), 4)
      12.5
    """
    check("then", then)

    def reduction(params: Params, s: Time, t: Time, difference: Event) -> Array:
        size = trees.size(difference)
        if size == 0:
            raise ValueError("difference: expected an event with entries to take their mean, got none")
        return then(params, s, t, trees.scale(size**-0.5, difference))

    return named("per_entry", reduction, then=then)


def scaled(factor: float, of: Reduction) -> Reduction:
    """``factor`` times a reduction.

    Raises:
      ValueError: if the factor is not positive and finite; TypeError if it is not a number, or for anything but a reduction.
    """
    checks.number("factor", factor, low=0.0, open_low=True)
    check("of", of)

    def reduction(params: Params, s: Time, t: Time, difference: Event) -> Array:
        return factor * of(params, s, t, difference)

    return named("scaled", reduction, factor=factor, of=of)


def pseudo_huber(c: float = 0.03, *, times_root_size: bool = False) -> Reduction:
    """The pseudo-Huber loss, ``sqrt(|D|^2 + c^2) - c``; with c = 0 it is ``|D|``, whose gradient at D = 0 is taken as zero.

    Args:
      c: in the units of ``|D|``, at least 0.
      times_root_size: whether c is multiplied with sqrt(d), d counting the entries of the event: 0.00054 sqrt(d) in
        improved consistency training (2310.14189).

    Raises:
      ValueError: if c is negative; TypeError if it is not a number.

    Example:
      >>> import jax.numpy as jnp
      >>> from jflow import reductions
      >>> difference = jnp.array([3.0, 4.0], jnp.float32)
      >>> round(float(reductions.pseudo_huber(c=1.0)(None, 0.0, 1.0, difference)), 4)
      4.099
    """
    checks.number("c", c, low=0.0)

    def reduction(params: Params, s: Time, t: Time, difference: Event) -> Array:
        del params, s, t
        square = trees.sq_norm(difference)
        width = c * trees.size(difference) ** 0.5 if times_root_size else c
        within = square + width * width
        # The difference of two nearly equal numbers, without the cancellation; and no root of zero.
        root = jnp.sqrt(jnp.where(within == 0.0, 1.0, within))
        return jnp.where(within == 0.0, 0.0, square / (root + width))

    return named("pseudo_huber", reduction, c=c, times_root_size=times_root_size)


def cauchy(c: float = 1.0) -> Reduction:
    """The Cauchy loss, ``(c^2/2) log(1 + |D|^2/c^2)``.

    Raises:
      ValueError: if c is not positive; when called, if c^2 is not a normal number of the dtype of ``|D|^2``.
      TypeError: if it is not a number.

    Example:
      >>> import jax.numpy as jnp
      >>> from jflow import reductions
      >>> difference = jnp.array([3.0, 4.0], jnp.float32)
      >>> round(float(reductions.cauchy()(None, 0.0, 1.0, difference)), 4)
      1.629
    """
    checks.number("c", c, low=0.0, open_low=True)

    def reduction(params: Params, s: Time, t: Time, difference: Event) -> Array:
        del params, s, t
        square = trees.sq_norm(difference)
        _representable("c", c, 2.0, square.dtype)
        # log(1 + r) = log(1 + 1/r) + log(r), which cannot overflow; where it is not taken, its argument is one.
        large = square > c * c
        outside = jnp.where(large, square, 1.0)
        log = jnp.log1p(jnp.where(large, c * c / outside, square / (c * c)))
        return 0.5 * c * c * (log + jnp.where(large, jnp.log(outside) - 2.0 * math.log(c), 0.0))

    return named("cauchy", reduction, c=c)


def learned(log_weight: Callable[[Params, Time, Time], Array], of: Reduction = squared) -> Reduction:
    """e^{-w} of(D) + w with w = log_weight(params, s, t), a scalar trained along; at its optimum e^w = E[of(D)].

    Divide w by the event's size beforehand if ``|D|^2`` should count per dimension.

    Raises:
      TypeError: for a log_weight that is not a function of three arguments, or anything but a reduction.
    """
    checks.accepts("log_weight", log_weight, _LOG_WEIGHT, 3, model=False)
    check("of", of)

    def reduction(params: Params, s: Time, t: Time, difference: Event) -> Array:
        w = log_weight(params, s, t)
        checks.shape("log_weight's output", w, ())
        return jnp.exp(-w) * of(params, s, t, difference) + w

    return named("learned", reduction, log_weight=log_weight, of=of)


def learned_cauchy(log_weight: Callable[[Params, Time, Time], Array]) -> Reduction:
    """The Cauchy loss of learned scale e^{w/2}: ``log(1 + e^{-w} |D|^2) + w/2`` with w = log_weight(params, s, t).

    Raises:
      TypeError: for a log_weight that is not a function of three arguments.
    """
    checks.accepts("log_weight", log_weight, _LOG_WEIGHT, 3, model=False)

    def reduction(params: Params, s: Time, t: Time, difference: Event) -> Array:
        w = log_weight(params, s, t)
        checks.shape("log_weight's output", w, ())
        return jnp.log1p(jnp.exp(-w) * trees.sq_norm(difference)) + 0.5 * w

    return named("learned_cauchy", reduction, log_weight=log_weight)


def _representable(name: str, value: float, power: float, dtype: jnp.dtype) -> None:
    """Refuses a positive value if value^power or its inverse is not a normal number of the dtype."""
    least, most = float(jnp.finfo(dtype).tiny), float(jnp.finfo(dtype).max)
    exponent = power * math.log(value)
    if not (math.log(least) <= exponent <= math.log(most) and -exponent <= math.log(most)) or value < least:
        raise ValueError(
            f"{name}: expected a number whose power {power:g} {dtype} can hold, and its inverse, got {value!r}"
        )


REDUCTIONS: dict[str, Callable[[], Reduction]] = {
    "squared": lambda: squared,
    "adaptive": adaptive,
    "normalised": normalised,
    "clipped": clipped,
    "clamped": clamped,
    "pseudo_huber": pseudo_huber,
    "cauchy": cauchy,
}
