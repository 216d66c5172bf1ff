"""Distances of transport: the Fréchet distance of fitted Gaussians, and the sliced Wasserstein distance."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jflow import checks
from jflow.metrics.samples import Points, as_pair, both, centred
from jflow.types import Array, Key


def frechet_distance(x: Points, y: Points) -> Array:
    """The Fréchet distance |m_x - m_y|² + tr(C_x + C_y - 2 (C_x C_y)^½) of Gaussians fitted to features.

    The FID (1706.08500) when the features are Inception's. Biased upward, by an amount that falls as 1/n and
    grows with the dimension.

    Computed on the host in float64 (under ``jit`` by a callback, without a derivative), from factors C = A'A of the
    centred features, as |m_x - m_y|² + min over orthogonal Q of |A_x - Q A_y|². Neither a covariance nor the root of one is
    formed, so no rank and no offset costs digits, and the distance is never negative. Cost: a QR decomposition of either
    set and the singular values and vectors of one matrix of min(d, max(n, m)) rows.

    Args:
      x: features ``[n, d]``, n > 1; fewer than d are enough.
      y: features ``[m, d]``, m > 1.

    Returns:
      The squared distance, a scalar in squared feature units, in float64 where jax has it, else float32.

    Raises:
      TypeError: for features that are not floating-point numbers.
      ValueError: for too few samples, unequal dimensions or a feature that is not finite. Under ``jit`` features that are
        not finite give NaN.
    """
    a, b = both(x, y, least=2)
    dtype = jnp.result_type(float)
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return jnp.asarray(_frechet(a, b), dtype)

    def on_host(a: Array, b: Array) -> np.ndarray:
        return np.asarray(_frechet(np.asarray(a), np.asarray(b)), dtype)

    return jax.pure_callback(on_host, jax.ShapeDtypeStruct((), dtype), a, b, vmap_method="sequential")


def _frechet(x: np.ndarray, y: np.ndarray) -> float:
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return np.nan
    x, y, _ = centred(x, y)
    mean_x, mean_y = np.mean(x, axis=0), np.mean(y, axis=0)
    a, b = _factor(x - mean_x), _factor(y - mean_y)
    # Rows of zeros make both of one size, so that one is turned onto the other.
    rows = max(len(a), len(b))
    a, b = (np.pad(z, ((0, rows - len(z)), (0, 0))) for z in (a, b))
    left, _, right = np.linalg.svd(a @ b.T)
    return float(np.sum(np.square(mean_x - mean_y)) + np.sum(np.square(a - left @ right @ b)))


def _factor(points: np.ndarray) -> np.ndarray:
    """A with A'A = C, the covariance of centred points, [min(n, d), d]."""
    return np.linalg.qr(points, mode="r") / np.sqrt(len(points) - 1)


def _quantile_pairs(n: int, m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How n and m equally weighted sorted points are coupled: indices into each, the mass of every pair."""
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
    """The sliced Wasserstein distance (mean over θ of W_p(θ·X, θ·Y)^p)^{1/p}, θ uniform on the sphere.

    Each one-dimensional distance is exact, for unequal sizes too: the quantile functions are integrated piece
    by piece. A shift by a gives |a|/√d at p = 2. Two sets from one law give a positive floor of order
    n^{-1/2}: measure it beside.

    Args:
      key: of the directions.
      x: samples ``[n, ...]``.
      y: samples ``[m, ...]``.
      p: 1 or 2.
      projections: how many directions.

    Returns:
      The distance, a scalar in the units of x (not squared).

    Raises:
      ValueError: for no samples, unequal dimensions, a sample that is not finite, or another p.
    """
    x, y, _ = as_pair(x, y, least=1)
    checks.choice("p", p, (1, 2))
    projections = checks.integer("projections", projections, low=1)
    left, right, mass = _quantile_pairs(x.shape[0], y.shape[0])
    indices = (jnp.asarray(i, jnp.int32) for i in (left, right))
    return _sliced_wasserstein(key, x, y, *indices, jnp.asarray(mass, x.dtype), p, projections)
