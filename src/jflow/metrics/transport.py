"""Transport distances: the Fréchet distance of fitted Gaussians, and the sliced Wasserstein distance."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jflow import checks
from jflow.metrics.moments import Moments, frechet
from jflow.metrics.samples import Points, as_pair, both
from jflow.types import Array, Key


def frechet_distance(x: Points | Moments, y: Points | Moments) -> Array | np.ndarray:
    r"""Computes the (squared) Fréchet distance of Gaussians fitted to features.

    .. math:: |m_x - m_y|^2 + \mathrm{tr}\left( C_x + C_y - 2 (C_x C_y)^{1/2} \right)

    It is the FID (1706.08500) if the features are those of Inception. It is biased upward, by an amount that falls as 1/n and
    grows with the dimension.

    It is computed by numpy on the host in float64, independently of ``jax_enable_x64``; under ``jit``, by a callback. It has
    no derivative. With factors :math:`C = A^\top A` of the centred features, it is evaluated as

    .. math:: |m_x - m_y|^2 + \min_{Q^\top Q = I} |A_x - Q A_y|^2,

    without covariances or their roots. Low rank and a large common offset therefore do not reduce the accuracy, the distance
    is never negative, and no intermediate result overflows. The rounding error is about 1e-30 times the traces of the
    covariances. Cost: a QR decomposition of each set, and the singular vectors of one matrix of min(d, max(n, m)) rows.

    Args:
      x: features ``[n, d]``, n > 1; fewer than d are enough. Or their ``Moments``.
      y: features ``[m, d]``, m > 1, or their ``Moments``.

    Returns:
      The squared distance in squared feature units: a float64 scalar of numpy; under ``jit``, a scalar of jax's default
      float, infinite if it exceeds that dtype.

    Raises:
      TypeError: if features are not floating-point, or it is differentiated by ``jax.grad`` or ``jax.jvp``.
      ValueError: if there are too few samples, the dimensions differ, a feature is not finite, or the squared distance
        exceeds float64. Under ``jit``, features that are not finite give NaN.
    """
    if isinstance(x, Moments) or isinstance(y, Moments):
        return _checked(frechet(*(z if isinstance(z, Moments) else Moments.of(z) for z in (x, y))))
    a, b = both(x, y, least=2, device=False)
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return _checked(_frechet(a, b))
    return _frechet_by_callback(a, b)


def _checked(value: float) -> np.ndarray:
    if not np.isfinite(value):
        raise ValueError("x, y: expected features whose squared distance float64 can hold, got a larger one")
    return np.asarray(value)


@jax.custom_jvp
def _frechet_by_callback(a: Points, b: Points) -> Array:
    dtype = jnp.result_type(float)

    def on_host(a: Array, b: Array) -> np.ndarray:
        with np.errstate(over="ignore"):
            return np.asarray(_frechet(np.asarray(a), np.asarray(b)), dtype)

    return jax.pure_callback(on_host, jax.ShapeDtypeStruct((), dtype), a, b, vmap_method="sequential")


@_frechet_by_callback.defjvp
def _(primals: tuple[Points, Points], tangents: tuple[Points, Points]) -> tuple[Array, Array]:
    raise TypeError(
        "x, y: expected no derivative of frechet_distance, which runs on the host in numpy and cannot be differentiated"
    )


def _frechet(x: np.ndarray, y: np.ndarray) -> float:
    """Returns the squared distance: NaN if features are not finite, infinite if it exceeds float64."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return np.nan
    # Subtract a sample instead of a mean, so that a constant feature gives exact zeros. Divide by 4 first, so that the
    # difference cannot overflow.
    x, y, exponent = _scaled(x / 4.0 - x[:1] / 4.0, y / 4.0 - x[:1] / 4.0)
    value = frechet(Moments.of(x), Moments.of(y))
    with np.errstate(over="ignore"):
        return float(np.ldexp(value, 2 * (exponent + 2)))


def _scaled(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Returns both sets times 2^-e, such that the largest number is in [1/2, 1), and e. This scaling is exact."""
    exponent = int(np.frexp(max(np.abs(x).max(), np.abs(y).max()))[1])
    return np.ldexp(x, -exponent), np.ldexp(y, -exponent), exponent


def _quantile_pairs(n: int, m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Couples n and m equally weighted sorted points: returns indices into each, and the mass of every pair."""
    steps = [np.arange(n + 1, dtype=np.int64) * m, np.arange(m + 1, dtype=np.int64) * n]
    levels = np.unique(np.concatenate(steps))
    return levels[:-1] // m, levels[:-1] // n, np.diff(levels) / (n * m)


@functools.partial(jax.jit, static_argnames=("p", "projections"))
def _sliced_wasserstein(
    key: Key, x: Array, y: Array, left: Array, right: Array, mass: Array, p: int, projections: int
) -> Array:
    directions = jax.random.normal(key, (projections, x.shape[1]), x.dtype)
    directions = directions / jnp.linalg.norm(directions, axis=1, keepdims=True)

    def cost(direction: Array) -> Array:
        u, v = (jnp.sort(jnp.sum(z * direction[None, :], axis=1)) for z in (x, y))
        return jnp.sum(mass * jnp.abs(u[left] - v[right]) ** p)

    return jnp.mean(jax.lax.map(cost, directions)) ** (1 / p)


def sliced_wasserstein(key: Key, x: Points, y: Points, *, p: int = 2, projections: int = 128) -> Array:
    r"""Computes the sliced Wasserstein distance, with directions θ drawn uniformly from the sphere.

    .. math:: \left( \mathbb{E}_\theta\, W_p(\theta \cdot X, \theta \cdot Y)^p \right)^{1/p}

    Each one-dimensional distance is exact, also for sets of unequal size: the quantile functions are integrated piece by
    piece. For p = 2, a shift by a gives ``|a|/√d`` in expectation. Two sets from one law give a positive value of order
    n^{-1/2}; measure this floor as well.

    Args:
      key: a PRNG key for the directions.
      x: samples ``[n, ...]``.
      y: samples ``[m, ...]``.
      p: 1 or 2.
      projections: the number of directions.

    Returns:
      The distance, a scalar in the units of x (not squared).

    Raises:
      ValueError: if there are no samples, the dimensions differ, a sample is not finite, or p is neither 1 nor 2.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jflow import metrics
      >>> x = jnp.zeros((4, 1), jnp.float32)
      >>> round(float(metrics.sliced_wasserstein(jax.random.key(0), x, x + 2.0, projections=8)), 3)
      2.0
    """
    x, y, _ = as_pair(x, y, least=1)
    checks.choice("p", p, (1, 2))
    projections = checks.integer("projections", projections, low=1)
    left, right, mass = _quantile_pairs(x.shape[0], y.shape[0])
    indices = (jnp.asarray(i, jnp.int32) for i in (left, right))
    return _sliced_wasserstein(key, x, y, *indices, jnp.asarray(mass, x.dtype), p, projections)
