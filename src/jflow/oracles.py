r"""Exact distributions: density, score, velocity and flow map of Gaussians and Gaussian mixtures, at every time.

Data is sum_k w_k N(m_k, C_k), C_k = Q_k diag(lambda_k) Q_k', the base N(0, I), drawn independently. Then I_t has the law
sum_k w_k N(beta m_k, Q_k diag(sigma_k^2) Q_k') with sigma_k^2 = alpha^2 + beta^2 lambda_k, and with z_k = Q_k'(x - beta m_k)
and the responsibilities r_k(t, x)

    score     - sum_k r_k Q_k (z_k / sigma_k^2)
    denoiser    sum_k r_k ( m_k + Q_k (beta lambda_k / sigma_k^2) z_k )
    velocity    sum_k r_k ( beta' m_k + Q_k ((alpha alpha' + beta beta' lambda_k) / sigma_k^2) z_k )

all finite at both ends, where a path is not declared singular. Three makers differ in their flow map: ``gaussian`` (closed
form), ``mixture`` (a Diffrax solve at a stated tolerance) and ``quantile`` (one dimension, by matching quantiles). None of
them uses the flow's identities, which tests may therefore ask of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular

from jflow import checks, solvers
from jflow.interpolants import Interpolant
from jflow.types import BOTH, Array, Cond, FlowMap, Key, Time

# Contractions decide how exact an oracle is; accelerators would round their inputs to half precision.
_EXACT = jax.lax.Precision.HIGHEST
_HALF_LOG_TAU = 0.5 * float(np.log(2.0 * np.pi))


class MixtureParams(NamedTuple):
    """A Gaussian mixture of K components in d dimensions, each covariance by its eigenvectors and eigenvalues.

    Attributes:
      log_weights: ``[K]``, log w_k.
      means: ``[K, d]``, m_k.
      bases: ``[K, d, d]``, orthogonal Q_k, eigenvectors in its columns.
      variances: ``[K, d]``, positive lambda_k.
    """

    log_weights: Array
    means: Array
    bases: Array
    variances: Array


def mixture_params(weights: Any, means: Any, covs: Any) -> MixtureParams:
    """The parameters of a mixture, checked, in jax's default float.

    Args:
      weights: ``[K]``, positive, of sum 1.
      means: ``[K, d]``.
      covs: ``[K, d, d]``, symmetric and positive definite, or ``[K, d]``, the diagonals.

    Raises:
      ValueError: for other shapes, and (of concrete values) for weights that are not positive or do not sum to 1,
        means that are not finite, covariances that are not symmetric or not positive definite.
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


def gaussian_params(mean: Any, cov: Any) -> MixtureParams:
    """The parameters of one Gaussian: mean ``[d]`` and covariance ``[d, d]``, or its diagonal ``[d]``.

    Raises:
      ValueError: as ``mixture_params``.
    """
    mean, cov = jnp.asarray(mean, float), jnp.asarray(cov, float)
    checks.shape("mean", mean, (None,))
    return mixture_params(jnp.ones(1), mean[None], cov[None])


