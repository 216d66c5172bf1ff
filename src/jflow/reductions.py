r"""Reductions: functions that turn the residual of one sample, D = prediction - target, into its loss, a scalar.

Every reduction has the signature ``(params, s, t, difference) -> loss``. Only the learned ones read the first three
arguments. :math:`|D|^2` is the sum over all leaves and axes of the event, and sg is the stop-gradient:

- ``squared``: :math:`|D|^2`
- ``adaptive``: :math:`|D|^2 / \mathrm{sg}(|D|^2 + c)^p` (2505.13447)
- ``pseudo_huber``: :math:`\sqrt{|D|^2 + c^2} - c` (2310.14189)
- ``cauchy``: :math:`\tfrac12 c^2 \log(1 + |D|^2/c^2)` (2510.24474)
- ``learned``: :math:`e^{-w} |D|^2 + w` with a trained :math:`w(s, t)` (2312.02696)
- ``learned_cauchy``: :math:`\log(1 + e^{-w} |D|^2) + w/2` with a trained :math:`w(s, t)` (2510.24474)

``per_entry`` replaces :math:`|D|^2` by the mean over entries. Three more replace the value of D, keep its derivative, and
apply any of the above (``then``):

- ``normalised``: :math:`D/(|D| + c)`, the tangent normalisation of 2410.11081 and 2506.14603
- ``clipped``: :math:`D \min(1, c/|D|)`
- ``clamped``: every entry of D clipped to [-c, c] (2507.03738)

A tangent warm-up is not a reduction, because it scales one term of D. It belongs to the method's derivative
(``identities.scaled``).

If the target contains the velocity of the pair (MeanFlow), the exact map is stationary only for a weight that does not
depend on D. All reductions except ``squared`` and ``learned`` then bias the map wherever x1 given x is skewed. In the other
methods, the residual of the exact map is zero for every sample, except in the flow-matching (tangent) term, which is biased
in the same way.
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
    """Checks that an argument is a reduction, not a number or a function that makes a reduction.

    Raises:
      TypeError: if the argument is not a reduction.
    """
    checks.accepts(name, reduction, _LOSS, 4, model=False)


def squared(params: Params, s: Time, t: Time, difference: Event) -> Array:
    r"""The squared norm :math:`|D|^2`.

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
    r"""Returns the squared norm times a weight that depends on it; no gradient flows through the weight.

    .. math:: \mathrm{sg}\big( \mathrm{weight}(|D|^2) \big)\, |D|^2

    ``adaptive`` is an example.

    Raises:
      TypeError: if ``weight`` is not a function of one argument.
    """
    checks.accepts("weight", weight, "|D|^2 -> weight", 1, model=False)

    def reduction(params: Params, s: Time, t: Time, difference: Event) -> Array:
        del params, s, t
        square = trees.sq_norm(difference)
        return jax.lax.stop_gradient(weight(square)) * square

    return named("weighted", reduction, weight=weight)


def adaptive(p: float = 1.0, c: float = 0.01) -> Reduction:
    r"""Returns the squared norm with MeanFlow's adaptive weight.

    .. math:: \frac{|D|^2}{\mathrm{sg}(|D|^2 + c)^p}

    Raises:
      ValueError: if p is negative or c is not positive; when called, if c^p or its inverse is not a normal number of the
        dtype of ``|D|^2``.
      TypeError: if p or c is not a number.

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
    r"""Returns a reduction of D with the value of shape(D) and the derivative of D.

    .. math:: \mathrm{then}\big( D + \mathrm{sg}( \mathrm{shape}(D) - D ) \big)

    If ``then`` is ``squared``, the gradient is that of D contracted with 2 shape(D).

    Raises:
      TypeError: if ``shape`` is not a function of one argument, or ``then`` is not a reduction.
    """
    checks.accepts("shape", shape, "D -> another D", 1, model=False)
    check("then", then)

    def reduction(params: Params, s: Time, t: Time, difference: Event) -> Array:
        moved = jax.lax.stop_gradient(trees.sub(shape(difference), difference))
        return then(params, s, t, trees.add(difference, moved))

    return named("shaped", reduction, shape=shape, then=then)


def normalised(c: float = 0.1, then: Reduction = squared) -> Reduction:
    r"""Returns the tangent normalisation: ``then`` with the value of :math:`D/(|D| + c)` and the derivative of D.

    Raises:
      ValueError: if c is not positive; when called, if c or its inverse is not a normal number of the dtype of ``|D|``.
      TypeError: if c is not a number, or ``then`` is not a reduction.

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
        # Divide in the wide dtype: the inverse of a small norm overflows in 16 bits.
        return jax.tree.map(lambda leaf: (leaf.astype(norm.dtype) / norm).astype(leaf.dtype), d)

    return named("normalised", shaped(shape, then), c=c, then=then)


