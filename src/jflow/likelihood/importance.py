r"""Self-normalised importance weights: expectations under a target from samples of another law with known density.

For samples :math:`x_1, \dots, x_N` the weights are

.. math::

    W_n = \frac{\text{target}(x_n)}{\text{sampler}(x_n)}, \qquad w_n = \frac{W_n}{\sum_m W_m}, \qquad
    Z = \frac{1}{N} \sum_n W_n.

The sampler's density must be that of the sampler **that ran** (``push`` on the same grid, not that of the ODE). It must also be
exact, not an estimate. With a Hutchinson divergence log rho is unbiased, so by Jensen's inequality its exponential is biased
upward, E exp(log rho + noise) > rho; so are 1/rho and every weight computed from it. For normal noise of variance v the factor
is e^{v/2}. Use ``exact_divergence()`` for weights.

If a learned map folds, several base points are mapped to the same x, and ``rho_0/|det|`` is the density of one branch only,
which is less than the sampler's. Weights computed from it count x once for each branch. The sign of the determinant corrects
this:

.. math::

    \mathbb{E}_{x_0 \sim \rho_0}\left[ \mathrm{sign}(\det \nabla X)\,
    \frac{\text{target}(X)}{\rho_0 / |\det \nabla X|}\, f(X) \right]
    = \int \det \nabla X\, \text{target}(X)\, f(X)\, dx_0
    = \deg X \int \text{target}(x)\, f(x)\, dx,

because the signs of the preimages of a point sum to the degree of the map. The degree is 1 if no point comes in from infinity
along a jump :math:`X_{s,t}`, that is, if :math:`|X_{s,u}(x)| \to \infty` with :math:`|x|`, uniformly in u between s and t. A
bounded v suffices, and so does a v with ``|(t-s) v| <= c |x| + C`` and c < 1. For a learned map this is an assumption
(x + softplus(-2x) has degree 0), and in practice the base must reach all preimages. To check it, look at log Z, which is 0 for
a normalised target. Pass the sign from ``push``.
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
      weights: w_n, ``[N]``, with sum 1; negative for samples with a negative sign.
      log_z: log Z in nats, a scalar. It estimates the log of the target's integral, which is 0 for a normalised target.
      log_z_error: the standard error of log_z by the delta method, sqrt(sum w^2 - 1/N), a scalar.
    """

    weights: Array
    log_z: Array
    log_z_error: Array


def normalised(log_target: Array, log_sampler: Array, sign: Array | None = None) -> Weights:
    """Normalised weights of samples x_n, from the log-densities of the target (up to a constant) and of the sampler.

    Args:
      log_target: log-densities in nats, ``[N]``; minus infinity where the target vanishes.
      log_sampler: log-densities in nats, ``[N]``, finite.
      sign: ``[N]``, each 1, 0 or -1: the signs of the determinants of a sampler that may fold; by default all 1. A sample of
        sign 0 is counted in N but has weight 0. Use it for singular samples, with any finite densities.

    Raises:
      ValueError: if the shapes differ or there are no samples. For concrete values also if a log-density is not finite
        (minus infinity is allowed in ``log_target``), a sign is not 1, 0 or -1, the target vanishes at all samples, or the
        sum of the weights is not positive. For traced values a sum that is not positive gives NaN weights.
      TypeError: if an array is not floating-point.

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
    # Mask samples of sign 0 before the exponential, where their ratios might overflow.
    ratios = jnp.exp(jnp.where(sign == 0, -jnp.inf, log_w - log_sum))
    weights = jnp.where(total > 0, sign * ratios, jnp.nan)
    count = log_w.shape[0]
    log_z = jnp.where(total > 0, log_sum - float(np.log(count)), jnp.nan)
    # Rounding may make the variance of equal weights negative.
    error = jnp.sqrt(jnp.maximum(jnp.sum(weights**2) - 1.0 / count, 0.0))
    return Weights(weights, log_z, error)


def effective_sample_size(weights: Array) -> Array:
    """The effective sample size (sum w)^2 / sum w^2 of weights ``[N]`` with any positive sum, a scalar.

    For weights without signs it lies between 1 and N; for weights with signs it may be less than 1.

    Raises:
      ValueError: if the weights do not have shape ``[N]``, or concrete weights are not finite or have a sum that is not
        positive.
      TypeError: if the weights are not floating-point.

    Example:
      >>> import jax.numpy as jnp
      >>> from jflow import likelihood
      >>> round(float(likelihood.effective_sample_size(jnp.full(4, 0.25, jnp.float32))), 3)
      4.0
    """
    weights = _weights(weights)
    return jnp.sum(weights) ** 2 / jnp.sum(weights**2)


def expectation(weights: Array, values: Array) -> tuple[Array, Array]:
    r"""The weighted mean of f, and its standard error by the delta method.

    .. math::

        \bar f = \frac{\sum_n w_n f(x_n)}{\sum_n w_n}, \qquad
        \text{error} = \frac{\sqrt{\sum_n w_n^2\, (f(x_n) - \bar f)^2}}{\sum_n w_n}

    The error includes neither the bias, of order 1/N, nor regions of the target without samples.

    Args:
      weights: ``[N]``, with any positive sum.
      values: f(x_n), ``[N, ...]``.

    Returns:
      The mean and its standard error, each of shape ``[...]``.

    Raises:
      ValueError: as ``effective_sample_size``, and if ``values`` has another length.
      TypeError: if the weights or values are not floating-point.
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