@dataclasses.dataclass(frozen=True)
class Oracle:
    """An exact distribution on a path: what a learned model is held against.

    Methods work on one sample: ``t`` is a scalar in [0, 1] and ``x`` has the shape ``[d]``. They compute in the dtype of
    x, float32 at least, and return it; ``params`` are cast to it.

    Attributes:
      name: as in ``ORACLES``.
      interpolant: the path.
      flow_map: the exact FlowMap, whose params are MixtureParams; both directions.
    """

    name: str
    interpolant: Interpolant
    flow_map: FlowMap

    def marginal(self, params: MixtureParams, t: Time) -> MixtureParams:
        """The law of I_t, itself a mixture."""
        return _marginal(self.interpolant, params, t)

    def log_density(self, params: MixtureParams, t: Time, x: Array) -> Array:
        """log rho_t(x) in nats, a scalar."""
        law, x = _at(self.interpolant, params, t, x)
        return jax.nn.logsumexp(_log_joint(law, x))

    def score(self, params: MixtureParams, t: Time, x: Array) -> Array:
        """grad log rho_t(x), ``[d]``."""
        law, wide = _at(self.interpolant, params, t, x)
        return _average(law, wide, jnp.zeros_like(law.means), -1.0 / law.variances).astype(x.dtype)

    def denoiser(self, params: MixtureParams, t: Time, x: Array) -> Array:
        """E[x1 | I_t = x], ``[d]``."""
        law, wide = _at(self.interpolant, params, t, x)
        params, beta = _cast(params, wide.dtype), self.interpolant.beta(_time(t, wide))
        return _average(law, wide, params.means, beta * params.variances / law.variances).astype(x.dtype)

    def velocity(self, params: MixtureParams, t: Time, x: Array, cond: Cond = None, *, key: Key | None = None) -> Array:
        """b_t(x), ``[d]``; ``cond`` and ``key`` are not used."""
        return _velocity(self.interpolant, params, t, x)

    def sample(self, params: MixtureParams, key: Key, n: int) -> Array:
        """Data, ``[n, d]``; of the law at another time with ``marginal``'s params.

        Raises:
          ValueError, TypeError: when n is no whole number of at least 1.
        """
        checks.integer("n", n, low=1)
        component_key, normal_key = jax.random.split(key)
        k = jax.random.categorical(component_key, params.log_weights, shape=(n,))
        normal = jax.random.normal(normal_key, (n, params.means.shape[1]), params.means.dtype)
        spread = jnp.sqrt(params.variances)[k] * normal
        return params.means[k] + jnp.einsum("nij,nj->ni", params.bases[k], spread, precision=_EXACT)


def gaussian(interpolant: Interpolant) -> Oracle:
    r"""One Gaussian, its map in closed form:

        X_{s,t}(x) = m_t + S_t^(1/2) S_s^(-1/2) (x - m_s),    m_t = beta_t m,  S_t = alpha_t^2 I + beta_t^2 C

    so that with the divided difference sigma[s,t] = (alpha[s,t](alpha_s + alpha_t) + lambda beta[s,t](beta_s + beta_t)) /
    (sigma_s + sigma_t) of each eigenvalue, v_{s,t}(x) = beta[s,t] m + Q (sigma[s,t]/sigma_s) Q'(x - m_s): nothing divides
    by t - s.

    Raises:
      ValueError: at a call, for params of more than one component.
    """

    def mean_velocity(
        params: MixtureParams, s: Time, t: Time, x: Array, cond: Cond = None, *, key: Key | None = None
    ) -> Array:
        checks.shape("params.log_weights", params.log_weights, (1,))
        law, wide = _at(interpolant, params, s, x)
        s, t, params = _time(s, wide), _time(t, wide), _cast(params, wide.dtype)
        slope = _deviation_dd(interpolant, params.variances, s, t) / jnp.sqrt(law.variances)
        return _average(law, wide, interpolant.beta_dd(s, t) * params.means, slope).astype(x.dtype)

    return Oracle("gaussian", interpolant, FlowMap(mean_velocity, domain=BOTH))


def mixture(
    interpolant: Interpolant, rtol: float = 1e-10, atol: float = 1e-10, *, adjoint: str | None = None
) -> Oracle:
    """A mixture in any dimension, its map by a "dopri8" solve.

    Args:
      interpolant: the path.
      rtol: relative tolerance of the mean velocity, per step; where x is narrower than float64, at least 1e-5.
      atol: absolute tolerance, likewise.
      adjoint: as in ``solvers.solve``; by default the map has forward-mode derivatives only.

    Raises:
      ValueError, TypeError, RuntimeError: as ``solvers.solve``.
    """

    def velocity(params: MixtureParams, t: Time, x: Array, cond: Cond = None, *, key: Key | None = None) -> Array:
        return _velocity(interpolant, params, t, x)

    fine = solvers.solve(velocity, "dopri8", rtol=rtol, atol=atol, adjoint=adjoint)
    coarse = solvers.solve(velocity, "dopri8", rtol=max(rtol, 1e-5), atol=max(atol, 1e-5), adjoint=adjoint)

    def mean_velocity(
        params: MixtureParams, s: Time, t: Time, x: Array, cond: Cond = None, *, key: Key | None = None
    ) -> Array:
        flow = fine if jnp.result_type(x) == jnp.float64 else coarse
        return flow.mean_velocity(params, s, t, x, cond, key=key)

    return Oracle("mixture", interpolant, FlowMap(mean_velocity, domain=BOTH, velocity_override=velocity))


