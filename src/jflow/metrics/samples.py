"""Checks and conversions of samples to arrays of points, and the type of an estimate."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jflow import checks
from jflow.types import Array

# The input type of samples: an array of jax, or of numpy on the host.
Points = Array | np.ndarray


class Estimate(NamedTuple):
    """An estimate from samples.

    Attributes:
      value: the estimate, a scalar.
      standard_error: its standard error, a scalar in the same units.
    """

    value: Array
    standard_error: Array


def _wide(dtype: np.dtype) -> np.dtype:
    """Returns the dtype if it is wider than float32, else float32. Strict promotion would reject a promotion of the two."""
    return dtype if dtype.itemsize > 4 else np.dtype("float32")


def as_points(name: str, samples: Points, *, least: int = 1, dimension: int | None = None) -> Array:
    """Checks samples ``[N, ...]``, and returns them as ``[N, d]`` in float32 or wider.

    Raises:
      TypeError: if samples are not floating-point.
      ValueError: if there are fewer than ``least`` samples, the dimension is not ``dimension``, or a value is not finite or
        does not fit the dtype to which jax converts it.
    """
    points = rows(name, samples, least=least, dimension=dimension)
    return jnp.asarray(points).astype(_wide(jax.dtypes.result_type(points)))


def rows(name: str, samples: Points, *, least: int, dimension: int | None = None, device: bool = True) -> Points:
    """Checks samples, and returns them as [N, d] in their own dtype: a numpy array, or a traced array.

    With ``device``, their values must also fit the dtype to which jax converts them (``checks.fits``).
    """
    if np.ndim(samples) < 1:
        raise ValueError(f"{name}: expected samples [N, ...], got shape {np.shape(samples)}")
    values = checks.concrete(samples)
    points = samples if values is None else values
    checks.floating(name, points)
    shape = points.shape
    if shape[0] < least:
        raise ValueError(f"{name}: expected at least {least} samples, got shape {shape}")
    points = points.reshape(shape[0], math.prod(shape[1:]))
    if points.shape[1] == 0 or (dimension is not None and points.shape[1] != dimension):
        wanted = "at least one" if dimension is None else str(dimension)
        raise ValueError(f"{name}: expected samples of {wanted} dimension(s), got shape {shape}")
    if values is not None:
        if not np.isfinite(points).all():
            bad = int(np.sum(~np.isfinite(points).all(axis=1)))
            raise ValueError(f"{name}: expected finite samples, got NaN or infinity in {bad} of {len(points)}")
        if device:
            checks.fits(name, points)
    return points


def both(x: Points, y: Points, *, least: int, device: bool = True) -> tuple[Points, Points]:
    """Applies ``rows`` to two sets, [n, d] and [m, d], and checks that their dimensions are equal."""
    x, y = rows("x", x, least=least, device=device), rows("y", y, least=least, device=device)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"y: expected samples of the dimension of x, {x.shape[1]}, got {y.shape[1]}")
    return x, y


class Pair(NamedTuple):
    """Two sets [n, d] and [m, d] of one dtype, after subtraction of ``centre`` [d], the mean of the first set."""

    x: Array
    y: Array
    centre: Array


def as_pair(x: Points, y: Points, *, least: int) -> Pair:
    """Checks two sets, and returns them as a Pair in float32 or wider."""
    x, y = both(x, y, least=least)
    dtype = max((_wide(z.dtype) for z in (x, y)), key=lambda dtype: dtype.itemsize)
    if isinstance(x, np.ndarray) and isinstance(y, np.ndarray):
        # Centre before float64 samples become float32 (without jax_enable_x64), because a large offset would cost digits.
        return Pair(*(jnp.asarray(z.astype(dtype)) for z in centred(x, y)))
    first, second = (jnp.asarray(z).astype(dtype) for z in (x, y))
    centre = jnp.mean(first, axis=0)
    return Pair(first - centre[None, :], second - centre[None, :], centre)


def centred(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns both sets minus the mean of the first, and this mean, in float64."""
    centre = np.asarray(np.mean(x, axis=0, dtype=np.float64))
    return x.astype(np.float64) - centre, y.astype(np.float64) - centre, centre
