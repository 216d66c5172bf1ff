"""Two-sample kernel statistics: energy distance, maximum mean discrepancy, and the kernel distance of features."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jflow import checks
from jflow.metrics.samples import Estimate, Points, as_pair
from jflow.types import Array, Params

_CHUNK = 512
# Up to this dimension, pair differences are computed directly; above it, by a matrix product.
_DIRECT_DIMENSIONS = 8
MEDIAN_MULTIPLES = (0.5, 1.0, 2.0)


def _squared_distances(x: Array, y: Array) -> Array:
    """Returns the squared distances ``|x_i - y_j|²``, [n, m]."""
    if x.shape[1] <= _DIRECT_DIMENSIONS:
        squares = (jnp.square(x[:, k, None] - y[None, :, k]) for k in range(x.shape[1]))
        return sum(squares, start=jnp.zeros((), x.dtype))
    cross = jnp.matmul(x, y.T, precision="highest")
    norms = jnp.sum(x * x, axis=1)[:, None] + jnp.sum(y * y, axis=1)[None, :]
    return jnp.maximum(norms - 2 * cross, 0)


def _minus_distance(_: None, x: Array, y: Array) -> Array:
    return -jnp.sqrt(_squared_distances(x, y))


def _gaussians(bandwidths: Array, x: Array, y: Array) -> Array:
    squares = _squared_distances(x, y)
    # XLA vectorises the exponential in a separate loop, but not when it is fused into the sums over rows and columns.
    terms = jax.lax.map(lambda h: jnp.exp(-squares / (2 * h * h)), bandwidths)
    return jnp.mean(terms, axis=0)


def _cubic(centre: Array, x: Array, y: Array) -> Array:
    """Returns k(a,b) - k(a,c) - k(c,b) + k(c,c) with k(a,b) = (a·b/d + 1)³, for the points x = a - c and y = b - c.

    Terms that depend on only one point cancel in the statistic and in its jackknife error. They are omitted, because k itself
    would lose most of its digits if the mean c of the features is large. With p = c·x/d, r = c·y/d, q = x·y/d,
    ``g = 1 + |c|²/d`` and w = g + p + r, the remainder is 3 p r (g + w) + q (3 w² + 3 w q + q²).
    """
    d = x.shape[1]
    p, r = (jnp.sum(z * centre[None, :], axis=1) / d for z in (x, y))
    p, r, q = p[:, None], r[None, :], jnp.matmul(x, y.T, precision="highest") / d
    g = 1 + jnp.sum(centre * centre) / d
    w = g + p + r
    return 3 * p * r * (g + w) + q * (3 * w * w + 3 * w * q + q * q)


def _pair_means(kernel: Callable, params: Params, x: Array, y: Array, chunk: int, same: bool) -> tuple[Array, Array]:
    """Computes the means of k(x_i, y_j) over j, [n], and over i, [m], in blocks of chunk by chunk.

    With ``same`` (y is x), the pairs i = j are omitted, and only half of the blocks are visited.
    """
    n, m = x.shape[0], y.shape[0]
    chunk = min(chunk, max(n, m))
    rows, columns = -(-n // chunk), -(-m // chunk)
    x = jnp.pad(x, ((0, rows * chunk - n), (0, 0))).reshape(rows, chunk, -1)
    y = jnp.pad(y, ((0, columns * chunk - m), (0, 0))).reshape(columns, chunk, -1)
    blocks = jnp.asarray(np.array([(i, j) for i in range(rows) for j in range(i if same else 0, columns)], np.int32))
    inside = jnp.arange(chunk, dtype=jnp.int32)

    def visit(sums: tuple[Array, Array], block: Array) -> tuple[tuple[Array, Array], None]:
        i, j = block[0], block[1]
        row, column = i * chunk + inside, j * chunk + inside
        keep = (row < n)[:, None] & (column < m)[None, :]
        if same:
            keep = keep & (row[:, None] != column[None, :])
        values = jnp.where(keep, kernel(params, x[i], y[j]), 0)
        across, down = sums
        across = across.at[i].add(jnp.sum(values, axis=1))
        # With y = x, an off-diagonal block also represents its mirror image; a diagonal block is complete.
        down = down.at[j].add(jnp.where(same & (i == j), 0, jnp.sum(values, axis=0)))
        return (across, down), None

    zeros = jnp.zeros((rows, chunk), x.dtype), jnp.zeros((columns, chunk), x.dtype)
    (across, down), _ = jax.lax.scan(visit, zeros, blocks)
    if same:
        mean = (across + down).reshape(-1)[:n] / (n - 1)
        return mean, mean
    return across.reshape(-1)[:n] / m, down.reshape(-1)[:m] / n


def _jackknife(within: Array, between: Array) -> Array:
    """Computes the jackknife variance of the U-statistic for one set, from its mean kernels, [n]."""
    n = within.shape[0]
    change = 2 * (between - jnp.mean(between)) / (n - 1) - 2 * (within - jnp.mean(within)) / (n - 2)
    return (n - 1) / n * jnp.sum(change * change)


@functools.partial(jax.jit, static_argnames=("kernel", "chunk"))
def _two_samples(kernel: Callable, params: Params, x: Array, y: Array, biased: bool, chunk: int) -> Estimate:
    """Estimates E k(X,X') + E k(Y,Y') - 2 E k(X,Y), with its jackknife standard error."""
    xx, _ = _pair_means(kernel, params, x, x, chunk, True)
    yy, _ = _pair_means(kernel, params, y, y, chunk, True)
    xy, yx = _pair_means(kernel, params, x, y, chunk, False)
    error = jnp.sqrt(_jackknife(xx, xy) + _jackknife(yy, yx))
    own = jax.vmap(lambda a: kernel(params, a[None], a[None])[0, 0])
    xx, yy = (k + jnp.where(biased, (own(z) - k) / z.shape[0], 0) for k, z in ((xx, x), (yy, y)))
    # Subtract before averaging: the three terms nearly cancel, and separate float32 means would lose accuracy.
    return Estimate(jnp.mean(xx - xy) + jnp.mean(yy - yx), error)


def energy_distance(x: Points, y: Points, *, biased: bool = False, chunk: int = _CHUNK) -> Estimate:
    r"""Estimates the (squared) energy distance of two sets of samples, which is zero only for equal laws.

    .. math:: 2\, \mathbb{E}|X-Y| - \mathbb{E}|X-X'| - \mathbb{E}|Y-Y'|

    The default is the unbiased U-statistic, which may be slightly negative. ``biased`` gives the V-statistic, which also
    pairs each sample with itself and is never negative, up to rounding. Cost: (n² + m²)/2 + nm distances, in blocks; one
    minute on one CPU core for two sets of 100,000 in the plane.

    Args:
      x: samples ``[n, ...]``, n >= 3.
      y: samples ``[m, ...]`` of the same event size, m >= 3.
      biased: whether to compute the V-statistic instead of the U-statistic.
      chunk: the block size; pairs are visited in blocks of chunk by chunk.

    Returns:
      The distance, in the units of x, and the jackknife standard error of the U-statistic. For equal laws, the statistic is
      degenerate (of order 1/n, and not normal), and the jackknife error is conservative.

    Raises:
      ValueError: if there are too few samples, the dimensions differ, or a sample is not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> from jflow import metrics
      >>> x, y = jnp.zeros((4, 1), jnp.float32), jnp.ones((4, 1), jnp.float32)
      >>> float(metrics.energy_distance(x, y).value)
      2.0
    """
    x, y, _ = as_pair(x, y, least=3)
    return _two_samples(_minus_distance, None, x, y, biased, checks.integer("chunk", chunk, low=1))


def median_bandwidth(x: Points, y: Points, *, points: int = 1000) -> Array:
    """Returns the median distance ``|a - b|`` over all pairs of the pooled first ``points`` samples of each set.

    Raises:
      ValueError: as ``mmd``.

    Example:
      >>> import jax.numpy as jnp
      >>> from jflow import metrics
      >>> float(metrics.median_bandwidth(jnp.zeros((4, 1), jnp.float32), jnp.ones((4, 1), jnp.float32)))
      1.0
    """
    x, y, _ = as_pair(x, y, least=2)
    points = checks.integer("points", points, low=2)
    pooled = jnp.concatenate([x[:points], y[:points]])
    upper = np.triu_indices(pooled.shape[0], 1)
    return jnp.sqrt(jnp.median(_squared_distances(pooled, pooled)[upper]))


def mmd(
    x: Points,
    y: Points,
    *,
    bandwidths: Sequence[float] | Points | None = None,
    biased: bool = False,
    chunk: int = _CHUNK,
) -> Estimate:
    r"""Estimates the squared maximum mean discrepancy with a mixture of H Gaussian kernels (0805.2368).

    .. math::
        \mathbb{E}\,k(X,X') + \mathbb{E}\,k(Y,Y') - 2\, \mathbb{E}\,k(X,Y), \qquad
        k(a, b) = \frac{1}{H} \sum_h \exp\left( -\frac{|a - b|^2}{2 h^2} \right)

    Args:
      x: samples ``[n, ...]``, n >= 3.
      y: samples ``[m, ...]``, m >= 3.
      bandwidths: the values of h, in the units of x. None uses ``median_bandwidth`` times each of MEDIAN_MULTIPLES, which
        depends on the samples; give the bandwidths to compare several runs.
      biased: whether to compute the V-statistic, which is never negative up to rounding, instead of the unbiased U-statistic.
      chunk: the block size; pairs are visited in blocks of chunk by chunk.

    Returns:
      The squared discrepancy, dimensionless, in [0, 2] up to noise, and its jackknife standard error (conservative for equal
      laws).

    Raises:
      ValueError: if there are too few samples, the dimensions differ, a sample is not finite, or a bandwidth is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from jflow import metrics
      >>> x, y = jnp.zeros((4, 1), jnp.float32), jnp.ones((4, 1), jnp.float32)
      >>> round(float(metrics.mmd(x, y, bandwidths=[1.0]).value), 3)
      0.787
    """
    x, y, _ = as_pair(x, y, least=3)
    if bandwidths is None:
        widths = median_bandwidth(x, y) * jnp.asarray(MEDIAN_MULTIPLES, x.dtype)
    else:
        widths = jnp.asarray(bandwidths, x.dtype)
    values = checks.concrete(widths)
    positive = values is None or (np.isfinite(values) & (values > 0)).all()
    if widths.ndim != 1 or widths.size == 0 or not positive:
        raise ValueError(f"bandwidths: expected one or more positive numbers in a list, got {bandwidths!r}")
    return _two_samples(_gaussians, widths, x, y, biased, checks.integer("chunk", chunk, low=1))


def kernel_distance(x: Points, y: Points, *, chunk: int = _CHUNK) -> Estimate:
    r"""Estimates the kernel distance of features, the KID (1801.01401): the unbiased squared MMD with a cubic kernel.

    .. math:: k(a, b) = \left( \frac{a \cdot b}{d} + 1 \right)^3

    Args:
      x: features ``[n, d]``, n >= 3.
      y: features ``[m, d]``, m >= 3.
      chunk: the block size; pairs are visited in blocks of chunk by chunk.

    Returns:
      The squared discrepancy and its jackknife standard error.

    Raises:
      ValueError: if there are too few samples, the dimensions differ, or a feature is not finite.
    """
    x, y, centre = as_pair(x, y, least=3)
    return _two_samples(_cubic, centre, x, y, False, checks.integer("chunk", chunk, low=1))