def quantile(interpolant: Interpolant) -> Oracle:
    r"""A mixture in one dimension, its map by matching quantiles, F_t(X_{s,t}(x)) = F_s(x).

    With a_k(u) the argument of component k standardised at time u, along the chord x + (u-s) y, and brackets for divided
    differences, y = v_{s,t}(x) solves

        0 = ( F_t(x + (t-s) y) - F_s(x) )/(t-s) = sum_k w_k Phi[a_k(s), a_k(t)] a_k[s,t],
        a_k[s,t] = (N[s,t] sigma_s - N_s sigma[s,t])/(sigma_s sigma_t),  N_s = x - beta_s m_k,  N[s,t] = y - beta[s,t] m_k

    in which nothing divides by t - s. The sum grows with y and changes sign between the components' own mean velocities;
    the positive weights w_k Phi[.,.] are normalised in logarithms, so that tails do not underflow. Bisection finds y to
    rounding; its derivatives, of any order and in both modes, are those of this equation's implicit function.

    Raises:
      ValueError: at a call, for params or x of more than one dimension.
    """

    def mean_velocity(
        params: MixtureParams, s: Time, t: Time, x: Array, cond: Cond = None, *, key: Key | None = None
    ) -> Array:
        checks.shape("x", x, (1,))
        law, wide = _at(interpolant, params, s, x)
        s, t, params = _time(s, wide), _time(t, wide), _cast(params, wide.dtype)
        sigma_s = jnp.sqrt(law.variances[:, 0])
        sigma_t = jnp.sqrt(_marginal(interpolant, params, t).variances[:, 0])
        sigma_dd = _deviation_dd(interpolant, params.variances, s, t)[:, 0]
        offset, offset_dd = wide - law.means[:, 0], interpolant.beta_dd(s, t) * params.means[:, 0]
        inputs = (params.log_weights, t - s, offset, offset_dd, sigma_s, sigma_t, sigma_dd)
        return _match_quantiles(*inputs)[None].astype(x.dtype)

    def velocity(params: MixtureParams, t: Time, x: Array, cond: Cond = None, *, key: Key | None = None) -> Array:
        return _velocity(interpolant, params, t, x)

    return Oracle("quantile", interpolant, FlowMap(mean_velocity, domain=BOTH, velocity_override=velocity))


