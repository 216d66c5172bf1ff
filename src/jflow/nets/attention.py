r"""Attention of one sample, behind one function, so that a kernel can take its place.

.. math:: \mathrm{attention}(q, k, v)_i = \sum_j \mathrm{softmax}_j\big( \text{scale}\, q_i \cdot k_j \big)\, v_j

Flow maps need forward-mode derivatives. cuDNN's attention and the Pallas kernels that come with jax refuse them, so plain
matmuls are used. The softmax is computed in float32, or in float64 if the input is; ``jax.nn.dot_product_attention`` would
round it to float32 there.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jflow import checks
from jflow.nets import embeddings
from jflow.types import Array


def attention(q: Array, k: Array, v: Array, *, scale: float | None = None, mask: Array | None = None) -> Array:
    """The attention of queries to keys and values, head by head.

    Args:
      q: ``[N, heads, size]``.
      k, v: ``[M, heads, size]``.
      scale: the factor of the products; by default 1/sqrt(size).
      mask: ``[heads or 1, N, M]`` of bools, True where a query may see a key; by default everywhere.

    Returns:
      ``[N, heads, size]`` in the dtype of q. It costs 4 N M heads size FLOPs in matmuls.

    Raises:
      ValueError: if the shapes do not match.
      TypeError: if an array is not floating-point, or the mask not of bools (a mask to be added to the products is not
        taken).

    Example:
      >>> import jax.numpy as jnp
      >>> from jflow import nets
      >>> q = jnp.ones((5, 2, 4), jnp.float32)
      >>> nets.attention(q, q, q).shape
      (5, 2, 4)
    """
    checks.floating("q, k, v", (q, k, v))
    checks.shape("q", q, (None, None, None))
    checks.shape("k", k, (None, *q.shape[1:]))
    checks.shape("v", v, k.shape)
    if mask is not None:
        if (dtype := jnp.asarray(mask).dtype) != jnp.bool_:
            raise TypeError(f"mask: expected bools, True where a query may see a key, got dtype {dtype}")
        heads, *pairs = np.shape(mask) if np.ndim(mask) == 3 else (0,)
        if heads not in (1, q.shape[1]) or pairs != [q.shape[0], k.shape[0]]:
            expected = f"({q.shape[1]} or 1, {q.shape[0]}, {k.shape[0]})"
            raise ValueError(f"mask: expected an array of shape {expected}, got {np.shape(mask)}")
    scale = q.shape[2] ** -0.5 if scale is None else scale
    wide = jnp.float64 if q.dtype == jnp.float64 else jnp.float32
    logits = jnp.asarray(scale, wide) * jnp.einsum("nhs,mhs->hnm", q, k, preferred_element_type=wide)
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(wide).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("hnm,mhs->nhs", weights, v).astype(q.dtype)


def rotate(h: Array, angles: Array) -> Array:
    r"""Rotary positions (2104.09864): rotates pairs of entries, so that q_i . k_j depends on the difference of the positions.

    .. math:: (h_m, h_{m + S/2}) \mapsto (h_m \cos a_m - h_{m + S/2} \sin a_m,\; h_m \sin a_m + h_{m + S/2} \cos a_m)

    Args:
      h: ``[N, heads, S]``.
      angles: ``[N, S/2]``, of ``angles_2d``.

    Returns:
      An array of the shape and dtype of h, computed in float32 at least.
    """
    wide = embeddings.at_least_float32("h", h)
    angles = jnp.asarray(angles, wide.dtype)[:, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = jnp.split(wide, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(h.dtype)


def angles_2d(rows: int, columns: int, size: int, *, before: int = 0, base: float = 100.0) -> np.ndarray:
    """The angles of a grid of tokens: half of the pairs of entries turn with the row, half with the column.

    Args:
      rows, columns: those of the grid.
      size: the size of a head, a multiple of 4.
      before: the number of tokens before those of the grid, which have no position and are not turned.
      base: the longest period over the shortest.

    Returns:
      ``[before + rows * columns, size/2]``, constants in float64.

    Raises:
      ValueError: if the size is not a multiple of 4.
    """
    if checks.integer("size", size, low=4) % 4:
        raise ValueError(f"size: expected a multiple of 4 for positions by row and column, got {size}")
    frequencies = base ** -(np.arange(size // 4) / (size // 4))
    row, column = np.divmod(np.arange(rows * columns), columns)
    found = np.concatenate([row[:, None] * frequencies, column[:, None] * frequencies], axis=1)
    return np.concatenate([np.zeros((before, size // 2)), found])
