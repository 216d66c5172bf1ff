"""``draw``: samples of their own keys, whatever the block and the devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import bases, interpolants, oracles, samplers, sharding, types

PATH = interpolants.trigonometric()
ORACLE = oracles.gaussian(PATH)
PARAMS = oracles.gaussian_params([0.7, -0.4], [[0.3, 0.1], [0.1, 0.2]])
BOUND = ORACLE.flow_map.bind(PARAMS)
GRID = [0.1, 0.35, 0.6, 1.0]
SAMPLERS = {
    "jumps": samplers.Jumps(BOUND),
    "renoise": samplers.Renoise(BOUND, PATH, kappa=0.5, base=bases.Normal(0.2, np.array([0.5, 1.5]))),
    "consistency": samplers.Renoise(BOUND, PATH, kappa=1.0),
    "euler": samplers.SDE(BOUND, PATH),
    "heun": samplers.SDE(BOUND, PATH, method="heun", diffusion=0.5),
}
DRAWN = {name: SAMPLERS[name] for name in ("jumps", "renoise", "heun")}
LIKE = jax.ShapeDtypeStruct((2,), jnp.float64)


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAWN)
def test_draws_are_the_same_whatever_the_block_and_the_devices(name):
    sampler, key, n = DRAWN[name], jax.random.key(14), 37
    whole = samplers.draw(sampler, key, n, GRID, like=LIKE)
    assert isinstance(whole, np.ndarray) and whole.shape == (n, 2) and len(np.unique(whole[:, 0])) == n
    for block, mesh in ((8, None), (1, None), (16, sharding.mesh()), (5, sharding.mesh(fsdp=2)), (64, sharding.mesh())):
        found = samplers.draw(sampler, key, n, GRID, like=LIKE, block=block, mesh=mesh)
        np.testing.assert_allclose(found, whole, rtol=1e-12)
    np.testing.assert_allclose(samplers.draw(sampler, key, 5, GRID, like=LIKE), whole[:5], rtol=1e-12)
    # The same steps by hand.
    base_key, sampler_key = jax.random.split(jax.random.fold_in(key, 36))
    x0 = getattr(sampler, "base", bases.STANDARD_NORMAL).sample(base_key, LIKE)
    np.testing.assert_allclose(samplers.run(sampler, sampler_key, x0, GRID), whole[36], rtol=1e-12)


def test_draw_gives_each_sample_its_condition_and_its_base_point_and_compiles_once():
    traced = []

    def labelled(params, s, t, x, cond=None, *, key=None):
        traced.append(None)
        return x * 0.0 + cond + params

    flow_map, n = types.FlowMap(labelled, types.BOTH), 11
    labels, x0 = jnp.arange(n), np.linspace(0.0, 1.0, n)[:, None]
    for params in (1, 2):
        # Another n, and another grid of the same length, need no other program either.
        for count, grid in ((n, [0.0, 1.0]), (9, [0.0, 0.5])):
            bound = flow_map.bind(jnp.float64(params))
            cond = labels[:count].astype(jnp.float64)
            found = samplers.draw(samplers.Jumps(bound), jax.random.key(0), count, grid, cond, x0=x0[:count], block=4)
            want = x0[:count] + grid[1] * (np.arange(count)[:, None] + params)
            np.testing.assert_allclose(found, want, rtol=1e-12)
    once = len(traced)
    samplers.draw(samplers.Jumps(bound), jax.random.key(0), n, [0.0, 1.0], labels.astype(float), x0=x0, block=4)
    assert len(traced) == once <= 2


def test_draw_refuses():
    sampler, key = SAMPLERS["jumps"], jax.random.key(0)
    for arguments, error, message in (
        ({}, ValueError, "like, x0: expected one of them"),
        ({"like": LIKE, "x0": jnp.zeros((3, 2))}, ValueError, "like, x0: expected one of them"),
        (
            {"x0": jnp.zeros((4, 2))},
            ValueError,
            r"x0: expected leaves with a leading axis of n = 3, got shape \(4, 2\)",
        ),
        ({"x0": jnp.zeros((3, 2)), "base": bases.Normal()}, ValueError, "base: expected none beside x0"),
        ({"like": LIKE, "cond": jnp.zeros(4)}, ValueError, "cond: expected leaves with a leading axis of n = 3"),
        ({"like": LIKE, "base": 1.0}, TypeError, "base: expected a base"),
        ({"like": jnp.zeros(2, int)}, TypeError, "like: expected floating"),
        ({"x0": jnp.zeros((3, 2), int)}, TypeError, "x0: expected floating"),
        ({"like": LIKE, "block": 0}, ValueError, "block: "),
    ):
        with pytest.raises(error, match=message):
            samplers.draw(sampler, key, 3, GRID, **arguments)
    with pytest.raises(ValueError, match=r"grid: the jump from 1 to 1\.5"):
        samplers.draw(sampler, key, 3, [1.0, 1.5], like=LIKE)
    with pytest.raises(ValueError, match="n: "):
        samplers.draw(sampler, key, 0, GRID, like=LIKE)
    with pytest.raises(ValueError, match="grid: expected concrete"):
        jax.jit(lambda grid: samplers.draw(sampler, key, 3, grid, like=LIKE))(jnp.array(GRID))
