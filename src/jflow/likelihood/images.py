r"""Images with L integer levels as continuous data, and log-densities in bits per dimension.

An image q with levels 0, ..., L-1 is dequantised to

.. math::

    x = \frac{2 (q + u)}{L} - 1 \in (-1, 1), \qquad u \text{ uniform on } (0, 1).

A density :math:`\rho(x)` gives q + u the density :math:`\rho(x)\, (2/L)^d`, whose integral over a unit cell is the probability
P(q). By Jensen's inequality (1511.01844) the mean over u of

.. math::

    \text{bits per dimension} = -\frac{\log \rho(x)}{d \log 2} + \log_2 \frac{L}{2}

is an upper bound on the model's code length -log2 P(q)/d. For a uniform density on [-1, 1)^d it is log2 L.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jflow import checks
from jflow.types import Array, Key


def dequantise(key: Key, pixels: Array, levels: int = 256, *, dtype: jax.typing.DTypeLike = float) -> Array:
    """Dequantises pixels q: x = 2 (q + u)/levels - 1, with u uniform on (0, 1) and drawn for each entry.

    ``quantise`` recovers the pixels exactly. To this end u is drawn from the midpoints of a lattice that the dtype can resolve,
    so that rounding never moves x into another pixel's cell.

    Args:
      key: the PRNG key of the noise.
      pixels: integers from 0 to levels - 1, of any shape.
      levels: L, at least 2: 256 for 8-bit images, 17 for scikit-learn's digits.
      dtype: the dtype of the result; by default jax's default float.

    Returns:
      An array shaped like pixels, with values in (-1, 1).

    Raises:
      TypeError: if the pixels are not integers, the dtype is not floating-point, or ``levels`` is not a whole number.
      ValueError: if concrete pixels are out of range, ``levels`` is below 2, or the dtype cannot resolve the levels.
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
    # The number of bits of u: those of the dtype minus those of q, minus two for the rounding of the map to [-1, 1) and back.
    bits = min(jnp.finfo(dtype).nmant - int(np.ceil(np.log2(levels))) - 2, 30)
    if bits < 1:
        raise ValueError(f"dtype: expected one that tells {levels} levels apart with noise between, got {dtype}")
    lattice = jax.random.randint(key, pixels.shape, 0, 2**bits).astype(dtype)
    u = (lattice + 0.5) * 2.0**-bits
    return (pixels.astype(dtype) + u) * (2.0 / levels) - 1.0


def quantise(x: Array, levels: int = 256) -> Array:
    """Quantises x to pixels, floor((x + 1) levels/2), in int32; the inverse of ``dequantise``.

    Values of x outside [-1, 1) are clipped to the lowest or highest level.

    Raises:
      TypeError: if x is not floating-point, or ``levels`` is not a whole number.
      ValueError: if ``levels`` is below 2.

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
    r"""Bits per dimension of uniformly dequantised data, from a log-density in nats.

    .. math::

        -\frac{\log \rho(x)}{d \log 2} + \log_2 \frac{L}{\text{width}}

    Args:
      log_density: log rho(x) in nats of the **whole event** x, the scaled and dequantised data; of any shape.
      dims: d, the number of entries of an event (pixels times channels).
      levels: L, the number of levels of the data before dequantisation.
      width: the length, in units of x, of the interval that the L levels fill. It is 2 for ``dequantise``, and 2/scale if x
        was then divided by a scale.

    Returns:
      Bits per dimension, shaped like log_density. Their mean over the dequantisation is an upper bound on the code length.

    Raises:
      ValueError: if ``dims`` is below 1, ``levels`` is below 2, or ``width`` is not positive.
      TypeError: if ``dims`` or ``levels`` is not a whole number, ``width`` is not a number, or the log-density is not
        floating-point.

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
