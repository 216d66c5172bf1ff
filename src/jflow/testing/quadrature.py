r"""Expected gradients of a method near a known flow map, as finite sums.

The flow is that of dx/dt = kappa'(t) sqrt(1 + (x-mu)^2), in one dimension:

.. math::

    X_{s,t}(x) = \mu + (x - \mu) \cosh K + \sqrt{1 + (x - \mu)^2} \, \sinh K, \qquad K = \kappa(t) - \kappa(s)

It is nonlinear, depends on time, and has no symmetry. At the time s of a pair (s, t), I_s takes a few values. At each of them
I_s' takes two values, of unequal probability, whose mean is the velocity. x0 and x1 follow from I_s and I_s'. The expectation
over pairs is a finite sum, so a gradient that should vanish is zero up to rounding. The mean velocity of the student is

.. math::

    v_{s,t}(x) = v^{\text{exact}}_{s,t}(x) + c(s,t)\, \Theta \cdot \phi(s, t, x)

with fixed random features phi, so the student is a flow only for Theta = 0. In the v-form c is 1; in the x-form it is the
factor of the network in the parameterization.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jflow import objectives, parameterizations, types
from jflow.interpolants import Interpolant
from jflow.types import Array, Cond, Event, Key, Params, Time

FEATURES = 4
# The parameters of a student that is not a flow.
OFF = 0.3 * np.array([1.0, -1.0, 0.5, 0.8])
NODES = 60
# Terms of the series of sinh K / K and (cosh K - 1)/K, enough for |K| < 2.
TERMS = 12
# Values of I_s and their probabilities; the probability of the upper value of I_s'.
POINTS = np.array([-1.4, -0.8, -0.3, 0.1, 0.6, 1.1, 1.9])
SHARES = np.array([0.08, 0.17, 0.13, 0.22, 0.09, 0.24, 0.07])
UPPER = 0.3


class Setting(NamedTuple):
    """Weighted pairs (x0, x1) with their exact map.

    Attributes:
      exact: the exact map.
      truth: its parameters.
      batch: ``s -> Batch``: the pairs for an expectation at time s.
      weights: the probabilities of the pairs, which sum to 1.
    """

    exact: types.FlowMap
    truth: Any
    batch: Callable[[Any], types.Batch]
    weights: np.ndarray


def noisy_pairs(interpolant: Interpolant, rate: float = 1.0) -> Setting:
    """Pairs whose mean velocity at I_s is that of the flow above, with kappa(t) = rate (0.4 t + 0.3 t^2).

    Where w_s = alpha_s beta_s' - alpha_s' beta_s vanishes, I_s determines I_s', and x1 is 0.

    Args:
      interpolant: the path.
      rate: the factor of the velocity, between -2.8 and 2.8. A positive rate mostly expands, a negative one contracts.
    """
    centre = -0.3

    def velocity(params: Params, t: Time, x: Event, cond: Cond = None, *, key: Key | None = None) -> Event:
        return rate * (0.4 + 0.6 * t) * jnp.sqrt(1.0 + (x - centre) ** 2)

    def mean_velocity(
        params: Params, s: Time, t: Time, x: Event, cond: Cond = None, *, key: Key | None = None
    ) -> Event:
        mean_rate, away = rate * (0.4 + 0.3 * (s + t)), x - centre
        square = (mean_rate * (t - s)) ** 2
        sinh = cosh = jnp.zeros_like(square)
        for n in range(TERMS, 0, -1):
            sinh = 1.0 + square * sinh / (2 * n * (2 * n + 1))
            cosh = 1.0 + square * cosh / ((2 * n + 1) * (2 * n + 2))
        return mean_rate * (sinh * jnp.sqrt(1.0 + away**2) + 0.5 * mean_rate * (t - s) * cosh * away)

    x = np.repeat(POINTS, 2)
    # Of mean zero at each point, and larger on one side.
    noise = np.tile([1.0 - UPPER, -UPPER], len(POINTS)) * (1.0 + 0.4 * np.sin(x))

    def batch(s: Any) -> types.Batch:
        c = interpolant.coefficients(s)
        slope = velocity(None, s, jnp.asarray(x)) + noise
        moves = jnp.abs(c.w) > 1e-6
        x1 = jnp.where(moves, (c.alpha * slope - c.alpha_dot * x) / jnp.where(moves, c.w, 1.0), 0.0)
        x0 = jnp.where(moves, (c.beta_dot * x - c.beta * slope) / jnp.where(moves, c.w, 1.0), x / c.alpha)
        return types.Batch(x1[:, None], x0[:, None])

    flow_map = types.FlowMap(mean_velocity, types.BOTH, velocity_override=velocity)
    return Setting(flow_map, None, batch, np.repeat(SHARES, 2) * np.tile([UPPER, 1.0 - UPPER], len(POINTS)))


def solved_pairs(interpolant: Interpolant) -> Setting:
    """Pairs (z, m + sigma z), coupled by a map; along their flow z = (x - beta m)/(alpha + beta sigma)."""
    mean, sigma = 0.7, 0.4

    def velocity(params: Params, t: Time, x: Event, cond: Cond = None, *, key: Key | None = None) -> Event:
        c = interpolant.coefficients(t)
        z = (x - c.beta * mean) / (c.alpha + c.beta * sigma)
        return c.alpha_dot * z + c.beta_dot * (mean + sigma * z)

    def mean_velocity(
        params: Params, s: Time, t: Time, x: Event, cond: Cond = None, *, key: Key | None = None
    ) -> Event:
        z = (x - interpolant.beta(s) * mean) / (interpolant.alpha(s) + interpolant.beta(s) * sigma)
        return interpolant.alpha_dd(s, t) * z + interpolant.beta_dd(s, t) * (mean + sigma * z)

    nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
    z = jnp.asarray(nodes)[:, None]
    flow_map = types.FlowMap(mean_velocity, types.BOTH, velocity_override=velocity)
    return Setting(flow_map, None, lambda s: types.Batch(mean + sigma * z, z), weights / weights.sum())


def setting(method: objectives.Method, interpolant: Interpolant) -> Setting:
    """The pairs and the exact map for a method: coupled pairs if it needs pairs, else noisy ones."""
    return solved_pairs(interpolant) if "pairs" in method.needs else noisy_pairs(interpolant)


def student(this: Setting, interpolant: Interpolant, by_x: Any, *, on_diagonal: bool = True) -> types.FlowMap:
    """The student, a FlowMap with mean velocity v_exact + c Theta . phi and parameters Theta.

    Args:
      this: the setting with the exact map.
      interpolant: the path.
      by_x: 1 for the x-form, 0 for the v-form; may be traced.
      on_diagonal: whether the student differs from the exact map at s = t as well.
    """
    rng = np.random.default_rng(3)
    mix, shift = jnp.asarray(rng.normal(size=(FEATURES, 3))), jnp.asarray(rng.normal(size=FEATURES))
    form = parameterizations.data_form(interpolant)

    def beside(theta: Params, s: Time, t: Time, x: Event) -> Array:
        s, t = jnp.asarray(s, float), jnp.asarray(t, float)
        phi = theta @ jnp.sin(mix @ jnp.concatenate([jnp.stack([s, t]), x]) + shift)
        _, c = form.coefficients(s, t)
        return jnp.where(by_x, c, 1.0) * phi * (1.0 if on_diagonal else t - s)

    def mean_velocity(theta: Params, s: Time, t: Time, x: Event, cond: Cond = None, *, key: Key | None = None) -> Event:
        return this.exact.mean_velocity(this.truth, s, t, x) + beside(theta, s, t, x)

    def velocity(theta: Params, t: Time, x: Event, cond: Cond = None, *, key: Key | None = None) -> Event:
        return this.exact.velocity(this.truth, t, x) + beside(theta, t, t, x)

    return types.FlowMap(mean_velocity, types.BOTH, velocity_override=velocity)


def times_within(domain: types.Domain) -> list[tuple[float, float]]:
    """Two pairs of times of a domain."""
    if domain.target is not None:
        return [(0.2, domain.target), (0.25, domain.target)]
    if domain.source is not None:
        return [(domain.source, 0.45), (domain.source, 0.9)]
    return [(0.125, 0.625), (0.2, 1.0)]


def objective_of(
    method: objectives.Method, flow_map: types.FlowMap, interpolant: Interpolant, exact: types.FlowMap, **choices: Any
) -> objectives.Objective:
    """The objective of a method, with the exact map as teacher if it needs one."""
    if set(method.needs) & {"teacher", "map teacher"}:
        choices = {"teacher": exact, **choices}
    return method.constructor(flow_map, interpolant, **choices)


def context_of(this: Setting, theta: Any) -> types.Context:
    """A context whose averaged parameters are the student's and whose teacher is exact."""
    return types.Context(step=jnp.int32(0), ema=theta, teacher=this.truth)


