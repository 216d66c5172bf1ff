"""Mixtures against quadrature, importance weights and Bayes' rule: densities, tilts, posteriors, and refusals."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from jflow import oracles
from tests.oracles.cases import COVS, MEAN, MEANS, WEIGHTS, draw, make, params, pointwise


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

    x = draw("mixture", "linear", np.ones(10), 5)
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
    x = draw("mixture", "linear", np.ones(10), 6)
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
