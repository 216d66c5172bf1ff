"""The density of samplers that add noise: against the sampler's own law in closed form, and weights that are unbiased."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import interpolants, likelihood, oracles, samplers
from jflow.types import BOTH, FlowMap

PATH = interpolants.linear()
BELL = oracles.gaussian_params([0.7, -0.4], [[0.3, 0.1], [0.1, 0.2]])
GRID = (0.0, 0.4, 0.7, 1.0)
DIM = 2


def bent(oracle):
    """The exact map of a Gaussian with another after it, which is no flow's: a wrong map of known density."""

    def jump(params, s, t, x, cond=None, *, key=None):
        y = oracle.flow_map.jump(params, s, t, x)
        return y + 0.3 * (t - s) * jnp.sin(y[::-1])

    def mean_velocity(params, s, t, x, cond=None, *, key=None):
        return (jump(params, s, t, x) - x) / (t - s)

    return FlowMap(mean_velocity, BOTH, jump_override=jump)


def drawn(bound, count, kappa, key, grid=GRID):
    """The samples and their density given the batch, the batch, and the density of their states."""
    noise_key, sample_key = jax.random.split(key)
    x0, keys = jax.random.normal(noise_key, (count, DIM)), jax.random.split(sample_key, count)
    found = likelihood.renoised(bound, x0, grid, keys=keys, interpolant=PATH, kappa=kappa)
    pushed = jax.vmap(lambda x: likelihood.push(bound, x, jnp.asarray(grid[-2:]), base=found.base))(found.states)
    return x0, keys, pushed, found.base


@pytest.mark.slow
@pytest.mark.parametrize("kappa", [0.6, 1.0])
def test_the_samples_are_those_of_the_sampler_and_the_density_tends_to_its_law(kappa):
    """With the exact map that law is the data's; the density at fixed points, and of samples, as the batch grows."""
    oracle = oracles.gaussian(PATH)
    bound = oracle.flow_map.bind(BELL)
    log_p = jax.vmap(lambda x: oracle.log_density(BELL, 1.0, x))

    @jax.jit
    def run(key, at):
        x0, keys, pushed, base = drawn(bound, 2048, kappa, key)
        renoise = lambda k, x: samplers.renoise(bound, x, GRID, key=k, interpolant=PATH, kappa=kappa)  # noqa: E731
        again = jax.vmap(renoise)(jax.random.clone(keys)[:8], x0[:8])
        found = jax.vmap(lambda x: likelihood.log_density(bound, x, GRID[-2:], base=base))(at)
        return pushed, again, log_p(pushed.x), found.log_density, log_p(at)

    pushed, again, true, found, want = run(jax.random.key(0), np.array([[0.7, -0.4], [0.2, 0.1]]))
    np.testing.assert_allclose(pushed.x[:8], again, rtol=1e-12)
    assert np.all(pushed.valid)
    # A normal mixture of 2048 components in the plane; a forgotten constant would be off by log 2048 or log sigma.
    assert np.median(np.abs(pushed.log_density - true)) < 0.05
    np.testing.assert_allclose(found, want, atol=0.1)


@pytest.mark.representatives("0.6")
@pytest.mark.parametrize("kappa", [0.6, 1.0])
def test_weights_given_the_batch_are_unbiased_for_a_map_that_is_wrong(kappa, assert_mean):
    """E[ mean_n w_n f(x_n) ] over batches of 16 is the target's own: its integral, mean and second moment."""
    oracle = oracles.gaussian(PATH)
    bound = bent(oracle).bind(BELL)

    @jax.jit
    @jax.vmap
    def batch(key):
        _, _, pushed, _ = drawn(bound, 16, kappa, key)
        target = jax.vmap(lambda x: oracle.log_density(BELL, 1.0, x))(pushed.x)
        w = jnp.exp(target - pushed.log_density)
        values = jnp.stack([jnp.ones(16), pushed.x[:, 0], pushed.x[:, 1], pushed.x[:, 0] * pushed.x[:, 1]])
        return jnp.mean(w[None] * values, axis=1), jnp.mean(values, axis=1)

    weighted, plain = batch(jax.random.split(jax.random.key(1), 2000))
    exact = np.array([1.0, 0.7, -0.4, 0.1 - 0.28])
    assert_mean(weighted, exact)
    errors = np.abs(plain.mean(0) - exact)[1:] / (plain.std(0)[1:] / np.sqrt(len(plain)))
    assert errors.max() > 20


@pytest.mark.slow
def test_the_divergence_given_the_batch_falls_to_the_samplers_own_from_above():
    """Of the exact map, whose own is zero: KL(q, target) and KL(target, q) over batches, by the number of samples."""
    oracle = oracles.gaussian(PATH)
    bound = oracle.flow_map.bind(BELL)

    def both(key, count):
        batch_key, data_key = jax.random.split(key)
        _, _, pushed, base = drawn(bound, count, 1.0, batch_key)
        # Data, as ends of the exact map's last jump.
        before = jax.vmap(lambda x: bound.jump(0.0, GRID[-2], x))(jax.random.normal(data_key, (16, DIM)))
        data = jax.vmap(lambda x: likelihood.push(bound, x, jnp.asarray(GRID[-2:]), base=base))(before)
        log_p = jax.vmap(lambda x: oracle.log_density(BELL, 1.0, x))
        return jnp.mean(pushed.log_density - log_p(pushed.x)), jnp.mean(log_p(data.x) - data.log_density)

    found = []
    for count, batches in ((16, 400), (256, 100)):
        keys = jax.random.split(jax.random.key(count), batches)
        values = np.stack(jax.jit(lambda keys, count=count: jax.lax.map(lambda k: both(k, count), keys))(keys))
        found.append((values.mean(axis=1), values.std(axis=1) / np.sqrt(batches)))
    (few, few_error), (many, many_error) = found
    assert np.all(few - many > 4 * np.hypot(few_error, many_error))
    assert np.all(np.abs(many) < 0.1 * few + 4 * many_error)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": (0.0, 1.0)}, "grid: expected concrete times of two jumps"),
        ({"grid": (0.0, 0.5, 0.9)}, "of which the last is 1"),
        ({"kappa": 0.0}, "kappa: expected a number in"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {"grid": GRID, "kappa": 1.0, **change}
    bound = oracles.gaussian(PATH).flow_map.bind(BELL)
    with pytest.raises(ValueError, match=message):
        keys = jax.random.split(jax.random.key(0), 2)
        likelihood.renoised(bound, jnp.zeros((2, DIM)), keys=keys, interpolant=PATH, **arguments)
