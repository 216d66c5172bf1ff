"""Properties of every row of the catalogue, as functions of a row, so that a new method is tested without new code.

The target is a mixture in one dimension, whose map is known by its quantiles. Expectations over the pairs are Gauss-Hermite
quadratures, so that a gradient that should vanish does so to rounding and not to a standard error. The student is

    v = v_exact + c(s,t) Theta . phi(s, t, x)

with fixed random features phi, which are no flow, and c the factor of the network in the parameterization.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jflow import interpolants, objectives, oracles, parameterizations, types

FEATURES = 4
OFF = 0.3 * np.array([1.0, -1.0, 0.5, 0.8])
STEPS = np.array([0.08, 0.04, 0.02, 0.01])
FORMS = ("v", "x")
PATHS = ("linear", "trigonometric")
BASE_NODES, DATA_NODES = 60, 30


class Setting(NamedTuple):
    """What a method is tried on.

    Attributes:
      exact: the exact map.
      truth: its parameters.
      batch: pairs, the nodes of the quadrature.
      weights: theirs.
    """

    exact: types.FlowMap
    truth: Any
    batch: types.Batch
    weights: np.ndarray


def mixture(scale: float = 1.0) -> oracles.MixtureParams:
    """Two components of unequal weight and width."""
    means, covs = jnp.array([[-0.4], [0.7]]), jnp.array([[[0.35]], [[0.7]]])
    return oracles.mixture_params(jnp.array([0.65, 0.35]), scale * means, scale**2 * covs)


@functools.cache
def independent_pairs(path_name: str, scale: float = 1.0) -> Setting:
    """The mixture, and a standard normal independent of it."""
    oracle, truth = oracles.quantile(interpolants.INTERPOLANTS[path_name]()), mixture(scale)
    nodes, weights = np.polynomial.hermite_e.hermegauss(BASE_NODES)
    inner, inner_weights = np.polynomial.hermite_e.hermegauss(DATA_NODES)
    means, widths = np.asarray(truth.means)[:, 0], np.sqrt(np.asarray(truth.variances)[:, 0])
    x1 = (means[:, None] + widths[:, None] * inner).ravel()
    p1 = (np.exp(np.asarray(truth.log_weights))[:, None] * inner_weights).ravel()
    x0, x1 = (grid.reshape(-1, 1) for grid in np.meshgrid(nodes, x1, indexing="ij"))
    joint = np.outer(weights, p1).ravel()
    batch = types.Batch(jnp.asarray(x1), jnp.asarray(x0))
    return Setting(oracle.flow_map, truth, batch, joint / joint.sum())


@functools.cache
def solved_pairs(path_name: str) -> Setting:
    """(z, m + sigma z): the flow of these pairs is z = (x - beta m)/(alpha + beta sigma)."""
    path, mean, sigma = interpolants.INTERPOLANTS[path_name](), 0.7, 0.4

    def velocity(params, t, x, cond=None, *, key=None):
        c = path.coefficients(t)
        z = (x - c.beta * mean) / (c.alpha + c.beta * sigma)
        return c.alpha_dot * z + c.beta_dot * (mean + sigma * z)

    nodes, weights = np.polynomial.hermite_e.hermegauss(BASE_NODES)
    z = jnp.asarray(nodes)[:, None]
    batch = types.Batch(mean + sigma * z, z)
    return Setting(types.FlowMap(None, types.BOTH, velocity_override=velocity), None, batch, weights / weights.sum())


def setting(method: objectives.Method, path_name: str) -> Setting:
    """Pairs and exact map for a method."""
    # Also asked for while tracing, where the arrays should be made and not traced.
    with jax.ensure_compile_time_eval():
        return (solved_pairs if "pairs" in method.needs else independent_pairs)(path_name)


def student(this: Setting, path_name: str, by_x: Any, *, on_diagonal: bool = True) -> types.FlowMap:
    """The exact map and beside it Theta . phi; ``by_x`` is 1 for the x-formulation, 0 for the v-formulation."""
    rng = np.random.default_rng(3)
    mix, shift = jnp.array(rng.normal(size=(FEATURES, 3))), jnp.array(rng.normal(size=FEATURES))
    form = parameterizations.data_form(interpolants.INTERPOLANTS[path_name]())

    def beside(theta, s, t, x):
        s, t = jnp.asarray(s, float), jnp.asarray(t, float)
        phi = theta @ jnp.sin(mix @ jnp.concatenate([jnp.stack([s, t]), x]) + shift)
        _, c = form.coefficients(s, t)
        return jnp.where(by_x, c, 1.0) * phi * (1.0 if on_diagonal else t - s)

    def mean_velocity(theta, s, t, x, cond=None, *, key=None):
        return this.exact.mean_velocity(this.truth, s, t, x) + beside(theta, s, t, x)

    def velocity(theta, t, x, cond=None, *, key=None):
        return this.exact.velocity(this.truth, t, x) + beside(theta, t, t, x)

    return types.FlowMap(mean_velocity, types.BOTH, velocity_override=velocity)


def some_pairs(domain: types.Domain) -> list[tuple[float, float]]:
    """Two pairs of times within a domain, where the nodes resolve the law of x1 given I_s."""
    if domain.target is not None:
        return [(0.2, domain.target), (0.25, domain.target)]
    if domain.source is not None:
        return [(domain.source, 0.45), (domain.source, 0.9)]
    return [(0.125, 0.625), (0.2, 1.0)]


def make(method: objectives.Method, flow_map: types.FlowMap, path_name: str, exact: types.FlowMap, **choices: Any):
    """A method's objective, with the exact map as its teacher where it needs one."""
    if set(method.needs) & {"teacher", "map teacher"}:
        choices = {"teacher": exact, **choices}
    return method.constructor(flow_map, interpolants.INTERPOLANTS[path_name](), **choices)


