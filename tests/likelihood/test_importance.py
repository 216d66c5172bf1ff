"""Importance weights against expectations in closed form, and the bias of weights from an estimated divergence."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import bases, likelihood
from jflow.types import FlowMap

# The target is 5 times a normal density of mean 0.8 and deviation 0.6, the sampler a standard normal.
MEAN, SPREAD, LOG_Z = 0.8, 0.6, np.log(5.0)
# Jitted: eager, each would compile operation by operation.
normalised, expectation = jax.jit(likelihood.normalised), jax.jit(likelihood.expectation)


def log_normal(x, mean, spread):
    return -0.5 * ((x - mean) / spread) ** 2 - np.log(spread) - 0.5 * np.log(2 * np.pi)


def draw(seed, n):
    x = np.random.default_rng(seed).normal(size=n)
    return x, normalised(LOG_Z + log_normal(x, MEAN, SPREAD), log_normal(x, 0.0, 1.0))


def test_expectations_and_the_normaliser_are_within_their_errors():
    x, found = draw(0, 20_000)
    assert found.weights.shape == x.shape
    np.testing.assert_allclose(jnp.sum(found.weights), 1.0, rtol=1e-12)
    assert abs(found.log_z - LOG_Z) < 4 * found.log_z_error < 0.05
    values = np.stack([x, (x - MEAN) ** 2], axis=1)
    mean, error = expectation(found.weights, values)
    assert np.all(np.abs(mean - np.array([MEAN, SPREAD**2])) < 4 * error) and np.all(error < 0.02)
    # Without weights, or with their inverse, it is another law's.
    assert abs(x.mean() - MEAN) > 40 * error[0]


def test_the_errors_are_the_spread_over_repetitions():
    """Both delta-method errors against 400 runs; the spread of 400 is itself known to 3.5 %."""

    def run(x):
        weights, log_z, log_z_error = likelihood.normalised(log_normal(x, MEAN, SPREAD), log_normal(x, 0.0, 1.0))
        return (log_z, *likelihood.expectation(weights, x)), log_z_error

    x = np.random.default_rng(1).normal(size=(400, 1000))
    (log_z, mean, error), log_z_error = jax.jit(jax.vmap(run))(x)
    np.testing.assert_allclose(np.mean(log_z_error), np.std(log_z), rtol=0.15)
    np.testing.assert_allclose(np.mean(error), np.std(mean), rtol=0.15)


def test_the_effective_sample_size():
    np.testing.assert_allclose(likelihood.effective_sample_size(jnp.full(7, 0.3)), 7.0)
    np.testing.assert_allclose(likelihood.effective_sample_size(jnp.asarray([0.0, 2.0, 0.0])), 1.0)
    np.testing.assert_allclose(likelihood.effective_sample_size(jnp.asarray([3.0, 1.0])), 16.0 / 10.0)


def test_constants_cancel_and_a_target_may_vanish():
    x, found = draw(2, 50)
    target, sampler = log_normal(x, MEAN, SPREAD), log_normal(x, 0.0, 1.0)
    moved = normalised(target - 2000.0, sampler + 1000.0)
    np.testing.assert_allclose(moved.weights, found.weights, rtol=1e-9)
    np.testing.assert_allclose(moved.log_z, found.log_z - LOG_Z - 3000.0, rtol=1e-12)
    cut = normalised(np.where(x > 0, target, -np.inf), sampler)
    kept = np.where(x > 0, found.weights, 0.0)
    np.testing.assert_allclose(cut.weights, kept / kept.sum(), rtol=1e-12)
    equal = normalised(np.zeros(3), np.zeros(3))
    np.testing.assert_allclose(equal.log_z_error, 0.0, atol=1e-8)


def test_weights_of_the_sampler_that_ran_are_right_and_of_one_probe_biased(assert_mean):
    """One linear velocity, b = A x: the sampler's law N(0, e^A e^A') and its density are known.

    With the exact divergence E[weight] = 1 under the true law. With one probe the mean weight, an estimate of Z = 1, is too
    high by E exp(z'Az - tr A), although the log-density is right in the mean.
    """
    matrix = jnp.asarray([[0.3, 0.9], [0.2, -0.5]])

    def velocity(params, t, x, cond=None, *, key=None):
        return matrix @ x

    def run(divergence, x0, key):
        return likelihood.along_ode(velocity, divergence, steps=8).push(None, x0, key=key).log_density

    @jax.jit
    @jax.vmap
    def densities(x, key):
        true = bases.STANDARD_NORMAL.log_density(x) - jnp.trace(matrix)
        return true, run(None, x, None), run(likelihood.hutchinson(), x, key)

    x0 = np.random.default_rng(0).normal(size=(4000, 2))
    true, exact, estimated = map(np.asarray, densities(x0, jax.random.split(jax.random.key(1), 4000)))
    np.testing.assert_allclose(exact, true, rtol=0, atol=1e-9)
    # Of signs, z'Az - tr A = +-(0.9 + 0.2): cosh of it is the factor, for densities and for weights alike.
    assert_mean(estimated - true, 0.0)
    for ratio in (np.exp(estimated - true), np.exp(true - estimated)):
        assert_mean(ratio, np.cosh(1.1))
        assert ratio.mean() - 1.0 > 8 * ratio.std() / np.sqrt(len(ratio))
    found = normalised(true, estimated)
    assert found.log_z > 8 * found.log_z_error


@pytest.mark.parametrize("turn", [0.0, 1.2])
def test_weights_with_the_sign_are_unbiased_where_the_map_folds(turn, assert_mean):
    """X(x) = x + 1.6 turn (sin 2x_0, 0) folds space where 1 + 3.2 turn cos 2x_0 < 0; the target is a normal one beside 0."""
    mean = jnp.asarray([MEAN, 0.0])

    def mean_velocity(params, s, t, x, cond=None, *, key=None):
        return 1.6 * turn * jnp.stack([jnp.sin(2.0 * x[0]), jnp.zeros(())])

    bound = FlowMap(mean_velocity).bind(None)

    @jax.jit
    @jax.vmap
    def draw(x0):
        found = likelihood.push(bound, x0, np.array([0.0, 1.0]))
        target = jnp.sum(log_normal(found.x, mean, SPREAD))
        return found, target

    found, target = jax.tree.map(np.asarray, draw(np.random.default_rng(2).normal(size=(40_000, 2))))
    folded = np.mean(found.sign < 0)
    assert np.all(found.valid == (found.sign > 0)) and (0.2 < folded < 0.8 if turn else folded == 0.0)
    w = np.exp(target - found.log_density)
    values = np.stack([np.ones(len(w)), found.x[:, 0], found.x[:, 0] ** 2, found.x[:, 1] ** 2], axis=1)
    exact = np.array([1.0, MEAN, MEAN**2 + SPREAD**2, SPREAD**2])
    assert_mean((found.sign * w)[:, None] * values, exact)
    weights = normalised(target, found.log_density, found.sign)
    estimate, error = expectation(weights.weights, values)
    assert np.all(np.abs(estimate - exact)[1:] < 4 * error[1:]) and abs(weights.log_z) < 4 * weights.log_z_error
    if turn:
        # Without it each branch counts.
        assert np.mean(w) > 1.0 + 8 * np.std(w) / np.sqrt(len(w))


def test_signs_sum_to_the_degree_of_the_map(assert_mean):
    """x + softplus(-2x) comes back from infinity: it has degree 0, no point has one preimage, and the weights know it."""

    def mean_velocity(params, s, t, x, cond=None, *, key=None):
        return jax.nn.softplus(-2.0 * x)

    bound = FlowMap(mean_velocity).bind(None)
    draw = jax.jit(jax.vmap(lambda x0: likelihood.push(bound, x0, np.array([0.0, 1.0]))))
    found = draw(jax.random.normal(jax.random.key(3), (20_000, 1)))
    w = np.exp(log_normal(found.x[:, 0], MEAN, 0.3) - found.log_density)
    assert_mean(found.sign * w, 0.0)
    assert abs(np.mean(w)) > 0.1


def test_a_sample_without_sign_is_drawn_and_has_no_weight():
    x, sign = np.random.default_rng(4).normal(size=50), np.ones(50)
    sign[:10] = 0.0
    target, sampler = LOG_Z + log_normal(x, MEAN, SPREAD), log_normal(x, 0.0, 1.0)
    target[0], sampler[1] = 2000.0, -2000.0
    some = normalised(target, sampler, sign)
    few = normalised(target[10:], sampler[10:])
    np.testing.assert_allclose(some.weights, np.append(np.zeros(10), few.weights), rtol=1e-12)
    np.testing.assert_allclose(some.log_z, few.log_z + np.log(40 / 50), rtol=1e-12)
    # Narrow densities with a wide sign keep their dtype.
    narrow = normalised(target.astype(np.float32), sampler.astype(np.float32), sign)
    assert narrow.weights.dtype == np.float32


TWO = np.array([0.5, 0.5])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: likelihood.normalised(np.arange(2), TWO), TypeError, "log_target: expected floating"),
        (lambda: likelihood.normalised(TWO, np.arange(2)), TypeError, "log_sampler: expected floating"),
        (lambda: likelihood.normalised(TWO[None], TWO), ValueError, r"log_target: .*\(any\), got \(1, 2\)"),
        (lambda: likelihood.normalised(TWO, TWO[:1]), ValueError, r"log_sampler: .*\(2\), got \(1,\)"),
        (lambda: likelihood.normalised(TWO[:0], TWO[:0]), ValueError, "log_target: expected at least one"),
        (lambda: likelihood.normalised(TWO + np.nan, TWO), ValueError, "log_target: expected numbers.*nan"),
        (lambda: likelihood.normalised(TWO - np.inf, TWO), ValueError, "log_target: .*not everywhere"),
        (lambda: likelihood.normalised(TWO, TWO - np.inf), ValueError, "log_sampler: expected finite numbers"),
        (lambda: likelihood.normalised(TWO, TWO, TWO[:1]), ValueError, r"sign: .*\(2\), got \(1,\)"),
        (lambda: likelihood.normalised(TWO, TWO, -2 * TWO), ValueError, "sign: expected weights of a positive sum"),
        (lambda: likelihood.normalised(TWO, TWO, TWO), ValueError, "sign: expected 1, 0 or -1"),
        (lambda: likelihood.normalised(TWO, TWO, np.arange(2)), TypeError, "sign: expected floating"),
        (lambda: likelihood.effective_sample_size(TWO[None]), ValueError, "weights: expected an array of shape"),
        (
            lambda: likelihood.effective_sample_size(-TWO),
            ValueError,
            "weights: expected finite numbers of a positive sum",
        ),
        (lambda: likelihood.effective_sample_size(0 * TWO), ValueError, "weights: .*positive sum"),
        (lambda: likelihood.expectation(TWO + np.nan, TWO), ValueError, "weights: .*nan"),
        (lambda: likelihood.expectation(TWO, np.zeros((3, 2))), ValueError, r"values: .*axis of 2.*\(3, 2\)"),
        (lambda: likelihood.expectation(TWO, np.arange(2)), TypeError, "values: expected floating"),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_traced_nonsense_is_nan():
    found = jax.jit(likelihood.normalised)(TWO - np.inf, TWO)
    assert np.all(np.isnan(found.weights)) and np.isnan(found.log_z_error)
