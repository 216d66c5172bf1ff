"""The oracles: density, score, velocity and flow map of Gaussians and Gaussian mixtures, at every time of a path."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jflow import bases, checks, interpolants, solvers
from jflow.interpolants import Interpolant
from jflow.oracles.mixtures import EXACT, HALF_LOG_TAU, MixtureParams, matvec
from jflow.oracles.quantiles import match_quantiles
from jflow.types import BOTH, Array, Cond, FlowMap, Key, Time


@dataclasses.dataclass(frozen=True)
class Oracle:
    """An exact distribution on a path, to compare learned models with.

    Methods work on one sample: ``t`` is a scalar in [0, 1] and ``x`` has the shape ``[d]``. They compute in the dtype of
    x, float32 at least, and return it; ``params`` are cast to it.

    Attributes:
      name: as in ``ORACLES``.
      interpolant: the path.
      flow_map: the exact FlowMap, whose params are MixtureParams; both directions.
      base: the law of x0, a ``bases.Normal`` with a number or ``[d]`` for its mean and its std.
    """

    name: str
    interpolant: Interpolant
    flow_map: FlowMap
    base: bases.Normal = bases.STANDARD_NORMAL

    def marginal(self, params: MixtureParams, t: Time) -> MixtureParams:
        """The law of I_t, itself a mixture."""
        t, units = _time(t, params.means), _units(self.base, params)
        law = _marginal(self.interpolant, units, t)
        if units.std.ndim == 0:
            return params._replace(means=law.means, variances=units.std**2 * law.variances)
        root = units.std[None, :, None] * law.bases
        covs = jnp.einsum("kia,ka,kja->kij", root, law.variances, root, precision=EXACT)
        variances, rotations = jnp.linalg.eigh(covs)
        return MixtureParams(params.log_weights, law.means, rotations, variances)

    def log_density(self, params: MixtureParams, t: Time, x: Array) -> Array:
        """log rho_t(x) in nats, a scalar."""
        _, law, x = _at(self.interpolant, self.base, params, t, x)
        return jax.nn.logsumexp(_log_joint(law, x))

    def score(self, params: MixtureParams, t: Time, x: Array) -> Array:
        """grad log rho_t(x), ``[d]``."""
        _, law, wide = _at(self.interpolant, self.base, params, t, x)
        slope = -1.0 / law.variances
        return (_average(law, wide, jnp.zeros_like(law.means), slope) / law.std**2).astype(x.dtype)

    def denoiser(self, params: MixtureParams, t: Time, x: Array) -> Array:
        """E[x1 | I_t = x], ``[d]``."""
        units, law, wide = _at(self.interpolant, self.base, params, t, x)
        beta = self.interpolant.beta(_time(t, wide))
        return _average(law, wide, units.means, beta * units.variances / law.variances).astype(x.dtype)

    def velocity(self, params: MixtureParams, t: Time, x: Array, cond: Cond = None, *, key: Key | None = None) -> Array:
        """b_t(x), ``[d]``; ``cond`` and ``key`` are not used."""
        return _velocity(self.interpolant, self.base, params, t, x)

    def sample(self, params: MixtureParams, key: Key, n: int) -> Array:
        """Data, ``[n, d]``; of the law at another time with ``marginal``'s params.

        Raises:
          ValueError, TypeError: if n is not a whole number of at least 1; TypeError for a key that is not a PRNG key.
        """
        checks.key("key", key)
        checks.integer("n", n, low=1)
        component_key, normal_key = jax.random.split(key)
        k = jax.random.categorical(component_key, params.log_weights, shape=(n,))
        normal = jax.random.normal(normal_key, (n, params.means.shape[1]), params.means.dtype)
        spread = jnp.sqrt(params.variances)[k] * normal
        return params.means[k] + jnp.einsum("nij,nj->ni", params.bases[k], spread, precision=EXACT)


def gaussian(interpolant: Interpolant, *, base: bases.Base = bases.STANDARD_NORMAL) -> Oracle:
    r"""One Gaussian, its map in closed form::

        X_{s,t}(x) = m(t) + S Q (sigma_t/sigma_s) Q' S^-1 (x - m(s)),    m(t) = alpha_t m_0 + beta_t m

    so that with the divided difference sigma[s,t] = (alpha[s,t](alpha_s + alpha_t) + lambda beta[s,t](beta_s + beta_t)) /
    (sigma_s + sigma_t) of each eigenvalue, v_{s,t}(x) = alpha[s,t] m_0 + beta[s,t] m + S Q (sigma[s,t]/sigma_s) Q' S^-1
    (x - m(s)): nothing divides by t - s.

    Args:
      interpolant: the path.
      base: a ``bases.Normal``.

    Raises:
      TypeError: if an argument is not an Interpolant or a base.
      ValueError: if the base is not Normal; when called, if params have more than one component.

    Example:
      >>> import jax.numpy as jnp
      >>> from jflow import interpolants, oracles
      >>> oracle = oracles.gaussian(interpolants.linear())
      >>> params = oracles.gaussian_params(jnp.array([3.0], jnp.float32), 4.0 * jnp.eye(1, dtype=jnp.float32))
      >>> print(oracle.flow_map.jump(params, 0.0, 1.0, jnp.ones(1, jnp.float32)).round(3))
      [5.]
    """
    interpolants.check(interpolant)
    base = bases.gaussian(base, "oracles.gaussian")

    def mean_velocity(
        params: MixtureParams, s: Time, t: Time, x: Array, cond: Cond = None, *, key: Key | None = None
    ) -> Array:
        checks.shape("params.log_weights", params.log_weights, (1,))
        units, law, wide = _at(interpolant, base, params, s, x)
        s, t = _time(s, wide), _time(t, wide)
        slope = _deviation_dd(interpolant, units.variances, s, t) / jnp.sqrt(law.variances)
        return _average(law, wide, _mean_dd(interpolant, units, s, t), slope).astype(x.dtype)

    return Oracle("gaussian", interpolant, FlowMap(mean_velocity, domain=BOTH), base)


def mixture(
    interpolant: Interpolant,
    rtol: float = 1e-10,
    atol: float = 1e-10,
    *,
    adjoint: str | None = None,
    base: bases.Base = bases.STANDARD_NORMAL,
) -> Oracle:
    """A mixture in any dimension, its map by a "dopri8" solve.

    Args:
      interpolant: the path.
      rtol: relative tolerance of the mean velocity, per step; where x is narrower than float64, at least 1e-5.
      atol: absolute tolerance, with the same lower limit.
      adjoint: as in ``solvers.solve``; by default the map has forward-mode derivatives only.
      base: a ``bases.Normal``.

    Raises:
      ValueError, TypeError, RuntimeError: as ``solvers.solve``; ValueError for another base.
    """
    interpolants.check(interpolant)
    base = bases.gaussian(base, "oracles.mixture")

    def velocity(params: MixtureParams, t: Time, x: Array, cond: Cond = None, *, key: Key | None = None) -> Array:
        return _velocity(interpolant, base, params, t, x)

    fine = solvers.solve(velocity, "dopri8", rtol=rtol, atol=atol, adjoint=adjoint)
    coarse = solvers.solve(velocity, "dopri8", rtol=max(rtol, 1e-5), atol=max(atol, 1e-5), adjoint=adjoint)

    def mean_velocity(
        params: MixtureParams, s: Time, t: Time, x: Array, cond: Cond = None, *, key: Key | None = None
    ) -> Array:
        flow = fine if jnp.result_type(x) == jnp.float64 else coarse
        return flow.mean_velocity(params, s, t, x, cond, key=key)

    return Oracle("mixture", interpolant, FlowMap(mean_velocity, domain=BOTH, velocity_override=velocity), base)


def quantile(interpolant: Interpolant, *, base: bases.Base = bases.STANDARD_NORMAL) -> Oracle:
    r"""A mixture in one dimension, its map by matching quantiles, F_t(X_{s,t}(x)) = F_s(x).

    With a_k(u) the argument of component k standardised at time u, along the chord x + (u-s) y, and brackets for divided
    differences, y = v_{s,t}(x) solves::

        0 = ( F_t(x + (t-s) y) - F_s(x) )/(t-s) = sum_k w_k Phi[a_k(s), a_k(t)] a_k[s,t],
        a_k[s,t] = (N[s,t] sigma_s - N_s sigma[s,t])/(sigma_s sigma_t),  N_s = x - m_k(s),  N[s,t] = y - m_k[s,t],

    all in units of the base's deviation, in which nothing divides by t - s. The sum grows with y and changes sign between the
    components' own mean velocities;
    the positive weights w_k Phi[.,.] are normalised in logarithms, so that tails do not underflow. Bisection finds y to
    rounding; its derivatives, of any order and in both modes, are those of this equation's implicit function.

    Args:
      interpolant: the path.
      base: a ``bases.Normal``.

    Raises:
      TypeError: for anything but an Interpolant and a base.
      ValueError: for another base; at a call, for params or x of more than one dimension.
    """
    interpolants.check(interpolant)
    base = bases.gaussian(base, "oracles.quantile")

    def mean_velocity(
        params: MixtureParams, s: Time, t: Time, x: Array, cond: Cond = None, *, key: Key | None = None
    ) -> Array:
        checks.shape("x", x, (1,))
        units, law, wide = _at(interpolant, base, params, s, x)
        s, t, std = _time(s, wide), _time(t, wide), jnp.reshape(units.std, ())
        sigma_s = jnp.sqrt(law.variances[:, 0])
        sigma_t = jnp.sqrt(_marginal(interpolant, units, t).variances[:, 0])
        sigma_dd = _deviation_dd(interpolant, units.variances, s, t)[:, 0]
        offset = (wide - law.means[:, 0]) / std
        offset_dd = _mean_dd(interpolant, units, s, t)[:, 0] / std
        inputs = (units.log_weights, t - s, offset, offset_dd, sigma_s, sigma_t, sigma_dd)
        return (std * match_quantiles(*inputs))[None].astype(x.dtype)

    def velocity(params: MixtureParams, t: Time, x: Array, cond: Cond = None, *, key: Key | None = None) -> Array:
        return _velocity(interpolant, base, params, t, x)

    return Oracle("quantile", interpolant, FlowMap(mean_velocity, domain=BOTH, velocity_override=velocity), base)


class _Units(NamedTuple):
    """A mixture in units of the base: component k is N(m_k, S Q_k diag(lambda_k) Q_k' S).

    Attributes:
      log_weights, means, bases, variances: as ``MixtureParams``, with Q_k and lambda_k in units of the base.
      std: s, a scalar or ``[d]``.
      centre: m_0, ``[1, d]``.
    """

    log_weights: Array
    means: Array
    bases: Array
    variances: Array
    std: Array
    centre: Array


def _units(base: bases.Normal, params: MixtureParams) -> _Units:
    """The data's law in units of the base; with one deviation for all entries the eigenvectors stay."""
    mean, std = base.moments(params.means[0])
    centre = jnp.broadcast_to(mean, params.means[0].shape)[None]
    if std.ndim == 0:
        return _Units(*params._replace(variances=params.variances / std**2), std, centre)
    root = params.bases / std[None, :, None]
    covs = jnp.einsum("kia,ka,kja->kij", root, params.variances, root, precision=EXACT)
    variances, rotations = jnp.linalg.eigh(covs)
    return _Units(params.log_weights, params.means, rotations, variances, std, centre)


def _at(
    interpolant: Interpolant, base: bases.Normal, params: MixtureParams, t: Time, x: Array
) -> tuple[_Units, _Units, Array]:
    """The data's law, the law at time t, and the point, in one dtype."""
    checks.scalar("t", t)
    checks.floating("x", x)
    checks.shape("x", x, params.means.shape[1:])
    x = jnp.asarray(x)
    wide = x if x.dtype == jnp.float64 else x.astype(jnp.float32)
    units = _units(base, _cast(params, wide.dtype))
    return units, _marginal(interpolant, units, _time(t, wide)), wide


def _marginal(interpolant: Interpolant, units: _Units, t: Array) -> _Units:
    alpha, beta = interpolant.alpha(t), interpolant.beta(t)
    return units._replace(
        means=alpha * units.centre + beta * units.means, variances=alpha**2 + beta**2 * units.variances
    )


def _whitened(law: _Units, x: Array) -> Array:
    """Q_k' S^-1 (x - m_k), [K, d]."""
    return matvec(jnp.swapaxes(law.bases, 1, 2), (x[None] - law.means) / _row(law.std))


def _log_joint(law: _Units, x: Array) -> Array:
    """log w_k + log N(x; m_k, C_k), [K]."""
    z = _whitened(law, x)
    terms = z * z / law.variances + jnp.log(law.variances) + 2.0 * (HALF_LOG_TAU + jnp.log(_row(law.std)))
    return law.log_weights - 0.5 * jnp.sum(terms, axis=1)


def _average(law: _Units, x: Array, constant: Array, slope: Array) -> Array:
    """sum_k r_k(x) ( constant_k + S Q_k (slope_k * Q_k' S^-1 (x - m_k)) )."""
    share = jax.nn.softmax(_log_joint(law, x))
    return jnp.sum(share[:, None] * (constant + _row(law.std) * matvec(law.bases, slope * _whitened(law, x))), axis=0)


def _row(std: Array) -> Array:
    """The deviations, to multiply ``[K, d]``."""
    return std if std.ndim == 0 else std[None]


def _velocity(interpolant: Interpolant, base: bases.Normal, params: MixtureParams, t: Time, x: Array) -> Array:
    units, law, wide = _at(interpolant, base, params, t, x)
    c = interpolant.coefficients(_time(t, wide))
    slope = (c.alpha * c.alpha_dot + c.beta * c.beta_dot * units.variances) / law.variances
    return _average(law, wide, c.alpha_dot * units.centre + c.beta_dot * units.means, slope).astype(jnp.result_type(x))


def _mean_dd(interpolant: Interpolant, units: _Units, s: Array, t: Array) -> Array:
    """(m_k(t) - m_k(s))/(t - s), [K, d]."""
    return interpolant.alpha_dd(s, t) * units.centre + interpolant.beta_dd(s, t) * units.means


def _deviation_dd(interpolant: Interpolant, variances: Array, s: Array, t: Array) -> Array:
    """sigma[s,t] for sigma^2 = alpha^2 + lambda beta^2, shaped like lambda."""
    alpha_s, alpha_t, beta_s, beta_t = (f(u) for f in (interpolant.alpha, interpolant.beta) for u in (s, t))
    squared = interpolant.alpha_dd(s, t) * (alpha_s + alpha_t) + variances * interpolant.beta_dd(s, t) * (
        beta_s + beta_t
    )
    return squared / (jnp.sqrt(alpha_s**2 + variances * beta_s**2) + jnp.sqrt(alpha_t**2 + variances * beta_t**2))


def _cast(params: MixtureParams, dtype: Any) -> MixtureParams:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(dtype), params)


def _time(t: Time, like: Array) -> Array:
    checks.scalar("t", t)
    return jnp.asarray(t).astype(like.dtype)


ORACLES: dict[str, Callable[..., Oracle]] = {"gaussian": gaussian, "mixture": mixture, "quantile": quantile}
