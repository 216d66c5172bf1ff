r"""Interpolants between base and data, and conversions between predictions.

.. math::
    I_t = \alpha_t x_0 + \beta_t x_1, \qquad b_t(x) = \mathbb{E}[\dot I_t \mid I_t = x], \qquad
    w_t = \alpha_t \dot\beta_t - \dot\alpha_t \beta_t

Every path provides alpha and beta, their divided differences alpha[s,t] = (alpha_t - alpha_s)/(t - s) in a closed form that
is finite and differentiable at s = t, the values at both ends, and the times at which the path is singular. Derivatives in
time come from automatic differentiation of alpha and beta.

For any base, the expected data and noise follow from the velocity b:

.. math::
    \mathbb{E}[x_1 \mid I_t = x] = \frac{\alpha b - \dot\alpha x}{w}, \qquad
    \mathbb{E}[x_0 \mid I_t = x] = \frac{\dot\beta x - \beta b}{w}.

For a base :math:`N(m, \mathrm{diag}(\sigma^2))` that is independent of the data, the score is, entry by entry,

.. math::
    \nabla \log \rho_t(x) = -\frac{\mathbb{E}[x_0 \mid I_t = x] - m}{\alpha \sigma^2}
    = \frac{\beta b - \dot\beta x + w m}{\alpha w \sigma^2}.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jflow import bases, checks, trees
from jflow.named import described
from jflow.types import Array, Event, Time

KINDS = ("velocity", "score", "noise", "data")


class Coefficients(NamedTuple):
    """alpha, beta, their derivatives in time, and w = alpha beta_dot - alpha_dot beta, at one time; scalars."""

    alpha: Array
    beta: Array
    alpha_dot: Array
    beta_dot: Array
    w: Array


@dataclasses.dataclass(frozen=True)
class Interpolant:
    """A path I_t = alpha_t x0 + beta_t x1 between base and data.

    Attributes:
      name: the key in ``INTERPOLANTS``.
      alpha, beta: the coefficients, functions of the time.
      alpha_dd, beta_dd: the divided differences alpha[s,t] and beta[s,t]; at s = t the derivatives.
      endpoints: (alpha_0, beta_0, alpha_1, beta_1).
      singular: the times in [0, 1] at which a coefficient has no finite derivative.
    """

    name: str
    alpha: Callable[[Time], Array]
    beta: Callable[[Time], Array]
    alpha_dd: Callable[[Time, Time], Array]
    beta_dd: Callable[[Time, Time], Array]
    endpoints: tuple[float, float, float, float] = (1.0, 0.0, 0.0, 1.0)
    singular: tuple[float, ...] = ()

    def alpha_dot(self, t: Time) -> Array:
        r"""Returns :math:`\dot\alpha_t`."""
        return self.coefficients(t).alpha_dot

    def beta_dot(self, t: Time) -> Array:
        r"""Returns :math:`\dot\beta_t`."""
        return self.coefficients(t).beta_dot

    def wronskian(self, t: Time) -> Array:
        r"""Returns :math:`w_t = \alpha_t \dot\beta_t - \dot\alpha_t \beta_t`."""
        return self.coefficients(t).w

    def coefficients(self, t: Time) -> Coefficients:
        """Returns all coefficients at one time."""
        checks.time("t", t)
        t = jnp.asarray(t)
        alpha, alpha_dot = jax.jvp(self.alpha, (t,), (jnp.ones_like(t),))
        beta, beta_dot = jax.jvp(self.beta, (t,), (jnp.ones_like(t),))
        return Coefficients(alpha, beta, alpha_dot, beta_dot, alpha * beta_dot - alpha_dot * beta)

    def interpolate(self, t: Time, x0: Event, x1: Event) -> Event:
        """Returns I_t = alpha_t x0 + beta_t x1, shaped like x0 and x1.

        Raises:
          ValueError: if x0 and x1 differ in structure or shape, or t is not a scalar in [0, 1].

        Example:
          >>> import jax.numpy as jnp
          >>> from jflow import interpolants
          >>> path = interpolants.linear()
          >>> print(path.interpolate(0.25, jnp.zeros(2, jnp.float32), jnp.full(2, 8.0, jnp.float32)))
          [2. 2.]
        """
        checks.time("t", t)
        checks.same_structure("x0", x0, "x1", x1)
        return trees.combine(self.alpha(t), x0, self.beta(t), x1)

    def derivative(self, t: Time, x0: Event, x1: Event) -> Event:
        r"""Returns :math:`\dot I_t = \dot\alpha_t x_0 + \dot\beta_t x_1`, shaped like x0 and x1.

        Raises:
          ValueError: if x0 and x1 differ in structure or shape, or t is not a scalar in [0, 1].

        Example:
          >>> import jax.numpy as jnp
          >>> from jflow import interpolants
          >>> path = interpolants.linear()
          >>> print(path.derivative(0.25, jnp.zeros(2, jnp.float32), jnp.full(2, 8.0, jnp.float32)))
          [8. 8.]
        """
        checks.same_structure("x0", x0, "x1", x1)
        c = self.coefficients(t)
        return trees.combine(c.alpha_dot, x0, c.beta_dot, x1)

    def mean_derivative(self, s: Time, t: Time, x0: Event, x1: Event) -> Event:
        r"""Returns the mean velocity of the pair's own path from s to t.

        .. math:: \frac{I_t - I_s}{t - s} = \alpha[s,t]\, x_0 + \beta[s,t]\, x_1

        At s = t it is :math:`\dot I_t`.

        Raises:
          ValueError: if x0 and x1 differ in structure or shape, or a time is not a scalar in [0, 1].
        """
        checks.time("s", s)
        checks.time("t", t)
        checks.same_structure("x0", x0, "x1", x1)
        return trees.combine(self.alpha_dd(s, t), x0, self.beta_dd(s, t), x1)


def check(interpolant: Interpolant, name: str = "interpolant") -> None:
    """Checks that an argument is an Interpolant, not its name or the function that makes it.

    Raises:
      TypeError: if the argument is not an Interpolant.
    """
    if not isinstance(interpolant, Interpolant):
        raise TypeError(f"{name}: expected an Interpolant, such as interpolants.linear(), got {described(interpolant)}")


def convert(
    interpolant: Interpolant,
    t: Time,
    x: Event,
    value: Event,
    source: str,
    target: str,
    *,
    base: bases.Base = bases.STANDARD_NORMAL,
    floor: float = 1e-6,
) -> Event:
    r"""Converts a prediction at (t, x) from one kind to another: velocity, score, noise or data.

    The value is first converted to the expected noise :math:`\hat x_0` and data :math:`\hat x_1`, for which
    :math:`\alpha \hat x_0 + \beta \hat x_1 = x`:

    - velocity b: :math:`\hat x_0 = (\dot\beta x - \beta b)/w` and :math:`\hat x_1 = (\alpha b - \dot\alpha x)/w`
    - score: :math:`\hat x_0 = m - \alpha \sigma^2\, \mathrm{score}` and :math:`\hat x_1 = (x - \alpha \hat x_0)/\beta`
    - noise: :math:`\hat x_1 = (x - \alpha \hat x_0)/\beta`
    - data: :math:`\hat x_0 = (x - \beta \hat x_1)/\alpha`

    The velocity and the score follow from these:

    .. math::
        b = \dot\alpha \hat x_0 + \dot\beta \hat x_1, \qquad \mathrm{score} = -\frac{\hat x_0 - m}{\alpha \sigma^2}.

    The formulas of the score require a base :math:`N(m, \mathrm{diag}(\sigma^2))` that is independent of the data. The others
    hold for any base and coupling.

    Args:
      interpolant: the path.
      t: the time, a scalar.
      x: the point, of any event shape.
      value: the prediction, shaped like x.
      source: the kind of ``value``.
      target: the kind of the result.
      base: the law of x0; used only in conversions to and from the score.
      floor: the smallest value of alpha and beta in a denominator. Where alpha = 0 (to a score, or from data) or beta = 0
        (from noise or a score), the result is finite but carries no information.

    Returns:
      The prediction of kind ``target``, shaped like x.

    Raises:
      ValueError: if a kind is unknown, value and x differ in structure or shape, or the score is converted with a base
        that is not a ``bases.Normal`` or does not fit x.
      TypeError: if ``interpolant`` is not an Interpolant, or ``base`` is not a base.

    Example:
      >>> import jax.numpy as jnp
      >>> from jflow import interpolants
      >>> x, velocity = jnp.ones(2, jnp.float32), jnp.full(2, 2.0, jnp.float32)
      >>> print(interpolants.convert(interpolants.linear(), jnp.float32(0.5), x, velocity, "velocity", "data"))
      [2. 2.]
    """
    check(interpolant)
    checks.choice("source", source, KINDS)
    checks.choice("target", target, KINDS)
    checks.same_structure("value", value, "x", x)
    bases.check(base)
    if source == target:
        return value
    c = interpolant.coefficients(t)
    alpha, beta = jnp.maximum(c.alpha, floor), jnp.maximum(c.beta, floor)
    if source == "velocity":
        noise = trees.combine(c.beta_dot / c.w, x, -c.beta / c.w, value)
        data = trees.combine(c.alpha / c.w, value, -c.alpha_dot / c.w, x)
    elif source == "data":
        noise, data = trees.combine(1 / alpha, x, -c.beta / alpha, value), value
    else:
        noise = _noise_of_score(base, c.alpha, value) if source == "score" else value
        data = trees.combine(1 / beta, x, -c.alpha / beta, noise)
    return {
        "velocity": lambda: trees.combine(c.alpha_dot, noise, c.beta_dot, data),
        "score": lambda: _score_of_noise(base, alpha, noise),
        "noise": lambda: noise,
        "data": lambda: data,
    }[target]()


def _noise_of_score(base: bases.Base, alpha: Array, score: Event) -> Event:
    """Returns E[x0 | I_t = x] = m - alpha std^2 score."""
    mean, std = bases.gaussian(base, "interpolants.convert from the score").moments(score)
    return jax.tree.map(lambda m, s, each: m - alpha.astype(each.dtype) * s * s * each, mean, std, score)


def _score_of_noise(base: bases.Base, alpha: Array, noise: Event) -> Event:
    """Returns the score, -(E[x0 | I_t = x] - m)/(alpha std^2)."""
    mean, std = bases.gaussian(base, "interpolants.convert to the score").moments(noise)
    return jax.tree.map(lambda m, s, each: (m - each) / (alpha.astype(each.dtype) * s * s), mean, std, noise)


def linear() -> Interpolant:
    r"""The linear path (2209.03003, 2210.02747).

    .. math:: \alpha_t = 1 - t, \qquad \beta_t = t

    Example:
      >>> from jflow import interpolants
      >>> path = interpolants.linear()
      >>> float(path.alpha(0.25)), float(path.beta(0.25))
      (0.75, 0.25)
    """
    return Interpolant(
        "linear",
        alpha=lambda t: 1.0 - jnp.asarray(t),
        beta=lambda t: jnp.asarray(t),
        alpha_dd=lambda s, t: -jnp.ones_like(_pair(s, t)),
        beta_dd=lambda s, t: jnp.ones_like(_pair(s, t)),
    )


def trigonometric() -> Interpolant:
    r"""The trigonometric path (2209.15571, 2410.11081).

    .. math:: \alpha_t = \cos(\pi t / 2), \qquad \beta_t = \sin(\pi t / 2)

    Example:
      >>> from jflow import interpolants
      >>> path = interpolants.trigonometric()
      >>> round(float(path.alpha(0.5)), 4), round(float(path.beta(0.5)), 4)
      (0.7071, 0.7071)
    """
    half = 0.5 * jnp.pi
    # cos b - cos a = -2 sin((a + b)/2) sin((b - a)/2), and jnp.sinc is smooth at zero to every order.
    return Interpolant(
        "trigonometric",
        # sin(pi (1 - t)/2) is exactly zero at t = 1; the cosine of a rounded pi/2 is not.
        alpha=lambda t: jnp.sin(half * (1.0 - jnp.asarray(t))),
        beta=lambda t: jnp.sin(half * jnp.asarray(t)),
        alpha_dd=lambda s, t: -half * jnp.sin(0.5 * half * _sum(s, t)) * jnp.sinc(0.25 * _gap(s, t)),
        beta_dd=lambda s, t: half * jnp.cos(0.5 * half * _sum(s, t)) * jnp.sinc(0.25 * _gap(s, t)),
    )


def cosine(offset: float = 0.008, epsilon: float = 1.0 / 4000.0) -> Interpolant:
    r"""The path of the cosine schedule with its offset (2102.09672).

    .. math::
        \beta = \frac{\cos\theta}{\cos\theta_0}, \qquad \alpha^2 = 1 - \beta^2, \qquad
        \theta = \frac{\pi}{2} \cdot \frac{\tau + \mathrm{offset}}{1 + \mathrm{offset}}

    :math:`\theta_0` is the value at :math:`\tau = 0`. The paper's time :math:`\tau` runs from 1 to ``epsilon`` while t runs
    from 0 to 1. If epsilon = 0, :math:`\dot\alpha` is infinite at t = 1, and the path declares t = 1 as singular. The default
    epsilon is the first of the paper's 4,000 steps.

    Raises:
      ValueError: if offset or epsilon is outside [0, 0.99].
      TypeError: if offset or epsilon is not a number.
    """
    checks.number("offset", offset, low=0.0, high=0.99)
    checks.number("epsilon", epsilon, low=0.0, high=0.99)
    rate = 0.5 * jnp.pi / (1.0 + offset)
    first = rate * offset
    scale = float(1.0 / jnp.cos(first))

    # beta is the sine of pi/2 - theta = rate (1 - tau), which is exactly zero at tau = 1.
    def complement(t: Time) -> Array:
        return rate * (1.0 - epsilon) * jnp.asarray(t)

    def beta(t: Time) -> Array:
        return scale * jnp.sin(complement(t))

    def alpha(t: Time) -> Array:
        # cos^2(theta_0) - cos^2(theta) = sin(theta - theta_0) sin(theta + theta_0) avoids cancellation near the data.
        tau = epsilon + (1.0 - epsilon) * (1.0 - jnp.asarray(t))
        return scale * jnp.sqrt(jnp.sin(rate * tau) * jnp.sin(rate * tau + 2.0 * first))

    def beta_dd(s: Time, t: Time) -> Array:
        slope = rate * (1.0 - epsilon)
        return scale * slope * jnp.cos(0.5 * slope * _sum(s, t)) * jnp.sinc(slope * _gap(s, t) / (2.0 * jnp.pi))

    return _variance_preserving("cosine", alpha, beta, beta_dd, singular=() if epsilon > 0 else (1.0,))


def variance_preserving(beta_min: float = 0.1, beta_max: float = 20.0, epsilon: float = 1e-3) -> Interpolant:
    r"""The variance-preserving path of the linear noise schedule (2011.13456).

    .. math::
        \beta = \exp\left( -\tfrac14 (\beta_{\max} - \beta_{\min})\, \tau^2 - \tfrac12 \beta_{\min}\, \tau \right), \qquad
        \alpha^2 = 1 - \beta^2

    The paper's time :math:`\tau` runs from 1 to ``epsilon`` while t runs from 0 to 1. If epsilon = 0, :math:`\dot\alpha` is
    infinite at t = 1, and the path declares t = 1 as singular. The default epsilon is the paper's cut-off for sampling.
    beta_0 is small but not zero.

    Raises:
      ValueError: unless 0 < beta_min <= beta_max, or if epsilon is outside [0, 0.99].
      TypeError: if an argument is not a number.
    """
    checks.number("beta_min", beta_min, low=0.0, open_low=True)
    checks.number("beta_max", beta_max, low=beta_min)
    checks.number("epsilon", epsilon, low=0.0, high=0.99)
    slope = 1.0 - epsilon

    def log_beta(t: Time) -> Array:
        tau = epsilon + slope * (1.0 - jnp.asarray(t))
        return -0.25 * (beta_max - beta_min) * tau * tau - 0.5 * beta_min * tau

    def log_beta_dd(s: Time, t: Time) -> Array:
        tau_sum = 2.0 * epsilon + slope * (2.0 - _sum(s, t))
        return slope * (0.25 * (beta_max - beta_min) * tau_sum + 0.5 * beta_min)

    def beta_dd(s: Time, t: Time) -> Array:
        difference = log_beta_dd(s, t)
        return jnp.exp(log_beta(s)) * _expm1_ratio(difference * _gap(s, t)) * difference

    def alpha(t: Time) -> Array:
        return jnp.sqrt(-jnp.expm1(2.0 * log_beta(t)))

    return _variance_preserving(
        "variance_preserving",
        alpha,
        lambda t: jnp.exp(log_beta(t)),
        beta_dd,
        singular=() if epsilon > 0 else (1.0,),
    )


def variance_exploding(sigma_min: float = 0.002, sigma_max: float = 80.0, rho: int = 7) -> Interpolant:
    r"""The variance-exploding path of EDM, x1 + sigma x0, rescaled by 1/sqrt(1 + sigma^2) (2206.00364).

    .. math::
        \alpha = \frac{\sigma}{\sqrt{1 + \sigma^2}}, \qquad \beta = \frac{1}{\sqrt{1 + \sigma^2}}, \qquad
        \sigma(t) = \left( (1 - t)\, \sigma_{\max}^{1/\rho} + t\, \sigma_{\min}^{1/\rho} \right)^\rho

    alpha/beta is sigma. The data should have about unit scale. Neither end is exact: beta_0 is about 1/sigma_max, and alpha_1
    about sigma_min.

    Raises:
      ValueError: unless 0 < sigma_min < sigma_max, or if rho is not positive.
      TypeError: if sigma_min or sigma_max is not a number, or rho is not an integer.
    """
    checks.number("sigma_min", sigma_min, low=0.0, open_low=True)
    checks.number("sigma_max", sigma_max, low=sigma_min, open_low=True)
    checks.integer("rho", rho, low=1)
    start, slope = sigma_max ** (1 / rho), sigma_min ** (1 / rho) - sigma_max ** (1 / rho)

    def root(t: Time) -> Array:
        # (1 - t) start + t end is exact at both ends.
        return start * (1.0 - jnp.asarray(t)) + (start + slope) * jnp.asarray(t)

    def sigma(t: Time) -> Array:
        return root(t) ** rho

    def norm(t: Time) -> Array:
        return jnp.sqrt(1.0 + sigma(t) ** 2)

    def beta_dd(s: Time, t: Time) -> Array:
        a, b = root(s), root(t)
        sigma_dd = slope * sum(a**i * b ** (rho - 1 - i) for i in range(rho))
        norm_dd = sigma_dd * (sigma(s) + sigma(t)) / (norm(s) + norm(t))
        return -norm_dd / (norm(s) * norm(t))

    return _variance_preserving(
        "variance_exploding", lambda t: sigma(t) / norm(t), lambda t: 1.0 / norm(t), beta_dd, singular=()
    )


def _variance_preserving(
    name: str,
    alpha: Callable[[Time], Array],
    beta: Callable[[Time], Array],
    beta_dd: Callable[[Time, Time], Array],
    singular: tuple[float, ...],
) -> Interpolant:
    """Makes a path with alpha^2 + beta^2 = 1, for which alpha[s,t] = -beta[s,t] (beta_s + beta_t)/(alpha_s + alpha_t)."""

    def alpha_dd(s: Time, t: Time) -> Array:
        return -beta_dd(s, t) * (beta(s) + beta(t)) / (alpha(s) + alpha(t))

    ends = (float(alpha(0.0)), float(beta(0.0)), float(alpha(1.0)), float(beta(1.0)))
    return Interpolant(name, alpha, beta, alpha_dd, beta_dd, endpoints=ends, singular=singular)


def _pair(s: Time, t: Time) -> Array:
    return jnp.asarray(s) + jnp.asarray(t)


_sum = _pair


def _gap(s: Time, t: Time) -> Array:
    return jnp.asarray(t) - jnp.asarray(s)


def _expm1_ratio(x: Array) -> Array:
    """Returns (e^x - 1)/x, smooth at zero. For abs(x) < 1/2 it uses 14 terms of the Taylor series, exact in float64."""
    near = jnp.abs(x) < 0.5
    series = jnp.ones_like(x)
    for k in range(14, 1, -1):
        series = 1.0 + series * x / k
    far = jnp.where(near, 1.0, x)
    return jnp.where(near, series, jnp.expm1(far) / far)


INTERPOLANTS: dict[str, Callable[[], Interpolant]] = {
    "linear": linear,
    "trigonometric": trigonometric,
    "cosine": cosine,
    "variance_preserving": variance_preserving,
    "variance_exploding": variance_exploding,
}
