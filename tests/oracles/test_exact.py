"""The oracles against mathematics: densities, transport, the identities of the flow, samples."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from jflow import interpolants, testing
from jflow.testing.maps import residuals
from tests.oracles.cases import CASES, COVS, MEAN, MEANS, WEIGHTS, draw, make, params, pointwise

# Residuals that are rounding, or the tolerance of the solve times what differentiation makes of it.
TOLERANCE = {"gaussian": 1e-8, "quantile": 1e-7, "mixture": 1e-6}
TIMES = np.array([0.0, 0.0, 0.1, 0.3, 0.3, 0.5, 0.7, 0.9, 1.0, 1.0])


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


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
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
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
