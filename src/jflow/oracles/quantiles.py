"""Computes the mean velocity of a mixture in one dimension by matching quantiles, to rounding, with exact derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jflow.oracles.mixtures import HALF_LOG_TAU
from jflow.types import Array


def match_quantiles(
    log_weights: Array,
    gap: Array,
    offset: Array,
    offset_dd: Array,
    sigma_s: Array,
    sigma_t: Array,
    sigma_dd: Array,
) -> Array:
    """Returns the mean velocity y of ``oracles.quantile``, in units of the base's standard deviation.

    The arguments are log w_k, t - s, N_k(s), m_k[s,t], sigma_s, sigma_t and sigma[s,t]; all but t - s are ``[K]``.
    """
    own = jax.lax.stop_gradient(offset_dd + offset * sigma_dd / sigma_s)

    def balance(y: Array) -> Array:
        slope = ((y - offset_dd) * sigma_s - offset * sigma_dd) / (sigma_s * sigma_t)
        weight = jax.nn.softmax(log_weights + _log_normal_dd(offset / sigma_s, gap * slope))
        return jnp.sum(weight * slope)

    def bisect(function: Callable[[Array], Array], middle: Array) -> Array:
        def halve(_: Any, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
            middle = 0.5 * (bracket[0] + bracket[1])
            above = function(middle) > 0.0
            return jnp.where(above, bracket[0], middle), jnp.where(above, middle, bracket[1])

        steps = jnp.finfo(middle.dtype).nmant + 8
        low, high = jax.lax.fori_loop(0, steps, halve, (jnp.min(own), jnp.max(own)))
        return 0.5 * (low + high)

    def tangent(linear: Callable[[Array], Array], value: Array) -> Array:
        return value / linear(jnp.ones_like(value))

    return jax.lax.custom_root(balance, jnp.mean(own), bisect, tangent)


# Gauss-Legendre nodes and weights on [0, 1]; exact to rounding for the widths used in _log_normal_dd.
_NODES, _WEIGHTS = (np.polynomial.legendre.leggauss(16)[0] + 1) / 2, np.polynomial.legendre.leggauss(16)[1] / 2


def _log_normal_dd(a: Array, width: Array) -> Array:
    """Returns log Phi[a, a + width], for the divided difference of the normal distribution function, [K].

    It is smooth at width = 0.
    """
    b = a + width
    near = jnp.abs(width) * jnp.maximum(1.0, jnp.maximum(jnp.abs(a), jnp.abs(b))) < 4.0
    # Near: the mean density between a and b, relative to the density at a.
    w = jnp.where(near, width, 0.0)
    start = jnp.where(near, a, 0.0)
    along = w[:, None] * jnp.asarray(_NODES, a.dtype)[None]
    mean = jnp.sum(jnp.asarray(_WEIGHTS, a.dtype)[None] * jnp.exp(-along * (start[:, None] + 0.5 * along)), axis=1)
    inside = jnp.log(mean) - 0.5 * start**2 - HALF_LOG_TAU
    # Far: Phi(high) - Phi(low), reflected into the lower tail, where the difference does not cancel.
    turned = jnp.where(a + b > 0.0, -1.0, 1.0)
    low = jnp.where(near, -3.0, jnp.minimum(turned * a, turned * b))
    high = jnp.where(near, 0.0, jnp.maximum(turned * a, turned * b))
    bottom, top = _log_normal_cdf(jnp.stack([low, high]))
    outside = top + jnp.log(-jnp.expm1(bottom - top)) - jnp.log(high - low)
    return jnp.where(near, inside, outside)


@jax.custom_jvp
def _log_normal_cdf(z: Array) -> Array:
    """Returns log Phi(z), exact to rounding in the lower tail, where jax's own function has only single precision."""
    tail, far, series = _tail(z)
    body = jnp.log(0.5 * jax.lax.erfc(-jnp.where(tail, 0.0, z) * float(np.sqrt(0.5))))
    return jnp.where(tail, jnp.log(series) - jnp.log(-far) - 0.5 * far**2 - HALF_LOG_TAU, body)


@_log_normal_cdf.defjvp
def _log_normal_cdf_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    """Computes the derivative phi/Phi: a much smaller program than the derivative of erfc, without its underflow."""
    (z,), (dz,) = primals, tangents
    value, (tail, far, series) = _log_normal_cdf(z), _tail(z)
    ratio = jnp.exp(-0.5 * jnp.where(tail, 0.0, z) ** 2 - HALF_LOG_TAU - jnp.where(tail, 0.0, value))
    return value, jnp.where(tail, -far / series, ratio) * dz


def _tail(z: Array) -> tuple[Array, Array, Array]:
    """Returns whether z is in the lower tail, z there, and the series for which Phi(z) = phi(z) series / (-z)."""
    edge = -7.0 if z.dtype == jnp.float32 else -16.0
    tail = z < edge
    far = jnp.where(tail, z, edge)
    inverse, series = 1.0 / far**2, jnp.ones_like(z)
    for k in range(10, 0, -1):
        series = 1.0 - (2 * k - 1) * inverse * series
    return tail, far, series