def context(this: Setting, theta: Any) -> types.Context:
    """The averaged parameters are the student's own, the teacher's the exact ones."""
    return types.Context(step=jnp.int32(0), ema=theta, teacher=this.truth)


def off_diagonal(method: objectives.Method) -> dict[str, Any]:
    """Choices that leave a method its own term alone."""
    return {"diagonal": 0.0} if method.cost else {}


def expected_gradient(method, path_name, theta, pair, by_x=False, key=None, *, on_diagonal=True, **choices):
    """(gradient, mean loss): the exact expectation over the pairs at one pair of times."""
    this = setting(method, path_name)
    flow_map = student(this, path_name, by_x, on_diagonal=on_diagonal)
    s, t = pair
    law = lambda k, n: (jnp.full((n,), s), jnp.full((n,), t))  # noqa: E731
    at = {"pairs": law} if method.cost else {"times": lambda k, n: jnp.full((n,), s)}
    objective = make(method, flow_map, path_name, this.exact, **{**off_diagonal(method), **at, **choices})
    key = jax.random.key(0) if key is None else key

    def mean(theta):
        loss, _ = objective(theta, key, this.batch, context(this, jax.lax.stop_gradient(theta)))
        return jnp.sum(jnp.asarray(this.weights) * loss)

    value, gradient = jax.value_and_grad(mean)(theta)
    return gradient, value


def check_stationary(method: objectives.Method, path_name: str) -> None:
    """Test 2 of a method: the exact map is stationary as its row declares, in both forms, and a map beside it is not."""
    this = setting(method, path_name)
    probe = make(method, student(this, path_name, False), path_name, this.exact)
    pairs = jnp.array(some_pairs(probe.domain))
    forms = jnp.array([form == "x" for form in FORMS])

    @jax.jit
    def run(thetas, steps):
        def one(theta, step, pair, by_x):
            choices = {} if method.at is None else method.at(step)
            return expected_gradient(method, path_name, theta, (pair[0], pair[1]), by_x, **choices)[0]

        over_forms = jax.vmap(one, (None, None, None, 0))
        over_pairs = jax.vmap(over_forms, (None, None, 0, None))
        return jax.lax.map(lambda z: over_pairs(z[0], z[1], pairs, forms), (thetas, steps))

    small = STEPS if method.at is not None else STEPS[-1:]
    steps = np.append(small, small[-1])
    thetas = np.stack([np.zeros(FEATURES)] * len(small) + [OFF])
    gradients = np.asarray(run(jnp.asarray(thetas), jnp.asarray(steps)))
    at_zero, beside = gradients[:-1], np.linalg.norm(gradients[-1], axis=-1)
    sizes = np.linalg.norm(at_zero, axis=-1)
    assert np.all(beside > 1e-3), beside
    if method.stationary == "exact":
        assert np.all(sizes < 5e-6 * beside), sizes / beside
        return
    assert method.stationary in ("order", "limit") and method.at is not None
    # The order by regression, for each form and pair of times by itself.
    logs = np.log(sizes).reshape(len(STEPS), -1)
    slopes = np.polyfit(np.log(STEPS), logs, 1)[0]
    assert np.all(np.abs(slopes - method.order) < 0.2), slopes
    assert np.all(sizes[-1] < 0.2 * beside), sizes[-1] / beside


def check_report(method: objectives.Method) -> None:
    """Reports of raw residuals, tangent norms and bins of t and gap; the raw residual is positive beside the map."""
    path_name = method.paths[0] if method.paths else "linear"
    this = setting(method, path_name)
    objective = make(method, student(this, path_name, False), path_name, this.exact)
    theta = jnp.asarray(OFF)
    middle = len(this.weights) // 2
    batch = jax.tree.map(lambda leaf: leaf[middle - 16 : middle + 16], this.batch)
    run = jax.jit(lambda k: objective(theta, k, batch, context(this, theta)))
    loss, aux = jax.device_get(run(jax.random.key(1)))
    assert loss.shape == (32,) and np.all(np.isfinite(loss))
    assert aux.state == ()
    metrics, rows = aux.metrics, aux.metrics["diagonal_rows"].values
    own = set() if objective.term is None else {objective.term.name}
    terms = {name.split("/")[0] for name in metrics if "/" in name}
    assert terms == ({"tangent"} if objective.diagonal > 0 else set()) | own and bool(own) == bool(method.cost)
    for term in terms:
        assert metrics[f"{term}/raw"].value() > 1e-5
        assert metrics[f"{term}/raw"].by["t"].count.sum() == np.sum(rows == (term == "tangent"))
    for term in own:
        assert metrics[f"{term}/tangent_norm"].value() > 0
        by_gap = metrics[f"{term}/raw"].by["gap"]
        assert np.all(np.isfinite(by_gap.total)) and by_gap.count.sum() == np.sum(~rows)
        np.testing.assert_array_equal(np.isfinite(by_gap.value()), by_gap.count > 0)


CHECKS = (check_report, *(functools.partial(check_stationary, path_name=name) for name in PATHS))
