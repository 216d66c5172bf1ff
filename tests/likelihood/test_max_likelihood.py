"""Maximum likelihood of a flow: its value against an exact density, its gradients by every adjoint, its regularisers."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jflow import interpolants, oracles, reports, types
from jflow import likelihood as lik


def own(log_density):
    """A base of one's own, of which only the log-density is asked."""
    return SimpleNamespace(name="own", sample=jax.random.normal, log_density=log_density, score=jax.grad(log_density))


LINE = oracles.mixture_params(jnp.array([0.7, 0.3]), jnp.array([[-0.8], [1.2]]), jnp.array([[[0.09]], [[0.25]]]))
PLANE = oracles.mixture_params(
    jnp.array([0.7, 0.3]),
    jnp.array([[-0.6, 0.2], [0.9, -0.5]]),
    jnp.array([[[0.3, 0.1], [0.1, 0.2]], [[0.2, 0.0], [0.0, 0.4]]]),
)
POINTS = jnp.array([[0.3, -1.1], [-0.7, 0.4], [1.2, 0.9]])


def linear(params, t, x, cond=None, *, key=None):
    return params @ x


def curved(params, t, x, cond=None, *, key=None):
    return params["out"] @ jnp.tanh(params["in"] @ x + params["time"] * t)


def curved_params():
    rng = np.random.default_rng(0)
    return {
        "in": jnp.array(rng.normal(size=(3, 2))),
        "out": jnp.array(0.5 * rng.normal(size=(2, 3))),
        "time": jnp.array(rng.normal(size=3)),
    }


@pytest.mark.slow  # The kinetic energy's test has the exact value of the loss too, and test_ode_density the mixture.
def test_the_loss_of_the_exact_velocity_is_minus_the_exact_log_density():
    oracle = oracles.mixture(interpolants.linear())
    objective = lik.maximum_likelihood(oracle.velocity, rtol=1e-9, atol=1e-9)
    loss, aux = jax.jit(objective)(PLANE, jax.random.key(0), types.Batch(POINTS))
    info = reports.values(aux.metrics)
    want = -np.array([oracle.log_density(PLANE, 1.0, x) for x in POINTS])
    np.testing.assert_allclose(loss, want, atol=1e-8)
    np.testing.assert_allclose([info["likelihood/raw"], info["likelihood/loss"]], want.mean(), atol=1e-8)
    assert info["likelihood/failed"] == 0 and info["likelihood/nfe"] > 10
    assert set(info) == {f"likelihood/{name}" for name in ("raw", "loss", "nfe", "steps", "failed")}


# --- gradients --------------------------------------------------------------------------------------------------------

FIXED = {"solver": "euler", "steps": 3}
FINE = {"rtol": 1e-9, "atol": 1e-9}


def mean_loss(adjoint, **options):
    """The regularised loss as a function of the parameters."""
    objective = lik.maximum_likelihood(
        curved, divergence=lik.hutchinson(), adjoint=adjoint, kinetic=0.1, jacobian=0.2, **options
    )
    # A key consumed is a key made anew: the probes are the same at each call.
    return lambda params: objective(params, jax.random.key(3), types.Batch(POINTS))[0].mean()


def slopes(adjoint, **options):
    """The gradient of the loss, its product with a random direction, and the difference quotient along it."""
    loss, params, rng = mean_loss(adjoint, **options), curved_params(), np.random.default_rng(1)
    direction = jax.tree.map(lambda leaf: jnp.array(rng.normal(size=leaf.shape)), params)
    derivative = jax.jit(lambda h: jax.value_and_grad(loss)(jax.tree.map(lambda p, d: p + h * d, params, direction)))
    # Central, and of fourth order, so that what is left is rounding and the noise of the solve.
    h = 1e-3
    near, far = (float(derivative(k * h)[0] - derivative(-k * h)[0]) / (2 * k * h) for k in (1, 2))
    gradient = derivative(0.0)[1]
    along = sum(np.vdot(g, d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True))
    return gradient, float(along), (4 * near - far) / 3