def clipped(c: float = 1.0, then: Reduction = squared) -> Reduction:
    r"""Returns norm clipping: ``then`` with the value of :math:`D \min(1, c/|D|)` and the derivative of D.

    Raises:
      ValueError: if c is not positive.
      TypeError: if c is not a number, or ``then`` is not a reduction.

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
    """Returns entrywise clipping: ``then`` with the value of D clipped to [-c, c] and the derivative of D.

    Raises:
      ValueError: if c is not positive.
      TypeError: if c is not a number, or ``then`` is not a reduction.
    """
    checks.number("c", c, low=0.0, open_low=True)
    shape = shaped(lambda d: jax.tree.map(lambda leaf: jnp.clip(leaf, -c, c), d), then)
    return named("clamped", shape, c=c, then=then)


def per_entry(then: Reduction = squared) -> Reduction:
    r"""Returns ``then`` of :math:`D/\sqrt{d}` for an event with d entries, so that :math:`|D|^2` becomes the mean over entries.

    Published losses are often means over pixels and channels. To clip entries as well, put ``clamped`` outside:
    ``clamped(1.0, then=per_entry(adaptive(0.5, 1e-3)))``.

    Raises:
      TypeError: if ``then`` is not a reduction.
      ValueError: when called, if the event has no entries.

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
    """Returns a reduction multiplied by ``factor``.

    Raises:
      ValueError: if the factor is not positive and finite.
      TypeError: if the factor is not a number, or ``of`` is not a reduction.
    """
    checks.number("factor", factor, low=0.0, open_low=True)
    check("of", of)

    def reduction(params: Params, s: Time, t: Time, difference: Event) -> Array:
        return factor * of(params, s, t, difference)

    return named("scaled", reduction, factor=factor, of=of)


def pseudo_huber(c: float = 0.03, *, times_root_size: bool = False) -> Reduction:
    r"""Returns the pseudo-Huber loss.

    .. math:: \sqrt{|D|^2 + c^2} - c

    With c = 0 it is :math:`|D|`, with a zero gradient at D = 0.

    Args:
      c: the width, in the units of ``|D|``, at least 0.
      times_root_size: whether to multiply c by sqrt(d) for an event with d entries. Improved consistency training
        (2310.14189) uses 0.00054 sqrt(d).

    Raises:
      ValueError: if c is negative.
      TypeError: if c is not a number.

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
        # This form avoids cancellation for small D, and the derivative of a root of zero.
        root = jnp.sqrt(jnp.where(within == 0.0, 1.0, within))
        return jnp.where(within == 0.0, 0.0, square / (root + width))

    return named("pseudo_huber", reduction, c=c, times_root_size=times_root_size)


def cauchy(c: float = 1.0) -> Reduction:
    r"""Returns the Cauchy loss.

    .. math:: \frac{c^2}{2} \log\left( 1 + \frac{|D|^2}{c^2} \right)

    Raises:
      ValueError: if c is not positive; when called, if c^2 or its inverse is not a normal number of the dtype of ``|D|^2``.
      TypeError: if c is not a number.

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
        # For large r, log(1 + r) = log(1 + 1/r) + log(r) cannot overflow. In the branch not taken, the argument is one.
        large = square > c * c
        outside = jnp.where(large, square, 1.0)
        log = jnp.log1p(jnp.where(large, c * c / outside, square / (c * c)))
        return 0.5 * c * c * (log + jnp.where(large, jnp.log(outside) - 2.0 * math.log(c), 0.0))

    return named("cauchy", reduction, c=c)


def learned(log_weight: Callable[[Params, Time, Time], Array], of: Reduction = squared) -> Reduction:
    r"""Returns a reduction with a learned weight (2312.02696).

    .. math:: e^{-w}\, \mathrm{of}(D) + w, \qquad w = \mathrm{log\_weight}(\mathrm{params}, s, t)

    The scalar w is trained together with the map. At its optimum, :math:`e^w = \mathbb{E}[\mathrm{of}(D)]`. Use
    ``of=per_entry()`` to weight the mean over entries instead of the sum.

    Raises:
      TypeError: if ``log_weight`` is not a function of three arguments, or ``of`` is not a reduction.
    """
    checks.accepts("log_weight", log_weight, _LOG_WEIGHT, 3, model=False)
    check("of", of)

    def reduction(params: Params, s: Time, t: Time, difference: Event) -> Array:
        w = log_weight(params, s, t)
        checks.shape("log_weight's output", w, ())
        return jnp.exp(-w) * of(params, s, t, difference) + w

    return named("learned", reduction, log_weight=log_weight, of=of)


def learned_cauchy(log_weight: Callable[[Params, Time, Time], Array]) -> Reduction:
    r"""Returns the Cauchy loss with a learned scale :math:`e^{w/2}` (2510.24474).

    .. math:: \log\left( 1 + e^{-w} |D|^2 \right) + \frac{w}{2}, \qquad w = \mathrm{log\_weight}(\mathrm{params}, s, t)

    Raises:
      TypeError: if ``log_weight`` is not a function of three arguments.
    """
    checks.accepts("log_weight", log_weight, _LOG_WEIGHT, 3, model=False)

    def reduction(params: Params, s: Time, t: Time, difference: Event) -> Array:
        w = log_weight(params, s, t)
        checks.shape("log_weight's output", w, ())
        return jnp.log1p(jnp.exp(-w) * trees.sq_norm(difference)) + 0.5 * w

    return named("learned_cauchy", reduction, log_weight=log_weight)


def _representable(name: str, value: float, power: float, dtype: jnp.dtype) -> None:
    """Raises ValueError if the positive value, value^power or its inverse is not a normal number of the dtype."""
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
