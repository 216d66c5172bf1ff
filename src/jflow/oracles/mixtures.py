"""Gaussian mixtures: their parameters, tilts by a quadratic reward, and posteriors under linear observations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular
from numpy.typing import ArrayLike

from jflow import checks
from jflow.types import Array

# The accuracy of an oracle depends on its contractions; by default, accelerators round their inputs to lower precision.
EXACT = jax.lax.Precision.HIGHEST
HALF_LOG_TAU = 0.5 * float(np.log(2.0 * np.pi))


class MixtureParams(NamedTuple):
    """The parameters of a Gaussian mixture of K components in d dimensions.

    Attributes:
      log_weights: log w_k, ``[K]``.
      means: the means m_k, ``[K, d]``.
      bases: orthogonal matrices Q_k, ``[K, d, d]``, whose columns are the eigenvectors of the covariances.
      variances: the eigenvalues lambda_k of the covariances, positive, ``[K, d]``.
    """

    log_weights: Array
    means: Array
    bases: Array
    variances: Array


def mixture_params(weights: ArrayLike, means: ArrayLike, covs: ArrayLike) -> MixtureParams:
    """Checks the parameters of a mixture, and returns them in jax's default float.

    Args:
      weights: the weights, ``[K]``, positive numbers that sum to 1.
      means: the means, ``[K, d]``.
      covs: the covariances, ``[K, d, d]``, symmetric and positive definite, or their diagonals, ``[K, d]``.

    Raises:
      ValueError: if a shape is wrong, weights are not positive or do not sum to 1, means are not finite, or covariances
        are not symmetric and positive definite. The values of traced arrays are not checked.

    Example:
      >>> import jax.numpy as jnp
      >>> from jflow import oracles
      >>> means, covs = jnp.array([[-1.0], [1.0]], jnp.float32), jnp.full((2, 1, 1), 0.04, jnp.float32)
      >>> params = oracles.mixture_params(jnp.array([0.5, 0.5], jnp.float32), means, covs)
      >>> params.means.shape
      (2, 1)
    """
    weights, means, covs = (jnp.asarray(value, float) for value in (weights, means, covs))
    checks.shape("weights", weights, (None,))
    count = weights.shape[0]
    checks.shape("means", means, (count, None))
    dim = means.shape[1]
    if covs.ndim == 2:
        checks.shape("covs", covs, (count, dim))
        bases, variances = jnp.broadcast_to(jnp.eye(dim), (count, dim, dim)), covs
    else:
        checks.shape("covs", covs, (count, dim, dim))
        _check("covs", covs, _symmetric, "symmetric matrices")
        variances, bases = jnp.linalg.eigh(covs)
    _check("weights", weights, lambda w: np.all(w > 0) and abs(w.sum() - 1) < 1e-5, "positive numbers of sum 1")
    _check("means", means, lambda m: np.all(np.isfinite(m)), "finite numbers")
    _check("covs", variances, lambda v: np.all(v > 0), "positive eigenvalues")
    return MixtureParams(jnp.log(weights), means, bases, variances)


def gaussian_params(mean: ArrayLike, cov: ArrayLike) -> MixtureParams:
    """Returns the parameters of one Gaussian from its mean ``[d]`` and its covariance ``[d, d]`` or the diagonal ``[d]``.

    Raises:
      ValueError: as ``mixture_params``.
    """
    mean, cov = jnp.asarray(mean, float), jnp.asarray(cov, float)
    checks.shape("mean", mean, (None,))
    return mixture_params(jnp.ones(1), mean[None], cov[None])


def tilt(params: MixtureParams, a: ArrayLike, precision: ArrayLike | None = None) -> tuple[MixtureParams, Array]:
    r"""Tilts a mixture by the exponential of a quadratic reward.

    .. math:: \rho^*(x) = \frac{1}{Z}\, \rho_1(x)\, e^{a^\top x - x^\top P x / 2}

    Each component is updated with :math:`R = Q\, \mathrm{diag}(\lambda^{1/2})` (so that :math:`C = R R^\top`),
    :math:`M = I + R^\top P R` and :math:`g = R^\top (a - P m)`:

    .. math::
        C^* &= R M^{-1} R^\top, \qquad m^* = m + R M^{-1} g \\
        w^* &\propto w\, |M|^{-1/2} \exp\left( a^\top m - \tfrac12 m^\top P m + \tfrac12 g^\top M^{-1} g \right).

    For P = 0, this is :math:`m^* = m + C a` and :math:`w^* \propto w\, e^{a^\top m + a^\top C a / 2}`.

    Args:
      params: the mixture.
      a: the linear reward, ``[d]``.
      precision: P, symmetric, ``[d, d]``; by default 0. It need not be positive, but every M must be positive definite.

    Returns:
      The tilted mixture, and log Z in nats, a scalar.

    Raises:
      ValueError: if a shape is wrong, P is not symmetric, or an M is not positive definite (the tilt has no finite integral).
        The values of traced arrays are not checked; log Z is then NaN.
    """
    dtype, (_, dim) = params.means.dtype, params.means.shape
    a = jnp.asarray(a, dtype)
    checks.shape("a", a, (dim,))
    root = params.bases * jnp.sqrt(params.variances)[:, None, :]
    if precision is None:
        g = matvec(jnp.swapaxes(root, 1, 2), jnp.broadcast_to(a, params.means.shape))
        log_z = _dot(params.means, a[None]) + 0.5 * _dot(g, g)
        shifted = params._replace(means=params.means + matvec(root, g))
    else:
        p = jnp.asarray(precision, dtype)
        checks.shape("precision", p, (dim, dim))
        _check("precision", p, _symmetric, "a symmetric matrix")
        pm = jnp.einsum("ij,kj->ki", p, params.means, precision=EXACT)
        m = jnp.eye(dim, dtype=dtype)[None] + jnp.einsum("kia,ij,kjb->kab", root, p, root, precision=EXACT)
        # With M = U diag(mu) U', C* = W W' for W = R U mu^{-1/2}, here ``whitened``.
        mu, u = jnp.linalg.eigh(m)
        _check("precision", mu, lambda v: np.all(v > 0), "I + S'PS positive definite, a tilt of finite integral")
        whitened = jnp.einsum("kia,kab->kib", root, u / jnp.sqrt(mu)[:, None, :], precision=EXACT)
        g = matvec(jnp.swapaxes(whitened, 1, 2), a[None] - pm)
        log_z = _dot(params.means, a[None] - 0.5 * pm) + 0.5 * _dot(g, g) - 0.5 * jnp.sum(jnp.log(mu), axis=1)
        cov = jnp.einsum("kib,kjb->kij", whitened, whitened, precision=EXACT)
        variances, bases = jnp.linalg.eigh(cov)
        shifted = MixtureParams(params.log_weights, params.means + matvec(whitened, g), bases, variances)
    log_joint = params.log_weights + log_z
    total = jax.nn.logsumexp(log_joint)
    return shifted._replace(log_weights=log_joint - total), total


def posterior(
    params: MixtureParams, matrix: ArrayLike, observation: ArrayLike, noise_cov: ArrayLike
) -> tuple[MixtureParams, Array]:
    r"""Computes the posterior of x under a mixture prior, given a linear observation with Gaussian noise.

    .. math:: y = A x + \epsilon, \qquad \epsilon \sim N(0, R)

    It is the tilt of the prior by the log-likelihood, which is quadratic.

    Args:
      params: the prior.
      matrix: A, ``[m, d]``.
      observation: y, ``[m]``.
      noise_cov: R, symmetric and positive definite, ``[m, m]``.

    Returns:
      The posterior mixture, and the log evidence log p(y) in nats, a scalar.

    Raises:
      ValueError: if a shape is wrong, or R is not symmetric and positive definite. The values of traced arrays are not
        checked.
    """
    dtype, (_, dim) = params.means.dtype, params.means.shape
    matrix, y, noise = (jnp.asarray(value, dtype) for value in (matrix, observation, noise_cov))
    checks.shape("matrix", matrix, (None, dim))
    size = matrix.shape[0]
    checks.shape("observation", y, (size,))
    checks.shape("noise_cov", noise, (size, size))
    _check("noise_cov", noise, _symmetric, "a symmetric matrix")
    root = jnp.linalg.cholesky(noise)
    _check("noise_cov", root, lambda r: np.all(np.isfinite(r)), "a positive definite matrix")
    white = solve_triangular(root, jnp.concatenate([matrix, y[:, None]], axis=1), lower=True)
    white, y = white[:, :-1], white[:, -1]
    precision = jnp.einsum("mi,mj->ij", white, white, precision=EXACT)
    tilted, log_z = tilt(params, jnp.einsum("mi,m->i", white, y, precision=EXACT), precision)
    log_det = 2.0 * jnp.sum(jnp.log(jnp.diagonal(root)))
    return tilted, log_z - 0.5 * (jnp.sum(y * y) + log_det + 2.0 * size * HALF_LOG_TAU)


def matvec(matrices: Array, vectors: Array) -> Array:
    """Multiplies matrices [K, i, j] by vectors [K, j]."""
    return jnp.einsum("kij,kj->ki", matrices, vectors, precision=EXACT)


def _dot(a: Array, b: Array) -> Array:
    return jnp.sum(a * b, axis=1)


def _check(name: str, value: Array, test: Callable[[np.ndarray], Any], expected: str) -> None:
    """Raises ValueError if a concrete value fails the test. Traced values are not checked."""
    concrete = checks.concrete(value)
    if concrete is not None and not test(concrete):
        raise ValueError(f"{name}: expected {expected}, got {np.array2string(concrete, threshold=20)}")


def _symmetric(matrices: np.ndarray) -> bool:
    """Returns whether the matrices are symmetric, up to rounding of the largest entry."""
    return bool(np.max(np.abs(matrices - np.swapaxes(matrices, -1, -2))) <= 1e-5 * np.max(np.abs(matrices)))
