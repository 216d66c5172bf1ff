r"""Expected gradients of a method near the exact map, by quadrature.

The target is a mixture in one dimension with unequal weights and widths, whose flow map is known by its quantiles. The
expectation over pairs (x0, x1) is a Gauss-Hermite sum, so that a gradient that should vanish does so to rounding, without a
standard error. The student is

    v = v_exact + c(s,t) Theta . phi(s, t, x)

with fixed random features phi, so that the student is a flow at Theta = 0 alone. c is 1 in the v-form; in the x-form it is the
factor of the network in the parameterization.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jflow import objectives, oracles, parameterizations, types
from jflow.interpolants import Interpolant
from jflow.types import Array, Cond, Event, Key, Params, Time

FEATURES = 4
# Parameters of a student that is not a flow.
OFF = 0.3 * np.array([1.0, -1.0, 0.5, 0.8])
BASE_NODES, DATA_NODES = 60, 16


class Setting(NamedTuple):
    """Pairs with their exact map.

    Attributes:
      exact: the exact map.
      truth: its parameters.
      batch: the nodes of the quadrature.
      weights: the weights of the nodes, which sum to 1.
    """

    exact: types.FlowMap
    truth: Any
    batch: types.Batch
    weights: np.ndarray


def independent_pairs(interpolant: Interpolant, scale: float = 1.0, *, components: int = 2) -> Setting:
    """x1 from the mixture, times ``scale``, and x0 from a standard normal, independent of it.

    With one of the two components the exact map is a Gaussian's, which compiles faster.
    """
    shares, means, variances = np.array([0.65, 0.35]), scale * np.array([-0.4, 0.7]), scale**2 * np.array([0.35, 0.7])
    if components == 1:
        shares, means, variances = np.ones(1), means[1:], variances[1:]
    truth = oracles.mixture_params(shares, means[:, None], variances[:, None, None])
    nodes, weights = np.polynomial.hermite_e.hermegauss(BASE_NODES)
    inner, inner_weights = np.polynomial.hermite_e.hermegauss(DATA_NODES)
    x1 = (means[:, None] + np.sqrt(variances)[:, None] * inner).ravel()
    x0, x1 = (grid.reshape(-1, 1) for grid in np.meshgrid(nodes, x1, indexing="ij"))
    joint = np.outer(weights, (shares[:, None] * inner_weights).ravel()).ravel()
    # The others are so far out that all of them together weigh less than rounding.
    kept = joint > 1e-16 * joint.max()
    x0, x1, joint = x0[kept], x1[kept], joint[kept]
    batch = types.Batch(jnp.asarray(x1), jnp.asarray(x0))
    oracle = oracles.quantile(interpolant) if components == 2 else oracles.gaussian(interpolant)
    return Setting(oracle.flow_map, truth, batch, joint / joint.sum())


def solved_pairs(interpolant: Interpolant) -> Setting:
    """(z, m + sigma z), the pairs of a coupling that is a map: their flow has z = (x - beta m)/(alpha + beta sigma)."""
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

    nodes, weights = np.polynomial.hermite_e.hermegauss(BASE_NODES)
    z = jnp.asarray(nodes)[:, None]
    flow_map = types.FlowMap(mean_velocity, types.BOTH, velocity_override=velocity)
    return Setting(flow_map, None, types.Batch(mean + sigma * z, z), weights / weights.sum())


def setting(method: objectives.Method, interpolant: Interpolant) -> Setting:
    """The pairs and the exact map for a method, by what it needs."""
    # This is also called while tracing; the arrays are constants there.
    with jax.ensure_compile_time_eval():
        if "pairs" in method.needs:
            return solved_pairs(interpolant)
        return independent_pairs(interpolant)


def student(this: Setting, interpolant: Interpolant, by_x: Any, *, on_diagonal: bool = True) -> types.FlowMap:
    """v_exact + c Theta . phi, with Theta its parameters.

    Args:
      this: the exact map.
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
    """Two pairs of times of a domain, at which the nodes resolve the law of x1 given I_s."""
    if domain.target is not None:
        return [(0.2, domain.target), (0.25, domain.target)]
    if domain.source is not None:
        return [(domain.source, 0.45), (domain.source, 0.9)]
    return [(0.125, 0.625), (0.2, 1.0)]


def objective_of(
    method: objectives.Method, flow_map: types.FlowMap, interpolant: Interpolant, exact: types.FlowMap, **choices: Any
) -> objectives.Objective:
    """A method's objective, with the exact map as its teacher if it needs one."""
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
    """(gradient ``[FEATURES]``, mean loss): of a method's own term, expected over the pairs at one pair of times.

    Args:
      method: the method.
      interpolant: the path.
      theta: the student's parameters, ``[FEATURES]``.
      pair: (s, t).
      by_x, on_diagonal: as in ``student``.
      this: the pairs and the exact map; by default ``setting(method, interpolant)``.
      **choices: of the method's constructor.
    """
    this = setting(method, interpolant) if this is None else this
    flow_map = student(this, interpolant, by_x, on_diagonal=on_diagonal)
    s, t = pair

    def at_s(key: Key, n: int) -> Array:
        return jnp.full((n,), s)

    def at_both(key: Key, n: int) -> tuple[Array, Array]:
        return jnp.full((n,), s), jnp.full((n,), t)

    # A method with a term of its own: its off-diagonal rows alone.
    fixed = {"pairs": at_both, "diagonal": 0.0} if method.cost else {"times": at_s}
    objective = objective_of(method, flow_map, interpolant, this.exact, **{**fixed, **choices})

    def mean(theta: Array) -> Array:
        loss, _ = objective(theta, jax.random.key(0), this.batch, context_of(this, jax.lax.stop_gradient(theta)))
        return jnp.sum(jnp.asarray(this.weights) * loss)

    value, gradient = jax.value_and_grad(mean)(theta)
    return gradient, value
