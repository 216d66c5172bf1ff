"""Samplers against a Gaussian's closed-form map: exact compositions, moments within their standard errors."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import bases, interpolants, oracles, samplers, types

MEAN, STD = 0.7, 0.4
PATHS = {
    "linear": interpolants.linear(),
    "trigonometric": interpolants.trigonometric(),
    # These two do not end at alpha = 0, and the last does so visibly.
    "variance_preserving": interpolants.variance_preserving(),
    "variance_exploding": interpolants.variance_exploding(sigma_min=0.3),
}
GRID = [0.1, 0.35, 0.6, 1.0]


def moments(path, params, t):
    mean, std = params
    return path.beta(t) * mean, jnp.sqrt(jnp.square(path.alpha(t)) + jnp.square(path.beta(t) * std))


def exact_map(path, domain=types.BOTH):
    """The flow map of data N(mean, std²) in every coordinate: X_{s,t}(x) = m_t + (σ_t/σ_s)(x - m_s)."""

    def jump(params, s, t, x, cond=None, *, key=None):
        (m_s, std_s), (m_t, std_t) = moments(path, params, s), moments(path, params, t)
        return jax.tree.map(lambda leaf: m_t + std_t / std_s * (leaf - m_s), x)

    def velocity(params, t, x, cond=None, *, key=None):
        return jax.jvp(lambda u: jump(params, t, u, x), (t,), (jnp.ones_like(t),))[1]

    def mean_velocity(params, s, t, x, cond=None, *, key=None):
        raise AssertionError("the overrides should have been called")

    return types.FlowMap(mean_velocity, domain, jump_override=jump, velocity_override=velocity)


def bound_map(path, domain=types.BOTH):
    return exact_map(path, domain).bind((jnp.float64(MEAN), jnp.float64(STD)))


def start(path, key, n, grid=GRID):
    mean, std = moments(path, (MEAN, STD), jnp.float64(grid[0]))
    return mean + std * jax.random.normal(key, (n,), jnp.float64)


def assert_moments(samples, mean, std):
    """Mean, standard deviation and kurtosis of normal samples, each within four standard errors."""
    n = samples.size
    scaled = (np.asarray(samples) - float(mean)) / float(std)
    assert abs(scaled.mean()) < 4 / np.sqrt(n)
    assert abs(np.mean(scaled**2) - 1) < 4 * np.sqrt(2 / n)
    assert abs(np.mean(scaled**4) - 3) < 4 * np.sqrt(96 / n)


# ---- jumps ----


def test_jumps_compose_to_the_one_jump_of_an_exact_map():
    path, x = PATHS["trigonometric"], {"a": jnp.array([0.3, -1.0]), "b": jnp.array(2.0)}
    bound = bound_map(path)
    states = samplers.jumps_path(bound, x, GRID)
    for k, t in enumerate(GRID):
        one = bound.jump(jnp.float64(GRID[0]), jnp.float64(t), x)
        jax.tree.map(lambda path, leaf, k=k: np.testing.assert_allclose(path[k], leaf, rtol=1e-12), states, one)
    end = samplers.jumps(bound, x, GRID)
    jax.tree.map(lambda path, leaf: np.testing.assert_array_equal(path[-1], leaf), states, end)
    jitted = jax.jit(lambda b, z: samplers.jumps(b, z, samplers.uniform_grid(3)))(bound, x)
    np.testing.assert_allclose(jitted["a"], bound.jump(jnp.float64(0), jnp.float64(1), x)["a"], rtol=1e-12)


def test_jumps_take_the_times_of_the_grid_in_order_with_a_key_each():
    def mean_velocity(params, s, t, x, cond=None, *, key=None):
        # The state after each jump encodes its times.
        noise = 0.0 if key is None else jax.random.normal(key, (), jnp.float64)
        return (cond * x + s + 10 * t + noise) / (t - s)

    bound = types.FlowMap(mean_velocity, types.BOTH).bind(None)
    got = samplers.jumps(bound, jnp.float64(1.0), [0.0, 0.25, 1.0], jnp.float64(-0.5))
    np.testing.assert_allclose(got, 0.5 * (0.5 * 1.0 + 2.5) + 10.25)
    keyed = samplers.jumps(bound, jnp.float64(1.0), [0.0, 0.25, 1.0], jnp.float64(-0.5), key=jax.random.key(0))
    keys = (jax.random.fold_in(jax.random.key(0), k) for k in range(2))
    first, second = (jax.random.normal(k, (), jnp.float64) for k in keys)
    np.testing.assert_allclose(keyed, got + 0.5 * first + second)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_narrow_states_get_times_in_float32_and_keep_their_dtype(dtype):
    def mean_velocity(params, s, t, x, cond=None, *, key=None):
        assert s.dtype == t.dtype == jnp.float32
        return -x

    bound = types.FlowMap(mean_velocity).bind(None)
    got = samplers.jumps(bound, jnp.ones(2, dtype), samplers.uniform_grid(2))
    assert got.dtype == dtype
    np.testing.assert_allclose(got.astype(jnp.float32), 0.25)


def test_jumps_outside_the_domain_are_refused():
    forward, to_data = bound_map(PATHS["linear"], types.FORWARD), bound_map(PATHS["linear"], types.TO_DATA)
    x = jnp.zeros(2)
    with pytest.raises(ValueError, match=r"jump from 1 to 0\.5"):
        samplers.jumps(forward, x, [1.0, 0.5])
    with pytest.raises(ValueError, match=r"jump from 0 to 0\.5"):
        samplers.jumps(to_data, x, [0.0, 0.5, 1.0])
    with pytest.raises(ValueError, match=r"jump from 0 to 1\.5"):
        samplers.jumps(forward, x, [0.0, 1.5])
    with pytest.raises(ValueError, match="grid"):
        samplers.jumps(forward, x, [0.5])
    with pytest.raises(TypeError, match="x0: expected floating-point"):
        samplers.jumps(forward, jnp.arange(2), [0.0, 1.0])
    # Concrete under jit as well, for a grid that is not traced.
    with pytest.raises(ValueError, match="outside"):
        jax.jit(lambda z: samplers.jumps(forward, z, samplers.uniform_grid(2)[::-1]))(x)


def test_uniform_grid():
    np.testing.assert_array_equal(samplers.uniform_grid(4), [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_array_equal(samplers.uniform_grid(2, start=1.0, end=0.0), [1, 0.5, 0])
    with pytest.raises(ValueError, match="steps"):
        samplers.uniform_grid(0)
    with pytest.raises(ValueError, match="end"):
        samplers.uniform_grid(2, end=1.1)


# ---- re-noising ----


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
    law = oracle.marginal(params, jnp.float64(grid[-1]))
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
    one, two = (
        samplers.renoise(
            still, x, [0.0, 0.3, 0.6], key=jax.random.key(5), interpolant=path, kappa=0.5, base=bases.Normal(std=std)
        )
        for std in (1.0, 2.0)
    )
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


# ---- SDE, encoding ----


def test_encode_inverts_and_falls_back_on_a_solve_saying_so():
    path, x = PATHS["trigonometric"], jnp.array([0.9, 0.1])
    both, forward = bound_map(path), bound_map(path, types.FORWARD)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        noise = samplers.encode(both, x, [1.0, 0.4, 0.0])
    np.testing.assert_allclose(samplers.jumps(both, noise, [0.0, 0.7, 1.0]), x, rtol=1e-10)
    with pytest.warns(UserWarning, match="no backward direction: its diagonal is solved"):
        solved = samplers.encode(forward, x, [1.0, 0.4, 0.0])
    np.testing.assert_allclose(solved, noise, rtol=1e-6)
    with pytest.raises(ValueError, match="descending"):
        samplers.encode(both, x, [0.0, 1.0])
    # Options of a solve are refused if there is no solve.
    with pytest.raises(ValueError, match="rtol: expected none for a map whose domain goes backward"):
        samplers.encode(both, x, [1.0, 0.0], rtol=1e-3)


# ---- the registry ----


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_every_sampler_keeps_the_marginal_alone_or_in_a_batch_jitted_or_not(name, compilations):
    path, n = PATHS["linear"], 4000
    grid = np.linspace(0.25, 0.75, 41 if name == "sde" else 4)
    start_key, key = jax.random.split(jax.random.key(8))
    x = start(path, start_key, n, grid)
    # Neither a solve nor a jump is needed for the SDE: the diagonal is all that it may call.
    bound = bound_map(path, types.TO_DATA if name in ("consistency", "sde") else types.FORWARD)
    sampler = samplers.SAMPLERS[name](bound, path)
    run = jax.jit(jax.vmap(lambda k, z: samplers.run(sampler, k, z, grid)))
    got = run(jax.random.split(jax.random.clone(key), n), x)
    assert_moments(got, *moments(path, (MEAN, STD), jnp.float64(0.75)))
    first = samplers.run(sampler, jax.random.split(key, n)[0], x[0], grid)
    np.testing.assert_allclose(first, got[0], rtol=1e-9)
    assert np.corrcoef(x, got)[0, 1] > 0.999 if name == "jumps" else np.corrcoef(x, got)[0, 1] < 0.95
    keys = jax.random.split(jax.random.key(9), n)
    compilations.clear()
    run(keys, x)
    assert not compilations