def tilt(params: MixtureParams, a: Any, precision: Any | None = None) -> tuple[MixtureParams, Array]:
    r"""The mixture reweighted by e^{a.x - x'Px/2}, rho* = rho_1 e^{a.x - x'Px/2} / Z.

    Per component, with C = S S', S = Q lambda^(1/2), M = I + S'PS and g = S'(a - Pm):

        C* = S M^{-1} S',  m* = m + S M^{-1} g,  w* ~ w |M|^{-1/2} e^{a.m - m'Pm/2 + g'M^{-1}g/2}

    For P = 0: m* = m + C a and w* ~ w e^{a.m + a'Ca/2}.

    Args:
      params: the mixture.
      a: ``[d]``, the linear reward.
      precision: P, ``[d, d]``, symmetric; it need not be positive, but every M must be. By default 0.

    Returns:
      The tilted mixture, and log Z in nats, a scalar.

    Raises:
      ValueError: for other shapes, and (of concrete values) for P that is not symmetric, or so negative that the tilt
        has no finite integral; traced, log Z is then NaN.
    """
    dtype, (_, dim) = params.means.dtype, params.means.shape
    a = jnp.asarray(a, dtype)
    checks.shape("a", a, (dim,))
    root = params.bases * jnp.sqrt(params.variances)[:, None, :]
    if precision is None:
        g = _mv(jnp.swapaxes(root, 1, 2), jnp.broadcast_to(a, params.means.shape))
        log_z = _dot(params.means, a[None]) + 0.5 * _dot(g, g)
        shifted = params._replace(means=params.means + _mv(root, g))
    else:
        p = jnp.asarray(precision, dtype)
        checks.shape("precision", p, (dim, dim))
        _check("precision", p, _symmetric, "a symmetric matrix")
        pm = jnp.einsum("ij,kj->ki", p, params.means, precision=_EXACT)
        m = jnp.eye(dim, dtype=dtype)[None] + jnp.einsum("kia,ij,kjb->kab", root, p, root, precision=_EXACT)
        # M = U diag(mu) U': C* = R R' with R = S U mu^{-1/2}, whose singular vectors are the new basis.
        mu, u = jnp.linalg.eigh(m)
        _check("precision", mu, lambda v: np.all(v > 0), "I + S'PS positive definite, a tilt of finite integral")
        whitened = jnp.einsum("kia,kab->kib", root, u / jnp.sqrt(mu)[:, None, :], precision=_EXACT)
        g = _mv(jnp.swapaxes(whitened, 1, 2), a[None] - pm)
        log_z = _dot(params.means, a[None] - 0.5 * pm) + 0.5 * _dot(g, g) - 0.5 * jnp.sum(jnp.log(mu), axis=1)
        cov = jnp.einsum("kib,kjb->kij", whitened, whitened, precision=_EXACT)
        variances, bases = jnp.linalg.eigh(cov)
        shifted = MixtureParams(params.log_weights, params.means + _mv(whitened, g), bases, variances)
    log_joint = params.log_weights + log_z
    total = jax.nn.logsumexp(log_joint)
    return shifted._replace(log_weights=log_joint - total), total


