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
    """An exact distribution on a path, for comparison with learned models.

    The methods work on one sample: ``t`` is a scalar in [0, 1] and ``x`` has the shape ``[d]``. They compute in the dtype of
    x or float32, whichever is wider, and cast ``params`` to it. Results that are points have the dtype of x.

    Attributes:
      name: the key in ``ORACLES``.
      interpolant: the path.
      flow_map: the exact FlowMap for both directions. Its params are MixtureParams.
      base: the law of x0, a ``bases.Normal`` whose mean and std are numbers or arrays ``[d]``.
    """

    name: str
    interpolant: Interpolant
    flow_map: FlowMap
    base: bases.Normal = bases.STANDARD_NORMAL

    def marginal(self, params: MixtureParams, t: Time) -> MixtureParams:
        """Returns the parameters of the law of I_t, which is also a mixture."""
        t, units = _time(t, params.means), _units(self.base, params)
        law = _marginal(self.interpolant, units, t)
        if units.std.ndim == 0:
            return params._replace(means=law.means, variances=units.std**2 * law.variances)
        root = units.std[None, :, None] * law.bases
        covs = jnp.einsum("kia,ka,kja->kij", root, law.variances, root, precision=EXACT)
        variances, rotations = jnp.linalg.eigh(covs)
        return MixtureParams(params.log_weights, law.means, rotations, variances)

    def log_density(self, params: MixtureParams, t: Time, x: Array) -> Array:
        """Returns log rho_t(x) in nats, a scalar."""
        _, law, x = _at(self.interpolant, self.base, params, t, x)
        return jax.nn.logsumexp(_log_joint(law, x))

    def score(self, params: MixtureParams, t: Time, x: Array) -> Array:
        """Returns the score grad log rho_t(x), ``[d]``."""
        _, law, wide = _at(self.interpolant, self.base, params, t, x)
        slope = -1.0 / law.variances
        return (_average(law, wide, jnp.zeros_like(law.means), slope) / law.std**2).astype(x.dtype)

    def denoiser(self, params: MixtureParams, t: Time, x: Array) -> Array:
        """Returns E[x1 | I_t = x], ``[d]``."""
        units, law, wide = _at(self.interpolant, self.base, params, t, x)
        beta = self.interpolant.beta(_time(t, wide))
        return _average(law, wide, units.means, beta * units.variances / law.variances).astype(x.dtype)

    def velocity(self, params: MixtureParams, t: Time, x: Array, cond: Cond = None, *, key: Key | None = None) -> Array:
        """Returns b_t(x), ``[d]``; ``cond`` and ``key`` are not used."""
        return _velocity(self.interpolant, self.base, params, t, x)

    def sample(self, params: MixtureParams, key: Key, n: int) -> Array:
        """Draws n data points, ``[n, d]``. To sample I_t, pass the parameters that ``marginal`` returns.

        Raises:
          ValueError: if n is less than 1.
          TypeError: if n is not an integer, or the key is not a PRNG key.
        """
        checks.key("key", key)
        checks.integer("n", n, low=1)
        component_key, normal_key = jax.random.split(key)
        k = jax.random.categorical(component_key, params.log_weights, shape=(n,))
        normal = jax.random.normal(normal_key, (n, params.means.shape[1]), params.means.dtype)
        spread = jnp.sqrt(params.variances)[k] * normal
        return params.means[k] + jnp.einsum("nij,nj->ni", params.bases[k], spread, precision=EXACT)


