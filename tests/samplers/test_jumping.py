"""Jumps and encoding against a Gaussian's closed-form map: exact compositions and moments."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import samplers, types
from tests.samplers.gaussian_map import GRID, MEAN, PATHS, STD, assert_moments, bound_map, moments, start


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


@pytest.mark.representatives("renoise", "sde")
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
