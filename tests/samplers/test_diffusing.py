"""The sampler of the SDE: its path, its steps against those of the solvers, and small steps of narrow states."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import samplers, solvers, types
from tests.samplers.gaussian_oracle import BOUND, GRID, PARAMS, PATH, X


def test_sde_returns_its_path_and_keeps_small_steps_of_narrow_states():
    path = jax.jit(lambda key: samplers.sde_path(BOUND, X, GRID, key=key, interpolant=PATH))(jax.random.key(9))
    assert path.shape == (4, 2)
    end = samplers.sde(BOUND, X, GRID, key=jax.random.key(9), interpolant=PATH)
    np.testing.assert_allclose(path[-1], end, rtol=1e-12)
    # A thousand steps of 1e-3 from 1, each below half a unit of bfloat16's last place.
    drifts = types.FlowMap(lambda p, s, t, x, c=None, *, key=None: jnp.ones_like(x)).bind(None)
    grid = samplers.uniform_grid(1000)
    one = jnp.ones(2, jnp.bfloat16)
    still = samplers.sde(drifts, one, grid, key=jax.random.key(0), interpolant=PATH, diffusion=0.0)
    assert still.dtype == jnp.bfloat16
    np.testing.assert_allclose(still.astype(jnp.float32), 2.0, rtol=1e-2)


@pytest.mark.representatives("heun")
@pytest.mark.parametrize("method", ["euler", "heun"])
def test_the_sde_sampler_steps_as_the_sde_of_the_solvers(method):
    sampler, key = samplers.SDE(BOUND, PATH, method=method), jax.random.key(10)
    simulate = solvers.sde(BOUND.flow_map.velocity, PATH, method=method)
    # The increments depend on the key and the times, so that one key may serve every step.
    state = sampler.init(X, GRID[0])
    for t in GRID[1:]:
        state, _ = sampler.step(key, state, t)
    np.testing.assert_allclose(state.x, simulate(PARAMS, key, jnp.asarray(GRID), X), rtol=1e-12)
