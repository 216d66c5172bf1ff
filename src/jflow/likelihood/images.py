r"""Images of L integer levels as continuous data, and log-densities in bits per dimension.

The conversions::

    dequantised   x = 2 (q + u)/L - 1 in [-1, 1),   q in {0, ..., L-1},  u uniform on (0, 1)

A density rho of x is one of q + u, namely rho(x) (2/L)^d, whose integral over a pixel's unit cell is the probability of its
levels. By Jensen's inequality (1511.01844) the mean over u of::

    bits per dimension = -log rho(x) / (d log 2) + log2(L/2)

bounds the model's code length -log2 P(q) / d from above. A model that is uniform on [-1, 1)^d scores log2 L.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jflow import checks
from jflow.types import Array, Key


def dequantise(key: Key, pixels: Array, levels: int = 256, *, dtype: jax.typing.DTypeLike = float) -> Array:
    """x = 2 (q + u)/levels - 1 with u uniform on (0, 1), new for each entry; ``quantise`` gives the pixels back exactly.

    u lies on the middles of a lattice fine enough for the dtype to tell apart, so that no rounding leaves a pixel's cell.

    Args:
      key: of the noise.
      pixels: integers from 0 to levels - 1, of any shape.
      levels: L, 2 at least: 256 for 8-bit images, 17 for scikit-learn's digits.
      dtype: of the result; by default jax's default float.

    Returns:
      Shaped like pixels, within (-1, 1).

    Raises:
      TypeError: for pixels that are not integers, a dtype that is not floating-point, or levels that are not a whole number.
      ValueError: for concrete pixels out of range, fewer than two levels, or a dtype too narrow for them.
    """
    _check_levels(levels)
    pixels = jnp.asarray(pixels)
    if not jnp.issubdtype(pixels.dtype, jnp.integer):
        raise TypeError(f"pixels: expected integers, got dtype {pixels.dtype}")
    values = checks.concrete(pixels)
    if values is not None and values.size and not (values.min() >= 0 and values.max() < levels):
        raise ValueError(f"pixels: expected levels from 0 to {levels - 1}, got {values.min()} to {values.max()}")
    dtype = jnp.zeros((), dtype).dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype: expected a floating-point dtype, got {dtype}")
    # The bits of u: those of the dtype less those of q, and two so that the map to [-1, 1) and back cannot round it away.
    bits = min(jnp.finfo(dtype).nmant - int(np.ceil(np.log2(levels))) - 2, 30)
    if bits < 1:
        raise ValueError(f"dtype: expected one that tells {levels} levels apart with noise between, got {dtype}")
    lattice = jax.random.randint(key, pixels.shape, 0, 2**bits).astype(dtype)
    u = (lattice + 0.5) * 2.0**-bits
    return (pixels.astype(dtype) + u) * (2.0 / levels) - 1.0


def quantise(x: Array, levels: int = 256) -> Array:
    """floor( (x + 1) levels/2 ), int32: the pixels that ``dequantise`` made x of. Samples outside [-1, 1) go to the ends.

    Raises:
      TypeError: for x that is not floating-point, or levels that are not a whole number.
      ValueError: for fewer than two.

    Example:
      >>> import jax.numpy as jnp
      >>> from jflow import likelihood
      >>> likelihood.quantise(jnp.array([-1.0, 0.0, 0.99], jnp.float32)).tolist()
      [0, 128, 254]
    """
    _check_levels(levels)
    checks.floating("x", x)
    q = jnp.floor((jnp.asarray(x) + 1.0) * (0.5 * levels))
    return jnp.clip(q, 0, levels - 1).astype(jnp.int32)


def bits_per_dim(log_density: Array, dims: int, *, levels: int = 256, width: float = 2.0) -> Array:
    """-log_density/(dims log 2) + log2(levels/width), for uniformly dequantised data.

    Args:
      log_density: log rho(x) in nats of the **whole event**, of the scaled and dequantised data x; of any shape.
      dims: d, the number of entries of an event (pixels times channels).
      levels: L, of the data before dequantisation.
      width: the length, in units of x, of the interval that the L levels fill: 2 for ``dequantise``; after further division
        of x by a scale, 2/scale.

    Returns:
      Bits per dimension, shaped like log_density: an upper bound, in the mean over the dequantisation, of the code length.

    Raises:
      ValueError: for dims below 1, levels below 2, or a width that is not positive.
      TypeError: for numbers of the wrong type or a log-density that is not floating-point.

    Example:
      >>> import jax.numpy as jnp
      >>> from jflow import likelihood
      >>> float(likelihood.bits_per_dim(jnp.float32(0.0), 4))
      7.0
    """
    checks.integer("dims", dims, low=1)
    _check_levels(levels)
    checks.number("width", width, low=0.0, open_low=True)
    checks.floating("log_density", log_density)
    return -jnp.asarray(log_density) / (dims * float(np.log(2.0))) + float(np.log2(levels / width))


def _check_levels(levels: int) -> None:
    checks.integer("levels", levels, low=2)