def test_the_gradient_is_that_of_the_steps_and_both_exact_adjoints_agree():
    recursive, along, difference = slopes("recursive", **FIXED)
    assert abs(along) > 0.1
    np.testing.assert_allclose(along, difference, rtol=1e-9)
    direct = jax.jit(jax.grad(mean_loss("direct", **FIXED)))(curved_params())
    for a, b in zip(jax.tree.leaves(recursive), jax.tree.leaves(direct), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "low", "high"),
    [pytest.param(FINE, 0.0, 1e-7, marks=pytest.mark.slow), (FIXED, 1e-4, 0.5)],
    ids=["fine", "coarse"],
)
def test_backsolve_has_the_error_of_its_own_solve(options, low, high):
    _, along, difference = slopes("backsolve", **options)
    assert low <= abs(along / difference - 1) < high


# --- regularisers -----------------------------------------------------------------------------------------------------


def test_the_kinetic_energy_of_a_linear_flow():
    """x_t = e^{a (t-1)} x_1 in each entry: int |b|^2 dt = sum a x_1^2 (1 - e^{-2a})/2; and the loss is the sum."""
    rates = np.array([0.7, -0.4])
    objective = lik.maximum_likelihood(linear, kinetic=0.3, jacobian=0.5, rtol=1e-9, atol=1e-9)
    loss, aux = jax.jit(objective)(jnp.diag(jnp.asarray(rates)), jax.random.key(0), types.Batch(POINTS))
    info = reports.values(aux.metrics)
    kinetic = np.sum(rates * np.asarray(POINTS) ** 2 * (1 - np.exp(-2 * rates)) / 2, axis=1)
    assert info["likelihood/failed"] == 0 and info["likelihood/nfe"] > 10
    assert set(info) == {
        f"likelihood/{name}" for name in ("raw", "loss", "kinetic", "jacobian", "nfe", "steps", "failed")
    }
    x0 = np.asarray(POINTS) * np.exp(-rates)
    nll = np.sum(x0**2, axis=1) / 2 + np.log(2 * np.pi) + np.sum(rates)
    # With a diagonal Jacobian every probe gives the sum of squares.
    jacobian = np.sum(rates**2)
    np.testing.assert_allclose(loss, nll + 0.3 * kinetic + 0.5 * jacobian, rtol=1e-8)
    means = {"raw": nll.mean(), "kinetic": kinetic.mean(), "jacobian": jacobian, "loss": np.mean(loss)}
    for name, want in means.items():
        np.testing.assert_allclose(info[f"likelihood/{name}"], want, rtol=1e-8)


def test_the_jacobians_norm_and_the_divergence_are_unbiased(assert_mean):
    """Over the probes, one for each sample; and fixed within a solve, for the integrals are those of constants."""
    matrix = jnp.array([[0.3, -1.1], [0.8, 0.2]])
    one = jnp.zeros((2048, 2))
    kept = functools.partial(
        lik.maximum_likelihood,
        linear,
        divergence=lik.hutchinson(),
        solver="euler",
        steps=3,
        base=own(lambda x: jnp.zeros(())),
    )
    run = jax.jit(lambda key, weight: kept(jacobian=weight)(matrix, key, types.Batch(one))[0], static_argnums=1)
    with_it, without = run(jax.random.key(0), 1.0), run(jax.random.key(0), 0.0)
    assert_mean(without, np.trace(matrix))
    assert_mean(with_it - without, np.sum(np.asarray(matrix) ** 2))
    # z'Mz = tr M +- (M_12 + M_21): two values, each step's the same.
    np.testing.assert_allclose(np.unique(np.round(without, 12)), [0.5 - 0.3, 0.5 + 0.3], rtol=1e-9)


# --- failing and mistakes ---------------------------------------------------------------------------------------------


