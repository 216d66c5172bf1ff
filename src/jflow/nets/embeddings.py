r"""Features of times, of low-dimensional points, and of class labels.

The sinusoidal features of a scalar t at frequencies f_k, in cycles per unit of t, are

.. math::

    \phi(t) = [\sin(2 \pi f_1 t), \dots, \sin(2 \pi f_K t), \cos(2 \pi f_1 t), \dots, \cos(2 \pi f_K t)].

A flow map's network is trained through its derivatives in s and t, and the derivatives of the features are at most
2 pi f_k. The default frequencies are therefore moderate: a high frequency makes the tangent large, and with it the variance
of the target (sCM, 2410.11081, lowers its Fourier scale from 16 to 0.02). Features of x enlarge the spatial derivative in
the same way.

All features are computed in float32, or in float64 if the input is float64. In bfloat16, two times that differ by less than
1/256 could not be distinguished. The features are analytic in their input, so all derivatives are finite everywhere.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jflow import checks

Array = jax.Array
# The lowest frequency of sinusoidal features of times, in cycles per unit of time.
LOWEST = 0.125


def at_least_float32(name: str, value: Array | float) -> Array:
    """The value in float64 if it is float64, else in float32; whole numbers become the default float.

    Raises:
      TypeError: if the value, called ``name`` in the message, is not a real or whole number.
    """
    value = jnp.asarray(value)
    if jnp.issubdtype(value.dtype, jnp.integer):
        return value.astype(jnp.result_type(float))
    checks.floating(name, value)
    return value.astype(jnp.float64 if value.dtype == jnp.float64 else jnp.float32)


def times(s: Array | float, t: Array | float) -> tuple[Array, Array]:
    """Both times in float32, or in float64 if either of them is float64.

    Raises:
      ValueError: if a time has axes.
      TypeError: if a time is not a real or whole number.
    """
    checks.scalar("s", s)
    checks.scalar("t", t)
    s, t = at_least_float32("s", s), at_least_float32("t", t)
    dtype = jnp.float64 if jnp.float64 in (s.dtype, t.dtype) else jnp.float32
    return s.astype(dtype), t.astype(dtype)


def sinusoidal(t: Array | float, features: int, *, lowest: float = LOWEST, highest: float = 2.0) -> Array:
    r"""Sines and cosines of a scalar at frequencies in geometric progression.

    The frequencies are

    .. math::

        f_k = \text{lowest} \left(\frac{\text{highest}}{\text{lowest}}\right)^{(k-1)/(K-1)},
        \qquad k = 1, \dots, K = \text{features}/2,

    and f_1 = lowest if K = 1.

    Args:
      t: a scalar.
      features: the number of features, even.
      lowest: the lowest frequency, in cycles per unit of t. At 1/8 the sine is monotone over [-1, 1].
      highest: the highest frequency. The derivative of each feature is at most 2 pi times it.

    Returns:
      ``[features]``, first the sines, then the cosines, in float32 (float64 if t is).

    Raises:
      ValueError: if t is not a scalar, ``features`` is odd or a frequency is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from jflow import nets
      >>> print(nets.sinusoidal(jnp.float32(0.0), 4))
      [0. 0. 1. 1.]
    """
    checks.scalar("t", t)
    checks.number("lowest", lowest, low=0.0, open_low=True)
    checks.number("highest", highest, low=lowest)
    return _waves(at_least_float32("t", t), np.geomspace(lowest, highest, _half(features)))


def fourier(t: Array | float, features: int, *, scale: float = 0.5, seed: int = 0) -> Array:
    """Random Fourier features of a scalar: sines and cosines at fixed frequencies f_k drawn from N(0, scale^2).

    Args:
      t: a scalar.
      features: the number of features, even.
      scale: the standard deviation of the frequencies, in cycles per unit of t.
      seed: the seed of the frequencies, which are constants and not parameters.

    Returns:
      ``[features]``, first the sines, then the cosines, in float32 (float64 if t is).

    Raises:
      ValueError: if t is not a scalar, ``features`` is odd or the scale is not positive.
    """
    checks.scalar("t", t)
    return _waves(at_least_float32("t", t), _normal(seed, (_half(features),), scale))


def octaves(x: Array, count: int) -> Array:
    r"""The vector x, and sines and cosines of its coordinates at octaves.

    .. math::

        \sin(2^k \pi x_i), \quad \cos(2^k \pi x_i), \qquad k = 0, \dots, \text{count} - 1

    Args:
      x: ``[d]``. The longest period is 2, so data should lie in about [-1, 1].
      count: the number K of octaves; the largest spatial derivative is 2^{K-1} pi.

    Returns:
      ``[d (1 + 2 K)]``: x, then the sines of all octaves, then the cosines; float32 (float64 if x is).

    Raises:
      ValueError: if x is not a vector or ``count`` is not positive.
    """
    checks.shape("x", x, (None,))
    checks.integer("count", count, low=1)
    x = at_least_float32("x", x)
    frequencies = jnp.asarray(np.pi * 2.0 ** np.arange(count), x.dtype)
    phases = (frequencies[:, None] * x[None, :]).reshape(-1)
    return jnp.concatenate([x, jnp.sin(phases), jnp.cos(phases)])


def random_fourier(x: Array, features: int, *, scale: float = 0.5, seed: int = 0) -> Array:
    """The vector x, and sines and cosines of 2 pi F x for a fixed matrix F with entries drawn from N(0, scale^2).

    Args:
      x: ``[d]``.
      features: the number of sines and cosines, even.
      scale: the standard deviation of the frequencies, in cycles per unit of x.
      seed: the seed of the frequencies, which are constants and not parameters.

    Returns:
      ``[d + features]``: x, then the sines, then the cosines; float32 (float64 if x is).

    Raises:
      ValueError: if x is not a vector, ``features`` is odd or the scale is not positive.
    """
    checks.shape("x", x, (None,))
    x = at_least_float32("x", x)
    frequencies = jnp.asarray(_normal(seed, (_half(features), x.shape[0]), scale), x.dtype)
    # Use a sum, because GPUs would round a matmul to tf32.
    phases = 2 * np.pi * jnp.sum(frequencies * x[None, :], axis=1)
    return jnp.concatenate([x, jnp.sin(phases), jnp.cos(phases)])


def label(table: Array, index: Array | int, *, name: str = "label") -> Array:
    """The row of a table that belongs to a class label.

    Args:
      table: ``[n, features]``, a row for each label from 0 to n - 1.
      index: the label, a scalar of any integer dtype.
      name: the name of the label in error messages.

    Returns:
      ``[features]``, in the dtype of the table. A traced label outside 0 to n - 1 gives NaN, since it cannot raise an error.

    Raises:
      ValueError: if the label has axes, or is concrete and outside 0 to n - 1.
      TypeError: if the label is not an integer; a bool is not one.
    """
    checks.shape("table", table, (None, None))
    checks.scalar(name, index)
    checks.fits(name, index)
    value, rows = checks.concrete(index), table.shape[0]
    index = jnp.asarray(index)
    if not jnp.issubdtype(index.dtype, jnp.integer):
        raise TypeError(f"{name}: expected an integer label, got dtype {index.dtype}")
    if value is not None and not 0 <= int(value) < rows:
        raise ValueError(f"{name}: expected a label from 0 to {rows - 1} for a table of {rows} rows, got {value}")
    # In a narrow dtype the number of rows would overflow (256 becomes 0 in uint8), and take() counts -1 from the end.
    index = index.astype(jnp.int32) if index.dtype.itemsize < 4 else index
    inside = (index >= 0) & (index < rows)
    place = jnp.where(inside, index, rows).astype(jnp.int32)
    return jnp.take(table, place, axis=0, mode="fill", fill_value=jnp.nan)


def _waves(t: Array, frequencies: np.ndarray) -> Array:
    phases = jnp.asarray(2 * np.pi * frequencies, t.dtype) * t
    return jnp.concatenate([jnp.sin(phases), jnp.cos(phases)])


def _half(features: int) -> int:
    checks.integer("features", features, low=2)
    if features % 2:
        raise ValueError(f"features: expected an even number, a sine and a cosine each, got {features}")
    return features // 2


def _normal(seed: int, shape: tuple[int, ...], scale: float) -> np.ndarray:
    """Normal constants of a network. numpy's RandomState has a frozen stream; that of jax depends on its configuration."""
    checks.number("scale", scale, low=0.0, open_low=True)
    return scale * np.random.RandomState(checks.integer("seed", seed)).standard_normal(shape)
