"""The SDE against the marginals of the flow and its own ODE without noise."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import interpolants, solvers

P = 0.2
X = np.array([-0.7, 0.2, 0.9])


def velocity(params, t, x, cond=None, *, key=None):
    rate = params if cond is None else params * cond
    return jax.tree.map(lambda leaf: (rate * (1.0 + 2.0 * t)).astype(leaf.dtype) * (1.0 + leaf * leaf), x)


def args(s, t, dtype=jnp.float64):
    return jnp.asarray(P, dtype), jnp.asarray(s, dtype), jnp.asarray(t, dtype), jnp.asarray(X, dtype)


HEUN = solvers.solve(velocity, "heun", steps=16)
heun = jax.jit(HEUN.mean_velocity)
WEIGHTS, MEANS, DEVIATIONS = np.array([0.7, 0.3]), np.array([-0.6, 1.4]), np.array([0.5, 0.3])


def mixture_velocity(path):
    def b(params, t, x, cond=None, *, key=None):
        c = path.coefficients(t)
        variance = c.alpha**2 + (c.beta * DEVIATIONS) ** 2
        z = x - c.beta * MEANS
        share = jax.nn.softmax(jnp.log(WEIGHTS) - 0.5 * jnp.log(variance) - 0.5 * z**2 / variance)
        slope = (c.alpha * c.alpha_dot + c.beta * c.beta_dot * DEVIATIONS**2) / variance
        return jnp.sum(share * (c.beta_dot * MEANS + slope * z), keepdims=True)

    return b


def moments(x):
    """Mean, variance and third central moment, and four standard errors of each."""
    x = np.asarray(x, np.float64)
    d = x - x.mean()
    rows = np.stack([x, d**2, d**3], -1)
    return rows.mean(0), 4 * rows.std(0) / np.sqrt(len(x))


def true_moments(path):
    a1, b1 = path.endpoints[2:]
    mean = b1 * WEIGHTS @ MEANS
    shift, variance = b1 * MEANS - mean, a1**2 + (b1 * DEVIATIONS) ** 2
    return np.array([mean, WEIGHTS @ (variance + shift**2), WEIGHTS @ (3 * variance * shift + shift**3)])


SAMPLES, STEPS = 5_000, 100


def run_sde(name, method, diffusion, *, turned=False):
    path = interpolants.INTERPOLANTS[name]()
    b = mixture_velocity(path)

    def turned_velocity(params, t, x, cond=None, *, key=None):
        """The velocity to which sde adds what makes the drift b - c (beta b - beta' x): the score's sign is wrong."""
        c = path.coefficients(t)
        back = diffusion * c.beta
        return ((1.0 - back) * b(params, t, x) + 2.0 * diffusion * c.beta_dot * x) / (1.0 + back)

    simulate = solvers.sde(turned_velocity if turned else b, path, method=method, diffusion=diffusion)
    start, noise = jax.random.split(jax.random.key(7))
    pick, base = jax.random.split(start)
    a0, b0 = path.endpoints[:2]
    k = jax.random.choice(pick, 2, (SAMPLES,), p=jnp.asarray(WEIGHTS))
    spread = jnp.sqrt(a0**2 + (b0 * jnp.asarray(DEVIATIONS)[k]) ** 2)
    x0 = b0 * jnp.asarray(MEANS)[k] + spread * jax.random.normal(base, (SAMPLES,))
    grid = jnp.linspace(0.0, 1.0, STEPS + 1)
    run = jax.jit(jax.vmap(lambda key, x: simulate(None, key, grid, x)))
    got, error = moments(run(jax.random.split(noise, SAMPLES), x0[:, None])[:, 0])
    return np.abs(got - true_moments(path)) / error


@pytest.mark.representatives("sigma")
@pytest.mark.parametrize(
    ("name", "method", "diffusion"),
    [
        pytest.param("linear", "euler", 1.0, marks=pytest.mark.slow),
        ("trigonometric", "heun", 2.0),
        ("linear", "heun", lambda t: 1.2 * jnp.sqrt(1.0 - t)),
        pytest.param("variance_preserving", "heun", 1.0, marks=pytest.mark.slow),
    ],
    ids=["linear", "trigonometric", "sigma", "variance-preserving"],
)
def test_the_sde_has_the_marginals_of_the_flow(name, method, diffusion):
    ratios = run_sde(name, method, diffusion)
    assert np.all(ratios < 1.0), ratios


def test_the_sde_with_the_sign_of_the_score_turned_has_not():
    assert np.max(run_sde("linear", "euler", 1.0, turned=True)) > 2.0


def test_without_noise_the_sde_is_the_ode_and_each_key_gives_its_own_path():
    p, s, t, x = args(0.1, 0.8)
    grid = jnp.linspace(0.1, 0.8, 9)
    key, other = jax.random.split(jax.random.key(1))
    tree = {"a": x, "b": x[0].astype(jnp.bfloat16)}

    def end(diffusion, method):
        simulate = solvers.sde(velocity, interpolants.linear(), method=method, diffusion=diffusion)
        return jax.jit(lambda key: simulate(p, key, grid, tree))

    still = end(0.0, "heun")(key)
    jump = jax.jit(solvers.solve(velocity, "heun", steps=8, adjoint="forward").jump)(p, s, t, x)
    np.testing.assert_allclose(still["a"], jump, rtol=1e-12)
    assert still["b"].dtype == jnp.bfloat16
    np.testing.assert_allclose(still["b"].astype(jnp.float64), jump[0], rtol=2e-2)
    noisy = end(1.0, "euler")
    first, again, second = noisy(key), noisy(key), noisy(other)
    np.testing.assert_array_equal(first["a"], again["a"])
    assert np.all(first["a"] != second["a"])
    # Every coordinate has its own noise, so equal starts have different ends.
    assert abs(float(first["a"][0]) - float(first["b"])) > 0.05


@pytest.mark.slow
def test_the_sde_is_differentiable_in_both_modes():
    p, _, _, x = args(0.0, 1.0)
    grid = jnp.linspace(0.0, 1.0, 9)
    simulate = solvers.sde(velocity, interpolants.trigonometric(), method="heun", diffusion=0.3)

    def total(p):
        return jnp.sum(simulate(p, jax.random.key(2), grid, x))

    value, h = jax.jit(total), 1e-5
    back, along = jax.jit(lambda p: (jax.grad(total)(p), jax.jvp(total, (p,), (jnp.ones_like(p),))[1]))(p)
    np.testing.assert_allclose(along, (value(p + h) - value(p - h)) / (2 * h), rtol=1e-7)
    np.testing.assert_allclose(back, along, rtol=1e-12)
