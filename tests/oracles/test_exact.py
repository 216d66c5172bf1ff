"""The oracles against mathematics: densities, transport, the identities of the flow, samples, tilts."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from jflow import interpolants, oracles, testing
from jflow.testing.maps import residuals
from tests.oracles.cases import CASES, COVS, MEAN, MEANS, WEIGHTS, draw, make, params

# Residuals that are rounding, or the tolerance of the solve times what differentiation makes of it.
TOLERANCE = {"gaussian": 1e-8, "quantile": 1e-7, "mixture": 1e-6}
TIMES = np.array([0.0, 0.0, 0.1, 0.3, 0.3, 0.5, 0.7, 0.9, 1.0, 1.0])


@functools.cache
def pointwise(path):
    """log rho, its gradient, the score, the denoiser, b, and the terms of the continuity equation."""
    oracle = make("mixture", path)

    def at(p, t, x):
        log_rho, gradient = jax.value_and_grad(lambda x: oracle.log_density(p, t, x))(x)
        in_time = jax.jvp(lambda t: oracle.log_density(p, t, x), (t,), (jnp.ones_like(t),))[1]
        b = oracle.velocity(p, t, x)
        divergence = jnp.trace(jax.jacfwd(lambda x: oracle.velocity(p, t, x))(x))
        terms = jnp.stack([in_time, divergence, jnp.dot(gradient, b)])
        return log_rho, gradient, oracle.score(p, t, x), oracle.denoiser(p, t, x), b, terms

    return jax.jit(jax.vmap(at, (None, 0, 0)))


@pytest.mark.representatives("trigonometric", "variance_exploding")
@pytest.mark.parametrize("path", interpolants.INTERPOLANTS)
def test_density_score_and_transport(path):
    x = draw("mixture", path, TIMES, 0)
    log_rho, gradient, score, denoiser, b, terms = map(np.asarray, pointwise(path)(params("mixture"), TIMES, x))
    interpolant = make("mixture", path).interpolant
    for i, t in enumerate(TIMES):
        alpha, beta = float(interpolant.alpha(t)), float(interpolant.beta(t))
        joint = [
            np.log(w) + multivariate_normal(beta * m, alpha**2 * np.eye(2) + beta**2 * c).logpdf(x[i])
            for w, m, c in zip(WEIGHTS, MEANS, COVS, strict=True)
        ]
        np.testing.assert_allclose(log_rho[i], logsumexp(joint), rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(score, gradient, rtol=1e-9, atol=1e-9)
    # d/dt log rho + div b + b . grad log rho = 0, both ends included.
    assert np.all(np.abs(terms.sum(axis=1)) <= 1e-9 * (1.0 + np.abs(terms).sum(axis=1)))
    assert all(np.all(np.isfinite(value)) for value in (log_rho, score, denoiser, b, terms))
    # Tweedie: alpha noise + beta data = x with noise = -alpha score; and b is what the path makes of the two.
    c = jax.vmap(interpolant.coefficients)(jnp.asarray(TIMES))
    alpha, beta, alpha_dot, beta_dot = (np.asarray(value)[:, None] for value in c[:4])
    np.testing.assert_allclose(beta * denoiser - alpha**2 * score, x, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(beta_dot * denoiser - alpha_dot * alpha * score, b, rtol=1e-8, atol=1e-8)


@functools.cache
def line_density():
    oracle = make("quantile", "linear")
    return jax.jit(jax.vmap(oracle.log_density, (None, None, 0)))


GRID = np.linspace(-9.0, 9.0, 3001)


def integral(values):
    return np.sum(values) * (GRID[1] - GRID[0])


@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
def test_the_density_integrates_to_one(t):
    rho = np.exp(line_density()(params("quantile"), t, GRID[:, None]))
    np.testing.assert_allclose(integral(rho), 1.0, atol=1e-10)


PAIRS = [(0.0, 1.0), (1.0, 0.0), (0.2, 0.9), (0.7, 0.1), (0.0, 0.0), (1.0, 1.0), (0.45, 0.45), (0.3, 0.3001)]
ROWS = np.repeat(np.array([*PAIRS, (0.0, 0.5), (1.0, 0.6)]), 3, axis=0)


@functools.cache
def flow(name, path):
    """v_{s,t}(x) with its derivative along (ds, dt, dx), and b, of many rows."""
    oracle = make(name, path)

    def along(p, s, t, x, ds, dt, dx):
        return jax.jvp(lambda *a: oracle.flow_map.mean_velocity(p, *a), (s, t, x), (ds, dt, dx))

    rows = jax.jit(jax.vmap(along, (None, 0, 0, 0, 0, 0, 0)))
    velocity = jax.jit(jax.vmap(oracle.velocity, (None, 0, 0)))
    p = params(name)
    return (lambda *a: tuple(map(np.asarray, rows(p, *a)))), (lambda t, x: np.asarray(velocity(p, t, x)))


def with_error(along, epsilon):
    """The same map with epsilon sin(x + 2s - 3t) added, which is no flow's."""

    def wrong(s, t, x, ds, dt, dx):
        v, dv = along(s, t, x, ds, dt, dx)
        phase = x + (2 * s - 3 * t)[:, None]
        return v + epsilon * np.sin(phase), dv + epsilon * np.cos(phase) * (dx + (2 * ds - 3 * dt)[:, None])

    return wrong