def gaussian(interpolant: Interpolant, *, base: bases.Base = bases.STANDARD_NORMAL) -> Oracle:
    r"""Makes the oracle of one Gaussian, with the flow map in closed form.

    .. math::
        X_{s,t}(x) = m(t) + S Q \frac{\sigma_t}{\sigma_s} Q^\top S^{-1} (x - m(s)), \qquad
        m(t) = \alpha_t m_0 + \beta_t m

    The mean velocity uses divided differences, for sigma of each eigenvalue :math:`\lambda`, and does not divide by t - s:

    .. math::
        v_{s,t}(x) &= \alpha[s,t]\, m_0 + \beta[s,t]\, m + S Q \frac{\sigma[s,t]}{\sigma_s} Q^\top S^{-1} (x - m(s)) \\
        \sigma[s,t] &= \frac{\alpha[s,t] (\alpha_s + \alpha_t) + \lambda\, \beta[s,t] (\beta_s + \beta_t)}{\sigma_s + \sigma_t}

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
    """Makes the oracle of a mixture in any dimension, with the flow map by a "dopri8" solve.

    Args:
      interpolant: the path.
      rtol: the relative tolerance of the mean velocity, per step; at least 1e-5 if x is narrower than float64.
      atol: the absolute tolerance, with the same lower limit.
      adjoint: as in ``solvers.solve``; by default the map has forward-mode derivatives only.
      base: a ``bases.Normal``.

    Raises:
      ValueError: as ``solvers.solve``, and if the base is not a ``bases.Normal``.
      TypeError, RuntimeError: as ``solvers.solve``.
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
    r"""Makes the oracle of a mixture in one dimension, with the flow map by matching quantiles.

    With the distribution function F_t of I_t, the map satisfies

    .. math:: F_t(X_{s,t}(x)) = F_s(x).

    Let :math:`a_k(u)` be the standardised value of the point :math:`x + (u-s)\, y` under component k at time u, and let
    brackets be divided differences. Then :math:`y = v_{s,t}(x)` solves

    .. math::
        0 &= \frac{F_t(x + (t-s)\, y) - F_s(x)}{t-s} = \sum_k w_k\, \Phi[a_k(s), a_k(t)]\, a_k[s,t] \\
        a_k[s,t] &= \frac{N_k[s,t]\, \sigma_s - N_k(s)\, \sigma[s,t]}{\sigma_s \sigma_t} \\
        N_k(s) &= x - m_k(s), \qquad N_k[s,t] = y - m_k[s,t],

    all in units of the base's standard deviation. The code does not divide by t - s. The sum increases with y, and it changes
    sign between the mean velocities of the single components. The positive weights :math:`w_k \Phi[\cdot, \cdot]` are
    normalised in logarithms, so that tails do not underflow. Bisection finds y to rounding. The derivatives, of any order and
    in both modes, are those of the implicit function that this equation defines.

    Args:
      interpolant: the path.
      base: a ``bases.Normal``.

    Raises:
      TypeError: if an argument is not an Interpolant or a base.
      ValueError: if the base is not a ``bases.Normal``; when called, if params or x has more than one dimension.
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
      std: the base's standard deviation, the diagonal of S, a scalar or ``[d]``.
      centre: the base's mean m_0, ``[1, d]``.
    """

    log_weights: Array
    means: Array
    bases: Array
    variances: Array
    std: Array
    centre: Array


def _units(base: bases.Normal, params: MixtureParams) -> _Units:
    """Returns the law of the data in units of the base. A scalar std does not change the eigenvectors."""
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
    """Returns the law of the data, the law at time t, and the point, all in one dtype."""
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
    """Returns Q_k' S^-1 (x - m_k), [K, d]."""
    return matvec(jnp.swapaxes(law.bases, 1, 2), (x[None] - law.means) / _row(law.std))


def _log_joint(law: _Units, x: Array) -> Array:
    """Returns log w_k + log N(x; m_k, C_k), [K]."""
    z = _whitened(law, x)
    terms = z * z / law.variances + jnp.log(law.variances) + 2.0 * (HALF_LOG_TAU + jnp.log(_row(law.std)))
    return law.log_weights - 0.5 * jnp.sum(terms, axis=1)


def _average(law: _Units, x: Array, constant: Array, slope: Array) -> Array:
    """Returns sum_k r_k(x) ( constant_k + S Q_k (slope_k * Q_k' S^-1 (x - m_k)) )."""
    share = jax.nn.softmax(_log_joint(law, x))
    return jnp.sum(share[:, None] * (constant + _row(law.std) * matvec(law.bases, slope * _whitened(law, x))), axis=0)


def _row(std: Array) -> Array:
    """Reshapes the standard deviations to multiply arrays ``[K, d]``."""
    return std if std.ndim == 0 else std[None]


def _velocity(interpolant: Interpolant, base: bases.Normal, params: MixtureParams, t: Time, x: Array) -> Array:
    units, law, wide = _at(interpolant, base, params, t, x)
    c = interpolant.coefficients(_time(t, wide))
    slope = (c.alpha * c.alpha_dot + c.beta * c.beta_dot * units.variances) / law.variances
    return _average(law, wide, c.alpha_dot * units.centre + c.beta_dot * units.means, slope).astype(jnp.result_type(x))


def _mean_dd(interpolant: Interpolant, units: _Units, s: Array, t: Array) -> Array:
    """Returns (m_k(t) - m_k(s))/(t - s), [K, d]."""
    return interpolant.alpha_dd(s, t) * units.centre + interpolant.beta_dd(s, t) * units.means


def _deviation_dd(interpolant: Interpolant, variances: Array, s: Array, t: Array) -> Array:
    """Returns sigma[s,t] for sigma^2 = alpha^2 + lambda beta^2, shaped like lambda."""
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
