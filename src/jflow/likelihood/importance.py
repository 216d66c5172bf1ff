r"""Self-normalised importance weights: expectations under a target from samples of another law with known density.

With samples x_1, ..., x_N::

    W_n = target(x_n) / sampler(x_n),     w_n = W_n / sum_m W_m,     Z = 1/N sum_n W_n

The sampler's density must be that of the sampler **that ran** (``push`` on the same grid, not the ODE's), and it must be a
density, not an estimate: log rho with a Hutchinson divergence is unbiased, so that by Jensen's inequality its exponential is
biased upward, E exp(log rho + noise) > rho, and likewise 1/rho and every weight made of it. With a normal noise of variance
v the factor is e^{v/2}. Use ``exact_divergence()`` for weights.

Where a learned map folds, several base points go to one x, and ``rho_0/|det|`` is the density of one branch alone, which is
less than the sampler's. Weights made of it count x once for each branch. The sign of the determinant corrects this::

    E_{rho_0}[ sign det grad X  target(X)/(rho_0/|det grad X|) f(X) ] = int det grad X target(X) f(X) dx_0 = deg X int target f

since the signs of the preimages of a point sum to the degree of the map. The degree is 1 if no point comes in from infinity
along a jump X_{s,t}: |X_{s,u}(x)| -> infinity with |x|, uniformly in u between s and t. A bounded v suffices, and so does one
with ``|(t-s) v| <= c |x| + C``, c < 1. For a learned map this is an assumption (x + softplus(-2x) has degree 0), and the base
must reach all preimages in practice. The check is log Z, which is 0 for a normalised target. Pass the sign from ``push``.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jflow import checks
from jflow.types import Array


class Weights(NamedTuple):
    """Normalised weights of N samples.

    Attributes:
      weights: w_n, ``[N]``, of sum 1; negative where the sign is.
      log_z: log Z in nats, a scalar: of the target's integral where it is not normalised, and 0 in the limit where it is.
      log_z_error: its standard error by the delta method, sqrt( sum w^2 - 1/N ), a scalar.
    """

    weights: Array
    log_z: Array
    log_z_error: Array


def normalised(log_target: Array, log_sampler: Array, sign: Array | None = None) -> Weights:
    """The weights of samples x_n from the log-densities in nats of the target, up to a constant, and of their sampler.

    Args:
      log_target: ``[N]``; minus infinity where the target vanishes.
      log_sampler: ``[N]``, finite.
      sign: ``[N]``, each 1, 0 or -1, of the determinants of a sampler that may fold; by default 1 for all. A sample of
        sign 0 counts as drawn and has no weight: pass singular samples so, with any finite densities.

    Raises:
      ValueError: for other shapes; and (concrete) for numbers that are not finite, but for a log_target of minus infinity,
        other signs, a target that vanishes at all samples, or weights whose sum is not positive. Traced, the weights are
        then NaN.
      TypeError: for arrays that are not floating-point.

    Example:
      >>> import jax.numpy as jnp
      >>> from jflow import likelihood
      >>> weights = likelihood.normalised(jnp.log(jnp.array([1.0, 3.0], jnp.float32)), jnp.zeros(2, jnp.float32))
      >>> [round(float(w), 3) for w in weights.weights]
      [0.25, 0.75]
    """
    checks.floating("log_target", log_target)
    checks.floating("log_sampler", log_sampler)
    checks.shape("log_target", log_target, (None,))
    checks.shape("log_sampler", log_sampler, np.shape(log_target))
    if not np.size(log_target):
        raise ValueError("log_target: expected at least one sample, got none")
    target, sampler = checks.concrete(log_target), checks.concrete(log_sampler)
    if target is not None and not (np.all(target < np.inf) and np.any(target > -np.inf)):
        raise ValueError(f"log_target: expected numbers or minus infinity, not everywhere, got {_short(target)}")
    if sampler is not None and not np.all(np.isfinite(sampler)):
        raise ValueError(f"log_sampler: expected finite numbers, got {_short(sampler)}")
    log_w = jnp.asarray(log_target) - jnp.asarray(log_sampler)
    if sign is None:
        sign = jnp.ones_like(log_w)
    checks.floating("sign", sign)
    checks.shape("sign", sign, np.shape(log_target))
    signs = checks.concrete(sign)
    if signs is not None and not np.all(np.isin(signs, (-1.0, 0.0, 1.0))):
        raise ValueError(f"sign: expected 1, 0 or -1, got {_short(signs)}")
    sign = jnp.asarray(sign).astype(log_w.dtype)
    log_sum, total = jax.nn.logsumexp(log_w, b=sign, return_sign=True)
    whole = checks.concrete(total)
    if whole is not None and not whole > 0:
        raise ValueError("sign: expected weights of a positive sum, got more that are negative")
    # Without a sign a ratio may be of any size, and beyond the largest number.
    ratios = jnp.exp(jnp.where(sign == 0, -jnp.inf, log_w - log_sum))
    weights = jnp.where(total > 0, sign * ratios, jnp.nan)
    count = log_w.shape[0]
    log_z = jnp.where(total > 0, log_sum - float(np.log(count)), jnp.nan)
    # Rounding may leave the variance of equal weights below zero.
    error = jnp.sqrt(jnp.maximum(jnp.sum(weights**2) - 1.0 / count, 0.0))
    return Weights(weights, log_z, error)


def effective_sample_size(weights: Array) -> Array:
    """(sum w)^2 / sum w^2 of ``[N]`` weights of any positive sum: the number of equal weights of the same value. A scalar.

    It lies between 1 and N; for weights with signs it may be less than 1.

    Raises:
      ValueError: for another shape, and (concrete) for weights that are not finite, or a sum that is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from jflow import likelihood
      >>> round(float(likelihood.effective_sample_size(jnp.full(4, 0.25, jnp.float32))), 3)
      4.0
    """
    weights = _weights(weights)
    return jnp.sum(weights) ** 2 / jnp.sum(weights**2)


def expectation(weights: Array, values: Array) -> tuple[Array, Array]:
    """sum w f / sum w with its standard error by the delta method, sqrt( sum w^2 (f - mean)^2 ) / sum w.

    The error includes neither the bias, of order 1/N, nor regions of the target without samples.

    Args:
      weights: ``[N]``, of any positive sum.
      values: f(x_n), ``[N, ...]``.

    Returns:
      The mean and its standard error, each of shape ``[...]``.

    Raises:
      ValueError: as ``effective_sample_size``, and for values of another length.
      TypeError: if they are not floating-point.
    """
    weights = _weights(weights)
    checks.floating("values", values)
    values = jnp.asarray(values)
    if values.shape[:1] != weights.shape:
        raise ValueError(f"values: expected a leading axis of {weights.shape[0]}, as weights, got shape {values.shape}")
    share = (weights / jnp.sum(weights)).astype(values.dtype).reshape(-1, *(1,) * (values.ndim - 1))
    mean = jnp.sum(share * values, axis=0)
    return mean, jnp.sqrt(jnp.sum((share * (values - mean[None])) ** 2, axis=0))


def _weights(weights: Array) -> Array:
    checks.floating("weights", weights)
    checks.shape("weights", weights, (None,))
    values = checks.concrete(weights)
    if values is not None and not (np.all(np.isfinite(values)) and 0 < np.sum(values) < np.inf):
        raise ValueError(f"weights: expected finite numbers of a positive sum, got {_short(values)}")
    return jnp.asarray(weights)


def _short(values: np.ndarray) -> str:
    return np.array2string(values, threshold=20)
