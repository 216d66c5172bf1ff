"""Nearest neighbours and the scores built on them: precision, recall, density and coverage of features.

Distances are computed in float64 on the default device, in blocks, so that memory does not grow with the product of the two
sets. Squared distances of a pair that differ by less than 1e-12 times the squared norms of its points, after the mean of the
reference is subtracted, count as equal.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jflow import checks
from jflow.metrics.samples import Points, both
from jflow.metrics.scores import FeatureRows, Score, feature_rows, origin
from jflow.types import Array

_BLOCK = 1024
# Squared distances that differ by less than this, relative to the points' squared norms, are equal.
TIE = 1e-12
# Candidates beyond the k nearest whose distances are computed again exactly, for near ties.
_SPARE = 4


class Neighbours(NamedTuple):
    """The nearest reference rows of each query.

    Attributes:
      indices: their rows in the reference, nearest first, ``[n, k]``, int64.
      distances: their Euclidean distances, ``[n, k]``, float64.
    """

    indices: np.ndarray
    distances: np.ndarray


class ManifoldScores(NamedTuple):
    """Four scores in [0, 1], but for the density, which may exceed 1.

    Attributes:
      precision: the share of samples inside the ball of a reference row, the ball that reaches its k-th nearest other one.
      recall: the share of reference rows inside the ball of a sample, with balls among the samples.
      density: the mean over the samples of the number of reference balls that hold it, divided by k.
      coverage: the share of reference rows whose ball holds a sample.
    """

    precision: Score
    recall: Score
    density: Score
    coverage: Score


def nearest(x: FeatureRows, reference: FeatureRows, k: int = 1, *, block: int = _BLOCK) -> Neighbours:
    """Finds the nearest reference rows of each row of x, such as the training images nearest to a sample.

    Distances are recomputed from differences, so that of a copy is exactly zero. Rows at equal distances are in the order of
    the reference.

    Args:
      x: Features, or rows ``[n, d]``.
      reference: Features, or rows ``[m, d]``, m >= k.
      k: the number of neighbours.
      block: distances are computed for blocks of block by block pairs.

    Raises:
      ValueError: if a set is empty or too small, the dimensions or the networks differ, or a row is not finite.
      TypeError: if rows are not floating-point, or a number is not whole.

    Example:
      >>> import numpy as np
      >>> from jflow import metrics
      >>> found = metrics.nearest(np.array([[0.0], [5.0]]), np.array([[4.0], [1.0], [0.0]]), k=2)
      >>> found.indices.tolist(), found.distances.tolist()
      ([[2, 1], [0, 1]], [[0.0, 1.0], [1.0, 4.0]])
    """
    origin(x, reference)
    a, b = _centred(*both(feature_rows(x), feature_rows(reference), least=1))
    return _nearest(a, b, checks.integer("k", k, low=1, high=len(b)), checks.integer("block", block, low=1), same=False)


def manifold_scores(
    x: FeatureRows, reference: FeatureRows, *, k: int = 5, closed: bool = True, block: int = _BLOCK
) -> ManifoldScores:
    r"""Precision and recall (1904.06991), density and coverage (2002.09797) of samples x.

    With :math:`B_k(y)` the ball around y of radius :math:`r_k(y)`, the distance of its k-th nearest neighbour in its own set,
    where y itself does not count but copies of y do:

    .. math::

        \text{precision} = \frac{1}{n} \sum_i 1\{x_i \in \cup_j B_k(y_j)\}, \quad
        \text{density} = \frac{1}{k n} \sum_{ij} 1\{x_i \in B_k(y_j)\}, \quad
        \text{coverage} = \frac{1}{m} \sum_j 1\{\exists i: x_i \in B_k(y_j)\},

    and recall is precision with the sets exchanged. Balls are closed, as in 1904.06991. The code of 2002.09797 has open ones
    (``closed=False``), which differ only at ties: of a set with itself the density is then 1 instead of (k + 1)/k, and rows
    with k copies, whose radius is 0, hold nothing.

    All four depend on n and m, so compare them only at equal numbers. The papers use k = 3 for precision and recall, and k = 5
    for density and coverage, with 10,000 rows or more in each set. The standard errors are those of the share or the mean
    over independent rows with the balls held fixed; they leave out the balls' own randomness. The bias is not known. Cost:
    n² + m² + nm distances, each once or twice.

    Args:
      x: the samples: Features, or rows ``[n, d]``, n > k.
      reference: Features, or rows ``[m, d]``, m > k.
      k: the neighbour that a ball reaches.
      closed: whether a ball holds its boundary.
      block: distances are computed for blocks of block by block pairs.

    Raises:
      ValueError: if a set has too few rows, the dimensions or the networks differ, or a row is not finite.
      TypeError: if rows are not floating-point, or a number is not whole.

    Example:
      >>> import numpy as np
      >>> from jflow import metrics
      >>> rows = np.arange(4.0)[:, None]
      >>> found = metrics.manifold_scores(rows + 0.5, rows, k=1)
      >>> found.precision.value, found.recall.value, found.density.value, found.coverage.value
      (1.0, 1.0, 1.75, 1.0)
    """
    known = origin(x, reference)
    k = checks.integer("k", k, low=1)
    block = checks.integer("block", block, low=1)
    a, b = _centred(*both(feature_rows(x), feature_rows(reference), least=k + 1))
    a_radii, b_radii = (_nearest(z, z, k, block, same=True).distances[:, -1] ** 2 for z in (a, b))
    sign = 1.0 if closed else -1.0
    in_reference, holds, in_samples = _inside(a, b, a_radii, b_radii, sign, block)
    shared = {"samples": len(a), "reference": len(b), **known, "options": {"k": k, "closed": bool(closed)}}

    def score(name: str, values: np.ndarray) -> Score:
        error = float(np.std(values) / np.sqrt(len(values)))
        return Score(name, float(np.mean(values)), error, None, **shared)

    return ManifoldScores(
        score("precision", in_reference > 0),
        score("recall", in_samples > 0),
        score("density", in_reference / k),
        score("coverage", holds > 0),
    )


def _centred(x: Points, reference: Points) -> tuple[np.ndarray, np.ndarray]:
    """Both sets in float64 minus the mean of the reference."""
    a, b = np.asarray(x, np.float64), np.asarray(reference, np.float64)
    # Round the mean to a row of the reference, from which rows on a grid have exact differences.
    centre = b[np.argmin(np.sum(np.square(b - np.mean(b, axis=0)), axis=1))]
    return a - centre, b - centre


def _blocks(x: np.ndarray, block: int) -> np.ndarray:
    """Rows in blocks [B, block, d], padded with zeros."""
    count = -(-len(x) // block)
    return np.pad(x, ((0, count * block - len(x)), (0, 0))).reshape(count, block, -1)


def _nearest(x: np.ndarray, reference: np.ndarray, k: int, block: int, *, same: bool) -> Neighbours:
    """The k nearest rows; with ``same`` (the reference is x) a row is not its own neighbour."""
    count, size = len(reference), min(block, max(len(x), len(reference)))
    wanted = min(k + _SPARE, count - same)
    with jax.enable_x64(True):
        parts = jnp.asarray(_blocks(reference, size))
        found = []
        for start, part in zip(range(0, len(x), size), _blocks(x, size), strict=True):
            indices, squares = _nearest_of_block(jnp.asarray(part), parts, count, start if same else -size - 1, wanted)
            found.append((np.asarray(indices), np.asarray(squares)))
    indices, squares = (np.concatenate(each)[: len(x)] for each in zip(*found, strict=True))
    # Sort by the exact distances, and then by index.
    order = np.lexsort((indices, squares), axis=1)[:, :k]
    indices, squares = (np.take_along_axis(each, order, axis=1) for each in (indices, squares))
    return Neighbours(indices.astype(np.int64), np.sqrt(squares))


@functools.partial(jax.jit, static_argnames="k")
def _nearest_of_block(x: Array, parts: Array, count: int, start: int, k: int) -> tuple[Array, Array]:
    """The rows of ``parts`` [B, b, d] nearest to each of x [a, d], and exact squared distances, [a, k].

    Row i of x is row start + i of the reference, and is left out, if that is not negative.
    """
    size = parts.shape[1]
    mine = start + jnp.arange(x.shape[0])

    def visit(best: tuple[Array, Array], part: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
        number, y = part
        index = number * size + jnp.arange(size)
        out = (index >= count)[None, :] | (index[None, :] == mine[:, None])
        squares = jnp.where(out, jnp.inf, _squares(x, y))
        squares = jnp.concatenate([best[0], squares], axis=1)
        indices = jnp.concatenate([best[1], jnp.broadcast_to(index[None, :], out.shape)], axis=1)
        least, places = jax.lax.top_k(-squares, k)
        return (-least, jnp.take_along_axis(indices, places, axis=1)), None

    zeros = jnp.full((x.shape[0], k), jnp.inf), jnp.zeros((x.shape[0], k), mine.dtype)
    (_, indices), _ = jax.lax.scan(visit, zeros, (jnp.arange(parts.shape[0]), parts))
    flat = parts.reshape(-1, parts.shape[2])

    def exact(place: Array) -> Array:
        return jnp.sum(jnp.square(x - flat[place]), axis=1)

    return indices, jax.lax.map(exact, indices.T).T


def _inside(
    x: np.ndarray, y: np.ndarray, x_radii: np.ndarray, y_radii: np.ndarray, sign: float, block: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each x the number of balls of y that hold it; for each y of the x in its ball, and of the balls of x that hold it."""
    size = min(block, max(len(x), len(y)))
    held, holds, inside = np.zeros(len(x)), np.zeros(len(y)), np.zeros(len(y))
    with jax.enable_x64(True):
        # A padded row lies in no ball and has an empty one.
        pairs = [
            (
                jnp.asarray(_blocks(z, size)),
                jnp.asarray(np.pad(r, (0, -len(z) % size), constant_values=-np.inf).reshape(-1, size)),
            )
            for z, r in ((x, x_radii), (y, y_radii))
        ]
        for i, (a, a_radii) in enumerate(zip(*pairs[0], strict=True)):
            part = slice(i * size, (i + 1) * size)
            found = _inside_of_block(a, a_radii, *pairs[1], sign)
            counts = [np.asarray(each).reshape(-1) for each in found]
            held[part] = counts[0][: len(held[part])]
            holds += counts[1][: len(y)]
            inside += counts[2][: len(y)]
    return held, holds, inside