SOLVED = [(name, path) for name in ("gaussian", "quantile") for path in ("linear", "variance_exploding")]


@pytest.mark.representatives("gaussian-variance_exploding", "mixture-linear")
@pytest.mark.parametrize(("name", "path"), CASES)
def test_maps_densities_and_velocities_agree(name, path):
    solve = 1e-9 if (name, path) in SOLVED else None
    testing.check_oracle(make(name, path), params(name), tolerance=TOLERANCE[name], solve_tolerance=solve)


@pytest.mark.parametrize("name", TOLERANCE)
def test_the_identities_do_not_hold_for_a_map_with_an_error(name):
    along, velocity = flow(name, "linear")
    s, t = ROWS.T
    x = draw(name, "linear", s, 1)
    for identity, residual in residuals(with_error(along, 1e-3), velocity, s, t, x).items():
        assert np.max(np.abs(residual)) > 20 * TOLERANCE[name], identity


def test_a_narrow_event_comes_back_in_its_dtype():
    oracle, p = make("gaussian", "linear"), params("gaussian")
    x = np.array([0.3, -0.8])
    run = jax.jit(lambda x: (oracle.velocity(p, 0.4, x), oracle.flow_map.mean_velocity(p, 0.1, 0.8, x)))
    for narrow, wide in zip(run(jnp.asarray(x, jnp.bfloat16)), run(jnp.asarray(x)), strict=True):
        assert narrow.dtype == jnp.bfloat16
        np.testing.assert_allclose(narrow.astype(jnp.float64), wide, rtol=3e-2, atol=3e-2)


def test_samples_of_a_marginal_have_its_moments():
    oracle, n = make("mixture", "linear"), 20_000
    for t in (0.6, 1.0):
        law = oracle.marginal(params("mixture"), t)
        x = np.asarray(oracle.sample(law, jax.random.key(3), n))
        assert x.shape == (n, 2)
        means = t * MEANS
        covs = (1 - t) ** 2 * np.eye(2) + t**2 * COVS
        second = np.einsum("k,kij->ij", WEIGHTS, covs + means[:, :, None] * means[:, None, :])
        for rows, want in ((x, WEIGHTS @ means), (x[:, :, None] * x[:, None, :], second)):
            error = rows.std(axis=0) / np.sqrt(n)
            assert np.all(np.abs(rows.mean(axis=0) - want) < 4.5 * error)