def test_samples_whose_solve_fails_are_counted_and_not_hidden():
    objective = lik.maximum_likelihood(lambda p, t, x, cond=None, *, key=None: p * x**3, max_steps=8, rtol=1e-6)
    x1 = jnp.array([[0.1], [-30.0], [0.2]])
    loss, aux = jax.jit(objective)(jnp.asarray(-1.0), jax.random.key(0), types.Batch(x1))
    info = reports.values(aux.metrics)
    assert info["likelihood/failed"] == 1 and np.isfinite(loss).tolist() == [True, False, True]
    assert not np.isfinite(info["likelihood/loss"])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: lik.maximum_likelihood(3.0), TypeError, "velocity: expected a function"),
        (
            lambda: lik.maximum_likelihood(linear, adjoint="forward"),
            ValueError,
            "adjoint: .*reverse mode.*'forward'",
        ),
        (lambda: lik.maximum_likelihood(linear, kinetic=-1.0), ValueError, "kinetic: "),
        (lambda: lik.maximum_likelihood(linear, jacobian="1"), TypeError, "jacobian: "),
        (lambda: lik.maximum_likelihood(linear, solver="heun"), ValueError, "steps: "),
        (
            lambda: lik.maximum_likelihood(linear)(jnp.eye(2), jax.random.key(0), types.Batch(np.arange(4))),
            TypeError,
            "batch.x1: expected floating",
        ),
        (
            lambda: lik.maximum_likelihood(linear)(jnp.eye(2), jax.random.key(0), types.Batch(POINTS, cond=np.ones(2))),
            ValueError,
            "batch: .*one common leading axis",
        ),
        (
            lambda: jax.jit(lik.maximum_likelihood(linear, solver="euler", steps=1))(
                np.ones((3, 2)), jax.random.key(0), types.Batch(POINTS)
            ),
            ValueError,
            r"b\(x\): expected the shape",
        ),
        (
            lambda: lik.maximum_likelihood(linear, solver="euler", steps=1, base=own(lambda x: x))(
                np.eye(2), jax.random.key(0), types.Batch(POINTS)
            ),
            ValueError,
            r"base.log_density\(x\): expected a scalar",
        ),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


# --- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_small_flow_comes_near_the_entropy_of_its_data():
    """One dimension, 200 steps of 128 samples, from a standard normal: from 0.53 nats above the entropy to 0.02."""
    oracle = oracles.quantile(interpolants.linear())
    width, steps, size = 16, 200, 128

    def velocity(params, t, x, cond=None, *, key=None):
        first, bias, times, last = params
        return jnp.sum(last * jnp.tanh(first * x + bias + times * t), keepdims=True)

    objective = lik.maximum_likelihood(velocity, solver="midpoint", steps=4, adjoint="direct", kinetic=0.01)
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-2, steps))

    def step(carry, key):
        params, state = carry
        data_key, loss_key = jax.random.split(key)
        batch = types.Batch(oracle.sample(LINE, data_key, size))
        gradient = jax.grad(lambda params: objective(params, loss_key, batch)[0].mean())(params)
        with jax.numpy_dtype_promotion("standard"):
            update, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, update), state), None

    # Cross-entropies by a sum over a fine grid, against the entropy by the same sum; the flow's by a fine solve.
    grid = jnp.linspace(-3.0, 4.0, 1001)[:, None]
    log_density = jax.vmap(lambda x: oracle.log_density(LINE, 1.0, x))(grid)
    weights = jnp.exp(log_density) * (7.0 / 1000)
    fine = lik.maximum_likelihood(velocity, rtol=1e-6)

    @jax.jit
    def excess(params):
        return jnp.sum(weights * (fine(params, jax.random.key(2), types.Batch(grid))[0] + log_density))

    first, bias, times = np.random.default_rng(0).normal(size=(3, width))
    start = tuple(map(jnp.asarray, (2.0 * first, bias, times, np.zeros(width))))
    run = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys)[0])
    learned, _ = run((start, optimizer.init(start)), jax.random.split(jax.random.key(1), steps))
    before, after = excess(start), excess(learned)
    print(before, after, -jnp.sum(weights * log_density))
    assert before > 0.3 and 0.0 < after < 0.04, (before, after)