def expected_gradient(
    method: objectives.Method,
    interpolant: Interpolant,
    theta: Array,
    pair: Sequence[Any],
    by_x: Any = False,
    *,
    on_diagonal: bool = True,
    this: Setting | None = None,
    **choices: Any,
) -> tuple[Array, Array]:
    """The expected gradient ``[FEATURES]`` and the mean loss of a method's own term at one pair of times.

    Args:
      method: the method.
      interpolant: the path.
      theta: the student's parameters, ``[FEATURES]``.
      pair: (s, t).
      by_x, on_diagonal: as in ``student``.
      this: the pairs and the exact map; by default ``setting(method, interpolant)``.
      **choices: arguments of the method's constructor.
    """
    this = setting(method, interpolant) if this is None else this
    flow_map = student(this, interpolant, by_x, on_diagonal=on_diagonal)
    s, t = pair

    def at_s(key: Key, n: int) -> Array:
        return jnp.full((n,), s)

    def at_both(key: Key, n: int) -> tuple[Array, Array]:
        return jnp.full((n,), s), jnp.full((n,), t)

    # If the method has its own term, use off-diagonal rows only.
    fixed = {"pairs": at_both, "diagonal": 0.0} if method.cost else {"times": at_s}
    objective = objective_of(method, flow_map, interpolant, this.exact, **{**fixed, **choices})

    def mean(theta: Array) -> Array:
        loss, _ = objective(theta, jax.random.key(0), this.batch(s), context_of(this, jax.lax.stop_gradient(theta)))
        return jnp.sum(jnp.asarray(this.weights) * loss)

    value, gradient = jax.value_and_grad(mean)(theta)
    return gradient, value