def posterior(params: MixtureParams, matrix: Any, observation: Any, noise_cov: Any) -> tuple[MixtureParams, Array]:
    r"""The posterior of x given y = A x + N(0, R) under the mixture: the tilt by the log-likelihood, which is quadratic.

    Args:
      params: the prior.
      matrix: A, ``[m, d]``.
      observation: y, ``[m]``.
      noise_cov: R, ``[m, m]``, symmetric and positive definite.

    Returns:
      The posterior mixture, and the log evidence log p(y) in nats, a scalar.

    Raises:
      ValueError: for other shapes, and (of concrete values) for R that is not symmetric and positive definite.
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
    precision = jnp.einsum("mi,mj->ij", white, white, precision=_EXACT)
    tilted, log_z = tilt(params, jnp.einsum("mi,m->i", white, y, precision=_EXACT), precision)
    log_det = 2.0 * jnp.sum(jnp.log(jnp.diagonal(root)))
    return tilted, log_z - 0.5 * (jnp.sum(y * y) + log_det + 2.0 * size * _HALF_LOG_TAU)


def _at(interpolant: Interpolant, params: MixtureParams, t: Time, x: Array) -> tuple[MixtureParams, Array]:
    """The law at time t and the point, in one dtype."""
    checks.scalar("t", t)
    checks.floating("x", x)
    checks.shape("x", x, params.means.shape[1:])
    x = jnp.asarray(x)
    wide = x if x.dtype == jnp.float64 else x.astype(jnp.float32)
    return _marginal(interpolant, _cast(params, wide.dtype), _time(t, wide)), wide


def _marginal(interpolant: Interpolant, params: MixtureParams, t: Time) -> MixtureParams:
    checks.scalar("t", t)
    t = _time(t, params.means)
    alpha, beta = interpolant.alpha(t), interpolant.beta(t)
    return params._replace(means=beta * params.means, variances=alpha**2 + beta**2 * params.variances)


def _log_joint(law: MixtureParams, x: Array) -> Array:
    """log w_k + log N(x; m_k, C_k), [K]."""
    z = _mv(jnp.swapaxes(law.bases, 1, 2), x[None] - law.means)
    terms = z * z / law.variances + jnp.log(law.variances) + 2.0 * _HALF_LOG_TAU
    return law.log_weights - 0.5 * jnp.sum(terms, axis=1)


def _average(law: MixtureParams, x: Array, constant: Array, slope: Array) -> Array:
    """sum_k r_k(x) ( constant_k + Q_k (slope_k * Q_k'(x - m_k)) )."""
    share = jax.nn.softmax(_log_joint(law, x))
    z = _mv(jnp.swapaxes(law.bases, 1, 2), x[None] - law.means)
    return jnp.sum(share[:, None] * (constant + _mv(law.bases, slope * z)), axis=0)


def _velocity(interpolant: Interpolant, params: MixtureParams, t: Time, x: Array) -> Array:
    law, wide = _at(interpolant, params, t, x)
    params, c = _cast(params, wide.dtype), interpolant.coefficients(_time(t, wide))
    slope = (c.alpha * c.alpha_dot + c.beta * c.beta_dot * params.variances) / law.variances
    return _average(law, wide, c.beta_dot * params.means, slope).astype(jnp.result_type(x))


def _deviation_dd(interpolant: Interpolant, variances: Array, s: Array, t: Array) -> Array:
    """sigma[s,t] for sigma^2 = alpha^2 + lambda beta^2, shaped like lambda."""
    alpha_s, alpha_t, beta_s, beta_t = (f(u) for f in (interpolant.alpha, interpolant.beta) for u in (s, t))
    squared = interpolant.alpha_dd(s, t) * (alpha_s + alpha_t) + variances * interpolant.beta_dd(s, t) * (
        beta_s + beta_t
    )
    return squared / (jnp.sqrt(alpha_s**2 + variances * beta_s**2) + jnp.sqrt(alpha_t**2 + variances * beta_t**2))


def _match_quantiles(
    log_weights: Array,
    gap: Array,
    offset: Array,
    offset_dd: Array,
    sigma_s: Array,
    sigma_t: Array,
    sigma_dd: Array,
) -> Array:
    """The y of ``quantile``; all but the gap are [K]: log w, N_s, beta[s,t] m, sigma_s, sigma_t, sigma[s,t]."""
    own = jax.lax.stop_gradient(offset_dd + offset * sigma_dd / sigma_s)

    def balance(y: Array) -> Array:
        slope = ((y - offset_dd) * sigma_s - offset * sigma_dd) / (sigma_s * sigma_t)
        weight = jax.nn.softmax(log_weights + _log_normal_dd(offset / sigma_s, gap * slope))
        return jnp.sum(weight * slope)

    def bisect(function: Callable[[Array], Array], middle: Array) -> Array:
        def halve(_: Any, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
            middle = 0.5 * (bracket[0] + bracket[1])
            above = function(middle) > 0.0
            return jnp.where(above, bracket[0], middle), jnp.where(above, middle, bracket[1])

        steps = jnp.finfo(middle.dtype).nmant + 8
        low, high = jax.lax.fori_loop(0, steps, halve, (jnp.min(own), jnp.max(own)))
        return 0.5 * (low + high)

    def tangent(linear: Callable[[Array], Array], value: Array) -> Array:
        return value / linear(jnp.ones_like(value))

    return jax.lax.custom_root(balance, jnp.mean(own), bisect, tangent)


# Nodes and weights on [0, 1]: exact to rounding for the widths that _log_normal_dd gives it.
_NODES, _WEIGHTS = (np.polynomial.legendre.leggauss(16)[0] + 1) / 2, np.polynomial.legendre.leggauss(16)[1] / 2


def _log_normal_dd(a: Array, width: Array) -> Array:
    """log Phi[a, a + width], the normal distribution function's divided difference, [K]; smooth at width = 0."""
    b = a + width
    near = jnp.abs(width) * jnp.maximum(1.0, jnp.maximum(jnp.abs(a), jnp.abs(b))) < 4.0
    # Near: the mean density on the way from a to b, relative to the density at a.
    w = jnp.where(near, width, 0.0)
    start = jnp.where(near, a, 0.0)
    along = w[:, None] * jnp.asarray(_NODES, a.dtype)[None]
    mean = jnp.sum(jnp.asarray(_WEIGHTS, a.dtype)[None] * jnp.exp(-along * (start[:, None] + 0.5 * along)), axis=1)
    inside = jnp.log(mean) - 0.5 * start**2 - _HALF_LOG_TAU
    # Far: Phi(high) - Phi(low), turned over into the tail where the difference keeps its digits.
    turned = jnp.where(a + b > 0.0, -1.0, 1.0)
    low = jnp.where(near, -3.0, jnp.minimum(turned * a, turned * b))
    high = jnp.where(near, 0.0, jnp.maximum(turned * a, turned * b))
    bottom, top = _log_normal_cdf(jnp.stack([low, high]))
    outside = top + jnp.log(-jnp.expm1(bottom - top)) - jnp.log(high - low)
    return jnp.where(near, inside, outside)


@jax.custom_jvp
def _log_normal_cdf(z: Array) -> Array:
    """log Phi(z), to rounding in the lower tail, where jax's own is good to single precision only."""
    tail, far, series = _tail(z)
    body = jnp.log(0.5 * jax.lax.erfc(-jnp.where(tail, 0.0, z) * float(np.sqrt(0.5))))
    return jnp.where(tail, jnp.log(series) - jnp.log(-far) - 0.5 * far**2 - _HALF_LOG_TAU, body)


@_log_normal_cdf.defjvp
def _log_normal_cdf_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    """phi/Phi: a much smaller program than the derivative of erfc, and without its underflow."""
    (z,), (dz,) = primals, tangents
    value, (tail, far, series) = _log_normal_cdf(z), _tail(z)
    ratio = jnp.exp(-0.5 * jnp.where(tail, 0.0, z) ** 2 - _HALF_LOG_TAU - jnp.where(tail, 0.0, value))
    return value, jnp.where(tail, -far / series, ratio) * dz


def _tail(z: Array) -> tuple[Array, Array, Array]:
    """Whether z is in the lower tail, z there, and its series: Phi(z) = phi(z) series / (-z)."""
    edge = -7.0 if z.dtype == jnp.float32 else -16.0
    tail = z < edge
    far = jnp.where(tail, z, edge)
    inverse, series = 1.0 / far**2, jnp.ones_like(z)
    for k in range(10, 0, -1):
        series = 1.0 - (2 * k - 1) * inverse * series
    return tail, far, series


def _mv(matrices: Array, vectors: Array) -> Array:
    """[K, i, j] times [K, j]."""
    return jnp.einsum("kij,kj->ki", matrices, vectors, precision=_EXACT)


def _dot(a: Array, b: Array) -> Array:
    return jnp.sum(a * b, axis=1)


def _cast(params: MixtureParams, dtype: Any) -> MixtureParams:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(dtype), params)


def _time(t: Time, like: Array) -> Array:
    checks.scalar("t", t)
    return jnp.asarray(t).astype(like.dtype)


def _check(name: str, value: Array, test: Callable[[np.ndarray], Any], expected: str) -> None:
    """Refuses a concrete value that fails the test; a traced one passes."""
    concrete = checks.concrete(value)
    if concrete is not None and not test(concrete):
        raise ValueError(f"{name}: expected {expected}, got {np.array2string(concrete, threshold=20)}")


def _symmetric(matrices: np.ndarray) -> bool:
    """Symmetric up to rounding of the largest entry."""
    return bool(np.max(np.abs(matrices - np.swapaxes(matrices, -1, -2))) <= 1e-5 * np.max(np.abs(matrices)))


ORACLES: dict[str, Callable[[Interpolant], Oracle]] = {"gaussian": gaussian, "mixture": mixture, "quantile": quantile}