@pytest.mark.parametrize("precision", [None, 0.5, -0.5], ids=["linear", "narrowing", "widening"])
def test_a_tilt_in_one_dimension_against_quadrature(precision):
    p, a = params("quantile"), 0.8
    tilted, log_z = oracles.tilt(p, [a], None if precision is None else [[precision]])
    reward = a * GRID - 0.5 * (precision or 0.0) * GRID**2
    log_rho = np.asarray(line_density()(p, 1.0, GRID[:, None]))
    np.testing.assert_allclose(log_z, np.log(integral(np.exp(log_rho + reward))), rtol=1e-9)
    got = np.exp(line_density()(tilted, 1.0, GRID[:, None]))
    np.testing.assert_allclose(got, np.exp(log_rho + reward - float(log_z)), rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(np.sum(np.exp(tilted.log_weights)), 1.0, rtol=1e-12)


A, PRECISION = np.array([0.7, -0.4]), np.array([[0.9, 0.3], [0.3, 0.5]])


def log_density(p, x):
    return np.asarray(pointwise("linear")(p, np.ones(len(x)), x)[0])


@pytest.mark.parametrize("precision", [None, PRECISION], ids=["linear", "quadratic"])
def test_a_tilt_in_two_dimensions_pointwise_and_against_importance_weights(precision):
    p = params("mixture")
    tilted, log_z = oracles.tilt(p, A, precision)

    def reward(x):
        return x @ A - (0.0 if precision is None else 0.5 * np.einsum("ni,ij,nj->n", x, precision, x))

    x = draw("mixture", "linear", np.ones(len(TIMES)), 5)
    want = log_density(p, x) + reward(x) - float(log_z)
    np.testing.assert_allclose(log_density(tilted, x), want, rtol=1e-9, atol=1e-9)
    x = np.asarray(make("mixture", "linear").sample(p, jax.random.key(4), 40_000))
    w = np.exp(reward(x) - float(log_z))
    assert abs(w.mean() - 1.0) < 4.5 * w.std() / np.sqrt(len(w))
    mean = np.exp(tilted.log_weights) @ np.asarray(tilted.means)
    # The error of a self-normalised mean is that of w (x - mean).
    rows = w[:, None] * (x - mean)
    assert np.all(np.abs(rows.mean(axis=0)) < 4.5 * rows.std(axis=0) / np.sqrt(len(w)))


def test_the_posterior_is_bayes_rule_and_its_evidence_the_density_of_the_observation():
    p, matrix, y, noise = params("mixture"), np.array([[0.8, -0.5]]), np.array([0.6]), np.array([[0.2]])
    post, evidence = oracles.posterior(p, matrix, y, noise)
    terms = [
        np.log(w) + multivariate_normal(matrix @ m, matrix @ c @ matrix.T + noise).logpdf(y)
        for w, m, c in zip(WEIGHTS, MEANS, COVS, strict=True)
    ]
    np.testing.assert_allclose(evidence, logsumexp(terms), rtol=1e-10)
    x = draw("mixture", "linear", np.ones(len(TIMES)), 6)
    likelihood = np.array([multivariate_normal(matrix @ row, noise).logpdf(y) for row in x])
    want = log_density(p, x) + likelihood - float(evidence)
    np.testing.assert_allclose(log_density(post, x), want, rtol=1e-9, atol=1e-9)


SKEW = np.array([[1.0, 0.5], [0.0, 1.0]])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: oracles.mixture_params([0.5, 0.6], MEANS, COVS), ValueError, "weights: .*sum 1"),
        (lambda: oracles.mixture_params([1.5, -0.5], MEANS, COVS), ValueError, "weights: .*positive"),
        (lambda: oracles.mixture_params(WEIGHTS, MEANS[0], COVS), ValueError, r"means: .*shape \(2, any\)"),
        (lambda: oracles.mixture_params(WEIGHTS, np.inf * MEANS, COVS), ValueError, "means: .*finite"),
        (lambda: oracles.mixture_params(WEIGHTS, MEANS, COVS[:1]), ValueError, "covs: .*shape"),
        (lambda: oracles.mixture_params(WEIGHTS, MEANS, -COVS), ValueError, "covs: .*positive eigenvalues"),
        (lambda: oracles.gaussian_params(MEAN, SKEW), ValueError, "covs: .*symmetric"),
        (lambda: oracles.gaussian_params(0.0, SKEW), ValueError, "mean: .*shape"),
        (
            lambda: make("gaussian", "linear").flow_map.mean_velocity(params("mixture"), 0.0, 1.0, MEAN),
            ValueError,
            r"params.log_weights: .*shape \(1\), got \(2,\)",
        ),
        (
            lambda: make("quantile", "linear").flow_map.mean_velocity(params("mixture"), 0.0, 1.0, MEAN),
            ValueError,
            r"x: .*shape \(1\), got \(2,\)",
        ),
        (lambda: make("mixture", "linear").score(params("mixture"), 0.5, np.ones(3)), ValueError, "x: .*shape"),
        (lambda: make("mixture", "linear").score(params("mixture"), np.ones(2), MEAN), ValueError, "t: .*scalar"),
        (lambda: make("mixture", "linear").score(params("mixture"), 0.5, np.arange(2)), TypeError, "x: .*floating"),
        (lambda: make("mixture", "linear").sample(params("mixture"), jax.random.key(0), 0), ValueError, "n: "),
        (lambda: oracles.tilt(params("mixture"), [1.0]), ValueError, "a: .*shape"),
        (lambda: oracles.tilt(params("mixture"), A, SKEW), ValueError, "precision: .*symmetric"),
        (lambda: oracles.tilt(params("mixture"), A, -9.0 * np.eye(2)), ValueError, "precision: .*finite integral"),
        (lambda: oracles.posterior(params("mixture"), A[None], A, np.eye(1)), ValueError, "observation: .*shape"),
        (
            lambda: oracles.posterior(params("mixture"), A[None], A[:1], -np.eye(1)),
            ValueError,
            "noise_cov: .*positive definite",
        ),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
