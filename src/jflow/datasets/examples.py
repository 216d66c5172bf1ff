"""Real and synthetic examples that need no download."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jflow import checks
from jflow.types import Array, Batch, Key

# Each coordinate of the checkerboard is uniform on [-1, 1], so its standard deviation is 1/sqrt(3).
CHECKERBOARD_STD = 3.0**-0.5


class Split(NamedTuple):
    """Training data and held-out data.

    Attributes:
      train: a Batch of the training rows.
      held_out: a Batch of the held-out rows.
    """

    train: Batch
    held_out: Batch


def digits(held_out: float = 0.2, seed: int = 0) -> Split:
    """The 1,797 handwritten digits of scikit-learn (UCI, 8x8 pixels of 17 levels), split by class.

    Args:
      held_out: the share of each class that is held out, rounded to whole images.
      seed: the seed of the split.

    Returns:
      A Split of Batch(x1 [n, 8, 8, 1] float32 = level/8 - 1 in [-1, 1], cond = labels [n] int32), numpy arrays in the
      original order. By default 1,438 images are for training and 359 are held out.

    Raises:
      ImportError: if scikit-learn is not installed.
      ValueError: if ``held_out`` is outside [0, 1], or the seed is negative.
      TypeError: if ``held_out`` is not a number, or the seed is not a whole number.
    """
    checks.number("held_out", held_out, low=0.0, high=1.0)
    checks.integer("seed", seed)
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "digits: the images come with scikit-learn, which is missing: pip install scikit-learn"
        ) from error
    pixels, target = (np.asarray(array) for array in load_digits(return_X_y=True))
    images = (pixels.reshape(-1, 8, 8, 1) / 8.0 - 1.0).astype(np.float32)
    labels = target.astype(np.int32)
    random = np.random.default_rng(seed)
    out = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        out[members[: round(held_out * len(members))]] = True
    return Split(*(Batch(x1=images[rows], cond=labels[rows]) for rows in (~out, out)))


def checkerboard(key: Key, n: int, dtype: jax.typing.DTypeLike = jnp.float32) -> Array:
    """Samples [n, 2] that are uniform on the cells (i, j) with i + j even of a 4x4 board on [-1, 1]^2 (2505.18825).

    The law has mean 0, standard deviation ``CHECKERBOARD_STD`` in each coordinate, covariance 1/16 and entropy log 2 nats.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jflow import datasets
      >>> x = datasets.checkerboard(jax.random.key(0), 8)
      >>> x.shape, bool((abs(x) <= 1.0).all())
      ((8, 2), True)
    """
    column_key, row_key, place_key = jax.random.split(key, 3)
    i = jax.random.randint(column_key, (n,), 0, 4)
    j = 2 * jax.random.randint(row_key, (n,), 0, 2) + i % 2
    # Keep the place below 1, since rounding could move a point over the edge of its cell.
    place = jnp.minimum(jax.random.uniform(place_key, (n, 2), dtype), jnp.asarray(1 - 2.0**-20, dtype))
    return 0.5 * (jnp.stack([i, j], axis=1).astype(dtype) + place) - 1.0


def checkerboard_log_density(x: Array) -> Array:
    """The log-density of one point x [2] in nats, a scalar: log 0.5 on the cells of the checkerboard, and -inf elsewhere.

    Raises:
      ValueError: if x does not have shape [2].
    """
    checks.shape("x", x, (2,))
    # The far edges of the board belong to the last cells.
    cell = jnp.where(x == 1.0, 3.0, jnp.floor(2.0 * (x + 1.0)))
    inside = jnp.all((cell >= 0.0) & (cell <= 3.0)) & (jnp.sum(cell) % 2.0 == 0.0)
    return jnp.where(inside, jnp.log(jnp.asarray(0.5, x.dtype)), jnp.asarray(-jnp.inf, x.dtype))
