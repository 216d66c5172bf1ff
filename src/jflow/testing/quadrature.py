r"""Expected gradients of a method near the exact map, by quadrature.

The target is a mixture in one dimension with unequal weights and widths, whose flow map is known from its quantiles. The
expectation over pairs (x0, x1) is a Gauss-Hermite sum, so a gradient that should vanish is zero up to rounding, without
sampling error. The mean velocity of the student is

.. math::

    v_{s,t}(x) = v^{\text{exact}}_{s,t}(x) + c(s,t)\, \Theta \cdot \phi(s, t, x)

with fixed random features phi, so the student is a flow only for Theta = 0. In the v-form c is 1; in the x-form it is the
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
# The parameters of a student that is not a flow.
OFF = 0.3 * np.array([1.0, -1.0, 0.5, 0.8])
BASE_NODES, DATA_NODES = 60, 16


class Setting(NamedTuple):
    """Weighted pairs (x0, x1) with their exact map.

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
    """Pairs of x1 from the mixture, times ``scale``, and an independent standard normal x0.

    With ``components=1`` the target is Gaussian, whose exact map compiles faster.
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
    # Drop nodes whose weight is below rounding.
    kept = joint > 1e-16 * joint.max()
    x0, x1, joint = x0[kept], x1[kept], joint[kept]
    batch = types.Batch(jnp.asarray(x1), jnp.asarray(x0))
    oracle = oracles.quantile(interpolant) if components == 2 else oracles.gaussian(interpolant)
    return Setting(oracle.flow_map, truth, batch, joint / joint.sum())


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

    nodes, weights = np.polynomial.hermite_e.hermegauss(BASE_NODES)
    z = jnp.asarray(nodes)[:, None]
    flow_map = types.FlowMap(mean_velocity, types.BOTH, velocity_override=velocity)
    return Setting(flow_map, None, types.Batch(mean + sigma * z, z), weights / weights.sum())


def setting(method: objectives.Method, interpolant: Interpolant) -> Setting:
    """The pairs and the exact map for a method: coupled pairs if it needs pairs, else independent ones."""
    # This is also called while tracing; then the arrays are constants.
    with jax.ensure_compile_time_eval():
        if "pairs" in method.needs:
            return solved_pairs(interpolant)
        return independent_pairs(interpolant)


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
    """Two pairs of times of a domain at which the quadrature resolves the law of x1 given I_s."""
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
        loss, _ = objective(theta, jax.random.key(0), this.batch, context_of(this, jax.lax.stop_gradient(theta)))
        return jnp.sum(jnp.asarray(this.weights) * loss)

    value, gradient = jax.value_and_grad(mean)(theta)
    return gradient, value