@jax.jit
def _inside_of_block(a: Array, a_radii: Array, parts: Array, radii: Array, sign: Array) -> tuple[Array, Array, Array]:
    a_norms = jnp.sum(a * a, axis=1)
    real = jnp.isfinite(a_radii)[:, None]

    def visit(held: Array, part: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        b, b_radii = part
        slack = sign * TIE * (a_norms[:, None] + jnp.sum(b * b, axis=1)[None, :])
        squares = _squares(a, b) - slack
        both_real = real & jnp.isfinite(b_radii)[None, :]
        in_b = both_real & _within(squares, b_radii[None, :], sign)
        in_a = both_real & _within(squares, a_radii[:, None], sign)
        return held + jnp.sum(in_b, axis=1), (jnp.sum(in_b, axis=0), jnp.sum(in_a, axis=0))

    held, (holds, inside) = jax.lax.scan(visit, jnp.zeros(a.shape[0], jnp.arange(1).dtype), (parts, radii))
    return held, holds, inside


def _within(squares: Array, radii: Array, sign: Array) -> Array:
    return jnp.where(sign > 0, squares <= radii, squares < radii)


def _squares(x: Array, y: Array) -> Array:
    """Squared distances [n, m] by a matrix product."""
    cross = jnp.matmul(x, y.T, precision="highest")
    return jnp.maximum(jnp.sum(x * x, axis=1)[:, None] + jnp.sum(y * y, axis=1)[None, :] - 2 * cross, 0)
