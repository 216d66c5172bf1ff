"""Renoising against a Gaussian's closed-form map: moments within their standard errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import bases, oracles, samplers, types
from tests.samplers.gaussian_map import GRID, MEAN, PATHS, STD, assert_moments, bound_map, moments, start


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_plan_solves_its_equations(name, dtype):
    path, times = PATHS[name], jnp.array([1e-3, 0.2, 0.5, 0.9, 0.999, 1.0], dtype)
    tolerance = 1e-9 if dtype == jnp.float64 else 5e-4

    @jax.jit
    def plan_and_path(kappa):
        plan = samplers.renoise_plan(path, times, kappa)
        return plan, path.alpha(times), path.beta(times), path.alpha(plan.target), path.beta(plan.target)

    end = path.endpoints[2] / path.endpoints[3]
    for kappa in (0.0, 1e-3, 0.3, 0.8, 1.0):
        results = plan_and_path(kappa)
        assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(results))
        (target, shrink, noise, shift), alpha, beta, alpha_target, beta_target = jax.tree.map(np.asarray, results)
        # The mean of the data and the variance of the noise at t are right for any state before.
        np.testing.assert_allclose(shrink * beta_target, beta, rtol=tolerance)
        variance = (shrink * alpha_target) ** 2 + noise**2
        np.testing.assert_allclose(variance, alpha**2, rtol=tolerance, atol=1e-12)
        # The shift is the part of the base's mean that the shrunk state lacks.
        np.testing.assert_allclose(shrink * alpha_target + shift, alpha, rtol=tolerance, atol=1e-12)
        wanted = (1 - kappa**2) ** 0.5 * alpha / beta
        np.testing.assert_allclose(alpha_target / beta_target, np.maximum(wanted, end), rtol=tolerance, atol=tolerance)
        reached = (wanted >= end) & (np.asarray(times) < 1)
        np.testing.assert_allclose(noise[reached], kappa * alpha[reached], rtol=1e-6)
        assert noise[-1] == 0.0 and target[-1] == 1.0
        if kappa in (0.0, 1.0):
            np.testing.assert_array_equal(target, times if kappa == 0.0 else np.ones(6))


@pytest.mark.representatives("variance_exploding", "trigonometric")
@pytest.mark.parametrize("name", PATHS)
def test_renoise_keeps_the_marginal(name):
    path, n = PATHS[name], 40_000
    start_key, *keys = jax.random.split(jax.random.key(1), 4)
    bound, x = bound_map(path), start(path, start_key, n)
    run = jax.jit(
        jax.vmap(
            lambda k, z, kappa: samplers.renoise_path(bound, z, GRID, key=k, interpolant=path, kappa=kappa),
            (0, 0, None),
        )
    )
    for key, kappa in zip(keys, (0.0, 0.5, 1.0), strict=True):
        states = np.asarray(run(jax.random.split(key, n), x, kappa))
        for k in (2, 3):
            assert_moments(states[:, k], *moments(path, (MEAN, STD), jnp.float64(GRID[k])))
        # kappa controls how much of the start is forgotten.
        correlation = np.corrcoef(x, states[:, 2])[0, 1]
        assert correlation > 1 - 1e-9 if kappa == 0 else correlation < 0.97


WRONG_PLANS = {
    "noise of kappa instead of kappa alpha": lambda plan, t: plan._replace(noise=plan.noise / (1 - t)),
    "a jump to t itself": lambda plan, t: plan._replace(target=t, shrink=jnp.ones_like(t)),
}


@pytest.mark.parametrize("wrong", WRONG_PLANS)
def test_a_wrong_renoising_is_seen_by_the_same_moments(wrong, monkeypatch):
    path, n, right = PATHS["linear"], 40_000, samplers.renoise_plan
    wrongly = lambda p, t, k: WRONG_PLANS[wrong](right(p, t, k), t)  # noqa: E731
    monkeypatch.setattr(samplers.renoising, "renoise_plan", wrongly)
    start_key, key = jax.random.split(jax.random.key(2))
    bound, x = bound_map(path), start(path, start_key, n)
    run = jax.jit(jax.vmap(lambda k, z: samplers.renoise(bound, z, GRID[:3], key=k, interpolant=path, kappa=0.5)))
    got = run(jax.random.split(key, n), x)
    with pytest.raises(AssertionError):
        assert_moments(got, *moments(path, (MEAN, STD), jnp.float64(GRID[2])))


def test_renoise_of_an_asymmetric_mixture_keeps_its_third_moment():
    """On a map that is not affine, the exact one by quantiles."""
    path, n, grid = PATHS["linear"], 6000, [0.2, 0.4, 0.7]
    oracle = oracles.quantile(path)
    params = oracles.mixture_params([0.8, 0.2], [[-0.5], [2.0]], [[0.01], [0.04]])
    start_key, key = jax.random.split(jax.random.key(3))
    x = oracle.sample(oracle.marginal(params, jnp.float64(grid[0])), start_key, n)
    bound = oracle.flow_map.bind(params)
    run = jax.jit(jax.vmap(lambda k, z: samplers.renoise(bound, z, grid, key=k, interpolant=path, kappa=0.6)))
    got = np.asarray(run(jax.random.split(key, n), x))
    law = jax.device_get(oracle.marginal(params, jnp.float64(grid[-1])))
    weights, means, variances = np.exp(law.log_weights), law.means[:, 0], law.variances[:, 0]
    mean = np.sum(weights * means)
    offset = means - mean
    second, third = np.sum(weights * (variances + offset**2)), np.sum(weights * (offset**3 + 3 * offset * variances))
    for power, expected in ((1, 0.0), (2, second), (3, third)):
        values = (got - mean) ** power
        assert abs(values.mean() - expected) < 4 * values.std() / np.sqrt(n)


def test_renoise_without_noise_is_jumps_and_with_all_of_it_needs_only_jumps_to_data():
    path, x = PATHS["linear"], jnp.array([0.4, -0.2])
    bound = bound_map(path, types.FORWARD)
    plain = samplers.jumps(bound, x, GRID)
    np.testing.assert_array_equal(
        samplers.renoise(bound, x, GRID, key=jax.random.key(4), interpolant=path, kappa=0.0), plain
    )
    to_data = bound_map(path, types.TO_DATA)
    assert jnp.all(jnp.isfinite(samplers.renoise(to_data, x, GRID, key=jax.random.key(4), interpolant=path, kappa=1.0)))
    with pytest.raises(ValueError, match="outside the map's domain, t = 1 only"):
        samplers.renoise(to_data, x, GRID, key=jax.random.key(4), interpolant=path, kappa=0.5)
    with pytest.raises(ValueError, match="outside the map's domain, t = 1 only"):
        jax.jit(lambda k, z: samplers.renoise(to_data, z, GRID, key=k, interpolant=path, kappa=0.5))(
            jax.random.key(4), x
        )


def test_renoise_scales_with_the_base_and_draws_every_leaf_anew():
    path, x = PATHS["linear"], {"a": jnp.zeros(3), "b": jnp.zeros(3)}
    still = types.FlowMap(lambda p, s, t, x, c=None, *, key=None: jax.tree.map(jnp.zeros_like, x)).bind(None)

    @jax.jit
    def run(key, std):
        base = bases.Normal(std=std)
        return samplers.renoise(still, x, [0.0, 0.3, 0.6], key=key, interpolant=path, kappa=0.5, base=base)

    one, two = (run(jax.random.key(5), std) for std in (1.0, 2.0))
    np.testing.assert_allclose(two["a"], 2 * one["a"], rtol=1e-12)
    values = np.concatenate([one["a"], one["b"]])
    assert len(np.unique(values)) == 6
    traced = jax.jit(
        lambda grid, kappa: samplers.renoise(still, x, grid, key=jax.random.key(5), interpolant=path, kappa=kappa)
    )
    np.testing.assert_allclose(traced(jnp.array([0.0, 0.3, 0.6]), jnp.float64(0.5))["a"], one["a"], rtol=1e-12)


def test_bad_renoise_arguments():
    path, x = PATHS["linear"], jnp.zeros(2)
    bound = bound_map(path)
    for kappa in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="kappa"):
            samplers.renoise(bound, x, GRID, key=jax.random.key(6), interpolant=path, kappa=kappa)
    with pytest.raises(ValueError, match="kappa: expected a scalar"):
        samplers.renoise(bound, x, GRID, key=jax.random.key(6), interpolant=path, kappa=jnp.ones(3))
    for grid in ([1.0, 0.0], [0.0, 0.5, 0.5]):
        with pytest.raises(ValueError, match="ascending"):
            samplers.renoise(bound, x, grid, key=jax.random.key(6), interpolant=path, kappa=0.5)
